"""What attention does in a trained model: maps, statistics, scores of heads, and models without."""

from attention_jax.analysis.heads import (
    ablation,
    apply_with_gates,
    heads_of,
    importance,
    mean_outputs,
)
from attention_jax.analysis.maps import attention_maps, map_statistics
from attention_jax.analysis.page import write_page
from attention_jax.analysis.pictures import draw_maps, draw_phase, draw_pruning
from attention_jax.analysis.pruning import prune_heads
from attention_jax.analysis.removal import ranked, removal_curve
from attention_jax.analysis.scores import (
    best_head,
    head_pattern,
    head_scores,
    in_context_score,
    prefix_matching,
    repeated_tokens,
)
from attention_jax.analysis.statistics import (
    dead_heads,
    gradient_norms,
    head_statistics,
    summarize,
)
from attention_jax.functional.statistics import attention_statistics

__all__ = [
    "ablation",
    "apply_with_gates",
    "attention_maps",
    "attention_statistics",
    "best_head",
    "dead_heads",
    "draw_maps",
    "draw_phase",
    "draw_pruning",
    "gradient_norms",
    "head_pattern",
    "head_scores",
    "head_statistics",
    "heads_of",
    "importance",
    "in_context_score",
    "map_statistics",
    "mean_outputs",
    "prefix_matching",
    "prune_heads",
    "ranked",
    "removal_curve",
    "repeated_tokens",
    "summarize",
    "write_page",
]
