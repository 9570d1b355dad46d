"""Rotations of queries and keys by their positions, also beyond the trained length."""

import dataclasses
import math
from collections.abc import Callable

import jax.numpy as jnp

from attention_jax.checks import (
    as_array,
    as_size,
    check_flag,
    check_floating,
    check_function,
    check_number,
    check_word,
    is_real,
    jax_defaults,
    known,
)
from attention_jax.types import Array

# From base, R and the number of positions `[..., 1]` of a row to the R / 2 frequencies, and the
# factor of the rotated coordinates.
Scaling = Callable[[float | Array, int, Array], tuple[Array, float]]
LAYOUTS = ("half", "interleaved")


@jax_defaults()
def rotary(
    x: Array,
    positions: Array | None = None,
    *,
    base: float = 10_000.0,
    fraction: float = 1.0,
    layout: str = "half",
    scaling: Scaling | None = None,
    frequencies: Array | None = None,
) -> Array:
    """Rotates pairs of coordinates by angles that grow with the position.

    The product of a rotated query and a rotated key depends on their distance alone.

    Args:
        x: Queries or keys, `[..., T, N, H]`.
        positions: `[..., T]`, broadcastable over the batch axes. Defaults to 0, 1, ..., T - 1.
        base: The wavelength of pair i is 2 pi base ** (2 i / R) positions.
        fraction: The share of the H coordinates that is rotated, the first R = fraction * H.
        layout: "half" pairs coordinate i with i + R / 2, as Llama and GPT-NeoX do; "interleaved"
            pairs 2 i with 2 i + 1, as the paper, GPT-J and Cohere do.
        scaling: Changes the frequencies for rows longer than those of training: `linear`, `llama3`,
            `yarn`, `dynamic`, or a function `(base, R, lengths) -> (frequencies, factor)` of one's
            own, with lengths `[..., 1]` and frequencies that broadcast to `[..., T, R / 2]`.
        frequencies: Radians for each position, which replace those of `base`: `[R / 2]`, or
            broadcastable to `[..., T, R / 2]`, for sections that turn by positions of their own.

    Returns:
        The shape and dtype of `x`. Angles are computed in float32 (float64 for float64 inputs).

    Raises:
        ValueError: R is odd, or `fraction` is not in [0, 1], or shapes do not fit.
        TypeError: An argument has the wrong type.

    Reference:
        Su et al. 2021, "RoFormer", equation 34. https://arxiv.org/abs/2104.09864
    """
    check_floating("x", x)
    if x.ndim < 3:
        raise ValueError(f"x must be [..., T, N, H], got shape {x.shape}.")
    check_number("fraction", fraction)
    check_number("base", base)
    check_word("layout", layout, LAYOUTS)
    if known(fraction) is None:
        raise TypeError("fraction must be known before the program runs, got a traced number.")
    fraction = known(fraction)
    if not 0 <= fraction <= 1:
        raise ValueError(f"fraction must lie in [0, 1], got {fraction}.")
    if known(base) is not None and not known(base) > 0:
        raise ValueError(f"base must be positive, got {base}.")
    T, H = x.shape[-3], x.shape[-1]
    rotated = round(fraction * H)
    if rotated % 2:
        raise ValueError(
            f"fraction must rotate an even number of coordinates, got {rotated} of head size {H}."
        )
    positions = jnp.arange(T) if positions is None else as_array("positions", positions)
    if not is_real(positions.dtype):
        raise TypeError(f"positions must be real numbers, got {positions.dtype}.")
    batch = x.shape[:-3]
    if positions.ndim == 0 or not _broadcasts(positions.shape, (*batch, T)):
        raise ValueError(
            f"positions must broadcast to [..., T] = {(*batch, T)}, got shape {positions.shape}."
        )

    dtype, factor = jnp.promote_types(x.dtype, jnp.float32), 1.0
    if frequencies is not None:
        if scaling is not None:
            raise ValueError("frequencies replace those of scaling: give one of the two.")
        frequencies = as_array("frequencies", frequencies)
    elif scaling is not None:
        check_function("scaling", scaling)
        lengths = jnp.max(positions, axis=-1, keepdims=True, initial=0) + 1
        frequencies, factor = scaling(base, rotated, lengths)
    else:
        frequencies = _frequencies(base, rotated, dtype)
    wanted = (*batch, T, rotated // 2)
    if frequencies.ndim == 0 or not _broadcasts(frequencies.shape, wanted):
        raise ValueError(
            f"frequencies must broadcast to [..., T, R / 2] = {wanted}, got shape "
            f"{frequencies.shape}."
        )
    angles = positions[..., None].astype(dtype) * frequencies.astype(dtype)
    angles = angles[..., None, :]  # [..., T, 1, R / 2]
    cos, sin = jnp.cos(angles) * factor, jnp.sin(angles) * factor
    turned = x[..., :rotated].astype(dtype)
    if layout == "half":
        first, second = jnp.split(turned, 2, axis=-1)
    else:
        first, second = turned[..., ::2], turned[..., 1::2]
    turned = first * cos - second * sin, second * cos + first * sin
    if layout == "half":
        turned = jnp.concatenate(turned, axis=-1)
    else:
        turned = jnp.stack(turned, axis=-1).reshape(*x.shape[:-1], rotated)
    turned = turned.astype(x.dtype)
    return turned if rotated == H else jnp.concatenate([turned, x[..., rotated:]], axis=-1)


def _broadcasts(shape, target) -> bool:
    pairs = zip(reversed(shape), reversed(target), strict=False)
    return len(shape) <= len(target) and all(n in (1, m) for n, m in pairs)


def _frequencies(base, rotated, dtype=float) -> Array:
    """Radians for each position, `[R / 2]`."""
    pairs = jnp.arange(rotated // 2, dtype=dtype)
    return base ** (-2 * pairs / max(rotated, 1))


# The scalings are values: two of the same settings are equal. Lower case, as masks and biases.


@dataclasses.dataclass(frozen=True)
class linear:
    """Divides all positions by `factor`.

    Reference:
        Chen et al. 2023, "Extending Context Window of Large Language Models via Positional
        Interpolation", equation 4. https://arxiv.org/abs/2306.15595
    """

    factor: float

    def __post_init__(self):
        _check_positive(self)

    def __call__(self, base, rotated, lengths):
        return _frequencies(base, rotated) / self.factor, 1.0


@dataclasses.dataclass(frozen=True)
class dynamic:
    """Enlarges the base with the length of the row, once that is beyond `original_length`.

    The frequencies of a row are those of its largest position. So keys that a cache holds would
    be rotated by other frequencies than later ones, and layers refuse it in decoding.

    Attributes:
        factor: How many times the length of training is to be reached.
        original_length: The length of training.

    Reference:
        Peng et al. 2023, "YaRN", appendix A.1 ("Dynamic NTK"). https://arxiv.org/abs/2309.00071
    """

    factor: float
    original_length: int

    def __post_init__(self):
        _check_positive(self)

    def __call__(self, base, rotated, lengths):
        if rotated <= 2:  # One pair, whose frequency is 1 for every base.
            return _frequencies(base, rotated), 1.0
        lengths = jnp.maximum(lengths, self.original_length).astype(jnp.float32)
        stretch = self.factor * lengths / self.original_length - (self.factor - 1)
        base = base * stretch ** (rotated / (rotated - 2))
        return _frequencies(base[..., None], rotated), 1.0  # [..., 1, R / 2]


@dataclasses.dataclass(frozen=True)
class llama3:
    """Llama 3.1's: divides slow frequencies by `factor`, keeps fast ones, and blends between.

    Attributes:
        factor: Divides the frequencies whose wavelength is above `original_length /
            low_frequency_factor` positions.
        low_frequency_factor: See `factor`.
        high_frequency_factor: Wavelengths below `original_length / high_frequency_factor` stay.
        original_length: The length of training.

    Reference:
        Grattafiori et al. 2024, "The Llama 3 Herd of Models", section 3.2, and the model's code.
        https://arxiv.org/abs/2407.21783
    """

    factor: float
    low_frequency_factor: float = 1.0
    high_frequency_factor: float = 4.0
    original_length: int = 8192

    def __post_init__(self):
        _check_positive(self)
        if not self.high_frequency_factor > self.low_frequency_factor:
            raise ValueError(
                "high_frequency_factor must be above low_frequency_factor, got "
                f"{self.high_frequency_factor} and {self.low_frequency_factor}."
            )

    def __call__(self, base, rotated, lengths):
        frequencies = _frequencies(base, rotated)
        turns = self.original_length * frequencies / (2 * math.pi)  # In the length of training.
        low, high = self.low_frequency_factor, self.high_frequency_factor
        kept = jnp.clip((turns - low) / (high - low), 0, 1)
        return frequencies * (kept + (1 - kept) / self.factor), 1.0


@dataclasses.dataclass(frozen=True)
class yarn:
    """YaRN: keeps pairs with many turns in the trained length, divides the others by `factor`.

    Attributes:
        factor: How many times the length of training is to be reached.
        original_length: The length of training.
        fast_turns: Pairs with more turns than this in `original_length` keep their frequency.
        slow_turns: Pairs with fewer turns get it divided by `factor`.
        attention_factor: Multiplies rotated queries and keys. None is 0.1 ln(factor) + 1.
        truncate: Rounds the ends of the blend to whole pairs, as the paper's code does.

    Reference:
        Peng et al. 2023, "YaRN", definition 2 and equation 22. https://arxiv.org/abs/2309.00071
    """

    factor: float
    original_length: int
    fast_turns: float = 32.0
    slow_turns: float = 1.0
    attention_factor: float | None = None
    truncate: bool = True

    def __post_init__(self):
        _check_positive(self)
        check_flag("truncate", self.truncate)

    def __call__(self, base, rotated, lengths):
        frequencies = _frequencies(base, rotated)

        def pair(turns):
            """The pair, counted with fractions, that turns so often."""
            return (
                rotated
                * jnp.log(self.original_length / (turns * 2 * math.pi))
                / (2 * jnp.log(base))
            )

        first, last = pair(self.fast_turns), pair(self.slow_turns)
        if self.truncate:
            first, last = jnp.floor(first), jnp.ceil(last)
        first, last = jnp.maximum(first, 0), jnp.minimum(last, rotated - 1)
        last = jnp.where(first == last, last + 1e-3, last)
        divided = jnp.clip((jnp.arange(rotated // 2) - first) / (last - first), 0, 1)
        factor = self.attention_factor
        if factor is None:
            factor = 0.1 * math.log(self.factor) + 1 if self.factor > 1 else 1.0
        return frequencies * (1 - divided + divided / self.factor), factor


def _check_positive(scaling) -> None:
    """Raises an error unless every number of a scaling is positive, and the length an integer."""
    for field in dataclasses.fields(scaling):
        value = getattr(scaling, field.name)
        if field.name == "original_length":
            as_size("original_length", value)
        elif field.type is not bool and value is not None:
            check_number(field.name, value)
            if not known(value) > 0:
                raise ValueError(f"{field.name} must be positive, got {value}.")
