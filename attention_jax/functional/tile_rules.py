"""Masks, biases and dropout of one tile of the logits."""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from attention_jax.functional.biases import Bias
from attention_jax.functional.dropout import keep_tile
from attention_jax.functional.masks import Bounds, Mask
from attention_jax.functional.mesh import full_like
from attention_jax.functional.plan import GRAIN, Pass, greatest, least, loop
from attention_jax.functional.tiles import Tile
from attention_jax.functional.xla_cpu import exact_product, product
from attention_jax.types import Array


class Rules(NamedTuple):
    """The bias, mask and dropout of one block of queries.

    Attributes:
        work: The pass.
        at: The block's queries, and all keys.
        drop: The rows' random words `[..., N, T, 2]`, and the rate.
        upright: Tiles are keys by queries, as in the backward pass.
    """

    work: Pass
    at: Tile
    bias: Bias | None
    mask: Mask | None
    drop: tuple[Array, Array] | None
    upright: bool = False

    def over_keys(self, tile: Callable, start: Callable, alone):
        """`tile(here, carry)` over all keys that any query of the block sees.

        The first carry is `start()`, or `alone` if there is only one tile.
        """
        S, s = self.work.S, self.work.s
        if not isinstance(S, int):
            return tile(self.here(0, S, masked=True), alone)
        bounds = Bounds((0, S), (0, S))
        if self.mask is not None:
            bounds = self.mask.narrowed(self.at).bounds(self.at) or Bounds((0, S), (0, 0))
        if self.bias is not None and self.bias.hidden(self.at) is not None:
            bounds = bounds._replace(open=(0, 0))
        (first, stop), most = bounds.seen, S if bounds.most is None else bounds.most
        if isinstance(first, int) and isinstance(stop, int):
            first = min(first, S) // GRAIN * GRAIN
            size = min(S, -(-stop // GRAIN) * GRAIN) - first
            if size <= 0:
                return start()
        else:
            size = min(S, -(-(most + GRAIN - 1) // GRAIN) * GRAIN)
            first = least(first // GRAIN * GRAIN, S - size)
        if size <= s:
            open_first, open_stop = bounds.open
            hidden = _is_positive(open_first - first) or _is_positive(first + size - open_stop)
            return tile(self.here(first, size, hidden), alone)
        return self._over_tiles(tile, start(), bounds)

    def _over_tiles(self, tile, carry, bounds):
        """First the tiles that all queries see, which need no mask, then those on both sides."""
        S, s = self.work.S, self.work.s
        first, stop = greatest(bounds.seen[0] // s, 0), least(-(-bounds.seen[1] // s), -(-S // s))
        stop = greatest(first, stop)
        open_first = least(greatest(-(-bounds.open[0] // s), first), stop)
        open_stop = least(greatest(bounds.open[1] // s, open_first), stop)
        before, after = open_first - first, stop - open_stop

        def one(j, carry, masked):
            return tile(self.here(least(j * s, S - s), s, masked, new=j * s), carry)

        def masked_one(i, carry):
            return one(i + jnp.where(i < before, first, open_stop - before), carry, masked=True)

        carry = loop(open_first, open_stop, functools.partial(one, masked=False), carry)
        return loop(0, before + after, masked_one, carry)

    def here(self, start, size, masked: bool, new=None) -> "Here":
        """The tile of these queries and `size` keys; keys before `new` are masked."""
        work = self.work
        at = self.at._replace(s_start=start, s_size=size)
        bias = visible = keep = None
        if self.bias is not None:
            bias = self.bias.narrowed(at)
            bias = jax.tree.map(lambda x: x.astype(work.dtype) if is_float(x) else x, bias)
        if masked:
            parts = [] if self.mask is None else [self.mask.narrowed(at).tile(at)]
            if new is not None and work.S % work.s:
                parts.append((at.s >= new)[None, :])  # The tile before has these keys.
            hidden = None if bias is None else bias.hidden(at)
            if hidden is not None:
                parts.append(~hidden)
            visible = functools.reduce(jnp.logical_and, parts) if parts else None
            visible = None if visible is None else self._spread(visible, at)
        if self.drop is not None:
            words, rate = self.drop
            keep = self._spread(keep_tile(at.slice(words, "NT2"), rate, at), at)
        return Here(at, work.scales[1], self._spread, bias, visible, keep)

    def _spread(self, x, at):
        """`[..., N, t, s]` in the layout of a tile, `[heads, G t, s]` or `[heads, s, G t]`."""
        work = self.work
        *batch, K = work.box
        x = jnp.broadcast_to(x, (*batch, K * work.G, at.t_size, at.s_size))
        x = x.reshape(work.heads, work.G, at.t_size, at.s_size)
        if self.upright:
            return x.transpose(0, 3, 1, 2).reshape(*work.stack, at.s_size, work.G * at.t_size)
        return x.reshape(*work.stack, work.G * at.t_size, at.s_size)


class Here(NamedTuple):
    """The bias, mask and dropout of one tile, in the layout of its logits."""

    at: Tile
    scale: float
    spread: Callable
    bias: Bias | None
    visible: Array | None
    keep: Array | None

    def logits(self, raw: Array, softcap: Array | None, bias: Bias | None) -> Array:
        """Scale, softcap, bias and mask; the scale is divided by `softcap`."""
        raw = self.scale * raw
        if softcap is not None:
            # Before tanh: its slope at a masked NaN is NaN.
            raw = raw if self.visible is None else jnp.where(self.visible, raw, 0)
            raw = softcap * jnp.tanh(raw)
        if bias is not None:
            raw += self.spread(bias.tile(self.at), self.at)
        return raw if self.visible is None else jnp.where(self.visible, raw, -jnp.inf)

    def product(self, a: Array, b: Array) -> Array:
        """a b of each head. Without a mask a NaN shows anyway, so it may fill its row."""
        return product(a, b) if self.visible is None else exact_product(a, b)

    def kept(self, weights: Array) -> Array:
        """The weights after dropout, not yet divided by 1 - rate."""
        return weights if self.keep is None else jnp.where(self.keep, weights, 0)

    def part(self, x: Array, axis: int = -2) -> Array:
        """The entries of the tile's keys, from an axis of all keys."""
        at = self.at
        if at.s_size == at.S:
            return x
        return lax.dynamic_slice_in_dim(x, at.s_start, at.s_size, axis)

    def add(self, x: Array | None, part: Array) -> Array:
        """`x`, sums for all keys, with `part` added for the tile's keys; None is zeros."""
        if x is None and self.at.s_size == self.at.S:
            return part
        if x is None:
            x = full_like(part, 0, (*part.shape[:-2], self.at.S, part.shape[-1]))
        return lax.dynamic_update_slice_in_dim(x, self.part(x) + part, self.at.s_start, -2)


def is_float(x: Array) -> bool:
    return jnp.issubdtype(x.dtype, jnp.floating)


def _is_positive(x):
    return not isinstance(x, int) or x > 0
