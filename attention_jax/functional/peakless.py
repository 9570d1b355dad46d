"""The softmax of a block of queries without its peaks: faster on a CPU.

A softmax subtracts the largest logit of each row, its peak, so that exponentials do not overflow or
vanish. Most rows do not need it. This module adds tiles as if all peaks were 0. If some row
overflows or vanishes, it is computed again with its peak (`Rows.attend` in `blockwise`).

Without peaks the tiles of a block need no order, so the triangle of a causal mask is divided into
squares, see `_attend_halved`.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from attention_jax.functional.mesh import full_like
from attention_jax.functional.plan import GRAIN, LEAST_TRIANGLE, loop
from attention_jax.functional.xla_cpu import any_of_batch, as_written, exp
from attention_jax.types import Array

_LEAST_TOTAL, _MOST_TOTAL = 1e-6, 1e20  # Sums of exp(logit) that need no peak.


class Sums(NamedTuple):
    """What is known of the rows of a block after some tiles.

    Attributes:
        mixed, total: The values times exp(logit), and the sum of exp(logit).
        rounded: If weights are rounded for the product, the sum of these, to divide by; else None.
            A softmax with peaks does not need it: there the largest weight is 1, which rounding
            keeps.
        largest: The largest exp(logit), if it is asked for; else None.
    """

    mixed: Array
    total: Array
    rounded: Array | None
    largest: Array | None

    def plus(self, other: "Sums") -> "Sums":
        most = None if self.largest is None else jnp.maximum(self.largest, other.largest)
        return jax.tree.map(jnp.add, self, other)._replace(largest=most)


def attend(rows):
    """The results of `rows.attend()`: values mixed by normalised weights, peak and total.

    A row needs no peak if its sum of exp(logit) and its mixed values stay well inside the range of
    floats. Then the logarithm of the sum serves as its peak, or that of the largest weight if the
    peak is asked for.
    """
    if rows.work.halved:
        found = _attend_halved(rows)
    else:
        found = rows.rules.over_keys(
            lambda here, carry: _add(rows, here, carry), lambda: _zeros(rows), None
        )
    mixed, total = found.mixed, found.total
    held = (_LEAST_TOTAL < total) & (total < _MOST_TOTAL) & jnp.isfinite(mixed).all(-1)
    known = lambda x: jnp.where(held, x, 1)
    total = known(total)
    # The normaliser is then 1. Its square, in second derivatives, cannot overflow.
    peak = lax.stop_gradient(jnp.log(known(found.largest) if rows.work.peaks else total))
    shrink = jnp.exp(-peak)
    total *= shrink
    if rows.work.narrow:  # The rounded weights, which were multiplied, sum to this.
        shrink *= lax.stop_gradient(total / (known(found.rounded) * shrink))

    def again(*found):
        choices = held[..., None], held, held
        return tuple(map(jnp.where, choices, found, rows.attend()))

    found = mixed * (shrink / total)[..., None], peak, total
    return lax.cond(any_of_batch(~held), again, lambda *found: found, *found)


def _attend_halved(rows):
    """Squares of the keys before these queries, then a triangle of which only the tips are masked.

    A triangle is a square and two smaller triangles; these are divided in the same way.
    """
    work, at = rows.work, rows.rules.at

    def add(start, stop, s_start, s_size, masked, carry):
        rules = rows.rules._replace(at=at._replace(t_start=at.t_start + start, t_size=stop - start))
        part = rows._replace(rules=rules, queries=_part(work, rows.queries, start, stop))
        return _add(part, rules.here(s_start, s_size, masked), carry)

    def triangle(start, stop, carry):
        """These queries with their own keys."""
        first = at.t_start + start
        if stop - start <= LEAST_TRIANGLE:
            return add(start, stop, first, stop - start, True, carry)
        half = -(-(stop - start) // (2 * GRAIN)) * GRAIN
        middle = start + half
        upper, lower = (
            jax.tree.map(lambda x, span=span: _part(work, x, *span), carry)
            for span in ((0, half), (half, stop - start))
        )
        lower = add(middle, stop, first, half, False, lower)
        halves = triangle(start, middle, upper), triangle(middle, stop, lower)
        return jax.tree.map(lambda *parts: _joined(work, parts), *halves)

    def before(j, carry):
        return _add(rows, rows.rules.here(j * work.s, work.s, False), carry)

    first = isinstance(at.t_start, int) and at.t_start == 0
    carry = None if first else loop(0, at.t_start // work.s, before, _zeros(rows))
    return triangle(0, at.t_size, carry)


def _add(rows, here, carry):
    """The sums with one more tile, all peaks being 0."""
    weights = exp(rows.logits(here))
    total, rounded = weights.sum(-1), None
    largest = lax.stop_gradient(weights.max(-1)) if rows.work.peaks else None
    if rows.work.narrow:
        weights = as_written(weights.astype(rows.work.operand))
        rounded = weights.astype(rows.work.dtype).sum(-1)
    found = Sums(rows.mix(here, weights), total, rounded, largest)
    return found if carry is None else carry.plus(found)


def _zeros(rows):
    row = rows.queries.shape[:-1]
    zeros = lambda shape: full_like(rows.queries, 0, shape, rows.work.dtype)
    return Sums(
        mixed=zeros((*row, rows.values.shape[-1])),
        total=zeros(row),
        rounded=zeros(row) if rows.work.narrow else None,
        largest=zeros(row) if rows.work.peaks else None,
    )


def _part(work, x, start, stop):
    """The rows of some queries: `[heads, G t, ...]` -> `[heads, G (stop - start), ...]`."""
    axis = len(work.stack) + 1
    return _flat(work, lax.slice_in_dim(_by_query(work, x), start, stop, axis=axis))


def _joined(work, parts):
    """The inverse of `_part`, for parts that follow each other."""
    parts = [_by_query(work, x) for x in parts]
    return _flat(work, jnp.concatenate(parts, axis=len(work.stack) + 1))


def _by_query(work, x):
    """`[heads, G t, ...]` -> `[heads, G, t, ...]`."""
    axis = len(work.stack)
    return x.reshape(*x.shape[:axis], work.G, -1, *x.shape[axis + 1 :])


def _flat(work, x):
    """The inverse of `_by_query`."""
    axis = len(work.stack)
    return x.reshape(*x.shape[:axis], -1, *x.shape[axis + 2 :])
