"""What stands beside the weights goes along, but for training's state and what was not averaged."""

from __future__ import annotations

import contextlib
import json
import os
import socket
from pathlib import Path

import pytest
import torch
from helpers import listing, save
from hypothesis import given, settings
from hypothesis import strategies as st

import ckptavg
from ckptavg.errors import CheckpointError
from ckptavg.formats.huggingface import companions
from ckptavg.io import copying
from ckptavg.io.stamp import FileStamp

MODEL = {
    "config.json": "{}",
    "chat_template.jinja": "{{ x }}",
    "tokenizer.tiktoken": "aGk= 0",
    "source.spm": "\x01\x02",
    "target.spm": "\x03",
    "merges.txt": "a b",
    "tokenizer.model": "\x00",
    "README.md": "# a model",
    "LICENSE": "MIT",
    "images/curve.png": "\x89PNG",
    "1_Pooling/config.json": '{"pooling_mode_cls_token": true}',
    "scheduler/scheduler_config.json": "{}",
    "label_encoder.pkl": "never opened",
    "stats/mean.npy": "numbers",
}
TRAINING = [
    "optimizer.pt", "scheduler.pt", "rng_state.pth", "rng_state_3.pth", "training_args.bin",
    "trainer_state.json", "random_states_0.pkl", "optimizer.bin", "eval_results.json",
    "metrics.json", "dev_scores.txt", "similarity_evaluation_sts-dev_results.csv",
    "events.out.tfevents.1700000000.host.1.0", "latest", "zero_to_fp32.py", "train.log",
]  # fmt: skip
TENSORS = [
    "pytorch_model.bin", "tf_model.h5", "flax_model.msgpack", "model.onnx", "consolidated.00.pth",
    "consolidated.safetensors", "pytorch_model.bin.index.json", "model-Q4.gguf",
    "model.ckpt.data-00000-of-00001",
]  # fmt: skip


def fill(directory: Path, names) -> None:
    contents = names if isinstance(names, dict) else dict.fromkeys(names, "old")
    for name, content in contents.items():
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        (directory / name).write_text(content)


@pytest.fixture
def run(tmp_path):
    """Two directories of one weight, 1 and 3."""
    for step, value in ((1, 1.0), (2, 3.0)):
        save(tmp_path / "run" / f"step-{step}" / "model.safetensors", {"w": torch.tensor([value])})
    return tmp_path / "run"


def averaged(run: Path) -> Path:
    return ckptavg.average(ckptavg.open_run(run), out=run.parent / "out")


def test_companions_of_model_are_copied(run, caplog):
    caplog.set_level("INFO")
    fill(run / "step-2", MODEL)
    out = averaged(run)
    for name, content in MODEL.items():
        assert (out / name).read_text() == content
    folders = {str(Path(name).parent) for name in MODEL} - {"."}
    assert set(listing(out)) == {"model.safetensors", *MODEL, *folders}
    assert [r.message for r in caplog.records if "copied" in r.message] == [
        "code of the input's is copied along: label_encoder.pkl"
    ]


@pytest.mark.parametrize("names", [TRAINING, TENSORS], ids=["training", "tensors"])
def test_companions_untrue_of_average_are_left_out_and_named(run, caplog, names):
    caplog.set_level("INFO")
    fill(run / "step-2", names)
    assert listing(averaged(run)) == ["model.safetensors"]
    (note,) = [r.message for r in caplog.records if "not copied" in r.message]
    assert all(name in note for name in names)


_NAMES = st.sampled_from(
    ["vocab.txt", "a.py", "onnx", "1_Pooling", "model.onnx", "optimizer.pt", ".hidden", "b.bin",
     "checkpoint-7", "latest", "c.log", "d.json", "__pycache__", "e.tfevents"]
)  # fmt: skip


@settings(max_examples=40, deadline=None)
@given(st.lists(st.lists(_NAMES, min_size=1, max_size=3), max_size=8))
def test_companions_are_copied_or_named(tmp_path_factory, paths):
    folder = tmp_path_factory.mktemp("model")
    for parts in paths:
        with contextlib.suppress(FileExistsError, NotADirectoryError, IsADirectoryError):
            fill(folder, ["/".join(parts)])
    found = companions.gather(folder, weights=())
    left_out = [name for name, _ in found.left_out]
    for path in folder.rglob("*"):
        name = path.relative_to(folder).as_posix()
        named = any(name == other or f"{name}/".startswith(other) for other in left_out)
        assert path.is_dir() or (name in found.copies) != named
    assert {Path(stamp.path) for stamp in found.copies.values()} == {
        folder / name for name in found.copies
    }


FOLDERS = {
    "checkpoint-500/config.json": "checkpoint-500/",
    "global_step500/note.txt": "global_step500/",
    "onnx/model.onnx": "onnx/",
    "ema/model.safetensors": "ema/",
    "deep/er/openvino_model.bin": "deep/",
    ".cache/x.json": ".cache/",
    ".gitattributes": ".gitattributes",
    "optimizer_0/__0_0.distcp": "optimizer_0/",
    "code/__pycache__/a.pyc": "code/",
}


@pytest.mark.parametrize(("name", "told"), FOLDERS.items(), ids=FOLDERS)
def test_companions_leave_out_other_directories_whole(run, caplog, name, told):
    caplog.set_level("INFO")
    fill(run / "step-2", [name])
    beside = (run / "step-2" / name).parent / "tokenizer.json"
    if beside.parent != run / "step-2" and "__pycache__" not in name:
        beside.write_text("its own")
    assert listing(averaged(run)) == ["model.safetensors"]
    (note,) = [r.message for r in caplog.records if "not copied" in r.message]
    assert note.endswith(f": {told}")


def test_companions_follow_links(run, tmp_path):
    fill(tmp_path / "disk2", {"vocab.txt": "words", "1_Pooling/config.json": "{}"})
    (run / "step-2" / "vocab.txt").symlink_to(tmp_path / "disk2" / "vocab.txt")
    (run / "step-2" / "1_Pooling").symlink_to(tmp_path / "disk2" / "1_Pooling")
    out = averaged(run)
    assert (out / "vocab.txt").read_text() == "words"
    assert not any(path.is_symlink() for path in out.rglob("*"))
    assert (out / "1_Pooling" / "config.json").read_text() == "{}"


def test_companions_name_special_files_without_opening(run, caplog, monkeypatch):
    caplog.set_level("INFO")
    step = run / "step-2"
    os.mkfifo(step / "pipe.json")
    (step / "gone.txt").symlink_to("nowhere")
    (step / "loop").symlink_to(".")
    (step / "round.txt").symlink_to("round.txt")
    with socket.socket(socket.AF_UNIX) as server:
        monkeypatch.chdir(step)
        server.bind("s.json")
        assert listing(averaged(run)) == ["model.safetensors"]
    (note,) = [r.message for r in caplog.records if "not copied" in r.message]
    assert all(name in note for name in ("pipe.json", "gone.txt", "loop/", "round.txt", "s.json"))


def test_companions_leave_out_directory_of_data(run, caplog, monkeypatch):
    caplog.set_level("INFO")
    monkeypatch.setattr(companions, "_MOST_FILES", 5)
    fill(run / "step-2", [f"data/images/{i}.png" for i in range(9)] + ["few/a.txt"])
    assert listing(averaged(run)) == ["few", "few/a.txt", "model.safetensors"]
    assert any(r.message.endswith(": data/") for r in caplog.records)


def test_companions_of_adapter_get_new_configuration(tmp_path):
    config = json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 4})
    names = [f"base_model.model.l.lora_{part}.weight" for part in "AB"]
    for step in (1, 2):
        folder = tmp_path / "run" / f"step-{step}"
        save(folder / "adapter_model.safetensors", {name: torch.ones(2, 2) for name in names})
        fill(folder, {"adapter_config.json": config, "README.md": "# an adapter", "vocab.txt": "a"})
        fill(folder, {"second/adapter_model.safetensors": "another adapter", "optimizer.pt": "old"})
    out = averaged(tmp_path / "run")
    beside = ["README.md", "adapter_config.json", "adapter_model.safetensors", "vocab.txt"]
    assert listing(out) == beside
    assert json.loads((out / "adapter_config.json").read_text())["r"] == 4


def test_companions_are_not_copied_beside_single_file(run, tmp_path):
    fill(run / "step-2", MODEL)
    ckptavg.average(ckptavg.open_run(run), out=tmp_path / "x.safetensors")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["run", "x.safetensors"]


def test_companions_beside_several_checkpoints_are_not_copied(tmp_path, caplog):
    caplog.set_level("INFO")
    for step in (1, 2):
        save(tmp_path / "run" / f"step_{step}.safetensors", {"w": torch.ones(1)})
    fill(tmp_path / "run", {"config.json": "{}", "train.py": "1"})
    assert listing(averaged(tmp_path / "run")) == ["model.safetensors"]
    assert any("config.json is beside several" in r.message for r in caplog.records)


@pytest.mark.parametrize("where", ["config.json", "1_Pooling/config.json", "README.md"])
def test_configuration_of_weights_alone_gets_new_dtype(run, where):
    text = '{"dtype": "float32"}'
    fill(run / "step-2", {where: text})
    out = ckptavg.average(ckptavg.open_run(run), out=run.parent / "out", dtype="bfloat16")
    told = json.loads((out / where).read_text())["dtype"]
    assert told == ("bfloat16" if where == "config.json" else "float32")


# ------------------------------------------------------------------------------------------- copies


@settings(max_examples=20, deadline=None)
@given(st.binary(max_size=5000), st.integers(1, 700))
def test_copy_keeps_bytes_for_any_chunk_size(tmp_path_factory, content, chunk):
    folder = tmp_path_factory.mktemp("copy")
    (folder / "a").write_bytes(content)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(copying, "_CHUNK", chunk)
        copying.copy(FileStamp.of(folder / "a"), folder / "b")
    assert (folder / "b").read_bytes() == content


def test_copy_refuses_short_read(run, monkeypatch):
    fill(run / "step-2", {"vocab.txt": "12345678"})
    opened = copying.paths.open_binary

    def shortened(place):
        file = opened(place)
        if str(place).endswith("vocab.txt"):
            file.read()
        return file

    monkeypatch.setattr(copying.paths, "open_binary", shortened)
    with pytest.raises(CheckpointError, match="has 8 bytes, of which 0 could be read"):
        averaged(run)
    assert not (run.parent / "out").exists()


@pytest.mark.parametrize("same_stamp", [True, False])
def test_copy_refuses_file_rewritten_meanwhile(tmp_path, monkeypatch, same_stamp):
    path = tmp_path / "vocab.json"
    path.write_text("a" * 3000)
    stamp, read = FileStamp.of(path), copying.read

    def rewritten(source):
        yield from read(source)
        path.write_text("b" * 3000)

    if same_stamp:  # by a clock that has not moved on
        monkeypatch.setattr(FileStamp, "verify", lambda _: None)
    monkeypatch.setattr(copying, "read", rewritten)
    with pytest.raises(CheckpointError, match="changed while it was being read"):
        copying.copy(stamp, tmp_path / "copy")


def test_verify_settled_rechecks_recent_files(tmp_path, monkeypatch):
    path = tmp_path / "vocab.json"
    path.write_text("")
    stamp = FileStamp.of(path)
    monkeypatch.setattr(copying.time, "time", lambda: stamp.mtime_ns / 1e9 + 0.01)
    monkeypatch.setattr(copying.time, "sleep", lambda _: path.write_text("all of it"))
    with pytest.raises(CheckpointError, match="changed while it was being read"):
        copying.verify_settled([stamp])
    monkeypatch.setattr(copying.time, "time", lambda: stamp.mtime_ns / 1e9 + 60)
    monkeypatch.setattr(copying.time, "sleep", lambda _: pytest.fail("a wait for an old file"))
    copying.verify_settled([FileStamp.of(path)])
    copying.verify_settled([])


def test_copy_detects_torn_write(tmp_path, monkeypatch):
    (tmp_path / "a").write_text("a" * 300)
    digest = copying._digest
    monkeypatch.setattr(copying, "_digest", lambda chunks: digest([*chunks, b"torn"]))
    with pytest.raises(OSError, match="what was written"):
        copying.copy(FileStamp.of(tmp_path / "a"), tmp_path / "b")
