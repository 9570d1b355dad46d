"""What does one attention head learn? The simplest model here, on the task it is made for.

    python train.py --config=configs/single_head.py --workdir=runs/single_head

Measured: MEASURED
"""

from attention_jax.training.config import default_config


def get_config():
    config = default_config()
    config.model.name = "selfhead"
    config.model.features = 16  # The teacher is as wide: one head of size 16.
    config.train.epochs = 60
    return config
