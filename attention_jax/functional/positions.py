"""Where a token stands: rotations of queries and keys, and vectors to add to the inputs."""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax.numpy as jnp
from jax import lax

from attention_jax.checks import as_size, jax_defaults
from attention_jax.functional.mesh import in_auto, partition_of
from attention_jax.functional.rotary import dynamic, linear, llama3, rotary, yarn
from attention_jax.types import Array

__all__ = ["dynamic", "linear", "llama3", "rotary", "sinusoidal", "yarn"]


def sinusoidal(num_positions: int, features: int) -> Array:
    """Waves of geometrically growing length, `[num_positions, features]` float32.

    The first half of the features are sines, the second half cosines of the same angles
    t / 10000 ** (i / (features / 2)).

    Raises:
        ValueError: `features` is odd, or a size is negative.

    Reference:
        Vaswani et al. 2017, "Attention Is All You Need", section 3.5.
        https://arxiv.org/abs/1706.03762
    """
    num_positions = as_size("num_positions", num_positions, minimum=0)
    if as_size("features", features) % 2:
        raise ValueError(f"features must be even, got {features}.")
    return sinusoidal_at(jnp.arange(num_positions), features)


@jax_defaults()
def sinusoidal_at(positions: Array, features: int) -> Array:
    """The rows of `sinusoidal` at any positions, `[...] -> [..., features]`."""
    waves = jnp.arange(features // 2, dtype=jnp.float32)
    angles = positions[..., None] * 10_000.0 ** (-waves / (features // 2))
    return jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=-1)


class Standing(NamedTuple):
    """The positions of the tokens in a row with several documents or padding.

    Attributes:
        positions: `[..., T]` int32, counted from 0 in each document; 0 for padding.
        places: `[..., T]` int32, the places of the tokens if each document were in one piece, with
            padding behind all. Within a document distances are those of `positions`.
    """

    positions: Array
    places: Array


def in_documents(length: int, ids: Sequence[Array], padding: Sequence[Array]) -> Standing:
    """Where tokens stand in their documents.

    Args:
        length: T.
        ids: Integers `[..., T]`: two tokens belong to one document if all their ids are equal.
        padding: Booleans `[..., T]`: a token with any True belongs to no document.
    """
    shape = jnp.broadcast_shapes((length,), *(x.shape for x in (*ids, *padding)))
    rows = max((*ids, *padding), key=lambda x: (x.ndim, x.size))
    split = partition_of(rows, *range(rows.ndim - 1), None)

    def sort(ids, padding):
        hidden = functools.reduce(jnp.logical_or, padding, jnp.zeros(shape, bool))
        groups = [hidden.astype(jnp.int32), *(jnp.broadcast_to(x, shape) for x in ids)]
        index = lax.broadcasted_iota(jnp.int32, shape, len(shape) - 1)
        # The first sort puts each document in one piece, in order; the second sort undoes it.
        *groups, order = lax.sort((*groups, index), num_keys=len(groups))
        begins = index == 0
        for group in groups:
            begins |= group != jnp.roll(group, 1, axis=-1)
        first = lax.cummax(jnp.where(begins, index, 0), axis=len(shape) - 1)
        positions = jnp.where(groups[0] == 1, 0, index - first)
        return Standing(*lax.sort((order, positions, index), num_keys=1)[1:])

    return in_auto(sort, (ids, padding), Standing(split, split))
