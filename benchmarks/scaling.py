"""What a training step sends between devices, and how long it would take on many accelerators.

    python benchmarks/scaling.py

First, for some meshes of eight simulated devices, it compiles a training step and adds up the bytes
of the sums in the compiled program, by mesh axis, beside the formula of docs/scaling.md. Then it
prints the predicted step time and efficiency of three models on 8, 64 and 512 accelerators. The
numbers of the accelerator are arguments: --tflops, --intra, --inter.
"""

import argparse
import collections
import datetime
import math
import re
import time
from typing import NamedTuple

import numpy as np

BYTES = {"pred": 1, "bf16": 2, "f16": 2, "f32": 4, "s32": 4, "u32": 4, "f64": 8}
SUM = re.compile(
    r" = (.*?) (?:all-reduce|reduce-scatter|all-gather)(?:-start)?\(.*?"
    r"replica_groups=(.*?), (?:use_global|to_apply|dimensions|metadata)"
)
ARRAY = re.compile(r"([a-z]+\d*)\[([\d,]*)\]")
SMALL = 4096  # Bytes: sums of metrics, losses and norms, which the formula leaves out.


class Model(NamedTuple):
    """A transformer: layers, width, hidden features of the MLP, vocabulary, tokens in a row."""

    layers: int
    width: int
    hidden: int
    vocabulary: int
    length: int

    @property
    def params(self) -> int:
        """Kernels alone: four of attention and two of the MLP in each layer, and the table."""
        block = 4 * self.width**2 + 2 * self.width * self.hidden
        return self.layers * block + self.vocabulary * self.width

    def flops(self, rows: float) -> float:
        """Of a step: 6 for each parameter and token, and the products of causal attention."""
        tokens = rows * self.length
        return tokens * (6 * self.params + 6 * self.layers * self.length * self.width)


def data_bytes(model: Model, split: int) -> float:
    """A device's gradients in float32, which are summed over the axis `data` once in a step."""
    return 4 * model.params / split


def model_bytes(model: Model, rows: float, answers: int | None = None, itemsize: int = 4) -> float:
    """Activations that are summed over the axis `model` in a step, `[rows, T, D]` each.

    A block sums the outputs of its attention and of its MLP. Its backward pass sums the gradients
    of the inputs of query, key, value and MLP. The table sums the embedded tokens, and the
    gradients of the vectors whose logits are asked for. These may be fewer than T in a row, and the
    queries and the MLP of the last block run for them alone.
    """
    answers = model.length if answers is None else answers
    positions = (6 * model.layers - 3) * model.length + 5 * answers
    return positions * rows * model.width * itemsize


def found_bytes(text: str, data: int, model: int) -> dict[str, int]:
    """The bytes of all sums in a compiled program, by mesh axis."""
    found = collections.Counter()
    for line in text.splitlines():
        if match := SUM.search(line):
            arrays = [
                BYTES[kind] * math.prod(int(n) for n in sizes.split(",") if n)
                for kind, sizes in ARRAY.findall(match[1])
            ]
            size = sum(x for x in arrays if x > SMALL)
            found[axis_of(match[2], data, model)] += size
    return dict(found)


def axis_of(groups: str, data: int, model: int) -> str:
    """The mesh axis over which replica groups go: devices are numbered with `model` innermost."""
    ids = np.arange(data * model)
    if groups.startswith("mesh"):  # mesh['a'=4,'b'=2], device_ids=([4,2]T(1,0)) {'a'}
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", groups))
        if order := re.search(r"device_ids=\(\[([\d,]+)\]T\(([\d,]+)\)", groups):
            shape, places = ([int(n) for n in x.split(",")] for x in order.groups())
            ids = ids.reshape(shape).transpose(places)
        names = re.findall(r"'(\w+)'", groups[groups.index("{") :])
        ids = ids.reshape([int(n) for n in sizes.values()])
        first = ids[tuple(slice(None) if name in names else 0 for name in sizes)].ravel()
    elif groups.startswith("{{"):  # {{0,1},{2,3}}
        first = [int(n) for n in groups[2 : groups.index("}")].split(",")]
    elif groups.startswith("["):  # [4,2]<=[8] or [2,4]<=[4,2]T(1,0)
        number, size = (int(n) for n in re.findall(r"\d+", groups)[:2])
        if order := re.search(r"<=\[([\d,]+)\]T\(([\d,]+)\)", groups):
            shape, places = ([int(n) for n in x.split(",")] for x in order.groups())
            ids = ids.reshape(shape).transpose(places)
        first = ids.reshape(number, size)[0]
    else:  # {}: all of them.
        first = ids
    if len(first) == data * model and 1 not in (data, model):
        return "both"
    return "model" if first[1] - first[0] == 1 and model > 1 else "data"


def measured(data: int, model: int) -> tuple[Model, dict[str, int]]:
    """The sums of a compiled epoch of one step."""

    from attention_jax.training import build
    from attention_jax.training.config import default_config

    sizes = Model(layers=2, width=128, hidden=512, vocabulary=64, length=32)
    config = default_config("sort")
    config.task.update(seq_length=sizes.length, vocab_size=sizes.vocabulary)
    config.model.update(num_heads=8, features=sizes.width, num_layers=sizes.layers)
    config.train.update(batch_size=32, steps_per_epoch=1)
    config.optimizer.name = "sgd"
    config.launcher = "sharded"
    config.mesh.update(data=data, model=model)
    program = build.build(config)
    state = program.put_state(program.init())
    text = program.epoch.lower(state, program.rows).compile().as_text()
    return sizes, found_bytes(text, data, model)


def tflops_here() -> float:
    """10^12 operations a second in training steps of a small model on one device here."""
    import jax

    from attention_jax.training import build
    from attention_jax.training.config import default_config

    sizes, rows = Model(layers=2, width=512, hidden=2048, vocabulary=256, length=256), 8
    config = default_config("induction")
    config.task.update(seq_length=sizes.length, vocab_size=sizes.vocabulary)
    config.model.update(num_heads=8, features=sizes.width, num_layers=sizes.layers, mlp_ratio=4.0)
    config.train.update(batch_size=rows, steps_per_epoch=2)
    program = build.build(config)
    state, times = program.put_state(program.init()), []
    for _ in range(4):
        start = time.perf_counter()
        state, _ = jax.block_until_ready(program.epoch(state, program.rows))
        times.append((time.perf_counter() - start) / config.train.steps_per_epoch)
    return sizes.flops(rows) / min(times) / 1e12


def seconds_of_sum(size: float, devices: int, gigabytes: float) -> float:
    """A ring sends each byte of a sum twice, but for one part of `devices`."""
    return 2 * (devices - 1) / devices * size / (gigabytes * 1e9)


MODELS = {
    "124 million": Model(12, 768, 3072, 50_257, 1024),
    "1.3 billion": Model(24, 2048, 8192, 50_257, 2048),
    "6.7 billion": Model(32, 4096, 16_384, 50_257, 2048),
}
# Parts of a model, and rows on each of those parts.
CUTS = {"124 million": (1, 16), "1.3 billion": (2, 8), "6.7 billion": (8, 8)}


def predicted(name: str, devices: int, tflops: float, intra: float, inter: float) -> list[str]:
    """A row of the table of predictions."""
    model, (split, rows) = MODELS[name], CUTS[name]
    groups = devices // split
    compute = model.flops(rows) / split / (tflops * 1e12)
    of_model = seconds_of_sum(model_bytes(model, rows, itemsize=2), split, intra)
    # Eight accelerators are one host; more hosts meet over the slower network.
    of_data = seconds_of_sum(data_bytes(model, split), groups, intra if devices <= 8 else inter)
    # Gradients are summed while the backward pass, two thirds of the work, goes on.
    total = compute + of_model + max(0.0, of_data - 2 / 3 * compute)
    parts = [f"{1000 * x:.0f}" for x in (compute, of_model, of_data, total)]
    return [name, str(devices), f"{groups} x {split}", *parts, f"{compute / total:.0%}"]


def table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--tflops", type=float, default=200.0, help="10^12 operations a second")
    parser.add_argument("--intra", type=float, default=300.0, help="GB/s inside a host")
    parser.add_argument("--inter", type=float, default=40.0, help="GB/s between hosts, per device")
    flags = parser.parse_args()

    import jax

    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", 8)
    print(f"{datetime.date.today()}, jax {jax.__version__}: {tflops_here():.3f} TFLOP/s here\n")
    rows = []
    for data, model in ((8, 1), (4, 2), (2, 4), (1, 8)):
        sizes, found = measured(data, model)
        want = {"data": data_bytes(sizes, model) if data > 1 else 0}
        want["model"] = model_bytes(sizes, 32 / data, sizes.length // 2) if model > 1 else 0
        for axis, size in want.items():
            if size or axis in found:
                got = found.get(axis, 0)
                rows.append([f"{data} x {model}", axis, f"{got:,}", f"{size:,.0f}"])
        for axis in found.keys() - want.keys():
            rows.append([f"{data} x {model}", axis, f"{found[axis]:,}", "0"])
    print(table(["data x model", "axis", "bytes found", "bytes by the formula"], rows), end="\n\n")
    head = [
        "parameters",
        "devices",
        "data x model",
        "compute",
        "model",
        "data",
        "step",
        "efficiency",
    ]
    numbers = (flags.tflops, flags.intra, flags.inter)
    found = [predicted(name, devices, *numbers) for name in MODELS for devices in (8, 64, 512)]
    print(table(head, found))


if __name__ == "__main__":
    main()
