"""Sequence models made of attention: small transformers for tokens and for vectors."""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from attention_jax.checks import (
    as_integers,
    as_positions,
    as_rng,
    as_size,
    check_broadcastable,
    check_fields,
    check_flag,
    check_inputs,
    check_rate,
    check_word,
    jax_defaults,
    known,
)
from attention_jax.functional import ATTENTION_FNS, biases, masks
from attention_jax.functional.biases import Bias
from attention_jax.functional.gated_delta import causal_convolution
from attention_jax.functional.masks import Mask
from attention_jax.functional.positions import sinusoidal_at
from attention_jax.layers import (
    DifferentialAttention,
    Embed,
    GatedDeltaAttention,
    MultiHeadAttention,
    SingleHeadAttention,
)
from attention_jax.layers.cache import put
from attention_jax.types import Array, Initializer

ATTENTIONS = ("multihead", "selfhead")
MECHANISMS = tuple(ATTENTION_FNS)
NORMS = ("layer", "rms", "none")
PATTERNS = ("full", "strided", "blocks")
POSITIONS = ("none", "sinusoidal", "learned", "rotary", "alibi", "relative")

# What a choice cannot honour: fields that must keep their defaults, and kinds of positions.
LIMITS = {
    "selfhead": ("softcap", "sinks", "qk_norm", "decode", "rotary"),
    "linear": ("pattern", "window", "softcap", "sinks", "decode", "alibi", "relative"),
    "gated_delta": (
        *("pattern", "window", "softcap", "sinks", "qk_norm", "decode"),
        *("rotary", "alibi", "relative"),
    ),
}
# Of positions="relative", as in T5.
RELATIVE_BUCKETS, RELATIVE_DISTANCE = 32, 128
EMBEDDING_SCALE = 0.02  # Of the initial tables of tokens and of learned positions, as in GPT-2.


class Dropout(nn.Module):
    """`flax.linen.Dropout` whose rate may also be traced, and whose key may be of any kind.

    With a threefry key, and what JAX is set to by default, it is the same bit for bit.

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


class ShortConvolution(nn.Module):
    """Each feature's weighted sum of its own last few values.

    It tells what attention without positions cannot: which token stood just before.

    Attributes:
        width: W, the number of values in a sum.
        kernel_init: Makes the kernel `[W, D]`.
        dtype, param_dtype: The types to compute in and to keep parameters in.

    Reference:
        So et al. 2021, "Primer: Searching for Efficient Transformers for Language Modeling", with
        convolutions of queries, keys and values. https://arxiv.org/abs/2109.08668
    """

    width: int
    kernel_init: Initializer = nn.initializers.lecun_normal()
    dtype: Any = None
    param_dtype: Any = jnp.float32

    @nn.compact
    @jax_defaults()
    def __call__(self, x: Array) -> Array:
        """`[..., T, D] -> [..., T, D]`; what lies before the first position counts as 0."""
        shape = (as_size("width", self.width), x.shape[-1])
        kernel = self.param("kernel", self.kernel_init, shape, self.param_dtype)
        x, kernel = nn.dtypes.promote_dtype(x, kernel, dtype=self.dtype)
        return causal_convolution(x, kernel)


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)): a pre-norm transformer block.

    Attributes:
        attention: The attention layer.
        mlp_ratio: Width of the MLP's hidden layer over that of the block; 0 leaves the MLP out.
        norm: "layer", "rms" or "none".
        residual: Adds the input of attention and MLP to their output.
        dropout_rate: Dropout on what is added to the residual stream.
        init_scale: Multiplies the initial kernels of the convolution and of the MLP's last
            projection.
        dtype, param_dtype: The types to compute in and to keep parameters in.
        short_conv: The width of a `ShortConvolution` that comes first, x + conv(norm(x)); 0 leaves
            it out.

    Reference:
        Xiong et al. 2020, "On Layer Normalization in the Transformer Architecture", figure 1b.
        https://arxiv.org/abs/2002.04745
    """

    attention: nn.Module
    mlp_ratio: float = 0.0
    norm: str = "layer"
    residual: bool = True
    dropout_rate: float | Array = 0.0
    init_scale: float | Array = 1.0
    dtype: Any = None
    param_dtype: Any = jnp.float32
    short_conv: int = 0

    @nn.compact
    @jax_defaults()
    def __call__(
        self,
        x: Array,
        mask: Array | Mask | None = None,
        deterministic: bool = True,
        sow_weights: bool = False,
        lengths: Array | None = None,
        bias: Array | Bias | None = None,
        positions: Array | None = None,
    ) -> Array:
        """`[..., T, D] -> [..., T, D]`; the options are those of the attention layer's call.

        Raises:
            ValueError: `short_conv` or `mlp_ratio` is negative, or leaves the MLP no width.
        """
        check_fields(self)
        check_inputs("x", x)
        short_conv = as_size("short_conv", self.short_conv, minimum=0)
        hidden_features = _hidden_features(self.mlp_ratio, x.shape[-1])

        def add(branch):
            branch = Dropout(self.dropout_rate)(branch, deterministic=deterministic)
            return x + branch if self.residual else branch

        if short_conv:
            conv = ShortConvolution(
                short_conv,
                scaled_init(self.init_scale),
                dtype=self.dtype,
                param_dtype=self.param_dtype,
                name="conv",
            )
            x = add(conv(make_norm(self, "conv_norm")(x)))
        options = {"mask": mask, "lengths": lengths, "bias": bias, "positions": positions}
        mixed = self.attention(
            make_norm(self, "attention_norm")(x),
            deterministic=deterministic,
            sow_weights=sow_weights,
            **{name: option for name, option in options.items() if option is not None},
        )
        x = add(mixed)
        if hidden_features:
            hidden = make_dense(self, hidden_features, "mlp_in")(make_norm(self, "mlp_norm")(x))
            out_init = scaled_init(self.init_scale)
            x = add(make_dense(self, x.shape[-1], "mlp_out", out_init)(nn.gelu(hidden)))
        return x


class SequenceModel(nn.Module):
    """A stack of blocks over tokens (`vocab_size` set) or over vectors.

    With one layer, `norm="none"` and `residual=False` it is the bare attention layer.

    Attributes:
        features: Model width D.
        num_layers: Number of blocks.
        num_heads: Number of query heads. Defaults to 8; "selfhead" has one.
        num_kv_heads, head_dim, qk_norm, use_bias: As in `MultiHeadAttention`.
        attention: "multihead", or "selfhead" for `SingleHeadAttention`.
        vocab_size: Number of tokens. None: inputs are vectors.
        out_features: Width of the output for vectors. Defaults to `features`.
        mlp_ratio, norm, residual: As in `Block`; with a norm, a last one follows the last block.
        positions: "none", "sinusoidal" or "learned", added to the inputs, to tokens as large as
            their initial embeddings; "rotary"; "alibi" or "relative", added to the logits: a table
            of T5's 32 buckets for all layers, from 0.
        max_length: The longest sequence; needed by "learned", and of no use to others.
        causal: Position t sees the positions up to t alone.
        window: How many positions back, its own not counted, a position sees. Not causal: as many
            forward. None is no limit.
        dropout_rate: Dropout on embeddings, on residual branches and on attention weights; of the
            last, the mechanisms "linear" and "gated_delta" have none.
        tie_embedding: Logits come from the embedding table; else from a matrix of their own.
        remat: Recomputes each block in the backward pass instead of storing what is inside.
        decode: As in `MultiHeadAttention`: takes the newest tokens alone; needs `causal`.
        dtype: The type to compute in, float32 parameters being rounded to it.
        param_dtype: The type of the parameters.
        mechanism: A name in `functional.ATTENTION_FNS`: "dot_product", "linear", "differential"
            (`DifferentialAttention`) or "gated_delta" (`GatedDeltaAttention`).
        pattern: "full"; "strided": the last `stride` positions and every `stride`-th; "blocks":
            the position's own block of `stride` and the last position of every block. Not causal:
            on both sides. Child et al. 2019, section 4.3. https://arxiv.org/abs/1904.10509
        stride: Needed by the patterns "strided" and "blocks".
        softcap, sinks: As in `MultiHeadAttention`.
        init_scale: Multiplies the initial kernels of what writes to the residual stream. GPT-2 has
            (2 num_layers) ** -0.5.
        short_conv: As in `Block`; needs `causal`, and no other mask. Its sums reach back as far as
            they do, whatever `window` and `pattern` are.
    """

    features: int
    num_layers: int = 1
    num_heads: int | None = None
    num_kv_heads: int | None = None
    head_dim: int | None = None
    attention: str = "multihead"
    vocab_size: int | None = None
    out_features: int | None = None
    mlp_ratio: float = 0.0
    norm: str = "layer"
    residual: bool = True
    positions: str = "none"
    max_length: int | None = None
    causal: bool = False
    window: int | None = None
    dropout_rate: float | Array = 0.0
    qk_norm: bool = False
    use_bias: bool = True
    tie_embedding: bool = True
    remat: bool = False
    decode: bool = False
    dtype: Any = None
    param_dtype: Any = jnp.float32
    mechanism: str = "dot_product"
    pattern: str = "full"
    stride: int | None = None
    softcap: float | None = None
    sinks: bool = False
    init_scale: float | Array = 1.0
    short_conv: int = 0

    @nn.compact
    @jax_defaults()
    def __call__(
        self,
        inputs: Array,
        *,
        positions: Array | None = None,
        output_positions: Array | None = None,
        mask: Array | Mask | None = None,
        deterministic: bool = True,
        sow_weights: bool = False,
        lengths: Array | None = None,
    ) -> Array:
        """Runs the model.

        Args:
            inputs: Tokens `[..., T]`, or vectors `[..., T, D]` when `vocab_size` is None.
            positions: Where the tokens stand, integers that broadcast to `[..., T]`, with `decode`
                those of the new tokens. None: where `mask` says (`Mask.standing`), so that a
                document in a packed or padded row has the positions that it has alone; where it
                says nothing, 0, 1, ..., T - 1, with `decode` counted on from the cache. Positions
                decide what the field `positions` adds, and what `window` and `pattern` let see;
                `causal` goes by the order of the tokens in the row.
            output_positions: `[..., P]` integers: at which of the T places of the row an output is
                wanted. None: at all of them. Logits over a large vocabulary are most of a small
                model's work.
            mask: Who may attend to whom, beside what `causal`, `window` and `pattern` say.
            deterministic: Turns dropout off; otherwise an rng named "dropout" is needed.
            sow_weights, lengths: As in `MultiHeadAttention`.

        Returns:
            Logits `[..., P, vocab_size]` in float32, or vectors `[..., P, out_features]`. Under
            `jit`, a position without a row in the table of "learned" ones makes NaN of its token.

        Raises:
            ValueError: A setting or an argument is out of its range, or does not fit another;
                outside `jit` also a position beyond `max_length`.
            TypeError: An argument has the wrong type.
            NotImplementedError: The attention or the mechanism cannot honour a setting.
        """
        self.check()
        batch = self._check_inputs(inputs, output_positions, lengths)
        mask = None if mask is None else masks.as_mask(mask)
        positions, row, places = self._stand(positions, mask, batch, inputs.shape[len(batch)])
        if self.short_conv and mask is not None:
            raise NotImplementedError(
                f"short_conv={self.short_conv} has no mask: it sums what the mask would hide."
            )
        if self.vocab_size is None:
            x = inputs
        else:
            embed = Embed(
                self.vocab_size,
                self.features,
                dtype=self.dtype,
                param_dtype=self.param_dtype,
                embedding_init=nn.initializers.normal(EMBEDDING_SCALE),
                name="embed",
            )
            x = embed(inputs)
        x = self._add_positions(x, positions)
        x = Dropout(self.dropout_rate)(x, deterministic=deterministic)

        mask, bias = self._mask(mask, row, places), self._bias(row)
        positions = positions if self.positions == "rotary" else None
        # What decides which operations run is static under remat: 3 and 4 count from `self`.
        make_block = nn.remat(Block, static_argnums=(3, 4)) if self.remat else Block
        for i in range(self.num_layers):
            block = make_block(
                self._attention(i),
                mlp_ratio=self.mlp_ratio,
                norm=self.norm,
                residual=self.residual,
                dropout_rate=self.dropout_rate,
                init_scale=self.init_scale,
                dtype=self.dtype,
                param_dtype=self.param_dtype,
                short_conv=self.short_conv,
                name=f"block_{i}",
            )
            x = block(x, mask, deterministic, sow_weights, lengths, bias, positions)
        if output_positions is not None:
            x = jnp.take_along_axis(x, output_positions[..., None], axis=-2)  # [..., P, D]
        x = make_norm(self, "norm")(x)

        if self.vocab_size is None:
            return x if self.out_features is None else make_dense(self, self.out_features, "out")(x)
        unembed = (
            embed.attend if self.tie_embedding else make_dense(self, self.vocab_size, "unembed")
        )
        return unembed(x).astype(jnp.float32)

    def check(self) -> None:
        """Raises the error of a model that cannot be, which a call would raise too."""
        for name, choices in (
            ("attention", ATTENTIONS),
            ("mechanism", MECHANISMS),
            ("norm", NORMS),
            ("pattern", PATTERNS),
            ("positions", POSITIONS),
        ):
            check_word(name, getattr(self, name), choices)
        check_fields(self)
        as_size("features", self.features)
        as_size("num_layers", self.num_layers)
        for name in ("num_heads", "vocab_size", "out_features", "max_length", "stride"):
            if getattr(self, name) is not None:
                as_size(name, getattr(self, name))
        if self.window is not None:
            as_size("window", self.window, minimum=0)
        if as_size("short_conv", self.short_conv, minimum=0):
            if not self.causal:
                raise ValueError("short_conv needs causal=True: it looks back.")
            if self.decode:
                raise NotImplementedError("decode=True has no short_conv: no cache of its inputs.")
        _hidden_features(self.mlp_ratio, self.features)
        self._check_limits()
        if self.decode and not self.causal:
            raise ValueError("decode=True needs causal=True: earlier tokens cannot see later ones.")
        if self.positions == "sinusoidal" and self.features % 2:
            raise ValueError(
                f'features must be even for positions="sinusoidal", got {self.features}.'
            )
        if (self.positions == "learned") != (self.max_length is not None):
            raise ValueError(
                f'max_length goes with positions="learned": got max_length={self.max_length} with '
                f"positions={self.positions!r}."
            )
        if (self.pattern == "full") != (self.stride is None):
            raise ValueError(
                f'stride goes with pattern="strided" or "blocks": got stride={self.stride} with '
                f"pattern={self.pattern!r}."
            )
        if self.pattern != "full" and self.window is not None:
            raise ValueError(f'window is for pattern="full": got {self.window}, {self.pattern!r}.')
        if self.vocab_size is not None and self.out_features is not None:
            raise ValueError(
                f"out_features is for vectors: got {self.out_features} with "
                f"vocab_size={self.vocab_size}."
            )
        if self.vocab_size is None and not self.tie_embedding:
            raise ValueError("tie_embedding=False needs vocab_size: vectors have no embedding.")

    def _check_limits(self) -> None:
        """What the attention or the mechanism cannot honour."""
        if self.attention == "selfhead":
            for name in ("num_heads", "num_kv_heads"):
                if getattr(self, name) not in (None, 1):
                    raise ValueError(
                        f'attention="selfhead" has one head, got {name}={getattr(self, name)}.'
                    )
            if self.mechanism in ("differential", "gated_delta"):
                raise NotImplementedError(
                    f'attention="selfhead" has no mechanism={self.mechanism!r}: use "multihead" '
                    "with num_heads=1."
                )
        if self.mechanism == "gated_delta" and not self.causal:
            raise NotImplementedError('mechanism="gated_delta" needs causal=True: it is recurrent.')
        defaults = {field.name: field.default for field in dataclasses.fields(self)}
        for name, choice in (("attention", self.attention), ("mechanism", self.mechanism)):
            for word in LIMITS.get(choice, ()):
                field = "positions" if word in POSITIONS else word
                value = getattr(self, field)
                if value == word if field == "positions" else value != defaults[field]:
                    raise NotImplementedError(f"{name}={choice!r} has no {field}={value!r}.")

    def _check_inputs(self, inputs, output_positions, lengths) -> tuple[int, ...]:
        """The batch axes of the inputs, or the error that says what does not fit."""
        if self.vocab_size is not None:
            batch = as_integers("inputs", inputs, axes=1).shape[:-1]
        else:
            check_inputs("inputs", inputs)
            batch = inputs.shape[:-2]
            if inputs.shape[-1] != self.features:
                raise ValueError(
                    f"inputs must be [..., T, {self.features}] (features={self.features}), got "
                    f"shape {inputs.shape}."
                )
        if output_positions is not None:
            shape = as_integers("output_positions", output_positions, axes=1).shape
            if shape[:-1] != batch:
                raise ValueError(
                    f"output_positions must be [..., P] with the batch axes {batch} of inputs, got "
                    f"shape {shape}."
                )
        if lengths is not None and not self.decode:
            raise ValueError("lengths is for decode=True; use mask=masks.key_lengths(lengths).")
        return batch

    def _stand(self, positions, mask, batch, T) -> tuple[Array | None, ...]:
        """Where tokens stand; None is where they come in the row.

        Returns:
            The positions `[..., T]` of the tokens that came; those of all keys, `[..., S]`, for
            rules about them; and the same for rules about distances alone, in which the documents
            of a row may stand apart.
        """
        if positions is not None:
            if self.mechanism == "gated_delta" or self.short_conv:
                raise NotImplementedError(
                    "positions are not for a recurrence or convolution, which counts tokens as "
                    f"they come: got mechanism={self.mechanism!r} and short_conv={self.short_conv}."
                )
            positions = as_positions(positions, batch, T)
        length, new = T, None  # The length of the row, and where in it the tokens come.
        cache = self.variables.get("cache", {}).get("block_0") if self.decode else None
        if cache is not None:
            index, length = (
                cache["attention"]["cache_index"],
                cache["attention"]["cached_key"].shape[-3],
            )
            if index.shape != batch:
                raise ValueError(
                    f"inputs must have the cache's batch axes {index.shape}, got {batch}."
                )
            new = index[..., None] + jnp.arange(T, dtype=jnp.int32)
        standing = None
        if mask is not None and (self._reaches or self.positions != "none"):
            standing = mask.standing(length)
        if standing is not None:
            axes = standing.positions.shape[:-1]
            check_broadcastable("mask", (*axes, 1, 1, 1), (*batch, self._heads, T, length))
        if self.decode:
            if positions is None:
                positions = new
                if new is not None and standing is not None:
                    row = jnp.broadcast_to(standing.positions, (*batch, length))
                    positions = jnp.take_along_axis(row, new, axis=-1, mode="clip")
            row = self._cached_positions(positions, new, (*batch, T))
            return positions, row, row
        if standing is None:
            return positions, positions, positions
        if positions is None:
            return standing.positions, *standing
        return positions, positions, standing.places + (positions - standing.positions)

    def _cached_positions(self, positions, new, shape) -> Array | None:
        """The positions of all tokens in the cache, where rules ask for them."""
        if not (self._reaches or self.positions in ("alibi", "relative")):
            return None
        if not (self.is_initializing() or self.has_variable("cache", "cached_positions")):
            raise ValueError('decode=True needs the collection "cache" that init makes, got none.')
        cached = self.variable("cache", "cached_positions", jnp.zeros, shape, jnp.int32)
        if new is None:  # In `init`, where the full-length input only sets the capacity.
            return None
        cached.value = put(cached.value, new, jnp.broadcast_to(positions, shape))
        return cached.value

    @property
    def _reaches(self) -> bool:
        """Whether who sees whom depends on where they stand, not just on who comes first."""
        return self.window is not None or self.pattern != "full"

    @property
    def _heads(self) -> int:
        """The number of query heads."""
        default = 1 if self.attention == "selfhead" else 8
        return default if self.num_heads is None else self.num_heads

    def _attention(self, depth: int) -> nn.Module:
        options = dict(
            head_dim=self.head_dim,
            use_bias=self.use_bias,
            dtype=self.dtype,
            param_dtype=self.param_dtype,
            out_kernel_init=scaled_init(self.init_scale),
            name="attention",
            parent=None,  # Adopted by the block it is given to.
        )
        if self.mechanism == "gated_delta":
            return GatedDeltaAttention(self._heads, self.num_kv_heads, **options)
        if self.mechanism != "differential":  # Which has its function for a default.
            options["attention_fn"] = ATTENTION_FNS[self.mechanism]
        if self.mechanism != "linear":
            options["dropout_rate"] = self.dropout_rate
        if self.attention == "selfhead":
            return SingleHeadAttention(**options)
        make = MultiHeadAttention
        if self.mechanism == "differential":
            make = DifferentialAttention
            options["lambda_init"] = 0.8 - 0.6 * math.exp(-0.3 * depth)  # The paper's section 2.1.
        return make(
            self._heads,
            self.num_kv_heads,
            qk_norm=self.qk_norm,
            rotary=self.positions == "rotary",
            decode=self.decode,
            softcap=self.softcap,
            sinks=self.sinks,
            **options,
        )

    def _mask(self, mask: Mask | None, row: Array | None, places: Array | None) -> Mask | None:
        """`mask`, and what `causal`, `window` and `pattern` say."""
        pattern = None
        if self.pattern == "strided":
            pattern = masks.window(self.stride, self.stride) | masks.strided(self.stride)
        elif self.pattern == "blocks":
            pattern = masks.blocks(self.stride, summary=1)
        elif self.window is not None:
            pattern = masks.window(self.window, 0 if self.causal else self.window)
        if pattern is not None and row is not None:
            pattern = masks.placed(pattern, row if self.pattern == "blocks" else places)
        if self.causal and (self.window is None or row is not None):
            pattern = masks.causal() if pattern is None else masks.causal() & pattern
        if pattern is None or mask is None:
            return mask if pattern is None else pattern
        return pattern & mask

    def _bias(self, row: Array | None) -> Bias | None:
        """What `positions` adds to the logits."""
        if self.positions == "alibi":
            bias = biases.alibi(self._heads)
        elif self.positions == "relative":
            shape = (RELATIVE_BUCKETS, self._heads)
            init = nn.initializers.zeros_init()
            table = self.param("relative_bias", init, shape, self.param_dtype)
            bias = biases.relative(
                table, bidirectional=not self.causal, max_distance=RELATIVE_DISTANCE
            )
        else:
            return None
        return bias if row is None else biases.placed(bias, row)

    def _add_positions(self, x: Array, positions: Array | None) -> Array:
        if self.positions not in ("sinusoidal", "learned"):
            return x
        T, tokens = x.shape[-2], positions
        if positions is None:
            tokens = jnp.arange(T, dtype=jnp.int32)
        if self.positions == "sinusoidal":
            # A sinusoid's mean square is 1/2: as large as the tokens, it cannot drown them.
            scale = 1.0 if self.vocab_size is None else 2**0.5 * EMBEDDING_SCALE
            return x + (scale * sinusoidal_at(tokens, x.shape[-1])).astype(x.dtype)
        table = Embed(
            self.max_length,
            self.features,
            dtype=self.dtype,
            param_dtype=self.param_dtype,
            embedding_init=nn.initializers.normal(EMBEDDING_SCALE),
            name="positions_embed",
        )
        if positions is None:
            if T > self.max_length:
                raise ValueError(
                    f"inputs have {T} positions, more than max_length={self.max_length}."
                )
            return x + table(tokens)
        beyond = (tokens < 0) | (tokens >= self.max_length)
        if not isinstance(beyond, jax.core.Tracer) and beyond.any():
            raise ValueError(
                f"positions must lie in [0, max_length) with max_length={self.max_length}, got "
                f"{int(tokens.min())} to {int(tokens.max())}."
            )
        # A clipped position would be another one, without a word.
        return x + jnp.where(beyond[..., None], jnp.nan, table(jnp.where(beyond, 0, tokens)))


def _hidden_features(mlp_ratio: float, features: int) -> int:
    """The width of the MLP's hidden layer; 0 where there is none."""
    width = round(mlp_ratio * features) if math.isfinite(mlp_ratio) else -1
    if width < 0 or (mlp_ratio and not width):
        raise ValueError(
            "mlp_ratio must be 0 or give the MLP a width of at least 1: got "
            f"mlp_ratio={mlp_ratio} with features={features}."
        )
    return width


def make_norm(module: nn.Module, name: str):
    """The normalization that `module.norm` names, as a function of x."""
    if module.norm == "none":
        return lambda x: x
    norm = nn.LayerNorm if module.norm == "layer" else nn.RMSNorm
    return norm(dtype=module.dtype, param_dtype=module.param_dtype, name=name)


def make_dense(
    module: nn.Module,
    features: int,
    name: str,
    kernel_init: Initializer = nn.initializers.lecun_normal(),  # noqa: B008  (a constant)
) -> nn.Dense:
    """A projection to `features` in the types of `module`."""
    return nn.Dense(
        features,
        dtype=module.dtype,
        param_dtype=module.param_dtype,
        kernel_init=kernel_init,
        name=name,
    )


def scaled_init(scale: float | Array) -> Initializer:
    """flax's default for kernels, times `scale`, which may be traced."""
    init = nn.initializers.lecun_normal()
    return lambda rng, shape, dtype: (scale * init(rng, shape, dtype)).astype(dtype)
