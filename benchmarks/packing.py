"""What do documents cost that are packed into one row?

    python benchmarks/packing.py

16 documents of 256 tokens, 8 heads of 64, causal attention: as a batch of 16 rows; as one row of
4096, where `masks.segments` keeps them apart; and that row without segments, the cost of packing
without skipped tiles. They are timed in turn, in one process. Prints the median of each, and for
each pair the median ratio of a round with the range of its middle half.
"""

import argparse
import statistics
import time

import jax
import jax.numpy as jnp

from attention_jax import dot_product_attention, masks

DOCUMENTS, LENGTH, HEADS, SIZE = 16, 256, 8, 64


def passes(mask, rows, backward):
    """A compiled function of nothing: one pass over inputs of `rows` rows."""
    length = DOCUMENTS * LENGTH // rows
    keys = jax.random.split(jax.random.key(0), 3)
    arrays = [jax.random.normal(key, (rows, length, HEADS, SIZE)) for key in keys]

    def forward(*arrays):
        return dot_product_attention(*arrays, mask=mask)

    def both(*arrays):
        out, pull_back = jax.vjp(forward, *arrays)
        return pull_back(out)

    run = jax.jit(both if backward else forward)
    return lambda: jax.block_until_ready(run(*arrays))


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=21)
    rounds = parser.parse_args().rounds
    ids = jnp.repeat(jnp.arange(DOCUMENTS), LENGTH)
    peers = {
        "batch": (masks.causal(), DOCUMENTS),
        "packed": (masks.causal() & masks.segments(ids), 1),
        "row": (masks.causal(), 1),
    }
    print(f"jax {jax.__version__} on {jax.devices()[0].device_kind}, {rounds} rounds")
    for name, backward in (("forward", False), ("forward and backward", True)):
        runs = {peer: passes(*settings, backward) for peer, settings in peers.items()}
        times = {peer: [] for peer in peers}
        for i in range(rounds + 1):
            for peer, run in runs.items():
                run()  # To wake the threads.
                start = time.perf_counter()
                run()
                if i:  # The first round compiles.
                    times[peer].append(time.perf_counter() - start)
        shown = ", ".join(f"{peer} {1000 * statistics.median(x):.1f}" for peer, x in times.items())
        print(f"{name}: {shown} ms")
        for above, below in (("packed", "batch"), ("row", "packed")):
            ratios = [a / b for a, b in zip(times[above], times[below], strict=True)]
            low, middle, high = statistics.quantiles(ratios, n=4)
            print(f"  {above} / {below}: {middle:.2f} ({low:.2f} to {high:.2f})")


if __name__ == "__main__":
    main()
