"""The implementation that `None` chooses: it supports the request, on every platform."""

import functools

import jax
import jax.numpy as jnp
import pytest

from attention_jax import biases, dot_product_attention, explain, masks
from attention_jax.functional import choice, cudnn

SMALL = jax.ShapeDtypeStruct((2, 16, 4, 32), jnp.float32)
LARGE = jax.ShapeDtypeStruct((2, 512, 4, 32), jnp.float32)
HALF = jax.ShapeDtypeStruct((2, 512, 4, 64), jnp.bfloat16)


@pytest.fixture
def gpu(monkeypatch):
    """Choices as on a GPU of Hopper's kind; programs for it can be lowered here, not run."""
    monkeypatch.setattr(cudnn, "_capability", lambda: 9)
    monkeypatch.setattr(cudnn.jax, "default_backend", lambda: "gpu")


def test_few_logits_are_dense_and_many_go_in_tiles():
    assert explain(SMALL, SMALL, SMALL).implementation == "dense"
    assert explain(LARGE, LARGE, LARGE).implementation == "blockwise"


def test_the_explanation_is_what_happens():
    def names(x):
        """The functions that the program for `x` was made of."""
        attend = functools.partial(dot_product_attention, mask=masks.causal())
        return str(jax.make_jaxpr(attend)(x, x, x))

    assert "name=attend" in names(LARGE)
    assert "name=attend" not in names(SMALL)


def test_costs_are_those_of_the_loops():
    full = explain(LARGE, LARGE, LARGE, implementation="dense")
    assert full.flops == 4 * 2 * 4 * 512 * 512 * 32
    assert full.peak_bytes == 2 * 4 * 2 * 4 * 512 * 512
    tiles = explain(
        LARGE, LARGE, LARGE, mask=masks.causal(), implementation="blockwise", block_size=128
    )
    # Ten of the sixteen tiles lie on the diagonal or below.
    assert tiles.flops == full.flops * 10 // 16
    assert tiles.block_size == (128, 128)
    assert str(tiles).startswith("blockwise in tiles of 128 x 128: ")


@pytest.mark.parametrize("shape", [(0, 5, 2, 4), (2, 0, 2, 4)])
def test_nothing_costs_nothing(shape):
    nothing = jax.ShapeDtypeStruct(shape, jnp.float32)
    assert explain(nothing, nothing, nothing)[2:4] == (0, 0)


def test_what_is_refused_is_not_explained():
    with pytest.raises(ValueError, match="mask"):
        explain(SMALL, SMALL, SMALL, mask=jnp.ones((3, 3), bool))
    with pytest.raises(ValueError, match="bias"):
        explain(SMALL, SMALL, SMALL, bias=jnp.ones((3, 1, 1)))
    with pytest.raises(TypeError, match="key must be an array, got bytes"):
        explain(SMALL, b"key", SMALL)


def test_every_array_may_be_without_content():
    mask = jax.ShapeDtypeStruct((512, 512), bool)
    bias, sinks = (jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((4, 1, 512), (4,)))
    chosen = explain(LARGE, LARGE, LARGE, bias, mask, sinks=sinks)
    assert chosen == explain(LARGE, LARGE, LARGE, jnp.ones((4, 1, 512)), jnp.ones((512, 512), bool))
    with pytest.raises(ValueError, match="mask"):
        explain(SMALL, SMALL, SMALL, mask=mask)


@pytest.mark.parametrize("mask", [masks.causal(), masks.window(100)], ids=["causal", "window"])
def test_lengths_cost_no_more_than_what_they_leave(mask):
    x = jax.ShapeDtypeStruct((2, 4096, 4, 32), jnp.float32)

    def flops(n):
        return explain(x, x, x, mask=mask & masks.key_lengths(jnp.array([n, n]))).flops

    plain = explain(x, x, x, mask=mask).flops
    assert plain <= flops(4096) <= 1.2 * plain < explain(x, x, x).flops
    assert flops(1024) < 0.6 * plain


def test_what_is_asked_for_is_taken_or_refused():
    assert explain(SMALL, SMALL, SMALL, implementation="blockwise").implementation == "blockwise"
    with pytest.raises(NotImplementedError, match="NVIDIA GPU"):
        explain(HALF, HALF, HALF, implementation="cudnn")


@pytest.mark.parametrize("mask", [None, masks.causal(), masks.window(7), masks.causal("end")])
def test_the_fused_kernel_is_taken_where_it_can_serve(gpu, mask):
    assert explain(HALF, HALF, HALF, mask=mask).implementation == "cudnn"


REFUSED = {
    "float32": ((LARGE, LARGE, LARGE), {}, "float32"),
    "two types": ((HALF, HALF, HALF.update(dtype=jnp.float16)), {}, "bfloat16 and float16"),
    "head size": ((HALF.update(shape=(2, 512, 4, 60)),) * 3, {}, "H=60"),
    "window ahead": ((HALF,) * 3, {"mask": masks.window(7, 7)}, "of masks"),
    "lengths": ((HALF,) * 3, {"mask": masks.key_lengths(jnp.array([3, 4]))}, "of masks"),
    "T and S": ((HALF.update(shape=(2, 64, 4, 64)), HALF, HALF), {"mask": masks.causal()}, "T = S"),
    "bias": ((HALF,) * 3, {"bias": biases.alibi(4)}, "no bias"),
    "softcap": ((HALF,) * 3, {"softcap": 5.0}, "softcap"),
    "sinks": ((HALF,) * 3, {"sinks": jnp.ones(4)}, "sinks"),
    "dropout": ((HALF,) * 3, {"dropout_rate": 0.1, "dropout_rng": jax.random.key(0)}, "dropout"),
    "residual": ((HALF,) * 3, {"return_residual": True}, "logsumexp"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_the_fused_kernel_is_not_asked_for_what_it_would_get_wrong(gpu, name):
    arrays, settings, reason = REFUSED[name]
    chosen = explain(*arrays, **settings)
    assert chosen.implementation == "blockwise"
    assert reason in chosen.reason
    with pytest.raises(NotImplementedError, match=f"cudnn.*{reason}.*blockwise") as error:
        explain(*arrays, **settings, implementation="cudnn")
    assert "\n" not in str(error.value)


def test_dense_is_taken_as_long_as_it_is_small(monkeypatch):
    monkeypatch.setattr(choice, "_CROSSOVER", 2 * 4 * 512 * 512 + 1)
    assert explain(LARGE, LARGE, LARGE).implementation == "dense"
