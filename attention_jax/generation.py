"""Tokens from a model with a cache."""

import functools
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from attention_jax.checks import as_integers, as_rng, as_size, check_number, jax_defaults, known
from attention_jax.functional.mesh import in_auto, partition_of
from attention_jax.layers.parts import VectorEmbedding
from attention_jax.models import SequenceModel, as_static, decoding
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
    lengths: Array | None = None,
    context: int | None = None,
    end: int | Sequence[int] | None = None,
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
        top_k: Draws from the k most likely tokens only; of equal ones, from the first.
        top_p: Draws from the most likely tokens whose probabilities reach this sum.
        rng: The key of the draws. The draw of a row depends on the key, its place in the batch and
            its place among the new tokens.
        lengths: How many tokens of each row are its prompt, `[...]` integers of 1 to T; what
            stands behind them is not read. None: all T.
        context: The most tokens that the model sees at once, as the length that it was trained on.
            When they are full, the last half stays and is read anew, so a text may be of any
            length; with `lengths` all rows slide when the longest is full. Of a longer prompt the
            end counts. None: the model sees the whole text.
        end: A token, or some, that end a row. The first one stays, and fills the rest of its row.
            When all rows have ended, no more tokens are made.

    Returns:
        `[..., num_tokens]` int32.

    Raises:
        ValueError: A value is out of its range, or the model has too few positions.
        TypeError: An argument has the wrong type, or `lengths` are traced beside a `context`.
        NotImplementedError: A layer of the model has no cache, or its cache takes no `lengths`.
        FloatingPointError: The logits of a row are NaN or infinite. Inside a traced program, which
            cannot raise errors, -1 stands for their token.

    Reference:
        Holtzman et al. 2020, "The Curious Case of Neural Text Degeneration", section 3.1 (top-p).
        https://arxiv.org/abs/1904.09751
    """
    num_tokens = as_size("num_tokens", num_tokens, minimum=0)
    found = stream(
        model,
        params,
        tokens,
        num_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        rng=rng,
        lengths=lengths,
        context=context,
        end=end,
        chunk=max(1, num_tokens),
    )
    made = _concatenated([np.zeros((*np.shape(tokens)[:-1], 0), np.int32), *found])
    missing = num_tokens - made.shape[-1]  # All rows have ended: each goes on with its end.
    return jnp.pad(made, [(0, 0)] * (made.ndim - 1) + [(0, missing)], "edge") if missing else made


def stream(
    model: SequenceModel,
    params: PyTree,
    tokens: Array,
    num_tokens: int,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    rng: Array | None = None,
    lengths: Array | None = None,
    context: int | None = None,
    end: int | Sequence[int] | None = None,
    chunk: int = 1,
) -> Iterator[Array]:
    """As `generate`, but each part of the new tokens comes when it is made.

    Args:
        model, params, tokens, num_tokens, temperature, top_k, top_p, rng, lengths, context, end: As
            in `generate`.
        chunk: The most tokens in a part. The first part is one token.

    Returns:
        An iterator over `[..., n]` int32; all parts together are the `num_tokens`. It stops after
        the part in which the last row has ended.

    Raises:
        ValueError, TypeError, NotImplementedError: As `generate`, before the first part is asked
            for.
        FloatingPointError: As `generate`, instead of a part.
    """
    options = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "rng": rng}
    options |= {"lengths": lengths, "context": context, "end": end, "chunk": chunk}
    return _parts(**_checked(model, params, tokens, num_tokens, **options))


def compile_ahead(
    model: SequenceModel, params: PyTree, tokens: Array, num_tokens: int, **options: Any
) -> list[Any]:
    """Compiles the programs of `stream` for these arguments, and runs none.

    Args:
        model, params, tokens, num_tokens, **options: Of `stream`. `params` may be shapes.

    Returns:
        The compiled programs. jax finds them in a later call as long as they are kept.
    """
    call = _checked(model, params, tokens, num_tokens, **options)
    prompt, room = _first(call, num_tokens)
    model, capacity, settings, params, tokens, lengths, rng, zero, end, _ = prompt
    context = call["context"]
    cache, token, ended = _prefill.eval_shape(*prompt)
    size = min(call["chunk"], capacity)
    rest = model, size, settings, params, cache, token, rng, zero, zero, end, ended
    programs = [_prefill.lower(*prompt).compile(), _continue_in_place.lower(*rest).compile()]
    if num_tokens > room:  # What stays of a text that slides.
        tokens = np.zeros((*tokens.shape[:-1], _kept(context)), np.int32)
        before = None if ended is None else (ended, token)
        again = model, capacity, settings, params, tokens, lengths, rng, zero, end, before
        programs.append(_prefill.lower(*again).compile())
    return programs


def check(
    model: SequenceModel, params: PyTree, tokens: Array, num_tokens: int, **options: Any
) -> None:
    """Raises the errors of `stream` for these arguments that need no numbers, and runs no program.

    Args:
        model, params, tokens, num_tokens, **options: As in `compile_ahead`.
    """
    call = _checked(model, params, tokens, num_tokens, **options)
    _prefill.eval_shape(*_first(call, num_tokens)[0])


def _first(call, num_tokens):
    """The arguments of the program that reads the prompt, and the room that it leaves."""
    context = call["context"]
    capacity = _capacity(call["tokens"], num_tokens, context)
    tokens, lengths, room = _room(call["tokens"], call["lengths"], num_tokens, context)
    known = call["model"], capacity, call["settings"], call["params"], tokens, lengths
    return (*known, call["rng"], np.int32(0), call["end"], None), room


def _checked(
    model,
    params,
    tokens,
    num_tokens,
    *,
    temperature=1.0,
    top_k=None,
    top_p=None,
    rng=None,
    lengths=None,
    context=None,
    end=None,
    chunk=1,
) -> dict[str, Any]:
    """The arguments of `_parts`, from those of `stream`."""
    if not isinstance(model, SequenceModel):
        raise TypeError(f"model must be a SequenceModel, got {type(model).__name__}.")
    if isinstance(model.embedding, VectorEmbedding):
        raise TypeError("model must take tokens, but its VectorEmbedding takes vectors.")
    tokens = _known_integers("tokens", tokens, axes=1)
    if tokens.shape[-1] == 0:
        raise ValueError(f"tokens must be [..., T] with T at least 1, got shape {tokens.shape}.")
    num_tokens = as_size("num_tokens", num_tokens, minimum=0)
    chunk = as_size("chunk", chunk)
    settings, rng = _settings(temperature, top_k, top_p, rng)
    if lengths is not None:
        lengths = _known_integers("lengths", lengths)
        if lengths.shape != tokens.shape[:-1]:
            raise ValueError(
                f"lengths must have the batch axes {tokens.shape[:-1]} of tokens, got shape "
                f"{lengths.shape}."
            )
        lengths = _plain(lengths)
        if isinstance(lengths, jax.core.Tracer):
            if context is not None:
                raise TypeError(
                    "with a context, lengths must be known before the program runs, got a traced "
                    "array."
                )
        elif lengths.size and not 1 <= lengths.min() <= lengths.max() <= tokens.shape[-1]:
            raise ValueError(
                f"lengths must lie in [1, T] with T={tokens.shape[-1]}, got {lengths.tolist()}."
            )
    size = getattr(model.embedding, "num_embeddings", None)
    _check_vocabulary(tokens, lengths, size)
    end = _ends(end, size)
    longest = getattr(model.positions, "max_length", None)
    if context is not None:
        context = as_size("context", context, minimum=2)
        if longest is not None and context > longest:
            raise ValueError(f"context must be at most the model's {longest} positions: {context}.")
    elif longest is not None and tokens.shape[-1] + num_tokens > longest:
        raise ValueError(
            f"tokens and num_tokens must fit the model's {longest} positions, got "
            f"{tokens.shape[-1]} + {num_tokens}. With context={longest} the text may be longer."
        )
    return {
        "model": as_static(decoding(model, rolling=True)),
        "params": params,
        "tokens": tokens,
        "num_tokens": num_tokens,
        "settings": settings,
        "rng": rng,
        "lengths": lengths,
        "context": context,
        "end": end,
        "chunk": chunk,
    }


def _known_integers(name: str, array: Array, axes: int = 0) -> Array:
    """int32; what is known inside a traced program stays known."""
    with jax.ensure_compile_time_eval():
        return as_integers(name, array, axes=axes).astype(jnp.int32)


def _ends(end, size: int | None) -> np.ndarray | None:
    """The tokens that end a row, `[n]` int32."""
    if end is None:
        return None
    found = np.asarray(end)
    if found.dtype.kind not in "iu" or found.ndim > 1 or not found.size:
        raise TypeError(f"end must be a token or a sequence of tokens, got {end!r}.")
    found = found.reshape(-1)
    wrong = found[(found < 0) | (found >= (np.inf if size is None else size))]
    if wrong.size:
        raise ValueError(f"end must be tokens of the model, got {wrong[0]}.")
    return found.astype(np.int32)


def _check_vocabulary(tokens: Array, lengths: Array | None, size: int | None) -> None:
    """Raises ValueError for a token that the model does not have, if the tokens are known."""
    if size is None or tokens.size == 0:
        return
    if any(isinstance(x, jax.core.Tracer) for x in (tokens, lengths)):
        return
    tokens = _plain(tokens)
    wrong = (tokens < 0) | (tokens >= size)
    if lengths is not None:  # Padding may be anything.
        wrong &= np.arange(tokens.shape[-1]) < lengths[..., None]
    if wrong.any():
        raise ValueError(f"tokens must be from 0 to {size - 1}, got {tokens[wrong][0]}.")


def _settings(temperature, top_k, top_p, rng) -> tuple[tuple | None, Array | None]:
    """What decides a draw, and its key; None takes the likeliest token."""
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
    if known(temperature) == 0:
        if top_k is not None or top_p is not None:
            raise ValueError("temperature=0 takes the likeliest token: leave top_k and top_p out.")
        return None, None
    if rng is None:
        raise ValueError("rng must be given, as jax.random.key(0); temperature=0 needs none.")
    return (float(temperature), top_k, top_p), as_rng("rng", rng)


def _parts(model, params, tokens, num_tokens, settings, rng, lengths, context, end, chunk):
    """The new tokens, part by part."""
    made, ended = 0, None  # How many tokens are made; which rows have ended.
    before = None  # The latter, and the newest tokens.
    capacity = _capacity(tokens, num_tokens, context)
    arrays = jax.tree.leaves((params, tokens, lengths, rng))
    traced = any(isinstance(x, jax.core.Tracer) for x in arrays)
    proceed = _continue_in_trace if traced else _continue_in_place
    while made < num_tokens and not _all(ended):
        tokens, lengths, room = _room(tokens, lengths, num_tokens - made, context)
        cache, token, ended = _prefill(
            model, capacity, settings, params, tokens, lengths, rng, np.int32(made), end, before
        )
        seen = [tokens, _sound(token[..., None])]
        yield seen[-1]
        made, room = made + 1, room - 1
        while room and not _all(ended):
            count = min(chunk, room)
            numbers = np.int32(made), np.int32(count)
            size = min(chunk, capacity)
            cache, token, ended, found = proceed(
                model, size, settings, params, cache, token, rng, *numbers, end, ended
            )
            found = _sound(found, count)
            seen.append(found)
            yield found
            made, room = made + count, room - count
        if made < num_tokens and not _all(ended):
            before = None if ended is None else (ended, token)
            tokens, lengths = _joined(seen, lengths)
            tokens, lengths = _last(tokens, lengths, _kept(context))


def _capacity(tokens, num_tokens, context):
    """Of the cache, for all parts of a text that slides, so that they compile once."""
    longest = tokens.shape[-1] + num_tokens
    return longest if context is None else min(context, longest)


def _room(tokens, lengths, num_tokens, context):
    """What is read, and how many tokens are made before the cache is full."""
    if context is None:
        return tokens, lengths, num_tokens
    if tokens.shape[-1] > context:
        tokens, lengths = _last(tokens, lengths, context)
    longest = tokens.shape[-1] if lengths is None else int(np.max(lengths, initial=1))
    # The last new token is not read.
    return tokens, lengths, min(num_tokens, context + 1 - longest)


def _kept(context: int) -> int:
    """How many tokens stay of a text that slides."""
    return max(1, context // 2)


def _all(ended: Array | None) -> bool:
    """Whether every row is known to have ended."""
    return ended is not None and not isinstance(ended, jax.core.Tracer) and bool(ended.all())


def _sound(found: Array, count: int | None = None) -> Array:
    """The first `count` tokens; FloatingPointError if a row has none, as far as that is known."""
    if isinstance(found, jax.core.Tracer):
        return found[..., :count]
    known = np.asarray(found)[..., :count]
    if (known < 0).any():
        row = np.argwhere(known < 0)[0, :-1].tolist()
        where = f" in row {row}" if row else ""
        raise FloatingPointError(f"the logits of the model are NaN or infinite{where}.")
    return found if known.shape == found.shape else jnp.asarray(known)


def _concatenated(parts: list[Array]) -> Array:
    """The parts as one. Known ones are joined by NumPy, for which jax compiles no program."""
    if any(isinstance(part, jax.core.Tracer) for part in parts):
        return jnp.concatenate(parts, axis=-1)
    return jnp.asarray(np.concatenate(parts, axis=-1))


def _joined(parts, lengths):
    """Prompts and what follows each, as rows that are padded at their ends."""
    if lengths is None:
        return _concatenated(parts), None
    prompt, new = _plain(parts[0]), _plain(_concatenated(parts[1:]))
    places = lengths[..., None] + np.arange(new.shape[-1])
    if isinstance(prompt, jax.core.Tracer) or isinstance(new, jax.core.Tracer):
        row = jnp.concatenate([prompt, jnp.zeros_like(new)], axis=-1)
        row = jnp.put_along_axis(row, places, new, axis=-1, inplace=False)
    else:
        row = np.concatenate([prompt, np.zeros_like(new)], axis=-1)
        np.put_along_axis(row, places, new, axis=-1)
    return row, lengths + new.shape[-1]


def _last(tokens, lengths, count):
    """The last `count` tokens of each row, or all of a row that has fewer."""
    tokens = _plain(tokens)
    if lengths is None:
        return tokens[..., -count:], None
    begin = np.maximum(lengths - count, 0)[..., None]
    places = np.minimum(begin + np.arange(count), tokens.shape[-1] - 1)
    take = jnp if isinstance(tokens, jax.core.Tracer) else np
    return take.take_along_axis(tokens, places, axis=-1), np.minimum(lengths, count)


def _plain(array: Array) -> Array:
    """As an array of NumPy, for which jax compiles nothing; a traced one stays."""
    return array if isinstance(array, jax.core.Tracer) else np.asarray(array)


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
@jax_defaults()
def _prefill(model, capacity, settings, params, tokens, lengths, rng, index, end, before):
    """The cache of the prompts, with room for `capacity` tokens, what follows them, and whether it
    ends the row. `before`: which rows had ended already, and with what; None at the start."""
    batch, T = tokens.shape[:-1], tokens.shape[-1]
    whole = jax.ShapeDtypeStruct((*batch, capacity), jnp.int32)
    like = jax.eval_shape(model.init, jax.random.key(0), whole)["cache"]
    cache = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), like)
    last = jnp.full(batch, T, jnp.int32) if lengths is None else lengths
    options = {} if lengths is None else {"lengths": lengths}
    logits, variables = model.apply(
        {"params": params, "cache": cache},
        tokens,
        output_positions=last[..., None] - 1,
        mutable=["cache"],
        **options,
    )
    token = _choose(logits[..., 0, :], rng, index, settings)
    ended = None if end is None else jnp.zeros_like(token, bool)
    if before is not None:
        ended, last = before
        token = jnp.where(ended, last, token)
    return variables["cache"], token, _ended(token, end, ended)


@jax_defaults()
def _continue(model, size, settings, params, cache, token, rng, index, count, end, ended):
    """The next `count` tokens: the cache, the last, which rows have ended, all `[..., size]`.

    `count` is at most `size`, and no part of the program, so that a shorter last part needs no
    program of its own.
    """

    def step(carry):
        i, cache, token, ended, found = carry
        logits, variables = model.apply(
            {"params": params, "cache": cache}, token[..., None], mutable=["cache"]
        )
        new = _choose(logits[..., 0, :], rng, index + i, settings)
        token = new if end is None else jnp.where(ended, token, new)
        found = lax.dynamic_update_index_in_dim(found, token, i, axis=0)
        return i + 1, variables["cache"], token, _ended(token, end, ended), found

    def goes_on(carry):
        i, _, _, ended, _ = carry
        return (i < count) if end is None else (i < count) & ~ended.all()

    # Split over devices as the tokens are.
    found = jnp.zeros_like(jnp.broadcast_to(token, (size, *token.shape)))
    carry = (jnp.int32(0), cache, token, ended, found)
    i, cache, token, ended, found = lax.while_loop(goes_on, step, carry)
    found = jnp.moveaxis(found, 0, -1)
    if end is not None:  # All rows may have ended before `count`.
        found = jnp.where(jnp.arange(size) < i, found, token[..., None])
    return cache, token, ended, found


# The cache is written in place, except inside a trace: `jax.vmap` over keys shares it.
_continue_in_place = jax.jit(_continue, static_argnums=(0, 1, 2), donate_argnums=4)
_continue_in_trace = jax.jit(_continue, static_argnums=(0, 1, 2))


def _ended(token: Array, end: Array | None, ended: Array | None) -> Array | None:
    """Which rows have ended, with their newest token."""
    return None if end is None else ended | (token[..., None] == end).any(axis=-1)


def _choose(logits: Array, rng: Array | None, index: Array, settings: tuple | None) -> Array:
    """One token of each row, `[..., vocabulary] -> [...]`; -1 if its logits are no numbers."""
    sound = jnp.isfinite(jnp.max(logits, axis=-1))
    rows = partition_of(logits, *range(logits.ndim - 1))
    token = in_auto(functools.partial(_chosen, settings), (logits, rng, index), rows)
    return jnp.where(sound, token, -1)


def _chosen(settings, logits, rng, index):
    if settings is None:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    temperature, top_k, top_p = settings
    logits = logits.astype(jnp.float32)
    # From the largest: a quotient by a small temperature would overflow for all of them.
    logits -= jnp.max(logits, axis=-1, keepdims=True)
    numbers = jnp.finfo(jnp.float32)
    logits /= min(max(temperature, float(numbers.tiny)), float(numbers.max))
    vocabulary = logits.shape[-1]
    k = vocabulary if top_k is None else min(top_k, vocabulary)
    if k < vocabulary or top_p not in (None, 1):
        # By their places, not by a least logit: equal logits, as bfloat16 has, would pass it too.
        ordered, places = lax.top_k(logits, k)
        if top_p is not None:
            weights = jax.nn.softmax(ordered, axis=-1)
            before = jnp.cumsum(weights, axis=-1) - weights  # Of the more likely tokens.
            is_first = jnp.arange(k) == 0  # A tiny `top_p` is 0 in float32.
            ordered = jnp.where((before < top_p) | is_first, ordered, -jnp.inf)
        logits = jnp.put_along_axis(
            jnp.full_like(logits, -jnp.inf), places, ordered, axis=-1, inplace=False
        )
    flat = logits.reshape(-1, logits.shape[-1])
    rows = jnp.arange(flat.shape[0])
    rng = jax.random.fold_in(rng, index)
    draw = lambda row, x: jax.random.categorical(jax.random.fold_in(rng, row), x)
    return jax.vmap(draw)(rows, flat).reshape(logits.shape[:-1]).astype(jnp.int32)
