"""The training loop: a run from its config to its result.

>>> from attention_jax.training import config, experiment
>>> result = experiment.run(config.default_config(), workdir="runs/first")  # doctest: +SKIP
>>> result.metrics["eval_loss"]                                             # doctest: +SKIP
"""

import contextlib
import hashlib
import json
import os
import signal
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, NamedTuple, NoReturn

import jax
import numpy as np
from ml_collections import ConfigDict

from attention_jax.tasks.task import Task, about_held_out
from attention_jax.training import budget, hosts
from attention_jax.training import step as steps
from attention_jax.training.ahead import Ahead
from attention_jax.training.build import build
from attention_jax.training.build import make_task as make_task  # It stood here once.
from attention_jax.training.checkpoint import fingerprint, fitted, restore_params
from attention_jax.training.clock import Finish, FirstCall
from attention_jax.training.config import (
    ConfigError,
    Target,
    check,
    flatten,
    refused,
    slice_settings,
)
from attention_jax.training.files import (
    MODEL,
    VOCABULARY,
    is_hugging_face,
    is_weights,
    local_path,
)
from attention_jax.training.loading import check_vocabulary, files_to_keep
from attention_jax.training.metrics import Busy, Console, metrics_line
from attention_jax.training.model import description
from attention_jax.training.model import make_model as make_model  # Likewise.
from attention_jax.training.optimizer import budget_end, with_budget
from attention_jax.training.process import RunError, StopSignals, prepare, say, versions
from attention_jax.training.rules import MOST_32_BITS, label
from attention_jax.training.run_directory import (
    NoDirectory,
    RunDirectory,
    claim,
    clear,
    difference,
    is_begun,
    is_of_host,
    owned,
    settings_of_jax,
)
from attention_jax.training.watch import make_look
from attention_jax.types import Array, PyTree


class Interrupted(RunError):
    """SIGTERM, SIGINT or SIGHUP ended the run, after its state was saved."""

    def __init__(self, message: str, number: int):
        super().__init__(message)
        self.status = 128 + number


class Diverged(RunError):
    """The loss, a gradient, the parameters, or a number to report is NaN or infinite."""


class Result(NamedTuple):
    """The result of a complete run.

    Attributes:
        params: The trained parameters.
        metrics: The contents of `result.json`: `step`, `first_loss`, `train_loss`, `eval_loss` and
            the other held-out metrics, `held_out`, which describes the held-out rows, `seconds`,
            `steps_per_second`, `num_params` and `fingerprint`. With a target also `target_step` and
            `target_seconds`, None if it was not reached; with `max_skipped` also `skipped`, the
            number of skipped steps.
        history: The rows of `metrics.jsonl`: one for every epoch and one for the first step. The
            latter has no `seconds`, because an epoch is one program.
    """

    params: PyTree
    metrics: dict[str, Any]
    history: list[dict[str, Any]]


def run(config: ConfigDict, workdir: str | os.PathLike | None = None) -> Result:
    """Trains by the config, or finishes an earlier run in `workdir`.

    Args:
        config: From `default_config`, with any fields changed.
        workdir: The run directory. None writes no files.

    Returns:
        The result, also if the run was complete before.

    Raises:
        ConfigError: The config or the run directory is invalid.
        Diverged: NaN or infinity, named with its step; the last good checkpoint is kept.
        Interrupted: After SIGTERM, SIGINT or SIGHUP, with a checkpoint saved.
    """
    check(config)
    started = time.perf_counter()
    prepare()
    if config.train.minutes:
        if hosts.count() > 1:
            raise ConfigError(
                f"{label('train.minutes')} is for one process, not for {hosts.count()}: their "
                "clocks differ. Take --epochs."
            )
        with refused():
            path = None if workdir is None else local_path(workdir, "the run directory (--workdir)")
            config = budget.noted(config, path)
    # Built before the directory is claimed, so that after an error a corrected config can use it.
    program = build(config)
    work = lambda store: _run(config, program, store, started)
    with hosts.together():
        return in_directory(workdir, config, work, [(config, program.task)])


def in_directory(
    workdir: str | os.PathLike | None,
    config: ConfigDict,
    work: Callable[[RunDirectory | NoDirectory], Any],
    of: Sequence[tuple[ConfigDict, Task]],
) -> Any:
    """Runs `work` in a run directory that is claimed for the config, or without one.

    A failure before the first step is written leaves the directory as it was. A directory is
    refused if a file that a model or a task of `of` reads has changed.
    """
    if workdir is None or not hosts.is_first():
        return work(NoDirectory())
    with _told_to_all(), owned(workdir) as path:
        claim(path, config, versions(), files_of(of))
        try:
            with contextlib.closing(RunDirectory(path, config)) as directory:
                return work(directory)
        finally:
            if not is_begun(path):
                clear(path)


def files_of(of: Sequence[tuple[ConfigDict, Task]]) -> dict[str, str]:
    """The hashes of the files that the models of configs and the tasks read, by their names."""
    files: dict[str, list[str]] = {}
    for config, task in of:
        settings = {} if task.text is None else task.text.settings()
        if (described := description(config)) is not None:
            written = json.dumps(described, sort_keys=True).encode()
            settings["the sha256 of config.model.name"] = hashlib.sha256(written).hexdigest()
        for name, value in settings.items():
            files.setdefault(name, []).append(value)
    return {name: " ".join(found) for name, found in files.items()}


@contextlib.contextmanager
def _told_to_all():
    """Tells the other processes an error before the first step: they wait for the state."""
    try:
        yield
    except RunError as error:
        hosts.tell(error)
        raise


def _run(config, program, store, started):
    if program.task.text is not None:
        store.keep(VOCABULARY, program.task.text.to_dict())
    with refused():
        kept = files_to_keep(config, program.task)
    if kept is not None:
        store.keep(MODEL, kept)
    with StopSignals() as stop, Ahead() as ahead:
        look = make_look(config, program.init.eval_shape().params)
        state = _begin(config, program, store, look, ahead)
        if store.result is not None:
            say(f"{store} holds this run, complete: {metrics_line(store.result)}, nothing to do.")
            return Result(state.params, store.result, list(store.rows))
        state = program.put_state(state)
        what = f"{config.model.name}, {num_params(state.params):,} parameters"
        announce(config, what, state.step.sharding.device_set, store.step)
        state, history, pace = _train(config, program, state, store, look, started, stop, ahead)
        ahead.wait("baseline")
    result = _summary(config, program, state, history, pace)
    say(store.complete(result.metrics))
    return result


def _begin(config, program, store, look, ahead):
    """The state that the run begins with, which process 0 finds for all."""
    state = store.restore(program.init.eval_shape) if hosts.is_first() else None
    if state is None:
        if not config.init_from:  # Which may be refused.
            _compile_ahead(config, program, look, ahead)
        with Busy(say)("compiling the start"):
            state = _first_state(config, program)
    settings = flatten(config) | settings_of_jax() | files_of([(config, program.task)])
    differing = ""
    if hosts.is_first():
        message = {"step": store.step, "rows": list(store.rows), "result": store.result}
        hosts.tell(message | {"settings": settings})
    else:
        message = hosts.listen()
        settings = json.loads(json.dumps(settings))  # As the other ones came.
        differing = difference(message["settings"], settings, is_of_host)
        store.step, store.rows, store.result = (message[x] for x in ("step", "rows", "result"))
    if hosts.largest(bool(differing)):
        raise ConfigError(
            f"the command differs from that of process 0: {differing}."
            if differing
            else "the command of another process differs; that process says how."
        )
    return hosts.share(state)


def _compile_ahead(config, program, look, ahead):
    """Begins to compile the programs of a run, in the order of their calls.

    `sharded` compiles when it is called, because the state tells how it is split. So do several
    processes.
    """
    if config.launcher == "sharded" or hosts.count() > 1:
        return
    sharding = program.put_state(np.int32(0)).sharding
    place = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)
    state = jax.tree.map(place, program.init.eval_shape())
    params = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), state.params)
    more = {}
    if look.watch is not None:
        more["heads"] = lambda: look.watch.lower(state.params).compile()
    if look.sampler is not None:
        more["sample"] = lambda: look.sampler.compile_ahead(params)
    ahead.start(
        {
            "epoch": lambda: program.epoch.lower(state, program.rows).compile(),
            "evaluate": lambda: program.evaluate.lower(state.params, program.rows).compile(),
            **more,
            "baseline": lambda: program.baseline.lower().compile(),
        }
    )


def _first_state(config, program):
    if config.init_from and hosts.is_first():
        check_vocabulary(config.init_from, program.task)
    state = program.init()
    if config.init_from and hosts.is_first():
        state = state._replace(params=first_params(config.init_from, like=state.params))
    return state


def first_params(init_from: str, like: PyTree) -> PyTree:
    """The parameters of `--init_from`, of a run, of Hugging Face, or in a file of weights.

    Raises:
        ConfigError: They are missing, broken, or do not fit.
    """
    try:
        path = local_path(init_from, "it")
        if is_weights(path):
            from attention_jax.interop import weights

            return fitted(weights.load(path), like, "the file")
        if is_hugging_face(path):
            from attention_jax.interop import huggingface

            _, params = huggingface.load(path, dtype=np.float32)
            return fitted(params, like, "the directory")
        return restore_params(init_from, like=like)
    except (OSError, RuntimeError, ValueError, NotImplementedError) as error:
        raise ConfigError(f"--init_from={init_from}: {error}") from error


def _train(config, program, state, store, look, started, stop, ahead):
    """Runs the remaining epochs; returns the state, all rows, and the steps per second."""
    num_steps, epochs = config.train.steps_per_epoch, config.train.epochs
    is_open = bool(config.train.minutes)  # Whether the number of epochs is still to be found.
    if is_open and (end := budget_end(state.opt_state)) is not None:
        is_open = False
        if config.train.epochs != end // num_steps:  # Killed before it was written.
            config.train.epochs = end // num_steps
            store.renew(config)
    epochs = MOST_32_BITS // num_steps if is_open else config.train.epochs
    first_epoch = store.step // num_steps
    history = list(store.rows)
    if history:
        started -= history[-1]["seconds"]
    target = program.target
    if is_at(target, history):  # The process died before it wrote its result.
        return state, history, None
    if first_epoch < epochs:
        _compile_ahead(config, program, look, ahead)

    def record(epoch, metrics, held_out, written, finish):
        """Fetches the numbers of an epoch, which waits for the devices, and writes them."""
        metrics, held_out = jax.device_get((metrics, held_out))
        first_step = (epoch - 1) * num_steps + 1
        try:
            steps.check_finite(metrics, first_step, max_skipped=config.optimizer.max_skipped)
        except FloatingPointError as error:
            raise Diverged(str(error)) from error
        check_metrics(held_out, epoch * num_steps, "held-out ")
        for row in rows_of_epoch(config, epoch, metrics, held_out):
            if row["step"] == epoch * num_steps:  # The first step has no time.
                finished.append((row["step"], finish.time()))
                row["seconds"] = round(finish.time() - started, 3)
            history.append(row)
            store.write(row)
            console.write(row, written if row["step"] == epoch * num_steps else None)
        if written is not None:
            store.write_sample(epoch * num_steps, written)

    waiting, epoch, finished = None, first_epoch, []
    with contextlib.closing(Console(None if is_open else epochs, first_epoch)) as console:
        run_epoch = FirstCall(
            program.epoch, "the training", console.busy, lambda: ahead.wait("epoch")
        )
        evaluate = FirstCall(
            program.evaluate, "the evaluation", console.busy, lambda: ahead.wait("evaluate")
        )
        watch = sample = None
        if look.watch is not None:
            ready = lambda: ahead.wait("heads")
            watch = FirstCall(look.watch, "the heads", console.busy, ready)
        if look.sampler is not None:
            ready = lambda: ahead.wait("sample")
            sample = FirstCall(look.sampler.sample, "the samples", console.busy, ready)
        calls = [x for x in (run_epoch, evaluate, watch, sample) if x is not None]

        def look_at(state, step):
            """What an evaluation finds, and what the model writes."""
            held_out = evaluate(state.params, program.rows)
            if watch is not None:
                held_out = held_out | watch(state.params)
            if sample is None:
                return held_out, None
            # One process writes, on a device of its own, however the parameters are split.
            params = jax.device_get(program.get_state(state.params))
            return held_out, sample(params, step) if hosts.is_first() else None

        if config.init_from and not first_epoch:  # How much has training changed?
            before = jax.device_get(evaluate(state.params, program.rows))["loss"]
            console.say(f"held-out loss before the first step: {before:.4g}")
        pilot = review = None
        goes_on = config.train.minutes and not is_open
        while epoch < epochs:
            if is_open and epoch == first_epoch + 1:
                ahead.wait()  # Else the epochs that are measured are slower than the rest.
                jax.block_until_ready(state)
                pilot = budget.Pilot(config, started)
            elif pilot is not None:
                pilot.end_lap()
            elif goes_on and epoch == first_epoch + 1:  # The first one compiles.
                jax.block_until_ready(state)
                review = budget.Review(config, started, epoch)
            epoch, decides = epoch + 1, False
            state, metrics = run_epoch(state, program.rows)
            if pilot is not None:
                decides = pilot.is_over()
                if decides or not pilot.laps:
                    jax.block_until_ready(state)
                if not pilot.laps:
                    pilot.check_warmup(epoch)
                    decides = pilot.is_over()
            if decides:
                evaluate_all = lambda: jax.block_until_ready(look_at(state, 0))  # noqa: B023
                fit = budget.epochs_that_fit(config, epoch, pilot, evaluate_all)
                is_open, epochs = False, fit.epochs
                config.train.epochs = epochs
                if fit.seconds > 60 * config.train.minutes:
                    fewer = max(1, int(0.8 * num_steps * 60 * config.train.minutes / fit.seconds))
                    console.say(
                        f"--minutes={config.train.minutes:g} is less than "
                        f"{budget.LEAST} epochs take, the fewest: about {fit.seconds:.0f} s. A "
                        f"smaller config.train.steps_per_epoch, as {fewer}, makes them shorter."
                    )
                console.set_epochs(epochs, (epoch, time.perf_counter() - started))
                begin, end = epoch * num_steps, epochs * num_steps
                state = state._replace(opt_state=with_budget(state.opt_state, end, begin))
                state, pilot = program.put_state(state), None
                review = budget.Review(config, started, epoch)
            elif review is not None and review.is_due(epoch):
                jax.block_until_ready(state)
                fewer, review = review.epochs(epoch), None
                if fewer < epochs:
                    decides, epochs, config.train.epochs = True, fewer, fewer
                    console.set_epochs(epochs, (epoch, time.perf_counter() - started))
                    console.say(
                        f"The machine has become slower: {count(epochs, 'epoch')} fit in "
                        f"--minutes={config.train.minutes:g}."
                    )
                    end = epochs * num_steps
                    state = state._replace(opt_state=with_budget(state.opt_state, end))
                    state = program.put_state(state)
            last, held_out, written = epoch == epochs, {}, None
            if last or epoch % config.eval.every_epochs == 0:
                held_out, written = look_at(state, epoch * num_steps)
                if pilot is not None:
                    pilot.evaluated()
            if target is not None and held_out:
                # Wait for the devices here, so that no epoch runs after the target.
                last = last or target.is_reached(jax.device_get(held_out))
            # Written one epoch late, so that the devices work while the host writes.
            if waiting is not None:
                record(*waiting)
            waiting = epoch, metrics, held_out, written, Finish((metrics, held_out))
            saves = epoch % config.checkpoint.every_epochs == 0 or decides
            stopped = hosts.largest(stop.number or 0)
            if last or stopped or saves:
                # `record` first: only a sound state whose rows are written may be saved.
                record(*waiting)
                waiting = None
                begun = time.perf_counter()
                store.save(program.get_state(state))
                if pilot is not None:
                    pilot.saved(time.perf_counter() - begun)
            if decides:  # The checkpoint is the one that counts: a config without it is undone.
                store.wait()
                store.renew(config)
            if stopped and not last:
                leave(stopped, epoch * num_steps, store)
            if last:
                break
    return state, history, steps_per_second(finished, calls, ahead.ended)


def steps_per_second(
    ends: Sequence[tuple[int, float]], calls: Sequence[FirstCall], compiled: float
) -> float | None:
    """The speed of a run once its programs are compiled; None if it ended sooner.

    Args:
        ends: The steps done at the end of each epoch, and the time by `time.perf_counter`.
        calls: Of what the run calls. A first call counts for nothing.
        compiled: When all programs were compiled. Epochs that ended sooner count if no two others
            did later.
    """
    if not ends:
        return None
    later = [end for end in ends if end[1] >= compiled]
    (first, begun), (last, ended) = (later if len(later) > 1 else ends)[0], ends[-1]
    skipped = sum(call.seconds for call in calls if call.called is not None and call.called > begun)
    return (last - first) / (ended - begun - skipped) if last > first else None


def leave(number: int, step: int, store: RunDirectory | NoDirectory) -> NoReturn:
    """Ends a run after a signal: raises Interrupted once the checkpoint is on the disk."""
    store.wait()  # The message below says that the state is saved.
    saved = "" if isinstance(store, NoDirectory) else " and saved: run again to go on"
    raise Interrupted(f"stopped by {signal.Signals(number).name} at step {step}{saved}.", number)


def is_at(target: Target | None, history: list[dict[str, Any]]) -> bool:
    """Whether the last row of a run has reached the target."""
    if target is None or not history or f"eval_{target.metric}" not in history[-1]:
        return False
    return target.is_reached({target.metric: history[-1][f"eval_{target.metric}"]})


def check_metrics(metrics: Mapping[str, Any], step: int, prefix: str = "") -> None:
    """Raises Diverged, naming the step, unless all the metrics are finite."""
    if reasons := steps.not_finite(metrics, prefix):
        raise Diverged(f"training diverged at step {step}: {reasons}.")


def rows_of_epoch(config, epoch, metrics, held_out):
    """The rows of an epoch.

    Every training metric is a mean over the steps since the row before, without skipped ones. If
    all were skipped, the row has no training metrics.
    """
    num_steps = config.train.steps_per_epoch
    first_step = (epoch - 1) * num_steps + 1
    sound = metrics["bad_steps"] == 0
    metrics, held_out = _loss_first(metrics), _loss_first(held_out)
    # The first step has a row too, to show where the run began.
    ends = [1, num_steps] if first_step == 1 and num_steps > 1 else [num_steps]
    for begin, end in zip([0, *ends], ends, strict=False):
        row = {"step": first_step + end - 1, "epoch": epoch}
        kept = sound[begin:end]
        if kept.any():
            row |= {name: float(x[begin:end][kept].mean()) for name, x in metrics.items()}
        if config.optimizer.max_skipped:
            row["skipped"] = int((~kept).sum())
        if end == num_steps:
            row |= {f"eval_{name}": float(value) for name, value in held_out.items()}
        yield row


def _loss_first(metrics):
    """The metrics with the loss first, without the weight and the count of bad steps."""
    names = sorted(
        metrics.keys() - {"weight", "bad_steps"}, key=lambda name: (name != "loss", name)
    )
    return {name: metrics[name] for name in names}


def _summary(config, program, state, history, pace):
    """Prints and returns the result of a run at its end."""
    params = jax.device_get(program.get_state(state.params))
    metrics = result_metrics(
        config, program.task, program.target, params, history, program.baseline(), pace
    )
    first, final, seconds = metrics["first_loss"], metrics["eval_loss"], metrics["seconds"]
    # The first loss of a mixture is over all its parts, and that of a model which has learnt before
    # is of one batch.
    below = (
        f", {first / final:,.1f} times below the first"
        if 0 < final < first and not config.train.slices and not config.init_from
        else ""
    )
    best = min((row for row in history if "eval_loss" in row), key=lambda row: row["eval_loss"])
    if final - best["eval_loss"] > 1e-3 * first:
        below += f"; the lowest was {best['eval_loss']:.4g} at step {best['step']:,}"
    say(
        f"first loss         {first:.4g}",
        f"train loss         {metrics['train_loss']:.4g}",
        f"held-out loss      {final:.4g}{below}",
        f"held-out rows      {metrics['held_out']}",
        f"baseline           {metrics['baseline_loss']:.4g}, {program.task.baseline[0]}",
    )
    if "eval_accuracy" in metrics:
        say(f"held-out accuracy  {metrics['eval_accuracy']:.2%}")
    if (bits := metrics.get("eval_loss_in_bits_per_character")) is not None:
        say(f"bits per character {bits:.4g}")
    kind = "accuracy" if "eval_accuracy" in metrics else "loss"
    for name, value in metrics.items():
        if name.startswith(f"eval_{kind}@"):
            shown = f"{value:.2%}" if kind == "accuracy" else f"{value:.4g}"
            say(f"held-out {kind} at {name.partition('@')[2]}: {shown}")
    if program.target:
        say(f"target             {config.train.target} {_when_reached(metrics)}")
    say(
        f"{count(metrics['step'], 'step')}"
        + (f", {metrics['skipped']} of them skipped," if metrics.get("skipped") else "")
        + f" in {seconds:.1f} s"
        + (f", {pace:.0f} per second once compiled" if pace else "")
        + f"; {metrics['num_params']:,} parameters"
    )
    return Result(params, metrics, history)


def result_metrics(
    config: ConfigDict,
    task: Task,
    target: Target | None,
    params: PyTree,
    history: list[dict[str, Any]],
    baseline: Array,
    pace: float | None = None,
) -> dict[str, Any]:
    """The contents of `result.json`, which `Result` lists.

    Args:
        config, task, target: Of the run.
        params: Its parameters, in host memory.
        history: Its rows.
        baseline: The loss of the task's baseline.
        pace: Steps per second, if known more exactly than from the rows.

    Raises:
        Diverged: The baseline is not finite, or every step was skipped.
    """
    last = history[-1]
    losses = [row["loss"] for row in history if "loss" in row]
    if not losses:
        raise Diverged(f"training diverged: all {last['step']} steps were skipped.")
    check_metrics({"baseline_loss": float(baseline)}, last["step"])
    metrics = {
        "step": last["step"],
        "first_loss": losses[0],
        "train_loss": losses[-1],
        **{name: value for name, value in last.items() if name.startswith("eval_")},
        "baseline_loss": float(baseline),
        "held_out": about_held_out(task, last["step"] * config.train.batch_size),
        "seconds": last["seconds"],
        # Without `pace` the process trained one epoch at most, and its time includes compilation.
        "steps_per_second": float(f"{pace or last['step'] / last['seconds']:.4g}"),
        "num_params": num_params(params),
        "fingerprint": fingerprint(params),
    }
    if config.optimizer.max_skipped:
        metrics["skipped"] = sum(row["skipped"] for row in history)
    if target is not None:  # Both None if it was not reached.
        end = last if is_at(target, history) else {}
        metrics |= {"target_step": end.get("step"), "target_seconds": end.get("seconds")}
    return metrics


def _when_reached(metrics):
    if metrics["target_step"] is None:
        return "not reached"
    return f"reached at step {metrics['target_step']}, after {metrics['target_seconds']:.1f} s"


def announce(config: ConfigDict, what: str, devices: Collection[jax.Device], step: int) -> None:
    """Prints a line about the coming training."""
    train = config.train
    # A step takes a batch of the task and one of each slice.
    num_sequences = train.batch_size * (1 + len(slice_settings(config, "train")))
    platform = next(iter(devices)).platform
    length = count(train.epochs, "epoch")
    if train.minutes:
        length = f"{count(f'{train.minutes:g}', 'minute')}, in epochs"
    say(
        f"{config.task.name}: {what}; "
        f"{length} of {count(train.steps_per_epoch, 'step')} of "
        f"{count(num_sequences, 'sequence')}; "
        f"{config.launcher} on {count(len(devices), f'{platform} device')}",
        *([f"continuing after step {step}"] if step else []),
    )


def count(number, thing):
    """A number and what it counts.

    >>> count(1, "epoch"), count(2, "epoch")
    ('1 epoch', '2 epochs')
    """
    return f"{number} {thing}{'s' * (str(number) != '1')}"


def num_params(params):
    return sum(x.size for x in jax.tree.leaves(params))
