"""Biases: rules or arrays that are added to the logits.

A bias is a small value that can give, for any rectangle of the logits, the numbers to add. Its
arrays are leaves of a pytree, so the gradient of a loss with respect to a bias is a bias whose
arrays are gradients. Biases add up with `+`, with one another and with arrays.

An `offset` that is an array of integers is a leaf too, and `jax.grad` refuses integers. Make the
bias inside the differentiated function, from the array to be learnt:

    jax.grad(lambda slopes: loss(alibi(slopes, offset=offsets)))(slopes)

or pass `allow_int=True`: the gradient of an integer is then an empty `float0` array.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from attention_jax.checks import (
    as_floating,
    as_integers,
    as_size,
    check_alike,
    check_flag,
    check_floating,
    is_array,
)
from attention_jax.functional import own_rules
from attention_jax.functional.tiles import (
    Rule,
    Tile,
    as_offset,
    as_tokens,
    offset_of,
    shown,
    value_class,
    words,
)
from attention_jax.types import Array


class Bias(Rule):
    """The type that `alibi` and `relative` return. Subclasses evaluate one tile."""

    # numpy must leave `array + bias` to us instead of trying it element by element.
    __array_ufunc__ = None

    def tile(self, at: Tile) -> Array:
        """Floating-point, broadcastable to `[..., N, t_size, s_size]`."""
        raise NotImplementedError

    def check(self, T: int, S: int) -> None:
        """Raises ValueError when the bias was made for another number of queries or keys."""

    def check_shifted(self, T: int, S: int) -> None:
        """The same for T queries that stand anywhere in a sequence of S positions."""
        self.check(T, S)

    def hidden(self, at: Tile) -> Array | None:
        """Where the tile is -inf, which means masked; None if it cannot be -inf."""
        return None

    def __add__(self, other: "Bias | Array") -> "Bias":
        return Sum(self, as_bias(other))

    def __radd__(self, other: "Bias | Array") -> "Bias":
        return Sum(as_bias(other), self)


@value_class(slopes="N", offset="")
class Alibi(Bias):
    slopes: Array
    offset: Any

    def tile(self, at):
        distance = jnp.abs((at.t + offset_of(self.offset, at)) - at.s)
        # float32 at least: bfloat16 cannot count beyond 256.
        dtype = jnp.promote_types(self.slopes.dtype, jnp.float32)
        return -self.slopes[:, None, None].astype(dtype) * distance.astype(dtype)

    def __repr__(self):
        return f"alibi({', '.join([words(self.slopes), *shown(self.offset)])})"


@value_class(table="bN", offset="")  # b: buckets.
class Relative(Bias):
    table: Array
    bidirectional: bool
    max_distance: int
    offset: Any

    def tile(self, at):
        distance = at.s - (at.t + offset_of(self.offset, at))  # [..., 1, t, s]
        buckets = relative_buckets(
            distance, self.table.shape[0], self.bidirectional, self.max_distance
        )
        # [..., t, s, N] -> [..., N, t, s]; a distance with batch axes has a head axis of 1.
        bias = jnp.moveaxis(self.table[buckets], -1, -3)
        return bias if distance.ndim == 2 else jnp.squeeze(bias, -4)

    def __repr__(self):
        settings = f"bidirectional={self.bidirectional}", f"max_distance={self.max_distance}"
        return f"relative({', '.join([words(self.table), *settings, *shown(self.offset)])})"


@value_class(array="NTS")
class Dense(Bias):
    array: Array

    def tile(self, at):
        return self.array

    def hidden(self, at):
        return jnp.isneginf(self.array)

    def check(self, T, S):
        rows, columns = (1, 1, *self.array.shape)[-2:]
        if rows not in (1, T) or columns not in (1, S):
            raise ValueError(
                f"bias must broadcast to [..., N, T, S] with {T=}, {S=}, got shape "
                f"{self.array.shape}."
            )

    def __repr__(self):
        return f"dense({words(self.array)})"


@value_class(inputs="Nxy")  # x, y: whole, as fn sees them.
class Own(Bias):
    fn: Callable
    inputs: tuple[Array, ...]

    def tile(self, at):
        wanted = "floating-point numbers"
        return own_rules.evaluate("biases.rule", self.fn, self.inputs, at, wanted)

    def hidden(self, at):
        bias = self.tile(at)
        return bias < jnp.finfo(bias.dtype).min

    def __repr__(self):
        return own_rules.shown_rule(self.fn, self.inputs)


@value_class()
class Sum(Bias):
    left: Bias
    right: Bias

    def check(self, T, S):
        self.left.check(T, S)
        self.right.check(T, S)

    def check_shifted(self, T, S):
        self.left.check_shifted(T, S)
        self.right.check_shifted(T, S)

    def tile(self, at):
        with jax.debug_infs(False):  # -inf is allowed: it means masked.
            return self.left.tile(at) + self.right.tile(at)

    def hidden(self, at):
        left, right = self.left.hidden(at), self.right.hidden(at)
        return left if right is None else right if left is None else left | right

    def __repr__(self):
        return f"{self.left!r} + {self.right!r}"


@value_class(offset="")
class Shifted(Bias):
    """The rules of `bias`, for queries that stand `offset` positions later in the sequence."""

    bias: Bias
    offset: Any

    def check(self, T, S):
        self.bias.check_shifted(T, S)

    def tile(self, at):
        return self.bias.tile(at.shifted(self.offset))

    def hidden(self, at):
        return self.bias.hidden(at.shifted(self.offset))

    def __repr__(self):
        return f"shifted({self.bias!r}, {words(self.offset)})"


@value_class(places="T")
class OfTokens(Bias):
    """The rules of `bias`, for queries that are chosen tokens of the sequence."""

    bias: Bias
    places: Array

    def tile(self, at):
        return self.bias.tile(at.chosen(self.places))

    def hidden(self, at):
        return self.bias.hidden(at.chosen(self.places))

    def check(self, T, S):
        if self.places.shape[-1] != T:
            raise ValueError(f"bias {self!r} was made for T={self.places.shape[-1]}, got {T=}.")
        self.bias.check_keys(S)

    def check_shifted(self, T, S):
        raise ValueError(f"bias {self!r} is of chosen tokens, so it cannot be shifted.")

    def __repr__(self):
        return f"of_tokens({self.bias!r}, {words(self.places)})"


@value_class(query_positions="L", key_positions="S")
class Placed(Bias):
    """The rules of `bias`, for tokens with given positions."""

    bias: Bias
    query_positions: Array
    key_positions: Array

    def check(self, T, S):
        own_T, own_S = self.query_positions.shape[-1], self.key_positions.shape[-1]
        if own_T not in (1, T) or own_S not in (1, S):
            raise ValueError(f"bias {self!r} was made for T={own_T}, S={own_S}: got {T=}, {S=}.")
        self.bias.check(T, S)

    def check_shifted(self, T, S):
        self.check(S, S)

    def tile(self, at):
        return self.bias.tile(at.placed(self.query_positions, self.key_positions))

    def hidden(self, at):
        return self.bias.hidden(at.placed(self.query_positions, self.key_positions))

    def __repr__(self):
        return f"placed({self.bias!r}, {words(self.query_positions)})"


def alibi(slopes_or_num_heads: int | Array, *, offset: int | str | Array = 0) -> Bias:
    """-slope * |t + offset - s|: farther keys get smaller logits.

    Args:
        slopes_or_num_heads: Slopes `[N]`, learnable; or the number of heads N, for the paper's
            geometric slopes.
        offset: As in `masks.causal`. With an array, differentiate with respect to the slopes, not
            to the bias: see above.

    Reference:
        Press et al. 2021, "Train Short, Test Long", section 3. https://arxiv.org/abs/2108.12409
    """
    if jnp.ndim(slopes_or_num_heads) == 0:
        slopes = jnp.asarray(alibi_slopes(as_size("slopes_or_num_heads", slopes_or_num_heads)))
    else:
        slopes = as_floating("slopes", slopes_or_num_heads)
    if slopes.ndim != 1:
        raise ValueError(f"slopes must be [N], got shape {slopes.shape}.")
    return Alibi(slopes, as_offset(offset))


def alibi_slopes(num_heads: int) -> np.ndarray:
    """The paper's slopes, `[N]`: 2 ** (-8 n / N) for N a power of two.

    Otherwise the slopes for the power of two below N, then every other slope for the power above.
    """

    def geometric(n):
        return [2.0 ** (-8 * (i + 1) / n) for i in range(n)]

    below = 2 ** int(math.log2(num_heads))
    extra = geometric(2 * below)[0::2][: num_heads - below]
    return np.array(geometric(below) + extra, np.float32)


def relative(
    table: Array,
    *,
    bidirectional: bool = True,
    num_buckets: int | None = None,
    max_distance: int = 128,
    offset: int | str | Array = 0,
) -> Bias:
    """One learnable number per head and bucket of distance s - t, as in T5.

    Args:
        table: `[num_buckets, N]`.
        bidirectional: Half of the buckets for keys after the query, half for those before it. If
            False, all are for keys before it, and every key after it shares bucket 0.
        num_buckets: Must be the number of rows of `table`, if given.
        max_distance: From here on all distances share the last bucket. At most 2^20.
        offset: As in `masks.causal`. With an array, differentiate with respect to the table, not to
            the bias: see above.

    Raises:
        ValueError: The table does not fit `num_buckets`, or there are too few buckets.

    Reference:
        Raffel et al. 2020, "T5", section 2.1. https://arxiv.org/abs/1910.10683
    """
    table = as_floating("table", table)
    check_flag("bidirectional", bidirectional)
    if table.ndim != 2:
        raise ValueError(f"table must be [num_buckets, N], got shape {table.shape}.")
    if num_buckets is not None and as_size("num_buckets", num_buckets) != table.shape[0]:
        raise ValueError(
            f"num_buckets must be the number of rows of table: got {num_buckets} and shape "
            f"{table.shape}."
        )
    fewest = 4 if bidirectional else 2
    if table.shape[0] < fewest or table.shape[0] % (fewest // 2):
        raise ValueError(
            f"table must have at least {fewest} rows{' and an even number' * bidirectional}, got "
            f"shape {table.shape}."
        )
    as_size("max_distance", max_distance, table.shape[0] // fewest + 1, maximum=2**20)
    return Relative(table, bool(bidirectional), int(max_distance), as_offset(offset))


def relative_buckets(
    distance: Array, num_buckets: int, bidirectional: bool, max_distance: int
) -> Array:
    """T5's bucket of each distance s - t: exact for near keys, logarithmic for far ones."""
    if bidirectional:
        num_buckets //= 2
        first = jnp.where(distance > 0, num_buckets, 0)
        distance = jnp.abs(distance)
    else:
        first = 0
        distance = jnp.maximum(-distance, 0)
    lookup = _one_sided_buckets(num_buckets, max_distance)
    return first + jnp.asarray(lookup)[jnp.minimum(distance, max_distance)]


@functools.lru_cache
def _one_sided_buckets(num_buckets: int, max_distance: int) -> np.ndarray:
    """The bucket of every distance 0 ... max_distance.

    Distance n is in logarithmic bucket j when log(n / exact) / log(max_distance / exact) * rest
    reaches j. Where the quotient is close to an integer, whole numbers are compared, because a
    floating-point logarithm may miss by one.
    """
    exact = num_buckets // 2
    rest = num_buckets - exact
    far = np.arange(exact, max_distance + 1)
    reached = np.log(far / exact) * rest / np.log(max_distance / exact)
    buckets = np.floor(reached).astype(int)
    for i in np.flatnonzero(abs(reached - np.rint(reached)) < 1e-6):
        n, j = int(far[i]), round(reached[i])
        buckets[i] = j if n**rest * exact**j >= max_distance**j * exact**rest else j - 1
    near = np.arange(min(exact, max_distance + 1))
    return np.concatenate([near, exact + np.minimum(buckets, rest - 1)]).astype(np.int32)


def rule(fn: Callable, *arrays: Array) -> Bias:
    """A bias of one's own: `fn(t, s, *arrays)` is added to the logit of query t and key s.

    Args:
        fn: Takes positions, t `[t, 1]` and s `[s]` integers, and gives floating-point numbers that
            broadcast to `[t, s]`; -inf means masked. It is called for parts of the logits, so it
            must decide by positions. Rules with the same function are equal, so define it once:
            each new function is compiled anew.
        arrays: What fn needs; they may be traced, and those of floating-point numbers are learnt.
            Of `[..., N, x, y]` fn sees the `[x, y]` of one batch row and head; leading axes of 1
            serve all. Arrays of fewer axes it sees whole. If arrays are learnt, fn and its
            derivative must be finite for masked pairs too: NaN times 0 is NaN. With arrays of
            integers, differentiate with respect to the others, not to the bias: see above.

    Raises:
        ValueError: fn gives another shape, or uses a traced array that is not handed over.
        TypeError: fn gives no floating-point numbers.

    Reference:
        Dong et al. 2024, "Flex Attention", section 3. https://arxiv.org/abs/2412.05496

    >>> slopes = alibi_slopes(8)[:, None, None]
    >>> rule(lambda t, s, slope: -slope * abs(t - s), slopes)
    rule(<lambda>, [8, 1, 1])
    """
    return Own(fn, own_rules.as_arrays("biases.rule", fn, arrays, "floating-point numbers"))


def shifted(bias: Bias, offset: int | Array) -> Bias:
    """`bias` for queries that are the tokens `offset, offset + 1, ...` of the sequence.

    Rules count from the sequence's start; an array is that of these queries.
    """
    return Shifted(bias, as_offset(offset))


def of_tokens(bias: Bias, places: Array) -> Bias:
    """`bias` for queries that are the tokens `places` of the sequence, `[..., P]` integers.

    The sequence is that of the keys: queries and keys are the same tokens, T = S.
    Rules go by the tokens; an array keeps the rows of these tokens.
    """
    places = as_tokens(places)
    return OfTokens(as_bias(bias).of_tokens(places), places)


def placed(bias: Bias, positions: Array, key_positions: Array | None = None) -> Bias:
    """`bias` for tokens whose positions are `positions`, not their places in the row.

    Distances are those of positions; an array is that of these tokens. As with an array `offset`,
    make the bias inside the differentiated function.

    Args:
        bias: Any rule.
        positions: `[..., T]` integers: where the queries stand.
        key_positions: `[..., S]` integers; the default is `positions`.
    """
    positions = as_integers("positions", positions, axes=1)
    if key_positions is None:
        key_positions = positions
    key_positions = as_integers("key_positions", key_positions, axes=1)
    check_alike("positions and key_positions", positions.shape[:-1], key_positions.shape[:-1])
    return Placed(as_bias(bias), positions, key_positions)


def as_bias(bias: "Bias | Array") -> Bias:
    """A bias unchanged, or a floating-point array as a bias."""
    if isinstance(bias, Bias):
        return bias
    if isinstance(bias, Rule):
        raise TypeError(
            f"bias must be an array or a biases.* value, got a mask: write mask={bias!r}."
        )
    if not is_array(bias):
        raise TypeError(f"bias must be an array or a biases.* value, got {type(bias).__name__}.")
    if bias.dtype == bool:
        raise TypeError("bias must be numbers, got bool: a boolean array is a mask, write mask=...")
    check_floating("bias", bias)
    with jax.debug_infs(False):  # -inf is allowed: it means masked.
        return Dense(jnp.asarray(bias))
