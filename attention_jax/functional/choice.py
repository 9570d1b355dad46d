"""Which implementation computes an attention, why, and what it costs."""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from attention_jax.functional.cudnn import refusal
from attention_jax.functional.masks import Mask
from attention_jax.functional.options import Options
from attention_jax.functional.plan import default_platform, make_plan
from attention_jax.functional.tiles import Tile
from attention_jax.types import Array

IMPLEMENTATIONS = ("dense", "blockwise", "cudnn")

# From this number of logits on, over all heads and batch rows, tiles win on a CPU: 0.9 to 1.2 times
# as fast here, 2 to 7 times from T = 512 on. For fewer logits the dense path is better, because it
# has all kinds of derivatives.
_CROSSOVER = 2**18


class Choice(NamedTuple):
    """What `explain` returns; as text it is a sentence or two.

    Attributes:
        implementation: "dense", "blockwise" or "cudnn".
        reason: Why.
        flops: Floating-point operations of the two products in the forward pass, for the logits
            that the implementation computes; the backward pass has two and a half times as many.
        peak_bytes: Bytes of logits and weights that stand in memory at once in the forward pass;
            inputs and outputs not counted. 0 for a kernel that keeps them in registers.
        block_size: (queries, keys) in a tile, "blockwise" only.
    """

    implementation: str
    reason: str
    flops: int
    peak_bytes: int
    block_size: tuple[int, int] | None = None

    def __str__(self):
        tiles = "" if self.block_size is None else " in tiles of {} x {}".format(*self.block_size)
        gflop, mib = _short(self.flops / 1e9), _short(self.peak_bytes / 2**20)
        cost = f"{gflop} GFLOP forward, {mib} MiB of logits at a time"
        return f"{self.implementation}{tiles}: {self.reason}; {cost}"


def _short(x: float) -> str:
    """To three digits, and no exponent where it is large."""
    return f"{float(f'{x:.3g}'):,.15g}"


def choose(query: Array, key: Array, value: Array, options: Options) -> tuple[str, str]:
    """The default implementation, and why; the arguments are already checked."""
    refused = refusal(query, key, value, options)
    if refused is None:
        return "cudnn", "the fused kernel serves this"
    not_cudnn = f", and cudnn will not do: {refused}" if jax.default_backend() == "gpu" else ""
    # A size that an export leaves open counts as 1.
    sizes = [n for n in (*query.shape[:-1], key.shape[-3]) if isinstance(n, int)]
    logits = math.prod(sizes)
    if logits < _CROSSOVER:
        return "dense", f"{logits:,} logits, too few to gain from tiles{not_cudnn}"
    return "blockwise", f"{logits:,} logits, never all in memory{not_cudnn}"


def cost(implementation: str, reason: str, query, key, value, mask, block_size) -> Choice:
    """The cost of an implementation, for checked arguments."""
    if not (query.size and value.size):
        return Choice(implementation, reason, 0, 0)
    *batch, T, N, H = query.shape
    S, K, V = value.shape[-3:]
    inputs = jnp.result_type(query, key, value)
    rows, dtype = math.prod(batch) * N, jnp.promote_types(inputs, jnp.float32)
    lead, platform = (*batch, K), default_platform()
    plan = make_plan(lead, N // K, T, S, H, mask, block_size, 1.0, inputs, platform).forward
    t, alike, at_once = plan.t, plan.alike, plan.heads * plan.G
    if implementation == "dense":
        t, alike, at_once, mask = T, T, rows, None
    # How many keys each block of queries sees; S where only the running program knows.
    blocks = [(min(alike, T - i), i) for i in range(0, T, alike)]
    widths = [_seen(mask, i, size, T, S) for size, i in blocks]
    flops = 2 * rows * (H + V) * sum(size * x for (size, _), x in zip(blocks, widths, strict=True))
    if implementation == "cudnn":
        return Choice(implementation, reason, flops, 0)
    s = S if implementation == "dense" else plan.s
    peak_bytes = 2 * dtype.itemsize * at_once * t * min(s, max(widths, default=0))
    tile = None if implementation == "dense" else (plan.t, plan.s)
    return Choice(implementation, reason, flops, peak_bytes, tile)


def _seen(mask: Mask | None, t_start: int, t_size: int, T: int, S: int) -> int:
    bounds = None if mask is None else mask.bounds(Tile(t_start, t_size, 0, S, T, S))
    if bounds is None:
        return S
    if any(isinstance(x, jax.core.Tracer) for x in bounds.seen):
        return S if bounds.most is None else min(S, bounds.most)
    first, stop = (int(x) for x in bounds.seen)
    return max(0, min(S, stop) - max(0, first))
