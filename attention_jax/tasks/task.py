"""Tasks: sources of batches without state."""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import numpy as np

from attention_jax.checks import as_rng, jax_defaults
from attention_jax.tasks.vocabulary import Text
from attention_jax.types import Array, Batch, PyTree


class Task(NamedTuple):
    """A task to learn, whose batches are generated on the device.

    Attributes:
        name: Its name in `TASKS`.
        sample: `(rng, rows [B] int32) -> Batch`. Row r of the batch is a function of `(rng, r)`
            alone, so the rows may be split over devices in any way. `rng` is a key of any kind.
        loss: `"squared_error"` (continuous targets) or `"cross_entropy"` (tokens).
        inputs: Width D of continuous inputs. None: the inputs are tokens.
        vocab_size: Number of tokens. None: the inputs are continuous.
        baseline: The loss of a guess without attention: its name, and a function from a batch to
            the mean loss, a scalar. A model that has learnt is below it.
        mask: Boolean `[T, T]`: which positions may attend to which, in addition to the model's
            masks. None for no mask.
        sample_held_out: As `sample`, for rows that `sample` never draws. None evaluates on rows of
            `sample`, drawn with a key that training does not use.
        held_out: Describes the held-out rows in words.
        num_rows: How many different rows `sample` can draw. None if they are infinitely many or not
            counted.
        documents: `[T]` integers: to which document of the row each position belongs. Documents do
            not see one another. None: the row is one.
        text: How text becomes its tokens. None: its tokens are of no text.
    """

    name: str
    sample: Callable[[Array, Array], Batch]
    loss: str
    inputs: int | None
    vocab_size: int | None
    baseline: tuple[str, Callable[[Batch], Array]]
    mask: np.ndarray | None = None
    sample_held_out: Callable[[Array, Array], Batch] | None = None
    held_out: str = "fresh rows of the same distribution"
    num_rows: int | None = None
    documents: np.ndarray | None = None
    text: Text | None = None


def check_task(name: str, task: Task, seq_length: int) -> None:
    """Raises unless a task, and the shapes and types of its batches, are what `Task` says.

    Args:
        name: What the user calls it, for the error.
        task: What a builder has returned.
        seq_length: The length T that was asked for.

    Raises:
        TypeError: It is no `Task`, or a batch no `Batch`.
        ValueError: A field, a shape or a type is another one.
    """
    if not isinstance(task, Task):
        raise TypeError(f"{name} must return a Task, got a {type(task).__name__}.")
    if task.loss not in ("squared_error", "cross_entropy"):
        raise ValueError(f"{name}: loss must be squared_error or cross_entropy, got {task.loss!r}.")
    tokens = task.loss == "cross_entropy"
    size, other = ("vocab_size", "inputs") if tokens else ("inputs", "vocab_size")
    if not isinstance(getattr(task, size), int) or getattr(task, other) is not None:
        raise ValueError(
            f"{name}: a task of {task.loss} has an integer {size} and no {other}, got "
            f"{size}={getattr(task, size)!r} and {other}={getattr(task, other)!r}."
        )
    if task.mask is not None and np.shape(task.mask) != (seq_length, seq_length):
        raise ValueError(
            f"{name}: mask must be [T, T], T={seq_length}, got shape {np.shape(task.mask)}."
        )
    if task.documents is not None and np.shape(task.documents) != (seq_length,):
        raise ValueError(
            f"{name}: documents must be [T], T={seq_length}, got shape {np.shape(task.documents)}."
        )
    B, T = 2, seq_length
    rng, rows = jax.random.key(0), jax.ShapeDtypeStruct((B,), np.int32)
    for sampler in filter(None, (task.sample, task.sample_held_out)):
        batch = jax.eval_shape(sampler, rng, rows)
        if not isinstance(batch, Batch):
            raise TypeError(f"{name}: sample must return a Batch, got a {type(batch).__name__}.")
        places = (B, T) if batch.positions is None else (B, *batch.positions.shape[1:])
        vector = () if tokens else (task.inputs,)
        kind = np.integer if tokens else np.floating
        for field, shape, wanted in (
            ("inputs", (B, T, *vector), kind),
            ("targets", (*places, *vector), kind),
            ("weights", places, np.floating),
            ("positions", places, np.integer),
        ):
            found = getattr(batch, field)
            if found is None and field == "positions":
                continue
            came = "None" if found is None else f"{found.dtype} {found.shape}"
            fits = found is not None and jax.numpy.issubdtype(found.dtype, wanted)
            if not fits or found.shape != shape:
                raise ValueError(
                    f"{name}: {field} of {B} rows must be {wanted.__name__} {shape}, got {came}."
                )
    if (shape := jax.eval_shape(task.baseline[1], batch).shape) != ():
        raise ValueError(f"{name}: the baseline must be a scalar, got shape {shape}.")


def check_rows(name: str, task: Task) -> None:
    """Draws a few rows; raises ValueError unless each is a function of `(rng, row)` alone.

    Also if a token or a label is not in the vocabulary. The arguments are those of `check_task`.
    """
    rows = np.arange(4, dtype=np.int32)
    for sampler in filter(None, (task.sample, task.sample_held_out)):
        sampler = jax.jit(sampler)
        batch = jax.tree.map(np.asarray, sampler(jax.random.key(0), rows))
        again = sampler(jax.random.key(0), rows[::-1])
        for field, found, other in zip(Batch._fields, batch, again, strict=True):
            if found is not None and not np.allclose(found, np.asarray(other)[::-1]):
                raise ValueError(
                    f"{name}: row r must be a function of (rng, r) alone, but the {field} of a row "
                    "change with its place in the batch: see per_row."
                )
        if task.vocab_size is None:
            continue
        for field, tokens in (("inputs", batch.inputs), ("targets", batch.targets)):
            if not 0 <= tokens.min() <= tokens.max() < task.vocab_size:
                raise ValueError(
                    f"{name}: {field} must be tokens below {task.vocab_size}, got "
                    f"{tokens.min()} to {tokens.max()}."
                )


def about_held_out(task: Task, num_drawn: int) -> str:
    """Describes the held-out rows, for the reader of an accuracy.

    If training may have drawn a percent of them or more, the text gives the numbers.

    Args:
        task: The learnt task.
        num_drawn: How many rows training has drawn.

    >>> from attention_jax.tasks import TASKS
    >>> about_held_out(TASKS["parity"](seq_length=9), 32_000)
    'fresh rows of the same distribution; 256 possible rows, 32,000 drawn in training'
    """
    is_held_out = task.sample_held_out is not None
    if is_held_out or task.num_rows is None or task.num_rows > 100 * num_drawn:
        return task.held_out
    return f"{task.held_out}; {task.num_rows:,} possible rows, {num_drawn:,} drawn in training"


def per_row(make_row: Callable[[Array], PyTree]) -> Callable[[Array, Array], PyTree]:
    """Turns a generator of one row into a generator of any rows.

    Args:
        make_row: `rng -> ` arrays without the axis B.

    Returns:
        `(rng, rows [B]) -> ` the arrays with axis B; row r comes from `fold_in(rng, r)`.
    """

    @jax_defaults()
    def sample(rng: Array, rows: Array) -> PyTree:
        rng = as_rng("rng", rng)
        return jax.vmap(lambda row: make_row(jax.random.fold_in(rng, row)))(rows)

    return sample


def token_task(
    name: str,
    make_row: Callable[[Array], Batch],
    *,
    vocab_size: int,
    guess: tuple[str, int],
    num_rows: int | None = None,
    mask: np.ndarray | None = None,
    held_out: str = Task._field_defaults["held_out"],
) -> Task:
    """A task of tokens, row by row.

    Args:
        name, vocab_size, num_rows, mask, held_out: As in `Task`.
        make_row: `rng -> ` one row, a batch without the axis B.
        guess: The baseline: its name, and the number of equally likely answers.
    """
    words, choices = guess
    loss = np.float32(math.log(choices))
    return Task(
        name=name,
        sample=per_row(make_row),
        loss="cross_entropy",
        inputs=None,
        vocab_size=vocab_size,
        baseline=(words, lambda batch: loss),
        mask=mask,
        held_out=held_out,
        num_rows=num_rows,
    )
