"""A long run: its memory, its open files, its compilations, and what saving costs."""

import contextlib
import io
import os
import re
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

from promises.trainer import Broken, Lab, Process, Row, Trainer, num_rows

SAVES = 200
WARM_UP = 0.2  # Of the run.
GROWTH, COST = 0.02, 0.05  # What memory may grow by, and what saving may cost, of the whole.
# A step of the default model on a larger batch of longer rows, saved as often as in the long run.
STEP = {"task.seq_length": 64, "train.batch_size": 128, "train.steps_per_epoch": 50}
COST_EPOCHS = 6


def soak(lab: Lab, count: int = 10_000) -> Iterator[Row]:
    """Watches a run of so many steps and 200 saves; then times a realistic one with and without."""
    yield from _long(lab, count)
    yield _cost(lab, rounds=4 if count >= 10_000 else 1)


def _long(lab: Lab, num_steps: int) -> Iterator[Row]:
    flags = [f"--config.train.steps_per_epoch={max(1, num_steps // SAVES)}", f"--epochs={SAVES}"]
    trainer = Trainer(lab, *flags, "--config.checkpoint.every_epochs=1", devices=1)
    workdir = lab.new("long")
    process = trainer.start(workdir, cache=lab.new("cache"), JAX_LOG_COMPILES="1")
    seen = []
    while process.is_running():
        with contextlib.suppress(OSError):
            seen.append((num_rows(workdir), _memory(process), _open_files(process)))
        time.sleep(0.1)
    if process.wait():
        raise Broken(f"the long run: {process.errors[-2000:]}")
    warm = [x for x in seen if x[0] >= WARM_UP * SAVES]
    early, late = warm[: len(warm) // 4], warm[-len(warm) // 4 :]
    memory = [statistics.median(x[1] for x in part) for part in (early, late)]
    files = [statistics.median(x[2] for x in part) for part in (early, late)]
    growth = memory[1] / memory[0] - 1
    what = f"{num_steps:,} steps, {SAVES} saves"
    yield Row(f"{what}: memory", 1, int(growth < GROWTH), f"{growth:+.2%} after the warm-up")
    seen = f"{files[0]:.0f} at first, {files[1]:.0f} at last"
    yield Row(f"{what}: open files", 1, int(files[1] <= files[0]), seen)
    names = re.findall(r"Finished XLA compilation of jit\((\w+)\)", process.errors)
    times = {name: names.count(name) for name in ("init", "epoch", "evaluate", "baseline")}
    once = all(number == 1 for number in times.values())
    yield Row(f"{what}: compilations", 1, int(once), f"{times}")


def _memory(process: Process) -> int:
    """Resident kilobytes."""
    found = re.search(r"VmRSS:\s*(\d+)", Path(f"/proc/{process.pid}/status").read_text())
    if not found:
        raise ProcessLookupError(f"process {process.pid} has ended")
    return int(found[1])


def _open_files(process: Process) -> int:
    return len(os.listdir(f"/proc/{process.pid}/fd"))


def _cost(lab: Lab, rounds: int) -> Row:
    """Times a run with saves and the same run without, in turn, in one process."""
    from attention_jax.training import experiment
    from attention_jax.training.build import build
    from attention_jax.training.config import default_config

    config = default_config()
    config.update_from_flattened_dict(
        STEP | {"train.epochs": COST_EPOCHS, "checkpoint.every_epochs": 1}
    )
    program = build(config)

    def seconds(workdir: Path | None) -> float:
        with contextlib.redirect_stdout(io.StringIO()):
            result = experiment.run(config, workdir)
        return 1 / result.metrics["steps_per_second"]

    with mock.patch.object(experiment, "build", return_value=program):
        seconds(None)  # Compiles.
        pairs = [(seconds(lab.new("saving")), seconds(None)) for _ in range(rounds)]
    cost = statistics.median(saving / plain for saving, plain in pairs) - 1
    step = statistics.median(plain for _, plain in pairs)
    what = f"a save every {STEP['train.steps_per_epoch']} steps of {1000 * step:.0f} ms"
    return Row(what, rounds, rounds * (cost <= COST), f"costs {cost:.1%} of the time")
