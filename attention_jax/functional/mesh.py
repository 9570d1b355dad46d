"""Work on a mesh of devices: each device computes the batch rows and heads that it holds.

XLA splits plain operations over devices by itself. It cannot split a loop over batch rows: each
device would gather the whole batch. `on_each_device` runs such a loop on each device's own rows and
heads. `in_auto` is for meshes with Explicit axes. There every operation has to say how its result
is split; inside `in_auto` the compiler decides that.
"""

import hashlib
import itertools
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.custom_batching import custom_vmap
from jax.experimental.custom_partitioning import (
    ArrayMapping,
    SdyShardingRule,
    custom_partitioning,
)
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from attention_jax.types import Array, PyTree

# The meaning of each axis of an array: an integer i is batch axis i, "N" query heads, "K" key
# heads. None is an axis that is whole on every device.
Axes = tuple[int | str | None, ...]


def in_auto(compute: Callable, arguments: Sequence[PyTree], results: PyTree) -> PyTree:
    """`compute(*arguments)`, with Explicit axes of a mesh left to the compiler.

    Args:
        compute: A function that uses no array of jax except its arguments.
        arguments: Trees of arrays, which may be split over Explicit axes, and of other values.
        results: The partition `P` of each result of `compute` on such a mesh.
    """
    leaves, tree = jax.tree.flatten(arguments)
    arrays = {i: x for i, x in enumerate(leaves) if isinstance(x, jax.Array)}
    mesh = next(filter(None, map(_explicit_mesh, arrays.values())), None)
    if mesh is None:
        return compute(*arguments)

    def on_arrays(arrays):
        return compute(*tree.unflatten([arrays.get(i, x) for i, x in enumerate(leaves)]))

    shardings = jax.tree.map(lambda spec: NamedSharding(mesh, spec), results)
    return jax.sharding.auto_axes(on_arrays, out_sharding=shardings)(arrays)


def partition_of(x: Array, *axes: int | None) -> P:
    """How these axes of `x` are split over Explicit axes of a mesh; None is an unsplit axis."""
    if _explicit_mesh(x) is None:
        return P(*[None] * len(axes))
    spec = jax.typeof(x).sharding.spec
    spec = (*spec, *[None] * (x.ndim - len(spec)))
    return P(*(None if axis is None else spec[axis] for axis in axes))


def attended(query: Array) -> P:
    """The partition of an attention's output `[..., T, N, V]`: that of its queries."""
    return partition_of(query, *range(query.ndim - 1), None)


def _explicit_mesh(x):
    mesh = jax.typeof(x).sharding.mesh
    return mesh if AxisType.Explicit in mesh.axis_types else None


def axes_of(x: Array, letters: str, num_batch: int) -> Axes:
    """The `Axes` of an array whose last axes are those of `letters`, after some of the batch axes.

    An axis of one entry serves all rows or heads, so it is None.
    """
    names = (*range(num_batch), *(name if name in "NK" else None for name in letters))
    names = names[len(names) - x.ndim :]
    return tuple(None if n == 1 else name for n, name in zip(x.shape, names, strict=True))


def on_each_device(
    body: Callable[..., Sequence[Array]],
    arguments: PyTree,
    axes: Sequence[Axes],
    result_axes: Sequence[Axes],
) -> Sequence[Array]:
    """`body(*arguments)`, where each device computes the batch rows and heads that it holds.

    If query heads are split over more devices than there are key heads, each device takes the key
    head that its query heads read. Only the compiler knows the number of devices, so `body` must
    work for any number of rows and heads.

    Args:
        body: Returns a list of arrays. Query head n must read key head n // (N / K).
        arguments: Trees of arrays. The work is split as the first array is split; it has all batch
            axes and query heads.
        axes: The `Axes` of each array in `arguments`.
        result_axes: The same for the results. A result that lacks some of the batch axes or query
            heads must be a sum over them.
    """
    if jax.device_count() == 1 or jax.sharding.get_abstract_mesh().manual_axes:
        return body(*arguments)  # `shard_map` and `pmap` have split the arrays already.
    operands, tree = jax.tree.flatten(arguments)

    def flat(*operands):
        return tuple(body(*jax.tree.unflatten(tree, operands)))

    @jax.custom_jvp
    def call(*operands):
        return mapped(*operands)

    @call.defjvp
    def _(primals, tangents):
        return jax.jvp(flat, primals, tangents)

    @custom_vmap
    def mapped(*operands):
        return _partitioned(flat, operands, axes, result_axes)

    @mapped.def_vmap
    def _(size, batched, *operands):
        # The new axis is a batch axis of every operation, so the compiler can split it.
        found = jax.vmap(flat, [0 if one else None for one in batched], axis_size=size)(*operands)
        return found, (True,) * len(found)

    return call(*operands)


def _partitioned(body, operands, axes, result_axes):
    """`on_each_device`, after its checks; the compiler chooses the devices."""
    program = jax.make_jaxpr(body)(*operands)
    constants = [jnp.asarray(x) for x in program.consts]
    # The compile cache does not look into the call; this digest tells programs apart.
    digest = hashlib.sha256(str(program.jaxpr).encode()).digest()
    extra = [*constants, jnp.asarray(np.frombuffer(digest, np.uint32))]
    all_axes = [*axes, *((None,) * x.ndim for x in extra)]
    sizes = {
        name: size
        for x, names in zip(operands, axes, strict=True)
        for size, name in zip(x.shape, names, strict=True)
    }

    def whole(*arrays):
        arrays, constants = arrays[: len(operands)], arrays[len(operands) : -1]
        return tuple(jax.core.eval_jaxpr(program.jaxpr, constants, *arrays))

    def partition(mesh, shapes, results):
        split = _Split.of(shapes[0].sharding, mesh, axes[0], sizes)

        def own(*arrays):
            arrays = map(split.own_key_head, arrays[: len(operands)], axes)
            return tuple(map(split.summed, body(*arrays), result_axes))

        places = (tuple(map(split.sharding, names)) for names in (result_axes, all_axes))
        return split.mesh, own, *places

    def infer(mesh, shapes, results):  # For jax's older partitioner.
        return partition(mesh, shapes, results)[2]

    call = custom_partitioning(whole)
    rule = _rule(all_axes, result_axes, merged=sizes.get("N") == sizes.get("K"))
    call.def_partition(partition, infer, decode_shardings=False, sharding_rule=rule)
    return call(*operands, *extra)


def _rule(axes, result_axes, merged):
    """Tells the compiler which axes are split alike; `merged`: N equals K."""
    numbers = itertools.count()
    unsplit = []

    def factor(name):
        if name is None:
            unsplit.append(f"whole{next(numbers)}")
            return unsplit[-1]
        return "axisN" if merged and name == "K" else f"axis{name}"

    mappings = [
        tuple(ArrayMapping(*map(factor, names)) for names in group) for group in (axes, result_axes)
    ]
    return SdyShardingRule(*mappings, need_replication_factors=tuple(unsplit))


class _Split(NamedTuple):
    """How rows and heads are split over devices.

    Attributes:
        mesh: Its axes are as fine as possible, because one axis of a mesh may split two of an
            array.
        used: The axes of the mesh over which batch axis i, "N" and "K" are split.
        num_key_heads: K.
    """

    mesh: Mesh
    used: dict[int | str, tuple[str, ...]]
    num_key_heads: int

    @classmethod
    def of(cls, sharding, mesh, names, sizes) -> "_Split":
        """The split that follows from the `sharding` of an array with axes `names`."""
        K = sizes.get("K", 1)
        if mesh.empty:  # The order of the devices is unknown, so each computes all.
            return cls(Mesh(np.array([*sharding.device_set]), ("devices",)), {}, K)
        mesh, used = _finest(mesh), {}
        for name, found in zip(names, _mesh_axes(sharding, mesh, len(names)), strict=True):
            parts = math.prod(mesh.shape[axis] for axis in found)
            if name is not None and sizes[name] % parts == 0:
                used[name] = found
        heads = math.prod(mesh.shape[axis] for axis in used.get("N", ()))
        if K % heads == 0:
            used["K"] = used.get("N", ())
        elif heads % K:  # One device would read parts of several key heads.
            del used["N"]
        return cls(mesh, used, K)

    def sharding(self, names: Axes) -> NamedSharding:
        return NamedSharding(self.mesh, P(*(self.used.get(name) or None for name in names)))

    @property
    def one_key_head(self) -> bool:
        """Whether each device holds all key heads and takes one."""
        return "N" in self.used and "K" not in self.used

    def own_key_head(self, x: Array, names: Axes) -> Array:
        if not self.one_key_head or "K" not in names:
            return x
        return jax.lax.dynamic_slice_in_dim(x, self._key_head(), 1, names.index("K"))

    def summed(self, x: Array, names: Axes) -> Array:
        """A result of one device, summed over all devices that share it."""
        if self.one_key_head and "K" in names:
            axis = names.index("K")
            shape = (*x.shape[:axis], self.num_key_heads, *x.shape[axis + 1 :])
            zeros = jnp.zeros(shape, x.dtype)
            x = jax.lax.dynamic_update_slice_in_dim(zeros, x, self._key_head(), axis)
        kept = {axis for name in names for axis in self.used.get(name, ())}
        over = {axis for found in self.used.values() for axis in found} - kept
        return jax.lax.psum(x, tuple(sorted(over))) if over else x

    def _key_head(self):
        heads = self.used["N"]
        parts = math.prod(self.mesh.shape[axis] for axis in heads)
        return jax.lax.axis_index(heads) * self.num_key_heads // parts


def _finest(mesh: Mesh) -> Mesh:
    """The same devices in the same order, with an axis for every prime factor of each axis."""
    sizes = {
        f"{name}/{i}": prime
        for name, size in mesh.shape.items()
        for i, prime in enumerate(_primes(size))
    }
    return Mesh(mesh.devices.reshape(*sizes.values()), tuple(sizes))


def _primes(n: int) -> list[int]:
    found = next((p for p in range(2, n + 1) if n % p == 0), None)
    return [] if found is None else [found, *_primes(n // found)]


def _mesh_axes(sharding, mesh: Mesh, ndim: int) -> list[tuple[str, ...]]:
    """The axes of the mesh that split each axis of an array, the coarsest first.

    It is derived from the place of each device's part, because jax has no public function for it.
    """
    parts = sharding.devices_indices_map((mesh.size,) * ndim)  # Any size that can be split.
    starts = {device: [s.start or 0 for s in part] for device, part in parts.items()}
    found = [[] for _ in range(ndim)]
    origin = starts[mesh.devices.flat[0]]
    for number, name in enumerate(mesh.axis_names):
        place = [0] * mesh.devices.ndim
        place[number] = 1
        for axis, (start, first) in enumerate(
            zip(starts[mesh.devices[*place]], origin, strict=True)
        ):
            if start != first:
                found[axis].append((first - start, name))
    axes = [tuple(name for _, name in sorted(steps)) for steps in found]
    same = NamedSharding(mesh, P(*(names or None for names in axes)))
    return axes if same.is_equivalent_to(sharding, ndim) else [()] * ndim


# Inside of `shard_map` --------------------------------------------------------------------------


def full_like(like: Array, fill: float, shape: Sequence[int], dtype=None) -> Array:
    """A constant that varies over the devices of a `shard_map` as `like` does, to start a loop."""
    return _vary(jnp.full(shape, fill, dtype or like.dtype), _varying(like))


def vary_alike(tree: PyTree) -> PyTree:
    """All arrays, made to vary over the same devices; a changed array's gradient is summed."""
    axes = frozenset().union(*(_varying(x) for x in jax.tree.leaves(tree)))
    return jax.tree.map(lambda x: _vary(x, axes), tree)


def _vary(x, axes):
    new = tuple(axes - _varying(x))
    return jax.lax.pcast(x, new, to="varying") if new else x


def _varying(x):
    return jax.typeof(x).manual_axis_type.varying
