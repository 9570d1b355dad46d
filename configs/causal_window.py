"""How far back must a model look to copy? Every position sees itself and 15 before it.

    python train.py --config=configs/causal_window.py --workdir=runs/causal_window

Measured: MEASURED
"""

from attention_jax.training.config import default_config


def get_config():
    config = default_config("copy")
    config.task.seq_length = 32
    # The answer stands seq_length / 2 = 16 positions back: out of reach of one layer, not of two.
    config.model.window = 15
    return config
