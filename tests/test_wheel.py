"""The wheel holds the package and nothing else, and says what an installer must know."""

import email
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

import attention_jax

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def sources():
    """The files that belong into the wheel."""
    others = {"attention_jax/py.typed", "attention_jax/analysis/page.html"}
    modules = (ROOT / "attention_jax").rglob("*.py")
    return {path.relative_to(ROOT).as_posix() for path in modules} | others


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """Built without the network, in this process."""
    pytest.importorskip("hatchling")
    from hatchling.builders.wheel import WheelBuilder

    folder = tmp_path_factory.mktemp("wheel")
    (path,) = WheelBuilder(str(ROOT)).build(directory=str(folder), versions=["standard"])
    return zipfile.ZipFile(path)


@pytest.fixture(scope="module")
def metadata(wheel):
    return email.message_from_bytes(wheel.read(f"{folder_of(wheel)}/METADATA"))


def folder_of(wheel):
    return f"attention_jax-{attention_jax.__version__}.dist-info"


def test_the_wheel_holds_the_package_and_nothing_else(wheel):
    about = {"METADATA", "WHEEL", "RECORD", "entry_points.txt", "licenses/LICENSE"}
    found = wheel.namelist()
    assert set(found) == sources() | {f"{folder_of(wheel)}/{name}" for name in about}
    assert len(found) == len(set(found))
    assert Path(wheel.filename).name.endswith("-py3-none-any.whl")
    for name in sources() | {"LICENSE"}:
        inside = f"{folder_of(wheel)}/licenses/LICENSE" if name == "LICENSE" else name
        assert wheel.read(inside) == (ROOT / name).read_bytes(), name


def test_what_is_packed_imports_and_has_its_command(wheel, tmp_path):
    wheel.extractall(tmp_path)
    program = (
        "import attention_jax, sys; from attention_jax.__main__ import main;"
        "print(attention_jax.__file__); sys.exit(main(['attention-jax', '--help']))"
    )
    run = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert run.stdout.startswith(str(tmp_path))
    assert "usage: attention-jax COMMAND" in run.stdout


def test_the_metadata_are_complete(metadata):
    for name in ("Summary", "Author", "License-Expression", "License-File", "Requires-Python"):
        assert metadata[name], name
    assert metadata["Version"] == attention_jax.__version__
    assert metadata["Description-Content-Type"] == "text/markdown"
    assert metadata.get_payload(decode=True).decode() == (ROOT / "README.md").read_text()
    assert set(metadata.get_all("Provides-Extra")) == set(PROJECT["optional-dependencies"])
    words = f"attention-jax = {PROJECT['scripts']['attention-jax']}"
    assert words == "attention-jax = attention_jax.__main__:script"


def test_version_and_pythons_are_said_once_and_the_same_everywhere():
    assert PROJECT["version"] == attention_jax.__version__
    assert f"\nversion: {PROJECT['version']}\n" in (ROOT / "CITATION.cff").read_text()
    assert f"\n## {PROJECT['version']} - " in (ROOT / "CHANGELOG.md").read_text()
    start = "Programming Language :: Python :: 3."
    minors = [int(x.removeprefix(start)) for x in PROJECT["classifiers"] if x.startswith(start)]
    assert PROJECT["requires-python"] == f">=3.{min(minors)},<3.{max(minors) + 1}"


def test_the_package_holds_modules_alone():
    """Data beside them would go into the wheel, and a program could not rely on where it lies."""
    files = {path for path in (ROOT / "attention_jax").rglob("*") if path.is_file()}
    kept = {path.relative_to(ROOT).as_posix() for path in files if "__pycache__" not in path.parts}
    assert kept == sources()
