"""What is the best loss on a small text in some minutes of two CPU cores?

    uv run train.py --config=configs/text_minutes.py --config.task.path=my.txt --workdir=runs/five

Measured: on tinyshakespeare, 1.1 MB, held-out loss 1.549 after 1700 steps, in 290 s on two cores of
an older AMD EPYC without AVX-512 (jax 0.10.2, 2026-11-30).

Before it had a convolution: 1.51 after 5100 steps, in 301 s on a newer EPYC (2026-11-29), and with
`--minutes=15` 1.50 after 10100 steps, in 808 s on two cores of an Intel Xeon (2026-11-30).
`--minutes=15` with the convolution: 1.521 after 5800 steps, in 921 s, older EPYC (2026-12-01),
1.12 in training; with `model.dropout_rate=0.1` 1.532 after 4100 steps, in 783 s, 1.38 in training.
`--minutes=3` on the older EPYC: 1.652 without it, 1.604 with it and `model.init_scale=0.05`.
"""

from attention_jax.training.config import default_config


def get_config():
    config = default_config("text")  # 4 layers, 4 heads, width 128, rotary positions.
    config.task.seq_length = 128
    config.model.short_conv = 4
    config.train.batch_size = 12
    config.model.matmul_precision = "bfloat16"  # Parameters and sums stay in float32.
    config.train.minutes = 5.0
    config.eval.num_batches = 64
    return config
