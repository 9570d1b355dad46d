"""The directory of a run: its lock, its config, its files.

    workdir/
        config.json       the complete config of the run, the versions it ran on, and settings of
                          JAX that decide its numbers
        checkpoints/      the newest complete one is what the next process continues from
        metrics.jsonl     one object per logged step
        vocabulary.json   of a task of text: how its tokens become text
        model.json        of a model of Hugging Face: its config.json and the like, by their names
        samples.txt       of a task of text: what the model writes at each evaluation
        tensorboard/      event files, when tensorboardX is there
        result.json       written last, when the run is complete

A process may die at any time, and the next one can continue. Files are replaced atomically. Rows
reach the disk before their checkpoint. Rows after the newest checkpoint are dropped and written
again.
"""

import contextlib
import os
import shlex
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import jax
from filelock import lock_descriptor
from ml_collections import ConfigDict

from attention_jax.training.checkpoint import Checkpoints
from attention_jax.training.config import ConfigError, default_config, flatten, refused
from attention_jax.training.files import (
    CHECKPOINTS,
    MODEL,
    SAMPLES,
    TRIALS,
    VOCABULARY,
    local_path,
    read_config,
    read_json,
)
from attention_jax.training.metrics import JsonLines, Row, Samples, TensorBoard, to_json
from attention_jax.training.process import RunError
from attention_jax.types import TrainState

LOCK = ".lock"  # Exists while a process owns the directory.
WRITTEN = (
    *("config.json", "config.json.tmp", CHECKPOINTS, "metrics.jsonl", "tensorboard"),
    *(VOCABULARY, f"{VOCABULARY}.tmp", MODEL, f"{MODEL}.tmp", SAMPLES),
    *(TRIALS, "sweep.png", "sweep.svg", "result.json", "result.json.tmp"),
)
MAX_TRIES = 100  # Tries to make and lock a directory.
MAX_NAMED = 5  # Fields that an error about another run names.
_SHA256 = "the sha256 of "  # Begins the name of a setting: of the file that a field names.
# The entries of `result.json` that are words; all others are numbers.
WORDS = ("fingerprint", "best_by", "held_out")
# The settings of JAX that change the numbers of a run.
SETTINGS = ("jax_enable_x64", "jax_default_matmul_precision", "jax_random_seed_offset")


@contextlib.contextmanager
def owned(path: str | os.PathLike) -> Iterator[Path]:
    """Makes the directory and keeps every other process out of it until the block ends.

    It holds a kernel lock on an empty file, which is removed when the block ends; a killed process
    leaves the file, but no lock. New directories that stay empty are removed too. If the file
    system has no locks, a line on stderr says so.

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
        # Another process removed the directory or file between two of our lines.
        if tries == 1:
            raise
        _own(path, stack, tries - 1)


def _make(path, stack):
    """Makes a directory and those above it; `stack` removes the new ones that stay empty."""
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
        if os.name == "nt":  # Windows cannot remove open files.
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
        # The previous owner may have removed the file before it released the lock.
        if not os.path.samestat(os.stat(file), os.fstat(handle)):
            raise FileNotFoundError
        opened.callback(_try, os.remove, file)
        stack.enter_context(opened.pop_all())


def _try(action, path):
    with contextlib.suppress(OSError):
        action(path)


def claim(
    path: Path,
    config: ConfigDict,
    versions: Mapping[str, str],
    others: Mapping[str, Any] = MappingProxyType({}),
) -> None:
    """Writes config and settings to a fresh directory; in a used one, checks that they are the
    same, but for the mesh.

    A directory is also fresh if its run was killed before it wrote anything of a step.

    Args:
        path: The directory.
        config: Of the run.
        versions: Of the packages.
        others: What else decides its numbers, as the files that it reads.

    Raises:
        ConfigError: The directory holds another run (the line names the first fields that differ)
            or other files, or it cannot be written.
    """
    file = path / "config.json"
    settings = settings_of_jax() | dict(others)
    with refused():
        theirs = None
        if os.path.lexists(file):
            # A run of an earlier version had the defaults of fields that are new.
            theirs = flatten(default_config(config.task.name)) | settings | _noted(path)
    if theirs is None:
        _check_empty(path, file)
    elif differing := difference(theirs, flatten(config) | settings, _is_place):
        if is_begun(path):
            alike = ", whose tokens must be the same" if _SHA256 in differing else ""
            raise ConfigError(
                f"the run directory {path} holds another run: {differing}. To go on from its "
                f"parameters in a new one{alike}: --init_from={shlex.quote(str(path))} "
                "--workdir=NEW."
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


def settings_of_jax() -> dict[str, Any]:
    """Those that change the numbers of a run."""
    return {name: getattr(jax.config, name) for name in SETTINGS}


def _noted(path):
    """The noted config of a run and its settings of JAX."""
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


def _is_place(name, theirs, ours):
    """Whether a field says where something is, not what it is: a run may go on elsewhere."""
    if name.startswith("mesh."):
        return True
    if name == "init_from" and theirs.get(name) and ours[name]:
        return os.path.realpath(theirs[name]) == os.path.realpath(ours[name])
    content = f"{_SHA256}config.{name}"
    return content in ours and ours[content] == theirs.get(content)


def is_of_host(name: str, theirs: Mapping[str, Any], ours: Mapping[str, Any]) -> bool:
    """Whether a field says where a host has a file: process 0 reads it, or contents compare."""
    return name == "init_from" or f"{_SHA256}config.{name}" in ours


def difference(
    theirs: Mapping[str, Any],
    ours: Mapping[str, Any],
    is_left_out: Callable[[str, Mapping[str, Any], Mapping[str, Any]], bool],
) -> str:
    """Which values differ there and here, in words; "" if none does."""
    found = [
        _told(name, theirs.get(name), ours.get(name))
        for name in sorted(ours.keys() | theirs.keys())
        if ours.get(name) != theirs.get(name) and not is_left_out(name, theirs, ours)
    ]
    more = f", and {len(found) - MAX_NAMED} more" if len(found) > MAX_NAMED else ""
    return ", ".join(found[:MAX_NAMED]) + more


def _told(name, there, here):
    if name.startswith(_SHA256) and there and here:
        field = name.removeprefix(_SHA256)
        return f"the file of {field} has changed (sha256 {there[:8]}… there, {here[:8]}… here)"
    return f"{name} is {there!r} there and {here!r} here"


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
        return True  # Do not clear a directory that cannot be read.


def clear(path: Path) -> None:
    """Removes the files that a run writes, and leaves all others."""
    for name in WRITTEN:
        if (path / name).is_dir():
            shutil.rmtree(path / name, ignore_errors=True)
        else:
            _try(os.remove, path / name)


@contextlib.contextmanager
def reported(path: Path) -> Iterator[None]:
    """Turns an error of the file system, as a full disk, into a RunError."""
    try:
        yield
    except BrokenPipeError:
        raise  # The reader of our output has left; no file is concerned.
    except OSError as error:
        place = error.filename or path
        raise RunError(f"the run directory cannot be used: {error.strerror}: {place}.") from error


class RunDirectory:
    """A claimed directory and its files.

    Every method raises RunError for an error of the file system.

    Attributes:
        path: Of the directory.
        step: The step of the restored checkpoint, or 0.
        rows: The rows up to that step.
        result: The contents of `result.json`. None if the run is not complete.
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

    def restore(self, shapes: Callable[[], TrainState]) -> TrainState | None:
        """Goes back to the newest checkpoint and its rows; None if there is no checkpoint.

        A result of a later step, whose checkpoint is broken, is removed: a result means that the
        run is complete. The continued run writes it again.

        Args:
            shapes: Gives a state of the same structure, shapes and types.

        Raises:
            ConfigError: The checkpoints do not fit these shapes, all are broken, or there is
                a result without a checkpoint; or rows or result are not those of a run.
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
                    state = self._checkpoints.restore(shapes())
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
            self._samples = Samples(self.path / SAMPLES, self.step)
            self._writers.callback(self._samples.close)
            self.rows = list(self._lines.rows)
            if self.rows and "seconds" not in self.rows[-1]:
                raise ConfigError(f"{self.path / 'metrics.jsonl'}: its last row has no seconds.")
            if result is not None and result["step"] != self.step:
                result_file.unlink()
                result = None
        self.result = result
        return state

    def keep(self, name: str, value: dict[str, Any]) -> None:
        """Writes a file of JSON, unless a process before this one has."""
        if not (self.path / name).exists():
            with reported(self.path):
                write_json(self.path / name, value)

    def write(self, row: Row) -> None:
        with reported(self.path):
            self._lines.write(row)
            self._events.write(row)

    def write_sample(self, step: int, text: str) -> None:
        """Writes what the model has written."""
        with reported(self.path):
            self._samples.write(step, text)

    def renew(self, config: ConfigDict) -> None:
        """Writes the config again, with the number of epochs that was found."""
        self._config = config.to_dict()
        with reported(self.path):
            noted = read_json(self.path / "config.json")
            write_json(self.path / "config.json", noted | {"config": self._config})

    def save(self, state: TrainState) -> None:
        """Saves the state; the rows up to its step must have been written."""
        with reported(self.path):
            self._lines.sync()
            self._events.sync()
            self._samples.sync()
            self._checkpoints.save(state, self._config)

    def wait(self) -> None:
        """Returns when the last save is on the disk."""
        with reported(self.path):
            self._checkpoints.wait()

    def complete(self, result: dict[str, Any]) -> str:
        """Writes `result.json`, last and atomically: a result means that the run is complete.

        Returns:
            A line for the user that lists the saved files.
        """
        with reported(self.path):
            self._checkpoints.wait()
            write_json(self.path / "result.json", result)
        self.result = result
        names = sorted(x.name + "/" * x.is_dir() for x in self.path.iterdir() if x.name != LOCK)
        return f"saved in {self.path}: {', '.join(names)}"

    def close(self) -> None:
        """Returns when the last save is on the disk."""
        with reported(self.path), self._writers:
            self._checkpoints.close()

    def __str__(self) -> str:
        return str(self.path)


class NoDirectory:
    """Replaces `RunDirectory` in a run that writes no files, and in all processes but the first.

    Attributes are those of `RunDirectory`.
    """

    def __init__(self):
        self.path = None
        self.rows: list[Row] = []
        self.result: dict[str, Any] | None = None
        self.step = 0

    def restore(self, shapes: Callable[[], TrainState]) -> None:
        return None

    def keep(self, name: str, value: dict[str, Any]) -> None:
        pass

    def write(self, row: Row) -> None:
        pass

    def write_sample(self, step: int, text: str) -> None:
        pass

    def renew(self, config: ConfigDict) -> None:
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
    """Replaces a file atomically: readers see the old file or the new one, even after a kill."""
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
    """The temporary file of `write_json`, which a killed process may leave."""
    return path.with_name(path.name + ".tmp")
