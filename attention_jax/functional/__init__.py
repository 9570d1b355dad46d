"""Attention as pure functions over arrays; needs jax alone."""
