"""Scaled dot-product attention: the door that all callers come through, and its definition.

`_dense` is equation 1 of the paper with everything that people add to it. It is the oracle of
every faster path, so it is written to be read.
"""

import functools
import inspect
import math

import jax
import jax.numpy as jnp
from jax import lax

from attention_jax.checks import (
    as_floating,
    as_size,
    check_broadcastable,
    check_flag,
    check_floating,
    check_number,
    check_qkv,
    check_rate,
    check_word,
    jax_defaults,
    known,
    told,
)
from attention_jax.functional.biases import Bias, as_bias
from attention_jax.functional.blockwise import blockwise_attention
from attention_jax.functional.choice import IMPLEMENTATIONS, Choice, choose, cost
from attention_jax.functional.cudnn import cudnn_attention, refusal
from attention_jax.functional.dropout import keep_mask
from attention_jax.functional.masks import Mask, as_mask
from attention_jax.functional.mesh import attended, in_auto, partition_of
from attention_jax.functional.tiles import Tile
from attention_jax.types import Array


@jax_defaults()
def dot_product_attention(
    query: Array,
    key: Array,
    value: Array,
    bias: Array | Bias | None = None,
    mask: Array | Mask | None = None,
    *,
    scale: float | Array | None = None,
    softcap: float | None = None,
    sinks: Array | None = None,
    dropout_rate: float | Array = 0.0,
    dropout_rng: Array | None = None,
    deterministic: bool = False,
    implementation: str | None = None,
    block_size: int | tuple[int, int] | None = None,
    return_residual: bool = False,
) -> Array | tuple[Array, Array]:
    """Averages the values, weighted by how well each key answers the query.

        softmax(softcap(scale * query key^T) + bias, where=mask) value

    Logits, softmax and sums are in float32 at least. A query that may attend to nothing returns
    exact zeros and passes exact zeros back. What is masked has no influence: NaN or Inf in keys,
    and any finite number in values, changes neither outputs nor gradients.

    Args:
        query: `[..., T, N, H]`.
        key: `[..., S, K, H]`, where K divides N: query head n reads key head n // (N / K).
        value: `[..., S, K, V]`.
        bias: Added to the logits: an array broadcastable to `[..., N, T, S]`, or a `biases.*`
            value. An entry of -inf is the same as masked.
        mask: A boolean array broadcastable to `[..., N, T, S]`, or a `masks.*` value; True means
            "may attend".
        scale: Multiplies the logits. Defaults to `H ** -0.5`.
        softcap: Bounds the scaled logits x to `softcap * tanh(x / softcap)`.
        sinks: `[N]` logits that take part in the normaliser and have no value, so that a head may
            attend to nothing in particular.
        dropout_rate: The probability with which each normalised weight is dropped, in [0, 1); the
            others grow by `1 / (1 - dropout_rate)`. Which ones depends on (rng, batch, head, query,
            key) alone.
        dropout_rng: A PRNG key; needed when `dropout_rate` is above 0.
        deterministic: Turns dropout off.
        implementation: "dense" is the definition; "blockwise" gives the same numbers in memory
            linear in S, gradients too; "cudnn" is the fused kernel of an NVIDIA GPU, in half
            precision. None takes "cudnn" where it can serve, else "dense" for few logits and
            "blockwise" for more: see `explain`. Forward mode (`jax.jvp`) of the attention itself is
            for "dense" alone, elsewhere jax refuses it; that of a gradient, which is a product
            with the Hessian, is for "blockwise" too.
        block_size: An integer or (query_block, key_block), for "blockwise" only.
        return_residual: Also returns the logsumexp of each row's logits, sinks included: float32
            (float64 for float64) `[..., T, N]`, differentiable. For a query that may attend to
            nothing it is the sink, and -inf without sinks.

    Returns:
        `[..., T, N, V]` in the dtype of `query`; with `return_residual`, that and the residual.

    Raises:
        ValueError: Shapes do not fit together, or a value is out of its range.
        TypeError: An argument has the wrong type.
        NotImplementedError: The implementation cannot honour the request.

    References:
        Vaswani et al. 2017, "Attention Is All You Need", equation 1.
        https://arxiv.org/abs/1706.03762
        Grouped heads: Ainslie et al. 2023, https://arxiv.org/abs/2305.13245
        softcap: Gemma Team 2024, "Gemma 2", section 2. https://arxiv.org/abs/2408.00118
        sinks: Xiao et al. 2023, "Efficient Streaming Language Models with Attention Sinks",
        section 3.3, with logits for keys as in gpt-oss. https://arxiv.org/abs/2309.17453
    """
    name, _, arrays, options = _prepare(
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
        return_residual=return_residual,
    )
    compute = functools.partial(_compute, name, block_size=options.pop("block_size"))
    results = attended(arrays[0]), partition_of(arrays[0], *range(arrays[0].ndim - 1))
    return in_auto(compute, (*arrays, options), results if return_residual else results[0])


def _compute(name, query, key, value, options, *, block_size):
    if name == "cudnn":
        return cudnn_attention(query, key, value, mask=options["mask"], scale=options["scale"])
    if name == "dense" or 0 in (*query.shape, *value.shape):
        return _dense(query, key, value, **options)
    jax.eval_shape(_rules, options["bias"], options["mask"], query, key)  # For its errors.
    return blockwise_attention(query, key, value, **options, block_size=block_size)


@jax_defaults()
def explain(*arguments, **options) -> Choice:
    """Which implementation `dot_product_attention` takes, why, and what it costs.

    Arguments and errors are those of `dot_product_attention`; nothing is computed, and what may be
    an array may be a `jax.ShapeDtypeStruct`.

    >>> x = jax.ShapeDtypeStruct((1, 4096, 8, 64), jnp.float32)
    >>> explain(x, x, x).implementation
    'blockwise'
    """
    bound = inspect.signature(dot_product_attention).bind(*arguments, **options)
    bound.apply_defaults()
    numbers = dict(bound.arguments)
    arrays = {
        name: numbers.pop(name)
        for name, x in bound.arguments.items()
        if isinstance(x, jax.ShapeDtypeStruct)
    }
    explained = []

    def look(arrays):
        name, reason, (query, key, value), options = _prepare(**arrays, **numbers)
        _rules(options["bias"], options["mask"], query, key)  # For its errors.
        inputs = map(jax.typeof, (query, key, value))
        explained.extend((name, reason, *inputs, options["block_size"]))

    jax.eval_shape(look, arrays)
    *explained, block_size = explained
    mask = numbers.get("mask")  # Not that of `look`, where its numbers are not known.
    return cost(*explained, None if mask is None else as_mask(mask), block_size)


def _prepare(
    query,
    key,
    value,
    bias,
    mask,
    *,
    scale,
    softcap,
    sinks,
    dropout_rate,
    dropout_rng,
    deterministic,
    implementation,
    block_size,
    return_residual,
):
    """Checks everything and chooses: the implementation, why, its arrays and its options."""
    query, key, value = check_qkv(query, key, value)
    mask = None if mask is None else as_mask(mask)
    bias = None if bias is None else as_bias(bias)
    sinks = _check_options(query, scale, softcap, sinks)
    rate = _active_rate(dropout_rate, dropout_rng, deterministic)
    check_flag("return_residual", return_residual)
    if implementation is not None:
        check_word("implementation", implementation, IMPLEMENTATIONS)
    if block_size is not None and implementation != "blockwise":
        raise ValueError(
            f'block_size is for implementation="blockwise", got {told(block_size)} with '
            f"{implementation!r}."
        )
    options = dict(bias=bias, mask=mask, scale=scale, softcap=softcap, sinks=sinks, rate=rate)
    reason = "asked for"
    if implementation is None:
        implementation, reason = choose(query, key, value, **options, residual=return_residual)
    elif implementation == "cudnn":
        refused = refusal(query, key, value, **options, residual=return_residual)
        if refused is not None:
            raise NotImplementedError(
                f'implementation="cudnn" cannot do this: {refused}; "blockwise" or None can.'
            )
    options |= dict(rng=dropout_rng, return_residual=return_residual)
    options["block_size"] = _check_blocks(block_size)
    return implementation, reason, (query, key, value), options


@jax_defaults()
def attention_weights(
    query: Array,
    key: Array,
    bias: Array | Bias | None = None,
    mask: Array | Mask | None = None,
    *,
    scale: float | Array | None = None,
    softcap: float | None = None,
    sinks: Array | None = None,
) -> Array:
    """The weights `[..., N, T, S]` that `dot_product_attention` averages the values with.

    Arguments are those of `dot_product_attention`. Rows sum to 1, to less where `sinks` take their
    share, and to 0 for a query that may attend to nothing.
    """
    query, key, _ = check_qkv(query, key, key)
    mask = None if mask is None else as_mask(mask)
    bias = None if bias is None else as_bias(bias)
    sinks = _check_options(query, scale, softcap, sinks)

    def compute(query, key, bias, mask, scale, softcap, sinks):
        logits, visible = _logits(query, key, bias, mask, scale, softcap)
        return _softmax(logits, visible, sinks)[0]

    weights = partition_of(query, *range(query.ndim - 3), -2, -3, None)
    return in_auto(compute, (query, key, bias, mask, scale, softcap, sinks), weights)


def _dense(query, key, value, *, bias, mask, scale, softcap, sinks, rate, rng, return_residual):
    """The definition."""
    *batch, T, N, _ = query.shape
    S, K, V = value.shape[-3:]
    logits, visible = _logits(query, key, bias, mask, scale, softcap)
    weights, total, peak = _softmax(logits, visible, sinks)
    if rate is not None:
        keep = keep_mask(rng, rate, batch, N, T, S)
        weights = jnp.where(keep, weights / (1 - rate), 0)

    # The query heads that share a value head are rows of one product.
    weights = weights.reshape(*batch, K, N // K * T, S).astype(jnp.result_type(query, key, value))
    value = jnp.swapaxes(value, -2, -3)  # [..., K, S, V]
    mixed = _product(weights, value)
    mixed = jnp.swapaxes(mixed.reshape(*batch, N, T, V), -2, -3).astype(query.dtype)
    if not return_residual:
        return mixed
    empty = total == 0
    with jax.debug_infs(False):  # -inf is a word here, not an accident.
        residual = jnp.where(empty, -jnp.inf, peak + jnp.log(jnp.where(empty, 1, total)))
        return mixed, jnp.swapaxes(residual[..., 0], -1, -2)  # [..., T, N]


def _logits(query, key, bias, mask, scale, softcap) -> tuple[Array, Array | None]:
    """softcap(scale * query key^T) + bias, `[..., N, T, S]`, and which of them are visible."""
    *batch, T, N, H = query.shape
    S, K = key.shape[-3:-1]
    shape = (*batch, N, T, S)
    dtype = jnp.result_type(query, key)
    bias, visible = _rules(bias, mask, query, key)
    if bias is not None:
        bias = bias.astype(jnp.promote_types(dtype, jnp.float32))
        # Not `isneginf`, which makes an infinity of its own: `jax.debug_infs` would see it.
        allowed = ~(bias < jnp.finfo(bias.dtype).min)
        visible = allowed if visible is None else visible & allowed

    # Heads before positions, and the query heads that share a key head as rows of one product.
    query = jnp.swapaxes(query, -2, -3).reshape(*batch, K, N // K * T, H).astype(dtype)
    key = jnp.swapaxes(key, -2, -3).astype(dtype)  # [..., K, S, H]
    logits = _product(query, _transposed(key)).reshape(shape)
    if visible is not None:
        visible = jnp.broadcast_to(visible, shape)
        logits = _where(visible, logits)  # Before tanh: its slope at a masked NaN is NaN.
    logits = logits * jnp.asarray(H**-0.5 if scale is None else scale, logits.dtype)
    if softcap is not None:
        softcap = jnp.asarray(softcap, logits.dtype)
        logits = softcap * jnp.tanh(logits / softcap)
    if bias is not None:
        logits += _where(visible, bias).astype(logits.dtype)
    return logits, visible


def _rules(bias, mask, query, key) -> tuple[Array | None, Array | None]:
    """Bias and mask as arrays that broadcast to `[..., N, T, S]`."""
    *batch, T, N, _ = query.shape
    S = key.shape[-3]
    shape, whole = (*batch, N, T, S), Tile.whole(T, S)
    if mask is not None:
        mask.check(T, S)
        mask = mask.tile(whole)
        check_broadcastable("mask", mask.shape, shape)
    if bias is not None:
        bias.check(T, S)
        bias = bias.tile(whole)
        check_floating("bias", bias)
        check_broadcastable("bias", bias.shape, shape)
    return bias, mask


def _product(a: Array, b: Array) -> Array:
    """`_product_at` the precision that is the default here and now.

    The derivative is traced later, maybe outside of the contexts that set the precision and the
    defaults.
    """
    return _product_at(a, b, jax.config.jax_default_matmul_precision)


@functools.partial(jax.custom_jvp, nondiff_argnums=(2,))
@jax_defaults()
def _product_at(a: Array, b: Array, precision: str | None) -> Array:
    """The matrix product a b, in float32 at least, with derivatives fit for attention.

    They take NaN and Inf in `a` and `b` for 0. In the forward pass a mask removes what these spoil;
    in the backward pass they would meet the zeros of the mask in a product, and 0 * NaN is NaN. A
    visible NaN still shows: the output and so its cotangent are NaN.
    """
    dtype = jnp.promote_types(jnp.result_type(a, b), jnp.float32)
    return jnp.matmul(a, b, precision=precision, preferred_element_type=dtype)


@_product_at.defjvp
@jax_defaults()
def _(precision, primals, tangents):
    product = functools.partial(_product_at, precision=precision)
    d_a, d_b = tangents
    a, b = (jnp.where(jnp.isfinite(x), x, 0) for x in primals)
    # a d_b as (d_b^T a^T)^T: its transpose is then a product of two matrices as they lie in memory.
    # What autodiff makes of a d_b itself, a^T times a cotangent, is 3 to 5 times slower on a CPU.
    a_d_b = product(_transposed(d_b), _laid_out(_transposed(a)))
    return product(*primals), product(d_a, b) + _transposed(_laid_out(a_d_b))


def _transposed(x: Array) -> Array:
    return jnp.swapaxes(x, -1, -2)


def _laid_out(x: Array) -> Array:
    """`x`, in memory as its axes stand; elsewhere than on a CPU that would only cost a copy."""
    return lax.platform_dependent(x, cpu=lax.optimization_barrier, default=lambda x: x)


def _softmax(logits, visible, sinks) -> tuple[Array, Array, Array]:
    """The weights `[..., N, T, S]`, and total and peak `[..., N, T, 1]` of their normaliser.

    The normaliser is total * exp(peak). A row in which nothing is visible has weights 0: `where=`,
    not a large negative number, which would make it 1 / S.
    """
    lowest = jnp.finfo(logits.dtype).min
    peak = jnp.max(logits, axis=-1, keepdims=True, initial=lowest, where=visible)
    if sinks is not None:
        sinks = sinks.astype(logits.dtype)[:, None, None]  # [N, 1, 1]
        peak = jnp.maximum(peak, sinks)
    peak = lax.stop_gradient(peak)
    # Before exp, which may overflow where nothing is visible: its slope would be 0 * inf.
    weights = jnp.exp(_where(visible, logits - peak))
    total = _where(visible, weights).sum(-1, keepdims=True)
    if sinks is not None:
        total += jnp.exp(sinks - peak)
    # After the division: the cotangent of a masked weight may be infinite, and is nobody's concern.
    return _where(visible, weights / jnp.where(total == 0, 1, total)), total, peak


def _where(visible: Array | None, x: Array) -> Array:
    """`x` where it is visible, else 0."""
    return x if visible is None else jnp.where(visible, x, 0)


def _check_options(query: Array, scale, softcap, sinks: Array | None) -> Array | None:
    for name, x in (("scale", scale), ("softcap", softcap)):
        if x is None:
            continue
        check_number(name, x)
        if known(x) is not None and not math.isfinite(known(x)):
            raise ValueError(f"{name} must be finite, got {x}.")
    if softcap is not None and known(softcap) is not None and known(softcap) <= 0:
        raise ValueError(f"softcap must be positive, got {softcap}.")
    if sinks is None:
        return None
    sinks = as_floating("sinks", sinks)
    if sinks.shape != query.shape[-2:-1]:
        raise ValueError(
            f"sinks must be [N] with N={query.shape[-2]} query heads, got shape {sinks.shape}."
        )
    return sinks


def _check_blocks(block_size) -> tuple[int, int] | None:
    if block_size is None:
        return None
    sizes = block_size if isinstance(block_size, tuple | list) else (block_size, block_size)
    if len(sizes) != 2:
        raise ValueError(
            f"block_size must be an integer or (query_block, key_block), got {told(block_size)}."
        )
    return tuple(as_size("block_size", size) for size in sizes)


def _active_rate(rate, rng, deterministic: bool) -> float | Array | None:
    """The dropout rate, or None where nothing is dropped."""
    check_rate("dropout_rate", rate)
    check_flag("deterministic", deterministic)
    if deterministic or known(rate) == 0:
        return None
    if rng is None:
        raise ValueError(f"dropout_rate {rate} needs a dropout_rng, got None.")
    return rate
