"""Masks and biases of a whole sequence, on the part of the logits that one device computes.

A part is some queries by some keys. Its rules count places from the start of the sequence, so a
device that holds a part needs to know only where the part begins.
"""

from typing import Any

from attention_jax.functional.biases import Bias
from attention_jax.functional.masks import Bounds, Mask
from attention_jax.functional.plan import greatest, least
from attention_jax.functional.tiles import Tile, value_class


def mask_of(mask: Mask | None, part: Tile) -> Mask | None:
    """`mask` for the queries and keys of `part`, which count from 0 there."""
    if mask is None:
        return None
    return PartOfMask(mask.narrowed(part), part.t_start, part.s_start, part.T, part.S)


def bias_of(bias: Bias | None, part: Tile) -> Bias | None:
    """The same for a bias."""
    if bias is None:
        return None
    return PartOfBias(bias.narrowed(part), part.t_start, part.s_start, part.T, part.S)


def _in_whole(part, at: Tile) -> Tile:
    """A tile of a part, as a tile of the whole."""
    starts = {"t_start": at.t_start + part.t_start, "s_start": at.s_start + part.s_start}
    return at._replace(**starts, T=part.whole_T, S=part.whole_S)


# The arrays of the inner rule are narrowed to the part, so `narrowed` may count in the part.
@value_class(t_start="", s_start="")
class PartOfMask(Mask):
    """The rules of `mask`, for queries and keys that begin at `t_start` and `s_start`."""

    mask: Mask
    t_start: Any
    s_start: Any
    whole_T: int
    whole_S: int

    def tile(self, at):
        return self.mask.tile(_in_whole(self, at))

    def bounds(self, at):
        known = self.mask.bounds(_in_whole(self, at))
        if known is None:
            return None

        def in_part(span):
            start, stop = (x - self.s_start for x in span)
            return greatest(0, start), least(at.S, stop)

        return Bounds(in_part(known.seen), in_part(known.open), known.most, known.usual)

    def check(self, T, S):
        """The whole mask is checked before it is cut."""

    def __repr__(self):
        return f"part({self.mask!r})"


@value_class(t_start="", s_start="")
class PartOfBias(Bias):
    """The rules of `bias`, for queries and keys that begin at `t_start` and `s_start`."""

    bias: Bias
    t_start: Any
    s_start: Any
    whole_T: int
    whole_S: int

    def tile(self, at):
        return self.bias.tile(_in_whole(self, at))

    def hidden(self, at):
        return self.bias.hidden(_in_whole(self, at))

    def __repr__(self):
        return f"part({self.bias!r})"
