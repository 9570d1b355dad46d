"""Models of transformers: the same logits, the same tokens, there and back."""

import functools
import importlib.util
import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import assert_close
from flax import linen as nn
from huggingface.make import MODELS, answers, random_model

from attention_jax import generate, make_sequence_model
from attention_jax.interop import huggingface
from attention_jax.interop.families import describe, make_model, model_spec
from attention_jax.models import decoding

HERE = Path(__file__).parent / "huggingface"
HAS_PEER = all(importlib.util.find_spec(name) for name in ("torch", "transformers"))


def tensors(path):
    from safetensors.numpy import load_file

    return load_file(path)


@pytest.mark.parametrize("name", MODELS)
def test_logits_are_those_of_transformers(name):
    model, params = huggingface.load(HERE / name)
    want = np.load(HERE / name / "answers.npz")
    logits = jax.jit(model.apply)({"params": params}, want["tokens"])
    assert_close(logits, want["logits"], 1e-5)


QUICK = ("gpt2", "gemma3")  # Learned positions; windows, two bases.


@pytest.mark.parametrize(
    "name", [x if x in QUICK else pytest.param(x, marks=pytest.mark.slow) for x in MODELS]
)
def test_greedy_tokens_are_those_of_transformers(name):
    model, params = huggingface.load(HERE / name)
    want = np.load(HERE / name / "answers.npz")
    found = generate(model, params, want["tokens"], 10, temperature=0)
    np.testing.assert_array_equal(found, want["greedy"])


@pytest.mark.parametrize("name", MODELS)
def test_what_is_saved_are_the_tensors_that_were_loaded(name, tmp_path):
    huggingface.save(tmp_path, *huggingface.load(HERE / name))
    saved, given = (tensors(place / "model.safetensors") for place in (tmp_path, HERE / name))
    assert saved.keys() == given.keys()
    for tensor, array in given.items():
        np.testing.assert_array_equal(saved[tensor], array, err_msg=tensor)
    # The config describes the same model.
    models = [huggingface.load(place)[0] for place in (tmp_path, HERE / name)]
    assert model_spec(models[0]) == model_spec(models[1])


@pytest.mark.skipif(not HAS_PEER, reason="needs torch and transformers")
@pytest.mark.parametrize("name", MODELS)
def test_transformers_loads_what_was_saved(name, tmp_path):
    import torch
    from transformers import AutoModelForCausalLM

    huggingface.save(tmp_path, *huggingface.load(HERE / name))
    peer = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager").eval()
    want = np.load(HERE / name / "answers.npz")
    with torch.no_grad():
        logits = peer(torch.tensor(want["tokens"])).logits.numpy()
    assert_close(logits, want["logits"], 2e-6)  # Processors round their products differently.


@pytest.mark.skipif(not HAS_PEER, reason="needs torch and transformers")
@pytest.mark.parametrize("name", MODELS)
def test_the_answers_are_those_of_the_peer_that_is_installed(name):
    want = np.load(HERE / name / "answers.npz")
    for what, array in answers(random_model(*MODELS[name])).items():
        assert_close(array, want[what], 1e-5)


ROTATIONS = {
    "linear": {"type": "linear", "factor": 2.0},
    "dynamic": {"rope_type": "dynamic", "factor": 2.0},
    "yarn": {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 8},
    "yarn, implicit factor": {
        "rope_type": "yarn",
        "factor": None,
        "original_max_position_embeddings": 4,
    },
    "yarn, mscale": {
        "rope_type": "yarn",
        "factor": 8.0,
        "original_max_position_embeddings": 8,
        "mscale": 0.7,
        "mscale_all_dim": 1.3,
        "beta_fast": 4.0,
        "truncate": False,
    },
    "llama3": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 2.0,
        "original_max_position_embeddings": 16,
    },
}


@pytest.mark.skipif(not HAS_PEER, reason="needs torch and transformers")
@pytest.mark.parametrize("name", ROTATIONS)
def test_rotations_beyond_the_trained_length_are_those_of_transformers(name, tmp_path):
    import torch

    fields = MODELS["llama"][1] | {"head_dim": 16, "max_position_embeddings": 8}
    del fields["rope_parameters"]
    scaling = ROTATIONS[name]
    peer = random_model("llama", fields | {"rope_theta": 50.0, "rope_scaling": dict(scaling)})
    peer.save_pretrained(tmp_path)
    tokens = np.random.default_rng(0).integers(0, 19, (1, 30))
    with torch.no_grad():
        want = peer(torch.tensor(tokens)).logits.numpy()
    model, params = huggingface.load(tmp_path)
    assert_close(jax.jit(model.apply)({"params": params}, tokens), want, 1e-5)
    # The fields of transformers 4 mean the same.
    config = json.loads((tmp_path / "config.json").read_text())
    del config["rope_parameters"]
    config |= {"rope_theta": 50.0, "rope_scaling": scaling}
    (tmp_path / "config.json").write_text(json.dumps(config))
    again, params = huggingface.load(tmp_path)
    assert_close(jax.jit(again.apply)({"params": params}, tokens), want, 1e-5)


@pytest.fixture
def place(tmp_path):
    """A copy of a directory, and a function that changes fields of its config."""
    place = tmp_path / "llama"
    shutil.copytree(HERE / "llama", place)

    def change(**fields):
        config = json.loads((place / "config.json").read_text())
        fields = {name: value for name, value in (config | fields).items() if value is not ...}
        (place / "config.json").write_text(json.dumps(fields))
        return place

    return change


@pytest.mark.parametrize(
    ("fields", "error", "words"),
    [
        ({"model_type": "mamba"}, NotImplementedError, "model_type.*'mamba'"),
        ({"model_type": ...}, NotImplementedError, "model_type.*None"),
        ({"hidden_act": "quick_gelu"}, NotImplementedError, "quick_gelu"),
        ({"rope_parameters": {"rope_type": "longrope"}}, NotImplementedError, "longrope"),
        ({"rope_parameters": {"rope_type": "linear"}}, ValueError, "factor is missing"),
        ({"rope_parameters": "linear"}, ValueError, "rope_parameters.*'linear'"),
        ({"rope_parameters": ..., "rope_scaling": [2.0]}, ValueError, "rope_scaling.*2.0"),
        ({"rope_parameters": ..., "rope_theta": None}, ValueError, "rope_theta.*None"),
        (
            {"rope_parameters": {"rope_type": "linear", "factor": "2"}},
            ValueError,
            "factor must be a number, got '2'",
        ),
        (
            {"rope_scaling": {"type": "yarn", "factor": 9.0}},
            ValueError,
            "rope_scaling and rope_parameters differ in factor, rope_type",
        ),
        ({"hidden_size": ...}, ValueError, "hidden_size is missing"),
        ({"hidden_size": None}, ValueError, "hidden_size must be of the type int, got None"),
        ({"num_attention_heads": 0}, ValueError, "num_attention_heads must be a size"),
        ({"num_key_value_heads": "2"}, ValueError, "num_key_value_heads must be of the type int"),
        ({"attention_bias": None}, ValueError, "attention_bias must be of the type bool"),
        ({"vocab_size": 10**12}, ValueError, "vocab_size must be a size that a model can have"),
        ({"model_type": ["llama"]}, NotImplementedError, "model_type must be one of"),
        ({"hidden_size": 32}, ValueError, "embed_tokens.*shape"),
        ({"num_hidden_layers": 3}, ValueError, r"no tensor model\.layers\.2"),
        ({"num_hidden_layers": 1}, ValueError, r"no place for.*layers\.1"),
        ({"attention_bias": False}, ValueError, "no place for.*bias"),
        ({"tie_word_embeddings": "yes"}, (TypeError, ValueError), "tie_word_embeddings"),
        ({"num_attention_heads": "4"}, (TypeError, ValueError), "num_attention_heads"),
        ({"quantization_config": {}}, NotImplementedError, "quantization_config"),
        ({"text_config": {}}, NotImplementedError, "text_config"),
    ],
)
def test_what_a_config_asks_for_is_honoured_or_refused_by_name(place, fields, error, words):
    with pytest.raises(error, match=words):
        huggingface.load(place(**fields))


def test_a_layer_that_is_bidirectional_is_refused(tmp_path):
    shutil.copytree(HERE / "gemma", tmp_path / "gemma")
    path = tmp_path / "gemma" / "config.json"
    config = json.loads(path.read_text()) | {"use_bidirectional_attention": True}
    path.write_text(json.dumps(config))
    with pytest.raises(NotImplementedError, match="use_bidirectional_attention"):
        huggingface.load(path.parent)


def _shards(place, names=("model-1.safetensors", "model-2.safetensors")):
    """Writes the tensors as two files with an index."""
    from safetensors.numpy import save_file

    found = tensors(place / "model.safetensors")
    (place / "model.safetensors").unlink()
    where = {name: names[i % 2] for i, name in enumerate(sorted(found))}
    for i, file in enumerate(("model-1.safetensors", "model-2.safetensors")):
        save_file({n: found[n] for j, n in enumerate(sorted(found)) if j % 2 == i}, place / file)
    (place / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))


def test_parts_with_an_index_are_one_file(place):
    directory = place()
    _, want = huggingface.load(directory)
    _shards(directory)
    _, params = huggingface.load(directory)
    jax.tree.map(np.testing.assert_array_equal, params, want)


@pytest.mark.parametrize("newer", [0, 1])
def test_of_two_parts_with_a_tensor_the_one_in_the_index_counts(place, newer):
    from safetensors.numpy import save_file

    directory = place()
    _, want = huggingface.load(directory)
    _shards(directory)
    parts = [directory / f"model-{i}.safetensors" for i in (1, 2)]
    found = [tensors(part) for part in parts]
    name = sorted(found[newer])[0]
    save_file(found[1 - newer] | {name: found[newer][name] + 1}, parts[1 - newer])
    _, params = huggingface.load(directory)
    jax.tree.map(np.testing.assert_array_equal, params, want)


def test_a_directory_of_another_format_is_named(place):
    directory = place()
    (directory / "model.safetensors").rename(directory / "pytorch_model.bin")
    with pytest.raises(FileNotFoundError, match=r"It has pytorch_model\.bin: save it by transf"):
        huggingface.load(directory)


def test_what_is_saved_over_parts_is_what_is_loaded(place):
    directory = place()
    model, params = huggingface.load(directory)
    whole = (directory / "model.safetensors").read_bytes()
    _shards(directory)
    huggingface.save(directory, model, jax.tree.map(lambda x: x + 1, params))
    assert not (directory / "model.safetensors.index.json").exists()
    _, found = huggingface.load(directory)
    jax.tree.map(lambda x, y: np.testing.assert_array_equal(x, y + 1), found, params)
    # Other tools leave the index.
    _shards(directory)
    (directory / "model.safetensors").write_bytes(whole)
    _, found = huggingface.load(directory)
    jax.tree.map(np.testing.assert_array_equal, found, params)


def test_an_index_names_files_of_its_directory_only(place):
    directory = place()
    _shards(directory, ("../model-1.safetensors", "model-2.safetensors"))
    with pytest.raises(ValueError, match=r"weight_map.*'\.\./model-1\.safetensors'"):
        huggingface.load(directory)


@pytest.mark.parametrize(
    ("file", "content", "error"),
    [
        ("config.json", None, FileNotFoundError),
        ("config.json", b"{", ValueError),
        ("config.json", b"[]", ValueError),
        ("config.json", b"\xff\xfe", ValueError),
        ("model.safetensors", None, FileNotFoundError),
        ("model.safetensors", b"", ValueError),
        ("model.safetensors", b"\xff" * 64, ValueError),
        ("model.safetensors.index.json", b"{}", ValueError),
        ("model.safetensors.index.json", b'{"weight_map": {"a": "gone"}}', FileNotFoundError),
    ],
)
def test_a_broken_file_is_named(place, file, content, error):
    path = place() / file
    if "index" in file:
        path.with_name("model.safetensors").unlink()
    path.unlink(missing_ok=True)
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(error, match=r"config\.json|safetensors|gone"):
        huggingface.load(path.parent)


def test_names_may_lack_the_prefix_and_have_old_constants(tmp_path):
    from safetensors.numpy import save_file

    place = tmp_path / "gpt2"
    shutil.copytree(HERE / "gpt2", place)
    found = {
        name.removeprefix("transformer."): x
        for name, x in tensors(place / "model.safetensors").items()
    }
    found["h.0.attn.bias"] = np.ones((1, 1, 32, 32), np.float32)
    save_file(found, place / "model.safetensors")
    _, params = huggingface.load(place)
    jax.tree.map(np.testing.assert_array_equal, params, huggingface.load(HERE / "gpt2")[1])


@pytest.mark.parametrize("wrapper", ["_orig_mod.", "module.", "module._orig_mod."])
def test_names_may_have_the_prefix_of_a_wrapper(place, wrapper):
    from safetensors.numpy import save_file

    directory = place()
    want = huggingface.load(directory)[1]
    file = directory / "model.safetensors"
    save_file({wrapper + name: x for name, x in tensors(file).items()}, file)
    jax.tree.map(np.testing.assert_array_equal, huggingface.load(directory)[1], want)
    named = {f"other.{name}": x for name, x in tensors(file).items()}
    save_file({}, file)
    with pytest.raises(ValueError, match=r"has no tensor \S+; it has none at all"):
        huggingface.load(directory)
    save_file(named, file)
    with pytest.raises(ValueError, match=rf"has no tensor \S+; it has other\.{wrapper}"):
        huggingface.load(directory)


def test_parameters_keep_their_type_or_take_the_one_asked_for(place):
    from safetensors.numpy import save_file

    directory = place()
    found = {n: x.astype(jnp.bfloat16) for n, x in tensors(directory / "model.safetensors").items()}
    save_file(found, directory / "model.safetensors")
    model, params = huggingface.load(directory)
    assert {x.dtype for x in jax.tree.leaves(params)} == {jnp.dtype("bfloat16")}
    _, wide = huggingface.load(directory, dtype=jnp.float32)
    assert {x.dtype for x in jax.tree.leaves(wide)} == {jnp.dtype("float32")}
    want = np.load(HERE / "llama" / "answers.npz")
    logits = jax.jit(model.apply)({"params": params}, want["tokens"])
    assert logits.dtype == jnp.float32
    assert_close(logits, want["logits"], 0.05)
    huggingface.save(directory, model, params)
    saved = tensors(directory / "model.safetensors")
    for name, array in found.items():
        np.testing.assert_array_equal(saved[name], array)
    with pytest.raises(TypeError, match="dtype"):
        huggingface.load(directory, dtype="int8")


def test_a_head_that_is_no_copy_of_the_embedding_is_refused_beside_one_that_is_tied(place):
    from safetensors.numpy import save_file

    path = place(tie_word_embeddings=True) / "model.safetensors"
    with pytest.raises(ValueError, match=r"lm_head\.weight differs.*tie_word_embeddings"):
        huggingface.load(path.parent)
    found = tensors(path)
    found["lm_head.weight"] = found["model.embed_tokens.weight"].copy()
    save_file(found, path)
    assert huggingface.load(path.parent)[0].head is None


def test_the_first_releases_of_gemma_name_another_activation(tmp_path):
    shutil.copytree(HERE / "gemma", tmp_path / "gemma")
    path = tmp_path / "gemma" / "config.json"
    config = json.loads(path.read_text()) | {"hidden_act": "gelu"}
    path.write_text(json.dumps(config))
    assert model_spec(huggingface.load(path.parent)[0]) == model_spec(
        huggingface.load(HERE / "gemma")[0]
    )


def test_a_qwen3_of_no_head_size_has_that_of_transformers():
    config = json.loads((HERE / "qwen3" / "config.json").read_text())
    del config["head_dim"]
    _, model = make_model(config, jnp.float32)
    assert model.blocks[0].attention.head_dim == 128


@pytest.mark.parametrize("kind", ["I8", "F8_E4M3"])
@pytest.mark.parametrize("name", ["model.embed_tokens.weight", "model.layers.1.mlp.up_proj.weight"])
def test_a_quantized_tensor_is_refused_by_its_name(place, kind, name):
    path = place() / "model.safetensors"
    header, data = {}, b""  # The library cannot write every kind.
    for key, x in tensors(path).items():
        part = bytes(x.size) if key == name else x.tobytes()
        header[key] = {
            "dtype": kind if key == name else "F32",
            "shape": x.shape,
            "data_offsets": [len(data), len(data) + len(part)],
        }
        data += part
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
    with pytest.raises(NotImplementedError, match=rf"{name} is of the type {kind}"):
        huggingface.load(path.parent)


def test_a_name_of_the_hub_says_how_to_get_the_directory():
    words = r"gpt2 is no directory\. .*`hf download openai-community/gpt2 --local-dir gpt2`"
    with pytest.raises(FileNotFoundError, match=words):
        huggingface.load("openai-community/gpt2")


def test_a_model_of_no_family_is_not_saved(tmp_path):
    model, params = huggingface.load(HERE / "llama")
    odd = model.clone(blocks=[block.clone(residual=False) for block in model.blocks])
    words = r"llama comes closest, and has blocks\.0\.residual=True, not False"
    with pytest.raises(NotImplementedError, match=words):
        huggingface.save(tmp_path / "odd", odd, params)
    with pytest.raises(ValueError, match=r"params.*embedding"):
        huggingface.save(tmp_path / "odd", model, params | {"embedding": {}})
    with pytest.raises(ValueError, match="hidden_size=3"):
        huggingface.save(tmp_path / "odd", model, params, hidden_size=3)
    assert not (tmp_path / "odd").exists()
    huggingface.save(tmp_path / "odd", model, params, eos_token_id=7)
    assert json.loads((tmp_path / "odd" / "config.json").read_text())["eos_token_id"] == 7


LLAMA = {"norm": "rms", "mlp": "swiglu", "use_bias": False}


@pytest.mark.parametrize(
    ("family", "words"),
    [
        ("gpt_neox", {"positions": "rotary", "use_bias": False, "init_scale": 0.5}),
        ("gpt2", {"positions": "learned", "max_length": 16, "dropout_rate": 0.1}),
        ("llama", LLAMA | {"num_kv_heads": 2, "positions": "rotary", "remat": "full"}),
        ("mistral", LLAMA | {"window": 3, "positions": "rotary", "matmul_precision": "bfloat16"}),
    ],
)
def test_words_of_a_config_make_models_of_families(family, words, tmp_path):
    sizes = {"features": 16, "num_layers": 2, "num_heads": 4, "mlp_ratio": 4.0, "vocab_size": 20}
    plain = {name: x for name, x in words.items() if name != "matmul_precision"}
    given, exact = (make_sequence_model(**sizes, causal=True, **x) for x in (words, plain))
    tokens = jax.random.randint(jax.random.key(1), (2, 9), 0, 20)
    params = jax.jit(given.init)(jax.random.key(0), tokens)["params"]
    huggingface.save(tmp_path, given, params)
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == family
    want = jax.jit(exact.apply)({"params": params}, tokens)
    model, found = huggingface.load(tmp_path)
    assert_close(jax.jit(model.apply)({"params": found}, tokens), want, 2e-6)
    if HAS_PEER:
        import torch
        from transformers import AutoModelForCausalLM

        peer = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager").eval()
        with torch.no_grad():
            logits = peer(torch.tensor(np.asarray(tokens, np.int64))).logits.numpy()
        assert_close(logits, want, 5e-6)


@pytest.mark.parametrize(
    ("words", "difference"),
    [
        ({"short_conv": 4}, r"gpt_neox .* has blocks\.0\.conv=None, not ShortConvolution"),
        ({"num_kv_heads": 2}, r"gpt_neox .*attention\.num_kv_heads=4, not 2"),
        ({"causal": False}, r"gpt_neox .* has mask=causal\(\), not None"),
        (LLAMA | {"tie_embedding": False}, r"llama .* has head\.use_bias=False, not True"),
        ({"norm": "none"}, "model is of none of the families gpt2, "),
    ],
)
def test_a_model_of_words_that_is_of_no_family_says_why(words, difference):
    sizes = {"features": 16, "num_heads": 4, "mlp_ratio": 4.0, "vocab_size": 20}
    given = {"causal": True, "positions": "rotary"} | words
    with pytest.raises(NotImplementedError, match=difference):
        describe(make_sequence_model(**sizes, **given))


def test_parts_that_no_family_has_are_named():
    model, _ = huggingface.load(HERE / "llama")
    with pytest.raises(NotImplementedError, match=r"none of the families|blocks\.0"):
        describe(model.clone(blocks=[nn.Dense(16)]))
    odd = functools.partial(nn.Dense, use_bias=False)  # It needs a width.
    with pytest.raises(NotImplementedError, match=r"norm=RMSNorm, not"):
        describe(model.clone(blocks=[x.clone(output_norm=None, norm=odd) for x in model.blocks]))
    with pytest.raises(TypeError, match="must be a SequenceModel, got Dense"):
        describe(nn.Dense(3))


def test_sizes_that_follow_from_others_may_be_left_out(tmp_path):
    config = json.loads((HERE / "llama" / "config.json").read_text())
    config["num_key_value_heads"] = config["num_attention_heads"]
    _, model = make_model(config, jnp.float32)
    params = jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 4), int))["params"]
    sizes = {"num_kv_heads": None, "head_dim": None}
    blocks = [x.clone(attention=x.attention.clone(**sizes)) for x in model.blocks]
    huggingface.save(tmp_path / "saved", model.clone(blocks=blocks), params)
    assert model_spec(huggingface.load(tmp_path / "saved")[0]) == model_spec(model)


def test_a_model_whose_heads_do_not_divide_its_width_is_saved_where_transformers_takes_it(tmp_path):
    config = json.loads((HERE / "llama" / "config.json").read_text())
    config |= {"attention_bias": False, "mlp_bias": False, "num_attention_heads": 3}
    config |= {"num_key_value_heads": 3}  # The width is 16.
    _, model = make_model(config, jnp.float32)
    tokens = jnp.array([[3, 1, 4, 1, 5]])
    params = jax.jit(model.init)(jax.random.key(0), tokens)["params"]
    huggingface.save(tmp_path / "saved", model, params)
    saved = json.loads((tmp_path / "saved" / "config.json").read_text())
    assert saved["model_type"] not in ("llama", "gemma2", "gemma3_text")
    again, found = huggingface.load(tmp_path / "saved")
    run = lambda model, params: model.apply({"params": params}, tokens)
    assert_close(run(again, found), run(model, params), 1e-6)
    if HAS_PEER:
        from transformers import AutoModelForCausalLM

        AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    # Only Llama has these biases.
    _, biased = make_model(config | {"attention_bias": True, "mlp_bias": True}, jnp.float32)
    with pytest.raises(NotImplementedError, match="family"):
        huggingface.save(
            tmp_path / "other", biased, biased.init(jax.random.key(0), tokens)["params"]
        )


def test_a_dynamic_rotation_is_not_decoded(place):
    directory = place(rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4})
    model, _ = huggingface.load(directory)
    with pytest.raises(NotImplementedError, match=r"rotary_scaling=positions\.dynamic"):
        jax.eval_shape(decoding(model).init, jax.random.key(0), jnp.zeros((1, 4), int))


def test_the_tokenizer_is_that_of_the_file(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"tokenizer\.json"):
        huggingface.tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    tokenizers = pytest.importorskip("tokenizers")
    with pytest.raises(ValueError, match=r"tokenizer\.json"):
        huggingface.tokenizer(tmp_path)
    words = tokenizers.models.WordLevel({"the": 0, "cat": 1, "?": 2}, unk_token="?")
    own = tokenizers.Tokenizer(words)
    own.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    own.save(str(tmp_path / "tokenizer.json"))
    assert huggingface.tokenizer(tmp_path).encode("the cat").ids == [0, 1]


def test_a_qwen2_without_a_window_is_saved_as_one(tmp_path):
    shutil.copytree(HERE / "qwen2", tmp_path / "qwen2")
    file = tmp_path / "qwen2" / "config.json"
    fields = json.loads(file.read_text()) | {"use_sliding_window": False, "layer_types": None}
    file.write_text(json.dumps(fields))
    model, params = huggingface.load(tmp_path / "qwen2")
    huggingface.save(tmp_path / "saved", model, params)
    saved = json.loads((tmp_path / "saved" / "config.json").read_text())
    assert saved["model_type"] == "qwen2"
    again, _ = huggingface.load(tmp_path / "saved")
    assert model_spec(again) == model_spec(model)


@pytest.mark.skipif(not HAS_PEER, reason="needs torch and transformers")
@pytest.mark.parametrize(
    ("name", "fields"),
    [
        ("llama", {"original_max_position_embeddings": 4}),
        ("llama_yarn", {"original_max_position_embeddings": 4}),
        ("gpt_neox", {"rope_parameters": ..., "rotary_pct": 0.5, "partial_rotary_factor": 1.0}),
        (
            "gpt_neox",
            {"rope_parameters": ..., "rotary_pct": 0.5, "rotary_emb_base": 70.0, "rope_theta": 3.0},
        ),
        ("qwen2", {"use_sliding_window": False, "layer_types": ...}),
    ],
    ids=str,
)
def test_fields_that_contradict_count_as_in_transformers(name, fields, tmp_path):
    import torch
    from transformers import AutoModelForCausalLM

    shutil.copytree(HERE / name, tmp_path / "theirs")
    file = tmp_path / "theirs" / "config.json"
    config = {x: y for x, y in (json.loads(file.read_text()) | fields).items() if y is not ...}
    file.write_text(json.dumps(config))
    tokens = np.random.default_rng(0).integers(0, 19, (1, 30))
    model, params = huggingface.load(tmp_path / "theirs")
    got = jax.jit(model.apply)({"params": params}, tokens)
    huggingface.save(tmp_path / "ours", model, params)
    for place in ("theirs", "ours"):
        peer = AutoModelForCausalLM.from_pretrained(tmp_path / place, attn_implementation="eager")
        with torch.no_grad():
            assert_close(got, peer(torch.tensor(tokens)).logits.numpy(), 1e-5)


def test_a_saved_model_has_the_fields_that_are_given_and_no_end_of_its_own(place, tmp_path):
    model, params = huggingface.load(place())
    saved = tmp_path / "saved"
    huggingface.save(saved, model, params)
    assert json.loads((saved / "config.json").read_text())["eos_token_id"] is None
    huggingface.save(saved, model, params, max_position_embeddings=64, eos_token_id=[2, 3])
    fields = json.loads((saved / "config.json").read_text())
    assert (fields["max_position_embeddings"], fields["eos_token_id"]) == (64, [2, 3])
    assert model_spec(huggingface.load(saved)[0]) == model_spec(model)


@pytest.mark.parametrize(
    ("fields", "error", "words"),
    [
        ({"rope_theta": 3.0}, ValueError, "rope_theta=3.0 would change the model"),
        ({"partial_rotary_factor": 0.5}, ValueError, "partial_rotary_factor=0.5"),
        ({"model_type": "mistral"}, ValueError, "save says model_type by itself"),
        ({"dtype": "float16"}, ValueError, "save says dtype by itself"),
        ({"quantization_config": {}}, ValueError, "quantization_config"),
        ({"note": {1, 2}}, TypeError, "note must be of JSON's types"),
    ],
    ids=str,
)
def test_a_field_that_changes_the_model_is_refused_before_anything_is_written(
    place, fields, error, words
):
    kept = place()
    before = {x.name: x.read_bytes() for x in kept.iterdir()}
    model, params = huggingface.load(kept)
    with pytest.raises(error, match=words):
        huggingface.save(kept, model, params, **fields)
    assert {x.name: x.read_bytes() for x in kept.iterdir()} == before


def test_tensors_of_several_types_become_the_one_that_holds_all(place, tmp_path):
    from safetensors.numpy import save_file

    kept = place()
    arrays = tensors(kept / "model.safetensors")
    name = "model.embed_tokens.weight"
    mixed = arrays | {name: arrays[name].astype(np.float16)}
    save_file(mixed, kept / "model.safetensors")
    model, params = huggingface.load(kept)
    assert {x.dtype for x in jax.tree.leaves(params)} == {jnp.dtype("float32")}
    save_file({x: y.astype(np.float64) for x, y in arrays.items()}, kept / "model.safetensors")
    with pytest.raises(ValueError, match="float64, which jax does not compute in unless"):
        huggingface.load(kept)
    assert huggingface.load(kept, dtype=jnp.float32)[0].embedding.param_dtype == jnp.float32
    whole = jax.tree.map(lambda x: x.astype(jnp.int8), params)
    with pytest.raises(NotImplementedError, match="got int8"):
        huggingface.save(tmp_path / "saved", model, whole)


@pytest.mark.parametrize(
    ("name", "fields"),
    [
        ("llama", {"rope_parameters": None, "partial_rotary_factor": 0.5}),
        ("gemma3", {"attn_logit_softcapping": 0.4}),
    ],
    ids=str,
)
def test_what_transformers_would_not_honour_is_refused(name, fields, tmp_path):
    shutil.copytree(HERE / name, tmp_path / name)
    file = tmp_path / name / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))
    with pytest.raises(NotImplementedError, match=[*fields][-1]):
        huggingface.load(tmp_path / name)
