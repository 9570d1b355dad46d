"""The mechanisms and their implementations in one table, and their test inputs.

A promise is written once, as a test over `CASES` (or over the part that makes the promise), and
holds for every row. A new mechanism or implementation is one more row.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest

from attention_jax import (
    biases,
    differential_attention,
    dot_product_attention,
    gated_delta_attention,
    linear_attention,
    masks,
    sigmoid_attention,
)


class Sizes(NamedTuple):
    """Distinct where they can be, so that no axis passes for another."""

    batch: tuple[int, ...] = (2,)
    T: int = 5
    S: int = 7
    N: int = 6
    K: int = 3
    H: int = 11
    V: int = 13

    @property
    def query(self):
        return (*self.batch, self.T, self.N, self.H)

    @property
    def key(self):
        return (*self.batch, self.S, self.K, self.H)

    @property
    def value(self):
        return (*self.batch, self.S, self.K, self.V)

    @property
    def out(self):
        return (*self.batch, self.T, self.N, self.V)

    @property
    def logits(self):
        return (*self.batch, self.N, self.T, self.S)


SMALL = Sizes()
SIZES = (
    SMALL,
    Sizes(batch=(), T=7, S=5, N=3, K=1),
    Sizes(batch=(2, 2), T=4, S=4, N=2, K=2),
)


def random_mask(*shape, seed=3):
    """About half of it True; the first query of the first head sees nothing."""
    mask = np.random.default_rng(seed).random(shape) < 0.6
    if mask.size:
        mask.reshape(-1, *shape[-2:])[0, 0] = False
    return mask


def lengths_of(sizes):
    """A number of keys for each batch row, from 0 to S."""
    rows = np.arange(np.prod(sizes.batch, dtype=int)).reshape(sizes.batch)
    return rows * 3 % (sizes.S + 1)


# Each as the package says it and as the oracle does, for inputs of some sizes.
MASKS = {
    "none": lambda s: (None, None),
    "causal": lambda s: (masks.causal(), oracles.causal(s.T, s.S)),
    "causal, later": lambda s: (masks.causal(1), oracles.causal(s.T, s.S, 1)),
    "window": lambda s: (masks.window(2, 1), oracles.window(s.T, s.S, 2, 1)),
    "not causal": lambda s: (~masks.causal(), ~oracles.causal(s.T, s.S)),
    "causal and lengths": lambda s: (
        masks.causal() & masks.key_lengths(lengths_of(s)),
        oracles.causal(s.T, s.S) & oracles.key_lengths(s.T, s.S, lengths_of(s)),
    ),
    "array": lambda s: (random_mask(*s.logits), random_mask(*s.logits)),
}


class Case(NamedTuple):
    """One way to compute one mechanism, and what it takes.

    Attributes:
        mechanism: Its word in `training.words`.
        name: How the tests call it.
        attend: `(query, key, value, *, mask, **arrays) -> [..., T, N, V]`.
        oracle: The same in float64, one query at a time.
        masks: Those of `MASKS` that it takes. It refuses the others.
        sizes: Some that it takes; the first are the sizes of most tests.
        arrays: Further inputs with gradients, by name: `sizes -> shape`, and the range of their
            numbers.
        key_scale: The length of the keys in these tests, against those of standard normal numbers.
        dot_product: Whether it owes the whole contract of scaled dot-product attention.
        set_of_keys: Whether it takes keys as a set, without an order of its own.
    """

    mechanism: str
    name: str
    attend: Callable
    oracle: Callable
    masks: tuple[str, ...] = tuple(MASKS)
    sizes: tuple[Sizes, ...] = SIZES
    arrays: dict[str, tuple[Callable, float, float]] = {}  # noqa: RUF012  (a constant)
    key_scale: float = 1.0
    dot_product: bool = False
    set_of_keys: bool = True

    @property
    def small(self) -> Sizes:
        return self.sizes[0]


def _dot_product(*inputs, **settings):
    return oracles.dot_product(*inputs, **settings)[0]


CASES = [
    Case(
        "dot_product",
        "dense",
        functools.partial(dot_product_attention, implementation="dense"),
        _dot_product,
        dot_product=True,
    ),
    Case(
        "dot_product",
        "blockwise",
        functools.partial(dot_product_attention, implementation="blockwise", block_size=(2, 3)),
        _dot_product,
        dot_product=True,
    ),
    Case(
        "linear",
        "linear",
        functools.partial(linear_attention, chunk_size=3),
        oracles.linear,
        masks=("none", "causal"),
    ),
    Case(
        "sigmoid",
        "sigmoid",
        sigmoid_attention,
        oracles.sigmoid,
        arrays={"offset": (lambda sizes: (sizes.N,), -1.0, 1.0)},
    ),
    Case(
        "differential",
        "differential",
        differential_attention,
        oracles.differential,
        sizes=tuple(sizes._replace(H=10) for sizes in SIZES),
        arrays={"lambda_full": (lambda sizes: (sizes.N,), -0.5, 0.9)},
    ),
    Case(
        "gated_delta",
        "gated_delta",
        functools.partial(gated_delta_attention, chunk_size=3),
        oracles.gated_delta,
        masks=("causal",),
        arrays={
            "log_decay": (lambda sizes: sizes.key[:-1], -2.0, 0.0),
            "beta": (lambda sizes: sizes.key[:-1], 0.0, 1.0),
        },
        key_scale=0.3,  # Longer than 1 they would let the memory grow without bound.
        set_of_keys=False,
    ),
]
DOT_PRODUCT = [case for case in CASES if case.dot_product]
LINEAR = [case for case in CASES if case.mechanism == "linear"]
SETS = [case for case in CASES if case.set_of_keys]


def over(cases):
    return pytest.mark.parametrize("case", cases, ids=[case.name for case in cases])


every_case, every_set_of_keys = over(CASES), over(SETS)
every_dot_product, every_linear = over(DOT_PRODUCT), over(LINEAR)


def random_qkv(sizes=SMALL, dtype=np.float32, seed=0):
    rng = np.random.default_rng(seed)
    return tuple(
        jnp.asarray(rng.standard_normal(shape), dtype)
        for shape in (sizes.query, sizes.key, sizes.value)
    )


def qkv_of(case, sizes=None, dtype=np.float32, seed=0):
    """Queries, keys and values that suit a case."""
    query, key, value = random_qkv(case.small if sizes is None else sizes, dtype, seed)
    return query, case.key_scale * key, value


def inputs_of(case, sizes=None, dtype=np.float32, seed=0):
    """All arrays that a case takes, by name."""
    sizes, rng = case.small if sizes is None else sizes, np.random.default_rng(seed + 1)
    inputs = dict(zip(("query", "key", "value"), qkv_of(case, sizes, dtype, seed), strict=True))
    for name, (shape, low, high) in case.arrays.items():
        inputs[name] = jnp.asarray(rng.uniform(low, high, shape(sizes)), dtype)
    return inputs


def value_and_pull(attend, seed=11):
    """`attend`, compiled to also give the gradients of a random projection of its output."""

    @jax.jit
    def run(*arrays):
        out, pull_back = jax.vjp(attend, *arrays)
        cotangent = np.random.default_rng(seed).standard_normal(out.shape)
        return out, pull_back(jnp.asarray(cotangent, out.dtype))

    return run


class Scenario(NamedTuple):
    """One combination of settings, said to the package and to the oracle.

    Attributes:
        sizes: The shapes.
        settings: `(arrays, rng) -> keyword arguments of the package`; `arrays` may be traced.
        oracle: `arrays -> keyword arguments of the oracle`.
        arrays: Shapes of the further inputs that have gradients (a bias, slopes, sinks).
        magnitude: Standard deviation of query and key.
    """

    sizes: Sizes
    settings: Callable
    oracle: Callable
    arrays: dict
    magnitude: float = 1.0


def scenario(sizes=SMALL, settings=None, oracle=None, magnitude=1.0, **arrays):
    settings = settings or (lambda a: a)
    return Scenario(sizes, settings, oracle or settings, arrays, magnitude)


N, T, S = SMALL.N, SMALL.T, SMALL.S
LENGTHS = np.array([3, 0])
IDS_T, IDS_S = np.array([[0, 0, 1, 1, 2], [4, 3, 3, 0, 0]]), np.array([[0, 1, 1, 2, 2, 2, 9]] * 2)
RELATIVE = {"bidirectional": True, "num_buckets": 8, "max_distance": 6}
MASK = random_mask(2, N, T, S)
HOLES = np.where(random_mask(2, N, T, S, seed=4), 0.0, -np.inf)


def both(package, oracle):
    return {
        "settings": lambda a: {**{k: x for k, x in a.items() if k == "sinks"}, **package(a)},
        "oracle": lambda a: {**{k: x for k, x in a.items() if k == "sinks"}, **oracle(a)},
    }


def masked(mask, array):
    return both(lambda a: {"mask": mask()}, lambda a: {"mask": array})


SCENARIOS = {
    "plain": scenario(),
    "no batch axis": scenario(Sizes(batch=())),
    "two batch axes": scenario(Sizes(batch=(2, 3), T=3, S=2)),
    "one key head": scenario(Sizes(N=3, K=1)),
    "as many key heads": scenario(Sizes(N=3, K=3)),
    "scale": scenario(settings=lambda a: {"scale": 0.7}),
    "softcap": scenario(settings=lambda a: {"softcap": 1.5}, magnitude=2.0),
    "sinks": scenario(sinks=(N,)),
    "bias": scenario(bias=(2, N, T, S)),
    "bias over heads": scenario(bias=(N, 1, S)),
    "bias over batch and queries": scenario(bias=(2, 1, T, 1)),
    "mask over heads": scenario(**masked(lambda: MASK[:, :1], MASK[:, :1])),
    "causal": scenario(**masked(masks.causal, oracles.causal(T, S))),
    "causal, end": scenario(
        Sizes(T=7, S=5), **masked(lambda: masks.causal("end"), oracles.causal(7, 5, "end"))
    ),
    "segments": scenario(
        **masked(lambda: masks.segments(IDS_T, IDS_S), oracles.segments(IDS_T, IDS_S))
    ),
    "lengths": scenario(
        **masked(
            lambda: masks.causal(1) & masks.key_lengths(LENGTHS),
            oracles.causal(T, S, 1) & oracles.key_lengths(T, S, LENGTHS),
        )
    ),
    "alibi": scenario(
        slopes=(N,),
        **both(
            lambda a: {"bias": biases.alibi(a["slopes"])},
            lambda a: {"bias": oracles.alibi(a["slopes"], T, S)},
        ),
    ),
    "relative": scenario(
        table=(8, N),
        **both(
            lambda a: {"bias": biases.relative(a["table"], **RELATIVE)},
            lambda a: {"bias": oracles.relative(a["table"], T, S, **RELATIVE)},
        ),
    ),
    "holes in the bias": scenario(
        bias=(2, N, T, S),
        settings=lambda a: {"bias": a["bias"] + HOLES.astype(a["bias"].dtype)},
    ),
    "sinks alone": scenario(
        sinks=(N,),
        **both(
            lambda a: {"mask": masks.key_lengths(LENGTHS)},
            lambda a: {"mask": oracles.key_lengths(T, S, LENGTHS)},
        ),
    ),
    "sinks alone, by the bias": scenario(
        bias=(2, N, T, S),
        sinks=(N,),
        settings=lambda a: a | {"bias": a["bias"] + HOLES.astype(a["bias"].dtype)},
    ),
    "sinks without keys": scenario(Sizes(S=0), sinks=(N,)),
    "everything": scenario(
        bias=(N, T, S),
        sinks=(N,),
        magnitude=2.0,
        **both(
            lambda a: {
                "bias": a["bias"],
                "mask": masks.causal(2) & MASK,
                "scale": 0.5,
                "softcap": 2.0,
            },
            lambda a: {
                "bias": a["bias"],
                "mask": oracles.causal(T, S, 2) & MASK,
                "scale": 0.5,
                "softcap": 2.0,
            },
        ),
    ),
    "long": scenario(Sizes(batch=(), T=3, S=1021, N=2, K=1)),
}
EXTRA = ("bias", "slopes", "table", "sinks")


@functools.cache
def problem(name, dtype):
    """`(inputs, d_out, d_lse)`: the inputs rounded to the tested type, as numpy arrays."""
    sizes, _, _, arrays, magnitude = SCENARIOS[name]
    rng = np.random.default_rng(7)
    dtype = jnp.dtype(dtype)
    inputs = {
        "query": magnitude * rng.standard_normal(sizes.query),
        "key": magnitude * rng.standard_normal(sizes.key),
        "value": rng.standard_normal(sizes.value),
        **{k: rng.standard_normal(shape) for k, shape in arrays.items()},
    }
    inputs = {k: x.astype(dtype) for k, x in inputs.items()}
    d_out = rng.standard_normal(sizes.out).astype(dtype)
    d_lse = rng.standard_normal(sizes.out[:-1])
    return inputs, d_out, d_lse


@functools.cache
def expected(name, dtype, through_residual=True):
    """Outputs, logsumexp and gradients in float64, for the inputs of `problem`."""
    inputs, d_out, d_lse = problem(name, dtype)
    d_lse = d_lse * through_residual
    sizes = SCENARIOS[name].sizes
    inputs = {k: oracles.f64(x) for k, x in inputs.items()}
    qkv = [inputs[k] for k in ("query", "key", "value")]
    settings = SCENARIOS[name].oracle({k: inputs[k] for k in EXTRA if k in inputs})
    out, lse = oracles.dot_product(*qkv, **settings)
    # A row that sees nothing has no logsumexp to differentiate.
    d_lse = np.where(np.isfinite(lse), d_lse, 0)
    grads = oracles.dot_product_gradients(*qkv, oracles.f64(d_out), d_lse, **settings)
    d_bias, d_sinks = grads.pop("bias"), grads.pop("sinks")
    if "bias" in inputs:
        grads["bias"] = sum_to(d_bias, inputs["bias"].shape)
    if "sinks" in inputs:
        grads["sinks"] = sum_to(d_sinks, (sizes.N,))
    d_bias = sum_to(d_bias, (sizes.N, sizes.T, sizes.S))
    if "slopes" in inputs:
        per_slope = oracles.alibi(np.ones(sizes.N), sizes.T, sizes.S)
        grads["slopes"] = (d_bias * per_slope).sum(axis=(1, 2))
    if "table" in inputs:
        grads["table"] = np.zeros(inputs["table"].shape)
        for n, t, s in np.ndindex(*d_bias.shape):
            grads["table"][oracles.relative_bucket(t, s, **RELATIVE), n] += d_bias[n, t, s]
    return out, lse, grads


def sum_to(x, shape):
    """The gradient of a broadcast: the sum over the axes that it made."""
    x = x.sum(axis=tuple(range(x.ndim - len(shape))))
    return x.sum(axis=tuple(i for i, n in enumerate(shape) if n == 1), keepdims=True)


def compute(case, name, dtype, through_residual=True):
    """Outputs, logsumexp and gradients of the package, for the inputs of `problem`."""
    inputs, d_out, d_lse = problem(name, dtype)
    d_lse = d_lse * through_residual
    settings = SCENARIOS[name].settings
    empty = ~np.isfinite(expected(name, dtype)[1])

    @jax.jit
    def run(inputs, d_out, d_lse):
        def attend(inputs):
            extra = settings({k: inputs[k] for k in EXTRA if k in inputs})
            qkv = [inputs[k] for k in ("query", "key", "value")]
            return case.attend(*qkv, return_residual=True, **extra)

        (out, lse), pull_back = jax.vjp(attend, inputs)
        (grads,) = pull_back((d_out, jnp.where(empty, 0, d_lse).astype(lse.dtype)))
        return out, lse, grads

    return run(inputs, d_out, d_lse)


def assert_close(got, want, relative, what=""):
    """Largest difference within `relative * max(1, max|want|)`; infinities must be the same."""
    got, want = oracles.f64(got), oracles.f64(want)
    assert got.shape == want.shape, f"{what}: shape {got.shape}, expected {want.shape}"
    finite = np.isfinite(want)
    np.testing.assert_array_equal(got[~finite], want[~finite], err_msg=what)
    assert np.isfinite(got[finite]).all(), f"{what}: not finite"
    bound = relative * max(1.0, np.abs(want[finite]).max(initial=0.0))
    error = np.abs(got[finite] - want[finite]).max(initial=0.0)
    assert error <= bound, f"{what}: off by {error:.2e}, allowed {bound:.2e}"
