"""The command line in a shell: names from ``*``, readers that leave, the working directory."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import traceback
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner, Result
from command_line import FACTORIES, network
from helpers import save
from selecting import first_only

from ckptavg.cli import main
from ckptavg.specs.prefixes import DATA_PREFIXES, MODEL_PREFIXES
from ckptavg.tasks.named import NAMED

EVAL = ["--model", "shell_net.py:model", "--data", "shell_net.py:data", "--device", "cpu"]


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory with a run of four checkpoints under run/, and factories in shell_net.py."""
    (tmp_path / "shell_net.py").write_text(FACTORIES)
    for epoch in range(1, 5):
        torch.manual_seed(epoch)
        save(tmp_path / "run" / f"epoch_{epoch}.pt", network().state_dict(), epoch=epoch)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def ckptavg(*args: object) -> Result:
    return CliRunner().invoke(main, [str(arg) for arg in args])


# Names


@pytest.mark.parametrize("name", ["--overwrite", "-o", "-x.pt", "--weights=1,2", "--"])
def test_file_names_like_options_are_refused(home: Path, name: str) -> None:
    (home / "swa.pt").write_bytes(b"mine")
    (home / name).touch()
    names = sorted(path.name for path in home.iterdir())
    result = ckptavg("average", *names, "-o", "swa.pt")
    assert result.exit_code == 2
    assert f"Error: {name} is the name of a file in this directory" in result.stderr
    assert "./*" in result.stderr
    assert (home / "swa.pt").read_bytes() == b"mine"
    (home / name).rename("out.pt")
    assert ckptavg("average", "run", "-o", "swa.pt", "--overwrite").exit_code == 0


def test_file_names_like_options_can_be_given(home: Path) -> None:
    (home / "run" / "epoch_1.pt").rename(home / "-1.pt")
    assert ckptavg("average", "--dry-run", "./-1.pt", "run").exit_code == 0
    assert ckptavg("average", "--dry-run", "--", "-1.pt", "run").exit_code == 0


STRANGE = [b"caf\xe9.pt", "w\u202egpj.pt".encode(), "\u200bx.pt".encode(), "\x9b2Jx.pt".encode()]


@pytest.mark.parametrize("name", STRANGE)
def test_file_names_are_escaped(home: Path, name: bytes) -> None:
    path = os.fsencode(home / "strange") + b"/" + name
    (home / "strange").mkdir()
    os.rename(home / "run" / "epoch_1.pt", path)
    (home / "strange" / "epoch_2.pt").write_bytes((home / "run" / "epoch_2.pt").read_bytes())
    first = os.fsdecode(path)
    said = ""
    for command in (
        ["inspect", "strange"],
        ["inspect", first],
        ["average", first, "run", "-o", f"out-{os.fsdecode(name)}", "-v"],
        ["average", first, "nowhere", "-o", "x.pt"],
        ["eval", first, *EVAL, "--results", "r.json"],
        ["inspect", first, first],
    ):
        said += ckptavg(*command).output
        result = ckptavg(*command, "--json")
        said += result.output
        assert not result.stdout or json.loads(result.stdout)
    report = json.loads(ckptavg("inspect", first, "--json").stdout)
    assert report["path"] == first
    said += Path("r.json").read_text()
    assert said.replace("\n", "").isprintable()
    assert os.fsdecode(name) not in said


def test_tracebacks_are_printable(home: Path) -> None:
    (home / "own.py").write_text("def model():\n    raise RuntimeError('s3://me:pw@h/w\\u202e')\n")
    result = ckptavg("eval", "run/epoch_1.pt", "--model", "own.py:model", *EVAL[2:], "--debug")
    said = "".join(traceback.format_exception(result.exception))
    assert r"s3://h/w\u202e" in said
    assert "\u202e" not in said
    assert "pw" not in said.replace(r"'s3://me:pw@h/w\u202e'", "")  # the line of code


# The shell


@first_only("flags", [[], ["--json", "--quiet"]])
def test_average_survives_a_closed_pipe(home: Path, flags: list[str]) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-m", "ckptavg", "average", "run", "-o", "swa.pt", *flags]
    outlets = {"stdout": writer, "stderr": subprocess.PIPE if flags else writer}
    done = subprocess.run(command, check=False, cwd=home, **outlets)
    os.close(writer)
    assert (done.returncode, done.stderr or b"") == (0, b"")
    assert (home / "swa.pt").is_file()


@pytest.mark.slow
def test_imports_ignore_modules_of_the_working_directory(home: Path) -> None:
    for name in ("torch", "click", "typing", "logging", "json", "__future__", "safetensors"):
        (home / f"{name}.py").write_text(f"raise SystemExit('a stranger: {name}')")
    (home / "own.py").write_text((home / "shell_net.py").read_text())
    command = [sys.executable, "-m", "ckptavg", "average", "run", "-o", "swa.pt"]
    own = ["--model", "own:model", "--train-data", "own:data"]
    done = subprocess.run([*command, *own], check=False, cwd=home, stderr=subprocess.PIPE)
    assert done.returncode == 0, done.stderr
    assert (home / "swa.pt").is_file()


def test_help_names_every_task_and_form_of_data():
    text = " ".join(CliRunner().invoke(main, ["eval", "--help-all"]).output.split())
    for name in (*NAMED, *MODEL_PREFIXES, *DATA_PREFIXES):
        assert name in text
