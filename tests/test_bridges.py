"""The parameters of other libraries' layers: equal outputs in both, and back again unchanged."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen, nnx
from torch_files import saved

from attention_jax import MultiHeadAttention, SingleHeadAttention, dot_product_attention
from attention_jax.interop import weights

N, H, D, T, S = 3, 5, 15, 7, 4  # In torch all heads together are as wide as the inputs.
RNG = np.random.default_rng(0)


def drawn(*shape):
    return (RNG.standard_normal(shape) / 3).astype(np.float32)


X, MEMORY = drawn(2, T, D), drawn(2, S, D)


def same(got, want):
    """Two trees are equal, in structure, types and numbers."""
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


def close(got, want):
    np.testing.assert_allclose(np.asarray(got), np.asarray(want), rtol=1e-6, atol=1e-6)


def attend(query, key, value, num_heads, scale):
    """Attention on projected rows `[B, T, N H]`, whose heads lie side by side; in float64."""
    query, key, value = (np.asarray(x, np.float64) for x in (query, key, value))
    out = np.zeros((*query.shape[:-1], value.shape[-1]))
    heads = zip(*(np.split(x, num_heads, axis=-1) for x in (query, key, value)), strict=True)
    for n, (q, k, v) in enumerate(heads):
        logits = scale * q @ np.swapaxes(k, -1, -2)
        shares = np.exp(logits - logits.max(-1, keepdims=True))
        place = slice(n * v.shape[-1], (n + 1) * v.shape[-1])
        out[..., place] = shares / shares.sum(-1, keepdims=True) @ v
    return out


def ours(params, queries, memory=None, **fields):
    return MultiHeadAttention(N, **fields).apply({"params": params}, queries, memory)


# torch -------------------------------------------------------------------------------------------


def torch_state(kind):
    """A state dict of a `torch.nn.MultiheadAttention`, and the width of its keys."""
    width = 11 if kind == "separate" else D
    if kind == "separate":
        state = {"q_proj_weight": drawn(D, D), "k_proj_weight": drawn(D, width)}
        state["v_proj_weight"] = drawn(D, width)
    else:
        state = {"in_proj_weight": drawn(3 * D, D)}
    if kind != "without biases":
        state |= {"in_proj_bias": drawn(3 * D), "out_proj.bias": drawn(D)}
    return state | {"out_proj.weight": drawn(D, D)}, width


def torch_formula(state, queries, memory):
    if "in_proj_weight" in state:
        parts = np.split(state["in_proj_weight"], 3)
    else:
        parts = [state[f"{x}_proj_weight"] for x in "qkv"]
    biases = np.split(state.get("in_proj_bias", np.zeros(3 * D)), 3)
    inputs = (queries, memory, memory)
    q, k, v = (x @ w.T + b for x, w, b in zip(inputs, parts, biases, strict=True))
    mixed = attend(q, k, v, N, H**-0.5)
    return mixed @ state["out_proj.weight"].T + state.get("out_proj.bias", 0.0)


@pytest.mark.parametrize("kind", ["together", "separate", "without biases"])
def test_the_layer_of_torch_has_equal_outputs_and_comes_back(kind):
    state, width = torch_state(kind)
    memory = drawn(2, S, width)
    params = weights.from_torch(state, N)
    use_bias = kind != "without biases"
    close(ours(params, X, memory, use_bias=use_bias), torch_formula(state, X, memory))
    same(weights.to_torch(params), state)
    # In float16 the numbers are moved, not converted.
    half = {name: x.astype(np.float16) for name, x in state.items()}
    same(weights.to_torch(weights.from_torch(half, N)), half)


@pytest.mark.parametrize("kind", ["together", "separate", "without biases"])
def test_torch_itself_agrees(kind):
    torch = pytest.importorskip("torch")
    state, width = torch_state(kind)
    bias = kind != "without biases"
    options = {"kdim": width, "vdim": width} if kind == "separate" else {}
    module = torch.nn.MultiheadAttention(D, N, bias=bias, batch_first=True, **options)
    loaded = {name: torch.from_numpy(x.copy()) for name, x in state.items()}
    module.load_state_dict(loaded)
    memory = drawn(2, S, width)
    with torch.no_grad():
        want = module(*(torch.from_numpy(x) for x in (X, memory, memory)))[0]
    close(torch_formula(state, X, memory), want)
    # Straight from the module, without a file.
    close(ours(weights.from_torch(module.state_dict(), N), X, memory, use_bias=bias), want)


def test_a_state_inside_of_a_file_is_found_by_its_names(tmp_path):
    state, _ = torch_state("together")
    (tmp_path / "x.pth").write_bytes(saved({f"encoder.0.{x}": y for x, y in state.items()}))
    part = weights.load(tmp_path / "x.pth")["encoder"]["0"]
    same(weights.from_torch(part, N), weights.from_torch(state, N))


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"bias_k": drawn(1, 1, D)}, NotImplementedError, "bias_k"),
        ({"in_proj_weight": drawn(3 * D + 1, D)}, ValueError, "in_proj_weight"),
        ({"in_proj_weight": drawn(3 * D)}, ValueError, "in_proj_weight must have 2 axes"),
        ({"in_proj_bias": drawn(3)}, ValueError, "bias of query must have 15"),
        ({"out_proj.weight": None}, ValueError, "must hold out_proj.weight"),
        ({"out_proj.weight": drawn(D, 12)}, ValueError, "out take the width of values"),
        ({"in_proj_weight": None}, ValueError, "must hold in_proj_weight, or q_proj"),
        ({"in_proj_bias": drawn(3 * D) > 0}, ValueError, "in_proj_bias of state must be floats"),
        ({"q_proj_weight": drawn(D, D)}, ValueError, "unknown parameters: q_proj_weight"),
        ({"norm.weight": drawn(D)}, ValueError, "unknown parameters: norm.weight"),
        ({"in_proj_weight": "words"}, TypeError, "str at in_proj_weight"),
    ],
)
def test_a_state_that_is_not_of_the_layer_is_refused(changes, error, words):
    state = {**torch_state("together")[0], **changes}
    state = {name: x for name, x in state.items() if x is not None}
    with pytest.raises(error, match=words):
        weights.from_torch(state, N)


def test_other_misfits_with_torch_are_named():
    state = torch_state("together")[0]
    for num_heads, error in ((0, ValueError), (4, ValueError), ("3", TypeError), (True, TypeError)):
        with pytest.raises(error, match=f"num_heads.*{num_heads}"):
            weights.from_torch(state, num_heads)
    same(weights.from_torch(state, np.int64(N)), weights.from_torch(state, N))
    separate = torch_state("separate")[0] | {"v_proj_weight": drawn(D, 12)}
    with pytest.raises(NotImplementedError, match="11 and 12"):
        weights.from_torch(separate, N)
    params = weights.from_torch(state, N)
    grouped = params | {"key": {"kernel": drawn(D, 1, H)}}
    narrow = params | {"query": {"kernel": drawn(12, N, H), "bias": drawn(N, H)}}
    partly = params | {"out": {"kernel": params["out"]["kernel"]}}
    for misfit, words in (
        (grouped, "as many heads"),
        (narrow, "width 15|width 12"),
        (partly, "in all four projections"),
        (params | {"sinks": drawn(N)}, "unknown parameters: sinks"),
        ({"query": params["query"]}, "must hold key.kernel"),
        (3, "int"),
    ):
        with pytest.raises((ValueError, TypeError), match=words):
            weights.to_torch(misfit)


# flax --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("qk_norm", [False, True])
def test_the_layer_of_linen_has_the_same_parameters(qk_norm):
    theirs = linen.MultiHeadDotProductAttention(num_heads=N, normalize_qk=qk_norm)
    variables = theirs.init(jax.random.key(0), X)
    close(ours(variables["params"], X, qk_norm=qk_norm), theirs.apply(variables, X))
    layer = MultiHeadAttention(N, qk_norm=qk_norm)
    params = jax.eval_shape(layer.init, jax.random.key(0), X)["params"]
    assert jax.tree.map(jnp.shape, variables["params"]) == jax.tree.map(jnp.shape, params)


@pytest.mark.parametrize("use_bias", [False, True])
def test_the_layer_of_nnx_has_equal_outputs_and_comes_back(use_bias):
    module = nnx.MultiHeadAttention(
        N, D, use_bias=use_bias, normalize_qk=use_bias, decode=False, rngs=nnx.Rngs(0)
    )
    state = nnx.to_pure_dict(nnx.state(module, nnx.Param))
    params = weights.from_nnx(state)
    close(ours(params, X, use_bias=use_bias, qk_norm=use_bias), module(X))
    changed = jax.tree.map(lambda x: drawn(*x.shape), params)
    nnx.update(module, weights.to_nnx(changed))
    close(ours(changed, X, use_bias=use_bias, qk_norm=use_bias), module(X))
    same(weights.from_nnx(nnx.to_pure_dict(nnx.state(module, nnx.Param))), changed)


def test_more_or_less_than_the_parameters_of_nnx_is_refused():
    params = weights.from_torch(torch_state("together")[0], N)
    with pytest.raises(ValueError, match=r"rngs\.count.*nnx\.Param"):
        weights.from_nnx(params | {"rngs": {"count": np.zeros(())}})
    with pytest.raises(ValueError, match="sinks"):
        weights.to_nnx(params | {"sinks": drawn(N)})
    with pytest.raises(ValueError, match=r"must hold query\.kernel"):
        weights.from_nnx({})


# equinox -----------------------------------------------------------------------------------------


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Linear:
    """What `equinox.nn.Linear` looks like."""

    weight: np.ndarray
    bias: np.ndarray | None


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["query_proj", "key_proj", "value_proj", "output_proj", "dropout"],
    meta_fields=["num_heads"],
)
@dataclasses.dataclass
class Attention:
    """What `equinox.nn.MultiheadAttention` looks like."""

    query_proj: Linear
    key_proj: Linear
    value_proj: Linear
    output_proj: Linear
    dropout: float
    num_heads: int


def stand_in(use_bias):
    linears = [Linear(drawn(D, D), drawn(D) if use_bias else None) for _ in range(4)]
    return Attention(*linears, dropout=0.1, num_heads=N)


def equinox_formula(module, queries, memory):
    def apply(linear, x):
        return x @ np.asarray(linear.weight).T + (0.0 if linear.bias is None else linear.bias)

    inputs = ((module.query_proj, queries), (module.key_proj, memory), (module.value_proj, memory))
    return apply(module.output_proj, attend(*(apply(x, y) for x, y in inputs), N, H**-0.5))


@pytest.mark.parametrize("use_bias", [False, True])
def test_the_layer_of_equinox_has_equal_outputs_and_comes_back(use_bias):
    module = stand_in(use_bias)
    params = weights.from_equinox(module)
    want = equinox_formula(module, X, MEMORY)
    close(ours(params, X, MEMORY, use_bias=use_bias), want)
    other = stand_in(use_bias)
    back = weights.to_equinox(params, other)
    assert (back.num_heads, back.dropout) == (N, 0.1)
    close(equinox_formula(back, X, MEMORY), want)
    same(weights.from_equinox(back), params)
    assert not np.array_equal(other.key_proj.weight, module.key_proj.weight)  # It is a copy.


@pytest.mark.parametrize("use_bias", [False, True])
def test_equinox_itself_agrees(use_bias):
    equinox = pytest.importorskip("equinox")
    biases = {f"use_{x}_bias": use_bias for x in ("query", "key", "value", "output")}
    make = lambda seed: equinox.nn.MultiheadAttention(N, D, **biases, key=jax.random.key(seed))
    module, other = make(0), make(1)
    apply = lambda module: jax.vmap(module)(X, MEMORY, MEMORY)
    close(equinox_formula(module, X, MEMORY), apply(module))
    params = weights.from_equinox(module)
    close(ours(params, X, MEMORY, use_bias=use_bias), apply(module))
    close(apply(weights.to_equinox(params, other)), apply(module))


def test_misfits_with_equinox_are_named():
    with pytest.raises(TypeError, match="num_heads"):
        weights.from_equinox(3)
    module = stand_in(use_bias=True)
    params = weights.from_equinox(module)
    with pytest.raises(ValueError, match=r"key_proj\.bias.*\(15,\).*nothing"):
        weights.to_equinox({**params, "key": {"kernel": params["key"]["kernel"]}}, module)
    with pytest.raises(ValueError, match=r"key_proj\.bias.*nothing.*\(15,\)"):
        weights.to_equinox(params, stand_in(use_bias=False))
    wide = {**params, "query": {"kernel": drawn(12, N, H), "bias": drawn(N, H)}}
    with pytest.raises(ValueError, match=r"query_proj\.weight it has \(15, 15\).*\(15, 12\)"):
        weights.to_equinox(wide, module)


# The original project ----------------------------------------------------------------------------


def original_state(model):
    names = {"multihead": {"QKV": 3 * D}, "selfhead": dict.fromkeys("qkv", D)}[model]
    state = {}
    for name, rows in {**names, "out_proj": D}.items():
        state |= {f"{name}.weight": drawn(rows, D), f"{name}.bias": drawn(rows)}
    return state


def original_formula(model, state, x):
    """Its modules in NumPy: both divide the logits by the root of the width of the model."""
    apply = lambda name, x: x @ state[f"{name}.weight"].T + state[f"{name}.bias"]
    if model == "multihead":
        query, key, value = np.split(apply("QKV", x), 3, axis=-1)
    else:
        query, key, value = (apply(name, x) for name in "qkv")
    num_heads = N if model == "multihead" else 1
    return apply("out_proj", attend(query, key, value, num_heads, D**-0.5))


def original_checkpoint(model, state):
    """What its trainer saves beside the state."""
    momenta = {"step": np.array(3.0, np.float32), "exp_avg": drawn(D, D)}
    return {
        "model_state_dict": state,
        "model_type": model,
        "embed_dim": D,
        "num_heads": N if model == "multihead" else None,
        "optimizer_state_dict": {"state": {0: momenta}, "param_groups": [{"lr": 1e-3}]},
        "final_loss": 0.25,
    }


def layer_of_original(model, scale):
    attention_fn = functools.partial(dot_product_attention, scale=scale)
    if model == "multihead":
        return MultiHeadAttention(N, attention_fn=attention_fn)
    return SingleHeadAttention(attention_fn=attention_fn)


@pytest.mark.parametrize("model", ["multihead", "selfhead"])
def test_a_checkpoint_of_the_original_gives_its_outputs(model, tmp_path):
    state = original_state(model)
    (tmp_path / "x.pth").write_bytes(saved(original_checkpoint(model, state)))
    params, scale = weights.from_original(weights.load(tmp_path / "x.pth"))
    assert scale == D**-0.5
    got = layer_of_original(model, scale).apply({"params": params}, X)
    close(got, original_formula(model, state, X))
    # The state alone does not say the number of heads.
    heads = {"num_heads": N} if model == "multihead" else {}
    same(weights.from_original(state, **heads)[0], params)
    if model == "multihead":
        with pytest.raises(ValueError, match="num_heads must be given"):
            weights.from_original(state)
    else:
        # A single head has that scale by itself.
        close(SingleHeadAttention().apply({"params": params}, X), got)


@pytest.mark.parametrize("model", ["multihead", "selfhead"])
def test_torch_with_the_arithmetic_of_the_original_agrees(model, tmp_path):
    torch = pytest.importorskip("torch")
    state = {name: torch.from_numpy(x) for name, x in original_state(model).items()}
    linear = lambda name, x: torch.nn.functional.linear(
        x, state[f"{name}.weight"], state[f"{name}.bias"]
    )
    x = torch.from_numpy(X)
    heads = N if model == "multihead" else 1
    parts = linear("QKV", x).chunk(3, -1) if heads == N else [linear(y, x) for y in "qkv"]
    query, key, value = (y.view(2, T, heads, D // heads).transpose(1, 2) for y in parts)
    shares = torch.softmax(query @ key.transpose(-2, -1) / D**0.5, -1)
    want = linear("out_proj", (shares @ value).transpose(1, 2).reshape(2, T, D))
    trained = [torch.nn.Parameter(y) for y in state.values()]
    optimizer = torch.optim.Adam(trained, lr=0.0)
    sum(y.sum() for y in trained).backward()
    optimizer.step()
    checkpoint = original_checkpoint(model, state)
    checkpoint["optimizer_state_dict"] = optimizer.state_dict()
    torch.save(checkpoint, tmp_path / "x.pth")
    params, scale = weights.from_original(weights.load(tmp_path / "x.pth"))
    close(layer_of_original(model, scale).apply({"params": params}, X), want)


def test_a_checkpoint_that_contradicts_itself_is_refused():
    checkpoint = original_checkpoint("multihead", original_state("multihead"))
    with pytest.raises(ValueError, match="num_heads is 3 in the checkpoint: got 5"):
        weights.from_original(checkpoint, num_heads=5)
    with pytest.raises(ValueError, match="must be 1 for q, k and v: got 3"):
        weights.from_original(original_state("selfhead"), num_heads=3)
    checkpoint["model_state_dict"] = {"norm.weight": drawn(D), **checkpoint["model_state_dict"]}
    with pytest.raises(ValueError, match=r"unknown parameters: norm\.weight"):
        weights.from_original(checkpoint)


def test_torch_in_bfloat16_and_its_parameters_come_and_go():
    torch = pytest.importorskip("torch")
    module = torch.nn.MultiheadAttention(8, 2, batch_first=True).bfloat16()
    params = weights.from_torch(dict(module.named_parameters()), 2)
    assert {x.dtype for x in jax.tree.leaves(params)} == {jnp.dtype("bfloat16")}
    for name, array in weights.to_torch(params).items():
        back = torch.from_numpy(array).bfloat16()
        assert torch.equal(back, module.state_dict()[name])
