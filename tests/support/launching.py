"""Commands run by several processes, under torchrun or no launcher, and by one alone."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from click.testing import CliRunner

import ckptavg
from ckptavg.cli import main

ROOT = Path(ckptavg.__file__).parents[1]
SCRIPT = Path(__file__).with_name("ranks.py")
TORCHRUN = (sys.executable, "-m", "torch.distributed.run")


def launch(name: str, commands: list[dict], *start: str, count: int = 0) -> list[list[dict]]:
    """Start processes; the results of each for every command, None of one that was killed."""
    plan = {"name": name, "commands": commands} | ({"count": count} if not start else {})
    Path(f"{name}.json").write_text(json.dumps(plan))
    paths = os.pathsep.join([str(ROOT), str(SCRIPT.parent)])
    environment = os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    subprocess.run(
        [*(start or (sys.executable,)), SCRIPT, f"{name}.json"], env=environment, timeout=240,
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, check=False,
    )  # fmt: skip
    files = [
        [Path(f"{name}-{i}-{rank}.json") for rank in range(count)] for i in range(len(commands))
    ]
    return [
        [json.loads(file.read_text()) if file.exists() else None for file in of_one]
        for of_one in files
    ]


def run_alone(*args: str) -> str:
    """Run a command in this process, which must succeed; what it prints."""
    result = CliRunner().invoke(main, list(args), catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.stdout


def error_of(result: dict) -> str:
    """The error of a process that ended with one, without the notes before it."""
    assert result["code"] == 1
    assert not result["out"] or "wrote" not in result["out"]
    *notes, last = result["err"].splitlines()
    assert all(note.startswith("note: ") for note in notes)
    assert last.startswith("Error: ")
    return last.removeprefix("Error: ")
