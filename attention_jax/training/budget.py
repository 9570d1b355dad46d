"""`--minutes`: a run as long as a time, whose learning rate falls to 0 at its end.

How many steps fit into the time is measured in the first epochs of a process: see `Pilot`.
From there on the run is one of so many epochs. Its optimizer holds the number,
so every checkpoint does, and a resumed run is the same run. Until then a cosine has not begun.
Only if the machine has become much slower by the half of the time, the run is made shorter, once:
see `Review`.
"""

import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from ml_collections import ConfigDict

from attention_jax.training.config import ConfigError, flatten
from attention_jax.training.files import read_config
from attention_jax.training.rules import MOST_32_BITS

LEAST = 3  # Epochs of any run: one compiles, one is measured, one is left.
PILOT = 0.1  # Of the minutes: how long it measures, if an epoch is shorter.
SPARE = 0.02  # Of the time that is left, for the end of the run.
LATE = 0.1  # Of the minutes: a run that would end later than this is made shorter.


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
        if theirs.get("train.minutes"):  # Other minutes are refused for themselves.
            config.train.epochs = theirs.get("train.epochs", config.train.epochs)
    return config


class Pilot:
    """The epochs that a run measures its speed in, with the rows and checkpoints that they write.

    They begin after the first epoch, when all programs have been compiled, and end at the second
    checkpoint, after a tenth of the minutes, or when no time is left. A short epoch may take less
    time than its row and its checkpoint.

    Attributes:
        started: When the run began, by `time.perf_counter`.
        laps: The seconds of each epoch with its row, without its checkpoint, and how many times it
            was evaluated. The first lap writes the first row, which imports and opens what the
            others use, so it counts only where it is the only one.
        saves: How long it took to save each checkpoint, in seconds.
    """

    def __init__(self, config: ConfigDict, started: float):
        self._config, self.started = config, started
        self._begun = self._lap_begun = time.perf_counter()
        self._aside, self._evaluations = 0.0, 0
        self.laps: list[tuple[float, int]] = []
        self.saves: list[float] = []

    def evaluated(self) -> None:
        """Notes that this epoch was evaluated."""
        self._evaluations += 1

    def saved(self, seconds: float) -> None:
        """Notes that its checkpoint was saved."""
        self.saves.append(seconds)
        self._aside += seconds

    def end_lap(self) -> None:
        """Ends an epoch, with all that was done after it, and begins the next one."""
        now = time.perf_counter()
        self.laps.append((now - self._lap_begun - self._aside, self._evaluations))
        self._lap_begun, self._aside, self._evaluations = now, 0.0, 0

    def is_over(self) -> bool:
        """Whether to decide, at the end of an epoch."""
        budget = 60 * self._config.train.minutes
        is_long = time.perf_counter() >= min(self._begun + PILOT * budget, self.started + budget)
        return is_long or len(self.saves) > 1

    def epoch_seconds(self, evaluation: float) -> float:
        """How long an epoch takes without its evaluation, which takes so many seconds."""
        laps = self.laps[1:] or self.laps
        return max(1e-6, sum(lap - n * evaluation for lap, n in laps) / len(laps))

    def check_warmup(self, done: int) -> None:
        """As `epochs_that_fit`, before any row is written: the time for epochs alone."""
        now = time.perf_counter()
        left = 60 * self._config.train.minutes - (now - self.started)
        most = max(1, int(left / max(1e-6, now - self._begun)))
        _check_warmup(self._config, (done + most) * self._config.train.steps_per_epoch)


class Review:
    """Whether a run still ends in time, asked once at the half of the minutes.

    Args:
        config: Of the run.
        started: When the run began, by `time.perf_counter`.
        epoch: The epochs done. Those that follow tell the speed.
    """

    def __init__(self, config: ConfigDict, started: float, epoch: int):
        self._config, self._started = config, started
        self._epoch, self._begun = epoch, time.perf_counter()
        self._budget = 60 * config.train.minutes

    def is_due(self, epoch: int) -> bool:
        """Whether to ask, at the end of an epoch, of which two at least have been measured."""
        half = time.perf_counter() >= self._started + self._budget / 2
        return half and epoch - self._epoch >= 2

    def epochs(self, epoch: int) -> int:
        """How many epochs the run should have, at the end of one: as before if it is in time."""
        train, optimizer = self._config.train, self._config.optimizer
        now = time.perf_counter()
        each = (now - self._begun) / (epoch - self._epoch)
        left = self._budget - (now - self._started)
        if (train.epochs - epoch) * each <= left + LATE * self._budget:
            return train.epochs
        fits = epoch + max(1, int(left * (1 - SPARE) / each))
        return min(train.epochs, max(fits, optimizer.warmup_steps // train.steps_per_epoch + 1))


def epochs_that_fit(
    config: ConfigDict, done: int, pilot: Pilot, evaluate: Callable[[], None]
) -> Fit:
    """What a run with a budget has time for; one epoch more than `done` at least.

    Args:
        config: Of the run.
        done: Epochs done.
        pilot: What was measured.
        evaluate: Does what is done at an evaluation, and waits for it.

    Raises:
        ConfigError: These steps do not hold the warmup of a cosine.
    """
    pilot.end_lap()
    evaluate()  # It may compile.
    begun = time.perf_counter()
    evaluate()
    now = time.perf_counter()
    evaluation = now - begun
    # The first save imports and opens what the others use.
    saves = pilot.saves[1:] or pilot.saves
    save = sum(saves) / max(1, len(saves))
    # The last epoch is evaluated and saved too.
    each = pilot.epoch_seconds(evaluation) + evaluation / config.eval.every_epochs
    each += save / config.checkpoint.every_epochs
    elapsed = now - pilot.started
    left = (60 * config.train.minutes - elapsed) * (1 - SPARE)
    most = MOST_32_BITS // config.train.steps_per_epoch - done
    more = max(1, min(most, int((left - evaluation - save) / each)))
    _check_warmup(config, (done + more) * config.train.steps_per_epoch)
    return Fit(done + more, elapsed + more * each + evaluation + save)


def _check_warmup(config, total_steps):
    optimizer = config.optimizer
    if optimizer.schedule == "cosine" and optimizer.warmup_steps >= total_steps:
        raise ConfigError(
            f"--minutes={config.train.minutes:g} is time for {total_steps} steps, "
            f"and config.optimizer.warmup_steps={optimizer.warmup_steps} must leave the cosine "
            "some of them."
        )
