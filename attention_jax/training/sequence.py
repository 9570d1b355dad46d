"""Ring attention in a program that sees whole sequences."""

from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from attention_jax.functional.biases import Bias, as_bias
from attention_jax.functional.masks import Mask, as_mask
from attention_jax.functional.mesh import axes_of
from attention_jax.functional.parallel import ring_attention
from attention_jax.training.partition import DATA, MODEL, SEQUENCE
from attention_jax.types import Array


def attend_in_ring(
    mesh: Mesh,
    query: Array,
    key: Array,
    value: Array,
    bias: Array | Bias | None = None,
    mask: Array | Mask | None = None,
    **options: Any,
) -> Array:
    """`dot_product_attention`, whose T and S are split over the mesh axis `sequence`.

    The first batch axis is split over `data` and the heads over `model` where they divide. With
    dropout each device of these two draws for itself.

    Args:
        mesh: With the axes `data`, `model` and `sequence`.
        query, key, value, bias, mask, **options: As in `dot_product_attention`; only sinks may have
            an axis of heads beside bias and mask.

    Raises:
        ValueError: `sequence` does not divide T or S.
    """
    num_batch, N, K = query.ndim - 3, query.shape[-2], key.shape[-2]
    sizes = dict(mesh.shape)
    for name, x in (("query", query), ("key", key)):
        if x.shape[-3] % sizes[SEQUENCE]:
            raise ValueError(
                f"config.mesh.sequence={sizes[SEQUENCE]} must divide the length: got {name} "
                f"{x.shape}."
            )
    split_heads = N % sizes[MODEL] == 0
    if split_heads and K % sizes[MODEL]:  # Each device needs the key heads of its query heads.
        key, value = (jnp.repeat(x, N // K, axis=-2) for x in (key, value))
    names = {"N": MODEL} if split_heads else {}
    if num_batch and query.shape[0] % sizes[DATA] == 0:
        names[0] = DATA

    def spec(x, letters):
        return P(*(names.get(axis) for axis in axes_of(x, letters, num_batch)))

    def specs(rule):
        """Of every array in a mask or bias."""
        if rule is None:
            return None
        found = [spec(x, letters) for x, letters in rule.arrays()]
        return jax.tree.unflatten(jax.tree.structure(rule), found)

    bias = None if bias is None else as_bias(bias)
    mask = None if mask is None else as_mask(mask)
    arrays = {name: x for name, x in options.items() if isinstance(x, jax.Array)}
    others = {name: x for name, x in options.items() if name not in arrays}
    of_arrays = {name: spec(x, "N") if name == "sinks" else P() for name, x in arrays.items()}
    split = P(*[names.get(i) for i in range(num_batch)], SEQUENCE, names.get("N"))

    def part(query, key, value, bias, mask, arrays):
        if (rng := arrays.get("dropout_rng")) is not None:
            for axis in names.values():
                rng = jax.random.fold_in(rng, jax.lax.axis_index(axis))
            arrays = arrays | {"dropout_rng": rng}
        return ring_attention(query, key, value, bias, mask, axis_name=SEQUENCE, **arrays, **others)

    return jax.shard_map(
        part,
        mesh=mesh,
        in_specs=(split, split, split, specs(bias), specs(mask), of_arrays),
        out_specs=split,
    )(query, key, value, bias, mask, arrays)
