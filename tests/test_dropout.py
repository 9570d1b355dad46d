"""Dropout: the right share, no pattern, and the same weights in any batch, block or padding.

The tests read the mask from the outputs: equal logits and unit vectors as values turn them into
`keep / (S * (1 - rate))`. So they test every implementation, not an inner function.
"""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from cases import SMALL, Sizes, assert_close, every_dot_product, random_mask, random_qkv

from attention_jax import masks
from attention_jax.functional.dropout import keep_mask

RATE = 0.3


@functools.cache
def observed(attend, batch, N, T, S, rate, seed=0):
    """The keep mask, `[..., N, T, S]`."""

    @jax.jit
    def run(rng):
        query, key = jnp.zeros((*batch, T, N, 2)), jnp.zeros((*batch, S, 1, 2))
        value = jnp.broadcast_to(jnp.eye(S)[:, None, :], (*batch, S, 1, S))
        return attend(query, key, value, dropout_rate=rate, dropout_rng=rng)

    weights = np.moveaxis(run(jax.random.key(seed)), -2, -3)
    keep = weights > 0
    assert_close(weights, keep / (S * (1 - rate)), 1e-6)
    return keep


def assert_fair(flips, share, sigmas=5):
    """As many True as that many throws of a coin with probability `share` may give."""
    deviation = np.sqrt(share * (1 - share) / flips.size)
    assert abs(flips.mean() - share) < sigmas * deviation, f"{flips.mean():.4f}, not {share:.4f}"


@every_dot_product
@pytest.mark.parametrize("rate", [0.1, 0.5])
def test_the_rate_is_the_share_of_weights_that_are_dropped(case, rate):
    keep = observed(case.attend, (3,), 2, 61, 67, rate)
    assert_fair(keep, 1 - rate)
    for axis in range(4):
        others = tuple(i for i in range(4) if i != axis)
        deviation = np.sqrt(rate * (1 - rate) * keep.shape[axis] / keep.size)
        assert (abs(keep.mean(axis=others) - (1 - rate)) < 5 * deviation).all()


@every_dot_product
def test_batch_head_query_and_key_are_independent(case):
    keep = observed(case.attend, (3,), 2, 61, 67, 0.5)
    for shift in itertools.product((0, 1), repeat=4):
        if not any(shift):
            continue
        left = keep[tuple(slice(0, -1) if d else slice(None) for d in shift)]
        right = keep[tuple(slice(1, None) if d else slice(None) for d in shift)]
        assert_fair(left == right, 0.5)
    # A mask that is the sum of a pattern of rows and one of columns passes all of the above.
    T, S = keep.shape[-2:]
    rng = np.random.default_rng(0)
    t, s = rng.permutation(T)[:, None], rng.permutation(S)
    corners = keep ^ keep[..., t, :][..., 0, :] ^ keep[..., s] ^ keep[..., t, s]
    moved = (t[:, 0] != np.arange(T))[:, None] & (s != np.arange(S))
    assert_fair(corners[..., moved], 0.5)


@every_dot_product
def test_another_key_drops_other_weights(case):
    a, b = (observed(case.attend, (3,), 2, 61, 67, 0.5, seed=seed) for seed in (0, 1))
    assert_fair(a == b, 0.5)


@every_dot_product
def test_the_fate_of_a_weight_depends_on_its_place_alone(case):
    keep = observed(case.attend, (3,), 2, 61, 67, 0.5)
    for batch, N, T, S in [(1, 2, 5, 67), (3, 1, 61, 7)]:
        part = observed(case.attend, (batch,), N, T, S, 0.5)
        np.testing.assert_array_equal(part, keep[:batch, :N, :T, :S])


@every_dot_product
def test_the_place_does_not_depend_on_the_batch_axes_being_one_or_two(case):
    two = observed(case.attend, (2, 3), 2, 5, 7, 0.5)
    assert_fair(two[0] == two[1], 0.5)
    np.testing.assert_array_equal(observed(case.attend, (1, 3), 2, 5, 7, 0.5), two[:1])


@every_dot_product
def test_the_mask_that_is_applied_is_the_one_that_is_published(case):
    rng = jax.random.key(0)
    published = keep_mask(rng, 0.5, (2, 3), 2, 5, 7)
    np.testing.assert_array_equal(published, observed(case.attend, (2, 3), 2, 5, 7, 0.5))


@every_dot_product
def test_outputs_and_gradients_with_dropout_match_the_definition(case):
    query, key, value = random_qkv()
    rng = jax.random.key(5)
    keep = np.asarray(keep_mask(rng, RATE, (2,), SMALL.N, SMALL.T, SMALL.S))
    bias = jnp.asarray(np.random.default_rng(0).standard_normal(SMALL.logits), jnp.float32)
    visible = random_mask(*SMALL.logits)
    d_out = np.random.default_rng(1).standard_normal(SMALL.out, np.float32)
    d_lse = np.random.default_rng(2).standard_normal(SMALL.out[:-1], np.float32)

    @jax.jit
    def run(*arrays):
        def attend(query, key, value, bias):
            return case.attend(
                query,
                key,
                value,
                bias,
                visible,
                dropout_rate=RATE,
                dropout_rng=rng,
                return_residual=True,
            )

        results, pull_back = jax.vjp(attend, *arrays)
        return results, pull_back(
            (jnp.asarray(d_out, jnp.float32), jnp.asarray(d_lse, jnp.float32))
        )

    (out, lse), grads = run(query, key, value, bias)
    settings = {"mask": visible, "bias": bias, "keep": keep, "rate": RATE}
    want_out, want_lse = oracles.dot_product(query, key, value, **settings)
    want = oracles.dot_product_gradients(query, key, value, d_out, d_lse, **settings)
    assert_close(out, want_out, 2e-6)
    # Dropout comes after the softmax: the normaliser does not know of it.
    assert_close(lse, want_lse, 2e-6)
    for grad, leaf in zip(grads, ("query", "key", "value", "bias"), strict=True):
        assert_close(grad, want[leaf], 1e-5, leaf)


@every_dot_product
def test_no_dropout_when_deterministic_or_at_rate_zero(case):
    qkv = random_qkv()
    plain = case.attend(*qkv)
    for settings in (
        {"dropout_rate": 0.5, "deterministic": True},
        {"dropout_rate": 0.5, "deterministic": True, "dropout_rng": jax.random.key(0)},
        {"dropout_rate": 0.0, "dropout_rng": jax.random.key(0)},
    ):
        np.testing.assert_array_equal(case.attend(*qkv, **settings), plain)


@every_dot_product
def test_the_mean_over_many_keys_is_the_output_without_dropout(case):
    query, key, value = random_qkv(Sizes(batch=(), N=1, K=1))

    @jax.jit
    @jax.vmap
    def sample(rng):
        return case.attend(query, key, value, dropout_rate=0.5, dropout_rng=rng)

    samples = np.asarray(sample(jax.random.split(jax.random.key(0), 4096)))
    deviation = samples.std(axis=0) / 64
    plain = np.asarray(case.attend(query, key, value))
    assert (abs(samples.mean(axis=0) - plain) < 6 * deviation).all()


@every_dot_product
def test_raw_and_typed_keys_drop_the_same_weights(case):
    qkv = random_qkv()
    attend = functools.partial(case.attend, *qkv, dropout_rate=RATE)
    typed, raw = attend(dropout_rng=jax.random.key(3)), attend(dropout_rng=jax.random.PRNGKey(3))
    np.testing.assert_array_equal(typed, raw)


KINDS = ["rbg", "unsafe_rbg"]  # Beside threefry; of four words each.


def keep_of(rng):
    return np.asarray(keep_mask(rng, 0.5, (3,), 4, 5, 64))


@every_dot_product
@pytest.mark.parametrize("kind", KINDS)
def test_rows_are_independent_with_a_key_of_any_kind(case, kind):
    rng = jax.random.key(0, impl=kind)
    zeros = jnp.zeros((3, 5, 4, 2)), jnp.zeros((3, 64, 1, 2))
    value = jnp.broadcast_to(jnp.eye(64)[:, None], (3, 64, 1, 64))
    out = case.attend(*zeros, value, dropout_rate=0.5, dropout_rng=rng)
    kept = np.moveaxis(out, -2, -3) > 0
    np.testing.assert_array_equal(kept, keep_of(rng))
    assert len(np.unique(kept.reshape(-1, 64), axis=0)) == 3 * 4 * 5
    assert_fair(kept, 0.5)
    for axis in range(3):
        left, right = (np.delete(kept, end, axis) for end in (0, -1))
        assert_fair(left == right, 0.5)
    assert_fair(kept == keep_of(jax.random.key(1, impl=kind)), 0.5)


@pytest.mark.parametrize("kind", KINDS)
def test_all_words_of_a_key_count(kind):
    words = np.arange(4, dtype=np.uint32)
    keeps = [
        keep_of(jax.random.wrap_key_data(words + change, impl=kind))
        for change in np.eye(5, 4, dtype=np.uint32)  # The last one is none.
    ]
    for a, b in itertools.combinations(keeps, 2):
        assert_fair(a == b, 0.5)


@pytest.mark.parametrize("kind", KINDS)
def test_keys_under_vmap_are_keys_one_by_one(kind):
    rngs = jax.random.split(jax.random.key(0, impl=kind), 3)
    alone = [keep_of(rng) for rng in rngs]
    mapped = jax.vmap(lambda rng: keep_mask(rng, 0.5, (3,), 4, 5, 64))(rngs)
    np.testing.assert_array_equal(mapped, alone)
    assert_fair(alone[0] == alone[1], 0.5)


@pytest.mark.parametrize("default", ["threefry2x32", *KINDS])
def test_defaults_of_jax_change_no_mask_and_raw_keys_of_any_kind_are_keys(default):
    keys = [jax.random.key(3, impl=kind) for kind in ("threefry2x32", *KINDS)]
    want = [keep_of(key) for key in keys]
    raw = [np.asarray(jax.random.key_data(key)) for key in keys]
    with jax.default_prng_impl(default), jax.threefry_partitionable(False):
        assert jax.random.PRNGKey(3).shape == {"threefry2x32": (2,)}.get(default, (4,))
        for given in (keys, raw):
            np.testing.assert_array_equal([keep_of(key) for key in given], want)


@every_dot_product
def test_an_empty_row_stays_empty_under_dropout(case):
    qkv = random_qkv()
    mask = masks.key_lengths(jnp.array([0, 4]))
    out = case.attend(*qkv, mask=mask, dropout_rate=RATE, dropout_rng=jax.random.key(0))
    assert not out[0].any()
    assert np.isfinite(out).all()


@every_dot_product
@pytest.mark.parametrize("rate", [1.0, -0.1, 1.5, float("nan")])
def test_a_rate_outside_its_range_is_refused(case, rate):
    with pytest.raises(ValueError, match="dropout_rate"):
        case.attend(*random_qkv(), dropout_rate=rate, dropout_rng=jax.random.key(0))


@every_dot_product
def test_a_rate_without_a_key_is_refused(case):
    with pytest.raises(ValueError, match="dropout_rng"):
        case.attend(*random_qkv(), dropout_rate=0.5)
