"""Promises of ring attention and Ulysses: the numbers of one device, and less work and memory."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import Sizes, random_qkv
from jax import lax
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from attention_jax import (
    MLP,
    Block,
    MultiHeadAttention,
    SequenceModel,
    TokenEmbedding,
    biases,
    device_positions,
    dot_product_attention,
    masks,
    ring_attention,
    ulysses_attention,
    unzigzag,
    zigzag,
)
from attention_jax.functional.options import Options
from attention_jax.functional.ring import attend, make_ring

T, N, K = 32, 8, 4
SPLIT = P(None, "sequence")
NUMBERS = np.random.default_rng(5)
IDS = np.sort(NUMBERS.integers(0, 6, (2, T)), axis=-1)
SHUFFLED = NUMBERS.integers(0, 3, T)
VISIBLE = NUMBERS.random((2, N, T, T)) < 0.5
DROPOUT = dict(dropout_rate=0.3, dropout_rng=jax.random.key(7))
# What is learnt beside query, key and value, and how it becomes a bias or a sink.
TABLE = NUMBERS.normal(size=(8, N)).astype(np.float32)
SLOPES = NUMBERS.random(N).astype(np.float32)
ARRAY = NUMBERS.normal(size=(2, 1, T, T)).astype(np.float32)
ARRAY[0, 0, 3] = -np.inf  # An empty row.


def nothing(_):
    return {}


def some_biases(learnt):
    array, table, slopes = learnt
    bias = biases.relative(table, max_distance=20) + biases.alibi(slopes) + array
    return dict(bias=bias, sinks=slopes)


def a_rule(t, s, strength):
    return strength * jnp.cos(0.3 * (t - 2 * s))


FEATURES = {
    "full": ({}, (), nothing),
    "causal": (dict(mask=masks.causal()), (), nothing),
    "everything": (
        dict(mask=masks.causal() & masks.segments(IDS), softcap=2.0, **DROPOUT),
        (ARRAY, TABLE, SLOPES),
        some_biases,
    ),
    "window": (
        dict(mask=masks.window(3, 2) & masks.key_lengths(np.array([20, 29])), scale=0.3),
        (SLOPES,),
        lambda learnt: dict(sinks=learnt[0]),
    ),
    "arrays": (dict(mask=~masks.segments(SHUFFLED) | VISIBLE), (ARRAY,), lambda x: dict(bias=x[0])),
    "own": (
        dict(mask=masks.rule(lambda t, s: (s <= t) | (s < 5)) & masks.query_lengths(np.array(27))),
        (SLOPES[:, None, None],),
        lambda learnt: dict(bias=biases.rule(a_rule, *learnt)),
    ),
    "placed": (
        dict(mask=masks.placed(masks.window(3), np.cumsum(NUMBERS.integers(1, 3, T)))),
        (SLOPES,),
        lambda learnt: dict(bias=biases.placed(biases.alibi(learnt[0]), np.arange(T) // 2)),
    ),
    "later": (dict(mask=masks.shifted(masks.causal(), np.array([2, 5])), **DROPOUT), (), nothing),
}


def mesh_of(n):
    return jax.make_mesh((n,), ("sequence",), (AxisType.Auto,), devices=jax.devices()[:n])


def sizes(keys=T, key_heads=K):
    return Sizes(batch=(2,), T=T, S=keys, N=N, K=key_heads, H=4, V=6)


def with_gradients(run):
    """Output, logsumexp, and all gradients, for a fixed cotangent; an infinity counts as 0."""

    def both(*arrays):
        found, pull_back = jax.vjp(run, *arrays)
        cotangent = jax.tree.map(lambda x: jnp.where(jnp.isfinite(x), jnp.cos(x), 0), found)
        return found, pull_back(cotangent)

    return both


def one_device(feature, arrays):
    options, learnt, build = FEATURES[feature]

    def run(query, key, value, learnt):
        return dot_product_attention(
            query, key, value, **options, **build(learnt), return_residual=True
        )

    return jax.jit(with_gradients(run))(*arrays, learnt)


def devices(attention, feature, n, arrays, order="contiguous", jit=True, **more):
    options, learnt, build = FEATURES[feature]
    if order == "zigzag":
        more["order"] = order

    def part(query, key, value, learnt):
        return attention(
            query,
            key,
            value,
            **options,
            **build(learnt),
            axis_name="sequence",
            return_residual=True,
            **more,
        )

    split = jax.shard_map(
        part, mesh=mesh_of(n), in_specs=(SPLIT, SPLIT, SPLIT, P()), out_specs=(SPLIT, SPLIT)
    )

    def run(*arrays):
        *parts, learnt = arrays
        if order == "zigzag":
            parts = [zigzag(x, n) for x in parts]
        found = split(*parts, learnt)
        return [unzigzag(x, n) for x in found] if order == "zigzag" else [*found]

    run = with_gradients(run)
    return (jax.jit(run) if jit else run)(*arrays, learnt)


def assert_equal(found, wanted, tolerance=1e-5):
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        largest = np.abs(np.where(np.isfinite(b), b, 0)).max(initial=1)
        np.testing.assert_allclose(a, b, atol=tolerance * largest, rtol=tolerance)


# A few that have much in them; the product of all is slow.
CASES = [
    (ring_attention, "everything", 4, "zigzag"),
    (ring_attention, "window", 2, "contiguous"),
    (ring_attention, "arrays", 8, "contiguous"),
    (ulysses_attention, "everything", 8, "contiguous"),
]
ALL = [
    *itertools.product([ring_attention], FEATURES, [2, 4, 8], ["contiguous", "zigzag"]),
    *itertools.product([ulysses_attention], FEATURES, [2, 4, 8], ["contiguous"]),
]


@pytest.mark.parametrize(
    ("attention", "feature", "n", "order"),
    [*CASES, *(pytest.param(*x, marks=pytest.mark.slow) for x in ALL if x not in CASES)],
    ids=lambda x: getattr(x, "__name__", str(x)),
)
def test_devices_give_the_numbers_of_one(attention, feature, n, order):
    arrays = random_qkv(sizes())
    found = devices(attention, feature, n, arrays, order)
    assert_equal(found, one_device(feature, arrays))


def test_without_jit_the_numbers_are_the_same():
    arrays = random_qkv(sizes())
    split = jax.shard_map(
        functools.partial(ring_attention, axis_name="sequence", mask=masks.causal()),
        mesh=mesh_of(2),
        in_specs=SPLIT,
        out_specs=SPLIT,
    )
    assert_equal(split(*arrays), dot_product_attention(*arrays, mask=masks.causal()))


@pytest.mark.parametrize("axis", [0, 1])
def test_empty_batches_and_sequences_have_empty_gradients(axis):
    arrays = [lax.slice_in_dim(x, 0, 0, axis=axis) for x in random_qkv(sizes())]
    found = devices(ring_attention, "causal", 2, arrays)
    assert_equal(found, one_device("causal", arrays))


@pytest.mark.slow
@pytest.mark.parametrize("feature", FEATURES)
def test_without_jit_all_numbers_are_the_same(feature):
    arrays = random_qkv(sizes())
    wanted = one_device(feature, arrays)
    assert_equal(devices(ring_attention, feature, 4, arrays, "zigzag", jit=False), wanted)
    assert_equal(devices(ulysses_attention, feature, 4, arrays, jit=False), wanted)


@pytest.mark.slow
@pytest.mark.parametrize("order", ["contiguous", "zigzag"])
@pytest.mark.parametrize("block_size", [4, (16, 2), None])
@pytest.mark.parametrize("feature", ["everything", "window", "placed"])
def test_tiles_of_a_part_give_the_same_numbers(feature, block_size, order):
    arrays, tiles = random_qkv(sizes()), dict(implementation="blockwise", block_size=block_size)
    found = devices(ring_attention, feature, 2, arrays, order, **tiles)
    assert_equal(found, one_device(feature, arrays), 2e-5)


@pytest.mark.parametrize(
    "key_heads",
    [1, pytest.param(2, marks=pytest.mark.slow), pytest.param(8, marks=pytest.mark.slow)],
)
def test_devices_need_not_divide_the_key_heads(key_heads):
    arrays = random_qkv(sizes(key_heads=key_heads))
    wanted = one_device("full", arrays)
    assert_equal(devices(ulysses_attention, "full", 4, arrays), wanted)


@pytest.mark.slow
@pytest.mark.parametrize("order", ["contiguous", "zigzag"])
def test_queries_and_keys_may_have_other_lengths(order):
    arrays = random_qkv(sizes(keys=2 * T))
    wanted = one_device("causal", arrays)
    assert_equal(devices(ring_attention, "causal", 4, arrays, order), wanted)


@pytest.mark.slow
@pytest.mark.parametrize("order", ["contiguous", "zigzag"])
def test_half_precision_is_merged_in_float32(order):
    arrays = [x.astype(jnp.bfloat16) for x in random_qkv(sizes())]
    wanted = one_device("causal", [x.astype(jnp.float32) for x in arrays])
    (out, residual), gradients = devices(ring_attention, "causal", 8, arrays, order)
    assert (out.dtype, residual.dtype) == (jnp.bfloat16, jnp.float32)
    assert_equal(residual, wanted[0][1], 1e-2)
    # One rounding of the result, 2^-9, and that of the weights in the products.
    assert_equal(out.astype(jnp.float32), wanted[0][0], 6e-3)
    assert_equal([x.astype(jnp.float32) for x in gradients[:3]], wanted[1][:3], 2e-2)


@pytest.mark.slow
def test_rows_may_be_split_over_a_second_axis():
    mesh = jax.make_mesh((2, 4), ("data", "sequence"), (AxisType.Auto,) * 2)
    both, rows = P("data", "sequence"), P("data")
    arrays = random_qkv(sizes())

    def part(query, key, value, ids, table):
        options = dict(bias=biases.relative(table), mask=masks.causal() & masks.segments(ids))
        return ring_attention(query, key, value, axis_name="sequence", **options)

    def whole(query, key, value, ids, table):
        options = dict(bias=biases.relative(table), mask=masks.causal() & masks.segments(ids))
        return dot_product_attention(query, key, value, **options)

    split = jax.shard_map(part, mesh=mesh, in_specs=(both,) * 3 + (rows, P()), out_specs=both)

    def loss(run, query, key, value, table):
        return (run(query, key, value, IDS, table) ** 2).sum()

    found, wanted = (
        jax.jit(jax.value_and_grad(functools.partial(loss, run), argnums=range(4)))(*arrays, TABLE)
        for run in (split, whole)
    )
    assert_equal(found, wanted)


# Order -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [1, 2, 4])
def test_zigzag_gives_each_device_an_early_and_a_late_part(n):
    x = np.arange(3 * 8 * n).reshape(3, 8 * n)
    moved = zigzag(x, n)
    parts = x.reshape(3, 2 * n, 4)
    for i in range(n):
        mine = np.concatenate([parts[:, i], parts[:, 2 * n - 1 - i]], axis=-1)
        np.testing.assert_array_equal(moved[:, 8 * i : 8 * i + 8], mine)
    np.testing.assert_array_equal(unzigzag(moved, n), x)
    np.testing.assert_array_equal(unzigzag(zigzag(x.T, n, axis=0), n, axis=-2), x.T)


def test_the_order_takes_no_gather():
    program = str(jax.make_jaxpr(lambda x: unzigzag(zigzag(x, 4), 4))(jnp.zeros((2, 16, 3))))
    assert "gather" not in program


@pytest.mark.parametrize("order", ["contiguous", "zigzag"])
def test_devices_know_the_positions_of_their_tokens(order):
    places = jax.shard_map(
        lambda: device_positions(4, axis_name="sequence", order=order),
        mesh=mesh_of(4),
        in_specs=(),
        out_specs=P("sequence"),
    )()
    whole = np.arange(16)
    np.testing.assert_array_equal(places, zigzag(whole, 4, axis=0) if order == "zigzag" else whole)


# Cost --------------------------------------------------------------------------------------------


def work(monkeypatch, order, n, device):
    """The operations of one device in its compiled program, in which its number is known."""
    # The device is in the name, so that jax does not take the program of another.
    part = jnp.zeros((1, 256, 2, 64))  # Large: compilers count what is not in products differently.
    T = part.shape[1] * n
    ring = make_ring(f"device {device}", n, order, T, T, "dense", None, masks.causal())
    options = Options(mask=masks.causal(), residual=True)

    def repeat(start, stop, body, state):
        return functools.reduce(lambda state, i: body(i, state), range(start, stop), state)

    with monkeypatch.context() as patch:
        patch.setattr(lax, "axis_index", lambda _: device)
        patch.setattr(lax, "ppermute", lambda x, *_: x)
        patch.setattr(lax, "fori_loop", repeat)
        patch.setattr(lax, "cond", lambda seen, yes, no, x: yes(x) if seen else no(x))
        program = jax.jit(lambda *x: attend(ring, *x, options)).lower(part, part, part)
    return program.compile().cost_analysis()["flops"]


def test_causal_work_is_equal_in_zigzag_order(monkeypatch):
    balanced = [work(monkeypatch, "zigzag", 4, device) for device in (0, 3)]
    assert max(balanced) < 1.1 * min(balanced)
    unbalanced = [work(monkeypatch, "contiguous", 4, device) for device in (0, 3)]
    assert max(unbalanced) > 2.5 * min(unbalanced)


def temporaries(n, order, length, **tiles):
    """Bytes that each device needs beside arguments and results, forward and backward."""
    part = dict(axis_name="sequence", order=order, mask=masks.causal())
    attention = jax.shard_map(
        functools.partial(ring_attention, **part, **tiles),
        mesh=mesh_of(n),
        in_specs=SPLIT,
        out_specs=SPLIT,
    )
    x = jax.ShapeDtypeStruct((1, length, 1, 16), jnp.float32)
    compiled = jax.jit(jax.grad(lambda *x: (attention(*x) ** 2).sum(), range(3))).lower(x, x, x)
    return compiled.compile().memory_analysis().temp_size_in_bytes


def test_memory_falls_with_the_number_of_devices():
    sizes = [temporaries(n, "contiguous", 512, implementation="dense") for n in (2, 8)]
    assert sizes[0] > 3.6 * sizes[1]


@pytest.mark.slow
@pytest.mark.parametrize("order", ["contiguous", "zigzag"])
def test_memory_of_tiles_falls_with_the_number_of_devices(order):
    tiles = dict(implementation="blockwise", block_size=64)
    sizes = [temporaries(n, order, 2**17, **tiles) for n in (2, 4, 8)]
    assert sizes[1] > 1.9 * sizes[2]
    assert sizes[0] > 3.3 * sizes[2]  # With 2 devices nothing goes on behind the first visit.


@pytest.mark.parametrize(
    ("mask", "shifts"),
    [
        (None, (0, 1, 2, 3, 4, 5, 6, 7)),
        (masks.causal(), (0, 1, 2, 3, 4, 5, 6, 7)),
        (masks.window(3), (0, 1)),
        (masks.window(3, 3), (0, 1, 7)),
        (masks.segments(np.arange(64)) & masks.window(9), (0, 1, 2)),
        (masks.window(0), (0,)),
        (masks.window(3) | masks.causal(), (0, 1, 2, 3, 4, 5, 6, 7)),
    ],
    ids=repr,
)
def test_nothing_is_sent_where_nobody_sees_it(mask, shifts):
    ring = make_ring("sequence", 8, "contiguous", 64, 64, "dense", None, mask)
    assert ring.shifts == shifts


def sent_bytes(program, trips=1):
    """What a program of one device sends, from its operations: each loop counts all its trips."""
    total = 0
    for step in program.eqns:
        sizes = [x.aval.size * x.aval.dtype.itemsize for x in step.invars if hasattr(x, "aval")]
        if step.primitive.name == "ppermute":
            total += trips * sum(sizes)
        if step.primitive.name == "all_to_all":
            total += trips * sum(sizes) * 7 // 8  # Of 8 devices; one part stays.
        inner = trips * step.params.get("length", 1) if step.primitive.name == "scan" else trips
        for part in jax.tree.leaves(
            [*step.params.values()], is_leaf=lambda x: hasattr(x, "eqns") or hasattr(x, "jaxpr")
        ):
            part = getattr(part, "jaxpr", part)
            total += sent_bytes(part, inner) if hasattr(part, "eqns") else 0
    return total


@pytest.mark.parametrize(
    ("attention", "mask", "steps"),
    [
        (ring_attention, masks.causal(), 7),
        (ring_attention, masks.window(3, 3), 2),
        (ring_attention, masks.window(3), 1),
        (ring_attention, masks.window(0), 0),
        (ulysses_attention, None, None),
    ],
    ids=["causal", "both sides", "window", "itself", "ulysses"],
)
def test_as_many_bytes_are_sent_as_the_formula_says(attention, mask, steps):
    n, (B, S, N, K, H, V) = 8, (2, 64, 8, 8, 4, 6)
    split = jax.shard_map(
        functools.partial(attention, axis_name="sequence", mask=mask),
        mesh=mesh_of(n),
        in_specs=SPLIT,
        out_specs=SPLIT,
    )
    arrays = random_qkv(Sizes(batch=(B,), T=S, S=S, N=N, K=K, H=H, V=V))
    forward = sent_bytes(jax.make_jaxpr(split)(*arrays).jaxpr)
    both = sent_bytes(jax.make_jaxpr(lambda *x: jax.vjp(split, *x)[1](split(*x)))(*arrays).jaxpr)
    one = B * S // n * K * (H + V) * 4
    if steps is None:
        want = (n - 1) * B * S * (N + K) * (H + V) * 4 // n**2
        assert (forward, both) == (want, 3 * want)
    else:
        home = steps + 1 if steps else 0
        assert (forward, both) == (steps * one, 3 * steps * one + home * one)


# In a model --------------------------------------------------------------------------------------


@pytest.mark.slow  # A model whose sequences are split always trains in tests/test_launch.py.
@pytest.mark.parametrize("order", ["contiguous", "zigzag"])
def test_a_model_of_packed_documents_trains_as_on_one_device(order):
    n, tokens = 2, jax.random.randint(jax.random.key(1), (2, T + 1), 0, 11)
    starts = np.array([[i and IDS[b, i] == IDS[b, i - 1] for i in range(T)] for b in range(2)])
    places = np.zeros((2, T), int)
    for i in range(1, T):
        places[:, i] = (places[:, i - 1] + 1) * starts[:, i]

    def model(attention):
        layer = MultiHeadAttention(4, num_kv_heads=2, rotary=True, attention_fn=attention)
        return SequenceModel(TokenEmbedding(11, 16), [Block(layer, MLP(16))], mask=masks.causal())

    inputs, labels = tokens[:, :-1], tokens[:, 1:]
    params = model(dot_product_attention).init(jax.random.key(0), inputs)

    def mean_loss(model, params, inputs, labels, places, axis=None):
        mask = masks.segments(IDS)  # That of the whole sequence.
        logits = model.apply(params, inputs, positions=places, mask=mask)
        entropy = -jnp.take_along_axis(jax.nn.log_softmax(logits), labels[..., None], -1).sum()
        return (entropy if axis is None else lax.psum(entropy, axis)) / tokens.size

    def descend(loss, *batch):
        def step(params, _):
            found, gradients = jax.value_and_grad(loss)(params, *batch)
            return jax.tree.map(lambda x, d: x - 0.5 * d, params, gradients), found

        return jax.jit(lambda params: lax.scan(step, params, length=5))(params)

    alone = descend(
        functools.partial(mean_loss, model(dot_product_attention)), inputs, labels, places
    )
    ring = model(functools.partial(ring_attention, axis_name="sequence", order=order))
    split = jax.shard_map(
        functools.partial(mean_loss, ring, axis="sequence"),
        mesh=mesh_of(n),
        in_specs=(P(), SPLIT, SPLIT, SPLIT),
        out_specs=P(),
    )
    batch = inputs, labels, places
    batch = [zigzag(x, n) for x in batch] if order == "zigzag" else batch
    parameters, losses = descend(split, *batch)
    assert losses[-1] < losses[0]
    assert_equal((parameters, losses), alone)


# Refusals ----------------------------------------------------------------------------------------


def call(attention, n=4, length=16, heads=N, **options):
    x = jnp.zeros((1, length, heads, 4))
    part = functools.partial(attention, axis_name="sequence", **options)
    return jax.shard_map(part, mesh=mesh_of(n), in_specs=SPLIT, out_specs=SPLIT)(x, x, x)


LOCAL = [
    dict(mask=masks.segments(np.zeros(4, int))),
    dict(mask=masks.causal() & masks.dense(np.ones((4, 4), bool))),
    dict(mask=np.ones((4, 16), bool)),
    dict(bias=np.zeros((4, 4), np.float32)),
    dict(mask=masks.placed(masks.window(2), np.arange(4))),
]


@pytest.mark.parametrize("options", LOCAL, ids=lambda x: str(*x.values()).split("\n")[0])
@pytest.mark.parametrize(
    "attention",
    [ring_attention, functools.partial(ring_attention, order="zigzag"), ulysses_attention],
    ids=["ring", "zigzag", "ulysses"],
)
def test_a_mask_or_bias_of_a_part_is_refused(attention, options):
    with pytest.raises(ValueError, match="those of the whole sequence, T=16 and S=16"):
        call(attention, **options)


def test_a_bias_of_some_heads_is_refused():
    with pytest.raises(ValueError, match="broadcast to"):
        call(ulysses_attention, bias=np.zeros((2, 16, 16), np.float32))


def test_what_cannot_be_done_is_refused_in_a_line():
    x = jnp.zeros((1, 16, 8, 4))
    with pytest.raises(ValueError, match="ring_attention needs an axis_name"):
        ring_attention(x, x, x, axis_name="sequence")
    with pytest.raises(ValueError, match="order must be one of"):
        call(ring_attention, order="striped")
    with pytest.raises(ValueError, match="even length on each device"):
        call(ring_attention, length=12, order="zigzag")
    with pytest.raises(NotImplementedError, match="ring_attention takes any"):
        call(ulysses_attention, heads=6)
    with pytest.raises(NotImplementedError, match="cudnn"):
        call(ring_attention, implementation="cudnn")
    with pytest.raises(ValueError, match="block_size is for"):
        call(ring_attention, block_size=4)
    with pytest.raises(ValueError, match="multiple of 2 num_devices = 8 positions, got 12"):
        zigzag(jnp.zeros((1, 12)), 4)
    with pytest.raises(TypeError, match="has no argument is_causal"):
        call(ring_attention, is_causal=True)
