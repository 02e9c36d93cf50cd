"""Results of candidates in a file, which a later evaluation continues."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ckptavg.distributed.peers import Peers
from ckptavg.errors import OutputError
from ckptavg.evaluation.candidates import Candidate, baseline_of
from ckptavg.evaluation.results import Result
from ckptavg.evaluation.results_file import Entry, ResultsFile

log = logging.getLogger("ckptavg")


@dataclass(frozen=True)
class Identity:
    """Identity of the model, the data and the options that decide a candidate's scores.

    Attributes:
        options: Plain values by name.
        sources: Size and modification time of each file that the options name.
    """

    options: Mapping[str, Any]
    sources: Sequence[tuple[int, int]] = ()


Identify = Callable[[Candidate], Identity]
"""Function that returns the identity of all that decides a candidate's scores beside weights."""


class ResultStore:
    """Results of candidates in a file, under a key each.

    A key is a digest of weights, model, data and options, so a changed input is scored anew.

    Args:
        candidates: All wanted candidates, in the table's order.
        identify: Returns the identity of model, data and options for a candidate.
        file: The file of results; None to store nothing.
        resume: True to use the results in the file.
        peers: The processes that score the same candidates; the first reads and writes the file.

    Attributes:
        missing: The candidates to score: candidates without a stored result, and the baseline that
            these are compared with.
    """

    def __init__(
        self,
        candidates: Sequence[Candidate],
        identify: Identify,
        file: ResultsFile | None,
        *,
        resume: bool,
        peers: Peers,
    ) -> None:
        self.candidates = candidates
        self.file = file if peers.rank == 0 else None
        keys = keys_of(candidates, identify)
        stored: dict[str, Entry] = {}
        if resume and self.file is not None:
            stored = _complete_entries(self.file)
        # Hosts may see other paths and times, so the first process decides.
        self.keys: list[str]
        self._stored: dict[str, Entry]
        self.keys, self._stored = peers.gather([keys, stored])[0]
        self.missing = self._find_missing()
        if resume and file is not None:
            stored_count = sum(key in self._stored for key in self.keys)
            log.info("%d of %d candidates are in %s", stored_count, len(candidates), file.path)

    def merge(self, scored: Sequence[Result]) -> list[Result]:
        """Merge new results and stored results, in the order of the candidates.

        Candidates that are neither scored nor stored are left out.
        """
        results = []
        for candidate, key in zip(self.candidates, self.keys, strict=True):
            if key in self._stored:
                results.append(Result.of_json(candidate, self._stored[key]))
                continue
            for result in scored:
                if result.candidate is candidate:
                    results.append(result)
                    break
        return results

    def to_json(self, results: Sequence[Result]) -> dict[str, Any]:
        """Convert results to plain values for JSON, with the key of each candidate."""
        entries = []
        for result in results:
            entries.append({**result.as_json(), "key": self._key_of(result.candidate)})
        return {"candidates": entries}

    def save(self, results: Sequence[Result]) -> int:
        """Write results to the file, if there is one.

        Returns:
            The number of results of other candidates that stay in the file.

        Raises:
            OutputError: The results cannot be written.
        """
        if self.file is None:
            return 0
        return self.file.merge(self.to_json(results)["candidates"])

    def save_so_far(self, scored: Sequence[Result]) -> None:
        """Save the results of some candidates; a failure is noted, and the evaluation goes on."""
        try:
            self.save(self.merge(scored))
        except OutputError as error:
            log.warning("%s (the evaluation goes on)", error)

    def save_all(self, results: Sequence[Result]) -> OutputError | None:
        """Save the results of all candidates, and note results of other candidates in the file.

        Returns:
            The failure, if the results cannot be written; the caller still has the scores to show.
        """
        try:
            other_count = self.save(results)
        except OutputError as error:
            return error
        if other_count and self.file is not None:
            log.info("%s keeps results of other candidates: %d", self.file.path, other_count)
        return None

    def _find_missing(self) -> list[Candidate]:
        missing = []
        for candidate, key in zip(self.candidates, self.keys, strict=True):
            if key not in self._stored:
                missing.append(candidate)
        baseline = baseline_of(self.candidates)
        if missing and not any(candidate is baseline for candidate in missing):
            # A comparison needs the baseline's values per sample, which the file does not hold.
            missing.insert(0, baseline)
        return missing

    def _key_of(self, candidate: Candidate) -> str:
        # Compared by identity: candidates with equal weights may differ in name.
        position = next(i for i, known in enumerate(self.candidates) if known is candidate)
        return self.keys[position]


def keys_of(candidates: Sequence[Candidate], identify: Identify) -> list[str]:
    """Compute a digest per candidate of all that decides the result, the baseline included.

    Args:
        candidates: At least one candidate.
        identify: Returns the identity of model, data and options for a candidate.
    """
    baseline = baseline_of(candidates)
    baseline_key = digest_of(_describe(baseline, identify))
    keys = []
    for candidate in candidates:
        description = _describe(candidate, identify)
        if candidate is not baseline:
            # A result holds its comparison, so that another baseline asks for a new result.
            description["reference"] = [baseline.name, baseline_key]
        keys.append(digest_of(description))
    return keys


def _describe(candidate: Candidate, identify: Identify) -> dict[str, Any]:
    """Collect all that decides a candidate's scores: weights, data, options.

    Files count by path, size and time; a directory of data by its name alone.
    """
    checkpoints: Sequence[Any] = candidate.checkpoints
    if candidate.planned:
        # With the base, whose tensors count for the scores as well.
        checkpoints = candidate.planned[0].plan.inputs
    files = []
    for checkpoint in checkpoints:
        times = [stamp.mtime_ns for stamp in checkpoint.files]
        files.append((str(checkpoint.path.resolve()), checkpoint.key, checkpoint.size, times))
    identity = identify(candidate)
    description: dict[str, Any] = {
        "kind": candidate.kind,
        "files": files,
        "sources": identity.sources,
        "coefficients": candidate.coefficients,
        "options": identity.options,
    }
    if candidate.perturbation is not None:
        description["perturbation"] = repr(candidate.perturbation)
    if candidate.swag is not None:
        description["swag"] = candidate.swag.describe(len(candidate.checkpoints))
    return description


def digest_of(value: Mapping[str, Any]) -> str:
    """Compute a digest of plain values; of other values the text counts."""
    text = json.dumps(value, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _complete_entries(file: ResultsFile) -> dict[str, Entry]:
    """Return the complete results in a file by key."""
    return {entry["key"]: entry for entry in file.entries() if _is_complete(entry)}


def _is_complete(entry: Entry) -> bool:
    """Return True if a result has a key and all figures; JSON has no NaN and no infinity."""
    comparison = entry.get("versus", {})
    if not isinstance(comparison, Mapping):
        return False
    return None not in (entry.get("key"), *entry["metrics"].values(), *comparison.values())
