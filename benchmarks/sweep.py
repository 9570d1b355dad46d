"""How much faster is a sweep than its runs one after another, and is each trial the same run?

    python benchmarks/sweep.py

Four learning rates times four seeds: as one process of `train.py --sweep`, and as 16 processes of
`train.py`, each with its import and a warm compile cache. Prints both times, their ratio, and the
largest relative difference between the final losses of a trial and of its run. Further arguments go
to every process, `--epochs=20` say.
"""

import datetime
import importlib.metadata
import itertools
import json
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
RATES = ("1e-4", "4.6e-4", "2.15e-3", "1e-2")
SEEDS = ("0", "1", "2", "3")
# The default run, stopped before the largest learning rate leaves its plateau. There training is
# chaotic: rounding alone then parts two runs, whatever made it.
DEFAULT = ("--epochs=5",)


def main(arguments: list[str]) -> int:
    arguments = arguments or list(DEFAULT)
    versions = {name: importlib.metadata.version(name) for name in ("jax", "flax", "optax")}
    print(f"{datetime.date.today()}, {os.cpu_count()} cores, Python {platform.python_version()},")
    print(", ".join(f"{name} {version}" for name, version in versions.items()))
    print(f"train.py {' '.join(arguments)}")
    with tempfile.TemporaryDirectory() as place:
        env = {**os.environ, "JAX_COMPILATION_CACHE_DIR": f"{place}/cache"}
        axes = [f"--sweep=learning_rate={','.join(RATES)}", f"--sweep=seed={','.join(SEEDS)}"]
        cold = timed([*arguments, *axes, f"--workdir={place}/cold"], env)
        warm = timed([*arguments, *axes, f"--workdir={place}/sweep"], env)
        # Rate and seed are constants in the program of a run: one run of each fills the cache.
        pairs = list(itertools.product(RATES, SEEDS))
        for rate, seed in pairs:
            timed([*arguments, f"--learning_rate={rate}", f"--seed={seed}"], env)
        seconds = []
        for number, (rate, seed) in enumerate(pairs):
            flags = [f"--learning_rate={rate}", f"--seed={seed}", f"--workdir={place}/{number}"]
            seconds.append(timed([*arguments, *flags], env))
        alone = [json.loads(Path(place, str(n), "result.json").read_text()) for n in range(16)]
        trials = json.loads(Path(place, "sweep", "result.json").read_text())["trials"]
    runs = sum(seconds)
    print(f"{'':30}{'seconds':>9}{'of processors':>15}")
    for name, (wall, used) in {
        "one sweep, empty compile cache": cold,
        "one sweep": warm,
        "16 runs": runs,
    }.items():
        print(f"{name:30}{wall:9.1f}{used:15.1f}")
    print(f"{'16 runs / one sweep':30}{runs[0] / warm[0]:9.2f}{runs[1] / warm[1]:15.2f}")
    for name in ("train_loss", "eval_loss"):
        differences = [abs(a[name] - b[name]) / b[name] for a, b in zip(trials, alone, strict=True)]
        print(f"{name + ', relative difference':30}{max(differences):9.1e} at most")
    return 0


def timed(arguments: list[str], env: dict[str, str]) -> np.ndarray:
    """Runs train.py in a new process; returns its seconds and those of its processors."""
    begun = now()
    subprocess.run(
        [sys.executable, str(ROOT / "train.py"), *arguments],
        env=env,
        stdout=subprocess.DEVNULL,
        check=True,
    )
    return now() - begun


def now() -> np.ndarray:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return np.array([time.perf_counter(), used.ru_utime + used.ru_stime])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
