"""Rotary positions as configs say them."""

import dataclasses
import math
from typing import Any

from attention_jax.checks import told
from attention_jax.functional import positions
from attention_jax.interop.families.family import Config

_NUMBERS = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")


def rotation(config: Config, kind: str) -> tuple[float, float, Any]:
    """The base, fraction and scaling of the rotary positions of a layer.

    transformers 5 keeps them in `rope_parameters`, perhaps for each kind of layer; earlier versions
    in `rope_theta`, `rope_scaling` and, for the layers with a window of Gemma 3,
    `rope_local_base_freq`.
    """
    for name in ("rope_parameters", "rope_scaling"):
        if not isinstance(config.get(name), dict | None):
            raise ValueError(f"{name} must be an object, got {told(config[name])}.")
    found = config.get("rope_parameters")
    nested = bool(found) and kind in found
    if found:
        found = found.get(kind, found)
        if not isinstance(found, dict):
            raise ValueError(f"rope_parameters: {kind} must be an object, got {told(found)}.")
        _check_one_source(found, config.get("rope_scaling"), kind)
        scaling = found
    elif kind == "sliding_attention" and "rope_local_base_freq" in config:
        found, scaling = {"rope_theta": config["rope_local_base_freq"]}, None
    else:
        found, scaling = {}, config.get("rope_scaling")
    base = found.get("rope_theta", config["rope_theta"])
    fraction = found.get("partial_rotary_factor", config.get("partial_rotary_factor", 1.0))
    _check_numbers({"rope_theta": base, "partial_rotary_factor": fraction})
    return float(base), fraction, None if scaling is None else _scaling(scaling, config, nested)


def _check_one_source(parameters: Config, scaling: Config | None, kind: str) -> None:
    """Refuses a `rope_scaling` that says more than the `rope_parameters` beside it.

    Model cards advise to add `rope_scaling` to the config; transformers 5 then forgets the other.
    """
    if scaling is None or kind == "sliding_attention":
        return
    named = lambda fields: (
        {"rope_type": fields.get("type", "default")}
        | {name: x for name, x in fields.items() if name != "type"}
    )
    parameters, scaling = named(parameters), named(scaling)
    more = sorted(name for name, x in scaling.items() if parameters.get(name) != x)
    if more:
        raise ValueError(
            f"rope_scaling and rope_parameters differ in {', '.join(more)}: put all fields into "
            "rope_parameters."
        )


def _check_numbers(fields: Config) -> None:
    for name, x in fields.items():
        if isinstance(x, bool) or not isinstance(x, int | float):
            raise ValueError(f"{name} must be a number, got {told(x)}.")


def _scaling(found: Config, config: Config, nested: bool = False) -> Any:
    kind = found.get("rope_type", found.get("type", "default"))
    trained = config["max_position_embeddings"]
    # As in transformers the field of the whole config comes first, but not for kinds of layers.
    original = found.get("original_max_position_embeddings", trained)
    if not nested:
        original = config.get("original_max_position_embeddings", original)
    if kind == "yarn" and found.get("factor", ...) is None:
        _check_numbers({"original_max_position_embeddings": original})
        found = {**found, "factor": trained / original}
    _check_numbers({name: x for name, x in found.items() if name in _NUMBERS})
    if kind == "default":
        return None
    if kind == "linear":
        return positions.linear(found["factor"])
    if kind == "dynamic":
        return positions.dynamic(found["factor"], trained)
    if kind == "llama3":
        low, high = found["low_freq_factor"], found["high_freq_factor"]
        return positions.llama3(found["factor"], low, high, original)
    if kind == "yarn":
        return positions.yarn(
            found["factor"],
            original,
            found.get("beta_fast") or 32.0,
            found.get("beta_slow") or 1.0,
            _yarn_factor(found),
            found.get("truncate", True),
        )
    raise NotImplementedError(f"rope_type is {kind!r}, which has no rotation here.")


def _yarn_factor(found: Config) -> float | None:
    if found.get("attention_factor") is not None:
        return found["attention_factor"]
    mscale, of_all = found.get("mscale"), found.get("mscale_all_dim")
    if not (mscale and of_all):
        return None
    grown = lambda m: 0.1 * m * math.log(found["factor"]) + 1 if found["factor"] > 1 else 1.0
    return grown(mscale) / grown(of_all)


def rope_scaling(scaling: Any) -> dict[str, Any] | None:
    """The `rope_scaling` of a config, the inverse of `_scaling`."""
    if scaling is None:
        return None
    names = {
        "low_frequency_factor": "low_freq_factor",
        "high_frequency_factor": "high_freq_factor",
        "original_length": "original_max_position_embeddings",
        "fast_turns": "beta_fast",
        "slow_turns": "beta_slow",
    }
    fields = {names.get(name, name): x for name, x in dataclasses.asdict(scaling).items()}
    return {"rope_type": type(scaling).__name__} | fields


def trained_length(scaling: Any) -> int:
    """`max_position_embeddings`, which only the dynamic scaling uses."""
    return scaling.original_length if isinstance(scaling, positions.dynamic) else 131_072
