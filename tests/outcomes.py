"""The allowed outcomes of a call: a right result, or a refusal in one line that names an
argument."""

import contextlib
import re
import signal
from collections.abc import Callable, Iterable

DOCUMENTED = (ValueError, TypeError, NotImplementedError)
DEADLINE = 60  # Seconds; what takes longer hangs.


@contextlib.contextmanager
def deadline(seconds=DEADLINE):
    """Raises TimeoutError in what takes longer."""

    def late(number, frame):
        raise TimeoutError(f"no answer after {seconds} seconds")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def outcome(call: Callable, names: Iterable[str], documented=DOCUMENTED):
    """The result of a call, or None where it was refused as it should be.

    Args:
        call: Without arguments.
        names: Patterns, of which one is in the message of every refusal.
        documented: The types of a refusal.

    Raises:
        AssertionError: It ended in another way; the message begins with a word for it.
    """
    try:
        with deadline():
            return call()
    except documented as error:
        refusal = error
    except TimeoutError as error:
        raise AssertionError(f"hang: {error}") from error
    except Exception as error:
        raise AssertionError(f"traceback: {error!r}") from error
    text = str(refusal)
    if not re.search(rf"(?<!\w)({'|'.join(names)})(?!\w)", text) or "\n" in text:
        raise AssertionError(f"undocumented: {refusal!r}") from refusal
    return None
