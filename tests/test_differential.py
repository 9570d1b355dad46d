"""Differential attention: the paper's equation, and what its parts promise."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from cases import Sizes, assert_close, random_qkv

from attention_jax import biases, differential_attention, dot_product_attention, masks

SIZES = Sizes(H=10)
LAMBDAS = np.linspace(-0.5, 0.9, SIZES.N)


@pytest.mark.parametrize(
    ("settings", "oracle"),
    [
        ({"implementation": "blockwise", "lambda_full": 0.3}, {"lambda_full": 0.3}),
        (
            {"mask": masks.window(2), "bias": biases.alibi(6), "lambda_full": LAMBDAS},
            {
                "mask": oracles.window(5, 7, 2),
                "bias": oracles.alibi(oracles.alibi_slopes(6), 5, 7),
                "lambda_full": LAMBDAS,
            },
        ),
        (
            {"scale": 0.7, "softcap": 1.5, "sinks": jnp.arange(6.0)},
            {"scale": 0.7, "softcap": 1.5, "sinks": np.arange(6.0)},
        ),
    ],
    ids=["blockwise", "mask, bias, lambdas", "scale, softcap, sinks"],
)
def test_it_is_the_difference_of_two_attentions(settings, oracle):
    qkv = random_qkv(SIZES)
    out = jax.jit(lambda *qkv: differential_attention(*qkv, **settings))(*qkv)
    assert_close(out, oracles.differential(*qkv, **oracle), 4e-6)
    query, key, value = qkv
    shown = {name: x for name, x in settings.items() if name != "implementation"}
    weights = jax.jit(lambda *qk: differential_attention.weights(*qk, **shown))(query, key)
    values = np.repeat(value, SIZES.N // SIZES.K, axis=-2)
    assert_close(np.einsum("...nts,...snv->...tnv", weights, values), out, 4e-6)


def test_what_both_maps_agree_on_cancels():
    query, key, value = random_qkv(Sizes(H=5))
    twice = lambda x: jnp.concatenate([x, x], axis=-1)
    attend = jax.jit(differential_attention)
    assert not attend(twice(query), twice(key), value, lambda_full=1.0).any()
    # And a lambda of 0 leaves the first map alone.
    alone = attend(twice(query), twice(key), value, lambda_full=0.0)
    assert_close(alone, dot_product_attention(query, key, value), 1e-6)


def test_rows_sum_to_one_minus_lambda_and_empty_rows_are_zero():
    query, key, value = random_qkv(SIZES)
    mask = np.ones((5, 7), bool)
    mask[2] = False
    out = differential_attention(query, key, jnp.ones_like(value), mask=mask, lambda_full=0.3)
    assert not out[:, 2].any()
    assert_close(np.delete(out, 2, axis=1), np.full((2, 4, 6, 13), 0.7), 1e-6)


def test_dropout_drops_weights_of_the_difference():
    query, key, _ = random_qkv(Sizes(batch=(), N=1, K=1, H=10))
    value = jnp.eye(7)[:, None, :]  # The output is the row of weights.

    @jax.jit
    def attend(rng):
        run = functools.partial(differential_attention, query, key, value)
        return run(), run(dropout_rate=0.5, dropout_rng=rng)

    weights, dropped = attend(jax.random.key(0))
    kept = dropped != 0
    assert 5 < kept.sum() < 30
    assert_close(dropped, np.where(kept, 2 * weights, 0), 1e-5)


@pytest.mark.parametrize(
    ("change", "word"),
    [
        (lambda: {"query": jnp.ones((2, 5, 6, 9)), "key": jnp.ones((2, 7, 3, 9))}, "even.*9"),
        (lambda: {"lambda_full": jnp.ones(3)}, r"lambda_full.*\(3,\)"),
        (lambda: {"softcap": -1.0}, "softcap"),
    ],
)
def test_what_cannot_be_is_refused(change, word):
    inputs = dict(zip(("query", "key", "value"), random_qkv(SIZES), strict=True))
    with pytest.raises(ValueError, match=word):
        differential_attention(**{**inputs, **change()})
