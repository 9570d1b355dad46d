"""Where a token stands: rotations of queries and keys, and vectors to add to the inputs."""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax.numpy as jnp
from jax import lax

from attention_jax.checks import (
    as_array,
    as_size,
    check_floating,
    check_number,
    is_real,
    jax_defaults,
    known,
)
from attention_jax.functional.mesh import in_auto, partition_of
from attention_jax.types import Array


@jax_defaults()
def rotary(
    x: Array,
    positions: Array | None = None,
    *,
    base: float = 10_000.0,
    fraction: float = 1.0,
) -> Array:
    """Rotates pairs of coordinates by angles that grow with the position.

    The product of a rotated query and a rotated key depends on their distance alone. Coordinate i
    is paired with i + R / 2, where R is the number of rotated coordinates (the "half" layout).

    Args:
        x: Queries or keys, `[..., T, N, H]`.
        positions: `[..., T]`, broadcastable over the batch axes. Defaults to 0, 1, ..., T - 1.
        base: The wavelength of pair i is 2 pi base ** (2 i / R) positions.
        fraction: The share of the H coordinates that is rotated, the first R = fraction * H.

    Returns:
        The shape and dtype of `x`. Angles are computed in float32 (float64 for float64 inputs).

    Raises:
        ValueError: R is odd, or `fraction` is not in [0, 1], or shapes do not fit.
        TypeError: An argument has the wrong type.

    Reference:
        Su et al. 2021, "RoFormer", equation 34. https://arxiv.org/abs/2104.09864
    """
    check_floating("x", x)
    if x.ndim < 3:
        raise ValueError(f"x must be [..., T, N, H], got shape {x.shape}.")
    check_number("fraction", fraction)
    check_number("base", base)
    if known(fraction) is None:
        raise TypeError("fraction must be known before the program runs, got a traced number.")
    fraction = known(fraction)
    if not 0 <= fraction <= 1:
        raise ValueError(f"fraction must lie in [0, 1], got {fraction}.")
    if known(base) is not None and not known(base) > 0:
        raise ValueError(f"base must be positive, got {base}.")
    T, H = x.shape[-3], x.shape[-1]
    rotated = round(fraction * H)
    if rotated % 2:
        raise ValueError(
            f"fraction must rotate an even number of coordinates, got {rotated} of head size {H}."
        )
    positions = jnp.arange(T) if positions is None else as_array("positions", positions)
    if not is_real(positions.dtype):
        raise TypeError(f"positions must be real numbers, got {positions.dtype}.")
    batch = x.shape[:-3]
    fits = positions.ndim > 0 and positions.shape[-1] in (1, T) and positions.ndim <= len(batch) + 1
    if not fits or any(
        n not in (1, m) for n, m in zip(positions.shape[-2::-1], batch[::-1], strict=False)
    ):
        raise ValueError(
            f"positions must broadcast to [..., T] = {(*batch, T)}, got shape {positions.shape}."
        )

    dtype = jnp.promote_types(x.dtype, jnp.float32)
    pairs = jnp.arange(rotated // 2, dtype=dtype)
    frequencies = base ** (-2 * pairs / max(rotated, 1))
    angles = positions[..., None, None].astype(dtype) * frequencies  # [..., T, 1, R / 2]
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    first, second = jnp.split(x[..., :rotated].astype(dtype), 2, axis=-1)
    turned = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    turned = turned.astype(x.dtype)
    return turned if rotated == H else jnp.concatenate([turned, x[..., rotated:]], axis=-1)


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
