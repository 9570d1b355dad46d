"""Linear attention: the exponential replaced by a product of features, so the past is a sum.

It is another mechanism, not a faster softmax. Follow this file to add a mechanism without weights.
"""

import functools
from collections.abc import Callable

import jax.numpy as jnp

from attention_jax.checks import (
    as_size,
    check_function,
    check_qkv,
    is_array,
    public,
    told,
)
from attention_jax.functional.masks import Mask, as_mask, is_causal
from attention_jax.functional.mesh import attended, in_auto
from attention_jax.types import Array


def elu_plus_one(x: Array) -> Array:
    """elu(x) + 1: positive, and close to exp(x) below zero. Katharopoulos et al., equation 7."""
    # exp(x), not expm1(x) + 1, which cancels for very negative x.
    return jnp.where(x > 0, x + 1, jnp.exp(jnp.where(x > 0, 0, x)))


@public
def linear_attention(
    query: Array,
    key: Array,
    value: Array,
    *,
    mask: Mask | None = None,
    feature_map: Callable[[Array], Array] = elu_plus_one,
    chunk_size: int = 64,
) -> Array:
    """Averages the values with weights phi(query) phi(key)^T, in time and memory linear in S.

    Args:
        query: `[..., T, N, H]`.
        key: `[..., S, K, H]`, where K divides N: query head n reads key head n // (N / K).
        value: `[..., S, K, V]`.
        mask: None, or `masks.causal()`: query t sees the keys s <= t.
        feature_map: phi, `[..., H] -> [..., F]`, nowhere negative.
        chunk_size: How many positions the causal form computes at once; the result does not
            depend on it. F * V numbers are kept per chunk.

    Returns:
        `[..., T, N, V]` in the dtype of `query`. A query without keys (S = 0), or whose weights are
        all zero, returns zeros. A query that sees a NaN or Inf in a key or a value returns NaN;
        other queries and their gradients are not affected.

    Raises:
        ValueError: The shapes do not fit together.
        TypeError: An argument has the wrong type.
        NotImplementedError: Another mask; `dot_product_attention` takes any.

    Reference:
        Katharopoulos et al. 2020, "Transformers are RNNs", equations 5 and 9.
        https://arxiv.org/abs/2006.16236
    """
    query, key, value = check_qkv(query, key, value)
    chunk_size = as_size("chunk_size", chunk_size)
    check_function("feature_map", feature_map)
    mask = None if mask is None else as_mask(mask)
    causal = is_causal(mask)
    if mask is not None and not causal:
        raise NotImplementedError(
            f"linear_attention takes mask=None or masks.causal(), got {mask!r}: "
            "use dot_product_attention."
        )
    compute = functools.partial(
        _compute, causal=causal, feature_map=feature_map, chunk_size=chunk_size
    )
    return in_auto(compute, (query, key, value), attended(query))


def _compute(query, key, value, *, causal, feature_map, chunk_size):
    *batch, T, N, _ = query.shape
    S, K, V = value.shape[-3:]
    out_dtype = query.dtype
    dtype = jnp.promote_types(jnp.result_type(query, key, value), jnp.float32)
    heads_first = (jnp.swapaxes(x, -2, -3).astype(dtype) for x in (query, key, value))
    query, key, value = heads_first  # [..., N, T, H], [..., K, S, H], [..., K, S, V]
    # 0 * NaN is NaN, and sums would spread it to all queries, so NaN must not enter a product.
    spoilt = ~(jnp.isfinite(key).all(-1) & jnp.isfinite(value).all(-1))  # [..., K, S]
    key, value = (jnp.where(spoilt[..., None], 0, x) for x in (key, value))

    query, key = (_features(feature_map, x) for x in (query, key))  # [..., N, T, F], [..., K, S, F]
    query = query.reshape(*batch, K, N // K, T, query.shape[-1])  # [..., K, G, T, F]
    # A column of ones: its mixed value is the sum of the weights.
    value = jnp.concatenate([value, jnp.ones_like(value[..., :1])], axis=-1)

    attend = _causal if causal else _bidirectional
    sums = attend(query, key, value, chunk_size)  # [..., K, G, T, V + 1]
    mixed, total = sums[..., :-1], sums[..., -1:]
    mixed = jnp.where(total == 0, 0, mixed / jnp.where(total == 0, 1, total))

    first = jnp.min(jnp.where(spoilt, jnp.arange(S), T + S), axis=-1, initial=T + S)  # [..., K]
    seen = first[..., None] <= (jnp.arange(T) if causal else S)  # [..., K, T or 1]
    mixed = jnp.where(seen[..., None, :, None], jnp.nan, mixed)
    mixed = mixed.reshape(*batch, N, T, V)
    return jnp.swapaxes(mixed, -2, -3).astype(out_dtype)


def _features(feature_map, x: Array) -> Array:
    features = feature_map(x)
    if not is_array(features) or features.shape[:-1] != x.shape[:-1]:
        came = features.shape if is_array(features) else told(features)
        raise ValueError(f"feature_map must map {x.shape} to (*{x.shape[:-1]}, F), got {came}.")
    return features


def _bidirectional(query: Array, key: Array, value: Array, chunk_size: int) -> Array:
    """Every query reads the same sum over all keys."""
    del chunk_size
    state = jnp.einsum("...KSF,...KSV->...KFV", key, value)
    return jnp.einsum("...KGTF,...KFV->...KGTV", query, state)


def _causal(query: Array, key: Array, value: Array, chunk_size: int) -> Array:
    """Every query reads the sum over the chunks before its own, and its own chunk key by key."""
    T, S = query.shape[-2], key.shape[-2]
    length = max(T, S, 1)
    # Positions i, j within a chunk; m counts chunks. An export may leave the length open.
    c = min(chunk_size, length) if isinstance(length, int) else chunk_size
    query, key, value = (_chunks(x, length, c) for x in (query, key, value))

    state = jnp.einsum("...KmjF,...KmjV->...KmFV", key, value)
    # Shift instead of subtracting: large numbers in a query's own chunk would cancel its past.
    shift = [(0, 0)] * (state.ndim - 3) + [(1, 0), (0, 0), (0, 0)]
    before = jnp.cumsum(jnp.pad(state[..., :-1, :, :], shift), axis=-3)
    past = jnp.einsum("...KGmiF,...KmFV->...KGmiV", query, before)

    weights = jnp.einsum("...KGmiF,...KmjF->...KGmij", query, key)
    weights = jnp.where(jnp.tri(c, dtype=bool), weights, 0)
    present = jnp.einsum("...KGmij,...KmjV->...KGmiV", weights, value)
    sums = past + present
    return sums.reshape(*sums.shape[:-3], sums.shape[-3] * c, sums.shape[-1])[..., :T, :]


def _chunks(x: Array, length: int, c: int) -> Array:
    """`[..., positions, features]` -> `[..., m, c, features]`, padded with zeros."""
    chunks = -(-length // c)
    padding = [(0, 0)] * (x.ndim - 2) + [(0, chunks * c - x.shape[-2]), (0, 0)]
    return jnp.pad(x, padding).reshape(*x.shape[:-2], chunks, c, x.shape[-1])
