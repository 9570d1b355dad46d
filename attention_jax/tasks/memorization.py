"""Memorization: facts that are only in the parameters, not in a row."""

import jax
import jax.numpy as jnp
import numpy as np

from attention_jax.checks import as_size
from attention_jax.tasks.task import Task, token_task
from attention_jax.types import Array, Batch


def memorization(*, seq_length: int = 32, vocab_size: int = 256, seed: int = 0) -> Task:
    """Names the value that belongs to a key, the same one in all rows.

    A map that `seed` draws once gives each key its value. Keys are the tokens below `(vocab_size -
    1) / 2`; values are other tokens, and no two keys share a value. A row is random keys, each
    followed by the last token of the vocabulary, which asks for its value:

        inputs    2 ? 0 ? 2 ? 1 ?
        targets     5   4   5   7

    All keys are equally likely, because a rare key is learnt late. The reference trains on the same
    256 rows again and again; here every row is new, and only the map can be learnt.

    Args:
        seq_length: T, even, at least 2.
        vocab_size: Number of tokens; at least 3.
        seed: Chooses the map.

    Returns:
        A token task with `T / 2` labelled positions. Baseline: guessing a value,
        log(vocab_size / 2).

    Raises:
        ValueError: A setting is out of range.

    Reference:
        Poli et al. 2024, "Mechanistic Design and Scaling of Hybrid Architectures" (MAD).
        https://arxiv.org/abs/2403.17844
    """
    num_keys, odd = divmod(as_size("seq_length", seq_length, 2), 2)
    if odd:
        raise ValueError(f"seq_length of memorization must be even: got {seq_length}.")
    question = as_size("vocab_size", vocab_size, 3) - 1
    values = draw_map(as_size("seed", seed, 0), question)

    def make_row(rng: Array) -> Batch:
        keys = jax.random.randint(rng, (num_keys,), 0, len(values), jnp.int32)
        return Batch(
            inputs=jnp.stack([keys, jnp.full_like(keys, question)], axis=1).reshape(-1),
            targets=jnp.asarray(values)[keys],
            weights=jnp.ones(num_keys, jnp.float32),
            positions=1 + 2 * jnp.arange(num_keys, dtype=jnp.int32),
        )

    return token_task(
        "memorization",
        make_row,
        vocab_size=vocab_size,
        guess=("guessing a value", question - len(values)),
        num_rows=len(values) ** num_keys,
        held_out="fresh rows of the same facts, all of which training shows: there are no others",
    )


def draw_map(seed: int, size: int) -> np.ndarray:
    """The value of each key, `[size // 2]` int32: distinct numbers of `size // 2 ... size - 1`.

    NumPy's legacy generator has the same stream in all versions, so a run resumed years later still
    has its map.
    """
    num_keys = size // 2
    values = np.random.RandomState(seed).permutation(np.arange(num_keys, size))
    return values[:num_keys].astype(np.int32)
