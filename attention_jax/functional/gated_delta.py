"""The gated delta rule: a memory that forgets, and that corrects its values instead of adding.

The recurrence is computed in chunks, each by a few matrix products.
"""

import functools

import jax.numpy as jnp
from jax import lax

from attention_jax.checks import (
    as_size,
    check_flag,
    check_floating,
    check_qkv,
    jax_defaults,
    public,
)
from attention_jax.functional.masks import Mask, as_mask, causal, is_causal
from attention_jax.functional.mesh import attended, in_auto, partition_of
from attention_jax.types import Array


@public
def gated_delta_attention(
    query: Array,
    key: Array,
    value: Array,
    *,
    log_decay: Array | None = None,
    beta: Array | None = None,
    mask: Mask = causal(),  # noqa: B008  (a constant)
    chunk_size: int = 32,
    initial_state: Array | None = None,
    return_state: bool = False,
) -> Array | tuple[Array, Array]:
    """Reads a memory of keys and values that every position first decays and then corrects.

        M_t = alpha_t M_{t-1} + beta_t k_t (v_t - alpha_t M_{t-1}^T k_t)^T,   o_t = M_t^T q_t

    The memory M is `[H, V]`, zeros at first if no other is given. With beta = 1 and keys of length
    1 it then returns exactly v_t for k_t. Keys should be no longer than 1, or the memory may grow
    without bound. Time is linear in T. NaN or Inf in an input spoils its whole chunk, earlier
    positions too.

    Args:
        query: `[..., T, N, H]`.
        key: `[..., S, K, H]`, where K divides N: query head n reads the memory of key head
            n // (N / K).
        value: `[..., S, W, V]`. W is K, or a multiple of it: then each value head w has a memory of
            its own, with the keys of head w // (W / K). N must divide W or be a multiple of it:
            query head n reads memory n // (N / W), or memory w is read by query head w // (W / N).
        log_decay: log(alpha), `[..., S, W]`, finite and not above 0. Default 0: no decay.
        beta: How far the memory is corrected, `[..., S, W]` in [0, 1]. Default 1: all the way.
        mask: `masks.causal()`; a recurrence supports no other mask.
        chunk_size: How many positions are computed at once; the result does not depend on it.
        initial_state: M before the first position, `[..., W, H, V]`. Default: zeros.
        return_state: Also returns M behind the last key, to go on from.

    Returns:
        `[..., T, max(N, W), V]` in the dtype of `query`. Queries beyond the last key read the last
        memory. With `return_state` also the memories `[..., W, H, V]`, in float32 at least.

    Raises:
        ValueError: The shapes do not fit together.
        TypeError: An array does not hold floating-point numbers.
        NotImplementedError: Another mask; `dot_product_attention` takes any.

    Reference:
        Yang et al. 2024, "Gated Delta Networks", equation 10, and section 3.3 for the chunks.
        https://arxiv.org/abs/2412.06464
        The products of householder matrices: Bischof and Van Loan 1987, "The WY representation".
        https://doi.org/10.1137/0908009
    """
    query, key, value = check_qkv(query, key, value, more_values=True)
    chunk_size = as_size("chunk_size", chunk_size)
    mask = mask if mask is None else as_mask(mask)
    if not is_causal(mask):
        raise NotImplementedError(
            f"gated_delta_attention takes mask=masks.causal() alone, got {mask!r}: "
            "use dot_product_attention."
        )
    dtype = jnp.promote_types(jnp.result_type(query, key, value), jnp.float32)
    log_decay = _gate("log_decay", log_decay, 0.0, value).astype(dtype)
    beta = _gate("beta", beta, 1.0, value).astype(dtype)
    check_flag("return_state", return_state)
    batch, (W, V), H = value.shape[:-3], value.shape[-2:], key.shape[-1]
    if initial_state is not None:
        check_floating("initial_state", initial_state)
        if initial_state.shape != (*batch, W, H, V):
            raise ValueError(
                f"initial_state must be [..., W, H, V] = {(*batch, W, H, V)}, got shape "
                f"{initial_state.shape}."
            )
        initial_state = jnp.asarray(initial_state).astype(dtype)
    compute = functools.partial(_compute, chunk_size=chunk_size)
    state_axes = partition_of(value, *range(len(batch)), value.ndim - 2, None, None)
    out, state = in_auto(
        compute,
        (query, key, value, log_decay, beta, initial_state),
        (attended(query), state_axes),
    )
    return (out, state) if return_state else out


def _compute(query, key, value, log_decay, beta, memory, *, chunk_size):
    S, K, V = value.shape[-3:]
    # Each value head gets keys of its own, and each memory a query that reads it.
    key = jnp.repeat(key, K // key.shape[-2], axis=-2)
    query = jnp.repeat(query, max(K // query.shape[-2], 1), axis=-2)
    *batch, T, N, H = query.shape
    out_dtype, dtype = query.dtype, beta.dtype
    length = max(T, S, 1)
    # Positions i, j within a chunk. An export may leave the length open.
    c = min(chunk_size, length) if isinstance(length, int) else chunk_size
    chunks = -(-length // c)

    def by_chunk(x):
        """`[..., positions, K, features]` -> `[chunks, ..., K, c, features]`, padded with zeros."""
        x = jnp.moveaxis(x.astype(dtype), -3, -2)
        padding = [(0, 0)] * (x.ndim - 2) + [(0, chunks * c - x.shape[-2]), (0, 0)]
        x = jnp.pad(x, padding).reshape(*x.shape[:-2], chunks, c, x.shape[-1])
        return jnp.moveaxis(x, -3, 0)

    query = query.reshape(*batch, T, K, N // K * H)
    query, key, value, log_decay, beta = (
        by_chunk(x) for x in (query, key, value, log_decay[..., None], beta[..., None])
    )
    query = jnp.moveaxis(query.reshape(*query.shape[:-1], N // K, H), -2, -3)  # [..., K, G, c, H]

    # The decay from before the chunk up to i, and from behind j up to i. Each is a sum of its own:
    # in a difference of two sums a strong decay before j would swallow the others.
    since = jnp.exp(jnp.cumsum(log_decay, axis=-2))  # [..., c, 1]
    behind = jnp.tri(c, k=-1, dtype=bool)
    between = jnp.cumsum(jnp.where(behind, log_decay, 0), axis=-2)  # [..., i, j]
    between = jnp.where(jnp.tri(c, dtype=bool), jnp.exp(between), 0)
    until = jnp.swapaxes(between[..., -1:, :], -1, -2)  # [..., c, 1]

    # Position i writes u_i = beta_i (v_i - the memory's value for k_i), which depends on the u_j
    # before it. This is one triangular system for the chunk: (1 + L) u = beta (v - since k M).
    L = beta * between * (key @ jnp.swapaxes(key, -1, -2))  # Its diagonal is not read.
    inverse = _inverse(L)
    written, erased = inverse @ (beta * value), inverse @ (beta * since * key)

    weights = jnp.einsum("...GiH,...jH->...Gij", query, key) * between[..., None, :, :]
    query = query * since[..., None, :, :]
    stored = jnp.swapaxes(key * until, -1, -2)  # [..., H, c]
    decay = since[..., -1:, :]  # [..., 1, 1]

    def chunk(memory, xs):
        query, weights, written, erased, stored, decay = xs
        u = written - erased @ memory  # [..., K, c, V]
        out = query @ memory[..., None, :, :] + weights @ u[..., None, :, :]
        return decay * memory + stored @ u, out

    # Made from the inputs, so that under `shard_map` it varies over the devices as they do.
    zeros = jnp.zeros_like(stored[0] @ written[0])
    memory = zeros if memory is None else memory + zeros
    memory, out = lax.scan(chunk, memory, (query, weights, written, erased, stored, decay))
    out = jnp.moveaxis(out, 0, -3)  # [..., K, G, chunks, c, V]
    out = out.reshape(*batch, N, chunks * c, V)[..., :T, :]
    return jnp.swapaxes(out, -2, -3).astype(out_dtype), memory


@jax_defaults()
def causal_convolution(x: Array, kernel: Array, before: Array | None = None) -> Array:
    """Mixes every feature with its own last few values, `[..., T, D] -> [..., T, D]`.

    Args:
        x: `[..., T, D]`.
        kernel: `[W, D]`; the last row meets the present, the first the value W - 1 steps ago.
        before: All that is known of the sequence: `[..., W - 1 + T, D]`, with `x` at its end.
            Default: zeros and `x`.
    """
    width, T = kernel.shape[0], x.shape[-2]
    padded = before
    if before is None:
        padded = jnp.pad(x, [(0, 0)] * (x.ndim - 2) + [(width - 1, 0), (0, 0)])
    # A sum of shifted copies: XLA's depthwise convolution is slow on a CPU.
    return sum(kernel[i] * padded[..., i : i + T, :] for i in range(width))


@jax_defaults()
def unit_length(x: Array) -> Array:
    """`x` over its length along the last axis; zeros stay zeros."""
    dtype = jnp.promote_types(x.dtype, jnp.float32)
    squares = jnp.sum(jnp.square(x.astype(dtype)), axis=-1, keepdims=True)
    # The constant matters only for vectors of almost no length.
    return (x * lax.rsqrt(squares + 1e-6)).astype(x.dtype)


def _inverse(L: Array) -> Array:
    """(1 + L)^-1 for a strictly lower triangular `[..., c, c]`; its upper part is not read.

    It works by halves: ((A, 0), (B, C))^-1 = ((A^-1, 0), (-C^-1 B A^-1, C^-1)). This is as exact as
    substitution. The series 1 - L + L^2 - ... is not: it cancels enormous terms if keys repeat.
    XLA's triangular solve can hang inside a loop on a CPU with few cores.
    """
    c = L.shape[-1]
    if c == 1:
        return jnp.ones_like(L)
    half = (c + 1) // 2
    if c % 2:  # Add one row and column of the unit matrix.
        L = jnp.pad(L, [(0, 0)] * (L.ndim - 2) + [(0, 1), (0, 1)])
    A, B, C = L[..., :half, :half], L[..., half:, :half], L[..., half:, half:]
    A, C = _inverse(jnp.stack([A, C]))
    B = -B if half == 1 else -C @ B @ A
    halves = [jnp.concatenate([A, jnp.zeros_like(A)], -1), jnp.concatenate([B, C], -1)]
    return jnp.concatenate(halves, -2)[..., :c, :c]


def _gate(name: str, gate: Array | None, default: float, value: Array) -> Array:
    if gate is None:
        return jnp.full(value.shape[:-1], default, value.dtype)
    check_floating(name, gate)
    if gate.shape != value.shape[:-1]:
        raise ValueError(f"{name} must be [..., S, W] = {value.shape[:-1]}, got {gate.shape}.")
    return jnp.asarray(gate)
