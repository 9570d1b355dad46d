"""Makes the values that a config names: task, model, optimizer, and the functions of a run."""

import contextlib
import functools
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from attention_jax.checks import jax_defaults
from attention_jax.models import SequenceModel
from attention_jax.tasks import TASKS, Task, text
from attention_jax.tasks.packing import packed
from attention_jax.tasks.task import check_rows, check_task
from attention_jax.tasks.teacher import draw_weights
from attention_jax.tasks.vocabulary import Text
from attention_jax.training import own
from attention_jax.training import step as steps
from attention_jax.training.config import ConfigError, Target, flatten, slice_settings
from attention_jax.training.launch import Bound, make_launcher
from attention_jax.training.memory import check_memory
from attention_jax.training.model import make_model, row_mask
from attention_jax.training.optimizer import make_optimizer, skipping
from attention_jax.training.rules import label
from attention_jax.types import Array, Batch, PyTree, TrainState

# The streams of randomness, each `fold_in(key(seed), stream)`.
_PARAMS, _TRAIN, _HELD_OUT, _DROPOUT = range(4)

# Fields that a program may take as arguments, and their types in it.
TRACED = {
    "seed": np.int32,
    "model.dropout_rate": np.float32,
    "model.init_scale": np.float32,
    "optimizer.learning_rate": np.float32,
    "optimizer.warmup_steps": np.int32,
    "optimizer.weight_decay": np.float32,
    "optimizer.clip_norm": np.float32,
    "optimizer.momentum": np.float32,
}


class Program(NamedTuple):
    """The compiled functions of a run, and their fixed arguments.

    Runs whose configs differ in `arguments` alone share what is compiled.

    Attributes:
        task: The task to learn.
        target: Where to stop, or None.
        init: `() -> TrainState`.
        put_state, get_state: Place a state on the devices, and make it whole for each process.
        epoch: `(state, rows) -> (state, metrics [steps_per_epoch])`; the argument `state` is
            donated.
        evaluate: `(params, rows) -> metrics` on the held-out batches.
        baseline: `() -> loss` of the task's baseline on them.
        rows: The row numbers of a batch, split over the devices.
    """

    task: Task
    target: Target | None
    init: Callable[[], TrainState]
    put_state: Callable[[TrainState], TrainState]
    get_state: Callable[[PyTree], PyTree]
    epoch: Callable[[TrainState, Array], tuple[TrainState, dict]]
    evaluate: Callable[[PyTree, Array], dict]
    baseline: Callable[[], Array]
    rows: Array


def build(config: ConfigDict) -> Program:
    """Builds the program of a config, without compiling it.

    Raises:
        ConfigError: The task, the model, the optimizer or the devices do not support the config, or
            the environment names devices that jax does not find.
    """
    with refusals():
        program = _build(config)
        # Trace the model here, to raise its errors; a call does not trace it again.
        state = program.init.eval_shape()
        if config.mesh.sequence > 1:  # It must divide the lengths of all slices.
            jax.eval_shape(program.epoch, state, program.rows)
        if program.target or config.mesh.sequence > 1:
            found = jax.eval_shape(program.evaluate, state.params, program.rows)
            if program.target:
                check_target(program.target, config.task.name, found)
    return program


@contextlib.contextmanager
def refusals(about: str = "") -> Iterator[None]:
    """Turns errors of building into a ConfigError of one line, which begins with `about`."""
    try:
        jax.devices()
    except (RuntimeError, AssertionError) as error:  # The latter if JAX_PLATFORMS finds none.
        names = ("JAX_PLATFORMS", "JAX_NUM_CPU_DEVICES")
        asked = ", ".join(f"{name}={os.environ[name]}" for name in names if name in os.environ)
        message = f"jax finds no device with {asked or 'its defaults'}. {error}"
        raise ConfigError(_line(message)) from error
    try:
        yield
    except (TypeError, ValueError, NotImplementedError) as error:
        raise ConfigError(_line(about + str(error))) from error


def check_fits(config: ConfigDict, num_trials: int = 1) -> None:
    """Raises ValueError if a config needs more memory than there is, or for a task's rows.

    Args:
        config: Checked.
        num_trials: Trials of a sweep that are held at once.
    """
    check_memory(config, num_trials)
    if (name := config.task.name) not in TASKS:
        check_rows(f"{label('task.name')}={name}", make_task(config))


def check_target(target: Target, task: str, held_out: Mapping[str, Any]) -> None:
    """Raises ValueError unless the held-out metrics include the target's."""
    metrics = held_out.keys() - {"weight"}
    if target.metric not in metrics:
        raise ValueError(
            f"--target (config.train.target) must name a held-out metric of {task} "
            f"({', '.join(sorted(metrics))}): got {target.metric!r}."
        )


def _line(text):
    return " ".join(text.split())


def _build(config):
    check_fits(config)
    _check_rounded(config)
    launcher = make_launcher(config)
    rows = launcher.put_batch(np.arange(config.train.batch_size, dtype=np.int32))
    accumulate = config.optimizer.accumulate
    if rows.shape[-1] % accumulate:  # [B], or [devices, B / devices]
        raise ValueError(
            f"{rows.shape[-1]} rows (per device) cannot be accumulated in {accumulate} parts."
        )
    functions = functools.partial(
        make_functions,
        config,
        axis_name=launcher.axis_name,
        constrain=launcher.constrain,
        attention_fn=launcher.attention_fn,
    )
    task = functions().task  # Traced numbers are not checked, so all are checked here.
    given = arguments(config)

    def init(given: PyTree) -> TrainState:
        return functions(given).init()

    def epoch(state: TrainState, rows: Array, given: PyTree) -> tuple[TrainState, dict]:
        return functions(given).epoch(state, rows)

    def evaluate(params: PyTree, rows: Array, given: PyTree) -> dict:
        return functions(given).evaluate(params, rows)

    def baseline(given: PyTree) -> Array:
        return functions(given).baseline()

    return Program(
        task=task,
        target=Target.parse(config.train.target),
        init=Bound(jit_once(init), given),
        put_state=launcher.put_state,
        get_state=launcher.get_state,
        epoch=launcher.compile(epoch, donate=True, given=given),
        evaluate=launcher.compile(evaluate, given=given),
        baseline=Bound(jit_once(baseline), given),
        rows=rows,
    )


def arguments(config: ConfigDict) -> dict[str, Any]:
    """The numbers of a config that its programs take as arguments: `traced` of `make_functions`.

    They are the seed, the numbers of the optimizer and where its schedule ends. An optimizer leaves
    out what is 0, so such a number is part of the program.
    """
    leaves = flatten(config)
    paths = [path for path in TRACED if path.startswith("optimizer.") and leaves[path]]
    found = traced(config, ["seed", *paths])
    if not config.train.minutes:  # Else it is part of the state.
        found["optimizer.total_steps"] = np.int32(
            config.train.steps_per_epoch * config.train.epochs
        )
    return found


def traced(config: ConfigDict, paths: Iterable[str]) -> dict[str, Any]:
    """The values of these fields, each in `TRACED`, for `make_functions`."""
    leaves = flatten(config)
    found = {path: TRACED[path](leaves[path]) for path in paths}
    if "seed" in found and config.task.name == "teacher":
        # NumPy draws the teacher, which a program cannot do.
        found["task.layer"] = draw_weights(
            config.seed, config.model.features, _heads_of_student(config)
        )
    return found


def _heads_of_student(config):
    return config.model.num_heads if config.model.name == "multihead" else 1


def jit_once(function, level=1):
    """`jax.jit` of what a run calls once or rarely: XLA compiles it in less time.

    Level 1 gives the same numbers as the default. Level 0 takes the least time to compile, and up
    to twice as long to run.
    """
    is_lower = jax.config.read("jax_disable_most_optimizations")
    if is_lower or jax.default_backend() != "cpu":
        return jax.jit(function)
    return jax.jit(function, compiler_options={"xla_backend_optimization_level": level})


def _check_rounded(config):
    """Raises ValueError where `bfloat16_dot_general` would round nothing."""
    if config.model.matmul_precision != "bfloat16" or jax.default_backend() != "cpu":
        return
    devices = jax.device_count()
    if config.launcher != "pmap" and (config.launcher != "single" or devices > 1):
        raise ValueError(
            f"{label('model.matmul_precision')}=bfloat16 on a CPU is for launcher=pmap, and for "
            f"single with one device: got {config.launcher} and {devices} devices."
        )


class Functions(NamedTuple):
    """The pure functions of a config; `Program` describes them."""

    task: Task
    init: Callable[[], TrainState]
    epoch: Callable[[TrainState, Array], tuple[TrainState, dict]]
    evaluate: Callable[[PyTree, Array], dict]
    baseline: Callable[[], Array]
    dropout_rng: Callable[[], Array]
    model: SequenceModel
    loss: Callable[[PyTree, Batch], Array]
    held_out_batch: Callable[[], Batch]


def make_functions(
    config: ConfigDict,
    traced: Mapping[str, Any] | None = None,
    *,
    axis_name: str | None = None,
    constrain: Callable[[Batch], Batch] = lambda batch: batch,
    attention_fn: Callable | None = None,
) -> Functions:
    """Makes the functions of a run from its config.

    Args:
        config: Checked.
        traced: Values that replace those of the config, by the path of the field. They may be
            arrays in a function that jax traces, so that one program serves many. They are those
            of `TRACED`; `optimizer.total_steps`, where the schedule ends; and `task.*`, arguments
            of the task.
        axis_name, constrain, attention_fn: Of the launcher.

    Raises:
        ValueError, TypeError, NotImplementedError: The task, the model or the optimizer does not
            support the config.
    """

    traced = {} if traced is None else traced

    def of(section: str) -> dict[str, Any]:
        start = f"{section}."
        return {p.removeprefix(start): x for p, x in traced.items() if p.startswith(start)}

    task = make_task(config, **of("task"))
    slices = make_slices(config, task, **of("task"))
    parts = [task, *make_slices(config, task, "train", **of("task")).values()]
    function = {} if attention_fn is None else {"mechanism": attention_fn}
    model = make_model(config, task, **of("model"), **function)
    num_steps = config.train.steps_per_epoch
    settings = config.optimizer.to_dict() | of("optimizer")
    accumulate, max_skipped = settings.pop("accumulate"), settings.pop("max_skipped")
    budget = config.train.minutes > 0
    length = {"budget": True} if budget else {"total_steps": num_steps * config.train.epochs}
    optimizer = make_optimizer(**length | settings)
    if max_skipped:
        optimizer = skipping(optimizer)
    seed = traced.get("seed", config.seed)

    def make_loss(task: Task) -> steps.LossFn:
        def apply(params: PyTree, batch: Batch, rng: Array | None) -> Array:
            return model.apply(
                {"params": params},
                batch.inputs,
                output_positions=batch.positions,
                mask=row_mask(task),
                deterministic=rng is None,
                rngs=None if rng is None else {"dropout": rng},
            )

        return steps.LOSSES[task.loss](apply)

    def part_of(rng: Array, number: int) -> Array:
        """The key of a part of the mixture. No row has this key: rows count from 0 to 2**31 - 1."""
        return jax.random.fold_in(rng, 2**31 + number) if number else rng

    def mixed_loss(params: PyTree, batches: list[Batch], rng: Array | None) -> tuple[Array, dict]:
        """The summed loss of a batch of each part."""
        found = []
        for number, (part, batch) in enumerate(zip(parts, batches, strict=True)):
            part_rng = None if rng is None else part_of(rng, number)
            found.append(make_loss(part)(params, batch, part_rng))
        return jax.tree.map(lambda *sums: sum(sums), *found)

    def mixed_sample(rng: Array, rows: Array) -> list[Batch]:
        return [part.sample(part_of(rng, number), rows) for number, part in enumerate(parts)]

    # Keys are made inside the programs: outside, each operation would be compiled separately.
    def stream(number: int) -> Array:
        # Always threefry, so that the numbers do not depend on JAX's default.
        return jax.random.fold_in(jax.random.key(seed, impl="threefry2x32"), number)

    def init() -> TrainState:
        example = task.sample(stream(_TRAIN), jnp.arange(1))
        with jax_defaults():
            variables = model.init(
                stream(_PARAMS),
                example.inputs,
                output_positions=example.positions,
                mask=row_mask(task),
            )
        params = variables["params"]
        return TrainState(jnp.int32(0), params, optimizer.init(params), stream(_DROPOUT))

    def epoch(state: TrainState, rows: Array) -> tuple[TrainState, dict]:
        step = steps.make_train_step(
            mixed_loss,
            optimizer,
            axis_name=axis_name,
            accumulate=accumulate,
            norms_of_parts=config.eval.heads,
        )
        return steps.make_epoch(
            step, mixed_sample, num_steps, rng=stream(_TRAIN), constrain=constrain
        )(state, rows)

    def evaluate(params: PyTree, rows: Array) -> dict:
        def held_out(task):
            step = steps.make_eval_step(make_loss(task), axis_name=axis_name)
            return steps.make_evaluation(
                step,
                task.sample_held_out or task.sample,
                config.eval.num_batches,
                rng=stream(_HELD_OUT),
                constrain=constrain,
            )(params, rows)

        metrics = held_out(task)
        if task.text is not None and task.text.tokens_per_character is not None:
            bits = metrics["loss"] * (task.text.tokens_per_character / math.log(2))
            metrics["loss_in_bits_per_character"] = bits
        for name, other in slices.items():
            found = held_out(other)
            metrics |= {f"{metric}@{name}": found[metric] for metric in found if metric != "weight"}
        return metrics

    def baseline() -> Array:
        # All held-out batches as one batch, which no launcher splits.
        def batch(index):
            rng = jax.random.fold_in(stream(_HELD_OUT), index)
            sample = task.sample_held_out or task.sample
            return sample(rng, jnp.arange(config.train.batch_size))

        batches = jax.vmap(batch)(jnp.arange(config.eval.num_batches))
        return task.baseline[1](jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), batches))

    def held_out_batch() -> Batch:
        sample = task.sample_held_out or task.sample
        rng = jax.random.fold_in(stream(_HELD_OUT), 0)
        return sample(rng, jnp.arange(config.train.batch_size))

    def loss(params: PyTree, batch: Batch) -> Array:
        total, sums = make_loss(task)(params, batch, None)
        return total / jnp.maximum(1, sums["weight"])

    return Functions(
        task=task,
        init=init,
        epoch=epoch,
        evaluate=evaluate,
        baseline=baseline,
        dropout_rng=lambda: stream(_DROPOUT),
        model=model,
        loss=loss,
        held_out_batch=held_out_batch,
    )


def make_task(config: ConfigDict, kept: Text | None = None, **traced: Any) -> Task:
    """The task that `config.task` names; the teacher is as wide as its student.

    Args:
        config: Checked.
        kept: What a run of text has kept of its file, which is then read for batches only.
        traced: Arguments of the task that replace those of the config.

    Raises:
        ValueError, TypeError: A task of one's own cannot be imported, or is not what `Task` says.
    """
    settings = config.task.to_dict()
    name = settings.pop("name")
    if name in TASKS and (pack := settings.pop("pack")):
        return packed([make_task(part, kept, **traced) for part in _documents(config, pack)])
    if name not in TASKS:
        task = own.find(name, label("task.name"))(**settings | traced)
        check_task(f"{label('task.name')}={name}", task, config.task.seq_length)
        return task
    if kept is not None:
        return text.kept_text(kept, **settings)
    if name == "teacher":
        heads = _heads_of_student(config)
        settings |= {"features": config.model.features, "num_heads": heads, "seed": config.seed}
    return TASKS[name](**settings | traced)


def _documents(config: ConfigDict, pack: str) -> Iterator[ConfigDict]:
    """The config of each document that `config.task.pack` names by its length."""
    if config.model.short_conv:
        raise NotImplementedError(
            f"config.task.pack has no short_conv={config.model.short_conv}: a convolution would "
            f"cross the documents, got {pack!r}."
        )
    lengths = [int(n) if n.isascii() and n.isdigit() else 0 for n in pack.split("+")]
    if 0 in lengths or sum(lengths) != config.task.seq_length:
        raise ValueError(
            "config.task.pack must be lengths that add up to seq_length="
            f"{config.task.seq_length}, as 16+32+64: got {pack!r}."
        )
    for length in lengths:
        part = ConfigDict(config.to_dict())
        part.task.update({"pack": "", "seq_length": length})
        yield part


def make_slices(
    config: ConfigDict, task: Task, section: str = "eval", **traced: Any
) -> dict[str, Task]:
    """The task as each of `config.eval.slices` (or `.train`) changes it, by the name of the slice.

    Raises:
        ValueError: A slice is invalid, or needs a model for other inputs.
    """
    slices = {}
    for name, changes in slice_settings(config, section).items():
        changed = ConfigDict(config.to_dict())
        changed.task.update(changes)
        try:
            slices[name] = make_task(changed, **traced)
        except ValueError as error:
            raise ValueError(f"config.{section}.slices: {name}: {error}") from error
        if slices[name].vocab_size != task.vocab_size:
            raise ValueError(
                f"config.{section}.slices: {name}: the vocabulary must stay as it is: got "
                f"{slices[name].vocab_size} tokens for {task.vocab_size}."
            )
        if task.text is not None and (
            slices[name].text.vocabulary.to_dict() != task.text.vocabulary.to_dict()
        ):
            raise ValueError(f"config.{section}.slices: {name}: its text has other characters.")
    return slices
