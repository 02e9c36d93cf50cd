"""The command lines that are measured."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path

Command = list[str]

_CONTENDERS = Path(__file__).parent / "contenders"
IMPORT_TORCH: Command = [sys.executable, "-c", "import torch"]


def average(run: Path, out: Path, *options: str) -> Command:
    """One average of a run."""
    return [sys.executable, "-m", "ckptavg", "average", str(run), "-o", str(out), *options]


def average_many(run: Path, out: Path, windows: Sequence[int]) -> Command:
    """The uniform averages of the last few, for each of the windows, in one pass."""
    *others, most = windows
    also = [part for n in others for part in ("--also", f"last{n}=uniform@last={n}")]
    return average(run, out / f"last{most}.safetensors", "--last", str(most), *also)


def across(processes: int, command: Command) -> Command:
    """A command under torchrun."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]
    return [*launcher, str(processes), "--no-python", *command]


def load_and_add(inputs: Sequence[Path], out: Path) -> Command:
    """The usual script."""
    return contender("load_and_add", out, *inputs)


def averaged_model(inputs: Sequence[Path], out: Path) -> Command:
    """torch's AveragedModel."""
    return contender("averaged_model", out, *inputs)


def mergekit(program: str, inputs: Sequence[Path], out: Path, configuration: Path) -> Command:
    """mergekit's linear merge of bare state dicts; writes the configuration that it is to read."""
    models = [{"model": str(path), "parameters": {"weight": 1.0}} for path in inputs]
    configuration.write_text(json.dumps({"merge_method": "linear", "models": models}))
    return [program, str(configuration), str(out), "--quiet"]


def beside(program: str) -> Command:
    """``import torch`` in the environment that a program belongs to."""
    python = Path(program).with_name("python")
    return [str(python) if os.access(python, os.X_OK) else sys.executable, *IMPORT_TORCH[1:]]


def difference(one: Path, other: Path) -> Command:
    """Prints how far two averages are apart."""
    return contender("difference", one, other)


def contender(name: str, *arguments: object) -> Command:
    """A script of the contenders."""
    return [sys.executable, str(_CONTENDERS / f"{name}.py"), *map(str, arguments)]
