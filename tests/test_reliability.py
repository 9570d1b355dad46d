"""Short forms of benchmarks/reliability.py; docs/reliability.md says what each part promises."""

import signal
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))

from promises.damages import damages
from promises.disk import limited
from promises.kills import kill
from promises.signals import stop
from promises.trainer import TINY, Lab, Trainer


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    return Lab(tmp_path_factory.mktemp("lab"))


@pytest.fixture(scope="module")
def trainer(lab):
    """A command whose programs are compiled once."""
    return Trainer(lab, *TINY)


def test_kills_and_signals_lose_nothing(lab, trainer):
    # Each raises an error where a promise is broken.
    rng, place = lab.rng("short"), lab.new("short")
    kill(trainer, place, rng, aim=True)
    stop(trainer, place, "save", signal.SIGINT, rng, twice=True)
    trainer.complete(place)


def test_a_file_that_may_not_grow_ends_the_run_in_a_line(lab, trainer):
    limited(lab, trainer, 2048)


# The reader's threads may still answer when its event loop is closed.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_no_damage_is_restored(lab, capsys):
    with capsys.disabled():
        found = list(damages(lab, 20))
    assert sum(row.tried for row in found) == 20
    assert [row for row in found if row.kept < row.tried] == []
