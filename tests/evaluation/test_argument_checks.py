"""Models and data that are none are refused before anything is computed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

import ckptavg
from ckptavg.errors import UsageError

DATA = TensorDataset(torch.randn(8, 3), torch.arange(8) % 2)


class Small(nn.Linear):
    def __init__(self) -> None:
        super().__init__(3, 2)


def make_data() -> Dataset[Any]:
    return DATA


class Module:
    """As a LightningDataModule is."""

    def val_dataloader(self) -> DataLoader[Any]:
        return DataLoader(DATA, 4)


@pytest.fixture
def run(tmp_path: Path) -> ckptavg.Run:
    for epoch in (1, 2):
        torch.save({"model": Small().state_dict(), "epoch": epoch}, tmp_path / f"{epoch}.pt")
    return ckptavg.open_run(tmp_path)


def evaluate(run: ckptavg.Run, model: Any, data: Any) -> object:
    return ckptavg.evaluate(run, model, data)


def compare(run: ckptavg.Run, model: Any, data: Any) -> object:
    return ckptavg.compare(run, model, data)


def update_bn(run: ckptavg.Run, model: Any, data: Any) -> object:
    del run
    return ckptavg.update_bn(model, data)


CALLS = pytest.mark.parametrize(
    "call", [evaluate, compare, update_bn], ids=lambda call: call.__name__
)


@CALLS
@pytest.mark.parametrize(
    ("model", "told"),
    [
        (Small, r"is the class Small\. Call it: Small\(\.\.\.\)"),
        (make_data, r"is a function\. Call it: make_data"),
        ("net.py:Small", r"is 'net\.py:Small'\. Build the module"),
        ({"weight": torch.zeros(1)}, "is a dict$"),
        (None, "is a NoneType$"),
    ],
    ids=["class", "function", "text", "weights", "nothing"],
)
def test_model_refuses_non_modules(
    run: ckptavg.Run, call: Callable[..., object], model: Any, told: str
) -> None:
    with pytest.raises(UsageError, match=f"model is expected to be a torch.nn.Module but {told}"):
        call(run, model, DATA)


@CALLS
@pytest.mark.parametrize(
    ("data", "told"),
    [
        (make_data, r"is a function\. Call it: make_data"),
        (TensorDataset, r"is the class TensorDataset\. Call it"),
        ("val", "is 'val'$"),
        (Path("val"), r"is .*Path\('val'\)$"),
        (Module(), r"is a Module\. Pass what its val_dataloader"),
        (3, "is a int$"),
        ({"train": DATA, "test": DATA}, r"is a dict of train, test\. Pass one of them"),
        ({"x": torch.ones(2, 3), "y": torch.ones(2)}, r"is a dict of x, y\. Put it in a list"),
    ],
    ids=["function", "class", "text", "path", "data module", "number", "splits", "batch"],
)
def test_data_refuses_other_objects(
    run: ckptavg.Run, call: Callable[..., object], data: Any, told: str
) -> None:
    with pytest.raises(UsageError, match=f"a Dataset or a loader of batches but {told}"):
        call(run, nn.Sequential(nn.BatchNorm1d(3), Small()) if call is update_bn else Small(), data)


def test_selection_refuses_text(run: ckptavg.Run) -> None:
    with pytest.raises(UsageError, match=r"a part of the run but is 'last 3'\. Select from"):
        ckptavg.compare(run, Small(), DATA, selection="last 3")  # type: ignore[arg-type]


@pytest.mark.parametrize("count", ["3", 2.5, None])
def test_run_last_refuses_other_than_whole_numbers(run: ckptavg.Run, count: Any) -> None:
    with pytest.raises(UsageError, match="last is expected to be a whole number but got"):
        run.last(count)


def test_run_is_not_indexed_by_name(run: ckptavg.Run) -> None:
    with pytest.raises(TypeError, match=r"positions and slices but got '1\.pt'"):
        run["1.pt"]  # type: ignore[call-overload]


def test_forward_refuses_the_name_of_a_function(run: ckptavg.Run) -> None:
    expected = "forward is expected to be a function of model and batch but is 'own.py:call'"
    for call in (ckptavg.evaluate, ckptavg.compare):
        with pytest.raises(UsageError, match=expected):
            call(run, Small(), DATA, forward="own.py:call")
    with pytest.raises(UsageError, match=expected):
        ckptavg.update_bn(Small(), DATA, forward="own.py:call")
    with pytest.raises(UsageError, match=expected):
        ckptavg.average(run, recompute=ckptavg.Recompute(Small(), DATA, forward="own.py:call"))


def test_batch_size_of_zero_is_not_taken_for_the_default(run: ckptavg.Run) -> None:
    with pytest.raises(UsageError, match="batch_size is expected to be a whole number from 1 on"):
        ckptavg.evaluate(run, Small(), DATA, batch_size=0)


@pytest.mark.parametrize("path", [5, [], ["a.pt"]], ids=["number", "empty", "list"])
def test_open_run_refuses_what_is_no_path(path: Any) -> None:
    with pytest.raises(UsageError, match=r"a path of a run is expected but got .*open_run\(\*"):
        ckptavg.open_run(path)


def test_average_refuses_schemes_and_patterns_of_other_types(run: ckptavg.Run) -> None:
    scheme: Any = 0.9
    with pytest.raises(UsageError, match="scheme is expected to be a text"):
        ckptavg.average(run, scheme)
    pattern: Any = 5
    with pytest.raises(UsageError, match="patterns of tensor names are expected but got 5"):
        ckptavg.average(run, include=pattern)
