"""Averages and ensembles of more and more checkpoints against evaluations and by hand."""

import json

import pytest
import torch
from landscapes import Net, data_of, network_at, save_run, weights_at
from torch import nn
from torch.utils.data import TensorDataset

from ckptavg import Candidate, ensemble_growth, evaluate
from ckptavg.errors import UsageError
from ckptavg.evaluation import output_distances
from ckptavg.landscape.landscape import Landscape
from ckptavg.tasks.language import CausalLM
from ckptavg.tasks.multilabel import MultiLabel
from ckptavg.tasks.regression import Regression

DATA, TRAIN = data_of(seed=1), data_of(seed=2)


def points_of(landscape, series):
    return {point.x: point for point in landscape.points if point.series == series}


def uniform(start, stop, total=4):
    return [1 / (stop - start) if start <= i < stop else 0.0 for i in range(total)]


@pytest.mark.parametrize("order", ["last", "first"])
def test_ensemble_growth_is_that_of_evaluate(tmp_path, order):
    run = save_run(tmp_path / "run", 4)
    drawn = ensemble_growth(run, Net(), DATA, train_data=TRAIN, order=order)
    parts = {n: run.last(n) if order == "last" else run[:n] for n in range(1, 5)}
    candidates = [Candidate.of_checkpoint(parts[1][0])]
    candidates += [Candidate.of_average(parts[n], recompute=True) for n in range(2, 5)]
    candidates += [Candidate.of_ensemble(parts[n]) for n in range(2, 5)]
    results = evaluate(candidates, Net(), DATA, train_loader=TRAIN)
    averages, ensembles = points_of(drawn, "average"), points_of(drawn, "ensemble")
    assert list(averages) == list(ensembles) == [1, 2, 3, 4]
    assert averages[1].data == ensembles[1].data
    for n in range(1, 5):
        assert averages[n].data == pytest.approx(dict(results[n - 1].metrics))
        start = 4 - n if order == "last" else 0
        assert averages[n].coefficients == pytest.approx(uniform(start, start + n))
    for n in range(2, 5):
        metrics = dict(results[n + 2].metrics)
        assert {key: ensembles[n].data[key] for key in metrics} == pytest.approx(metrics)
        assert ensembles[n].coefficients is None
        assert ensembles[n].train is not None
    joins = [landmark.x for landmark in drawn.checkpoints]
    assert joins == ([4, 3, 2, 1] if order == "last" else [1, 2, 3, 4])


def test_ensemble_growth_measures_the_gap_of_outputs_by_hand(tmp_path):
    run = save_run(tmp_path / "run", 3)
    drawn = ensemble_growth(run, Net(), DATA, train_data=TRAIN)
    x = DATA.tensors[0]
    singles = [torch.eye(3)[i].tolist() for i in range(3)]
    with torch.no_grad():
        outputs = [network_at(run, c, None)(x).double().softmax(1) for c in singles]
        for n in (2, 3):
            average = network_at(run, uniform(3 - n, 3, 3), TRAIN)(x).double().softmax(1)
            mean = sum(outputs[3 - n :]) / n
            point = points_of(drawn, "ensemble")[n]
            expected = float((mean - average).norm(dim=1).mean())
            assert point.data["output_gap"] == pytest.approx(expected, rel=1e-4)
            expected = float((outputs[2] - average).norm(dim=1).mean())
            assert point.data["last_gap"] == pytest.approx(expected, rel=1e-4)
    assert (
        f"differ by {points_of(drawn, 'ensemble')[3].data['output_gap']:.4g}"
        in (drawn.facts["text"])
    )


def test_ensemble_growth_gap_shrinks_with_the_square_of_the_distance(tmp_path):
    """Izmailov et al. 2018, section 3.5: O(Δ²) for the ensemble, O(Δ) for a single checkpoint."""
    gaps = []
    for number, scale in enumerate((0.02, 0.01)):
        directory = tmp_path / str(number)
        directory.mkdir()
        for step in range(1, 4):
            generator = torch.Generator().manual_seed(step)
            state = nn.Linear(4, 3).state_dict()
            center = torch.Generator().manual_seed(99)
            for value in state.values():
                value.copy_(torch.randn(value.shape, generator=center))
                value.add_(scale * torch.randn(value.shape, generator=generator))
            torch.save(state, directory / f"step_{step}.pt")
        drawn = ensemble_growth(directory, nn.Linear(4, 3), DATA)
        last = points_of(drawn, "ensemble")[3].data
        gaps.append((last["output_gap"], last["last_gap"], drawn.facts["delta"][-1]))
    (coarse, fine) = gaps
    assert fine[2] / coarse[2] == pytest.approx(1 / 2, rel=1e-4)
    assert fine[0] / coarse[0] == pytest.approx(1 / 4, rel=0.05)
    assert fine[1] / coarse[1] == pytest.approx(1 / 2, rel=0.05)


def test_ensemble_growth_delta_is_the_largest_distance_to_the_average(tmp_path):
    run = save_run(tmp_path / "run", 4)
    drawn = ensemble_growth(run, Net(), DATA)
    names = [name for name, _ in Net().named_parameters()]

    def flat(coefficients):
        state = weights_at(run, coefficients)
        return torch.cat([state[name].double().flatten() for name in names])

    for count, delta in zip(drawn.facts["counts"], drawn.facts["delta"], strict=True):
        mean = flat(uniform(4 - count, 4))
        members = [flat(torch.eye(4)[i].tolist()) for i in range(4 - count, 4)]
        expected = max(float((member - mean).norm()) for member in members)
        assert delta == pytest.approx(expected, rel=1e-5, abs=1e-6)


def test_ensemble_growth_compares_each_ensemble_with_its_average(tmp_path):
    run = save_run(tmp_path / "run", 3)
    drawn = ensemble_growth(run, Net(), DATA, train_data=TRAIN)
    average = Candidate.of_average(run, recompute=True)
    results = evaluate([average, Candidate.of_ensemble(run)], Net(), DATA, train_loader=TRAIN)
    versus = results[1].versus.difference
    last = drawn.facts["comparisons"][-1]
    assert (last["difference"], last["p"]) == pytest.approx((versus.value, versus.p))
    assert last["ensemble"] == pytest.approx(results[1].metrics["top1"])
    assert last["average"] == pytest.approx(results[0].metrics["top1"])
    assert last["text"] in drawn.facts["text"]
    assert len(drawn.facts["comparisons"]) == 2


def test_ensemble_growth_has_no_more_points_than_are_worth_it(tmp_path):
    for step in range(1, 46):
        torch.save({"weight": torch.eye(3) * step / 45}, tmp_path / f"step_{step}.pt")
    data = TensorDataset(torch.randn(8, 3), torch.zeros(8, dtype=torch.int64))
    drawn = ensemble_growth(tmp_path, nn.Linear(3, 3, bias=False), data)
    counts = drawn.facts["counts"]
    assert len(counts) == 20
    assert (counts[0], counts[-1]) == (1, 45)


def test_ensemble_growth_results_are_resumed(tmp_path, monkeypatch):
    run, path = save_run(tmp_path / "run", 3), tmp_path / "growth.json"
    whole = ensemble_growth(run, Net(), DATA, train_data=TRAIN, results=path)
    plain = json.loads(path.read_text())
    plain["points"][2]["data"]["nll"] = 0.125
    path.write_text(json.dumps(plain))
    resumed = ensemble_growth(run, Net(), DATA, train_data=TRAIN, results=path, resume=True)
    assert resumed.points[2].data["nll"] == 0.125
    assert resumed.points[3:] == whole.points[3:]
    assert resumed.facts == whole.facts
    other = ensemble_growth(
        run, Net(), DATA, train_data=TRAIN, results=path, resume=True, order="first"
    )
    assert other.facts["order"] == "first"
    assert other.points[2].data["nll"] != 0.125
    assert Landscape.load(path).points == other.points


def test_ensemble_growth_leaves_out_gaps_that_are_dear(tmp_path, monkeypatch):
    """Where outputs may not wait, the largest pair does not meet, and nothing is made up."""
    monkeypatch.setattr(output_distances, "_MOST_WAITING", 0)
    drawn = ensemble_growth(save_run(tmp_path / "run", 3), Net(), DATA)
    assert "output_gap" not in points_of(drawn, "ensemble")[3].data
    assert "top1" in points_of(drawn, "ensemble")[3].data


@pytest.mark.parametrize(
    ("task", "shape"),
    [(Regression(), (6, 2)), (MultiLabel(), (6, 4, 2)), (CausalLM(), (2, 3, 5))],
    ids=["regression", "multi-label", "language"],
)
def test_averaged_outputs_are_those_whose_mean_the_ensemble_is(task, shape):
    generator = torch.Generator().manual_seed(0)
    first, second = (torch.randn(shape, generator=generator).double() - 3 for _ in range(2))
    outputs = task.averaged_outputs(first)
    if isinstance(task, CausalLM):
        assert outputs is None
        return
    mean = task.mean()
    mean.add(first, None)
    mean.add(second, None)
    expected = (outputs + task.averaged_outputs(second)) / 2
    torch.testing.assert_close(task.averaged_outputs(mean.value()), expected)


@pytest.mark.parametrize(
    ("change", "message"),
    [({"order": "middle"}, "last or first"), ({"resume": True}, "`resume` needs")],
    ids=["order", "resume"],
)
def test_ensemble_growth_refuses_arguments_before_work(tmp_path, change, message):
    with pytest.raises(UsageError, match=message):
        ensemble_growth(save_run(tmp_path / "run", 2), Net(), DATA, **change)


def test_ensemble_growth_refuses_a_single_checkpoint(tmp_path):
    with pytest.raises(UsageError, match="needs two checkpoints"):
        ensemble_growth(save_run(tmp_path / "run", 2).last(1), Net(), DATA)
