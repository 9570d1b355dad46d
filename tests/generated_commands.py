"""Generated command lines of train.py, and answers to its questions."""

import contextlib
import io
import re
from unittest import mock

from generated_attention import several
from hypothesis import strategies as st
from outcomes import outcome

from attention_jax.laboratory import sweep
from attention_jax.training import build, experiment
from attention_jax.training.command import parse
from attention_jax.training.config import (
    TASKS,
    ConfigError,
    default_config,
    flatten,
    slice_settings,
    trials,
)
from attention_jax.training.launch import LAUNCHERS
from attention_jax.training.words import MECHANISMS, MLPS

LEAVES = {path: value for task in TASKS for path, value in flatten(default_config(task)).items()}
WORDS = st.one_of(
    st.sampled_from(
        [
            *("", " ", "0", "-1", "1", "2", "3", "8", "0.5", "1e-3", "nan", "-inf", "1e999"),
            *("true", "FALSE", "None", "none", "é", "☃ ☃", "a=b", "--", "-", "'", ",", "1,2"),
            *("seq_length=3", "accuracy=0.5", "loss=1e-9", "loss=", "=1", "../x", "~/x", "gs://x"),
            *("\x00", "x" * 300, "1\n2", "0x10", "1_0", "١", "2147483648", "-0", "%s", "{}", "\\"),
            *("8 16", "9" * 30),
        ]
    ),
    st.text(max_size=5),
)
# Values that go together more often than not; for other fields the default is one.
FITTING = {
    "model.name": ["multihead", "multihead", "selfhead"],
    "model.mechanism": list(MECHANISMS),
    "model.features": ["8", "16"],
    "model.num_layers": ["1", "2"],
    "model.num_heads": ["1", "2", "4"],
    "model.num_kv_heads": ["1", "2", "None"],
    "model.head_dim": ["4", "None", "3"],
    "model.mlp_ratio": ["0", "2"],
    "model.norm": ["layer", "rms", "none"],
    "model.mlp": list(MLPS),
    "model.positions": ["none", "sinusoidal", "learned", "rotary", "alibi", "relative"],
    "model.window": ["2", "0", "none"],
    "model.pattern": ["full", "strided", "blocks"],
    "model.stride": ["2", "none"],
    "model.dtype": ["float32", "bfloat16", "float16"],
    "model.short_conv": ["0", "2"],
    "model.softcap": ["0", "5"],
    "optimizer.name": ["adam", "adamw", "muon", "sgd"],
    "optimizer.schedule": ["constant", "cosine"],
    "optimizer.accumulate": ["1", "2"],
    "train.batch_size": ["8", "16"],
    "train.target": ["loss=1", "accuracy=0.5"],
    "train.slices": ["", "9", "9 12"],
    "eval.slices": ["", "9", "9 12"],
    "task.seq_length": ["16", "20"],
    "task.name": list(TASKS),
    "launcher": ["single", "pmap", "sharded"],
    "init_from": [""],
}
OF_FLAGS = {
    "model": "model.name",
    "embed_dim": "model.features",
    "num_heads": "model.num_heads",
    "learning_rate": "optimizer.learning_rate",
    "batch_size": "train.batch_size",
    "seq_length": "task.seq_length",
    "epochs": "train.epochs",
    "target": "train.target",
    "task": "task.name",
    "launcher": "launcher",
    "seed": "seed",
    "init_from": "init_from",
}
FLAGS = (*OF_FLAGS, "save_path", "workdir")
GET_CONFIG = (
    "from attention_jax.training.config import default_config\n"
    "def get_config(task='teacher'):\n    config = default_config(task)\n"
)
FILES = {
    "good.py": GET_CONFIG + "    config.train.epochs = 3\n    return config\n",
    "tiny.py": GET_CONFIG + "    config.model.features = 8\n    return config\n",
    "syntax.py": "def get_config(:\n",
    "fails.py": GET_CONFIG + "    return config.model.nothing\n",
    "exits.py": "raise SystemExit(3)\n",
    "nothing.py": "def get_config():\n    return None\n",
    "strange.py": "from ml_collections import ConfigDict\n"
    "def get_config():\n    return ConfigDict({'task': {'name': 3}})\n",
    "wrong.py": GET_CONFIG + "    config.unlock()\n    config.model = 3\n    return config\n",
    "binary.py": "\x00\x01",
    "empty.py": "",
}


def value_of(path):
    return st.sampled_from(FITTING.get(path, [str(LEAVES.get(path, ""))]))


@st.composite
def command_lines(draw):
    """Arguments of train.py, the answers to its questions, and whether the run is built."""
    task = draw(st.sampled_from(sorted(TASKS)))
    paths = sorted(flatten(default_config(task)))
    said = {"task.name": task, "train.batch_size": "8", "model.features": "8"}
    said |= {"model.num_heads": "2", "task.seq_length": "16"}
    for path in sorted(draw(st.sets(st.sampled_from(paths), max_size=4))):
        said[path] = draw(value_of(path))
    for _ in range(draw(several)):
        said[draw(st.sampled_from(paths))] = draw(WORDS)
    short = {path: flag for flag, path in OF_FLAGS.items()}
    arguments = []
    for path, text in said.items():
        flat = path in short and (path == "task.name" or draw(st.booleans()))
        arguments.append(f"--{short[path] if flat else 'config.' + path}={text}")

    def swept(path):
        values = st.lists(st.one_of(value_of(path), value_of(path), WORDS), min_size=1, max_size=2)
        return values.map(lambda values: f"--sweep={path}={','.join(values)}")

    more = st.one_of(
        st.sampled_from(paths).flatmap(swept),
        st.builds("--{}={}".format, st.sampled_from(FLAGS), WORDS),
        st.builds("--{}{}".format, st.sampled_from(["", "no", "config."]), st.sampled_from(FLAGS)),
        st.builds("--config={}".format, st.sampled_from([*FILES, "no.py", ".", "good.py:copy"])),
        st.builds("--config.{}={}".format, st.sampled_from([*paths, "model", "x.y", ""]), WORDS),
        st.sampled_from(["--interactive", "--help", "-h", "--nohelp", "--interactive=maybe"]),
        st.sampled_from(
            ["--seed", "--sweep", "--config", "--", "-", "train", "--é=1", "---seed=1"]
        ),
        st.builds("--sweep={}".format, WORDS),
        WORDS,
    )
    for argument in draw(st.lists(more, max_size=draw(several))):
        arguments.insert(draw(st.integers(0, len(arguments))), argument)
    answers = draw(st.lists(st.one_of(WORDS, st.just("")), max_size=12))
    return arguments, answers, draw(st.integers(0, 2)) == 0


def try_command(call):
    arguments, answers, built = call
    left = iter(answers)

    def answer(question):
        for text in left:
            return text
        raise EOFError

    def run():
        with (
            mock.patch("builtins.input", answer),
            contextlib.redirect_stdout(io.StringIO()),
        ):
            try:
                command = parse(["train.py", *arguments])
            except (EOFError, SystemExit) as leaving:  # After the last answer, and after --help.
                return "left" if getattr(leaving, "code", 0) == 0 else f"left with {leaving.code}"
        if not (built and is_tiny(command.config)):
            return "parsed"
        if not command.sweep:
            experiment.build(command.config)
            return "built"
        configs = trials(command.config, command.sweep)
        if len(configs) > 4 or not all(map(is_tiny, configs)):
            return "parsed"
        with build.refusals():
            sweep.build(configs, command.sweep, LAUNCHERS[command.config.launcher]())
        return "built"

    names = [*FLAGS, "config", "sweep", "interactive", "help", "Arguments", *FILES, "no.py"]
    names += [path.rpartition(".")[2] for path in LEAVES]
    names = [*map(re.escape, names), r"--\S* is unknown"]
    return outcome(run, names, documented=(ConfigError,)) or "refused"


def is_tiny(config):
    """Whether it takes no time to trace."""
    sizes = {
        path: value
        for path, value in flatten(config).items()
        if isinstance(value, int | float) and path.startswith(("model.", "task."))
    }
    changed = [x for name in ("eval", "train") for x in slice_settings(config, name).values()]
    sizes = [*sizes.values(), *(x for changes in changed for x in changes.values())]
    few = config.model.num_layers <= 2 and config.train.batch_size <= 64 and len(changed) <= 4
    return few and all(x <= 256 for x in sizes)


ALL = (command_lines(), try_command)


def write_files(place):
    """Puts the config files that command lines name into a directory, the current one then."""
    for name, text in FILES.items():
        (place / name).write_text(text)
