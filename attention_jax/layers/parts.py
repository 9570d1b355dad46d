"""The other parts of a model: embeddings, positions, biases, MLPs and dropout."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import lax

from attention_jax.checks import (
    as_integers,
    as_rng,
    as_size,
    check_fields,
    check_flag,
    check_inputs,
    check_number,
    check_rate,
    jax_defaults,
    known,
)
from attention_jax.functional import biases, masks
from attention_jax.functional.biases import Bias
from attention_jax.functional.gated_delta import causal_convolution
from attention_jax.functional.masks import Mask, hides_future
from attention_jax.functional.mesh import in_auto, partition_of
from attention_jax.functional.positions import sinusoidal_at
from attention_jax.functional.xla_cpu import kernel_product
from attention_jax.layers.cache import advances, last_inputs
from attention_jax.types import Array, Initializer

EMBEDDING_SCALE = 0.02  # Of the initial tables of tokens and of learned positions, as in GPT-2.
# A sinusoid's mean square is 1/2. The waves start as large as the tokens, so they do not hide them.
SINUSOIDAL_SCALE = 2**0.5 * EMBEDDING_SCALE


def scaled_init(scale: float | Array) -> Initializer:
    """flax's default for kernels, times `scale`, which may be traced."""
    init = nn.initializers.lecun_normal()
    return lambda rng, shape, dtype: (scale * init(rng, shape, dtype)).astype(dtype)


class Embed(nn.Embed):
    """`flax.linen.Embed` for tokens that may be split over Explicit axes of a mesh."""

    @jax_defaults()
    def __call__(self, tokens: Array) -> Array:
        """`[...] -> [..., features]`; a token without a row in the table becomes NaN."""
        (table,) = self.promote_dtype(self.embedding, dtype=self.dtype, inexact=False)
        take = functools.partial(jnp.take, axis=0)
        rows = partition_of(tokens, *range(tokens.ndim), None)
        return in_auto(take, (table, tokens), rows)


class TokenEmbedding(Embed):
    """Embeds tokens, and turns vectors into logits with the same table.

    Attributes:
        num_embeddings: The size of the vocabulary.
        features: Width D of the model.
        embedding_init: Makes the table `embedding` `[num_embeddings, D]`.
        dtype, param_dtype: The types to compute in and to keep parameters in.
        scale: Multiplies the embedded tokens, not the logits. Gemma has D ** 0.5.
        softcap: c of c * tanh(logits / c). None leaves the logits as they are.
    """

    embedding_init: Initializer = nn.initializers.normal(EMBEDDING_SCALE)
    scale: float = 1.0
    softcap: float | None = None

    def __call__(self, inputs: Array) -> Array:
        """Tokens `[..., T] -> [..., T, D]`."""
        check_fields(self)
        as_size("num_embeddings", self.num_embeddings)
        as_size("features", self.features)
        x = super().__call__(as_integers("inputs", inputs, axes=1))
        # In the type of x, as the models that have a scale were trained.
        return x if self.scale == 1 else x * jnp.asarray(self.scale, x.dtype)

    def attend(self, x: Array) -> Array:
        """`[..., D] -> [..., num_embeddings]`: logits in float32, the product of x and each row."""
        if not all(isinstance(n, int) and n == 1 for n in x.shape[:-1]):
            return _capped(super().attend(x), self.softcap)
        # A single vector, as in decoding. From `x @ table.T`, as above, XLA makes a slow loop.
        x, table = self.promote_dtype(x, self.embedding, dtype=self.dtype, inexact=False)
        logits = lax.dot_general(x, table, (((x.ndim - 1,), (1,)), ((), ())))
        return _capped(logits, self.softcap)


class VectorEmbedding(nn.Module):
    """For a model of vectors, which are passed on unchanged.

    Attributes:
        features: Their width D.
    """

    features: int

    def __call__(self, inputs: Array) -> Array:
        """`[..., T, D]`, checked."""
        check_inputs("inputs", inputs)
        if inputs.shape[-1] != as_size("features", self.features):
            raise ValueError(
                f"inputs must be [..., T, {self.features}] (features={self.features}), got shape "
                f"{inputs.shape}."
            )
        return inputs

    def attend(self, x: Array) -> Array:
        return x


class Unembedding(nn.Dense):
    """Logits from a separate matrix, `[..., D] -> [..., features]` in float32.

    Attributes are those of `nn.Dense`, and `softcap` of `TokenEmbedding`.
    """

    softcap: float | None = None

    def __call__(self, x: Array) -> Array:
        return _capped(super().__call__(x), self.softcap)


def _capped(logits, softcap) -> Array:
    logits = logits.astype(jnp.float32)
    if softcap is None:
        return logits
    check_number("softcap", softcap)
    if known(softcap) is not None and not known(softcap) > 0:
        raise ValueError(f"softcap must be positive, got {softcap}.")
    return softcap * jnp.tanh(logits / softcap)


class SinusoidalPositions(nn.Module):
    """Adds `positions.sinusoidal`.

    Attributes:
        scale: Multiplies the waves. The default makes them as large as initial tokens; vectors may
            be larger.
    """

    scale: float = SINUSOIDAL_SCALE

    @jax_defaults()
    def __call__(self, x: Array, positions: Array | None = None) -> Array:
        """`[..., T, D] -> [..., T, D]`; the positions, integers `[..., T]`, are 0, 1, ... if None.

        Raises:
            ValueError: D is odd.
        """
        check_fields(self)
        if x.shape[-1] % 2:
            raise ValueError(f"features must be even for SinusoidalPositions, got {x.shape[-1]}.")
        if positions is None:
            positions = jnp.arange(x.shape[-2], dtype=jnp.int32)
        return x + (self.scale * sinusoidal_at(positions, x.shape[-1])).astype(x.dtype)


class LearnedPositions(nn.Module):
    """Adds a learned vector for each position.

    Attributes:
        max_length: The number of positions.
        dtype, param_dtype: The types to compute in and to keep parameters in.
    """

    max_length: int
    dtype: Any = None
    param_dtype: Any = jnp.float32

    @nn.compact
    @jax_defaults()
    def __call__(self, x: Array, positions: Array | None = None) -> Array:
        """`[..., T, D] -> [..., T, D]`; the positions, integers `[..., T]`, are 0, 1, ... if None.

        Raises:
            ValueError: There are more than `max_length` positions. Under `jit`, a token whose
                position has no row becomes NaN.
        """
        check_fields(self)
        T, max_length = x.shape[-2], as_size("max_length", self.max_length)
        table = Embed(
            max_length,
            x.shape[-1],
            dtype=self.dtype,
            param_dtype=self.param_dtype,
            embedding_init=nn.initializers.normal(EMBEDDING_SCALE),
            name="table",
        )
        if positions is None:
            if T > max_length:
                raise ValueError(f"inputs have {T} positions, more than max_length={max_length}.")
            return x + table(jnp.arange(T, dtype=jnp.int32))
        beyond = (positions < 0) | (positions >= max_length)
        if not isinstance(beyond, jax.core.Tracer) and beyond.any():
            raise ValueError(
                f"positions must lie in [0, max_length) with max_length={max_length}, got "
                f"{int(positions.min())} to {int(positions.max())}."
            )
        # NaN, because a clipped position would silently be a wrong one.
        return x + jnp.where(beyond[..., None], jnp.nan, table(jnp.where(beyond, 0, positions)))


class AlibiBias(nn.Module):
    """`biases.alibi` with the paper's slopes.

    Attributes:
        num_heads: Number N of query heads.
    """

    num_heads: int

    def __call__(self) -> Bias:
        return biases.alibi(as_size("num_heads", self.num_heads))


class RelativeBias(nn.Module):
    """`biases.relative` with a table `relative_bias` `[num_buckets, N]` that begins as zeros.

    Attributes:
        num_heads: Number N of query heads.
        bidirectional, num_buckets, max_distance: As in `biases.relative`; the defaults are T5's.
        param_dtype: The type of the table.
    """

    num_heads: int
    bidirectional: bool = True
    num_buckets: int = 32
    max_distance: int = 128
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self) -> Bias:
        check_fields(self)
        shape = as_size("num_buckets", self.num_buckets), as_size("num_heads", self.num_heads)
        init = nn.initializers.zeros_init()
        table = self.param("relative_bias", init, shape, self.param_dtype)
        return biases.relative(
            table, bidirectional=self.bidirectional, max_distance=self.max_distance
        )


class Dropout(nn.Module):
    """`flax.linen.Dropout` whose rate may also be traced, and whose key may be of any kind.

    With a threefry key and JAX's default settings the result is the same bit for bit.

    Attributes:
        rate: The probability with which a number is dropped, in [0, 1).
    """

    rate: float | Array

    @nn.compact
    @jax_defaults()
    def __call__(self, x: Array, *, deterministic: bool) -> Array:
        check_rate("dropout_rate", self.rate)
        check_flag("deterministic", deterministic)
        if deterministic or known(self.rate) == 0:
            return x
        rng = as_rng("dropout", self.make_rng("dropout"))
        kept = jax.random.bernoulli(rng, jnp.float32(1 - self.rate), x.shape)
        return jnp.where(kept, x / (1 - self.rate), 0).astype(x.dtype)


class MLP(nn.Module):
    """out(activation(in(x))), position by position.

    Attributes:
        hidden_features: Width of the hidden layer.
        out_kernel_init: How the kernel of `out` starts.
        dtype, param_dtype: The types to compute in and to keep parameters in.
        activation: Any function of numbers. The default is GELU by its tanh approximation, as
            GPT-2 has it; `functools.partial(nn.gelu, approximate=False)` is the exact one.
        use_bias: Adds a bias to each projection.
        dot_general: Computes the projections, as `bfloat16_dot_general` or `lax.dot_general`.
    """

    hidden_features: int
    out_kernel_init: Initializer = nn.initializers.lecun_normal()
    dtype: Any = None
    param_dtype: Any = jnp.float32
    activation: Callable[[Array], Array] = nn.gelu
    use_bias: bool = True
    dot_general: Callable[..., Array] = kernel_product

    @nn.compact
    @jax_defaults()
    def __call__(self, x: Array) -> Array:
        """`[..., D] -> [..., D]`."""
        check_fields(self)
        width = as_size("hidden_features", self.hidden_features)
        hidden = self._hidden(lambda name: self._dense(width, name)(x))
        return self._dense(x.shape[-1], "out", kernel_init=self.out_kernel_init)(hidden)

    def _hidden(self, project: Callable[[str], Array]) -> Array:
        """The hidden layer, from projections of the input by their names."""
        return self.activation(project("in"))

    def _dense(self, features, name, **options):
        types = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        return nn.Dense(
            features,
            use_bias=self.use_bias,
            dot_general=self.dot_general,
            name=name,
            **types,
            **options,
        )


class GatedMLP(MLP):
    """SwiGLU: out(activation(gate(x)) * in(x)), position by position.

    Attributes are those of `MLP`; the defaults are SiLU and no biases. `activation=nn.gelu` is
    GEGLU. With three matrices it has as many parameters as an `MLP` that is 1.5 times as wide.

    Reference:
        Shazeer 2020, "GLU Variants Improve Transformer", equation 6.
        https://arxiv.org/abs/2002.05202
    """

    activation: Callable[[Array], Array] = nn.silu
    use_bias: bool = False

    def _hidden(self, project):
        return self.activation(project("gate")) * project("in")


class UnitOffsetRMSNorm(nn.Module):
    """x / rms(x) * (1 + scale), with a scale that begins as zeros: the norm of Gemma.

    Weight decay then draws the factors towards 1, and small scales keep their digits in bfloat16.

    Attributes:
        epsilon: Added to the mean square.
        dtype, param_dtype: The types of the result and of the parameter `scale` `[D]`. It computes
            in float32 at least.

    Reference:
        Zhang and Sennrich 2019, "Root Mean Square Layer Normalization", equation 4.
        https://arxiv.org/abs/1910.07467
    """

    epsilon: float = 1e-6
    dtype: Any = None
    param_dtype: Any = jnp.float32

    @nn.compact
    @jax_defaults()
    def __call__(self, x: Array) -> Array:
        """`[..., D] -> [..., D]`."""
        check_fields(self)
        zeros = nn.initializers.zeros_init()
        scale = self.param("scale", zeros, (x.shape[-1],), self.param_dtype)
        dtype = self.dtype or jnp.promote_types(x.dtype, scale.dtype)
        wide = jnp.promote_types(dtype, jnp.float32)
        x, scale = x.astype(wide), scale.astype(wide)
        mean_square = jnp.mean(x * x, axis=-1, keepdims=True)
        return (x * jax.lax.rsqrt(mean_square + self.epsilon) * (1 + scale)).astype(dtype)


class ShortConvolution(nn.Module):
    """Replaces each feature by a weighted sum of its last few values.

    It shows which token came just before, which attention without positions cannot.

    Attributes:
        width: W, the number of values in a sum.
        kernel_init: Makes the kernel `[W, D]`.
        dtype, param_dtype: The types to compute in and to keep parameters in.
        decode: Keeps the last W - 1 inputs, so that a row may come in parts, as in
            `MultiHeadAttention`. There is no limit to its length.

    Reference:
        So et al. 2021, "Primer: Searching for Efficient Transformers for Language Modeling", with
        convolutions of queries, keys and values. https://arxiv.org/abs/2109.08668
    """

    width: int
    kernel_init: Initializer = nn.initializers.lecun_normal()
    dtype: Any = None
    param_dtype: Any = jnp.float32
    decode: bool = False

    @nn.compact
    @jax_defaults()
    def __call__(
        self,
        x: Array,
        *,
        mask: Mask | None = masks.causal(),  # noqa: B008  (a constant)
        positions: Array | None = None,
        lengths: Array | None = None,
    ) -> Array:
        """`[..., T, D] -> [..., T, D]`; values before the first position count as 0.

        Args:
            x: `[..., T, D]`.
            mask: A rule that hides the future. It does not limit how far the sums reach back.
            positions: Must be None: the sums count the tokens as they come.
            lengths: With `decode`: how many of the T new tokens count, `[...]` integers, one per
                batch row. The others are padding on the right, which the cache does not keep.

        Returns:
            With `decode` under `jit`, a row whose length is not in [0, T] returns NaN and keeps its
            cache.

        Raises:
            ValueError: `decode` without a cache, `lengths` without `decode`, or sizes that do not
                fit.
            NotImplementedError: `positions`, a mask that shows the future, or a mask of arrays: the
                sums would include tokens that it hides.
        """
        width = as_size("width", self.width, maximum=1024)  # Each is traced.
        mask = None if mask is None else masks.as_mask(mask)
        if not hides_future(mask):
            raise NotImplementedError(
                f"ShortConvolution looks back: it takes masks.causal(), got mask={mask!r}."
            )
        if jax.tree.leaves(mask):
            raise NotImplementedError(
                f"ShortConvolution(width={width}) sums what a mask of arrays would hide, got "
                f"mask={mask!r}."
            )
        if positions is not None:
            raise NotImplementedError(
                "ShortConvolution takes no positions: it sums the tokens as they come."
            )
        kernel = self.param("kernel", self.kernel_init, (width, x.shape[-1]), self.param_dtype)
        x, kernel = nn.dtypes.promote_dtype(x, kernel, dtype=self.dtype)
        if not self.decode:
            if lengths is not None:
                raise ValueError("lengths is for decode=True: padding on the right is harmless.")
            return causal_convolution(x, kernel)
        if not (self.has_variable("cache", "inputs") or self.is_initializing()):
            raise ValueError('decode=True needs the collection "cache" that init makes, got none.')
        advance, new, wrong = advances(lengths, x.shape[:-2], x.shape[-2])
        if wrong is not None:  # Even NaN in the padding must not matter.
            advance = jnp.where(wrong, 0, advance)
            x = jnp.where(new[..., None], x, 0)
        row = last_inputs(self, "inputs", x, width - 1, None if wrong is None else advance)
        out = causal_convolution(x, kernel, row)
        return out if wrong is None else jnp.where(wrong[..., None, None], jnp.nan, out)
