"""Attention as linen layers: they own the parameters, the functions do the mathematics."""

from attention_jax.layers.differential import DifferentialAttention
from attention_jax.layers.gated_delta import GatedDeltaAttention
from attention_jax.layers.multi_head import MultiHeadAttention, SingleHeadAttention
from attention_jax.layers.parts import (
    MLP,
    AlibiBias,
    Dropout,
    Embed,
    GatedMLP,
    LearnedPositions,
    RelativeBias,
    ShortConvolution,
    SinusoidalPositions,
    TokenEmbedding,
    Unembedding,
    UnitOffsetRMSNorm,
    VectorEmbedding,
)

__all__ = [
    "MLP",
    "AlibiBias",
    "DifferentialAttention",
    "Dropout",
    "Embed",
    "GatedDeltaAttention",
    "GatedMLP",
    "LearnedPositions",
    "MultiHeadAttention",
    "RelativeBias",
    "ShortConvolution",
    "SingleHeadAttention",
    "SinusoidalPositions",
    "TokenEmbedding",
    "Unembedding",
    "UnitOffsetRMSNorm",
    "VectorEmbedding",
]
