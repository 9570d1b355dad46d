"""Models put together from parts: layers of attention, an MLP, norms, an embedding, masks."""

import dataclasses
import functools
import inspect
import operator
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

import attention_jax
from attention_jax.checks import (
    as_places,
    as_positions,
    check_broadcastable,
    check_fields,
    check_flag,
    check_inputs,
    check_part,
    check_takes,
    jax_defaults,
    takes,
    told,
)
from attention_jax.functional import biases, masks
from attention_jax.functional.biases import Bias
from attention_jax.functional.masks import Mask, hides_future
from attention_jax.layers.cache import advances, put, reach_back
from attention_jax.layers.multi_head import at_places, outside
from attention_jax.layers.parts import Dropout
from attention_jax.types import Array

Layer = Callable[..., Array]


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)): a pre-norm transformer block.

    The original Transformer and BERT have `norm=None` and a `sum_norm`; Gemma 2 has a `norm` and an
    `output_norm`; GPT-NeoX has `parallel=True`.

    Attributes:
        attention: The attention layer.
        mlp: A layer `[..., T, D] -> [..., T, D]` that works position by position, as `MLP`. None
            leaves it out.
        norm: Makes the norm of each layer's input, as `nn.LayerNorm`, `nn.RMSNorm` or a
            `functools.partial` of one. None leaves it out.
        conv: A `ShortConvolution` that comes first, x + conv(norm(x)). None leaves it out.
        residual: Adds the input of each layer to its output.
        dropout_rate: Dropout on the output of each layer.
        output_norm: Makes a norm of each layer's output, before it is added.
        sum_norm: Makes a norm of each sum.
        parallel: x + attention(norm(x)) + mlp(norm(x)), each with its own norm, as one sum.

    Reference:
        Xiong et al. 2020, "On Layer Normalization in the Transformer Architecture", figure 1b
        (`norm`) and 1a (`sum_norm`). https://arxiv.org/abs/2002.04745
        Wang and Komatsuzaki 2021, "GPT-J-6B": `parallel`.
        https://github.com/kingoflolz/mesh-transformer-jax
    """

    attention: Layer
    mlp: Layer | None = None
    norm: Callable[..., nn.Module] | None = nn.LayerNorm
    conv: Layer | None = None
    residual: bool = True
    dropout_rate: float | Array = 0.0
    output_norm: Callable[..., nn.Module] | None = None
    sum_norm: Callable[..., nn.Module] | None = None
    parallel: bool = False

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
        output_positions: Array | None = None,
    ) -> Array:
        """`[..., T, D] -> [..., T, D]`; the options are those of the attention layer's call.

        `positions` are not passed to an attention layer with `rotary=False`, which does not use
        them. `output_positions` `[..., P]` are the places to compute the output for, `[..., P, D]`:
        the MLP runs for these alone, and the attention if the layer's call has this option.

        Raises:
            NotImplementedError: The attention layer has no such option, or it decodes and `conv`
                does not.
        """
        check_fields(self)
        _check_layers(self, "attention", "mlp", "conv")
        check_inputs("x", x)
        if self.parallel and self.mlp is None:
            raise ValueError("parallel=True needs an mlp, which runs beside the attention.")

        def normed(x, name, make):
            return x if make is None else make(name=name)(x)

        def branch(x, name, layer, **options):
            x = layer(normed(x, f"{name}_norm", self.norm), **options)
            x = normed(x, f"{name}_output_norm", self.output_norm)
            return Dropout(self.dropout_rate)(x, deterministic=deterministic)

        def add(x, name, *branches):
            total = functools.reduce(operator.add, [x, *branches] if self.residual else branches)
            return normed(total, f"{name}_sum_norm", self.sum_norm)

        if self.conv is not None:
            decodes = getattr(self.attention, "decode", False)
            if decodes and not getattr(self.conv, "decode", False):
                raise NotImplementedError("decode=True needs a conv with decode=True too.")
            kept = self._room(x.shape[-2], lengths) if decodes else lengths
            given = {} if kept is None else {"lengths": kept}
            check_takes(self.conv, given)
            conv = branch(x, "conv", self.conv, mask=mask, positions=positions, **given)
            x = add(x, "conv", conv)
        options = {"lengths": lengths, "bias": bias}
        if getattr(self.attention, "rotary", True):
            options["positions"] = positions
        options = {name: option for name, option in options.items() if option is not None}
        check_takes(self.attention, options)
        options |= {"deterministic": deterministic, "sow_weights": sow_weights}
        places, T = output_positions, x.shape[-2]
        if places is not None:
            places = as_places("output_positions", places, x.shape[:-2], T)
            # The layer gets places that surely exist. `outside` tells at the end which do not.
            clipped = jnp.clip(places, 0, T - 1)
        skips = places is not None and takes(self.attention, "output_positions")
        if skips:
            options["output_positions"] = clipped
        attended = branch(x, "attention", self.attention, mask=mask, **options)
        if places is not None:
            x = at_places(x, places)
            attended = attended if skips else at_places(attended, places)
        if self.parallel:
            x = add(x, "mlp", attended, branch(x, "mlp", self.mlp))
        else:
            x = add(x, "attention", attended)
            x = x if self.mlp is None else add(x, "mlp", branch(x, "mlp", self.mlp))
        return x if places is None else outside(x, places, T)

    def _room(self, T: int, lengths: Array | None) -> Array | None:
        """`lengths`, but 0 for rows that the cache of the attention refuses as too long."""
        get = lambda name: self.attention.get_variable("cache", name)
        key, index = get("cached_key"), get("cache_index")
        if key is None or key.shape[-3] == getattr(self.attention, "cache_length", None):
            return lengths
        kept = T if lengths is None else lengths
        return jnp.where(index + kept > key.shape[-3], 0, kept)


def _are_fewer(places: Array | None, T: int) -> bool:
    """Whether these are surely fewer than T places; an export may leave both numbers open."""
    count = T if places is None else places.shape[-1]
    return isinstance(count, int) and isinstance(T, int) and count < T


def _check_layers(module: nn.Module, *names: str) -> None:
    """Raises TypeError unless these parts are layers, and the norm makes them."""
    for name in names:
        if getattr(module, name) is not None:
            check_part(name, getattr(module, name))
    for name in ("norm", "output_norm", "sum_norm", "embedding_norm"):
        norm = getattr(module, name, None)
        if isinstance(norm, nn.Module):
            called = type(norm).__name__
            raise TypeError(f"{name} must make a norm, as {called} does; got one, {called}().")


class _OfPartsOrWords(type):
    """Lets `SequenceModel(features=64, ...)` make the model that these words of a config name."""

    def __call__(cls, *parts: Any, **fields: Any) -> Any:
        if parts or "features" not in fields or cls is not SequenceModel:
            return super().__call__(*parts, **fields)
        return attention_jax.make_sequence_model(**fields)

    @property
    def __signature__(cls) -> inspect.Signature:
        _, *parts = inspect.signature(cls.__init__).parameters.values()
        return inspect.Signature(parts)


class SequenceModel(nn.Module, metaclass=_OfPartsOrWords):
    """A stack of blocks over tokens or over vectors.

    With one block, and neither norms nor residuals, it is the bare attention layer.
    `SequenceModel(features=64, ...)` takes the words of `make_sequence_model` instead of parts.

    Attributes:
        embedding: `TokenEmbedding`, or `VectorEmbedding` for inputs that are vectors.
        blocks: `Block`s. If a block or a layer appears twice, both places share its parameters.
        positions: Added to the embedded inputs: `SinusoidalPositions` or `LearnedPositions`. Rotary
            positions are part of the attention layers.
        bias: Makes the bias of all blocks: `RelativeBias` or `AlibiBias`.
        mask: A mask that counts the tokens of the row, as `masks.causal()`.
        reach: A mask that counts positions, as `masks.window(...)`. A sequence has one, or None,
            for each block.
        norm: As in `Block`, for a norm behind the last block.
        head: The last layer, as `nn.Dense`, or `Unembedding` for logits. None: logits come from the
            table of `TokenEmbedding`; vectors stay as they are.
        dropout_rate: Dropout on the embedded inputs.
        remat: True recomputes each block in the backward pass instead of storing its inner values.
            A policy of `jax.checkpoint_policies`, as `dots_saveable`, says which of them to store.
        embedding_norm: Makes a norm of the embedded inputs, behind their positions.

    Example:
        A causal transformer of two layers for 256 tokens:

        >>> from attention_jax import MLP, MultiHeadAttention, TokenEmbedding
        >>> model = SequenceModel(
        ...     TokenEmbedding(256, 64),
        ...     [Block(MultiHeadAttention(4, rotary=True), MLP(256)) for _ in range(2)],
        ...     mask=masks.causal(),
        ... )
    """

    embedding: Layer
    blocks: Sequence[nn.Module]
    positions: Layer | None = None
    bias: Callable[[], Bias] | None = None
    mask: Mask | None = None
    reach: Mask | Sequence[Mask | None] | None = None
    norm: Callable[..., nn.Module] | None = nn.LayerNorm
    head: Layer | None = None
    dropout_rate: float | Array = 0.0
    remat: Any = False
    embedding_norm: Callable[..., nn.Module] | None = None

    def __post_init__(self):
        for name in ("blocks", "reach"):
            if isinstance(getattr(self, name), list):  # Like flax's own layers, it is hashable.
                setattr(self, name, tuple(getattr(self, name)))
        super().__post_init__()

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
            inputs: Tokens `[..., T]`, or vectors `[..., T, D]`, as `embedding` takes them.
            positions: The positions of the tokens, integers that broadcast to `[..., T]`; in
                decoding those of the new tokens. None takes them from `mask` (`Mask.standing`), so
                that a document in a packed or padded row has the same positions as alone. If `mask`
                gives none, they are 0, 1, ..., T - 1, in decoding counted on from the cache. The
                fields `positions`, `bias` and `reach` and rotary attention use them; the field
                `mask` goes by the order of the tokens in the row.
            output_positions: `[..., P]` integers: the places of the row, of all T, to compute
                outputs for; -1 is the last. None takes all. Fewer save time: the queries and the
                MLP of the last block, and the head, run for these places alone.
            mask: Combined by `&` with the fields `mask` and `reach`.
            deterministic: Turns dropout off; otherwise an rng named "dropout" is needed.
            sow_weights, lengths: As in `MultiHeadAttention`.

        Returns:
            The head's output for the `[..., P, D]` of the last block. Under `jit`, a token whose
            position has no row in the table of `LearnedPositions` becomes NaN.

        Raises:
            ValueError: A setting or an argument is out of its range, or does not fit another;
                outside `jit` also a position beyond the table of `LearnedPositions`.
            TypeError: An argument has the wrong type.
            NotImplementedError: A layer cannot honour a setting.
        """
        self._check_parts()
        mask = None if mask is None else masks.as_mask(mask)
        x = self.embedding(inputs)
        *batch, T, _ = x.shape
        self._check_call(positions, lengths)
        if output_positions is not None:
            asked = as_places("output_positions", output_positions, batch, T)
            output_positions = jnp.clip(asked, 0, T - 1)  # See `outside`.
        positions, told, row, places = self._stand(positions, mask, tuple(batch), T)
        if self.positions is not None:
            stood = positions
            if lengths is not None and positions is not None:  # Padding stands anywhere.
                _, new, _ = advances(lengths, tuple(batch), T)
                stood = jnp.where(new, positions, 0)
            x = self.positions(x, stood)
        if self.embedding_norm is not None:
            x = self.embedding_norm(name="embedding_norm")(x)
        x = Dropout(self.dropout_rate)(x, deterministic=deterministic)

        bias = None
        if self.bias is not None:
            bias = self.bias() if row is None else biases.placed(self.bias(), row)
        run = lambda block, *arguments: block(*arguments)
        if self.remat is not False:
            # Arguments 3 and 4, counted from `block`, decide which operations run, so they are
            # static.
            policy = None if self.remat is True else self.remat
            run = nn.remat(run, static_argnums=(3, 4), policy=policy)
        # The last block skips what no output needs. Blocks of other types compute all.
        is_early = bool(self.blocks) and type(self.blocks[-1]) is Block
        is_early = is_early and _are_fewer(output_positions, T)
        left = (output_positions,) if is_early else ()
        seen = self._masks(mask, row, places)
        for number, block in enumerate(self.blocks):
            arguments = x, seen[number], deterministic, sow_weights, lengths, bias, told
            x = run(block, *arguments, *(left if number == len(self.blocks) - 1 else ()))
        if output_positions is not None and not is_early:
            x = at_places(x, output_positions)
        x = x if self.norm is None else self.norm(name="last_norm")(x)
        x = self.embedding.attend(x) if self.head is None else self.head(x)
        return x if output_positions is None else outside(x, asked, T)

    def _check_parts(self) -> None:
        """Raises an error for invalid parts."""
        check_fields(self)
        if not (isinstance(self.remat, bool) or callable(self.remat)):
            raise TypeError(
                "remat must be True, False or a policy of jax.checkpoint_policies, got "
                f"{told(self.remat)}."
            )
        if not isinstance(self.blocks, Sequence):
            raise TypeError(
                f"blocks must be a sequence of Blocks, got {type(self.blocks).__name__}."
            )
        rules = [("mask", self.mask)]
        if isinstance(self.reach, Sequence):
            rules += [("reach", rule) for rule in self.reach]
            if len(self.reach) != len(self.blocks):
                raise ValueError(
                    f"reach must have one mask for each of the {len(self.blocks)} blocks, got "
                    f"{len(self.reach)}."
                )
        else:
            rules.append(("reach", self.reach))
        for name, rule in rules:
            if not isinstance(rule, Mask | None):
                raise TypeError(f"{name} must be a masks.* value or None, got {told(rule)}.")
        for block in self.blocks:
            if isinstance(block, type) or not hasattr(block, "attention"):
                raise TypeError(f"blocks must be Blocks, got {told(block)}.")
        _check_layers(self, "embedding", "positions", "bias", "head")
        if self.head is None and not hasattr(self.embedding, "attend"):
            called = type(self.embedding).__name__
            raise TypeError(f"head must be given: the embedding, {called}, makes no logits.")

    def _check_call(self, positions, lengths) -> None:
        """Raises an error for arguments that do not fit."""
        if lengths is not None and not self._decodes:
            raise ValueError("lengths is for decode=True; use mask=masks.key_lengths(lengths).")
        if self._decodes:
            _check_own_caches(self.blocks)
            if not hides_future(self.mask):
                raise ValueError(
                    "decode=True needs mask=masks.causal(): earlier tokens cannot see later ones; "
                    f"got mask={self.mask!r}."
                )
        if self._rolls and positions is not None:
            raise NotImplementedError(
                "positions must be None where a cache has a cache_length: it counts its tokens."
            )

    def _stand(self, positions, mask, batch, T) -> tuple[Array | None, ...]:
        """The positions of the tokens; None means their places in the row.

        Returns:
            The positions `[..., T]` of the new tokens; the same for layers, None where a layer
            counts its tokens itself; the positions `[..., S]` of all keys, for rules; and the same
            for rules about distances only, where documents do not overlap.
        """
        if positions is not None:
            positions = as_positions(positions, batch, T)
        length, new = T, None  # The length of the row, and the places of the tokens in it.
        cache = self._cache()
        if cache is not None:
            index, length = cache
            if index.shape != batch:
                raise ValueError(
                    f"inputs must have the cache's batch axes {index.shape}, got {batch}."
                )
            new = index[..., None] + jnp.arange(T, dtype=jnp.int32)
        if self._rolls or length is None:  # Layers count their tokens, and refuse other positions.
            return new if positions is None else positions, positions, None, None
        standing, told = None, positions
        rotary = any(getattr(block.attention, "rotary", False) for block in self.blocks)
        used = positions is None and (self.positions is not None or rotary)
        if mask is not None and (self._has_rules or used):
            standing = mask.standing(length)
        if standing is not None:
            heads = getattr(self.blocks[0].attention, "num_heads", 1)
            axes = standing.positions.shape[:-1]
            check_broadcastable("mask", (*axes, 1, 1, 1), (*batch, heads, T, length))
        if self._decodes:
            if positions is None:
                positions = new
                if new is not None and standing is not None:
                    row = jnp.broadcast_to(standing.positions, (*batch, length))
                    told = positions = jnp.take_along_axis(row, new, axis=-1, mode="clip")
            row = self._cached_positions(positions, new, (*batch, T))
            return positions, told, row, row
        if standing is None:
            return positions, positions, positions, positions
        if positions is None:
            return standing.positions, standing.positions, *standing
        return positions, positions, positions, standing.places + (positions - standing.positions)

    def _cache(self) -> tuple[Array, int | None] | None:
        """How many tokens each row of the cache has taken, and its room; None is no limit."""
        layers = [block.attention for block in self.blocks] if self._decodes else []
        get = lambda name: [
            x.get_variable("cache", name) for x in layers if x.has_variable("cache", name)
        ]
        index, keys = get("cache_index"), get("cached_key")
        return (index[0], keys[0].shape[-3] if keys else None) if index else None

    def _cached_positions(self, positions, new, shape) -> Array | None:
        """The positions of all tokens in the cache, if rules need them."""
        if not self._has_rules:
            return None
        if not (self.is_initializing() or self.has_variable("cache", "cached_positions")):
            raise ValueError('decode=True needs the collection "cache" that init makes, got none.')
        cached = self.variable("cache", "cached_positions", jnp.zeros, shape, jnp.int32)
        if new is None:  # In `init`, where the full-length input only sets the capacity.
            return None
        cached.value = put(cached.value, new, jnp.broadcast_to(positions, shape))
        return cached.value

    @property
    def _decodes(self) -> bool:
        return any(getattr(block.attention, "decode", False) for block in self.blocks)

    @property
    def _rolls(self) -> bool:
        """Whether the cache of a block may keep less than the whole row."""
        return any(
            getattr(block.attention, "cache_length", None) is not None for block in self.blocks
        )

    @property
    def _has_rules(self) -> bool:
        """Whether masks or biases depend on positions, not only on the order of the tokens."""
        return self.bias is not None or any(reach is not None for reach in self._reaches)

    @property
    def _reaches(self) -> tuple[Mask | None, ...]:
        """The field `reach` for each block."""
        if isinstance(self.reach, Mask | None):
            return (self.reach,) * len(self.blocks)
        return tuple(self.reach)

    def _masks(
        self, mask: Mask | None, row: Array | None, places: Array | None
    ) -> list[Mask | None]:
        """`mask` combined with the fields `mask` and `reach`, for each block."""

        def combine(reach):
            own = self.mask
            if reach is not None and row is not None:
                reach = masks.placed(reach, places if _is_of_distances(reach) else row)
            elif masks.is_causal(own) and hides_future(reach):
                own = None  # `reach` is causal already; a second rule would take time.
            rules = [rule for rule in (own, reach, mask) if rule is not None]
            return functools.reduce(operator.and_, rules) if rules else None

        return [combine(reach) for reach in self._reaches]


def decoding(model: SequenceModel, *, rolling: bool = False) -> SequenceModel:
    """The same model with caches: it takes only the newest tokens, as layers with `decode=True`.

    `init` on an input of full length makes the collection `cache` of that capacity; each
    `apply(..., mutable=["cache"])` then takes any number of new tokens.

    Args:
        model: A causal model.
        rolling: In blocks whose `mask` and `reach` are sure to end some way back, as
            `masks.window(...)`, the cache keeps only the tokens that they reach (`cache_length` in
            `MultiHeadAttention`). The call then takes no `positions`, and of masks only rules about
            positions, as `masks.key_lengths`.

    Raises:
        NotImplementedError: There are no blocks, an attention layer has no cache, or two blocks
            share one.
    """
    check_flag("rolling", rolling)
    if not model.blocks:
        raise NotImplementedError("decode=True: the model has no blocks, so it has no cache.")
    _check_own_caches(model.blocks)

    def decoding_block(block: Block, seen: Mask | None) -> Block:
        if not hasattr(block.attention, "decode"):
            raise NotImplementedError(
                f"decode=True: {type(block.attention).__name__} has no cache."
            )
        settings, back = {"decode": True}, reach_back(seen)
        if rolling and back is not None and hasattr(block.attention, "cache_length"):
            settings["cache_length"] = back + 1  # The token itself too.
        block = block.clone(attention=block.attention.clone(**settings))
        if block.conv is None:
            return block
        if not hasattr(block.conv, "decode"):
            raise NotImplementedError(f"decode=True: {type(block.conv).__name__} has no cache.")
        return block.clone(conv=block.conv.clone(decode=True))

    blocks = map(decoding_block, model.blocks, model._masks(None, None, None))
    return model.clone(blocks=tuple(blocks))


def as_static(part: Any) -> Any:
    """A module that `jit` takes as a static argument.

    It cannot hash lists, nor a module or a scaling whose field holds an array, as
    `scale=jnp.float32(0.3)`. Known numbers become Python's, and lists tuples.
    """
    kind = getattr(type(part), "__dataclass_params__", None)
    if isinstance(part, nn.Module) or (kind is not None and kind.frozen and kind.eq):
        names = [f.name for f in dataclasses.fields(part) if f.name not in ("parent", "name")]
        fields = {name: getattr(part, name) for name in names}
        changed = {name: new for name, x in fields.items() if (new := as_static(x)) is not x}
        copy = (
            part.clone
            if isinstance(part, nn.Module)
            else functools.partial(dataclasses.replace, part)
        )
        return copy(**changed) if changed else part
    if type(part) in (tuple, list):
        parts = tuple(as_static(x) for x in part)
        is_same = type(part) is tuple and all(map(operator.is_, parts, part))
        return part if is_same else parts
    if isinstance(part, jax.Array | np.ndarray | np.generic) and part.ndim == 0:
        return part if isinstance(part, jax.core.Tracer) else part.item()
    return part


def _check_own_caches(blocks: Sequence[Block]) -> None:
    """Raises NotImplementedError if two blocks share a layer, because it has only one cache."""
    for name, word in (("attention", "an attention layer"), ("conv", "a convolution")):
        layers = [getattr(block, name, None) for block in blocks]
        layers = [id(layer) for layer in layers if layer is not None]
        if len({*layers}) < len(layers):
            raise NotImplementedError(
                f"decode=True: blocks must not share {word}, which has one cache."
            )


def _is_of_distances(mask: Mask) -> bool:
    """Whether a rule depends only on the distance between two tokens."""
    if isinstance(mask, masks.Pair):
        return _is_of_distances(mask.left) and _is_of_distances(mask.right)
    return isinstance(mask, masks.Band | masks.Strided)
