"""A page to look at heads with: one file of HTML, which needs no network and no library."""

import base64
import html
import json
import math
import re
from collections.abc import Mapping, Sequence
from numbers import Integral
from pathlib import Path
from typing import Any

import numpy as np

from attention_jax.analysis.maps import Maps, as_weights, map_statistics
from attention_jax.analysis.pictures import check_tokens, short_name
from attention_jax.checks import told
from attention_jax.types import Array

# What a browser opens without a long wait, 80 MB of text; 12 layers of 12 heads fill it at 450
# tokens.
MAX_WEIGHTS = 30_000_000
_STEPS = 65535  # Of 16 bits: a weight is off by 8e-6 at most.


def write_page(
    path: str | Path,
    maps: Maps | Mapping[int, Maps],
    tokens: Sequence[Any] | None = None,
    *,
    key_tokens: Sequence[Any] | None = None,
    statistics: Mapping[str, Mapping[str, Array]] | Mapping[int, Mapping] | None = None,
    title: str = "Attention",
    caption: str = "",
) -> Path:
    """Writes a page that shows the map of any head, and the weight of any pair of tokens.

    The address of the page says what it shows: `page.html#layer=1&head=0&t=5&s=3`.

    Args:
        path: The file, as `page.html`.
        maps: `[..., N, T, S]` for each layer, as `attention_maps` gives them; or such maps by the
            step of the checkpoint, which give the page a slider.
        tokens: The T words, letters or numbers of the row, or a list of them for each row. None
            shows positions.
        key_tokens: The same for the S keys. None: they are `tokens`.
        statistics: By layer and name numbers `[N]` to show beside a head; by the step before, if
            the maps are. None takes those of `map_statistics`.
        title, caption: Stand at the top.

    Returns:
        The path.

    Raises:
        ValueError: The tokens do not fit the maps, the steps have different maps, there are no
            maps, they are not finite, or there are more weights than a browser can hold.
    """
    is_by_step = bool(maps) and isinstance(next(iter(maps)), Integral)
    by_step = {int(step): x for step, x in maps.items()} if is_by_step else {None: maps}
    if not maps or not all(by_step.values()):
        raise ValueError("maps must have a layer at least, got none.")
    by_step = {
        step: {name: as_weights(name, weights) for name, weights in found.items()}
        for step, found in by_step.items()
    }
    last = list(by_step.values())[-1]
    shapes = {name: weights.shape for name, weights in last.items()}
    for step, found in by_step.items():
        if {name: weights.shape for name, weights in found.items()} != shapes:
            raise ValueError(f"maps of step {step} have other layers or shapes than the last.")
        for name, weights in found.items():
            if not np.isfinite(weights).all():
                of_step = "" if step is None else f" of step {step}"
                raise ValueError(f"maps{of_step} must be finite: {name} has NaN or Inf.")
    count = sum(weights.size for found in by_step.values() for weights in found.values())
    if count > MAX_WEIGHTS:
        raise ValueError(
            f"maps have {count:,} weights, and a page holds {MAX_WEIGHTS:,}: give fewer rows, "
            "tokens or steps."
        )
    if statistics is None:
        statistics = {step: map_statistics(found) for step, found in by_step.items()}
    elif None in by_step:
        statistics = {None: statistics}
    else:
        statistics = {int(step): x for step, x in statistics.items()}
    B, _, T, S = next(iter(shapes.values()))
    if tokens is None:
        tokens = [[str(t) for t in range(T)]] * B
        key_tokens = [[str(s) for s in range(S)]] * B if S != T else None
    for name, shape in shapes.items():
        if shape[0] != B:
            raise ValueError(f"maps must have the same rows in all layers, got {shape} for {name}.")
        for what, rows, size in (("tokens", tokens, 2), ("key_tokens", key_tokens or tokens, 3)):
            for row in _rows(rows, B, what):
                check_tokens(what, row, shape[size], name)
    low = min(0.0, *(float(w.min()) for found in by_step.values() for w in found.values()))
    high = max(1e-6, *(float(w.max()) for found in by_step.values() for w in found.values()))

    def packed(weights):
        level = np.round((weights - low) / (high - low) * _STEPS).astype("<u2")
        return base64.b64encode(level.tobytes()).decode()

    data = {
        "tokens": _rows(tokens, B, "tokens"),
        "keys": None if key_tokens is None else _rows(key_tokens, B, "key_tokens"),
        "steps": list(by_step),
        "layers": [
            {"path": name, "label": short_name(name), "number": short_name(name, i)}
            | {"heads": N, "T": T, "S": S}
            for i, (name, (_, N, T, S)) in enumerate(shapes.items())
        ],
        "low": low,
        "high": high,
        "weights": [[packed(w) for w in found.values()] for found in by_step.values()],
        "statistics": [
            [{k: _finite(v) for k, v in of[name].items()} for name in shapes]
            for of in (statistics[step] for step in by_step)
        ],
    }
    # A token may be "</script>", which would end the data, or half of a character.
    text = json.dumps(data, allow_nan=False).replace("<", "\\u003c")
    page = Path(__file__).with_name("page.html").read_text(encoding="utf-8")
    parts = {"title": html.escape(title), "caption": html.escape(caption), "data": text}
    # All at once: a caption that holds "{{data}}" stays as it is.
    page = re.sub(r"\{\{(\w+)\}\}", lambda found: parts[found[1]], page)
    path = Path(path)
    path.write_text(page, encoding="utf-8", errors="replace")
    return path


def _finite(values):
    """Numbers as JSON has them: None for those that are not finite."""
    rounded = np.round(np.asarray(values, float), 5).tolist()
    return [x if math.isfinite(x) else None for x in rounded]


def _rows(tokens, count, what):
    """The tokens of each row, as text."""
    is_row = lambda x: isinstance(x, Sequence | np.ndarray) and not isinstance(x, str)
    tokens = np.asarray(tokens).tolist() if hasattr(tokens, "shape") else list(tokens)
    rows = tokens if tokens and is_row(tokens[0]) else [tokens]
    if len(rows) != count:
        raise ValueError(f"{what} must be a row for each of {count} rows, got {told(len(rows))}.")
    return [[str(token) for token in row] for row in rows]
