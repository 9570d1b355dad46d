"""Checks attention on shapes of one's own: every implementation against float64, on this machine.

    attention-jax check
    attention-jax check --shape=2,1024,8,64 --kv_heads=2 --features=causal,alibi --dtype=bfloat16

SHAPE is B,T,N,H. The features are causal, window=N, lengths, segments, alibi, bias, softcap=X,
sinks and dropout=R, joined by commas. For each implementation the table says how far its values and
gradients are from the definition in float64, as a multiple of the bound; whether outputs keep their
bits when the future changes (with causal); and whether queries that see nothing give exact zeros
(where there are any). The bounds: float32 values 2e-6 and gradients 1e-5 of the largest number; in
half precision twice and three times the error of the formula as it is written down in that type.
The status is 1 if a bound is broken.
"""

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from attention_jax.laboratory.parser import Parser
from attention_jax.training.config import ConfigError
from attention_jax.training.process import RunError

IMPLEMENTATIONS = ("dense", "blockwise", "cudnn")
DTYPES = ("float32", "bfloat16", "float16")
# The number of a feature that has one: its type, a rule that it keeps, and the rule in words.
NUMBERS = {
    "window": (int, lambda x: 0 <= x < 2**31, "must be at least 0 and below 2**31"),
    "softcap": (float, lambda x: 0 < x < math.inf, "must be positive and finite"),
    "dropout": (float, lambda x: 0 <= x < 1, "must be in [0, 1)"),
}
FEATURES = (
    "causal",
    "window",
    "lengths",
    "segments",
    "alibi",
    "bias",
    "softcap",
    "sinks",
    "dropout",
)
MOST = 2**28  # Logits of the definition, or numbers of an input: 2 GB in float64.


class Request(NamedTuple):
    """What is checked.

    Attributes:
        shape: B, T, N, H.
        keys: S.
        kv_heads: K.
        dtype: The type of the inputs.
        features: Their numbers by their names; None for those without.
        seed: Of the random inputs.
    """

    shape: tuple[int, int, int, int]
    keys: int
    kv_heads: int
    dtype: str
    features: Mapping[str, float | None]
    seed: int = 0


class Found(NamedTuple):
    """What was found of one implementation.

    Attributes:
        values, gradients: The largest error as a multiple of its bound.
        causal: Whether no output depends on the future; None where it may.
        empty: Whether queries that see nothing give zeros with zero gradients; None without such.
        refused: Why it cannot do this; then the others are None.
    """

    values: float | None = None
    gradients: float | None = None
    causal: bool | None = None
    empty: bool | None = None
    refused: str = ""

    @property
    def is_right(self) -> bool:
        errors = [x for x in (self.values, self.gradients) if x is not None]
        return all(x <= 1 for x in errors) and False not in (self.causal, self.empty)


def main(argv: Sequence[str]) -> None:
    """Does the command; `argv[0]` is its name.

    Raises:
        ConfigError: A flag is invalid.
        RunError: An implementation breaks its promise.
    """
    request = parse(argv)
    # Imported after the flags, so that errors do not wait for jax.
    import jax

    device = jax.devices()[0]
    print(f"{_told(request)}; jax {jax.__version__}, {device.platform}: {device.device_kind}")
    try:
        found = check(request)
    except ValueError as error:
        raise ConfigError(" ".join(str(error).split())) from error
    print("\n".join(table(found)))
    broken = [name for name, one in found.items() if not one.is_right]
    if broken:
        raise RunError(f"broken: {', '.join(broken)}.")


def parse(argv: Sequence[str]) -> Request:
    """Reads the flags, without importing jax."""
    parser = Parser(argv[0], __doc__)
    parser.add_argument("--shape", default="2,256,4,64", help="B,T,N,H (default %(default)s)")
    parser.add_argument("--keys", type=int, help="S; default T")
    parser.add_argument("--kv_heads", type=int, help="K, a divisor of N; default N")
    parser.add_argument("--dtype", default="float32", help=" ".join(DTYPES))
    parser.add_argument(
        "--features", default="causal", help="joined by commas; --features= has none"
    )
    parser.add_argument("--seed", type=int, default=0)
    try:
        options = parser.parse_args(argv[1:])
        return _request(options)
    except ValueError as error:
        raise ConfigError(str(error)) from error


def check(request: Request) -> dict[str, Found]:
    """Compares every implementation with the definition in float64.

    Raises:
        ValueError: The shapes or features do not fit together.
    """
    import jax

    with jax.enable_x64(True):
        inputs = _inputs(request)
        want = _run(request, inputs, "dense", "float64")
        naive = None
        if request.dtype != "float32":  # Bounds of half precision are multiples of its errors.
            naive = _errors(_run(request, inputs, None, request.dtype, naive=True), want)
        return {name: _found(request, inputs, name, want, naive) for name in IMPLEMENTATIONS}


def table(found: Mapping[str, Found]) -> list[str]:
    """Lines for a terminal."""
    mark = {True: "yes", False: "NO", None: "-"}
    number = lambda x: "-" if x is None else f"{x:.2f}"
    rows = [("implementation", "values", "gradients", "causal", "empty rows 0", "")]
    for name, one in found.items():
        last = f"refused: {one.refused}" if one.refused else ("right" if one.is_right else "BROKEN")
        cells = number(one.values), number(one.gradients), mark[one.causal], mark[one.empty]
        rows.append((name, *cells, last))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for name, *cells, last in rows:
        padded = [cell.rjust(width) for cell, width in zip(cells, widths[1:], strict=False)]
        lines.append("  ".join([name.ljust(widths[0]), *padded, last]).rstrip())
    return [*lines, "errors are multiples of their bounds: up to 1 is right"]


def _request(options) -> Request:
    parts = options.shape.split(",")
    is_size = lambda part: part.isascii() and part.strip().isdigit() and int(part) > 0
    if len(parts) != 4 or not all(map(is_size, parts)):
        raise ValueError(f"--shape must be four positive integers B,T,N,H: got {options.shape}.")
    B, T, N, H = shape = tuple(map(int, parts))
    S = T if options.keys is None else options.keys
    K = N if options.kv_heads is None else options.kv_heads
    if S < 1:
        raise ValueError(f"--keys must be positive: got {S}.")
    if K < 1 or N % K:
        raise ValueError(f"--kv_heads must divide the {N} heads: got {K}.")
    if options.dtype not in DTYPES:
        raise ValueError(f"--dtype must be one of {', '.join(DTYPES)}: got {options.dtype}.")
    if B * N * T * S > MOST:
        raise ValueError(
            f"--shape has {B * N * T * S:,} logits, and the definition holds at most {MOST:,}: "
            "take fewer rows or heads."
        )
    if B * N * max(T, S) * H > MOST:
        raise ValueError(
            f"--shape has {B * N * max(T, S) * H:,} numbers in an input, at most {MOST:,} are "
            "checked: take a smaller H."
        )
    if not 0 <= options.seed < 2**63:
        raise ValueError(f"--seed must be in [0, 2**63): got {options.seed}.")
    features: dict[str, float | None] = {}
    for word in filter(None, (part.strip() for part in options.features.split(","))):
        name, equals, number = word.partition("=")
        if name not in FEATURES:
            raise ValueError(f"--features must be of {', '.join(FEATURES)}: got {word}.")
        if (name in NUMBERS) != bool(equals):
            has = "needs a number, as in" if name in NUMBERS else "has no number:"
            raise ValueError(f"--features: {name} {has} {name}{'=8' if name in NUMBERS else ''}.")
        features[name] = _number(name, number) if equals else None
    if "segments" in features and S != T:
        raise ValueError(f"--features: segments need as many keys as queries: got {S} and {T}.")
    return Request(shape, S, K, options.dtype, features, options.seed)


def _number(name, text):
    """The number of a feature."""
    kind, is_kept, words = NUMBERS[name]
    try:
        number = kind(text)
    except ValueError as error:
        raise ValueError(f"--features: {name} needs a number: got {text!r}.") from error
    if not is_kept(number):
        raise ValueError(f"--features: {name} {words}: got {text}.")
    return number


def _told(request) -> str:
    B, T, N, H = request.shape
    features = [
        name if number is None else f"{name}={number:g}"
        for name, number in request.features.items()
    ]
    words = ", ".join(features) or "no features"
    sizes = f"B={B}, T={T}, S={request.keys}, N={N}, K={request.kv_heads}, H={H}"
    return f"{sizes}, {request.dtype}, {words}"


# The calls ---------------------------------------------------------------------------------------


def _inputs(request) -> dict[str, Any]:
    """Random arrays, rounded to the type that is checked, then held in float64."""
    import jax.numpy as jnp
    import numpy as np

    B, T, N, H = request.shape
    S, K = request.keys, request.kv_heads
    rng = np.random.default_rng(request.seed)
    shapes = {"query": (B, T, N, H), "key": (B, S, K, H), "value": (B, S, K, H)}
    if "bias" in request.features:
        shapes["bias"] = (N, T, S)
    if "sinks" in request.features:
        shapes["sinks"] = (N,)
    if "alibi" in request.features:
        shapes["slopes"] = (N,)
    found = {}
    for name, shape in shapes.items():
        x = np.abs(rng.standard_normal(shape)) / 8 if name == "slopes" else None
        x = rng.standard_normal(shape) if x is None else x
        found[name] = jnp.asarray(x).astype(request.dtype).astype(jnp.float64)
    found["cotangent"] = jnp.asarray(rng.standard_normal((B, T, N, H)))
    found["cotangent"] = found["cotangent"].astype(request.dtype).astype(jnp.float64)
    return found


def _rules(request):
    """The mask, or None."""
    import jax.numpy as jnp

    from attention_jax.functional import masks

    B, T, _, _ = request.shape
    rules = []
    for name, number in request.features.items():
        if name == "causal":
            rules.append(masks.causal())
        elif name == "window":
            rules.append(masks.window(number))
        elif name == "lengths":  # From nothing in the first row to all keys in the last.
            lengths = -(-jnp.arange(B) * request.keys // max(1, B - 1))
            rules.append(
                masks.key_lengths(lengths if B > 1 else jnp.array([(request.keys + 1) // 2]))
            )
        elif name == "segments":
            rules.append(masks.segments(jnp.arange(T) * 3 // T))
    return functools.reduce(lambda a, b: a & b, rules) if rules else None


def _attend(request, implementation) -> Callable:
    """`(arrays) -> outputs`, by an implementation."""
    import jax

    from attention_jax.functional import biases
    from attention_jax.functional.dot_product import dot_product_attention

    features, mask = request.features, _rules(request)
    options: dict[str, Any] = {"softcap": features.get("softcap")}
    if "dropout" in features:
        options |= {"dropout_rate": features["dropout"], "dropout_rng": jax.random.key(1)}

    def attend(arrays):
        bias = arrays.get("bias")
        if "slopes" in arrays:
            alibi = biases.alibi(arrays["slopes"])
            bias = alibi if bias is None else alibi + bias
        return dot_product_attention(
            arrays["query"],
            arrays["key"],
            arrays["value"],
            bias,
            mask,
            sinks=arrays.get("sinks"),
            implementation=implementation,
            **options,
        )

    return attend


def _naive(request) -> Callable:
    """The formula written down in the type of the inputs, as one would without a library.

    With biases, sinks and the like it is the dense path in that type.
    """
    import jax
    import jax.numpy as jnp

    exact = _attend(request, "dense")

    def attend(arrays):
        if set(request.features) - {"causal", "window", "segments"}:
            return exact(arrays)
        query, key, value = (arrays[name] for name in ("query", "key", "value"))
        groups = query.shape[-2] // key.shape[-2]
        key, value = (jnp.repeat(x, groups, axis=-2) for x in (key, value))
        logits = jnp.einsum("btnh,bsnh->bnts", query, key) * query.shape[-1] ** -0.5
        mask = _rules(request)
        if mask is not None:
            seen = mask.materialize(*logits.shape[-2:])
            logits = jnp.where(seen, logits, jnp.finfo(logits.dtype).min)
        weights = jax.nn.softmax(logits.astype(query.dtype), axis=-1)
        if mask is not None:  # A query that sees nothing has no weights.
            weights = jnp.where(seen, weights, 0)
        return jnp.einsum("bnts,bsnh->btnh", weights, value)

    return attend


def _run(request, inputs, implementation, dtype, naive=False) -> dict[str, Any]:
    """Outputs and gradients, by their names."""
    import jax

    attend = _naive(request) if naive else _attend(request, implementation)

    @jax.jit
    def run(arrays, cotangent):
        out, pull_back = jax.vjp(attend, arrays)
        (gradients,) = pull_back(cotangent.astype(out.dtype))
        return {"out": out, **gradients}

    arrays = {name: x.astype(dtype) for name, x in inputs.items() if name != "cotangent"}
    return run(arrays, inputs["cotangent"])


def _errors(found, want) -> dict[str, float]:
    """The largest error of every array over R = max(1, its largest number)."""
    import numpy as np

    errors = {}
    for name, exact in want.items():
        exact, x = np.asarray(exact, np.float64), np.asarray(found[name], np.float64)
        scale = max(1.0, float(np.abs(exact).max(initial=0)))
        error = np.abs(x - exact).max(initial=0) / scale
        errors[name] = float(error) if np.isfinite(error) else float("inf")
    return errors


def _found(request, inputs, name, want, naive) -> Found:
    try:
        result = _run(request, inputs, name, request.dtype)
    except NotImplementedError as error:
        words = " ".join(str(error).split())
        return Found(refused=words.partition("cannot do this: ")[2].partition(";")[0] or words)
    errors = _errors(result, want)

    def over(part):
        if naive is None:
            return errors[part] / (2e-6 if part == "out" else 1e-5)
        # The error of the inputs' own rounding, where the naive computation has none.
        least = 2.0 ** (-8 if request.dtype == "bfloat16" else -11)
        return errors[part] / (max(naive[part], least) * (2 if part == "out" else 3))

    gradients = max(over(part) for part in errors if part != "out")
    return Found(over("out"), gradients, _hides(request, inputs, name), _zeros(request, result))


def _hides(request, inputs, name) -> bool | None:
    """Whether outputs stay bit for bit when keys and values of the future change."""
    import jax
    import numpy as np

    T, S = request.shape[1], request.keys
    if "causal" not in request.features or min(T, S) < 2:
        return None
    middle = min(T, S) // 2
    attend = jax.jit(_attend(request, name))
    arrays = {n: x.astype(request.dtype) for n, x in inputs.items() if n != "cotangent"}
    changed = {
        n: x.at[:, middle:].set(7) if n in ("key", "value") else x for n, x in arrays.items()
    }
    before, after = (np.asarray(attend(x))[:, :middle] for x in (arrays, changed))
    return bool((before == after).all())


def _zeros(request, result) -> bool | None:
    """Whether queries that see nothing give zeros, and gradients of zero without a sink."""
    import numpy as np

    mask = _rules(request)
    if mask is None:
        return None
    B, T, _, _ = request.shape
    sees = np.asarray(mask.materialize(T, request.keys)).any(-1)  # [..., T]
    sees = np.broadcast_to(sees.reshape(-1, T), (B, T))
    if sees.all():
        return None
    found = [np.asarray(result["out"])[~sees]]
    if "sinks" not in request.features:  # Else they see their sink.
        found.append(np.asarray(result["query"])[~sees])
        found += [np.asarray(result[part])[~sees.any(-1)] for part in ("key", "value")]
    return not any(x.any() for x in found)
