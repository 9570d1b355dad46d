"""Generated tokens are those that the model without a cache would choose."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from attention_jax import (
    Block,
    LearnedPositions,
    MultiHeadAttention,
    SequenceModel,
    SingleHeadAttention,
    TokenEmbedding,
    generate,
    generation,
    masks,
)

VOCABULARY, LENGTH = 11, 12
sharp = functools.partial(TokenEmbedding, embedding_init=nn.initializers.normal(1.0))


@pytest.fixture(scope="module")
def model():
    blocks = [Block(MultiHeadAttention(2, rotary=True)) for _ in range(2)]
    return SequenceModel(sharp(VOCABULARY, 8), blocks, mask=masks.causal(), reach=masks.window(5))


@pytest.fixture(scope="module")
def params(model):
    return jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 3), int))["params"]


@pytest.fixture(scope="module")
def tokens():
    return np.random.default_rng(0).integers(0, VOCABULARY, (3, 4))


@pytest.fixture(scope="module")
def logits(model, params):
    """The logits of the last token of rows of any length, by a model without a cache."""
    apply = jax.jit(functools.partial(model.apply, {"params": params}))

    def last(tokens):
        padded = np.zeros((*tokens.shape[:-1], LENGTH), int)  # One shape compiles once.
        padded[..., : tokens.shape[-1]] = tokens
        return np.asarray(apply(padded))[..., tokens.shape[-1] - 1, :]

    return last


def test_the_likeliest_token_is_taken_each_time(model, params, tokens, logits):
    found = generate(model, params, tokens, 8, temperature=0)
    assert found.shape == (3, 8)
    assert found.dtype == jnp.int32
    row = tokens
    for i in range(8):
        row = np.concatenate([row, logits(row).argmax(-1)[..., None]], axis=-1)
        np.testing.assert_array_equal(found[:, i], row[:, -1])


def test_one_row_and_lists_are_taken(model, params, tokens):
    found = generate(model, params, tokens[0].tolist(), 8, temperature=0)
    np.testing.assert_array_equal(found, generate(model, params, tokens, 8, temperature=0)[0])


def test_draws_follow_the_probabilities(model, params, tokens, logits):
    rows, temperature = np.tile(tokens[:1], (4000, 1)), 2.0
    drawn = generate(model, params, rows, 1, temperature=temperature, rng=jax.random.key(0))
    shares = np.bincount(np.asarray(drawn)[:, 0], minlength=VOCABULARY) / 4000
    want = np.exp(logits(tokens[:1])[0] / temperature)
    # Five standard deviations of a share.
    np.testing.assert_allclose(shares, want / want.sum(), atol=5 * (0.25 / 4000) ** 0.5)


@pytest.mark.parametrize(
    ("settings", "kept"),
    [
        ({"top_k": 1}, lambda p: np.argsort(-p)[:1]),
        ({"top_k": 3}, lambda p: np.argsort(-p)[:3]),
        ({"top_p": 1e-6}, lambda p: np.argsort(-p)[:1]),
        (
            {"top_p": 0.7},
            lambda p: np.argsort(-p)[: 1 + int((np.cumsum(np.sort(p)[::-1]) < 0.7).sum())],
        ),
        ({"top_k": VOCABULARY + 5, "top_p": 1.0}, lambda p: np.arange(VOCABULARY)),
    ],
    ids=["k=1", "k=3", "p=0", "p=0.7", "all"],
)
def test_only_the_likely_tokens_are_drawn(model, params, tokens, logits, settings, kept):
    rows = np.tile(tokens[:1], (2000, 1))
    drawn = generate(model, params, rows, 1, temperature=3.0, rng=jax.random.key(1), **settings)
    p = np.exp(logits(tokens[:1])[0] / 3.0)
    assert set(np.unique(drawn)) == set(kept(p / p.sum()).tolist())


def test_the_key_decides(model, params, tokens):
    one, again, other = (
        np.asarray(generate(model, params, tokens, 8, temperature=9.0, rng=jax.random.key(seed)))
        for seed in (0, 0, 1)
    )
    np.testing.assert_array_equal(one, again)
    assert (one != other).any()
    same = np.tile(tokens[:1], (3, 1))
    alike = np.asarray(generate(model, params, same, 8, temperature=9.0, rng=jax.random.key(0)))
    assert (alike[0] != alike[1]).any()  # Each row has draws of its own.


def test_the_same_call_compiles_once(model, params, tokens):
    generate(model, params, tokens, 8, temperature=0)
    compiled = generation._continue._cache_size()
    generate(model, params, (tokens + 1) % VOCABULARY, 8, temperature=0)
    assert generation._continue._cache_size() == compiled


def test_no_tokens_are_none(model, params, tokens):
    assert generate(model, params, tokens, 0, temperature=0).shape == (3, 0)
    assert generate(model, params, tokens, 1, temperature=0).shape == (3, 1)


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"temperature": -1.0}, ValueError, "temperature"),
        ({"temperature": float("inf")}, ValueError, "temperature"),
        ({"temperature": "hot"}, TypeError, "temperature"),
        ({"temperature": 0, "top_k": 3}, ValueError, "top_k"),
        ({"rng": None}, ValueError, "rng"),
        ({"rng": 0}, TypeError, "rng"),
        ({"top_k": 0}, ValueError, "top_k"),
        ({"top_p": 0.0}, ValueError, "top_p"),
        ({"top_p": 1.5}, ValueError, "top_p"),
        ({"num_tokens": -1}, ValueError, "num_tokens"),
        ({"num_tokens": 2.0}, TypeError, "num_tokens"),
        ({"tokens": np.zeros((2, 0), int)}, ValueError, "tokens"),
        ({"tokens": np.zeros((2, 3))}, TypeError, "tokens"),
        ({"model": nn.Dense(3)}, TypeError, "model"),
    ],
)
def test_what_cannot_be_generated_is_refused(model, params, tokens, change, error, words):
    arguments = {"model": model, "params": params, "tokens": tokens, "num_tokens": 2}
    with pytest.raises(error, match=words):
        generate(**arguments | {"rng": jax.random.key(0)} | change)


def test_a_model_without_positions_or_a_cache_for_them_is_refused(model, params, tokens):
    short = model.clone(positions=LearnedPositions(5))
    with pytest.raises(ValueError, match=r"5 positions.*4 \+ 2"):
        generate(short, params, tokens, 2, temperature=0)
    other = SequenceModel(
        TokenEmbedding(VOCABULARY, 8), [Block(SingleHeadAttention())], mask=masks.causal()
    )
    with pytest.raises(NotImplementedError, match="SingleHeadAttention has no cache"):
        generate(other, params, tokens, 2, temperature=0)
