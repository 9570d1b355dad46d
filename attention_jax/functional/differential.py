"""Differential attention: the difference of two softmaxes, which cancels their common part."""

import jax.numpy as jnp

from attention_jax.checks import as_floating, check_number, check_qkv, jax_defaults, public
from attention_jax.functional.biases import Bias
from attention_jax.functional.dot_product import attention_weights, dot_product_attention
from attention_jax.functional.masks import Mask
from attention_jax.types import Array


@public
def differential_attention(
    query: Array,
    key: Array,
    value: Array,
    bias: Array | Bias | None = None,
    mask: Array | Mask | None = None,
    *,
    lambda_full: float | Array = 0.8,
    scale: float | Array | None = None,
    softcap: float | None = None,
    sinks: Array | None = None,
    dropout_rate: float | Array = 0.0,
    dropout_rng: Array | None = None,
    deterministic: bool = False,
    implementation: str | None = None,
    block_size: int | tuple[int, int] | None = None,
) -> Array:
    """Averages the values with the difference of two attention maps.

        (softmax(q_1 k_1^T / sqrt(H / 2)) - lambda softmax(q_2 k_2^T / sqrt(H / 2))) value

    The first halves of queries and keys make the first map, the second halves the second. All other
    arguments apply to both maps, as in `dot_product_attention`. Dropout drops the same places of
    both, so it drops weights of the difference.

    Args:
        query: `[..., T, N, H]`, H even.
        key: `[..., S, K, H]`, where K divides N: query head n reads key head n // (N / K).
        value: `[..., S, K, V]`. The paper has V = H: twice the size of a query's half.
        bias: As in `dot_product_attention`.
        mask: As in `dot_product_attention`.
        lambda_full: The factor of the second map, which is subtracted: one number, or `[N]`.
        scale: Multiplies the logits. Defaults to `(H / 2) ** -0.5`.
        softcap, sinks, dropout_rate, dropout_rng, deterministic, implementation, block_size: As in
            `dot_product_attention`.

    Returns:
        `[..., T, N, V]` in the dtype of `query`. A query with no visible key returns zeros. The
        weights of a row sum to 1 - lambda.

    Raises:
        ValueError: Shapes do not fit together, H is odd, or a value is out of its range.
        TypeError: An argument has the wrong type.
        NotImplementedError: The implementation cannot honour the request.

    Reference:
        Ye et al. 2024, "Differential Transformer", equation 1. https://arxiv.org/abs/2410.05258
    """
    query, key, value = check_qkv(query, key, value)

    def attend(query, key):
        return dot_product_attention(
            query,
            key,
            value,
            bias,
            mask,
            scale=scale,
            softcap=softcap,
            sinks=sinks,
            dropout_rate=dropout_rate,
            dropout_rng=dropout_rng,
            deterministic=deterministic,
            implementation=implementation,
            block_size=block_size,
        )

    return _difference(query, key, lambda_full, attend, axes=1).astype(query.dtype)


@public
def differential_weights(
    query: Array,
    key: Array,
    bias: Array | Bias | None = None,
    mask: Array | Mask | None = None,
    *,
    lambda_full: float | Array = 0.8,
    scale: float | Array | None = None,
    softcap: float | None = None,
    sinks: Array | None = None,
) -> Array:
    """The weights `[..., N, T, S]` of `differential_attention`: the difference of its two maps."""
    query, key, _ = check_qkv(query, key, key)
    options = {"scale": scale, "softcap": softcap, "sinks": sinks}
    attend = lambda query, key: attention_weights(query, key, bias, mask, **options)
    return _difference(query, key, lambda_full, attend, axes=2)


differential_attention.weights = differential_weights  # For layers, which show them.


def _difference(query, key, lambda_full, attend, axes) -> Array:
    """What `attend` makes of the first halves, minus lambda times what it makes of the second.

    Its result has `axes` axes behind that of the heads.
    """
    N, H = query.shape[-2:]
    if H % 2:
        raise ValueError(f"head size H must be even, got query shape {query.shape}.")
    if isinstance(lambda_full, int | float):
        check_number("lambda_full", lambda_full)
        lambda_full = float(lambda_full)
    lambda_full = as_floating("lambda_full", lambda_full)
    if lambda_full.shape not in ((), (N,)):
        raise ValueError(
            f"lambda_full must be one number or [N] with {N=}, got shape {lambda_full.shape}."
        )
    halves = (jnp.split(x, 2, axis=-1) for x in (query, key))
    first, second = (attend(q, k) for q, k in zip(*halves, strict=True))
    dtype = jnp.promote_types(query.dtype, jnp.float32)
    share = lambda_full.astype(dtype).reshape(lambda_full.shape + (1,) * axes)
    return first.astype(dtype) - share * second.astype(dtype)


@jax_defaults()
def reparametrized_lambda(
    query_1: Array, key_1: Array, query_2: Array, key_2: Array, lambda_init: float
) -> Array:
    """exp(query_1 . key_1) - exp(query_2 . key_2) + lambda_init, from four vectors `[H / 2]`.

    In this form lambda learns as fast as the logits. Ye et al. 2024, equation 2.
    """
    dtype = jnp.promote_types(query_1.dtype, jnp.float32)
    first, second = (
        jnp.exp(jnp.sum(q.astype(dtype) * k.astype(dtype)))
        for q, k in ((query_1, key_1), (query_2, key_2))
    )
    return first - second + lambda_init
