"""The architecture: which modules may import which, and the required parts of every mechanism."""

import ast
import importlib.metadata
import inspect
import itertools
import pathlib
import re
import subprocess
import sys
import tomllib

import pytest
from cases import CASES

import attention_jax
from attention_jax.training.words import MECHANISMS

ROOT = pathlib.Path(__file__).parents[1]
PACKAGE = ROOT / "attention_jax"

# Lowest first. A module imports from lower floors, and from its own package.
FLOORS = [
    {"types"},
    {"checks"},
    {"functional", "tasks"},
    {"layers"},
    {"models"},
    {"interop"},
    {"generation", "analysis", "training"},
    {"training.watch"},
    {"training.experiment"},
    {"laboratory"},
    {"__main__"},
]
MODULES = sorted(path.relative_to(PACKAGE) for path in PACKAGE.rglob("*.py"))


def dotted(path):
    return ".".join(path.with_suffix("").parts).removesuffix(".__init__")


def floor(module):
    """The floor of `layers` or `training.step`: that of the longest name that is known."""
    for name in (module, module.split(".")[0]):
        for i, names in enumerate(FLOORS):
            if name in names:
                return i
    raise AssertionError(f"attention_jax.{module} stands on no floor: say in FLOORS where it is")


def imports(path, module):
    """The modules of the package that a file imports, at its top or in a function."""
    here = module.split(".") if path.name == "__init__.py" else module.split(".")[:-1]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names = [(alias.name, None) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = here[: len(here) - node.level + 1] if node.level else []
            start = ["attention_jax", *base] if node.level else []
            source = ".".join([*start, *([node.module] if node.module else [])])
            names = [(source, alias.name) for alias in node.names]
        else:
            continue
        for source, name in names:
            if source == "attention_jax" and name is not None:
                if name.startswith("__"):
                    continue  # The version is no module.
                yield attention_jax._HOMES.get(name, f"attention_jax.{name}").partition(".")[2]
            elif source.startswith("attention_jax."):
                inner = source.partition(".")[2]
                file = PACKAGE.joinpath(*inner.split("."), f"{name}.py")
                yield f"{inner}.{name}" if name is not None and file.exists() else inner


@pytest.mark.parametrize("path", MODULES, ids=str)
def test_a_module_imports_from_lower_floors_only(path):
    module = dotted(path)
    if module == "__init__":
        return  # It names everything and imports nothing before it is used.
    for imported in imports(PACKAGE / path, module):
        lower = floor(imported) < floor(module)
        same = imported.split(".")[0] == module.split(".")[0]
        # The exception inside a package: nobody stands on the experiment.
        same = same and floor(imported) <= floor(module)
        assert lower or same, f"attention_jax.{module} must not import attention_jax.{imported}"


def roots(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.level:
            yield node.module.split(".")[0]


def test_what_is_imported_is_declared_and_what_is_declared_is_imported():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    distributions = importlib.metadata.packages_distributions()
    # Tests and benchmarks import their neighbours by name.
    neighbours = [path for name in ("tests", "benchmarks") for path in (ROOT / name).rglob("*.py")]
    own = {"attention_jax", *(p.stem for p in neighbours), *(p.parent.name for p in neighbours)}

    def named(requirements):
        return {re.match(r"[\w-]+", x)[0].lower().replace("_", "-") for x in requirements}

    def imported(*folders):
        """The distributions that the files of some folders import."""
        files = [path for folder in folders for path in sorted(ROOT.glob(f"{folder}/**/*.py"))]
        names = {name for path in files for name in roots(path)} - own - sys.stdlib_module_names
        # What is not installed here is called as it is imported.
        return named(distributions.get(name, [name])[0] for name in names)

    used = imported("attention_jax", "tests")
    declared = named(itertools.chain(project["dependencies"], *extras.values()))
    assert used | imported("benchmarks", "configs") <= declared
    assert named(project["dependencies"]) <= used
    plugins = {"pytest-xdist"}  # Named in the options of pytest.
    assert named(extras["test"]) - plugins <= used


@pytest.mark.parametrize("path", [p for p in MODULES if p.parts[0] == "functional"], ids=str)
def test_the_functions_need_jax_alone(path):
    foreign = set(roots(PACKAGE / path)) - sys.stdlib_module_names
    assert foreign <= {"jax", "numpy", "attention_jax"}


def test_no_module_needs_what_windows_lacks():
    unix = {"fcntl", "grp", "posix", "pty", "pwd", "resource", "syslog", "termios", "tty"}
    for path in [*(PACKAGE / path for path in MODULES), ROOT / "train.py"]:
        assert not unix & set(roots(path)), path


def test_the_step_knows_no_model():
    path = PACKAGE / "training" / "step.py"
    assert "flax" not in set(roots(path))
    assert not {"layers", "models"} & {m.split(".")[0] for m in imports(path, "training.step")}


@pytest.mark.parametrize("word", ["utils", "helpers", "common", "misc"])
def test_no_module_is_a_drawer(word):
    assert not [path for path in MODULES if word in path.stem]


def test_importing_the_package_or_the_config_does_not_import_jax():
    program = (
        "import sys, attention_jax, attention_jax.training.command;"
        "print([name for name in ('jax', 'flax', 'numpy') if name in sys.modules])"
    )
    run = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert "jax" not in run.stdout


def test_every_mechanism_has_an_oracle():
    assert set(MECHANISMS) <= {case.mechanism for case in CASES}, "a row in tests/cases.py"


@pytest.mark.parametrize("name", MECHANISMS)
def test_every_mechanism_has_a_public_function_and_a_page(name):
    function = f"{name}_attention"
    assert function in attention_jax.__all__
    pages = [path for path in (ROOT / "docs").glob("*.md") if function in path.read_text()]
    assert pages, f"a page in docs/ that shows {function}"


# The public face, to the letter: callers rely on it.

FACE = {
    "dot_product_attention": (
        "query key value bias=None mask=None * scale=None softcap=None sinks=None "
        "dropout_rate=0.0 dropout_rng=None deterministic=False implementation=None "
        "block_size=None return_residual=False"
    ),
    "ring_attention": "query key value bias=None mask=None * axis_name",
    "ulysses_attention": "query key value bias=None mask=None * axis_name",
    "linear_attention": "query key value * mask=None",
    "masks.causal": "offset=0",
    "masks.window": "left right=0 offset=0",
    "masks.segments": "query_ids key_ids=None",
    "masks.key_lengths": "lengths",
    "masks.query_lengths": "lengths",
    "masks.dense": "array",
    "masks.rule": "fn arrays",
    "biases.rule": "fn arrays",
    "biases.relative": "table * bidirectional=True",
    "positions.rotary": "x positions=None * base=10000.0 fraction=1.0",
    "positions.sinusoidal": "num_positions features",
    "SingleHeadAttention": "head_dim=None out_features=None use_bias=True",
    "MultiHeadAttention": (
        "num_heads num_kv_heads=None head_dim=None out_features=None use_bias=True "
        "dropout_rate=0.0 qk_norm=False rotary=False rotary_base=10000.0"
    ),
    "MultiHeadAttention.__call__": (
        "self inputs_q inputs_kv=None * mask=None bias=None deterministic=None sow_weights=False"
    ),
}


def signature(thing):
    words, keyword_only = [], False
    for parameter in inspect.signature(thing).parameters.values():
        if parameter.kind is parameter.KEYWORD_ONLY and not keyword_only:
            keyword_only = True
            words.append("*")
        default = parameter.default
        words.append(
            parameter.name if default is parameter.empty else f"{parameter.name}={default}"
        )
    return words


@pytest.mark.parametrize("name", FACE)
def test_the_public_face_is_as_written(name):
    thing = attention_jax
    for word in name.split("."):
        thing = getattr(thing, word)
    want = FACE[name].split()
    # More keyword arguments may follow; none of these may move.
    assert signature(thing)[: len(want)] == want


def test_a_part_is_there_without_an_import_of_its_own():
    names = "interop.flax.attention_fn", "generation.stream", "training.experiment.run"
    program = "import attention_jax\n" + "".join(f"attention_jax.{name}\n" for name in names)
    subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=True)
    with pytest.raises(AttributeError, match="has no attribute 'experiments'"):
        _ = attention_jax.training.experiments


def test_every_public_name_exists():
    for name in attention_jax.__all__:
        assert getattr(attention_jax, name).__doc__
