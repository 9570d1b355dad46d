"""Imitation: a frozen attention layer makes the targets."""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np

from attention_jax.checks import as_size, jax_defaults
from attention_jax.tasks.task import Task, per_row
from attention_jax.types import Array, Batch

# Standard deviation of the teacher's logits over keys: its heads prefer some keys, seldom only one.
LOGIT_SCALE = 2.0


def teacher(
    *,
    seq_length: int = 10,
    features: int = 64,
    num_heads: int = 8,
    seed: int = 0,
    layer: Mapping[str, Array] | None = None,
) -> Task:
    """Predicts the output of another attention layer without seeing its weights.

    Inputs are independent standard normal vectors. Targets are the outputs of multi-head attention
    with weights drawn from `seed`. So a student of the same architecture can reach zero loss, but
    only if it attends as the teacher does.

    The teacher has half as many heads as its student, and logits of standard deviation 2. A student
    with only as many heads as its teacher trains badly here. Two of its heads imitate the same
    teacher's head, another teacher's head has no imitator, and the loss stays on that plateau for
    thousands of steps.

    Args:
        seq_length: T.
        features: D, the width of inputs and targets.
        num_heads: N of the student, a divisor of D. The teacher has N // 2 heads (one for N = 1) of
            the student's size H = D / N.
        seed: Chooses the teacher.
        layer: The teacher's weights, as from `draw_weights`; may be traced. Defaults to those of
            `seed`.

    Returns:
        A continuous task with targets `[B, T, D]`. Baseline: predicting the mean target.

    Raises:
        ValueError: A setting is out of range, or the heads do not divide the features.
    """
    seq_length = as_size("seq_length", seq_length)
    features = as_size("features", features)
    num_heads = as_size("num_heads", num_heads)
    if features % num_heads:
        raise ValueError(f"num_heads must divide features: got {num_heads=}, {features=}.")
    if layer is None:
        layer = draw_weights(seed, features, num_heads)

    def draw(rng: Array) -> Array:
        return jax.random.normal(rng, (seq_length, features), jnp.float32)

    draw_rows = per_row(draw)

    def sample(rng: Array, rows: Array) -> Batch:
        inputs = draw_rows(rng, rows)
        # All rows in one product: products of single rows are too small to be fast.
        return Batch(
            inputs, attention_layer(inputs, **layer), jnp.ones(inputs.shape[:2], jnp.float32)
        )

    return Task(
        name="teacher",
        sample=sample,
        loss="squared_error",
        inputs=features,
        vocab_size=None,
        baseline=("predicting the mean", loss_of_mean),
    )


def draw_weights(seed: int, features: int, num_heads: int) -> dict[str, np.ndarray]:
    """Draws the frozen layer: `query`, `key`, `value` `[D, N, H]` and `out` `[N, H, D]`, float32.

    NumPy's legacy generator has the same stream in all versions, so a run resumed years later still
    has its teacher.
    """
    head_dim = features // num_heads
    num_heads = max(1, num_heads // 2)
    draw = np.random.RandomState(seed).standard_normal
    # Inputs have variance 1; query and key coordinates of variance c make logits of variance c^2.
    scales = {"query": LOGIT_SCALE**0.5, "key": LOGIT_SCALE**0.5, "value": 1.0}
    shape = (features, num_heads, head_dim)
    weights = {name: scale * features**-0.5 * draw(shape) for name, scale in scales.items()}
    weights["out"] = (num_heads * head_dim) ** -0.5 * draw((num_heads, head_dim, features))
    return {name: weight.astype(np.float32) for name, weight in weights.items()}


def attention_layer(inputs: Array, query: Array, key: Array, value: Array, out: Array) -> Array:
    """Multi-head self-attention on `[B, T, D]`, written here because tasks import no layers."""
    D, N, H = query.shape
    split = lambda w: (inputs @ w.reshape(D, N * H)).reshape(*inputs.shape[:2], N, H)
    query, key, value = (split(w).swapaxes(1, 2) for w in (query, key, value))  # [B, N, T, H]
    weights = jax.nn.softmax(query * H**-0.5 @ key.swapaxes(2, 3))
    mixed = (weights @ value).swapaxes(1, 2)  # [B, T, N, H]
    return mixed.reshape(*inputs.shape[:2], N * H) @ out.reshape(N * H, D)


@jax_defaults()
def loss_of_mean(batch: Batch) -> Array:
    """Mean squared error of the best constant vector on this batch."""
    weights = batch.weights[..., None] / batch.weights.sum()
    mean = (weights * batch.targets).sum((0, 1))
    return (weights * (batch.targets - mean) ** 2).sum((0, 1)).mean()
