"""What is inspected: a trained run on rows of its task, or a language model on one text."""

import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from attention_jax.analysis.pictures import MAX_LABELS, visible
from attention_jax.interop import huggingface
from attention_jax.laboratory.parser import as_text, check_read
from attention_jax.tasks.vocabulary import Bytes, name_of_token, unread
from attention_jax.training.checkpoint import checkpoint_steps, read_params, restore_params
from attention_jax.training.loading import load
from attention_jax.training.model import row_mask
from attention_jax.training.watch import first_token
from attention_jax.types import Array, Batch, PyTree

# A held-out key of its own, so that no row was drawn in training.
_STREAM = 20
MAX_LENGTH = 100  # Of the random rows for a model that takes any length.


class Subject(NamedTuple):
    """A model, rows to run it on, and what its answers are worth.

    Attributes:
        name: Of the run or directory.
        about: A line on the rows.
        model, params: As in `Run`.
        inputs: Of all rows, `[B, T]` tokens or `[B, T, D]`.
        options: Of the model's call, as `mask`.
        vocab_size: None if the inputs are no tokens.
        words: The tokens of each row as labels; None if the inputs are no tokens.
        queries: Boolean `[B, T]`: where answers are asked for.
        counted: Boolean `[B, T]`: the tokens that are no padding; None if there is none.
        answers: From outputs to the loss of each answer, whether it is right (None if there is no
            right one), and its weight, all `[B, P]`.
        guess: The accuracy of a guess, or None.
        steps: Of the checkpoints, in order; empty if there are none.
        restore: The parameters of a step.
        length: The longest row that the model takes, up to `MAX_LENGTH`.
        shown: How many tokens of a row a picture shows; None: all.
    """

    name: str
    about: str
    model: nn.Module
    params: PyTree
    inputs: Array
    options: Mapping[str, Any]
    vocab_size: int | None
    words: Sequence[Sequence[str]] | None
    queries: np.ndarray
    counted: np.ndarray | None
    answers: Callable[[Array], tuple[Array, Array | None, Array]]
    guess: float | None
    steps: Sequence[int]
    restore: Callable[[int], PyTree] | None
    length: int
    shown: int | None = None

    def loss(self, outputs: Array) -> Array:
        """A number for each row, `[B]`, whose mean is the mean loss of all answers."""
        losses, _, weights = self.answers(outputs)
        return _mean(losses, weights)

    def accuracy(self, outputs: Array) -> Array:
        """The same of the accuracy; needs tokens."""
        _, right, weights = self.answers(outputs)
        return _mean(right, weights)


def _mean(values, weights):
    """By answers, not by rows: rows may have more and fewer of them."""
    return (values * weights).sum(-1) / jnp.maximum(weights.sum(-1).mean(), 1e-9)


def of_run(place: Path, rows: int, text: bytes | None = None) -> Subject:
    """A run, a trial, or the best trial of a sweep.

    Args:
        place: Its directory.
        rows: How many held-out rows of its task.
        text: The one row to take instead, of a run of text.

    Raises:
        ValueError: The run is of no text, or the text is too short or too long; and the errors of
            `load` and `Run.encode`.
    """
    run = load(place)
    if text is None:
        sample = run.task.sample_held_out or run.task.sample
        rng = jax.random.fold_in(jax.random.key(run.config.seed), _STREAM)
        try:
            batch = jax.jit(sample)(rng, jnp.arange(rows, dtype=jnp.int32))
        except ValueError as error:
            if run.task.text is None:
                raise
            raise ValueError(f"{error} --text takes a text of yours in their place.") from error
        about = f"{run.task.name}, {rows} held-out rows"
    else:
        tokens = _of_text(run, text)
        batch = _continued("--text", tokens, run.model)
        rows, about = 1, f"a text of {len(tokens)} tokens"
        if len(tokens) > run.config.task.seq_length:
            about += f", of which training saw {run.config.task.seq_length} at once"
    T = batch.inputs.shape[1]
    weights = np.asarray(batch.weights) > 0
    queries = np.zeros((rows, T), bool)
    if batch.positions is None:
        queries |= weights
    else:
        np.logical_or.at(queries, (np.arange(rows)[:, None], np.asarray(batch.positions)), weights)
    is_tokens = run.task.vocab_size is not None
    # That of the task is for its own rows.
    mask = row_mask(run.task) if text is None else None
    try:
        _, newest = read_params(place)  # The newest that is whole.
        steps = [step for step in checkpoint_steps(place) if step <= newest]
    except FileNotFoundError:
        steps = []
    return Subject(
        name=place.resolve().name,
        about=about,
        model=run.model,
        params=run.params,
        inputs=batch.inputs,
        options={} if mask is None else {"mask": mask},
        vocab_size=run.task.vocab_size,
        words=_words(run, np.asarray(batch.inputs)) if is_tokens else None,
        queries=queries,
        # A line is padded where it asks for no token.
        counted=queries if text is None and run.task.text and run.task.text.lines else None,
        answers=functools.partial(_tokens if is_tokens else _vectors, batch),
        guess=_guess(run, batch) if is_tokens and run.task.text is None else None,
        steps=steps,
        restore=functools.partial(restore_params, place, run.params),
        length=min(T if text is None else run.config.task.seq_length, MAX_LENGTH),
        # With their letters, which a longer row has no room for.
        shown=MAX_LABELS if text is None and run.task.text and T > MAX_LABELS else None,
    )


def _of_text(run, text):
    if run.task.text is None:
        raise ValueError(f"--text is for a run of text: this one is of {run.task.name}.")
    of = run.task.text
    text = as_text(text, "--text", of_bytes=isinstance(of.vocabulary, Bytes), of_lines=of.lines)
    check_read("--text", of.vocabulary.unread(text))
    tokens = run.encode(text).tolist()
    # A line begins with the token of the newline.
    return [first_token(of), *tokens] if of.lines else tokens


def _continued(name: str, tokens: Sequence[int], model: nn.Module) -> Batch:
    """A row, of which every token but the last asks for the next one."""
    vocab_size = model.embedding.num_embeddings
    limit = getattr(model.positions, "max_length", None)
    if len(tokens) < 2:
        raise ValueError(f"{name} must have two tokens or more, got {len(tokens)}.")
    if not all(0 <= token < vocab_size for token in tokens):
        raise ValueError(f"{name} must be tokens below {vocab_size}, got {tokens}.")
    if limit is not None and len(tokens) > limit:
        raise ValueError(f"the model takes {limit} tokens at most, got {len(tokens)}.")
    inputs = jnp.asarray([tokens], jnp.int32)
    T = len(tokens)
    return Batch(inputs, inputs[:, 1:], jnp.ones((1, T - 1)), jnp.arange(T - 1)[None])


def _words(run, tokens):
    """The tokens as labels: of text, what they stand for, with white space made visible."""
    if run.task.text is None:
        return tokens.astype(str).tolist()
    name = run.task.text.vocabulary.name
    return [[visible(name(token)) for token in row] for row in tokens.tolist()]


def _guess(run, batch):
    """The accuracy of the task's baseline, one in exp(loss)."""
    return float(np.exp(-np.asarray(run.task.baseline[1](batch))))


def _tokens(batch: Batch, logits):
    if batch.positions is not None:
        logits = jnp.take_along_axis(logits, batch.positions[..., None], axis=1)
    logits = logits.astype(jnp.float32)
    wanted = jnp.take_along_axis(logits, batch.targets[..., None], axis=-1)[..., 0]
    losses = jax.nn.logsumexp(logits, axis=-1) - wanted
    # As in training: right is what is alone at the top.
    return losses, (logits >= wanted[..., None]).sum(-1) == 1, batch.weights


def _vectors(batch: Batch, outputs):
    losses = jnp.square(outputs.astype(jnp.float32) - batch.targets).mean(-1)
    return losses, None, batch.weights


def of_directory(
    place: Path, *, tokens: Sequence[int] | None = None, text: bytes | None = None
) -> Subject:
    """A model of Hugging Face on one row, which it continues at every token.

    Args:
        place: The directory.
        tokens, text: One of them: the row.

    Raises:
        ValueError: The row is too short or too long, or the vocabulary lacks a token; and the
            errors of `huggingface.load` and `huggingface.tokenizer`.
    """
    coder = None
    if text is not None or (place / "tokenizer.json").is_file():
        try:
            coder = huggingface.tokenizer(place)
        except ModuleNotFoundError:
            if text is not None:
                raise
    model, params = huggingface.load(place)
    if text is not None:
        text = as_text(text, "--text")
        check_read("--text", unread(coder, text))
        tokens = coder.encode(text).ids
    batch = _continued("--tokens" if text is None else "--text", tokens, model)
    T = batch.inputs.shape[1]
    limit = getattr(model.positions, "max_length", None)
    name_of = str if coder is None else lambda token: visible(name_of_token(coder, token))
    return Subject(
        name=place.resolve().name,
        about=f"a text of {T} tokens",
        model=model,
        params=params,
        inputs=batch.inputs,
        options={},
        vocab_size=model.embedding.num_embeddings,
        words=[[name_of(token) for token in tokens]],
        queries=np.arange(T)[None] < T - 1,
        counted=None,
        answers=functools.partial(_tokens, batch),
        guess=None,
        steps=[],
        restore=None,
        length=min(limit or MAX_LENGTH, MAX_LENGTH),
    )
