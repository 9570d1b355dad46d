"""Products of kernels with operands in bfloat16: right in every context, asked for by a word."""

import functools
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from attention_jax import MLP, MultiHeadAttention, bfloat16_dot_general
from attention_jax.functional import xla_cpu
from attention_jax.training import build
from attention_jax.training.config import ConfigError, default_config
from attention_jax.training.model import make_sequence_model

processor_multiplies_bfloat16 = xla_cpu.multiplies_bfloat16
B, T, D, F = 4, 64, 64, 96  # Large enough for XLA's products of bfloat16.


@pytest.fixture(autouse=True)
def _one_device(monkeypatch):
    monkeypatch.setattr(xla_cpu, "_MULTIPLICATIONS", 1)
    monkeypatch.setattr(jax, "device_count", lambda: 1)  # Several compute in float32.


@pytest.fixture
def _all_rewriting():
    """All that XLA does to a program of a user."""
    disabled = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", False)
    yield
    jax.config.update("jax_disable_most_optimizations", disabled)


def normal(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


def product(x, kernel, of=bfloat16_dot_general):
    return of(x, kernel, (((x.ndim - 1,), (0,)), ((), ())), precision=None)


def rounded(x):
    return np.asarray(x.astype(jnp.bfloat16), np.float64)


def assert_near(got, want):
    np.testing.assert_allclose(got, want, rtol=0, atol=2e-6 * max(1, np.abs(want).max()))


@pytest.mark.parametrize("features", [D // 2, F], ids=["narrower", "wider"])
@pytest.mark.parametrize("has_instructions", [True, False])
def test_operands_are_rounded_and_sums_are_not(features, has_instructions, bfloat16_instructions):
    bfloat16_instructions(has_instructions)
    x, kernel = normal(B, T, D), normal(D, features, seed=1)
    cotangent = normal(B, T, features, seed=2)
    out, pull_back = jax.vjp(product, x, kernel)
    d_x, d_kernel = jax.jit(pull_back)(cotangent)
    assert {y.dtype for y in (out, d_x, d_kernel)} == {jnp.dtype("float32")}
    x, kernel, cotangent = map(rounded, (x, kernel, cotangent))
    assert_near(out, x @ kernel)
    assert_near(d_x, cotangent @ kernel.T)
    assert_near(d_kernel, np.einsum("btd,btf->df", x, cotangent))


def test_the_processor_without_instructions_multiplies_in_float32(bfloat16_instructions):
    x, kernel = normal(B, T, D), normal(D, F, seed=1)
    for has_instructions, operand in ((True, "bf16"), (False, "f32")):
        bfloat16_instructions(has_instructions)
        text = jax.jit(lambda x, kernel: product(x, kernel)).lower(x, kernel).as_text()
        products = [line for line in text.splitlines() if "stablehlo.dot_general" in line]
        assert [f"x{operand}>" in line.partition(":")[2] for line in products] == [True]


@pytest.mark.parametrize(
    ("words", "has_instructions"),
    [
        ("flags : fma avx2", False),
        ("flags : avx2 avx512_bf16 avx512vl", True),
        ("Features : asimd bf16 i8mm", True),
        (None, False),
    ],
)
def test_instructions_are_those_that_the_system_lists(words, has_instructions, monkeypatch):
    def read_text(path):
        if words is None:
            raise FileNotFoundError(path)
        return words

    monkeypatch.setattr(Path, "read_text", read_text)
    assert processor_multiplies_bfloat16.__wrapped__() is has_instructions


def test_kernels_may_have_any_axes():
    layer = functools.partial(nn.DenseGeneral, dot_general=bfloat16_dot_general, use_bias=False)
    x = normal(B, T, 4, 16)
    for dense, inputs in ((layer((6, 16)), normal(B, T, D)), (layer(F, axis=(-2, -1)), x)):
        found, variables = dense.init_with_output(jax.random.key(0), inputs)
        kernel = variables["params"]["kernel"]
        axes = len(dense.axis) if isinstance(dense.axis, tuple) else 1
        assert_near(found, np.tensordot(rounded(inputs), rounded(kernel), axes))


# What stands around a product, where XLA might rewrite it.
CONTEXTS = {
    "x turned": lambda x, w, of: product(jnp.swapaxes(x, 0, 1), w, of),
    "x turned flat": lambda x, w, of: product(x.reshape(D, -1).T.reshape(x.shape), w, of),
    "kernel turned": lambda x, w, of: product(x, w.reshape(F, D).T, of),
    "result turned": lambda x, w, of: product(x, w, of).reshape(-1, F).T @ jnp.ones((B * T, 4)),
    "tied": lambda x, w, of: product(jnp.tanh(product(x, w, of)), w.T, of),
    "ones": lambda x, w, of: product(jnp.ones_like(x), w, of) + x.sum(),
    "scan": lambda x, w, of: jax.lax.scan(
        lambda x, _: (jax.checkpoint(lambda x: product(product(x, w, of), w.T, of))(x), None),
        x,
        length=2,
    )[0],
}


@pytest.mark.usefixtures("_all_rewriting")
@pytest.mark.parametrize("context", CONTEXTS)
def test_values_and_gradients_do_not_depend_on_what_stands_around(context):
    x, w = normal(B, T, D), 0.05 * normal(D, F, seed=1)

    def found(of):
        loss = lambda x, w: jnp.sin(CONTEXTS[context](x, w, of)).sum()
        return jax.jit(jax.value_and_grad(loss, (0, 1)))(x, w)

    both = (jax.tree.leaves(found(of)) for of in (bfloat16_dot_general, exact))
    for got, want in zip(*both, strict=True):
        scale = np.abs(want).max()
        np.testing.assert_allclose(got, want, rtol=0, atol=0.05 * scale)
        assert np.any(np.asarray(got) != np.asarray(want))  # It was rounded.


def exact(x, kernel, dimension_numbers, precision=None):
    return jax.lax.dot_general(x, kernel, dimension_numbers, "highest")


@pytest.mark.usefixtures("_all_rewriting")
@pytest.mark.parametrize("axes", [(0, None), (None, 0), (0, 0), (2, 1)])
def test_vmap_is_a_loop(axes):
    x, w = normal(B, T, D), normal(D, F, seed=1)
    xs, ws = (
        y if axis is None else jnp.stack([y, 2 * y + 1], axis)
        for y, axis in zip((x, w), axes, strict=True)
    )
    grads = jax.grad(lambda x, w: jnp.sin(product(x, w)).sum(), (0, 1))
    got = jax.jit(jax.vmap(grads, axes))(xs, ws)
    for i in range(2):
        of = lambda y, axis, i=i: y if axis is None else jnp.take(y, i, axis)
        alone = jax.jit(grads)(of(xs, axes[0]), of(ws, axes[1]))
        for y, want in zip(got, alone, strict=True):
            # A cotangent may round to the neighbouring number.
            np.testing.assert_allclose(y[i], want, rtol=0, atol=0.01 * np.abs(want).max())


def test_second_derivatives_are_those_of_float32():
    x, w = 0.1 * normal(2, 8, D), 0.1 * normal(D, F, seed=1)

    def found(of):
        slope = jax.grad(lambda x, w: (product(x, w, of) ** 3).sum())
        return jax.jit(jax.grad(lambda w: (slope(x, w) ** 2).sum()))(w)

    want = found(exact)
    np.testing.assert_allclose(found(bfloat16_dot_general), want, atol=0.05 * np.abs(want).max())


def test_nan_and_infinity_stay_in_their_rows():
    x = normal(B, T, D).at[0, 0, 0].set(jnp.nan).at[1, 2, 3].set(jnp.inf)
    out = np.array(product(x, jnp.abs(normal(D, F, seed=1))))
    assert np.isnan(out[0, 0]).all()
    assert np.isinf(out[1, 2]).all()
    out[[0, 1], [0, 2]] = 0
    assert np.isfinite(out).all()


@pytest.mark.usefixtures("_all_rewriting")
def test_other_types_and_narrow_kernels_are_those_of_lax():
    with jax.enable_x64(True):
        for dtype in (jnp.float64, jnp.bfloat16):
            x, w = normal(B, T, D).astype(dtype), normal(D, F, seed=1).astype(dtype)
            np.testing.assert_array_equal(product(x, w), product(x, w, jax.lax.dot_general))
    x, w = normal(64, 1024, D), normal(D, 1)  # XLA fails for one column of bfloat16.
    grads = jax.grad(lambda x, w: product(x, w).sum(), (0, 1))
    assert np.isfinite(jax.jit(grads)(x, w)[1]).all()


@pytest.mark.usefixtures("_all_rewriting")
def test_a_training_step_has_no_other_products_of_kernels():
    if set(types_of_products(product, normal(B, T, D), normal(D, F))) != {"bf16"}:
        pytest.skip("XLA has no products of bfloat16 for this processor")
    layers = (
        MultiHeadAttention(2, dot_general=bfloat16_dot_general),
        MLP(128, dot_general=bfloat16_dot_general),
    )
    x = normal(B, T, D)

    def loss(params, x):
        for layer, variables in zip(layers, params, strict=True):
            x = layer.apply(variables, x)
        return jnp.sin(x).sum()

    params = [layer.init(jax.random.key(0), x) for layer in layers]
    types = types_of_products(jax.grad(loss), params, x)
    assert types == ["bf16"] * 2 * (3 * 6 - 3)  # The first layer's input needs no gradient.


def types_of_products(function, *arguments):
    """The types of the operands of a compiled program's products, but for batches of them."""
    text = jax.jit(function).lower(*arguments).compile().as_text()
    types = dict(re.findall(r"%?([\w.\-]+)(?: =|:) (\w+)\[", text))
    products = re.findall(r" dot\(%([\w.\-]+), %([\w.\-]+)\)(?!, lhs_batch)", text)
    return [types[name] for pair in products for name in pair]


def test_what_asks_for_more_gets_it():
    x, w = normal(B, T, D), normal(D, F, seed=1)
    numbers = (((2,), (0,)), ((), ()))
    for options in ({"precision": "highest"}, {"preferred_element_type": jnp.bfloat16}):
        want = jax.lax.dot_general(x.reshape(-1, D), w, (((1,), (0,)), ((), ())), **options)
        got = bfloat16_dot_general(x, w, numbers, **options)
        assert got.dtype == want.dtype
        np.testing.assert_array_equal(got.reshape(-1, F), want)
    with pytest.raises(TypeError, match="contracting"):
        bfloat16_dot_general(normal(B, T, 6, 4), normal(4, 6, F), (((2, 3), (0, 1)), ((), ())))


@pytest.mark.parametrize("kind", ["Auto", "Explicit"])
def test_what_a_compiler_may_split_is_float32(kind):
    x, w = normal(B, T, D), normal(D, F, seed=1)
    types = (getattr(jax.sharding.AxisType, kind),)
    want = gradients_by(exact)(x, w)
    with jax.set_mesh(jax.make_mesh((1,), ("d",), axis_types=types)):
        x, w = (jax.device_put(y, spec) for y, spec in zip((x, w), SPECS, strict=True))
        for y, wanted in zip(jax.jit(gradients_by())(x, w), want, strict=True):
            np.testing.assert_allclose(y, wanted, rtol=0, atol=1e-5 * np.abs(wanted).max())


SPECS = jax.P("d"), jax.P()


def gradients_by(of=bfloat16_dot_general):
    return jax.grad(lambda x, w: jnp.sin(product(x, w, of)).sum(), (0, 1))


@pytest.mark.parametrize("check_vma", [True, False])
def test_each_device_of_a_shard_map_rounds(check_vma, monkeypatch):
    x, w = normal(B, T, D), normal(D, F, seed=1)
    halves = [gradients_by()(half, w) for half in (x[: B // 2], x[B // 2 :])]
    (x_1, w_1), (x_2, w_2) = halves
    monkeypatch.undo()  # jax sees all devices.
    monkeypatch.setattr(xla_cpu, "_MULTIPLICATIONS", 1)

    def gradients(x, w):
        d_x, d_w = gradients_by()(x, w)
        return d_x, d_w if check_vma else jax.lax.psum(d_w, "d")

    auto = (jax.sharding.AxisType.Auto,)
    mesh = jax.make_mesh((2,), ("d",), axis_types=auto, devices=jax.devices()[:2])
    each = jax.shard_map(gradients, mesh=mesh, in_specs=SPECS, out_specs=SPECS, check_vma=check_vma)
    d_x, d_w = jax.jit(each)(x, w)
    # Sums of another order may round to the neighbouring number before they are multiplied.
    np.testing.assert_allclose(d_x, np.concatenate([x_1, x_2]), rtol=0, atol=2e-3)
    np.testing.assert_allclose(d_w, w_1 + w_2, rtol=0, atol=2e-3)
    far = np.abs(np.asarray(gradients_by(exact)(x, w)[0]) - d_x).max()
    assert far > 5e-3  # It was rounded.


def test_a_run_that_a_compiler_may_split_is_refused(monkeypatch):
    config = default_config("copy")
    config.model.matmul_precision = "bfloat16"
    config.launcher = "sharded"
    with pytest.raises(ConfigError, match=r"launcher=pmap, and for single with one.*got sharded"):
        build.build(config)
    config.launcher = "single"
    monkeypatch.setattr(jax, "device_count", lambda: 2)
    with pytest.raises(ConfigError, match="got single and 2 devices"):
        build.build(config)


def test_the_word_reaches_all_layers_of_blocks():
    options = dict(vocab_size=5, features=16, num_heads=2, mlp_ratio=2.0)
    model = make_sequence_model(**options, matmul_precision="bfloat16")
    layers = [layer for block in model.blocks for layer in (block.attention, block.mlp)]
    assert {layer.dot_general for layer in layers} == {bfloat16_dot_general}
    assert make_sequence_model(**options).blocks[0].mlp.dot_general is xla_cpu.kernel_product
    with pytest.raises(ValueError, match=r"matmul_precision='bfloat16' is for dtype=float32"):
        make_sequence_model(**options, matmul_precision="bfloat16", dtype=jnp.float16)


def test_a_run_learns_as_in_float32():
    losses = []
    for word, launcher in (("float32", "single"), ("bfloat16", "single"), ("bfloat16", "pmap")):
        config = default_config("copy")
        config.model.matmul_precision, config.launcher = word, launcher
        config.train.update(batch_size=16, steps_per_epoch=30)
        program = build.build(config)
        state = program.put_state(program.init())
        losses.append(np.asarray(program.epoch(state, program.rows)[1]["loss"]))
    assert losses[0][-1] < losses[0][0] - 0.3
    for rounded_losses in losses[1:]:
        assert np.abs(losses[0] - rounded_losses).max() > 1e-5  # More than another order of sums.
        np.testing.assert_allclose(rounded_losses, losses[0], atol=0.02)


def test_a_layer_of_ones_own_without_the_field_is_refused(tmp_path, monkeypatch):
    (tmp_path / "own_layer.py").write_text(
        "from flax import linen as nn\n"
        "class Layer(nn.Module):\n"
        "    num_heads: int = 1\n"
        "    def __call__(self, x, **options):\n"
        "        return x\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    config = default_config("copy")
    config.model.mechanism = "own_layer:Layer"
    config.model.positions = "learned"
    config.model.matmul_precision = "bfloat16"
    with pytest.raises(ConfigError, match="has no dot_general"):
        build.build(config)
