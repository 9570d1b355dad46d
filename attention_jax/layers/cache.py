"""The keys and values that decoding layers keep."""

import jax
import jax.numpy as jnp
from flax import linen as nn

from attention_jax.checks import (
    as_integers,
)
from attention_jax.functional import biases, masks
from attention_jax.functional.mesh import in_auto, partition_of
from attention_jax.types import Array


class Cache:
    """The keys and values of a sequence so far, as variables of the layer that owns them.

    `cached_key` and `cached_value` are `[..., capacity, K, H]`, `cache_index` is `[...]` int32: how
    many tokens each row holds.
    """

    def __init__(self, layer: nn.Module, key: Array, value: Array):
        self.ready = layer.has_variable("cache", "cached_key")
        if not (self.ready or layer.is_initializing()):
            raise ValueError('decode=True needs the collection "cache" that init makes, got none.')
        # Split like the keys: on a mesh each device holds the cache of its own rows and heads.
        self.key = layer.variable("cache", "cached_key", jnp.zeros_like, key)
        self.value = layer.variable("cache", "cached_value", jnp.zeros_like, value)
        self.index = layer.variable(
            "cache", "cache_index", lambda: jnp.zeros_like(key[..., 0, 0, 0], jnp.int32)
        )
        if self.ready and self.key.value.shape[:-3] != key.shape[:-3]:
            raise ValueError(
                f"inputs_q must have the cache's batch axes {self.key.value.shape[:-3]}, got "
                f"{key.shape[:-3]}."
            )
        self.num_new = key.shape[-3]

    def positions(self) -> Array:
        """The positions of the new tokens in the sequence, `[..., T]`."""
        return self.index.value[..., None] + jnp.arange(self.num_new)

    def rules(self, mask, bias):
        """The masks and biases of the new tokens, which come after those in the cache."""
        index = self.index.value
        causal = masks.shifted(masks.causal(), index)
        mask = causal if mask is None else causal & masks.shifted(masks.as_mask(mask), index)
        return mask, None if bias is None else biases.shifted(biases.as_bias(bias), index)

    def append(self, key: Array, value: Array, lengths: Array | None):
        """Writes the new tokens; returns all keys and values, and which rows had no room."""
        if not self.ready:  # In `init`, where the full-length input only sets the capacity.
            return key, value, None
        *batch, capacity, _, _ = self.key.value.shape
        index = self.index.value
        if lengths is None:
            advance = jnp.full(batch, self.num_new, jnp.int32)
        else:
            advance = jnp.broadcast_to(as_integers("lengths", lengths), batch).astype(jnp.int32)
            wrong = (advance < 0) | (advance > self.num_new)
            if not isinstance(wrong, jax.core.Tracer) and wrong.any():
                raise ValueError(
                    f"lengths must lie in [0, T] with T={self.num_new}, got {advance.tolist()}."
                )
        new = jnp.arange(self.num_new) < advance[..., None]  # [..., T]
        overflow = index + advance > capacity
        if lengths is not None:
            overflow |= wrong
        if not isinstance(overflow, jax.core.Tracer) and overflow.any():
            raise ValueError(
                f"the cache holds {capacity} tokens and is too full: rows hold up to "
                f"{int(index.max())}, and {self.num_new} more came."
            )
        # A write beyond the end is dropped, so the cache is never overwritten.
        places = jnp.where(new & ~overflow[..., None], self.positions(), capacity)
        self.key.value = put(self.key.value, places, key)
        self.value.value = put(self.value.value, places, value)
        self.index.value = jnp.where(overflow, index, index + advance)
        return self.key.value, self.value.value, overflow


def put(cached: Array, places: Array, new: Array) -> Array:
    """`cached[..., places] = new`, but beyond its end: `[..., capacity, ...]`, `[..., T, ...]`."""
    write = lambda row, place, x: row.at[place].set(x.astype(row.dtype), mode="drop")
    for _ in range(places.ndim - 1):
        write = jax.vmap(write)
    return in_auto(write, (cached, places, new), partition_of(cached, *range(cached.ndim)))
