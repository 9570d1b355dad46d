"""The arguments of an attention beside query, key and value, checked once."""

import math
from typing import NamedTuple

from attention_jax.checks import (
    as_floating,
    check_broadcastable,
    check_flag,
    check_floating,
    check_number,
    check_rate,
    known,
)
from attention_jax.functional.biases import Bias, as_bias
from attention_jax.functional.dropout import Part, Shared
from attention_jax.functional.masks import Mask, as_mask
from attention_jax.functional.tiles import Tile
from attention_jax.types import Array


class Options(NamedTuple):
    """The options of `dot_product_attention` for all implementations.

    Attributes:
        bias, mask, scale, softcap, sinks: As in `dot_product_attention`.
        rate: The dropout rate; None without dropout.
        rng: The PRNG key of the dropout, or `dropout.Shared` or `dropout.Part` of it.
        residual: Whether the logsumexp is wanted.
        wide: The output stays in float32 at least, because it is a part of a sum.
    """

    bias: Bias | None = None
    mask: Mask | None = None
    scale: float | Array | None = None
    softcap: float | Array | None = None
    sinks: Array | None = None
    rate: float | Array | None = None
    rng: Array | Shared | Part | None = None
    residual: bool = False
    wide: bool = False

    def arrays(self, query: Array, key: Array) -> tuple[Array | None, Array | None]:
        """Bias and mask as arrays that broadcast to `[..., N, T, S]`.

        Raises:
            ValueError: One of them does not fit the shapes of query and key.
        """
        *batch, T, N, _ = query.shape
        S = key.shape[-3]
        bias, mask, shape, whole = self.bias, self.mask, (*batch, N, T, S), Tile.whole(T, S)
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


def make_options(
    query: Array,
    bias,
    mask,
    *,
    scale=None,
    softcap=None,
    sinks=None,
    dropout_rate=0.0,
    dropout_rng=None,
    deterministic=False,
    return_residual=False,
) -> Options:
    """Checks the arguments of `dot_product_attention`, or raises its errors."""
    mask = None if mask is None else as_mask(mask)
    bias = None if bias is None else as_bias(bias)
    for name, x in (("scale", scale), ("softcap", softcap)):
        if x is None:
            continue
        check_number(name, x)
        if known(x) is not None and not math.isfinite(known(x)):
            raise ValueError(f"{name} must be finite, got {x}.")
    if softcap is not None and known(softcap) is not None and known(softcap) <= 0:
        raise ValueError(f"softcap must be positive, got {softcap}.")
    if sinks is not None:
        sinks = as_floating("sinks", sinks)
        if sinks.shape != query.shape[-2:-1]:
            raise ValueError(
                f"sinks must be [N] with N={query.shape[-2]} query heads, got shape {sinks.shape}."
            )
    rate = _active_rate(dropout_rate, dropout_rng, deterministic)
    check_flag("return_residual", return_residual)
    return Options(bias, mask, scale, softcap, sinks, rate, dropout_rng, return_residual)


def _active_rate(rate, rng, deterministic) -> float | Array | None:
    """The dropout rate, or None without dropout."""
    check_rate("dropout_rate", rate)
    check_flag("deterministic", deterministic)
    if deterministic or known(rate) == 0:
        return None
    if rng is None:
        raise ValueError(f"dropout_rate {rate} needs a dropout_rng, got None.")
    return rate
