"""nanoGPT's CPU cell as a minimal PyTorch loop: the peer of `configs/text.py` in `text.py`.

    python benchmarks/torch_text.py my.txt --threads=2

The same model, batches, optimizer, schedule and number of steps as the config, in eager PyTorch:
fused attention, fused AdamW, as most people write it.
"""

import argparse
import json
import math
import time
from pathlib import Path

started = time.perf_counter()
import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from torch import nn  # noqa: E402

imported = time.perf_counter()

LAYERS, HEADS, WIDTH, CONTEXT, BATCH = 4, 4, 128, 64, 12
STEPS, WARMUP, RATE, DECAY, CLIP = 2000, 100, 2e-3, 0.1, 1.0
EVALUATIONS, EVALUATED = 4, 32  # As often, and as many batches, as the config.


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention_norm, self.mlp_norm = (nn.LayerNorm(WIDTH, bias=False) for _ in range(2))
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH, bias=False)
        self.out = nn.Linear(WIDTH, WIDTH, bias=False)
        self.up = nn.Linear(WIDTH, 4 * WIDTH, bias=False)
        self.down = nn.Linear(4 * WIDTH, WIDTH, bias=False)

    def forward(self, x):
        heads = lambda y: y.unflatten(-1, (HEADS, -1)).transpose(1, 2)
        query, key, value = map(heads, self.qkv(self.attention_norm(x)).chunk(3, dim=-1))
        mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.mlp_norm(x)), approximate="tanh"))


class Model(nn.Module):
    def __init__(self, vocabulary: int):
        super().__init__()
        self.tokens = nn.Embedding(vocabulary, WIDTH)
        self.positions = nn.Embedding(CONTEXT, WIDTH)
        self.blocks = nn.Sequential(*(Block() for _ in range(LAYERS)))
        self.norm = nn.LayerNorm(WIDTH, bias=False)
        for embedding in (self.tokens, self.positions):
            nn.init.normal_(embedding.weight, std=0.02)

    def forward(self, tokens, targets):
        x = self.tokens(tokens) + self.positions.weight
        logits = F.linear(self.norm(self.blocks(x)), self.tokens.weight)
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


def rate(step: int) -> float:
    warmup = min(1.0, (step + 1) / WARMUP)
    progress = min(max((step - WARMUP) / (STEPS - WARMUP), 0), 1)
    return RATE * warmup * 0.5 * (1 + math.cos(math.pi * progress))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("file")
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--steps", type=int, default=STEPS)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    text = Path(arguments.file).read_text(encoding="utf-8")
    places = {letter: place for place, letter in enumerate(sorted(set(text)))}
    tokens = torch.tensor([places[letter] for letter in text])
    cut = int(0.9 * len(tokens))
    model = Model(len(places))
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    vectors = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": DECAY}, {"params": vectors, "weight_decay": 0}]
    optimizer = torch.optim.AdamW(groups, lr=RATE, fused=True)

    def batch(part):
        starts = torch.randint(len(part) - CONTEXT, (BATCH,))
        rows = torch.stack([part[i : i + CONTEXT + 1] for i in starts])
        return rows[:, :-1], rows[:, 1:]

    @torch.no_grad()
    def evaluate():
        return sum(model(*batch(tokens[cut:])).item() for _ in range(EVALUATED)) / EVALUATED

    built = time.perf_counter()
    seconds, losses = [], []
    for step in range(arguments.steps):
        begun = time.perf_counter()
        for group in optimizer.param_groups:
            group["lr"] = rate(step)
        loss = model(*batch(tokens[:cut]))
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        seconds.append(time.perf_counter() - begun)
        if (step + 1) % (STEPS // EVALUATIONS) == 0:
            losses.append(evaluate())
    report = {
        "start": built - started,
        "median_step": sorted(seconds)[len(seconds) // 2],
        "whole": time.perf_counter() - started,
        "held_out_losses": losses,
        "version": torch.__version__,
    }
    print(json.dumps(report))


if __name__ == "__main__":
    main()
