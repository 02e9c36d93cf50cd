"""The note on runs whose learning rate is cyclical."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from ckptavg.cli import main

NOTE = "the learning rate is cyclical"
CYCLIC = [0.1, 0.05, 0.01] * 3


def notes(directory: Path, rates: list[float | None], *selection: str) -> str:
    for step, rate in enumerate(rates, 1):
        recorded = {} if rate is None else {"lr": rate}
        saved = {"state_dict": {"w": torch.full((2,), float(step))}, "step": step, **recorded}
        torch.save(saved, directory / f"step_{step}.pt")
    args = ["average", str(directory), "--dry-run", *selection]
    done = CliRunner().invoke(main, args, catch_exceptions=False)
    assert done.exit_code == 0, done.stderr
    return done.stderr


def test_a_cyclical_run_is_noted_with_what_takes_its_ends(tmp_path: Path) -> None:
    told = notes(tmp_path, [*CYCLIC])
    assert f"{NOTE}, and 6 of 9 selected checkpoints are from the middle of a cycle" in told
    assert "--at-lr-min takes the 3 at the ends of cycles" in told


@pytest.mark.parametrize("selection", [["--at-lr-min"], ["--cycle", "3"], ["--last", "1"]])
def test_a_selection_of_ends_has_no_note(tmp_path: Path, selection: list[str]) -> None:
    assert NOTE not in notes(tmp_path, [*CYCLIC], *selection)


@pytest.mark.parametrize(
    "rates",
    [
        [0.1] * 5,
        [0.01, 0.05, 0.1, 0.05, 0.01],  # one warm-up, one decay
        [0.1, 0.05, 0.02, 0.01],
        [0.1, 0.05, None, 0.1, 0.05],
    ],
)
def test_a_run_of_another_schedule_has_no_note(tmp_path: Path, rates: list[float | None]) -> None:
    assert NOTE not in notes(tmp_path, rates)
