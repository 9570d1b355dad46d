"""Promises of the checkpoints: whole, exact, strict, and safe against damaged files."""

import shutil
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from attention_jax.training.checkpoint import (
    Checkpoints,
    checkpoint_steps,
    fingerprint,
    restore_params,
)
from attention_jax.training.launch import LAUNCHERS
from attention_jax.training.step import make_epoch, make_train_step, squared_error
from attention_jax.types import Batch, TrainState

OPTIMIZER = optax.adam(0.01)


def new_state(step=0):
    params = {
        "out": {"kernel": np.arange(15, dtype=np.float32).reshape(3, 5) + step},
        "half": np.ones(7, jnp.bfloat16),
        # Too long for the index of a checkpoint, and without a pattern to compress.
        "wide": np.random.default_rng(step).standard_normal(500, np.float32),
    }
    return TrainState(np.int32(step), params, OPTIMIZER.init(params), jax.random.key(step))


def assert_equal(got, expected):
    assert jax.tree.structure(got) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        assert a.dtype == b.dtype
        if jnp.issubdtype(a.dtype, jax.dtypes.prng_key):
            a, b = jax.random.key_data(a), jax.random.key_data(b)
        np.testing.assert_array_equal(a, b)


def write(directory, *steps):
    with Checkpoints(directory) as checkpoints:
        for step in steps:
            checkpoints.save(new_state(step), {"learning_rate": 0.1})


def numbered(directory):
    return sorted(path.name for path in directory.iterdir())


def test_restores_what_was_saved(tmp_path):
    with Checkpoints(tmp_path / "new") as checkpoints:
        assert checkpoints.latest_step() is None
        assert checkpoints.restore(new_state()) is None
        checkpoints.save(new_state(4))
        checkpoints.save(new_state(4))  # Once more is not an error: SIGTERM may come right after.
        checkpoints.wait()
    with Checkpoints(tmp_path / "new") as checkpoints:
        assert checkpoints.latest_step() == 4
        assert_equal(checkpoints.restore(new_state()), new_state(4))
        assert_equal(checkpoints.restore(jax.eval_shape(new_state)), new_state(4))


def test_keeps_the_newest_and_clears_the_unfinished(tmp_path):
    write(tmp_path, 1, 2, 3)
    assert numbered(tmp_path) == ["2", "3"]
    (tmp_path / "4.orbax-checkpoint-tmp").mkdir()
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.latest_step() == 3
    assert numbered(tmp_path) == ["2", "3"]
    with pytest.raises(ValueError, match="keep must be at least 2 checkpoints: got 1"):
        Checkpoints(tmp_path, keep=1)


def test_an_older_step_is_not_dropped_silently(tmp_path):
    write(tmp_path, 5)
    with Checkpoints(tmp_path) as checkpoints, pytest.raises(RuntimeError, match="holds step 5"):
        checkpoints.save(new_state(3))


def test_donated_state_is_saved_as_it_was(tmp_path):
    add = jax.jit(
        lambda s: s._replace(params=jax.tree.map(lambda x: x + 1, s.params)), donate_argnums=0
    )
    with Checkpoints(tmp_path) as checkpoints:
        state = jax.device_put(new_state(2))
        params = {"out": {"kernel": jnp.zeros((2000, 2000))}}
        state = state._replace(params=params)
        checkpoints.save(state)
        for _ in range(5):
            state = add(state)
        found = checkpoints.restore(jax.eval_shape(lambda: state))
    assert not found.params["out"]["kernel"].any()


def test_misfit_names_the_leaves(tmp_path):
    write(tmp_path, 2)
    state = new_state()
    params = {"out": {"kernel": jnp.zeros((3, 4)), "bias": jnp.zeros(3)}}
    with Checkpoints(tmp_path) as checkpoints:
        with pytest.raises(ValueError, match=r"^the checkpoint of step 2 does not fit: ") as error:
            checkpoints.restore(state._replace(params=params))
        assert "params.half: wanted nothing, found bfloat16[7]" in str(error.value)
        assert "params.out.bias: wanted float32[3], found nothing" in str(error.value)
        assert "params.out.kernel: wanted float32[3, 4], found float32[3, 5]" in str(error.value)
        with pytest.raises(ValueError, match="opt_state"):
            checkpoints.restore(state._replace(opt_state=optax.sgd(0.1).init(state.params)))
        with pytest.raises(ValueError, match="step: wanted int16"):
            checkpoints.restore(state._replace(step=np.int16(0)))
        with pytest.raises(ValueError, match="rng: wanted"):
            checkpoints.restore(state._replace(rng=jax.random.key(0, impl="rbg")))
    assert numbered(tmp_path) == ["2"], "a misfit is the caller's mistake, not a broken checkpoint"


def flip_a_bit(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)


def put_a_directory(path):
    path.unlink()
    path.mkdir()


DAMAGES = {
    "cut": lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
    "empty": lambda path: path.write_bytes(b""),
    "gone": lambda path: path.unlink(),
    "changed": lambda path: path.write_bytes(bytes(255 - b for b in path.read_bytes())),
    "zeros": lambda path: path.write_bytes(bytes(path.stat().st_size)),
    "a bit": flip_a_bit,
    "a directory": put_a_directory,
}
PARTS = {
    "state/manifest.ocdbt": None,
    "state/_METADATA": None,
    "about/metadata": None,
    "state/d/*": "the index of the arrays",
    "state/ocdbt.process_0/d/*": "the arrays, in the largest of these files",
}


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """The checkpoints of two steps, to be copied."""
    write(directory := tmp_path_factory.mktemp("two") / "checkpoints", 2, 4)
    return directory


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("part", PARTS)
def test_broken_newest_gives_way_to_the_one_before(two, tmp_path, capfd, part, damage):
    shutil.copytree(two, tmp_path, dirs_exist_ok=True)
    largest = max(tmp_path.glob(f"4/{part}"), key=lambda path: path.stat().st_size)
    DAMAGES[damage](largest)
    with Checkpoints(tmp_path) as checkpoints:
        assert_equal(checkpoints.restore(new_state()), new_state(2))
        time.sleep(0.02)  # The storage layer's threads go on a while.
        (line,) = capfd.readouterr().err.splitlines()
        assert line.startswith(f"Checkpoint {tmp_path / '4'} is broken, falling back to ")
        assert checkpoints.latest_step() == 2
        checkpoints.save(new_state(4))  # The resumed run comes by again.
        assert_equal(checkpoints.restore(new_state()), new_state(4))
    assert numbered(tmp_path) == ["2", "4", "4.broken"]


def test_arrays_that_read_well_but_differ_are_noticed(tmp_path, capsys):
    write(tmp_path, 2, 4)
    # The arrays of step 2 in the place of step 4: no reader complains.
    shutil.rmtree(tmp_path / "4" / "state")
    shutil.copytree(tmp_path / "2" / "state", tmp_path / "4" / "state")
    with Checkpoints(tmp_path) as checkpoints:
        assert int(checkpoints.restore(new_state()).step) == 2
    assert "do not match their fingerprint" in capsys.readouterr().err


def test_a_checkpoint_under_the_number_of_another_is_broken(two, tmp_path, capfd):
    shutil.copytree(two / "2", tmp_path / "2")
    shutil.copytree(two / "2", tmp_path / "7")
    (tmp_path / "7.broken").mkdir()
    (tmp_path / "9.orbax-checkpoint-tmp").touch()
    with Checkpoints(tmp_path) as checkpoints:
        assert int(checkpoints.restore(new_state()).step) == 2
    assert "it is of step 2" in capfd.readouterr().err
    assert numbered(tmp_path) == ["2", "7.broken", "7.broken1"]


def test_nothing_but_broken_checkpoints_is_an_error_and_leaves_all_as_it_is(two, tmp_path, capfd):
    shutil.copytree(two, tmp_path, dirs_exist_ok=True)
    for step in ("2", "4"):
        shutil.rmtree(tmp_path / step / "state" / "d")
    with Checkpoints(tmp_path) as checkpoints:
        with pytest.raises(
            RuntimeError, match=r"broken; the newest, of step 4: NOT_FOUND"
        ) as error:
            checkpoints.restore(new_state())
        time.sleep(0.02)
    assert "\n" not in str(error.value)
    assert capfd.readouterr() == ("", "")
    assert numbered(tmp_path) == ["2", "4"]


TROUBLE = """
import resource, shutil, signal, sys
import tests.test_checkpoint as t

signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGXFSZ])
with t.Checkpoints(sys.argv[1]) as checkpoints:
    checkpoints.save(t.new_state(2))
    for _ in range(5):
        checkpoints.save(t.new_state(4))
        checkpoints.wait()
        shutil.rmtree(checkpoints.directory / "4" / "state" / "d")
        checkpoints.restore(t.new_state())
    resource.setrlimit(resource.RLIMIT_FSIZE, (200, 200))  # As a full disk.
    checkpoints.save(t.new_state(4))
    try:
        checkpoints.wait()
    except OSError as error:
        print(error)
"""


def test_threads_of_the_storage_layer_print_nothing(tmp_path):
    """In a process of its own: pytest keeps what threads complain of from stderr."""
    pytest.importorskip("resource")
    root = Path(__file__).parent.parent
    command = [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(root)!r}){TROUBLE}"]
    run = subprocess.run([*command, tmp_path], capture_output=True, text=True, check=True)
    assert run.stdout == f"[Errno 27] File too large: '{tmp_path}'\n"
    assert [line.split(" is broken")[0] for line in run.stderr.splitlines()] == [
        f"Checkpoint {tmp_path / '4'}"
    ] * 5
    # The checkpoint before is as it was, and there is room again.
    with Checkpoints(tmp_path) as checkpoints:
        assert_equal(checkpoints.restore(new_state()), new_state(2))
        checkpoints.save(new_state(4))
    assert numbered(tmp_path)[:2] == ["2", "4"]


def test_parameters_of_another_run_are_read_and_not_touched(tmp_path):
    run = tmp_path / "run"
    write(run / "checkpoints", 2, 4)
    (run / "checkpoints" / "6.orbax-checkpoint-tmp").mkdir()
    assert_equal(restore_params(run, new_state().params), new_state(4).params)
    with pytest.raises(ValueError, match=r"params\.half: wanted nothing"):
        restore_params(run, {"out": new_state().params["out"]})
    (run / "checkpoints" / "4" / "about" / "metadata").unlink()
    assert_equal(restore_params(run, new_state().params), new_state(2).params)
    assert numbered(run / "checkpoints") == ["2", "4", "6.orbax-checkpoint-tmp"]
    with pytest.raises(FileNotFoundError, match="no checkpoint in"):
        restore_params(tmp_path / "elsewhere", new_state().params)


def test_parameters_of_an_earlier_step_are_read(tmp_path):
    run = tmp_path / "run"
    write(run / "checkpoints", 2, 4)
    assert checkpoint_steps(run) == [2, 4]
    like = new_state().params
    assert_equal(restore_params(run, like, step=2), new_state(2).params)
    with pytest.raises(FileNotFoundError, match=r"no checkpoint of step 3 in .*: there are 2, 4\."):
        restore_params(run, like, step=3)
    (run / "checkpoints" / "2" / "about" / "metadata").unlink()
    with pytest.raises(RuntimeError, match=r"the checkpoint of step 2 in .* is broken"):
        restore_params(run, like, step=2)
    with pytest.raises(FileNotFoundError, match="no checkpoint in"):
        checkpoint_steps(tmp_path / "elsewhere")


def test_fingerprint_sees_paths_types_shapes_and_bytes():
    tree = {"a": np.zeros((2, 3), np.float32), "b": np.arange(4, dtype=np.int32)}
    same = {"b": jnp.arange(4, dtype=jnp.int32), "a": jnp.zeros((2, 3))}
    others = [
        {"a": tree["a"], "c": tree["b"]},
        {"a": tree["a"].reshape(3, 2), "b": tree["b"]},
        {"a": tree["a"].view(np.int32), "b": tree["b"]},
        {"a": tree["a"] + np.float32(1e-20), "b": tree["b"]},
        {"a": tree["a"], "b": tree["b"][::-1]},
    ]
    assert fingerprint(tree) == fingerprint(same)
    assert len({fingerprint(t) for t in [tree, *others]}) == 6
    assert len(fingerprint(tree)) == 64


def run(launcher, state, num_steps):
    """`num_steps` steps of two per call, whose noise depends on the key in the state."""

    def sample(rng, rows):
        x = jax.vmap(lambda row: jax.random.normal(jax.random.fold_in(rng, row), (1, 3)))(rows)
        return Batch(x, x[..., ::-1], jnp.ones((len(rows), 1)))

    def apply(params, batch, rng):
        return batch.inputs @ params["kernel"] + 0.1 * jax.random.normal(rng, (3,))

    step = make_train_step(squared_error(apply), OPTIMIZER, axis_name=launcher.axis_name)
    epoch = launcher.compile(
        make_epoch(step, sample, 2, rng=jax.random.key(9), constrain=launcher.constrain),
        donate=True,
    )
    state, rows = launcher.put_state(state), launcher.put_batch(np.arange(8))
    for _ in range(num_steps // 2):
        state, _ = epoch(state, rows)
    return state


@pytest.mark.parametrize("name", LAUNCHERS)
def test_resumed_run_ends_like_the_uninterrupted_one(tmp_path, name):
    launcher = LAUNCHERS[name]()

    def start():
        params = {"kernel": np.eye(3, dtype=np.float32)}
        return TrainState(np.int32(0), params, OPTIMIZER.init(params), jax.random.key(1))

    whole = run(launcher, start(), 8)
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(run(launcher, start(), 4))
    with Checkpoints(tmp_path) as checkpoints:
        resumed = run(launcher, checkpoints.restore(start()), 4)
    assert fingerprint(resumed) == fingerprint(whole)
    assert int(resumed.step) == 8
    assert fingerprint(start()) != fingerprint(whole)


def test_orbax_is_imported_only_to_open_a_directory():
    code = (
        "import attention_jax.training.checkpoint, sys; sys.exit('orbax.checkpoint' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
