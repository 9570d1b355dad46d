"""Statistics of the heads of a model, and heads that do nothing."""

import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from attention_jax.analysis.maps import attention_layers, sown
from attention_jax.functional.dot_product import dot_product_attention
from attention_jax.functional.statistics import AttentionStatistics, attention_statistics
from attention_jax.types import Array, PyTree

UNIFORM = 0.99  # Of the largest possible entropy: a head above it weighs all keys alike.
CONSTANT = 1e-3  # The spread over inputs below which a head does the same for all.
EXPLODING = 80.0  # A softmax with such a logit is one-hot, and exp(89) is infinite in float32.

_SOWN = "attention_statistics"


def head_statistics(
    model: nn.Module, params: PyTree, inputs: Array, **options: Any
) -> dict[str, AttentionStatistics]:
    """`attention_statistics` of each attention layer of a model, in memory linear in T.

    Args:
        model, params: Any model of linen whose layers are `MultiHeadAttention` with
            `dot_product_attention`.
        inputs: Of the model, `[B, T]` tokens or `[B, T, D]` vectors.
        **options: Of the model's call, as `mask`.

    Returns:
        Arrays `[B, T, N]` for each layer, by its path, as "blocks_0/attention". A layer that runs
        several times has `[0]`, `[1]` after its path. They are of all T tokens, also with
        `output_positions`. A layer with another attention function, whose weights are no softmax,
        or of another library is left out.

    Raises:
        ValueError: A token is not in the vocabulary.
        NotImplementedError: No layer has `dot_product_attention`.
    """

    def intercept(run, arguments, named, context):
        layer = context.module
        if getattr(layer, "attention_fn", None) is not dot_product_attention:
            return run(*arguments, **named)
        if context.method_name == "_mix":
            query, key, _, mask, bias, *_ = arguments
            # A layer of one head has none of these.
            settings = {name: getattr(layer, name, None) for name in ("scale", "softcap")}
            if getattr(layer, "sinks", False):
                settings["sinks"] = layer.get_variable("params", "sinks")
            statistics = attention_statistics(query, key, bias, mask, **settings)
            layer.sow("intermediates", _SOWN, statistics)
        return run(*arguments, **named)

    options.pop("output_positions", None)
    found = sown(model, params, inputs, intercept, _SOWN, **options)
    if not found:
        raise NotImplementedError(
            "model must have layers with dot_product_attention, got "
            f"{', '.join(attention_layers(model, params, inputs, **options)) or 'none'}."
        )
    return found


def summarize(
    statistics: Mapping[str, AttentionStatistics], queries: Array | None = None
) -> dict[str, dict[str, Array]]:
    """The mean of each statistic over rows and queries that see a key, `[N]`, by layer and name.

    Beside them: `uniformity`, the entropy of a query's weights among its keys, without what the
    sink takes, over the largest that the visible keys allow; `spread`, the largest standard
    deviation over rows of what a query does, near 0 for a head that does the same for all inputs;
    and `peak` is the largest logit of all.

    Args:
        statistics: Those of `head_statistics`.
        queries: Boolean `[B, T]`: the queries that count, as those that are no padding. None: all.
    """
    return {path: _summary(found, queries) for path, found in statistics.items()}


def _summary(found: AttentionStatistics, queries: Array | None) -> dict[str, Array]:
    T = found.entropy.shape[-2]
    rows = jax.tree.map(lambda x: x.reshape(-1, *x.shape[-2:]), found)  # [B, T, N]
    counts = True if queries is None else jnp.asarray(queries).reshape(-1, T, 1)
    sees = (rows.visible > 0) & counts
    # Of a query that leaves all to the sink, the shares of its keys are lost in rounding.
    chooses = (rows.visible > 1) & counts & (rows.sink < 0.999)
    mean = lambda x, where, axis=(0, 1): (
        jnp.sum(jnp.where(where, x, 0), axis) / jnp.maximum(1, where.sum(axis)).astype(x.dtype)
    )
    summary = {
        name: mean(getattr(rows, name), sees)
        for name in rows._fields
        if name not in ("visible", "peak")
    }
    # The entropy of weights and sink is that of the sink against the keys, and that among the keys.
    of_keys = jnp.where(chooses, 1 - rows.sink, 1)
    split = -jax.scipy.special.xlogy(of_keys, of_keys) - jax.scipy.special.xlogy(
        1 - of_keys, 1 - of_keys
    )
    uniform = (rows.entropy - split) / of_keys / jnp.log(jnp.maximum(2, rows.visible))
    summary["uniformity"] = mean(uniform, chooses)
    uniform = jnp.where(chooses, uniform, 0)
    does = (uniform, rows.distance / T, rows.to_first, rows.largest)
    variances = [mean(jnp.square(x - mean(x, sees, 0)), sees, 0) for x in does]  # [T, N] each.
    summary["spread"] = jnp.sqrt(jnp.stack(variances).max((0, 1), initial=0))
    summary["peak"] = jnp.where(sees, rows.peak, -jnp.inf).max((0, 1), initial=-jnp.inf)
    return summary


def dead_heads(summary: Mapping[str, Mapping[str, Array]]) -> list[str]:
    """A line for each head that weighs all keys alike, does the same for all inputs, or has
    logits that explode."""
    lines = []
    for path, found in summary.items():
        for head in range(len(found["uniformity"])):
            name = f"{path} head {head}"
            if found["uniformity"][head] > UNIFORM:
                lines.append(
                    f"{name} is uniform: its entropy is {float(found['uniformity'][head]):.1%} of "
                    "the largest possible"
                )
            elif found["spread"][head] < CONSTANT:
                lines.append(
                    f"{name} does the same for all inputs: its weights vary by "
                    f"{float(found['spread'][head]):.1g}"
                )
            if float(found["peak"][head]) > EXPLODING or math.isnan(float(found["peak"][head])):
                lines.append(f"{name} has exploding logits: up to {float(found['peak'][head]):.3g}")
    return lines


def gradient_norms(gradients: PyTree) -> dict[str, Array]:
    """The norm of the gradient of each part of a model, by its name: where gradients vanish."""
    return {
        name: jnp.sqrt(
            sum(jnp.sum(jnp.square(x.astype(jnp.float32))) for x in jax.tree.leaves(part))
        )
        for name, part in gradients.items()
    }
