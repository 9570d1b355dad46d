"""Generated calls: each ends in a right result or in an error that names an argument.

Some dozens of each kind run with the other tests, always the same ones; thousands of them are a
part of benchmarks/reliability.py.
"""

import collections

import generated_attention
import generated_commands
import pytest
from hypothesis import HealthCheck, given, settings


def tally(calls, attempt, number):
    """Tries a number of generated calls; how many ended how."""
    counts = collections.Counter()

    @settings(
        max_examples=number,
        derandomize=True,  # The same calls in every run.
        database=None,
        deadline=None,  # Theirs is in `outcomes`.
        suppress_health_check=list(HealthCheck),
    )
    @given(calls)
    def run(call):
        counts[attempt(call)] += 1

    run()
    return counts


ATTENTION = {
    "functions": (generated_attention.function_calls(), generated_attention.try_function),
    "rules": (generated_attention.rule_calls(), generated_attention.try_rule),
    "layers": (generated_attention.layer_calls(), generated_attention.try_layer),
}


@pytest.fixture
def config_files(tmp_path, monkeypatch):
    """A directory of its own, with the config files that command lines name."""
    monkeypatch.chdir(tmp_path)
    generated_commands.write_files(tmp_path)
    yield
    assert {path.name for path in tmp_path.iterdir()} == set(generated_commands.FILES)


@pytest.mark.parametrize("kind", ATTENTION)
def test_a_call_of_attention_is_right_or_refused_by_name(kind):
    counts = tally(*ATTENTION[kind], 10)
    assert counts["answered"] >= 3, counts
    assert counts["refused"] >= 1, counts


def test_a_command_line_is_built_or_refused_by_name(config_files):
    counts = tally(*generated_commands.ALL, 30)
    assert counts["built"] >= 2, counts
    assert counts["refused"] >= 5, counts
