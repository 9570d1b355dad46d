"""The blockwise path: random draws against the loops, its memory, and what it compiles."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from cases import assert_close, sum_to

from attention_jax import biases, dot_product_attention, explain, masks
from attention_jax.functional.dropout import keep_mask
from attention_jax.functional.plan import make_plan
from attention_jax.functional.xla_cpu import exp

blockwise = functools.partial(dot_product_attention, implementation="blockwise")

# The first few run always; the other draws take some minutes and are `pytest -m slow`.
DRAWS = [
    pytest.param(i, dtype, marks=() if i < fast else pytest.mark.slow)
    for dtype, fast in {"float64": 8, "float32": 3}.items()
    for i in range(200)
]


def draw_mask(rng, B, N, T, S):
    """A random combination of rules, and the array that it stands for."""
    offset = ("end", int(rng.integers(-3, 4)))[rng.integers(2)]
    left = None if rng.random() < 0.3 else int(rng.integers(0, 6))
    right = None if rng.random() < 0.3 else int(rng.integers(0, 4))
    lengths = rng.integers(0, S + 1, B)
    query_ids, key_ids = rng.integers(0, 3, (B, T)), rng.integers(0, 3, (B, S))
    array = rng.random((B, (1, N)[rng.integers(2)], T, S)) < 0.7
    rules = [
        (masks.causal(offset), oracles.causal(T, S, offset)),
        (masks.window(left, right, offset), oracles.window(T, S, left, right, offset)),
        (masks.key_lengths(lengths), oracles.key_lengths(T, S, lengths)),
        (masks.query_lengths(lengths % (T + 1)), oracles.query_lengths(T, S, lengths % (T + 1))),
        (masks.segments(query_ids, key_ids), oracles.segments(query_ids, key_ids)),
        (masks.dense(array), array),
    ]
    (a, a_array), (b, b_array) = (rules[i] for i in rng.integers(0, len(rules), 2))
    full = np.broadcast_to(True, (B, N, T, S))
    kind = rng.integers(5)
    if kind == 0:
        return None, full
    if kind == 1:
        return a, a_array & full
    if kind == 2:
        return a & b, a_array & b_array & full
    if kind == 3:
        return a | ~b, (a_array | ~b_array) & full
    return rules[0][0], rules[0][1] & full


@pytest.mark.parametrize(("seed", "dtype"), DRAWS)
def test_random_draws_agree_with_the_loops(seed, dtype, x64):
    rng = np.random.default_rng(seed)
    B, K, G = (int(n) for n in rng.integers(1, 4, 3))
    T, S, H, V = (int(n) for n in (*rng.integers(1, 14, 2), *rng.integers(1, 6, 2)))
    if seed % 4 == 0:  # Large enough for the tiles that are chosen without a block size.
        B, K, G, T, S = 1, 1, 1, int(rng.integers(60, 150)), int(rng.integers(60, 150))
    N = K * G
    sizes = {"query": (B, T, N, H), "key": (B, S, K, H), "value": (B, S, K, V)}
    block_size = (None, int(rng.integers(1, 9)), tuple(int(n) for n in rng.integers(1, 20, 2)))[
        rng.integers(3)
    ]
    mask, visible = draw_mask(rng, B, N, T, S)
    settings = {"scale": float(rng.uniform(0.1, 2)), "softcap": None}
    if rng.random() < 0.3:
        settings["softcap"] = float(rng.uniform(0.5, 3))
    if rng.random() < 0.4:
        sizes["bias"] = tuple(
            n if rng.random() < 0.6 else 1 for n in (B, N, T, S)[rng.integers(3) :]
        )
    elif rng.random() < 0.4:
        sizes["slopes"] = (N,)
    if rng.random() < 0.3:
        sizes["sinks"] = (N,)
    # The loops compute in float64 on what is rounded to the type.
    draw = lambda shape: rng.standard_normal(shape).astype(dtype).astype(float)
    arrays = {name: draw(shape) for name, shape in sizes.items()}
    if "slopes" in arrays:
        # Logits stay within a few units: beside hundreds float32 has lost what is compared here.
        arrays["slopes"] = (arrays["slopes"] / max(T, S)).astype(dtype).astype(float)
    rate, key = 0.3 * (rng.random() < 0.3), jax.random.key(seed)

    def attend(arrays):
        extra = {k: arrays[k] for k in ("bias", "sinks") if k in arrays}
        if "slopes" in arrays:
            extra["bias"] = biases.alibi(arrays["slopes"])
        qkv = (arrays[name] for name in ("query", "key", "value"))
        return blockwise(
            *qkv,
            mask=mask,
            **settings,
            **extra,
            dropout_rate=rate,
            dropout_rng=key,
            block_size=block_size,
            return_residual=True,
        )

    extra = {k: arrays[k] for k in ("bias", "sinks") if k in arrays}
    if "slopes" in arrays:
        extra["bias"] = oracles.alibi(arrays["slopes"], T, S)
    if rate:
        extra |= {"keep": np.asarray(keep_mask(key, rate, (B,), N, T, S)), "rate": rate}
    qkv = [arrays[name] for name in ("query", "key", "value")]
    want = oracles.dot_product(*qkv, mask=visible, **settings, **extra)
    empty = ~np.isfinite(want[1])
    d_out, d_lse = draw(want[0].shape), draw(want[1].shape)
    d_lse[empty] = 0  # A row that sees nothing has no logsumexp to differentiate.
    grads = oracles.dot_product_gradients(*qkv, d_out, d_lse, mask=visible, **settings, **extra)

    @jax.jit
    def run(arrays):
        results, pull_back = jax.vjp(attend, arrays)
        return results, pull_back((jnp.asarray(d_out, dtype), jnp.asarray(d_lse, dtype)))[0]

    (out, lse), got = run({name: jnp.asarray(x, dtype) for name, x in arrays.items()})
    forward, backward = {"float32": (2e-6, 1e-5), "float64": (1e-12, 1e-11)}[dtype]
    assert out.dtype == lse.dtype == dtype
    assert_close(out, want[0], forward, "out")
    assert_close(lse, want[1], forward, "logsumexp")
    d_bias = grads.pop("bias")
    if "bias" in arrays:
        grads["bias"] = sum_to(d_bias, arrays["bias"].shape)
    if "slopes" in arrays:
        distance = oracles.alibi(np.ones(N), T, S)
        terms = d_bias.sum(0) * distance
        slopes = got.pop("slopes")
        # Terms of both signs, thousands of times their sum: what rounding each of them may cost.
        rounding = jnp.finfo(dtype).eps * np.abs(terms).sum((1, 2))
        error = np.abs(oracles.f64(slopes) - terms.sum((1, 2)))
        assert (error <= backward * np.maximum(1, np.abs(terms.sum((1, 2)))) + rounding).all(), (
            error
        )
    if "sinks" in arrays:
        grads["sinks"] = sum_to(grads["sinks"], (N,))
    for name in got:
        assert_close(got[name], grads[name], backward, name)


def agrees_with_dense(mask=None, bias=None):
    """Outputs and all gradients of tiles that divide nothing, beside those of the definition."""
    rng = np.random.default_rng(0)
    arrays = [jnp.asarray(rng.standard_normal((2, 7, 1, 4)), jnp.float32) for _ in range(4)]
    *arrays, d_out = arrays
    arrays += [] if bias is None else [bias]

    @functools.partial(jax.jit, static_argnums=0)
    def run(name, arrays):
        block_size = 3 if name == "blockwise" else None
        attend = functools.partial(
            dot_product_attention, mask=mask, implementation=name, block_size=block_size
        )
        out, pull_back = jax.vjp(attend, *arrays)
        return out, pull_back(d_out)

    got, want = (jax.tree.leaves(run(name, arrays)) for name in ("blockwise", "dense"))
    for i, (a, b) in enumerate(zip(got, want, strict=True)):
        assert_close(a, b, 1e-5, f"result {i}")


# (T, S, N, K, H, mask): what the rules of `make_plan` choose, of which each is here.
CHOSEN = {
    "written out, backward a loop": (600, 600, 8, 4, 16, masks.causal()),
    "written out both ways": (600, 600, 1, 1, 16, masks.causal()),
    "written out in halves": (128, 128, 8, 4, 16, masks.causal()),
    "written out, wide heads": (400, 400, 4, 4, 80, masks.causal()),
    "small squares": (300, 300, 4, 4, 16, masks.causal()),
    "written out, backward squares": (1100, 1100, 4, 2, 16, masks.causal()),
    "squares": (2100, 2100, 2, 1, 16, masks.window(2000)),
    "a halved triangle": (2100, 2100, 2, 1, 16, masks.causal()),
    "halved triangles, three heads in a group": (2309, 2309, 3, 1, 16, masks.causal()),
    "rows": (1100, 1100, 2, 2, 16, None),
    "rows, few of them": (100, 700, 2, 1, 16, masks.causal("end")),
    "window, squares": (300, 300, 8, 8, 16, masks.window(70)),
    "window, rows": (700, 700, 2, 1, 24, masks.window(70)),
}
# What compiles fastest of each kind runs always; all of them are `pytest -m slow`.
FAST = {
    ("written out in halves", "float32"),
    ("a halved triangle", "float32"),
    ("rows", "float32"),
    ("rows, few of them", "bfloat16"),
    ("window, squares", "float32"),
    ("window, rows", "bfloat16"),
}
ALL_CHOSEN = [
    pytest.param(case, dtype, marks=() if (case, dtype) in FAST else pytest.mark.slow)
    for case in CHOSEN
    for dtype in ("float32", "bfloat16")
]


@pytest.mark.parametrize(("case", "dtype"), ALL_CHOSEN)
def test_tiles_that_are_chosen_agree_with_the_definition(case, dtype):
    T, S, N, K, H, mask = CHOSEN[case]
    rng = np.random.default_rng(0)
    shapes = {"query": (T, N), "key": (S, K), "value": (S, K), "d_out": (T, N)}
    arrays = {
        name: jnp.asarray(rng.standard_normal((1, *shape, H)), dtype)
        for name, shape in shapes.items()
    }

    def run(implementation, dtype):
        *qkv, d_out = (x.astype(dtype) for x in arrays.values())
        attend = functools.partial(dot_product_attention, mask=mask, implementation=implementation)
        out, pull_back = jax.vjp(attend, *qkv)
        return [oracles.f64(x) for x in (out, *pull_back(d_out))]

    want, found = run("dense", "float32"), run("blockwise", dtype)
    narrow = want if dtype == "float32" else run("dense", dtype)
    for name, x, y, z in zip(arrays, found, want, narrow, strict=True):
        bound = 1e-5 * max(1, np.abs(y).max()) if dtype == "float32" else 3 * np.abs(z - y).max()
        assert np.abs(x - y).max() <= bound, name


def test_bfloat16_is_multiplied_in_float32_where_that_is_faster(bfloat16_instructions):
    def run(attend, *qkv):
        out, pull_back = jax.vjp(functools.partial(attend, mask=masks.causal()), *qkv)
        return out, *pull_back(out)

    for T, has_instructions in ((30, True), (31, False)):  # Else jax keeps the first program.
        rng = np.random.default_rng(0)
        arrays = [jnp.asarray(rng.standard_normal((T, 2, 16)), jnp.bfloat16) for _ in range(3)]
        bfloat16_instructions(has_instructions)
        tiles = jax.jit(functools.partial(run, blockwise))
        text = tiles.lower(*arrays).as_text()
        products = [x.partition(" : ")[2] for x in text.splitlines() if "dot_general" in x]
        assert products
        assert any("bf16" in types for types in products) is has_instructions
        found = tiles(*arrays)
        assert {x.dtype for x in found} == {jnp.dtype("bfloat16")}
        dense = functools.partial(dot_product_attention, implementation="dense")
        want = jax.jit(functools.partial(run, dense))(*(x.astype(jnp.float32) for x in arrays))
        for x, y in zip(found, want, strict=True):
            assert_close(x, y, 2e-2 if has_instructions else 2**-8)


def test_a_halved_triangle_takes_all_that_tiles_take():
    rng = np.random.default_rng(0)
    qkv = [jnp.asarray(rng.standard_normal((2100, n, 8)), jnp.float32) for n in (2, 1, 1)]
    qkv[1] = qkv[1].at[2099].set(jnp.nan)  # Only the last query sees it.
    settings = {
        "mask": masks.causal(),
        "softcap": 2.0,
        "bias": biases.alibi(2),
        "sinks": jnp.array([0.5, -1]),
        "dropout_rate": 0.2,
        "dropout_rng": jax.random.key(1),
        "return_residual": True,
    }
    got, want = (
        dot_product_attention(*qkv, **settings, implementation=name)
        for name in ("blockwise", "dense")
    )
    assert np.isnan(got[0][2099]).all()
    for x, y in zip(got, want, strict=True):
        assert_close(x[:2099], y[:2099], 2e-6)


@pytest.mark.parametrize("T", [600, 2100])
@pytest.mark.parametrize("mask", [None, masks.causal()], ids=["full", "causal"])
def test_rows_whose_logits_need_a_peak_are_right_and_change_no_other(mask, T):
    """exp of their logits is infinite, or nothing, or what it mixes is infinite."""
    rng = np.random.default_rng(0)
    query, key, value = (jnp.asarray(rng.standard_normal((T, 1, 8)), jnp.float32) for _ in range(3))
    key = key.at[:, 0, 0].set(jnp.abs(key[:, 0, 0]) + 1).at[T - 1, 0, 0].set(4)
    value = value.at[T - 1].mul(1e30)  # All see it without a mask, the last query with one.
    attend = jax.jit(functools.partial(blockwise, mask=mask))
    plain = attend(query, key, value)
    rows = {50: 1e3, 51: -2e3, 52: -130, 53: 130, 54: 20}
    far = query.at[np.array(list(rows)), 0, 0].set(np.array(list(rows.values())))
    got = attend(far, key, value)
    want = dot_product_attention(far, key, value, mask=mask, implementation="dense")
    for row in (*range(48, 56), T - 1):
        scale = np.abs(want[row]).max()
        np.testing.assert_allclose(got[row] / scale, want[row] / scale, atol=5e-4)
    others = np.delete(np.arange(T), list(rows))
    np.testing.assert_array_equal(got[others], plain[others])


@pytest.mark.parametrize("implementation", ["dense", "blockwise"])
@pytest.mark.parametrize("logit", [0.0, 64.0, 1e4, 1e6, -1e6, -1e9])
def test_a_sink_takes_its_share_beside_logits_of_any_size(logit, implementation):
    """Of five equal logits, one is a sink: it takes a fifth, and outputs are four fifths."""
    ones = jnp.ones((4, 1, 1))

    def run(sinks):
        return dot_product_attention(
            *(ones, jnp.full((4, 1, 1), logit), ones),
            scale=1.0,
            sinks=sinks,
            return_residual=True,
            implementation=implementation,
        )

    (out, residual), pull_back = jax.vjp(run, jnp.array([logit]))
    np.testing.assert_allclose(out, 0.8, rtol=1e-6)
    np.testing.assert_allclose(residual, logit + np.log(5), rtol=1e-6)
    (of_out,), (of_residual,) = pull_back((ones, 0 * residual)), pull_back((0 * ones, residual + 1))
    np.testing.assert_allclose(of_out, [4 * -0.2 * 0.8], rtol=1e-5)
    np.testing.assert_allclose(of_residual, [0.2 * (residual + 1).sum()], rtol=1e-5)


@pytest.mark.parametrize("logits", ["small", "large"])
def test_a_single_key_gives_its_value_exactly(logits):
    """In bfloat16 a weight that is rounded beside a sum that is not would change it."""
    rng = np.random.default_rng(0)
    query, value = (jnp.asarray(rng.standard_normal((600, 2, 64)), "bfloat16") for _ in range(2))
    if logits == "large":
        query *= 20
    for mask in (masks.window(0), masks.causal() & masks.segments(jnp.arange(600))):
        np.testing.assert_array_equal(blockwise(query, query, value, mask=mask), value)


@pytest.mark.parametrize("mask", [None, masks.causal()], ids=["full", "causal"])
def test_a_mean_of_large_values_is_no_larger(mask):
    """Their sum would be infinite."""
    zeros = jnp.zeros((600, 2, 8))
    out = blockwise(zeros, zeros, zeros + 2e38, mask=mask)
    np.testing.assert_allclose(out, np.full(out.shape, 2e38), rtol=2e-5)


@pytest.mark.parametrize("residual", [False, True], ids=["output", "residual too"])
@pytest.mark.parametrize(
    "settings",
    [{}, dict(mask=masks.window(40, 9)), dict(block_size=(32, 48))],
    ids=["one tile", "window", "many tiles"],
)
def test_bfloat16_gradients_do_not_grow_with_what_all_keys_share(settings, residual):
    """Keys whose mean is 16 times their spread; no error beyond three times that of the definition.

    A row of the logits' gradients sums to zero. Where rounding loses that, the mean of the keys
    enters the gradient of the query.
    """
    rng = np.random.default_rng(5)
    query, key, value = (rng.standard_normal((2, 130, n, 32)) for n in (4, 2, 2))
    key += 16 * rng.standard_normal((1, 1, 2, 32))
    arrays = [jnp.asarray(x, jnp.bfloat16) for x in (query, key, value)]
    cotangent = jnp.asarray(rng.standard_normal((2, 130, 4, 32)), jnp.bfloat16)

    def d_query(implementation, dtype, **more):
        def attend(query):
            _, key, value = (x.astype(dtype) for x in arrays)
            return dot_product_attention(
                query, key, value, implementation=implementation, return_residual=True, **more
            )

        (out, _), pull_back = jax.vjp(attend, arrays[0].astype(dtype))
        d_residual = jnp.full((2, 130, 4), float(residual))
        return pull_back((cotangent.astype(out.dtype), d_residual))[0].astype(jnp.float32)

    mask = settings.get("mask")
    wanted = d_query("dense", jnp.float32, mask=mask)
    error = lambda found: jnp.sqrt(jnp.mean((found - wanted) ** 2))
    naive = error(d_query("dense", jnp.bfloat16, mask=mask))
    assert error(d_query("blockwise", jnp.bfloat16, **settings)) < 3 * naive


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_second_derivative_does_not_see_what_is_masked(dtype):
    rng = np.random.default_rng(0)
    query, key, value = (jnp.asarray(rng.standard_normal((64, 2, 8)), dtype) for _ in range(3))
    hidden = (jnp.arange(64) >= 40)[:, None, None]
    mask = masks.key_lengths(jnp.array(40))

    @jax.jit
    def penalised(query, key):
        gradient = jax.grad(lambda q: jnp.sin(blockwise(q, key, value, mask=mask)).sum())
        return jax.grad(lambda q: (gradient(q).astype(jnp.float32) ** 2).sum())(query)

    got, want = (penalised(query, jnp.where(hidden, x, key)) for x in (jnp.nan, 0))
    np.testing.assert_array_equal(got, want)
    assert np.isfinite(np.asarray(got, np.float32)).all()


def test_a_nan_query_shows_in_the_gradients_of_no_value_that_it_does_not_see():
    rng = np.random.default_rng(0)
    query, key, value = (jnp.asarray(rng.standard_normal((512, 1, 8)), jnp.float32) for _ in "qkv")
    query = query.at[100].set(jnp.nan)
    for mask in (masks.causal(), masks.segments(jnp.arange(512) // 101)):
        loss = lambda value, mask=mask: blockwise(query, key, value, mask=mask).sum()
        spoiled = np.isnan(jax.jit(jax.grad(loss))(value)).any((1, 2))
        np.testing.assert_array_equal(spoiled, mask.materialize(512, 512)[100])


@pytest.mark.parametrize("second", ["jvp of grad", "grad of grad"])
@pytest.mark.parametrize("mask", [None, masks.causal()], ids=["full", "causal"])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_second_derivatives_with_and_without_a_peak(mask, second, dtype, x64):
    """Sums of exp(logit) from nothing to infinity, and their squares."""
    rng = np.random.default_rng(0)
    q, k, v, d = (jnp.asarray(rng.standard_normal((64, n, 4)), dtype) for n in (2, 1, 1, 2))

    def made(implementation):
        attend = functools.partial(dot_product_attention, mask=mask, implementation=implementation)

        @jax.jit
        def found(q, size):
            gradient = jax.grad(lambda q: (attend(q * size, k, v) ** 2).sum())
            if second == "jvp of grad":
                return jax.jvp(gradient, (q,), (d,))[1]
            return jax.grad(lambda q: (gradient(q) * d).sum())(q)

        return found

    definition, tiles = made("dense"), made("blockwise")
    for size in (1, 15, 40, 400):
        want = definition(q, jnp.asarray(size, dtype))
        scale = np.abs(want).max()
        bound = {"float32": 2e-5 * max(1, size / 10), "float64": 1e-10}[dtype]
        found = tiles(q, jnp.asarray(size, dtype))
        np.testing.assert_allclose(found / scale, want / scale, atol=bound)


def test_a_batch_of_vmap_is_done_again_only_where_it_must_be():
    """A `cond` on a batched predicate would be a select, which always does both."""

    def conds(f):
        text = str(jax.make_jaxpr(f)(jnp.zeros((2, 3, 300, 4, 8))))
        return text.count("cond["), text.count("= while[")

    def attend(x):
        return blockwise(x, x, x, mask=masks.causal())

    assert conds(jax.vmap(jax.vmap(attend))) == conds(attend)
    assert conds(attend)[0] > 0


def test_the_exponential_is_exact_to_a_few_units_in_the_last_place(x64):
    x = np.linspace(-87, 88, 1_000_001, dtype=np.float32)
    want = np.exp(x.astype(np.float64))
    got = jax.jit(exp)(x)
    assert got.dtype == jnp.float32
    assert np.abs(got / want - 1).max() < 4e-7
    np.testing.assert_array_equal(
        jax.jit(exp)(np.array([-np.inf, -1e30, -89, np.nan, 0], np.float32)), [0, 0, 0, np.nan, 1]
    )
    # Compiled apart: an ulp.
    slopes, values = jax.vmap(jax.grad(exp))(x[::1000]), jax.jit(exp)(x[::1000])
    np.testing.assert_allclose(slopes, values, rtol=2.4e-7)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_one_operand_alone_may_be_mapped(dtype):
    rng = np.random.default_rng(0)
    arrays = [jnp.asarray(rng.standard_normal((5, 4, 8)), dtype) for _ in range(4)]

    @jax.jit
    def run(*arrays):
        *qkv, d_out = arrays
        out, pull_back = jax.vjp(blockwise, *qkv)
        return out, *pull_back(d_out)

    for mapped in range(4):
        rows = jnp.asarray(rng.standard_normal((3, 5, 4, 8)), dtype)
        some = [rows if i == mapped else x for i, x in enumerate(arrays)]
        got = jax.jit(jax.vmap(run, [0 if i == mapped else None for i in range(4)]))(*some)
        for row in range(3):
            alone = run(*(x[row] if i == mapped else x for i, x in enumerate(some)))
            for a, b in zip(got, alone, strict=True):
                assert_close(a[row], b, 1e-5 if dtype == "float32" else 2e-2)


@pytest.mark.parametrize("scale", [np.float32(0.3), jnp.float32(0.3)], ids=["numpy", "jax"])
def test_a_scale_may_be_an_array(scale):
    x = jnp.asarray(np.random.default_rng(0).standard_normal((5, 2, 3)), jnp.float32)
    assert_close(blockwise(x, x, x, scale=scale), blockwise(x, x, x, scale=0.3), 1e-6)


def test_lengths_may_go_beyond_the_keys():
    agrees_with_dense(mask=masks.key_lengths(jnp.array([9, 12])))


def test_narrow_and_unsigned_integers_do_not_wrap_around():
    lengths, offset = jnp.array([3, 5], jnp.uint8), jnp.array([0, 2], jnp.uint8)
    agrees_with_dense(mask=masks.key_lengths(lengths) & masks.window(4, 1, offset))


@pytest.mark.parametrize("bias", [0.3, -1e9], ids=repr)
def test_one_number_for_all_logits_changes_no_weights(bias):
    """Also a huge one, beside which the logarithm of the row's sum is nothing."""
    agrees_with_dense(bias=jnp.float32(bias))


def compiled(attend, T, **settings):
    """Forward and backward pass over T positions, compiled."""
    x = jax.ShapeDtypeStruct((1, T, 2, 32), jnp.float32)

    def run(query, key, value):
        out, pull_back = jax.vjp(functools.partial(attend, **settings), query, key, value)
        return pull_back(out)

    return jax.jit(run).lower(x, x, x).compile()


@pytest.mark.parametrize("mask", [None, masks.causal(), masks.window(100)], ids=repr)
def test_memory_is_linear_in_the_sequence(mask):
    def growth(attend):
        small, large = (
            compiled(attend, T, mask=mask).memory_analysis().temp_size_in_bytes
            for T in (1024, 4096)
        )
        return large / small

    dense = functools.partial(dot_product_attention, implementation="dense")
    assert growth(blockwise) < 6
    assert growth(dense) > 10


def test_a_window_costs_its_width():
    def flops(T):
        x = jax.ShapeDtypeStruct((1, T, 2, 64), jnp.float32)
        return explain(x, x, x, mask=masks.window(255)).flops

    assert flops(16384) / flops(4096) == pytest.approx(4, rel=0.1)


def test_new_contents_compile_nothing_new():
    traces = []
    x = jax.random.normal(jax.random.key(0), (2, 70, 2, 8))

    @jax.jit
    def run(mask, rng):
        traces.append(mask)
        return blockwise(x, x, x, mask=mask, dropout_rate=0.5, dropout_rng=rng)

    for i in range(3):
        ids = jnp.arange(140).reshape(2, 70) // (20 + i)
        mask = masks.segments(ids) & masks.key_lengths(jnp.array([i, 70])) & masks.causal()
        run(mask, jax.random.key(i))
    assert len(traces) == 1


@pytest.mark.parametrize("settings", [{}, {"mask": masks.causal()}], ids=["full", "causal"])
def test_large_tiles_keep_float32_exact(settings):
    """Against the loops, at the sizes that are chosen without a block size."""
    rng = np.random.default_rng(0)
    qkv = [rng.standard_normal((1, 600, 1, 16)).astype(np.float32) for _ in range(3)]
    visible = oracles.causal(600, 600) if settings else None
    want = oracles.dot_product(*qkv, mask=visible)[0]
    assert_close(blockwise(*map(jnp.asarray, qkv), **settings), want, 2e-6)


@pytest.mark.parametrize("position", [0, 40, 69])
def test_nan_shows_to_those_who_see_it_alone(position):
    """In float32 and with many heads in a tile: there a product may spread a NaN over its row."""
    rng = np.random.default_rng(0)
    query, key, value = (jnp.asarray(rng.standard_normal((3, 70, 4, 8)), "float32") for _ in "qkv")
    spoiled = key.at[1, position, 2].set(jnp.nan)
    for attend in (blockwise, functools.partial(blockwise, block_size=32)):
        got, want = (attend(query, x, value, mask=masks.causal()) for x in (spoiled, key))
        seen = np.zeros(got.shape, bool)
        seen[1, position:, 2] = True
        np.testing.assert_array_equal(np.isnan(got), seen)
        np.testing.assert_allclose(got[~seen], want[~seen], rtol=0, atol=2e-6)
        everywhere = attend(query, spoiled, value)
        assert np.isnan(everywhere[1, :, 2]).all()
        assert np.isnan(everywhere).sum() == 70 * 8

        def loss(query, key, attend=attend):
            out = attend(query, key, value, mask=masks.causal())
            return jnp.where(jnp.arange(70)[:, None, None] < position, out, 0).sum()

        got, want = (jax.grad(loss)(query, x)[:, :position] for x in (spoiled, key))
        np.testing.assert_allclose(got, want, rtol=0, atol=2e-6)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("settings", [{}, {"block_size": 2}, {"mask": masks.causal()}])
def test_a_logit_of_minus_infinity_has_no_weight_in_the_gradients(settings, dtype, x64):
    query = jnp.ones((1, 3, 1, 1), dtype)
    key = jnp.asarray([0.5, -np.inf, 1], dtype)[None, :, None, None]
    value = jnp.asarray([5, 7, 9], dtype)[None, :, None, None]

    def run(attend):
        out, pull_back = jax.vjp(lambda value: attend(query, key, value), value)
        return out, *pull_back(query)

    mask = settings.get("mask")
    dense = functools.partial(dot_product_attention, implementation="dense", mask=mask)
    for got, want in zip(run(functools.partial(blockwise, **settings)), run(dense), strict=True):
        assert_close(got, want, 1e-6)


@pytest.mark.parametrize("make", [jnp.bfloat16, np.float32, lambda x: jnp.asarray(x, "float16")])
def test_a_cap_and_a_scale_are_divided_as_they_are(make):
    x = jnp.asarray(np.random.default_rng(0).standard_normal((5, 2, 8)), "float32")
    settings = {"softcap": make(30), "scale": make(0.3)}
    want = dot_product_attention(x, x, x, implementation="dense", **settings)
    assert_close(blockwise(x, x, x, **settings), want, 2e-6)
    traced = jax.jit(lambda settings: blockwise(x, x, x, **settings))(settings)
    assert_close(traced, want, 2e-6)


@pytest.mark.parametrize(("G", "T"), [(1, 1024), (3, 1024), (32, 1024), (15, 273)])
def test_a_program_does_not_grow_with_the_heads_of_a_group(G, T):
    """What is written out block by block takes seconds to compile for every dozen of blocks."""
    plan = make_plan((1, 1), G, T, T, 64, masks.causal(), None, 1.0, jnp.float32, "cpu").forward
    assert not plan.unrolled or plan.blocks <= 16


@pytest.mark.parametrize("dtype", ["bfloat16", "float32", "float64"])
@pytest.mark.parametrize("mask", [None, masks.causal()], ids=["full", "causal"])
def test_products_with_the_hessian_are_those_of_the_definition(mask, dtype, x64):
    rng = np.random.default_rng(0)
    # Few different numbers, so that rows have their largest entry more than once.
    x, direction = (jnp.asarray(rng.integers(-1, 2, (9, 2, 3)), dtype) for _ in range(2))

    def product(implementation, **settings):
        def loss(x):
            attend = functools.partial(dot_product_attention, implementation=implementation)
            return (attend(x, x, x, mask=mask, **settings) ** 2).sum()

        return jax.jit(lambda x, d: jax.jvp(jax.grad(loss), (x,), (d,))[1])(x, direction)

    tolerance = {"bfloat16": 3e-2, "float32": 1e-5, "float64": 1e-11}[dtype]
    assert_close(product("blockwise", block_size=4), product("dense"), tolerance)


SIZES = {  # B, T, N, K, H: products of many heads, of one, and of blocks that are written out.
    "heads": (2, 64, 4, 2, 32),
    "head": (1, 128, 1, 1, 64),
    "blocks": (1, 512, 2, 2, 32),
}


def draw(rng, B, T, N, K, H):
    """Query, key, value and a cotangent."""
    shapes = ((B, T, heads, H) for heads in (N, K, K, N))
    return tuple(jnp.asarray(rng.standard_normal(x), "float32") for x in shapes)


@pytest.mark.parametrize("compile", [jax.jit, lambda f: f], ids=["jit", "eager"])
@pytest.mark.parametrize(
    ("sizes", "mask"),
    [
        pytest.param(sizes, mask, marks=() if always else pytest.mark.slow, id=f"{sizes}-{name}")
        for name, mask, fast in (
            ("full", None, ("head",)),
            ("causal", masks.causal(), ("blocks",)),
            ("window", masks.window(40), ("heads",)),
        )
        for sizes in SIZES
        for always in [sizes in fast]
    ],
)
def test_products_with_the_hessian_on_every_core(sizes, mask, compile):
    rng = np.random.default_rng(0)
    *inputs, d_out = draw(rng, *SIZES[sizes])
    *directions, _ = draw(rng, *SIZES[sizes])

    def product(attend):
        def loss(inputs):
            return (attend(*inputs, mask=mask) * d_out).sum()

        def along(inputs, directions):
            return jax.jvp(jax.grad(loss), (inputs,), (directions,))[1]

        return compile(along)(inputs, directions)

    dense = functools.partial(dot_product_attention, implementation="dense")
    for got, want in zip(product(blockwise), product(dense), strict=True):
        assert_close(got, want, 1e-5)


@pytest.mark.parametrize(
    ("sizes", "mask"),
    [("heads", masks.causal()), ("head", masks.window(40)), ("blocks", None)],
    ids=["heads", "head", "blocks"],
)
def test_gradients_of_a_gradient_are_those_of_the_definition(sizes, mask):
    *inputs, d_out = draw(np.random.default_rng(0), *SIZES[sizes])

    def penalty(attend):
        def loss(inputs):
            return (attend(*inputs, mask=mask) * d_out).sum()

        def squared(inputs):
            return sum((x**2).sum() for x in jax.grad(loss)(inputs))

        return jax.jit(jax.grad(squared))(inputs)

    dense = functools.partial(dot_product_attention, implementation="dense")
    for got, want in zip(penalty(blockwise), penalty(dense), strict=True):
        assert_close(got, want, 1e-5)


@pytest.mark.parametrize("passes", ["forward", "both"])
@pytest.mark.parametrize("known", range(4), ids=["query", "key", "value", "d_out"])
@pytest.mark.parametrize("mask", [None, masks.causal()], ids=["full", "causal"])
@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
def test_an_input_of_ones_may_be_known_to_the_compiler(sizes, mask, known, passes):
    """Of ones that it sees XLA makes one number, which some products do not stand."""
    arrays = list(draw(np.random.default_rng(0), *sizes))
    ones = arrays[known] = jnp.ones_like(arrays[known])

    @jax.jit
    def run(*arrays):
        *inputs, d_out = arrays
        out, pull_back = jax.vjp(functools.partial(blockwise, mask=mask), *inputs)
        return (out, *pull_back(d_out)) if passes == "both" else (out,)

    @jax.jit
    def run_of_ones(*arrays):
        return run(*arrays[:known], jnp.ones_like(ones), *arrays[known + 1 :])

    for got, want in zip(run_of_ones(*arrays), run(*arrays), strict=True):
        assert_close(got, want, 1e-5)


def test_forward_mode_is_refused_in_a_line():
    x = jnp.ones((3, 1, 2))
    with pytest.raises(TypeError, match="forward-mode") as error:
        jax.jvp(lambda x: blockwise(x, x, x), (x,), (x,))
    assert "\n" not in str(error.value)


OFF_CPU = {
    "causal": dict(mask=masks.causal()),
    "many": dict(
        mask=masks.causal() & masks.key_lengths(jnp.array([300, 0])),
        bias=biases.alibi(4),
        softcap=3.0,
        sinks=jnp.arange(4.0),
        dropout_rate=0.2,
        dropout_rng=jax.random.key(0),
    ),
}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("settings", OFF_CPU.values(), ids=OFF_CPU)
def test_off_the_cpu_tiles_are_plain(settings, dtype, monkeypatch):
    """The plan and the program of a GPU: its numbers on this machine, its operations by name."""
    monkeypatch.setattr("attention_jax.functional.blockwise.default_platform", lambda: "gpu")
    rng = np.random.default_rng(0)
    # A length that 512 does not divide: the last tile overlaps the one before it.
    shapes = [(2, 600, heads, 16) for heads in (4, 2, 2, 4)]
    arrays = [jnp.asarray(rng.standard_normal(shape), dtype) for shape in shapes]

    def run(implementation):
        def call(query, key, value, d_out):
            attend = functools.partial(
                dot_product_attention, implementation=implementation, **settings
            )
            out, pull_back = jax.vjp(attend, query, key, value)
            return out, *pull_back(d_out)

        return jax.jit(call)

    tolerance = {"float32": 1e-5, "bfloat16": 3e-2}[dtype]
    for got, want in zip(run("blockwise")(*arrays), run("dense")(*arrays), strict=True):
        assert_close(got, want, tolerance)
    program = run("blockwise").trace(*arrays).lower(lowering_platforms=("cuda",)).as_text()
    for trick in ("optimization_barrier", "bitcast_convert"):
        assert trick not in program
