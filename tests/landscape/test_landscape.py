"""Landscapes as JSON and as arrays."""

import json
import math

import numpy
import pytest

from ckptavg.errors import OutputError, UsageError
from ckptavg.landscape.landscape import Landmark, Landscape, Point
from ckptavg.tasks import Metric

METRICS = (Metric("top1", "top-1 %", ".2f", True, "%"), Metric("nll", "NLL", ".4f", False, "nats"))


def landscape():
    points = (
        Point(
            0.0, 1.0, (0.5, 0.5), {"top1": 90.0, "nll": 0.25}, {"nll": 0.125}, {"top1": (89, 91)}
        ),
        Point(2.0, 3.0, None, {"top1": math.nan, "nll": math.nan}, {"nll": math.nan}, series="far"),
    )
    checkpoints = (
        Landmark("a.pt", "/run/a.pt", 1, 0.1, -1.0, 0.0, 0.5, {"top1": 80.0}),
        Landmark("b.pt", "/run/b.pt", None, None, 1.0, 0.0),
    )
    averages = (Landmark("average", None, None, None, 0.0, 0.0, data={"top1": 91.0}),)
    facts = {"explained": [0.75, 0.125]}
    return Landscape(
        "plane", ("x", "y"), METRICS, points, checkpoints, averages, facts, ("a note",)
    )


def test_landscape_json_has_the_promised_shape():
    plain = landscape().as_json()
    assert plain["kind"] == "plane"
    assert plain["units"] == {"top1": "%", "nll": "nats"}
    assert plain["points"][0] == {
        "x": 0.0, "y": 1.0, "coefficients": [0.5, 0.5], "data": {"top1": 90.0, "nll": 0.25},
        "train": {"nll": 0.125}, "interval": {"top1": [89, 91]},
    }  # fmt: skip
    wanted = {"path", "step", "lr", "x", "y", "distance", "data"}
    assert all(wanted <= entry.keys() for entry in plain["checkpoints"])


def test_landscape_returns_from_json(tmp_path):
    path = tmp_path / "plane.json"
    landscape().save(path)
    hole = json.loads(path.read_text())["points"][1]
    assert hole["data"] == {"top1": None, "nll": None}
    restored = Landscape.load(path)
    assert math.isnan(restored.points[1].data["top1"])
    assert math.isnan(restored.points[1].train["nll"])
    assert restored.points[0] == landscape().points[0]
    assert restored.checkpoints == landscape().checkpoints
    assert (restored.facts, restored.metrics) == (landscape().facts, METRICS)


def test_landscape_arrays_have_a_row_per_point(tmp_path):
    path = tmp_path / "plane.npz"
    landscape().save(path)
    with numpy.load(path, allow_pickle=False) as arrays:
        assert arrays["x"].tolist() == [0.0, 2.0]
        numpy.testing.assert_array_equal(arrays["data_top1"], [90.0, math.nan])
        numpy.testing.assert_array_equal(arrays["coefficients"], [[0.5, 0.5], [math.nan] * 2])
        numpy.testing.assert_array_equal(arrays["checkpoint_step"], [1.0, math.nan])
        assert arrays["series"].tolist() == ["", "far"]
        assert json.loads(str(arrays["about"]))["kind"] == "plane"


@pytest.mark.parametrize("name", ["plane.csv", "plane"])
def test_landscape_refuses_other_suffixes(tmp_path, name):
    with pytest.raises(UsageError, match=r"\.json or \.npz"):
        landscape().save(tmp_path / name)


@pytest.mark.parametrize("text", ["{}", "[]", '{"kind": "poem"}', "{"])
def test_landscape_refuses_other_content(tmp_path, text):
    path = tmp_path / "r.json"
    path.write_text(text)
    with pytest.raises(OutputError, match="holds no landscape"):
        Landscape.load(path)


def test_landscape_without_marks_is_a_line():
    bare = Landscape("rays", ("t", ""), METRICS, ())
    assert (
        str(bare)
        == repr(bare)
        == ("<Landscape of kind rays: 0 points, 0 marked checkpoints and averages>")
    )
