"""The command line: what it accepts, what it refuses, and its messages."""

import inspect
import json
import sys

import pytest

from attention_jax.training.command import parse
from attention_jax.training.config import (
    DEFAULTS,
    TASKS,
    ConfigError,
    check,
    default_config,
    flatten,
    problems,
    slice_settings,
    trials,
)


def config_of(*arguments):
    return parse(["train.py", *arguments]).config


def changed(*arguments, task="teacher"):
    """The fields that a command line changes."""
    before, after = flatten(default_config(task)), flatten(config_of(*arguments))
    assert before.keys() == after.keys()
    return {path: after[path] for path in after if after[path] != before[path]}


def refusal(*arguments):
    with pytest.raises(ConfigError) as error:
        parse(["train.py", *arguments])
    assert "\n" not in str(error.value)
    return str(error.value)


def write_config(path, *lines):
    path.write_text(
        "from attention_jax.training.config import default_config\n\n\n"
        "def get_config(task='teacher'):\n    config = default_config(task)\n"
        + "".join(f"    {line}\n" for line in lines)
        + "    return config\n"
    )
    return str(path)


def test_defaults_are_those_of_the_original():
    config = config_of()
    assert (config.model.name, config.model.features, config.model.num_heads) == (
        "multihead",
        64,
        8,
    )
    assert config.optimizer.learning_rate == 0.001
    assert (config.train.batch_size, config.task.seq_length, config.train.epochs) == (32, 10, 100)
    assert parse(["train.py"]).workdir is None


@pytest.mark.parametrize(
    ("flag", "path", "value"),
    [
        ("--model=selfhead", "model.name", "selfhead"),
        ("--embed_dim=128", "model.features", 128),
        ("--num_heads=16", "model.num_heads", 16),
        ("--learning_rate=0.0001", "optimizer.learning_rate", 0.0001),
        ("--batch_size=64", "train.batch_size", 64),
        ("--seq_length=20", "task.seq_length", 20),
        ("--epochs=200", "train.epochs", 200),
        ("--launcher=pmap", "launcher", "pmap"),
        ("--seed=7", "seed", 7),
        ("--target=loss=1e-3", "train.target", "loss=1e-3"),
    ],
)
def test_each_flat_flag_sets_its_field(flag, path, value):
    assert changed(flag) == {path: value}
    assert changed(*flag.split("=", 1)) == {path: value}


def test_save_path_and_workdir_are_one():
    assert parse(["train.py", "--save_path=a"]).workdir == "a"
    assert parse(["train.py", "--workdir", "a", "--save_path", "a"]).workdir == "a"
    assert parse(["train.py", "--workdir=a/", "--save_path=./a"]).workdir == "a"
    assert "a and b" in refusal("--save_path=a", "--workdir=b")
    assert parse(["train.py", "--workdir=."]).workdir == "."


@pytest.mark.parametrize("flag", ["--workdir", "--save_path", "--init_from", "--config"])
def test_paths_are_local_and_begin_at_home(flag, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    write_config(tmp_path / "x.py", "config.seed = 5")
    if flag == "--init_from":
        (tmp_path / "x.py").unlink()
        write_run(tmp_path / "x.py", default_config())
    command = parse(["train.py", f"{flag}=~/x.py"])
    if flag in ("--workdir", "--save_path"):
        assert command.workdir == str(tmp_path / "x.py")
    for wrong in ("", "gs://bucket/x", "hdfs://host/x", "file:///x", "~no_such_user/x", "x\0"):
        message = refusal(f"{flag}={wrong}")
        assert flag in message
        assert repr(wrong) in message


def test_an_answer_that_is_no_path_is_asked_again(answers, capsys):
    answers(*[""] * 7, "gs://bucket/run", "run")
    assert parse(["train.py", "--interactive"]).workdir == "run"
    assert "'gs://bucket/run'" in capsys.readouterr().out


def test_sweeps_are_read_by_the_types_of_their_fields():
    command = parse(
        [
            *("train.py", "--sweep=learning_rate=1e-3,1", "--sweep", "seed=0, 1", "--epochs=3"),
            *("--sweep=config.model.window=None,4", "--sweep=model.causal=true,False"),
        ]
    )
    assert command.sweep == {
        "optimizer.learning_rate": [0.001, 1.0],
        "seed": [0, 1],
        "model.window": [None, 4],
        "model.causal": [True, False],
    }
    assert command.config.train.epochs == 3
    found = trials(command.config, command.sweep)
    assert len(found) == 16
    assert [trial.model.causal for trial in found[:3]] == [True, False, True]
    assert parse(["train.py"]).sweep == {}


def test_config_overrides_need_no_config_file():
    assert changed("--config.model.window=4", "--config.model.causal") == {
        "model.window": 4,
        "model.causal": True,
    }
    assert changed("--config.optimizer.clip_norm", "1", "--epochs", "3") == {
        "optimizer.clip_norm": 1.0,
        "train.epochs": 3,
    }


def test_flags_override_the_file_and_the_file_the_defaults(tmp_path):
    path = write_config(
        tmp_path / "x.py", "config.train.epochs = 7", "config.model.window = 3", "config.seed = 5"
    )
    file = f"--config={path}"
    assert changed(file) == {"train.epochs": 7, "model.window": 3, "seed": 5}
    # In any order, also before the file.
    assert changed("--config.train.epochs=8", file, "--config.model.window=None") == {
        "train.epochs": 8,
        "seed": 5,
    }
    assert changed("--epochs=9", file)["train.epochs"] == 9
    # Of a field that file and flag both set, another run of the process finds nothing.
    assert changed(file)["train.epochs"] == 7


def test_a_config_file_takes_an_argument(tmp_path):
    path = write_config(tmp_path / "x.py")
    assert config_of(f"--config={path}:copy").task.name == "copy"


def write_run(path, config):
    """The note of a run, which is all that is read of it here."""
    path.mkdir(exist_ok=True)
    (path / "config.json").write_text(json.dumps({"config": config.to_dict()}))
    return str(path)


@pytest.fixture
def recall(tmp_path):
    """A run that is no default of anything."""
    config = default_config("recall")
    config.update_from_flattened_dict(
        {
            "task.vocab_size": 64,
            "task.seq_length": 32,
            "model.features": 32,
            "model.num_layers": 3,
            "model.num_kv_heads": 1,
            "model.softcap": 20.0,
            "optimizer.learning_rate": 0.5,
            "seed": 7,
        }
    )
    write_run(tmp_path / "recall", config)
    return config


@pytest.mark.parametrize("flag", ["--init_from=", "--config.init_from=", "--config.init_from "])
def test_init_from_brings_the_model_and_its_task(flag, recall, tmp_path):
    config = config_of(*f"{flag}{tmp_path / 'recall'}".split())
    assert config.init_from == str(tmp_path / "recall")
    assert (config.model, config.task) == (recall.model, recall.task)
    # The rest begins anew, with the defaults of the task.
    assert config.optimizer == default_config("recall").optimizer
    assert config.seed == 0


def test_what_is_said_wins_over_init_from(recall, tmp_path):
    run = f"--init_from={tmp_path / 'recall'}"
    config = config_of(run, "--embed_dim=16", "--config.model.num_kv_heads=None", "--seq_length=48")
    assert (config.model.features, config.model.num_kv_heads) == (16, None)
    assert (config.task.seq_length, config.task.vocab_size) == (48, 64)
    # Of another task the vocabulary, which the embedding depends on, and nothing else.
    config = config_of(run, "--task=copy")
    assert config.model == recall.model
    assert config.task.to_dict() == {
        "name": "copy",
        "vocab_size": 64,
        "seq_length": 32,
        "pack": "",
    }
    assert config_of(run, "--task=induction").task.seq_length == 64
    teacher = {"name": "teacher", "seq_length": 10, "pack": ""}
    assert config_of(run, "--task=teacher").task.to_dict() == teacher
    # A file says what differs from the defaults.
    file = write_config(tmp_path / "x.py", "config.model.features = 8", "config.model.window = 4")
    config = config_of(run, f"--config={file}:recall")
    assert (config.model.features, config.model.window, config.model.num_layers) == (8, 4, 3)
    assert config.task == recall.task
    write_config(tmp_path / "x.py", f"config.init_from = {str(tmp_path / 'recall')!r}")
    assert config_of(f"--config={file}:recall").model == recall.model
    assert config_of(f"--config={file}:recall", "--config.init_from=").model != recall.model


def test_a_run_does_not_start_from_its_own_directory(recall, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for workdir in ("recall", str(tmp_path / "recall"), "./nowhere/../recall"):
        message = refusal("--init_from=recall", f"--workdir={workdir}")
        assert message.startswith("--init_from and --workdir must be two directories")
    answers = iter([*([""] * 7), "recall"])
    monkeypatch.setattr("builtins.input", lambda question: next(answers))
    assert "two directories" in refusal("--init_from=recall", "--interactive")


def test_a_continued_run_keeps_the_model_that_it_took(recall, tmp_path):
    flags = [f"--init_from={tmp_path / 'recall'}", f"--workdir={tmp_path / 'second'}"]
    first = config_of(*flags)
    write_run(tmp_path / "second", first)
    recall.model.features = 64
    write_run(tmp_path / "recall", recall)
    assert config_of(*flags) == first
    (tmp_path / "recall" / "config.json").unlink()
    assert config_of(*flags) == first


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (None, ["config.json is missing"]),
        ("mine", ["config.json is not of a run"]),
        ("[" * 100_000, ["config.json is not of a run"]),
        ('{"config": 3}', ["holds no config"]),
        ('{"model_type": "gpt2"}', ["holds no config", "interop.huggingface.load"]),
        ('{"config": {}}', ["task must be one of", "got None"]),
        ('{"config": {"task": {"name": "juggle"}}}', ["task must be one of", "got 'juggle'"]),
        (
            '{"config": {"task": {"name": "copy"}, "model": {"legs": 8}}}',
            ["config.model.legs=8 is unknown"],
        ),
        (
            '{"config": {"task": {"name": "copy"}, "model": {"features": "8"}}}',
            ["config.model.features must be an integer", "got '8'"],
        ),
    ],
)
def test_a_run_that_cannot_be_begun_from_is_named(tmp_path, text, words):
    if text is not None:
        (tmp_path / "config.json").write_text(text)
    message = refusal(f"--init_from={tmp_path}")
    assert message.startswith(f"--init_from={tmp_path}: ")
    assert not [word for word in words if word not in message], message


def test_naming_a_task_brings_its_defaults(tmp_path):
    config = config_of("--task=recall", "--config.task.num_pairs=2", "--seq_length=32")
    assert (config.task.name, config.task.num_pairs, config.task.seq_length) == ("recall", 2, 32)
    assert config.model.causal
    assert config.model.num_layers == 2
    # Over a file, which has its own model, only the task changes.
    path = write_config(tmp_path / "x.py", "config.model.features = 16")
    config = config_of(f"--config={path}", "--task=copy")
    assert (config.task.name, config.model.features, config.model.causal) == ("copy", 16, False)
    assert "vocab_size" in config.task


def test_a_task_has_exactly_the_settings_of_its_builder():
    from attention_jax.tasks import TASKS as BUILDERS

    assert TASKS.keys() == BUILDERS.keys()
    for name, builder in BUILDERS.items():
        settings = {p.name: p.default for p in inspect.signature(builder).parameters.values()}
        if name == "teacher":  # As wide as its student; it or its seed is that of the run.
            for taken in ("features", "num_heads", "seed", "layer"):
                del settings[taken]
        assert TASKS[name]["task"] == settings


def test_slices_change_settings_of_the_task():
    config = config_of("--task=parity", "--config.eval.slices=64 cumulative=True 8,cumulative=true")
    assert slice_settings(config) == {
        "64": {"seq_length": 64},
        "cumulative=True": {"cumulative": True},
        "8,cumulative=true": {"seq_length": 8, "cumulative": True},
    }
    assert slice_settings(config_of()) == {}


def test_a_flat_flag_and_an_override_may_agree_but_not_contradict():
    assert changed("--epochs=5", "--config.train.epochs=5") == {"train.epochs": 5}
    message = refusal("--epochs=5", "--config.train.epochs=6")
    assert "--epochs=5" in message
    assert "--config.train.epochs=6" in message
    assert "contradicts" in refusal("--task=recall", "--config.task.name=copy")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        # Unknown, with what may have been meant.
        (["--num_head=3"], ["--num_head is unknown", "--num_heads"]),
        (["--lr=0.1"], ["--lr is unknown. Did you mean --learning_rate?"]),
        (["--sweep=lr=1"], ["config.lr is unknown. Did you mean config.optimizer.learning_rate?"]),
        (["--config.optimizer.x2=0.9"], ["config.optimizer.x2 is unknown."]),
        (["--task=text", "--path=a"], ["--path is unknown. Did you mean --config.task.path?"]),
        (
            ["--task=text", "--epochs=1"],
            ["got 100 of 100.", "as --config.optimizer.warmup_steps=10, or --epochs higher."],
        ),
        (["--config.model.num_head=3"], ["config.model.num_head", "config.model.num_heads"]),
        (["--config.task.num_pairs=3"], ["config.task.num_pairs is unknown"]),
        (["--config.nothing=3"], ["config.nothing is unknown"]),
        (["--config.train=3"], ["config.train is no field", "--config.train.batch_size"]),
        (["train"], ["'train'"]),
        # Of the wrong kind.
        (["--epochs"], ["--epochs"]),
        (["--epochs=many"], ["--epochs", "integer", "'many'"]),
        (["--epochs=2.5"], ["--epochs", "integer", "'2.5'"]),
        (["--config.train.epochs=many"], ["config.train.epochs", "integer", "'many'"]),
        (["--config.train.epochs=1\n2"], ["config.train.epochs", "integer", r"'1\n2'"]),
        (["--config.model.window=wide"], ["config.model.window", "integer", "'wide'"]),
        (["--config.model.causal=maybe"], ["config.model.causal", "true or false", "'maybe'"]),
        (["--learning_rate=nan"], ["--learning_rate", "finite", "nan"]),
        # Out of range.
        (["--epochs=0"], ["--epochs", "at least 1", "got 0"]),
        (["--epochs=-3"], ["--epochs", "got -3"]),
        (["--batch_size=0"], ["--batch_size", "got 0"]),
        (["--seq_length=0"], ["--seq_length", "got 0"]),
        (["--embed_dim=-64"], ["--embed_dim", "got -64"]),
        (["--learning_rate=0"], ["--learning_rate", "above 0", "got 0.0"]),
        (["--seed=-1"], ["--seed", "got -1"]),
        (["--config.model.dropout_rate=1.0"], ["config.model.dropout_rate", "got 1.0"]),
        (["--config.checkpoint.keep=1"], ["config.checkpoint.keep", "at least 2", "got 1"]),
        # Not one of the choices.
        (["--model=rnn"], ["--model", "multihead, selfhead", "'rnn'"]),
        (["--task=juggle"], ["task", "teacher, recall, ", "'juggle'"]),
        (["--launcher=tpu"], ["--launcher", "single, pmap, sharded", "'tpu'"]),
        (["--config.model.mechanism=rwkv"], ["mechanism", "gated_delta", "'rwkv'"]),
        (["--config.model.pattern=holes"], ["pattern", "strided, blocks", "'holes'"]),
        (["--config.model.softcap=-1"], ["softcap", "at least 0", "got -1.0"]),
        (["--config.model.stride=0"], ["stride", "at least 1", "got 0"]),
        (["--config.optimizer.name=lion"], ["config.optimizer.name", "adamw", "'lion'"]),
        (["--config.task.path=my.txt"], ["it is a field of --task=text."]),
        (["--target=0.99"], ["--target", "accuracy=0.99", "'0.99'"]),
        (["--target=loss=low"], ["--target", "'loss=low'"]),
        (["--target=accuracy=99"], ["--target", "(0, 1]", "'accuracy=99'"]),
        (["--sweep=seed"], ["--sweep", "field=value", "'seed'"]),
        (["--sweep=eval.slices=8,16"], ["eval.slices", "from Python"]),
        (["--config.train.slices=20 20"], ["config.train.slices", "20 twice"]),
        (["--config.model.short_conv=3"], ["config.model.short_conv", "causal=true"]),
        (["--sweep=sed=1"], ["--sweep=sed=1", "config.sed is unknown", "config.seed"]),
        (["--sweep=seed=0,0"], ["config.seed", "each once", "[0, 0]"]),
        (["--sweep=seed=0,x"], ["config.seed", "an integer", "'x'"]),
        (["--sweep=seed=0", "--sweep=seed=1"], ["config.seed", "twice"]),
        (["--sweep=epochs=1,2"], ["config.train.epochs", "cannot be swept"]),
        (["--sweep=learning_rate=0.1,-1"], ["--learning_rate", "above 0", "got -1.0"]),
        (["--sweep=workdir=a,b"], ["config.workdir is unknown"]),
        # Sound alone, but not together.
        (["--sweep=seed=0,1", "--seed=1"], ["--sweep=seed", "contradicts", "--seed"]),
        (["--sweep=num_heads=8,7"], ["--num_heads", "embed_dim", "7 and 64"]),
        (["--embed_dim=30"], ["--num_heads", "embed_dim", "8 and 30"]),
        (["--config.model.num_kv_heads=3"], ["num_kv_heads", "num_heads", "3 and 8"]),
        (["--config.optimizer.accumulate=5"], ["--batch_size", "accumulate", "32 and 5"]),
        (["--config.optimizer.name=sgd", "--config.optimizer.b2=0.9"], ["b2 is for adam", "0.9"]),
        (["--config.optimizer.momentum=0.9"], ["momentum", "sgd", "0.9 with adam"]),
        (["--config.optimizer.weight_decay=0.1"], ["weight_decay", "adamw", "0.1 with adam"]),
        (
            ["--config.optimizer.schedule=cosine", "--config.optimizer.warmup_steps=3200"],
            ["warmup_steps", "3200 of 3200"],
        ),
        (["--config.model.positions=rotary", "--embed_dim=24"], ["rotary", "even", "got 3"]),
        (["--config.eval.slices=20 20"], ["config.eval.slices", "20 twice"]),
        (
            ["--config.eval.slices=vocab_size=9"],
            ["slices", "of teacher (pack, seq_length)", "got 'vo"],
        ),
        (["--config.eval.slices=20,seq_length=30"], ["slices", "each once", "'seq_length=30'"]),
        (["--config.eval.slices=name=copy"], ["slices", "got 'name=copy'"]),
        (["--config.eval.slices=long"], ["slices", "seq_length must be an integer: got 'long'"]),
        (
            ["--task=recall", "--config.eval.slices=power=inf"],
            ["slices", "power must be a finite number: got 'inf'"],
        ),
        (
            ["--task=parity", "--config.eval.slices=cumulative=perhaps"],
            ["slices", "cumulative must be true or false: got 'perhaps'"],
        ),
        # What a mode cannot honour.
        (["--model=selfhead", "--num_heads=4"], ["--num_heads", "multihead only", "got 4"]),
        (["--model=selfhead", "--config.model.num_heads=4"], ["--num_heads", "multihead only"]),
        (["--model=selfhead", "--config.model.num_kv_heads=1"], ["num_kv_heads", "multihead only"]),
        # Another task's settings.
        (["--config.task.name=recall"], ["config.task.", "missing", "--task=recall"]),
    ],
)
def test_a_refusal_names_the_flag_and_what_came(arguments, words):
    message = refusal(*arguments)
    assert not [word for word in words if word not in message], message


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("config.model.num_head = 3", ["x.py:6:", "num_head", 'Did you mean "num_heads"']),
        ("config.train.epochs = 'many'", ["x.py:6:", "epochs"]),
        ("config.train.epochs = 0", ["--epochs", "got 0"]),
        ("config.train.epochs = 1 / 0", ["x.py:6:", "ZeroDivisionError"]),
        ("config = 3", ["x.py", "ConfigDict", "int"]),
        ("config.train.epochs = = 3", ["x.py:", "SyntaxError"]),
        ("import nothing_of_that_name", ["x.py:6:", "nothing_of_that_name"]),
    ],
)
def test_a_broken_config_file_is_named_with_its_line(tmp_path, line, words):
    message = refusal(f"--config={write_config(tmp_path / 'x.py', line)}")
    assert not [word for word in words if word not in message], message


def test_a_missing_config_file_is_named(tmp_path):
    assert "nowhere.py" in refusal("--config=nowhere.py")
    assert "''" in refusal("--config=")
    assert f"'{tmp_path}'" in refusal(f"--config={tmp_path}")
    assert "get_config() is missing" in refusal(f"--config={__file__}")


def numbers_of(task):
    """The fields of a task that take a number, and whether it is an integer.

    Of the first task all fields of its config, which the others share.
    """
    for path, value in flatten(default_config(task)).items():
        if not (path.startswith("task.") or task == "teacher"):
            continue
        message = "" if isinstance(value, str) else refusal(f"--task={task}", f"--config.{path}=x")
        if "integer" in message or "number" in message:
            yield path, "integer" in message


@pytest.mark.parametrize("task", TASKS)
def test_every_number_has_an_upper_bound(task):
    for path, is_integer in numbers_of(task):
        name = path.rpartition(".")[2]
        texts = (str(2**63), str(10**30), "9" * 5000) if is_integer else ("1e31", "-1e300", "1e-40")
        for text in texts:
            message = refusal(f"--task={task}", f"--config.{path}={text}")
            assert name in message or f"--{name}" in message or "--embed_dim" in message, message
            assert "must be" in message
            assert len(message) < 200, message


def test_steps_and_trials_have_an_upper_bound():
    message = refusal("--epochs=2000000000", "--config.train.steps_per_epoch=2000000000")
    assert "(config.train.epochs) times config.train.steps_per_epoch must be at most" in message
    many = ",".join(map(str, range(1, 201)))
    message = refusal(f"--sweep=seed={many}", f"--sweep=optimizer.momentum={many}")
    assert message == "--sweep must come to at most 10000 trials: got 40000."


def test_what_came_is_told_in_a_line_however_long_it_is():
    for arguments in (
        *(["--config." + path + "=" + "x" * 1000] for path in ("model.name", "train.target")),
        *(["--task=" + "x" * 1000], ["--sweep=" + "x" * 1000], ["x" * 1000]),
        *(["--config.eval.slices=" + "x" * 1000], ["--sweep=seed=1," + "x" * 1000]),
    ):
        assert len(refusal(*arguments)) < 320


def test_every_default_is_sound():
    for task in TASKS:
        check(default_config(task))
    assert default_config().to_dict() | {"task": {}} == DEFAULTS


def test_all_that_is_wrong_is_found():
    config = default_config()
    config.train.epochs, config.model.features = 0, -1
    assert {path for path, _ in problems(config)} == {"train.epochs", "model.features"}


def test_help_has_the_fields_and_defaults_of_the_task(capsys):
    for arguments in (["--task=text"], ["--config=configs/text.py"]):
        with pytest.raises(SystemExit):
            parse(["train.py", *arguments, "--help"])
        lines = capsys.readouterr().out.splitlines()
        assert "  task.path = " in lines
        assert "  model.num_layers = 4" in lines
        assert any("the defaults of --task=text" in line for line in lines)


def test_help_names_every_flag_and_field(capsys):
    with pytest.raises(SystemExit) as leaving:
        parse(["train.py", "--help"])
    assert leaving.value.code == 0
    text = capsys.readouterr().out
    flags = (
        *("model", "embed_dim", "num_heads", "learning_rate", "batch_size", "seq_length", "epochs"),
        *(
            "save_path",
            "workdir",
            "interactive",
            "task",
            "launcher",
            "seed",
            "init_from",
            "config",
            "target",
            "sweep",
        ),
    )
    assert not [flag for flag in flags if f"--{flag} " not in text]
    assert not [path for path in flatten(default_config()) if f"  {path} = " not in text]


# The interview -----------------------------------------------------------------------------------


@pytest.fixture
def answers(monkeypatch):
    """Answers the questions of --interactive; returns what was asked."""

    def give(*lines):
        asked, left = [], list(lines)

        def answer(question):
            asked.append(question)
            if not left:
                raise EOFError
            return left.pop(0)

        monkeypatch.setattr("builtins.input", answer)
        return asked

    return give


def test_enter_keeps_every_default(answers):
    asked = answers(*[""] * 8)
    assert changed("--interactive") == {}
    assert [question.split()[0] for question in asked] == [
        *("model", "embed_dim", "num_heads", "learning_rate"),
        *("batch_size", "seq_length", "epochs", "save_path"),
    ]
    assert asked[1] == "embed_dim [64]: "


def test_a_wrong_answer_is_asked_again_with_the_reason(answers, capsys):
    answers("rnn", "multihead", "wide", "30", "", "5", "0.01", "0", "16", "", "2", "runs/a")
    command = parse(["train.py", "--interactive"])
    model, train = command.config.model, command.config.train
    assert (model.name, model.features, model.num_heads) == ("multihead", 30, 5)
    assert (command.config.optimizer.learning_rate, train.batch_size) == (0.01, 16)
    assert (command.workdir, train.epochs) == ("runs/a", 2)
    reasons = capsys.readouterr().out
    assert not [word for word in ("'rnn'", "'wide'", "8 and 30", "got 0") if word not in reasons]


def test_a_run_of_text_is_asked_for_its_file(answers, capsys, tmp_path):
    file = tmp_path / "my.txt"
    file.write_text("a")
    asked = answers("nowhere.txt", str(file), *[""] * 8)
    assert parse(["train.py", "--task=text", "--interactive"]).config.task.path == str(file)
    assert asked[:2] == ["path [the help topics of Python]: "] * 2
    assert "nowhere.txt is no file." in capsys.readouterr().out
    asked = answers(*[""] * 9)
    assert parse(["train.py", "--task=text", "--interactive"]).config.task.path == ""
    asked = answers(*[""] * 8)
    parse(["train.py", "--task=text", f"--config.task.path={file}", "--interactive"])
    assert asked[0].startswith("model")


def test_a_default_that_cannot_be_kept_is_not_offered(answers, capsys):
    asked = answers("", "30", "6", *[""] * 5)
    assert changed("--interactive") == {"model.features": 30, "model.num_heads": 6}
    assert asked[2] == "num_heads: "
    assert "8 and 30" in capsys.readouterr().out


def test_one_head_is_not_asked_for_its_number(answers):
    asked = answers("selfhead", *[""] * 6)
    assert changed("--interactive") == {"model.name": "selfhead"}
    assert not [question for question in asked if question.startswith("num_heads")]


def test_one_head_may_be_told_the_default_number():
    # The original's default flags, written out.
    assert changed("--model=selfhead", "--num_heads=8") == {"model.name": "selfhead"}
    assert config_of("--model=selfhead", "--num_heads=1").model.num_heads == 1
    copying = ("--task=copy", "--model=selfhead", "--config.model.positions=learned")
    assert config_of(*copying).model.name == "selfhead"


def test_flags_are_the_defaults_of_the_interview(answers):
    asked = answers(*[""] * 8)
    assert changed("--interactive", "--epochs=3") == {"train.epochs": 3}
    assert "epochs [3]: " in asked


def test_what_another_flag_decides_is_not_asked(answers):
    asked = answers(*[""] * 7)
    parse(["train.py", "--interactive", "--minutes=1"])
    assert not [question for question in asked if question.startswith("epochs")]
    asked = answers(*[""] * 7)
    parse(["train.py", "--interactive", "--sweep=learning_rate=0.1,0.2"])
    assert len(asked) == 7
    assert not [question for question in asked if question.startswith("learning_rate")]


def test_none_is_no_directory(answers):
    answers(*[""] * 7, "none")
    assert parse(["train.py", "--interactive", "--workdir=a"]).workdir is None


def test_the_end_of_the_input_ends_the_interview(answers):
    answers("multihead", "32")
    with pytest.raises(EOFError):
        parse(["train.py", "--interactive"])


def test_reading_flags_does_not_import_jax():
    import subprocess

    code = "import sys; from attention_jax.training import command; sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
