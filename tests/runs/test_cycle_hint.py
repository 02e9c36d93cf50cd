"""The note on runs whose learning rate is cyclical."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from ckptavg.cli import main
from ckptavg.runs.run import open_run

NOTE = "the learning rate is cyclical"
CYCLIC = [0.1, 0.05, 0.01] * 3


def saved(
    directory: Path, rates: Sequence[float | None], beside: Mapping[str, str] | None = None
) -> Path:
    for step, rate in enumerate(rates, 1):
        recorded = {} if rate is None else {"lr": rate}
        content = {"state_dict": {"w": torch.full((2,), float(step))}, "step": step, **recorded}
        torch.save({**content, **(beside or {})}, directory / f"step_{step}.pt")
    return directory


def notes(
    directory: Path,
    rates: Sequence[float | None],
    *selection: str,
    command: str = "average",
    beside: Mapping[str, str] | None = None,
) -> str:
    args = [command, str(saved(directory, rates, beside)), *selection]
    args += ["--dry-run"] if command == "average" else []
    done = CliRunner().invoke(main, args, catch_exceptions=False)
    assert done.exit_code == 0, done.stderr
    return done.stderr


def test_cycle_note_names_option_that_takes_ends(tmp_path: Path) -> None:
    told = notes(tmp_path, [*CYCLIC])
    assert f"{NOTE}, and 6 of 9 checkpoints are from the middle of a cycle" in told
    assert "--at-lr-min takes the 3 at the ends of cycles" in told


def test_inspect_notes_cycles_of_run_and_selection(tmp_path: Path) -> None:
    assert "6 of 9 checkpoints" in notes(tmp_path, [*CYCLIC], command="inspect")
    assert "2 of 3 selected checkpoints" in notes(
        tmp_path, [*CYCLIC], "--last", "3", command="inspect"
    )


def rates_after_steps(length: int, count: int, multiple: int = 1) -> list[float]:
    """The rates that torch's scheduler leaves for the next epoch, which is when many save."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.1)
    schedule = torch.optim.lr_scheduler.CosineAnnealingWarmRestarts(optimizer, length, multiple)
    rates = []
    for _ in range(count):
        optimizer.step()
        schedule.step()
        rates.append(optimizer.param_groups[0]["lr"])
    return rates


def test_cycle_note_allows_several_checkpoints_at_minimum(tmp_path: Path) -> None:
    told = notes(tmp_path, [0.1, 0.01, 0.01] * 2)
    assert f"{NOTE}, and 2 of 6 checkpoints" in told


def test_cycle_note_corrects_rates_of_next_epoch(tmp_path: Path) -> None:
    rates = rates_after_steps(3, 9)
    assert open_run(saved(tmp_path, rates)).at_lr_min()[0].step == 2  # the epoch before the last
    told = notes(tmp_path, rates)
    assert "6 of 9 checkpoints are from the middle of a cycle: --cycle 3 takes the 3 at" in told
    assert NOTE not in notes(tmp_path, rates, "--cycle", "3")


def test_at_lr_min_notes_minima_one_checkpoint_early(tmp_path: Path) -> None:
    run = open_run(saved(tmp_path, rates_after_steps(3, 9)))
    (note,) = run.at_lr_min().notes
    assert "after scheduler.step(), the cycles end one checkpoint after these minima" in note
    assert "after these minima" in notes(tmp_path, rates_after_steps(3, 9), "--at-lr-min")


def test_cycle_note_gives_no_length_for_growing_cycles(tmp_path: Path) -> None:
    rates = rates_after_steps(2, 14, multiple=2)  # ends at 2, 6 and 14
    (note,) = open_run(saved(tmp_path, rates)).at_lr_min().notes
    assert "the cycles end one checkpoint after these minima" in note
    told = notes(tmp_path, rates)
    assert "11 of 14 checkpoints are from the middle of a cycle" in told
    assert "--cycle" not in told
    assert "--at-lr-min" not in told


def test_cycle_note_knows_lightning_saves_after_step(tmp_path: Path) -> None:
    rates = rates_after_steps(3, 11)[1:]  # the first is deleted, and a cycle has begun
    lightning = {"pytorch-lightning_version": "2.5.0"}
    (note,) = open_run(saved(tmp_path, rates, lightning)).at_lr_min().notes
    assert note == (
        "Lightning saves after the scheduler's step: the cycles end one checkpoint after these "
        "minima"
    )
    told = notes(tmp_path, rates, beside=lightning)
    assert "--cycle 3:2 takes the 3 at the ends of cycles\n" in told
    ends = open_run(tmp_path).cycle(3, 2)
    assert [checkpoint.record.lr for checkpoint in ends] == [pytest.approx(0.1)] * 3
    assert NOTE not in notes(tmp_path, rates, "--cycle", "3:2", beside=lightning)


@pytest.mark.parametrize(
    "rates", [[0.1] * 4, [0.1, 0.01, 0.01], [0.02, 0.1, 0.07, 0.03], [0.1, 0.05, 0.02, 0.01]]
)
def test_cycle_note_is_absent_for_lightning_without_cycles(
    tmp_path: Path, rates: list[float]
) -> None:
    lightning = {"pytorch-lightning_version": "2.5.0"}
    assert open_run(saved(tmp_path, rates, lightning)).at_lr_min().notes == ()
    assert NOTE not in notes(tmp_path, rates, beside=lightning)


@pytest.mark.parametrize(
    "rates",
    [
        [*CYCLIC],
        [*CYCLIC, 0.1],  # a new cycle has begun
        [0.07, 0.03, 0.01] * 3,
        [0.01, 0.05, 0.1, 0.05, 0.01, 0.05, 0.1],  # up and down
        [0.1] * 4,
        [0.05, 0.1],
    ],
)
def test_at_lr_min_has_no_note_where_minima_are_ends(tmp_path: Path, rates: list[float]) -> None:
    assert open_run(saved(tmp_path, rates)).at_lr_min().notes == ()


@pytest.mark.parametrize("selection", [["--at-lr-min"], ["--cycle", "3"], ["--last", "1"]])
def test_cycle_note_is_absent_for_selected_ends(tmp_path: Path, selection: list[str]) -> None:
    assert NOTE not in notes(tmp_path, [*CYCLIC], *selection)


@pytest.mark.parametrize(
    "rates",
    [
        [0.1] * 5,
        [0.01, 0.05, 0.1, 0.05, 0.01],  # one warm-up, one decay
        [0.1, 0.05, 0.02, 0.01],
        [0.1, 0.1, 0.01, 0.01, 0.01],  # steps down, several checkpoints on each
        [0.01, 0.01, 0.1, 0.1, 0.01, 0.01],  # the same after a warm-up
        [0.1, 0.05, None, 0.1, 0.05],
    ],
)
def test_cycle_note_is_absent_for_other_schedules(
    tmp_path: Path, rates: list[float | None]
) -> None:
    assert NOTE not in notes(tmp_path, rates)
