"""Can two layers of attention look up what followed a word earlier? One layer cannot.

    uv run train.py --config=configs/recall.py --workdir=runs/recall

The example of https://arxiv.org/abs/2312.04927: 64 tokens, vocabulary 256, four pairs of key and
value, logits at the four questions only.

Measured: 92.0 % of the held-out questions after 2000 steps, in 33 s on two cores of an AMD EPYC
(jax 0.10.2, 2026-11-30). configs/layers.py reaches 99.7 %.
With `--config.model.num_layers=1`: 26 %, which is guessing among the four values of the row.
"""

from attention_jax.training.config import default_config


def get_config():
    return default_config("recall")
