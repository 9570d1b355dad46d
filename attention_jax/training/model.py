"""Makes a model from words: those of `config.model`, or those of a call."""

import dataclasses
import functools
import inspect
import math
import operator
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from ml_collections import ConfigDict

import attention_jax
from attention_jax.checks import as_size, check_dtype, check_flag, check_number, check_word, told
from attention_jax.functional import masks
from attention_jax.interop import huggingface
from attention_jax.layers import (
    ShortConvolution,
    TokenEmbedding,
    Unembedding,
    VectorEmbedding,
)
from attention_jax.layers.parts import scaled_init
from attention_jax.models import Block, SequenceModel
from attention_jax.tasks import Task
from attention_jax.training import own, words
from attention_jax.training.config import slice_settings
from attention_jax.training.files import is_directory, local_path
from attention_jax.training.rules import label
from attention_jax.types import Array


def row_mask(task: Task) -> masks.Mask | None:
    """Which positions of a task's row may attend to which; the model's own masks come on top."""
    rules = [] if task.documents is None else [masks.segments(task.documents)]
    rules += [] if task.mask is None else [masks.dense(task.mask)]
    return functools.reduce(operator.and_, rules) if rules else None


def make_model(
    config: ConfigDict, task: Task, described: Mapping[str, Any] | None = None, **traced: Any
) -> SequenceModel:
    """The model that `config.model` names, as wide as the task and as long as its longest slice.

    Args:
        config: Checked.
        task: That of the config.
        described: The `description` that a run has kept. None reads it anew.
        traced: Values that replace those of `config.model`.

    Raises:
        ValueError, NotImplementedError: Its settings do not fit together. A layer may refuse more
            when it is called.
    """
    slices = [x for name in ("eval", "train") for x in slice_settings(config, name).values()]
    length = max([config.task.seq_length, *(x.get("seq_length", 0) for x in slices)])
    if is_directory(config.model.name):
        described = description(config) if described is None else described
        return _of_directory(config.model.to_dict() | traced, task, described, length)
    settings = config.model.to_dict() | traced
    attention, dtype = settings.pop("name"), jnp.dtype(settings.pop("dtype"))
    if attention == "selfhead":
        del settings["num_heads"]
    learned = settings["positions"] == "learned"
    try:
        return make_sequence_model(
            attention=attention,
            vocab_size=task.vocab_size,
            max_length=length if learned else None,
            softcap=settings.pop("softcap") or None,
            dtype=dtype,
            **settings,
        )
    except (TypeError, ValueError, NotImplementedError) as error:  # They name its arguments.
        raise type(error)(f"config.model: {error}") from error


def description(config: ConfigDict) -> dict[str, Any] | None:
    """The `config.json` of the model of Hugging Face that the config names; None for words.

    Raises:
        ValueError: There is none, or it is no JSON.
    """
    if not is_directory(config.model.name):
        return None
    name = label("model.name")
    try:
        return huggingface.read_config(local_path(config.model.name, name))
    except (OSError, ValueError) as error:
        raise ValueError(f"{name}: {error}") from error


def _of_directory(settings, task, described, length):
    """The model of a `config.json`, with what the config says of every model."""
    name = f"{label('model.name')}={settings['name']}"
    if task.vocab_size is None:
        raise ValueError(f"{name} reads tokens: the inputs of the task {task.name} are vectors.")
    model = huggingface.model_of(described, settings["name"])
    if task.vocab_size > model.embedding.num_embeddings:
        raise ValueError(
            f"{name} has {model.embedding.num_embeddings} tokens, and the task {task.name} has "
            f"{task.vocab_size}."
        )
    most = getattr(model.positions, "max_length", length)
    if length > most:
        raise ValueError(
            f"{label('task.seq_length')} must be at most {most} for {name}: got {length}."
        )
    fields = {"dropout_rate": settings["dropout_rate"]}
    dtype = jnp.dtype(settings["dtype"])
    if dtype != jnp.float32:
        fields["dtype"] = dtype
    if (dot_general := _product(settings["matmul_precision"], dtype)) is not None:
        fields["dot_general"] = dot_general
    return _with(model, fields).clone(remat=words.REMATS[settings["remat"]](jax))


def _with(part: Any, fields: Mapping[str, Any]) -> Any:
    """A part of a model where it, and each part of it, has these values for fields that it has."""
    make = part.func if isinstance(part, functools.partial) else part
    if isinstance(make, type) and issubclass(make, nn.Module):  # It makes a norm.
        own = {x.name for x in dataclasses.fields(make)}
        return functools.partial(part, **{x: y for x, y in fields.items() if x in own})
    if isinstance(part, tuple):
        return tuple(_with(x, fields) for x in part)
    if not isinstance(part, nn.Module):
        return part
    own = {x.name for x in dataclasses.fields(part)} - {"parent", "name"}
    inner = {name: _with(getattr(part, name), fields) for name in own}
    return part.clone(**inner | {x: y for x, y in fields.items() if x in own})


def _product(matmul_precision: str, dtype: Any) -> Callable[..., Array] | None:
    """The `dot_general` of layers; None for their own."""
    dot_general = words.MATMUL_PRECISIONS[matmul_precision]()
    if dot_general is not None and dtype not in (None, jnp.float32):
        raise ValueError(
            f"matmul_precision={matmul_precision!r} is for dtype=float32: got {jnp.dtype(dtype)}."
        )
    return dot_general


def make_sequence_model(
    features: int,
    num_layers: int = 1,
    num_heads: int | None = None,
    num_kv_heads: int | None = None,
    head_dim: int | None = None,
    attention: str = "multihead",
    vocab_size: int | None = None,
    out_features: int | None = None,
    mlp_ratio: float = 0.0,
    mlp: str = "gelu",
    norm: str = "layer",
    residual: bool = True,
    positions: str = "none",
    max_length: int | None = None,
    causal: bool = False,
    window: int | None = None,
    dropout_rate: float | Array = 0.0,
    qk_norm: bool = False,
    use_bias: bool = True,
    tie_embedding: bool = True,
    remat: str = "none",
    decode: bool = False,
    dtype: Any = None,
    param_dtype: Any = jnp.float32,
    mechanism: str | Callable[..., Any] = "dot_product",
    pattern: str = "full",
    stride: int | None = None,
    softcap: float | None = None,
    sinks: bool = False,
    init_scale: float | Array = 1.0,
    short_conv: int = 0,
    matmul_precision: str = "float32",
    name: str | None = None,
) -> SequenceModel:
    """The `SequenceModel` whose parts these words name; words.py lists them.

    Args:
        attention, mlp, norm, pattern, positions: Words; with a norm, a last one follows the last
            block.
        mechanism: A word; or one's own, or where it is, "package.module:name". A function with the
            arguments of `dot_product_attention` is the `attention_fn` of a `MultiHeadAttention`. A
            class of layers, or a `functools.partial` of one, makes the layer; it is called as
            `MultiHeadAttention` is.
        features: Model width D.
        num_layers: Number of blocks.
        num_heads: Number of query heads. Defaults to 8; "selfhead" has one.
        num_kv_heads, head_dim, qk_norm, use_bias, softcap, sinks, decode: As in
            `MultiHeadAttention`.
        vocab_size: Number of tokens. None: inputs are vectors.
        out_features: Width of the output for vectors. Defaults to `features`.
        mlp_ratio: Width of the MLP's hidden layer over `features`; 0 leaves the MLP out.
        residual: As in `Block`.
        max_length: The longest sequence; of "learned".
        causal: Position t sees the positions up to t alone.
        window: How many positions back, its own not counted, a position sees. Not causal: as many
            forward. None is no limit.
        dropout_rate: Dropout on embeddings, on residual branches, and on attention weights where
            the mechanism has weights.
        tie_embedding: Logits come from the embedding table; else from a separate matrix.
        remat: What the backward pass recomputes: "none", "full" for each block whole, or what is
            left by a policy of `jax.checkpoint_policies`: "dots_saveable" or
            "dots_with_no_batch_dims_saveable".
        dtype, param_dtype: The types to compute in and to keep parameters in.
        stride: Of the patterns "strided" and "blocks".
        init_scale: Multiplies the initial kernels of projections whose output is added to the
            residual stream. GPT-2 has (2 num_layers) ** -0.5.
        short_conv: The width of a `ShortConvolution` before each attention; 0 leaves it out.
        matmul_precision: "bfloat16" computes the projections of blocks by `bfloat16_dot_general`.
        name: Of the module, as in flax.

    Raises:
        ValueError: A value is out of its range, is missing, or is not used.
        TypeError: A value has the wrong type.
        NotImplementedError: The part that a word names has no such option.
    """
    for argument, word, known in (
        ("attention", attention, words.ATTENTIONS),
        ("matmul_precision", matmul_precision, words.MATMUL_PRECISIONS),
        ("mlp", mlp, words.MLPS),
        ("norm", norm, words.NORMS),
        ("pattern", pattern, words.PATTERNS),
        ("positions", positions, words.POSITIONS),
        ("remat", remat, words.REMATS),
    ):
        check_word(argument, word, tuple(known))
    make_layer = _mechanism(mechanism)
    as_size("features", features)
    as_size("num_layers", num_layers, maximum=1000)  # Each is traced and compiled.
    sizes = {"vocab_size": vocab_size, "out_features": out_features}
    for argument, size in (sizes | {"max_length": max_length, "stride": stride}).items():
        if size is not None:
            as_size(argument, size)
    if window is not None:
        as_size("window", window, minimum=0)
    as_size("short_conv", short_conv, minimum=0)
    check_flag("causal", causal)
    check_flag("tie_embedding", tie_embedding)
    check_number("init_scale", init_scale)
    if dtype is not None:
        check_dtype("dtype", dtype)
    check_dtype("param_dtype", param_dtype)
    if vocab_size is not None and out_features is not None:
        raise ValueError(
            f"out_features is for vectors: got {out_features} with vocab_size={vocab_size}."
        )
    if vocab_size is None and not tie_embedding:
        raise ValueError("tie_embedding=False needs vocab_size: vectors have no embedding.")

    types = {"dtype": dtype, "param_dtype": param_dtype}
    products = _said({"dot_general": _product(matmul_precision, dtype)})
    out_init = scaled_init(init_scale)
    make_norm = None
    if words.NORMS[norm] is not None:
        make_norm = functools.partial(getattr(nn, words.NORMS[norm]), **types)
    hidden_features = _hidden_features(mlp_ratio, features)
    if mlp != "gelu" and not hidden_features:
        raise ValueError(f"mlp={mlp!r} needs mlp_ratio: without one there is no MLP.")
    make_mlp = words.MLPS[mlp]()

    def make_block(depth: int) -> Block:
        layer = words.ATTENTIONS[attention](make_layer(depth))
        given = {
            "num_heads": num_heads,
            "num_kv_heads": num_kv_heads,
            "head_dim": head_dim,
            "qk_norm": qk_norm,
            "rotary": positions == "rotary",
            "softcap": softcap,
            "sinks": sinks,
            "decode": decode,
        }
        given = _said(given) | products | ({} if use_bias else {"use_bias": False})
        word = f"mechanism={told(mechanism)}"
        if attention != "multihead":
            word = f"attention={attention!r}"
        mlp = None
        if hidden_features:
            mlp = make_mlp(hidden_features, out_init, **types, **products)
        conv = None
        if short_conv:
            conv = ShortConvolution(short_conv, out_init, decode=decode, **types)
        return Block(
            _make(
                word,
                layer,
                given,
                num_heads=8,
                use_bias=use_bias,
                dropout_rate=dropout_rate,
                out_kernel_init=out_init,
                **types,
            ),
            mlp=mlp,
            norm=make_norm,
            conv=conv,
            residual=residual,
            dropout_rate=dropout_rate,
        )

    blocks = tuple(make_block(depth) for depth in range(num_layers))
    field, part = words.POSITIONS[positions] or ("positions", None)
    placing = _make(
        f"positions={positions!r}",
        getattr(attention_jax, part) if part else lambda: None,
        _said({"max_length": max_length}),
        num_heads=getattr(blocks[0].attention, "num_heads", 1),
        bidirectional=not causal,
        # Vectors are larger than tokens at first.
        **({"scale": 1.0} if vocab_size is None else {}),
        **types,
    )
    given = _said({"window": window, "stride": stride})
    reach = _make(f"pattern={pattern!r}", words.PATTERNS[pattern], given, causal=causal)
    if vocab_size is None:
        embedding = VectorEmbedding(features)
        head = None if out_features is None else nn.Dense(out_features, **types)
    else:
        embedding = TokenEmbedding(vocab_size, features, **types)
        head = None if tie_embedding else Unembedding(vocab_size, **types)
    return SequenceModel(
        embedding,
        blocks,
        mask=masks.causal() if causal else None,
        reach=reach,
        norm=make_norm,
        head=head,
        dropout_rate=dropout_rate,
        remat=words.REMATS[remat](jax),
        name=name,
        **{field: placing},
    )


def _mechanism(mechanism: str | Callable[..., Any]) -> Callable[[int], functools.partial]:
    """Makes the layer of a mechanism for the block at some depth."""
    name = "mechanism"
    if own.is_path(mechanism):
        name = f"mechanism={mechanism}"
        mechanism = own.find(mechanism, "mechanism")
    elif isinstance(mechanism, str):
        if mechanism not in words.MECHANISMS:
            raise ValueError(
                f"mechanism must be one of {tuple(words.MECHANISMS)}, or package.module:name, got "
                f"{told(mechanism)}."
            )
        return words.MECHANISMS[mechanism]
    if isinstance(mechanism, nn.Module):
        called = type(mechanism).__name__
        raise TypeError(f"{name} must be a class of layers, as {called}; got a layer.")
    kind = mechanism.func if isinstance(mechanism, functools.partial) else mechanism
    if isinstance(kind, type) and issubclass(kind, nn.Module):
        return lambda depth: functools.partial(mechanism)
    own.check_call(mechanism, name, "query", "key", "value", mask=None)
    return lambda depth: functools.partial(attention_jax.MultiHeadAttention, attention_fn=mechanism)


def _said(options: dict[str, Any]) -> dict[str, Any]:
    """The options that the caller set: neither None nor False."""
    return {x: value for x, value in options.items() if value is not None and value is not False}


def _make(word: str, make: Callable[..., Any], given: Mapping[str, Any], **others: Any) -> Any:
    """Calls `make` with the given options, and with those of the others that it accepts.

    Raises:
        NotImplementedError: An option was given that `make` does not have.
        ValueError: `make` needs an option that was not given.
    """
    settled = getattr(make, "keywords", {})
    taken = inspect.signature(make).parameters
    for name, value in given.items():
        if name not in taken or name in settled:
            hint = ": take positions='none', or others." if name == "rotary" else "."
            raise NotImplementedError(f"{word} has no {name}={value!r}{hint}")
    options = {x: value for x, value in others.items() if x in taken and x not in settled}
    options |= given
    for name, parameter in taken.items():
        if parameter.default is parameter.empty and name not in options:
            raise ValueError(f"{word} needs {name}.")
    return make(**options)


def _hidden_features(mlp_ratio: float, features: int) -> int:
    """The width of the MLP's hidden layer; 0 where there is none."""
    check_number("mlp_ratio", mlp_ratio)
    width = round(mlp_ratio * features) if math.isfinite(mlp_ratio) else -1
    if width < 0 or (mlp_ratio and not width):
        raise ValueError(
            "mlp_ratio must be 0 or give the MLP a width of at least 1: got "
            f"mlp_ratio={mlp_ratio} with features={features}."
        )
    return width
