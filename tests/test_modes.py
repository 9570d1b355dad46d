"""The modes of JAX that forbid something, look for something or change types: all of the package
does the same under each. Numbers are computed for a few pieces; `pytest -m slow
tests/test_modes.py` computes those of all."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import Sizes, assert_close, random_mask, random_qkv

from attention_jax import (
    DifferentialAttention,
    GatedDeltaAttention,
    MultiHeadAttention,
    SingleHeadAttention,
    attention_weights,
    biases,
    differential_attention,
    dot_product_attention,
    gated_delta_attention,
    linear_attention,
    masks,
    positions,
)
from attention_jax.interop.flax import attention_fn
from attention_jax.tasks import TASKS
from attention_jax.training import build
from attention_jax.training.config import default_config
from attention_jax.training.model import make_sequence_model

SIZES = Sizes(N=4, K=2, H=8, V=3)  # B = 2, T = 5, S = 7.
QKV = QUERY, KEY, VALUE = random_qkv(SIZES)
HALVES = QUERY.astype(jnp.bfloat16), KEY, VALUE.astype(jnp.float16)
IDS_T, IDS_S = np.array([[0, 0, 1, 1, 1], [0, 1, 1, 2, 2]]), np.array([[0, 0, 1, 1, 2, 2, 2]] * 2)
OFFSETS, LENGTHS = np.array([1, 0]), np.array([3, 0])
VISIBLE = random_mask(2, 1, 5, 7)
HOLES = np.where(VISIBLE, 0.0, -np.inf).astype(np.float32)
INPUTS = np.random.default_rng(0).standard_normal((2, 5, 8), np.float32)
TOKENS = np.random.default_rng(0).integers(0, 7, (2, 6), np.int32)
RNG = functools.partial(jax.random.key, impl="threefry2x32")


def normal(*shape, seed=1):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


MASKS = {
    "causal": masks.causal(),
    "causal, end": masks.causal("end"),
    "causal, offsets": masks.causal(OFFSETS),
    "window": masks.window(1, 2),
    "strided": masks.strided(2, OFFSETS),
    "blocks": masks.blocks(2, summary=1),
    "segments": masks.segments(IDS_T, IDS_S),
    "key_lengths": masks.key_lengths(LENGTHS),
    "query_lengths": masks.query_lengths(LENGTHS),
    "dense": masks.dense(VISIBLE),
    "array": VISIBLE,
    "and": masks.causal() & masks.key_lengths(LENGTHS),
    "or": masks.window(1) | masks.segments(IDS_T[0], IDS_S[0]) | masks.key_lengths(LENGTHS),
    "not": ~masks.key_lengths(LENGTHS) & masks.causal(OFFSETS),
    "shifted": masks.shifted(masks.segments(IDS_S), OFFSETS),
}
# Of each, how it is made of an array, and the shape of that.
BIASES = {
    "alibi": (biases.alibi, (4,)),
    "alibi, offsets": (functools.partial(biases.alibi, offset=OFFSETS), (4,)),
    "relative": (biases.relative, (32, 4)),
    "relative, offsets": (
        functools.partial(biases.relative, bidirectional=False, offset=OFFSETS),
        (32, 4),
    ),
    "array": (lambda x: x, (2, 4, 5, 7)),
    "array of heads": (lambda x: x, (4, 1, 7)),
    "array of keys": (lambda x: x, (7,)),
    "sum": (lambda x: biases.alibi(4, offset=OFFSETS) + x, (4, 5, 7)),
    "shifted": (lambda x: biases.shifted(biases.alibi(4) + x, OFFSETS), (5, 7)),
    "holes": (lambda x: biases.as_bias(x) + HOLES, (4, 5, 7)),
}
SETTINGS = {
    "scale": {"scale": np.float32(0.3)},
    "softcap": {"softcap": np.float32(2.0)},
    "sinks": {"sinks": np.arange(4, dtype=np.float32)},
    "dropout": {"dropout_rate": np.float32(0.3), "dropout_rng": RNG(0)},
    "residual": {"return_residual": True, "mask": masks.key_lengths(LENGTHS)},
}


def with_gradients(function, *arrays):
    """Results, and the gradients of a projection of them."""
    out, pull_back = jax.vjp(function, *arrays)
    cotangent = jax.tree.map(lambda x: jnp.cos(jnp.arange(x.size)).reshape(x.shape), out)
    return out, pull_back(jax.tree.map(lambda x, y: x.astype(y.dtype), cotangent, out))


def piece(function, *arrays):
    # Under `jit` some rules of derivatives are traced when the function itself has been left.
    return functools.partial(with_gradients, jax.jit(function)), arrays


def attend(implementation, **settings):
    options = {"implementation": implementation, **settings}
    if implementation == "blockwise":
        options.setdefault("block_size", (2, 3))
    return functools.partial(dot_product_attention, **options)


def layer(module, *inputs, **settings):
    """Outputs of a layer and gradients of its parameters, or what it decodes and its cache."""
    rngs = {"params": RNG(0), "dropout": RNG(1)}
    shapes = jax.eval_shape(lambda: module.init(rngs, *inputs, **settings))
    params, cache = (
        jax.tree.map(lambda x: 0.3 * normal(*x.shape).astype(x.dtype), shapes["params"]),
        jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes.get("cache", {})),
    )
    apply = functools.partial(module.apply, rngs=rngs, **settings)
    if not cache:
        return piece(lambda params, *inputs: apply({"params": params}, *inputs), params, *inputs)

    def decode(params, inputs):
        variables, outs = {"params": params, "cache": cache}, []
        for part in (inputs[:, :2], inputs[:, 2:3]):
            out, new = apply(variables, part, mutable=["cache"])
            variables |= new
            outs.append(out)
        return outs, variables["cache"]

    return decode, (params, *inputs)


def model(**settings):
    defaults = {"features": 8, "num_heads": 2, "mlp_ratio": 2.0, "vocab_size": 7}
    return layer(make_sequence_model(**defaults | settings), TOKENS)


def training(**settings):
    """Two steps of training and an evaluation."""
    config = default_config()
    config.update_from_flattened_dict(
        {
            "task.seq_length": 4,
            "model.features": 8,
            "model.num_heads": 2,
            "train.batch_size": 4,
            "train.steps_per_epoch": 2,
            "eval.num_batches": 1,
            **settings,
        }
    )

    def run(rows):
        functions = build.make_functions(config)
        state, metrics = functions.epoch(functions.init(), rows)
        return state.params, metrics, functions.evaluate(state.params, rows), functions.baseline()

    return run, (np.arange(4, dtype=np.int32),)


def sampling(name, **settings):
    def run(rows):
        task = TASKS[name](**settings)
        batch = task.sample(RNG(0), rows)
        return batch, task.baseline[1](batch)

    return run, (np.arange(2, dtype=np.int32),)


# What is done, made when it is asked for: a function that returns arrays, and its arguments.
PIECES = {}
for name in ("dense", "blockwise"):
    of = functools.partial(attend, name)
    for kind, mask in MASKS.items():
        PIECES[f"{name}, mask, {kind}"] = lambda of=of, mask=mask: (of(mask=mask), QKV)
    for kind, (make, shape) in BIASES.items():
        PIECES[f"{name}, bias, {kind}"] = lambda of=of, make=make, shape=shape: (
            lambda x, *qkv: of()(*qkv, bias=make(x)),
            (normal(*shape), *QKV),
        )
    for kind, settings in SETTINGS.items():
        PIECES[f"{name}, {kind}"] = lambda of=of, s=settings: piece(of(**s), *QKV)
    PIECES[f"{name}, types"] = lambda of=of: piece(of(**SETTINGS["sinks"], softcap=1.5), *HALVES)
    PIECES[f"{name}, all"] = lambda of=of: piece(
        lambda x, sinks, *qkv: of(
            softcap=2.0, mask=MASKS["and"], **SETTINGS["dropout"], return_residual=True
        )(*qkv, bias=biases.alibi(4) + x, sinks=sinks)[0],
        *(normal(4, 5, 7), normal(4)),
        *QKV,
    )
PIECES |= {
    "weights": lambda: piece(
        functools.partial(attention_weights, mask=MASKS["and"], **SETTINGS["sinks"]), QUERY, KEY
    ),
    "linear": lambda: piece(linear_attention, *QKV),
    "linear, causal": lambda: piece(
        functools.partial(linear_attention, mask=masks.causal(), chunk_size=2), *HALVES
    ),
    "differential": lambda: piece(
        lambda share, *qkv: differential_attention(
            *qkv, mask=MASKS["and"], lambda_full=share, **SETTINGS["dropout"]
        ),
        *(normal(4), *HALVES),
    ),
    "gated_delta": lambda: piece(
        lambda gate, *qkv: gated_delta_attention(
            *qkv, log_decay=-jnp.exp(gate), beta=jax.nn.sigmoid(gate), chunk_size=2
        ),
        *(normal(2, 7, 2), *HALVES),
    ),
    "gated_delta, states": lambda: piece(
        lambda state, *qkv: gated_delta_attention(*qkv, initial_state=state, return_state=True),
        *(normal(2, 2, 8, 3), *QKV),
    ),
    "rotary": lambda: piece(
        lambda x: positions.rotary(x, OFFSETS[:, None] + np.arange(5), fraction=0.5), QUERY
    ),
    "rotary, types": lambda: piece(
        functools.partial(positions.rotary, base=np.float32(100)), HALVES[0]
    ),
    "sinusoidal": lambda: (lambda: positions.sinusoidal(5, 8), ()),
    "interop": lambda: piece(
        functools.partial(attention_fn, mask=np.tri(5, 7), dtype=jnp.bfloat16), *QKV
    ),
    "layer, single": lambda: layer(SingleHeadAttention(), INPUTS, mask=masks.causal()),
    "layer, multi": lambda: layer(
        MultiHeadAttention(4, 2, qk_norm=True, rotary=True, softcap=2.0, sinks=True),
        INPUTS,
        mask=MASKS["and"],
    ),
    "layer, bfloat16": lambda: layer(
        MultiHeadAttention(4, 2, qk_norm=True, rotary=True, dtype=jnp.bfloat16),
        INPUTS,
        bias=biases.alibi(4),
    ),
    "layer, dropout": lambda: layer(
        MultiHeadAttention(4, dropout_rate=0.3), INPUTS, INPUTS[:, :4], deterministic=False
    ),
    "layer, differential": lambda: layer(
        DifferentialAttention(2, 1, head_dim=8, qk_norm=True, rotary=True, dtype=jnp.bfloat16),
        INPUTS,
    ),
    "layer, gated_delta": lambda: layer(GatedDeltaAttention(4, 2), INPUTS),
    "layer, decode": lambda: layer(
        MultiHeadAttention(4, 2, rotary=True, decode=True),
        INPUTS,
        mask=masks.window(1),
        bias=biases.alibi(4),
    ),
    "layer, rolling": lambda: layer(
        MultiHeadAttention(4, 2, rotary=True, decode=True, cache_length=2),
        INPUTS,
        mask=masks.window(1),
        bias=biases.alibi(4),
    ),
    "layer, gated_delta, decode": lambda: layer(
        GatedDeltaAttention(4, 2, num_value_heads=4, dtype=jnp.bfloat16, decode=True), INPUTS
    ),
    "model": lambda: model(positions="rotary", causal=True, window=2, sinks=True, remat="full"),
    "model, sinusoidal": lambda: model(positions="sinusoidal", norm="rms", dtype=jnp.bfloat16),
    "model, learned": lambda: model(positions="learned", max_length=6, tie_embedding=False),
    "model, alibi": lambda: model(positions="alibi", pattern="strided", stride=2, causal=True),
    "model, relative": lambda: model(positions="relative", pattern="blocks", stride=2),
    "model, linear": lambda: model(mechanism="linear"),
    "model, differential": lambda: model(mechanism="differential", dtype=jnp.bfloat16),
    "model, gated_delta": lambda: model(
        mechanism="gated_delta", causal=True, short_conv=3, dtype=jnp.bfloat16
    ),
    "model, decode": lambda: model(positions="sinusoidal", causal=True, decode=True),
    "training": lambda: training(
        **{"optimizer.name": "sgd", "optimizer.learning_rate": 0.1, "model.dropout_rate": 0.2}
    ),
    "training, options": lambda: training(
        **{
            "task.name": "copy",
            "train.slices": "seq_length=6",
            "optimizer.max_skipped": 1,
            "model.dtype": "bfloat16",
            "model.dropout_rate": 0.2,
            "optimizer.name": "adamw",
            "optimizer.schedule": "cosine",
            "optimizer.warmup_steps": 1,
            "optimizer.clip_norm": 1.0,
            "optimizer.accumulate": 2,
        }
    ),
}
PIECES |= {f"task, {name}": functools.partial(sampling, name) for name in TASKS}
PIECES["task, noisy_recall"] = functools.partial(sampling, "noisy_recall", noise_rate=0.3)
PIECES["task, recall"] = functools.partial(sampling, "recall", random_non_queries=True)


def arrays_of(tree):
    """Without what has no content: the gradients of integers."""
    return [x for x in jax.tree.leaves(tree) if x.dtype != jax.dtypes.float0]


def operations(name):
    """All operations of a piece in their order, each with the shapes and types of its results."""

    def within(jaxpr):
        for equation in jaxpr.eqns:
            yield equation.primitive.name, [str(x.aval) for x in equation.outvars]
            is_jaxpr = lambda x: hasattr(x, "jaxpr") or hasattr(x, "eqns")
            for x in jax.tree.leaves(list(equation.params.values()), is_leaf=is_jaxpr):
                if is_jaxpr(x):
                    yield from within(getattr(x, "jaxpr", x))

    function, arguments = PIECES[name]()
    traced = jax.make_jaxpr(lambda *arguments: arrays_of(function(*arguments)))(*arguments)
    return list(within(traced.jaxpr))


@pytest.mark.parametrize("name", PIECES)
def test_what_forbids_promotion_forbids_nothing_here(name):
    want = operations(name)
    with jax.numpy_rank_promotion("raise"), jax.numpy_dtype_promotion("strict"):
        assert operations(name) == want


def every_piece(*short):
    """All pieces, the others than these among the slow tests."""
    return pytest.mark.parametrize(
        "name",
        [pytest.param(x, marks=() if x in short else pytest.mark.slow) for x in PIECES],
    )


@every_piece("dense, all", "gated_delta", "layer, decode")
def test_nothing_is_nan_or_infinite_on_the_way(name):
    function, arguments = PIECES[name]()
    # The logsumexp of a row that sees nothing is -inf: a result, not a fault on the way.
    with jax.debug_nans(True), jax.debug_infs("residual" not in name):
        results = jax.jit(lambda *arguments: arrays_of(function(*arguments)))(*arguments)
        jax.block_until_ready(results)


@every_piece("blockwise, all", "linear, causal", "training", "task, noisy_recall")
def test_64_bits_change_neither_numbers_nor_types(name):
    function, arguments = PIECES[name]()
    run = jax.jit(lambda *arguments: arrays_of(function(*arguments)))
    want = run(*arguments)
    with jax.enable_x64(True):
        got = jax.block_until_ready(run(*arguments))
    for x, y in zip(got, want, strict=True):
        assert x.dtype == y.dtype
        assert_close(x, y, 2e-2 if x.dtype in (jnp.bfloat16, jnp.float16) else 2e-5, name)
