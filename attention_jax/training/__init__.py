"""Training: pure steps, the launchers that run them on devices, and checkpoints.

Import the module you need; `attention_jax.training` itself imports no modules, so that reading
flags does not wait for jax.
"""

import importlib


def __getattr__(name: str):
    if name == "sweep":  # It stood here before there was a laboratory.
        return importlib.import_module("attention_jax.laboratory.sweep")
    raise AttributeError(f"module 'attention_jax.training' has no attribute {name!r}")
