"""Each trial of a sweep equals the run alone, whatever happens to the others."""

import errno
import itertools
import json
import os
import re
import shutil
import signal
import time

import chex
import jax
import numpy as np
import pytest

from attention_jax.interop import weights
from attention_jax.laboratory import export, pictures, report, sweep
from attention_jax.laboratory.runs import Run, lines, main_metric
from attention_jax.training import experiment, metrics
from attention_jax.training.checkpoint import Checkpoints, fingerprint, restore_params
from attention_jax.training.command import parse
from attention_jax.training.config import ConfigError, RunError, default_config, trials
from attention_jax.training.launch import LAUNCHERS


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """The user's compile cache stays as it is."""
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path / "cache"))


@pytest.fixture(autouse=True, scope="module")
def compiled_once():
    """Equal sweeps share their programs: what is tested here is the loop around them."""
    build, programs = sweep.build, {}

    def cached(configs, axes, launcher):
        key = json.dumps([configs[0].to_dict(), dict(axes)], sort_keys=True)
        if key not in programs:
            programs[key] = build(configs, axes, launcher)
        return programs[key]

    alone, build_alone = {}, experiment.build

    def cached_alone(config):
        key = json.dumps(config.to_dict(), sort_keys=True)
        if key not in alone:
            alone[key] = build_alone(config)
        return alone[key]

    sweep.build, experiment.build = cached, cached_alone
    yield
    sweep.build, experiment.build = build, build_alone


def tiny(**changes):
    """Six epochs of three steps, a checkpoint every second one."""
    config = default_config()
    config.update_from_flattened_dict(
        {
            "task.seq_length": 5,
            "model.features": 6,
            "model.num_heads": 2,
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


GRID = {"optimizer.learning_rate": [0.03, 0.01], "seed": [0, 5]}


def without_time(rows):
    return [{name: value for name, value in row.items() if name != "seconds"} for row in rows]


def rows_of(directory, trial):
    return [
        json.loads(line)
        for line in (directory / "trials" / trial / "metrics.jsonl").read_text().splitlines()
    ]


def assert_alike(history, alone):
    """The same rows, up to rounding."""
    assert [row.keys() for row in history] == [row.keys() for row in alone]
    for ours, theirs in zip(without_time(history), without_time(alone), strict=True):
        np.testing.assert_allclose(list(ours.values()), list(theirs.values()), rtol=1e-5)


# A trial is a run --------------------------------------------------------------------------------


def test_every_trial_is_the_run_done_alone(tmp_path):
    result = sweep.run(tiny(), GRID, tmp_path)
    for number in (1, 2):  # Either axis.
        alone = experiment.run(trials(tiny(), GRID)[number])
        assert_alike(result.histories[number], alone.history)
        found = result.metrics["trials"][number]
        for name in ("eval_loss", "train_loss", "first_loss", "baseline_loss"):
            np.testing.assert_allclose(found[name], alone.metrics[name], rtol=1e-5)
        assert (found["step"], found["num_params"]) == (18, alone.metrics["num_params"])
    losses = {trial["eval_loss"] for trial in result.metrics["trials"]}
    assert len(losses) == 4


def test_every_number_that_is_traced_is_honoured():
    config = tiny(optimizer__name="sgd", optimizer__learning_rate=0.3, train__epochs=2)
    axes = {
        "optimizer.warmup_steps": [0, 4],
        "optimizer.weight_decay": [0.0, 0.1],
        "optimizer.clip_norm": [0.0, 0.1],
        "optimizer.momentum": [0.0, 0.9],
        "model.dropout_rate": [0.0, 0.3],
        "model.init_scale": [1.0, 0.5],
    }
    result = sweep.run(config, axes)
    for number in (0, 0b111111):
        alone = experiment.run(trials(config, axes)[number])
        assert_alike(result.histories[number], alone.history)
    losses = {trial["eval_loss"] for trial in result.metrics["trials"]}
    assert len(losses) == 64, "each of the numbers matters"


def test_what_changes_shapes_is_a_program_of_its_own(tmp_path, monkeypatch, capsys):
    axes = {"model.num_kv_heads": [None, 1], "seed": [0, 5]}
    groups = sweep.build(trials(tiny(), axes), axes, LAUNCHERS["single"]())
    assert [group.numbers for group in groups] == [[0, 1], [2, 3]]
    monkeypatch.setattr(metrics, "SILENCE", 0.0)
    result = sweep.run(tiny(), axes, tmp_path)
    assert_alike(result.histories[1], experiment.run(trials(tiny(), axes)[1]).history)
    # The parameters of each are found in the one checkpoint.
    for number, params in enumerate(result.params):
        found = restore_params(tmp_path / "trials" / f"{number:03}", like=params)
        chex.assert_trees_all_equal(found, params)
    with pytest.raises(ValueError, match=r"wanted float32\[6, 2, 3\], found float32\[6, 1, 3\]"):
        restore_params(tmp_path / "trials" / "003", like=result.params[0])
    sizes = [trial["num_params"] for trial in result.metrics["trials"]]
    assert sizes[0] == sizes[1] > sizes[2] == sizes[3]
    for params, trial in zip(result.params, result.metrics["trials"], strict=True):
        assert fingerprint(params) == trial["fingerprint"]
    before, *_ = capsys.readouterr().out.partition("epoch 1/6")
    for words in ("1 of 2: model.num_kv_heads=None", "2 of 2: model.num_kv_heads=1"):
        assert f"compiling the training of program {words}\n" in before


def test_a_row_has_the_second_at_which_the_epoch_of_its_program_was_done(monkeypatch):
    axes = {"model.num_kv_heads": [None, 1], "seed": [0, 5]}
    groups = sweep.build(trials(tiny(), axes), axes, LAUNCHERS["single"]())

    def slowed(function):
        def call(*arguments):
            time.sleep(0.3)
            return jax.block_until_ready(function(*arguments))

        return call

    slow = [group._replace(epoch=slowed(group.epoch)) for group in groups]
    monkeypatch.setattr(sweep, "build", lambda *_: slow)
    rows = zip(*sweep.run(tiny(), axes).histories, strict=True)
    # Of the first trial of each program, in the order in which the programs run.
    seconds = [[row["seconds"] for row in of_all[::2]] for of_all in rows if "seconds" in of_all[0]]
    assert min(np.diff(np.ravel(seconds))) > 0.2, seconds


def test_trials_over_devices_are_the_same_trials(tmp_path):
    axes, found = {"seed": [0, 5, 6, 7, 8, 9, 10, 11]}, {}
    for launcher in LAUNCHERS:
        config = tiny(launcher=launcher, train__epochs=3)
        found[launcher] = sweep.run(config, axes, tmp_path / launcher).histories
        (group,) = sweep.build(trials(config, axes), axes, LAUNCHERS[launcher]())
        devices = group.settings["number"].sharding.device_set
        assert len(devices) == (1 if launcher == "single" else jax.device_count())
        # A sweep that had finished is read back.
        assert sweep.run(config, axes, tmp_path / launcher).histories == found[launcher]
    for launcher in ("pmap", "sharded"):
        for ours, theirs in zip(found[launcher], found["single"], strict=True):
            assert_alike(ours, theirs)


# Frozen trials -----------------------------------------------------------------------------------


def test_a_trial_that_diverges_stops_alone(tmp_path):
    config = tiny(optimizer__name="sgd")
    axes = {"optimizer.learning_rate": [0.03, 1e20]}
    with pytest.raises(experiment.Diverged) as error:
        experiment.run(trials(config, axes)[1])
    result = sweep.run(config, axes, tmp_path)
    sound, broken = result.metrics["trials"]
    assert f"at step {broken['diverged_step']}:" in str(error.value)
    assert "eval_loss" not in broken
    assert "diverged_step" not in sound
    assert_alike(result.histories[0], experiment.run(trials(config, axes)[0]).history)
    assert [row["step"] for row in rows_of(tmp_path, "001")] == []
    assert result.params[1] is None
    step = broken["diverged_step"]
    with pytest.raises(ValueError, match=f"^trial 1 diverged at step {step}: "):
        restore_params(tmp_path / "trials" / "001", like=result.params[0])
    assert result.metrics["best"] == 0


def test_a_trial_that_diverges_in_evaluation_keeps_finite_parameters(tmp_path):
    """Its step leads to parameters so large that only the held-out loss overflows."""
    settings = {"optimizer__name": "sgd", "train__steps_per_epoch": 1, "eval__every_epochs": 1}
    axes = {"optimizer.learning_rate": [0.03, 1e12, 0.01, 0.02, 0.04, 0.05, 0.06, 1e13]}
    result = sweep.run(tiny(launcher="pmap", **settings), axes, tmp_path)
    steps = [trial.get("diverged_step") for trial in result.metrics["trials"]]
    assert steps == [None, 1, *[None] * 5, 1]
    assert rows_of(tmp_path, "001") == []
    for path in [*tmp_path.glob("*.json*"), *tmp_path.glob("trials/*/*.json*")]:
        assert not re.search("NaN|Infinity", path.read_text()), path
    with Checkpoints(tmp_path / "checkpoints", read_only=True) as checkpoints:
        arrays, _ = checkpoints._newest_whole()
    assert all(np.isfinite(x).all() for x in arrays.values())
    frozen = max(np.abs(x[1]).max() for path, x in arrays.items() if path.startswith("trials"))
    assert frozen > 1e9, "as its first step left it"
    drawn = {trial.get("held_out") for trial in result.metrics["trials"]}
    assert drawn == {None, "fresh rows of the same distribution"}, "it has no held-out metrics"
    (tmp_path / "result.json").unlink()
    again = sweep.run(tiny(launcher="pmap", **settings), axes, tmp_path)
    assert again.metrics["trials"] == result.metrics["trials"]


def test_bad_steps_are_skipped_in_each_trial_alone(hollow, tmp_path):
    config, axes = tiny(optimizer__max_skipped=2), {"seed": [0, 1, 2, 4]}
    bad = [hollow(trial) for trial in trials(config, axes)]
    result = sweep.run(config, axes, tmp_path)
    for steps, trial, rows in zip(bad, result.metrics["trials"], result.histories, strict=True):
        too_many = [i for i in range(3, 19) if all(steps[i - 3 : i])]
        assert trial.get("diverged_step") == (too_many[0] if too_many else None)
        ends = [0, *(row["step"] for row in rows)]
        assert [row["skipped"] for row in rows] == [
            sum(steps[begin:end]) for begin, end in itertools.pairwise(ends)
        ]
    assert "diverged_step" in result.metrics["trials"][1]
    assert "diverged_step" not in result.metrics["trials"][2]
    assert result.metrics["trials"][2]["skipped"] == sum(bad[2]) > 0
    assert_alike(result.histories[2], experiment.run(trials(config, axes)[2]).history)


def test_a_trial_that_reached_the_target_stays_as_it_was():
    config = tiny(eval__every_epochs=1)
    full = sweep.run(config, GRID)
    losses = [[row["eval_loss"] for row in rows if "eval_loss" in row] for rows in full.histories]
    target = sorted(row[3] for row in losses)[1]
    config.train.target = f"loss={target}"
    short = sweep.run(config, GRID)
    steps = [3 * (1 + next((i for i, x in enumerate(x) if x <= target), 5)) for x in losses]
    assert len(set(steps)) > 1, "some stop before others"
    for number, step in enumerate(steps):
        rows = [row for row in full.histories[number] if row["step"] <= step]
        assert without_time(short.histories[number]) == without_time(rows)
        trial = short.metrics["trials"][number]
        assert trial["step"] == step
        assert trial["target_step"] == (step if min(losses[number]) <= target else None)


def test_a_sweep_whose_trials_are_all_done_ends(tmp_path):
    result = sweep.run(tiny(train__target="loss=1e9"), GRID, tmp_path)
    assert result.metrics["step"] == 9
    assert [trial["target_step"] for trial in result.metrics["trials"]] == [9] * 4
    (tmp_path / "result.json").unlink()
    again = sweep.run(tiny(train__target="loss=1e9"), GRID, tmp_path)
    assert again.metrics["trials"] == result.metrics["trials"]


def test_a_sweep_whose_trials_all_diverge_ends_and_is_read_back(tmp_path, capsys):
    config = tiny(optimizer__name="sgd")
    axes = {"optimizer.learning_rate": [1e20, 1e21]}
    result = sweep.run(config, axes, tmp_path)
    assert all("diverged_step" in trial for trial in result.metrics["trials"])
    assert result.metrics["best"] is None
    assert "all 2 trials have diverged\n" in capsys.readouterr().out
    with pytest.raises(ValueError, match="without a best trial: name a trial, as "):
        restore_params(tmp_path, like={})
    assert sweep.run(config, axes, tmp_path).metrics == result.metrics


# The directory -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def whole(tmp_path_factory, compiled_once):
    """A complete sweep and its result."""
    directory = tmp_path_factory.mktemp("whole")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JAX_COMPILATION_CACHE_DIR", str(directory / "cache"))
        return directory / "sweep", sweep.run(tiny(), GRID, directory / "sweep")


def test_a_sweep_leaves_what_it_returns(whole):
    directory, result = whole
    assert {path.name for path in directory.iterdir()} == {
        *("config.json", "checkpoints", "metrics.jsonl", "tensorboard", "trials"),
        *("result.json", "sweep.png", "sweep.svg"),
    }
    assert json.loads((directory / "result.json").read_text()) == result.metrics
    for number, trial in enumerate(trials(tiny(), GRID)):
        own = directory / "trials" / f"{number:03}"
        assert json.loads((own / "config.json").read_text())["config"] == trial.to_dict()
        assert json.loads((own / "result.json").read_text()) == result.metrics["trials"][number]
        assert rows_of(directory, f"{number:03}") == result.histories[number]
    assert (directory / "sweep.png").read_bytes().startswith(b"\x89PNG")


def test_the_console_tells_best_mean_and_spread(whole, capsys):
    directory, result = whole
    sweep.run(tiny(), GRID, directory)
    said = capsys.readouterr().out
    assert "complete" in said
    losses = np.array([trial["eval_loss"] for trial in result.metrics["trials"]]).reshape(2, 2)
    for rate, of_seeds in zip(("0.03", "0.01"), losses, strict=True):
        (line,) = [line for line in said.splitlines() if rate in line.split()]
        mean, spread = of_seeds.mean(), abs(of_seeds[0] - of_seeds[1]) / 2**0.5
        best, mean, spread = (f"{x:.4g}" for x in (of_seeds.min(), mean, spread))
        assert line.split()[2:] == [rate, "2", best, mean, "±", spread, "0"]


def test_a_sweep_that_was_cut_ends_like_an_uninterrupted_one(whole, tmp_path, at_step):
    calm = at_step(9, lambda: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(experiment.Interrupted, match="SIGTERM") as stop:
        sweep.run(tiny(), GRID, tmp_path / "cut")
    calm()
    assert stop.value.status == 143
    assert not (tmp_path / "cut" / "result.json").exists()
    with open(tmp_path / "cut" / "trials" / "001" / "metrics.jsonl", "a") as file:
        file.write('{"step": 18, "epo')
    result = sweep.run(tiny(), GRID, tmp_path / "cut")
    for ours, theirs in zip(result.histories, whole[1].histories, strict=True):
        assert without_time(ours) == without_time(theirs)
    prints = [[trial["fingerprint"] for trial in r.metrics["trials"]] for r in (result, whole[1])]
    assert prints[0] == prints[1]


def test_a_sweep_that_crashed_goes_on_from_its_checkpoint(whole, tmp_path, at_step):
    def crash():
        raise MemoryError

    calm = at_step(15, crash)
    with pytest.raises(MemoryError):
        sweep.run(tiny(), GRID, tmp_path)
    calm()
    assert sorted(os.listdir(tmp_path / "checkpoints")) == ["12", "6"]
    result = sweep.run(tiny(), GRID, tmp_path)
    for ours, theirs in zip(result.histories, whole[1].histories, strict=True):
        assert without_time(ours) == without_time(theirs)


def test_what_a_trial_cannot_write_ends_the_sweep_in_a_line(tmp_path, monkeypatch, whole):
    def full(self, row):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    directory = tmp_path / "sweep"
    with monkeypatch.context() as patch:
        patch.setattr(sweep.JsonLines, "write", full)
        with pytest.raises(RunError, match=f"cannot be used: No space left on device: {directory}"):
            sweep.run(tiny(), GRID, directory)
    shutil.copytree(whole[0], directory)
    (directory / "trials" / "001" / "config.json.tmp").mkdir()
    with pytest.raises(RunError, match=r"Is a directory: .*trials/001/config\.json"):
        sweep.run(tiny(), GRID, directory)
    (directory / "trials" / "001" / "config.json.tmp").rmdir()
    (directory / "result.json").write_text('{"step": 18}')
    with pytest.raises(ConfigError, match=r"result\.json is not of this sweep"):
        sweep.run(tiny(), GRID, directory)


def test_another_sweep_is_refused_by_what_differs(whole, tmp_path):
    directory = shutil.copytree(whole[0], tmp_path / "sweep")
    with pytest.raises(ConfigError, match=r"sweep\.seed is \[0, 5\] there and \[0, 6\] here"):
        sweep.run(tiny(), GRID | {"seed": [0, 6]}, directory)
    with pytest.raises(ConfigError, match=r"sweep\.seed is \[0, 5\] there and None here"):
        experiment.run(tiny(), directory)


def test_trials_that_the_devices_cannot_share_are_refused():
    for launcher in ("pmap", "sharded"):
        with pytest.raises(ConfigError, match="6 trials cannot be split over 8") as error:
            sweep.run(tiny(launcher=launcher), {"seed": [0, 1, 2, 3, 4, 5]})
        assert "\n" not in str(error.value)


def test_init_from_starts_every_trial_where_the_other_run_ended(tmp_path):
    first = experiment.run(tiny(), tmp_path)
    result = sweep.run(tiny(init_from=str(tmp_path)), {"optimizer.learning_rate": [0.03, 0.01]})
    for trial in result.metrics["trials"]:
        assert trial["first_loss"] < 0.5 * first.metrics["first_loss"]


def test_a_run_starts_from_a_trial_and_a_sweep_is_its_best_trial(whole, tmp_path, monkeypatch):
    directory, result = whole
    losses = [trial["eval_loss"] for trial in result.metrics["trials"]]
    best = losses.index(min(losses))
    assert (result.metrics["best"], result.metrics["best_by"]) == (best, "eval_loss")
    program = experiment.build(tiny())

    def first_params(init_from):
        config = parse(["train.py", f"--init_from={init_from}"]).config
        assert config.model == tiny().model
        assert config.task == tiny().task
        return fingerprint(experiment._first_state(tiny(init_from=str(init_from)), program).params)

    prints = [trial["fingerprint"] for trial in result.metrics["trials"]]
    assert first_params(directory / "trials" / "002") == prints[2] != prints[best]
    assert first_params(directory) == prints[best]
    for run, number in ((directory / "trials" / "002", 2), (directory, best)):
        export.export(run, tmp_path / "x.safetensors")
        assert fingerprint(weights.load(tmp_path / "x.safetensors")) == prints[number]
    # By any name of the place.
    monkeypatch.chdir(directory / "trials" / "001")
    assert first_params(".") == prints[1]
    (tmp_path / "link").symlink_to(directory / "trials" / "003")
    assert first_params(tmp_path / "link") == prints[3]
    for wrong in (directory / "trials" / "004", directory / "trials"):
        with pytest.raises(ConfigError, match=f"--init_from={wrong}: "):
            parse(["train.py", f"--init_from={wrong}"])
        with pytest.raises(FileNotFoundError, match="no checkpoint"):
            restore_params(wrong, like={})


def test_the_best_trial_is_told_by_the_target(tmp_path, capsys):
    config = tiny(train__target="loss@11=1e-9", eval__slices="11", train__epochs=1)
    result = sweep.run(config, GRID, tmp_path)
    losses = [trial["eval_loss@11"] for trial in result.metrics["trials"]]
    best = losses.index(min(losses))
    assert (result.metrics["best"], result.metrics["best_by"]) == (best, "eval_loss@11")
    line = f"best by eval_loss@11, {min(losses):.4g}: trial {best}: {tmp_path}/trials/00{best}"
    assert line in capsys.readouterr().out
    # As long as it is not complete there is none, though there are trials.
    (tmp_path / "result.json").unlink()
    with pytest.raises(ValueError, match="without a best trial"):
        restore_params(tmp_path, like=result.params[0])
    restore_params(tmp_path / "trials" / "000", like=result.params[0])


# The report --------------------------------------------------------------------------------------


def run_of(loss, seed=0, **fields):
    rows = [{"step": s, "loss": loss * 9 / s, "eval_loss": loss * 9 / s} for s in (1, 3, 9)]
    config = {"seed": seed} | {name.replace("__", "."): value for name, value in fields.items()}
    result = {"step": 9, "eval_loss": loss} if np.isfinite(loss) else {"diverged_step": 4}
    return Run("run", config, result, rows)


def test_the_table_puts_seeds_together_and_leaves_out_what_diverged():
    runs = [
        run_of(1.0, 0, model__window=8),
        run_of(3.0, 1, model__window=8),
        run_of(5.0, 0, model__window=16),
        run_of(np.nan, 1, model__window=16),
    ]
    heading, first, second = report.table(runs, x="model.window", published={"8": 0.5})
    assert heading[:3] == ["directory", "model.window", "runs"]
    assert first == ["run, run", "8", "2", "1", "2 ± 1.414", "0", "0.5"]
    assert second == ["run, run", "16", "2", "5", "5", "1", "-"]


def test_a_picture_names_what_diverged_and_has_no_mark(tmp_path):
    runs = [run_of(1.0, optimizer__name="sgd", model__window=8)]
    runs += [run_of(np.nan, optimizer__name="adamw", model__window=n) for n in (8, 16)]
    pictures.draw_against(runs, "model.window", tmp_path / "by_window")
    drawn = (tmp_path / "by_window.svg").read_text()
    assert "<!-- name=adamw (diverged) -->" in drawn
    assert "<!-- name=sgd -->" in drawn


def test_texts_in_other_tokens_compare_by_bits_per_character():
    bits = "eval_loss_in_bits_per_character"
    runs = [
        run_of(loss, task__tokens=tokens)._replace(result={"eval_loss": loss, bits: value})
        for tokens, loss, value in (("characters", 3.4, 5.0), ("a.json", 5.2, 4.0))
    ]
    assert main_metric(runs) == bits
    assert main_metric(runs[:1] * 2) == "eval_loss"
    assert [row[-3] for row in report.table(runs)] == [f"best {bits}", "5", "4"]


def test_the_table_names_the_directories():
    names = [f"runs/sweep/trials/00{i}" for i in range(5)] + ["runs/alone"]
    runs = [run_of(1.0, i, model__window=i // 4)._replace(name=n) for i, n in enumerate(names)]
    rows = report.table(runs)
    some = "runs/sweep/trials/000 … runs/sweep/trials/003"
    assert [row[0] for row in rows] == ["directory", some, "runs/sweep/trials/004, runs/alone"]
    assert [row[0] for row in report.table(runs[4:5])] == ["directory", "runs/sweep/trials/004"]


def test_a_directory_of_runs_is_no_run(whole):
    runs = whole[0].parent
    with pytest.raises(ValueError, match=r"holds no run. Its directories do: take .*/\*\.$"):
        report.show([runs])


def test_the_table_and_a_picture_tell_what_became_of_each_slice(tmp_path):
    def sliced(loss, seed, features):
        run = run_of(loss, seed, model__features=features, eval__slices="8 16,n=3")
        return run._replace(result=run.result | {"eval_loss@8": 2 * loss, "eval_loss@16,n=3": 4.0})

    runs = [
        sliced(1.0, 0, 8),
        sliced(3.0, 1, 8),
        sliced(5.0, 0, 16),
        run_of(9.0, 1, eval__slices="8 16,n=3"),
    ]
    heading, first, second, third = report.table(runs)
    places = [heading.index(name) for name in ("mean@8", "mean@16,n=3")]
    assert [[row[i] for i in places] for row in (first, second, third)] == [
        ["4", "4"],
        ["10", "4"],
        ["-", "-"],
    ]
    assert runs[1].final("eval_loss@*") == 5.0  # Of 6 and 4.
    assert np.isnan(run_of(9.0).final("eval_loss@*"))
    pictures.draw_slices(runs, tmp_path / "slices.png")
    pictures.draw_slices([*runs[:2], sliced(7.0, 0, 16)], tmp_path / "other.png")
    assert len({path.read_bytes() for path in tmp_path.glob("*.png")}) == 2


def test_the_curves_show_a_run_that_was_evaluated_once(tmp_path):
    rows = [{"step": 3, "loss": 0.5}, {"step": 6, "loss": 0.2}, {"step": 9, "loss": 0.1}]
    rows[-1]["eval_loss"] = 0.1
    for name, shown in (("three", rows), ("one", rows[:1]), ("none", [])):
        pictures.draw_curves([run_of(1.0)._replace(rows=shown)], tmp_path / f"{name}.png")
    assert len({path.read_bytes() for path in tmp_path.glob("*.png")}) == 3


def test_the_command_writes_a_table_and_pictures(whole, tmp_path, capsys):
    (tmp_path / "paper.json").write_text('{"3e-2": 0.5, "0.01": 0.6}')
    command = [str(whole[0]), f"--out={tmp_path / 'out'}", "--x=learning_rate"]
    report.main(["report", *command, f"--published={tmp_path / 'paper.json'}"])
    text = (tmp_path / "out" / "report.md").read_text()
    assert f"attention-jax report {' '.join(command)}" in text
    assert "| 0.03 | 2 |" in text
    assert "| 0.6 |" in text
    assert "| 0.5 |" in text
    for name in ("curves.png", "by_learning_rate.png"):
        assert f"({name})" in text
        file = tmp_path / "out" / name
        assert file.read_bytes().startswith(b"\x89PNG")
        assert file.with_suffix(".svg").read_text().startswith("<?xml")
    assert capsys.readouterr().out.count(str(tmp_path / "out")) == 5
    assert text.startswith("# teacher, ")
    assert "jax " in text
    assert "mean ± spread" in text


def test_the_command_shows_the_table_and_writes_nothing(whole, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    report.main(["report", str(whole[0])])
    rows = capsys.readouterr().out.splitlines()
    assert "best eval_loss" in rows[0]
    assert len(rows) == 1 + 2  # A line for each learning rate.
    assert not list(tmp_path.iterdir())


def test_the_table_says_which_runs_are_not_finished(whole, tmp_path):
    for name in ("a", "b"):
        shutil.copytree(whole[0] / "trials" / "000", tmp_path / name)
    rows = [json.loads(x) for x in (tmp_path / "a" / "metrics.jsonl").read_text().splitlines()]
    newest = [row["eval_loss"] for row in rows if "eval_loss" in row][-1]
    assert "Not finished" not in report.show([tmp_path / "a", tmp_path / "b"])
    (tmp_path / "b" / "result.json").unlink()
    told = f"step {rows[-1]['step']}, eval_loss {newest:.4g}"
    line = f"Not finished: {tmp_path / 'b'} ({told})."
    assert report.show([tmp_path / "a", tmp_path / "b"]).splitlines()[-1] == line
    with pytest.raises(ValueError, match=r"RUN must be a directory: .*metrics\.jsonl is a file"):
        report.show([tmp_path / "a" / "metrics.jsonl"])
    report.write([tmp_path / "a", tmp_path / "b"], tmp_path / "out")
    assert line in (tmp_path / "out" / "report.md").read_text()


def test_what_changes_no_number_tells_no_runs_apart(tmp_path):
    runs = [
        run_of(1.0, checkpoint__keep=n, eval__sample=n, task__path=f"a/{n}.txt") for n in (1, 2)
    ]
    assert report.table(runs)[0][:2] == ["directory", "task.path"]
    assert [line.label for line in lines(runs, "eval_loss")] == ["path=1.txt", "path=2.txt"]


def test_each_task_has_a_table_and_pictures(tmp_path, monkeypatch):
    runs = {
        "a": run_of(1.0, task__name="copy", optimizer__learning_rate=0.1),
        "b": run_of(3.0, task__name="my.py:task", model__features=8),
        "c": run_of(2.0, task__name="copy", optimizer__learning_rate=0.3),
    }
    monkeypatch.setattr(report, "load", lambda name: [runs[name]._replace(name=name)])
    first, second = report.show("abc").split("\n\n")
    assert first.splitlines()[0] == "copy, 9 steps, 1 seed"
    assert [len(x.splitlines()) for x in (first, second)] == [4, 3]
    assert "model.features" not in first
    written = report.write("abc", tmp_path, x="learning_rate")  # The other task has none.
    names = {path.stem for path in written}
    assert names == {"report", "curves_copy", "curves_my_py_task", "by_learning_rate_copy"}
    assert (tmp_path / "report.md").read_text().count("## ") == 2
    assert len(report.show("abc", x="task").split("\n\n")) == 1


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["nowhere", "--out={out}"], "nowhere holds no run"),
        (["{run}", "{run}/trials/000"], "each run must be named once: "),
        (["{run}", "--out={out}", "--x=name"], "Did you mean model.name or "),
        (["--out={out}"], "RUN"),
        (["{run}", "--out={out}", "--x=model.width"], "'model.width'"),
        (["{run}", "--out={out}", "--metric=eval_accuracy"], "must be one of eval_loss"),
        (["{run}", "--out={out}", "--metric=fingerprint"], "must be one of eval_loss"),
        (["{run}", "--out={out}", "--x=seed"], "one line"),
        (["{run}", "--out={out}", "--metric=*"], "must be one of eval_loss"),
        (
            ["{run}", "--out={out}", "--x=model.features", "--published={paper}"],
            "none of the values",
        ),
        (["{run}", "--out={out}", "--published=p.json"], "needs --x"),
        (
            ["{run}", "--out={out}", "--x=model.features", "--published={run}/config.json"],
            "to numbers",
        ),
    ],
)
def test_what_cannot_be_reported_is_one_line(whole, tmp_path, arguments, words):
    paper = tmp_path / "paper.json"
    paper.write_text('{"7": 0.5}')
    places = {"run": whole[0], "paper": paper, "out": tmp_path / "out"}
    with pytest.raises(ConfigError) as error:
        report.main(["report", *(argument.format_map(places) for argument in arguments)])
    assert words in str(error.value)
    assert "\n" not in str(error.value)


def test_a_file_that_cannot_be_exported_is_named(whole, tmp_path):
    file = tmp_path / "none" / "x.safetensors"
    with pytest.raises(ConfigError, match=rf"^OUT cannot be written: No such file.*: {file}\.$"):
        export.main(["export", f"{whole[0]}/trials/000", str(file)])


def test_a_report_that_cannot_be_written_leaves_the_one_before(whole, tmp_path, monkeypatch):
    from matplotlib.figure import Figure

    before = {path.name: path.read_bytes() for path in report.write([whole[0]], tmp_path)}

    def full(*arguments, **options):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Figure, "savefig", full)
    with pytest.raises(RunError, match=r"^--out=.* cannot be written: No space left on device\.$"):
        report.main(["report", str(whole[0]), f"--out={tmp_path}"])
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_names_that_moved_are_still_where_they_were():
    from attention_jax import training
    from attention_jax.laboratory import sweep
    from attention_jax.training import build, experiment

    assert training.sweep is sweep
    assert (experiment.make_task, experiment.make_model) == (build.make_task, build.make_model)
    with pytest.raises(AttributeError, match="swoop"):
        training.swoop  # noqa: B018
