"""The errors that a caller can cause, each said once and in the caller's words."""

import operator
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from attention_jax.types import Array


def check_floating(name: str, array: Array) -> None:
    """Raises TypeError unless `array` holds real floating-point numbers."""
    dtype = getattr(array, "dtype", None)
    if dtype is None:
        raise TypeError(f"{name} must be an array, got {type(array).__name__}.")
    if not jnp.issubdtype(dtype, jnp.floating):
        raise TypeError(f"{name} must be floating-point, got {dtype}.")


def as_integers(name: str, array: Array, axes: int = 0) -> Array:
    """`array` as an array of at least `axes` axes of integers, or the error that says why not.

    They are of 32 bits at least, and signed: a difference of two must not wrap around. Arrays of
    numpy may hold some that do not fit; those of jax have been cut already.
    """
    of_jax = any(isinstance(x, jax.Array) for x in jax.tree.leaves(array))
    array = jnp.asarray(array) if of_jax else np.asarray(array)
    if not jnp.issubdtype(array.dtype, jnp.integer):
        raise TypeError(f"{name} must hold integers, got {array.dtype}.")
    if array.ndim < axes:
        raise ValueError(f"{name} must have at least {axes} axis, got shape {array.shape}.")
    dtype = jax.dtypes.canonicalize_dtype(jnp.promote_types(array.dtype, jnp.int32))
    if isinstance(array, np.ndarray) and array.size:
        for extreme in (array.min(), array.max()):
            if not jnp.iinfo(dtype).min <= extreme <= jnp.iinfo(dtype).max:
                raise ValueError(f"{name} must fit in {dtype}, got {extreme}.")
    return jnp.asarray(array).astype(dtype)


def check_qkv(query: Array, key: Array, value: Array) -> tuple[Array, Array, Array]:
    """The three as arrays, or the error that says why they do not fit together.

    They must be floating-point `[..., T, N, H]`, `[..., S, K, H]` and `[..., S, K, V]`, K | N.
    """
    for name, array in (("query", query), ("key", key), ("value", value)):
        check_floating(name, array)
        if array.ndim < 3:
            raise ValueError(
                f"{name} must be [..., length, heads, head size], got shape {array.shape}."
            )
    if not query.shape[:-3] == key.shape[:-3] == value.shape[:-3]:
        raise ValueError(
            "query, key and value must share their batch axes, got shapes "
            f"{query.shape}, {key.shape} and {value.shape}."
        )
    if key.shape[-3:-1] != value.shape[-3:-1]:
        raise ValueError(
            "key and value must share length S and heads K, got shapes "
            f"{key.shape} and {value.shape}."
        )
    if query.shape[-1] != key.shape[-1]:
        raise ValueError(
            f"query and key must share head size H, got shapes {query.shape} and {key.shape}."
        )
    if key.shape[-2] == 0 or query.shape[-2] % key.shape[-2]:
        raise ValueError(
            f"query heads N must be a multiple of key heads K, got N={query.shape[-2]} and "
            f"K={key.shape[-2]}."
        )
    if query.shape[-1] == 0:
        raise ValueError(f"head size H must be at least 1, got query shape {query.shape}.")
    return tuple(jnp.asarray(x) for x in (query, key, value))


def check_broadcastable(name: str, shape: Sequence[int], target: Sequence[int]) -> None:
    """Raises ValueError unless an array of `shape` broadcasts to `target` without growing it."""
    fits = len(shape) <= len(target) and all(
        size in (1, wanted) for size, wanted in zip(reversed(shape), reversed(target), strict=False)
    )
    if not fits:
        raise ValueError(
            f"{name} must broadcast to [..., N, T, S] = {tuple(target)}, got shape {tuple(shape)}."
        )


def check_alike(name: str, left: Sequence[int], right: Sequence[int]) -> None:
    """Raises ValueError unless arrays of the two shapes broadcast against one another."""
    pairs = zip(reversed(left), reversed(right), strict=False)
    if any(a != b and 1 not in (a, b) for a, b in pairs):
        raise ValueError(
            f"{name} must broadcast with one another, got shapes {tuple(left)} and {tuple(right)}."
        )


def check_rate(name: str, rate: float | Array) -> None:
    """Raises unless `rate` is one number, and 0 <= rate < 1; a traced one is taken on trust."""
    is_array = hasattr(rate, "dtype")
    if not is_array and (isinstance(rate, bool) or not isinstance(rate, int | float)):
        raise TypeError(f"{name} must be a number, got {rate!r}.")
    if is_array and not jnp.issubdtype(rate.dtype, jnp.floating):
        raise TypeError(f"{name} must be a floating-point number, got {rate.dtype}.")
    if is_array and rate.shape != ():
        raise ValueError(f"{name} must be one number, got shape {rate.shape}.")
    if not isinstance(rate, jax.core.Tracer) and not 0 <= rate < 1:
        raise ValueError(f"{name} must lie in [0, 1), got {rate}.")


def as_rng(name: str, rng: Array) -> Array:
    """One typed PRNG key, also of the raw uint32 data of one, or the error that says why not."""
    dtype = getattr(rng, "dtype", None)
    is_typed = dtype is not None and jnp.issubdtype(dtype, jax.dtypes.prng_key)
    if not is_typed and dtype != jnp.uint32:
        came = type(rng).__name__ if dtype is None else f"an array of {dtype}"
        raise TypeError(f"{name} must be a PRNG key, as jax.random.key(0) is, got {came}.")
    shape = () if is_typed else jax.eval_shape(jax.random.key_data, jax.random.key(0)).shape
    if rng.shape != shape:
        raise ValueError(f"{name} must be one PRNG key, of shape {shape}, got shape {rng.shape}.")
    return rng if is_typed else jax.random.wrap_key_data(rng)


def as_size(name: str, value: int, minimum: int = 1, maximum: int | None = None) -> int:
    """`value` as a Python int; TypeError when it is none, ValueError out of these bounds."""
    if isinstance(value, bool):
        raise TypeError(f"{name} must be an integer, got {value!r}.")
    try:
        size = operator.index(value)
    except TypeError:
        raise TypeError(f"{name} must be an integer, got {value!r}.") from None
    if size < minimum:
        raise ValueError(f"{name} must be at least {minimum}, got {size}.")
    if maximum is not None and size > maximum:
        raise ValueError(f"{name} must be at most {maximum}, got {size}.")
    return size
