"""Trains an attention model: flags -> config -> experiment.run.

`python train.py` runs the defaults, `python train.py --help` lists the flags.
"""

import sys

from attention_jax.__main__ import train
from attention_jax.training import process

if __name__ == "__main__":
    process.end(train, ["train.py", *sys.argv[1:]])
