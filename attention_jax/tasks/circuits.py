"""Circuits: one bit out of many, by counting."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from attention_jax.checks import as_size
from attention_jax.tasks.task import Task, token_task
from attention_jax.types import Array, Batch

END = 2


def parity(*, seq_length: int = 32, cumulative: bool = False) -> Task:
    """Tells whether the number of ones is odd.

    A row is random bits and an end marker (token 2) with the target. If cumulative, a row is only
    bits, and the target at each bit is the parity up to and including it:

        inputs    1 0 1 1 2      cumulative    1 0 1 1 0
        targets           1                    1 1 0 1 1

    Args:
        seq_length: T; at least 2, cumulative 1.
        cumulative: A target at every bit, and no end marker.

    Returns:
        A task of 3 tokens with 1 or T labelled positions. Baseline: tossing a coin, log(2).

    Raises:
        ValueError: `seq_length` is out of range.

    Reference:
        Hahn 2020, "Theoretical Limitations of Self-Attention in Neural Sequence Models".
        https://arxiv.org/abs/1906.06755
    """
    return circuit("parity", lambda ones, bits: ones % 2, seq_length, cumulative)


def majority(*, seq_length: int = 32, cumulative: bool = False) -> Task:
    """Tells whether there are more ones than zeros; equal numbers count as no.

        inputs    1 0 1 1 2      cumulative    1 0 1 1 0
        targets           1                    1 0 1 1 1

    Args, Returns, Raises: As for `parity`.

    Reference:
        Merrill et al. 2022, "Saturated Transformers are Constant-Depth Threshold Circuits".
        https://arxiv.org/abs/2106.16213
    """
    return circuit("majority", lambda ones, bits: 2 * ones > bits, seq_length, cumulative)


def circuit(
    name: str, rule: Callable[[Array, Array], Array], seq_length: int, cumulative: bool
) -> Task:
    """Random bits and `rule(number of ones, number of bits)`, a bit, at the end or after each."""
    if not isinstance(cumulative, bool):
        raise TypeError(f"cumulative must be True or False: got {cumulative!r}.")
    seq_length = as_size("seq_length", seq_length, 1 if cumulative else 2)
    num_bits = seq_length if cumulative else seq_length - 1
    counts = np.arange(1, num_bits + 1, dtype=np.int32)

    def make_row(rng: Array) -> Batch:
        bits = jax.random.bernoulli(rng, np.float32(0.5), (num_bits,)).astype(jnp.int32)
        targets = rule(jnp.cumsum(bits), counts).astype(jnp.int32)
        if cumulative:
            inputs, positions = bits, jnp.asarray(counts - 1)
        else:
            inputs, positions = jnp.append(bits, END), jnp.asarray(counts[-1:])
            targets = targets[-1:]
        return Batch(inputs, targets, jnp.ones(len(targets), jnp.float32), positions)

    return token_task(
        name, make_row, vocab_size=3, guess=("tossing a coin", 2), num_rows=2**num_bits
    )
