"""Reliability diagrams against bins by hand."""

import math

import pytest
import torch
from landscapes import Net, data_of, network_at, save_run

import ckptavg
from ckptavg import compare, reliability
from ckptavg.errors import UsageError
from ckptavg.landscape.landscape import Landscape
from ckptavg.landscape.reliability import lay_out_reliability

TRAIN, TEST = data_of(1, 96), data_of(2, 200)


@pytest.fixture
def run(tmp_path):
    return save_run(tmp_path / "run", 3)


def bins_by_hand(probabilities, labels):
    """Mean confidence, share that is right and count of each of 15 bins with samples."""
    confidence, answers = probabilities.max(1)
    bins = []
    for number in range(15):
        low, high = number / 15, (number + 1) / 15
        inside = (confidence > low) & (confidence <= high)
        if inside.any():
            right = (answers == labels)[inside].double().mean()
            bins.append((float(confidence[inside].mean()), float(right), int(inside.sum())))
    return bins


def probabilities_of(run, weights, train=None):
    with torch.no_grad():
        return network_at(run, weights, train)(TEST.tensors[0]).double().softmax(1)


def test_reliability_points_are_bins_by_hand(run):
    landscape = reliability(run, Net(), TEST, train_data=TRAIN)
    members = [probabilities_of(run, weights) for weights in torch.eye(3).tolist()]
    wanted = {
        "step_3.pt (last)": members[2],
        "average of 3 (uniform)": probabilities_of(run, (1 / 3,) * 3, TRAIN),
        "FGE ensemble of 3": torch.stack(members).mean(0),
    }
    assert list(dict.fromkeys(point.series for point in landscape.points)) == list(wanted)
    for series, probabilities in wanted.items():
        points = [point for point in landscape.points if point.series == series]
        bins = bins_by_hand(probabilities, TEST.tensors[1])
        assert [point.data["n"] for point in points] == [count for _, _, count in bins]
        for point, (confidence, right, _) in zip(points, bins, strict=True):
            assert (point.x, point.y) == pytest.approx((confidence, right), abs=1e-6)
            low, high = point.interval["accuracy"]
            assert low <= right <= high
        ece = sum(count * abs(right - confidence) for confidence, right, count in bins) / 200
        assert landscape.facts["ece"][series] == pytest.approx(ece, abs=1e-6)


def test_reliability_of_one_name_tells_statistics_apart(run):
    results = compare(run, Net(), TEST, train_data=TRAIN)
    landscape = lay_out_reliability(results)
    assert list(landscape.facts["ece"]) == [
        "step_3.pt (last)", "average of 3 (uniform) (stale)",
        "average of 3 (uniform) (recomputed)",
    ]  # fmt: skip
    assert landscape.averages[1].data == results[2].metrics


def test_reliability_returns_from_a_file(run, tmp_path):
    landscape = reliability(run, Net(), TEST, ensemble=False)
    landscape.save(tmp_path / "r.json")
    restored = Landscape.load(tmp_path / "r.json")
    assert restored.points == landscape.points
    assert "expected calibration error: step_3.pt (last) 0." in restored.facts["text"]
    assert all(math.isfinite(value) for value in restored.facts["ece"].values())


def test_reliability_is_that_of_a_classifier(run, monkeypatch):
    monkeypatch.setattr(Net, "forward", None)
    with pytest.raises(UsageError, match="Regression has no bins of confidence"):
        reliability(run, Net(), TEST, task="regression")


def test_reliability_is_public():
    assert ckptavg.reliability is reliability
