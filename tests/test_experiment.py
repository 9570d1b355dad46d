"""A run gives the same result after any interruptions, and writes the promised files."""

import concurrent.futures
import contextlib
import errno
import functools
import io
import json
import os
import re
import shutil
import signal
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from attention_jax.interop import weights
from attention_jax.laboratory import export, runs
from attention_jax.training import build, clock, experiment, metrics
from attention_jax.training.checkpoint import fingerprint
from attention_jax.training.config import ConfigError, RunError, default_config
from attention_jax.training.metrics import Console, JsonLines, TensorBoard
from attention_jax.training.run_directory import LOCK, claim, owned, write_json

LAUNCHERS = ["single", "pmap", "sharded"]


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """The user's compile cache stays as it is."""
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path / "cache"))


@pytest.fixture(autouse=True, scope="module")
def compiled_once():
    """Equal configs share their programs: what is tested here is the loop around them."""
    build, programs = experiment.build, {}

    def cached(config):
        key = config.to_dict() | {"init_from": ""}
        key = json.dumps(key, sort_keys=True)
        if key not in programs:
            programs[key] = build(config)
        return programs[key]

    experiment.build = cached
    yield
    experiment.build = build


def tiny(**changes):
    """Six epochs of three steps, a checkpoint every second one."""
    config = default_config()
    config.update_from_flattened_dict(
        {
            "task.seq_length": 5,
            "model.features": 6,
            "model.num_heads": 2,
            "model.dropout_rate": 0.1,
            "optimizer.learning_rate": 0.03,
            "train.batch_size": 8,
            "train.steps_per_epoch": 3,
            "train.epochs": 6,
            "eval.num_batches": 2,
            "eval.every_epochs": 3,
            "checkpoint.every_epochs": 2,
        }
    )
    config.update_from_flattened_dict({k.replace("__", "."): v for k, v in changes.items()})
    return config


def rows_of(directory):
    return [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]


def without_time(rows):
    return [{name: value for name, value in row.items() if name != "seconds"} for row in rows]


# What a run leaves -------------------------------------------------------------------------------


def test_what_a_model_writes_moves_no_cursor():
    stream = io.StringIO()
    with contextlib.closing(Console(1, stream=stream)) as console:
        console.write(
            {"step": 1, "epoch": 1, "loss": 1.0}, "a\x1b[2J\x00\fb\u2028\u200d🙂\r\n\tc\n"
        )
    shown = stream.getvalue().split("\n")[1:]
    assert shown == ["    | a\\x1b[2J\\x00\\x0cb\\u2028\u200d🙂\\r", "    | \tc", "    | ", ""]


def test_a_run_leaves_what_it_returns(tmp_path, capsys):
    directory = tmp_path / "deep" / "run"
    result = experiment.run(tiny(), directory)
    assert {path.name for path in directory.iterdir()} == {
        *("config.json", "checkpoints", "metrics.jsonl", "tensorboard", "result.json")
    }
    assert json.loads((directory / "result.json").read_text()) == result.metrics
    assert result.metrics["step"] == 18
    assert result.metrics["fingerprint"] == fingerprint(result.params)
    assert result.metrics["num_params"] == 4 * (6 * 6 + 6)
    assert rows_of(directory) == result.history
    # A row for the first step, which is where the run came from, and one for each epoch. Within
    # an epoch, which is one program, nobody reads the clock.
    assert [row["step"] for row in result.history if "seconds" not in row] == [1]
    assert [row["step"] for row in result.history] == [1, 3, 6, 9, 12, 15, 18]
    assert [row["step"] for row in result.history if "eval_loss" in row] == [9, 18]
    assert result.metrics["first_loss"] == result.history[0]["loss"]
    assert result.metrics["eval_loss"] < result.metrics["first_loss"]

    found = json.loads((directory / "config.json").read_text())
    assert found["config"] == tiny().to_dict()
    assert found["versions"]["jax"] == jax.__version__
    assert sorted(path.name for path in (directory / "checkpoints").iterdir()) == ["12", "18"]
    assert any((directory / "tensorboard").iterdir())
    said = capsys.readouterr().out
    for words in ("first loss", "train loss", "held-out loss", "predicting the mean", "168 param"):
        assert words in said


def test_without_a_workdir_nothing_is_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with_directory = experiment.run(tiny(), "run")
    before = sorted(tmp_path.rglob("*"))
    result = experiment.run(tiny())
    assert sorted(tmp_path.rglob("*")) == before
    assert result.metrics["fingerprint"] == with_directory.metrics["fingerprint"]


def test_a_row_is_the_mean_since_the_row_before():
    metrics = {"loss": np.array([8.0, 4, 2]), "weight": np.ones(3), "bad_steps": np.zeros(3)}
    assert list(experiment.rows_of_epoch(tiny(), 1, metrics, {})) == [
        {"step": 1, "epoch": 1, "loss": 8.0},
        {"step": 3, "epoch": 1, "loss": 3.0},
    ]
    held_out = {"weight": np.float32(9), "accuracy": np.float32(0.5), "loss": np.float32(2)}
    assert list(experiment.rows_of_epoch(tiny(), 2, metrics, held_out)) == [
        {"step": 6, "epoch": 2, "loss": 14 / 3, "eval_loss": 2.0, "eval_accuracy": 0.5}
    ]
    one_step = {"loss": np.array([8.0]), "bad_steps": np.zeros(1)}
    short = tiny(train__steps_per_epoch=1)
    assert list(experiment.rows_of_epoch(short, 1, one_step, {})) == [
        {"step": 1, "epoch": 1, "loss": 8.0}
    ]
    metrics = {"loss": np.array([np.nan, 4, 2]), "bad_steps": np.array([1, 0, 0])}
    skipping = tiny(optimizer__max_skipped=1)
    assert list(experiment.rows_of_epoch(skipping, 1, metrics, {})) == [
        {"step": 1, "epoch": 1, "skipped": 1},
        {"step": 3, "epoch": 1, "loss": 3.0, "skipped": 0},
    ]


def slowed(function, seconds=0.3):
    """As a device that takes its time, and makes the host wait for it."""

    def call(*arguments):
        time.sleep(seconds)
        return jax.block_until_ready(function(*arguments))

    return call


def test_a_row_has_the_second_at_which_its_epoch_was_done(tmp_path, monkeypatch):
    program = experiment.build(tiny())
    slow = program._replace(epoch=slowed(program.epoch))
    monkeypatch.setattr(experiment, "build", lambda config: slow)
    # The writing of a row may take as long as an epoch, and is none of its business.
    write = experiment.RunDirectory.write
    monkeypatch.setattr(experiment.RunDirectory, "write", slowed(write, 0.1))
    result = experiment.run(tiny(), tmp_path)
    seconds = [row["seconds"] for row in result.history if "seconds" in row]
    assert min(np.diff(seconds)) > 0.2, seconds


def test_a_long_compilation_is_told_and_a_short_one_is_not(monkeypatch, capsys):
    program = experiment.build(tiny())
    slow = program._replace(epoch=slowed(program.epoch))
    monkeypatch.setattr(experiment, "build", lambda config: slow)
    for silence in (0.1, 1000):
        monkeypatch.setattr(metrics, "SILENCE", silence)
        experiment.run(tiny())
        before, *_ = capsys.readouterr().out.partition("epoch 1/6")
        assert ("compiling the training\n" in before) == (silence < 1)


def test_what_takes_long_is_told_beside_the_bar_of_a_terminal(monkeypatch):
    monkeypatch.setattr(metrics, "SILENCE", 0.3)
    stream = Terminal()
    with contextlib.closing(Console(6, stream=stream)) as console:
        for number in range(1, 8):  # None of them alone takes long.
            with console.busy(f"compiling program {number}"):
                time.sleep(0.1)
    assert "compiling program" in stream.getvalue()
    assert "\n" not in stream.getvalue()


def test_the_baseline_does_not_depend_on_the_launcher():
    results = [experiment.run(tiny(launcher=launcher)) for launcher in LAUNCHERS]
    baselines = {result.metrics["baseline_loss"] for result in results}
    assert len(baselines) == 1
    # Nor on a model: it is the spread of the held-out targets.
    assert 0.05 < baselines.pop() < 5


def test_slices_are_evaluated_beside_the_task(tmp_path, capsys):
    result = experiment.run(tiny(eval__slices="11"), tmp_path)
    # What a run of that length would find with these parameters.
    program = experiment.build(tiny(task__seq_length=11))
    expected = float(program.evaluate(result.params, program.rows)["loss"])
    assert result.metrics["eval_loss@11"] == pytest.approx(expected, rel=1e-5)
    assert rows_of(tmp_path)[-1]["eval_loss@11"] == result.metrics["eval_loss@11"]
    assert f"held-out loss at 11: {expected:.4g}" in capsys.readouterr().out
    assert not [name for name in result.metrics if "weight" in name]
    # Nothing else is another.
    assert result.metrics["fingerprint"] == experiment.run(tiny()).metrics["fingerprint"]


def test_a_task_that_holds_out_is_evaluated_on_what_it_holds_out(tmp_path, monkeypatch, capsys):
    """The held-out rows of this teacher are all 0, and so is every loss on them."""

    def holding_out(**settings):
        task = teacher(**settings)

        def zeros(rng, rows):
            batch = task.sample(rng, rows)
            return batch._replace(inputs=0 * batch.inputs, targets=0 * batch.targets)

        return task._replace(sample_held_out=zeros, held_out="rows of zeros")

    teacher = build.TASKS["teacher"]
    monkeypatch.setitem(build.TASKS, "teacher", holding_out)
    config = tiny(train__epochs=1, model__use_bias=False, eval__slices="7")
    result = experiment.run(config, tmp_path).metrics
    assert result["train_loss"] > 0.1
    assert result["eval_loss"] == result["eval_loss@7"] == result["baseline_loss"] == 0
    assert result["held_out"] == "rows of zeros"
    assert "held-out rows      rows of zeros" in capsys.readouterr().out


def test_the_result_says_how_much_of_a_small_space_was_seen(tmp_path, capsys):
    config = default_config("parity")
    config.update_from_flattened_dict(
        {
            "task.seq_length": 5,
            "model.features": 4,
            "model.num_layers": 1,
            "train.batch_size": 8,
            "train.steps_per_epoch": 2,
            "train.epochs": 2,
            "eval.num_batches": 1,
        }
    )
    words = "fresh rows of the same distribution; 16 possible rows, 32 drawn in training"
    assert experiment.run(config, tmp_path).metrics["held_out"] == words
    assert f"held-out rows      {words}\n" in capsys.readouterr().out


def test_what_cannot_be_built_leaves_the_directory_to_the_next(tmp_path):
    for wrong in ({"train__slices": "0"}, {"train__target": "accuracy=0.9"}):
        with pytest.raises(ConfigError):
            experiment.run(tiny(**wrong), tmp_path)
        assert not list(tmp_path.iterdir())


def test_a_step_trains_on_all_slices_together():
    """One step of plain gradient descent on the mean over every label of every part."""
    settings = {"optimizer__name": "sgd", "train__epochs": 1, "train__steps_per_epoch": 1}
    settings |= {"model__dropout_rate": 0.0}
    config = tiny(train__slices="11", **settings)
    program = experiment.build(config)
    before = program.init()
    after, metrics = program.epoch(program.put_state(program.init()), program.rows)

    key = jax.random.fold_in(jax.random.fold_in(jax.random.key(config.seed), build._TRAIN), 0)
    model = build.make_model(config, program.task)
    (other,) = build.make_slices(config, program.task, "train").values()
    batches = [program.task.sample(key, program.rows)]
    batches += [other.sample(jax.random.fold_in(key, 2**31 + 1), program.rows)]
    assert not np.allclose(batches[0].inputs, batches[1].inputs[:, : batches[0].inputs.shape[1]])

    def loss(params):
        errors = [(model.apply({"params": params}, b.inputs) - b.targets) ** 2 for b in batches]
        return jnp.concatenate([error.mean(axis=-1).ravel() for error in errors]).mean()

    value, grads = jax.jit(jax.value_and_grad(loss))(before.params)
    np.testing.assert_allclose(metrics["loss"][0], value, rtol=1e-5)
    rate = config.optimizer.learning_rate
    want = jax.tree.map(lambda x, grad: x - rate * grad, before.params, grads)
    chex.assert_trees_all_close(after.params, want, rtol=1e-5, atol=1e-6)


def test_learned_positions_reach_to_the_longest_slice():
    config = default_config("copy")
    config.model.positions, config.eval.slices = "learned", "64 8 vocab_size=16"
    model = build.make_model(config, build.make_task(config))
    assert model.positions.max_length == 64
    config.train.slices = "128"
    assert build.make_model(config, build.make_task(config)).positions.max_length == 128


def test_what_a_task_hides_is_hidden_from_the_model():
    config = default_config("compression")
    config.update_from_flattened_dict(
        {
            "task.seq_length": 7,
            "model.features": 8,
            "model.num_layers": 1,
            "model.tie_embedding": False,
            "optimizer.name": "sgd",
            "train.batch_size": 8,
            "train.steps_per_epoch": 1,
        }
    )
    program = experiment.build(config)
    state = program.init()
    before = np.array(state.params["embedding"]["embedding"])
    state, _ = program.epoch(program.put_state(state), program.rows)
    after = np.array(state.params["embedding"]["embedding"])
    # One layer: a question sees what the compression token, number 0, is, not yet what it has read.
    np.testing.assert_array_equal(after[1:], before[1:])
    assert (after[0] != before[0]).all()


# Bad steps ---------------------------------------------------------------------------------------


def longest(bad):
    """The length of the longest row of bad steps, and the number of its last step."""
    lengths = [0]
    for step in bad:
        lengths.append(lengths[-1] + 1 if step else 0)
    return max(lengths), lengths.index(max(lengths))


def test_bad_steps_are_skipped_up_to_as_many_as_allowed(hollow, tmp_path, at_step, capsys):
    changes = {"train__epochs": 12, "checkpoint__every_epochs": 3, "seed": 1}
    bad = hollow(tiny(**changes))
    most, last = longest(bad)
    between = last - last % 3
    assert between == 9, "the longest row lies on both sides of an epoch's end"
    config = tiny(optimizer__max_skipped=most, **changes)
    whole = experiment.run(config, tmp_path / "whole")
    assert whole.metrics["skipped"] == sum(bad)
    assert f"36 steps, {sum(bad)} of them skipped, in" in capsys.readouterr().out
    ends = [0, *(row["step"] for row in whole.history)]
    for row, begin, end in zip(whole.history, ends, ends[1:], strict=False):
        assert row["skipped"] == sum(bad[begin:end])
        assert ("loss" in row) == (row["skipped"] < end - begin)
    assert sound_json(tmp_path / "whole" / "metrics.jsonl") == whole.history

    stricter = tiny(optimizer__max_skipped=most - 1, **changes)
    words = f"step {last}, after {most - 1} skipped in a row: loss is nan"
    with pytest.raises(experiment.Diverged, match=words):
        experiment.run(stricter, tmp_path / "stricter")

    def crash():
        raise MemoryError

    # It goes on in the middle of the longest row, whose count the checkpoint must hold.
    calm = at_step(between + 3, crash)
    with pytest.raises(MemoryError):
        experiment.run(config, tmp_path / "cut")
    calm()
    assert os.listdir(tmp_path / "cut" / "checkpoints") == ["9"]
    result = experiment.run(config, tmp_path / "cut")
    assert result.metrics["fingerprint"] == whole.metrics["fingerprint"]
    assert without_time(result.history) == without_time(whole.history)


def test_a_run_whose_steps_were_all_skipped_has_no_result():
    history = [{"step": step, "epoch": 1, "skipped": 1, "seconds": 0.5} for step in (1, 2)]
    with pytest.raises(experiment.Diverged, match="all 2 steps were skipped"):
        experiment.result_metrics(tiny(optimizer__max_skipped=9), None, None, {}, history, 0.5)


def test_a_long_first_call_is_named_while_it_compiles_and_while_it_runs(monkeypatch):
    monkeypatch.setattr(metrics, "SILENCE", 0.05)
    stream = io.StringIO()

    def slow(x):
        time.sleep(0.3)
        return x

    class Waits:
        """A result that is not ready when the call returns."""

        def block_until_ready(self):
            time.sleep(0.3)

    with contextlib.closing(Console(1, stream=stream)) as console:
        call = clock.FirstCall(lambda: slow(Waits()), "the training", console.busy)
        call()
        call()
    assert stream.getvalue().splitlines() == [
        "compiling the training",
        "running the training for the first time",
    ]


# Interruptions -----------------------------------------------------------------------------------


def test_the_time_left_is_told_from_the_epoch_that_decides():
    stream = io.StringIO()
    with contextlib.closing(Console(None, stream=stream)) as console:
        for epoch, seconds in ((1, 30.0), (2, 33.0), (3, 44.0), (4, 50.0)):
            if epoch == 2:  # The rows come one epoch late; two evaluations took 5 s.
                console.set_epochs(4, (2, 38.0))
            console.write({"step": epoch, "epoch": epoch, "loss": 1.0, "seconds": seconds})
    lines = stream.getvalue().splitlines()
    assert "44.0 s, 0:06 left" in lines[2]
    assert not any("left" in line for line in (*lines[:2], lines[3]))


def test_the_pace_is_that_of_the_epochs_after_the_first(monkeypatch, capsys):
    program, now = experiment.build(tiny()), [0.0]

    def clocked(function, *seconds):
        """Every call takes the next of the seconds, and the last ones go on."""
        left = list(seconds)

        def call(*arguments):
            now[0] += left.pop(0) if len(left) > 1 else left[0]
            return function(*arguments)

        return call

    def build(config):
        epoch, evaluate = clocked(program.epoch, 100, 1), clocked(program.evaluate, 50, 2)
        return program._replace(epoch=epoch, evaluate=evaluate)

    monkeypatch.setattr(experiment, "build", build)
    for module in (experiment, clock):
        monkeypatch.setattr(module, "time", SimpleNamespace(perf_counter=lambda: now[0]))

    class Finish:  # Without a thread, which would read this clock too late.
        def __init__(self, arrays):
            self.time = functools.partial(float, now[0])

    monkeypatch.setattr(experiment, "Finish", Finish)
    result = experiment.run(tiny())
    # Epochs 2 to 6, of three steps and one second each, and the second evaluation.
    np.testing.assert_allclose(result.metrics["steps_per_second"], 15 / (5 + 2), rtol=1e-3)
    assert "once compiled" in capsys.readouterr().out
    result = experiment.run(tiny(train__epochs=1))
    np.testing.assert_allclose(result.metrics["steps_per_second"], 3 / (100 + 50), rtol=1e-3)
    assert "compiled" not in capsys.readouterr().out


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_a_crashed_run_ends_like_an_uninterrupted_one(launcher, tmp_path, at_step):
    config = tiny(launcher=launcher)
    whole = experiment.run(config, tmp_path / "whole")

    def crash():
        raise MemoryError

    calm = at_step(15, crash)
    with pytest.raises(MemoryError):
        experiment.run(config, tmp_path / "cut")
    calm()
    assert [row["step"] for row in rows_of(tmp_path / "cut")] == [1, 3, 6, 9, 12, 15]
    assert not (tmp_path / "cut" / "result.json").exists()
    # What a process leaves that is killed in the middle of a line.
    with open(tmp_path / "cut" / "metrics.jsonl", "a") as file:
        file.write('{"step": 18, "epo')

    result = experiment.run(config, tmp_path / "cut")
    assert result.metrics["fingerprint"] == whole.metrics["fingerprint"]
    assert without_time(rows_of(tmp_path / "cut")) == without_time(whole.history)
    assert without_time(result.history) == without_time(whole.history)
    timeless = ("seconds", "steps_per_second")
    for name in whole.metrics.keys() - set(timeless):
        assert result.metrics[name] == whole.metrics[name]


@pytest.fixture
def hangups():
    """SIGHUP as in a terminal, also where the tests run under nohup."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


@pytest.mark.usefixtures("hangups")
@pytest.mark.parametrize(
    ("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGHUP, 129)]
)
def test_a_signal_saves_and_the_rerun_continues(number, status, tmp_path, at_step, capfd):
    before = signal.getsignal(number)
    calm = at_step(9, lambda: os.kill(os.getpid(), number))
    with pytest.raises(experiment.Interrupted, match=signal.Signals(number).name) as stop:
        experiment.run(tiny(), tmp_path)
    calm()
    name = signal.Signals(number).name
    heard = f"{name}: stops after this epoch; a second one stops at once.\n"
    assert capfd.readouterr().err.endswith(heard)
    assert stop.value.status == status
    assert signal.getsignal(number) == before
    stopped_at = rows_of(tmp_path)[-1]["step"]
    assert 9 <= stopped_at < 18
    assert str(stopped_at) in os.listdir(tmp_path / "checkpoints")
    assert f"step {stopped_at}" in str(stop.value)

    result = experiment.run(tiny(), tmp_path)
    assert result.metrics["fingerprint"] == experiment.run(tiny()).metrics["fingerprint"]


def test_a_run_under_nohup_hears_no_sighup(tmp_path, at_step):
    before, sent = signal.signal(signal.SIGHUP, signal.SIG_IGN), []
    at_step(9, lambda: sent.append(os.kill(os.getpid(), signal.SIGHUP)))
    try:
        assert experiment.run(tiny(), tmp_path).metrics["step"] == 18
        assert sent
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_run_that_diverges_stops_and_keeps_the_last_good_checkpoint(tmp_path, monkeypatch):
    program = experiment.build(tiny())

    def poisoned(state, rows):
        epoch = int(state.step) // 3 + 1
        state, metrics = program.epoch(state, rows)
        if epoch == 4:
            metrics["loss"] = metrics["loss"].at[2].set(np.nan)
            metrics["bad_steps"] = metrics["bad_steps"].at[2].set(1)
        return state, metrics

    config = tiny()
    monkeypatch.setattr(experiment, "build", lambda config: program._replace(epoch=poisoned))
    for _ in range(2):  # A rerun meets the same end, and does no harm.
        with pytest.raises(experiment.Diverged, match=r"step 12: .*loss is nan") as stop:
            experiment.run(config, tmp_path)
        assert "\n" not in str(stop.value)
        assert stop.value.status == 1
        assert os.listdir(tmp_path / "checkpoints") == ["6"]
        assert [row["step"] for row in rows_of(tmp_path)][-1] == 9
        assert not (tmp_path / "result.json").exists()


def sound_json(path):
    """The objects of a file, in which NaN and Infinity are no numbers."""

    def refuse(word):
        raise ValueError(f"{path} holds {word}")

    text = path.read_text()
    texts = text.splitlines() if path.suffix == ".jsonl" else [text]
    return [json.loads(line, parse_constant=refuse) for line in texts]


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_parameters_that_break_unseen_are_not_saved(launcher, tmp_path, monkeypatch):
    """The row of a position that training never sees becomes infinite at step 10."""
    make_optimizer = build.make_optimizer

    def break_last_row(updates, state, params=None):
        embed = updates["positions"]["table"]["embedding"]
        rows = jnp.arange(len(embed))[:, None]
        embed = jnp.where((state == 9) & (rows == len(embed) - 1), jnp.inf, embed)
        return updates | {"positions": {"table": {"embedding": embed}}}, state + 1

    def breaking(**settings):
        broken = optax.GradientTransformation(lambda params: jnp.int32(0), break_last_row)
        return optax.chain(make_optimizer(**settings), broken)

    monkeypatch.setattr(build, "make_optimizer", breaking)
    config = default_config("copy")
    config.update_from_flattened_dict(
        {
            "launcher": launcher,
            "task.seq_length": 4,
            "model.features": 4,
            "model.num_layers": 1,
            "model.positions": "learned",
            "train.batch_size": 8,
            "train.steps_per_epoch": 3,
            "train.epochs": 6,
            "eval.slices": "8",  # The table is made for it; it is not evaluated before step 18.
            "eval.every_epochs": 6,
            "eval.num_batches": 1,
            "checkpoint.every_epochs": 2,
        }
    )
    for _ in range(2):  # A rerun, which continues from the checkpoint, meets the same end.
        with pytest.raises(experiment.Diverged, match="step 12: the parameters") as stop:
            experiment.run(config, tmp_path)
        assert stop.value.status == 1
        assert os.listdir(tmp_path / "checkpoints") == ["6"]
        assert [row["step"] for row in sound_json(tmp_path / "metrics.jsonl")] == [1, 3, 6, 9]
        assert not (tmp_path / "result.json").exists()


def test_a_last_update_that_goes_too_far_ends_the_run(tmp_path):
    config = tiny(optimizer__name="sgd", optimizer__learning_rate=1e30)
    config.train.epochs = config.train.steps_per_epoch = 1
    with pytest.raises(experiment.Diverged, match=r"step 1: held-out loss is (nan|inf)"):
        experiment.run(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("part", ["slice", "baseline"])
def test_a_number_to_report_that_is_not_finite_ends_the_run(part, tmp_path, monkeypatch):
    program = experiment.build(tiny(eval__slices="11"))

    def evaluate(params, rows):
        found = program.evaluate(params, rows)
        return found | ({"loss@11": jnp.float32(np.inf)} if part == "slice" else {})

    baseline = (lambda: np.nan) if part == "baseline" else program.baseline
    changed = program._replace(evaluate=evaluate, baseline=baseline)
    monkeypatch.setattr(experiment, "build", lambda config: changed)
    words, last = {
        "slice": ("step 9: held-out loss@11 is inf", "6"),
        "baseline": ("step 18: baseline_loss is nan", "18"),
    }[part]
    with pytest.raises(experiment.Diverged, match=words):
        experiment.run(tiny(eval__slices="11"), tmp_path)
    assert max(os.listdir(tmp_path / "checkpoints"), key=int) == last
    assert sound_json(tmp_path / "metrics.jsonl")
    assert not (tmp_path / "result.json").exists()


def test_what_is_not_finite_is_never_written(tmp_path):
    row = {"step": 3, "loss": float("nan"), "inner": {"norm": float("-inf"), "rate": 1.0}}
    with contextlib.closing(JsonLines(tmp_path / "metrics.jsonl")) as lines:
        lines.write({"step": 1, "loss": 0.5})
        with pytest.raises(RunError, match=r"finite: loss is nan, inner\.norm is -inf\.$"):
            lines.write(row)
        assert [row["step"] for row in lines.rows] == [1]
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 1, "loss": 0.5}\n'
    with pytest.raises(RunError, match="loss is nan"):
        write_json(tmp_path / "result.json", row)
    assert os.listdir(tmp_path) == ["metrics.jsonl"]


def test_a_complete_run_is_told_not_repeated(tmp_path, capsys, monkeypatch):
    first = experiment.run(tiny(), tmp_path)
    written = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()}
    capsys.readouterr()
    monkeypatch.setattr(experiment, "_train", None)
    again = experiment.run(tiny(), tmp_path)
    assert "complete" in capsys.readouterr().out
    assert again.metrics == first.metrics
    assert again.history == first.history
    assert fingerprint(again.params) == first.metrics["fingerprint"]
    assert written == {path: path.stat().st_mtime_ns for path in written}


def test_a_run_killed_before_its_result_writes_it(tmp_path):
    first = experiment.run(tiny(), tmp_path)
    (tmp_path / "result.json").unlink()
    again = experiment.run(tiny(), tmp_path)
    assert again.metrics["fingerprint"] == first.metrics["fingerprint"]
    assert json.loads((tmp_path / "result.json").read_text()) == again.metrics


@pytest.fixture(scope="module")
def finished(tmp_path_factory, compiled_once):
    """A complete run, to be copied."""
    directory = tmp_path_factory.mktemp("finished")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JAX_COMPILATION_CACHE_DIR", str(directory / "cache"))
        experiment.run(tiny(), directory / "run")
    return directory / "run"


@pytest.fixture
def copy(finished, tmp_path):
    return shutil.copytree(finished, tmp_path / "run")


def test_a_result_whose_checkpoint_is_gone_is_made_again(copy, at_step):
    before = json.loads((copy / "result.json").read_text())
    shutil.rmtree(copy / "checkpoints" / "18")
    gone = []
    calm = at_step(15, lambda: gone.append(not (copy / "result.json").exists()))
    result = experiment.run(tiny(), copy)
    calm()
    assert gone == [True], "a result means that all else is there"
    assert result.metrics["fingerprint"] == before["fingerprint"]
    assert [row["step"] for row in rows_of(copy)] == [1, 3, 6, 9, 12, 15, 18]


def test_a_result_without_any_checkpoint_is_not_trained_over(copy):
    shutil.rmtree(copy / "checkpoints")
    before = (copy / "metrics.jsonl").read_text()
    assert "checkpoints are gone" in refusal(tiny(), copy)
    assert (copy / "metrics.jsonl").read_text() == before
    assert (copy / "result.json").exists()


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("result.json", "[1]", "not of a run"),
        ("result.json", '{"loss": 1}', "not of a run"),
        ("result.json", '{"step": 18, "eval_loss": "low"}', "eval_loss is 'low'"),
        ("checkpoints", "mine", "File exists"),
        ("result.json", None, "directory"),
        ("metrics.jsonl", "", "ends at step 0"),
        ("metrics.jsonl", None, "directory"),
        ("config.json", "{}", "not of a run"),
        ("config.json", "[1]", "not of a run"),
        ("config.json", '{"config": 3}', "not of a run"),
        ("config.json", None, "directory"),
    ],
)
def test_a_file_that_is_not_of_the_run_is_named(copy, name, content, words):
    (shutil.rmtree if (copy / name).is_dir() else os.remove)(copy / name)
    if content is None:
        (copy / name).mkdir()
    else:
        (copy / name).write_text(content)
    with pytest.raises(RunError, match=words) as error:
        experiment.run(tiny(), copy)
    assert name in str(error.value)
    assert "\n" not in str(error.value)


def test_what_cannot_be_written_ends_the_run_in_a_line(copy):
    (copy / "result.json").unlink()
    (copy / "result.json.tmp").mkdir()
    with pytest.raises(RunError, match=r"Is a directory: .*result\.json") as error:
        experiment.run(tiny(), copy)
    assert error.value.status == 1


def test_a_process_killed_at_its_first_file_is_no_stranger(tmp_path):
    (tmp_path / "config.json.tmp").write_text('{"conf')
    claim(tmp_path, tiny(), {})
    assert json.loads((tmp_path / "config.json").read_text())["config"] == tiny().to_dict()


# The target --------------------------------------------------------------------------------------


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_a_run_stops_where_a_longer_one_first_reaches_the_target(launcher):
    full = experiment.run(tiny(launcher=launcher, eval__every_epochs=2))
    at_6, at_12, at_18 = (row["eval_loss"] for row in full.history if "eval_loss" in row)
    assert at_6 > at_12 > at_18
    target = f"loss={(at_6 + at_12) / 2}"
    short = experiment.run(tiny(launcher=launcher, eval__every_epochs=2, train__target=target))
    assert without_time(short.history) == without_time(full.history[: len(short.history)])
    assert short.metrics["step"] == short.metrics["target_step"] == 12
    assert short.metrics["target_seconds"] == short.history[-1]["seconds"]


def test_a_run_says_whether_it_reached_its_target(capsys):
    assert experiment.run(tiny(train__target="loss=1e-9")).metrics["target_step"] is None
    assert "loss=1e-9 not reached" in capsys.readouterr().out
    # At each evaluation, not before the first.
    assert experiment.run(tiny(train__target="loss=1e9")).metrics["target_step"] == 9
    assert "loss=1e9 reached at step 9" in capsys.readouterr().out
    assert "target_step" not in experiment.run(tiny()).metrics


def test_a_run_killed_at_its_target_trains_no_further(tmp_path):
    first = experiment.run(tiny(train__target="loss=1e9"), tmp_path)
    (tmp_path / "result.json").unlink()
    again = experiment.run(tiny(train__target="loss=1e9"), tmp_path)
    assert again.metrics["fingerprint"] == first.metrics["fingerprint"]
    assert again.metrics["target_seconds"] == first.metrics["target_seconds"]
    assert [row["step"] for row in rows_of(tmp_path)] == [1, 3, 6, 9]


def test_a_target_of_another_task_is_refused_by_what_there_is():
    message = refusal(tiny(train__target="accuracy=0.9"))
    assert "--target" in message
    assert "(loss)" in message
    assert "'accuracy'" in message


# Refusals ----------------------------------------------------------------------------------------


def refusal(config, workdir=None):
    with pytest.raises(ConfigError) as error:
        experiment.run(config, workdir)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_another_config_is_refused_by_the_fields_that_differ(tmp_path):
    experiment.run(tiny(), tmp_path)
    before = (tmp_path / "config.json").read_text()
    message = refusal(tiny(train__epochs=7, launcher="pmap"), tmp_path)
    assert "train.epochs is 6 there and 7 here" in message
    assert "launcher is 'single' there and 'pmap' here" in message
    assert "seed" not in message
    assert f"--init_from={tmp_path} --workdir=NEW" in message
    assert (tmp_path / "config.json").read_text() == before


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        (lambda: jax.enable_x64(True), "jax_enable_x64 is False there and True here"),
        (
            lambda: jax.default_matmul_precision("highest"),
            "jax_default_matmul_precision is None there and 'highest' here",
        ),
    ],
    ids=["x64", "precision"],
)
def test_other_settings_of_jax_are_refused_by_name(setting, words, tmp_path):
    claim(tmp_path, tiny(), {})
    (tmp_path / "metrics.jsonl").write_text("{}")  # The run has begun.
    before = (tmp_path / "config.json").read_text()
    with setting(), pytest.raises(ConfigError, match=words):
        claim(tmp_path, tiny(), {})
    assert (tmp_path / "config.json").read_text() == before
    claim(tmp_path, tiny(), {})


def test_settings_that_were_not_noted_are_not_compared(tmp_path):
    write_json(tmp_path / "config.json", {"config": tiny().to_dict()})
    claim(tmp_path, tiny(), {})


def test_the_default_kind_of_keys_changes_no_number():
    want = experiment.run(tiny()).metrics["fingerprint"]
    with jax.default_prng_impl("unsafe_rbg"), jax.threefry_partitionable(False):
        assert experiment.run(tiny()).metrics["fingerprint"] == want


def test_trials_do_not_depend_on_one_another_under_any_default():
    def start(seed):
        functions = build.make_functions(tiny(), {"seed": seed})
        return functions.init().params, functions.baseline()

    alone = [jax.jit(start)(seed) for seed in range(2)]
    with jax.default_prng_impl("unsafe_rbg"), jax.threefry_partitionable(False):
        together = jax.jit(jax.vmap(start))(jnp.arange(2))
    for both, *each in zip(*map(jax.tree.leaves, (together, *alone)), strict=True):
        np.testing.assert_allclose(both, each, rtol=1e-5, atol=1e-6)


def test_a_directory_has_one_owner(tmp_path):
    with owned(tmp_path / "run"):
        assert "in use by another process" in refusal(tiny(), tmp_path / "run")
    with owned(tmp_path / "run"):
        pass


def test_a_killed_owner_leaves_nothing_in_the_way(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / LOCK).touch()  # What kill -9 leaves; the kernel frees the lock itself.
    with owned(tmp_path / "run") as path:
        claim(path, tiny(), {})
    assert os.listdir(tmp_path / "run") == ["config.json"]


def test_one_of_many_who_come_at_once_owns_a_directory(tmp_path):
    """Each makes, locks and removes it over and over; two inside at once would be seen."""
    inside, refused, most = [], [], 0

    def visit(number):
        nonlocal most
        for _ in range(100):
            try:
                with owned(tmp_path / "above" / "run"):
                    inside.append(number)
                    most = max(most, len(inside))
                    time.sleep(0.0001)
                    inside.remove(number)
            except ConfigError as error:
                refused.append(str(error))

    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        list(pool.map(visit, range(4)))
    assert most == 1
    assert 0 < len(refused) < 400
    assert {message.partition(" is ")[2] for message in refused} == {"in use by another process."}
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


@pytest.mark.parametrize("name", ["ENOSYS", "ENOLCK", "EOPNOTSUPP", "EINVAL"])
def test_a_file_system_without_locks_is_told_and_used(name, tmp_path, monkeypatch, capsys):
    fcntl = pytest.importorskip("fcntl")
    number = getattr(errno, name)

    def flock(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", flock)
    experiment.run(tiny(), tmp_path / "run")
    assert capsys.readouterr().err.splitlines() == [
        f"The file system of {tmp_path / 'run'} has no locks ({os.strerror(number)}): take care "
        "that no other process writes there."
    ]
    assert (tmp_path / "run" / "result.json").exists()


@pytest.mark.parametrize(
    ("place", "words"),
    [
        ("", "got ''"),
        ("a\0b", "NUL"),
        ("gs://bucket/run", "URL"),
        (Path("s3://bucket/run"), "URL"),
        ("file:///tmp/run", "URL"),
        ("~no_such_user/run", "user"),
        ("made/also/" + "x" * 300, "name too long"),
        ("file/below/run", "Not a directory"),
        ("file", "is a file"),
        ("loop/run", "symbolic links"),
        ("dangling", "cannot be used"),
    ],
)
def test_a_place_that_cannot_be_is_refused_and_nothing_made(place, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("mine")
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "dangling").symlink_to("nowhere")
    before = sorted(tmp_path.rglob("*"))
    message = refusal(tiny(), place)
    assert "run directory" in message
    assert words in message
    assert sorted(tmp_path.rglob("*")) == before


def test_a_place_that_must_not_be_written_is_refused_and_nothing_made(tmp_path):
    (tmp_path / "locked").mkdir(mode=0o555)
    if os.access(tmp_path / "locked", os.W_OK):
        pytest.skip("to this user every place may be written")
    for place in ("locked", "locked/run"):
        assert "Permission denied" in refusal(tiny(), tmp_path / place)
    assert not list((tmp_path / "locked").iterdir())


def test_home_is_expanded_and_links_are_followed(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    experiment.run(tiny(), "~/runs/first")
    assert not (tmp_path / "~").exists()
    again = experiment.run(tiny(init_from="~/runs/first"))
    assert again.metrics["first_loss"] < experiment.run(tiny()).metrics["first_loss"]
    (tmp_path / "link").symlink_to("home/runs/first")
    assert len(runs.load("link")) == len(runs.load("~/runs/first")) == 1
    with owned("link"):
        assert "in use" in refusal(tiny(), "~/runs/first")


def test_only_the_lock_means_another_process(tmp_path):
    with pytest.raises(BlockingIOError), owned(tmp_path):
        raise BlockingIOError("of something else")


def test_a_run_of_another_kind_is_told_in_a_line_of_bounded_length(tmp_path, copy):
    message = refusal(default_config("recall"), copy)
    assert "and" in message
    assert "more" in message
    assert len(message) < 600


def test_a_model_that_cannot_be_made_is_refused():
    config = tiny(model__positions="sinusoidal", model__features=9, model__num_heads=3)
    assert refusal(config)


@pytest.mark.parametrize("error", [RuntimeError("no\nbackend"), AssertionError()])
def test_devices_that_are_not_there_are_refused_by_the_name_of_the_setting(error, monkeypatch):
    def devices():
        raise error

    monkeypatch.setattr(jax, "devices", devices)
    monkeypatch.setenv("JAX_PLATFORMS", "abacus")
    assert "JAX_PLATFORMS=abacus" in refusal(tiny(seed=1))


def test_a_file_is_no_run_directory(tmp_path):
    (tmp_path / "file").write_text("mine")
    assert "is a file" in refusal(tiny(), tmp_path / "file")
    assert "cannot be used" in refusal(tiny(), tmp_path / "file" / "below")
    (tmp_path / "config.json").write_text("mine")
    assert "config.json" in refusal(tiny(), tmp_path)
    assert (tmp_path / "file").read_text() == (tmp_path / "config.json").read_text() == "mine"


def test_a_batch_that_the_devices_cannot_split_is_refused():
    for launcher in ("pmap", "sharded"):
        message = refusal(tiny(launcher=launcher, train__batch_size=12))
        assert "12" in message
        assert str(jax.device_count()) in message
    message = refusal(tiny(launcher="pmap", optimizer__accumulate=4))
    assert "accumulate" in message


def test_settings_of_the_task_are_checked_before_anything_is_compiled():
    config = default_config("recall")
    config.task.num_pairs = 40
    assert "num_pairs=40" in refusal(config)
    config = default_config("recall")
    config.eval.slices = "128 num_pairs=40"
    message = refusal(config)
    assert "config.eval.slices: num_pairs=40: " in message
    assert "at least 160" in message
    config.eval.slices = "vocab_size=128"
    assert "got 128 tokens for 256" in refusal(config)


def test_a_bad_config_from_python_is_refused_as_from_the_command_line():
    assert "--epochs" in refusal(tiny(train__epochs=0))


# Starting from another run -----------------------------------------------------------------------


def test_init_from_starts_where_the_other_run_ended(tmp_path):
    first = experiment.run(tiny(), tmp_path / "first")
    second = experiment.run(tiny(init_from=str(tmp_path / "first")), tmp_path / "second")
    assert second.metrics["first_loss"] < 0.5 * first.metrics["first_loss"]
    assert second.metrics["step"] == 18  # Its own steps, from 0.


def test_a_run_is_exported_and_the_next_one_begins_with_the_file(finished, tmp_path, capsys):
    file, result = tmp_path / "x.safetensors", json.loads((finished / "result.json").read_text())
    export.main(["attention-jax export", str(finished), str(file)])
    line = f"{file} has the parameters of {finished} at step 18: {result['num_params']} numbers.\n"
    assert capsys.readouterr().out == line
    assert fingerprint(weights.load(file)) == result["fingerprint"]
    second = experiment.run(tiny(init_from=str(file)), tmp_path / "second")
    assert second.metrics["first_loss"] < 0.5 * result["first_loss"]
    message = refusal(tiny(init_from=str(file), model__features=8))
    assert "attention.key.kernel: wanted float32[8, 2, 4], found float32[6, 2, 3]" in message


def test_init_from_names_what_is_missing_or_misfits(tmp_path):
    assert "nowhere" in refusal(tiny(init_from=str(tmp_path / "nowhere")))
    experiment.run(tiny(), tmp_path / "first")
    message = refusal(tiny(init_from=str(tmp_path / "first"), model__features=8))
    assert "[6, 2, 3]" in message
    assert "[8, 2, 4]" in message


def test_what_fails_before_the_first_step_leaves_nothing(tmp_path, finished, monkeypatch):
    def fail(*_):
        raise MemoryError

    (tmp_path / "empty").mkdir()
    for place in ("empty", "deep/run"):
        refusal(tiny(init_from=str(tmp_path / "nowhere")), tmp_path / place)
        refusal(tiny(init_from=str(finished), model__features=8), tmp_path / place)
        with monkeypatch.context() as patch:
            patch.setattr(experiment, "_train", fail)
            with pytest.raises(MemoryError):
                experiment.run(tiny(), tmp_path / place)
        assert [path.name for path in tmp_path.rglob("*")] == ["empty"]
    result = experiment.run(tiny(init_from=str(finished)), tmp_path / "empty")
    assert result.metrics["step"] == 18


def test_a_run_that_diverges_at_once_leaves_its_directory_to_another(tmp_path):
    with pytest.raises(experiment.Diverged):
        experiment.run(tiny(optimizer__name="sgd", optimizer__learning_rate=1e30), tmp_path / "run")
    assert not (tmp_path / "run").exists()
    assert experiment.run(tiny(), tmp_path / "run").metrics["step"] == 18


def test_a_run_killed_before_its_first_step_leaves_its_directory_to_another(tmp_path):
    def begin(config, *rows):
        """What there is when kill -9 comes."""
        claim(tmp_path, config, {})
        with contextlib.closing(experiment.RunDirectory(tmp_path, config)) as directory:
            directory.restore(lambda: None)
            for row in rows:
                directory.write(row)

    begin(tiny())
    begin(tiny(seed=1), {"step": 1, "epoch": 1, "loss": 0.5})
    with pytest.raises(ConfigError, match="holds another run"):
        begin(tiny())
    begin(tiny(seed=1))


def test_a_run_from_before_a_field_was_had_its_default(copy):
    kept = json.loads((copy / "config.json").read_text())
    del kept["config"]["model"]["init_scale"]
    (copy / "config.json").write_text(json.dumps(kept))
    assert experiment.run(tiny(), copy).metrics["step"] == 18
    message = refusal(tiny(model__init_scale=0.5), copy)
    assert "model.init_scale is 1.0 there and 0.5 here" in message


@pytest.mark.parametrize("left", ["checkpoints", "metrics.jsonl", "result.json"])
def test_a_run_without_its_config_is_refused_by_the_name_of_the_file(copy, left):
    for path in list(copy.iterdir()):
        if path.name != left:
            (shutil.rmtree if path.is_dir() else os.remove)(path)
    before = sorted(copy.rglob("*"))
    message = refusal(tiny(), copy)
    assert f"{copy / 'config.json'} is missing" in message
    assert left in message
    assert sorted(copy.rglob("*")) == before


# The writers -------------------------------------------------------------------------------------


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_a_pipe_gets_about_ten_lines_and_a_terminal_a_bar():
    rows = [{"step": 2 * i, "epoch": i, "seconds": 0.1 * i, "loss": 1 / i} for i in range(1, 101)]
    pipe, terminal = io.StringIO(), Terminal()
    for stream in (pipe, terminal):
        with contextlib.closing(Console(100, stream=stream)) as console:
            for row in rows:
                console.write(row)
                if row["epoch"] == 99:
                    time.sleep(0.12)  # A bar is drawn ten times a second at most.
    lines = pipe.getvalue().splitlines()
    assert len(lines) == 10
    assert "epoch 100/100" in lines[-1]
    assert "loss 0.01" in lines[-1]
    assert "\r" in terminal.getvalue()
    assert "loss" in terminal.getvalue()


def test_a_terminal_that_does_not_know_its_size_has_a_bar(monkeypatch):
    ours, theirs = os.openpty()  # Its size is 0 x 0.
    with open(theirs, "w") as terminal:
        monkeypatch.setattr(sys, "stdout", terminal)  # tqdm asks for the size of this one.
        with contextlib.closing(Console(3)) as console:
            console.write({"step": 1, "epoch": 1, "loss": 1.0})
            time.sleep(0.12)  # A bar is drawn ten times a second at most.
            console.write({"step": 2, "epoch": 2, "loss": 0.5})
            os.set_blocking(ours, False)  # Without a bar there is an error here.
            assert b"/3 [" in os.read(ours, 10_000)
    os.close(ours)


def test_a_bar_keeps_the_newest_held_out_numbers():
    terminal = Terminal()
    with contextlib.closing(Console(3, stream=terminal)) as console:
        console.write({"step": 1, "epoch": 1, "loss": 1.0, "accuracy": 0.1})
        held_out = {"eval_loss": 0.5, "eval_accuracy": 0.25, "eval_loss@9": 7.0}
        console.write({"step": 2, "epoch": 2, "loss": 0.9, "accuracy": 0.2, **held_out})
        time.sleep(0.12)  # A bar is drawn ten times a second at most.
        console.write({"step": 3, "epoch": 3, "loss": 0.8, "accuracy": 0.3})
        assert "loss 0.8  held-out 0.5, 25.0%" in terminal.getvalue()


def test_what_a_model_writes_stands_below_its_numbers():
    pipe, terminal = io.StringIO(), Terminal()
    for stream in (pipe, terminal):
        with contextlib.closing(Console(3, stream=stream)) as console:
            row = {"step": 2, "epoch": 2, "seconds": 9.0, "loss": 1.5, "eval_loss": 1.75}
            console.write(row, "To be")
        shown = re.split("[\r\n]+", stream.getvalue())
        below = next(i for i, line in enumerate(shown) if "To be" in line)
        assert "step 2 " in shown[below - 1]
        assert "held-out loss 1.75" in shown[below - 1]


def test_a_pipe_gets_a_line_when_ten_seconds_passed():
    pipe = io.StringIO()
    with contextlib.closing(Console(1000, stream=pipe)) as console:
        console.write({"step": 1, "epoch": 1, "loss": 1.0})
        for i in range(1, 31):
            console.write({"step": 2 * i, "epoch": i, "seconds": 4.0 * i, "loss": 1 / i})
    epochs = [int(line.split("/")[0].split()[1]) for line in pipe.getvalue().splitlines()]
    assert epochs == [1, *range(3, 31, 3)]


def test_json_lines_forget_what_the_checkpoint_does_not_know(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 3}\n{"step": 6}\n{"step": 9}\n{"st')
    with contextlib.closing(JsonLines(path, last_step=6)) as lines:
        assert lines.rows == [{"step": 3}, {"step": 6}]
        lines.write({"step": 9, "loss": 0.5})
    assert path.read_text() == '{"step": 3}\n{"step": 6}\n{"step": 9, "loss": 0.5}\n'


@pytest.mark.parametrize(
    ("lines", "words"),
    [
        (['{"step": 3}', "torn", '{"step": 9}'], "line 2.*torn"),
        (["torn", '{"step": 6}', '{"step": 9}'], "line 1.*torn"),
        (['{"step": 3}', "[6]", '{"step": 9}'], "line 2"),
        (['{"step": 6}', '{"step": 3}', '{"step": 9}'], "line 2"),
        (['{"step": 3}', '{"step": 6}', '{"step": 10}'], "line 3"),
        (['{"step": 3}', '{"step": 6}'], "ends at step 6"),
    ],
)
def test_json_lines_that_lost_a_row_are_refused_and_left_alone(tmp_path, lines, words):
    path = tmp_path / "metrics.jsonl"
    path.write_text("\n".join([*lines, ""]))
    before = path.read_text()
    with pytest.raises(ValueError, match=words) as error:
        JsonLines(path, last_step=9)
    assert "\n" not in str(error.value)
    assert path.read_text() == before


def test_json_lines_behind_the_checkpoint_may_be_anything(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 3}\n\x00\x00\n{"step": 9}\n')
    with contextlib.closing(JsonLines(path, last_step=3)) as lines:
        assert lines.rows == [{"step": 3}]
    assert path.read_text() == '{"step": 3}\n'


def test_tensorboard_has_the_curves(tmp_path):
    pytest.importorskip("tensorboardX")
    from tensorboardX.proto.event_pb2 import Event

    with contextlib.closing(TensorBoard(tmp_path)) as events:
        row = {"loss": 0.25, "eval_loss@128,num_pairs=8": 0.5}
        events.write({"step": 3, "epoch": 1, "seconds": 0.5, **row})
    (file,) = tmp_path.iterdir()
    data, found = file.read_bytes(), {}
    while data:  # Records: length (8), its checksum (4), the event, its checksum (4).
        length = int.from_bytes(data[:8], "little")
        event = Event.FromString(data[12 : 12 + length])
        found |= {value.tag: (event.step, value.simple_value) for value in event.summary.value}
        data = data[16 + length :]
    assert found == {"loss": (3, 0.25), "eval_loss/128_num_pairs_8": (3, 0.5)}


def test_a_run_without_tensorboardx_says_so_once(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    events = TensorBoard(tmp_path)
    for step in (1, 2):
        events.write({"step": step, "loss": 0.25})
    events.close()
    assert capsys.readouterr().out.count("tensorboardX") == 1
    assert not list(tmp_path.iterdir())
