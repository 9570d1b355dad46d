"""What `attention-jax inspect` finds out about the heads of a model."""

import functools
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import jax
import numpy as np

from attention_jax import analysis
from attention_jax.analysis.scores import KINDS
from attention_jax.laboratory.report import markdown
from attention_jax.laboratory.subject import Subject

AT_ANSWERS = "induction_at_answers"
PREFIX = "prefix_matching"
_PAGE_ROWS = 4
_SCORED_ROWS = 32  # Maps of more rows would fill the memory of a large model.

Scores = Mapping[str, Mapping[str, np.ndarray]]  # By name and layer, `[N]`.


class Curve(NamedTuple):
    """What is left as heads go."""

    kept: Sequence[int]
    by_importance: np.ndarray
    at_random: np.ndarray
    measure: str


class AtStep(NamedTuple):
    """A checkpoint: maps `[N, T, S]` of the first row, scores, and the measures of all rows."""

    maps: Mapping[str, np.ndarray]
    scores: Scores
    beside: Mapping[str, Mapping[str, np.ndarray]]
    loss: float
    accuracy: float | None
    in_context: float | None


class Findings(NamedTuple):
    """Of the newest parameters, and by step of the checkpoints.

    Attributes:
        maps: `[rows, N, T, S]` of the first rows.
        rows: How many these are.
        scores, statistics: Of the heads.
        loss, accuracy: Of the whole model.
        importance: `[N]` by layer.
        without: By measure ("loss", "accuracy") and layer `[N]`: what is left without each head.
        curve: What is left as heads go.
        step: Of the newest parameters, or None.
        by_step: The checkpoints.
    """

    maps: Mapping[str, np.ndarray]
    rows: int
    scores: Scores
    statistics: Mapping[str, Mapping[str, np.ndarray]]
    loss: float
    accuracy: float | None
    importance: Mapping[str, np.ndarray]
    without: Mapping[str, Mapping[str, np.ndarray]]
    curve: Curve
    step: int | None
    by_step: Mapping[int, AtStep]

    def phase(self) -> tuple[list[int], dict[str, list[float]], dict[str, list[float]]]:
        """Steps, curves from 0 to 1, and losses, for `analysis.draw_phase`."""
        found = list(self.by_step.values())
        curves = {}
        if self.accuracy is not None:
            curves["accuracy"] = [at.accuracy for at in found]
        names = {PREFIX: "prefix matching", AT_ANSWERS: "induction at answers"}
        names["previous_token_head"] = "previous token"
        for name, label in names.items():
            if name in self.scores:
                best = lambda at, name=name: analysis.best_head(at.scores[name])[2]
                curves[f"{label},\nbest head"] = [best(at) for at in found]
        losses = {"held-out loss": [at.loss for at in found]}
        if all(at.in_context is not None for at in found):
            losses["in-context score"] = [at.in_context for at in found]
        return list(self.by_step), curves, losses

    def told(self, subject: Subject) -> list[str]:
        """The paragraphs of `heads.md`: the whole model, the heads that stand out, the table."""
        whole = f"All heads: loss {self.loss:.4f}"
        if self.accuracy is not None:
            whole += f", accuracy {self.accuracy:.1%}"
        lines = [whole + "."]
        for name, scores in self.scores.items():
            path, head, score = analysis.best_head(scores)
            lines.append(f"- {name.replace('_', ' ')}: {path}, head {head} ({score:.3f})")
        first, _ = analysis.ranked(self.importance)[-1], None
        lines.append(f"- the most important: {first[0]}, head {first[1]}")
        rows = [["layer", "head"]]
        statistics = next(iter(self.statistics.values()))
        for name in (*self.scores, *statistics):
            rows[0].append(name.replace("_", " "))
        rows[0] += ["importance", *(f"{name} without it" for name in self.without)]
        for path, of_layer in self.statistics.items():
            for head in range(len(next(iter(of_layer.values())))):
                values = [scores[path][head] for scores in self.scores.values()]
                values += [numbers[head] for numbers in of_layer.values()]
                of_gate = lambda numbers, path=path, head=head: (
                    f"{float(numbers[path][head]):.3f}" if path in numbers else "-"
                )
                rows.append([path, str(head), *(f"{float(x):.3f}" for x in values)])
                rows[-1] += [of_gate(self.importance), *map(of_gate, self.without.values())]
        return [lines[0], "\n".join(lines[1:]), markdown(rows), *_notes(subject, self)]


def _notes(subject, findings):
    notes = []
    if subject.vocab_size is not None:
        notes.append(
            "The scores of heads are TransformerLens' over all tokens; prefix matching is Olsson's,"
            " on repeated random tokens."
        )
    if AT_ANSWERS in findings.scores:
        notes.append("At answers: the induction score at the places that are asked for alone.")
    if len(findings.by_step) > 1 and _early_and_late(subject) is None:
        notes.append("There is no in-context score: the task does not ask at every token.")
    return [" ".join(notes)] if notes else []


def find(subject: Subject, *, points: int, orders: int, checkpoints: int) -> Findings:
    """Finds out all of it.

    Args:
        subject: What to inspect.
        points: Of the curve of pruning, at most.
        orders: How many random orders it compares.
        checkpoints: Of how many to look at, evenly taken.
    """
    whole = _at(subject, subject.params)
    run = functools.partial(analysis.attention_maps, subject.model, **subject.options)
    rows = min(_PAGE_ROWS, len(subject.inputs))
    maps = jax.tree.map(np.asarray, run(subject.params, subject.inputs[:rows]))
    arguments = subject.model, subject.params, subject.inputs
    importance = analysis.importance(*arguments, subject.loss, **subject.options)
    importance = jax.tree.map(np.asarray, importance)
    measures = {"loss": subject.loss}
    if whole.accuracy is not None:
        measures["accuracy"] = subject.accuracy
    without = {
        name: jax.tree.map(np.asarray, analysis.ablation(*arguments, measure, **subject.options))
        for name, measure in measures.items()
    }
    steps = list(subject.steps)
    if len(steps) > checkpoints:
        chosen = np.linspace(0, len(steps) - 1, checkpoints).round().astype(int)
        steps = [steps[i] for i in chosen] if checkpoints > 1 else steps[-1:]
    by_step = {}
    if len(steps) > 1:
        by_step = {step: _at(subject, subject.restore(step)) for step in steps[:-1]}
        by_step[steps[-1]] = whole
    return Findings(
        maps=maps,
        rows=rows,
        scores=whole.scores,
        statistics={path: dict(found) for path, found in _statistics(whole).items()},
        loss=whole.loss,
        accuracy=whole.accuracy,
        importance=importance,
        without=without,
        curve=_curve(arguments, subject, measures, importance, points, orders),
        step=subject.steps[-1] if subject.steps else None,
        by_step=by_step,
    )


def _statistics(at):
    """What stands beside a head, without the scores."""
    names = {name.replace("_", " ") for name in at.scores}
    return {
        path: {name: values for name, values in found.items() if name not in names}
        for path, found in at.beside.items()
    }


def _at(subject, params) -> AtStep:
    """Everything that is followed over the steps."""
    losses, right, weights = _answers(subject.model, subject.answers, params, subject.inputs,
                                      dict(subject.options))  # fmt: skip
    losses, weights = np.asarray(losses, float), np.asarray(weights, float)
    mean = lambda values: float((values * weights).sum() / max(weights.sum(), 1e-9))
    some = min(_SCORED_ROWS, len(subject.inputs))
    run = functools.partial(analysis.attention_maps, subject.model, params)
    maps = jax.tree.map(np.asarray, run(subject.inputs[:some], **subject.options))
    scores = _scores(subject, params, maps, some)
    statistics = analysis.map_statistics(maps)
    beside = {
        path: {
            **{name.replace("_", " "): values[path] for name, values in scores.items()},
            **statistics[path],
        }
        for path in maps
    }
    places = _early_and_late(subject)
    in_context = None
    if places is not None:
        in_context = float(analysis.in_context_score(losses, early=places[0], late=places[1]))
    return AtStep(
        maps={path: weights[0] for path, weights in maps.items()},
        scores=scores,
        beside=beside,
        loss=mean(losses),
        accuracy=None if right is None else mean(np.asarray(right, float)),
        in_context=in_context,
    )


@functools.partial(jax.jit, static_argnums=(0, 1))
def _answers(model, answers, params, inputs, options):
    return answers(model.apply({"params": params}, inputs, **options))


def _early_and_late(subject):
    """Olsson's places, 50 and 500 of 512, where every token is asked for; else None."""
    T = subject.queries.shape[1]
    if subject.vocab_size is None or T < 16 or not subject.queries[:, :-1].all():
        return None
    places = T * 50 // 512, T * 500 // 512
    return places


def _scores(subject, params, maps, rows):
    if subject.vocab_size is None:
        return {}
    tokens, queries = subject.inputs[:rows], subject.queries[:rows]
    square = {path: x for path, x in maps.items() if x.shape[-1] == x.shape[-2]}
    found = {}
    if queries[:, :-1].mean() < 0.9:
        found[AT_ANSWERS] = analysis.head_scores(square, tokens, "induction_head", queries=queries)
    if "mask" not in subject.options:  # Such a mask is for the rows of the task alone.
        repeats = 4 if subject.length >= 16 else 2
        found[PREFIX] = analysis.prefix_matching(
            subject.model,
            params,
            vocab_size=subject.vocab_size,
            rng=jax.random.key(0),
            length=min(25, subject.length // repeats),
            repeats=repeats,
        )
    for kind in KINDS[::-1]:
        found[kind] = analysis.head_scores(square, tokens, kind)
    return found


def _curve(arguments, subject, measures, importance, points, orders):
    heads = analysis.ranked(importance)
    measure = list(measures)[-1]
    counts = np.unique(np.linspace(0, len(heads), min(points, len(heads) + 1)).round().astype(int))
    rng = np.random.default_rng(0)
    drawn = [[heads[i] for i in rng.permutation(len(heads))] for _ in range(orders)]
    found = analysis.removal_curve(
        *arguments, measures[measure], [heads, *drawn], counts=counts.tolist(), **subject.options
    )
    return Curve((len(heads) - counts).tolist(), found[0], found[1:], measure)
