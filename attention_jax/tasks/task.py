"""What a task is: a source of batches with no state."""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import numpy as np

from attention_jax.checks import as_rng, jax_defaults
from attention_jax.types import Array, Batch, PyTree


class Task(NamedTuple):
    """Something to learn, generated where it is used.

    Attributes:
        name: Its name in `TASKS`.
        sample: `(rng, rows [B] int32) -> Batch`. Row r of the batch is a function of `(rng, r)`
            alone, so the rows may be split over devices in any way. `rng` is a key of any kind.
        loss: `"squared_error"` (continuous targets) or `"cross_entropy"` (tokens).
        inputs: Width D of continuous inputs. None: the inputs are tokens.
        vocab_size: Number of tokens. None: the inputs are continuous.
        baseline: What a model without attention could claim: its name, and a function from a batch
            to its mean loss there, a scalar. A model that has learnt anything stays below.
        mask: Boolean `[T, T]`: which positions may attend to which, beside what the model says.
            None: the task does not mind.
    """

    name: str
    sample: Callable[[Array, Array], Batch]
    loss: str
    inputs: int | None
    vocab_size: int | None
    baseline: tuple[str, Callable[[Batch], Array]]
    mask: np.ndarray | None = None


def per_row(make_row: Callable[[Array], PyTree]) -> Callable[[Array, Array], PyTree]:
    """Turns a generator of one row into a generator of any rows.

    Args:
        make_row: `rng -> ` arrays without the axis B.

    Returns:
        `(rng, rows [B]) -> ` the arrays with it, whose row r comes from `fold_in(rng, r)`.
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
    mask: np.ndarray | None = None,
) -> Task:
    """A task of tokens, row by row.

    Args:
        name, vocab_size, mask: As in `Task`.
        make_row: `rng -> ` one row, a batch without the axis B.
        guess: The baseline: what one could guess among, and how many equally likely ones they are.
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
    )
