"""Masks as rules: which queries may attend to which keys, evaluated tile by tile.

A mask is a small value that can say, for any rectangle of the logits, which queries may attend to
which keys. Masks combine with `&`, `|` and `~`, with one another and with boolean arrays:

    >>> print(causal() & segments(jnp.array([0, 0, 1, 1])))
    causal() & segments(query_ids[4])
    ■···
    ■■··
    ··■·
    ··■■

Every mask is a pytree: its arrays may be traced, and changing them needs no new compilation.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from attention_jax.checks import (
    as_array,
    as_integers,
    as_size,
    check_alike,
    is_array,
)
from attention_jax.functional import own_rules
from attention_jax.functional.positions import Standing, in_documents
from attention_jax.functional.tiles import (
    FARTHEST,
    Rule,
    Tile,
    as_offset,
    as_tokens,
    offset_of,
    per_row,
    shown,
    value_class,
    with_head_axis,
    words,
)
from attention_jax.types import Array

_ENDLESS = 2**31 - 1  # A length that no sequence has.
# Of packed documents, a guess: many are shorter. Tiles made for it cost a row that is one document
# up to 1.2 times as much, and spare packed ones a third.
_USUAL_DOCUMENT = 512
_PICTURE_LIMIT = 32  # A larger picture does not fit a terminal.
_PICTURE_SIZE = 8  # The size at which rules that fit any size are drawn.


class Bounds(NamedTuple):
    """The bounds of the keys that a tile's queries see, without looking at each key.

    Attributes:
        seen: (start, stop): no key outside is seen by any of the queries.
        open: (start, stop): every key inside is seen by all of them.
        most: The greatest length of `seen`, known before the program runs; None is S.
        usual: The expected length of `seen`, where no `most` is known.
    """

    seen: tuple[int | Array, int | Array]
    open: tuple[int | Array, int | Array]
    most: int | None = None
    usual: int | None = None


class Mask(Rule):
    """The type that `causal`, `window`, `segments`, ... return. Subclasses evaluate one tile."""

    # numpy must leave `array & mask` to us instead of trying it element by element.
    __array_ufunc__ = None

    def tile(self, at: Tile) -> Array:
        """Boolean, broadcastable to `[..., N, t_size, s_size]`; True where t may attend to s."""
        raise NotImplementedError

    def bounds(self, at: Tile) -> Bounds | None:
        """Bounds of the keys that the tile's queries see; None if only `tile` can tell."""
        return None

    def size(self) -> tuple[int | None, int | None]:
        """The T and S that the mask was made for; None where it fits any."""
        return None, None

    def parts(self) -> tuple["Mask", ...]:
        """The masks that `&` combined into this one, or only itself."""
        return (self,)

    def standing(self, length: int) -> Standing | None:
        """The positions of `length` tokens that attend to one another, if the mask tells them.

        Two kinds of masks tell positions, also as parts of an `&`:

        - `segments`: the tokens of one key id are a document, wherever they are in the row.
        - Masks that hide the same keys from all queries and heads, such as a boolean array with
          axes of 1 for N and T: the hidden keys are padding. `key_lengths` is left out, because
          padding behind a document does not move its tokens.

        For all other masks this is None: positions are the places in the row.

        Raises:
            ValueError: The mask was made for another number of keys.
        """
        at, documents, padding = Tile.whole(length, length), [], []
        for part in self.parts():
            part.check(part.size()[0] or length, length)
            if isinstance(part, Segments):
                documents.append(part.key_ids)
            elif not isinstance(part, KeyLengths):
                shape = jax.eval_shape(lambda part=part: part.tile(at)).shape
                if (1, 1, *shape)[-3:-1] == (1, 1):
                    padding.append(~part.tile(at).reshape(*shape[:-3], shape[-1]))
        return in_documents(length, documents, padding) if documents or padding else None

    def check(self, T: int, S: int) -> None:
        """Raises ValueError when the mask was made for another number of queries or keys."""
        own_T, own_S = self.size()
        if own_T not in (None, 1, T) or own_S not in (None, 1, S):
            raise ValueError(f"mask {self!r} was made for T={own_T}, S={own_S}: got {T=}, {S=}.")

    def check_shifted(self, T: int, S: int) -> None:
        """The same for T queries that stand anywhere in a sequence of S positions."""
        self.check(S, S)

    def __and__(self, other: "Mask | Array") -> "Mask":
        return And(self, as_mask(other))

    def __rand__(self, other: "Mask | Array") -> "Mask":
        return And(as_mask(other), self)

    def __or__(self, other: "Mask | Array") -> "Mask":
        return Or(self, as_mask(other))

    def __ror__(self, other: "Mask | Array") -> "Mask":
        return Or(as_mask(other), self)

    def __invert__(self) -> "Mask":
        return Not(self)

    def __bool__(self) -> bool:
        raise TypeError("a mask has no truth value: combine masks with & | ~, not and/or/not.")

    def __str__(self) -> str:
        T, S = (_PICTURE_SIZE if n is None else n for n in self.size())
        traced = any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(self))
        if traced or max(T, S) > _PICTURE_LIMIT:
            return repr(self)
        with jax.ensure_compile_time_eval():  # Also where a function is traced.
            visible = np.asarray(self.materialize(T, S))
        first = visible.reshape(-1, T, S)[0] if visible.size else visible.reshape(T, S)
        rows = ["".join("■" if seen else "·" for seen in row) for row in first]
        note = f" (the first of {visible.shape[:-2]})" if visible.ndim > 2 else ""
        return "\n".join([repr(self) + note, *rows])


@value_class(offset="")
class Band(Mask):
    """t + offset - left <= s <= t + offset + right."""

    left: int | None
    right: int | None
    offset: Any

    def tile(self, at):
        centre = at.t + offset_of(self.offset, at)
        visible = jnp.ones((at.t_size, at.s_size), bool)
        if self.right is not None:
            visible = at.s <= centre + self.right
        if self.left is not None:
            visible &= at.s >= centre - self.left
        return visible

    def bounds(self, at):
        ahead = at.offset + offset_of(self.offset, at)
        first, last = _least(ahead) + at.t_start, _most(ahead) + at.t_start + at.t_size - 1
        most = None
        if self.left is not None and self.right is not None and jnp.ndim(ahead) == 0:
            most = self.left + at.t_size + self.right
        return Bounds(
            (
                0 if self.left is None else _most(0, first - self.left),
                at.S if self.right is None else _least(at.S, last + 1 + self.right),
            ),
            (
                0 if self.left is None else _most(0, last - self.left),
                at.S if self.right is None else _least(at.S, first + 1 + self.right),
            ),
            most,
        )

    def __repr__(self):
        name = "causal(" if (self.left, self.right) == (None, 0) else f"window({self.left}, "
        options = [] if name == "causal(" else [f"right={self.right}"]
        return name + ", ".join(options + shown(self.offset)) + ")"


# L is the whole length, because a shifted query looks up its id at its position.
@value_class(query_ids="L", key_ids="S")
class Segments(Mask):
    """query_ids[t] == key_ids[s]."""

    query_ids: Array
    key_ids: Array

    def tile(self, at):
        query_ids = at.of_queries(self.query_ids)  # [..., t, 1]
        return with_head_axis(query_ids) == with_head_axis(self.key_ids[..., None, :])

    def bounds(self, at):
        """Keys whose id lies between the least and the greatest of the queries' ids.

        That needs no order of the ids, but only sorted ones leave many keys out.
        """
        if not isinstance(at.t_size, int):
            return None  # The tile is one of positions, and ids go by the tokens.
        queries = at.of_queries(self.query_ids)[..., 0]  # [..., t]
        limits = jnp.iinfo(queries.dtype)
        least = queries.min(-1, initial=limits.max, keepdims=True)
        most = queries.max(-1, initial=limits.min, keepdims=True)
        rows = lambda x: x.reshape(-1, x.shape[-1])
        some = rows((self.key_ids >= least) & (self.key_ids <= most)).any(0)
        every = rows((self.key_ids == least) & (self.key_ids == most)).all(0)
        seen, (start, stop) = _span(some, at), _span(every, at)
        stop = jnp.where(jnp.broadcast_to(every, (at.s_size,)).sum() == stop - start, stop, start)
        return Bounds(seen, (start, stop), usual=_USUAL_DOCUMENT)

    def size(self):
        return self.query_ids.shape[-1], self.key_ids.shape[-1]

    def __repr__(self):
        same = self.query_ids is self.key_ids
        return f"segments(query_ids{words(self.query_ids)}" + (
            ")" if same else f", key_ids{words(self.key_ids)})"
        )


@value_class(lengths="")
class KeyLengths(Mask):
    """s < length."""

    lengths: Array

    def bounds(self, at):
        # At most S: a length may be that of a longer sequence.
        return Bounds((0, _least(at.S, _most(self.lengths))), (0, _least(at.S, self.lengths)))

    def tile(self, at):
        return at.s < per_row(self.lengths)

    def __repr__(self):
        return f"key_lengths({words(self.lengths)})"


@value_class(lengths="")
class QueryLengths(Mask):
    """t < length."""

    lengths: Array

    def bounds(self, at):
        first = _least(at.offset) + at.t_start
        last = _most(at.offset) + at.t_start + at.t_size - 1
        some, all_ = first < _most(self.lengths), last < _least(self.lengths)
        return Bounds((0, jnp.where(some, at.S, 0)), (0, jnp.where(all_, at.S, 0)))

    def tile(self, at):
        return at.t < per_row(self.lengths)

    def __repr__(self):
        return f"query_lengths({words(self.lengths)})"


@value_class(offset="")
class Strided(Mask):
    """t + offset - s is a multiple of the stride."""

    stride: int
    offset: Any

    def tile(self, at):
        return (at.t + offset_of(self.offset, at) - at.s) % self.stride == 0

    def bounds(self, at):
        return Bounds((0, at.S), (0, at.S if self.stride == 1 else 0))

    def __repr__(self):
        return f"strided({', '.join([str(self.stride), *shown(self.offset)])})"


@value_class(offset="")
class Blocks(Mask):
    """t + offset and s are in one block, or s is one of the last `summary` keys of its own."""

    length: int
    summary: int
    offset: Any

    def tile(self, at):
        block = (at.t + offset_of(self.offset, at)) // self.length
        summary = at.s % self.length >= self.length - self.summary
        return (block == at.s // self.length) | summary

    def bounds(self, at):
        length, ahead = self.length, at.offset + offset_of(self.offset, at)
        first = (_least(ahead) + at.t_start) // length
        last = (_most(ahead) + at.t_start + at.t_size - 1) // length
        if self.summary == length:
            return Bounds((0, at.S), (0, at.S))
        own = _most(0, first * length), _least(at.S, (last + 1) * length)
        # All of the block, if the queries are in one; queries of several blocks share no keys.
        shared = _most(0, last * length), _least(at.S, (first + 1) * length)
        if self.summary:
            return Bounds((0, at.S), shared)
        # The most blocks that `t_size` queries touch: the first query is the last of its block.
        blocks = (at.t_size + length - 2) // length + 1
        return Bounds(own, shared, blocks * length if jnp.ndim(ahead) == 0 else None)

    def __repr__(self):
        summary = [f"summary={self.summary}"] if self.summary else []
        return f"blocks({', '.join([str(self.length), *summary, *shown(self.offset)])})"


@value_class(array="NTS")
class Dense(Mask):
    """A boolean array as a mask."""

    array: Array

    def tile(self, at):
        return self.array

    def size(self):
        return self.array.shape[-2:]

    def check(self, T, S):
        try:
            super().check(T, S)
        except ValueError as error:
            if self.array.ndim == 2 and self.array.shape[1] == S:
                hint = "for rows [B, S] of padding write mask[:, None, None, :]."
                raise ValueError(f"{error} If it is {hint}") from error
            raise

    def check_shifted(self, T, S):
        self.check(T, S)

    def __repr__(self):
        return f"dense({words(self.array)})"


@value_class(inputs="Nxy")  # x, y: whole, as fn sees them.
class Own(Mask):
    """What a function of positions says."""

    fn: Callable
    inputs: tuple[Array, ...]

    def tile(self, at):
        return own_rules.evaluate("masks.rule", self.fn, self.inputs, at, "booleans")

    def __repr__(self):
        return own_rules.shown_rule(self.fn, self.inputs)


@value_class()
class Pair(Mask):
    """Two masks, which `And` and `Or` combine."""

    left: Mask
    right: Mask

    def size(self):
        """The larger of the two sizes; None counts as the smallest."""
        pairs = zip(self.left.size(), self.right.size(), strict=True)
        return tuple(max(pair, key=lambda n: -1 if n is None else n) for pair in pairs)

    def check(self, T, S):
        self.left.check(T, S)
        self.right.check(T, S)

    def check_shifted(self, T, S):
        self.left.check_shifted(T, S)
        self.right.check_shifted(T, S)

    def tiles(self, at):
        """The tiles of the two, which must broadcast against one another."""
        left, right = self.left.tile(at), self.right.tile(at)
        check_alike(f"mask {self!r}", left.shape, right.shape)
        return left, right


@value_class()
class And(Pair):
    def tile(self, at):
        left, right = self.tiles(at)
        return left & right

    def parts(self):
        return self.left.parts() + self.right.parts()

    def bounds(self, at):
        left, right = self.left.bounds(at), self.right.bounds(at)
        if left is None or right is None:
            # Keys that one of them hides are hidden; which keys both show is unknown.
            known = left or right or Bounds((0, at.S), (0, 0))
            return known._replace(open=(0, 0))
        most, usual = (
            min((n for n in pair if n is not None), default=None)
            for pair in ((left.most, right.most), (left.usual, right.usual))
        )
        return Bounds(_overlap(left.seen, right.seen), _overlap(left.open, right.open), most, usual)

    def __repr__(self):
        return " & ".join(
            f"({mask!r})" if isinstance(mask, Or) else repr(mask)
            for mask in (self.left, self.right)
        )


@value_class()
class Or(Pair):
    def tile(self, at):
        left, right = self.tiles(at)
        return left | right

    def bounds(self, at):
        left, right = self.left.bounds(at), self.right.bounds(at)
        if left is None or right is None:
            return None
        starts, stops = zip(left.seen, right.seen, strict=True)
        return Bounds((_least(*starts), _most(*stops)), _longer(left.open, right.open))

    def __repr__(self):
        return f"{self.left!r} | {self.right!r}"


@value_class()
class Not(Mask):
    mask: Mask

    def tile(self, at):
        return ~self.mask.tile(at)

    def size(self):
        return self.mask.size()

    def check(self, T, S):
        self.mask.check(T, S)

    def check_shifted(self, T, S):
        self.mask.check_shifted(T, S)

    def __repr__(self):
        return f"~({self.mask!r})" if isinstance(self.mask, Pair) else f"~{self.mask!r}"


@value_class(offset="")
class Shifted(Mask):
    """The rules of `mask`, for queries that stand `offset` positions later in the sequence."""

    mask: Mask
    offset: Any

    def tile(self, at):
        return self.mask.tile(at.shifted(self.offset))

    def bounds(self, at):
        return self.mask.bounds(at.shifted(self.offset))

    def check(self, T, S):
        self.mask.check_shifted(T, S)

    def __repr__(self):
        return f"shifted({self.mask!r}, {words(self.offset)})"


@value_class(places="T")
class OfTokens(Mask):
    """The rules of `mask`, for queries that are chosen tokens of the sequence."""

    mask: Mask
    places: Array

    def tile(self, at):
        return self.mask.tile(at.chosen(self.places))

    def bounds(self, at):
        return self.mask.bounds(at.chosen(self.places))

    def size(self):
        return self.places.shape[-1], None

    def check(self, T, S):
        super().check(T, S)
        self.mask.check_keys(S)

    def check_shifted(self, T, S):
        raise ValueError(f"mask {self!r} is of chosen tokens, so it cannot be shifted.")

    def __repr__(self):
        return f"of_tokens({self.mask!r}, {words(self.places)})"


@value_class(query_positions="L", key_positions="S")
class Placed(Mask):
    """The rules of `mask`, for tokens with given positions."""

    mask: Mask
    query_positions: Array
    key_positions: Array

    def tile(self, at):
        return self.mask.tile(at.placed(self.query_positions, self.key_positions))

    def bounds(self, at):
        queries = at.of_queries(self.query_positions)
        first, last = jnp.min(queries), jnp.max(queries)
        # The bounds in an endless sequence; S - T stays, because it is the offset "end".
        span = at._replace(t_start=first, t_size=last - first + 1, offset=0)
        known = self.mask.bounds(span._replace(T=at.T + _ENDLESS - at.S, S=_ENDLESS))
        if known is None:
            return None
        start, stop = known.seen  # A start of 0 is open to negative positions too.
        seen = (jnp.maximum(self.key_positions, 0) >= start) & (self.key_positions < stop)
        seen = _span(seen.any(axis=tuple(range(seen.ndim - 1))), at)
        in_row = self.mask.bounds(at._replace(offset=0))
        return Bounds(seen, (0, 0), usual=in_row.most)

    def size(self):
        return self.query_positions.shape[-1], self.key_positions.shape[-1]

    def check(self, T, S):
        super().check(T, S)
        self.mask.check(T, S)

    def __repr__(self):
        return f"placed({self.mask!r}, {words(self.query_positions)})"


def causal(offset: int | str | Array = 0) -> Mask:
    """Key s is visible to query t when s <= t + offset: queries do not see the future.

    Args:
        offset: Where query 0 stands among the keys. An integer, an integer array `[...]` with one
            entry per batch row, or "end": the last query stands at the last key (offset S - T).
            The default aligns the first with the first, as jax.nn and torch do.

    >>> print(causal(offset="end").materialize(2, 4).astype(int))
    [[1 1 1 0]
     [1 1 1 1]]
    """
    return window(None, 0, offset)


def window(left: int | None, right: int | None = 0, offset: int | str | Array = 0) -> Mask:
    """t + offset - left <= s <= t + offset + right, both ends included; None is no limit.

    Args:
        left: How many keys before its own position a query sees, or None for all of them.
        right: How many keys after it. The default 0 is a causal window.
        offset: As in `causal`.

    Raises:
        ValueError: A negative `left` or `right`, or one beyond 2^29; use None for no limit. For a
            window that ends before the query's own position use a negative offset.

    Reference:
        Beltagy et al. 2020, "Longformer", section 3.1. https://arxiv.org/abs/2004.05150

    >>> print(window(1).materialize(4, 4).astype(int))
    [[1 0 0 0]
     [1 1 0 0]
     [0 1 1 0]
     [0 0 1 1]]
    """
    left = left if left is None else as_size("left", left, 0, FARTHEST)
    right = right if right is None else as_size("right", right, 0, FARTHEST)
    return Band(left, right, as_offset(offset))


def strided(stride: int, offset: int | str | Array = 0) -> Mask:
    """Every `stride`-th key, counted from the query's own position in both directions.

    The strided pattern of the paper, whose heads read the last l positions and every l-th before
    them, is `causal() & (window(l) | strided(l))`.

    Args:
        stride: l, at least 1.
        offset: As in `causal`.

    Reference:
        Child et al. 2019, "Generating Long Sequences with Sparse Transformers", section 4.3.
        https://arxiv.org/abs/1904.10509

    >>> print((causal() & strided(3)).materialize(5, 5).astype(int))
    [[1 0 0 0 0]
     [0 1 0 0 0]
     [0 0 1 0 0]
     [1 0 0 1 0]
     [0 1 0 0 1]]
    """
    return Strided(as_size("stride", stride, maximum=FARTHEST), as_offset(offset))


def blocks(size: int, summary: int = 0, offset: int | str | Array = 0) -> Mask:
    """The keys of the query's own block of `size` positions, and the last few of every block.

    The fixed pattern of the paper is `causal() & blocks(l, summary=c)`; without summary this is
    block-diagonal (local) attention.

    Args:
        size: l, the length of a block; the first starts at position 0.
        summary: c, how many keys at the end of every block are seen by all queries.
        offset: As in `causal`.

    Raises:
        ValueError: `size` is below 1, or `summary` is not in [0, size].

    Reference:
        Child et al. 2019, "Generating Long Sequences with Sparse Transformers", section 4.3.
        https://arxiv.org/abs/1904.10509

    >>> print((causal() & blocks(3, summary=1)).materialize(5, 5).astype(int))
    [[1 0 0 0 0]
     [1 1 0 0 0]
     [1 1 1 0 0]
     [0 0 1 1 0]
     [0 0 1 1 1]]
    """
    size = as_size("size", size, maximum=FARTHEST)
    if as_size("summary", summary, minimum=0) > size:
        raise ValueError(f"summary must be at most size={size}, got {summary}.")
    return Blocks(size, int(summary), as_offset(offset))


def segments(query_ids: Array, key_ids: Array | None = None) -> Mask:
    """Equal ids see one another, for several sequences packed into one row.

    Args:
        query_ids: `[..., T]` integers.
        key_ids: `[..., S]` integers; the default is `query_ids`.

    Raises:
        ValueError: The batch axes of the two do not broadcast.
    """
    query_ids = as_integers("query_ids", query_ids, axes=1)
    key_ids = query_ids if key_ids is None else as_integers("key_ids", key_ids, axes=1)
    check_alike("query_ids and key_ids", query_ids.shape[:-1], key_ids.shape[:-1])
    return Segments(query_ids, key_ids)


def key_lengths(lengths: Array) -> Mask:
    """Only the first `lengths` keys of each row are real; `lengths` is `[...]` integers."""
    return KeyLengths(as_integers("lengths", lengths))


def query_lengths(lengths: Array) -> Mask:
    """Only the first `lengths` queries of each row are real; the others see no keys.

    `lengths` is `[...]` integers.
    """
    return QueryLengths(as_integers("lengths", lengths))


def dense(array: Array) -> Mask:
    """A boolean array, broadcastable to `[..., N, T, S]`; True means "may attend"."""
    array = as_array("mask", array)
    if array.dtype != bool:
        raise TypeError(
            f"mask must be boolean (True = may attend), got {array.dtype}: take mask != 0 where 0 "
            "masks; numbers to add to the logits are a bias."
        )
    return Dense(jnp.atleast_2d(jnp.asarray(array)))


def rule(fn: Callable, *arrays: Array) -> Mask:
    """A rule of one's own: query t may attend to key s where `fn(t, s, *arrays)` is True.

    Args:
        fn: Takes positions, t `[t, 1]` and s `[s]` integers, and gives booleans that broadcast to
            `[t, s]`. It is called for parts of the logits, so it must decide by positions. Rules
            with the same function are equal, so define it once: each new function is compiled anew.
        arrays: What fn needs; they may be traced. Of `[..., N, x, y]` fn sees the `[x, y]` of one
            batch row and head; leading axes of 1 serve all. Arrays of fewer axes it sees whole.

    Raises:
        ValueError: fn gives another shape, or uses a traced array that is not handed over.
        TypeError: fn gives no booleans.

    Reference:
        Dong et al. 2024, "Flex Attention", section 3. https://arxiv.org/abs/2412.05496

    >>> print(rule(lambda t, s, prefix: (s <= t) | (s < prefix), 3).materialize(4, 4).astype(int))
    [[1 1 1 0]
     [1 1 1 0]
     [1 1 1 0]
     [1 1 1 1]]
    """
    return Own(fn, own_rules.as_arrays("masks.rule", fn, arrays, "booleans"))


def shifted(mask: Mask, offset: int | Array) -> Mask:
    """`mask` for queries that are the tokens `offset, offset + 1, ...` of the sequence.

    Rules and ids count from the sequence's start; a `dense` array is that of these queries.
    `offset` is an integer or `[...]` integers, one per batch row.
    """
    return Shifted(mask, as_offset(offset))


def of_tokens(mask: Mask, places: Array) -> Mask:
    """`mask` for queries that are the tokens `places` of the sequence, `[..., P]` integers.

    The sequence is that of the keys: queries and keys are the same tokens, T = S.
    Rules and ids go by the tokens; a `dense` array keeps the rows of these tokens.

    >>> print(of_tokens(causal(), jnp.array([2, 0])).materialize(2, 3).astype(int))
    [[1 1 1]
     [1 0 0]]
    """
    places = as_tokens(places)
    return OfTokens(as_mask(mask).of_tokens(places), places)


def placed(mask: Mask, positions: Array, key_positions: Array | None = None) -> Mask:
    """`mask` for tokens whose positions are `positions`, not their places in the row.

    Rules about distances, blocks and lengths count positions; ids and arrays still go by the
    tokens. So a window reaches equally far in every document of a row, even if it is in pieces.

    Args:
        mask: Any rule.
        positions: `[..., T]` integers: where the queries stand.
        key_positions: `[..., S]` integers; the default is `positions`.

    >>> print(placed(window(1), jnp.array([0, 1, 5, 6])).materialize(4, 4).astype(int))
    [[1 0 0 0]
     [1 1 0 0]
     [0 0 1 0]
     [0 0 1 1]]
    """
    positions = as_integers("positions", positions, axes=1)
    if key_positions is None:
        key_positions = positions
    key_positions = as_integers("key_positions", key_positions, axes=1)
    check_alike("positions and key_positions", positions.shape[:-1], key_positions.shape[:-1])
    return Placed(as_mask(mask), positions, key_positions)


def as_mask(mask: "Mask | Array") -> Mask:
    """A mask as it is, and a boolean array as `dense(array)`."""
    if isinstance(mask, Mask):
        return mask
    if isinstance(mask, Rule):
        raise TypeError(
            f"mask must be a boolean array or a masks.* value, got a bias: write bias={mask!r}."
        )
    if not is_array(mask):
        raise TypeError(
            f"mask must be a boolean array or a masks.* value, got {type(mask).__name__}."
        )
    return dense(mask)


def is_causal(mask: Mask | None) -> bool:
    """Whether it is exactly `causal()`, the only mask that a recurrence supports."""
    return (
        isinstance(mask, Band)
        and isinstance(mask.offset, int)
        and (mask.left, mask.right, mask.offset) == (None, 0, 0)
    )


def _span(keys: Array, at: Tile) -> tuple[Array, Array]:
    """(start, stop) from the first to the last of some of the tile's keys, `[s]` or `[1]`."""
    keys = jnp.broadcast_to(keys, (at.s_size,))
    index = at.s_start + jnp.arange(at.s_size, dtype=jnp.int32)
    stop = jnp.max(jnp.where(keys, index + 1, 0), initial=0)
    return jnp.min(jnp.where(keys, index, stop), initial=at.S), stop


def _overlap(*spans: tuple[int | Array, int | Array]) -> tuple[int | Array, int | Array]:
    """The intersection of spans; it is empty when its start is not below its stop."""
    starts, stops = zip(*spans, strict=True)
    return _most(*starts), _least(*stops)


def _longer(left, right):
    choose = left[1] - left[0] >= right[1] - right[0]
    if isinstance(choose, bool):
        return left if choose else right
    return tuple(jnp.where(choose, a, b) for a, b in zip(left, right, strict=True))


def _least(*numbers: int | Array) -> int | Array:
    """The smallest of all entries: a Python integer if all entries are."""
    if all(isinstance(x, int) for x in numbers):
        return min(numbers)
    return functools.reduce(jnp.minimum, [jnp.min(x) for x in numbers])


def _most(*numbers: int | Array) -> int | Array:
    """The largest of all entries: a Python integer if all entries are."""
    if all(isinstance(x, int) for x in numbers):
        return max(numbers)
    return functools.reduce(jnp.maximum, [jnp.max(x) for x in numbers])


def hides_future(mask: Mask | None) -> bool:
    """Whether a mask is sure to hide the future of each token in the row."""
    return mask is not None and any(
        isinstance(part, Band)
        and part.right is not None
        and isinstance(part.offset, int)
        and part.right + part.offset <= 0
        for part in mask.parts()
    )
