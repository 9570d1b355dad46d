"""Attention in JAX and Flax linen: exact, fast, complete, and a laboratory to train and compare it.

The public names are below. Each is imported at its first use, so that a program that only parses
flags does not import jax.
"""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from attention_jax.functional import biases, masks, positions
    from attention_jax.functional.differential import differential_attention
    from attention_jax.functional.dot_product import (
        attention_weights,
        dot_product_attention,
        explain,
    )
    from attention_jax.functional.gated_delta import gated_delta_attention
    from attention_jax.functional.linear import linear_attention
    from attention_jax.functional.parallel import (
        device_positions,
        ring_attention,
        ulysses_attention,
        unzigzag,
        zigzag,
    )
    from attention_jax.functional.sigmoid import sigmoid_attention
    from attention_jax.functional.xla_cpu import bfloat16_dot_general
    from attention_jax.generation import generate
    from attention_jax.layers import (
        MLP,
        AlibiBias,
        DifferentialAttention,
        GatedDeltaAttention,
        GatedMLP,
        LearnedPositions,
        MultiHeadAttention,
        RelativeBias,
        ShortConvolution,
        SingleHeadAttention,
        SinusoidalPositions,
        TokenEmbedding,
        Unembedding,
        UnitOffsetRMSNorm,
        VectorEmbedding,
    )
    from attention_jax.models import Block, SequenceModel, decoding
    from attention_jax.training.loading import load
    from attention_jax.training.model import make_sequence_model

_HOMES = {
    "masks": "attention_jax.functional.masks",
    "biases": "attention_jax.functional.biases",
    "positions": "attention_jax.functional.positions",
    "attention_weights": "attention_jax.functional.dot_product",
    "dot_product_attention": "attention_jax.functional.dot_product",
    "explain": "attention_jax.functional.dot_product",
    "linear_attention": "attention_jax.functional.linear",
    "sigmoid_attention": "attention_jax.functional.sigmoid",
    "differential_attention": "attention_jax.functional.differential",
    "gated_delta_attention": "attention_jax.functional.gated_delta",
    "ring_attention": "attention_jax.functional.parallel",
    "ulysses_attention": "attention_jax.functional.parallel",
    "zigzag": "attention_jax.functional.parallel",
    "unzigzag": "attention_jax.functional.parallel",
    "device_positions": "attention_jax.functional.parallel",
    "bfloat16_dot_general": "attention_jax.functional.xla_cpu",
    "AlibiBias": "attention_jax.layers",
    "DifferentialAttention": "attention_jax.layers",
    "GatedDeltaAttention": "attention_jax.layers",
    "LearnedPositions": "attention_jax.layers",
    "MLP": "attention_jax.layers",
    "GatedMLP": "attention_jax.layers",
    "MultiHeadAttention": "attention_jax.layers",
    "RelativeBias": "attention_jax.layers",
    "ShortConvolution": "attention_jax.layers",
    "SingleHeadAttention": "attention_jax.layers",
    "SinusoidalPositions": "attention_jax.layers",
    "TokenEmbedding": "attention_jax.layers",
    "Unembedding": "attention_jax.layers",
    "UnitOffsetRMSNorm": "attention_jax.layers",
    "VectorEmbedding": "attention_jax.layers",
    "Block": "attention_jax.models",
    "SequenceModel": "attention_jax.models",
    "decoding": "attention_jax.models",
    "generate": "attention_jax.generation",
    "load": "attention_jax.training.loading",
    "make_sequence_model": "attention_jax.training.model",
}

__all__ = [
    "MLP",
    "AlibiBias",
    "Block",
    "DifferentialAttention",
    "GatedDeltaAttention",
    "GatedMLP",
    "LearnedPositions",
    "MultiHeadAttention",
    "RelativeBias",
    "SequenceModel",
    "ShortConvolution",
    "SingleHeadAttention",
    "SinusoidalPositions",
    "TokenEmbedding",
    "Unembedding",
    "UnitOffsetRMSNorm",
    "VectorEmbedding",
    "attention_weights",
    "bfloat16_dot_general",
    "biases",
    "decoding",
    "device_positions",
    "differential_attention",
    "dot_product_attention",
    "explain",
    "gated_delta_attention",
    "generate",
    "linear_attention",
    "load",
    "make_sequence_model",
    "masks",
    "positions",
    "ring_attention",
    "sigmoid_attention",
    "ulysses_attention",
    "unzigzag",
    "zigzag",
]
__version__ = "0.1.0"


_PARTS = (
    *("analysis", "functional", "generation", "interop", "laboratory", "layers", "models"),
    *("tasks", "training", "types"),
)


def __getattr__(name: str):
    if name in _PARTS:
        return importlib.import_module(f"attention_jax.{name}")
    if name not in _HOMES:
        raise AttributeError(f"module 'attention_jax' has no attribute {name!r}")
    module = importlib.import_module(_HOMES[name])
    return module if module.__name__.endswith(f".{name}") else getattr(module, name)


def __dir__():
    return [*__all__, *_PARTS]
