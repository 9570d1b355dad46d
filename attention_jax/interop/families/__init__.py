"""Families of language models as Hugging Face's configs name them, made of this package's parts.

A family is a pair of functions, config -> model and model -> config, and the names of its tensors.
"""

from typing import Any

from attention_jax.checks import told
from attention_jax.interop.families.family import (
    REQUIRED,
    Config,
    Family,
    Tensor,
    differences,
    model_spec,
)
from attention_jax.interop.families.gpt import GPTS
from attention_jax.interop.families.llama import LLAMAS
from attention_jax.models import SequenceModel

__all__ = ["FAMILIES", "Family", "Tensor", "describe", "make_model", "model_spec"]

# Fields of the rotary positions that a file may have and `Family.defaults` may lack.
ROTARY = ("rope_theta", "partial_rotary_factor", "original_max_position_embeddings")
# Fields that may be null: those whose default is None, and these. Of the former these are sizes.
NULLABLE = (
    *("num_key_value_heads", "head_dim", "sliding_window", "hidden_activation"),
    *("attn_logit_softcapping", "final_logit_softcapping"),
)
OPTIONAL_SIZES = ("num_key_value_heads", "head_dim", "n_inner")
# By `model_type`. `describe` takes the first that fits.
FAMILIES = GPTS | LLAMAS
# Families that transformers loads only where the heads divide the width, whatever their size.
WHOLE_HEADS = ("llama", "gemma2", "gemma3_text")


def make_model(config: Config, dtype: Any) -> tuple[Family, SequenceModel]:
    """The model that a `config.json` describes.

    Raises:
        ValueError: A field is missing, or does not fit another.
        NotImplementedError: The family, or what a field asks for, has no model here.
    """
    if "text_config" in config:
        raise NotImplementedError(
            "text_config belongs to a model of text and images, which has no model here."
        )
    kind = config.get("model_type")
    if not isinstance(kind, str) or kind not in FAMILIES:
        raise NotImplementedError(f"model_type must be one of {tuple(FAMILIES)}, got {kind!r}.")
    family = FAMILIES[kind]
    if config.get("quantization_config") is not None:
        raise NotImplementedError(
            "quantization_config asks for quantized weights, which no part of this package has."
        )
    for name, values in family.only.items():
        if name in config and config[name] not in values:
            raise NotImplementedError(f"{name} must be {values[0]}, got {config[name]!r}.")
    known = {name: config.get(name, default) for name, default in family.defaults.items()}
    for name, value in known.items():
        if value is REQUIRED:
            raise ValueError(f"{name} is missing.")
        default = family.defaults[name]
        wanted = int if default is REQUIRED or name in OPTIONAL_SIZES else type(default)
        wanted = (int, float) if wanted is float else wanted
        if value is None and (default is None or name in NULLABLE):
            continue
        if default is None and name not in OPTIONAL_SIZES:
            continue  # What reads it knows its types.
        if not isinstance(value, wanted) or isinstance(value, bool) != (wanted is bool):
            raise ValueError(f"{name} must be of the type {_word(wanted)}, got {told(value)}.")
        least = 0 if name == "max_window_layers" else 1
        if wanted is int and not least <= value < 2**31:
            raise ValueError(f"{name} must be a size that a model can have, got {told(value)}.")
    for name in ROTARY:
        if name in config:
            known[name] = config[name]
    return family, family.model(known, dtype)


def _word(kinds: type | tuple[type, ...]) -> str:
    return " or ".join(kind.__name__ for kind in (kinds if isinstance(kinds, tuple) else (kinds,)))


def describe(model: SequenceModel) -> tuple[str, Family, dict[str, Any]]:
    """The `model_type`, the family and the config of a model.

    Raises:
        NotImplementedError: No family has this model.
        TypeError: It is no `SequenceModel`.
    """
    if not isinstance(model, SequenceModel):
        raise TypeError(f"model must be a SequenceModel, got {type(model).__name__}.")
    ours, closest = model_spec(model), None
    for kind, family in FAMILIES.items():
        try:
            found = family.config(model)
            config = {name: x for name, x in found.items() if name in family.defaults}
            _, made = make_model({"model_type": kind} | config, model.embedding.param_dtype)
            differing = list(differences(model_spec(made), ours))
        except (AttributeError, KeyError, TypeError, ValueError, NotImplementedError):
            continue  # A part of the model is not one of this family.
        if kind in WHOLE_HEADS and config["hidden_size"] % config["num_attention_heads"]:
            continue
        if not differing:
            return kind, family, config
        if closest is None or len(differing) < len(closest[1]):
            closest = kind, differing
    if closest is None:
        raise NotImplementedError(f"model is of none of the families {', '.join(FAMILIES)}.")
    kind, differing = closest
    path, theirs, own = differing[0]
    raise NotImplementedError(
        f"model is of no family that transformers has: {kind} comes closest, and has {path}="
        f"{_named(theirs)}, not {_named(own)}."
    )


def _named(part: Any) -> str:
    """A result of `spec` in a word."""
    return part["type"].__name__ if isinstance(part, dict) else told(part)
