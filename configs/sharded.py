"""The same as configs/pmap.py by the compiler: one program over a mesh, which adds the sums itself.

    JAX_NUM_CPU_DEVICES=4 python train.py --config=configs/sharded.py --workdir=runs/sharded

Measured: MEASURED
"""

from attention_jax.training.config import default_config


def get_config():
    config = default_config()
    config.launcher = "sharded"
    config.train.epochs = 20  # As in configs/pmap.py.
    return config
