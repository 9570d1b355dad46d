"""Can attention find a position? The second half of the sequence repeats the first.

    python train.py --config=configs/copy.py --workdir=runs/copy

Measured: MEASURED
"""

from attention_jax.training.config import default_config


def get_config():
    return default_config("copy")
