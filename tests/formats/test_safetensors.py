"""Headers read and written as the reference implementation reads and writes them."""

from __future__ import annotations

import copy
import json
import struct

import pytest
import safetensors
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from ckptavg.errors import CheckpointError, UnsupportedTensorError
from ckptavg.formats import open_checkpoint
from ckptavg.formats.checkpoint import DTYPES
from ckptavg.formats.safetensors.header import BY_CODE, MAX_HEADER, build_header, read_header

TORCH_NAMES = sorted(d.name for d in BY_CODE.values() if hasattr(torch, d.name))


def encode(header, data: bytes = b"", length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def entry(dtype="F32", shape=(2,), offsets=(0, 8)) -> dict:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


def random_bytes(dtype: str, *shape: int) -> torch.Tensor:
    kind = getattr(torch, dtype)
    if kind == torch.bool:
        return torch.rand(shape) < 0.5
    size = torch.empty((), dtype=kind).element_size()
    raw = torch.randint(0, 256, (*shape, size), dtype=torch.uint8)
    return raw.view(-1).view(kind).view(shape)


def accepted_by_the_reference(content: bytes) -> bool:
    try:
        safetensors.deserialize(content)
    except Exception:
        return False
    return True


def test_safetensors_table_equals_reference(tmp_path):
    path = tmp_path / "all.safetensors"
    tensors = {f"{name}.{n}": random_bytes(name, n, 3) for name in TORCH_NAMES for n in (0, 5)}
    tensors |= {"0-d": torch.tensor(2.5), "1-d": torch.rand(7), "vide é \U0001f600": torch.rand(1)}
    save_file(tensors, path, {"format": "pt", "note": "é"})
    content = path.read_bytes()
    table, metadata = read_header(str(path), len(content))
    assert metadata == {"format": "pt", "note": "é"}
    with safetensors.safe_open(path, "pt") as reference:
        assert set(table) == set(reference.keys())
        for name, found in table.items():
            lies = reference.get_slice(name)
            assert (found.dtype.code, list(found.shape)) == (lies.get_dtype(), lies.get_shape())
            at = found.pieces[0].offset
            assert found.contiguous
            raw = reference.get_tensor(name).contiguous().view(-1).view(torch.uint8)
            assert content[at : at + found.nbytes] == raw.numpy().tobytes()


def test_safetensors_dtypes_are_accepted_by_reference():
    for code, dtype in BY_CODE.items():
        eight = dtype.nbytes(8)
        assert accepted_by_the_reference(encode({"x": entry(code, (8,), (0, eight))}, bytes(eight)))


def test_safetensors_tensors_are_in_byte_order(tmp_path):
    header = {"b": entry(offsets=(8, 16)), "a": entry(), "empty": entry("F32", (0,), (8, 8))}
    path = tmp_path / "x.safetensors"
    path.write_bytes(encode(header, bytes(16)))
    opened = open_checkpoint(path)
    assert list(opened.tensors) == ["a", "empty", "b"]
    assert (opened.layout, opened.key, opened.nbytes) == ("safetensors", "", 16)


def test_safetensors_is_recognized_without_suffix(tmp_path):
    save_file({"a": torch.rand(2)}, tmp_path / "weights")
    assert open_checkpoint(tmp_path / "weights").layout == "safetensors"


ENTRY = json.dumps(entry()).encode()
PAIR = {"a": entry(), "b": entry(offsets=(8, 16))}
DAMAGED = {
    "an empty file": b"",
    "less than a length": b"\x08\0\0",
    "a length past the end": encode(PAIR, bytes(16), length=10_000),
    "a length past the end by one": encode({}, length=3),
    "a huge length": encode(PAIR, bytes(16), length=2**64 - 1),
    "no JSON": encode(b"{'a': 1}"),
    "JSON cut short": encode(b'{"a": {"dtype": "F32", "sha'),
    "not UTF-8": encode(b'{"\xff": 1}'),
    "half a surrogate pair": encode(b'{"\\ud800": %s}' % ENTRY, bytes(8)),
    "not an object": encode([PAIR]),
    "an empty header": encode(b""),
    "metadata twice": encode(b'{"__metadata__": {}, "__metadata__": {}}'),
    "deep JSON": encode(b'{"a": ' + b"[" * 200_000),
    "deep JSON, closed": encode(b'{"a": ' + b"[" * 200_000 + b"]" * 200_000 + b"}"),
    "metadata that is a list": encode({"__metadata__": []}),
    "metadata with numbers": encode({"__metadata__": {"a": 1}}),
    "overlap": encode({"a": entry(), "b": entry(offsets=(4, 12))}, bytes(12)),
    "the same bytes twice": encode({"a": entry(), "b": entry()}, bytes(8)),
    "a hole": encode({"a": entry(), "b": entry(offsets=(12, 20))}, bytes(20)),
    "a hole in front": encode({"a": entry(offsets=(4, 12))}, bytes(12)),
    "bytes left over": encode(PAIR, bytes(17)),
    "bytes missing": encode(PAIR, bytes(15)),
    "offsets past the end": encode({"a": entry(shape=(2**40,), offsets=(0, 2**42))}, bytes(8)),
    "offsets backwards": encode({"a": entry(offsets=(8, 0))}, bytes(8)),
    "offsets backwards and no elements": encode({"a": entry(shape=(0,), offsets=(8, 0))}, bytes(8)),
    "negative offsets": encode({"a": entry(offsets=(-8, 0))}, bytes(8)),
    "fractional offsets": encode({"a": entry(offsets=(0.0, 8.0))}, bytes(8)),
    "one offset": encode({"a": entry(offsets=(8,))}, bytes(8)),
    "three offsets": encode({"a": entry(offsets=(0, 8, 16))}, bytes(8)),
    "a size that is not the shape's": encode({"a": entry(shape=(3,))}, bytes(8)),
    "a size that is not the dtype's": encode({"a": entry("F64")}, bytes(8)),
    "an unknown dtype": encode({"a": entry("F128", (1,), (0, 16))}, bytes(16)),
    "a dtype in small letters": encode({"a": entry("f32")}, bytes(8)),
    "a dtype that is a number": encode({"a": entry(32)}, bytes(8)),
    "a dtype that is a list": encode({"a": entry(["F32"])}, bytes(8)),
    "a negative extent": encode({"a": entry(shape=(-1, -2))}, bytes(8)),
    "a huge extent": encode({"a": entry(shape=(2**64, 2))}, bytes(8)),
    "extents that overflow": encode({"a": entry(shape=(2**62, 4))}, bytes(8)),
    "extents that overflow to a fit": encode({"a": entry(shape=(2**63 + 1, 2))}, bytes(8)),
    "a fractional extent": encode({"a": entry(shape=(2.0,))}, bytes(8)),
    "a boolean extent": encode({"a": entry(shape=(True, 2))}, bytes(8)),
    "an infinite extent": encode(b'{"a": {"dtype":"F32","shape":[Infinity],"data_offsets":[0,8]}}'),
    "a number of many digits": encode(b'{"a": {"dtype":"F32","shape":[' + b"9" * 9999 + b"]}}"),
    "a shape that is a string": encode({"a": entry() | {"shape": "2"}}, bytes(8)),
    "no shape": encode({"a": {"dtype": "F32", "data_offsets": [0, 8]}}, bytes(8)),
    "no offsets": encode({"a": {"dtype": "F32", "shape": [2]}}, bytes(8)),
    "an entry that is a list": encode({"a": [1]}),
    "an entry that is null": encode({"a": None}),
}  # fmt: skip


@pytest.mark.parametrize("content", DAMAGED.values(), ids=DAMAGED)
def test_safetensors_refuses_damaged_file(content, tmp_path, refusal):
    assert not accepted_by_the_reference(content), "the reference reads it"
    path = tmp_path / "x.safetensors"
    path.write_bytes(content)
    text = refusal(path)
    assert str(path) in text
    assert len(text) < 1000


def test_safetensors_refuses_duplicate_name(tmp_path, refusal):
    content = encode(b'{"a": %s, "a": %s}' % (ENTRY, ENTRY), bytes(8))
    assert accepted_by_the_reference(content)
    path = tmp_path / "x.safetensors"
    path.write_bytes(content)
    assert "twice" in refusal(path)


def test_safetensors_refuses_file_without_tensors(tmp_path, refusal):
    path = tmp_path / "x.safetensors"
    save_file({}, path)
    assert "no tensors" in refusal(path)


def test_safetensors_refuses_header_over_limit(tmp_path, refusal):
    path = tmp_path / "sparse.safetensors"
    with path.open("wb") as file:
        file.write(struct.pack("<Q", MAX_HEADER + 1) + b"{")
        file.truncate(MAX_HEADER + 100)
    assert str(MAX_HEADER + 1) in refusal(path)


def test_safetensors_refuses_every_truncation(tmp_path, refusal):
    whole, path = tmp_path / "x.safetensors", tmp_path / "cut.safetensors"
    save_file({"a": torch.rand(3, 4), "b": torch.rand(5)}, whole, {"k": "v"})
    content = whole.read_bytes()
    for length in range(len(content)):
        path.write_bytes(content[:length])
        refusal(path)


def test_safetensors_message_shortens_names(tmp_path, refusal):
    path = tmp_path / "x.safetensors"
    path.write_bytes(encode({"n" * 1_000_000: entry("F128")}, bytes(8)))
    assert len(refusal(path)) < 10_000


numbers = st.sampled_from([0, 1, 2, 3, 4, 8, 12, 16, 24, -1, 2**31, 2**63, 2**64, 1.0, "2", None])
mutations = st.tuples(
    st.sampled_from(["a", "b", "c", "__metadata__"]),
    st.sampled_from(["dtype", "shape", "data_offsets", "more"]),
    st.one_of(
        st.sampled_from(["F32", "F64", "I8", "BOOL", "F4", "C64", "X", "", None]),
        st.lists(numbers, max_size=3),
    ),
)


@settings(max_examples=200, deadline=None)
@given(st.lists(mutations, max_size=4), st.integers(0, 3).map(lambda n: 8 * n))
def test_safetensors_accepts_no_more_than_reference(tmp_path_factory, changes, length):
    header = copy.deepcopy(PAIR)
    for name, field, value in changes:
        header.setdefault(name, {})[field] = value
    content = encode(header, bytes(length))
    path = tmp_path_factory.getbasetemp() / "mutated.safetensors"
    path.write_bytes(content)
    try:
        table, _ = read_header(str(path), len(content))
    except CheckpointError:
        return
    expected = {n: (t["dtype"], t["shape"]) for n, t in safetensors.deserialize(content)}
    assert {n: (t.dtype.code, list(t.shape)) for n, t in table.items()} == expected


tables = st.lists(
    st.tuples(
        st.text(min_size=1, max_size=8).filter(lambda n: n != "__metadata__"),
        st.sampled_from(sorted((d for d in BY_CODE.values() if d.size), key=lambda d: d.name)),
        st.lists(st.integers(0, 4), max_size=3).map(tuple),
    ),
    max_size=8,
    unique_by=lambda entry: entry[0],
)


@settings(max_examples=100, deadline=None)
@given(tables, st.dictionaries(st.text(max_size=5), st.text(max_size=9), max_size=3))
def test_build_header_is_read_by_reference(tmp_path_factory, tensors, metadata):
    first, offsets = build_header(tensors, metadata)
    end = len(first) + sum(dtype.nbytes(torch.Size(shape).numel()) for _, dtype, shape in tensors)
    content = bytearray(end)
    content[: len(first)] = first
    expected = {}
    for i, (name, dtype, shape) in enumerate(tensors):
        raw = bytes([i + 1]) * dtype.nbytes(torch.Size(shape).numel())
        assert offsets[name] % dtype.size == 0, "not aligned to its element size"
        content[offsets[name] : offsets[name] + len(raw)] = raw
        expected[name] = (dtype.code, list(shape), raw)
    found = safetensors.deserialize(bytes(content))
    assert {n: (t["dtype"], t["shape"], bytes(t["data"])) for n, t in found} == expected
    path = tmp_path_factory.getbasetemp() / "built.safetensors"
    path.write_bytes(content)
    with safetensors.safe_open(path, "np") as file:
        assert (file.metadata() or {}) == metadata


@pytest.mark.parametrize("dtype", ["complex128", "complex32"])
def test_build_header_refuses_unsupported_dtype(dtype):
    with pytest.raises(UnsupportedTensorError, match=f"mask \\({dtype}\\)"):
        build_header([("mask", DTYPES[dtype], (2,))], {})


@pytest.mark.parametrize("name", ["__metadata__", "half a pair \ud800"])
def test_build_header_refuses_unsupported_name(name):
    with pytest.raises(UnsupportedTensorError):
        build_header([(name, DTYPES["float32"], (2,))], {"format": "pt"})
