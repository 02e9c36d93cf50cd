"""Overwriting takes away an older average, and nothing that people have put there."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner, Result
from helpers import listing, save, save_states
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file

from ckptavg import average, open_run
from ckptavg.cli import main
from ckptavg.errors import OutputError

STATES = [{"a": torch.full((4,), float(i)), "b": torch.full((2, 2), float(i))} for i in (1, 3)]


def model(path: Path, state: dict[str, torch.Tensor], *, shards: int = 1) -> Path:
    """A Hugging Face directory with its configuration and tokenizer."""
    names = ["model.safetensors"]
    if shards > 1:
        names = [f"model-{i:05d}-of-{shards:05d}.safetensors" for i in range(1, shards + 1)]
        weight_map = dict(zip(state, names, strict=True))
        index = {"metadata": {}, "weight_map": weight_map}
        path.mkdir(parents=True)
        (path / "model.safetensors.index.json").write_text(json.dumps(index))
    for i, name in enumerate(names):
        part = state if shards == 1 else {k: v for j, (k, v) in enumerate(state.items()) if j == i}
        save(path / name, part)
    (path / "config.json").write_text('{"model_type": "toy"}')
    (path / "tokenizer.json").write_text("{}")
    return path


@pytest.fixture
def models(tmp_path: Path) -> Path:
    for i, state in enumerate(STATES, 1):
        model(tmp_path / "models" / f"checkpoint-{i}", state)
    return tmp_path / "models"


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    save_states(tmp_path / "run", STATES)
    return tmp_path / "run"


def overwrite(run: Path, out: Path, *options: str) -> Result:
    return CliRunner().invoke(main, ["average", str(run), "-o", str(out), "--overwrite", *options])


def contents(directory: Path) -> dict[str, bytes]:
    return {
        name: (directory / name).read_bytes()
        for name in listing(directory)
        if (directory / name).is_file()
    }


def assert_untouched(result: Result, before: dict[str, bytes], directory: Path, *said: str) -> None:
    """One line that says so, exit 1, and all as it was."""
    assert result.exit_code == 1, result.output
    last = result.stderr.splitlines()[-1]
    assert all(text in last for text in said), last
    assert contents(directory) == before


# ------------------------------------------------------------------------------------ directories


@pytest.mark.parametrize(
    "thing",
    ["train.py", "prepare.py", "notes/plan.md", "spiece.model", "model-00001-of-00002.safetensors",
     "pytorch_model.bin", "optimizer.pt", ".gitignore", "checkpoint-9/model.safetensors"],
)  # fmt: skip
@pytest.mark.parametrize("ours", [False, True], ids=["a model of theirs", "an average of ours"])
def test_overwrite_keeps_other_files_in_a_directory(models, tmp_path, thing, ours):
    out = tmp_path / "out"
    if ours:
        average(open_run(models), out=out)
    else:
        model(out, STATES[0])
    (out / thing).parent.mkdir(exist_ok=True)
    (out / thing).write_text("theirs")
    before = contents(tmp_path)
    assert_untouched(overwrite(models, out), before, tmp_path, str(out), thing.split("/")[0])


def test_overwrite_replaces_a_model_directory(models, tmp_path):
    out = model(tmp_path / "out", STATES[0])
    assert overwrite(models, out).exit_code == 0
    assert load_file(out / "model.safetensors")["a"].tolist() == [2.0] * 4


def test_overwrite_replaces_a_partial_model_directory(models, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "config.json").write_text("old")
    assert overwrite(models, out).exit_code == 0
    assert (out / "config.json").read_text() == '{"model_type": "toy"}'


def test_overwrite_removes_files_listed_in_the_record(models, tmp_path):
    """Shards and companions that the next average does not have."""
    for i, state in enumerate(STATES, 1):
        directory = model(tmp_path / "sharded" / f"checkpoint-{i}", state, shards=2)
        (directory / "generation_config.json").write_text("{}")
    out = tmp_path / "out"
    average(open_run(tmp_path / "sharded"), out=out)
    assert (out / "model-00002-of-00002.safetensors").is_file()
    assert overwrite(models, out).exit_code == 0
    assert listing(out) == ["config.json", "model.safetensors", "tokenizer.json"]


def test_record_lists_all_files_of_a_directory(models, tmp_path):
    average(open_run(models), out=tmp_path / "out", digests=True)
    with safe_open(tmp_path / "out" / "model.safetensors", "pt") as file:
        made = json.loads(file.metadata()["ckptavg"])
    assert made["files"] == listing(tmp_path / "out")
    checked = CliRunner().invoke(main, ["inspect", str(tmp_path / "out"), "--verify"])
    assert checked.exit_code == 0, checked.output


@pytest.mark.slow
@settings(
    max_examples=20,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(st.text("abc._-", min_size=1, max_size=12).filter(lambda name: name not in (".", "..")))
def test_overwrite_keeps_user_files_of_any_name(tmp_path_factory, name):
    home = tmp_path_factory.mktemp("home")
    for i, state in enumerate(STATES, 1):
        save(home / "models" / f"checkpoint-{i}" / "model.safetensors", state)
        (home / "models" / f"checkpoint-{i}" / "config.json").write_text("{}")
    average(open_run(home / "models"), out=home / "out")
    (home / "out" / name).write_text("theirs")
    with pytest.raises(OutputError):
        average(open_run(home / "models"), out=home / "out", overwrite=True)
    assert (home / "out" / name).read_text() == "theirs"


def test_overwrite_does_not_swap_file_and_directory(models, tmp_path):
    (tmp_path / "out").write_text("theirs")
    (tmp_path / "out.safetensors").mkdir()
    before = contents(tmp_path)
    assert_untouched(overwrite(models, tmp_path / "out"), before, tmp_path, "is a file")
    out = tmp_path / "out.safetensors"
    assert_untouched(overwrite(models, out), before, tmp_path, "is a directory")


# -------------------------------------------------------------------------- what else a run holds


@pytest.mark.parametrize(
    ("name", "options"),
    [("epoch_1.pt", ["--last", "1"]), ("epoch_2.pt", ["--to", "1"]), ("last.ckpt", []),
     ("epoch_1.pt", ["--glob", "*_2*"]), ("optimizer.pt", [])],
)  # fmt: skip
def test_overwrite_keeps_unselected_files_of_the_run(run_dir, tmp_path, name, options):
    save(run_dir / "last.ckpt", STATES[-1])
    torch.save({"state": {}, "param_groups": []}, run_dir / "optimizer.pt")
    before = contents(tmp_path)
    result = overwrite(run_dir, run_dir / name, *options)
    assert_untouched(result, before, tmp_path, "of the run that is averaged")


def test_overwrite_keeps_an_unselected_checkpoint_directory(models, tmp_path):
    before = contents(tmp_path)
    result = overwrite(models, models / "checkpoint-1", "--last", "1")
    assert_untouched(result, before, tmp_path, "of the run that is averaged")


@pytest.mark.parametrize("options", [[], ["--glob", "epoch*"]])
def test_overwrite_replaces_an_average_in_the_run(run_dir, options):
    out = run_dir / "average.pt"
    average(open_run(run_dir).last(1), out=out)
    assert overwrite(run_dir, out, *options).exit_code == 0
    assert torch.load(out, weights_only=True)["state_dict"]["a"].tolist() == [2.0] * 4


# ---------------------------------------------------------------------------- links, pipes, modes


@pytest.mark.skipif(os.name == "nt", reason="links of POSIX")
def test_overwrite_follows_a_link_and_notes_this(run_dir, tmp_path):
    (tmp_path / "link.pt").symlink_to("kept.pt")
    (tmp_path / "kept.pt").write_text("old")
    result = overwrite(run_dir, tmp_path / "link.pt")
    assert result.exit_code == 0
    assert f"{tmp_path / 'link.pt'} is a link: {tmp_path / 'kept.pt'} is written" in result.stderr
    assert (tmp_path / "link.pt").is_symlink()
    assert "state_dict" in torch.load(tmp_path / "kept.pt", weights_only=True)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="pipes of POSIX")
def test_overwrite_refuses_a_pipe(run_dir, tmp_path):
    os.mkfifo(tmp_path / "out.pt")
    result = overwrite(run_dir, tmp_path / "out.pt")
    assert result.exit_code == 1
    assert "is a pipe" in result.stderr
    assert (tmp_path / "out.pt").is_fifo()


@pytest.mark.skipif(os.name == "nt", reason="names of POSIX")
@pytest.mark.parametrize("length", [255, 256])
def test_output_name_may_have_255_characters(run_dir, tmp_path, length):
    out = tmp_path / ("o" * (length - 3) + ".pt")
    result = overwrite(run_dir, out)
    if length == 255:
        assert result.exit_code == 0
        assert listing(tmp_path) == [out.name, "run", "run/epoch_1.pt", "run/epoch_2.pt"]
    else:
        assert result.exit_code == 1
        assert "Choose a shorter name" in result.stderr.splitlines()[-1]
