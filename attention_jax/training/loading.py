"""A trained run as values: its model, parameters, config and task."""

import functools
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from attention_jax.checks import as_array, as_integers, as_size
from attention_jax.interop import huggingface
from attention_jax.models import SequenceModel
from attention_jax.tasks import Task
from attention_jax.tasks.vocabulary import Characters, Text, Tokenizer, Vocabulary
from attention_jax.training.build import make_task
from attention_jax.training.checkpoint import restore_params
from attention_jax.training.config import ConfigError, check, default_config, flatten, set_field
from attention_jax.training.files import (
    CONFIG,
    GENERATION,
    MODEL,
    OF_TOKENIZER,
    TOKENIZER,
    VOCABULARY,
    is_hugging_face,
    is_weights,
    local_path,
    locate,
    read_config,
    read_json,
    trial_directory,
)
from attention_jax.training.model import description, make_model, row_mask
from attention_jax.training.rules import fault, label, shown
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

    def __repr__(self) -> str:
        count = sum(x.size for x in jax.tree.leaves(self.params))
        return f"Run of {self.task.name}: {self.config.model.name}, {count:,} parameters"

    def encode(self, text: str) -> np.ndarray:
        """The tokens of a text, `[T]` int32, of a run of text.

        Raises:
            ValueError: The run is of no text, or its text has not all of these characters.
        """
        return self._vocabulary.encode(text)

    def decode(self, tokens: Array) -> str:
        """The text of tokens `[T]`, of a run of text.

        Raises:
            ValueError: The run is of no text, or these are no tokens of it.
            TypeError: The tokens are not integers.
        """
        vocabulary, tokens = self._vocabulary, np.asarray(as_integers("tokens", tokens, axes=1))
        if tokens.ndim != 1:
            raise ValueError(f"tokens must be one row, [T], got shape {tokens.shape}.")
        size = max(vocabulary.size, self.model.embedding.num_embeddings)
        if tokens.size and not 0 <= tokens.min() <= tokens.max() < size:
            raise ValueError(
                f"tokens must be from 0 to {size - 1}, got "
                f"{tokens[(tokens < 0) | (tokens >= size)][0]}."
            )
        return vocabulary.decode(tokens.tolist())

    @property
    def _vocabulary(self) -> Vocabulary:
        if self.task.text is None:
            raise ValueError(f"the tokens of the task {self.task.name} are of no text.")
        return self.task.text.vocabulary

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
        if isinstance(inputs, str):
            raise TypeError(f"inputs must be tokens: write run.encode({shown(inputs)}).")
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
    directory = local_path(run, "run")
    if directory.is_file():
        raise ValueError(f"run must be the directory of a run: {directory} is a file.")
    place, trial = locate(directory)
    where = place if trial is None else trial_directory(place, trial)
    config = _config(read_config(where), where)
    task = make_task(config, kept_text(where))
    _check_files(task, where)
    model = make_model(config, task, (kept_model(where) or {}).get(CONFIG))
    T = config.task.seq_length
    inputs = jax.ShapeDtypeStruct((1, T), jnp.int32)
    if task.vocab_size is None:
        inputs = jax.ShapeDtypeStruct((1, T, task.inputs), jnp.float32)
    like = jax.eval_shape(model.init, jax.random.key(0), inputs)["params"]
    return Run(model, restore_params(run, like, step), config, task)


def _check_files(task: Task, where: Path) -> None:
    """Raises ValueError if a file of the task is another than that of the run.

    The vocabulary that a run has kept is its own. Without it the file makes one.
    """
    settings = (read_json(where / "config.json") or {}).get("settings") or {}
    for name, value in ({} if task.text is None else task.text.settings()).items():
        if settings.get(name, value) != value:
            raise ValueError(
                f"{where}: {name} is {settings[name]} there and {value} here, and {VOCABULARY} is "
                "missing."
            )


def kept_text(run: Path) -> Text | None:
    """What a run of text has kept of its text; None for another run, or none.

    Raises:
        ValueError: The file is damaged.
    """
    place, trial = locate(run)
    found = read_json((place if trial is None else trial_directory(place, trial)) / VOCABULARY)
    return None if found is None else Text.from_dict(found)


def files_to_keep(config: ConfigDict, task: Task) -> dict[str, Any] | None:
    """What a run keeps of the directory of Hugging Face that its config names; None for words.

    It keeps objects of JSON, by the names of their files. If the task has a text in other tokens
    than those of the directory, its special tokens, as the one that ends a text, mean nothing here
    and are left out.

    Raises:
        ValueError: A file is broken.
    """
    described = description(config)
    if described is None:
        return None
    place = local_path(config.model.name, label("model.name"))
    names = [GENERATION]
    if task.text is not None:
        if not _is_of(task.text.vocabulary, place / TOKENIZER):
            return {CONFIG: described | dict.fromkeys(huggingface.SPECIAL_TOKENS)}
        names += OF_TOKENIZER
    names = [name for name in names if (place / name).is_file()]
    return {CONFIG: described} | {name: huggingface.read_config(place, name) for name in names}


def kept_model(run: Path) -> dict[str, Any] | None:
    """What a run has kept by `files_to_keep`; None for a model of words.

    Raises:
        ValueError: The file is damaged.
    """
    place, trial = locate(run)
    where = place if trial is None else trial_directory(place, trial)
    found = read_json(where / MODEL)
    if found is not None and not all(isinstance(found.get(x, {}), dict) for x in (CONFIG, *found)):
        raise ValueError(f"{where / MODEL} is damaged.")
    return found


def _is_of(vocabulary: Vocabulary, file: Path) -> bool:
    """Whether a vocabulary is that of a `tokenizer.json`."""
    if not isinstance(vocabulary, Tokenizer) or not file.is_file():
        return False
    return vocabulary.definition == file.read_text(encoding="utf-8-sig")


def check_vocabulary(init_from: str, task: Task) -> None:
    """Raises ConfigError if the tokens of `--init_from` are of other text than those of the task.

    A file of weights says nothing of its tokens.
    """
    path = local_path(init_from, "it")
    if task.text is None or is_weights(path):
        return
    if is_hugging_face(path):
        return _check_tokenizer(init_from, path / TOKENIZER, task.text)
    theirs = kept_text(path)
    if theirs is not None and theirs.vocabulary.to_dict() != task.text.vocabulary.to_dict():
        raise ConfigError(
            f"--init_from={init_from}: its tokens stand for other characters than those of "
            f"{task.text.name}. With --config.task.tokens=bytes they are the same for all texts."
        )


def _check_tokenizer(init_from: str, file: Path, text: Text) -> None:
    """As `check_vocabulary`, for the file of a directory of Hugging Face.

    Without that file bytes or another one may be right, but not the characters of a new text.
    """
    if not file.is_file():
        if isinstance(text.vocabulary, Characters):
            raise ConfigError(
                f"--init_from={init_from}: {file.name} is missing there, so its tokens do not "
                f"stand for the characters of {text.name}. save_pretrained of the tokenizer of "
                "transformers writes it; or name such a file: --config.task.tokens=FILE."
            )
        return
    if not _is_of(text.vocabulary, file):
        raise ConfigError(
            f"--init_from={init_from}: its tokens stand for other characters than those of "
            f"{text.name}. Those of its own are --config.task.tokens={file}."
        )


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
