"""Tasks whose batches are made on the device, under jit, from `(rng, rows)` alone."""

from collections.abc import Callable

from attention_jax.tasks import (
    circuits,
    compression,
    copy,
    in_context_recall,
    induction,
    listops,
    memorization,
    recall,
    teacher,
    text,
)
from attention_jax.tasks.packing import packed
from attention_jax.tasks.task import Task

TASKS: dict[str, Callable[..., Task]] = {
    "teacher": teacher.teacher,
    "recall": recall.recall,
    "compositional_recall": recall.compositional_recall,
    "forgetting_recall": recall.forgetting_recall,
    "in_context_recall": in_context_recall.in_context_recall,
    "noisy_recall": in_context_recall.noisy_recall,
    "fuzzy_recall": in_context_recall.fuzzy_recall,
    "induction": induction.induction,
    "memorization": memorization.memorization,
    "copy": copy.copy,
    "reverse": copy.reverse,
    "sort": copy.sort,
    "selective_copy": copy.selective_copy,
    "compression": compression.compression,
    "parity": circuits.parity,
    "majority": circuits.majority,
    "listops": listops.listops,
    "text": text.text,
}

__all__ = ["TASKS", "Task", "packed"]
