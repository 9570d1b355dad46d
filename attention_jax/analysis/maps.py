"""Attention maps: the weights of every layer and head, and what they say in numbers."""

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax.traverse_util import flatten_dict

from attention_jax.checks import told
from attention_jax.models import as_static
from attention_jax.types import Array, PyTree

# The path of a layer, as "blocks_0/attention", and its weights `[..., N, T, S]`.
Maps = Mapping[str, Array]
_SOWN = "attention_weights"


def attention_maps(
    model: nn.Module, params: PyTree, inputs: Array, **options: Any
) -> dict[str, Array]:
    """The attention weights of every layer that can show them.

    Args:
        model, params: Any model of linen, whose attention layers are ours or flax's.
        inputs: Of the model.
        **options: Of the model's call, as `mask`.

    Returns:
        `[..., N, T, S]` for each layer, by its path, as `"blocks_0/attention"`. A layer that runs
        several times has `[0]`, `[1]` after its path. A layer without weights, as that of linear
        attention, is left out.

    Raises:
        ValueError: A token is not in the vocabulary.
        NotImplementedError: No layer of the model can show its weights.
    """
    check_tokens(model, inputs)
    # Words and flags decide what is compiled; arrays and masks are data.
    words = {k: v for k, v in options.items() if v is None or isinstance(v, bool | str)}
    data = {k: v for k, v in options.items() if k not in words}
    found = _compiled(as_static(model), params, inputs, data, tuple(words.items()))
    if not found:
        layers = attention_layers(model, params, inputs, **options)
        raise NotImplementedError(
            "model must have layers that can show their weights, got "
            f"{', '.join(layers) or type(model).__name__}."
        )
    # jit has put them into the order of the alphabet.
    return dict(sorted(found.items(), key=lambda item: _in_order(item[0])))


@functools.partial(jax.jit, static_argnames=("model", "words"))
def _compiled(model, params, inputs, data, words):
    return sown(model, params, inputs, _with_weights, _SOWN, **data, **dict(words))


def sown(
    model: nn.Module, params: PyTree, inputs: Array, intercept: Callable, name: str, **options: Any
) -> dict[str, Any]:
    """What the layers of a model sow under a name, where an interceptor makes them do so.

    Values that are sown pass `nn.remat`. A value that an interceptor kept would be a leaked tracer.

    Returns:
        By the path of the layer, in the order of the model; with `[0]`, `[1]` behind the path of a
        layer that runs several times.
    """
    check_tokens(model, inputs)
    with nn.intercept_methods(intercept):
        options["mutable"] = ["intermediates"]
        _, state = model.apply({"params": params}, inputs, **options)
    found = {}
    for path, values in flatten_dict(dict(state).get("intermediates", {})).items():
        if path[-1] == name:
            for i, value in enumerate(values):
                found["/".join(path[:-1]) + (f"[{i}]" if len(values) > 1 else "")] = value
    return dict(sorted(found.items(), key=lambda item: _in_order(item[0])))


def check_tokens(model: nn.Module, inputs: PyTree) -> None:
    """Raises ValueError for a known token that an embedding turns into NaN."""
    size = getattr(getattr(model, "embedding", None), "num_embeddings", None)
    if size is None or not hasattr(inputs, "dtype") or isinstance(inputs, jax.core.Tracer):
        return
    if jnp.issubdtype(inputs.dtype, jnp.integer) and inputs.size:
        least, most = int(inputs.min()), int(inputs.max())
        if most >= size or least < -size:
            wrong = most if most >= size else least
            raise ValueError(f"inputs must be tokens from 0 to {size - 1}, got {wrong}.")


def attention_layers(model, params, inputs, **options):
    """What the attention layers of a model are, as `MultiHeadAttention with linear_attention`."""
    found = {}

    def note(run, arguments, named, context):
        layer = context.module
        if layer.name == "attention" or hasattr(layer, "attention_fn"):
            name, function = type(layer).__name__, getattr(layer, "attention_fn", None)
            of = getattr(function, "__name__", None) or type(function).__name__
            library = str(getattr(function, "__module__", "")).partition(".")[0]
            of += "" if library == "attention_jax" else f" of {library}"
            found[name if function is None else f"{name} with {of}"] = None
        return run(*arguments, **named)

    with nn.intercept_methods(note):
        jax.eval_shape(lambda: model.apply({"params": params}, inputs, **options))
    return list(found)


def _in_order(path):
    """Numbers in a path count as numbers: blocks_2 comes before blocks_10."""
    digits = "".join(letter if letter.isdigit() else " " for letter in path).split()
    return [int(number) for number in digits], path


def _with_weights(run, arguments, options, context):
    """Calls a layer with `sow_weights=True`."""
    if context.method_name != "__call__":
        return run(*arguments, **options)
    signature = inspect.signature(run)
    attention_fn = getattr(context.module, "attention_fn", None)
    # Blocks and models pass the word on; only the layer itself knows whether it has weights.
    is_layer = attention_fn is not None
    is_ours = type(context.module).__module__.startswith("attention_jax.")
    if "sow_weights" not in signature.parameters or not is_layer:
        return run(*arguments, **options)
    if is_ours and not hasattr(attention_fn, "weights"):
        return run(*arguments, **options)
    bound = signature.bind(*arguments, **options)
    bound.arguments["sow_weights"] = True
    return run(*bound.args, **bound.kwargs)


def map_statistics(maps: Maps, *, queries: Array | None = None) -> dict[str, dict[str, np.ndarray]]:
    """What the weights of each head are on the average over rows and queries.

    The names are those of `AttentionStatistics`. Queries that see no key do not count.

    Args:
        maps: `[..., N, T, S]` for each layer, as `attention_maps` gives them.
        queries: Boolean `[..., T]`: which count, as those that are no padding. None: all do.

    Returns:
        For each layer, `[N]` by name: `entropy` in nats, `largest` weight, mean `distance` to the
        keys, and the weights `to_self`, `to_previous` and `to_first`. What the weights of a query
        lack to 1 is a sink's, which the entropy counts. The entropy is NaN for a head with weights
        below 0 or a sum above 1, as in differential and sigmoid attention.

    Raises:
        ValueError: Weights have fewer than three axes, or `queries` other ones.
    """
    return {path: _statistics(path, weights, queries) for path, weights in maps.items()}


def _statistics(path, weights, queries):
    shape, dtype = np.shape(weights), jnp.result_type(weights)
    rounding = max(1e-5, 2 * jnp.finfo(dtype).eps if jnp.issubdtype(dtype, jnp.floating) else 0)
    weights = as_weights(path, weights)
    _, _, T, S = weights.shape
    t, s = np.arange(T)[:, None], np.arange(S)
    counts = weights.any(-1)  # [B, N, T]
    if queries is not None:
        queries = np.asarray(queries)
        if queries.dtype != bool or queries.shape != (*shape[:-3], T):
            raise ValueError(
                f"queries must be boolean {(*shape[:-3], T)} for {path}, got {queries.dtype} "
                f"{queries.shape}."
            )
        counts = counts & queries.reshape(-1, 1, T)
    total = np.maximum(counts.sum((0, 2)), 1)
    mean = lambda of_queries: np.where(counts, of_queries, 0).sum((0, 2)) / total
    rest = 1 - weights.sum(-1)
    rest = np.where(abs(rest) < rounding, 0, rest)
    parts = np.concatenate([weights, rest[..., None]], -1)
    is_below = counts[..., None] & (parts < 0)
    logs = np.log(np.where(parts > 0, parts, 1))
    entropy = mean(-(parts * logs).sum(-1))
    at = lambda places: (weights * places).sum(-1)
    return {
        "entropy": np.where(is_below.any((0, 2, 3)), np.nan, entropy),
        "largest": mean(weights.max(-1, initial=0)),
        "distance": mean(at(np.abs(t - s))),
        "to_self": mean(at(t == s)),
        "to_previous": mean(at(t == s + 1)),
        "to_first": mean(at(s == 0)),
    }


def as_weights(path: str, weights: Array) -> np.ndarray:
    """The weights of a layer as float64 `[B, N, T, S]`."""
    weights = np.asarray(weights).astype(np.float64)
    if weights.ndim < 3:
        raise ValueError(f"maps must be [..., N, T, S], got {told(weights)} for {path}.")
    return weights.reshape(-1, *weights.shape[-3:])
