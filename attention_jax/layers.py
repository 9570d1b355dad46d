"""Attention as linen layers: they own the parameters, the functions do the mathematics."""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from attention_jax.checks import (
    as_integers,
    as_positions,
    as_size,
    check_fields,
    check_flag,
    check_inputs,
    check_rate,
    jax_defaults,
)
from attention_jax.functional import biases, masks
from attention_jax.functional.biases import Bias
from attention_jax.functional.differential import differential_attention, reparametrized_lambda
from attention_jax.functional.dot_product import attention_weights, dot_product_attention
from attention_jax.functional.gated_delta import (
    causal_convolution,
    gated_delta_attention,
    unit_length,
)
from attention_jax.functional.masks import Mask
from attention_jax.functional.mesh import in_auto, partition_of
from attention_jax.functional.positions import rotary
from attention_jax.types import Array, AttentionFn

Initializer = Callable[..., Array]


class SingleHeadAttention(nn.Module):
    """One head of attention: where to start reading.

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

    @nn.compact
    @jax_defaults()
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

        Returns:
            `[..., T, out_features]`.

        Raises:
            ValueError: Sizes do not fit together.
            NotImplementedError: `positions` are given.
        """
        check_fields(self)
        _check_both(inputs_q, inputs_kv)
        if positions is not None:
            raise NotImplementedError(
                "positions are for MultiHeadAttention(rotary=True): SingleHeadAttention does not "
                "know where its tokens stand."
            )
        for name in ("head_dim", "out_features"):
            if getattr(self, name) is not None:
                as_size(name, getattr(self, name))
        inputs_kv = inputs_q if inputs_kv is None else inputs_kv
        head_dim = inputs_q.shape[-1] if self.head_dim is None else self.head_dim

        def project(name, features, x, kernel_init=self.kernel_init):
            return nn.Dense(
                features,
                use_bias=self.use_bias,
                dtype=self.dtype,
                param_dtype=self.param_dtype,
                kernel_init=kernel_init,
                bias_init=self.bias_init,
                name=name,
            )(x)

        query = project("query", head_dim, inputs_q)  # [..., T, H]
        key = project("key", head_dim, inputs_kv)  # [..., S, H]
        value = project("value", head_dim, inputs_kv)  # [..., S, H]
        # The functions take any number of heads; this layer has one.
        query, key, value = (x[..., None, :] for x in (query, key, value))
        mixed = _attend(self, query, key, value, mask, bias, deterministic, sow_weights)
        out_features = inputs_q.shape[-1] if self.out_features is None else self.out_features
        return project(
            "out", out_features, mixed[..., 0, :], self.out_kernel_init or self.kernel_init
        )


class MultiHeadAttention(nn.Module):
    """Attention with several heads, which may share keys and values.

    The parameter tree is that of `flax.linen.MultiHeadDotProductAttention`: `query` with kernel
    `[D, N, H]`, `key` and `value` with kernel `[D, K, H]`, `out` with kernel `[N, H, D]`; with
    `qk_norm` also `query_ln` and `key_ln`.

    Attributes:
        num_heads: Number N of query heads.
        num_kv_heads: Number K of key/value heads, a divisor of N. None is N (multi-head), 1 is
            multi-query, anything between is grouped-query attention.
        head_dim: Size H of a head. Defaults to D / N.
        out_features: Width of the result. Defaults to D, the width of `inputs_q`.
        use_bias: Adds a bias to each of the four projections.
        dropout_rate: The probability with which an attention weight is dropped.
        qk_norm: Normalizes queries and keys over each head before they meet.
        rotary: Rotates queries and keys by their positions; self-attention only.
        rotary_base: As `base` in `positions.rotary`; another than 10,000 needs `rotary`.
        attention_fn: Any function with the arguments of `dot_product_attention`.
        dtype: The type to compute in; None takes that of inputs and parameters together.
        param_dtype: The type of the parameters.
        decode: Attends to a cache of earlier tokens. `init` on an input of full length makes the
            collection `cache` of that capacity; each `apply(..., mutable=["cache"])` then takes
            any number of new tokens, which see the cache and one another causally. Without dropout.
        deterministic: Turns dropout off; may be given to the call instead.
        kernel_init, bias_init: How the parameters start.
        out_kernel_init: How the kernel of `out` starts. Defaults to `kernel_init`.
        softcap: As in `dot_product_attention`.
        sinks: Learns a logit for each query head that takes part in the normaliser and has no
            value, so that a head may attend to nothing: the parameter `sinks` `[N]`, from 0.

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
    use_bias: bool = True
    dropout_rate: float | Array = 0.0
    qk_norm: bool = False
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

    @nn.compact
    @jax_defaults()
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
    ) -> Array:
        """Lets every position of `inputs_q` read from the positions of `inputs_kv`.

        Args:
            inputs_q: `[..., T, D]`.
            inputs_kv: `[..., S, D']`. Defaults to `inputs_q`: self-attention.
            mask: Boolean, broadcastable to `[..., N, T, S]`, or a `masks.*` value; True means "may
                attend". With `decode`, S is the cache's capacity, and the rules of a `masks.*`
                value count from the start of the sequence: the same mask serves every call.
            bias: Added to the logits; an array or a `biases.*` value, like `mask`.
            deterministic: Turns dropout off. Must be given, here or to the layer, when
                `dropout_rate` is above 0.
            sow_weights: Stores the weights `[..., N, T, S]`, before dropout, as
                `attention_weights` in the collection `intermediates`.
            lengths: With `decode`: how many of the T new tokens count, `[...]` integers, one per
                batch row. The others are padding on the right: the cache does not advance past
                the tokens that count, so the next call takes the padding's place.
            positions: Where the T tokens stand, integers that broadcast to `[..., T]`; for
                `rotary`. Defaults to 0, 1, ..., T - 1, with `decode` counted on from the tokens in
                the cache. Only differences matter, so documents side by side and left padding need
                none. With `decode` they are those of the new tokens; a key stays where it stood
                when it came. `mask` and `bias` do not look at them: see `masks.placed`.

        Returns:
            `[..., T, out_features]`. With `decode` under `jit`, a row whose cache has no room for
            its new tokens, or whose length is not in [0, T], returns NaN, and its cache keeps what
            it holds.

        Raises:
            ValueError: Sizes do not fit together, `positions` are given without `rotary`, or
                (outside `jit`) the cache has no room.
            NotImplementedError: `rotary` or `decode` with `inputs_kv`, or `decode` with dropout.
        """
        check_fields(self)
        _check_both(inputs_q, inputs_kv)
        if inputs_kv is not None and (self.rotary or self.decode):
            word = "rotary" if self.rotary else "decode"
            raise NotImplementedError(
                f"{word}=True is for self-attention: inputs_kv must be None, got shape "
                f"{inputs_kv.shape}."
            )
        if lengths is not None and not self.decode:
            raise ValueError("lengths is for decode=True; use masks.key_lengths(lengths) here.")
        if positions is not None:
            if not self.rotary:
                raise ValueError("positions need rotary=True: nothing else in the layer uses them.")
            positions = as_positions(positions, inputs_q.shape[:-2], inputs_q.shape[-2])
        if self.rotary_base != 10_000.0 and not self.rotary:
            raise ValueError(f"rotary_base needs rotary=True, got {self.rotary_base} without it.")
        inputs_kv = inputs_q if inputs_kv is None else inputs_kv
        head_dim, num_kv_heads = _head_sizes(self, inputs_q.shape[-1])

        def project(name, num_heads, x):
            return self._dense_general((num_heads, head_dim), -1, name, self.kernel_init)(x)

        query = project("query", self.num_heads, inputs_q)  # [..., T, N, H]
        key = project("key", num_kv_heads, inputs_kv)  # [..., S, K, H]
        value = project("value", num_kv_heads, inputs_kv)  # [..., S, K, H]
        if self.qk_norm:
            query = self._by_part(self._norm("query_ln"), query)
            key = self._by_part(self._norm("key_ln"), key)

        cache = _Cache(self, key, value) if self.decode else None
        if self.rotary:
            # Keys are stored rotated, so a cached key is never turned again.
            if positions is None and cache is not None:
                positions = cache.positions()
            rotate = functools.partial(rotary, positions=positions, base=self.rotary_base)
            query, key = self._by_part(rotate, query), self._by_part(rotate, key)
        overflow = None
        if cache is not None:
            mask, bias = cache.rules(mask, bias)
            key, value, overflow = cache.append(key, value, lengths)

        mixed = self._mix(query, key, value, mask, bias, deterministic, sow_weights)
        out_features = inputs_q.shape[-1] if self.out_features is None else self.out_features
        out_init = self.out_kernel_init or self.kernel_init
        out = self._dense_general(out_features, (-2, -1), "out", out_init)(mixed)  # [..., T, D]
        if overflow is not None:
            out = jnp.where(overflow[..., None, None], jnp.nan, out)
        return out

    def _mix(self, query, key, value, mask, bias, deterministic, sow_weights, **options) -> Array:
        """Lets queries read values: `[..., T, N, H]`."""
        if self.softcap is not None:
            options["softcap"] = self.softcap
        if self.sinks:
            options["sinks"] = self.param(
                "sinks", nn.initializers.zeros_init(), (self.num_heads,), self.param_dtype
            )
        return _attend(self, query, key, value, mask, bias, deterministic, sow_weights, **options)

    def _by_part(self, change: Callable[[Array], Array], x: Array) -> Array:
        """`change` on the parts of a head that meet one another: here a head is one part."""
        return change(x)

    def _dense_general(self, features, axis, name, kernel_init):
        return nn.DenseGeneral(
            features,
            axis=axis,
            use_bias=self.use_bias,
            dtype=self.dtype,
            param_dtype=self.param_dtype,
            kernel_init=kernel_init,
            bias_init=self.bias_init,
            name=name,
        )

    def _norm(self, name):
        return nn.LayerNorm(
            use_bias=False, dtype=self.dtype, param_dtype=self.param_dtype, name=name
        )


class DifferentialAttention(MultiHeadAttention):
    """Multi-head attention in which every head is the difference of two.

    Attributes and parameters are those of `MultiHeadAttention`, `head_dim` H being the size of both
    halves of a head together, an even number; `qk_norm` and `rotary` act on each half. Also there
    are `lambda_query_1`, `lambda_key_1`, `lambda_query_2`, `lambda_key_2` `[H / 2]`, and
    `head_norm` with a scale `[H]` that all heads share.

    Attributes:
        lambda_init: What lambda starts near. The paper has 0.8 - 0.6 exp(-0.3 l) in layer
            l = 0, 1, ...
        attention_fn: Any function with the arguments of `differential_attention`.

    Reference:
        Ye et al. 2024, "Differential Transformer", section 2.1. https://arxiv.org/abs/2410.05258
    """

    attention_fn: AttentionFn = differential_attention
    lambda_init: float = 0.8

    def _mix(self, query, key, value, mask, bias, deterministic, sow_weights, **options):
        half, init = self._half(query), nn.initializers.normal(0.1)
        vectors = (
            self.param(f"lambda_{name}", init, (half,), self.param_dtype)
            for name in ("query_1", "key_1", "query_2", "key_2")
        )
        options["lambda_full"] = reparametrized_lambda(*vectors, self.lambda_init)
        mixed = super()._mix(query, key, value, mask, bias, deterministic, sow_weights, **options)
        norm = nn.RMSNorm(
            epsilon=1e-5, dtype=self.dtype, param_dtype=self.param_dtype, name="head_norm"
        )
        return (1 - self.lambda_init) * norm(mixed)

    def _by_part(self, change, x):
        halves = x.reshape(*x.shape[:-2], 2 * x.shape[-2], self._half(x))
        return change(halves).reshape(x.shape)

    def _half(self, x):
        """The size of half a head."""
        if x.shape[-1] % 2:
            raise ValueError(f"head_dim must be even: a head has two halves, got {x.shape[-1]}.")
        return x.shape[-1] // 2


class GatedDeltaAttention(nn.Module):
    """A layer around the gated delta rule: causal, and linear in the length.

    Queries, keys and values pass a short convolution and SiLU; queries and keys then have length 1.
    What is read is normalised for each head and gated before the last projection.

    Parameters: `query`, `key`, `value` and `out` as in `MultiHeadAttention`; `query_conv`,
    `key_conv`, `value_conv` `[conv_size, heads * H]`; `decay` `[D, K]` with `decay_rate` and
    `decay_bias` `[K]`; `beta` `[D, K]`; `gate` `[D, N, H]`; and `head_norm` with a scale `[H]`.

    Attributes:
        num_heads: Number N of query heads.
        num_kv_heads: Number K of memories, a divisor of N. None is N.
        head_dim: Size H of a head. Defaults to D / N.
        out_features: Width of the result. Defaults to D.
        use_bias: Adds a bias to the projections of queries, keys, values and output.
        conv_size: How many positions the convolutions see, their own included.
        attention_fn: Any function with the arguments of `gated_delta_attention`.
        dtype: The type to compute in; None takes that of inputs and parameters together.
        param_dtype: The type of the parameters.
        kernel_init, bias_init: How the projections start.
        out_kernel_init: How the kernel of `out` starts. Defaults to `kernel_init`.

    Reference:
        Yang et al. 2024, "Gated Delta Networks", section 3.4 and figure 1.
        https://arxiv.org/abs/2412.06464
        The decay: Gu and Dao 2023, "Mamba", section 3.6. https://arxiv.org/abs/2312.00752
    """

    num_heads: int
    num_kv_heads: int | None = None
    head_dim: int | None = None
    out_features: int | None = None
    use_bias: bool = False
    conv_size: int = 4
    attention_fn: AttentionFn = gated_delta_attention
    dtype: Any = None
    param_dtype: Any = jnp.float32
    kernel_init: Initializer = nn.initializers.lecun_normal()
    bias_init: Initializer = nn.initializers.zeros_init()
    out_kernel_init: Initializer | None = None

    @nn.compact
    @jax_defaults()
    def __call__(
        self,
        inputs: Array,
        *,
        mask: Mask = masks.causal(),  # noqa: B008  (a constant)
        deterministic: bool | None = None,
        sow_weights: bool = False,
        positions: Array | None = None,
    ) -> Array:
        """Lets every position read what it and those before it have left in the memory.

        Args:
            inputs: `[..., T, D]`.
            mask: `masks.causal()`.
            deterministic: Of no consequence: nothing is dropped.
            sow_weights: Must be False: there are no weights to show.
            positions: Must be None: the memory counts the tokens as they come.

        Returns:
            `[..., T, out_features]`.

        Raises:
            ValueError: Sizes do not fit together.
            NotImplementedError: Another mask, `sow_weights` or `positions`.
        """
        del deterministic
        check_fields(self)
        check_inputs("inputs", inputs)
        check_flag("sow_weights", sow_weights)
        if sow_weights:
            raise NotImplementedError("sow_weights=True: the gated delta rule has no weights.")
        if positions is not None:
            raise NotImplementedError(
                "positions: the gated delta rule has none, it counts the tokens as they come."
            )
        conv_size = as_size("conv_size", self.conv_size)
        head_dim, num_kv_heads = _head_sizes(self, inputs.shape[-1])

        def project(name, features, axis=-1, use_bias=False, init=self.kernel_init):
            return nn.DenseGeneral(
                features,
                axis=axis,
                use_bias=use_bias,
                dtype=self.dtype,
                param_dtype=self.param_dtype,
                kernel_init=init,
                bias_init=self.bias_init,
                name=name,
            )

        def short(name, num_heads):
            x = project(name, (num_heads, head_dim), use_bias=self.use_bias)(inputs)
            flat = x.reshape(*x.shape[:-2], num_heads * head_dim)
            kernel = self.param(
                f"{name}_conv",
                nn.initializers.lecun_normal(),
                (conv_size, num_heads * head_dim),
                self.param_dtype,
            )
            return nn.silu(causal_convolution(flat, kernel.astype(x.dtype))).reshape(x.shape)

        query = unit_length(short("query", self.num_heads))  # [..., T, N, H]
        key = unit_length(short("key", num_kv_heads))  # [..., T, K, H]
        value = short("value", num_kv_heads)  # [..., T, K, H]

        # Positive rates and steps, from the logarithm and through softplus: alpha < 1.
        rate = self.param("decay_rate", _log_uniform(1.0, 16.0), (num_kv_heads,), self.param_dtype)
        bias = self.param(
            "decay_bias", _inverse_softplus(1e-3, 0.1), (num_kv_heads,), self.param_dtype
        )
        step = nn.softplus(project("decay", num_kv_heads)(inputs).astype(jnp.float32) + bias)
        log_decay = -jnp.exp(rate) * step  # [..., T, K]
        beta = nn.sigmoid(project("beta", num_kv_heads)(inputs))  # [..., T, K]

        mixed = self.attention_fn(query, key, value, mask=mask, log_decay=log_decay, beta=beta)
        norm = nn.RMSNorm(
            epsilon=1e-5, dtype=self.dtype, param_dtype=self.param_dtype, name="head_norm"
        )
        mixed = norm(mixed) * nn.silu(project("gate", (self.num_heads, head_dim))(inputs))
        out_features = inputs.shape[-1] if self.out_features is None else self.out_features
        out_init = self.out_kernel_init or self.kernel_init
        return project("out", out_features, (-2, -1), self.use_bias, out_init)(mixed)


def _log_uniform(low: float, high: float) -> Initializer:
    """The logarithm of a number drawn uniformly."""
    return lambda rng, shape, dtype: jnp.log(jax.random.uniform(rng, shape, dtype, low, high))


def _inverse_softplus(low: float, high: float) -> Initializer:
    """What softplus takes to a number whose logarithm is drawn uniformly."""

    def init(rng, shape, dtype):
        step = jnp.exp(jax.random.uniform(rng, shape, dtype, math.log(low), math.log(high)))
        return jnp.log(jnp.expm1(step))

    return init


def _check_both(inputs_q: Array, inputs_kv: Array | None) -> None:
    check_inputs("inputs_q", inputs_q)
    if inputs_kv is not None:
        check_inputs("inputs_kv", inputs_kv, inputs_q.shape[:-2])


def _head_sizes(layer: nn.Module, features: int) -> tuple[int, int]:
    """Head size and number of key/value heads, with their defaults filled in."""
    for name in ("num_heads", "num_kv_heads", "head_dim", "out_features"):
        if getattr(layer, name) is not None:
            as_size(name, getattr(layer, name))
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


class _Cache:
    """The keys and values of a sequence so far, as variables of the layer that owns them.

    `cached_key` and `cached_value` are `[..., capacity, K, H]`, `cache_index` is `[...]` int32: how
    many tokens each row holds.
    """

    def __init__(self, layer: nn.Module, key: Array, value: Array):
        self.ready = layer.has_variable("cache", "cached_key")
        if not (self.ready or layer.is_initializing()):
            raise ValueError('decode=True needs the collection "cache" that init makes, got none.')
        # Like the keys: on a mesh each device holds the cache of its own rows and heads.
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
        """Where the new tokens stand in the sequence, `[..., T]`."""
        return self.index.value[..., None] + jnp.arange(self.num_new)

    def rules(self, mask, bias):
        """The masks and biases of the new tokens, which stand behind those in the cache."""
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
        # Written beyond the end, a token is dropped: never a silent overwrite.
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


class Embed(nn.Embed):
    """`flax.linen.Embed` for tokens that may be split over Explicit axes of a mesh."""

    @jax_defaults()
    def __call__(self, tokens: Array) -> Array:
        """`[...] -> [..., features]`; a token without a row in the table becomes NaN."""
        (table,) = self.promote_dtype(self.embedding, dtype=self.dtype, inexact=False)
        take = functools.partial(jnp.take, axis=0)
        rows = partition_of(tokens, *range(tokens.ndim), None)
        return in_auto(take, (table, tokens), rows)


def _attend(layer, query, key, value, mask, bias, deterministic, sow_weights, **options) -> Array:
    """Calls the layer's attention function with what was asked for, and nothing else.

    A mechanism that knows no bias or dropout is not handed one, unless somebody wants it: then its
    own error says so.
    """
    check_rate("dropout_rate", layer.dropout_rate)
    check_flag("sow_weights", sow_weights)
    own = getattr(layer, "deterministic", None)
    for given in (own, deterministic):
        if given is not None:
            check_flag("deterministic", given)
    if sow_weights:
        if layer.attention_fn is not dot_product_attention:
            raise NotImplementedError(
                "sow_weights=True needs attention_fn=dot_product_attention, whose weights can be "
                f"shown; got {layer.attention_fn}."
            )
        weights = attention_weights(query, key, bias, mask, **options)
        layer.sow("intermediates", "attention_weights", weights)
    if bias is not None:
        options["bias"] = bias
    if isinstance(layer.dropout_rate, jax.core.Tracer) or layer.dropout_rate:
        if nn.merge_param("deterministic", own, deterministic):
            options["deterministic"] = True
        else:
            if getattr(layer, "decode", False):
                # It would depend on how the sequence is cut into calls.
                raise NotImplementedError(
                    f"decode=True has no dropout, got dropout_rate={layer.dropout_rate}: "
                    "give deterministic=True."
                )
            options["dropout_rate"] = layer.dropout_rate
            options["dropout_rng"] = layer.make_rng("dropout")
    return layer.attention_fn(query, key, value, mask=mask, **options)
