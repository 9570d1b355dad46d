"""`attention_fn` in flax's layers, whose every argument is honoured or refused."""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from cases import Sizes, assert_close, random_qkv
from flax import linen, nnx

from attention_jax import dot_product_attention, explain
from attention_jax.functional.dropout import Shared, keep_mask
from attention_jax.interop.flax import attention_fn

X = jnp.asarray(np.random.default_rng(0).standard_normal((2, 5, 12)), jnp.float32)


def layers(**options):
    """Flax's layer with flax's function and with ours, on the same parameters."""
    make = lambda **more: nnx.MultiHeadAttention(
        3, 12, decode=False, rngs=nnx.Rngs(0), **options, **more
    )
    return make(), make(attention_fn=attention_fn)


def call(layer, *args, **settings):
    return nnx.jit(lambda layer, *args: layer(*args, **settings))(layer, *args)


def test_the_output_is_that_of_flax():
    theirs, ours = layers()
    mask = np.tri(5, dtype=bool)
    for settings in ({}, {"mask": mask}, {"mask": np.broadcast_to(mask, (2, 1, 5, 5))}):
        assert_close(call(ours, X, **settings), call(theirs, X, **settings), 1e-6)
    memory = jnp.flip(X)
    assert_close(call(ours, X, memory), call(theirs, X, memory), 1e-6)


def test_linen_has_its_own_masks_and_its_cache():
    def outputs(**options):
        """Of a masked sequence, and of its last token beside a cache of the others."""
        layer = linen.MultiHeadDotProductAttention(num_heads=3, **options)
        variables = layer.init(jax.random.key(0), X)
        mask = linen.make_causal_mask(X[..., 0])
        yield layer.apply(variables, X, mask=linen.combine_masks(mask, mask))
        decoder = layer.copy(decode=True)
        cache = {"cache": decoder.init(jax.random.key(0), X)["cache"]}
        for t in range(X.shape[1]):
            out, cache = decoder.apply({**variables, **cache}, X[:, t : t + 1], mutable=["cache"])
        yield out

    want, got = outputs(), outputs(attention_fn=attention_fn)
    for a, b in zip(got, want, strict=True):
        assert_close(a, b, 1e-6)


@pytest.mark.skipif(
    "num_kv_heads" not in inspect.signature(nnx.MultiHeadAttention.__init__).parameters,
    reason="this flax has no grouped heads",
)
def test_grouped_heads_are_those_of_flax():
    theirs, ours = layers(num_kv_heads=1)
    assert_close(call(ours, X), call(theirs, X), 1e-6)


def test_is_causal_is_honoured():
    _, ours = layers()
    causal = call(ours, X, is_causal=True)
    assert_close(causal, call(ours, X, mask=np.tri(5, dtype=bool)), 1e-6)
    assert abs(causal - call(ours, X)).max() > 1e-3


def test_is_causal_while_decoding_sees_the_whole_past():
    layer = nnx.MultiHeadAttention(3, 12, decode=True, attention_fn=attention_fn, rngs=nnx.Rngs(0))
    whole = layer(X, decode=False, is_causal=True)
    layer.init_cache(X.shape)
    steps = [layer(X[:, t : t + 1], is_causal=True) for t in range(X.shape[1])]
    assert_close(jnp.concatenate(steps, 1), whole, 1e-6)


@pytest.mark.parametrize("T", [1, 3, 7])
def test_is_causal_is_refused_where_queries_stand_nowhere_known(T):
    with pytest.raises(NotImplementedError, match=f"is_causal.*T={T} and S=5"):
        attention_fn(jnp.ones((2, T, 1, 4)), *[jnp.ones((2, 5, 1, 4))] * 2, is_causal=True)


def test_is_causal_with_a_mask_of_several_new_tokens_is_refused():
    query, key = jnp.ones((2, 2, 1, 4)), jnp.ones((2, 5, 1, 4))
    with pytest.raises(NotImplementedError, match="is_causal"):
        attention_fn(query, key, key, mask=jnp.ones((2, 1, 2, 5), bool), is_causal=True)


@pytest.mark.parametrize("name", ["qk_attn_weights_einsum", "attn_weights_value_einsum"])
def test_an_einsum_of_the_callers_own_is_refused(name):
    layer = linen.MultiHeadDotProductAttention(
        num_heads=3, attention_fn=attention_fn, **{f"{name}_cls": lambda: jnp.einsum}
    )
    with pytest.raises(NotImplementedError, match=name):
        layer.init(jax.random.key(0), X)


def test_a_softmax_in_float32_is_what_there_is():
    make = lambda **options: linen.MultiHeadDotProductAttention(
        num_heads=3, attention_fn=attention_fn, dtype="bfloat16", **options
    )
    variables = make().init(jax.random.key(0), X)
    forced = make(force_fp32_for_softmax=True).apply(variables, X)
    np.testing.assert_array_equal(forced, make().apply(variables, X))


def test_is_causal_and_a_mask_hold_together():
    query, key, value = random_qkv(Sizes(T=7))
    mask = np.arange(7) > 0
    out = attention_fn(query, key, value, mask=mask, is_causal=True)
    want, _ = oracles.dot_product(query, key, value, mask=oracles.causal(7, 7) & mask)
    assert_close(out, want, 2e-6)


def kept(implementation, rng, batch=(3, 2), N=4, T=5, S=67, **settings):
    """The weights that dropout keeps, `[..., N, T, S]`, read off equal logits and unit values."""
    query, key = jnp.zeros((*batch, T, N, 2)), jnp.zeros((*batch, S, 2, 2))
    value = jnp.broadcast_to(jnp.eye(S)[:, None, :], (*batch, S, 2, S))
    settings |= {"dropout_rate": 0.5, "dropout_rng": rng, "implementation": implementation}
    out = jax.jit(lambda *qkv: attention_fn(*qkv, **settings))(query, key, value)
    keep = np.moveaxis(np.asarray(out), -2, -3) > 0
    assert_close(np.moveaxis(out, -2, -3), keep / (S * 0.5), 1e-6)
    return keep


@pytest.mark.parametrize("implementation", ["dense", "blockwise"])
def test_one_dropout_mask_serves_all_rows_and_heads_by_default(implementation):
    keep = kept(implementation, jax.random.key(0))
    assert (keep == keep[:1, :1, :1]).all()
    # It is a function of positions alone, and the same in every implementation.
    np.testing.assert_array_equal(
        kept("dense", jax.random.key(0), (1,), 2, 5, 67)[0, 0], keep[0, 0, 0]
    )
    assert 0.4 < keep[0, 0, 0].mean() < 0.6
    assert 0.4 < (keep[0, 0, 0] == kept(implementation, jax.random.key(1))[0, 0, 0]).mean() < 0.6


def test_a_shared_dropout_mask_reaches_the_gradients():
    query, key, value = random_qkv()
    rng, rate = jax.random.key(0), 0.5
    keep = keep_mask(Shared(rng), rate, (2,), 6, 5, 7)
    d_out = jnp.asarray(np.random.default_rng(0).standard_normal((2, 5, 6, 13)), jnp.float32)

    def gradients(implementation):
        def loss(*qkv):
            settings = {"dropout_rate": rate, "dropout_rng": rng, "implementation": implementation}
            return (attention_fn(*qkv, **settings) * d_out).sum()

        return jax.grad(loss, (0, 1, 2))(query, key, value)

    want = oracles.dot_product_gradients(query, key, value, d_out, keep=keep, rate=rate)
    for implementation in ("dense", "blockwise"):
        for name, got in zip(("query", "key", "value"), gradients(implementation), strict=True):
            assert_close(got, want[name], 1e-5)


def test_dropout_of_its_own_for_each_row_and_head_is_ours():
    query, key, value = random_qkv()
    settings = {"dropout_rate": 0.5, "dropout_rng": jax.random.key(0), "deterministic": False}
    own = attention_fn(query, key, value, broadcast_dropout=False, **settings)
    np.testing.assert_array_equal(own, dot_product_attention(query, key, value, **settings))
    quiet = attention_fn(query, key, value, broadcast_dropout=True, deterministic=True)
    assert_close(quiet, dot_product_attention(query, key, value), 1e-6)


def test_dropout_without_a_key_is_refused():
    with pytest.raises(ValueError, match="dropout_rng"):
        attention_fn(*random_qkv(), dropout_rate=0.5)
    with pytest.raises(TypeError, match="dropout_rng"):
        attention_fn(*random_qkv(), dropout_rate=0.5, dropout_rng=3)


@pytest.mark.parametrize("broadcast_dropout", [True, False])
def test_dropout_inside_of_nnx(broadcast_dropout):
    _, ours = layers(dropout_rate=0.5, broadcast_dropout=broadcast_dropout)
    a, b = (ours(X, deterministic=False, rngs=nnx.Rngs(dropout=seed)) for seed in (0, 1))
    assert (a != b).any()
    assert_close(ours(X, deterministic=True), layers()[1](X), 1e-6)


def test_dtype_is_the_type_of_the_computation_and_the_output():
    query, key, value = random_qkv()
    out = attention_fn(query, key, value, dtype=jnp.bfloat16)
    assert out.dtype == jnp.bfloat16
    half = (x.astype(jnp.bfloat16) for x in (query, key, value))
    np.testing.assert_array_equal(out, dot_product_attention(*half))
    theirs, ours = layers(dtype=jnp.bfloat16)
    assert ours(X).dtype == theirs(X).dtype == jnp.bfloat16


@pytest.mark.parametrize("dtype", [jnp.float8_e4m3fn, "int32"])
def test_a_dtype_that_is_not_computed_in_is_refused(dtype):
    with pytest.raises(TypeError, match=r"^dtype must be .*float32"):
        attention_fn(*random_qkv(), dtype=dtype)


@pytest.mark.parametrize(
    ("settings", "word"),
    [
        ({"key": "text", "dtype": jnp.float32}, "key"),
        ({"mask": "text"}, "mask"),
        ({"mask": np.array(["text"])}, "mask"),
        ({"dropout_rate": "text"}, "dropout_rate"),
    ],
)
def test_what_is_cast_is_looked_at_before(settings, word):
    inputs = dict(zip(("query", "key", "value"), random_qkv(), strict=True))
    with pytest.raises(TypeError, match=word) as refusal:
        attention_fn(**{**inputs, **settings})
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    ("precision", "error"), [("bogus", ValueError), (np.ones((30, 3)), NotImplementedError)]
)
def test_a_precision_that_is_none_is_one_line(precision, error):
    with pytest.raises(error, match=r"^precision must be") as refusal:
        attention_fn(*random_qkv(), precision=precision)
    assert "\n" not in str(refusal.value)


def test_precision_reaches_the_products():
    qkv = random_qkv()
    for precision in ("highest", jax.lax.Precision.HIGHEST):
        attend = lambda *qkv, precision=precision: attention_fn(*qkv, precision=precision)
        assert "HIGHEST" in str(jax.make_jaxpr(attend)(*qkv))
    with pytest.raises(NotImplementedError, match="precision"):
        attention_fn(*qkv, precision=("highest", "default"))


def test_sown_weights_are_those_of_flax():
    sown = [
        nnx.capture(layer, nnx.Intermediate)(X, sow_weights=True)[1]["attention_weights"]
        for layer in layers()
    ]
    want, got = (jax.tree.leaves(weights)[0] for weights in sown)
    assert_close(got, want, 1e-6)


def test_an_argument_that_nobody_knows_is_refused():
    with pytest.raises(TypeError):
        attention_fn(*random_qkv(), is_casual=True)


@pytest.mark.parametrize("name", ["is_causal", "broadcast_dropout", "deterministic"])
def test_a_word_is_neither_yes_nor_no(name):
    with pytest.raises(TypeError, match=f"{name} must be True or False, got 'no'"):
        attention_fn(*random_qkv(), **{name: "no"})


@pytest.mark.parametrize(("T", "implementation"), [(6, "dense"), (600, "blockwise")])
def test_precision_holds_where_derivatives_are_traced_later(T, implementation):
    x = jnp.ones((1, T, 1, 8))
    assert explain(x, x, x).implementation == implementation
    attend = jax.jit(lambda x: attention_fn(x, x, x, precision="highest").sum())
    text = jax.jit(jax.grad(attend)).lower(x).as_text()
    products = [line for line in text.splitlines() if "dot_general" in line]
    assert products
    assert all("HIGHEST" in line for line in products)
