"""Results kept in a file by digests of files, data and options, for ``--resume``."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ckptavg.distributed.peers import global_rank
from ckptavg.distributed.torchrun import TorchrunGroup
from ckptavg.errors import OutputError
from ckptavg.specs.importing import file_of

if TYPE_CHECKING:
    from ckptavg.evaluation.candidates import Candidate
    from ckptavg.evaluation.results import Result
    from ckptavg.evaluation.results_file import ResultsFile

log = logging.getLogger("ckptavg")

_DECISIVE = (
    "model_spec", "model_arg", "data", "data_arg", "task", "forward", "amp", "batch_size",
    "seed",
)  # fmt: skip
_OF_AVERAGES = ("include", "exclude", "base", "dtype", "on_nonfinite")
_OF_STATISTICS = ("train_data", "train_data_arg", "bn_samples", "bn_exclude")
_SPECIFICATIONS = ("model_spec", "data", "task", "forward", "train_data")
_ARGUMENTS = ("data_arg", "train_data_arg")  # which may name a transform


class Keeper:
    """Store of candidates' results in a file, written after each pass.

    Args:
        candidates: All that are wanted, in the table's order.
        settings: The command's options.
        file: Where results go, if anywhere.
        resume: Whether what is there already is taken.
        processes: Those that do the same; the first reads and writes for all.

    Attributes:
        missing: The candidates to score: those that are not there, and the one that they are
            compared with.
    """

    def __init__(
        self,
        candidates: Sequence[Candidate],
        settings: Mapping[str, Any],
        file: ResultsFile | None,
        *,
        resume: bool,
        processes: TorchrunGroup | None,
    ) -> None:
        from ckptavg.evaluation.candidates import (  # noqa: PLC0415 - help is shown without torch
            baseline_of,
        )

        self.candidates = candidates
        self.file = file if global_rank() == 0 else None
        reference = baseline_of(candidates)
        self.keys = keys_of(candidates, reference, settings)
        kept_results = _whole_results(self.file) if resume and self.file is not None else {}
        if processes is not None:  # hosts may see other paths and times: the first decides
            self.keys, kept_results = processes.gather([self.keys, kept_results])[0]
        self.held = {key: kept_results[key] for key in self.keys if key in kept_results}
        lacking = [
            c for c, key in zip(candidates, self.keys, strict=True) if key not in kept_results
        ]
        if lacking and not any(c is reference for c in lacking):
            lacking.insert(0, reference)
        self.missing = lacking
        if resume and file is not None:
            held_ones = sum(key in self.held for key in self.keys)  # the same may stand there twice
            log.info("%d of %d candidates are in %s", held_ones, len(candidates), file.path)

    def merged(self, scored: Sequence[Result]) -> list[Result]:
        """Merge new results and kept ones, in the order of the candidates."""
        from ckptavg.evaluation.results import Result  # noqa: PLC0415

        new = {id(result.candidate): result for result in scored}
        results = []
        for candidate, key in zip(self.candidates, self.keys, strict=True):
            if key in self.held:
                results.append(Result.of_json(candidate, self.held[key]))
            elif id(candidate) in new:
                results.append(new[id(candidate)])
        return results

    def outcome(self, results: Sequence[Result]) -> dict[str, Any]:
        """Return results as plain values, each with the candidate's key."""
        keys = {id(c): key for c, key in zip(self.candidates, self.keys, strict=True)}
        return {"candidates": [r.as_json() | {"key": keys[id(r.candidate)]} for r in results]}

    def keep(self, results: Sequence[Result]) -> int:
        """Write results into the file, if there is one.

        Returns:
            How many results of other candidates stay in it.

        Raises:
            OutputError: They cannot be written.
        """
        return 0 if self.file is None else self.file.merge(self.outcome(results)["candidates"])

    def keep_so_far(self, scored: Sequence[Result]) -> None:
        """Keep the results of some candidates; a failure is noted, and the work goes on."""
        try:
            self.keep(self.merged(scored))
        except OutputError as error:
            log.warning("%s (the evaluation goes on)", error)


def keys_of(
    candidates: Sequence[Candidate], reference: Candidate, settings: Mapping[str, Any]
) -> list[str]:
    """Compute a digest per candidate of all that decides the result, the baseline included."""
    of_reference = [reference.name, _digest(_decisive(reference, settings))]
    return [
        _digest(_decisive(c, settings) | ({} if c is reference else {"reference": of_reference}))
        for c in candidates
    ]


def _decisive(candidate: Candidate, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Collect all that decides a candidate's scores: weights, data, options.

    Files count by path, size and time, those of Python too; a directory of data by its name alone.
    """
    names = [*_DECISIVE]
    names += _OF_AVERAGES if candidate.average is not None else ()
    names += _OF_STATISTICS if candidate.recompute else ()
    planned = candidate.average
    files = [
        (str(c.path.resolve()), c.key, c.size, [stamp.mtime_ns for stamp in c.files])
        for c in (candidate.checkpoints if planned is None else planned.plan.inputs)
    ]
    named = [settings[name] for name in _SPECIFICATIONS if name in names and settings.get(name)]
    pairs = [pair for name in _ARGUMENTS if name in names for pair in settings.get(name) or ()]
    named += [pair.partition("=")[2] for pair in pairs]
    return {
        "kind": candidate.kind,
        "files": files,
        "sources": [(f.stat().st_size, f.stat().st_mtime_ns) for f in map(file_of, named) if f],
        "coefficients": candidate.coefficients,
        "options": {name: settings.get(name) for name in names},
    }


def _digest(value: Mapping[str, Any]) -> str:
    text = json.dumps(value, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _whole_results(file: ResultsFile) -> dict[str, Mapping[str, Any]]:
    """Return the complete results in a file, by key."""
    return {entry["key"]: entry for entry in file.entries() if _is_whole(entry)}


def _is_whole(entry: Mapping[str, Any]) -> bool:
    """Return True if an entry has every figure; JSON has no word for NaN or infinity."""
    versus = entry.get("versus", {})
    figures = [entry.get("key"), *entry["metrics"].values()]
    return isinstance(versus, Mapping) and None not in (*figures, *versus.values())
