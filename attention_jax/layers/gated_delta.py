"""A layer around the gated delta rule."""

import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from attention_jax.checks import (
    as_size,
    check_fields,
    check_flag,
    check_inputs,
    jax_defaults,
)
from attention_jax.functional import masks
from attention_jax.functional.gated_delta import (
    causal_convolution,
    gated_delta_attention,
    unit_length,
)
from attention_jax.functional.masks import Mask
from attention_jax.layers.multi_head import head_sizes
from attention_jax.types import Array, AttentionFn, Initializer


class GatedDeltaAttention(nn.Module):
    """A layer around the gated delta rule: causal, and linear in the length.

    Queries, keys and values pass a short convolution and SiLU; queries and keys are then normalised
    to length 1. The output of each head is normalised and gated before the last projection.

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
        """Lets every position read the memory that it and earlier positions have written.

        Args:
            inputs: `[..., T, D]`.
            mask: `masks.causal()`.
            deterministic: Ignored, because the layer has no dropout.
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
        conv_size = as_size("conv_size", self.conv_size, maximum=1024)  # Each is traced.
        head_dim, num_kv_heads = head_sizes(self, inputs.shape[-1])

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

        # exp and softplus make rates and steps positive, so that alpha < 1.
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
    """The inverse softplus of a number whose logarithm is drawn uniformly."""

    def init(rng, shape, dtype):
        step = jnp.exp(jax.random.uniform(rng, shape, dtype, math.log(low), math.log(high)))
        return jnp.log(jnp.expm1(step))

    return init
