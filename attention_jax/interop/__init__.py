"""Bridges to other libraries: their call signatures and their weights."""

from attention_jax.interop import flax, jax_nn, torch

__all__ = ["flax", "jax_nn", "torch"]
