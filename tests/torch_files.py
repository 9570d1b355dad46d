"""Writes files as `torch.save` does, without torch, and broken ones as an attacker would.

It shares no line with the reader. The pickles are of protocol 2 and written by hand.
"""

import io
import struct
import zipfile
from typing import Any, NamedTuple

import numpy as np


class Tensor(NamedTuple):
    """A tensor in a storage, by the numbers that the file gives; wrong ones too."""

    storage: str
    count: int
    shape: tuple
    strides: tuple
    offset: int = 0
    kind: str = "FloatStorage"
    more: bytes = b""  # Of the arguments, after the hooks.


class Raw(NamedTuple):
    """Instructions that put one object on the stack."""

    code: bytes


KINDS = {
    "float64": "DoubleStorage",
    "float32": "FloatStorage",
    "float16": "HalfStorage",
    "bfloat16": "BFloat16Storage",
    "int64": "LongStorage",
    "int32": "IntStorage",
    "int16": "ShortStorage",
    "int8": "CharStorage",
    "uint8": "ByteStorage",
    "bool": "BoolStorage",
}


def code(thing: Any) -> bytes:
    """The instructions for an object."""
    match thing:
        case Raw(instructions):
            return instructions
        case Tensor():
            pid = ("storage", Raw(named("torch", thing.kind)), thing.storage, "cpu", thing.count)
            build = named("torch._utils", "_rebuild_tensor_v2") + b"(" + code(pid) + b"Q"
            build += code(thing.offset) + code(thing.shape) + code(thing.strides) + b"\x89"
            return build + named("collections", "OrderedDict") + b")R" + thing.more + b"tR"
        case bool() | None:
            return {True: b"\x88", False: b"\x89", None: b"N"}[thing]
        case int():
            size = thing.bit_length() // 8 + 1
            return b"\x8a" + bytes([size]) + thing.to_bytes(size, "little", signed=True)
        case float():
            return b"G" + struct.pack(">d", thing)
        case str():
            text = thing.encode()
            return b"X" + struct.pack("<I", len(text)) + text
        case tuple():
            return b"(" + b"".join(map(code, thing)) + b"t"
        case list():
            return b"](" + b"".join(map(code, thing)) + b"e"
        case dict():
            return b"}(" + b"".join(code(x) for pair in thing.items() for x in pair) + b"u"
    raise TypeError(thing)


def named(module: str, name: str) -> bytes:
    return f"c{module}\n{name}\n".encode()


def archive(
    program: bytes,
    storages: dict[str, bytes],
    extra: dict[str, bytes] | None = None,
    compression: int = zipfile.ZIP_STORED,
) -> bytes:
    """The bytes of a file with this `data.pkl`; `extra` entries by their whole names."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", compression) as entries:
        entries.writestr("model/data.pkl", program)
        if "model/byteorder" not in (extra or {}):
            entries.writestr("model/byteorder", b"little")
        for key, elements in storages.items():
            entries.writestr(f"model/data/{key}", elements)
        entries.writestr("model/version", b"3\n")
        for name, content in (extra or {}).items():
            entries.writestr(name, content)
    return file.getvalue()


def saved(thing: Any) -> bytes:
    """A file with nested dicts and lists of arrays, numbers and words."""
    storages: dict[str, bytes] = {}

    def convert(value):
        if isinstance(value, np.ndarray):
            key = str(len(storages))
            storages[key] = value.tobytes()
            strides = tuple(int(np.prod(value.shape[i + 1 :])) for i in range(value.ndim))
            kind = KINDS[value.dtype.name]
            return Tensor(key, value.size, value.shape, strides, kind=kind)
        if isinstance(value, dict):
            return {name: convert(inner) for name, inner in value.items()}
        return [convert(inner) for inner in value] if isinstance(value, list) else value

    program = b"\x80\x02" + code(convert(thing)) + b"."
    return archive(program, storages)
