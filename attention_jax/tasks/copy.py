"""Copying: attention by position."""

import math

import jax
import jax.numpy as jnp

from attention_jax.checks import as_size
from attention_jax.tasks.task import Task, per_row
from attention_jax.types import Array, Batch

BLANK = 0


def copy(*, seq_length: int = 32, vocab_size: int = 16) -> Task:
    """Repeats the first half of the sequence in the second.

    A row is `seq_length / 2` random tokens, then as many blanks (token 0), and the target at the
    i-th blank is the i-th token:

        inputs    7 3 9 _ _ _
        targets         7 3 9

    The answers stand nowhere in the second half: a model is not fed its targets, so reading ahead
    does not help, and all blanks look alike, so only a model that knows positions can tell them
    apart.

    Args:
        seq_length: T, even, at least 2.
        vocab_size: Number of tokens, the blank included; at least 3.

    Returns:
        A token task with `T / 2` labelled positions. Baseline: guessing, log(vocab_size - 1).

    Raises:
        ValueError: A setting is out of range.

    Reference:
        Graves et al. 2014, "Neural Turing Machines", section 4.1. https://arxiv.org/abs/1410.5401
    """
    length, odd = divmod(as_size("seq_length", seq_length, 2), 2)
    if odd:
        raise ValueError(f"seq_length of copy must be even: got {seq_length}.")
    vocab_size = as_size("vocab_size", vocab_size, 3)

    def make_row(rng: Array) -> Batch:
        tokens = jax.random.randint(rng, (length,), BLANK + 1, vocab_size, jnp.int32)
        return Batch(
            inputs=jnp.concatenate([tokens, jnp.full_like(tokens, BLANK)]),
            targets=tokens,
            weights=jnp.ones(length, jnp.float32),
            positions=jnp.arange(length, seq_length, dtype=jnp.int32),
        )

    guess = jnp.float32(math.log(vocab_size - 1))
    return Task(
        name="copy",
        sample=per_row(make_row),
        loss="cross_entropy",
        inputs=None,
        vocab_size=vocab_size,
        baseline=("guessing a token", lambda batch: guess),
    )
