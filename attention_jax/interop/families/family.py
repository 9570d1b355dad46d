"""A family of language models, and what all of them share."""

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
from flax import linen as nn

from attention_jax.functional.masks import Mask
from attention_jax.layers import MultiHeadAttention
from attention_jax.models import SequenceModel
from attention_jax.types import Array

Config = Mapping[str, Any]
QKV = ("query", "key", "value")

_exact_gelu = functools.partial(nn.gelu, approximate=False)
# Both approximations by tanh are one formula.
ACTIVATIONS = {
    "gelu_new": nn.gelu,
    "gelu_fast": nn.gelu,
    "gelu_pytorch_tanh": nn.gelu,
    "gelu": _exact_gelu,
    "silu": nn.silu,
    "swish": nn.silu,
    "relu": nn.relu,
}


class Tensor(NamedTuple):
    """A tensor of a file, and the parameters of a model that it holds.

    Attributes:
        name: In the file.
        paths: Of the parameters.
        load: From the tensor to the parameters.
        save: From the parameters to the tensor.
    """

    name: str
    paths: tuple[str, ...]
    load: Callable[[Array], tuple[Array, ...]] = lambda x: (x,)
    save: Callable[..., Array] = lambda x: x


class Family(NamedTuple):
    """One `model_type`.

    Attributes:
        architecture: The name of transformers' class.
        prefix: What names of tensors begin with; some files leave it out.
        defaults: Of the fields of a config that decide the arithmetic, as transformers has them.
            A field with the value `REQUIRED` has none.
        only: Fields that may only have this value, as no part of this package has another.
        model: From a config with its defaults to the model.
        config: From a model to the config that it would have.
        tensors: The tensors of a model.
        unused: Ends of names of tensors that hold constants.
    """

    architecture: str
    prefix: str
    defaults: Config
    only: Config
    model: Callable[[Config, Any], SequenceModel]
    config: Callable[[SequenceModel], dict[str, Any]]
    tensors: Callable[[SequenceModel], Iterator[Tensor]]
    unused: tuple[str, ...] = ()


REQUIRED = object()


# Tensors. torch keeps the matrix of a projection as [out, in], and heads side by side.


def into_heads(name, path, heads, head_dim) -> Tensor:
    """A projection to heads: `[N * H, D]` is a kernel `[D, N, H]`."""
    return Tensor(
        name,
        (path,),
        lambda w: (w.T.reshape(w.shape[1], heads, head_dim),),
        lambda kernel: kernel.reshape(kernel.shape[0], -1).T,
    )


def out_of_heads(name, path, heads, head_dim) -> Tensor:
    """A projection from heads: `[D, N * H]` is a kernel `[N, H, D]`."""
    return Tensor(
        name,
        (path,),
        lambda w: (w.T.reshape(heads, head_dim, w.shape[0]),),
        lambda kernel: kernel.reshape(-1, kernel.shape[-1]).T,
    )


def heads_bias(name, path, heads, head_dim) -> Tensor:
    return Tensor(name, (path,), lambda b: (b.reshape(heads, head_dim),), lambda b: b.reshape(-1))


def transposed(name, path) -> Tensor:
    return Tensor(name, (path,), lambda w: (w.T,), lambda w: w.T)


def same(name, path) -> Tensor:
    return Tensor(name, (path,))


def norm_tensors(name, path, has_bias=False) -> Iterator[Tensor]:
    yield same(f"{name}.weight", f"{path}/scale")
    if has_bias:
        yield same(f"{name}.bias", f"{path}/bias")


def head_sizes(attention: MultiHeadAttention, features: int) -> tuple[int, int, int]:
    """N, K and H."""
    heads = attention.num_heads
    return heads, attention.num_kv_heads or heads, attention.head_dim or features // heads


def has_bias(attention: MultiHeadAttention, name: str) -> bool:
    use = attention.use_bias
    return use if isinstance(use, bool) else name in use


def split(x, axis):
    return [np.take(x, i, axis=axis) for i in range(x.shape[axis])]


def activation_of(name: str) -> Callable[[Array], Array]:
    if name not in ACTIVATIONS:
        raise NotImplementedError(
            f"the activation must be one of {tuple(ACTIVATIONS)}, got {name!r}."
        )
    return ACTIVATIONS[name]


def word_of(activation: Callable[[Array], Array]) -> str:
    for name in ("gelu_pytorch_tanh", "gelu", "silu", "relu"):
        if spec(ACTIVATIONS[name]) == spec(activation):
            return name
    raise NotImplementedError(f"activation={activation} has no name in transformers.")


def epsilon(norm: Callable[[], nn.Module]) -> float:
    """Of the norms that it makes."""
    return norm().epsilon


# Fields that change the rounding, the cost or the training of a model, but not what it computes.
# So do the initial values, whose names end in "_init".
_NEUTRAL = (
    *("parent", "name", "dtype", "param_dtype", "precision", "promote_dtype", "use_fast_variance"),
    *("dot_general", "implementation", "remat", "decode", "cache_length"),
    *("dropout_rate", "deterministic"),
)


def model_spec(model: SequenceModel) -> Any:
    """`spec` of a model, in which sizes that follow from others are the same as given ones."""

    def sized(block):
        attention = getattr(block, "attention", None)
        if not isinstance(attention, MultiHeadAttention):
            return block
        _, kv_heads, head_dim = head_sizes(attention, model.embedding.features)
        scale = head_dim**-0.5 if attention.scale is None else attention.scale
        sizes = {"num_kv_heads": kv_heads, "head_dim": head_dim, "scale": scale}
        return block.clone(attention=attention.clone(**sizes))

    return spec(model.clone(blocks=tuple(map(sized, model.blocks)), reach=reaches(model)))


def reaches(model: SequenceModel) -> tuple[Mask | None, ...]:
    """How far each block sees."""
    if model.reach is None or isinstance(model.reach, Mask):
        return (model.reach,) * len(model.blocks)
    return tuple(model.reach)


def spec(value: Any) -> Any:
    """A part of a model as dicts and tuples, equal for parts that compute the same.

    Partials do not compare. What makes a norm stands for the norm.
    """
    make = value.func if isinstance(value, functools.partial) else value
    if isinstance(make, type) and issubclass(make, nn.Module):
        with contextlib.suppress(TypeError):  # It may need arguments that no norm has.
            return spec(value())
    if isinstance(value, functools.partial):
        return ("partial", value.func, spec(value.args), spec(value.keywords))
    if isinstance(value, nn.Module):
        names = [field.name for field in dataclasses.fields(value)]
        counted = [x for x in names if x not in _NEUTRAL and not x.endswith("_init")]
        return {"type": type(value)} | {name: spec(getattr(value, name)) for name in counted}
    if isinstance(value, tuple | list):
        return tuple(map(spec, value))
    if isinstance(value, dict):
        return tuple(sorted((name, spec(x)) for name, x in value.items()))
    return value


def differences(theirs: Any, ours: Any, path: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Where two results of `spec` differ: the path of a field, and both values."""
    if isinstance(theirs, dict) and isinstance(ours, dict) and theirs["type"] is ours["type"]:
        pairs = [(name, theirs[name], ours[name]) for name in ours]
    elif isinstance(theirs, tuple) and isinstance(ours, tuple) and len(theirs) == len(ours):
        pairs = [(str(i), *both) for i, both in enumerate(zip(theirs, ours, strict=True))]
    else:
        if theirs != ours:
            yield path, theirs, ours
        return
    for name, *both in pairs:
        yield from differences(*both, f"{path}.{name}".removeprefix("."))
