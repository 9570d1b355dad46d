"""The induction head: which token came after this one the last time?"""

import jax
import jax.numpy as jnp

from attention_jax.checks import as_size
from attention_jax.tasks.task import Task, token_task
from attention_jax.types import Array, Batch

MARKER = 0


def induction(*, seq_length: int = 64, vocab_size: int = 16) -> Task:
    """Names the token that followed the marker.

    A row is random tokens with the marker (token 0) at a random place and again at the end. The
    target at the end is the token after the first marker:

        inputs    7 3 0 5 9 3 8 0
        targets                 5

    The distance is arbitrary, so the task tests how well positions carry over to rows longer than
    those in training.

    Args:
        seq_length: T, at least 3.
        vocab_size: Number of tokens, the marker included; at least 3.

    Returns:
        A token task with one labelled position. Baseline: guessing, log(vocab_size - 1).

    Raises:
        ValueError: A setting is out of range.

    Reference:
        Olsson et al. 2022, "In-context Learning and Induction Heads", https://arxiv.org/abs/2209.11895;
        as a task Fu et al. 2022, "Hungry Hungry Hippos", section 3.1,
        https://arxiv.org/abs/2212.14052.
    """
    seq_length = as_size("seq_length", seq_length, 3)
    vocab_size = as_size("vocab_size", vocab_size, 3)
    last = seq_length - 1

    def make_row(rng: Array) -> Batch:
        token_rng, place_rng = jax.random.split(rng)
        tokens = jax.random.randint(token_rng, (seq_length,), MARKER + 1, vocab_size, jnp.int32)
        place = jax.random.randint(place_rng, (), 0, last - 1, jnp.int32)
        return Batch(
            inputs=tokens.at[jnp.stack([place, jnp.int32(last)])].set(MARKER),
            targets=tokens[place + 1][None],
            weights=jnp.ones(1, jnp.float32),
            positions=jnp.array([last], jnp.int32),
        )

    return token_task(
        "induction",
        make_row,
        vocab_size=vocab_size,
        guess=("guessing a token", vocab_size - 1),
        num_rows=(seq_length - 2) * (vocab_size - 1) ** (seq_length - 2),
    )
