"""Identity of the command's options, by which ``--resume`` recognizes stored results."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ckptavg.specs.importing import file_of

if TYPE_CHECKING:
    from ckptavg.evaluation.candidates import Candidate
    from ckptavg.evaluation.resume import Identity

_DECISIVE = (
    "model_spec", "model_arg", "data", "data_arg", "task", "forward", "amp", "batch_size",
    "seed",
)  # fmt: skip
_OF_AVERAGES = ("include", "exclude", "base", "dtype", "on_nonfinite")
_OF_STATISTICS = ("train_data", "train_data_arg", "bn_samples", "bn_exclude")
_SPECIFICATIONS = ("model_spec", "data", "task", "forward", "train_data")
# Options whose values may name a transform.
_ARGUMENTS = ("data_arg", "train_data_arg")


def identify(candidate: Candidate, options: Mapping[str, Any]) -> Identity:
    """Return the identity of the model, the data and the options that decide scores.

    Files, Python files too, count by size and time; a directory of data counts by name alone.

    Args:
        candidate: The candidate that is scored.
        options: The command's options by name.
    """
    from ckptavg.evaluation.resume import Identity  # noqa: PLC0415 - help is shown without torch

    names = [*_DECISIVE]
    if candidate.planned:
        names += _OF_AVERAGES
    if candidate.recompute:
        names += _OF_STATISTICS
    decisive = {name: options.get(name) for name in names}
    sources = []
    for spec in _specifications(decisive):
        file = file_of(spec)
        if file is not None:
            status = file.stat()
            sources.append((status.st_size, status.st_mtime_ns))
    return Identity(decisive, sources)


def _specifications(options: Mapping[str, Any]) -> list[str]:
    """List the options' values that may name a file."""
    specifications = [options[name] for name in _SPECIFICATIONS if options.get(name)]
    for name in _ARGUMENTS:
        for pair in options.get(name) or ():
            specifications.append(pair.partition("=")[2])
    return specifications
