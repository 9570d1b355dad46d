"""Launchers: the only code that counts devices.

A launcher runs an unchanged `(state, batch) -> (state, metrics)` on the devices. State and metrics
look the same under each launcher, so any launcher can continue from a checkpoint.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from ml_collections import ConfigDict

from attention_jax.training.partition import DATA, MODEL, SEQUENCE, shardings
from attention_jax.training.sequence import attend_in_ring
from attention_jax.types import PyTree

AXIS = DATA


class Launcher(NamedTuple):
    """How to run a step.

    Attributes:
        compile: `(function, *, donate=False, given=None) -> function` for functions of a state (or
            parameters) and a batch (or rows), whose results are no longer split over devices.
            `donate=True` gives the memory of the first argument to the result: the caller must not
            use it again. `given` is a third argument of the function, which each call gets.
        put_state: Places a state where the compiled function wants it. Both states may share
            memory: once the result is donated, do not use the argument.
        get_state: The state, or any part of it, so that each process can fetch the whole.
        put_batch: Places any tree of arrays `[B, ...]`, split over the devices. ValueError when B
            cannot be split.
        constrain: Called inside the function on a tree of `[B, ...]` made there: keeps it split.
        axis_name: For `make_train_step` and `make_eval_step`.
        attention_fn: What stands for `dot_product_attention` in the model; None: itself.
        compile_trials: `(function, *, donate=False) -> function` for a function of one trial,
            `(shared, state, settings) -> results`. The result takes many trials at once: `shared`
            is the same for all, and each device gets whole trials. `donate` applies to `state`.
        put_trials: Places any tree of arrays `[trials, ...]` for it. ValueError when the trials
            cannot be dealt out evenly.
        get_trials: Fetches such a tree, as NumPy arrays `[trials, ...]`.
    """

    compile: Callable[..., Callable]
    put_state: Callable[[PyTree], PyTree]
    get_state: Callable[[PyTree], PyTree]
    put_batch: Callable[[PyTree], PyTree]
    constrain: Callable[[PyTree], PyTree]
    axis_name: str | None
    attention_fn: Callable | None
    compile_trials: Callable[..., Callable]
    put_trials: Callable[[PyTree], PyTree]
    get_trials: Callable[[PyTree], PyTree]


class Bound:
    """A function of `jax.jit` or `jax.pmap` whose last argument is given beforehand."""

    def __init__(self, function: Callable, given: PyTree):
        self._function, self._given = function, given

    def __call__(self, *arguments: PyTree) -> PyTree:
        return self._function(*arguments, self._given)

    def lower(self, *arguments: PyTree) -> jax.stages.Lowered:
        return self._function.lower(*arguments, self._given)

    def eval_shape(self, *arguments: PyTree) -> PyTree:
        return jax.eval_shape(self._function, *arguments, self._given)


def single() -> Launcher:
    """One device."""
    if jax.process_count() > 1:
        raise ValueError(
            f"config.launcher=single is for one process, not for {jax.process_count()}: take pmap "
            "or sharded."
        )
    device = jax.local_devices()[0]

    def compiled(
        function: Callable, *, donate: bool = False, given: PyTree | None = None
    ) -> Callable:
        run = jax.jit(function, donate_argnums=0 if donate else ())
        return run if given is None else Bound(run, jax.device_put(given, device))

    def compiled_trials(function: Callable, *, donate: bool = False) -> Callable:
        return jax.jit(_over_trials(function), donate_argnums=1 if donate else ())

    return Launcher(
        compile=compiled,
        put_state=lambda state: jax.device_put(state, device),
        get_state=lambda state: state,
        put_batch=lambda batch: jax.device_put(batch, device),
        constrain=lambda batch: batch,
        axis_name=None,
        attention_fn=None,
        compile_trials=compiled_trials,
        put_trials=lambda trials: jax.device_put(trials, device),
        get_trials=jax.device_get,
    )


def pmapped() -> Launcher:
    """One program per device, of all processes; sums meet in an explicit psum."""
    devices = jax.devices()
    ours = np.flatnonzero([x.process_index == jax.process_index() for x in devices])
    local = [devices[i] for i in ours]

    def compiled(
        function: Callable, *, donate: bool = False, given: PyTree | None = None
    ) -> Callable:
        # Axis None: the state is never stacked per device, so checkpoints and metrics look the same
        # under every launcher.
        run = jax.pmap(
            function,
            AXIS,
            in_axes=(None, 0) if given is None else (None, 0, None),
            out_axes=None,
            devices=devices,
            donate_argnums=0 if donate else (),
        )
        return run if given is None else Bound(run, jax.device_put(given, replicated))

    # The sharding of pmap's results; with any other the second call would compile again.
    mesh = jax.make_mesh((len(local),), (AXIS,), axis_types=(AxisType.Auto,), devices=local)
    replicated = NamedSharding(mesh, P())
    split = NamedSharding(mesh, P(AXIS))

    def deal(x: np.ndarray) -> np.ndarray:
        return x.reshape(len(devices), -1, *x.shape[1:])

    def put_batch(batch: PyTree) -> PyTree:
        check_split(batch, len(devices))
        return jax.tree.map(lambda x: deal(x)[ours], batch)

    def compiled_trials(function: Callable, *, donate: bool = False) -> Callable:
        return jax.pmap(
            _over_trials(function),
            AXIS,
            in_axes=(None, 0, 0),
            devices=devices,
            donate_argnums=1 if donate else (),
        )

    def put_trials(trials: PyTree) -> PyTree:
        check_split(trials, len(devices), "a sweep of {} trials")
        return jax.device_put(jax.tree.map(deal, jax.device_get(trials)), split)

    def get_trials(trials: PyTree) -> PyTree:
        collect = lambda x: x.reshape(-1, *x.shape[2:])
        return jax.tree.map(collect, jax.device_get(trials))

    return Launcher(
        compile=compiled,
        put_state=lambda state: jax.device_put(state, replicated),
        get_state=lambda state: state,
        put_batch=put_batch,
        constrain=lambda batch: batch,
        axis_name=AXIS,
        attention_fn=None,
        compile_trials=compiled_trials,
        put_trials=put_trials,
        get_trials=get_trials,
    )


def sharded(data: int | None = None, model: int = 1, sequence: int = 1) -> Launcher:
    """One program over a mesh of all devices; the compiler adds the sums.

    Args:
        data: How many parts a batch is split into; None: as many as the devices allow.
        model: How many devices split the heads and hidden features of each part: see `partition`.
        sequence: How many devices split the sequence of each part, by ring attention.

    Raises:
        ValueError: The devices are not the product of the three.
    """
    devices, shared = jax.device_count(), model * sequence
    if devices % shared or (data is not None and data * shared != devices):
        given = f"data={data}, model={model}, sequence={sequence}"
        raise ValueError(f"config.mesh must fit the {devices} devices: got {given}.")
    mesh = jax.make_mesh(
        (devices // shared, sequence, model),
        (DATA, SEQUENCE, MODEL),
        axis_types=(AxisType.Auto,) * 3,
    )
    replicated = NamedSharding(mesh, P())
    split = NamedSharding(mesh, P(DATA))

    def placed(tree: PyTree) -> PyTree:
        return jax.tree.map(jax.lax.with_sharding_constraint, tree, shardings(tree, mesh))

    def compiled(
        function: Callable, *, donate: bool = False, given: PyTree | None = None
    ) -> Callable:
        donated = 0 if donate else ()
        if shared > 1:  # The arguments say how they are split.
            run = jax.jit(lambda *arguments: placed(function(*arguments)), donate_argnums=donated)
        else:
            run = jax.jit(
                function,
                in_shardings=(replicated, split, *([] if given is None else [replicated])),
                out_shardings=replicated,
                donate_argnums=donated,
            )
        return run if given is None else Bound(run, jax.device_put(given, replicated))

    def put_batch(batch: PyTree) -> PyTree:
        check_split(batch, mesh.shape[DATA])
        return jax.device_put(batch, split)

    def check_sweep() -> None:
        if shared > 1:
            raise ValueError(
                f"config.mesh.model and sequence must be 1 in a sweep: got {model} and {sequence}."
            )

    def compiled_trials(function: Callable, *, donate: bool = False) -> Callable:
        check_sweep()
        return jax.jit(
            _over_trials(function),
            in_shardings=(replicated, split, split),
            out_shardings=split,
            donate_argnums=1 if donate else (),
        )

    def put_trials(trials: PyTree) -> PyTree:
        check_sweep()  # First: no number of trials would do.
        check_split(trials, mesh.size, "a sweep of {} trials")
        return jax.device_put(trials, split)

    # Gather first, because a process sees only what its own devices hold.
    gather = jax.jit(lambda tree: tree, out_shardings=replicated)

    return Launcher(
        compile=compiled,
        put_state=lambda state: _put(state, shardings(state, mesh)),
        get_state=gather if model > 1 else lambda state: state,
        put_batch=put_batch,
        # Without this constraint the compiler may make the whole batch on every device.
        constrain=lambda batch: jax.lax.with_sharding_constraint(batch, split),
        axis_name=None,
        attention_fn=functools.partial(attend_in_ring, mesh) if sequence > 1 else None,
        compile_trials=compiled_trials,
        put_trials=put_trials,
        get_trials=lambda trials: jax.device_get(gather(trials)),
    )


LAUNCHERS: dict[str, Callable[..., Launcher]] = {
    "single": single,
    "pmap": pmapped,
    "sharded": sharded,
}


def make_launcher(config: ConfigDict) -> Launcher:
    """The launcher that a config names."""
    return LAUNCHERS[config.launcher](**(config.mesh if config.launcher == "sharded" else {}))


def _put(tree: PyTree, shardings: PyTree) -> PyTree:
    """`jax.device_put`, also of PRNG keys to the devices of other processes, which it refuses."""
    if jax.process_count() == 1:
        return jax.device_put(tree, shardings)

    def put(x, sharding):
        if not jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
            return jax.device_put(np.asarray(x), sharding)
        data = jax.device_put(np.asarray(jax.random.key_data(x)), sharding)
        return jax.random.wrap_key_data(data, impl=jax.random.key_impl(x))

    return jax.tree.map(put, tree, shardings)


def _over_trials(function: Callable) -> Callable:
    return jax.vmap(function, in_axes=(None, 0, 0))


def check_split(
    batch: PyTree, num_devices: int, name: str = "a batch of {} rows (train.batch_size)"
) -> None:
    """Raises ValueError unless the leading axis of every array divides evenly among the devices."""
    for x in jax.tree.leaves(batch):
        size = np.shape(x)[0]
        if size == 0 or size % num_devices:
            raise ValueError(
                f"{name.format(size)} cannot be split over {num_devices} devices: the number "
                f"must be a multiple of {num_devices}."
            )
