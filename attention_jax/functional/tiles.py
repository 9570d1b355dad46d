"""A rectangle of the logits, and the small values (masks, biases) that are evaluated on one.

The dense path asks for the whole rectangle at once, the blockwise path for one tile at a time. So a
rule is written once, and only the dense path needs `[T, S]` memory.
"""

import dataclasses
from typing import ClassVar, NamedTuple, Self

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from attention_jax.checks import as_integers, as_size, is_at_hand, jax_defaults, told
from attention_jax.functional.xla_cpu import dynamic_slice
from attention_jax.types import Array

FARTHEST = 2**29  # The farthest position of a rule: sums of three and a length fit 32 bits.


class Tile(NamedTuple):
    """A rectangle of the `[T, S]` logits, on which masks, biases and dropout are evaluated.

    Attributes:
        t_start, t_size: The rectangle's first query and its number of queries.
        s_start, s_size: The same for keys. Starts may be traced, sizes are static.
        T, S: The size of the whole.
        offset: Where query 0 stands in the sequence, when the queries are the newest tokens of a
            longer one: an integer, or an array that broadcasts against `[..., N, T, S]`.
        lead: (start, size) on each batch axis and on the axis of heads; None is all of them.
        places: Positions of queries and keys, `[..., 1, t_size, 1]` and `[..., 1, 1, s_size]`, or
            without the leading axes; None means their places in the row.
    """

    t_start: int | Array
    t_size: int
    s_start: int | Array
    s_size: int
    T: int
    S: int
    offset: int | Array = 0
    lead: tuple[tuple[int | Array, int], ...] | None = None
    places: tuple[Array, Array] | None = None

    @classmethod
    def whole(cls, T: int, S: int) -> "Tile":
        return cls(0, T, 0, S, T, S)

    @property
    def t(self) -> Array:
        """Positions of the queries, `[t_size, 1]` (more axes when `offset` or `places` have)."""
        return self._in_row if self.places is None else self.places[0]

    @property
    def s(self) -> Array:
        """Positions of the keys, `[s_size]` (more axes when `places` have)."""
        if self.places is not None:
            return self.places[1]
        return self.s_start + jnp.arange(self.s_size, dtype=jnp.int32)

    @property
    def _in_row(self) -> Array:
        return self.offset + self.t_start + jnp.arange(self.t_size, dtype=jnp.int32)[:, None]

    def shifted(self, offset: int | Array) -> "Tile":
        """The same for queries that stand `offset` (an integer or `[...]`) positions later."""
        offset = per_row(offset)
        places = None if self.places is None else (self.places[0] + offset, self.places[1])
        return self._replace(T=self.S, offset=self.offset + offset, places=places)

    def placed(self, query_positions: Array, key_positions: Array) -> "Tile":
        """The same for tokens that stand at `[..., L]` and `[..., s_size]`, L the whole length."""
        places = self.of_queries(query_positions), key_positions[..., None, :]
        return self._replace(places=tuple(with_head_axis(x) for x in places))

    def chosen(self, places: Array) -> "Tile":
        """The same for queries that are the tokens `[..., T or t_size]` of the sequence."""
        if places.shape[-1] != self.t_size:
            places = lax.dynamic_slice_in_dim(places, self.t_start, self.t_size, axis=-1)
        ahead = places - (self.t_start + jnp.arange(self.t_size, dtype=jnp.int32))
        return self._replace(T=self.S, offset=with_head_axis(ahead[..., None]))

    def of_queries(self, x: Array) -> Array:
        """The entries that belong to the tile's queries, `[..., L] -> [..., t_size, 1]`."""
        if isinstance(self.offset, int) and self.offset == 0:
            if x.shape[-1] not in (1, self.t_size):
                x = lax.dynamic_slice_in_dim(x, self.t_start, self.t_size, axis=-1)
            return x[..., None]
        index = self._in_row[..., 0]  # [..., 1, t] or [t]
        index = index[..., 0, :] if index.ndim > 1 else index
        batch = jnp.broadcast_shapes(x.shape[:-1], index.shape[:-1])
        x = jnp.broadcast_to(x, (*batch, x.shape[-1]))
        index = jnp.broadcast_to(index, (*batch, self.t_size))
        return jnp.take_along_axis(x, index, axis=-1, mode="clip")[..., None]

    def slice(self, x: int | Array, axes: str) -> int | Array:
        """The part of `x` for this tile; `axes` names the last axes of `x`: N, T, S or another.

        Axes of another name stay whole, and so does an axis of one entry, which is broadcast.
        """
        if jnp.ndim(x) == 0:
            return x
        return dynamic_slice(x, *self._part(x.shape, axes))

    def put(self, x: Array, part: Array, axes: str) -> Array:
        """`x` with `part` in the place of `slice(x, axes)`."""
        if jnp.ndim(x) == 0:
            return part
        return lax.dynamic_update_slice(x, part, self._part(x.shape, axes)[0])

    def add(self, x: Array, part: Array, axes: str) -> Array:
        """`x` with `part` added in the place of `slice(x, axes)`."""
        return self.put(x, self.slice(x, axes) + part, axes)

    def _part(self, shape, axes):
        """The start and the size of the part on every axis."""
        *batch, heads = self.lead or [None]
        spans = {"N": heads, "T": (self.t_start, self.t_size), "S": (self.s_start, self.s_size)}
        spans = [*batch, *(spans.get(name) for name in axes)][-len(shape) :]
        spans = [None] * (len(shape) - len(spans)) + spans
        parts = [
            (0, size) if span is None or size == 1 else span
            for size, span in zip(shape, spans, strict=True)
        ]
        return [start for start, _ in parts], tuple(size for _, size in parts)


class Rule:
    """A value that is evaluated on a tile: a mask or a bias."""

    axes: ClassVar[dict[str, str]] = {}

    def __eq__(self, other):
        """Equal numbers make equal rules. Arrays may be traced: they must be the same object."""
        return type(self) is type(other) and self._values() == other._values()

    def __hash__(self):
        return hash((type(self), self._values()))

    def _values(self):
        def value(x):
            if isinstance(x, tuple):
                return tuple(map(id, x))
            return x if _is_static(x) or isinstance(x, Rule) else id(x)

        return tuple(value(getattr(self, field.name)) for field in dataclasses.fields(self))

    @jax_defaults()
    def materialize(self, T: int, S: int) -> Array:
        """The whole mask, boolean, or the whole bias: `[T, S]` or `[..., N or 1, T, S]`.

        Raises:
            ValueError: It holds arrays of another T or S, or one of the two is negative.
        """
        T, S = as_size("T", T, minimum=0), as_size("S", S, minimum=0)
        self.check(T, S)
        whole = self.tile(Tile.whole(T, S))
        return jnp.broadcast_to(whole, (*whole.shape[:-2], T, S))

    def narrowed(self, at: Tile) -> Self:
        """The same rule with only the parts of its arrays that the tile needs."""
        return self._over_arrays(at.slice)

    def add(self, part: Self, at: Tile) -> Self:
        """This rule with the numbers of `part` added in the places of `narrowed(at)`."""

        def add(x, axes, part):
            return at.add(x, part, axes) if jnp.issubdtype(x.dtype, jnp.floating) else x

        return self._over_arrays(add, part)

    def of_tokens(self, places: Array) -> Self:
        """The same rule, whose arrays with a row for each query keep those of the tokens `places`,
        `[..., P]`."""

        def take(x, axes):
            if "T" not in axes:
                return x
            axis = axes.index("T") - len(axes)
            if x.ndim < -axis or x.shape[axis] == 1:
                return x
            index = places if axis == -1 else places[..., None, :, None]
            depth = max(x.ndim, index.ndim)
            x, index = (y.reshape(*(1,) * (depth - y.ndim), *y.shape) for y in (x, index))
            return jnp.take_along_axis(x, index, axis=axis, mode="clip")

        return self._over_arrays(take)

    def check_keys(self, S: int) -> None:
        """Raises ValueError when an array of the rule was made for another number of keys."""
        for x, axes in self.arrays():
            if axes.endswith("S") and (1, *x.shape)[-1] not in (1, S):
                raise ValueError(f"{self!r} was made for S={x.shape[-1]}: got {S=}.")

    def arrays(self) -> list[tuple[Array, str]]:
        """Every array in the rule with the letters of its axes, in the order of the pytree."""
        found = []

        def note(x, axes):
            found.append((x, axes))
            return x

        self._over_arrays(note)
        return found

    def _over_arrays(self, f, *others):
        """`f(array, axes, arrays of the others)` for every array in the rule."""
        changed = {}
        for field in dataclasses.fields(self):
            x, *rest = (getattr(rule, field.name) for rule in (self, *others))
            if isinstance(x, Rule):
                changed[field.name] = x._over_arrays(f, *rest)
            elif isinstance(x, tuple):
                axes, parts = self.axes[field.name], zip(x, *rest, strict=True)
                changed[field.name] = tuple(f(part, axes, *others) for part, *others in parts)
            elif not _is_static(x):
                changed[field.name] = f(x, self.axes[field.name], *rest)
        return dataclasses.replace(self, **changed)


def value_class(**axes: str):
    """A frozen dataclass that is a pytree: numbers, words, functions and None are static.

    The other fields are leaves, or tuples of leaves. `axes` names the axes of each field that may
    hold arrays, after `...`: see `Tile.slice`.
    """

    def make(cls):
        cls = dataclasses.dataclass(frozen=True, eq=False, repr=False)(cls)
        cls.axes = {**cls.axes, **axes}
        names = [field.name for field in dataclasses.fields(cls)]

        def flatten(self):
            fields = [getattr(self, name) for name in names]
            leaves = [x for x in fields if not _is_static(x)]
            return leaves, tuple((_is_static(x), x if _is_static(x) else None) for x in fields)

        def unflatten(fixed_fields, leaves):
            self, leaves = object.__new__(cls), iter(leaves)
            for name, (fixed, x) in zip(names, fixed_fields, strict=True):
                object.__setattr__(self, name, x if fixed else next(leaves))
            return self

        jax.tree_util.register_pytree_node(cls, flatten, unflatten)
        return cls

    return make


def _is_static(x) -> bool:
    return x is None or isinstance(x, int | str) or callable(x)


def as_offset(offset: int | str | Array) -> int | str | Array:
    """Checks an offset: an integer, "end", or an integer array with one entry per batch row."""
    if isinstance(offset, str):
        if offset != "end":
            raise ValueError(f'offset must be an integer or "end", got {offset!r}.')
        return offset
    if hasattr(offset, "dtype") and not isinstance(offset, np.integer):
        return as_integers("offset", offset)
    return as_size("offset", offset, minimum=-FARTHEST, maximum=FARTHEST)


def as_tokens(places: Array) -> Array:
    """Checks places of tokens in a row, `[..., P]`."""
    places = as_integers("places", places, axes=1)
    if is_at_hand(places) and (np.asarray(places) < 0).any():
        raise ValueError(f"places must not be negative, got {told(places)}.")
    return places


def offset_of(offset: int | str | Array, at: Tile) -> int | Array:
    """How many positions a rule's queries are ahead of its keys."""
    return at.S - at.T if isinstance(offset, str) else per_row(offset)


def per_row(x: int | Array) -> int | Array:
    """`[...]` -> `[..., 1, 1, 1]`, to stand against `[..., N, T, S]`; a scalar stays one."""
    return x if jnp.ndim(x) == 0 else x[..., None, None, None]


def with_head_axis(x: Array) -> Array:
    """`[..., T, S]` -> `[..., 1, T, S]`, where there are batch axes to keep apart from heads."""
    return x if x.ndim == 2 else x[..., None, :, :]


def words(x) -> str:
    """A field in a repr: numbers and words in full, arrays by their shape."""
    return repr(x) if isinstance(x, int | str) else str(list(x.shape))


def shown(offset: int | str | Array) -> list[str]:
    """An offset in a repr; the default 0 is left out."""
    return [f"offset={words(offset)}"] if not isinstance(offset, int) or offset else []
