"""`python train.py` as a user sees it: its streams and its exit statuses.

test_reliability.py tests kills and full disks.
"""

import importlib.util
import json
import os
import resource
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import pytest

from attention_jax.training import process

ROOT = Path(__file__).parent.parent
TRAIN = str(ROOT / "train.py")

# The commands of the original, word for word after its `main.py`.
ORIGINAL = [
    "",
    "--model multihead --embed_dim 128 --num_heads 8 --epochs 200",
    "--model selfhead --embed_dim 32 --epochs 50",
    "--model multihead --embed_dim 256 --num_heads 16 --learning_rate 0.0001 --epochs 300",
    "--model multihead --embed_dim 128 --num_heads 8 --save_path models/my_trained_model.pth",
]
TINY = [
    *("--embed_dim=8", "--num_heads=2", "--batch_size=8", "--seq_length=5"),
    *("--config.train.steps_per_epoch=4", "--config.eval.num_batches=1"),
    *("--config.eval.every_epochs=50", "--config.checkpoint.every_epochs=50"),
]


@pytest.fixture
def environment(tmp_path):
    """One device, and a compile cache that is not the user's."""
    return os.environ | {"JAX_PLATFORMS": "cpu", "XDG_CACHE_HOME": str(tmp_path / "cache")}


@pytest.fixture
def train(environment, tmp_path):
    def run(*arguments, **options):
        return subprocess.run(
            [sys.executable, TRAIN, *arguments],
            **{"cwd": tmp_path, "env": environment, "timeout": 120, "check": False} | options,
            capture_output=True,
            text=True,
        )

    return run


@pytest.fixture
def main(tmp_path, monkeypatch):
    """What train.py does, in this process, which has paid for jax already."""
    spec = importlib.util.spec_from_file_location("train", TRAIN)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path / "cache"))
    handlers = {number: signal.getsignal(number) for number in process.STOPPING}
    yield lambda *arguments: module.main(["train.py", *arguments])
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("arguments", ["--help", "--num_head=3", "--config=nowhere.py"])
def test_help_and_refusals_answer_at_once(train, arguments):
    def seconds():
        """Of the processor, not of the clock: other programs may keep the machine busy."""
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        train(arguments)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime

    assert min(seconds() for _ in range(3)) < 0.5


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="the cores cannot be told")
def test_programs_for_other_numbers_of_cores_are_kept_apart(monkeypatch):
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR", raising=False)
    found = set()
    kept = jax.config.jax_compilation_cache_dir
    for cores in ({0}, {0, 1}):
        monkeypatch.setattr(os, "sched_getaffinity", lambda _, cores=cores: cores)
        process.prepare()
        found.add(jax.config.jax_compilation_cache_dir)
    jax.config.update("jax_compilation_cache_dir", kept)
    assert len(found) == 2


def test_a_refusal_is_one_line_and_status_2(train, tmp_path):
    result = train("--epochs=0", "--workdir=run")
    assert result.returncode == 2
    assert result.stdout == ""
    assert result.stderr.splitlines() == [
        "train.py: --epochs (config.train.epochs) must be at least 1: got 0."
    ]
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("flag", ["--workdir", "--init_from"])
def test_a_url_is_refused_at_once_and_nothing_made(train, tmp_path, flag):
    result = train(f"{flag}=gs://bucket/run")
    assert result.returncode == 2
    assert len(result.stderr.splitlines()) == 1
    assert flag in result.stderr
    assert not (tmp_path / "gs:").exists()


def test_help_goes_to_stdout_with_status_0(train):
    result = train("--help")
    assert (result.returncode, result.stderr) == (0, "")
    assert "--learning_rate" in result.stdout


@pytest.mark.parametrize("command", ORIGINAL)
def test_the_commands_of_the_original_work(main, command, tmp_path):
    short = ["--epochs=1", "--config.train.steps_per_epoch=1", "--config.eval.num_batches=1"]
    assert main(*command.split(), *short) == 0
    saved = tmp_path / "models" / "my_trained_model.pth" / "result.json"
    assert saved.exists() == ("--save_path" in command)


@pytest.mark.slow
@pytest.mark.parametrize("command", ORIGINAL)
def test_the_commands_of_the_original_work_in_full(train, command):
    result = train(*command.split(), timeout=1200)
    assert (result.returncode, result.stderr) == (0, "")


def test_the_interview_trains_and_ctrl_d_leaves(main, monkeypatch, capsys, tmp_path):
    answers = iter(["selfhead", "rnn", "8", "", "4", "5", "1", "run"])
    monkeypatch.setattr("builtins.input", lambda question: next(answers))
    # "rnn" is no width, and is asked again.
    assert main("--interactive", "--config.train.steps_per_epoch=2") == 0
    config = json.loads((tmp_path / "run" / "config.json").read_text())["config"]
    assert (config["model"]["name"], config["model"]["features"]) == ("selfhead", 8)
    assert "'rnn'" in capsys.readouterr().out

    def end(question):
        raise EOFError

    monkeypatch.setattr("builtins.input", end)
    assert main("--interactive") == 0
    assert "nothing was trained" in capsys.readouterr().out


def test_a_sweep_without_a_best_trial_fails(main, monkeypatch, capsys):
    from attention_jax.laboratory import sweep

    found = sweep.Result({"best": None, "trials": [{}, {}]}, [], [])
    monkeypatch.setattr(sweep, "run", lambda *arguments: found)
    assert main("--sweep=seed=1,2") == 1
    assert "the sweep has no best trial: all 2 have diverged.\n" in capsys.readouterr().err


def test_a_run_that_cannot_be_is_one_line_on_stderr(main, capsys, tmp_path):
    (tmp_path / "file").write_text("mine")
    assert main("--workdir=file") == 2
    assert main("--launcher=pmap", "--batch_size=7") == 2
    assert main("--task=recall", "--config.task.num_pairs=40") == 2
    assert main("--init_from=nowhere") == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 4
    for line, word in zip(lines, ("file", "7", "num_pairs", "nowhere"), strict=True):
        assert line.startswith("train.py: ")
        assert word in line


def test_a_sweep_is_a_flag(main, capsys, tmp_path):
    assert main(*TINY, "--epochs=1", "--sweep=seed=0,1", "--workdir=sweep") == 0
    assert "2 trials over seed in 1 program" in capsys.readouterr().out
    result = json.loads((tmp_path / "sweep" / "result.json").read_text())
    assert [trial["seed"] for trial in result["trials"]] == [0, 1]


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="of Linux")
def test_a_screen_that_takes_no_lines_is_one_line(environment):
    command = [sys.executable, TRAIN, "--help"]
    with open("/dev/full", "w") as full:
        result = subprocess.run(
            command, stdout=full, stderr=subprocess.PIPE, env=environment, text=True, check=False
        )
    assert result.returncode == 1
    assert result.stderr == "train.py: [Errno 28] No space left on device\n"


NO_UTF8 = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}


@pytest.mark.parametrize(
    ("settings", "workdir", "status"),
    [
        ({"PYTHONIOENCODING": "ascii"}, "\u00e9", 0),
        (NO_UTF8, "run", 0),
        (NO_UTF8, "\u00e9", 2),  # What writes checkpoints cannot name it there.
    ],
)
def test_letters_that_the_screen_lacks_end_no_run(
    settings, workdir, status, train, environment, tmp_path
):
    (tmp_path / "x.py").write_text(
        "from attention_jax.training.config import default_config\n"
        "def get_config():\n    print('\\u00e9')\n    return default_config()\n"
    )
    env = environment | {"PYTHONPATH": str(ROOT)} | settings
    result = train(*TINY, "--epochs=1", "--config=x.py", f"--workdir={workdir}", env=env)
    assert result.returncode == status
    if status == 0:
        assert result.stdout.startswith("\\xe9\n")
        assert result.stderr == ""
    else:
        assert len(result.stderr.splitlines()) == 1
        assert "PYTHONUTF8=1" in result.stderr


def test_an_environment_that_jax_refuses_is_one_line(train, environment):
    result = train("--epochs=1", env=environment | {"JAX_NUM_CPU_DEVICES": "many"})
    assert result.returncode == 2
    assert len(result.stderr.splitlines()) == 1
    assert '"many"' in result.stderr


def test_a_python_without_the_dependencies_is_told_how_to_set_up(tmp_path):
    # -S: without any installed package.
    command = [sys.executable, "-S", TRAIN]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert result.returncode == 1
    assert len(result.stderr.splitlines()) == 1
    assert "absl is not installed" in result.stderr
    assert "uv run train.py" in result.stderr


def command_line(*arguments, **options):
    return subprocess.run(
        [sys.executable, "-m", "attention_jax", *arguments],
        **{"capture_output": True, "text": True, "timeout": 120, "check": False} | options,
    )


def test_the_package_is_a_command(environment, tmp_path):
    options = {"cwd": tmp_path, "env": environment | {"PYTHONPATH": str(ROOT)}}
    trained = command_line("train", *TINY, "--epochs=1", "--workdir=run", **options)
    assert (trained.returncode, trained.stderr) == (0, "")
    shown = command_line("report", "run", **options)
    assert (shown.returncode, shown.stderr) == (0, "")
    assert "best eval_loss" in shown.stdout
    told = command_line("--help", **options)
    assert (told.returncode, told.stderr) == (0, "")
    assert "train" in told.stdout
    assert "usage: attention-jax train" in command_line("train", "--help", **options).stdout


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (
            [],
            "attention-jax: a command is missing: train, report, inspect, generate, export, check.",
        ),
        (
            ["trian"],
            "attention-jax: there is no command 'trian': train, report, inspect, generate, export, "
            "check. Did you mean train?",
        ),
        (["train", "--epochs=0"], "attention-jax train: --epochs "),
        (["generate", "x", "--promt=a"], "attention-jax generate: --promt is unknown. Did you "),
        (["generate", "x", "--tokens=a"], "attention-jax generate: --tokens must be an integer: "),
        (["report", "nowhere"], "attention-jax report: nowhere holds no run."),
        (["report"], "attention-jax report: the following arguments are required: RUN"),
        (["export", "run"], "attention-jax export: the following arguments are required: OUT"),
        (["export", "nowhere", "x.safetensors"], "attention-jax export: nowhere holds no run"),
        (["export", ".", "x.npz"], "attention-jax export: OUT must end in .safetensors"),
    ],
)
def test_a_command_that_cannot_be_is_one_line(arguments, line, environment, tmp_path):
    options = {"cwd": tmp_path, "env": environment | {"PYTHONPATH": str(ROOT)}}
    result = command_line(*arguments, **options)
    assert (result.returncode, result.stdout) == (2, "")
    assert len(result.stderr.splitlines()) == 1
    assert result.stderr.startswith(line)


def test_a_terminal_that_is_closed_ends_the_run_saved(environment, tmp_path):
    ours, theirs = os.openpty()
    in_terminal = (
        "import fcntl, os, sys, termios\n"
        "fcntl.ioctl(0, termios.TIOCSCTTY, 0)\n"
        "os.execv(sys.executable, [sys.executable, *sys.argv[1:]])"
    )
    command = [TRAIN, *TINY, "--epochs=100000", "--workdir=run"]
    process = subprocess.Popen(
        [sys.executable, "-c", in_terminal, *command],
        cwd=tmp_path,
        env=environment,
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        start_new_session=True,
    )
    os.close(theirs)
    rows = tmp_path / "run" / "metrics.jsonl"
    begun = time.monotonic()
    while not (rows.exists() and rows.stat().st_size) and time.monotonic() - begun < 60:
        time.sleep(0.05)
    os.close(ours)
    assert process.wait(timeout=60) == 129
    (step,) = (int(path.name) for path in (tmp_path / "run" / "checkpoints").iterdir())
    assert json.loads(rows.read_text().splitlines()[-1])["step"] == step


@pytest.mark.parametrize(
    ("stdin", "words"),
    [("<&-", "No more answers"), ("<answers", r"'multi\\xffhead'")],
    ids=["closed", "no UTF-8"],
)
def test_an_interview_needs_no_sound_input(stdin, words, environment, tmp_path):
    (tmp_path / "answers").write_bytes(b"multi\xffhead\n")
    found = subprocess.run(
        f"{shlex.quote(sys.executable)} {shlex.quote(str(TRAIN))} --interactive {stdin}",
        shell=True,
        cwd=tmp_path,
        env=environment | {"PYTHONIOENCODING": "utf-8"},
        capture_output=True,
        text=True,
    )
    assert (found.returncode, found.stderr) == (0, "")
    assert words in found.stdout
    assert "No more answers: nothing was trained." in found.stdout


def test_a_signal_before_the_first_step_is_one_line(environment, tmp_path):
    process = subprocess.Popen(
        [sys.executable, TRAIN, "--interactive"],
        cwd=tmp_path,
        env=environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    process.stdout.readline()  # It asks, so it listens.
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=60)
    assert (process.returncode, errors) == (143, "train.py: stopped by SIGTERM.\n")


def test_a_signal_in_a_callback_of_the_garbage_collector_is_not_lost(environment, tmp_path):
    # Python ignores what is raised there.
    program = (
        "import gc, os, signal, sys, train\n"
        "from attention_jax.training import process\n"
        "def callback(phase, info):\n"
        "    if signal.getsignal(signal.SIGTERM) != signal.SIG_DFL:\n"
        "        gc.callbacks.remove(callback)\n"
        "        os.kill(os.getpid(), signal.SIGTERM)\n"
        "gc.callbacks.append(callback)\n"
        "process.end(train.main, ['train.py', *sys.argv[1:]])"
    )
    result = subprocess.run(
        [sys.executable, "-c", program, *TINY, "--epochs=1000"],
        cwd=tmp_path,
        env=environment | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (result.returncode, result.stderr) == (143, "train.py: stopped by SIGTERM.\n")


def test_a_signal_in_the_import_of_jax_raises_no_error_there(environment, tmp_path):
    # Native code that is being set up would abort the process, and print a traceback.
    (tmp_path / "jax.py").write_text(
        "import os, signal\n"
        "try:\n"
        "    os.kill(os.getpid(), signal.SIGINT)\n"
        "except BaseException as error:\n"
        "    print(repr(error))\n"
    )
    program = (
        "import sys\n"
        "from attention_jax.training import process\n"
        "process.end(lambda argv: process.do('train.py', lambda: __import__('jax')), ['train.py'])"
    )
    result = subprocess.run(
        [sys.executable, "-c", program],
        cwd=tmp_path,
        env=environment | {"PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (result.returncode, result.stdout) == (130, "")
    assert result.stderr == "train.py: stopped by SIGINT.\n"


@pytest.mark.parametrize("error", ["RunError('x')", "RuntimeError('x')"])
def test_what_a_second_signal_cuts_short_is_no_error(error, environment):
    program = (
        "import os, signal, train\n"
        "from attention_jax.training import experiment, process\n"
        "from attention_jax.training.config import RunError\n"
        "def run(*arguments):\n"
        "    try:\n"
        "        os.kill(os.getpid(), signal.SIGTERM)\n"
        "    finally:\n"
        f"        raise {error}\n"
        "experiment.run = run\n"
        "process.end(train.main, ['train.py'])"
    )
    result = subprocess.run(
        [sys.executable, "-c", program],
        env=environment | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (result.returncode, result.stderr) == (143, "train.py: stopped by SIGTERM.\n")


def test_a_reader_that_leaves_is_no_traceback(environment, tmp_path):
    process = subprocess.Popen(
        [sys.executable, TRAIN, *TINY],
        cwd=tmp_path,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    process.stdout.readline()
    process.stdout.close()
    assert process.wait(timeout=120) == 141
    assert process.stderr.read() == ""
    process.stderr.close()
