"""The contract of scaled dot-product attention, row by row, for every implementation of it."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from cases import (
    DOT_PRODUCT,
    SCENARIOS,
    Sizes,
    assert_close,
    compute,
    every_dot_product,
    expected,
    problem,
    random_mask,
    random_qkv,
    value_and_pull,
)

from attention_jax import dot_product_attention, masks

# Numbers.


# Tiles compile slowly: every second scenario is for `pytest -m slow`.
SOME_SCENARIOS = [
    pytest.param(
        case,
        name,
        id=f"{name}-{case.name}",
        marks=pytest.mark.slow if case.name == "blockwise" and i % 2 else (),
    )
    for i, name in enumerate(SCENARIOS)
    for case in DOT_PRODUCT
]


@pytest.mark.parametrize(("case", "name"), SOME_SCENARIOS)
def test_float32_matches_the_definition(case, name):
    out, lse, grads = compute(case, name, "float32")
    want_out, want_lse, want_grads = expected(name, "float32")
    assert_close(out, want_out, 2e-6, "out")
    assert_close(lse, want_lse, 2e-6, "logsumexp")
    assert grads.keys() == want_grads.keys()
    for leaf, grad in grads.items():
        assert_close(grad, want_grads[leaf], 1e-5, leaf)


@every_dot_product
@pytest.mark.parametrize("name", ["holes in the bias", "relative", "everything"])
def test_float64_stays_float64(case, name, x64):
    out, lse, grads = compute(case, name, "float64")
    want_out, want_lse, want_grads = expected(name, "float64")
    assert out.dtype == np.float64
    assert_close(out, want_out, 1e-12, "out")
    assert_close(lse, want_lse, 1e-12, "logsumexp")
    for leaf, grad in grads.items():
        assert grad.dtype == np.float64
        assert_close(grad, want_grads[leaf], 1e-11, leaf)


@every_dot_product
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("name", ["bias", "causal", "long"])
def test_half_precision_is_no_worse_than_twice_the_naive_error(case, name, dtype):
    # The gradients of the outputs alone: the naive computation has no logsumexp.
    out, lse, grads = compute(case, name, dtype, through_residual=False)
    want_out, _, want_grads = expected(name, dtype, through_residual=False)
    assert out.dtype == jnp.dtype(dtype)
    assert lse.dtype == np.float32

    inputs, d_out, _ = problem(name, dtype)
    qkv = [inputs[k] for k in ("query", "key", "value")]
    settings = SCENARIOS[name].oracle({k: x for k, x in inputs.items() if k == "bias"})
    naive_out, naive_grads = oracles.naive(*qkv, d_out, jnp.dtype(dtype), **settings)

    def error(got, want):
        return np.abs(oracles.f64(got) - want).max()

    assert error(out, want_out) <= 2 * error(naive_out, want_out)
    for leaf, naive_grad in naive_grads.items():
        assert grads[leaf].dtype == jnp.dtype(dtype)
        allowed = 3 * error(naive_grad, want_grads[leaf])
        assert error(grads[leaf], want_grads[leaf]) <= allowed, leaf


@every_dot_product
def test_large_logits_do_not_overflow(case):
    query, key, value = random_qkv()
    run = value_and_pull(case.attend)
    out, grads = run(1e4 * query, 1e4 * key, jnp.ones_like(value))
    assert_close(out, np.ones(out.shape), 1e-6)
    assert all(np.isfinite(grad).all() for grad in grads)


@every_dot_product
def test_logits_are_scaled_then_capped_then_biased_then_masked(case):
    # One query, two keys: each order of the four operations gives other weights.
    query, key = jnp.full((1, 1, 1), 4.0), jnp.array([[[1.0]], [[-1.0]], [[5.0]]])
    value = jnp.eye(3)[:, None, :]
    bias, mask = jnp.array([[[3.0, 0.0, 100.0]]]), jnp.array([True, True, False])
    out = case.attend(query, key, value, bias, mask, scale=0.5, softcap=2.0)
    logits = np.array([2 * np.tanh(1.0) + 3, -2 * np.tanh(1.0)])
    weights = np.exp(logits) / np.exp(logits).sum()
    assert_close(out[0, 0], [*weights, 0.0], 2e-6)


@every_dot_product
def test_numpy_arrays_are_arrays(case):
    qkv = random_qkv(Sizes(batch=()))
    mask = np.ones((5, 7), bool)
    out = case.attend(*(np.asarray(x) for x in qkv), mask=mask)
    assert isinstance(out, jax.Array)
    assert_close(out, case.attend(*qkv), 1e-6)


@every_dot_product
def test_bias_of_another_float_type_keeps_the_output_type(case):
    query, key, value = (x.astype(jnp.bfloat16) for x in random_qkv(Sizes(batch=())))
    bias = jnp.ones((5, 7), jnp.float32)
    attend = lambda bias: case.attend(query, key, value, bias=bias)
    out, (grad,) = jax.eval_shape(value_and_pull(attend), bias)
    assert out.dtype == jnp.bfloat16
    assert grad.dtype == jnp.float32


# Rows that see nothing.


def empty_rows(seed=0):
    """Row 0 of every head, and every row of batch entry 1 and of head 2, see nothing."""
    mask = np.random.default_rng(seed).random((2, 6, 5, 7)) < 0.7
    mask[:, :, 0] = mask[1] = mask[:, 2] = False
    return mask


def holes(seed=0):
    return jnp.asarray(np.where(empty_rows(seed), 0.0, -np.inf), jnp.float32)


SAID_AS = pytest.mark.parametrize(
    "settings",
    [
        {"mask": empty_rows()},
        {"mask": masks.dense(empty_rows())},
        {"bias": holes()},
        {"mask": empty_rows(), "bias": holes(), "softcap": 2.0},
        {"mask": empty_rows(), "sinks": np.arange(6.0)},
    ],
    ids=["mask", "mask value", "bias", "both", "sinks"],
)


@every_dot_product
@SAID_AS
def test_empty_row_is_exact_zero_with_exact_zero_gradients(case, settings):
    query, key, value = random_qkv()
    empty = ~empty_rows().any(axis=-1)  # [B, N, T]
    out, (d_query, d_key, d_value) = value_and_pull(lambda *qkv: case.attend(*qkv, **settings))(
        query, key, value
    )
    assert not np.moveaxis(out, -2, 1)[empty].any()
    assert not np.moveaxis(d_query, -2, 1)[empty].any()
    assert np.moveaxis(d_query, -2, 1)[~empty].any()
    # Nobody in batch entry 1 sees anything: its keys and values are not used.
    assert not d_key[1].any()
    assert not d_value[1].any()
    assert all(np.isfinite(x).all() for x in (out, d_query, d_key, d_value))


@every_dot_product
@pytest.mark.parametrize("said_as", ["mask", "bias"])
def test_empty_row_has_logsumexp_minus_infinity_and_no_gradient_through_it(case, said_as):
    query, key, value = random_qkv()
    bias = holes() if said_as == "bias" else jnp.zeros((2, 6, 5, 7))
    settings = {"mask": empty_rows()} if said_as == "mask" else {}
    empty = ~empty_rows().any(axis=-1)

    def logsumexp(query, key, bias):
        _, lse = case.attend(query, key, value, bias=bias, return_residual=True, **settings)
        return jnp.moveaxis(lse, -1, 1)

    lse = jax.jit(logsumexp)(query, key, bias)
    np.testing.assert_array_equal(np.isneginf(lse), empty)
    # The cotangent arrives at every row, the empty ones included.
    d_query, d_key, d_bias = value_and_pull(logsumexp)(query, key, bias)[1]
    assert all(np.isfinite(x).all() for x in (d_query, d_key, d_bias))
    assert not np.moveaxis(d_query, -2, 1)[empty].any()
    assert not d_bias[~empty_rows()].any()


@every_dot_product
@pytest.mark.parametrize("jitted", [False, True], ids=["eager", "jit"])
def test_empty_row_makes_no_nan_on_the_way(case, jitted, debug_nans):
    attend = lambda *qkv: case.attend(*qkv, mask=empty_rows(), softcap=2.0)
    value_and_grad = jax.value_and_grad(lambda *qkv: attend(*qkv).sum(), argnums=(0, 1, 2))
    run = jax.jit(value_and_grad) if jitted else value_and_grad
    jax.block_until_ready(run(*random_qkv()))
    bias = holes()
    attend_biased = lambda *qkv: case.attend(*qkv, bias=bias)
    jax.block_until_ready(value_and_pull(attend_biased)(*random_qkv()))


@every_dot_product
@pytest.mark.parametrize("jitted", [False, True], ids=["eager", "jit"])
def test_empty_row_makes_no_infinity_on_the_way(case, jitted, debug_infs):
    attend = lambda *qkv: case.attend(*qkv, mask=masks.dense(empty_rows()))
    value_and_grad = jax.value_and_grad(lambda *qkv: attend(*qkv).sum(), argnums=(0, 1, 2))
    run = jax.jit(value_and_grad) if jitted else value_and_grad
    jax.block_until_ready(run(*random_qkv()))


# Masked garbage.

PADDING = np.arange(7) < 4  # Keys 4, 5, 6 are seen by nobody.
HUGE = float(np.finfo(np.float32).max)


def spoil(array, garbage):
    return jnp.asarray(array).at[..., 4:, :, :].set(garbage)


SAID_PADDED = pytest.mark.parametrize(
    "settings",
    [
        {"mask": PADDING},
        {"mask": masks.key_lengths(np.array([4, 4]))},
        {"bias": np.where(PADDING, 0, -np.inf).astype(np.float32)},
    ],
    ids=["array", "lengths", "bias"],
)


@every_dot_product
@SAID_PADDED
def test_what_is_masked_may_hold_anything(case, settings):
    query, key, value = random_qkv()
    run = value_and_pull(lambda *qkv: case.attend(*qkv, softcap=3.0, **settings))
    out, grads = run(query, key, value)
    assert not grads[1][:, 4:].any()
    assert not grads[2][:, 4:].any()
    spoiled = [
        *((spoil(key, garbage), value) for garbage in (np.nan, np.inf, -np.inf, HUGE, -HUGE)),
        *((key, spoil(value, garbage)) for garbage in (HUGE, -HUGE)),
        (spoil(key, np.nan), spoil(value, HUGE)),
    ]
    for key, value in spoiled:
        got_out, got_grads = run(query, key, value)
        # A NaN has tiles take another product, which on some processors ends in another last bit.
        for got, want in zip((got_out, *got_grads), (out, *grads), strict=True):
            assert_close(got, want, 3e-7)


@every_dot_product
def test_what_only_some_queries_see_reaches_no_other(case):
    # Causal, T = S: position 6 is seen by query 6 alone, which is not asked.
    query, key, value = random_qkv(Sizes(T=7, S=7))
    run = value_and_pull(lambda *qkv: case.attend(*qkv, mask=masks.causal())[:, :6])
    out, grads = run(query, key, value)
    spoiled = [(key.at[:, 6].set(1e4), value), (key, value.at[:, 6].set(HUGE))]
    for key, value in spoiled:
        got_out, got_grads = run(query, key, value)
        np.testing.assert_array_equal(got_out, out)
        for got, want in zip(got_grads, grads, strict=True):
            np.testing.assert_allclose(got, want, atol=1e-6)


@every_dot_product
def test_a_nan_key_of_the_future_changes_no_output(case):
    query, key, value = random_qkv(Sizes(T=7, S=7))
    attend = jax.jit(lambda key: case.attend(query, key, value, mask=masks.causal()))
    np.testing.assert_array_equal(attend(key.at[:, 6].set(np.nan))[:, :6], attend(key)[:, :6])


@every_dot_product
def test_masked_half_precision_garbage_stays_masked(case):
    qkv = tuple(x.astype(jnp.float16) for x in random_qkv())
    run = value_and_pull(lambda *qkv: case.attend(*qkv, mask=PADDING))
    want = run(*qkv)
    top = float(np.finfo(np.float16).max)
    got = run(qkv[0], spoil(qkv[1], np.nan), spoil(qkv[2], top))
    for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_array_equal(x, y)


@every_dot_product
def test_minus_infinity_in_the_bias_is_the_same_as_masked(case):
    query, key, value = random_qkv()
    visible = random_mask(2, 6, 5, 7)
    bias = jnp.asarray(np.random.default_rng(0).standard_normal(visible.shape), jnp.float32)
    with_holes = jnp.where(visible, bias, -jnp.inf)

    def by_mask(query, key, value, bias):
        return case.attend(query, key, value, bias=bias, mask=visible)

    def by_bias(query, key, value, bias):
        return case.attend(query, key, value, bias=bias)

    want, want_grads = value_and_pull(by_mask)(query, key, value, bias)
    got, got_grads = value_and_pull(by_bias)(query, key, value, with_holes)
    assert_close(got, want, 1e-6)
    for a, b in zip(got_grads, want_grads, strict=True):
        assert_close(a, b, 1e-6)
    assert not got_grads[-1][~visible].any()


@every_dot_product
def test_a_large_negative_bias_is_not_a_mask(case):
    # Softmax ignores what a whole row shares, however large: the row is not empty.
    query, key, value = random_qkv(Sizes(batch=()))
    out = case.attend(query, key, value, bias=jnp.full((5, 7), -1e30))
    mean = np.repeat(np.asarray(value).mean(axis=0), 2, axis=0)  # [N, V]
    assert_close(out, np.broadcast_to(mean, out.shape), 1e-5)


@every_dot_product
def test_a_sink_of_minus_infinity_is_no_sink(case):
    query, key, value = random_qkv()
    sinks = jnp.full(6, -jnp.inf)
    got = value_and_pull(lambda *qkv: case.attend(*qkv, sinks=sinks, mask=empty_rows()))
    want = value_and_pull(lambda *qkv: case.attend(*qkv, mask=empty_rows()))
    leaves = (jax.tree.leaves(run(query, key, value)) for run in (got, want))
    for x, y in zip(*leaves, strict=True):
        assert_close(x, y, 1e-6)


# Sizes.


@every_dot_product
def test_no_keys_at_all_give_zeros_with_every_setting(case):
    sizes = Sizes(S=0)
    bias, mask = jnp.zeros((2, 6, 5, 0)), np.zeros((5, 0), bool)
    attend = lambda *qkv: case.attend(
        *qkv,
        bias,
        masks.causal("end") & mask,
        softcap=1.0,
        dropout_rate=0.5,
        dropout_rng=jax.random.key(0),
        return_residual=True,
    )
    out, lse = jax.jit(attend)(*random_qkv(sizes))
    assert out.shape == sizes.out
    assert not out.any()
    assert np.isneginf(lse).all()


# What comes back.


@every_dot_product
def test_the_residual_is_the_logsumexp_of_each_row(case):
    query, key, value = random_qkv()
    _, want = oracles.dot_product(query, key, value)
    out, lse = jax.jit(functools.partial(case.attend, return_residual=True))(query, key, value)
    assert out.shape == Sizes().out
    assert lse.shape == Sizes().out[:-1]
    assert lse.dtype == jnp.float32
    assert_close(lse, want, 2e-6)


@every_dot_product
def test_two_halves_of_the_keys_merge_through_their_residuals(case):
    query, key, value = random_qkv()
    attend = jax.jit(functools.partial(case.attend, return_residual=True))
    parts = [attend(query, key[:, s], value[:, s]) for s in (slice(0, 3), slice(3, 7))]
    (left, left_lse), (right, right_lse) = parts
    share = jax.nn.sigmoid(left_lse - right_lse)[..., None]
    merged = share * left + (1 - share) * right
    assert_close(merged, case.attend(query, key, value), 5e-6)


@every_dot_product
def test_two_parts_of_the_keys_merge_exactly_when_one_of_them_has_the_sinks(case):
    """Causal: the first queries see nothing of the second part but its sinks."""
    query, key, value = random_qkv(Sizes(T=7, S=7))
    sinks = jnp.array([2.0, -3.0, 0.0, 100.0, -100.0, 1.0])

    def merged(query, key, value, sinks):
        parts = [
            case.attend(
                *(query, key[:, start:stop], value[:, start:stop]),
                mask=masks.causal(offset=-start),
                sinks=sinks if start else None,
                return_residual=True,
            )
            for start, stop in ((0, 4), (4, 7))
        ]
        (left, left_lse), (right, right_lse) = parts
        share = jax.nn.sigmoid(left_lse - right_lse)[..., None]
        return share * left + (1 - share) * right

    arrays = query, key, value, sinks
    got, grads = value_and_pull(merged)(*arrays)
    settings = {"mask": oracles.causal(7, 7), "sinks": np.asarray(sinks, np.float64)}
    want, _ = oracles.dot_product(query, key, value, **settings)
    assert_close(got, want, 2e-6)
    d_out = np.random.default_rng(11).standard_normal(want.shape).astype(np.float32)
    want_grads = oracles.dot_product_gradients(query, key, value, d_out, **settings)
    want_grads["sinks"] = want_grads["sinks"].sum(0)
    for grad, name in zip(grads, ("query", "key", "value", "sinks"), strict=True):
        assert_close(grad, want_grads[name], 1e-5, name)


@every_dot_product
@pytest.mark.parametrize(
    "mask", [masks.key_lengths(jnp.array(0)), masks.window(0, offset=9)], ids=["lengths", "window"]
)
def test_the_residual_of_a_row_that_sees_its_sink_alone_is_the_sink(case, mask, debug_nans):
    qkv = tuple(x.astype(jnp.bfloat16) for x in random_qkv(Sizes(batch=())))
    sinks = jnp.array([2.0, -3.0, 0.0, 1e4, -1e4, 1.0])
    attend = lambda sinks: case.attend(*qkv, sinks=sinks, mask=mask, return_residual=True)
    (out, residual), pull_back = jax.vjp(attend, sinks)
    assert not out.any()
    np.testing.assert_array_equal(residual, np.broadcast_to(sinks, residual.shape))
    (d_sinks,) = pull_back((jnp.ones_like(out), jnp.ones_like(residual)))
    np.testing.assert_array_equal(d_sinks, np.full(6, 5.0))  # T rows, each of slope 1.


# Not here yet. Goes when they come.


@pytest.mark.parametrize("implementation", ["cudnn"])
def test_implementation_to_come_says_so(implementation):
    with pytest.raises(NotImplementedError, match=implementation):
        dot_product_attention(*random_qkv(), implementation=implementation)
