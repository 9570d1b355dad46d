"""Turns run directories into a table and pictures.

    uv run python -m attention_jax report runs/a runs/sweep
    uv run python -m attention_jax report runs/* --out=report --x=model.window \\
        --published=window.json

A sweep counts as its trials. Shows a table; with `--out` it goes to `report.md` instead, beside
`curves.png`, with `--x` `by_FIELD.png` and, of runs with `eval.slices`, `slices.png`. What differs
between the runs is told from their configs; runs that differ in the seed alone are one line with a
mean and a spread. `--published` names a JSON file that maps values of the field to the numbers of a
paper, `{"64": 0.515, "128": 0.655}`; they stand beside ours in both.
"""

import argparse
import json
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from attention_jax.training.config import ConfigError, default_config, flatten
from attention_jax.training.files import local_path

SEED = "seed"
MAX_LABELS = 12  # More lines of a legend hide the picture.


class Run(NamedTuple):
    """A run, or a trial of a sweep.

    Attributes:
        name: Of its directory.
        config: Its fields by path.
        result: What `result.json` holds; empty as long as the run is not complete.
        rows: What `metrics.jsonl` holds.
    """

    name: str
    config: Mapping[str, Any]
    result: Mapping[str, Any]
    rows: Sequence[Mapping[str, Any]]

    def final(self, metric: str) -> float:
        """The metric at the end; NaN where there is none, in a diverged or unfinished run say.

        `eval_accuracy@*` is the mean over the slices.
        """
        if "diverged_step" in self.result:
            return math.nan
        if metric.endswith("@*"):
            start = metric.removesuffix("*")
            return _mean([value for name, value in self.result.items() if name.startswith(start)])
        value = self.result.get(metric)
        return math.nan if value is None else value


class Line(NamedTuple):
    """Runs that differ in their seeds alone.

    Attributes:
        fields: What tells them from other runs, by path.
        runs: They.
        values: The metric of each that has come to its end.
    """

    fields: dict[str, Any]
    runs: list[Run]
    values: list[float]

    def finals(self, metric: str) -> list[float]:
        """Another metric of each that has come to its end."""
        return [value for run in self.runs if math.isfinite(value := run.final(metric))]

    @property
    def label(self) -> str:
        return ", ".join(f"{path.split('.')[-1]}={value}" for path, value in self.fields.items())


def load(directory: str | Path) -> list[Run]:
    """The run in a directory, or the trials of the sweep in it.

    Raises:
        ValueError: The directory holds neither, or one of its files is damaged.
    """
    path = local_path(directory, "RUN")
    trials = sorted(path.glob("trials/*/config.json"))
    if trials:
        return [run for file in trials for run in load(file.parent)]
    try:
        config = json.loads((path / "config.json").read_text())["config"]
        result, rows = path / "result.json", path / "metrics.jsonl"
        return [
            Run(
                name=str(path),
                # A run may be older than some of the fields.
                config=flatten(default_config(config["task"]["name"])) | flatten(config),
                result=json.loads(result.read_text()) if result.exists() else {},
                rows=_rows(rows.read_text()) if rows.exists() else [],
            )
        ]
    except FileNotFoundError as error:
        raise ValueError(f"{directory} holds no run.") from error
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{directory} holds no run that can be read: {error!r}.") from error


def _rows(text):
    # A run that goes on, or was killed, may leave half a line.
    return [json.loads(line) for line in text.split("\n")[:-1]]


def main_metric(runs: Iterable[Run]) -> str:
    """`eval_accuracy` where every complete run has one, else `eval_loss`."""
    results = [run.result for run in runs if run.result and "diverged_step" not in run.result]
    has_accuracy = results and all("eval_accuracy" in result for result in results)
    return "eval_accuracy" if has_accuracy else "eval_loss"


def is_loss(metric: str) -> bool:
    return "loss" in metric


def differing(runs: Sequence[Run]) -> list[str]:
    """The fields that are not the same in all runs, as the configs order them."""
    paths = dict.fromkeys(path for run in runs for path in run.config)
    return [p for p in paths if any(run.config.get(p) != runs[0].config.get(p) for run in runs)]


def lines(runs: Sequence[Run], metric: str) -> list[Line]:
    """Runs that differ in their seeds alone, together; in the order of the runs."""
    fields = [path for path in differing(runs) if path != SEED]
    found: dict[tuple, Line] = {}
    for run in runs:
        values = {path: run.config.get(path) for path in fields}
        line = found.setdefault(tuple(values.values()), Line(values, [], []))
        line.runs.append(run)
        if math.isfinite(value := run.final(metric)):
            line.values.append(value)
    return list(found.values())


def slices(runs: Sequence[Run], metric: str) -> list[str]:
    """The slices of the task on which the runs were evaluated too, in the order of the configs."""
    metric = metric.partition("@")[0]
    names = (name for run in runs for name in run.config.get("eval.slices", "").split())
    found = {name for run in runs for name in run.result}
    return [name for name in dict.fromkeys(names) if f"{metric}@{name}" in found]


def table(
    runs: Sequence[Run],
    metric: str | None = None,
    x: str | None = None,
    published: Mapping[str, float] | None = None,
) -> list[list[str]]:
    """A heading and a row for each line of runs: best, mean and spread over the seeds.

    The spread is the standard deviation (of a sample, that is over n - 1). Of slices the mean.

    Args:
        runs: At least one.
        metric: Defaults to `main_metric`.
        x: The field that `published` is about.
        published: Numbers by the value of `x`, as text.
    """
    metric = main_metric(runs) if metric is None else metric
    found = lines(runs, metric)
    has_target = any("target_step" in run.result for run in runs)
    heading = [*found[0].fields, "runs", f"best {metric}", "mean", "spread", "diverged"]
    parts = slices(runs, metric)
    heading += [f"mean@{name}" for name in parts]
    heading += ["reached", "seconds to target"] if has_target else []
    heading += ["published"] if published else []
    rows = [heading]
    for line in found:
        values = line.values
        best = (min if is_loss(metric) else max)(values) if values else math.nan
        row = [str(value) for value in line.fields.values()]
        row += [str(len(line.runs)), _number(best)]
        row += [_number(_mean(values))]
        row += [_number(statistics.stdev(values) if len(values) > 1 else math.nan)]
        row += [str(sum("diverged_step" in run.result for run in line.runs))]
        for name in parts:
            row += [_number(_mean(line.finals(f"{metric.partition('@')[0]}@{name}")))]
        if has_target:
            times = [t for run in line.runs if (t := run.result.get("target_seconds")) is not None]
            row += [str(len(times)), _number(_mean(times))]
        if published:
            key = str(line.runs[0].config.get(x))
            row += [_number(published.get(key, math.nan))]
        rows.append(row)
    return rows


def _mean(values):
    return statistics.mean(values) if values else math.nan


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
    heading, *body = (f"| {' | '.join(row)} |" for row in rows)
    return "\n".join([heading, "|---" * len(rows[0]) + "|", *body])


# Pictures ----------------------------------------------------------------------------------------


def _figure():
    # Two seconds to import: only who draws waits for it.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _legend(axes):
    labels = axes.get_legend_handles_labels()[1]
    if 1 <= len([label for label in labels if label]) <= MAX_LABELS:
        axes.legend(fontsize="small", frameon=False)


def draw_curves(runs: Sequence[Run], path: str | Path, metric: str = "loss") -> None:
    """Draws a metric over the steps, a line for each run, a colour for each line of the table.

    By default the training loss: every epoch has one, while evaluations may be few.
    """
    figure, axes = _figure()
    for number, line in enumerate(lines(runs, metric)):
        for i, run in enumerate(line.runs):
            points = [(row["step"], row[metric]) for row in run.rows if metric in row]
            label = line.label if i == 0 else None
            dot = "." if len(points) == 1 else None
            style = dict(color=f"C{number}", lw=1.2, alpha=0.8, marker=dot)
            axes.plot(*_columns(points), label=label, **style)
    _label_y(axes, metric)
    axes.set_xlabel("step")
    _legend(axes)
    figure.savefig(path, dpi=120)


def draw_against(
    runs: Sequence[Run],
    x: str,
    path: str | Path,
    metric: str | None = None,
    published: Mapping[str, float] | None = None,
) -> None:
    """Draws the final metric against a field: a point for each run, a line through their means.

    Args:
        runs: Runs with different values of the field.
        x: The path of the field.
        path: The PNG file.
        metric: Defaults to `main_metric`.
        published: As in `table`; drawn in black.
    """
    metric = main_metric(runs) if metric is None else metric
    values = list(dict.fromkeys(run.config.get(x) for run in runs))
    is_number = all(isinstance(v, int | float) and not isinstance(v, bool) for v in values)
    values = sorted(values) if is_number else values
    at = {v: v if is_number else i for i, v in enumerate(values)}
    figure, axes = _figure()
    series: dict[str, list[Line]] = {}
    for line in lines(runs, metric):
        others = line._replace(fields={p: v for p, v in line.fields.items() if p != x})
        series.setdefault(others.label, []).append(line)
    for number, (label, found) in enumerate(series.items()):
        found = sorted(found, key=lambda line: values.index(line.runs[0].config.get(x)))
        place = [at[line.runs[0].config.get(x)] for line in found]
        means = [_mean(line.values) for line in found]
        axes.plot(place, means, color=f"C{number}", label=label or "ours")
        points = [(p, v) for p, line in zip(place, found, strict=True) for v in line.values]
        axes.plot(*_columns(points), "o", color=f"C{number}", ms=4, alpha=0.6)
    if published:
        points = [(at[v], published[str(v)]) for v in values if str(v) in published]
        axes.plot(*_columns(points), "k--s", ms=4, label="published")
    if not is_number:
        axes.set_xticks(range(len(values)), [str(v) for v in values])
    elif min(values) > 0 and max(values) >= 8 * min(values):
        axes.set_xscale("log")
        axes.set_xticks(values, [f"{v:g}" for v in values])
        axes.minorticks_off()
    _label_y(axes, metric)
    axes.set_xlabel(x)
    _legend(axes)
    figure.savefig(path, dpi=120)


def draw_slices(runs: Sequence[Run], path: str | Path, metric: str | None = None) -> None:
    """Draws the final metric on the task, then on its slices: means over the seeds.

    Bars tell the lowest and the highest seed.
    """
    metric = (main_metric(runs) if metric is None else metric).partition("@")[0]
    names = slices(runs, metric)
    figure, axes = _figure()
    for number, line in enumerate(lines(runs, metric)):
        found = [line.values, *(line.finals(f"{metric}@{name}") for name in names)]
        points = [(i, _mean(v), min(v), max(v)) for i, v in enumerate(found) if v]
        if points:
            place, mean, low, high = zip(*points, strict=True)
            bars = [[m - v for m, v in zip(mean, low, strict=True)]]
            bars += [[v - m for m, v in zip(mean, high, strict=True)]]
            style = dict(color=f"C{number}", marker="o", ms=4, lw=1.4, capsize=3)
            axes.errorbar(place, mean, bars, label=line.label, **style)
    axes.set_xticks(range(len(names) + 1), ["the task", *names])
    _label_y(axes, metric)
    axes.set_xlabel("evaluated on")
    _legend(axes)
    figure.savefig(path, dpi=120)


def _columns(points):
    return zip(*points, strict=True) if points else ([], [])


def _label_y(axes, metric):
    name = metric.replace("eval_", "held-out ").replace("@*", ", mean over the slices")
    axes.set_ylabel(name)
    values = (value for line in axes.lines for value in line.get_ydata())
    if is_loss(metric) and any(value > 0 for value in values):  # A logarithm of nothing fails.
        axes.set_yscale("log")
    elif "accuracy" in metric:
        axes.set_ylim(-0.02, 1.02)


# The command -------------------------------------------------------------------------------------


class _Parser(argparse.ArgumentParser):
    def error(self, message: str):
        raise ValueError(message)


def main(argv: Sequence[str]) -> None:
    """Does the command; `argv[0]` is its name.

    Raises:
        ConfigError: What cannot be reported, in a line.
    """
    summary, _, rest = __doc__.partition("\n\n")
    parser = _Parser(argv[0], description=summary, epilog=rest, allow_abbrev=False)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("runs", nargs="+", metavar="RUN", help="run directory, or one of a sweep")
    parser.add_argument("--out", help="directory to write to; default: show the table alone")
    parser.add_argument("--x", help="field to draw the metric against, as model.features")
    parser.add_argument(
        "--metric",
        help="as eval_loss, eval_loss@128 on a slice, or eval_loss@* for the mean over the slices; "
        "default: eval_accuracy where there is one",
    )
    parser.add_argument("--published", help="JSON file: numbers by the value of --x")
    try:
        options = vars(parser.parse_args(argv[1:]))
        out = options.pop("out")
        found = [show(**options)] if out is None else write(out=out, **options)
    except (ValueError, OSError) as error:
        raise ConfigError(str(error)) from error
    print(*found, sep="\n", flush=True)


def show(
    runs: Sequence[str | Path],
    x: str | None = None,
    metric: str | None = None,
    published: str | Path | None = None,
) -> str:
    """The table of `write`, for a screen; raises as that does."""
    found, numbers = _found(runs, x, metric, published)
    return aligned(table(found, metric, x, numbers))


def write(
    runs: Sequence[str | Path],
    out: str | Path,
    x: str | None = None,
    metric: str | None = None,
    published: str | Path | None = None,
) -> list[Path]:
    """Does what the command does; returns the files written.

    Raises:
        ValueError: A directory holds no run; no run has the field or the metric; or `published`
            holds no numbers, or is given without `x`.
    """
    found, numbers = _found(runs, x, metric, published)
    out = local_path(out, "--out")
    out.mkdir(parents=True, exist_ok=True)
    pictures = {"curves.png": lambda path: draw_curves(found, path)}
    if x is not None:
        name = f"by_{x.split('.')[-1]}.png"
        pictures[name] = lambda path: draw_against(found, x, path, metric, numbers)
    if slices(found, main_metric(found) if metric is None else metric):
        pictures["slices.png"] = lambda path: draw_slices(found, path, metric)
    for name, draw in pictures.items():
        draw(out / name)
    text = markdown(table(found, metric, x, numbers))
    links = "\n\n".join(f"![{Path(name).stem}]({name})" for name in pictures)
    # A path among the fields may be of any bytes.
    (out / "report.md").write_text(
        f"{text}\n\n{links}\n", encoding="utf-8", errors="surrogateescape"
    )
    return [out / "report.md", *(out / name for name in pictures)]


def _found(runs, x, metric, published):
    """The runs, and the numbers published."""
    found = [run for directory in runs for run in load(directory)]
    if x is not None and not any(x in run.config for run in found):
        raise ValueError(f"--x must be a field of the config: got {x!r}.")
    names = {name for run in found for name in run.result if name.startswith("eval_")}
    names |= {f"{name.partition('@')[0]}@*" for name in names if "@" in name}
    if metric is not None and metric not in names:
        if not names:
            raise ValueError(f"--metric={metric}: no run has come to its end.")
        raise ValueError(f"--metric must be one of {', '.join(sorted(names))}: got {metric!r}.")
    numbers = None if published is None else _published(published, x)
    if numbers is not None and numbers.keys().isdisjoint(str(run.config.get(x)) for run in found):
        raise ValueError(f"--published={published} has none of the values that {x} has here.")
    return found, numbers


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
