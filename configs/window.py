"""How much can a sliding window recall? Only the values within its reach.

    uv run train.py --config=configs/window.py --workdir=runs/window_start
    uv run train.py --config=configs/window.py --workdir=runs/window \
        --init_from=runs/window_start --epochs=1 --config.eval.every_epochs=1 \
        --sweep model.window=8,16,32,64,128,256,512,1024
    uv run python -m attention_jax report runs/window --out=report --x=model.window \
        --metric="eval_accuracy@*" --published=docs/laboratory/window.json

Zoology's mixture, width 128, vocabulary 8192: trained on rows of 64 to 256 tokens with 4 to 64
pairs, tested on seven cells up to 1024 tokens and 256 pairs. A convolution of width 3, then one
layer of attention without positions. Published, as read off the figure of recall against memory
(https://github.com/HazyResearch/zoology): .08 .145 .31 .515 .655 .80 .94 1.00, mean of the cells.

Measured: .057 .143 .312 .512 .654 .796 .934 .998 (jax 0.10.2, 2026-11-30, two cores of an Intel
Xeon). 300 steps without a window took 100 s, 50 more with each of the eight 300 s, whole processes,
import and compilation included, on two cores of an AMD EPYC (2026-11-24).

What differs: a plain convolution, not a separate layer with a gated one; one learning rate, not the
best of four; equal numbers of rows of all lengths. Each window starts from parameters learnt
without a window, because a short window reaches few answers to learn from: from scratch, 8, 16 and
32 were still below 1 % after 300 steps (with zeros between the questions).
"""

from attention_jax.training.config import default_config


def get_config():
    config = default_config("recall")
    config.task.seq_length = 256
    config.task.num_pairs = 64
    config.task.vocab_size = 8192
    config.task.random_non_queries = True
    config.model.features = 128
    config.model.num_layers = 1
    config.model.num_heads = 1
    config.model.short_conv = 3
    config.model.positions = "none"
    config.model.use_bias = False
    config.model.init_scale = 0.02  # Else what is written drowns the embeddings, of 0.02 too.
    config.optimizer.warmup_steps = 50
    config.optimizer.weight_decay = 0.1
    config.optimizer.decay = "all"  # As in the paper.
    config.train.batch_size = 16  # Of each of the five parts.
    config.train.steps_per_epoch = 50
    config.train.epochs = 6
    config.train.slices = "64,num_pairs=4 128,num_pairs=8 256,num_pairs=16 256,num_pairs=32"
    config.eval.num_batches = 8
    config.eval.every_epochs = 6
    config.eval.slices = (
        "64,num_pairs=4 64,num_pairs=8 64,num_pairs=16 128,num_pairs=32 256,num_pairs=64 "
        "512,num_pairs=128 1024,num_pairs=256"
    )
    return config
