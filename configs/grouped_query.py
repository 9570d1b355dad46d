"""Does sharing keys and values cost recall? Two query heads share one key/value head.

    python train.py --config=configs/grouped_query.py --workdir=runs/grouped_query

Measured: MEASURED
"""

from attention_jax.training.config import default_config


def get_config():
    config = default_config("recall")
    config.model.num_kv_heads = 1  # Of configs/recall.py's two: half the keys and values.
    return config
