"""Copying: attention by position. In order, backwards, sorted, or from among blanks."""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from attention_jax.checks import as_size
from attention_jax.tasks.draws import draw_distinct
from attention_jax.tasks.task import Task, token_task
from attention_jax.types import Array, Batch

BLANK = 0
COPY = 1  # In selective_copy: asks for the tokens.


def copy(*, seq_length: int = 32, vocab_size: int = 16) -> Task:
    """Repeats the first half of the sequence in the second.

    A row is `seq_length / 2` random tokens, then as many blanks (token 0), and the target at the
    i-th blank is the i-th token:

        inputs    7 3 9 _ _ _
        targets         7 3 9

    The second half does not show the answers, because a model is not fed its targets. All blanks
    look alike, so only a model with positions can tell them apart.

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
    return transcription("copy", lambda tokens: tokens, seq_length, vocab_size)


def reverse(*, seq_length: int = 32, vocab_size: int = 16) -> Task:
    """Repeats the first half of the sequence backwards in the second.

        inputs    7 3 9 _ _ _
        targets         9 3 7

    Args, Returns, Raises: As for `copy`. Here no fixed distance leads from a blank to its answer.

    Reference:
        Deletang et al. 2022, "Neural Networks and the Chomsky Hierarchy", appendix A, "Reverse
        String". https://arxiv.org/abs/2207.02098
    """
    return transcription("reverse", lambda tokens: tokens[::-1], seq_length, vocab_size)


def sort(*, seq_length: int = 32, vocab_size: int = 16) -> Task:
    """Puts the first half of the sequence in order in the second, smallest first.

        inputs    7 3 9 3 _ _ _ _
        targets           3 3 7 9

    Args, Returns, Raises: As for `copy`. The target is found by counting, not by position.

    Reference:
        Deletang et al. 2022, "Neural Networks and the Chomsky Hierarchy", appendix A, "Bucket
        Sort". https://arxiv.org/abs/2207.02098
    """
    return transcription("sort", jnp.sort, seq_length, vocab_size)


def transcription(
    name: str, rule: Callable[[Array], Array], seq_length: int, vocab_size: int
) -> Task:
    """Random tokens, then as many blanks whose targets are `rule(tokens)`."""
    length, odd = divmod(as_size("seq_length", seq_length, 2), 2)
    if odd:
        raise ValueError(f"seq_length of {name} must be even: got {seq_length}.")
    vocab_size = as_size("vocab_size", vocab_size, 3)

    def make_row(rng: Array) -> Batch:
        tokens = jax.random.randint(rng, (length,), BLANK + 1, vocab_size, jnp.int32)
        return Batch(
            inputs=jnp.concatenate([tokens, jnp.full_like(tokens, BLANK)]),
            targets=rule(tokens),
            weights=jnp.ones(length, jnp.float32),
            positions=jnp.arange(length, seq_length, dtype=jnp.int32),
        )

    return token_task(
        name,
        make_row,
        vocab_size=vocab_size,
        guess=("guessing a token", vocab_size - 1),
        num_rows=(vocab_size - 1) ** length,
    )


def selective_copy(*, seq_length: int = 256, vocab_size: int = 16, num_tokens: int = 16) -> Task:
    """Repeats tokens that are scattered among blanks, in their order.

    A row is N random tokens at random places among blanks (token 0), a token that asks for them
    (token 1), and N blanks; the target at the i-th of these is the i-th token:

        inputs    _ 7 _ _ 3 9 _ 1 _ _ _
        targets                   7 3 9

    Args:
        seq_length: T, at least `2 * num_tokens + 1`.
        vocab_size: Number of tokens, the two special ones included; at least 4.
        num_tokens: N.

    Returns:
        A token task with N labelled positions. Baseline: guessing, log(vocab_size - 2).

    Raises:
        ValueError: A setting is out of range, or the row is too short for its tokens.

    Reference:
        Poli et al. 2024, "Mechanistic Design and Scaling of Hybrid Architectures" (MAD).
        https://arxiv.org/abs/2403.17844
    """
    num_tokens = as_size("num_tokens", num_tokens)
    vocab_size = as_size("vocab_size", vocab_size, 4)
    scattered = as_size("seq_length", seq_length) - num_tokens - 1
    if scattered < num_tokens:
        raise ValueError(
            f"seq_length must be at least {2 * num_tokens + 1} for {num_tokens=}: got {seq_length}."
        )
    rest = np.full(num_tokens + 1, BLANK, np.int32)
    rest[0] = COPY

    def make_row(rng: Array) -> Batch:
        token_rng, place_rng = jax.random.split(rng)
        tokens = jax.random.randint(token_rng, (num_tokens,), COPY + 1, vocab_size, jnp.int32)
        places = jnp.sort(draw_distinct(place_rng, num_tokens, 0, scattered))
        first = jnp.full(scattered, BLANK, jnp.int32).at[places].set(tokens)
        return Batch(
            inputs=jnp.concatenate([first, rest]),
            targets=tokens,
            weights=jnp.ones(num_tokens, jnp.float32),
            positions=jnp.arange(scattered + 1, seq_length, dtype=jnp.int32),
        )

    return token_task(
        "selective_copy",
        make_row,
        vocab_size=vocab_size,
        guess=("guessing a token", vocab_size - 2),
        num_rows=math.comb(scattered, num_tokens) * (vocab_size - 2) ** num_tokens,
    )
