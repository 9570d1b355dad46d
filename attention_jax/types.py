"""The words that every module shares.

Axis letters, the same in docstrings, einsum strings and comments:

    B  batch                     H  head size of queries and keys
    T  queries                   V  head size of values
    S  keys and values           D  model width
    N  query heads               F  feature-map size
    K  key/value heads           P  labelled positions
    G  queries per key head, N / K

Arrays are `[..., T, N, H]` at every interface; `...` is any number of batch axes, also none.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import jax

if TYPE_CHECKING:
    from chex import Array, PRNGKey
    from chex import ArrayTree as PyTree
else:
    # At run time these are only names, and importing chex would take 0.15 s.
    Array = PRNGKey = jax.Array
    PyTree = Any

# (query [..., T, N, H], key [..., S, K, H], value [..., S, K, V], *, mask, ...) -> [..., T, N, V]
AttentionFn = Callable[..., Array]
# (rng, shape, dtype) -> Array
Initializer = Callable[..., Array]


class Batch(NamedTuple):
    """One batch of a task. Rows are independent of one another.

    Attributes:
        inputs: Tokens `[B, T]` int32, or vectors `[B, T, D]`.
        targets: Labels `[B, P]` int32 for a token task, vectors `[B, T, D]` for a continuous one.
        weights: How much each target counts, `[B, P]` or `[B, T]`, float32; 0 is ignored.
        positions: `[B, P]` int32, the positions that the targets belong to. None: all T of them.
    """

    inputs: Array
    targets: Array
    weights: Array
    positions: Array | None = None


class TrainState(NamedTuple):
    """The state that a training run carries from step to step; a checkpoint holds all of it.

    Attributes:
        step: Optimizer steps done so far, int32 scalar.
        params: The model's parameters.
        opt_state: The optimizer's state.
        rng: The PRNG key that dropout is derived from, together with `step`.
    """

    step: Array
    params: PyTree
    opt_state: PyTree
    rng: PRNGKey
