"""Language models in Hugging Face's directories: `config.json`, `*.safetensors`, `tokenizer.json`.

Neither torch nor transformers is needed. The families are GPT-2, GPT-NeoX (Pythia), Llama, Mistral,
Qwen 2 and 3, Gemma, Gemma 2 and the text models of Gemma 3.
"""

import contextlib
import functools
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from attention_jax.checks import check_dtype, told
from attention_jax.interop.families import Family, Tensor, describe, make_model, model_spec
from attention_jax.models import SequenceModel
from attention_jax.types import PyTree

# The types of tensors, by the names of safetensors.
_WRAPPERS = ("_orig_mod.", "module.")  # Of torch.compile and of DataParallel.
_KINDS = {"F16": "float16", "BF16": "bfloat16", "F32": "float32", "F64": "float64"}
SPECIAL_TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")
_CONFIG, _WEIGHTS, _INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"


def load(directory: str | os.PathLike, *, dtype: Any = None) -> tuple[SequenceModel, PyTree]:
    """Loads a language model from a local directory.

    Args:
        directory: Has `config.json`, and `model.safetensors` or its parts with their index.
        dtype: The type of the parameters. None keeps that of the file; if it has several, the
            smallest type that holds all of them.

    Returns:
        The model and its parameters: `model.apply({"params": params}, tokens)` gives the logits
        `[..., T, vocab_size]`. Dropout is left out.

    Raises:
        FileNotFoundError: A file is missing.
        ValueError: A file is broken, or does not fit the config.
        NotImplementedError: The config asks for what no part of this package does.
    """
    directory = Path(directory).expanduser()
    config = read_config(directory)
    if dtype is not None:
        check_dtype("dtype", dtype)
        dtype = _representable("dtype", dtype)
    with _told_of(directory / _CONFIG):
        family, model = make_model(config, jnp.dtype(dtype or jnp.float32))
        shapes = _shapes(model)
    with contextlib.ExitStack() as stack:
        files = _open(directory, stack)
        names = _names(files, family)
        wanted = list(family.tensors(model))
        if dtype is None:
            kinds = {_kind(files, _name_of(x, names, directory), directory) for x in wanted}
            dtype = functools.reduce(jnp.promote_types, sorted(kinds))
            dtype = _representable(f"{directory}: the type of the parameters", dtype)
            _, model = make_model(config, dtype)
        flat = {}
        for tensor in wanted:
            name = _name_of(tensor, names, directory)
            flat |= _load(tensor, _read(files, name, directory), shapes, dtype, directory)
        _check_unused(directory, names, wanted, family, model)
        if model.head is None:
            _check_tied(directory, files, names, wanted[0].name)
    return model, unflatten_dict(flat, sep="/")


def read_config(directory: str | os.PathLike, name: str = _CONFIG) -> dict[str, Any]:
    """The contents of a directory's `config.json`, which `model_of` takes, or of another file.

    Raises:
        FileNotFoundError: There is none.
        ValueError: It is no JSON, or no object.
    """
    return _read_json(Path(directory).expanduser() / name)


def model_of(config: Mapping[str, Any], directory: str | os.PathLike) -> SequenceModel:
    """The model that a `config.json` describes, with parameters of float32.

    Args:
        config: Its contents.
        directory: Where it stands, for errors.

    Raises:
        ValueError, NotImplementedError: As `load`.
    """
    with _told_of(Path(directory).expanduser() / _CONFIG):
        return make_model(config, jnp.dtype(jnp.float32))[1]


def _name_of(tensor: Tensor, names: dict[str, str], directory: Path) -> str:
    if tensor.name not in names:
        some = ", ".join(sorted(names.values())[:3]) or "none at all"
        raise ValueError(f"{directory} has no tensor {tensor.name}; it has {some}, ...")
    return names[tensor.name]


def _representable(name: str, dtype: Any) -> jnp.dtype:
    """The type, which is not float64 unless jax has it."""
    if jax.dtypes.canonicalize_dtype(dtype) != dtype:
        raise ValueError(
            f"{name} is {jnp.dtype(dtype)}, which jax does not compute in unless jax_enable_x64 is "
            "set. dtype=jnp.float32 narrows."
        )
    return jnp.dtype(dtype)


def _kind(files: dict[str, Any], name: str, directory: Path) -> str:
    """The type of a tensor; those of fewer bits have scales, of which a model knows nothing."""
    kind = files[name].get_slice(name).get_dtype()
    if kind not in _KINDS:
        raise NotImplementedError(
            f"{directory}: {name} is of the type {kind}, as quantized weights are; it must be "
            f"{', '.join(_KINDS)}."
        )
    return _KINDS[kind]


def _read(files: dict[str, Any], name: str, directory: Path) -> np.ndarray:
    _kind(files, name, directory)
    return files[name].get_tensor(name)


def _load(tensor, array, shapes, dtype, directory) -> dict[str, jax.Array]:
    try:
        parts = tensor.load(array)
    except (ValueError, IndexError):
        parts = (array,)
    wanted = [shapes[path] for path in tensor.paths]
    if [part.shape for part in parts] != wanted:
        raise ValueError(
            f"{directory}: {tensor.name} has shape {array.shape}, which does not fit the config."
        )
    return {path: jnp.asarray(part, dtype) for path, part in zip(tensor.paths, parts, strict=True)}


def save(directory: str | os.PathLike, model: SequenceModel, params: PyTree, **config: Any) -> None:
    """Writes a directory that transformers loads.

    Args:
        directory: Is made if it does not exist.
        model: One that `load` gave, or one of the same parts.
        params: Its parameters.
        **config: Further fields of `config.json`, as `eos_token_id=2` and
            `max_position_embeddings=8192`, which a model does not know. They must not change the
            model. Without `eos_token_id` no token ends a text.

    Raises:
        NotImplementedError: No family has this model.
        TypeError: A field is none of JSON's types.
        ValueError: The parameters are not those of the model, or a field changes the model.
    """
    kind, family, fields = describe(model)
    tokens = dict.fromkeys(SPECIAL_TOKENS)  # The defaults of transformers may be letters here.
    fields = {"architectures": [family.architecture], "model_type": kind} | tokens | fields
    for name, value in config.items():
        if name in ("architectures", "model_type", "dtype", "torch_dtype"):
            raise ValueError(f"{name}={value!r}: save says {name} by itself.")
        _check_field(name, value, fields, model)
    _save(Path(directory).expanduser(), family, model, params, fields | config)


def save_as(directory: str | os.PathLike, config: Mapping[str, Any], params: PyTree) -> None:
    """Writes a directory with the `config.json` of another one, and with other parameters.

    Args:
        directory: Is made if it does not exist.
        config: The contents of the other `config.json`. Its type becomes that of the parameters.
        params: Of the model that it describes.

    Raises:
        ValueError, NotImplementedError: The config is broken, or the parameters are not those of
            its model.
    """
    directory = Path(directory).expanduser()
    with _told_of(directory / _CONFIG):
        family, model = make_model(config, jnp.dtype(jnp.float32))
    fields = {name: value for name, value in config.items() if name != "torch_dtype"}
    _save(directory, family, model, params, fields)


def _save(directory, family, model, params, fields):
    """Writes the parameters, and the fields of `config.json` with their type."""
    flat, shapes = flatten_dict(params, sep="/"), _shapes(model)
    if {path: x.shape for path, x in flat.items()} != shapes:
        differing = sorted(set(flat) ^ set(shapes)) or [
            path for path in shapes if flat[path].shape != shapes[path]
        ]
        raise ValueError(f"params are not those of the model: see {', '.join(differing[:4])}.")
    arrays = {}
    for tensor in family.tensors(model):
        parts = [np.asarray(flat[path]) for path in tensor.paths]
        arrays[tensor.name] = np.ascontiguousarray(tensor.save(*parts))
    kinds = sorted({str(x.dtype) for x in arrays.values()})
    for name in kinds:
        if name not in _KINDS.values():
            raise NotImplementedError(f"params must be {', '.join(_KINDS.values())}, got {name}.")
    fields = fields | {"dtype": str(functools.reduce(jnp.promote_types, kinds))}
    text = json.dumps(fields, indent=2) + "\n"
    directory.mkdir(parents=True, exist_ok=True)

    from safetensors.numpy import save_file

    _replace(directory / _WEIGHTS, lambda path: save_file(arrays, path, {"format": "pt"}))
    (directory / _INDEX).unlink(missing_ok=True)  # Some tools would read the earlier parts by it.
    _replace(directory / _CONFIG, lambda path: path.write_text(text, encoding="utf-8"))


def _check_field(name: str, value: Any, fields: dict[str, Any], model: SequenceModel) -> None:
    """Raises an error for a field that JSON has not, or that changes the model."""
    try:
        json.dumps(value, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise TypeError(f"{name} must be of JSON's types, got {told(value)}.") from error
    try:
        _, changed = make_model(fields | {name: value}, model.embedding.param_dtype)
    except (TypeError, ValueError, KeyError, NotImplementedError) as error:
        raise ValueError(f"{name}={told(value)}: {error}") from error
    if model_spec(changed) != model_spec(model):
        raise ValueError(f"{name}={value!r} would change the model.")


def tokenizer(directory: str | os.PathLike) -> Any:
    """The `tokenizers.Tokenizer` of a directory: `.encode(text).ids`, `.decode(ids)`.

    It neither pads nor truncates, whatever the file says of the batches of its training.

    Raises:
        FileNotFoundError: The directory has no `tokenizer.json`.
        ModuleNotFoundError: The library is not installed.
        ValueError: The file is broken.
    """
    path = Path(directory).expanduser() / "tokenizer.json"
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist.")
    try:
        from tokenizers import Tokenizer
    except ModuleNotFoundError:
        raise ModuleNotFoundError(
            "interop.huggingface.tokenizer needs the library tokenizers: install "
            '"attention-jax[huggingface]".'
        ) from None
    try:
        found = Tokenizer.from_file(str(path))
    except Exception as error:  # The library has no type of its own for what it raises.
        raise ValueError(f"{path} is no tokenizer: {error}") from error
    found.no_padding()
    found.no_truncation()
    return found


@contextlib.contextmanager
def _told_of(path: Path) -> Iterator[None]:
    """Says in which file the fault lies."""
    try:
        yield
    except (TypeError, ValueError, NotImplementedError) as error:
        raise type(error)(f"{path}: {error}") from error
    except KeyError as error:
        raise ValueError(f"{path}: {error.args[0]} is missing.") from error
    except ArithmeticError as error:
        raise ValueError(f"{path}: a number is out of its range: {error}.") from error


def _read_json(path: Path) -> dict[str, Any]:
    if not path.parent.is_dir():
        name, hint = path.parent, ""
        if not name.is_absolute() and len(name.parts) == 2:  # As names on the hub are.
            hint = f" Nothing is downloaded: write `hf download {name} --local-dir {name.name}`."
        raise FileNotFoundError(f"{name} is no directory.{hint}")
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist.")
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is no JSON: {error}") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path} must hold an object, got {told(found)}.")
    return found


def _open(directory: Path, stack: contextlib.ExitStack) -> dict[str, Any]:
    """The open file of every tensor, by its name."""
    from safetensors import SafetensorError, safe_open

    # As in transformers, a whole file comes before an index, which may be left from earlier.
    places = {}
    if not (directory / _WEIGHTS).is_file() and (directory / _INDEX).is_file():
        places = _read_json(directory / _INDEX).get("weight_map")
        for part in places.values() if isinstance(places, dict) else [None]:
            if not isinstance(part, str) or Path(part).name != part:
                raise ValueError(
                    f"{directory / _INDEX}: weight_map must name files of its directory, got "
                    f"{told(part)}."
                )
    files = {}
    for part in sorted(set(places.values())) or [_WEIGHTS]:
        path = directory / part
        if not path.is_file():
            other = next(directory.glob("*.bin"), None)
            hint = f" It has {other.name}: save it by transformers as safetensors." if other else ""
            raise FileNotFoundError(f"{path} does not exist.{hint}")
        try:
            file = stack.enter_context(safe_open(path, framework="numpy"))
        except SafetensorError as error:
            raise ValueError(f"{path} is no file of safetensors: {error}") from error
        # Two parts may hold a tensor, one of them from before more training: the index decides.
        for name in set(file.keys()):
            if name not in files or places.get(name) == part:
                files[name] = file
    return files


def _names(files: dict[str, Any], family: Family) -> dict[str, str]:
    """The tensors' names as the family has them, with the names that the files have.

    Models without a head were saved without the prefix. `torch.compile` and `DataParallel` put a
    prefix of their own before all names.
    """
    inner = {name: name for name in files}
    wraps = lambda prefix: all(name.startswith(prefix) for name in inner)
    while inner and (wrapper := next(filter(wraps, _WRAPPERS), None)):
        inner = {name.removeprefix(wrapper): file for name, file in inner.items()}
    prefix = family.prefix
    has_prefix = any(name.startswith(prefix) for name in inner)
    heads = ("lm_head.", "embed_out.")
    full = lambda name: name if has_prefix or name.startswith(heads) else prefix + name
    return {full(name): file for name, file in inner.items()}


def _check_unused(directory, names, wanted, family, model) -> None:
    """Raises ValueError for a tensor that the model has no place for."""
    used = {tensor.name for tensor in wanted}
    if model.head is None:  # A copy of the embedding.
        used |= {"lm_head.weight", "embed_out.weight"}
    left = [name for name in names if name not in used and not name.endswith(family.unused)]
    if left:
        raise ValueError(
            f"{directory} has {len(left)} tensors that its config has no place for: "
            f"{', '.join(sorted(left)[:4])}."
        )


def _check_tied(directory, files, names, embedding) -> None:
    """Raises ValueError for a head that is no copy of the embedding, as after training it alone."""
    for head in ("lm_head.weight", "embed_out.weight"):
        if head in names:
            pair = [_read(files, names[name], directory) for name in (head, embedding)]
            if not np.array_equal(*pair, equal_nan=True):
                raise ValueError(
                    f"{directory}: {head} differs from {embedding}, but tie_word_embeddings is "
                    "true: set it to false in config.json, or remove the tensor."
                )


def _shapes(model: SequenceModel) -> dict[str, tuple[int, ...]]:
    """The shapes of the parameters, by their paths."""
    tokens = jax.ShapeDtypeStruct((1, 1), jnp.int32)
    found = jax.eval_shape(model.init, jax.random.key(0), tokens)["params"]
    return {path: x.shape for path, x in flatten_dict(found, sep="/").items()}


def _replace(path: Path, write) -> None:
    """Writes a file beside its place, and puts it there when it is whole."""
    part = path.with_name(f".{path.name}.part")
    try:
        write(part)
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)
