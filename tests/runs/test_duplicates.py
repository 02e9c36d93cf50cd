"""Checkpoints with the same weights are found, whatever their files are."""

from __future__ import annotations

import itertools
from collections import Counter

import pytest
import torch
from safetensors.torch import save_file

from ckptavg.formats import open_checkpoint
from ckptavg.runs import duplicates
from ckptavg.runs.duplicates import Contents, SameWeights

LONG = 20_000  # elements, so that a difference can lie behind what is looked at first


def state(change: int | None = None) -> dict[str, torch.Tensor]:
    """A state dict; with one element of the second tensor changed, if asked for."""
    torch.manual_seed(0)
    made = {
        "a": torch.rand(3, 4),
        "b": torch.rand(LONG),
        "scalar": torch.tensor(1.5),
        "empty": torch.empty(0, 3),
        "row": torch.rand(1, 5).as_strided((1, 5), (7, 1)),
        "count": torch.tensor([3, 4]),
    }
    if change is not None:
        made["b"][change] += 1
    return made


def zipped(path, values):
    torch.save(values, path)


def beside_others(path, values):
    torch.save({"optimizer": torch.rand(7), "epoch": 3, "model": values}, path)


def legacy(path, values):
    torch.save(values, path, _use_new_zipfile_serialization=False)


def without_checksums(path, values):
    before = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        torch.save(values, path)
    finally:
        torch.serialization.set_crc32_options(before)


def flat_buffer(path, values):
    """The floats as views of one storage, behind one another."""
    floats = {n: v for n, v in values.items() if v.is_floating_point()}
    flat = torch.cat([v.flatten() for v in floats.values()])
    parts = flat.split([v.numel() for v in floats.values()])
    views = {n: p.view(v.shape) for (n, v), p in zip(floats.items(), parts, strict=True)}
    torch.save({n: views.get(n, v) for n, v in values.items()}, path)


def safetensors(path, values):
    save_file({name: value.contiguous() for name, value in values.items()}, path)


WRITERS = [zipped, beside_others, legacy, without_checksums, flat_buffer, safetensors]
PAIRS = list(itertools.product(WRITERS, repeat=2))


@pytest.fixture
def compared(tmp_path):
    def compare(write_one, one, write_other, other) -> bool:
        paths = []
        for name, write, values in (("one", write_one, one), ("other", write_other, other)):
            suffix = ".safetensors" if write is safetensors else ".pt"
            paths.append(tmp_path / (name + suffix))
            write(paths[-1], values)
        first, second = map(open_checkpoint, paths)
        among = SameWeights(Contents())
        among.add(first)
        return among.find(second) is first

    return compare


@pytest.mark.parametrize(("one", "other"), PAIRS, ids=lambda w: w.__name__)
def test_same_weights_match_across_file_kinds(compared, one, other):
    assert compared(one, state(), other, state())


@pytest.mark.parametrize("change", [0, LONG // 2, LONG - 1])
@pytest.mark.parametrize(("one", "other"), PAIRS, ids=lambda w: w.__name__)
def test_same_weights_detects_one_changed_element(compared, one, other, change):
    assert not compared(one, state(), other, state(change))


def test_same_weights_compares_blocks_to_their_ends(compared, monkeypatch):
    monkeypatch.setattr(duplicates, "_BLOCK", 1000)
    assert compared(safetensors, state(), safetensors, state())
    assert not compared(safetensors, state(), safetensors, state(LONG - 1))


OTHERS = {
    "a name more": state() | {"more": torch.zeros(1)},
    "a name less": {n: v for n, v in state().items() if n != "count"},
    "another shape": state() | {"a": state()["a"].view(4, 3)},
    "another type of the same bytes": state() | {"count": state()["count"].view(torch.float64)},
    "another order in memory": state() | {"a": state()["a"].t().contiguous().t()},
}


@pytest.mark.parametrize("values", OTHERS.values(), ids=OTHERS)
def test_same_weights_detects_other_names_and_layouts(compared, values):
    assert not compared(zipped, state(), zipped, values)


def test_same_weights_compares_tied_names(compared):
    tied = state()
    tied["tied"] = tied["b"]
    assert compared(zipped, tied, zipped, state() | {"tied": state()["b"]})
    assert not compared(zipped, tied, zipped, state() | {"tied": state()["b"] + 1})


def test_same_weights_compares_strided_views(compared):
    base = torch.rand(40, 40)
    one, same, other = ({"a": x[3:17:2, 5:]} for x in (base, base.clone(), base + 1))
    assert compared(without_checksums, one, without_checksums, same)
    assert not compared(without_checksums, one, without_checksums, other)


@pytest.mark.parametrize("change", [None, 0, LONG - 1])
def test_same_weights_reads_no_tensor_with_checksums(compared, monkeypatch, change):
    def refuse(*_):
        raise AssertionError("a tensor is read")

    monkeypatch.setattr(duplicates, "_blocks", refuse)
    assert compared(zipped, state(), beside_others, state(change)) == (change is None)


def counted_bytes(monkeypatch) -> Counter[str]:
    """Bytes that are read of each file from now on."""
    read: Counter[str] = Counter()
    blocks = duplicates._blocks

    def count(span, limit):
        for block in blocks(span, limit):
            read[span.file] += len(block)
            yield block

    monkeypatch.setattr(duplicates, "_blocks", count)
    return read


@pytest.mark.parametrize("write", [without_checksums, safetensors, flat_buffer])
def test_same_weights_reads_no_byte_twice(tmp_path, monkeypatch, write):
    paths = [
        tmp_path / f"{i}{'.safetensors' if write is safetensors else '.pt'}" for i in range(30)
    ]
    for i, path in enumerate(paths):
        write(path, state(LONG - 1 - i % 15))  # each twice, and all the same in front
    read = counted_bytes(monkeypatch)
    among, repeats = SameWeights(Contents()), 0
    for checkpoint in map(open_checkpoint, paths):
        repeats += among.find(checkpoint) is not None
        among.add(checkpoint)
    assert repeats == 15
    heads_and_all = sum(t.nbytes + min(t.nbytes, duplicates._HEAD) for t in state().values())
    assert max(read.values()) <= heads_and_all


def test_same_weights_stops_at_first_difference(tmp_path, monkeypatch):
    read = counted_bytes(monkeypatch)
    among = SameWeights(Contents())
    for i in range(20):
        safetensors(tmp_path / f"{i}.safetensors", state() | {"a": torch.full((3, 4), float(i))})
        checkpoint = open_checkpoint(tmp_path / f"{i}.safetensors")
        assert among.find(checkpoint) is None
        among.add(checkpoint)
    assert max(read.values()) == 3 * 4 * 4  # the tensor of the first name


def test_same_weights_finds_first_match(tmp_path):
    among = SameWeights(Contents())
    opened = []
    for name in ("x", "y", "z"):
        safetensors(tmp_path / name, state(0 if name == "x" else 1))
        opened.append(open_checkpoint(tmp_path / name))
        among.add(opened[-1])
    zipped(tmp_path / "last.pt", state(1))
    assert among.find(open_checkpoint(tmp_path / "last.pt")) is opened[1]
