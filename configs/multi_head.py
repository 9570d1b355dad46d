"""Does a student with eight heads find the eight heads of its teacher? The default run, named.

    python train.py --config=configs/multi_head.py --workdir=runs/multi_head

Measured: MEASURED
"""

from attention_jax.training.config import default_config


def get_config():
    return default_config()
