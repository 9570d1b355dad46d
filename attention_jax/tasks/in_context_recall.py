"""Recall in a stream, where pairs come again: plain, among noise, with keys of several tokens."""

import jax
import jax.numpy as jnp
import numpy as np

from attention_jax.checks import as_size
from attention_jax.tasks.draws import draw_distinct, first_equal
from attention_jax.tasks.task import Task, token_task
from attention_jax.types import Array, Batch


def in_context_recall(*, seq_length: int = 128, vocab_size: int = 16) -> Task:
    """Names the value of each key that has come before in the row.

    A row is a stream of pairs of a key and its value. Keys are drawn from the first half of the
    vocabulary. Each key gets a random value from the second half and keeps it through the row. The
    last key is one of those before it, all equally likely. With `vocab_size=8`:

        inputs    2 5 0 7 2 5 3 5 0 7
        targets           5       7

    The reference trains on the next token at every position and tests only these values; here only
    they count in both.

    Args:
        seq_length: T, even, at least 4.
        vocab_size: Number of tokens; at least 2.

    Returns:
        A token task with `T / 2 - 1` positions, all keys but the first; new keys have weight 0.
        Baseline: guessing a value, log(vocab_size / 2).

    Raises:
        ValueError: A setting is out of range.

    Reference:
        Poli et al. 2024, "Mechanistic Design and Scaling of Hybrid Architectures" (MAD).
        https://arxiv.org/abs/2403.17844
    """
    vocab_size = as_size("vocab_size", vocab_size, 2)
    return stream_of_pairs("in_context_recall", seq_length, vocab_size, 0, 0.0)


def noisy_recall(
    *,
    seq_length: int = 128,
    vocab_size: int = 32,
    noise_vocab_size: int = 16,
    noise_rate: float = 0.2,
) -> Task:
    """`in_context_recall` with pairs of separate noise tokens in between.

    Args:
        seq_length: As for `in_context_recall`.
        vocab_size: Number of tokens, those of noise included.
        noise_vocab_size: How many of them, the last ones, are noise; at most `vocab_size - 2`.
        noise_rate: The probability that a pair is noise, in [0, 1). The last pair and one of the
            others are never noise, so that there is a key to ask for.

    Returns, Raises, Reference: As for `in_context_recall`; noise has weight 0.
    """
    vocab_size = as_size("vocab_size", vocab_size, 3)
    noise_vocab_size = as_size("noise_vocab_size", noise_vocab_size)
    if vocab_size - noise_vocab_size < 2:
        raise ValueError(
            f"noise_vocab_size must leave 2 tokens or more: got {noise_vocab_size=}, {vocab_size=}."
        )
    if not 0 <= noise_rate < 1:
        raise ValueError(f"noise_rate must be in [0, 1): got {noise_rate}.")
    return stream_of_pairs("noisy_recall", seq_length, vocab_size, noise_vocab_size, noise_rate)


def stream_of_pairs(
    name: str, seq_length: int, vocab_size: int, noise_vocab_size: int, noise_rate: float
) -> Task:
    """Makes both tasks above; the vocabulary is keys, values, noise."""
    num_pairs, odd = divmod(as_size("seq_length", seq_length, 4), 2)
    if odd:
        raise ValueError(f"seq_length of {name} must be even: got {seq_length}.")
    size = vocab_size - noise_vocab_size  # Of keys and values.
    num_keys = size // 2
    index = np.arange(num_pairs, dtype=np.int32)

    def make_row(rng: Array) -> Batch:
        key_rng, value_rng, last_rng, noise_rng = jax.random.split(rng, 4)
        keys = jax.random.randint(key_rng, (num_pairs,), 0, num_keys, jnp.int32)
        values = jax.random.randint(value_rng, (num_keys,), num_keys, size, jnp.int32)  # Of a key.
        if noise_rate:
            which_rng, spared_rng, token_rng = jax.random.split(noise_rng, 3)
            spared = jax.random.randint(spared_rng, (), 0, num_pairs - 1, jnp.int32)
            noisy = jax.random.bernoulli(which_rng, np.float32(noise_rate), (num_pairs,))
            noisy &= index != spared
        else:
            noisy = jnp.zeros(num_pairs, bool)
        new = ~noisy & (first_equal(jnp.where(noisy, -1, keys)) == index)
        # The last key is the new key with the highest random number.
        lottery = jax.random.uniform(last_rng, (num_pairs - 1,), jnp.float32)
        keys = keys.at[-1].set(keys[jnp.where(new[:-1], lottery, -1.0).argmax()])
        noisy, new = noisy.at[-1].set(False), new.at[-1].set(False)

        pairs = jnp.stack([keys, values[keys]], axis=1)
        targets = pairs[1:, 1]
        if noise_rate:
            tokens = jax.random.randint(token_rng, pairs.shape, size, vocab_size, jnp.int32)
            pairs = jnp.where(noisy[:, None], tokens, pairs)
        return Batch(
            inputs=pairs.reshape(-1),
            targets=targets,
            weights=(~noisy & ~new)[1:].astype(jnp.float32),
            positions=jnp.asarray(2 * index[1:]),
        )

    return token_task(
        name, make_row, vocab_size=vocab_size, guess=("guessing a value", size - num_keys)
    )


def fuzzy_recall(
    *,
    seq_length: int = 128,
    vocab_size: int = 16,
    min_key_length: int = 1,
    max_key_length: int = 3,
    min_value_length: int = 1,
    max_value_length: int = 3,
) -> Task:
    """`in_context_recall` with keys and values of several tokens.

    A key has `min_key_length ... max_key_length` tokens, all equally likely, drawn without
    replacement; values likewise. The row is padded on the left with the last token of the
    vocabulary; the last pair is one of those before it. If the key has come before, each token of
    its value is the target at the token before it:

        inputs    _ _ 2 0 5 1 6 7 2 0 5
        targets                     5

    The reference trains with keys of 1 to 3 tokens and tests with keys of 3 alone: to do so, give
    `config.eval.slices="min_key_length=3"`.

    Args:
        seq_length: T, at least twice the longest pair.
        vocab_size: Number of tokens, the padding included. The first half of the others makes keys,
            the second values.
        min_key_length, max_key_length: In tokens; at most as many as there are for keys.
        min_value_length, max_value_length: Likewise.

    Returns:
        A token task with `T - 1` positions; only values of old keys have weight 1, others 0.
        Baseline: guessing a value's token, log(vocab_size / 2).

    Raises:
        ValueError: A setting is out of range, or the row is too short for its pairs.

    Reference:
        Poli et al. 2024, "Mechanistic Design and Scaling of Hybrid Architectures" (MAD).
        https://arxiv.org/abs/2403.17844
    """
    padding = as_size("vocab_size", vocab_size, 3) - 1
    num_keys = padding // 2
    lengths = {
        "key": (min_key_length, max_key_length, num_keys),
        "value": (min_value_length, max_value_length, padding - num_keys),
    }
    for what, (low, high, limit) in lengths.items():
        low = as_size(f"min_{what}_length", low)
        if not low <= as_size(f"max_{what}_length", high) <= limit:
            raise ValueError(
                f"max_{what}_length must be at least min_{what}_length and at most {limit}, the "
                f"tokens of {what}s: got {low} ... {high} for {vocab_size=}."
            )
    longest = max_key_length + max_value_length
    if as_size("seq_length", seq_length) < 2 * longest:
        raise ValueError(
            f"seq_length must be at least {2 * longest}, two of the longest pairs: got "
            f"{seq_length}."
        )
    num_pairs = seq_length // (min_key_length + min_value_length)  # More than ever fit.
    index = np.arange(num_pairs, dtype=np.int32)

    def make_row(rng: Array) -> Batch:
        rngs = jax.random.split(rng, 3)
        # The pairs to draw from; -1 fills short keys and values.
        keys = draw_words(rngs[0], min_key_length, max_key_length, 0, num_keys)
        first = first_equal(keys)
        values = draw_words(rngs[1], min_value_length, max_value_length, num_keys, padding)[first]
        pairs = jnp.concatenate([keys, values], axis=1)  # [pairs, longest]
        sizes = (pairs >= 0).sum(axis=1, dtype=jnp.int32)

        # As many pairs as fit, then one of them again as the question, all aligned to the right.
        count = (jnp.cumsum(sizes) + longest <= seq_length).sum(dtype=jnp.int32)
        asked = jax.random.randint(rngs[2], (), 0, count, jnp.int32)
        pair = jnp.where(index == count, asked, index)
        ends = jnp.cumsum(jnp.where(index <= count, sizes[pair], 0))
        old = (index == count) | (first[pair] != index)

        place = jnp.arange(seq_length, dtype=jnp.int32) - (seq_length - ends[-1])
        # The pair whose tokens are at each place.
        slot = jnp.searchsorted(ends, place, side="right").astype(jnp.int32)
        within = place - (ends - sizes[pair])[slot]
        key_size = (keys >= 0).sum(axis=1, dtype=jnp.int32)[pair][slot]
        in_value = within >= key_size
        column = within + in_value * (max_key_length - key_size)
        tokens = jnp.where(place >= 0, pairs[pair[slot], column], padding)
        counts = (place >= 0) & in_value & old[slot]
        return Batch(
            inputs=tokens,
            targets=tokens[1:],
            weights=counts[1:].astype(jnp.float32),
            positions=jnp.arange(seq_length - 1, dtype=jnp.int32),
        )

    def draw_words(rng: Array, shortest: int, longest: int, low: int, high: int) -> Array:
        """`[pairs, longest]` distinct tokens of `low ... high - 1`; -1 fills short words."""
        token_rng, length_rng = jax.random.split(rng)
        tokens = draw_distinct(token_rng, longest, low, high, shape=(num_pairs,))
        length = jax.random.randint(length_rng, (num_pairs, 1), shortest, longest + 1, jnp.int32)
        return jnp.where(jnp.arange(longest) < length, tokens, -1)

    return token_task(
        "fuzzy_recall",
        make_row,
        vocab_size=vocab_size,
        guess=("guessing a value's token", padding - num_keys),
    )
