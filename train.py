"""Trains an attention model: flags -> config -> experiment.run.

`python train.py` runs the defaults, `python train.py --help` lists the flags.
"""

import sys

from attention_jax.__main__ import train as main
from attention_jax.training import process

if __name__ == "__main__":
    process.end(main, ["train.py", *sys.argv[1:]])
