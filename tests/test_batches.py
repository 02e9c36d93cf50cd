"""Loaders, batches, devices, and one way to call a model on a batch."""

from collections import OrderedDict, namedtuple
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, RandomSampler, TensorDataset

from ckptavg.batches import (
    Runtime,
    call,
    find_device,
    length_of,
    size_of,
    split_labels,
    to_device,
)
from ckptavg.errors import EvaluationError, UsageError

CPU, META = torch.device("cpu"), torch.device("meta")
Pair = namedtuple("Pair", "image label")


class Numbers(Dataset):
    def __len__(self):
        return 20

    def __getitem__(self, index):
        if index >= len(self):
            raise IndexError
        return torch.tensor(float(index))


class Stream(IterableDataset):
    def __iter__(self):
        return iter(Numbers())


class Doubled(nn.Module):
    def forward(self, x, plus=0.0):
        return 2 * x + plus


def order_of(loader):
    return torch.cat(list(loader)).tolist()


def without_accelerators(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)


# Devices


def test_auto_is_the_cpu_where_there_is_no_accelerator(monkeypatch):
    without_accelerators(monkeypatch)
    assert find_device("auto") == CPU


def test_auto_prefers_cuda(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert find_device("auto").type == "cuda"


@pytest.mark.parametrize("name", ["cuda", "cuda:0", "mps"])
def test_an_absent_device_is_an_error_that_names_it(monkeypatch, name):
    without_accelerators(monkeypatch)
    with pytest.raises(EvaluationError, match=f"{name} is not available.*--device"):
        find_device(name)


def test_a_cuda_device_beyond_the_last_is_absent(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert find_device("cuda:1") == torch.device("cuda", 1)
    with pytest.raises(EvaluationError, match="cuda:2 is not available"):
        find_device("cuda:2")


def test_an_unknown_kind_of_device_is_wrong_usage():
    with pytest.raises(UsageError, match=r"auto, cpu, cuda.*'gpu'"):
        find_device("gpu")


def test_the_device_is_the_models_own_where_none_is_named():
    assert Runtime.on(None, nn.Linear(2, 2, device="meta")).device == META
    assert Runtime.on(None, nn.BatchNorm1d(2, affine=False, device="meta")).device == META
    assert Runtime.on(None, nn.ReLU()).device == CPU
    assert Runtime.on("cpu", nn.Linear(2, 2, device="meta")).device == CPU


@pytest.mark.parametrize(
    ("amp", "expected"), [("off", torch.float32), ("bf16", torch.bfloat16), ("fp16", torch.half)]
)
def test_amp_is_the_precision_of_the_forward_pass(amp, expected):
    with Runtime(CPU, amp=amp).autocast():
        assert nn.Linear(2, 2)(torch.ones(1, 2)).dtype == expected


def test_an_unknown_amp_is_wrong_usage():
    with pytest.raises(UsageError, match="off, bf16, fp16 but got 'int8'"):
        Runtime(CPU, amp="int8").autocast()


# Loaders


def test_training_data_is_read_in_random_order_each_sample_once():
    order = order_of(Runtime(CPU, batch_size=3).loader(Numbers(), shuffle=True))
    assert sorted(order) == list(range(20)) != order


def test_the_order_follows_the_seed_and_not_the_global_generator():
    orders = []
    for seed in (0, 0, 1):
        torch.manual_seed(len(orders))
        orders.append(order_of(Runtime(CPU, seed=seed).loader(Numbers(), shuffle=True)))
    assert orders[0] == orders[1] != orders[2]


def test_reading_training_data_leaves_the_global_generator_alone():
    before = torch.get_rng_state()
    order_of(Runtime(CPU).loader(Numbers(), shuffle=True))
    assert torch.equal(torch.get_rng_state(), before)


def test_evaluation_data_is_read_in_its_own_order():
    loader = Runtime(CPU, batch_size=6).loader(Numbers(), shuffle=False)
    assert order_of(loader) == list(range(20))
    assert [len(batch) for batch in loader] == [6, 6, 6, 2]


def test_a_stream_is_read_as_it_comes():
    assert order_of(Runtime(CPU).loader(Stream(), shuffle=True)) == list(range(20))


@pytest.mark.parametrize("loader", [DataLoader(Numbers(), 4), [torch.ones(1)], iter(())])
def test_a_loader_is_used_as_it_is(loader):
    assert Runtime(CPU).loader(loader, shuffle=True) is loader


def batches_of_two(**how):
    return DataLoader(Numbers(), 2, **how)


def own_batch_sampler():
    shuffled = torch.randperm(20).view(10, 2).tolist()
    return DataLoader(Numbers(), batch_sampler=shuffled)


@pytest.mark.parametrize(
    ("loader", "noted"),
    [
        (batches_of_two(), True),
        (batches_of_two(shuffle=True), False),
        (batches_of_two(sampler=RandomSampler(Numbers())), False),
        (DataLoader(Stream(), 2), False),
        (own_batch_sampler(), False),
    ],
    ids=["sequential", "shuffle", "sampler", "stream", "batch sampler"],
)
def test_a_training_loader_that_does_not_shuffle_gets_a_note(caplog, loader, noted):
    caplog.set_level("INFO", "ckptavg")
    Runtime(CPU).loader(loader, shuffle=True)
    assert ("does not shuffle" in caplog.text) == noted


def test_an_evaluation_loader_gets_no_note(caplog):
    caplog.set_level("INFO", "ckptavg")
    Runtime(CPU).loader(batches_of_two(), shuffle=False)
    assert not caplog.text


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
    with pytest.raises(EvaluationError, match=r"\(inputs, labels\), or a dict with 'labels'"):
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


def test_length_of_a_loader_is_0_where_it_cannot_tell():
    data = TensorDataset(torch.ones(5))
    assert length_of(DataLoader(data, 2)) == 3
    assert length_of([1, 2]) == 2
    assert length_of(iter([1, 2])) == 0
    assert length_of(DataLoader(Stream(), 2)) == 0
