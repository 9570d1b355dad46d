"""Promises of the tasks: a batch follows its rule, is drawn evenly, and depends on (rng, row)
alone."""

import functools
import inspect
import itertools
from pathlib import Path

import jax
import numpy as np
import pytest
from task_rules import TASK_RULES

from attention_jax.tasks import TASKS
from attention_jax.tasks.draws import draw_distinct, draw_others
from attention_jax.tasks.memorization import draw_map
from attention_jax.tasks.task import about_held_out
from attention_jax.tasks.teacher import attention_layer, draw_weights

# Of every task, settings at which its rule is checked; the last ones also for the statistics.
CASES = {
    "teacher": [{"seq_length": 5, "features": 12, "num_heads": 4}],
    "recall": [
        {"seq_length": 16, "vocab_size": 25, "num_pairs": 2, "num_passes": 2, "power": 1.0},
        {"seq_length": 12, "vocab_size": 24, "num_pairs": 2, "random_non_queries": True},
        {"seq_length": 12, "vocab_size": 24, "num_pairs": 2},
    ],
    "compositional_recall": [
        {"seq_length": 25, "vocab_size": 26, "num_pairs": 4, "random_non_queries": True},
        {"seq_length": 25, "vocab_size": 26, "num_pairs": 4},
    ],
    "forgetting_recall": [
        {"seq_length": 24, "vocab_size": 26, "num_pairs": 3, "random_non_queries": True},
        {"seq_length": 24, "vocab_size": 26, "num_pairs": 3, "num_updates": 2},
    ],
    "in_context_recall": [{"seq_length": 12, "vocab_size": 7}],
    "noisy_recall": [
        {"seq_length": 14, "vocab_size": 10, "noise_vocab_size": 3, "noise_rate": 0.4}
    ],
    "fuzzy_recall": [
        {"seq_length": 15, "vocab_size": 8, "min_key_length": 3, "max_value_length": 2},
        {"seq_length": 16, "vocab_size": 8},
    ],
    "induction": [{"seq_length": 7, "vocab_size": 5}],
    "memorization": [{"seq_length": 6, "vocab_size": 10}],
    "copy": [{"seq_length": 14, "vocab_size": 5}],
    "reverse": [{"seq_length": 14, "vocab_size": 5}],
    "sort": [{"seq_length": 14, "vocab_size": 5}],
    "selective_copy": [{"seq_length": 9, "vocab_size": 5, "num_tokens": 2}],
    "compression": [{"seq_length": 11, "vocab_size": 5}],
    "parity": [{"seq_length": 7, "cumulative": True}, {"seq_length": 7}],
    "majority": [{"seq_length": 7, "cumulative": True}, {"seq_length": 7}],
    "listops": [
        {"seq_length": 19, "max_depth": 4, "max_args": 3, "expand_rate": 0.6},
        {"seq_length": 40},
    ],
    "text": [{"seq_length": 6}],
}
SMALL = {name: cases[-1] for name, cases in CASES.items()}
NUM_ROWS = 8_000  # Enough for the statistics; the same everywhere, so each task compiles once.

every_task = pytest.mark.parametrize("name", sorted(TASKS))


def build(name, **settings):
    return TASKS[name](**(SMALL[name] | settings))


@functools.cache
def sampler(name, settings):
    return jax.jit(build(name, **dict(settings)).sample)


@functools.cache
def drawn(name, seed, backwards, settings):
    rows = np.arange(NUM_ROWS)[:: -1 if backwards else 1]
    return jax.tree.map(np.asarray, sampler(name, settings)(jax.random.key(seed), rows))


def draw(name, seed=7, backwards=False, **settings):
    return drawn(name, seed, backwards, tuple((SMALL[name] | settings).items()))


# Of these the different rows are not counted.
UNCOUNTED = {
    *("teacher", "recall", "compositional_recall", "forgetting_recall"),
    *("in_context_recall", "noisy_recall", "fuzzy_recall", "listops", "text"),
}


@pytest.mark.parametrize("name", sorted(TASKS.keys() - UNCOUNTED))
def test_there_are_as_many_rows_as_the_task_says(name):
    """All n are equally likely, and each is missed with a chance of (1 - 1 / n) ** draws."""
    for settings in CASES[name]:
        size = build(name, **settings).num_rows
        found = len(np.unique(draw(name, **settings).inputs, axis=0))
        expected = size * (1 - (1 - 1 / size) ** NUM_ROWS)
        assert found <= size
        assert abs(found - expected) <= 0.02 * expected


def test_the_words_for_held_out_rows_tell_of_a_space_that_training_has_seen():
    task = build("copy", seq_length=6, vocab_size=11)  # 1,000 rows.
    plain = task.held_out
    assert about_held_out(task, 9) == plain
    assert about_held_out(task, 10) == f"{plain}; 1,000 possible rows, 10 drawn in training"
    assert about_held_out(task._replace(num_rows=None), 10**6) == plain
    apart = task._replace(sample_held_out=task.sample, held_out="the last tenth of the text")
    assert about_held_out(apart, 10**6) == "the last tenth of the text"
    assert all(build(name, **SMALL[name]).num_rows is None for name in UNCOUNTED)


def even(choices):
    return np.full(choices, 1 / choices)


def assert_drawn_from(samples, probabilities):
    """Chi-squared with a limit of five standard deviations: fails by chance once in a million."""
    counts = np.array([np.sum(samples == outcome) for outcome in range(len(probabilities))])
    assert counts.sum() == len(samples)
    expected = len(samples) * np.asarray(probabilities)
    freedom = len(probabilities) - 1
    assert ((counts - expected) ** 2 / expected).sum() < freedom + 5 * np.sqrt(2 * freedom) + 5


def test_every_task_has_a_row_here_and_a_rule():
    assert CASES.keys() == TASKS.keys()
    page = (Path(__file__).parent.parent / "docs" / "tasks.md").read_text()
    assert not [name for name in TASKS if f"| `{name}` |" not in page], "a row in docs/tasks.md"
    # These are tested below, and in test_text.py: what they ask for stands in no row.
    assert TASK_RULES.keys() == TASKS.keys() - {"teacher", "memorization", "text"}


@every_task
def test_task_says_what_it_makes(name):
    task = build(name)
    batch = draw(name)
    B, T = NUM_ROWS, SMALL[name]["seq_length"]
    assert task.name == name
    if task.loss == "cross_entropy":
        P = batch.targets.shape[1]
        assert task.inputs is None
        assert batch.inputs.shape == (B, T)
        assert batch.inputs.dtype == batch.targets.dtype == np.int32
        if batch.positions is None:  # Every position has a label.
            batch = batch._replace(positions=np.tile(np.arange(T, dtype=np.int32), (B, 1)))
        assert batch.positions.dtype == np.int32
        assert batch.positions.shape == batch.weights.shape == (B, P)
        assert (np.diff(np.sort(batch.positions)) > 0).all(), "a position labelled twice"
        for tokens in (batch.inputs, batch.targets):
            assert set(np.unique(tokens)) <= set(range(task.vocab_size))
    else:
        assert task.vocab_size is None
        assert batch.positions is None
        assert batch.inputs.shape == (B, T, task.inputs)
        assert batch.targets.shape[:2] == batch.weights.shape
        assert batch.inputs.dtype == batch.targets.dtype == np.float32
    assert batch.weights.dtype == np.float32
    assert set(np.unique(batch.weights)) <= {0, 1}
    assert batch.weights.any(axis=1).all(), "a row without a label"


@every_task
def test_types_do_not_depend_on_the_mode_of_the_process(name, x64):
    batch = jax.eval_shape(build(name).sample, jax.random.key(7), np.arange(3, dtype=np.int32))
    assert {x.dtype.name for x in jax.tree.leaves(batch)} <= {"int32", "float32"}


@every_task
def test_row_depends_on_its_number_and_the_key_alone(name):
    batch, other, backwards = draw(name), draw(name, seed=8), draw(name, backwards=True)
    for array, flipped in zip(*map(jax.tree.leaves, (batch, backwards)), strict=True):
        # Matrix products may round differently from row to row.
        np.testing.assert_allclose(flipped[::-1], array, rtol=0, atol=1e-5)
    assert not np.array_equal(batch.inputs[:9], other.inputs[:9])
    assert not np.array_equal(batch.inputs[:9], batch.inputs[9:18])


@pytest.mark.parametrize("kind", ["rbg", "unsafe_rbg"])
@pytest.mark.parametrize("name", ["copy", "teacher"])
def test_rows_are_strangers_with_a_key_of_any_kind(name, kind):
    sample, rng = jax.jit(build(name).sample), jax.random.key(7, impl=kind)
    batch = sample(rng, np.array([3, 1, 4], np.int32))
    alone = [sample(rng, np.array([row], np.int32)) for row in (3, 1, 4)]
    for array, *parts in zip(*map(jax.tree.leaves, (batch, *alone)), strict=True):
        np.testing.assert_allclose(array, np.concatenate(parts), rtol=0, atol=1e-5)
    assert len(np.unique(batch.inputs.reshape(3, -1), axis=0)) == 3
    other = sample(jax.random.key(8, impl=kind), np.array([3, 1, 4], np.int32))
    assert not np.array_equal(batch.inputs, other.inputs)


@pytest.mark.parametrize("name", ["copy", "recall"])  # Of one draw, and of several.
def test_defaults_of_jax_and_raw_keys_change_no_row(name):
    want = draw(name)
    raw = jax.random.key_data(jax.random.key(7, impl="threefry2x32"))
    with jax.default_prng_impl("unsafe_rbg"), jax.threefry_partitionable(False):
        got = jax.jit(build(name).sample)(raw, np.arange(NUM_ROWS))
    for array, other in zip(*map(jax.tree.leaves, (want, got)), strict=True):
        np.testing.assert_array_equal(array, other)


@pytest.mark.parametrize(
    ("name", "settings", "words"),
    [
        ("teacher", {"num_heads": 5}, "num_heads must divide features: got num_heads=5"),
        ("teacher", {"seq_length": 0}, "seq_length must be at least 1, got 0"),
        ("recall", {"seq_length": 6}, "seq_length must be even and at least 8"),
        ("recall", {"seq_length": 13}, "seq_length must be even and at least 8"),
        ("recall", {"num_passes": 3}, "at least 16 for num_pairs=2 and num_passes=3: got 12"),
        ("recall", {"vocab_size": 12}, "vocab_size must be more than seq_length"),
        ("recall", {"power": 0.0}, "power must be above 0 and finite: got 0.0"),
        ("recall", {"num_pairs": 0}, "num_pairs must be at least 1, got 0"),
        ("forgetting_recall", {"num_updates": 4}, "got num_updates=4, num_pairs=3"),
        ("forgetting_recall", {"num_updates": 0}, "num_updates must be at least 1, got 0"),
        ("forgetting_recall", {"seq_length": 14}, "at least 16 for num_pairs=3 and num_updates=2"),
        ("compositional_recall", {"num_pairs": 5}, "must be a square: got 5"),
        ("compositional_recall", {"seq_length": 23}, "at least 24 for num_pairs=4: got 23"),
        ("compositional_recall", {"vocab_size": 25}, "got vocab_size=25, seq_length=25"),
        ("compositional_recall", {"power": -1.0}, "power must be above 0 and finite: got -1.0"),
        ("in_context_recall", {"seq_length": 13}, "seq_length of in_context_recall must be even"),
        ("in_context_recall", {"vocab_size": 1}, "vocab_size must be at least 2, got 1"),
        ("noisy_recall", {"noise_vocab_size": 9}, "got noise_vocab_size=9, vocab_size=10"),
        ("noisy_recall", {"noise_rate": 1.0}, "noise_rate must be in [0, 1): got 1.0"),
        ("fuzzy_recall", {"max_key_length": 4}, "at most 3, the tokens of keys: got 1 ... 4"),
        ("fuzzy_recall", {"min_value_length": 4}, "at most 4, the tokens of values: got 4 ... 3"),
        ("fuzzy_recall", {"min_key_length": 0}, "min_key_length must be at least 1, got 0"),
        ("fuzzy_recall", {"seq_length": 11}, "seq_length must be at least 12, two of the longest"),
        ("induction", {"seq_length": 2}, "seq_length must be at least 3, got 2"),
        ("memorization", {"seq_length": 5}, "seq_length of memorization must be even: got 5"),
        ("memorization", {"vocab_size": 2}, "vocab_size must be at least 3, got 2"),
        ("copy", {"seq_length": 7}, "seq_length of copy must be even: got 7"),
        ("copy", {"vocab_size": 2}, "vocab_size must be at least 3, got 2"),
        ("sort", {"seq_length": 7}, "seq_length of sort must be even: got 7"),
        ("selective_copy", {"seq_length": 4}, "at least 5 for num_tokens=2: got 4"),
        ("selective_copy", {"vocab_size": 3}, "vocab_size must be at least 4, got 3"),
        ("compression", {"seq_length": 10}, "seq_length of compression must be odd: got 10"),
        ("parity", {"seq_length": 1}, "seq_length must be at least 2, got 1"),
        ("listops", {"seq_length": 3}, "seq_length must be at least 4, got 3"),
        ("listops", {"max_depth": 1}, "max_depth must be at least 2, got 1"),
        ("listops", {"max_args": 1}, "max_args must be at least 2, got 1"),
        ("listops", {"expand_rate": 1.5}, "expand_rate must be in [0, 1]: got 1.5"),
    ],
)
def test_bad_setting_is_refused_in_one_line(name, settings, words):
    with pytest.raises(ValueError, match=r"^[^\n]*$") as error:
        build(name, **settings)
    assert words in str(error.value)


def labels(batch, row):
    """The targets of a row that count, by position."""
    counts = batch.weights[row] == 1
    positions, targets = batch.positions[row][counts], batch.targets[row][counts]
    return dict(zip(positions.tolist(), targets.tolist(), strict=True))


@pytest.mark.parametrize(
    ("name", "settings"), [(name, case) for name in TASK_RULES for case in CASES[name]]
)
def test_labels_follow_from_the_tokens_by_the_rule(name, settings):
    batch = draw(name, **settings)
    defaults = {p.name: p.default for p in inspect.signature(TASKS[name]).parameters.values()}
    settings = defaults | SMALL[name] | settings
    for row in range(300):
        assert labels(batch, row) == TASK_RULES[name](batch.inputs[row].tolist(), **settings)


# What is drawn -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "settings", "zone", "width", "power"),
    [
        ("recall", CASES["recall"][0], 8, 1, 1.0),
        ("recall", CASES["recall"][-1], 4, 1, 0.01),
        ("recall", CASES["recall"][1], 4, 1, 0.01),
        ("compositional_recall", CASES["compositional_recall"][-1], 12, 2, 0.01),
        ("forgetting_recall", CASES["forgetting_recall"][-1], 10, 1, 0.01),
    ],
)
def test_questions_are_placed_without_replacement_by_weight(name, settings, zone, width, power):
    S = (settings["seq_length"] - zone) // (width + 1)
    slots, rest = np.divmod(draw(name, **settings).positions - zone - (width - 1), width + 1)
    assert not rest.any()
    weight = power * np.arange(1, S + 1) ** (power - 1)
    # The first two of the K slots drawn.
    pairs = list(itertools.permutations(range(S), 2))
    chances = [weight[i] / weight.sum() * weight[j] / (weight.sum() - weight[i]) for i, j in pairs]
    index = {pair: i for i, pair in enumerate(pairs)}
    assert_drawn_from(np.array([index[tuple(pair)] for pair in slots[:, :2].tolist()]), chances)


@pytest.mark.parametrize("settings", CASES["recall"][::2])
def test_recall_keys_and_values_cover_their_halves_evenly(settings):
    V, K = settings["vocab_size"], settings["num_pairs"]
    batch = draw("recall", **settings)
    keys, values = batch.inputs[:, 0 : 2 * K : 2], batch.targets
    for column in range(K):
        assert_drawn_from(keys[:, column] - 1, even(V // 2 - 1))
        assert_drawn_from(values[:, column] - V // 2, even(V - V // 2))


def test_random_fillers_are_evenly_any_token_but_the_keys():
    batch = draw("recall", **CASES["recall"][1])
    keys = np.sort(batch.inputs[:, 0:4:2])
    # The last token of a row opens no slot. Its rank among the tokens that are not keys:
    last = batch.inputs[:, -1]
    assert_drawn_from(last - (keys < last[:, None]).sum(axis=1), even(22))


def test_other_numbers_are_drawn_evenly_from_what_is_left():
    rngs = jax.random.split(jax.random.key(7), 5_000)
    taken = np.array([6, 0, 5, 2])
    draws = jax.jit(jax.vmap(lambda rng: draw_others(rng, 4, 7, taken)))(rngs)
    assert set(np.unique(draws)) == {1, 3, 4}
    assert_drawn_from(np.searchsorted([1, 3, 4], np.asarray(draws).ravel()), even(3))


@pytest.mark.parametrize(("count", "size"), [(2, 4), (3, 3), (1, 7)])
def test_distinct_draws_are_even_over_all_ordered_choices(count, size):
    low = 10
    draws = jax.jit(
        lambda rng: draw_distinct(rng, count, low, low + size, shape=(NUM_ROWS,)),
    )(jax.random.key(7))
    choices = {choice: i for i, choice in enumerate(itertools.permutations(range(size), count))}
    samples = np.array([choices[tuple(d)] for d in (np.asarray(draws) - low).tolist()])
    assert_drawn_from(samples, even(len(choices)))


def test_distinct_draws_may_use_up_the_range():
    draws = jax.jit(jax.vmap(lambda rng: draw_distinct(rng, 64, 0, 64)))(
        jax.random.split(jax.random.key(7), 8)
    )
    np.testing.assert_array_equal(np.sort(draws, axis=1), np.tile(np.arange(64), (8, 1)))


def test_recall_of_a_large_vocabulary_has_nothing_of_its_size():
    task = TASKS["recall"](seq_length=64, vocab_size=8192, num_pairs=4)
    text = jax.jit(task.sample).lower(jax.random.key(7), np.arange(8)).as_text()
    assert "4095x" not in text
    assert "4096x" not in text


def test_updates_are_other_values_evenly():
    batch = draw("forgetting_recall")
    pairs = batch.inputs[:, :10].reshape(-1, 5, 2)
    updated = pairs[:, :3, 0] == pairs[:, 3:4, 0]  # [rows, K]: of the first of two updates.
    assert_drawn_from(updated.argmax(axis=1), even(3))
    old = pairs[:, :3, 1][updated]
    assert_drawn_from((pairs[:, 3, 1] - old) % 13 - 1, even(12))


def test_triples_come_in_any_order():
    triples = draw("compositional_recall").inputs[:, :12].reshape(-1, 4, 3)
    first, second = triples[..., 0], triples[..., 1]
    # Which of the other three shares the first one's first token, and which its second.
    same_first = (first[:, 1:] == first[:, :1]).argmax(axis=1)
    same_second = (second[:, 1:] == second[:, :1]).argmax(axis=1)
    orders = list(itertools.permutations(range(3), 2))
    samples = [orders.index(pair) for pair in zip(same_first, same_second, strict=True)]
    assert_drawn_from(np.array(samples), even(6))


def test_the_last_key_of_a_stream_is_any_of_those_before_it():
    keys = draw("in_context_recall").inputs[:, ::2]
    for seen in ({0, 1}, {0, 1, 2}):
        rows = [row for row in keys.tolist() if set(row[:-1]) == seen]
        assert_drawn_from(np.array([row[-1] for row in rows]), even(len(seen)))
    assert_drawn_from(keys[:, :-1].ravel(), even(3))


def test_values_of_a_stream_are_drawn_evenly():
    batch = draw("in_context_recall")
    assert_drawn_from(batch.inputs[:, 1] - 3, even(4))
    # That of one key does not tell that of another.
    rows = batch.inputs[batch.inputs[:, 0] != batch.inputs[:, 2]]
    assert_drawn_from(4 * (rows[:, 1] - 3) + rows[:, 3] - 3, even(16))


def test_noise_comes_at_its_rate():
    batch = draw("noisy_recall")
    noise = batch.inputs[:, ::2] >= 7
    # One of the first six pairs is spared, the last always.
    assert abs(noise[:, :-1].mean() - 0.4 * 5 / 6) < 0.01
    assert_drawn_from(batch.inputs[batch.inputs >= 7] - 7, even(3))


def test_fuzzy_lengths_and_tokens_are_drawn_evenly():
    batch = draw("fuzzy_recall")
    padding = (batch.inputs == 7).sum(axis=1)
    rows = batch.inputs[padding > 0]
    start = (rows == 7).sum(axis=1)
    is_key = rows < 3
    # Padding depends on lengths, so only their range is certain here; tokens are even.
    lengths = [int(np.argmin(keys[at:])) for keys, at in zip(is_key, start, strict=True)]
    assert set(lengths) == {1, 2, 3}
    assert_drawn_from(rows[np.arange(len(rows)), start], even(3))
    full = draw("fuzzy_recall", **CASES["fuzzy_recall"][0]).inputs
    key = full[np.arange(NUM_ROWS), (full == 7).sum(axis=1)]
    assert_drawn_from(key, even(3))


def test_the_marker_stands_anywhere():
    batch = draw("induction")
    assert_drawn_from((batch.inputs == 0).argmax(axis=1), even(5))
    assert_drawn_from(batch.targets.ravel() - 1, even(4))


def test_memorization_asks_for_the_values_of_the_map():
    batch = draw("memorization")
    assert (batch.inputs[:, 1::2] == 9).all()
    assert (batch.positions == [1, 3, 5]).all()
    facts = dict(enumerate(draw_map(0, 9).tolist()))
    for row in range(300):
        keys = batch.inputs[row, ::2].tolist()
        assert labels(batch, row) == {2 * i + 1: facts[key] for i, key in enumerate(keys)}


def test_the_map_gives_every_key_a_value_of_its_own():
    values = draw_map(0, 9)
    assert len(values) == len(set(values.tolist())) == 4
    assert set(values.tolist()) <= {4, 5, 6, 7, 8}
    assert (draw_map(0, 255) == draw_map(0, 255)).all()
    assert (draw_map(0, 255) != draw_map(1, 255)).mean() > 0.9
    assert_drawn_from(draw("memorization").inputs[:, ::2].ravel(), even(4))


@pytest.mark.parametrize("name", ["copy", "reverse", "sort", "compression"])
def test_tokens_are_drawn_evenly(name):
    batch = draw(name)
    P = batch.targets.shape[1]
    assert_drawn_from(batch.inputs[:, :P].ravel() - 1, even(4))


def test_tokens_stand_scattered_evenly():
    inputs = draw("selective_copy").inputs[:, :6]
    places = np.nonzero(inputs)[1].reshape(NUM_ROWS, 2)
    choices = list(itertools.combinations(range(6), 2))
    samples = [choices.index(pair) for pair in map(tuple, places.tolist())]
    assert_drawn_from(np.array(samples), even(15))
    assert_drawn_from(inputs[inputs > 0] - 2, even(3))


def test_bits_are_drawn_evenly():
    for name in ("parity", "majority"):
        bits = draw(name).inputs[:, :-1]
        assert_drawn_from(bits @ 2 ** np.arange(6), even(64))


def num_arguments(row):
    """Of the outermost operator."""
    depth = count = 0
    for token in row:
        depth -= token == 14
        count += depth == 1 and token < 14
        depth += 10 <= token < 14
    return count


def test_expressions_are_drawn_by_their_chances():
    batch = draw("listops")
    assert_drawn_from(batch.inputs[:, 0] - 10, even(4))
    # Shallow and short of nothing: an expression in a row with room for all that may come.
    inputs = draw("listops", seq_length=20, max_depth=3, max_args=3).inputs
    size = [num_arguments(row) for row in inputs.tolist()]
    assert_drawn_from(np.array(size) - 2, even(2))
    second = inputs[:, 1]
    assert abs((second >= 10).mean() - 0.25) < 0.02
    assert_drawn_from(second[second < 10], even(10))


def test_questions_of_compression_see_one_token_alone():
    mask = build("compression").mask
    assert mask.shape == (11, 11)
    for t in range(11):
        seen = set(np.flatnonzero(mask[t]).tolist())
        assert seen == (set(range(6)) if t <= 5 else {5, t})
    assert all(build(name).mask is None for name in TASKS if name != "compression")


# Teacher -----------------------------------------------------------------------------------------


def test_teacher_is_attention_on_normal_inputs():
    batch = draw("teacher")
    assert abs(batch.inputs.mean()) < 0.05
    assert abs(batch.inputs.std() - 1) < 0.05
    w = draw_weights(0, 12, 4)
    x = batch.inputs[3].astype(np.float64)
    expected = np.zeros((5, 12))
    for t, n in np.ndindex(5, w["query"].shape[1]):
        query = x[t] @ w["query"][:, n]
        logits = [query @ (x[s] @ w["key"][:, n]) / np.sqrt(len(query)) for s in range(5)]
        weights = np.exp(logits) / np.exp(logits).sum()
        for s in range(5):
            expected[t] += weights[s] * (x[s] @ w["value"][:, n]) @ w["out"][n]
    np.testing.assert_allclose(batch.targets[3], expected, atol=2e-6)


def test_teacher_can_be_matched_exactly_and_only_by_attending():
    batch = jax.tree.map(lambda x: x[:2000], draw("teacher"))
    layer = draw_weights(0, 12, 4)
    matched = jax.jit(lambda x: attention_layer(x, **layer))(batch.inputs)
    np.testing.assert_allclose(matched, batch.targets, atol=1e-5)
    # The best linear map of the input and of the mean of its row leaves much of the variance.
    means = np.broadcast_to(batch.inputs.mean(1, keepdims=True), batch.inputs.shape)
    seen = np.concatenate([batch.inputs, means], axis=-1).reshape(-1, 24)
    targets = batch.targets.reshape(-1, 12)
    solution = np.linalg.lstsq(seen, targets, rcond=None)[0]
    assert np.mean((targets - seen @ solution) ** 2) > 0.4 * np.var(targets)


def test_teachers_of_different_seeds_differ():
    one, same, other = (draw_weights(seed, 12, 4) for seed in (0, 0, 1))
    for name, weight in one.items():
        np.testing.assert_array_equal(weight, same[name])
        assert np.abs(weight - other[name]).mean() > 0.1 * np.abs(weight).mean()


# Baselines ---------------------------------------------------------------------------------------


def test_baseline_of_the_teacher_is_the_best_constant():
    task = build("teacher")
    batch = jax.tree.map(lambda x: x[:50], draw("teacher"))
    batch = batch._replace(weights=np.arange(250, dtype=np.float32).reshape(50, 5) % 3)

    def loss(constant):
        error = np.square(batch.targets.astype(np.float64) - constant).mean(-1)
        return (batch.weights * error).sum() / batch.weights.sum()

    best = np.average(batch.targets.reshape(-1, 12), axis=0, weights=batch.weights.ravel())
    assert float(task.baseline[1](batch)) == pytest.approx(loss(best), rel=1e-5)
    assert loss(best + 0.01) > loss(best)


@pytest.mark.parametrize(
    ("name", "choices"),
    [
        ("recall", 2),
        ("compositional_recall", 4),
        ("forgetting_recall", 3),
        ("in_context_recall", 4),
        ("noisy_recall", 4),
        ("fuzzy_recall", 4),
        ("induction", 4),
        ("memorization", 5),
        ("copy", 4),
        ("reverse", 4),
        ("sort", 4),
        ("selective_copy", 3),
        ("compression", 4),
        ("parity", 2),
        ("majority", 2),
        ("listops", 10),
    ],
)
def test_baseline_of_tokens_is_guessing(name, choices):
    assert float(build(name).baseline[1](draw(name))) == pytest.approx(np.log(choices))
