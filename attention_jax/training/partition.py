"""Which axis of a parameter the devices of the mesh axis `model` split among them.

The heads of attention and the hidden features of MLPs are split, so that a block needs one sum over
the devices after each (Shoeybi et al. 2019, "Megatron-LM", section 3,
https://arxiv.org/abs/1909.08053). The optimizer's numbers for a parameter lie as the parameter.
"""

import re

import jax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from attention_jax.types import PyTree

DATA, MODEL, SEQUENCE = "data", "model", "sequence"
# The end of a parameter's path, its number of axes, and the axis that is split. All other
# parameters are whole on each device, and so are these where the axis does not divide.
SPLIT = (
    (r"\.(query|key|value)\.kernel", 3, 1),  # [D, N, H]: heads.
    (r"\.(query|key|value)\.bias", 2, 0),  # [N, H]
    (r"\.out\.kernel", 3, 0),  # [N, H, D]
    (r"\.(sinks|offset)", 1, 0),  # [N]
    (r"\.relative_bias", 2, 1),  # [buckets, N]
    (r"\.mlp\.(in|gate)\.kernel", 2, 1),  # [D, F]: hidden features.
    (r"\.mlp\.(in|gate)\.bias", 1, 0),  # [F]
    (r"\.mlp\.out\.kernel", 2, 0),  # [F, D]
    (r"\.embedding\.embedding", 2, 0),  # [vocabulary, D]
)


def spec(path: str, shape: tuple[int, ...], devices: int) -> P:
    """How a parameter, or a number of the optimizer, is split over the axis `model`.

    Args:
        path: Its names, joined and begun by dots, as ".params.blocks_0.attention.query.kernel".
        shape: Of the array.
        devices: The size of the axis.

    >>> tuple(spec(".blocks_0.attention.query.kernel", (64, 8, 8), 2))
    (None, 'model')
    >>> tuple(spec(".blocks_0.attention.query.kernel", (64, 1, 8), 2))
    ()
    """
    for end, ndim, axis in SPLIT:
        if re.search(rf"{end}$", path) and len(shape) == ndim and shape[axis] % devices == 0:
            return P(*[None] * axis, MODEL) if devices > 1 else P()
    return P()


def shardings(tree: PyTree, mesh: Mesh) -> PyTree:
    """The `NamedSharding` of each array of a state, of parameters or of metrics."""

    def of(path, x):
        path = "." + jax.tree_util.keystr(path, simple=True, separator=".")
        return NamedSharding(mesh, spec(path, x.shape, mesh.shape[MODEL]))

    return jax.tree_util.tree_map_with_path(of, tree)
