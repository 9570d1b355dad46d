"""One sequence over several devices: ring attention and Ulysses, for use inside `jax.shard_map`.

Each device holds a part of the queries and a part of the keys and values. In the ring, keys and
values go from device to device, and each device attends with its own queries to whatever keys
visit it. In Ulysses one exchange gives each device all positions of some of the heads.

Masks and biases are those of the whole sequence. Dropout drops the weights that one device would.

References:
    Liu et al. 2023, "Ring Attention with Blockwise Transformers for Near-Infinite Context".
    https://arxiv.org/abs/2310.01889
    Jacobs et al. 2023, "DeepSpeed Ulysses". https://arxiv.org/abs/2309.14509
"""

import jax
import jax.numpy as jnp
from jax import lax

from attention_jax.checks import as_array, as_size, check_qkv, check_word, public, told
from attention_jax.functional import dropout
from attention_jax.functional.biases import Bias
from attention_jax.functional.dot_product import dot_product_attention, prepare
from attention_jax.functional.masks import Mask
from attention_jax.functional.mesh import vary_alike
from attention_jax.functional.options import Options, make_options
from attention_jax.functional.ring import ORDERS, attend, lowest, make_ring
from attention_jax.functional.tiles import Tile
from attention_jax.types import Array


@public
def ring_attention(
    query: Array,
    key: Array,
    value: Array,
    bias: Array | Bias | None = None,
    mask: Array | Mask | None = None,
    *,
    axis_name: str,
    order: str = "contiguous",
    scale: float | Array | None = None,
    softcap: float | None = None,
    sinks: Array | None = None,
    dropout_rate: float | Array = 0.0,
    dropout_rng: Array | None = None,
    deterministic: bool = False,
    implementation: str | None = None,
    block_size: int | tuple[int, int] | None = None,
    return_residual: bool = False,
) -> Array | tuple[Array, Array]:
    """`dot_product_attention` of a sequence whose parts lie on the devices of a mesh axis.

    Keys and values go round the devices; partial results are added by their logsumexp in float32.
    Memory per device falls with the number of devices, in the backward pass too. Keys that the
    mask's bounds hide are not computed. If no device sees the keys that are some steps away, as in
    a window, these steps are left out.

    Args:
        query: `[..., T / n, N, H]`, the device's part; n is the size of the axis.
        key: `[..., S / n, K, H]`.
        value: `[..., S / n, K, V]`.
        bias, mask: Those of the whole sequence: arrays broadcast to `[..., N, T, S]`, and rules
            count places in the whole. Their arrays must be whole on every device: use
            `in_specs=P()`, or `jax.lax.all_gather`. They are in the order of the sequence, also
            where `order` is "zigzag".
        axis_name: The axis of `jax.shard_map` over which T and S are split.
        order: "contiguous": device i holds part i of n. "zigzag": device i holds parts i and
            2 n - 1 - i of 2 n, so that under a causal mask all devices have the same work;
            `zigzag` puts a sequence in this order.
        scale, softcap, sinks, deterministic: As in `dot_product_attention`.
        dropout_rate, dropout_rng: As in `dot_product_attention`, with the same key on every device
            of this axis. Places of queries and keys count in the whole sequence; batch rows count
            in the device's part, so fold the device's place on a batch axis into the key.
        implementation: What computes a part: "dense", "blockwise", or None for the choice.
        block_size: As in `dot_product_attention`.
        return_residual: Also returns the logsumexp, `[..., T / n, N]`.

    Returns:
        `[..., T / n, N, V]` in the dtype of `query`: the part of the one-device result. With
        `return_residual`, that and the residual.

    Raises:
        ValueError: As in `dot_product_attention`; or there is no such axis, or a zig-zag part has
            an odd length, or a mask or bias is that of a part.
        NotImplementedError: implementation="cudnn".

    Reference:
        Liu et al. 2023, https://arxiv.org/abs/2310.01889. Zig-zag order: Llama Team 2024, "The
        Llama 3 Herd of Models", section 3.3.2. https://arxiv.org/abs/2407.21783
    """
    check_word("order", order, ORDERS)
    size = _axis_size("ring_attention", axis_name)
    name, _, arrays, options, block_size = prepare(
        query,
        key,
        value,
        bias,
        mask,
        implementation,
        block_size,
        scale=scale,
        softcap=softcap,
        sinks=sinks,
        dropout_rate=dropout_rate,
        dropout_rng=dropout_rng,
        deterministic=deterministic,
        return_residual=True,
    )
    query, key, value = arrays
    T, S = size * query.shape[-3], size * key.shape[-3]
    _check_whole("ring_attention", options, query, key, T, S)
    for what, array in (("query", query), ("key", key)):
        if order == "zigzag" and array.shape[-3] % 2:
            raise ValueError(
                f'order="zigzag" needs an even length on each device, got {what} {array.shape}.'
            )
    ring = make_ring(axis_name, size, order, T, S, name, block_size, options.mask)
    out, residual = attend(ring, query, key, value, options)
    least = lowest(residual)
    if sinks is not None:
        # Once, after all keys. A sink is one more key, and its value is zero.
        sinks = jnp.maximum(options.sinks.astype(residual.dtype), least)
        total = jnp.logaddexp(residual, sinks)
        out *= jnp.exp(residual - total)[..., None]
        residual = total
    out = out.astype(query.dtype)
    if not return_residual:
        return out
    with jax.debug_infs(False):  # The -inf of an empty row is meant.
        return out, jnp.where(residual <= least, -jnp.inf, residual)


@public
def ulysses_attention(
    query: Array,
    key: Array,
    value: Array,
    bias: Array | Bias | None = None,
    mask: Array | Mask | None = None,
    *,
    axis_name: str,
    scale: float | Array | None = None,
    softcap: float | None = None,
    sinks: Array | None = None,
    dropout_rate: float | Array = 0.0,
    dropout_rng: Array | None = None,
    deterministic: bool = False,
    implementation: str | None = None,
    block_size: int | tuple[int, int] | None = None,
    return_residual: bool = False,
) -> Array | tuple[Array, Array]:
    """`dot_product_attention` of a sequence in parts, where each device computes some heads.

    An all-to-all exchange gives each device all positions of N / n heads, and another one takes the
    results back. If the devices do not divide the key heads K, key heads are repeated before.

    Args:
        query: `[..., T / n, N, H]`, the device's part; n is the size of the axis and divides N.
        key: `[..., S / n, K, H]`.
        value: `[..., S / n, K, V]`.
        bias, mask: Those of the whole sequence and of all heads, as in `ring_attention`.
        axis_name: The axis of `jax.shard_map` over which T and S are split: device i holds part i.
        scale, softcap, sinks, deterministic, implementation, block_size: As in
            `dot_product_attention`; `sinks` are those of all N heads.
        dropout_rate, dropout_rng: As in `ring_attention`.
        return_residual: Also returns the logsumexp, `[..., T / n, N]`.

    Returns:
        `[..., T / n, N, V]`: the part of the one-device result. With `return_residual`, that and
        the residual.

    Raises:
        ValueError: As in `dot_product_attention`; or there is no such axis, or a mask or bias is
            that of a part.
        NotImplementedError: The devices do not divide the heads; `ring_attention` can do this.

    Reference:
        Jacobs et al. 2023, "DeepSpeed Ulysses", section 3. https://arxiv.org/abs/2309.14509
    """
    size = _axis_size("ulysses_attention", axis_name)
    query, key, value = check_qkv(query, key, value)
    N, K = query.shape[-2], key.shape[-2]
    options = make_options(
        query,
        bias,
        mask,
        scale=scale,
        softcap=softcap,
        sinks=sinks,
        dropout_rate=dropout_rate,
        dropout_rng=dropout_rng,
        deterministic=deterministic,
        return_residual=return_residual,
    )
    if N % size:
        raise NotImplementedError(
            f"ulysses_attention needs query heads N that the {size} devices of axis {axis_name!r} "
            f"divide, got {N=}; ring_attention takes any."
        )
    T, S = size * query.shape[-3], size * key.shape[-3]
    _check_whole("ulysses_attention", options, query, key, T, S)
    repeats = next(r for r in range(1, N // K + 1) if N // K % r == 0 and K * r % size == 0)
    key, value = (jnp.repeat(x, repeats, axis=-2) if repeats > 1 else x for x in (key, value))

    index = lax.axis_index(axis_name)
    _, query, key, value, options = vary_alike((index, query, key, value, options))
    heads = index * (N // size), N // size
    part = Tile.whole(T, S)._replace(lead=(heads,))
    rng = options.rng if options.rate is None else dropout.Part(dropout_rng, heads[0], 0, 0)

    def exchange(x, split, joined):
        return lax.all_to_all(x, axis_name, x.ndim + split, x.ndim + joined, tiled=True)

    found = dot_product_attention(
        *(exchange(x, -2, -3) for x in (query, key, value)),
        None if options.bias is None else options.bias.narrowed(part),
        None if options.mask is None else options.mask.narrowed(part),
        scale=options.scale,
        softcap=options.softcap,
        sinks=None if sinks is None else part.slice(options.sinks, "N"),
        dropout_rate=dropout_rate,
        dropout_rng=rng,
        deterministic=deterministic,
        implementation=implementation,
        block_size=block_size,
        return_residual=return_residual,
    )
    if not return_residual:
        return exchange(found, -3, -2)
    out, residual = found
    with jax.debug_infs(False):  # The -inf of an empty row is meant.
        return exchange(out, -3, -2), exchange(residual, -2, -1)


def _axis_size(called, axis_name) -> int:
    try:
        return lax.axis_size(axis_name)
    except NameError:
        raise ValueError(
            f"{called} needs an axis_name of a jax.shard_map around it, got {told(axis_name)}."
        ) from None


def _check_whole(called: str, options: Options, query: Array, key: Array, T: int, S: int) -> None:
    """Raises ValueError unless mask and bias are those of the whole sequence."""
    wholes = (
        jax.ShapeDtypeStruct((*x.shape[:-3], length, *x.shape[-2:]), x.dtype)
        for x, length in ((query, T), (key, S))
    )
    try:
        jax.eval_shape(lambda *wholes: options.arrays(*wholes), *wholes)
    except ValueError as error:
        raise ValueError(
            f"{error} Masks and biases of {called} are those of the whole sequence, "
            f"{T=} and {S=}, on every device."
        ) from None


# Zig-zag order ------------------------------------------------------------------------------------


def zigzag(x: Array, num_devices: int, axis: int = 1) -> Array:
    """A sequence in the order in which n devices have the same work under a causal mask.

    Of 2 n parts, device i holds parts i and 2 n - 1 - i. The result is split over the devices as
    usual. Parts are moved whole, by a split and a flip.

    Args:
        x: An array with the positions of the sequence on `axis`: tokens, labels, positions.
        num_devices: n.
        axis: Its length must be a multiple of 2 n.

    Raises:
        ValueError: The length is not a multiple of 2 n, or there is no such axis.

    >>> zigzag(jnp.arange(8), 2, axis=0).tolist()
    [0, 1, 6, 7, 2, 3, 4, 5]
    """
    x, axis, n = _check_sequence(x, num_devices, axis)
    parts = x.reshape(*x.shape[:axis], 2, n, -1, *x.shape[axis + 1 :])
    first, last = (lax.index_in_dim(parts, i, axis, keepdims=False) for i in (0, 1))
    return jnp.stack([first, jnp.flip(last, axis)], axis + 1).reshape(x.shape)


def unzigzag(x: Array, num_devices: int, axis: int = 1) -> Array:
    """The inverse of `zigzag`.

    >>> unzigzag(zigzag(jnp.arange(8), 2, axis=0), 2, axis=0).tolist()
    [0, 1, 2, 3, 4, 5, 6, 7]
    """
    x, axis, n = _check_sequence(x, num_devices, axis)
    parts = x.reshape(*x.shape[:axis], n, 2, -1, *x.shape[axis + 1 :])
    first, last = (lax.index_in_dim(parts, i, axis + 1, keepdims=False) for i in (0, 1))
    return jnp.stack([first, jnp.flip(last, axis)], axis).reshape(x.shape)


def device_positions(length: int, *, axis_name: str, order: str = "contiguous") -> Array:
    """Where the `length` tokens of this device stand in the whole sequence, `[length]` integers.

    For positions of a model inside `jax.shard_map`, such as `positions` of `MultiHeadAttention`.

    Raises:
        ValueError: There is no such axis, or a zig-zag part has an odd length.
    """
    check_word("order", order, ORDERS)
    length = as_size("length", length, minimum=0)
    size, index = _axis_size("device_positions", axis_name), lax.axis_index(axis_name)
    if order == "contiguous":
        return index * length + jnp.arange(length, dtype=jnp.int32)
    if length % 2:
        raise ValueError(f'order="zigzag" needs an even length on each device, got {length}.')
    within = jnp.arange(length // 2, dtype=jnp.int32)
    parts = index, 2 * size - 1 - index
    return jnp.concatenate([part * (length // 2) + within for part in parts])


def _check_sequence(x, num_devices, axis):
    x, n = jnp.asarray(as_array("x", x)), as_size("num_devices", num_devices)
    if not -x.ndim <= axis < x.ndim:
        raise ValueError(f"axis must be one of x, got {axis} for shape {x.shape}.")
    axis %= x.ndim
    if x.shape[axis] % (2 * n):
        raise ValueError(
            f"the sequence must have a multiple of 2 num_devices = {2 * n} positions, got "
            f"{x.shape[axis]}."
        )
    return x, axis, n
