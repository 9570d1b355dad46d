"""`scaled_dot_product_attention` with the signature of torch's, for arrays of jax."""

import jax.numpy as jnp

from attention_jax.checks import (
    as_array,
    check_broadcastable,
    check_flag,
    check_floating,
    check_number,
    check_rate,
    is_real,
    jax_defaults,
    known,
)
from attention_jax.functional import masks
from attention_jax.functional.dot_product import dot_product_attention
from attention_jax.types import Array


@jax_defaults()
def scaled_dot_product_attention(
    query: Array,
    key: Array,
    value: Array,
    attn_mask: Array | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
    rng: Array | None = None,
) -> Array:
    """`dot_product_attention`, called as `torch.nn.functional.scaled_dot_product_attention`.

    The layout is torch's: heads stand before positions, and there may be no heads. It gives what
    torch 2.13 gives, except on purpose: NaN and Inf in hidden keys have no influence, logits and
    softmax are in float32 at least, and types may differ. A query that sees no key returns zeros
    and passes zeros back, as in torch since 2.5; older versions return NaN.

    Args:
        query: `[..., N, T, H]` or `[T, H]`. Its axes before T broadcast with those of key and
            value.
        key: `[..., N, S, H]` or `[S, H]`; `[..., K, S, H]` with `enable_gqa`.
        value: `[..., N, S, V]` or `[S, V]`; `[..., K, S, V]` with `enable_gqa`.
        attn_mask: Boolean, True means "may attend"; or numbers to add to the logits. At least two
            axes, broadcastable to `[..., N, T, S]`.
        dropout_p: The probability with which each weight is dropped, in [0, 1).
        is_causal: Query t sees the keys s <= t only; the first query stands at the first key.
        scale: Multiplies the logits. Defaults to `H ** -0.5`.
        enable_gqa: Query heads share key heads: query head n reads key head n // (N / K).
        rng: A PRNG key of jax, which torch keeps in a global state; needed for dropout.

    Returns:
        `[..., N, T, V]` or `[T, V]`, in the dtype of `query`.

    Raises:
        ValueError: Shapes do not fit together, a value is out of its range, dropout has no `rng`,
            or `is_causal` and `attn_mask` are both given, as torch's documentation has it.
        TypeError: An argument has the wrong type.
    """
    for name, x in (("query", query), ("key", key), ("value", value)):
        check_floating(name, x)
        if x.ndim < 2:
            raise ValueError(f"{name} must be [..., heads, length, size], got shape {x.shape}.")
    check_flag("is_causal", is_causal)
    check_flag("enable_gqa", enable_gqa)
    check_number("dropout_p", dropout_p)
    check_rate("dropout_p", dropout_p)
    if rng is None and known(dropout_p) != 0:
        raise ValueError(f"dropout_p={dropout_p} needs rng=, a PRNG key of jax, got None.")
    if scale is not None:
        check_number("scale", scale)
    if is_causal and attn_mask is not None:
        raise ValueError(
            "is_causal=True and attn_mask exclude one another in torch: put both into attn_mask."
        )
    whole = query.ndim == key.ndim == value.ndim == 2
    query, key, value = _with_heads(*map(jnp.asarray, (query, key, value)), enable_gqa)
    bias, mask = None, masks.causal() if is_causal else None
    if attn_mask is not None:
        attn_mask = as_array("attn_mask", attn_mask)
        T, S = query.shape[-3], key.shape[-3]
        if attn_mask.ndim < 2:
            raise ValueError(
                f"attn_mask must have at least the axes [T, S], got shape {attn_mask.shape}."
            )
        check_broadcastable(
            "attn_mask", attn_mask.shape, (*query.shape[:-3], query.shape[-2], T, S)
        )
        if attn_mask.dtype == bool:
            mask = attn_mask
        elif is_real(attn_mask.dtype) and jnp.issubdtype(attn_mask.dtype, jnp.floating):
            bias = attn_mask
        else:
            raise TypeError(f"attn_mask must be boolean or floating, got {attn_mask.dtype}.")
    out = dot_product_attention(
        query, key, value, bias, mask, scale=scale, dropout_rate=dropout_p, dropout_rng=rng
    )
    out = jnp.swapaxes(out, -2, -3)
    return out[0] if whole else out


def _with_heads(query, key, value, grouped):
    """The three in the layout of this package, `[..., length, heads, size]`."""
    shapes = f"{query.shape}, {key.shape} and {value.shape}"
    if grouped and min(query.ndim, key.ndim, value.ndim) < 3:
        raise ValueError(f"enable_gqa=True needs an axis of heads, got shapes {shapes}.")
    query, key, value = (x[None] if x.ndim == 2 else x for x in (query, key, value))
    N, *own = (x.shape[-3] for x in (query, key, value))
    if grouped and any(K == 0 or N % K for K in own):
        raise ValueError(
            f"enable_gqa=True needs a number of query heads that is a multiple of the key heads, "
            f"got shapes {shapes}."
        )
    try:
        heads = N if grouped else jnp.broadcast_shapes((N,), *((K,) for K in own))[0]
        lead = jnp.broadcast_shapes(*(x.shape[:-3] for x in (query, key, value)))
    except ValueError:
        raise ValueError(
            "the axes of query, key and value before the last two must broadcast with one another"
            f"{'' if grouped else ' (or set enable_gqa=True)'}, got shapes {shapes}."
        ) from None
    query = jnp.broadcast_to(query, (*query.shape[:-3], heads, *query.shape[-2:]))
    if own[0] != own[1]:  # Other implementations than this repeat both always.
        key, value = (jnp.repeat(x, heads // x.shape[-3], axis=-3) for x in (key, value))
    return [
        jnp.swapaxes(jnp.broadcast_to(x, (*lead, *x.shape[-3:])), -2, -3)
        for x in (query, key, value)
    ]
