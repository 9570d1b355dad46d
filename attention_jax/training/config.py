"""Configs: their defaults, rules over several fields, and config files.

Nothing here imports jax.

A config is a locked `ml_collections.ConfigDict` with every field that a run depends on, so that two
runs with equal configs are the same run. Later entries win: the defaults of the task, the config
file, the flags.
"""

import contextlib
import copy
import itertools
import math
import os
import re
import runpy
import traceback
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from attention_jax.training import own
from attention_jax.training.defaults import DEFAULTS, TASKS, token_task
from attention_jax.training.files import is_directory, local_path
from attention_jax.training.process import RunError
from attention_jax.training.rules import MOST_32_BITS, OPTIONAL, fault, label, read, shown, unknown


class ConfigError(RunError, ValueError):
    """A flag, a field or a config file is invalid."""

    status = 2


@contextlib.contextmanager
def refused(prefix: str = "") -> Iterator[None]:
    """Turns a ValueError about a file or a path into a ConfigError."""
    try:
        yield
    except ValueError as error:
        raise ConfigError(f"{prefix}{error}") from error


def default_config(task: str = "teacher") -> ConfigDict:
    """The default config of `task`: DEFAULTS, changed by TASKS.

    For a task of one's own, "package.module:builder", its module is imported.

    Raises:
        ConfigError: There is no such task.

    >>> default_config().train.epochs
    100
    >>> default_config("recall").model.causal
    True
    """
    if isinstance(task, str) and task in TASKS:
        changes = TASKS[task]
    elif own.is_path(task):
        try:
            changes = token_task() | {"task": own.task_settings(task, label("task.name"))}
        except (ValueError, TypeError) as error:
            raise ConfigError(str(error)) from error
    else:
        names = ", ".join(TASKS)
        raise ConfigError(f"task must be one of {names}, or module:builder: got {shown(task)}.")
    config = ConfigDict(copy.deepcopy(DEFAULTS))
    for section, fields in changes.items():
        config[section].update(fields)
    config.task.name = task
    if task in TASKS:
        # Lengths of the documents in a row, "16+32" say, which add up to seq_length; "": one.
        config.task.pack = ""
    for path in OPTIONAL:
        section, _, field = path.partition(".")
        config[section][field] = placeholder(int)
    return config.lock()


# Fields that no sweep can change, because the trials run side by side.
SHARED = (
    *("launcher", "mesh.data", "mesh.model", "mesh.sequence", "task.name"),
    *("train.steps_per_epoch", "train.epochs", "train.minutes", "train.target"),
    *("eval.every_epochs", "eval.heads", "eval.sample"),
)
MAX_TRIALS = 10_000
# Fields of the model that one of Hugging Face honours too; its `config.json` decides the others.
OF_EVERY_MODEL = ("name", "dropout_rate", "remat", "dtype", "matmul_precision")


class Target(NamedTuple):
    """The value of a held-out metric at which a run stops.

    Attributes:
        metric: Its name, without `eval_`.
        value: A loss must be this or less, any other metric this or more.

    >>> Target.parse("accuracy=0.99").is_reached({"accuracy": 0.98})
    False
    >>> Target.parse("loss=1e-3").is_reached({"loss": 0.0009})
    True
    """

    metric: str
    value: float

    @classmethod
    def parse(cls, text: str) -> "Target | None":
        """Reads "metric=value", and "" as None; ValueError for any other text."""
        if not text:
            return None
        metric, equals, number = text.rpartition("=")
        try:
            value = float(number)
        except ValueError:
            value = math.nan
        if not (equals and metric.strip() and math.isfinite(value)):
            raise ValueError(f"must be a metric and a number, as accuracy=0.99: got {shown(text)}.")
        target = cls(metric.strip(), value)
        if target.metric.startswith("accuracy") and not 0 < value <= 1:
            raise ValueError(f"must be an accuracy in (0, 1]: got {shown(text)}.")
        return target

    def is_reached(self, metrics: Mapping[str, float]) -> bool:
        """Whether held-out metrics, named without `eval_`, reach the value. NaN does not."""
        found = metrics[self.metric]
        return bool(found <= self.value if self.metric.startswith("loss") else found >= self.value)


def flatten(config: ConfigDict | dict[str, Any]) -> dict[str, Any]:
    """The leaves by dotted path: `{"seed": 0, "task.name": "teacher", ...}`."""
    leaves = {}
    for name, value in config.items():
        if isinstance(value, ConfigDict | dict):
            leaves |= {f"{name}.{path}": leaf for path, leaf in flatten(value).items()}
        else:
            leaves[name] = value
    return leaves


def problems(config: ConfigDict) -> Iterator[tuple[str, str]]:
    """The errors of a config, as (path of a field, sentence); needs no jax and no devices."""
    task = config.get("task", {}).get("name")
    try:
        leaves, known = flatten(config), flatten(default_config(task))
    except ConfigError as error:
        yield "task.name", str(error)
        return
    strangers = [*(leaves.keys() - known.keys()), *(known.keys() - leaves.keys())]
    if strangers:
        for path in sorted(strangers):
            missing = (
                f"config.{path} is missing: start from default_config({task!r}) (--task={task})."
            )
            yield path, unknown(path, known) if path in leaves else missing
        return

    bad = set()
    for path, value in leaves.items():
        if words := fault(path, value, known[path]):
            bad.add(path)
            yield path, f"{label(path)} {words}: got {shown(value)}."
    if bad:
        return  # The checks below need valid values.

    for section in ("eval", "train"):
        try:
            slice_settings(config, section)
        except ConfigError as error:
            yield f"{section}.slices", str(error)
    if config.init_from:
        try:
            local_path(config.init_from, label("init_from"))
        except ValueError as error:
            yield "init_from", str(error)
    if config.launcher != "sharded":
        for name, value in config.mesh.items():
            if value != DEFAULTS["mesh"][name]:
                path = f"mesh.{name}"
                yield path, f"config.{path} is for --launcher=sharded: got {config.launcher}."
    if config.mesh.sequence > 1:
        for name, only in (("mechanism", "dot_product"), ("name", "multihead")):
            if config.model[name] != only:
                path = f"config.model.{name}"
                words = f"config.mesh.sequence is for {path}={only}: got {config.model[name]}."
                yield "mesh.sequence", words
    model, optimizer, train = config.model, config.optimizer, config.train
    if is_directory(model.name):
        for field, value in model.items():
            path = f"model.{field}"
            if field not in OF_EVERY_MODEL and value != known[path]:
                words = f"{label(path)} must be left out: {model.name}/config.json decides it"
                yield path, f"{words}. Got {shown(value)}."
    try:
        Target.parse(train.target)
    except ValueError as error:
        yield "train.target", f"{label('train.target')} {error}"
    if model.name == "selfhead":
        # A default number of heads is allowed.
        unset = {1, DEFAULTS["model"]["num_heads"], known["model.num_heads"]}
        kept = {"num_heads": unset, "num_kv_heads": {None}, "qk_norm": {False}}
        for field, allowed in kept.items():
            if model[field] not in allowed:
                path = f"model.{field}"
                yield path, f"{label(path)} is for multihead only: got {model[field]!r}."
        if model.positions == "rotary":
            yield "model.positions", "config.model.positions='rotary' is for multihead only."
        heads, kv_heads = 1, 1
    else:
        heads, kv_heads = model.num_heads, model.num_kv_heads or model.num_heads
    if heads % kv_heads:
        yield (
            "model.num_kv_heads",
            f"config.model.num_kv_heads must divide num_heads: got {kv_heads} and {heads}.",
        )
    if model.head_dim is None and model.features % heads:
        yield (
            "model.num_heads",
            f"{label('model.num_heads')} must divide embed_dim (config.model.features): "
            f"got {heads} and {model.features}.",
        )
    elif (
        model.positions == "rotary" and (head_dim := model.head_dim or model.features // heads) % 2
    ):
        yield (
            "model.num_heads",
            f"config.model.positions='rotary' needs an even head size: got {head_dim}.",
        )
    if train.batch_size % optimizer.accumulate:
        yield (
            "train.batch_size",
            f"{label('train.batch_size')} must be a multiple of config.optimizer.accumulate: "
            f"got {train.batch_size} and {optimizer.accumulate}.",
        )
    if optimizer.weight_decay and optimizer.name == "adam":
        yield (
            "optimizer.weight_decay",
            f"config.optimizer.weight_decay is for adamw, muon and sgd: "
            f"got {optimizer.weight_decay} with adam.",
        )
    total_steps = train.epochs * train.steps_per_epoch
    if total_steps > MOST_32_BITS:
        yield (
            "train.epochs",
            f"{label('train.epochs')} times config.train.steps_per_epoch must be at most "
            f"{MOST_32_BITS} steps: got {total_steps}.",
        )
    if config.eval.sample and config.task.name != "text":
        yield (
            "eval.sample",
            f"config.eval.sample is for the task text: got {config.eval.sample}.",
        )
    is_open = train.minutes > 0
    if optimizer.schedule == "cosine" and optimizer.warmup_steps >= total_steps and not is_open:
        yield (
            "optimizer.warmup_steps",
            "config.optimizer.warmup_steps must leave the cosine some of the steps: "
            f"got {optimizer.warmup_steps} of {total_steps}. Set it lower, as "
            f"--config.optimizer.warmup_steps={total_steps // 10}, or --epochs higher.",
        )
    if model.short_conv and not model.causal:
        yield (
            "model.short_conv",
            f"config.model.short_conv={model.short_conv} needs config.model.causal=true.",
        )
    if optimizer.momentum and optimizer.name != "sgd":
        yield (
            "optimizer.momentum",
            f"config.optimizer.momentum is for sgd only: got {optimizer.momentum} "
            f"with {optimizer.name}.",
        )
    for name, default in (("b1", 0.9), ("b2", 0.999)):
        if optimizer.name == "sgd" and optimizer[name] != default:
            yield (
                f"optimizer.{name}",
                f"config.optimizer.{name} is for adam, adamw and muon: got {optimizer[name]} with "
                "sgd.",
            )


def slice_settings(config: ConfigDict, section: str = "eval") -> dict[str, dict[str, Any]]:
    """The changes of `config.task` that each slice of `config.eval.slices` makes, by its name.

    `section="train"` is for `config.train.slices`. Slices are separated by spaces, the settings of
    one by commas; a number alone is a length.

    Raises:
        ConfigError: A slice is named twice, or changes a setting that the task does not have.

    >>> config = default_config("recall")
    >>> config.eval.slices = "128 num_pairs=8 128,num_pairs=16"
    >>> for name, changes in slice_settings(config).items():
    ...     print(name, changes)
    128 {'seq_length': 128}
    num_pairs=8 {'num_pairs': 8}
    128,num_pairs=16 {'seq_length': 128, 'num_pairs': 16}
    """
    slices, field = {}, f"config.{section}.slices"
    for name in config[section].slices.split():
        if name in slices:
            raise ConfigError(f"{field} must name a slice once: got {name} twice.")
        slices[name] = {}
        for part in name.split(","):
            setting, equals, text = part.rpartition("=")
            setting = setting if equals else "seq_length"
            if setting == "name" or setting not in config.task or setting in slices[name]:
                others = ", ".join(sorted(set(config.task) - {"name"}))
                raise ConfigError(
                    f"{field}: {name} must change settings of {config.task.name} "
                    f"({others}), each once: got {shown(part)}."
                )
            at, default = f"task.{setting}", config.task[setting]
            try:
                value = read(at, text, default)
            except ValueError as error:
                raise ConfigError(f"{field}: {setting} {error}") from error
            if words := fault(at, value, default):
                raise ConfigError(f"{field}: {setting} {words}: got {shown(value)}.")
            slices[name][setting] = value
    return slices


def check(config: ConfigDict) -> None:
    """Raises ConfigError with the first of `problems`."""
    for _, sentence in problems(config):
        raise ConfigError(sentence)


def trials(config: ConfigDict, axes: Mapping[str, Sequence[Any]]) -> list[ConfigDict]:
    """The configs of a sweep: all combinations, the values of the last axis changing fastest.

    Args:
        config: The config that the trials share.
        axes: The values of each swept field, by its path.

    Raises:
        ConfigError: A field cannot be swept, an axis has no values or repeats one, or a combination
            is invalid.
    """
    known = flatten(config)
    for path, values in axes.items():
        if path not in known:
            raise ConfigError(unknown(path, known))
        if path in SHARED or path.startswith("checkpoint."):
            raise ConfigError(f"config.{path} cannot be swept: all trials share it.")
        if not values or len(set(values)) < len(values):
            raise ConfigError(
                f"--sweep: config.{path} must have values, each once: got {shown(list(values))}."
            )
    if config.eval.heads:
        raise ConfigError("config.eval.heads is for single runs, not for sweeps: got True.")
    if config.train.minutes and axes:
        raise ConfigError(
            f"{label('train.minutes')} is for single runs, not for sweeps: got "
            f"{config.train.minutes}."
        )
    if (count := math.prod(len(values) for values in axes.values())) > MAX_TRIALS:
        raise ConfigError(f"--sweep must come to at most {MAX_TRIALS} trials: got {count}.")
    found = []
    for values in itertools.product(*axes.values()):
        trial = copy.deepcopy(config)
        for path, value in zip(axes, values, strict=True):
            set_field(trial, path, value)
        check(trial)
        found.append(trial)
    return found


def load(path: str) -> ConfigDict:
    """Runs `get_config()` of a Python file; `file.py:word` runs `get_config("word")`.

    Raises:
        ConfigError: There is no such file, or it fails; the line names where.
    """
    with refused():
        local_path(path, "--config")
    drive, rest = os.path.splitdrive(path)
    name, *argument = rest.split(":", 1)
    file = os.path.expanduser(drive + name)
    if os.path.isdir(file) or not os.path.exists(file):
        raise ConfigError(f"--config must name a Python file: there is none at {file!r}.")
    try:
        names = runpy.run_path(file)
        config = names["get_config"](*argument) if "get_config" in names else None
    except OSError as error:
        raise ConfigError(f"--config={path}: {error.strerror}.") from error
    except Exception as error:  # The user's program may raise anything.
        raise ConfigError(_where(file, error)) from error
    if "get_config" not in names:
        raise ConfigError(f"{file}: get_config() is missing: see configs/ for examples.")
    if not isinstance(config, ConfigDict):
        raise ConfigError(f"{file}: get_config() must return a ConfigDict: got {type(config)}.")
    missing = [name for name in DEFAULTS if name not in config]
    if missing:
        raise ConfigError(f"{file}: config.{missing[0]} is missing: start from default_config().")
    # A copy, so that two runs of one process do not share the fields that they override.
    return copy.deepcopy(config)


def _where(file, error):
    lines = [f.lineno for f in traceback.extract_tb(error.__traceback__) if f.filename == file]
    message = " ".join(str(error).replace("\\n", " ").strip("'\"").split())
    # ml_collections lists every other field, in full; its suggestion at the end is enough.
    message = re.sub(r"Other fields present: .*}\\?\"\s*", "", message)
    return f"{file}:{lines[-1] if lines else 1}: {type(error).__name__}: {message}"


def set_field(config: ConfigDict, path: str, value: Any) -> None:
    """Sets a field by its dotted path."""
    section, _, field = path.rpartition(".")
    target = config[section] if section else config
    target[field] = value
