"""What does one attention head learn? The simplest model here, on the task it is made for.

    uv run train.py --config=configs/single_head.py --workdir=runs/single_head

Measured: held-out loss 2.2e-4 after 1920 steps, 2500 times below the first loss and 1500 times
below predicting the mean (0.33), in 3 s on two busy CPU cores. 1,088 parameters.
"""

from attention_jax.training.config import default_config


def get_config():
    config = default_config()
    config.model.name = "selfhead"
    config.model.features = 16  # The teacher is as wide: one head of size 16.
    config.train.epochs = 60
    return config
