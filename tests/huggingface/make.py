"""Makes the directories beside this file with transformers, and the answers that it gives.

    python tests/huggingface/make.py

Each directory has a random model of a family: `config.json`, `model.safetensors`, and `answers.npz`
with tokens, logits and the ten tokens that greedy decoding adds. Made with transformers 5.24.0 and
torch 2.13.0.
"""

import json
from pathlib import Path

import numpy as np

HERE = Path(__file__).parent
SIZES = {
    "vocab_size": 19,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32,
}
GEMMA = SIZES | {"head_dim": 8, "sliding_window": 4, "query_pre_attn_scalar": 20}
ROTATION = {"rope_theta": 500.0, "factor": 4.0, "original_max_position_embeddings": 8}
# By the name of the directory: the model_type and its config.
MODELS = {
    "gpt2": (
        "gpt2",
        {"vocab_size": 19, "n_embd": 16, "n_head": 4, "n_layer": 2, "n_positions": 32},
    ),
    "gpt_neox": ("gpt_neox", SIZES | {"rotary_pct": 0.5}),
    "llama": (
        "llama",
        SIZES
        | {"attention_bias": True, "mlp_bias": True, "rms_norm_eps": 1e-5}
        | {
            "rope_parameters": ROTATION
            | {"rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0}
        },
    ),
    "llama_yarn": ("llama", SIZES | {"rope_parameters": ROTATION | {"rope_type": "yarn"}}),
    "mistral": ("mistral", SIZES | {"head_dim": 8, "sliding_window": 5}),
    "qwen2": (
        "qwen2",
        SIZES | {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1},
    ),
    "qwen3": ("qwen3", SIZES | {"head_dim": 8, "tie_word_embeddings": True}),
    "gemma": ("gemma", SIZES | {"head_dim": 8}),
    "gemma2": ("gemma2", GEMMA),
    "gemma3": (
        "gemma3_text",
        GEMMA | {"layer_types": ["sliding_attention", "full_attention"]},
    ),
}


def random_model(kind, fields):
    import torch
    import transformers

    config = transformers.AutoConfig.for_model(kind, **fields, bos_token_id=0, eos_token_id=None)
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    with torch.no_grad():
        for weights in model.parameters():  # Of norms and biases too.
            weights += 0.2 * torch.randn_like(weights)
    return model.eval()


def answers(model):
    """Tokens, their logits, and ten tokens more."""
    import torch

    tokens = torch.tensor(np.random.default_rng(0).integers(0, 19, (2, 12)))
    with torch.no_grad():
        logits = model(tokens).logits
        more = model.generate(
            tokens,
            attention_mask=torch.ones_like(tokens),
            max_new_tokens=10,
            do_sample=False,
            pad_token_id=0,
        )
    return {"tokens": tokens.numpy(), "logits": logits.numpy(), "greedy": more.numpy()[:, 12:]}


def main():
    for name, (kind, fields) in MODELS.items():
        model = random_model(kind, fields)
        model.save_pretrained(HERE / name)
        (HERE / name / "generation_config.json").unlink(missing_ok=True)
        np.savez(HERE / name / "answers.npz", **answers(model))
        print(name, json.loads((HERE / name / "config.json").read_text())["model_type"])


if __name__ == "__main__":
    main()
