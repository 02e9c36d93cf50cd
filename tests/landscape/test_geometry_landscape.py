"""The geometry of a run as a landscape, against whole vectors."""

import math

import pytest
import torch

import ckptavg
from ckptavg.landscape.geometry import lay_out_geometry
from ckptavg.landscape.landscape import Landscape


def save_run(directory, vectors, steps=None):
    directory.mkdir()
    for index, vector in enumerate(vectors):
        step = index if steps is None else steps[index]
        torch.save({"state_dict": {"w": vector}, "epoch": step}, directory / f"epoch_{index}.pt")
    return ckptavg.open_run(directory)


def random_vectors(count, size=20):
    return torch.randn(count, size, generator=torch.Generator().manual_seed(0)).double()


def series_of(landscape, name):
    return {point.x: point.y for point in landscape.points if point.series == name}


def test_geometry_series_are_those_of_whole_vectors(tmp_path):
    vectors = random_vectors(5)
    steps = [10, 20, 30, 50, 70]
    landscape = lay_out_geometry(ckptavg.geometry(save_run(tmp_path / "run", vectors, steps)))
    differences = vectors.diff(dim=0)
    cosines = torch.cosine_similarity(differences[:-1], differences[1:])
    expected = {
        "to mean": (steps, (vectors - vectors.mean(0)).norm(dim=1)),
        "norm": (steps, vectors.norm(dim=1)),
        "step": (steps[1:], differences.norm(dim=1)),
        "cosine": (steps[1:-1], cosines),
    }
    for name, (xs, values) in expected.items():
        series = series_of(landscape, name)
        assert list(series) == xs
        assert list(series.values()) == pytest.approx(values.tolist(), rel=1e-9)
    assert landscape.axes[0] == "epoch"
    torch.testing.assert_close(
        torch.tensor(landscape.facts["distances"]).double(),
        torch.cdist(vectors, vectors, compute_mode="donot_use_mm_for_euclid_dist"),
    )
    assert landscape.facts["mean_step_cosine"] == pytest.approx(float(cosines.mean()))
    assert [mark.step for mark in landscape.checkpoints] == steps


def test_geometry_of_two_trainings_has_no_step_between_them(tmp_path):
    vectors = random_vectors(6)
    save_run(tmp_path / "a", vectors[:4])
    save_run(tmp_path / "b", vectors[4:])
    run = ckptavg.open_run(tmp_path / "a", tmp_path / "b")
    landscape = lay_out_geometry(ckptavg.geometry(run))
    # Both trainings have the steps 0 and 1, so that the position is the axis.
    assert landscape.axes[0] == "position in the run"
    assert list(series_of(landscape, "to mean")) == [1, 2, 3, 4, 5, 6]
    assert list(series_of(landscape, "step")) == [2, 3, 4, 6]
    assert list(series_of(landscape, "cosine")) == [2, 3]


def test_geometry_leaves_out_angles_beside_a_step_of_length_0(tmp_path):
    vectors = random_vectors(4)
    vectors[2] = vectors[1]
    landscape = lay_out_geometry(ckptavg.geometry(save_run(tmp_path / "run", vectors)))
    assert series_of(landscape, "cosine") == {}
    assert landscape.facts["mean_step_cosine"] is None
    assert series_of(landscape, "step")[2] == 0


def test_geometry_returns_from_a_file(tmp_path):
    landscape = lay_out_geometry(ckptavg.geometry(save_run(tmp_path / "run", random_vectors(3))))
    landscape.save(tmp_path / "g.json")
    restored = Landscape.load(tmp_path / "g.json")
    assert restored.points == landscape.points
    assert all(math.isfinite(value) for row in restored.facts["distances"] for value in row)
