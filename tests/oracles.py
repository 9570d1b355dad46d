"""The right answers: loops in float64 that a student can check by hand.

This file imports nothing from the package, and its code is simple. Axis letters as everywhere: B
batch, T queries, S keys, N query heads, K key/value heads, H head size, V value head size.
"""

import math

import numpy as np


def f64(x):
    return None if x is None else np.asarray(x).astype(np.float64)


# Scaled dot-product attention.


def dot_product(query, key, value, **settings):
    """`(out [..., T, N, V], logsumexp [..., T, N])`; settings as in `dot_product_one`."""
    return _over_batch(dot_product_one, query, key, value, **settings)


def dot_product_gradients(query, key, value, d_out, d_lse=None, **settings):
    """Gradients of `sum(out * d_out) + sum(logsumexp * d_lse)`, a dict of arrays.

    `bias` is `[..., N, T, S]`, one number per logit; `sinks` is `[..., N]`. Who broadcast a bias
    sums over the broadcast axes.
    """
    d_lse = np.zeros(query.shape[:-1]) if d_lse is None else d_lse
    names = ("query", "key", "value", "bias", "sinks")
    grads = _over_batch(
        dot_product_gradients_one, query, key, value, d_out=d_out, d_lse=d_lse, **settings
    )
    return dict(zip(names, grads, strict=True))


def _over_batch(one, query, key, value, *, mask=None, bias=None, keep=None, **settings):
    query, key, value = f64(query), f64(key), f64(value)
    *batch, T, N, _ = query.shape
    S = key.shape[-3]
    full = (*batch, N, T, S)
    mask = np.broadcast_to(True if mask is None else np.asarray(mask), full)
    bias = np.broadcast_to(0.0 if bias is None else f64(bias), full)
    keep = np.broadcast_to(True if keep is None else np.asarray(keep), full)
    per_row = {k: f64(settings.pop(k)) for k in ("d_out", "d_lse") if k in settings}
    results = [
        one(
            *(query[b], key[b], value[b]),
            mask=mask[b],
            bias=bias[b],
            keep=keep[b],
            **{k: x[b] for k, x in per_row.items()},
            **settings,
        )
        for b in np.ndindex(*batch)
    ]
    return tuple(
        np.array(parts).reshape(*batch, *parts[0].shape) for parts in zip(*results, strict=True)
    )


def softmax_row(query, key, t, n, *, mask, bias, scale, softcap, sinks):
    """The visible keys of query t in head n, their weights, the sink's weight, the logsumexp."""
    N, K, H = query.shape[1], key.shape[1], query.shape[2]
    k = n // (N // K)  # Repeat, not tile: neighbouring query heads share a key head.
    scale = 1 / math.sqrt(H) if scale is None else scale
    seen = [s for s in range(key.shape[0]) if mask[n, t, s] and bias[n, t, s] != -np.inf]
    logits = []
    for s in seen:
        x = scale * float(query[t, n] @ key[s, k])
        if softcap is not None:
            x = softcap * math.tanh(x / softcap)
        logits.append(x + bias[n, t, s])
    has_sink = sinks is not None and sinks[n] != -np.inf
    everything = [*logits, float(sinks[n])] if has_sink else logits
    if not everything:  # Nothing to attend to: no output, no gradient.
        return [], [], 0.0, -np.inf
    top = max(everything)
    lse = top + math.log(sum(math.exp(x - top) for x in everything))
    sink_weight = math.exp(float(sinks[n]) - lse) if has_sink else 0.0
    return seen, [math.exp(x - lse) for x in logits], sink_weight, lse


def dot_product_one(
    query,
    key,
    value,
    *,
    mask,
    bias,
    keep,
    rate=0.0,
    scale=None,
    softcap=None,
    sinks=None,
):
    """One sequence: query `[T, N, H]`, key `[S, K, H]`, value `[S, K, V]`; the rest `[N, T, S]`."""
    (T, N, _), (_, K, V) = query.shape, value.shape
    out, lse = np.zeros((T, N, V)), np.zeros((T, N))
    for t, n in np.ndindex(T, N):
        seen, weights, _, lse[t, n] = softmax_row(
            query, key, t, n, mask=mask, bias=bias, scale=scale, softcap=softcap, sinks=sinks
        )
        for s, weight in zip(seen, weights, strict=True):
            if keep[n, t, s]:
                out[t, n] += weight / (1 - rate) * value[s, n // (N // K)]
    return out, lse


def dot_product_gradients_one(
    query,
    key,
    value,
    *,
    d_out,
    d_lse,
    mask,
    bias,
    keep,
    rate=0.0,
    scale=None,
    softcap=None,
    sinks=None,
):
    """The chain rule written out, one row of the softmax at a time."""
    (T, N, H), (S, K, _) = query.shape, key.shape
    d_query, d_key, d_value = (np.zeros(x.shape) for x in (query, key, value))
    d_bias, d_sinks = np.zeros((N, T, S)), np.zeros(N)
    factor = 1 / math.sqrt(H) if scale is None else scale
    for t, n in np.ndindex(T, N):
        k = n // (N // K)
        seen, weights, sink_weight, _ = softmax_row(
            query, key, t, n, mask=mask, bias=bias, scale=scale, softcap=softcap, sinks=sinks
        )
        # out = sum_s weight_s * dropped_s * value_s
        dropped = [float(keep[n, t, s]) / (1 - rate) for s in seen]
        d_weights = [
            x * float(d_out[t, n] @ value[s, k]) for s, x in zip(seen, dropped, strict=True)
        ]
        # d weight_i / d logit_j = weight_i * ((i == j) - weight_j), for the sink too.
        mean = sum(w * d for w, d in zip(weights, d_weights, strict=True))
        d_sinks[n] += sink_weight * (0 - mean) + sink_weight * d_lse[t, n]
        for s, weight, x, d_weight in zip(seen, weights, dropped, d_weights, strict=True):
            d_value[s, k] += weight * x * d_out[t, n]
            d_logit = weight * (d_weight - mean) + weight * d_lse[t, n]
            d_bias[n, t, s] = d_logit
            if softcap is not None:
                inner = factor * float(query[t, n] @ key[s, k]) / softcap
                d_logit *= 1 - math.tanh(inner) ** 2
            d_query[t, n] += factor * d_logit * key[s, k]
            d_key[s, k] += factor * d_logit * query[t, n]
    return d_query, d_key, d_value, d_bias, d_sinks


def naive(query, key, value, d_out, dtype, *, mask=None, bias=None):
    """Attention as one would write it down, every step rounded to `dtype`: out and gradients.

    This is no oracle but what the package has to be as good as. Sums are rounded once.
    """

    def rounded(equation, *operands):
        x = np.einsum(equation, *operands) if operands else equation
        return np.asarray(x, np.float32).astype(dtype).astype(np.float32)

    query, key, value, d_out = (np.asarray(x, np.float32) for x in (query, key, value, d_out))
    (N, H), K = query.shape[-2:], key.shape[-2]
    scale = H**-0.5
    key, value = (np.repeat(x, N // K, axis=-2) for x in (key, value))
    logits = rounded(scale * rounded("...tnh,...snh->...nts", query, key))
    if bias is not None:
        logits = rounded(logits + np.asarray(bias, np.float32))
    if mask is not None:
        logits = np.where(mask, logits, -np.inf)
    weights = rounded(np.exp(rounded(logits - logits.max(-1, keepdims=True))))
    weights = rounded(weights / rounded(weights.sum(-1, keepdims=True)))
    out = rounded("...nts,...snv->...tnv", weights, value)

    d_value = rounded("...nts,...tnv->...snv", weights, d_out)
    d_weights = rounded("...tnv,...snv->...nts", d_out, value)
    mean = rounded(rounded(weights * d_weights).sum(-1, keepdims=True))
    d_logits = rounded(scale * rounded(weights * rounded(d_weights - mean)))
    d_query = rounded("...nts,...snh->...tnh", d_logits, key)
    d_key = rounded("...nts,...tnh->...snh", d_logits, query)
    d_key, d_value = (
        rounded(x.reshape(*x.shape[:-2], K, N // K, x.shape[-1]).sum(-2)) for x in (d_key, d_value)
    )
    return out, {"query": d_query, "key": d_key, "value": d_value}


# Who may see whom; every rule is a question about one query t and one key s.


def visible(T, S, rule):
    return np.array([[bool(rule(t, s)) for s in range(S)] for t in range(T)]).reshape(T, S)


def shift(offset, T, S):
    return S - T if offset == "end" else offset


def causal(T, S, offset=0):
    return visible(T, S, lambda t, s: s <= t + shift(offset, T, S))


def window(T, S, left, right=0, offset=0):
    def rule(t, s):
        here = t + shift(offset, T, S)
        return (left is None or here - left <= s) and (right is None or s <= here + right)

    return visible(T, S, rule)


def strided(T, S, stride, offset=0):
    return visible(T, S, lambda t, s: abs(t + shift(offset, T, S) - s) % stride == 0)


def blocks(T, S, size, summary=0, offset=0):
    def rule(t, s):
        here, first = t + shift(offset, T, S), s - s % size
        return first <= here < first + size or s >= first + size - summary

    return visible(T, S, rule)


def segments(query_ids, key_ids=None):
    """`[..., T]`, `[..., S]` -> `[..., 1, T, S]`."""
    key_ids = query_ids if key_ids is None else key_ids
    *batch, T = query_ids.shape
    out = np.zeros((*batch, 1, T, key_ids.shape[-1]), bool)
    for b in np.ndindex(*batch):
        out[b][0] = visible(
            T, key_ids.shape[-1], lambda t, s, b=b: query_ids[b][t] == key_ids[b][s]
        )
    return out


def key_lengths(T, S, lengths):
    """`[...]` -> `[..., 1, T, S]`."""
    out = np.zeros((*lengths.shape, 1, T, S), bool)
    for b in np.ndindex(*lengths.shape):
        out[b][0] = visible(T, S, lambda t, s, b=b: s < lengths[b])
    return out


def query_lengths(T, S, lengths):
    out = np.zeros((*lengths.shape, 1, T, S), bool)
    for b in np.ndindex(*lengths.shape):
        out[b][0] = visible(T, S, lambda t, s, b=b: t < lengths[b])
    return out


# Preferences.


def alibi_slopes(num_heads):
    """Press et al. 2022: a geometric sequence; between two powers of two, every other one of the
    next."""

    def power_of_two(n):
        return [2.0 ** (-8.0 * (i + 1) / n) for i in range(n)]

    below = 2 ** int(math.log2(num_heads))
    return np.array(power_of_two(below) + power_of_two(2 * below)[::2][: num_heads - below])


def alibi(slopes, T, S):
    """`[N, T, S]`."""
    out = np.zeros((len(slopes), T, S))
    for n, t, s in np.ndindex(*out.shape):
        out[n, t, s] = -float(slopes[n]) * abs(t - s)
    return out


def relative_bucket(t, s, *, bidirectional, num_buckets, max_distance):
    """Raffel et al. 2020. In whole numbers: a logarithm rounds at the edges of the buckets."""
    bucket, distance = 0, t - s
    if bidirectional:
        num_buckets //= 2
        if s > t:
            bucket = num_buckets
        distance = abs(distance)
    distance = max(distance, 0)
    exact = num_buckets // 2
    if distance < exact:
        return bucket + distance
    # Largest j with (max_distance / exact) ** (j / steps) <= distance / exact.
    steps = num_buckets - exact
    j = 0
    while j + 1 <= steps - 1 and max_distance ** (
        j + 1
    ) * exact**steps <= distance**steps * exact ** (j + 1):
        j += 1
    return bucket + exact + j


def relative(table, T, S, **rule):
    """`[N, T, S]` from a table `[num_buckets, N]`."""
    out = np.zeros((table.shape[1], T, S))
    for n, t, s in np.ndindex(*out.shape):
        out[n, t, s] = float(table[relative_bucket(t, s, **rule), n])
    return out


# Positions.


def rotary(x, positions, *, base=10_000.0, fraction=1.0, layout="half", turn=lambda f: f):
    """`[T, N, H]` and `[T]`; coordinate i turns together with coordinate i + rotary_dim / 2.

    "interleaved": 2 i with 2 i + 1. `turn` changes the frequency of a pair.
    """
    x, out = f64(x), f64(x).copy()
    T, N, H = x.shape
    half = round(H * fraction) // 2
    for t, n, i in np.ndindex(T, N, half):
        angle = float(positions[t]) * turn(base ** (-i / half))
        first, second = (i, i + half) if layout == "half" else (2 * i, 2 * i + 1)
        a, b = x[t, n, first], x[t, n, second]
        out[t, n, first] = a * math.cos(angle) - b * math.sin(angle)
        out[t, n, second] = b * math.cos(angle) + a * math.sin(angle)
    return out


def sinusoidal(num_positions, features):
    half = features // 2
    out = np.zeros((num_positions, features))
    for p, i in np.ndindex(num_positions, half):
        angle = p / 10_000 ** (2 * i / features)
        out[p, i], out[p, i + half] = math.sin(angle), math.cos(angle)
    return out


# Linear attention.


def elu_plus_one(x):
    return np.where(x > 0, x + 1, np.exp(np.minimum(x, 0)))


def linear(query, key, value, *, mask=None, feature_map=elu_plus_one):
    """Katharopoulos et al. 2020, equation 4: similarities are products of positive features."""
    query, key, value = f64(query), f64(key), f64(value)
    *batch, T, N, _ = query.shape
    S, K, V = value.shape[-3:]
    mask = np.broadcast_to(True if mask is None else np.asarray(mask), (*batch, N, T, S))
    out = np.zeros((*batch, T, N, V))
    for *b, t, n in np.ndindex(*batch, T, N):
        b, k = tuple(b), n // (N // K)
        total = 0.0
        for s in range(S):
            if mask[b][n, t, s]:
                similarity = float(feature_map(query[b][t, n]) @ feature_map(key[b][s, k]))
                out[b][t, n] += similarity * value[b][s, k]
                total += similarity
        if total:
            out[b][t, n] /= total
    return out


# Sigmoid attention.


def sigmoid(query, key, value, *, offset=0.0, mask=None):
    """Ramapuram et al. 2024, section 3: each weight by itself, with b = offset - log(keys seen)."""
    query, key, value = f64(query), f64(key), f64(value)
    *batch, T, N, H = query.shape
    S, K, V = value.shape[-3:]
    mask = np.broadcast_to(True if mask is None else np.asarray(mask), (*batch, N, T, S))
    offset = np.broadcast_to(f64(offset), (N,))
    out = np.zeros((*batch, T, N, V))
    for *b, t, n in np.ndindex(*batch, T, N):
        b, k = tuple(b), n // (N // K)
        seen = [s for s in range(S) if mask[b][n, t, s]]
        for s in seen:
            x = float(query[b][t, n] @ key[b][s, k]) / math.sqrt(H)
            x += offset[n] - math.log(len(seen))
            out[b][t, n] += value[b][s, k] / (1 + math.exp(-x))
    return out


# Differential attention.


def differential(query, key, value, *, lambda_full=0.8, **settings):
    """Ye et al. 2024, equation 1: one attention minus lambda times another, on the halves of H."""
    half = query.shape[-1] // 2
    first, _ = dot_product(query[..., :half], key[..., :half], value, **settings)
    second, _ = dot_product(query[..., half:], key[..., half:], value, **settings)
    out = np.zeros(first.shape)
    for n in range(query.shape[-2]):
        share = np.broadcast_to(f64(lambda_full), query.shape[-2:-1])[n]
        out[..., n, :] = first[..., n, :] - share * second[..., n, :]
    return out


# The gated delta rule.


def gated_delta(query, key, value, *, log_decay=None, beta=None, mask=None, initial_state=None):
    """Yang et al. 2024, equation 10, position by position with the paper's `[V, H]` state S.

    A recurrence sees its past: the mask is the causal one. With `initial_state` `[..., W, H, V]`
    also the last state, as that.
    """
    query, key, value = f64(query), f64(key), f64(value)
    *batch, T, N, H = query.shape
    S, W, V = value.shape[-3:]
    K, heads = key.shape[-2], max(N, W)
    assert mask is None or (mask == causal(T, S)).all()
    decay = np.exp(np.zeros((*batch, S, W)) if log_decay is None else f64(log_decay))
    beta = np.ones((*batch, S, W)) if beta is None else f64(beta)
    first = np.zeros((*batch, W, H, V)) if initial_state is None else f64(initial_state)
    out, last = np.zeros((*batch, T, heads, V)), np.zeros(first.shape)
    for *b, n in np.ndindex(*batch, heads):
        b, w = tuple(b), n * W // heads
        k, state = w * K // W, first[b][w].T
        for t in range(max(T, S)):
            if t < S:
                row, column = key[b][t, k], value[b][t, w]
                erase = np.eye(H) - beta[b][t, w] * np.outer(row, row)
                state = state @ (decay[b][t, w] * erase) + beta[b][t, w] * np.outer(column, row)
            if t < T:
                out[b][t, n] = state @ query[b][t, n * N // heads]
        last[b][w] = state.T
    return out if initial_state is None else (out, last)


def central_difference(function, x, direction, step=1e-5):
    """The derivative of a float64 function along a direction, by its definition."""
    return (function(x + step * direction) - function(x - step * direction)) / (2 * step)
