"""How many processor threads compute."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner, Result
from helpers import save_states

from ckptavg.cli import main
from ckptavg.distributed.threads import default_threads, limit_threads

STATES = [{"weight": torch.full((2, 3), float(i)), "bias": torch.zeros(2)} for i in (1, 3)]
OWN = """
import torch
from torch import nn

def model():
    print("threads", torch.get_num_threads())
    return nn.Linear(3, 2)

def data():
    return torch.utils.data.TensorDataset(torch.ones(4, 3), torch.tensor([0, 1, 0, 1]))
"""


@pytest.fixture(autouse=True)
def usual():
    """As many threads as no test asks for, before and after."""
    before = torch.get_num_threads()
    torch.set_num_threads(5)
    yield 5
    torch.set_num_threads(before)


def run_command(*args: object) -> Result:
    return CliRunner().invoke(main, [str(arg) for arg in args])


def test_limit_threads_holds_within_block_only(usual):
    processors = min(4, os.cpu_count() or 1)
    with limit_threads(1):
        assert torch.get_num_threads() == 1
        assert default_threads() == 1
        later: list[int] = []
        thread = threading.Thread(target=lambda: later.append(torch.get_num_threads()))
        thread.start()
        thread.join()
        assert later == [1]
    assert torch.get_num_threads() == usual
    assert default_threads() == processors


def test_limit_threads_ends_after_error(usual):
    with pytest.raises(ZeroDivisionError), limit_threads(2):
        raise ZeroDivisionError
    assert torch.get_num_threads() == usual


def test_default_threads_ignores_excess_limit():
    processors = min(4, os.cpu_count() or 1)
    with limit_threads(99):
        assert default_threads() == processors
        assert default_threads(sharing=1000) == 1


def test_threads_option_sets_torch_threads_of_eval(tmp_path: Path, usual):
    save_states(tmp_path / "run", STATES)
    (tmp_path / "own.py").write_text(OWN)
    own = f"{tmp_path / 'own.py'}:"
    result = run_command(
        "eval", "--run", tmp_path / "run", "--model", f"{own}model", "--data", f"{own}data",
        "--threads", 3,
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    assert "threads 3" in result.output
    assert torch.get_num_threads() == usual


def test_threads_option_sets_pool_of_average(tmp_path, monkeypatch, usual):
    save_states(tmp_path / "run", STATES)
    pools: list[int] = []

    def start(count):
        pools.append(count)
        return start_threads(count)

    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    from ckptavg.averaging.stream import start_threads

    monkeypatch.setattr("ckptavg.averaging.stream.start_threads", start)
    for flags in ([], ["--threads", 2]):
        out = tmp_path / f"{len(flags)}.pt"
        result = run_command("average", tmp_path / "run", "-o", out, *flags)
        assert result.exit_code == 0, result.output
    assert pools == [4, 2]
    assert torch.get_num_threads() == usual


@pytest.mark.parametrize("count", ["0", "-1", "many"])
def test_threads_option_needs_number_from_one(tmp_path, count):
    result = run_command("inspect", tmp_path, "--threads", count)
    assert result.exit_code == 2
    assert "whole number from 1 on" in result.output


@pytest.mark.parametrize("command", ["average", "update-bn", "eval", "inspect"])
def test_threads_option_is_explained_in_full_help(command):
    text = " ".join(run_command(command, "--help-all").stdout.split())
    assert "--threads N Processor threads that compute. On a machine that others use" in text
