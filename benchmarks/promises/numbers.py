"""NaN or infinity in a run: it stops at that step, or skips it.

The fault is put into a batch, a loss, the gradient of one device of four, or the last update. A run
that stops keeps a sound checkpoint. From it a run without the fault ends as if there had been no
fault. A run that skips the step leaves parameters and optimizer as they were, bit for bit.
"""

import contextlib
import io
import itertools
import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

from promises.trainer import Broken, Lab, Row, saved_states

EPOCHS, BAD = 6, 4  # Epochs of one step, and the step that is bad.
SOURCES = ("a batch", "a loss", "the gradient of a device", "the last update")


def numbers(lab: Lab, count: int = 20) -> Iterator[Row]:
    """Puts NaN and infinity into runs that may and may not skip a step, and into sweeps."""
    with _compiled_fast():
        cases = list(itertools.product(SOURCES, (math.nan, math.inf), (0, 2)))[:count]
        for source in SOURCES:
            mine = [case for case in cases if case[0] == source]
            kept = sum(lab.kept(f"{case}", _run, lab, *case) for case in mine)
            if mine:
                yield Row(f"NaN or infinity in {source}", len(mine), kept)
        rest = max(0, count - len(cases))
        cases = list(itertools.product(("single", "sharded"), (0, 2)))[:rest]
        kept = sum(lab.kept(f"sweep {case}", _sweep, lab, *case) for case in cases)
        if cases:
            yield Row("NaN in a trial of a sweep", len(cases), kept)


@contextlib.contextmanager
def _compiled_fast() -> Iterator[None]:
    """Each case needs another program, which takes far longer to compile than to run."""
    import jax

    jax.config.update("jax_disable_most_optimizations", True)
    try:
        yield
    finally:
        jax.config.update("jax_disable_most_optimizations", False)


def _config(**changes: Any) -> Any:
    from attention_jax.training.config import default_config

    config = default_config()
    config.update_from_flattened_dict(
        {
            "task.seq_length": 5,
            "model.features": 8,
            "model.num_heads": 2,
            "optimizer.name": "sgd",
            "optimizer.learning_rate": 0.01,
            "optimizer.momentum": 0.9,
            "train.batch_size": 8,
            "train.steps_per_epoch": 1,
            "train.epochs": EPOCHS,
            "eval.num_batches": 1,
            "checkpoint.every_epochs": 1,
            "checkpoint.keep": EPOCHS,
        }
        | {name.replace("__", "."): value for name, value in changes.items()}
    )
    return config


def _run(lab: Lab, source: str, value: float, max_skipped: int) -> None:
    import jax
    import numpy as np

    from attention_jax.training import experiment
    from attention_jax.training.checkpoint import fingerprint

    bad = EPOCHS if source == "the last update" else BAD
    launcher = "pmap" if source == "the gradient of a device" else "single"
    config = _config(launcher=launcher, optimizer__max_skipped=max_skipped)
    workdir = lab.new("poisoned")
    with contextlib.redirect_stdout(io.StringIO()):
        try:
            with poisoned(source, value, bad):
                result = experiment.run(config, workdir)
        except experiment.Diverged as error:
            if max_skipped:
                raise Broken(f"not skipped: {error}") from error
            if f"step {bad}:" not in str(error) or "\n" in str(error):
                raise Broken(f"the line must name step {bad}: {error}") from error
        else:
            if not max_skipped:
                raise Broken("went on")
        _check_files(workdir)
        if not max_skipped:
            found = _finite_states(lab, workdir, config)
            if max(found) != bad - 1:
                raise Broken(f"the newest checkpoint is of step {max(found)}")
            # Without the fault it goes on as if there had been none; up to rounding, because the
            # program with it is another.
            pair = [experiment.run(config, place).params for place in (workdir, None)]
            for a, b in zip(*map(jax.tree.leaves, pair), strict=True):
                if not np.allclose(a, b, rtol=1e-5, atol=1e-6):
                    raise Broken("continued otherwise")
            return
    if result.metrics["skipped"] != 1 or result.metrics["step"] != EPOCHS:
        raise Broken(f"one step of {EPOCHS} was to be skipped: {result.metrics}")
    found = _finite_states(lab, workdir, config)
    prints = {step: fingerprint(state.params) for step, state in found.items()}
    inner = {step: fingerprint(state.opt_state.inner) for step, state in found.items()}
    if not (prints[bad] == prints[bad - 1] and inner[bad] == inner[bad - 1]):
        raise Broken(f"step {bad} changed something")
    if len({prints[step] for step in prints if step != bad}) != len(prints) - 1:
        raise Broken("other steps changed nothing")


def _sweep(lab: Lab, launcher: str, max_skipped: int) -> None:
    """One of four trials has a learning rate that overflows."""
    from attention_jax.laboratory import sweep
    from attention_jax.training import experiment

    rates = [0.01, 0.02, 1e30, 0.03]
    config = _config(optimizer__max_skipped=max_skipped, launcher=launcher)
    workdir = lab.new("poisoned")
    with contextlib.redirect_stdout(io.StringIO()):
        result = sweep.run(config, {"optimizer.learning_rate": rates}, workdir)
    _check_files(workdir)
    for rate, trial in zip(rates, result.metrics["trials"], strict=True):
        if ("diverged_step" in trial) != (rate == 1e30):
            raise Broken(f"learning rate {rate} ends as {trial}")
        if rate == 1e30:
            continue
        with contextlib.redirect_stdout(io.StringIO()):
            alone = experiment.run(_config(optimizer__learning_rate=rate, launcher=launcher))
        if not math.isclose(trial["eval_loss"], alone.metrics["eval_loss"], rel_tol=1e-5):
            raise Broken(f"learning rate {rate} is not as alone")


@contextlib.contextmanager
def poisoned(source: str, value: float, bad: int) -> Iterator[None]:
    """Makes the builder put a value into step `bad` of each run."""
    import jax
    import jax.numpy as jnp
    import optax

    from attention_jax.training import build
    from attention_jax.training import step as steps

    make_epoch, make_optimizer = steps.make_epoch, build.make_optimizer
    squared_error = steps.LOSSES["squared_error"]
    mark = 1e6  # In a target of the bad step: how a loss, which knows no step, knows it.

    def epoch(train_step: Callable, *arguments: Any, **options: Any) -> Callable:
        def changed(state: Any, batches: list) -> Any:
            now = state.step == bad - 1
            first, *rest = batches
            place = (0,) * first.inputs.ndim
            if source == "a batch":
                inputs = first.inputs.at[place].set(jnp.where(now, value, first.inputs[place]))
                first = first._replace(inputs=inputs)
            elif source != "the last update":
                targets = first.targets.at[place].set(jnp.where(now, mark, first.targets[place]))
                first = first._replace(targets=targets)
            return train_step(state, [first, *rest])

        return make_epoch(changed, *arguments, **options)

    def loss(apply: Callable) -> Callable:
        inner = squared_error(apply)

        @jax.custom_vjp
        def spoil(x: Any, now: Any) -> Any:
            return x

        def backward(now: Any, grad: Any) -> Any:
            return grad.at[(0,) * grad.ndim].add(jnp.where(now, value, 0.0)), None

        spoil.defvjp(lambda x, now: (x, now), backward)

        def changed(params: Any, batch: Any, rng: Any) -> Any:
            if rng is None:
                return inner(params, batch, rng)
            now = batch.targets.max() >= mark
            if source == "the gradient of a device":
                now &= jax.lax.axis_index("data") == 2
                leaves, structure = jax.tree.flatten(params)
                params = jax.tree.unflatten(structure, [spoil(leaves[0], now), *leaves[1:]])
            total, sums = inner(params, batch, rng)
            return (jnp.where(now, value, total) if source == "a loss" else total), sums

        return changed

    def optimizer(**settings: Any) -> Any:
        made = make_optimizer(**settings)

        def update(grads: Any, state: Any, params: Any = None) -> Any:
            now = optax.tree.get_all_with_path(state, "count")[0][1] == bad - 1
            updates, state = made.update(grads, state, params)
            leaves, structure = jax.tree.flatten(updates)
            place = (0,) * leaves[0].ndim
            leaves[0] = leaves[0].at[place].set(jnp.where(now, value, leaves[0][place]))
            return jax.tree.unflatten(structure, leaves), state

        return optax.GradientTransformation(made.init, update)

    with contextlib.ExitStack() as patches:
        patches.enter_context(mock.patch.object(steps, "make_epoch", epoch))
        if source in ("a loss", "the gradient of a device"):
            patches.enter_context(mock.patch.dict(steps.LOSSES, squared_error=loss))
        if source == "the last update":
            patches.enter_context(mock.patch.object(build, "make_optimizer", optimizer))
        yield


def _finite_states(lab: Lab, workdir: Path, config: Any) -> dict[int, Any]:
    """The state of each checkpoint, by its step."""
    import jax
    import numpy as np

    from attention_jax.training.build import build

    found = saved_states(lab, workdir, build(config).init.eval_shape)
    for step, state in found.items():
        leaves = jax.tree.leaves((state.params, state.opt_state))
        if not all(np.isfinite(leaf).all() for leaf in leaves):
            raise Broken(f"the checkpoint of step {step} is not finite")
    return found


def _check_files(workdir: Path) -> None:
    """Checks that no file holds a NaN, which JSON does not have."""

    def refuse(word: str) -> None:
        raise Broken(f"{word} in a file of {workdir}")

    for file in [*workdir.rglob("*.json"), *workdir.rglob("*.jsonl")]:
        text = file.read_text()
        for line in text.splitlines() if file.suffix == ".jsonl" else [text]:
            json.loads(line, parse_constant=refuse)
