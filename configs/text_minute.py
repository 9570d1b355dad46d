"""What is the best loss on a small text in one minute of two CPU cores, whole process?

    uv run train.py --config=configs/text_minute.py --config.task.path=my.txt --workdir=runs/minute

It is nanoGPT's CPU cell (`text.py`) with rotary positions, a short convolution before each
attention, and 700 steps instead of 2000.

Measured: on tinyshakespeare, 1.1 MB, held-out loss 1.764 in 57 s on two cores of an older AMD EPYC
without AVX-512, and in 84 s with an empty compile cache. The loop of PyTorch in
`benchmarks/text.py` took 168 and 170 s there for 2000 steps without convolutions, and ended at
1.809 (`benchmarks/text.py my.txt --config=configs/text_minute.py`, jax 0.10.2, torch 2.13,
2026-11-30).
"""

from attention_jax.training.config import default_config


def get_config():
    config = default_config("text")  # 4 layers, 4 heads, width 128, 64 characters, rotary.
    config.model.short_conv = 4
    config.model.matmul_precision = "bfloat16"  # Parameters and sums stay in float32.
    config.optimizer.learning_rate = 3e-3
    config.train.batch_size = 12
    config.train.epochs = 7  # Of 100 steps.
    return config
