"""Gates, importance, ablation and pruning of heads, against loops and against one another."""

import functools
from contextlib import nullcontext

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import assert_close
from flax import linen as nn

from attention_jax import (
    AlibiBias,
    Block,
    DifferentialAttention,
    GatedDeltaAttention,
    MultiHeadAttention,
    SequenceModel,
    SingleHeadAttention,
    TokenEmbedding,
    linear_attention,
    masks,
)
from attention_jax.analysis import (
    ablation,
    apply_with_gates,
    attention_maps,
    head_statistics,
    heads,
    heads_of,
    importance,
    map_statistics,
    mean_outputs,
    prune_heads,
    removal_curve,
    summarize,
)
from attention_jax.functional.statistics import attention_statistics

VOCABULARY = 11
TOKENS = jnp.asarray(np.random.default_rng(0).integers(0, VOCABULARY, (3, 6)))
FIRST, SECOND = "blocks_0/attention", "blocks_1/attention"
LAYERS = {
    "multi-head": functools.partial(MultiHeadAttention, 4, head_dim=4),
    "grouped": functools.partial(MultiHeadAttention, 4, num_kv_heads=2, rotary=True, sinks=True),
    "differential": functools.partial(DifferentialAttention, 4, num_kv_heads=2, head_dim=4),
}


def random_params(model):
    rng = np.random.default_rng(1)
    like = jax.eval_shape(model.init, jax.random.key(0), TOKENS)["params"]
    return jax.tree.map(lambda x: jnp.asarray(rng.normal(0.1, 0.5, x.shape), x.dtype), like)


def made(make):
    model = SequenceModel(
        TokenEmbedding(VOCABULARY, 8), [Block(make()) for _ in range(2)], mask=masks.causal()
    )
    return model, random_params(model)


@pytest.fixture(params=LAYERS)
def model_and_params(request):
    return made(LAYERS[request.param])


@pytest.fixture
def plain():
    return made(LAYERS["multi-head"])


def loss(logits):
    """Of each row: the next token's cross-entropy."""
    found = jax.nn.log_softmax(logits[:, :-1])
    return -jnp.take_along_axis(found, TOKENS[:, 1:, None], axis=-1)[..., 0].mean(-1)


def with_zeroed(params, path, head):
    """The parameters with the output kernel of a head at zero: what a closed gate means."""
    name = path.split("/")[0]
    layer = params[name]["attention"]
    kernel = layer["out"]["kernel"].at[head].set(0)
    layer = {**layer, "out": {**layer["out"], "kernel": kernel}}
    return {**params, name: {**params[name], "attention": layer}}


def test_heads_are_counted_by_layer(model_and_params):
    assert heads_of(*model_and_params, TOKENS) == {FIRST: 4, SECOND: 4}


def test_a_closed_gate_is_a_head_that_gives_nothing(model_and_params):
    model, params = model_and_params
    apply = jax.jit(lambda params: model.apply({"params": params}, TOKENS))
    closed = jax.jit(lambda gates: apply_with_gates(model, params, TOKENS, gates))
    gates = {FIRST: jnp.array([1.0, 0, 1, 1]), SECOND: jnp.array([1.0, 1, 1, 0])}
    want = apply(with_zeroed(with_zeroed(params, FIRST, 1), SECOND, 3))
    assert_close(closed(gates), want, 1e-6)
    assert_close(closed(jax.tree.map(jnp.ones_like, gates)), apply(params), 1e-6)


@pytest.mark.parametrize("side_by_side", [1, 2, 4])
def test_ablation_in_one_program_is_the_loop_over_heads(plain, side_by_side, monkeypatch):
    model, params = plain
    monkeypatch.setattr(heads, "_POSITIONS", side_by_side * TOKENS.size)  # What a CPU goes by.
    apply = jax.jit(lambda params: loss(model.apply({"params": params}, TOKENS)).mean())
    found = ablation(model, params, TOKENS, loss)
    for path in (FIRST, SECOND):
        want = [apply(with_zeroed(params, path, head)) for head in range(4)]
        assert_close(found[path], np.array(want), 1e-6)


@pytest.mark.parametrize("wrong", [jnp.sum, lambda x: x])
def test_importance_asks_for_the_loss_of_each_row(plain, wrong):
    model, params = plain
    with pytest.raises(ValueError, match=r"loss must give a number for each of the 3 rows.*shape"):
        importance(model, params, TOKENS, lambda outputs: wrong(outputs.mean(-1)))


def test_the_gradient_of_a_gate_is_summed_in_float32():
    tokens = jax.random.randint(jax.random.key(0), (2, 512), 0, VOCABULARY)
    rows = lambda outputs: jax.nn.logsumexp(outputs.astype(jnp.float32), axis=-1).mean(-1)
    found = {}
    for dtype in (jnp.float32, jnp.bfloat16):
        layer = MultiHeadAttention(4, dtype=dtype)
        model = SequenceModel(TokenEmbedding(VOCABULARY, 16), [Block(layer)], mask=masks.causal())
        params = model.init(jax.random.key(1), tokens)["params"]
        found[dtype] = importance(model, params, tokens, rows)[FIRST]
    np.testing.assert_allclose(found[jnp.bfloat16], found[jnp.float32], rtol=0.02)


def test_the_inputs_of_any_model_may_be_a_tree(plain):
    model, params = plain

    class OfTree(nn.Module):
        model: SequenceModel

        @nn.compact
        def __call__(self, inputs):
            return self.model(inputs["tokens"])

    found = ablation(OfTree(model), {"model": params}, {"tokens": TOKENS}, loss)
    want = ablation(model, params, TOKENS, loss)
    assert_close(found[f"model/{FIRST}"], want[FIRST], 1e-6)


def test_pairs_hold_each_head_alone_and_with_another(plain):
    model, params = plain
    both = ablation(model, params, TOKENS, loss, pairs=True)
    found = ablation(model, params, TOKENS, loss)
    assert both.shape == (8, 8)
    assert_close(np.diag(both), np.concatenate([found[FIRST], found[SECOND]]), 1e-6)
    assert_close(both, both.T, 1e-6)
    without = with_zeroed(with_zeroed(params, FIRST, 1), SECOND, 2)
    assert_close(both[1, 6], loss(model.apply({"params": without}, TOKENS)).mean(), 1e-6)


def test_a_mean_stands_for_the_head_that_is_removed(plain):
    model, params = plain
    means = mean_outputs(model, params, TOKENS)
    assert means[FIRST].shape == (4, 4)
    found = ablation(model, params, TOKENS, loss, by="mean")[SECOND]
    # By hand: the mean enters the output by the kernel of its head, as a bias.
    for head in range(4):
        changed = with_zeroed(params, SECOND, head)
        out = changed["blocks_1"]["attention"]["out"]
        kernel = params["blocks_1"]["attention"]["out"]["kernel"][head]
        out["bias"] = out["bias"] + means[SECOND][head] @ kernel
        want = loss(model.apply({"params": changed}, TOKENS)).mean()
        assert_close(found[head], want, 1e-6)


def test_means_may_be_those_of_some_positions_or_of_other_rows(plain):
    model, params = plain
    counted = np.arange(TOKENS.shape[1]) < np.array([2, 4, 5])[:, None]
    found = mean_outputs(model, params, TOKENS, queries=counted)
    changed = jnp.where(counted, TOKENS, 0)  # Causal: padding changes what comes after it alone.
    again = mean_outputs(model, params, changed, queries=jnp.asarray(counted))
    jax.tree.map(lambda x, y: assert_close(x, y, 1e-6), found, again)
    whole = mean_outputs(model, params, TOKENS, queries=np.ones(TOKENS.shape, bool))
    jax.tree.map(lambda x, y: assert_close(x, y, 1e-6), whole, mean_outputs(*plain, TOKENS))
    losses = ablation(model, params, TOKENS, loss, by=found)
    for path, head in ((FIRST, 1), (SECOND, 3)):
        gates = {path: jnp.ones(4).at[head].set(0)}
        outputs = apply_with_gates(model, params, TOKENS, gates, means=found)
        assert_close(losses[path][head], loss(outputs).mean(), 1e-6)
    with pytest.raises(
        ValueError, match=r"queries must have the shape .*FIRST".replace("FIRST", FIRST)
    ):
        mean_outputs(model, params, TOKENS, queries=counted[:, :3])
    with pytest.raises(ValueError, match="queries must be boolean"):
        mean_outputs(model, params, TOKENS, queries=counted.astype(int))
    with pytest.raises(ValueError, match="queries must count a position"):
        mean_outputs(model, params, TOKENS, queries=counted & False)
    with pytest.raises(ValueError, match=f"by must have means of the layers .*got .'{FIRST}'"):
        ablation(model, params, TOKENS, loss, by={FIRST: found[FIRST]})


@pytest.mark.parametrize("shape", ["one number", "one row", "tokens"])
def test_a_loss_gives_a_number_for_each_row(plain, shape):
    wrong = {
        "one number": lambda outputs: loss(outputs).mean(),
        "one row": lambda outputs: loss(outputs)[:1],
        "tokens": lambda outputs: outputs[..., 0],
    }[shape]
    arguments = *plain, TOKENS, wrong
    for call in (importance, ablation, lambda *x: removal_curve(*x, [[(FIRST, 0)]])):
        with pytest.raises(ValueError, match="loss must give a number for each of the 3 rows"):
            call(*arguments)


def test_remat_and_layers_that_run_twice_change_no_statistics():
    block = Block(MultiHeadAttention(4, num_kv_heads=2, rotary=True))
    model = SequenceModel(TokenEmbedding(VOCABULARY, 8), [block] * 2, mask=masks.causal())
    params = random_params(model)
    maps = map_statistics(attention_maps(model, params, TOKENS))
    assert list(maps) == [f"{FIRST}[0]", f"{FIRST}[1]"]

    def found(model):
        summary = summarize(head_statistics(model, params, TOKENS))
        means = mean_outputs(model, params, TOKENS)
        return summary, means, ablation(model, params, TOKENS, loss, by="mean")

    summary, means, _ = plain = found(model)
    for path, statistics in maps.items():
        assert_close(summary[path]["entropy"], statistics["entropy"], 1e-5)
    jax.tree.map(lambda x, y: assert_close(x, y, 1e-6), found(model.clone(remat=True)), plain)
    # The mean of a head is that over both runs of its layer.
    seen = []

    def intercept(run, arguments, options, context):
        if context.module.name == "out" and context.method_name == "__call__":
            seen.append(arguments[0])
        return run(*arguments, **options)

    with nn.intercept_methods(intercept):
        model.apply({"params": params}, TOKENS)
    assert_close(means[FIRST], jnp.stack(seen).mean((0, 1, 2)), 1e-6)


def test_statistics_and_means_are_those_of_all_tokens(plain):
    model, params = plain
    some = {"output_positions": jnp.array([[1], [5], [3]])}
    found, want = (head_statistics(model, params, TOKENS, **x) for x in (some, {}))
    jax.tree.map(np.testing.assert_array_equal, found, want)
    found, want = (mean_outputs(model, params, TOKENS, **x) for x in (some, {}))
    jax.tree.map(np.testing.assert_array_equal, found, want)


def test_a_summary_is_of_the_queries_that_count(plain):
    found = head_statistics(*plain, TOKENS)
    counts = np.arange(TOKENS.shape[1]) < np.array([2, 4, 5])[:, None]
    garbage = jax.tree.map(lambda x: np.where(counts[..., None], x, 99.0), found)
    summary, want = summarize(garbage, counts)[FIRST], found[FIRST]
    every = summarize(found)[FIRST]
    assert_close(summary["entropy"], np.asarray(want.entropy)[counts].mean(0), 1e-6)
    assert_close(summary["peak"], np.asarray(want.peak)[counts].max(0), 1e-6)
    most, T = np.log(np.maximum(2, want.visible)), TOKENS.shape[1]
    what = np.stack([want.entropy / most, want.distance / T, want.to_first, want.largest])
    left_out = np.broadcast_to(~counts[..., None], what.shape)
    assert_close(summary["spread"], np.ma.array(what, mask=left_out).std(1).max((0, 1)), 1e-5)
    assert not np.allclose(summary["entropy"], every["entropy"])


def test_a_summary_promotes_no_types(plain):
    want = summarize(head_statistics(*plain, TOKENS))
    with jax.numpy_dtype_promotion("strict"):
        found = summarize(head_statistics(*plain, TOKENS))
    jax.tree.map(np.testing.assert_array_equal, found, want)


def test_a_head_is_uniform_among_its_keys_whatever_the_sink_takes():
    query, key = jnp.ones((1, 1, 1)), jnp.array([0.0, 2.0])[:, None, None]
    weights = np.exp([0.0, 2.0]) / np.exp([0.0, 2.0]).sum()
    want = -(weights * np.log(weights)).sum() / np.log(2)
    for sinks in (None, jnp.array([2.0]), jnp.array([-9.0]), jnp.array([7.0])):
        found = attention_statistics(query, key, scale=1.0, sinks=sinks)
        assert_close(summarize({"a": found})["a"]["uniformity"], [want], 1e-3)


def test_statistics_of_one_head_and_of_other_layers():
    model = SequenceModel(
        TokenEmbedding(VOCABULARY, 8), [Block(SingleHeadAttention())], mask=masks.causal()
    )
    params = random_params(model)
    found = summarize(head_statistics(model, params, TOKENS))
    want = map_statistics(attention_maps(model, params, TOKENS))
    assert_close(found[FIRST]["entropy"], want[FIRST]["entropy"], 1e-5)
    flax = nn.MultiHeadDotProductAttention(num_heads=2)
    x = jnp.ones((1, 3, 4))
    words = r"got MultiHead\w+ with dot_product_attention of flax"
    with pytest.raises(NotImplementedError, match=words):
        head_statistics(flax, flax.init(jax.random.key(0), x)["params"], x)
    other = functools.partial(GatedDeltaAttention, 4)
    with pytest.raises(NotImplementedError, match=r"got GatedDeltaAttention with gated_delta"):
        head_statistics(*made(other), TOKENS)
    layers = iter((other, functools.partial(MultiHeadAttention, 4)))
    both = made(lambda: next(layers)())
    assert list(head_statistics(*both, TOKENS)) == list(attention_maps(*both, TOKENS)) == [SECOND]


def test_statistics_of_no_rows_are_those_of_no_head():
    model, params = made(functools.partial(MultiHeadAttention, 4))
    found = summarize(head_statistics(model, params, TOKENS[:0]))[FIRST]
    assert {name: x.tolist() for name, x in found.items()} == {
        name: [-np.inf if name == "peak" else 0.0] * 4 for name in found
    }


def test_tokens_that_an_embedding_lacks_are_refused(plain):
    model, params = plain
    for call in (
        lambda tokens: attention_maps(model, params, tokens),
        lambda tokens: head_statistics(model, params, tokens),
        lambda tokens: mean_outputs(model, params, tokens),
        lambda tokens: importance(model, params, tokens, loss),
        lambda tokens: ablation(model, params, tokens, loss),
    ):
        with pytest.raises(ValueError, match=rf"tokens from 0 to {VOCABULARY - 1}, got 99"):
            call(TOKENS.at[1, 2].set(99))


def test_importance_is_the_mean_size_of_the_gradient_of_each_gate(plain):
    model, params = plain
    found = importance(model, params, TOKENS, loss)
    step = 1e-3

    def losses(path, head, gate):
        gates = {path: jnp.ones(4).at[head].set(gate)}
        return np.float64(loss(apply_with_gates(model, params, TOKENS, gates)))

    for path, head in ((FIRST, 2), (SECOND, 0)):
        slope = (losses(path, head, 1 + step) - losses(path, head, 1 - step)) / (2 * step)
        assert_close(found[path][head], np.abs(slope).mean(), 2e-3)


@pytest.mark.parametrize("form", ["array", "lengths"])
def test_importance_of_rows_with_masks_of_their_own_is_the_mean_of_single_rows(plain, form):
    model, params = plain
    lengths = jnp.array([6, 3, 5])
    seen = jnp.arange(6) < lengths[:, None]
    size = lambda logits: jnp.square(logits).mean((-1, -2))

    def score(rows):
        mask = seen[rows, None, None, :] if form == "array" else masks.key_lengths(lengths[rows])
        return importance(model, params, TOKENS[rows], size, mask=mask)

    found, single = score(slice(None)), [score(slice(i, i + 1)) for i in range(3)]
    for path, values in found.items():
        assert_close(values, sum(one[path] for one in single) / 3, 1e-5)


@pytest.mark.parametrize(
    "heads",
    [{FIRST: [1]}, {FIRST: [0, 1], SECOND: [3]}, {FIRST: [0, 2]}, {SECOND: [0, 1, 2, 3]}],
    ids=str,
)
def test_a_pruned_model_is_the_model_with_closed_gates(model_and_params, heads):
    model, params = model_and_params
    smaller, fewer = prune_heads(model, params, heads)
    gates = {
        path: jnp.array([float(n not in numbers) for n in range(4)])
        for path, numbers in heads.items()
    }
    want = jax.jit(lambda: apply_with_gates(model, params, TOKENS, gates))()
    assert_close(jax.jit(smaller.apply)({"params": fewer}, TOKENS), want, 1e-6)
    like = jax.eval_shape(smaller.init, jax.random.key(0), TOKENS)["params"]
    assert jax.tree.map(jnp.shape, like) == jax.tree.map(jnp.shape, fewer)
    for path, numbers in heads.items():
        name = path.split("/")[0]
        left = max(1, 4 - len(numbers))  # A layer keeps one head at least.
        assert fewer[name]["attention"]["query"]["kernel"].shape[1] == left


def test_groups_stay_where_they_can():
    model, params = made(LAYERS["grouped"])  # Heads 0, 1 and 2, 3 share keys.
    kept = lambda heads: prune_heads(model, params, {FIRST: heads})[0].blocks[0].attention
    assert (kept([1, 3]).num_heads, kept([1, 3]).num_kv_heads) == (2, 2)
    assert (kept([0, 1]).num_heads, kept([0, 1]).num_kv_heads) == (2, 1)
    assert (kept([0]).num_heads, kept([0]).num_kv_heads) == (3, 3)
    for numbers in (np.array([1, 3]), jnp.array([1, 3]), {1, 3}, list(jnp.array([1, 3, 3]))):
        assert kept(numbers) == kept([1, 3])


@pytest.mark.parametrize(
    ("heads", "error", "words"),
    [
        ({"blocks_7/attention": [0]}, ValueError, "blocks_7/attention.*blocks_0"),
        ({FIRST: [4]}, ValueError, "below 4, got 4"),
        ({FIRST: [-1]}, ValueError, "below 4, got -1"),
        ({FIRST: 1}, TypeError, "in a list, got 1"),
        ([(FIRST, 1)], TypeError, "heads must be numbers by the path of their layer, as .*, got "),
        ({FIRST: [1.0]}, TypeError, "whole numbers, got 1.0"),
        ({FIRST: np.array([True, False, True, True])}, TypeError, "whole numbers, got True"),
    ],
)
def test_heads_that_there_are_not_are_named(plain, heads, error, words):
    with pytest.raises(error, match=words):
        prune_heads(*plain, heads)


def test_what_cannot_be_pruned_or_gated_is_refused(plain):
    model, params = plain
    with pytest.raises(NotImplementedError, match="bias=AlibiBias"):
        prune_heads(model.clone(bias=AlibiBias(4)), params, {FIRST: [0]})
    other, theirs = made(functools.partial(GatedDeltaAttention, 4))
    with pytest.raises(NotImplementedError, match="GatedDeltaAttention"):
        prune_heads(other, theirs, {FIRST: [0]})
    rules = masks.rule(lambda t, s, w: t - s <= w, jnp.arange(4)[:, None, None])
    for name in ("mask", "reach"):
        changed = model.clone(**{name: masks.causal() & rules})
        with pytest.raises(NotImplementedError, match=f"beside {name}=.*a part for each head"):
            prune_heads(changed, params, {FIRST: [0]})
    with pytest.raises(ValueError, match=f"params must hold {FIRST} .* they hold params"):
        prune_heads(model, {"params": params}, {FIRST: [0]})
    with pytest.raises(TypeError, match="model must be a SequenceModel, got Dense"):
        prune_heads(nn.Dense(3), params, {FIRST: [0]})
    block = Block(LAYERS["multi-head"]())
    shared = SequenceModel(TokenEmbedding(VOCABULARY, 8), [block] * 2)
    with pytest.raises(NotImplementedError, match=f"several places, {FIRST}, {SECOND}"):
        prune_heads(shared, random_params(shared), {FIRST: [0]})
    with pytest.raises(ValueError, match=r"gates.*4 heads"):
        apply_with_gates(model, params, TOKENS, {FIRST: jnp.ones(3)})
    with pytest.raises(ValueError, match=r"gates.*blocks_9"):
        apply_with_gates(model, params, TOKENS, {"blocks_9": jnp.ones(3)})
    with pytest.raises(ValueError, match="by"):
        ablation(model, params, TOKENS, loss, by="noise")
    with pytest.raises(ValueError, match="orders must have one"):
        removal_curve(model, params, TOKENS, loss, [])
    with pytest.raises(ValueError, match="orders must name each head once"):
        removal_curve(model, params, TOKENS, loss, [[(FIRST, 0), (FIRST, 0)]])
    with pytest.raises(TypeError, match="orders must be lists of heads"):
        removal_curve(model, params, TOKENS, loss, [(FIRST, 0)])
    with pytest.raises(TypeError, match="counts must hold integers"):
        removal_curve(model, params, TOKENS, loss, [[(FIRST, 0)]], counts=[0.5])


def test_a_model_without_gates_is_refused_and_not_answered_with_none():
    model = SequenceModel(TokenEmbedding(VOCABULARY, 8), [Block(SingleHeadAttention(8))])
    params = random_params(model)
    assert heads_of(model, params, TOKENS) == {}
    arguments = model, params, TOKENS, loss
    calls = [
        lambda: importance(*arguments),
        lambda: ablation(*arguments),
        lambda: ablation(*arguments, by="mean", pairs=True),
        lambda: removal_curve(*arguments, [[(FIRST, 0)]]),
    ]
    for call in calls:
        with pytest.raises(NotImplementedError, match=r"heads with gates.*got SequenceModel"):
            call()


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (functools.partial(GatedDeltaAttention, 4), "got GatedDeltaAttention with gated_delta_att"),
        (
            functools.partial(MultiHeadAttention, 4, attention_fn=linear_attention),
            "got MultiHeadAttention with linear_attention",
        ),
    ],
)
def test_layers_without_weights_are_named(make, words):
    with pytest.raises(NotImplementedError, match=words):
        attention_maps(*made(make), TOKENS)


class Repeated(nn.Module):
    """A model whose layers `nn.scan` runs."""

    @nn.compact
    def __call__(self, tokens):
        class Layer(nn.Module):
            @nn.compact
            def __call__(self, x, _):
                layer = nn.MultiHeadDotProductAttention(2, deterministic=True, name="attention")
                return x + layer(x), None

        axes = {"params": 0, "intermediates": 0}
        layers = nn.scan(Layer, variable_axes=axes, split_rngs={"params": True}, length=6)
        x, _ = layers(name="layers")(nn.Embed(VOCABULARY, 8)(tokens), None)
        return nn.Dense(VOCABULARY)(x)


def test_means_of_layers_that_scan_runs_are_over_all_runs():
    model = Repeated()  # As many runs as tokens, which must not be taken for one another.
    params = random_params(model)
    outputs, x = [], params["Embed_0"]["embedding"][TOKENS]
    for i in range(6):
        own = jax.tree.map(lambda leaf, i=i: leaf[i], params["layers"]["attention"])
        layer = nn.MultiHeadDotProductAttention(2, deterministic=True, qkv_features=8)
        identity = {"kernel": jnp.eye(8).reshape(2, 4, 8), "bias": jnp.zeros(8)}
        mixed = layer.apply({"params": own | {"out": identity}}, x)
        outputs.append(mixed.reshape(-1, 2, 4).mean(0))
        x = x + layer.apply({"params": own}, x)
    (found,) = mean_outputs(model, params, TOKENS).values()
    assert_close(found, np.mean(outputs, axis=0), 1e-5)


@pytest.mark.parametrize(
    "norm",
    [
        functools.partial(nn.RMSNorm, use_scale=False, reduction_axes=(-2, -1)),
        functools.partial(nn.LayerNorm, feature_axes=(-2, -1)),
        nn.RMSNorm,
    ],
    ids=["over heads", "a scale for each head", "over a head"],
)
def test_heads_that_are_normed_together_are_not_removed(norm):
    model, params = made(functools.partial(MultiHeadAttention, 4, qk_norm=norm))
    together = norm is not nn.RMSNorm
    with pytest.raises(NotImplementedError, match="qk_norm") if together else nullcontext():
        smaller, fewer = prune_heads(model, params, {FIRST: [0]})
        gates = {FIRST: jnp.array([0.0, 1, 1, 1])}
        want = apply_with_gates(model, params, TOKENS, gates)
        assert_close(smaller.apply({"params": fewer}, TOKENS), want, 1e-5)


def test_a_number_of_a_layer_may_be_an_array():
    model, params = made(functools.partial(MultiHeadAttention, 2, scale=jnp.float32(0.25)))
    plain, _ = made(functools.partial(MultiHeadAttention, 2, scale=0.25))
    jax.tree.map(
        np.testing.assert_array_equal,
        attention_maps(model, params, TOKENS),
        attention_maps(plain, params, TOKENS),
    )
