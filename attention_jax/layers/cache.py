"""The keys and values that decoding layers keep."""

import jax
import jax.numpy as jnp
from flax import linen as nn

from attention_jax.checks import as_integers
from attention_jax.functional import biases, masks
from attention_jax.functional.biases import Bias
from attention_jax.functional.masks import Mask
from attention_jax.functional.mesh import in_auto, partition_of
from attention_jax.functional.tiles import FARTHEST
from attention_jax.types import Array


class Cache:
    """The keys and values of a sequence so far, as variables of the layer that owns them.

    `cached_key` and `cached_value` are `[..., capacity, K, H]`, `cache_index` is `[...]` int32: how
    many tokens each row has taken. If the capacity is the layer's `cache_length`, the cache rolls:
    the token at position p lies in slot p % capacity, until a later one takes its place.
    """

    def __init__(self, layer: nn.Module, key: Array, value: Array):
        self.ready = layer.has_variable("cache", "cached_key")
        if not (self.ready or layer.is_initializing()):
            raise ValueError(
                'decode=True needs the collection "cache" that init makes, or for cross-attention '
                "that of a call with inputs_kv, got none."
            )
        self.length = layer.cache_length
        # Split like the keys: on a mesh each device holds the cache of its own rows and heads.
        empty = lambda x: jnp.zeros_like(x if self.length is None else x[..., : self.length, :, :])
        self.key = layer.variable("cache", "cached_key", empty, key)
        self.value = layer.variable("cache", "cached_value", empty, value)
        self.index = layer.variable(
            "cache", "cache_index", lambda: jnp.zeros_like(key[..., 0, 0, 0], jnp.int32)
        )
        if self.ready and self.key.value.shape[:-3] != key.shape[:-3]:
            raise ValueError(
                f"inputs_q must have the cache's batch axes {self.key.value.shape[:-3]}, got "
                f"{key.shape[:-3]}."
            )
        self.num_new = key.shape[-3]
        self.capacity = self.key.value.shape[-3]

    def positions(self) -> Array:
        """The positions of the new tokens in the sequence, `[..., T]`."""
        return self.index.value[..., None] + jnp.arange(self.num_new)

    def extend(self, key, value, mask, bias, lengths):
        """Writes the new tokens.

        Returns:
            The keys and values to attend to, the mask and the bias for them, and which rows had no
            room.
        """
        back = None
        if self.ready and self.length is not None:
            back = check_rolling(mask, bias, self.length)
        if not self.ready:  # In `init`, where the full-length input only sets the capacity.
            return key, value, *self._in_row(mask, bias), None
        if self.length == self.capacity:
            return self._roll(key, value, mask, bias, lengths, back)
        index = self.index.value
        advance, new, wrong = advances(lengths, index.shape, self.num_new)
        overflow = index + advance > self.capacity
        if wrong is not None:
            overflow |= wrong
        if not isinstance(overflow, jax.core.Tracer) and overflow.any():
            raise ValueError(
                f"the cache has room for {self.capacity} tokens: its fullest row holds "
                f"{int(index.max())}, and {self.num_new} more came."
            )
        rules = self._in_row(mask, bias)
        # A write beyond the end is dropped, so the cache is never overwritten.
        self._write(key, value, new & ~overflow[..., None], self.positions())
        self.index.value = jnp.where(overflow, index, index + advance)
        return self.key.value, self.value.value, *rules, overflow

    def _in_row(self, mask, bias):
        """The masks and biases of the new tokens, where all keys lie in their order."""
        index = self.index.value
        causal = masks.shifted(masks.causal(), index)
        mask = causal if mask is None else causal & masks.shifted(masks.as_mask(mask), index)
        return mask, None if bias is None else biases.shifted(biases.as_bias(bias), index)

    def _roll(self, key, value, mask, bias, lengths, back):
        """`extend` for a rolling cache, which always has room."""
        index, queries = self.index.value, self.positions()
        advance, new, wrong = advances(lengths, index.shape, self.num_new)
        if wrong is not None:
            new, advance = new & ~wrong[..., None], jnp.where(wrong, 0, advance)
        old = self.key.value, self.value.value
        stays = jnp.arange(self.num_new) >= advance[..., None] - self.capacity
        self._write(key, value, new & stays, queries % self.capacity)
        self.index.value = index + advance
        if back + self.num_new <= self.capacity:  # No query reads what the new tokens replaced.
            key, value, places = self.key.value, self.value.value, self._slots(index + advance)
        else:
            if lengths is not None:  # Masked values must be finite; what is padded may be NaN.
                key, value = (jnp.where(new[..., None, None], x, 0) for x in (key, value))
            key, value = (joined(x, y, -3) for x, y in zip(old, (key, value), strict=True))
            places = jnp.concatenate([self._slots(index), queries], axis=-1)
        # Shifted by nothing: rules count from the start of the sequence, not from its end.
        mask = masks.causal() & masks.shifted(mask, 0)
        if bias is not None:
            bias = biases.placed(biases.shifted(biases.as_bias(bias), 0), queries, places)
        return key, value, masks.placed(mask, queries, places), bias, wrong

    def _slots(self, count: Array) -> Array:
        """The positions of the tokens in the slots of rows of `count` tokens, `[..., capacity]`.

        A slot without a token gets the farthest position, which is in the future of every query.
        """
        last = count[..., None] - 1
        position = last - (last - jnp.arange(self.capacity)) % self.capacity
        return jnp.where(position < 0, FARTHEST, position)

    def _write(self, key, value, which, places):
        places = jnp.where(which, places, self.capacity)
        self.key.value = put(self.key.value, places, key)
        self.value.value = put(self.value.value, places, value)


class Memory:
    """The keys and values of other inputs, for cross-attention: `cross_key` and `cross_value`.

    A call with `inputs_kv` makes or replaces them, later calls read them. `init` makes none,
    because they depend on the parameters.
    """

    def __init__(self, layer: nn.Module):
        self.layer = layer
        if layer.cache_length is not None:
            raise ValueError(
                f"cache_length={layer.cache_length} is for self-attention, got inputs_kv."
            )

    @staticmethod
    def serves(layer: nn.Module, inputs_kv: Array | None) -> bool:
        """Whether a call is one of cross-attention."""
        if inputs_kv is not None and layer.has_variable("cache", "cached_key"):
            raise ValueError(
                "inputs_kv must be None: the cache is one of self-attention. For cross-attention "
                "call init with inputs_kv too."
            )
        return inputs_kv is not None or layer.has_variable("cache", "cross_key")

    def read(self, inputs_kv: Array | None, project) -> tuple[Array, Array]:
        """Keys and values: `project(inputs_kv)`, or those that are stored."""
        if inputs_kv is None:
            return tuple(self.layer.get_variable("cache", f"cross_{x}") for x in ("key", "value"))
        found = project(inputs_kv)
        if not self.layer.is_initializing():
            if not self.layer.is_mutable_collection("cache"):
                raise ValueError(
                    'decode=True stores what it makes of inputs_kv: give mutable=["cache"].'
                )
            for name, x in zip(("key", "value"), found, strict=True):
                self.layer.put_variable("cache", f"cross_{name}", x)
        return found

    def check(self, mask, bias, lengths, inputs_q) -> None:
        """Raises an error for what would depend on how the queries are divided into calls."""
        if lengths is not None:
            raise ValueError("lengths is for self-attention: in cross-attention queries see all.")
        if self.layer.has_variable("cache", "cross_key"):
            batch = self.layer.get_variable("cache", "cross_key").shape[:-3]
            if batch != inputs_q.shape[:-2]:
                raise ValueError(
                    f"inputs_q must have the cache's batch axes {batch}, got {inputs_q.shape[:-2]}."
                )
        mask = mask if mask is None else masks.as_mask(mask)
        bias = bias if bias is None else biases.as_bias(bias)
        for name, rule, words in (("mask", mask, " or masks.key_lengths"), ("bias", bias, "")):
            if not (rule is None or _is_of_keys(rule)):
                raise NotImplementedError(
                    f"{name} must be an array{words} in cross-attention with decode=True, which "
                    f"does not count queries; got {rule!r}."
                )


def _is_of_keys(rule: Mask | Bias) -> bool:
    """Whether a rule is the same for all queries, or an array for the queries of this call."""
    if isinstance(rule, masks.Pair | biases.Sum):
        return _is_of_keys(rule.left) and _is_of_keys(rule.right)
    if isinstance(rule, masks.Not):
        return _is_of_keys(rule.mask)
    return isinstance(rule, masks.KeyLengths | masks.Dense | biases.Dense)


def advances(lengths: Array | None, batch: tuple[int, ...], num_new: int):
    """How many of the T new tokens count: `[...]`, which ones `[..., T]`, and which rows are wrong.

    Rows whose length is not in [0, T] are wrong; outside `jit` they are an error. Without `lengths`
    the last result is None.
    """
    if lengths is None:
        advance, wrong = jnp.full(batch, num_new, jnp.int32), None
    else:
        advance = jnp.broadcast_to(as_integers("lengths", lengths), batch).astype(jnp.int32)
        wrong = (advance < 0) | (advance > num_new)
        if not isinstance(wrong, jax.core.Tracer) and wrong.any():
            raise ValueError(
                f"lengths must lie in [0, T] with T={num_new}, got {advance.tolist()}."
            )
    return advance, jnp.arange(num_new) < advance[..., None], wrong


def last_inputs(
    layer: nn.Module, name: str, x: Array, count: int, advance: Array | None = None
) -> Array | None:
    """The last `count` inputs before `x`, and `x`: `[..., count + T, D]`; None in `init`.

    It keeps those that are now the last, as the variable `name`.

    Args:
        layer: Of which the variable is one.
        x: `[..., T, D]`.
        advance: How many of the T inputs of each row count, `[...]`. None: all.
    """
    shape = (*x.shape[:-2], count, x.shape[-1])
    # Zeros come from a sum over at most one token: split as the inputs, which may be empty.
    start = lambda: jnp.zeros_like(jnp.broadcast_to(x[..., :1, :].sum(-2, keepdims=True), shape))
    is_ready = layer.has_variable("cache", name)
    kept = layer.variable("cache", name, start)
    if not is_ready:
        return None
    if kept.value.shape[:-2] != x.shape[:-2]:
        raise ValueError(
            f"inputs must have the cache's batch axes {kept.value.shape[:-2]}, got {x.shape[:-2]}."
        )
    row = joined(kept.value, x, -2)
    if advance is None:
        kept.value = row[..., x.shape[-2] :, :]
    else:
        last = advance[..., None] + jnp.arange(count)
        kept.value = jnp.take_along_axis(row, last[..., None], axis=-2)
    return row


def reach_back(mask: Mask | None) -> int | None:
    """How many positions before its own a query surely sees at most; None if this is unknown."""
    if isinstance(mask, masks.And | masks.Or):
        known = [x for x in map(reach_back, (mask.left, mask.right)) if x is not None]
        if isinstance(mask, masks.And):
            return min(known, default=None)
        return max(known) if len(known) == 2 else None
    offset = getattr(mask, "offset", None)
    if isinstance(mask, masks.Band) and mask.left is not None:
        back = mask.left
    elif isinstance(mask, masks.Blocks) and not mask.summary:
        back = mask.length - 1
    else:
        return None
    if offset == "end":  # In decoding, the end of the queries is that of the keys.
        offset = 0
    return max(back - offset, 0) if isinstance(offset, int) else None


def check_rolling(mask: Mask | Array | None, bias: Bias | Array | None, length: int) -> int:
    """How far back the mask reaches; an error if a cache of `length` tokens does not serve it."""
    mask = mask if mask is None else masks.as_mask(mask)
    bias = bias if bias is None else biases.as_bias(bias)
    for name, rule in (("mask", mask), ("bias", bias)):
        if rule is not None and any(set("LTS") & set(axes) for _, axes in rule.arrays()):
            raise NotImplementedError(
                f"cache_length={length} needs a {name} that goes by positions alone: a cache that "
                f"rolls has no place for each token; got {rule!r}."
            )
    back = reach_back(mask)
    if back is None or back > length:
        raise ValueError(
            f"cache_length={length} needs a mask that surely reaches no farther back, as "
            f"masks.window({length}), got {mask!r}."
        )
    return back


def put(cached: Array, places: Array, new: Array) -> Array:
    """`cached[..., places] = new`, but beyond its end: `[..., capacity, ...]`, `[..., T, ...]`."""
    write = lambda row, place, x: row.at[place].set(x.astype(row.dtype), mode="drop")
    for _ in range(places.ndim - 1):
        write = jax.vmap(write)
    return in_auto(write, (cached, places, new), partition_of(cached, *range(cached.ndim)))


def joined(cached: Array, new: Array, axis: int) -> Array:
    """The two, one behind the other along an axis that no mesh splits."""
    join = lambda cached, new: jnp.concatenate([cached, new.astype(cached.dtype)], axis)
    return in_auto(join, (cached, new), partition_of(cached, *range(cached.ndim)))
