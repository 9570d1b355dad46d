"""How fast is greedy decoding beside transformers? A random GPT-2 of 124 million parameters.

    pip install -e ".[torch]"
    python benchmarks/generation.py

Rounds alternate between `attention_jax.generate` and transformers' `generate` with its default
cache and attention, on the same parameters and prompt, in one process. Prints the median tokens per
second of both, the median ratio of a round with its range, how long loading takes, and how long a
token takes beside a copy of all parameters in memory.
"""

import datetime
import importlib.metadata
import os
import statistics
import sys
import tempfile
import time

import jax
import numpy as np
import torch
import transformers

import attention_jax
from attention_jax.interop import huggingface

PROMPT, NEW, ROUNDS = 16, 64, 5


def seconds(function):
    start = time.perf_counter()
    found = function()
    return time.perf_counter() - start, found


def main():
    versions = ("jax", "flax", "torch", "transformers")
    print(f"{datetime.date.today()}, {os.cpu_count()} cores, Python {sys.version.split()[0]}")
    print(", ".join(f"{name} {importlib.metadata.version(name)}" for name in versions))
    torch.manual_seed(0)
    transformers.logging.set_verbosity_error()
    peer = transformers.GPT2LMHeadModel(transformers.GPT2Config()).eval()
    tokens = np.random.default_rng(0).integers(0, 50_257, (1, PROMPT))
    with tempfile.TemporaryDirectory() as directory:
        peer.save_pretrained(directory)
        loading, (model, params) = seconds(lambda: huggingface.load(directory))
    jax.block_until_ready(params)

    def ours():
        return np.asarray(attention_jax.generate(model, params, tokens, NEW, temperature=0))

    @torch.no_grad()
    def theirs():
        prompt = torch.tensor(tokens)
        options = {"max_new_tokens": NEW, "min_new_tokens": NEW, "do_sample": False}
        mask = torch.ones_like(prompt)
        found = peer.generate(prompt, attention_mask=mask, pad_token_id=0, **options)
        return found.numpy()[:, PROMPT:]

    compiling, _ = seconds(ours)
    seconds(theirs)
    source = np.concatenate([np.ravel(x) for x in jax.tree.leaves(params)])
    target = np.empty_like(source)
    rounds, copies = [], []
    for _ in range(ROUNDS):
        (mine, found), (other, want) = seconds(ours), seconds(theirs)
        rounds.append((mine, other, float((found == want).mean())))
        copies.append(seconds(lambda: np.copyto(target, source))[0] * NEW / mine)
    ratios = sorted(other / mine for mine, other, _ in rounds)
    print(f"load {loading:.1f} s, first call with compilation {compiling:.1f} s")
    for name, place in (("ours", 0), ("transformers", 1)):
        median = statistics.median(found[place] for found in rounds)
        print(f"{name}: {NEW / median:.1f} tokens/s")
    print(f"a copy of the parameters takes {statistics.median(copies):.0%} of a token's time")
    print(
        f"ratio {statistics.median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f}); "
        f"{min(found[2] for found in rounds):.0%} of the tokens are equal"
    )


if __name__ == "__main__":
    main()
