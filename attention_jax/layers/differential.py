"""Attention in which every head is the difference of two."""

from flax import linen as nn

from attention_jax.functional.differential import differential_attention, reparametrized_lambda
from attention_jax.layers.multi_head import MultiHeadAttention
from attention_jax.types import AttentionFn


class DifferentialAttention(MultiHeadAttention):
    """Multi-head attention in which every head is the difference of two.

    Attributes and parameters are those of `MultiHeadAttention`. `head_dim` H is the size of both
    halves of a head together and must be even; `qk_norm` and `rotary` act on each half. Further
    parameters are `lambda_query_1`, `lambda_key_1`, `lambda_query_2`, `lambda_key_2` `[H / 2]`, and
    `head_norm` with a scale `[H]` that all heads share.

    Attributes:
        lambda_init: The approximate initial lambda. The paper has 0.8 - 0.6 exp(-0.3 l) in layer l
            = 0, 1, ...
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
