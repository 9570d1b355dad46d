"""Generated calls: each ends in a right result or in an error that names an argument.

About a hundred of each kind run with the other tests, always the same ones. `pytest -m slow
tests/test_generated.py` runs 2000 of calls of attention, and 2000 command lines.
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
    for name, text in generated_commands.FILES.items():
        (tmp_path / name).write_text(text)
    yield
    assert {path.name for path in tmp_path.iterdir()} == set(generated_commands.FILES)


@pytest.mark.parametrize("kind", ATTENTION)
def test_a_call_of_attention_is_right_or_refused_by_name(kind):
    counts = tally(*ATTENTION[kind], 40)
    assert counts["answered"] >= 10, counts
    assert counts["refused"] >= 5, counts


def test_a_command_line_is_built_or_refused_by_name(config_files):
    counts = tally(generated_commands.command_lines(), generated_commands.try_command, 100)
    assert counts["built"] >= 10, counts
    assert counts["refused"] >= 20, counts


@pytest.mark.slow
def test_2000_calls_of_attention_are_right_or_refused_by_name(capsys):
    shares = {"functions": 900, "rules": 500, "layers": 600}
    report(capsys, "calls", [tally(*ATTENTION[kind], n) for kind, n in shares.items()])


@pytest.mark.slow
def test_2000_command_lines_are_built_or_refused_by_name(capsys, config_files):
    calls = generated_commands.command_lines(), generated_commands.try_command
    report(capsys, "command lines", [tally(*calls, 2000)])


def report(capsys, what, counts):
    """Says what a proof has tried; one call that ends in another way ends the proof."""
    total = sum(counts, collections.Counter())
    with capsys.disabled():
        print(
            f"\ngenerated {what}: {total.total()} tried, 0 tracebacks, 0 hangs, 0 undocumented "
            f"errors; {', '.join(f'{n} {how}' for how, n in sorted(total.items()))}"
        )
    assert total.total() >= 2000
