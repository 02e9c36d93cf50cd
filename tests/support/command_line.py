"""The command line in this process, and a directory of checkpoints and factories to use it on."""

from __future__ import annotations

from pathlib import Path

import torch
from click.testing import CliRunner, Result
from torch import nn

from ckptavg.cli import main

FACTORIES = """
import torch
from torch import nn

def model(classes=3):
    return nn.Sequential(nn.Flatten(), nn.Linear(8, 4), nn.BatchNorm1d(4), nn.Linear(4, classes))

def data(n=40, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.utils.data.TensorDataset(
        torch.randn(n, 8, generator=g), torch.randint(0, 3, (n,), generator=g))

def broken():
    return [(torch.zeros(2, 5), torch.zeros(2, dtype=torch.int64))]

def slow():
    import pathlib, time
    pathlib.Path("started").touch()
    for batch in torch.utils.data.DataLoader(data(), 4):
        time.sleep(0.5)
        yield batch
"""


def network() -> nn.Module:
    """The model of net.py."""
    return nn.Sequential(nn.Flatten(), nn.Linear(8, 4), nn.BatchNorm1d(4), nn.Linear(4, 3))


def write_home(directory: Path) -> None:
    """Write a run of four checkpoints under run/, and factories in net.py."""
    (directory / "net.py").write_text(FACTORIES)
    (directory / "run").mkdir()
    for epoch in range(1, 5):
        torch.manual_seed(epoch)
        saved = {"state_dict": network().state_dict(), "epoch": epoch, "lr": 0.1 / epoch}
        torch.save(saved | {"val_acc": 90.0 - epoch}, directory / "run" / f"epoch_{epoch}.pt")


def ckptavg(*args: object) -> Result:
    """Run a command with these arguments."""
    return CliRunner().invoke(main, [str(arg) for arg in args])


def one_line_error(result: Result, code: int = 1) -> str:
    """The error of a failed command, which must be a single line."""
    assert result.exit_code == code, result.output
    line = result.stderr.strip().splitlines()[-1]
    assert line.startswith("Error: ")
    assert "Traceback" not in result.output
    return line
