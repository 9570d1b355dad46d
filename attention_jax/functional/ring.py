"""The ring of `parallel.ring_attention`: what each device computes, and what it sends on.

Keys and values travel; queries stay. At shift r a device holds the keys of the device r places
before it. Forward, the partial result of each shift is added by its logsumexp. Backward, keys and
values travel again and their gradients travel with them, so that no device ever holds the keys of
more than two.
"""

import functools
import itertools
from collections.abc import Callable, Hashable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from attention_jax.checks import as_rng, jax_defaults
from attention_jax.functional import dropout, parts
from attention_jax.functional.dot_product import compute
from attention_jax.functional.masks import Mask
from attention_jax.functional.mesh import full_like, vary_alike
from attention_jax.functional.options import Options
from attention_jax.functional.plan import loop
from attention_jax.functional.tiles import Tile
from attention_jax.types import Array, PyTree

# How many parts of the sequence each device holds.
ORDERS = {"contiguous": 1, "zigzag": 2}
_LEARNT, _FIXED = "learnt", "fixed"  # Arrays with gradients, and others.


class Ring(NamedTuple):
    """The static settings of a call.

    Attributes:
        axis_name, size: The axis of the mesh, and its number of devices.
        parts: How many parts of the sequence a device holds: 2 in zig-zag order.
        T, S: The length of the whole sequence.
        implementation, block_size: What computes a part.
        precision: The default precision when the attention was called.
        shifts: At which distances in the ring any device sees keys; the first is 0.
        tree, leaves: `Options`, with words in the places of its arrays.
    """

    axis_name: Hashable
    size: int
    parts: int
    T: int
    S: int
    implementation: str
    block_size: tuple[int, int] | None
    precision: str | None
    shifts: tuple[int, ...]
    tree: Any = None
    leaves: tuple[float | str, ...] = ()

    @property
    def lengths(self) -> tuple[int, int]:
        """The queries and the keys of a part."""
        return self.T // (self.size * self.parts), self.S // (self.size * self.parts)

    def start(self, device: int | Array, which: int | Array) -> int | Array:
        """The number of a device's part: device i holds parts i and 2 n - 1 - i."""
        return device + which * (2 * self.size - 1 - 2 * device)

    def pairs(self) -> range:
        """Numbers for every part of queries with every part of keys."""
        return range(self.parts**2)

    def tile(self, pair: int | Array, device: int | Array, source: int | Array) -> Tile:
        """Where a pair stands in the whole: queries of `device`, keys of `source`."""
        (t, s), (row, column) = self.lengths, (pair // self.parts, pair % self.parts)
        starts = self.start(device, row) * t, self.start(source, column) * s
        return Tile(starts[0], t, starts[1], s, self.T, self.S)

    def rows(self, pair, x, axis):
        """The part of a device's array that belongs to a pair's queries."""
        t = self.lengths[0]
        return lax.dynamic_slice_in_dim(x, pair // self.parts * t, t, axis)

    def columns(self, pair, x, axis):
        """The same for its keys."""
        s = self.lengths[1]
        return lax.dynamic_slice_in_dim(x, pair % self.parts * s, s, axis)

    def put_rows(self, pair, x, part, axis):
        start = pair // self.parts * self.lengths[0]
        return lax.dynamic_update_slice_in_dim(x, part, start, axis)

    def add_columns(self, pair, x, part, axis):
        start, part = pair % self.parts * self.lengths[1], self.columns(pair, x, axis) + part
        return lax.dynamic_update_slice_in_dim(x, part, start, axis)


def make_ring(axis_name, size, order, T, S, implementation, block_size, mask) -> Ring:
    precision = jax.config.jax_default_matmul_precision
    ring = Ring(axis_name, size, ORDERS[order], T, S, implementation, block_size, precision, ())
    return ring._replace(shifts=_shifts(ring, mask))


def _shifts(ring: Ring, mask: Mask | None) -> tuple[int, ...]:
    """The distances at which a device sees keys, as far as rules without arrays tell."""
    rules = [] if mask is None else [x for x in mask.parts() if not jax.tree.leaves(x)]

    def is_seen(at):
        for rule in rules:
            bounds = rule.bounds(at)
            if bounds is None or not all(isinstance(x, int) for x in bounds.seen):
                continue
            start, stop = bounds.seen
            if min(stop, at.s_start + at.s_size) <= max(start, at.s_start):
                return False
        return True

    def anyone_sees(shift):
        return any(
            is_seen(ring.tile(pair, device, (device - shift) % ring.size))
            for device in range(ring.size)
            for pair in ring.pairs()
        )

    return (0, *filter(anyone_sees, range(1, ring.size)))


def lowest(x: Array) -> float:
    """The logsumexp of a row without visible keys, as long as results are added."""
    return float(jnp.finfo(x.dtype).min)


def attend(ring: Ring, query, key, value, options: Options) -> tuple[Array, Array]:
    """The device's part of the output and of its logsumexp, both in float32 at least.

    Sinks are left out. The logsumexp of a row without visible keys is `lowest`.
    """
    rng = None if options.rate is None else jax.random.key_data(as_rng("rng", options.rng))
    leaves, tree = jax.tree.flatten(options._replace(sinks=None, rng=rng, wide=True))
    arrays, kept = {_LEARNT: [], _FIXED: []}, []
    for x in leaves:
        if isinstance(x, bool | int | float):
            kept.append(x)
            continue
        x = jnp.asarray(x)
        kept.append(_LEARNT if jnp.issubdtype(x.dtype, jnp.floating) else _FIXED)
        arrays[kept[-1]].append(x)
    index = lax.axis_index(ring.axis_name)  # Its results vary over this axis at least.
    _, *arguments = vary_alike((index, query, key, value, arrays[_LEARNT], arrays[_FIXED]))
    return _attend(ring._replace(tree=tree, leaves=tuple(kept)), *arguments)


def _as_called(f):
    """`f` in the precision of the call, because jax traces derivatives after the call."""

    @functools.wraps(f)
    def traced(ring, *arguments):
        with jax.default_matmul_precision(ring.precision), jax_defaults():
            return f(ring, *arguments)

    return traced


@functools.partial(jax.jit, static_argnums=0)
@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
@_as_called
def _attend(ring, query, key, value, learnt, fixed):
    dtype = jnp.promote_types(jnp.result_type(query, key, value), jnp.float32)
    out = full_like(query, 0, (*query.shape[:-1], value.shape[-1]), dtype)
    total = full_like(query, jnp.finfo(dtype).min, query.shape[:-1], dtype)

    def visit(source, moving, results, sums):
        def add(pair, attend, inputs, results):
            before = [ring.rows(pair, x, axis) for x, axis in zip(results, (-3, -2), strict=True)]
            after = _merged(before, attend(*inputs))
            return tuple(
                ring.put_rows(pair, x, new, axis)
                for x, new, axis in zip(results, after, (-3, -2), strict=True)
            )

        return _over_pairs(ring, source, query, moving, (learnt, fixed), add, results), sums

    results, _ = _around(ring, visit, (key, value), (out, total), ())
    return results


def _merged(results, others):
    """Two outputs and their logsumexps, as those of all their keys."""
    (out, total), (other, other_total) = results, others
    both = jnp.logaddexp(total, other_total)
    shares = (jnp.exp(x - both)[..., None] for x in (total, other_total))
    return sum(share * x for share, x in zip(shares, (out, other), strict=True)), both


def _forward(ring, *arguments):
    results = _attend(ring, *arguments)
    return results, (*arguments, *results)


@_as_called
def _backward(ring, saved, cotangents):
    query, key, value, learnt, fixed, out, total = saved
    d_out, d_total = cotangents
    wide = functools.partial(full_like, query, 0, dtype=out.dtype)
    carry = wide(query.shape), [wide(x.shape) for x in learnt]
    sums = wide(key.shape), wide(value.shape)

    def visit(source, moving, carry, sums):
        def add(pair, attend, inputs, state):
            (d_query, d_learnt), sums = state
            (one, one_total), pull_back = jax.vjp(attend, *inputs)
            mean, all_total, d_mean, d_all = (
                ring.rows(pair, x, axis)
                for x, axis in ((out, -3), (total, -2), (d_out, -3), (d_total, -2))
            )
            share = jnp.exp(one_total - all_total)
            d_one = share[..., None] * d_mean
            d_one_total = share * (((one - mean) * d_mean).sum(-1) + d_all)
            *found, d_here = pull_back((d_one, d_one_total))
            d_rows, *d_columns = (x.astype(out.dtype) for x in found)
            d_rows += ring.rows(pair, d_query, -3)
            d_query = ring.put_rows(pair, d_query, d_rows, -3)
            d_learnt = [x + d.astype(x.dtype) for x, d in zip(d_learnt, d_here, strict=True)]
            sums = tuple(
                ring.add_columns(pair, x, d, -3) for x, d in zip(sums, d_columns, strict=True)
            )
            return (d_query, d_learnt), sums

        return _over_pairs(ring, source, query, moving, (learnt, fixed), add, (carry, sums))

    (d_query, d_learnt), (d_key, d_value) = _around(ring, visit, (key, value), carry, sums)
    found = zip((d_query, d_key, d_value, *d_learnt), (query, key, value, *learnt), strict=True)
    d_query, d_key, d_value, *d_learnt = (d.astype(x.dtype) for d, x in found)
    return d_query, d_key, d_value, d_learnt, None


_attend.__wrapped__.defvjp(_forward, _backward)


def _around(ring: Ring, visit: Callable, moving: PyTree, carry: PyTree, sums: PyTree):
    """`visit(source, moving, carry, sums) -> carry, sums`, while keys go round the devices.

    Args:
        moving: What belongs to the keys of `source`; it goes from device to device.
        carry: What stays on its device.
        sums: What goes with the keys and comes home with the last.
    """
    device = lax.axis_index(ring.axis_name)

    def sent(tree, jump):
        if jump == 0:
            return tree
        places = [(i, (i + jump) % ring.size) for i in range(ring.size)]
        return jax.tree.map(lambda x: lax.ppermute(x, ring.axis_name, places), tree)

    def stop(jump, state):
        shift, moving, carry, sums = state
        # The exchange comes first, so that it can go on during the work.
        coming = sent(moving, jump)
        carry, sums = visit((device - shift) % ring.size, moving, carry, sums)
        return shift + jump, coming, carry, sent(sums, jump)

    state = 0, moving, carry, sums
    jumps = [b - a for a, b in itertools.pairwise(ring.shifts)]
    for jump, alike in itertools.groupby(jumps):
        state = lax.fori_loop(0, len([*alike]), lambda _, x, jump=jump: stop(jump, x), state)
    _, _, carry, sums = stop(0, state)
    return carry, sent(sums, -ring.shifts[-1] % ring.size)


def _over_pairs(ring: Ring, source, query, moving, arrays, add: Callable, state):
    """`add(pair, attend, inputs, state)` for every pair that the mask's bounds do not hide.

    `attend(*inputs)` is the output and the logsumexp of the pair's queries for its keys alone.
    """
    device, (learnt, fixed) = lax.axis_index(ring.axis_name), arrays

    def one(pair, state):
        at = ring.tile(pair, device, source)
        columns = [ring.columns(pair, x, -3) for x in moving]
        mask = parts.mask_of(_options(ring, learnt, fixed).mask, at)
        bounds = None if mask is None else mask.bounds(Tile.whole(*ring.lengths))

        def attend(query, key, value, learnt):
            options = _options(ring, learnt, fixed)
            rng = options.rng
            if options.rate is not None:
                rng = dropout.Part(rng, 0, at.t_start, at.s_start)
            options = options._replace(
                bias=parts.bias_of(options.bias, at),
                mask=parts.mask_of(options.mask, at),
                rng=rng,
            )
            out, total = compute(ring.implementation, ring.block_size, query, key, value, options)
            # Of an empty batch or sequence the results are constants, which vary over no device.
            _, out, total = vary_alike((query, out, jnp.maximum(total, lowest(total))))
            return out, total

        def visible(state):
            return add(pair, attend, (ring.rows(pair, query, -3), *columns, learnt), state)

        if bounds is None:
            return visible(state)
        start, stop = bounds.seen
        return lax.cond(stop > start, visible, lambda x: x, state)

    return loop(0, len(ring.pairs()), one, state)


def _options(ring: Ring, learnt, fixed) -> Options:
    """The options of the whole sequence."""
    arrays = {_LEARNT: iter(learnt), _FIXED: iter(fixed)}
    leaves = [next(arrays[x]) if isinstance(x, str) else x for x in ring.leaves]
    return jax.tree.unflatten(ring.tree, leaves)
