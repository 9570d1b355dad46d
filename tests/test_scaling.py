"""The sums of a compiled training step are those of the formulas in docs/scaling.md."""

import importlib.util
from pathlib import Path

import pytest

PATH = Path(__file__).parent.parent / "benchmarks" / "scaling.py"
SPEC = importlib.util.spec_from_file_location("scaling", PATH)
scaling = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(scaling)


@pytest.mark.parametrize(
    ("data", "model"),
    [
        (4, 2),
        *(pytest.param(*mesh, marks=pytest.mark.slow) for mesh in ((8, 1), (2, 4), (1, 8))),
    ],
)
def test_a_step_sends_what_the_formula_says(data, model):
    sizes, found = scaling.measured(data, model)
    if model > 1:
        assert found["model"] == scaling.model_bytes(sizes, 32 / data, sizes.length // 2)
    if data > 1:  # The formula leaves out biases and norms.
        assert found["data"] == pytest.approx(scaling.data_bytes(sizes, model), rel=0.03)
    assert set(found.values()) - {found.get("data"), found.get("model")} <= {0}


@pytest.mark.parametrize(
    ("groups", "axis"),
    [
        ("{{0,1},{2,3},{4,5},{6,7}}", "model"),
        ("{{0,2,4,6},{1,3,5,7}}", "data"),
        ("[4,2]<=[8]", "model"),
        ("[2,4]<=[4,2]T(1,0)", "data"),
        ("mesh['axis_0'=4,'axis_1'=2] {'axis_1'}", "model"),
        ("mesh['axis_0'=2,'axis_1'=4], device_ids=([4,2]T(1,0)) {'axis_0'}", "model"),
        ("{}", "both"),
    ],
)
def test_groups_of_devices_are_on_an_axis(groups, axis):
    assert scaling.axis_of(groups, 4, 2) == axis
