"""Training: pure steps, the launchers that run them on devices, and checkpoints.

Each module is imported at its first use, so that reading flags does not wait for jax.
"""

import importlib
import importlib.util


def __getattr__(name: str):
    if name == "sweep":  # It stood here before there was a laboratory.
        return importlib.import_module("attention_jax.laboratory.sweep")
    path = f"attention_jax.training.{name}"
    if name.startswith("_") or importlib.util.find_spec(path) is None:
        raise AttributeError(f"module 'attention_jax.training' has no attribute {name!r}")
    return importlib.import_module(path)
