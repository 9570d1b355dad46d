"""What stands beside attention in a model."""

import functools

import jax.numpy as jnp
from flax import linen as nn

from attention_jax.checks import (
    jax_defaults,
)
from attention_jax.functional.mesh import in_auto, partition_of
from attention_jax.types import Array


class Embed(nn.Embed):
    """`flax.linen.Embed` for tokens that may be split over Explicit axes of a mesh."""

    @jax_defaults()
    def __call__(self, tokens: Array) -> Array:
        """`[...] -> [..., features]`; a token without a row in the table becomes NaN."""
        (table,) = self.promote_dtype(self.embedding, dtype=self.dtype, inexact=False)
        take = functools.partial(jnp.take, axis=0)
        rows = partition_of(tokens, *range(tokens.ndim), None)
        return in_auto(take, (table, tokens), rows)
