"""How fast is `dot_product_attention` beside other libraries on this machine?

    python benchmarks/attention.py --out docs/performance

Every cell of the grid (sizes, pattern, forward or forward and backward) first compares the results
of the peers. Then it times them in turn in one process, and takes medians of interleaved rounds and
the spread of the middle half. In each round a peer runs for 30 ms, at least twice, to wake its
threads, as in the middle of a model; then comes the run that counts. A pair of plain matrix
products of the shapes in attention runs too, to compare the rates; on a CPU beside PyTorch also
PyTorch's products, to tell whose are faster. The C library keeps freed blocks below 32 MiB, for all
peers alike. Otherwise the state of the heap decides which peer pays for new pages at every call,
and a short call may take twice its time. Larger blocks are new at every call, as in any process;
`--keep-memory` keeps those too, to show how much time they take. Each round begins and ends with a
check of the machine: the time of a byte between the first and the last core, in two processes that
only send it, with the interpreter (Linux). On a shared host this time may jump for a while, and
short calls then take longer. `--visits 3` goes through the grid three times, compiles anew, and
takes medians over all rounds, so that no cell depends on one minute. `--report --near 130` uses
only rounds in which that time stayed within 130 ns. Prints a line for each cell and visit, over its
rounds so far, and writes `attention.json`, `attention.md` and `attention.png`. Visits that
`attention.json` holds already, from this day and machine, are not run again (remove it when the
code has changed); `--report` writes the other files from it. On a GPU the peers are jax.nn's two
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
import math
import mmap
import os
import platform
import re
import statistics
import subprocess
import sys
import tempfile
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
PRODUCTS = 64  # Pairs of them in a call.
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
    parser.add_argument("--visits", type=int, default=1, help="of each cell (default: 1)")
    parser.add_argument("--seconds", type=float, default=4.0, help="for each visit (default: 4)")
    parser.add_argument("--rounds", type=int, default=30, help="a visit, at most (default: 30)")
    parser.add_argument("--peers", help="beside ours, comma-separated; the default is all")
    parser.add_argument("--out", type=Path, help="folder for attention.{json,md,png}")
    parser.add_argument("--report", action="store_true", help="draw anew what --out holds")
    parser.add_argument("--near", type=int, metavar="NS", help="see above; with --report")
    parser.add_argument("--keep-memory", action="store_true", help="of large blocks too")
    parser.add_argument("--long", type=int, metavar="T", help="run T positions once, and stop")
    arguments = parser.parse_args()
    if arguments.long:
        run_long(arguments.long)
        return 0
    if arguments.report:
        if arguments.out is None:
            parser.error("--report needs --out.")
        report(arguments.out, arguments.near)
        return 0
    if arguments.near is not None:
        parser.error("--near goes with --report.")
    if arguments.visits < 1 or arguments.rounds < 1:
        parser.error("--visits and --rounds must be positive.")
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
    least = -(-3 // arguments.visits)
    for visit in range(arguments.visits):
        for cell in grid(gpu, sizes):
            row = rows.get(cell)
            if not re.search(arguments.cells, str(cell)) or (row and row["visits"] > visit):
                continue
            new = measure(cell, names, arguments.seconds, least, max(least, arguments.rounds))
            rows[cell] = row = joined(row, new)
            print(line(digest(row)), flush=True)
            if arguments.out:
                arguments.out.mkdir(parents=True, exist_ok=True)
                text = json.dumps({"header": head, "rows": [*rows.values()]})
                new_file = arguments.out / "attention.json.new"
                new_file.write_text(text + "\n")
                new_file.replace(arguments.out / "attention.json")
    if arguments.out:
        report(arguments.out)
    else:
        print(*summary([digest(row) for row in rows.values()]), sep="\n")
    return 0


def keep_memory(of_large_blocks: bool) -> None:
    """Makes glibc keep freed memory; other C libraries have no such setting."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return
    trim_threshold, mmap_threshold, most_maps, most_arenas = -1, -3, -4, -8
    mallopt(trim_threshold, 2**31 - 1)
    mallopt(mmap_threshold, 2**25)  # What it comes to by itself.
    mallopt(most_arenas, 1)  # Others give back what is empty.
    if of_large_blocks:
        mallopt(most_maps, 0)


def measured(out: Path | None, head: str) -> dict[Cell, dict]:
    """The results in `out` of an earlier run on this day, machine and versions, to continue."""
    path = out and out / "attention.json"
    if not path or not path.exists():
        return {}
    results = json.loads(path.read_text())
    if results["header"] != head:
        raise SystemExit(f"{path} has results of another run, {results['header']}: remove it.")
    return {cell_of(row): row for row in results["rows"]}


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


def measure(cell: Cell, names, seconds: float, least: int, most: int) -> dict:
    """Milliseconds of each peer in each round, from `least` to `most` rounds, and more."""
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
    if jax.default_backend() == "cpu" and any(name.startswith("torch") for name in names):
        peers["torch products"] = torch_products(cell)

    times = {name: [] for name in (*peers, "handover")}
    begun = time.perf_counter()
    for turn in range(most):
        before = handover()
        for name, peer in peers.items():
            times[name].append(milliseconds(functools.partial(peer, fetch=False)))
        times["handover"].append(before and max(before, handover()))
        if turn + 1 >= least and time.perf_counter() - begun > seconds:
            break
    return {
        **cell._asdict(),
        "visits": 1,
        "times": times,
        "products_gflop": flops / 1e9,
        "compile_s": {name: round(value, 2) for name, value in compile_seconds.items()},
        "temp_mib": {name: round(value, 1) for name, value in temp_mib.items()},
    }


def milliseconds(call) -> float:
    """Of one run, after others."""
    time.sleep(0.02)  # The threads of the peer before fall asleep,
    awake = time.perf_counter() + WARM_UP
    call()
    call()
    while time.perf_counter() < awake:  # and those of this one wake up.
        call()
    start = time.perf_counter()
    call()
    return round(1e3 * (time.perf_counter() - start), 4)


def joined(old: dict | None, new: dict) -> dict:
    """The rounds of another visit beside those before it."""
    if old is None:
        return new
    if old["times"].keys() != new["times"].keys():
        raise SystemExit(f"{cell_of(new)}: the peers are not those of the visit before.")
    times = {name: values + new["times"][name] for name, values in old["times"].items()}
    return {**old, "visits": old["visits"] + 1, "times": times}


def digest(row: dict, near: int | None = None) -> dict | None:
    """A row's medians and spreads, only over rounds of at most so many ns of handover; or None."""
    times = row["times"]
    if near is not None:
        chosen = [value is not None and value <= near for value in times["handover"]]
        times = {name: list(itertools.compress(times[name], chosen)) for name in times}
        if not any(chosen):
            return None
    handovers = [value for value in times["handover"] if value is not None]
    ms = {name: statistics.median(times[name]) for name in times if name != "handover"}
    rate = row["products_gflop"] / ms["products"] * 1e3
    beside = ms.pop("products") / ms.pop("torch products", math.nan)
    quartiles = {name: np.percentile(times[name], [25, 75]) for name in ms}
    spread = {name: float(b - a) / ms[name] for name, (a, b) in quartiles.items()}
    return {
        **row,
        "rounds": len(times["ours"]),
        "ms": ms,
        "spread": spread,
        "gflops": cell_of(row).flops / ms["ours"] / 1e6,
        "products_gflops": rate,
        "torch_products": beside,
        "handover": round(statistics.median(handovers)) if handovers else None,
    }


def handover(times: int = 10000) -> int | None:
    """Nanoseconds that a byte takes from the first core to the last, the interpreter included.

    On a GPU, and where cores cannot be chosen or there is one: None.
    """
    if jax.default_backend() != "cpu" or not hasattr(os, "sched_setaffinity"):
        return None
    if len(os.sched_getaffinity(0)) < 2:
        return None
    cores = sorted(os.sched_getaffinity(0))
    answer = """
import mmap, os, sys
os.sched_setaffinity(0, {int(sys.argv[2])})
with open(sys.argv[1], "r+b") as file:
    x = mmap.mmap(file.fileno(), 1)
x[0] = 1
for _ in range(int(sys.argv[3])):
    for _ in range(10**7):
        if x[0] == 2:
            break
    else:
        sys.exit("nobody answers")
    x[0] = 1
"""
    with tempfile.NamedTemporaryFile() as file:
        file.write(bytes(1))
        file.flush()
        x = mmap.mmap(file.fileno(), 1)
        command = [sys.executable, "-S", "-E", "-c", answer, file.name, str(cores[-1]), str(times)]
        other = subprocess.Popen(command)
        os.sched_setaffinity(0, cores[:1])
        try:
            await_one(x)  # The other process has begun.
            start = time.perf_counter()
            for _ in range(times):
                x[0] = 2
                await_one(x)
            seconds = time.perf_counter() - start
        finally:
            os.sched_setaffinity(0, cores)
            other.kill()
            other.wait()
    return round(1e9 * seconds / (2 * times))


def await_one(x):
    """Until the other process has written a 1."""
    for _ in range(10**8):
        if x[0] == 1:
            return
    raise SystemExit("handover: the other process does not answer.")


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

    @jax.jit
    def run(a, b):
        def both(_, x):
            mixed = lax.dot(lax.dot(x, b), lax.optimization_barrier(a))
            return mixed / (512 * cell.H)  # Ones again.

        return lax.fori_loop(0, PRODUCTS, both, a)

    def call(fetch=True):
        jax.block_until_ready(run(a, b))

    call()
    return call, 2 * PRODUCTS * 2 * 512 * 512 * cell.H


def torch_products(cell: Cell):
    """The same by PyTorch."""
    import torch

    dtype = getattr(torch, cell.dtype)
    a, b = (torch.ones(shape, dtype=dtype) for shape in ((512, cell.H), (cell.H, 512)))

    def call(fetch=True):
        x = a
        for _ in range(PRODUCTS):
            x = x @ b @ a / (512 * cell.H)  # Ones again.

    return call


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
    beside, near = row["torch_products"], row["handover"]
    notes = "" if math.isnan(beside) else f" (torch's: {beside:.2f}x as fast)"
    notes += f", handover {near} ns" if near else ""
    return (
        f"{cell:58} {ms['ours']:9.2f} ms ±{row['spread']['ours']:.0%} of {row['rounds']:2} rounds, "
        f"{row['gflops'] / row['products_gflops']:4.0%} of products{notes} | " + ", ".join(others)
    )


def report(out: Path, near: int | None = None) -> None:
    """Writes the table and the plot; of rounds of so many ns of handover alone, only prints."""
    results = json.loads((out / "attention.json").read_text())
    order = list(grid(gpu=False))  # Cells may have been run in another.
    rows = sorted(results["rows"], key=lambda row: order.index(cell_of(row)))
    rows = [row for row in (digest(row, near) for row in rows) if row]
    if not rows:
        raise SystemExit(f"{out}: no round has a handover within {near} ns.")
    if near is not None:
        print(*map(line, rows), *summary(rows), sep="\n")
        return
    names = list(dict.fromkeys(name for row in rows for name in row["ms"] if name != "ours"))
    lines = [f"Measured {results['header']}.", "", *summary(rows), ""]
    columns = ["cell", "ours, ms", "spread", "rounds", "of products", "handover, ns"]
    columns += [*names, "compile, s", "memory, MiB"]
    lines += ["| " + " | ".join(columns) + " |", "|---" * len(columns) + "|"]
    for row in rows:
        ms = row["ms"]
        cell = cell_of(row)
        ratios = [f"{ms[name] / ms['ours']:.2f}" if name in ms else "" for name in names]
        share = f"{row['gflops'] / row['products_gflops']:.0%}"
        fields = [str(cell), f"{ms['ours']:.2f}", f"{row['spread']['ours']:.0%}"]
        fields += [f"{row['rounds']}", share]
        fields += [f"{row['handover'] or ''}", *ratios]
        fields += [f"{row['compile_s']['ours']:.1f}", f"{row['temp_mib']['ours']:.0f}"]
        lines.append("| " + " | ".join(fields) + " |")
    (out / "attention.md").write_text("\n".join(lines) + "\n")
    print(*lines[: -len(rows) - 2], sep="\n")
    plot(rows, out / "attention.png", results["header"])


def summary(rows) -> list[str]:
    """The main results of the table, in a few lines."""
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
        beside = [x for x in (row["torch_products"] for row in mine) if not math.isnan(x)]
        if beside:
            ends = f"{min(beside):.2f} to {max(beside):.2f}"
            rate = f"{statistics.geometric_mean(beside):.2f}x ({ends})"
            lines.append(f"- {dtype}, H = {H}, rate of torch's plain products over jax's: {rate}")
    return lines


def plot(rows, path: Path, head: str) -> None:
    """How many times as fast ours is as each peer, against the length."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib.ticker import FuncFormatter, NullLocator

    rows = [row for row in rows if row["H"] == 64 and row["dtype"] == rows[0]["dtype"]]
    names = list(dict.fromkeys(name for row in rows for name in row["ms"] if name != "ours"))
    styles = list(zip("os^Dv", ("-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1))), strict=True))
    figure, axes = plt.subplots(
        2, 3, figsize=(11, 6.4), sharex=True, sharey=True, layout="constrained"
    )
    for axis, (backward, pattern) in zip(
        axes.flat, itertools.product((False, True), PATTERNS), strict=True
    ):
        mine = [row for row in rows if (row["backward"], row["pattern"]) == (backward, pattern)]
        for i, name in enumerate(names):
            points = [
                (row["T"], row["ms"][name] / row["ms"]["ours"]) for row in mine if name in row["ms"]
            ]
            if points:
                marker, dashes = styles[i % len(styles)]
                xy = zip(*points, strict=True)
                axis.plot(*xy, marker=marker, linestyle=dashes, ms=5, label=name)
        axis.axhline(1, color="black", linewidth=1)
        axis.set_xscale("log", base=2)
        axis.set_yscale("log")
        lengths = sorted({row["T"] for row in rows})
        axis.set_xticks(lengths, [f"{T:,}" for T in lengths], fontsize=8)
        axis.set_yticks([0.5, 1, 2, 5, 10, 20, 50])
        axis.yaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}x"))
        for each in (axis.xaxis, axis.yaxis):
            each.set_minor_locator(NullLocator())
        axis.set_title(f"{pattern}, {'forward and backward' if backward else 'forward'}")
        axis.grid(alpha=0.3)
    for axis in axes[:, 0]:
        axis.set_ylabel("how many times as fast ours is")
    for axis in axes[1]:
        axis.set_xlabel("positions T")
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside upper center", ncols=6)
    figure.supxlabel(f"{rows[0]['dtype']}, head size 64, medians of rounds. {head}.", fontsize=8)
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
