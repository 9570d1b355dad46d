"""`attention-jax check` finds what is broken, and says what is right."""

import jax
import jax.numpy as jnp
import pytest

from attention_jax.functional import dot_product
from attention_jax.laboratory import check
from attention_jax.training.config import ConfigError
from attention_jax.training.process import RunError

SMALL = "--shape=2,10,4,8"


def found(*flags):
    return check.check(check.parse(["check", SMALL, *flags]))


@pytest.mark.parametrize(
    "flags",
    [
        ["--kv_heads=2", "--features=causal,alibi,sinks,lengths"],
        ["--features=window=3,bias,softcap=2,segments", "--dtype=bfloat16"],
        pytest.param(["--keys=7", "--features=dropout=0.3"], marks=pytest.mark.slow),
        pytest.param(["--features=", "--dtype=float16"], marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_what_is_right_is_said_to_be(flags):
    results = found(*flags)
    for name in ("dense", "blockwise"):
        assert results[name].is_right
        assert 0 < results[name].values <= 1
        assert 0 < results[name].gradients <= 1
        assert results[name].causal is ("causal" in flags[-1] or "causal" in flags[0] or None)
    if jax.default_backend() == "cpu":
        assert "GPU" in results["cudnn"].refused


def broken(monkeypatch, change):
    """The results where the tiles are changed."""
    right = dot_product.blockwise_attention

    def wrong(query, key, value, options, block_size=None):
        return change(right, query, key, value, options)

    monkeypatch.setattr(dot_product, "blockwise_attention", wrong)
    return found("--features=causal,lengths")["blockwise"]


def test_values_that_are_off_are_found(monkeypatch):
    result = broken(monkeypatch, lambda right, *arguments: 1.0001 * right(*arguments))
    assert result.values > 1
    assert not result.is_right


def test_gradients_that_are_off_are_found(monkeypatch):
    def change(right, query, *others):
        return right(query - 0.1 * (query - jax.lax.stop_gradient(query)), *others)

    result = broken(monkeypatch, change)
    assert result.values <= 1 < result.gradients
    assert not result.is_right


def test_a_leak_of_the_future_is_found(monkeypatch):
    def change(right, query, key, value, options):
        return right(query, key, value, options) + 1e-9 * value.sum(-3, keepdims=True).mean()

    result = broken(monkeypatch, change)
    assert result.values <= 1
    assert result.causal is False


def test_rows_that_see_nothing_must_be_zeros(monkeypatch):
    result = broken(monkeypatch, lambda right, *arguments: right(*arguments) + 1e-12)
    assert result.empty is False
    assert not result.is_right


@pytest.mark.parametrize(
    "flags",
    [
        ["--shape=1,16,2,8", "--features=lengths"],
        ["--shape=3,16,2,8", "--keys=1", "--features=lengths"],
        ["--shape=2,30,2,8", "--keys=9", "--features=window=2", "--dtype=bfloat16"],
    ],
    ids=str,
)
def test_a_fault_is_found_where_many_queries_see_nothing(flags, monkeypatch):
    request = check.parse(["check", *flags])
    assert check.check(request)["blockwise"].is_right
    right = dot_product.blockwise_attention
    for wrong in (lambda *a: right(*a) * 1.4, lambda *a: right(*a) + 0.5):
        monkeypatch.setattr(dot_product, "blockwise_attention", wrong)
        assert not check.check(request)["blockwise"].is_right


def test_the_command_prints_a_table_and_ends_with_an_error_if_it_is_broken(monkeypatch, capsys):
    check.main(["check", SMALL])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("B=2, T=10, S=10, N=4, K=4, H=8, float32, causal; jax ")
    assert [line.split()[0] for line in lines[2:5]] == ["dense", "blockwise", "cudnn"]
    assert lines[2].endswith("right")
    bad = {"dense": check.Found(0.1, 2.0)}
    monkeypatch.setattr(check, "check", lambda request: bad)
    with pytest.raises(RunError, match="broken: dense"):
        check.main(["check", SMALL])
    assert "BROKEN" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--shape=2,3"], r"--shape.*2,3"),
        (["--shape=2,3,4,x"], r"--shape.*x"),
        (["--shape=2,3,4,0"], r"--shape.*0"),
        (["--shape=64,65536,8,64"], r"--shape.*logits"),
        (["--kv_heads=3"], r"--kv_heads.*4.*3"),
        (["--keys=0"], r"--keys.*0"),
        (["--keys=7", "--features=segments"], "segments.*7 and 10"),
        (["--dtype=int8"], "--dtype.*int8"),
        (["--features=causl"], "--features.*causl"),
        (["--features=causal=3"], "causal has no number"),
        (["--features=window"], "window needs a number"),
        (["--features=window=x"], "window needs a number.*x"),
        (["--features=window=-1"], "window must be at least 0 .*: got -1"),
        (["--features=window=99999999999999999999"], "window must be at least 0.*got 9999"),
        (["--features=softcap=1e400"], "softcap must be positive and finite: got 1e400"),
        (["--features=softcap=0"], "softcap must be positive and finite: got 0"),
        (["--features=dropout=1"], r"dropout must be in \[0, 1\): got 1"),
        (["--features=dropout=nan"], r"dropout must be in \[0, 1\): got nan"),
        (["--seed=-1"], "--seed.*-1"),
        (["--shape=\u00b2,9,2,8"], "--shape must be four positive integers"),
        (["--shape=2,9,2,99999999999"], "--shape has .* numbers in an input"),
        (["--what=1"], "unrecognized"),
    ],
    ids=str,
)
def test_a_flag_that_cannot_be_is_named(flags, words):
    with pytest.raises(ConfigError, match=words):
        check.parse(["check", SMALL, *flags])


def test_inputs_are_rounded_to_the_type_that_is_checked():
    with jax.enable_x64(True):
        inputs = check._inputs(check.parse(["check", SMALL, "--dtype=bfloat16"]))
        for array in inputs.values():
            assert array.dtype == jnp.float64
            assert (array.astype(jnp.bfloat16).astype(jnp.float64) == array).all()
