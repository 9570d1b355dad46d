"""Bridges to other libraries: their call signatures, their weights and their models."""

import importlib

__all__ = ["flax", "huggingface", "jax_nn", "torch", "weights"]


def __getattr__(name: str):
    if name not in __all__:
        raise AttributeError(f"module 'attention_jax.interop' has no attribute {name!r}")
    return importlib.import_module(f"attention_jax.interop.{name}")


def __dir__():
    return __all__
