"""What a run is made of: defaults, config files, flags. Nothing here imports jax.

A config is a locked `ml_collections.ConfigDict` with every field that a run depends on, so that two
runs with equal configs are the same run. Later entries win: the defaults of the task, the config
file, the flags.
"""

import contextlib
import copy
import difflib
import itertools
import math
import os
import re
import runpy
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from absl import flags
from ml_collections import ConfigDict, config_flags
from ml_collections.config_dict import placeholder

from attention_jax.training.files import local_path, locate, read_config, trial_directory


class RunError(Exception):
    """Ends a run with one line for the user; `status` is the exit status of the process."""

    status = 1


class ConfigError(RunError, ValueError):
    """A flag, a field or a config file asks for something that cannot be."""

    status = 2


@contextlib.contextmanager
def refused(prefix: str = "") -> Iterator[None]:
    """Turns what is wrong with a file or a path into a ConfigError."""
    try:
        yield
    except ValueError as error:
        raise ConfigError(f"{prefix}{error}") from error


DEFAULTS = {
    "seed": 0,
    "launcher": "single",
    "init_from": "",  # The run directory to take the first parameters from.
    "task": {},  # The name of the task and its settings: TASKS.
    "model": {
        # One bare attention layer, as the project began: no norm, no residual, no positions.
        "name": "multihead",
        "features": 64,
        "num_layers": 1,
        "mechanism": "dot_product",
        "num_heads": 8,  # Of multihead; selfhead has one.
        "num_kv_heads": None,  # None: as many as num_heads.
        "head_dim": None,  # None: features / num_heads.
        "mlp_ratio": 0.0,  # 0: no MLP.
        "norm": "none",
        "residual": False,
        "positions": "none",
        "causal": False,
        "window": None,  # None: no limit.
        "pattern": "full",
        "stride": None,  # Of the patterns strided and blocks.
        "dropout_rate": 0.0,
        "qk_norm": False,
        "softcap": 0.0,  # 0: off.
        "sinks": False,
        "short_conv": 0,  # Width of the convolution before each attention; 0: none.
        "use_bias": True,
        "init_scale": 1.0,  # Of what writes to the residual stream.
        "tie_embedding": True,
        "remat": False,
        "dtype": "float32",  # Of the computation; parameters are always float32.
    },
    "optimizer": {
        "name": "adam",
        "learning_rate": 1e-3,
        "schedule": "constant",
        "warmup_steps": 0,
        "weight_decay": 0.0,
        "decay": "matrices",  # What it pulls at: matrices, or all parameters.
        "clip_norm": 0.0,  # 0: off.
        "momentum": 0.0,
        "accumulate": 1,
        "max_skipped": 0,  # Steps in a row that may be skipped because they are not finite.
    },
    # target: stop when it is reached, "accuracy=0.99" say; "": never. See Target.
    # slices: the task with other settings, trained on or evaluated beside it: slice_settings.
    "train": {"batch_size": 32, "steps_per_epoch": 32, "epochs": 100, "slices": "", "target": ""},
    "eval": {"num_batches": 8, "every_epochs": 10, "slices": ""},
    "checkpoint": {"every_epochs": 10, "keep": 2},
}

# The tasks of tokens need a model that knows order and can compose two steps: one bare layer stays
# at chance (https://arxiv.org/abs/2408.14332 says why).
_TRANSFORMER = {
    "num_layers": 2,
    "num_heads": 2,
    "norm": "layer",
    "residual": True,
    "positions": "rotary",
    "causal": True,
}
_WITH_MLP = _TRANSFORMER | {"mlp_ratio": 4.0}  # Where a token has to be worked on, not only moved.


def _token_task(model=_TRANSFORMER, epochs=20, **task):
    return {
        "task": task,
        "model": model,
        "optimizer": {"name": "adamw", "learning_rate": 2e-3},
        "train": {"batch_size": 64, "steps_per_epoch": 100, "epochs": epochs},
    }


_QUESTIONS_OF_RECALL = {"power": 0.01, "random_non_queries": False}

# What each task changes. `task` holds all the settings it has; there are no others.
TASKS = {
    "teacher": {"task": {"seq_length": 10}},
    "recall": _token_task(
        seq_length=64, vocab_size=256, num_pairs=4, num_passes=1, **_QUESTIONS_OF_RECALL
    ),
    "compositional_recall": _token_task(
        seq_length=64, vocab_size=256, num_pairs=4, **_QUESTIONS_OF_RECALL
    ),
    "forgetting_recall": _token_task(
        seq_length=64, vocab_size=256, num_pairs=8, num_updates=4, **_QUESTIONS_OF_RECALL
    ),
    "in_context_recall": _token_task(seq_length=128, vocab_size=16),
    "noisy_recall": _token_task(seq_length=128, vocab_size=32, noise_vocab_size=16, noise_rate=0.2),
    "fuzzy_recall": _token_task(
        seq_length=128,
        vocab_size=16,
        min_key_length=1,
        max_key_length=3,
        min_value_length=1,
        max_value_length=3,
    ),
    "induction": _token_task(seq_length=64, vocab_size=16),
    "memorization": _token_task(_WITH_MLP, seq_length=32, vocab_size=256, seed=0),
    "copy": _token_task(epochs=6, seq_length=32, vocab_size=16),
    "reverse": _token_task(seq_length=32, vocab_size=16),
    "sort": _token_task(_WITH_MLP, seq_length=32, vocab_size=16),
    "selective_copy": _token_task(seq_length=256, vocab_size=16, num_tokens=16),
    # All questions look alike, and see two tokens: only an absolute position tells them apart.
    "compression": _token_task(_WITH_MLP | {"positions": "learned"}, seq_length=63, vocab_size=16),
    "parity": _token_task(_WITH_MLP, seq_length=32, cumulative=False),
    "majority": _token_task(_WITH_MLP, seq_length=32, cumulative=False),
    "listops": _token_task(_WITH_MLP, seq_length=128, max_depth=10, max_args=10, expand_rate=0.25),
}


def default_config(task: str = "teacher") -> ConfigDict:
    """The config that a run of `task` starts from: DEFAULTS, then what TASKS says.

    Raises:
        ConfigError: There is no such task.

    >>> default_config().train.epochs
    100
    >>> default_config("recall").model.causal
    True
    """
    if task not in TASKS:
        raise ConfigError(f"task must be one of {', '.join(TASKS)}: got {shown(task)}.")
    config = ConfigDict(copy.deepcopy(DEFAULTS))
    for section, fields in TASKS[task].items():
        config[section].update(fields)
    config.task.name = task
    for path in _OPTIONAL:
        section, _, field = path.partition(".")
        config[section][field] = placeholder(int)
    return config.lock()


# The rules of the fields -------------------------------------------------------------------------


class _Rule(NamedTuple):
    holds: Callable[[Any], bool]
    words: str


def _at_least(low):
    return _Rule(lambda value: value >= low, f"must be at least {low}")


def _one_of(*names):
    return _Rule(lambda value: value in names, f"must be one of {', '.join(names)}")


_RATE = _Rule(lambda value: 0 <= value < 1, "must be in [0, 1)")
_OPTIONAL = ("model.num_kv_heads", "model.head_dim", "model.window", "model.stride")
_RULES = {
    "seed": _Rule(lambda value: 0 <= value < 2**31, "must be in [0, 2**31)"),
    "launcher": _one_of("single", "pmap", "sharded"),
    "task.seq_length": _at_least(1),
    "model.name": _one_of("multihead", "selfhead"),
    "model.mechanism": _one_of("dot_product", "linear", "differential", "gated_delta"),
    "model.features": _at_least(1),
    "model.num_layers": _at_least(1),
    "model.num_heads": _at_least(1),
    "model.num_kv_heads": _at_least(1),
    "model.head_dim": _at_least(1),
    "model.mlp_ratio": _at_least(0),
    "model.norm": _one_of("layer", "rms", "none"),
    "model.positions": _one_of("none", "sinusoidal", "learned", "rotary", "alibi", "relative"),
    "model.window": _at_least(0),
    "model.pattern": _one_of("full", "strided", "blocks"),
    "model.stride": _at_least(1),
    "model.softcap": _at_least(0),
    "model.short_conv": _at_least(0),
    "model.init_scale": _at_least(0),
    "model.dropout_rate": _RATE,
    "model.dtype": _one_of("float32", "bfloat16", "float16"),
    "optimizer.name": _one_of("adam", "adamw", "sgd"),
    "optimizer.learning_rate": _Rule(lambda value: value > 0, "must be above 0"),
    "optimizer.schedule": _one_of("constant", "cosine"),
    "optimizer.warmup_steps": _at_least(0),
    "optimizer.weight_decay": _at_least(0),
    "optimizer.decay": _one_of("matrices", "all"),
    "optimizer.clip_norm": _at_least(0),
    "optimizer.momentum": _RATE,
    "optimizer.accumulate": _at_least(1),
    "optimizer.max_skipped": _at_least(0),
    "train.batch_size": _at_least(1),
    "train.steps_per_epoch": _at_least(1),
    "train.epochs": _at_least(1),
    "eval.num_batches": _at_least(1),
    "eval.every_epochs": _at_least(1),
    "checkpoint.every_epochs": _at_least(1),
    # One to continue from while the next is being written.
    "checkpoint.keep": _at_least(2),
}
# The largest integers, where 32 bits are not the limit: more than anybody trains with, and small
# enough for the memory that they need to be told.
_MOST = {
    "model.num_layers": 1000,  # Each is traced and compiled.
    "model.features": 2**20,
    "model.num_heads": 2**20,
    "model.num_kv_heads": 2**20,
    "model.head_dim": 2**20,
    "model.window": 2**29,  # As far as rules of masks reach.
    "model.stride": 2**29,
    "model.short_conv": 2**10,
    "train.batch_size": 2**24,
    "eval.num_batches": 2**24,
    "optimizer.accumulate": 2**24,
    "task.max_depth": 2**10,
}
_MOST_OF_TASK, _MOST_32_BITS = 2**24, 2**31 - 1
_FLOATS = 1e-30, 1e30  # By size, or 0: well inside of what float32 holds, squares excepted.
_MAX_MLP_RATIO = 2.0**10
_MAX_TRIALS = 10_000
_WORDS = {"true": True, "false": False}
# What no sweep can change: the trials run side by side, on one clock.
_SHARED = (
    *("launcher", "task.name", "train.steps_per_epoch", "train.epochs", "train.target"),
    "eval.every_epochs",
)
_KINDS = {bool: "true or false", int: "an integer", float: "a finite number", str: "a name"}


class Target(NamedTuple):
    """What a held-out metric is to reach, and the run to stop at.

    Attributes:
        metric: Its name, without `eval_`.
        value: A loss is to be this or less, any other metric this or more.

    >>> Target.parse("accuracy=0.99").is_reached({"accuracy": 0.98})
    False
    >>> Target.parse("loss=1e-3").is_reached({"loss": 0.0009})
    True
    """

    metric: str
    value: float

    @classmethod
    def parse(cls, text: str) -> "Target | None":
        """Reads "metric=value", and "" as None; ValueError where it is something else."""
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
        """Whether held-out metrics, named without `eval_`, have come so far. NaN has not."""
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
    """What is wrong with a config, as (path of a field, sentence); no jax, no devices."""
    task = config.get("task", {}).get("name")
    if task not in TASKS:
        words = f"{_label('task.name')} must be one of {', '.join(TASKS)}"
        yield "task.name", f"{words}: got {shown(task)}."
        return
    leaves, known = flatten(config), flatten(default_config(task))
    strangers = [*(leaves.keys() - known.keys()), *(known.keys() - leaves.keys())]
    if strangers:
        for path in sorted(strangers):
            missing = (
                f"config.{path} is missing: start from default_config({task!r}) (--task={task})."
            )
            yield path, _unknown(path, known) if path in leaves else missing
        return

    bad = set()
    for path, value in leaves.items():
        if value is None and path in _OPTIONAL:
            continue
        kind = _kind(path, known[path])
        rule = _RULES.get(path)
        if not _is_a(kind, value):
            words = f"must be {_KINDS[kind]}"
        elif rule and not rule.holds(value):
            words = rule.words
        elif not (words := _excess(path, value)):
            continue
        bad.add(path)
        yield path, f"{_label(path)} {words}: got {shown(value)}."
    if bad:
        return  # What follows relates sound values to one another.

    for section in ("eval", "train"):
        try:
            slice_settings(config, section)
        except ConfigError as error:
            yield f"{section}.slices", str(error)
    if config.init_from:
        try:
            local_path(config.init_from, _label("init_from"))
        except ValueError as error:
            yield "init_from", str(error)
    model, optimizer, train = config.model, config.optimizer, config.train
    try:
        Target.parse(train.target)
    except ValueError as error:
        yield "train.target", f"{_label('train.target')} {error}"
    if model.name == "selfhead":
        # A number of heads that nobody chose is no contradiction.
        unset = {1, DEFAULTS["model"]["num_heads"], known["model.num_heads"]}
        kept = {"num_heads": unset, "num_kv_heads": {None}, "qk_norm": {False}}
        for field, allowed in kept.items():
            if model[field] not in allowed:
                path = f"model.{field}"
                yield path, f"{_label(path)} is for multihead only: got {model[field]!r}."
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
            f"{_label('model.num_heads')} must divide embed_dim (config.model.features): "
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
            f"{_label('train.batch_size')} must be a multiple of config.optimizer.accumulate: "
            f"got {train.batch_size} and {optimizer.accumulate}.",
        )
    if optimizer.weight_decay and optimizer.name == "adam":
        yield (
            "optimizer.weight_decay",
            f"config.optimizer.weight_decay is for adamw and sgd: got {optimizer.weight_decay} "
            f"with adam.",
        )
    total_steps = train.epochs * train.steps_per_epoch
    if total_steps > _MOST_32_BITS:
        yield (
            "train.epochs",
            f"{_label('train.epochs')} times config.train.steps_per_epoch must be at most "
            f"{_MOST_32_BITS} steps: got {total_steps}.",
        )
    if optimizer.schedule == "cosine" and optimizer.warmup_steps >= total_steps:
        yield (
            "optimizer.warmup_steps",
            "config.optimizer.warmup_steps must leave the cosine some of the steps: "
            f"got {optimizer.warmup_steps} of {total_steps}.",
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


def slice_settings(config: ConfigDict, section: str = "eval") -> dict[str, dict[str, Any]]:
    """What each slice of `config.eval.slices` changes in `config.task`, by its name.

    `section="train"` is for `config.train.slices`. Slices are separated by spaces, the settings of
    one by commas; a number alone is a length.

    Raises:
        ConfigError: A slice is named twice, or changes what the task does not have.

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
            kind = type(config.task[setting])
            try:
                value = _WORDS[text.lower()] if kind is bool else kind(text)
            except (KeyError, ValueError):
                value = None
            if value is None or not _is_a(kind, value):
                raise ConfigError(f"{field}: {setting} must be {_KINDS[kind]}: got {shown(text)}.")
            if words := _excess(f"task.{setting}", value):
                raise ConfigError(f"{field}: {setting} {words}: got {shown(value)}.")
            slices[name][setting] = value
    return slices


def check(config: ConfigDict) -> None:
    """Raises ConfigError with the first of `problems`."""
    for _, sentence in problems(config):
        raise ConfigError(sentence)


def _kind(path, default):
    return int if path in _OPTIONAL else type(default)


def _is_a(kind, value):
    if kind is float:
        return _is_a(int, value) or (isinstance(value, float) and math.isfinite(value))
    return isinstance(value, kind) and isinstance(value, bool) == (kind is bool)


def _excess(path, value):
    """Words for a number that is too large or too small to compute with; None for all others."""
    if isinstance(value, float):
        least, most = _FLOATS
        if path == "model.mlp_ratio" and value > _MAX_MLP_RATIO:
            return f"must be at most {_MAX_MLP_RATIO:g}"
        sound = value == 0 or least <= abs(value) <= most
        return None if sound else f"must be 0, or from {least:g} to {most:g} by size"
    if isinstance(value, int):
        of_task = path.startswith("task.") and path != "task.seed"
        most = _MOST.get(path, _MOST_OF_TASK if of_task else _MOST_32_BITS)
        return None if value <= most else f"must be at most {most}"
    return None


def shown(value: Any) -> str:
    """A value as a line can tell it, however long it is.

    >>> shown("a" * 100)
    "'aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa... (102 characters)"
    """
    try:
        text = repr(value)
    except ValueError:  # More digits than Python writes.
        return f"an integer of {value.bit_length()} bits"
    return text if len(text) <= 80 else f"{text[:40]}... ({len(text)} characters)"


def _unknown(path, known):
    close = [f"config.{name}" for name in difflib.get_close_matches(path, known, n=3)]
    hint = f" Did you mean {' or '.join(close)}?" if close else ""
    return f"config.{path} is unknown.{hint}"


# The flags ---------------------------------------------------------------------------------------


class _FlatFlag(NamedTuple):
    path: str | None  # The field that it sets; None: it sets the run directory.
    help: str


_FLAT_FLAGS = {
    "model": _FlatFlag("model.name", "multihead or selfhead"),
    "embed_dim": _FlatFlag("model.features", "width of the model"),
    "num_heads": _FlatFlag("model.num_heads", "attention heads (multihead only)"),
    "learning_rate": _FlatFlag("optimizer.learning_rate", "peak step size of the optimizer"),
    "batch_size": _FlatFlag("train.batch_size", "sequences in a step, over all devices"),
    "seq_length": _FlatFlag("task.seq_length", "positions in a sequence"),
    "epochs": _FlatFlag("train.epochs", "times config.train.steps_per_epoch steps"),
    "target": _FlatFlag("train.target", "stop at a held-out metric, as accuracy=0.99 or loss=1e-3"),
    "save_path": _FlatFlag(None, "run directory; rerun the command to resume; none: write nothing"),
    "workdir": _FlatFlag(None, "the same as --save_path"),
    "task": _FlatFlag("task.name", f"{', '.join(TASKS)}; the other defaults follow it"),
    "launcher": _FlatFlag("launcher", "single, pmap or sharded"),
    "seed": _FlatFlag("seed", "of the parameters, the data and dropout"),
    "init_from": _FlatFlag("init_from", "run directory to take the first parameters from"),
}
_QUESTIONS = (
    *("model", "embed_dim", "num_heads", "learning_rate"),
    *("batch_size", "seq_length", "epochs", "save_path"),
)


class Command(NamedTuple):
    """What the command line asks for; the run directory is no part of the config.

    Attributes:
        config: Of the run, or of what the trials of a sweep share.
        workdir: The run directory. None: nothing is written.
        sweep: The values of each field that is swept, by its path. Empty: one run.
    """

    config: ConfigDict
    workdir: str | None
    sweep: dict[str, list[Any]]


def parse(argv: Sequence[str]) -> Command:
    """Reads a command line, `argv[0]` being the program's name, and asks if it says --interactive.

    Raises:
        ConfigError: In one line, the flag or field that cannot be, and what came.
        SystemExit: After `--help`.
        EOFError: The input of `--interactive` ended.
    """
    values = flags.FlagValues()
    values.set_gnu_getopt(True)  # `--config.x 5 --epochs 3`: go on after the unknown one's value.
    for name, flag in _FLAT_FLAGS.items():
        flags.DEFINE_string(name, None, flag.help, flag_values=values)
    flags.DEFINE_string("config", None, "", flag_values=values)
    flags.DEFINE_multi_string("sweep", [], "", flag_values=values)
    flags.DEFINE_boolean("interactive", False, "", flag_values=values)
    flags.DEFINE_boolean("help", False, "", short_name="h", flag_values=values)
    try:
        overrides = values(list(argv), known_only=True)[1:]
    except flags.Error as error:
        raise ConfigError(str(error)) from error
    if values.help:
        print(_help(), flush=True)
        raise SystemExit(0)

    given = {name: values[name].value for name in _FLAT_FLAGS if values[name].value is not None}
    places = {name: given.pop(name) for name in ("save_path", "workdir") if name in given}
    places = {_path(text, f"--{name}") for name, text in places.items()}
    if len(places) > 1:
        raise ConfigError(f"--save_path and --workdir differ: got {' and '.join(sorted(places))}.")
    workdir = places.pop() if places else None
    config = None if values.config is None else load(values.config)
    if init_from := _init_from(given, overrides, config):
        config = _with_model_of(init_from, workdir, config, given.get("task"))
    elif config is None:
        config = default_config(given.get("task", "teacher"))
    else:
        config = _with_task(config, given.get("task"))
    config, overridden = _override(config, overrides)

    for name, text in given.items():
        path = _FLAT_FLAGS[name].path
        value = _convert(path, text)
        if path in overridden and overridden[path] != value:
            raise ConfigError(f"--{name}={text} contradicts --config.{path}={overridden[path]}.")
        _set(config, path, value)
    sweep = _axes(values.sweep, config)
    for path in sweep:
        if path in overridden or path in {_FLAT_FLAGS[name].path for name in given}:
            raise ConfigError(f"--sweep={path}=... contradicts another flag for {_label(path)}.")
    if values.interactive:
        workdir = _interview(config, workdir)
    if sweep:
        trials(config, sweep)
    else:
        check(config)
    return Command(config, workdir, sweep)


def _with_task(config, task):
    """A config file's config with the task of `--task`, if that names another."""
    if task is not None and config.task.name != task:
        with config.unlocked():
            config.task = default_config(task).task
    return config


def _init_from(given, overrides, config):
    """The run that the flags, or else the config file, say to start from; "" for none."""
    if "init_from" in given:
        _path(given["init_from"], "--init_from")  # Empty is no way to say none here.
        return given["init_from"]
    found = "" if config is None else config.init_from
    for argument, following in itertools.zip_longest(overrides, overrides[1:], fillvalue=""):
        if match := re.fullmatch(r"--?config\.init_from(=(.*))?", argument):
            found = following if match[1] is None else match[2]
    return found


def _with_model_of(init_from, workdir, config, task):
    """A config with the model of another run, and what its vocabulary depends on.

    Args:
        init_from: The directory of that run.
        workdir: That of the run to be, or None. What it has noted of the model counts, so that it
            can be continued when the other run is gone or is another.
        config: From a config file, whose fields count where they differ from the defaults; or None.
        task: What `--task` says, or None. With neither, it is the task of that run.

    Raises:
        ConfigError: The other run has no config, or one with fields or values unknown here.
    """
    if config is None:
        said = set()
    else:
        defaults = flatten(default_config(config.task.get("name")))
        said = {path for path, value in flatten(config).items() if value != defaults.get(path)}
        config = _with_task(config, task)
    with refused(f"--init_from={init_from}: "):
        theirs = _noted(init_from, workdir)
        their_task = theirs.pop("task.name", None)
        if config is None:
            config = default_config(their_task if task is None else task)
        known = flatten(config)
        for path, value in theirs.items():
            is_known = path in known
            if path.startswith("task."):
                wanted = config.task.name == their_task or (path == "task.vocab_size" and is_known)
            else:
                wanted = path.startswith("model.")
            if not wanted or path in said:
                continue
            if not is_known:
                raise ConfigError(f"its config.{path}={value!r} is unknown here.")
            kind = _kind(path, known[path])
            if not (_is_a(kind, value) or (value is None and path in _OPTIONAL)):
                raise ConfigError(f"its config.{path} must be {_KINDS[kind]}: got {shown(value)}.")
            _set(config, path, value)
    return config


def _noted(init_from, workdir):
    """The fields of the run to start from."""
    if workdir is not None and os.path.exists(Path(workdir) / "config.json"):
        ours = flatten(read_config(Path(workdir)))
        if ours.get("init_from") == init_from:
            return ours
    run, trial = locate(local_path(init_from, "it"))
    return flatten(read_config(run if trial is None else trial_directory(run, trial)))


def _axes(texts, config):
    """Reads `--sweep` flags, "field=value,value,..." each."""
    axes, leaves = {}, flatten(config)
    for text in texts:
        name, equals, listed = text.partition("=")
        path = name.strip().removeprefix("config.")
        if path in _FLAT_FLAGS:
            path = _FLAT_FLAGS[path].path or path
        if not (equals and listed.strip()):
            raise ConfigError(f"--sweep must be field=value,value,...: got {shown(text)}.")
        if path not in leaves:
            raise ConfigError(f"--sweep={text}: {_unknown(path, leaves)}")
        if path.endswith(".slices"):
            raise ConfigError(f"--sweep={text}: commas are part of {path}: sweep it from Python.")
        if path in axes:
            raise ConfigError(f"--sweep names config.{path} twice.")
        axes[path] = [_read(path, leaves[path], value.strip()) for value in listed.split(",")]
    return axes


def _read(path, default, text):
    """A value of a field from its text."""
    if path in _OPTIONAL and text.lower() == "none":
        return None
    kind = _kind(path, default)
    try:
        return _WORDS[text.lower()] if kind is bool else kind(text)
    except (KeyError, ValueError) as error:
        raise ConfigError(
            f"--sweep: config.{path} must be {_KINDS[kind]}: got {shown(text)}."
        ) from error


def trials(config: ConfigDict, axes: Mapping[str, Sequence[Any]]) -> list[ConfigDict]:
    """The configs of a sweep: all combinations, the values of the last axis changing fastest.

    Args:
        config: What they share.
        axes: The values of each field that is swept, by its path.

    Raises:
        ConfigError: A field that cannot be swept, an axis without values or with one twice, or a
            combination that cannot be.
    """
    known = flatten(config)
    for path, values in axes.items():
        if path not in known:
            raise ConfigError(_unknown(path, known))
        if path in _SHARED or path.startswith("checkpoint."):
            raise ConfigError(f"config.{path} cannot be swept: all trials share it.")
        if not values or len(set(values)) < len(values):
            raise ConfigError(
                f"--sweep: config.{path} must have values, each once: got {shown(list(values))}."
            )
    if (count := math.prod(len(values) for values in axes.values())) > _MAX_TRIALS:
        raise ConfigError(f"--sweep must come to at most {_MAX_TRIALS} trials: got {count}.")
    found = []
    for values in itertools.product(*axes.values()):
        trial = copy.deepcopy(config)
        for path, value in zip(axes, values, strict=True):
            _set(trial, path, value)
        check(trial)
        found.append(trial)
    return found


def load(path: str) -> ConfigDict:
    """Runs `get_config()` of a Python file; `file.py:word` runs `get_config("word")`.

    Raises:
        ConfigError: There is no such file, or it fails; the line names where.
    """
    _path(path, "--config")
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
    except Exception as error:  # Whatever the user's own program does wrong.
        raise ConfigError(_where(file, error)) from error
    if "get_config" not in names:
        raise ConfigError(f"{file}: get_config() is missing: see configs/ for examples.")
    if not isinstance(config, ConfigDict):
        raise ConfigError(f"{file}: get_config() must return a ConfigDict: got {type(config)}.")
    missing = [name for name in DEFAULTS if name not in config]
    if missing:
        raise ConfigError(f"{file}: config.{missing[0]} is missing: start from default_config().")
    # A copy, or two runs of one process would share the fields they override.
    return copy.deepcopy(config)


def _where(file, error):
    lines = [f.lineno for f in traceback.extract_tb(error.__traceback__) if f.filename == file]
    message = " ".join(str(error).replace("\\n", " ").strip("'\"").split())
    # ml_collections lists every other field, in full; its suggestion at the end is enough.
    message = re.sub(r"Other fields present: .*}\\?\"\s*", "", message)
    return f"{file}:{lines[-1] if lines else 1}: {type(error).__name__}: {message}"


def _override(config, arguments):
    """Applies `--config.field=value` arguments; returns the config and the fields by path."""
    known, paths = flatten(config), []
    for argument in arguments:
        if match := re.match(r"--?(no)?config\.([^=]*)", argument):
            paths.append(match[2])
            inner = [f"--config.{name}" for name in known if name.startswith(f"{match[2]}.")]
            if inner:
                raise ConfigError(
                    f"config.{match[2]} is no field, but has some: {inner[0]} and the like."
                )
            if match[2] not in known:
                raise ConfigError(_unknown(match[2], known))
        elif argument.startswith("-"):
            name = argument.lstrip("-").split("=")[0]
            close = difflib.get_close_matches(
                name, [*_FLAT_FLAGS, "config", "interactive", "sweep"], n=2
            )
            hint = f" Did you mean {' or '.join(f'--{flag}' for flag in close)}?" if close else ""
            raise ConfigError(f"--{name} is unknown.{hint}")

    # config_flags reads None only as a word: an optional field is set here.
    nothing = [f"--config.{path}={word}" for path in _OPTIONAL for word in ("None", "none")]
    for argument in set(arguments) & set(nothing):
        _set(config, argument.partition(".")[2].partition("=")[0], None)
    arguments = ["train.py", *(a for a in arguments if a not in nothing)]
    values = flags.FlagValues()
    try:
        config_flags.DEFINE_config_dict(
            "config", config, flag_values=values, sys_argv=arguments, lock_config=True
        )
        rest = values(arguments)[1:]
    except flags.IllegalFlagValueError as error:
        path, text = re.match(r"(?s)flag --config\.([^=]*)=(.*?): ", str(error)).groups()
        words = _KINDS[_kind(path, known[path])]
        raise ConfigError(f"config.{path} must be {words}: got {shown(text)}.") from error
    except flags.Error as error:
        raise ConfigError(str(error)) from error
    if rest:
        raise ConfigError(f"Arguments start with --: got {shown(rest[0])}.")
    leaves = flatten(config)
    return config, {path: leaves[path] for path in paths}


def _convert(path, text):
    kind = type(flatten(default_config())[path])
    try:
        return kind(text)
    except ValueError as error:
        raise ConfigError(f"{_label(path)} must be {_KINDS[kind]}: got {shown(text)}.") from error


def _path(text, name):
    with refused():
        return str(local_path(text, name))


def _set(config, path, value):
    section, _, field = path.rpartition(".")
    target = config[section] if section else config
    target[field] = value


def _label(path):
    """How a user calls a field: `--epochs (config.train.epochs)`."""
    for name, flag in _FLAT_FLAGS.items():
        if flag.path == path:
            return f"--{name}" if name == path else f"--{name} (config.{path})"
    return f"config.{path}"


def _help():
    defaults = flatten(default_config())
    lines = [
        "usage: train.py [--flag=value ...] [--config=FILE] [--config.any.field=value ...]",
        "",
        "Trains an attention model. A config file overrides the defaults, flags override both.",
        "",
    ]
    for name, flag in _FLAT_FLAGS.items():
        default = defaults[flag.path] if flag.path else ""
        default = "none" if default in ("", None) else default
        lines.append(f"  --{name:14} {flag.help} (default {default})")
    lines += [
        "  --sweep          field=value,value,...: all combinations at once; repeatable",
        "  --interactive    ask for each parameter",
        "  --config         Python file with get_config(): see configs/ (default none)",
        "",
        "Fields for --config.any.field=value, with the defaults of --task=teacher:",
        "",
    ]
    return "\n".join(lines + [f"  {path} = {value}" for path, value in defaults.items()])


def _interview(config, workdir):
    """Asks for each parameter, again after a wrong answer; returns the run directory.

    A default that an answer before it has made impossible is not offered.
    """
    print("Enter keeps what stands in brackets; Ctrl-D leaves.")
    for name in _QUESTIONS:
        path = _FLAT_FLAGS[name].path
        if name == "num_heads" and config.model.name == "selfhead":
            continue
        if path is None:
            while answer := input(f"{name} [{workdir or 'none'}]: ").strip():
                try:
                    workdir = _path(answer, name)
                    break
                except ConfigError as error:
                    print(f"  {error}")
            continue
        before = flatten(config)[path]
        reason = _reason(config, path)
        question = f"{name}: " if reason else f"{name} [{before}]: "
        while True:
            if reason:
                print(f"  {reason}")
            answer = input(question).strip()
            try:
                _set(config, path, _convert(path, answer) if answer else before)
            except ConfigError as error:
                reason = str(error)
            else:
                reason = _reason(config, path)
            if not reason:
                break
    return workdir


def _reason(config, path):
    """Why a field cannot be what it is, or None."""
    return next((sentence for place, sentence in problems(config) if place == path), None)
