"""Imitation: a frozen attention layer makes the targets."""

import jax
import jax.numpy as jnp
import numpy as np

from attention_jax.checks import as_size
from attention_jax.tasks.task import Task, make_sample
from attention_jax.types import Array, Batch

# Standard deviation of the teacher's logits over keys: its heads choose, but seldom one key alone.
LOGIT_SCALE = 2.0


def teacher(*, seq_length: int = 10, features: int = 64, num_heads: int = 8, seed: int = 0) -> Task:
    """Predicts the output of another attention layer, whose weights are never seen.

    Inputs are independent standard normal vectors. Targets are what multi-head attention with
    weights drawn from `seed` makes of them, so a student of the same architecture can get to zero
    loss, and only by attending as the teacher does.

    The teacher's heads have character: coordinate h = 1, 2, ... of every query and key is scaled by
    h ** -2, so that a head asks mostly one question, and logits have standard deviation 2. With
    plain normal weights all heads ask about everything at once; a student can then hardly tell them
    apart and sits on a plateau, at half the loss of predicting the mean, for all of a default run.

    Args:
        seq_length: T.
        features: D, the width of inputs and targets.
        num_heads: N, a divisor of D.
        seed: Chooses the teacher.

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
    layer = draw_weights(seed, features, num_heads)

    def make_row(rng: Array) -> Batch:
        inputs = jax.random.normal(rng, (seq_length, features), jnp.float32)
        targets = attention_layer(inputs, **layer)
        return Batch(inputs, targets, weights=jnp.ones(seq_length, jnp.float32))

    return Task(
        name="teacher",
        sample=make_sample(make_row),
        loss="squared_error",
        inputs=features,
        vocab_size=None,
        baseline=("predicting the mean", loss_of_mean),
    )


def draw_weights(seed: int, features: int, num_heads: int) -> dict[str, np.ndarray]:
    """Draws the frozen layer: `query`, `key`, `value` `[D, N, H]` and `out` `[N, H, D]`, float32.

    By NumPy's legacy generator, whose stream is frozen for all versions: a run resumed years later
    still has its teacher.
    """
    head_dim = features // num_heads
    draw = np.random.RandomState(seed).standard_normal
    spectrum = np.arange(1, head_dim + 1.0) ** -2
    # Query and key coordinates of variance s^2 make logits of variance mean(s^4).
    spectrum *= np.sqrt(LOGIT_SCALE / np.sqrt(np.mean(spectrum**4)))
    scales = {"query": spectrum, "key": spectrum, "value": 1.0}
    shape = (features, num_heads, head_dim)
    weights = {name: features**-0.5 * draw(shape) * scale for name, scale in scales.items()}
    weights["out"] = features**-0.5 * draw((num_heads, head_dim, features))
    return {name: weight.astype(np.float32) for name, weight in weights.items()}


def attention_layer(inputs: Array, query: Array, key: Array, value: Array, out: Array) -> Array:
    """Multi-head self-attention on `[T, D]`, of its own: a task knows no model."""
    query, key, value = (jnp.einsum("TD,DNH->NTH", inputs, w) for w in (query, key, value))
    logits = jnp.einsum("NTH,NSH->NTS", query, key) * query.shape[-1] ** -0.5
    mixed = jnp.einsum("NTS,NSH->TNH", jax.nn.softmax(logits), value)
    return jnp.einsum("TNH,NHD->TD", mixed, out)


def loss_of_mean(batch: Batch) -> Array:
    """Mean squared error of the best constant vector on this batch."""
    weights = batch.weights[..., None] / batch.weights.sum()
    mean = (weights * batch.targets).sum((0, 1))
    return (weights * (batch.targets - mean) ** 2).sum((0, 1)).mean()
