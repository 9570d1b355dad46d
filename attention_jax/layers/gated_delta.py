"""A layer around the gated delta rule."""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from attention_jax.checks import (
    as_size,
    check_fields,
    check_flag,
    check_inputs,
    check_takes,
    jax_defaults,
)
from attention_jax.functional import masks
from attention_jax.functional.gated_delta import (
    causal_convolution,
    gated_delta_attention,
    unit_length,
)
from attention_jax.functional.masks import Mask
from attention_jax.functional.xla_cpu import kernel_product
from attention_jax.layers.cache import advances, last_inputs
from attention_jax.layers.multi_head import head_sizes
from attention_jax.types import Array, AttentionFn, Initializer


class GatedDeltaAttention(nn.Module):
    """A layer around the gated delta rule: causal, and linear in the length.

    Queries, keys and values pass a short convolution and SiLU; queries and keys are then normalised
    to length 1. The output of each head is normalised and gated before the last projection.

    Parameters: `query`, `key`, `value` and `out` as in `MultiHeadAttention`; `query_conv`,
    `key_conv`, `value_conv` `[conv_size, heads * H]`; `decay` `[D, W]` with `decay_rate` and
    `decay_bias` `[W]`; `beta` `[D, W]`; `gate` `[D, max(N, W), H]`; and `head_norm` with a scale
    `[H]`.

    Attributes:
        num_heads: Number N of query heads.
        num_kv_heads: Number K of key heads, a divisor of N. None is N.
        head_dim: Size H of a head. Defaults to D / N.
        out_features: Width of the result. Defaults to D.
        use_bias: Adds a bias to the projections of queries, keys, values and output.
        conv_size: How many positions the convolutions see, their own included.
        attention_fn: Any function with the arguments of `gated_delta_attention`.
        dtype: The type to compute in; None takes that of inputs and parameters together.
        param_dtype: The type of the parameters.
        kernel_init, bias_init: How the projections start.
        out_kernel_init: How the kernel of `out` starts. Defaults to `kernel_init`.
        num_value_heads: Number W of value heads, each with a memory: a multiple of K, and of N or a
            divisor of it. None is K. Qwen 3 Next has W = 2 K and N = K.
        decode: Goes on where the last call stopped. `init` makes the collection `cache`, of the
            same size for any length: the memories, and the inputs that the convolutions still need.
            Each `apply(..., mutable=["cache"])` takes any number of new tokens.
        dot_general: Computes the projections, as `bfloat16_dot_general` or `lax.dot_general`.

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
    num_value_heads: int | None = None
    decode: bool = False
    dot_general: Callable[..., Array] = kernel_product

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
        lengths: Array | None = None,
    ) -> Array:
        """Lets every position read the memory that it and earlier positions have written.

        Args:
            inputs: `[..., T, D]`.
            mask: `masks.causal()`.
            deterministic: Ignored, because the layer has no dropout.
            sow_weights: Must be False: there are no weights to show.
            positions: Must be None: the memory counts the tokens as they come.
            lengths: With `decode`: how many of the T new tokens count, `[...]` integers, one per
                batch row. The others are padding on the right, which the cache does not keep.

        Returns:
            `[..., T, out_features]`. With `decode` under `jit`, a row whose length is not in [0, T]
            returns NaN and keeps its cache.

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
        conv_size = as_size("conv_size", self.conv_size, maximum=1024)  # Each is traced.
        head_dim, num_kv_heads = head_sizes(self, inputs.shape[-1])
        num_memories = num_kv_heads if self.num_value_heads is None else self.num_value_heads
        if lengths is not None and not self.decode:
            raise ValueError("lengths is for decode=True: padding on the right is harmless here.")
        past = _Past(self, inputs, lengths) if self.decode else None
        if past is not None:
            inputs = past.without_padding(inputs)

        def project(name, features, axis=-1, use_bias=False, init=self.kernel_init):
            return nn.DenseGeneral(
                features,
                axis=axis,
                use_bias=use_bias,
                dtype=self.dtype,
                param_dtype=self.param_dtype,
                kernel_init=init,
                bias_init=self.bias_init,
                dot_general=self.dot_general,
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
            row = None if past is None else past.extend(name, flat, conv_size - 1)
            mixed = causal_convolution(flat, kernel.astype(x.dtype), row)
            return nn.silu(mixed).reshape(x.shape)

        query = unit_length(short("query", self.num_heads))  # [..., T, N, H]
        key = unit_length(short("key", num_kv_heads))  # [..., T, K, H]
        value = short("value", num_memories)  # [..., T, W, H]

        # exp and softplus make rates and steps positive, so that alpha < 1.
        rate = self.param("decay_rate", _log_uniform(1.0, 16.0), (num_memories,), self.param_dtype)
        bias = self.param(
            "decay_bias", _inverse_softplus(1e-3, 0.1), (num_memories,), self.param_dtype
        )
        step = project("decay", num_memories)(inputs)
        wide = jnp.promote_types(step.dtype, jnp.float32)
        step = nn.softplus(step.astype(wide) + bias.astype(wide))
        log_decay = -jnp.exp(rate.astype(wide)) * step  # [..., T, W]
        beta = nn.sigmoid(project("beta", num_memories)(inputs))  # [..., T, W]

        gates = {"log_decay": log_decay, "beta": beta}
        if past is None:
            mixed = self.attention_fn(query, key, value, mask=mask, **gates)
        else:
            mixed = past.attend(query, key, value, mask=mask, **gates)
        norm = nn.RMSNorm(
            epsilon=1e-5, dtype=self.dtype, param_dtype=self.param_dtype, name="head_norm"
        )
        mixed = norm(mixed) * nn.silu(project("gate", mixed.shape[-2:])(inputs))
        out_features = inputs.shape[-1] if self.out_features is None else self.out_features
        out_init = self.out_kernel_init or self.kernel_init
        out = project("out", out_features, (-2, -1), self.use_bias, out_init)(mixed)
        if past is not None and past.wrong is not None:
            out = jnp.where(past.wrong[..., None, None], jnp.nan, out)
        return out


class _Past:
    """What a decoding layer keeps, as its variables.

    `memory` is `[..., W, H, H]`; `query_inputs`, `key_inputs` and `value_inputs` are the last
    inputs of the convolutions, `[..., conv_size - 1, heads * H]`; `cache_index` is `[...]` int32:
    how many tokens each row has taken.
    """

    def __init__(self, layer: GatedDeltaAttention, inputs: Array, lengths: Array | None):
        self.layer, self.ready = layer, layer.has_variable("cache", "memory")
        if not (self.ready or layer.is_initializing()):
            raise ValueError('decode=True needs the collection "cache" that init makes, got none.')
        # Zeros come from sums over at most one token: split as the inputs, which may be empty.
        index = layer.variable(
            "cache", "cache_index", lambda: jnp.zeros_like(inputs[..., :1, 0].sum(-1), jnp.int32)
        )
        batch, T = inputs.shape[:-2], inputs.shape[-2]
        if index.value.shape != batch:
            raise ValueError(
                f"inputs must have the cache's batch axes {index.value.shape}, got {batch}."
            )
        self.lengths = lengths
        self.advance, self.new, self.wrong = advances(lengths, batch, T)
        if self.wrong is not None:
            self.advance = jnp.where(self.wrong, 0, self.advance)
            self.new &= ~self.wrong[..., None]
        if self.ready:
            index.value += self.advance

    def without_padding(self, x: Array) -> Array:
        """`x`, `[..., T, features]`, with zeros for padding: even NaN there must not matter."""
        return x if self.lengths is None else jnp.where(self.new[..., None], x, 0)

    def extend(self, name: str, x: Array, count: int) -> Array | None:
        """The last `count` inputs before `x`, and `x`; keeps those that are now the last."""
        advance = None if self.lengths is None else self.advance
        return last_inputs(self.layer, f"{name}_inputs", x, count, advance)

    def attend(self, query, key, value, *, log_decay, beta, mask) -> Array:
        """Reads the memory that earlier calls have written, and writes to it."""
        layer, H = self.layer, key.shape[-1]
        rows = value[..., :1, :, :].sum(-3)[..., None, :]  # [..., W, 1, V]
        shape, dtype = (*rows.shape[:-2], H, H), jnp.promote_types(value.dtype, jnp.float32)
        start = lambda: jnp.zeros_like(jnp.broadcast_to(rows, shape), dtype)
        memory = layer.variable("cache", "memory", start)
        check_takes(layer.attention_fn, {"initial_state": memory.value, "return_state": True})
        mixed, last = layer.attention_fn(
            query,
            key,
            value,
            mask=mask,
            # A token of padding neither decays nor corrects.
            log_decay=self.without_padding(log_decay),
            beta=self.without_padding(beta),
            initial_state=memory.value,
            return_state=True,
        )
        if self.ready:
            memory.value = last
        return mixed


def _log_uniform(low: float, high: float) -> Initializer:
    """The logarithm of a number drawn uniformly."""
    return lambda rng, shape, dtype: jnp.log(jax.random.uniform(rng, shape, dtype, low, high))


def _inverse_softplus(low: float, high: float) -> Initializer:
    """The inverse softplus of a number whose logarithm is drawn uniformly."""

    def init(rng, shape, dtype):
        step = jnp.exp(jax.random.uniform(rng, shape, dtype, math.log(low), math.log(high)))
        return jnp.log(jnp.expm1(step))

    return init
