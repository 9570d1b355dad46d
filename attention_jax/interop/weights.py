"""Parameters in and out: files of safetensors and torch, and the layers of other libraries."""

import os
import re
import stat
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from attention_jax.interop import torch_file
from attention_jax.interop.bridges import (
    from_equinox,
    from_nnx,
    from_original,
    from_torch,
    to_equinox,
    to_nnx,
    to_torch,
)
from attention_jax.types import PyTree

__all__ = [
    "from_equinox",
    "from_nnx",
    "from_original",
    "from_torch",
    "load",
    "save",
    "to_equinox",
    "to_nnx",
    "to_torch",
]

# The types of safetensors that NumPy and JAX have, by their names there.
_TYPES = {
    "BOOL": np.bool_,
    **{f"I{bits}": f"int{bits}" for bits in (8, 16, 32, 64)},
    **{f"U{bits}": f"uint{bits}" for bits in (8, 16, 32, 64)},
    "F16": np.float16,
    "BF16": jnp.bfloat16,
    "F32": np.float32,
    "F64": np.float64,
}
_DTYPES = {np.dtype(dtype) for dtype in _TYPES.values()}
_TORCH = (".pth", ".pt", ".bin")
# A tree of more would be no model, but an attack on memory or on recursion.
MAX_DEPTH, MAX_NODES = 100, 200_000


def load(path: str | os.PathLike) -> dict[str, Any]:
    r"""Reads parameters from a file; nothing in it is executed.

    Args:
        path: A file of safetensors (`.safetensors`), or of `torch.save` (`.pth`, `.pt`, `.bin`),
            which is read without torch.

    Returns:
        Nested dicts of NumPy arrays of the types in the file. A dot in a name divides it:
        `out.kernel` is `["out"]["kernel"]`; `\.` is a dot of the name itself. Values beside the
        tensors of a `.pth` (numbers, words, lists, None) stay as they are, and its arrays cannot
        be written.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: The file is of another kind, is broken, or a `.pth` names anything that is not
            allowed. The message names the path and the fault.
    """
    path = _path(path)
    if path.suffix not in (*_TORCH, ".safetensors"):
        raise ValueError(f"path must end in .safetensors, .pth, .pt or .bin: got {path}.")
    if not path.is_file():
        if path.exists():
            raise ValueError(f"{path} is no file.")
        raise FileNotFoundError(f"there is no file {path}.")
    if path.suffix in _TORCH:
        found = torch_file.read(path)
        if not isinstance(found, dict):
            raise ValueError(f"{path} must hold a dict: got {type(found).__name__}.")
    else:
        found = _read_safetensors(path)
    try:
        return _Nesting().nest(found, 0)
    except ValueError as error:
        raise ValueError(f"{path} holds no tree of parameters: {error}") from error


def save(path: str | os.PathLike, params: PyTree) -> None:
    """Writes parameters to a file of safetensors, which `load` reads back unchanged.

    The file appears when it is complete: a killed process leaves an earlier one as it was.

    Args:
        path: Ends in `.safetensors`.
        params: Nested dicts of arrays, of booleans, integers, or floats of 16 to 64 bits, bfloat16
            included. The names on the way to an array are joined by dots; a dot or backslash of a
            name itself is written after a backslash.

    Raises:
        ValueError: The path has another ending, or the tree could not be read back: it holds an
            empty dict, or a name that the format cannot hold.
        TypeError: A name is no string, or a leaf is no array of these types.
        OSError: The file cannot be written.
    """
    path = _path(path)
    if path.suffix != ".safetensors":
        raise ValueError(f"path must end in .safetensors: got {path}.")
    if not isinstance(params, Mapping):
        raise TypeError(f"params must be nested dicts of arrays: got {type(params).__name__}.")
    arrays = {".".join(map(_escaped, names)): _array(names, x) for names, x in _leaves(params, ())}
    if "__metadata__" in arrays:
        raise ValueError("params must not hold '__metadata__' at the top: safetensors reserves it.")
    unfinished = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        # First by us: an error is then one of the system, and the file is as readable as others.
        with open(unfinished, "wb") as file:
            mode = stat.S_IMODE(os.fstat(file.fileno()).st_mode)
        save_file(arrays, unfinished)
        os.chmod(unfinished, mode)
        with open(unfinished, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(unfinished, path)
    except SafetensorError as error:
        raise OSError(f"{path} cannot be written: {error}.") from error
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error  # Not the unfinished one.
    finally:
        unfinished.unlink(missing_ok=True)


def _path(path):
    if not isinstance(path, str | os.PathLike) or not isinstance(os.fspath(path), str):
        raise TypeError(f"path must be a path: got {path!r}.")
    return Path(path)


def _read_safetensors(path):
    try:
        # The library checks header and offsets against the file before it allocates.
        with safe_open(path, framework="numpy") as file:
            for name in file.keys():  # noqa: SIM118 - it is no dict.
                if (kind := file.get_slice(name).get_dtype()) not in _TYPES:
                    raise ValueError(f"{path} cannot be read: {name[:80]!r} has the type {kind}.")
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(
            f"{path} is no whole file of safetensors: {torch_file.in_short(error)}."
        ) from error


def _leaves(tree: Mapping, above: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], Any]]:
    """The arrays of nested dicts, each after the names on the way to it."""
    for name, value in tree.items():
        if not isinstance(name, str):
            raise TypeError(
                f"names in params must be strings: got {name!r} in {'.'.join(above)!r}."
            )
        names = (*above, name)
        if len(names) > MAX_DEPTH:
            raise ValueError(f"params must be at most {MAX_DEPTH} dicts deep.")
        if not isinstance(value, Mapping):
            yield names, value
        elif value:
            yield from _leaves(value, names)
        else:
            raise ValueError(f"params must hold no empty dict: got one at {'.'.join(names)!r}.")


def _array(names, leaf):
    """A leaf as safetensors needs it: in C order, and in the byte order of the machine."""
    dtype = getattr(leaf, "dtype", None)
    if not isinstance(dtype, np.dtype) or dtype.newbyteorder("=") not in _DTYPES:
        raise TypeError(
            f"params must be arrays of booleans, integers or floats: got "
            f"{type(leaf).__name__ if dtype is None else dtype} at {'.'.join(names)!r}."
        )
    return np.asarray(leaf, dtype.newbyteorder("="), order="C")


def _escaped(name):
    try:
        name.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"names in params must be text of UTF-8: got {name!a}.") from error
    return re.sub(r"([\\.])", r"\\\1", name)


def _split(name):
    r"""The parts of a name.

    >>> _split(r"block\.0.out.kernel")
    ['block.0', 'out', 'kernel']
    """
    parts = [""]
    for match in re.finditer(r"\\[\\.]|\.|[^\\.]+|\\", name):
        piece = match[0]
        if piece == ".":
            parts.append("")
            if len(parts) > MAX_DEPTH:
                raise ValueError(f"{name[:80]!r} has more than {MAX_DEPTH} parts.")
        else:
            parts[-1] += piece[1:] if piece in (r"\.", r"\\") else piece
    return parts


class _Nesting:
    """Makes nested dicts of plain ones, as long as the result is of a sensible size.

    The objects of a `.pth` may hold one another in many places, or themselves, so a small file can
    say a tree without end.
    """

    def __init__(self):
        self._nodes = 0

    def nest(self, value: Any, depth: int) -> Any:
        self._nodes += 1
        if self._nodes > MAX_NODES:
            raise ValueError(f"it has more than {MAX_NODES} parts.")
        if depth > MAX_DEPTH:
            raise ValueError(f"it is more than {MAX_DEPTH} levels deep.")
        if isinstance(value, list | tuple):
            return type(value)(self.nest(x, depth + 1) for x in value)
        if isinstance(value, np.ndarray | str | int | float | None):
            return value
        if not isinstance(value, dict):
            raise ValueError("it holds a type or a storage that belongs to no tensor.")
        tree: dict[Any, Any] = {}
        for name, inner in value.items():
            *above, last = _split(name) if isinstance(name, str) else [name]
            self._nodes += len(above)
            place = tree
            for part in above:
                place = place.setdefault(part, {})
                if not isinstance(place, dict):
                    raise ValueError(f"{name[:80]!r} lies inside of an array.")
            self._put(place, last, self.nest(inner, depth + 1 + len(above)))
        return tree

    def _put(self, place: dict, name: Any, inner: Any) -> None:
        """Adds a part. Dicts of one name become one, whichever came first."""
        if name not in place:
            place[name] = inner
        elif isinstance(inner, dict) and isinstance(place[name], dict):
            for below, value in inner.items():
                self._put(place[name], below, value)
        else:
            raise ValueError(f"it has two parts of the name {str(name)[:80]!r}.")
