"""The directory of a run: who owns it, what run it holds, and what has been written so far.

    workdir/
        config.json       the complete config of the run, the versions it ran on, and settings of
                          JAX that decide its numbers
        checkpoints/      the newest complete one is what the next process continues from
        metrics.jsonl     one object per logged step
        tensorboard/      event files, when tensorboardX is there
        result.json       written last, when the run is complete

Whatever instant a process dies at, the next one finds a directory to continue from: files are
replaced in one stroke, rows reach the disk before the checkpoint that knows of them, and rows
behind the newest checkpoint are dropped and written again.
"""

import contextlib
import os
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
from filelock import lock_descriptor
from ml_collections import ConfigDict

from attention_jax.training.checkpoint import Checkpoints
from attention_jax.training.config import ConfigError, flatten, refused
from attention_jax.training.files import CHECKPOINTS, TRIALS, local_path, read_config, read_json
from attention_jax.training.metrics import JsonLines, Row, TensorBoard, to_json
from attention_jax.training.process import RunError
from attention_jax.types import TrainState

LOCK = ".lock"  # There as long as a process owns the directory.
WRITTEN = (
    *("config.json", "config.json.tmp", CHECKPOINTS, "metrics.jsonl", "tensorboard"),
    *(TRIALS, "sweep.png", "sweep.svg", "result.json", "result.json.tmp"),
)
MAX_TRIES = 100  # To make and lock a directory.
MAX_NAMED = 5  # Fields that an error about another run names.
# What `result.json` says in words; all else is numbers.
WORDS = ("fingerprint", "best_by", "held_out")
# What JAX may be set to that decides the numbers of a run, beside its config.
SETTINGS = ("jax_enable_x64", "jax_default_matmul_precision", "jax_random_seed_offset")


@contextlib.contextmanager
def owned(path: str | os.PathLike) -> Iterator[Path]:
    """Makes the directory and keeps every other process out of it until the block ends.

    The lock is the kernel's, on an empty file that the block's end removes; a killed process leaves
    the file, but no lock. Directories that were made here and are empty are removed too. Where the
    file system has no locks, a line on stderr says so.

    Raises:
        ConfigError: The path is not local, is a file, cannot be made or written, or is owned by
            another process.
        TypeError: It is no path.
    """
    with refused():
        path = local_path(path, "the run directory (--workdir)")
    with contextlib.ExitStack() as stack:
        try:
            _own(path, stack, MAX_TRIES)
        except BlockingIOError as error:
            raise ConfigError(f"the run directory {path} is in use by another process.") from error
        except OSError as error:
            if os.path.exists(path) and not os.path.isdir(path):
                raise ConfigError(f"the run directory {path} is a file.") from error
            raise ConfigError(
                f"the run directory {path} cannot be used: {error.strerror}: {error.filename}."
            ) from error
        yield path


def _own(path, stack, tries):
    try:
        _make(path, stack)
        _lock(path / LOCK, stack)
    except FileNotFoundError:
        # Another process has removed what it had made, between two of our lines.
        if tries == 1:
            raise
        _own(path, stack, tries - 1)


def _make(path, stack):
    """Makes a directory and those above it; `stack` removes again what was made and is empty."""
    missing = [place for place in (path, *path.parents) if not os.path.exists(place)]
    for place in reversed(missing):
        try:
            place.mkdir()
        except FileExistsError:
            continue  # Another process was faster.
        stack.callback(_try, os.rmdir, place)


def _lock(file, stack):
    """Locks a file until `stack` is closed, which removes it.

    BlockingIOError: another process has the lock. FileNotFoundError: it has removed the file.
    """
    with contextlib.ExitStack() as opened:
        handle = os.open(file, os.O_RDWR | os.O_CREAT)
        if os.name == "nt":  # No open file can be removed there.
            opened.callback(_try, os.remove, file)
        opened.callback(os.close, handle)
        try:
            is_ours = lock_descriptor(handle, blocking=False)
        except OSError as error:
            print(
                f"The file system of {file.parent} has no locks ({error.strerror}): take care that "
                "no other process writes there.",
                file=sys.stderr,
            )
            is_ours = True
        if not is_ours:
            raise BlockingIOError
        # The owner before removes the file, then lets go of it.
        if not os.path.samestat(os.stat(file), os.fstat(handle)):
            raise FileNotFoundError
        opened.callback(_try, os.remove, file)
        stack.enter_context(opened.pop_all())


def _try(action, path):
    with contextlib.suppress(OSError):
        action(path)


def claim(path: Path, config: ConfigDict, versions: Mapping[str, str]) -> None:
    """Notes config and settings in a fresh directory; in a used one, sees that they are the same.

    A directory is fresh too when its run has been killed before anything of a step was written.

    Raises:
        ConfigError: The directory holds another run (the line names the first fields that differ),
            or something that is no run, or it cannot be written.
    """
    file, settings = path / "config.json", {name: getattr(jax.config, name) for name in SETTINGS}
    with refused():
        theirs = settings | _noted(path) if os.path.lexists(file) else None
    if theirs is None:
        _check_empty(path, file)
    elif differing := _differing(theirs, flatten(config) | settings):
        if is_begun(path):
            raise ConfigError(
                f"the run directory {path} holds another run: {differing}. To go on from its "
                f"parameters in a new one: --init_from={path} --workdir=NEW."
            )
        clear(path)
        theirs = None
    if theirs is None:
        try:
            noted = {"config": config.to_dict(), "versions": dict(versions), "settings": settings}
            write_json(file, noted)
        except OSError as error:
            raise ConfigError(
                f"the run directory {path} cannot be written: {error.strerror}."
            ) from error


def _noted(path):
    """The config of a run, and the settings of JAX that it was under, where it has noted them."""
    config, settings = read_config(path), read_json(path / "config.json").get("settings", {})
    if not isinstance(settings, dict):
        raise ValueError(f"{path / 'config.json'} is not of a run: its settings are no object.")
    return flatten(config) | settings


def _check_empty(path, file):
    strangers = sorted(x.name for x in path.iterdir() if x not in (unfinished(file), path / LOCK))
    if known := [name for name in strangers if name in WRITTEN]:
        raise ConfigError(f"{file} is missing, but {path} holds {known[0]} of a run.")
    if strangers:
        raise ConfigError(
            f"the run directory {path} is not empty and holds no run: got {strangers[0]}."
        )


def _differing(theirs, ours):
    found = [
        f"{name} is {theirs.get(name)!r} there and {ours.get(name)!r} here"
        for name in sorted(ours.keys() | theirs.keys())
        if ours.get(name) != theirs.get(name)
    ]
    more = f", and {len(found) - MAX_NAMED} more" if len(found) > MAX_NAMED else ""
    return ", ".join(found[:MAX_NAMED]) + more


def is_begun(path: Path) -> bool:
    """Whether a run directory holds anything of a step: a row, a checkpoint, or a result."""
    rows, checkpoints = path / "metrics.jsonl", path / CHECKPOINTS
    try:
        return (
            (path / "result.json").exists()
            or (rows.exists() and rows.stat().st_size > 0)
            or (checkpoints.exists() and any("tmp" not in name for name in os.listdir(checkpoints)))
        )
    except OSError:
        return True  # What cannot be read is not to be cleared.


def clear(path: Path) -> None:
    """Removes what a run writes before its first step, and leaves the rest."""
    for name in WRITTEN:
        if (path / name).is_dir():
            shutil.rmtree(path / name, ignore_errors=True)
        else:
            _try(os.remove, path / name)


@contextlib.contextmanager
def reported(path: Path) -> Iterator[None]:
    """What the file system refuses, a full disk say, ends the run in one line."""
    try:
        yield
    except BrokenPipeError:
        raise  # The reader of our lines has left: that is about no file.
    except OSError as error:
        place = error.filename or path
        raise RunError(f"the run directory cannot be used: {error.strerror}: {place}.") from error


class RunDirectory:
    """A claimed directory and all that is written to it.

    Every method raises RunError where the file system refuses.

    Attributes:
        path: Of the directory.
        step: That of the checkpoint restored, 0 when there is none.
        rows: The rows of the steps up to it.
        result: What `result.json` holds. None: the run is not complete.
    """

    def __init__(self, path: Path, config: ConfigDict):
        self.path = path
        self._config = config.to_dict()
        with reported(path):
            self._checkpoints = Checkpoints(path / CHECKPOINTS, keep=config.checkpoint.keep)
        self._writers = contextlib.ExitStack()
        self.step = 0
        self.rows: list[Row] = []
        self.result: dict[str, Any] | None = None

    def restore(self, init: Callable[[], TrainState]) -> TrainState | None:
        """Goes back to the newest checkpoint, and the rows with it; None when there is none.

        A result of a later step, whose checkpoint has turned out broken, is removed: a result means
        that all else is there, and the run that goes on writes it again.

        Raises:
            ConfigError: The checkpoints do not fit what `init` would make, all are broken, or there
                is none and yet a result; rows or result are not those of a run.
        """
        result_file = self.path / "result.json"
        with refused():
            result = read_json(result_file)
        for name, value in (result or {}).items():
            if isinstance(value, str) != (name in WORDS):
                raise ConfigError(f"{result_file} is not of a run: {name} is {value!r}.")
        if result is not None and not isinstance(result.get("step"), int):
            raise ConfigError(f"{result_file} is not of a run: it holds no step.")
        state = None
        if self._checkpoints.latest_step() is not None:
            try:
                with reported(self.path):
                    state = self._checkpoints.restore(jax.eval_shape(init))
            except (RuntimeError, ValueError) as error:
                raise ConfigError(f"the run directory {self.path}: {error}") from error
            self.step = int(state.step)
        elif result is not None:
            raise ConfigError(
                f"the run directory {self.path} is complete, but its checkpoints are gone: remove "
                f"{result_file.name} to train again."
            )
        with reported(self.path):
            try:
                self._lines = JsonLines(self.path / "metrics.jsonl", self.step)
            except ValueError as error:
                raise ConfigError(str(error)) from error
            self._writers.callback(self._lines.close)
            self._events = TensorBoard(self.path / "tensorboard", self.step)
            self._writers.callback(self._events.close)
            self.rows = list(self._lines.rows)
            if self.rows and "seconds" not in self.rows[-1]:
                raise ConfigError(f"{self.path / 'metrics.jsonl'}: its last row has no seconds.")
            if result is not None and result["step"] != self.step:
                result_file.unlink()
                result = None
        self.result = result
        return state

    def write(self, row: Row) -> None:
        with reported(self.path):
            self._lines.write(row)
            self._events.write(row)

    def save(self, state: TrainState) -> None:
        """Saves the state; the rows up to its step must have been written."""
        with reported(self.path):
            self._lines.sync()
            self._events.sync()
            self._checkpoints.save(state, self._config)

    def wait(self) -> None:
        """Returns when what was saved is on the disk."""
        with reported(self.path):
            self._checkpoints.wait()

    def complete(self, result: dict[str, Any]) -> str:
        """Writes `result.json`, last and in one stroke: a result means that all else is there.

        Returns:
            What was saved, in a line for the user.
        """
        with reported(self.path):
            self._checkpoints.wait()
            write_json(self.path / "result.json", result)
        self.result = result
        names = sorted(x.name + "/" * x.is_dir() for x in self.path.iterdir() if x.name != LOCK)
        return f"saved in {self.path}: {', '.join(names)}"

    def close(self) -> None:
        """Returns when what was saved is on the disk."""
        with reported(self.path), self._writers:
            self._checkpoints.close()

    def __str__(self) -> str:
        return str(self.path)


class NoDirectory:
    """Stands where a run writes nothing."""

    path = None
    rows: tuple[Row, ...] = ()
    result = None
    step = 0

    def restore(self, init: Callable[[], TrainState]) -> None:
        return None

    def write(self, row: Row) -> None:
        pass

    def save(self, state: TrainState) -> None:
        pass

    def wait(self) -> None:
        pass

    def complete(self, result: dict[str, Any]) -> str:
        return "nothing saved: no --workdir"

    def close(self) -> None:
        pass


def write_json(path: Path, value: dict[str, Any]) -> None:
    """Replaces a file in one stroke: a reader, or a killed process, finds all of it or nothing."""
    text = to_json(value, indent=2)
    try:
        with open(unfinished(path), "w") as file:
            file.write(text + "\n")
            file.flush()
            os.fsync(file.fileno())
        os.replace(unfinished(path), path)
    except OSError as error:
        _try(os.remove, unfinished(path))
        # `file.write` names no file.
        raise OSError(error.errno, error.strerror, str(path)) from error


def unfinished(path: Path) -> Path:
    """Where `write_json` writes before it replaces; a killed process may leave it."""
    return path.with_name(path.name + ".tmp")
