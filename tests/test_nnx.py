"""Layers and models in flax nnx, through its bridge, are the linen ones."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from flax.errors import ModifyScopeVariableError
from flax.nnx.bridge import ToNNX

import attention_jax
from attention_jax import masks
from attention_jax.training.model import make_sequence_model

B, T, D = 2, 5, 8
X = jax.random.normal(jax.random.key(1), (B, T, D))
TOKENS = jnp.arange(B * T).reshape(B, T) % 7
DROPPING = attention_jax.MultiHeadAttention(num_heads=2, dropout_rate=0.5)
MODULES = {
    "one head": (attention_jax.SingleHeadAttention(), X),
    "heads": (attention_jax.MultiHeadAttention(4, 2, rotary=True, qk_norm="rms", sinks=True), X),
    "differential": (attention_jax.DifferentialAttention(2), X),
    "gated delta": (attention_jax.GatedDeltaAttention(2), X),
    "model": (
        make_sequence_model(
            D, 2, 2, vocab_size=7, causal=True, positions="learned", max_length=T, mlp_ratio=1
        ),
        TOKENS,
    ),
}


def in_nnx(module, inputs, **options):
    rngs = nnx.Rngs(params=0, dropout=1)
    return ToNNX(module, rngs=rngs).lazy_init(inputs, mask=masks.causal(), **options)


def carry(params, layer):
    """From linen to nnx."""
    state = nnx.state(layer, nnx.Param)
    nnx.replace_by_pure_dict(state, params)
    nnx.update(layer, state)


SLOW = ("one head", "differential", "gated delta")


@pytest.mark.parametrize(
    "name", [pytest.param(x, marks=[pytest.mark.slow] * (x in SLOW)) for x in MODULES]
)
def test_parameters_move_both_ways_with_equal_outputs_and_gradients(name):
    module, inputs = MODULES[name]
    params = module.init(jax.random.key(2), inputs, mask=masks.causal())["params"]
    layer = in_nnx(module, inputs)
    carry(params, layer)
    back = nnx.to_pure_dict(nnx.state(layer, nnx.Param))
    jax.tree.map(np.testing.assert_array_equal, back, params)

    def linen_loss(params):
        return (module.apply({"params": params}, inputs, mask=masks.causal()) ** 2).sum()

    @nnx.jit
    def in_one_program(layer):
        loss = lambda layer: (layer(inputs, mask=masks.causal()) ** 2).sum()
        return nnx.value_and_grad(loss)(layer)

    want, want_grads = jax.jit(jax.value_and_grad(linen_loss))(params)
    found, grads = in_one_program(layer)
    np.testing.assert_allclose(found, want, rtol=1e-6)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4),
        nnx.to_pure_dict(grads),
        want_grads,
    )


def test_each_call_draws_the_next_key_of_dropout():
    layers = [in_nnx(DROPPING, X, deterministic=True) for _ in range(2)]
    run = nnx.jit(lambda layer: layer(X, deterministic=False))
    first, second = ([run(layer), run(layer)] for layer in layers)
    assert np.abs(first[0] - first[1]).max() > 1e-3
    np.testing.assert_array_equal(first, second)  # The same seed, the same keys.
    params = nnx.to_pure_dict(nnx.state(layers[0], nnx.Param))
    rngs = {"dropout": nnx.Rngs(dropout=3).dropout()}
    want = DROPPING.apply({"params": params}, X, deterministic=False, rngs=rngs)
    found = layers[0](X, deterministic=False, rngs=nnx.Rngs(dropout=3))
    np.testing.assert_allclose(found, want, atol=1e-6)


def test_a_cache_gives_what_the_whole_gives_and_may_be_cleared():
    module, _ = MODULES["heads"]
    whole, decoder = in_nnx(module, X), in_nnx(module.clone(decode=True), X)
    params = nnx.to_pure_dict(nnx.state(whole, nnx.Param))
    carry(params, decoder)
    want = whole(X, mask=masks.causal())
    decode = nnx.jit(lambda layer, x: layer(x, mask=masks.causal(), mutable=["cache"]))
    empty = jax.tree.map(jnp.zeros_like, nnx.state(decoder, nnx.Cache))
    for _ in range(2):
        out = jnp.concatenate([decode(decoder, X[:, t : t + 1]) for t in range(T)], axis=1)
        np.testing.assert_allclose(out, want, atol=1e-5)
        nnx.update(decoder, empty)
    with pytest.raises(ModifyScopeVariableError, match="cache"):
        decoder(X[:, :1], mask=masks.causal())


def test_weights_are_shown_as_intermediates():
    module, _ = MODULES["heads"]
    layer = in_nnx(module, X)
    layer(X, mask=masks.causal(), sow_weights=True, mutable=["intermediates"])
    (weights,) = nnx.pop(layer, nnx.Intermediate)["attention_weights"].get_value()
    assert weights.shape == (B, 4, T, T)
    assert not np.triu(weights, 1).any()
