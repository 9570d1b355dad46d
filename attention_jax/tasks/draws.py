"""Random draws of several tasks: numbers without replacement, places by a power law, repeats."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from attention_jax.types import Array


def draw_distinct(
    rng: Array, count: int, low: int, high: int, *, shape: tuple[int, ...] = ()
) -> Array:
    """Draws `count` distinct integers of `low ... high - 1`, every ordered choice equally likely.

    A permutation of the range would sort thousands of numbers to keep a few. Here code i is an
    index into the `high - low - i` numbers that earlier elements have left. The codes are
    independent, and each ordered choice has exactly one code (Lehmer's code). They are decoded from
    the last element to the first: every later number that is at or above this one moves up by one.

    Args:
        rng: PRNG key.
        count: At most `high - low`.
        low: Smallest integer.
        high: One past the largest.
        shape: How many independent choices to draw.

    Returns:
        `[*shape, count]` int32, in the order of drawing.
    """
    index = np.arange(count, dtype=np.int32)
    codes = jax.random.randint(rng, (*shape, count), 0, high - low - index, jnp.int32)

    def make_room(step: Array, numbers: Array) -> Array:
        i = count - 1 - step
        here = jax.lax.dynamic_index_in_dim(numbers, i, axis=-1)
        return numbers + ((index > i) & (numbers >= here))

    return low + jax.lax.fori_loop(0, count, make_room, codes)


def draw_slots(rng: Array, count: int, num_slots: int, power: float) -> Array:
    """Draws `count` distinct slots, slot x = 1, 2, ... with a weight of `power * x ** (power - 1)`.

    Returns:
        `[count]` int32, counted from 0, in the order of drawing.
    """
    # log(a x^(a - 1)), without the constant.
    logits = (power - 1) * np.log(np.arange(1, num_slots + 1, dtype=np.float32))
    # The largest of logits + Gumbel noise are draws without replacement, in their order.
    noise = jax.random.gumbel(rng, (num_slots,), jnp.float32)
    return jax.lax.top_k(logits + noise, count)[1].astype(jnp.int32)


def draw_others(rng: Array, count: int, size: int, taken: Array) -> Array:
    """Draws `count` integers of `0 ... size - 1` that are not in `taken [K]`, with replacement.

    Free number u is u plus the number of taken ones at or below it.
    """
    taken = jnp.sort(taken)
    below = taken - np.arange(len(taken), dtype=np.int32)  # Free numbers below each taken one.
    left = jax.random.randint(rng, (count,), 0, size - len(taken), jnp.int32)
    return left + (below <= left[:, None]).sum(axis=1, dtype=jnp.int32)


def first_equal(items: Array) -> Array:
    """For each of `items [M, ...]` the index of the first one equal to it; its own when it is new.

    >>> first_equal(jnp.array([5, 3, 5, 3, 4])).tolist()
    [0, 1, 0, 1, 4]
    """
    index = np.arange(len(items), dtype=np.int32)
    columns = items.reshape(len(items), -1).T
    # A stable sort puts equal items together, with the first one in front.
    *columns, order = jax.lax.sort((*columns, index), num_keys=len(columns), is_stable=True)
    changes = functools.reduce(jnp.logical_or, (c[1:] != c[:-1] for c in columns))
    front = jax.lax.cummax(jnp.where(jnp.append(True, changes), index, 0))
    return jnp.zeros(len(items), jnp.int32).at[order].set(order[front])
