"""An output's path at which a run lies: somebody has swapped the two."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from click.testing import CliRunner, Result
from helpers import listing, save, save_states

from ckptavg.cli import main

STATES = [{"a": torch.full((4,), float(i))} for i in (1, 3)]


def run_command(*args: object) -> Result:
    return CliRunner().invoke(main, [str(arg) for arg in args])


def hugging_face(path: Path) -> Path:
    save(path / "model.safetensors", STATES[0])
    (path / "config.json").write_text("{}")
    return path


@pytest.fixture
def single(tmp_path: Path) -> Path:
    return save(tmp_path / "x.pt", STATES[0])


def make_run(path: Path, kind: str) -> None:
    if kind == "files":
        save_states(path, STATES)
    elif kind == "models":
        for step in (1, 2):
            hugging_face(path / f"checkpoint-{step}")
    elif kind == "deeper":
        save_states(path / "version_0" / "checkpoints", STATES)
    else:
        hugging_face(path)


@pytest.mark.parametrize("command", ["average", "update-bn"])
@pytest.mark.parametrize("kind", ["files", "models", "deeper", "model"])
def test_swapped_output_does_not_offer_overwrite(tmp_path, single, kind, command):
    make_run(tmp_path / "run", kind)
    before = listing(tmp_path)
    own = [] if command == "average" else ["--model", "torch.nn:Identity", "--train-data", "a:b"]
    if own:
        (tmp_path / "own.py").write_text("import torch\ndef d(): return [(torch.ones(2, 4), 0)]\n")
        own[-1] = f"{tmp_path / 'own.py'}:d"
    result = run_command(command, single, "-o", tmp_path / "run", *own)
    assert result.exit_code == 1, result.output
    [line] = [line for line in result.stderr.splitlines() if line.startswith("Error")]
    assert f"{tmp_path / 'run'} is a directory that holds checkpoints" in line
    assert "were the output and the input swapped?" in line
    assert "--overwrite" not in line
    code = ("own", "__pycache__")
    assert {name for name in listing(tmp_path) if not name.startswith(code)} == set(before)


@pytest.mark.parametrize("kind", ["files", "models", "deeper"])
def test_swapped_output_is_kept_despite_overwrite(tmp_path, single, kind):
    make_run(tmp_path / "run", kind)
    before = listing(tmp_path)
    result = run_command("average", single, "-o", tmp_path / "run", "--overwrite")
    assert result.exit_code == 1, result.output
    assert "were the output and the input swapped?" in result.stderr
    assert listing(tmp_path) == before


@pytest.mark.parametrize("content", ["nothing", "an average", "notes"])
def test_output_directory_is_replaced_unless_it_holds_notes(tmp_path, content):
    out = tmp_path / "out"
    run = tmp_path / "run"
    make_run(run, "models")
    if content == "an average":
        assert run_command("average", run, "-o", out).exit_code == 0
    else:
        out.mkdir()
    if content == "notes":
        (out / "notes.md").write_text("theirs")
    refused = run_command("average", run, "-o", out)
    assert refused.exit_code == 1
    assert "exists already" in refused.stderr
    result = run_command("average", run, "-o", out, "--overwrite")
    assert result.exit_code == (1 if content == "notes" else 0), result.output
