"""Statistics in linear memory are those of the weights."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import assert_close

from attention_jax import attention_weights, biases, masks
from attention_jax.functional.statistics import attention_statistics

rng = np.random.default_rng(0)
T = 37
QUERY = jnp.asarray(2 * rng.standard_normal((2, T, 4, 8)), jnp.float32)
KEY = jnp.asarray(rng.standard_normal((2, T, 2, 8)), jnp.float32)
SINKS = jnp.array([0.5, -1.0, 2.0, 0.0])
LENGTHS = masks.key_lengths(jnp.array([T, 20]))
CASES = {
    "full": {},
    "causal": {"mask": masks.causal()},
    "window": {"mask": masks.window(5), "scale": 0.7},
    "both sides": {"mask": masks.window(5, 3)},
    "sinks": {"mask": masks.causal() & LENGTHS, "sinks": SINKS},
    "sinks, full": {"sinks": SINKS},
    "empty rows": {"mask": masks.causal(-2) & LENGTHS, "sinks": SINKS},
    "empty rows without sinks": {"mask": masks.causal(-2)},
    "peaks that overflow": {"scale": 3.0, "mask": masks.window(5, 3)},
    "alibi": {"bias": biases.alibi(4), "mask": masks.causal()},
    "softcap": {"softcap": 1.5, "sinks": SINKS},
    "blocks": {"mask": masks.causal() & LENGTHS, "block_size": 8},
    "segments": {"mask": masks.segments(jnp.arange(T) // 7) & masks.causal()},
}


def by_hand(query, key, *, sinks=None, block_size=None, **settings):
    """From the array of weights, in float64."""
    weights = np.asarray(attention_weights(query, key, sinks=sinks, **settings), np.float64)
    weights = np.swapaxes(weights, -3, -2)  # [..., T, N, S]
    t, s = np.arange(weights.shape[-3])[:, None, None], np.arange(weights.shape[-1])
    log = np.log(np.where(weights > 0, weights, 1))
    sink = np.maximum(0, 1 - weights.sum(-1)) if sinks is not None else 0 * weights.sum(-1)
    sink_log = np.log(np.where(sink > 1e-9, sink, 1))
    pick = lambda place: (weights * (s == place)).sum(-1)
    return {
        "entropy": -(weights * log).sum(-1) - sink * sink_log,
        "largest": weights.max(-1),
        "distance": (weights * abs(t - s)).sum(-1),
        "to_self": pick(t),
        "to_previous": pick(t - 1),
        "to_first": pick(0),
        "sink": sink,
    }


@pytest.mark.parametrize("settings", CASES.values(), ids=CASES)
def test_they_are_those_of_the_weights(settings):
    found = jax.jit(lambda q, k: attention_statistics(q, k, **settings))(QUERY, KEY)
    is_large = settings.get("scale", 1) > 1  # Logits of 80, whose last place is 8e-6.
    for name, want in by_hand(QUERY, KEY, **settings).items():
        assert_close(getattr(found, name), want, 2e-5 if name == "distance" or is_large else 1e-5)
    mask = settings.get("mask")
    seen = np.ones((T, T), bool) if mask is None else mask.materialize(T, T)
    counts = np.broadcast_to(seen, (2, 4, T, T)).sum(-1)
    np.testing.assert_array_equal(found.visible, np.swapaxes(counts, -1, -2))


@pytest.mark.parametrize(
    ("mask", "scale"),
    [(masks.causal(), 0.5), (masks.causal(), 6.0), (None, 0.5)],
    ids=["causal", "large logits", "full"],
)
def test_triangles_of_tiles_agree_with_blocks_of_logits(mask, scale):
    query, key = jax.random.normal(jax.random.key(0), (2, 1, 2304, 1, 8))
    run = functools.partial(attention_statistics, mask=mask, scale=scale)
    tiles = jax.jit(run)(query, key)
    blocks = jax.jit(functools.partial(run, block_size=256))(query, key)
    for name, got, want in zip(tiles._fields, tiles, blocks, strict=True):
        assert_close(got, want, 1e-5, name)


@pytest.mark.parametrize("name", ["causal", "both sides", "sinks", "empty rows", "alibi"])
def test_gradients_are_those_of_the_weights(name):
    settings = dict(CASES[name])

    def ours(query, key):
        found = attention_statistics(query, key, **settings)
        return found.entropy.sum() + 0.3 * found.distance.sum() + (found.to_first**2).sum()

    def theirs(query, key):
        options = {x: value for x, value in settings.items() if x != "block_size"}
        weights = jnp.swapaxes(attention_weights(query, key, **options), -3, -2)
        rest = jnp.where(weights.sum(-1) > 0, 1 - weights.sum(-1), 0)
        if "sinks" in settings:
            rest = 1 - weights.sum(-1)
        safe = lambda x: jnp.where(x > 1e-6, x * jnp.log(jnp.where(x > 1e-6, x, 1)), 0)
        entropy = -safe(weights).sum() - (safe(rest).sum() if "sinks" in settings else 0)
        apart = abs(jnp.arange(T)[:, None, None] - jnp.arange(T))
        return entropy + 0.3 * (weights * apart).sum() + (weights[..., 0] ** 2).sum()

    got, want = (jax.jit(jax.grad(f, argnums=(0, 1)))(QUERY, KEY) for f in (ours, theirs))
    for a, b in zip(got, want, strict=True):
        assert_close(a, b, 2e-4)


def test_what_is_masked_may_hold_anything():
    mask = masks.key_lengths(jnp.array([20, 20])) & masks.causal()
    spoilt = KEY.at[:, 20:].set(jnp.nan)
    want, got = (attention_statistics(QUERY, key, mask=mask) for key in (KEY, spoilt))
    for a, b in zip(got, want, strict=True):
        np.testing.assert_array_equal(a, b)


def test_a_uniform_head_has_the_entropy_of_its_keys():
    found = attention_statistics(0 * QUERY, KEY, mask=masks.causal())
    assert_close(found.entropy[0, :, 0], np.log(np.arange(1, T + 1)), 1e-6)
    assert_close(found.largest[0, :, 0], 1 / np.arange(1, T + 1), 1e-6)
    assert_close(found.distance[0, :, 0], np.arange(T) / 2, 1e-4)


def test_no_queries_and_no_keys_have_none():
    assert attention_statistics(QUERY[:, :0], KEY).entropy.shape == (2, 0, 4)
    assert not attention_statistics(QUERY, KEY[:, :0]).entropy.any()


def test_memory_is_linear_in_the_sequence():
    def needed(length, **settings):
        x = jax.ShapeDtypeStruct((1, length, 1, 16), jnp.float32)
        run = jax.jit(functools.partial(attention_statistics, mask=masks.causal(), **settings))
        return run.lower(x, x).compile().memory_analysis().temp_size_in_bytes

    assert needed(16384) < 2.5 * needed(8192)
    assert needed(16384) < 16384**2
    assert needed(16384, softcap=2.0) < 16384**2


@pytest.mark.parametrize(
    ("settings", "error", "words"),
    [
        ({"mask": jnp.ones((3, 3), bool)}, ValueError, "mask"),
        ({"bias": jnp.ones((3, T))}, ValueError, "bias"),
        ({"sinks": jnp.ones(3)}, ValueError, "sinks"),
        ({"block_size": 0}, ValueError, "block_size"),
        ({"softcap": -1.0}, ValueError, "softcap"),
        ({"is_causal": True}, TypeError, "is_causal"),
    ],
)
def test_what_does_not_fit_is_refused(settings, error, words):
    with pytest.raises(error, match=words):
        attention_statistics(QUERY, KEY, **settings)
