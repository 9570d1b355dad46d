"""Short forms of benchmarks/reliability.py; docs/reliability.md says what each part promises.

The short forms of signals are in test_train_cli.py.
"""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))

from promises.damages import damages
from promises.disk import limited
from promises.kills import kill
from promises.trainer import TINY, Lab, Trainer


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    return Lab(tmp_path_factory.mktemp("lab"))


@pytest.fixture(scope="module")
def trainer(lab):
    """A command whose programs are compiled once."""
    return Trainer(lab, *TINY)


def test_a_kill_inside_a_save_loses_nothing(lab, trainer):
    rng, place = lab.rng("short"), lab.new("short")
    kill(trainer, place, rng, aim=True)
    trainer.complete(place)  # Raises an error where a promise is broken.


def test_a_file_that_may_not_grow_ends_the_run_in_a_line(lab, trainer):
    limited(lab, trainer, 2048)


# The reader's threads may still answer when its event loop is closed.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_no_damage_is_restored(lab, capsys):
    with capsys.disabled():
        found = list(damages(lab, 20))
    assert sum(row.tried for row in found) == 20
    assert [row for row in found if row.kept < row.tried] == []
