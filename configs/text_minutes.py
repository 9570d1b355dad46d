"""What is the best loss on a small text in some minutes of two CPU cores?

    uv run train.py --config=configs/text_minutes.py --config.task.path=my.txt --workdir=runs/five

Measured: on tinyshakespeare, 1.1 MB, held-out loss 1.522 after 2600 steps, in 272 s on two cores of
an older AMD EPYC without AVX-512, 1.25 in training. `--minutes=15` with `model.dropout_rate=0.1`:
1.479 after 8400 steps, in 925 s, 1.29 in training (jax 0.10.2, 2026-12-01).
"""

from attention_jax.training.config import default_config


def get_config():
    config = default_config("text")  # 4 heads, width 128, rotary positions.
    config.task.seq_length = 128
    config.model.num_layers = 3  # Four see fewer rows in that time.
    config.model.short_conv = 4
    config.model.qk_norm = True
    config.model.matmul_precision = "bfloat16"  # Parameters and sums stay in float32.
    config.optimizer.learning_rate = 4e-3
    config.optimizer.b2 = 0.99
    config.train.batch_size = 12
    config.train.minutes = 5.0
    config.eval.num_batches = 64
    return config
