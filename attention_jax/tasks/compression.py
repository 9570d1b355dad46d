"""Compression: storing a whole row at one position."""

import jax
import jax.numpy as jnp
import numpy as np

from attention_jax.checks import as_size
from attention_jax.tasks.task import Task, token_task
from attention_jax.types import Array, Batch

COMPRESS = 0


def compression(*, seq_length: int = 63, vocab_size: int = 16) -> Task:
    """Repeats every token, although only one position sees the tokens.

    A row is N random tokens, the compression token (token 0), and N questions, which are token 0
    too. The target at the i-th question is the i-th token. A question sees only itself and the
    compression token, which sees the tokens:

        inputs    7 3 9 C C C C
        targets           7 3 9

    The reference has another decoder: the output at the compression token, plus a fixed code of a
    position, goes through an MLP that names the token at that position. Here the model decodes by
    itself. The questions need its absolute `positions` to tell which token they ask for, and they
    read the compression token in every layer, not only in the last. N = 31, the default, is the
    length 32 of the reference.

    Args:
        seq_length: T = 2 N + 1, odd, at least 3.
        vocab_size: Number of tokens, the compression token included; at least 3.

    Returns:
        A token task with N labelled positions and a mask. Baseline: guessing, log(vocab_size - 1).

    Raises:
        ValueError: A setting is out of range.

    Reference:
        Poli et al. 2024, "Mechanistic Design and Scaling of Hybrid Architectures" (MAD).
        https://arxiv.org/abs/2403.17844
    """
    length, odd = divmod(as_size("seq_length", seq_length, 3), 2)
    if not odd:
        raise ValueError(f"seq_length of compression must be odd: got {seq_length}.")
    vocab_size = as_size("vocab_size", vocab_size, 3)
    t, s = np.indices((seq_length, seq_length))
    mask = (s == t) | (s == length) | ((t <= length) & (s <= length))

    def make_row(rng: Array) -> Batch:
        tokens = jax.random.randint(rng, (length,), COMPRESS + 1, vocab_size, jnp.int32)
        return Batch(
            inputs=jnp.concatenate([tokens, jnp.full(length + 1, COMPRESS, jnp.int32)]),
            targets=tokens,
            weights=jnp.ones(length, jnp.float32),
            positions=jnp.arange(length + 1, seq_length, dtype=jnp.int32),
        )

    return token_task(
        "compression",
        make_row,
        vocab_size=vocab_size,
        guess=("guessing a token", vocab_size - 1),
        num_rows=(vocab_size - 1) ** length,
        mask=mask,
    )
