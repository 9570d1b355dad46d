"""Mechanisms and tasks of one's own train by name, and what they lack is refused in a line."""

import json
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

import attention_jax
from attention_jax.laboratory import sweep
from attention_jax.tasks import TASKS
from attention_jax.training import build, experiment
from attention_jax.training.command import parse
from attention_jax.training.config import ConfigError, default_config, flatten
from attention_jax.training.model import make_sequence_model

ROOT = Path(__file__).parent.parent
MODULE = '''
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp

import attention_jax
from attention_jax.tasks import Task
from attention_jax.tasks.task import per_row, token_task
from attention_jax.types import Batch

dot_product = attention_jax.dot_product_attention


def uniform(query, key, value, *, mask=None):
    """Every visible key has the same weight."""
    return attention_jax.dot_product_attention(query * 0, key, value, mask=mask)


def needs_more(query, key, value, temperature, *, mask=None):
    return value


def no_mask(query, key, value):
    return value


def narrow(query, key, value, *, mask=None):
    return value[..., :1]


class Mean(nn.Module):
    """x is replaced by the mean of the positions so far."""

    num_heads: int

    @nn.compact
    def __call__(self, x, *, mask=None, deterministic=None, sow_weights=False):
        counts = jnp.arange(1, x.shape[-2] + 1)[:, None]
        return nn.Dense(x.shape[-1], name="out")(jnp.cumsum(x, axis=-2) / counts)


with_scale = functools.partial(attention_jax.MultiHeadAttention, scale=0.5)
number = 3


def last_token(*, seq_length: int = 8, vocab_size: int = 5, at_odd: bool = False) -> Task:
    """The label is the first token; at_odd asks at odd positions alone."""

    def make_row(rng):
        tokens = jax.random.randint(rng, (seq_length,), 0, vocab_size)
        weights = jnp.where(at_odd, jnp.arange(seq_length) % 2, jnp.ones(seq_length))
        return Batch(tokens, jnp.full((seq_length,), tokens[0]), weights.astype(jnp.float32))

    return token_task(
        "last_token", make_row, vocab_size=vocab_size, guess=("any token", vocab_size)
    )


def doubled(*, seq_length: int = 4, width: int = 8) -> Task:
    """Vectors, each of which must be doubled."""

    def make_row(rng):
        x = jax.random.normal(rng, (seq_length, width))
        return Batch(x, 2 * x, jnp.ones(seq_length))

    zero = ("the guess 0", lambda batch: jnp.mean(batch.targets**2))
    return Task("doubled", per_row(make_row), "squared_error", width, None, zero)


def changed(**changes):
    return lambda *, seq_length=8: last_token(seq_length=seq_length)._replace(**changes)


def sampling(sample):
    return changed(sample=sample)


def by_place(rng, rows):
    tokens = jnp.tile(jnp.arange(len(rows))[:, None], (1, 8))
    return Batch(tokens, tokens, jnp.ones(tokens.shape))


def beyond(rng, rows):
    tokens = jnp.tile(rows[:, None] + 4, (1, 8))
    return Batch(tokens, tokens, jnp.ones(tokens.shape))


def labels_missing(rng, rows):
    tokens = jnp.zeros((len(rows), 8), jnp.int32)
    return Batch(tokens, tokens[:, :3], jnp.ones(tokens.shape))


def too_long(rng, rows):
    tokens = jnp.zeros((len(rows), 9), jnp.int32)
    return Batch(tokens, tokens, jnp.ones(tokens.shape))


no_task = lambda *, seq_length=8: 3
no_length = lambda *, size=8: 3
no_default = lambda *, seq_length, vocab_size=3: 3
any_settings = lambda **settings: 3
a_list = lambda *, seq_length=8, sizes=(1, 2): 3
other_loss = changed(loss="hinge")
two_sizes = changed(inputs=3)
a_mask = changed(mask=jnp.ones((3, 3), bool))
a_vector = changed(baseline=("a vector", lambda batch: batch.weights))
place = sampling(by_place)
outside = sampling(beyond)
few_labels = sampling(labels_missing)
long_rows = sampling(too_long)
a_pair = sampling(lambda rng, rows: (rng, rows))
'''
SMALL = (
    *("--embed_dim=8", "--epochs=2", "--batch_size=4", "--seq_length=8"),
    *("--config.train.steps_per_epoch=2", "--config.model.num_layers=1"),
    *("--config.eval.num_batches=1",),
)


@pytest.fixture(scope="module", autouse=True)
def lab(tmp_path_factory):
    """The package `own_lab` of a user, with a module `parts`."""
    folder = tmp_path_factory.mktemp("user")
    (folder / "own_lab").mkdir()
    (folder / "own_lab" / "parts.py").write_text(MODULE)
    (folder / "own_lab" / "broken.py").write_text("import jax\n\nfolder = 1 / 0\n")
    sys.path.append(str(folder))
    yield folder
    sys.path.remove(str(folder))


def config_of(*arguments):
    return parse(["train.py", *SMALL, *arguments]).config


def refusal(work, *arguments):
    with pytest.raises(ConfigError) as caught:
        work(*arguments)
    message = str(caught.value)
    assert "\n" not in message
    return message


def own(name):
    return getattr(__import__("own_lab.parts").parts, name)


def test_a_function_of_ones_own_that_is_ours_is_the_layer_of_ours():
    layers = []
    for word in ("dot_product", "own_lab.parts:dot_product"):
        config = config_of("--task=copy", f"--config.model.mechanism={word}")
        layer = build.make_model(config, build.make_task(config)).blocks[0].attention
        layers.append(layer.clone(out_kernel_init=None))  # A function of its own in each model.
    assert layers[0] == layers[1]


def test_a_function_is_handed_over_from_python_or_by_path():
    uniform = own("uniform")
    for attention in ("multihead", "selfhead"):
        for mechanism in (uniform, "own_lab.parts:uniform"):
            model = make_sequence_model(8, attention=attention, mechanism=mechanism)
            assert model.blocks[0].attention.attention_fn is uniform


@pytest.mark.parametrize("name", ["Mean", "with_scale"])
def test_a_layer_of_ones_own_is_made_by_a_class_or_a_partial_of_one(name):
    model = make_sequence_model(
        8, 2, num_heads=2, causal=True, vocab_size=3, mechanism=f"own_lab.parts:{name}"
    )
    tokens = jnp.array([[1, 2, 0]])
    out, _ = model.init_with_output(jax.random.key(0), tokens)
    assert out.shape == (1, 3, 3)
    made = model.blocks[1].attention
    assert made.scale == 0.5 if name == "with_scale" else type(made) is own("Mean")
    if name == "Mean":
        with pytest.raises(NotImplementedError, match=r"own_lab\.parts:Mean' has no softcap=2"):
            make_sequence_model(8, num_heads=2, softcap=2.0, mechanism="own_lab.parts:Mean")


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("nowhere.at_all:fn", ["nowhere.at_all cannot be imported", "No module named 'nowhere'"]),
        ("own_lab.broken:fn", ["ZeroDivisionError: division by zero", "broken.py:3)"]),
        ("own_lab.parts:missing", ["parts.py) has no missing"]),
        ("own_lab.parts:number", ["must be a function, got a int"]),
        ("own_lab.parts:needs_more", ["must take (query, key, value, mask=None)", "'temperature'"]),
        ("own_lab.parts:no_mask", ["must take", "unexpected keyword argument 'mask'"]),
        ("own_lab.parts:narrow", ["attention_fn must return [..., T, N, V]", "narrow"]),
    ],
)
def test_a_mechanism_that_cannot_be_is_refused_in_a_line(path, words):
    message = refusal(build.build, config_of("--task=copy", f"--config.model.mechanism={path}"))
    assert "mechanism" in message or "attention_fn" in message
    assert not [word for word in words if word not in message], message


@pytest.mark.parametrize("path", ["a/b.py:fn", ":fn", "a:", "a:b:c", "a b:c", "1a:b"])
def test_what_is_no_path_is_refused_while_flags_are_read(path):
    for flag in ("--config.model.mechanism", "--task"):
        assert repr(path) in refusal(parse, ["train.py", f"{flag}={path}"])
    assert path in refusal(parse, ["train.py", f"--sweep=model.mechanism=linear,{path}"])
    with pytest.raises(ValueError, match=r"mechanism must be one of"):
        make_sequence_model(8, mechanism=path)


def test_a_layer_is_no_class_of_layers():
    with pytest.raises(TypeError, match="must be a class of layers, as MultiHeadAttention"):
        make_sequence_model(8, mechanism=attention_jax.MultiHeadAttention(2))


def test_the_settings_of_a_builder_are_fields_of_the_config():
    config = config_of("--task=own_lab.parts:last_token", "--config.task.at_odd=true")
    settings = {"seq_length": 8, "vocab_size": 5, "at_odd": True}
    assert config.task.to_dict() == {"name": "own_lab.parts:last_token"} | settings
    # The model of a task of tokens.
    ours, own = (flatten(default_config(name)) for name in ("recall", "own_lab.parts:last_token"))
    assert {x: v for x, v in ours.items() if not x.startswith("task.")} == {
        x: v for x, v in own.items() if not x.startswith("task.")
    }
    message = refusal(config_of, "--task=own_lab.parts:last_token", "--config.task.num_pairs=2")
    assert "config.task.num_pairs is unknown" in message
    message = refusal(config_of, "--task=own_lab.parts:last_token", "--config.task.vocab_size=x")
    assert "config.task.vocab_size must be an integer" in message


def test_a_run_of_ones_own_is_saved_by_name_and_loaded_and_resumed(lab, tmp_path, capsys):
    flags = ("--task=own_lab.parts:last_token", "--config.model.mechanism=own_lab.parts:uniform")
    config = config_of(*flags, "--config.eval.slices=at_odd=true")
    result = experiment.run(config, tmp_path / "run")
    assert "eval_accuracy@at_odd=true" in result.metrics
    noted = json.loads((tmp_path / "run" / "config.json").read_text())["config"]
    assert noted["model"]["mechanism"] == "own_lab.parts:uniform"
    assert noted["task"]["name"] == "own_lab.parts:last_token"
    loaded = attention_jax.load(tmp_path / "run")
    assert loaded.model.blocks[0].attention.attention_fn is own("uniform")
    assert loaded.predict([1, 2, 3]).shape == (3, 5)
    again = experiment.run(config, tmp_path / "run")
    assert again.metrics == result.metrics
    assert "nothing to do" in capsys.readouterr().out
    following = parse(["train.py", f"--init_from={tmp_path / 'run'}"]).config
    assert following.model.mechanism == "own_lab.parts:uniform"
    assert following.task.to_dict() == config.task.to_dict()
    # Elsewhere, where the module is not, its name is in the error.
    (tmp_path / "run" / "config.json").write_text(
        (tmp_path / "run" / "config.json").read_text().replace("own_lab", "gone_lab")
    )
    with pytest.raises(ValueError, match=r"gone_lab\.parts cannot be imported"):
        attention_jax.load(tmp_path / "run")
    message = refusal(parse, ["train.py", f"--init_from={tmp_path / 'run'}"])
    assert "--task (config.task.name)=gone_lab.parts:last_token" in message


def test_vectors_of_ones_own_are_as_wide_as_the_model():
    task = "--task=own_lab.parts:doubled"
    build.build(config_of(task))
    message = refusal(build.build, config_of(task, "--config.task.width=6"))
    assert "features=8" in message


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("missing", ["has no missing"]),
        ("number", ["must be a function"]),
        ("no_length", ["must have a setting seq_length"]),
        ("no_default", ["a default for each argument: missing a required", "'seq_length'"]),
        ("any_settings", ["must list its settings by name", "**settings"]),
        ("a_list", ["sizes=(1, 2)"]),
        ("no_task", ["must return a Task, got a int"]),
        ("other_loss", ["loss must be", "'hinge'"]),
        ("two_sizes", ["vocab_size=5 and inputs=3"]),
        ("a_mask", ["mask must be [T, T], T=8, got shape (3, 3)"]),
        ("a_vector", ["the baseline must be a scalar, got shape (2, 8)"]),
        ("a_pair", ["sample must return a Batch, got a tuple"]),
        ("few_labels", ["targets of 2 rows must be integer (2, 8), got int32 (2, 3)"]),
        ("long_rows", ["inputs of 2 rows must be integer (2, 8), got int32 (2, 9)"]),
        ("place", ["row r must be a function of (rng, r) alone", "inputs"]),
        ("outside", ["inputs must be tokens below 5, got 4 to 7"]),
    ],
)
def test_a_task_that_cannot_be_is_refused_in_a_line(name, words):
    message = refusal(lambda: build.build(config_of(f"--task=own_lab.parts:{name}")))
    assert f"--task (config.task.name)=own_lab.parts:{name}" in message
    assert not [word for word in words if word not in message], message


@pytest.mark.parametrize("name", TASKS)
def test_our_own_tasks_pass_what_is_asked_of_others(name):
    from attention_jax.tasks.task import check_task

    config = default_config(name)
    check_task(name, build.make_task(config), config.task.seq_length)


WORDS = ["dot_product", "own_lab.parts:uniform"]


@pytest.mark.slow  # Two programs.
def test_a_sweep_compares_ours_and_ones_own():
    config = config_of("--task=own_lab.parts:last_token")
    metrics = sweep.run(config, {"model.mechanism": WORDS}).metrics
    assert [x["model.mechanism"] for x in metrics["trials"]] == WORDS
    assert metrics["trials"][0]["fingerprint"] != metrics["trials"][1]["fingerprint"]


def test_a_sweep_names_what_it_cannot_find():
    command = parse(["train.py", *SMALL, f"--sweep=model.mechanism={','.join(WORDS)}"])
    assert command.sweep == {"model.mechanism": WORDS}
    axes = {"model.mechanism": ["own_lab.parts:gone", "linear"]}
    assert "parts.py) has no gone" in refusal(sweep.run, command.config, axes)


@pytest.mark.slow  # Each starts Python and jax.
@pytest.mark.parametrize("program", [["-m", "attention_jax", "train"], [str(ROOT / "train.py")]])
def test_a_module_in_the_current_directory_is_found(program, lab):
    flags = ("--task=own_lab.parts:last_token", "--config.model.mechanism=own_lab.parts:uniform")
    command = [sys.executable, *program, *SMALL, *flags]
    run = subprocess.run(command, cwd=lab, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
