"""A run as a person meets it in a notebook: positions, tables, frames."""

from __future__ import annotations

import sys

import pytest
from helpers import names, save_weight

import ckptavg
from ckptavg import open_run
from ckptavg.errors import MissingPackageError, RunError, UsageError


@pytest.fixture
def run(tmp_path):
    for i in range(1, 7):
        record = {"epoch": i, "lr": 0.1 / i, "val_acc": 0.5 + i / 100}
        save_weight(tmp_path / "run" / f"epoch_{i}.pt", i, **record)
    return open_run(tmp_path / "run")


def test_run_index_gives_checkpoint(run):
    every = list(run)
    assert [run[i] for i in range(6)] == every
    assert run[-1] is every[-1]
    assert list(reversed(run)) == every[::-1]
    for position in (6, -7):
        with pytest.raises(IndexError, match=f"6 checkpoints has none at {position}"):
            run[position]


@pytest.mark.parametrize(
    "positions", [slice(2, 5), slice(-3, None), slice(None, 2), slice(None, None, 2), slice(1, 99)]
)
def test_run_slice_gives_run(run, positions):
    part = run[positions]
    assert isinstance(part, ckptavg.Run)
    assert list(part) == list(run)[positions]


def test_run_slice_keeps_trainings_apart(run, tmp_path):
    for i in range(1, 4):
        save_weight(tmp_path / "other" / f"epoch_{i}.pt", i)
    both = open_run(tmp_path / "run", tmp_path / "other")
    assert [len(training) for training in both[4:8].trainings] == [2, 2]
    assert [len(training) for training in both[-2:].trainings] == [2]


def test_run_slice_refuses_empty_or_reversed(run):
    with pytest.raises(RunError, match=r"\[5:5\]\) leaves none of 6"):
        run[5:5]
    with pytest.raises(UsageError, match="keeps its order"):
        run[::-1]


def test_run_repr_is_one_line_and_str_is_table(run):
    assert repr(run) == "<Run of 6 checkpoints: epoch_1.pt ... epoch_6.pt>"
    assert repr(run[0:1]) == "<Run of 1 checkpoint: epoch_1.pt>"
    head, *rows = [line.split() for line in str(run).splitlines() if "." in line or "LR" in line]
    assert head == ["checkpoint", "step", "epoch", "LR", "val_acc"]
    assert rows[1] == ["epoch_2.pt", "2", "2", "0.05", "0.52"]
    assert len(rows) == 6


def test_run_html_escapes_names(tmp_path):
    save_weight(tmp_path / "<b>bold</b>_epoch_1.pt".replace("/", "_"), 1, **{"<i>_acc": 0.5})
    html = open_run(tmp_path)._repr_html_()
    assert html.count("<tr>") == 2
    assert "&lt;b&gt;bold" in html
    assert "<b>bold" not in html
    assert "<i>" not in html


def test_run_to_frame_has_row_per_checkpoint(run):
    pytest.importorskip("pandas")
    frame = run.to_frame()
    assert list(frame["name"]) == names(run)
    assert list(frame["val_acc"]) == [0.5 + i / 100 for i in range(1, 7)]
    assert list(frame["step"]) == [1, 2, 3, 4, 5, 6]
    assert list(frame["path"]) == [str(c.path) for c in run]


def test_run_to_frame_needs_pandas(run, monkeypatch):
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(MissingPackageError, match="pip install pandas"):
        run.to_frame()
