"""Promises of the training step: sums before means, whole batch or parts, whole run or pieces."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.tree_util import keystr

from attention_jax.training.launch import LAUNCHERS
from attention_jax.training.model import make_sequence_model
from attention_jax.training.optimizer import make_optimizer, make_schedule, skipping
from attention_jax.training.step import (
    check_finite,
    cross_entropy,
    make_epoch,
    make_eval_step,
    make_evaluation,
    make_train_step,
    squared_error,
    summarize,
)
from attention_jax.types import Batch, TrainState

D = 3
SGD = optax.sgd(0.1)


def sample(rng, rows):
    """Vectors to be mapped linearly; the weights differ from row to row, and some are 0."""
    inputs = jax.vmap(lambda row: jax.random.normal(jax.random.fold_in(rng, row), (2, D)))(rows)
    weights = jnp.broadcast_to((rows % 3)[:, None], (len(rows), 2)).astype(jnp.float32)
    return Batch(inputs, inputs[..., ::-1], weights)


def apply(params, batch, rng):
    return batch.inputs @ params["kernel"] + params["bias"]


def noisy_apply(params, batch, rng):
    """Stands for dropout: adds what the key says to the bias alone."""
    noise = 0.0 if rng is None else jax.random.normal(rng, (D,))
    return apply(params, batch, rng) + noise


def new_state(optimizer=SGD, seed=0):
    params = {"kernel": jnp.eye(D) * 0.5, "bias": jnp.arange(D) * 0.1}
    return TrainState(jnp.int32(0), params, optimizer.init(params), jax.random.key(seed))


BATCH = sample(jax.random.key(1), jnp.arange(12))


def test_step_descends_the_gradient_of_the_weighted_mean():
    train_step = jax.jit(make_train_step(squared_error(apply), SGD, norms_of_parts=True))
    state, metrics = train_step(new_state(), BATCH)

    def mean_loss(params):
        x, y, weight = (np.asarray(a, np.float64) for a in BATCH[:3])
        error = x @ params["kernel"] + params["bias"] - y
        return (weight * (error**2).mean(-1)).sum() / weight.sum()

    old = {k: np.asarray(v, np.float64) for k, v in new_state().params.items()}
    gradient = {k: np.zeros_like(v) for k, v in old.items()}
    for name, value in old.items():
        for index in np.ndindex(value.shape):
            for sign in (1, -1):
                value[index] += sign * 1e-4
                gradient[name][index] += sign * mean_loss(old) / 2e-4
                value[index] -= sign * 1e-4
    expected = {name: old[name] - 0.1 * gradient[name] for name in old}
    chex.assert_trees_all_close(state.params, expected, atol=1e-6)
    norm = np.sqrt(sum((g**2).sum() for g in gradient.values()))
    chex.assert_trees_all_close(
        metrics,
        {
            "loss": mean_loss(old),
            "weight": float(BATCH.weights.sum()),
            "grad_norm": norm,
            **{f"grad_norm/{name}": np.linalg.norm(g) for name, g in gradient.items()},
            "bad_steps": 0,
        },
        rtol=1e-5,
    )
    assert int(state.step) == 1


@pytest.mark.parametrize("accumulate", [2, 6])
def test_accumulation_is_the_whole_batch(accumulate):
    whole = jax.jit(make_train_step(squared_error(apply), SGD))
    parts = jax.jit(make_train_step(squared_error(apply), SGD, accumulate=accumulate))
    chex.assert_trees_all_close(
        parts(new_state(), BATCH)[0].params, whole(new_state(), BATCH)[0].params, rtol=1e-5
    )
    chex.assert_trees_all_close(
        parts(new_state(), BATCH)[1], whole(new_state(), BATCH)[1], rtol=1e-5
    )


def test_accumulation_refuses_a_remainder_and_nonsense():
    step = make_train_step(squared_error(apply), SGD, accumulate=5)
    with pytest.raises(ValueError, match=r"12 rows .* 5 parts"):
        step(new_state(), BATCH)
    with pytest.raises(ValueError, match="accumulate must be at least 1: got 0"):
        make_train_step(squared_error(apply), SGD, accumulate=0)


def test_dropout_key_changes_with_seed_step_and_part_only():
    seen = []

    def spy(params, batch, rng):
        jax.debug.callback(lambda key: seen.append(tuple(key.tolist())), jax.random.key_data(rng))
        return apply(params, batch, rng)

    def keys(state, accumulate=1):
        seen.clear()
        step = make_train_step(squared_error(spy), SGD, accumulate=accumulate)
        jax.block_until_ready(step(state, BATCH))
        jax.effects_barrier()
        return list(seen)

    state = new_state()
    all_keys = (
        keys(state)
        + keys(state._replace(step=jnp.int32(1)))
        + keys(new_state(seed=1))
        + keys(state, accumulate=2)
    )
    assert len(all_keys) == len(set(all_keys)) == 5
    assert keys(state) == all_keys[:1]


def test_evaluation_has_no_dropout_and_adds_up():
    eval_step = make_eval_step(squared_error(noisy_apply))
    params = new_state().params
    halves = [Batch(*(x[part] for x in BATCH[:3])) for part in (slice(0, 5), slice(5, 12))]
    whole = eval_step(params, BATCH)
    chex.assert_trees_all_close(
        jax.tree.map(jnp.add, *(eval_step(params, h) for h in halves)), whole, rtol=1e-5
    )

    rng, rows = jax.random.key(4), jnp.arange(5)
    evaluate = jax.jit(make_evaluation(eval_step, sample, 3, rng=rng))
    sums = [eval_step(params, sample(jax.random.fold_in(rng, i), rows)) for i in range(3)]
    expected = sum(s["loss"] for s in sums) / sum(s["weight"] for s in sums)
    chex.assert_trees_all_close(evaluate(params, rows)["loss"], expected, rtol=1e-5)
    chex.assert_trees_all_close(summarize(whole)["loss"], whole["loss"] / whole["weight"], rtol=0)


def test_cross_entropy_counts_by_weight():
    logits = jax.random.normal(jax.random.key(0), (2, 3, 7))
    targets = logits.argmax(-1).at[0, 0].set(0).at[1, 1].set(6)
    weights = jnp.array([[1.0, 0.5, 0.0], [2.0, 1.0, 1.0]])
    batch = Batch(inputs=targets, targets=targets, weights=weights)
    loss, sums = cross_entropy(lambda params, batch, rng: logits)(None, batch, None)
    expected = correct = 0.0
    for b, p in np.ndindex(2, 3):
        row = np.asarray(logits[b, p], np.float64)
        chance = np.exp(row[targets[b, p]]) / np.exp(row).sum()
        expected -= float(weights[b, p]) * np.log(chance)
        correct += float(weights[b, p]) * (row.argmax() == targets[b, p])
    chex.assert_trees_all_close(
        (loss, sums), (expected, {"weight": 5.5, "accuracy": correct}), rtol=1e-5
    )


@pytest.mark.parametrize("loss", [squared_error, cross_entropy])
def test_loss_is_summed_in_float32(loss):
    predictions = jnp.ones((40, 50, 2), jnp.bfloat16)
    targets = jnp.zeros((40, 50, 2) if loss is squared_error else (40, 50), jnp.int32)
    batch = Batch(targets, targets, jnp.ones((40, 50)))
    total, _ = loss(lambda *_: predictions)(None, batch, None)
    assert total.dtype == jnp.float32
    np.testing.assert_allclose(total, 2000 * (1 if loss is squared_error else np.log(2)), rtol=1e-5)


def test_run_in_pieces_is_the_run_in_one():
    optimizer = optax.adam(0.01)
    step = make_train_step(squared_error(noisy_apply), optimizer)
    rng, rows = jax.random.key(5), jnp.arange(4)
    long = jax.jit(make_epoch(step, sample, 6, rng=rng))
    short = jax.jit(make_epoch(step, sample, 2, rng=rng))
    state, whole = long(new_state(optimizer), rows)
    piece, pieces = new_state(optimizer), []
    for _ in range(3):
        piece, metrics = short(piece, rows)
        pieces.append(metrics)
    pieces = jax.tree.map(lambda *x: np.concatenate(x), *pieces)
    chex.assert_trees_all_equal(pieces, whole)
    chex.assert_trees_all_equal(piece.params, state.params)
    assert len(np.unique(whole["loss"])) == 6
    assert int(piece.step) == 6


def test_divergence_is_named_and_never_hidden():
    state = new_state()._replace(params={"kernel": jnp.full((D, D), jnp.nan), "bias": jnp.ones(D)})
    state, metrics = jax.jit(make_train_step(squared_error(apply), SGD))(state, BATCH)
    assert np.isnan(metrics["loss"])
    assert metrics["bad_steps"] == 1
    assert np.isnan(state.params["bias"]).all()
    metrics = {"loss": np.array([1.0, 2.0, np.nan]), "grad_norm": np.array([1.0, np.inf, np.nan])}
    metrics["bad_steps"] = np.array([0, 1, 1])
    with pytest.raises(FloatingPointError, match="diverged at step 41: grad_norm is inf"):
        check_finite(metrics, first_step=40)
    check_finite({"loss": np.ones(3), "bad_steps": np.zeros(3)}, first_step=0)


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("part", ["params", "opt_state"])
def test_an_update_that_no_loss_can_tell_of_is_bad(part, accumulate):
    """The last update breaks a parameter that no loss depends on, or the optimizer's state."""

    def update(grads, state, params=None):
        number, unused = state[0] + 1, jnp.where(state[0] == 2, jnp.inf, 0.0)
        if part == "params":
            grads, unused = grads | {"unused": unused}, state[1]
        return grads, (number, unused)

    optimizer = optax.GradientTransformation(lambda params: (jnp.int32(0), jnp.zeros(())), update)
    optimizer = optax.chain(optimizer, optax.sgd(0.1))
    start = new_state()
    params = start.params | {"unused": jnp.ones(())}
    start = TrainState(start.step, params, optimizer.init(params), start.rng)
    step = make_train_step(squared_error(apply), optimizer, accumulate=accumulate)
    rng, rows = jax.random.key(0), jnp.arange(4)
    _, metrics = jax.jit(make_epoch(step, sample, 2, rng=rng))(start, rows)
    check_finite(metrics, first_step=1)
    _, metrics = jax.jit(make_epoch(step, sample, 3, rng=rng))(start, rows)
    assert all(np.isfinite(values).all() for values in metrics.values()), "nor do the metrics tell"
    with pytest.raises(FloatingPointError, match=r"step 3: the parameters or .* not finite"):
        check_finite(metrics, first_step=1)


# Each makes one thing infinite where it is 1: the loss, the gradient, the parameters, the state.
PLACES = ["loss", "grads", "params", "opt_state"]


def breaking(place, when):
    """A loss function and an optimizer of which one breaks at the step numbers in `when`.

    The batch of step i is to have i in `positions`.
    """

    def is_bad(step):
        return jnp.isin(step, jnp.array(when))

    def loss_fn(params, batch, rng):
        total, sums = squared_error(noisy_apply)(params, batch, rng)
        bad = is_bad(batch.positions[0])
        if place == "loss":  # And NaN in only some rows, so in one micro-batch or device.
            rows = batch.weights[:, 0] == batch.weights.max()
            total += jnp.where(bad & rows, jnp.nan, 0.0).sum()
        if place == "grads":  # The square root has an infinite slope at 0.
            total += jnp.sqrt(jnp.where(bad, 0.0, 1.0) * params["kernel"][0, 0] ** 2)
        return total, sums

    def update(grads, state, params=None):
        broken = jnp.where(is_bad(state[0]), jnp.inf, 0.0)
        if place == "params":
            grads = jax.tree.map(lambda x: x + broken, grads)
        return grads, (state[0] + 1, broken if place == "opt_state" else state[1])

    breaks = optax.GradientTransformation(lambda params: (jnp.int32(0), jnp.zeros(())), update)
    return loss_fn, optax.chain(optax.adam(0.1), breaks)


def numbered_sample(step, rows):
    batch = sample(jax.random.fold_in(jax.random.key(3), step), rows)
    return batch._replace(positions=jnp.full(len(rows), step))


def as_bits(tree):
    return jax.tree.map(lambda x: np.asarray(x).tobytes(), tree)


@pytest.mark.parametrize("place", PLACES)
def test_a_bad_step_changes_nothing_but_the_step(place):
    loss_fn, optimizer = breaking(place, [1])
    optimizer = skipping(optimizer)
    step = jax.jit(make_train_step(loss_fn, optimizer, accumulate=2))
    before, metrics = step(new_state(optimizer), numbered_sample(0, jnp.arange(12)))
    assert metrics["bad_steps"] == 0
    before.params["kernel"] = before.params["kernel"].at[0, 1].set(-0.0)
    for number in (1, 2):
        after, metrics = step(before, numbered_sample(1, jnp.arange(12)))
        assert metrics["bad_steps"] == number
        assert as_bits((after.params, after.opt_state.inner)) == as_bits(
            (before.params, before.opt_state.inner)
        )
        assert (after.step, after.opt_state.bad_steps) == (before.step + 1, number)
        before = after
    # The optimizer's own count stands still meanwhile, so that it would break for ever.
    if place in ("loss", "grads"):
        after, metrics = step(before, numbered_sample(2, jnp.arange(12)))
        assert metrics["bad_steps"] == after.opt_state.bad_steps == 0
        assert (after.params["bias"] != before.params["bias"]).all()


@pytest.mark.parametrize("launcher", ["single", "pmap", "sharded"])
def test_a_run_with_bad_steps_is_the_run_of_the_sound_ones(launcher):
    """Only the step number, from which batch and dropout follow, tells them apart."""
    bad, launcher = [1, 4, 5], LAUNCHERS[launcher]()
    rows = launcher.put_batch(np.arange(16))
    loss_fn, optimizer = breaking("loss", bad)

    def run(optimizer, numbers):
        step = make_train_step(loss_fn, optimizer, axis_name=launcher.axis_name)
        run_step = launcher.compile(
            lambda state, rows: step(state, numbered_sample(state.step, rows))
        )
        state, found = launcher.put_state(new_state(optimizer)), []
        for number in numbers:
            state, metrics = run_step(state._replace(step=jnp.int32(number)), rows)
            found.append(int(metrics["bad_steps"]))
        return state, found

    skipped, counts = run(skipping(optimizer), range(8))
    assert counts == [0, 1, 0, 0, 1, 2, 0, 0]
    alone, _ = run(optimizer, [0, 2, 3, 6, 7])
    chex.assert_trees_all_close(skipped.params, alone.params, rtol=1e-6)
    chex.assert_trees_all_close(skipped.opt_state.inner, alone.opt_state, rtol=1e-6)


def test_bad_steps_in_a_row_are_counted_across_epochs():
    loss_fn, optimizer = breaking("loss", [1, 2, 3])
    optimizer = skipping(optimizer)
    step = make_train_step(loss_fn, optimizer)

    def epoch(state):
        make = lambda state, _: step(state, numbered_sample(state.step, jnp.arange(4)))
        return make_epoch(make, lambda rng, rows: None, 3, rng=jax.random.key(0))(state, None)

    first, one = jax.jit(epoch)(new_state(optimizer))
    _, two = jax.jit(epoch)(first)
    assert one["bad_steps"].tolist() + two["bad_steps"].tolist() == [0, 1, 2, 3, 0, 0]
    check_finite(one, 1, max_skipped=2)
    check_finite(two, 4, max_skipped=3)
    with pytest.raises(FloatingPointError, match="step 4, after 2 skipped in a row: loss is nan"):
        check_finite(two, 4, max_skipped=2)


def test_a_state_that_was_broken_before_is_never_let_pass():
    optimizer = skipping(SGD)
    state = new_state(optimizer)
    state = state._replace(params=state.params | {"unused": jnp.full((), jnp.inf)})
    state = state._replace(opt_state=optimizer.init(state.params))
    epoch = make_epoch(
        make_train_step(squared_error(apply), optimizer), sample, 2, rng=jax.random.key(0)
    )
    _, metrics = jax.jit(epoch)(state, jnp.arange(4))
    with pytest.raises(FloatingPointError, match="step 2: the parameters or"):
        check_finite(metrics, first_step=1, max_skipped=100)


def test_schedule_rises_stays_and_falls():
    constant = make_schedule(2.0, warmup_steps=4)
    np.testing.assert_allclose([constant(i) for i in (0, 1, 3, 4, 99)], [0.5, 1.0, 2.0, 2.0, 2.0])
    cosine = make_schedule(2.0, schedule="cosine", warmup_steps=2, total_steps=10)
    np.testing.assert_allclose(
        [cosine(i) for i in (0, 1, 2, 6, 10, 11)], [1.0, 2.0, 2.0, 1.0, 0.0, 0.0], atol=1e-6
    )


@pytest.mark.parametrize(
    ("settings", "reference"),
    [
        ({"name": "adam"}, optax.adam(1e-2)),
        ({"name": "adam", "b1": 0.8, "b2": 0.95}, optax.adam(1e-2, b1=0.8, b2=0.95)),
        (
            {"name": "adamw", "weight_decay": 0.1, "decay": "all"},
            optax.adamw(1e-2, weight_decay=0.1),
        ),
        (
            {"name": "adamw", "weight_decay": 0.1},
            optax.adamw(1e-2, weight_decay=0.1, mask={"kernel": True, "bias": False}),
        ),
        ({"name": "sgd", "momentum": 0.9}, optax.sgd(1e-2, momentum=0.9)),
        (
            {"name": "sgd", "clip_norm": 0.01},
            optax.chain(optax.clip_by_global_norm(0.01), optax.sgd(1e-2)),
        ),
    ],
)
def test_optimizer_is_the_one_of_optax(settings, reference):
    trained = []
    for optimizer in (make_optimizer(**settings, learning_rate=1e-2), reference):
        epoch = make_epoch(
            make_train_step(squared_error(apply), optimizer), sample, 3, rng=jax.random.key(0)
        )
        trained.append(jax.jit(epoch)(new_state(optimizer), jnp.arange(4))[0].params)
    chex.assert_trees_all_close(*trained, rtol=1e-6)


DECAY = {"kernel", "embedding", "query_conv", "key_conv", "value_conv"}
STAY = {
    *("bias", "scale", "sinks", "relative_bias", "decay_rate", "decay_bias"),
    *("lambda_query_1", "lambda_key_1", "lambda_query_2", "lambda_key_2"),
}
MODELS = [
    {"mechanism": "dot_product", "sinks": True, "positions": "relative", "qk_norm": True},
    {"mechanism": "dot_product", "attention": "selfhead", "num_heads": None, "norm": "rms"},
    {"mechanism": "linear", "positions": "learned", "max_length": 6, "num_kv_heads": 1},
    {"mechanism": "differential", "tie_embedding": False, "short_conv": 2, "causal": True},
    {"mechanism": "gated_delta", "causal": True},
    {"mechanism": "dot_product", "vocab_size": None, "out_features": 3},
]


MUON = [
    {"features": 8, "num_kv_heads": 1, "mlp_ratio": 2.0, "positions": "relative"},
    {"features": 12, "mlp": "swiglu", "mlp_ratio": 2.0, "short_conv": 2, "causal": True},
    {"features": 8, "mechanism": "gated_delta", "causal": True, "tie_embedding": False},
]


@pytest.mark.parametrize("traced", [False, True])
def test_matrices_decay_and_nothing_else(traced):
    """With a gradient of 0, `theta -> (1 - rate * decay) theta`, or `theta -> theta`."""
    names = set()
    for settings in MODELS:
        settings = {"vocab_size": 5, "num_heads": 2, "mlp_ratio": 2.0} | settings
        model = make_sequence_model(features=8, **settings)
        tokens = settings["vocab_size"] is not None
        inputs = jnp.zeros((1, 6), jnp.int32) if tokens else jnp.zeros((1, 6, 8))
        shapes = jax.eval_shape(model.init, jax.random.key(0), inputs)["params"]
        params = jax.tree.map(lambda x: np.ones(x.shape, np.float32), shapes)

        def step(weight_decay, params=params):
            optimizer = make_optimizer("sgd", learning_rate=0.5, weight_decay=weight_decay)
            grads = jax.tree.map(jnp.zeros_like, params)
            return optax.apply_updates(
                params, optimizer.update(grads, optimizer.init(params), params)[0]
            )

        after = jax.jit(step)(0.25) if traced else jax.jit(lambda: step(0.25))()
        for path, x in jax.tree.leaves_with_path(after):
            name = path[-1].key
            assert name in DECAY | STAY, "a new parameter: does it decay?"
            np.testing.assert_allclose(x, 0.875 if name in DECAY else 1.0, err_msg=str(path))
            names.add(name)
    assert names == DECAY | STAY


def test_muon_makes_singular_values_of_kernels_equal():
    """In the basis of the gradient's singular vectors a step is 0.2 sqrt(max(m, n)), nearly."""
    models = [make_sequence_model(**{"vocab_size": 5, "num_heads": 2} | s) for s in MUON]
    kinds = set()
    for model in models:
        inputs = jnp.zeros((1, 6), jnp.int32)
        shapes = jax.eval_shape(model.init, jax.random.key(0), inputs)["params"]
        normal = np.random.default_rng(0).normal
        grads = jax.tree.map(lambda x, normal=normal: np.float32(normal(size=x.shape)), shapes)
        steps = {}
        for name in ("muon", "adam"):
            optimizer = make_optimizer(name, learning_rate=0.5)
            update = lambda x, by=optimizer: by.update(x, by.init(x), x)[0]
            steps[name] = jax.jit(update)(grads)
        for path, grad in jax.tree.leaves_with_path(grads):
            words = keystr(path, simple=True, separator="/")
            by = {x: dict(jax.tree.leaves_with_path(tree))[path] for x, tree in steps.items()}
            if words.endswith("kernel") and not {"head", "conv"} & {*words.split("/")}:
                columns = grad.shape[-1] if "/out/" in words else grad[0].size
                left, _, right = np.linalg.svd(grad.reshape(-1, columns), full_matrices=False)
                found = -left.T @ by["muon"].reshape(-1, columns) @ right.T
                size = 0.5 * 0.2 * max(grad.size // columns, columns) ** 0.5
                np.testing.assert_allclose(np.diag(found), size, rtol=0.4, err_msg=words)
                np.testing.assert_allclose(found, np.diag(np.diag(found)), atol=1e-4 * size)
                kinds.add(words.rpartition("/")[0].rpartition("/")[2])
            else:
                np.testing.assert_allclose(by["muon"], by["adam"], rtol=1e-5, err_msg=words)
                kinds.add(words)
    layers = {"query", "key", "value", "out", "in", "gate", "beta", "decay"}
    others = {"embedding/embedding", "head/kernel", "blocks_0/conv/kernel", "bias/relative_bias"}
    assert layers | others <= kinds


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"name": "lion"}, "optimizer must be 'adam', 'adamw', 'muon' or 'sgd': got 'lion'"),
        ({"name": "adam", "weight_decay": 0.1}, "adam has no weight_decay"),
        ({"name": "adamw", "momentum": 0.1}, "momentum belongs to sgd"),
        ({"name": "sgd", "b2": 0.9}, "sgd has no b1 and b2: got 0.9 and 0.9"),
        ({"name": "adamw", "b2": 1.0}, "b1 and b2 must lie in"),
        ({"decay": "kernels"}, "decay must be 'matrices' or 'all': got 'kernels'"),
        ({"clip_norm": -1.0}, "must not be negative"),
        ({"learning_rate": -1.0}, "must not be negative"),
        ({"learning_rate": float("nan")}, "must not be negative"),
        ({"schedule": "linear"}, "schedule must be 'constant' or 'cosine': got 'linear'"),
        ({"schedule": "cosine"}, "a cosine needs total_steps > warmup_steps"),
        ({"schedule": "cosine", "warmup_steps": 9, "total_steps": 9}, "total_steps=9"),
    ],
)
def test_bad_optimizer_setting_is_refused_in_one_line(settings, words):
    with pytest.raises(ValueError, match=r"^[^\n]*$") as error:
        make_optimizer(**settings)
    assert words in str(error.value)
