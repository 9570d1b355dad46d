"""Sigmoid attention: each weight by itself, without a softmax."""

import math

import jax
import jax.numpy as jnp

from attention_jax.checks import as_floating, check_number, check_qkv, jax_defaults, public
from attention_jax.functional.biases import Bias
from attention_jax.functional.dense import mix, visible_logits, where
from attention_jax.functional.masks import Mask
from attention_jax.functional.mesh import attended, in_auto, partition_of
from attention_jax.functional.options import make_options
from attention_jax.types import Array


@public
def sigmoid_attention(
    query: Array,
    key: Array,
    value: Array,
    bias: Array | Bias | None = None,
    mask: Array | Mask | None = None,
    *,
    offset: float | Array = 0.0,
    scale: float | Array | None = None,
    softcap: float | None = None,
    dropout_rate: float | Array = 0.0,
    dropout_rng: Array | None = None,
    deterministic: bool = False,
) -> Array:
    """Adds up the values, each with a separate weight between 0 and 1.

        sigmoid(softcap(scale * query key^T) + bias + offset - log(n), where=mask) value

    n is the number of keys that the query may attend to, so padding and the capacity of a cache
    change no result. At small logits and an offset of 0 the weights of a row sum to about 1, less
    where n is small. All logits of a call are in memory at once.

    Args:
        query: `[..., T, N, H]`.
        key: `[..., S, K, H]`, where K divides N: query head n reads key head n // (N / K).
        value: `[..., S, K, V]`.
        offset: Added to all logits of a head: one finite number, or `[N]`. The paper's b is
            `offset - log(n)`, and is learnt or stays at `-log(n)`; there n is the length.
        bias, mask, scale, softcap, dropout_rate, dropout_rng, deterministic: As in
            `dot_product_attention`.

    Returns:
        `[..., T, N, V]` in the dtype of `query`. A query with no visible key returns zeros.

    Raises:
        ValueError: Shapes do not fit together, or a value is out of its range.
        TypeError: An argument has the wrong type.

    Reference:
        Ramapuram et al. 2024, "Theory, Analysis, and Best Practices for Sigmoid Self-Attention",
        section 3. https://arxiv.org/abs/2409.04431
    """
    query, key, value = check_qkv(query, key, value)
    options = make_options(
        query,
        bias,
        mask,
        scale=scale,
        softcap=softcap,
        dropout_rate=dropout_rate,
        dropout_rng=dropout_rng,
        deterministic=deterministic,
    )

    def compute(query, key, value, offset, options):
        weights = _weights(query, key, offset, options)
        inputs = jnp.result_type(query, key, value)
        return mix(weights, value, options, inputs).astype(query.dtype)

    offset = _check_offset(offset, query)
    return in_auto(compute, (query, key, value, offset, options), attended(query))


@jax_defaults()
def sigmoid_weights(
    query: Array,
    key: Array,
    bias: Array | Bias | None = None,
    mask: Array | Mask | None = None,
    *,
    offset: float | Array = 0.0,
    scale: float | Array | None = None,
    softcap: float | None = None,
) -> Array:
    """The weights `[..., N, T, S]` of `sigmoid_attention`, with its arguments."""
    query, key, _ = check_qkv(query, key, key)
    options = make_options(query, bias, mask, scale=scale, softcap=softcap)
    partition = partition_of(query, *range(query.ndim - 3), -2, -3, None)
    arguments = query, key, _check_offset(offset, query), options
    return in_auto(_weights, arguments, partition)


sigmoid_attention.weights = sigmoid_weights  # For layers, which show them.


def _weights(query, key, offset, options):
    logits, visible = visible_logits(query, key, options)  # [..., N, T, S]
    if visible is None:
        num_keys = jnp.asarray(key.shape[-3], logits.dtype)  # Open in an export.
    else:
        num_keys = visible.sum(-1, keepdims=True, dtype=logits.dtype)  # [..., N, T, 1]
    offset = offset.astype(logits.dtype)[..., None, None] - jnp.log(jnp.maximum(1, num_keys))
    return where(visible, jax.nn.sigmoid(logits + offset))


def _check_offset(offset, query):
    N = query.shape[-2]
    if isinstance(offset, int | float):
        check_number("offset", offset)
        if not math.isfinite(offset):
            raise ValueError(f"offset must be finite, got {offset}.")
        offset = float(offset)
    offset = as_floating("offset", offset)
    if offset.shape not in ((), (N,)):
        raise ValueError(f"offset must be one number or [N] with {N=}, got shape {offset.shape}.")
    return offset
