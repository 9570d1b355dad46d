"""Rotations keep lengths and know distances; sinusoids are the paper's."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from cases import assert_close

from attention_jax import positions


def random(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"base": 500.0},
        {"fraction": 0.5},
        {"fraction": 0.0},
        {"layout": "interleaved"},
        {"layout": "interleaved", "fraction": 0.5},
    ],
    ids=str,
)
def test_rotary_turns_the_pairs_of_its_layout(settings):
    x = random(5, 3, 12)
    want = oracles.rotary(x, range(5), **settings)
    assert_close(positions.rotary(x, **settings), want, 2e-6)


def test_rotary_takes_positions_for_each_row_of_the_batch():
    x, places = random(2, 5, 3, 4), np.array([[3, 4, 5, 6, 7], [100, 2, 2, 0, 1000]])
    want = [oracles.rotary(row, place) for row, place in zip(x, places, strict=True)]
    # float32 angles: a thousand radians are known to 6e-5.
    assert_close(positions.rotary(x, jnp.asarray(places)), np.stack(want), 1e-4)
    shared = positions.rotary(x, jnp.asarray(places[0]))
    assert_close(shared[1], oracles.rotary(x[1], places[0]), 2e-6)


def _llama3(frequency):
    """Of `llama3(8.0, 1.0, 4.0, 32)`, as the paper's code has it."""
    wavelength = 2 * math.pi / frequency
    if wavelength < 32 / 4:
        return frequency
    if wavelength > 32 / 1:
        return frequency / 8
    smooth = (32 / wavelength - 1) / (4 - 1)
    return (1 - smooth) * frequency / 8 + smooth * frequency


@pytest.mark.parametrize(
    ("scaling", "turn"),
    [
        (positions.linear(4.0), lambda frequency: frequency / 4),
        (positions.llama3(8.0, 1.0, 4.0, 32), _llama3),
        (positions.dynamic(2.0, 64), lambda frequency: frequency),  # The row is no longer.
        (lambda base, size, lengths: (jnp.full(size // 2, 0.25), 1.0), lambda frequency: 0.25),
    ],
)
def test_a_scaling_changes_the_frequencies(scaling, turn):
    x = random(5, 3, 16)
    want = oracles.rotary(x, range(5), base=100.0, turn=turn)
    assert_close(positions.rotary(x, base=100.0, scaling=scaling), want, 2e-6)


def test_a_dynamic_scaling_goes_by_the_length_of_its_own_row():
    x, places = random(2, 40, 3, 8), jnp.stack([jnp.arange(40), jnp.arange(40) // 4])
    found = positions.rotary(x, places, scaling=positions.dynamic(2.0, 16))
    stretch = (2.0 * 40 / 16 - 1) ** (8 / 6)
    assert_close(found[0], oracles.rotary(x[0], places[0], base=10_000 * stretch), 1e-5)
    assert_close(found[1], oracles.rotary(x[1], places[1]), 1e-5)


def test_yarn_keeps_fast_pairs_divides_slow_ones_and_scales():
    x, scaling = random(5, 3, 64), positions.yarn(4.0, 128)
    found = np.asarray(positions.rotary(x, scaling=scaling, base=100.0))
    grown = 0.1 * math.log(4) + 1
    same, divided = (
        grown * oracles.rotary(x, range(5), base=100.0, turn=turn)
        for turn in (lambda frequency: frequency, lambda frequency: frequency / 4)
    )
    # Pair 0 turns 20 times in 128 positions; fewer than 32, so even it is slowed a little.
    turns = 128 / (2 * math.pi) * 100.0 ** (-np.arange(32) / 32)
    slow = turns < 1
    assert slow.any()
    assert_close(found[..., :32][..., slow], divided[..., :32][..., slow], 1e-5)
    fast = positions.rotary(x, scaling=positions.yarn(4.0, 128, fast_turns=2.0), base=100.0)
    kept = turns > 2.5
    assert_close(np.asarray(fast)[..., :32][..., kept], same[..., :32][..., kept], 1e-5)
    plain = positions.rotary(x, scaling=positions.yarn(1.0, 128), base=100.0)
    assert_close(plain, positions.rotary(x, base=100.0), 1e-6)


def test_sections_turn_by_positions_of_their_own():
    x, rows, columns = random(6, 3, 8), np.arange(6) // 3, np.arange(6) % 3
    frequencies = 10.0 ** -np.arange(4)
    angles = np.where(np.arange(4) < 2, rows[:, None], columns[:, None]) * frequencies
    found = positions.rotary(x, jnp.ones(6, int), frequencies=jnp.asarray(angles, jnp.float32))
    by_rows, by_columns = (oracles.rotary(x, places, base=10.0**4) for places in (rows, columns))
    first = np.array([0, 1, 4, 5])
    want = np.where(np.isin(np.arange(8), first), by_rows, by_columns)
    assert_close(found, want, 2e-6)


def test_rotary_products_depend_on_the_distance_alone():
    query, key = random(1, 1, 8), random(1, 1, 8, seed=1)
    at = jax.jit(lambda x, place: positions.rotary(x, place[None])[0, 0])
    products = [at(query, t) @ at(key, t - 3) for t in np.arange(3, 300, 50)]
    assert_close(products, np.full(6, products[0]), 1e-4)
    assert abs(at(query, np.int32(9)) @ at(key, np.int32(4)) - products[0]) > 1e-3


def test_rotary_keeps_lengths_and_the_place_of_position_zero():
    x = random(5, 3, 8)
    out = positions.rotary(x)
    assert_close(np.linalg.norm(out, axis=-1), np.linalg.norm(x, axis=-1), 1e-6)
    np.testing.assert_array_equal(out[0], x[0])


def test_rotary_angles_are_float32_in_half_precision():
    # In bfloat16, position 1001 would be 1000: the angle of the first pair off by a radian.
    x = random(2, 1, 8).astype(jnp.bfloat16)
    out = positions.rotary(x, jnp.array([1001, 1003]))
    assert out.dtype == jnp.bfloat16
    assert_close(out, oracles.rotary(x, [1001, 1003]), 2**-7)


def test_rotary_in_float64(x64):
    x = jnp.asarray(np.random.default_rng(0).standard_normal((5, 3, 4)))
    assert x.dtype == np.float64
    assert_close(positions.rotary(x), oracles.rotary(x, range(5)), 1e-12)


@pytest.mark.parametrize(
    ("make", "error", "word"),
    [
        (lambda: positions.rotary(random(5, 3, 7)), ValueError, "7"),
        (lambda: positions.rotary(random(5, 3, 8), fraction=1.5), ValueError, "fraction"),
        (lambda: positions.rotary(random(5, 3, 8), fraction=0.4), ValueError, "3"),
        (lambda: positions.rotary(random(5, 3, 8), base=0.0), ValueError, "base"),
        (lambda: positions.rotary(random(5, 3, 8), jnp.arange(4)), ValueError, "positions"),
        (lambda: positions.rotary(random(5, 3, 8), jnp.zeros((2, 5))), ValueError, "positions"),
        (lambda: positions.rotary(random(5, 8)), ValueError, "x"),
        (lambda: positions.rotary(random(5, 3, 8), layout="pairs"), ValueError, "layout.*pairs"),
        (
            lambda: positions.rotary(random(5, 3, 8), frequencies=jnp.ones(3)),
            ValueError,
            r"frequencies.*\(3,\)",
        ),
        (
            lambda: positions.rotary(
                random(5, 3, 8), frequencies=jnp.ones(4), scaling=positions.linear(2.0)
            ),
            ValueError,
            "scaling",
        ),
        (lambda: positions.rotary(random(5, 3, 8), scaling=2.0), TypeError, "scaling"),
        (lambda: positions.linear(0.0), ValueError, "factor"),
        (lambda: positions.dynamic(2.0, 0), ValueError, "original_length"),
        (lambda: positions.llama3(8.0, 4.0, 1.0), ValueError, "high_frequency_factor"),
        (lambda: positions.yarn("4", 16), TypeError, "factor"),
        (lambda: positions.rotary(jnp.ones((5, 3, 8), int)), TypeError, "x"),
        (lambda: positions.sinusoidal(5, 7), ValueError, "features"),
        (lambda: positions.sinusoidal(-1, 8), ValueError, "num_positions"),
    ],
)
def test_bad_positions_are_refused(make, error, word):
    with pytest.raises(error, match=word):
        make()


def test_sinusoidal_is_sines_then_cosines():
    out = positions.sinusoidal(101, 6)
    assert out.shape == (101, 6)
    assert_close(out, oracles.sinusoidal(101, 6), 1e-5)  # Angles of 100 radians in float32.
    assert_close(out[0], [0, 0, 0, 1, 1, 1], 0)
