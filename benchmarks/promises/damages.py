"""Damaged files: a run continues only from arrays that were saved."""

import contextlib
import io
import itertools
import os
import random
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

from promises.trainer import Broken, Lab, Row, saved_states

BLOCK = 512  # Bytes that a disk loses at once.


def cut(content: bytes, rng: random.Random) -> bytes:
    return content[: rng.randrange(len(content))]


def flip_bit(content: bytes, rng: random.Random) -> bytes:
    changed = bytearray(content)
    changed[rng.randrange(len(changed))] ^= 1 << rng.randrange(8)
    return bytes(changed)


def zero_block(content: bytes, rng: random.Random) -> bytes:
    start = rng.randrange(len(content)) // BLOCK * BLOCK
    end = min(start + BLOCK, len(content))
    return content[:start] + bytes(end - start) + content[end:]


def damage_file(workdir: Path, rng: random.Random, change: Callable | None) -> list[Path]:
    """Changes or deletes a file, most often one of the newest checkpoint; returns its path."""
    newest = max((workdir / "checkpoints").iterdir(), key=lambda path: int(path.name))
    place = newest if rng.random() < 0.8 else workdir
    files = sorted(path for path in place.rglob("*") if path.is_file() and path.stat().st_size)
    file = rng.choice([path for path in files if "tensorboard" not in path.parts])
    if change is None:
        file.unlink()
    else:
        file.write_bytes(change(file.read_bytes(), rng))
    return [file]


def swap(workdir: Path, rng: random.Random) -> list[Path]:
    """Swaps a file, a directory or all of the newest checkpoint with that of another step."""
    *older, newest = sorted((workdir / "checkpoints").iterdir(), key=lambda path: int(path.name))
    one, other = newest, rng.choice(older)
    while rng.random() < 0.9 and one.is_dir():
        # Some names are drawn by chance: what is swapped has the same place in the order.
        place = rng.randrange(len(list(one.iterdir())))
        one, other = (sorted(path.iterdir())[place] for path in (one, other))
    aside = workdir / "aside"
    one.rename(aside)
    other.rename(one)
    aside.rename(other)
    return [one, other]


DAMAGES: dict[str, Callable[[Path, random.Random], list[Path]]] = {
    "cut": lambda workdir, rng: damage_file(workdir, rng, cut),
    "one bit": lambda workdir, rng: damage_file(workdir, rng, flip_bit),
    "zeroed block": lambda workdir, rng: damage_file(workdir, rng, zero_block),
    "deleted": lambda workdir, rng: damage_file(workdir, rng, None),
    "swapped between steps": swap,
}


def damages(lab: Lab, count: int = 200) -> Iterator[Row]:
    """Damages copies of a complete run, and goes back to its newest checkpoint."""
    from attention_jax.training import experiment
    from attention_jax.training.build import build
    from attention_jax.training.checkpoint import fingerprint
    from attention_jax.training.config import RunError, default_config
    from attention_jax.training.run_directory import RunDirectory, claim

    config = default_config()
    config.update_from_flattened_dict(
        {
            "task.seq_length": 5,
            "model.features": 8,
            "model.num_heads": 2,
            "train.batch_size": 8,
            "train.steps_per_epoch": 2,
            "train.epochs": 3,
            "eval.num_batches": 1,
            "checkpoint.every_epochs": 1,
            "checkpoint.keep": 3,
        }
    )
    program = build(config)

    def restore(workdir: Path) -> tuple[int, str] | None:
        """The step that a run would continue from, and a fingerprint of its state."""
        claim(workdir, config, {})
        with contextlib.closing(RunDirectory(workdir, config)) as directory:
            state = directory.restore(program.init.eval_shape)
        return None if state is None else (int(state.step), fingerprint(state))

    whole = lab.new("whole")
    with contextlib.redirect_stdout(io.StringIO()):
        experiment.run(config, whole)
    states = saved_states(lab, whole, program.init.eval_shape)
    good = {step: (int(state.step), fingerprint(state)) for step, state in states.items()}
    newest = max(good)
    if set(good) != {step for step, _ in good.values()}:
        raise Broken(f"steps {set(good)} are restored as {good}")

    def attempt(workdir: Path, damaged: list[Path]) -> None:
        """Restores, or refuses; the line must name a file or step."""
        try:
            with _stderr() as errors:
                try:
                    found = restore(workdir)
                finally:
                    printed = errors()
        except RunError as error:
            said = str(error)
            if "\n" in said:
                raise Broken(f"a refusal of more than a line: {said}") from error
            if all("checkpoints" in path.parts for path in damaged):
                raise Broken(f"refused, though a whole checkpoint is there: {said}") from error
        except Exception as error:
            raise Broken(f"a traceback: {type(error).__name__}: {error}") from error
        else:
            said = printed
            if found not in good.values():
                raise Broken(f"a wrong restore: {found}")
            if found != good[newest] and not said:
                raise Broken(f"silently restored step {found[0]}")
        if "Traceback" in said or "Exception ignored" in said or "Warning" in said:
            raise Broken(f"on stderr: {said[-1500:]}")
        names = {name for path in damaged for name in path.parts if name != "checkpoints"}
        if "config.json" in names:
            names.add("holds another run")  # And the field that differs.
        if said and not any(name in said for name in names):
            raise Broken(f"names neither file nor step: {said}")

    kept = dict.fromkeys(DAMAGES, 0)
    tried = dict.fromkeys(DAMAGES, 0)
    for number, name in zip(range(count), itertools.cycle(DAMAGES), strict=False):
        workdir = shutil.copytree(whole, lab.new("damaged"))
        damaged = DAMAGES[name](workdir, lab.rng("damages", number))
        paths = [path.relative_to(workdir) for path in damaged]
        tried[name] += 1
        kept[name] += lab.kept(f"{name}: {', '.join(map(str, paths))}", attempt, workdir, paths)
        shutil.rmtree(workdir)
    for name in DAMAGES:
        if tried[name]:
            yield Row(f"damage: {name}", tried[name], kept[name])


@contextlib.contextmanager
def _stderr() -> Iterator[Callable[[], str]]:
    """Catches what this process writes to stderr, below Python too; gives a way to read it."""
    sys.stderr.flush()
    with tempfile.TemporaryFile("w+", buffering=1) as file:
        before = os.dup(2)
        os.dup2(file.fileno(), 2)

        def read() -> str:
            with open(os.dup(file.fileno())) as whole:
                whole.seek(0)
                return whole.read()

        try:
            with contextlib.redirect_stderr(file):
                yield read
        finally:
            os.dup2(before, 2)
            os.close(before)
