"""Checks of arguments, with errors in the caller's words; and the modes of JAX for the package's
code."""

import contextlib
import dataclasses
import difflib
import functools
import inspect
import operator
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import get_args, get_origin

import jax
import jax.numpy as jnp
import numpy as np

from attention_jax.types import Array

# The types to compute in. Narrower ones, as float8_e4m3fn, are for storage: cast them first.
FLOATS = tuple(map(jnp.dtype, ("float16", "bfloat16", "float32", "float64")))


@contextlib.contextmanager
def jax_defaults() -> Iterator[None]:
    """Sets JAX's default modes for a block; it also decorates a function.

    Strict modes forbid accidental promotions, but this package promotes on purpose: positions of
    queries `[t, 1]` meet those of keys `[s]`. The default modes also keep the random bits the same.
    """
    with (
        jax.numpy_rank_promotion("allow"),
        jax.numpy_dtype_promotion("standard"),
        jax.threefry_partitionable(True),
    ):
        yield


# What other libraries call an argument, and what to write here.
_CAUSAL = "mask=masks.causal()"
_VISIBLE = "mask=..., in which True means may attend"
_WINDOW = "mask=masks.window(left, right), in which both ends are visible"
_LENGTHS = "mask=masks.key_lengths(lengths)"
_SEGMENTS = "mask=masks.segments(ids)"
_SAME_HEADS = "fewer heads in key and value, which are shared"
_ELSEWHERE = {
    "is_causal": _CAUSAL,
    "causal": _CAUSAL,
    "attn_mask": f"{_VISIBLE}, or bias=... for a mask of numbers",
    "attention_mask": _VISIBLE,
    "key_padding_mask": f"{_LENGTHS}, or mask=seen[..., None, None, :] for a [B, S] array",
    "padding_mask": f"{_LENGTHS}, or mask=seen[..., None, None, :] for a [B, S] array",
    "attn_bias": "bias=...",
    "local_window_size": _WINDOW,
    "window_size": _WINDOW,
    "sliding_window": "mask=masks.window(size - 1)",
    "segment_ids": _SEGMENTS,
    "q_segment_ids": _SEGMENTS,
    "query_seq_lengths": "mask=masks.query_lengths(lengths)",
    "key_value_seq_lengths": _LENGTHS,
    "dropout_p": "dropout_rate=...",
    "dropout": "dropout_rate=...",
    "broadcast_dropout": "interop.flax.attention_fn, which has it",
    "enable_gqa": _SAME_HEADS,
    "num_groups": "num_kv_heads=...",
    "num_key_value_heads": "num_kv_heads=...",
    "n_kv_heads": "num_kv_heads=...",
    "sm_scale": "scale=...",
    "softmax_scale": "scale=...",
    "logits_soft_cap": "softcap=...",
    "attn_logits_soft_cap": "softcap=...",
    "logit_cap": "softcap=...",
    "precision": "with jax.default_matmul_precision(...): around the call",
    "need_weights": "sow_weights=True in the call of a layer, or attention_weights(...)",
    "return_weights": "sow_weights=True in the call of a layer, or attention_weights(...)",
    "qkv_features": "head_dim=qkv_features // num_heads",
    "normalize_qk": 'qk_norm="layer"',
    "use_qk_norm": 'qk_norm="layer" or "rms"',
    "embed_dim": "no width: a layer takes it from its inputs; out_features=... if they differ",
    "in_features": "no width: a layer takes it from its inputs",
    "kdim": "no width: a layer takes it from its inputs",
    "vdim": "no width: a layer takes it from its inputs",
    "batch_first": "nothing: the batch always comes first",
    "rope_theta": "rotary_base=...",
    "rope_base": "rotary_base=...",
    "rngs": "flax.nnx.bridge.ToNNX(layer, rngs=...): this is a layer of linen",
    "kv_heads": "num_kv_heads=...",
    "mask": "mask=... in the call, layer.apply(variables, x, mask=...)",
    "bias": "bias=... in the call, layer.apply(variables, x, bias=...)",
    "inputs_k": "inputs_kv=..., and inputs_v=... if values come from other inputs",
}


def check_names(called: str, taken: Collection[str], given: Collection[str]) -> None:
    """Raises TypeError for an argument that there is not, with what to write instead."""
    for name in given:
        if name in taken:
            continue
        if name in _ELSEWHERE:
            words = f": write {_ELSEWHERE[name]}"
        else:
            near = difflib.get_close_matches(name, taken, n=1)
            words = f": did you mean {near[0]}?" if near else f"; it takes {', '.join(taken)}"
        raise TypeError(f"{called} has no argument {name}{words}.".replace("?.", "?"))


def public(function: Callable) -> Callable:
    """A function in JAX's default modes that answers to the words of other libraries."""
    taken = tuple(x for x in inspect.signature(function).parameters if x != "self")
    in_default_modes = jax_defaults()(function)

    @functools.wraps(function)
    def call(*args, **options):
        check_names(function.__name__, taken, options)
        return in_default_modes(*args, **options)

    return call


class Named:
    """A layer whose fields answer to the words of other libraries."""

    def __new__(cls, *args, **fields):
        check_names(cls.__name__, cls.__dataclass_fields__, fields)
        return super().__new__(cls)


def check_floating(name: str, array: Array) -> None:
    """Raises TypeError unless `array` holds floating-point numbers of a type to compute in."""
    if not is_array(array):
        raise TypeError(f"{name} must be an array, got {type(array).__name__}.")
    if not isinstance(array.dtype, np.dtype) and not isinstance(array, jax.Array):  # torch's.
        came = f"{type(array).__module__}.{type(array).__name__}"
        raise TypeError(
            f"{name} must be an array of jax or NumPy, got {came}: write jnp.asarray(...)."
        )
    if array.dtype not in FLOATS:
        raise TypeError(f"{name} must be {_or(FLOATS)}, got {array.dtype}.")


def check_dtype(name: str, dtype: object) -> None:
    """Raises TypeError unless `dtype` names a floating-point type to compute in."""
    try:
        fits = jnp.dtype(dtype) in FLOATS
    except TypeError:
        fits = False
    if not fits:
        is_name = isinstance(dtype, np.dtype | str)
        came = dtype if is_name else getattr(dtype, "__name__", told(dtype))
        raise TypeError(f"{name} must be {_or(FLOATS)}, got {came}.")


def is_real(dtype: jnp.dtype) -> bool:
    """Whether it is a type of integers, or a floating-point type to compute in."""
    return dtype in FLOATS or jnp.issubdtype(dtype, jnp.integer)


def _or(words: Sequence[object]) -> str:
    *first, last = map(str, words)
    return f"{', '.join(first)} or {last}"


def is_array(x: object) -> bool:
    """Whether `x` holds numbers; a `jax.ShapeDtypeStruct` has a type, but no numbers."""
    holds = hasattr(x, "__array__") or hasattr(x, "__jax_array__")
    return holds and hasattr(x, "dtype") and not isinstance(x, type)


def told(x: object) -> str:
    """A value for the one line of an error; only its type if it is too long."""
    text = repr(x)
    if "\n" not in text and len(text) <= 80 and not isinstance(x, jax.core.Tracer):
        return text
    return f"an array of {x.dtype} {x.shape}" if is_array(x) else f"a {type(x).__name__}"


def called(function: Callable) -> str:
    """The name of a function, for an error."""
    return getattr(function, "__name__", None) or type(function).__name__


def check_flag(name: str, value: bool) -> None:
    """Raises TypeError unless `value` is True or False: a word would pass for True."""
    if not isinstance(value, bool | np.bool_):
        raise TypeError(f"{name} must be True or False, got {told(value)}.")


def check_function(name: str, value: Callable) -> None:
    """Raises TypeError unless `value` can be called."""
    if not callable(value):
        raise TypeError(f"{name} must be a function, got {told(value)}.")


def check_takes(function: Callable, options: Mapping[str, object]) -> None:
    """Raises NotImplementedError for an option that a function or a layer has no argument for."""
    taken = inspect.signature(function).parameters
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in taken.values()):
        return
    for name, value in options.items():
        if name not in taken:
            came = "" if is_array(value) else f", got {name}={told(value)}"
            raise NotImplementedError(f"{called(function)} has no {name}{came}.")


def takes(function: Callable, name: str) -> bool:
    """Whether a function or a layer has an argument of this name."""
    return name in inspect.signature(function).parameters


def check_part(name: str, part: object) -> None:
    """Raises TypeError unless a part of a model is a layer, and not the class of one."""
    if isinstance(part, type) or not callable(part):
        called = getattr(part, "__name__", told(part))
        hint = f"; write {called}(...)" if isinstance(part, type) else ""
        raise TypeError(f"{name} must be a layer, got {called}{hint}.")


def check_word(name: str, value: str, words: Sequence[str]) -> None:
    """Raises ValueError unless `value` is one of these words."""
    if not (isinstance(value, str) and value in words):
        raise ValueError(f"{name} must be one of {tuple(words)}, got {told(value)}.")


def check_fields(layer: object) -> None:
    """Raises unless the switches, functions, numbers and types of a layer are as declared.

    `param_dtype` must be a floating-point type to compute in; `dtype` must be one or None.
    """
    for field in dataclasses.fields(layer):
        value, kinds = getattr(layer, field.name), (field.type, *get_args(field.type))
        if value is None and (type(None) in kinds or field.name == "dtype"):
            continue
        if field.type is bool:
            check_flag(field.name, value)
        elif float in kinds:
            check_number(field.name, value)
        elif (
            Callable in map(get_origin, kinds) and str not in kinds
        ):  # A word is checked where used.
            check_function(field.name, value)
        elif field.name in ("dtype", "param_dtype"):
            check_dtype(field.name, value)


def check_inputs(name: str, inputs: Array, batch: Sequence[int] | None = None) -> None:
    """Raises unless `inputs` are real numbers `[..., T, D]`, with batch axes `batch` if given."""
    if not is_array(inputs):
        raise TypeError(f"{name} must be an array, got {told(inputs)}.")
    if not is_real(inputs.dtype):
        raise TypeError(f"{name} must be real numbers, got {inputs.dtype}.")
    if inputs.ndim < 2 or inputs.shape[-1] < 1:
        raise ValueError(f"{name} must be [..., T, D] with D at least 1, got shape {inputs.shape}.")
    if batch is not None and inputs.shape[:-2] != tuple(batch):
        raise ValueError(f"{name} must have the batch axes {batch}, got shape {inputs.shape}.")


def as_floating(name: str, array: Array) -> Array:
    """`array` as an array of floating-point numbers, or the error that says why not."""
    array = as_array(name, array)
    check_floating(name, array)
    return jnp.asarray(array)


@jax_defaults()
def as_integers(name: str, array: Array, axes: int = 0) -> Array:
    """`array` as an array of at least `axes` axes of integers, or the error that says why not.

    The result is signed and has 32 bits at least, so that differences do not wrap around. Integers
    of a numpy array may not fit, which is an error; jax arrays were truncated before.
    """
    is_empty_list = isinstance(array, list | tuple) and not array
    array = as_array(name, array)
    if is_empty_list:  # Which NumPy takes for floats.
        array = array.astype(np.int32)
    if not jnp.issubdtype(array.dtype, jnp.integer):
        raise TypeError(f"{name} must hold integers, got {array.dtype}.")
    if array.ndim < axes:
        raise ValueError(f"{name} must have at least {axes} axis, got shape {array.shape}.")
    wide = array.dtype in (jnp.uint32, jnp.int64, jnp.uint64)
    dtype = jax.dtypes.canonicalize_dtype(jnp.int64 if wide else jnp.int32)
    if wide and isinstance(array, np.ndarray) and array.size:
        for extreme in (array.min(), array.max()):
            if not jnp.iinfo(dtype).min <= extreme <= jnp.iinfo(dtype).max:
                raise ValueError(f"{name} must fit in {dtype}, got {extreme}.")
    return jnp.asarray(array).astype(dtype)


def as_positions(positions: Array, batch: Sequence[int], length: int) -> Array:
    """`positions` as integers that broadcast to `[..., T]`, or the error that says why not."""
    positions = as_integers("positions", positions, axes=1)
    *axes, last = positions.shape
    pairs = zip(reversed(axes), reversed(batch), strict=False)
    if last != length or len(axes) > len(batch) or any(n not in (1, m) for n, m in pairs):
        raise ValueError(
            f"positions must be [..., T] and broadcast to {(*batch, length)}, got shape "
            f"{positions.shape}."
        )
    return positions


def as_places(name: str, places: Array, batch: Sequence[int], length: int) -> Array:
    """`places` as integers `[..., P]` with these batch axes, or the error that says why not.

    Negative ones count from the end, as in numpy. Outside `jit` all must be in a row of `length`.
    """
    places = as_integers(name, places, axes=1)
    if places.shape[:-1] != tuple(batch):
        raise ValueError(
            f"{name} must be [..., P] with the batch axes {tuple(batch)} of inputs, got shape "
            f"{places.shape}."
        )
    if not (isinstance(length, int) and is_at_hand(places)):
        return jnp.where(places < 0, places + length, places)
    places = np.asarray(places)  # Under `jit` operations of jax would trace it.
    if not ((places >= -length) & (places < length)).all():
        raise ValueError(f"{name} must be places in a row of {length}, got {told(places)}.")
    return np.where(places < 0, places + length, places)


def is_at_hand(array: Array) -> bool:
    """Whether the numbers of an array can be looked at: it is not traced, nor on other hosts."""
    is_traced = isinstance(array, jax.core.Tracer)
    return not is_traced and getattr(array, "is_fully_addressable", True)


def as_array(name: str, array: Array) -> Array:
    """`array` as an array of jax if any part of it is one, else of numpy; or an error."""
    of_jax = any(isinstance(x, jax.Array) for x in jax.tree.leaves(array))
    try:
        return jnp.asarray(array) if of_jax else np.asarray(array)
    except (TypeError, ValueError):
        raise TypeError(f"{name} must be an array, got {told(array)}.") from None


def check_qkv(
    query: Array, key: Array, value: Array, *, more_values: bool = False
) -> tuple[Array, Array, Array]:
    """The three as arrays, or the error that says why they do not fit together.

    They must be floating-point `[..., T, N, H]`, `[..., S, K, H]` and `[..., S, K, V]`, K | N. With
    `more_values` the values may have W heads, K | W, where N | W or W | N.
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
    N, K, W = (x.shape[-2] for x in (query, key, value))
    if more_values and W > K > 0 and key.shape[-3] == value.shape[-3]:
        if W % K or (N % W and W % N):
            raise ValueError(
                "heads K of key must divide heads W of value, and W must be a multiple or a "
                f"divisor of heads N of query: got {N=}, {K=} and {W=}."
            )
    elif key.shape[-3:-1] != value.shape[-3:-1]:
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
            "query heads N must be a multiple of key heads K, at least 1, got "
            f"N={query.shape[-2]} and K={key.shape[-2]}."
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


def check_number(name: str, x: float | Array) -> None:
    """Raises unless `x` is one real number; an array of one entry and no axes is one."""
    if is_array(x):
        fits = is_real(x.dtype)
    else:
        fits = isinstance(x, int | float) and not isinstance(x, bool)
    if not fits:
        came = x.dtype if is_array(x) else told(x)
        raise TypeError(f"{name} must be a real number, got {came}.")
    if np.ndim(x) > 0:
        raise ValueError(f"{name} must be one number, got shape {x.shape}.")


def known(x: float | Array) -> float | None:
    """A number as a Python float, or None if it is traced.

    Compare this float, not the array: while a function is traced, comparisons of arrays are traced
    too.
    """
    return None if isinstance(x, jax.core.Tracer) else float(x)


def check_rate(name: str, rate: float | Array) -> None:
    """Raises unless `rate` is one number with 0 <= rate < 1; a traced one is not checked."""
    check_number(name, rate)
    if is_array(rate):
        check_floating(name, rate)
    if known(rate) is not None and not 0 <= known(rate) < 1:
        raise ValueError(f"{name} must lie in [0, 1), got {rate}.")


_RAW_KEYS = [(1,), (2,), (4,)]  # Shapes of raw keys: threefry has 2 words, rbg 4.


def as_rng(name: str, rng: Array) -> Array:
    """A threefry key from a PRNG key of any kind, or the error that says why not.

    It takes raw uint32 keys too. A threefry key stays unchanged; the words of other keys are
    hashed. Their own generators are not used: under `vmap`, rbg draws all rows from the key of the
    first row, and unsafe_rbg folds the same number into all keys.
    """
    dtype = getattr(rng, "dtype", None)
    is_typed = dtype is not None and jnp.issubdtype(dtype, jax.dtypes.prng_key)
    if not is_typed and dtype != jnp.uint32:
        came = type(rng).__name__ if dtype is None else f"an array of {dtype}"
        raise TypeError(f"{name} must be a PRNG key, as jax.random.key(0) is, got {came}.")
    if rng.shape not in ([()] if is_typed else _RAW_KEYS):
        shape = "()" if is_typed else "(2,)"
        raise ValueError(f"{name} must be one PRNG key, of shape {shape}, got shape {rng.shape}.")
    words = jax.random.key_data(rng) if is_typed else jnp.asarray(rng)
    threefry = functools.partial(jax.random.wrap_key_data, impl="threefry2x32")
    if words.shape == (2,):
        return threefry(words)
    return functools.reduce(jax.random.fold_in, words, threefry(jnp.zeros(2, jnp.uint32)))


def as_size(name: str, value: int, minimum: int = 1, maximum: int | None = None) -> int:
    """`value` as a Python int; TypeError if it is not an integer, ValueError outside the bounds."""
    if isinstance(value, bool):
        raise TypeError(f"{name} must be an integer, got {value!r}.")
    try:
        size = operator.index(value)
    except TypeError:
        raise TypeError(f"{name} must be an integer, got {told(value)}.") from None
    if size < minimum:
        raise ValueError(f"{name} must be at least {minimum}, got {size}.")
    if maximum is not None and size > maximum:
        raise ValueError(f"{name} must be at most {maximum}, got {size}.")
    return size
