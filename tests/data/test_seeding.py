"""Figures repeat under augmentation, and the caller's generators stay as they were."""

import random
import threading

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset, IterableDataset

from ckptavg import evaluate, update_bn
from ckptavg.data.loaders import open_loader
from ckptavg.data.prefetch import with_progress
from ckptavg.data.seeding import Generators, seeded_torch
from ckptavg.distributed.peers import SingleProcess
from ckptavg.models.runtime import Runtime


class Augmented(Dataset):
    """Noise from one of the global generators, or from all of them."""

    def __init__(self, *names):
        self.names = names or ("torch", "numpy", "python")

    def __len__(self):
        return 24

    def __getitem__(self, index):
        drawn = {
            "torch": lambda: float(torch.rand(())),
            "numpy": np.random.rand,
            "python": random.random,
        }
        noise = [drawn[name]() for name in self.names]
        return torch.tensor([index, *noise], dtype=torch.float32), index % 2


class Stream(IterableDataset):
    def __iter__(self):
        data = Augmented()
        return (data[i] for i in range(24))


def disturb():
    torch.rand(7)
    np.random.rand(7)
    random.random()


def read(data, seed=0, workers=0):
    runtime = Runtime(torch.device("cpu"), batch_size=5, seed=seed, workers=workers)
    loader = open_loader(data, runtime, shuffle=True)
    disturb()
    return torch.cat([x for x, _ in with_progress(loader, lambda *_: None, SingleProcess(), seed)])


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("names", [("torch",), ("numpy",), ("python",), ()], ids=str)
def test_seed_decides_draws_of_dataset(names, workers):
    found = [read(Augmented(*names), seed, workers) for seed in (3, 3, 4)]
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0][:, 1:], found[2][:, 1:])


@pytest.mark.parametrize(
    "data",
    [
        Stream,
        lambda: DataLoader(Augmented(), 5, shuffle=True),
        lambda: DataLoader(Augmented(), 5, shuffle=True, num_workers=1),
    ],
    ids=["stream", "loader", "workers"],
)
def test_seed_decides_draws_of_stream_and_loader(data):
    assert torch.equal(read(data()), read(data()))


@pytest.mark.parametrize("workers", [0, 2])
def test_seed_repeats_draws_in_every_pass(workers):
    runtime = Runtime(torch.device("cpu"), batch_size=5, workers=workers)
    loader = open_loader(Augmented(), runtime, shuffle=True)
    first, second = (
        torch.cat([x for x, _ in with_progress(loader, lambda *_: None, SingleProcess())])
        for _ in range(2)
    )
    assert torch.equal(first, second)


def states():
    numpy = np.random.get_state()
    return [torch.get_rng_state().tolist(), random.getstate(), numpy[1].tolist(), numpy[2:]]


def test_generators_leave_global_state_alone():
    disturb()
    before = states()
    batches = with_progress(
        DataLoader(Augmented(), 5, shuffle=True), lambda *_: None, SingleProcess()
    )
    next(batches)
    assert states() == before  # between two batches, too
    list(batches)
    assert states() == before
    generators = Generators(1)
    with generators.in_use():
        disturb()
    assert states() == before


def test_seed_repeats_update_bn_and_evaluate(tmp_path):
    model = nn.Sequential(nn.BatchNorm1d(4), nn.Linear(4, 2))
    torch.save(model.state_dict(), tmp_path / "net.pt")
    statistics, figures = [], []
    for _ in range(3):
        disturb()
        update_bn(model, Augmented(), batch_size=5)
        statistics.append(model[0].running_mean.tolist())
        (result,) = evaluate([tmp_path / "net.pt"], model, Augmented(), batch_size=5)
        figures.append(result.metrics["nll"])
    assert statistics[0] == statistics[1] == statistics[2]
    assert figures[0] == figures[1] == figures[2]


def test_generators_restore_state_after_two_threads():
    """The second begins while the first is within, and would end after it."""
    disturb()
    before = states()
    second_in, first_out = threading.Event(), threading.Event()

    def second():
        with Generators(2).in_use():
            second_in.set()
            first_out.wait(60)
            disturb()

    thread = threading.Thread(target=second)
    with Generators(1).in_use():
        thread.start()
        second_in.wait(0.2)
        disturb()
    first_out.set()
    thread.join()
    assert states() == before


def test_generators_nest_in_one_thread():
    outer, inner = Generators(1), Generators(1)
    with outer.in_use():
        drawn = torch.rand(2)
        with inner.in_use():
            assert torch.equal(torch.rand(2), drawn)
        following = torch.rand(2)
    with Generators(1).in_use():
        assert torch.equal(torch.rand(4), torch.cat([drawn, following]))


def test_seeded_torch_ends_with_context():
    before = states()
    with seeded_torch(3):
        drawn = torch.rand(2)
    assert states() == before
    with seeded_torch(3):
        assert torch.equal(torch.rand(2), drawn)
