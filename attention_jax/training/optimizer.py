"""Learning rates, optimizers, and those that skip bad steps."""

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.tree_util import keystr, tree_map_with_path
from optax import contrib

from attention_jax.types import Array, PyTree


def make_schedule(
    learning_rate: float | Array,
    *,
    schedule: str = "constant",
    warmup_steps: int | Array = 0,
    total_steps: int | Array | None = None,
    begin: int | Array = 0,
) -> optax.Schedule:
    """Learning rate as a function of the step.

    It rises linearly to `learning_rate` over the first `warmup_steps`, and is above 0 at the first
    step. Then it stays (`"constant"`), or falls to 0 at `total_steps` along half a cosine
    (`"cosine"`).

    Args:
        learning_rate, warmup_steps: May be traced, and are then not checked.
        schedule: `"constant"` or `"cosine"`.
        total_steps: Where a cosine ends; may be traced.
        begin: The cosine begins behind the warmup, and not before this step. May be traced.

    Raises:
        ValueError: An unknown schedule, a negative number, or a cosine without room to fall.
    """
    if schedule not in ("constant", "cosine"):
        raise ValueError(f"schedule must be 'constant' or 'cosine': got {schedule!r}.")
    if not (_holds(learning_rate, lambda x: x >= 0) and _holds(warmup_steps, lambda x: x >= 0)):
        raise ValueError(
            f"learning_rate and warmup_steps must not be negative: got {learning_rate} and "
            f"{warmup_steps}."
        )
    if schedule == "cosine" and (
        total_steps is None
        or not (_is_traced(total_steps) or _holds(warmup_steps, lambda x: x < total_steps))
    ):
        raise ValueError(
            f"a cosine needs total_steps > warmup_steps: got {total_steps=}, {warmup_steps=}."
        )

    def rate(step: Array) -> Array:
        warmup = jnp.minimum(1.0, (step + 1) / jnp.maximum(warmup_steps, 1))
        if schedule == "constant":
            return learning_rate * warmup
        first = jnp.maximum(warmup_steps, begin)
        progress = jnp.clip((step - first) / jnp.maximum(total_steps - first, 1), 0.0, 1.0)
        return learning_rate * warmup * 0.5 * (1 + jnp.cos(jnp.pi * progress))

    return rate


def make_optimizer(
    name: str = "adam",
    *,
    learning_rate: float | Array = 1e-3,
    schedule: str = "constant",
    warmup_steps: int | Array = 0,
    total_steps: int | None = None,
    budget: bool = False,
    weight_decay: float | Array = 0.0,
    decay: str = "matrices",
    clip_norm: float | Array = 0.0,
    momentum: float | Array = 0.0,
    b1: float = 0.9,
    b2: float = 0.999,
) -> optax.GradientTransformation:
    """Builds an optimizer from plain settings.

    Args:
        name: `"adam"`, `"adamw"`, `"muon"` or `"sgd"`; for muon see `scale_by_muon`.
        learning_rate, schedule, warmup_steps, total_steps: See `make_schedule`. These and the
            numbers below may be traced, so that many trials are one program.
        budget: Keeps `total_steps` in the state, where `with_budget` puts it later, so that it is
            no part of the program. Until then a cosine does not begin.
        weight_decay: Shrinks parameters by this fraction of the learning rate per step; not for
            adam.
        decay: Which parameters shrink: `"matrices"`, see `is_matrix`, or `"all"`.
        clip_norm: Longer gradients are shortened to this norm. 0 turns it off.
        momentum: sgd only.
        b1, b2: How much Adam keeps of the means of gradients and of their squares; with muon, for
            the parameters that Adam takes. Not for sgd.

    Raises:
        ValueError: An unknown name, a number out of range, or a setting that the optimizer named
            would ignore.
    """
    if name not in ("adam", "adamw", "muon", "sgd"):
        raise ValueError(f"optimizer must be 'adam', 'adamw', 'muon' or 'sgd': got {name!r}.")
    if decay not in ("matrices", "all"):
        raise ValueError(f"decay must be 'matrices' or 'all': got {decay!r}.")
    if not (
        _holds(weight_decay, lambda x: x >= 0)
        and _holds(clip_norm, lambda x: x >= 0)
        and all(_holds(x, lambda x: 0 <= x < 1) for x in (momentum, b1, b2))
    ):
        raise ValueError(
            "weight_decay and clip_norm must not be negative, and momentum, b1 and b2 must lie in "
            f"[0, 1): got {weight_decay}, {clip_norm}, {momentum}, {b1} and {b2}."
        )
    has_decay, has_momentum = (_is_traced(x) or bool(x) for x in (weight_decay, momentum))
    if has_decay and name == "adam":
        raise ValueError(f"adam has no weight_decay, use adamw: got {weight_decay=}.")
    if has_momentum and name != "sgd":
        raise ValueError(f"momentum belongs to sgd, {name} has its own: got {momentum=}.")
    if name == "sgd" and (b1, b2) != (0.9, 0.999):
        raise ValueError(f"sgd has no b1 and b2: got {b1} and {b2}.")
    make_rate = functools.partial(
        make_schedule, learning_rate, schedule=schedule, warmup_steps=warmup_steps
    )
    if budget:
        step_size = scale_by_budget(make_rate)
    else:
        step_size = optax.scale_by_learning_rate(make_rate(total_steps=total_steps))
    if name == "sgd":
        direction = optax.trace(momentum) if has_momentum else optax.identity()
    elif name == "muon":
        direction = scale_by_muon(b1, b2)
    else:
        direction = optax.scale_by_adam(b1, b2)
    if _is_traced(clip_norm):
        clip = optax.clip_by_global_norm(jnp.where(clip_norm > 0, clip_norm, jnp.inf))
    else:
        clip = optax.clip_by_global_norm(clip_norm) if clip_norm else optax.identity()
    mask = None if decay == "all" else lambda params: tree_map_with_path(is_matrix, params)
    return optax.chain(
        clip,
        direction,
        optax.add_decayed_weights(weight_decay, mask) if has_decay else optax.identity(),
        step_size,
    )


def scale_by_muon(b1: float = 0.9, b2: float = 0.999) -> optax.GradientTransformation:
    """Muon for the kernels inside of blocks, Adam with `b1` and `b2` for all other parameters.

    Muon makes the singular values of a kernel's momentum nearly equal, so that a step changes all
    directions alike (Jordan et al. 2024,
    https://kellerjordan.github.io/posts/muon/). Its size is that of a step of Adam, so both share a
    learning rate (https://arxiv.org/abs/2502.16982, equation 4). The kernels of all heads of a
    projection are one matrix. Embeddings, the kernel of the logits, convolutions, biases and scales
    take Adam, as both sources advise.
    """

    def shapes(params):
        return tree_map_with_path(_matrix_axes, params)

    def labels(params):
        is_leaf = lambda x: x is None or isinstance(x, contrib.MuonDimensionNumbers)
        name = lambda x: "adam" if x is None else "muon"
        return jax.tree.map(name, shapes(params), is_leaf=is_leaf)

    def as_adam(path, update):
        columns = math.prod(update.shape[i] for i in _matrix_axes(path, update).output_axis)
        return 0.2 * max(columns, update.size // columns) ** 0.5 * update

    muon = optax.chain(
        contrib.scale_by_muon(weight_dimension_numbers=shapes),
        optax.stateless(lambda updates, params: tree_map_with_path(as_adam, updates)),
    )
    return optax.partition({"muon": muon, "adam": optax.scale_by_adam(b1, b2)}, labels)


def _matrix_axes(path, parameter):
    """Over which axes a kernel inside of a block sums, and which it makes; None for others."""
    *_, layer, name = "", *keystr(path, simple=True, separator="/").split("/")
    if name != "kernel" or layer in ("head", "conv") or parameter.ndim < 2:
        return None
    axes = tuple(range(parameter.ndim))
    summed = -1 if layer == "out" else 1
    return contrib.MuonDimensionNumbers(axes[:summed], axes[summed:])


class BudgetState(NamedTuple):
    """The state of `scale_by_budget`.

    Attributes:
        count: Steps done, int32 scalar.
        begin, end: Between which steps a cosine falls, int32 scalars; the largest numbers until
            the end is known.
    """

    count: Array
    begin: Array
    end: Array


_OPEN = 2**31 - 1


def scale_by_budget(
    make_rate: Callable[..., optax.Schedule],
) -> optax.GradientTransformation:
    """`optax.scale_by_learning_rate`, with the steps of the schedule in its state.

    Args:
        make_rate: `make_schedule`, to be called with `total_steps` and `begin`.
    """

    def init(params: PyTree) -> BudgetState:
        return BudgetState(jnp.int32(0), jnp.int32(_OPEN), jnp.int32(_OPEN))

    def update(
        updates: PyTree, state: BudgetState, params: PyTree | None = None
    ) -> tuple[PyTree, BudgetState]:
        rate = make_rate(total_steps=state.end, begin=state.begin)(state.count)
        updates = jax.tree.map(lambda x: x * jnp.asarray(-rate, x.dtype), updates)
        return updates, state._replace(count=state.count + 1)

    return optax.GradientTransformation(init, update)


def budget_end(opt_state: PyTree) -> int | None:
    """Where the schedule of an optimizer with a budget ends; None if this is open."""
    is_budget = lambda x: isinstance(x, BudgetState)
    states = [x for x in jax.tree.leaves(opt_state, is_leaf=is_budget) if is_budget(x)]
    end = int(states[0].end)
    return None if end == _OPEN else end


def with_budget(opt_state: PyTree, end: int, begin: int | None = None) -> PyTree:
    """The state of an optimizer with a budget, whose cosine falls between these steps.

    Args:
        opt_state: The state before.
        end, begin: Steps. Without `begin` it stays.
    """
    steps = {name: jnp.int32(x) for name, x in (("end", end), ("begin", begin)) if x is not None}
    is_budget = lambda x: isinstance(x, BudgetState)
    put = lambda x: x._replace(**steps) if is_budget(x) else x
    return jax.tree.map(put, opt_state, is_leaf=is_budget)


def is_matrix(path: tuple, parameter: Array) -> bool:
    """Whether a parameter multiplies features: kernels, embeddings and convolutions.

    Such a parameter has two axes or more. Some biases have two axes too, those of heads `[N, H]`
    and the table of relative positions; their names exclude them. Biases, scales of norms, sinks
    and rates do not decay, as is usual for transformers.

    Args:
        path: Of the parameter in its tree, as `jax.tree_util` has it.
        parameter: The array, or its shape.
    """
    name = keystr(path[-1:], simple=True)
    return parameter.ndim >= 2 and not name.endswith("bias")


def _is_traced(value: float | Array) -> bool:
    return isinstance(value, jax.core.Tracer)


def _holds(value: float | Array, rule: Callable[[float], bool]) -> bool:
    """Whether a number keeps a rule; a traced number is not checked."""
    return _is_traced(value) or rule(value)


class SkipState(NamedTuple):
    """The state of an optimizer made by `skipping`.

    Attributes:
        inner: That of the optimizer itself.
        bad_steps: Steps skipped since the last sound one, int32 scalar.
    """

    inner: PyTree
    bad_steps: Array


def skipping(optimizer: optax.GradientTransformation) -> optax.GradientTransformation:
    """The optimizer for a run that skips bad steps.

    At a bad step `make_train_step` then keeps parameters and optimizer state bit for bit, and
    counts it. `state.step` goes on, and with it the data and the dropout key. The caller decides
    when to give up: see `check_finite`.
    """

    def init(params: PyTree) -> SkipState:
        return SkipState(optimizer.init(params), jnp.zeros((), jnp.int32))

    def update(
        grads: PyTree, state: SkipState, params: PyTree | None = None
    ) -> tuple[PyTree, SkipState]:
        updates, inner = optimizer.update(grads, state.inner, params)
        return updates, state._replace(inner=inner)

    return optax.GradientTransformation(init, update)
