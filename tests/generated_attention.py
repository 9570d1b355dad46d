"""Generated calls of the functions, the rules and the layers of attention.

Each `*_calls` is a strategy of hypothesis; `try_*` makes the call and checks its result.
"""

import functools
import inspect

import jax
import jax.numpy as jnp
import numpy as np
from cases import Sizes
from hypothesis import strategies as st
from outcomes import outcome

from attention_jax import (
    DifferentialAttention,
    GatedDeltaAttention,
    MultiHeadAttention,
    SingleHeadAttention,
    attention_weights,
    biases,
    differential_attention,
    dot_product_attention,
    explain,
    gated_delta_attention,
    linear_attention,
    masks,
    positions,
)
from attention_jax.functional.choice import Choice
from attention_jax.interop import flax
from attention_jax.models import SequenceModel
from attention_jax.training.model import make_sequence_model
from attention_jax.training.words import MECHANISMS

FLOATS = ("float32", "bfloat16", "float16")
DTYPES = (*FLOATS, "float64", "int32", "uint8", "bool", "complex64", "float8_e4m3fn", "int4")
JUNK = (
    *(None, "yes", "", b"x", "dense", -1, 0, 1, 2, 7, 10**30, True, False),
    *(0.5, 2.0, -0.5, 1e30, float("nan"), float("inf"), 1j),
    *([], [1, 2], (), (2, 2), {}, {"a": 1}, object(), print, np.float32),
    *(np.ones(3, np.float32), np.ones((2, 2), bool), np.ones((), complex), np.array("a")),
    *(np.array([None, 1]), np.zeros(0), np.ones((1, 1, 1, 1, 1, 1), np.float32)),
    *(jax.ShapeDtypeStruct((2,), np.float32), jax.random.key(0), jax.random.PRNGKey(0)),
    *(masks.causal(), biases.alibi(2), masks.key_lengths(np.ones((3, 3), int))),
)
junk = st.sampled_from(range(len(JUNK))).map(JUNK.__getitem__)
several = st.sampled_from([0, 0, 0, 1, 1, 2])  # How many arguments of a call are spoilt.

# Few sizes, that operations find themselves compiled; now and then such as do not fit.
SIZES = st.builds(
    lambda batch, T, S, heads, H, V, odd: Sizes(batch, T, S, *heads, H, V)._replace(**odd),
    batch=st.sampled_from([(), (2,), (2, 1), (0,)]),
    T=st.sampled_from([3, 3, 1, 0]),
    S=st.sampled_from([3, 3, 2, 0]),
    heads=st.sampled_from([(2, 2), (4, 2), (2, 1), (0, 1)]),
    H=st.sampled_from([4, 4, 2]),
    V=st.sampled_from([4, 4, 1, 0]),
    odd=st.sampled_from([{}, {}, {}, {}, {}, {}, {"K": 0}, {"N": 3, "K": 2}, {"H": 0}, {"H": 3}]),
)


def arrays(shape, shapes=None, dtypes=FLOATS):
    """An array of a shape, of numpy or of jax."""

    def make(shape, dtype, numpy):
        # Not random: calls are repeated. NaN and infinity are tested elsewhere.
        x = np.random.default_rng(len(shape)).standard_normal(shape).astype(jnp.dtype(dtype))
        return x if numpy else jnp.asarray(x)

    shapes = st.just(shape) if shapes is None else st.sampled_from(shapes)
    return st.builds(make, shapes, st.sampled_from(dtypes), st.booleans())


def spoilt(shape):
    """What is taken for an array of a shape, and is none."""
    shapes = [shape, shape[1:], (2, *shape), shape[:-1], (*shape[:-1], 5), ()]
    return st.one_of(junk, arrays(shape, shapes), arrays(shape, dtypes=DTYPES))


def settings_of(s):
    """What suits each argument, for inputs of some sizes."""
    B, T, S, N, K = s.batch, s.T, s.S, s.N, s.K
    rows = np.ones(B, int)
    offsets = st.sampled_from([0, 1, -1, "end", rows])
    rules = st.one_of(
        st.builds(masks.causal, offsets),
        st.builds(masks.window, st.sampled_from([None, 0, 2]), st.sampled_from([None, 1]), offsets),
        st.sampled_from([masks.strided(2), masks.blocks(2), masks.blocks(2, 1), ~masks.causal()]),
        st.just(masks.segments(np.zeros((*B, T), int), np.zeros((*B, S), int))),
        st.sampled_from([masks.key_lengths(rows), masks.query_lengths(rows * 2)]),
        st.just(masks.dense(np.random.default_rng(0).random((*B, N, T, S)) < 0.6)),
    )
    pairs = st.builds(lambda a, b, how: a & b if how else a | b, rules, rules, st.booleans())
    seen = arrays((T, S), [(T, S), (N, 1, S), (*B, 1, T, S)]).map(lambda x: x > 0)
    tables = [biases.alibi(max(N, 1)), biases.relative(np.ones((4, N), np.float32))]
    logits = [(*B, N, T, S), (N, T, S), (T, S), (N, 1, S), (1, 1, 1)]
    rngs = [jax.random.key(0), jax.random.PRNGKey(0)]
    return {
        "mask": st.one_of(st.sampled_from([None, masks.causal()]), rules, pairs, seen),
        "bias": st.one_of(st.sampled_from([*tables, tables[0] + tables[1]]), arrays((), logits)),
        "scale": st.sampled_from([None, 0.3, 2, -1.0, 0.0, np.float32(0.5), jnp.float32(0.5)]),
        "softcap": st.sampled_from([None, 2.0, 30, np.float32(1)]),
        "sinks": st.one_of(st.none(), arrays((N,))),
        "dropout_rate": st.sampled_from([0.0, 0.5, np.float32(0.5), jnp.float32(0.2)]),
        "dropout_rng": st.sampled_from([None, *rngs, *rngs]),
        "deterministic": st.booleans(),
        "implementation": st.sampled_from([None, "dense", "blockwise", "blockwise", "cudnn"]),
        "block_size": st.sampled_from([None, None, 1, 2, (1, 3), (64, 64), [2, 2]]),
        "return_residual": st.booleans(),
        "feature_map": st.sampled_from([jax.nn.relu, jnp.exp]),
        "chunk_size": st.sampled_from([1, 2, 64]),
        "lambda_full": st.one_of(st.just(0.3), arrays((N,))),
        "log_decay": st.one_of(st.none(), arrays((*B, S, K)).map(lambda x: -abs(x))),
        "initial_state": st.none(),
        "return_state": st.just(False),
        "beta": st.one_of(st.none(), arrays((*B, S, K)).map(lambda x: abs(x) / (1 + abs(x)))),
        "broadcast_dropout": st.booleans(),
        "dtype": st.sampled_from([None, *FLOATS, jnp.float32]),
        "precision": st.sampled_from([None, "highest", jax.lax.Precision.HIGH]),
        "module": st.none(),
        "is_causal": st.booleans(),
        "force_fp32_for_softmax": st.booleans(),
        "qk_attn_weights_einsum": st.none(),
        "attn_weights_value_einsum": st.none(),
    }


FUNCTIONS = {
    function.__name__: function
    for function in (
        dot_product_attention,
        differential_attention,
        gated_delta_attention,
        linear_attention,
        attention_weights,
        explain,
        flax.attention_fn,
    )
}


@st.composite
def function_calls(draw):
    """A function, its arguments by name, and whether it is called under jit."""
    name = draw(st.sampled_from(sorted(FUNCTIONS)))
    s = draw(SIZES)
    shapes, suitable = {"query": s.query, "key": s.key, "value": s.value}, settings_of(s)
    taken = parameters_of(name)
    optional = st.sets(st.sampled_from([x for x in taken if x not in shapes]), max_size=4)
    arguments = {x: draw(arrays(shapes[x])) for x in taken if x in shapes}
    arguments |= {x: draw(suitable[x]) for x in sorted(draw(optional))}
    for _ in range(draw(several)):
        x = draw(st.sampled_from(taken))
        arguments[x] = draw(spoilt(shapes.get(x, (s.N, s.T, s.S))))
    return name, arguments, draw(st.booleans())


def parameters_of(name):
    function = FUNCTIONS["dot_product_attention" if name == "explain" else name]
    parameters = inspect.signature(function).parameters.values()
    return [x.name for x in parameters if x.kind is not x.VAR_KEYWORD]


def try_function(call):
    name, arguments, jitted = call
    function = FUNCTIONS[name]
    traced = {x: y for x, y in arguments.items() if x in ("query", "key", "value")}
    if jitted and name != "explain" and all(map(is_numbers, traced.values())):
        rest = {x: y for x, y in arguments.items() if x not in traced}
        run = functools.partial(jax.jit(lambda traced: function(**traced, **rest)), traced)
    else:
        run = functools.partial(function, **arguments)
    result = outcome(run, parameters_of(name))
    if result is None:
        return "refused"
    if name == "explain":
        assert isinstance(result, Choice)
    else:
        check_arrays(name, result, arguments)
    return "answered"


def is_numbers(x):
    return isinstance(x, np.ndarray | jax.Array) and jnp.issubdtype(x.dtype, jnp.number)


def check_arrays(name, result, arguments):
    query, value = arguments["query"], arguments.get("value")
    shape = (*query.shape[:-1], value.shape[-1]) if value is not None else None
    if name == "attention_weights":
        *batch, T, N, _ = query.shape
        shape = (*batch, N, T, arguments["key"].shape[-3])
    out, *rest = result if arguments.get("return_residual") else (result,)
    assert out.shape == shape, f"shape {out.shape}, expected {shape}"
    assert np.isfinite(np.asarray(out, np.float32)).all(), "not finite"
    for residual in rest:
        assert residual.shape == shape[:-1]
        assert not np.isnan(residual).any()


# The rules of masks, biases and positions.

RULES = {
    "causal": (masks.causal, "offset"),
    "window": (masks.window, "left right offset"),
    "strided": (masks.strided, "stride offset"),
    "blocks": (masks.blocks, "size summary offset"),
    "segments": (masks.segments, "query_ids key_ids"),
    "key_lengths": (masks.key_lengths, "lengths"),
    "query_lengths": (masks.query_lengths, "lengths"),
    "dense": (masks.dense, "array"),
    "alibi": (biases.alibi, "slopes_or_num_heads offset"),
    "relative": (biases.relative, "table bidirectional num_buckets max_distance offset"),
    "rotary": (positions.rotary, "x positions base fraction"),
    "sinusoidal": (positions.sinusoidal, "num_positions features"),
}
INTEGERS = st.sampled_from([0, 1, 2, 3, -1, 2**29, np.int32(2), jnp.int32(1), np.int64(2)])
IDS = st.sampled_from([np.array([0, 0, 1]), jnp.array([[1, 1, 2], [0, 0, 0]]), [0, 1, 1]])
SUITABLE = {
    **dict.fromkeys(("left", "right", "stride", "size", "summary", "max_distance"), INTEGERS),
    **dict.fromkeys(("num_positions", "features", "num_buckets"), st.sampled_from([0, 2, 4, 8])),
    **dict.fromkeys(("query_ids", "key_ids", "positions"), IDS),
    "lengths": st.sampled_from([2, np.int8(1), np.array([1, 2]), [3, 0], np.uint64(2)]),
    "offset": st.sampled_from([0, 1, -2, "end", np.array([1, 2]), jnp.int32(1), 2**29, "start"]),
    "array": arrays((3, 3)).map(lambda x: x > 0),
    "slopes_or_num_heads": st.one_of(st.sampled_from([1, 3, np.int64(2)]), arrays((2,))),
    "table": arrays((4, 2), [(4, 2), (8, 1), (2, 2), (3, 2)]),
    "bidirectional": st.booleans(),
    "x": arrays((3, 2, 4), [(3, 2, 4), (2, 3, 1, 6), (0, 1, 2), (3, 2, 3), (2, 4)]),
    "base": st.sampled_from([10.0, 10_000, 1e-3, np.float32(5)]),
    "fraction": st.sampled_from([1.0, 0.5, 0.25, 0.0, 2]),
}


@st.composite
def rule_calls(draw):
    """A function of RULES, and its arguments by name."""
    name = draw(st.sampled_from(sorted(RULES)))
    function, taken = RULES[name]
    needed = [x for x, p in inspect.signature(function).parameters.items() if p.default is p.empty]
    chosen = set(needed) | draw(st.sets(st.sampled_from(taken.split()), max_size=2))
    arguments = {x: draw(SUITABLE[x]) for x in sorted(chosen)}
    for _ in range(draw(several)):
        arguments[draw(st.sampled_from(taken.split()))] = draw(spoilt((3, 2, 4)))
    return name, arguments


def try_rule(call):
    name, arguments = call
    function, taken = RULES[name]
    # The size of a whole mask is asked for too: rules may fit none.
    names = [*taken.split(), "mask", "bias", "slopes", "num_heads"]
    result = outcome(lambda: in_full(function(**arguments)), names)
    if result is None:
        return "refused"
    assert np.isfinite(np.asarray(result, np.float32)).all()
    return "answered"


def in_full(rule):
    """The numbers of a rule, for as many queries and keys as its arrays have."""
    assert "\n" not in repr(rule) or isinstance(rule, jax.Array)
    if isinstance(rule, masks.Mask):
        T, S = (3 if n is None else n for n in rule.size())
        return rule.materialize(T, S)
    if isinstance(rule, biases.Bias):
        query = jnp.zeros((2, 3, rule.slopes.size if hasattr(rule, "slopes") else 1, 2))
        return attention_weights(query, query, rule) if query.size else query
    return rule


# Layers.

LAYERS = {
    layer.__name__: layer
    for layer in (
        SingleHeadAttention,
        MultiHeadAttention,
        DifferentialAttention,
        GatedDeltaAttention,
    )
} | {"SequenceModel": make_sequence_model}
FIELDS = {
    **dict.fromkeys(("num_kv_heads", "stride", "window"), st.sampled_from([None, 1, 2])),
    **dict.fromkeys(("head_dim", "out_features", "max_length"), st.sampled_from([None, 4, 3])),
    **dict.fromkeys(("num_layers", "short_conv", "conv_size"), st.sampled_from([1, 2])),
    **dict.fromkeys(("dtype", "param_dtype"), st.sampled_from([jnp.float32, "bfloat16"])),
    "features": st.sampled_from([4, 8]),
    "num_heads": st.sampled_from([1, 2, 4]),
    "attention": st.sampled_from(["multihead", "selfhead"]),
    "vocab_size": st.sampled_from([None, 5]),
    "mlp_ratio": st.sampled_from([0.0, 2.0, 0.1]),
    "norm": st.sampled_from(["layer", "rms", "none"]),
    "positions": st.sampled_from(["none", "sinusoidal", "learned", "rotary", "alibi", "relative"]),
    "dropout_rate": st.sampled_from([0.0, 0.5, jnp.float32(0.1)]),
    "mechanism": st.sampled_from(list(MECHANISMS)),
    "pattern": st.sampled_from(["full", "strided", "blocks"]),
    "softcap": st.sampled_from([None, 2.0]),
    "rotary_base": st.sampled_from([10_000.0, 100]),
    "lambda_init": st.sampled_from([0.8, 0.2]),
    "init_scale": st.sampled_from([1.0, 0.5]),
    "attention_fn": st.sampled_from(
        [dot_product_attention, linear_attention, differential_attention, flax.attention_fn]
    ),
    "deterministic": st.sampled_from([None, True, False]),
}
SETTINGS = sorted({x for f in FUNCTIONS.values() for x in inspect.signature(f).parameters})
NEEDED = {"num_heads": 2, "features": 4}


def call_of(name):
    return (SequenceModel if name == "SequenceModel" else LAYERS[name]).__call__


@st.composite
def layer_calls(draw):
    """A layer, its fields, the arguments of its call, and whether numbers are computed."""
    name = draw(st.sampled_from(sorted(LAYERS)))
    own = [x for x in inspect.signature(LAYERS[name]).parameters if x not in ("parent", "name")]
    suitable = {x: FIELDS.get(x, st.booleans()) for x in own}
    suitable = {x: y for x, y in suitable.items() if not x.endswith("_init") or x in FIELDS}
    fields = {x: NEEDED[x] for x in suitable if x in NEEDED}
    chosen = draw(st.sets(st.sampled_from(sorted(suitable)), max_size=4))
    fields |= {x: draw(suitable[x]) for x in sorted(chosen)}

    batch, T, S = draw(st.sampled_from([(), (2,), (0,)])), draw(st.sampled_from([3, 1, 0])), 2
    D = fields.get("features", 4)
    inputs = arrays((*batch, T, D if isinstance(D, int) else 4))
    if fields.get("vocab_size"):
        inputs = st.just(jnp.zeros((*batch, T), int))
    taken = [x for x in inspect.signature(call_of(name)).parameters if x != "self"]
    options = settings_of(Sizes(batch, T, T, fields.get("num_heads") or 1, 1))
    options |= {
        **dict.fromkeys(("inputs_kv", "inputs_v"), arrays((*batch, S, 4))),
        "sow_weights": st.booleans(),
        "lengths": st.just(np.ones(batch, int)),
        "positions": st.just(np.zeros((*batch, T), int)),
        "output_positions": st.just(np.zeros((*batch, 2), int)),
    }
    arguments = {taken[0]: draw(inputs)}
    chosen = draw(st.sets(st.sampled_from(taken[1:]), max_size=2))
    arguments |= {x: draw(options[x]) for x in sorted(chosen)}
    for _ in range(draw(several)):
        if draw(st.booleans()):
            arguments[draw(st.sampled_from(taken))] = draw(spoilt((*batch, T, 4)))
        else:
            # What a function of the caller's own makes of its arguments is its own affair.
            not_called = junk.filter(lambda x: not callable(x))
            fields[draw(st.sampled_from(sorted(suitable)))] = draw(not_called)
    return name, fields, arguments, draw(st.integers(0, 3)) == 0


def try_layer(call):
    name, fields, arguments, computed = call
    rngs = dict(zip(("params", "dropout"), jax.random.split(jax.random.key(0)), strict=True))
    taken = inspect.signature(call_of(name)).parameters
    names = [*inspect.signature(LAYERS[name]).parameters, *taken, *SETTINGS, "head size"]

    def run():
        layer = LAYERS[name](**fields)
        start = lambda: layer.init_with_output(rngs, **arguments)[0]
        return jax.jit(start)() if computed else jax.eval_shape(start)

    out = outcome(run, names)
    if out is None:
        return "refused"
    inputs = next(arguments[x] for x in taken if x in arguments)
    width = fields.get("out_features") or fields.get("vocab_size") or inputs.shape[-1]
    places = inputs.shape if fields.get("vocab_size") else inputs.shape[:-1]
    if arguments.get("output_positions") is not None:
        places = arguments["output_positions"].shape
    assert out.shape == (*places, width), f"shape {out.shape}, expected {(*places, width)}"
    if computed:
        assert np.isfinite(np.asarray(out, np.float32)).all(), "not finite"
    return "answered"
