"""Scaled dot-product attention: the function that all callers use.

It checks the arguments, chooses an implementation (`choice`) and calls it: the definition
(`dense`), the same numbers tile by tile (`blockwise`), or the kernel of a GPU (`cudnn`).
"""

import functools
import inspect

import jax

from attention_jax.checks import as_size, check_qkv, check_word, jax_defaults, public, told
from attention_jax.functional.biases import Bias
from attention_jax.functional.blockwise import blockwise_attention
from attention_jax.functional.choice import IMPLEMENTATIONS, Choice, choose, cost
from attention_jax.functional.cudnn import cudnn_attention, refusal
from attention_jax.functional.dense import dense_attention
from attention_jax.functional.masks import Mask, as_mask
from attention_jax.functional.mesh import attended, in_auto, partition_of
from attention_jax.functional.options import Options, make_options
from attention_jax.types import Array


@public
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

    Logits, softmax and sums are in float32 at least. A query with no visible key returns exact
    zeros and passes exact zeros back. Masked positions have no influence: NaN or Inf in keys, and
    any finite number in values, changes neither outputs nor gradients.

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
        sinks: `[N]` logits that enter the normaliser but have no value, so that the weights of a
            head may sum to less than 1.
        dropout_rate: The probability with which each normalised weight is dropped, in [0, 1); the
            others grow by `1 / (1 - dropout_rate)`. The dropped ones depend on (rng, batch, head,
            query, key) alone.
        dropout_rng: A PRNG key; needed when `dropout_rate` is above 0.
        deterministic: Turns dropout off.
        implementation: "dense" is the definition; "blockwise" gives the same numbers in memory
            linear in S, gradients too; "cudnn" is the fused kernel of an NVIDIA GPU, in half
            precision. None takes "cudnn" where it is supported, else "dense" for few logits and
            "blockwise" for more: see `explain`. Only "dense" has forward mode (`jax.jvp`); jax
            refuses it for the others. "blockwise" has forward mode of a gradient, which is a
            product with the Hessian.
        block_size: An integer or (query_block, key_block), for "blockwise" only.
        return_residual: Also returns the logsumexp of each row's logits, sinks included: float32
            (float64 for float64) `[..., T, N]`, differentiable. For a query with no visible key it
            is the sink, and -inf without sinks.

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
    call = prepare(
        query,
        key,
        value,
        bias,
        mask,
        implementation,
        block_size,
        scale=scale,
        softcap=softcap,
        sinks=sinks,
        dropout_rate=dropout_rate,
        dropout_rng=dropout_rng,
        deterministic=deterministic,
        return_residual=return_residual,
    )
    name, _, (query, key, value), options, block_size = call
    run = functools.partial(compute, name, block_size)
    out, residual = attended(query), partition_of(query, *range(query.ndim - 1))
    results = (out, residual) if return_residual else out
    return in_auto(run, (query, key, value, options), results)


def compute(name, block_size, query, key, value, options):
    """The attention by an implementation, for what `prepare` returned."""
    if name == "cudnn":
        return cudnn_attention(query, key, value, options)
    if name == "dense" or 0 in (*query.shape, *value.shape):
        out, _, residual = dense_attention(query, key, value, options)
        return (out, residual) if options.residual else out
    jax.eval_shape(Options.arrays, options, query, key)  # For its errors.
    return blockwise_attention(query, key, value, options, block_size)


@jax_defaults()
def explain(*arguments, **options) -> Choice:
    """Which implementation `dot_product_attention` takes, why, and what it costs.

    Arguments and errors are those of `dot_product_attention`. It computes no attention, and a
    `jax.ShapeDtypeStruct` may replace any array.

        >>> x = jax.ShapeDtypeStruct((1, 4096, 8, 64), "float32")
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
        name, reason, (query, key, value), options, block_size = prepare(**arrays, **numbers)
        options.arrays(query, key)  # For its errors.
        explained.extend((name, reason, *map(jax.typeof, (query, key, value)), block_size))

    jax.eval_shape(look, arrays)
    *explained, block_size = explained
    mask = numbers.get("mask")  # Not the mask in `look`: it is traced there.
    return cost(*explained, None if mask is None else as_mask(mask), block_size)


def prepare(query, key, value, bias, mask, implementation, block_size, **others):
    """Checks everything and chooses.

    Returns:
        The implementation, why, its arrays, its options and its block size.
    """
    query, key, value = check_qkv(query, key, value)
    options = make_options(query, bias, mask, **others)
    if implementation is not None:
        check_word("implementation", implementation, IMPLEMENTATIONS)
    if block_size is not None and implementation != "blockwise":
        raise ValueError(
            f'block_size is for implementation="blockwise", got {told(block_size)} with '
            f"{implementation!r}."
        )
    reason = "asked for"
    if implementation is None:
        implementation, reason = choose(query, key, value, options)
    elif implementation == "cudnn":
        refused = refusal(query, key, value, options)
        if refused is not None:
            raise NotImplementedError(
                f'implementation="cudnn" cannot do this: {refused}; "blockwise" or None can.'
            )
    return implementation, reason, (query, key, value), options, _check_blocks(block_size)


def _check_blocks(block_size) -> tuple[int, int] | None:
    if block_size is None:
        return None
    sizes = block_size if isinstance(block_size, tuple | list) else (block_size, block_size)
    if len(sizes) != 2:
        raise ValueError(
            f"block_size must be an integer or (query_block, key_block), got {told(block_size)}."
        )
    return tuple(as_size("block_size", size) for size in sizes)


@public
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

    Arguments are those of `dot_product_attention`. Rows sum to 1, to less with `sinks`, and to 0
    for a query with no visible key.
    """
    query, key, _ = check_qkv(query, key, key)
    options = make_options(query, bias, mask, scale=scale, softcap=softcap, sinks=sinks)

    def compute(query, key, options):
        return dense_attention(query, key, None, options)[1]

    partition = partition_of(query, *range(query.ndim - 3), -2, -3, None)
    return in_auto(compute, (query, key, options), partition)


dot_product_attention.weights = attention_weights  # For layers, which show them.
