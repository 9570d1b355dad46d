"""Reads the files of `torch.save` without torch, and executes nothing in them.

Such a file is a zip archive. `NAME/data.pkl` is a pickle that says how the objects are put
together; `NAME/data/0`, `NAME/data/1`, ... hold the bytes of the tensors. Python's own `pickle`
calls whatever function a file names. The machine below has no instruction that calls a function. It
knows the instructions that `torch.save` writes, and the names of `OrderedDict`, of two functions
that build tensors and of the types of storages; what they mean is written out here.
"""

import dataclasses
import errno
import math
import pickletools
import struct
import textwrap
import warnings
import zipfile
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

# A tensor takes about 200 bytes here, so 20,000 of them fit; and objects take up to a hundred times
# as much memory as their instructions.
MAX_PICKLE = 2**22
_DTYPES = {
    "torch.DoubleStorage": np.float64,
    "torch.FloatStorage": np.float32,
    "torch.HalfStorage": np.float16,
    "torch.BFloat16Storage": jnp.bfloat16,
    "torch.LongStorage": np.int64,
    "torch.IntStorage": np.int32,
    "torch.ShortStorage": np.int16,
    "torch.CharStorage": np.int8,
    "torch.ByteStorage": np.uint8,
    "torch.BoolStorage": np.bool_,
}
# The types of tensors that have no kind of storage of their own.
_UNTYPED = "torch.storage.UntypedStorage"
_DTYPES_OF_UNTYPED = {
    "torch.uint16": np.uint16,
    "torch.uint32": np.uint32,
    "torch.uint64": np.uint64,
}
_ALLOWED = {
    "collections.OrderedDict",
    "torch._utils._rebuild_tensor_v2",
    "torch._utils._rebuild_tensor_v3",
    "torch._utils._rebuild_parameter",
    _UNTYPED,
    *_DTYPES,
    *_DTYPES_OF_UNTYPED,
}


@dataclasses.dataclass(frozen=True)
class _Name:
    """A global that the pickle names, as `torch.FloatStorage`."""

    name: str


@dataclasses.dataclass(frozen=True, eq=False)
class _Storage:
    """The elements of a storage, which tensors may share."""

    elements: np.ndarray


def read(path: Path) -> Any:
    """The object in a file of `torch.save`; its tensors are NumPy arrays that cannot be written.

    Tensors that share a storage share memory. Strides are kept.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: The file is broken, or names anything but tensors and plain values. The message
            names the path and the fault.
    """
    size = path.stat().st_size
    try:
        with zipfile.ZipFile(path) as archive:
            top = _check_entries(archive, size)
            return _Machine(archive, top, size).run()
    except zipfile.BadZipFile as error:
        raise ValueError(
            f"{path} is no whole file of torch.save: {in_short(error)}. If it is older than torch "
            "1.6, load it in torch and save it again."
        ) from error
    except IndexError as error:  # The machine's stack is empty.
        raise ValueError(f"{path} is broken: its data.pkl takes what is not there.") from error
    except OSError as error:
        if error.errno != errno.EINVAL:  # A place in the file that no file has.
            raise
        raise ValueError(f"{path} is broken: an entry lies outside of it.") from error
    except (EOFError, NotImplementedError, OverflowError, struct.error) as error:
        raise ValueError(f"{path} is broken: {in_short(error)}.") from error
    except ValueError as error:
        raise ValueError(f"{path} cannot be read: {in_short(error)}") from error


def in_short(error: Exception) -> str:
    """An error in one short line: a message may quote a file."""
    return textwrap.shorten(str(error), 300, placeholder=" ...")


def _check_entries(archive: zipfile.ZipFile, size: int) -> str:
    """Checks the list of entries against the size of the file; returns the folder of all."""
    tops, total = set(), 0
    for entry in archive.infolist():
        top, slash, inner = entry.filename.partition("/")
        if not (top and slash and inner) or ".." in entry.filename.split("/"):
            raise ValueError(
                f"it holds an entry {entry.filename[:80]!r}, which torch never writes."
            )
        if entry.compress_type != zipfile.ZIP_STORED or entry.flag_bits & 1:
            raise ValueError(f"its entry {entry.filename[:80]!r} is compressed or encrypted.")
        if entry.compress_size != entry.file_size:
            raise ValueError(f"its entry {entry.filename[:80]!r} has two sizes.")
        tops.add(top)
        total += entry.file_size
    # Entries that overlap could be read into far more memory than the file has bytes.
    if total > size:
        raise ValueError(f"its entries say {total} bytes, but the file has {size}.")
    if not any(entry.CRC for entry in archive.infolist()):
        for entry in archive.infolist():  # After torch.serialization.set_crc32_options(False).
            entry.CRC = None
    if len(tops) != 1:
        raise ValueError(f"it must hold one folder: got {len(tops)}.")
    (top,) = tops
    names = archive.namelist()
    if len(names) != len(set(names)):
        raise ValueError("it holds two entries of one name.")
    if f"{top}/constants.pkl" in names:
        raise ValueError("it is a program of TorchScript. Save its state_dict() with torch.save.")
    if f"{top}/data.pkl" not in names:
        raise ValueError("it holds no data.pkl.")
    if f"{top}/byteorder" in names and archive.read(f"{top}/byteorder") != b"little":
        raise ValueError("its numbers are not in little-endian order.")
    return top


class _Machine:
    """Follows the instructions of one pickle.

    Args:
        archive, top: The file, and the folder in it.
        size: The bytes of the file, which bound every tensor.
    """

    def __init__(self, archive: zipfile.ZipFile, top: str, size: int):
        self._archive, self._top, self._size = archive, top, size
        self._stack: list[Any] = []
        self._marked: list[list[Any]] = []  # The stacks below each mark.
        self._memo: dict[int, Any] = {}
        self._storages: dict[str, bytes] = {}

    def run(self) -> Any:
        length = self._archive.getinfo(f"{self._top}/data.pkl").file_size
        if length > MAX_PICKLE:
            raise ValueError(f"its data.pkl has {length} bytes: more than {MAX_PICKLE}.")
        program = self._archive.read(f"{self._top}/data.pkl")
        with warnings.catch_warnings():
            # Of letters in instructions that are refused as soon as they are read.
            warnings.simplefilter("ignore", DeprecationWarning)
            for instruction, argument, _ in pickletools.genops(program):
                if instruction.name == "STOP":
                    return self._stack.pop()
                self._step(instruction.name, argument)
        raise ValueError("its data.pkl does not end.")  # genops raises first.

    def _step(self, name: str, argument: Any) -> None:
        stack = self._stack
        match name:
            case "PROTO" | "FRAME":
                pass
            case "NONE":
                stack.append(None)
            case "NEWTRUE" | "NEWFALSE":
                stack.append(name == "NEWTRUE")
            case "BININT" | "BININT1" | "BININT2" | "BINFLOAT" | "BINUNICODE" | "SHORT_BINUNICODE":
                stack.append(argument)
            case "LONG1":
                if not -(2**63) <= argument < 2**63:
                    raise ValueError("it holds an integer of more than 64 bits.")
                stack.append(argument)
            case "EMPTY_DICT":
                stack.append({})
            case "EMPTY_LIST":
                stack.append([])
            case "EMPTY_TUPLE":
                stack.append(())
            case "TUPLE1" | "TUPLE2" | "TUPLE3":
                stack.append(tuple(reversed([stack.pop() for _ in range(int(name[-1]))])))
            case "MARK":
                self._marked.append(stack)
                self._stack = []
            case "TUPLE":
                items = self._since_mark()
                self._stack.append(tuple(items))
            case "APPEND":
                item = stack.pop()
                _of(list, stack[-1]).append(item)
            case "APPENDS":
                items = self._since_mark()
                _of(list, self._stack[-1]).extend(items)
            case "SETITEM":
                value, key = stack.pop(), stack.pop()
                self._set([key, value])
            case "SETITEMS":
                self._set(self._since_mark())
            case "BINPUT" | "LONG_BINPUT":
                self._memo[argument] = stack[-1]
            case "MEMOIZE":
                self._memo[len(self._memo)] = stack[-1]
            case "BINGET" | "LONG_BINGET":
                if argument not in self._memo:
                    raise ValueError("its data.pkl refers to an object that it does not hold.")
                stack.append(self._memo[argument])
            case "GLOBAL" | "INST":
                stack.append(_allowed(argument.replace(" ", ".", 1)))
            case "STACK_GLOBAL":
                name, module = _of(str, stack.pop()), _of(str, stack.pop())
                stack.append(_allowed(f"{module}.{name}"))
            case "BINPERSID":
                stack.append(self._storage(stack.pop()))
            case "REDUCE":
                arguments, callee = _of(tuple, stack.pop()), _of(_Name, stack.pop())
                stack.append(self._build(callee.name, arguments))
            case "BUILD":
                state, target = _of(dict, stack.pop()), stack[-1]
                # The versions of torch's modules, as an attribute of the state dict.
                if not isinstance(target, dict) or set(state) != {"_metadata"}:
                    raise ValueError("it sets attributes of an object.")
            case _:
                raise ValueError(
                    f"it uses the instruction {name}, which is not read. In torch, save with "
                    "pickle_protocol=2, which is the default."
                )

    def _since_mark(self) -> list[Any]:
        items, self._stack = self._stack, self._marked.pop()
        return items

    def _set(self, items: list[Any]) -> None:
        target = _of(dict, self._stack[-1])
        for key, value in zip(items[::2], items[1::2], strict=True):
            if type(key) not in (str, int):
                raise ValueError(f"a key must be a word or an integer: got {type(key).__name__}.")
            target[key] = value

    def _storage(self, about: Any) -> _Storage:
        match about:
            case ("storage", _Name(kind), str(key), str(), int(count)) if kind in _DTYPES:
                dtype = np.dtype(_DTYPES[kind])
            case ("storage", _Name(kind), str(key), str(), int(count)) if kind == _UNTYPED:
                dtype = np.dtype(np.uint8)
            case _:
                raise ValueError("it refers to something that is no storage of torch.")
        name = f"{self._top}/data/{key}"
        try:
            length = self._archive.getinfo(name).file_size
        except KeyError as error:
            raise ValueError(f"its storage {key[:80]!r} is missing.") from error
        if not 0 <= count * dtype.itemsize <= length:
            raise ValueError(
                f"its storage {key[:80]!r} has {length} bytes: too short for {count} of {dtype}."
            )
        if key not in self._storages:
            self._storages[key] = self._archive.read(name)
        return _Storage(np.frombuffer(self._storages[key], dtype, count))

    def _build(self, name: str, arguments: tuple) -> Any:
        match name, arguments:
            case "collections.OrderedDict", ():
                return {}
            case "torch._utils._rebuild_parameter", (np.ndarray() as array, bool(), hooks):
                if _is_empty(hooks):
                    return array
            case (
                "torch._utils._rebuild_tensor_v2",
                (_Storage(elements), int(offset), tuple(shape), tuple(strides), bool(), *more),
            ):
                # Hooks of autograd; and marks, as of a tensor that is to be conjugated when read.
                if len(more) in (1, 2) and all(_is_empty(x) for x in more):
                    return _strided(elements, offset, shape, strides, self._size)
            case (
                "torch._utils._rebuild_tensor_v3",
                (
                    _Storage(elements),
                    int(offset),
                    tuple(shape),
                    tuple(strides),
                    bool(),
                    hooks,
                    _Name(kind),
                ),
            ):
                is_known = kind in _DTYPES_OF_UNTYPED and elements.dtype == np.uint8
                if is_known and _is_empty(hooks):
                    dtype = np.dtype(_DTYPES_OF_UNTYPED[kind])
                    whole = len(elements) // dtype.itemsize * dtype.itemsize
                    elements = elements[:whole].view(dtype)
                    return _strided(elements, offset, shape, strides, self._size)
        raise ValueError(
            f"it gives {name} arguments that are not read, as for a tensor that is negated or "
            "conjugated when it is read. In torch, save x.resolve_neg().resolve_conj()."
        )


def _is_empty(thing: Any) -> bool:
    return thing is None or (isinstance(thing, dict) and not thing)


def _of(kind: type, thing: Any) -> Any:
    if not isinstance(thing, kind):
        raise ValueError(f"its data.pkl needs {kind.__name__}, but has {type(thing).__name__}.")
    return thing


def _allowed(name: str) -> _Name:
    if name.startswith(("torch.float8", "torch.float4")):
        raise ValueError(f"it holds a tensor of {name[:80]}, which is not read.")
    if name not in _ALLOWED:
        raise ValueError(
            f"it names {name[:80]!a}, which is not allowed: only tensors, numbers, words, lists "
            "and dicts are. In torch, save a state_dict() alone."
        )
    return _Name(name)


def _strided(
    elements: np.ndarray, offset: int, shape: tuple, strides: tuple, size: int
) -> np.ndarray:
    """The tensor of this shape in a storage: a view.

    Args:
        elements: Of the storage, `[count]`.
        offset: The index of the first element.
        shape, strides: Of the tensor, in elements.
        size: The bytes of the file. A tensor of stride 0 repeats elements, but no tensor may be
            larger than the whole file.
    """
    numbers = (offset, *shape, *strides)
    if len(shape) != len(strides) or not all(type(x) is int and x >= 0 for x in numbers):
        raise ValueError(
            "a tensor needs as many strides as sizes, none of them negative: got "
            f"offset {offset}, shape {shape} and strides {strides}."
        )
    if math.prod(shape) * elements.itemsize > size:
        raise ValueError(f"a tensor of shape {shape} is larger than the file.")
    if 0 in shape:
        return np.empty(shape, elements.dtype)
    last = offset + sum((x - 1) * stride for x, stride in zip(shape, strides, strict=True))
    if last >= len(elements):
        raise ValueError(
            f"a tensor of offset {offset}, shape {shape} and strides {strides} reaches beyond its "
            f"storage of {len(elements)} elements."
        )
    # The stride of an axis of one element is never used, and may be too large for NumPy.
    used = [stride if x > 1 else 0 for x, stride in zip(shape, strides, strict=True)]
    return np.lib.stride_tricks.as_strided(
        elements[offset:], shape, [stride * elements.itemsize for stride in used], writeable=False
    )
