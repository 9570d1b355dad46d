"""Generated calls and command lines: each ends in a right result, or in a line that names what is
wrong."""

import collections
import contextlib
import sys
from collections.abc import Callable, Iterator

from promises.trainer import ROOT, Broken, Lab, Row

SHARES = {"functions": 0.45, "rules": 0.25, "layers": 0.3}  # Of the calls.


def generated(lab: Lab, count: int = 2000) -> Iterator[Row]:
    """Tries so many calls of attention, and so many command lines."""
    sys.path.insert(0, str(ROOT / "tests"))
    import generated_commands
    from test_generated import ATTENTION, tally

    calls = {name: round(share * count) for name, share in SHARES.items()}
    plan = [
        ("calls of attention", [(*ATTENTION[name], number) for name, number in calls.items()]),
        ("command lines", [(*generated_commands.ALL, count)]),
    ]
    place = lab.new("generated")
    place.mkdir()
    generated_commands.write_files(place)
    for what, parts in plan:
        found = collections.Counter()
        with contextlib.chdir(place):
            kept = [lab.kept(what, _tally, tally, part, found) for part in parts]
        tried = sum(number for *_, number in parts)
        seen = ", ".join(f"{number:,} {how}" for how, number in sorted(found.items()))
        yield Row(f"generated {what}", tried, tried if all(kept) else found.total(), seen)


def _tally(tally: Callable, part: tuple, found: collections.Counter) -> None:
    """Adds how calls ended; the first that ends in another way ends the part."""
    try:
        found.update(tally(*part))
    except AssertionError as error:
        raise Broken(str(error)) from error
