"""An exported program with a batch or a length left open gives the numbers of the plain call."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import Sizes, random_qkv
from jax import export

from attention_jax import (
    MultiHeadAttention,
    biases,
    differential_attention,
    dot_product_attention,
    gated_delta_attention,
    linear_attention,
    masks,
)

ATTEND = {
    "chosen": dot_product_attention,
    "dense": functools.partial(dot_product_attention, implementation="dense"),
    "blockwise": functools.partial(dot_product_attention, implementation="blockwise"),
}
SETTINGS = {
    "full": {},
    "causal from the end": dict(mask=masks.causal(offset="end")),
    "window and a bias": dict(mask=masks.window(2, 1), bias=biases.alibi(4), softcap=2.0),
    "sinks": dict(sinks=jnp.arange(4.0), mask=~masks.strided(2)),
}


def exported(run, arrays, *specs):
    """`run`, exported for the symbolic shapes that `specs` name."""
    scope = export.SymbolicScope()
    shapes = [
        jax.ShapeDtypeStruct(export.symbolic_shape(spec, scope=scope), x.dtype)
        for spec, x in zip(specs, arrays, strict=True)
    ]
    return export.export(jax.jit(run))(*shapes).call


def with_gradients(attend):
    def run(*arrays):
        out, pull_back = jax.vjp(attend, *arrays)
        return out, pull_back(out)

    return run


def assert_equal(found, wanted):
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
@pytest.mark.parametrize("attend", ATTEND.values(), ids=ATTEND)
def test_lengths_left_open(attend, settings):
    run = functools.partial(attend, **settings)
    arrays = random_qkv(Sizes(batch=(2,), T=5, S=7, N=4, K=2, H=8, V=3))
    call = exported(run, arrays, "2, t, 4, 8", "2, s, 2, 8", "2, s, 2, 3")
    for T, S in ((5, 7), (9, 4)):
        arrays = random_qkv(Sizes(batch=(2,), T=T, S=S, N=4, K=2, H=8, V=3))
        assert_equal(call(*arrays), run(*arrays))


@pytest.mark.parametrize("attend", ATTEND.values(), ids=ATTEND)
def test_everything_left_open_with_gradients(attend):
    run = with_gradients(functools.partial(attend, mask=masks.causal()))
    arrays = random_qkv(Sizes(batch=(3,), T=6, S=6, N=4, K=2, H=8, V=8))
    call = exported(run, arrays, "b, t, 4, 8", "b, t, 2, 8", "b, t, 2, 8")
    assert_equal(call(*arrays), run(*arrays))


def test_a_batch_left_open_takes_tiles_where_rows_are_long():
    run = functools.partial(dot_product_attention, mask=masks.causal())
    arrays = random_qkv(Sizes(batch=(2,), T=512, S=512, N=1, K=1, H=8, V=8))
    call = exported(run, arrays, *["b, 512, 1, 8"] * 3)
    assert_equal(call(*arrays), run(*arrays))


def test_numbers_given_to_the_program():
    """Lengths per row, a mask and a bias, whose own axes are open too."""

    def run(query, lengths, bias):
        mask = masks.causal() & masks.key_lengths(lengths)
        return dot_product_attention(
            query, query, query, bias, mask, implementation="blockwise", return_residual=True
        )

    rng = np.random.default_rng(0)
    query = jnp.asarray(rng.standard_normal((3, 6, 2, 4)), jnp.float32)
    bias = jnp.asarray(rng.standard_normal((2, 6, 6)), jnp.float32)
    arrays = query, jnp.array([2, 6, 4]), bias
    assert_equal(exported(run, arrays, "b, t, 2, 4", "b", "2, t, t")(*arrays), run(*arrays))


@pytest.mark.parametrize(
    "attend",
    [
        linear_attention,
        functools.partial(linear_attention, mask=masks.causal()),
        functools.partial(differential_attention, mask=masks.causal()),
        gated_delta_attention,
    ],
    ids=["linear", "linear causal", "differential", "gated_delta"],
)
def test_a_batch_left_open_for_every_mechanism(attend):
    arrays = random_qkv(Sizes(batch=(3,), T=6, S=6, N=4, K=2, H=8, V=8))
    call = exported(attend, arrays, "b, 6, 4, 8", "b, 6, 2, 8", "b, 6, 2, 8")
    assert_equal(call(*arrays), attend(*arrays))


@pytest.mark.parametrize(
    "attend",
    [functools.partial(linear_attention, mask=masks.causal()), gated_delta_attention],
    ids=["linear causal", "gated_delta"],
)
def test_a_length_left_open_for_what_works_in_chunks(attend):
    draw = lambda T: random_qkv(Sizes(batch=(3,), T=T, S=T, N=4, K=2, H=8, V=8))
    call = exported(attend, draw(6), "b, t, 4, 8", "b, t, 2, 8", "b, t, 2, 8")
    for T in (1, 70):
        assert_equal(call(*draw(T)), jax.jit(attend)(*draw(T)))


def test_a_layer_with_batch_and_length_left_open():
    layer = MultiHeadAttention(4, 2, rotary=True)
    inputs = jnp.asarray(np.random.default_rng(0).standard_normal((3, 6, 16)), jnp.float32)
    params = layer.init(jax.random.key(0), inputs)
    run = functools.partial(layer.apply, params, mask=masks.causal())
    assert_equal(exported(run, [inputs], "b, t, 16")(inputs), run(inputs))
