"""The transformations of jax work on attention."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from absl.testing import parameterized
from cases import (
    DOT_PRODUCT,
    LINEAR,
    SETS,
    SMALL,
    Sizes,
    assert_close,
    every_case,
    inputs_of,
    qkv_of,
    random_mask,
    random_qkv,
    value_and_pull,
)
from jax.sharding import PartitionSpec as P

from attention_jax import MultiHeadAttention, biases, masks, positions

SETTINGS = {
    "causal": (DOT_PRODUCT + LINEAR, lambda: {"mask": masks.causal()}),
    "everything": (
        DOT_PRODUCT,
        lambda: {
            "mask": masks.window(2, 1) & masks.dense(random_mask(SMALL.T, SMALL.S)),
            "bias": biases.alibi(SMALL.N),
            "softcap": 2.0,
            "sinks": jnp.arange(6.0),
            "dropout_rate": 0.3,
            "dropout_rng": jax.random.key(0),
        },
    ),
}
every_setting = pytest.mark.parametrize(
    ("case", "settings"),
    [(case, make) for cases, make in SETTINGS.values() for case in cases],
    ids=[f"{case.name}-{name}" for name, (cases, _) in SETTINGS.items() for case in cases],
)


@pytest.mark.filterwarnings("ignore:.*pmap.*:DeprecationWarning")
class TestVariants(chex.TestCase):
    """Compiled or not, arrays of jax or of numpy, on one device or on all of them: the same."""

    @chex.all_variants
    @parameterized.named_parameters((case.name, case) for case in SETS)
    def test_values_are_the_oracles(self, case):
        inputs = inputs_of(case)
        attend = self.variant(lambda inputs: case.attend(**inputs, mask=masks.causal()))
        want = case.oracle(**inputs, mask=oracles.causal(SMALL.T, SMALL.S))
        assert_close(attend(inputs), want, 2e-6)

    @chex.variants(without_jit=True, with_pmap=True)
    @parameterized.named_parameters((case.name, case) for case in DOT_PRODUCT)
    def test_every_setting_at_once(self, case):
        _, settings = SETTINGS["everything"]
        attend = lambda *qkv: case.attend(*qkv, **settings())
        chex.assert_trees_all_close(
            self.variant(attend)(*qkv_of(case)), jax.jit(attend)(*qkv_of(case)), atol=1e-6
        )


@every_case
def test_vmap_over_a_batch_is_the_batch(case):
    inputs = qkv_of(case, case.small._replace(batch=(3,)))
    attend = lambda *qkv: case.attend(*qkv, mask=masks.causal())
    (out, grads), (want, want_grads) = (
        value_and_pull(f)(*inputs) for f in (jax.vmap(attend), attend)
    )
    assert_close(out, want, 1e-6)
    for grad, want_grad in zip(grads, want_grads, strict=True):
        assert_close(grad, want_grad, 1e-5)


@every_case
def test_vmap_over_any_axis_of_one_argument(case):
    query, key, value = qkv_of(case)
    values = jnp.stack([value, 2 * value], axis=2)
    out = jax.jit(jax.vmap(case.attend, in_axes=(None, None, 2), out_axes=1))(query, key, values)
    want = jax.jit(case.attend)(query, key, value)
    assert_close(out, np.stack([want, 2 * want], axis=1), 1e-5)


def test_vmap_over_a_mask_and_a_bias():
    query, key, value = random_qkv(Sizes(batch=()))
    lengths, slopes = jnp.array([3, 7, 0]), jnp.ones((3, 6)) * jnp.arange(3)[:, None]
    for case in DOT_PRODUCT:

        def attend(length, slopes, case=case):
            mask, bias = masks.key_lengths(length), biases.alibi(slopes)
            return case.attend(query, key, value, bias, mask)

        out = jax.jit(jax.vmap(attend))(lengths, slopes)
        for got, length, slope in zip(out, lengths, slopes, strict=True):
            want, _ = oracles.dot_product(
                query,
                key,
                value,
                mask=np.arange(7) < int(length),
                bias=oracles.alibi(slope, 5, 7),
            )
            assert_close(got, want, 2e-6)


@every_case
def test_scan_and_checkpoint_are_the_loop(case):
    query, key, value = qkv_of(case, Sizes(T=7, S=7, N=3, K=3, H=4, V=4))
    mask = masks.causal()

    def layer(x, _):
        return case.attend(x, key, value, mask=mask), None

    def loop(x):
        for _ in range(3):
            x, _ = layer(x, None)
        return x

    def scanned(x):
        return jax.lax.scan(jax.checkpoint(layer), x, None, length=3)[0]

    (out, (grad,)), (want, (want_grad,)) = (value_and_pull(f)(query) for f in (scanned, loop))
    assert_close(out, want, 1e-6)
    assert_close(grad, want_grad, 1e-5)


@every_case
@pytest.mark.filterwarnings("ignore:.*pmap.*:DeprecationWarning")
def test_pmap_and_shard_map_split_the_batch_and_change_nothing(case):
    inputs = inputs_of(case, Sizes(batch=(8,), T=7, N=2, K=1, H=4, V=5))
    # What has no batch axis is the same on every device.
    rows = {name: P("data") if len(x) == 8 else P() for name, x in inputs.items()}

    def run(inputs):
        attend = lambda inputs: case.attend(**inputs, mask=masks.causal())
        out, pull_back = jax.vjp(attend, inputs)
        (grads,) = pull_back(out)
        return out, {name: grads[name] for name in rows if rows[name]}

    want = jax.jit(run)(inputs)
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    # The default checks: a scan whose carry starts as a constant does not pass them.
    mapped = jax.shard_map(run, mesh=mesh, in_specs=(rows,), out_specs=P("data"))
    for got, right in zip(
        jax.tree.leaves(jax.jit(mapped)(inputs)), jax.tree.leaves(want), strict=True
    ):
        assert_close(got, right, 1e-5)
    split = {name: x[:, None] if rows[name] else x for name, x in inputs.items()}
    axes = ({name: 0 if rows[name] else None for name in rows},)
    parts = jax.pmap(run, in_axes=axes)(split)
    for got, right in zip(jax.tree.leaves(parts), jax.tree.leaves(want), strict=True):
        assert_close(got[:, 0], right, 1e-5)


def test_shard_map_passes_masks_biases_dropout_and_heads():
    query, key, value = random_qkv(Sizes(batch=(4,), T=7, N=4, K=2, H=3, V=5))
    mesh = jax.make_mesh((4, 2), ("data", "heads"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    lengths, slopes = jnp.array([3, 0, 7, 5]), jnp.arange(1.0, 5.0)
    for case in DOT_PRODUCT:

        def attend(lengths, query, key, value, slopes, sinks, case=case):
            mask = masks.causal() & masks.key_lengths(lengths)
            return case.attend(query, key, value, biases.alibi(slopes), mask, sinks=sinks)

        def grads(lengths, *arrays, attend=attend):
            out, pull_back = jax.vjp(lambda *arrays: attend(lengths, *arrays), *arrays)
            return out, pull_back(out)

        arrays = (lengths, query, key, value, slopes, slopes)
        rows = P("data", None, "heads")
        split = jax.shard_map(
            grads,
            mesh=mesh,
            in_specs=(P("data"), rows, rows, rows, P("heads"), P("heads")),
            out_specs=(rows, (rows, rows, rows, P("heads"), P("heads"))),
        )
        for got, want in zip(
            jax.tree.leaves(jax.jit(split)(*arrays)),
            jax.tree.leaves(jax.jit(grads)(*arrays)),
            strict=True,
        ):
            assert_close(got, want, 1e-5)

        def dropped(query, key, value, rng, case=case):
            rng = jax.random.fold_in(rng, jax.lax.axis_index("data"))
            return case.attend(query, key, value, dropout_rate=0.5, dropout_rng=rng)

        split = jax.shard_map(dropped, mesh=mesh, in_specs=(rows, rows, rows, P()), out_specs=rows)
        assert np.isfinite(jax.jit(split)(query, key, value, jax.random.key(0))).all()


def directional(case, settings, sizes=SMALL):
    """A scalar function of one float64 vector of inputs, a point and two directions."""
    qkv = random_qkv(sizes, dtype=np.float64)
    weights = jnp.asarray(np.random.default_rng(0).standard_normal(sizes.out))

    def loss(qkv):
        return (case.attend(*qkv, **settings()) * weights).sum()

    directions = [random_qkv(sizes, dtype=np.float64, seed=seed) for seed in (1, 2)]
    return loss, qkv, directions


def along(x, direction, step):
    return jax.tree.map(lambda a, b: a + step * b, x, direction)


def inner(x, y):
    return sum(jnp.vdot(a, b) for a, b in zip(x, y, strict=True))


@every_setting
def test_forward_mode_and_second_order_are_derivatives(case, settings, x64):
    loss, x, (u, v) = directional(case, settings)
    if case.name == "blockwise":
        with pytest.raises(TypeError, match="forward-mode"):
            jax.jvp(loss, (x,), (u,))
        return

    @jax.jit
    def everything(x):
        gradient = jax.grad(loss)
        value, slope = jax.jvp(loss, (x,), (u,))
        forward_over_reverse = inner(jax.jvp(gradient, (x,), (u,))[1], v)
        reverse_over_reverse = inner(jax.grad(lambda x: inner(gradient(x), u))(x), v)
        return value, slope, inner(gradient(x), u), forward_over_reverse, reverse_over_reverse

    _, slope, slope_in_reverse, curvature, curvature_in_reverse = everything(x)
    assert_close(slope, slope_in_reverse, 1e-10)
    assert_close(curvature, curvature_in_reverse, 1e-10)
    # Slopes are exact, so the differences need to be small only against the step.
    step = 1e-5
    ahead, behind = everything(along(x, u, step)), everything(along(x, u, -step))
    assert_close(slope, (ahead[0] - behind[0]) / (2 * step), 1e-6)
    ahead, behind = everything(along(x, v, step)), everything(along(x, v, -step))
    assert_close(curvature, (ahead[1] - behind[1]) / (2 * step), 1e-6)


def test_empty_rows_have_no_tangent_and_no_curvature():
    query, key, value = random_qkv()
    mask = masks.query_lengths(jnp.array([3, 0]))
    for case in DOT_PRODUCT:
        if case.name == "blockwise":
            continue  # It has no forward mode, and says so.
        attend = lambda query, case=case: case.attend(query, key, value, mask=mask)
        loss = lambda query, attend=attend: (attend(query) ** 2).sum()

        @jax.jit
        def run(query, attend=attend, loss=loss):
            out, tangent = jax.jvp(attend, (query,), (query,))
            return out, tangent, jax.jvp(jax.grad(loss), (query,), (query,))[1]

        for x in run(query):
            assert np.isfinite(x).all()
            assert not x[1].any()
            assert not x[0, 3:].any()
            assert x[0, :3].any()


def test_numbers_of_jax_are_known_where_a_function_is_traced():
    query, key, value = random_qkv()
    numbers = {name: jnp.float32(0.5) for name in ("scale", "softcap", "dropout_rate")}
    for case in DOT_PRODUCT:
        attend = lambda query, case=case: case.attend(
            query, key, value, **numbers, dropout_rng=jax.random.key(0)
        )
        assert_close(jax.jit(attend)(query), attend(query), 1e-6)
    two = jnp.float32(2)
    with pytest.raises(ValueError, match="dropout_rate"):
        jax.jit(lambda query: case.attend(query, key, value, dropout_rate=two))(query)
    base, fraction = jnp.float32(9), jnp.float32(1)
    turned = jax.jit(lambda x: positions.rotary(x, base=base, fraction=fraction))
    assert_close(turned(query[..., :10]), positions.rotary(query[..., :10], base=9.0), 1e-6)
    layer = MultiHeadAttention(1, dropout_rate=jnp.float32(0.5), deterministic=False)
    rngs = {"params": jax.random.key(0), "dropout": jax.random.key(1)}
    jax.eval_shape(lambda: layer.init(rngs, query[..., 0, :]))


def test_equal_shapes_are_traced_once(max_traces):
    for case in DOT_PRODUCT:
        attend = jax.jit(max_traces(lambda *qkv, case=case: case.attend(*qkv), n=1))
        for seed in range(3):
            attend(*random_qkv(seed=seed))
        chex.clear_trace_counter()


def test_masks_and_biases_are_arguments_of_one_trace(max_traces):
    query, key, value = random_qkv()
    for case in DOT_PRODUCT:

        @jax.jit
        @functools.partial(max_traces, n=1)
        def attend(mask, bias, case=case):
            return case.attend(query, key, value, bias, mask)

        for lengths, slopes in (([3, 2], 0.5), ([7, 0], 0.1)):
            mask = masks.causal(1) & masks.key_lengths(jnp.array(lengths))
            slopes = np.full(6, slopes, np.float32)
            want, _ = oracles.dot_product(
                query,
                key,
                value,
                mask=oracles.causal(5, 7, 1) & oracles.key_lengths(5, 7, np.array(lengths)),
                bias=oracles.alibi(slopes, 5, 7),
            )
            assert_close(attend(mask, biases.alibi(slopes)), want, 2e-6)
        chex.clear_trace_counter()
