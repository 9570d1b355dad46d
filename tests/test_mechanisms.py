"""Every mechanism gives the numbers and gradients of its oracle, for all its options.

Every row of `CASES` is tested. The last test plants faults and checks that they are found.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from cases import (
    CASES,
    MASKS,
    assert_close,
    every_case,
    every_set_of_keys,
    inputs_of,
    over,
    qkv_of,
    random_qkv,
    value_and_pull,
)

from attention_jax import dot_product_attention, masks, sigmoid_attention

every_mask_taken = pytest.mark.parametrize(
    ("case", "mask"),
    [(case, mask) for case in CASES for mask in case.masks],
    ids=[f"{case.name}-{mask}" for case in CASES for mask in case.masks],
)
every_mask_refused = pytest.mark.parametrize(
    ("case", "mask"),
    [(case, mask) for case in CASES for mask in MASKS if mask not in case.masks],
    ids=[f"{case.name}-{mask}" for case in CASES for mask in MASKS if mask not in case.masks],
)
every_size = pytest.mark.parametrize(
    ("case", "sizes"),
    [(case, sizes) for case in CASES for sizes in case.sizes[1:]],
    ids=[f"{case.name}-{sizes.query}" for case in CASES for sizes in case.sizes[1:]],
)


@functools.cache
def program(attend, sizes, name):
    """Outputs and gradients under a mask, compiled."""
    mask, _ = MASKS[name](sizes)
    return value_and_pull(lambda inputs: attend(**inputs, mask=mask))


def check_values_and_gradients(case, name):
    """In float64: the values are the oracle's, the gradients its slopes along a direction."""
    with jax.enable_x64(True):
        inputs = inputs_of(case, dtype=np.float64)
        out, (grads,) = program(case.attend, case.small, name)(inputs)
    _, visible = MASKS[name](case.small)
    arrays = {leaf: np.asarray(x) for leaf, x in inputs.items()}
    assert_close(out, case.oracle(**arrays, mask=visible), 1e-12, "out")
    assert out.dtype == np.float64
    cotangent = np.random.default_rng(11).standard_normal(out.shape)
    for seed, (leaf, x) in enumerate(arrays.items()):
        direction = np.random.default_rng(seed).standard_normal(x.shape)

        def loss(x, leaf=leaf):
            return (case.oracle(**{**arrays, leaf: x}, mask=visible) * cotangent).sum()

        slope = oracles.central_difference(loss, x, direction)
        assert grads[leaf].dtype == np.float64
        assert_close((np.asarray(grads[leaf]) * direction).sum(), slope, 1e-8, leaf)


def check_sizes(case, sizes):
    """Grouped heads, any number of batch axes, more keys than queries and fewer."""
    inputs = inputs_of(case, sizes)
    mask, visible = MASKS[case.masks[-1]](sizes)
    out = jax.jit(lambda inputs: case.attend(**inputs, mask=mask))(inputs)
    assert_close(out, case.oracle(**inputs, mask=visible), 2e-6)


@every_mask_taken
def test_values_and_gradients_are_the_oracles(case, mask):
    check_values_and_gradients(case, mask)


@every_mask_refused
def test_a_mask_that_it_does_not_take_is_refused(case, mask):
    mask, _ = MASKS[mask](case.small)
    with pytest.raises(NotImplementedError, match=r"mask.*dot_product_attention") as refusal:
        case.attend(**inputs_of(case), mask=mask)
    assert "\n" not in str(refusal.value)


@every_size
def test_any_sizes_are_the_oracles(case, sizes):
    check_sizes(case, sizes)


@every_case
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_each_type_is_as_exact_as_it_can_be(case, dtype):
    name = case.masks[-1]
    inputs = inputs_of(case, dtype=dtype)
    out, (grads,) = program(case.attend, case.small, name)(inputs)
    # The right numbers are those of the test before, for these very inputs.
    with jax.enable_x64(True):
        exact = {leaf: jnp.asarray(x, np.float64) for leaf, x in inputs.items()}
        want, (want_grads,) = program(case.attend, case.small, name)(exact)
    half = dtype != "float32"
    eps = float(jnp.finfo(dtype).eps)
    assert out.dtype == jnp.dtype(dtype)
    assert_close(out, want, 2 * eps if half else 2e-6, "out")
    for leaf, grad in grads.items():
        assert grad.dtype == jnp.dtype(dtype)
        assert_close(grad, want_grads[leaf], 3 * eps if half else 1e-5, leaf)


# Laws, which need no numbers.


@every_case
def test_the_mixture_is_linear_in_the_values(case):
    query, key, value = qkv_of(case)
    other = qkv_of(case, seed=1)[2]
    attend = jax.jit(lambda value: case.attend(query, key, value))
    combined = attend(2 * value - 3 * other)
    assert_close(combined, 2 * attend(value) - 3 * attend(other), 1e-5)


@every_set_of_keys
def test_the_order_of_the_keys_does_not_matter(case):
    query, key, value = qkv_of(case)
    order = np.random.default_rng(0).permutation(key.shape[-3])
    attend = jax.jit(case.attend)
    assert_close(attend(query, key[:, order], value[:, order]), attend(query, key, value), 1e-5)


@every_set_of_keys
def test_the_order_of_the_queries_is_the_order_of_the_outputs(case):
    query, key, value = qkv_of(case)
    order = np.random.default_rng(0).permutation(query.shape[-3])
    attend = jax.jit(case.attend)
    assert_close(attend(query[:, order], key, value), attend(query, key, value)[:, order], 1e-5)


@every_case
def test_batch_rows_are_strangers(case):
    inputs = qkv_of(case, case.small._replace(batch=(3,)))
    attend = jax.jit(case.attend)
    alone = [attend(*(x[b] for x in inputs)) for b in range(3)]
    assert_close(attend(*inputs), np.stack(alone), 1e-6)


@every_case
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_output_has_the_dtype_of_the_query(case, dtype):
    query, key, value = qkv_of(case)
    shape = jax.eval_shape(case.attend, query.astype(dtype), key, value)
    assert shape.dtype == jnp.dtype(dtype)


@every_case
def test_query_head_n_reads_key_head_n_div_g(case):
    query, key, value = qkv_of(case)  # N = 6, K = 3
    attend = jax.jit(case.attend)
    repeated = attend(query, jnp.repeat(key, 2, axis=-2), jnp.repeat(value, 2, axis=-2))
    assert_close(attend(query, key, value), repeated, 1e-6)


@over([case for case in CASES if "causal" in case.masks])
def test_the_future_cannot_leak(case):
    inputs = inputs_of(case, case.small._replace(batch=(), T=7, S=7))
    query = inputs.pop("query")
    # What belongs to the keys; a parameter of all heads is no part of the past.
    late = {name: x for name, x in inputs.items() if x.shape[0] == 7}

    def attend(late):
        return case.attend(query, **{**inputs, **late}, mask=masks.causal()).sum(axis=(1, 2))

    for name, jacobian in jax.jit(jax.jacobian(attend))(late).items():
        influence = np.abs(jacobian).reshape(7, 7, -1).sum(axis=-1)  # [T, S]
        assert not np.triu(influence, 1).any(), name
        assert (np.diag(influence)[1:] > 0).all(), name


@every_case
@pytest.mark.parametrize("axis", ["B", "T", "S"])
def test_empty_sizes_are_legal(case, axis):
    sizes = case.small._replace(**{"B": {"batch": (0,)}, "T": {"T": 0}, "S": {"S": 0}}[axis])
    inputs = inputs_of(case, sizes)
    for name in {case.masks[0], case.masks[-1]}:
        mask, _ = MASKS[name](sizes)
        attend = lambda inputs, mask=mask: case.attend(**inputs, mask=mask)
        out, (grads,) = value_and_pull(attend)(inputs)
        assert out.shape == sizes.out
        assert not out.any()
        for leaf, grad in grads.items():
            assert grad.shape == inputs[leaf].shape
            assert not grad.any()


# That all this can fail.


def tripled(query, key, value, **settings):
    return 3 * dot_product_attention(query, key, value, **settings)


def blind_to_the_mask(query, key, value, *, mask=None):
    return dot_product_attention(query, key, value)


def heads_in_turn(query, key, value, **settings):
    repeat = lambda x: jnp.tile(x, (1, query.shape[-2] // x.shape[-2], 1))
    return dot_product_attention(query, repeat(key), repeat(value), **settings)


def keys_without_gradient(query, key, value, **settings):
    return dot_product_attention(query, jax.lax.stop_gradient(key), value, **settings)


@pytest.mark.parametrize(
    "fault", [tripled, blind_to_the_mask, heads_in_turn, keys_without_gradient]
)
def test_a_planted_fault_is_found(fault):
    case = CASES[0]._replace(name=fault.__name__, attend=fault)
    with pytest.raises(AssertionError, match="off by"):
        check_values_and_gradients(case, "causal")


def test_sigmoid_attention_does_not_count_what_is_hidden():
    query, key, value = random_qkv()
    longer = [jnp.pad(x, [(0, 0), (0, 9), (0, 0), (0, 0)]) for x in (key, value)]
    seen = masks.key_lengths(np.array([key.shape[1]] * 2))
    found = sigmoid_attention(query, *longer, mask=seen)
    assert_close(found, sigmoid_attention(query, key, value), 1e-6)
