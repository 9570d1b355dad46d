"""The layers: flax's parameters, the functions' results, and a correct cache."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from cases import assert_close
from flax import linen as nn

from attention_jax import (
    MLP,
    Block,
    DifferentialAttention,
    GatedDeltaAttention,
    MultiHeadAttention,
    SingleHeadAttention,
    biases,
    differential_attention,
    dot_product_attention,
    linear_attention,
    masks,
    positions,
    sigmoid_attention,
)
from attention_jax.functional import xla_cpu
from attention_jax.functional.xla_cpu import kernel_product
from attention_jax.training.model import make_sequence_model

FlaxAttention = nn.MultiHeadDotProductAttention
PLACES = np.arange(5)


def normal(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


def init(layer, *inputs):
    """Random parameters (a bias that starts at zero hides a wrong one) and an empty cache."""
    rng = np.random.default_rng(0)
    variables = jax.eval_shape(layer.init, jax.random.key(0), *inputs)
    draw = lambda x: jnp.asarray(rng.normal(0, 0.3, x.shape), x.dtype)
    return {
        name: jax.tree.map(
            draw if name == "params" else lambda x: jnp.zeros(x.shape, x.dtype), tree
        )
        for name, tree in variables.items()
    }


def shapes(tree):
    return jax.tree.map(jnp.shape, tree)


# The same as flax.


@pytest.mark.parametrize(
    ("use_bias", "batch", "cross"),
    [(True, (2,), False), (False, (), False), (True, (2, 3), True), (False, (2, 3), True)],
    ids=str,
)
def test_multi_head_attention_is_that_of_flax(use_bias, batch, cross):
    x, memory = normal(*batch, 5, 12), normal(*batch, 7, 10, seed=1) if cross else None
    S = 7 if cross else 5
    mask = np.random.default_rng(2).random((*batch, 1, 5, S)) < 0.7
    mask[..., 0] = True  # Flax makes the mean of an empty row, we make zeros.
    theirs = FlaxAttention(num_heads=4, use_bias=use_bias)
    ours = MultiHeadAttention(num_heads=4, use_bias=use_bias)
    variables = init(theirs, x, memory)
    assert shapes(init(ours, x, memory)) == shapes(variables)

    @jax.jit
    def both(variables, x, memory):
        return [layer.apply(variables, x, memory, mask=mask) for layer in (theirs, ours)]

    want, got = both(variables, x, memory)
    assert_close(got, want, 1e-6)


def test_values_of_other_inputs_are_those_of_flax():
    x, keys, values = normal(2, 5, 12), normal(2, 7, 10, seed=1), normal(2, 7, 9, seed=2)
    theirs, ours = FlaxAttention(num_heads=4), MultiHeadAttention(num_heads=4)
    variables = init(theirs, x, keys, values)
    own = jax.jit(functools.partial(ours.init, inputs_v=values))(jax.random.key(0), x, keys)
    assert shapes(own) == shapes(variables)
    want = jax.jit(theirs.apply)(variables, x, keys, values)
    assert_close(jax.jit(ours.apply)(variables, x, keys, inputs_v=values), want, 1e-6)
    with pytest.raises(ValueError, match="inputs_v must have a row for each of the 7 keys"):
        ours.apply(variables, x, keys, inputs_v=x)


@pytest.mark.parametrize("make", [SingleHeadAttention, lambda: MultiHeadAttention(3, rotary=True)])
def test_keys_alone_may_have_positions(make):
    """With V = W x the heads mix W x_s; where all x_s agree, so do all outputs."""
    x, where = jnp.broadcast_to(normal(12), (2, 5, 12)), normal(2, 5, 12)
    layer = make()
    variables = init(layer, x)
    got = layer.apply(variables, x + where, inputs_v=x)
    assert_close(got, jax.jit(layer.apply)(variables, x), 1e-5)
    assert abs(layer.apply(variables, x + where) - got).max() > 0.1


def test_values_of_other_inputs_decode():
    x, values = normal(2, 5, 12), normal(2, 5, 12, seed=1)
    layer = MultiHeadAttention(3, decode=True)
    variables = jax.jit(functools.partial(layer.init, inputs_v=values))(jax.random.key(0), x)
    params, cache = variables["params"], variables["cache"]
    plain = MultiHeadAttention(3)
    want = plain.apply({"params": params}, x, inputs_v=values, mask=masks.causal())
    for part in (slice(0, 3), slice(3, 5)):
        got, state = layer.apply(
            {"params": params, "cache": cache},
            x[:, part],
            inputs_v=values[:, part],
            mutable=["cache"],
        )
        cache = state["cache"]
        assert_close(got, want[:, part], 1e-5)


def test_qk_norm_and_out_features_are_those_of_flax():
    x = normal(2, 5, 12)
    theirs = FlaxAttention(num_heads=3, normalize_qk=True, out_features=7)
    ours = MultiHeadAttention(num_heads=3, qk_norm=True, out_features=7)
    variables = init(theirs, x)
    assert shapes(init(ours, x)) == shapes(variables)
    want, got = (jax.jit(layer.apply)(variables, x) for layer in (theirs, ours))
    assert_close(got, want, 1e-5)


def test_values_may_have_a_size_of_their_own_and_logits_a_scale():
    x = normal(2, 5, 12)
    layer = MultiHeadAttention(4, num_kv_heads=2, value_head_dim=7, scale=0.3, qk_norm="rms")
    layer = layer.clone(use_bias=("query", "out"), norm_epsilon=0.1)
    variables = init(layer, x)
    params = jax.tree.map(lambda w: w + 0.1, variables["params"])  # Biases begin as zeros.
    found = {name: jax.tree.map(np.shape, params[name]) for name in params}
    assert found == {
        "query": {"kernel": (12, 4, 3), "bias": (4, 3)},
        "key": {"kernel": (12, 2, 3)},
        "value": {"kernel": (12, 2, 7)},
        "out": {"kernel": (4, 7, 12), "bias": (12,)},
        "query_ln": {"scale": (3,)},
        "key_ln": {"scale": (3,)},
    }

    def normed(x, scale):
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + 0.1) * scale

    p = jax.tree.map(oracles.f64, params)
    project = lambda name: np.einsum("btd,dnh->btnh", oracles.f64(x), p[name]["kernel"])
    query = normed(project("query") + p["query"]["bias"], p["query_ln"]["scale"])
    key = normed(project("key"), p["key_ln"]["scale"])
    mixed, _ = oracles.dot_product(query, key, project("value"), scale=0.3)
    want = np.einsum("btnv,nvd->btd", mixed, p["out"]["kernel"]) + p["out"]["bias"]
    assert_close(jax.jit(layer.apply)({"params": params}, x), want, 1e-5)
    tiles = layer.clone(implementation="blockwise")
    assert_close(jax.jit(tiles.apply)({"params": params}, x), want, 1e-5)


def test_a_layer_turns_as_positions_rotary_does():
    x = normal(2, 5, 16)
    options = {"base": 50.0, "fraction": 0.5, "layout": "interleaved"}
    options["scaling"] = positions.linear(2.0)
    layer = MultiHeadAttention(2, rotary=True, **{f"rotary_{n}": v for n, v in options.items()})
    variables = init(layer, x)
    plain = MultiHeadAttention(
        2,
        attention_fn=lambda query, key, value, mask: dot_product_attention(
            *(positions.rotary(x, **options) for x in (query, key)), value, mask=mask
        ),
    )
    want, got = (jax.jit(module.apply)(variables, x) for module in (plain, layer))
    assert_close(got, want, 1e-6)


def test_sown_weights_are_those_of_flax():
    x, mask = normal(2, 5, 12), np.tri(5, dtype=bool)
    theirs, ours = FlaxAttention(num_heads=3), MultiHeadAttention(num_heads=3)
    variables = init(theirs, x)
    sown = []
    for layer in (theirs, ours):
        run = functools.partial(layer.apply, mask=mask, sow_weights=True, mutable=["intermediates"])
        sown.append(jax.jit(run)(variables, x)[1]["intermediates"]["attention_weights"][0])
    assert_close(sown[1], sown[0], 1e-6)
    # Not asked for, nothing is kept.
    _, state = jax.eval_shape(
        functools.partial(ours.apply, mutable=["intermediates"]), variables, x
    )
    assert not state.get("intermediates")


def test_the_function_serves_as_attention_fn_of_flax_linen():
    x, mask = normal(2, 5, 12), np.tri(5, dtype=bool)
    theirs = FlaxAttention(num_heads=3)
    mixed = FlaxAttention(num_heads=3, attention_fn=dot_product_attention)
    variables = init(theirs, x)
    want, got = (
        jax.jit(functools.partial(layer.apply, mask=mask))(variables, x)
        for layer in (theirs, mixed)
    )
    assert_close(got, want, 1e-6)
    dropping = FlaxAttention(num_heads=3, attention_fn=dot_product_attention, dropout_rate=0.5)
    run = jax.jit(
        lambda rng: dropping.apply(variables, x, deterministic=False, rngs={"dropout": rng})
    )
    a, b, c = run(jax.random.key(1)), run(jax.random.key(1)), run(jax.random.key(2))
    np.testing.assert_array_equal(a, b)
    assert (a != c).any()


# The mathematics is that of the functions.


def project(params, name, x):
    return jnp.einsum("...TD,DNH->...TNH", x, params[name]["kernel"]) + params[name]["bias"]


@pytest.mark.parametrize("num_kv_heads", [1, 2, 6])
def test_grouped_heads_rotary_and_bias_are_the_functions(num_kv_heads):
    x = normal(2, 5, 12)
    layer = MultiHeadAttention(
        num_heads=6, num_kv_heads=num_kv_heads, head_dim=4, rotary=True, rotary_base=100.0
    )
    bias, mask = biases.alibi(6), masks.causal()
    variables = init(layer, x)
    params = variables["params"]
    assert params["query"]["kernel"].shape == (12, 6, 4)
    assert params["key"]["kernel"].shape == params["value"]["kernel"].shape
    assert params["key"]["kernel"].shape == (12, num_kv_heads, 4)
    assert params["out"]["kernel"].shape == (6, 4, 12)

    @jax.jit
    def both(params, x):
        query, key = (
            positions.rotary(project(params, name, x), base=100.0) for name in ("query", "key")
        )
        mixed = dot_product_attention(query, key, project(params, "value", x), bias, mask)
        out = jnp.einsum("...TNH,NHD->...TD", mixed, params["out"]["kernel"])
        return (
            layer.apply({"params": params}, x, mask=mask, bias=bias),
            out + params["out"]["bias"],
        )

    got, want = both(params, x)
    assert_close(got, want, 2e-6)


GAPS = np.array([[0, 2, 3, 7], [5, 6, 1, 8]])  # Row 1 is in no order, as where documents mix.


def test_rotary_turns_tokens_by_the_positions_that_are_given():
    x = normal(2, 4, 12)
    layer = MultiHeadAttention(num_heads=6, num_kv_heads=2, head_dim=4, rotary=True)
    variables = init(layer, x)
    params = jax.tree.map(oracles.f64, variables["params"])
    mask = masks.causal()
    got = jax.jit(functools.partial(layer.apply, mask=mask))(variables, x, positions=GAPS)
    qkv = [np.asarray(project(params, name, oracles.f64(x))) for name in ("query", "key", "value")]
    for i, b in np.ndindex(2, 2):
        qkv[i] = np.array(qkv[i])
        qkv[i][b] = oracles.rotary(qkv[i][b], GAPS[b])
    mixed, _ = oracles.dot_product(*qkv, mask=oracles.causal(4, 4))
    want = np.einsum("btnh,nhd->btd", mixed, params["out"]["kernel"]) + params["out"]["bias"]
    assert_close(got, want, 1e-5)


ASKED = np.array([[3, 0], [1, 1]])
SOME = {
    "plain": (MultiHeadAttention, {}, {}),
    "grouped, rotary, causal": (
        MultiHeadAttention,
        {"num_kv_heads": 1, "rotary": True, "sinks": True},
        {"mask": masks.causal()},
    ),
    "positions": (
        MultiHeadAttention,
        {"rotary": True, "qk_norm": True},
        {"mask": masks.placed(masks.window(3), GAPS), "positions": GAPS},
    ),
    "one row of positions": (MultiHeadAttention, {"rotary": True}, {"positions": GAPS[1]}),
    "arrays": (
        MultiHeadAttention,
        {},
        {
            "mask": np.random.default_rng(0).integers(0, 2, (2, 1, 4, 4)) > 0,
            "bias": np.random.default_rng(1).standard_normal((2, 4, 4)).astype(np.float32),
        },
    ),
    "alibi, blockwise": (
        MultiHeadAttention,
        {"implementation": "blockwise"},
        {"bias": biases.alibi(2), "mask": masks.causal()},
    ),
    "differential": (DifferentialAttention, {"head_dim": 8}, {"mask": masks.causal()}),
    # Its frequencies go by the length of the row.
    "dynamic": (
        MultiHeadAttention,
        {"rotary": True, "rotary_scaling": positions.dynamic(8.0, 2)},
        {"mask": masks.causal()},
    ),
    "sigmoid": (MultiHeadAttention, {"attention_fn": sigmoid_attention}, {"mask": masks.causal()}),
    # Its sums run through all queries.
    "linear": (MultiHeadAttention, {"attention_fn": linear_attention}, {"mask": masks.causal()}),
}


@pytest.mark.parametrize("name", SOME)
def test_some_outputs_are_those_of_all(name):
    make, fields, options = SOME[name]
    x = normal(2, 4, 12)
    layer = make(num_heads=2, **fields)
    variables = init(layer, x)

    def some(variables, x):
        return layer.apply(variables, x, output_positions=ASKED, **options)

    def of_all(variables, x):
        out = layer.apply(variables, x, **options)
        return jnp.take_along_axis(out, ASKED[..., None], axis=1)

    results = []
    for run in (some, of_all):
        square = lambda *inputs, run=run: (run(*inputs) ** 2).sum()
        results.append(
            (jax.jit(run)(variables, x), jax.jit(jax.grad(square, (0, 1)))(variables, x))
        )
    jax.tree.map(lambda got, want: assert_close(got, want, 1e-5), *results)


def test_the_last_output_is_that_of_minus_one():
    x = normal(2, 4, 12)
    layer = MultiHeadAttention(num_heads=2, rotary=True)
    variables = init(layer, x)
    run = functools.partial(layer.apply, variables, x, mask=masks.causal())
    last = np.full((2, 1), -1)
    assert_close(run(output_positions=last), run()[:, -1:], 1e-6)
    jitted = jax.jit(lambda places: run(output_positions=places))
    assert_close(jitted(last), run()[:, -1:], 1e-6)
    closed_over = jax.jit(lambda: run(output_positions=jnp.asarray(last)))
    assert_close(closed_over(), run()[:, -1:], 1e-6)
    places = jnp.asarray(last)  # Known, though operations on it are traced.
    assert_close(jax.jit(lambda: run(output_positions=places))(), run()[:, -1:], 1e-6)


@pytest.mark.parametrize(
    "make", [MultiHeadAttention, functools.partial(Block, MultiHeadAttention(2))]
)
def test_a_traced_place_that_is_none_is_nan_and_spoils_no_gradient(make):
    x = normal(2, 4, 12)
    layer = make(2) if make is MultiHeadAttention else make(MLP(8))
    variables = init(layer, x)
    places, is_in = np.array([[3, 4], [-5, 1]]), np.array([[True, False], [False, True]])

    @jax.jit
    def run(variables, places):
        out = layer.apply(variables, x, output_positions=places)
        return jnp.where(is_in[..., None], out, 0).sum(), out

    (_, out), grads = jax.value_and_grad(run, has_aux=True)(variables, places)
    np.testing.assert_array_equal(np.isfinite(out).all(-1), is_in)
    jax.tree.map(lambda x: np.testing.assert_array_equal(np.isfinite(x), True), grads)


def test_asking_for_some_outputs_drops_no_other_weights():
    x = normal(2, 4, 12)
    layer = MultiHeadAttention(num_heads=2, dropout_rate=0.5)
    variables = init(layer.clone(deterministic=True), x)
    rngs = {"dropout": jax.random.key(3)}
    run = functools.partial(layer.apply, variables, x, deterministic=False, rngs=rngs)
    want = jnp.take_along_axis(run(), ASKED[..., None], axis=1)
    assert_close(run(output_positions=ASKED), want, 1e-6)


def test_weights_are_shown_of_all_queries_though_some_outputs_are_asked_for():
    x = normal(2, 4, 12)
    layer = MultiHeadAttention(num_heads=2, rotary=True)
    variables = init(layer, x)
    run = functools.partial(layer.apply, variables, x, output_positions=ASKED)
    out, state = run(sow_weights=True, mutable=["intermediates"])
    assert state["intermediates"]["attention_weights"][0].shape == (2, 2, 4, 4)
    assert_close(out, run(), 1e-6)


@pytest.mark.parametrize(
    ("places", "options", "error", "words"),
    [
        (
            ASKED,
            {"inputs_kv": np.ones((2, 3, 12))},
            NotImplementedError,
            "output_positions are for",
        ),
        (ASKED[:1], {}, ValueError, r"output_positions must be \[..., P\].*\(2,\).*\(1, 2\)"),
        (ASKED * 1.0, {}, TypeError, "output_positions must hold integers"),
        (ASKED + 1, {}, ValueError, r"output_positions must be places in a row of 4, got"),
        (ASKED - 5, {}, ValueError, r"output_positions must be places in a row of 4, got"),
        (ASKED, {"mask": np.ones((2, 1, 3, 4), bool)}, ValueError, r"dense.*T=3.*T=4"),
        (ASKED, {"bias": np.ones((5, 4))}, ValueError, r"bias must broadcast"),
    ],
)
def test_outputs_that_cannot_be_asked_for_are_refused(places, options, error, words):
    x = normal(2, 4, 12)
    layer = MultiHeadAttention(num_heads=2)
    variables = init(layer, x)
    with pytest.raises(error, match=words):
        layer.apply(variables, x, output_positions=places, **options)


@pytest.mark.parametrize("name", ["plain", "grouped, rotary, window", "alibi, qk-norm"])
def test_some_outputs_of_new_tokens_are_those_of_all(name):
    decoder = decoder_of(name)
    _, cache = decoder.jitted(decoder.cache, decoder.x[:, :5])
    asked = np.array([[2], [0]])
    out, state = decoder.jitted(cache, decoder.x[:, 5:8], output_positions=asked)
    assert_close(out, jnp.take_along_axis(decoder.want[:, 5:8], asked[..., None], axis=1), 1e-5)
    _, every = decoder.jitted(cache, decoder.x[:, 5:8])
    jax.tree.map(np.testing.assert_array_equal, state, every)  # All are keys for what follows.


@pytest.mark.parametrize("make", [MultiHeadAttention, DifferentialAttention])
def test_positions_that_are_given_decode_and_map(make):
    x = normal(2, 4, 12)
    layer = make(num_heads=2, head_dim=8, rotary=True)
    variables = init(layer, x)
    run = functools.partial(layer.apply, variables, mask=masks.causal())
    decoder = layer.clone(decode=True)

    @jax.jit
    def program(x, at):
        cache = decoder.init(jax.random.key(0), x)["cache"]
        outs = []
        for part in (slice(0, 3), slice(3, 4)):
            state = {**variables, "cache": cache}
            out, state = decoder.apply(state, x[:, part], positions=at[:, part], mutable=["cache"])
            cache = state["cache"]
            outs.append(out)
        return (
            run(x, positions=at),
            jnp.concatenate(outs, axis=1),
            jax.vmap(lambda x, at: run(x, positions=at))(x, at),
            jax.vmap(lambda x: run(x, positions=at[0]))(x),
            run(x),
        )

    want, decoded, mapped, shared, plain = program(x, jnp.asarray(GAPS))
    assert_close(decoded, want, 1e-5)
    assert_close(mapped, want, 1e-5)
    assert_close(shared[0], want[0], 1e-5)
    assert abs(want - plain).max() > 1e-3


def test_single_head_attention_is_one_head():
    x = normal(2, 5, 12)
    one, many = SingleHeadAttention(head_dim=4), MultiHeadAttention(num_heads=1, head_dim=4)
    variables = init(one, x)
    params = variables["params"]
    assert shapes(params["query"]) == {"kernel": (12, 4), "bias": (4,)}
    assert shapes(params["out"]) == {"kernel": (4, 12), "bias": (12,)}
    with_head = {
        name: {
            "kernel": leaf["kernel"][:, None] if name != "out" else leaf["kernel"][None],
            "bias": leaf["bias"][None] if name != "out" else leaf["bias"],
        }
        for name, leaf in params.items()
    }
    got = jax.jit(functools.partial(one.apply, mask=masks.causal()))(variables, x)
    want = jax.jit(functools.partial(many.apply, mask=masks.causal()))({"params": with_head}, x)
    assert_close(got, want, 1e-6)


def test_head_dim_defaults_to_the_width_by_heads():
    x = normal(1, 2, 12)
    assert init(MultiHeadAttention(num_heads=3), x)["params"]["query"]["kernel"].shape == (12, 3, 4)
    single = init(SingleHeadAttention(), x)["params"]
    assert single["query"]["kernel"].shape == (12, 12)


def test_softcap_and_sinks_reach_the_function_and_the_weights_shown():
    x = normal(2, 5, 12)
    layer = MultiHeadAttention(num_heads=3, softcap=0.5, sinks=True)
    variables = init(layer, x)
    params = variables["params"]
    assert params["sinks"].shape == (3,)

    @jax.jit
    def both(variables, x):
        params = variables["params"]
        qkv = (project(params, name, x) for name in ("query", "key", "value"))
        mixed = dot_product_attention(*qkv, softcap=0.5, sinks=params["sinks"])
        out = jnp.einsum("...TNH,NHD->...TD", mixed, params["out"]["kernel"])
        got, state = layer.apply(variables, x, sow_weights=True, mutable=["intermediates"])
        return got, out + params["out"]["bias"], state["intermediates"]["attention_weights"][0]

    got, want, weights = both(variables, x)
    assert_close(got, want, 1e-6)
    # What the sink takes is missing from the row.
    assert (weights.sum(-1) < 0.99).all()


def differential(num_heads=2, **options):
    """A layer with heads of size 8, and parameters."""
    layer = DifferentialAttention(num_heads, head_dim=8, lambda_init=0.3, **options)
    return layer, init(layer, normal(2, 5, 12))


def test_differential_attention_is_the_function_with_its_lambda():
    layer, variables = differential(num_heads=4, num_kv_heads=2, rotary=True, qk_norm=True)
    params = variables["params"]
    assert params["query"]["kernel"].shape == (12, 4, 8)
    assert params["value"]["kernel"].shape == (12, 2, 8)
    assert params["lambda_query_1"].shape == (4,)
    x = normal(2, 5, 12)

    def halves(name, params):
        """Each half of a head has a norm and a rotation of its own."""
        x_name = project(params, name, x)
        parts = []
        for half in jnp.split(x_name, 2, axis=-1):
            centred = half - half.mean(-1, keepdims=True)
            normed = centred / jnp.sqrt((centred**2).mean(-1, keepdims=True) + 1e-6)
            parts.append(positions.rotary(normed * params[f"{name}_ln"]["scale"]))
        return jnp.concatenate(parts, axis=-1)

    @jax.jit
    def both(params):
        vectors = {name: leaf for name, leaf in params.items() if name.startswith("lambda")}
        first = jnp.exp(jnp.sum(vectors["lambda_query_1"] * vectors["lambda_key_1"]))
        second = jnp.exp(jnp.sum(vectors["lambda_query_2"] * vectors["lambda_key_2"]))
        mixed = differential_attention(
            halves("query", params),
            halves("key", params),
            project(params, "value", x),
            mask=masks.causal(),
            lambda_full=first - second + 0.3,
        )
        normed = mixed / jnp.sqrt((mixed**2).mean(-1, keepdims=True) + 1e-5)
        mixed = (1 - 0.3) * normed * params["head_norm"]["scale"]
        out = jnp.einsum("...TNH,NHD->...TD", mixed, params["out"]["kernel"])
        got = layer.apply({"params": params}, x, mask=masks.causal())
        return got, out + params["out"]["bias"]

    got, want = both(params)
    assert_close(got, want, 1e-5)
    apply = functools.partial(layer.apply, sow_weights=True, mutable=["intermediates"])
    _, state = jax.jit(apply)({"params": params}, x, mask=masks.causal())
    (weights,) = state["intermediates"]["attention_weights"]
    dots = [jnp.sum(params[f"lambda_query_{i}"] * params[f"lambda_key_{i}"]) for i in (1, 2)]
    share = jnp.exp(dots[0]) - jnp.exp(dots[1]) + 0.3
    assert weights.shape == (2, 4, 5, 5)
    assert_close(weights.sum(-1), jnp.full((2, 4, 5), 1 - share), 1e-5)


def test_differential_attention_decodes():
    layer, variables = differential(rotary=True)
    x = normal(2, 5, 12)
    want = jax.jit(functools.partial(layer.apply, mask=masks.causal()))(variables, x)
    decoder = layer.clone(decode=True)
    cache = jax.jit(decoder.init)(jax.random.key(0), x)["cache"]
    step = jax.jit(functools.partial(decoder.apply, mutable=["cache"]))
    outs = []
    for part in (x[:, :3], x[:, 3:]):
        out, state = step({**variables, "cache": cache}, part)
        cache = state["cache"]
        outs.append(out)
    assert_close(jnp.concatenate(outs, axis=1), want, 1e-5)


def test_gated_delta_attention_is_the_recurrence_behind_its_gates():
    x = normal(2, 5, 12)
    layer = GatedDeltaAttention(num_heads=4, num_kv_heads=2, head_dim=3, use_bias=True)
    variables = init(layer, x)
    params = jax.tree.map(oracles.f64, variables["params"])
    assert params["query"]["kernel"].shape == (12, 4, 3)
    assert params["decay"]["kernel"].shape == params["beta"]["kernel"].shape == (12, 2)
    sigmoid = lambda x: 1 / (1 + np.exp(-x))
    silu = lambda x: x * sigmoid(x)
    dense = lambda name: (
        np.einsum("btd,d...->bt...", oracles.f64(x), params[name]["kernel"])
        + params[name].get("bias", 0)
    )

    def short(name):
        """The projection, each feature mixed with its own last four values."""
        before = dense(name)
        kernel = params[f"{name}_conv"].reshape(4, *before.shape[-2:])
        after = np.zeros(before.shape)
        for t, i in np.ndindex(5, 4):
            if t - i >= 0:
                after[:, t] += kernel[3 - i] * before[:, t - i]
        return silu(after)

    unit = lambda x: x / np.sqrt((x**2).sum(-1, keepdims=True) + 1e-6)
    step = np.log1p(np.exp(dense("decay") + params["decay_bias"]))
    mixed = oracles.gated_delta(
        unit(short("query")),
        unit(short("key")),
        short("value"),
        log_decay=-np.exp(params["decay_rate"]) * step,
        beta=sigmoid(dense("beta")),
    )
    mixed /= np.sqrt((mixed**2).mean(-1, keepdims=True) + 1e-5)
    mixed *= params["head_norm"]["scale"] * silu(dense("gate"))
    want = np.einsum("btnh,nhd->btd", mixed, params["out"]["kernel"]) + params["out"]["bias"]
    assert_close(jax.jit(layer.apply)(variables, x), want, 1e-5)


def test_the_decay_starts_between_nothing_and_much():
    layer = GatedDeltaAttention(num_heads=64, head_dim=2)
    params = jax.jit(layer.init)(jax.random.key(0), normal(1, 1, 4))["params"]
    rate = np.exp(params["decay_rate"])
    step = np.log1p(np.exp(params["decay_bias"]))
    assert rate.min() >= 1
    assert rate.max() <= 16
    assert step.min() >= 0.9e-3
    assert step.max() <= 0.11
    assert step.max() / step.min() > 10


def test_another_attention_fn_is_called():
    x = normal(2, 5, 12)
    plain, linear = (
        MultiHeadAttention(num_heads=3),
        MultiHeadAttention(num_heads=3, attention_fn=linear_attention),
    )
    variables = init(plain, x)
    outs = [
        jax.jit(functools.partial(layer.apply, mask=masks.causal()))(variables, x)
        for layer in (plain, linear)
    ]
    assert abs(outs[0] - outs[1]).max() > 1e-3


# Dropout, types.


@pytest.mark.parametrize("make", [MultiHeadAttention, SingleHeadAttention])
def test_dropout_needs_to_be_told_and_follows_its_rng(make):
    heads = {"num_heads": 3} if make is MultiHeadAttention else {}
    x = normal(2, 5, 12)
    layer, plain = make(dropout_rate=0.5, **heads), make(**heads)
    variables = init(plain, x)

    @functools.partial(jax.jit, static_argnums=1)
    def run(rng, deterministic):
        return layer.apply(variables, x, deterministic=deterministic, rngs={"dropout": rng})

    a, b, c = (run(jax.random.key(seed), False) for seed in (0, 0, 1))
    np.testing.assert_array_equal(a, b)
    assert (a != c).any()
    assert_close(run(jax.random.key(0), True), plain.apply(variables, x), 1e-6)
    with pytest.raises(ValueError, match=r"^deterministic must be True or False.*rate=0.5: got no"):
        layer.apply(variables, x, rngs={"dropout": jax.random.key(0)})
    with pytest.raises(ValueError, match=r'^dropout_rate=0.5 needs a key: give apply rngs={"drop'):
        layer.apply(variables, x, deterministic=False)


@pytest.mark.parametrize("make", [MultiHeadAttention, SingleHeadAttention])
def test_bfloat16_computes_forward_and_backward_with_float32_parameters(make):
    # A bfloat16 product with a float32 result and a batch axis in the middle does not run on CPU.
    heads = {"num_heads": 4, "num_kv_heads": 2, "rotary": True, "qk_norm": True}
    layer = make(dtype=jnp.bfloat16, **(heads if make is MultiHeadAttention else {}))
    x = normal(2, 5, 8)
    variables = init(layer, x)
    assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {jnp.dtype("float32")}

    @jax.jit
    def run(variables, x):
        def loss(variables, x):
            out = layer.apply(variables, x, mask=masks.causal(), bias=jnp.ones((5, 5)))
            return out.astype(jnp.float32).sum(), out

        return jax.grad(loss, argnums=(0, 1), has_aux=True)(variables, x)

    (grads, d_x), out = run(variables, x)
    assert out.dtype == jnp.bfloat16
    assert {leaf.dtype for leaf in jax.tree.leaves(grads)} == {jnp.dtype("float32")}
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves((grads, d_x)))
    exact = layer.clone(dtype=None).apply(variables, x, mask=masks.causal(), bias=jnp.ones((5, 5)))
    assert abs(out - exact).max() < 0.05 * abs(exact).max()


def test_parameters_may_be_bfloat16():
    variables = jax.eval_shape(
        MultiHeadAttention(num_heads=3, param_dtype=jnp.bfloat16, qk_norm=True).init,
        jax.random.key(0),
        normal(2, 5, 12),
    )
    assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {jnp.dtype("bfloat16")}


@pytest.mark.parametrize(
    ("layer", "settings", "error", "word"),
    [
        (MultiHeadAttention(num_heads=5), {}, ValueError, "num_heads"),
        (MultiHeadAttention(num_heads=4, num_kv_heads=3), {}, ValueError, "num_kv_heads"),
        (MultiHeadAttention(num_heads=4, num_kv_heads=0), {}, ValueError, "num_kv_heads"),
        (MultiHeadAttention(num_heads=4, dropout_rate=1.0), {}, ValueError, "dropout_rate"),
        (MultiHeadAttention(num_heads=4), {"mask": np.ones((5, 5))}, TypeError, "mask"),
        (
            MultiHeadAttention(num_heads=4, rotary=True),
            {"inputs_kv": normal(2, 7, 12)},
            (ValueError, NotImplementedError),
            "rotary",
        ),
        (MultiHeadAttention(num_heads=4, rotary_base=100.0), {}, ValueError, "rotary_base.*100"),
        (
            MultiHeadAttention(num_heads=4, decode=True, dropout_rate=0.5),
            {"deterministic": False},
            NotImplementedError,
            "decode.*dropout_rate=0.5",
        ),
        (MultiHeadAttention(num_heads=4, softcap=-1.0), {}, ValueError, "softcap"),
        (
            MultiHeadAttention(num_heads=4),
            {"deterministic": "no"},
            TypeError,
            "deterministic.*'no'",
        ),
        (SingleHeadAttention(use_bias="no"), {}, TypeError, "use_bias.*'no'"),
        (MultiHeadAttention(num_heads=4, rotary="no"), {}, TypeError, "rotary.*'no'"),
        (GatedDeltaAttention(num_heads=4, use_bias=None), {}, TypeError, "use_bias.*None"),
        (MultiHeadAttention(num_heads=4), {"sow_weights": "no"}, TypeError, "sow_weights.*'no'"),
        (SingleHeadAttention(attention_fn=None), {}, TypeError, "attention_fn.*None"),
        (MultiHeadAttention(num_heads=4, kernel_init="ones"), {}, TypeError, "kernel_init.*'ones'"),
        (SingleHeadAttention(out_features=0.5), {}, TypeError, "out_features.*0.5"),
        (SingleHeadAttention(head_dim=0), {}, ValueError, "head_dim.*0"),
        (MultiHeadAttention(num_heads=4, rotary_base="far"), {}, TypeError, "rotary_base.*'far'"),
        (DifferentialAttention(num_heads=2, lambda_init=None), {}, TypeError, "lambda_init.*None"),
        (MultiHeadAttention(num_heads=4), {"inputs_kv": "keys"}, TypeError, "inputs_kv.*'keys'"),
        (MultiHeadAttention(num_heads=4), {"inputs_kv": normal(12)}, ValueError, "inputs_kv.*12"),
        (SingleHeadAttention(), {"inputs_kv": normal(3, 7, 12)}, ValueError, "inputs_kv.*3, 7, 12"),
        (DifferentialAttention(num_heads=4), {}, ValueError, "head_dim.*3"),
        (DifferentialAttention(num_heads=4, qk_norm=True), {}, ValueError, "head_dim.*3"),
        (
            MultiHeadAttention(num_heads=2, attention_fn=linear_attention),
            {"sow_weights": True},
            NotImplementedError,
            "sow_weights",
        ),
        (GatedDeltaAttention(num_heads=5), {}, ValueError, "num_heads"),
        (GatedDeltaAttention(num_heads=4, num_kv_heads=3), {}, ValueError, "num_kv_heads"),
        (GatedDeltaAttention(num_heads=4, conv_size=0), {}, ValueError, "conv_size"),
        (
            GatedDeltaAttention(num_heads=4),
            {"mask": masks.window(2)},
            NotImplementedError,
            "window",
        ),
        (MultiHeadAttention(num_heads=4), {"positions": PLACES}, ValueError, "positions.*rotary"),
        (
            MultiHeadAttention(num_heads=2, rotary=True),
            {"positions": PLACES[:4]},
            ValueError,
            r"positions.*\(2, 5\).*\(4,\)",
        ),
        (
            MultiHeadAttention(num_heads=2, rotary=True),
            {"positions": np.zeros((3, 5), int)},
            ValueError,
            r"positions.*\(2, 5\).*\(3, 5\)",
        ),
        (
            MultiHeadAttention(num_heads=2, rotary=True),
            {"positions": np.zeros(5)},
            TypeError,
            "positions.*float",
        ),
        (
            MultiHeadAttention(num_heads=2, rotary=True),
            {"positions": PLACES, "inputs_kv": normal(2, 7, 12)},
            NotImplementedError,
            "rotary",
        ),
        (SingleHeadAttention(), {"positions": PLACES}, NotImplementedError, "positions.*Single"),
        (
            GatedDeltaAttention(num_heads=4),
            {"positions": PLACES},
            NotImplementedError,
            "positions.*gated delta",
        ),
        (
            GatedDeltaAttention(num_heads=4),
            {"sow_weights": True},
            NotImplementedError,
            "sow_weights",
        ),
        (MultiHeadAttention(2, qk_norm="batch"), {}, ValueError, "qk_norm.*'batch'"),
        (
            MultiHeadAttention(2, qk_norm=nn.RMSNorm, norm_epsilon=1e-5),
            {},
            ValueError,
            "norm_epsilon",
        ),
        (MultiHeadAttention(2, use_bias=("q",)), {}, TypeError, r"use_bias.*\('q',\)"),
        (MultiHeadAttention(2, use_bias="query"), {}, TypeError, "use_bias.*'query'"),
        (MultiHeadAttention(2, value_head_dim=0), {}, ValueError, "value_head_dim"),
        (MultiHeadAttention(2, scale="large"), {}, TypeError, "scale"),
        (MultiHeadAttention(2, implementation="flash"), {}, ValueError, "implementation"),
        (MultiHeadAttention(2, rotary_fraction=0.5), {}, ValueError, "rotary_fraction"),
        (MultiHeadAttention(2, rotary_layout="pairs"), {}, ValueError, "rotary_layout"),
        (
            MultiHeadAttention(2, rotary_scaling=positions.linear(2.0)),
            {},
            ValueError,
            "rotary_scaling",
        ),
        (
            MultiHeadAttention(2, rotary=True, rotary_layout="pairs"),
            {},
            ValueError,
            "rotary_layout",
        ),
    ],
)
def test_a_layer_that_cannot_be_is_refused(layer, settings, error, word):
    settings = {"deterministic": True, **settings}
    with pytest.raises(error, match=word) as refusal:
        jax.eval_shape(lambda: layer.init(jax.random.key(0), normal(2, 5, 12), **settings))
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    ("inputs", "error"),
    [
        *((3, TypeError), ({"x": 1}, TypeError), (np.array(["a"]), TypeError)),
        *((np.ones((2, 4), complex), TypeError), (np.ones(4), ValueError)),
        (np.ones((2, 0)), ValueError),
    ],
)
@pytest.mark.parametrize(
    "layer",
    [
        SingleHeadAttention(),
        MultiHeadAttention(num_heads=2),
        GatedDeltaAttention(num_heads=2),
        make_sequence_model(4),
    ],
)
def test_what_is_no_sequence_of_vectors_is_refused(layer, inputs, error):
    with pytest.raises(error, match=r"^inputs") as refusal:
        jax.eval_shape(lambda: layer.init(jax.random.key(0), inputs))
    assert "\n" not in str(refusal.value)


# Decoding.

CAPACITY = 11
DECODED = {
    "plain": ({}, {}, masks.causal()),
    "grouped, rotary, window": (
        {"num_kv_heads": 2, "rotary": True},
        {"mask": masks.window(3)},
        masks.window(3),
    ),
    "alibi, qk-norm": ({"qk_norm": True}, {"bias": biases.alibi(4)}, masks.causal()),
}


class Decoder:
    """A layer, the full forward pass that decoding has to reproduce, and its empty cache."""

    def __init__(self, name, batch=(2,)):
        options, self.settings, mask = DECODED[name]
        self.x = normal(*batch, CAPACITY, 12)
        full = MultiHeadAttention(num_heads=4, head_dim=6, **options)
        self.layer = full.clone(decode=True)
        variables = init(self.layer, self.x)
        self.params, self.cache = variables["params"], variables["cache"]
        self.want = jax.jit(functools.partial(full.apply, **{**self.settings, "mask": mask}))(
            {"params": self.params}, self.x
        )
        self.jitted = jax.jit(self.step)

    def step(self, cache, x, **more):
        out, state = self.layer.apply(
            {"params": self.params, "cache": cache}, x, mutable=["cache"], **self.settings, **more
        )
        return out, state["cache"]

    def run(self, chunks):
        cache, done, outs = self.cache, 0, []
        for size in chunks:
            out, cache = self.jitted(cache, self.x[..., done : done + size, :])
            outs.append(out)
            done += size
        return jnp.concatenate(outs, axis=-2)


@functools.lru_cache
def decoder_of(name, batch=(2,)):
    return Decoder(name, batch)


@pytest.mark.parametrize("name", DECODED)
def test_decoding_in_any_portions_is_the_full_forward_pass(name):
    decoder = decoder_of(name)
    for chunks in ((1,) * CAPACITY, (4, 1, 6), (CAPACITY,)):
        assert_close(decoder.run(chunks), decoder.want, 1e-5, str(chunks))


def test_init_leaves_the_cache_empty():
    layer = MultiHeadAttention(num_heads=4, num_kv_heads=2, head_dim=6, decode=True)
    cache = jax.jit(layer.init)(jax.random.key(0), normal(3, CAPACITY, 12))["cache"]
    assert not any(leaf.any() for leaf in jax.tree.leaves(cache))
    assert cache["cached_key"].shape == (3, CAPACITY, 2, 6)


def test_rows_may_be_of_different_length():
    decoder = decoder_of("grouped, rotary, window")
    # Row 0 takes 4, 1 and 2 tokens, row 1 takes 2, 2 and 2; what is padded is NaN.
    cache, taken = decoder.cache, np.zeros(2, int)
    for lengths in ([4, 2], [1, 2], [2, 2]):
        T = max(lengths)
        x = np.full((2, T, 12), np.nan, np.float32)
        for row, length in enumerate(lengths):
            x[row, :length] = decoder.x[row, taken[row] : taken[row] + length]
        out, cache = decoder.jitted(cache, jnp.asarray(x), lengths=jnp.array(lengths))
        for row, length in enumerate(lengths):
            want = decoder.want[row, taken[row] : taken[row] + length]
            assert_close(out[row, :length], want, 1e-5)
        taken += lengths


def test_past_capacity_is_an_error_outside_jit():
    decoder = decoder_of("plain")
    _, cache = decoder.jitted(decoder.cache, decoder.x[:, :9])
    with pytest.raises(ValueError, match="11"):
        decoder.step(cache, decoder.x[:, :3])
    with pytest.raises(ValueError, match="11"):
        decoder.step(decoder.cache, normal(2, CAPACITY + 1, 12))


def test_past_capacity_is_nan_inside_jit_and_overwrites_nothing():
    decoder = decoder_of("plain")
    _, cache = decoder.jitted(decoder.cache, decoder.x[:, :9])
    out, after = decoder.jitted(cache, decoder.x[:, :3])
    assert np.isnan(out).all()
    for name in ("cached_key", "cached_value"):
        np.testing.assert_array_equal(after[name], cache[name])
    # And it does not forget that something was lost, if it goes on at all.
    more, _ = decoder.jitted(after, decoder.x[:, :3])
    assert np.isnan(more).all()
    # Up to the last place, all is well.
    out, _ = decoder.jitted(cache, decoder.x[:, 9:])
    assert_close(out, decoder.want[:, 9:], 1e-5)


def test_two_batch_axes_and_none_decode():
    for batch in ((2, 3), ()):
        decoder = decoder_of("plain", batch)
        assert_close(decoder.run((4, 6, 1)), decoder.want, 1e-5)


def test_a_cache_of_another_batch_is_refused():
    decoder = decoder_of("plain")
    with pytest.raises(ValueError, match="batch"):
        decoder.step(decoder.cache, normal(3, 1, 12))


@pytest.mark.parametrize(
    ("left", "kernel"), [((2,), (6, 5)), ((2,), (6, 2, 5)), ((1, 2), (4, 6, 3))], ids=str
)
def test_vectors_times_a_kernel_are_those_of_one_batch_axis(left, kernel, monkeypatch):
    x, w = (jax.random.normal(jax.random.key(i), s) for i, s in enumerate([(3, 4, 6), kernel]))
    numbers = ((left, tuple(range(len(left)))), ((), ()))

    def found(product):
        out, pull_back = jax.vjp(lambda x, w: product(x, w, numbers, precision=None), x, w)
        return out, *pull_back(jnp.cos(out))

    want = found(jax.lax.dot_general)
    monkeypatch.setattr(xla_cpu, "_MULTIPLICATIONS", 1)
    monkeypatch.setattr(jax, "device_count", lambda: 1)  # Several may split two of the batch axes.
    for got, wanted in zip(found(kernel_product), want, strict=True):
        assert got.shape == wanted.shape
        np.testing.assert_allclose(got, wanted, rtol=1e-5, atol=1e-5)
    flat = str(jax.make_jaxpr(lambda: kernel_product(x, w, numbers))())
    assert ("reshape" in flat) == (len(left) == 1)  # Vectors of one batch axis are flat already.
