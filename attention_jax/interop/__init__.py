"""Bridges to other libraries: their call signatures and their weights."""

from attention_jax.interop import flax, weights

__all__ = ["flax", "weights"]
