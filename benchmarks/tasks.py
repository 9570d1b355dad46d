"""How fast the tasks make their batches: tokens per second, compiled, on this machine.

    python benchmarks/tasks.py
    python benchmarks/tasks.py recall seq_length=512 vocab_size=8192 num_pairs=64

Without arguments every task at its defaults, and some at the sizes of their papers. A row shows the
median of the rounds between the slowest and the fastest.
"""

import argparse
import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import jax
import numpy as np

from attention_jax.tasks import TASKS

# As in the papers, at their largest or nearly so.
LARGE = {
    "recall": [
        {"vocab_size": 8192},
        {"vocab_size": 8192, "seq_length": 512, "num_pairs": 64},
        {"vocab_size": 8192, "seq_length": 512, "num_pairs": 64, "random_non_queries": True},
        {"vocab_size": 8192, "seq_length": 1024, "num_pairs": 256},
    ],
    "compositional_recall": [{"vocab_size": 8192, "seq_length": 512, "num_pairs": 64}],
    "forgetting_recall": [
        {"vocab_size": 8192, "seq_length": 512, "num_pairs": 64, "num_updates": 32}
    ],
    "in_context_recall": [{"seq_length": 1024, "vocab_size": 128}],
    "noisy_recall": [{"seq_length": 1024, "vocab_size": 144}],
    "fuzzy_recall": [{"seq_length": 1024, "vocab_size": 128}],
    "induction": [{"seq_length": 1024}],
    "memorization": [{"vocab_size": 8192}],
    "sort": [{"seq_length": 512}],
    "selective_copy": [{"seq_length": 1024, "num_tokens": 96}],
    "compression": [{"seq_length": 511}],
    "listops": [{"seq_length": 512}, {"seq_length": 2000}],
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("task", nargs="?", choices=[*TASKS], help="one task alone")
    parser.add_argument("settings", nargs="*", metavar="setting=value", help="of the task")
    parser.add_argument("--batch_size", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=7)
    arguments = parser.parse_args()
    for name in ("batch_size", "rounds"):
        if getattr(arguments, name) < 1:
            parser.error(f"--{name} must be at least 1: got {getattr(arguments, name)}.")
    try:
        settings = dict(read(text) for text in arguments.settings)
        if arguments.task:
            runs = [(arguments.task, settings)]
        else:
            runs = [(name, case) for name in TASKS for case in [{}, *LARGE.get(name, [])]]
        print(f"{'million tokens per second':>60}{'median':>9}{'lowest':>9}{'highest':>9}")
        for name, case in runs:
            speeds = measure(name, case, arguments.batch_size, arguments.rounds)
            words = " ".join([name, *(f"{key}={value}" for key, value in case.items())])
            numbers = (statistics.median(speeds), min(speeds), max(speeds))
            print(f"{words:60}" + "".join(f"{speed:9.1f}" for speed in numbers), flush=True)
    except (TypeError, ValueError) as error:
        print(f"tasks.py: {error}", file=sys.stderr)
        return 2
    return 0


def read(text: str) -> tuple[str, object]:
    """`name=value` as a setting."""
    name, equals, value = text.partition("=")
    if not equals:
        raise ValueError(f"a setting is name=value: got {text!r}.")
    for kind in (int, float):
        try:
            return name, kind(value)
        except ValueError:
            continue
    return name, {"True": True, "False": False}.get(value, value)


def measure(name: str, settings: dict, batch_size: int, rounds: int) -> list[float]:
    """Million tokens per second, one number a round; batches are made in one program, as in runs.

    Raises:
        TypeError, ValueError: The task refuses its settings.
    """
    task = TASKS[name](**settings)
    rows = np.arange(batch_size, dtype=np.int32)

    @jax.jit
    def make(rng, num_batches):
        def body(i, total):
            batch = task.sample(jax.random.fold_in(rng, i), rows)
            return total + sum(x.sum().astype(np.float32) for x in jax.tree.leaves(batch))

        return jax.lax.fori_loop(0, num_batches, body, np.float32(0))

    def seconds(num_batches):
        begun = time.perf_counter()
        make(jax.random.key(0), num_batches).block_until_ready()
        return time.perf_counter() - begun

    tokens = np.prod(jax.eval_shape(task.sample, jax.random.key(0), rows).inputs.shape[:2])
    seconds(1)
    # A tenth of a second a round.
    num_batches = max(1, int(0.1 / (seconds(10) / 10)))
    return [num_batches * tokens / seconds(num_batches) / 1e6 for _ in range(rounds)]


if __name__ == "__main__":
    sys.exit(main())
