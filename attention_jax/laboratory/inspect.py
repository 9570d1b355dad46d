"""Looks inside a trained model: maps of its heads, their scores, and what each is worth.

    attention-jax inspect runs/first
    attention-jax inspect gpt2 --text="The cat sat. The cat" --out=gpt2_heads

RUN is the directory of a run, of a trial of a sweep (`sweep/trials/001`), or of a sweep, for its
best trial; or one of Hugging Face, with `--tokens` or `--text`. A run of text takes `--text` too,
in place of held-out rows. It writes to `--out`:

    maps.png     the attention of every head on one row
    page.html    the same to walk through in a browser, offline, with a slider over the checkpoints
    heads.md     a table: scores, statistics, importance, loss and accuracy without each head
    pruning.png  what is left as heads are removed, by importance and at random
    phase.png    for a run with several checkpoints: accuracy, scores and losses over the steps

A run keeps the newest `--config.checkpoint.keep` checkpoints.
"""

import os
import shlex
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

from attention_jax.laboratory.parser import Parser, read_words
from attention_jax.training.config import ConfigError
from attention_jax.training.files import (
    CHECKPOINTS,
    check_directory,
    is_hugging_face,
    local_path,
    locate,
    written_whole,
)
from attention_jax.training.process import RunError, prepare, say

OUT, ROWS, MAX_CHECKPOINTS = "inspect", 128, 50
MAX_POINTS = 17  # Of the curve of pruning: as many as there are up to 16 heads.
ORDERS = 10  # Random ones.
_PAGE_WEIGHTS = 4_000_000  # About 10 MB of page.


def main(argv: Sequence[str]) -> None:
    """Does the command; `argv[0]` is its name.

    Raises:
        ConfigError: The model or the options are invalid, in a line.
    """
    parser = Parser(argv[0], __doc__)
    parser.add_argument("run", metavar="RUN", help="directory of a run, or one of Hugging Face")
    parser.add_argument("--out", default=OUT, help=f"directory to write to; default: {OUT}")
    parser.add_argument("--rows", type=int, help=f"rows of the run's task; default: {ROWS}")
    parser.add_argument(
        "--checkpoints",
        type=int,
        help=f"of how many checkpoints at most; 1 is the newest; default: {MAX_CHECKPOINTS}",
    )
    parser.add_argument("--tokens", help="for Hugging Face: the numbers of a row, as '3 1 4'")
    parser.add_argument(
        "--text", help="for Hugging Face, or a run of text: the row to look at, or FILE:PATH"
    )
    try:
        with warnings.catch_warnings():
            # In a line, as all that the command says; Python's own form shows our code.
            warnings.showwarning = lambda words, *_, **__: print(
                f"{argv[0]}: {words}", file=sys.stderr
            )
            written = inspect(**vars(parser.parse_args(argv[1:])), say=say)
    except (OSError, RuntimeError, ValueError, NotImplementedError) as error:
        if isinstance(error, RunError) or "RESOURCE_EXHAUSTED" in str(error):
            raise
        raise ConfigError(str(error)) from error
    print(*written, sep="\n", flush=True)


def inspect(
    run: str | os.PathLike,
    out: str | os.PathLike = OUT,
    *,
    rows: int | None = None,
    checkpoints: int | None = None,
    tokens: Sequence[int] | str | None = None,
    text: str | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> list[Path]:
    """Writes pictures, a page and a table of the heads of a model.

    Args:
        run: The directory of a run, a trial or a sweep; or one of Hugging Face.
        out: The directory to write to; created when missing.
        rows: How many held-out rows of the run's task; None: 128.
        checkpoints: Of how many of the run's checkpoints at most, evenly taken; None: 50.
        tokens, text: For a directory of Hugging Face one of them, the row to run it on. A run of
            text takes a text as well, which stands for its rows. `FILE:PATH` names a file of it.
        say: Takes a line about work that takes some seconds, from another thread.

    Returns:
        The written files.

    Raises:
        ValueError: An argument is missing, out of its range or of the other kind, or there is no
            such model.
        NotImplementedError: No layer can show its weights.
        OSError: A file is missing or cannot be written.
    """
    place = local_path(run, "RUN")
    out = local_path(out, "--out")
    check_directory(out, "--out")
    content = None if text is None else read_words(text, "--text")
    of_run = is_run(place)
    if of_run:
        _refuse("is for a directory of Hugging Face", tokens=tokens)
        if text is not None:
            _refuse("is for the rows of the task, which --text replaces", rows=rows)
        rows = _at_least_one("--rows", rows, ROWS)
        checkpoints = _at_least_one("--checkpoints", checkpoints, MAX_CHECKPOINTS)
    else:
        _refuse("is for a run of this package", rows=rows, checkpoints=checkpoints)
        if (tokens is None) == (text is None):
            raise ValueError(f"{run} is of Hugging Face, which needs --tokens or --text.")
        tokens = _numbers(tokens)
    # Imported after the checks, so that errors do not wait for jax.
    from attention_jax.laboratory import subject as subjects
    from attention_jax.laboratory.findings import find

    prepare()
    if of_run:
        subject = subjects.of_run(place, rows, content)
    else:
        subject = subjects.of_directory(place, tokens=tokens, text=content)
    findings = find(
        subject, points=MAX_POINTS, orders=ORDERS, checkpoints=checkpoints or 1, say=say
    )
    command = _command(run, out, rows, checkpoints, tokens, text)
    with written_whole(out, "--out") as place:
        written = _write(subject, findings, place, command, say)
    return [out / path.name for path in written]


def is_run(place):
    """Whether a directory is of a run; else it is of Hugging Face."""
    run, _ = locate(place)
    if (run / CHECKPOINTS).is_dir():
        return True
    if not is_hugging_face(place):
        raise ValueError(f"{place} holds no run with a checkpoint, and no model of Hugging Face.")
    return False


def _refuse(reason, **given):
    for name, value in given.items():
        if value is not None:
            raise ValueError(f"--{name} {reason}.")


def _at_least_one(name, value, default):
    value = default if value is None else value
    if value < 1:
        raise ValueError(f"{name} must be at least 1: got {value}.")
    return value


def _numbers(tokens):
    if not isinstance(tokens, str):
        return tokens
    try:
        return [int(word) for word in tokens.replace(",", " ").split()]
    except ValueError:
        raise ValueError(f"--tokens must be numbers, as '3 1 4': got {tokens!r}.") from None


def _command(run, out, rows, checkpoints, tokens, text):
    words = ["attention-jax", "inspect", str(run)]
    if str(out) != OUT:
        words.append(f"--out={out}")
    if rows not in (None, ROWS):
        words.append(f"--rows={rows}")
    if checkpoints not in (None, MAX_CHECKPOINTS):
        words.append(f"--checkpoints={checkpoints}")
    if text is not None:
        words.append(f"--text={text}")
    elif tokens is not None:
        words.append(f"--tokens={' '.join(map(str, tokens))}")
    return shlex.join(words)


def _without_padding(maps, words, counted):
    """Rows of lines, as long as the longest of them; what stands behind a line is empty."""
    import numpy as np

    counted = counted[: len(words)]
    end = counted.sum(1).max()
    counted = counted[:, :end]
    shown = {
        path: np.where(counted[:, None, :, None], weights[..., :end, :end], 0)
        for path, weights in maps.items()
    }
    rows = [
        [word if of_line else "" for word, of_line in zip(row, line, strict=False)]
        for row, line in zip(words, counted, strict=True)
    ]
    return shown, rows


def _write(subject, findings, out, command, say):
    from attention_jax.analysis import draw_maps, draw_phase, draw_pruning, write_page
    from attention_jax.analysis.page import MAX_WEIGHTS
    from attention_jax.laboratory.findings import HIGH, evenly

    about = subject.about
    name = about if about.startswith(f"{subject.name},") else f"{subject.name}: {about}"
    title = name if findings.step is None else f"{name}, step {findings.step:,}"
    newest, by_step = findings.newest, findings.by_step
    words = subject.words
    first = None if words is None else words[0]
    # The first that some head has, because all heads may be at 0.00 in the others.
    highest = {name: max(of.max() for of in x.values()) for name, x in newest.scores.items()}
    high = (name for name, value in highest.items() if value >= HIGH)
    score = next(high, max(highest, key=highest.get, default=None))
    caption = title if score is None else f"{title}; above each head: {score.replace('_', ' ')}"
    scores = None if score is None else newest.scores[score]
    end = None if subject.counted is None else int(subject.counted[0].sum())
    # The padding behind a line says nothing.
    cut = lambda maps: {path: weights[:, :end, :end] for path, weights in maps.items()}
    first = None if first is None else first[:end]
    drawn, drawn_words = cut(newest.maps), first
    if subject.shown is not None and len(first) > subject.shown:
        drawn = {path: x[:, : subject.shown, : subject.shown] for path, x in drawn.items()}
        drawn_words = first[: subject.shown]
        caption += f"; the first {subject.shown} of {len(first)} tokens"
    maps = draw_maps(out / "maps.png", drawn, drawn_words, scores=scores, caption=caption)
    heading = {"title": title, "caption": command}
    # One row, and as many of the steps as a page of moderate size holds; or as many rows as fit.
    size = sum(weights.size for weights in newest.maps.values())
    page = None
    if len(by_step) > 1 and 2 * size <= MAX_WEIGHTS:
        steps = evenly(list(by_step), max(2, _PAGE_WEIGHTS // size))
        shown = {step: cut(by_step[step].maps) for step in steps}
        beside = {step: by_step[step].beside for step in steps}
        page = write_page(out / "page.html", shown, first, statistics=beside, **heading)
    elif size <= MAX_WEIGHTS:
        shown = {path: x[: MAX_WEIGHTS // size] for path, x in findings.maps.items()}
        rows = None if words is None else words[: len(next(iter(shown.values())))]
        if subject.counted is not None:
            shown, rows = _without_padding(shown, rows, subject.counted)
        page = write_page(out / "page.html", shown, rows, statistics=newest.beside, **heading)
    pictures, curve = [maps], findings.curve
    if curve is not None:
        drawn = draw_pruning(
            out / "pruning.png",
            curve.kept,
            curve.by_importance,
            curve.at_random,
            measure=curve.measure,
            guess=subject.guess,
            caption=title,
        )
        pictures.append(drawn)
    if len(by_step) > 1:
        pictures.append(draw_phase(out / "phase.png", *findings.phase(), caption=name))
    table = out / "heads.md"
    links = [f"![{file.stem}]({file.name})" for file in pictures]
    if page is None:
        last = f"There is no page: a row has {size:,} weights, and a page holds {MAX_WEIGHTS:,}."
        say(last)
    else:
        last = f"[The page]({page.name})"
    text = [f"# {title}", f"```bash\n{command}\n```", *findings.told(subject), *links, last]
    # A text on the command line may hold any bytes.
    table.write_text("\n\n".join(text) + "\n", encoding="utf-8", errors="surrogateescape")
    return [*([] if page is None else [page]), table, *pictures]
