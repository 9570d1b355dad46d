"""`--minutes`: a run as long as a time, whose learning rate falls to 0 at its end.

How many steps fit into the time is measured once: after two epochs of a process, when all programs
have been compiled. From there on the run is one of so many epochs. Its optimizer holds the number,
so every checkpoint does, and a resumed run is the same run. Until then a cosine has not begun.
"""

import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from ml_collections import ConfigDict

from attention_jax.training.config import ConfigError, flatten
from attention_jax.training.files import read_config
from attention_jax.training.rules import MOST_32_BITS

FIRST = 2  # Epochs of a process after which it knows its speed.
LEAST = FIRST + 1  # Epochs of any run.
SPARE = 0.02  # Of the time that is left, for checkpoints and the end of the run.


class Fit(NamedTuple):
    """What a run has time for.

    Attributes:
        epochs: In all.
        seconds: How long the whole run takes with them.
    """

    epochs: int
    seconds: float


def noted(config: ConfigDict, run: Path | None) -> ConfigDict:
    """The config of a run with a budget, with the epochs that an earlier process has found.

    Args:
        config: Checked.
        run: Its directory, or None.

    Raises:
        ValueError: The config there cannot be read.
    """
    config = ConfigDict(config.to_dict()).lock()
    if run is not None and (run / "config.json").exists():
        theirs = flatten(read_config(run))
        if theirs.get("train.minutes") == config.train.minutes:
            config.train.epochs = theirs.get("train.epochs", config.train.epochs)
    return config


def epochs_that_fit(
    config: ConfigDict,
    done: int,
    started: float,
    epoch_seconds: float,
    evaluate: Callable[[], None],
) -> Fit:
    """What a run with a budget has time for; one epoch more than `done` at least.

    Args:
        config: Of the run.
        done: Epochs done.
        started: When the run began, by `time.perf_counter`.
        epoch_seconds: How long an epoch takes, without compilation.
        evaluate: Does what is done at an evaluation, and waits for it.

    Raises:
        ConfigError: These steps do not hold the warmup of a cosine.
    """
    evaluate()  # It may compile.
    begun = time.perf_counter()
    evaluate()
    now = time.perf_counter()
    evaluation, elapsed = now - begun, now - started
    left = (60 * config.train.minutes - elapsed) * (1 - SPARE)
    # The last epoch is evaluated too.
    each = epoch_seconds + evaluation / config.eval.every_epochs
    most = MOST_32_BITS // config.train.steps_per_epoch - done
    more = max(1, min(most, int((left - evaluation) / each)))
    _check_warmup(config, (done + more) * config.train.steps_per_epoch)
    return Fit(done + more, elapsed + more * each + evaluation)


def _check_warmup(config, total_steps):
    optimizer = config.optimizer
    if optimizer.schedule == "cosine" and optimizer.warmup_steps >= total_steps:
        raise ConfigError(
            f"--minutes={config.train.minutes:g} is time for {total_steps} steps, "
            f"and config.optimizer.warmup_steps={optimizer.warmup_steps} must leave the cosine "
            "some of them."
        )
