"""Which samples a pass gets, in which order, in which process."""

import pytest
import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset, RandomSampler

from ckptavg.loaders import open_loader
from ckptavg.runtime import Runtime

CPU = torch.device("cpu")


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


def order_of(loader):
    return torch.cat(list(loader)).tolist()


def test_training_data_is_read_in_random_order_each_sample_once():
    order = order_of(open_loader(Numbers(), Runtime(CPU, batch_size=3), shuffle=True))
    assert sorted(order) == list(range(20)) != order


def test_the_order_follows_the_seed_and_not_the_global_generator():
    orders = []
    for seed in (0, 0, 1):
        torch.manual_seed(len(orders))
        orders.append(order_of(open_loader(Numbers(), Runtime(CPU, seed=seed), shuffle=True)))
    assert orders[0] == orders[1] != orders[2]


def test_reading_training_data_leaves_the_global_generator_alone():
    before = torch.get_rng_state()
    order_of(open_loader(Numbers(), Runtime(CPU), shuffle=True))
    assert torch.equal(torch.get_rng_state(), before)


def test_evaluation_data_is_read_in_its_own_order():
    loader = open_loader(Numbers(), Runtime(CPU, batch_size=6), shuffle=False)
    assert order_of(loader) == list(range(20))
    assert [len(batch) for batch in loader] == [6, 6, 6, 2]


def test_a_stream_is_read_as_it_comes():
    assert order_of(open_loader(Stream(), Runtime(CPU), shuffle=True)) == list(range(20))


@pytest.mark.parametrize("loader", [DataLoader(Numbers(), 4), [torch.ones(1)], iter(())])
def test_a_loader_is_used_as_it_is(loader):
    assert open_loader(loader, Runtime(CPU), shuffle=True) is loader


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
    open_loader(loader, Runtime(CPU), shuffle=True)
    assert ("does not shuffle" in caplog.text) == noted


def test_an_evaluation_loader_gets_no_note(caplog):
    caplog.set_level("INFO", "ckptavg")
    open_loader(batches_of_two(), Runtime(CPU), shuffle=False)
    assert not caplog.text
