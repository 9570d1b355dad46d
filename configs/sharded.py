"""Does the compiler's parallelism equal pmap's? One program over a mesh of all devices.

    JAX_NUM_CPU_DEVICES=4 uv run train.py --config=configs/sharded.py --workdir=runs/sharded

Measured: the same losses, held-out 0.2307 after 640 steps, in 16 s with four simulated devices on
two busy cores of an Intel Xeon (jax 0.10.2, 2026-11-29).
"""

from attention_jax.training.config import default_config


def get_config():
    config = default_config()
    config.launcher = "sharded"
    config.train.epochs = 20  # As in configs/pmap.py.
    return config
