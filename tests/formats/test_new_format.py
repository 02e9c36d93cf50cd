"""A format that a test adds: one class and one entry in the registry make it known everywhere."""

from __future__ import annotations

import json
import math
import struct

import pytest
from command_line import ckptavg as command

import ckptavg
from ckptavg.errors import UsageError
from ckptavg.formats import file_formats, registry
from ckptavg.formats.checkpoint import DTYPES, Record, contiguous_tensor
from ckptavg.formats.file_formats import read_file
from ckptavg.formats.file_layout import FileLayout, Layout
from ckptavg.formats.format import DirectoryFormat, FileFormat
from ckptavg.formats.parts import Part, build_checkpoint
from ckptavg.formats.provenance import PROVENANCE, Provenance

START = b"TINY"


class Tiny(FileFormat):
    """The word TINY, the length of a JSON text, the text, and the float32 tensors in a row."""

    name = "tiny"
    label = "tiny files"
    suffixes = output_suffixes = (".tiny",)

    def looks_like(self, start):
        return start.startswith(START)

    def read(self, path, stamp, key):
        raw = path.read_bytes()
        end = 8 + struct.unpack("<I", raw[4:8])[0]
        header = json.loads(raw[8:end])
        tensors = {}
        for name, shape in header["shapes"].items():
            tensors[name] = contiguous_tensor(str(path), end, DTYPES["float32"], tuple(shape))
            end += 4 * math.prod(shape)
        provenance = Provenance.from_json(header.get(PROVENANCE))
        return Part(self, (stamp,), tensors, {}, Record(header.get("step")), provenance)

    def lay_out(self, path, tensors, provenance, template):
        shapes = {tensor.name: tensor.shape for tensor in tensors}
        text = json.dumps({"shapes": shapes, PROVENANCE: provenance}).encode()
        first = START + struct.pack("<I", len(text)) + text
        end, offsets = len(first), {}
        for tensor in tensors:
            offsets[tensor.name] = end
            end += tensor.nbytes
        return Layout(False, [FileLayout("", end, [(0, first)], offsets)])


class TinyDirectory(DirectoryFormat):
    """A directory with the file ``weights.tiny``, which is read and not written."""

    name = "tiny-directory"
    label = "tiny directories"

    def detects(self, directory):
        return (directory / "weights.tiny").is_file()

    def open(self, directory, key):
        if not self.detects(directory):
            return None
        part = read_file(directory / "weights.tiny", key)
        return build_checkpoint(directory, self, [part], part.record)


def save(path, step, values):
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps({"shapes": {"w": [len(values)]}, "step": step}).encode()
    body = struct.pack(f"<{len(values)}f", *values)
    path.write_bytes(START + struct.pack("<I", len(text)) + text + body)


@pytest.fixture(autouse=True)
def _registered(monkeypatch):
    formats = (*file_formats.FILE_FORMATS, Tiny())
    monkeypatch.setattr(file_formats, "FILE_FORMATS", formats)
    directories = (*registry.DIRECTORY_FORMATS, TinyDirectory())
    monkeypatch.setattr(registry, "DIRECTORY_FORMATS", directories)


@pytest.fixture
def run(tmp_path):
    """Three files of the format, in a directory with a file of another suffix."""
    for step, value in enumerate([1.0, 2.0, 6.0], 1):
        save(tmp_path / "run" / f"step_{step}.tiny", 10 * step, [value, -value])
    (tmp_path / "run" / "notes.txt").write_text("no checkpoint")
    return tmp_path / "run"


def test_new_format_is_found_opened_averaged_and_written(run, tmp_path):
    opened = ckptavg.open_run(run)
    assert [checkpoint.step for checkpoint in opened] == [10, 20, 30]
    out = tmp_path / "mean.tiny"
    ckptavg.average(opened, out=out)
    assert struct.unpack("<2f", out.read_bytes()[-8:]) == (3.0, -3.0)
    average = ckptavg.open_checkpoint(out)
    assert (average.layout, average.is_average) == ("tiny", True)


def test_new_format_is_averaged_into_other_formats(run, tmp_path):
    for name in ("mean.safetensors", "mean.pt", "directory"):
        ckptavg.average(ckptavg.open_run(run), out=tmp_path / name)
        tensors = ckptavg.average([tmp_path / name])
        assert tensors["w"].tolist() == [3.0, -3.0]


def test_new_format_is_named_by_commands(run, monkeypatch):
    monkeypatch.chdir(run.parent)
    result = command("inspect", "run")
    assert result.exit_code == 0, result.output
    assert "3 checkpoints in order (tiny files)" in result.stdout
    result = command("inspect", "run", "--json")
    assert {row["layout"] for row in json.loads(result.stdout)["checkpoints"]} == {"tiny"}
    result = command("average", "run", "-o", "mean.odd")
    assert ".tiny" in result.stderr


def test_new_format_of_directories_is_found_and_averaged(tmp_path):
    for step, value in enumerate([1.0, 3.0], 1):
        save(tmp_path / "run" / f"checkpoint-{step}" / "weights.tiny", step, [value])
    opened = ckptavg.open_run(tmp_path / "run")
    assert [checkpoint.layout for checkpoint in opened] == ["tiny-directory"] * 2
    assert ckptavg.average(opened)["w"].tolist() == [2.0]
    # The format is not written: a directory is one of Hugging Face's.
    ckptavg.average(opened, out=tmp_path / "mean")
    assert ckptavg.open_checkpoint(tmp_path / "mean").layout == "huggingface"


def test_new_format_suffix_is_named_for_unknown_suffix(run, tmp_path):
    with pytest.raises(UsageError, match=r"\.safetensors, .*\.tiny, or none"):
        ckptavg.average(ckptavg.open_run(run), out=tmp_path / "mean.odd")
