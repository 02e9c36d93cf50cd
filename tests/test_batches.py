"""Loaders, batches, devices, and one way to call a model on a batch."""

from collections import OrderedDict, namedtuple
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from ckptavg.batches import (
    call,
    size_of,
    split_labels,
    to_device,
)
from ckptavg.errors import EvaluationError

CPU, META = torch.device("cpu"), torch.device("meta")
Pair = namedtuple("Pair", "image label")


class Doubled(nn.Module):
    def forward(self, x, plus=0.0):
        return 2 * x + plus


# Batches


def test_every_tensor_of_a_batch_is_moved_and_the_rest_kept():
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


def test_a_value_of_the_users_own_is_not_touched():
    own = SimpleNamespace(x=torch.ones(1))
    assert to_device(own, META) is own


X, Y = torch.tensor([1.0, 2.0]), torch.tensor([0, 1])


@pytest.mark.parametrize(
    "batch",
    [X, (X,), (X, Y), [X, Y], ((X,), Y), {"x": X}, ({"x": X}, Y), OrderedDict(x=X), Pair(X, Y)],
    ids=str,
)
def test_a_model_is_called_on_what_a_batch_has_for_input(batch):
    assert call(Doubled(), batch).tolist() == [2, 4]


def test_a_dict_is_passed_as_keywords():
    assert call(Doubled(), {"x": X, "plus": 1.0}).tolist() == [3, 5]


@pytest.mark.parametrize("batch", [SimpleNamespace(x=X), (), "x", None], ids=str)
def test_any_other_batch_is_an_error_that_names_forward(batch):
    with pytest.raises(EvaluationError, match=f"is a {type(batch).__name__}.*forward="):
        call(Doubled(), batch)


def test_the_second_of_two_inputs_is_not_dropped_in_silence():
    with pytest.raises(EvaluationError, match="forward="):
        call(Doubled(), ((X, X), Y))


@pytest.mark.parametrize("batch", [(X, Y), [X, Y], Pair(X, Y), (X, Y, "path")], ids=str)
def test_labels_stand_second_in_a_tuple(batch):
    inputs, labels = split_labels(batch)
    assert inputs is X
    assert labels is Y


@pytest.mark.parametrize("name", ["labels", "label", "target", "targets", "y"])
def test_labels_are_found_in_a_dict_and_not_passed_to_the_model(name):
    inputs, labels = split_labels({"x": X, name: Y})
    assert inputs == {"x": X}
    assert labels is Y


@pytest.mark.parametrize("batch", [X, (X,), {"x": X}, None, (X, "cat")], ids=str)
def test_a_batch_without_labels_is_an_error(batch):
    with pytest.raises(EvaluationError, match="or a dict with one of labels, label, target"):
        split_labels(batch)


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
def test_size_of_a_batch_is_that_of_its_first_tensor(batch, expected):
    assert size_of(batch) == expected


def test_targets_in_float64_stay_on_the_host_where_the_device_has_no_such_type():
    batch = {"y": torch.ones(2, dtype=torch.float64)}
    assert to_device(batch, torch.device("mps"))["y"] is batch["y"]
