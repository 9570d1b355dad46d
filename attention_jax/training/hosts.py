"""Several processes: one run on many hosts, by JAX's distributed runtime.

All processes get the same command and compute the same numbers. Process 0 alone reads and writes
the run directory, and prints; the others get the state from it. A process that dies ends all
others. Importing this module is cheap.
"""

import contextlib
import json
import os
import re
import socket
import sys
import threading
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

from attention_jax.training.process import RunError

if TYPE_CHECKING:
    from attention_jax.types import PyTree

AUTO = "auto"
PERIOD, SILENCE = 1.0, 15.0  # Seconds between signs of life, and without one until we end.
_PAUSE = 0.1  # Seconds between looks at the others when this process has completed its work.
_HEARTBEAT = 40  # Seconds after which jax itself ends us, with a trace of C++: later than we do.
_SHUTDOWN = 1200  # Seconds that a process of a stopped run waits for the last one, which writes.
_STATUS = re.compile("[A-Z_]+: ")  # Begins an error of XLA: "UNKNOWN: Gloo AllGather failed".


class Hosts(NamedTuple):
    """Who takes part, by the flags; all None in a run of one process.

    Attributes:
        coordinator: "host:port" of process 0; or "auto": the cluster's environment tells all three
            (Slurm, Open MPI, Kubernetes, Cloud TPU).
        num_processes, process_id: How many there are, and which one this is, counted from 0.
    """

    coordinator: str | None = None
    num_processes: int | None = None
    process_id: int | None = None


def join(hosts: Hosts) -> None:
    """Meets the other processes. Call it before anything else uses jax.

    Raises:
        RunError: They do not meet.
    """
    if hosts.coordinator is None:
        return
    import jax

    # It would tell of signals that the processes tell one another themselves.
    jax.config.update("jax_enable_preemption_service", False)
    where = None if hosts.coordinator == AUTO else hosts.coordinator
    if where is not None and hosts.process_id == 0 and _is_taken(where):
        raise RunError(
            f"--coordinator={where}: something listens there already. Has another process the flag "
            "--process_id=0 too?"
        )
    try:
        jax.distributed.initialize(
            where,
            hosts.num_processes,
            hosts.process_id,
            # None lets jax give each process one GPU under Slurm and Open MPI.
            local_device_ids=None if where is None else [],
            heartbeat_timeout_seconds=_HEARTBEAT,
            shutdown_timeout_seconds=_SHUTDOWN,
        )
    except (RuntimeError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise RunError(f"--coordinator={hosts.coordinator}: {reason}") from error
    if jax.process_count() == 1:
        return
    if not is_first():
        sys.stdout.flush()
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    _watcher.start()


def _is_taken(address: str) -> bool:
    """Whether anything listens at "host:port"."""
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=1).close()
    except OSError:
        return False
    return True


@contextlib.contextmanager
def together() -> Iterator[None]:
    """Ends this process in a line when a sum fails because another process is lost."""
    from jax.errors import JaxRuntimeError

    try:
        yield
    except (JaxRuntimeError, ValueError) as error:
        # jax raises some errors of its runtime as a ValueError; the text names the status too.
        is_of_runtime = isinstance(error, JaxRuntimeError) or _STATUS.match(str(error))
        if count() == 1 or not is_of_runtime or "RESOURCE_EXHAUSTED" in str(error):
            raise
        _end(f"the connection to another of {count()} processes is lost")


def count() -> int:
    """The number of processes."""
    import jax

    return jax.process_count()


def is_first() -> bool:
    """Whether this is process 0, or the only one."""
    import jax

    return jax.process_index() == 0


def done() -> None:
    """Says that this process has completed its work, and waits until all others have too.

    If one is lost before that, this process ends in a line.
    """
    if count() > 1:
        _finished.set()
        _watcher.join()


# What process 0 tells the others ------------------------------------------------------------------

_told = False


def tell(message: dict[str, Any] | RunError) -> None:
    """Process 0 answers the one `listen` of the others; later calls do nothing."""
    global _told
    if count() == 1 or _told:
        return
    _told = True
    if isinstance(message, RunError):
        message = {"error": str(message), "status": message.status}
    _share_text(json.dumps(message))


def listen() -> dict[str, Any]:
    """The message of process 0.

    Raises:
        RunError: Process 0 has told an error.
    """
    message = json.loads(_share_text(""))
    if "error" in message:
        error = RunError(f"process 0: {message['error']}")
        error.status = message["status"]
        raise error
    return message


def share(state: "PyTree") -> "PyTree":
    """The tree of process 0, in host memory, whose structure and shapes all processes know."""
    if count() == 1:
        return state
    import jax
    import jax.numpy as jnp
    from jax.experimental import multihost_utils

    is_key = lambda x: jnp.issubdtype(x.dtype, jax.dtypes.prng_key)
    data = jax.tree.map(lambda x: jax.random.key_data(x) if is_key(x) else x, state)
    data = multihost_utils.broadcast_one_to_all(jax.device_get(data))
    again = lambda x, y: (
        jax.random.wrap_key_data(y, impl=jax.random.key_impl(x)) if is_key(x) else y
    )
    return jax.tree.map(again, state, data)


def largest(number: int) -> int:
    """The largest of the processes' numbers; all must call it."""
    if count() == 1:
        return number
    import numpy as np
    from jax.experimental import multihost_utils

    return int(multihost_utils.process_allgather(np.int32(number)).max())


def _share_text(text):
    import numpy as np
    from jax.experimental import multihost_utils

    raw = np.frombuffer(text.encode(), np.uint8)
    size = int(multihost_utils.broadcast_one_to_all(np.int32(raw.size)))
    if not is_first():
        raw = np.zeros(size, np.uint8)
    return bytes(multihost_utils.broadcast_one_to_all(raw)).decode()


# Signs of life ------------------------------------------------------------------------------------

_SIGNS, _DONE = "attention_jax/alive", "done"
_finished = threading.Event()


def _watch() -> None:
    """Ends this process in a line when another one gives no sign of life.

    Without it the process would wait for the lost one, in a sum or at its end.
    """
    others = [number for number in range(count()) if number != _index()]
    heard = dict.fromkeys(others, ("", time.monotonic()))
    finished = False
    while not (finished and all(sign == _DONE for sign, _ in heard.values())):
        finished = _finished.wait(PERIOD)
        if finished:
            time.sleep(_PAUSE)
        _sign(_DONE if finished else str(time.monotonic()))
        for number in others:
            sign = _sign_of(number)
            if sign == _DONE or sign != heard[number][0]:
                heard[number] = sign, time.monotonic()
            elif time.monotonic() - heard[number][1] > SILENCE:
                _end(f"process {number} of {count()} gives no sign of life")


def _end(reason):
    line = f"{reason}, so this one ends. Repeat all commands to go on from the last checkpoint.\n"
    os.write(2, line.encode())
    os._exit(1)  # Any other way to leave would wait for the lost process.


def _sign(text):
    from jax.errors import JaxRuntimeError

    # Without process 0, which keeps the signs, jax ends this process.
    with contextlib.suppress(JaxRuntimeError):
        _client().key_value_set(f"{_SIGNS}/{_index()}", text, allow_overwrite=True)


def _sign_of(number):
    from jax.errors import JaxRuntimeError

    try:
        return _client().key_value_try_get(f"{_SIGNS}/{number}")
    except JaxRuntimeError:  # It has given none yet.
        return ""


def _index():
    import jax

    return jax.process_index()


def _client():
    from jax._src import distributed  # It has no public name.

    return distributed.global_state.client


_watcher = threading.Thread(target=_watch, daemon=True)
