"""`masks.rule` and `biases.rule`: a function of positions is a mask or a bias like any other."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import assert_close
from jax import export
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from attention_jax import biases, dot_product_attention, linear_attention, masks, sigmoid_attention
from attention_jax.functional.tiles import Tile

B, T, S, N, K, H = 2, 70, 90, 4, 2, 8
RNG = np.random.default_rng(0)


def normal(*shape):
    return jnp.asarray(RNG.standard_normal(shape), jnp.float32)


def prefix(t, s, length):
    return (s <= t) | (s < length)


def same_document(t, s, ids):
    return ids[0, t] == ids[0, s]


def neighbours(t, s, width, reach):
    rows, columns = abs(t // width - s // width), abs(t % width - s % width)
    return (rows <= reach) & (columns <= reach)


def by_distance(t, s, slopes, table, keys):
    """Of each head, of each head and distance, and of each batch row and key."""
    return -slopes * abs(t - s) + table[0, jnp.clip(t - s, -8, 7) + 8] + keys[0, s]


QKV = normal(B, T, N, H), normal(B, S, K, H), normal(B, S, K, H)
D_OUT = normal(B, T, N, H)
LENGTHS = jnp.array([3, 40])[:, None, None, None]
IDS = jnp.asarray(np.sort(RNG.integers(0, 4, (B, S))))[:, None, None]
LEARNT = abs(normal(N, 1, 1)) / 9, normal(N, 1, 16), normal(B, 1, 1, S)
RULES = {
    "prefix": (prefix, (LENGTHS,)),
    "of each head": (prefix, (jnp.arange(N)[:, None, None],)),
    "of each row and head": (prefix, (jnp.arange(2 * N).reshape(2, N, 1, 1),)),
    "document": (same_document, (IDS,)),
    "dilated": (lambda t, s, step: (t - s) % step == 0, (3,)),
    "neighbours": (neighbours, (5, 1)),
    "of keys alone": (lambda t, s: s < 4, ()),
    "of queries alone": (lambda t, s: t % 2 == 0, ()),
    "everything": (lambda t, s: True, ()),
}


def one_by_one(fn, arrays, t, s):
    """`fn` for one batch row, head, query and key after the other, `[B, N, T, S]`.

    t and s are positions `[B, T]` and `[B, S]`.
    """
    found = np.empty((B, N, t.shape[-1], s.shape[-1]))
    for b, n in np.ndindex(B, N):
        own = []
        for x in map(np.asarray, arrays):
            lead = np.broadcast_to(x, (B, N, *x.shape[-2:])) if x.ndim > 2 else None
            own.append(x if lead is None else lead[b, n])
        for i, j in np.ndindex(found.shape[2:]):
            found[b, n, i, j] = np.squeeze(fn(np.array([[t[b, i]]]), np.array([s[b, j]]), *own))
    return found


def places(length, offset=0):
    return np.broadcast_to(np.arange(length) + np.reshape(offset, (-1, 1)), (B, length))


@pytest.mark.parametrize("name", RULES)
def test_a_mask_says_what_its_function_says_of_each_pair(name):
    fn, arrays = RULES[name]
    mask = masks.rule(fn, *arrays)
    got = mask.materialize(6, 9)
    want = one_by_one(fn, arrays, places(6), places(9))
    np.testing.assert_array_equal(np.broadcast_to(got, want.shape), want)
    # A tile in the middle, of one head and one row, as the blockwise path asks for it.
    at = Tile(2, 3, 4, 5, 6, 9, lead=((1, 1), (2, 1)))
    part = np.broadcast_to(mask.narrowed(at).tile(at), (1, 1, 3, 5))
    np.testing.assert_array_equal(part, want[1:2, 2:3, 2:5, 4:9])


def test_a_placed_or_shifted_rule_sees_positions():
    positions = np.stack([np.r_[0:4, 0:3], np.r_[2:9]])
    offsets = jnp.array([2, 5])
    for fn, arrays in (RULES["prefix"], RULES["neighbours"], RULES["document"]):
        rule = masks.rule(fn, *arrays)
        got = masks.placed(rule, positions).materialize(7, 7)
        np.testing.assert_array_equal(
            np.broadcast_to(got, (B, N, 7, 7)), one_by_one(fn, arrays, positions, positions)
        )
        got = masks.shifted(rule, offsets).tile(Tile.whole(3, 9))
        want = one_by_one(fn, arrays, places(3, offsets), places(9))
        np.testing.assert_array_equal(np.broadcast_to(got, want.shape), want)
    arrays = [np.asarray(x) for x in LEARNT]
    got = biases.placed(biases.rule(by_distance, *LEARNT), positions).tile(Tile.whole(7, 7))
    wide = functools.partial(
        one_by_one,
        lambda t, s, slope, table, keys: (
            -slope * abs(t - s) + table[0][np.clip(t - s, -8, 7) + 8] + keys[0][s]
        ),
    )
    assert_close(got, wide(arrays, positions, positions), 1e-5)


def test_rules_combine_with_other_masks():
    rule = masks.rule(prefix, 3)
    array = np.asarray(rule.materialize(6, 6))
    combined = (rule & ~masks.window(1)) | masks.strided(4)
    want = (array & ~masks.window(1).materialize(6, 6)) | masks.strided(4).materialize(6, 6)
    np.testing.assert_array_equal(combined.materialize(6, 6), want)


def written_out(slopes, table, keys):
    """The bias `by_distance` as an array, `[B, N, T, S]`."""
    distance = np.arange(T)[:, None] - np.arange(S)
    buckets = np.clip(distance, -8, 7) + 8
    return -slopes * abs(distance) + table[:, 0][:, buckets] + keys


def gradients(attend, bias_of, mask):
    def loss(*arrays):
        out = attend(*arrays[:3], bias_of(*arrays[3:]), mask)
        return (out * D_OUT).sum()

    return jax.value_and_grad(loss, tuple(range(6)))


ATTEND = {
    "dense": functools.partial(dot_product_attention, implementation="dense"),
    "tiles": functools.partial(dot_product_attention, implementation="blockwise"),
    "small tiles": functools.partial(
        dot_product_attention, implementation="blockwise", block_size=(32, 64)
    ),
}
RULE = functools.partial(biases.rule, by_distance)


@functools.cache
def by_definition():
    t, s = np.arange(T)[:, None], np.arange(S)
    mask = jnp.asarray((s <= t) | (s < LENGTHS))
    return jax.jit(gradients(ATTEND["dense"], written_out, mask))(*QKV, *LEARNT)


@pytest.mark.parametrize("attend", ATTEND.values(), ids=ATTEND)
def test_the_arrays_of_a_bias_are_learnt(attend):
    """Against the derivatives of the bias that is written out as an array."""
    run = jax.jit(gradients(attend, RULE, masks.rule(prefix, LENGTHS)))
    (value, found), (want_value, wanted) = run(*QKV, *LEARNT), by_definition()
    assert_close(value, want_value, 1e-5)
    for got, want in zip(found, wanted, strict=True):
        assert_close(got, want, 1e-5)


def test_products_with_the_hessian_are_those_of_the_definition():
    def product(attend, bias_of, mask):
        run = lambda *arrays: gradients(attend, bias_of, mask)(*arrays)[1]
        arrays = (*QKV, *LEARNT)
        return jax.jit(lambda *arrays: jax.jvp(run, arrays, arrays)[1])(*arrays)

    mask = masks.rule(prefix, LENGTHS)
    found = product(ATTEND["tiles"], RULE, mask)
    for got, want in zip(found, product(ATTEND["dense"], written_out, mask), strict=True):
        assert_close(got, want, 2e-5)


def test_vmap_over_the_arrays_is_a_loop_over_them():
    many = [jnp.stack([x, 2 * x, -x]) for x in LEARNT]
    mask = masks.rule(prefix, LENGTHS)
    attend = lambda q, k, v, *arrays: ATTEND["tiles"](q, k, v, RULE(*arrays), mask)
    got = jax.jit(jax.vmap(attend, (None, None, None, 0, 0, 0)))(*QKV, *many)
    run = jax.jit(attend)
    for i in range(3):
        assert_close(got[i], run(*QKV, *(x[i] for x in many)), 1e-5)


@pytest.mark.parametrize(
    "kind",
    [AxisType.Explicit, pytest.param(AxisType.Auto, marks=pytest.mark.slow)],
    ids=["explicit", "auto"],
)
def test_arrays_are_split_over_a_mesh_as_rows_and_heads_are(kind):
    mesh = jax.make_mesh(
        (2, 2), ("rows", "heads"), axis_types=(kind,) * 2, devices=jax.devices()[:4]
    )
    place = lambda x, *spec: jax.device_put(x, NamedSharding(mesh, P(*spec)))
    qkv = [place(x, "rows", None, "heads") for x in QKV]
    slopes, table, keys = LEARNT
    learnt = place(slopes, "heads"), place(table, "heads"), place(keys, "rows")
    run = jax.jit(
        lambda *arrays: ATTEND["tiles"](
            *arrays[:3], RULE(*arrays[3:6]), masks.rule(prefix, arrays[6])
        )
    )
    got = run(*qkv, *learnt, place(LENGTHS, "rows"))
    assert_close(got, run(*QKV, *LEARNT, LENGTHS), 1e-5)


def test_lengths_may_be_left_open():
    bias = biases.rule(lambda t, s, slope: -slope * abs(t - s), LEARNT[0])
    attend = jax.jit(lambda *qkv: ATTEND["tiles"](*qkv, bias, masks.rule(prefix, 3)))
    sizes = export.symbolic_shape("t, s")
    shapes = [
        jax.ShapeDtypeStruct((B, size, heads, H), jnp.float32)
        for size, heads in ((sizes[0], N), (sizes[1], K), (sizes[1], K))
    ]
    assert_close(export.export(attend)(*shapes).call(*QKV), attend(*QKV), 1e-5)


def test_memory_is_linear_in_the_sequence():
    def compiled(T):
        x = jax.ShapeDtypeStruct((1, T, 2, 32), jnp.float32)
        slopes = jax.ShapeDtypeStruct((2, 1, 1), jnp.float32)

        def run(query, key, value, slopes):
            bias = biases.rule(lambda t, s, slope: -slope * abs(t - s), slopes)
            mask = masks.rule(lambda t, s: (t - s) % 3 == 0)
            out = dot_product_attention(query, key, value, bias, mask, implementation="blockwise")
            return (out**2).sum()

        return jax.jit(jax.grad(run, (0, 1, 2, 3))).lower(x, x, x, slopes).compile()

    small, large = (compiled(T).memory_analysis().temp_size_in_bytes for T in (1024, 4096))
    assert large / small < 6


def test_new_contents_compile_nothing_new():
    traces = []

    @jax.jit
    def run(mask, bias):
        traces.append(mask)
        return ATTEND["tiles"](*QKV, bias, mask)

    for i in range(3):
        run(masks.rule(prefix, LENGTHS + i), RULE(*(x + i for x in LEARNT)))
    assert len(traces) == 1


def test_rules_of_one_function_and_the_same_arrays_are_equal():
    rule = masks.rule(prefix, LENGTHS)
    assert rule == masks.rule(prefix, LENGTHS)
    assert hash(rule) == hash(masks.rule(prefix, LENGTHS))
    assert rule != masks.rule(prefix, LENGTHS + 1)
    assert rule != masks.rule(lambda t, s, length: prefix(t, s, length), LENGTHS)
    assert rule != biases.rule(lambda t, s, length: 0.0 * length, LENGTHS)


def test_minus_infinity_is_masked():
    hides = biases.rule(lambda t, s: jnp.where((s <= t) & (t != 1), 0.0, -jnp.inf))
    mask = masks.rule(lambda t, s: (s <= t) & (t != 1))

    @jax.jit
    def run(*qkv):
        attend = ATTEND["small tiles"]
        return attend(*qkv, hides), ATTEND["dense"](*qkv, hides), attend(*qkv, mask=mask)

    *found, want = run(*QKV)
    for out in found:
        assert_close(out, want, 1e-5)
        assert not out[:, 1].any()


def test_a_bias_in_half_precision_is_evaluated_in_single():
    def rule(dtype):
        slopes = LEARNT[0].astype(jnp.bfloat16).astype(dtype)
        return biases.rule(lambda t, s, slope: -slope * abs(t - s), slopes)

    half, single = (rule(dtype).tile(Tile.whole(T, S)) for dtype in ("bfloat16", "float32"))
    np.testing.assert_array_equal(half, single)


def test_other_mechanisms_take_or_refuse_a_rule():
    rule = masks.rule(prefix, LENGTHS)
    want = sigmoid_attention(*QKV, mask=rule.materialize(T, S))
    assert_close(sigmoid_attention(*QKV, mask=rule), want, 1e-6)
    with pytest.raises(NotImplementedError, match="mask"):
        linear_attention(*QKV, mask=rule)


def test_a_rule_is_shown_by_its_function_and_its_shapes():
    assert repr(RULE(*LEARNT)) == "rule(by_distance, [4, 1, 1], [4, 1, 16], [2, 1, 1, 90])"
    assert str(masks.rule(prefix, 2)).splitlines()[:3] == [
        "rule(prefix, [])",
        "■■······",
        "■■······",
    ]
    assert jax.jit(lambda n: len(str(masks.rule(prefix, n))))(2) == len("rule(prefix, [])")


def test_a_traced_array_from_outside_is_refused():
    def attend(length):
        return dot_product_attention(*QKV, mask=masks.rule(lambda t, s: s < length))

    with pytest.raises(ValueError, match=r"traced array .*masks\.rule\(fn, array\)"):
        jax.jit(attend)(3)
    with pytest.raises(ValueError, match="traced array"):
        jax.jit(lambda n: masks.rule(functools.partial(prefix, length=n)).materialize(2, 2))(3)
    assert attend(3).shape == D_OUT.shape


REFUSED = [
    (lambda: masks.rule(3), TypeError, "fn must be a function, got 3"),
    (
        lambda: masks.rule(lambda t, s: s - t),
        TypeError,
        r"masks\.rule must give booleans, got int32",
    ),
    (lambda: biases.rule(lambda t, s: s < t), TypeError, "must give floating-point numbers, got b"),
    (lambda: biases.rule(lambda t, s: s - t), TypeError, "floating-point numbers, got int32"),
    (
        lambda: masks.rule(lambda t, s: None),
        TypeError,
        r"masks\.rule must give booleans, got object",
    ),
    (
        lambda: masks.rule(lambda b, h, t, s: s <= t),
        TypeError,
        r"masks\.rule is called with t, s and 0 arrays, but takes \(b, h, t, s\)",
    ),
    (lambda: biases.rule(lambda t, s: 1.0, 2.0), TypeError, "t, s and 1 arrays, but takes"),
    (lambda: masks.rule(lambda t, s: jnp.ones((4, 1), bool)), ValueError, r"\[t, s\].*\(4, 1\)"),
    (lambda: masks.rule(lambda t, s: (s < t)[None]), ValueError, r"\[t, s\].*\(1, 3, 5\)"),
    (lambda: masks.rule(prefix, "text"), TypeError, r"array 0 of masks\.rule"),
    (lambda: masks.rule(prefix, jax.random.key(0)), TypeError, r"array 0 of masks\.rule"),
    (
        lambda: biases.rule(lambda t, s, a, b: a + b, jnp.ones((2, 1, 1)), jnp.ones((3, 1, 1))),
        ValueError,
        r"must broadcast .*\(2, 1, 1\), \(3, 1, 1\)",
    ),
    (
        lambda: dot_product_attention(*QKV, mask=masks.rule(prefix, jnp.ones((3, 1, 1), int))),
        ValueError,
        "mask must broadcast",
    ),
]


@pytest.mark.parametrize(("make", "error", "words"), REFUSED)
def test_what_makes_no_rule_is_one_line(make, error, words):
    with pytest.raises(error, match=words) as refusal:
        make()
    assert "\n" not in str(refusal.value)
