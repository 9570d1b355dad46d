"""Several processes train as one, and none waits for one that is lost."""

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from jax.errors import JaxRuntimeError

from attention_jax.training import experiment, hosts
from attention_jax.training.command import parse
from attention_jax.training.config import ConfigError, default_config
from attention_jax.training.hosts import Hosts

ROOT = Path(__file__).parent.parent
EPOCHS = 10


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """A compile cache for the processes."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def alone():
    """The rows of the run in this process, on one device."""
    config = default_config()
    config.model.update(features=8, num_heads=2)
    config.train.update(batch_size=8, steps_per_epoch=5, epochs=EPOCHS)
    config.eval.update(num_batches=1, every_epochs=EPOCHS)
    config.optimizer.name = "sgd"
    config.optimizer.learning_rate = 0.1
    return experiment.run(config).history


class Job:
    """The processes of a run, which are killed at the end of the block."""

    def __init__(self, place, cache, launcher, processes, devices=1, *flags, of_second=()):
        with socket.socket() as free:  # The system chooses a port.
            free.bind(("localhost", 0))
            port = free.getsockname()[1]
        options = [
            *("--embed_dim=8", "--num_heads=2", "--batch_size=8", "--learning_rate=0.1"),
            *("--config.train.steps_per_epoch=5", f"--epochs={EPOCHS}"),
            *("--config.eval.num_batches=1", f"--config.eval.every_epochs={EPOCHS}"),
            *("--config.optimizer.name=sgd", "--config.checkpoint.every_epochs=1"),
            *(f"--launcher={launcher}", f"--workdir={place}", *flags),
        ]
        environment = os.environ | {
            "JAX_PLATFORMS": "cpu",
            "JAX_NUM_CPU_DEVICES": str(devices),
            "XDG_CACHE_HOME": str(cache),
        }
        self.place = place
        self.old = self.checkpoints()
        self.errors = [place.with_name(f"{place.name}_{i}.err") for i in range(processes)]
        self.processes = []
        for number, errors in enumerate(self.errors):
            together = [
                f"--coordinator=localhost:{port}",
                f"--num_processes={processes}",
                f"--process_id={number}",
            ]
            own = of_second if number == 1 else ()
            command = [sys.executable, ROOT / "train.py", *options, *own]
            with errors.open("w") as stderr:
                self.processes.append(
                    subprocess.Popen(
                        [*command, *(together if processes > 1 else [])],
                        stdout=subprocess.DEVNULL,
                        stderr=stderr,
                        env=environment,
                    )
                )

    def __enter__(self):
        return self

    def __exit__(self, *error):
        for process in self.processes:
            process.kill()
            process.wait()

    def begun(self):
        """Returns when there is a new checkpoint."""
        for _ in range(1000):
            if self.checkpoints() - self.old:
                return
            assert self.processes[0].poll() is None, self.errors[0].read_text()
            time.sleep(0.1)
        raise TimeoutError

    def checkpoints(self):
        found = self.place / "checkpoints"
        return (
            {path.name for path in found.iterdir() if "tmp" not in path.name}
            if found.is_dir()
            else set()
        )

    def statuses(self, seconds):
        return [process.wait(seconds) for process in self.processes]

    def rows(self):
        assert self.statuses(200) == [0] * len(self.processes), self.errors[0].read_text()
        return [json.loads(line) for line in (self.place / "metrics.jsonl").open()]


def assert_alike(rows, others):
    assert [row["step"] for row in rows] == [row["step"] for row in others]
    for row, other in zip(rows, others, strict=True):
        assert row["loss"] == pytest.approx(other["loss"], rel=1e-5)
    assert rows[-1]["eval_loss"] == pytest.approx(others[-1]["eval_loss"], rel=1e-5)


def test_a_lost_process_ends_the_others_in_a_line(tmp_path, cache):
    with Job(tmp_path / "run", cache, "pmap", 2, 1, "--epochs=5000") as job:
        job.begun()
        job.processes[1].kill()
        status, _ = job.statuses(60)
        assert status == 1
        assert "so this one ends. Repeat all commands" in job.errors[0].read_text()


@pytest.mark.slow
def test_a_run_goes_on_without_the_process_that_is_lost(tmp_path, cache, alone):
    with Job(tmp_path / "run", cache, "pmap", 2) as job:
        job.begun()
        job.processes[1].kill()
        assert job.statuses(60)[0] in (0, 1)  # It may have been faster than the kill.
    with Job(tmp_path / "run", cache, "pmap", 1, 2) as job:
        assert_alike(job.rows(), alone)


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["pmap", "sharded"])
def test_checkpoints_restore_on_other_processes_and_devices(tmp_path, cache, alone, launcher):
    place = tmp_path / "run"
    with Job(place, cache, launcher, 2, 2) as job:
        job.begun()
        job.processes[1].send_signal(signal.SIGTERM)  # The others leave with it.
        assert set(job.statuses(60)) <= {0, 143}
    with Job(place, cache, launcher, 4, 1) as job:
        job.begun()
        job.processes[0].send_signal(signal.SIGTERM)
        assert set(job.statuses(60)) <= {0, 143}
    with Job(place, cache, launcher, 1, 8) as job:
        assert_alike(job.rows(), alone)


@pytest.mark.slow
@pytest.mark.parametrize(("processes", "devices"), [(2, 1), (2, 2), (4, 1)])
@pytest.mark.parametrize("launcher", ["pmap", "sharded"])
def test_processes_give_the_losses_of_one(tmp_path, cache, alone, launcher, processes, devices):
    with Job(tmp_path / "run", cache, launcher, processes, devices) as job:
        assert_alike(job.rows(), alone)


@pytest.mark.slow
def test_a_process_that_stands_still_ends_the_others(tmp_path, cache):
    with Job(tmp_path / "run", cache, "pmap", 2, 1, "--epochs=5000") as job:
        job.begun()
        job.processes[1].send_signal(signal.SIGSTOP)
        assert job.processes[0].wait(60) == 1
        assert "process 1 of 2 gives no sign of life" in job.errors[0].read_text()


@pytest.mark.slow
def test_an_error_of_the_first_is_told_to_all(tmp_path, cache):
    (tmp_path / "run").write_text("a file")
    with Job(tmp_path / "run", cache, "pmap", 2) as job:
        assert job.statuses(60) == [2, 2]
        assert "is a file" in job.errors[1].read_text()


def test_a_command_that_differs_is_refused(tmp_path, cache):
    with Job(tmp_path / "run", cache, "pmap", 2, of_second=["--seed=7"]) as job:
        assert job.statuses(60) == [2, 2]
        assert "the command of another process differs" in job.errors[0].read_text()
        assert "seed is 0 there and 7 here" in job.errors[1].read_text()
        assert not job.checkpoints()


def test_a_second_process_0_is_refused():
    with socket.socket() as taken:
        taken.bind(("localhost", 0))
        taken.listen()
        where = f"localhost:{taken.getsockname()[1]}"
        with pytest.raises(hosts.RunError, match=f"{where}: something listens there already"):
            hosts.join(Hosts(where, 2, 0))


@pytest.mark.parametrize(("signs", "ends"), [(["1", "2", "done"], False), (["1", "2"], True)])
def test_a_process_that_is_lost_at_the_end_is_told_in_a_line(monkeypatch, signs, ends):
    """Process 0 has completed its work, and process 1 gives these signs of life."""
    given = {}

    class Client:
        def key_value_set(self, name, sign, allow_overwrite):
            given[name] = sign

        def key_value_try_get(self, name):
            return signs.pop(0) if len(signs) > 1 else signs[0]

    def end(reason):
        raise SystemExit(reason)

    finished = threading.Event()
    finished.set()
    for name, value in {
        "count": lambda: 2,
        "_index": lambda: 0,
        "_client": Client,
        "_end": end,
        "SILENCE": 0.5,
        "_finished": finished,
    }.items():
        monkeypatch.setattr(hosts, name, value)
    with pytest.raises(SystemExit, match="process 1 of 2") if ends else contextlib.nullcontext():
        hosts._watch()
    assert list(given.values()) == ["done"]


@pytest.mark.parametrize(
    ("error", "ends"),
    [
        (JaxRuntimeError("UNAVAILABLE: Socket closed"), True),
        (ValueError("UNKNOWN: Gloo AllGather failed: Connection closed by peer"), True),
        (JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory"), False),
        (ValueError("query must have 4 axes: got [2, 3]."), False),
    ],
    ids=str,
)
def test_a_lost_connection_is_told_from_other_errors(monkeypatch, error, ends):
    def end(reason):
        raise SystemExit(reason)

    monkeypatch.setattr(hosts, "count", lambda: 2)
    monkeypatch.setattr(hosts, "_end", end)
    with pytest.raises(SystemExit if ends else type(error)), hosts.together():
        raise error


def test_flags_say_who_takes_part():
    words = ["train.py", "--launcher=pmap"]
    assert parse(words).hosts == Hosts()
    assert parse([*words, "--coordinator=auto"]).hosts == Hosts("auto")
    flags = ["--coordinator=h1:1234", "--num_processes=3", "--process_id=2"]
    assert parse([*words, *flags]).hosts == Hosts("h1:1234", 3, 2)


@pytest.mark.parametrize(
    ("flags", "line"),
    [
        (["--coordinator=h1"], "--coordinator must be host:port or auto: got 'h1'."),
        (["--coordinator=h1:80"], "--coordinator=h1:80 needs --num_processes."),
        (["--num_processes=2"], "--num_processes needs --coordinator=host:port: got '2'."),
        (["--coordinator=auto", "--process_id=1"], "--process_id needs no auto: got '1'."),
        (
            ["--coordinator=h1:80", "--num_processes=2", "--process_id=2"],
            "--process_id must be below --num_processes: got 2 and 2.",
        ),
        (
            ["--coordinator=h1:80", "--num_processes=x", "--process_id=0"],
            "--num_processes must be a number from 0 on: got 'x'.",
        ),
        (["--coordinator=auto", "--sweep=seed=0,1"], "--sweep is for one process"),
        (["--coordinator=auto", "--interactive"], "--interactive is for one process"),
        (
            ["--coordinator=auto", "--launcher=single"],
            "--coordinator needs --launcher=pmap or --launcher=sharded: got single.",
        ),
    ],
    ids=str,
)
def test_flags_that_do_not_fit_are_named(flags, line, monkeypatch):
    monkeypatch.setattr("builtins.input", lambda question: "")
    with pytest.raises(ConfigError, match=re.escape(line)):
        parse(["train.py", "--launcher=pmap", *flags])
