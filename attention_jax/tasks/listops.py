"""ListOps: the value of a nested expression."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from attention_jax.checks import as_size
from attention_jax.tasks.task import Task, token_task
from attention_jax.types import Array, Batch

# Tokens: the digits 0 ... 9, the opening brackets of the operators, then these two.
OPERATORS = ("MIN", "MAX", "MED", "SM")
CLOSE = 10 + len(OPERATORS)
PADDING = CLOSE + 1


def listops(
    *,
    seq_length: int = 128,
    max_depth: int = 10,
    max_args: int = 10,
    expand_rate: float = 0.25,
) -> Task:
    """Evaluates an expression of minimum, maximum, median and sum modulo 10 over digits.

        inputs    [MAX 2 9 [MIN 4 7 ] 0 ] _ _
        targets                         9

    The outermost operator has 2 ... `max_args` arguments, all numbers equally likely. Each argument
    is an operator with chance `expand_rate`, else a digit. The median of an even number of
    arguments is the mean of the middle two, rounded down. The target stands at the last bracket,
    and padding after it.

    The reference makes expressions of any length and discards those outside of 500 ... 2000 tokens.
    Here short expressions stay. An operator takes only as many arguments as fit into the row, and
    is not drawn if two do not fit.

    Args:
        seq_length: T, at least 4.
        max_depth: Levels of the expression, with the level of the deepest digits; at least 2.
        max_args: Most arguments of an operator; at least 2.
        expand_rate: In [0, 1].

    Returns:
        A task of 16 tokens with one labelled position. Baseline: guessing a digit, log(10).

    Raises:
        ValueError: A setting is out of range.

    Reference:
        Nangia and Bowman 2018, "ListOps: A Diagnostic Dataset for Latent Tree Learning",
        https://arxiv.org/abs/1804.06028; Tay et al. 2020, "Long Range Arena", section 2.2.1,
        https://arxiv.org/abs/2011.04006.
    """
    seq_length = as_size("seq_length", seq_length, 4)
    levels = as_size("max_depth", max_depth, 2) - 1  # Of operators.
    max_args = as_size("max_args", max_args, 2)
    if not 0 <= expand_rate <= 1:
        raise ValueError(f"expand_rate must be in [0, 1]: got {expand_rate}.")
    level = np.arange(levels, dtype=np.int32)

    def num_args(lottery: Array, room: Array) -> Array:
        """2 ... max_args arguments, or fewer if there is less room; lottery in [0, 1)."""
        choices = jnp.minimum(max_args, room) - 1
        return 2 + jnp.minimum((lottery * choices).astype(jnp.int32), choices - 1)

    def make_row(rng: Array) -> Batch:
        rngs = jax.random.split(rng, 4)
        chances = jax.random.uniform(rngs[0], (seq_length,), jnp.float32)
        lotteries = jax.random.uniform(rngs[1], (seq_length,), jnp.float32)
        operators = jax.random.randint(rngs[2], (seq_length,), 0, len(OPERATORS), jnp.int32)
        digits = jax.random.randint(rngs[3], (seq_length,), 0, 10, jnp.int32)

        def write(state: State, drawn: tuple[Array, ...]) -> tuple[State, Array]:
            """The next token of the expression, from left to right."""
            chance, lottery, operator, digit = drawn
            done = state.depth == 0
            here = level == state.depth - 1  # The operator whose arguments are being written.
            pick = lambda stack: jnp.einsum("l,l...->...", here.astype(jnp.int32), stack)
            # Whether the operator closes, and its value.
            closes = ~done & (pick(state.missing) == 0)
            value = evaluate(pick(state.operators), pick(state.counts))
            # Whether an operator opens in place of a digit; its arguments and bracket need room.
            room = seq_length - state.length - 1
            opens = ~done & ~closes & (chance < expand_rate)
            opens &= (state.depth < levels) & (room >= 2)
            size = num_args(lottery, room)
            writes_digit = ~done & ~closes & ~opens

            below, above = level == state.depth, level == state.depth - 2
            missing = state.missing - here * (opens | writes_digit) + below * opens * size
            # A digit is an argument of this operator; the value of a closed one, of the outer
            # operator.
            digit_or_value = jnp.where(closes, value, digit)
            receiver = (above & closes) | (here & writes_digit)
            counts = jnp.where((below & opens)[:, None], 0, state.counts)
            counts += receiver[:, None] * (np.arange(10) == digit_or_value)
            token = jnp.where(
                done,
                PADDING,
                jnp.where(closes, CLOSE, jnp.where(opens, 10 + operator, digit)),
            )
            state = State(
                depth=state.depth + opens - closes,
                length=state.length + opens * (size + 1),
                missing=missing,
                operators=jnp.where(below & opens, operator, state.operators),
                counts=counts,
                value=jnp.where(closes, value, state.value),
            )
            return state, token

        outer = num_args(lotteries[0], jnp.int32(seq_length - 2))
        begun = State(
            depth=jnp.int32(1),
            length=outer + 2,
            missing=outer * (level == 0),
            operators=operators[0] * (level == 0),
            counts=jnp.zeros((levels, 10), jnp.int32),
            value=jnp.int32(0),
        )
        drawn = (chances[1:], lotteries[1:], operators[1:], digits[1:])
        ended, tokens = jax.lax.scan(write, begun, drawn)
        return Batch(
            inputs=jnp.concatenate([10 + operators[:1], tokens]),
            targets=ended.value[None],
            weights=jnp.ones(1, jnp.float32),
            positions=ended.length[None] - 1,
        )

    return token_task("listops", make_row, vocab_size=PADDING + 1, guess=("guessing a digit", 10))


class State(NamedTuple):
    """An unfinished expression.

    Attributes:
        depth: How many operators are open; 0 at the end.
        length: The length of the expression if no more operators come.
        missing: `[levels]` arguments that each open operator still needs.
        operators: `[levels]`.
        counts: `[levels, 10]`: how many arguments so far have each value.
        value: The value of the last closed operator.
    """

    depth: Array
    length: Array
    missing: Array
    operators: Array
    counts: Array
    value: Array


def evaluate(operator: Array, counts: Array) -> Array:
    """The value of an operator; `counts` `[10]` says how often each digit is an argument."""
    upto = jnp.cumsum(counts, dtype=jnp.int32)
    total = upto[-1]
    digits = np.arange(10, dtype=np.int32)

    def ranked(rank):
        """The argument of this rank, 0 the smallest."""
        return (upto <= rank).sum(dtype=jnp.int32)

    median = (ranked((total - 1) // 2) + ranked(total // 2)) // 2
    values = jnp.stack([ranked(0), ranked(total - 1), median, digits @ counts % 10])
    return values[operator]
