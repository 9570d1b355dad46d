"""Can attention find a position? The second half of the sequence repeats the first.

    uv run train.py --config=configs/copy.py --workdir=runs/copy

Measured: 100 % of the held-out tokens after 600 steps, in 27 s on two busy cores of an Intel Xeon
(jax 0.10.2, 2026-11-29); guessing gives 7 %.
"""

from attention_jax.training.config import default_config


def get_config():
    return default_config("copy")
