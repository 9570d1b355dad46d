"""Rotary positions as configs say them."""

import dataclasses
import math
from typing import Any

from attention_jax.functional import positions
from attention_jax.interop.families.family import Config


def rotation(config: Config, kind: str) -> tuple[float, float, Any]:
    """The base, fraction and scaling of the rotary positions of a layer.

    transformers 5 keeps them in `rope_parameters`, perhaps for each kind of layer; earlier versions
    in `rope_theta`, `rope_scaling` and, for the layers with a window of Gemma 3,
    `rope_local_base_freq`.
    """
    found = config.get("rope_parameters")
    if found is not None:
        found = found.get(kind, found)
        scaling = found
    elif kind == "sliding_attention" and "rope_local_base_freq" in config:
        found, scaling = {"rope_theta": config["rope_local_base_freq"]}, None
    else:
        found, scaling = {}, config.get("rope_scaling")
    base = found.get("rope_theta", config["rope_theta"])
    fraction = found.get("partial_rotary_factor", config.get("partial_rotary_factor", 1.0))
    return float(base), fraction, None if scaling is None else _scaling(scaling, config)


def _scaling(found: Config, config: Config) -> Any:
    kind = found.get("rope_type", found.get("type", "default"))
    trained = config["max_position_embeddings"]
    original = found.get("original_max_position_embeddings", trained)
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
