"""What a task is: a source of batches with no state."""

from collections.abc import Callable
from typing import NamedTuple

import jax

from attention_jax.types import Array, Batch, PyTree


class Task(NamedTuple):
    """Something to learn, generated where it is used.

    Attributes:
        name: Its name in `TASKS`.
        sample: `(rng, rows [B] int32) -> Batch`. Row r of the batch is a function of `(rng, r)`
            alone, so the rows may be split over devices in any way.
        loss: `"squared_error"` (continuous targets) or `"cross_entropy"` (tokens).
        inputs: Width D of continuous inputs. None: the inputs are tokens.
        vocab_size: Number of tokens. None: the inputs are continuous.
        baseline: What a model without attention could claim: its name, and a function from a batch
            to its mean loss there, a scalar. A model that has learnt anything stays below.
    """

    name: str
    sample: Callable[[Array, Array], Batch]
    loss: str
    inputs: int | None
    vocab_size: int | None
    baseline: tuple[str, Callable[[Batch], Array]]


def per_row(make_row: Callable[[Array], PyTree]) -> Callable[[Array, Array], PyTree]:
    """Turns a generator of one row into a generator of any rows.

    Args:
        make_row: `rng -> ` arrays without the axis B.

    Returns:
        `(rng, rows [B]) -> ` the arrays with it, whose row r comes from `fold_in(rng, r)`.
    """

    def sample(rng: Array, rows: Array) -> PyTree:
        return jax.vmap(lambda row: make_row(jax.random.fold_in(rng, row)))(rows)

    return sample
