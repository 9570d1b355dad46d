"""Exact attention in memory linear in the sequence: the dense definition, one tile at a time.

The forward pass walks over tiles of the logits, some queries by some keys, and keeps for each row
the normaliser and the weighted sum of the values so far; rows whose logits need it keep their peak
too (the online softmax). The backward pass computes every tile again from peak and normaliser. No
tile outlives its turn.

Six things make it fast on a CPU:

- Products stand in forms that XLA runs at full speed. A product whose left operand is transposed,
  such as weights^T @ d_out, does not; so the backward pass works on transposed tiles, keys by
  queries, on which every product is plain.
- A batch of small products is made to run on every core, see `_product`.
- A mask says which keys a block of queries sees (`Mask.keys`): tiles that nobody sees are skipped,
  and tiles that everybody sees are not masked.
- Tiles are large enough to feed every core and small enough for the cache.
- No pass over the logits looks for peaks that are not needed, see `_Rows.attend`.
- bfloat16 is multiplied as it is, and summed in float32.

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

from attention_jax.checks import jax_defaults
from attention_jax.functional.dropout import keep_tile, row_words
from attention_jax.functional.masks import Keys
from attention_jax.functional.mesh import axes_of, on_each_device
from attention_jax.functional.tiles import Tile
from attention_jax.types import Array

_ROOM = 2**22  # Bytes of a tile and its rows, up to which several heads share a turn.
_GRAIN = 64  # Tiles begin and end at multiples of this where they can: the width of a product.
_ONE_CORE = jax.__version_info__ < (0, 11)  # See `_product` and `make_plan`.
_MOST_UNROLLED = 16  # Blocks of queries that are written out one by one, each with its own keys.


_LEAST_TRIANGLE = 256  # Rows down to which the triangle of a causal mask is halved.
_LEAST_TOTAL, _MOST_TOTAL = 1e-6, 1e20  # Sums of exp(logit) that need no peak.
# The polynomial nearest to exp, relatively, for |x| <= log(2) / 2; from degree 5 down to 0.
_EXP = (0.00829027, 0.04189816, 0.16667639, 0.49999148, 0.99999970, 1.0)


class Cut(NamedTuple):
    """How the tiles of one pass are cut.

    Attributes:
        t, s: Queries in a tile, and the most keys. In a loop over blocks that do not divide T or S
            the last one ends with the sequence and overlaps the one before it; what is in both
            counts once.
        box: How many of each leading axis are taken at once, a divisor of each; the last axes come
            whole before one that is divided, and one of each of those before.
        unrolled: The blocks of queries are no loop, so that each has a tile of just its keys.
        halved: Each query sees the keys up to itself, and what a block of queries sees among
            themselves is cut into ever smaller squares, see `_Rows`. The last block has fewer
            queries where t does not divide T; where there are several, s divides t.
    """

    t: int
    s: int
    box: tuple[int, ...]
    unrolled: bool
    halved: bool = False


class Plan(NamedTuple):
    """How the work is cut up: static, and all that a compiled program depends on besides shapes.

    Attributes:
        t, s, box, unrolled, halved: Those of the `Cut` of this pass.
        back: The `Cut` of the backward pass.
        lead: The sizes of the batch axes and of the axis of key heads.
        G, T, S: Query heads per key head, queries, keys.
        scales: What queries are multiplied by when they are read, and logits when they are made;
            one of the two is 1. Queries where that rounds nothing, for it is less work.
        dtype: The type of logits, softmax and sums.
        operand: The type of what is multiplied; `dtype` but for bfloat16.
    """

    t: int
    s: int
    box: tuple[int, ...]
    unrolled: bool
    halved: bool
    back: Cut
    lead: tuple[int, ...]
    G: int
    T: int
    S: int
    scales: tuple[float, float]
    dtype: jnp.dtype
    operand: jnp.dtype

    @property
    def heads(self) -> int:
        """Key heads that are taken at once."""
        return math.prod(self.box)

    @property
    def stack(self) -> tuple[int, ...]:
        """The leading axis of tiles: heads, or none for a single one.

        XLA fuses a product of matrices with what becomes of it, a batch of one product not.
        """
        return (self.heads,) if self.heads > 1 else ()

    @property
    def groups(self) -> int:
        return math.prod(self.lead) // self.heads

    @property
    def query_blocks(self) -> int:
        return -(-self.T // self.t)

    @property
    def alike(self) -> int:
        """Queries for which the same keys are computed, at most."""
        return min(_LEAST_TRIANGLE, self.t) if self.halved else self.t

    @property
    def overlapping(self) -> bool:
        """The last block of queries repeats some of the one before."""
        return not (self.unrolled or self.halved) and self.T % self.t > 0

    @property
    def narrow(self) -> bool:
        """What is multiplied is narrower than the sums."""
        return self.operand != self.dtype

    def turned(self, x: Array) -> Array:
        """The right operand x^T: XLA multiplies narrow numbers fast where that is no transpose."""
        return _settled(_turned(x)) if self.narrow else _turned(x)

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
        lead = (*batch, (start * self.G, size * self.G))
        first = _least(i * self.t, self.T - self.t) if self.overlapping else i * self.t
        size = min(self.t, self.T - first) if isinstance(first, int) else self.t
        return at._replace(t_start=first, t_size=size, lead=lead)

    def over_queries(self, block, carry):
        """`block(i, carry)` for all blocks of queries."""
        whole = self.T // self.t if self.halved else self.query_blocks
        carry = _loop(0, whole, block, carry, self.unrolled)
        return carry if whole == self.query_blocks else block(whole, carry)

    def part(self, x, start, stop):
        """The rows of some queries: `[heads, G t, ...]` -> `[heads, G (stop - start), ...]`."""
        axis = len(self.stack) + 1
        return self._flat(lax.slice_in_dim(self._by_query(x), start, stop, axis=axis))

    def joined(self, parts):
        """The inverse of `part`, for parts that follow each other."""
        parts = [self._by_query(x) for x in parts]
        return self._flat(jnp.concatenate(parts, axis=len(self.stack) + 1))

    def _by_query(self, x):
        axis = len(self.stack)
        return x.reshape(*x.shape[:axis], self.G, -1, *x.shape[axis + 1 :])

    def _flat(self, x):
        axis = len(self.stack)
        return x.reshape(*x.shape[:axis], -1, *x.shape[axis + 2 :])


def make_plan(lead, G, T, S, H, mask, block_size, scale, dtype) -> Plan:
    """The plan for these sizes and this type of the inputs; `block_size` overrides both sizes.

    A tile of whole rows, from the first key that is seen to the last, has no others to be added to,
    so it is taken for up to 4096 keys. All numbers are those of the fastest tiles that were found
    on a CPU (docs/performance.md).

    Of sizes that an export leaves open nothing is known: a length is one tile, and an axis of the
    batch or of heads is taken one by one.
    """
    wide = jnp.promote_types(dtype, jnp.float32)
    operand = jnp.dtype(dtype) if dtype == jnp.bfloat16 else wide
    exact = operand == wide or abs(math.frexp(scale)[0]) == 0.5  # A power of two.
    scales = (scale, 1.0) if exact else (1.0, scale)
    rest = tuple(lead), G, T, S, scales, wide, operand
    if not (isinstance(T, int) and isinstance(S, int)):
        whole = Cut(T, S, (1,) * len(lead), unrolled=False)
        return Plan(*whole, whole, *rest)

    some = min(256, -(-T // 2))

    def keys(i):
        """What is known of the keys that `some` queries see, from i on."""
        known = None if mask is None else mask.keys(Tile(i, some, 0, S, T, S))
        return known or Keys((0, S), (0, S))

    (first, _, most, usual), (last, *_) = keys(0), keys(T - some)
    most = S if most is None else min(S, most)
    narrow = most if usual is None else min(most, usual)
    known = all(isinstance(x, int) for x in (*first, *last))
    shift = max(b - a for a, b in zip(first, last, strict=True)) if known else S
    alike = S <= _GRAIN or 8 * shift <= S  # Hardly anything would be skipped.
    heads = math.prod(size for size in lead if isinstance(size, int))

    def cut(t, s, room=_ROOM, unrolled=False):
        if block_size is None:
            t, s = min(max(1, t // G), T), min(s, S)
        else:
            t, s = min(block_size[0], T), min(block_size[1], S)
        unrolled = unrolled and s == S and -(-T // t) <= _MOST_UNROLLED
        rows, columns = G * t, min(s, most)
        size = rows * columns * wide.itemsize + 2 * (rows + columns) * H * operand.itemsize
        return Cut(t, s, _box(lead, room // size), unrolled)

    side = 1024 if S > 4096 else 512
    few = 2048 if operand == wide else 1024
    forward, back = cut(side, side, 2 * _ROOM), cut(side, side)
    if narrow < S and heads >= 4 and narrow <= 512:
        # A window: small squares, of which many heads share a turn.
        small = 128 if heads >= 8 else 256
        forward, back = cut(small, small, 2 * _ROOM), cut(small, small)
    elif most < S and most <= 4096:
        forward = back = cut(256, S, _ROOM // 2)  # As wide as the window, wherever it stands.
    elif alike:
        if S <= 4096:
            forward = cut(min(1024, 2**21 // S), S, 2 * _ROOM)
        back = cut(1024, side, 2 * _ROOM if max(T, S) <= 128 else _ROOM)
    elif known and heads >= 4 and S <= 2048 and not _ONE_CORE:
        # Causal, where a batch of small products uses every core.
        small = 128 if S <= 512 else 256
        forward, back = cut(small, small, 2 * _ROOM), cut(small, small)
    elif known and max(T, S) <= few and cut(256, S, unrolled=True).unrolled:
        # Blocks that see each its own number of keys are written out while they are few.
        block = min(256, G * _GRAIN * -(-T // (2 * _GRAIN)))
        forward = cut(block, S, 2 * _ROOM if 128 < S <= 512 else _ROOM, unrolled=True)
        if max(T, S) <= 1024 and (heads < 4 or S <= 256 or (S <= 512 and H > 64)):
            back = cut(block, S, unrolled=True)
        elif S <= 512:
            back = cut(128, 128)
    elif block_size is None and _is_triangle(mask, T, S):
        t = min(T, max(_LEAST_TRIANGLE, 2 * side // G // _GRAIN * _GRAIN))
        forward = cut(G * t, min(t, 1024), 2 * _ROOM)._replace(halved=True)
    return Plan(*forward, back, *rest)


def _is_triangle(mask, T, S):
    """Whether each query sees the keys up to itself, by what the mask says of every 64 of them.

    Squares end at multiples of 64 (`_GRAIN`), and what is smaller is masked.
    """

    def knows(i):
        size = min(_GRAIN, T - i)
        keys = mask.keys(Tile(i, size, 0, S, T, S))
        if keys is None or not all(isinstance(x, int) for x in (*keys.seen, *keys.open)):
            return False
        return (keys.seen, keys.open) == ((0, i + size), (0, i + 1))

    if mask is None or T != S:
        return False
    return all(knows(i) for i in range(0, T, _GRAIN))


def _box(lead, room):
    """How many of each leading axis, for no more than `room` heads at once."""
    box = ()
    for size in reversed(lead):
        fits = range(1, min(size, max(1, room)) + 1) if isinstance(size, int) else ()
        part = max((n for n in fits if size % n == 0), default=1)
        box = (part, *box)
        room = room // size if part == size else 1
    return box


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
    dtype = jnp.promote_types(jnp.result_type(query, key, value), jnp.float32)
    scale = H**-0.5 if scale is None else _number(scale, dtype)
    scaled = query
    if softcap is not None:
        scale = scale / _number(softcap, dtype)
        softcap = jnp.asarray(softcap, dtype)
    if not isinstance(scale, float):
        scaled, scale = query.astype(dtype) * scale, 1.0  # Differentiable.
    drop = None
    if rate is not None:
        drop = row_words(rng, batch, N, T), lax.stop_gradient(jnp.asarray(rate))
    request = Request(block_size, scale, jax.config.jax_default_matmul_precision)
    arguments = _vary_alike((scaled, key, value, softcap, bias, mask, drop))
    out, peak, log_total = _attend(request, *arguments)

    empty = peak == jnp.finfo(dtype).max
    peak = lax.stop_gradient(jnp.where(empty, jnp.finfo(dtype).min, peak))
    if sinks is not None:
        # A sink is one more key, and its value is zero.
        sinks = sinks.astype(dtype)
        top = lax.stop_gradient(jnp.maximum(peak, sinks))
        total = jnp.where(empty, 0, jnp.exp(log_total + (peak - top)))
        with_sinks = total + jnp.exp(sinks - top)
        empty = with_sinks == 0  # Such a row has no sink either: it is minus infinity.
        with_sinks = jnp.where(empty, 1, with_sinks)
        out *= (total / with_sinks)[..., None]
        peak, log_total = top, jnp.log(with_sinks)
    if rate is not None:
        out /= 1 - rate
    out = out.astype(query.dtype)
    if not return_residual:
        return out
    with jax.debug_infs(False):  # -inf is a word here, not an accident.
        return out, jnp.where(empty, -jnp.inf, peak + log_total)


class Request(NamedTuple):
    """What is static in a call, beside shapes and rules.

    Attributes:
        block_size: (queries, keys) in a tile; None: the plan's own.
        scale: What logits are multiplied by.
        precision: The default precision of products when the attention was called.
    """

    block_size: tuple[int, int] | None
    scale: float
    precision: str | None

    def plan(self, query, key, value, mask) -> Plan:
        *batch, T, N, H = query.shape
        S, K, _ = value.shape[-3:]
        inputs = jnp.result_type(query, key, value)
        lead = (*batch, K)
        return make_plan(lead, N // K, T, S, H, mask, self.block_size, self.scale, inputs)


@functools.partial(jax.jit, static_argnums=0)
@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(request, query, key, value, softcap, bias, mask, drop):
    """Output `[..., T, N, V]`, and `[..., T, N]` two parts of the logsumexp: peak and the rest.

    They stay apart: beside a peak of -1e9, as some write "masked", a sum would lose the rest. The
    peak counts as constant, derivatives are those of the rest. The peak of a row that sees nothing
    is the largest number there is, so that the row has no weights: exp(anything - largest) is 0.
    """
    return _forward(request, query, key, value, softcap, bias, mask, drop)[0]


def _as_precise(rule):
    """`rule` in the context of the call: jax traces it later, maybe outside of that."""

    @functools.wraps(rule)
    def traced(request, *arguments):
        with jax.default_matmul_precision(request.precision), jax_defaults():
            return rule(request, *arguments)

    return traced


def _axes(query, key, value, softcap, bias, mask, drop):
    """What the axes of every array in these run over, for `on_each_device`."""
    arrays = [(query, "TNH"), (key, "SKH"), (value, "SKV")]
    if softcap is not None:
        arrays.append((softcap, ""))
    for rule in (bias, mask):
        if rule is not None:
            arrays += rule.arrays()
    if drop is not None:
        arrays += zip(drop, ("NT2", ""), strict=True)
    return [axes_of(x, letters, query.ndim - 3) for x, letters in arrays]


def _forward(request, *arguments):
    axes = _axes(*arguments)
    out, row = axes[0], axes[0][:-1]
    tiles = functools.partial(_forward_tiles, request)
    out, peak, total = on_each_device(tiles, arguments, axes, [out, row, row])
    return (out, peak, jnp.log(total)), (*arguments, out, peak, total)


@_as_precise
def _forward_tiles(request, query, key, value, softcap, bias, mask, drop):
    plan = request.plan(query, key, value, mask)
    largest = jnp.finfo(plan.dtype).max

    def group(g, results):
        keys, values = (_keys(plan, plan.keys(g).cut(x, "SNH")) for x in (key, value))
        keys_turned = plan.turned(keys) if plan.narrow else None  # [heads, H, S]

        def block(i, results):
            rules = _Rules(plan, plan.queries(g, i), bias, mask, drop)
            queries = _rows(plan, rules.at.cut(query, "TNH")).astype(plan.operand)
            queries *= plan.scales[0]
            if plan.unrolled:
                queries, results = _settled((queries, results))  # One block at a time.
            rows = _Rows(plan, rules, queries, keys, keys_turned, values, softcap)
            mixed, peak, total = rows.attend()
            empty = total == 0
            total = jnp.where(empty, 1, total)
            peak = jnp.where(empty, largest, peak)
            out, *rest = results
            out = rules.at.put(out, _unrows(plan, mixed), "TNV")
            rest = (
                rules.at.put(x, _unrows(plan, row), "TN")
                for x, row in zip(rest, (peak, total), strict=True)
            )
            return out, *rest

        return plan.over_queries(block, results)

    shape = (*query.shape[:-1], value.shape[-1])
    results = (_full(query, 0, x, plan.dtype) for x in (shape, shape[:-1], shape[:-1]))
    return _loop(0, plan.groups, group, tuple(results))


def _backward(request, saved, cotangents):
    *arguments, out, peak, total = saved
    d_out, _, d_residual = cotangents
    axes = _axes(*arguments)
    by_query, by_row = axes[0], axes[0][:-1]
    learnt = tuple(arguments[:5])  # All but mask and dropout.
    of_learnt = zip(jax.tree.leaves(learnt), axes, strict=False)
    gradients = on_each_device(
        functools.partial(_backward_tiles, request),
        (*arguments, out, peak, total, d_out, d_residual),
        [*axes, by_query, by_row, by_row, by_query, by_row],
        [names for x, names in of_learnt if _is_float(x)],
    )
    gradients = iter(gradients)

    def cotangent(x):
        return next(gradients) if _is_float(x) else np.zeros(x.shape, jax.dtypes.float0)

    return *jax.tree.map(cotangent, learnt), None, None


@_as_precise
def _backward_tiles(
    request, query, key, value, softcap, bias, mask, drop, out, peak, total, d_out, d_residual
):
    plan = request.plan(query, key, value, mask)
    plan = plan._replace(**plan.back._asdict())
    # d_logits sum to d_residual over a row. Rounded to be multiplied they do not, and what all keys
    # share would enter the gradient of the query: it is taken out again by the mean key of the row.
    evens_out = plan.narrow and softcap is None
    largest = jnp.finfo(plan.dtype).max

    def group(g, carry):
        keys, values = (_keys(plan, plan.keys(g).cut(x, "SNH")) for x in (key, value))
        keys = _finite(keys)
        keys_turned = _settled(_turned(keys))

        def zero_sums():
            return tuple(_full(x, 0, x.shape, plan.dtype) for x in (keys, values))

        def block(i, carry):
            rules = _Rules(plan, plan.queries(g, i), bias, mask, drop, turned=True)
            d_query, *sums, totals = carry
            queries = _uneven(_rows(plan, rules.at.cut(query, "TNH")).astype(plan.operand))
            queries = plan.scales[0] * _finite(queries)
            d_outs, outs = (_rows(plan, rules.at.cut(x, "TNV")) for x in (d_out, out))
            d_outs = _uneven(d_outs.astype(plan.operand))
            peaks, normalisers, d_residuals = (
                _rows(plan, rules.at.cut(x, "TN")) for x in (peak, total, d_residual)
            )
            inverses = 1 / normalisers  # Of weights, for d_outs would be rounded once more.
            d_residuals = jnp.where(peaks == largest, 0, d_residuals)
            deltas = (outs * d_outs).sum(-1) - d_residuals
            # Without NaN, which `deltas` have: the product may spread it to other queries.
            queries_turned, d_outs_turned = plan.turned(queries), plan.turned(_finite(d_outs))
            if plan.overlapping:
                # A row that the block before has counted has no weights here.
                old = rules.at.t_start + jnp.arange(plan.t) < i * plan.t
                peaks = jnp.where(jnp.tile(old, plan.G), largest, peaks)

            def start():
                shape = _turned(queries).shape  # [heads, H, G t]
                shapes = [shape, shape, (*shape[:-2], shape[-1])] if evens_out else [shape]
                of_queries = [_full(queries, 0, shape, plan.dtype) for shape in shapes]
                return of_queries, *(zero_sums() if sums[0] is None else sums), totals

            def tile(here, carry):
                of_queries, d_keys, d_values, (d_softcap, d_bias) = carry
                raw = here.products(here.keys(keys), queries_turned)
                logits, pull_back = jax.vjp(here.logits, raw, softcap, here.bias)
                weights = jnp.exp(logits - peaks[..., None, :]) * inverses[..., None, :]
                if here.visible is not None:  # The peak may be NaN.
                    weights = jnp.where(here.visible, weights, 0)
                d_value = _product(here.kept(weights).astype(plan.operand), d_outs)
                d_weights = here.products(here.keys(values), d_outs_turned)
                d_logits = weights * (here.kept(d_weights) - deltas[..., None, :])
                d_raw, d_cap, d_tile = pull_back(d_logits)
                d_raw = d_raw.astype(plan.operand)
                columns = here.keys(keys_turned, axis=-1)
                found = [_settled(_unspread(columns, d_raw))]
                if evens_out:
                    found.append(_settled(_unspread(columns, weights.astype(plan.operand))))
                    found.append(d_raw.astype(plan.dtype).sum(-2))
                if of_queries is not None:
                    found = jax.tree.map(jnp.add, of_queries, found)
                d_keys = here.add_keys(d_keys, _product(d_raw, queries))
                d_values = here.add_keys(d_values, d_value)
                if softcap is not None:
                    d_softcap += d_cap
                if bias is not None:
                    d_bias = d_bias.add(d_tile, here.at)
                return found, d_keys, d_values, (d_softcap, d_bias)

            (d_queries, *rest), *others = rules.over_keys(tile, start, (None, *carry[1:]))
            if evens_out:
                mean_keys, sums_found = rest
                missing = plan.scales[1] * d_residuals - sums_found
                d_queries += missing[..., None, :] * mean_keys
            d_queries = _unrows(plan, plan.scales[0] * _turned(d_queries))
            put = rules.at.add if plan.overlapping else rules.at.put
            return put(d_query, d_queries.astype(d_query.dtype), "TNH"), *others

        d_query, d_key, d_value, totals = carry
        # None: where one tile holds all, its products are the sums.
        sums = zero_sums() if plan.query_blocks > 1 else (None, None)
        d_query, *sums, totals = _loop(
            0, plan.query_blocks, block, (d_query, *sums, totals), plan.unrolled
        )
        d_key, d_value = (
            plan.keys(g).put(x, _unkeys(plan, part.astype(x.dtype)), "SNH")
            for x, part in zip((d_key, d_value), sums, strict=True)
        )
        return d_query, d_key, d_value, totals

    def zeros(x):
        return _full(query, 0, x.shape, plan.dtype) if _is_float(x) else x

    totals = jax.tree.map(zeros, (softcap, bias))
    carry = (*(_full(x, 0, x.shape) for x in (query, key, value)), totals)
    *gradients, totals = _loop(0, plan.groups, group, carry)
    learnt = filter(_is_float, jax.tree.leaves((softcap, bias)))
    sums = filter(_is_float, jax.tree.leaves(totals))
    return *gradients, *(x.astype(like.dtype) for x, like in zip(sums, learnt, strict=True))


_attend.__wrapped__.defvjp(_forward, _backward)


class _Rows(NamedTuple):
    """A block of queries in the forward pass, and what it is computed from."""

    plan: Plan
    rules: "_Rules"
    queries: Array
    keys: Array
    keys_turned: Array | None
    values: Array
    softcap: Array | None

    def attend(self):
        """Values mixed by normalised weights, peak and normaliser of each row.

        The largest logit of a row is not looked for at first: where the sum of exp(logit) and what
        it mixes stay well inside of what floats hold, tiles are simply added, and no pass over the
        logits is spent on it; the logarithm of the sum does for the peak. The other rows are done
        again.
        """
        if self.plan.halved:
            mixed, total, *rounded = self._attend_halved()
        else:
            mixed, total, *rounded = self.rules.over_keys(self._add, self._zeros, None)
        held = (_LEAST_TOTAL < total) & (total < _MOST_TOTAL) & jnp.isfinite(mixed).all(-1)
        total, *rounded = (jnp.where(held, x, 1) for x in (total, *rounded))
        # The normaliser is then 1, whose square, in derivatives of derivatives, is no trouble.
        peak = lax.stop_gradient(jnp.log(total))
        shrink = jnp.exp(-peak)
        total *= shrink
        if rounded:  # What was multiplied sums to this.
            shrink *= lax.stop_gradient(total / (rounded[0] * shrink))

        def again(*found):
            choices = held[..., None], held, held
            return tuple(map(jnp.where, choices, found, self.attend_online()))

        found = mixed * (shrink / total)[..., None], peak, total
        return lax.cond(_any_of_batch(~held), again, lambda *found: found, *found)

    def _attend_halved(self):
        """Squares of keys before these queries, then a triangle, of which only the tips are masked.

        The square below the diagonal halves of a triangle, then the same of each of these halves.
        """
        plan, at = self.plan, self.rules.at

        def add(start, stop, s_start, s_size, masked, carry):
            rules = self.rules._replace(
                at=at._replace(t_start=at.t_start + start, t_size=stop - start)
            )
            part = self._replace(rules=rules, queries=plan.part(self.queries, start, stop))
            return part._add(rules.here(s_start, s_size, masked), carry)

        def triangle(start, stop, carry):
            """These rows by the keys among themselves."""
            first = at.t_start + start
            if stop - start <= _LEAST_TRIANGLE:
                return add(start, stop, first, stop - start, True, carry)
            half = -(-(stop - start) // (2 * _GRAIN)) * _GRAIN
            middle = start + half
            upper, lower = (
                carry and [plan.part(x, *rows) for x in carry]
                for rows in ((0, half), (half, stop - start))
            )
            lower = add(middle, stop, first, half, False, lower)
            halves = triangle(start, middle, upper), triangle(middle, stop, lower)
            return [plan.joined(parts) for parts in zip(*halves, strict=True)]

        def before(j, carry):
            return self._add(self.rules.here(j * plan.s, plan.s, False), carry)

        first = isinstance(at.t_start, int) and at.t_start == 0
        carry = None if first else _loop(0, at.t_start // plan.s, before, self._zeros())
        return triangle(0, at.t_size, carry)

    def _zeros(self):
        rows = self.queries.shape[:-1]
        shapes = (*rows, self.values.shape[-1]), rows, *([rows] * self.plan.narrow)
        return [_full(self.queries, 0, shape, self.plan.dtype) for shape in shapes]

    def _add(self, here, carry):
        """Mixed values and normalisers with one more tile, all peaks being 0.

        Where weights are rounded to be multiplied, also the sum of the rounded ones, to divide by:
        the largest weight of a row is 1 beside its own peak, which rounding spares; here it is not.
        """
        weights = _exp(self._logits(here))
        totals = [weights.sum(-1)]
        if self.plan.narrow:
            weights = _settled(weights.astype(self.plan.operand))
            totals.append(weights.astype(self.plan.dtype).sum(-1))
        found = [self._mix(here, weights), *totals]
        return found if carry is None else jax.tree.map(jnp.add, carry, found)

    def attend_online(self):
        """The same with the largest logit of each row for its peak (the online softmax)."""
        lowest = jnp.finfo(self.plan.dtype).min

        def start():
            mixed, total, *_ = self._zeros()
            return mixed, total + lowest, total

        def tile(here, carry):
            logits = self._logits(here)
            # `initial`: a row in which all is masked has weights exp(-inf - lowest) = 0.
            peak = logits.max(-1, initial=lowest)
            if carry is not None:
                peak = jnp.maximum(peak, carry[1])
            peak = lax.stop_gradient(peak)
            weights = jnp.exp(logits - peak[..., None])
            total = weights.sum(-1)
            if carry is not None:
                before = carry[2] * jnp.exp(carry[1] - peak)
                total += before
            # Of normalised weights: else the sum of large values would overflow.
            inverse = 1 / jnp.where(total == 0, 1, total)
            mixed = self._mix(here, weights * inverse[..., None])
            if carry is not None:
                mixed += carry[0] * (before * inverse)[..., None]
            return mixed, peak, total

        return self.rules.over_keys(tile, start, None)

    def _logits(self, here):
        if self.plan.narrow:
            columns = here.keys(self.keys_turned, axis=-1)
        else:  # Rows are cut: for columns, XLA would store the transpose.
            columns = _turned(here.keys(self.keys))
        raw = here.products(self.queries, columns)
        return here.logits(raw, self.softcap, here.bias)

    def _mix(self, here, weights):
        return _product(here.kept(weights).astype(self.plan.operand), here.keys(self.values))


class _Rules(NamedTuple):
    """Masks, biases and dropout for the tiles of one block of queries; `turned` ones, backward."""

    plan: Plan
    at: Tile
    bias: object
    mask: object
    drop: tuple[Array, Array] | None
    turned: bool = False

    def over_keys(self, tile, start, alone):
        """`tile(here, carry)` over all keys that somebody sees.

        The carry is `start()` at first, and `alone` where there is just one tile.
        """
        S, s = self.plan.S, self.plan.s
        if not isinstance(S, int):
            return tile(self.here(0, S, masked=True), alone)
        keys = Keys((0, S), (0, S))
        if self.mask is not None:
            keys = self.mask.cut(self.at).keys(self.at) or Keys((0, S), (0, 0))
        if self.bias is not None and self.bias.hidden(self.at) is not None:
            keys = keys._replace(open=(0, 0))
        (first, stop), most = keys.seen, S if keys.most is None else keys.most
        if isinstance(first, int) and isinstance(stop, int):
            first = min(first, S) // _GRAIN * _GRAIN
            size = min(S, -(-stop // _GRAIN) * _GRAIN) - first
            if size <= 0:
                return start()
        else:
            size = min(S, -(-(most + _GRAIN - 1) // _GRAIN) * _GRAIN)
            first = _least(first // _GRAIN * _GRAIN, S - size)
        if size <= s:
            hidden = _is_positive(keys.open[0] - first) or _is_positive(first + size - keys.open[1])
            return tile(self.here(first, size, hidden), alone)
        return self._over_blocks(tile, start(), keys)

    def _over_blocks(self, tile, carry, keys):
        S, s = self.plan.S, self.plan.s
        first, stop = _most(keys.seen[0] // s, 0), _least(-(-keys.seen[1] // s), -(-S // s))
        stop = _most(first, stop)
        open_first = _least(_most(-(-keys.open[0] // s), first), stop)
        open_stop = _least(_most(keys.open[1] // s, open_first), stop)
        before, after = open_first - first, stop - open_stop

        def block(j, carry, masked):
            return tile(self.here(_least(j * s, S - s), s, masked, new=j * s), carry)

        def masked_block(i, carry):
            return block(i + jnp.where(i < before, first, open_stop - before), carry, masked=True)

        carry = _loop(open_first, open_stop, functools.partial(block, masked=False), carry)
        return _loop(0, before + after, masked_block, carry)

    def here(self, start, size, masked: bool, new=None) -> "_Here":
        """The tile of these queries and `size` keys, those from `new` on being new ones."""
        plan = self.plan
        at = self.at._replace(s_start=start, s_size=size)
        bias = visible = keep = None
        if self.bias is not None:
            bias = self.bias.cut(at)
            bias = jax.tree.map(lambda x: x.astype(plan.dtype) if _is_float(x) else x, bias)
        if masked:
            parts = [] if self.mask is None else [self.mask.cut(at).tile(at)]
            if new is not None and plan.S % plan.s:
                parts.append((at.s >= new)[None, :])  # The block before has the others.
            hidden = None if bias is None else bias.hidden(at)
            if hidden is not None:
                parts.append(~hidden)
            visible = functools.reduce(jnp.logical_and, parts) if parts else None
            visible = None if visible is None else self.spread(visible, at)
        if self.drop is not None:
            words, rate = self.drop
            keep = self.spread(keep_tile(at.cut(words, "NT2"), rate, at), at)
        return _Here(at, plan.scales[1], self.spread, bias, visible, keep)

    def spread(self, x, at):
        """`[..., N, t, s]` as it stands against a tile, `[heads, G t, s]` or `[heads, s, G t]`."""
        plan = self.plan
        *batch, K = plan.box
        x = jnp.broadcast_to(x, (*batch, K * plan.G, at.t_size, at.s_size))
        x = x.reshape(plan.heads, plan.G, at.t_size, at.s_size)
        if self.turned:
            return x.transpose(0, 3, 1, 2).reshape(*plan.stack, at.s_size, plan.G * at.t_size)
        return x.reshape(*plan.stack, plan.G * at.t_size, at.s_size)


class _Here(NamedTuple):
    """What masks, biases and dropout say about one tile, as it stands against its logits."""

    at: Tile
    scale: float
    spread: object
    bias: object
    visible: Array | None
    keep: Array | None

    def logits(self, raw, softcap, bias):
        """Scale, softcap, bias and mask; the scale is divided by `softcap`."""
        raw = self.scale * raw
        if softcap is not None:
            # Before tanh: its slope at a masked NaN is NaN.
            raw = raw if self.visible is None else jnp.where(self.visible, raw, 0)
            raw = softcap * jnp.tanh(raw)
        if bias is not None:
            raw += self.spread(bias.tile(self.at), self.at)
        return raw if self.visible is None else jnp.where(self.visible, raw, -jnp.inf)

    def products(self, a, b):
        """`_product` of which what is not visible may be NaN: it changes nothing else."""
        return _product(a, b) if self.visible is None else _unspread(a, b)

    def kept(self, weights):
        return weights if self.keep is None else jnp.where(self.keep, weights, 0)

    def keys(self, x, axis=-2):
        """This tile's part of an axis of keys."""
        at = self.at
        if at.s_size == at.S:
            return x
        return lax.dynamic_slice_in_dim(x, at.s_start, at.s_size, axis)

    def add_keys(self, x, part):
        if x is None and self.at.s_size == self.at.S:
            return part
        if x is None:
            x = _full(part, 0, (*part.shape[:-2], self.at.S, part.shape[-1]))
        return lax.dynamic_update_slice_in_dim(x, self.keys(x) + part, self.at.s_start, -2)


def _rows(plan, x):
    """`[..., t, N, ...]` of a group -> `[heads, G t, ...]`."""
    rest = x.shape[len(plan.box) + 1 :]
    t = x.shape[len(plan.box) - 1]
    x = x.reshape(-1, t, plan.box[-1], plan.G, *rest)
    return jnp.moveaxis(x, 1, 3).reshape(*plan.stack, plan.G * t, *rest)


def _unrows(plan, x):
    """The inverse of `_rows`."""
    *batch, K = plan.box
    rows, *rest = x.shape[len(plan.stack) :]
    x = x.reshape(-1, K, plan.G, rows // plan.G, *rest)
    x = jnp.moveaxis(x, 3, 1)
    return x.reshape(*batch, x.shape[1], K * plan.G, *rest)


def _keys(plan, x):
    """`[..., S, K, H]` of a group -> `[heads, S, H]`."""
    x = x.astype(plan.operand).reshape(-1, *x.shape[-3:])
    return _uneven(jnp.swapaxes(x, 1, 2).reshape(*plan.stack, plan.S, x.shape[-1]))


def _unkeys(plan, x):
    """The inverse of `_keys`."""
    *batch, K = plan.box
    x = jnp.swapaxes(x.reshape(-1, K, *x.shape[-2:]), 1, 2)
    return x.reshape(*batch, *x.shape[1:])


def _is_dealt_out(a, b):
    """Whether `_product` has many small products before it and a compiler that needs help."""
    if not all(isinstance(n, int) for n in (*a.shape, b.shape[-1])):
        return False  # Left open by an export.
    small = a.shape[-2] * max(a.shape[-1], b.shape[-1]) <= 2**16
    return _ONE_CORE and a.ndim > 2 and small and a.dtype == jnp.float32


def _plain(a, b):
    """a b of each head, summed in float32 at least; linear in each for differentiation."""
    return jnp.matmul(a, b, preferred_element_type=jnp.promote_types(a.dtype, jnp.float32))


@jax.custom_jvp
def _product(a, b):
    """a b of each head, on every core of a CPU; there Inf may be NaN, and NaN spread over its row.

    XLA cuts a large product into parts for its cores, but before jax 0.11 works off a batch of
    small ones on one, unless something is reduced in the same loop: then it deals out the batch.
    """
    product = _plain(a, b)
    if not _is_dealt_out(a, b):
        return product
    return lax.platform_dependent(product, cpu=_plus_nothing, default=lambda x: x)


@jax.custom_jvp
def _unspread(a, b):
    """a b of each head, where a NaN is nobody else's."""
    if not _is_dealt_out(a, b):
        return _product(a, b)

    def unless_spread(a, b):
        product = _product(a, b)
        spread = _any_of_batch(jnp.isnan(product[..., 0]))
        return lax.cond(spread, lambda _: _plain(a, b), lambda x: x, product)

    return lax.platform_dependent(a, b, cpu=unless_spread, default=_plain)


def _tangents(product):
    """The rule of derivatives of both."""

    def rule(primals, tangents):
        d_a, d_b = map(_uneven, tangents)
        # What is no number is not visible, or shows in the product: here it would meet a zero.
        a, b = (jnp.where(jnp.isfinite(x), x, 0) for x in primals)
        return product(*primals), _plain(d_a, b) + _plain(a, d_b)

    product.defjvp(rule)


_tangents(_product)
_tangents(_unspread)


@jax.custom_batching.custom_vmap
def _any_of_batch(x):
    """Whether any is true, in the batch of a `vmap` as well: so a `cond` on it stays one."""
    return x.any()


@_any_of_batch.def_vmap
def _(size, batched, x):
    return _any_of_batch(x), False


@jax.custom_jvp
def _exp(x):
    """exp(min(x, 88)), within a few units in the last place, and 0 below -88 in float32.

    On a CPU not XLA's own, which XLA thinks too dear to repeat, and so does not fuse with a sum.
    Finite: where a row is done again, its derivative meets a zero.
    """
    x = jnp.where(x > 88, jnp.asarray(88, x.dtype), x)  # A NaN stays one.
    if x.dtype != jnp.float32:
        return jnp.exp(x)
    return lax.platform_dependent(x, cpu=_exp_of_float32, default=jnp.exp)


@_exp.defjvp
def _(primals, tangents):
    y = _exp(*primals)
    return y, y * tangents[0]


def _exp_of_float32(x):
    """2^n p(r), where x = n log(2) + r, and p is near exp for |r| <= log(2) / 2."""
    x = jnp.where(x < -88, np.float32(-88), x)
    n = lax.round(x * np.float32(1 / math.log(2)), lax.RoundingMethod.TO_NEAREST_EVEN)
    # log(2) in two parts, so that the large product is exact (Cody and Waite).
    r = (x - n * np.float32(355 / 512)) - n * np.float32(math.log(2) - 355 / 512)
    p = functools.reduce(lambda y, c: y * r + np.float32(c), _EXP)
    # The last bits of this sum are those of n + 127, the exponent of 2^n; for n = -127 it is 0.
    bits = lax.bitcast_convert_type(n + np.float32(1.5 * 2**23 + 127), jnp.int32)
    return p * lax.bitcast_convert_type(bits << 23, jnp.float32)


def _plus_nothing(x):
    """`x`: the form that is fused with a product, keeps NaN (`minimum` alone does not there)."""
    return x + 0 * jnp.minimum(x, x.max(-1, keepdims=True))


def _uneven(x):
    """`x`, without what a compiler knows of it: that its entries are alike, as those of ones are.

    XLA keeps such a right operand of a product as one number, and where it fuses the product with a
    reduction on a CPU, reads past its end: `(q @ jnp.ones((64, 128))).max(-1)` is wrong under jit
    with jax 0.10 and 0.12. It cannot drop 0 * i from a sum, since i might be infinite.
    """
    rows, columns = (lax.broadcasted_iota(x.dtype, x.shape, x.ndim - axis) for axis in (2, 1))
    return x + 0 * (rows + columns)


def _turned(x):
    return jnp.swapaxes(x, -1, -2)


def _finite(x):
    """`x` with numbers for what is none, in a product of the backward pass.

    It has shown in the output, or has no weight: there it would meet a zero, and 0 * NaN is NaN.
    Infinity stays large, so that a logit of minus infinity is one again.
    """
    return jnp.nan_to_num(x)


def _number(x, dtype):
    """A float where that is known and one; else an array of `dtype`."""
    traced = isinstance(x, jax.core.Tracer) or np.ndim(x) > 0
    return jnp.asarray(x, dtype) if traced else float(x)


def _settled(x):
    """`x`, computed as it is written.

    XLA would fold a transpose into a product, and make it the slow one that the code avoids.
    """
    return lax.optimization_barrier(x)


def _loop(start, stop, body, carry, unrolled=False):
    """A `fori_loop`, or none where it is known to be short."""
    if isinstance(start, int) and isinstance(stop, int) and (unrolled or stop - start <= 1):
        for i in range(start, stop):
            carry = body(i, carry)
        return carry
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
