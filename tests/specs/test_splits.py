"""Data that factories and files give in other shapes than one data set."""

import pytest
from spec_helpers import error_of, write
from torch.utils.data import DataLoader

from ckptavg.specs.arguments import parse_arguments
from ckptavg.specs.sources import make_data

FILE = """
import torch
from torch.utils.data import DataLoader, TensorDataset

def rows(count):
    return TensorDataset(torch.zeros(count, 3), torch.zeros(count))

loader = DataLoader(rows(7), batch_size=2)
dataset = rows(8)
batches = [(torch.zeros(2, 3), torch.zeros(2))] * 5

class Rows(TensorDataset):
    def __init__(self, count=9):
        super().__init__(torch.zeros(count, 3))

class Indexed:
    def __len__(self):
        return 6

    def __getitem__(self, index):
        if index >= 6:
            raise IndexError
        return torch.zeros(3), 0

def by_name():
    return {"train": rows(1), "validation": rows(2), "test": rows(3)}

def loaders():
    return {"train_loader": DataLoader(rows(1)), "val_loader": DataLoader(rows(2))}

def lists():
    return {"train": batches[:1], "test": batches[:2]}

def two_validations():
    return {"train": rows(1), "validation_matched": rows(2), "validation_mismatched": rows(3)}

def training_only():
    return {"train": rows(1)}

def pair():
    return DataLoader(rows(1)), DataLoader(rows(2))

def own_split(split="test"):
    return rows(len(split))

def columns():
    return torch.zeros(4, 3), torch.zeros(4)

def listed_columns():
    return [*columns()]

def fields():
    return {"x": torch.zeros(4, 3), "y": torch.zeros(4)}

class Module:
    '''In the manner of a LightningDataModule.'''

    def __init__(self, size=1):
        self.size, self.calls = size, []

    def prepare_data(self):
        self.calls.append("prepare")

    def setup(self, stage):
        self.calls.append(stage)

    def loader(self, kind):
        assert self.calls[-2:] == ["prepare", "test" if kind == "test" else "fit"]
        return DataLoader(rows(self.size + len(kind)), 2)

    def train_dataloader(self):
        return self.loader("train")

    def val_dataloader(self):
        return [self.loader("val")]

    def test_dataloader(self):
        return self.loader("test")

class SeveralLoaders(Module):
    def val_dataloader(self):
        return [self.loader("val"), self.loader("val")]

class Failing(Module):
    def setup(self, stage):
        raise OSError("no disk")

module = Module(10)
"""


def data_of(name, *pairs, train=False):
    path = write("dm.py", FILE)
    return make_data(f"{path}:{name}", parse_arguments(pairs), train=train)


def rows_in(data):
    return len(data.dataset) if isinstance(data, DataLoader) else len(data)


@pytest.mark.parametrize(
    ("name", "rows"), [("loader", 7), ("dataset", 8), ("batches", 5), ("Rows", 9), ("Indexed", 6)]
)
@pytest.mark.parametrize("train", [True, False])
def test_data_object_is_taken_and_class_is_called(name, rows, train):
    assert rows_in(data_of(name, train=train)) == rows


def test_data_object_takes_no_arguments():
    message = error_of(data_of, "loader", "batch_size=3")
    assert "dm.py:loader is a DataLoader that is made already, and takes no arguments" in message


@pytest.mark.parametrize(
    ("name", "training", "scoring"),
    [("by_name", 1, 2), ("loaders", 1, 2), ("lists", 1, 2), ("Module", 6, 4), ("module", 15, 13)],
)
def test_split_is_picked_by_purpose(name, training, scoring):
    assert rows_in(data_of(name, train=True)) == training
    assert rows_in(data_of(name)) == scoring


@pytest.mark.parametrize(
    ("name", "pair", "rows"),
    [
        ("by_name", "split=test", 3),
        ("two_validations", "split=validation_mismatched", 3),
        ("training_only", "split=train", 1),
        ("pair", "split=1", 2),
        ("Module", "split=test", 5),
        ("Module", "split=validation", 4),
        ("own_split", "split=longer", 6),
    ],
)
def test_split_can_be_named(name, pair, rows):
    assert rows_in(data_of(name, pair)) == rows


def test_split_that_was_picked_is_logged(caplog):
    caplog.set_level("INFO", "ckptavg")
    data_of("by_name")
    data_of("Module")
    assert "by_name is its validation" in caplog.messages[0]
    assert "are those of its val_dataloader" in caplog.messages[1]


@pytest.mark.parametrize(
    ("name", "pairs", "said"),
    [
        ("two_validations", (), "of which none or several are named for scoring"),
        ("training_only", (), "several data sets (train), of which none or several are named for"),
        ("pair", (), "several data sets (0, 1), of which"),
        ("by_name", ("split=tset",), "of which none is called 'tset'. Pass split=NAME"),
        ("Module", ("split=dev",), "has no split 'dev'. It has train, val, test"),
        ("SeveralLoaders", (), "val_dataloader of SeveralLoaders gives 2 loaders"),
        ("Failing", (), "val_dataloader of Failing failed: OSError: no disk"),
        ("columns", (), "but returned a tuple. Return torch.utils.data.TensorDataset(inputs"),
        ("listed_columns", (), "but returned a list. Return torch.utils.data.TensorDataset("),
        ("fields", (), "but returned a dict"),
        ("Rows", ("split=test",), "of which there are no splits"),
    ],
)
def test_split_that_is_ambiguous_is_an_error(name, pairs, said):
    assert said in error_of(data_of, name, *pairs)


def test_argument_error_names_the_function():
    path = write("own.py", "def data(train=False):\n    return [0] * (1 + train)")
    assert len(make_data(f"{path}:data", parse_arguments(["train=no"]), train=True)) == 1
    message = error_of(make_data, f"{path}:data", parse_arguments(["train=nay"]), train=True)
    assert message == (
        "own.py:data: train is expected to be yes or no (its default is False) but got 'nay'"
    )
