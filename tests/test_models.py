"""The model: what it lets through, what it keeps, and what its options leave alone."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import assert_close

from attention_jax import MultiHeadAttention, SequenceModel, SingleHeadAttention, masks

VOCAB = 17
TOKENS = jnp.asarray(np.random.default_rng(0).integers(0, VOCAB, (2, 7)), jnp.int32)
VECTORS = jnp.asarray(np.random.default_rng(1).standard_normal((2, 7, 8)), jnp.float32)
SMALL = {"features": 8, "num_heads": 2, "num_layers": 2, "mlp_ratio": 2.0}


def init(model, inputs):
    """Random parameters: those that start at zero would hide a wrong one."""
    rng = np.random.default_rng(0)
    params = jax.eval_shape(model.init, jax.random.key(0), inputs)["params"]
    return jax.tree.map(lambda x: jnp.asarray(rng.normal(0.1, 0.4, x.shape), x.dtype), params)


@functools.lru_cache
def compiled(model, deterministic):
    return jax.jit(functools.partial(model.apply, deterministic=deterministic))


def run(model, params, inputs, *, deterministic=True, **settings):
    return compiled(model, deterministic)({"params": params}, inputs, **settings)


@pytest.mark.parametrize("attention", ["multihead", "selfhead"])
def test_the_smallest_model_is_the_bare_attention_layer(attention):
    model = SequenceModel(features=8, num_heads=2, attention=attention, norm="none", residual=False)
    layer = MultiHeadAttention(num_heads=2) if attention == "multihead" else SingleHeadAttention()
    params = init(model, VECTORS)
    want = jax.eval_shape(layer.init, jax.random.key(0), VECTORS)["params"]

    def attention_params(tree):
        """The subtree with the parameters of the layer, wherever the model keeps it."""
        if set(want) <= set(tree):
            return {name: tree[name] for name in want}
        found = [attention_params(x) for x in tree.values() if isinstance(x, dict)]
        return next((x for x in found if x), None)

    assert sum(x.size for x in jax.tree.leaves(params)) == sum(
        x.size for x in jax.tree.leaves(want)
    )
    got = run(model, params, VECTORS)
    assert_close(got, run(layer, attention_params(params), VECTORS), 1e-6)


@pytest.mark.parametrize("tie_embedding", [True, False], ids=["tied", "untied"])
def test_logits_come_at_the_asked_positions_alone(tie_embedding):
    model = SequenceModel(**SMALL, vocab_size=VOCAB, tie_embedding=tie_embedding, causal=True)
    params = init(model, TOKENS)
    every = run(model, params, TOKENS)
    assert every.shape == (2, 7, VOCAB)
    assert every.dtype == jnp.float32
    positions = jnp.array([[1, 6, 6], [0, 3, 2]])
    some = run(model, params, TOKENS, positions=positions)
    assert_close(some, np.take_along_axis(np.asarray(every), positions[..., None], axis=1), 1e-6)


def test_continuous_outputs_have_the_asked_width():
    for width in (None, 5):
        model = SequenceModel(**SMALL, out_features=width)
        out = jax.eval_shape(model.init_with_output, jax.random.key(0), VECTORS)[0]
        assert out.shape == (2, 7, width or 8)


CAUSAL = {
    "causal": {"causal": True},
    "causal, rotary, grouped": {"causal": True, "positions": "rotary", "num_kv_heads": 1},
    "causal, learned": {"causal": True, "positions": "learned", "max_length": 7},
    "causal, window": {"causal": True, "window": 1, "num_layers": 1},
    "selfhead": {"causal": True, "attention": "selfhead", "positions": "sinusoidal"},
    "rms, qk-norm": {"causal": True, "norm": "rms", "qk_norm": True},
}


@pytest.mark.parametrize("name", CAUSAL)
def test_a_causal_model_sees_no_future(name):
    options = {**SMALL, **CAUSAL[name]}
    model = SequenceModel(**options)
    params = init(model, VECTORS[:1])

    @jax.jit
    @jax.jacobian
    def influence(inputs):
        return model.apply({"params": params}, inputs[None])[0].sum(axis=-1)

    influence = np.abs(influence(VECTORS[0])).sum(axis=-1)  # [T, T]
    assert not np.triu(influence, 1).any()
    if "window" in options:
        assert not np.tril(influence, -2).any()
        assert (np.diag(influence, -1) > 0).all()
    else:
        assert (influence[np.tril_indices(7)] > 0).all()


def test_a_model_that_is_not_causal_sees_everything():
    model = SequenceModel(**{**SMALL, "num_layers": 1}, window=None)
    params = init(model, VECTORS[:1])
    attend = lambda x: model.apply({"params": params}, x[None])[0].sum(axis=-1)
    influence = np.abs(jax.jit(jax.jacobian(attend))(VECTORS[0])).sum(axis=-1)
    assert (influence > 0).all()


def test_positions_are_what_tells_orders_apart():
    order = np.array([3, 0, 6, 1, 2, 5, 4])
    for kind in ("none", "sinusoidal", "learned", "rotary"):
        model = SequenceModel(
            **SMALL, positions=kind, **({"max_length": 7} if kind == "learned" else {})
        )
        params = init(model, VECTORS)
        out, moved = (run(model, params, x) for x in (VECTORS, VECTORS[:, order]))
        if kind == "none":
            assert_close(moved, out[:, order], 1e-5)
        else:
            assert abs(moved - out[:, order]).max() > 1e-3, kind


def test_rematerialisation_changes_memory_alone():
    plain = SequenceModel(**{**SMALL, "num_layers": 1}, causal=True, dropout_rate=0.2)
    remat = plain.clone(remat=True)
    params = init(plain, VECTORS)
    assert jax.tree.structure(params) == jax.tree.structure(
        jax.eval_shape(remat.init, jax.random.key(0), VECTORS)["params"]
    )

    def grads(model):
        def loss(params):
            rngs = {"dropout": jax.random.key(0)}
            out = model.apply({"params": params}, VECTORS, deterministic=False, rngs=rngs)
            return (out**2).mean()

        return jax.jit(jax.value_and_grad(loss))(params)

    for got, want in zip(jax.tree.leaves(grads(remat)), jax.tree.leaves(grads(plain)), strict=True):
        assert_close(got, want, 1e-5)


def test_a_mask_hides_padding_from_every_layer():
    model = SequenceModel(**SMALL, vocab_size=VOCAB)
    params = init(model, TOKENS)
    mask = masks.key_lengths(jnp.array([4, 4]))
    out = run(model, params, TOKENS, mask=mask)
    other = run(model, params, TOKENS.at[:, 4:].set(3), mask=mask)
    np.testing.assert_array_equal(out[:, :4], other[:, :4])
    assert_close(out[:, :4], run(model, params, TOKENS[:, :4]), 1e-5)
    # Together with the model's own causality, not instead of it.
    causal = model.clone(causal=True)
    out = run(causal, params, TOKENS, mask=mask)
    assert_close(out[:, :3], run(causal, params, TOKENS[:, :3]), 1e-5)


def test_bfloat16_computes_with_float32_parameters_and_logits():
    model = SequenceModel(
        **SMALL, vocab_size=VOCAB, causal=True, positions="rotary", dtype=jnp.bfloat16
    )
    params = init(model, TOKENS)
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype("float32")}

    @jax.jit
    def value_and_grad(params):
        loss = lambda params: (model.apply({"params": params}, TOKENS) ** 2).mean()
        return jax.value_and_grad(loss)(params)

    out = jax.eval_shape(model.apply, {"params": params}, TOKENS)
    assert out.dtype == jnp.float32
    loss, grads = value_and_grad(params)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(grads))
    exact = (run(model.clone(dtype=None), params, TOKENS) ** 2).mean()
    assert abs(loss - exact) < 0.1 * exact


def test_dropout_is_off_unless_asked_for():
    model = SequenceModel(**{**SMALL, "num_layers": 1}, vocab_size=VOCAB, dropout_rate=0.5)
    params = init(model, TOKENS)
    plain = run(model.clone(dropout_rate=0.0), params, TOKENS)
    assert_close(run(model, params, TOKENS), plain, 1e-6)
    dropped = [
        run(model, params, TOKENS, deterministic=False, rngs={"dropout": jax.random.key(seed)})
        for seed in (0, 0, 1)
    ]
    np.testing.assert_array_equal(dropped[0], dropped[1])
    assert abs(dropped[0] - dropped[2]).max() > 1e-3
    assert abs(dropped[0] - plain).max() > 1e-3


@pytest.mark.parametrize(
    ("options", "inputs", "error", "word"),
    [
        ({"attention": "manyhead"}, VECTORS, ValueError, "attention.*manyhead"),
        ({"norm": "batch"}, VECTORS, ValueError, "norm.*batch"),
        ({"positions": "absolute"}, VECTORS, ValueError, "positions.*absolute"),
        ({"positions": "learned"}, VECTORS, ValueError, "max_length"),
        ({"positions": "learned", "max_length": 5}, VECTORS, ValueError, "max_length|5"),
        ({"vocab_size": VOCAB}, VECTORS, (TypeError, ValueError), "inputs"),
        ({}, TOKENS, (TypeError, ValueError), "inputs"),
        ({"num_heads": 3}, VECTORS, ValueError, "num_heads"),
        ({"num_kv_heads": 3, "num_heads": 4}, VECTORS, ValueError, "num_kv_heads"),
    ],
)
def test_a_model_that_cannot_be_is_refused(options, inputs, error, word):
    model = SequenceModel(**{**SMALL, **options})
    with pytest.raises(error, match=word):
        jax.eval_shape(model.init, jax.random.key(0), inputs)


def test_a_refused_call_moves_no_position():
    model = SequenceModel(8, num_heads=2, vocab_size=5, causal=True, positions="sinusoidal")
    tokens = jnp.array([[1, 2, 3, 4]])
    params = model.init(jax.random.key(0), tokens)
    decoder = model.clone(decode=True)
    cache = decoder.init(jax.random.key(0), tokens)["cache"]
    step = jax.jit(lambda c, x: decoder.apply({**params, "cache": c}, x, mutable=["cache"]))
    _, state = step(cache, tokens[:, :3])
    refused, state = step(state["cache"], tokens[:, 2:])
    last, _ = step(state["cache"], tokens[:, 3:])
    assert jnp.isnan(refused).all()
    np.testing.assert_allclose(last[:, 0], model.apply(params, tokens)[:, 3], atol=1e-5)
