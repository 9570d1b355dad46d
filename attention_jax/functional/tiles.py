"""A rectangle of the logits, and the small values (masks, biases) that are evaluated on one.

The dense path asks for the whole rectangle at once, the blockwise path for one tile at a time, so
a rule is written once and costs no `[T, S]` memory unless somebody wants it whole.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from attention_jax.checks import as_integers, as_size
from attention_jax.types import Array


class Tile(NamedTuple):
    """A rectangle of the `[T, S]` logits: the place where masks, biases and dropout are evaluated.

    Attributes:
        t_start, t_size: The rectangle's first query and its number of queries.
        s_start, s_size: The same for keys. Starts may be traced, sizes are static.
        T, S: The size of the whole.
        offset: Where query 0 stands in the sequence, when the queries are the newest tokens of a
            longer one: an integer, or an array that broadcasts against `[..., N, T, S]`.
    """

    t_start: int | Array
    t_size: int
    s_start: int | Array
    s_size: int
    T: int
    S: int
    offset: int | Array = 0

    @classmethod
    def whole(cls, T: int, S: int) -> "Tile":
        return cls(0, T, 0, S, T, S)

    @property
    def t(self) -> Array:
        """Positions of the queries, `[t_size, 1]` (more axes when `offset` has them)."""
        return self.offset + self.t_start + jnp.arange(self.t_size, dtype=jnp.int32)[:, None]

    @property
    def s(self) -> Array:
        """Positions of the keys, `[s_size]`."""
        return self.s_start + jnp.arange(self.s_size, dtype=jnp.int32)


def value_class(cls):
    """A frozen dataclass that is a pytree: numbers, words and None are static, the rest leaves."""
    cls = dataclasses.dataclass(frozen=True, eq=False, repr=False)(cls)
    names = [field.name for field in dataclasses.fields(cls)]

    def flatten(self):
        fields = [getattr(self, name) for name in names]
        static = [x is None or isinstance(x, int | str) for x in fields]
        leaves = [x for x, fixed in zip(fields, static, strict=True) if not fixed]
        return leaves, tuple(
            (fixed, x if fixed else None) for x, fixed in zip(fields, static, strict=True)
        )

    def unflatten(fixed_fields, leaves):
        self, leaves = object.__new__(cls), iter(leaves)
        for name, (fixed, x) in zip(names, fixed_fields, strict=True):
            object.__setattr__(self, name, x if fixed else next(leaves))
        return self

    jax.tree_util.register_pytree_node(cls, flatten, unflatten)
    return cls


def as_offset(offset: int | str | Array) -> int | str | Array:
    """Checks an offset: an integer, "end", or an integer array with one entry per batch row."""
    if isinstance(offset, str):
        if offset != "end":
            raise ValueError(f'offset must be an integer or "end", got {offset!r}.')
        return offset
    if hasattr(offset, "dtype") and not isinstance(offset, np.integer):
        return as_integers("offset", offset)
    return as_size("offset", offset, minimum=-(2**31))


def offset_of(offset: int | str | Array, at: Tile) -> int | Array:
    """The number of positions by which a rule's queries are ahead of its keys."""
    return at.S - at.T if isinstance(offset, str) else per_row(offset)


def per_row(x: int | Array) -> int | Array:
    """`[...]` -> `[..., 1, 1, 1]`, to stand against `[..., N, T, S]`; a scalar stays one."""
    return x if jnp.ndim(x) == 0 else x[..., None, None, None]


def slice_axis(x: Array, start: int | Array, size: int, axis: int) -> Array:
    """`size` entries from `start` on; an axis of one entry serves every position."""
    if x.shape[axis] == 1 or x.shape[axis] == size:
        return x
    return lax.dynamic_slice_in_dim(x, start, size, axis)


def words(x) -> str:
    """A field as it stands in a repr: numbers as they are, arrays by their shape."""
    return repr(x) if isinstance(x, int | str) else str(list(x.shape))
