"""GPT-2 and GPT-NeoX."""

import functools
from collections.abc import Iterator
from typing import Any

import numpy as np
from flax import linen as nn

from attention_jax.functional import masks
from attention_jax.interop.families.family import (
    QKV,
    Config,
    Family,
    Tensor,
    activation_of,
    epsilon,
    head_sizes,
    norm_tensors,
    out_of_heads,
    same,
    split,
    transposed,
    word_of,
)
from attention_jax.interop.families.rotation import rope_scaling, rotation, trained_length
from attention_jax.layers import (
    MLP,
    LearnedPositions,
    MultiHeadAttention,
    TokenEmbedding,
    Unembedding,
)
from attention_jax.models import Block, SequenceModel

# GPT-2.


def _gpt2_model(config: Config, dtype: Any) -> SequenceModel:
    D, N, L = (config[name] for name in ("n_embd", "n_head", "n_layer"))
    types = {"param_dtype": dtype}
    norm = functools.partial(
        nn.LayerNorm, epsilon=config["layer_norm_epsilon"], use_fast_variance=False, **types
    )
    vocab, tied = config["vocab_size"], config["tie_word_embeddings"]

    def block(depth: int) -> Block:
        scale = (D // N) ** -0.5 if config["scale_attn_weights"] else 1.0
        if config["scale_attn_by_inverse_layer_idx"]:
            scale /= depth + 1
        return Block(
            MultiHeadAttention(N, scale=scale, **types),
            MLP(
                config["n_inner"] or 4 * D,
                activation=activation_of(config["activation_function"]),
                **types,
            ),
            norm=norm,
        )

    return SequenceModel(
        TokenEmbedding(vocab, D, **types),
        [block(depth) for depth in range(L)],
        positions=LearnedPositions(config["n_positions"], **types),
        mask=masks.causal(),
        norm=norm,
        head=None if tied else Unembedding(vocab, use_bias=False, **types),
    )


def _gpt2_config(model: SequenceModel) -> dict[str, Any]:
    first, last = model.blocks[0], model.blocks[-1]
    N, scale = first.attention.num_heads, first.attention.scale
    by_depth = len(model.blocks) > 1 and last.attention.scale != scale
    return {
        "vocab_size": model.embedding.num_embeddings,
        "n_positions": model.positions.max_length,
        "n_embd": model.embedding.features,
        "n_layer": len(model.blocks),
        "n_head": N,
        "n_inner": first.mlp.hidden_features,
        "activation_function": word_of(first.mlp.activation),
        "layer_norm_epsilon": epsilon(model.norm),
        "scale_attn_weights": scale != 1.0,
        "scale_attn_by_inverse_layer_idx": by_depth,
        "tie_word_embeddings": model.head is None,
    }


def _gpt2_tensors(model: SequenceModel) -> Iterator[Tensor]:
    """GPT-2 keeps matrices as `[in, out]`, and queries, keys and values side by side."""
    yield same("transformer.wte.weight", "embedding/embedding")
    yield same("transformer.wpe.weight", "positions/table/embedding")
    for i, block in enumerate(model.blocks):
        theirs, ours = f"transformer.h.{i}", f"blocks_{i}"
        N, _, H = head_sizes(block.attention, model.embedding.features)
        attention = [f"{ours}/attention/{name}" for name in QKV]
        yield Tensor(
            f"{theirs}.attn.c_attn.weight",
            tuple(f"{path}/kernel" for path in attention),
            lambda w, N=N, H=H: tuple(split(w.reshape(w.shape[0], 3, N, H), 1)),
            lambda *kernels: np.concatenate(
                [kernel.reshape(kernel.shape[0], -1) for kernel in kernels], axis=1
            ),
        )
        yield Tensor(
            f"{theirs}.attn.c_attn.bias",
            tuple(f"{path}/bias" for path in attention),
            lambda b, N=N, H=H: tuple(split(b.reshape(3, N, H), 0)),
            lambda *biases: np.concatenate([bias.reshape(-1) for bias in biases]),
        )
        yield Tensor(
            f"{theirs}.attn.c_proj.weight",
            (f"{ours}/attention/out/kernel",),
            lambda w, N=N, H=H: (w.reshape(N, H, w.shape[1]),),
            lambda kernel: kernel.reshape(-1, kernel.shape[-1]),
        )
        yield same(f"{theirs}.attn.c_proj.bias", f"{ours}/attention/out/bias")
        for there, here in (("c_fc", "in"), ("c_proj", "out")):
            yield same(f"{theirs}.mlp.{there}.weight", f"{ours}/mlp/{here}/kernel")
            yield same(f"{theirs}.mlp.{there}.bias", f"{ours}/mlp/{here}/bias")
        yield from norm_tensors(f"{theirs}.ln_1", f"{ours}/attention_norm", True)
        yield from norm_tensors(f"{theirs}.ln_2", f"{ours}/mlp_norm", True)
    yield from norm_tensors("transformer.ln_f", "last_norm", True)
    if model.head is not None:
        yield transposed("lm_head.weight", "head/kernel")


# GPT-NeoX.


def _neox_model(config: Config, dtype: Any) -> SequenceModel:
    D, N, L = (config[x] for x in ("hidden_size", "num_attention_heads", "num_hidden_layers"))
    types = {"param_dtype": dtype}
    norm = functools.partial(
        nn.LayerNorm, epsilon=config["layer_norm_eps"], use_fast_variance=False, **types
    )
    # As in transformers, also where the config has a `rope_theta` of its own.
    named = {
        "rope_theta": config["rotary_emb_base"],
        "partial_rotary_factor": config["rotary_pct"],
    }
    base, fraction, scaling = rotation({**config, **named}, "full_attention")

    def block() -> Block:
        return Block(
            MultiHeadAttention(
                N,
                use_bias=config["attention_bias"],
                rotary=True,
                rotary_base=base,
                rotary_fraction=fraction,
                rotary_scaling=scaling,
                **types,
            ),
            MLP(
                config["intermediate_size"], activation=activation_of(config["hidden_act"]), **types
            ),
            norm=norm,
            parallel=config["use_parallel_residual"],
        )

    vocab, tied = config["vocab_size"], config["tie_word_embeddings"]
    return SequenceModel(
        TokenEmbedding(vocab, D, **types),
        [block() for _ in range(L)],
        mask=masks.causal(),
        norm=norm,
        head=None if tied else Unembedding(vocab, use_bias=False, **types),
    )


def _neox_config(model: SequenceModel) -> dict[str, Any]:
    block = model.blocks[0]
    attention = block.attention
    scaling = attention.rotary_scaling
    return {
        "vocab_size": model.embedding.num_embeddings,
        "hidden_size": model.embedding.features,
        "intermediate_size": block.mlp.hidden_features,
        "num_hidden_layers": len(model.blocks),
        "num_attention_heads": attention.num_heads,
        "hidden_act": word_of(block.mlp.activation),
        "max_position_embeddings": trained_length(scaling),
        "layer_norm_eps": epsilon(model.norm),
        "tie_word_embeddings": model.head is None,
        "attention_bias": attention.use_bias,
        "use_parallel_residual": block.parallel,
        "rotary_emb_base": attention.rotary_base,
        "rotary_pct": attention.rotary_fraction,
        "rope_scaling": rope_scaling(scaling),
    }


def _neox_tensors(model: SequenceModel) -> Iterator[Tensor]:
    """GPT-NeoX keeps query, key and value of each head side by side: `[N * 3 * H, D]`."""
    yield same("gpt_neox.embed_in.weight", "embedding/embedding")
    for i, block in enumerate(model.blocks):
        theirs, ours, attention = f"gpt_neox.layers.{i}", f"blocks_{i}", block.attention
        N, _, H = head_sizes(attention, model.embedding.features)
        paths = [f"{ours}/attention/{name}" for name in QKV]
        yield Tensor(
            f"{theirs}.attention.query_key_value.weight",
            tuple(f"{path}/kernel" for path in paths),
            lambda w, N=N, H=H: tuple(split(w.T.reshape(w.shape[1], N, 3, H), 2)),
            lambda *kernels: np.stack(kernels, 2).reshape(kernels[0].shape[0], -1).T,
        )
        there, here = f"{theirs}.attention.dense", f"{ours}/attention/out"
        yield out_of_heads(f"{there}.weight", f"{here}/kernel", N, H)
        if attention.use_bias:
            yield Tensor(
                f"{theirs}.attention.query_key_value.bias",
                tuple(f"{path}/bias" for path in paths),
                lambda b, N=N, H=H: tuple(split(b.reshape(N, 3, H), 1)),
                lambda *biases: np.stack(biases, 1).reshape(-1),
            )
            yield same(f"{there}.bias", f"{here}/bias")
        for there, here in (("dense_h_to_4h", "in"), ("dense_4h_to_h", "out")):
            yield transposed(f"{theirs}.mlp.{there}.weight", f"{ours}/mlp/{here}/kernel")
            yield same(f"{theirs}.mlp.{there}.bias", f"{ours}/mlp/{here}/bias")
        yield from norm_tensors(f"{theirs}.input_layernorm", f"{ours}/attention_norm", True)
        yield from norm_tensors(f"{theirs}.post_attention_layernorm", f"{ours}/mlp_norm", True)
    yield from norm_tensors("gpt_neox.final_layer_norm", "last_norm", True)
    if model.head is not None:
        yield transposed("embed_out.weight", "head/kernel")


_GPT2 = {
    "vocab_size": 50_257,
    "n_positions": 1024,
    "n_embd": 768,
    "n_layer": 12,
    "n_head": 12,
    "n_inner": None,
    "activation_function": "gelu_new",
    "layer_norm_epsilon": 1e-5,
    "scale_attn_weights": True,
    "scale_attn_by_inverse_layer_idx": False,
    "tie_word_embeddings": True,
}
_NEOX = {
    "vocab_size": 50_432,
    "hidden_size": 6144,
    "intermediate_size": 24_576,
    "num_hidden_layers": 44,
    "num_attention_heads": 64,
    "hidden_act": "gelu",
    "max_position_embeddings": 2048,
    "layer_norm_eps": 1e-5,
    "tie_word_embeddings": False,
    "attention_bias": True,
    "use_parallel_residual": True,
    "rope_parameters": None,
    "rope_scaling": None,
    "rotary_emb_base": 10_000.0,
    "rotary_pct": 0.25,
}


# By `model_type`.
GPTS = {
    "gpt2": Family(
        "GPT2LMHeadModel",
        "transformer.",
        _GPT2,
        {"add_cross_attention": (False,)},
        _gpt2_model,
        _gpt2_config,
        _gpt2_tensors,
        (".attn.bias", ".attn.masked_bias"),
    ),
    "gpt_neox": Family(
        "GPTNeoXForCausalLM",
        "gpt_neox.",
        _NEOX,
        {},
        _neox_model,
        _neox_config,
        _neox_tensors,
        (".attention.bias", ".attention.masked_bias", "rotary_emb.inv_freq"),
    ),
}
