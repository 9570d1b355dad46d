"""A trained run as values: its model, parameters, config and task."""

import functools
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from attention_jax.checks import as_array, as_integers, as_size
from attention_jax.models import SequenceModel
from attention_jax.tasks import Task
from attention_jax.training.build import make_task
from attention_jax.training.checkpoint import restore_params
from attention_jax.training.config import check, default_config, flatten, set_field
from attention_jax.training.files import local_path, locate, read_config, trial_directory
from attention_jax.training.model import make_model, row_mask
from attention_jax.training.rules import fault, shown
from attention_jax.types import Array, PyTree


class Run(NamedTuple):
    """What training has left.

    Attributes:
        model: The model; `model.apply({"params": params}, inputs)` runs it, without dropout.
        params: Its newest parameters, or those of the step that was asked for.
        config: The complete config.
        task: The task that it has learnt.
    """

    model: SequenceModel
    params: PyTree
    config: ConfigDict
    task: Task

    def predict(self, inputs: Array) -> Array:
        """The model's outputs for a batch or for one row.

        Args:
            inputs: Tokens, integers `[..., T]`, or vectors `[..., T, D]`, as the task has them:
                arrays, or lists of numbers.

        Returns:
            Logits `[..., T, vocab_size]`, or vectors `[..., T, out_features]`.

        Raises:
            ValueError: A token is not in the vocabulary, or the shape is not one of the task's.
            TypeError: The tokens are not integers.
        """
        if self.task.vocab_size is None:
            inputs = jnp.asarray(as_array("inputs", inputs), jnp.float32)
        else:
            inputs = as_integers("inputs", inputs, axes=1)
            if inputs.size and not 0 <= inputs.min() <= inputs.max() < self.task.vocab_size:
                raise ValueError(
                    f"inputs must be tokens below {self.task.vocab_size}, got "
                    f"{inputs.min()} to {inputs.max()}."
                )
        mask = row_mask(self.task)
        T = inputs.shape[-1 if self.task.vocab_size else -2]
        if mask is not None and mask.size()[-1] != T:
            raise ValueError(
                f"inputs must have the {mask.size()[-1]} positions of the task {self.task.name}, "
                f"which has a mask of its own; got shape {inputs.shape}."
            )
        return _apply(self.model, self.params, inputs, mask)


@functools.partial(jax.jit, static_argnums=0)
def _apply(model, params, inputs, mask):
    return model.apply({"params": params}, inputs, mask=mask)


def load(run: str | os.PathLike, *, step: int | None = None) -> Run:
    """Loads a trained run.

    Args:
        run: The directory of a run; of a sweep, which means its best trial; or of one trial, as
            `sweep/trials/001`.
        step: That of the checkpoint: one of `training.checkpoint.checkpoint_steps(run)`. A run
            keeps the newest `checkpoint.keep`. None takes the newest that is whole.

    Raises:
        FileNotFoundError: There is no checkpoint, or none of this step.
        ValueError: There is no run, its config is not one of this version, or the sweep has no best
            trial.
    """
    step = None if step is None else as_size("step", step, 0)
    place, trial = locate(local_path(run, "run"))
    where = place if trial is None else trial_directory(place, trial)
    config = _config(read_config(where), where)
    task = make_task(config)
    model = make_model(config, task)
    sample = lambda: task.sample(jax.random.key(0), jnp.arange(1)).inputs
    like = jax.eval_shape(model.init, jax.random.key(0), jax.eval_shape(sample))["params"]
    return Run(model, restore_params(run, like, step), config, task)


def _config(found: Mapping[str, Any], where: Path) -> ConfigDict:
    """The config of a run, checked."""
    fields = flatten(found)
    config = default_config(fields.get("task.name", ""))
    known = flatten(config)
    for path, value in fields.items():
        if path not in known:
            raise ValueError(f"{where}: its config.{path}={shown(value)} is unknown here.")
        if words := fault(path, value, known[path]):
            raise ValueError(f"{where}: its config.{path} {words}: got {shown(value)}.")
        set_field(config, path, value)
    check(config)
    return config
