"""Tokens from a model with a cache."""

import functools

import jax
import jax.numpy as jnp
from jax import lax

from attention_jax.checks import as_integers, as_rng, as_size, check_number, jax_defaults, known
from attention_jax.models import SequenceModel, decoding
from attention_jax.types import Array, PyTree


def generate(
    model: SequenceModel,
    params: PyTree,
    tokens: Array,
    num_tokens: int,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    rng: Array | None = None,
) -> Array:
    """Continues sequences of tokens.

    The whole prompt is one program, all further tokens are another. The same model, lengths and
    settings compile once. Blocks with a window keep no more tokens than that.

    Args:
        model: A causal model of tokens.
        params: Its parameters.
        tokens: The prompts, integers `[..., T]` with T at least 1.
        num_tokens: How many tokens to add.
        temperature: Divides the logits; 0 takes the most likely token, and needs no `rng`.
        top_k: Draws from the k most likely tokens only.
        top_p: Draws from the most likely tokens whose probabilities reach this sum.
        rng: The key of the draws. The draw of a row depends on the key, its place in the batch and
            its place in the sequence.

    Returns:
        `[..., num_tokens]` int32.

    Raises:
        ValueError: A value is out of its range, or the model has too few positions.
        TypeError: An argument has the wrong type.
        NotImplementedError: A layer of the model has no cache.

    Reference:
        Holtzman et al. 2020, "The Curious Case of Neural Text Degeneration", section 3.1 (top-p).
        https://arxiv.org/abs/1904.09751
    """
    if not isinstance(model, SequenceModel):
        raise TypeError(f"model must be a SequenceModel, got {type(model).__name__}.")
    tokens = as_integers("tokens", tokens, axes=1).astype(jnp.int32)
    if tokens.shape[-1] == 0:
        raise ValueError(f"tokens must be [..., T] with T at least 1, got shape {tokens.shape}.")
    num_tokens = as_size("num_tokens", num_tokens, minimum=0)
    check_number("temperature", temperature)
    if known(temperature) is None:
        raise TypeError("temperature must be known before the program runs, got a traced number.")
    if not 0 <= known(temperature) < float("inf"):
        raise ValueError(f"temperature must be at least 0 and finite, got {temperature}.")
    if top_k is not None:
        top_k = as_size("top_k", top_k)
    if top_p is not None:
        check_number("top_p", top_p)
        if not 0 < known(top_p) <= 1:
            raise ValueError(f"top_p must lie in (0, 1], got {top_p}.")
    is_greedy = known(temperature) == 0
    if is_greedy:
        if top_k is not None or top_p is not None:
            raise ValueError("temperature=0 takes the likeliest token: leave top_k and top_p out.")
    elif rng is None:
        raise ValueError("rng must be given, as jax.random.key(0); temperature=0 needs none.")
    else:
        rng = as_rng("rng", rng)
    longest = getattr(model.positions, "max_length", None)
    length = tokens.shape[-1] + num_tokens
    if longest is not None and length > longest:
        raise ValueError(
            f"tokens and num_tokens must fit the model's {longest} positions, got "
            f"{tokens.shape[-1]} + {num_tokens}."
        )
    if num_tokens == 0:
        return jnp.zeros((*tokens.shape[:-1], 0), jnp.int32)
    model = decoding(model, rolling=True)
    settings = (None if is_greedy else (float(temperature), top_k, top_p),)
    cache, logits = _prefill(model, length, params, tokens)
    first, rng = _draw(logits, rng, *settings), rng
    rest = _continue(model, num_tokens - 1, *settings, params, cache, first, rng)
    return jnp.concatenate([first[..., None], rest], axis=-1)


@functools.partial(jax.jit, static_argnums=(0, 1))
@jax_defaults()
def _prefill(model, length, params, tokens):
    """The cache of the prompts, with room for `length` tokens, and the logits of what follows."""
    batch = tokens.shape[:-1]
    whole = jax.ShapeDtypeStruct((*batch, length), jnp.int32)
    like = jax.eval_shape(model.init, jax.random.key(0), whole)["cache"]
    cache = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), like)
    last = jnp.full((*batch, 1), tokens.shape[-1] - 1, jnp.int32)
    logits, variables = model.apply(
        {"params": params, "cache": cache}, tokens, output_positions=last, mutable=["cache"]
    )
    return variables["cache"], logits[..., 0, :]


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
@jax_defaults()
def _continue(model, num_tokens, settings, params, cache, token, rng):
    """`[..., num_tokens]`: those that follow `token`."""

    def step(carry, index):
        cache, token = carry
        logits, variables = model.apply(
            {"params": params, "cache": cache}, token[..., None], mutable=["cache"]
        )
        token = _choose(logits[..., 0, :], rng, index, settings)
        return (variables["cache"], token), token

    _, found = lax.scan(step, (cache, token), jnp.arange(1, num_tokens + 1))
    return jnp.moveaxis(found, 0, -1)


@functools.partial(jax.jit, static_argnums=(2,))
@jax_defaults()
def _draw(logits, rng, settings):
    return _choose(logits, rng, 0, settings)


def _choose(logits: Array, rng: Array | None, index: Array, settings: tuple | None) -> Array:
    """One token of each row, `[..., vocabulary] -> [...]`."""
    if settings is None:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    temperature, top_k, top_p = settings
    logits = logits.astype(jnp.float32) / temperature
    if top_k is not None and top_k < logits.shape[-1]:
        least = lax.top_k(logits, top_k)[0][..., -1:]
        logits = jnp.where(logits < least, -jnp.inf, logits)
    if top_p is not None and top_p < 1:
        ordered = -jnp.sort(-logits, axis=-1)
        weights = jax.nn.softmax(ordered, axis=-1)
        before = jnp.cumsum(weights, axis=-1) - weights  # Of the more likely tokens.
        least = jnp.min(jnp.where(before < top_p, ordered, jnp.inf), axis=-1, keepdims=True)
        logits = jnp.where(logits < least, -jnp.inf, logits)
    flat = logits.reshape(-1, logits.shape[-1])
    rows = jnp.arange(flat.shape[0])
    rng = jax.random.fold_in(rng, index)
    draw = lambda row, x: jax.random.categorical(jax.random.fold_in(rng, row), x)
    return jax.vmap(draw)(rows, flat).reshape(logits.shape[:-1]).astype(jnp.int32)
