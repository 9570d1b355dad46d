"""How fast is `dot_product_attention` beside what else there is on this machine?

    python benchmarks/attention.py --out docs/performance

Every cell of the grid (sizes, pattern, forward or forward and backward) first compares what the
peers compute, then times them in turn in one process: medians of interleaved rounds, and how far
the middle half of the rounds spreads. In each round a peer runs for 30 ms, at least twice, and then
the run that counts: its threads are awake, as they are in the middle of a model. A pair of plain
matrix products, of the shapes that attention is made of, runs among them, to compare the rates.
The C library keeps what is freed of blocks below 32 MiB, for all peers alike: otherwise it depends
on what the others left in the heap which of them pays for new pages at every call, and a short call
may take twice its time. Larger blocks are new at every call, as in any process; `--keep-memory`
keeps those too, which tells how much of a peer's time they take.
Prints a line for each cell and writes `attention.json`, `attention.md` and `attention.png`; cells
that the first holds already, from this day and machine, are not run again (remove it when the code
has changed), and `--report` writes the latter two from it. On a GPU the peers are jax.nn's two
implementations and PyTorch's fused kernels, each where it serves the type and the mask.

`--long 65536` instead runs one head of so many positions once, causal, forward and backward, and
prints the memory of the whole process.

Needs the extra: `pip install .[torch]`; without PyTorch, `--peers` names the others.
"""

import argparse
import ctypes
import datetime
import functools
import importlib.metadata
import importlib.util
import itertools
import json
import os
import platform
import re
import statistics
import sys
import time
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax import lax

from attention_jax import dot_product_attention, masks

SIZES = [(16, 128, 8), (8, 512, 8), (4, 1024, 8), (2, 2048, 8), (1, 4096, 8), (1, 16384, 2)]
PATTERNS = {"full": None, "causal": masks.causal(), "window 256": masks.window(255)}
CPU_PEERS = ("ours", "torch flash", "torch math", "jax.nn", "linen", "einsum")
GPU_PEERS = (
    "ours",
    "torch flash",
    "torch cudnn",
    "torch efficient",
    "jax.nn cudnn",
    "jax.nn",
    "blockwise",
)
HALF_ONLY = ("torch flash", "torch cudnn", "jax.nn cudnn")  # On a GPU.
MASKLESS = ("torch flash", "torch cudnn")  # On a GPU: they take no mask for a window.
MOST_LOGITS = 2**28  # A peer that stores more of them would measure the machine's memory.
WARM_UP = 0.03  # Seconds that a peer runs for before the run that counts.
TOLERANCE = {"float32": 2e-4, "bfloat16": 6e-2}  # Of the largest entry, between two peers.


class Cell(NamedTuple):
    dtype: str
    H: int
    B: int
    T: int
    N: int
    pattern: str
    backward: bool

    def __str__(self):
        passes = "forward+backward" if self.backward else "forward"
        return f"{self.dtype} H={self.H} B={self.B} T={self.T} N={self.N} {self.pattern} {passes}"

    @property
    def pairs(self) -> int:
        """Logits that the pattern needs."""
        T = self.T
        seen = {"full": T * T, "causal": T * (T + 1) // 2}
        window = sum(min(t + 1, 256) for t in range(T))
        return self.B * self.N * seen.get(self.pattern, window)

    @property
    def flops(self) -> int:
        """Of the products: two forward, and five more backward."""
        return 2 * self.pairs * self.H * (7 if self.backward else 2)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cells", default="", help="only cells whose name matches this regex")
    parser.add_argument("--sizes", help='instead of the grid\'s, "B,T,N B,T,N"; without --out')
    parser.add_argument("--seconds", type=float, default=4.0, help="for each cell (default: 4)")
    parser.add_argument("--rounds", type=int, default=30, help="at most, at least 3 (default: 30)")
    parser.add_argument("--peers", help="beside ours, comma-separated; the default is all")
    parser.add_argument("--out", type=Path, help="folder for attention.{json,md,png}")
    parser.add_argument("--report", action="store_true", help="draw anew what --out holds")
    parser.add_argument("--keep-memory", action="store_true", help="of large blocks too")
    parser.add_argument("--long", type=int, metavar="T", help="run T positions once, and stop")
    arguments = parser.parse_args()
    if arguments.long:
        run_long(arguments.long)
        return 0
    if arguments.report:
        if arguments.out is None:
            parser.error("--report needs --out.")
        report(arguments.out)
        return 0
    sizes = SIZES
    if arguments.sizes:
        sizes = [tuple(map(int, size.split(","))) for size in arguments.sizes.split()]
        if arguments.out or any(len(size) != 3 for size in sizes):
            parser.error(f"--sizes takes triples B,T,N and no --out: got {arguments.sizes!r}.")
    if arguments.keep_memory and arguments.out:
        parser.error("--keep-memory goes without --out: its results do not belong there.")
    keep_memory(of_large_blocks=arguments.keep_memory)
    gpu = jax.default_backend() == "gpu"
    names = GPU_PEERS if gpu else CPU_PEERS
    if arguments.peers:
        unknown = set(arguments.peers.split(",")) - {*names}
        if unknown:
            parser.error(f"--peers must be among {', '.join(names)}: got {', '.join(unknown)}.")
        names = [name for name in names if name == "ours" or name in arguments.peers.split(",")]
    if any(name.startswith("torch") for name in names) and not _has("torch"):
        print('attention.py: torch is missing: pip install ".[torch]", or --peers', file=sys.stderr)
        return 1
    head = header(names)
    print(head, flush=True)
    rows = measured(arguments.out, head)
    for cell in grid(gpu, sizes):
        if re.search(arguments.cells, str(cell)) and cell not in map(cell_of, rows):
            rows.append(measure(cell, names, arguments.seconds, max(3, arguments.rounds)))
            print(line(rows[-1]), flush=True)
            if arguments.out:
                arguments.out.mkdir(parents=True, exist_ok=True)
                text = json.dumps({"header": head, "rows": rows}, indent=1)
                (arguments.out / "attention.json").write_text(text + "\n")
    if arguments.out:
        report(arguments.out)
    else:
        print(*summary(rows), sep="\n")
    return 0


def keep_memory(of_large_blocks: bool) -> None:
    """Has glibc give no memory back to the system; other C libraries have no such setting."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return
    trim_threshold, mmap_threshold, most_maps, most_arenas = -1, -3, -4, -8
    mallopt(trim_threshold, 2**31 - 1)
    mallopt(mmap_threshold, 2**25)  # What it comes to by itself.
    mallopt(most_arenas, 1)  # Others give back what is empty.
    if of_large_blocks:
        mallopt(most_maps, 0)


def measured(out: Path | None, head: str) -> list[dict]:
    """What an earlier run on this day, machine and versions has left in `out`, to go on from."""
    path = out and out / "attention.json"
    if not path or not path.exists():
        return []
    results = json.loads(path.read_text())
    if results["header"] != head:
        raise SystemExit(f"{path} has results of another run, {results['header']}: remove it.")
    return results["rows"]


def cell_of(row: dict) -> Cell:
    return Cell(**{name: row[name] for name in Cell._fields})


def grid(gpu: bool, sizes=SIZES):
    for dtype, H, (B, T, N), pattern, backward in itertools.product(
        ("bfloat16", "float32") if gpu else ("float32", "bfloat16"),
        (64, 128),
        sizes,
        PATTERNS,
        (False, True),
    ):
        if dtype == "float32" or T >= 1024:
            yield Cell(dtype, H, B, T, N, pattern, backward)


# Measuring ---------------------------------------------------------------------------------------


def measure(cell: Cell, names, seconds: float, rounds: int) -> dict:
    """Milliseconds and more of each peer on one cell."""
    rng = np.random.default_rng(0)
    shape = (cell.B, cell.T, cell.N, cell.H)
    arrays = [rng.standard_normal(shape).astype(np.float32) for _ in range(4)]
    peers, compile_seconds, temp_mib = {}, {}, {}
    for name in names:
        stores = name in ("jax.nn", "linen", "einsum", "torch math")
        if stores and cell.B * cell.N * cell.T**2 > MOST_LOGITS:
            continue
        if jax.default_backend() == "gpu" and (
            (name in HALF_ONLY and cell.dtype == "float32")
            or (name in MASKLESS and cell.pattern.startswith("window"))
        ):
            continue
        if name.startswith("torch"):
            peers[name] = torch_peer(name, cell, arrays)
        else:
            peers[name], compile_seconds[name], temp_mib[name] = jax_peer(name, cell, arrays)
    results = {name: peer() for name, peer in peers.items()}
    reference = next(iter(results))
    for name, result in results.items():
        for a, b in zip(result, results[reference], strict=True):
            error = np.abs(a - b).max() / max(1, np.abs(b).max())
            if not error < TOLERANCE[cell.dtype]:
                raise SystemExit(f"{cell}: {name} and {reference} differ by {error:.1e}.")
    del results
    peers["products"], flops = products(cell)

    times = {name: [] for name in peers}
    begun = time.perf_counter()
    for turn in range(rounds):
        for name, peer in peers.items():
            time.sleep(0.02)  # The threads of the peer before fall asleep,
            awake = time.perf_counter() + WARM_UP
            peer(fetch=False)
            peer(fetch=False)
            while time.perf_counter() < awake:  # and those of this one wake up.
                peer(fetch=False)
            start = time.perf_counter()
            peer(fetch=False)
            times[name].append(1e3 * (time.perf_counter() - start))
        if turn >= 2 and time.perf_counter() - begun > seconds:
            break
    medians = {name: statistics.median(values) for name, values in times.items()}
    rate = flops / medians.pop("products") / 1e6
    spread = {
        name: (np.percentile(times[name], 75) - np.percentile(times[name], 25)) / medians[name]
        for name in medians
    }
    return {
        **cell._asdict(),
        "rounds": turn + 1,
        "ms": {name: round(value, 3) for name, value in medians.items()},
        "spread": {name: round(float(value), 3) for name, value in spread.items()},
        "gflops": round(cell.flops / medians["ours"] / 1e6, 1),
        "products_gflops": round(rate, 1),
        "compile_s": {name: round(value, 2) for name, value in compile_seconds.items()},
        "temp_mib": {name: round(value, 1) for name, value in temp_mib.items()},
    }


def jax_peer(name: str, cell: Cell, arrays):
    """A call of one implementation in jax, the seconds to compile it, and MiB of temporaries."""
    mask, dtype = PATTERNS[cell.pattern], jnp.dtype(cell.dtype)
    scale = cell.H**-0.5

    def attend(query, key, value):
        if name in ("ours", "blockwise"):
            implementation = None if name == "ours" else name
            return dot_product_attention(
                query, key, value, mask=mask, implementation=implementation
            )
        if name.startswith("jax.nn"):
            return jax.nn.dot_product_attention(
                query,
                key,
                value,
                is_causal=mask is not None,
                local_window_size=(255, 0) if cell.pattern.startswith("window") else None,
                implementation="cudnn" if "cudnn" in name else None,
            )
        seen = None if mask is None else mask.materialize(cell.T, cell.T)
        if name == "linen":
            return nn.dot_product_attention(query, key, value, mask=seen)
        logits = jnp.einsum("btnh,bsnh->bnts", query, key) * scale
        if seen is not None:
            logits = jnp.where(seen, logits, jnp.finfo(logits.dtype).min)
        return jnp.einsum("bnts,bsnh->btnh", jax.nn.softmax(logits), value)

    def run(query, key, value, d_out):
        if not cell.backward:
            return (attend(query, key, value),)
        out, pull_back = jax.vjp(attend, query, key, value)
        return out, *pull_back(d_out)

    arrays = [jnp.asarray(x, dtype) for x in arrays]
    start = time.perf_counter()
    compiled = jax.jit(run).lower(*arrays).compile()
    compile_seconds = time.perf_counter() - start
    temp_mib = compiled.memory_analysis().temp_size_in_bytes / 2**20

    def call(fetch=True):
        results = jax.block_until_ready(compiled(*arrays))
        return [np.asarray(x, np.float32) for x in results] if fetch else None

    return call, compile_seconds, temp_mib


def torch_peer(name: str, cell: Cell, arrays):
    """A call of one of PyTorch's kernels, on tensors as they like them: [B, N, T, H]."""
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel

    device = "cuda" if jax.default_backend() == "gpu" else "cpu"
    torch.set_num_threads(os.cpu_count())
    dtype = getattr(torch, cell.dtype)
    tensors = [torch.from_numpy(x).transpose(1, 2).contiguous().to(device, dtype) for x in arrays]
    for x in tensors[:3]:
        x.requires_grad_(cell.backward)
    backend = {
        "torch flash": SDPBackend.FLASH_ATTENTION,
        "torch cudnn": SDPBackend.CUDNN_ATTENTION,
        "torch efficient": SDPBackend.EFFICIENT_ATTENTION,
        "torch math": SDPBackend.MATH,
    }[name]
    options = {"is_causal": cell.pattern == "causal"}
    if cell.pattern.startswith("window"):
        mask = np.array(PATTERNS[cell.pattern].materialize(cell.T, cell.T))
        options = {"attn_mask": torch.from_numpy(mask).to(device)}

    def call(fetch=True):
        for x in tensors[:3]:
            x.grad = None
        with sdpa_kernel(backend), torch.set_grad_enabled(cell.backward):
            out = torch.nn.functional.scaled_dot_product_attention(*tensors[:3], **options)
        results = [out]
        if cell.backward:
            out.backward(tensors[3])
            results += [x.grad for x in tensors[:3]]
        if device == "cuda":
            torch.cuda.synchronize()
        if not fetch:
            return None
        return [x.detach().transpose(1, 2).float().cpu().numpy() for x in results]

    return call


def products(cell: Cell):
    """[512, H] [H, 512] and [512, 512] [512, H], again and again; and their FLOPs."""
    a, b = (jnp.ones(shape, cell.dtype) for shape in ((512, cell.H), (cell.H, 512)))
    times = 64

    @jax.jit
    def run(a, b):
        def both(_, x):
            mixed = lax.dot(lax.dot(x, b), lax.optimization_barrier(a))
            return mixed / (512 * cell.H)  # Ones again.

        return lax.fori_loop(0, times, both, a)

    def call(fetch=True):
        jax.block_until_ready(run(a, b))

    call()
    return call, 2 * times * 2 * 512 * 512 * cell.H


def run_long(T: int) -> None:
    """One head of T positions, causal, forward and backward: seconds and memory."""
    import resource

    x = jax.random.normal(jax.random.key(0), (1, T, 1, 64))

    @jax.jit
    def run(x):
        attend = functools.partial(dot_product_attention, mask=masks.causal())
        out, pull_back = jax.vjp(attend, x, x, x)
        return pull_back(out)

    compiled = run.lower(x).compile()
    start = time.perf_counter()
    jax.block_until_ready(compiled(x))
    seconds = time.perf_counter() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    temporaries = compiled.memory_analysis().temp_size_in_bytes / 2**20
    print(header([]))
    print(
        f"T={T}, causal, one head of 64, forward and backward: {seconds:.1f} s; "
        f"{temporaries:.0f} MiB of temporaries, {peak:.2f} GiB at most in the whole process "
        f"(logits alone would be {4 * T * T / 2**30:.0f} GiB)"
    )


# Reporting ---------------------------------------------------------------------------------------


def header(names) -> str:
    device = jax.devices()[0].device_kind
    if jax.default_backend() == "cpu":
        device = f"{os.cpu_count()} cores of {_processor()}"
    modules = ["jax", "flax", *(["torch"] if any("torch" in name for name in names) else [])]
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in modules)
    python = platform.python_version()
    return f"{datetime.date.today()}, {device}; Python {python}, {versions}"


def line(row: dict) -> str:
    ms = row["ms"]
    others = [f"{name} {value / ms['ours']:.2f}x" for name, value in ms.items() if name != "ours"]
    cell = str(cell_of(row))
    return (
        f"{cell:58} {ms['ours']:9.2f} ms ±{row['spread']['ours']:.0%} "
        f"{row['gflops'] / row['products_gflops']:4.0%} of products | " + ", ".join(others)
    )


def report(out: Path) -> None:
    """Writes the table and the plot."""
    results = json.loads((out / "attention.json").read_text())
    order = list(grid(gpu=False))  # Cells may have been run in another.
    rows = sorted(results["rows"], key=lambda row: order.index(cell_of(row)))
    names = list(dict.fromkeys(name for row in rows for name in row["ms"] if name != "ours"))
    lines = [f"Measured {results['header']}.", "", *summary(rows), ""]
    columns = ["cell", "ours, ms", "spread", "of products", *names, "compile, s", "memory, MiB"]
    lines += ["| " + " | ".join(columns) + " |", "|---" * len(columns) + "|"]
    for row in rows:
        ms = row["ms"]
        cell = cell_of(row)
        ratios = [f"{ms[name] / ms['ours']:.2f}" if name in ms else "" for name in names]
        share = f"{row['gflops'] / row['products_gflops']:.0%}"
        fields = [str(cell), f"{ms['ours']:.2f}", f"{row['spread']['ours']:.0%}", share, *ratios]
        fields += [f"{row['compile_s']['ours']:.1f}", f"{row['temp_mib']['ours']:.0f}"]
        lines.append("| " + " | ".join(fields) + " |")
    (out / "attention.md").write_text("\n".join(lines) + "\n")
    print(*lines[: -len(rows) - 2], sep="\n")
    plot(rows, out / "attention.png")


def summary(rows) -> list[str]:
    """What the table says, in a few lines."""
    lines = []
    for dtype, H in dict.fromkeys((row["dtype"], row["H"]) for row in rows):
        mine = [row for row in rows if (row["dtype"], row["H"]) == (dtype, H)]
        for name in dict.fromkeys(name for row in mine for name in row["ms"] if name != "ours"):
            parts = []
            for pattern in (*PATTERNS, "all"):
                ratios = [
                    row["ms"][name] / row["ms"]["ours"]
                    for row in mine
                    if pattern in (row["pattern"], "all") and name in row["ms"]
                ]
                if ratios:
                    mean = statistics.geometric_mean(ratios)
                    parts.append(f"{pattern} {mean:.2f}x ({min(ratios):.2f} to {max(ratios):.2f})")
            lines.append(f"- {dtype}, H = {H}, time of {name} over ours: {'; '.join(parts)}")
    return lines


def plot(rows, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    rows = [row for row in rows if row["H"] == 64 and row["dtype"] == rows[0]["dtype"]]
    names = list(dict.fromkeys(name for row in rows for name in row["ms"]))
    figure, axes = plt.subplots(2, 3, figsize=(11, 6), sharex=True, layout="constrained")
    for axis, (backward, pattern) in zip(
        axes.flat, itertools.product((False, True), PATTERNS), strict=True
    ):
        mine = [row for row in rows if (row["backward"], row["pattern"]) == (backward, pattern)]
        for i, name in enumerate(names):
            points = [
                (row["T"], row["ms"]["ours"] / row["ms"][name]) for row in mine if name in row["ms"]
            ]
            if points:
                style = {"color": "black", "linewidth": 2} if name == "ours" else {"color": f"C{i}"}
                axis.plot(*zip(*points, strict=True), marker="o", label=name, **style)
        axis.set_xscale("log", base=2)
        axis.set_yscale("log")
        axis.set_title(f"{pattern}, {'forward and backward' if backward else 'forward'}")
        axis.grid(alpha=0.3)
    for axis in axes[:, 0]:
        axis.set_ylabel("speed, ours = 1")
    for axis in axes[1]:
        axis.set_xlabel("sequence length T")
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=6)
    figure.savefig(path, dpi=80)


def _processor() -> str:
    if os.path.exists("/proc/cpuinfo"):
        for text in Path("/proc/cpuinfo").read_text().splitlines():
            if text.startswith("model name"):
                return text.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


@functools.cache
def _has(module: str) -> bool:
    return importlib.util.find_spec(module) is not None


if __name__ == "__main__":
    sys.exit(main())
