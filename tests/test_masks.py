"""Masks are rules: each is compared with its definition for one query and one key."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from cases import assert_close

from attention_jax import dot_product_attention, masks
from attention_jax.functional.tiles import Tile

SHAPES = [(5, 7), (7, 5), (6, 6), (1, 4), (4, 1), (0, 3), (3, 0)]


def assert_mask(mask, want, T, S):
    got = mask.materialize(T, S)
    assert got.dtype == bool
    shape = (2, 3, T, S)
    np.testing.assert_array_equal(np.broadcast_to(got, shape), np.broadcast_to(want, shape))


@pytest.mark.parametrize("offset", [0, 2, -3, 100, -100, "end"])
def test_causal_sees_the_past_and_itself(offset):
    for T, S in SHAPES:
        assert_mask(masks.causal(offset), oracles.causal(T, S, offset), T, S)


def test_causal_aligns_first_with_first_and_end_aligns_last_with_last():
    first, last = masks.causal().materialize(2, 4), masks.causal(offset="end").materialize(2, 4)
    assert np.asarray(first).astype(int).tolist() == [[1, 0, 0, 0], [1, 1, 0, 0]]
    assert np.asarray(last).astype(int).tolist() == [[1, 1, 1, 0], [1, 1, 1, 1]]


@pytest.mark.parametrize("left", [0, 2, None])
@pytest.mark.parametrize("right", [0, 1, None])
def test_window_is_inclusive_on_both_sides(left, right):
    for (T, S), offset in itertools.product([(5, 7), (7, 5)], [0, 2, "end"]):
        want = oracles.window(T, S, left, right, offset)
        assert_mask(masks.window(left, right, offset), want, T, S)


def test_window_looks_back_only_unless_told():
    assert_mask(masks.window(1), oracles.window(4, 4, 1, 0), 4, 4)


def test_offsets_may_differ_between_the_rows_of_a_batch():
    offsets = np.array([1, 3])
    want = np.stack([oracles.causal(5, 7, offset) for offset in offsets])[:, None]
    assert_mask(masks.causal(jnp.asarray(offsets)), want, 5, 7)


@pytest.mark.parametrize("offset", [0, 2, -3, "end"])
def test_strided_sees_every_so_many_keys(offset):
    for (T, S), stride in itertools.product(SHAPES, [1, 2, 3, 100]):
        want = oracles.strided(T, S, stride, offset)
        assert_mask(masks.strided(stride, offset), want, T, S)


@pytest.mark.parametrize("offset", [0, 2, -3, "end"])
def test_blocks_see_themselves_and_the_summaries(offset):
    for (T, S), (size, summary) in itertools.product(SHAPES, [(1, 0), (3, 0), (3, 1), (3, 3)]):
        want = oracles.blocks(T, S, size, summary, offset)
        assert_mask(masks.blocks(size, summary, offset), want, T, S)


PLACES = np.random.default_rng(0).integers(-4, 9, (2, 11))
TOKENS = np.random.default_rng(1).integers(0, 11, (2, 6))  # Some of eleven, some of them twice.
PATTERNS = [
    masks.strided(1),
    masks.strided(3, offset=2),
    masks.blocks(3),
    masks.blocks(3, offset=-4),
    masks.blocks(4, summary=1, offset="end"),
    masks.blocks(2, summary=2),
    masks.blocks(3, offset=np.array([0, 4])),
    masks.window(1) | masks.strided(3),
    masks.causal() & masks.blocks(3, summary=1),
    masks.shifted(masks.blocks(3), 2),
    masks.placed(masks.window(2, 1), PLACES[:, :6], PLACES),
    masks.placed(masks.causal("end") & masks.blocks(3), PLACES[0, :6], PLACES[0]),
    masks.shifted(masks.placed(masks.window(1), PLACES), 2),
    masks.causal() & masks.placed(masks.window(0, 3) | masks.strided(2), PLACES[:, :6], PLACES),
    masks.of_tokens(masks.window(2, 1), TOKENS),
    masks.of_tokens(masks.causal() & masks.segments(PLACES // 4), TOKENS),
    masks.of_tokens(masks.placed(masks.window(1), PLACES), TOKENS),
    masks.of_tokens(masks.blocks(3, summary=1), TOKENS[0]),
]


@pytest.mark.parametrize("mask", PATTERNS, ids=repr)
def test_what_a_pattern_says_of_a_block_of_queries_is_so(mask):
    T, S = 6, 11
    whole = np.broadcast_to(mask.materialize(T, S), (2, 1, T, S))
    for t, size in [(0, 1), (1, 1), (3, 1), (0, 2), (2, 2), (1, 3), (0, 6)]:
        at = Tile(t, size, 0, S, T, S)
        visible = whole[:, :, t : t + size]
        np.testing.assert_array_equal(np.broadcast_to(mask.tile(at), visible.shape), visible)
        keys = mask.bounds(at)
        if keys is None:
            continue
        (first, stop), (open_first, open_stop) = np.maximum(0, np.asarray(keys[:2]))
        assert keys.most is None or stop - first <= keys.most
        assert not visible[..., :first].any()
        assert not visible[..., stop:].any()
        assert visible[..., open_first:open_stop].all()


def random_ids(seed, order):
    ids = np.random.default_rng(seed).integers(0, 4, (2, 23))
    return {"sorted": np.sort(ids), "mixed": ids, "one row": np.sort(ids)[0]}[order]


@pytest.mark.parametrize("order", ["sorted", "mixed", "one row"])
@pytest.mark.parametrize("seed", range(3))
def test_what_segments_say_of_a_block_of_queries_is_so(seed, order):
    key_ids = random_ids(seed, order)
    query_ids = key_ids[..., 3:20]
    mask, (T, S) = masks.segments(query_ids, key_ids), (17, 23)
    visible = np.broadcast_to(oracles.segments(query_ids, key_ids), (2, 1, T, S))[:, 0]
    for start, size in itertools.product(range(0, T, 3), [1, 2, 5]):
        size = min(size, T - start)
        keys = mask.bounds(Tile(start, size, 0, S, T, S))
        block = visible[:, start : start + size].reshape(-1, S)
        (first, stop), (open_first, open_stop) = (map(int, x) for x in (keys.seen, keys.open))
        assert not block[:, :first].any()
        assert not block[:, stop:].any()
        assert block[:, open_first:open_stop].all()
        if order == "one row" and size == 1:  # The bounds are exact.
            assert (stop - first, open_stop - open_first) == (block[0].sum(), block[0].sum())


def test_a_block_of_queries_goes_over_the_keys_of_its_documents_alone():
    ids = np.arange(1024) // 64
    bounds = [masks.segments(ids).bounds(Tile(i, 64, 0, 1024, 1024, 1024)) for i in (0, 512, 960)]
    assert [tuple(map(int, x.seen)) for x in bounds] == [(0, 64), (512, 576), (960, 1024)]


def test_a_block_of_its_own_is_seen_whole_and_nothing_else():
    # A path that skips what nobody sees, and does not mask what all see, needs no less than this.
    mask = masks.blocks(4)
    assert mask.bounds(Tile(4, 1, 0, 11, 11, 11))[:3] == ((4, 8), (4, 8), 4)
    assert mask.bounds(Tile(2, 4, 0, 11, 11, 11)).seen == (0, 8)


def test_placed_rules_count_positions():
    T_at, S_at = PLACES[:, :6], PLACES
    for rule, question in [
        (masks.causal(), lambda t, s: s <= t),
        (masks.window(2, 1, offset=1), lambda t, s: t - 1 <= s <= t + 2),
        (masks.strided(3), lambda t, s: (t - s) % 3 == 0),
        (masks.blocks(3), lambda t, s: t // 3 == s // 3),
        (masks.key_lengths(4), lambda t, s: s < 4),
        (masks.shifted(masks.window(1), 2), lambda t, s: t + 1 <= s <= t + 2),
        (~masks.query_lengths(2), lambda t, s: t >= 2),
    ]:
        want = np.zeros((2, 1, 6, 11), bool)
        for b, t, s in np.ndindex(2, 6, 11):
            want[b, 0, t, s] = question(T_at[b, t], S_at[b, s])
        assert_mask(masks.placed(rule, T_at, S_at), want, 6, 11)
        assert_mask(masks.placed(rule, T_at[0], S_at[0]), want[0, 0], 6, 11)
    # What belongs to a token is still that of the token.
    ids = np.arange(6) // 2
    assert_mask(masks.placed(masks.segments(ids), T_at), oracles.segments(ids), 6, 6)


WHOLE = np.random.default_rng(0).integers(0, 2, (2, 1, 11, 11)) > 0
OF_ALL = [
    masks.window(2, 1),
    masks.causal("end") & masks.strided(3),
    masks.blocks(3) | masks.key_lengths(np.array([2, 5])),
    ~masks.query_lengths(np.array([4, 7])),
    masks.segments(PLACES // 4) & masks.placed(masks.causal(), PLACES),
    masks.shifted(masks.window(3), np.array([2, 0])),
    masks.causal() & WHOLE,
    masks.dense(WHOLE[0, 0]) & masks.dense(WHOLE[:, :, :1]),
    masks.rule(lambda t, s: (t * s) % 3 == 0),
]


@pytest.mark.parametrize("mask", OF_ALL, ids=repr)
def test_the_mask_of_some_tokens_has_their_rows(mask):
    whole = np.broadcast_to(mask.materialize(11, 11), (2, 1, 11, 11))
    want = np.take_along_axis(whole, TOKENS[:, None, :, None], axis=2)
    assert_mask(masks.of_tokens(mask, TOKENS), want, 6, 11)
    assert_mask(masks.of_tokens(mask, TOKENS[0]), whole[:, :, TOKENS[0]], 6, 11)
    query, key, value = (
        np.random.default_rng(i).standard_normal((2, n, 3, 4), np.float32)
        for i, n in enumerate((6, 11, 11))
    )
    attend = jax.jit(dot_product_attention, static_argnames=("implementation", "block_size"))
    tiles = {"implementation": "blockwise", "block_size": (4, 4)}
    got = attend(query, key, value, mask=masks.of_tokens(mask, TOKENS), **tiles)
    np.testing.assert_allclose(got, attend(query, key, value, mask=want), atol=1e-6)


@pytest.mark.parametrize("mask", OF_ALL, ids=repr)
def test_some_tokens_of_some_tokens_are_those_of_all(mask):
    again = np.array([[3, 0], [5, 5]])
    once = masks.of_tokens(mask, np.take_along_axis(TOKENS, again, axis=1))
    for some in (
        masks.of_tokens(masks.of_tokens(mask, TOKENS), again),
        masks.of_tokens(masks.of_tokens(mask, TOKENS) & masks.key_lengths(11), again),
    ):
        assert_mask(some, once.materialize(2, 11), 2, 11)
    for some in (masks.of_tokens(mask, TOKENS[0]), masks.of_tokens(mask, TOKENS)):
        first = np.broadcast_to(some.materialize(6, 11), (2, 1, 6, 11))
        assert_mask(masks.of_tokens(some, again[0]), first[:, :, again[0]], 2, 11)


def test_known_tokens_serve_in_a_program():
    places = jnp.array([2, 0])
    made = jax.jit(lambda: masks.of_tokens(masks.causal(), places).materialize(2, 3))()
    assert made.astype(int).tolist() == [[1, 1, 1], [1, 0, 0]]


def test_the_mask_of_some_tokens_fits_these_alone():
    some = masks.of_tokens(masks.segments(np.arange(5)), np.array([1, 2]))
    with pytest.raises(ValueError, match=r"of_tokens.*T=2.*T=3"):
        some.materialize(3, 5)
    with pytest.raises(ValueError, match="S=5: got S=4"):
        some.materialize(2, 4)
    with pytest.raises(TypeError, match=r"places.*float"):
        masks.of_tokens(masks.causal(), np.ones(2))
    with pytest.raises(ValueError, match="places must not be negative"):
        masks.of_tokens(masks.causal(), np.array([0, -1]))
    with pytest.raises(ValueError, match="is of chosen tokens, so it cannot be shifted"):
        masks.shifted(some, 1).materialize(2, 5)
    assert repr(some) == "of_tokens(segments(query_ids[5]), [2])"


def rows_of(mask, T):
    """`mask.standing(T)` for three rows, compiled with the mask as an argument."""
    standing = jax.jit(lambda mask: mask.standing(T))(mask)
    return (np.broadcast_to(x, (3, T)) for x in standing)


@pytest.mark.parametrize("seed", [0, 1])
def test_a_mask_tells_where_tokens_stand(seed):
    T, rng = 11, np.random.default_rng(seed)
    ids, turns = rng.integers(-2, 2, (2, 3, T))
    seen = rng.random((3, T)) < 0.7
    all_seen, lengths = np.ones((3, T), bool), np.array([0, 4, T])
    for mask, of, visible in [
        (masks.segments(ids), ids, all_seen),
        (masks.segments(ids[0]), ids[[0, 0, 0]], all_seen),
        (masks.causal() & masks.segments(ids) & seen[:, None, None], ids, seen),
        (masks.segments(ids) & masks.window(2) & masks.segments(turns), 9 * ids + turns, all_seen),
        (masks.dense(seen[:, None, None]), 0 * ids, seen),
        (masks.dense(seen[0]), 0 * ids, seen[[0, 0, 0]]),
        (~masks.key_lengths(lengths), 0 * ids, np.arange(T) >= lengths[:, None]),
        (masks.segments(ids) & masks.key_lengths(lengths), ids, all_seen),
    ]:
        positions, places = rows_of(mask, T)
        for b in range(3):
            same = (of[b] == of[b, :, None]) & visible[b] & visible[b, :, None]
            counted = [sum(same[t, s] for s in range(t)) for t in range(T)]
            np.testing.assert_array_equal(positions[b], counted)
            # Each document in one piece: no place twice, and distances are those of positions.
            assert sorted(places[b]) == list(range(T))
            away, apart = (x[b][:, None] - x[b] for x in (places, positions))
            np.testing.assert_array_equal(away[same], apart[same])


@pytest.mark.parametrize(
    "mask",
    [
        *(masks.causal(), masks.window(2), masks.blocks(2), masks.key_lengths(3)),
        *(masks.query_lengths(3), masks.dense(np.tri(5, dtype=bool))),
        *(masks.segments(np.arange(5)) | np.ones(5, bool), ~masks.segments(np.arange(5))),
        masks.dense(np.ones((2, 1, 5), bool)),  # Heads that differ.
    ],
    ids=repr,
)
def test_other_masks_tell_nothing_of_where_tokens_stand(mask):
    assert mask.standing(5) is None
    assert (mask & masks.causal()).standing(5) is None


def test_a_window_of_documents_in_pieces_is_the_same_in_tiles():
    rng = np.random.default_rng(0)
    ids = jnp.asarray(rng.integers(0, 3, (2, 40)))
    query, key, value = jnp.asarray(rng.standard_normal((3, 2, 40, 4, 8)), jnp.float32)

    def loss(query, implementation, **options):
        places = masks.segments(ids).standing(40).places
        mask = masks.causal() & masks.placed(masks.window(3), places) & masks.segments(ids)
        out = dot_product_attention(
            query, key, value, mask=mask, implementation=implementation, **options
        )
        return (out**2).sum(), out

    gradient = functools.partial(jax.grad, has_aux=True)
    want = jax.jit(gradient(lambda x: loss(x, "dense")))(query)
    for options in ({"block_size": 8}, {}):
        got = jax.jit(gradient(lambda x, o=options: loss(x, "blockwise", **o)))(query)
        for a, b in zip(got, want, strict=True):
            assert_close(a, b, 1e-5)


def test_segments_see_their_own_kind():
    T_ids, S_ids = np.array([[0, 0, 1], [2, 2, 2]]), np.array([[1, 0, 0, 9], [9, 9, 2, 0]])
    assert_mask(masks.segments(T_ids, S_ids), oracles.segments(T_ids, S_ids), 3, 4)
    assert_mask(masks.segments(jnp.asarray(T_ids)), oracles.segments(T_ids), 3, 3)
    assert_mask(masks.segments(T_ids[0]), oracles.segments(T_ids[0])[0], 3, 3)


def test_lengths_hide_the_padding():
    lengths = np.array([3, 0])
    assert_mask(masks.key_lengths(lengths), oracles.key_lengths(5, 4, lengths), 5, 4)
    assert_mask(masks.query_lengths(lengths), oracles.query_lengths(5, 4, lengths), 5, 4)
    assert_mask(masks.key_lengths(2), oracles.visible(5, 4, lambda t, s: s < 2), 5, 4)


def test_dense_is_the_array():
    array = np.random.default_rng(0).random((2, 1, 5, 7)) < 0.5
    assert_mask(masks.dense(array), array, 5, 7)
    assert_mask(masks.dense(array[0, 0, :1]), array[0, 0, :1], 5, 7)


def test_masks_form_an_algebra():
    T, S, lengths = 5, 7, np.array([4, 2])
    array = np.random.default_rng(0).random((3, T, S)) < 0.5
    parts = [
        (masks.causal(1), oracles.causal(T, S, 1)),
        (masks.key_lengths(lengths), oracles.key_lengths(T, S, lengths)),
        (masks.dense(array), array),
    ]
    for (a, want_a), (b, want_b) in itertools.product(parts, repeat=2):
        assert_mask(a & b, want_a & want_b, T, S)
        assert_mask(a | b, want_a | want_b, T, S)
        assert_mask(~a, ~want_a, T, S)
        assert_mask(~(a & ~b), ~(want_a & ~want_b), T, S)
        assert_mask(~a | ~b, ~(want_a & want_b), T, S)
    (a, want_a), (b, want_b), (c, want_c) = parts
    assert_mask(a & (b | c), want_a & (want_b | want_c), T, S)
    assert_mask((a & b) | c, (want_a & want_b) | want_c, T, S)


def test_an_array_may_stand_on_either_side():
    array, causal = np.random.default_rng(0).random((5, 7)) < 0.5, oracles.causal(5, 7)
    for x in (array, jnp.asarray(array)):
        assert_mask(x & masks.causal(), array & causal, 5, 7)
        assert_mask(masks.causal() & x, array & causal, 5, 7)
        assert_mask(x | masks.causal(), array | causal, 5, 7)


def test_a_mask_prints_as_a_picture():
    ids = np.array([0, 0, 1, 1])
    mask = masks.causal() & masks.segments(ids)
    rows = str(mask).splitlines()[-4:]
    seen, unseen = rows[0][0], rows[0][-1]
    want = oracles.causal(4, 4) & oracles.segments(ids)[0]
    assert rows == ["".join(seen if x else unseen for x in row) for row in want]


def test_a_repr_names_what_is_not_the_default():
    assert repr(masks.strided(3)) == "strided(3)"
    assert repr(masks.strided(3, "end")) == "strided(3, offset='end')"
    assert repr(masks.blocks(3, 1, 2)) == "blocks(3, summary=1, offset=2)"
    assert repr(masks.blocks(3)) == "blocks(3)"
    assert repr(masks.placed(masks.window(1), np.arange(5))) == "placed(window(1, right=0), [5])"


def test_a_mask_of_rows_says_how_to_write_it():
    x = jnp.ones((2, 7, 1, 4))
    with pytest.raises(ValueError, match=r"\[B, S\] of padding write mask\[:, None, None, :\]"):
        dot_product_attention(x, x, x, mask=np.ones((2, 7), bool))


def test_a_mask_of_no_size_at_all_is_refused():
    for sizes, error, words in [((-1, 3), ValueError, "T.*-1"), ((3, 2.5), TypeError, "S.*2.5")]:
        with pytest.raises(error, match=words):
            masks.causal().materialize(*sizes)


def test_a_picture_that_does_not_fit_the_screen_is_words():
    assert len(str(masks.dense(np.ones((999, 999), bool)))) < 200


@pytest.mark.parametrize(
    "word",
    ["causal", "window", "strided", "blocks", "segments", "key_lengths", "query_lengths"],
)
def test_a_mask_says_what_it_is(word):
    numbers = {"causal": (), "window": (1,), "strided": (1,), "blocks": (1,)}
    arguments = numbers.get(word, (np.array([1]),))
    assert word in repr(getattr(masks, word)(*arguments))


def test_a_mask_may_be_traced():
    mask = masks.causal() & masks.key_lengths(jnp.array([3, 1])) | ~masks.segments(jnp.arange(4))
    traced = jax.jit(lambda mask: mask.materialize(4, 4))(mask)
    np.testing.assert_array_equal(traced, mask.materialize(4, 4))
    assert isinstance(jax.jit(lambda mask: str(mask) and 0)(mask), jax.Array)


def rows(size):
    """A mask that belongs to a batch of `size` rows."""
    return masks.key_lengths(np.ones(size, int))


@pytest.mark.parametrize(
    ("make", "error", "word"),
    [
        (lambda: masks.causal("start"), ValueError, "offset"),
        (lambda: masks.causal(0.5), TypeError, "offset"),
        (lambda: masks.window(-1), ValueError, "left"),
        (lambda: masks.window(1, -1), ValueError, "right"),
        (lambda: masks.window(1.5), TypeError, "left"),
        (lambda: masks.window(2**31 - 1), ValueError, "left.*2147483647"),
        (lambda: masks.window(1, 2**40), ValueError, "right"),
        (lambda: masks.causal(2**31 - 1), ValueError, "offset"),
        (lambda: masks.causal(-(2**30)), ValueError, "offset"),
        (lambda: masks.strided(2**40), ValueError, "stride"),
        (lambda: masks.blocks(2**40), ValueError, "size"),
        (lambda: masks.strided(0), ValueError, "stride"),
        (lambda: masks.strided(2, offset="start"), ValueError, "offset"),
        (lambda: masks.blocks(0), ValueError, "size"),
        (lambda: masks.blocks(2, summary=-1), ValueError, "summary"),
        (lambda: masks.blocks(2, summary=3), ValueError, "summary.*size=2.*3"),
        (lambda: masks.blocks(2.5), TypeError, "size"),
        (lambda: masks.segments(np.array([0.5])), TypeError, "query_ids"),
        (lambda: masks.segments(np.array([1]), np.array([0.5])), TypeError, "key_ids"),
        (lambda: masks.segments(np.array(1)), ValueError, "query_ids"),
        (lambda: masks.key_lengths(np.array([0.5])), TypeError, "lengths"),
        (lambda: masks.query_lengths(np.array([True])), TypeError, "lengths"),
        (lambda: masks.key_lengths(np.array([3, 2**40])), ValueError, "lengths.*1099511627776"),
        (lambda: masks.key_lengths(np.array([2**32 - 1], np.uint32)), ValueError, "lengths"),
        (lambda: masks.key_lengths(None), TypeError, "lengths"),
        (lambda: masks.key_lengths([[1], [2, 3]]), TypeError, "lengths"),
        (lambda: masks.query_lengths(np.uint64(2**63)), ValueError, "lengths"),
        (lambda: masks.segments(masks.causal()), TypeError, "query_ids"),
        (lambda: masks.dense(jax.ShapeDtypeStruct((2, 2), bool)), TypeError, "mask"),
        (lambda: masks.window(np.ones((9, 9))), TypeError, r"left.*float64 \(9, 9\)"),
        (lambda: masks.segments(np.array([0, 2**32])), ValueError, "query_ids"),
        (lambda: masks.dense(np.ones((2, 2))), TypeError, "mask"),
        (lambda: masks.causal() & None, TypeError, "mask"),
        (lambda: masks.causal() & np.ones((2, 2)), TypeError, "mask"),
        (lambda: bool(masks.causal()), TypeError, "mask"),
        (lambda: masks.segments(np.arange(3)).materialize(4, 4), ValueError, "T=3"),
        (
            lambda: masks.segments(np.zeros((2, 3), int), np.zeros((4, 3), int)),
            ValueError,
            "query_ids and key_ids",
        ),
        (lambda: (rows(2) & rows(3)).materialize(4, 4), ValueError, r"mask key_lengths\(\[2\]\) &"),
        (lambda: (rows(2) | rows(3)).materialize(4, 4), ValueError, r"mask .*\(3, 1, 1, 4\)"),
        (lambda: (~rows(2) & rows(3)).materialize(4, 4), ValueError, "mask"),
        (lambda: masks.dense(np.ones((3, 4), bool)).materialize(4, 4), ValueError, "T=3"),
        (lambda: (~masks.segments(np.arange(3))).materialize(4, 4), ValueError, "T=3"),
        (lambda: masks.segments(np.arange(3)).standing(4), ValueError, "S=3"),
        (lambda: masks.placed(masks.causal(), np.ones(3)), TypeError, "positions"),
        (lambda: masks.placed(masks.causal(), np.array(3)), ValueError, "positions"),
        (lambda: masks.placed(masks.causal(), np.arange(3)).materialize(4, 4), ValueError, "T=3"),
        (
            lambda: masks.placed(masks.causal(), np.zeros((2, 3), int), np.zeros((4, 3), int)),
            ValueError,
            "positions and key_positions",
        ),
    ],
)
def test_a_bad_mask_is_refused(make, error, word):
    with pytest.raises(error, match=word) as refusal:
        make()
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("dtype", ["int4", "int8", "uint8", "uint32", "int64", "uint64"])
def test_integers_of_any_width_count(dtype):
    lengths = np.array([2, 0]).astype(jnp.dtype(dtype))
    for mask in (masks.key_lengths(lengths), masks.key_lengths(jnp.asarray(lengths))):
        want = oracles.key_lengths(3, 4, np.array([2, 0]))
        np.testing.assert_array_equal(mask.materialize(3, 4), want)


def test_a_picture_is_drawn_where_a_function_is_traced():
    pictures = []

    @jax.jit
    def attend(x):
        pictures.append(str(masks.causal()))
        return x

    attend(1.0)
    assert pictures == [str(masks.causal())]


def test_a_rule_may_reach_as_far_as_it_says():
    far = masks.window(2**29, 2**29, offset=np.array([2**29 - 9, 9 - 2**29]))
    assert far.materialize(9, 9).all()
    assert masks.causal(offset=2**29).materialize(9, 9).all()
    assert not masks.causal(offset=-(2**29)).materialize(9, 9).any()


def test_rules_of_the_same_numbers_are_equal():
    """A model that holds one is then the same key of a compiled program."""
    for make in (
        masks.causal,
        lambda: masks.window(3) & ~masks.strided(2),
        lambda: masks.blocks(4),
    ):
        assert make() == make()
        assert hash(make()) == hash(make())
    lengths = np.array([1, 2])
    assert masks.key_lengths(lengths) != masks.key_lengths(lengths + 1)
    assert masks.window(3) != masks.window(4)
    assert masks.causal() != masks.window(3)
