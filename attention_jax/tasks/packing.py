"""Packing: several documents in one row, each as it is alone."""

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from attention_jax.checks import as_rng, jax_defaults
from attention_jax.tasks.task import Task
from attention_jax.types import Array, Batch


def packed(tasks: Sequence[Task]) -> Task:
    """Rows of several tasks side by side, as documents of one row.

    Tokens see those of their own document alone, and count positions from its start:

        inputs     7 3 _ _ 5 8 2 _ _ _
        targets        7 3       5 8 2
        documents  0 0 0 0 1 1 1 1 1 1

    Args:
        tasks: Of one loss and one vocabulary (or width); usually one task at several lengths.

    Returns:
        A task whose row r holds a row of each task, drawn with a key of its own. Baseline: that of
        the first, as the mean over the labels of all.

    Raises:
        ValueError: There are no tasks, or they need different models.
    """
    tasks = tuple(tasks)
    if len({(task.loss, task.vocab_size, task.inputs) for task in tasks}) != 1:
        kinds = [f"{task.name} ({task.vocab_size or task.inputs})" for task in tasks]
        raise ValueError(f"packed tasks must share loss and vocabulary, got {', '.join(kinds)}.")
    shapes = [jax.eval_shape(task.sample, jax.random.key(0), np.arange(1)) for task in tasks]
    lengths = [shape.inputs.shape[1] for shape in shapes]
    labels = [shape.weights.shape[1] for shape in shapes]
    starts = np.cumsum([0, *lengths[:-1]])

    def sampler(held_out: bool):
        @jax_defaults()
        def sample(rng: Array, rows: Array) -> Batch:
            rng, parts = as_rng("rng", rng), []
            for i, task in enumerate(tasks):
                draw = (held_out and task.sample_held_out) or task.sample
                # From the end: the first numbers are those of rows.
                batch = draw(jax.random.fold_in(rng, 2**32 - 1 - i), rows)
                places = batch.positions
                if places is None:
                    places = jnp.arange(lengths[i], dtype=jnp.int32)
                places = jnp.broadcast_to(starts[i] + places, batch.weights.shape)
                parts.append(batch._replace(positions=places.astype(jnp.int32)))
            return jax.tree.map(lambda *x: jnp.concatenate(x, axis=1), *parts)

        return sample

    def baseline(batch: Batch) -> Array:
        total = weight = 0.0
        label = 0
        for i, task in enumerate(tasks):
            tokens = np.s_[:, starts[i] : starts[i] + lengths[i]]
            own = np.s_[:, label : label + labels[i]]
            places = None if shapes[i].positions is None else batch.positions[own] - starts[i]
            part = Batch(batch.inputs[tokens], batch.targets[own], batch.weights[own], places)
            total += task.baseline[1](part) * part.weights.sum()
            weight += part.weights.sum()
            label += labels[i]
        return total / jnp.maximum(weight, 1)

    mask = None
    if any(task.mask is not None for task in tasks):
        mask = np.zeros((sum(lengths), sum(lengths)), bool)
        for start, length, task in zip(starts, lengths, tasks, strict=True):
            block = mask[start : start + length, start : start + length]
            block[:] = True if task.mask is None else task.mask
    counts = [task.num_rows for task in tasks]
    first = tasks[0]
    return first._replace(
        sample=sampler(held_out=False),
        sample_held_out=sampler(held_out=True) if any(t.sample_held_out for t in tasks) else None,
        baseline=(first.baseline[0], baseline),
        mask=mask,
        documents=np.repeat(np.arange(len(tasks)), lengths),
        num_rows=None if None in counts else math.prod(counts),
    )
