"""Caches that keep less than the whole past, or something else, change no result."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import assert_close
from flax import linen as nn

from attention_jax import (
    AlibiBias,
    Block,
    DifferentialAttention,
    GatedDeltaAttention,
    MultiHeadAttention,
    SequenceModel,
    SinusoidalPositions,
    TokenEmbedding,
    biases,
    decoding,
    generate,
    linear_attention,
    masks,
)

slow = functools.partial(pytest.param, marks=pytest.mark.slow)
T, D, WINDOW = 23, 16, 3
KINDS = {
    "rotary, grouped heads": (
        functools.partial(MultiHeadAttention, 4, num_kv_heads=2, rotary=True),
        {"mask": masks.window(WINDOW)},
    ),
    "alibi, sinks": (
        functools.partial(MultiHeadAttention, 4, sinks=True),
        {"mask": masks.causal() & masks.window(WINDOW, 1), "bias": biases.alibi(4)},
    ),
    "by blocks": (
        functools.partial(MultiHeadAttention, 2, qk_norm=True),
        {"mask": masks.blocks(WINDOW + 1) & masks.rule(lambda t, s: (s % 5 != 2) | (s == t))},
    ),
    "differential": (
        functools.partial(DifferentialAttention, 2, rotary=True),
        {"mask": masks.window(1) | masks.window(WINDOW, 0, "end")},
    ),
}


def normal(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


def make(kind, length, batch=(2,)):
    """A step of the layer with a rolling cache, an empty cache, inputs, and what is right."""
    layer, settings = KINDS[kind]
    x = normal(*batch, T, D)
    params = jax.jit(layer().init)(jax.random.key(0), x)["params"]
    full = {**settings, "mask": masks.causal() & settings["mask"]}
    want = jax.jit(functools.partial(layer().apply, **full))({"params": params}, x)
    decoder = layer(decode=True, cache_length=length)
    # The rules of these masks need no length, so any input that is long enough does.
    cache = jax.eval_shape(decoder.init, jax.random.key(0), x[..., :length, :])["cache"]
    cache = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), cache)

    def step(cache, x, **more):
        out, state = decoder.apply(
            {"params": params, "cache": cache}, x, mutable=["cache"], **settings, **more
        )
        return out, state["cache"]

    return step, cache, x, want


@pytest.mark.parametrize(
    ("kind", "length", "batch"),
    [
        ("rotary, grouped heads", WINDOW + 1, (2,)),
        ("alibi, sinks", WINDOW, (2, 3)),
        slow("by blocks", WINDOW + 3, ()),
        slow("differential", WINDOW + 1, (2,)),
    ],
)
def test_a_rolling_cache_in_any_portions_is_the_full_forward_pass(kind, length, batch):
    step, empty, x, want = make(kind, length, batch)
    step, cache, outs = jax.jit(step), empty, []
    # More than the cache holds, token by token, and as speculative decoding does.
    for part in jnp.split(x, np.cumsum((9, *[1] * 6, *[2] * 3)), axis=-2):
        out, cache = step(cache, part)
        outs.append(out)
    assert_close(jnp.concatenate(outs, axis=-2), want, 1e-5)
    assert cache["cached_key"].shape[-3] == length
    assert (cache["cache_index"] == T).all()


@pytest.mark.parametrize("length", [slow(WINDOW), WINDOW + 1, slow(WINDOW + 4)])
def test_rows_of_different_length_share_a_rolling_cache(length):
    step, cache, x, want = make("rotary, grouped heads", length)
    step, taken = jax.jit(step), np.zeros(2, int)
    for lengths in ([4, 0], [1, 1], [9, 6], [1, 1], [1, 0], [3, 4]):
        new = np.full((2, max(lengths), D), np.nan, np.float32)
        for row, count in enumerate(lengths):
            new[row, :count] = x[row, taken[row] : taken[row] + count]
        out, cache = step(cache, jnp.asarray(new), lengths=jnp.array(lengths))
        for row, count in enumerate(lengths):
            assert_close(out[row, :count], want[row, taken[row] : taken[row] + count], 1e-5)
        taken += lengths
    wrong, after = step(cache, x[:, :4], lengths=jnp.array([5, 1]))
    assert np.isnan(wrong[0]).all()
    assert not np.isnan(wrong[1]).any()
    np.testing.assert_array_equal(after["cached_key"][0], cache["cached_key"][0])
    with pytest.raises(ValueError, match=r"lengths.*T=4.*\[5, 1\]"):
        make("rotary, grouped heads", length)[0](cache, x[:, :4], lengths=jnp.array([5, 1]))


def test_a_cache_for_fewer_tokens_than_its_length_holds_those():
    layer = MultiHeadAttention(2, decode=True, cache_length=100)
    x = normal(1, 5, D)
    variables = jax.jit(layer.init)(jax.random.key(0), x)
    cache = variables["cache"]
    assert cache["cached_key"].shape[1] == 5
    cache["cache_index"] += 5
    with pytest.raises(ValueError, match="has room for 5 tokens: its fullest row holds"):
        layer.apply(variables, x[:, :1], mask=masks.window(2), mutable=["cache"])


@pytest.mark.parametrize(
    ("settings", "error", "words"),
    [
        ({}, ValueError, "cache_length=4 needs a mask.*None"),
        ({"mask": masks.causal()}, ValueError, r"cache_length=4.*window\(4\).*causal\(\)"),
        ({"mask": masks.window(5)}, ValueError, r"window\(4\).*got window\(5"),
        ({"mask": masks.window(4, offset=-1)}, ValueError, "offset=-1"),
        ({"mask": masks.window(4) | masks.strided(7)}, ValueError, "strided"),
        ({"mask": ~masks.window(4)}, ValueError, "cache_length"),
        ({"mask": masks.window(2) & np.ones((5, 5), bool)}, NotImplementedError, "mask.*dense"),
        (
            {"mask": masks.window(2) & masks.segments(np.zeros(5, int))},
            NotImplementedError,
            "mask.*segments",
        ),
        (
            {"mask": masks.window(2), "bias": np.zeros((2, 5, 5), np.float32)},
            NotImplementedError,
            "bias.*dense",
        ),
        ({"mask": masks.window(2), "sow_weights": True}, NotImplementedError, "sow_weights"),
    ],
)
def test_what_a_rolling_cache_cannot_serve_is_refused(settings, error, words):
    layer, x = MultiHeadAttention(2, decode=True, cache_length=4), normal(1, 5, D)

    def run():
        variables = layer.init(jax.random.key(0), x)
        return layer.apply(variables, x, mutable=["cache"], **settings)

    with pytest.raises(error, match=words) as refusal:
        jax.eval_shape(run)
    assert "\n" not in str(refusal.value)


def test_a_cache_length_without_a_cache_is_refused():
    for length, words in ((4, "decode=True"), (0, "cache_length"), (-1, "cache_length")):
        with pytest.raises(ValueError, match=words):
            MultiHeadAttention(2, cache_length=length).init(jax.random.key(0), normal(1, 5, D))


def test_linear_attention_has_no_cache():
    layer = MultiHeadAttention(2, attention_fn=linear_attention, decode=True)
    with pytest.raises(NotImplementedError, match="no attention_fn=linear_attention"):
        layer.init(jax.random.key(0), normal(1, 5, D), mask=masks.causal())


# Cross-attention.


def test_other_inputs_are_projected_once_and_read_in_any_portions():
    settings = {"num_kv_heads": 2, "qk_norm": True, "value_head_dim": 3}
    x, other, more = normal(2, 7, D), normal(2, 5, 6, seed=1), normal(2, 9, 6, seed=2)
    layer = MultiHeadAttention(4, **settings)
    params = jax.jit(layer.init)(jax.random.key(0), x, other)["params"]
    seen = masks.key_lengths(jnp.array([5, 3]))
    bias = normal(4, 1, 5, seed=3)
    decoder = MultiHeadAttention(4, **settings, decode=True)
    run = jax.jit(functools.partial(decoder.apply, mutable=["cache"]))
    assert set(jax.eval_shape(decoder.init, jax.random.key(0), x, other)) == {"params"}

    want = jax.jit(layer.apply)({"params": params}, x, other, mask=seen, bias=bias)
    first, state = run({"params": params}, x[:, :3], other, mask=seen, bias=bias)
    # What the projections of keys and values are is no matter any more.
    changed = {**params, "key": jax.tree.map(jnp.zeros_like, params["key"])}
    outs = [first]
    for part in (x[:, 3:6], x[:, 6:]):
        out, state = run({"params": changed, **state}, part, mask=seen, bias=bias)
        outs.append(out)
    assert_close(jnp.concatenate(outs, axis=1), want, 1e-5)
    assert state["cache"]["cross_key"].shape == (2, 5, 2, 4)
    assert state["cache"]["cross_value"].shape == (2, 5, 2, 3)

    # Other inputs take their place, of another length too.
    out, state = run({"params": params, **state}, x, more)
    assert_close(out, jax.jit(layer.apply)({"params": params}, x, more), 1e-5)
    assert state["cache"]["cross_key"].shape == (2, 9, 2, 4)


@pytest.mark.parametrize(
    ("options", "settings", "error", "words"),
    [
        ({}, {"mask": masks.causal()}, NotImplementedError, r"mask.*causal\(\)"),
        ({}, {"bias": biases.alibi(2)}, NotImplementedError, "bias.*alibi"),
        ({}, {"lengths": jnp.array([1])}, ValueError, "lengths"),
        ({}, {"mutable": False}, ValueError, r'mutable=\["cache"\]'),
        ({"cache_length": 3}, {}, ValueError, "cache_length=3 is for self-attention"),
        ({"rotary": True}, {}, NotImplementedError, "rotary"),
    ],
)
def test_what_cross_attention_cannot_keep_is_refused(options, settings, error, words):
    x, other = normal(1, 5, D), normal(1, 4, D)
    decoder = MultiHeadAttention(2, decode=True, **options)

    def run():
        params = MultiHeadAttention(2).init(jax.random.key(0), x, other)
        return decoder.apply(params, x, other, **{"mutable": ["cache"], **settings})

    with pytest.raises(error, match=words) as refusal:
        jax.eval_shape(run)
    assert "\n" not in str(refusal.value)


def test_a_cache_of_one_kind_is_not_one_of_the_other():
    x, other = normal(1, 5, D), normal(2, 4, D)
    decoder = MultiHeadAttention(2, decode=True)
    own = jax.jit(decoder.init)(jax.random.key(0), x)
    with pytest.raises(ValueError, match="inputs_kv must be None: the cache is one of self"):
        decoder.apply(own, x, x, mutable=["cache"])
    with pytest.raises(ValueError, match="cross-attention that of a call with inputs_kv"):
        decoder.apply({"params": own["params"]}, x, mutable=["cache"])
    _, state = decoder.apply({"params": own["params"]}, other, other, mutable=["cache"])
    with pytest.raises(ValueError, match=r"batch axes \(2,\), got \(1,\)"):
        decoder.apply({"params": own["params"], **state}, x)


# The gated delta rule.


def delta_layer(**options):
    bias_init = nn.initializers.ones_init()  # So that padding would not be zeros.
    return GatedDeltaAttention(2, head_dim=4, use_bias=True, bias_init=bias_init, **options)


@pytest.mark.parametrize(
    ("options", "batch"),
    [({"num_value_heads": 4}, (2,)), slow({"num_kv_heads": 1, "conv_size": 1}, (1, 2))],
    ids=str,
)
def test_a_memory_goes_on_in_any_portions(options, batch):
    x = normal(*batch, 13, D)
    layer, decoder = delta_layer(**options), delta_layer(**options, decode=True)
    variables = jax.jit(decoder.init)(jax.random.key(0), x[..., :1, :])
    params, state = {"params": variables["params"]}, {"cache": variables["cache"]}
    assert not any(leaf.any() for leaf in jax.tree.leaves(state))
    want = jax.jit(layer.apply)(params, x)
    step, outs = jax.jit(functools.partial(decoder.apply, mutable=["cache"])), []
    for part in jnp.split(x, (5, 6, 7, 8, 10), axis=-2):
        out, state = step({**params, **state}, part)
        outs.append(out)
    assert_close(jnp.concatenate(outs, axis=-2), want, 1e-5)
    assert (state["cache"]["cache_index"] == 13).all()


def test_a_memory_takes_no_tokens():
    decoder = delta_layer(decode=True)
    variables = jax.jit(decoder.init)(jax.random.key(0), normal(2, 0, D))
    step = jax.jit(functools.partial(decoder.apply, mutable=["cache"]))
    out, after = step(variables, normal(2, 0, D))
    assert out.shape == (2, 0, D)
    jax.tree.map(np.testing.assert_array_equal, after["cache"], variables["cache"])


def test_memories_of_rows_of_different_length():
    x = normal(2, 12, D)
    layer, decoder = delta_layer(), delta_layer(decode=True)
    variables = jax.jit(decoder.init)(jax.random.key(0), x)
    params, state = {"params": variables["params"]}, {"cache": variables["cache"]}
    want = jax.jit(layer.apply)(params, x)
    step, taken = jax.jit(functools.partial(decoder.apply, mutable=["cache"])), np.zeros(2, int)
    for lengths in ([4, 1], [0, 4], [4, 2]):
        new = np.full((2, 4, D), np.nan, np.float32)
        for row, count in enumerate(lengths):
            new[row, :count] = x[row, taken[row] : taken[row] + count]
        out, state = step({**params, **state}, new, lengths=jnp.array(lengths))
        for row, count in enumerate(lengths):
            assert_close(out[row, :count], want[row, taken[row] : taken[row] + count], 1e-5)
        taken += lengths
    out, after = step({**params, **state}, x[:, :4], lengths=jnp.array([2, 5]))
    assert not np.isnan(out[0]).any()
    assert np.isnan(out[1]).all()
    for was, now in zip(jax.tree.leaves(state), jax.tree.leaves(after), strict=True):
        np.testing.assert_array_equal(was[1], now[1])


@pytest.mark.parametrize(
    ("options", "settings", "words"),
    [
        ({}, {"lengths": jnp.array([1])}, "lengths is for decode=True"),
        ({"decode": True}, {"mutable": ["cache"]}, "needs the collection"),
        ({"num_value_heads": 3}, {}, "heads W of value.*W=3"),
        ({"num_value_heads": 0}, {}, "num_value_heads"),
    ],
)
def test_memories_that_cannot_be_are_refused(options, settings, words):
    x, layer = normal(1, 3, D), delta_layer(**options)

    def run():
        params = layer.init(jax.random.key(0), x)["params"]
        return layer.apply({"params": params}, x, **settings)

    with pytest.raises(ValueError, match=words) as refusal:
        jax.eval_shape(run)
    assert "\n" not in str(refusal.value)


# Models.

VOCABULARY = 11
FULL, NEAR = None, masks.window(3)


def model(reach, **options):
    blocks = [Block(MultiHeadAttention(2, num_kv_heads=1, rotary=True)) for _ in range(2)]
    embedding = TokenEmbedding(VOCABULARY, 8, embedding_init=nn.initializers.normal(1.0))
    return SequenceModel(embedding, blocks, mask=masks.causal(), reach=reach, **options)


@pytest.mark.parametrize(
    ("reach", "kept", "options"),
    [
        slow(NEAR, (4, 4), {"bias": AlibiBias(2)}),
        ((FULL, masks.window(5) & masks.blocks(3)), (20, 3), {"positions": SinusoidalPositions()}),
    ],
    ids=["every block", "one block"],
)
def test_blocks_with_a_window_keep_no_more_than_that(reach, kept, options):
    make = model(reach, **options)
    tokens = np.random.default_rng(0).integers(0, VOCABULARY, (2, 20))
    params = jax.jit(make.init)(jax.random.key(0), tokens)["params"]
    want = jax.jit(make.apply)({"params": params}, tokens)
    decoder = decoding(make, rolling=True)
    cache = jax.eval_shape(decoder.init, jax.random.key(0), tokens)["cache"]
    for i, length in enumerate(kept):
        assert cache[f"blocks_{i}"]["attention"]["cached_key"].shape == (2, length, 1, 4)
    assert "cached_positions" not in cache
    state = {"cache": jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), cache)}
    step, outs = jax.jit(functools.partial(decoder.apply, mutable=["cache"])), []
    for part in np.split(tokens, (11, 12, 13, 14, 15), axis=1):
        out, state = step({"params": params, **state}, part)
        outs.append(out)
    assert_close(jnp.concatenate(outs, axis=1), want, 1e-5)
    with pytest.raises(NotImplementedError, match="positions must be None"):
        decoder.apply({"params": params, **state}, tokens[:, :1], positions=np.array([20]))


def test_generated_tokens_need_memory_for_the_window_alone():
    make = model(NEAR)
    tokens = np.random.default_rng(0).integers(0, VOCABULARY, (2, 9))
    params = jax.jit(make.init)(jax.random.key(0), tokens)["params"]
    found = np.asarray(generate(make, params, tokens, 9, temperature=0))
    row = np.concatenate([tokens, found], axis=1)
    logits = jax.jit(make.apply)({"params": params}, row)
    np.testing.assert_array_equal(logits.argmax(-1)[:, 8:-1], found)
    # The size of the cache does not depend on the length.
    decoder = decoding(make, rolling=True)
    sizes = {
        length: sum(
            x.size
            for x in jax.tree.leaves(
                jax.eval_shape(
                    decoder.init, jax.random.key(0), jax.ShapeDtypeStruct((2, length), jnp.int32)
                )["cache"]
            )
        )
        for length in (4, 100, 10_000)
    }
    assert len(set(sizes.values())) == 1


@pytest.mark.parametrize("mixed", [True, slow(False)])
def test_models_with_memories_generate(mixed):
    other = MultiHeadAttention(2, rotary=True) if mixed else GatedDeltaAttention(2, conv_size=2)
    layers = GatedDeltaAttention(2), other
    make = model(None).clone(blocks=tuple(map(Block, layers)), positions=SinusoidalPositions())
    tokens = np.random.default_rng(0).integers(0, VOCABULARY, (2, 5))
    params = jax.jit(make.init)(jax.random.key(0), tokens)["params"]
    found = np.asarray(generate(make, params, tokens, 8, temperature=0))
    row = np.concatenate([tokens, found], axis=1)
    logits = jax.jit(make.apply)({"params": params}, row)
    np.testing.assert_array_equal(logits.argmax(-1)[:, 4:-1], found)
