"""How fast are other divisions of causal attention, and how much of its time are the products?

    python benchmarks/causal_forms.py

Runs in turn, in one process, `dot_product_attention`, jax.nn's, and bare forward forms of causal
attention that divide the visible half of the logits into different rectangles. Each form divides
keys and queries per head, multiplies, and masks the rectangles at the diagonal (all of them if they
are rows). Then it takes the peak of each row over its rectangles, exponentials, sums, and products
with the values. Prints milliseconds, the time of jax.nn over each, GFLOP/s over the visible half,
and the hidden share of the computed logits; and the same for rounds in which the cores were near,
see attention.py. ", products" is a form without mask and softmax: only divisions, products and sums
of products.
"""

import argparse
import functools
import re
import statistics
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

sys.path.insert(0, str(Path(__file__).parent))
from attention import handover, header, keep_memory, milliseconds

from attention_jax import dot_product_attention, masks

BARE = ("rows of 256", "squares of 256", "halves down to 256", "halves down to 128")
NEAR = 130  # ns.


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", default="2,2048,8,128", help="B,T,N,H (default: %(default)s)")
    parser.add_argument("--seconds", type=float, default=20, help="at least (default: 20)")
    arguments = parser.parse_args()
    if not re.fullmatch(r"[1-9]\d*(,[1-9]\d*){3}", arguments.size):
        parser.error(f"--size must be four numbers B,T,N,H, got {arguments.size!r}.")
    B, T, N, H = map(int, arguments.size.split(","))
    if T < 512 or T & (T - 1) or N % 2:
        parser.error(f"--size: T must be a power of 2 from 512 on, N even, got {arguments.size}.")
    keep_memory(of_large_blocks=False)
    print(header(["ours"]))

    rng = np.random.default_rng(0)
    inputs = [jnp.asarray(rng.standard_normal((B, T, N, H)), jnp.float32) for _ in range(3)]
    forms = {
        "rows of 256": (rows(T, 256), 1),
        "rows of 512": (rows(T, 512), 1),
        "rows of 256, two heads": (rows(T, 256), 2),
        "squares of 256": (squares(T, 256), 1),
        "squares of 512": (squares(T, 512), 1),
        "halves down to 256": (halves(0, T, 256), 1),
        "halves down to 128": (halves(0, T, 128), 1),
    }
    calls = {
        "jax.nn": functools.partial(jax.nn.dot_product_attention, is_causal=True),
        "ours": lambda *x: dot_product_attention(
            *x, mask=masks.causal(), implementation="blockwise"
        ),
        **{name: form(*cut) for name, cut in forms.items()},
        **{f"{name}, products": form(*forms[name], softmax=False) for name in BARE},
    }
    programs = {name: jax.jit(f).lower(*inputs).compile() for name, f in calls.items()}
    want = programs["jax.nn"](*inputs)
    for name, program in programs.items():
        if not name.endswith("products"):
            np.testing.assert_allclose(program(*inputs), want, atol=2e-4, err_msg=name)

    times, distances = {name: [] for name in programs}, []
    begun = time.perf_counter()
    while time.perf_counter() - begun < arguments.seconds:
        before = handover() or 0
        for name, program in programs.items():
            times[name].append(milliseconds(lambda f=program: jax.block_until_ready(f(*inputs))))
        distances.append(max(before, handover() or 0))

    print(f"B={B} T={T} N={N} H={H}")
    visible = 4 * B * N * H * T * T / 2 / 1e9  # GFLOP
    report(times, forms, visible, f"{len(distances)} rounds")
    near = [i for i, distance in enumerate(distances) if distance <= NEAR]
    if 0 < len(near) < len(distances):
        times = {name: [values[i] for i in near] for name, values in times.items()}
        label = f"of these, {len(near)} rounds with a handover of up to {NEAR} ns"
        report(times, forms, visible, label)
    return 0


def report(times, forms, gflop: float, label: str) -> None:
    medians = {name: statistics.median(values) for name, values in times.items()}
    print(label)
    for name, median in medians.items():
        hidden = ""
        if cut := forms.get(name.removesuffix(", products")):
            last, _, height, _ = cut[0][-1]
            T = last + height
            computed = sum(height * width for _, _, height, width in cut[0])
            hidden = f", {100 * (1 - T * T / 2 / computed):2.0f} % hidden"
        print(
            f"{name:29}{median:8.1f} ms, {medians['jax.nn'] / median:5.2f}x,"
            f"{1e3 * gflop / median:5.0f} GFLOP/s{hidden}"
        )


def rows(T: int, t: int):
    """Rectangles (first query, first key, queries, keys): t queries by all their visible keys."""
    return [(i, 0, t, i + t) for i in range(0, T, t)]


def squares(T: int, t: int):
    return [(i, j, t, t) for i in range(0, T, t) for j in range(0, i + t, t)]


def halves(first: int, size: int, least: int):
    """A triangle as a square and two smaller triangles, divided in the same way."""
    if size == least:
        return [(first, first, size, size)]
    half = size // 2
    square = (first + half, first, half, half)
    return [*halves(first, half, least), square, *halves(first + half, half, least)]


def form(rectangles, heads: int, softmax: bool = True):
    """Causal attention over these rectangles, so many heads in one product."""
    least = min(height for _, _, height, _ in rectangles)

    def of_row(row, parts, join):
        """The output of one block of `least` queries, from all its rectangles."""
        found = [
            lax.slice_in_dim(part, row - first, row - first + least, axis=heads > 1)
            for part, (first, _, height, _) in zip(parts, rectangles, strict=True)
            if first <= row < first + height
        ]
        return functools.reduce(join, found)

    def attend(query, key, value):
        B, T, N, H = query.shape

        def turn(g, out):
            b, n = g * heads // N, g * heads % N

            def cut(x, first, size):
                part = lax.dynamic_slice(x, (b, first, n, 0), (1, size, heads, H))[0]
                return part[:, 0] if heads == 1 else jnp.swapaxes(part, 0, 1)

            logits = []
            for i, j, height, width in rectangles:
                raw = cut(query, i, height) * H**-0.5 @ jnp.swapaxes(cut(key, j, width), -1, -2)
                if softmax and j + width > i:
                    seen = i + jnp.arange(height)[:, None] >= j + jnp.arange(width)
                    raw = jnp.where(seen, raw, -jnp.inf)
                logits.append(raw)
            if softmax:
                peaks = [x.max(-1) for x in logits]
                peaks = [of_row(row, peaks, jnp.maximum) for row in range(0, T, least)]
                peaks = jnp.concatenate(peaks, -1)
                weights = [
                    jnp.exp(x - lax.slice_in_dim(peaks, i, i + height, axis=-1)[..., None])
                    for x, (i, _, height, _) in zip(logits, rectangles, strict=True)
                ]
                totals = [x.sum(-1) for x in weights]
            else:
                weights = logits
            mixed = [
                x @ cut(value, j, width)
                for x, (_, j, _, width) in zip(weights, rectangles, strict=True)
            ]
            for row in range(0, T, least):
                part = of_row(row, mixed, jnp.add)
                if softmax:
                    part /= of_row(row, totals, jnp.add)[..., None]
                part = part[:, None] if heads == 1 else jnp.swapaxes(part, 0, 1)
                out = lax.dynamic_update_slice(out, part[None], (b, row, n, 0))
            return out

        return lax.fori_loop(0, B * N // heads, turn, jnp.zeros_like(query))

    return attend


if __name__ == "__main__":
    sys.exit(main())
