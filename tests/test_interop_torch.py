"""`interop.torch.scaled_dot_product_attention` is torch's, against loops and against torch."""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from cases import assert_close

from attention_jax.functional.dropout import keep_mask
from attention_jax.interop.torch import scaled_dot_product_attention

T, S, N, K, H, V = 5, 7, 4, 2, 8, 6
# The axes before T, of query, key, value; and whether heads are grouped.
LAYOUTS = [
    ((2, N), (2, N), (2, N), False),
    ((N,), (N,), (N,), False),
    ((), (), (), False),
    ((2, 1, N), (2, 3, N), (1, 3, N), False),
    ((2, N), (2, 1), (2, 1), False),
    ((2, 1), (2, N), (1, N), False),
    ((2, N), (2, K), (2, K), True),
    ((1, N), (2, K), (2, 1), True),
]


def random_call(seed, few=False):
    """Arrays and settings; `few` layouts, because every shape is compiled anew."""
    rng = np.random.default_rng(seed)
    layouts = [LAYOUTS[i] for i in (3, 6)] if few else LAYOUTS
    *leads, grouped = layouts[rng.integers(len(layouts))]
    sizes = ((T, H), (S, H), (S, V))
    arrays = [
        rng.standard_normal((*lead, *size), np.float32)
        for lead, size in zip(leads, sizes, strict=True)
    ]
    heads = leads[0][-1:] if grouped else np.broadcast_shapes(*(lead[-1:] for lead in leads))
    lead = (*np.broadcast_shapes(*(lead[:-1] for lead in leads)), *heads)
    kind = ["none", "causal", "bool", "float", "infinite"][rng.integers(5)]
    shapes = (T, S), (*lead, 1, S), (*lead, T, S), (*(1 for _ in lead), T, 1)
    shape = shapes[rng.integers(2 if few else 4)]
    mask = None
    if kind == "bool":
        mask = rng.random(shape) < 0.6
    elif kind in ("float", "infinite"):
        mask = rng.standard_normal(shape, np.float32)
        if kind == "infinite":
            mask = np.where(rng.random(shape) < 0.3, np.float32(-np.inf), mask)
    settings = {
        "is_causal": kind == "causal",
        "scale": [None, 0.3][rng.integers(2)],
        "enable_gqa": grouped,
    }
    d_out = rng.standard_normal((*lead, T, V), np.float32)
    return arrays, mask, settings, d_out


def summed(x, shape):
    """A gradient, summed over the axes along which its array was broadcast."""
    x = x.sum(tuple(range(x.ndim - len(shape))))
    return x.sum(tuple(i for i, n in enumerate(shape) if n == 1), keepdims=True).reshape(shape)


def by_loops(arrays, mask, settings, d_out):
    """The output and the gradients of the arrays, and of a mask of numbers."""
    *lead, _, _ = d_out.shape

    def ours(x):
        """[..., N, T, H] -> [..., T, N, H]"""
        if settings["enable_gqa"]:
            x = np.repeat(x, lead[-1] // x.shape[-3], axis=-3)
        x = np.broadcast_to(x, (*(lead or [1]), *x.shape[-2:]))
        return np.swapaxes(x, -2, -3)

    seen = {}
    if settings["is_causal"]:
        seen["mask"] = oracles.causal(T, S)
    elif mask is not None:
        seen["mask" if mask.dtype == bool else "bias"] = mask
    seen["scale"] = settings["scale"]
    inputs = [ours(x) for x in arrays]
    d_out = np.swapaxes(np.broadcast_to(d_out, (*(lead or [1]), T, V)), -2, -3)
    out, _ = oracles.dot_product(*inputs, **seen)
    grads = oracles.dot_product_gradients(*inputs, d_out, **seen)
    found = []
    for name, x in zip(("query", "key", "value"), arrays, strict=True):
        grad = np.swapaxes(grads[name], -2, -3)
        if settings["enable_gqa"]:
            heads = x.shape[-3]
            grad = grad.reshape(*grad.shape[:-3], heads, -1, *grad.shape[-2:]).sum(-3)
        found.append(summed(grad, x.shape))
    if "bias" in seen:
        found.append(summed(grads["bias"], mask.shape))
    return np.swapaxes(out, -2, -3).reshape(*lead, T, V), found


def by_ours(arrays, mask, settings, d_out):
    learnt = mask is not None and mask.dtype != bool

    def loss(inputs):
        *qkv, given = inputs if learnt else (*inputs, mask)
        out = scaled_dot_product_attention(*qkv, given, **settings)
        return (out * d_out).sum(), out

    inputs = [jnp.asarray(x) for x in ((*arrays, mask) if learnt else arrays)]
    grads, out = jax.grad(loss, has_aux=True)(inputs)
    return out, grads


def assert_same(got, want):
    (out, grads), (want_out, want_grads) = got, want
    assert out.shape == want_out.shape
    assert_close(out, want_out, 2e-6)
    for ours, theirs in zip(grads, want_grads, strict=True):
        assert ours.shape == theirs.shape
        assert_close(ours, theirs, 1e-5)


def test_random_calls_are_those_of_the_loops():
    """Values and gradients."""
    for seed in range(12):
        call = random_call(seed, few=True)
        assert_same(by_ours(*call), by_loops(*call))


@pytest.mark.slow
def test_many_random_calls_are_those_of_the_loops():
    for seed in range(12, 200):
        call = random_call(seed)
        assert_same(by_ours(*call), by_loops(*call))


@pytest.mark.slow
def test_many_random_calls_are_those_of_torch():
    torch = pytest.importorskip("torch")
    for seed in range(200):
        arrays, mask, settings, d_out = random_call(seed)
        inputs = [torch.tensor(x, requires_grad=True) for x in arrays]
        given = None
        if mask is not None:
            given = torch.tensor(mask, requires_grad=mask.dtype != bool)
        out = torch.nn.functional.scaled_dot_product_attention(*inputs, given, **settings)
        (out * torch.tensor(d_out)).sum().backward()
        learnt = inputs + ([given] if given is not None and given.requires_grad else [])
        want = out.detach().numpy(), [x.grad.numpy() for x in learnt]
        assert_same(by_ours(arrays, mask, settings, d_out), want)


def test_the_signature_is_that_of_torch_and_an_rng():
    parameters = inspect.signature(scaled_dot_product_attention).parameters.values()
    told = {p.name: p.default for p in parameters}
    assert told.pop("rng") is None
    assert list(told) == [
        *("query", "key", "value", "attn_mask", "dropout_p", "is_causal", "scale", "enable_gqa")
    ]
    assert list(told.values())[3:] == [None, 0.0, False, None, False]
    keyword_only = [p.name for p in parameters if p.kind is p.KEYWORD_ONLY]
    assert keyword_only == ["scale", "enable_gqa", "rng"]


def test_a_row_that_sees_nothing_is_zero_and_passes_zero_back():
    x = np.random.default_rng(0).standard_normal((2, N, T, H), np.float32)
    mask = np.ones((T, T), bool)
    mask[1] = False

    def loss(query):
        out = scaled_dot_product_attention(query, x, x, mask)
        return (out**2).sum(), out

    grad, out = jax.grad(loss, has_aux=True)(jnp.asarray(x))
    assert not out[:, :, 1].any()
    assert not grad[:, :, 1].any()
    assert jnp.isfinite(grad).all()


def test_dropout_is_ours_and_needs_a_key():
    x = np.random.default_rng(0).standard_normal((2, N, T, H), np.float32)
    rng = jax.random.key(0)
    out = scaled_dot_product_attention(x, x, x, None, 0.5, rng=rng)
    keep = keep_mask(rng, 0.5, (2,), N, T, T)
    want, _ = oracles.dot_product(*[x.swapaxes(1, 2)] * 3, keep=keep, rate=0.5)
    assert_close(out, want.swapaxes(1, 2), 2e-6)
    with pytest.raises(ValueError, match=r"dropout_p=0\.5 needs rng="):
        scaled_dot_product_attention(x, x, x, dropout_p=0.5)


X = np.ones((2, N, T, H), np.float32)
REFUSED = [
    ({"query": X[0, 0, 0]}, ValueError, r"query must be .*\(8,\)"),
    ({"query": X.astype(int)}, TypeError, "query must be .*int"),
    ({"key": X[:, :, :, :4]}, ValueError, "head size"),
    ({"key": X[:, :3]}, ValueError, r"must broadcast with one another \(or set enable_gqa=True"),
    ({"query": X[0, 0], "enable_gqa": True}, ValueError, "enable_gqa=True needs an axis of heads"),
    ({"key": X[:, :3], "enable_gqa": True}, ValueError, "enable_gqa=True needs a number"),
    ({"attn_mask": np.ones(T, bool)}, ValueError, r"attn_mask must have .*\(5,\)"),
    ({"attn_mask": np.ones((3, T, T), bool)}, ValueError, r"attn_mask must broadcast.*\(3, 5, 5\)"),
    ({"attn_mask": np.ones((T, T), int)}, TypeError, "attn_mask must be boolean or floating"),
    ({"attn_mask": np.ones((T, T), bool), "is_causal": True}, ValueError, "is_causal.*attn_mask"),
    ({"dropout_p": 1.0, "rng": jax.random.key(0)}, ValueError, "dropout_p must lie"),
    ({"dropout_p": "0.5"}, TypeError, "dropout_p"),
    ({"is_causal": 1}, TypeError, "is_causal must be True or False"),
    ({"enable_gqa": "no"}, TypeError, "enable_gqa must be True or False"),
    ({"scale": "big"}, TypeError, "scale"),
    ({"rng": 3, "dropout_p": 0.5}, TypeError, "rng"),
]


@pytest.mark.parametrize(("changes", "error", "words"), REFUSED)
def test_what_cannot_be_honoured_is_one_line(changes, error, words):
    with pytest.raises(error, match=words) as refusal:
        scaled_dot_product_attention(**{"query": X, "key": X, "value": X, **changes})
    assert "\n" not in str(refusal.value)


def test_an_array_of_another_library_is_refused_with_what_to_write():
    class Tensor:  # As torch's: its type is none of NumPy's.
        dtype, shape, ndim = "torch.float32", (1, 2, 3, 4), 4

        def __array__(self):
            return np.ones(self.shape)

    with pytest.raises(TypeError, match=r"query must be an array of jax or NumPy, got .*Tensor"):
        scaled_dot_product_attention(Tensor(), Tensor(), Tensor())


def test_a_tensor_of_torch_is_refused_with_what_to_write():
    torch = pytest.importorskip("torch")
    x = torch.ones(1, 2, 3, 4)
    with pytest.raises(TypeError, match=r"got torch\.Tensor: write jnp\.asarray"):
        scaled_dot_product_attention(x, x, x)
