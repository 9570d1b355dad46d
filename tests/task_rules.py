"""The rules of the tasks, read off a finished row: which position has which label, and why.

Each reader gets the tokens of one row and all settings of its task, checks that the row is built as
the task says, and returns `{position: label}`. This file does not use the package.
"""

import statistics


def in_half(token, vocab_size):
    """0: the filler, "key" or "value"."""
    return 0 if token == 0 else "key" if token < vocab_size // 2 else "value"


def read_questions(row, begin, width, facts, random_fillers):
    """Every key of `facts` once, at the start of a slot of `width + 1`; filler elsewhere."""
    labels, asked = {}, []
    parts = {token for key in facts for token in key}
    slots = (len(row) - begin) // (width + 1)
    for slot in range(slots):
        at = begin + slot * (width + 1)
        key = tuple(row[at : at + width])
        fillers = row[at : at + width + 1]
        if key in facts:
            asked.append(key)
            labels[at + width - 1] = facts[key]
            fillers = fillers[width:]
        for token in fillers:
            assert token not in parts if random_fillers else token == 0
    for token in row[begin + slots * (width + 1) :]:
        assert token not in parts if random_fillers else token == 0
    assert sorted(asked) == sorted(facts)
    return labels


def recall(row, seq_length, vocab_size, num_pairs, power, num_passes, random_non_queries):
    assert len(row) == seq_length
    shown = row[: 2 * num_pairs]
    begin = 2 * num_pairs * num_passes
    assert row[:begin] == shown * num_passes
    facts = {}
    for key, value in zip(shown[::2], shown[1::2], strict=True):
        assert (in_half(key, vocab_size), in_half(value, vocab_size)) == ("key", "value")
        assert (key,) not in facts
        assert value not in facts.values()
        facts[key,] = value
    return read_questions(row, begin, 1, facts, random_non_queries)


def forgetting_recall(
    row, seq_length, vocab_size, num_pairs, num_updates, power, random_non_queries
):
    begin = 2 * (num_pairs + num_updates)
    facts, updated = {}, []
    for i in range(num_pairs + num_updates):
        key, value = row[2 * i], row[2 * i + 1]
        assert (in_half(key, vocab_size), in_half(value, vocab_size)) == ("key", "value")
        if i < num_pairs:
            assert (key,) not in facts
            assert value not in facts.values()
        else:
            assert facts[key,] != value
            updated.append(key)
        facts[key,] = value
    assert len(set(updated)) == num_updates
    return read_questions(row, begin, 1, facts, random_non_queries)


def compositional_recall(row, seq_length, vocab_size, num_pairs, power, random_non_queries):
    third = vocab_size // 3
    facts = {}
    for i in range(num_pairs):
        first, second, value = row[3 * i : 3 * i + 3]
        assert 1 <= first < third <= second < 2 * third <= value < vocab_size
        assert (first, second) not in facts
        assert value not in facts.values()
        facts[first, second] = value
    grid = {first for first, _ in facts}, {second for _, second in facts}
    assert len(grid[0]) ** 2 == len(grid[1]) ** 2 == num_pairs
    return read_questions(row, 3 * num_pairs, 2, facts, random_non_queries)


def in_context_recall(row, seq_length, vocab_size):
    return noisy_recall(row, seq_length, vocab_size, 0, 0.0)


def noisy_recall(row, seq_length, vocab_size, noise_vocab_size, noise_rate):
    size = vocab_size - noise_vocab_size
    labels, facts = {}, {}
    for t in range(0, seq_length, 2):
        key, value = row[t], row[t + 1]
        if key >= size:
            assert value >= size
            continue
        assert key < size // 2 <= value < size
        if key in facts:
            assert facts[key] == value
            labels[t] = value
        facts[key] = value
    assert seq_length - 2 in labels
    return labels


def fuzzy_recall(
    row,
    seq_length,
    vocab_size,
    min_key_length,
    max_key_length,
    min_value_length,
    max_value_length,
):
    padding = vocab_size - 1
    t = 0
    while row[t] == padding:
        t += 1
    room = 2 * (max_key_length + max_value_length) - (min_key_length + min_value_length)
    assert t < room, "there was room for another pair"
    labels, facts = {}, {}
    while t < seq_length:
        key, value = [], []
        while row[t] < padding // 2:
            key.append(row[t])
            t += 1
        begin = t
        while t < seq_length and padding // 2 <= row[t] < padding:
            value.append(row[t])
            t += 1
        assert min_key_length <= len(key) == len(set(key)) <= max_key_length
        assert min_value_length <= len(value) == len(set(value)) <= max_value_length
        old = tuple(key) in facts
        if old:
            assert facts[tuple(key)] == value
            for i in range(len(value)):
                labels[begin + i - 1] = value[i]
        facts[tuple(key)] = value
    assert old, "the last pair is one of those before it"
    return labels


def induction(row, seq_length, vocab_size):
    first, last = (t for t in range(seq_length) if row[t] == 0)
    assert first + 1 < last == seq_length - 1
    return {last: row[first + 1]}


def copy(row, seq_length, vocab_size):
    half = seq_length // 2
    assert all(row[t] > 0 for t in range(half))
    assert not any(row[half:])
    return {half + i: row[i] for i in range(half)}


def reverse(row, seq_length, vocab_size):
    copied = copy(row, seq_length, vocab_size)
    return dict(zip(copied, reversed(copied.values()), strict=True))


def sort(row, seq_length, vocab_size):
    copied = copy(row, seq_length, vocab_size)
    return dict(zip(copied, sorted(copied.values()), strict=True))


def selective_copy(row, seq_length, vocab_size, num_tokens):
    asks = row.index(1)
    tokens = [token for token in row[:asks] if token != 0]
    assert len(tokens) == num_tokens == seq_length - 1 - asks
    assert not any(row[asks + 1 :])
    return {asks + 1 + i: token for i, token in enumerate(tokens)}


def compression(row, seq_length, vocab_size):
    length = row.index(0)
    assert row[length:] == [0] * (length + 1)
    return {length + 1 + i: row[i] for i in range(length)}


def parity(row, seq_length, cumulative):
    return circuit(row, seq_length, cumulative, lambda bits: sum(bits) % 2)


def majority(row, seq_length, cumulative):
    return circuit(row, seq_length, cumulative, lambda bits: int(bits.count(1) > bits.count(0)))


def circuit(row, seq_length, cumulative, rule):
    bits = row if cumulative else row[:-1]
    assert set(bits) <= {0, 1}
    if cumulative:
        return {t: rule(bits[: t + 1]) for t in range(seq_length)}
    assert row[-1] == 2
    return {seq_length - 1: rule(bits)}


def listops(row, seq_length, max_depth, max_args, expand_rate):
    def read(at, depth):
        """The value of what begins at `at`, and where it ends."""
        if row[at] < 10:
            return row[at], at
        assert depth < max_depth
        rule = {10: min, 11: max, 12: median, 13: lambda x: sum(x) % 10}[row[at]]
        values = []
        while row[at + 1] != 14:
            value, at = read(at + 1, depth + 1)
            values.append(value)
        assert 2 <= len(values) <= max_args
        return rule(values), at + 1

    def median(values):
        return int(statistics.median(values))

    assert row[0] >= 10
    value, end = read(0, 1)
    assert all(token == 15 for token in row[end + 1 :])
    return {end: value}


TASK_RULES = {
    "recall": recall,
    "compositional_recall": compositional_recall,
    "forgetting_recall": forgetting_recall,
    "in_context_recall": in_context_recall,
    "noisy_recall": noisy_recall,
    "fuzzy_recall": fuzzy_recall,
    "induction": induction,
    "copy": copy,
    "reverse": reverse,
    "sort": sort,
    "selective_copy": selective_copy,
    "compression": compression,
    "parity": parity,
    "majority": majority,
    "listops": listops,
}
