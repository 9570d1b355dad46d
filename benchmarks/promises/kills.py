"""kill -9 at any time: the next run continues and ends as an uninterrupted one."""

import itertools
import random
import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from promises.trainer import TINY, Broken, Lab, Row, Trainer, is_complete, unfinished

MAX_KILLS = 6  # Of one run.
INSIDE = 0.3  # The part of the kills that is to fall inside a save.
SAVE = 0.05  # Seconds that a save takes, about.


def kills(lab: Lab, count: int = 100, sweep_count: int | None = None) -> Iterator[Row]:
    """Kills runs under each launcher, and a fifth as many sweeps (or `sweep_count`)."""
    launchers = [f"--launcher={name}" for name in ("single", "pmap", "sharded")]
    runs = [Trainer(lab, *TINY, flag) for flag in launchers]
    yield _kill(lab, "`kill -9` of a run", runs, count)
    # Two programs of two trials.
    axes = ["--sweep=learning_rate=0.001,0.01", "--sweep=model.head_dim=2,4"]
    sweep = Trainer(lab, *TINY, *axes)
    yield _kill(lab, "`kill -9` of a sweep", [sweep], sweep_count or -(-count // 5))


def _kill(lab: Lab, what: str, trainers: list[Trainer], wanted: int) -> Row:
    """Kills runs until there were as many kills as wanted."""
    found: list[tuple[bool, list[bool]]] = []  # Of each run: all is well; each kill inside a save.

    def is_enough() -> bool:
        inside = [is_inside for _, kills in found for is_inside in kills]
        return len(inside) >= wanted and sum(inside) >= INSIDE * wanted

    def run(number: int) -> None:
        trainer, rng = trainers[number % len(trainers)], lab.rng(what, number)
        workdir, kills = lab.new("killed"), []
        # One run of four compiles anew: kills meet it compiling, and keeping what it compiled.
        cache = lab.new("cache") if rng.random() < 0.25 else None
        try:
            for _ in range(rng.randint(1, MAX_KILLS)):
                inside = kill(trainer, workdir, rng, aim=rng.random() < 2 * INSIDE, cache=cache)
                if inside is None:
                    break
                kills.append(inside)
            trainer.complete(workdir, cache=cache)
        except Broken as error:
            lab.tell(f"{what}, {workdir}", error)
            found.append((False, kills or [False]))
        else:
            found.append((True, kills))

    def work(_: int) -> None:
        while not is_enough():
            run(next(numbers))

    numbers = itertools.count()
    with ThreadPoolExecutor(lab.jobs) as pool:
        list(pool.map(work, range(lab.jobs)))
    tried = sum(len(kills) for _, kills in found)
    kept = sum(len(kills) for is_well, kills in found if is_well)
    inside = sum(sum(kills) for _, kills in found)
    return Row(what, tried, kept, f"{inside} of them inside a save; {len(found)} runs")


def kill(
    trainer: Trainer, workdir: Path, rng: random.Random, *, aim: bool, cache: Path | None = None
) -> bool | None:
    """Starts or continues a run, and kills it.

    Args:
        trainer, workdir, cache: Of the run.
        rng: For the moment.
        aim: At a save, of which there must be a few more; at any time otherwise.

    Returns:
        Whether it was inside a save, which then has left a directory; None: the run was complete.
    """
    seconds = rng.uniform(0, SAVE if aim else trainer.whole.result)
    process = trainer.start(workdir, cache=cache)
    before = unfinished(workdir)
    for _ in range(rng.randint(1, 8) if aim else 0):
        known = unfinished(workdir)
        process.until(lambda: unfinished(workdir) - known)  # noqa: B023
    process.sleep(seconds)
    if not process.is_running():
        is_complete(process)
        return None
    process.send(signal.SIGKILL)
    if process.wait() != 128 + signal.SIGKILL or process.errors:
        raise Broken(f"before its kill it said {process.errors[-2000:]!r}")
    return bool(unfinished(workdir) - before)
