"""Dropout that depends on the place of a weight only.

`jax.random.bernoulli(rng, rate, shape)` gives other bits for another shape, so a blockwise path, a
padded batch or a cached prefix would drop other weights than the definition. Here a hash of (rng,
batch, head, query, key) decides. So every implementation, block size and padded length drops the
same weights.

Batch and head are counted in the arrays that the function gets. Under `shard_map` or `pmap` these
are one device's part, so with one rng every device would drop the same weights. Give each device
another rng: `jax.random.fold_in(rng, jax.lax.axis_index(axis_name))`. The exception is a sequence
or heads over several devices: `parallel` counts those in the whole, by a `Part` of one rng.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from attention_jax.checks import as_rng, jax_defaults
from attention_jax.functional.tiles import Tile
from attention_jax.types import Array

_STRIDE = 0x9E3779B9  # Odd, and far from simple: 2^32 over the golden ratio.


class Shared(NamedTuple):
    """In the place of a PRNG key: one dropout mask for all batch rows and heads."""

    rng: Array


class Part(NamedTuple):
    """In the place of a PRNG key: its dropout on a part of the heads, queries and keys.

    The three numbers say where the part begins in the whole.
    """

    rng: Array | Shared
    head: int | Array
    query: int | Array
    key: int | Array


def row_words(
    rng: Array | Shared | Part, batch_shape: Sequence[int], num_heads: int, num_queries: int
) -> Array:
    """Two random words for each row of the logits, `[..., N, T, 2]` uint32.

    With a `Shared` key the axes before T have one entry. The PRNG folds in one index after another,
    so a row's words do not depend on the number of rows.
    """
    rng, head, query, key = rng if isinstance(rng, Part) else (rng, 0, 0, 0)
    if isinstance(rng, Shared):
        words = row_words(Part(rng.rng, 0, query, key), (), 1, num_queries)  # [1, T, 2]
        return words.reshape(*[1] * len(batch_shape), *words.shape)
    shape = (*batch_shape, num_heads, num_queries)
    starts = (*[0] * len(batch_shape), head, query)
    rows = as_rng("dropout_rng", rng)[None]
    for start, size in zip(starts, shape, strict=True):
        fold = jax.vmap(jax.random.fold_in, (None, 0))
        index = start + jnp.arange(size)
        rows = jax.vmap(fold, (0, None))(rows, index).reshape(rows.shape[0] * size)
    words = jax.random.key_data(rows).reshape(*shape, 2)
    if isinstance(key, int) and key == 0:
        return words
    # `keep_tile` adds the same multiple of a key's place, so this is where the keys begin.
    return words.at[..., 0].add(jnp.uint32(_STRIDE) * key.astype(jnp.uint32))


def keep_tile(words: Array, rate: float | Array, at: Tile) -> Array:
    """Which weights of a tile survive: True with probability 1 - rate.

    Args:
        words: The rows' words, `[..., N, t_size, 2]`.
        rate: The probability of being dropped, in steps of 2 ** -32.
        at: The tile; only its keys' positions matter.

    Returns:
        Boolean, `[..., N, t_size, s_size]`.
    """
    first, second = words[..., :1], words[..., 1:]
    # A row's two words enter one after the other, so rows that share one word are still unrelated.
    bits = _mix(at.s.astype(jnp.uint32) * jnp.uint32(_STRIDE) + first)
    bits = _mix(bits ^ second)
    return bits >= (jnp.float32(rate) * 2.0**32).astype(jnp.uint32)


@jax_defaults()
def keep_mask(
    rng: Array | Shared | Part,
    rate: float | Array,
    batch_shape: Sequence[int],
    num_heads: int,
    num_queries: int,
    num_keys: int,
) -> Array:
    """The weights that survive, boolean `[..., N, T, S]`; every implementation uses these.

    With a `Shared` key the axes before T have one entry.
    """
    words = row_words(rng, batch_shape, num_heads, num_queries)
    return keep_tile(words, rate, Tile.whole(num_queries, num_keys))


def _mix(x: Array) -> Array:
    """A bijection of uint32 in which every input bit flips about half of the output bits.

    Reference:
        Wellons 2018, "Prospecting for Hash Functions", lowbias32.
        https://nullprogram.com/blog/2018/07/31/
    """
    x = (x ^ (x >> 16)) * jnp.uint32(0x7FEB352D)
    x = (x ^ (x >> 15)) * jnp.uint32(0x846CA68B)
    return x ^ (x >> 16)
