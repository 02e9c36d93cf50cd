"""What lies beside a network below each step: other networks, and files that are none."""

from __future__ import annotations

import pytest
import torch
from helpers import save_weight

from ckptavg import open_run
from ckptavg.errors import RunError

TIMES = ("2026-01-09+23-59-59", "2026-01-10+00-00-01", "2026-02-01+00-00-00")
LFS = "version https://git-lfs.github.com/spec/v1\noid sha256:" + "4d" * 32 + "\nsize 123\n"


def save_steps(directory, beside):
    """A weight per step, and beside it a file that ``beside`` writes."""
    for value, time in enumerate(TIMES, 1):
        home = directory / f"CKPT+{time}+00"
        save_weight(home / "model.ckpt", value)
        beside(home / "other.ckpt")
    return directory


@pytest.mark.parametrize(
    "beside",
    [
        lambda path: path.write_text("3"),
        lambda path: path.write_text("avg_train_loss: 0.25\nstep: 7\n"),
        lambda path: path.write_text('{"epoch": 3}'),
        lambda path: torch.save({"last_lr": [0.1], "_step_count": 3}, path),
        lambda path: torch.save({"step": 3, "rng": {"cpu": torch.get_rng_state()}}, path),
        lambda path: torch.save({"optimizer": {"m": torch.ones(3)}, "epoch": 3}, path),
    ],
    ids=["counter", "yaml", "json", "schedule", "rng", "optimizer"],
)
def test_open_run_leaves_out_files_without_weights(tmp_path, beside):
    run = open_run(save_steps(tmp_path, beside))
    assert [c.path.name for c in run] == ["model.ckpt"] * 3
    assert [c.step for c in run] == [20260109235959, 20260110000001, 20260201000000]
    assert [path.name for path, _ in run.left_out] == ["other.ckpt"] * 3


def test_open_run_leaves_out_integers_beside_weights(tmp_path):
    for step in (1, 2):
        (home := tmp_path / f"step_{step}").mkdir()
        torch.save({"w": torch.full((2,), float(step))}, home / "model.pt")
        torch.save({"position": torch.tensor([step, 7]), "n": 3}, home / "loader.pt")
    assert [c.path.name for c in open_run(tmp_path)] == ["model.pt"] * 2


@pytest.mark.parametrize(
    "beside",
    [
        lambda path: save_weight(path, 1),
        lambda path: path.write_text(LFS),
        lambda path: path.write_bytes(b"PK\x03\x04" + bytes(500)),
    ],
    ids=["network", "pointer", "truncated"],
)
def test_open_run_refuses_possible_second_network(tmp_path, beside):
    with pytest.raises(RunError, match=r"2 networks side by side: '\*/model.ckpt', '\*/other"):
        open_run(save_steps(tmp_path, beside))
