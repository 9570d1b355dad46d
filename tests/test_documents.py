"""A document gives the same result packed, padded, in pieces, with gaps and decoded."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import assert_close

from attention_jax import decoding, masks
from attention_jax.training import words
from attention_jax.training.model import make_sequence_model

VOCAB, T = 17, 9
SMALL = {"features": 8, "num_heads": 4, "num_kv_heads": 2, "causal": True, "vocab_size": VOCAB}
# Every kind of positions, and everything else that asks where tokens stand.
KINDS = {name: {"positions": name} for name in words.POSITIONS} | {
    "learned": {"positions": "learned", "max_length": 3},  # As long as a document, not as a row.
    "alibi, window": {"positions": "alibi", "window": 1},
    "blocks": {"pattern": "blocks", "stride": 2},
    "strided, rotary": {"positions": "rotary", "pattern": "strided", "stride": 2},
    "relative, window, both directions": {"positions": "relative", "window": 1, "causal": False},
    "differential, rotary": {"mechanism": "differential", "positions": "rotary", "head_dim": 4},
}
every_kind = pytest.mark.parametrize("kind", KINDS)
# One of each way in which positions reach the numbers.
some_kinds = pytest.mark.parametrize(
    "kind", ["sinusoidal", "learned", "rotary", "relative", "alibi, window", "blocks"]
)

# Six documents of three tokens, and what each output counts in the loss.
DOCUMENTS = np.random.default_rng(0).integers(0, VOCAB, (6, 3))
WEIGHTS = np.random.default_rng(1).standard_normal((6, 3, VOCAB)).astype(np.float32)
# Which document each token of a row is of, -1 being padding: three documents side by side, three
# in pieces, and each document alone, its padding on the left, on both sides or on the right.
ROWS = np.array(
    [[2, 2, 2, 0, 0, 0, 1, 1, 1], [3, 4, 3, 5, 4, 4, 5, 3, 5]]
    + [[-1] * start + [i] * 3 + [-1] * (6 - start) for i, start in enumerate([6, 1, 0, 3, 4, 6])]
)
# Which token of its document it is, counted one by one.
PLACES = np.array([[sum(row[s] == row[t] for s in range(t)) for t in range(T)] for row in ROWS])
PLACES[ROWS < 0] = 0
PADDING = ROWS < 0
TOKENS = jnp.where(PADDING, 3, DOCUMENTS[ROWS, PLACES])
# The same mask twice: as rules that tell where tokens stand, and as an array that does not.
RULES = masks.segments(jnp.asarray(ROWS % 5 * 7 - 9)) & ~PADDING[:, None, None]
ARRAY = (ROWS[:, :, None] == ROWS[:, None, :])[:, None] & ~PADDING[:, None, None]


def init(model, tokens):
    rng = np.random.default_rng(0)
    params = jax.eval_shape(model.init, jax.random.key(0), tokens)["params"]
    return jax.tree.map(lambda x: jnp.asarray(rng.normal(0.1, 0.4, x.shape), x.dtype), params)


@functools.lru_cache
def alone(kind):
    """A model of this kind, its parameters, and what it makes of each document alone."""
    model = make_sequence_model(**{**SMALL, **KINDS[kind]})
    params = init(model, DOCUMENTS)
    return model, params, *jax.jit(loss_of(model))(params, DOCUMENTS, WEIGHTS)


def loss_of(model):
    """Gradient and logits as a function of parameters, tokens and weights of the logits."""

    def loss(params, tokens, weights, **options):
        logits = model.apply({"params": params}, tokens, **options)
        return (logits * weights).sum(), logits

    return jax.grad(loss, has_aux=True)


@every_kind
def test_a_packed_or_padded_document_is_the_document_alone(kind):
    model, params, want_gradient, want = alone(kind)
    weights = jnp.where(PADDING[..., None], 0, WEIGHTS[ROWS, PLACES])
    gradient, logits = jax.jit(loss_of(model))(params, TOKENS, weights, mask=RULES)
    assert_close(logits[~PADDING], want[ROWS, PLACES][~PADDING], 1e-5)
    for got, once in zip(*map(jax.tree.leaves, (gradient, want_gradient)), strict=True):
        assert_close(got, 2 * once, 1e-5)  # Every document is there twice.


@some_kinds
def test_positions_that_are_given_are_those_that_are_derived(kind):
    model, params, _, want = alone(kind)
    run = jax.jit(functools.partial(model.apply, {"params": params}))
    logits = run(TOKENS, mask=ARRAY, positions=PLACES)
    assert_close(logits[~PADDING], want[ROWS, PLACES][~PADDING], 1e-5)


GAPS = np.array([0, 2, 3, 7, 8, 10])
LONG = np.random.default_rng(2).integers(0, VOCAB, (2, 11))


def long(kind):
    """A model for rows of 11 tokens, and its parameters."""
    options = {"max_length": 11} if "max_length" in KINDS[kind] else {}
    model = make_sequence_model(**{**SMALL, **KINDS[kind], **options})
    return model, init(model, LONG)


@some_kinds
def test_a_token_stands_where_it_is_said_to(kind):
    model, params = long(kind)
    some, there = LONG[:, GAPS], np.isin(np.arange(11), GAPS)[None, None, None]
    later = GAPS if kind in ("sinusoidal", "learned", "blocks") else GAPS + 4

    @jax.jit
    def run(params):
        apply = functools.partial(model.apply, {"params": params})
        return (
            # With gaps between tokens, and with tokens in the gaps that are hidden. Positions that
            # are given go before those that the mask would tell.
            apply(some, positions=GAPS),
            apply(LONG, mask=there, positions=np.arange(11))[:, GAPS],
            apply(some),
            # One row at a time, each with positions of its own; distances know no start.
            jax.vmap(lambda row, at: apply(row, positions=at))(some, jnp.stack([GAPS, later])),
        )

    got, want, in_row, by_row = run(params)
    assert_close(got, want, 1e-5)
    assert_close(by_row, want, 1e-5)
    assert abs(got - in_row).max() > 1e-3


@some_kinds
def test_padded_prompts_and_gaps_decode_as_the_full_forward_pass(kind):
    model, params = long(kind)
    tokens = LONG[:, :6]
    decoder = decoding(model)
    shapes = jax.eval_shape(decoder.init, jax.random.key(0), tokens)["cache"]
    visible = jnp.asarray(np.arange(6) >= np.array([[2], [0]]))[:, None, None]
    # Positions are derived in one, and given for each row in the other.
    for options in ({"mask": visible}, {"positions": np.stack([GAPS, np.arange(6)])}):
        want = jax.jit(functools.partial(model.apply, {"params": params}))(tokens, **options)
        step = jax.jit(functools.partial(decoder.apply, mutable=["cache"]))
        state = {"cache": jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)}
        outs = []
        for part in (slice(0, 3), slice(3, 6)):
            if "positions" in options:
                here = {"positions": options["positions"][:, part]}
            else:
                here = options
            out, state = step({"params": params, **state}, tokens[:, part], **here)
            outs.append(out)
        out = jnp.concatenate(outs, axis=1)
        assert_close(out[0, 2:], want[0, 2:], 1e-5)
        assert_close(out[1], want[1], 1e-5)


def test_a_position_without_a_row_in_the_table_is_not_another_one():
    model = make_sequence_model(**SMALL, positions="learned", max_length=4)
    tokens = np.random.default_rng(2).integers(0, VOCAB, (2, 4))
    params = init(model, tokens)
    run = functools.partial(model.apply, {"params": params})
    traced = jax.jit(run)
    want = traced(tokens)
    for far in (4, -1):
        at = np.array([[0, 1, 2, 3], [0, 1, 2, far]])
        with pytest.raises(ValueError, match=rf"positions .*max_length=4.*{far}"):
            run(tokens, positions=at)
        out = traced(tokens, positions=at)
        assert np.isnan(out[1, 3]).all()
        assert_close(out[0], want[0], 1e-5)
    with pytest.raises(ValueError, match=r"positions .*max_length=4.*0 to 4"):
        run(np.zeros((1, 5), int), mask=masks.segments(np.zeros(5, int)))


@pytest.mark.parametrize(
    ("options", "arguments", "error", "words"),
    [
        ({}, {"positions": np.zeros((2, 9))}, TypeError, "positions.*float"),
        ({}, {"positions": np.array(3)}, ValueError, "positions"),
        ({}, {"positions": np.arange(8)}, ValueError, r"positions.*\(2, 9\).*\(8,\)"),
        ({}, {"positions": np.zeros((3, 9), int)}, ValueError, r"positions.*\(2, 9\).*\(3, 9\)"),
        ({}, {"mask": masks.segments(np.zeros((3, 9), int))}, ValueError, r"mask.*\(3, 1, 1, 1\)"),
        ({}, {"mask": masks.segments(np.zeros(8, int))}, ValueError, "mask.*8.*9"),
        (
            {"short_conv": 2},
            {"positions": np.arange(9)},
            NotImplementedError,
            "ShortConvolution.*positions",
        ),
        (
            {"mechanism": "gated_delta", "positions": "none"},
            {"positions": np.arange(9)},
            NotImplementedError,
            "positions.*gated delta",
        ),
    ],
)
def test_positions_that_cannot_be_are_refused(options, arguments, error, words):
    model = make_sequence_model(**{**SMALL, "positions": "sinusoidal", **options})
    init = functools.partial(model.init, jax.random.key(0), **arguments)
    with pytest.raises(error, match=words) as refusal:
        jax.eval_shape(init, jax.ShapeDtypeStruct((2, 9), jnp.int32))
    assert "\n" not in str(refusal.value)
