"""Landscapes stored pass by pass, and continued."""

import json
import math

import pytest
from landscapes import Net, data_of, save_run

from ckptavg.errors import OutputError, UsageError
from ckptavg.landscape import points as points_module
from ckptavg.landscape.landscape import Landmark, Landscape, Point
from ckptavg.landscape.points import PointScorer
from ckptavg.landscape.store import check_results, score_landscape
from ckptavg.tasks.classification import Classification

TRAIN, TEST = data_of(1, 96), data_of(2)
POINTS = {(1 - t / 4, t / 4, 0.0): (1 - t / 4, t / 4, 0.0) for t in range(5)}


def build(scores):
    points = []
    for key in POINTS:
        if key in scores:
            score = scores[key]
            points.append(Point(key[1], None, key, score.data, score.train, score.interval))
    return Landscape("segment", ("t", ""), tuple(Classification.metrics), tuple(points))


@pytest.fixture
def run(tmp_path):
    return save_run(tmp_path / "run", 3)


def scorer_of(run, **options):
    return PointScorer.open(run, Net(), TEST, train_data=TRAIN, **options)


def counted(monkeypatch):
    """Coefficients of all points that are scored from now on."""
    scored = []
    score = PointScorer.score

    def count(self, points, *more):
        scored.extend(points)
        return score(self, points, *more)

    monkeypatch.setattr(PointScorer, "score", count)
    return scored


def test_landscape_is_continued_point_by_point_after_an_interruption(run, tmp_path, monkeypatch):
    whole = score_landscape(scorer_of(run), POINTS, build, results=tmp_path / "whole.json")
    monkeypatch.setattr(points_module, "_FIRST_PASS", 2)
    monkeypatch.setattr(points_module, "_pass_sizes", lambda count, fit: [2] * (count // 2) + [1])
    path = tmp_path / "r.json"
    save, saved = Landscape.save, []

    def interrupt(self, path):
        save(self, path)
        saved.append(len(self.points))
        if len(saved) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(Landscape, "save", interrupt)
    with pytest.raises(KeyboardInterrupt):
        score_landscape(scorer_of(run), POINTS, build, results=path)
    assert saved == [2, 4]
    scored = counted(monkeypatch)
    landscape = score_landscape(scorer_of(run), POINTS, build, results=path, resume=True)
    assert scored == [(0.0, 1.0, 0.0)]
    assert landscape == whole
    assert Landscape.load(path) == whole


def test_landscape_takes_holes_and_landmarks_from_the_file(run, tmp_path, monkeypatch):
    path = tmp_path / "r.json"

    def with_landmarks(scores):
        names = [metric.key for metric in Classification.metrics]
        hole = Point(0.25, None, (0.75, 0.25, 0.0), dict.fromkeys(names, math.nan))
        landmark = Landmark(
            "average", None, None, None, 1.0, data={"top1": 7.0}, coefficients=(0.0, 1.0, 0.0)
        )
        return Landscape(
            "segment", ("t", ""), tuple(Classification.metrics), (hole,), averages=(landmark,)
        )

    score_landscape(scorer_of(run), POINTS, with_landmarks, results=path)
    scored = counted(monkeypatch)
    landscape = score_landscape(scorer_of(run), POINTS, build, results=path, resume=True)
    assert scored == [(1.0, 0.0, 0.0), (0.5, 0.5, 0.0), (0.25, 0.75, 0.0)]
    assert math.isnan(landscape.points[1].data["top1"])
    assert landscape.points[4].data == {"top1": 7.0}


def test_landscape_knows_points_whose_coefficients_differ_by_rounding(run, tmp_path, monkeypatch):
    path = tmp_path / "r.json"
    score_landscape(scorer_of(run), POINTS, build, results=path)
    scored = counted(monkeypatch)
    again = {}
    for a, b, c in POINTS:
        again[a + 1e-12, b - 1e-12, c] = (a + 1e-12, b - 1e-12, c)
    again[0.3, 0.7, 1e-6] = (0.3, 0.7, 1e-6)
    score_landscape(scorer_of(run), again, lambda _: build({}), results=path, resume=True)
    assert scored == [(0.3, 0.7, 1e-6)]


@pytest.mark.parametrize(
    "options", [{"weight_decay": 0.1}, {"batch_size": 9}], ids=["decay", "batches"]
)
def test_landscape_of_other_options_is_scored_anew(run, tmp_path, monkeypatch, caplog, options):
    caplog.set_level("INFO", "ckptavg")
    path = tmp_path / "r.json"
    score_landscape(scorer_of(run), POINTS, build, results=path)
    scored = counted(monkeypatch)
    score_landscape(scorer_of(run, **options), POINTS, build, results=path, resume=True)
    assert len(scored) == len(POINTS)
    assert "other weights, data or options" in caplog.text


def test_landscape_counts_settings_of_the_caller(run, tmp_path, monkeypatch):
    path = tmp_path / "r.json"
    score_landscape(scorer_of(run), POINTS, build, results=path, settings={"seed": 1})
    scored = counted(monkeypatch)
    score_landscape(scorer_of(run), POINTS, build, results=path, resume=True, settings={"seed": 2})
    assert len(scored) == len(POINTS)


def test_landscape_that_cannot_be_stored_is_returned_with_a_warning(run, tmp_path, caplog):
    path = tmp_path / "gone" / "r.json"
    landscape = score_landscape(scorer_of(run), POINTS, build, results=path)
    assert len(landscape.points) == 5
    assert "r.json" in caplog.text


@pytest.mark.parametrize(
    ("results", "resume", "error"),
    [
        (None, True, UsageError), ("r.npz", True, UsageError), ("r.txt", False, UsageError),
        ("none/r.json", False, OutputError), ("other.json", False, OutputError),
        ("other.json", True, OutputError), ("curve.json", True, OutputError),
    ],
)  # fmt: skip
def test_results_that_cannot_be_meant_are_refused(tmp_path, monkeypatch, results, resume, error):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "other.json").write_text(json.dumps({"candidates": []}))
    Landscape("curve", ("x", ""), (), ()).save("curve.json")
    with pytest.raises(error):
        check_results(results, "plane", resume=resume)


@pytest.mark.parametrize("resume", [False, True])
def test_results_of_the_same_kind_and_new_files_are_accepted(tmp_path, monkeypatch, resume):
    monkeypatch.chdir(tmp_path)
    Landscape("plane", ("x", "y"), (), ()).save("plane.json")
    (tmp_path / "empty.json").touch()
    for results in ("plane.json", "new.json", "empty.json"):
        check_results(results, "plane", resume=resume)
