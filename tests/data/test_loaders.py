"""Which samples a pass gets, in which order, in which process."""

import itertools
import random
from collections import Counter
from fractions import Fraction

import numpy as np
import pytest
import torch
from fellows import Echo
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    TensorDataset,
)

from ckptavg.data.loaders import Subset, open_loader, require_reiterable, samples_in, shard_loader
from ckptavg.data.prefetch import prefetch_to_device, with_progress
from ckptavg.distributed.peers import SingleProcess
from ckptavg.errors import EvaluationError, UsageError
from ckptavg.models.runtime import Runtime

CPU = torch.device("cpu")


class Numbers(Dataset):
    def __init__(self, count=20):
        self.count = count

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        if index >= len(self):
            raise IndexError
        return torch.tensor(float(index))


class Labelled(Numbers):
    """Numbers that tell their classes."""

    def __init__(self, targets):
        super().__init__(len(targets))
        self.targets = targets


class Stream(IterableDataset):
    def __iter__(self):
        return iter(Numbers())


def order_of(loader):
    return torch.cat(list(loader)).tolist()


def test_open_loader_shuffles_training_data():
    order = order_of(open_loader(Numbers(), Runtime(CPU, batch_size=3), shuffle=True))
    assert sorted(order) == list(range(20)) != order


def test_open_loader_order_follows_seed():
    orders = []
    for seed in (0, 0, 1):
        torch.manual_seed(len(orders))
        orders.append(order_of(open_loader(Numbers(), Runtime(CPU, seed=seed), shuffle=True)))
    assert orders[0] == orders[1] != orders[2]


def test_open_loader_leaves_global_generator_alone():
    before = torch.get_rng_state()
    order_of(open_loader(Numbers(), Runtime(CPU), shuffle=True))
    assert torch.equal(torch.get_rng_state(), before)


def test_open_loader_keeps_evaluation_order():
    loader = open_loader(Numbers(), Runtime(CPU, batch_size=6), shuffle=False)
    assert order_of(loader) == list(range(20))
    assert [len(batch) for batch in loader] == [6, 6, 6, 2]


def test_open_loader_reads_stream_in_order():
    assert order_of(open_loader(Stream(), Runtime(CPU), shuffle=True)) == list(range(20))


class Pipeline:
    """A loader that is its own iterator and begins anew, as those on GPUs do."""

    def __iter__(self):
        self.given = 0
        return self

    def __next__(self):
        if self.given == 20:
            raise StopIteration
        self.given += 5
        return torch.arange(self.given - 5, self.loaded)[:, None]


@pytest.mark.parametrize("loader", [DataLoader(Numbers(), 4), [torch.ones(1, 2)], Pipeline()])
def test_open_loader_returns_loader_itself(loader):
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
def test_open_loader_notes_unshuffled_training_loader(caplog, loader, noted):
    caplog.set_level("INFO", "ckptavg")
    open_loader(loader, Runtime(CPU), shuffle=True)
    assert ("does not shuffle" in caplog.text) == noted


def test_open_loader_has_no_note_for_evaluation(caplog):
    caplog.set_level("INFO", "ckptavg")
    open_loader(batches_of_two(), Runtime(CPU), shuffle=False)
    assert not caplog.text


# Shared among processes


def batches_of(loader):
    return [batch.tolist() for batch in loader]


def flat(lists):
    return list(itertools.chain(*lists))


def interleaved(parts):
    """Batches in the order in which one process would have them."""
    longest = max(map(len, parts))
    return [part[i] for i in range(longest) for part in parts if i < len(part)]


COUNTS = st.integers(0, 40)


@settings(max_examples=60, deadline=None)
@given(COUNTS, st.integers(1, 12), st.integers(1, 6), st.booleans(), st.integers(0, 5))
def test_open_loader_divides_batches_among_processes(size, batch, count, shuffle, seed):
    runtime = Runtime(CPU, batch_size=batch, seed=seed)
    data = Numbers(size)
    whole = batches_of(open_loader(data, runtime, shuffle=shuffle))
    assert sorted(flat(whole)) == list(range(size))
    loaders = [
        open_loader(data, runtime, shuffle=shuffle, peers=Echo(rank, count))
        for rank in range(count)
    ]
    parts = [batches_of(loader) for loader in loaders]
    assert interleaved(parts) == whole
    assert [samples_in(loader) for loader in loaders] == [len(flat(part)) for part in parts]


@settings(max_examples=60, deadline=None)
@given(
    COUNTS, st.integers(1, 12), st.integers(1, 6), st.booleans(), st.booleans(),
    st.none() | st.integers(1, 50),
)  # fmt: skip
def test_shard_loader_divides_batches(size, batch, count, shuffle, drop_last, limit):
    data = Numbers(size)
    shuffle = shuffle and size > 0

    def parts(count):
        loaders = []
        for rank in range(count):
            torch.manual_seed(rank)  # which is of no account
            loader = DataLoader(data, batch, shuffle=shuffle, drop_last=drop_last)
            subset = None if limit is None else Subset(limit)
            loaders.append(shard_loader(loader, Echo(rank, count), seed=3, subset=subset))
        return loaders

    shared = parts(count)
    found = [batches_of(loader) for loader in shared]
    assert [samples_in(loader) for loader in shared] == [len(flat(part)) for part in found]
    seen = flat(interleaved(found))
    assert max(Counter(seen).values(), default=1) == 1
    kept = size - size % batch if drop_last else size
    assert len(seen) == (kept if limit is None else min(kept, -(-limit // batch) * batch))
    if not shuffle:
        assert seen == list(range(len(seen)))


@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize("kind", ["list", "stream", "subclass", "whole samples", "workers"])
def test_shard_loader_divides_every_kind_of_loader(kind, count):
    class Own(DataLoader):
        pass

    def loader():
        return {
            "list": lambda: list(torch.arange(20.0).split(3)),
            "stream": lambda: DataLoader(Stream(), 3),
            "subclass": lambda: Own(Numbers(), 3),
            "whole samples": lambda: DataLoader(Numbers(), batch_size=None),
            "workers": lambda: DataLoader(Numbers(), 3, num_workers=1),
        }[kind]()

    parts = [list(shard_loader(loader(), Echo(rank, count), seed=0)) for rank in range(count)]
    together = [batch.tolist() for batch in interleaved(parts)]
    assert together == [batch.tolist() for batch in loader()]


def test_shard_loader_reads_own_batches_only():
    class Watched(Numbers):
        def __getitem__(self, index):
            read.append(index)
            return super().__getitem__(index)

    read = []
    list(shard_loader(DataLoader(Watched(), 4), Echo(1, 2), seed=0))
    assert read == [*range(4, 8), *range(12, 16)]


def doubled(samples):
    return 2 * torch.stack(samples)


def test_shard_loader_keeps_sampler_and_collate_fn():
    sampler = SequentialSampler(range(10, 16))
    loader = DataLoader(Numbers(), 2, sampler=sampler, collate_fn=doubled)
    part = shard_loader(loader, Echo(1, 2), seed=0)
    assert batches_of(part) == [[4.0, 6.0]]
    assert part.collate_fn is doubled


@pytest.mark.parametrize("of", [torch.tensor, np.array, list], ids=["torch", "numpy", "list"])
def test_shard_loader_takes_indices_of_any_kind(of):
    drawn = [of([3, 1]), of([0, 7]), of([5])]
    loader = DataLoader(Numbers(), batch_sampler=drawn)
    assert batches_of(shard_loader(loader, Echo(0, 2), seed=0)) == [[3, 1], [5]]
    assert samples_in(loader) == 0  # it does not tell


def test_shard_loader_leaves_global_generator_alone():
    part = shard_loader(
        DataLoader(Numbers(), 4, shuffle=True, generator=torch.Generator()), Echo(0, 2), 0
    )
    before = torch.get_rng_state()
    list(part)
    assert torch.equal(torch.get_rng_state(), before)


class Unseeded(SequentialSampler):
    def __iter__(self):
        return iter(random.SystemRandom().sample(range(20), 20))


class Others(Echo):
    """Processes one of which has drawn otherwise."""

    def gather(self, value):
        return [*super().gather(value)[1:], "other"]


def test_shard_loader_refuses_samplers_that_differ():
    loader = DataLoader(Numbers(), 4, sampler=Unseeded(Numbers()))
    with pytest.raises(EvaluationError, match="draws different batches in each process"):
        list(shard_loader(loader, Others(0, 2), seed=0))


def distributed(count, rank, size=20, **how):
    sampler = DistributedSampler(Numbers(size), count, rank, shuffle=False, **how)
    return DataLoader(Numbers(size), 3, sampler=sampler)


def distributed_by_batches(count, rank, size=20, **how):
    sampler = distributed(count, rank, size, **how).sampler
    return DataLoader(Numbers(size), batch_sampler=BatchSampler(sampler, 3, drop_last=False))


DISTRIBUTED = pytest.mark.parametrize("made", [distributed, distributed_by_batches])


def opened(loader, peers, **how):
    return open_loader(loader, Runtime(CPU), shuffle=False, peers=peers, **how)


def shared(loader, peers, **how):
    return shard_loader(loader, peers, 0, **how)


ENTRANCES = pytest.mark.parametrize("enter", [opened, shared])


@DISTRIBUTED
@ENTRANCES
def test_distributed_sampler_keeps_even_division(made, enter):
    parts = [order_of(enter(made(4, rank), Echo(rank, 4))) for rank in range(4)]
    assert sorted(flat(parts)) == list(range(20))


@DISTRIBUTED
@ENTRANCES
@pytest.mark.parametrize(("drop_last", "what"), [(True, "drops"), (False, "repeats")])
def test_distributed_sampler_may_not_pad_or_drop(made, enter, drop_last, what):
    with pytest.raises(EvaluationError, match=f"DistributedSampler {what} samples"):
        enter(made(3, 0, drop_last=drop_last), Echo(0, 3))


@DISTRIBUTED
@ENTRANCES
@pytest.mark.parametrize(
    ("count", "rank", "message"),
    [(4, 0, "is for 4 processes, but 2 share"), (2, 0, "gives the part of process 0 in another")],
)
def test_distributed_sampler_must_match_processes(made, enter, count, rank, message):
    with pytest.raises(EvaluationError, match=message):
        enter(made(count, rank), Echo(1, 2))


@ENTRANCES
def test_subset_of_distributed_loader_is_divided(enter):
    parts = [
        order_of(enter(distributed(2, rank), Echo(rank, 2), subset=Subset(12))) for rank in (0, 1)
    ]
    assert [len(part) for part in parts] == [6, 6]


def test_subset_without_share_reads_nothing():
    parts = [
        batches_of(opened(distributed(4, rank), Echo(rank, 4), subset=Subset(2)))
        for rank in range(4)
    ]
    assert [len(part) for part in parts] == [0, 1, 0, 1]


# Part of the data


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 40), st.integers(1, 50), st.integers(1, 7), st.integers(1, 4))
def test_subset_is_drawn_once_for_all_processes(size, count, batch, processes):
    runtime = Runtime(CPU, batch_size=batch, seed=1)

    def part(rank, processes):
        peers = Echo(rank, processes)
        subset = Subset(count)
        return batches_of(
            open_loader(Numbers(size), runtime, shuffle=True, subset=subset, peers=peers)
        )

    whole = part(0, 1)
    drawn = flat(whole)
    assert len(drawn) == len(set(drawn)) == min(size, count)
    assert interleaved([part(rank, processes) for rank in range(processes)]) == whole


def test_subset_draws_every_sample_equally_often():
    drawn = Counter()
    for seed in range(300):
        drawn.update(
            order_of(
                open_loader(Numbers(10), Runtime(CPU, seed=seed), shuffle=True, subset=Subset(5))
            )
        )
    assert set(drawn) == set(range(10))
    assert all(100 < count < 200 for count in drawn.values())


def shares_by_hand(sizes, count):
    """Largest remainder in exact fractions: of equal remainders, the lower class comes first."""
    total = sum(sizes.values())
    exact = {label: Fraction(size * count, total) for label, size in sizes.items()}
    shares = {label: int(share) for label, share in exact.items()}
    by_rest = sorted(exact, key=lambda label: (shares[label] - exact[label], label))
    for label in by_rest[: count - sum(shares.values())]:
        shares[label] += 1
    return shares


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(-2, 6), min_size=2, max_size=60), st.data())
def test_stratified_subset_has_exact_class_shares(targets, data):
    count = data.draw(st.integers(1, len(targets) - 1))
    subset = Subset(count, stratified=True)
    loader = open_loader(Labelled(targets), Runtime(CPU), shuffle=True, subset=subset)
    drawn = [int(index) for index in order_of(loader)]
    assert len(set(drawn)) == len(drawn) == count
    found = Counter(targets[index] for index in drawn)
    expected = shares_by_hand(Counter(targets), count)
    assert found == {label: share for label, share in expected.items() if share}


@pytest.mark.parametrize("kind", [list, tuple, np.array, torch.tensor])
def test_stratified_subset_takes_targets_of_any_kind(kind):
    data = Labelled(kind([0] * 30 + [1] * 10))
    order = order_of(
        open_loader(data, Runtime(CPU), shuffle=True, subset=Subset(8, stratified=True))
    )
    assert sum(index >= 30 for index in order) == 2


def test_stratified_subset_is_shuffled():
    targets = [0] * 50 + [1] * 50
    subset = Subset(40, stratified=True)
    loader = open_loader(Labelled(targets), Runtime(CPU), shuffle=True, subset=subset)
    classes = [targets[int(index)] for index in order_of(loader)]
    assert classes != sorted(classes)


@pytest.mark.parametrize(
    "targets", [None, [0, 1], [[0, 1]] * 20, ["cat"] * 20], ids=["none", "few", "pairs", "names"]
)
def test_stratified_subset_needs_class_per_sample(targets):
    data = Numbers()
    if targets is not None:
        data.targets = targets
    with pytest.raises(UsageError, match=r"needs data with `targets`.*without classes"):
        open_loader(data, Runtime(CPU), shuffle=True, subset=Subset(5, stratified=True))


@pytest.mark.parametrize("enter", [opened, shared])
def test_stratified_subset_refuses_loader(enter):
    with pytest.raises(UsageError, match="drawn from a Dataset with targets"):
        enter(batches_of_two(), SingleProcess(), subset=Subset(5, stratified=True))


@pytest.mark.parametrize("count", [20, 21, 1000])
@pytest.mark.parametrize("stratified", [False, True])
def test_subset_beyond_data_takes_all(caplog, count, stratified):
    caplog.set_level("INFO", "ckptavg")
    subset = Subset(count, stratified)
    order = order_of(open_loader(Numbers(), Runtime(CPU), shuffle=True, subset=subset))
    assert sorted(order) == list(range(20)) != order
    assert f"{count} samples are asked for and the data has 20: all are taken" in caplog.text


@pytest.mark.parametrize("count", [0, -1])
def test_subset_refuses_zero_samples(count):
    with pytest.raises(UsageError, match=f"a sample or more but has {count}"):
        Subset(count)


@pytest.mark.parametrize(("limit", "batches"), [(1, 1), (6, 2), (7, 3), (100, 7)])
def test_subset_of_loader_is_its_first_batches(limit, batches):
    loader = [(x, None) for x in torch.arange(20.0)[:, None].split(3)]
    found = list(open_loader(loader, Runtime(CPU), shuffle=True, subset=Subset(limit)))
    assert [x.tolist() for x, _ in found] == [x.tolist() for x, _ in loader[:batches]]


def test_open_loader_refuses_data_without_length():
    class Endless(Dataset):
        def __getitem__(self, index):
            return torch.tensor(0.0)

    with pytest.raises(UsageError, match=r"Endless, has no length.*IterableDataset"):
        open_loader(Endless(), Runtime(CPU), shuffle=False)


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_open_loader_reads_stream_once_with_workers(workers):
    loader = open_loader(Stream(), Runtime(CPU, batch_size=6, workers=workers), shuffle=False)
    assert order_of(loader) == list(range(20))


# Counting


@pytest.mark.parametrize(
    ("loader", "samples"),
    [
        (DataLoader(Numbers(), 3), 20),
        (DataLoader(Numbers(), 3, drop_last=True), 18),
        (DataLoader(Numbers(), 3, sampler=SequentialSampler(range(7))), 7),
        (own_batch_sampler(), 0),
        (DataLoader(Stream(), 3), 0),
        (DataLoader(Numbers(), batch_size=None), 0),
        ([torch.ones(2)], 0),
        (iter(()), 0),
    ],
    ids=["plain", "drop_last", "sampler", "batch sampler", "stream", "single", "list", "iterator"],
)
def test_samples_in_counts_loader_where_known(loader, samples):
    assert samples_in(loader) == samples


def test_with_progress_reports_and_checks_each_batch():
    told, looks = [], []

    class Looking(SingleProcess):
        def check(self):
            looks.append(len(told))

    batches = with_progress(DataLoader(Numbers(), 8), lambda *at: told.append(at), Looking())
    next(batches)
    assert (told, looks) == ([], [0])
    list(batches)
    assert told == [(8, 20), (16, 20), (20, 20)]
    assert looks == [0, 1, 2]


def test_prefetch_to_device_keeps_batch_on_host():
    x, y = torch.ones(2, 3), torch.tensor([0, 1])
    (batch,) = prefetch_to_device([(x, y, "name")], CPU)
    assert batch.loaded[0] is batch.on_device[0] is x
    assert batch.on_device[1:] == (y, "name")


def broken():
    yield torch.ones(2)
    raise OSError("the disk is gone")


def test_prefetch_to_device_passes_loader_error_on():
    batches = prefetch_to_device(with_progress(broken(), lambda *_: None, SingleProcess()), CPU)
    assert next(batches).on_device.tolist() == [1, 1]
    with pytest.raises(OSError, match="the disk is gone"):
        next(batches)


@pytest.mark.parametrize("loader", [[], iter(()), DataLoader(TensorDataset(torch.ones(0, 2)), 2)])
def test_prefetch_to_device_of_empty_loader_is_empty(loader):
    assert (
        list(prefetch_to_device(with_progress(loader, lambda *_: None, SingleProcess()), CPU)) == []
    )


def test_require_reiterable_refuses_second_read():
    batches = require_reiterable(iter([1, 2, 3]), passes=1)
    assert list(batches) == [1, 2, 3]
    with pytest.raises(EvaluationError, match=r"read only once.*DataLoader"):
        list(batches)
    with pytest.raises(EvaluationError, match="read only once"):
        require_reiterable(iter([1]), passes=2)


def test_require_reiterable_keeps_loader():
    loader = DataLoader(Numbers(), 2)
    assert require_reiterable(loader, passes=2) is loader


def test_require_reiterable_reads_iterator_subset_once():
    part = open_loader(
        iter(torch.arange(20).split(4)), Runtime(CPU), shuffle=True, subset=Subset(8)
    )
    with pytest.raises(EvaluationError, match="read only once"):
        require_reiterable(part, passes=2)
    batches = require_reiterable(part, passes=1)
    assert torch.cat(list(batches)).tolist() == [*range(8)]
    with pytest.raises(EvaluationError, match="read only once"):
        list(batches)
