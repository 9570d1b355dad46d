"""Biases are preferences by distance; their gradients are tested with the rest of attention."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from cases import DOT_PRODUCT, assert_close, random_qkv

from attention_jax import biases, dot_product_attention, masks
from attention_jax.functional.tiles import Tile


def as_added(bias, N, T, S):
    """What a bias adds to the logits `[N, T, S]`, read off the logsumexp of one key at a time."""
    query, key, value = jnp.zeros((T, N, 1)), jnp.zeros((S, 1, 1)), jnp.zeros((S, 1, 1))
    columns = [
        DOT_PRODUCT[0].attend(query, key, value, bias, jnp.arange(S) == s, return_residual=True)[1]
        for s in range(S)
    ]
    return np.moveaxis(np.array(columns), 0, -1).swapaxes(0, 1)


@pytest.mark.parametrize("num_heads", [1, 2, 3, 6, 8, 12])
def test_alibi_slopes_are_those_of_the_paper(num_heads):
    got = as_added(biases.alibi(num_heads), num_heads, 2, 3)
    assert_close(got, oracles.alibi(oracles.alibi_slopes(num_heads), 2, 3), 1e-6)


def test_alibi_falls_with_distance_on_both_sides():
    slopes = np.array([0.5, 2.0])
    got = as_added(biases.alibi(jnp.asarray(slopes, jnp.float32)), 2, 3, 5)
    assert_close(got, oracles.alibi(slopes, 3, 5), 1e-6)


@pytest.mark.parametrize("bidirectional", [True, False])
def test_relative_follows_the_buckets_of_t5(bidirectional):
    for num_buckets, max_distance in [(32, 128), (8, 20), (12, 243), (16, 2**20)]:
        rule = {"bidirectional": bidirectional, "max_distance": max_distance}
        table = np.arange(num_buckets, dtype=np.float32)[:, None]
        for T, S in [(1, 200), (200, 1)]:
            bias = biases.relative(jnp.asarray(table), num_buckets=num_buckets, **rule)
            got = dense_bias(bias, T, S)
            want = oracles.relative(table, T, S, num_buckets=num_buckets, **rule)
            np.testing.assert_array_equal(got, want)


def dense_bias(bias, T, S):
    """`[N, T, S]`: the gradient of the logsumexp cannot say it, so one logit is asked at a time
    through a mask; for one query or one key the whole row fits in the batch axis."""
    size = max(T, S)
    mask = np.eye(size, dtype=bool).reshape(size, 1, *((1, size) if T == 1 else (size, 1)))
    _, lse = jax.jit(DOT_PRODUCT[0].attend, static_argnames="return_residual")(
        jnp.zeros((size, T, 1, 1)),
        jnp.zeros((size, S, 1, 1)),
        jnp.zeros((size, S, 1, 1)),
        bias,
        mask,
        return_residual=True,
    )
    lse = np.asarray(lse)[..., 0]  # [size, T]
    return lse.reshape(1, 1, size) if T == 1 else np.diag(lse).reshape(1, size, 1)


def test_relative_takes_the_column_of_its_head():
    table = np.random.default_rng(0).standard_normal((8, 3)).astype(np.float32)
    rule = {"bidirectional": True, "num_buckets": 8, "max_distance": 6}
    got = as_added(biases.relative(jnp.asarray(table), **rule), 3, 4, 5)
    assert_close(got, oracles.relative(table, 4, 5, **rule), 1e-6)


def test_relative_buckets_default_to_those_of_t5():
    table = np.arange(32, dtype=np.float32)[:, None]
    got = dense_bias(biases.relative(jnp.asarray(table)), 1, 200)
    rule = {"bidirectional": True, "num_buckets": 32, "max_distance": 128}
    np.testing.assert_array_equal(got, oracles.relative(table, 1, 200, **rule))


def test_biases_learn():
    query, key, value = random_qkv()
    target = random_qkv(seed=1)[2][:, :5].repeat(2, axis=2)

    @jax.jit
    @jax.grad
    def grad(parameters):
        bias = biases.alibi(parameters["slopes"])
        other = biases.relative(parameters["table"], max_distance=20)
        out = [DOT_PRODUCT[0].attend(query, key, value, b) for b in (bias, other)]
        return sum(((x - target) ** 2).sum() for x in out)

    grads = grad({"slopes": jnp.ones(6), "table": jnp.zeros((8, 6))})
    for name, leaf in grads.items():
        assert np.isfinite(leaf).all(), name
        assert leaf.any(), name


@pytest.mark.parametrize(
    ("make", "error", "word"),
    [
        (lambda: biases.alibi(0), ValueError, "slopes|num_heads"),
        (lambda: biases.alibi(2.5), TypeError, "slopes|num_heads"),
        (lambda: biases.alibi(np.ones((2, 2), np.float32)), ValueError, "slopes"),
        (lambda: biases.alibi(np.array([1, 2])), TypeError, "slopes"),
        (lambda: biases.relative(np.ones(8, np.float32)), ValueError, "table"),
        (lambda: biases.relative(np.ones((8, 2), int)), TypeError, "table"),
        (
            lambda: biases.relative(np.ones((8, 2), np.float32), num_buckets=9),
            ValueError,
            "num_buckets",
        ),
        (
            lambda: biases.relative(np.ones((8, 2), np.float32), max_distance=0),
            ValueError,
            "max_distance",
        ),
        (lambda: biases.relative(np.ones((8, 2)), max_distance=2**29), ValueError, "max_distance"),
        (
            lambda: biases.relative(np.ones((8, 2)), num_buckets=np.ones(3)),
            TypeError,
            "num_buckets",
        ),
        (lambda: biases.relative(None), TypeError, "table"),
        (
            lambda: biases.relative(np.ones((8, 2), np.float32), bidirectional="no"),
            TypeError,
            "bidirectional.*'no'",
        ),
    ],
)
def test_a_bad_bias_is_refused(make, error, word):
    with pytest.raises(error, match=word):
        make()


def test_a_bias_becomes_an_array():
    slopes = np.array([0.5, 2.0], np.float32)
    array = np.arange(5, dtype=np.float32)
    bias = biases.alibi(slopes) + array
    want = oracles.alibi(slopes, 3, 5) + array
    assert_close(bias.materialize(3, 5), want, 1e-6)
    got = jax.jit(lambda x: biases.as_bias(x).materialize(3, 5))(array)
    np.testing.assert_array_equal(got, np.tile(array, (3, 1)))
    with pytest.raises(ValueError, match="S"):
        bias.materialize(3, 4)


def test_a_mask_is_no_bias_and_a_bias_no_mask():
    x = jnp.ones((2, 1, 4))
    with pytest.raises(TypeError, match=r"^bias must be .*, got a mask: write mask=causal\(\)"):
        dot_product_attention(x, x, x, masks.causal())
    with pytest.raises(TypeError, match=r"^mask must be .*, got a bias: write bias=alibi"):
        dot_product_attention(x, x, x, mask=biases.alibi(1))


def test_a_bias_says_what_it_is():
    said = repr(biases.alibi(6, offset=2) + np.zeros((6, 1, 7), np.float32))
    assert said == "alibi([6], offset=2) + dense([6, 1, 7])"
    said = repr(biases.relative(np.ones((8, 2), np.float32), bidirectional=False))
    assert said == "relative([8, 2], bidirectional=False, max_distance=128)"


@pytest.mark.parametrize("bias", [biases.alibi(5), biases.relative(jnp.ones((8, 5)))])
def test_a_bias_for_another_number_of_heads_is_refused(bias):
    for case, jit in itertools.product(DOT_PRODUCT, (jax.jit, lambda f: f)):
        with pytest.raises(ValueError, match="bias"):
            jit(case.attend)(*random_qkv(), bias)


def test_a_bias_of_the_wrong_size_is_refused_not_sliced():
    query, key, value = random_qkv()
    for bias in (jnp.ones((9, 11)), biases.alibi(6) + jnp.ones((9, 11)), jnp.ones((2, 2))):
        with pytest.raises(ValueError, match="bias must broadcast"):
            dot_product_attention(query, key, value, bias)


@pytest.mark.parametrize("rank", [1, 2])
def test_minus_infinity_is_a_word_also_where_infinities_are_errors(rank, debug_infs):
    query, key, value = random_qkv()
    holes = (
        np.where(np.arange(7) % 2, -np.inf, 0).astype(np.float32).reshape((1,) * (rank - 1) + (7,))
    )
    mask = np.arange(7) % 2 == 0
    for case in DOT_PRODUCT:
        got = case.attend(query, key, value, holes)
        assert_close(got, case.attend(query, key, value, mask=mask), 1e-6)
        slopes, zeros = biases.alibi(6), np.zeros(7, np.float32)
        got = case.attend(query, key, value, slopes + holes + zeros)
        assert_close(got, case.attend(query, key, value, slopes, mask), 1e-6)


def test_slopes_learn_beside_an_offset_of_each_row():
    query, key, value = random_qkv()
    offsets = jnp.array([1, 3])

    def loss(slopes):
        bias = biases.alibi(slopes, offset=offsets)
        return (DOT_PRODUCT[0].attend(query, key, value, bias) ** 2).sum()

    def by_hand(slopes):
        distance = abs(jnp.arange(5)[:, None] + offsets[:, None, None, None] - jnp.arange(7))
        bias = -slopes[:, None, None] * distance
        return (DOT_PRODUCT[0].attend(query, key, value, bias) ** 2).sum()

    slopes = jnp.linspace(0.1, 1, 6)
    got, want = jax.jit(lambda slopes: (jax.grad(loss)(slopes), jax.grad(by_hand)(slopes)))(slopes)
    assert_close(got, want, 1e-5)


@pytest.mark.parametrize("kind", ["alibi", "relative"])
def test_distances_are_those_of_positions(kind):
    # Some of them the same, some behind others, some before the start.
    at = np.array([[0, 3, 4, -2, 90, 3, 7], [5, 5, 1, 0, 200, -8, 2]])
    rng = np.random.default_rng(0)
    numbers = rng.standard_normal(6 if kind == "alibi" else (8, 6)).astype(np.float32)
    make = getattr(biases, kind)
    rule = {"bidirectional": True, "num_buckets": 8, "max_distance": 20}
    want = np.zeros((2, 6, 5, 7))
    for b, n, t, s in np.ndindex(want.shape):
        here, there = at[b, t + 1], at[b, s]
        if kind == "alibi":
            want[b, n, t, s] = -numbers[n] * abs(here - there)
        else:
            want[b, n, t, s] = numbers[oracles.relative_bucket(here, there, **rule), n]
    query, key, value = random_qkv()

    def loss(numbers, attend, placed):
        bias = make(numbers, **({} if kind == "alibi" else {"max_distance": 20}))
        bias = biases.placed(bias, at[:, 1:6], at)
        out = attend(query, key, value, bias if placed else bias.tile(Tile.whole(5, 7)))
        return (out**2).sum(), out

    bias = make(jnp.asarray(numbers), **({} if kind == "alibi" else {"max_distance": 20}))
    got = biases.placed(bias, at[:, 1:6], at).tile(Tile.whole(5, 7))
    assert_close(got, want, 1e-6)
    for case in DOT_PRODUCT:
        step = jax.grad(functools.partial(loss, attend=case.attend), has_aux=True)
        both = jax.jit(lambda x, step=step: (step(x, placed=True), step(x, placed=False)))
        for a, b in zip(*both(jnp.asarray(numbers)), strict=True):
            assert_close(a, b, 3e-5)  # Distances of 200 are rounded in another order.


@pytest.mark.parametrize("kind", ["alibi", "relative", "dense", "placed", "rule"])
def test_the_bias_of_some_tokens_has_their_rows(kind):
    tokens = np.array([[0, 3, 6, 6, 2], [5, 1, 1, 0, 4]])
    rng = np.random.default_rng(0)
    table, slopes = rng.standard_normal((8, 6)), rng.standard_normal(6)
    make = {
        "alibi": lambda x: biases.alibi(x),
        "relative": lambda x: biases.relative(x, max_distance=20),
        "dense": lambda x: biases.as_bias(x),
        "placed": lambda x: biases.placed(biases.alibi(x), np.arange(14).reshape(2, 7) % 5),
        "rule": lambda x: biases.rule(lambda t, s, x: x * (t - 2 * s), x[:, None, None]),
    }[kind]
    numbers = {"relative": table, "dense": rng.standard_normal((6, 7, 7))}.get(kind, slopes)
    query, key, value = random_qkv()

    def loss(numbers, attend, chosen):
        bias, whole = make(numbers), Tile.whole(7, 7)
        some = biases.of_tokens(bias, tokens)
        if not chosen:
            every = jnp.broadcast_to(bias.tile(whole), (2, 6, 7, 7))
            some = jnp.take_along_axis(every, tokens[:, None, :, None], axis=2)
        out = attend(query, key, value, some)
        return (out**2).sum(), out

    for case in DOT_PRODUCT:
        step = jax.grad(functools.partial(loss, attend=case.attend), has_aux=True)
        both = jax.jit(lambda x, step=step: (step(x, chosen=True), step(x, chosen=False)))
        for a, b in zip(*both(jnp.asarray(numbers, jnp.float32)), strict=True):
            assert_close(a, b, 1e-5)


def test_positions_that_do_not_fit_a_bias_are_refused():
    for make, error, words in [
        (lambda: biases.placed(biases.alibi(6), np.ones(5)), TypeError, "positions.*float64"),
        (lambda: biases.placed(biases.alibi(6), np.array(5)), ValueError, "positions"),
    ]:
        with pytest.raises(error, match=words):
            make()
    for case in DOT_PRODUCT:
        with pytest.raises(ValueError, match=r"placed\(alibi.*T=4, S=4.*T=5, S=7"):
            case.attend(*random_qkv(), biases.placed(biases.alibi(6), np.arange(4)))
