"""`interop.jax_nn.dot_product_attention` is `jax.nn.dot_product_attention`, but for empty rows."""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import assert_close

from attention_jax import biases, dot_product_attention, masks
from attention_jax.interop import jax_nn

# B, T, S, N, K, H: few, because every shape is compiled anew.
SHAPES = [(2, 5, 7, 4, 2, 8), (3, 6, 6, 3, 3, 8), (1, 7, 4, 6, 1, 8)]


def normal(rng, *shape):
    return jnp.asarray(rng.standard_normal(shape), jnp.float32)


def broadcast(rng, few, B, N, T, S):
    """A shape that broadcasts to [B, N, T, S]; `few`, because every shape is compiled anew."""
    shapes = (1, N, 1, S), (T, S), (B, 1, T, 1), (N, T, S), (B, N, T, S)
    return shapes[rng.integers(2 if few else 5)]


def random_call(rng, sizes, few):
    """Arrays, settings, and which keys each query sees, `[B, N, T, S]`."""
    B, T, S, N, K, H = sizes
    maybe = lambda make: make() if rng.random() < 0.5 else None
    batch = () if B == 1 and rng.random() < 0.5 else (B,)
    arrays = [normal(rng, *batch, *rest) for rest in [(T, N, H), (S, K, H), (S, K, H)]]
    bias = maybe(lambda: normal(rng, *broadcast(rng, few, B, N, T, S)))
    settings = {
        "mask": maybe(lambda: jnp.asarray(rng.random(broadcast(rng, few, B, N, T, S)) < 0.7)),
        "is_causal": bool(rng.random() < 0.3),
        "query_seq_lengths": maybe(lambda: jnp.asarray(rng.integers(0, T + 1, B), jnp.int32)),
        "key_value_seq_lengths": maybe(lambda: jnp.asarray(rng.integers(0, S + 1, B), jnp.int32)),
        "local_window_size": [None, None, 2, (3, 1), (0, 2)][rng.integers(5)],
        "scale": [None, 0.3, -1.0][rng.integers(3)],
    }
    t, s = np.arange(T)[:, None], np.arange(S)
    seen = np.ones((B, N, T, S), bool)
    if settings["mask"] is not None:
        seen &= np.asarray(settings["mask"])
    if settings["is_causal"]:
        seen &= s <= t
    if settings["local_window_size"] is not None:
        left, right = np.broadcast_to(settings["local_window_size"], 2)
        seen &= (t - left <= s) & (s <= t + right)
    for name, place in (("query_seq_lengths", t), ("key_value_seq_lengths", s)):
        if settings[name] is not None:
            seen &= place < np.asarray(settings[name])[:, None, None, None]
    return arrays, bias, settings, seen


def assert_same_call(seed, sizes, few=False):
    rng = np.random.default_rng(seed)
    arrays, bias, settings, seen = random_call(rng, sizes, few)
    rows = np.moveaxis(seen.any(-1), 1, 2).reshape(arrays[0].shape[:-1])
    # jax.nn spreads the gradient of a row that sees nothing over all values; here it is zero.
    d_out = normal(rng, *arrays[0].shape) * rows[..., None]

    def run(attend):
        def loss(arrays, bias):
            out, residual = attend(*arrays, bias, **settings, return_residual=True)
            return (out * d_out).sum(), (out, residual)

        (_, found), grads = jax.value_and_grad(loss, (0, 1), has_aux=True)(arrays, bias)
        return found, jax.tree.leaves(grads)

    (want, want_residual), want_grads = run(jax.nn.dot_product_attention)
    (got, residual), grads = run(jax_nn.dot_product_attention)
    assert got.shape == want.shape
    assert_close(np.asarray(got)[rows], np.asarray(want)[rows], 2e-6)
    assert_close(np.asarray(residual)[rows], np.asarray(want_residual)[rows], 2e-6)
    assert not np.asarray(got)[~rows].any()
    assert np.isneginf(np.asarray(residual)[~rows]).all()
    for ours, theirs in zip(grads, want_grads, strict=True):
        assert_close(ours, theirs, 1e-5)


def test_random_calls_are_those_of_jax():
    """Values, logsumexp and gradients."""
    for seed in range(10):
        assert_same_call(seed, SHAPES[0], few=True)


@pytest.mark.slow
def test_many_random_calls_are_those_of_jax():
    for seed in range(10, 200):
        assert_same_call(seed, SHAPES[seed % len(SHAPES)])


def test_the_signature_is_that_of_jax():
    def told(function):
        parameters = inspect.signature(function).parameters.values()
        return [(p.name, p.kind, p.default) for p in parameters]

    theirs = told(jax.nn.dot_product_attention)
    # jax 0.10 to 0.12 differ in nothing; a later argument would show here.
    assert told(jax_nn.dot_product_attention) == theirs


@pytest.mark.slow
@pytest.mark.parametrize(
    ("groups", "use_vmap"), [(1, False), (2, False), (2, True), (4, False), (4, True)]
)
def test_grouped_heads_read_repeated_keys(groups, use_vmap):
    rng = np.random.default_rng(0)
    query = normal(rng, 2, 9, 4, 8).astype(jnp.bfloat16)
    key, value = (normal(rng, 2, 9, 4 // groups, 8).astype(jnp.bfloat16) for _ in range(2))
    attend = jax.vmap(jax_nn.dot_product_attention) if use_vmap else jax_nn.dot_product_attention
    out, pull = jax.vjp(attend, query, key, value)
    repeated = (jnp.repeat(x, groups, axis=2) for x in (key, value))
    want, pull_theirs = jax.vjp(jax.nn.dot_product_attention, query, *repeated)
    d_query, *grads = pull_theirs(want)
    grads = [x.reshape(2, 9, 4 // groups, groups, 8).sum(3) for x in grads]
    assert out.dtype == jnp.bfloat16
    assert_close(out, want, 0.02)
    for ours, theirs in zip(pull(want), (d_query, *grads), strict=True):
        assert_close(ours, theirs, 0.03)


def test_a_bias_in_a_batch_of_a_vmap_has_its_own_gradient():
    rng = np.random.default_rng(0)
    x, bias = normal(rng, 3, 2, 6, 4, 8), normal(rng, 3, 1, 4, 6, 6)
    mask = jnp.asarray(np.arange(6)[None, None, :] < 5)

    def gradients(attend):
        loss = lambda x, bias: (attend(x, x, x, bias, mask) ** 2).sum()
        return jax.jit(jax.vmap(jax.grad(loss, (0, 1))))(x, bias)

    got, want = gradients(jax_nn.dot_product_attention), gradients(jax.nn.dot_product_attention)
    for ours, theirs in zip(got, want, strict=True):
        assert_close(ours, theirs, 1e-5)


def test_bias_and_mask_of_a_call_without_a_batch_may_have_one():
    rng = np.random.default_rng(0)
    query, key = normal(rng, 5, 2, 8), normal(rng, 1, 7, 2, 8)
    bias, lengths = normal(rng, 1, 2, 5, 7), np.array([4])
    settings = {"bias": bias, "key_value_seq_lengths": jnp.asarray(lengths, jnp.int32)}
    got = jax_nn.dot_product_attention(query, key, key, **settings)
    assert_close(got, jax.nn.dot_product_attention(query, key, key, **settings), 2e-6)
    assert got.shape == (5, 2, 8)


def test_rules_serve_as_masks_and_biases():
    x = normal(np.random.default_rng(0), 2, 6, 4, 8)
    got = jax_nn.dot_product_attention(x, x, x, biases.alibi(4), masks.segments(jnp.arange(6) // 2))
    want = dot_product_attention(x, x, x, biases.alibi(4), masks.segments(jnp.arange(6) // 2))
    np.testing.assert_array_equal(got, want)


def test_a_row_that_a_bias_hides_is_zero():
    x = normal(np.random.default_rng(0), 1, 3, 2, 8)
    bias = jnp.zeros((1, 1, 3, 3)).at[..., 1, :].set(-jnp.inf)
    assert jnp.isnan(jax.nn.dot_product_attention(x, x, x, bias)[0, 1]).all()
    assert not jax_nn.dot_product_attention(x, x, x, bias)[0, 1].any()


def test_xla_has_forward_mode():
    x = normal(np.random.default_rng(0), 1, 3, 2, 8)

    def tangent(attend):
        return jax.jvp(lambda x: attend(x, x, x, implementation="xla"), (x,), (x,))[1]

    assert_close(tangent(jax_nn.dot_product_attention), tangent(jax.nn.dot_product_attention), 1e-5)


X = jnp.ones((2, 3, 2, 8))
REFUSED = [
    ({"query": X[0, 0]}, ValueError, r"query must be .*\(2, 8\)"),
    ({"query": X[None]}, ValueError, r"query must be .*\(1, 2, 3, 2, 8\)"),
    ({"key": X[:, :, :, :4]}, ValueError, "head size"),
    ({"query": X.astype(int)}, TypeError, "query must be .*int32"),
    ({"mask": jnp.ones((3, 3))}, TypeError, "mask must be boolean"),
    ({"mask": jnp.ones((4, 1, 3, 3), bool)}, ValueError, "mask must broadcast"),
    ({"bias": jnp.ones((5, 3))}, ValueError, "bias must broadcast"),
    ({"is_causal": "yes"}, TypeError, "is_causal must be True or False"),
    ({"return_residual": 1}, TypeError, "return_residual must be True or False"),
    ({"scale": "big"}, TypeError, "scale"),
    ({"query_seq_lengths": jnp.ones(3, int)}, ValueError, r"query_seq_lengths must be \[B\]"),
    ({"key_value_seq_lengths": jnp.ones(2)}, TypeError, "key_value_seq_lengths must hold"),
    ({"local_window_size": (1, 2, 3)}, ValueError, r"local_window_size must be \(left, right\)"),
    ({"local_window_size": -1}, ValueError, "local_window_size must be at least 0"),
    ({"local_window_size": 1.5}, TypeError, "local_window_size must be an integer"),
    ({"implementation": "flash"}, ValueError, "implementation must be one of .*xla.*'flash'"),
    ({"implementation": "cudnn"}, NotImplementedError, "cudnn"),
]


@pytest.mark.parametrize(("changes", "error", "words"), REFUSED)
def test_what_cannot_be_honoured_is_one_line(changes, error, words):
    with pytest.raises(error, match=words) as refusal:
        jax_nn.dot_product_attention(**{"query": X, "key": X, "value": X, **changes})
    assert "\n" not in str(refusal.value)
