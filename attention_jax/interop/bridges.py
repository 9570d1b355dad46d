"""The parameters of one attention layer, from and to other libraries.

Ours are those of `MultiHeadAttention`: `query`, `key`, `value` with kernel `[D, N, H]` and bias
`[N, H]`, `out` with kernel `[N, H, D]` and bias `[D]`. The layer
`flax.linen.MultiHeadDotProductAttention` has the same tree, so it needs no function here. torch and
equinox keep a matrix `[outputs, inputs]` for each projection, whose rows are the heads one after
another.

All functions are pure: they take a tree of arrays and return one of NumPy arrays.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from attention_jax.checks import as_size
from attention_jax.types import PyTree

_PROJECTIONS = ("query", "key", "value", "out")


def from_torch(state: Mapping[str, Any], num_heads: int) -> dict[str, Any]:
    """The parameters of a `torch.nn.MultiheadAttention`, for `MultiHeadAttention(num_heads)`.

    Args:
        state: Its `state_dict()`, or the part of a loaded file that holds `in_proj_weight`
            `[3 D, D]` or `q_proj_weight`, `k_proj_weight`, `v_proj_weight`, and `out_proj`.
        num_heads: Number N of heads, which the state does not say.

    Returns:
        Parameters; without biases for a module of `bias=False`, as `use_bias=False` has them.

    Raises:
        ValueError: A parameter is missing, unknown or of another shape.
        NotImplementedError: The module has `bias_k` and `bias_v`, or keys and values of different
            widths. Our layer makes both from the same inputs.

    A module of `add_zero_attn=True` has the same state; that option has no place in our layer.
    """
    left = _Parameters("state", state)
    if bias := [name for name in ("bias_k", "bias_v") if name in left.arrays]:
        raise NotImplementedError(
            f"state holds {bias[0]}: MultiHeadAttention has no further key or value."
        )
    if "in_proj_weight" in left.arrays:
        weights = _thirds("in_proj_weight", left.take("in_proj_weight", 2))
    else:
        if "q_proj_weight" not in left.arrays:
            raise ValueError(
                "state must hold in_proj_weight, or q_proj_weight, k_proj_weight and "
                f"v_proj_weight, without a prefix: {left.held()}."
            )
        weights = [left.take(f"{x}_proj_weight", 2) for x in "qkv"]
    biases = [None] * 3
    if "in_proj_bias" in left.arrays:
        biases = _thirds("in_proj_bias", left.take("in_proj_bias", 1))
    out = left.linear("out_proj")
    left.check_empty()
    return _layer([*zip(weights, biases, strict=True), out], num_heads)


def to_torch(params: PyTree) -> dict[str, np.ndarray]:
    """The `state_dict` of a `torch.nn.MultiheadAttention` with these parameters.

    Args:
        params: Of a `MultiHeadAttention` whose width D is N times H, and that has as many key heads
            as query heads.

    Returns:
        `{name: array}`, for `load_state_dict` after `torch.from_numpy` on each. With another width
        of keys and values, that of a module with `kdim` and `vdim`. Parameters in bfloat16 come in
        float32.

    Raises:
        ValueError: A parameter is missing or unknown, or a shape is none that the module can have.
    """
    query, key, value, out = _projections(params)
    width = query[0].shape[1]
    if not all(x.shape[0] == width for x, _ in (query, key, value)) or out[0].shape != (width,) * 2:
        raise ValueError(
            f"params do not fit torch, where all heads together have the width {width} of the "
            "inputs, in queries, keys, values and the result: got matrices [outputs, inputs] of "
            f"{', '.join(str(list(x.shape)) for x, _ in (query, key, value, out))}."
        )
    biases = [bias for _, bias in (query, key, value, out)]
    if len({bias is None for bias in biases}) == 2:
        raise ValueError("params must have a bias in all four projections, or in none.")
    weights = [weight for weight, _ in (query, key, value)]
    if key[0].shape[1] == width:
        state = {"in_proj_weight": np.concatenate(weights)}
    else:
        state = {f"{x}_proj_weight": y for x, y in zip("qkv", weights, strict=True)}
    if biases[0] is not None:
        state["in_proj_bias"] = np.concatenate(biases[:3])
        state["out_proj.bias"] = out[1]
    state["out_proj.weight"] = out[0]
    # Copies that torch may write to. NumPy, and so `torch.from_numpy`, has no bfloat16.
    return {
        x: np.array(y, np.float32 if y.dtype == jnp.bfloat16 else None) for x, y in state.items()
    }


def from_nnx(state: Mapping[str, Any]) -> dict[str, Any]:
    """The parameters of a `flax.nnx.MultiHeadAttention`, which have the same tree.

    Args:
        state: `nnx.to_pure_dict(nnx.state(module, nnx.Param))`.

    Raises:
        ValueError: It holds another thing, as the state of random numbers; or a part is missing.
    """
    return _nnx_tree("state", state)


def to_nnx(params: PyTree) -> dict[str, Any]:
    """A dict for `nnx.update(module, ...)` of a `flax.nnx.MultiHeadAttention`.

    Args:
        params: Of a `MultiHeadAttention`, with `qk_norm` too.

    Raises:
        ValueError: They hold a parameter that nnx's layer lacks, as `sinks`; or a part is missing.
    """
    return _nnx_tree("params", params)


def from_equinox(module: Any) -> dict[str, Any]:
    """The parameters of an `equinox.nn.MultiheadAttention`.

    Args:
        module: The module, or anything with its attributes: `num_heads`, and `query_proj`,
            `key_proj`, `value_proj`, `output_proj` with `weight` `[outputs, inputs]` and `bias`.

    Returns:
        Parameters, with a bias where the module has one. By default it has none, as
        `MultiHeadAttention(use_bias=False)`.

    Raises:
        TypeError: `module` lacks one of the attributes.
        ValueError: Shapes do not fit together.
        NotImplementedError: Keys and values are of different widths.
    """
    linears = []
    try:
        num_heads = module.num_heads
        for name in ("query", "key", "value", "output"):
            linear = getattr(module, f"{name}_proj")
            bias = None if linear.bias is None else np.asarray(linear.bias)
            linears.append((np.asarray(linear.weight), bias))
    except AttributeError as error:
        raise TypeError(f"module must be an equinox.nn.MultiheadAttention: {error}.") from error
    return _layer(linears, num_heads)


def to_equinox(params: PyTree, module: Any) -> Any:
    """A copy of an `equinox.nn.MultiheadAttention` with these parameters.

    Args:
        params: Of a `MultiHeadAttention`.
        module: A module of the same sizes. Its dropout and other settings stay.

    Raises:
        ValueError: A parameter is missing or unknown, or a shape is not that of the module.
    """
    wanted = {}
    names = ("query", "key", "value", "output")
    for name, (weight, bias) in zip(names, _projections(params), strict=True):
        wanted[f"{name}_proj.weight"] = weight
        if bias is not None:
            wanted[f"{name}_proj.bias"] = bias
    leaves, structure = jax.tree_util.tree_flatten_with_path(module)
    paths = [jax.tree_util.keystr(path, simple=True, separator=".") for path, _ in leaves]
    theirs = {
        path: tuple(leaf.shape)
        for path, (_, leaf) in zip(paths, leaves, strict=True)
        if path.endswith((".weight", ".bias"))
    }
    for path in sorted(wanted.keys() | theirs.keys()):
        ours = wanted[path].shape if path in wanted else "nothing"
        if ours != theirs.get(path, "nothing"):
            raise ValueError(
                f"params do not fit the module: at {path} it has {theirs.get(path, 'nothing')}, "
                f"and they give {ours}."
            )
    new = [
        jnp.asarray(wanted[path]) if path in wanted else leaf
        for path, (_, leaf) in zip(paths, leaves, strict=True)
    ]
    return jax.tree.unflatten(structure, new)


def from_original(
    checkpoint: Mapping[str, Any], num_heads: int | None = None
) -> tuple[dict[str, Any], float]:
    """The parameters in a checkpoint of the project that this one began as, and their scale.

    Its layers were written in torch: `MultiAttention` with `QKV` and `out_proj`, `SelfAttention`
    with `q`, `k`, `v` and `out_proj`. Both divide the logits by the root of the model width D. With
    several heads that is not the root of the head size, so the scale belongs to the weights.

    Args:
        checkpoint: What `load` reads of a `.pth` that its trainer saved; or the state dict alone.
        num_heads: Number of heads, if the checkpoint does not say.

    Returns:
        `(params, scale)`: for `MultiHeadAttention(num_heads)`, or `SingleHeadAttention()` where the
        checkpoint has `q`, `k` and `v`. Give the scale to the layer: it is `D ** -0.5`, which a
        single head has by itself.

    Raises:
        ValueError: A parameter is missing, unknown or of another shape; or the number of heads is
            missing, or is not that of the checkpoint.
    """
    noted = checkpoint.get("num_heads")
    left = _Parameters("checkpoint", checkpoint.get("model_state_dict", checkpoint))
    if "QKV.weight" in left.arrays:
        num_heads = noted if num_heads is None else num_heads
        if num_heads is None:
            raise ValueError("num_heads must be given: the checkpoint does not say it.")
        if noted not in (None, num_heads):
            raise ValueError(f"num_heads is {noted} in the checkpoint: got {num_heads}.")
        weight, bias = left.linear("QKV")
        linears = [*zip(_thirds("QKV.weight", weight), _thirds("QKV.bias", bias), strict=True)]
        linears.append(left.linear("out_proj"))
        params = _layer(linears, num_heads)
    else:
        if num_heads not in (None, 1):
            raise ValueError(f"num_heads must be 1 for q, k and v: got {num_heads}.")
        linears = [left.linear(name) for name in ("q", "k", "v", "out_proj")]
        params = _layer(linears, 1)  # For its checks; a single head has no axis of heads.
        params = {
            name: {"kernel": weight.T} | ({} if bias is None else {"bias": bias})
            for name, (weight, bias) in zip(_PROJECTIONS, linears, strict=True)
        }
    left.check_empty()
    return params, linears[-1][0].shape[0] ** -0.5


# A projection as torch and equinox have it: a matrix [outputs, inputs], and a bias or None.
_Linear = tuple[np.ndarray, np.ndarray | None]


class _Parameters:
    """The arrays of a state dict by their full names, each to be taken once.

    Args:
        name: What the caller calls the state, for errors.
        state: Nested or flat.
    """

    def __init__(self, name: str, state: Mapping[str, Any]):
        self.name, self.arrays = name, _flat(name, state)

    def take(self, name: str, rank: int) -> np.ndarray:
        if name not in self.arrays:
            raise ValueError(f"{self.name} must hold {name}: {self.held()}.")
        array = self.arrays.pop(name)
        if array.ndim != rank:
            raise ValueError(f"{name} must have {rank} axes: got shape {array.shape}.")
        return array

    def held(self) -> str:
        return f"it holds {', '.join(sorted(self.arrays)[:8]) or 'nothing'}"

    def linear(self, name: str) -> _Linear:
        has_bias = f"{name}.bias" in self.arrays
        weight = self.take(f"{name}.weight", 2)
        return weight, self.take(f"{name}.bias", 1) if has_bias else None

    def check_empty(self) -> None:
        if self.arrays:
            raise ValueError(f"{self.name} holds unknown parameters: {', '.join(self.arrays)}.")


def _flat(name: str, tree: Any, above: str = "") -> dict[str, np.ndarray]:
    if not isinstance(tree, Mapping):
        raise TypeError(f"{name} must be a dict of arrays: got {type(tree).__name__}.")
    arrays = {}
    for part, value in tree.items():
        path = f"{above}{part}"
        if isinstance(value, Mapping):
            arrays |= _flat(name, value, f"{path}.")
        elif hasattr(value, "shape"):
            try:
                arrays[path] = _as_numpy(value)
            except (TypeError, NotImplementedError) as error:  # Of torch, as for 8-bit floats.
                raise ValueError(f"{path} of {name} cannot be read: {error}") from error
            if not jnp.issubdtype(arrays[path].dtype, jnp.floating):
                raise ValueError(f"{path} of {name} must be floats, got {arrays[path].dtype}.")
        else:
            raise TypeError(f"{name} must hold arrays: got {type(value).__name__} at {path}.")
    return arrays


def _as_numpy(array: Any) -> np.ndarray:
    """An array, or a tensor or parameter of torch, for NumPy."""
    if hasattr(array, "detach"):
        array = array.detach().cpu()
        if str(array.dtype) == "torch.bfloat16":  # Which NumPy has not.
            return np.asarray(array.float()).astype(jnp.bfloat16)
    return np.asarray(array)


def _thirds(name: str, array: np.ndarray | None) -> list[np.ndarray | None]:
    """The parts for queries, keys and values, which torch keeps one below the other."""
    if array is None:
        return [None] * 3
    if array.shape[0] % 3:
        raise ValueError(f"{name} must have rows for three projections: got shape {array.shape}.")
    return np.split(array, 3)


def _layer(linears: list[_Linear], num_heads: int) -> dict[str, Any]:
    """Our parameters from the matrices of query, key, value and out."""
    num_heads = as_size("num_heads", num_heads)
    (query, _), (key, _), (value, _), (out, _) = linears
    for name, (weight, bias) in zip(_PROJECTIONS, linears, strict=True):
        rows, columns = weight.shape
        if bias is not None and bias.shape != (rows,):
            raise ValueError(f"the bias of {name} must have {rows} elements: got {bias.shape}.")
        if (columns if name == "out" else rows) % num_heads:
            raise ValueError(
                f"num_heads must divide the matrix of {name}: got {num_heads} and {weight.shape}."
            )
    if query.shape[0] != key.shape[0] or value.shape[0] != out.shape[1]:
        raise ValueError(
            "queries must be as wide as keys, and out take the width of values: got matrices "
            f"[outputs, inputs] of {query.shape}, {key.shape}, {value.shape} and {out.shape}."
        )
    if key.shape[1] != value.shape[1]:
        raise NotImplementedError(
            "keys and values come from the same inputs in MultiHeadAttention: got inputs of the "
            f"widths {key.shape[1]} and {value.shape[1]}."
        )
    params = {}
    for name, (weight, bias) in zip(_PROJECTIONS, linears, strict=True):
        heads = (num_heads, -1)
        if name == "out":
            params[name] = {"kernel": weight.T.reshape(*heads, weight.shape[0])}  # [N, H, D]
        else:
            params[name] = {"kernel": weight.T.reshape(weight.shape[1], *heads)}  # [D, N, H]
        if bias is not None:
            params[name]["bias"] = bias if name == "out" else bias.reshape(heads)
    return params


def _projections(params: PyTree) -> list[_Linear]:
    """The matrices of query, key, value and out from our parameters: the inverse of `_layer`."""
    left = _Parameters("params", params)
    linears, heads = [], []
    for name in _PROJECTIONS:
        kernel, bias = left.take(f"{name}.kernel", 3), None
        if f"{name}.bias" in left.arrays:
            bias = left.take(f"{name}.bias", 1 if name == "out" else 2).ravel()
        if name == "out":
            heads.append(kernel.shape[0])
            weight = kernel.reshape(-1, kernel.shape[-1]).T  # [D, N H]
        else:
            heads.append(kernel.shape[1])
            weight = kernel.reshape(kernel.shape[0], -1).T  # [N H, D]
        linears.append((weight, bias))
    left.check_empty()
    if len(set(heads)) > 1:
        raise ValueError(
            "params must have as many heads in keys and values as in queries: got "
            f"{', '.join(map(str, heads))} in {', '.join(_PROJECTIONS)}."
        )
    return linears


def _nnx_tree(name: str, tree: Any) -> dict[str, Any]:
    """A copy of the tree of flax, if it holds what the layers of both sides have."""
    arrays = _flat(name, tree)
    for part in _PROJECTIONS:
        if f"{part}.kernel" not in arrays:
            raise ValueError(f"{name} must hold {part}.kernel.")
    known = {f"{part}.{x}" for part in _PROJECTIONS for x in ("kernel", "bias")}
    known |= {"query_ln.scale", "key_ln.scale"}
    if unknown := sorted(arrays.keys() - known):
        raise ValueError(
            f"{name} holds unknown parameters: {', '.join(unknown)}. Of a module of nnx give "
            "nnx.to_pure_dict(nnx.state(module, nnx.Param))."
        )
    copy: dict[str, Any] = {}
    for path, array in arrays.items():
        part, _, leaf = path.partition(".")
        copy.setdefault(part, {})[leaf] = array
    return copy
