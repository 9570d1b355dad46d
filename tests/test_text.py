"""Promises of text of one's own: rows, vocabularies, what a run keeps, and what is refused."""

import base64
import contextlib
import importlib.util
import io
import json
import math
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import attention_jax
from attention_jax import analysis, generation
from attention_jax.interop import huggingface
from attention_jax.laboratory import export, findings, inspect, subject, sweep
from attention_jax.laboratory import generate as laboratory
from attention_jax.laboratory.parser import as_text
from attention_jax.tasks import TASKS
from attention_jax.tasks.vocabulary import Bytes, Characters, Text, Tokenizer, lost
from attention_jax.training import budget, experiment
from attention_jax.training.build import build
from attention_jax.training.command import parse
from attention_jax.training.config import ConfigError, default_config
from attention_jax.training.loading import check_vocabulary
from attention_jax.training.metrics import Samples
from attention_jax.training.optimizer import budget_end, make_optimizer, with_budget
from attention_jax.training.watch import make_sampler

POEM = "".join(f"line {i} of the poem, née {i * i}\n" for i in range(60))
NAMES = "".join(f"{'abcdefgh'[i % 8] * (1 + i % 5)}{i}\n\n" for i in range(50))


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("texts")
    (folder / "poem.txt").write_text(POEM, encoding="utf-8")
    (folder / "names.txt").write_text(NAMES.rstrip("\n"), encoding="utf-8")
    (folder / "tokenizer.json").write_text(json.dumps(TOKENIZER), encoding="utf-8")
    return folder


WORDS = {"[UNK]": 0, "line": 1, "of": 2, "the": 3, "poem": 4}
TOKENIZER = {
    "version": "1.0",
    "truncation": None,
    "padding": None,
    "added_tokens": [],
    "normalizer": None,
    "pre_tokenizer": {"type": "Whitespace"},
    "post_processor": None,
    "decoder": None,
    "model": {"type": "WordLevel", "vocab": WORDS, "unk_token": "[UNK]"},
}


def rows(sample, number=500):
    return jax.tree.map(np.asarray, jax.jit(sample)(jax.random.key(0), np.arange(number)))


@pytest.mark.parametrize("tokens", ["characters", "bytes"])
def test_rows_are_windows_and_the_last_tenth_is_held_out(files, tokens):
    task = TASKS["text"](path=str(files / "poem.txt"), seq_length=9, tokens=tokens)
    whole = POEM if tokens == "characters" else POEM.encode()
    cut = int(0.9 * len(whole))
    decode = task.text.vocabulary.decode
    for sample, part in ((task.sample, whole[:cut]), (task.sample_held_out, whole[cut:])):
        batch = rows(sample, 4000)
        assert (batch.weights == 1).all()
        assert batch.positions is None
        np.testing.assert_array_equal(batch.inputs[:, 1:], batch.targets[:, :-1])
        found = np.concatenate([batch.inputs, batch.targets[:, -1:]], axis=1)
        if tokens == "characters":
            found = {decode(row) for row in found.tolist()}
        else:
            found = {bytes(row) for row in found.tolist()}
        windows = {part[i : i + 10] for i in range(len(part) - 9)}
        assert found <= windows
        # The first and the last window are drawn too, as any other.
        few = len(windows) < 200
        assert not few or found == windows


def test_a_line_is_a_row_and_its_padding_has_no_weight(files):
    task = TASKS["text"](path=str(files / "names.txt"), seq_length=8, lines=True)
    names = [name for name in NAMES.split("\n") if name]
    decode, found, parts = task.text.vocabulary.decode, [], []
    for sample in (task.sample, task.sample_held_out):
        batch = rows(sample)
        for inputs, targets, weights in zip(*batch[:3], strict=True):
            length = int(weights.sum())
            assert (weights[:length] == 1).all()
            assert decode(inputs[:length].tolist())[0] == "\n"
            found.append(decode(targets[:length].tolist()))
            assert decode(inputs[1:length].tolist()) + "\n" == found[-1]
        parts.append({name.removesuffix("\n") for name in found})
        found.clear()
    # A tenth is held out, and not the last one: files of lines are often sorted.
    assert [len(part) for part in parts] == [45, 5]
    assert parts[0] | parts[1] == set(names)
    assert parts[1] != set(names[45:])


def test_the_default_text_comes_with_python():
    from pydoc_data.topics import topics

    task = TASKS["text"]()
    assert task.text.name == "pydoc_data.topics"
    assert task.vocab_size == len(set("\n\n".join(topics.values())))


def test_the_baseline_is_the_share_of_each_token(files):
    task = TASKS["text"](path=str(files / "poem.txt"), seq_length=9)
    batch = rows(task.sample_held_out, 50)
    part = POEM[: int(0.9 * len(POEM))]
    losses = []
    for target in task.text.vocabulary.decode(batch.targets.ravel().tolist()):
        losses.append(-math.log((part.count(target) + 1) / (len(part) + task.vocab_size)))
    assert float(task.baseline[1](batch)) == pytest.approx(np.mean(losses), rel=1e-5)


@pytest.mark.parametrize("vocabulary", [Characters("\n abé日"), Bytes()], ids=["letters", "bytes"])
def test_a_vocabulary_gives_the_text_back_and_can_be_kept(vocabulary):
    text = "a b\né日 ba"
    tokens = vocabulary.encode(text)
    assert tokens.dtype == np.int32
    assert tokens.max() < vocabulary.size
    assert vocabulary.decode(tokens.tolist()) == text
    kept = Text("a.txt", vocabulary, "0", 1.0, False)
    again = Text.from_dict(json.loads(json.dumps(kept.to_dict())))
    assert again.vocabulary.encode(text).tolist() == tokens.tolist()
    with pytest.raises(ValueError, match="cannot be read"):
        Text.from_dict({"name": "a.txt"})


@pytest.mark.parametrize("vocabulary", [Characters("\n abé日"), Bytes()], ids=["letters", "bytes"])
def test_the_library_of_tokenizers_reads_a_vocabulary(vocabulary):
    tokenizers = pytest.importorskip("tokenizers")
    found = tokenizers.Tokenizer.from_str(vocabulary.definition)
    assert found.get_vocab_size() == vocabulary.size
    text = "a  b\n\né日 ba"
    tokens = vocabulary.encode(text).tolist()
    assert found.encode(text).ids == tokens
    assert found.decode(tokens) == text
    if isinstance(vocabulary, Characters):
        assert found.encode("a\r\nb\ra").ids == vocabulary.encode("a\nb\na").tolist()
        with pytest.raises(Exception, match="WordLevel"):  # Of no type of its own.
            found.encode("x")
    else:
        every = bytes(range(256)).decode("latin-1")
        assert found.encode(every).ids == vocabulary.encode(every).tolist()


def test_a_character_that_training_has_not_seen_is_named():
    with pytest.raises(ValueError, match="got 'xy'"):
        Characters("ab").encode("axbyx")


def test_a_tokenizer_of_a_file_makes_the_tokens(files, tmp_path):
    pytest.importorskip("tokenizers")
    (tmp_path / "poem.txt").write_text("the line of the poem\n" * 20)
    task = TASKS["text"](
        path=str(tmp_path / "poem.txt"), tokens=str(files / "tokenizer.json"), seq_length=3
    )
    assert task.vocab_size == len(WORDS)
    assert task.text.vocabulary.encode("line of poem").tolist() == [1, 2, 4]
    assert task.text.tokens_per_character < 0.5
    again = Text.from_dict(task.text.to_dict())
    assert again.vocabulary.decode([1, 2]) == "line of"


@pytest.mark.parametrize("lines", [False, True])
def test_bits_count_the_characters_of_the_part_held_out(lines, tmp_path):
    words = [f"{'abc' if i < 70 else '日本語'}{i:02}\n" for i in range(100)]
    (tmp_path / "text.txt").write_text("".join(words), encoding="utf-8")
    options = {"path": str(tmp_path / "text.txt"), "seq_length": 12, "lines": lines}
    task = TASKS["text"](tokens="bytes", **options)
    if lines:
        batch = rows(task.sample_held_out)
        found = zip(batch.targets, batch.weights, strict=True)
        held_out = "".join({task.text.vocabulary.decode(x[w > 0].tolist()) for x, w in found})
        assert held_out.count("\n") == 10
    else:  # It may begin within a letter.
        held_out = "".join(words).encode()[int(0.9 * len("".join(words).encode())) :]
        held_out = held_out.decode(errors="ignore")
    size = len(held_out.encode()) / len(held_out)
    assert task.text.tokens_per_character == pytest.approx(size, rel=0.02)
    assert TASKS["text"](**options).text.tokens_per_character == 1


def test_a_tokenizer_that_does_not_know_the_newline_has_no_lines(tmp_path):
    tokenizers = pytest.importorskip("tokenizers")
    words = {"[UNK]": 0, "a": 1, "b": 2}
    tokenizers.Tokenizer(tokenizers.models.BPE(words, [], unk_token="[UNK]")).save(
        str(tmp_path / "tokenizer.json")
    )
    (tmp_path / "names.txt").write_text("ab\nba\naéb\n" * 10, encoding="utf-8")
    with pytest.raises(ValueError, match="must have a token for the newline"):
        TASKS["text"](
            path=str(tmp_path / "names.txt"),
            tokens=str(tmp_path / "tokenizer.json"),
            lines=True,
            seq_length=8,
        )


def test_a_tokenizer_may_begin_with_a_byte_order_mark(files, tmp_path):
    pytest.importorskip("tokenizers")
    marked = tmp_path / "tokenizer.json"
    marked.write_bytes(b"\xef\xbb\xbf" + (files / "tokenizer.json").read_bytes())
    task = TASKS["text"](path=str(files / "poem.txt"), tokens=str(marked), seq_length=3)
    assert task.vocab_size == len(WORDS)


def byte_pairs(merges):
    """A tokenizer of bytes, GPT-2's kind, with some merges; its newline is `Ċ`, its space `Ġ`."""
    tokenizers = pytest.importorskip("tokenizers")
    letters = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    names = {name: place for place, name in enumerate([*letters, *map("".join, merges)])}
    coder = tokenizers.Tokenizer(tokenizers.models.BPE(names, merges))
    coder.decoder = tokenizers.decoders.ByteLevel()
    coder.normalizer = tokenizers.normalizers.ByteLevel()
    return coder


def test_each_line_is_a_row_although_a_token_joins_its_newline_with_the_next(tmp_path):
    coder = byte_pairs([("Ċ", "Ġ"), ("ĊĠ", "m")])
    coder.save(str(tmp_path / "joins.json"))
    lines = [" mia", "ava", "  emma", "mo"] * 10
    (tmp_path / "names.txt").write_text("\n".join(lines), encoding="utf-8")
    options = {"path": str(tmp_path / "names.txt"), "tokens": str(tmp_path / "joins.json")}
    assert len(coder.encode("ava\n mia").ids) == 6  # Two are one there.
    task = TASKS["text"](lines=True, seq_length=10, **options)
    drawn = rows(task.sample)
    decode = task.text.vocabulary.decode
    found = {
        decode(row[weights > 0].tolist()).removesuffix("\n")
        for row, weights in zip(drawn.targets, drawn.weights, strict=True)
    }
    assert found == set(lines)


@pytest.mark.parametrize("end", ["\r\n", "\r", "\n\n"])
def test_a_line_of_bytes_ends_as_one_of_letters(end, tmp_path):
    (tmp_path / "names.txt").write_bytes(end.join(["mia", "ava", "mo"] * 10).encode())
    for tokens in ("bytes", "characters"):
        task = TASKS["text"](
            path=str(tmp_path / "names.txt"), tokens=tokens, lines=True, seq_length=8
        )
        drawn = rows(task.sample)
        decode = task.text.vocabulary.decode
        found = {
            decode(row[weights > 0].tolist())
            for row, weights in zip(drawn.targets, drawn.weights, strict=True)
        }
        assert found == {"mia\n", "ava\n", "mo\n"}


def test_numbers_of_a_tokenizer_may_have_gaps(tmp_path):
    pytest.importorskip("tokenizers")
    holes = json.loads(json.dumps(TOKENIZER))
    holes["model"]["vocab"] = {**WORDS, "poem": 50}
    (tmp_path / "holes.json").write_text(json.dumps(holes), encoding="utf-8")
    (tmp_path / "poem.txt").write_text(POEM, encoding="utf-8")
    task = TASKS["text"](
        path=str(tmp_path / "poem.txt"), tokens=str(tmp_path / "holes.json"), seq_length=3
    )
    assert task.vocab_size == 51
    del holes["model"]["vocab"]["[UNK]"]
    (tmp_path / "holes.json").write_text(json.dumps(holes), encoding="utf-8")
    with pytest.raises(ValueError, match=r"tokens of text: .*holes\.json: the tokenizer cannot"):
        TASKS["text"](
            path=str(tmp_path / "poem.txt"), tokens=str(tmp_path / "holes.json"), seq_length=3
        )


@pytest.mark.parametrize(
    ("text", "decoded", "gone"),
    [
        ("The née", "the nee", ""),
        ("日本 a", "a", "日本"),
        ("a b", "ab", ""),
        ("x\ufb01y", "xfiy", ""),
        ("hello you", "hello [UNK]", "y"),
    ],
)
def test_letters_without_tokens_are_told(text, decoded, gone):
    assert set(lost(text, decoded)) == set(gone) if gone else not lost(text, decoded)


def test_words_that_a_tokenizer_does_not_know_are_told():
    tokenizers = pytest.importorskip("tokenizers")
    words = Tokenizer(json.dumps(TOKENIZER))
    known = next(word for word in WORDS if word.isalpha())
    assert words.unread(f"{known} zebras {known} thé") == "zebras thé"
    assert words.unread(f"{known} {known}") == ""
    unigram = tokenizers.models.Unigram([("<unk>", 0.0), ("a", -1.0)], unk_id=0)
    assert Tokenizer(tokenizers.Tokenizer(unigram).to_str()).unread("axaxya") == "x xy"
    assert Bytes().unread("\udce9é") == ""


def test_the_share_of_unknown_tokens_is_told(files):
    pytest.importorskip("tokenizers")
    options = {"path": str(files / "poem.txt"), "seq_length": 3}
    words = re.findall(r"\w+|[^\w\s]+", POEM)
    share = np.mean([word not in WORDS for word in words])
    found = TASKS["text"](tokens=str(files / "tokenizer.json"), **options)
    told = f"; its tokenizer does not know {share:.1%} of the tokens, so there are no bits"
    assert found.held_out.endswith(f"{told} per character")
    assert found.text.tokens_per_character is None
    assert "know" not in TASKS["text"](**options).held_out
    (files / "other.txt").write_text("other words\n" * 60)
    options = {"tokens": str(files / "tokenizer.json"), "seq_length": 3}
    with pytest.raises(ValueError, match=r"other\.txt is in other words: .* not know 100\.0%"):
        TASKS["text"](path=str(files / "other.txt"), **options)


@pytest.mark.parametrize(
    ("content", "settings", "words"),
    [
        (None, {}, "cannot be read: No such file"),
        (b"", {}, "is empty"),
        ("é\0def".encode() * 100, {}, "holds a NUL, at byte 2"),
        (b"ab\xff" * 100, {}, "is no text in UTF-8, at byte 2"),
        (b"a" * 30, {}, "is too short: of its 30 tokens the last 3 are held out"),
        (b"a" * 30, {"lines": True}, "has only one line"),
        (
            b"a\n\n" * 30 + b"abcdefgh\n",
            {"lines": True},
            "line 61, and its end, 8 + 1 tokens",
        ),
        (b"a" * 300, {"tokens": "words"}, "must be characters, bytes or the path"),
        (b"a" * 300, {"tokens": "no.json"}, "no.json cannot be read"),
    ],
)
def test_a_text_that_cannot_be_learnt_is_refused_in_a_line(tmp_path, content, settings, words):
    path = tmp_path / "mine.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ValueError, match=r"^[^\n]*$") as error:
        TASKS["text"](path=str(path), seq_length=8, **settings)
    assert words in str(error.value)
    config = small(path)
    config.task.update(settings)
    with pytest.raises(ConfigError):
        build(config)


# Runs --------------------------------------------------------------------------------------------


def small(path):
    config = default_config("text")
    config.task.update({"path": str(path), "seq_length": 8})
    config.model.update({"features": 16, "num_layers": 1, "num_heads": 2})
    config.train.update({"batch_size": 4, "steps_per_epoch": 4, "epochs": 2})
    config.eval.update({"num_batches": 2, "every_epochs": 1, "sample": 30})
    config.checkpoint.every_epochs = 1
    config.optimizer.warmup_steps = 2
    return config


@pytest.fixture(scope="module")
def trained(files):
    directory = files / "run"
    result = experiment.run(small(files / "poem.txt"), directory)
    return directory, result


@pytest.mark.parametrize(
    ("content", "want"), [("日本語\n" * 20, 10 / 4), ("ab" * 40, 1)], ids=["Japanese", "ASCII"]
)
def test_bytes_count_the_characters_that_they_stand_for(content, want, tmp_path):
    (tmp_path / "text.txt").write_text(content, encoding="utf-8")
    task = TASKS["text"](path=str(tmp_path / "text.txt"), tokens="bytes", seq_length=4)
    assert task.text.tokens_per_character == want


def test_a_run_says_bits_per_character(trained):
    metrics = trained[1].metrics
    bits = metrics["eval_loss_in_bits_per_character"]
    assert bits == pytest.approx(metrics["eval_loss"] / math.log(2), rel=1e-5)
    assert metrics["held_out"] == "windows of the last tenth of poem.txt"


def test_a_run_turns_text_into_tokens_and_back_without_its_file(trained, files):
    path = files / "poem.txt"
    run = attention_jax.load(trained[0])
    assert run.decode(run.encode("the poem, née")) == "the poem, née"
    want = rows(TASKS["text"](path=str(path), seq_length=8).sample_held_out, 3)
    jax.tree.map(np.testing.assert_array_equal, rows(run.task.sample_held_out, 3), want)
    try:
        path.rename(files / "moved.txt")
        run = attention_jax.load(trained[0])
        assert run.decode(run.encode("the poem")) == "the poem"
        with pytest.raises(ValueError, match=r"poem\.txt cannot be read"):
            run.task.sample(jax.random.key(0), np.arange(1))
        path.write_text(POEM + "more", encoding="utf-8")
        run = attention_jax.load(trained[0])
        with pytest.raises(ValueError, match="has changed since the run was made"):
            run.task.sample(jax.random.key(0), np.arange(1))
        with pytest.raises(
            ConfigError, match=r"file of config\.task\.path has changed \(sha256 \w{8}…"
        ):
            experiment.run(small(path), trained[0])
    finally:
        (files / "moved.txt").replace(path)


@pytest.mark.parametrize(
    ("tokens", "error", "words"),
    [
        ([[1, 2], [3, 4]], ValueError, r"tokens must be one row, \[T\], got shape \(2, 2\)"),
        ([3, 10**6], ValueError, r"tokens must be from 0 to \d+, got 1000000"),
        ([-1], ValueError, r"tokens must be from 0 to \d+, got -1"),
        ([0.5], TypeError, "tokens must hold integers"),
    ],
)
def test_what_is_no_row_of_tokens_is_no_text(trained, tokens, error, words):
    run = attention_jax.load(trained[0])
    with pytest.raises(error, match=words):
        run.decode(tokens)


def test_a_run_goes_on_with_its_file_in_another_place(trained, files, tmp_path):
    shutil.copy(files / "poem.txt", tmp_path / "same.txt")
    again = experiment.run(small(tmp_path / "same.txt"), trained[0])
    assert again.metrics == trained[1].metrics
    changed = small(tmp_path / "same.txt")
    changed.seed = 5
    with pytest.raises(ConfigError, match="holds another run: seed is 0 there and 5 here"):
        experiment.run(changed, trained[0])


def test_without_its_vocabulary_a_run_needs_its_own_file(trained, files, tmp_path):
    directory = shutil.copytree(trained[0], tmp_path / "run")
    (directory / "vocabulary.json").unlink()
    run = attention_jax.load(directory)
    assert run.decode(run.encode("the poem")) == "the poem"
    kept = (files / "poem.txt").read_bytes()
    try:
        (files / "poem.txt").write_bytes(kept.replace("é".encode(), "ö".encode()))
        with pytest.raises(ValueError, match=r"sha256 .* there and .* vocabulary\.json is missing"):
            attention_jax.load(directory)
    finally:
        (files / "poem.txt").write_bytes(kept)


def test_other_tasks_have_no_text(tmp_path):
    config = default_config("copy")
    run = attention_jax.training.loading.Run(None, None, config, TASKS["copy"]())
    with pytest.raises(ValueError, match="copy are of no text"):
        run.encode("a")


def test_parameters_of_other_characters_are_refused(trained, files):
    other = files / "other.txt"
    other.write_text(POEM.replace("é", "ö"), encoding="utf-8")
    with pytest.raises(ConfigError, match=r"other characters than those of other\.txt"):
        check_vocabulary(str(trained[0]), TASKS["text"](path=str(other)))
    check_vocabulary(str(trained[0]), TASKS["text"](path=str(files / "poem.txt"), seq_length=4))
    assert Path(trained[0], "vocabulary.json").exists()


def test_a_run_keeps_what_its_model_wrote(trained):
    directory, result = trained
    steps, texts = [], []
    for line in (directory / "samples.txt").read_text(encoding="utf-8").split("\n")[:-1]:
        if line.startswith("step "):
            steps.append(int(line.removeprefix("step ")))
            texts.append([])
        else:
            assert line.startswith("    ")
            texts[-1].append(line[4:])
    assert steps == [row["step"] for row in result.history if "eval_loss" in row]
    assert all(len("\n".join(text)) == 30 for text in texts)
    assert set("".join("\n".join(text) for text in texts)) <= set(POEM)


def test_samples_of_steps_that_are_done_again_are_dropped(tmp_path):
    file = tmp_path / "samples.txt"
    for last, steps in ((0, (5, 10)), (5, (10, 15)), (12, ())):
        samples = Samples(file, last)
        for step in steps:
            samples.write(step, f"written at {last}\nstep 99\n")
        samples.close()
    body = "\n    written at {}\n    step 99\n    \n"
    assert file.read_text() == "step 5" + body.format(0) + "step 10" + body.format(5)
    Samples(tmp_path / "none.txt", 3).close()
    assert not (tmp_path / "none.txt").exists()


def test_lines_are_written_line_by_line(files):
    config = small(files / "names.txt")
    config.task.lines, config.eval.sample = True, 24
    sample = make_sampler(config).sample
    params = build(config).init().params
    text = sample(params, 3)
    assert text.count("\n") == 24 // 8 - 1
    assert text == sample(params, 3)
    assert text != sample(params, 4)


# Minutes -----------------------------------------------------------------------------------------


def test_the_minutes_decide_the_steps_and_a_resumed_run_is_the_same(files, tmp_path):
    config = small(files / "poem.txt")
    config.train.minutes, config.checkpoint.keep, config.eval.sample = 0.01, 5, 0
    config.eval.every_epochs = 50
    result = experiment.run(config, tmp_path / "run")
    noted = json.loads((tmp_path / "run" / "config.json").read_text())["config"]
    epochs = noted["train"]["epochs"]
    assert result.metrics["step"] == 4 * epochs
    assert epochs == 3  # Two to measure, and one at least, because this time is over.
    # Killed after the checkpoint of the decision; and before it.
    for kept in (8, 4):
        again = tmp_path / f"from {kept}"
        shutil.copytree(tmp_path / "run", again)
        (again / "result.json").unlink()
        for place in (again / "checkpoints").iterdir():
            if int(place.name) > kept:
                shutil.rmtree(place)
        resumed = experiment.run(config, again)
        same = resumed.metrics["fingerprint"] == result.metrics["fingerprint"]
        assert same if kept == 8 else resumed.metrics["step"] >= 12
    assert "nothing" not in str(experiment.run(config, tmp_path / "run").metrics)


def test_a_run_that_has_become_slow_ends_sooner_and_resumes_alike(
    files, tmp_path, monkeypatch, capsys
):
    config = small(files / "poem.txt")
    config.train.minutes, config.checkpoint.keep, config.eval.sample = 0.2, 50, 0
    config.checkpoint.every_epochs = 1
    monkeypatch.setattr(budget.Review, "is_due", lambda self, epoch: epoch == self._epoch + 2)
    monkeypatch.setattr(budget.Review, "epochs", lambda self, epoch: epoch + 3)
    result = experiment.run(config, tmp_path / "run")
    epochs = json.loads((tmp_path / "run" / "config.json").read_text())["config"]["train"]["epochs"]
    assert result.metrics["step"] == 4 * epochs < 100
    assert f"slower: {epochs} epochs fit in --minutes=0.2." in capsys.readouterr().out
    shutil.copytree(tmp_path / "run", tmp_path / "again")
    (tmp_path / "again" / "result.json").unlink()
    for place in (tmp_path / "again" / "checkpoints").iterdir():
        if int(place.name) > 4 * (epochs - 3):  # That of the decision stays.
            shutil.rmtree(place)
    resumed = experiment.run(config, tmp_path / "again")
    assert resumed.metrics["fingerprint"] == result.metrics["fingerprint"]


@pytest.mark.parametrize(
    ("each", "epochs"),
    [
        (1.0, 100),  # 50 more in 50 s.
        (1.15, 100),  # They end 8 s late, which is less than a tenth.
        (2.0, 50 + 24),  # 49 s are 24 epochs.
        (1e4, 51),  # One at least.
    ],
)
def test_a_review_shortens_a_run_that_would_end_late(monkeypatch, each, epochs):
    now = [0.0]
    monkeypatch.setattr(budget.time, "perf_counter", lambda: now[0])
    config = default_config("text")
    config.train.update(minutes=100 / 60, epochs=100)
    config.optimizer.warmup_steps = 10
    now[0] = 50 - 4 * each
    review = budget.Review(config, 0.0, 46)
    assert not review.is_due(48)  # That early it does not ask.
    now[0] = 50.0
    assert not review.is_due(47)  # One epoch says little.
    assert review.is_due(50)
    assert review.epochs(50) == epochs
    config.optimizer.warmup_steps = 90 * config.train.steps_per_epoch
    assert review.epochs(50) == max(epochs, 91)  # A cosine needs a step behind its warmup.


@pytest.mark.parametrize(
    ("epoch", "evaluation", "save", "fits"),
    [
        (0.5, 0.0, 0.0, 2 * (98 - 2)),
        (0.5, 0.5, 0.0, 157),  # 94.1 s of 0.6 s each.
        (0.5, 0.5, 2.0, 115),  # 91.1 s of 0.8 s each.
        (1000.0, 0.0, 0.0, 1),
    ],
)
def test_as_many_epochs_are_left_as_fit(monkeypatch, epoch, evaluation, save, fits):
    now = [0.0]

    def passes(seconds):
        now[0] += seconds

    monkeypatch.setattr(budget.time, "perf_counter", lambda: now[0])
    config = default_config("text")
    config.train.minutes = 2.0
    config.eval.every_epochs, config.checkpoint.every_epochs = 5, 10
    config.train.steps_per_epoch = 20  # More than 100 steps of warmup in all.
    pilot = budget.Pilot(config, 0.0)
    passes(9)  # The first row and the first checkpoint take long.
    pilot.saved(4.0)
    pilot.end_lap()
    for _ in range(2):
        passes(epoch + evaluation)
        pilot.evaluated()
        pilot.end_lap()
    passes(epoch + save)
    pilot.saved(save)
    pilot.started += now[0] - 22  # 22 s have passed.
    begun = now[0]
    found = budget.epochs_that_fit(config, 7, pilot, lambda: passes(evaluation))
    assert found.epochs == 7 + fits
    # What has passed, the epochs, and an evaluation after every fifth and the last; and so on.
    each = epoch + evaluation / 5 + save / 10
    assert found.seconds == pytest.approx(22 + 2 * evaluation + fits * each + evaluation + save)
    assert now[0] == begun + 2 * evaluation
    assert (found.seconds > 120) == (epoch == 1000)


@pytest.mark.parametrize(
    ("epoch", "every", "epochs"),
    [(0.5, 10, 12), (0.5, 3, 6), (7.0, 10, 1), (0.5, 1, 2)],
)
def test_a_pilot_ends_at_the_second_checkpoint_or_after_a_tenth(monkeypatch, epoch, every, epochs):
    now = [0.0]
    monkeypatch.setattr(budget.time, "perf_counter", lambda: now[0])
    config = default_config("text")
    config.train.minutes = 1.0
    pilot = budget.Pilot(config, 0.0)
    done = 0
    while not pilot.is_over():
        now[0] += epoch
        done += 1
        if done % every == 0:
            pilot.saved(0.0)
    assert done == epochs


def test_a_budget_has_no_more_steps_than_can_be_counted():
    config = default_config("text")
    config.train.update(minutes=1e12, steps_per_epoch=1000)
    pilot = budget.Pilot(config, budget.time.perf_counter())
    found = budget.epochs_that_fit(config, 2, pilot, lambda: None)
    assert 2**31 - 1000 <= found.epochs * 1000 < 2**31


def test_other_minutes_alone_are_told(files, tmp_path):
    config = small(files / "poem.txt")
    config.train.minutes, config.eval.sample = 0.01, 0
    experiment.run(config, tmp_path / "run")
    config.train.minutes = 0.02
    with pytest.raises(ConfigError, match=r"train\.minutes") as refused:
        experiment.run(config, tmp_path / "run")
    assert "epochs" not in str(refused.value)


def test_a_run_that_was_killed_as_it_decided_notes_its_epochs(files, tmp_path, monkeypatch):
    class Killed(Exception):
        pass

    def kill(*_):
        raise Killed

    config = small(files / "poem.txt")
    config.train.minutes, config.eval.sample = 0.01, 0
    with monkeypatch.context() as patch:
        patch.setattr(experiment.RunDirectory, "renew", kill)
        with pytest.raises(Killed):
            experiment.run(config, tmp_path / "run")
    result = experiment.run(config, tmp_path / "run")
    noted = json.loads((tmp_path / "run" / "config.json").read_text())["config"]
    assert noted["train"]["epochs"] * 4 == result.metrics["step"]


def test_minutes_without_room_for_the_warmup_are_refused(files, tmp_path, capsys):
    config = small(files / "poem.txt")
    config.train.minutes, config.eval.sample, config.checkpoint.every_epochs = 0.01, 0, 10
    config.optimizer.update(schedule="cosine", warmup_steps=12)
    with pytest.raises(ConfigError, match=r"--minutes=0.01 is time for 12 steps, and .*=12 must"):
        experiment.run(config, tmp_path / "run")
    assert not list(tmp_path.glob("run/*"))
    config.optimizer.warmup_steps = 11
    assert experiment.run(config, tmp_path / "run").metrics["step"] == 12
    assert "--minutes=0.01 is less than 3 epochs take" in capsys.readouterr().out


def test_the_learning_rate_falls_to_0_at_the_end_of_the_budget():
    optimizer = make_optimizer(
        "sgd", learning_rate=1.0, schedule="cosine", warmup_steps=2, budget=True
    )
    params = jnp.zeros(())
    state, rates = optimizer.init(params), []
    assert budget_end(state) is None
    for step in range(10):
        if step == 4:
            state = with_budget(state, 10, 4)
            assert budget_end(state) == 10
        update, state = optimizer.update(jnp.ones(()), state, params)
        rates.append(-float(update))
    fall = 0.5 * (1 + np.cos(np.pi * np.arange(6) / 6))
    np.testing.assert_allclose(rates, [0.5, 1, 1, 1, *fall], rtol=1e-6)


def test_two_budgets_and_a_budget_of_a_sweep_are_refused():
    with pytest.raises(ConfigError, match=r"--minutes=1\.0 and --epochs=3 are two budgets"):
        parse(["train.py", "--minutes=1", "--epochs=3"])
    with pytest.raises(ConfigError, match="for single runs, not for sweeps"):
        parse(["train.py", "--minutes=1", "--sweep=seed=0,1"])
    with pytest.raises(ConfigError, match=r"config\.eval\.sample is for the task text"):
        parse(["train.py", "--config.eval.sample=10"])
    assert parse(["train.py", "--minutes=1"]).config.train.minutes == 1.0
    with pytest.raises(ConfigError, match="--minutes=0 lets the epochs count"):
        parse(["train.py", "--config.train.minutes=2", "--config.train.epochs=3"])


# Writing -----------------------------------------------------------------------------------------


def written(run, *flags):
    with contextlib.redirect_stdout(io.StringIO()) as out:
        laboratory.main(["attention-jax generate", str(run), *map(str, flags)])
    return out.getvalue()


def test_a_run_writes_on_and_the_same_seed_writes_the_same(trained, tmp_path):
    run = attention_jax.load(trained[0])
    text = written(trained[0], "--prompt=the ", "--tokens=30", "--seed=3", "--top_k=5")
    assert text.startswith("the ")
    assert len(text) == len("the ") + 30 + 1
    assert text == written(trained[0], "--prompt=the ", "--tokens=30", "--seed=3", "--top_k=5")
    assert text != written(trained[0], "--prompt=the ", "--tokens=30", "--seed=4", "--top_k=5")
    with jax.default_prng_impl("rbg"):
        assert text == written(trained[0], "--prompt=the ", "--tokens=30", "--seed=3", "--top_k=5")
    rng = jax.random.fold_in(jax.random.key(3), 0)
    found = attention_jax.generate(
        *(run.model, run.params, run.encode("the "), 30),
        **dict(temperature=0.8, top_k=5, rng=rng, context=8),
    )
    assert text == "the " + run.decode(found) + "\n"
    file = tmp_path / "prompt.txt"
    file.write_text("the ")
    flags = ("--tokens=30", "--seed=3", "--top_k=5", "--samples=2")
    both = written(trained[0], f"--prompt=FILE:{file}", *flags)
    assert both.startswith(f"--- 1\n{text}\n--- 2\nthe ")
    assert len(written(trained[0], "--tokens=5")) == 5 + 1


def test_a_context_beyond_the_trained_one_is_told(trained, capsys):
    written(trained[0], "--tokens=2", "--context=8")
    assert not capsys.readouterr().err
    written(trained[0], "--tokens=2", "--context=16")
    assert "--context=16 is longer than what the model was trained on, 8 tokens" in (
        capsys.readouterr().err
    )


def test_a_diverged_run_says_so_although_its_model_cannot_write(files):
    config = small(files / "poem.txt")
    config.optimizer.learning_rate, config.optimizer.warmup_steps = 1e29, 0
    config.train.epochs, config.train.steps_per_epoch, config.eval.every_epochs = 2, 1, 1
    with pytest.raises(experiment.Diverged, match="diverged at step 1: held-out loss is nan"):
        experiment.run(config)


def test_a_run_leaves_as_a_directory_of_hugging_face(trained, tmp_path, capsys):
    directory, place = trained[0], tmp_path / "poet-1.5"
    export.main(["attention-jax export", str(directory), str(place)])
    count = trained[1].metrics["num_params"]
    line = f"{place} has the model of {directory} as gpt_neox of transformers: {count:,} numbers.\n"
    assert capsys.readouterr().out == line
    run = attention_jax.load(directory)
    model, params = huggingface.load(place)
    tokens = run.encode("line of")
    found = model.apply({"params": params}, tokens[None])[0]
    np.testing.assert_allclose(found, run.predict(tokens), atol=1e-5)
    config = json.loads((place / "config.json").read_text())
    assert (config["max_position_embeddings"], config["eos_token_id"]) == (8, None)
    if importlib.util.find_spec("tokenizers"):
        assert huggingface.tokenizer(place).encode("line of").ids == tokens.tolist()
        flags = ("--prompt=the ", "--tokens=20", "--temperature=0")
        assert written(place, *flags) == written(directory, *flags)
    before = (directory / "config.json").read_text()
    for out, words in [
        (directory, "must be a new directory: it is not empty"),
        (place, "must be a new directory"),
        ("x.npz", "OUT must end in"),
    ]:
        with pytest.raises(ConfigError, match=words):
            export.main(["attention-jax export", str(directory), str(out)])
    assert (directory / "config.json").read_text() == before


@pytest.mark.slow  # It trains.
def test_a_run_of_lines_leaves_with_the_end_of_its_lines(files, tmp_path):
    config = small(files / "names.txt")
    config.task.lines, config.model.short_conv = True, 2
    experiment.run(config, tmp_path / "odd")
    words = r"odd: .*gpt_neox comes closest, and has blocks\.0\.conv=None, not ShortConvolution"
    with pytest.raises(NotImplementedError, match=words):
        export.export_directory(tmp_path / "odd", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    config.model.update({"short_conv": 0, "positions": "learned", "use_bias": True})
    experiment.run(config, tmp_path / "names")
    assert export.export_directory(tmp_path / "names", tmp_path / "out")[0] == "gpt2"
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    newline = attention_jax.load(tmp_path / "names").encode("\n")[0]
    assert config["bos_token_id"] == config["eos_token_id"] == newline


@pytest.mark.slow  # It trains.
def test_a_run_of_lines_writes_lines(files, tmp_path):
    config = small(files / "names.txt")
    config.task.lines, config.train.epochs = True, 1
    experiment.run(config, tmp_path / "names")
    lines = written(tmp_path / "names", "--samples=3", "--tokens=20", "--prompt=a")
    found = lines.splitlines()
    assert len(found) == 3
    assert all(name.startswith("a") for name in found)
    run = attention_jax.load(tmp_path / "names")
    newline = run.encode("\n")
    options = {"temperature": 0, "context": config.task.seq_length, "end": newline[0]}
    tokens = attention_jax.generate(run.model, run.params, run.encode("\na"), 20, **options)
    (greedy,) = laboratory.write(tmp_path / "names", prompt="a", tokens=20, temperature=0)
    assert "a" + run.decode(tokens).partition("\n")[0] == "".join(greedy)


def test_rows_of_several_lengths_count_by_their_answers(files, tmp_path):
    config = small(files / "names.txt")
    config.task.lines, config.train.epochs = True, 1
    experiment.run(config, tmp_path / "names")
    found = subject.of_run(tmp_path / "names", 16)
    outputs = found.model.apply({"params": found.params}, found.inputs)
    losses, right, weights = map(np.asarray, found.answers(outputs))
    assert len({*weights.sum(-1)}) > 1
    mean = lambda values: (values * weights).sum() / weights.sum()
    np.testing.assert_allclose(found.loss(outputs).mean(), mean(losses), rtol=1e-5)
    np.testing.assert_allclose(found.accuracy(outputs).mean(), mean(right), rtol=1e-5)
    np.testing.assert_array_equal(found.counted, weights > 0)  # The padding is no token.
    at = findings._at(found, found.params, 16)
    maps = analysis.attention_maps(found.model, found.params, found.inputs)
    for kind in ("induction_head", "duplicate_token_head"):
        want = analysis.head_scores(maps, found.inputs, kind, queries=weights > 0)
        chex.assert_trees_all_close(at.scores[kind], want)
    assert findings.AT_ANSWERS not in at.scores
    for line in (b"ab\n", b"\xef\xbb\xbfab\r\n", b"ab"):  # A file ends its last line.
        assert subject.of_run(tmp_path / "names", 1, line).words == [["\\n", "a", "b"]]
    with pytest.raises(ValueError, match="--text must be one line"):
        subject.of_run(tmp_path / "names", 1, b"a\nb")
    with pytest.raises(ValueError, match="--text is no text in UTF-8, at byte 1"):
        subject.of_run(tmp_path / "names", 1, b"a\xe9")
    (tmp_path / "prompt.txt").write_bytes(b"ab\r\n")
    told = written(tmp_path / "names", f"--prompt=FILE:{tmp_path / 'prompt.txt'}", "--tokens=3")
    assert told.startswith("ab")
    assert told.count("\n") == 1
    with pytest.raises(ConfigError, match="--prompt must be one line"):
        written(tmp_path / "names", "--prompt=a\nb")


def test_a_picture_of_a_long_row_shows_its_first_letters(files, tmp_path, monkeypatch):
    config = small(files / "poem.txt")
    config.task.seq_length, config.train.epochs, config.eval.sample = 40, 1, 0
    experiment.run(config, tmp_path / "run")
    seen, whole = [], analysis.draw_maps

    def draw(path, maps, words, **options):
        seen.append(({x.shape[1:] for x in maps.values()}, len(words), options["caption"]))
        return whole(path, maps, words, **options)

    monkeypatch.setattr(analysis, "draw_maps", draw)
    inspect.inspect(tmp_path / "run", tmp_path / "out", rows=2)
    assert subject.of_run(tmp_path / "run", 1, POEM[:38].encode()).shown is None
    assert seen[0][:2] == ({(32, 32)}, 32)
    assert seen[0][2].endswith("; the first 32 of 40 tokens")


@pytest.mark.slow  # It trains.
def test_a_page_of_lines_shows_no_padding(files, tmp_path):
    config = small(files / "names.txt")
    config.task.lines, config.train.epochs = True, 1
    experiment.run(config, tmp_path / "names")
    inspect.inspect(tmp_path / "names", tmp_path / "out", checkpoints=1, rows=8)
    text = (tmp_path / "out" / "page.html").read_text()
    data = json.loads(re.search(r'id="data">(.*?)</script>', text, re.DOTALL)[1])
    lengths = subject.of_run(tmp_path / "names", 8).counted.sum(1)[: len(data["tokens"])]
    shown = np.array(data["tokens"]) != ""
    assert shown.shape[1] == lengths.max() < 8
    np.testing.assert_array_equal(shown.sum(1), lengths)
    for layer, packed in zip(data["layers"], data["weights"][0], strict=True):
        weights = np.frombuffer(base64.b64decode(packed), "<u2")
        weights = weights.reshape(len(shown), layer["heads"], layer["T"], layer["S"])
        assert not weights[~shown[:, None, :].repeat(layer["heads"], 1)].any()
        assert weights[shown[:, None, :].repeat(layer["heads"], 1)].any(-1).all()


def test_a_text_sees_all_before_it_in_a_run_of_packed_rows(files, tmp_path):
    config = small(files / "poem.txt")
    config.task.pack, config.train.epochs = "4+4", 1
    experiment.run(config, tmp_path / "run")
    assert "mask" in subject.of_run(tmp_path / "run", 2).options
    assert not subject.of_run(tmp_path / "run", 1, b"line 1 o").options


def test_bytes_have_labels_and_may_be_no_text(files, tmp_path):
    config = small(files / "poem.txt")
    config.task.tokens, config.train.epochs = "bytes", 1
    experiment.run(config, tmp_path / "run")
    found = subject.of_run(tmp_path / "run", 1, "é a".encode())
    assert found.words == [["\\xc3", "\\xa9", "␣", "a"]]
    assert inspect.inspect(tmp_path / "run", tmp_path / "out", text="a\udcffb")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"model.causal": False}, "config.eval.sample=30 (0: none): "),
        (
            {"model.mechanism": "sigmoid", "eval.heads": True},
            "config.eval.heads=True: statistics are of dot_product_attention",
        ),
    ],
)
def test_what_an_evaluation_cannot_show_is_refused_before_training(files, tmp_path, change, words):
    config = small(files / "poem.txt")
    config.update_from_flattened_dict(change)
    with pytest.raises(ConfigError, match=re.escape(words)):
        experiment.run(config, tmp_path / "run")
    assert not list(tmp_path.glob("run/checkpoints/*"))


@pytest.mark.parametrize(("length", "positions"), [(5, "learned"), (20, "rotary")])
def test_a_run_is_inspected_on_a_text_without_its_file(files, tmp_path, length, positions):
    config = small(shutil.copy(files / "poem.txt", tmp_path))
    config.train.epochs, config.model.positions = 1, positions
    experiment.run(config, tmp_path / "run")
    (tmp_path / "poem.txt").unlink()
    text = POEM[:length]
    (tmp_path / "p.txt").write_text(f"\ufeff{text}", encoding="utf-8")
    named = f"FILE:{tmp_path / 'p.txt'}"
    written = inspect.inspect(tmp_path / "run", tmp_path / "out", text=named)
    assert f"--text={named}" in (tmp_path / "out" / "heads.md").read_text()
    assert {"maps.png", "page.html", "heads.md"} <= {path.name for path in written}
    found = subject.of_run(tmp_path / "run", 1, text.encode())
    logits = found.model.apply({"params": found.params}, found.inputs)[0]
    tokens = attention_jax.load(tmp_path / "run").encode(text)
    want = -jax.nn.log_softmax(logits)[jnp.arange(length - 1), tokens[1:]]
    np.testing.assert_allclose(found.answers(logits[None])[0][0], want, rtol=1e-6)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--tokens=-1"], "--tokens must be at least 0: got -1"),
        (["--samples=0"], "--samples must be at least 1: got 0"),
        (["--seed=-1"], "--seed must be at least 0: got -1"),
        (
            ["--seed=99999999999999999999"],
            "--seed must be less than 2**31: got 99999999999999999999",
        ),
        (["--temperature=-1"], "--temperature must be at least 0 and finite"),
        (["--prompt=FILE:none.txt"], "none.txt cannot be read: No such file"),
        (["--prompt=日本"], "--prompt: the model has no tokens for '日本'"),
        (["--end=日"], "--end: the model has no tokens for '日'"),
        (["--prompt=a\udce9"], "--prompt is no text in UTF-8, at byte 1"),
        (["--length=3"], "unrecognized arguments: --length=3"),
    ],
)
def test_what_cannot_be_written_is_a_line(trained, flags, words):
    with pytest.raises(ConfigError, match=r"^[^\n]*$") as error:
        written(trained[0], *flags)
    assert words in str(error.value)


def test_what_is_refused_shows_no_heading(trained, capsys):
    flags = ["--temperature=0", "--top_k=3", "--samples=2"]
    with pytest.raises(ConfigError, match=r"^--temperature=0 takes the likeliest token"):
        laboratory.main(["attention-jax generate", str(trained[0]), *flags])
    assert capsys.readouterr().out == ""


def test_a_prompt_is_read_as_the_text_was(trained, files, tmp_path):
    (tmp_path / "prompt.txt").write_bytes(b"the poem\r\n")
    for prompt in ("the poem\r\n", f"FILE:{tmp_path / 'prompt.txt'}"):
        assert written(trained[0], f"--prompt={prompt}", "--tokens=0") == "the poem\n\n"
    config = small(files / "poem.txt")
    config.task.tokens, config.train.epochs, config.eval.sample = "bytes", 1, 0
    experiment.run(config, tmp_path / "bytes")
    for content in (b"the\r\npoem \xe9", b"\xef\xbb\xbfthe"):
        (tmp_path / "prompt.txt").write_bytes(content)
        of_run = laboratory._of_run(tmp_path / "bytes")
        text = as_text(content, "--prompt", of_bytes=True)
        given = bytes(of_run.begin(text).tolist())
        assert given == content
        shown = written(
            tmp_path / "bytes", f"--prompt=FILE:{tmp_path / 'prompt.txt'}", "--tokens=0"
        )
        assert shown == content.decode(errors="replace") + "\n"


def test_a_letter_that_stands_for_strange_bytes_is_written_once():
    decode = Characters("ab\ufffd").decode
    told = laboratory.Told(decode, [0, 2])
    assert told.add([1, 2, 0]) + told.rest() == "b\ufffda"


def test_a_letter_waits_for_all_of_its_bytes():
    told = laboratory.Told(Bytes().decode, "né".encode()[:2], of_bytes=True)
    found = [told.add([byte]) for byte in "né日本 a\ufffd🙂".encode()[2:]]
    assert "".join(found) == "é日本 a\ufffd🙂"
    assert found[1:4] == ["", "", "日"]
    assert told.add(list(b"\xf0\x9f")) == ""
    assert told.rest() == "\ufffd"
    strange = laboratory.Told(Bytes().decode, b"x", of_bytes=True)
    assert strange.add([0xFF] * 5) + strange.rest() == "\ufffd" * 5
    long = laboratory.Told(Bytes().decode, b"", of_bytes=True)
    assert "".join(long.add([byte]) for byte in ("aé日" * 150).encode()) == "aé日" * 150


@pytest.mark.parametrize("size", [1, 3, 8])
def test_text_of_a_tokenizer_with_bytes_for_rare_letters_comes_whole(size):
    tokenizers = pytest.importorskip("tokenizers")
    vocabulary = {f"<0x{i:02X}>": i for i in range(256)} | {"a": 256}
    coder = tokenizers.Tokenizer(
        tokenizers.models.BPE(vocabulary, [], byte_fallback=True, fuse_unk=True)
    )
    decoders = tokenizers.decoders
    coder.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    for text in ("a日本語日本語a", "a😀😀a日", "日本" * 60 + "a"):
        found = coder.encode(text).ids
        assert coder.decode(found) == text
        prompt = coder.encode(text[:2]).ids
        told, start = laboratory.Told(coder.decode, prompt), len(prompt)
        parts = [told.add(found[i : i + size]) for i in range(start, len(found), size)]
        assert text[:2] + "".join(parts) + told.rest() == text


def test_text_in_parts_is_the_whole_text_whatever_the_bytes():
    rng = np.random.default_rng(0)
    kinds = [b"a", "é".encode(), "日".encode(), "🙂".encode(), b"\xff", b"\xf0\x9f\x98", b"\x9f"]
    for _ in range(50):
        found = list(b"".join(kinds[i] for i in rng.integers(len(kinds), size=100)))
        told = laboratory.Told(Bytes().decode, [], of_bytes=True)
        parts = [told.add(found[i : i + 3]) for i in range(0, len(found), 3)]
        assert "".join(parts) + told.rest() == Bytes().decode(found)


def test_writing_ends_before_each_token_of_the_same_letters(tmp_path, monkeypatch):
    tokenizers = pytest.importorskip("tokenizers")
    words = {"▁row": 0, "▁.": 1, ".": 2, "▁it": 3}
    coder = tokenizers.Tokenizer(tokenizers.models.BPE(words, [], unk_token="▁it"))
    coder.decoder = tokenizers.decoders.Metaspace(prepend_scheme="first")
    vocabulary = Tokenizer(coder.to_str())
    assert [vocabulary.decode([x]) for x in (1, 2)] == [".", "."]
    monkeypatch.setattr(Tokenizer, "encode", lambda self, text: np.array([1], np.int32))
    model = SimpleNamespace(embedding=SimpleNamespace(num_embeddings=4))
    author = laboratory.Author(
        model=model,
        params={},
        encode=vocabulary.encode,
        begin=lambda prompt: np.array([0]),
        decode=vocabulary.decode,
        unread=lambda prompt: "",
        ends=set(),
        context=None,
    )
    seen = {}
    monkeypatch.setattr(laboratory, "is_run", lambda place: True)
    monkeypatch.setattr(laboratory, "_of_run", lambda place: author)
    monkeypatch.setattr(generation, "stream", lambda *_, **options: seen.update(options) or [])
    (text,) = laboratory.write(tmp_path, prompt="row", end=".", samples=1)
    assert "".join(text) == "row"
    assert seen["end"] == [1, 2]


def test_writing_ends_before_a_token(trained, tmp_path):
    flags = ["--prompt=the ", "--tokens=60", "--seed=3"]
    text = written(trained[0], *flags).removesuffix("\n")
    stop = text[30]
    end = text.index(stop, len("the "))
    assert written(trained[0], *flags, f"--end={stop}") == text[:end] + "\n"
    with pytest.raises(ConfigError, match="--end must be one token: 'the' is 3"):
        written(trained[0], "--end=the")
    with pytest.raises(ConfigError, match="--end must be one token: got ''"):
        written(trained[0], "--end=")
    marked = tmp_path / "marked.txt"
    marked.write_bytes(b"\xef\xbb\xbfthe ")  # As some editors write.
    assert written(trained[0], f"--prompt=FILE:{marked}", *flags[1:]) == text + "\n"


def test_a_model_of_hugging_face_writes(tmp_path):
    pytest.importorskip("tokenizers")
    place = tmp_path / "gpt2"
    shutil.copytree(Path(__file__).parent / "huggingface" / "gpt2", place)
    model, params = huggingface.load(place)
    size = model.embedding.num_embeddings
    vocabulary = WORDS | {f"w{i}": i for i in range(len(WORDS), size)}
    (place / "tokenizer.json").write_text(
        json.dumps(TOKENIZER | {"model": TOKENIZER["model"] | {"vocab": vocabulary}})
    )
    longest = model.positions.max_length
    text = written(place, "--prompt=line of the", "--temperature=0", f"--tokens={longest + 5}")
    words = text.split()
    assert words[:3] == ["line", "of", "the"]
    found = attention_jax.generate(model, params, [1, 2, 3], 9, temperature=0)
    names = {token: word for word, token in vocabulary.items()}
    assert words[3:12] == [names[token] for token in found.tolist()]
    # The file of generation counts, with several ends.
    (place / "generation_config.json").write_text(json.dumps({"eos_token_id": found[2:4].tolist()}))
    first = min(found.tolist().index(x) for x in found[2:4].tolist())
    text = written(place, "--prompt=line of the", "--temperature=0", "--tokens=9")
    assert text.split()[3:] == words[3 : 3 + first]


def test_the_labels_of_a_text_are_its_characters(trained):
    found = subject.of_run(trained[0], 2)
    letters = set("".join("".join(row) for row in found.words))
    assert letters <= set(POEM) - {"\n", " "} | set("␣\\n")
    assert found.guess is None


@pytest.mark.slow  # Two programs.
def test_a_sweep_over_context_lengths_leaves_trials_that_write(files, tmp_path):
    config = small(files / "poem.txt")
    result = sweep.run(config, {"task.seq_length": [4, 8]}, tmp_path / "sweep")
    assert result.metrics["best_by"] == "eval_loss"
    for number, length in enumerate((4, 8)):
        trial = tmp_path / "sweep" / "trials" / f"{number:03}"
        assert attention_jax.load(trial).config.task.seq_length == length
        assert len(written(trial, "--tokens=9")) == 10
    (files / "poem.txt").rename(files / "away.txt")
    try:
        (files / "poem.txt").write_text(POEM + "more", encoding="utf-8")
        with pytest.raises(ConfigError, match=r"file of config\.task\.path has changed"):
            sweep.run(config, {"task.seq_length": [4, 8]}, tmp_path / "sweep")
    finally:
        (files / "away.txt").replace(files / "poem.txt")
