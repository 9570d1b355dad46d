"""SIGTERM and SIGINT at any time: the run saves and exits, and the next run continues."""

import itertools
import random
import signal
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from promises.trainer import (
    TINY,
    Broken,
    Lab,
    Process,
    Row,
    Trainer,
    is_complete,
    num_rows,
    rows,
    saved_steps,
    unfinished,
)

WITHIN = 5.0  # Seconds to leave, beside the program that runs.
MAX_TRIES = 5  # Of a signal that comes when its process has ended.
SAVE = 0.05  # Seconds that a save or an epoch takes, about.
STRATA = ("import", "compilation", "step", "evaluation", "save")


def signals(lab: Lab, count: int = 50) -> Iterator[Row]:
    """Sends signals to runs that import, compile, step, evaluate and save, in turn."""
    usual = Trainer(lab, *TINY)
    # So many held-out batches that a process almost always evaluates.
    evaluating = Trainer(
        lab, *TINY, "--epochs=8", "--config.eval.num_batches=3000", "--config.eval.every_epochs=1"
    )
    plan = []
    for number, stratum in zip(range(count), itertools.cycle(STRATA), strict=False):
        turn = number // len(STRATA)
        kind = (signal.SIGTERM, signal.SIGINT)[turn % 2]
        plan.append((stratum, kind, turn % 3 == 2, lab.rng("signals", number)))

    def attempt(stratum: str, kind: int, twice: bool, rng: random.Random) -> float | None:
        trainer = evaluating if stratum == "evaluation" else usual
        try:
            for _ in range(MAX_TRIES):
                workdir = lab.new("stopped")
                cache = lab.new("cache") if stratum == "compilation" else None
                seconds = stop(trainer, workdir, stratum, kind, rng, twice=twice, cache=cache)
                trainer.complete(workdir)
                if seconds is None:
                    continue
                whole = trainer.whole
                # Python handles no signal while XLA compiles, see docs/reliability.md.
                compiling = whole.first_row - whole.handles if cache else 0.0
                if seconds > WITHIN + whole.dispatch + compiling:
                    raise Broken(f"{workdir}: it took {seconds:.1f} s to leave")
                return seconds
            raise Broken(f"the process always ended before, {MAX_TRIES} times")
        except Broken as error:
            times = "twice " if twice else ""
            lab.tell(f"{signal.Signals(kind).name} {times}during {stratum}", error)
            return None

    with ThreadPoolExecutor(lab.jobs) as pool:
        seconds = list(pool.map(attempt, *zip(*plan, strict=True)))
    for stratum in STRATA[:count]:
        mine = [x for x, (name, *_) in zip(seconds, plan, strict=True) if name == stratum]
        good = [x for x in mine if x is not None]
        doubles = sum(twice for name, _, twice, _ in plan if name == stratum)
        seen = f"{doubles} of them twice in a row; {max(good, default=0):.1f} s to leave at most"
        yield Row(f"signal during {stratum}", len(mine), len(good), seen)


def stop(
    trainer: Trainer,
    workdir: Path,
    stratum: str,
    kind: int,
    rng: random.Random,
    *,
    twice: bool = False,
    cache: Path | None = None,
) -> float | None:
    """Starts or continues a run, sends it a signal, and checks how it exits.

    Args:
        trainer, workdir, cache: Of the run.
        stratum: At what to meet it.
        kind: The signal.
        rng: For the moment.
        twice: Send it once more right after.

    Returns:
        The seconds that it took to leave; None: the run was complete.
    """
    before = num_rows(workdir)
    process = trainer.start(workdir, cache=cache)
    _wait(process, trainer, workdir, stratum, before, rng)
    sent = time.monotonic()
    process.send(kind)
    if twice:
        process.sleep(rng.uniform(0, 0.05))
        process.send(kind)
    status = process.wait()
    seconds = time.monotonic() - sent
    if (workdir / "result.json").exists():
        if status != 128 + kind:
            is_complete(process)
        return None
    name, said = signal.Signals(kind).name, process.errors
    if status != 128 + kind or len(said.splitlines()) != 1 or name not in said:
        raise Broken(f"{workdir}: status {status}, a line about {name} wanted: {said[-2000:]!r}")
    steps = saved_steps(workdir)
    if "saved" in said and steps[-1] != rows(workdir)[-1]["step"]:
        raise Broken(f"{workdir}: the last row has no checkpoint")
    if "saved" not in said and not twice and num_rows(workdir) > before:
        raise Broken(f"{workdir}: the last row is not saved")
    if not num_rows(workdir) and workdir.exists():
        raise Broken(f"{workdir}: nothing was done, and {sorted(workdir.iterdir())} left")
    return seconds


def _wait(
    process: Process,
    trainer: Trainer,
    workdir: Path,
    stratum: str,
    before: int,
    rng: random.Random,
) -> None:
    """Waits for a moment of the stratum in a run that had so many rows."""
    whole = trainer.whole
    if stratum == "import":
        start, length = process.handles_signals, whole.announced - whole.handles
    elif stratum == "compilation":
        start, length = lambda: process.output, whole.first_row - whole.announced
    elif stratum == "save":
        later = before + rng.randint(0, 8)
        start, length = lambda: num_rows(workdir) > later and unfinished(workdir), SAVE
    else:
        later = before + rng.randint(0, max(0, whole.num_rows - before - 3))
        start, length = lambda: num_rows(workdir) > later, SAVE
    process.until(start)
    process.sleep(rng.uniform(0, length))
