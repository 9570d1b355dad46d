"""A full disk, a file size limit, a read-only place: each ends the run in one line.

The earlier checkpoint stays, and with room again the run ends with the right result. The tests
mount a small file system, which needs root; without root they only limit the size of files.
"""

import contextlib
import functools
import os
import resource
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from promises.trainer import TINY, Broken, Lab, Process, Row, Trainer, num_rows, saved_steps

ROOM = 256 * 2**20  # Bytes, more than anything here takes.
PAGE = 4096
SIZES = (512, 2048, 4096)  # Bytes that a file may have.


def disk(lab: Lab, count: int = 20) -> Iterator[Row]:
    """Runs into disks that are full at several levels, from the start or in the middle."""
    trainer = Trainer(lab, *TINY)
    trainer.whole  # noqa: B018 (Compiles, on a disk with room.)
    if _can_mount(lab):
        with _mounted(lab.new("disk"), ROOM) as place:
            trainer.finish(place / "run")
            needed = ROOM - _free(place)
        # Half of the disks are too small from the start, half are filled in the middle.
        small = [needed * (i + 1) // (count // 2 + 1) for i in range(count // 2)]
        left = [needed * i // (count - count // 2) for i in range(count - count // 2)]
        trials = [functools.partial(_too_small, lab, trainer, size) for size in small]
        yield _row(lab, "disk full from the start", trials)
        trials = [
            functools.partial(_filled, lab, trainer, rest, 2 + i) for i, rest in enumerate(left)
        ]
        yield _row(lab, "disk full in the middle", trials)
        trials = [functools.partial(_read_only, lab, trainer, begun) for begun in (False, True)]
        yield _row(lab, "read-only file system", trials)
    trials = [functools.partial(limited, lab, trainer, size) for size in SIZES[:count]]
    yield _row(lab, "limit on the size of a file", trials)


def _row(lab: Lab, what: str, trials: list[Callable[[], None]]) -> Row:
    with ThreadPoolExecutor(lab.jobs) as pool:
        kept = sum(pool.map(functools.partial(lab.kept, what), trials))
    return Row(what, len(trials), kept)


def _too_small(lab: Lab, trainer: Trainer, size: int) -> None:
    with _mounted(lab.new("disk"), size) as place:
        process = trainer.start(place / "run")
        status = process.wait()
        _refused(process, status, place)
        _mount(place, f"remount,size={ROOM}")
        _continues(trainer, place / "run")


def _filled(lab: Lab, trainer: Trainer, rest: int, epoch: int) -> None:
    with _mounted(lab.new("disk"), ROOM) as place:
        process = trainer.start(place / "run")
        process.until(lambda: num_rows(place / "run") > epoch)
        with open(place / "filler", "wb") as filler:
            size = _free(place) - rest // 8
            with contextlib.suppress(OSError):
                os.posix_fallocate(filler.fileno(), 0, size // PAGE * PAGE)
        status = process.wait()
        if status == 0:
            raise Broken(f"it ended before {rest} bytes were full")
        _refused(process, status, place)
        (place / "filler").unlink()
        _continues(trainer, place / "run")


def _read_only(lab: Lab, trainer: Trainer, begun: bool) -> None:
    with _mounted(lab.new("disk"), ROOM) as place:
        if begun:
            process = trainer.start(place / "run")
            process.until(lambda: num_rows(place / "run") > 5)
            process.send(signal.SIGKILL)
            process.wait()
        _mount(place, "remount,ro")
        process = trainer.start(place / "run")
        _refused(process, process.wait(), place)
        _mount(place, "remount,rw")
        _continues(trainer, place / "run")


def limited(lab: Lab, trainer: Trainer, size: int) -> None:
    workdir = lab.new("limited")

    process = trainer.start(workdir)
    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (size, size))
    _refused(process, process.wait(), workdir)
    _continues(trainer, workdir)


def _refused(process: Process, status: int, place: Path) -> None:
    """Checks that a process ended with a line that names a place."""
    lines = process.errors.splitlines()
    if status not in (1, 2) or len(lines) != 1 or str(place) not in lines[0]:
        raise Broken(f"status {status}, one line about {place} wanted: {process.errors[-2000:]!r}")


def _continues(trainer: Trainer, workdir: Path) -> None:
    """Checks that a run continues from its newest checkpoint and ends with the right result."""
    steps = saved_steps(workdir)
    process = trainer.complete(workdir)
    if steps and f"continuing after step {steps[-1]}\n" not in process.output:
        raise Broken(f"{workdir}: not continued after step {steps[-1]}: {process.output[:300]}")


def _can_mount(lab: Lab) -> bool:
    try:
        with _mounted(lab.new("disk"), ROOM):
            return True
    except (OSError, subprocess.CalledProcessError):
        return False


@contextlib.contextmanager
def _mounted(place: Path, size: int) -> Iterator[Path]:
    """A file system of a size, in memory."""
    place.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={max(size, PAGE)}", "tmpfs", str(place)]
    subprocess.run(command, check=True, capture_output=True)
    try:
        yield place
    finally:
        subprocess.run(["umount", "-l", str(place)], check=True)
        place.rmdir()


def _mount(place: Path, options: str) -> None:
    subprocess.run(["mount", "-o", options, str(place)], check=True, capture_output=True)


def _free(place: Path) -> int:
    return shutil.disk_usage(place).free
