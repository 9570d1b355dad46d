"""What `attention-jax inspect` finds out about the heads of a model."""

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import jax
import numpy as np

from attention_jax import analysis
from attention_jax.analysis.scores import KINDS
from attention_jax.laboratory.report import markdown
from attention_jax.laboratory.subject import Subject
from attention_jax.training.experiment import count
from attention_jax.training.metrics import Busy

AT_ANSWERS = "induction_at_answers"
PREFIX = "prefix_matching"
_PAGE_ROWS = 4
HIGH = 0.5  # A score that makes a head one of that kind, as of induction.
_SCORED_ROWS = 32  # Maps of more rows would fill the memory of a large model.
MAX_WEIGHTS = 2**28  # In maps at once: 1 GB, and several times as much on the way.

Scores = Mapping[str, Mapping[str, np.ndarray]]  # By name and layer, `[N]`.


class Curve(NamedTuple):
    """What is left as heads go."""

    kept: Sequence[int]
    by_importance: np.ndarray
    at_random: np.ndarray
    measure: str


class AtStep(NamedTuple):
    """A model at a step.

    Attributes:
        maps: Of the first row, `[N, T, S]` by layer.
        scores, statistics: `[N]` of the heads.
        loss, accuracy: Of all rows; no accuracy without tokens.
        in_context: The in-context score, where every token is asked for.
    """

    maps: Mapping[str, np.ndarray]
    scores: Scores
    statistics: Mapping[str, Mapping[str, np.ndarray]]
    loss: float
    accuracy: float | None
    in_context: float | None

    @property
    def beside(self) -> dict[str, dict[str, np.ndarray]]:
        """Scores and statistics by layer, to show beside a head."""
        return {
            path: {name: values[path] for name, values in self.scores.items()} | of_layer
            for path, of_layer in self.statistics.items()
        }


class Findings(NamedTuple):
    """What there is to tell.

    Attributes:
        newest: The model with its newest parameters.
        step: Their step, or None.
        maps: Of the first rows, `[rows, N, T, S]` by layer.
        importance: `[N]` by layer.
        without: By measure ("loss", "accuracy") and layer `[N]`: what is left without each head.
        curve: What is left as heads go.
        groups: What is left without some heads, by a description of them. The last four are empty
            or None if no head has a gate.
        by_step: The checkpoints, if there are several.
    """

    newest: AtStep
    step: int | None
    maps: Mapping[str, np.ndarray]
    importance: Mapping[str, np.ndarray]
    without: Mapping[str, Mapping[str, np.ndarray]]
    curve: Curve | None
    groups: Mapping[str, float]
    by_step: Mapping[int, AtStep]

    def phase(self) -> tuple[list[int], dict[str, list[float]], dict[str, list[float]]]:
        """Steps, curves from 0 to 1, and losses, for `analysis.draw_phase`."""
        found = list(self.by_step.values())
        curves = {}
        if self.newest.accuracy is not None:
            curves["accuracy"] = [at.accuracy for at in found]
        labels = {
            PREFIX: "prefix matching",
            AT_ANSWERS: "induction at answers",
            "previous_token_head": "previous token",
        }
        for name in filter(self.newest.scores.__contains__, labels):
            best = [analysis.best_head(at.scores[name])[2] for at in found]
            curves[f"{labels[name]},\nbest head"] = best
        losses = {"loss": [at.loss for at in found]}
        if all(at.in_context is not None for at in found):
            losses["in-context score"] = [at.in_context for at in found]
        return list(self.by_step), curves, losses

    def told(self, subject: Subject) -> list[str]:
        """The paragraphs of `heads.md`: the whole model, the heads that stand out, the table."""
        newest = self.newest
        whole = f"All heads: loss {newest.loss:.4f}"
        if newest.accuracy is not None:
            whole += f", accuracy {newest.accuracy:.1%}"
        best = []
        for name, scores in newest.scores.items():
            path, head, score = analysis.best_head(scores)
            if score > 0:  # Else no head has it, as in a text where no token repeats.
                best.append(f"- {name.replace('_', ' ')}: {path}, head {head} ({score:.3f})")
        for path, head in analysis.ranked(self.importance)[-1:]:
            best.append(f"- the largest importance, which is a slope: {path}, head {head}")
        lines = [f"{whole}.", "\n".join(best)] if best else [f"{whole}."]
        if self.groups:
            shown = "{:.1%}" if self.curve.measure == "accuracy" else "{:.4f}"
            left = [f"- {name}: {shown.format(value)}" for name, value in self.groups.items()]
            lines.append(f"The {self.curve.measure}\n" + "\n".join(left))
        return [*lines, markdown(self._table()), *_notes(subject, self)]

    def _table(self):
        def number(found, name, head):
            value = float(found[name][head]) if name in found else math.nan
            return "-" if math.isnan(value) else f"{value:.3f}"

        # A layer of a single head has no gate for it.
        columns = [self.importance, *self.without.values()] if self.importance else []
        rows = []
        for path, of_layer in self.newest.beside.items():
            for head in range(len(of_layer["entropy"])):
                row = [path, str(head), *(number(of_layer, name, head) for name in of_layer)]
                rows.append([*row, *(number(column, path, head) for column in columns)])
        names = [name.replace("_", " ") for name in of_layer]
        without = [f"{name} without it" for name in self.without]
        if self.importance:
            names += ["importance", *without]
        return [["layer", "head", *names], *rows]


def _notes(subject, findings):
    notes = [
        "The entropy is in nats, the distance in tokens; the largest weight and the weight to the "
        "first, previous and own token are shares of 1."
    ]
    if findings.newest.scores:
        notes.append(
            "The scores of heads are TransformerLens' over all tokens but padding; prefix matching "
            "is Olsson's, on repeated random tokens."
        )
    if AT_ANSWERS in findings.newest.scores:
        notes.append("At answers: the induction score at the places that are asked for alone.")
    if findings.newest.scores and len(findings.by_step) > 1 and _early_and_late(subject) is None:
        notes.append("There is no in-context score: the task does not ask at every token.")
    return [" ".join(notes)]


def find(
    subject: Subject,
    *,
    points: int,
    orders: int,
    checkpoints: int,
    say: Callable[[str], None] = lambda line: None,
) -> Findings:
    """Finds out all of it.

    Args:
        subject: What to inspect.
        points: Of the curve of pruning, at most.
        orders: How many random orders it compares.
        checkpoints: Of how many to look at, evenly taken.
        say: Takes a line about work that takes some seconds, from another thread.

    Raises:
        ValueError: A row is too long for its maps.
        NotImplementedError: No layer can show its weights.
    """
    busy, rows = Busy(say), _rows_of_maps(subject)
    with busy("looking at the heads"):
        newest = _at(subject, subject.params, rows)
        few = subject.inputs[: min(_PAGE_ROWS, rows)]
        maps = _numbers(
            analysis.attention_maps(subject.model, subject.params, few, **subject.options)
        )
    arguments = subject.model, subject.params, subject.inputs
    importance, without, curve, groups = {}, {}, None, {}
    if analysis.heads_of(*arguments, **subject.options):  # Not in a layer of a single head.
        with busy("measuring the importance of heads"):
            importance = _numbers(analysis.importance(*arguments, subject.loss, **subject.options))
        measures = {"loss": subject.loss}
        if newest.accuracy is not None:
            measures["accuracy"] = subject.accuracy
        with busy("removing each head"):
            without = {
                name: _numbers(analysis.ablation(*arguments, measure, **subject.options))
                for name, measure in measures.items()
            }
        with busy("removing more and more heads"):
            curve = _curve(arguments, subject, measures, importance, points, orders)
            groups = _groups(arguments, subject, measures[curve.measure], importance, newest)
    steps = subject.steps[-1:] if checkpoints == 1 else evenly(subject.steps, checkpoints)
    by_step = {}
    if len(steps) > 1:
        for i, step in enumerate(steps[:-1]):
            with busy(f"looking at checkpoint {i + 1} of {len(steps)}"):
                by_step[step] = _at(subject, subject.restore(step), rows)
        by_step[steps[-1]] = newest
    return Findings(
        newest=newest,
        step=subject.steps[-1] if subject.steps else None,
        maps=maps,
        importance=importance,
        without=without,
        curve=curve,
        groups=groups,
        by_step=by_step,
    )


def _numbers(arrays):
    """On the host; waits for the devices."""
    return jax.tree.map(np.asarray, arrays)


def evenly(values: Sequence, most: int) -> list:
    """At most so many of the values, two or more, with the first and the last.

    >>> evenly([1, 2, 3, 4, 5], 3)
    [1, 3, 5]
    """
    if len(values) <= most:
        return list(values)
    return [values[round(i * (len(values) - 1) / (most - 1))] for i in range(most)]


def _rows_of_maps(subject) -> int:
    """How many rows have room for their maps at once; ValueError if not even one has."""
    maps = lambda params, row: analysis.attention_maps(
        subject.model, params, row, **subject.options
    )
    found = jax.eval_shape(maps, subject.params, subject.inputs[:1])
    one = sum(math.prod(weights.shape) for weights in found.values())
    if one > MAX_WEIGHTS:
        raise ValueError(
            f"a row of {subject.inputs.shape[1]:,} tokens has maps of {one:,} weights, and at most "
            f"{MAX_WEIGHTS:,} fit: take a shorter one."
        )
    return min(_SCORED_ROWS, len(subject.inputs), MAX_WEIGHTS // one)


def _at(subject, params, some) -> AtStep:
    """Everything that is followed over the steps."""
    losses, right, weights = _answers(
        subject.model, subject.answers, params, subject.inputs, dict(subject.options)
    )
    losses, weights = np.asarray(losses, float), np.asarray(weights, float)
    mean = lambda values: float((values * weights).sum() / max(weights.sum(), 1e-9))
    run = functools.partial(analysis.attention_maps, subject.model, params)
    maps = _numbers(run(subject.inputs[:some], **subject.options))
    places = _early_and_late(subject)
    in_context = None
    if places is not None:
        in_context = float(analysis.in_context_score(losses, early=places[0], late=places[1]))
    return AtStep(
        maps={path: weights[0] for path, weights in maps.items()},
        scores=_scores(subject, params, maps, some),
        statistics=analysis.map_statistics(maps, queries=_counted(subject, some)),
        loss=mean(losses),
        accuracy=None if right is None else mean(np.asarray(right, float)),
        in_context=in_context,
    )


@functools.partial(jax.jit, static_argnums=(0, 1))
def _answers(model, answers, params, inputs, options):
    return answers(model.apply({"params": params}, inputs, **options))


def _early_and_late(subject):
    """Olsson's places, 50 and 500 of 512, where every token is asked for; else None."""
    if subject.vocab_size is None or not subject.queries[:, :-1].all():
        return None
    count = int(subject.queries[0].sum())  # The last token of a text asks for no other.
    return None if count < 16 else (count * 50 // 512, count * 500 // 512)


def _scores(subject, params, maps, rows):
    if subject.vocab_size is None or subject.length < 2:  # The scores compare places.
        return {}
    tokens, queries = subject.inputs[:rows], subject.queries[:rows]
    square = {path: x for path, x in maps.items() if x.shape[-1] == x.shape[-2]}
    found = {}
    counted = _counted(subject, rows)
    if counted is None and queries[:, :-1].mean() < 0.9:
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
        found[kind] = analysis.head_scores(square, tokens, kind, queries=counted)
    return found


def _counted(subject, rows):
    return None if subject.counted is None else subject.counted[:rows]


def _curve(arguments, subject, measures, importance, points, orders):
    heads = analysis.ranked(importance)
    # In a text a right guess of the next token is rare, and its loss shows more.
    measure = "loss" if subject.guess is None else "accuracy"
    counts = np.array(evenly(range(len(heads) + 1), points))
    rng = np.random.default_rng(0)
    drawn = [[heads[i] for i in rng.permutation(len(heads))] for _ in range(orders)]
    found = analysis.removal_curve(
        *arguments, measures[measure], [heads, *drawn], counts=counts.tolist(), **subject.options
    )
    return Curve((len(heads) - counts).tolist(), found[0], found[1:], measure)


def _groups(arguments, subject, measure, importance, newest):
    """What is left without the heads of induction, and without half of the others."""
    name, scores = next(iter(newest.scores.items()), (None, {}))
    ranked = analysis.ranked(importance)  # The least important first.
    found = [(path, n) for path, n in ranked if path in scores and scores[path][n] >= HIGH]
    others = [head for head in ranked if head not in found]
    if not (found and others):
        return {}
    half = (len(others) + 1) // 2
    left = analysis.removal_curve(
        *arguments,
        measure,
        [found + others, others + found],
        counts=[len(found), half],
        **subject.options,
    )
    kind = name.replace("_", " ")
    return {
        f"without the {count(len(found), 'head')} whose {kind} is at least {HIGH}": float(
            left[0, 0]
        ),
        f"without {half} of the {len(others)} others, the least important": float(left[1, 1]),
    }
