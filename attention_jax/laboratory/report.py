"""Turns run directories into a table and pictures.

    attention-jax report runs/a runs/sweep
    attention-jax report runs/* --out=report --x=model.window \\
        --published=window.json

It prints a table. With `--out` it writes the table to `report.md` instead, and pictures as PNG and
SVG: `curves`, with `--x` also `by_FIELD`, and for runs with `eval.slices` also `slices`. A sweep is
reported as its trials. Runs that differ only in the seed are one line, with a mean and a spread.
Runs of several tasks have a table and pictures for each.
`--published` names a JSON file that maps values of the field to the numbers of a paper,
`{"64": 0.515, "128": 0.655}`; the table shows them beside ours.
"""

import datetime
import json
import math
import re
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from attention_jax.laboratory.parser import Parser
from attention_jax.laboratory.pictures import about, draw_against, draw_curves, draw_slices
from attention_jax.laboratory.runs import (
    SEED,
    Run,
    folders,
    is_loss,
    lines,
    load,
    main_metric,
    mean,
    slices,
    spread,
)
from attention_jax.training.config import ConfigError
from attention_jax.training.files import local_path, written_whole
from attention_jax.training.process import RunError
from attention_jax.training.rules import FLAGS


def table(
    runs: Sequence[Run],
    metric: str | None = None,
    x: str | None = None,
    published: Mapping[str, float] | None = None,
) -> list[list[str]]:
    """A heading and a row for each line of runs: their directories, best, mean and spread over the
    seeds.

    The spread is the standard deviation of a sample, over n - 1. Slices show only their mean.

    Args:
        runs: At least one.
        metric: Defaults to `main_metric`.
        x: The field of `published`.
        published: Numbers by the value of `x`, as text.
    """
    metric = main_metric(runs) if metric is None else metric
    found = lines(runs, metric)
    has_target = any("target_step" in run.result for run in runs)
    heading = ["directory", *found[0].fields, "runs", f"best {metric}", "mean ± spread", "diverged"]
    parts = slices(runs, metric)
    heading += [f"mean@{name}" for name in parts]
    heading += ["reached", "seconds to target"] if has_target else []
    heading += ["published"] if published else []
    rows = [heading]
    for name, line in zip(folders(found), found, strict=True):
        values = line.values
        best = (min if is_loss(metric) else max)(values) if values else math.nan
        row = [name, *map(str, line.fields.values())]
        row += [str(len(line.runs)), _number(best)]
        row += [
            _number(mean(values)) + (f" ± {_number(spread(values))}" if len(values) > 1 else "")
        ]
        row += [str(sum("diverged_step" in run.result for run in line.runs))]
        for name in parts:
            row += [_number(mean(line.finals(f"{metric.partition('@')[0]}@{name}")))]
        if has_target:
            times = [t for run in line.runs if (t := run.result.get("target_seconds")) is not None]
            row += [str(len(times)), _number(mean(times))]
        if published:
            key = str(line.runs[0].config.get(x))
            row += [_number(published.get(key, math.nan))]
        rows.append(row)
    return rows


def unfinished(runs: Sequence[Run], metric: str | None = None) -> str:
    """Names the runs without a result and their newest numbers, in a line; "" if there are none."""
    metric = main_metric(runs) if metric is None else metric

    def newest(run):
        step = f"step {run.rows[-1]['step']}" if run.rows else "step 0"
        found = [row for row in run.rows if metric in row]
        return step + (f", {metric} {_number(found[-1][metric])}" if found else "")

    told = [f"{run.name} ({newest(run)})" for run in runs if not run.result]
    more = f" and {len(told) - 3} more" if len(told) > 3 else ""
    return f"Not finished: {', '.join(told[:3])}{more}." if told else ""


def _number(value):
    return f"{value:.4g}" if math.isfinite(value) else "-"


def aligned(rows: Sequence[Sequence[str]]) -> str:
    """A table for a screen.

    >>> print(aligned([["rate", "loss"], ["0.01", "3"]]))
    rate  loss
    0.01     3
    """
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True))
        for row in rows
    )


def markdown(rows: Sequence[Sequence[str]]) -> str:
    """A table of Markdown.

    >>> print(markdown([["rate", "loss"], ["0.01", "3"]]))
    | rate | loss |
    |---|---|
    | 0.01 | 3 |
    """
    escaped = ([cell.replace("|", "\\|") for cell in row] for row in rows)
    heading, *body = (f"| {' | '.join(row)} |" for row in escaped)
    return "\n".join([heading, "|---" * len(rows[0]) + "|", *body])


# The command -------------------------------------------------------------------------------------


def main(argv: Sequence[str]) -> None:
    """Does the command; `argv[0]` is its name.

    Raises:
        ConfigError: The runs or the options are invalid, in a line.
    """
    parser = Parser(argv[0], __doc__)
    parser.add_argument("runs", nargs="+", metavar="RUN", help="run directory, or one of a sweep")
    parser.add_argument("--out", help="directory to write to; default: show the table alone")
    parser.add_argument("--x", help="field to draw the metric against, as learning_rate")
    parser.add_argument(
        "--metric",
        help="as eval_loss, eval_loss@128 on a slice, or eval_loss@* for the mean over the slices; "
        "default: eval_accuracy where there is one; of text the loss",
    )
    parser.add_argument("--published", help="JSON file: numbers by the value of --x")
    try:
        options = vars(parser.parse_args(argv[1:]))
        out = options.pop("out")
        found = [show(**options)] if out is None else write(out=out, **options)
    except (ValueError, OSError) as error:
        if isinstance(error, RunError):
            raise
        raise ConfigError(str(error)) from error
    print(*found, sep="\n", flush=True)


def show(
    runs: Sequence[str | Path],
    x: str | None = None,
    metric: str | None = None,
    published: str | Path | None = None,
) -> str:
    """The tables of `write`, for a screen; raises the same errors."""
    parts = []
    for heading, found, path, numbers in _found(runs, x, metric, published):
        parts.append(
            [heading, aligned(table(found, metric, path, numbers)), unfinished(found, metric)]
        )
    return "\n\n".join("\n".join(filter(None, part)) for part in parts)


def write(
    runs: Sequence[str | Path],
    out: str | Path,
    x: str | None = None,
    metric: str | None = None,
    published: str | Path | None = None,
) -> list[Path]:
    """Writes a report with pictures; returns the written files.

    Runs of several tasks have a table and pictures for each task, because their losses do not
    compare.

    Args:
        runs: Directories of runs, trials or sweeps.
        out: The directory to write to; created when missing.
        x: The field to draw the metric against, as `model.window`; or its flag, or its last name,
            as `window`.
        metric: As in `table`.
        published: A JSON file of numbers by the value of `x`.

    Raises:
        ValueError: A directory holds no run; no run has the field or the metric; or `published`
            holds no numbers, or is given without `x`.
    """
    parts = _found(runs, x, metric, published)
    out = local_path(out, "--out")
    every = [run for part in parts for run in part.runs]
    text = [f"# {about(every)}", *_command(runs, out, x, metric, published), *_facts(every)]
    with written_whole(out, "--out") as place:
        written = _write(parts, place, text, metric)
    return [out / path.name for path in written]


def _write(parts, out, text, metric):
    written = []
    for heading, found, path, numbers in parts:
        end = "_" + re.sub(r"\W+", "_", found[0].config.get(_TASK, "")) if heading else ""
        files = draw_curves(found, out / f"curves{end}")
        if path is not None:
            name = f"by_{path.rpartition('.')[2]}{end}"
            files += draw_against(found, path, out / name, metric, numbers)
        if slices(found, main_metric(found) if metric is None else metric):
            files += draw_slices(found, out / f"slices{end}", metric)
        links = [f"![{file.stem}]({file.name})" for file in files if file.suffix == ".png"]
        text += [heading and f"## {heading}", markdown(table(found, metric, path, numbers))]
        text += [unfinished(found, metric), *links]
        written += files
    # A path among the fields may hold any bytes.
    (out / "report.md").write_text(
        "\n\n".join(filter(None, text)) + "\n", encoding="utf-8", errors="surrogateescape"
    )
    return [out / "report.md", *written]


def _command(runs, out, x, metric, published):
    options = {"--out": out, "--x": x, "--metric": metric, "--published": published}
    words = [*map(str, runs), *(f"{name}={v}" for name, v in options.items() if v is not None)]
    return ["```bash\nattention-jax report " + shlex.join(words) + "\n```"]


def _facts(runs):
    """The date of the report, and the versions of its runs."""
    names = ("attention_jax", "jax", "flax", "python")
    found = dict.fromkeys(
        ", ".join(f"{name} {run.versions[name]}" for name in names if name in run.versions)
        for run in runs
    )
    versions = "; ".join(filter(None, found))
    return [f"{datetime.date.today()}. {versions + '.' if versions else ''}".strip()]


_TASK = "task.name"


class _Part(NamedTuple):
    """The runs of a task; its heading, "" if it is the only one; and its field and numbers."""

    heading: str
    runs: list[Run]
    x: str | None
    published: dict[str, float] | None


def _found(runs, x, metric, published) -> list[_Part]:
    found = [run for directory in runs for run in load(directory)]
    places = [Path(run.name).resolve() for run in found]
    twice = next((place for i, place in enumerate(places) if place in places[:i]), None)
    if twice is not None:
        raise ValueError(
            f"each run must be named once: {found[places.index(twice)].name} came twice."
        )
    x = None if x is None else _field(x, found)
    names = {name for run in found for name in run.result if name.startswith("eval_")}
    names |= {f"{name.partition('@')[0]}@*" for name in names if "@" in name}
    if metric is not None and metric not in names:
        if not names:
            raise ValueError(f"--metric={metric}: no run has come to its end.")
        raise ValueError(f"--metric must be one of {', '.join(sorted(names))}: got {metric!r}.")
    numbers = None
    if published is not None:
        ours = [run.config.get(x) for run in found]
        theirs = _published(published, x).items()
        numbers = {str(v): number for v in ours for key, number in theirs if _is_value(key, v)}
    if numbers == {}:
        raise ValueError(f"--published={published} has none of the values that {x} has here.")
    by_task: dict[str, list[Run]] = {}
    for run in found:
        by_task.setdefault("" if x == _TASK else run.config.get(_TASK, ""), []).append(run)
    several = len(by_task) > 1
    has = lambda part: any(x in run.config for run in part)
    return [
        _Part(about(part) if several else "", part, *((x, numbers) if has(part) else (None, None)))
        for part in by_task.values()
    ]


def _is_value(key: str, value: Any) -> bool:
    """Whether a key of JSON is a value of a field: "1e-3" is 0.001."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return key == str(value)
    try:
        return float(key) == value
    except ValueError:
        return False


def _field(x, runs):
    """The path of a field, from its path or flag."""
    known = dict.fromkeys(path for run in runs for path in run.config)
    path = x.removeprefix("config.")
    path = next((field for field, flag in FLAGS.items() if flag == path), path)
    ends = [field for field in known if field.rpartition(".")[2] == path]
    if path not in known and len(ends) == 1:
        (path,) = ends
    if path not in known:
        hint = f" Did you mean {' or '.join(ends)}?" if ends else ""
        raise ValueError(f"--x must be a field of the config: got {x!r}.{hint}")
    if path == SEED:
        raise ValueError("--x must not be the seed: runs that differ in it alone are one line.")
    return path


def _published(file, x):
    if x is None:
        raise ValueError("--published needs --x: whose values its numbers belong to.")
    try:
        numbers = json.loads(local_path(file, "--published").read_text())
    except ValueError as error:
        raise ValueError(f"--published={file}: {error}") from error
    is_number = lambda value: isinstance(value, int | float) and not isinstance(value, bool)
    if not (isinstance(numbers, dict) and all(map(is_number, numbers.values()))):
        raise ValueError(f"--published={file} must map values of {x} to numbers.")
    return numbers
