"""Which positions carry over to rows longer than those trained on? ALiBi, of six.

    uv run train.py --config=configs/lengths.py --workdir=runs/lengths --sweep seed=0,1,2 \
        --sweep model.positions=none,sinusoidal,learned,rotary,alibi,relative

The induction head on rows of 64 tokens, vocabulary 16, evaluated on rows up to 8 times as
long. The plot is runs/lengths/sweep.png.

Measured: accuracy after 1000 steps, mean of three seeds; all 18 runs in 1337 s beside
other work on two cores of an Intel Xeon (jax 0.10.2, 2026-11-29); chance is 7 %.

                 64    96   128   256   512
    none         50    42    36    22    13
    sinusoidal  100    70    54    30    20
    learned      99    67    52    31    18
    rotary       57    57    51    33    16
    alibi       100   100   100   100   100
    relative     88    81    68    36    22

These are results after a fixed number of steps, not final ones: rotary positions find the pattern
later than the rest, and `positions=none` later still. With batches of 32 and a rate of 2e-3 no run
of any scheme got beyond 58 % in 1500 steps.
"""

from attention_jax.training.config import default_config


def get_config():
    config = default_config("induction")
    config.model.init_scale = 0.02  # Else what layers write drowns the embeddings, of 0.02 too.
    config.optimizer.learning_rate = 1e-3
    config.optimizer.schedule = "cosine"
    config.optimizer.warmup_steps = 100
    config.train.epochs = 10
    config.eval.num_batches = 8
    config.eval.every_epochs = 10
    config.eval.slices = "96 128 256 512"
    return config
