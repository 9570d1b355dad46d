"""Linear attention: the sum over all pairs, computed without them."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from cases import Sizes, assert_close, every_linear, random_qkv, value_and_pull

from attention_jax import linear_attention, masks


@every_linear
@pytest.mark.parametrize(
    ("T", "S"), [(7, 7), (5, 7), (7, 5), (131, 131), (131, 67), (67, 131), (128, 128)]
)
def test_causal_in_chunks_is_the_sum_over_the_past(case, T, S):
    qkv = random_qkv(Sizes(batch=(), T=T, S=S, N=2, K=1, H=3, V=2))
    attend = jax.jit(functools.partial(case.attend, mask=masks.causal()))
    assert_close(attend(*qkv), case.oracle(*qkv, mask=oracles.causal(T, S)), 5e-6)


@every_linear
def test_the_length_of_a_chunk_is_no_part_of_the_result(case):
    qkv = random_qkv(Sizes(batch=(), T=13, S=13, N=2, K=1, H=3, V=2))
    want = case.oracle(*qkv, mask=oracles.causal(13, 13))
    for chunk_size in (1, 4, 13, 99):
        attend = functools.partial(case.attend, mask=masks.causal(), chunk_size=chunk_size)
        assert_close(jax.jit(attend)(*qkv), want, 2e-6)


@every_linear
def test_half_precision_sums_in_float32(case):
    qkv = tuple(x.astype(jnp.bfloat16) for x in random_qkv(Sizes(batch=(), T=257, S=257, N=1, K=1)))
    out = jax.jit(functools.partial(case.attend, mask=masks.causal()))(*qkv)
    assert out.dtype == jnp.bfloat16
    # One rounding of the output, half a unit in the last of 8 bits.
    assert_close(out, case.oracle(*qkv, mask=oracles.causal(257, 257)), 2**-8)


@every_linear
def test_another_feature_map(case):
    qkv = random_qkv(Sizes(batch=()))
    wide = lambda x: jnp.concatenate([jax.nn.relu(x), jax.nn.relu(-x)], axis=-1)
    numpy_wide = lambda x: np.concatenate([np.maximum(x, 0), np.maximum(-x, 0)], axis=-1)
    out = case.attend(*qkv, feature_map=wide)
    assert_close(out, case.oracle(*qkv, feature_map=numpy_wide), 2e-6)


@every_linear
def test_weights_that_are_all_zero_give_zeros(case):
    out, grads = value_and_pull(lambda *qkv: case.attend(*qkv, feature_map=jax.nn.relu))(
        *(-abs(x) for x in random_qkv())
    )
    assert not out.any()
    assert all(np.isfinite(grad).all() for grad in grads)


@every_linear
@pytest.mark.parametrize(
    "mask",
    [
        masks.causal(1),
        masks.causal("end"),
        masks.window(2),
        masks.causal() & masks.key_lengths(jnp.array([1, 2])),
        ~masks.causal(),
        np.ones((5, 7), bool),
    ],
    ids=["offset", "end", "window", "and", "not", "array"],
)
def test_other_masks_are_an_honest_limit(case, mask):
    with pytest.raises(NotImplementedError, match="dot_product_attention"):
        case.attend(*random_qkv(), mask=mask)


@every_linear
def test_a_bad_feature_map_is_refused(case):
    with pytest.raises(TypeError, match="feature_map must be a function, got 'elu'"):
        case.attend(*random_qkv(), feature_map="elu")
    for sums in (lambda x: x.sum(), lambda x: None):
        with pytest.raises(ValueError, match=r"feature_map must map \(2, 6, 5, 11\)"):
            case.attend(*random_qkv(), feature_map=sums)


@every_linear
def test_a_bad_chunk_is_refused(case):
    with pytest.raises(ValueError, match="chunk_size"):
        case.attend(*random_qkv(), mask=masks.causal(), chunk_size=0)


def test_what_is_large_in_the_future_does_not_drown_the_past():
    query, key, value = (
        jnp.asarray(x, jnp.float32) for x in np.random.default_rng(0).random((3, 2, 9, 3, 5))
    )
    attend = lambda value: linear_attention(query, key, value, mask=masks.causal(), chunk_size=4)
    np.testing.assert_array_equal(attend(value)[:, :8], attend(value.at[:, 8].set(1e30))[:, :8])


@every_linear
def test_what_is_in_the_future_may_hold_anything(case):
    T, past = 7, 4  # Chunks of three: what is spoilt begins within one.
    qkv = random_qkv(Sizes(batch=(2,), T=T, S=T + 2, N=2, K=1, H=3, V=2))

    @jax.jit
    def run(*qkv):
        attend = lambda *qkv: case.attend(*qkv, mask=masks.causal(), chunk_size=3)
        out, pull_back = jax.vjp(attend, *qkv)
        rows = jnp.arange(T)[:, None, None] < past
        return out, pull_back(jnp.where(rows, jnp.cos(jnp.arange(out.size)).reshape(out.shape), 0))

    (out, grads), (query, key, value) = run(*qkv), qkv
    assert np.isfinite(out).all()
    for garbage in (np.nan, np.inf, -np.inf):
        for spoilt in (
            (query, key.at[0, past:].set(garbage), value),
            (query, key, value.at[0, past:, :, 0].set(garbage)),
        ):
            got, got_grads = run(*spoilt)
            np.testing.assert_array_equal(got[0, :past], out[0, :past])
            np.testing.assert_array_equal(got[1], out[1])
            assert np.isnan(got[0, past:]).all(), "what is seen shows"
            for grad, want in zip(got_grads, grads, strict=True):
                np.testing.assert_array_equal(grad, want)
            # Keys that come after the last query are seen by nobody.
            got, _ = run(query, *(x.at[:, T:].set(garbage) for x in (key, value)))
            np.testing.assert_array_equal(got, out)


@every_linear
def test_in_both_directions_everybody_sees_a_nan(case):
    query, key, value = random_qkv()
    for spoilt in (
        (key.at[0, 3, 1, 0].set(np.nan), value),
        (key, value.at[0, 3, 1, 0].set(np.nan)),
    ):
        seen = np.isnan(case.attend(query, *spoilt))
        assert seen[0, :, 2:4].all(), "heads 2 and 3 read key head 1"
        assert seen.sum() == seen[0, :, 2:4].size
