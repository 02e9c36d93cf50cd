"""Samples or batches: which of the two some data gives, and what becomes of it."""

from collections import UserDict
from types import SimpleNamespace

import pytest
import torch
from torch.nn.utils.rnn import pack_sequence
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

from ckptavg.data.loaders import open_loader
from ckptavg.data.streams import is_dataset
from ckptavg.errors import EvaluationError
from ckptavg.models.batches import is_batch, size_of
from ckptavg.models.runtime import Runtime

X, Y = torch.arange(40.0).view(20, 2), torch.arange(20) % 3
RUNTIME = Runtime(torch.device("cpu"), batch_size=6)
SAMPLES = list(zip(X, Y.tolist(), strict=True))
BATCHES = list(zip(X.split(5), Y.split(5), strict=True))
IMAGE = torch.rand(3, 8, 8)


class Stream(IterableDataset):
    def __init__(self, items):
        self.items = items

    def __iter__(self):
        return iter(self.items)


class WebLoader(Stream):
    """As webdataset's, whose batches come from a DataLoader at the head of its pipeline."""

    def __init__(self, loader):
        super().__init__(loader)
        self.pipeline = [loader]


class Table:
    """As a data set of Hugging Face's: no Dataset of torch's, rows by number, and iterable."""

    def __len__(self):
        return len(X)

    def __getitem__(self, index):
        if index >= len(X):
            raise IndexError
        return {"x": X[index], "labels": Y[index]}

    def __iter__(self):
        return (self[i] for i in range(len(X)))


class Own(Dataset):
    """Its samples do not stack; it says how they go together."""

    def __len__(self):
        return 3

    def __getitem__(self, index):
        return torch.ones(index + 1, 2)

    def collate_fn(self, samples):
        return torch.cat(samples)


@pytest.mark.parametrize(
    ("item", "expected"),
    [
        ((X[0], 1), False),
        ((X[0], torch.tensor(1)), False),
        ((X[0], Y[:3]), False),
        ((X[0], X[0]), False),  # features and as many targets
        ((IMAGE, 1), False),
        ((IMAGE, 1, "path"), False),
        ((IMAGE, {"boxes": torch.rand(5, 4)}), False),
        ({"x": X[0], "labels": 1}, False),
        ({"x": X[0], "labels": torch.tensor(1)}, False),
        ({"input_ids": Y, "attention_mask": Y}, False),
        ({"input_ids": [1, 2, 3], "labels": 1}, False),
        ({"__key__": "a", "image": IMAGE}, False),
        (IMAGE, False),
        (X[0], False),
        ("text", False),
        ((X, Y), True),
        ([X, Y], True),
        ((X, Y, ["path"] * 20), True),
        ((X, ["name"] * 20), True),
        ((X, Y.float()[:, None]), True),
        (((X, X), Y), True),
        ({"x": X, "labels": Y}, True),
        (UserDict(x=X, labels=Y), True),
        (({"x": X}, Y), True),
        ({"input_ids": Y.view(5, 4), "labels": Y[:5]}, True),
        (torch.rand(4, 3, 8, 8), True),
        ((torch.rand(4, 3, 8, 8), None), True),
        ((SimpleNamespace(image=X), Y), True),
        ((X.numpy(), Y.numpy()), True),
        ((X[0].numpy(), 1), False),
        ({"x": X.numpy(), "name": ["a"] * 20}, True),
        ((pack_sequence([X, X[:3]]), Y[:2]), True),
        ([{"data": X, "label": Y[:, None]}], True),
        (([IMAGE, torch.rand(3, 6, 5)], [{"boxes": X}, {"boxes": Y}]), True),
    ],
)
def test_is_batch_tells_batches_from_samples(item, expected):
    assert is_batch(item) == expected


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (TensorDataset(X, Y), True),
        (Stream(SAMPLES), True),
        (Table(), True),
        (SAMPLES, True),
        (tuple(SAMPLES), True),
        ([{"x": x, "labels": y} for x, y in SAMPLES], True),
        (X, True),  # its rows
        (DataLoader(TensorDataset(X, Y), 5), False),
        (WebLoader(DataLoader(TensorDataset(X, Y), 5)), False),
        (BATCHES, False),
        (list(X.split(5)), False),
        ([], False),
        (iter(SAMPLES), False),
        ({"train": Table()}, False),
    ],
    ids=lambda value: type(value).__name__,
)
def test_is_dataset_tells_datasets_from_batches(data, expected):
    assert is_dataset(data) == expected


def read(data, **how):
    return list(open_loader(data, Runtime(torch.device("cpu"), batch_size=6, **how), shuffle=False))


@pytest.mark.parametrize("data", [SAMPLES, TensorDataset(X, Y), Stream(SAMPLES)], ids=type)
@pytest.mark.parametrize("workers", [0, 1])
def test_open_loader_batches_samples(data, workers):
    found = read(data, workers=workers)
    assert [len(x) for x, _ in found] == [6, 6, 6, 2]
    assert torch.equal(torch.cat([x for x, _ in found]), X)
    assert torch.equal(torch.cat([y for _, y in found]), Y)


def test_open_loader_batches_rows_and_shuffles_training():
    found = read(Table())
    assert torch.equal(torch.cat([batch["x"] for batch in found]), X)
    drawn = torch.cat([b["x"] for b in open_loader(Table(), RUNTIME, shuffle=True)])
    assert not torch.equal(drawn, X)
    assert torch.equal(drawn.sort(0).values, X)


@pytest.mark.parametrize(
    "data",
    [BATCHES, Stream(BATCHES), WebLoader(BATCHES), DataLoader(Stream(BATCHES), batch_size=None)],
    ids=["list", "stream", "pipeline", "loader"],
)
@pytest.mark.parametrize("workers", [0, 1])
def test_open_loader_keeps_batches(data, workers):
    found = read(data, workers=workers)
    assert [x.shape for x, _ in found] == [(5, 2)] * 4
    assert torch.equal(torch.cat([x for x, _ in found]), X)


@pytest.mark.parametrize(
    "items",
    [
        SAMPLES,
        [{"x": x.numpy(), "y": int(y), "name": "a"} for x, y in SAMPLES],
        [(IMAGE, Y[0])] * 20,
    ],
    ids=["rows", "mappings", "images"],
)
def test_open_loader_batches_samples_of_generator(items):
    assert [size_of(batch) for batch in read(item for item in items)] == [6, 6, 6, 2]


@pytest.mark.parametrize(
    "item",
    [
        *BATCHES[:1],
        {"x": X, "labels": Y},
        (torch.rand(2, 3, 4, 4), 0.5),  # images, and a number for all of them
        (X, 3),
        (IMAGE, ["a", "b", "c"]),
        X[0],  # nothing tells
    ],
    ids=["pair", "mapping", "images", "number", "words", "one sample"],
)
def test_open_loader_keeps_batches_of_generator(item):
    assert all(found is item for found in read(item for _ in range(2)))


def test_open_loader_keeps_workers_of_inner_loader():
    loader = DataLoader(TensorDataset(X, Y), 5, num_workers=1)
    found = read(WebLoader(loader), workers=2)
    assert torch.equal(torch.cat([x for x, _ in found]), X)


def test_open_loader_rereads_stream():
    loader = open_loader(Stream(SAMPLES), RUNTIME, shuffle=False)
    assert [len(list(loader)) for _ in range(2)] == [4, 4]
    assert read(Stream([])) == []


def test_open_loader_uses_collate_fn_of_dataset():
    (batch,) = read(Own())
    assert batch.shape == (6, 2)


@pytest.mark.parametrize("workers", [0, 1])
def test_open_loader_refuses_samples_that_do_not_stack(workers):
    samples = [(torch.ones(n, 2), 0) for n in (1, 2, 3)]
    with pytest.raises(EvaluationError, match=r"samples do not make a batch: .*equal size"):
        read(samples, workers=workers)


def test_open_loader_suggests_padding_for_texts():
    rows = [{"input_ids": torch.ones(n, dtype=torch.int64), "labels": 0} for n in (3, 5)]
    with pytest.raises(EvaluationError, match=r"Pad them.* DataCollatorWithPadding"):
        read(rows)
