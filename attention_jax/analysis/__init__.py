"""What attention does in a trained model: maps, statistics, scores of heads, and models without."""

from attention_jax.analysis.heads import (
    ablation,
    apply_with_gates,
    heads_of,
    importance,
    mean_outputs,
)
from attention_jax.analysis.pruning import prune_heads
from attention_jax.analysis.statistics import (
    dead_heads,
    gradient_norms,
    head_statistics,
    summarize,
)

__all__ = [
    "ablation",
    "apply_with_gates",
    "dead_heads",
    "gradient_norms",
    "head_statistics",
    "heads_of",
    "importance",
    "mean_outputs",
    "prune_heads",
    "summarize",
]
