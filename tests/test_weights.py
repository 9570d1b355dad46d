"""Weights in and out: files read back unchanged, attacks that execute nothing, equal layers."""

import functools
import os
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from torch_files import Raw, Tensor, archive, code, named, saved

from attention_jax.interop import weights
from attention_jax.training import experiment
from attention_jax.training.command import parse
from attention_jax.training.config import ConfigError

N, H, D, T = 3, 5, 15, 7  # The width of torch's layer is that of all its heads.
RNG = np.random.default_rng(0)
X = RNG.standard_normal((2, T, D)).astype(np.float32)


def drawn(*shape):
    return (RNG.standard_normal(shape) / 3).astype(np.float32)


def same(got, want):
    """Two trees are equal, in structure, types and numbers."""
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert (a.dtype, a.shape) == (b.dtype, b.shape)
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


def close(got, want):
    np.testing.assert_allclose(np.asarray(got), np.asarray(want), rtol=1e-6, atol=1e-6)


# Files of safetensors ----------------------------------------------------------------------------

TYPES = "bool int8 uint8 int16 uint16 int32 uint32 int64 uint64 float16 bfloat16 float32 float64"


def test_a_tree_of_every_type_comes_back_unchanged(tmp_path):
    tree = {x: {"a": np.arange(6).reshape(2, 3).astype(jnp.dtype(x))} for x in TYPES.split()}
    tree["shapes"] = {"scalar": np.float32(3.5), "empty": np.zeros((0, 4)), "jax": jnp.ones((2, 1))}
    tree["order"] = {
        "f": np.asfortranarray(np.arange(6.0).reshape(2, 3)),
        "step": np.arange(9)[::2],
    }
    weights.save(tmp_path / "x.safetensors", tree)
    same(weights.load(tmp_path / "x.safetensors"), tree)
    assert os.listdir(tmp_path) == ["x.safetensors"]


def test_the_file_is_as_readable_as_others(tmp_path):
    weights.save(tmp_path / "x.safetensors", {"a": np.ones(2)})
    (tmp_path / "other").touch()
    assert (tmp_path / "x.safetensors").stat().st_mode == (tmp_path / "other").stat().st_mode


def test_numbers_of_another_byte_order_keep_their_values(tmp_path):
    weights.save(tmp_path / "x.safetensors", {"a": np.arange(3, dtype=">f4")})
    same(weights.load(tmp_path / "x.safetensors"), {"a": np.arange(3, dtype="f4")})


@pytest.mark.parametrize("name", ["a.b", "a\\", "\\.", "a\\b", ".", "", "..", "a/b", "é", "\n.\n"])
def test_a_name_with_dots_or_backslashes_comes_back(name, tmp_path):
    tree = {name: {"x": np.ones(1), name: np.zeros(2)}, "x": np.ones(3)}
    weights.save(tmp_path / "x.safetensors", tree)
    same(weights.load(tmp_path / "x.safetensors"), tree)


def test_every_tool_reads_the_plain_names(tmp_path):
    from safetensors.numpy import load_file

    weights.save(tmp_path / "x.safetensors", {"out": {"kernel": np.ones(2)}, "sinks": np.ones(3)})
    assert set(load_file(tmp_path / "x.safetensors")) == {"out.kernel", "sinks"}


@pytest.mark.parametrize(
    ("tree", "error", "words"),
    [
        ([np.ones(1)], TypeError, "nested dicts.*list"),
        ({"a": [np.ones(1)]}, TypeError, "list at 'a'"),
        ({"a": {"b": 3.0}}, TypeError, "float at 'a.b'"),
        ({"a": None}, TypeError, "NoneType at 'a'"),
        ({"a": np.ones(1, complex)}, TypeError, "complex128 at 'a'"),
        ({"a": np.array("word")}, TypeError, "<U4 at 'a'"),
        ({"a": jax.random.key(0)}, TypeError, "key<"),
        ({"a": {3: np.ones(1)}}, TypeError, "got 3 in 'a'"),
        ({"a": {}}, ValueError, "empty dict.*'a'"),
        ({"__metadata__": np.ones(1)}, ValueError, "__metadata__"),
        ({"\ud800": np.ones(1)}, ValueError, "UTF-8"),
        (functools.reduce(lambda tree, _: {"a": tree}, range(101), np.ones(1)), ValueError, "deep"),
    ],
)
def test_a_tree_that_would_not_come_back_is_refused(tree, error, words, tmp_path):
    with pytest.raises(error, match=words):
        weights.save(tmp_path / "x.safetensors", tree)
    assert not os.listdir(tmp_path)


def test_a_save_that_fails_leaves_the_earlier_file(tmp_path, monkeypatch):
    weights.save(tmp_path / "x.safetensors", {"a": np.ones(2)})

    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(weights, "save_file", fail)
    with pytest.raises(OSError, match="No space"):
        weights.save(tmp_path / "x.safetensors", {"a": np.zeros(2)})
    same(weights.load(tmp_path / "x.safetensors"), {"a": np.ones(2)})
    assert os.listdir(tmp_path) == ["x.safetensors"]


def test_what_is_no_path_or_another_ending_is_refused(tmp_path):
    for call in (weights.load, lambda path: weights.save(path, {})):
        with pytest.raises(TypeError, match="path must be a path: got 3"):
            call(3)
        with pytest.raises(ValueError, match=r"x\.npz"):
            call(tmp_path / "x.npz")
    for ending in ("safetensors", "pth"):
        with pytest.raises(FileNotFoundError, match="nowhere"):
            weights.load(tmp_path / f"nowhere.{ending}")
    with pytest.raises(FileNotFoundError, match="nowhere"):
        weights.save(tmp_path / "nowhere" / "x.safetensors", {})


# Files of torch ----------------------------------------------------------------------------------


def load_bytes(content, tmp_path, name="x.pth"):
    (tmp_path / name).write_bytes(content)
    return weights.load(tmp_path / name)


@pytest.mark.parametrize("ending", ["pth", "pt", "bin"])
def test_a_file_of_torch_is_read_without_torch(ending, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)  # To import it would be an error.
    types = [x for x in TYPES.split() if not x.startswith("uint") or x == "uint8"]
    tree = {x: np.arange(6).reshape(2, 3).astype(jnp.dtype(x)) for x in types}
    tree = {"layer": tree, "scalar": np.array(2.5), "empty": np.zeros((0, 4), np.float32)}
    same(load_bytes(saved(tree), tmp_path, f"x.{ending}"), tree)


def test_dotted_names_are_nested_and_plain_values_stay(tmp_path):
    noted = {"epoch": 3, "name": "multihead", "lr": 0.5, "heads": None, "on": True, "big": -(2**40)}
    got = load_bytes(saved({"a.b.c": np.ones(2), "a.d": [1, {"e.f": 2}], **noted}), tmp_path)
    np.testing.assert_array_equal(got["a"]["b"].pop("c"), np.ones(2))
    assert got == {"a": {"b": {}, "d": [1, {"e": {"f": 2}}]}, **noted}


def test_strides_offsets_and_shared_storages_are_kept(tmp_path):
    elements = np.arange(12, dtype=np.float32)
    tensors = {
        "whole": Tensor("0", 12, (3, 4), (4, 1)),
        "turned": Tensor("0", 12, (4, 3), (1, 4)),
        "part": Tensor("0", 12, (2, 2), (4, 2), 5),
        "repeated": Tensor("0", 12, (2, 3), (0, 1), 9),
        "last": Tensor("0", 12, (1,), (2**40,), 11),
        "none": Tensor("0", 12, (0, 2**40), (1, 1)),
    }
    program = b"\x80\x02" + code(tensors) + b"."
    got = load_bytes(archive(program, {"0": elements.tobytes()}), tmp_path)
    whole = elements.reshape(3, 4)
    want = {
        "whole": whole,
        "turned": whole.T,
        "part": elements[[[5, 7], [9, 11]]],
        "repeated": np.tile(elements[9:], (2, 1)),
        "last": elements[11:],
        "none": np.zeros((0, 2**40), np.float32),
    }
    same(got, want)
    assert np.shares_memory(got["whole"], got["turned"])
    assert not got["whole"].flags.writeable


def test_what_torch_saves_is_what_is_read(tmp_path):
    torch = pytest.importorskip("torch")
    layer = torch.nn.MultiheadAttention(4, 2)
    optimizer = torch.optim.Adam(layer.parameters())
    layer(*[torch.ones(3, 4)] * 3)[0].sum().backward()
    optimizer.step()
    whole = torch.arange(12.0).reshape(3, 4)
    tree = {
        "model": layer.state_dict(),
        "optimizer": optimizer.state_dict(),
        "parameter": torch.nn.Parameter(whole),
        "views": [whole.T, whole[1:, ::2], whole[:1].expand(3, 4), whole[0, 0]],
        "types": {
            x: torch.ones(2, dtype=getattr(torch, x))
            for x in ("int8", "bool", "half", "uint16", "uint32", "uint64")
        },
        "words": ("a", 1, -(2**50), 0.5, None, True),
    }

    def plain(value):
        if isinstance(value, dict):
            return {name: plain(inner) for name, inner in value.items()}
        if isinstance(value, list | tuple):
            return type(value)(plain(inner) for inner in value)
        return value.detach().numpy() if isinstance(value, torch.Tensor) else value

    for protocol in (2, 3, 4, 5):
        torch.save(tree, tmp_path / "x.pth", pickle_protocol=protocol)
        got, want = weights.load(tmp_path / "x.pth"), plain(tree)
        want["model"] = {
            "in_proj_weight": want["model"]["in_proj_weight"],
            "in_proj_bias": want["model"]["in_proj_bias"],
            "out_proj": {x: want["model"][f"out_proj.{x}"] for x in ("weight", "bias")},
        }
        assert jax.tree.structure(got["model"]) == jax.tree.structure(want["model"])
        for a, b in zip(jax.tree.leaves(got["model"]), jax.tree.leaves(want["model"]), strict=True):
            np.testing.assert_array_equal(a, b)
        assert got["words"] == want["words"]
        for part in ("parameter", "views", "types", "optimizer"):
            jax.tree.map(np.testing.assert_array_equal, got[part], want[part])
    torch.save({"a": torch.tensor([1.5], dtype=torch.bfloat16)}, tmp_path / "x.pth")
    same(weights.load(tmp_path / "x.pth"), {"a": np.array([1.5], jnp.bfloat16)})


def without_checksums(content):
    """A file as after `torch.serialization.set_crc32_options(False)`."""
    content = bytearray(content)
    for mark, place in ((b"PK\x03\x04", 14), (b"PK\x01\x02", 16)):
        at = content.find(mark)
        while at >= 0:
            content[at + place : at + place + 4] = bytes(4)
            at = content.find(mark, at + 4)
    return bytes(content)


def test_a_file_without_checksums_is_read(tmp_path):
    tree = {"a": np.arange(6, dtype=np.float32)}
    same(load_bytes(without_checksums(saved(tree)), tmp_path), tree)


@pytest.mark.parametrize("name", ["uint16", "uint32", "uint64"])
def test_tensors_of_unsigned_integers_are_read(name, tmp_path):
    array = np.array([[1, 2], [3, 2**16 - 1]], name)
    build = named("torch._utils", "_rebuild_tensor_v3") + b"("
    pid = ("storage", Raw(named("torch.storage", "UntypedStorage")), "0", "cpu", array.nbytes)
    build += code(pid) + b"Q" + code(0) + code((2, 2)) + code((2, 1)) + b"\x89"
    build += named("collections", "OrderedDict") + b")R" + named("torch", name) + b"tR"
    program = b"\x80\x02" + code({"a": Raw(build)}) + b"."
    same(load_bytes(archive(program, {"0": array.tobytes()}), tmp_path), {"a": array})
    narrow = build.replace(f"torch\n{name}\n".encode(), b"torch\nfloat8_e5m2\n")
    program = b"\x80\x02" + code({"a": Raw(narrow)}) + b"."
    with pytest.raises(ValueError, match=r"a tensor of torch\.float8_e5m2, which is not read"):
        load_bytes(archive(program, {"0": array.tobytes()}), tmp_path)


def test_dotted_names_join_dicts_in_any_order(tmp_path):
    one, two = np.ones(2), np.zeros(3)
    want = {"a": {"b": one, "c": two}}
    for tree in ({"a": {"b": one}, "a.c": two}, {"a.c": two, "a": {"b": one}}):
        jax.tree.map(np.testing.assert_array_equal, load_bytes(saved(tree), tmp_path), want)
    for tree in ({"a": {"c": one}, "a.c": two}, {"a.c": two, "a": {"c": one}}):
        with pytest.raises(ValueError, match="two parts of the name"):
            load_bytes(saved(tree), tmp_path)


# Runs and files ----------------------------------------------------------------------------------


def test_a_file_that_does_not_fit_is_refused_by_its_leaves(tmp_path):
    file = tmp_path / "x.safetensors"
    params = {"out": {"kernel": np.ones((2, 3), np.float32)}}
    weights.save(file, {"out": {"bias": np.ones(3)}})
    with pytest.raises(ConfigError, match="does not fit") as error:
        experiment.first_params(str(file), params)
    assert str(error.value).startswith(f"--init_from={file}: ")
    assert r"out.bias: wanted nothing, found float64[3]" in str(error.value)
    assert r"out.kernel: wanted float32[2, 3], found nothing" in str(error.value)
    (tmp_path / "x.pth").write_bytes(saved({"out": {"kernel": "words"}}))
    with pytest.raises(ConfigError, match=r"out\.kernel: wanted .*, found str"):
        experiment.first_params(str(tmp_path / "x.pth"), params)
    (tmp_path / "x.pt").write_bytes(b"no archive")
    with pytest.raises(ConfigError, match=r"--init_from=.*x\.pt: .*no whole file"):
        experiment.first_params(str(tmp_path / "x.pt"), params)
    with pytest.raises(ConfigError, match="there is no file"):
        experiment.first_params(str(tmp_path / "nowhere.safetensors"), params)


def test_a_file_of_weights_brings_no_config(tmp_path):
    config = parse(
        ["train.py", f"--init_from={tmp_path / 'x.safetensors'}", "--embed_dim=16"]
    ).config
    assert config.init_from == str(tmp_path / "x.safetensors")
    assert (config.model.features, config.task.name) == (16, "teacher")
