"""The programs of a run are compiled beside each other, each once."""

import re
import shutil
import threading
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from attention_jax.training import build, experiment
from attention_jax.training.ahead import Ahead
from attention_jax.training.config import default_config
from attention_jax.training.experiment import steps_per_second
from attention_jax.training.watch import make_watch


def test_programs_are_compiled_in_turn_beside_the_host():
    seen, goes_on = [], threading.Event()

    def slow():
        goes_on.wait()
        seen.append("slow")
        return "program"

    with Ahead() as ahead:
        ahead.start({"first": lambda: seen.append("first"), "slow": slow})
        ahead.wait("first")
        ahead.wait("no name")
        assert seen == ["first"]
        goes_on.set()
        ahead.wait()
        assert seen == ["first", "slow"]


def test_an_error_is_left_to_the_call():
    def fails():
        raise ValueError("as the call will")

    seen = []
    with Ahead() as ahead:
        ahead.start({"broken": fails, "whole": lambda: seen.append("whole")})
        ahead.wait("broken")
        ahead.wait("whole")
    assert seen == ["whole"]


def test_the_end_waits_for_one_program_and_starts_no_other():
    begun, goes_on, seen = threading.Event(), threading.Event(), []

    def slow():
        begun.set()
        goes_on.wait()
        seen.append("slow")

    with Ahead() as ahead:
        ahead.start({"slow": slow, "later": lambda: seen.append("later")})
        begun.wait()
        threading.Timer(0.1, goes_on.set).start()
    assert seen == ["slow"]
    ahead.wait()  # What was left out holds up no call.


def test_under_a_context_of_jax_the_call_compiles():
    seen = []
    with Ahead() as ahead, jax.default_matmul_precision("highest"):
        ahead.start({"program": lambda: seen.append("compiled")})
        ahead.wait()
    assert not seen


@pytest.mark.parametrize(
    ("compiled", "want"),
    [(0.0, 90 / (80 - 20 - 6)), (21.0, 60 / (80 - 30 - 6)), (75.0, 90 / (80 - 20 - 6))],
    ids=["before", "in the second epoch", "too late"],
)
def test_the_speed_is_that_of_the_epochs_without_compilation(compiled, want):
    ends = [(30, 20.0), (60, 30.0), (90, 60.0), (120, 80.0)]
    calls = [SimpleNamespace(called=called, seconds=6.0) for called in (5.0, 50.0, None)]
    assert steps_per_second(ends, calls, compiled) == pytest.approx(want)
    assert steps_per_second(ends[:1], calls, compiled) is None
    assert steps_per_second([], calls, compiled) is None


def test_what_a_run_does_not_call_is_not_compiled(tmp_path, monkeypatch):
    """A sharded run, even on one device; and a complete run whose result was lost."""
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path / "cache"))
    begun = []
    monkeypatch.setattr(Ahead, "start", lambda self, programs: begun.append([*programs]))
    config = default_config()
    config.task.seq_length, config.train.epochs, config.train.steps_per_epoch = 4, 2, 2
    config.optimizer.warmup_steps = 1
    config.launcher = "sharded"
    experiment.run(config)
    assert not begun
    config.launcher = "single"
    whole = experiment.run(config, tmp_path / "run")
    assert begun[0] == ["epoch", "evaluate", "baseline"]
    begun.clear()
    (tmp_path / "run" / "result.json").unlink()
    again = experiment.run(config, tmp_path / "run")
    assert not begun
    assert again.metrics["fingerprint"] == whole.metrics["fingerprint"]


@pytest.mark.parametrize(("launcher", "minutes"), [("single", 0), ("single", 0.01), ("pmap", 0)])
def test_a_run_compiles_each_program_once(launcher, minutes, tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path / "cache"))
    (tmp_path / "poem.txt").write_text("of clay\nand wattles made\n" * 20)
    config = default_config("text")
    changes = {
        "launcher": launcher,
        "task.path": str(tmp_path / "poem.txt"),
        "task.seq_length": 10,
        "model.features": 8,
        "model.num_layers": 1,
        "model.num_heads": 2,
        "optimizer.warmup_steps": 1,
        "train.steps_per_epoch": 3,
        "train.epochs": 3,
        "train.minutes": minutes,
        "eval.every_epochs": 2,
        "eval.num_batches": 2,
        "eval.heads": True,
        "eval.sample": 25,  # Longer than the context, so the text slides.
    }
    config.update_from_flattened_dict(changes)
    jax.config.update("jax_log_compiles", True)
    try:
        experiment.run(config, tmp_path / "run")
    finally:
        jax.config.update("jax_log_compiles", False)
    compiled = re.findall(r"Finished XLA compilation of jit\((\w+)\)", caplog.text)
    # jax calls all programs of pmap by one name.
    split = {"_fun": 2} if launcher == "pmap" else {"epoch": 1, "evaluate": 1}
    for name, times in {"init": 1, **split, "baseline": 1, "watch": 1, "_continue": 1}.items():
        assert compiled.count(name) == times, name
    assert compiled.count("_prefill") == 2  # Of the first token, and of what stays.


NUMBERS = {
    "seed": 5,
    "optimizer.learning_rate": 0.3,
    "optimizer.warmup_steps": 3,
    "optimizer.weight_decay": 0.2,
    "optimizer.clip_norm": 0.7,
    "optimizer.momentum": 0.6,
    "train.epochs": 4,
}


def with_every_number():
    config = default_config("teacher")
    config.update_from_flattened_dict(
        {
            "task.seq_length": 3,
            "model.features": 8,
            "model.num_heads": 2,
            "optimizer.name": "sgd",
            "optimizer.schedule": "cosine",
            "optimizer.warmup_steps": 1,
            "optimizer.weight_decay": 0.01,
            "optimizer.clip_norm": 0.1,
            "optimizer.momentum": 0.9,
            "train.batch_size": 8,
            "train.steps_per_epoch": 4,
            "train.epochs": 2,
            "eval.heads": True,
        }
    )
    return config


@pytest.mark.parametrize("launcher", ["single", "pmap", "sharded"])
def test_the_numbers_of_a_config_are_no_part_of_its_programs(launcher):
    """Else another seed or learning rate would compile anew."""

    def programs(**changes):
        config = with_every_number()
        config.launcher = launcher
        config.update_from_flattened_dict(changes)
        program = build.build(config)
        state = program.put_state(program.init())
        return {
            "init": program.init.lower().as_text(),
            "epoch": program.epoch.lower(state, program.rows).as_text(),
            "evaluate": program.evaluate.lower(state.params, program.rows).as_text(),
            "baseline": program.baseline.lower().as_text(),
            # Its partitioned calls hold an address of Python.
            "watch": re.sub(r'"\d+"', "", make_watch(config).lower(state.params).as_text()),
        }

    want = programs()
    assert programs(**NUMBERS) == want
    assert programs(**{"task.seq_length": 4})["epoch"] != want["epoch"]


def test_a_run_goes_on_where_init_is_compiled_at_a_lower_level(tmp_path):
    """As in each process but that of the tests."""
    disabled = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", False)
    try:
        config = with_every_number()
        config.checkpoint.every_epochs, config.eval.heads = 1, False
        whole = experiment.run(config, tmp_path)
        (tmp_path / "result.json").unlink()
        shutil.rmtree(max((tmp_path / "checkpoints").iterdir(), key=lambda x: int(x.name)))
        again = experiment.run(config, tmp_path)
        assert again.metrics["fingerprint"] == whole.metrics["fingerprint"]
    finally:
        jax.config.update("jax_disable_most_optimizations", disabled)


def test_a_program_uses_each_number_of_its_config():
    config = with_every_number()
    config.update_from_flattened_dict(NUMBERS)
    program, functions = build.build(config), build.make_functions(config)
    rows = np.arange(8)
    want, _ = jax.jit(functions.epoch)(functions.init(), rows)
    got, _ = program.epoch(program.put_state(program.init()), program.rows)
    assert optax.tree.norm(jax.tree.map(jnp.subtract, got.params, functions.init().params)) > 0.01
    for one, other in zip(*map(jax.tree.leaves, (got.params, want.params)), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("task", ["teacher", "memorization"])
def test_what_is_compiled_at_a_lower_level_has_the_same_bits(task):
    disabled = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", False)
    try:
        config = default_config(task)
        program, functions = build.build(config), build.make_functions(config)
        for name in ("init", "baseline"):
            want, got = jax.jit(getattr(functions, name))(), getattr(program, name)()
            for one, other in zip(*map(jax.tree.leaves, (got, want)), strict=True):
                if not jax.dtypes.issubdtype(one.dtype, jax.dtypes.prng_key):
                    np.testing.assert_array_equal(one, other)
    finally:
        jax.config.update("jax_disable_most_optimizations", disabled)
