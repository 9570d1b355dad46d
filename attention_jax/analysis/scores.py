"""Scores of heads: which one looks at the token before, and which one copies what came next.

The names and definitions of `head_scores` are those of TransformerLens' `head_detector`, so that
its numbers can be compared.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from attention_jax.analysis.maps import Maps, as_weights, attention_maps
from attention_jax.checks import as_integers, as_rng, as_size, check_flag, check_word
from attention_jax.types import Array, PyTree

KINDS = ("previous_token_head", "duplicate_token_head", "induction_head")


def head_pattern(tokens: Array, kind: str) -> np.ndarray:
    """Where a head of a kind would look, `[..., T, T]` of zeros and ones.

    - `previous_token_head`: the token before.
    - `duplicate_token_head`: earlier tokens that are the same.
    - `induction_head`: the tokens after earlier tokens that are the same.

    >>> print(head_pattern([5, 7, 5], "induction_head"))
    [[0 0 0]
     [0 0 0]
     [0 1 0]]

    Args:
        tokens: Integers `[..., T]`.
        kind: One of these names.

    Raises:
        ValueError: `kind` is another word.
    """
    check_word("kind", kind, KINDS)
    tokens = np.asarray(as_integers("tokens", tokens, axes=1))
    T = tokens.shape[-1]
    t, s = np.arange(T)[:, None], np.arange(T)
    if kind == "previous_token_head":
        return np.broadcast_to(t == s + 1, (*tokens.shape[:-1], T, T)).astype(int)
    same = (tokens[..., :, None] == tokens[..., None, :]) & (t > s)
    if kind == "induction_head":
        # The key after; that of the token before is the token itself.
        after = np.zeros_like(same)
        after[..., :, 1:] = same[..., :, :-1]
        same = after
    return same.astype(int)


def head_scores(
    maps: Maps,
    tokens: Array,
    kind: str,
    *,
    error_measure: str = "mul",
    exclude_bos: bool = False,
    exclude_current_token: bool = False,
    queries: Array | None = None,
) -> dict[str, np.ndarray]:
    """How much each head is one of a kind, the mean over rows.

    Args:
        maps: `[..., N, T, T]` for each layer, as `attention_maps` gives them.
        tokens: Integers `[..., T]`, with the batch axes of the maps.
        kind: "previous_token_head", "duplicate_token_head" or "induction_head": see `head_pattern`.
        error_measure: "mul" gives the share of the attention that falls on the pattern, 0 to 1; 0
            for a head without any attention. "abs" gives 1 minus the mean over queries of
            sum |weight - pattern|, -1 to 1.
        exclude_bos: Leaves out the attention to the first token.
        exclude_current_token: Leaves out the attention of each token to itself.
        queries: Boolean `[..., T]`, which tokens count as those that look, as the questions of a
            task; our own addition. None: all do.

    Returns:
        `[N]` for each layer, by its path.

    Raises:
        ValueError: A word is unknown, or maps and tokens do not fit.
        TypeError: The tokens are not integers.

    Reference:
        `transformer_lens.head_detector.detect_head`, which takes causal attention alone and rounds
        "abs" to three digits.
        https://github.com/TransformerLensOrg/TransformerLens/blob/main/transformer_lens/head_detector.py
    """
    check_word("error_measure", error_measure, ("mul", "abs"))
    check_flag("exclude_bos", exclude_bos)
    check_flag("exclude_current_token", exclude_current_token)
    pattern = head_pattern(tokens, kind)
    T = pattern.shape[-1]
    counted = np.ones(pattern.shape, bool)
    if queries is not None:
        queries = np.asarray(queries)
        if queries.dtype != bool or queries.shape != pattern.shape[:-1]:
            raise ValueError(
                f"queries must be boolean with the shape of tokens, {pattern.shape[:-1]}, got "
                f"{queries.dtype} {queries.shape}."
            )
        counted &= queries[..., None]
    looking = np.maximum(counted.any(-1).sum(-1).reshape(-1, 1), 1)  # [B, 1]
    if exclude_bos:
        counted[..., :1] = False
    if exclude_current_token:
        counted &= ~np.eye(T, dtype=bool)
    counted = counted.reshape(-1, 1, T, T)
    found = {}
    for path, weights in maps.items():
        if np.shape(weights)[-2:] != (T, T) or np.shape(weights)[:-3] != pattern.shape[:-2]:
            raise ValueError(
                f"maps must be [..., N, T, T] for tokens [..., T]: got {np.shape(weights)} for "
                f"{path} and tokens {pattern.shape[:-1]}."
            )
        weights = counted * as_weights(path, weights)
        wanted = counted * pattern.reshape(-1, 1, T, T)
        if error_measure == "abs":
            each = 1 - np.abs(weights - wanted).sum((-2, -1)) / looking
        else:
            total = weights.sum((-2, -1))
            each = (weights * wanted).sum((-2, -1)) / np.where(total == 0, 1, total)
        found[path] = each.mean(0)
    return found


def prefix_matching(
    model: nn.Module,
    params: PyTree,
    *,
    vocab_size: int,
    rng: Array,
    length: int = 25,
    repeats: int = 4,
    rows: int = 8,
    first: int | None = None,
    **options: Any,
) -> dict[str, np.ndarray]:
    """How much each head looks at what came after the earlier copies of a token.

    The rows are random tokens, repeated. The score of a head is the mean over all tokens but those
    of the first copy: its attention to the tokens that followed earlier copies of the same token.

    Args:
        model, params, **options: As in `attention_maps`.
        vocab_size: The tokens are drawn from 0 to `vocab_size - 1`, without one twice while there
            are enough.
        rng: A key.
        length: Of what is repeated.
        repeats: How often it stands in a row, at least 2.
        rows: How many rows.
        first: A token to begin each row with, as that of the beginning of a text.

    Returns:
        `[N]` for each layer, by its path; from 0 to 1.

    Raises:
        ValueError: A number is out of its range.

    Reference:
        Olsson et al. 2022, "In-context Learning and Induction Heads", "Head activation evaluators";
        there `first` is the beginning of the text, and the most and least frequent tokens are left
        out. https://arxiv.org/abs/2209.11895
    """
    length, rows = as_size("length", length), as_size("rows", rows)
    vocab_size = as_size("vocab_size", vocab_size, 2)  # One token has no other to follow it.
    repeats = as_size("repeats", repeats, 2)
    tokens = repeated_tokens(
        rng, vocab_size=vocab_size, length=length, repeats=repeats, rows=rows, first=first
    )
    maps = attention_maps(model, params, tokens, **options)
    if any(np.isnan(np.asarray(weights, np.float32)).any() for weights in maps.values()):
        raise ValueError(
            f"model gives NaN for some tokens below vocab_size={vocab_size}: its table may be "
            "smaller."
        )
    pattern = head_pattern(tokens, "induction_head")
    later = slice(tokens.shape[-1] - length * (repeats - 1), None)
    return {
        path: (as_weights(path, weights) * pattern[:, None])[:, :, later].sum(-1).mean((0, 2))
        for path, weights in maps.items()
    }


def repeated_tokens(
    rng: Array, *, vocab_size: int, length: int, repeats: int, rows: int, first: int | None = None
) -> Array:
    """Random tokens that come again and again, `[rows, length * repeats]`, one more with `first`.

    Args and errors as in `prefix_matching`.
    """
    rng, vocab_size = as_rng("rng", rng), as_size("vocab_size", vocab_size)
    if first is not None:
        first = as_size("first", first, 0, vocab_size - 1)

    def row(rng):
        if length <= vocab_size:
            return jax.random.permutation(rng, vocab_size)[:length]
        return jax.random.randint(rng, (length,), 0, vocab_size)

    tokens = jnp.tile(jax.vmap(row)(jax.random.split(rng, rows)), (1, repeats)).astype(jnp.int32)
    return tokens if first is None else jnp.pad(tokens, ((0, 0), (1, 0)), constant_values=first)


def in_context_score(losses: Array, *, late: int = 500, early: int = 50) -> np.ndarray:
    """How much more a model knows late in a row: the loss late minus the loss early.

    It is below 0 if the model makes use of what it has read.

    Args:
        losses: `[..., T]`: the loss of the token that follows each position.
        late, early: Places in the row, counted from 0.

    Returns:
        The mean over the rows, a scalar.

    Raises:
        ValueError: The places are not in the row, or late is not after early.

    Reference:
        Olsson et al. 2022, "In-context Learning and Induction Heads", "In-context learning score".
        https://arxiv.org/abs/2209.11895
    """
    losses = np.asarray(losses, np.float64)
    if losses.ndim < 1 or not 0 <= early < late < losses.shape[-1]:
        raise ValueError(
            f"early and late must be places in losses [..., T], early first: got {early} and "
            f"{late} for shape {losses.shape}."
        )
    return (losses[..., late] - losses[..., early]).mean()


def best_head(scores: Mapping[str, Array]) -> tuple[str, int, float]:
    """The layer, the number and the score of the head whose score is the largest."""
    path = max(scores, key=lambda path: np.max(scores[path]))
    head = int(np.argmax(scores[path]))
    return path, head, float(scores[path][head])
