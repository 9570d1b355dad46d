"""The training step: pure functions `(state, batch) -> (state, metrics)`.

This module does not depend on models, devices or files. A step gets a loss function

    loss_fn(params, batch, rng) -> (loss, sums)

where `rng` is the dropout key (None: no dropout) and `loss` is a *sum* over the batch. `sums` holds
the total weight, `"weight"`, and further sums to report, such as `"accuracy"`. Sums can be added
over micro-batches, devices and held-out batches; means cannot.

A step is bad if its loss or gradient is not finite, or its new parameters or optimizer state. Its
metrics say so, and `check_finite` raises. An optimizer made by `skipping` drops the update of a bad
step; any other applies it.
"""

from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import numpy as np
import optax

from attention_jax.checks import as_rng, jax_defaults
from attention_jax.training.optimizer import SkipState
from attention_jax.types import Array, Batch, PyTree, TrainState

Sums = dict[str, Array]
LossFn = Callable[[PyTree, Batch, Array | None], tuple[Array, Sums]]
Apply = Callable[[PyTree, Batch, Array | None], Array]

_SMALL = 2**18  # Numbers of an array that is sent with others.
# A count of bad steps above any limit: it marks a broken state.
_BROKEN = 2**31 - 1


def squared_error(apply: Apply) -> LossFn:
    """The loss of a continuous task: the squared error, averaged over the D coordinates.

    Args:
        apply: `(params, batch, rng) -> [B, T, D]`.

    Returns:
        A loss function with the sum `"weight"`.
    """

    def loss_fn(params: PyTree, batch: Batch, rng: Array | None) -> tuple[Array, Sums]:
        predictions = apply(params, batch, rng).astype(jnp.float32)
        error = jnp.square(predictions - batch.targets).mean(axis=-1)  # [B, T]
        return (batch.weights * error).sum(), {"weight": batch.weights.sum()}

    return loss_fn


def cross_entropy(apply: Apply) -> LossFn:
    """The loss of a token task: -log softmax(logits)[target], in float32.

    Args:
        apply: `(params, batch, rng) -> [B, P, vocab_size]`, logits at `batch.positions` alone.

    Returns:
        A loss function with the sums `"weight"` and `"accuracy"`: an answer is right if its logit
        is larger than all others.
    """

    def loss_fn(params: PyTree, batch: Batch, rng: Array | None) -> tuple[Array, Sums]:
        logits = apply(params, batch, rng).astype(jnp.float32)
        target_logits = jnp.take_along_axis(logits, batch.targets[..., None], axis=-1)[..., 0]
        error = jax.nn.logsumexp(logits, axis=-1) - target_logits  # [B, P]
        # The target's logit is the only largest one. On a CPU `argmax` is slower than the whole
        # loss.
        correct = (logits >= target_logits[..., None]).sum(axis=-1) == 1
        right = batch.weights * correct.astype(batch.weights.dtype)
        sums = {"weight": batch.weights.sum(), "accuracy": right.sum()}
        return (batch.weights * error).sum(), sums

    return loss_fn


# Task.loss -> the loss function of a model.
LOSSES: dict[str, Callable[[Apply], LossFn]] = {
    "squared_error": squared_error,
    "cross_entropy": cross_entropy,
}


def summarize(sums: Mapping[str, Array]) -> Sums:
    """Divides every sum by the weight: the sums of `make_eval_step` become metrics."""
    weight = sums["weight"]
    return {name: total if name == "weight" else total / weight for name, total in sums.items()}


def make_train_step(
    loss_fn: LossFn,
    optimizer: optax.GradientTransformation,
    *,
    axis_name: str | None = None,
    accumulate: int = 1,
    norms_of_parts: bool = False,
) -> Callable[[TrainState, Batch], tuple[TrainState, Sums]]:
    """Builds one optimizer step.

    Args:
        loss_fn: Gives sums, see above.
        optimizer: Sees the gradient of the mean loss, the total loss over the total weight.
        axis_name: Axis of the enclosing `jax.pmap`, over which every sum is taken.
        accumulate: Number of micro-batches to compute one after the other. The result is that of
            the whole batch; the memory is that of one micro-batch.
        norms_of_parts: Whether the metrics also hold the norm of each part's gradient, as
            `"grad_norm/blocks_0"` for the first block.

    Returns:
        `(state, batch) -> (state, metrics)`. The metrics are scalars: `"loss"`, `"weight"`, the
        other sums of `loss_fn` as means, `"grad_norm"`, before any clipping, and `"bad_steps"`, 0
        after a sound step. After a bad step it is 1, or with `skipping` the number of bad steps in
        a row. Without `skipping` only the metrics are checked here, because checking all parameters
        at every step takes time. `make_epoch` checks them after its last step. The dropout key is a
        function of `state.rng`, `state.step`, the device along `axis_name` and the micro-batch.

    Raises:
        ValueError: `accumulate` is below 1, or (on the first call) does not divide the batch.
    """
    if accumulate < 1:
        raise ValueError(f"accumulate must be at least 1: got {accumulate}.")

    def sums_and_grads(params: PyTree, batch: Batch, rng: Array) -> tuple[Sums, PyTree]:
        (loss, sums), grads = jax.value_and_grad(loss_fn, has_aux=True)(params, batch, rng)
        return {"loss": loss, **sums}, grads

    def accumulated(params: PyTree, batch: Batch, rng: Array) -> tuple[Sums, PyTree]:
        def add(total, micro):
            index, micro_batch = micro
            new = sums_and_grads(params, micro_batch, jax.random.fold_in(rng, index))
            return jax.tree.map(jnp.add, total, new), None

        micros = (jnp.arange(accumulate), split_rows(batch, accumulate))
        one = jax.tree.map(lambda x: x[0], micros[1])
        shapes = jax.eval_shape(sums_and_grads, params, one, rng)
        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
        return jax.lax.scan(add, zeros, micros)[0]

    def step(state: TrainState, batch: Batch) -> tuple[TrainState, Sums]:
        rng = jax.random.fold_in(as_rng("state.rng", state.rng), state.step)
        if axis_name is not None:
            rng = jax.random.fold_in(rng, jax.lax.axis_index(axis_name))
        compute = sums_and_grads if accumulate == 1 else accumulated
        sums, grads = compute(state.params, batch, rng)
        # Sum first, divide last: a mean of per-device means is wrong as soon as the devices hold
        # different weights.
        if axis_name is not None:
            sums, grads = _sum_over(axis_name, (sums, grads))
        grads = jax.tree.map(lambda g: g / sums["weight"].astype(g.dtype), grads)
        with jax_defaults():  # optax takes powers of a float to a step.
            updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
            params = optax.apply_updates(state.params, updates)
        metrics = summarize(sums) | {"grad_norm": optax.tree.norm(grads)}
        if norms_of_parts:
            parts = {f"grad_norm/{name}": optax.tree.norm(part) for name, part in grads.items()}
            metrics |= parts
        sound = all_finite(metrics)
        if isinstance(opt_state, SkipState):
            sound &= all_finite((params, opt_state))
            keep = lambda new, old: jnp.where(sound, new, old)
            params = jax.tree.map(keep, params, state.params)
            inner = jax.tree.map(keep, opt_state.inner, state.opt_state.inner)
            opt_state = SkipState(inner, jnp.where(sound, 0, opt_state.bad_steps + 1))
            metrics["bad_steps"] = opt_state.bad_steps
        else:
            metrics["bad_steps"] = (~sound).astype(jnp.int32)
        return TrainState(state.step + 1, params, opt_state, state.rng), metrics

    return step


def _sum_over(axis_name: str, tree: PyTree) -> PyTree:
    """`jax.lax.psum`, which on a CPU sends small arrays of a type as one.

    XLA waits for all devices once per array there. Other compilers join small arrays themselves.
    """
    if jax.default_backend() != "cpu":
        return jax.lax.psum(tree, axis_name)
    leaves, structure = jax.tree.flatten(tree)
    small: dict[np.dtype, list[int]] = {}
    for i, leaf in enumerate(leaves):
        if leaf.size <= _SMALL:
            small.setdefault(leaf.dtype, []).append(i)
        else:
            leaves[i] = jax.lax.psum(leaf, axis_name)
    for places in small.values():
        parts = [leaves[i] for i in places]
        joined = jax.lax.psum(jnp.concatenate([part.ravel() for part in parts]), axis_name)
        ends = np.cumsum([part.size for part in parts])[:-1]
        for i, part, found in zip(places, parts, jnp.split(joined, ends), strict=True):
            leaves[i] = found.reshape(part.shape)
    return jax.tree.unflatten(structure, leaves)


def all_finite(tree: PyTree) -> Array:
    """Whether no array holds NaN or infinity, a boolean scalar; integers are finite."""
    leaves = [x for x in jax.tree.leaves(tree) if jnp.issubdtype(x.dtype, jnp.inexact)]
    return jnp.stack([jnp.isfinite(x).all() for x in leaves]).all() if leaves else jnp.array(True)


def make_eval_step(
    loss_fn: LossFn, *, axis_name: str | None = None
) -> Callable[[PyTree, Batch], Sums]:
    """Builds `(params, batch) -> sums`, without dropout.

    Add the sums over all batches, then `summarize` them.

    Args:
        loss_fn: As for `make_train_step`.
        axis_name: Likewise.
    """

    def step(params: PyTree, batch: Batch) -> Sums:
        loss, sums = loss_fn(params, batch, None)
        sums = {"loss": loss, **sums}
        return sums if axis_name is None else _sum_over(axis_name, sums)

    return step


def split_rows(batch: PyTree, parts: int) -> PyTree:
    """Cuts `[B, ...]` into `[parts, B / parts, ...]`; part i holds rows i, i + parts, ...

    Parts are strided, because neighbouring rows are on one device. If the rows of each device are a
    multiple of `parts`, each device holds its share of every part, and no rows are sent. If they
    are not, which `sharded` allows, the compiler moves rows.
    """

    def split(x: Array) -> Array:
        if x.shape[0] % parts:
            raise ValueError(
                f"a batch of {x.shape[0]} rows (per device) cannot be accumulated in {parts} parts."
            )
        return x.reshape(-1, parts, *x.shape[1:]).swapaxes(0, 1)

    return jax.tree.map(split, batch)


def make_epoch(
    train_step: Callable[[TrainState, Batch], tuple[TrainState, Sums]],
    sample: Callable[[Array, Array], Batch],
    num_steps: int,
    *,
    rng: Array,
    constrain: Callable[[Batch], Batch] = lambda batch: batch,
) -> Callable[[TrainState, Array], tuple[TrainState, Sums]]:
    """Builds one program of many steps, which makes a new batch for each step.

    Args:
        train_step: From `make_train_step`.
        sample: `Task.sample`.
        num_steps: Steps per call.
        rng: Key of the training data. The batch of step i is `sample(fold_in(rng, i), rows)`, with
            i counted over the whole run, so a resumed run sees the data of an uninterrupted one.
        constrain: `Launcher.constrain`, which splits the making of the batch over devices.

    Returns:
        `(state, rows [B]) -> (state, metrics)`, every metric with an axis `[num_steps]`. The last
        step is also bad if its new state is not finite.
    """

    def epoch(state: TrainState, rows: Array) -> tuple[TrainState, Sums]:
        def body(state: TrainState, _) -> tuple[TrainState, Sums]:
            return train_step(state, constrain(sample(jax.random.fold_in(rng, state.step), rows)))

        state, metrics = jax.lax.scan(body, state, length=num_steps)
        sound = all_finite((state.params, state.opt_state))
        last = jnp.where(sound, metrics["bad_steps"][-1], _BROKEN)
        return state, metrics | {"bad_steps": metrics["bad_steps"].at[-1].set(last)}

    return epoch


def make_evaluation(
    eval_step: Callable[[PyTree, Batch], Sums],
    sample: Callable[[Array, Array], Batch],
    num_batches: int,
    *,
    rng: Array,
    constrain: Callable[[Batch], Batch] = lambda batch: batch,
) -> Callable[[PyTree, Array], Sums]:
    """Builds the evaluation on `num_batches` held-out batches, the same ones at every call.

    Args:
        eval_step: From `make_eval_step`.
        sample, constrain: As for `make_epoch`.
        num_batches: At least 1.
        rng: Key of the held-out data; batch i is `sample(fold_in(rng, i), rows)`.

    Returns:
        `(params, rows [B]) -> metrics`, scalars.
    """

    def evaluate(params: PyTree, rows: Array) -> Sums:
        def body(_, index: Array) -> tuple[None, Sums]:
            batch = constrain(sample(jax.random.fold_in(rng, index), rows))
            return None, eval_step(params, batch)

        sums = jax.lax.scan(body, None, jnp.arange(num_batches))[1]
        return summarize(jax.tree.map(lambda x: x.sum(axis=0), sums))

    return evaluate


def check_finite(
    metrics: Mapping[str, np.ndarray], first_step: int, *, max_skipped: int = 0
) -> None:
    """Stops a run at a bad step.

    Args:
        metrics: `[num_steps]` arrays of one call of an epoch, fetched.
        first_step: The step that they begin with.
        max_skipped: How many bad steps in a row are allowed; above 0 only with `skipping`.

    Raises:
        FloatingPointError: There are more; it names the step and the numbers that are not finite.
    """
    step = first_bad_step(metrics, first_step, max_skipped=max_skipped)
    if step is not None:
        found = {name: values[step - first_step] for name, values in metrics.items()}
        update = "the parameters or the optimizer's state are not finite"
        reasons = not_finite(found) or update
        skipped = found["bad_steps"] - 1 if found["bad_steps"] < _BROKEN else 0
        after = f", after {skipped} skipped in a row" if skipped else ""
        raise FloatingPointError(f"training diverged at step {step}{after}: {reasons}.")


def first_bad_step(
    metrics: Mapping[str, np.ndarray], first_step: int, *, max_skipped: int = 0
) -> int | None:
    """The first step that ends a run, or None; arguments as for `check_finite`."""
    broken = np.asarray(metrics["bad_steps"]) > max_skipped
    return first_step + int(np.argmax(broken)) if broken.any() else None


def not_finite(metrics: Mapping[str, np.ndarray], prefix: str = "") -> str:
    """Names the numbers that are NaN or infinite; "" where all are finite.

    >>> not_finite({"loss": np.float32("nan"), "weight": np.float32(3)}, prefix="held-out ")
    'held-out loss is nan'
    """
    return ", ".join(f"{prefix}{name} is {x}" for name, x in metrics.items() if not np.isfinite(x))
