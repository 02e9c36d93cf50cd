"""Checkpoints that go away while they are read, as a trainer's pruning has it: always one line."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp

import ckptavg
from ckptavg.errors import CkptavgError


class Pruner:
    """Takes a file away just before it is opened for the ``countdown``-th time, by anybody."""

    def __init__(self) -> None:
        self.path: Path | None = None
        self.countdown = 0

    def __call__(self, event: str, args: tuple) -> None:
        if event != "open" or self.path is None or str(args[0]) != str(self.path):
            return
        self.countdown -= 1
        if self.countdown == 0:
            self.path.unlink()


PRUNER = Pruner()
sys.addaudithook(PRUNER)


def write_files(run: Path) -> None:
    for step in range(3):
        beside = {"step": step, "loss": torch.tensor(0.5)}
        torch.save(
            {"model": {"w": torch.full((9,), float(step))}, **beside}, run / f"step_{step}.pt"
        )
    shutil.copy(run / "step_2.pt", run / "last.pt")


def write_legacy(run: Path) -> None:
    for step in range(2):
        torch.save({"w": torch.full((9,), float(step))}, run / f"step_{step}.pt",
                   _use_new_zipfile_serialization=False)  # fmt: skip


def write_distributed(run: Path) -> None:
    for step in range(2):
        dcp.save({"w": torch.full((9,), float(step))}, checkpoint_id=run / f"step_{step}")


def attempt(run: Path, out: Path) -> str:
    """Average a run; what the error said, if there was one of ours."""
    try:
        ckptavg.average(ckptavg.open_run(run), out=out)
    except CkptavgError as error:
        return str(error)
    return ""


RUNS = {
    "step_1.pt": write_files,
    "last.pt": write_files,
    "step_0.pt": write_legacy,
    "step_1/.metadata": write_distributed,
    "step_1/__0_0.distcp": write_distributed,
}


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
@pytest.mark.parametrize(("name", "write"), RUNS.items(), ids=RUNS)
def test_vanishing_file_is_one_line_error(name, write, tmp_path):
    tried = 0
    for countdown in range(1, 30):
        run = tmp_path / f"run{countdown}"
        run.mkdir()
        write(run)
        PRUNER.path, PRUNER.countdown = run / name, countdown
        said = attempt(run, tmp_path / f"{countdown}.safetensors")
        PRUNER.path = None
        assert len(said.splitlines()) <= 1
        assert not said or name.rpartition("/")[2] in said
        tried += 1
        if (run / name).exists():
            break
    else:
        pytest.fail("it is opened ever again")
    assert tried > 2
