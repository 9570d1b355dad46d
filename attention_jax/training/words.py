"""The words of `config.model` for parts of a model, and their parts.

The config reads the words, so this module must not import jax. Public names of the package are
imported late, in a lambda or by `getattr`.
"""

import math
from functools import partial

import attention_jax

# The layer of each mechanism, for the block at some depth. The `partial` fixes some fields; the
# config gives the others.
MECHANISMS = {
    "dot_product": lambda depth: partial(attention_jax.MultiHeadAttention),
    # Linear attention has no weights to drop.
    "linear": lambda depth: partial(
        attention_jax.MultiHeadAttention,
        attention_fn=attention_jax.linear_attention,
        dropout_rate=0.0,
    ),
    "sigmoid": lambda depth: partial(
        attention_jax.MultiHeadAttention,
        attention_fn=attention_jax.sigmoid_attention,
        learnt=("offset",),
    ),
    # The paper's section 2.1.
    "differential": lambda depth: partial(
        attention_jax.DifferentialAttention, lambda_init=0.8 - 0.6 * math.exp(-0.3 * depth)
    ),
    "gated_delta": lambda depth: partial(attention_jax.GatedDeltaAttention),
}


def _with_one_head(layer: partial) -> partial:
    if layer.func is not attention_jax.MultiHeadAttention:
        raise NotImplementedError(
            f"attention='selfhead' has no {layer.func.__name__}: use 'multihead' with num_heads=1."
        )
    for name in layer.keywords:
        if not hasattr(attention_jax.SingleHeadAttention, name):
            raise NotImplementedError(
                f"attention='selfhead' has no {name}, which the mechanism needs: use 'multihead' "
                "with num_heads=1."
            )
    return partial(attention_jax.SingleHeadAttention, **layer.keywords)


# How each word changes the layer of a mechanism.
ATTENTIONS = {"multihead": lambda layer: layer, "selfhead": _with_one_head}

MLPS = {
    "gelu": lambda: attention_jax.MLP,
    "swiglu": lambda: attention_jax.GatedMLP,
    "geglu": lambda: partial(attention_jax.GatedMLP, activation=attention_jax.MLP.activation),
}

# What products of kernels are computed in: the `dot_general` of layers, None for their own.
MATMUL_PRECISIONS = {
    "float32": lambda: None,
    "bfloat16": lambda: attention_jax.bfloat16_dot_general,
}

# What is stored for the backward pass: all; the inputs of each block; or also some products in it.
# The last two are names of `jax.checkpoint_policies`.
REMATS = {
    "none": lambda jax: False,
    "full": lambda jax: True,
    "dots_saveable": lambda jax: jax.checkpoint_policies.dots_saveable,
    "dots_with_no_batch_dims_saveable": lambda jax: (
        jax.checkpoint_policies.dots_with_no_batch_dims_saveable
    ),
}

# The names of flax.
NORMS = {"layer": "LayerNorm", "rms": "RMSNorm", "none": None}

# The field of the model, and its part. Rotary positions are a field of attention layers.
POSITIONS = {
    "none": None,
    "sinusoidal": ("positions", "SinusoidalPositions"),
    "learned": ("positions", "LearnedPositions"),
    "rotary": None,
    "alibi": ("bias", "AlibiBias"),
    "relative": ("bias", "RelativeBias"),
}


def _full(causal, window=None):
    """If not causal, a window reaches as far forward as back."""
    return None if window is None else attention_jax.masks.window(window, 0 if causal else window)


# Child et al. 2019, section 4.3. https://arxiv.org/abs/1904.10509
def _strided(stride):
    return attention_jax.masks.window(stride, stride) | attention_jax.masks.strided(stride)


def _blocks(stride):
    return attention_jax.masks.blocks(stride, summary=1)


# How far a position sees. "strided": the last `stride` positions and every `stride`-th; "blocks":
# its own block of `stride` positions and the last one of every block. Not causal: on both sides.
PATTERNS = {"full": _full, "strided": _strided, "blocks": _blocks}
