"""The valid values of each field of a config, and the errors for others.

config.py has the rules over several fields. This module imports no jax.
"""

import difflib
import math
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

from attention_jax.training import own, words
from attention_jax.training.defaults import TASKS
from attention_jax.training.files import is_directory

# The flags, by the field that each sets.
FLAGS = {
    "model.name": "model",
    "model.features": "embed_dim",
    "model.num_heads": "num_heads",
    "optimizer.learning_rate": "learning_rate",
    "train.batch_size": "batch_size",
    "task.seq_length": "seq_length",
    "train.epochs": "epochs",
    "train.minutes": "minutes",
    "train.target": "target",
    "task.name": "task",
    "launcher": "launcher",
    "seed": "seed",
    "init_from": "init_from",
}


def label(path: str) -> str:
    """The user's name for a field.

    >>> label("train.epochs"), label("seed"), label("model.norm")
    ('--epochs (config.train.epochs)', '--seed', 'config.model.norm')
    """
    flag = FLAGS.get(path)
    if flag is None:
        return f"config.{path}"
    return f"--{flag}" if flag == path else f"--{flag} (config.{path})"


def shown(value: Any) -> str:
    """A value for a line of text, shortened if it is long.

    >>> shown("a" * 100)
    "'aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa... (102 characters)"
    """
    try:
        text = repr(value)
    except ValueError:  # It has more digits than Python writes.
        return f"an integer of {value.bit_length()} bits"
    return text if len(text) <= 80 else f"{text[:40]}... ({len(text)} characters)"


# What people write elsewhere for the last names of some fields.
SHORT = {
    "lr": "learning_rate",
    "wd": "weight_decay",
    "bs": "batch_size",
    "dim": "features",
    "steps": "steps_per_epoch",
}


def unknown(path: str, known: Iterable[str]) -> str:
    """The sentence for an unknown field, with the tasks that have it, or with similar names."""
    section, _, field = path.partition(".")
    tasks = [name for name, changes in TASKS.items() if field in changes.get(section, ())]
    if section == "task" and tasks:
        return f"config.{path} is unknown: it is a field of --task={' or --task='.join(tasks[:3])}."
    near = difflib.get_close_matches(path, known, n=3)
    # The section alone makes two short names alike.
    last = lambda name: name.rpartition(".")[2]
    near = [name for name in near if difflib.get_close_matches(last(path), [last(name)])]
    near = near or [name for name in known if last(name) == SHORT.get(last(path))]
    close = [f"config.{name}" for name in near]
    hint = f" Did you mean {' or '.join(close)}?" if close else ""
    return f"config.{path} is unknown.{hint}"


class _Rule(NamedTuple):
    holds: Callable[[Any], bool]
    words: str


def _at_least(low):
    return _Rule(lambda value: value >= low, f"must be at least {low}")


def _one_of(*names):
    return _Rule(lambda value: value in names, f"must be one of {', '.join(names)}")


def _one_of_or_path(*names):
    return _Rule(
        lambda value: value in names or own.is_path(value),
        f"must be one of {', '.join(names)}, or package.module:name",
    )


_RATE = _Rule(lambda value: 0 <= value < 1, "must be in [0, 1)")
# Integers, or None.
OPTIONAL = (
    *("model.num_kv_heads", "model.head_dim", "model.window", "model.stride"),
    "mesh.data",
)
_RULES = {
    "seed": _Rule(lambda value: 0 <= value < 2**31, "must be in [0, 2**31)"),
    "launcher": _one_of("single", "pmap", "sharded"),
    "mesh.data": _at_least(1),
    "mesh.model": _at_least(1),
    "mesh.sequence": _at_least(1),
    "task.seq_length": _at_least(1),
    "model.name": _Rule(
        lambda value: value in words.ATTENTIONS or is_directory(value),
        f"must be one of {', '.join(words.ATTENTIONS)}, or a directory of Hugging Face, as ./gpt2",
    ),
    "model.mechanism": _one_of_or_path(*words.MECHANISMS),
    "model.features": _at_least(1),
    "model.num_layers": _at_least(1),
    "model.num_heads": _at_least(1),
    "model.num_kv_heads": _at_least(1),
    "model.head_dim": _at_least(1),
    "model.mlp_ratio": _at_least(0),
    "model.mlp": _one_of(*words.MLPS),
    "model.norm": _one_of(*words.NORMS),
    "model.positions": _one_of(*words.POSITIONS),
    "model.window": _at_least(0),
    "model.pattern": _one_of(*words.PATTERNS),
    "model.stride": _at_least(1),
    "model.softcap": _at_least(0),
    "model.short_conv": _at_least(0),
    "model.init_scale": _at_least(0),
    "model.dropout_rate": _RATE,
    "model.remat": _one_of(*words.REMATS),
    "model.dtype": _one_of("float32", "bfloat16", "float16"),
    "model.matmul_precision": _one_of(*words.MATMUL_PRECISIONS),
    "optimizer.name": _one_of("adam", "adamw", "muon", "sgd"),
    "optimizer.learning_rate": _Rule(lambda value: value > 0, "must be above 0"),
    "optimizer.schedule": _one_of("constant", "cosine"),
    "optimizer.warmup_steps": _at_least(0),
    "optimizer.weight_decay": _at_least(0),
    "optimizer.decay": _one_of("matrices", "all"),
    "optimizer.clip_norm": _at_least(0),
    "optimizer.momentum": _RATE,
    "optimizer.b1": _RATE,
    "optimizer.b2": _RATE,
    "optimizer.accumulate": _at_least(1),
    "optimizer.max_skipped": _at_least(0),
    "train.batch_size": _at_least(1),
    "train.steps_per_epoch": _at_least(1),
    "train.epochs": _at_least(1),
    "train.minutes": _at_least(0),
    "eval.sample": _at_least(0),
    "eval.num_batches": _at_least(1),
    "eval.every_epochs": _at_least(1),
    "checkpoint.every_epochs": _at_least(1),
    # The run can continue from one while it writes the next.
    "checkpoint.keep": _at_least(2),
}
# The largest integers, where the limit is below 32 bits. They are more than enough for training,
# and small enough that the error can give the memory that they need.
_MOST = {
    "mesh.data": 2**20,
    "mesh.model": 2**20,
    "mesh.sequence": 2**20,
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
    "eval.sample": 2**20,
    "optimizer.accumulate": 2**24,
    "task.max_depth": 2**10,
}
_MOST_OF_TASK, MOST_32_BITS = 2**24, 2**31 - 1
_FLOATS = 1e-30, 1e30  # Limits of absolute values, except 0: well inside the range of float32.
_MAX_MLP_RATIO = 2.0**10
_WORDS = {"true": True, "false": False}
_KINDS = {bool: "true or false", int: "an integer", float: "a finite number", str: "a name"}


def fault(path: str, value: Any, default: Any) -> str | None:
    """Why a field cannot hold a value, in words that follow its name; None if it can.

    >>> fault("train.epochs", 0, 100)
    'must be at least 1'
    """
    if value is None and path in OPTIONAL:
        return None
    if not _is_a(_kind(path, default), value):
        return kind_words(path, default)
    rule = _RULES.get(path)
    return rule.words if rule and not rule.holds(value) else _excess(path, value)


def kind_words(path: str, default: Any) -> str:
    """The type of a field, in words that follow its name."""
    return f"must be {_KINDS[_kind(path, default)]}"


def read(path: str, text: str, default: Any) -> Any:
    """Reads the value of a field from text; ValueError, in words that follow its name, if invalid.

    >>> read("model.causal", "true", False), read("model.window", "none", None)
    (True, None)
    """
    if path in OPTIONAL and text.lower() == "none":
        return None
    kind = _kind(path, default)
    try:
        value = _WORDS[text.lower()] if kind is bool else kind(text)
    except (KeyError, ValueError):
        value = None
    if not _is_a(kind, value):
        raise ValueError(f"{kind_words(path, default)}: got {shown(text)}.")
    return value


def _kind(path, default):
    return int if path in OPTIONAL else type(default)


def _is_a(kind, value):
    if kind is float:
        return _is_a(int, value) or (isinstance(value, float) and math.isfinite(value))
    return isinstance(value, kind) and isinstance(value, bool) == (kind is bool)


def _excess(path, value):
    """Words for a number that is too large or too small to compute with, else None."""
    if isinstance(value, float):
        least, most = _FLOATS
        if path == "model.mlp_ratio" and value > _MAX_MLP_RATIO:
            return f"must be at most {_MAX_MLP_RATIO:g}"
        sound = value == 0 or least <= abs(value) <= most
        return None if sound else f"must be 0, or from {least:g} to {most:g} by size"
    if isinstance(value, int):
        of_task = path.startswith("task.") and path != "task.seed"
        most = _MOST.get(path, _MOST_OF_TASK if of_task else MOST_32_BITS)
        return None if value <= most else f"must be at most {most}"
    return None
