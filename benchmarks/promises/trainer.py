"""`train.py` as a process: started, watched, and compared with an undisturbed run."""

import functools
import itertools
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[2]
TIMED = ("seconds", "steps_per_second", "trial_steps_per_second", "target_seconds")
DEADLINE = 300.0  # Seconds; what takes longer hangs.
TINY = (
    *("--embed_dim=8", "--num_heads=2", "--batch_size=8", "--seq_length=5", "--epochs=24"),
    *("--config.train.steps_per_epoch=4", "--config.eval.num_batches=1"),
    *("--config.eval.every_epochs=5", "--config.checkpoint.every_epochs=1"),
    "--config.model.dropout_rate=0.1",
)


class Broken(Exception):
    """A promise was not kept."""


class Row(NamedTuple):
    """A line of the table: the fault, the number of trials, the number that kept the promise,
    notes."""

    what: str
    tried: int
    kept: int
    seen: str = ""


class Lab:
    """The settings that all parts share.

    Args:
        place: An empty directory for all that is written.
        seed: Of every random choice.
        jobs: Processes that run at a time.
    """

    def __init__(self, place: Path, seed: int = 0, jobs: int = 2):
        self.place, self.seed, self.jobs = place, seed, jobs
        self._numbers = itertools.count()

    def rng(self, *names: Any) -> random.Random:
        return random.Random(f"{self.seed} {names}")

    def new(self, name: str) -> Path:
        """A new path."""
        return self.place / f"{next(self._numbers)}-{name}"

    def tell(self, what: str, error: Exception) -> None:
        print(f"NOT KEPT: {what}: {error}", file=sys.stderr, flush=True)

    def kept(self, what: str, trial: Callable[..., Any], *arguments: Any) -> bool:
        """Whether a trial keeps the promise; prints the fault otherwise."""
        try:
            trial(*arguments)
        except Broken as error:
            self.tell(what, error)
            return False
        return True


class Process:
    """A running `train.py`; what it prints goes to files."""

    def __init__(self, command: Sequence[str], log: Path, env: dict[str, str]):
        self._logs = log.with_suffix(".out"), log.with_suffix(".err")
        self.started = time.monotonic()
        with open(self._logs[0], "wb") as out, open(self._logs[1], "wb") as err:
            self._popen = subprocess.Popen(command, stdout=out, stderr=err, env=env)
        self.pid = self._popen.pid

    @property
    def output(self) -> str:
        return self._logs[0].read_text()

    @property
    def errors(self) -> str:
        return self._logs[1].read_text()

    def is_running(self) -> bool:
        return self._popen.poll() is None

    def until(self, event: Callable[[], Any]) -> bool:
        """Waits for a condition; False if the process ended before."""
        while not event():
            if not self.is_running():
                return False
            if time.monotonic() - self.started > DEADLINE:
                self.send(signal.SIGKILL)
                raise Broken(f"still running after {DEADLINE:.0f} s: {self.output[-300:]}")
            time.sleep(0.001)
        return True

    def sleep(self, seconds: float) -> bool:
        """Waits a while; False if the process ended before."""
        end = time.monotonic() + seconds
        return self.until(lambda: time.monotonic() >= end)

    def send(self, number: int) -> None:
        self._popen.send_signal(number)

    def wait(self) -> int:
        """The status, as a shell gives it."""
        self.until(lambda: False)
        status = self._popen.wait()
        return 128 - status if status < 0 else status

    def handles_signals(self) -> bool:
        """Whether the program has taken over SIGTERM."""
        try:
            status = Path(f"/proc/{self.pid}/status").read_text()
        except (FileNotFoundError, ProcessLookupError):
            return False
        caught = int(re.search(r"SigCgt:\s*(\w+)", status)[1], 16)
        return bool(caught >> (signal.SIGTERM - 1) & 1)


class Whole(NamedTuple):
    """An uninterrupted run, which had to compile its programs.

    Attributes:
        outcome: What it comes to, see `outcome`.
        handles: Seconds from the start of its process to where it has taken over the signals.
        announced: To its first line.
        first_row: To the first row of metrics.jsonl.
        result: To its result.
        num_rows: The rows of metrics.jsonl in the end.
        dispatch: The longest time between two rows.
    """

    outcome: dict[str, Any]
    handles: float
    announced: float
    first_row: float
    result: float
    num_rows: int
    dispatch: float


class Trainer:
    """One command of `train.py`, to be run in many directories.

    Args:
        lab: Where to keep logs and compiled programs.
        flags: Of the command, without `--workdir`.
        devices: How many are simulated.
    """

    def __init__(self, lab: Lab, *flags: str, devices: int = 2):
        self._lab, self._flags, self._devices = lab, flags, devices
        self._cache, self._lock = lab.new("cache"), threading.Lock()

    def start(self, workdir: Path, *, cache: Path | None = None, **variables: str) -> Process:
        """Runs the command.

        Args:
            workdir: Of the run.
            cache: A place for compiled programs that is not the usual one.
            variables: Of the environment.
        """
        env = os.environ | {
            "JAX_PLATFORMS": "cpu",
            "JAX_NUM_CPU_DEVICES": str(self._devices),
            "JAX_COMPILATION_CACHE_DIR": str(cache or self._cache),
            **variables,
        }
        command = [sys.executable, str(ROOT / "train.py"), *self._flags, f"--workdir={workdir}"]
        return Process(command, self._lab.new("log"), env)

    def finish(self, workdir: Path, *, cache: Path | None = None) -> Process:
        """Runs the command to its end; it must succeed with an empty stderr."""
        process = self.start(workdir, cache=cache)
        is_complete(process)
        return process

    def complete(self, workdir: Path, *, cache: Path | None = None) -> Process:
        """Finishes an interrupted run; its results must equal those of an uninterrupted one."""
        process = self.finish(workdir, cache=cache)
        found, expected = outcome(workdir), self.whole.outcome
        if found != expected:
            names = sorted(found.keys() | expected.keys())
            wrong = [name for name in names if found.get(name) != expected.get(name)]
            raise Broken(f"{workdir} ends otherwise than an uninterrupted run: {', '.join(wrong)}")
        return process

    @property
    def whole(self) -> Whole:
        """An uninterrupted run of this command; made once."""
        with self._lock:
            return self._whole

    @functools.cached_property
    def _whole(self) -> Whole:
        workdir = self._lab.new("whole")
        process = self.start(workdir)
        seconds = []
        for event in (
            process.handles_signals,
            lambda: process.output,
            lambda: num_rows(workdir),
            lambda: (workdir / "result.json").exists(),
        ):
            process.until(event)
            seconds.append(time.monotonic() - process.started)
        is_complete(process)
        times = [row["seconds"] for row in rows(workdir) if "seconds" in row]
        dispatch = max(b - a for a, b in itertools.pairwise(times))
        return Whole(outcome(workdir), *seconds, num_rows(workdir), dispatch)


def is_complete(process: Process) -> None:
    """Checks that a process ends with status 0 and an empty stderr."""
    if (status := process.wait()) or process.errors:
        raise Broken(f"status {status}: {process.errors[-2000:]!r}")


def outcome(workdir: Path) -> dict[str, Any]:
    """The contents of a run's or sweep's files without times, by the name of the file."""

    def timeless(value: Any) -> Any:
        if isinstance(value, dict):
            return {name: timeless(x) for name, x in value.items() if name not in TIMED}
        return [timeless(x) for x in value] if isinstance(value, list) else value

    results = {file: json.loads(file.read_text()) for file in sorted(workdir.rglob("result.json"))}
    histories = {file: rows(file.parent) for file in sorted(workdir.rglob("metrics.jsonl"))}
    return {
        str(file.relative_to(workdir)): timeless(value)
        for file, value in (results | histories).items()
    }


def rows(workdir: Path) -> list[dict[str, Any]]:
    """The rows of a run."""
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def num_rows(workdir: Path) -> int:
    """How many rows there are by now."""
    try:
        return (workdir / "metrics.jsonl").read_bytes().count(b"\n")
    except FileNotFoundError:
        return 0


def unfinished(workdir: Path) -> set[int]:
    """The directories that a save is writing, or was when its process died; by their inodes."""
    found = set()
    for path in (workdir / "checkpoints").glob("*.orbax-checkpoint-tmp*"):
        try:
            found.add(path.stat().st_ino)
        except FileNotFoundError:
            continue  # It has its final name by now.
    return found


def saved_steps(workdir: Path) -> list[int]:
    """The steps of the finished checkpoints, in order."""
    place = workdir / "checkpoints"
    names = os.listdir(place) if place.exists() else []
    return sorted(int(name) for name in names if name.isdigit())


def saved_states(lab: Lab, workdir: Path, shapes: Callable[[], Any]) -> dict[int, Any]:
    """The state in each finished checkpoint of a run, by the step in its name."""

    from attention_jax.training.checkpoint import Checkpoints

    found, like = {}, shapes()
    for step in saved_steps(workdir):
        place = lab.new("alone") / str(step)
        shutil.copytree(workdir / "checkpoints" / str(step), place)
        with Checkpoints(place.parent, read_only=True) as checkpoints:
            found[step] = checkpoints.restore(like)
    return found
