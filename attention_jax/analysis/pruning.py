"""Smaller models: the same without some of their heads."""

from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from attention_jax.analysis.heads import check_heads
from attention_jax.functional.tiles import Rule
from attention_jax.layers import MultiHeadAttention
from attention_jax.models import SequenceModel
from attention_jax.types import PyTree


def prune_heads(
    model: SequenceModel, params: PyTree, heads: Mapping[str, Sequence[int]]
) -> tuple[SequenceModel, PyTree]:
    """The model without some heads: its outputs are those with their gates at 0.

    Grouped heads stay grouped where each key head keeps equally many query heads; otherwise each
    query head gets a copy of its key head. A layer without any head left keeps one whose output is
    zero, and its output bias.

    Args:
        model: A model whose attention layers are `MultiHeadAttention` or `DifferentialAttention`.
        params: Its parameters.
        heads: The numbers of the heads to remove, by the path of their layer, as
            `{"blocks_0/attention": [1, 3]}`.

    Returns:
        The smaller model and its parameters, which train, save and load as those of any model.

    Raises:
        ValueError: A layer or a head does not exist, or the parameters are of another model.
        TypeError: The model is no `SequenceModel`, or a head is no whole number, as in a mask of
            booleans.
        NotImplementedError: A layer is of another kind, stands in several places or norms several
            heads together, or the model has a bias or a mask for each head.

    Reference:
        Michel et al. 2019, "Are Sixteen Heads Really Better than One?", section 4.
        https://arxiv.org/abs/1905.10650
    """
    if not isinstance(model, SequenceModel):
        raise TypeError(f"model must be a SequenceModel, got {type(model).__name__}.")
    names = {f"blocks_{i}/attention": i for i in range(len(model.blocks))}
    layers = {path: model.blocks[i].attention for path, i in names.items()}
    check_heads(heads, {path: getattr(x, "num_heads", 1) for path, x in layers.items()})
    removed = {path: set(map(int, numbers)) for path, numbers in heads.items() if len(numbers)}
    if model.bias is not None and removed:
        raise NotImplementedError(
            f"heads cannot be removed beside bias={type(model.bias).__name__}, which has a part "
            "for each head."
        )
    for name in ("mask", "reach") if removed else ():
        rules = getattr(model, name)
        for rule in rules if isinstance(rules, Sequence) else (rules,):
            if rule is not None and _has_heads(rule):
                raise NotImplementedError(
                    f"heads cannot be removed beside {name}={rule!r}, which has a part for each "
                    "head."
                )
    blocks, params = list(model.blocks), dict(params)
    for path, numbers in removed.items():
        i, layer, name = names[path], layers[path], path.split("/")[0]
        if not isinstance(layer, MultiHeadAttention):
            raise NotImplementedError(
                f"heads of {path} cannot be removed: it is {type(layer).__name__}, not "
                "MultiHeadAttention."
            )
        places = [other for other, x in layers.items() if x is layer]
        if len(places) > 1:
            raise NotImplementedError(
                f"heads of {path} cannot be removed: its layer stands in several places, "
                f"{', '.join(places)}."
            )
        if "attention" not in params.get(name, {}):
            held = ", ".join(sorted(params)[:4])
            raise ValueError(f"params must hold {path} of the model: they hold {held}.")
        _check_norm(path, layer, params[name]["attention"])
        kept = [n for n in range(layer.num_heads) if n not in numbers]
        smaller, found = _without(layer, params[name]["attention"], kept)
        blocks[i] = blocks[i].clone(attention=smaller)
        params[name] = {**params[name], "attention": found}
    return model.clone(blocks=tuple(blocks)), params


def _has_heads(rule: Rule) -> bool:
    """Whether an array of a rule has an axis of several heads."""
    return any(
        x.shape[i] > 1
        for x, axes in rule.arrays()
        if "N" in axes and x.ndim >= -(i := axes.index("N") - len(axes))
    )


def _check_norm(path: str, layer: MultiHeadAttention, params: PyTree) -> None:
    """Raises NotImplementedError for a norm of queries and keys that does not see a head alone."""
    if not callable(layer.qk_norm):
        return
    N, H = params["query"]["kernel"].shape[1:]
    norm, x = layer.qk_norm(name=None), jax.random.normal(jax.random.key(0), (1, N, H))
    variables = norm.init(jax.random.key(1), x)
    is_alone = all(leaf.shape == (H,) for leaf in jax.tree.leaves(variables))
    if is_alone:
        whole, first = norm.apply(variables, x), norm.apply(variables, x[:, :1])
        is_alone = np.allclose(whole[:, :1], first, rtol=1e-4, atol=1e-5)
    if not is_alone:
        raise NotImplementedError(
            f"heads of {path} cannot be removed: its qk_norm, {layer.qk_norm}, norms several heads "
            "together."
        )


def _without(layer: nn.Module, params: PyTree, kept: list[int]) -> tuple[nn.Module, PyTree]:
    """The layer with the heads that are kept, and its parameters."""
    N = layer.num_heads
    K = N if layer.num_kv_heads is None else layer.num_kv_heads
    H = params["query"]["kernel"].shape[-1]
    is_empty = not kept
    kept = np.array(kept or [0])
    groups = kept // (N // K)
    key_heads, counts = np.unique(groups, return_counts=True)
    if len(set(counts)) > 1:
        key_heads = groups  # One for each query head.
    found = dict(params)

    def take(name, heads, axis):
        found[name] = {
            # A kernel is [D, heads, H], a bias [heads, H].
            part: jnp.take(x, heads, axis=axis if part == "kernel" else 0)
            for part, x in params[name].items()
        }

    take("query", kept, 1)
    take("key", key_heads, 1)
    take("value", key_heads, 1)
    found["out"] = {**params["out"], "kernel": jnp.take(params["out"]["kernel"], kept, axis=0)}
    if is_empty:
        found["out"]["kernel"] = jax.tree.map(jnp.zeros_like, found["out"]["kernel"])
    for name in ("sinks", *layer.learnt):
        if name in params:
            found[name] = params[name][kept]
    sizes = {"num_heads": len(kept), "num_kv_heads": len(key_heads), "head_dim": H}
    return layer.clone(**sizes), found
