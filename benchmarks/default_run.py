"""How long does the default run take, as a whole process, beside a minimal PyTorch loop?

    python benchmarks/default_run.py

Runs `train.py` and `torch_loop.py` in turn, each time in a new process: import, compilation and
exit count. The first run of `train.py` finds an empty compile cache (the cold figure), all others a
warm one. PyTorch gets the number of threads that a short trial finds faster. Prints seconds and
their ratio, where the time goes, and a floor: a process that does nothing but import jax and
multiply the large matrices of those steps, without attention, data or optimizer. Needs the extra:
`pip install .[torch]`.
"""

import argparse
import datetime
import importlib.metadata
import importlib.util
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
TRAIN = [str(HERE.parent / "train.py")]
PROFILE = [str(Path(__file__).resolve()), "--profile"]
FLOOR = [str(Path(__file__).resolve()), "--floor"]
TORCH = [str(HERE / "torch_loop.py")]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5, help="runs of each side (default: 5)")
    parser.add_argument("--profile", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--floor", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.rounds < 1:
        parser.error(f"--rounds must be at least 1: got {arguments.rounds}.")
    if arguments.profile:
        profile()
        return 0
    if arguments.floor:
        floor()
        return 0
    if importlib.util.find_spec("torch") is None:
        print('default_run.py: torch is missing: pip install ".[torch]"', file=sys.stderr)
        return 1
    with tempfile.TemporaryDirectory() as cache:
        settings = {"COMPILATION_CACHE_DIR": cache, "PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
        env = os.environ | {f"JAX_{name}": value for name, value in settings.items()}
        compare(arguments.rounds, env)
    return 0


def compare(rounds: int, env: dict[str, str]) -> None:
    """Runs both sides in turn and prints the report."""
    versions = {name: importlib.metadata.version(name) for name in ("jax", "flax", "torch")}
    print(f"{datetime.date.today()}, {os.cpu_count()} cores, {machine()}")
    print(f"Python {platform.python_version()}, ", end="")
    print(", ".join(f"{name} {version}" for name, version in versions.items()))

    threads = fastest_threads(env)
    torch_loop = [*TORCH, f"--threads={threads}"]
    cold, _ = timed(TRAIN, env)
    timed(FLOOR, env)
    ours, theirs, floors, reports = [], [], [], []
    for round in range(1, rounds + 1):
        ours.append(timed(TRAIN, env)[0])
        seconds, output = timed(torch_loop, env)
        theirs.append(seconds)
        reports.append(json.loads(output))
        floors.append(timed(FLOOR, env)[0])
        print(f"round {round}: train.py {ours[-1]:.2f} s, PyTorch {theirs[-1]:.2f} s", flush=True)

    print(f"\n{'whole process, seconds':28}{'median':>8}{'lowest':>8}{'highest':>8}")
    for name, seconds in {
        "train.py, warm cache": ours,
        f"PyTorch, threads={threads}": theirs,
        "jax and products alone": floors,
    }.items():
        middle = statistics.median(seconds)
        print(f"{name:28}{middle:8.2f}{min(seconds):8.2f}{max(seconds):8.2f}")
    print(f"{'train.py, empty cache':28}{cold:8.2f}")
    # Of each round, not of the medians: what else ran on the machine slowed both sides of a round.
    for name, seconds in {"train.py": ours, "the floor": floors}.items():
        ratios = [b / a for a, b in zip(seconds, theirs, strict=True)]
        print(f"{'PyTorch / ' + name:28}", end="")
        print(f"{statistics.median(ratios):8.2f}{min(ratios):8.2f}{max(ratios):8.2f}")

    whole, output = timed(PROFILE, env)
    phases = json.loads(output.splitlines()[-1])
    loop = {
        name: statistics.median(r[name] for r in reports)
        for name in reports[0]
        if name != "version"
    }
    print(f"\n{'where the time goes, seconds':28}{'train.py':>10}{'PyTorch':>10}")
    for name in ("import", "build", "compile", "steps"):
        theirs_now = f"{loop[name]:10.2f}" if name in loop else f"{'-':>10}"
        print(f"{name:28}{phases[name]:10.2f}{theirs_now}")
    accounted = sum(phases[name] for name in ("import", "build", "compile", "steps"))
    rest = statistics.median(theirs) - loop["import"] - loop["build"] - loop["steps"]
    print(f"{'start and exit of Python':28}{whole - accounted:10.2f}{rest:10.2f}")
    print(f"{'steps per second':28}{3200 / phases['steps']:10.0f}{3200 / loop['steps']:10.0f}")
    print(f"{'first loss':28}{phases['first_loss']:10.1e}{loop['first_loss']:10.1e}")
    print(f"{'last loss':28}{phases['train_loss']:10.1e}{loop['last_loss']:10.1e}")


def timed(command: list[str], env: dict[str, str]) -> tuple[float, str]:
    """Runs a Python script in a new process; returns its seconds and what it printed."""
    begun = time.perf_counter()
    done = subprocess.run(
        [sys.executable, *command], cwd=HERE.parent, env=env, stdout=subprocess.PIPE, text=True
    )
    seconds = time.perf_counter() - begun
    if done.returncode:
        raise SystemExit(f"default_run.py: {command[0]} ended with status {done.returncode}.")
    return seconds, done.stdout


def fastest_threads(env: dict[str, str]) -> int:
    """The number of threads with which the PyTorch loop is faster: one, or one per core."""
    seconds = {}
    for threads in sorted({1, os.cpu_count() or 1}):
        output = timed([*TORCH, f"--threads={threads}", "--epochs=5"], env)[1]
        seconds[threads] = json.loads(output)["steps"]
    return min(seconds, key=seconds.get)


def machine() -> str:
    """The processor's name, where the system tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = (line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())


def profile() -> None:
    """Does what `train.py` does, with a clock; prints seconds and losses as one line of JSON."""
    begun = time.perf_counter()
    sys.path.insert(0, str(HERE.parent))
    from attention_jax.training.command import parse

    command = parse(["train.py"])
    from attention_jax.training import experiment

    imported = time.perf_counter()
    import jax

    spans = []

    def listen(event: str, duration: float, **_) -> None:
        if event.startswith("/jax/core/compile/"):
            now = time.perf_counter()
            spans.append((now - duration, now))

    jax.monitoring.register_event_duration_secs_listener(listen)
    metrics = experiment.run(command.config).metrics
    done = time.perf_counter()
    # A program traced inside another is reported by both: the union of the spans counts it once.
    compile, end = 0.0, 0.0
    for first, last in sorted(spans):
        compile += max(0.0, last - max(first, end))
        end = max(end, last)
    steps = metrics["step"] / metrics["steps_per_second"]
    report = {
        "import": imported - begun,
        "build": done - imported - compile - steps,
        "compile": compile,
        "steps": steps,
        "first_loss": metrics["first_loss"],
        "train_loss": metrics["train_loss"],
    }
    print(json.dumps(report))


def floor() -> None:
    """Imports jax and does the 13 large products of each of the 3200 steps, in one program."""
    import jax
    import jax.numpy as jnp

    @jax.jit
    def run(x, student, teacher):
        def step(state, _):
            x, student = state
            query, key, value = (x @ weight for weight in teacher[:3])
            target = (query + key + value) @ teacher[3].T
            outs = [x @ weight for weight in student]
            d_mixed = outs[3] @ student[3].T
            grads = [x.T @ out for out in outs]
            # All of it is needed for what comes next, so that nothing is left out.
            student = [weight - 1e-9 * grad for weight, grad in zip(student, grads, strict=True)]
            return (x + 1e-9 * (target + d_mixed), student), None

        return jax.lax.scan(step, (x, student), length=3200)[0]

    x, weight = jnp.ones((320, 64)), jnp.full((64, 64), 1 / 64)
    jax.block_until_ready(run(x, [weight] * 4, [weight[:, :32]] * 4))


if __name__ == "__main__":
    sys.exit(main())
