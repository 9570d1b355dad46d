"""Pictures of heads, as a paper would print them, as PNG or SVG."""

import logging
import textwrap
import unicodedata
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from attention_jax.analysis.maps import Maps, as_weights
from attention_jax.checks import as_size
from attention_jax.types import Array

MAX_LABELS = 32  # A longer row shows positions; labels would run into one another.
LONG = 64  # Tokens of a row beyond which the colours bring out small weights.
_BLUE, _RED, _GREEN, _GREY = "#0072b2", "#d55e00", "#009e73", "0.4"
_DPI = 150


def draw_maps(
    path: str | Path,
    maps: Maps,
    tokens: Sequence[Any] | None = None,
    *,
    key_tokens: Sequence[Any] | None = None,
    row: int = 0,
    scores: Mapping[str, Array] | None = None,
    caption: str = "",
) -> Path:
    """Draws the weights of every head: layers as rows, heads as columns, one scale of colours.

    Args:
        path: The file; its suffix, as `.png` or `.svg`, is the format.
        maps: `[..., N, T, S]` for each layer, as `attention_maps` gives them.
        tokens: The T words, letters or numbers of the row. None shows positions, as a row of more
            than 32 tokens does. The colours of more than 64 bring out small weights.
        key_tokens: The S words of the keys. None: they are `tokens`.
        row: The number of the row, if the maps have batch axes.
        scores: `[N]` for each layer: a number to print above each head.
        caption: A line below the picture.

    Returns:
        The path.

    Raises:
        ValueError: The tokens are not as many as the positions, or there is no such row or no map.
    """
    if not maps:
        raise ValueError("maps must have a layer at least, got none.")
    shown = {name: _row(name, weights, row) for name, weights in maps.items()}
    heads = max(len(weights) for weights in shown.values())
    T, S = max(w.shape[1] for w in shown.values()), max(w.shape[2] for w in shown.values())
    for name, weights in shown.items():
        check_tokens("tokens", tokens, weights.shape[1], name)
        check_tokens(
            "key_tokens", tokens if key_tokens is None else key_tokens, weights.shape[2], name
        )
    words = [_labels(tokens, T), _labels(tokens if key_tokens is None else key_tokens, S)]
    low = min(float(weights.min()) for weights in shown.values())
    high = max(float(weights.max()) for weights in shown.values()) or 1.0
    colours = _colours(low, high, is_long=max(T, S) > LONG)
    where = "across: the token looked at;  down: the token that looks"
    caption = f"{caption}\n{where}" if caption else where
    grid = _Grid(len(shown), heads, max(T, S), *words, caption)
    for i, (name, weights) in enumerate(shown.items()):
        for n, one in enumerate(weights):
            axes = grid.panel(i, n)
            image = axes.imshow(one, aspect="auto", interpolation="nearest", **colours)
            score = "" if scores is None else f"   {float(np.asarray(scores[name])[n]):.2f}"
            label = f"{short_name(name, i)}.{n}" if grid.is_dense else f"head {n}"
            axes.set_title(label + score, fontsize=7 if grid.is_dense else 9, pad=3)
            if n == 0:
                axes.set_ylabel(short_name(name), fontsize=9)
    grid.bar(image)
    return _save(grid.figure, path)


def _colours(low, high, *, is_long):
    from matplotlib.colors import PowerNorm

    if low < 0:  # As in differential attention.
        return dict(cmap="RdBu", vmin=-max(high, -low), vmax=max(high, -low))
    # The weights of a long row are small: the square root shows them, and the bar tells it.
    return dict(cmap="Blues", norm=PowerNorm(0.5 if is_long else 1, 0, high))


class _Grid:
    """Panels in rows and columns, in inches: matplotlib's own layouts take minutes for 144."""

    def __init__(self, rows, columns, count, down, across, caption):
        self.rows, self.is_dense = rows, columns > 4
        is_named = count == len(down[0]) or count == len(across[0])
        size = max(1.1 if self.is_dense else 2.2, 0.17 * count if is_named else 0)
        self.size = size = min(size, max(16 / columns, 0.9))
        longest = lambda ticks: max((len(text) for text in ticks[1]), default=0)
        self.small = max(4.5, min(8, 72 * size / (1.4 * max(len(down[0]), len(across[0]), 1))))
        self.down, self.across = down, across
        wide = [is_named and len(text) > 2 for text in across[1]]
        # A few wide labels among letters are turned alone.
        self.turned = [True] * len(wide) if sum(wide) > len(wide) / 4 else wide
        letter = 0.65 * self.small / 72
        self.left = 0.45 + letter * longest(down)
        self.gap, self.over = 0.1, 0.27
        self.width = self.left + columns * (size + self.gap) + 0.75
        caption = _wrapped(caption, self.width, 8)
        under = 0.32 + 0.14 * len(caption.splitlines())
        self.below = under + (letter * longest(across) if any(self.turned) else 0.12)
        self.height = self.below + rows * (size + self.over) + 0.05
        self.figure = _figure(self.width, self.height, layout=None)
        at = 0.5, 0.08 / self.height
        self.figure.text(*at, caption, fontsize=8, color="0.3", ha="center", va="bottom")

    def _axes(self, x, y, width, height):
        """Of inches from the left and from below."""
        place = x / self.width, y / self.height, width / self.width, height / self.height
        return self.figure.add_axes(place)

    def panel(self, i, n):
        x = self.left + n * (self.size + self.gap)
        y = self.below + (self.rows - 1 - i) * (self.size + self.over)
        axes = self._axes(x, y, self.size, self.size)
        for spine in axes.spines.values():
            spine.set(linewidth=0.5, color="0.6")
        axes.tick_params(length=2, width=0.5, pad=2, labelsize=self.small)
        axes.set_yticks(*(self.down if n == 0 else ([], [])))
        is_last = i == self.rows - 1
        axes.set_xticks(*(self.across if is_last else ([], [])))
        for label, is_turned in zip(axes.get_xticklabels(), self.turned, strict=False):
            label.set_rotation(90 * is_turned)
        return axes

    def bar(self, image):
        height = min(3, self.height - self.below - self.over)
        x = self.width - 0.7
        axes = self._axes(x, self.height - self.over - 0.05 - height, 0.12, height)
        bar = self.figure.colorbar(image, cax=axes)
        bar.set_label("attention weight", fontsize=8)
        axes.tick_params(labelsize=7, width=0.5)
        bar.outline.set_linewidth(0.5)


def _row(name, weights, row):
    """`[N, T, S]` of one row."""
    weights = as_weights(name, weights)
    return weights[as_size("row", row, 0, len(weights) - 1)]


def check_tokens(name: str, tokens: Sequence[Any] | None, count: int, path: str) -> None:
    """Raises ValueError unless the tokens are one for each position of a layer."""
    if tokens is not None and len(tokens) != count:
        raise ValueError(
            f"{name} must be one for each of the {count} positions of {path}, got {len(tokens)}."
        )


def _labels(tokens, count):
    """The places of the ticks, and their text."""
    if tokens is not None and count <= MAX_LABELS:
        return list(range(count)), [_word(token) for token in tokens]
    step = 1
    while count > 8 * step:
        step *= 2
    return list(range(0, count, step)), list(map(str, range(0, count, step)))


def _word(token):
    """A token as a label: what is not seen has a sign, what is long an end."""
    text = str(token).replace("\n", "⏎").replace("\t", "⇥")
    text = visible(text.encode("utf-8", "replace").decode())  # Half of a character has no picture.
    return text if len(text) <= 10 else text[:9] + "…"


def visible(text: str) -> str:
    r"""A text with signs for the characters that are not seen.

    >>> visible("a b\u200d")
    'a␣b\\u200d'
    """
    return "".join(map(_sign, text))


def _sign(letter):
    if letter == " ":
        return "␣"
    unseen = unicodedata.category(letter) in ("Cc", "Cf", "Cn", "Co", "Zl", "Zp", "Zs")
    if unseen or "\ufe00" <= letter <= "\ufe0f":  # These choose a form of the letter before.
        return letter.encode("unicode_escape").decode()
    return letter


def short_name(path: str, row: int | None = None) -> str:
    """`layer 0` for the usual names, else the path itself; with its row, the number alone."""
    parts = path.split("/")
    name, _, number = parts[0].rpartition("_")
    is_usual = parts[1:] == ["attention"] and name == "blocks"
    if row is not None:
        return number if is_usual else str(row)
    return f"layer {number}" if is_usual else path


def draw_pruning(
    path: str | Path,
    kept: Sequence[int],
    by_importance: Sequence[float],
    at_random: Array,
    *,
    measure: str = "accuracy",
    guess: float | None = None,
    caption: str = "",
) -> Path:
    """Draws a measure against the number of heads that a model keeps.

    Args:
        path: The file, as `.png` or `.svg`.
        kept: How many heads are left.
        by_importance: The measure where the least important heads went first, one for each `kept`.
        at_random: `[orders, len(kept)]`, for some random orders.
        measure: Its name.
        guess: What a guess reaches.
        caption: A line below the picture.

    Returns:
        The path.
    """
    figure = _figure(5.4, 3.6)
    axes = _plain_axes(figure)
    at_random = np.asarray(at_random)
    axes.fill_between(kept, at_random.min(0), at_random.max(0), color=_GREY, alpha=0.15, lw=0)
    axes.plot(
        kept, at_random.mean(0), color=_GREY, ls="--", marker="o", ms=3, lw=1.2, label="at random"
    )
    axes.plot(
        kept, by_importance, color=_BLUE, marker="s", ms=4, lw=1.6, label="least important first"
    )
    if guess is not None:
        axes.axhline(guess, color=_GREY, ls=":", lw=1)
        axes.annotate(
            "guessing", (max(kept), guess), (0, 3), textcoords="offset points", ha="left",
            fontsize=7, color=_GREY,
        )  # fmt: skip
    if measure == "accuracy":
        axes.set_ylim(-0.02, 1.02)
    axes.invert_xaxis()
    if len(kept) <= 17:
        axes.set_xticks(list(kept))
    axes.set_xlabel("heads kept")
    axes.set_ylabel(measure)
    axes.legend(fontsize=8, frameon=False, title="heads removed", title_fontsize=8)
    note = f"band: from the worst to the best of {len(at_random)} random orders"
    _caption_below(figure, "; ".join(filter(None, (caption, note))))
    return _save(figure, path)


def draw_phase(
    path: str | Path,
    steps: Sequence[int],
    curves: Mapping[str, Sequence[float]],
    losses: Mapping[str, Sequence[float]],
    *,
    caption: str = "",
) -> Path:
    """Draws what changes together while a model learns: two panels over one axis of steps.

    Args:
        path: The file, as `.png` or `.svg`.
        steps: The steps of the checkpoints.
        curves: By name, numbers between 0 and 1, as the accuracy or the score of a head.
        losses: By name, losses or differences of losses.
        caption: A line below the picture.

    Returns:
        The path.
    """
    figure = _figure(6.4, 4.6)
    parts = [found for found in (curves, losses) if found]
    ratios = (3, 2)[: len(parts)]
    panels = figure.subplots(len(parts), 1, sharex=True, height_ratios=ratios, squeeze=False)[:, 0]
    styles = [(_BLUE, "-"), (_RED, "--"), (_GREEN, "-."), ("#cc79a7", ":")]
    for axes, found in zip(panels, parts, strict=True):
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        for (name, values), (colour, dash) in zip(found.items(), styles, strict=False):
            marker = "o" if len(steps) < 10 else None
            axes.plot(steps, values, color=colour, ls=dash, lw=1.6, marker=marker, ms=4, label=name)
        axes.legend(fontsize=8, frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
        if found is curves:
            axes.set_ylim(-0.02, 1.02)
        else:
            axes.set_ylabel("loss")
    panels[-1].set_xlabel("step")
    _caption_below(figure, caption)
    return _save(figure, path)


def _figure(width, height, layout="constrained"):
    # Imported here, because it takes two seconds.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout=layout)
    FigureCanvasAgg(figure)
    return figure


def _caption_below(figure, caption):
    """The caption of a figure whose layout makes room for it."""
    text = _wrapped(caption, figure.get_figwidth(), 7)
    figure.supxlabel(text, fontsize=7, color="0.3")


def _wrapped(text, inches, size):
    """A caption in lines that fit a figure; letters are half as wide as they are high."""
    width = int(72 * (inches - 0.2) / (0.52 * size))
    return "\n".join(textwrap.fill(line, width) for line in text.splitlines())


def _plain_axes(figure):
    axes = figure.add_subplot()
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    return axes


def _save(figure, path):
    from matplotlib.text import Text

    texts = figure.findobj(Text)
    families, missing = _families({x for text in texts for x in text.get_text()})
    for text in texts:  # Words, in which a dollar sign begins no formula.
        text.set_parse_math(False)
        text.set_fontfamily(families)
    path = Path(path)
    with warnings.catch_warnings():
        if missing:
            warnings.warn(
                f"{path.name}: no installed font has {' '.join(missing[:9])}; these letters are "
                "drawn as boxes.",
                stacklevel=3,
            )
        warnings.filterwarnings("ignore", r"Glyph .* missing from font", UserWarning)
        log = logging.getLogger("matplotlib.font_manager")
        level = log.level
        log.setLevel(logging.ERROR)  # Not every font has the weight that is asked for.
        try:
            figure.savefig(path, dpi=_DPI)
        finally:
            log.setLevel(level)
    return path


def _families(letters: set[str]) -> tuple[list[str], list[str]]:
    """Names of installed fonts that have the letters, the usual one first; and what none has."""
    from matplotlib import font_manager, rcParams
    from matplotlib.ft2font import FT2Font

    def left_by(path):
        font = FT2Font(path)
        return {x for x in missing if not font.get_char_index(ord(x))}

    families = [*rcParams["font.family"]]
    missing = {x for x in letters if x.isprintable()}
    missing = left_by(font_manager.findfont(font_manager.FontProperties()))
    for font in sorted(font_manager.fontManager.ttflist, key=lambda font: font.name):
        is_plain = font.style == font.variant == "normal" and "LastResort" not in font.fname
        if missing and is_plain and (left := left_by(font.fname)) < missing:
            missing = left
            families.append(font.name)
    return families, sorted(missing)
