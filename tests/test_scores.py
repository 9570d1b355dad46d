"""Maps and scores of heads: weights set by hand, whose answer is known, and dull loops."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from attention_jax import (
    Block,
    DifferentialAttention,
    GatedDeltaAttention,
    MultiHeadAttention,
    SequenceModel,
    TokenEmbedding,
    linear_attention,
    masks,
)
from attention_jax.analysis import (
    attention_maps,
    best_head,
    head_pattern,
    head_scores,
    in_context_score,
    map_statistics,
    prefix_matching,
    repeated_tokens,
)

VOCABULARY = 13
TOKENS = np.array([[3, 7, 3, 5, 7, 3, 3], [1, 1, 2, 9, 2, 1, 0]])
LAYER = "layer"
KINDS = ("previous_token_head", "duplicate_token_head", "induction_head")


def looks(tokens, kind, t):
    """Where a head of a kind looks from place t, by the words of the definition."""
    if kind == "previous_token_head":
        return [t - 1] if t else []
    same = [s for s in range(t) if tokens[s] == tokens[t]]
    return same if kind == "duplicate_token_head" else [s + 1 for s in same]


def causal_weights(*shape, seed=0):
    """Random causal weights, whose rows sum to 1."""
    weights = np.tril(np.random.default_rng(seed).uniform(0.1, 1, shape))
    return weights / weights.sum(-1, keepdims=True)


def head_of(tokens, kind):
    """The weights of a perfect head, which stays at the first token where it has nothing to do."""
    T = len(tokens)
    weights = np.zeros((T, T))
    for t in range(T):
        for s in looks(tokens, kind, t) or [0]:
            weights[t, s] += 1 / len(looks(tokens, kind, t) or [0])
    return weights


@pytest.mark.parametrize("kind", KINDS)
def test_patterns_are_those_of_the_words(kind):
    found = head_pattern(TOKENS, kind)
    for row, tokens in enumerate(TOKENS):
        for t in range(len(tokens)):
            assert np.flatnonzero(found[row, t]).tolist() == looks(tokens, kind, t)


@pytest.mark.parametrize("kind", KINDS)
def test_a_head_set_by_hand_is_found_among_others(kind):
    heads = [[head_of(tokens, other) for other in KINDS] for tokens in TOKENS]
    found = head_scores({LAYER: np.array(heads)}, TOKENS, kind, exclude_bos=True)[LAYER]
    assert found[KINDS.index(kind)] == 1  # All that it does not give to the first token.
    assert best_head({LAYER: found}) == (LAYER, KINDS.index(kind), 1.0)
    assert (np.delete(found, KINDS.index(kind)) < 0.7).all()


def test_a_score_by_hand():
    # The second token takes the first with 0.3, the third the first two with 0.5 and 0.1.
    weights = np.array([[[1, 0, 0], [0.3, 0.7, 0], [0.5, 0.1, 0.4]]])
    score = functools.partial(head_scores, {LAYER: weights}, [4, 6, 4])
    by = lambda *arguments, **options: float(score(*arguments, **options)[LAYER][0])
    assert by("previous_token_head") == pytest.approx(0.4 / 3)
    assert by("duplicate_token_head") == pytest.approx(0.5 / 3)
    assert by("induction_head") == pytest.approx(0.1 / 3)
    assert by("induction_head", exclude_bos=True) == pytest.approx(0.1 / 1.2)
    assert by("induction_head", exclude_bos=True, exclude_current_token=True) == 1
    away = [1, 0.7 + 0.7, 0.5 + 0.9 + 0.4]  # |weight - pattern| of each query.
    assert by("previous_token_head", error_measure="abs") == pytest.approx(1 - sum(away) / 3)
    others = {"exclude_bos": True, "exclude_current_token": True}
    # Of the places that are left only the last query's second key counts, where it looks away.
    assert by("previous_token_head", error_measure="abs", **others) == pytest.approx(1 - 0.9 / 3)
    # A head without any attention is none of a kind.
    nothing = np.zeros((1, 3, 3))
    assert head_scores({LAYER: nothing}, [4, 6, 4], "induction_head")[LAYER] == 0


def test_only_the_queries_that_are_named_count():
    weights, queries = causal_weights(2, 3, 7, 7), np.zeros((2, 7), bool)
    queries[0, [4, 6]] = queries[1, 5] = True
    found = head_scores({LAYER: weights}, TOKENS, "induction_head", queries=queries)[LAYER]
    places = [(0, 4), (0, 6)], [(1, 5)]
    on = lambda row, t: weights[row, :, t, looks(TOKENS[row], "induction_head", t)].sum(0)
    want = np.mean([np.mean([on(*place) for place in row], axis=0) for row in places], axis=0)
    np.testing.assert_allclose(found, want)
    with pytest.raises(ValueError, match=r"queries must be boolean.*\(2, 7\), got int"):
        head_scores({LAYER: weights}, TOKENS, "induction_head", queries=queries.astype(int))


@pytest.mark.parametrize("exclude_bos", [False, True])
@pytest.mark.parametrize("exclude_current_token", [False, True])
@pytest.mark.parametrize("error_measure", ["mul", "abs"])
@pytest.mark.parametrize("kind", KINDS)
def test_scores_are_those_of_loops(kind, error_measure, exclude_bos, exclude_current_token):
    weights = causal_weights(2, 3, 7, 7)
    options = dict(
        error_measure=error_measure,
        exclude_bos=exclude_bos,
        exclude_current_token=exclude_current_token,
    )
    found = head_scores({LAYER: weights}, TOKENS, kind, **options)[LAYER]
    for head in range(3):
        rows = []
        for row, tokens in enumerate(TOKENS):
            on, total, away = 0.0, 0.0, 0.0
            for t, s in np.ndindex(7, 7):
                if (exclude_bos and s == 0) or (exclude_current_token and s == t):
                    continue
                weight = weights[row, head, t, s]
                wanted = s in looks(tokens, kind, t)
                total, on, away = total + weight, on + weight * wanted, away + abs(weight - wanted)
            rows.append(on / total if error_measure == "mul" else 1 - away / 7)
        assert found[head] == pytest.approx(np.mean(rows), abs=1e-12)


@pytest.mark.parametrize(
    ("arguments", "options", "error", "words"),
    [
        ((TOKENS, "copy_head"), {}, ValueError, "kind must be one of.*copy_head"),
        ((TOKENS, KINDS[0]), {"error_measure": "max"}, ValueError, "error_measure.*max"),
        ((TOKENS, KINDS[0]), {"exclude_bos": 1}, TypeError, "exclude_bos"),
        ((TOKENS[:, :5], KINDS[0]), {}, ValueError, r"maps must be.*\(2, 5\)"),
        ((TOKENS[0], KINDS[0]), {}, ValueError, "maps must be"),
        ((TOKENS / 2, KINDS[0]), {}, TypeError, "tokens must hold integers"),
    ],
)
def test_what_cannot_be_scored_is_refused(arguments, options, error, words):
    with pytest.raises(error, match=words):
        head_scores({LAYER: causal_weights(2, 3, 7, 7)}, *arguments, **options)


# Maps --------------------------------------------------------------------------------------------


def made(*layers, **fields):
    model = SequenceModel(
        TokenEmbedding(VOCABULARY, 8),
        [Block(layer) for layer in layers],
        mask=masks.causal(),
        **fields,
    )
    rng = np.random.default_rng(1)
    like = jax.eval_shape(model.init, jax.random.key(0), TOKENS)["params"]
    draw = lambda x: jnp.asarray(rng.normal(0.1, 0.7, x.shape), x.dtype)
    return model, jax.tree.map(draw, like)


def test_maps_are_the_weights_of_every_layer():
    model, params = made(MultiHeadAttention(4), DifferentialAttention(2, head_dim=4))
    maps = attention_maps(model, params, TOKENS)
    assert list(maps) == ["blocks_0/attention", "blocks_1/attention"]
    _, sown = model.apply({"params": params}, TOKENS, sow_weights=True, mutable="intermediates")
    for path, weights in maps.items():
        (want,) = sown["intermediates"][path.split("/")[0]]["attention"]["attention_weights"]
        np.testing.assert_allclose(weights, want, atol=1e-6)
        assert not np.triu(weights, 1).any()
    assert maps["blocks_0/attention"].shape == (2, 4, 7, 7)


def test_layers_without_weights_are_left_out():
    linear = MultiHeadAttention(2, attention_fn=linear_attention)
    model, params = made(linear, MultiHeadAttention(2), GatedDeltaAttention(2), remat=True)
    assert list(attention_maps(model, params, TOKENS)) == ["blocks_1/attention"]
    model, params = made(linear)
    with pytest.raises(
        NotImplementedError,
        match=r"model must have layers.*MultiHeadAttention with linear_attention",
    ):
        attention_maps(model, params, TOKENS)


def test_options_are_those_of_the_call():
    model, params = made(MultiHeadAttention(2))
    (near,) = attention_maps(model, params, TOKENS, mask=masks.window(1)).values()
    assert near.any()
    assert not np.tril(near, -2).any()


def test_a_model_of_flax_has_maps_too():
    class Theirs(nn.Module):
        @nn.compact
        def __call__(self, tokens):
            layer = nn.MultiHeadDotProductAttention(2, name="attention")
            x = nn.Embed(VOCABULARY, 8)(tokens)
            return layer(layer(x))

    model = Theirs()
    params = model.init(jax.random.key(0), TOKENS)["params"]
    maps = attention_maps(model, params, TOKENS)
    assert list(maps) == ["attention[0]", "attention[1]"]
    for weights in maps.values():
        np.testing.assert_allclose(np.sum(weights, -1), 1, atol=1e-5)


def test_layers_come_in_the_order_of_their_numbers():
    model, params = made(*(MultiHeadAttention(1, head_dim=2) for _ in range(11)))
    maps = attention_maps(model, params, TOKENS[:1, :2])
    assert list(maps) == [f"blocks_{i}/attention" for i in range(11)]


def test_statistics_are_those_of_loops():
    weights = causal_weights(2, 3, 5, 5)
    weights[1, :, 4] = 0  # A query that sees nothing does not count.
    found = map_statistics({LAYER: weights})[LAYER]
    for head in range(3):
        rows = [(t, weights[b, head, t]) for b, t in np.ndindex(2, 5) if (b, t) != (1, 4)]
        want = {
            "entropy": [-sum(w * np.log(w) for w in row if w) for _, row in rows],
            "largest": [max(row) for _, row in rows],
            "distance": [sum(w * abs(t - s) for s, w in enumerate(row)) for t, row in rows],
            "to_self": [row[t] for t, row in rows],
            "to_previous": [row[t - 1] if t else 0 for t, row in rows],
            "to_first": [row[0] for _, row in rows],
        }
        assert set(want) == set(found)
        for name, values in want.items():
            assert found[name][head] == pytest.approx(np.mean(values), abs=1e-6)
    with pytest.raises(ValueError, match=r"maps must be .* layer"):
        map_statistics({LAYER: np.zeros((3, 3))})
    maps = {LAYER: np.ones((2, 3, 5, 5))}
    with pytest.raises(ValueError, match=r"queries must be boolean \(2, 5\) for .*, got int64"):
        map_statistics(maps, queries=np.ones((2, 5), np.int64))


@pytest.mark.parametrize("dtype", [np.float32, jnp.bfloat16])
def test_the_entropy_counts_the_sink_and_is_of_shares_alone(dtype):
    with_sink = np.array([[[0.5, 0.25]]])  # A quarter is the sink's.
    found = map_statistics({LAYER: with_sink.astype(dtype)})[LAYER]
    assert found["entropy"] == pytest.approx([1.5 * np.log(2)], abs=1e-6)
    whole = np.full((1, 1, 7), 1 / 7, dtype)  # Rounding leaves no sink.
    assert map_statistics({LAYER: whole})[LAYER]["entropy"] == pytest.approx([np.log(7)], abs=1e-2)
    for odd in ([0.9, -0.1], [0.9, 0.3]):
        both = np.array([[odd], [[0.5, 0.5]]], dtype)  # [N, T, S]
        entropy = map_statistics({LAYER: both})[LAYER]["entropy"]
        assert np.isnan(entropy[0])
        assert entropy[1] == pytest.approx(np.log(2), abs=1e-6)


def test_statistics_of_maps_count_the_queries_that_are_named():
    weights = np.random.default_rng(0).dirichlet(np.ones(5), (1, 3, 5))
    counted = np.array([[True, True, False, True, False]])
    found = map_statistics({LAYER: weights}, queries=counted)[LAYER]
    seen = np.where(counted[:, None, :, None], weights, 0)  # Queries without keys do not count.
    for name, want in map_statistics({LAYER: seen})[LAYER].items():
        np.testing.assert_allclose(found[name], want)


# Over training -----------------------------------------------------------------------------------


class Induction(nn.Module):
    """Two heads whose weights are set: the first is a perfect induction head."""

    @nn.compact
    def __call__(self, tokens):
        pattern = jax.pure_callback(
            lambda x: head_pattern(x, "induction_head").astype(np.float32),
            jax.ShapeDtypeStruct((*tokens.shape, tokens.shape[-1]), np.float32),
            tokens,
        )
        perfect = pattern / jnp.maximum(1, pattern.sum(-1, keepdims=True))
        self.sow("intermediates", "attention_weights", jnp.stack([perfect, 0 * perfect], 1))
        return tokens


def test_prefix_matching_of_a_perfect_head_is_one():
    options = dict(vocab_size=VOCABULARY, rng=jax.random.key(0), length=5, repeats=3, rows=2)
    (found,) = prefix_matching(Induction(), {}, **options).values()
    np.testing.assert_allclose(found, [1, 0])
    (found,) = prefix_matching(Induction(), {}, **options, first=0).values()
    np.testing.assert_allclose(found, [1, 0])


def test_prefix_matching_is_the_attention_after_earlier_copies():
    model, params = made(MultiHeadAttention(2))
    rng, sizes = jax.random.key(3), dict(length=4, repeats=2, rows=3)
    found = prefix_matching(model, params, vocab_size=VOCABULARY, rng=rng, **sizes)
    tokens = repeated_tokens(rng, vocab_size=VOCABULARY, **sizes)
    assert np.array_equal(tokens[:, :4], tokens[:, 4:])
    assert all(len(set(row)) == 4 for row in np.asarray(tokens)[:, :4])
    (weights,) = attention_maps(model, params, tokens).values()
    want = np.mean([weights[:, :, t, t - 3] for t in range(4, 8)], axis=(0, 1))
    np.testing.assert_allclose(found["blocks_0/attention"], want, atol=1e-6)


def test_the_in_context_score_is_late_minus_early():
    losses = np.array([[4.0, 3, 2, 1], [4, 4, 4, 3]])
    assert in_context_score(losses, late=3, early=1) == (1 - 3 + 3 - 4) / 2
    with pytest.raises(ValueError, match=r"500 .*\(2, 4\)"):
        in_context_score(losses)
    with pytest.raises(ValueError, match="early"):
        in_context_score(losses, late=1, early=1)


@pytest.mark.parametrize(
    ("change", "words"),
    [({"repeats": 1}, "repeats"), ({"length": 0}, "length"), ({"first": 13}, "first.*13")],
)
def test_rows_that_cannot_be_repeated_are_refused(change, words):
    options = dict(vocab_size=VOCABULARY, rng=jax.random.key(0)) | change
    with pytest.raises(ValueError, match=words):
        prefix_matching(Induction(), {}, **options)
