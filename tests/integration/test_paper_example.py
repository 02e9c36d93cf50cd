"""The arithmetic of examples/paper.py: spreads, and the checkpoints that a budget comes to."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"
MODULES = ("paper", "paper_figures", "train", "trajectories", "images", "networks")


@pytest.fixture(scope="module")
def paper():
    pytest.importorskip("sklearn")
    before = dict(sys.modules)
    sys.path.insert(0, str(EXAMPLES))
    try:
        yield importlib.import_module("paper")
    finally:
        sys.path.remove(str(EXAMPLES))
        for name in MODULES:
            sys.modules.pop(name, None)
            if name in before:
                sys.modules[name] = before[name]


def settings_of(paper, **changed):
    values = {
        "budget": 8, "start": 0.75, "length": 1.5, "lr": 0.1, "swa_lr": 0.05, "low_lr": 0.01,
        "cycle": 2, "momentum": 0.9, "weight_decay": 5e-4, "batch_size": 128, "large_batch": 4,
        "workers": 3,
    }  # fmt: skip
    return paper.Settings(**(values | changed))


def counts_of(paper, settings):
    methods = paper.list_methods(settings)
    return {m.title: len(paper.list_checkpoints(m, settings)) for m in methods}


def test_spread_is_mean_and_sample_deviation(paper):
    # By hand: deviations −2, −1, 3 from 6; their squares' sum 14, over n − 1 = 2.
    spread = paper.Spread.of([4.0, 5.0, 9.0])
    assert spread.mean == 6.0
    assert spread.deviation == pytest.approx(7**0.5, rel=1e-15)
    assert spread.text() == "6.00 ± 2.65"
    assert spread.text("+") == "+6.00 ± 2.65"


def test_spread_of_one_value_has_no_deviation(paper):
    assert paper.Spread.of([93.255]).text() == "93.25"
    assert paper.Spread.of([93.25]).deviation is None


def test_list_checkpoints_names_those_of_each_budget(paper):
    settings = settings_of(paper)
    names = {m.title: paper.list_checkpoints(m, settings) for m in paper.list_methods(settings)}
    swa = [f"epoch_{epoch:03d}.pt" for epoch in (7, 8, 9, 10, 11, 12)]
    assert names == {
        "SGD": ["epoch_008.pt"],
        "FGE 1": ["epoch_007.pt"],
        "SWA 1": swa[:2],
        "SWA 1.25": swa[:4],
        "SWA 1.5": swa,
    }


def test_list_checkpoints_counts_as_in_the_paper(paper):
    # VGG-16: 200 epochs, averaging once per epoch from 150 on, for up to 300 epochs. Minima of
    # cycles of 4 epochs: 152, 156, ..., 200.
    counts = counts_of(paper, settings_of(paper, budget=200, cycle=4))
    assert counts == {"SGD": 1, "FGE 1": 13, "SWA 1": 50, "SWA 1.25": 100, "SWA 1.5": 150}


def test_list_checkpoints_takes_the_minima_of_fge(paper):
    settings = settings_of(paper, budget=12, cycle=1)
    fge = paper.list_methods(settings)[1]
    names = paper.list_checkpoints(fge, settings)
    assert names == ["epoch_009.50.pt", "epoch_010.50.pt", "epoch_011.50.pt"]
    trajectory = next(t for t in paper.list_trajectories(settings) if t.name == "fge")
    assert [trajectory.rate(time) for time in (9.5, 10.5, 11.5)] == [pytest.approx(0.01)] * 3


def test_list_methods_ends_with_the_training(paper):
    titles = [method.title for method in paper.list_methods(settings_of(paper, length=1.25))]
    assert titles == ["SGD", "FGE 1", "SWA 1", "SWA 1.25"]


def test_scores_compare_with_sgd_by_seed(paper):
    settings = settings_of(paper, length=1.0)
    methods = paper.list_methods(settings)
    top1 = {0: [90.0, 91.0, 90.5], 1: [92.0, 91.0, 93.5]}
    scores = paper.Scores("vgg16_bn", settings, methods, top1, paper.PAPER[10])
    assert scores.remarks == [
        "FGE 1 − SGD: +0.00 ± 1.41 points, better in 1 of 2 seeds",
        "SWA 1 − SGD: +1.00 ± 0.71 points, better in 2 of 2 seeds",
    ]
    table = scores.as_markdown()
    assert "| vgg16_bn, 8 epochs, n = 2 | 91.00 ± 1.41 | 91.00 ± 0.00 | 92.00 ± 2.12 |" in table
    assert "| paper: VGG-16 | 93.25 ± 0.16 | 93.52 | 93.59 ± 0.16 |" in table
    columns = scores.as_json()["methods"]
    assert [column["mean"] for column in columns] == [91.0, 91.0, 92.0]
    assert columns[2]["top1"] == {"0": 90.5, "1": 93.5}


def test_is_trained_asks_for_every_checkpoint(paper, tmp_path):
    trajectories = paper.list_trajectories(settings_of(paper))
    for trajectory in trajectories:
        for time in trajectory.saves:
            path = tmp_path / trajectory.name / paper.file_name(time)
            path.parent.mkdir(exist_ok=True)
            path.touch()
    assert paper.is_trained(tmp_path, trajectories)
    (tmp_path / "constant" / "epoch_010.pt").unlink()
    assert not paper.is_trained(tmp_path, trajectories)


def test_check_record_refuses_seeds_of_other_settings(paper, tmp_path):
    paper.check_record(tmp_path / "out", {"budget": 8, "lr": 0.1})
    paper.check_record(tmp_path / "out", {"budget": 8, "lr": 0.1})
    with pytest.raises(SystemExit, match=r"trained with lr 0\.1, not 0\.2; name another directory"):
        paper.check_record(tmp_path / "out", {"budget": 8, "lr": 0.2})


def test_images_limit_takes_images_spread_over_the_split(paper):
    images = paper.image_data
    whole, part = images.test(), images.test(limit=200)
    assert len(whole) == 797
    # every fourth, almost: 797 / 200 images apart
    expected = [whole.targets[index * 797 // 200] for index in range(200)]
    assert part.targets == expected
    assert len(images.train_plain(limit=5000)) == 1000


def test_list_commands_draws_the_first_seed(paper, monkeypatch):
    words = [
        "paper.py", "--out", "runs", "--root", "cifar", "--network", "vgg16_bn", "--budget", "8",
        "--figures", "500", "--points", "7", "--bf16",
    ]  # fmt: skip
    monkeypatch.setattr(sys, "argv", words)
    monkeypatch.chdir(EXAMPLES.parent)
    commands = paper.paper_figures.list_commands(paper.parse_options())
    assert commands["geometry"] == [
        "plot", "geometry", "runs/seed_0/constant", "-o", "runs/figures/geometry.png",
    ]  # fmt: skip
    assert " ".join(commands["segment"]) == (
        "plot segment runs/seed_0/constant --ends average,runs/seed_0/sgd/epoch_008.pt "
        "-o runs/figures/segment.png --model examples/networks.py:vgg16_bn "
        "--data examples/images.py:test --data-arg limit=500 --data-arg root=cifar "
        "--train-data examples/images.py:train --train-data-arg limit=500 "
        "--train-data-arg root=cifar --amp bf16 "
        "--results runs/figures/segment.json --resume --weight-decay 0.0005 --points 7"
    )
    assert "--points" not in commands["curve"]
