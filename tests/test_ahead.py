"""The programs of a run are compiled beside each other, each once."""

import re
import threading

import jax
import pytest

from attention_jax.training import experiment
from attention_jax.training.ahead import Ahead
from attention_jax.training.config import default_config


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


@pytest.mark.parametrize("minutes", [0, 0.01])
def test_a_run_compiles_each_program_once(minutes, tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path / "cache"))
    (tmp_path / "poem.txt").write_text("of clay\nand wattles made\n" * 20)
    config = default_config("text")
    changes = {
        "task.path": str(tmp_path / "poem.txt"),
        "task.seq_length": 10,
        "model.features": 6,
        "model.num_layers": 1,
        "model.num_heads": 1,
        "optimizer.warmup_steps": 1,
        "train.steps_per_epoch": 3,
        "train.epochs": 3,
        "train.minutes": minutes,
        "eval.every_epochs": 2,
        "eval.num_batches": 2,
        "eval.sample": 25,  # Longer than the context, so the text slides.
    }
    config.update_from_flattened_dict(changes)
    jax.config.update("jax_log_compiles", True)
    try:
        experiment.run(config, tmp_path / "run")
    finally:
        jax.config.update("jax_log_compiles", False)
    compiled = re.findall(r"Finished XLA compilation of jit\((\w+)\)", caplog.text)
    for name in ("init", "epoch", "evaluate", "baseline", "_prefill", "_continue"):
        assert compiled.count(name) == 1, name
