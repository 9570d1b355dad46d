"""What is the best loss on a small text in one minute of two CPU cores, whole process?

    uv run train.py --config=configs/text_minute.py --config.task.path=my.txt --workdir=runs/minute

It begins with nanoGPT's CPU cell (`text.py`): width 128, four heads, rows of 64 characters, batches
of 12. It has two layers instead of four, rotary positions, a short convolution before each
attention, normalised queries and keys, and 800 steps instead of 2000.

Measured: on tinyshakespeare, 1.1 MB, held-out loss 1.73 in 28 and 34 s, and in 49 s with an empty
compile cache, on two cores of an older AMD EPYC without AVX-512. The loop of PyTorch in
`benchmarks/text.py` took 115 to 119 s in the same rounds for 2000 steps of the cell, and ended at
1.81 (`benchmarks/text.py my.txt --config=configs/text_minute.py`, jax 0.10.2, torch 2.13,
2026-12-01).
"""

from attention_jax.training.config import default_config


def get_config():
    config = default_config("text")  # 4 heads, width 128, 64 characters, rotary.
    config.model.num_layers = 2  # In a minute four learn less: they take twice the time.
    config.model.short_conv = 4
    config.model.qk_norm = True
    config.model.matmul_precision = "bfloat16"  # Parameters and sums stay in float32.
    config.optimizer.learning_rate = 6e-3
    config.optimizer.b2 = 0.99
    config.train.batch_size = 12
    config.train.epochs = 8  # Of 100 steps.
    return config
