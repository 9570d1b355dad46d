"""What is left of a model as its heads go, one after the other."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from attention_jax.analysis.heads import (
    Loss,
    apply_with_gates,
    check_heads,
    gated_heads,
    of_each_row,
)
from attention_jax.checks import as_integers, told
from attention_jax.types import Array, PyTree

Head = tuple[str, int]  # The path of its layer, and its number.


def ranked(scores: Mapping[str, Array]) -> list[Head]:
    """All heads, the one with the least score first.

    >>> ranked({"a": [0.3, 0.1], "b": [0.2]})
    [('a', 1), ('b', 0), ('a', 0)]

    Args:
        scores: `[N]` for each layer, as `importance` gives them.
    """
    heads = [(path, n) for path, values in scores.items() for n in range(len(values))]
    return sorted(heads, key=lambda head: float(scores[head[0]][head[1]]))


def removal_curve(
    model: nn.Module,
    params: PyTree,
    inputs: Array,
    loss: Loss,
    orders: Sequence[Sequence[Head]],
    *,
    counts: Sequence[int] | None = None,
    **options: Any,
) -> np.ndarray:
    """The mean loss as heads are removed in some orders, all in one program.

    Args:
        model, params, inputs, loss, **options: As in `importance`; `loss` may give another measure
            of each row, as its accuracy.
        orders: Lists of heads, as `ranked` gives one: the first is removed first.
        counts: How many heads to remove, as `[0, 2, 4]`. None: from none to all of the shortest
            order.

    Returns:
        `[len(orders), len(counts)]`.

    Raises:
        ValueError: A head does not exist, there is no order, a count is longer than one, or the
            loss gives other than a number for each row.
        TypeError: An order is no list of heads, or a count no whole number.
        NotImplementedError: No head of the model has a gate.

    Reference:
        Michel et al. 2019, "Are Sixteen Heads Really Better than One?", section 4.2.
        https://arxiv.org/abs/1905.10650
    """
    heads = gated_heads(model, params, inputs, **options)
    if not orders:
        raise ValueError("orders must have one order of heads at least, got none.")
    orders = [_as_order(order) for order in orders]
    shortest = min(map(len, orders))
    counts = range(shortest + 1) if counts is None else as_integers("counts", counts, 1).tolist()
    if not all(0 <= count <= shortest for count in counts):
        raise ValueError(f"counts must be from 0 to {shortest}, got {list(counts)}.")
    gates = {path: np.ones((len(orders), len(counts), N), np.float32) for path, N in heads.items()}
    for i, order in enumerate(orders):
        for path, n in order:
            check_heads({path: [n]}, heads)
        if len(set(order)) < len(order):
            raise ValueError(f"orders must name each head once, got {list(order)}.")
        for j, count in enumerate(counts):
            for path, n in order[:count]:
                gates[path][i, j, n] = 0

    @jax.jit
    def run(params, inputs, gates):
        def one(gates):
            outputs = apply_with_gates(model, params, inputs, gates, **options)
            return of_each_row(loss, outputs, inputs).mean()

        return jax.lax.map(one, gates)

    flat = {path: jnp.asarray(x.reshape(-1, x.shape[-1])) for path, x in gates.items()}
    return np.asarray(run(params, inputs, flat)).reshape(len(orders), len(counts))


def _as_order(order: Sequence[Head]) -> list[Head]:
    for head in order:
        is_head = isinstance(head, tuple | list) and len(head) == 2 and isinstance(head[0], str)
        if not is_head:
            raise TypeError(
                f"orders must be lists of heads, each a path and a number, got {told(head)}."
            )
    return [tuple(head) for head in order]
