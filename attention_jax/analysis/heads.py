"""The heads of a model: their gates, their importance, what happens without them.

A gate multiplies what a head gives to the output projection of its layer: 1 leaves the head, 0
removes it. Gates work on every layer that mixes heads by a projection `out`, in any linen model.
"""

import functools
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from attention_jax.analysis.maps import check_tokens, sown
from attention_jax.checks import as_array, check_word, told
from attention_jax.types import Array, PyTree

# The path of a layer, as "blocks_0/attention", and one number for each of its heads.
Gates = Mapping[str, Array]
Loss = Callable[[Array], Array]
# How many positions, of all rows, a CPU computes side by side.
_POSITIONS = 2048
_SOWN = "mean_output"


def apply_with_gates(
    model: nn.Module,
    params: PyTree,
    inputs: Array,
    gates: Gates,
    *,
    means: Mapping[str, Array] | None = None,
    **options: Any,
) -> Array:
    """The outputs of a model whose heads are multiplied by gates.

    Args:
        model, params: Any model of linen with attention layers.
        inputs: Of the model.
        gates: `[N]` for some layers, by their paths, or `[B, N]`, a number for each row; other
            layers stay as they are.
        means: `[N, V]` for each layer: what a head gives when its gate is 0. None is zeros.
        **options: Of the model's call, as `mask`.

    Raises:
        ValueError: A gate names no layer, or has the wrong number of heads.
    """
    used = set()

    def gate(mixed: Array, path: str) -> Array:
        if path not in gates:
            return mixed
        used.add(path)
        # Their gradients sum over positions, so gates have 32 bits at least.
        dtype, N = jnp.promote_types(mixed.dtype, jnp.float32), mixed.shape[-2]
        kept = jnp.asarray(gates[path], dtype)
        each_row = (mixed.shape[0], N) if mixed.ndim > 3 else None
        if kept.shape not in ((N,), each_row):
            more = " for inputs without an axis of rows" if mixed.ndim == 3 else ""
            raise ValueError(
                f"gates must have one number for each of the {N} heads of {path}, got shape "
                f"{kept.shape}{more}."
            )
        ones = (1,) * (mixed.ndim - 2 - len(kept.shape[:-1]))
        kept = kept.reshape(*kept.shape[:-1], *ones, N, 1)
        changed = kept * mixed if means is None else kept * mixed + (1 - kept) * means[path]
        return changed.astype(mixed.dtype)

    with _at_outputs(gate):
        found = model.apply({"params": params}, inputs, **options)
    if left := sorted(set(gates) - used):
        raise ValueError(f"gates name layers that the model does not run: {', '.join(left)}.")
    return found


def heads_of(model: nn.Module, params: PyTree, inputs: Array, **options: Any) -> dict[str, int]:
    """The number of heads of each attention layer, by its path, in the order of the model."""
    found = {}

    def note(mixed, path):
        found[path] = mixed.shape[-2]
        return mixed

    with _at_outputs(note):
        jax.eval_shape(
            lambda params, inputs: model.apply({"params": params}, inputs, **options),
            params,
            inputs,
        )
    return found


def gated_heads(model: nn.Module, params: PyTree, inputs: Array, **options: Any) -> dict[str, int]:
    """`heads_of`, or a NotImplementedError if there are none."""
    check_tokens(model, inputs)
    found = heads_of(model, params, inputs, **options)
    if not found:
        raise NotImplementedError(
            "model must have heads with gates, which are those of layers that mix them by a "
            f"projection named out, got {type(model).__name__} without one."
        )
    return found


def mean_outputs(
    model: nn.Module,
    params: PyTree,
    inputs: Array,
    *,
    queries: Array | None = None,
    **options: Any,
) -> dict[str, Array]:
    """What each head gives on the average over rows and positions, `[N, V]`, by its layer.

    Of a layer that runs several times it is the average over all runs. All positions count, also
    with `output_positions`.

    Args:
        model, params, inputs, **options: As in `apply_with_gates`.
        queries: Boolean `[B, T]`: which positions count, as those that are no padding. None: all
            do.

    Raises:
        ValueError: `queries` has another type or shape, or counts no position.
    """
    options.pop("output_positions", None)
    if queries is not None:
        queries = as_array("queries", queries)
        if queries.dtype != bool:
            raise ValueError(f"queries must be boolean, got {told(queries)}.")
        if not isinstance(queries, jax.core.Tracer) and not queries.any():
            raise ValueError("queries must count a position, got False for all.")

    def intercept(run, arguments, named, context):
        if _is_out(context):
            mixed = arguments[0]
            counted = jnp.ones(mixed.shape[:-2], bool) if queries is None else queries
            if counted.shape != mixed.shape[:-2]:
                raise ValueError(
                    f"queries must have the shape {mixed.shape[:-2]} of the positions of "
                    f"{'/'.join(context.module.path[:-1])}, got {counted.shape}."
                )
            mean = mixed.mean(tuple(range(mixed.ndim - 2)), where=counted[..., None, None])
            context.module.sow("intermediates", _SOWN, mean)
        return run(*arguments, **named)

    found: dict[str, list[Array]] = {}
    for path, mean in sown(model, params, inputs, intercept, _SOWN, **options).items():
        # Under `nn.scan` there is one for each run.
        mean = mean.reshape(-1, *mean.shape[-2:]).mean(0)
        found.setdefault(path.rpartition("/")[0], []).append(mean)
    return {path: jnp.stack(means).mean(0) for path, means in found.items()}


def importance(
    model: nn.Module, params: PyTree, inputs: Array, loss: Loss, **options: Any
) -> dict[str, Array]:
    """How much each head matters, by one gradient: the mean over rows of |d loss / d gate|.

    Args:
        model, params, inputs, **options: As in `apply_with_gates`; the first axis of the inputs is
            that of the rows.
        loss: From the outputs to the loss of each row, `[B]`.

    Returns:
        `[N]` for each layer, by its path.

    Raises:
        ValueError: The loss gives other than a number for each row.
        NotImplementedError: No head of the model has a gate.

    Reference:
        Michel et al. 2019, "Are Sixteen Heads Really Better than One?", equation 2.
        https://arxiv.org/abs/1905.10650
    """
    gates = _open(gated_heads(model, params, inputs, **options))
    inputs = as_array("inputs", inputs)
    rows = inputs.shape[0]

    @jax.jit
    def of_rows(params, inputs):
        # Each row has gates of its own, so one pass gives the gradient of each.
        def losses(gates):
            outputs = apply_with_gates(model, params, inputs, gates, **options)
            return of_each_row(loss, outputs, inputs).sum()

        each = jax.tree.map(lambda gate: jnp.broadcast_to(gate, (rows, *gate.shape)), gates)
        return jax.tree.map(lambda grad: jnp.abs(grad).mean(0), jax.grad(losses)(each))

    return of_rows(params, inputs)


def of_each_row(loss: Loss, outputs: Array, inputs: PyTree) -> Array:
    """The loss of each row, `[B]`; ValueError if `loss` gives something else."""
    found, rows = loss(outputs), jax.tree.leaves(inputs)[0].shape[0]
    if jnp.shape(found) != (rows,):
        raise ValueError(
            f"loss must give a number for each of the {rows} rows, got shape {jnp.shape(found)}."
        )
    return found


def ablation(
    model: nn.Module,
    params: PyTree,
    inputs: Array,
    loss: Loss,
    *,
    by: str | Mapping[str, Array] = "zero",
    pairs: bool = False,
    **options: Any,
) -> dict[str, Array] | Array:
    """The mean loss without each head, all heads in one program.

    A layer is computed once for all heads of it and of later layers; behind the head that is
    removed the model runs for each of them, side by side as far as a CPU's cache holds them.

    Args:
        model, params, inputs, loss, **options: As in `importance`.
        by: What stands for a removed head: "zero"; "mean", its mean over all rows and positions; or
            means, as `mean_outputs` gives them for other rows or without padding.
        pairs: Removes every two heads together.

    Returns:
        `[N]` for each layer, by its path. With `pairs` a matrix `[heads, heads]`, heads counted
        through all layers; its diagonal is that of single heads.

    Raises:
        ValueError: `by` is another word or lacks a layer, or the loss gives other than a number for
            each row.
        NotImplementedError: No head of the model has a gate.
    """
    counts = gated_heads(model, params, inputs, **options)
    gates = _open(counts)
    if not isinstance(by, Mapping):
        check_word("by", by, ("zero", "mean"))
    elif set(by) != set(counts):
        raise ValueError(f"by must have means of the layers {tuple(counts)}, got {tuple(by)}.")

    def without(params, inputs, means, removed):
        """The loss where the gates of `removed` replace those of their layers."""
        run = apply_with_gates(model, params, inputs, {**gates, **removed}, means=means, **options)
        return of_each_row(loss, run, inputs).mean()

    @jax.jit
    def all_heads(params, inputs, means):
        if by == "mean":
            means = mean_outputs(model, params, inputs, **options)
        one = functools.partial(without, params, inputs, means)
        if not pairs:
            # Gates of one layer alone are mapped: what comes before stays one computation, which
            # XLA moves out of the loop.
            return {
                path: jax.lax.map(
                    lambda gate, path=path: one({path: gate}),
                    1 - jnp.eye(count),
                    batch_size=_side_by_side(count, inputs),
                )
                for path, count in counts.items()
            }
        closed = 1 - jnp.eye(sum(counts.values()))  # [heads, heads]

        def both(i, j):
            flat, parts, start = closed[i] * closed[j], {}, 0
            for path, count in counts.items():
                parts[path] = flat[start : start + count]
                start += count
            return one(parts)

        heads = jnp.arange(len(closed))
        size = _side_by_side(len(closed), inputs)
        row = lambda i: jax.lax.map(lambda j: both(i, j), heads, batch_size=size)
        return jax.lax.map(row, heads)

    return all_heads(params, inputs, dict(by) if isinstance(by, Mapping) else None)


def _side_by_side(count: int, inputs: PyTree) -> int:
    """How many of the `count` heads of a layer to remove side by side; it divides `count`.

    Side by side they read the parameters once. On a CPU a head at a time is faster where one fills
    the cores, because its numbers stay in the cache.
    """
    if jax.default_backend() != "cpu":
        return count
    positions = 1
    for x in jax.tree.leaves(inputs):
        is_tokens = jnp.issubdtype(jnp.result_type(x), jnp.integer)
        positions = max(positions, math.prod(jnp.shape(x) if is_tokens else jnp.shape(x)[:-1]))
    most = max(1, _POSITIONS // positions)
    return max(n for n in range(1, count + 1) if count % n == 0 and n <= most)


def _open(counts: Mapping[str, int]) -> dict[str, Array]:
    return {path: jnp.ones(count) for path, count in counts.items()}


def _at_outputs(change: Callable[[Array, str], Array]):
    """A context in which the input `[..., T, N, V]` of every `out` projection is changed."""

    def intercept(run, arguments, options, context):
        if not _is_out(context):
            return run(*arguments, **options)
        mixed, *rest = arguments
        return run(change(mixed, "/".join(context.module.path[:-1])), *rest, **options)

    return nn.intercept_methods(intercept)


def _is_out(context) -> bool:
    """Whether a call is that of an `out` projection of several heads."""
    module = context.module
    return (
        context.method_name == "__call__"
        and isinstance(module, nn.DenseGeneral)
        and module.name == "out"
        and module.axis in ((-2, -1), [-2, -1])
    )


def check_heads(heads: Mapping[str, Any], counts: Mapping[str, int]) -> None:
    """Raises an error unless `heads` names heads of layers that there are, by their numbers."""
    if not isinstance(heads, Mapping):
        raise TypeError(
            f"heads must be numbers by the path of their layer, as {{{next(iter(counts), '')!r}: "
            f"[0]}}, got {told(heads)}."
        )
    for path, numbers in heads.items():
        if path not in counts:
            raise ValueError(f"heads name the layer {path!r}, but there are {tuple(counts)}.")
        if hasattr(numbers, "shape"):
            numbers = np.asarray(numbers).tolist()
        if isinstance(numbers, str) or not isinstance(numbers, Iterable):
            raise TypeError(f"heads of {path} must be numbers in a list, got {told(numbers)}.")
        for number in numbers:
            # A mask of booleans would name the heads 0 and 1.
            if isinstance(number, bool | np.bool_) or not hasattr(number, "__index__"):
                raise TypeError(f"heads of {path} must be whole numbers, got {told(number)}.")
            if not 0 <= number < counts[path]:
                raise ValueError(
                    f"heads of {path} must be numbers below {counts[path]}, got {told(number)}."
                )
