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

from attention_jax.functional.dropout import keep_tile
from attention_jax.functional.masks import Keys
from attention_jax.functional.tiles import Tile
from attention_jax.types import Array

_TILE = 512 * 512  # Logits in a tile: 1 MiB in float32, the second-level cache of one core.
_UNROLL = 8  # Up to here a loop over queries is written out, so that its bounds are numbers.


class Plan(NamedTuple):
    """How the work is cut up: static, and all that a compiled program depends on besides shapes.

    Attributes:
        lead: The sizes of the batch axes and of the axis of key heads.
        box: How many of each are taken at once: a divisor, and only behind it less than all.
        G, T, S: Query heads per key head, queries, keys.
        t, s: Queries and keys in a tile. Where they do not divide T and S, the last block ends
            with the sequence and overlaps the one before it; what is in both counts once.
    """

    lead: tuple[int, ...]
    box: tuple[int, ...]
    G: int
    T: int
    S: int
    t: int
    s: int

    @property
    def groups(self) -> int:
        return math.prod(self.lead) // self.heads

    @property
    def heads(self) -> int:
        """Key heads in a group."""
        return math.prod(self.box)

    @property
    def tile_shape(self) -> tuple[int, ...]:
        """The shape `[..., N, t, s]` of one group's tile."""
        return (*self.box[:-1], self.box[-1] * self.G, self.t, self.s)

    def rows(self, group: int | Array, i: int | Array) -> Tile:
        """Block i of a group's queries, and all keys."""
        starts, index = [], group * self.heads
        for size in reversed(self.lead):
            starts.insert(0, index % size)
            index = index // size
        lead = list(zip(starts, self.box, strict=True))
        lead[-1] = (self.G * starts[-1], self.G * self.box[-1])
        start = _least(i * self.t, self.T - self.t)
        return Tile(start, self.t, 0, self.S, self.T, self.S, lead=tuple(lead))


def block_sizes(lead, G, T, S, block_size=None) -> Plan:
    """The plan for these sizes; `block_size` overrides the size of the tiles."""
    if block_size is None:
        block_size = (max(1, 512 // G), 512)
    elif isinstance(block_size, int):
        block_size = (block_size, block_size)
    t, s = min(block_size[0], T), min(block_size[1], S)
    room, box = max(1, _TILE // (G * t * s)), []
    for size in reversed(lead):
        box.insert(0, max(n for n in range(1, min(size, room) + 1) if size % n == 0))
        room = room // size
        room = max(room, 1) if box[0] == size else 1
    return Plan(tuple(lead), tuple(box), G, T, S, t, s)


def blockwise_attention(
    query,
    key,
    value,
    *,
    bias,
    mask,
    scale,
    softcap,
    sinks,
    rate,
    words,
    block_size,
    return_residual,
) -> Array | tuple[Array, Array]:
    """The output `[..., T, N, V]`, or that and the logsumexp `[..., T, N]`; no size is 0.

    Arguments are those of `dot_product_attention`, checked; `words` are the `row_words` of dropout,
    or None.
    """
    *batch, T, N, H = query.shape
    S, K, V = value.shape[-3:]
    dtype = jnp.promote_types(jnp.result_type(query, key, value), jnp.float32)
    plan = block_sizes((*batch, K), N // K, T, S, block_size)

    scale = H**-0.5 if scale is None else scale
    if softcap is not None:
        softcap = jnp.asarray(softcap, dtype)
        scale = scale / softcap
    query_dtype = query.dtype
    query, key, value = (jnp.swapaxes(x.astype(dtype), -2, -3) for x in (query, key, value))
    query = (query * scale).astype(dtype).reshape(plan.groups, plan.heads, plan.G, T, H)
    key = key.reshape(plan.groups, plan.heads, S, H)
    value = value.reshape(plan.groups, plan.heads, S, V)

    drop = None if words is None else (words, lax.stop_gradient(jnp.asarray(rate)))
    operands = _vary_alike((query, key, value, softcap, bias, mask, drop))
    out, residual = _attend(plan, *operands)

    out, residual = out.reshape(*batch, N, T, V), residual.reshape(*batch, N, T)
    empty = residual == jnp.finfo(dtype).max
    if sinks is not None:
        # A sink is one more key, and its value is zero.
        with_sinks = jnp.logaddexp(residual, sinks.astype(dtype)[:, None])
        out *= jnp.exp(jnp.where(empty, 0, residual - with_sinks))[..., None]
        residual = with_sinks
    if drop is not None:
        out /= 1 - rate
    out = jnp.swapaxes(out, -2, -3).astype(query_dtype)
    if not return_residual:
        return out
    return out, jnp.swapaxes(jnp.where(empty, -jnp.inf, residual), -1, -2)


@functools.partial(jax.jit, static_argnums=0)
@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(plan, query, key, value, softcap, bias, mask, drop):
    """Output `[groups, heads, G, T, V]` and logsumexp `[groups, heads, G, T]` of scaled queries.

    The logsumexp of a row that sees nothing is the largest number there is, so that the row has no
    weights: exp(anything - largest) is 0.
    """
    return _forward(plan, query, key, value, softcap, bias, mask, drop)[0]


def _forward(plan, query, key, value, softcap, bias, mask, drop):
    def group(carry, g, query, key, value):
        def block(i, results):
            at = plan.rows(g, i)
            rules = _Rules(plan, at, bias, mask, drop)
            queries = _rows(query, at)  # [heads, G t, H]

            def tile(j, carry, masked):
                here = rules.tile(j, masked)
                raw = jnp.einsum("nth,nsh->nts", queries, _keys(key, here.at))
                logits = here.logits(raw, softcap, here.bias)
                peak = logits.max(-1)
                if carry is not None:
                    peak = jnp.maximum(peak, carry[1])
                weights = here.where_visible(jnp.exp(logits - peak[..., None]))
                total = weights.sum(-1)
                mixed = jnp.matmul(here.kept(weights), _keys(value, here.at))
                if carry is not None:
                    shrink = jnp.exp(carry[1] - peak)
                    mixed += carry[0] * shrink[..., None]
                    total += carry[2] * shrink
                return mixed, peak, total

            def start():
                rows = queries.shape[:2]
                lowest = jnp.finfo(queries.dtype).min
                return (
                    _full(queries, 0, (*rows, value.shape[-1])),
                    _full(queries, lowest, rows),
                    _full(queries, 0, rows),
                )

            mixed, peak, total = rules.over_keys(tile, start)
            empty = total == 0
            mixed /= jnp.where(empty, 1, total)[..., None]
            largest = jnp.finfo(peak.dtype).max
            residual = jnp.where(empty, largest, peak + jnp.log(jnp.where(empty, 1, total)))
            if plan.t == plan.T:
                return _unrow(plan, mixed), _unrow(plan, residual)
            out, residuals = results
            return (
                lax.dynamic_update_slice_in_dim(out, _unrow(plan, mixed), at.t_start, 2),
                lax.dynamic_update_slice_in_dim(residuals, _unrow(plan, residual), at.t_start, 2),
            )

        rows = query.shape[:-1]
        results = _full(query, 0, (*rows, value.shape[-1])), _full(query, 0, rows)
        return carry, _loop(0, -(-plan.T // plan.t), block, results)

    _, (out, residual) = _over_groups(plan, group, (), (query, key, value))
    return (out, residual), (query, key, value, softcap, bias, mask, drop, out, residual)


def _backward(plan, saved, cotangents):
    query, key, value, softcap, bias, mask, drop, out, residual = saved
    d_out, d_residual = cotangents
    # What is not finite has shown in the output, or is masked: then it would meet the zeros of the
    # mask in a product, and 0 * NaN is NaN.
    query, key = (jnp.where(jnp.isfinite(x), x, 0) for x in (query, key))
    empty = residual == jnp.finfo(residual.dtype).max
    delta = (out * d_out).sum(-1) - jnp.where(empty, 0, d_residual)  # [groups, heads, G, T]

    def group(totals, g, query, key, value, d_out, residual, delta):
        key_turned = jnp.swapaxes(key, -1, -2)  # [heads, H, S]

        def block(i, carry):
            at = plan.rows(g, i)
            rules = _Rules(plan, at, bias, mask, drop, turned=True)
            queries, d_outs = _rows(query, at), _rows(d_out, at)
            residuals, deltas = (_rows(x, at)[:, None, :] for x in (residual, delta))
            if plan.T % plan.t:
                # A row that the block before has counted has no weights here.
                old = at.t_start + jnp.arange(plan.t) < i * plan.t
                largest = jnp.finfo(residuals.dtype).max
                residuals = jnp.where(jnp.tile(old, plan.G), largest, residuals)

            def tile(j, carry, masked):
                d_queries, d_key, d_value, (d_softcap, d_bias) = carry
                here = rules.tile(j, masked)
                keys, values = _keys(key, here.at), _keys(value, here.at)
                raw = jnp.einsum("nsh,nth->nst", keys, queries)
                logits, pull_back = jax.vjp(here.logits, raw, softcap, here.bias)
                weights = here.where_visible(jnp.exp(logits - residuals))
                d_values = jnp.matmul(here.kept(weights), d_outs)
                d_weights = here.kept(jnp.einsum("nsv,ntv->nst", values, d_outs))
                d_logits = here.where_visible(weights * (d_weights - deltas))
                d_raw, d_cap, d_tile = pull_back(d_logits)
                d_queries += jnp.matmul(_keys(key_turned, here.at, axis=2), d_raw)
                d_key = _add_keys(d_key, jnp.matmul(d_raw, queries), here.at)
                d_value = _add_keys(d_value, d_values, here.at)
                if softcap is not None:
                    d_softcap += d_cap
                if bias is not None:
                    d_bias = d_bias.add(d_tile, here.at)
                return d_queries, d_key, d_value, (d_softcap, d_bias)

            def start():
                rows, _, H = queries.shape
                return _full(queries, 0, (rows, H, plan.G * plan.t)), *carry[1:]

            d_queries, *others = rules.over_keys(tile, start)
            d_queries = jnp.swapaxes(d_queries, -1, -2).reshape(plan.heads, plan.G, plan.t, -1)
            if plan.t == plan.T:
                return d_queries, *others
            d_query = carry[0]
            d_queries += lax.dynamic_slice_in_dim(d_query, at.t_start, plan.t, 2)
            d_query = lax.dynamic_update_slice_in_dim(d_query, d_queries, at.t_start, 2)
            return d_query, *others

        carry = *(_full(x, 0, x.shape) for x in (query, key, value)), totals
        *gradients, totals = _loop(0, -(-plan.T // plan.t), block, carry)
        return totals, gradients

    def zeros(x):
        is_float = jnp.issubdtype(x.dtype, jnp.floating)
        return _full(query, 0, x.shape) if is_float else x

    totals, gradients = _over_groups(
        plan,
        group,
        jax.tree.map(zeros, (softcap, bias)),
        (query, key, value, d_out, residual, delta),
    )

    def cotangent(x, total):
        is_float = jnp.issubdtype(x.dtype, jnp.floating)
        return total.astype(x.dtype) if is_float else np.zeros(x.shape, jax.dtypes.float0)

    return *gradients, *jax.tree.map(cotangent, (softcap, bias), totals), None, None


_attend.__wrapped__.defvjp(_forward, _backward)


class _Here(NamedTuple):
    """What masks, biases and dropout say about one tile, as they stand against its logits."""

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
        return raw if self.visible is None else jnp.where(self.visible, raw, _lowest(raw))

    def where_visible(self, x):
        return x if self.visible is None else jnp.where(self.visible, x, 0)

    def kept(self, weights):
        return weights if self.keep is None else jnp.where(self.keep, weights, 0)


class _Rules:
    """Masks, biases and dropout for the tiles of one block of queries."""

    def __init__(self, plan, at, bias, mask, drop, turned=False):
        self.plan, self.at, self.bias, self.mask, self.drop = plan, at, bias, mask, drop
        self.turned = turned

    def tile(self, j, masked: bool) -> _Here:
        plan = self.plan
        start = _least(j * plan.s, plan.S - plan.s)
        at = self.at._replace(s_start=start, s_size=plan.s)
        bias = visible = keep = None
        if self.bias is not None:
            bias = jax.tree.map(self._as_float, self.bias.cut(at))
        if masked:
            parts = [] if self.mask is None else [self.mask.cut(at).tile(at)]
            if plan.S % plan.s:
                parts.append((at.s >= j * plan.s)[None, :])  # The block before has the others.
            hidden = None if bias is None else bias.hidden(at)
            if hidden is not None:
                parts.append(~hidden)
            visible = self._spread(functools.reduce(jnp.logical_and, parts)) if parts else None
        if self.drop is not None:
            words, rate = self.drop
            words = at.cut(words, "NT2")
            keep = self._spread(keep_tile(words, rate, at))
        return _Here(at, self._spread, bias, visible, keep)

    def over_keys(self, tile, start):
        """`tile(j, carry, masked)` over the blocks of keys that somebody sees."""
        S, s = self.plan.S, self.plan.s
        keys = Keys((0, S), (0, S))
        if self.mask is not None:
            keys = self.mask.cut(self.at).keys(self.at) or Keys((0, S), (0, 0))
        first, stop = _most(keys.seen[0] // s, 0), _least(-(-keys.seen[1] // s), -(-S // s))
        stop = _most(first, stop)
        open_first = _least(_most(-(-keys.open[0] // s), first), stop)
        open_stop = _least(_most(keys.open[1] // s, open_first), stop)
        if self.bias is not None and self.bias.hidden(self.at) is not None:
            open_first = open_stop = first
        before, after = open_first - first, stop - open_stop

        if s == S:
            is_open = isinstance(before, int) and isinstance(after, int) and before + after == 0
            carry = start()
            return tile(0, None if len(carry) == 3 else carry, not is_open)

        def masked_tile(i, carry):
            j = first + i
            if not (isinstance(before, int) and before == 0):
                j = jnp.where(i < before, j, i - before + open_stop)
            else:
                j = i + open_stop
            return tile(j, carry, True)

        carry = _loop(open_first, open_stop, functools.partial(tile, masked=False), start())
        return _loop(0, before + after, masked_tile, carry)

    def _spread(self, x):
        """`[..., N, t, s]` as it stands against a tile, `[heads, G t, s]` or `[heads, s, G t]`."""
        plan = self.plan
        x = jnp.broadcast_to(x, plan.tile_shape).reshape(plan.heads, plan.G, plan.t, plan.s)
        if self.turned:
            return x.transpose(0, 3, 1, 2).reshape(plan.heads, plan.s, plan.G * plan.t)
        return x.reshape(plan.heads, plan.G * plan.t, plan.s)

    def _as_float(self, x):
        is_float = jnp.issubdtype(x.dtype, jnp.floating)
        return x.astype(jnp.promote_types(x.dtype, jnp.float32)) if is_float else x


def _rows(x, at):
    """A block of queries, `[heads, G, T, ...]` -> `[heads, G t, ...]`."""
    if at.t_size != at.T:
        x = lax.dynamic_slice_in_dim(x, at.t_start, at.t_size, 2)
    return x.reshape(x.shape[0], -1, *x.shape[3:])


def _unrow(plan, x):
    return x.reshape(plan.heads, plan.G, plan.t, *x.shape[2:])


def _keys(x, at, axis=1):
    """A block of keys, `[heads, S, ...]` -> `[heads, s, ...]`."""
    return x if at.s_size == at.S else lax.dynamic_slice_in_dim(x, at.s_start, at.s_size, axis)


def _add_keys(x, part, at):
    part += _keys(x, at)
    return part if at.s_size == at.S else lax.dynamic_update_slice_in_dim(x, part, at.s_start, 1)


def _over_groups(plan, group, carry, arrays):
    """`group(carry, g, *arrays[g]) -> (carry, results)` for every group; results are stacked."""
    if plan.groups == 1:
        carry, results = group(carry, 0, *(x[0] for x in arrays))
        return carry, jax.tree.map(lambda x: x[None], results)
    numbers = jnp.arange(plan.groups, dtype=jnp.int32)
    return lax.scan(lambda carry, xs: group(carry, *xs), carry, (numbers, *arrays))


def _loop(start, stop, body, carry):
    """A `fori_loop`, written out where it is short and its bounds are numbers."""
    if isinstance(start, int) and isinstance(stop, int) and stop - start <= _UNROLL:
        for i in range(start, stop):
            carry = body(i, carry)
        return carry
    return lax.fori_loop(start, stop, body, carry)


def _full(like, fill, shape):
    """A constant that varies over the devices of a `shard_map` as `like` does, to start a loop."""
    return _vary(jnp.full(shape, fill, like.dtype), _varying(like))


def _vary_alike(tree):
    """All arrays varying over the same devices: gradients are summed where that changed one."""
    axes = frozenset().union(*(_varying(x) for x in jax.tree.leaves(tree)))
    return jax.tree.map(lambda x: _vary(x, axes), tree)


def _vary(x, axes):
    new = tuple(axes - _varying(x))
    return lax.pcast(x, new, to="varying") if new else x


def _lowest(x):
    return jnp.finfo(x.dtype).min


def _least(a, b):
    return min(a, b) if isinstance(a, int) and isinstance(b, int) else jnp.minimum(a, b)


def _most(a, b):
    return max(a, b) if isinstance(a, int) and isinstance(b, int) else jnp.maximum(a, b)


def _varying(x):
    return jax.typeof(x).manual_axis_type.varying
