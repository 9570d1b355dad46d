"""A run that needs too much memory is refused at the start, with the sizes."""

import importlib.util
from pathlib import Path

import jax
import pytest

from attention_jax.laboratory import sweep
from attention_jax.training import build, experiment, memory
from attention_jax.training.config import ConfigError, check, default_config, trials
from attention_jax.training.launch import LAUNCHERS
from attention_jax.training.memory import least_bytes

TRAIN = Path(__file__).parent.parent / "train.py"


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"train.batch_size": 2**24, "task.seq_length": 2**20}, "a batch 2.*TB"),
        ({"model.features": 2**20}, "parameters, gradients.*TB"),
        ({"model.features": 2**12, "model.num_layers": 1000}, "parameters, gradients"),
        ({"eval.num_batches": 2**24}, "held-out batches"),
    ],
)
def test_what_no_memory_holds_is_refused_before_it_is_made(changes, words):
    config = default_config()
    config.update_from_flattened_dict(changes)
    check(config)
    with pytest.raises(ConfigError, match=f"more memory than there is .*{words}") as refusal:
        experiment.build(config)
    assert "\n" not in str(refusal.value)


def test_what_must_be_held_is_no_more_than_what_is():
    for name in ("multihead", "selfhead"):
        config = default_config("recall")
        config.model.name, config.model.positions = name, "learned"
        if name == "multihead":
            config.model.num_kv_heads, config.model.mlp_ratio = 2, 2.5
        state = jax.eval_shape(build.make_functions(config).init)
        held = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state))
        gradients = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state.params))
        counted = least_bytes(config)["parameters, gradients and the optimizer's state"]
        assert 0.8 * (held + gradients) < counted <= held + gradients


def test_a_device_holds_its_share_of_the_trials(monkeypatch):
    config, axes = default_config(), {"seed": list(range(jax.device_count()))}
    config.train.batch_size, config.eval.num_batches = jax.device_count(), 1
    one = sum(least_bytes(config).values())
    monkeypatch.setattr(memory, "available_bytes", lambda: 2 * one)
    for name in ("single", "sharded"):
        config.launcher = name
        build = lambda name=name: sweep.build(trials(config, axes), axes, LAUNCHERS[name]())
        if name == "single":
            with pytest.raises(ValueError, match="more memory than there is"):
                build()
        else:
            build()


@pytest.mark.parametrize(
    "error", [MemoryError(), RuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 1 byte.")]
)
def test_memory_that_runs_out_is_one_line(error, monkeypatch, capsys):
    spec = importlib.util.spec_from_file_location("train", TRAIN)
    train = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(train)

    def run(*arguments):
        raise error

    monkeypatch.setattr(experiment, "run", run)
    assert train.main(["train.py"]) == 1
    err = capsys.readouterr().err
    assert err.startswith("train.py: out of memory: ")
    assert err.count("\n") == 1
