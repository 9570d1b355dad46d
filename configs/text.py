"""How well does a small transformer write after a minute on two CPU cores? nanoGPT's CPU cell.

    uv run train.py --config=configs/text.py --config.task.path=my.txt --workdir=runs/text

Measured: on tinyshakespeare, 1.1 MB, held-out loss 1.74 after 2000 steps. The whole process takes
50 to 60 s on two shared cores of an AMD EPYC with instructions for bfloat16, 56 to 74 s with an
empty compile cache; on an older one without them 136 and 155 s (jax 0.10.2, 2026-11-30). nanoGPT
publishes 1.88. `benchmarks/text.py` measures it beside PyTorch. docs/text.md shows what it writes.
"""

from attention_jax.training.config import default_config


def get_config():
    config = default_config("text")  # 4 layers, 4 heads, width 128, 64 characters.
    config.model.positions = "learned"
    config.model.matmul_precision = "bfloat16"  # Parameters and sums stay in float32.
    config.train.batch_size = 12
    config.train.epochs = 20  # Of 100 steps.
    return config
