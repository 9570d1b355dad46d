"""Exact attention in memory linear in the sequence: the dense definition, one tile at a time.

The forward pass walks over tiles of the logits, some queries by some keys. For each row it keeps
the largest logit so far, the normaliser and the weighted mean of the values: the online softmax.
The backward pass computes every tile again from the row's peak and normaliser. So only one tile is
in memory at a time. The other modules:

- `plan` chooses the sizes and the order of the tiles.
- `tile_rules` evaluates masks, biases and dropout on one tile. A mask gives bounds of the keys that
  a block of queries sees: hidden tiles are skipped, and fully visible tiles are not masked.
- `mesh` runs the tiles on each device, for the batch rows and heads that the device holds.
- `xla_cpu` has products and other operations in forms that run fast on a CPU; `peakless` is a
  softmax for the CPU. They change the speed, not the results.

Reference:
    Milakov and Gimelshein 2018, "Online normalizer calculation for softmax".
    https://arxiv.org/abs/1805.02867
    Rabe and Staats 2021, "Self-attention Does Not Need O(n^2) Memory".
    https://arxiv.org/abs/2112.05682
    Dao et al. 2022, "FlashAttention", appendix B. https://arxiv.org/abs/2205.14135
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from attention_jax.checks import jax_defaults
from attention_jax.functional import peakless
from attention_jax.functional.dropout import row_words
from attention_jax.functional.mesh import axes_of, full_like, on_each_device, vary_alike
from attention_jax.functional.options import Options
from attention_jax.functional.plan import Pass, Plan, default_platform, make_plan, transposed
from attention_jax.functional.tile_rules import Rules, is_float
from attention_jax.functional.xla_cpu import as_written, exact_product, opaque, product
from attention_jax.types import Array


def blockwise_attention(
    query: Array,
    key: Array,
    value: Array,
    options: Options,
    block_size: tuple[int, int] | None = None,
) -> Array | tuple[Array, Array]:
    """`dot_product_attention` for checked arguments, with all sizes above 0."""
    *batch, T, N, H = query.shape
    dtype = jnp.promote_types(jnp.result_type(query, key, value), jnp.float32)
    scale = H**-0.5 if options.scale is None else _number(options.scale, dtype)
    scaled, softcap, drop = query, options.softcap, None
    if softcap is not None:
        scale = scale / _number(softcap, dtype)
        softcap = jnp.asarray(softcap, dtype)
    if not isinstance(scale, float):
        scaled, scale = query.astype(dtype) * scale, 1.0  # Differentiable.
    if options.rate is not None:
        rate = lax.stop_gradient(jnp.asarray(options.rate))
        drop = row_words(options.rng, batch, N, T), rate
    precision = jax.config.jax_default_matmul_precision
    request = Request(block_size, scale, precision, default_platform())
    arguments = (scaled, key, value, softcap, options.bias, options.mask, drop)
    out, peak, log_total = attend(request, *vary_alike(arguments))  # The last two [..., T, N].

    empty = peak == jnp.finfo(dtype).max
    peak = lax.stop_gradient(jnp.where(empty, jnp.finfo(dtype).min, peak))
    if options.sinks is not None:
        # A sink is one more key, and its value is zero.
        sinks = options.sinks.astype(dtype)
        top = lax.stop_gradient(jnp.maximum(peak, sinks))
        total = jnp.where(empty, 0, jnp.exp(log_total + (peak - top)))
        with_sinks = total + jnp.exp(sinks - top)
        empty = with_sinks == 0  # Such a row has no keys, and its sink is minus infinity.
        with_sinks = jnp.where(empty, 1, with_sinks)
        out *= (total / with_sinks)[..., None]
        peak, log_total = top, jnp.log(with_sinks)
    if options.rate is not None:
        out /= 1 - options.rate
    out = out if options.wide else out.astype(query.dtype)
    if not options.residual:
        return out
    with jax.debug_infs(False):  # The -inf of an empty row is meant.
        return out, jnp.where(empty, -jnp.inf, peak + log_total)


class Request(NamedTuple):
    """The static settings of a call, beside shapes and rules.

    Attributes:
        block_size, scale: (queries, keys) in a tile, None is the plan's own; the logits' factor.
        precision, platform: The default precision and platform when the attention was called.
        peaks: The peak that is returned must be the largest logit of its row.
    """

    block_size: tuple[int, int] | None
    scale: float
    precision: str | None
    platform: str
    peaks: bool = False

    def plan(self, query, key, value, mask) -> Plan:
        *batch, T, N, H = query.shape
        S, K, _ = value.shape[-3:]
        inputs = jnp.result_type(query, key, value)
        sizes = (*batch, K), N // K, T, S, H
        return make_plan(*sizes, mask, *self[:2], inputs, *self[3:])  # All but the precision.


# The custom derivative ---------------------------------------------------------------------------


@functools.partial(jax.jit, static_argnums=0)
@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def attend(request, query, key, value, softcap, bias, mask, drop):
    """Output `[..., T, N, V]`, and the logsumexp in two parts `[..., T, N]`: peak and rest.

    They stay apart, because some people mask with -1e9: in a sum such a peak would swallow the
    rest. The peak counts as constant; derivatives are those of the rest. A row without visible keys
    gets the largest float as its peak, so that its weights are 0: exp(x - largest) is 0.
    """
    return _forward(request, query, key, value, softcap, bias, mask, drop)[0]


def _forward(request, *arguments):
    axes = _axes(*arguments)
    out, row = axes[0], axes[0][:-1]
    tiles = functools.partial(_forward_tiles, request)
    out, peak, total = on_each_device(tiles, arguments, axes, [out, row, row])
    return (out, peak, jnp.log(total)), (*arguments, out, peak, total)


def _backward(request, saved, cotangents):
    *arguments, out, peak, total = saved
    d_out, _, d_residual = cotangents
    axes = _axes(*arguments)
    by_query, by_row = axes[0], axes[0][:-1]
    learnt = tuple(arguments[:5])  # All but mask and dropout.
    gradients = on_each_device(
        functools.partial(_backward_tiles, request),
        (*arguments, out, peak, total, d_out, d_residual),
        [*axes, by_query, by_row, by_row, by_query, by_row],
        [names for x, names in zip(jax.tree.leaves(learnt), axes, strict=False) if is_float(x)],
    )
    gradients = iter(gradients)

    def cotangent(x):
        return next(gradients) if is_float(x) else np.zeros(x.shape, jax.dtypes.float0)

    return *jax.tree.map(cotangent, learnt), None, None


attend.__wrapped__.defvjp(_forward, _backward)


def _axes(query, key, value, softcap, bias, mask, drop):
    """The `Axes` of every array in the arguments, for `on_each_device`."""
    arrays = [(query, "TNH"), (key, "SKH"), (value, "SKV")]
    if softcap is not None:
        arrays.append((softcap, ""))
    for rule in (bias, mask):
        if rule is not None:
            arrays += rule.arrays()
    if drop is not None:
        arrays += zip(drop, ("NT2", ""), strict=True)
    return [axes_of(x, letters, query.ndim - 3) for x, letters in arrays]


def _as_called(tiles):
    """`tiles` in the precision of the call, because jax traces derivatives after the call."""

    @functools.wraps(tiles)
    def traced(request, *arguments):
        with jax.default_matmul_precision(request.precision), jax_defaults():
            return tiles(request, *arguments)

    return traced


# Forward -----------------------------------------------------------------------------------------


@_as_called
def _forward_tiles(request, query, key, value, softcap, bias, mask, drop):
    """Output `[..., T, N, V]`, peak and normaliser `[..., T, N]`."""
    work = request.plan(query, key, value, mask).forward
    largest = jnp.finfo(work.dtype).max

    def group(g, results):
        keys, values = (opaque(work.by_head(work.group(g).slice(x, "SNH"))) for x in (key, value))
        keys_right = work.right(keys) if work.narrow else None  # [heads, H, S]

        def block(i, results):
            rules = Rules(work, work.block(g, i), bias, mask, drop)
            queries = work.by_row(rules.at.slice(query, "TNH")).astype(work.operand)
            queries *= work.scales[0]  # [heads, G t, H]
            if work.unrolled:
                queries, results = as_written((queries, results))  # One block at a time.
            rows = Rows(work, rules, queries, keys, keys_right, values, softcap)
            mixed, peak, total = peakless.attend(rows) if work.peakless else rows.attend()
            empty = total == 0
            total = jnp.where(empty, 1, total)
            peak = jnp.where(empty, largest, peak)
            out, *rest = results
            out = rules.at.put(out, work.from_rows(mixed), "TNV")
            rest = (
                rules.at.put(x, work.from_rows(row), "TN")
                for x, row in zip(rest, (peak, total), strict=True)
            )
            return out, *rest

        return work.over_blocks(block, results)

    shape = (*query.shape[:-1], value.shape[-1])
    results = (full_like(query, 0, x, work.dtype) for x in (shape, shape[:-1], shape[:-1]))
    return work.over_groups(group, tuple(results))


class Rows(NamedTuple):
    """A block of queries in the forward pass, and its inputs.

    Attributes:
        queries: `[heads, G t, H]`, times the scale.
        keys, values: Those of all positions, `[heads, S, H]` and `[heads, S, V]`.
        keys_right: `[heads, H, S]`, where operands are narrow.
    """

    work: Pass
    rules: Rules
    queries: Array
    keys: Array
    keys_right: Array | None
    values: Array
    softcap: Array | None

    def attend(self) -> tuple[Array, Array, Array]:
        """The online softmax.

        Returns:
            The values, mixed by weights that sum to 1, `[heads, G t, V]`; and for each row
            `[heads, G t]` its largest logit and its normaliser, the sum of exp(logit - largest).
        """
        lowest = jnp.finfo(self.work.dtype).min

        def start():
            rows = self.queries.shape[:-1]
            shapes = (*rows, self.values.shape[-1]), rows
            mixed, total = (full_like(self.queries, 0, x, self.work.dtype) for x in shapes)
            return mixed, total + lowest, total

        def tile(here, carry):
            logits = self.logits(here)  # [heads, G t, s]
            # `initial`: a fully masked row has weights exp(-inf - lowest) = 0.
            peak = logits.max(-1, initial=lowest)
            if carry is not None:
                peak = jnp.maximum(peak, carry[1])
            peak = lax.stop_gradient(peak)
            weights = jnp.exp(logits - peak[..., None])
            total = weights.sum(-1)
            if carry is not None:
                before = carry[2] * jnp.exp(carry[1] - peak)
                total += before
            # Weights are normalised first: else the sum of large values would overflow.
            inverse = 1 / jnp.where(total == 0, 1, total)
            mixed = self.mix(here, weights * inverse[..., None])
            if carry is not None:
                mixed += carry[0] * (before * inverse)[..., None]
            return mixed, peak, total

        return self.rules.over_keys(tile, start, None)

    def logits(self, here) -> Array:
        """`[heads, G t, s]`."""
        if self.work.narrow:
            columns = here.part(self.keys_right, axis=-1)
        else:  # Take a part of the rows: XLA stores a part of columns transposed, which is slow.
            columns = transposed(here.part(self.keys))
        raw = here.product(self.queries, columns)
        return here.logits(raw, self.softcap, here.bias)

    def mix(self, here, weights) -> Array:
        """`[heads, G t, V]`."""
        return product(here.kept(weights).astype(self.work.operand), here.part(self.values))


# Backward ----------------------------------------------------------------------------------------


@_as_called
def _backward_tiles(
    request, query, key, value, softcap, bias, mask, drop, out, peak, total, d_out, d_residual
):
    """The gradients of query, key, value, and of the floats in softcap and bias.

    Tiles are keys by queries, because a transposed left operand, as in weights^T d_out, is slow.
    """
    work = request.plan(query, key, value, mask).backward
    # d_logits sum to d_residual over a row, but not after rounding for the product. Then the common
    # part of all keys would enter the query's gradient; the row's mean key removes it.
    evens_out = work.narrow and softcap is None
    largest = jnp.finfo(work.dtype).max

    def group(g, carry):
        keys, values = (opaque(work.by_head(work.group(g).slice(x, "SNH"))) for x in (key, value))
        # A NaN here has shown in the output or is masked; it would meet a zero, and 0 * NaN is NaN.
        # Infinity becomes a large number, so that a logit of minus infinity stays one.
        keys = jnp.nan_to_num(keys)
        keys_right = as_written(transposed(keys))  # [heads, H, S]

        def zero_sums():
            return tuple(full_like(x, 0, x.shape, work.dtype) for x in (keys, values))

        def block(i, carry):
            rules = Rules(work, work.block(g, i), bias, mask, drop, upright=True)
            d_query, *sums, totals = carry
            queries = opaque(work.by_row(rules.at.slice(query, "TNH")).astype(work.operand))
            queries = work.scales[0] * jnp.nan_to_num(queries)  # [heads, G t, H]
            d_outs, outs = (work.by_row(rules.at.slice(x, "TNV")) for x in (d_out, out))
            d_outs = opaque(d_outs.astype(work.operand))  # [heads, G t, V]
            peaks, normalisers, d_residuals = (
                work.by_row(rules.at.slice(x, "TN")) for x in (peak, total, d_residual)
            )  # [heads, G t]
            inverses = 1 / normalisers  # For the weights: d_outs would be rounded once more.
            d_residuals = jnp.where(peaks == largest, 0, d_residuals)
            deltas = (outs * d_outs).sum(-1) - d_residuals
            # Without NaN, which the product may spread to other queries; `deltas` keep it.
            queries_right, d_outs_right = work.right(queries), work.right(jnp.nan_to_num(d_outs))
            if work.overlapping:
                # Rows that the block before has counted get no weights here.
                old = rules.at.t_start + jnp.arange(work.t) < i * work.t
                peaks = jnp.where(jnp.tile(old, work.G), largest, peaks)

            def start():
                shape = transposed(queries).shape  # [heads, H, G t]
                shapes = [shape, shape, (*shape[:-2], shape[-1])] if evens_out else [shape]
                of_queries = [full_like(queries, 0, shape, work.dtype) for shape in shapes]
                return of_queries, *(zero_sums() if sums[0] is None else sums), totals

            def tile(here, carry):
                of_queries, d_keys, d_values, (d_softcap, d_bias) = carry
                raw = here.product(here.part(keys), queries_right)  # [heads, s, G t]
                logits, pull_back = jax.vjp(here.logits, raw, softcap, here.bias)
                weights = jnp.exp(logits - peaks[..., None, :]) * inverses[..., None, :]
                if here.visible is not None:  # The peak may be NaN.
                    weights = jnp.where(here.visible, weights, 0)
                d_value = product(here.kept(weights).astype(work.operand), d_outs)
                d_weights = here.product(here.part(values), d_outs_right)
                d_logits = weights * (here.kept(d_weights) - deltas[..., None, :])
                d_raw, d_cap, d_tile = pull_back(d_logits)
                d_raw = d_raw.astype(work.operand)
                columns = here.part(keys_right, axis=-1)  # [heads, H, s]
                found = [as_written(exact_product(columns, d_raw))]  # [heads, H, G t]
                if evens_out:
                    rounded = weights.astype(work.operand)
                    found.append(as_written(exact_product(columns, rounded)))
                    found.append(d_raw.astype(work.dtype).sum(-2))
                if of_queries is not None:
                    found = jax.tree.map(jnp.add, of_queries, found)
                d_keys = here.add(d_keys, product(d_raw, queries))
                d_values = here.add(d_values, d_value)
                if softcap is not None:
                    d_softcap += d_cap
                if bias is not None:
                    d_bias = d_bias.add(d_tile, here.at)
                return found, d_keys, d_values, (d_softcap, d_bias)

            (d_queries, *rest), *others = rules.over_keys(tile, start, (None, *carry[1:]))
            if evens_out:
                mean_keys, sums_found = rest
                missing = work.scales[1] * d_residuals - sums_found
                d_queries += missing[..., None, :] * mean_keys
            d_queries = work.from_rows(work.scales[0] * transposed(d_queries))
            put = rules.at.add if work.overlapping else rules.at.put
            return put(d_query, d_queries.astype(d_query.dtype), "TNH"), *others

        d_query, d_key, d_value, totals = carry
        # None: with a single block its products are the sums.
        sums = zero_sums() if work.blocks > 1 else (None, None)
        d_query, *sums, totals = work.over_blocks(block, (d_query, *sums, totals))
        d_key, d_value = (
            work.group(g).put(x, work.from_heads(part.astype(x.dtype)), "SNH")
            for x, part in zip((d_key, d_value), sums, strict=True)
        )
        return d_query, d_key, d_value, totals

    zeros = lambda x: full_like(query, 0, x.shape, work.dtype) if is_float(x) else x
    totals = jax.tree.map(zeros, (softcap, bias))
    carry = (*(full_like(x, 0, x.shape) for x in (query, key, value)), totals)
    *gradients, totals = work.over_groups(group, carry)
    learnt = filter(is_float, jax.tree.leaves((softcap, bias)))
    sums = filter(is_float, jax.tree.leaves(totals))
    return *gradients, *(x.astype(like.dtype) for x, like in zip(sums, learnt, strict=True))


def _number(x, dtype):
    """A float if `x` is a known number, else an array of `dtype`."""
    traced = isinstance(x, jax.core.Tracer) or np.ndim(x) > 0
    return jnp.asarray(x, dtype) if traced else float(x)
