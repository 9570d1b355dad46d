"""Promises on a mesh: each device computes its own batch rows and heads, and sends no data."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import Sizes, random_qkv
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from attention_jax import (
    MultiHeadAttention,
    attention_weights,
    biases,
    decoding,
    differential_attention,
    dot_product_attention,
    gated_delta_attention,
    generate,
    linear_attention,
    masks,
    positions,
)
from attention_jax.training.model import make_sequence_model

COLLECTIVE = re.compile(
    r"\b(all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter)(?:-start)?\("
)
B, T, N = 4, 24, 4
ROWS, HEADS, BOTH = P("data"), P(None, None, "model"), P("data", None, "model")


@functools.cache
def make_mesh(kind=AxisType.Auto, data=2, model=2):
    shape = {"data": data, "model": model}
    devices = jax.devices()[: data * model]
    return jax.make_mesh(shape.values(), shape.keys(), axis_types=(kind,) * 2, devices=devices)


def place(mesh, spec, *arrays):
    return [jax.device_put(x, NamedSharding(mesh, spec)) for x in arrays]


def sizes(K, length=T):
    return Sizes(batch=(B,), T=length, S=length, N=N, K=K, H=8, V=8)


TILES = functools.partial(dot_product_attention, implementation="blockwise", block_size=8)
LENGTHS = masks.key_lengths(jnp.array([0, 3, 11, T]))
DROPOUT = dict(dropout_rate=0.3, dropout_rng=jax.random.key(7))
# Few programs, each with much in it: compiling is what these tests take.
FEATURES = [
    {},
    dict(mask=masks.causal(), bias=biases.alibi(N), softcap=2.0, **DROPOUT),
    dict(mask=LENGTHS & masks.window(3, 5), sinks=jnp.arange(1.0, N + 1)),
    dict(mask=masks.segments(jnp.arange(B * T).reshape(B, T) // 7)),
]
DENSE = functools.partial(dot_product_attention, implementation="dense")


def all_features(attend):
    """Outputs and residuals of every feature, one after the other: one program for all."""

    def run(query, key, value):
        return [attend(query, key, value, return_residual=True, **x) for x in FEATURES]

    return run


def with_gradients(run):
    def both(*arrays):
        out, pull_back = jax.vjp(run, *arrays)
        cotangent = jax.tree.map(lambda x: jnp.where(jnp.isfinite(x), x, 0), out)
        return out, pull_back(cotangent)

    return both


@functools.cache
def alone(attend, K):
    return jax.jit(with_gradients(all_features(attend)))(*random_qkv(sizes(K)))


def assert_equal(found, wanted, tolerance=2e-5):
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(a, b, atol=tolerance, rtol=tolerance)


def collectives(compiled):
    return [match[1] for match in COLLECTIVE.finditer(compiled.as_text())]


@pytest.mark.parametrize(
    ("attend", "spec", "K"),
    [(TILES, BOTH, 4), (TILES, BOTH, 2), (DENSE, BOTH, 2)],
    ids=["equal heads", "grouped heads", "dense"],
)
def test_devices_send_nothing(attend, spec, K):
    arrays = place(make_mesh(), spec, *random_qkv(sizes(K)))
    compiled = jax.jit(with_gradients(all_features(attend))).lower(*arrays).compile()
    assert not collectives(compiled)
    found, gradients = compiled(*arrays)
    for array, gradient in zip(arrays, gradients, strict=True):
        assert gradient.sharding.is_equivalent_to(array.sharding, 4)
    for out, residual in found:
        assert out.sharding.is_equivalent_to(arrays[0].sharding, 4)
        assert residual.sharding.is_equivalent_to(arrays[0].sharding, 3)
    assert_equal((found, gradients), alone(attend, K))


@pytest.mark.slow
@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=["auto", "explicit"])
@pytest.mark.parametrize("K", [4, 2, 1])
@pytest.mark.parametrize("spec", [ROWS, HEADS, BOTH], ids=["rows", "heads", "both"])
@pytest.mark.parametrize("length", [128, 1024])
def test_the_automatic_choice_sends_nothing(length, spec, K, kind):
    """Each feature by itself, as `implementation=None` computes it."""
    if K == 1 and spec != ROWS:
        pytest.skip("Queries on several devices read one key head: its gradient is a sum.")
    mesh = make_mesh(kind)
    shapes = [
        jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, spec))
        for x in random_qkv(sizes(K, length))
    ]
    for settings in (
        {},
        dict(mask=masks.causal()),
        dict(mask=masks.window(32)),
        dict(bias=biases.alibi(N)),
        dict(sinks=jnp.arange(1.0, N + 1)),
        dict(softcap=2.0),
    ):
        run = with_gradients(functools.partial(dot_product_attention, **settings))
        compiled = jax.jit(run).lower(*shapes).compile()
        assert not collectives(compiled), settings
        for found, shape in zip(
            jax.tree.leaves(compiled.output_shardings), [shapes[0], *shapes], strict=True
        ):
            assert found.is_equivalent_to(shape.sharding, 4), settings


def test_each_device_reads_the_key_head_of_its_queries():
    """More devices than key heads: only the gradients of keys and values are summed."""
    K = 2
    query, key, value = random_qkv(sizes(K))
    mesh = make_mesh(data=1, model=4)
    arrays = [*place(mesh, HEADS, query), *place(mesh, P(), key, value)]
    compiled = jax.jit(with_gradients(all_features(TILES))).lower(*arrays).compile()
    assert set(collectives(compiled)) == {"all-reduce"}
    assert_equal(compiled(*arrays), alone(TILES, K))


def test_memory_of_a_device_falls_with_the_devices():
    shape = Sizes(batch=(256,), T=128, S=128, N=8, K=8, H=64, V=64)
    run = with_gradients(functools.partial(dot_product_attention, implementation="blockwise"))

    def temporaries(devices):
        split = NamedSharding(make_mesh(data=devices, model=1), ROWS)
        like = jax.ShapeDtypeStruct(shape.query, jnp.float32, sharding=split)
        return jax.jit(run).lower(like, like, like).compile().memory_analysis().temp_size_in_bytes

    tiles = 16 * 2**20  # Those of one turn, which do not depend on the rows.
    assert temporaries(8) < temporaries(1) / 8 + tiles


def test_gradients_of_what_all_rows_share_are_sums_over_the_devices():
    query, key, value = random_qkv(sizes(2))
    rng = np.random.default_rng(3)
    learnt = dict(
        slopes=jnp.linspace(0.1, 1, N),
        table=jnp.asarray(rng.standard_normal((8, N)), jnp.float32),
        array=jnp.asarray(rng.standard_normal((1, N, T, T)), jnp.float32),
        sinks=jnp.arange(float(N)),
        softcap=jnp.float32(2),
    )

    def loss(learnt, query, key, value):
        bias = biases.alibi(learnt["slopes"]) + biases.relative(learnt["table"]) + learnt["array"]
        options = dict(bias=bias, sinks=learnt["sinks"], softcap=learnt["softcap"])
        return (TILES(query, key, value, **options) ** 2).sum()

    gradient = jax.jit(jax.grad(loss))
    wanted = gradient(learnt, query, key, value)
    for spec in (ROWS, BOTH):
        found = gradient(learnt, *place(make_mesh(), spec, query, key, value))
        assert_equal(found, wanted, 1e-4)


def test_one_axis_of_a_mesh_may_split_two_axes_of_an_array():
    """As a projection to all heads at once comes out: two heads, cut into four."""
    shape = Sizes(batch=(B,), T=T, S=T, N=2, K=2, H=8, V=8)
    arrays = [x.reshape(B, T, 16) for x in random_qkv(shape)]

    def run(*flat):
        return TILES(*(x.reshape(B, T, 2, 8) for x in flat), mask=masks.causal())

    placed = place(make_mesh(data=1, model=4), P(None, None, "model"), *arrays)
    assert_equal(jax.jit(run)(*placed), run(*arrays))


def test_rows_that_cannot_be_dealt_out_evenly():
    shape = Sizes(batch=(3,), T=T, S=T, N=2, K=1, H=8, V=8)
    arrays = random_qkv(shape)
    split = NamedSharding(make_mesh(), ROWS)

    def run(*arrays):
        return TILES(*(jax.lax.with_sharding_constraint(x * 1, split) for x in arrays))

    assert_equal(jax.jit(run)(*arrays), TILES(*arrays))


@pytest.mark.parametrize("mapped", ["all", "queries"])
def test_vmap_on_a_mesh(mapped):
    query, key, value = random_qkv(Sizes(batch=(4, 3), T=T, S=T, N=2, K=1, H=8, V=8))
    axes = 0 if mapped == "all" else (0, None, None)
    key, value = (key, value) if mapped == "all" else (key[0], value[0])
    run = with_gradients(jax.vmap(functools.partial(TILES, mask=masks.causal()), axes))
    placed = place(make_mesh(data=4, model=1), ROWS, query)
    placed += place(make_mesh(data=4, model=1), ROWS if mapped == "all" else P(), key, value)
    assert_equal(jax.jit(run)(*placed), jax.jit(run)(query, key, value))


def test_products_with_the_hessian_on_a_mesh():
    arrays = random_qkv(Sizes(batch=(4,), T=8, S=8, N=2, K=2, H=4, V=4))

    def product(query, key, value):
        gradient = jax.grad(lambda q: (TILES(q, key, value, mask=masks.causal()) ** 2).sum())
        return jax.jvp(gradient, (query,), (query,))

    placed = place(make_mesh(data=4, model=1), ROWS, *arrays)
    assert_equal(jax.jit(product)(*placed), jax.jit(product)(*arrays), 1e-4)


MECHANISMS = {
    "dense": functools.partial(DENSE, mask=masks.causal(), **DROPOUT),
    "blockwise": functools.partial(TILES, mask=LENGTHS, bias=biases.alibi(N), **DROPOUT),
    "weights": lambda query, key, value: attention_weights(query, key, mask=masks.window(3)),
    "linear": linear_attention,
    "linear causal": functools.partial(linear_attention, mask=masks.causal()),
    # Keys no longer than 1, or the memory grows without bound.
    "gated_delta": lambda query, key, value: gated_delta_attention(query, key / 8, value),
    "differential": functools.partial(differential_attention, mask=masks.causal()),
    "rotary": lambda query, key, value: positions.rotary(query),
}


def all_mechanisms(*arrays):
    return {name: attend(*arrays) for name, attend in MECHANISMS.items()}


@pytest.mark.slow
def test_explicit_axes():
    K, mesh = 2, make_mesh(AxisType.Explicit)
    arrays = place(mesh, BOTH, *random_qkv(sizes(K)))
    compiled = jax.jit(with_gradients(all_mechanisms)).lower(*arrays).compile()
    found, gradients = compiled(*arrays)
    assert not collectives(compiled)
    for name, out in found.items():
        spec = P("data", "model") if name == "weights" else BOTH
        assert out.sharding.is_equivalent_to(NamedSharding(mesh, spec), 4), name
    assert_equal(
        (found, gradients), jax.jit(with_gradients(all_mechanisms))(*random_qkv(sizes(K))), 1e-4
    )


@pytest.mark.parametrize("name", ["dense", "blockwise"])
def test_explicit_axes_outside_of_jit(name):
    mesh = make_mesh(AxisType.Explicit)
    arrays = random_qkv(sizes(2))
    out = MECHANISMS[name](*place(mesh, ROWS, *arrays))
    assert jax.typeof(out).sharding.spec[0] == "data"
    assert_equal(out, MECHANISMS[name](*arrays))


def test_explicit_axes_of_a_layer():
    mesh = make_mesh(AxisType.Explicit)
    layer = MultiHeadAttention(N, 2, rotary=True, sinks=True)
    inputs = jnp.asarray(np.random.default_rng(0).standard_normal((B, T, 16)), jnp.float32)
    params = layer.init(jax.random.key(0), inputs)

    def loss(params, inputs):
        return (layer.apply(params, inputs, mask=masks.causal()) ** 2).sum()

    gradient = jax.jit(jax.grad(loss, (0, 1)))
    wanted = gradient(params, inputs)
    with jax.set_mesh(mesh):
        assert_equal(gradient(params, *place(mesh, ROWS, inputs)), wanted, 1e-4)


@pytest.mark.parametrize("positions", ["learned", "rotary"])
def test_explicit_axes_of_a_model(positions):
    mesh = make_mesh(AxisType.Explicit)
    model = make_sequence_model(
        16,
        num_heads=N,
        vocab_size=7,
        causal=True,
        positions=positions,
        max_length=T if positions == "learned" else None,
    )
    tokens = jnp.arange(B * T).reshape(B, T) % 7
    lengths = jnp.array([T, 3, 11, T])
    params = model.init(jax.random.key(0), tokens)

    def loss(params, tokens, lengths):
        return (model.apply(params, tokens, mask=masks.key_lengths(lengths)) ** 2).sum()

    gradient = jax.jit(jax.grad(loss))
    wanted = gradient(params, tokens, lengths)
    with jax.set_mesh(mesh):
        assert_equal(gradient(params, *place(mesh, ROWS, tokens, lengths)), wanted, 1e-4)


@pytest.mark.parametrize("kind", ["explicit", "shard_map"])
def test_tokens_are_generated_where_their_rows_lie(kind):
    model = make_sequence_model(8, num_heads=2, vocab_size=7, causal=True, positions="rotary")
    tokens = jnp.arange(B * 3).reshape(B, 3) % 7
    params = model.init(jax.random.key(0), tokens)["params"]

    @jax.jit
    def run(params, tokens):
        return generate(model, params, tokens, 5, rng=jax.random.key(1), top_k=1, end=3, context=4)

    wanted = run(params, tokens)
    if kind == "explicit":
        mesh = make_mesh(AxisType.Explicit)
        with jax.set_mesh(mesh):
            found = run(params, *place(mesh, ROWS, tokens))
    else:
        split = jax.shard_map(run, mesh=make_mesh(), in_specs=(P(), ROWS), out_specs=ROWS)
        found = split(params, tokens)
    jax.tree.map(np.testing.assert_array_equal, found, wanted)


@pytest.mark.parametrize(
    "kind", ["whole", "rolling", pytest.param("memory", marks=pytest.mark.slow)]
)
@pytest.mark.parametrize("split", [True, False], ids=["split_cache", "whole_cache"])
def test_explicit_axes_while_decoding(split, kind):
    mesh = make_mesh(AxisType.Explicit)
    options = {
        "whole": {"window": 5},
        "rolling": {"window": 1},
        "memory": {"mechanism": "gated_delta"},
    }
    model = make_sequence_model(16, num_heads=N, vocab_size=7, causal=True, **options[kind])
    model = decoding(model, rolling=kind == "rolling")
    tokens = jnp.arange(B * T).reshape(B, T) % 7
    parts = jnp.split(tokens, [12, 23], axis=1)
    variables = model.init(jax.random.key(0), tokens)
    with jax.set_mesh(mesh):
        cache = model.init(jax.random.key(0), *place(mesh, ROWS if split else P(), tokens))["cache"]

    @jax.jit
    def step(cache, new):
        variables_now = {"params": variables["params"], "cache": cache}
        return model.apply(variables_now, new, mutable=["cache"])

    def decode(cache, parts):
        found = []
        for new in parts:
            out, updated = step(cache, new)
            cache = updated["cache"]
            found.append(out)
        return found, cache

    wanted, _ = decode(variables["cache"], parts)
    found, cache = decode(cache, place(mesh, ROWS, *parts))
    assert_equal(found, wanted, 1e-5)
    for name in ("memory", "key_inputs") if kind == "memory" else ("cached_key", "cached_value"):
        spec = jax.typeof(cache["blocks_0"]["attention"][name]).sharding.spec
        assert (spec[0] == "data") == split
