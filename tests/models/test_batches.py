"""Batches of every kind: moved to a device, counted, described."""

from __future__ import annotations

import dataclasses
from collections import OrderedDict, UserDict, namedtuple
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.nn.utils.rnn import pack_sequence

from ckptavg.models.batches import (
    describe_batch,
    is_zipped,
    map_tensors,
    size_of,
    tensors_of,
    to_device,
    with_tensors_for_arrays,
)

CPU, META = torch.device("cpu"), torch.device("meta")
Pair = namedtuple("Pair", "image label")


def test_to_device_moves_tensors_and_keeps_rest():
    x = torch.ones(2)
    batch = {"image": x, "more": [x, (x, "name")], "pair": Pair(x, 3), "none": None}
    moved = to_device(batch, META)
    parts = [moved["image"], moved["more"][0], moved["more"][1][0], moved["pair"].image]
    assert all(part.device == META for part in parts)
    assert moved["more"][1][1] == "name"
    assert moved["pair"].label == 3
    assert moved["none"] is None
    assert isinstance(moved["pair"], Pair)
    assert x.device == CPU


def test_map_tensors_keeps_container_types():
    x, own = torch.ones(2), SimpleNamespace(x=torch.ones(1))
    batch = UserDict(a=Bag(x=x), b=[x, (x, "name")], c=Pair(x, 3), d=own)
    doubled = map_tensors(batch, lambda tensor: 2 * tensor)
    found = [doubled["a"]["x"], doubled["b"][0], doubled["b"][1][0], doubled["c"].image]
    assert all(torch.equal(tensor, 2 * x) for tensor in found)
    assert [type(doubled[name]) for name in "abc"] == [Bag, list, Pair]
    assert (doubled["b"][1][1], doubled["c"].label, doubled["d"]) == ("name", 3, own)
    assert torch.equal(batch["a"]["x"], torch.ones(2))


def test_to_device_leaves_unknown_object():
    own = SimpleNamespace(x=torch.ones(1))
    assert to_device(own, META) is own


@dataclasses.dataclass(frozen=True)
class Clip:
    frames: torch.Tensor
    name: str = "clip"


class Bag(dict):
    """A dict with a word of its own."""

    color = "red"


class Graph:
    """As torch_geometric's batches, it is moved in place and tells how many graphs it holds."""

    def __init__(self, x, count=0):
        self.x = x
        if count:
            self.num_graphs = count

    def to(self, device):
        self.x = self.x.to(device)
        return self


class Silent(Graph):
    def to(self, device):
        super().to(device)


@pytest.mark.parametrize(
    "batch",
    [Bag(x=torch.ones(2)), OrderedDict(x=torch.ones(2)), UserDict(x=torch.ones(2))],
    ids=lambda batch: type(batch).__name__,
)
def test_to_device_keeps_mapping_class(batch):
    moved = to_device(batch, META)
    assert type(moved) is type(batch)
    assert getattr(moved, "color", "") == getattr(batch, "color", "")
    assert moved["x"].device == META
    assert batch["x"].device == CPU


@pytest.mark.parametrize("kind", [Graph, Silent])
def test_to_device_moves_copy_of_object(kind):
    batch = kind(torch.ones(2))
    moved = to_device((batch, 1), META)[0]
    assert isinstance(moved, kind)
    assert moved.x.device == META
    assert batch.x.device == CPU


def test_to_device_moves_dataclass_fields():
    batch = Clip(torch.ones(2))
    moved = to_device(batch, META)
    assert (moved.frames.device, moved.name) == (META, "clip")
    assert batch.frames.device == CPU
    assert [t.device for t in tensors_of(moved)] == [META]


def test_to_device_keeps_packed_lengths_on_host():
    packed = pack_sequence([torch.ones(3, 2), torch.ones(1, 2)])
    moved = to_device(packed, META)
    assert moved.data.device == META
    assert moved.batch_sizes.device == CPU


IMAGES = [torch.rand(3, 5, 6), torch.rand(3, 7, 4)]
BOXES = [{"boxes": torch.rand(3, 4)}, {"boxes": torch.rand(3, 4)}]


@pytest.mark.parametrize(
    ("batch", "expected"),
    [
        ((IMAGES, BOXES), 2),
        (tuple(zip(*zip(IMAGES * 2, BOXES * 2, strict=True), strict=True)), 4),
        ((IMAGES[:1], BOXES[:1]), 1),
        ((IMAGES, torch.tensor([0, 1])), 2),
        ((IMAGES, (0, 1)), 2),
        (IMAGES, 2),
        ({"image": IMAGES, "boxes": BOXES}, 2),
        ([{"image": IMAGES[0], "height": 5}, {"image": IMAGES[1], "height": 7}], 2),
        (([torch.rand(4, 3, 5, 5), torch.rand(4, 3, 2, 2)], torch.ones(4)), 4),  # two views
        ([[torch.rand(4, 3), torch.rand(4, 2)], [torch.ones(4), torch.ones(4)]], 4),
        ({"scale": torch.tensor(1.0), "x": torch.ones(5, 2)}, 5),
        (UserDict(x=torch.ones(5, 2)), 5),
        (Graph(torch.ones(9, 2), 3), 3),
        (Graph(torch.ones(9, 2)), 9),
        ([Graph(torch.ones(9, 2), 1), Graph(torch.ones(4, 2), 1)], 2),
        (SimpleNamespace(batch_size=torch.Size([6])), 6),
        (pack_sequence([torch.ones(3, 2), torch.ones(1, 2)]), 2),
        ((pack_sequence([torch.ones(3, 2), torch.ones(1, 2)]), torch.ones(2)), 2),
        (Clip(torch.ones(7, 2)), 7),
        (torch.ones(6, 2).numpy(), 6),
        ((torch.ones(6, 2).numpy(), torch.ones(6).numpy()), 6),
        ([{"data": torch.ones(6, 2), "label": torch.ones(6, 1)}], 6),
        ((), 0),
        (None, 0),
        ("name", 0),
    ],
)
def test_size_of_counts_samples(batch, expected):
    assert size_of(batch) == expected


@pytest.mark.parametrize(
    ("batch", "expected"),
    [
        ((IMAGES, BOXES), True),
        ([[torch.rand(4, 3), torch.rand(4, 2)], [torch.ones(4), torch.ones(4)]], False),
        ((torch.ones(4, 2), torch.ones(4)), False),
        ((IMAGES, BOXES[:1]), False),
        (([], []), False),
        ((IMAGES,), False),
    ],
)
def test_is_zipped_finds_lists_of_sample_parts(batch, expected):
    assert is_zipped(batch) == expected


@pytest.mark.parametrize(
    ("batch", "expected"),
    [
        (torch.ones(2, 3), "float32 of 2 × 3"),
        (torch.tensor(1), "int64 of one value"),
        (torch.ones(2, 3).numpy(), "array of float32 of 2 × 3"),
        ((torch.ones(2, 3), ["a", "b"]), "(float32 of 2 × 3, [a str, a str])"),
        ([torch.ones(2)] * 5, "[float32 of 2, float32 of 2, float32 of 2 and 2 more]"),
        ({"x": torch.ones(2), 3: None}, "{x: float32 of 2, 3: a NoneType}"),
        ((), "a tuple"),
        (SimpleNamespace(x=1), "a SimpleNamespace"),
    ],
)
def test_describe_batch_tells_types_and_shapes(batch, expected):
    assert describe_batch(batch) == expected


@pytest.mark.parametrize(
    ("batch", "expected"),
    [
        (torch.ones(3, 2), 3),
        ((torch.ones(4, 2), torch.ones(4)), 4),
        (((torch.ones(2),), None), 2),
        ({"name": "a", "x": torch.ones(5)}, 5),
        (torch.tensor(1.0), 1),
        (SimpleNamespace(), 0),
    ],
)
def test_size_of_counts_rows_of_first_tensor(batch, expected):
    assert size_of(batch) == expected


def test_with_tensors_for_arrays_converts_numbers_only():
    batch = {"x": np.arange(3.0), "names": np.array(["a", "b"]), "rest": (1, [np.ones(2, bool)])}
    found = with_tensors_for_arrays(batch)
    assert found["x"].tolist() == [0, 1, 2]
    assert found["names"] is batch["names"]
    assert found["rest"][1][0].dtype == torch.bool
    assert isinstance(batch["x"], np.ndarray)
    plain = ({"x": torch.ones(2)}, [1, "a"])
    assert with_tensors_for_arrays(plain) is plain


def test_to_device_keeps_float64_on_host_for_mps():
    batch = {"y": torch.ones(2, dtype=torch.float64)}
    assert to_device(batch, torch.device("mps"))["y"] is batch["y"]
