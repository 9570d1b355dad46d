"""Runs for a report: read from their directories, and grouped by their configs."""

import json
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from attention_jax.training.config import default_config, flatten
from attention_jax.training.files import local_path

SEED = "seed"
_OUTPUT = ("checkpoint.", "eval.sample", "eval.heads")
_BITS = "eval_loss_in_bits_per_character"


class Run(NamedTuple):
    """A run, or a trial of a sweep.

    Attributes:
        name: The name of its directory.
        config: Its fields by path.
        result: The contents of `result.json`; empty until the run is complete.
        rows: The rows of `metrics.jsonl`.
        versions: The versions of the packages that it ran on.
    """

    name: str
    config: Mapping[str, Any]
    result: Mapping[str, Any]
    rows: Sequence[Mapping[str, Any]]
    versions: Mapping[str, str] = {}

    def final(self, metric: str) -> float:
        """The metric at the end; NaN if there is none, as in a diverged or unfinished run.

        `eval_accuracy@*` is the mean over the slices.
        """
        if "diverged_step" in self.result:
            return math.nan
        if metric.endswith("@*"):
            start = metric.removesuffix("*")
            found = [value for name, value in self.result.items() if name.startswith(start)]
            return mean([value for value in found if value is not None])
        value = self.result.get(metric)
        return math.nan if value is None else value


class Line(NamedTuple):
    """Runs that differ only in their seeds.

    Attributes:
        fields: The fields that tell them from other runs, by path.
        runs: The runs themselves.
        values: The final metric of each complete run.
    """

    fields: dict[str, Any]
    runs: list[Run]
    values: list[float]

    def finals(self, metric: str) -> list[float]:
        """Another metric of each complete run."""
        return [value for run in self.runs if math.isfinite(value := run.final(metric))]

    @property
    def label(self) -> str:
        return ", ".join(
            f"{path.split('.')[-1]}={str(value).rpartition('/')[2]}"
            for path, value in self.fields.items()
        )


def load(directory: str | Path) -> list[Run]:
    """The run in a directory, or the trials of the sweep in it.

    Raises:
        ValueError: The directory holds neither, or one of its files is damaged.
    """
    path = local_path(directory, "RUN")
    if path.is_file():
        raise ValueError(f"RUN must be a directory: {directory} is a file.")
    trials = sorted(path.glob("trials/*/config.json"))
    try:
        if trials:  # The sweep alone has noted the versions.
            versions = json.loads((path / "config.json").read_text()).get("versions", {})
            found = [run for file in trials for run in load(file.parent)]
            return [run._replace(versions=dict(versions)) for run in found]
        noted = json.loads((path / "config.json").read_text())
        config = noted["config"]
        result, rows = path / "result.json", path / "metrics.jsonl"
        return [
            Run(
                name=str(path),
                # A run may be older than some of the fields.
                config=flatten(default_config(config["task"]["name"])) | flatten(config),
                result=json.loads(result.read_text()) if result.exists() else {},
                rows=_rows(rows.read_text()) if rows.exists() else [],
                versions=dict(noted.get("versions", {})),
            )
        ]
    except FileNotFoundError as error:
        has_runs = any(path.glob("*/config.json"))
        inside = f" Its directories do: take {directory}/*." if has_runs else ""
        raise ValueError(f"{directory} holds no run.{inside}") from error
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        reason = f"{error} is missing" if isinstance(error, KeyError) else str(error)
        raise ValueError(f"{directory} holds no run that can be read: {reason}.") from error


def _rows(text):
    # A running or killed run may have written half a line.
    rows = [json.loads(line) for line in text.split("\n")[:-1]]
    # Other tools write null where there is no number.
    number = lambda row: {name: x for name, x in row.items() if x is not None}
    return [number(row) | {"step": row["step"]} for row in rows]


def main_metric(runs: Iterable[Run]) -> str:
    """`eval_accuracy` if every complete run has one and none is of text, else `eval_loss`.

    Of texts in several kinds of tokens it is the loss in bits per character, which compares.
    """
    runs = list(runs)
    kinds = {run.config.get("task.tokens") for run in runs}
    results = [run.result for run in runs if run.result and "diverged_step" not in run.result]
    has_accuracy = results and all("eval_accuracy" in result for result in results)
    of_text = any(_BITS in result for result in results)
    if of_text and len(kinds) > 1 and all(_BITS in result for result in results):
        return _BITS
    return "eval_accuracy" if has_accuracy and not of_text else "eval_loss"


def folders(found: Sequence[Line]) -> list[str]:
    """The directories of the runs of each line; of more than three the first and the last."""
    names = []
    for line in found:
        own = [run.name for run in line.runs]
        names.append(", ".join(own) if len(own) < 4 else f"{own[0]} … {own[-1]}")
    return names


def is_loss(metric: str) -> bool:
    return "loss" in metric


def differing(runs: Sequence[Run]) -> list[str]:
    """The fields that differ between the runs, in the order of the configs.

    Those that change no number of a run, as how many checkpoints it keeps, are left out.
    """
    paths = dict.fromkeys(path for run in runs for path in run.config)
    paths = [path for path in paths if not path.startswith(_OUTPUT)]
    return [p for p in paths if any(run.config.get(p) != runs[0].config.get(p) for run in runs)]


def lines(runs: Sequence[Run], metric: str) -> list[Line]:
    """Groups of runs that differ only in their seeds, in the order of the runs."""
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


def mean(values: Sequence[float]) -> float:
    """NaN for no values."""
    return statistics.mean(values) if values else math.nan


def spread(values: Sequence[float]) -> float:
    """The standard deviation of a sample, that is over n - 1; NaN for fewer than two values."""
    return statistics.stdev(values) if len(values) > 1 else math.nan
