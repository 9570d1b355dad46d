"""Llama and its relatives: Mistral, Qwen 2 and 3, Gemma 1 to 3."""

import functools
from collections.abc import Iterator
from typing import Any

from flax import linen as nn

from attention_jax.functional import masks
from attention_jax.interop.families.family import (
    QKV,
    REQUIRED,
    Config,
    Family,
    Tensor,
    activation_of,
    epsilon,
    has_bias,
    head_sizes,
    heads_bias,
    into_heads,
    norm_tensors,
    out_of_heads,
    reaches,
    same,
    transposed,
    word_of,
)
from attention_jax.interop.families.rotation import rope_scaling, rotation, trained_length
from attention_jax.layers import (
    GatedMLP,
    MultiHeadAttention,
    TokenEmbedding,
    Unembedding,
    UnitOffsetRMSNorm,
)
from attention_jax.models import Block, SequenceModel


def _llama_tensors(model: SequenceModel) -> Iterator[Tensor]:
    yield same("model.embed_tokens.weight", "embedding/embedding")
    for i, block in enumerate(model.blocks):
        theirs, ours, attention = f"model.layers.{i}", f"blocks_{i}", block.attention
        N, K, H = head_sizes(attention, model.embedding.features)
        for letter, name, heads in (("q", "query", N), ("k", "key", K), ("v", "value", K)):
            there, here = f"{theirs}.self_attn.{letter}_proj", f"{ours}/attention/{name}"
            yield into_heads(f"{there}.weight", f"{here}/kernel", heads, H)
            if has_bias(attention, name):
                yield heads_bias(f"{there}.bias", f"{here}/bias", heads, H)
        there, here = f"{theirs}.self_attn.o_proj", f"{ours}/attention/out"
        yield out_of_heads(f"{there}.weight", f"{here}/kernel", N, H)
        if has_bias(attention, "out"):
            yield same(f"{there}.bias", f"{here}/bias")
        if attention.qk_norm is not False:
            yield from norm_tensors(f"{theirs}.self_attn.q_norm", f"{ours}/attention/query_ln")
            yield from norm_tensors(f"{theirs}.self_attn.k_norm", f"{ours}/attention/key_ln")
        for letter, name in (("gate", "gate"), ("up", "in"), ("down", "out")):
            yield transposed(f"{theirs}.mlp.{letter}_proj.weight", f"{ours}/mlp/{name}/kernel")
            if block.mlp.use_bias:
                yield same(f"{theirs}.mlp.{letter}_proj.bias", f"{ours}/mlp/{name}/bias")
        norms = {"input": "attention", "post_attention": "mlp"}
        if block.output_norm is not None:  # Gemma 2 and 3.
            norms = {
                "input": "attention",
                "post_attention": "attention_output",
                "pre_feedforward": "mlp",
                "post_feedforward": "mlp_output",
            }
        for there, here in norms.items():
            yield from norm_tensors(f"{theirs}.{there}_layernorm", f"{ours}/{here}_norm")
    yield from norm_tensors("model.norm", "last_norm")
    if model.head is not None:
        yield transposed("lm_head.weight", "head/kernel")


def _llama_model(config: Config, dtype: Any, *, gemma: int = 0, qk_norm=False, biases=None):
    """Llama, and what differs in its relatives.

    Args:
        config: With its defaults.
        dtype: The type of the parameters.
        gemma: 0, or the version of Gemma.
        qk_norm: Whether queries and keys are normalized.
        biases: The projections of attention that have one; None follows `attention_bias`.
    """
    D, N, L = (config[x] for x in ("hidden_size", "num_attention_heads", "num_hidden_layers"))
    types = {"param_dtype": dtype}
    make_norm = UnitOffsetRMSNorm if gemma else nn.RMSNorm
    norm = functools.partial(make_norm, epsilon=config["rms_norm_eps"], **types)
    activation = config["hidden_activation" if gemma > 1 else "hidden_act"]
    if gemma == 1 and activation == "gelu":  # The first releases say so and mean the other.
        activation = "gelu_pytorch_tanh"
    kinds = _layer_types(config, L)

    def block(kind: str) -> Block:
        base, fraction, scaling = rotation(config, kind)
        if fraction != 1:
            raise NotImplementedError(
                f"partial_rotary_factor must be 1, got {fraction}: transformers turns whole heads "
                "in this family."
            )
        scalar = config.get("query_pre_attn_scalar")
        return Block(
            MultiHeadAttention(
                N,
                num_kv_heads=config["num_key_value_heads"] or N,
                head_dim=config["head_dim"] or D // N,
                use_bias=config["attention_bias"] if biases is None else biases,
                qk_norm=norm if qk_norm else False,
                rotary=True,
                rotary_base=base,
                rotary_scaling=scaling,
                scale=None if scalar is None else scalar**-0.5,
                softcap=config.get("attn_logit_softcapping"),
                **types,
            ),
            GatedMLP(
                config["intermediate_size"],
                activation=activation_of(activation),
                use_bias=config.get("mlp_bias", False),
                **types,
            ),
            norm=norm,
            output_norm=norm if gemma > 1 else None,
        )

    vocab, softcap = config["vocab_size"], config.get("final_logit_softcapping")
    tied = config["tie_word_embeddings"]
    embedding = TokenEmbedding(
        vocab,
        D,
        scale=D**0.5 if gemma else 1.0,
        softcap=softcap if tied else None,
        **types,
    )
    head = None if tied else Unembedding(vocab, use_bias=False, softcap=softcap, **types)
    window = config.get("sliding_window") if config.get("use_sliding_window", True) else None
    reach = [
        masks.window(window - 1) if kind == "sliding_attention" and window else None
        for kind in kinds
    ]
    return SequenceModel(
        embedding,
        [block(kind) for kind in kinds],
        mask=masks.causal(),
        reach=reach if any(rule is not None for rule in reach) else None,
        norm=norm,
        head=head,
    )


def _layer_types(config: Config, L: int) -> list[str]:
    """How far each layer sees, as `layer_types` says or as the family does without it."""
    given = config.get("layer_types")
    if given is not None:
        if len(given) != L:
            raise ValueError(f"layer_types must name {L} layers, got {len(given)}.")
        for kind in given:
            if kind not in ("full_attention", "sliding_attention"):
                raise NotImplementedError(f"layer_types has {kind!r}, which has no model here.")
        return list(given)
    if "sliding_window_pattern" in config:  # Gemma: every so many layers one sees everything.
        every = config["sliding_window_pattern"]
        return ["sliding_attention" if (i + 1) % every else "full_attention" for i in range(L)]
    if config.get("sliding_window") is None or not config.get("use_sliding_window", True):
        return ["full_attention"] * L
    first = config.get("max_window_layers", 0)
    return ["sliding_attention" if i >= first else "full_attention" for i in range(L)]


def _llama_config(model: SequenceModel) -> dict[str, Any]:
    """The fields that Llama and its relatives share; a family reads those that it has."""
    block, L = model.blocks[0], len(model.blocks)
    D, attention = model.embedding.features, block.attention
    N, K, H = head_sizes(attention, D)
    kinds = ["full_attention" if x is None else "sliding_attention" for x in reaches(model)]
    windows = {reach.left + 1 for reach in reaches(model) if reach is not None}
    window = windows.pop() if windows else None
    activation = word_of(block.mlp.activation)
    softcap = (model.embedding if model.head is None else model.head).softcap
    scale = attention.scale
    # With other rotations in the layers with a window, those of full layers go by rope_theta.
    full = next((b for b, k in zip(model.blocks, kinds, strict=True) if k[0] == "f"), block)
    local = next((b for b, k in zip(model.blocks, kinds, strict=True) if k[0] == "s"), block)
    scaling = full.attention.rotary_scaling
    return {
        "vocab_size": model.embedding.num_embeddings,
        "hidden_size": D,
        "intermediate_size": block.mlp.hidden_features,
        "num_hidden_layers": L,
        "num_attention_heads": N,
        "num_key_value_heads": K,
        "head_dim": H,
        "hidden_act": activation,
        "hidden_activation": activation,
        "max_position_embeddings": trained_length(scaling),
        "rms_norm_eps": epsilon(model.norm),
        "tie_word_embeddings": model.head is None,
        "attention_bias": attention.use_bias,
        "mlp_bias": block.mlp.use_bias,
        "rope_theta": full.attention.rotary_base,
        "rope_local_base_freq": local.attention.rotary_base,
        "rope_scaling": rope_scaling(scaling),
        "sliding_window": window,
        "use_sliding_window": window is not None,
        "layer_types": kinds,
        "query_pre_attn_scalar": None if scale is None else _whole(scale**-2),
        "attn_logit_softcapping": attention.softcap,
        "final_logit_softcapping": softcap,
    }


def _whole(x: float) -> float:
    """A number that rounding has moved away from a whole one."""
    return round(x) if abs(x - round(x)) < 1e-9 * abs(x) else x


_LLAMA = {
    "vocab_size": 32_000,
    "hidden_size": REQUIRED,
    "intermediate_size": REQUIRED,
    "num_hidden_layers": REQUIRED,
    "num_attention_heads": REQUIRED,
    "num_key_value_heads": None,
    "head_dim": None,
    "hidden_act": "silu",
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "rope_parameters": None,
    "rope_theta": 10_000.0,
    "rope_scaling": None,
}
_QWEN = _LLAMA | {
    "vocab_size": 151_936,
    "max_position_embeddings": 32_768,
    "use_sliding_window": False,
    "sliding_window": 4096,
    "max_window_layers": 28,
    "layer_types": None,
}
_GEMMA = _LLAMA | {
    "vocab_size": 256_000,
    "max_position_embeddings": 8192,
    "tie_word_embeddings": True,
    "attention_bias": False,
    "hidden_act": "gelu_pytorch_tanh",
    "head_dim": 256,
}
_GEMMA2 = {name: x for name, x in _GEMMA.items() if name != "hidden_act"} | {
    "hidden_activation": "gelu_pytorch_tanh",
    "num_key_value_heads": 4,
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
    "layer_types": None,
    "sliding_window_pattern": 2,
    "attn_logit_softcapping": 50.0,
    "final_logit_softcapping": 30.0,
}
_GEMMA3 = {name: x for name, x in _GEMMA2.items() if name != "attn_logit_softcapping"} | {
    "vocab_size": 262_208,
    "max_position_embeddings": 131_072,
    "sliding_window_pattern": 6,
    "rope_theta": 1_000_000.0,
    "rope_local_base_freq": 10_000.0,
    "final_logit_softcapping": None,
}
_FORWARD = {"use_bidirectional_attention": (None, False)}


def _relative(architecture, defaults, only=None, unused=(), **differences) -> Family:
    return Family(
        architecture,
        "model.",
        defaults,
        only or {},
        functools.partial(_llama_model, **differences),
        _llama_config,
        _llama_tensors,
        ("rotary_emb.inv_freq", *unused),
    )


# By `model_type`.
LLAMAS = {
    "llama": _relative("LlamaForCausalLM", _LLAMA | {"attention_bias": False, "mlp_bias": False}),
    "mistral": _relative(
        "MistralForCausalLM",
        _LLAMA
        | {"num_key_value_heads": 8, "sliding_window": 4096, "max_position_embeddings": 131_072},
        biases=False,
    ),
    "qwen2": _relative("Qwen2ForCausalLM", _QWEN, biases=QKV),
    "qwen3": _relative(
        "Qwen3ForCausalLM", _QWEN | {"attention_bias": False, "head_dim": 128}, qk_norm=True
    ),
    "gemma": _relative("GemmaForCausalLM", _GEMMA, _FORWARD, gemma=1),
    "gemma2": _relative("Gemma2ForCausalLM", _GEMMA2, _FORWARD, gemma=2),
    "gemma3_text": _relative(
        "Gemma3ForCausalLM",
        _GEMMA3,
        # transformers has the field, and does not use it.
        _FORWARD | {"attn_logit_softcapping": (None,)},
        gemma=3,
        qk_norm=True,
    ),
}
