"""`--minutes`: a run as long as a time, whose learning rate falls to 0 at its end.

How many steps fit into the time is measured once: after two epochs of a process, when all programs
have been compiled. From there on the run is one of so many epochs. Its optimizer holds the number,
so every checkpoint does, and a resumed run is the same run. Until then a cosine has not begun.
"""

import time
from collections.abc import Callable
from pathlib import Path

from ml_collections import ConfigDict

from attention_jax.training.config import flatten
from attention_jax.training.files import read_config

FIRST = 2  # Epochs of a process after which it knows its speed.
SPARE = 0.02  # Of the time that is left, for checkpoints and the end of the run.


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
) -> int:
    """How many epochs a run with a budget shall have in all; one more than `done` at least.

    Args:
        config: Of the run.
        done: Epochs done.
        started: When the run began, by `time.perf_counter`.
        epoch_seconds: How long an epoch takes, without compilation.
        evaluate: Does what is done at an evaluation, and waits for it.
    """
    evaluate()  # It may compile.
    begun = time.perf_counter()
    evaluate()
    now = time.perf_counter()
    evaluation, elapsed = now - begun, now - started
    left = (60 * config.train.minutes - elapsed) * (1 - SPARE)
    # The last epoch is evaluated too.
    each = epoch_seconds + evaluation / config.eval.every_epochs
    return done + max(1, int((left - evaluation) / each))
