"""Groups of trials that share one compiled program."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from attention_jax.tasks import Task
from attention_jax.training import build as builder
from attention_jax.training.config import Target, flatten
from attention_jax.training.experiment import first_params
from attention_jax.training.launch import Launcher
from attention_jax.training.loading import check_vocabulary
from attention_jax.training.step import all_finite
from attention_jax.types import Array, PyTree, TrainState


class Group(NamedTuple):
    """Trials that share a program, and its compiled functions over all of them.

    Attributes:
        numbers: The numbers of these trials in the sweep.
        name: Tells the program from those of other groups; "" if it is the only one.
        config: The config of the first trial.
        task: Its task.
        settings: The traced values, `[trials, ...]` each, on the devices.
        init: `(None, None, settings) -> state`, where the state is `(params, opt_state)`.
        epoch: `(step, state, (settings, active)) -> (state, active, metrics)`. An inactive trial
            keeps its state. So does a trial that diverges, which becomes inactive.
        evaluate: `(None, params, (settings, active)) -> (active, metrics)`. A trial with a metric
            that is not finite becomes inactive.
        baseline: `(None, None, settings) -> loss`.
        like: The shapes of the result of `init`.
    """

    numbers: list[int]
    name: str
    config: ConfigDict
    task: Task
    settings: PyTree
    init: Callable
    epoch: Callable
    evaluate: Callable
    baseline: Callable
    like: PyTree


def build(
    configs: Sequence[ConfigDict], axes: Mapping[str, Sequence[Any]], launcher: Launcher
) -> list[Group]:
    """Sorts trials into programs and builds these, without compiling them.

    Raises:
        ValueError, TypeError, NotImplementedError: As `builder.make_functions`, or the trials of a
            program do not divide evenly among the devices.
    """
    static = [path for path in axes if path not in builder.TRACED]
    sorts: dict[tuple, list[int]] = {}
    for number, config in enumerate(configs):
        leaves = flatten(config)
        sorts.setdefault(tuple(leaves[path] for path in static), []).append(number)
    traced = [path for path, values in axes.items() if path in builder.TRACED and len(values) > 1]
    return [
        _build(numbers, _name(static, values), configs, traced, launcher)
        for values, numbers in sorts.items()
    ]


def _name(paths, values):
    return ", ".join(f"{path}={value}" for path, value in zip(paths, values, strict=True))


def _build(numbers, name, configs, traced, launcher):
    config, mine = configs[numbers[0]], [configs[number] for number in numbers]
    # The other launchers divide the trials among the devices.
    devices = 1 if config.launcher == "single" else jax.device_count()
    builder.check_fits(config, -(-len(numbers) // devices))
    settings = [builder.traced(each, traced) for each in mine]
    settings = jax.tree.map(lambda *x: np.stack(x), *settings)
    # `number` gives an axis of trials even if no field is traced.
    given = {"number": np.array(numbers, np.int32), "settings": settings}
    rows = np.arange(config.train.batch_size, dtype=np.int32)

    def functions(given: PyTree) -> builder.Functions:
        return builder.make_functions(config, given["settings"])

    def init(_, __, given: PyTree) -> PyTree:
        state = functions(given).init()
        return state.params, state.opt_state

    def epoch(step: Array, state: PyTree, given: PyTree) -> tuple[PyTree, Array, dict]:
        given, active = given
        make = functions(given)
        # All trials are at the same step, so they have the same batches unless their seeds differ.
        new, metrics = make.epoch(TrainState(step, *state, make.dropout_rng()), rows)
        active &= (metrics["bad_steps"] <= config.optimizer.max_skipped).all()
        new = jax.tree.map(lambda a, b: jnp.where(active, a, b), (new.params, new.opt_state), state)
        return new, active, metrics

    def evaluate(_, params: PyTree, given: PyTree) -> tuple[Array, dict]:
        given, active = given
        metrics = functions(given).evaluate(params, rows)
        return active & all_finite(metrics), metrics

    def baseline(_, __, given: PyTree) -> Array:
        return functions(given).baseline()

    def init_all(given: PyTree) -> PyTree:
        return jax.vmap(init, in_axes=(None, None, 0))(None, None, given)

    like = jax.eval_shape(init_all, given)
    group = Group(
        numbers=numbers,
        name=name,
        config=config,
        task=builder.make_task(config),
        settings=launcher.put_trials(given),
        init=launcher.compile_trials(init),
        epoch=launcher.compile_trials(epoch, donate=True),
        evaluate=launcher.compile_trials(evaluate),
        baseline=launcher.compile_trials(baseline),
        like=like,
    )
    if target := Target.parse(config.train.target):
        over = jax.vmap(evaluate, in_axes=(None, 0, 0))
        active = np.ones(len(numbers), bool)
        _, held_out = jax.eval_shape(over, None, like[0], (given, active))
        builder.check_target(target, config.task.name, held_out)
    return group


def first_trials(group: Group) -> PyTree:
    """The initial states of a group's trials."""
    params, opt_state = group.init(None, None, group.settings)
    if init_from := group.config.init_from:
        like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), group.like[0])
        check_vocabulary(init_from, group.task)
        found = first_params(init_from, like=like)
        spread = lambda x, old: jax.device_put(np.broadcast_to(x, old.shape), old.sharding)
        params = jax.tree.map(spread, found, params)
    return params, opt_state
