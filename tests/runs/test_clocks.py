"""Runs whose checkpoints count by several clocks, or by one that stands still."""

from __future__ import annotations

import itertools

import pytest
import torch
from helpers import names, save_weight

from ckptavg import average, open_run
from ckptavg.errors import RunError


def save_icefall(directory, name, batch, epoch):
    """A checkpoint as icefall writes it, at a batch of 6000 an epoch."""
    weights = {"w": torch.full((4,), float(batch))}
    beside = {"model_avg": {"w": weights["w"] / 2}, "batch_idx_train": batch, "cur_epoch": epoch}
    directory.mkdir(exist_ok=True)
    torch.save({"model": weights, **beside, "average_period": 200}, directory / name)


@pytest.fixture
def icefall(tmp_path):
    """One training's two series: by epochs, and by batches."""
    for epoch in range(1, 6):
        save_icefall(tmp_path / "exp", f"epoch-{epoch}.pt", 6000 * epoch, epoch)
    for batch in range(4000, 32000, 4000):
        name = f"checkpoint-{batch}.pt"
        save_icefall(tmp_path / "exp", name, batch, batch // 6000 + 1)
    return tmp_path / "exp"


def test_clock_common_to_two_series_orders_them(icefall):
    run = open_run(icefall)
    assert [c.step for c in run] == sorted({*range(6000, 36000, 6000), *range(4000, 32000, 4000)})
    assert names(run.last(1)) == ["epoch-5.pt"]
    assert [path.name for path, _ in run.left_out] == ["epoch-2.pt", "epoch-4.pt"]


def test_average_by_weights_undoes_running_averages(icefall, tmp_path):
    paths = [icefall / "epoch-4.pt", icefall / "epoch-5.pt"]
    run = open_run(*paths, key="model_avg")
    average(run, weights=[-4, 5], out=tmp_path / "out.pt")
    found = torch.load(tmp_path / "out.pt", weights_only=True)["state_dict"]["w"]
    assert found.tolist() == [27000.0] * 4


def test_open_run_names_series_without_common_clock(tmp_path):
    for i in (1, 2, 3):
        save_weight(tmp_path / f"epoch-{i}.pt", i)
        save_weight(tmp_path / f"checkpoint-{i}000.pt", i / 2)
    with pytest.raises(RunError, match=r"'epoch-\*\.pt', 'checkpoint-\*\.pt'.*`glob='epoch-\*"):
        open_run(tmp_path)
    assert len(open_run(tmp_path, glob="epoch-*.pt")) == 3
    assert [c.step for c in open_run(tmp_path, glob="checkpoint-*")] == [1000, 2000, 3000]


@pytest.mark.parametrize(
    "recorded",
    [
        [{"epoch": 1}, {"epoch": 2}, {"step": 100}, {"step": 200}],
        # within an epoch nothing tells which of the two came first
        [{"epoch": 1}, {"epoch": 2}, {"step": 1, "epoch": 1}, {"step": 2, "epoch": 2}],
    ],
)
def test_open_run_refuses_series_of_different_clocks(tmp_path, recorded):
    files = ["epoch_1.pt", "epoch_2.pt", "iter_100.pt", "iter_200.pt"]
    for value, (name, record) in enumerate(zip(files, recorded, strict=True)):
        save_weight(tmp_path / name, value, **record)
    with pytest.raises(RunError, match="no clock that all of them record"):
        open_run(tmp_path)


def test_open_run_keeps_single_file_of_other_series(tmp_path):
    for i in (1, 2, 3):
        save_weight(tmp_path / f"epoch_{i}.pt", i)
    save_weight(tmp_path / "pretrained_100.pt", 9)
    assert len(open_run(tmp_path)) == 4


def test_clock_ignores_total_of_epochs(tmp_path):
    for i in (2, 10, 9):
        save_weight(tmp_path / f"epoch_{i}.pt", i, epochs=90)
    run = open_run(tmp_path)
    assert [c.step for c in run] == [2, 9, 10]
    assert any("every checkpoint records 90: ordered by name" in note for note in run.notes)


def test_clock_keeps_epoch_shared_by_all_models(tmp_path):
    for i in (0, 1, 2):
        save_weight(tmp_path / f"model_{i}.pt", i, epoch=10)
    assert [c.step for c in open_run(tmp_path)] == [10, 10, 10]


def test_step_is_not_read_from_score_in_name(tmp_path):
    for i, score in enumerate(("0.9731", "0.98", "0.5")):
        save_weight(tmp_path / f"model-{score}.pt", i)
    run = open_run(tmp_path)
    assert [c.step for c in run] == [None] * 3
    assert any("no step is known for" in note for note in run.notes)
    with pytest.raises(RunError, match="has none in its name"):
        run.steps(1)


@pytest.mark.parametrize("order", [*itertools.permutations(["900k", "1M", "1.5M"])])
def test_steps_in_thousands_and_millions_are_in_order(tmp_path, order):
    for i, step in enumerate(order):
        save_weight(tmp_path / f"ckpt_{step}.pt", i)
    run = open_run(tmp_path)
    assert names(run) == ["ckpt_900k.pt", "ckpt_1M.pt", "ckpt_1.5M.pt"]
    assert [c.step for c in run] == [900_000, 1_000_000, 1_500_000]


def test_duplicate_at_epoch_boundary_counts_once(tmp_path):
    save_weight(tmp_path / "epoch_1.pt", 1.0, step=500, epoch=1)
    save_weight(tmp_path / "iter_500.pt", 1.0, step=500, epoch=2)
    save_weight(tmp_path / "iter_700.pt", 2.0, step=700, epoch=2)
    run = open_run(tmp_path)
    assert names(run) == ["epoch_1.pt", "iter_700.pt"]
    assert run.left_out == ((tmp_path / "iter_500.pt", "repeats epoch_1.pt"),)


@pytest.mark.parametrize("recorded", [False, True])
def test_steps_restarting_each_epoch_follow_epochs(tmp_path, recorded):
    moments = [(1, 500), (1, 1000), (2, 500), (2, 1000)]
    for epoch, step in moments:
        beside = {"epoch": epoch, "iter": step} if recorded else {}
        weights = {"model": {"w": torch.full((2,), float(epoch * step))}}
        torch.save(weights | beside, tmp_path / f"epoch{epoch}_iter{step}.pt")
    run = open_run(tmp_path)
    assert names(run) == [f"epoch{epoch}_iter{step}.pt" for epoch, step in moments]
    assert not run.notes


def test_steps_continuing_over_epochs_are_clock(tmp_path):
    for epoch, step in [(0, 99), (1, 199), (1, 250)]:
        save_weight(tmp_path / f"epoch={epoch}-step={step}.ckpt", step)
    assert [c.step for c in open_run(tmp_path)] == [99, 199, 250]
