"""Broken and malicious files of weights: none executes anything, each is one clear error."""

import io
import json
import os
import pickle
import random
import struct
import tracemalloc
import zipfile

import pytest
from torch_files import Raw, Tensor, archive, code, named

from attention_jax.interop import weights

# Every attack would make this file in the working directory.
MARK = "executed"
COMMAND = f"open({MARK!r}, 'w').close()"
SHELL = f"echo > {MARK}"
MAX_BYTES = 2**25  # Of memory while a file is read; no file here has a fifth of it.

CALL = {  # Pickles that run something when Python's own reader loads them.
    "os.system": (named("os", "system") + code((SHELL,)) + b"R.", "os.system"),
    "posix.system": (named("posix", "system") + code((SHELL,)) + b"R.", "posix.system"),
    "exec": (named("builtins", "exec") + code((COMMAND,)) + b"R.", "builtins.exec"),
    "eval": (named("builtins", "eval") + code((COMMAND,)) + b"R.", "builtins.eval"),
    "eval of Python 2": (
        named("__builtin__", "eval") + code((COMMAND,)) + b"R.",
        "__builtin__.eval",
    ),
    "open": (named("builtins", "open") + code((MARK, "w")) + b"R.", "builtins.open"),
    "Popen": (
        named("subprocess", "getoutput") + code((SHELL,)) + b"R.",
        "subprocess.getoutput",
    ),
    "a word of protocol 4": (
        b"\x80\x04" + code("builtins") + code("exec") + b"\x93" + code((COMMAND,)) + b"R.",
        "builtins.exec",
    ),
    "INST": (b"(" + code(COMMAND) + b"ibuiltins\nexec\n.", "builtins.exec"),
    "OBJ": (b"(" + named("builtins", "exec") + code(COMMAND) + b"o.", "builtins.exec"),
    "timeit": (
        named("timeit", "timeit") + code((COMMAND, "pass", Raw(named("time", "time")), 1)) + b"R.",
        "timeit.timeit",
    ),
    "inside of a dict": (
        code({"out.kernel": [Raw(named("builtins", "exec") + code((COMMAND,)) + b"R")]}) + b".",
        "builtins.exec",
    ),
    "a call inside of a call": (
        named("builtins", "eval")
        + code((Raw(named("builtins", "str") + code((COMMAND,)) + b"R"),))
        + b"R.",
        "builtins.eval",
    ),
    "arguments of what is allowed": (
        named("collections", "OrderedDict")
        + code(([(1, Raw(named("builtins", "exec") + code((COMMAND,)) + b"R"))],))
        + b"R.",
        "builtins.exec",
    ),
    "a state to set": (
        named("collections", "OrderedDict")
        + b")R"
        + code({"_metadata": Raw(named("builtins", "exec") + code((COMMAND,)) + b"R")})
        + b"b.",
        "builtins.exec",
    ),
}


@pytest.mark.parametrize("name", CALL)
def test_the_attacks_are_real(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    program, _ = CALL[name]
    pickle.loads(b"\x80\x02" + program)
    assert os.path.exists(MARK)


@pytest.mark.parametrize("name", CALL)
def test_nothing_is_executed_and_the_call_is_named(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    program, word = CALL[name]
    refused(archive(b"\x80\x02" + program, {}), "x.pth", word.split(" ")[0])
    # Outside of an archive, as torch wrote before 1.6.
    refused(b"\x80\x02" + program, "old.pth", "older than torch 1.6")


def refused(content, name, words):
    """Loading is one ValueError with the path and these words, and takes little memory."""
    with open(name, "wb") as file:
        file.write(content)
    tracemalloc.start()
    try:
        with pytest.raises(ValueError, match=words) as error:
            weights.load(name)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert not os.path.exists(MARK)
    assert str(error.value).startswith(name)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 500
    assert peak < MAX_BYTES


def tensor(count=4, shape=(2, 2), strides=(2, 1), **other):
    """A file with one tensor, whose storage has 16 bytes."""
    thing = {"a": Tensor("0", count, shape, strides, **other)}
    return archive(b"\x80\x02" + code(thing) + b".", {"0": bytes(16)})


def pickled(program, **options):
    return archive(b"\x80\x02" + program, {"0": bytes(16)}, **options)


WHOLE = tensor()
ELEMENTS = 2**22


def overlapping():
    """Four entries that are the same bytes of the file, where there is room for one."""
    size, file = ELEMENTS, io.BytesIO()
    with zipfile.ZipFile(file, "w") as entries:
        entries.writestr("model/data.pkl", b"\x80\x02N.")
        entries.writestr("model/data/0", bytes(size))
        for key in "123":
            entry = zipfile.ZipInfo(f"model/data/{key}")
            entry.header_offset = entries.getinfo("model/data/0").header_offset
            entry.file_size = entry.compress_size = size
            entry.CRC = entries.getinfo("model/data/0").CRC
            entries.filelist.append(entry)
    return file.getvalue()


def lying_size():
    """The list of entries says 2 GB for 16 bytes."""
    content = bytearray(WHOLE)
    place = content.rindex(b"model/data/0") - 46
    content[place + 20 : place + 28] = struct.pack("<II", 2**31 - 1, 2**31 - 1)
    return bytes(content)


def two_sizes():
    """An entry whose stored bytes are said to be 1 GB, and its contents 16 bytes."""
    content = bytearray(WHOLE)
    place = content.rindex(b"model/data/0") - 46
    content[place + 20 : place + 24] = struct.pack("<I", 2**30)
    return bytes(content)


def moved_entry():
    """An entry that begins beyond the end of the file."""
    content = bytearray(WHOLE)
    place = content.rindex(b"model/data/0") - 46
    content[place + 42 : place + 46] = struct.pack("<I", 2**31 - 1)
    return bytes(content)


def laughs():
    """Lists of ten lists of ten lists: 10**30 words in some hundred bytes."""
    program = b"](" + code("ha") * 10 + b"eq\0"
    for number in range(29):
        program += b"](" + (b"h" + bytes([number])) * 10 + b"eq" + bytes([number + 1])
    return program + b"}" + code("a") + b"h\x1ds."


def deep():
    return b"}" + code("a") + b"]" * 200 + b"a" * 199 + b"s."


BROKEN = {
    "empty": (b"", "no whole file"),
    "cut in the middle": (WHOLE[: len(WHOLE) // 2], "no whole file"),
    "cut at the end": (WHOLE[:-3], "no whole file"),
    "no archive": (b"weights" * 100, "no whole file"),
    "a damaged byte": (WHOLE.replace(bytes(16), bytes(15) + b"\1", 1), "CRC-32"),
    "a path that climbs": (pickled(b"N.", extra={"model/../../evil": b"x"}), "evil"),
    "a path from the root": (pickled(b"N.", extra={"/etc/evil": b"x"}), "/etc/evil"),
    "two folders": (pickled(b"N.", extra={"other/data.pkl": b"x"}), "one folder"),
    "no data.pkl": (archive(b"", {}).replace(b"data.pkl", b"data.xyz"), "no data.pkl"),
    "a compressed bomb": (
        archive(b"\x80\x02N.", {"0": bytes(ELEMENTS * 4)}, compression=zipfile.ZIP_DEFLATED),
        "compressed",
    ),
    "entries that overlap": (overlapping(), "entries say"),
    "a size that lies": (lying_size(), "entries say"),
    "an entry of two sizes": (two_sizes(), "two sizes"),
    "an entry beyond the end": (moved_entry(), "broken|no whole file"),
    "a program of TorchScript": (pickled(b"N.", extra={"model/constants.pkl": b""}), "TorchScript"),
    "numbers of the other order": (pickled(b"N.", extra={"model/byteorder": b"big"}), "endian"),
    "a large pickle": (pickled(b"N" * (2**22 + 1)), "data.pkl has"),
    "a cut pickle": (pickled(code({"a": [1, 2]})[:-3]), "cannot be read"),
    "an empty pickle": (archive(b"", {}), "cannot be read"),
    "a word of 4 GB": (pickled(b"X\xff\xff\xff\xffabc."), "cannot be read"),
    "bytes of 2**60": (pickled(b"\x8e" + struct.pack("<Q", 2**60) + b"abc."), "cannot be read"),
    "an integer of a megabyte": (
        pickled(b"\x8b" + struct.pack("<I", 2**20) + b"\1" * 2**20 + b"."),
        "LONG4",
    ),
    "an integer of 100 bytes": (pickled(b"\x8a\x64" + b"\1" * 100 + b"."), "64 bits"),
    "takes from nothing": (pickled(b"0."), "POP"),
    "a value from nothing": (pickled(b"}s."), "takes what is not there"),
    "a mark that is not there": (pickled(b"t."), "takes what is not there"),
    "an object that is not there": (pickled(b"r\xff\xff\xff\x7f."), "takes what is not there"),
    "an object of another number": (pickled(b"Nq\0h\1."), "refers to an object"),
    "the registry of extensions": (pickled(b"\x82\1."), "EXT1"),
    "bytes": (pickled(b"C\1a."), "SHORT_BINBYTES"),
    "a buffer": (pickled(b"\x97."), "NEXT_BUFFER"),
    "a class to make": (pickled(named("collections", "OrderedDict") + b")\x81."), "NEWOBJ"),
    "a key that is a list": (pickled(b"}]Ns."), "a key must be"),
    "a call of a word": (pickled(code("os.system") + b")R."), "needs _Name"),
    "attributes of what is allowed": (
        pickled(code("torch._utils") + code("_rebuild_tensor_v2.__globals__") + b"\x93."),
        "__globals__",
    ),
    "attributes to set": (
        pickled(named("collections", "OrderedDict") + b")R" + code({"clear": 1}) + b"b."),
        "sets attributes",
    ),
    "the loader of torch": (pickled(named("torch", "load") + code(("y",)) + b"R."), "torch.load"),
    "the hub of torch": (pickled(named("torch.hub", "load") + code(("y",)) + b"R."), "torch.hub"),
    "a function of NumPy": (
        pickled(named("numpy.core.multiarray", "_reconstruct") + b")R."),
        "numpy.core.multiarray._reconstruct",
    ),
    "a whole module": (pickled(named("torch.nn.modules.linear", "Linear") + b")\x81."), "Linear"),
    "a persistent word": (pickled(b"Pos.system\n."), "PERSID"),
    "a persistent tuple": (pickled(code(("module", "os", "system", "x", 1)) + b"Q."), "no storage"),
    "a list": (pickled(b"]."), "must hold a dict: got list"),
    "ever more lists": (pickled(laughs()), "more than 200000 parts"),
    "a dict in itself": (pickled(b"}q\0" + code("a") + b"h\0s."), "deep"),
    "lists in lists": (pickled(deep()), "deep"),
    "a storage that is missing": (
        archive(b"\x80\x02" + code({"a": Tensor("../0", 4, (4,), (1,))}) + b".", {"0": bytes(16)}),
        "'../0' is missing",
    ),
    "a storage that is too short": (tensor(count=5), "too short for 5"),
    "a storage of too wide a type": (tensor(kind="DoubleStorage"), "too short for 4 of float64"),
    "a storage of negative size": (tensor(count=-4), "too short"),
    "a storage of an unknown type": (tensor(kind="QInt8Storage"), "torch.QInt8Storage"),
    "a shape beyond the storage": (tensor(shape=(3, 2)), "reaches beyond"),
    "an offset beyond the storage": (tensor(offset=1), "reaches beyond"),
    "a negative offset": (tensor(offset=-1), "negative"),
    "a negative stride": (tensor(strides=(-2, 1)), "negative"),
    "a negative size": (tensor(shape=(-2, 2)), "negative"),
    "strides that lack": (tensor(strides=(1,)), "as many strides"),
    "a size that is a word": (tensor(shape=("2", 2)), "as many strides"),
    "an expanded tensor of 4 TB": (tensor(shape=(2**20, 2**20), strides=(0, 0)), "larger than"),
    "more axes than NumPy has": (tensor(shape=(1,) * 99, strides=(0,) * 99), "cannot be read"),
    "a tensor to be conjugated": (tensor(more=code({"conj": True})), "arguments"),
    "a type alone": (pickled(code({"a": Raw(named("torch", "FloatStorage"))}) + b"."), "no tensor"),
    "a storage alone": (
        pickled(
            code(
                {
                    "a": Raw(
                        code(("storage", Raw(named("torch", "FloatStorage")), "0", "", 4)) + b"Q"
                    )
                }
            )
            + b"."
        ),
        "no tensor",
    ),
    "one name twice": (pickled(code({"a": {"b": 1}, "a.b": 2}) + b"."), "two parts"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_file_is_one_clear_error(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    content, words = BROKEN[name]
    refused(content, "x.pth", words)


def header(entries, elements=b"", length=None):
    """A file of safetensors; a header that is text stays as it is."""
    text = (entries if isinstance(entries, str) else json.dumps(entries)).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + elements


def entry(shape=(2,), start=0, end=8, dtype="F32"):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [start, end]}


BROKEN_SAFETENSORS = {
    "empty": b"",
    "cut in the header": header({"a": entry()}, bytes(8))[:20],
    "cut in the elements": header({"a": entry()}, bytes(7)),
    "a header of 2**60 bytes": header({"a": entry()}, bytes(8), length=2**60),
    "a header longer than the file": header({"a": entry()}, bytes(8), length=10**6),
    "a header that is no JSON": header("{'a': 1}"),
    "a header that is a list": header("[]"),
    "lists in lists": header('{"a":' + "[" * 10**6),
    "elements that nobody has": header({"a": entry()}, bytes(12)),
    "elements that overlap": header({"a": entry(), "b": entry(start=4, end=12)}, bytes(12)),
    "a hole": header({"a": entry(), "b": entry(start=12, end=20)}, bytes(20)),
    "offsets beyond the end": header({"a": entry(end=2**40)}, bytes(8)),
    "offsets backwards": header({"a": entry(start=8, end=0)}, bytes(8)),
    "a shape of other size": header({"a": entry(shape=(3,))}, bytes(8)),
    "a shape of 2**80": header({"a": entry(shape=(2**40, 2**40))}, bytes(8)),
    "a negative size": header({"a": entry(shape=(-2,))}, bytes(8)),
    "an unknown type": header({"a": entry(dtype="F31")}, bytes(8)),
    "a type that JAX lacks": header({"a": entry(shape=(8,), dtype="F8_E4M3")}, bytes(8)),
    "a tensor inside of a tensor": header({"a": entry(), "a.b": entry(start=8, end=16)}, bytes(16)),
    "a tensor twice": header(
        f'{{"a": {json.dumps(entry())}, "a": {json.dumps(entry(start=8, end=16))}}}', bytes(16)
    ),
    "a name of a million parts": header({"." * 10**6: entry()}, bytes(8)),
    "a pickle": b"\x80\x02" + CALL["os.system"][0],
}


@pytest.mark.parametrize("name", BROKEN_SAFETENSORS)
def test_a_broken_file_of_safetensors_is_one_clear_error(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    refused(BROKEN_SAFETENSORS[name], "x.safetensors", "x.safetensors (is|holds|cannot)")


def damaged(content, rng):
    """The bytes with one to three changed, cut out, or put in."""
    content = bytearray(content)
    for _ in range(rng.randint(1, 3)):
        place, count = rng.randrange(len(content)), rng.randrange(6)
        content[place : place + rng.choice([count, 0])] = rng.randbytes(rng.choice([count, 0]))
    return bytes(content)


def test_random_damage_is_one_clear_error_or_another_number(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rng, refusals = random.Random(0), []
    tensor = Tensor("0", 4, (2, 2), (2, 1))
    program = b"\x80\x02" + code({"a.b": tensor, "c": [1, 2.5, None, True, "x"]}) + b"."
    plain = header({"a": entry(), "b.c": entry(start=8, end=16)}, bytes(16))
    for number in range(600):
        content, name = [
            (damaged(archive(program, {"0": bytes(16)}), rng), "x.pth"),
            (archive(damaged(program, rng), {"0": bytes(16)}), "x.pth"),
            (damaged(plain, rng), "x.safetensors"),
        ][number % 3]
        with open(name, "wb") as file:
            file.write(content)
        tracemalloc.start()
        try:
            weights.load(name)
        except ValueError as error:
            refusals.append((name, str(error)))
        finally:
            _, peak = tracemalloc.get_traced_memory()
            tracemalloc.stop()
        assert peak < MAX_BYTES
    assert len(refusals) > 300
    for name, message in refusals:
        assert message.startswith(f"{name} ")
        assert "\n" not in message
        assert len(message) < 500


def test_a_directory_is_no_file_of_weights(tmp_path):
    for name in ("x.pth", "x.safetensors"):
        (tmp_path / name).mkdir()
        with pytest.raises(ValueError, match=f"{name} is no file"):
            weights.load(tmp_path / name)
