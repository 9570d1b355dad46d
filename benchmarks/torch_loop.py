"""The default run as a minimal PyTorch loop: the peer of `train.py` in `default_run.py`.

    python benchmarks/torch_loop.py --threads=1

It has the same model, task, batch size, optimizer and number of steps, written in the usual way,
with PyTorch's fastest variants: its fused attention and its fused Adam.
"""

import argparse
import json
import time

started = time.perf_counter()
import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from torch import nn  # noqa: E402

imported = time.perf_counter()

BATCH, LENGTH, FEATURES, HEADS, HEAD_DIM = 32, 10, 64, 8, 8
EPOCHS, STEPS = 100, 32


class Attention(nn.Module):
    def __init__(self, heads: int, bias: bool = True):
        super().__init__()
        self.heads = heads
        width = heads * HEAD_DIM
        self.query = nn.Linear(FEATURES, width, bias=bias)
        self.key = nn.Linear(FEATURES, width, bias=bias)
        self.value = nn.Linear(FEATURES, width, bias=bias)
        self.out = nn.Linear(width, FEATURES, bias=bias)

    def forward(self, x):
        heads = lambda y: y.unflatten(-1, (self.heads, -1)).transpose(1, 2)
        mixed = F.scaled_dot_product_attention(
            heads(self.query(x)), heads(self.key(x)), heads(self.value(x))
        )
        return self.out(mixed.transpose(1, 2).flatten(2))


def make_teacher() -> Attention:
    """As in `attention_jax.tasks.teacher`: half the heads, no biases, logits of deviation 2."""
    teacher = Attention(HEADS // 2, bias=False)
    for name, scale in {"query": 2**0.5, "key": 2**0.5, "value": 1.0, "out": 1.0}.items():
        weight = getattr(teacher, name).weight
        nn.init.normal_(weight, std=scale * weight.shape[1] ** -0.5)
    return teacher


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--epochs", type=int, default=EPOCHS)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    teacher, model = make_teacher(), Attention(HEADS)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3, fused=True)
    built = time.perf_counter()

    losses = []
    for _ in range(arguments.epochs):
        for _ in range(STEPS):
            x = torch.randn(BATCH, LENGTH, FEATURES)
            with torch.no_grad():
                target = teacher(x)
            loss = F.mse_loss(model(x), target)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            if not losses:
                losses.append(loss.item())
        losses.append(loss.item())
    done = time.perf_counter()
    report = {
        "import": imported - started,
        "build": built - imported,
        "steps": done - built,
        "first_loss": losses[0],
        "last_loss": losses[-1],
        "version": torch.__version__,
    }
    print(json.dumps(report))


if __name__ == "__main__":
    main()
