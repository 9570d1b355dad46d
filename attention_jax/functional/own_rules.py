"""Rules of one's own: a function of positions, evaluated on a tile of the logits.

The function sees one batch row and one head at a time: queries `[t, 1]`, keys `[s]`, and arrays of
two axes at most. `jax.vmap` takes it over the rows and heads of the tile.
"""

import inspect
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp

from attention_jax.checks import FLOATS, as_array, check_function, is_real, jax_defaults
from attention_jax.functional.tiles import Tile, words
from attention_jax.types import Array

_TRIAL = Tile.whole(3, 5)  # Small, and of two sizes, to look at what a function returns.


@jax_defaults()
def as_arrays(what: str, fn: Callable, arrays: Sequence[Array], wanted: str) -> tuple[Array, ...]:
    """The arrays of a rule, or the error that says why fn or one of them makes no rule."""
    check_function("fn", fn)
    try:
        hash(fn)
    except TypeError:
        raise TypeError(
            f"fn must be hashable, because rules are, got a {type(fn).__name__}."
        ) from None
    if any(isinstance(x, jax.core.Tracer) for x in jax.tree.leaves(_closed_over(fn))):
        raise ValueError(
            f"fn uses a traced array from outside: hand it over, as in {what}(fn, array)."
        )
    _check_arguments(what, fn, len(arrays))
    found = tuple(as_array(f"array {i} of {what}", x) for i, x in enumerate(arrays))
    for i, x in enumerate(found):
        if x.dtype != bool and not is_real(x.dtype):
            raise TypeError(f"array {i} of {what} must hold real numbers, got {x.dtype}.")
    found = tuple(map(jnp.asarray, found))
    jax.eval_shape(lambda arrays: evaluate(what, fn, arrays, _TRIAL, wanted), found)
    return found


def _check_arguments(what: str, fn: Callable, count: int) -> None:
    """Raises TypeError if fn cannot be called with two positions and the arrays."""
    try:
        signature = inspect.signature(fn)
    except ValueError:  # A function of C may not tell.
        return
    try:
        signature.bind(*[None] * (2 + count))
    except TypeError:
        raise TypeError(
            f"fn of {what} is called with t, s and {count} arrays, but takes {signature}. The "
            "number of a head or row is an array, as jnp.arange(N)[:, None, None]."
        ) from None


def evaluate(what: str, fn: Callable, arrays: Sequence[Array], at: Tile, wanted: str) -> Array:
    """What fn gives on a tile, `[..., N or 1, t or 1, s or 1]` or without the leading axes.

    Args:
        what: The rule in an error.
        fn: `fn(t, s, *arrays)`, for one batch row and one head.
        arrays: `[..., N, x, y]`, of which fn sees `[x, y]`; or of fewer axes, and fn sees them all.
        at: The tile; its leading axes are those that `arrays` have.
        wanted: "booleans" or "floating-point numbers".

    Raises:
        ValueError: Leading axes do not broadcast, or fn gives no `[t, s]`.
        TypeError: fn gives numbers of another type.
    """
    # In float32 at least, as tiles compute.
    arrays = [
        x.astype(jnp.promote_types(x.dtype, jnp.float32)) if x.dtype in FLOATS else x
        for x in arrays
    ]
    s = at.s[..., 0, :] if at.s.ndim > 1 else at.s
    inputs, ranks = (at.t, s, *arrays), (2, 1, *[2] * len(arrays))
    leads = [x.shape[: max(0, x.ndim - rank)] for x, rank in zip(inputs, ranks, strict=True)]
    try:
        jnp.broadcast_shapes(*leads)
    except ValueError:
        raise ValueError(
            f"the arrays of {what} must broadcast in their axes before the last two, got shapes "
            f"{', '.join(str(x.shape) for x in arrays)}."
        ) from None

    def one(*inputs):
        found = as_array(f"the result of the fn of {what}", fn(*inputs))
        fits = found.dtype == bool if wanted == "booleans" else found.dtype in FLOATS
        if not fits:
            raise TypeError(f"the fn of {what} must give {wanted}, got {found.dtype}.")
        shape = (*(1,) * (2 - found.ndim), *found.shape)
        sizes = (at.t_size, at.s_size)
        if len(shape) > 2 or any(n not in (1, m) for n, m in zip(shape, sizes, strict=True)):
            raise ValueError(
                f"the fn of {what} must give [t, s], for t [{sizes[0]}, 1] and s [{sizes[1]}] got "
                f"shape {found.shape}."
            )
        return jnp.asarray(found).reshape(shape)

    def over(depth, *inputs):
        """fn over the last `depth` leading axes."""
        if depth == 0:
            return one(*inputs)
        axes = [x.ndim - rank == depth for x, rank in zip(inputs, ranks, strict=True)]
        mapped = [
            0 if has and x.shape[0] != 1 else None for x, has in zip(inputs, axes, strict=True)
        ]
        inputs = [
            x[0] if has and axis is None else x
            for x, has, axis in zip(inputs, axes, mapped, strict=True)
        ]
        if all(axis is None for axis in mapped):
            return over(depth - 1, *inputs)[None]
        return jax.vmap(lambda *inputs: over(depth - 1, *inputs), mapped)(*inputs)

    return over(max(map(len, leads)), *inputs)


def shown_rule(fn: Callable, arrays: Sequence[Array]) -> str:
    """A rule's repr: the name of its function, and the shapes of its arrays."""
    name = getattr(fn, "__name__", type(fn).__name__)
    return f"rule({', '.join([name, *map(words, arrays)])})"


def _closed_over(fn):
    """What a function takes from outside, as far as it can be seen: cells, defaults, partials."""
    found = [getattr(fn, name, None) for name in ("__defaults__", "args", "keywords")]
    for cell in getattr(fn, "__closure__", None) or ():
        try:
            found.append(cell.cell_contents)
        except ValueError:  # The cell is empty so far.
            continue
    inner = getattr(fn, "func", None)  # Of a partial.
    return [*found, _closed_over(inner)] if inner is not None else found
