"""Multi-query associative recall: attention by content. Plain, with compound keys, with updates."""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp

from attention_jax.checks import as_size
from attention_jax.tasks.draws import draw_distinct, draw_others, draw_slots
from attention_jax.tasks.task import Task, token_task
from attention_jax.types import Array, Batch

FILLER = 0


def recall(
    *,
    seq_length: int = 64,
    vocab_size: int = 256,
    num_pairs: int = 4,
    power: float = 0.01,
    num_passes: int = 1,
    random_non_queries: bool = False,
) -> Task:
    """Names the value that followed a key earlier in the row.

    A row shows K pairs of a key and its value, then asks for each key once. The target at a key's
    question is its value; no other position counts. With `vocab_size=14, num_pairs=2`:

        inputs    2 9 5 7 0 0 5 0 2 0 0 0
        targets               7   9

    Keys are drawn without replacement from 1 ... vocab_size / 2 - 1, values without replacement
    from vocab_size / 2 ... vocab_size - 1. The rest of the row is divided into slots of two tokens.
    K distinct slots are drawn without replacement, slot x = 1, 2, ... with a probability
    proportional to `power * x ** (power - 1)`. The i-th key goes to the start of the i-th drawn
    slot. All else is filler.

    One layer of attention stays at chance here; two solve it.

    Args:
        seq_length: T, even.
        vocab_size: Number of tokens; more than `seq_length`.
        num_pairs: K; the row must hold the pairs and their questions, 4 K <= T for one pass.
        power: Above 0. 1 spreads the questions evenly, less favours early slots.
        num_passes: How often the pairs are shown, one pass after the other.
        random_non_queries: The filler is any token but the keys of the row, so that it asks no
            questions by chance. Otherwise it is token 0.

    Returns:
        A token task with K labelled positions, `[B, K]` in the order of the pairs. Baseline:
        guessing among the values of the row, log(K).

    Raises:
        ValueError: A setting is out of range, or the row is too short for its pairs.

    Reference:
        Arora et al. 2023, "Zoology: Measuring and Improving Recall in Efficient Language Models",
        appendix E. https://arxiv.org/abs/2312.04927
    """
    num_pairs = as_size("num_pairs", num_pairs)
    shown = 2 * num_pairs * as_size("num_passes", num_passes)
    seq_length, vocab_size, half = check_pairs(
        seq_length, vocab_size, shown, num_pairs, f"{num_pairs=} and {num_passes=}"
    )
    ask = questions(
        seq_length, vocab_size, shown, num_pairs, power=power, random_fillers=random_non_queries
    )

    def make_row(rng: Array) -> Batch:
        key_rng, value_rng, ask_rng = jax.random.split(rng, 3)
        keys = draw_distinct(key_rng, num_pairs, 1, half)
        values = draw_distinct(value_rng, num_pairs, half, vocab_size)
        pairs = jnp.tile(interleave(keys, values), num_passes)
        return ask(ask_rng, pairs, keys[:, None], values, keys)

    return token_task(
        "recall",
        make_row,
        vocab_size=vocab_size,
        guess=("guessing among the row's values", num_pairs),
    )


def forgetting_recall(
    *,
    seq_length: int = 64,
    vocab_size: int = 256,
    num_pairs: int = 8,
    num_updates: int = 4,
    power: float = 0.01,
    random_non_queries: bool = False,
) -> Task:
    """Names the latest value of a key: some keys get another value on the way.

    As `recall`, but after the K pairs U of the keys, drawn without replacement, come again with
    another value. With K = 2 and U = 1:

        inputs    2 9 5 7 5 12 0 0 5 0 2 0 0 0
        targets                   12   9

    Args:
        seq_length: T, even, at least 2 (K + U) + 2 K.
        vocab_size, num_pairs, power, random_non_queries: As for `recall`.
        num_updates: U, at most K.

    Returns:
        A token task with K labelled positions, in the order of the first pairs. Baseline: guessing
        among the last values of the row, log(K).

    Raises:
        ValueError: A setting is out of range, or the row is too short for its pairs.

    Reference:
        Arora et al. 2023, as for `recall`; the variant is "forgetting MQAR" of the authors' library
        of tasks. https://github.com/HazyResearch/zoology
    """
    num_pairs = as_size("num_pairs", num_pairs)
    num_updates = as_size("num_updates", num_updates)
    if num_updates > num_pairs:
        raise ValueError(
            f"num_updates must be at most num_pairs: got {num_updates=}, {num_pairs=}."
        )
    shown = 2 * (num_pairs + num_updates)
    seq_length, vocab_size, half = check_pairs(
        seq_length, vocab_size, shown, num_pairs, f"{num_pairs=} and {num_updates=}"
    )
    ask = questions(
        seq_length, vocab_size, shown, num_pairs, power=power, random_fillers=random_non_queries
    )

    def make_row(rng: Array) -> Batch:
        key_rng, value_rng, which_rng, new_rng, ask_rng = jax.random.split(rng, 5)
        keys = draw_distinct(key_rng, num_pairs, 1, half)
        values = draw_distinct(value_rng, num_pairs, half, vocab_size)
        which = draw_distinct(which_rng, num_updates, 0, num_pairs)
        # Add a step modulo the number of values, never 0, so that the value changes.
        size = vocab_size - half
        step = jax.random.randint(new_rng, (num_updates,), 1, size, jnp.int32)
        new = half + (values[which] - half + step) % size
        pairs = jnp.concatenate([interleave(keys, values), interleave(keys[which], new)])
        return ask(ask_rng, pairs, keys[:, None], values.at[which].set(new), keys)

    return token_task(
        "forgetting_recall",
        make_row,
        vocab_size=vocab_size,
        guess=("guessing among the row's last values", num_pairs),
    )


def compositional_recall(
    *,
    seq_length: int = 64,
    vocab_size: int = 256,
    num_pairs: int = 4,
    power: float = 0.01,
    random_non_queries: bool = False,
) -> Task:
    """Names the value that followed two tokens together; one token alone does not tell it.

    As `recall`, but a key is two tokens. g first and g second tokens are drawn, and all K = g * g
    combinations are shown with their values, in random order. The target is at the second token of
    a question. With `vocab_size=30, num_pairs=4`:

        inputs    3 14 22 7 11 29 7 14 20 3 11 25 ... 7 14 0 0 0 0 3 14 0
        targets                                         20           22

    First tokens are drawn from 1 ... V / 3 - 1, second ones from the second third of the
    vocabulary, values from the rest, each without replacement. Slots are three tokens long.

    Args:
        seq_length: T, at least 6 K.
        vocab_size: V, more than `seq_length`; its thirds must hold g + 1, g and K tokens.
        num_pairs: K, a square number.
        power, random_non_queries: As for `recall`.

    Returns:
        A token task with K labelled positions, in the order of the triples. Baseline: guessing
        among the values of the row, log(K).

    Raises:
        ValueError: A setting is out of range, or the row is too short for its triples.

    Reference:
        Arora et al. 2023, as for `recall`; the variant is "compositional MQAR" of the authors'
        library of tasks. https://github.com/HazyResearch/zoology
    """
    num_pairs = as_size("num_pairs", num_pairs)
    grid = math.isqrt(num_pairs)
    if grid * grid != num_pairs:
        raise ValueError(f"num_pairs of compositional_recall must be a square: got {num_pairs}.")
    shown = 3 * num_pairs
    seq_length, vocab_size = as_size("seq_length", seq_length), as_size("vocab_size", vocab_size)
    if seq_length < 2 * shown:
        raise ValueError(
            f"seq_length must be at least {2 * shown} for {num_pairs=}: got {seq_length}."
        )
    third = vocab_size // 3
    if vocab_size <= seq_length or third <= grid or vocab_size - 2 * third < num_pairs:
        raise ValueError(
            f"vocab_size must be more than seq_length, and its thirds must hold {grid + 1}, {grid} "
            f"and {num_pairs} tokens: got {vocab_size=}, {seq_length=}."
        )
    ask = questions(
        seq_length, vocab_size, shown, num_pairs, power=power, random_fillers=random_non_queries
    )

    def make_row(rng: Array) -> Batch:
        first_rng, second_rng, value_rng, order_rng, ask_rng = jax.random.split(rng, 5)
        first = draw_distinct(first_rng, grid, 1, third)
        second = draw_distinct(second_rng, grid, third, 2 * third)
        values = draw_distinct(value_rng, num_pairs, 2 * third, vocab_size)
        cells = draw_distinct(order_rng, num_pairs, 0, num_pairs)
        keys = jnp.stack([first[cells // grid], second[cells % grid]], axis=1)  # [K, 2]
        triples = jnp.concatenate([keys, values[:, None]], axis=1).reshape(-1)
        return ask(ask_rng, triples, keys, values, jnp.concatenate([first, second]))

    return token_task(
        "compositional_recall",
        make_row,
        vocab_size=vocab_size,
        guess=("guessing among the row's values", num_pairs),
    )


def check_pairs(
    seq_length: int, vocab_size: int, shown: int, num_questions: int, words: str
) -> tuple[int, int, int]:
    """Checks `seq_length` and `vocab_size`; returns them and the first token of the values."""
    seq_length, vocab_size = as_size("seq_length", seq_length), as_size("vocab_size", vocab_size)
    shortest = shown + 2 * num_questions
    if seq_length % 2 or seq_length < shortest:
        raise ValueError(
            f"seq_length must be even and at least {shortest} for {words}: got {seq_length}."
        )
    if vocab_size <= seq_length:
        raise ValueError(
            f"vocab_size must be more than seq_length: got {vocab_size=}, {seq_length=}."
        )
    return seq_length, vocab_size, vocab_size // 2


def interleave(keys: Array, values: Array) -> Array:
    """`[K]` and `[K]` as key, value, key, value, ..., `[2 K]`."""
    return jnp.stack([keys, values], axis=1).reshape(-1)


def questions(
    seq_length: int,
    vocab_size: int,
    shown: int,
    num_questions: int,
    *,
    power: float,
    random_fillers: bool,
) -> Callable[[Array, Array, Array, Array, Array], Batch]:
    """Adds a zone of questions to rows that begin with `shown` tokens.

    Returns:
        `(rng, begin [shown], asked [K, W], answers [K], keys) -> Batch`. The zone is divided into
        slots of W + 1 tokens. The W tokens of question i start the i-th drawn slot, and its answer
        is the target at the last of them. Random fillers are not `keys`.

    Raises:
        ValueError: `power` is out of range.
        TypeError: `random_fillers` (the task's `random_non_queries`) is not a bool.
    """
    if not isinstance(random_fillers, bool):
        raise TypeError(f"random_non_queries must be True or False: got {random_fillers!r}.")
    if not 0 < power < math.inf:
        raise ValueError(f"power must be above 0 and finite: got {power}.")
    zone = seq_length - shown

    def ask(rng: Array, begin: Array, asked: Array, answers: Array, keys: Array) -> Batch:
        slot_rng, filler_rng = jax.random.split(rng)
        width = asked.shape[1]
        slots = draw_slots(slot_rng, num_questions, zone // (width + 1), power)
        first = shown + (width + 1) * slots  # [K]
        if random_fillers:
            fillers = draw_others(filler_rng, zone, vocab_size, keys)
        else:
            fillers = jnp.full(zone, FILLER, jnp.int32)
        inputs = jnp.concatenate([begin, fillers])
        return Batch(
            inputs=inputs.at[first[:, None] + jnp.arange(width)].set(asked),
            targets=answers,
            weights=jnp.ones(num_questions, jnp.float32),
            positions=first + (width - 1),
        )

    return ask
