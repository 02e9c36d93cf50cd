"""Command and Python code that make the average of a report."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import Any

import torch

from ckptavg.data.loaders import Subset
from ckptavg.display.shell_words import quote
from ckptavg.errors import RunError
from ckptavg.errors.printable import escape_unseen, without_secrets
from ckptavg.formats import Checkpoint
from ckptavg.formats.registry import has_suffix
from ckptavg.landscape.points import PointScorer
from ckptavg.runs.run import Run

_DEFAULT_SUFFIX = ".safetensors"
# Width of the usual formatters.
_LINE = 88


@dataclass(frozen=True)
class Symbol:
    """Python code that stands for a value, such as the name of a function."""

    code: str

    def __repr__(self) -> str:
        return self.code


@dataclass(frozen=True)
class Invocation:
    """Arguments that a report was asked for with, as far as they decide the average.

    Attributes:
        paths: Paths of the run; empty where a run was passed that is open already.
        opening: Keywords of ``open_run``, where they differ from the defaults.
        averaging: Keywords of ``average``, where they differ from the defaults.
        recomputing: Keywords of ``Recompute``, where they differ from the defaults.
        model: The model in words.
        data: The evaluation data in words.
        training: The training data in words; None without any.
        options: Further settings in words, by name.
        command: Words of the command that makes the average, without an output; None where only
            Python can name the model.
        command_recomputing: Further words that recompute BatchNorm statistics.
    """

    paths: tuple[str, ...]
    opening: Mapping[str, Any]
    averaging: Mapping[str, Any]
    recomputing: Mapping[str, Any]
    model: str
    data: str
    training: str | None
    options: Mapping[str, str] = field(default_factory=dict)
    command: tuple[str, ...] | None = None
    command_recomputing: tuple[str, ...] = ()


@dataclass(frozen=True)
class Recipe:
    """Command and code that make the average.

    Attributes:
        command: Command of a shell; None where only Python can name the model.
        python: Python code.
        out: Path of the output in both.
        recomputes: True if BatchNorm statistics are recomputed.
    """

    command: str | None
    python: str
    out: str
    recomputes: bool


# Values of keywords that need not be written.
_DEFAULTS = {
    "amp": "off",
    "batch_size": 128,
    "dtype": "keep",
    "on_nonfinite": "error",
    "scheme": "uniform",
    "seed": 0,
    "workers": 0,
}


def keywords_of(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return keywords that differ from their defaults, with values that Python code can hold.

    Args:
        values: Keywords of a public function. None and empty sequences are defaults.
    """
    keywords: dict[str, Any] = {}
    for name, value in values.items():
        is_empty = value is None or (isinstance(value, (str, list, tuple)) and not value)
        if is_empty or (name in _DEFAULTS and value == _DEFAULTS[name]):
            continue
        keywords[name] = _as_plain(value)
    return keywords


def recomputing_of(
    scorer: PointScorer, device: str | torch.device | None, samples: Subset | None
) -> dict[str, Any]:
    """Return the keywords of ``Recompute`` that a scorer was opened with.

    Args:
        scorer: Model, data and settings.
        device: The device as it was asked for.
        samples: Training samples to recompute from; None for all.
    """
    runtime = scorer.runtime
    return {
        "device": device,
        "forward": scorer.forward,
        "exclude": scorer.exclude,
        "amp": runtime.amp,
        "batch_size": runtime.batch_size,
        "workers": runtime.workers,
        "seed": runtime.seed,
        "bn_samples": samples,
    }


def _as_plain(value: Any) -> Any:
    """Return a plain value for a value of a keyword, or code that stands for it."""
    if isinstance(value, Checkpoint):
        return str(value.path)
    if isinstance(value, Subset) and not value.stratified:
        return value.count
    if isinstance(value, Subset):
        return Symbol(f"ckptavg.{value!r}")
    if isinstance(value, (torch.device, os.PathLike)):
        return str(value)
    if callable(value):
        return Symbol(getattr(value, "__name__", type(value).__name__))
    return value


def write_recipe(invocation: Invocation, run: Run, selection: Run, *, recomputes: bool) -> Recipe:
    """Write the command and the code that make the average of a selection.

    Args:
        invocation: Arguments of the report.
        run: The whole run.
        selection: The averaged checkpoints.
        recomputes: True to recompute BatchNorm statistics.
    """
    out = f"averaged{_suffix(selection)}"
    command = None
    if invocation.command is not None:
        words = [*invocation.command]
        if recomputes:
            words += invocation.command_recomputing
        command = " ".join(map(quote, [*words, "-o", out]))
    python = _write_python(invocation, run, selection, out, recomputes=recomputes)
    return Recipe(command, python, out, recomputes)


def _suffix(selection: Run) -> str:
    """Return the suffix of an output that has what its inputs have."""
    last = selection.checkpoints[-1].path
    suffix = PurePosixPath(last.name).suffix
    if not last.is_dir() and has_suffix(last.name) and suffix.isascii():
        return suffix
    return _DEFAULT_SUFFIX


def _write_python(
    invocation: Invocation, run: Run, selection: Run, out: str, *, recomputes: bool
) -> str:
    """Write the Python code that makes the average."""
    paths: Sequence[str] = invocation.paths
    selecting = None
    if paths:
        selecting = _selecting_code(run, selection)
    if selecting is None:
        paths, selecting = [str(checkpoint.path) for checkpoint in selection.checkpoints], ""
    keywords: dict[str, Any] = {**invocation.averaging, "out": out}
    written = [f"run{selecting}", *_write_keywords(keywords)]
    if recomputes:
        arguments = ["model", "train_data", *_write_keywords(invocation.recomputing)]
        written.append(_call("recompute=ckptavg.Recompute", arguments, indent=4))
    opening = [*map(_literal, paths), *_write_keywords(invocation.opening)]
    return "\n".join(
        ["import ckptavg", "", _call("run = ckptavg.open_run", opening),
         _call("ckptavg.average", written)]
    )  # fmt: skip


def _selecting_code(run: Run, selection: Run) -> str | None:
    """Write the method that selects what a selection holds; None where none is simple."""
    wanted = _paths(selection)
    if wanted == _paths(run):
        return ""
    most = max(map(len, selection.trainings))
    if wanted == _paths(run.last(most)):
        return f".last({most})"
    try:
        if wanted == _paths(run.at_lr_min()):
            return ".at_lr_min()"
    except RunError:
        # Without a recorded learning rate there are no minima.
        pass
    return None


def _paths(run: Run) -> list[str]:
    return [str(checkpoint.path) for checkpoint in run.checkpoints]


def _write_keywords(keywords: Mapping[str, Any]) -> list[str]:
    return [f"{name}={_literal(value)}" for name, value in keywords.items()]


def _literal(value: Any) -> str:
    """Write a value as Python does; what cannot be seen is escaped."""
    if isinstance(value, tuple):
        value = list(value)
    if isinstance(value, str):
        value = without_secrets(value)
    return escape_unseen(repr(value))


def _call(function: str, arguments: Sequence[str], indent: int = 0) -> str:
    """Write a call in one line, or with an argument per line where it gets long.

    Args:
        function: Text before the parenthesis.
        arguments: Arguments, with line breaks or without.
        indent: Blanks before the call.
    """
    line = f"{function}({', '.join(arguments)})"
    if len(line) + indent < _LINE and "\n" not in line:
        return line
    blanks = " " * indent
    lines = [f"{blanks}    {argument}," for argument in arguments]
    return "\n".join([f"{function}(", *lines, f"{blanks})"])
