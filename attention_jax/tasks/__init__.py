"""Synthetic tasks whose batches are made on the device, under jit, from `(rng, rows)` alone."""

from collections.abc import Callable

from attention_jax.tasks import copy, recall, teacher
from attention_jax.tasks.task import Task

TASKS: dict[str, Callable[..., Task]] = {
    "teacher": teacher.teacher,
    "recall": recall.recall,
    "copy": copy.copy,
}

__all__ = ["TASKS", "Task"]
