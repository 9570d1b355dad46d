"""Promises of training a model of Hugging Face: `--init_from=DIRECTORY`, `--model=DIRECTORY`."""

import contextlib
import importlib.util
import io
import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from cases import assert_close

import attention_jax
from attention_jax import generate
from attention_jax.interop import huggingface
from attention_jax.interop.families import model_spec
from attention_jax.laboratory import export, sweep
from attention_jax.laboratory import generate as laboratory
from attention_jax.laboratory.generate import _of_directory, _of_run
from attention_jax.tasks.vocabulary import Bytes, Characters
from attention_jax.training import experiment
from attention_jax.training.build import make_functions
from attention_jax.training.command import TUNING_RATE, parse
from attention_jax.training.config import ConfigError, default_config
from attention_jax.training.loading import files_to_keep
from attention_jax.training.model import make_model

MODELS = Path(__file__).parent / "huggingface"
POEM = "".join(f"{'abcdefgh'[i % 8] * (1 + i % 5)} and so on\n" for i in range(60))
needs_tokenizers = pytest.mark.skipif(
    importlib.util.find_spec("tokenizers") is None, reason="needs tokenizers"
)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """The user's compile cache stays as it is."""
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path / "cache"))


@pytest.fixture
def place(tmp_path):
    """A directory of one's own."""
    return Path(shutil.copytree(MODELS / "gpt2", tmp_path / "gpt2"))


def tiny(place, task="copy", **changes):
    """Two epochs of two steps on short rows, from the parameters of a directory."""
    config = default_config(task)
    config.update_from_flattened_dict(
        {
            "init_from": str(place),
            "model.name": str(place),
            "task.seq_length": 8,
            "optimizer.learning_rate": 1e-3,
            "train.batch_size": 4,
            "train.steps_per_epoch": 2,
            "train.epochs": 2,
            "eval.num_batches": 1,
            "eval.every_epochs": 2,
        }
    )
    config.update_from_flattened_dict({k.replace("__", "."): v for k, v in changes.items()})
    return config


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run in `run`, whose directory has moved from `gpt2` to `moved`; its config and result."""
    folder = tmp_path_factory.mktemp("trained")
    config = tiny(shutil.copytree(MODELS / "gpt2", folder / "gpt2"))
    result = experiment.run(config, folder / "run")
    shutil.move(folder / "gpt2", folder / "moved")
    return folder, config, result


def refusal(call, *arguments):
    with pytest.raises(ConfigError) as error:
        call(*arguments)
    return str(error.value)


@pytest.mark.parametrize(
    "name", ["gpt2", *(pytest.param(x, marks=pytest.mark.slow) for x in ("llama", "gemma3"))]
)
def test_a_run_begins_with_the_parameters_of_the_directory(name, capsys):
    # At this rate, and without decay, they stay as they are.
    still = {"optimizer__learning_rate": 1e-30, "optimizer__weight_decay": 0.0}
    config = tiny(MODELS / name, **still)
    model, params = huggingface.load(MODELS / name, dtype=jnp.float32)
    batch = make_functions(config).held_out_batch()
    logits = model.apply({"params": params}, batch.inputs)
    if batch.positions is not None:
        logits = jnp.take_along_axis(logits, batch.positions[..., None], axis=1)
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch.targets)
    found = experiment.run(config)
    loss = found.metrics["eval_loss"]
    assert_close(loss, np.average(losses, weights=batch.weights), 1e-5)
    assert f"held-out loss before the first step: {loss:.4g}\n" in capsys.readouterr().out
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-7), found.params, params)


def test_a_run_outlives_its_directory_and_leaves_as_one(trained, tmp_path):
    folder, _, result = trained
    run = attention_jax.load(folder / "run")
    assert model_spec(run.model) == model_spec(huggingface.load(MODELS / "gpt2")[0])
    jax.tree.map(np.testing.assert_array_equal, run.params, result.params)
    export.main(["export", str(folder / "run"), str(tmp_path / "out")])
    model, params = huggingface.load(tmp_path / "out")
    tokens = jnp.array([[3, 1, 4, 1, 5]])
    assert_close(model.apply({"params": params}, tokens), run.predict(tokens), 1e-6)


def test_a_run_goes_on_elsewhere_but_not_with_another_model(trained, place):
    folder, config, first = trained
    config = config.copy_and_resolve_references()
    assert f"{folder / 'gpt2'} is no directory" in refusal(experiment.run, config, folder / "run")
    config.model.name = str(folder / "moved")
    config.init_from += "/."  # The same place.
    assert experiment.run(config, folder / "run").metrics == first.metrics
    file = place / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"layer_norm_epsilon": 1e-3}))
    config.model.name = str(place)
    message = refusal(experiment.run, config, folder / "run")
    assert "the file of config.model.name has changed" in message


@pytest.mark.parametrize("name", ["gpt2", pytest.param("gemma3", marks=pytest.mark.slow)])
def test_the_config_says_how_every_model_trains(name):
    """What it says reaches each layer and norm, and changes no parameter."""
    config = tiny(MODELS / name)
    task = make_functions(config).task
    plain = make_model(config, task)
    config.model.update({"dropout_rate": 0.25, "dtype": "bfloat16", "remat": "full"})
    model = make_model(config, task)
    block = model.blocks[0]
    assert [x.dropout_rate for x in (model, block, block.attention)] == [0.25] * 3
    parts = [model.embedding, block.attention, block.mlp, block.norm(), model.norm()]
    assert {x.dtype for x in parts} == {jnp.dtype(jnp.bfloat16)}
    assert model.remat is True
    tokens = jnp.array([[3, 1, 4, 1]])
    shapes = [jax.eval_shape(x.init, jax.random.key(0), tokens) for x in (plain, model)]
    assert shapes[0] == shapes[1]
    params = plain.init(jax.random.key(0), tokens)
    assert_close(model.apply(params, tokens), plain.apply(params, tokens), 0.1)
    rngs = {"dropout": jax.random.key(1)}
    drop = lambda x: x.apply(params, tokens, deterministic=False, rngs=rngs)
    assert (drop(plain) == plain.apply(params, tokens)).all()
    assert not np.allclose(drop(model), model.apply(params, tokens), atol=0.1)
    config.model.update({"dtype": "float32", "matmul_precision": "bfloat16"})
    block = make_model(config, task).blocks[0]
    rounded = attention_jax.bfloat16_dot_general
    assert block.attention.dot_general is block.mlp.dot_general is rounded


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model__features": 48}, "--embed_dim (config.model.features) must be left out: "),
        ({"model__positions": "alibi"}, "gpt2/config.json decides it. Got 'alibi'."),
        ({"task__seq_length": 40}, "--seq_length (config.task.seq_length) must be at most 32"),
        ({"task__vocab_size": 10_000}, "and the task copy has 10000"),
        ({"model__name": "./nowhere"}, "nowhere is no directory"),
    ],
)
def test_what_the_directory_cannot_do_is_refused(changes, words):
    assert words in refusal(experiment.run, tiny(MODELS / "gpt2", **changes))


def test_vectors_and_a_misspelt_word_are_refused():
    config = default_config()
    config.model.name = str(MODELS / "gpt2")
    assert "reads tokens" in refusal(experiment.run, config)
    assert "multihead, selfhead, or a directory" in refusal(parse, ["train.py", "--model=gpt2"])


def test_parameters_of_another_model_are_refused():
    message = refusal(experiment.run, tiny(MODELS / "gpt2", init_from=str(MODELS / "llama")))
    assert "the directory does not fit: blocks_0.attention." in message


@pytest.mark.slow
def test_the_trials_of_a_sweep_begin_with_the_directory(place, tmp_path):
    axes = {"optimizer.learning_rate": [1e-30, 1e-2]}
    # Decay would change the parameters also at this rate.
    config = tiny(place, optimizer__weight_decay=0.0)
    sweep.run(config, axes, tmp_path / "sweep")
    _, theirs = huggingface.load(place)
    shutil.rmtree(place)
    still, moved = (attention_jax.load(tmp_path / f"sweep/trials/00{i}") for i in (0, 1))
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-7), still.params, theirs)
    changed = jax.tree.map(lambda x, y: float(abs(x - y).max()), moved.params, theirs)
    assert max(jax.tree.leaves(changed)) > 1e-3


# On the command line -----------------------------------------------------------------------------


def test_a_directory_brings_its_model_and_for_text_its_tokenizer(place, monkeypatch):
    config = parse(["train.py", f"--init_from={place}"]).config
    assert (config.task.name, config.model.name) == ("text", str(place))
    assert config.task.tokens == "characters"  # It has no file of its own.
    (place / "tokenizer.json").write_text("{}")
    monkeypatch.chdir(place.parent)
    config = parse(["train.py", "--init_from=gpt2"]).config
    assert config.model.name == "./gpt2"
    assert config.task.tokens == str(Path("gpt2", "tokenizer.json"))
    assert config.optimizer.learning_rate == TUNING_RATE
    said = ["--init_from=gpt2", "--learning_rate=3e-4"]
    assert parse(["train.py", *said]).config.optimizer.learning_rate == 3e-4
    fresh = parse(["train.py", "--model=./gpt2"]).config  # From random parameters.
    assert (fresh.task.tokens, fresh.init_from) == (config.task.tokens, "")
    rate = default_config("text").optimizer.learning_rate
    assert fresh.optimizer.learning_rate == rate
    said = ["--config.task.tokens=bytes", "--config.model.dropout_rate=0.1"]
    config = parse(["train.py", "--init_from=gpt2", *said]).config
    assert (config.task.tokens, config.model.dropout_rate) == ("bytes", 0.1)
    assert parse(["train.py", "--init_from=gpt2", "--task=copy"]).config.task.name == "copy"


def test_a_model_of_the_hub_is_not_downloaded():
    message = refusal(parse, ["train.py", "--init_from=some/model"])
    assert "`hf download some/model --local-dir model`" in message


# Text --------------------------------------------------------------------------------------------


def with_tokenizer(place):
    """A `tokenizer.json` of the poem's letters."""
    definition = Characters("".join(sorted(set(POEM)))).definition
    (place / "tokenizer.json").write_text(definition, encoding="utf-8")
    (place.parent / "poem.txt").write_text(POEM, encoding="utf-8")
    changes = {"task__path": str(place.parent / "poem.txt"), "optimizer__warmup_steps": 1}
    return {"eval__sample": 20, "train__steps_per_epoch": 2, **changes}


@pytest.mark.slow  # A short one follows.
@needs_tokenizers
def test_a_directory_learns_a_text_and_writes_on(place, tmp_path):
    changes = with_tokenizer(place)
    tokens = str(place / "tokenizer.json")
    experiment.run(tiny(place, "text", task__tokens=tokens, **changes), tmp_path / "run")
    run = attention_jax.load(tmp_path / "run")
    found = generate(run.model, run.params, run.encode("aaaa "), 12, temperature=0, context=16)
    assert isinstance(run.decode(found), str)
    assert "step 4" in (tmp_path / "run" / "samples.txt").read_text()


@needs_tokenizers
def test_tokens_that_the_directory_does_not_mean_are_refused(place):
    message = refusal(experiment.run, tiny(place, "text", **with_tokenizer(place)))
    assert f"Those of its own are --config.task.tokens={place / 'tokenizer.json'}." in message


def test_characters_are_refused_where_the_tokenizer_is_missing(place):
    (place.parent / "poem.txt").write_text(POEM, encoding="utf-8")
    path = {"task__path": str(place.parent / "poem.txt"), "optimizer__warmup_steps": 1}
    message = refusal(experiment.run, tiny(place, "text", **path))
    assert "tokenizer.json is missing there" in message
    assert "do not stand for the characters of poem.txt" in message


@needs_tokenizers
def test_a_tuned_run_leaves_and_writes_as_its_directory_does(place, tmp_path, capsys):
    """With its first token, its end and its context."""
    changes = with_tokenizer(place)
    file = add_first_token(place)
    described = json.loads((place / "config.json").read_text()) | {"bos_token_id": 17}
    (place / "config.json").write_text(json.dumps(described))
    end = sorted(set(POEM)).index("\n")
    (place / "generation_config.json").write_text(json.dumps({"eos_token_id": [end, 18]}))
    (place / "tokenizer_config.json").write_text(json.dumps({"model_max_length": 32}))
    config = tiny(place, "text", task__tokens=str(file), **changes)
    experiment.run(config, tmp_path / "run")
    shutil.move(place, tmp_path / "gone")
    export.main(["export", str(tmp_path / "run"), str(tmp_path / "out")])
    for name in ("generation_config.json", "tokenizer_config.json", "tokenizer.json"):
        kept = json.loads((tmp_path / "out" / name).read_text())
        assert kept == json.loads((tmp_path / "gone" / name).read_text())
    found = json.loads((tmp_path / "out" / "config.json").read_text())
    assert found == described | {"dtype": "float32"}
    capsys.readouterr()
    texts = [written(tmp_path / x, "--temperature=0", "--tokens=40") for x in ("run", "out")]
    assert texts[0] == texts[1]
    authors = _of_run(tmp_path / "run"), _of_directory(tmp_path / "out")
    for author in authors:
        assert author.begin("a").tolist() == [17, *author.encode("a")]
        assert (author.ends, author.context) == ({end, 18}, 32)


@pytest.mark.slow
@needs_tokenizers
def test_a_new_model_leaves_without_the_token_that_begins_a_text(place, tmp_path):
    """Training has shown it none."""
    changes = with_tokenizer(place)
    add_first_token(place)
    config = tiny(place, "text", **changes, init_from="")
    config.task.tokens = str(place / "tokenizer.json")
    experiment.run(config, tmp_path / "new")
    export.main(["export", str(tmp_path / "new"), str(tmp_path / "fresh")])
    flags = ("--prompt=a", "--temperature=0", "--context=8")
    texts = [written(tmp_path / x, *flags) for x in ("new", "fresh")]
    assert texts[0] == texts[1]
    assert (
        _of_directory(tmp_path / "fresh").begin("a").tolist()
        == _of_run(tmp_path / "new").encode("a").tolist()
    )


def add_first_token(place):
    """Lets the tokenizer begin each text with token 17; returns its file."""
    file = place / "tokenizer.json"
    first = {"SpecialToken": {"id": "x", "type_id": 0}}
    whole = {"Sequence": {"id": "A", "type_id": 0}}
    special = {"x": {"id": "x", "ids": [17], "tokens": ["x"]}}
    adds = {"type": "TemplateProcessing", "single": [first, whole], "pair": [first, whole, whole]}
    definition = json.loads(file.read_text()) | {
        "post_processor": adds | {"special_tokens": special}
    }
    file.write_text(json.dumps(definition), encoding="utf-8")
    return file


def written(run, *flags):
    with contextlib.redirect_stdout(io.StringIO()) as out:
        laboratory.main(["attention-jax generate", str(run), *flags])
    return out.getvalue()


def test_a_run_of_other_tokens_keeps_no_special_ones(place):
    """The number that ends a text there would be any letter here."""
    described = json.loads((place / "config.json").read_text()) | {"eos_token_id": 3}
    (place / "config.json").write_text(json.dumps(described))
    (place.parent / "poem.txt").write_text(POEM, encoding="utf-8")
    path = {"task__path": str(place.parent / "poem.txt"), "optimizer__warmup_steps": 1}
    config = tiny(place, "text", init_from="", **path)
    kept = files_to_keep(config, make_functions(config).task)
    assert kept["config.json"] == described | dict.fromkeys(huggingface.SPECIAL_TOKENS)
    config = tiny(place)
    assert files_to_keep(config, make_functions(config).task) == {"config.json": described}


def test_tokens_beyond_the_text_are_left_out():
    """As by the library `tokenizers`: a model may have a larger table."""
    assert Characters("ab").decode([0, 7, 1]) == "ab"
    assert Bytes().decode([104, 300, 105]) == "hi"
