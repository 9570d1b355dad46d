"""Bad input raises at once: the right type of error, the argument's name, one line."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import DOT_PRODUCT, Sizes, every_case, every_dot_product, random_qkv

from attention_jax import (
    MLP,
    DifferentialAttention,
    GatedDeltaAttention,
    LearnedPositions,
    MultiHeadAttention,
    SingleHeadAttention,
    attention_weights,
    biases,
    differential_attention,
    dot_product_attention,
    gated_delta_attention,
    masks,
    positions,
)
from attention_jax.training.model import make_sequence_model

QUERY, KEY, VALUE = random_qkv()  # [2, 5, 6, 11], [2, 7, 3, 11], [2, 7, 3, 13]

SHAPES = {
    "head size": ((QUERY, KEY[..., :10], VALUE), "11.*10"),
    "length": ((QUERY, KEY, VALUE[:, :6]), "key.*value"),
    "key heads": ((QUERY, KEY[..., :2, :], VALUE), "key.*value"),
    "groups": ((QUERY[..., :5, :], KEY, VALUE), "5.*3"),
    "more key heads than query heads": ((QUERY[..., :2, :], KEY, VALUE), "2.*3"),
    "batch": ((QUERY, KEY[:1], VALUE[:1]), "batch"),
    "number of axes": ((QUERY[0], KEY, VALUE), "batch"),
    "two axes": ((QUERY[0, 0], KEY[0, 0], VALUE[0, 0]), "query"),
}
TYPES = {
    "integers": ((QUERY.astype(int), KEY, VALUE), "query"),
    "booleans": ((QUERY, KEY, VALUE > 0), "value"),
    "complex": ((QUERY, KEY.astype(complex), VALUE), "key"),
    "nothing": ((QUERY, None, VALUE), "key"),
    "text": (("query", KEY, VALUE), "query"),
    "no content": ((jax.ShapeDtypeStruct(QUERY.shape, QUERY.dtype), KEY, VALUE), "query"),
}
SETTINGS = {
    "mask of numbers": ({"mask": np.ones((5, 7))}, TypeError, "mask"),
    "mask of integers": ({"mask": np.ones((5, 7), int)}, TypeError, "mask"),
    "mask of nothing": ({"mask": "causal"}, TypeError, "mask"),
    "mask shape": ({"mask": np.ones((7, 5), bool)}, ValueError, r"mask.*\(7, 5\)|mask.*T=7"),
    "mask without heads": ({"mask": np.ones((2, 5, 7), bool)}, ValueError, "mask"),
    "mask that makes a batch": ({"mask": np.ones((3, 2, 1, 5, 7), bool)}, ValueError, "mask"),
    "mask value": ({"mask": masks.segments(np.arange(4))}, ValueError, "mask|query_ids"),
    "mask value's batch": ({"mask": masks.key_lengths(np.arange(3))}, ValueError, "mask"),
    "masks of two batches": (
        {"mask": masks.key_lengths(np.ones(2, int)) & masks.key_lengths(np.ones(3, int))},
        ValueError,
        "mask",
    ),
    "bias of booleans": ({"bias": np.ones((5, 7), bool)}, TypeError, "bias"),
    "bias of integers": ({"bias": np.ones((5, 7), int)}, TypeError, "bias"),
    "bias of nothing": ({"bias": "alibi"}, TypeError, r"bias.*biases\..*str"),
    "bias shape": ({"bias": np.ones((5, 5, 7), np.float32)}, ValueError, r"bias.*\(5, 5, 7\)"),
    "mask as bias": ({"bias": masks.causal()}, TypeError, "bias"),
    "softcap of zero": ({"softcap": 0.0}, ValueError, "softcap"),
    "negative softcap": ({"softcap": -1.0}, ValueError, "softcap"),
    "sinks shape": ({"sinks": np.ones(3, np.float32)}, ValueError, r"sinks.*\(3,\)"),
    "sinks type": ({"sinks": np.ones(6, int)}, TypeError, "sinks"),
    "rng that is a number": (
        {"dropout_rate": 0.5, "dropout_rng": 3},
        TypeError,
        "dropout_rng.*int",
    ),
    "rng of floats": (
        {"dropout_rate": 0.5, "dropout_rng": np.ones(2, np.float32)},
        TypeError,
        "dropout_rng.*float32",
    ),
    "several rngs": (
        {"dropout_rate": 0.5, "dropout_rng": jax.random.split(jax.random.key(0), 3)},
        ValueError,
        r"dropout_rng.*\(3,\)",
    ),
    "several raw rngs": (
        {"dropout_rate": 0.5, "dropout_rng": np.zeros((3, 2), np.uint32)},
        ValueError,
        r"dropout_rng.*\(3, 2\)",
    ),
    "rate that is text": ({"dropout_rate": "0.5"}, TypeError, "dropout_rate.*'0.5'"),
    "rate that is nothing": ({"dropout_rate": None}, TypeError, "dropout_rate.*None"),
    "rate of integers": ({"dropout_rate": np.zeros((), int)}, TypeError, "dropout_rate.*int"),
    "several rates": ({"dropout_rate": np.array([0.5, 0.2])}, ValueError, r"dropout_rate.*\(2,\)"),
    "scale of text": ({"scale": "a"}, TypeError, "scale.*'a'"),
    "several scales": ({"scale": np.ones(2)}, ValueError, r"scale.*\(2,\)"),
    "complex softcap": ({"softcap": 1j}, TypeError, "softcap.*1j"),
    "a word for no": ({"deterministic": "no"}, TypeError, "deterministic.*'no'"),
    "neither yes nor no": ({"deterministic": None}, TypeError, "deterministic.*None"),
    "a word for yes": ({"return_residual": "yes"}, TypeError, "return_residual.*'yes'"),
    "mask without content": ({"mask": jax.ShapeDtypeStruct((5, 7), bool)}, TypeError, "mask"),
    "bias without content": (
        {"bias": jax.ShapeDtypeStruct((5, 7), np.float32)},
        TypeError,
        "bias.*ShapeDtypeStruct",
    ),
    "an array for yes": (
        {"return_residual": np.ones((9, 9))},
        TypeError,
        r"return_residual.*float64 \(9, 9\)",
    ),
    "an array for a word": ({"implementation": np.ones(3)}, ValueError, "implementation"),
    "an array for a size": (
        {"implementation": "blockwise", "block_size": np.ones((9, 9))},
        (TypeError, ValueError),
        "block_size",
    ),
    "a type for a number": ({"scale": np.float32}, TypeError, "scale"),
    "implementation": ({"implementation": "fast"}, ValueError, "implementation.*fast"),
    "block size of zero": ({"block_size": 0}, ValueError, "block_size"),
}


def one_line(error):
    assert "\n" not in str(error.value)


@every_case
@pytest.mark.parametrize("name", SHAPES)
def test_shapes_that_do_not_fit_are_a_value_error(case, name):
    qkv, words = SHAPES[name]
    with pytest.raises(ValueError, match=words) as error:
        case.attend(*qkv)
    one_line(error)


@every_case
@pytest.mark.parametrize("name", TYPES)
def test_what_is_no_float_array_is_a_type_error(case, name):
    qkv, words = TYPES[name]
    with pytest.raises(TypeError, match=words) as error:
        case.attend(*qkv)
    one_line(error)


# Floating-point to jax, but for storage: nothing is computed in them. The last two are no floats.
STORED = ["float8_e4m3fn", "float8_e5m2", "float4_e2m1fn", "complex64", "bool"]
every_stored_type = pytest.mark.parametrize("dtype", STORED)


@every_case
@every_stored_type
@pytest.mark.parametrize("argument", ["query", "key", "value"])
def test_a_type_that_is_not_computed_in_is_named(case, argument, dtype):
    arrays = dict(zip(("query", "key", "value"), random_qkv(case.small), strict=True))
    arrays[argument] = jnp.ones(arrays[argument].shape, dtype)
    with pytest.raises(TypeError, match=f"{argument} must be .*float32.*, got {dtype}") as error:
        case.attend(**arrays)
    one_line(error)


# Of every other argument that takes an array: the call with one of ones, its name and its shape.
TYPED = {
    "bias": (lambda x: dot_product_attention(QUERY, KEY, VALUE, bias=x), (5, 7)),
    "bias ": (lambda x: biases.alibi(6) + x, (5, 7)),
    "sinks": (lambda x: dot_product_attention(QUERY, KEY, VALUE, sinks=x), (6,)),
    "scale": (lambda x: dot_product_attention(QUERY, KEY, VALUE, scale=x), ()),
    "softcap": (lambda x: attention_weights(QUERY, KEY, softcap=x), ()),
    "dropout_rate": (
        lambda x: differential_attention(
            *(QUERY[..., :10], KEY[..., :10], VALUE),
            dropout_rate=x,
            dropout_rng=jax.random.key(0),
        ),
        (),
    ),
    "lambda_full": (
        lambda x: differential_attention(QUERY[..., :10], KEY[..., :10], VALUE, lambda_full=x),
        (6,),
    ),
    "log_decay": (lambda x: gated_delta_attention(QUERY, KEY, VALUE, log_decay=x), (2, 7, 3)),
    "beta": (lambda x: gated_delta_attention(QUERY, KEY, VALUE, beta=x), (2, 7, 3)),
    "slopes": (biases.alibi, (6,)),
    "table": (biases.relative, (32, 6)),
    "x": (positions.rotary, (2, 5, 6, 8)),
    "positions": (lambda x: positions.rotary(QUERY[..., :10], x), (5,)),
    "base": (lambda x: positions.rotary(QUERY[..., :10], base=x), ()),
}


@every_stored_type
@pytest.mark.parametrize("argument", TYPED)
def test_a_type_that_is_not_computed_in_is_named_in_every_argument(argument, dtype):
    call, shape = TYPED[argument]
    with pytest.raises(TypeError, match=f"^{argument.strip()} must be .*, got {dtype}") as error:
        call(jnp.ones(shape, dtype))
    one_line(error)
    jax.eval_shape(call, jnp.ones(shape, "float16"))


@pytest.mark.parametrize("dtype", [*STORED, "int32", "half a float"])
@pytest.mark.parametrize("field", ["dtype", "param_dtype"])
@pytest.mark.parametrize(
    ("layer", "inputs"),
    [
        (SingleHeadAttention, (2, 8)),
        (functools.partial(MultiHeadAttention, 2), (2, 8)),
        (functools.partial(DifferentialAttention, 2), (2, 8)),
        (functools.partial(GatedDeltaAttention, 2), (2, 8)),
        (functools.partial(make_sequence_model, 8, num_heads=2), (2, 8)),
        (functools.partial(MLP, 8), (2, 8)),
        (functools.partial(LearnedPositions, 8), (2, 8)),
    ],
    ids=["single", "multi", "differential", "gated_delta", "model", "mlp", "positions"],
)
def test_a_layer_refuses_a_type_that_is_not_computed_in(layer, inputs, field, dtype):
    with pytest.raises(TypeError, match=f"^{field} must be .*float32.*, got {dtype}") as error:
        layer(**{field: dtype}).init(jax.random.key(0), jnp.ones(inputs))
    one_line(error)


@every_case
@pytest.mark.parametrize("mask", ["causal", np.ones((5, 7)), 3], ids=["text", "numbers", "number"])
def test_what_is_no_mask_is_a_type_error(case, mask):
    with pytest.raises(TypeError, match="mask") as error:
        case.attend(*random_qkv(case.small), mask=mask)
    one_line(error)


@every_dot_product
@pytest.mark.parametrize("name", SETTINGS)
def test_a_bad_setting_is_named(case, name):
    settings, error_type, words = SETTINGS[name]
    with pytest.raises(error_type, match=words) as error:
        case.attend(QUERY, KEY, VALUE, **settings)
    one_line(error)


@every_dot_product
@pytest.mark.parametrize("name", ["mask shape", "bias shape", "sinks shape"])
def test_a_bad_setting_is_named_under_jit_too(case, name):
    settings, error_type, words = SETTINGS[name]
    with pytest.raises(error_type, match=words):
        jax.jit(case.attend)(QUERY, KEY, VALUE, **settings)


def test_block_size_is_not_ignored_by_the_definition():
    for case in DOT_PRODUCT:
        if case.name == "dense":
            with pytest.raises((ValueError, NotImplementedError), match="block_size"):
                case.attend(QUERY, KEY, VALUE, block_size=64)


def test_settings_are_keyword_only():
    for case in DOT_PRODUCT:
        with pytest.raises(TypeError):
            case.attend(QUERY, KEY, VALUE, None, None, 1.0)


def test_one_key_head_serves_any_number_of_query_heads():
    for case in DOT_PRODUCT:
        for N in (1, 2, 5):
            sizes = Sizes(N=N, K=1)
            assert jax.eval_shape(case.attend, *random_qkv(sizes)).shape == sizes.out


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (
            lambda: dot_product_attention(QUERY, KEY, VALUE, is_causal=True),
            "is_causal: write mask=",
        ),
        (
            lambda: dot_product_attention(QUERY, KEY, VALUE, attn_mask=None),
            "attn_mask: write mask=",
        ),
        (lambda: dot_product_attention(QUERY, KEY, VALUE, softcaps=1.0), "did you mean softcap?"),
        (lambda: dot_product_attention(QUERY, KEY, VALUE, zzz=1.0), "zzz; it takes query, key"),
        (lambda: dot_product_attention(QUERY, KEY, VALUE, np.ones((5, 7), bool)), "write mask="),
        (lambda: gated_delta_attention(QUERY, KEY, VALUE, causal=True), "causal: write mask="),
        (lambda: MultiHeadAttention(4, qkv_features=8), "qkv_features: write head_dim="),
        (lambda: MultiHeadAttention(4, normalize_qk=True), 'normalize_qk: write qk_norm="layer"'),
        (lambda: DifferentialAttention(4, rope_theta=1e6), "rope_theta: write rotary_base="),
        (
            lambda: MultiHeadAttention(1).init(jax.random.key(0), QUERY[0, 0], is_causal=True),
            "is_causal: write mask=masks.causal()",
        ),
    ],
)
def test_words_of_other_libraries_are_translated(call, words):
    with pytest.raises(TypeError) as raised:
        call()
    assert words in str(raised.value)
    assert "\n" not in str(raised.value)
