"""Where the numbers of a run go: a screen, a JSON lines file, TensorBoard.

A row is a flat dict: `step` and `epoch` done so far, `seconds` if the time of that step is known,
and the metrics. Every writer has `write(row)` and `close()`.
"""

import contextlib
import json
import math
import os
import re
import sys
import threading
import time
import unicodedata
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol, TextIO

from attention_jax.training.config import flatten
from attention_jax.training.process import RunError

Row = Mapping[str, int | float]

PATIENCE = 10.0  # Seconds that a reader of the lines waits for the next one.
SILENCE = 5.0  # Seconds without a line after which a program that is being compiled is named.

# The axis of a plot, not a curve.
_COUNTERS = ("step", "epoch", "seconds")

# The metrics that the console shows, and their names there.
_LABELS = {
    "loss": "loss",
    "accuracy": "accuracy",
    "skipped": "skipped",
    "eval_loss": "held-out loss",
    "eval_accuracy": "held-out accuracy",
    "eval_loss_in_bits_per_character": "bits per character",
    "active": "active trials",
    "best_loss": "best loss",
    "best_accuracy": "best accuracy",
    "best_eval_loss": "best held-out loss",
    "best_eval_accuracy": "best held-out accuracy",
}

_HELD_OUT = ("eval_loss", "eval_accuracy")


def to_json(value: Mapping[str, Any], *, indent: int | None = None) -> str:
    """The JSON text of an object. JSON has no NaN or infinity.

    Raises:
        RunError: Names the numbers that are NaN or infinite.
    """
    try:
        return json.dumps(value, indent=indent, allow_nan=False)
    except ValueError as error:
        numbers = ((n, x) for n, x in flatten(dict(value)).items() if isinstance(x, float))
        broken = ", ".join(f"{name} is {x}" for name, x in numbers if not math.isfinite(x))
        raise RunError(f"a number to be written must be finite: {broken or error}.") from error


class Writer(Protocol):
    def write(self, row: Row) -> None: ...

    def close(self) -> None: ...


class JsonLines:
    """One JSON object per row; `pandas.read_json(path, lines=True)` reads it.

    Opening it for a run that continues after `last_step` drops all later lines, also the torn line
    of a killed process. The run writes those rows again.

    Attributes:
        rows: All rows in the file, old ones too.

    Raises:
        ValueError: Up to `last_step` a line is no row, or a row is missing at the end; the file is
            left as it is.
    """

    def __init__(self, path: Path, last_step: int = 0):
        with contextlib.ExitStack() as on_error:
            self._file = on_error.enter_context(open(path, "a+b"))
            self.rows = _rows_up_to(last_step, self._file)
            on_error.pop_all()  # From here on close() closes it.

    def write(self, row: Row) -> None:
        line = to_json(row)
        self.rows.append(row)
        self._file.write(line.encode() + b"\n")
        # Hand the row to the system, where `kill -9` cannot lose it.
        self._file.flush()

    def sync(self) -> None:
        """Returns when the rows are on the disk; a checkpoint must not be newer than its rows."""
        os.fsync(self._file.fileno())

    def close(self) -> None:
        # The system has every row already, or `write` has raised.
        with contextlib.suppress(OSError):
            self._file.close()


def _rows_up_to(last_step, file):
    """Reads the rows up to a step, and drops what the file holds behind it."""
    rows, step, size = [], 0, 0
    file.seek(0)
    while step < last_step:
        line = file.readline()
        row = _row(line)
        if not line:
            raise ValueError(
                f"{file.name} ends at step {step}, the checkpoint at step {last_step}."
            )
        if row is None or not step < row["step"] <= last_step:
            raise ValueError(
                f"{file.name} is damaged: line {len(rows) + 1} must be the row of a step after "
                f"{step}, up to {last_step}: got {line[:40]!r}."
            )
        rows.append(row)
        step, size = row["step"], size + len(line)
    if os.fstat(file.fileno()).st_size > size:
        file.truncate(size)
    return rows


def _row(line):
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if not (isinstance(row, dict) and isinstance(row.get("step"), int)):
        return None
    return row if all(isinstance(value, int | float) for value in row.values()) else None


class Samples:
    """The texts that a model has written while it trained, to be read by people.

    A line `step 500` comes before each text, whose lines begin with four spaces. Opening the file
    for a run that continues after `last_step` drops all later texts.
    """

    _STEP = re.compile(rb"step (\d+)\n?")

    def __init__(self, path: Path, last_step: int = 0):
        self._file = None
        self._path = path
        if path.exists():
            self._open()
            size = 0
            for line in self._file:
                found = self._STEP.fullmatch(line)
                if found and int(found[1]) > last_step:
                    break
                size += len(line)
            self._file.truncate(size)

    def write(self, step: int, text: str) -> None:
        if self._file is None:
            self._open()
        shown = "".join(f"    {line}\n" for line in text.split("\n"))
        self._file.write(f"step {step}\n{shown}".encode())
        self._file.flush()

    def sync(self) -> None:
        """Returns when the texts are on the disk."""
        if self._file is not None:
            os.fsync(self._file.fileno())

    def close(self) -> None:
        if self._file is not None:
            with contextlib.suppress(OSError):  # As in `JsonLines`.
                self._file.close()

    def _open(self):
        self._file = open(self._path, "a+b")  # noqa: SIM115 - `close` closes it.
        self._file.seek(0)


class TensorBoard:
    """Event files, if tensorboardX is installed; otherwise it prints one note."""

    def __init__(self, directory: Path, last_step: int = 0):
        self._directory, self._last_step = directory, last_step
        self._events = None
        self._absent = False

    def write(self, row: Row) -> None:
        if self._absent:
            return
        if self._events is None and not self._open():
            return
        from tensorboardX.proto.event_pb2 import Event
        from tensorboardX.proto.summary_pb2 import Summary

        values = []
        for name in sorted(row.keys() - set(_COUNTERS)):
            # A tag may hold no "@", "=" or ",": the slices of a metric stand below it.
            tag = re.sub(r"[^-/\w.]", "_", name.replace("@", "/"))
            values.append(Summary.Value(tag=tag, simple_value=row[name]))
        summary = Summary(value=values)
        self._events.write_event(Event(wall_time=time.time(), step=row["step"], summary=summary))

    def sync(self) -> None:
        """Returns when all rows are on the disk."""
        if self._events is not None:
            self._events.flush()

    def close(self) -> None:
        if self._events is not None:
            self._events.close()

    def _open(self) -> bool:
        try:
            # Imported late: with torch it takes seconds, and the first epochs train meanwhile.
            from tensorboardX import event_file_writer
            from tensorboardX.proto.event_pb2 import Event, SessionLog
        except ImportError:
            self._absent = True
            print("tensorboardX is not installed: no TensorBoard events.")
            return False
        # Not its SummaryWriter: on a full disk its thread ends with a traceback, and closing waits
        # for it.
        self._directory.mkdir(exist_ok=True)
        self._events = event_file_writer.EventsWriter(str(self._directory / "events"))
        # This hides events that a killed process wrote after the checkpoint.
        start = SessionLog(status=SessionLog.START)
        self._events.write_event(Event(step=self._last_step + 1, session_log=start))
        return True


class Busy:
    """Names work that takes long, while it runs: `with busy("compiling"): ...`.

    It prints the text when SILENCE has passed since the last line. So it names one long
    compilation, and also the third of six compilations of some seconds each.

    Args:
        say: Takes the text; called from another thread.

    Attributes:
        since: The time of the last line, by `time.monotonic`; set it after printing a line.
    """

    def __init__(self, say: Callable[[str], None]):
        self._say = say
        self.since = time.monotonic()

    @contextlib.contextmanager
    def __call__(self, text: str) -> Iterator[None]:
        def tell() -> None:
            self.since = time.monotonic()
            with contextlib.suppress(BrokenPipeError):  # The next print raises it again.
                self._say(text)

        timer = threading.Timer(max(0.0, self.since + SILENCE - time.monotonic()), tell)
        timer.daemon = True
        timer.start()
        try:
            yield
        finally:
            timer.cancel()
            timer.join()  # A line half written comes before the next one.


def harmless(text: str) -> str:
    """A text of which nothing moves the cursor of a terminal, but for tabs and newlines.

    >>> harmless("a\\x1b[2Jb")
    'a\\\\x1b[2Jb'
    """

    def visible(letter):
        moves = letter not in "\t\n" and unicodedata.category(letter) in ("Cc", "Zl", "Zp")
        return letter.encode("unicode_escape").decode() if moves else letter

    return "".join(map(visible, text))


def _written(text: str) -> str:
    """What a model has written, line by line."""
    return "\n".join(f"    | {line}" for line in harmless(text).split("\n"))


class Console:
    """A progress bar in a terminal, else lines for a log file.

    There are about ten lines a run, and more if ten seconds would pass without one.

    Args:
        epochs: Of the run. None: `set_epochs` will say; the lines then tell how long it takes too.
        first_epoch: Epochs done before.
        stream: None for stdout.

    Attributes:
        busy: Names long work between rows.
    """

    def __init__(self, epochs: int | None, first_epoch: int = 0, stream: TextIO | None = None):
        self._stream = sys.stdout if stream is None else stream
        self._epochs, self._interval = 0, 1
        self._shows_left = epochs is None
        self._begun = None  # The epoch after which their number was known, and the time.
        self._next = PATIENCE  # The second at which the next line is due, in any epoch.
        self._bar = None
        self._held_out: dict[str, float] = {}  # The newest numbers, for the bar.
        self.busy = Busy(self._note)
        if self._stream is not None and self._stream.isatty():  # None: closed by the shell.
            from tqdm import tqdm

            # A terminal that does not know its size would hide the bar.
            size = {} if _has_size(self._stream) else {"ncols": 80, "nrows": 24}
            self._bar = tqdm(
                total=epochs,
                initial=first_epoch,
                unit="epoch",
                file=self._stream,
                leave=False,
                **size,
            )
        if epochs is not None:
            self.set_epochs(epochs)

    def set_epochs(self, epochs: int, begun: tuple[int, float] | None = None) -> None:
        """Says how many epochs there are; `begun`: the last one that is done, and the seconds."""
        self._epochs, self._interval, self._begun = epochs, max(1, epochs // 10), begun
        if self._bar is not None:
            self._bar.total = epochs

    def write(self, row: Row, text: str | None = None) -> None:
        """Shows a row, and below it what the model has written; a bar shows no other rows."""
        epoch, seconds = row["epoch"], row.get("seconds")
        lines = [self._line(row)]
        if text is not None:
            lines.append(_written(text))
        if self._bar is not None:
            if text is not None:
                self._bar.write("\n".join(lines), file=self._stream)
            self._held_out |= {name: row[name] for name in _HELD_OUT if name in row}
            self._bar.set_postfix_str(_bar_line(row, self._held_out), refresh=False)
            self._bar.update(epoch - self._bar.n)
            self.busy.since = time.monotonic()
            return
        is_due = row["step"] == 1 or epoch % self._interval == 0 or epoch == self._epochs
        if is_due or text is not None or (seconds is not None and seconds >= self._next):
            print(*lines, sep="\n", file=self._stream, flush=True)
            self.busy.since = time.monotonic()
            if seconds is not None:
                self._next = seconds + PATIENCE

    def _line(self, row):
        epoch, seconds = row["epoch"], row.get("seconds")
        width = len(str(self._epochs))
        of = f"{epoch:{width}}/{self._epochs}" if self._epochs else f"{epoch}"
        counters = f"epoch {of}  step {row['step']:<6}"
        clock = " " * 8 if seconds is None else f"{seconds:6.1f} s"
        return f"{counters} {clock}{self._left(epoch, seconds)}  {metrics_line(row)}"

    def _left(self, epoch, seconds):
        """How long the rest of a run with a budget takes, at the speed so far."""
        if not (self._shows_left and self._begun and seconds is not None):
            return ""
        first, begun = self._begun
        if epoch <= first or epoch == self._epochs:
            return ""
        left = round((seconds - begun) / (epoch - first) * (self._epochs - epoch))
        return f", {left // 60}:{left % 60:02} left"

    def say(self, line: str) -> None:
        """Prints a line that stays."""
        if self._bar is not None:
            self._bar.write(line, file=self._stream)
        else:
            print(line, file=self._stream, flush=True)

    def _note(self, text):
        if self._bar is not None:
            self._bar.set_postfix_str(text)
        else:
            print(text, file=self._stream, flush=True)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()


def _has_size(stream) -> bool:
    try:
        return all(os.get_terminal_size(stream.fileno()))
    except OSError:  # No terminal, or no file.
        return True


def _bar_line(row: Row, held_out: Row) -> str:
    """What stands beside a bar of progress, where a terminal leaves some 40 letters.

    >>> _bar_line({"loss": 0.51, "accuracy": 0.5}, {"eval_loss": 0.25, "eval_accuracy": 0.987})
    'loss 0.51  held-out 0.25, 98.7%'
    """
    if not held_out or "active" in row:  # That of a sweep has other numbers.
        return metrics_line(row)
    shown = [f"{name} {row[name]:.4g}" for name in ("loss", "skipped") if name in row]
    numbers = f"held-out {held_out['eval_loss']:.4g}"
    if "eval_accuracy" in held_out:
        numbers += f", {held_out['eval_accuracy']:.1%}"
    return "  ".join([*shown, numbers])


def metrics_line(row: Row) -> str:
    """The metrics of a row that the console shows, in a line.

    >>> metrics_line({"step": 3, "epoch": 1, "loss": 0.5, "grad_norm": 7.0, "eval_loss": 0.25})
    'loss 0.5  held-out loss 0.25'
    """
    return "  ".join(f"{label} {row[name]:.4g}" for name, label in _LABELS.items() if name in row)
