"""Tasks: sources of batches without state."""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import numpy as np

from attention_jax.checks import as_rng, jax_defaults
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
