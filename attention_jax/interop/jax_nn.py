"""`dot_product_attention` with the signature of `jax.nn.dot_product_attention`."""

import jax
import jax.numpy as jnp

from attention_jax.checks import (
    as_array,
    as_integers,
    as_size,
    check_flag,
    check_floating,
    check_word,
    jax_defaults,
    told,
)
from attention_jax.functional import dot_product, masks
from attention_jax.functional.biases import Bias
from attention_jax.functional.masks import Mask
from attention_jax.types import Array

_IMPLEMENTATIONS = {"xla": "dense", "cudnn": "cudnn"}


@jax_defaults()
def dot_product_attention(
    query: Array,
    key: Array,
    value: Array,
    bias: Array | Bias | None = None,
    mask: Array | Mask | None = None,
    *,
    scale: float | None = None,
    is_causal: bool = False,
    query_seq_lengths: Array | None = None,
    key_value_seq_lengths: Array | None = None,
    local_window_size: int | tuple[int, int] | None = None,
    implementation: str | None = None,
    return_residual: bool = False,
) -> Array | tuple[Array, Array]:
    """`attention_jax.dot_product_attention`, called as `jax.nn.dot_product_attention`.

    It gives what jax.nn gives, except on purpose:

    - A query that sees no key returns zeros, and its residual is -inf. In jax.nn it returns the
      mean of all values, or NaN where biases of -inf hide the keys, and its residual is finite.
    - NaN and Inf in hidden keys have no influence.
    - float64 stays float64. jax.nn takes its softmax in float32.
    - It takes values of a head size of their own, and types that differ. jax.nn refuses them.
    - For long rows `jax.jvp` needs `implementation="xla"`: the tiles have no forward mode.

    Args:
        query: `[B, T, N, H]` or `[T, N, H]`.
        key: `[B, S, K, H]` or `[S, K, H]`, where K divides N.
        value: `[B, S, K, V]` or `[S, K, V]`.
        bias: Broadcastable to `[B, N, T, S]`, added to the logits; or a `biases.*` value.
        mask: Boolean, broadcastable to `[B, N, T, S]`, True means "may attend"; or a `masks.*`
            value.
        scale: Multiplies the logits. Defaults to `H ** -0.5`.
        is_causal: Query t sees the keys s <= t only; the first query stands at the first key.
        query_seq_lengths: `[B]` integers. Queries from there on see no key, and return zeros.
        key_value_seq_lengths: `[B]` integers. Keys from there on are hidden.
        local_window_size: (left, right): query t sees the keys from t - left to t + right. One
            integer is both.
        implementation: "xla" is the definition ("dense" elsewhere in this package), with all kinds
            of derivatives; "cudnn" is the fused kernel. None: chosen as by `explain`, in memory
            linear in S where there are many logits.
        return_residual: Also returns the logsumexp of each query's logits, in the type of `key`.
            As in jax.nn, no gradient passes through it; `attention_jax.dot_product_attention`
            returns a differentiable one.

    Returns:
        `[B, T, N, V]` or `[T, N, V]`, as `query`; with `return_residual`, that and `[B, T, N]` or
        `[T, N]`.

    Raises:
        ValueError: Shapes do not fit together, or a value is out of its range.
        TypeError: An argument has the wrong type.
        NotImplementedError: `implementation="cudnn"` cannot do this; or the bias is of integers.
    """
    for name, x in (("query", query), ("key", key), ("value", value)):
        check_floating(name, x)
        if x.ndim not in (3, 4):
            raise ValueError(
                f"{name} must be [B, length, heads, size] or [length, heads, size], got shape "
                f"{x.shape}."
            )
    check_flag("is_causal", is_causal)
    check_flag("return_residual", return_residual)
    if implementation is not None:
        check_word("implementation", implementation, tuple(_IMPLEMENTATIONS))
    rows = [jnp.asarray(x).reshape((1,) * (4 - x.ndim) + x.shape) for x in (query, key, value)]
    rules = [None if mask is None else masks.as_mask(mask)]
    if local_window_size is not None or is_causal:
        left, right = _window(local_window_size)
        rules.append(masks.window(left, 0 if is_causal else right))
    for name, lengths, rule in (
        ("query_seq_lengths", query_seq_lengths, masks.query_lengths),
        ("key_value_seq_lengths", key_value_seq_lengths, masks.key_lengths),
    ):
        if lengths is not None:
            rules.append(rule(_lengths(name, lengths, rows[1].shape[0])))
    visible = None
    for rule in rules:
        visible = rule if visible is None else visible if rule is None else visible & rule
    found = dot_product.dot_product_attention(
        *rows,
        bias,
        visible,
        scale=scale,
        implementation=_IMPLEMENTATIONS.get(implementation),
        return_residual=return_residual,
    )
    out, *residual = found if return_residual else (found,)
    out = out.reshape(*query.shape[:-1], out.shape[-1])
    if not return_residual:
        return out
    residual = jax.lax.stop_gradient(residual[0].astype(key.dtype))
    return out, residual.reshape(query.shape[:-1])


def _window(sizes) -> tuple[int | None, int | None]:
    """(left, right) as `masks.window` takes them; None is no limit."""
    if sizes is None:
        return None, None
    if isinstance(sizes, tuple | list):
        if len(sizes) != 2:
            raise ValueError(f"local_window_size must be (left, right), got {told(sizes)}.")
        left, right = sizes
    else:
        left = right = sizes
    return tuple(as_size("local_window_size", size, minimum=0) for size in (left, right))


def _lengths(name, lengths, B):
    lengths = as_integers(name, as_array(name, lengths))
    if lengths.shape != (B,):
        raise ValueError(f"{name} must be [B] with {B=}, got shape {lengths.shape}.")
    return lengths
