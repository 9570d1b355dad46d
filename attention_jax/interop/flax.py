"""Attention for flax's own layers, linen and nnx."""

import contextlib

import jax
import jax.numpy as jnp

from attention_jax.checks import (
    as_array,
    check_dtype,
    check_flag,
    check_qkv,
    is_real,
    told,
)
from attention_jax.functional import masks
from attention_jax.functional.biases import Bias
from attention_jax.functional.dot_product import attention_weights, dot_product_attention
from attention_jax.functional.dropout import Shared
from attention_jax.functional.masks import Mask
from attention_jax.types import Array


def attention_fn(
    query: Array,
    key: Array,
    value: Array,
    bias: Array | Bias | None = None,
    mask: Array | Mask | None = None,
    *,
    broadcast_dropout: bool = True,
    dropout_rng: Array | None = None,
    dropout_rate: float = 0.0,
    deterministic: bool = False,
    dtype: jnp.dtype | None = None,
    precision: jax.lax.Precision | str | None = None,
    module=None,
    is_causal: bool = False,
    force_fp32_for_softmax: bool = False,
    qk_attn_weights_einsum=None,
    attn_weights_value_einsum=None,
    **options,
) -> Array:
    """`dot_product_attention` with flax's signature: `attention_fn=` of
    `flax.linen.MultiHeadDotProductAttention` and of `flax.nnx.MultiHeadAttention`.

    Args:
        query, key, value, bias, dropout_rng, dropout_rate, deterministic: As in
            `dot_product_attention`.
        mask: Boolean, or numbers where 0 means masked, as flax's mask builders make by default.
        broadcast_dropout: One dropout mask `[T, S]` for all batch rows and heads, as flax has it by
            default; False: each has its own. The mask follows from the rng and the positions, so it
            drops other weights than flax's own function does with that rng.
        dtype: All three arrays are cast to it, and so is the result.
        precision: Of the matrix products, "default", "high" or "highest" or a
            `jax.lax.Precision`.
        module: Where the weights `[..., N, T, S]` are sown as `attention_weights`, before dropout.
        is_causal: Query t sees only the keys s <= t that `mask` shows. For a single query and
            several keys `mask` alone decides, because nnx decodes so and puts the token's place
            into its mask. Otherwise there must be as many queries as keys.
        force_fp32_for_softmax: Always honoured: the softmax is in float32 at least.
        qk_attn_weights_einsum, attn_weights_value_einsum: From a layer's `..._einsum_cls`. Refused,
            because this package computes the products itself.
        **options: Further arguments of `dot_product_attention`.

    Returns:
        `[..., T, N, V]`.

    Raises:
        NotImplementedError: A precision by operand, a custom einsum, or `is_causal` where the
            positions of the queries are unknown.
    """
    check_flag("broadcast_dropout", broadcast_dropout)
    check_flag("is_causal", is_causal)
    check_flag("force_fp32_for_softmax", force_fp32_for_softmax)
    query, key, value = check_qkv(query, key, value)
    if dtype is not None:
        check_dtype("dtype", dtype)
        query, key, value = (jnp.asarray(x, dtype) for x in (query, key, value))
    for name, einsum in (
        ("qk_attn_weights_einsum", qk_attn_weights_einsum),
        ("attn_weights_value_einsum", attn_weights_value_einsum),
    ):
        if einsum is not None:
            raise NotImplementedError(
                f"{name} (a layer's {name}_cls) must be None: the products are those of this "
                "package."
            )
    if broadcast_dropout and dropout_rng is not None:
        dropout_rng = Shared(dropout_rng)
    if mask is not None and not isinstance(mask, Mask):
        mask = as_array("mask", mask)
        if mask.dtype != bool and not is_real(mask.dtype):
            raise TypeError(f"mask must be boolean or numbers, got {mask.dtype}.")
        mask = masks.dense(mask != 0)
    if is_causal:
        mask = _causal(mask, query.shape[-3], key.shape[-3])
    with _precision(precision):
        if module is not None:
            asked = {
                name: options[name] for name in ("scale", "softcap", "sinks") if name in options
            }
            _sow(module, attention_weights(query, key, bias, mask, **asked))
        return dot_product_attention(
            query,
            key,
            value,
            bias,
            mask,
            dropout_rng=dropout_rng,
            dropout_rate=dropout_rate,
            deterministic=deterministic,
            **options,
        )


def _causal(mask: Mask | None, T: int, S: int) -> Mask:
    """`mask`, and causal for T queries that begin at the first key."""
    if T == 1 and S > 1 and mask is not None:
        return mask  # A decoded token: its mask hides all that it may not see.
    if T != S:
        raise NotImplementedError(
            f"is_causal=True needs as many queries as keys, or one query and a mask, got {T=} and "
            f"{S=}: give mask=masks.causal(offset), which says where the queries stand."
        )
    return masks.causal() if mask is None else masks.causal() & mask


def _precision(precision):
    if precision is None:
        return contextlib.nullcontext()
    if isinstance(precision, jax.lax.Precision):
        precision = precision.name.lower()
    if not isinstance(precision, str):
        raise NotImplementedError(
            "precision must be one word or jax.lax.Precision for both operands, got "
            f"{told(precision)}."
        )
    try:
        with jax.default_matmul_precision(precision):
            pass
    except ValueError:
        raise ValueError(
            'precision must be "default", "high", "highest" or another word of '
            f"jax.default_matmul_precision, got {told(precision)}."
        ) from None
    return jax.default_matmul_precision(precision)


def _sow(module, weights: Array) -> None:
    """Sows weights in a module of linen or nnx."""
    from flax import linen, nnx

    collection = "intermediates" if isinstance(module, linen.Module) else nnx.Intermediate
    module.sow(collection, "attention_weights", weights)
