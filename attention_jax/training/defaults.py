"""The default of each field of a config, and what each task changes. Imports no jax."""

DEFAULTS = {
    "seed": 0,
    "launcher": "single",
    # How sharded splits the devices: the rows of a batch (None: over all that are left), and the
    # heads and hidden features of the model; and the tokens of a row, by ring attention.
    "mesh": {"data": None, "model": 1, "sequence": 1},
    "init_from": "",  # The run, directory of Hugging Face, or file of weights to start from.
    "task": {},  # The name of the task and its settings: TASKS.
    "model": {
        # One bare attention layer, as the project began: no norm, no residual, no positions.
        "name": "multihead",  # Or selfhead; or a directory of Hugging Face, as ./gpt2.
        "features": 64,
        "num_layers": 1,
        "mechanism": "dot_product",
        "num_heads": 8,  # Of multihead; selfhead has one.
        "num_kv_heads": None,  # None: as many as num_heads.
        "head_dim": None,  # None: features / num_heads.
        "mlp_ratio": 0.0,  # 0: no MLP.
        "mlp": "gelu",
        "norm": "none",
        "residual": False,
        "positions": "none",
        "causal": False,
        "window": None,  # None: no limit.
        "pattern": "full",
        "stride": None,  # Of the patterns strided and blocks.
        "dropout_rate": 0.0,
        "qk_norm": False,
        "softcap": 0.0,  # 0: off.
        "sinks": False,
        "short_conv": 0,  # Width of the convolution before each attention; 0: none.
        "use_bias": True,
        "init_scale": 1.0,  # Of projections into the residual stream.
        "tie_embedding": True,
        "remat": "none",  # What the backward pass computes again.
        "dtype": "float32",  # Of the computation; parameters are always float32.
        "matmul_precision": "float32",  # bfloat16 rounds what large products of kernels multiply.
    },
    "optimizer": {
        "name": "adam",
        "learning_rate": 1e-3,
        "schedule": "constant",
        "warmup_steps": 0,
        "weight_decay": 0.0,
        "decay": "matrices",  # Which parameters shrink: matrices, or all.
        "clip_norm": 0.0,  # 0: off.
        "momentum": 0.0,
        "b1": 0.9,  # How much Adam keeps of the mean of gradients, and of their squares.
        "b2": 0.999,
        "accumulate": 1,
        "max_skipped": 0,  # Steps in a row that may be skipped because they are not finite.
    },
    # target: stop when it is reached, "accuracy=0.99" say; "": never. See Target.
    # slices: the task with other settings, trained on or evaluated beside it: slice_settings.
    # minutes: 0: the epochs count. Above 0: the run finds how many epochs it has time for, 3 at
    # least.
    "train": {
        "batch_size": 32,
        "steps_per_epoch": 32,
        "epochs": 100,
        "minutes": 0.0,
        "slices": "",
        "target": "",
    },
    # heads: also statistics of each head on the first held-out batch, and the norm of the gradient
    # of each part in training.
    # sample: how many tokens the model of a single run of text writes.
    "eval": {"num_batches": 8, "every_epochs": 10, "slices": "", "heads": False, "sample": 0},
    "checkpoint": {"every_epochs": 10, "keep": 2},
}

# Tasks of tokens need a model with positions and two layers: one bare layer stays at chance
# (https://arxiv.org/abs/2408.14332 says why).
_TRANSFORMER = {
    "num_layers": 2,
    "num_heads": 2,
    "norm": "layer",
    "residual": True,
    "positions": "rotary",
    "causal": True,
}
_WITH_MLP = _TRANSFORMER | {"mlp_ratio": 4.0}  # For tasks that compute with tokens.


def token_task(model=_TRANSFORMER, epochs=20, **task):
    """The defaults that a task of tokens with these settings changes."""
    return {
        "task": task,
        "model": model,
        "optimizer": {"name": "adamw", "learning_rate": 2e-3},
        "train": {"batch_size": 64, "steps_per_epoch": 100, "epochs": epochs},
    }


_QUESTIONS_OF_RECALL = {"power": 0.01, "random_non_queries": False}

# The defaults that each task changes. `task` lists all its settings.
TASKS = {
    "teacher": {"task": {"seq_length": 10}},
    "recall": token_task(
        seq_length=64, vocab_size=256, num_pairs=4, num_passes=1, **_QUESTIONS_OF_RECALL
    ),
    "compositional_recall": token_task(
        seq_length=64, vocab_size=256, num_pairs=4, **_QUESTIONS_OF_RECALL
    ),
    "forgetting_recall": token_task(
        seq_length=64, vocab_size=256, num_pairs=8, num_updates=4, **_QUESTIONS_OF_RECALL
    ),
    "in_context_recall": token_task(seq_length=128, vocab_size=16),
    "noisy_recall": token_task(seq_length=128, vocab_size=32, noise_vocab_size=16, noise_rate=0.2),
    "fuzzy_recall": token_task(
        seq_length=128,
        vocab_size=16,
        min_key_length=1,
        max_key_length=3,
        min_value_length=1,
        max_value_length=3,
    ),
    "induction": token_task(seq_length=64, vocab_size=16),
    "memorization": token_task(_WITH_MLP, seq_length=32, vocab_size=256, seed=0),
    "copy": token_task(epochs=6, seq_length=32, vocab_size=16),
    "reverse": token_task(seq_length=32, vocab_size=16),
    "sort": token_task(_WITH_MLP, seq_length=32, vocab_size=16),
    "selective_copy": token_task(seq_length=256, vocab_size=16, num_tokens=16),
    # All questions look alike and see two tokens; only absolute positions tell them apart.
    "compression": token_task(_WITH_MLP | {"positions": "learned"}, seq_length=63, vocab_size=16),
    "parity": token_task(_WITH_MLP, seq_length=32, cumulative=False),
    "majority": token_task(_WITH_MLP, seq_length=32, cumulative=False),
    "listops": token_task(_WITH_MLP, seq_length=128, max_depth=10, max_args=10, expand_rate=0.25),
    "text": {
        "task": {"seq_length": 64, "path": "", "tokens": "characters", "lines": False},
        "model": _TRANSFORMER
        | {"features": 128, "num_layers": 4, "num_heads": 4, "mlp_ratio": 4.0, "use_bias": False},
        "optimizer": {
            "name": "adamw",
            "learning_rate": 2e-3,
            "schedule": "cosine",
            "warmup_steps": 100,
            "weight_decay": 0.1,
            "clip_norm": 1.0,
        },
        "train": {"batch_size": 16, "steps_per_epoch": 100, "epochs": 20},
        "eval": {"num_batches": 32, "every_epochs": 5, "sample": 200},
    },
}
