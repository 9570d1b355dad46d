"""Multi-query associative recall: attention by content."""

import math

import jax
import jax.numpy as jnp
import numpy as np

from attention_jax.checks import as_size
from attention_jax.tasks.task import Task, per_row
from attention_jax.types import Array, Batch

FILLER = 0


def recall(
    *,
    seq_length: int = 64,
    vocab_size: int = 256,
    num_pairs: int = 4,
    power: float = 0.01,
    num_passes: int = 1,
) -> Task:
    """Names the value that followed a key earlier in the row.

    A row shows K pairs of a key and its value, then asks for each key once. The target at a key's
    second showing is its value; nothing else counts. With `vocab_size=14, num_pairs=2`:

        inputs    2 9 5 7 0 0 5 0 2 0 0 0
        targets               7   9

    Keys are drawn without replacement from 1 ... vocab_size / 2 - 1, values without replacement
    from vocab_size / 2 ... vocab_size - 1. What follows the pairs is cut into slots of two tokens;
    K distinct slots are drawn without replacement, slot x = 1, 2, ... with a probability
    proportional to `power * x ** (power - 1)`, and the i-th key opens the i-th slot drawn. The rest
    is token 0.

    One layer of attention stays at chance here; two solve it.

    Args:
        seq_length: T, even.
        vocab_size: Number of tokens; more than `seq_length`.
        num_pairs: K; the row must hold them and their questions, 4 K <= T for one pass.
        power: Above 0. 1 spreads the questions evenly, less favours early slots.
        num_passes: How often the pairs are shown, one pass after the other.

    Returns:
        A token task with K labelled positions, `[B, K]` in the order of the pairs. Baseline:
        guessing among the values of the row, log(K).

    Raises:
        ValueError: A setting is out of range, or the row is too short for its pairs.

    Reference:
        Arora et al. 2023, "Zoology: Measuring and Improving Recall in Efficient Language Models",
        appendix E. https://arxiv.org/abs/2312.04927
    """
    seq_length = as_size("seq_length", seq_length)
    vocab_size = as_size("vocab_size", vocab_size)
    num_pairs = as_size("num_pairs", num_pairs)
    shown = 2 * num_pairs * as_size("num_passes", num_passes)
    num_slots = (seq_length - shown) // 2
    if seq_length % 2 or num_slots < num_pairs:
        raise ValueError(
            f"seq_length must be even and at least {shown + 2 * num_pairs} for {num_pairs=} and "
            f"{num_passes=}: got {seq_length}."
        )
    if vocab_size <= seq_length:
        raise ValueError(
            f"vocab_size must be more than seq_length: got {vocab_size=}, {seq_length=}."
        )
    if not 0 < power < math.inf:
        raise ValueError(f"power must be above 0 and finite: got {power}.")
    half = vocab_size // 2
    # log(a x^(a - 1)), without the constant.
    slot_logits = (power - 1) * np.log(np.arange(1, num_slots + 1, dtype=np.float32))

    def make_row(rng: Array) -> Batch:
        key_rng, value_rng, slot_rng = jax.random.split(rng, 3)
        keys = draw_distinct(key_rng, num_pairs, 1, half)
        values = draw_distinct(value_rng, num_pairs, half, vocab_size)
        # The K largest of logits + Gumbel noise are K draws without replacement, in their order.
        noise = jax.random.gumbel(slot_rng, (num_slots,), jnp.float32)
        _, slots = jax.lax.top_k(slot_logits + noise, num_pairs)
        positions = shown + 2 * slots.astype(jnp.int32)

        pairs = jnp.stack([keys, values], axis=1).reshape(-1)  # [2 K]
        filler = jnp.full(seq_length - shown, FILLER, jnp.int32)
        inputs = jnp.concatenate([jnp.tile(pairs, num_passes), filler])
        return Batch(
            inputs=inputs.at[positions].set(keys),
            targets=values,
            weights=jnp.ones(num_pairs, jnp.float32),
            positions=positions,
        )

    guess = jnp.float32(math.log(num_pairs))
    return Task(
        name="recall",
        sample=per_row(make_row),
        loss="cross_entropy",
        inputs=None,
        vocab_size=vocab_size,
        baseline=("guessing among the row's values", lambda batch: guess),
    )


def draw_distinct(rng: Array, count: int, low: int, high: int) -> Array:
    """Draws `count` distinct integers of `low ... high - 1`, every ordered choice equally likely.

    A permutation of the range costs a sort of thousands of numbers to keep a handful. Here every
    element is drawn alone, and whoever equals an earlier element draws again until nobody does.

    This is exact. A value is refused because an earlier element j holds it. By induction on j that
    value is either the one that j ends with, or one that j is refused in turn because some element
    before j ends with it. So element i ends with its first draw that none of the elements before
    it ends with: drawing without replacement.

    Args:
        rng: PRNG key.
        count: At most `high - low`; the closer, the more rounds.
        low: Smallest integer.
        high: One past the largest.

    Returns:
        `[count]` int32, in the order of drawing.
    """
    earlier = np.tri(count, k=-1, dtype=bool)  # [i, j]: j < i

    def refused(values: Array) -> Array:
        return ((values[:, None] == values) & earlier).any(axis=1)

    def draw(round_: Array) -> Array:
        return jax.random.randint(jax.random.fold_in(rng, round_), (count,), low, high, jnp.int32)

    def redraw(carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        round_, values, again = carry
        values = jnp.where(again, draw(round_), values)
        return round_ + 1, values, refused(values)

    first = draw(jnp.int32(0))
    carry = (jnp.int32(1), first, refused(first))
    return jax.lax.while_loop(lambda carry: carry[2].any(), redraw, carry)[1]
