"""Exact attention in memory linear in the sequence: the dense definition, one tile at a time.

The forward pass walks over tiles of the logits, some queries by some keys, and keeps for each row
the peak, the normaliser and the weighted sum of the values so far (the online softmax). The
backward pass computes every tile again from the logsumexp. No tile outlives its turn.

Three things make it fast on a CPU:

- Products stand in forms that XLA runs at full speed. A product whose left operand is transposed,
  such as weights^T @ d_out, does not; so the backward pass works on transposed tiles, keys by
  queries, on which every product is plain.
- A mask says which keys a block of queries sees (`Mask.keys`): tiles that nobody sees are skipped,
  and tiles that everybody sees are not masked.
- Tiles are large enough to feed every core and small enough to stay in its cache.

Reference:
    Milakov and Gimelshein 2018, "Online normalizer calculation for softmax".
    https://arxiv.org/abs/1805.02867
    Rabe and Staats 2021, "Self-attention Does Not Need O(n^2) Memory".
    https://arxiv.org/abs/2112.05682
    Dao et al. 2022, "FlashAttention", appendix B. https://arxiv.org/abs/2205.14135
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from attention_jax.functional.dropout import keep_tile, row_words
from attention_jax.functional.masks import Keys
from attention_jax.functional.tiles import Tile
from attention_jax.types import Array

_TILE = 512 * 512  # Logits in a tile: 1 MiB in float32, the second-level cache of one core.


class Plan(NamedTuple):
    """How the work is cut up: static, and all that a compiled program depends on besides shapes.

    Attributes:
        lead: The sizes of the batch axes and of the axis of key heads.
        box: How many of each are taken at once, a divisor of each; the last axes come whole before
            one that is divided, and one of each of those before.
        G, T, S: Query heads per key head, queries, keys.
        t, s: Queries and keys in a tile. Where they do not divide T and S, the last block ends
            with the sequence and overlaps the one before it; what is in both counts once.
        scale: What queries are multiplied by when they are read.
        dtype: The type of logits, softmax and sums.
    """

    lead: tuple[int, ...]
    box: tuple[int, ...]
    G: int
    T: int
    S: int
    t: int
    s: int
    scale: float
    dtype: jnp.dtype

    @property
    def heads(self) -> int:
        """Key heads that are taken at once."""
        return math.prod(self.box)

    @property
    def groups(self) -> int:
        return math.prod(self.lead) // self.heads

    @property
    def query_blocks(self) -> int:
        return -(-self.T // self.t)

    @property
    def key_blocks(self) -> int:
        return -(-self.S // self.s)

    def keys(self, group: int | Array) -> Tile:
        """All keys of a group; its N are key heads."""
        starts, index = [], group * self.heads
        for size in reversed(self.lead):
            starts.insert(0, index % size)
            index = index // size
        lead = tuple(zip(starts, self.box, strict=True))
        return Tile(0, self.T, 0, self.S, self.T, self.S, lead=lead)

    def queries(self, group: int | Array, i: int | Array) -> Tile:
        """Block i of a group's queries, and all keys."""
        at = self.keys(group)
        *batch, (start, size) = at.lead
        first = 0 if self.t == self.T else _least(i * self.t, self.T - self.t)
        lead = (*batch, (start * self.G, size * self.G))
        return at._replace(t_start=first, t_size=self.t, lead=lead)


def make_plan(lead, G, T, S, is_masked, block_size, scale, dtype) -> Plan:
    """The plan for these sizes; `block_size` overrides the size of the tiles."""
    # Small tiles follow the edge of a mask more closely; large ones write their sums less often.
    side = 256 if is_masked else 512
    t, s = block_size or (max(1, side // G), side)
    t, s = min(t, T), min(s, S)
    room, box = max(1, _TILE // (G * t * s)), ()
    for size in reversed(lead):
        part = max(n for n in range(1, min(size, room) + 1) if size % n == 0)
        box = (part, *box)
        room = room // size if part == size else 0
        room = max(room, 1)
    return Plan(tuple(lead), box, G, T, S, t, s, scale, dtype)


def blockwise_attention(
    query: Array,
    key: Array,
    value: Array,
    *,
    bias,
    mask,
    scale,
    softcap,
    sinks,
    rate,
    rng,
    return_residual,
    block_size=None,
) -> Array | tuple[Array, Array]:
    """`dot_product_attention` for arguments that are checked, and sizes none of which is 0."""
    *batch, T, N, H = query.shape
    S, K, _ = value.shape[-3:]
    dtype = jnp.promote_types(jnp.result_type(query, key, value), jnp.float32)
    scale = H**-0.5 if scale is None else scale
    scaled = query
    if softcap is not None:
        scale = scale / softcap
        softcap = jnp.asarray(softcap, dtype)
    if not isinstance(scale, int | float):
        scaled, scale = (
            query.astype(dtype) * _per_query(scale).astype(dtype),
            1.0,
        )  # Differentiable.
    drop = None
    if rate is not None:
        drop = row_words(rng, batch, N, T), lax.stop_gradient(jnp.asarray(rate))
    plan = make_plan((*batch, K), N // K, T, S, mask is not None, block_size, float(scale), dtype)
    out, residual = _attend(plan, *_vary_alike((scaled, key, value, softcap, bias, mask, drop)))

    empty = residual == jnp.finfo(dtype).max
    if sinks is not None:
        # A sink is one more key, and its value is zero.
        with_sinks = jnp.logaddexp(residual, sinks.astype(dtype))
        out *= jnp.exp(jnp.where(empty, 0, residual - with_sinks))[..., None]
        residual = with_sinks
    if rate is not None:
        out /= 1 - rate
    out = out.astype(query.dtype)
    return (out, jnp.where(empty, -jnp.inf, residual)) if return_residual else out


@functools.partial(jax.jit, static_argnums=0)
@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(plan, query, key, value, softcap, bias, mask, drop):
    """Output `[..., T, N, V]` and logsumexp `[..., T, N]`.

    The logsumexp of a row that sees nothing is the largest number there is, so that the row has no
    weights: exp(anything - largest) is 0.
    """
    return _forward(plan, query, key, value, softcap, bias, mask, drop)[0]


def _forward(plan, query, key, value, softcap, bias, mask, drop):
    lowest, largest = jnp.finfo(plan.dtype).min, jnp.finfo(plan.dtype).max

    def group(g, results):
        keys, values = (_keys(plan, plan.keys(g).cut(x, "SNH")) for x in (key, value))

        def block(i, results):
            rules = _Rules(plan, plan.queries(g, i), bias, mask, drop)
            queries = plan.scale * _rows(plan, rules.at.cut(query, "TNH"))

            def start():
                rows = queries.shape[:2]
                mixed = _full(queries, 0, (*rows, values.shape[-1]))
                return mixed, _full(queries, lowest, rows), _full(queries, 0, rows)

            def tile(j, carry, masked):
                here = rules.tile(j, masked)
                raw = jnp.einsum("nth,nsh->nts", queries, here.keys(keys))
                logits = here.logits(raw, softcap, here.bias)
                peak = logits.max(-1)
                if carry is not None:
                    peak = jnp.maximum(peak, carry[1])
                weights = here.where_visible(jnp.exp(logits - peak[..., None]))
                total = weights.sum(-1)
                mixed = jnp.matmul(here.kept(weights), here.keys(values))
                if carry is not None:
                    shrink = jnp.exp(carry[1] - peak)
                    mixed += carry[0] * shrink[..., None]
                    total += carry[2] * shrink
                return mixed, peak, total

            mixed, peak, total = rules.over_keys(tile, start, None)
            empty = total == 0
            total = jnp.where(empty, 1, total)
            residual = jnp.where(empty, largest, peak + jnp.log(total))
            out, residuals = results
            out = rules.at.put(out, _unrows(plan, mixed / total[..., None]), "TNV")
            return out, rules.at.put(residuals, _unrows(plan, residual), "TN")

        return _loop(0, plan.query_blocks, block, results)

    shape = (*query.shape[:-1], value.shape[-1])
    results = _full(query, 0, shape, plan.dtype), _full(query, 0, shape[:-1], plan.dtype)
    out, residual = _loop(0, plan.groups, group, results)
    return (out, residual), (query, key, value, softcap, bias, mask, drop, out, residual)


def _backward(plan, saved, cotangents):
    query, key, value, softcap, bias, mask, drop, out, residual = saved
    d_out, d_residual = cotangents
    largest = jnp.finfo(plan.dtype).max

    def group(g, carry):
        keys, values = (_keys(plan, plan.keys(g).cut(x, "SNH")) for x in (key, value))
        keys = _finite(keys)
        keys_turned = _settled(jnp.swapaxes(keys, -1, -2))  # [heads, H, S]

        def block(i, carry):
            rules = _Rules(plan, plan.queries(g, i), bias, mask, drop, turned=True)
            d_query, d_keys, d_values, totals = carry
            queries = plan.scale * _finite(_rows(plan, rules.at.cut(query, "TNH")))
            d_outs, outs = (_rows(plan, rules.at.cut(x, "TNV")) for x in (d_out, out))
            residuals, d_residuals = (
                _rows(plan, rules.at.cut(x, "TN")) for x in (residual, d_residual)
            )
            deltas = (outs * d_outs).sum(-1) - jnp.where(residuals == largest, 0, d_residuals)
            if plan.T % plan.t:
                # A row that the block before has counted has no weights here.
                old = rules.at.t_start + jnp.arange(plan.t) < i * plan.t
                residuals = jnp.where(jnp.tile(old, plan.G), largest, residuals)

            def start():
                rows = queries.shape
                d_queries = _full(queries, 0, (rows[0], rows[2], rows[1]))
                return d_queries, d_keys, d_values, totals

            def tile(j, carry, masked):
                d_queries, d_keys, d_values, (d_softcap, d_bias) = carry
                here = rules.tile(j, masked)
                raw = jnp.einsum("nsh,nth->nst", here.keys(keys), queries)
                logits, pull_back = jax.vjp(here.logits, raw, softcap, here.bias)
                weights = here.where_visible(jnp.exp(logits - residuals[:, None, :]))
                d_value = jnp.matmul(here.kept(weights), d_outs)
                d_weights = jnp.einsum("nsv,ntv->nst", here.keys(values), d_outs)
                d_logits = weights * (here.kept(d_weights) - deltas[:, None, :])
                d_raw, d_cap, d_tile = pull_back(here.where_visible(d_logits))
                d_query = _settled(jnp.matmul(here.keys(keys_turned, axis=2), d_raw))
                d_queries = d_query if d_queries is None else d_queries + d_query
                d_keys = here.add_keys(d_keys, jnp.matmul(d_raw, queries))
                d_values = here.add_keys(d_values, d_value)
                if softcap is not None:
                    d_softcap += d_cap
                if bias is not None:
                    d_bias = d_bias.add(d_tile, here.at)
                return d_queries, d_keys, d_values, (d_softcap, d_bias)

            d_queries, *others = rules.over_keys(tile, start, (None, *carry[1:]))
            d_queries = _unrows(plan, plan.scale * jnp.swapaxes(d_queries, -1, -2))
            put = rules.at.add if plan.T % plan.t else rules.at.put
            return put(d_query, d_queries.astype(d_query.dtype), "TNH"), *others

        d_query, d_key, d_value, totals = carry
        sums = (None, None)
        if plan.query_blocks > 1 or plan.key_blocks > 1:
            sums = _full(keys, 0, keys.shape), _full(values, 0, values.shape)
        d_query, *sums, totals = _loop(0, plan.query_blocks, block, (d_query, *sums, totals))
        d_key, d_value = (
            plan.keys(g).put(x, _unkeys(plan, part.astype(x.dtype)), "SNH")
            for x, part in zip((d_key, d_value), sums, strict=True)
        )
        return d_query, d_key, d_value, totals

    def zeros(x):
        return _full(query, 0, x.shape, plan.dtype) if _is_float(x) else x

    def cotangent(x, total):
        return total.astype(x.dtype) if _is_float(x) else np.zeros(x.shape, jax.dtypes.float0)

    totals = jax.tree.map(zeros, (softcap, bias))
    carry = (*(_full(x, 0, x.shape) for x in (query, key, value)), totals)
    *gradients, totals = _loop(0, plan.groups, group, carry)
    return *gradients, *jax.tree.map(cotangent, (softcap, bias), totals), None, None


_attend.__wrapped__.defvjp(_forward, _backward)


class _Rules:
    """Masks, biases and dropout for the tiles of one block of queries."""

    def __init__(self, plan, at, bias, mask, drop, turned=False):
        self.plan, self.at, self.bias, self.mask, self.drop = plan, at, bias, mask, drop
        self.turned = turned

    def tile(self, j, masked: bool) -> "_Here":
        """The tile of these queries and block j of the keys."""
        plan = self.plan
        start = 0 if plan.s == plan.S else _least(j * plan.s, plan.S - plan.s)
        at = self.at._replace(s_start=start, s_size=plan.s)
        bias = visible = keep = None
        if self.bias is not None:
            bias = jax.tree.map(lambda x: x.astype(plan.dtype) if _is_float(x) else x, self.bias)
            bias = bias.cut(at)
        if masked:
            parts = [] if self.mask is None else [self.mask.cut(at).tile(at)]
            if plan.S % plan.s:
                parts.append((at.s >= j * plan.s)[None, :])  # The block before has the others.
            hidden = None if bias is None else bias.hidden(at)
            if hidden is not None:
                parts.append(~hidden)
            visible = self.spread(functools.reduce(jnp.logical_and, parts)) if parts else None
        if self.drop is not None:
            words, rate = self.drop
            keep = self.spread(keep_tile(at.cut(words, "NT2"), rate, at))
        return _Here(at, self.spread, bias, visible, keep)

    def over_keys(self, tile, start, alone):
        """`tile(j, carry, masked)` over the blocks of keys that somebody sees.

        The carry is `start()` at first, and `alone` where there is just one block.
        """
        S, s = self.plan.S, self.plan.s
        keys = Keys((0, S), (0, S))
        if self.mask is not None:
            keys = self.mask.cut(self.at).keys(self.at) or Keys((0, S), (0, 0))
        if self.bias is not None and self.bias.hidden(self.at) is not None:
            keys = keys._replace(open=(0, 0))
        first, stop = _most(keys.seen[0] // s, 0), _least(-(-keys.seen[1] // s), -(-S // s))
        stop = _most(first, stop)
        open_first = _least(_most(-(-keys.open[0] // s), first), stop)
        open_stop = _least(_most(keys.open[1] // s, open_first), stop)
        before, after = open_first - first, stop - open_stop
        if s == S:
            return tile(0, alone, masked=_is_positive(before) or _is_positive(after))

        def masked_tile(i, carry):
            return tile(i + jnp.where(i < before, first, open_stop - before), carry, masked=True)

        carry = _loop(open_first, open_stop, functools.partial(tile, masked=False), start())
        return _loop(0, before + after, masked_tile, carry)

    def spread(self, x):
        """`[..., N, t, s]` as it stands against a tile, `[heads, G t, s]` or `[heads, s, G t]`."""
        plan = self.plan
        *batch, K = plan.box
        x = jnp.broadcast_to(x, (*batch, K * plan.G, plan.t, plan.s))
        x = x.reshape(plan.heads, plan.G, plan.t, plan.s)
        if self.turned:
            return x.transpose(0, 3, 1, 2).reshape(plan.heads, plan.s, plan.G * plan.t)
        return x.reshape(plan.heads, plan.G * plan.t, plan.s)


class _Here(NamedTuple):
    """What masks, biases and dropout say about one tile, as it stands against its logits."""

    at: Tile
    spread: object
    bias: object
    visible: Array | None
    keep: Array | None

    def logits(self, raw, softcap, bias):
        """Softcap, bias and mask; `raw` is scaled, and divided by `softcap`."""
        if softcap is not None:
            raw = softcap * jnp.tanh(self.where_visible(raw))
        if bias is not None:
            raw += self.spread(bias.tile(self.at))
        lowest = jnp.finfo(raw.dtype).min
        return raw if self.visible is None else jnp.where(self.visible, raw, lowest)

    def where_visible(self, x):
        return x if self.visible is None else jnp.where(self.visible, x, 0)

    def kept(self, weights):
        return weights if self.keep is None else jnp.where(self.keep, weights, 0)

    def keys(self, x, axis=1):
        """This tile's part of an axis of keys."""
        at = self.at
        if at.s_size == at.S:
            return x
        return lax.dynamic_slice_in_dim(x, at.s_start, at.s_size, axis)

    def add_keys(self, x, part):
        if x is None:
            return part
        return lax.dynamic_update_slice_in_dim(x, self.keys(x) + part, self.at.s_start, 1)


def _per_query(scale):
    """A scale of the logits, `[..., N, T, 1]` or fewer axes, as one of the queries."""
    scale = jnp.asarray(scale)
    if scale.ndim == 0:
        return scale
    if scale.shape[-1] != 1:
        raise NotImplementedError(
            'implementation="blockwise" has no scale for each key, use "dense": scale must be a '
            f"number or [..., N, T, 1], got shape {scale.shape}."
        )
    scale = scale.reshape((1,) * (3 - scale.ndim) + scale.shape)
    return jnp.swapaxes(scale, -2, -3)


def _rows(plan, x):
    """`[..., t, N, ...]` of a group -> `[heads, G t, ...]`."""
    rest = x.shape[len(plan.box) + 1 :]
    x = x.astype(plan.dtype).reshape(-1, plan.t, plan.box[-1], plan.G, *rest)
    return jnp.moveaxis(x, 1, 3).reshape(plan.heads, plan.G * plan.t, *rest)


def _unrows(plan, x):
    """The inverse of `_rows`."""
    *batch, K = plan.box
    rest = x.shape[2:]
    x = x.reshape(-1, K, plan.G, plan.t, *rest)
    return jnp.moveaxis(x, 3, 1).reshape(*batch, plan.t, K * plan.G, *rest)


def _keys(plan, x):
    """`[..., S, K, H]` of a group -> `[heads, S, H]`."""
    x = x.astype(plan.dtype).reshape(-1, *x.shape[-3:])
    return jnp.swapaxes(x, 1, 2).reshape(plan.heads, plan.S, -1)


def _unkeys(plan, x):
    """The inverse of `_keys`."""
    *batch, K = plan.box
    x = jnp.swapaxes(x.reshape(-1, K, *x.shape[1:]), 1, 2)
    return x.reshape(*batch, *x.shape[1:])


def _finite(x):
    """`x` with zeros for what is not finite, in a product of the backward pass.

    It has shown in the output, or is masked; then it would meet the zeros of the mask, and 0 * NaN
    is NaN.
    """
    return jnp.where(jnp.isfinite(x), x, 0)


def _settled(x):
    """`x`, computed as it is written.

    XLA would fold a transpose into a product, and make it the slow one that the code avoids.
    """
    return lax.optimization_barrier(x)


def _loop(start, stop, body, carry):
    """A `fori_loop`, or none where it is known to be short."""
    if isinstance(start, int) and isinstance(stop, int) and stop - start <= 1:
        return body(start, carry) if stop > start else carry
    return lax.fori_loop(start, stop, body, carry)


def _full(like, fill, shape, dtype=None):
    """A constant that varies over the devices of a `shard_map` as `like` does, to start a loop."""
    return _vary(jnp.full(shape, fill, dtype or like.dtype), _varying(like))


def _vary_alike(tree):
    """All arrays varying over the same devices: gradients are summed where that changed one."""
    axes = frozenset().union(*(_varying(x) for x in jax.tree.leaves(tree)))
    return jax.tree.map(lambda x: _vary(x, axes), tree)


def _vary(x, axes):
    new = tuple(axes - _varying(x))
    return lax.pcast(x, new, to="varying") if new else x


def _varying(x):
    return jax.typeof(x).manual_axis_type.varying


def _is_float(x):
    return jnp.issubdtype(x.dtype, jnp.floating)


def _is_positive(x):
    return not isinstance(x, int) or x > 0


def _least(a, b):
    return min(a, b) if isinstance(a, int) and isinstance(b, int) else jnp.minimum(a, b)


def _most(a, b):
    return max(a, b) if isinstance(a, int) and isinstance(b, int) else jnp.maximum(a, b)
