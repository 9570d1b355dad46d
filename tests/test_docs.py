"""The documentation holds: its programs run, its commands parse, its links lead somewhere.

On every page, the blocks of Python run in order in one namespace; a block marked `text` right after
one is exactly what it prints. A block that begins with `# name.py` is also a module in the
directory where programs and commands run. Commands are read, not run.
"""

import contextlib
import doctest
import importlib
import io
import json
import re
import shlex
import sys
from pathlib import Path
from typing import NamedTuple

import jax
import pytest

from attention_jax.training.build import make_functions, refusals
from attention_jax.training.command import parse
from attention_jax.training.config import ConfigError, trials
from attention_jax.training.files import trial_directory

ROOT = Path(__file__).parent.parent
PAGES = [
    page
    for name in ("README.md", "CONTRIBUTING.md", "docs/*.md")
    for page in sorted(ROOT.glob(name))
]
MODULES = [
    source.relative_to(ROOT).with_suffix("").as_posix().replace("/", ".")
    for source in sorted((ROOT / "attention_jax").rglob("*.py"))
    if ">>> " in source.read_text()
]

every_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)


class Block(NamedTuple):
    """A fenced block: its language, the number of its first line, and its text."""

    language: str
    line: int
    text: str
    follows: bool  # Nothing but blank lines since the block before.


def blocks(page):
    """The fenced blocks of a page, in order."""
    found, opened, follows = [], None, False
    for number, line in enumerate(page.read_text().splitlines(), 1):
        if opened is None and line.lstrip().startswith("```"):
            opened, lines = number, []
            language = line.strip().removeprefix("```")
        elif opened is not None and line.strip() == "```":
            found.append(Block(language, opened + 1, "\n".join(lines) + "\n", follows))
            opened, follows = None, True
        elif opened is not None:
            lines.append(line)
        elif line.strip():
            follows = False
    assert opened is None, f"{page.name}:{opened}: this block is never closed."
    return found


def prose(page):
    """The text outside of all fenced blocks and code spans."""
    text = re.sub(r"^ *```.*?^ *```$", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    return re.sub(r"`[^`\n]*`", "", text)


def commands(page):
    """The commands of the blocks of shell and of the prose, as (line, words)."""
    shells = ("bash", "sh", "shell", "console")
    of_shell = [block for block in blocks(page) if block.language in shells]
    for block in [*of_shell, *_inline(page)]:
        for line in block.text.replace("\\\n", " ").splitlines():
            lexer = shlex.shlex(line, posix=True, punctuation_chars=True)
            lexer.whitespace_split = True
            words = []
            for word in [*lexer, ";"]:
                if set(word) <= set("();<>|&"):
                    if words:
                        yield block.line, words
                    words = []
                else:
                    words.append(word)


def _inline(page):
    """The commands that train in the prose; X stands for a number."""
    for number, line in enumerate(page.read_text().splitlines(), 1):
        for text in re.findall(r"`((?:uv run |attention-jax )?train(?:\.py)? --[^`]*)`", line):
            yield Block("bash", number, re.sub(r"\bX\b", "0.1", text), follows=False)


@pytest.fixture
def place(page, tmp_path, monkeypatch):
    """Where programs and commands run: the configs and the page's modules are there."""
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    for block in blocks(page):
        if block.language == "python" and (name := re.match(r"# (\w+)\.py\n", block.text)):
            (tmp_path / f"{name[1]}.py").write_text(block.text)
            monkeypatch.delitem(sys.modules, name[1], raising=False)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@every_page
def test_the_programs_run_and_print_what_the_page_shows(page, place, monkeypatch):
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(place / "cache"))
    namespace, printed = {"__name__": "__main__"}, None
    for block in blocks(page):
        if block.language == "python":
            # The page's own line numbers, should it fail.
            program = compile("\n" * (block.line - 1) + block.text, str(page), "exec")
            stream = io.StringIO()
            with contextlib.redirect_stdout(stream):
                exec(program, namespace)
            printed = stream.getvalue()
        elif block.language == "text" and block.follows and printed is not None:
            assert printed == block.text, f"{page.name}:{block.line} is not what the block prints."
            printed = None
        else:
            printed = None


@every_page
@pytest.mark.usefixtures("place")
def test_the_commands_are_understood(page, monkeypatch):
    monkeypatch.setattr("builtins.input", lambda question: "")
    # What the pages speak of.
    Path("gpt2").mkdir()
    found = json.loads((ROOT / "tests/huggingface/gpt2/config.json").read_text())
    Path("gpt2/config.json").write_text(json.dumps(found | {"n_positions": 1024}))
    Path("my.txt").write_text("First come, first served.\n" * 99)
    for line, words in commands(page):
        where = f"{page.name}:{line}: {' '.join(words)}"
        for word in words:
            path = word.split("::")[0]
            if path.startswith(("benchmarks/", "configs/", "tests/", "docs/", "requirements/")):
                assert (ROOT / path).exists(), f"{where}: there is no {path}."
        trains = [i for i, word in enumerate(words) if word in ("train.py", "train")]
        if not trains:
            continue
        argv = words[trains[0] :]
        if "--help" in argv:
            with pytest.raises(SystemExit, match=r"^0$"):
                parse(argv)
            continue
        try:
            command = parse(argv)
            with refusals():
                jax.eval_shape(make_functions(trials(command.config, command.sweep)[0]).init)
        except ConfigError as error:
            pytest.fail(f"{where}: {error}")
        if command.workdir:  # A command below may start from this run, or from a trial of it.
            found = [(Path(command.workdir), command.config)]
            for number, trial in enumerate(trials(command.config, command.sweep)):
                found.append((trial_directory(Path(command.workdir), number), trial))
            for place, noted in found:
                place.mkdir(parents=True, exist_ok=True)
                (place / "config.json").write_text(json.dumps({"config": noted.to_dict()}))


@every_page
def test_the_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if re.match(r"[a-z]+:", target):  # https:, mailto:
            continue
        path, _, anchor = target.partition("#")
        found = (page.parent / path).resolve() if path else page
        assert found.exists(), f"{page.name}: there is no {target}."
        if anchor:
            assert anchor in anchors(found), f"{page.name}: {path or page.name} has no #{anchor}."


def anchors(page):
    """The names that a page's headings have in links, by GitHub's rule."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("name", MODULES)
def test_the_examples_in_docstrings_hold(name):
    failed, tried = doctest.testmod(importlib.import_module(name))
    assert tried
    assert not failed
