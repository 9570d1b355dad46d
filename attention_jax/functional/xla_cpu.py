"""Operations in the form that XLA runs fast on a CPU.

Each function stands for a plain operation, which its docstring names, and gives the same numbers.
On other devices it *is* the plain operation: `lax.platform_dependent` chooses for the device when
the program is compiled. The remarks hold for jax 0.10 to 0.12 unless they say otherwise.
"""

import functools
import math
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from attention_jax.functional.mesh import full_like, vary_alike
from attention_jax.types import Array, PyTree

# Before jax 0.11 XLA computes a batch of small products on one core.
ONE_CORE = jax.__version_info__ < (0, 11)
# Of a product with a kernel, from which on its form matters.
_MULTIPLICATIONS = 2**22
# The polynomial nearest to exp, relatively, for |x| <= log(2) / 2; from degree 5 down to 0.
_EXP = (0.00829027, 0.04189816, 0.16667639, 0.49999148, 0.99999970, 1.0)


# Products ----------------------------------------------------------------------------------------


def matmul(a: Array, b: Array) -> Array:
    """a b of each head, summed in float32 at least; linear in each for differentiation."""
    return jnp.matmul(a, b, preferred_element_type=jnp.promote_types(a.dtype, jnp.float32))


def kernel_product(
    x: Array, kernel: Array, dimension_numbers: lax.DotDimensionNumbers, **options: Any
) -> Array:
    """Stands for `lax.dot_general` of vectors `[..., D]` and a kernel `[D, ...]`, as in `nn.Dense`.

    The batch axes become one: for several, XLA computes the gradient of the kernel at a third of
    the speed. A wide `x` is the right operand in that gradient: as the left one it is a third
    slower. Small products stay as they are, and so do all where jax sees several devices, because
    two of the axes may be split.
    """
    is_local = jax.device_count() == 1 or jax.sharding.get_abstract_mesh().manual_axes
    if not (is_local and _is_large(x, kernel, dimension_numbers)):
        return lax.dot_general(x, kernel, dimension_numbers, **options)
    multiply = functools.partial(_flat_product, tuple(options.items()))
    return _flat(multiply, x, kernel, dimension_numbers)


def bfloat16_dot_general(
    x: Array, kernel: Array, dimension_numbers: lax.DotDimensionNumbers, **options: Any
) -> Array:
    """`lax.dot_general` of float32 with operands rounded to bfloat16 and sums in float32.

    It is the `dot_general` of layers and of `nn.Dense`: their parameters, sums and everything but
    products of kernels stay in float32. A processor with instructions for bfloat16 computes such
    products at twice the speed. Accelerators have them too. Without such instructions a CPU
    multiplies the same rounded numbers in float32, 6 % slower than without rounding.

    On a CPU it rounds large products alone, forward and backward, and where no compiler can split
    them: where jax sees one device, in a `jax.pmap`, and in a `jax.shard_map` over all axes. It
    computes others in float32, which is not slower for small ones. Other types, and what asks for a
    `precision` or another type of the result, it computes as `lax.dot_general` does. It has no
    forward-mode derivatives on a CPU.
    """
    asks = any(options.get(name) is not None for name in ("precision", "preferred_element_type"))
    if asks or not x.dtype == kernel.dtype == jnp.float32:
        return kernel_product(x, kernel, dimension_numbers, **options)
    if jax.default_backend() != "cpu":
        options |= {"precision": lax.DotAlgorithmPreset.BF16_BF16_F32}
        return lax.dot_general(x, kernel, dimension_numbers, **options)
    mesh = jax.sharding.get_abstract_mesh()
    is_alone = mesh.are_all_axes_manual if mesh.axis_names else jax.device_count() == 1
    if not (is_alone and _is_large(x, kernel, dimension_numbers, narrowest=16)):
        return kernel_product(x, kernel, dimension_numbers, **options)
    x, kernel = vary_alike((x, kernel))
    return _flat(functools.partial(_rounded_product, None), x, kernel, dimension_numbers)


def _is_large(x, kernel, dimension_numbers, narrowest=1):
    """Whether vectors and a kernel make a large product on a CPU, and not too narrow a one."""
    (left, right), batch = dimension_numbers
    summed = len(left)
    rows, columns = x.shape[: x.ndim - summed], kernel.shape[summed:]
    in_order = (*left,) == (*range(len(rows), x.ndim),) and (*right,) == (*range(summed),)
    is_known = all(isinstance(n, int) for n in (*x.shape, *kernel.shape))
    return (
        jax.default_backend() == "cpu"
        and is_known
        and in_order
        and x.shape[len(rows) :] == kernel.shape[:summed]  # Else lax tells what does not fit.
        and len(rows) > 1
        and batch == ((), ())
        and math.prod(rows) * kernel.size >= _MULTIPLICATIONS
        and min(map(math.prod, (rows, kernel.shape[:summed], columns))) >= narrowest
    )


def _flat(multiply, x, kernel, dimension_numbers):
    """`multiply` for matrices, of vectors and a kernel with any axes."""
    summed = len(dimension_numbers[0][0])
    size = math.prod(kernel.shape[:summed])
    found = multiply(x.reshape(-1, size), kernel.reshape(size, -1))
    return found.reshape(*x.shape[: x.ndim - summed], *kernel.shape[summed:])


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _flat_product(options, x, kernel):
    return lax.dot_general(x, kernel, (((1,), (0,)), ((), ())), **dict(options))


@_flat_product.defjvp
def _(options, primals, tangents):
    (x, kernel), (d_x, d_kernel) = primals, tangents
    if x.shape[-1] > kernel.shape[-1]:
        turned = as_written(d_kernel.T)
        of_kernel = lax.dot_general(x, turned, (((1,), (1,)), ((), ())), **dict(options))
    else:
        of_kernel = _flat_product(options, x, d_kernel)
    return _flat_product(options, *primals), _flat_product(options, d_x, kernel) + of_kernel


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _rounded_product(turned, a, b):
    """a b, a^T b or a b^T of float32, with operands rounded to bfloat16 and sums in float32.

    Args:
        turned: Which operand to transpose: None, 0 or 1.
    """
    return _dot_of_rounded(turned, a, b)


def _rounded_product_forward(turned, a, b):
    return _rounded_product(turned, a, b), (a, b)  # Which can be differentiated again.


def _rounded_product_backward(turned, operands, cotangent):
    a, b = operands
    if turned == 0:
        return _rounded_product(1, b, cotangent), _rounded_product(None, a, cotangent)
    if turned == 1:
        return _rounded_product(None, cotangent, b), _rounded_product(0, cotangent, a)
    of_a = _rounded_product(1, cotangent, b)
    if a.shape[1] > cotangent.shape[1]:  # Its transpose costs more than the product's.
        return of_a, _rounded_product(0, cotangent, a).T
    return of_a, _rounded_product(0, a, cotangent)


_rounded_product.defvjp(_rounded_product_forward, _rounded_product_backward)


def _dot_of_rounded(turned, a, b):
    def as_float32(a, b):
        a, b = (lax.reduce_precision(x, exponent_bits=8, mantissa_bits=7) for x in (a, b))
        summed = 0 if turned == 0 else 1, 1 if turned == 1 else 0
        return lax.dot_general(a, b, (tuple((axis,) for axis in summed), ((), ())))

    @jax.custom_batching.custom_vmap
    def as_bfloat16(a, b):
        left = _turned_to_bfloat16(a) if turned == 0 else _to_bfloat16(a)
        summed = (1,), (1 if turned == 1 else 0,)
        precision = lax.Precision.DEFAULT
        found = lax.dot_general(left, _to_bfloat16(b), (summed, ((), ())), precision, jnp.float32)
        # XLA would turn the product where its transpose is used, and then fails.
        return lax.optimization_barrier(found)

    @as_bfloat16.def_vmap
    def _(size, is_batched, a, b):
        # XLA fails for some batches of products of bfloat16.
        axes = [0 if batched else None for batched in is_batched]
        return jax.vmap(as_float32, axes, axis_size=size)(a, b), True

    return as_bfloat16(a, b) if multiplies_bfloat16() else as_float32(a, b)


@functools.cache
def multiplies_bfloat16() -> bool:
    """Whether Linux lists instructions of this processor for products of bfloat16.

    Without them XLA takes longer for such a product than for one of float32.
    """
    try:
        words = set(Path("/proc/cpuinfo").read_text().split())
    except OSError:  # Another system.
        return False
    return not words.isdisjoint(("avx512_bf16", "amx_bf16", "bf16"))  # The last one is of ARM.


def _to_bfloat16(x):
    """`x` rounded; a transpose before it does not become part of a product."""
    bits = lax.bitcast_convert_type(x.astype(jnp.bfloat16), jnp.uint16)
    return lax.bitcast_convert_type(lax.optimization_barrier(bits), jnp.bfloat16)


def _turned_to_bfloat16(x):
    """x^T rounded, as the left operand of a product, stored in this order.

    XLA rewrites a product with a transpose there, and then computes it in float32. It does not
    rewrite across a condition. This one is false for one kind of NaN alone, whose result is NaN.
    """
    is_usual = lax.bitcast_convert_type(x[0, 0], jnp.uint32) != np.uint32(0x7FC12345)
    turned = lambda x: lax.optimization_barrier(x.T).astype(jnp.bfloat16)
    other = lambda x: full_like(x, jnp.nan, x.shape[::-1], jnp.bfloat16)
    return lax.cond(is_usual, turned, other, x)


@jax.custom_jvp
def product(a: Array, b: Array) -> Array:
    """Stands for `matmul(a, b)`, on all cores; Inf may become NaN, and NaN may fill its row.

    XLA divides a large product among its cores. Before jax 0.11 it computes a batch of small
    products on one core. If the same loop has a reduction, it divides the batch.
    """
    found = matmul(a, b)
    if not _is_dealt_out(a, b):
        return found
    return lax.platform_dependent(found, cpu=_plus_nothing, default=lambda x: x)


@jax.custom_jvp
def exact_product(a: Array, b: Array) -> Array:
    """Stands for `matmul(a, b)`; a NaN stays where it arises, but Inf may become NaN."""
    if not _is_dealt_out(a, b):
        return product(a, b)

    def unless_spread(a, b):
        found = product(a, b)
        spread = any_of_batch(jnp.isnan(found[..., 0]))
        return lax.cond(spread, lambda _: matmul(a, b), lambda x: x, found)

    return lax.platform_dependent(a, b, cpu=unless_spread, default=matmul)


def _tangents(of):
    """The derivatives of `product` and `exact_product`."""

    def rule(primals, tangents):
        d_a, d_b = map(opaque, tangents)
        # A NaN or Inf is masked, or shows in the product already; here it would meet a zero.
        a, b = (jnp.where(jnp.isfinite(x), x, 0) for x in primals)
        return of(*primals), matmul(d_a, b) + matmul(a, d_b)

    of.defjvp(rule)


_tangents(product)
_tangents(exact_product)


def _is_dealt_out(a, b):
    """Whether there are many small products, and a compiler that needs help with them."""
    if not all(isinstance(n, int) for n in (*a.shape, b.shape[-1])):
        return False  # Left open by an export.
    small = a.shape[-2] * max(a.shape[-1], b.shape[-1]) <= 2**16
    return ONE_CORE and a.ndim > 2 and small and a.dtype == jnp.float32


def _plus_nothing(x):
    """`x`, in a form that XLA fuses with a product; `max` keeps NaN, `minimum` alone does not.

    An Inf becomes NaN. Forms that keep it, with a `clip` or a `where`, are not fused: 1.2 to 1.5
    times the time of attention to 128 positions.
    """
    return x + 0 * jnp.minimum(x, x.max(-1, keepdims=True))


def row_sums(x: Array) -> Array:
    """Stands for `x.sum(-1)` where x is a product of two arrays.

    XLA computes such a sum within the product, one number at a time: seven times as slow.
    """

    def by_ones(x):
        ones = lax.optimization_barrier(jnp.ones((x.shape[-1], 1), x.dtype))
        return jnp.matmul(lax.optimization_barrier(x), ones)[..., 0]

    return lax.platform_dependent(x, cpu=by_ones, default=lambda x: x.sum(-1))


@jax.custom_batching.custom_vmap
def any_of_batch(x: Array) -> Array:
    """Whether any entry is true, over the batch of a `vmap` too: a `cond` on it stays one."""
    return x.any()


@any_of_batch.def_vmap
def _(size, batched, x):
    return any_of_batch(x), False


# The exponential ---------------------------------------------------------------------------------


@jax.custom_jvp
def exp(x: Array) -> Array:
    """Stands for exp(min(x, 88)), within a few units in the last place; 0 below -88 in float32.

    XLA treats its own exponential as too expensive to repeat, so it does not fuse it with a sum.
    The result must be finite, because its derivative meets a zero in rows that are computed again.
    """
    x = jnp.where(x > 88, jnp.asarray(88, x.dtype), x)  # A NaN stays one.
    if x.dtype != jnp.float32:
        return jnp.exp(x)
    return lax.platform_dependent(x, cpu=_exp_of_float32, default=jnp.exp)


@exp.defjvp
def _(primals, tangents):
    y = exp(*primals)
    return y, y * tangents[0]


def _exp_of_float32(x):
    """2^n p(r), where x = n log(2) + r, and p is near exp for |r| <= log(2) / 2."""
    x = jnp.where(x < -88, np.float32(-88), x)
    n = lax.round(x * np.float32(1 / math.log(2)), lax.RoundingMethod.TO_NEAREST_EVEN)
    # log(2) in two parts, so that the large product is exact (Cody and Waite).
    r = (x - n * np.float32(355 / 512)) - n * np.float32(math.log(2) - 355 / 512)
    p = functools.reduce(lambda y, c: y * r + np.float32(c), _EXP)
    # The last bits of this sum are those of n + 127, the exponent of 2^n; for n = -127 it is 0.
    bits = lax.bitcast_convert_type(n + np.float32(1.5 * 2**23 + 127), jnp.int32)
    return p * lax.bitcast_convert_type(bits << 23, jnp.float32)


# Operands and layouts ----------------------------------------------------------------------------


def opaque(x: Array) -> Array:
    """Stands for `x`, and hides from XLA that all entries are equal, as in `jnp.ones`.

    XLA stores such a right operand of a product as one number. If it fuses the product with a
    reduction, it reads past that number: `(q @ jnp.ones((64, 128))).max(-1)` is wrong under jit
    with jax 0.10 and 0.12. Adding 0 * i hides it: XLA must keep this term, since i might be
    infinite.
    """

    def plus_nothing(x):
        rows, columns = (lax.broadcasted_iota(x.dtype, x.shape, x.ndim - axis) for axis in (2, 1))
        return x + 0 * (rows + columns)

    return lax.platform_dependent(x, cpu=plus_nothing, default=lambda x: x)


def as_written(x: PyTree) -> PyTree:
    """Stands for `x`, and makes XLA store it with its axes in this order.

    XLA would fold a transpose into a product. A product with a transposed left operand is slow.
    """
    return lax.platform_dependent(x, cpu=lax.optimization_barrier, default=lambda x: x)


def dynamic_slice(x: Array, starts, sizes) -> Array:
    """Stands for `lax.dynamic_slice`.

    XLA computes bfloat16 in float32, except in products. So a loop that slices a bfloat16 array
    would first copy the whole array to float32. Slicing integers with the same bits avoids this.
    """
    if x.dtype != jnp.bfloat16:
        return lax.dynamic_slice(x, starts, sizes)
    return _slice_bits(x, starts, sizes)


@functools.partial(jax.custom_jvp, nondiff_argnums=(2,))
def _slice_bits(x, starts, sizes):
    def of_bits(x, starts):
        bits = lax.dynamic_slice(lax.bitcast_convert_type(x, jnp.uint16), starts, sizes)
        return lax.bitcast_convert_type(bits, x.dtype)

    def plain(x, starts):
        return lax.dynamic_slice(x, starts, sizes)

    return lax.platform_dependent(x, starts, cpu=of_bits, default=plain)


@_slice_bits.defjvp
def _(sizes, primals, tangents):
    (x, starts), (d_x, _) = primals, tangents
    return _slice_bits(x, starts, sizes), lax.dynamic_slice(d_x, starts, sizes)
