"""Pictures of runs, each as PNG and as SVG.

Lines differ in colour, dash and marker, so that a black-and-white print tells them apart. The text
below a picture names the runs and explains its dots and bands.
"""

import math
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path

from ml_collections import ConfigDict

from attention_jax.laboratory.runs import (
    SEED,
    Line,
    Run,
    folders,
    lines,
    main_metric,
    mean,
    slices,
    spread,
)
from attention_jax.training.config import slice_settings

MAX_TICKS = 8  # Of an axis that has one for each value.
MAX_LABELS = 12  # A longer legend would hide the picture.
LONG = 36  # Letters of a label that needs a place outside.
SUFFIXES = (".png", ".svg")
# Colours that the colour-blind tell apart: Okabe and Ito 2008, "Color Universal Design".
_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")
_DASHES = ("-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)))
_MARKERS = "os^Dvp"
_MEANS = {True: "line: their mean", False: "bars: their mean and spread"}


def draw_curves(runs: Sequence[Run], path: str | Path, metric: str = "loss") -> list[Path]:
    """Draws a metric over the steps: for each line of the table the mean, and a band of its seeds.

    The default is the training loss, because every epoch has one and evaluations may be few.
    Returns the written files, as all these functions do.
    """
    figure, axes = _figure()
    bands = False
    found = lines(runs, metric)
    for number, (line, label) in enumerate(zip(found, _labels(found), strict=True)):
        seeds = [
            {row["step"]: row[metric] for row in run.rows if metric in row} for run in line.runs
        ]
        points = [
            (step, [seed[step] for seed in seeds if step in seed])
            for step in sorted(set().union(*seeds))
        ]
        style = _style(number)
        if len(points) > 1:
            style["marker"] = None
        label = _named(label, [line], points)
        axes.plot(*_columns([(x, mean(v)) for x, v in points]), label=label, **style)
        if any(len(values) > 1 for _, values in points):
            bands = True
            x, low, high = zip(*((x, min(v), max(v)) for x, v in points), strict=True)
            axes.fill_between(x, low, high, color=style["color"], alpha=0.2, lw=0)
    _finish_y(axes, runs, metric)
    axes.set_xlabel("step")
    _plain(axes.xaxis)
    return _save(
        figure, axes, runs, path, "band: from the lowest to the highest seed" if bands else ""
    )


def draw_against(
    runs: Sequence[Run],
    x: str,
    path: str | Path,
    metric: str | None = None,
    published: Mapping[str, float] | None = None,
) -> list[Path]:
    """Draws the final metric against a field: a dot for each run, and the means.

    A line joins the means where the values of the field are numbers.

    Args:
        runs: Runs with different values of the field.
        x: The path of the field.
        path: The file, without or with one of the suffixes `SUFFIXES`.
        metric: Defaults to `main_metric`.
        published: Numbers of a paper by the value of the field, as text; drawn in black.
    """
    metric = main_metric(runs) if metric is None else metric
    values = list(dict.fromkeys(run.config.get(x) for run in runs))
    numbers = all(isinstance(v, int | float) and not isinstance(v, bool) for v in values)
    values = sorted(values) if numbers else values
    place = {v: v if numbers else i for i, v in enumerate(values)}
    figure, axes = _figure()
    series: dict[str, list[Line]] = {}
    for line in lines(runs, metric):
        others = line._replace(fields={p: v for p, v in line.fields.items() if p != x})
        series.setdefault(others.label, []).append(line)
    for number, (label, found) in enumerate(series.items()):
        at = lambda line: place[line.runs[0].config.get(x)]
        # Categories have room beside one another.
        shift = 0 if numbers else 0.5 * ((number + 0.5) / len(series) - 0.5)
        points = [(at(line) + shift, line.values) for line in sorted(found, key=at) if line.values]
        label = _named(label or ("ours" if published else ""), found, points)
        _means_and_dots(axes, points, _style(number), label, joined=numbers)
    if published:
        points = [(place[v], published[str(v)]) for v in values if str(v) in published]
        style = dict(color="black", ls="--" if numbers else "", marker="x", ms=6, lw=1.2)
        axes.plot(*_columns(points), label="published", **style)
    if numbers:
        _scale_x(axes, values)
    else:
        axes.set_xticks(range(len(values)), [str(v) for v in values])
        axes.set_xlim(-0.6, len(values) - 0.4)
    _finish_y(axes, runs, metric)
    axes.set_xlabel(x.rpartition(".")[2])
    dots = any(len(line.values) > 1 for line in lines(runs, metric))
    note = f"dots: runs; {_MEANS[numbers]}" if dots else ""
    return _save(figure, axes, runs, path, note)


def draw_slices(runs: Sequence[Run], path: str | Path, metric: str | None = None) -> list[Path]:
    """Draws the final metric on the task and on its slices: means over the seeds, and each seed.

    If slices differ from the task only in length, the axis shows lengths, and a dotted line marks
    the trained length.
    """
    metric = (main_metric(runs) if metric is None else metric).partition("@")[0]
    names = slices(runs, metric)
    trained, lengths = _lengths(runs, names)
    figure, axes = _figure()
    found = lines(runs, metric)
    for number, (line, label) in enumerate(zip(found, _labels(found), strict=True)):
        finals = {None: line.values, **{name: line.finals(f"{metric}@{name}") for name in names}}
        if lengths:
            points = sorted((lengths[name], v) for name, v in finals.items() if v)
        else:
            shift = 0.5 * ((number + 0.5) / len(found) - 0.5)
            points = [(i + shift, v) for i, v in enumerate(finals.values()) if v]
        label = _named(label, [line], points)
        _means_and_dots(axes, points, _style(number), label, joined=bool(lengths))
    if lengths:
        _scale_x(axes, sorted(set(lengths.values())))
        axes.axvline(trained, color="0.4", ls=":", lw=1)
        at = dict(xycoords=("data", "axes fraction"), textcoords="offset points", va="bottom")
        axes.annotate("trained", (trained, 0), (3, 3), fontsize="x-small", color="0.4", **at)
        axes.set_xlabel("tokens in a row")
    else:
        axes.set_xticks(range(len(names) + 1), ["the task", *names])
        axes.set_xlabel("evaluated on")
    _finish_y(axes, runs, metric)
    dots = any(len(line.values) > 1 for line in found)
    note = f"dots: seeds; {_MEANS[bool(lengths)]}" if dots else ""
    return _save(figure, axes, runs, path, note)


def _lengths(runs, names):
    """The trained length, and the lengths of task (None) and slices, if only these differ."""
    lengths = {run.config.get("task.seq_length") for run in runs}
    if len(lengths) != 1 or None in lengths:
        return None, {}
    (trained,) = lengths
    # Not from the defaults: a report needs no task of one's own to be here.
    task = {p[5:]: x for p, x in runs[0].config.items() if p.startswith("task.")}
    settings = slice_settings(ConfigDict({"task": task, "eval": {"slices": " ".join(names)}}))
    if not names or any(set(settings[name]) != {"seq_length"} for name in names):
        return None, {}
    return trained, {None: trained, **{name: settings[name]["seq_length"] for name in names}}


# The parts of a picture --------------------------------------------------------------------------


def _figure():
    # Imported here, because it takes two seconds.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _style(number):
    of = lambda styles: styles[number % len(styles)]
    return dict(color=of(_COLOURS), ls=of(_DASHES), marker=of(_MARKERS), ms=4, lw=1.4)


def _labels(found):
    """What tells lines apart: the fields that differ, or the directories if many do."""
    many = found and len(found[0].fields) > 4
    return folders(found) if many else [line.label for line in found]


def _named(label, found, points):
    """A label that says why its lines of the table have no mark, if they have diverged."""
    diverged = any("diverged_step" in run.result for line in found for run in line.runs)
    return f"{label} (diverged)".lstrip() if diverged and not points else label


def _means_and_dots(axes, points, style, label, *, joined):
    """`points` are places with the values of the seeds there."""
    means = [(x, mean(values)) for x, values in points]
    if joined:
        axes.plot(*_columns(means), label=label, **style)
        small = dict(ls="", ms=3, alpha=0.5)
    else:
        bar = dict(color=style["color"], fmt="_", ms=16, mew=2, elinewidth=1, capsize=4)
        around = [0 if math.isnan(spread(values)) else spread(values) for _, values in points]
        axes.errorbar(*_columns(means), yerr=around, **bar)
        small = dict(ls="", ms=4.5, alpha=0.8, label=label)
    dots = [(x, v) for x, values in points for v in values]
    if not joined or len(dots) > len(means):
        axes.plot(*_columns(dots), **(style | small))


def _columns(points):
    return zip(*points, strict=True) if points else ([], [])


def _scale_x(axes, values):
    """An axis for these numbers, logarithmic if their range is wide, with a tick at each of few."""
    is_wide = min(values) > 0 and max(values) >= 8 * min(values)
    if is_wide:
        axes.set_xscale("log")
        axes.minorticks_off()
    if is_wide or len(values) <= MAX_TICKS:
        axes.set_xticks(values, [f"{v:,g}" if v >= 1 else f"{v:g}" for v in values])
    else:
        _plain(axes.xaxis)


def _plain(axis):
    from matplotlib.ticker import FuncFormatter

    axis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:,g}" if abs(x) >= 1 else f"{x:g}"))


def _finish_y(axes, runs, metric):
    """Name, scale and ticks of the metric, and the line of the task's baseline."""
    from matplotlib.ticker import LogLocator, NullLocator

    name = metric.replace("eval_", "held-out ").replace("@*", ", mean over the slices")
    axes.set_ylabel("training loss" if metric == "loss" else name)
    found = [run.result["baseline_loss"] for run in runs if run.result.get("baseline_loss")]
    if found and max(found) - min(found) <= 0.01 * max(found):  # Seeds have other rows.
        if metric in ("loss", "eval_loss"):
            axes.axhline(mean(found), color="0.4", ls=":", lw=1, label="baseline of the task")
        elif metric == "eval_accuracy":  # The baseline is a guess among exp(loss) answers.
            axes.axhline(math.exp(-mean(found)), color="0.4", ls=":", lw=1, label="guessing")
    values = [float(v) for line in axes.lines for v in line.get_ydata() if v > 0]
    if "loss" in metric and values:  # A log axis without values fails.
        axes.set_yscale("log")
        decades = math.log10(max(values) / min(values))
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if decades < 3 else (1,)))
        axes.yaxis.set_minor_locator(NullLocator())
        _plain(axes.yaxis)
    elif "accuracy" in metric:
        axes.set_ylim(-0.02, 1.02)


def _save(figure, axes, runs, path, note):
    labels = [label for label in axes.get_legend_handles_labels()[1] if label]
    if 1 <= len(labels) <= MAX_LABELS:
        style = dict(fontsize="small", frameon=False, handlelength=3)
        if max(map(len, labels)) > LONG:  # Inside it would hide the picture.
            handles, labels = axes.get_legend_handles_labels()
            labels = [textwrap.fill(label, 95) for label in labels]
            figure.legend(handles, labels, loc="outside upper left", **style)
        else:
            axes.legend(**style)
    caption = textwrap.fill("; ".join(filter(None, (about(runs), note))), 125)
    figure.supxlabel(caption, fontsize=7, color="0.3")
    files = [Path(path).with_suffix(suffix) for suffix in SUFFIXES]
    for file in files:
        figure.savefig(file, dpi=120)
    return files


def about(runs: Sequence[Run]) -> str:
    """The runs in a line: task, steps, seeds."""
    tasks = dict.fromkeys(str(run.config.get("task.name", "")) for run in runs)
    steps = [run.result["step"] for run in runs if "step" in run.result]
    seeds = len({run.config.get(SEED) for run in runs})
    parts = [", ".join(filter(None, tasks))]
    if steps:
        few, many = min(steps), max(steps)
        parts.append(f"{many:,} steps" if few == many else f"{few:,} to {many:,} steps")
    parts.append(f"{seeds} seed{'s' if seeds > 1 else ''}")
    return ", ".join(filter(None, parts))
