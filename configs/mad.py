"""What does a small transformer learn of MAD's tasks in 500 steps, and how much varies by seed?

    for task in memorization in_context_recall noisy_recall fuzzy_recall; do
        uv run train.py --config=configs/mad.py --task=$task --workdir=runs/mad/$task \
            --sweep seed=0,1,2
    done
    uv run train.py --config=configs/mad.py --task=selective_copy --seq_length=64 \
        --workdir=runs/mad/selective_copy --sweep model.positions=rotary,alibi --sweep seed=0,1,2

Poli et al. 2024 (https://arxiv.org/abs/2403.17844): width 128, two layers of attention and MLP,
1,280 held-out rows. Published for the Transformer, as mean accuracy over 6 to 14 settings of each
task, best of six optimizers, 20,000 steps of 128 rows: memorization 85.2, in-context recall 94.1,
noisy recall 86.8, fuzzy recall 29.8, selective copying 99.6 %.

Measured: mean and spread (standard deviation) of three seeds after 500 steps of 32 rows, the first
setting of each task alone, whole processes on two cores of an AMD EPYC (jax 0.10.2, 2026-11-24):

    memorization                      100.0 +- 0.0 %   158 s (six runs, rotary too: the same)
    in-context recall                  99.9 +- 0.1 %   234 s
    noisy recall                       54.9 +- 39.0 %  203 s; two of the seeds did not leave 33 %
    fuzzy recall                       26.7 +- 0.5 %   465 s beside other work
    selective copying, rotary          87.7 +- 9.3 %   176 s (with the next line)
    selective copying, ALiBi           39.1 +- 0.3 %

What differs beside the budget: fuzzy recall is tested with keys of 1 to 3 tokens, MAD's with 3
(`--config.eval.slices=min_key_length=3`); four heads instead of 16; ALiBi instead of rotary
positions, with which in-context recall stays at 33 % (64 tokens) for these 500 steps; GELU instead
of SwiGLU; the loss at the answers alone; 64 tokens of selective copying instead of 256.
"""

from attention_jax.training.config import default_config


def get_config():
    config = default_config("in_context_recall")
    config.model.features = 128
    config.model.num_heads = 4
    config.model.mlp_ratio = 4.0
    config.model.norm = "rms"
    config.model.positions = "alibi"
    config.model.use_bias = False
    config.model.init_scale = 0.1
    config.optimizer.schedule = "cosine"
    config.optimizer.warmup_steps = 50
    config.optimizer.weight_decay = 0.1
    config.optimizer.decay = "all"  # As in the paper.
    config.train.batch_size = 32
    config.train.epochs = 5
    config.eval.num_batches = 40  # 1,280 rows.
    config.eval.every_epochs = 5
    return config
