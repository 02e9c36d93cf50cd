"""Blocks of any view, read as torch would index it."""

from __future__ import annotations

import contextlib
import itertools
import math
from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ckptavg.errors import CheckpointError
from ckptavg.formats import reader as reading
from ckptavg.formats.checkpoint import DTYPES, Piece, Tensor, contiguous_tensor, row_major
from ckptavg.formats.reader import Reader, box_of, boxes

DTYPE_NAMES = ["float32", "float64", "bfloat16", "int8", "complex64"]
shapes = st.lists(st.integers(1, 5), max_size=4).map(tuple)


def read(tensor: Tensor, start: int, count: int, spare: int = 0) -> bytes:
    out = bytearray((count + spare) * tensor.dtype.size)
    with contextlib.closing(Reader()) as reader:
        reader.read(tensor, start, count, memoryview(out))
    assert not any(out[count * tensor.dtype.size :])
    return bytes(out[: count * tensor.dtype.size])


def as_bytes(tensor: torch.Tensor) -> bytes:
    flat = torch.empty(tensor.numel(), dtype=tensor.dtype)
    flat.view(tensor.shape).copy_(tensor)
    return flat.view(torch.uint8).numpy().tobytes()


def stored(path, storage: torch.Tensor, offset: int = 0) -> str:
    path.write_bytes(bytes(offset) + as_bytes(storage))
    return str(path)


@st.composite
def views(draw):
    """A tensor's storage, and a view of it got by slicing, transposing, expanding and windowing."""
    dtype = getattr(torch, draw(st.sampled_from(DTYPE_NAMES)))
    numel = draw(st.integers(1, 200))
    storage = torch.randn(numel, dtype=torch.float64).mul(50).to(dtype)
    view = storage[draw(st.integers(0, numel - 1)) :]
    for _ in range(draw(st.integers(0, 5))):
        way = draw(st.sampled_from(["split", "permute", "slice", "expand", "unfold", "select"]))
        axis = draw(st.integers(0, max(0, view.dim() - 1)))
        extent = view.shape[axis] if view.dim() else 0
        if way == "permute":
            view = view.permute(draw(st.permutations(range(view.dim()))))
        elif way == "expand" and view.dim() < 5:
            view = view.unsqueeze(axis)
            view = view.expand(*(draw(st.integers(1, 3)) if n == 1 else n for n in view.shape))
        elif way == "select" and extent:
            view = view.select(axis, draw(st.integers(0, extent - 1)))
        elif way == "unfold" and extent and view.dim() < 5:
            view = view.unfold(axis, draw(st.integers(1, extent)), draw(st.integers(1, 3)))
        elif way == "slice" and extent:
            low = draw(st.integers(0, extent - 1))
            high, step = draw(st.integers(low, extent)), draw(st.integers(1, 3))
            view = view[(slice(None),) * axis + (slice(low, high, step),)]
        elif way == "split" and extent and view.dim() < 5:
            size = draw(st.sampled_from([n for n in range(1, extent + 1) if extent % n == 0]))
            view = view.unflatten(axis, (extent // size, size))
    return storage, view


@settings(max_examples=150, deadline=None)
@given(views(), st.integers(1, 300), st.integers(0, 9), st.sampled_from([0, 8, 64, 1 << 16]))
def test_reader_reads_blocks_of_views_as_torch(
    tmp_path_factory, storage_and_view, limit, skipped, span
):
    storage, view = storage_and_view
    path = stored(tmp_path_factory.getbasetemp() / "storage", storage, skipped)
    dtype = DTYPES[str(view.dtype).removeprefix("torch.")]
    shape = tuple(view.shape)
    at = skipped + view.storage_offset() * dtype.size
    tensor = Tensor(dtype, shape, (Piece(path, at, shape, view.stride(), (0,) * view.dim()),))
    assert tensor.contiguous == view.is_contiguous()
    with mock.patch.object(reading, "_SMALL_SPAN", span):  # 0 reads run by run, 64 KiB in one go
        blocks = [
            read(tensor, start, count, spare=3)
            for start, count in boxes(shape, 0, math.prod(shape), limit)
        ]
    assert b"".join(blocks) == as_bytes(view)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_reader_joins_pieces(tmp_path_factory, data):
    shape = data.draw(st.lists(st.integers(1, 6), min_size=1, max_size=3))
    value = torch.randn(shape)
    cuts = [sorted({0, n, data.draw(st.integers(0, n))}) for n in shape]
    pieces = []
    for number, corner in enumerate(itertools.product(*(itertools.pairwise(c) for c in cuts))):
        part = value[tuple(slice(a, b) for a, b in corner)].contiguous()
        path = stored(tmp_path_factory.getbasetemp() / f"piece{number}", part, number)
        extent = tuple(part.shape)
        pieces.append(Piece(path, number, extent, row_major(extent), tuple(a for a, _ in corner)))
    tensor = Tensor(DTYPES["float32"], tuple(shape), tuple(pieces))
    limit = data.draw(st.integers(1, value.numel()))
    blocks = [
        read(tensor, start, count) for start, count in boxes(tensor.shape, 0, tensor.numel, limit)
    ]
    assert b"".join(blocks) == as_bytes(value)


def test_reader_reads_any_range_of_contiguous_tensor(tmp_path):
    value = torch.randn(4, 5)
    tensor = contiguous_tensor(stored(tmp_path / "x", value, 3), 3, DTYPES["float32"], (4, 5))
    for start, end in itertools.combinations(range(21), 2):
        assert read(tensor, start, end - start) == as_bytes(value.view(-1)[start:end])


@settings(max_examples=200, deadline=None)
@given(shapes, st.integers(1, 700), st.data())
def test_boxes_cover_each_element_once_in_order(shape, limit, data):
    covered = []
    total = math.prod(shape)
    index = np.arange(total).reshape(shape)
    begin = data.draw(st.integers(0, total))
    end = data.draw(st.integers(begin, total))
    for start, count in boxes(shape, begin, end, limit):
        assert 0 < count <= limit
        low, extent = box_of(shape, start, count)
        box = index[tuple(slice(a, a + n) for a, n in zip(low, extent, strict=True))]
        assert box.ravel().tolist() == list(range(start, start + count))
        covered += range(start, start + count)
    assert covered == list(range(begin, end))


@pytest.mark.parametrize(
    ("shape", "limit", "count"),
    [((7, 8), 56, 1), ((7, 8), 55, 2), ((7, 8), 16, 4), ((7, 8), 15, 7), ((7, 8), 5, 14)],
)
def test_boxes_are_as_large_as_limit_allows(shape, limit, count):
    assert len(list(boxes(shape, 0, math.prod(shape), limit))) == count


@pytest.mark.parametrize("shape", [(0,), (3, 0, 2), (0, 0)])
def test_boxes_of_empty_tensor_is_empty(shape):
    assert list(boxes(shape, 0, 0, 10)) == []


def test_boxes_of_scalar_is_single_box():
    assert list(boxes((), 0, 1, 10)) == [(0, 1)]
    assert box_of((), 0, 1) == ((), ())


@pytest.fixture
def written(tmp_path):
    path = tmp_path / "weights"
    return path, contiguous_tensor(stored(path, torch.arange(10.0)), 0, DTYPES["float32"], (10,))


def test_reader_names_shortened_file(written):
    path, tensor = written
    path.write_bytes(path.read_bytes()[:-1])
    assert len(read(tensor, 0, 9)) == 36
    with pytest.raises(CheckpointError, match=str(path)):
        read(tensor, 0, 10)


def test_reader_names_missing_file(written):
    path, tensor = written
    path.unlink()
    with pytest.raises(CheckpointError, match=str(path)):
        read(tensor, 0, 1)


def test_reader_keeps_few_files_open_and_closes_them(tmp_path):
    tensors = [
        contiguous_tensor(
            stored(tmp_path / str(i), torch.tensor([float(i)])), 0, DTYPES["float32"], (1,)
        )
        for i in range(9)
    ]
    with mock.patch.object(reading, "_MOST_OPEN_FILES", 4):
        reader = Reader()
        for tensor in tensors * 2:
            out = bytearray(4)
            reader.read(tensor, 0, 1, memoryview(out))
            assert np.frombuffer(out, np.float32)[0] == int(tensor.pieces[0].file.split("/")[-1])
            assert len(reader._files) <= 4
    files = list(reader._files.values())
    reader.close()
    assert all(file.closed for file in files)


def test_reader_continues_short_reads(written, monkeypatch):
    _, tensor = written
    whole_read = reading._read_at
    monkeypatch.setattr(reading, "_read_at", lambda f, out, at: whole_read(f, out[:7], at))
    assert read(tensor, 0, 10) == as_bytes(torch.arange(10.0))


def test_reader_skips_gaps_of_sparse_view(tmp_path, monkeypatch):
    storage = torch.arange(1_000_000, dtype=torch.float32)
    path = stored(tmp_path / "large", storage)
    view = storage.view(1000, 1000)[:, 7:9]
    tensor = Tensor(DTYPES["float32"], (1000, 2), (Piece(path, 28, (1000, 2), (1000, 1), (0, 0)),))
    asked = []
    plain = Reader._read_bytes
    monkeypatch.setattr(
        Reader, "_read_bytes", lambda s, p, at, out: asked.append(len(out)) or plain(s, p, at, out)
    )
    assert read(tensor, 0, 2000) == as_bytes(view)
    assert sum(asked) < storage.nbytes / 10


@given(shape=st.lists(st.integers(1, 6), min_size=1, max_size=3).map(tuple), data=st.data())
@settings(deadline=None)
def test_reader_fills_uncovered_elements_with_zero(tmp_path_factory, shape, data):
    """Boxes of a tensor that lies in a larger one, in whatever block it is read."""
    low = tuple(data.draw(st.integers(0, n - 1)) for n in shape)
    inner = tuple(data.draw(st.integers(1, n - a)) for n, a in zip(shape, low, strict=True))
    values = torch.arange(1, math.prod(inner) + 1, dtype=torch.float32).view(inner)
    path = stored(tmp_path_factory.getbasetemp() / "inner.bin", values)
    piece = Piece(path, 0, inner, row_major(inner), low)
    tensor = Tensor(DTYPES["float32"], shape, (piece,))
    expected = torch.zeros(shape)
    expected[tuple(slice(a, a + n) for a, n in zip(low, inner, strict=True))] = values
    got = b""
    for start, count in boxes(shape, 0, math.prod(shape), data.draw(st.integers(1, 20))):
        out = bytearray(b"\xff" * count * 4)  # as a buffer that is used again
        with contextlib.closing(Reader()) as reader:
            reader.read(tensor, start, count, memoryview(out))
        got += out
    assert got == as_bytes(expected)
    assert tensor.stored_bytes == 4 * values.numel()
