"""Does a student with eight heads find the four of its teacher? The default run, named.

    uv run train.py --config=configs/multi_head.py --workdir=runs/multi_head

Measured: held-out loss 2.1e-5 after 3200 steps, 27,000 times below the first loss; predicting the
mean gives 0.35. 14 s on two busy cores of an Intel Xeon (jax 0.10.2, 2026-11-29). The loss stays
above 0.2 for 900 steps, until the heads have parted, and then falls fast.
"""

from attention_jax.training.config import default_config


def get_config():
    return default_config()
