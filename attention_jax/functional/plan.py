"""How blockwise attention divides its work: the tiles of the logits, and their order.

It goes over groups of heads, in each group over blocks of queries, for each block over tiles of
keys.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from attention_jax.functional.masks import Bounds
from attention_jax.functional.tiles import Tile
from attention_jax.functional.xla_cpu import ONE_CORE, as_written, multiplies_bfloat16
from attention_jax.types import Array

GRAIN = 64  # Tiles begin and end at multiples of this where possible, for fast products.
LEAST_TRIANGLE = 256  # Rows down to which the triangle of a causal mask is halved.
_ROOM = 2**22  # Bytes of a tile and its rows, up to which several heads share a turn on a CPU.
# Other devices take many heads at once, because they are large. Not measured yet.
_OFF_CPU, _SIDE = 2**28, 512
_MOST_UNROLLED = 16  # Blocks of queries that are written out one by one, each with its own keys.


class Tiling(NamedTuple):
    """The sizes of the tiles of one pass.

    Attributes:
        t, s: The number of queries in a tile, and the largest number of keys. If they do not divide
            T or S, the last block of a loop ends with the sequence and overlaps the block before;
            the overlap counts once.
        box: How many entries of each leading axis are taken at once, a divisor of its size. The
            last axes are whole, then one axis may be divided, and the axes before it are 1.
        unrolled: The blocks of queries are written out, not looped over, so that each has a tile of
            only its keys.
        halved: Each query sees the keys up to itself, and the triangle of a block's own keys is
            divided into ever smaller squares, see `peakless`. The last block has fewer queries if t
            does not divide T. With several blocks s divides t.
        peakless: The forward pass is that of `peakless`.
        peaks: It finds the largest logit of each row all the same.
    """

    t: int
    s: int
    box: tuple[int, ...]
    unrolled: bool
    halved: bool = False
    peakless: bool = False
    peaks: bool = False


class Sizes(NamedTuple):
    """The sizes and types of one call.

    Attributes:
        lead: The sizes of the batch axes and of the axis of key heads.
        G, T, S: Query heads per key head, queries, keys.
        scales: The factor of queries when they are read, and the factor of logits; one of the two
            is 1. Scaling queries is less work, but it is taken only where it is exact.
        dtype: The type of logits, softmax and sums.
        operand: The type of the operands of products: `dtype`, but bfloat16 for inputs of bfloat16
            where such products are fast.
    """

    lead: tuple[int, ...]
    G: int
    T: int
    S: int
    scales: tuple[float, float]
    dtype: jnp.dtype
    operand: jnp.dtype


class Pass:
    """One pass, forward or backward: the sizes of the call and of the tiles, and how to walk.

    Attributes are those of `Sizes` and of `Tiling`.
    """

    def __init__(self, sizes: Sizes, tiling: Tiling):
        self.lead, self.G, self.T, self.S, self.scales, self.dtype, self.operand = sizes
        self.t, self.s, self.box, self.unrolled, self.halved, self.peakless, self.peaks = tiling

    @property
    def heads(self) -> int:
        """Key heads that are taken at once."""
        return math.prod(self.box)

    @property
    def stack(self) -> tuple[int, ...]:
        """The leading axis of tiles: heads, or none for a single one.

        XLA fuses a single product with the operations after it, but not a batch of one product.
        """
        return (self.heads,) if self.heads > 1 else ()

    @property
    def groups(self) -> int:
        return math.prod(self.lead) // self.heads

    @property
    def blocks(self) -> int:
        """Blocks of queries."""
        return -(-self.T // self.t)

    @property
    def alike(self) -> int:
        """Queries for which the same keys are computed, at most."""
        return min(LEAST_TRIANGLE, self.t) if self.halved else self.t

    @property
    def overlapping(self) -> bool:
        """The last block of queries repeats some of the one before."""
        return not (self.unrolled or self.halved) and self.T % self.t > 0

    @property
    def narrow(self) -> bool:
        """Operands of products are narrower than their sums."""
        return self.operand != self.dtype

    def right(self, x: Array) -> Array:
        """x^T, stored: XLA multiplies narrow numbers fast only without a transpose."""
        return as_written(transposed(x)) if self.narrow else transposed(x)

    def group(self, g: int | Array) -> Tile:
        """All queries and keys of group g; its N are key heads."""
        starts, index = [], g * self.heads
        for size in reversed(self.lead):
            starts.insert(0, index % size)
            index = index // size
        lead = tuple(zip(starts, self.box, strict=True))
        return Tile(0, self.T, 0, self.S, self.T, self.S, lead=lead)

    def block(self, g: int | Array, i: int | Array) -> Tile:
        """Block i of the queries of group g, and all keys."""
        at = self.group(g)
        *batch, (start, size) = at.lead
        lead = (*batch, (start * self.G, size * self.G))
        first = least(i * self.t, self.T - self.t) if self.overlapping else i * self.t
        size = min(self.t, self.T - first) if isinstance(first, int) else self.t
        return at._replace(t_start=first, t_size=size, lead=lead)

    def over_groups(self, group: Callable, carry):
        """`group(g, carry)` for all groups of heads."""
        return loop(0, self.groups, group, carry)

    def over_blocks(self, block: Callable, carry):
        """`block(i, carry)` for all blocks of queries."""
        whole = self.T // self.t if self.halved else self.blocks
        carry = loop(0, whole, block, carry, self.unrolled)
        return carry if whole == self.blocks else block(whole, carry)

    # The layouts of the inputs inside the passes.

    def by_row(self, x: Array) -> Array:
        """The queries of a block: `[..., t, N, ...]` -> `[heads, G t, ...]`."""
        rest = x.shape[len(self.box) + 1 :]
        t = x.shape[len(self.box) - 1]
        x = x.reshape(-1, t, self.box[-1], self.G, *rest)
        return jnp.moveaxis(x, 1, 3).reshape(*self.stack, self.G * t, *rest)

    def from_rows(self, x: Array) -> Array:
        """The inverse of `by_row`."""
        *batch, K = self.box
        rows, *rest = x.shape[len(self.stack) :]
        x = x.reshape(-1, K, self.G, rows // self.G, *rest)
        x = jnp.moveaxis(x, 3, 1)
        return x.reshape(*batch, x.shape[1], K * self.G, *rest)

    def by_head(self, x: Array) -> Array:
        """The keys of a group: `[..., S, K, H]` -> `[heads, S, H]`, as they are multiplied."""
        x = x.astype(self.operand).reshape(-1, *x.shape[-3:])
        return jnp.swapaxes(x, 1, 2).reshape(*self.stack, self.S, x.shape[-1])

    def from_heads(self, x: Array) -> Array:
        """The inverse of `by_head`, in the type that `x` has."""
        *batch, K = self.box
        x = jnp.swapaxes(x.reshape(-1, K, *x.shape[-2:]), 1, 2)
        return x.reshape(*batch, *x.shape[1:])


class Plan(NamedTuple):
    """Both passes. It is static: with the shapes it decides the compiled program."""

    forward: Pass
    backward: Pass


def make_plan(lead, G, T, S, H, mask, block_size, scale, dtype, platform, peaks=False) -> Plan:
    """The plan for these sizes, this type of the inputs and this platform ("cpu", "gpu", "tpu").

    With `peaks` the forward pass finds the largest logit of each row.
    `block_size` overrides both sizes of the tiles. An export may leave sizes open. Then an open
    length is one tile, and an open axis of the batch or of heads is taken one by one.
    """
    wide = jnp.promote_types(dtype, jnp.float32)
    is_narrow = dtype == jnp.bfloat16 and (platform != "cpu" or multiplies_bfloat16())
    operand = jnp.dtype(dtype) if is_narrow else wide
    exact = operand == wide or abs(math.frexp(scale)[0]) == 0.5  # A power of two.
    scales = (scale, 1.0) if exact else (1.0, scale)
    sizes = Sizes(tuple(lead), G, T, S, scales, wide, operand)
    if not (isinstance(T, int) and isinstance(S, int)):
        forward = back = Tiling(T, S, (1,) * len(lead), unrolled=False)
    elif platform == "cpu":
        forward, back = _cpu_tilings(sizes, H, mask, block_size)
    else:
        forward = back = _tiling(sizes, H, S, _OFF_CPU, *(block_size or (_SIDE, _SIDE)))
    if platform == "cpu":
        forward = forward._replace(peakless=True, peaks=peaks)
    return Plan(Pass(sizes, forward), Pass(sizes, back))


def default_platform() -> str:
    """The platform on which programs run by default."""
    device = jax.config.jax_default_device
    if device is None:
        return jax.default_backend()
    return device if isinstance(device, str) else device.platform


def _tiling(sizes, H, most, room, t, s) -> Tiling:
    """Tiles of t queries by s keys, at most `most` of them visible, in `room` bytes at most."""
    t, s = min(t, sizes.T), min(s, sizes.S)
    rows, columns = sizes.G * t, min(s, most)
    size = rows * columns * sizes.dtype.itemsize
    size += 2 * (rows + columns) * H * sizes.operand.itemsize
    return Tiling(t, s, _box(sizes.lead, room // size), unrolled=False)


def _cpu_tilings(sizes, H, mask, block_size) -> tuple[Tiling, Tiling]:
    """The fastest tiles that were found on a CPU, for the forward and the backward pass.

    Up to 4096 keys a tile takes whole rows, from the first visible key to the last: then no tiles
    have to be added. `docs/performance.md` says how the tiles were measured.
    """
    lead, G, T, S, _, wide, operand = sizes
    some = min(256, -(-T // 2))

    def bounds(i):
        """The known bounds of the keys that queries i to i + `some` see."""
        known = None if mask is None else mask.bounds(Tile(i, some, 0, S, T, S))
        return known or Bounds((0, S), (0, S))

    (first, _, most, usual), (last, *_) = bounds(0), bounds(T - some)
    most = S if most is None else min(S, most)
    narrow = most if usual is None else min(most, usual)
    known = all(isinstance(x, int) for x in (*first, *last))
    shift = max(b - a for a, b in zip(first, last, strict=True)) if known else S
    alike = S <= GRAIN or 8 * shift <= S  # Hardly anything would be skipped.
    heads = math.prod(size for size in lead if isinstance(size, int))

    def tiling(t, s, room=_ROOM, unrolled=False):
        t, s = (max(1, t // G), s) if block_size is None else block_size
        found = _tiling(sizes, H, most, room, t, s)
        unrolled = unrolled and found.s == S and -(-T // found.t) <= _MOST_UNROLLED
        return found._replace(unrolled=unrolled)

    side = 1024 if S > 4096 else 512
    few = 2048 if operand == wide else 1024
    forward, back = tiling(side, side, 2 * _ROOM), tiling(side, side)
    if narrow < S and heads >= 4 and narrow <= 512:
        # A window takes small squares of many heads at once.
        small = 128 if heads >= 8 else 256
        forward, back = tiling(small, small, 2 * _ROOM), tiling(small, small)
    elif most < S and most <= 4096:
        forward = back = tiling(256, S, _ROOM // 2)  # As wide as the window.
    elif alike:
        if S <= 4096:
            forward = tiling(min(1024, 2**21 // S), S, 2 * _ROOM)
        back = tiling(1024, side, 2 * _ROOM if max(T, S) <= 128 else _ROOM)
    elif known and heads >= 4 and S <= 2048 and not ONE_CORE:
        # Causal, where a batch of small products uses every core.
        small = 128 if S <= 512 else 256
        forward, back = tiling(small, small, 2 * _ROOM), tiling(small, small)
    elif known and max(T, S) <= few and tiling(256, S, unrolled=True).unrolled:
        # Blocks with different numbers of keys are written out while they are few.
        block = min(256, G * GRAIN * -(-T // (2 * GRAIN)))
        forward = tiling(block, S, 2 * _ROOM if 128 < S <= 512 else _ROOM, unrolled=True)
        if max(T, S) <= 1024 and (heads < 4 or S <= 256 or (S <= 512 and H > 64)):
            back = tiling(block, S, unrolled=True)
        elif S <= 512:
            back = tiling(128, 128)
    elif block_size is None and _is_triangle(mask, T, S):
        t = min(T, max(LEAST_TRIANGLE, 2 * side // G // GRAIN * GRAIN))
        forward = tiling(G * t, min(t, 1024), 2 * _ROOM)._replace(halved=True)
    return forward, back


def _is_triangle(mask, T, S):
    """Whether each query sees the keys up to itself, by the mask's bounds for every 64 queries.

    Squares end at multiples of 64 (`GRAIN`); smaller parts are masked.
    """

    def knows(i):
        size = min(GRAIN, T - i)
        bounds = mask.bounds(Tile(i, size, 0, S, T, S))
        if bounds is None or not all(isinstance(x, int) for x in (*bounds.seen, *bounds.open)):
            return False
        return (bounds.seen, bounds.open) == ((0, i + size), (0, i + 1))

    if mask is None or T != S:
        return False
    return all(knows(i) for i in range(0, T, GRAIN))


def _box(lead, room):
    """How many of each leading axis, for no more than `room` heads at once."""
    box = ()
    for size in reversed(lead):
        fits = range(1, min(size, max(1, room)) + 1) if isinstance(size, int) else ()
        part = max((n for n in fits if size % n == 0), default=1)
        box = (part, *box)
        room = room // size if part == size else 1
    return box


def loop(start, stop, body: Callable, carry, unrolled: bool = False):
    """A `fori_loop`, or plain Python where it is known to be short."""
    if isinstance(start, int) and isinstance(stop, int) and (unrolled or stop - start <= 1):
        for i in range(start, stop):
            carry = body(i, carry)
        return carry
    return lax.fori_loop(start, stop, body, carry)


def transposed(x: Array) -> Array:
    return jnp.swapaxes(x, -1, -2)


def least(a: int | Array, b: int | Array) -> int | Array:
    """The minimum, an integer where both are."""
    return min(a, b) if isinstance(a, int) and isinstance(b, int) else jnp.minimum(a, b)


def greatest(a: int | Array, b: int | Array) -> int | Array:
    """The maximum, an integer where both are."""
    return max(a, b) if isinstance(a, int) and isinstance(b, int) else jnp.maximum(a, b)
