"""How long does nanoGPT's CPU cell take, as a whole process, beside a minimal PyTorch loop?

    python benchmarks/text.py my.txt
    python benchmarks/text.py my.txt --config=configs/text_minute.py

Runs `train.py --config=configs/text.py` and `torch_text.py` in turn, each time in a new process:
import, compilation and exit count. Another `--config` has another model or other steps than the
loop of PyTorch, so compare the losses too. The first run of `train.py` finds an empty compile
cache, all others a warm one. With `--devices=2` it divides the cores into two devices for `pmap`.
Prints for both the seconds, the steps per second and the held-out loss, and the ratios of each
round. Needs the extra: `pip install .[torch]`.
"""

import argparse
import datetime
import importlib.metadata
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent


def timed(command: list[str], env: dict[str, str]) -> tuple[float, str]:
    begun = time.perf_counter()
    found = subprocess.run(command, env=env, capture_output=True, text=True, check=True)
    return time.perf_counter() - begun, found.stdout


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("file")
    parser.add_argument("--config", default=str(HERE.parent / "configs" / "text.py"))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--devices", type=int, default=1, help="of train.py")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="of PyTorch")
    arguments = parser.parse_args()
    versions = ", ".join(f"{x} {importlib.metadata.version(x)}" for x in ("jax", "torch"))
    print(f"{datetime.date.today()}, {os.cpu_count()} cores, {versions}")
    with tempfile.TemporaryDirectory() as folder:
        env = os.environ | {"JAX_COMPILATION_CACHE_DIR": f"{folder}/cache"}
        env["JAX_NUM_CPU_DEVICES"] = str(arguments.devices)
        launcher = "pmap" if arguments.devices > 1 else "single"
        for number in range(arguments.rounds):
            workdir = f"{folder}/{number}"
            config = [f"--config={arguments.config}", f"--workdir={workdir}"]
            path = [f"--config.task.path={arguments.file}", f"--launcher={launcher}"]
            ours, _ = timed([sys.executable, str(HERE.parent / "train.py"), *config, *path], env)
            result = json.loads(Path(workdir, "result.json").read_text())
            peer = [sys.executable, str(HERE / "torch_text.py"), arguments.file]
            theirs, out = timed([*peer, f"--threads={arguments.threads}"], env)
            report = json.loads(out)
            print(
                f"ours {ours:.1f} s, {result['steps_per_second']:.1f} steps/s, held-out loss "
                f"{result['eval_loss']:.3f}; PyTorch {theirs:.1f} s, "
                f"{1 / report['median_step']:.1f} steps/s, {report['held_out_losses'][-1]:.3f}; "
                f"ratio {theirs / ours:.2f}, of steps "
                f"{result['steps_per_second'] * report['median_step']:.2f}",
                flush=True,
            )


if __name__ == "__main__":
    main()
