"""Estimates the least memory of a run, to refuse it at the start if it cannot fit."""

import math
import os

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from attention_jax.interop import huggingface
from attention_jax.training.model import description


def check_memory(config: ConfigDict, num_trials: int = 1) -> None:
    """Raises ValueError, with the sizes, if a config needs more memory than there is.

    It counts the arrays that a run cannot do without. A run that passes may still run out.

    Args:
        config: Checked.
        num_trials: Trials of a sweep that are held at once.
    """
    needed, there = least_bytes(config, num_trials), available_bytes()
    if there is not None and sum(needed.values()) > there:
        parts = ", ".join(f"{name} {_shown(size)}" for name, size in needed.items())
        raise ValueError(
            f"config.model and config.train need more memory than there is ({_shown(there)}). "
            f"At the least: {parts}."
        )


def least_bytes(config: ConfigDict, num_trials: int = 1) -> dict[str, int]:
    """The bytes that a run needs for certain, by their use.

    >>> from attention_jax.training.config import default_config
    >>> least_bytes(default_config())["parameters, gradients and the optimizer's state"]
    262144
    """
    train, optimizer = config.train, config.optimizer
    num_params, width = _size_of_model(config)
    # Each parameter, its gradient, and the optimizer's numbers for it.
    copies = 4 if optimizer.name != "sgd" else 3 if optimizer.momentum else 2
    vectors = train.batch_size * config.task.seq_length
    needed = {
        "parameters, gradients and the optimizer's state": 4 * copies * num_params * num_trials,
        "a batch": vectors // optimizer.accumulate // jax.device_count() * width * 2,
    }
    if config.task.name == "teacher":  # Its baseline needs the targets of all batches at once.
        needed["the held-out batches"] = config.eval.num_batches * vectors * width * 4
    return needed


def _size_of_model(config):
    """How many parameters the model has at the least, and its width."""
    model = config.model
    if (described := description(config)) is not None:
        found = huggingface.model_of(described, model.name)
        tokens = jax.ShapeDtypeStruct((1, 1), jnp.int32)
        leaves = jax.tree.leaves(jax.eval_shape(found.init, jax.random.key(0), tokens))
        return sum(math.prod(x.shape) for x in leaves), found.embedding.features
    width, is_multihead = model.features, model.name == "multihead"
    heads = model.num_heads if is_multihead else 1
    kv_heads = (model.num_kv_heads or heads) if is_multihead else 1
    head_dim = model.head_dim or width // heads
    layer = width * head_dim * (heads + 2 * kv_heads + heads * is_multihead)  # The projections.
    layer += 2 * width * int(model.mlp_ratio * width)
    vocabulary = config.task.get("vocab_size", 0)
    positions = config.task.seq_length if model.positions == "learned" else 0
    return model.num_layers * layer + (vocabulary + positions) * width, width


def available_bytes() -> int | None:
    """The memory of a device, or of the machine if devices share it; None if it is not known."""
    stats = jax.local_devices()[0].memory_stats() or {}
    try:
        return stats.get("bytes_limit") or os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):  # Of `sysconf`, which Windows does not have.
        return None


def _shown(size):
    for unit in ("bytes", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.4g} {unit}"
        size /= 1000
    return f"{size:,.4g} TB"
