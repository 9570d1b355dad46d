"""What the weights of an attention look like, without the array of weights in memory."""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from attention_jax.checks import as_size, check_qkv, public
from attention_jax.functional import masks
from attention_jax.functional.biases import Bias
from attention_jax.functional.blockwise import Request, attend
from attention_jax.functional.dense import visible_logits, where
from attention_jax.functional.masks import Mask, hides_future
from attention_jax.functional.mesh import vary_alike
from attention_jax.functional.options import make_options
from attention_jax.functional.plan import default_platform
from attention_jax.functional.tiles import Tile
from attention_jax.functional.xla_cpu import row_sums
from attention_jax.types import Array

_LOGITS = 2**19  # In memory at once: 2 MB, which a core's cache holds.
_PLACES = 16  # Columns of the keys' places: XLA multiplies 64 + 16 columns faster than 65.
_PARTS = 8  # Of the queries, each with the keys that its mask can show.
_PAST, _FUTURE = masks.Band(None, 0, 0), masks.Band(-1, None, 0)  # s <= t, and s > t.


class AttentionStatistics(NamedTuple):
    """Statistics of the weights of each query, `[..., T, N]` in float32 at least.

    A query with no visible key has zeros everywhere, but a sink takes 1.

    Attributes:
        entropy: In nats, of the weights and the sink together; ln of the number of visible keys if
            they are equal.
        largest: The largest weight.
        distance: The mean of |t - s| over the weights.
        to_self: The weight of key t.
        to_previous: The weight of key t - 1.
        to_first: The weight of key 0.
        sink: What the sink takes; 0 without sinks.
        visible: The number of visible keys.
        peak: The largest visible logit.
    """

    entropy: Array
    largest: Array
    distance: Array
    to_self: Array
    to_previous: Array
    to_first: Array
    sink: Array
    visible: Array
    peak: Array


@public
def attention_statistics(
    query: Array,
    key: Array,
    bias: Array | Bias | None = None,
    mask: Array | Mask | None = None,
    *,
    scale: float | Array | None = None,
    softcap: float | None = None,
    sinks: Array | None = None,
    block_size: int | None = None,
) -> AttentionStatistics:
    """Statistics of the weights of `dot_product_attention`, in memory linear in S.

    Without bias and softcap they come from the tiles, with the keys as values: the mean logit of a
    row is the query times the mean key. Keys behind the query take a pass of their own. Otherwise
    the logits of a block of queries are computed at a time, which takes several times as long.

    Args:
        query, key, bias, mask, scale, softcap, sinks: As in `dot_product_attention`.
        block_size: How many queries are computed at once, in the second way. None: as many as fit a
            cache.

    Returns:
        All statistics but `largest`, `visible` and `peak` are differentiable; those pass no
        gradient.

    Raises:
        ValueError, TypeError: As `dot_product_attention`.
    """
    query, key, _ = check_qkv(query, key, key)
    options = make_options(query, bias, mask, scale=scale, softcap=softcap, sinks=sinks)
    jax.eval_shape(options.arrays, query, key)  # For its errors.
    if block_size is not None:
        block_size = as_size("block_size", block_size)
    dtype = jnp.promote_types(jnp.result_type(query, key), jnp.float32)
    query, key = query.astype(dtype), key.astype(dtype)
    *batch, T, N, _ = query.shape
    if 0 in (*batch, T, key.shape[-3]):
        return AttentionStatistics(*[jnp.zeros((*batch, T, N), dtype)] * 9)
    if options.bias is None and options.softcap is None and block_size is None:
        found = _of_tiles(query, key, options)
    else:
        found = _of_blocks(query, key, options, block_size)
    constant = ("largest", "visible", "peak")
    return found._replace(**{name: lax.stop_gradient(getattr(found, name)) for name in constant})


# From the tiles ----------------------------------------------------------------------------------


class Moments(NamedTuple):
    """What one pass of the tiles finds of each row, `[..., T, N]`.

    Attributes:
        logsumexp: -inf for a row without keys.
        entropy, place: Of the weights, and the mean key position over them.
        peak: The largest logit; the lowest float for a row without keys.
    """

    logsumexp: Array
    entropy: Array
    place: Array
    peak: Array


def _of_tiles(query, key, options) -> AttentionStatistics:
    T, H = query.shape[-3], query.shape[-1]
    scale = H**-0.5 if options.scale is None else options.scale
    mask = options.mask
    query = query * jnp.asarray(scale, query.dtype)
    t = jnp.arange(T, dtype=query.dtype)[:, None]
    past = _moments(query, key, mask if hides_future(mask) else _both(mask, _PAST))
    parts, distances = [past], [t - past.place]
    if not hides_future(mask):  # The distance has another sign there.
        parts.append(_moments(query, key, _both(mask, _FUTURE)))
        distances.append(parts[1].place - t)
    totals = [part.logsumexp for part in parts]
    if options.sinks is not None:
        totals.append(jnp.broadcast_to(options.sinks.astype(query.dtype), totals[0].shape))
    top = functools.reduce(jnp.logaddexp, totals)
    shares = [_share(total, top) for total in totals]
    # Their sum is 1 but for the rounding of `top`, which may be large.
    sum_of_shares = jnp.maximum(sum(shares), jnp.finfo(top.dtype).tiny)
    shares = [share / sum_of_shares for share in shares]
    over_parts = lambda values: sum(x * y for x, y in zip(shares, values, strict=False))
    seen = _count(query, key, mask)
    none = seen == 0
    finite_top = jnp.where(jnp.isneginf(top), 0, top)
    peak = functools.reduce(jnp.maximum, [part.peak for part in parts])
    return AttentionStatistics(
        entropy=over_parts([part.entropy for part in parts]) + sum(map(_surprise, shares)),
        largest=jnp.where(none, 0, jnp.exp(jnp.where(none, 0, peak - finite_top))),
        distance=over_parts(distances),
        **{
            name: _weight_at(query, key, mask, back, finite_top)
            for name, back in (("to_self", 0), ("to_previous", 1), ("to_first", None))
        },
        sink=jnp.zeros_like(top) if options.sinks is None else shares[-1],
        visible=seen,
        peak=jnp.where(none, 0, peak),
    )


def _surprise(share):
    """-share ln(share), 0 for a share of 0."""
    return -share * jnp.log(jnp.where(share == 0, 1, share))


def _both(mask, rule):
    return rule if mask is None else mask & rule


def _share(part, total):
    """exp(part - total), 0 where the part is minus infinity."""
    none = jnp.isneginf(part)
    return jnp.where(none, 0, jnp.exp(jnp.where(none, 0, part - total)))


def _moments(query, key, mask) -> Moments:
    """Of queries that are scaled."""
    S = key.shape[-3]
    place = jnp.arange(S, dtype=key.dtype)[:, None, None] / S
    place = jnp.broadcast_to(place, (*key.shape[:-1], _PLACES))
    # A NaN in a masked key would meet a weight of 0.
    values = jnp.concatenate([place, jnp.where(jnp.isfinite(key), key, 0)], axis=-1)
    precision = jax.config.jax_default_matmul_precision
    request = Request(None, 1.0, precision, default_platform(), peaks=True)
    arguments = vary_alike((query, key, values, None, None, mask, None))
    mixed, peak, log_total = attend(request, *arguments)
    empty = peak == jnp.finfo(peak.dtype).max
    logit = row_sums(query * mixed[..., _PLACES:])
    constant = lax.stop_gradient(peak)
    with jax.debug_infs(False):  # The -inf of an empty row is meant.
        logsumexp = jnp.where(empty, -jnp.inf, constant + log_total)
    return Moments(
        logsumexp,
        entropy=jnp.where(empty, 0, (constant - logit) + log_total),
        place=S * mixed[..., 0],
        peak=jnp.where(empty, jnp.finfo(peak.dtype).min, peak),
    )


def _weight_at(query, key, mask, back, total):
    """The weight of the key `back` places before each query; of the first key if None."""
    T, S, G = query.shape[-3], key.shape[-3], query.shape[-2] // key.shape[-2]
    t = jnp.arange(T)
    place = jnp.zeros_like(t) if back is None else t - back
    inside = (place >= 0) & (place < S)
    if back is None:
        keys = lax.slice_in_dim(key, 0, 1, axis=-3)
    else:  # A gather of as many keys would be slow.
        around = [(0, 0, 0)] * key.ndim
        around[-3] = back, T - S - back, 0
        keys = lax.pad(key, jnp.zeros((), key.dtype), around)
    keys = jnp.repeat(keys, G, axis=-2)  # [..., T or 1, N, H]
    visible = _visible_at(mask, t, jnp.clip(place, 0, S - 1), T, S) & inside[:, None]
    keys = jnp.where(visible[..., None], keys, 0)
    return jnp.where(visible, jnp.exp(row_sums(query * keys) - total), 0)


def _visible_at(mask, t, s, T, S):
    """Whether each query sees one key, `[..., T, N or 1]`."""
    if mask is None:
        return jnp.ones((len(t), 1), bool)

    def one(t, s):
        at = Tile(t, 1, s, 1, T, S)
        return _with_heads(mask.narrowed(at).tile(at))[..., 0, 0]

    return jnp.moveaxis(jax.vmap(one)(t, s), 0, -2)


def _with_heads(x):
    """`[..., t, s]` with an axis of heads."""
    return x if x.ndim > 2 else x[None]


def _count(query, key, mask):
    """The number of visible keys, `[..., T, N]`."""
    *batch, T, N, _ = query.shape
    S = key.shape[-3]
    ends = _ends(mask, T, S)
    if ends is not None:
        found = jnp.maximum(0, ends[1] - ends[0])[:, None]
    else:

        def row(t):
            at = Tile(t, 1, 0, S, T, S)
            return _with_heads(mask.narrowed(at).tile(at))[..., 0, :].sum(-1)  # [..., N or 1]

        found = lax.map(row, jnp.arange(T), batch_size=max(1, _LOGITS // S))
        found = jnp.moveaxis(found, 0, -2)
    return jnp.broadcast_to(found, (*batch, T, N)).astype(query.dtype)


def _ends(mask, T, S):
    """The first visible key of each query and the one after the last, if the mask is a band."""
    first, stop = jnp.zeros(T, jnp.int32), jnp.full(T, S, jnp.int32)
    if mask is None:
        return first, stop
    if isinstance(mask, masks.And):
        ends = _ends(mask.left, T, S), _ends(mask.right, T, S)
        if None in ends:
            return None
        (first, stop), (other_first, other_stop) = ends
        return jnp.maximum(first, other_first), jnp.minimum(stop, other_stop)
    if not (isinstance(mask, masks.Band) and isinstance(mask.offset, int)):
        return None
    centre = jnp.arange(T, dtype=jnp.int32) + mask.offset
    if mask.left is not None:
        first = jnp.clip(centre - mask.left, 0, S)
    if mask.right is not None:
        stop = jnp.clip(centre + mask.right + 1, 0, S)
    return first, stop


# From blocks of logits ---------------------------------------------------------------------------


def _of_blocks(query, key, options, t) -> AttentionStatistics:
    """All statistics from the logits of t queries at a time."""
    *batch, T, N, _ = query.shape
    if t is None:
        rows = max(1, _LOGITS // (key.shape[-3] * N * math.prod(batch)))
        t = 1 << (rows.bit_length() - 1)
    t = min(t, T)
    size = -(-T // (_PARTS * t)) * t
    found = [
        _of_part(query, key, options, start, min(size, T - start), t) for start in range(0, T, size)
    ]
    return jax.tree.map(lambda *parts: jnp.concatenate(parts, axis=-2), *found)


def _of_part(query, key, options, start, size, t):
    """The statistics of `size` queries from `start` on, t at a time."""
    T, S = query.shape[-3], key.shape[-3]
    seen = 0, S
    if options.mask is not None:
        at = Tile(start, size, 0, S, T, S)
        bounds = options.mask.narrowed(at).bounds(at)
        if bounds is None:  # No query sees a key.
            seen = 0, 1
        elif all(isinstance(x, int) for x in bounds.seen):
            seen = max(0, min(bounds.seen[0], S - 1)), min(S, max(bounds.seen[1], 1))
            seen = (seen[0], max(seen[1], seen[0] + 1))
    keys = lax.slice_in_dim(key, *seen, axis=-3)

    def block(t):
        @jax.checkpoint
        def rows(first):
            at = Tile(first, t, seen[0], seen[1] - seen[0], T, S)
            return _of_rows(lax.dynamic_slice_in_dim(query, first, t, axis=-3), keys, options, at)

        return rows

    whole, rest = divmod(size, t)
    found = lax.map(block(t), start + t * jnp.arange(whole))  # [blocks, ..., t, N]
    join = lambda x: jnp.moveaxis(x, 0, -3).reshape(*x.shape[1:-2], whole * t, x.shape[-1])
    found = jax.tree.map(join, found)
    if rest:
        last = block(rest)(start + whole * t)
        found = jax.tree.map(lambda *parts: jnp.concatenate(parts, axis=-2), found, last)
    return found


def _of_rows(query, key, options, at: Tile) -> AttentionStatistics:
    """The statistics of the queries and keys of a tile that holds all keys they see."""
    bias, mask = (
        None if rule is None else rule.narrowed(at).tile(at)
        for rule in (options.bias, options.mask)
    )
    here = make_options(
        query, bias, mask, scale=options.scale, softcap=options.softcap, sinks=options.sinks
    )
    logits, visible = visible_logits(query, key, here)  # [..., N, t, s]
    lowest = jnp.finfo(logits.dtype).min
    peak = jnp.max(logits, axis=-1, keepdims=True, initial=lowest, where=visible)
    top = peak
    if options.sinks is not None:
        sinks = options.sinks.astype(logits.dtype)[:, None, None]  # [N, 1, 1]
        top = jnp.maximum(top, sinks)
    top = lax.stop_gradient(top)
    shifted = where(visible, logits - top)
    raw = where(visible, jnp.exp(shifted))
    total = raw.sum(-1, keepdims=True)
    of_sink = jnp.zeros_like(total)
    if options.sinks is not None:
        of_sink = jnp.exp(sinks - top)
        total += of_sink
    none = total == 0
    total = jnp.where(none, 1, total)
    share = lambda x: x / total[..., 0]  # [..., N, t]
    of_sink = of_sink / total
    # ln total - sum of weight * (logit - top), over keys and sink.
    entropy = jnp.log(total[..., 0]) - share((raw * shifted).sum(-1))
    if options.sinks is not None:
        entropy -= (of_sink * jnp.where(of_sink == 0, 0, sinks - top))[..., 0]
    apart = at.t - at.s  # [t, s]
    counted = raw.shape[-1] if visible is None else visible.sum(-1)
    seen = jnp.broadcast_to(jnp.asarray(counted, logits.dtype), peak.shape[:-1])
    any_seen = seen > 0
    found = AttentionStatistics(
        entropy=entropy,
        largest=jnp.where(any_seen, share(raw.max(-1)), 0),
        distance=share((raw * jnp.abs(apart).astype(raw.dtype)).sum(-1)),
        to_self=share(jnp.where(apart == 0, raw, 0).sum(-1)),
        to_previous=share(jnp.where(apart == 1, raw, 0).sum(-1)),
        to_first=share(jnp.where(at.s == 0, raw, 0).sum(-1)),
        sink=of_sink[..., 0],
        visible=seen,
        peak=jnp.where(any_seen, peak[..., 0], 0),
    )
    return jax.tree.map(lambda x: jnp.swapaxes(x, -1, -2), found)  # [..., t, N]
