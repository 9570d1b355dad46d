"""Many trials of one experiment, side by side in one compiled program.

    train.py --sweep optimizer.learning_rate=1e-4,1e-3,1e-2 --sweep seed=0,1,2,3

Fields that only change numbers become arrays with a value for each trial, and `jax.vmap` maps the
train step over them. Each value of any other field needs another program. A program maps over all
combinations of the fields that only change numbers: see groups.py. A trial equals `experiment.run`
with the same config, up to rounding.
"""

import os
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, closing
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from attention_jax.laboratory import pictures, report
from attention_jax.laboratory.groups import build, first_trials
from attention_jax.laboratory.runs import Run, is_loss, main_metric, slices
from attention_jax.training import build as builder
from attention_jax.training import experiment, hosts
from attention_jax.training.config import ConfigError, Target, flatten, refused, trials
from attention_jax.training.files import MODEL, VOCABULARY, trial_directory
from attention_jax.training.launch import make_launcher
from attention_jax.training.loading import files_to_keep
from attention_jax.training.metrics import Busy, Console, JsonLines
from attention_jax.training.process import StopSignals, prepare, say
from attention_jax.training.run_directory import NoDirectory, reported, write_json
from attention_jax.training.step import first_bad_step, not_finite
from attention_jax.types import PyTree


class SweepState(NamedTuple):
    """All that a sweep carries from epoch to epoch, and all that its checkpoint holds.

    Attributes:
        step: Steps done so far by the active trials.
        numbers: For each program the numbers of its trials, `[trials]`.
        trials: For each program the parameters and optimizer states of its trials,
            `[trials, ...]`.
        diverged: The step at which each trial met a NaN or infinity, `[all trials]`; 0 if it did
            not.
        reached: The step at which each trial reached the target; 0 if it did not.
    """

    step: np.ndarray
    numbers: tuple[np.ndarray, ...]
    trials: tuple[tuple[PyTree, PyTree], ...]
    diverged: np.ndarray
    reached: np.ndarray


class Result(NamedTuple):
    """The result of a complete sweep.

    Attributes:
        metrics: The contents of `result.json`: `step`, `seconds`, `trial_steps_per_second`; `best`,
            the number of the best trial by the metric `best_by`, or None if all diverged; and under
            `trials` for each trial its number, the swept values, and the metrics of a run.
        histories: The rows of each trial.
        params: The trained parameters of each trial; None if it diverged.
    """

    metrics: dict[str, Any]
    histories: list[list[dict[str, Any]]]
    params: list[PyTree | None]


def run(
    config: ConfigDict,
    axes: Mapping[str, Sequence[Any]],
    workdir: str | os.PathLike | None = None,
) -> Result:
    """Trains all combinations of the values of the axes, or finishes an earlier call.

    Args:
        config: The config that the trials share.
        axes: The values of each swept field, by its path: `{"seed": [0, 1]}`.
        workdir: The directory of the sweep. None writes no files.

    Raises:
        ConfigError: The config, the axes or the directory is invalid, or the trials of a program do
            not divide evenly among the devices.
        Interrupted: After SIGTERM, SIGINT or SIGHUP, with a checkpoint saved.
    """
    if not axes:
        raise ConfigError("a sweep needs an axis: got none.")
    if hosts.count() > 1:
        raise ConfigError(f"a sweep is for one process: got {hosts.count()}.")
    configs = trials(config, axes)
    noted = ConfigDict(config.to_dict() | {"sweep": _nested(axes)})
    started = time.perf_counter()
    prepare()
    with builder.refusals():
        launcher = make_launcher(config)
        groups = build(configs, axes, launcher)

    def work(store):
        return _run(config, configs, axes, launcher, groups, store, started)

    of = [(group.config, group.task) for group in groups]
    return experiment.in_directory(workdir, noted, work, of)


def _nested(axes):
    """`{"a.b": [...]}` as `{"a": {"b": [...]}}`: a ConfigDict takes no dots in names."""
    nested = {}
    for path, values in axes.items():
        *sections, field = path.split(".")
        place = nested
        for section in sections:
            place = place.setdefault(section, {})
        place[field] = list(values)
    return nested


def _run(config, configs, axes, launcher, groups, store, started):
    directory = store.path
    target = Target.parse(config.train.target)
    with StopSignals() as stop, ExitStack() as files:
        state = store.restore(lambda: jax.eval_shape(lambda: _like(groups)))
        log = _Log(configs, axes, groups, state, directory, files)
        if store.result is not None:
            if len(store.result.get("trials") or ()) != len(configs):
                raise ConfigError(f"{directory / 'result.json'} is not of this sweep.")
            say(f"{store} holds this sweep, complete, nothing to do.", log.table(store.result))
            params = _params(groups, [params for params, _ in state.trials], log)
            return Result(store.result, log.histories, params)
        _announce(config, axes, groups, len(configs), store.step)
        if state is None:
            states, busy = [], Busy(say)
            for group, told in zip(groups, _compiling(groups, "the start"), strict=True):
                with busy(told):
                    states.append(first_trials(group))
        else:
            states = [launcher.put_trials(trials) for trials in state.trials]
        step = _train(config, target, launcher, groups, states, log, store, started, stop)
        params = _params(groups, [launcher.get_trials(params) for params, _ in states], log)
        metrics = _summary(configs, axes, target, launcher, groups, params, log, step)
    rows = dict.fromkeys(x["held_out"] for x in metrics["trials"] if "held_out" in x)
    say(log.table(metrics), *(f"held-out rows: {words}" for words in rows))
    say(*_best_line(metrics, directory))
    if directory is not None:
        with reported(directory):
            log.draw(metrics, directory / "sweep.png")
    say(store.complete(metrics))
    return Result(metrics, log.histories, params)


def _params(groups, stacked, log):
    """The parameters of each trial that has not diverged, in host memory, by its number."""
    params = [None] * len(log.configs)
    for group, tree in zip(groups, stacked, strict=True):
        for i, number in enumerate(group.numbers):
            if not log.diverged[number]:
                params[number] = jax.tree.map(lambda x: x[i], tree)  # noqa: B023
    return params


def _best_line(metrics, directory):
    number, metric = metrics["best"], metrics["best_by"]
    if number is None:
        return [f"all {len(metrics['trials'])} trials have diverged"]
    place = "" if directory is None else f": {trial_directory(directory, number)}"
    value = metrics["trials"][number][metric]
    return [f"best by {metric}, {value:.4g}: trial {number}{place}"]


def _announce(config, axes, groups, num_trials, step):
    count = experiment.count
    devices = jax.tree.leaves(groups[0].settings)[0].sharding.device_set
    programs = count(len(groups), "program")
    what = f"{count(num_trials, 'trial')} over {', '.join(axes)} in {programs}"
    experiment.announce(config, what, devices, step)


def _compiling(groups, what):
    """The text to print while a function of each group is compiled."""
    if len(groups) == 1:
        return [f"compiling {what}"]
    return [
        f"compiling {what} of program {number} of {len(groups)}: {group.name}"
        for number, group in enumerate(groups, start=1)
    ]


def _like(groups):
    """The structure of a sweep's state, to restore a checkpoint."""
    empty = lambda tree: jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), tree)
    none = jnp.zeros(sum(len(group.numbers) for group in groups), jnp.int32)
    return SweepState(
        jnp.int32(0),
        tuple(jnp.array(group.numbers, jnp.int32) for group in groups),
        tuple(empty(group.like) for group in groups),
        none,
        none,
    )


class _Log:
    """The trials on the host: their rows, and which are frozen.

    Attributes:
        histories: The rows of each trial.
        diverged, reached: As in `SweepState`.
    """

    def __init__(self, configs, axes, groups, state, directory, files):
        self.configs, self.axes = configs, axes
        none = np.zeros(len(configs), np.int32)
        self.diverged = none.copy() if state is None else np.array(state.diverged)
        self.reached = none.copy() if state is None else np.array(state.reached)
        self.directory = directory
        tasks = {number: x.task for x in groups for number in x.numbers}
        self.histories: list[list] = [[] for _ in configs]
        self._lines = []
        if directory is None:
            return
        num_steps = configs[0].train.steps_per_epoch
        for number, config in enumerate(configs):
            place = trial_directory(directory, number)
            last = 0 if state is None else int(state.step)
            if self.diverged[number]:  # That epoch has no row.
                last = (self.diverged[number] - 1) // num_steps * num_steps
            with refused(), reported(place):
                place.mkdir(parents=True, exist_ok=True)
                write_json(place / "config.json", {"config": config.to_dict()})
                if tasks[number].text is not None:
                    write_json(place / VOCABULARY, tasks[number].text.to_dict())
                if (kept := files_to_keep(config, tasks[number])) is not None:
                    write_json(place / MODEL, kept)
                lines = JsonLines(place / "metrics.jsonl", int(self.reached[number] or last))
            self._lines.append(files.enter_context(closing(lines)))
            self.histories[number] = lines.rows

    @property
    def active(self):
        """Which trials go on."""
        return (self.diverged == 0) & (self.reached == 0)

    def write(self, number, row):
        if self._lines:
            with reported(self.directory):
                self._lines[number].write(row)  # Also appends to the history.
        else:
            self.histories[number].append(row)

    def sync(self):
        with reported(self.directory):
            for lines in self._lines:
                lines.sync()

    def runs(self, metrics):
        """The trials as `Run`s for a report, named as their directories."""
        return [
            Run(f"{number:03}", flatten(config), result, rows)
            for number, (config, result, rows) in enumerate(
                zip(self.configs, metrics["trials"], self.histories, strict=True)
            )
        ]

    def table(self, metrics):
        return report.aligned(report.table(self.runs(metrics)))

    def draw(self, metrics, path):
        """Draws the final metric on slices or against the first field but the seed, or curves."""
        runs = self.runs(metrics)
        if slices(runs, main_metric(runs)):
            return pictures.draw_slices(runs, path)
        fields = [path for path, values in self.axes.items() if path != "seed" and len(values) > 1]
        if fields:
            return pictures.draw_against(runs, fields[0], path)
        pictures.draw_curves(runs, path)


def _train(config, target, launcher, groups, states, log, store, started, stop):
    """Runs the remaining epochs, and puts the final states into `states`.

    Returns the last step.
    """
    num_steps, epochs = config.train.steps_per_epoch, config.train.epochs
    first_epoch = store.step // num_steps
    if store.rows:
        started -= store.rows[-1]["seconds"]

    def put_active():
        return [launcher.put_trials(log.active[group.numbers]) for group in groups]

    def record(epoch, results):
        """Fetches the numbers of an epoch, which waits for the devices, and writes them."""
        first_step, last_step = (epoch - 1) * num_steps + 1, epoch * num_steps
        ends, seconds = [], []
        for group, found in zip(groups, results, strict=True):
            if found is None:
                continue
            *found, finish = found
            found = launcher.get_trials(found)
            seconds.append(round(finish.time() - started, 3))
            for i, number in enumerate(group.numbers):
                if not log.active[number]:
                    continue
                metrics, held_out = jax.tree.map(lambda x: x[i], found)  # noqa: B023
                own = log.configs[number]
                allowed = own.optimizer.max_skipped
                broken = first_bad_step(metrics, first_step, max_skipped=allowed)
                if broken is None and not_finite(held_out):
                    broken = last_step
                if broken is not None:
                    log.diverged[number] = broken
                    continue
                for row in experiment.rows_of_epoch(own, epoch, metrics, held_out):
                    if row["step"] == last_step:
                        row["seconds"] = seconds[-1]
                    log.write(number, row)
                ends.append(row)
                if target is not None and held_out and target.is_reached(held_out):
                    log.reached[number] = last_step
        row = {"step": last_step, "epoch": epoch, "active": int(log.active.sum())}
        for name in ("loss", "accuracy", "eval_loss", "eval_accuracy"):
            values = [end[name] for end in ends if np.isfinite(end.get(name, np.nan))]
            if values:
                row[f"best_{name}"] = (min if is_loss(name) else max)(values)
        row["seconds"] = max(seconds)
        store.write(row)
        console.write(row)

    compiled = set()

    def call(i, name, *arguments):
        """Calls a function of a group; a line announces the first call, which compiles it."""
        function = getattr(groups[i], name)
        if (i, name) in compiled:
            return function(*arguments)
        compiled.add((i, name))
        what = {"epoch": "the training", "evaluate": "the evaluation"}[name]
        with console.busy(_compiling(groups, what)[i]):
            return function(*arguments)

    active, waiting, step = put_active(), None, store.step
    with closing(Console(epochs, first_epoch)) as console:
        for epoch in range(first_epoch + 1, epochs + 1):
            if not log.active.any():
                break
            evaluates = epoch == epochs or epoch % config.eval.every_epochs == 0
            results = []
            for i, group in enumerate(groups):
                if not log.active[group.numbers].any():
                    results.append(None)
                    continue
                given = (group.settings, active[i])
                step_now = np.int32(step)
                states[i], active[i], metrics = call(i, "epoch", step_now, states[i], given)
                held_out = {}
                if evaluates:
                    given = (group.settings, active[i])
                    active[i], held_out = call(i, "evaluate", None, states[i][0], given)
                results.append((metrics, held_out, experiment.Finish((metrics, held_out))))
            step = epoch * num_steps
            # One epoch late, as a run does.
            if waiting is not None:
                record(*waiting)
            waiting = epoch, results
            stops = evaluates and target is not None
            saves = stop.number or epoch % config.checkpoint.every_epochs == 0
            # If the recorded epoch has ended the last active trial, this epoch is the last.
            if epoch == epochs or stops or saves or not log.active.any():
                record(*waiting)
                waiting = None
            if stops:
                active = put_active()
            if epoch == epochs or saves or not log.active.any():
                _save(step, launcher, groups, states, log, store)
            if stop.number and epoch < epochs and log.active.any():
                experiment.leave(stop.number, step, store)
    return step


def _save(step, launcher, groups, states, log, store):
    if isinstance(store, NoDirectory):
        return
    trials = tuple(launcher.get_trials(state) for state in states)
    numbers = tuple(np.array(group.numbers, np.int32) for group in groups)
    log.sync()
    diverged, reached = log.diverged.copy(), log.reached.copy()
    store.save(SweepState(np.int32(step), numbers, trials, diverged, reached))


def _summary(configs, axes, target, launcher, groups, params, log, step):
    """The result of a sweep at its end."""
    results = [{} for _ in configs]
    for group in groups:
        baselines = launcher.get_trials(group.baseline(None, None, group.settings))
        for i, number in enumerate(group.numbers):
            history = log.histories[number]
            swept = {path: flatten(configs[number])[path] for path in axes}
            found = {"step": history[-1]["step"] if history else 0}
            try:
                if not log.diverged[number]:
                    found = experiment.result_metrics(
                        configs[number], group.task, target, params[number], history, baselines[i]
                    )
                    del found["steps_per_second"]  # Other trials shared its time.
            except experiment.Diverged:
                log.diverged[number] = found["step"]
            if log.diverged[number]:
                found["diverged_step"] = int(log.diverged[number])
            results[number] = {"trial": number, **swept, **found}
            if log.directory is not None:
                place = trial_directory(log.directory, number)
                with reported(place):
                    write_json(place / "result.json", results[number])
    seconds = max((history[-1]["seconds"] for history in log.histories if history), default=0.0)
    total = sum(result["step"] for result in results)
    metrics = {
        "step": step,
        "seconds": seconds,
        "trial_steps_per_second": float(f"{total / seconds:.4g}") if total else 0.0,
        "trials": results,
    }
    by = f"eval_{target.metric}" if target else main_metric(log.runs(metrics))
    found = {result["trial"]: result[by] for result in results if by in result}
    best = (min if is_loss(by) else max)(found, key=found.get) if found else None
    return metrics | {"best": best, "best_by": by}
