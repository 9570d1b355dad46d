"""Eight simulated devices on the CPU, and the modes that a single test may ask for."""

import os

import jax
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
