"""Attention with one head and with several."""

import functools
from collections.abc import Callable
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import linen as nn

from attention_jax.checks import (
    Named,
    as_places,
    as_positions,
    as_size,
    called,
    check_fields,
    check_flag,
    check_inputs,
    check_rate,
    check_takes,
    check_word,
    public,
    told,
)
from attention_jax.functional import biases, masks
from attention_jax.functional.biases import Bias
from attention_jax.functional.dot_product import dot_product_attention
from attention_jax.functional.linear import linear_attention
from attention_jax.functional.masks import Mask
from attention_jax.functional.rotary import LAYOUTS, Scaling, dynamic, rotary
from attention_jax.functional.xla_cpu import kernel_product
from attention_jax.layers.cache import Cache, Memory
from attention_jax.types import Array, AttentionFn, Initializer


class SingleHeadAttention(Named, nn.Module):
    """One head of attention, the simplest layer: start reading here.

    Parameters: `query`, `key`, `value` with kernel `[D, H]`, and `out` with kernel `[H, D]`.

    Attributes:
        head_dim: Size H of queries, keys and values. Defaults to the width of `inputs_q`.
        out_features: Width of the result. Defaults to the width of `inputs_q`.
        use_bias: Adds a bias to each of the four projections.
        dropout_rate: The probability with which an attention weight is dropped.
        attention_fn: Any function with the arguments of `dot_product_attention`.
        dtype: The type to compute in; None takes that of inputs and parameters together.
        param_dtype: The type of the parameters.
        kernel_init, bias_init: How the parameters start.
        out_kernel_init: How the kernel of `out` starts. Defaults to `kernel_init`.
        dot_general: Computes the projections, as `bfloat16_dot_general` or `lax.dot_general`.

    Reference:
        Vaswani et al. 2017, "Attention Is All You Need", section 3.2.1.
        https://arxiv.org/abs/1706.03762
    """

    head_dim: int | None = None
    out_features: int | None = None
    use_bias: bool = True
    dropout_rate: float | Array = 0.0
    attention_fn: AttentionFn = dot_product_attention
    dtype: Any = None
    param_dtype: Any = jnp.float32
    kernel_init: Initializer = nn.initializers.lecun_normal()
    bias_init: Initializer = nn.initializers.zeros_init()
    out_kernel_init: Initializer | None = None
    dot_general: Callable[..., Array] = kernel_product
    rotary: ClassVar[bool] = False  # As in MultiHeadAttention; this layer does not use positions.

    @nn.compact
    @public
    def __call__(
        self,
        inputs_q: Array,
        inputs_kv: Array | None = None,
        *,
        mask: Array | Mask | None = None,
        bias: Array | Bias | None = None,
        deterministic: bool | None = None,
        sow_weights: bool = False,
        positions: Array | None = None,
        inputs_v: Array | None = None,
    ) -> Array:
        """Lets every position of `inputs_q` read from the positions of `inputs_kv`.

        Args:
            inputs_q: `[..., T, D]`.
            inputs_kv: `[..., S, D']`. Defaults to `inputs_q`: self-attention.
            mask: Boolean `[..., 1, T, S]`, or a `masks.*` value; True means "may attend".
            bias: Added to the logits, `[..., 1, T, S]`, or a `biases.*` value.
            deterministic: Turns dropout off. Must be given when `dropout_rate` is above 0.
            sow_weights: Stores the weights `[..., 1, T, S]`, before dropout, as
                `attention_weights` in the collection `intermediates`.
            positions: Must be None: the layer has no rotary positions, so it would not use them.
            inputs_v: `[..., S, D'']`, what the values are made of. Defaults to what the keys are
                made of.

        Returns:
            `[..., T, out_features]`.

        Raises:
            ValueError: Sizes do not fit together.
            NotImplementedError: `positions` are given.
        """
        check_fields(self)
        _check_inputs(inputs_q, inputs_kv, inputs_v)
        if positions is not None:
            raise NotImplementedError(
                "positions are for MultiHeadAttention(rotary=True): SingleHeadAttention does not "
                "know where its tokens stand."
            )
        for name in ("head_dim", "out_features"):
            if getattr(self, name) is not None:
                as_size(name, getattr(self, name))
        inputs_kv = inputs_q if inputs_kv is None else inputs_kv
        inputs_v = inputs_kv if inputs_v is None else inputs_v
        head_dim = inputs_q.shape[-1] if self.head_dim is None else self.head_dim

        def project(name, features, x, kernel_init=self.kernel_init):
            return nn.Dense(
                features,
                use_bias=self.use_bias,
                dtype=self.dtype,
                param_dtype=self.param_dtype,
                kernel_init=kernel_init,
                bias_init=self.bias_init,
                dot_general=self.dot_general,
                name=name,
            )(x)

        query = project("query", head_dim, inputs_q)  # [..., T, H]
        key = project("key", head_dim, inputs_kv)  # [..., S, H]
        value = project("value", head_dim, inputs_v)  # [..., S, H]
        # The functions take any number of heads; this layer has one.
        query, key, value = (x[..., None, :] for x in (query, key, value))
        mixed = self._mix(query, key, value, mask, bias, deterministic, sow_weights)
        out_features = inputs_q.shape[-1] if self.out_features is None else self.out_features
        return project(
            "out", out_features, mixed[..., 0, :], self.out_kernel_init or self.kernel_init
        )

    def _mix(self, query, key, value, mask, bias, deterministic, sow_weights) -> Array:
        """Lets queries read values: `[..., T, 1, H]`."""
        return _attend(self, query, key, value, mask, bias, deterministic, sow_weights)


class MultiHeadAttention(Named, nn.Module):
    """Attention with several heads, which may share keys and values.

    The parameter tree is that of `flax.linen.MultiHeadDotProductAttention`: `query` with kernel
    `[D, N, H]`, `key` and `value` with kernel `[D, K, H]`, `out` with kernel `[N, H, D]`; with
    `qk_norm` also `query_ln` and `key_ln`. With `value_head_dim` the kernel of `value` is
    `[D, K, V]` and that of `out` `[N, V, D]`.

    Attributes:
        num_heads: Number N of query heads.
        num_kv_heads: Number K of key/value heads, a divisor of N. None is N (multi-head), 1 is
            multi-query, anything between is grouped-query attention.
        head_dim: Size H of a head. Defaults to D / N.
        out_features: Width of the result. Defaults to D, the width of `inputs_q`.
        use_bias: Adds a bias to each of the four projections; or names those that have one, as
            ("query", "key", "value").
        dropout_rate: The probability with which an attention weight is dropped.
        qk_norm: Normalizes queries and keys over each head before they meet: "layer" (True is the
            same), "rms", or a function that makes a norm, as a `functools.partial` of one.
        rotary: Rotates queries and keys by their positions; self-attention only.
        rotary_base: As `base` in `positions.rotary`. All fields `rotary_...` need `rotary`.
        attention_fn: Any function with the arguments of `dot_product_attention`.
        dtype: The type to compute in; None takes that of inputs and parameters together.
        param_dtype: The type of the parameters.
        decode: Attends to a cache of earlier tokens. `init` on an input of full length makes the
            collection `cache` of that capacity; each `apply(..., mutable=["cache"])` then takes
            any number of new tokens, which see the cache and one another causally. Without dropout.
            For cross-attention, a call with `inputs_kv` and `mutable=["cache"]` stores their keys
            and values, and calls without `inputs_kv` read those.
        cache_length: How many tokens the cache keeps at most. If the input of `init` has so many,
            the cache rolls: it keeps the newest, and the sequence has no end. The mask must surely
            reach no farther back, as `masks.window(cache_length)`. `cache_length` = window + 1
            saves a copy in calls of one token.
        deterministic: Turns dropout off; may be given to the call instead.
        kernel_init, bias_init: How the parameters start.
        out_kernel_init: How the kernel of `out` starts. Defaults to `kernel_init`.
        softcap: As in `dot_product_attention`.
        sinks: Learns a logit for each query head that enters the normaliser but has no value, so
            that a head may attend to little: the parameter `sinks` `[N]`, initially 0.
        value_head_dim: Size V of a value head. Defaults to H.
        scale: Multiplies the logits. Defaults to H ** -0.5.
        norm_epsilon: Of the norms that the words of `qk_norm` name.
        rotary_fraction, rotary_layout, rotary_scaling: As `fraction`, `layout` and `scaling` in
            `positions.rotary`.
        implementation: As in `dot_product_attention`.
        learnt: Names of arguments of `attention_fn` that become parameters of the layer: `[N]`
            each, initially 0. `sinks=True` is `learnt=("sinks",)`.
        dot_general: Computes the projections, as `bfloat16_dot_general` or `lax.dot_general`.

    Reference:
        Vaswani et al. 2017, "Attention Is All You Need", section 3.2.2.
        https://arxiv.org/abs/1706.03762
        Ainslie et al. 2023, "GQA". https://arxiv.org/abs/2305.13245
        qk_norm: Dehghani et al. 2023, section 2. https://arxiv.org/abs/2302.05442
    """

    num_heads: int
    num_kv_heads: int | None = None
    head_dim: int | None = None
    out_features: int | None = None
    use_bias: bool | tuple[str, ...] = True
    dropout_rate: float | Array = 0.0
    qk_norm: bool | str | Callable[..., nn.Module] = False
    rotary: bool = False
    rotary_base: float = 10_000.0
    attention_fn: AttentionFn = dot_product_attention
    dtype: Any = None
    param_dtype: Any = jnp.float32
    decode: bool = False
    deterministic: bool | None = None
    kernel_init: Initializer = nn.initializers.lecun_normal()
    bias_init: Initializer = nn.initializers.zeros_init()
    out_kernel_init: Initializer | None = None
    softcap: float | None = None
    sinks: bool = False
    learnt: tuple[str, ...] = ()
    value_head_dim: int | None = None
    scale: float | Array | None = None
    norm_epsilon: float = 1e-6
    rotary_fraction: float = 1.0
    rotary_layout: str = "half"
    rotary_scaling: Scaling | None = None
    implementation: str | None = None
    cache_length: int | None = None
    dot_general: Callable[..., Array] = kernel_product

    @nn.compact
    @public
    def __call__(
        self,
        inputs_q: Array,
        inputs_kv: Array | None = None,
        *,
        mask: Array | Mask | None = None,
        bias: Array | Bias | None = None,
        deterministic: bool | None = None,
        sow_weights: bool = False,
        lengths: Array | None = None,
        positions: Array | None = None,
        output_positions: Array | None = None,
        inputs_v: Array | None = None,
    ) -> Array:
        """Lets every position of `inputs_q` read from the positions of `inputs_kv`.

        Args:
            inputs_q: `[..., T, D]`.
            inputs_kv: `[..., S, D']`. Defaults to `inputs_q`: self-attention; with `decode` to
                those of an earlier call, if one gave any.
            mask: Boolean, broadcastable to `[..., N, T, S]`, or a `masks.*` value; True means "may
                attend". With `decode`, S is the cache's capacity, and the rules of a `masks.*`
                value count from the start of the sequence: the same mask serves every call.
            bias: Added to the logits; an array or a `biases.*` value, like `mask`.
            deterministic: Turns dropout off. Must be given, here or to the layer, when
                `dropout_rate` is above 0.
            sow_weights: Stores the weights `[..., N, T, S]`, before dropout, as
                `attention_weights` in the collection `intermediates`.
            lengths: With `decode`: how many of the T new tokens count, `[...]` integers, one per
                batch row. The others are padding on the right, which the next call overwrites in
                the cache.
            positions: The positions of the T tokens, integers that broadcast to `[..., T]`; for
                `rotary`. Defaults to 0, 1, ..., T - 1; with `decode` the default counts on from the
                cache. Only differences matter, so documents side by side and left padding need no
                positions. With `decode` give those of the new tokens; cached keys keep theirs.
                `mask` and `bias` do not use them: see `masks.placed`.
            output_positions: `[..., P]` integers: which of the T tokens to compute outputs for,
                -1 for the last; self-attention only. None takes all. The others are keys alone,
                which saves time.
            inputs_v: `[..., S, D'']`, what the values are made of. Defaults to what the keys are
                made of.

        Returns:
            `[..., T, out_features]`, with `output_positions` `[..., P, out_features]`. Under `jit`
            a place that is not in the row returns NaN. With `decode` under `jit`, a row returns NaN
            and keeps its cache if its cache has no room for the new tokens or its length is not in
            [0, T].

        Raises:
            ValueError: Sizes do not fit together, `positions` are given without `rotary`, or
                (outside `jit`) the cache has no room or the row no such place.
            NotImplementedError: `rotary` or `output_positions` with `inputs_kv`, or `decode` with
                dropout or `linear_attention`; in cross-attention with `decode`, a rule that depends
                on the places of queries.
        """
        check_fields(self)
        _check_inputs(inputs_q, inputs_kv, inputs_v)
        if inputs_kv is not None and self.rotary:
            raise NotImplementedError(
                f"rotary=True is for self-attention: inputs_kv must be None, got shape "
                f"{inputs_kv.shape}."
            )
        memory = Memory(self) if self.decode and Memory.serves(self, inputs_kv) else None
        if lengths is not None and not self.decode:
            raise ValueError("lengths is for decode=True; use masks.key_lengths(lengths) here.")
        if positions is not None:
            if not self.rotary:
                raise ValueError("positions need rotary=True: nothing else in the layer uses them.")
            positions = as_positions(positions, inputs_q.shape[:-2], inputs_q.shape[-2])
        places = output_positions
        if places is not None:
            if memory is not None or inputs_kv is not None:
                raise NotImplementedError(
                    "output_positions are for self-attention: in cross-attention give the "
                    "inputs_q of these places alone."
                )
            *batch, T, _ = inputs_q.shape
            places = as_places("output_positions", places, batch, T)
        is_early = places is not None and self._can_skip(deterministic, sow_weights)
        rotate = self._rotation()
        self._check_cache_length(sow_weights)
        _check_use_bias(self.use_bias)
        head_dim, num_kv_heads = head_sizes(self, inputs_q.shape[-1])
        value_dim = head_dim if self.value_head_dim is None else self.value_head_dim

        def project(name, num_heads, head_dim, x):
            return self._dense_general((num_heads, head_dim), -1, name, self.kernel_init)(x)

        def keys_and_values(x):
            key = project("key", num_kv_heads, head_dim, x)  # [..., S, K, H]
            of_values = x if inputs_v is None else inputs_v
            value = project("value", num_kv_heads, value_dim, of_values)  # [..., S, K, V]
            if self.qk_norm is not False:
                key = self._by_part(self._norm("key_ln"), key)
            return key, value

        # From here on P queries, which are all T without `output_positions`.
        asking = at_places(inputs_q, places) if is_early else inputs_q
        query = project("query", self.num_heads, head_dim, asking)  # [..., P, N, H]
        if self.qk_norm is not False:
            query = self._by_part(self._norm("query_ln"), query)
        if memory is None:
            key, value = keys_and_values(inputs_q if inputs_kv is None else inputs_kv)
        else:
            if inputs_kv is None and inputs_v is not None:
                raise ValueError("inputs_v must be None: the cache holds the values.")
            key, value = memory.read(inputs_kv, keys_and_values)
            memory.check(mask, bias, lengths, inputs_q)

        if self.decode and memory is None and self.attention_fn is linear_attention:
            raise NotImplementedError(
                "decode=True has no attention_fn=linear_attention, which reads no cache of keys. "
                "GatedDeltaAttention keeps a memory instead."
            )
        cache = Cache(self, key, value) if self.decode and memory is None else None
        if self.rotary:
            # Keys are stored rotated, so a cached key is never turned again.
            if positions is None and cache is not None:
                positions = cache.positions()
            turn = lambda positions: functools.partial(rotate, positions=positions)
            asked = positions
            if is_early:
                asked = places
                if positions is not None:
                    row = jnp.broadcast_to(positions, inputs_q.shape[:-1])
                    asked = jnp.take_along_axis(row, places, axis=-1)
            query = self._by_part(turn(asked), query)
            key = self._by_part(turn(positions), key)
        overflow = None
        if cache is not None:
            key, value, mask, bias, overflow = cache.extend(key, value, mask, bias, lengths)

        if is_early:
            sizes = inputs_q.shape[-2], key.shape[-3]
            mask, bias = _of_tokens(mask, bias, places, *sizes)
        mixed = self._mix(query, key, value, mask, bias, deterministic, sow_weights)
        if places is not None and not is_early:
            mixed = at_places(mixed, places, axis=-3)
        out_features = inputs_q.shape[-1] if self.out_features is None else self.out_features
        out_init = self.out_kernel_init or self.kernel_init
        out = self._dense_general(out_features, (-2, -1), "out", out_init)(mixed)  # [..., P, D]
        if places is not None:
            out = outside(out, places, T)
        if overflow is not None:
            out = jnp.where(overflow[..., None, None], jnp.nan, out)
        return out

    def _can_skip(self, deterministic, sow_weights) -> bool:
        """Whether queries can be left out, and the others give the same as with them."""
        has_own_weights = hasattr(self.attention_fn, "weights")
        is_static = not isinstance(self.dropout_rate, jax.core.Tracer)
        # Which weights are dropped depends on the places of queries.
        drops = not (is_static and self.dropout_rate == 0)
        drops = drops and not (deterministic or self.deterministic)
        # This scaling goes by the length of the row.
        is_dynamic = isinstance(self.rotary_scaling, dynamic)
        return has_own_weights and not (drops or is_dynamic or sow_weights)

    def _mix(self, query, key, value, mask, bias, deterministic, sow_weights, **options) -> Array:
        """Lets queries read values: `[..., T, N, H]`."""
        for name in ("scale", "softcap", "implementation"):
            if getattr(self, name) is not None:
                options[name] = getattr(self, name)
        _check_learnt(self)
        zeros = nn.initializers.zeros_init()
        for name in ("sinks", *self.learnt) if self.sinks else self.learnt:
            options[name] = self.param(name, zeros, (self.num_heads,), self.param_dtype)
        return _attend(self, query, key, value, mask, bias, deterministic, sow_weights, **options)

    def _by_part(self, change: Callable[[Array], Array], x: Array) -> Array:
        """`change`, applied to each part of a head; here a head is one part."""
        return change(x)

    def _dense_general(self, features, axis, name, kernel_init):
        return nn.DenseGeneral(
            features,
            axis=axis,
            use_bias=self.use_bias if isinstance(self.use_bias, bool) else name in self.use_bias,
            dtype=self.dtype,
            param_dtype=self.param_dtype,
            kernel_init=kernel_init,
            bias_init=self.bias_init,
            dot_general=self.dot_general,
            name=name,
        )

    def _norm(self, name):
        make = {True: nn.LayerNorm, "layer": nn.LayerNorm, "rms": nn.RMSNorm}.get(self.qk_norm)
        types = {"dtype": self.dtype, "param_dtype": self.param_dtype, "name": name}
        if make is nn.LayerNorm:
            types["use_bias"] = False
        if make is not None:
            return make(epsilon=self.norm_epsilon, **types)
        if not callable(self.qk_norm):
            raise ValueError(
                'qk_norm must be False, True, "layer", "rms" or a function that makes a norm, got '
                f"{told(self.qk_norm)}."
            )
        if self.norm_epsilon != 1e-6:
            raise ValueError(
                "norm_epsilon is for the words of qk_norm: give it to the function, got "
                f"norm_epsilon={self.norm_epsilon}."
            )
        return self.qk_norm(name=name)

    def _check_cache_length(self, sow_weights) -> None:
        if self.cache_length is None:
            return
        as_size("cache_length", self.cache_length)
        if not self.decode:
            raise ValueError(f"cache_length is for decode=True, got {self.cache_length} without.")
        if sow_weights is True:
            raise NotImplementedError(
                f"sow_weights=True has no cache_length={self.cache_length}: the keys of a cache "
                "that rolls are not in their order."
            )

    def _rotation(self) -> Callable[..., Array]:
        """`positions.rotary` with the settings of the layer."""
        settings = {}
        for name, default in (
            ("base", 10_000.0),
            ("fraction", 1.0),
            ("layout", "half"),
            ("scaling", None),
        ):
            value = settings[name] = getattr(self, f"rotary_{name}")
            is_default = not isinstance(value, jax.core.Tracer) and value == default
            if not (self.rotary or is_default):
                raise ValueError(f"rotary_{name} needs rotary=True, got {told(value)} without it.")
        check_word("rotary_layout", self.rotary_layout, LAYOUTS)
        if self.decode and isinstance(self.rotary_scaling, dynamic):
            raise NotImplementedError(
                "decode=True has no rotary_scaling=positions.dynamic(...), whose frequencies "
                "change with the length: cached keys would keep old ones."
            )
        return functools.partial(rotary, **settings)


def _of_tokens(mask, bias, places, T, S):
    """The mask and the bias of some of the T queries."""
    if mask is not None:
        mask = masks.as_mask(mask)
        mask.check(T, S)
        mask = masks.of_tokens(mask, places)
    if bias is not None:
        bias = biases.as_bias(bias)
        bias.check(T, S)
        bias = biases.of_tokens(bias, places)
    return mask, bias


def at_places(x: Array, places: Array, axis: int = -2) -> Array:
    """`[..., T, D]` at the places `[..., P]`; `axis` is that of T. See `outside`."""
    index = jnp.expand_dims(places, range(axis + 1, 0))
    return jnp.take_along_axis(x, index, axis=axis, mode="clip")


def outside(out: Array, places: Array, length: int) -> Array:
    """The outputs `[..., P, D]`, NaN where a traced place is not in a row of this length.

    This comes last: a NaN on the way would spoil the gradients of parameters.
    """
    if not isinstance(places, jax.core.Tracer):
        return out  # They were checked.
    is_in = (places >= 0) & (places < length)
    return jnp.where(is_in[..., None], out, jnp.nan)


# Arguments of attention functions that a layer gives itself.
_OWN = ("query", "key", "value", "mask", "bias", "scale", "softcap", "sinks", "deterministic")
_PROJECTIONS = ("query", "key", "value", "out")


def _check_use_bias(use_bias: bool | tuple[str, ...]) -> None:
    fits = isinstance(use_bias, tuple | list) and all(name in _PROJECTIONS for name in use_bias)
    if not (fits or isinstance(use_bias, bool)):
        raise TypeError(
            f"use_bias must be True, False or a tuple of names of {_PROJECTIONS}, got "
            f"{told(use_bias)}."
        )


def _check_learnt(layer: nn.Module) -> None:
    names = layer.learnt
    if not (isinstance(names, tuple | list) and all(isinstance(name, str) for name in names)):
        raise TypeError(f"learnt must be a tuple of names, got {told(names)}.")
    for name in names:
        if name in _OWN or name.startswith("dropout"):
            raise ValueError(f"learnt must not name what the layer gives itself, got {name!r}.")


def _check_inputs(inputs_q: Array, inputs_kv: Array | None, inputs_v: Array | None) -> None:
    check_inputs("inputs_q", inputs_q)
    batch = inputs_q.shape[:-2]
    if inputs_kv is not None:
        check_inputs("inputs_kv", inputs_kv, batch)
    if inputs_v is not None:
        check_inputs("inputs_v", inputs_v, batch)
        S = (inputs_q if inputs_kv is None else inputs_kv).shape[-2]
        if inputs_v.shape[-2] != S:
            raise ValueError(
                f"inputs_v must have a row for each of the {S} keys, got shape {inputs_v.shape}."
            )


def head_sizes(layer: nn.Module, features: int) -> tuple[int, int]:
    """Head size and number of key/value heads, with their defaults filled in."""
    sizes = "num_heads", "num_kv_heads", "num_value_heads", "head_dim", "value_head_dim"
    for name in (*sizes, "out_features"):
        if getattr(layer, name, None) is not None:
            as_size(name, getattr(layer, name), maximum=2**31 - 1)
    if layer.head_dim is None and features % layer.num_heads:
        raise ValueError(
            f"num_heads must divide the width of the inputs, or head_dim be given: got "
            f"num_heads={layer.num_heads} and width {features}."
        )
    num_kv_heads = layer.num_heads if layer.num_kv_heads is None else layer.num_kv_heads
    if layer.num_heads % num_kv_heads:
        raise ValueError(
            f"num_kv_heads must divide num_heads: got num_kv_heads={num_kv_heads} and "
            f"num_heads={layer.num_heads}."
        )
    return features // layer.num_heads if layer.head_dim is None else layer.head_dim, num_kv_heads


def _attend(layer, query, key, value, mask, bias, deterministic, sow_weights, **options) -> Array:
    """Calls the layer's attention function with the requested options only.

    So a mechanism without bias or dropout works, and a request for one is an error.
    """
    check_rate("dropout_rate", layer.dropout_rate)
    check_flag("sow_weights", sow_weights)
    own = getattr(layer, "deterministic", None)
    for given in (own, deterministic):
        if given is not None:
            check_flag("deterministic", given)
    if sow_weights:
        show = getattr(layer.attention_fn, "weights", None)
        if show is None:
            raise NotImplementedError(
                "sow_weights=True needs an attention_fn that can show its weights, as "
                f"dot_product_attention.weights does; got {layer.attention_fn}."
            )
        shown = {name: x for name, x in options.items() if name != "implementation"}
        weights = show(query, key, bias, mask, **shown)
        layer.sow("intermediates", "attention_weights", weights)
    if bias is not None:
        options["bias"] = bias
    drops = isinstance(layer.dropout_rate, jax.core.Tracer) or layer.dropout_rate
    asked = {"dropout_rate": layer.dropout_rate} if drops else {}
    check_takes(layer.attention_fn, asked | options)
    if drops:
        if own is None and deterministic is None:
            raise ValueError(
                f"deterministic must be True or False, in the call or the layer, with "
                f"dropout_rate={told(layer.dropout_rate)}: got none."
            )
        if nn.merge_param("deterministic", own, deterministic):
            options["deterministic"] = True
        else:
            if getattr(layer, "decode", False):
                # Dropout would depend on how the sequence is divided into calls.
                raise NotImplementedError(
                    f"decode=True has no dropout, got dropout_rate={layer.dropout_rate}: "
                    "give deterministic=True."
                )
            if not layer.has_rng("dropout"):
                raise ValueError(
                    f"dropout_rate={told(layer.dropout_rate)} needs a key: give apply "
                    'rngs={"dropout": key}, or deterministic=True.'
                )
            options["dropout_rate"] = layer.dropout_rate
            options["dropout_rng"] = layer.make_rng("dropout")
    mixed = layer.attention_fn(query, key, value, mask=mask, **options)
    if getattr(mixed, "shape", None) != (*query.shape[:-1], value.shape[-1]):
        raise ValueError(
            f"attention_fn must return [..., T, N, V], {(*query.shape[:-1], value.shape[-1])}, got "
            f"{told(mixed)} from {called(layer.attention_fn)}."
        )
    return mixed
