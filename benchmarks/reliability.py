"""Does the trainer keep its promises? Kills, signals, damages, full disks, NaN, long runs, devices.

    uv run benchmarks/reliability.py
    uv run benchmarks/reliability.py --only kills,damages --count 20 --seed 1

Prints the table of docs/reliability.md, and the broken promises on stderr; the status is 1 then.
The file of `--results` stores the results part by part: a stored part is not run again, unless
`--only` names it. `--out docs/reliability.md` writes the table into that page.

It runs `train.py` on simulated devices of a CPU, with a model so small that the trainer takes most
of the time. Linux only: it reads /proc, and mounts small file systems if it may.
"""

import argparse
import datetime
import importlib.metadata
import json
import os
import platform
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

# Before jax is imported: these are read once.
os.environ |= {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "4"}
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from promises.damages import damages
from promises.devices import devices
from promises.disk import disk
from promises.generated import generated
from promises.kills import kills
from promises.numbers import numbers
from promises.signals import signals
from promises.soak import soak
from promises.trainer import Lab, Row

PARTS: dict[str, Callable[..., Iterator[Row]]] = {
    "kills": kills,
    "signals": signals,
    "damages": damages,
    "disk": disk,
    "numbers": numbers,
    "soak": soak,
    "devices": devices,
    "generated": generated,
}
BEGIN, END = "<!-- measured -->", "<!-- end of what was measured -->"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help=f"parts, with commas: {', '.join(PARTS)}")
    parser.add_argument("--count", type=int, help="trials of each part (default: as many as told)")
    parser.add_argument("--seed", type=int, default=0, help="of every random choice (default: 0)")
    parser.add_argument("--jobs", type=int, default=2, help="processes at a time (default: 2)")
    parser.add_argument("--results", type=Path, help="file that keeps what was measured")
    parser.add_argument("--out", type=Path, help="page to put the table into")
    parser.add_argument("--place", type=Path, help="where to work, and leave everything behind")
    arguments = parser.parse_args()
    only = [name for name in arguments.only.split(",") if name]
    for name in only:
        if name not in PARTS:
            parser.error(f"--only must name parts of {', '.join(PARTS)}: got {name!r}.")
    for name in ("count", "jobs"):
        value = getattr(arguments, name)
        if value is not None and value < 1:
            parser.error(f"--{name} must be at least 1: got {value}.")

    results = {}
    if arguments.results is not None and arguments.results.exists():
        results = json.loads(arguments.results.read_text())
    with tempfile.TemporaryDirectory() as place:
        place = arguments.place or Path(place)
        os.environ["JAX_COMPILATION_CACHE_DIR"] = str(place / "cache")
        for name in only or [name for name in PARTS if name not in results]:
            begun, rows = time.monotonic(), []
            lab = Lab(place / name, arguments.seed, arguments.jobs)
            lab.place.mkdir(parents=True)
            options = {} if arguments.count is None else {"count": arguments.count}
            for row in PARTS[name](lab, **options):
                rows.append(row)
                print(line(row), flush=True)
            seconds = round(time.monotonic() - begun)
            print(f"{name}: {seconds} s", file=sys.stderr, flush=True)
            results[name] = {"machine": machine(), "seconds": seconds, "rows": rows}
            if arguments.results is not None:
                arguments.results.write_text(json.dumps(results, indent=1) + "\n")

    text = table({name: results[name] for name in PARTS if name in results})
    print(f"\n{text}")
    if arguments.out is not None:
        page = arguments.out.read_text()
        before, _, rest = page.partition(BEGIN)
        arguments.out.write_text(f"{before}{BEGIN}\n\n{text}\n{END}{rest.partition(END)[2]}")
    rows = [Row(*row) for result in results.values() for row in result["rows"]]
    return int(any(row.kept < row.tried for row in rows))


def line(row: Row) -> str:
    return f"| {row.what} | {row.tried:,} | {row.kept:,} | {row.seen} |"


def table(results: dict) -> str:
    """The table, and below it where and when it was measured."""
    lines = ["| | times | kept | |", "|---|---|---|---|"]
    machines = {}
    for name, result in results.items():
        lines += [line(Row(*row)) for row in result["rows"]]
        machines.setdefault(result["machine"], []).append(f"{name} {result['seconds']} s")
    lines.append("")
    lines += [f"{where}. {', '.join(parts)}." for where, parts in machines.items()]
    return "\n".join(lines) + "\n"


def machine() -> str:
    names = ("jax", "orbax-checkpoint", "flax")
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in names)
    cpu = Path("/proc/cpuinfo").read_text().partition("model name")[2].partition("\n")[0]
    return (
        f"{datetime.date.today()}, {os.cpu_count()} cores, {cpu.strip().lstrip(': ')}, "
        f"{platform.system()}, Python {platform.python_version()}, {versions}"
    )


if __name__ == "__main__":
    sys.exit(main())
