"""The command line: flags, sweep axes, questions. This module imports no jax."""

import difflib
import itertools
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from absl import flags
from ml_collections import ConfigDict, config_flags

from attention_jax.training.config import (
    TASKS,
    ConfigError,
    check,
    default_config,
    flatten,
    load,
    problems,
    refused,
    set_field,
    trials,
)
from attention_jax.training.files import (
    TOKENIZER,
    is_directory,
    is_hugging_face,
    is_weights,
    local_path,
    locate,
    read_config,
    trial_directory,
)
from attention_jax.training.hosts import AUTO, Hosts
from attention_jax.training.rules import (
    FLAGS,
    OPTIONAL,
    SHORT,
    fault,
    kind_words,
    label,
    read,
    shown,
    unknown,
)

_HELP = {
    "model": "multihead, selfhead, or a directory of Hugging Face, as ./gpt2",
    "embed_dim": "width of the model",
    "num_heads": "attention heads (multihead only)",
    "learning_rate": "peak step size of the optimizer",
    "batch_size": "sequences in a step, over all devices",
    "seq_length": "positions in a sequence",
    "epochs": "times config.train.steps_per_epoch steps",
    "minutes": "a budget instead of epochs: what it holds is found at the start",
    "target": "stop at a held-out metric, as accuracy=0.99 or loss=1e-3",
    "save_path": "run directory; rerun the command to resume; none: write nothing",
    "workdir": "the same as --save_path",
    "task": f"{', '.join(TASKS)}, or module:builder; the other defaults follow it",
    "launcher": "single, pmap or sharded",
    "seed": "of the parameters, the data and dropout",
    "init_from": "run, directory of Hugging Face, or file of weights, to start from",
}
_HOSTS = {
    "coordinator": "host:port of process 0, or auto: as Slurm, Open MPI or a TPU pod say",
    "num_processes": "how many processes run this command together",
    "process_id": "which one this is, from 0",
}
# The fields that flags set. --save_path and --workdir set no field: they name the run directory.
_FIELDS = {flag: path for path, flag in FLAGS.items()}
TUNING_RATE = 5e-5  # The default learning rate of parameters of Hugging Face.
_QUESTIONS = (
    *("model", "embed_dim", "num_heads", "learning_rate"),
    *("batch_size", "seq_length", "epochs", "save_path"),
)


class Command(NamedTuple):
    """The request of a command line; the run directory is not part of the config.

    Attributes:
        config: The config of the run, or the one that the trials of a sweep share.
        workdir: The run directory. None writes no files.
        sweep: The values of each swept field, by its path. Empty for a single run.
        hosts: The processes that do it together.
    """

    config: ConfigDict
    workdir: str | None
    sweep: dict[str, list[Any]]
    hosts: Hosts


def parse(argv: Sequence[str]) -> Command:
    """Reads a command line, `argv[0]` being the program's name, and asks if it says --interactive.

    Raises:
        ConfigError: In one line, the flag or field that cannot be, and what came.
        SystemExit: After `--help`.
        EOFError: The input of `--interactive` ended.
    """
    values = flags.FlagValues()
    values.set_gnu_getopt(True)  # `--config.x 5 --epochs 3`: go on after the unknown one's value.
    for name in _HELP:
        flags.DEFINE_string(name, None, "", flag_values=values)
    flags.DEFINE_string("config", None, "", flag_values=values)
    flags.DEFINE_multi_string("sweep", [], "", flag_values=values)
    for name in _HOSTS:
        flags.DEFINE_string(name, None, "", flag_values=values)
    flags.DEFINE_boolean("interactive", False, "", flag_values=values)
    flags.DEFINE_boolean("help", False, "", short_name="h", flag_values=values)
    try:
        overrides = values(list(argv), known_only=True)[1:]
    except flags.Error as error:
        raise ConfigError(str(error)) from error
    hosts = _hosts(**{name: values[name].value for name in _HOSTS})
    given = {name: values[name].value for name in _HELP if values[name].value is not None}
    places = {name: given.pop(name) for name in ("save_path", "workdir") if name in given}
    places = {_path(text, f"--{name}") for name, text in places.items()}
    if len(places) > 1:
        raise ConfigError(f"--save_path and --workdir differ: got {' and '.join(sorted(places))}.")
    workdir = places.pop() if places else None
    config = None if values.config is None else load(values.config)
    init_from = _init_from(given, overrides, config)
    _check_apart(init_from, workdir)
    if init_from and _is_hugging_face(init_from):
        config = _with_directory(init_from, config, given.get("task"), init_from)
    elif is_directory(given.get("model", "")) and not init_from:
        config = _with_directory(given["model"], config, given.get("task"))
    elif init_from and not _is_weights(init_from):
        config = _with_model_of(init_from, workdir, config, given.get("task"))
    elif config is None:
        config = default_config(given.get("task", "teacher"))
    else:
        config = _with_task(config, given.get("task"))
    if values.help:
        print(_help(argv[0], config), flush=True)
        raise SystemExit(0)
    config, overridden = _override(config, overrides)

    for name, text in given.items():
        path = _FIELDS[name]
        value = _convert(path, text)
        if path in overridden and overridden[path] != value:
            raise ConfigError(f"--{name}={text} contradicts --config.{path}={overridden[path]}.")
        set_field(config, path, value)
    said = {_FIELDS[name] for name in given} | overridden.keys()
    if config.train.minutes and "train.epochs" in said:
        raise ConfigError(
            f"--minutes={config.train.minutes} and --epochs={config.train.epochs} are two budgets: "
            "give one. --minutes=0 lets the epochs count."
        )
    sweep = _axes(values.sweep, config)
    for path in sweep:
        if path in overridden or path in {_FIELDS[name] for name in given}:
            raise ConfigError(f"--sweep={path}=... contradicts another flag for {label(path)}.")
    if values.interactive:
        fixed = {*sweep, *(["train.epochs"] if config.train.minutes else [])}
        workdir = _interview(config, workdir, fixed)
        _check_apart(config.init_from, workdir)
    if sweep:
        trials(config, sweep)
    else:
        check(config)
    if hosts.coordinator is not None:
        _check_alone(config, sweep, values.interactive)
    return Command(config, workdir, sweep, hosts)


def _hosts(coordinator, num_processes, process_id):
    """Reads the flags of a run of many processes."""
    counts = {"num_processes": num_processes, "process_id": process_id}
    if coordinator is None or coordinator == AUTO:
        for name, text in counts.items():
            if text is not None:
                needs = "--coordinator=host:port" if coordinator is None else "no auto"
                raise ConfigError(f"--{name} needs {needs}: got {shown(text)}.")
        return Hosts(coordinator)
    if not re.fullmatch(r"[^\s:]+:\d{1,5}|\[[^\s]+\]:\d{1,5}", coordinator):
        raise ConfigError(f"--coordinator must be host:port or auto: got {shown(coordinator)}.")
    numbers = []
    for name, text in counts.items():
        if text is None:
            raise ConfigError(f"--coordinator={coordinator} needs --{name}.")
        if not re.fullmatch(r"\d{1,6}", text):
            raise ConfigError(f"--{name} must be a number from 0 on: got {shown(text)}.")
        numbers.append(int(text))
    if numbers[1] >= numbers[0]:
        raise ConfigError(
            f"--process_id must be below --num_processes: got {numbers[1]} and {numbers[0]}."
        )
    return Hosts(coordinator, *numbers)


def _check_alone(config, sweep, interactive):
    """Refuses what a run of many processes cannot do."""
    if sweep:
        raise ConfigError("--sweep is for one process: got --coordinator.")
    if interactive:
        raise ConfigError("--interactive is for one process: got --coordinator.")
    if config.launcher == "single":
        raise ConfigError("--coordinator needs --launcher=pmap or --launcher=sharded: got single.")


def _with_task(config, task):
    """A config file's config, with the task of `--task` if that is another one."""
    if task is not None and config.task.name != task:
        with config.unlocked():
            config.task = default_config(task).task
    return config


def _init_from(given, overrides, config):
    """The run to start from, by the flags or else by the config file; "" for none."""
    if "init_from" in given:
        _path(given["init_from"], "--init_from")  # An empty path is an error.
        return given["init_from"]
    found = "" if config is None else config.init_from
    for argument, following in itertools.zip_longest(overrides, overrides[1:], fillvalue=""):
        if match := re.fullmatch(r"--?config\.init_from(=(.*))?", argument):
            found = following if match[1] is None else match[2]
    return found


def _is_weights(init_from):
    """Whether it is a file, which holds parameters but no config."""
    with refused():
        return is_weights(local_path(init_from, "--init_from"))


def _is_hugging_face(init_from):
    with refused():
        return is_hugging_face(local_path(init_from, "--init_from"))


def _check_apart(init_from, workdir):
    """Refuses a run that would start from its own directory."""
    if not init_from or workdir is None:
        return
    with refused():
        theirs = os.path.realpath(local_path(init_from, "--init_from"))
    if theirs == os.path.realpath(workdir):
        raise ConfigError(
            f"--init_from and --workdir must be two directories: got {workdir} for both. To go on "
            "with the run there, repeat its command."
        )


def _with_model_of(init_from, workdir, config, task):
    """A config with the model of another run, and the task settings that it depends on.

    Args:
        init_from: The directory of that run.
        workdir: The directory of the new run, or None. If it has noted a config, that config
            counts, so that the run continues even if the other run is gone or has changed.
        config: From a config file, or None. Its fields count if they differ from the defaults.
        task: The value of `--task`, or None. Without it and a config file, the other run's task.

    Raises:
        ConfigError: The other run has no config, or one with fields or values unknown here.
    """
    if config is None:
        said = set()
    else:
        defaults = flatten(default_config(config.task.get("name")))
        said = {path for path, value in flatten(config).items() if value != defaults.get(path)}
        config = _with_task(config, task)
    with refused(f"--init_from={init_from}: "):
        theirs = _noted(init_from, workdir)
        their_task = theirs.pop("task.name", None)
        if config is None:
            config = default_config(their_task if task is None else task)
        known = flatten(config)
        for path, value in theirs.items():
            is_known = path in known
            if path.startswith("task."):
                wanted = config.task.name == their_task or (path == "task.vocab_size" and is_known)
            else:
                wanted = path.startswith("model.")
            if not wanted or path in said:
                continue
            if not is_known:
                raise ConfigError(f"its config.{path}={value!r} is unknown here.")
            if words := fault(path, value, known[path]):
                raise ConfigError(f"its config.{path} {words}: got {shown(value)}.")
            set_field(config, path, value)
    return config


def _with_directory(place, config, task, init_from=""):
    """A config with the model of a directory of Hugging Face, and for text with its tokenizer.

    Args:
        place: The directory.
        config: From a config file, or None. Its values count where they differ from the defaults.
        task: The value of `--task`, or None: without a config file `text`.
        init_from: The directory, if the parameters come from it. They need a lower rate.
    """
    config = default_config(task or "text") if config is None else _with_task(config, task)
    defaults = default_config(config.task.name)
    if config.model.name == defaults.model.name:
        config.model.name = place if is_directory(place) else f"./{place}"
    if init_from and config.optimizer.learning_rate == defaults.optimizer.learning_rate:
        config.optimizer.learning_rate = TUNING_RATE
    file = Path(place, TOKENIZER)
    has_one = os.path.isfile(os.path.expanduser(file))
    if has_one and config.task.name == "text" and config.task.tokens == defaults.task.tokens:
        config.task.tokens = str(file)
    return config


def _noted(init_from, workdir):
    """The fields of the run to start from."""
    if workdir is not None and os.path.exists(Path(workdir) / "config.json"):
        ours = flatten(read_config(Path(workdir)))
        if ours.get("init_from") == init_from:
            return ours
    place = local_path(init_from, "it")
    if not place.exists():
        hint = ""
        if not place.parent.is_dir() and re.fullmatch(r"[\w.-]+/[\w.-]+", init_from):
            hint = f" Nothing is downloaded: write `hf download {place} --local-dir {place.name}`."
        raise ValueError(f"there is no such directory.{hint}")
    run, trial = locate(place)
    return flatten(read_config(run if trial is None else trial_directory(run, trial)))


def _axes(texts, config):
    """Reads `--sweep` flags, "field=value,value,..." each."""
    axes, leaves = {}, flatten(config)
    for text in texts:
        name, equals, listed = text.partition("=")
        path = name.strip().removeprefix("config.")
        path = _FIELDS.get(path, path)
        if not (equals and listed.strip()):
            raise ConfigError(f"--sweep must be field=value,value,...: got {shown(text)}.")
        if path not in leaves:
            raise ConfigError(f"--sweep={text}: {unknown(path, leaves)}")
        if path.endswith(".slices"):
            raise ConfigError(f"--sweep={text}: commas are part of {path}: sweep it from Python.")
        if path in axes:
            raise ConfigError(f"--sweep names config.{path} twice.")
        axes[path] = [
            _value(path, value.strip(), leaves[path], f"--sweep: config.{path}")
            for value in listed.split(",")
        ]
    return axes


def _override(config, arguments):
    """Applies `--config.field=value` arguments; returns the config and the fields by path."""
    known, paths = flatten(config), []
    for argument in arguments:
        if match := re.match(r"--?(no)?config\.([^=]*)", argument):
            paths.append(match[2])
            inner = [f"--config.{name}" for name in known if name.startswith(f"{match[2]}.")]
            if inner:
                raise ConfigError(
                    f"config.{match[2]} is no field, but has some: {inner[0]} and the like."
                )
            if match[2] not in known:
                raise ConfigError(unknown(match[2], known))
        elif argument.startswith("-"):
            name = argument.lstrip("-").split("=")[0]
            meant = SHORT.get(name, name)
            close = difflib.get_close_matches(
                meant, [*_HELP, *_HOSTS, "config", "interactive", "sweep"], n=2
            )
            # `--path` is rather the field of that name than `--save_path`.
            fields = [path for path in known if path.rpartition(".")[2] == meant]
            close = [f"config.{path}" for path in fields] or close
            close = [meant] if meant in _HELP else close
            hint = f" Did you mean {' or '.join(f'--{flag}' for flag in close)}?" if close else ""
            raise ConfigError(f"--{name} is unknown.{hint}")

    # config_flags reads None only as a word: an optional field is set here.
    nothing = [f"--config.{path}={word}" for path in OPTIONAL for word in ("None", "none")]
    for argument in set(arguments) & set(nothing):
        set_field(config, argument.partition(".")[2].partition("=")[0], None)
    arguments = ["train.py", *(a for a in arguments if a not in nothing)]
    values = flags.FlagValues()
    try:
        config_flags.DEFINE_config_dict(
            "config", config, flag_values=values, sys_argv=arguments, lock_config=True
        )
        rest = values(arguments)[1:]
    except flags.IllegalFlagValueError as error:
        path, text = re.match(r"(?s)flag --config\.([^=]*)=(.*?): ", str(error)).groups()
        words = kind_words(path, known[path])
        raise ConfigError(f"config.{path} {words}: got {shown(text)}.") from error
    except flags.Error as error:
        raise ConfigError(str(error)) from error
    if rest:
        raise ConfigError(f"Arguments start with --: got {shown(rest[0])}.")
    leaves = flatten(config)
    return config, {path: leaves[path] for path in paths}


def _value(path, text, default, name):
    """Reads the value of a field from text; `name` is the user's name for the field."""
    try:
        return read(path, text, default)
    except ValueError as error:
        raise ConfigError(f"{name} {error}") from error


def _convert(path, text):
    return _value(path, text, flatten(default_config())[path], label(path))


def _path(text, name):
    with refused():
        return str(local_path(text, name))


def _help(program, config):
    """The text of --help, with the defaults of a config."""
    defaults = flatten(config)
    lines = [
        f"usage: {program} [--flag=value ...] [--config=FILE] [--config.any.field=value ...]",
        "",
        "Trains an attention model. A config file overrides the defaults, flags override both.",
        "",
    ]
    for name, words in _HELP.items():
        default = defaults[_FIELDS[name]] if name in _FIELDS else ""
        default = "none" if default in ("", None) else default
        lines.append(f"  --{name:14} {words} (default {default})")
    lines += [f"  --{name:14} {words}" for name, words in _HOSTS.items()]
    lines += [
        "  --sweep          field=value,value,...: all combinations at once; repeatable",
        "  --interactive    ask for each parameter",
        "  --config         Python file with get_config(): see configs/ (default none)",
        "",
        f"Fields for --config.any.field=value, with the defaults of --task={config.task.name}"
        "; another --task or --config beside --help has its own:",
        "",
    ]
    return "\n".join(lines + [f"  {path} = {value}" for path, value in defaults.items()])


def _interview(config, workdir, fixed):
    """Asks for each parameter, again after a wrong answer; returns the run directory.

    A default that an earlier answer has made invalid is not offered.

    Args:
        config: Is changed by the answers.
        workdir: The run directory that is offered.
        fixed: The fields that other flags decide, which it does not ask for.
    """
    if sys.stdin is None:
        raise EOFError
    if hasattr(sys.stdin, "reconfigure"):  # So that no byte of an answer stops the interview.
        sys.stdin.reconfigure(errors="backslashreplace")
    print("Enter keeps what stands in brackets; Ctrl-D leaves.")
    of_text = config.task.name == "text" and not config.task.path
    for name in ("path", *_QUESTIONS) if of_text else _QUESTIONS:
        path = "task.path" if name == "path" else _FIELDS.get(name)
        if path in fixed or (name == "num_heads" and config.model.name == "selfhead"):
            continue
        if path is None:
            while answer := input(f"{name} [{workdir or 'none'}]: ").strip():
                try:
                    workdir = None if answer == "none" else _path(answer, name)
                    break
                except ConfigError as error:
                    print(f"  {error}")
            continue
        before = flatten(config)[path]
        reason = _reason(config, path)
        offered = "the help topics of Python" if name == "path" else before
        question = f"{name}: " if reason else f"{name} [{offered}]: "
        while True:
            if reason:
                print(f"  {reason}")
            answer = input(question).strip()
            try:
                value = _value(path, answer, before, label(path)) if answer else before
                set_field(config, path, value)
            except ConfigError as error:
                reason = str(error)
            else:
                reason = _reason(config, path)
                if name == "path" and answer and not os.path.isfile(os.path.expanduser(answer)):
                    reason = f"{answer} is no file."
            if not reason:
                break
    return workdir


def _reason(config, path):
    """Why the value of a field is invalid, or None."""
    return next((sentence for place, sentence in problems(config) if place == path), None)
