"""Eight simulated devices on the CPU, and the modes that a single test may ask for."""

import os

import chex
import jax
import jax.numpy as jnp
import pytest

# Before anything touches a device: the number of devices is read once.
jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 8)
# Tests compile far longer than they run. JAX_DISABLE_MOST_OPTIMIZATIONS=0 tests what users run.
if "JAX_DISABLE_MOST_OPTIMIZATIONS" not in os.environ:
    jax.config.update("jax_disable_most_optimizations", True)


@pytest.fixture
def x64():
    """float64 is a type of its own for the length of one test, not float32 under another name."""
    with jax.enable_x64(True):
        yield


@pytest.fixture
def debug_nans():
    """Every NaN that any operation makes is an error, also one that is thrown away later."""
    with jax.debug_nans(True):
        yield


@pytest.fixture
def debug_infs():
    """The same for infinities."""
    with jax.debug_infs(True):
        yield


@pytest.fixture
def hollow(monkeypatch):
    """Makes the loss of the teacher NaN at each step whose batch holds a number above 3.

    Returns a function from a config to a list that says of each step whether it is such a one.
    """
    from attention_jax.training import build

    squared_error = build.steps.LOSSES["squared_error"]

    def hollow_squared_error(apply):
        loss_fn = squared_error(apply)

        def loss(params, batch, rng):
            total, sums = loss_fn(params, batch, rng)
            bad = (rng is not None) & (batch.inputs.max() > 3)  # Not in evaluation.
            return jnp.where(bad, jnp.nan, total), sums

        return loss

    def bad_steps(config):
        task, train = build.make_task(config), config.train
        rng = jax.random.fold_in(jax.random.key(config.seed), build._TRAIN)
        rows = jnp.arange(train.batch_size)
        inputs = lambda step: task.sample(jax.random.fold_in(rng, step), rows).inputs
        numbers = jnp.arange(train.epochs * train.steps_per_epoch)
        return jax.jit(jax.vmap(lambda step: inputs(step).max() > 3))(numbers).tolist()

    monkeypatch.setitem(build.steps.LOSSES, "squared_error", hollow_squared_error)
    return bad_steps


@pytest.fixture
def max_traces():
    """`chex.assert_max_traces`, which would go on counting where an earlier test stopped."""
    chex.clear_trace_counter()
    return chex.assert_max_traces
