"""The definition of attention: equation 1 with masks, biases, softcap, sinks and dropout.

Every faster path is tested against it, so it is written to be read.
"""

import functools

import jax
import jax.numpy as jnp

from attention_jax.checks import jax_defaults
from attention_jax.functional.dropout import keep_mask
from attention_jax.functional.options import Options
from attention_jax.functional.xla_cpu import as_written
from attention_jax.types import Array


def dense_attention(
    query: Array, key: Array, value: Array | None, options: Options
) -> tuple[Array | None, Array, Array | None]:
    """softmax(softcap(scale * query key^T) + bias, where=mask) value, for checked arguments.

    Returns:
        The values mixed, `[..., T, N, V]`, None where `value` is; the weights before dropout,
        `[..., N, T, S]`; and the logsumexp `[..., T, N]`, None where `options` do not ask for it.
    """
    logits, visible = visible_logits(query, key, options)  # [..., N, T, S]
    lowest = jnp.finfo(logits.dtype).min
    peak = jnp.max(logits, axis=-1, keepdims=True, initial=lowest, where=visible)  # [..., N, T, 1]
    if options.sinks is not None:
        sinks = options.sinks.astype(logits.dtype)[:, None, None]  # [N, 1, 1]
        peak = jnp.maximum(peak, sinks)
    peak = jax.lax.stop_gradient(peak)
    # `where` before exp, which may overflow in rows without visible keys: its slope would be 0 *
    # inf.
    weights = jnp.exp(where(visible, logits - peak))
    # `where`, not a large negative logit: a row without visible keys has weights 0, not 1 / S.
    total = where(visible, weights).sum(-1, keepdims=True)
    if options.sinks is not None:
        total += jnp.exp(sinks - peak)
    # After the division: the cotangent of a masked weight may be infinite.
    weights = where(visible, weights / jnp.where(total == 0, 1, total))  # [..., N, T, S]

    mixed = residual = None
    if value is not None:
        inputs = jnp.result_type(query, key, value)
        mixed = mix(weights, value, options, inputs)  # [..., T, N, V]
        mixed = mixed if options.wide else mixed.astype(query.dtype)
    if options.residual:
        empty = total == 0
        with jax.debug_infs(False):  # The -inf of an empty row is meant.
            residual = jnp.where(empty, -jnp.inf, peak + jnp.log(jnp.where(empty, 1, total)))
            residual = jnp.swapaxes(residual[..., 0], -1, -2)  # [..., T, N]
    return mixed, weights, residual


def visible_logits(query: Array, key: Array, options: Options) -> tuple[Array, Array | None]:
    """softcap(scale * query key^T) + bias, `[..., N, T, S]`, and which of them are visible.

    Hidden logits are finite, so that no NaN in a masked key reaches a derivative. The second result
    is None where all logits are visible.
    """
    *batch, T, N, H = query.shape
    S, K = key.shape[-3:-1]
    inputs = jnp.result_type(query, key)
    bias, visible = options.arrays(query, key)  # Both broadcast to [..., N, T, S].
    if bias is not None:
        bias = bias.astype(jnp.promote_types(inputs, jnp.float32))
        # Not `isneginf`: it creates an infinity that `jax.debug_infs` would report.
        allowed = ~(bias < jnp.finfo(bias.dtype).min)
        visible = allowed if visible is None else visible & allowed
    # Heads stand before positions. The query heads that share a key head are rows of one product.
    rows = jnp.swapaxes(query, -2, -3).reshape(*batch, K, N // K * T, H).astype(inputs)
    columns = jnp.swapaxes(key, -2, -3).astype(inputs)  # [..., K, S, H]
    logits = product(rows, _transposed(columns)).reshape(*batch, N, T, S)
    if visible is not None:
        visible = jnp.broadcast_to(visible, logits.shape)
        logits = where(visible, logits)  # Before tanh: its slope at a masked NaN is NaN.
    scale = H**-0.5 if options.scale is None else options.scale
    logits = logits * jnp.asarray(scale, logits.dtype)
    if options.softcap is not None:
        softcap = jnp.asarray(options.softcap, logits.dtype)
        logits = softcap * jnp.tanh(logits / softcap)
    if bias is not None:
        logits += where(visible, bias).astype(logits.dtype)
    return logits, visible


def mix(weights: Array, value: Array, options: Options, dtype: jnp.dtype) -> Array:
    """weights value after dropout, `[..., N, T, S]` and `[..., S, K, V]` -> `[..., T, N, V]`.

    The weights are multiplied in `dtype`; the result is in float32 at least.
    """
    *batch, N, T, S = weights.shape
    K, V = value.shape[-2:]
    if options.rate is not None:
        keep = keep_mask(options.rng, options.rate, batch, N, T, S)
        weights = jnp.where(keep, weights / (1 - options.rate), 0)
    weights = weights.reshape(*batch, K, N // K * T, S).astype(dtype)
    mixed = product(weights, jnp.swapaxes(value, -2, -3))  # [..., K, G T, V]
    return jnp.swapaxes(mixed.reshape(*batch, N, T, V), -2, -3)


def where(visible: Array | None, x: Array) -> Array:
    """`x` where it is visible, else 0."""
    return x if visible is None else jnp.where(visible, x, 0)


def product(a: Array, b: Array) -> Array:
    """`_product_at` the current default precision.

    The derivative is traced later, maybe outside of the contexts that set precision and defaults.
    """
    return _product_at(a, b, jax.config.jax_default_matmul_precision)


@functools.partial(jax.custom_jvp, nondiff_argnums=(2,))
@jax_defaults()
def _product_at(a: Array, b: Array, precision: str | None) -> Array:
    """The matrix product a b, in float32 at least, with derivatives fit for attention.

    The derivatives treat NaN and Inf in `a` and `b` as 0. In the forward pass a mask removes the
    spoilt results. In the backward pass NaN would meet the zeros of the mask in a product, and 0 *
    NaN is NaN. A visible NaN still shows: the output is NaN, and so is its cotangent.
    """
    dtype = jnp.promote_types(jnp.result_type(a, b), jnp.float32)
    return jnp.matmul(a, b, precision=precision, preferred_element_type=dtype)


@_product_at.defjvp
@jax_defaults()
def _(precision, primals, tangents):
    product = functools.partial(_product_at, precision=precision)
    d_a, d_b = tangents
    a, b = (jnp.where(jnp.isfinite(x), x, 0) for x in primals)
    # XLA on a CPU stores a transposed left operand of a product, or is 3 to 5 times slower. So each
    # form of a d_b is one whose transpose, the gradient of b, is a product that reads the larger of
    # a and the cotangent as it is stored.
    known = all(isinstance(x.shape[-1], int) for x in (a, b))  # Else left open by an export.
    if known and a.shape[-1] <= b.shape[-1]:
        a_d_b = product(_transposed(as_written(_transposed(a))), as_written(d_b))
    else:
        a_d_b = _transposed(as_written(product(_transposed(d_b), _transposed(a))))
    return product(*primals), product(d_a, b) + a_d_b


def _transposed(x: Array) -> Array:
    return jnp.swapaxes(x, -1, -2)
