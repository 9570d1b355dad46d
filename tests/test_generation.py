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
    VectorEmbedding,
    generate,
    generation,
    masks,
    positions,
)
from attention_jax.generation import stream
from attention_jax.training.model import make_sequence_model

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
        ({"top_p": 1e-39}, lambda p: np.argsort(-p)[:1]),  # 0 in float32.
        (
            {"top_p": 0.7},
            lambda p: np.argsort(-p)[: 1 + int((np.cumsum(np.sort(p)[::-1]) < 0.7).sum())],
        ),
        ({"top_k": VOCABULARY + 5, "top_p": 1.0}, lambda p: np.arange(VOCABULARY)),
    ],
    ids=["k=1", "k=3", "p=0", "p=tiny", "p=0.7", "all"],
)
def test_only_the_likely_tokens_are_drawn(model, params, tokens, logits, settings, kept):
    rows = np.tile(tokens[:1], (2000, 1))
    drawn = generate(model, params, rows, 1, temperature=3.0, rng=jax.random.key(1), **settings)
    p = np.exp(logits(tokens[:1])[0] / 3.0)
    assert set(np.unique(drawn)) == set(kept(p / p.sum()).tolist())


@pytest.mark.parametrize("temperature", [1e-6, 1e-38, 1e-46, 1e-300])
@pytest.mark.parametrize("settings", [{}, {"top_k": 4, "top_p": 0.9}])
def test_a_tiny_temperature_takes_the_likeliest_token(temperature, settings):
    logits = jnp.array([[3.0, 0.0, 5.0, -jnp.inf, 4.999]])
    settings = (temperature, settings.get("top_k"), settings.get("top_p"))
    assert int(generation._choose(logits, jax.random.key(0), 0, settings)[0]) == 2


@pytest.mark.parametrize("top_k", [None, 1, 2, 9])
@pytest.mark.parametrize("top_p", [None, 0.2, 0.7])
def test_equal_tokens_do_not_pass_a_limit(top_k, top_p):
    logits = jnp.array([1.0, 2.0, 2.0, 0.0, 2.0], jnp.bfloat16)
    order = np.argsort(-np.asarray(logits, float), kind="stable")[:top_k]
    p = np.exp(np.asarray(logits, float)[order])
    before = np.cumsum(p / p.sum()) - p / p.sum()
    want = order if top_p is None else order[before < top_p]
    settings = (1.0, top_k, top_p)
    drawn = generation._choose(jnp.tile(logits, (900, 1)), jax.random.key(0), 0, settings)
    assert set(np.unique(drawn)) == set(want)


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
    compiled = generation._continue_in_place._cache_size()
    generate(model, params, (tokens + 1) % VOCABULARY, np.int64(8), temperature=0)
    assert generation._continue_in_place._cache_size() == compiled


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
        ({"tokens": []}, ValueError, "T at least 1"),
        ({"tokens": np.zeros((2, 3))}, TypeError, "tokens"),
        ({"tokens": [[1, VOCABULARY]]}, ValueError, f"tokens.*{VOCABULARY - 1}, got {VOCABULARY}"),
        ({"tokens": [-1]}, ValueError, "tokens.*got -1"),
        ({"model": nn.Dense(3)}, TypeError, "model"),
        ({"lengths": [4, 4]}, ValueError, "lengths must have the batch axes"),
        ({"lengths": [4, 0, 1]}, ValueError, r"lengths must lie in \[1, T\]"),
        ({"lengths": [4, 5, 1]}, ValueError, r"lengths must lie in \[1, T\]"),
        ({"context": 1}, ValueError, "context"),
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
    with pytest.raises(NotImplementedError, match="the model has no blocks"):
        generate(model.clone(blocks=[], reach=None), params, tokens, 2, temperature=0)
    with pytest.raises(TypeError, match=r"model must take tokens.*VectorEmbedding"):
        generate(model.clone(embedding=VectorEmbedding(8)), params, tokens, 2, temperature=0)


def test_fields_that_cannot_be_hashed_are_those_of_their_values(model, params, tokens):
    def run(*, use_bias, factor):
        layer = MultiHeadAttention(2, rotary=True, use_bias=use_bias)
        layer = layer.clone(rotary_scaling=positions.linear(factor))
        changed = model.clone(blocks=[Block(layer)], reach=None)
        params = jax.jit(changed.init)(jax.random.key(0), jnp.asarray(tokens))["params"]
        return generate(changed, params, tokens, 3, temperature=0)

    want = run(use_bias=("query",), factor=2.0)
    np.testing.assert_array_equal(run(use_bias=["query"], factor=jnp.float32(2)), want)


MODELS = {
    "none": {"positions": "none"},
    "rotary, grouped": {"positions": "rotary", "num_kv_heads": 2},
    "learned": {"positions": "learned", "max_length": LENGTH},
    "sinusoidal": {"positions": "sinusoidal"},
    "alibi": {"positions": "alibi"},
    "relative, one key head": {"positions": "relative", "num_kv_heads": 1},
    "window": {"positions": "rotary", "window": 3},
    "window, convolution": {"positions": "rotary", "window": 3, "short_conv": 3},
    "convolution": {"positions": "learned", "max_length": LENGTH, "short_conv": 4},
    "window and alibi": {"positions": "alibi", "window": 2},
}


def whole(model, params):
    """The logits of every token, without a cache, of rows padded to one length."""
    apply = jax.jit(functools.partial(model.apply, {"params": params}))
    return lambda row: np.asarray(apply(np.pad(row, (0, LENGTH - len(row)))))[: len(row)]


OFTEN = {"rotary, grouped", "learned", "window and alibi", "convolution"}


@pytest.mark.parametrize(
    "settings",
    [
        pytest.param(settings, id=name, marks=() if name in OFTEN else pytest.mark.slow)
        for name, settings in MODELS.items()
    ],
)
def test_prompts_of_different_lengths_continue_as_the_whole_row_says(settings):
    model = make_sequence_model(8, 1, num_heads=4, vocab_size=VOCABULARY, causal=True, **settings)
    model = model.clone(embedding=sharp(VOCABULARY, 8))
    rng = np.random.default_rng(1)
    prompts, lengths = rng.integers(0, VOCABULARY, (3, 5)), np.array([5, 2, 3])
    params = jax.jit(model.init)(jax.random.key(0), prompts)["params"]
    found = generate(model, params, prompts, 7, temperature=0, lengths=lengths)
    logits = whole(model, params)
    for prompt, length, new in zip(prompts, lengths, np.asarray(found), strict=True):
        row = prompt[:length]
        for token in new:
            assert token == logits(row)[-1].argmax()
            row = np.append(row, token)


@pytest.mark.parametrize("lengths", [None, [4, 2, 1]], ids=["equal", "other lengths"])
def test_a_text_longer_than_the_context_goes_on_from_its_last_half(model, params, tokens, lengths):
    context, number = 6, 17
    found = np.asarray(
        generate(model, params, tokens, number, temperature=0, context=context, lengths=lengths)
    )
    logits = whole(model, params)
    full = lengths or [4, 4, 4]
    for prompt, length, new in zip(tokens, full, found, strict=True):
        row, longest = prompt[:length], max(full)
        for token in new:
            if longest > context:  # All rows slide when the longest is full.
                row, longest = row[-(context // 2) :], context // 2
            assert token == logits(row)[-1].argmax()
            row, longest = np.append(row, token), longest + 1


def test_of_a_longer_prompt_the_end_counts(model, params, tokens):
    long = np.concatenate([tokens, tokens[:, ::-1]], axis=1)
    found = generate(model, params, long, 9, temperature=0, context=5)
    np.testing.assert_array_equal(
        found, generate(model, params, long[:, -5:], 9, temperature=0, context=5)
    )


def test_a_stream_gives_the_same_tokens_in_parts(model, params, tokens):
    settings = {"temperature": 2.0, "top_k": 5, "rng": jax.random.key(3), "context": 7}
    want = np.asarray(generate(model, params, tokens, 20, **settings))
    parts = list(stream(model, params, tokens, 20, chunk=3, **settings))
    assert all(part.shape[-1] <= 3 for part in parts)
    np.testing.assert_array_equal(np.concatenate(parts, axis=-1), want)


def test_a_longer_text_compiles_nothing(model, params, tokens):
    settings = {"temperature": 0, "context": 6}
    generate(model, params, tokens, 20, **settings)
    compiled = generation._continue_in_place._cache_size(), generation._prefill._cache_size()
    generate(model, params, tokens, 47, **settings)
    assert compiled == (
        generation._continue_in_place._cache_size(),
        generation._prefill._cache_size(),
    )


def test_a_cache_is_no_longer_than_the_text(model, params, tokens):
    model = model.clone(reach=None)

    def size(context):
        programs = generation.compile_ahead(
            model, params, tokens, 20, temperature=0, context=context
        )
        return programs[0].memory_analysis().output_size_in_bytes

    assert size(10**6) == size(None)
    assert size(6) < size(None)


def test_draws_with_top_k_and_top_p_follow_the_probabilities_that_are_left(model, params, tokens):
    """Chi-squared, with a limit of five standard deviations."""
    logits = whole(model, params)(tokens[0])[-1] / 2.0
    p = np.exp(logits - logits.max())
    order = np.argsort(-p)[:6]
    kept = p[order] / p[order].sum()
    kept = np.where(np.cumsum(kept) - kept < 0.9, kept, 0)
    want = np.zeros(VOCABULARY)
    want[order] = kept / kept.sum()
    rows = np.tile(tokens[:1], (4000, 1))
    drawn = generate(
        model, params, rows, 1, temperature=2.0, top_k=6, top_p=0.9, rng=jax.random.key(5)
    )
    counts = np.bincount(np.asarray(drawn)[:, 0], minlength=VOCABULARY)
    seen = want > 0
    assert counts[~seen].sum() == 0
    expected = 4000 * want[seen]
    freedom = seen.sum() - 1
    assert ((counts[seen] - expected) ** 2 / expected).sum() < freedom + 5 * (2 * freedom) ** 0.5


def test_what_stands_behind_a_prompt_may_be_no_token(model, params, tokens):
    padded = np.array([[3, 1, -1], [3, 1, VOCABULARY]])
    lengths = np.array([2, 2])
    found = generate(model, params, padded, 2, temperature=0, lengths=lengths)
    want = generate(model, params, padded[:, :2], 2, temperature=0)
    np.testing.assert_array_equal(found, want)
    with pytest.raises(ValueError, match=r"tokens.*got -1"):
        generate(model, params, padded, 2, temperature=0, lengths=lengths + 1)


@pytest.mark.parametrize("settings", [{}, {"context": 6, "lengths": [4, 2, 3]}], ids=str)
def test_a_row_stays_at_the_first_token_that_ends_it(model, params, tokens, settings):
    settings = {"temperature": 1.0, "rng": jax.random.key(2)} | settings
    free = np.asarray(generate(model, params, tokens, 16, **settings))
    end = [int(free[0, 3]), int(free[1, 8])]
    want = free.copy()
    for row in want:
        ends = np.flatnonzero(np.isin(row, end))
        row[ends[0] if ends.size else len(row) :] = row[ends[0]] if ends.size else 0
    found = generate(model, params, tokens, 16, end=end, **settings)
    np.testing.assert_array_equal(found, want)


def test_no_more_tokens_are_made_when_all_rows_have_ended(model, params, tokens):
    free = np.asarray(generate(model, params, tokens[:1], 16, temperature=0))
    end = int(free[0, 4])
    first = free[0].tolist().index(end)
    parts = list(stream(model, params, tokens[:1], 10**6, temperature=0, context=6, end=end))
    assert np.concatenate(parts, axis=-1)[0].tolist() == free[0, : first + 1].tolist()
    found = generate(model, params, tokens[:1], 16, temperature=0, end=end)
    assert found[0].tolist() == [*free[0, :first].tolist(), *[end] * (16 - first)]


@pytest.mark.parametrize("end", [[], 1.5, "a", [[1]], VOCABULARY, -1])
def test_what_cannot_end_a_row_is_refused(model, params, tokens, end):
    with pytest.raises((TypeError, ValueError), match=r"^end must be"):
        generate(model, params, tokens, 2, temperature=0, end=end)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("settings", [{"temperature": 0}, {"rng": jax.random.key(0), "top_k": 3}])
def test_logits_that_are_no_numbers_give_no_tokens(model, params, tokens, bad, settings):
    broken = jax.tree.map(lambda x: x.at[..., 0].set(bad), params)
    with pytest.raises(FloatingPointError, match=r"NaN or infinite in row \[0\]"):
        generate(model, broken, tokens, 2, **settings)
    traced = jax.jit(lambda params: generate(model, params, tokens, 2, **settings))
    assert (np.asarray(traced(broken)) == -1).all()


@pytest.mark.parametrize(
    ("settings", "lengths"),
    [({"context": 6}, [4, 2, 3]), ({"context": 3}, None), ({}, jnp.array([4, 2, 3]))],
    ids=["slides", "long", "lengths"],
)
def test_a_prompt_may_be_traced(model, params, tokens, settings, lengths):
    settings = {"temperature": 0} | settings
    run = lambda tokens, lengths: generate(model, params, tokens, 5, lengths=lengths, **settings)
    if isinstance(lengths, list):  # Beside a context they must be known.
        traced = jax.jit(lambda tokens: run(tokens, lengths))(tokens)
        with pytest.raises(TypeError, match=r"lengths must be known.*got a traced array"):
            jax.jit(run)(tokens, jnp.array(lengths))
    else:
        traced = jax.jit(run)(tokens, lengths)
    np.testing.assert_array_equal(traced, run(tokens, lengths))


def test_vmap_over_keys_gives_the_draws_of_each(model, params, tokens, recwarn):
    draw = lambda rng: generate(model, params, tokens, 4, rng=rng)
    keys = jax.random.split(jax.random.key(0), 2)
    np.testing.assert_array_equal(jax.vmap(draw)(keys), [draw(key) for key in keys])
    assert not [x for x in recwarn if "donated" in str(x.message)]
