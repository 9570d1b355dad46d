"""Promises of the launchers: the same training on one device and on eight."""

import functools
import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from attention_jax.tasks import TASKS
from attention_jax.tasks.teacher import attention_layer
from attention_jax.training import build, experiment, step
from attention_jax.training.config import ConfigError, default_config
from attention_jax.training.launch import LAUNCHERS
from attention_jax.training.step import (
    make_epoch,
    make_eval_step,
    make_evaluation,
    make_train_step,
    squared_error,
)
from attention_jax.types import TrainState

B, T, D, N, H = 16, 5, 6, 2, 3
TASK = TASKS["teacher"](seq_length=T, features=D, num_heads=N)
OPTIMIZER = optax.sgd(0.3)

many = pytest.mark.parametrize("name", ["pmap", "sharded"])


def sample(rng, rows):
    """The teacher's batch, with weights that differ within a device and between devices."""
    batch = TASK.sample(rng, rows)
    return batch._replace(weights=batch.weights * (rows % 5)[:, None])


def apply(params, batch, rng):
    return attention_layer(batch.inputs, **params)


def new_state():
    # On the host: a launcher places it, and may give its memory away.
    draw = np.random.RandomState(3).standard_normal
    shapes = {"query": (D, N, H), "key": (D, N, H), "value": (D, N, H), "out": (N, H, D)}
    params = {name: np.float32(D**-0.5 * draw(shape)) for name, shape in shapes.items()}
    return TrainState(np.int32(0), params, OPTIMIZER.init(params), jax.random.key(0))


def make_program(launcher, accumulate=1, num_steps=50):
    step = make_train_step(
        squared_error(apply), OPTIMIZER, axis_name=launcher.axis_name, accumulate=accumulate
    )
    return make_epoch(step, sample, num_steps, rng=jax.random.key(1), constrain=launcher.constrain)


@functools.cache
def trained(name, accumulate=1):
    launcher = LAUNCHERS[name]()
    epoch = launcher.compile(make_program(launcher, accumulate), donate=True)
    state, metrics = epoch(launcher.put_state(new_state()), launcher.put_batch(np.arange(B)))
    return jax.tree.map(np.asarray, (state._replace(rng=jax.random.key_data(state.rng)), metrics))


@pytest.mark.parametrize("accumulate", [1, 2])
@many
def test_launchers_agree_after_fifty_steps(name, accumulate):
    assert jax.device_count() == 8
    one, many = trained("single"), trained(name, accumulate)
    assert one[1]["loss"][-1] < 0.7 * one[1]["loss"][0]
    for path, expected in jax.tree.leaves_with_path(one):
        got = dict(jax.tree.leaves_with_path(many))[path]
        assert got.shape == expected.shape
        assert got.dtype == expected.dtype
        error = np.abs(np.float64(got) - np.float64(expected)).max()
        assert error <= 1e-5 * np.abs(np.float64(expected)).max(), path


@functools.cache
def evaluated(name):
    launcher = LAUNCHERS[name]()
    eval_step = make_eval_step(squared_error(apply), axis_name=launcher.axis_name)
    program = make_evaluation(
        eval_step, sample, 2, rng=jax.random.key(2), constrain=launcher.constrain
    )
    params = launcher.put_state(new_state().params)
    metrics = launcher.compile(program)(params, launcher.put_batch(np.arange(B)))
    assert not any(x.is_deleted() for x in jax.tree.leaves(params))
    return metrics


@many
def test_evaluation_agrees(name):
    chex.assert_trees_all_close(evaluated(name), evaluated("single"), rtol=1e-5)


@pytest.mark.parametrize("limit", [2**18, 3])
def test_sums_over_devices_keep_their_types_and_shapes(limit, monkeypatch):
    monkeypatch.setattr(step, "_SMALL", limit)

    def loss_fn(params, batch, rng):
        sums = {
            "weight": batch.sum(),
            "count": batch.astype(jnp.int32).sum() + 2**24 + 1,  # No float32.
            "vector": jnp.stack([batch, 2 * batch]),
            "half": batch.sum().astype(jnp.bfloat16),
        }
        return batch.sum(), sums

    launcher = LAUNCHERS["pmap"]()
    evaluate = launcher.compile(make_eval_step(loss_fn, axis_name=launcher.axis_name))
    rows = np.arange(8, dtype=np.float32)
    found = evaluate({}, launcher.put_batch(rows))
    assert {name: x.dtype.name for name, x in found.items()} == {
        **dict.fromkeys(["loss", "weight", "vector"], "float32"),
        "count": "int32",
        "half": "bfloat16",
    }
    assert found["loss"] == found["weight"] == found["half"] == 28
    assert found["count"] == 28 + 8 * (2**24 + 1)
    np.testing.assert_array_equal(found["vector"], [[28], [56]])


@many
@pytest.mark.parametrize("size", [4, 12, 0])
def test_batch_that_cannot_be_split_is_refused_with_both_numbers(name, size):
    with pytest.raises(ValueError, match=rf"^a batch of {size} rows .* 8 devices[^\n]*$"):
        LAUNCHERS[name]().put_batch({"rows": np.arange(size)})


@pytest.mark.parametrize("name", LAUNCHERS)
def test_batch_is_any_tree_and_keeps_its_order(name):
    tree = {"a": np.arange(B), "b": (jnp.arange(3.0 * B).reshape(B, 3),)}
    placed = LAUNCHERS[name]().put_batch(tree)
    for x, y in zip(jax.tree.leaves(placed), jax.tree.leaves(tree), strict=True):
        np.testing.assert_array_equal(np.reshape(x, y.shape), y)
    devices = 1 if name == "single" else 8
    if name != "pmap":  # pmap deals its rows out at the call.
        assert all(len(x.sharding.device_set) == devices for x in jax.tree.leaves(placed))


COMPILATIONS = []
jax.monitoring.register_event_duration_secs_listener(
    lambda event, *_, **__: COMPILATIONS.append(event) if "backend_compile" in event else None
)


@pytest.mark.parametrize("name", LAUNCHERS)
def test_state_is_donated_and_the_second_call_compiles_nothing(name):
    launcher = LAUNCHERS[name]()
    epoch = launcher.compile(make_program(launcher, num_steps=2), donate=True)
    rows = launcher.put_batch(np.arange(B))
    first = launcher.put_state(new_state())
    COMPILATIONS.clear()
    second, _ = epoch(first, rows)
    assert COMPILATIONS
    assert first.params["query"].is_deleted()
    COMPILATIONS.clear()
    third, _ = epoch(second, rows)
    assert not COMPILATIONS
    assert int(third.step) == 4


@pytest.mark.parametrize("name", LAUNCHERS)
def test_a_run_traces_its_programs_once(name, monkeypatch):
    make, made = build.make_functions, []

    def counted(name, function):
        def run(*arguments):
            made.append(name)
            return function(*arguments)

        return run

    def bounded(*arguments, **settings):
        functions = make(*arguments, **settings)
        programs = {x: counted(x, getattr(functions, x)) for x in ("epoch", "evaluate")}
        return functions._replace(**programs)

    monkeypatch.setattr(build, "make_functions", bounded)
    config = default_config()
    config.update_from_flattened_dict(
        {
            "launcher": name,
            "task.seq_length": 3,
            "model.features": 8,
            "model.num_heads": 2,
            "train.batch_size": 8,
            "train.steps_per_epoch": 2,
            "train.epochs": 3,
            "eval.every_epochs": 1,
            "eval.num_batches": 1,
        }
    )
    assert experiment.run(config).metrics["step"] == 6
    assert sorted(made) == ["epoch", "evaluate"]


def test_sharded_constrains_what_is_made_inside():
    launcher = LAUNCHERS["sharded"]()
    # No argument of this function is split, so nothing but the constraint can split its result.
    made = jax.jit(lambda: launcher.constrain({"x": jnp.zeros((B, 3))}))()["x"]
    assert {shard.data.shape for shard in made.addressable_shards} == {(B // 8, 3)}


def test_sharded_batch_is_made_in_parts():
    launcher = LAUNCHERS["sharded"]()
    compiled = launcher.compile(make_program(launcher, accumulate=2))
    lowered = compiled.lower(launcher.put_state(new_state()), launcher.put_batch(np.arange(B)))
    text = lowered.compile().as_text()
    leading = {int(n) for n in re.findall(rf"f32\[(\d+),{T},{D}\]", text)}
    assert B // 8 in leading
    assert B not in leading, "a device makes the whole batch"
    assert "all-gather" not in text
    assert "all-to-all" not in text


MESHES = [
    ({"data": 4, "model": 2}, {}),
    ({"model": 8}, {"num_kv_heads": 1, "sinks": True, "mlp": "swiglu"}),
    ({"model": 4}, {"num_kv_heads": 4, "positions": "relative", "mechanism": "sigmoid"}),
    ({"data": 2, "sequence": 4}, {}),
    ({"model": 2, "sequence": 2}, {"num_kv_heads": 2, "sinks": True, "positions": "alibi"}),
    ({"sequence": 2}, {"window": 3, "positions": "relative", "softcap": 5.0, "remat": "full"}),
    ({"data": 2, "model": 4}, {"remat": "dots_saveable", "positions": "alibi", "use_bias": False}),
]


@functools.cache
def losses(launcher, mesh, model):
    config = default_config("sort")
    config.task.seq_length = 8
    config.model.update({"features": 16, "num_heads": 8, "num_layers": 1} | dict(model))
    config.optimizer.update(name="sgd", learning_rate=0.1)
    config.train.update(batch_size=16, steps_per_epoch=10, epochs=1)
    config.eval.num_batches = 1
    config.launcher = launcher
    config.mesh.update(dict(mesh))
    result = experiment.run(config)
    return result.history[-1]["loss"], result.metrics["eval_loss"], result.params


@pytest.mark.parametrize(
    ("mesh", "model"),
    [
        pytest.param(*case, marks=[] if number in (0, 3) else pytest.mark.slow)
        for number, case in enumerate(MESHES)
    ],
    ids=str,
)
def test_heads_hidden_features_and_sequences_may_be_split(mesh, model):
    want = losses("single", (), tuple(model.items()))
    found = losses("sharded", tuple(mesh.items()), tuple(model.items()))
    assert found[:2] == pytest.approx(want[:2], rel=1e-5)
    chex.assert_trees_all_close(found[2], want[2], rtol=1e-4, atol=1e-5)


def test_each_device_holds_its_part_of_the_model():
    config = default_config("sort")
    config.model.update(features=16, num_heads=8, num_layers=1)
    config.launcher, config.mesh.model = "sharded", 4
    program = build.build(config)
    state = program.put_state(jax.jit(program.init)())
    for numbers in (state.params, optax.tree.get(state.opt_state, "mu")):
        block = numbers["blocks_0"]
        assert block["attention"]["query"]["kernel"].addressable_shards[0].data.shape == (16, 2, 2)
        assert block["attention"]["out"]["kernel"].addressable_shards[0].data.shape == (2, 2, 16)
        assert block["mlp"]["in"]["kernel"].addressable_shards[0].data.shape == (16, 16)
        assert block["mlp_norm"]["scale"].addressable_shards[0].data.shape == (16,)
    whole = program.get_state(state)
    assert whole.params["blocks_0"]["mlp"]["in"]["kernel"].is_fully_replicated


@pytest.mark.slow
def test_a_long_sequence_is_gathered_nowhere():
    config = default_config("copy")
    config.task.seq_length = 2048
    config.model.update(features=32, num_heads=4, num_layers=1)
    config.train.update(batch_size=8, steps_per_epoch=1)
    config.launcher = "sharded"
    config.mesh.update(data=2, sequence=2, model=2)
    program = build.build(config)
    state = program.put_state(jax.jit(program.init)())
    compiled = program.epoch.lower(state, program.rows).compile().as_text()
    assert "collective-permute" in compiled
    assert not re.search(r"\[\d+,2048,[\d,]+\]\S* all-gather\(", compiled)


def test_a_mesh_that_does_not_fit_is_refused():
    config = default_config()
    config.launcher, config.mesh.model = "sharded", 3
    with pytest.raises(
        ValueError, match=r"config.mesh must fit the 8 devices: got data=None, model=3"
    ):
        experiment.run(config)
    config.launcher = "pmap"
    with pytest.raises(ValueError, match=r"config.mesh.model is for --launcher=sharded: got pmap"):
        experiment.run(config)


@pytest.mark.parametrize("section", ["eval", "train"])
def test_a_slice_that_the_devices_cannot_split_is_refused_before_the_run(section):
    config = default_config("copy")
    config.model.update(features=8, num_heads=2, num_layers=1)
    config.task.seq_length, config[section].slices = 16, "16 18"
    config.launcher, config.mesh.sequence = "sharded", 4
    with pytest.raises(
        ConfigError, match=r"^config.mesh.sequence=4 must divide .* \(\d+, 18, [^\n]*$"
    ):
        build.build(config)


def test_a_sweep_names_the_mesh_before_the_number_of_trials():
    launcher = LAUNCHERS["sharded"](model=2)
    with pytest.raises(ValueError, match=r"config.mesh.model and sequence must be 1 in a sweep"):
        launcher.put_trials(np.arange(3))


# Other axes in the course of a run ---------------------------------------------------------------


def packed_run(**mesh):
    """Packed documents, so that the parts of a sequence do not end where documents do."""
    config = default_config("copy")
    config.task.update(seq_length=16, pack="6+10")
    config.model.update(features=16, num_heads=4, num_kv_heads=2, num_layers=1)
    config.optimizer.update(name="sgd", learning_rate=0.1)
    config.train.update(batch_size=8, steps_per_epoch=3, epochs=4)
    config.eval.update(num_batches=1, every_epochs=1)
    config.checkpoint.every_epochs = 1
    if mesh:
        config.launcher = "sharded"
        config.mesh.update(mesh)
    return config


@functools.cache
def uninterrupted(**mesh):
    return experiment.run(packed_run(**mesh))


SEQUENCE = {"data": 2, "sequence": 4}


def cut_in_the_middle(place, at_step, before, after):
    """The result of a run that crashes with one mesh and goes on with another one."""

    def crash():
        raise MemoryError

    calm = at_step(6, crash)
    with pytest.raises(MemoryError):
        experiment.run(packed_run(**before), place)
    calm()
    return experiment.run(packed_run(**after), place)


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ({"data": 4, "model": 2}, SEQUENCE),
        pytest.param(SEQUENCE, {"model": 2, "sequence": 2}, marks=pytest.mark.slow),
        pytest.param(SEQUENCE, {"data": 8}, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_a_run_goes_on_with_other_axes(tmp_path, at_step, before, after):
    found, want = cut_in_the_middle(tmp_path, at_step, before, after), uninterrupted()
    for name in ("step", "loss", "eval_loss"):
        rows = [[row[name] for row in x.history if name in row] for x in (found, want)]
        assert rows[0] == pytest.approx(rows[1], rel=1e-5)
    chex.assert_trees_all_close(found.params, want.params, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_a_run_over_sequences_resumes_as_if_uninterrupted(tmp_path, at_step):
    found = cut_in_the_middle(tmp_path, at_step, SEQUENCE, SEQUENCE)
    assert found.metrics["fingerprint"] == uninterrupted(**SEQUENCE).metrics["fingerprint"]


@pytest.mark.parametrize(
    "mesh", [{"data": 4, "model": 2}, SEQUENCE, {"model": 4, "sequence": 2}], ids=str
)
def test_evaluation_on_other_axes_gives_the_same_numbers(mesh):
    trained = uninterrupted()
    program = build.build(packed_run(**mesh))
    metrics = program.evaluate(program.put_state(trained.params), program.rows)
    for name in ("loss", "accuracy"):
        assert float(metrics[name]) == pytest.approx(trained.metrics[f"eval_{name}"], rel=1e-5)
