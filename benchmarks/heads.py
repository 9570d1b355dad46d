"""What do the statistics of heads cost, and the ablation of all heads in one program?

    python benchmarks/heads.py

Rounds alternate between `attention_statistics` of 16384 tokens and the forward pass; then between
`analysis.ablation` and a loop over one compiled forward pass, which takes the gates as arguments.
All are compiled before. Prints the median times, and the median ratio of a round with its range.
"""

import datetime
import functools
import os
import statistics
import time

import jax
import jax.numpy as jnp

from attention_jax import (
    MLP,
    Block,
    MultiHeadAttention,
    SequenceModel,
    TokenEmbedding,
    dot_product_attention,
    masks,
)
from attention_jax.analysis import ablation, apply_with_gates, heads_of
from attention_jax.functional.statistics import attention_statistics
from attention_jax.training.build import make_functions
from attention_jax.training.config import default_config

ROUNDS = 9
LENGTH, HEAD_DIM = 16384, 64
MASKS = {
    "full": None,
    "causal": masks.causal(),
    "a window of 2048": masks.window(2048),
    "a window of 256": masks.window(256),
}
# Layers, heads, width, vocabulary, rows, tokens.
MODELS = {
    "GPT-2": (12, 12, 768, 50_257, 1, 16),
    "4 layers, width 64": (4, 8, 64, 64, 16, 64),
    "4 layers, width 128": (4, 4, 128, 64, 16, 64),
    "2 layers, width 64": (2, 2, 64, 256, 8, 64),
}


def loss(logits):
    return (jax.nn.logsumexp(logits, axis=-1) - logits[..., 0]).mean(-1)


def compare_statistics(mask):
    arrays = jax.random.normal(jax.random.key(0), (3, 1, LENGTH, 1, HEAD_DIM))
    forward = jax.jit(lambda q, k, v: dot_product_attention(q, k, v, mask=mask))
    statistics_of = jax.jit(lambda q, k, v: attention_statistics(q, k, mask=mask))
    return in_turn(lambda: forward(*arrays), lambda: statistics_of(*arrays))


def language_model(layers, heads, width, vocabulary, rows, length):
    """A model, its parameters, tokens, and the options of its call."""
    blocks = [Block(MultiHeadAttention(heads, rotary=True), MLP(4 * width)) for _ in range(layers)]
    model = SequenceModel(TokenEmbedding(vocabulary, width), blocks, mask=masks.causal())
    tokens = jax.random.randint(jax.random.key(0), (rows, length), 0, vocabulary)
    return model, jax.jit(model.init)(jax.random.key(1), tokens)["params"], tokens, {}


def recall(rows):
    """The model of `configs/recall.py` with 4 heads in each of its 2 layers, and its questions."""
    config = default_config("recall")
    config.model.num_heads = 4
    functions = make_functions(config)
    batch = functions.task.sample(jax.random.key(0), jnp.arange(rows))
    options = {"output_positions": batch.positions}
    return functions.model, jax.jit(functions.init)().params, batch.inputs, options


def compare(model, params, tokens, options):
    counts = heads_of(model, params, tokens, **options)
    opened = {path: jnp.ones(count) for path, count in counts.items()}

    @jax.jit
    def forward(params, tokens, gates):
        return loss(apply_with_gates(model, params, tokens, gates, **options)).mean()

    def loop():
        found = {}
        for path, count in counts.items():
            without = (opened | {path: opened[path].at[n].set(0)} for n in range(count))
            found[path] = jnp.stack([forward(params, tokens, gates) for gates in without])
        return found

    together = jax.jit(functools.partial(ablation, model, loss=loss, **options))
    program = lambda: together(params, tokens)
    difference = jax.tree.map(lambda x, y: float(jnp.abs(x - y).max()), program(), loop())
    return in_turn(program, loop), max(difference.values())


def in_turn(*functions):
    """The seconds of each function, in each of the rounds; the first round counts for nothing."""
    return [[seconds(function) for function in functions] for _ in range(ROUNDS + 1)][1:]


def seconds(function):
    start = time.perf_counter()
    jax.block_until_ready(function())
    return time.perf_counter() - start


def main():
    print(f"{datetime.date.today()}, {os.cpu_count()} cores, jax {jax.__version__}")
    for name, mask in MASKS.items():
        forward, statistics_of, ratio = medians(compare_statistics(mask))
        print(
            f"statistics, {name}: forward {forward:.3f} s, statistics {statistics_of:.3f} s, "
            f"ratio {ratio}",
            flush=True,
        )
    models = {name: functools.partial(language_model, *x) for name, x in MODELS.items()}
    for rows in (64, 512):
        models[f"recall, {rows} rows"] = functools.partial(recall, rows)
    for name, make in models.items():
        times, difference = compare(*make())
        program, loop, ratio = medians(times)
        print(
            f"ablation, {name}: program {program:.3f} s, loop {loop:.3f} s, ratio {ratio}; "
            f"largest difference of a loss {difference:.1e}",
            flush=True,
        )


def medians(times):
    """The median seconds of both, and the second over the first: the median, and the range."""
    ratios = sorted(y / x for x, y in times)
    ratio = f"{statistics.median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f})"
    return *(statistics.median(x) for x in zip(*times, strict=True)), ratio


if __name__ == "__main__":
    main()
