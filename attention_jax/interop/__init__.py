"""Bridges to other libraries: their call signatures and their weights."""

from attention_jax.interop import flax

__all__ = ["flax"]
