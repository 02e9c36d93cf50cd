"""Outputs laid out ahead and written block by block load where torch and the hub load them."""

from __future__ import annotations

import errno
import itertools
import json
import math
import os
import random
import time
import zipfile
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from ckptavg.errors import UnsupportedTensorError, UsageError
from ckptavg.formats import open_checkpoint, registry
from ckptavg.formats.checkpoint import DTYPES
from ckptavg.formats.huggingface import writer
from ckptavg.formats.provenance import Provenance
from ckptavg.formats.registry import OutputTensor, lay_out
from ckptavg.formats.torch_save import archive as torch_pickle
from ckptavg.formats.torch_save.format import TORCH_SAVE
from ckptavg.outputs.sinks import FileSink, MemorySink, crc32_combine

MADE = {"version": "0", "scheme": "uniform", "checkpoints": [{"path": "é.pt"}], "bn": "none"}
COMMON = ["float64", "float32", "float16", "bfloat16", "complex64", "int64", "int32", "int16",
          "int8", "uint8", "uint16", "uint32", "uint64", "bool", "float8_e4m3fn"]  # fmt: skip


def dtype_of(tensor: torch.Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def random_tensor(dtype: str, *shape: int) -> torch.Tensor:
    kind = getattr(torch, dtype)
    if kind == torch.bool:
        return torch.rand(shape) < 0.5
    size = torch.empty((), dtype=kind).element_size()
    raw = torch.randint(0, 256, (math.prod(shape) * size,), dtype=torch.uint8)
    return raw.view(kind).view(shape)


def as_bytes(tensor: torch.Tensor) -> bytes:
    return tensor.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes()


def outputs(tensors, tied=None) -> list[OutputTensor]:
    tied = tied or {}
    return [
        OutputTensor(name, DTYPES[dtype_of(t)], tuple(t.shape), tied.get(name))
        for name, t in tensors.items()
    ]


def blocks(tensors, tied=(), seed=0, most=50):
    """The bytes of every tensor that is not tied to another, cut up and shuffled."""
    rng = random.Random(seed)
    found = []
    for name, tensor in tensors.items():
        content = b"" if name in tied else as_bytes(tensor)
        cuts = {0, len(content), *(rng.randrange(len(content) + 1) for _ in range(5))}
        cuts |= set(range(0, len(content), most)) if len(content) < 10_000 else set()
        found += [(name, a, content[a:b]) for a, b in itertools.pairwise(sorted(cuts))]
    rng.shuffle(found)
    return found


def write(path: Path, tensors, template, tied=None, seed=0, threads=0) -> registry.Layout:
    planned = lay_out(str(path), outputs(tensors, tied), Provenance(MADE), template)
    if planned.directory:
        path.mkdir()
    with FileSink(planned, path, outputs(tensors, tied)) as sink:
        parts = [(n, at, memoryview(c)) for n, at, c in blocks(tensors, tied or (), seed)]
        if threads:
            with ThreadPoolExecutor(threads) as pool:
                list(pool.map(lambda part: sink.write(*part), parts))
        else:
            for part in parts:
                sink.write(*part)
        sink.finish()
    return planned


def same(found, expected) -> bool:
    return list(found) == list(expected) and all(
        (found[n].dtype, found[n].shape) == (t.dtype, t.shape) and as_bytes(found[n]) == as_bytes(t)
        for n, t in expected.items()
    )


def state_dict() -> dict[str, torch.Tensor]:
    tensors = {name: random_tensor(name, 3, 5) for name in COMMON}
    tensors |= {"0-d": torch.tensor(1.5), "empty": torch.empty(0, 4), "b é": torch.rand(700)}
    return tensors | {"tied": tensors["float32"], "tied.too": tensors["b é"]}


TIED = {"tied": "float32", "tied.too": "b é"}


@pytest.fixture
def plain(tmp_path):
    """A checkpoint that is no directory, for outputs that follow none."""
    save_file({"module.a": torch.rand(2)}, tmp_path / "template.safetensors")
    return open_checkpoint(tmp_path / "template.safetensors")


# ------------------------------------------------------------------------------------- single files


@pytest.mark.parametrize("suffix", TORCH_SAVE.output_suffixes)
def test_torch_save_output_loads_safely_with_provenance(tmp_path, plain, suffix):
    path, tensors = tmp_path / f"out{suffix}", state_dict()
    write(path, tensors, plain, TIED)
    loaded = torch.load(path, weights_only=True)
    assert same(loaded["state_dict"], tensors)
    assert json.loads(loaded["ckptavg"]) == MADE
    assert open_checkpoint(path).provenance.entries == MADE


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**32), st.sampled_from([0, 3]))
def test_torch_save_checksums_hold_for_any_block_order(tmp_path_factory, seed, threads):
    folder = tmp_path_factory.getbasetemp()
    torch.save({"a": torch.rand(2)}, folder / "template.pt")
    path, tensors = folder / "shuffled.pt", state_dict()
    write(path, tensors, open_checkpoint(folder / "template.pt"), TIED, seed, threads)
    with zipfile.ZipFile(path) as archive:
        assert archive.testzip() is None
    assert same(torch.load(path)["state_dict"], tensors)


def test_torch_save_output_can_be_memory_mapped(tmp_path, plain):
    path, tensors = tmp_path / "out.pt", state_dict()
    write(path, tensors, plain)
    assert same(torch.load(path, mmap=True)["state_dict"], tensors)
    opened = open_checkpoint(path)
    assert all(t.pieces[0].offset % 64 == 0 for t in opened.tensors.values())


def test_torch_save_output_keeps_ties(tmp_path, plain):
    path, tensors = tmp_path / "out.pt", state_dict()
    write(path, tensors, plain, TIED)
    loaded = torch.load(path)["state_dict"]
    for name, first in TIED.items():
        assert loaded[name].data_ptr() == loaded[first].data_ptr()
    assert loaded["int8"].data_ptr() != loaded["uint8"].data_ptr()
    assert open_checkpoint(path).ties() == [["float32", "tied"], ["b é", "tied.too"]]


@pytest.mark.parametrize("dtype", ["complex128", "complex32", "float8_e5m2fnuz", "float8_e8m0fnu"])
@pytest.mark.filterwarnings("ignore:ComplexHalf")
def test_torch_save_output_holds_rare_dtypes(tmp_path, plain, dtype):
    tensors = {"a": random_tensor(dtype, 4)}
    write(tmp_path / "out.pt", tensors, plain)
    assert same(torch.load(tmp_path / "out.pt")["state_dict"], tensors)


def test_safetensors_output_refuses_complex128(tmp_path, plain):
    with pytest.raises(UnsupportedTensorError, match="a \\(complex128\\)"):
        write(tmp_path / "out.safetensors", {"a": random_tensor("complex128", 2)}, plain)
    assert not (tmp_path / "out.safetensors").exists()


def test_safetensors_output_holds_names_and_provenance(tmp_path, plain):
    path, tensors = tmp_path / "out.safetensors", state_dict()
    write(path, tensors, plain, TIED)
    loaded = load_file(path)
    assert same({name: loaded[name] for name in tensors}, tensors)
    with safe_open(path, "pt") as file:
        assert file.metadata()["format"] == "pt"
        assert json.loads(file.metadata()["ckptavg"]) == MADE
    assert open_checkpoint(path).provenance.entries == MADE


@pytest.mark.parametrize("name", ["out.pt", "out.safetensors", "out"])
def test_provenance_may_hold_path_not_unicode(tmp_path, plain, name, monkeypatch):
    made = MADE | {"checkpoints": [{"path": os.fsdecode(b"caf\xe9.pt"), "step": 1}]}
    monkeypatch.setattr(f"{__name__}.MADE", made)
    write(tmp_path / name, {"a": torch.rand(2)}, plain)
    assert open_checkpoint(tmp_path / name).provenance.entries == made


@pytest.mark.parametrize("name", ["out.pt", "out.safetensors", "out"])
def test_file_layout_plans_every_byte_once(tmp_path, plain, name):
    tensors = state_dict()
    planned = write(tmp_path / name, tensors, plain, TIED)
    paths = [tmp_path / name / f.name if f.name else tmp_path / name for f in planned.files]
    assert planned.size == sum(path.stat().st_size for path in paths)
    for file in planned.files:
        ranges = [(at, len(content)) for at, content in file.parts]
        ranges += [(at, len(as_bytes(tensors[n]))) for n, at in file.offsets.items()]
        end = 0
        for start, length in sorted(ranges):
            assert start == end
            end += length
        assert end == file.size


def test_archive_uses_64_bit_fields(tmp_path):
    """More than 65535 entries, and one that begins beyond 4 GiB; the file is mostly a hole."""
    count, large = 66_000, 5 << 30
    archive = torch_pickle.Archive()
    archive.reserve("data/large", large, "large")
    for i in range(count):
        archive.reserve(f"data/{i}", 1, str(i))
    path = tmp_path / "sparse.zip"
    with path.open("wb") as file:
        for at, content in archive.close():
            file.seek(at)
            file.write(content)
        file.seek(archive.offsets["7"])
        file.write(b"x")
    with zipfile.ZipFile(path) as found:
        assert len(found.infolist()) == count + 1
        assert found.getinfo("archive/data/large").file_size == large
        info = found.getinfo("archive/data/7")
        assert info.header_offset > large
        info.CRC = zlib.crc32(b"x")
        assert found.read(info) == b"x"


def test_torch_save_output_over_4_gib_is_read_by_torch(tmp_path, plain):
    tensors = [
        OutputTensor("large", DTYPES["uint8"], (5 << 30,)),
        OutputTensor("small", DTYPES["float32"], (3,)),
    ]
    (file,) = lay_out("out.pt", tensors, Provenance(MADE), plain).files
    path = tmp_path / "out.pt"
    with path.open("wb") as handle:
        for at, content in file.parts:
            handle.seek(at)
            handle.write(content)
        handle.seek(file.offsets["small"])
        handle.write(as_bytes(torch.tensor([1.0, 2.0, 3.0])))
    loaded = torch.load(path, mmap=True)["state_dict"]
    assert loaded["large"].shape == (5 << 30,)
    assert loaded["small"].tolist() == [1.0, 2.0, 3.0]


@pytest.mark.parametrize("path", ["out.onnx", "out.h5", "out.pt.zip", "out.safetensors.bak"])
def test_lay_out_unknown_suffix_lists_known_ones(plain, path):
    with pytest.raises(UsageError, match="safetensors") as caught:
        lay_out(path, [], Provenance(MADE), plain)
    assert Path(path).suffix in str(caught.value)


@pytest.mark.parametrize(
    ("path", "directory"),
    [("out", True), ("run-1.5", True), ("out.d/", True), ("x.pth.tar", False), ("a.b/c.pt", False)],
)
def test_lay_out_picks_file_or_directory_by_suffix(plain, path, directory):
    assert (
        lay_out(path, outputs({"a": torch.rand(1)}), Provenance(MADE), plain).directory == directory
    )


# -------------------------------------------------------------------------------------- directories


def pretrained(model, path: Path, **options):
    model.save_pretrained(path, **options)
    (path / "tokenizer.json").write_text('{"version": "1.0"}')
    (path / "trainer_state.json").write_text('{"global_step": 3}')
    return open_checkpoint(path)


def changed(checkpoint, model, dtype=None) -> dict[str, torch.Tensor]:
    """What to write: the model's tensors under the table's names, each with other values."""
    state = model.state_dict()
    return {name: (state[name] + 1).to(dtype or state[name].dtype) for name in checkpoint.tensors}


@pytest.mark.parametrize("options", [{}, {"max_shard_size": "12KB"}], ids=["single", "shards"])
def test_huggingface_output_is_loaded_by_from_pretrained(language_model, tmp_path, options):
    template = pretrained(language_model, tmp_path / "in", **options)
    tensors = changed(template, language_model)
    write(tmp_path / "out", tensors, template)
    loaded, report = type(language_model).from_pretrained(
        tmp_path / "out", output_loading_info=True
    )
    assert not any(report.values())
    state = loaded.state_dict()
    assert all(torch.equal(state[name], tensors[name]) for name in tensors)
    assert loaded.lm_head.weight is loaded.transformer.wte.weight
    assert open_checkpoint(tmp_path / "out").provenance.entries == MADE


def test_huggingface_output_keeps_shards_and_companions(language_model, tmp_path):
    template = pretrained(language_model, tmp_path / "in", max_shard_size="12KB")
    write(tmp_path / "out", changed(template, language_model), template)
    names = {path.name for path in (tmp_path / "in").iterdir()} - {"trainer_state.json"}
    assert {path.name for path in (tmp_path / "out").iterdir()} == names
    for name in ("config.json", "tokenizer.json", "generation_config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "in" / name).read_bytes()
    before, after = (
        json.loads((tmp_path / d / "model.safetensors.index.json").read_text())
        for d in ("in", "out")
    )
    assert after["weight_map"] == before["weight_map"]
    assert after["metadata"]["total_size"] == before["metadata"]["total_size"]


@pytest.mark.parametrize("dtype", ["bfloat16", "float64"])
def test_huggingface_output_config_gets_new_dtype(language_model, tmp_path, dtype):
    template = pretrained(language_model, tmp_path / "in")
    tensors = changed(template, language_model, getattr(torch, dtype))
    write(tmp_path / "out", tensors, template)
    loaded = type(language_model).from_pretrained(tmp_path / "out", dtype="auto")
    assert dtype_of(loaded.lm_head.weight) == dtype
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config == json.loads((tmp_path / "in" / "config.json").read_text()) | {"dtype": dtype}


def test_huggingface_output_config_keeps_torch_dtype_name(tmp_path):
    (tmp_path / "in").mkdir()
    save_file({"a": torch.rand(2)}, tmp_path / "in" / "model.safetensors")
    (tmp_path / "in" / "config.json").write_text('{"torch_dtype": "float32", "x": 1}')
    write(tmp_path / "out", {"a": torch.rand(2).half()}, open_checkpoint(tmp_path / "in"))
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config == {"torch_dtype": "float16", "x": 1}


@pytest.mark.parametrize("content", [b"{", b"[]", b"\xff", b'"dtype"', b"[" * 100_000], ids=len)
def test_huggingface_output_copies_unreadable_config(tmp_path, content):
    (tmp_path / "in").mkdir()
    save_file({"a": torch.rand(2)}, tmp_path / "in" / "model.safetensors")
    (tmp_path / "in" / "config.json").write_bytes(content)
    write(tmp_path / "out", {"a": torch.rand(2).half()}, open_checkpoint(tmp_path / "in"))
    assert (tmp_path / "out" / "config.json").read_bytes() == content


def test_huggingface_output_of_bin_files_is_safetensors(language_model, tmp_path):
    (tmp_path / "in").mkdir()
    torch.save(language_model.state_dict(), tmp_path / "in" / "pytorch_model.bin")
    language_model.config.save_pretrained(tmp_path / "in")
    template = open_checkpoint(tmp_path / "in")
    tensors = changed(template, language_model)
    write(tmp_path / "out", tensors, template, {"lm_head.weight": "transformer.wte.weight"})
    assert not list((tmp_path / "out").glob("*.bin"))
    loaded = type(language_model).from_pretrained(tmp_path / "out").state_dict()
    assert all(torch.equal(loaded[name], tensors[name]) for name in tensors)


def test_huggingface_output_keeps_wrapped_names(tmp_path):
    (tmp_path / "in").mkdir()
    save_file({"module.a": torch.rand(2)}, tmp_path / "in" / "model.safetensors")
    tensors = {"a": torch.rand(2)}
    write(tmp_path / "out", tensors, open_checkpoint(tmp_path / "in"))
    loaded = load_file(tmp_path / "out" / "model.safetensors")
    assert same(loaded, {"module.a": tensors["a"]})


@pytest.mark.parametrize("name", ["out", "out.pt", "out.safetensors"])
def test_output_in_other_layout_has_bare_names(tmp_path, plain, name):
    assert plain.stored_names == {"a": "module.a"}
    write(tmp_path / name, {"a": torch.rand(2)}, plain)
    assert open_checkpoint(tmp_path / name).stored_names == {"a": "a"}


def test_huggingface_output_splits_large_files(tmp_path, plain, monkeypatch):
    monkeypatch.setattr(writer, "_SHARD_BYTES", 100)
    tensors = {f"t{i}": torch.rand(n) for i, n in enumerate((10, 10, 10, 40, 1, 1))}
    write(tmp_path / "out", tensors, plain)
    shards = sorted((tmp_path / "out").glob("*.safetensors"))
    assert [path.name for path in shards] == [
        f"model-0000{i}-of-00004.safetensors" for i in (1, 2, 3, 4)
    ]
    assert [set(load_file(path)) for path in shards] == [
        {"t0", "t1"}, {"t2"}, {"t3"}, {"t4", "t5"},
    ]  # fmt: skip
    assert set(open_checkpoint(tmp_path / "out").tensors) == set(tensors)


def test_huggingface_output_keeps_diffusion_file_name(tmp_path):
    (tmp_path / "in").mkdir()
    save_file({"a": torch.rand(2)}, tmp_path / "in" / "diffusion_pytorch_model.safetensors")
    write(tmp_path / "out", {"a": torch.rand(2)}, open_checkpoint(tmp_path / "in"))
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["diffusion_pytorch_model.safetensors"]


def test_lay_out_is_fast_for_many_tensors(tmp_path):
    """A model of 8000 tensors (experts): 8 times as long as one of 1000, or 40 if quadratic."""
    seconds = {count: seconds_to_lay_out(tmp_path / f"{count}", count) for count in (1000, 8000)}
    assert seconds[8000] < 20 * seconds[1000]


def seconds_to_lay_out(home, count):
    """The processor's time for a model of so many tensors, the least of several attempts."""
    home.mkdir()
    tensors = {f"layers.{i}.weight": torch.zeros(1) for i in range(count)}
    save_file(tensors, home / "model.safetensors")
    template, attempts = open_checkpoint(home), []
    for _ in range(4):
        begun = time.process_time()
        lay_out(str(home / "out"), outputs(tensors), Provenance(MADE), template)
        attempts.append(time.process_time() - begun)
    return min(attempts)


# ---------------------------------------------------------------------------------------- the sinks


def test_file_sink_detects_full_disk_and_closes_files(tmp_path, plain, monkeypatch):
    def full(handle, offset, size):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    opened, closed = [], []
    real_open, real_close = os.open, os.close
    monkeypatch.setattr(os, "open", lambda *a, **k: opened.append(real_open(*a, **k)) or opened[-1])
    monkeypatch.setattr(os, "close", lambda handle: closed.append(handle) or real_close(handle))
    tensors = outputs({"a": torch.rand(2)})
    with (
        pytest.raises(OSError, match="No space"),
        FileSink(lay_out("out.pt", tensors, Provenance(MADE), plain), tmp_path / "out.pt", tensors),
    ):
        pytest.fail("the files were opened")
    assert opened
    assert closed == opened


@pytest.mark.parametrize("error", [errno.EOPNOTSUPP, errno.EINVAL])
def test_file_sink_works_without_preallocation(tmp_path, plain, monkeypatch, error):
    def unsupported(handle, offset, size):
        raise OSError(error, "unsupported")

    monkeypatch.setattr(os, "posix_fallocate", unsupported)
    tensors = state_dict()
    write(tmp_path / "out.pt", tensors, plain)
    assert same(torch.load(tmp_path / "out.pt")["state_dict"], tensors)


def test_file_sink_continues_short_writes(tmp_path, plain, monkeypatch):
    pwrite = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda handle, data, at: pwrite(handle, data[:11], at))
    tensors = state_dict()
    write(tmp_path / "out.pt", tensors, plain)
    assert same(torch.load(tmp_path / "out.pt")["state_dict"], tensors)


def test_memory_sink_collects_blocks_in_any_order():
    tensors = state_dict()
    sink = MemorySink(outputs(tensors, TIED))
    for name, at, content in blocks(tensors, TIED, seed=5):
        if content:
            sink.write(name, at, memoryview(bytearray(content)))
    assert same(sink.state_dict, tensors)
    for name, first in TIED.items():
        assert sink.state_dict[name].data_ptr() == sink.state_dict[first].data_ptr()


@settings(max_examples=100, deadline=None)
@given(st.lists(st.binary(max_size=300), max_size=6))
def test_crc32_combine_equals_crc32_of_whole(parts):
    crc = 0
    for part in parts:
        crc = crc32_combine(crc, zlib.crc32(part), len(part))
    assert crc == zlib.crc32(b"".join(parts))


def test_crc32_combine_takes_huge_lengths():
    """Appending 2^40 zeros at once is appending half of them twice."""
    zeros, length = zlib.crc32(bytes(1 << 16)), 1 << 16
    while length < 1 << 40:
        twice = crc32_combine(zeros, zeros, length)
        once = crc32_combine(zlib.crc32(b"x"), twice, 2 * length)
        half = crc32_combine(zlib.crc32(b"x"), zeros, length)
        assert once == crc32_combine(half, zeros, length)
        zeros, length = twice, 2 * length
