"""The model: its masks, its parameters, and the effects of its options."""

import functools
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from cases import assert_close
from flax import linen as nn

from attention_jax import (
    MLP,
    Block,
    MultiHeadAttention,
    SequenceModel,
    ShortConvolution,
    SingleHeadAttention,
    TokenEmbedding,
    Unembedding,
    UnitOffsetRMSNorm,
    VectorEmbedding,
    decoding,
    masks,
)
from attention_jax.layers import Dropout
from attention_jax.layers.parts import GatedMLP
from attention_jax.training import words
from attention_jax.training.build import make_model, make_task
from attention_jax.training.config import check, default_config, problems
from attention_jax.training.model import make_sequence_model

VOCAB = 17
TOKENS = jnp.asarray(np.random.default_rng(0).integers(0, VOCAB, (2, 7)), jnp.int32)
VECTORS = jnp.asarray(np.random.default_rng(1).standard_normal((2, 7, 8)), jnp.float32)
SMALL = {"features": 8, "num_heads": 2, "num_layers": 2, "mlp_ratio": 2.0}


def init(model, inputs):
    """Random parameters: those that start at zero would hide a wrong one."""
    rng = np.random.default_rng(0)
    params = jax.eval_shape(model.init, jax.random.key(0), inputs)["params"]
    return jax.tree.map(lambda x: jnp.asarray(rng.normal(0.1, 0.4, x.shape), x.dtype), params)


@functools.lru_cache
def compiled(model, deterministic):
    return jax.jit(functools.partial(model.apply, deterministic=deterministic))


def run(model, params, inputs, *, deterministic=True, **settings):
    return compiled(model, deterministic)({"params": params}, inputs, **settings)


@pytest.mark.parametrize("attention", ["multihead", "selfhead"])
def test_the_smallest_model_is_the_bare_attention_layer(attention):
    heads = {"num_heads": 2} if attention == "multihead" else {}
    model = make_sequence_model(
        features=8, attention=attention, norm="none", residual=False, **heads
    )
    layer = MultiHeadAttention(**heads) if heads else SingleHeadAttention()
    params = init(model, VECTORS)
    want = jax.eval_shape(layer.init, jax.random.key(0), VECTORS)["params"]

    def attention_params(tree):
        """The subtree with the parameters of the layer, wherever the model keeps it."""
        if set(want) <= set(tree):
            return {name: tree[name] for name in want}
        found = [attention_params(x) for x in tree.values() if isinstance(x, dict)]
        return next((x for x in found if x), None)

    assert sum(x.size for x in jax.tree.leaves(params)) == sum(
        x.size for x in jax.tree.leaves(want)
    )
    got = run(model, params, VECTORS)
    assert_close(got, run(layer, attention_params(params), VECTORS), 1e-6)


@pytest.mark.parametrize("tie_embedding", [True, False], ids=["tied", "untied"])
def test_logits_come_at_the_asked_positions_alone(tie_embedding):
    model = make_sequence_model(**SMALL, vocab_size=VOCAB, tie_embedding=tie_embedding, causal=True)
    params = init(model, TOKENS)
    every = run(model, params, TOKENS)
    assert every.shape == (2, 7, VOCAB)
    assert every.dtype == jnp.float32
    asked = jnp.array([[1, 6, 6], [0, 3, 2]])
    some = run(model, params, TOKENS, output_positions=asked)
    assert_close(some, np.take_along_axis(np.asarray(every), asked[..., None], axis=1), 1e-6)


@pytest.mark.parametrize(
    "fields", [{}, {"parallel": True}, {"norm": None, "sum_norm": nn.LayerNorm}]
)
@pytest.mark.parametrize("remat", [False, True])
def test_the_last_block_runs_at_the_asked_positions_alone(fields, remat):
    blocks = [Block(MultiHeadAttention(2), MLP(64), **fields) for _ in range(2)]
    model = SequenceModel(TokenEmbedding(VOCAB, 8), blocks, mask=masks.causal(), remat=remat)
    params = init(model, TOKENS)
    asked = jnp.array([[1, 6, 6], [0, 3, 2]])

    def some(params):
        return run(model, params, TOKENS, output_positions=asked)

    def of_all(params):
        return jnp.take_along_axis(run(model, params, TOKENS), asked[..., None], axis=1)

    assert_close(some(params), of_all(params), 1e-6)
    grads = (jax.grad(lambda params, f=f: (f(params) ** 2).sum())(params) for f in (some, of_all))
    jax.tree.map(lambda x, y: assert_close(x, y, 1e-5), *grads)
    # For each of the 7 - 3 tokens that are left out, in two rows: the MLP's two products of 8 by
    # 64, those of query and out, 8 by 8, and those with 7 keys and values in two heads of 4.
    costs = [jax.jit(f).lower(params).cost_analysis()["flops"] for f in (of_all, some)]
    assert costs[0] - costs[1] >= 2 * 4 * 2 * (2 * 8 * 64 + 2 * 8 * 8 + 2 * 7 * 8)


@pytest.mark.parametrize(("T", "P"), [("t", 2), (7, "p"), ("t", "t")])
def test_an_export_may_leave_the_asked_positions_open(T, P):
    blocks = [Block(MultiHeadAttention(2), MLP(16))]
    model = SequenceModel(TokenEmbedding(VOCAB, 8), blocks, mask=masks.causal())
    params = init(model, TOKENS)
    scope = jax.export.SymbolicScope()
    tokens, places = (
        jax.ShapeDtypeStruct(jax.export.symbolic_shape(f"2, {n}", scope=scope), jnp.int32)
        for n in (T, P)
    )
    call = lambda tokens, places: run(model, params, tokens, output_positions=places)
    exported = jax.export.export(jax.jit(call))(tokens, places)
    asked = jnp.array([[6, 1], [3, 2]]) if P != T else jnp.tile(jnp.arange(7), (2, 1))
    tokens = jnp.asarray(TOKENS, jnp.int32)
    assert_close(exported.call(tokens, asked.astype(jnp.int32)), call(tokens, asked), 1e-6)


def test_continuous_outputs_have_the_asked_width():
    for width in (None, 5):
        model = make_sequence_model(**SMALL, out_features=width)
        out = jax.eval_shape(model.init_with_output, jax.random.key(0), VECTORS)[0]
        assert out.shape == (2, 7, width or 8)


# What a config can choose, each choice at least once. All but the last few are causal.
CHOICES = {
    "softmax": {},
    "selfhead": {"name": "selfhead", "positions": "sinusoidal"},
    "linear, rotary": {"mechanism": "linear", "positions": "rotary"},
    "linear, selfhead": {"mechanism": "linear", "name": "selfhead"},
    "differential, rotary, qk-norm": {
        "mechanism": "differential",
        "positions": "rotary",
        "qk_norm": True,
        "num_kv_heads": 1,
        "head_dim": 8,
    },
    "gated delta, grouped": {"mechanism": "gated_delta", "num_kv_heads": 1},
    "grouped, rotary, softcap, sinks": {
        "num_kv_heads": 1,
        "positions": "rotary",
        "softcap": 5.0,
        "sinks": True,
    },
    "learned, rms, qk-norm": {"positions": "learned", "norm": "rms", "qk_norm": True},
    "alibi, mlp, init": {"positions": "alibi", "mlp_ratio": 2.0, "init_scale": 0.5},
    "relative, no norm, no residual": {
        "positions": "relative",
        "norm": "none",
        "residual": False,
    },
    "window": {"window": 1},
    "short convolution, window": {"short_conv": 3, "window": 1},
    "strided": {"pattern": "strided", "stride": 2},
    "blocks": {"pattern": "blocks", "stride": 2},
    "relative, window, both directions": {
        "positions": "relative",
        "window": 1,
        "causal": False,
    },
    "strided, both directions": {"pattern": "strided", "stride": 2, "causal": False},
}
# A mechanism without a row is tried as the config has it by default.
for name in sorted(words.MLPS.keys() - {"gelu"}):
    CHOICES[name] = {"mlp": name, "mlp_ratio": 2.0}
for name in sorted(
    words.MECHANISMS.keys() - {x.get("mechanism", "dot_product") for x in CHOICES.values()}
):
    CHOICES[name] = {"mechanism": name}
# Which positions one layer lets see which, where that is less than all that causality allows.
SEEN = {
    "window": oracles.window(5, 5, 1),
    "short convolution, window": oracles.window(5, 5, 3),  # 2 back, then 1.
    "strided": oracles.causal(5, 5) & (oracles.window(5, 5, 2) | oracles.strided(5, 5, 2)),
    "blocks": oracles.causal(5, 5) & oracles.blocks(5, 5, 2, 1),
    "relative, window, both directions": oracles.window(5, 5, 1, 1),
    "strided, both directions": oracles.window(5, 5, 2, 2) | oracles.strided(5, 5, 2),
}


def chosen(options):
    """The model that a config with these fields makes."""
    config = default_config()
    config.task.seq_length = 5
    config.model.update({"features": 8, "num_heads": 2, "norm": "layer", "causal": True})
    config.model.update({"residual": True, **options})
    if config.model.name == "selfhead":
        config.model.num_heads = 1
    check(config)
    return make_model(config, make_task(config))


@pytest.mark.parametrize("name", CHOICES)
def test_every_choice_learns_and_sees_what_it_may(name):
    model = chosen(CHOICES[name])
    inputs = VECTORS[:1, :5]
    params = init(model, inputs)

    @jax.jit
    def program(params):
        """A loss, its gradient, and that of every output with respect to every input."""
        run = lambda params, x: model.apply({"params": params}, x)[0].sum(axis=-1)  # [T]
        out, pull_back = jax.vjp(run, params, inputs)
        slopes, jacobian = jax.vmap(pull_back)(jnp.eye(5))
        grads = jax.tree.map(lambda slope: jnp.tensordot(2 * out, slope, 1), slopes)
        return (out**2).sum(), grads, jacobian

    before, grads, jacobian = program(params)
    assert all(np.isfinite(grad).all() for grad in jax.tree.leaves(grads))
    smaller = jax.tree.map(lambda p, g: p - 1e-4 * g, params, grads)
    assert program(smaller)[0] < before
    influence = np.abs(jacobian[:, 0]).sum(axis=-1) > 0  # [T, T]
    want = oracles.causal(5, 5) if model.mask is not None else np.ones((5, 5), bool)
    np.testing.assert_array_equal(influence, SEEN.get(name, want))


def test_every_name_of_the_config_is_a_choice():
    defaults = default_config().model.to_dict()
    taken = [{**defaults, **options} for options in CHOICES.values()]
    for field, names in (
        ("name", words.ATTENTIONS),
        ("mechanism", words.MECHANISMS),
        ("pattern", words.PATTERNS),
        ("positions", words.POSITIONS),
        ("mlp", words.MLPS),
    ):
        assert {options[field] for options in taken} == set(names), field
    for field, names in (("norm", words.NORMS), ("mechanism", words.MECHANISMS)):
        for stranger in (*names, "nothing"):
            config = default_config()
            config.model[field] = stranger
            known = not [path for path, _ in problems(config) if path == f"model.{field}"]
            assert known == (stranger in names)


def test_a_later_layer_of_differential_attention_takes_more_away():
    model = make_sequence_model(8, num_layers=3, num_heads=2, mechanism="differential")
    layers = [block.attention for block in model.blocks]
    # 0.8 - 0.6 exp(-0.3 l) for l = 0, 1, 2.
    np.testing.assert_allclose([x.lambda_init for x in layers], [0.2, 0.355509, 0.470713], 1e-5)


def test_swiglu_is_that_of_the_paper():
    """Shazeer 2020, equation 6, with Swish_1(x) = x / (1 + exp(-x))."""
    model = make_sequence_model(8, num_heads=2, mlp_ratio=2.0, mlp="swiglu")
    params = init(model, VECTORS)["blocks_0"]["mlp"]
    x = oracles.f64(VECTORS)
    gate, up, down = (oracles.f64(params[name]["kernel"]) for name in ("gate", "in", "out"))
    want = (x @ gate / (1 + np.exp(-(x @ gate))) * (x @ up)) @ down
    np.testing.assert_allclose(GatedMLP(16).apply({"params": params}, VECTORS), want, atol=1e-5)
    assert all(set(x) == {"kernel"} for x in params.values())


def test_a_word_for_an_mlp_needs_one():
    with pytest.raises(ValueError, match=r"mlp='swiglu'.*mlp_ratio"):
        make_sequence_model(8, num_heads=2, mlp="swiglu")


def test_a_mechanism_is_a_line_and_what_it_lacks_is_refused(monkeypatch):
    """Every position takes the mean of all values."""

    def mean_attention(query, key, value, *, mask=None):
        return jnp.broadcast_to(value.mean(axis=-3, keepdims=True), value.shape)

    layer = functools.partial(MultiHeadAttention, attention_fn=mean_attention)
    monkeypatch.setitem(words.MECHANISMS, "mean", lambda depth: layer)
    make = functools.partial(make_sequence_model, 8, num_heads=2, mechanism="mean", norm="none")
    model = make(residual=False)
    out = run(model, init(model, VECTORS), VECTORS)
    np.testing.assert_allclose(out, out[:, :1] + 0 * out)
    for options, words_of_error in (
        ({"softcap": 2.0}, "mean_attention has no softcap"),
        ({"sinks": True}, "mean_attention has no sinks"),
        ({"positions": "alibi"}, "mean_attention has no bias"),
        ({"dropout_rate": 0.5}, "mean_attention has no dropout_rate"),
    ):
        with pytest.raises(NotImplementedError, match=words_of_error):
            make(**options).init(jax.random.key(0), VECTORS)
    monkeypatch.setitem(
        words.MECHANISMS, "mean", lambda depth: functools.partial(layer, qk_norm=False)
    )
    with pytest.raises(NotImplementedError, match="mechanism='mean' has no qk_norm=True"):
        make(qk_norm=True)


def test_parts_are_values():
    """The model of words, put together by hand from other parts of the same kind."""

    class Halved(nn.Module):
        layer: nn.Module

        def __call__(self, x):
            return self.layer(x) / 2

    def model(make_mlp):
        blocks = [Block(MultiHeadAttention(2), make_mlp(), nn.RMSNorm) for _ in range(2)]
        return SequenceModel(TokenEmbedding(VOCAB, 8), blocks, mask=masks.causal(), norm=None)

    named = make_sequence_model(**SMALL, vocab_size=VOCAB, causal=True, norm="rms")
    params = init(named, TOKENS)
    scale = params.pop("last_norm")["scale"]
    plain = model(lambda: MLP(16))
    assert_close(
        run(plain.clone(norm=nn.RMSNorm), {**params, "last_norm": {"scale": scale}}, TOKENS),
        run(named, {**params, "last_norm": {"scale": scale}}, TOKENS),
        1e-6,
    )
    for name in ("blocks_0", "blocks_1"):
        block = params[name]
        params[name] = {**block, "mlp": {"layer": block["mlp"]}}
    half = run(model(lambda: Halved(MLP(16))), params, TOKENS)
    for name in ("blocks_0", "blocks_1"):
        mlp = params[name]["mlp"]["layer"]
        params[name]["mlp"] = {**mlp, "out": jax.tree.map(lambda x: x / 2, mlp["out"])}
    assert_close(half, run(plain, params, TOKENS), 1e-6)


def test_a_model_of_words_is_that_of_their_parts():
    options = dict(features=8, num_heads=2, vocab_size=5, positions="rotary", mlp_ratio=2.0)
    named = SequenceModel(**options)
    assert isinstance(named, SequenceModel)
    tokens = jnp.arange(5)[None]
    found = [
        model.init_with_output(jax.random.key(0), tokens)
        for model in (named, named.clone(), make_sequence_model(**options))
    ]
    for other in found[1:]:
        jax.tree.map(np.testing.assert_array_equal, found[0], other)
    with pytest.raises(TypeError, match="nheads"):
        SequenceModel(features=8, nheads=2)
    with pytest.raises(TypeError, match="embedding"):
        SequenceModel()
    assert SequenceModel(**options, name="lm").name == "lm"

    class Outer(nn.Module):
        @nn.compact
        def __call__(self, tokens):
            return SequenceModel(**options, name="lm")(tokens)

    jax.eval_shape(Outer().init, jax.random.key(0), tokens)
    with pytest.raises(TypeError, match="features"):  # It is no field, so flax must not drop remat.
        nn.remat(SequenceModel)(**options)
    parameters = inspect.signature(SequenceModel).parameters
    assert list(parameters)[:2] == ["embedding", "blocks"]


def test_norms_stand_where_their_fields_say():
    """By hand from the layers' own outputs."""
    block = Block(MultiHeadAttention(2), MLP(16), norm=None, sum_norm=nn.LayerNorm)
    params = init(block, VECTORS)
    part = lambda layer, name, x: layer.apply({"params": params[name]}, x)
    attend, mlp, norm = MultiHeadAttention(2), MLP(16), nn.LayerNorm()
    x = VECTORS  # The original Transformer: norm(x + f(x)).
    x = part(norm, "attention_sum_norm", x + part(attend, "attention", x))
    x = part(norm, "mlp_sum_norm", x + part(mlp, "mlp", x))
    assert_close(run(block, params, VECTORS), x, 1e-5)

    block = Block(MultiHeadAttention(2), MLP(16), norm=None, output_norm=nn.LayerNorm)
    params = init(block, VECTORS)
    x = VECTORS  # OLMo 2: x + norm(f(x)).
    x = x + part(norm, "attention_output_norm", part(attend, "attention", x))
    x = x + part(norm, "mlp_output_norm", part(mlp, "mlp", x))
    assert_close(run(block, params, VECTORS), x, 1e-5)

    block = Block(MultiHeadAttention(2), MLP(16), parallel=True)
    params = init(block, VECTORS)
    x = VECTORS  # GPT-NeoX: both read the same x.
    attended = part(attend, "attention", part(norm, "attention_norm", x))
    x = x + attended + part(mlp, "mlp", part(norm, "mlp_norm", x))
    assert_close(run(block, params, VECTORS), x, 1e-5)
    with pytest.raises(ValueError, match=r"parallel.*mlp"):
        init(Block(MultiHeadAttention(2), parallel=True), VECTORS)
    with pytest.raises(TypeError, match="sum_norm must make a norm"):
        init(Block(MultiHeadAttention(2), sum_norm=nn.LayerNorm()), VECTORS)


def test_each_block_has_a_reach_of_its_own():
    blocks = [Block(MultiHeadAttention(2)) for _ in range(2)]
    model = SequenceModel(
        VectorEmbedding(8),
        blocks,
        mask=masks.causal(),
        reach=[masks.window(1), None],
        embedding_norm=nn.LayerNorm,
    )
    params = init(model, VECTORS)
    x = nn.LayerNorm().apply({"params": params["embedding_norm"]}, VECTORS)
    for name, mask in (("blocks_0", masks.window(1)), ("blocks_1", masks.causal())):
        x = blocks[0].apply({"params": params[name]}, x, mask)
    x = nn.LayerNorm().apply({"params": params["last_norm"]}, x)
    assert_close(run(model, params, VECTORS), x, 1e-5)
    with pytest.raises(ValueError, match=r"reach.*2 blocks, got 1"):
        init(model.clone(reach=[None]), VECTORS)
    with pytest.raises(TypeError, match="reach"):
        init(model.clone(reach=[3, None]), VECTORS)


def test_embeddings_are_scaled_and_logits_capped():
    model = SequenceModel(
        TokenEmbedding(VOCAB, 8, scale=3.0, softcap=0.5), [Block(MultiHeadAttention(2))], norm=None
    )
    params = init(model, TOKENS)
    plain = model.clone(embedding=TokenEmbedding(VOCAB, 8))
    table = params["embedding"]["embedding"]
    inner = SequenceModel(VectorEmbedding(8), model.blocks, norm=None)
    x = run(inner, {"blocks_0": params["blocks_0"]}, 3 * table[TOKENS])
    assert_close(run(model, params, TOKENS), 0.5 * np.tanh(x @ table.T / 0.5), 1e-5)
    assert np.abs(run(plain, params, TOKENS) - run(model, params, TOKENS)).max() > 1e-3
    untied = plain.clone(head=Unembedding(VOCAB, use_bias=False, softcap=0.5))
    params = init(untied, TOKENS)
    free = run(untied.clone(head=Unembedding(VOCAB, use_bias=False)), params, TOKENS)
    assert_close(run(untied, params, TOKENS), 0.5 * np.tanh(free / 0.5), 1e-5)
    with pytest.raises(ValueError, match="softcap"):
        init(plain.clone(embedding=TokenEmbedding(VOCAB, 8, softcap=-1.0)), TOKENS)


def test_a_scale_from_zeros_is_an_offset_of_one():
    x, norm = 5 * VECTORS, UnitOffsetRMSNorm(epsilon=0.1)
    params = norm.init(jax.random.key(0), x)
    want = x / np.sqrt((x**2).mean(-1, keepdims=True) + 0.1)
    assert_close(norm.apply(params, x), want, 1e-5)
    scale = jnp.arange(8) / 8
    assert_close(norm.apply({"params": {"scale": scale}}, x), want * (1 + scale), 1e-5)
    half = UnitOffsetRMSNorm(dtype=jnp.bfloat16, param_dtype=jnp.bfloat16)
    assert jax.eval_shape(half.init_with_output, jax.random.key(0), x)[0].dtype == jnp.bfloat16


def test_a_block_that_is_there_twice_has_the_same_parameters():
    block = Block(MultiHeadAttention(2))
    twice = SequenceModel(VectorEmbedding(8), (block, block), mask=masks.causal())
    params = init(twice, VECTORS)
    assert set(params) == {"blocks_0", "last_norm"}
    other = SequenceModel(VectorEmbedding(8), tuple(Block(MultiHeadAttention(2)) for _ in "ab"))
    same = {**params, "blocks_1": params["blocks_0"]}
    want = run(other.clone(mask=masks.causal()), same, VECTORS)
    # Not `run`: to flax, models that differ in what they share are equal, so `jit` takes the other.
    assert_close(twice.apply({"params": params}, VECTORS), want, 1e-6)
    with pytest.raises(NotImplementedError, match="blocks must not share"):
        decoding(twice)


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"blocks": [MultiHeadAttention(2)]}, TypeError, "blocks must be Blocks"),
        ({"mask": jnp.ones((7, 7), bool)}, TypeError, r"mask must be a masks\.\* value"),
        ({"reach": 3}, TypeError, "reach must be .* got 3"),
        ({"norm": "rms"}, TypeError, "norm must be a function, got 'rms'"),
        ({"head": 5}, TypeError, "head must be a function, got 5"),
        ({"bias": "alibi"}, TypeError, "bias must be a function, got 'alibi'"),
        ({"remat": 1}, TypeError, "remat must be True, False or a policy .* got 1"),
    ],
)
def test_what_is_no_part_is_refused(options, error, words):
    parts = {"embedding": VectorEmbedding(8), "blocks": (Block(MultiHeadAttention(2)),)}
    with pytest.raises(error, match=words):
        SequenceModel(**parts | options).init(jax.random.key(0), VECTORS)


def test_a_layer_without_a_cache_does_not_decode():
    model = SequenceModel(VectorEmbedding(8), (Block(SingleHeadAttention()),), mask=masks.causal())
    with pytest.raises(NotImplementedError, match="SingleHeadAttention has no cache"):
        decoding(model)


def test_decoding_needs_a_mask_that_hides_the_future():
    model = SequenceModel(VectorEmbedding(8), (Block(MultiHeadAttention(2)),))
    for mask in (None, masks.window(2, 1), ~masks.causal()):
        with pytest.raises(ValueError, match=r"decode=True needs mask=masks\.causal"):
            decoding(model.clone(mask=mask)).init(jax.random.key(0), VECTORS)


def test_init_scale_is_of_what_writes_to_the_residual_stream():
    for attention in ("multihead", "selfhead"):
        heads = {"num_heads": 2} if attention == "multihead" else {}
        options = {"mlp_ratio": 1.0, "causal": True, "short_conv": 2} | heads
        make = functools.partial(make_sequence_model, 8, attention=attention, **options)
        draw = lambda scale, make=make: make(init_scale=scale).init(jax.random.key(0), VECTORS)
        # The scale may be traced, so a sweep over it is one program.
        params = jax.jit(jax.vmap(draw))(jnp.array([1.0, 0.5]))["params"]
        for path, leaf in jax.tree.leaves_with_path(params):
            words = [entry.key for entry in path]
            scaled = words[-1] == "kernel" and words[-2] in ("conv", "out")
            assert_close(leaf[1], leaf[0] * (0.5 if scaled else 1), 1e-6, str(words))


def test_a_short_convolution_sums_what_came_just_before():
    x = np.random.default_rng(0).normal(size=(2, 5, 4))
    layer = ShortConvolution(3)
    variables = layer.init(jax.random.key(0), x)
    kernel = np.asarray(variables["params"]["kernel"], np.float64)
    want = np.zeros_like(x)
    for t in range(5):
        for k in range(min(3, t + 1)):
            want[:, t] += kernel[2 - k] * x[:, t - k]
    assert_close(layer.apply(variables, x), want, 1e-6)
    half = ShortConvolution(3, dtype=jnp.bfloat16).apply(variables, x)
    assert half.dtype == jnp.bfloat16
    model = make_sequence_model(4, num_heads=1, causal=True, short_conv=3)
    with pytest.raises(NotImplementedError, match=r"width=3\) sums"):
        model.init(jax.random.key(0), x, mask=masks.key_lengths(jnp.array([5, 3])))


def test_a_model_that_is_not_causal_sees_everything():
    model = make_sequence_model(**{**SMALL, "num_layers": 1}, window=None)
    params = init(model, VECTORS[:1])
    attend = lambda x: model.apply({"params": params}, x[None])[0].sum(axis=-1)
    influence = np.abs(jax.jit(jax.jacobian(attend))(VECTORS[0])).sum(axis=-1)
    assert (influence > 0).all()


def test_positions_are_what_tells_orders_apart():
    order = np.array([3, 0, 6, 1, 2, 5, 4])
    for kind in words.POSITIONS:
        model = make_sequence_model(
            **SMALL, positions=kind, **({"max_length": 7} if kind == "learned" else {})
        )
        params = init(model, VECTORS)
        out, moved = (run(model, params, x) for x in (VECTORS, VECTORS[:, order]))
        if kind == "none":
            assert_close(moved, out[:, order], 1e-5)
        else:
            assert abs(moved - out[:, order]).max() > 1e-3, kind


def test_relative_positions_tell_future_distances_apart_where_there_is_a_future():
    model = make_sequence_model(**{**SMALL, "num_layers": 1}, positions="relative")
    params = init(model, VECTORS)
    swapped = VECTORS[:, jnp.array([0, 1, 2, 5, 4, 3, 6])]
    out, other = (run(model, params, x)[:, 0] for x in (VECTORS, swapped))
    assert abs(out - other).max() > 1e-3


@pytest.mark.parametrize(
    "policy",
    [True, pytest.param(jax.checkpoint_policies.dots_saveable, marks=pytest.mark.slow)],
    ids=["True", "dots_saveable"],
)
def test_rematerialisation_changes_memory_alone(policy):
    options = {"causal": True, "positions": "relative", "dropout_rate": 0.2}
    plain = make_sequence_model(**{**SMALL, "num_layers": 1}, **options)
    remat = plain.clone(remat=policy)
    params = init(plain, VECTORS)
    assert jax.tree.structure(params) == jax.tree.structure(
        jax.eval_shape(remat.init, jax.random.key(0), VECTORS)["params"]
    )

    def grads(model):
        def loss(params):
            rngs = {"dropout": jax.random.key(0)}
            out = model.apply({"params": params}, VECTORS, deterministic=False, rngs=rngs)
            return (out**2).mean()

        return jax.jit(jax.value_and_grad(loss))(params)

    for got, want in zip(jax.tree.leaves(grads(remat)), jax.tree.leaves(grads(plain)), strict=True):
        assert_close(got, want, 1e-5)


def test_policies_store_less():
    def stored(remat):
        model = make_sequence_model(**SMALL, causal=True, remat=remat)
        params = jax.eval_shape(model.init, jax.random.key(0), VECTORS)["params"]
        run = lambda params: model.apply({"params": params}, VECTORS).sum()
        residuals = jax.eval_shape(lambda params: jax.vjp(run, params)[1], params)
        return sum(x.size for x in jax.tree.leaves(residuals))

    sizes = [
        stored(remat)
        for remat in ("none", "dots_saveable", "dots_with_no_batch_dims_saveable", "full")
    ]
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[0] > 1.5 * sizes[-1]


def test_a_mask_hides_padding_from_every_layer():
    model = make_sequence_model(**SMALL, vocab_size=VOCAB)
    params = init(model, TOKENS)
    mask = masks.key_lengths(jnp.array([4, 4]))
    out = run(model, params, TOKENS, mask=mask)
    other = run(model, params, TOKENS.at[:, 4:].set(3), mask=mask)
    np.testing.assert_array_equal(out[:, :4], other[:, :4])
    assert_close(out[:, :4], run(model, params, TOKENS[:, :4]), 1e-5)
    # Together with the model's own causality, not instead of it.
    causal = model.clone(mask=masks.causal())
    out = run(causal, params, TOKENS, mask=mask)
    assert_close(out[:, :3], run(causal, params, TOKENS[:, :3]), 1e-5)


def test_bfloat16_computes_with_float32_parameters_and_logits():
    options = {**SMALL, "vocab_size": VOCAB, "causal": True, "positions": "rotary"}
    model = make_sequence_model(**options, dtype=jnp.bfloat16)
    params = init(model, TOKENS)
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype("float32")}

    @jax.jit
    def value_and_grad(params):
        loss = lambda params: (model.apply({"params": params}, TOKENS) ** 2).mean()
        return jax.value_and_grad(loss)(params)

    out = jax.eval_shape(model.apply, {"params": params}, TOKENS)
    assert out.dtype == jnp.float32
    loss, grads = value_and_grad(params)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(grads))
    exact = (run(make_sequence_model(**options), params, TOKENS) ** 2).mean()
    assert abs(loss - exact) < 0.1 * exact


def test_dropout_is_off_unless_asked_for():
    options = {**SMALL, "num_layers": 1, "vocab_size": VOCAB}
    model = make_sequence_model(**options, dropout_rate=0.5)
    params = init(model, TOKENS)
    plain = run(make_sequence_model(**options), params, TOKENS)
    assert_close(run(model, params, TOKENS), plain, 1e-6)
    dropped = [
        run(model, params, TOKENS, deterministic=False, rngs={"dropout": jax.random.key(seed)})
        for seed in (0, 0, 1)
    ]
    np.testing.assert_array_equal(dropped[0], dropped[1])
    assert abs(dropped[0] - dropped[2]).max() > 1e-3
    assert abs(dropped[0] - plain).max() > 1e-3


@pytest.mark.parametrize("kind", ["threefry2x32", "rbg", "unsafe_rbg"])
def test_dropout_is_drawn_for_every_number_with_a_key_of_any_kind(kind):
    def kept(rng, rows=4):
        layer = Dropout(0.5)
        return layer.apply({}, jnp.ones((rows, 5, 64)), deterministic=False, rngs={"dropout": rng})

    keys = jax.random.split(jax.random.key(0, impl=kind), 2)
    alone = [kept(key) for key in keys]
    # Keys beside a key, rows beside a row, and defaults of JAX make no difference.
    np.testing.assert_array_equal(jax.vmap(kept)(keys), alone)
    np.testing.assert_array_equal(kept(keys[0], rows=2), alone[0][:2])
    with jax.default_prng_impl("rbg"), jax.threefry_partitionable(False):
        np.testing.assert_array_equal(kept(keys[0]), alone[0])
    assert len(np.unique(np.reshape(alone, (-1, 64)), axis=0)) == 2 * 4 * 5
    if kind == "threefry2x32":
        theirs = nn.Dropout(0.5, deterministic=False)
        want = theirs.apply({}, jnp.ones((4, 5, 64)), rngs={"dropout": keys[0]})
        np.testing.assert_array_equal(alone[0], want)


@pytest.mark.parametrize(
    ("options", "inputs", "error", "word"),
    [
        ({"attention": "manyhead"}, VECTORS, ValueError, "attention.*manyhead"),
        ({"norm": "batch"}, VECTORS, ValueError, "norm.*batch"),
        ({"positions": "absolute"}, VECTORS, ValueError, "positions.*absolute"),
        ({"positions": "learned"}, VECTORS, ValueError, "max_length"),
        ({"positions": "learned", "max_length": 5}, VECTORS, ValueError, "max_length|5"),
        ({"vocab_size": VOCAB}, VECTORS, (TypeError, ValueError), "inputs"),
        ({}, TOKENS, (TypeError, ValueError), "inputs"),
        ({"num_heads": 3}, VECTORS, ValueError, "num_heads"),
        ({"num_kv_heads": 3, "num_heads": 4}, VECTORS, ValueError, "num_kv_heads"),
        ({}, VECTORS[0, 0], ValueError, r"inputs.*\(8,\)"),
        # What would be without effect.
        ({"vocab_size": VOCAB, "out_features": 5}, TOKENS, ValueError, "out_features.*5"),
        ({"tie_embedding": False}, VECTORS, ValueError, "tie_embedding.*vocab_size"),
        ({"max_length": 7}, VECTORS, NotImplementedError, "none.*max_length=7"),
        (
            {"positions": "rotary", "max_length": 7},
            VECTORS,
            NotImplementedError,
            "rotary.*max_length=7",
        ),
        ({"stride": 3}, VECTORS, NotImplementedError, "full.*stride=3"),
        ({"attention": "selfhead"}, VECTORS, NotImplementedError, "selfhead.*num_heads=2"),
        (
            {"attention": "selfhead", "num_heads": None, "num_kv_heads": 2},
            VECTORS,
            NotImplementedError,
            "selfhead.*num_kv_heads=2",
        ),
        # Out of range.
        ({"num_layers": -1}, VECTORS, ValueError, "num_layers.*-1"),
        ({"num_layers": 0}, VECTORS, ValueError, "num_layers.*0"),
        ({"mlp_ratio": 0.01}, VECTORS, ValueError, "mlp_ratio=0.01.*features=8"),
        ({"mlp_ratio": -1.0}, VECTORS, ValueError, "mlp_ratio=-1"),
        ({"mlp_ratio": float("nan")}, VECTORS, ValueError, "mlp_ratio=nan"),
        ({"window": -1}, VECTORS, ValueError, "window.*-1"),
        ({"window": 1.5}, VECTORS, TypeError, "window.*1.5"),
        ({"softcap": -1.0}, VECTORS, ValueError, "softcap.*-1"),
        ({"pattern": "blocks"}, VECTORS, ValueError, "blocks.*needs stride"),
        ({"pattern": "blocks", "stride": 0}, VECTORS, ValueError, "stride.*0"),
        (
            {"pattern": "blocks", "stride": 2, "window": 1},
            VECTORS,
            NotImplementedError,
            "blocks.*window=1",
        ),
        ({"pattern": "holes"}, VECTORS, ValueError, "pattern.*holes"),
        ({"mechanism": "hyena"}, VECTORS, ValueError, "mechanism.*hyena"),
        (
            {"positions": "sinusoidal", "features": 7},
            VECTORS[..., :7],
            ValueError,
            "features.*even.*7",
        ),
        ({"short_conv": -1, "causal": True}, VECTORS, ValueError, "short_conv.*-1"),
        ({"short_conv": 3}, VECTORS, NotImplementedError, "ShortConv.*causal"),
        # What a mechanism cannot honour.
        ({"mechanism": "linear", "softcap": 2.0}, VECTORS, NotImplementedError, "linear.*softcap"),
        ({"mechanism": "linear", "window": 2}, VECTORS, NotImplementedError, r"linear.*window\(2"),
        (
            {"mechanism": "linear", "positions": "alibi"},
            VECTORS,
            NotImplementedError,
            "linear.*alibi",
        ),
        ({"mechanism": "gated_delta"}, VECTORS, NotImplementedError, "gated_delta.*causal"),
        (
            {"mechanism": "gated_delta", "causal": True, "positions": "rotary"},
            VECTORS,
            NotImplementedError,
            "gated_delta.*rotary=True",
        ),
        (
            {"attention": "selfhead", "num_heads": None, "causal": True, "decode": True},
            VECTORS,
            NotImplementedError,
            "selfhead.*decode=True",
        ),
        (
            {"mechanism": "differential", "attention": "selfhead", "num_heads": None},
            VECTORS,
            NotImplementedError,
            "selfhead.*Differential",
        ),
        (
            {"attention": "selfhead", "num_heads": None, "sinks": True},
            VECTORS,
            NotImplementedError,
            "selfhead.*sinks=True",
        ),
        ({"mechanism": "differential", "features": 6}, VECTORS[..., :6], ValueError, "even.*3"),
    ],
)
def test_a_model_that_cannot_be_is_refused(options, inputs, error, word):
    start = lambda: make_sequence_model(**{**SMALL, **options}).init(jax.random.key(0), inputs)
    with pytest.raises(error, match=word) as refusal:
        jax.eval_shape(start)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({"output_positions": jnp.zeros((2, 3))}, TypeError, "output_positions.*float32"),
        ({"output_positions": jnp.array(3)}, ValueError, "output_positions"),
        ({"output_positions": jnp.zeros(3, int)}, ValueError, r"output_pos.*\(2,\).*\(3,\)"),
        ({"output_positions": jnp.zeros((3, 1), int)}, ValueError, r"output_pos.*\(2,\).*\(3, 1\)"),
        ({"lengths": jnp.array([3, 4])}, ValueError, "lengths.*decode"),
    ],
)
@pytest.mark.parametrize("attention", ["multihead", "selfhead"])
def test_a_call_that_cannot_be_is_refused(attention, arguments, error, words):
    heads = {"num_heads": 2} if attention == "multihead" else {}
    model = make_sequence_model(8, attention=attention, **heads)
    with pytest.raises(error, match=words) as refusal:
        jax.eval_shape(functools.partial(model.init, **arguments), jax.random.key(0), VECTORS)
    assert "\n" not in str(refusal.value)


def test_padding_needs_no_row_of_the_table():
    model = make_sequence_model(
        8, num_heads=2, vocab_size=5, causal=True, positions="learned", max_length=4
    )
    tokens = jnp.array([[1, 2, 3, 4]])
    decoder = decoding(model)
    variables = decoder.init(jax.random.key(0), tokens)
    params = {"params": variables["params"]}
    _, state = decoder.apply(variables, tokens[:, :2], mutable=["cache"])
    padded = jnp.array([[3, 4, 0, 0]])
    out, _ = decoder.apply({**params, **state}, padded, lengths=jnp.array([2]), mutable=["cache"])
    np.testing.assert_allclose(out[:, :2], model.apply(params, tokens)[:, 2:], atol=1e-5)


def test_a_convolution_decodes_in_any_portions_and_rows_of_other_lengths():
    x = np.random.default_rng(0).normal(size=(2, 7, 4)).astype(np.float32)
    layer = ShortConvolution(4)
    params = {"params": layer.init(jax.random.key(0), x)["params"]}
    want = layer.apply(params, x)
    decoder = layer.clone(decode=True)
    start = decoder.init(jax.random.key(0), x)["cache"]
    assert jax.tree.map(np.shape, start) == {"inputs": (2, 3, 4)}
    step = jax.jit(functools.partial(decoder.apply, mutable=["cache"]))
    for portions in ([7], [1] * 7, [2, 5], [5, 0, 1, 1]):
        cache, outs = start, []
        for part in np.split(x, np.cumsum(portions)[:-1], axis=1):
            out, state = step({**params, "cache": cache}, part)
            cache = state["cache"]
            outs.append(out)
        assert_close(np.concatenate(outs, 1), want, 1e-6)
    # Row 0 takes 1 token, then 3; row 1 takes 3, then 2. What pads them may be no number.
    cache, taken = start, np.array([0, 0])
    for lengths in np.array([[1, 3], [3, 2]]):
        padded = np.full((2, 3, 4), np.nan, np.float32)
        for row, (begin, length) in enumerate(zip(taken, lengths, strict=True)):
            padded[row, :length] = x[row, begin : begin + length]
        out, state = step({**params, "cache": cache}, padded, lengths=lengths)
        cache = state["cache"]
        for row, (begin, length) in enumerate(zip(taken, lengths, strict=True)):
            assert_close(out[row, :length], want[row, begin : begin + length], 1e-6)
        taken += lengths
    refused, state = step({**params, "cache": cache}, padded, lengths=jnp.array([4, 1]))
    assert np.isnan(refused[0]).all()
    np.testing.assert_array_equal(state["cache"]["inputs"][0], cache["inputs"][0])


@pytest.mark.parametrize("options", [{}, {"short_conv": 3}], ids=["plain", "convolution"])
def test_a_refused_call_moves_no_position(options):
    options = {"vocab_size": 5, "causal": True, "positions": "sinusoidal"} | options
    model = make_sequence_model(8, num_heads=2, **options)
    tokens = jnp.array([[1, 2, 3, 4]])
    params = model.init(jax.random.key(0), tokens)
    decoder = decoding(model)
    cache = decoder.init(jax.random.key(0), tokens)["cache"]
    step = jax.jit(lambda c, x: decoder.apply({**params, "cache": c}, x, mutable=["cache"]))
    _, state = step(cache, tokens[:, :3])
    refused, state = step(state["cache"], tokens[:, 2:])
    last, _ = step(state["cache"], tokens[:, 3:])
    assert jnp.isnan(refused).all()
    np.testing.assert_allclose(last[:, 0], model.apply(params, tokens)[:, 3], atol=1e-5)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Block(MultiHeadAttention), "attention.*MultiHeadAttention"),
        (lambda: Block(MultiHeadAttention(2), MLP), "mlp.*MLP"),
        (lambda: Block(MultiHeadAttention(2), norm=nn.LayerNorm()), "norm.*LayerNorm"),
        (lambda: SequenceModel(VectorEmbedding(8), Block(MultiHeadAttention(2))), "blocks"),
        (lambda: SequenceModel(nn.Dense(8), [Block(MultiHeadAttention(2))]), "head.*Dense"),
        (lambda: Block(MultiHeadAttention(2, learnt="offset")), "learnt.*'offset'"),
    ],
)
def test_a_class_in_the_place_of_a_layer_is_named(make, words):
    with pytest.raises(TypeError, match=words):
        make().init(jax.random.key(0), VECTORS)
