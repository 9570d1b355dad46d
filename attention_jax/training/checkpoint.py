"""Checkpoints: the state as one unit, written by orbax.

A checkpoint is a flat dict from path (`params.out.kernel`) to array, and a JSON object. So it does
not depend on the launcher or on the classes of the state. The JSON part holds a fingerprint of the
arrays, because orbax itself has no checksum.

Importing this module is cheap; orbax (about a second) is imported when a directory is opened.
"""

import contextlib
import errno
import functools
import hashlib
import itertools
import logging
import os
import re
import shutil
import sys
import textwrap
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

import jax
import jax.numpy as jnp
import numpy as np

from attention_jax.training.files import CHECKPOINTS, local_path, locate
from attention_jax.types import PyTree, TrainState

if TYPE_CHECKING:
    import orbax.checkpoint as ocp

MAX_NAMED = 3  # Leaves that an error about a misfit names.


class Checkpoints:
    """The checkpoints of one run, one numbered directory per step.

    Only one process may write a directory. Opening removes unfinished checkpoints (their names
    contain "tmp") of an earlier, killed process. If a write fails, on a full disk for example,
    `save`, `wait` or `close` raises OSError; earlier checkpoints stay as they are.

    Args:
        directory: Created when missing.
        keep: How many of the newest checkpoints stay. At least 2, because the newest may be broken.
        read_only: Opens another run's directory without changing it.

    Raises:
        ValueError: `keep` is below 2.
    """

    def __init__(self, directory: str | Path, *, keep: int = 2, read_only: bool = False):
        if keep < 2:
            raise ValueError(f"keep must be at least 2 checkpoints: got {keep}.")
        self.directory = local_path(directory, "directory").absolute()
        self._read_only = read_only
        self._has_failed = False
        self._manager = _open(self.directory, keep, read_only)

    def latest_step(self) -> int | None:
        """The step of the newest complete checkpoint, or None."""
        return self._manager.latest_step()

    def steps(self) -> list[int]:
        """The steps of the complete checkpoints, in order."""
        return sorted(self._manager.all_steps(read=True))

    def save(self, state: TrainState, config: Mapping[str, Any] | None = None) -> None:
        """Saves in the background; `state` may be donated or changed right after.

        Args:
            state: Saved under `state.step`, unless that step is saved already.
            config: Anything that JSON can hold, kept beside the arrays.
        """
        import orbax.checkpoint as ocp

        step = int(state.step)
        if step == self.latest_step():
            return
        arrays, key_types = _to_arrays(state)
        about = {
            "step": step,
            "fingerprint": fingerprint(arrays),
            "key_types": key_types,
            "config": dict(config or {}),
        }
        args = ocp.args.Composite(
            state=ocp.args.StandardSave(arrays), about=ocp.args.JsonSave(about)
        )
        with self._writing():
            saved = self._manager.save(step, args=args)
        if not saved:
            raise RuntimeError(
                f"{self.directory} already holds step {self.latest_step()}, after step {step}."
            )

    def restore(self, like: TrainState) -> TrainState | None:
        """Restores the newest checkpoint that is whole.

        A checkpoint that cannot be read or does not match its fingerprint is renamed to a name that
        ends in `.broken`, and a line on stderr says so.

        Args:
            like: A state of the structure, shapes and dtypes to restore; its arrays may be
                `jax.ShapeDtypeStruct`.

        Returns:
            The state, in host memory; None when there is no checkpoint.

        Raises:
            ValueError: The checkpoint and `like` do not fit; names the first leaves that differ.
            RuntimeError: All checkpoints are broken.
        """
        found = self._newest_whole()
        if found is None:
            return None
        arrays, about = found
        return fitted(arrays, like, f"the checkpoint of step {about['step']}")

    def restore_params(
        self, like: PyTree, trial: int | None = None, step: int | None = None
    ) -> PyTree:
        """Restores the parameters alone, as `restore` does.

        Args:
            like: As for `restore`.
            trial: The number of the trial, in a sweep.
            step: That of the checkpoint; None takes the newest that is whole.

        Raises:
            FileNotFoundError: There is no checkpoint, or none of this step.
            ValueError: The parameters and `like` do not fit, the sweep has no such trial, or the
                trial has diverged.
            RuntimeError: The checkpoint of this step is broken.
        """
        arrays, step = self.params(trial, step)
        return fitted(arrays, like, f"the checkpoint of step {step}", prefix="params.")

    def params(
        self, trial: int | None = None, step: int | None = None
    ) -> tuple[dict[str, np.ndarray], int]:
        """The parameters as they are, by their paths, and their step.

        Args and errors as in `restore_params`.
        """
        found = self._newest_whole() if step is None else self._of_step(step)
        if found is None:
            raise FileNotFoundError(f"no checkpoint in {self.directory}.")
        arrays, about = found
        if trial is not None:
            arrays = _params_of_trial(arrays, trial)
        start = "params."
        params = {x.removeprefix(start): y for x, y in arrays.items() if x.startswith(start)}
        return params, about["step"]

    def wait(self) -> None:
        """Returns when the last save is on disk; raises its errors."""
        with self._writing():
            self._manager.wait_until_finished()

    def close(self) -> None:
        """Waits, then ends the writer."""
        if self._has_failed:
            with contextlib.suppress(Exception):  # The error was raised once already.
                self._manager.close()
            return
        with self._writing():
            self._manager.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # orbax's threads may raise anything.
            self._has_failed = True
            # Keep only the system's error from the storage layer's long message.
            number = re.search(r"os_error_code='(\d+)'", str(error))
            number = int(number[1]) if number else getattr(error, "errno", None)
            reason = _in_short(error) if number is None else os.strerror(number)
            raise OSError(number or errno.EIO, reason, str(self.directory)) from error

    def _of_step(self, step: int) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        steps = self.steps()
        if step not in steps:
            raise FileNotFoundError(
                f"no checkpoint of step {step} in {self.directory}: there are "
                f"{', '.join(map(str, steps)) or 'none'}."
            )
        try:
            return self._read(step)
        except MemoryError:
            raise
        except Exception as error:  # After damage orbax may raise anything.
            raise RuntimeError(
                f"the checkpoint of step {step} in {self.directory} is broken: {_in_short(error)}"
            ) from error

    def _newest_whole(self) -> tuple[dict[str, np.ndarray], dict[str, Any]] | None:
        self.wait()
        steps = self.steps()[::-1]
        broken = []
        for step in steps:
            with warnings.catch_warnings():
                # orbax warns of coroutines never awaited when another part could not be read.
                warnings.simplefilter("ignore", RuntimeWarning)
                try:
                    found = self._read(step)
                except MemoryError:
                    raise
                except Exception as error:  # After damage orbax may raise anything.
                    broken.append((step, _in_short(error)))
                    continue
            # Only after a whole one was found: if all are broken, they stay as they are.
            for step_and_reason in broken:
                self._set_aside(*step_and_reason)
            return found
        if steps:
            raise RuntimeError(
                f"every checkpoint in {self.directory} is broken; the newest, of step "
                f"{steps[0]}: {broken[0][1]}"
            )
        return None

    def _read(self, step: int) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        import orbax.checkpoint as ocp

        found = self._manager.restore(
            step,
            args=ocp.args.Composite(state=ocp.args.StandardRestore(), about=ocp.args.JsonRestore()),
        )
        arrays, about = found["state"], found["about"]
        if about["step"] != step:
            raise ValueError(f"it is of step {about['step']}")
        if fingerprint(arrays) != about["fingerprint"]:
            raise ValueError("the arrays do not match their fingerprint")
        for path, kind in about["key_types"].items():
            arrays[path] = jax.random.wrap_key_data(arrays[path], impl=kind)
        return arrays, about

    def _set_aside(self, step: int, reason: str) -> None:
        print(
            f"Checkpoint {self.directory / str(step)} is broken, falling back to the one before: "
            f"{reason}",
            file=sys.stderr,
        )
        if not self._read_only:
            # Renamed, not deleted: the run will save this step again under its old name.
            names = (f"{step}.broken{number or ''}" for number in itertools.count())
            aside = next(place for name in names if not (place := self.directory / name).exists())
            (self.directory / str(step)).rename(aside)
            self._manager.reload()


def restore_params(run_directory: str | Path, like: PyTree, step: int | None = None) -> PyTree:
    """Reads the parameters of another run, without touching it.

    Args:
        run_directory: The workdir of that run; or of a trial, as `sweep/trials/001`; or of a
            complete sweep, for its best trial.
        like: Parameters of the structure, shapes and dtypes to restore.
        step: That of the checkpoint; None takes the newest that is whole.

    Raises:
        FileNotFoundError: There is no run or no checkpoint, or none of this step.
        ValueError: The parameters do not fit, naming the first leaves that differ; the trial has
            diverged; or the sweep has no best trial.
        RuntimeError: The checkpoints, or that of this step, are broken.
    """
    with _checkpoints(run_directory) as (checkpoints, trial):
        return checkpoints.restore_params(like, trial, step)


def checkpoint_steps(run_directory: str | Path) -> list[int]:
    """The steps whose checkpoints a run has kept, in order.

    Args:
        run_directory: As for `restore_params`.

    Raises:
        FileNotFoundError: There is no run or no checkpoint.
        ValueError: The sweep has no best trial.
    """
    with _checkpoints(run_directory) as (checkpoints, _):
        return checkpoints.steps()


def read_params(run_directory: str | Path) -> tuple[dict[str, np.ndarray], int]:
    """The newest parameters of a run by their paths, as `out.kernel`, and their step.

    Args:
        run_directory: As for `restore_params`.

    Raises:
        FileNotFoundError: There is no run or no checkpoint.
        ValueError: The trial has diverged; or the sweep has no best trial.
    """
    with _checkpoints(run_directory) as (checkpoints, trial):
        return checkpoints.params(trial)


@contextlib.contextmanager
def _checkpoints(run_directory: str | Path) -> Iterator[tuple[Checkpoints, int | None]]:
    """The checkpoints that hold a run, and the number of its trial."""
    run, trial = locate(local_path(run_directory, "run_directory"))
    directory = run / CHECKPOINTS
    if not directory.is_dir():
        raise FileNotFoundError(f"no checkpoint in {directory}.")
    with Checkpoints(directory, read_only=True) as checkpoints:
        yield checkpoints, trial


def fingerprint(tree: PyTree) -> str:
    """sha256 over the sorted paths, dtypes, shapes and bytes of all arrays, as 64 hex digits.

    It is equal for equal parameters, on any launcher, process or machine.
    """
    digest = hashlib.sha256()
    for path, array in sorted(_to_arrays(tree)[0].items()):
        digest.update(f"{path} {array.dtype} {array.shape}\n".encode())
        digest.update(array.tobytes())
    return digest.hexdigest()


def _open(directory: Path, keep: int, read_only: bool) -> "ocp.CheckpointManager":
    _quiet_orbax()
    import orbax.checkpoint as ocp
    from orbax.checkpoint import checkpoint_managers

    if not read_only:
        directory.mkdir(parents=True, exist_ok=True)
        # orbax's cleanup_tmp_directories works in the background, and reading and closing do not
        # wait for it, so this removes them directly.
        for unfinished in directory.glob("*.orbax-checkpoint-tmp*"):
            if unfinished.is_dir():
                shutil.rmtree(unfinished)
            else:
                unfinished.unlink()
    alone = {}
    if jax.process_count() > 1:  # Else orbax would wait for the other processes.
        alone["multiprocessing_options"] = ocp.options.MultiprocessingOptions(
            primary_host=jax.process_index(),
            active_processes={jax.process_index()},
            barrier_sync_key_prefix=f"process_{jax.process_index()}",
        )
    options = ocp.CheckpointManagerOptions(
        preservation_policy=checkpoint_managers.LatestN(keep),
        create=False,
        read_only=read_only,
        **alone,
    )
    return ocp.CheckpointManager(directory, options=options, item_names=("state", "about"))


@functools.cache
def _quiet_orbax() -> None:
    """Silences the output of orbax and its threads; errors are raised as well.

    Orbax logs every step on absl's logger. If one of many arrays cannot be read or written, orbax
    ends the event loop; results for the other arrays then cause "never retrieved" and "loop is
    closed" messages.
    """
    logging.getLogger("absl").addFilter(lambda record: "orbax" not in record.pathname)
    logging.getLogger("asyncio").addFilter(
        lambda record: "never retrieved" not in record.msg or "OCDBT" not in record.getMessage()
    )
    hook = sys.unraisablehook

    def unraisable(error: Any) -> None:
        if (error.exc_type, str(error.exc_value)) != (RuntimeError, "Event loop is closed"):
            hook(error)

    sys.unraisablehook = unraisable


def _in_short(error: Exception) -> str:
    """One short line of an error: the storage layer below orbax writes long messages."""
    return textwrap.shorten(str(error) or type(error).__name__, 100, placeholder=" ...")


def _to_arrays(tree: PyTree) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """A copy in host memory as `{path: array}`, and `{path: kind}` of its PRNG keys.

    It is a copy, because on CPU `np.asarray` is a view: while the writer holds the view, the next
    step cannot use the donated buffer.
    """
    arrays, key_types = {}, {}
    for path, leaf in _leaves(tree).items():
        if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            key_types[path] = str(jax.random.key_impl(leaf))
            leaf = jax.random.key_data(leaf)
        arrays[path] = np.array(leaf)
    return arrays, key_types


def _params_of_trial(arrays: Mapping[str, np.ndarray], trial: int) -> dict[str, np.ndarray]:
    """`{"params.*": array}` of a trial, from the arrays of a `sweep.SweepState`."""
    for group in (path for path in arrays if path.startswith("numbers.")):
        (place,) = np.nonzero(arrays[group] == trial)
        if len(place):
            break
    else:
        raise ValueError(f"the sweep has no trial {trial}.")
    if step := int(arrays["diverged"][trial]):
        raise ValueError(f"trial {trial} diverged at step {step}: it has no final parameters.")
    start = f"trials.{group.removeprefix('numbers.')}.0."
    return {
        f"params.{path.removeprefix(start)}": array[place[0]]
        for path, array in arrays.items()
        if path.startswith(start)
    }


def fitted(found: PyTree, like: PyTree, what: str, *, prefix: str = "") -> PyTree:
    """The arrays of one tree in the structure of another.

    Args:
        found: A tree; or its arrays by their paths, as `out.kernel`.
        like: The structure, shapes and dtypes that they must have.
        what: The name of their source, for the error.
        prefix: Goes before the paths in the error.

    Raises:
        ValueError: They do not fit; names the first leaves that differ.
    """
    wanted, arrays = _leaves(like), _leaves(found)

    def describe(tree: Mapping[str, Any], path: str) -> str:
        if path not in tree:
            return "nothing"
        leaf = tree[path]
        return f"{leaf.dtype}{list(leaf.shape)}" if hasattr(leaf, "dtype") else type(leaf).__name__

    misfits = [
        f"{prefix}{path}: wanted {describe(wanted, path)}, found {describe(arrays, path)}"
        for path in sorted(wanted.keys() | arrays.keys())
        if describe(wanted, path) != describe(arrays, path)
    ]
    if misfits:
        more = f"; and {len(misfits) - MAX_NAMED} more" if len(misfits) > MAX_NAMED else ""
        raise ValueError(f"{what} does not fit: {'; '.join(misfits[:MAX_NAMED])}{more}.")
    return jax.tree.unflatten(jax.tree.structure(like), [arrays[path] for path in wanted])


def _leaves(tree: PyTree) -> dict[str, Any]:
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in leaves}
