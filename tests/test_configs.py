"""Every config file is a run that starts, and a report that is complete."""

import ast
import re
from pathlib import Path

import jax
import numpy as np
import pytest

from attention_jax.training.build import build
from attention_jax.training.config import check, load

FILES = sorted((Path(__file__).parent.parent / "configs").glob("*.py"))


def test_the_promised_configs_are_there():
    promised = {
        *("single_head", "multi_head", "grouped_query", "causal_window", "recall"),
        *("pmap", "smoke"),
    }
    assert promised <= {file.stem for file in FILES}


def first_step(file):
    config = load(str(file))
    check(config)
    with config.unlocked():
        config.train.steps_per_epoch = 1
        config.eval.num_batches = 1
    # The schedule may count on more steps than one; the rest stays as it is.
    config.optimizer.warmup_steps = min(config.optimizer.warmup_steps, config.train.epochs - 1)
    if config.launcher == "single" and jax.device_count() > 1:  # As in these tests.
        config.model.matmul_precision = "float32"
    return build(config)


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_the_first_step_can_be_traced(file):
    program = first_step(file)
    state, metrics = jax.eval_shape(program.epoch, program.init.eval_shape(), program.rows)
    assert state.step.shape == ()
    assert all(values.shape[-1] == 1 for values in metrics.values())


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_the_first_step_runs(file):
    program = first_step(file)
    state, metrics = program.epoch(program.put_state(program.init()), program.rows)
    assert int(state.step) == 1
    assert all(np.isfinite(values).all() for values in jax.device_get(metrics).values())


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_the_report_is_complete(file):
    report = ast.get_docstring(ast.parse(file.read_text()))
    assert "?" in report.splitlines()[0], "the question"
    assert re.search(rf"    .*train\.py --config=configs/{file.stem}\.py", report)
    measured = " ".join(report.partition("Measured: ")[2].split())
    assert re.search(r"\d+ steps", measured), "how many steps"
    assert re.search(r"\d (s|seconds)\b", measured), "in which time"
