"""The gated delta rule: the recurrence of the paper, computed without going step by step."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from cases import Sizes, assert_close, random_qkv, value_and_pull

from attention_jax import GatedDeltaAttention, gated_delta_attention, masks
from attention_jax.functional.gated_delta import causal_convolution, unit_length


def problem(sizes, dtype=np.float32, seed=0):
    """Queries, unit keys, values and both gates."""
    query, key, value = random_qkv(sizes, dtype, seed)
    rng = np.random.default_rng(seed + 1)
    log_decay, beta = rng.uniform(-2, 0, key.shape[:-1]), rng.uniform(0, 1, key.shape[:-1])
    key = key / jnp.linalg.norm(key, axis=-1, keepdims=True)
    return query, key, value, jnp.asarray(log_decay, dtype), jnp.asarray(beta, dtype)


def attend(query, key, value, log_decay, beta, **settings):
    return gated_delta_attention(query, key, value, log_decay=log_decay, beta=beta, **settings)


def expected(query, key, value, log_decay, beta):
    return oracles.gated_delta(query, key, value, log_decay=log_decay, beta=beta)


@pytest.mark.parametrize(
    ("sizes", "chunk_size"),
    [
        (Sizes(T=7, S=7), 1),
        (Sizes(batch=(), T=5, S=7, N=3, K=1), 64),
        (Sizes(batch=(), T=131, S=131, N=2, K=1, H=3, V=2), 64),
    ],
)
def test_chunks_are_the_recurrence(sizes, chunk_size):
    inputs = problem(sizes)
    out = jax.jit(functools.partial(attend, chunk_size=chunk_size))(*inputs)
    assert out.shape == sizes.out
    assert_close(out, expected(*inputs), 5e-6)


@pytest.mark.parametrize(("N", "K", "W"), [(2, 2, 6), (6, 1, 3), (4, 2, 2)])
def test_a_state_goes_on_and_value_heads_have_memories_of_their_own(N, K, W):
    T, H, V = 11, 3, 2
    query, key, _, _, _ = problem(Sizes(T=T, S=T, N=N, K=K, H=H, V=V))
    rng = np.random.default_rng(1)
    value = jnp.asarray(rng.standard_normal((2, T, W, V)), jnp.float32)
    log_decay = jnp.asarray(rng.uniform(-2, 0, (2, T, W)), jnp.float32)
    beta = jnp.asarray(rng.uniform(0, 1, (2, T, W)), jnp.float32)
    first = jnp.asarray(rng.standard_normal((2, W, H, V)), jnp.float32)
    gates = {"log_decay": log_decay, "beta": beta}
    want, last = oracles.gated_delta(query, key, value, **gates, initial_state=first)

    @jax.jit
    def in_parts(state, *arrays):
        outs = []
        for part in (slice(0, 1), slice(1, 8), slice(8, 8), slice(8, T)):
            q, k, v, g, b = (x[:, part] for x in arrays)
            out, state = gated_delta_attention(
                q, k, v, log_decay=g, beta=b, chunk_size=4, initial_state=state, return_state=True
            )
            outs.append(out)
        return jnp.concatenate(outs, axis=1), state

    out, state = in_parts(first, query, key, value, log_decay, beta)
    assert out.shape == (2, T, max(N, W), V)
    assert_close(out, want, 5e-6)
    assert_close(state, last, 5e-6)


def test_the_first_state_has_a_gradient():
    query, key, value, log_decay, beta = problem(Sizes(batch=(), T=5, S=5, N=1, K=1, H=2, V=2))
    attend = functools.partial(gated_delta_attention, query, key, value, log_decay=log_decay)
    run = jax.jit(lambda x: attend(beta=beta, initial_state=x, return_state=True))
    # The last state and the results are affine in the first state.
    x, step = jnp.ones((1, 2, 2)), jnp.asarray([[[0.5, -1.0], [2.0, 0.0]]])
    _, tangents = jax.jvp(run, (x,), (step,))
    for there, here, tangent in zip(run(x + step), run(x), tangents, strict=True):
        assert_close(tangent, there - here, 1e-5)


def test_it_is_the_rule_of_qwen_3_next():
    torch = pytest.importorskip("torch")
    theirs = pytest.importorskip("transformers.models.qwen3_next.modeling_qwen3_next")
    T, N, W, H, V = 9, 2, 4, 4, 3
    query, key, _, _, _ = problem(Sizes(T=T, S=T, N=N, K=N, H=H, V=V))
    rng = np.random.default_rng(1)
    value = rng.standard_normal((2, T, W, V), np.float32)
    log_decay = rng.uniform(-2, 0, (2, T, W)).astype(np.float32)
    beta = rng.uniform(0, 1, (2, T, W)).astype(np.float32)
    first = rng.standard_normal((2, W, H, V), np.float32)
    repeat = lambda x: np.repeat(np.asarray(x), W // N, axis=-2)
    arrays = repeat(query) * H**0.5, repeat(key), value, log_decay, beta
    arrays = [torch.from_numpy(np.array(x)) for x in arrays]
    settings = {"initial_state": torch.from_numpy(first), "output_final_state": True}
    out, state = jax.jit(functools.partial(gated_delta_attention, return_state=True))(
        query, key, value, log_decay=log_decay, beta=beta, initial_state=first
    )
    for name in ("torch_chunk_gated_delta_rule", "torch_recurrent_gated_delta_rule"):
        q, k, v, g, b = arrays
        want, last = getattr(theirs, name)(q, k, v, g=g, beta=b, **settings)
        assert_close(out, want.numpy(), 1e-5, name)
        assert_close(state, last.numpy(), 1e-5, name)


def test_without_gates_it_is_the_plain_delta_rule_and_recalls_the_last_value(x64):
    query, key, value, _, _ = problem(Sizes(batch=(), T=9, S=9, N=2, K=2), np.float64)
    read = jax.jit(functools.partial(gated_delta_attention, chunk_size=4))
    out = read(key, key, value)
    # What was just written is read back exactly, whatever was there before.
    assert_close(out, value, 1e-12)
    out = read(query, key, value)
    assert_close(out, oracles.gated_delta(query, key, value), 1e-12)


def test_a_key_that_repeats_loses_no_digit():
    # All keys alike: every entry of the triangle is 1, and its powers are enormous.
    query, key, value = random_qkv(Sizes(batch=(), T=64, S=64, N=1, K=1, H=4, V=2))
    key = jnp.full_like(key, 0.5)
    out = jax.jit(gated_delta_attention)(query, key, value)
    assert_close(out, oracles.gated_delta(query, key, value), 2e-6)


def test_a_strong_decay_neither_overflows_nor_loses_its_gradient():
    query, key, value, _, beta = problem(Sizes(batch=(), T=9, S=9, N=1, K=1))
    run = value_and_pull(functools.partial(attend, chunk_size=8))
    out, grads = run(query, key, value, jnp.full((9, 1), -200.0), beta)
    # Of the memory only the last key is left.
    present = np.einsum("tnh,tnh->tn", query, key) * np.asarray(beta)
    assert_close(out, present[..., None] * value, 1e-6)
    assert all(np.isfinite(grad).all() for grad in grads)


def test_a_strong_decay_takes_no_digit_from_those_behind_it():
    *arrays, log_decay, beta = problem(Sizes(T=24, S=24))
    inputs = (*arrays, (0.2 * log_decay).at[:, 5].set(-1e6), beta)
    run = lambda size: value_and_pull(functools.partial(attend, chunk_size=size))(*inputs)
    (out, grads), (_, alone) = run(24), run(1)
    assert_close(out, expected(*inputs), 5e-6)
    for x, y in zip(grads, alone, strict=True):
        assert_close(x, y, 1e-5)


def test_the_decays_of_a_layer_are_float64_in_float64(x64):
    decays = []

    def attend(*arrays, log_decay, **options):
        decays.append(log_decay)
        return gated_delta_attention(*arrays, log_decay=log_decay, **options)

    layer = GatedDeltaAttention(2, param_dtype=jnp.float64, attention_fn=attend)
    inputs = jnp.asarray(np.random.default_rng(0).standard_normal((1, 4, 8)))
    variables = jax.jit(layer.init)(jax.random.key(0), inputs)
    found = jax.jit(lambda *arguments: (layer.apply(*arguments), decays[-1])[1])(variables, inputs)
    params = jax.tree.map(np.asarray, variables["params"])
    steps = np.logaddexp(0, inputs @ params["decay"]["kernel"] + params["decay_bias"])
    np.testing.assert_allclose(found, -np.exp(params["decay_rate"]) * steps, rtol=1e-14)


def test_half_precision_sums_in_float32():
    inputs = tuple(x.astype(jnp.bfloat16) for x in problem(Sizes(batch=(), T=67, S=67, N=1, K=1)))
    out = jax.jit(attend)(*inputs)
    assert out.dtype == jnp.bfloat16
    assert_close(out, expected(*inputs), 2**-7)


@pytest.mark.parametrize(
    ("settings", "error", "words"),
    [
        ({"mask": None}, NotImplementedError, "masks.causal.*None"),
        ({"mask": masks.window(2)}, NotImplementedError, "window.*dot_product_attention"),
        ({"mask": masks.causal(1)}, NotImplementedError, "offset=1"),
        ({"mask": np.ones((5, 7), bool)}, NotImplementedError, "dot_product_attention"),
        ({"chunk_size": 0}, ValueError, "chunk_size"),
        ({"beta": jnp.ones((2, 7))}, ValueError, r"beta.*\(2, 7, 3\).*\(2, 7\)"),
        ({"log_decay": jnp.ones((2, 7, 6))}, ValueError, r"log_decay.*\(2, 7, 3\)"),
        ({"log_decay": jnp.ones((2, 7, 3), int)}, TypeError, "log_decay.*int32"),
        (
            {"initial_state": jnp.ones((2, 3, 4))},
            ValueError,
            r"initial_state.*got shape \(2, 3, 4\)",
        ),
        ({"initial_state": jnp.ones((2, 3, 4, 4), int)}, TypeError, "initial_state.*int32"),
        ({"return_state": 1}, TypeError, "return_state"),
    ],
    ids=lambda x: None if isinstance(x, str) else str(x)[:20],
)
def test_what_cannot_be_is_refused(settings, error, words):
    with pytest.raises(error, match=words) as refusal:
        gated_delta_attention(*random_qkv(), **settings)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("W", [4, 9])
def test_value_heads_that_fit_no_other_heads_are_refused(W):
    query, key, _ = random_qkv(Sizes(N=6, K=3))
    value = jnp.ones((*key.shape[:-2], W, 2))
    with pytest.raises(ValueError, match=f"heads W of value.*W={W}") as refusal:
        gated_delta_attention(query, key, value)
    assert "\n" not in str(refusal.value)


def test_the_convolution_mixes_each_feature_with_its_past():
    rng = np.random.default_rng(0)
    x, kernel = rng.standard_normal((2, 5, 3)), rng.standard_normal((4, 3))
    want = np.zeros(x.shape)
    for b, t, d in np.ndindex(*x.shape):
        want[b, t, d] = sum(kernel[3 - i, d] * x[b, t - i, d] for i in range(4) if t >= i)
    got = causal_convolution(jnp.asarray(x, jnp.float32), jnp.asarray(kernel, jnp.float32))
    assert_close(got, want, 1e-6)


def test_unit_length_is_smooth_at_zero():
    x = jnp.array([[3.0, 4.0], [0.0, 0.0]])
    assert_close(unit_length(x), [[0.6, 0.8], [0.0, 0.0]], 1e-6)
    assert np.isfinite(jax.grad(lambda x: unit_length(x).sum())(x)).all()
