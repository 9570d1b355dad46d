"""Promises of the tasks: a batch follows its rule, is drawn evenly, and depends on (rng, row)
alone."""

import functools
import itertools

import jax
import numpy as np
import pytest

from attention_jax.tasks import TASKS
from attention_jax.tasks.recall import draw_distinct
from attention_jax.tasks.teacher import attention_layer, draw_weights

SMALL = {
    "teacher": {"seq_length": 5, "features": 12, "num_heads": 4},
    "recall": {"seq_length": 12, "vocab_size": 24, "num_pairs": 2},
    "copy": {"seq_length": 14, "vocab_size": 5},
}
NUM_ROWS = 20_000  # Enough for the statistics; the same everywhere, so each task compiles once.

every_task = pytest.mark.parametrize("name", sorted(TASKS))


def build(name, **settings):
    return TASKS[name](**(SMALL[name] | settings))


@functools.cache
def sampler(name, **settings):
    return jax.jit(build(name, **settings).sample)


def draw(name, seed=7, rows=None, **settings):
    rows = np.arange(NUM_ROWS) if rows is None else rows
    return jax.tree.map(np.asarray, sampler(name, **settings)(jax.random.key(seed), rows))


def assert_drawn_from(samples, probabilities):
    """Chi-squared with a limit of five standard deviations: fails by chance once in a million."""
    counts = np.array([np.sum(samples == outcome) for outcome in range(len(probabilities))])
    assert counts.sum() == len(samples)
    expected = len(samples) * np.asarray(probabilities)
    freedom = len(probabilities) - 1
    assert ((counts - expected) ** 2 / expected).sum() < freedom + 5 * np.sqrt(2 * freedom) + 5


def test_every_small_setting_has_a_task():
    assert SMALL.keys() == TASKS.keys()


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
        assert batch.inputs.dtype == batch.targets.dtype == batch.positions.dtype == np.int32
        assert batch.positions.shape == batch.weights.shape == (B, P)
        for tokens in (batch.inputs, batch.targets):
            assert set(np.unique(tokens)) <= set(range(task.vocab_size))
    else:
        assert task.vocab_size is None
        assert batch.positions is None
        assert batch.inputs.shape == (B, T, task.inputs)
        assert batch.targets.shape[:2] == batch.weights.shape
        assert batch.inputs.dtype == batch.targets.dtype == np.float32
    assert batch.weights.dtype == np.float32
    assert (batch.weights == 1).all()


@every_task
def test_row_depends_on_its_number_and_the_key_alone(name):
    rows = np.array([11, 3, 0, 7])
    whole, other, some = draw(name), draw(name, seed=8), draw(name, rows=rows)
    for all_rows, few_rows in zip(*map(jax.tree.leaves, (whole, some)), strict=True):
        if all_rows.dtype.kind == "i":
            np.testing.assert_array_equal(few_rows, all_rows[rows])
        else:  # Matrix products of 4 and of all rows may round differently.
            np.testing.assert_allclose(few_rows, all_rows[rows], rtol=0, atol=1e-5)
    assert not np.array_equal(whole.inputs[:9], other.inputs[:9])
    assert not np.array_equal(whole.inputs[:9], whole.inputs[9:18])


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
        ("copy", {"seq_length": 7}, "seq_length of copy must be even: got 7"),
        ("copy", {"vocab_size": 2}, "vocab_size must be at least 3, got 2"),
    ],
)
def test_bad_setting_is_refused_in_one_line(name, settings, words):
    with pytest.raises(ValueError, match=r"^[^\n]*$") as error:
        build(name, **settings)
    assert words in str(error.value)


# Recall ------------------------------------------------------------------------------------------


def recall_settings(settings):
    all_settings = {**SMALL["recall"], "num_passes": 1, "power": 0.01, **settings}
    names = ("seq_length", "vocab_size", "num_pairs", "num_passes", "power")
    return [all_settings[name] for name in names]


def recall_row(keys, values, slots, seq_length, num_passes):
    """The rule, by hand: pairs, then each key alone at the start of its slot."""
    row, labels = [], {}
    for _ in range(num_passes):
        for key, value in zip(keys, values, strict=True):
            row += [key, value]
    zone = len(row)
    row += [0] * (seq_length - zone)
    for key, value, slot in zip(keys, values, slots, strict=True):
        row[zone + 2 * (slot - 1)] = key
        labels[zone + 2 * (slot - 1)] = value
    return row, labels


every_recall = pytest.mark.parametrize(
    "settings", [{}, {"num_passes": 2, "seq_length": 16, "vocab_size": 25, "power": 1.0}]
)


@every_recall
def test_recall_follows_the_rule(settings):
    L, V, K, passes, _ = recall_settings(settings)
    batch = draw("recall", **settings)
    zone = 2 * K * passes
    for inputs, targets, positions in zip(
        *(x[:500] for x in (batch.inputs, batch.targets, batch.positions)), strict=True
    ):
        keys, values = inputs[0 : 2 * K : 2], inputs[1 : 2 * K : 2]
        slots = (positions - zone) // 2 + 1
        assert len(set(keys)) == len(set(values)) == len(set(slots)) == K
        assert all(1 <= key <= V // 2 - 1 for key in keys)
        assert all(V // 2 <= value <= V - 1 for value in values)
        assert all(1 <= slot <= (L - zone) // 2 for slot in slots)
        row, labels = recall_row(keys, values, slots, L, passes)
        assert inputs.tolist() == row
        assert dict(zip(positions.tolist(), targets.tolist(), strict=True)) == labels


@every_recall
def test_recall_slots_are_drawn_without_replacement_by_weight(settings):
    L, _, K, passes, power = recall_settings(settings)
    S = (L - 2 * K * passes) // 2
    slots = (draw("recall", **settings).positions - 2 * K * passes) // 2  # [rows, K]
    weight = power * np.arange(1, S + 1) ** (power - 1)
    pairs = list(itertools.permutations(range(S), K))
    chances = [weight[i] / weight.sum() * weight[j] / (weight.sum() - weight[i]) for i, j in pairs]
    samples = np.array([pairs.index(tuple(pair)) for pair in slots.tolist()])
    assert_drawn_from(samples, chances)


@every_recall
def test_recall_keys_and_values_cover_their_halves_evenly(settings):
    _, V, K, *_ = recall_settings(settings)
    batch = draw("recall", **settings)
    keys, values = batch.inputs[:, 0 : 2 * K : 2], batch.targets
    for column in range(K):
        assert_drawn_from(keys[:, column] - 1, np.full(V // 2 - 1, 1 / (V // 2 - 1)))
        assert_drawn_from(values[:, column] - V // 2, np.full(V - V // 2, 1 / (V - V // 2)))


@pytest.mark.parametrize(("count", "size"), [(2, 4), (3, 3), (1, 7)])
def test_distinct_draws_are_even_over_all_ordered_choices(count, size):
    low = 10
    rngs = jax.random.split(jax.random.key(7), 20_000)
    draws = jax.jit(jax.vmap(lambda rng: draw_distinct(rng, count, low, low + size)))(rngs)
    choices = {choice: i for i, choice in enumerate(itertools.permutations(range(size), count))}
    samples = np.array([choices[tuple(d)] for d in (np.asarray(draws) - low).tolist()])
    assert_drawn_from(samples, np.full(len(choices), 1 / len(choices)))


def test_distinct_draws_may_use_up_the_range():
    draws = jax.jit(jax.vmap(lambda rng: draw_distinct(rng, 64, 0, 64)))(
        jax.random.split(jax.random.key(7), 8)
    )
    np.testing.assert_array_equal(np.sort(draws, axis=1), np.tile(np.arange(64), (8, 1)))


def test_recall_of_a_large_vocabulary_sorts_nothing_of_its_size():
    task = TASKS["recall"](seq_length=64, vocab_size=8192, num_pairs=4)
    text = jax.jit(task.sample).lower(jax.random.key(7), np.arange(8)).as_text()
    assert "4095x" not in text
    assert "4096x" not in text


# Copy --------------------------------------------------------------------------------------------


def test_copy_asks_for_the_first_half_in_order():
    batch = draw("copy")
    np.testing.assert_array_equal(batch.targets, batch.inputs[:, :7])
    np.testing.assert_array_equal(batch.positions, np.tile(np.arange(7, 14), (NUM_ROWS, 1)))
    assert not batch.inputs[:, 7:].any()
    assert_drawn_from(batch.inputs[:, :7].ravel() - 1, np.full(4, 1 / 4))


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


@pytest.mark.parametrize(("name", "choices"), [("recall", 2), ("copy", 4)])
def test_baseline_of_tokens_is_guessing(name, choices):
    assert float(build(name).baseline[1](draw(name))) == pytest.approx(np.log(choices))
