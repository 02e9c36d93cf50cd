"""Verification of checkpoints against recorded digests and the checksums of zip files."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from ckptavg.averaging.stream import Progress, StreamRequests, stream
from ckptavg.display.progress import ProgressLike, open_phase
from ckptavg.errors import CkptavgError, first_few, short
from ckptavg.formats import Checkpoint, open_checkpoint
from ckptavg.formats.provenance import Role, Source
from ckptavg.formats.torch_save import zip_checksums
from ckptavg.io.paths import Location, is_url, locate
from ckptavg.outputs.digests import InputDigests
from ckptavg.runs.run import Run, RunLike, as_run

Part = Literal["weights", "record", "archive", "input", "base"]
State = Literal["same", "changed", "not there", "unreadable", "nothing recorded"]


@dataclass(frozen=True)
class Finding:
    """Result of one comparison.

    Attributes:
        path: Path of the compared file, as given.
        part: The compared part: ``weights``; ``record``, the account of how the checkpoint was
            made; ``archive``, whose entries have checksums; the weights of an ``input`` or of the
            ``base``.
        state: The result; ``nothing recorded`` for a checkpoint that nothing can be compared with.
        why: Reason; empty where the state needs none.
    """

    path: str
    part: Part
    state: State
    why: str = ""

    @property
    def wrong(self) -> bool:
        """True for a changed or unreadable part."""
        # A missing input is not wrong: inputs may be deleted after averaging.
        return self.state in ("changed", "unreadable")


def verify(run: RunLike, *, key: str | None = None, progress: ProgressLike = None) -> list[Finding]:
    """Compare checkpoints, and the averages beside them, with what was recorded of them.

    Averages have digests of their own weights and of their inputs where they were made with
    ``digests=True``. The entries of ``torch.save`` files have checksums.

    Args:
        run: A run or a checkpoint; or the path of one.
        key: Dotted path of the entry that holds the weights, for the averages beside a run.
        progress: True for a bar, a bar of tqdm, or a function of (phase, done, total) in bytes read
            of each checkpoint; see ``ckptavg.display.progress``.

    Returns:
        A finding per comparison, at least one per checkpoint. ``wrong`` tells the bad ones.

    Raises:
        CkptavgError: The run cannot be opened.
    """
    opened = as_run(run)
    findings: list[Finding] = []
    with open_phase(progress, "verifying", "bytes") as report:
        verifier = Verifier(report)
        for checkpoint in (*opened, *_averages_beside(opened, key)):
            findings += verifier.verify(checkpoint) or [_unknown(checkpoint)]
    return findings


def _averages_beside(run: Run, key: str | None) -> Iterator[Checkpoint]:
    """Yield the averages beside the checkpoints of a run that record digests."""
    for left_out in run.excluded:
        try:
            checkpoint = open_checkpoint(left_out.path, key)
        # Not every file that a run leaves out can be opened.
        except CkptavgError:
            continue
        provenance = checkpoint.provenance
        if provenance is not None and provenance.digest is not None:
            yield checkpoint


def _unknown(checkpoint: Checkpoint) -> Finding:
    return Finding(str(checkpoint.path), "weights", "nothing recorded")


class Verifier:
    """Comparison of checkpoints with recorded digests; every checkpoint is hashed only once.

    Args:
        progress: Called with the bytes read of each checkpoint in turn.
    """

    def __init__(self, progress: Progress | None = None) -> None:
        self._progress = progress
        self._digests: dict[tuple[str, str], str] = {}

    def verify(self, checkpoint: Checkpoint) -> list[Finding]:
        """Compare a checkpoint with its recorded digests, and its inputs with theirs.

        Inputs are looked up at the recorded path. A relative path is also tried below the
        directory of the checkpoint and below every parent directory.

        Returns:
            The findings; empty where nothing was recorded.
        """
        findings = _check_archives(checkpoint)
        provenance = checkpoint.provenance
        if provenance is None or provenance.digest is None:
            return findings
        path = str(checkpoint.path)
        findings.append(Finding(path, "record", _state_of(provenance.is_intact)))
        findings.append(self._compare(checkpoint, "weights", path, provenance.digest))
        home = checkpoint.path.parent
        for role, source in provenance.sources:
            findings.append(self._verify_source(role, source, home))
        return findings

    def _verify_source(self, role: Role, source: Source, home: Location) -> Finding:
        """Compare a source at every place where it may be; a file that is the same wins."""
        path, digest, key = source.path, source.digest, source.key
        if path is None or digest is None or key is None:
            return Finding(short(path), role, "unreadable", "the record of it is malformed")
        finding = Finding(path, role, "not there")
        try:
            for candidate in _places(path, home):
                comparison = self._open_and_compare(candidate, role, key, digest)
                if comparison.state == "same":
                    return comparison
                if finding.state == "not there":
                    finding = comparison
        # A remote store may not answer, or the scheme of its URL may be unknown.
        except CkptavgError as error:
            return Finding(path, role, "not there", error.message)
        return finding

    def _open_and_compare(self, place: Location, part: Part, key: str, expected: str) -> Finding:
        try:
            checkpoint = open_checkpoint(place, key)
        except CkptavgError as error:
            return Finding(str(place), part, "unreadable", error.message)
        return self._compare(checkpoint, part, str(place), expected)

    def _compare(self, checkpoint: Checkpoint, part: Part, path: str, expected: str) -> Finding:
        key = (path, checkpoint.key)
        try:
            if key not in self._digests:
                self._digests[key] = digest(checkpoint, self._progress)
        except CkptavgError as error:
            return Finding(path, part, "unreadable", error.message)
        return Finding(path, part, _state_of(self._digests[key] == expected))


def _state_of(same: bool) -> State:
    return "same" if same else "changed"


def digest(checkpoint: Checkpoint, progress: Progress | None = None) -> str:
    """Compute the digest of a checkpoint's weights; see ``ckptavg.outputs.digests``.

    Raises:
        CheckpointError: The checkpoint cannot be read, or changes while being read.
    """
    inputs = InputDigests([checkpoint])
    stream([], StreamRequests(observed=inputs.tensors, observer=inputs.watch), progress=progress)
    # A file that changed while being read has no meaningful digest.
    for stamp in checkpoint.files:
        stamp.verify()
    return inputs.of(checkpoint)


def _check_archives(checkpoint: Checkpoint) -> list[Finding]:
    """Check the entries of a checkpoint's zip files against the CRC-32, which torch ignores."""
    findings: list[Finding] = []
    for stamp in checkpoint.files:
        try:
            damaged = zip_checksums.damaged_entries(stamp.path)
        except CkptavgError as error:
            findings.append(Finding(stamp.path, "archive", "unreadable", error.message))
            continue
        if damaged is not None:
            why = f"not what their CRC-32 tells: {first_few(damaged)}" if damaged else ""
            findings.append(Finding(stamp.path, "archive", _state_of(not damaged), why))
    return findings


def _places(name: str, home: Location) -> Iterator[Location]:
    """Yield the existing locations where an input of a recorded name may be.

    Args:
        name: The recorded path or URL.
        home: Directory of the checkpoint that records the input.

    Raises:
        CkptavgError: The name is a URL that cannot be reached.
    """
    if is_url(name):
        candidates: list[Location] = [locate(name)]
    elif Path(name).is_absolute():
        candidates = [Path(name)]
    elif isinstance(home, Path):
        above = home.absolute()
        candidates = [Path(name), *(directory / name for directory in (above, *above.parents))]
    else:
        candidates = [Path(name), locate(f"{home}/{name}")]
    for candidate in dict.fromkeys(candidates):
        if _is_there(candidate):
            yield candidate


def _is_there(place: Location) -> bool:
    if isinstance(place, Path):
        # Path.exists raises an error for names that no file can have, such as very long ones.
        return os.path.exists(place)  # noqa: PTH110
    return place.exists()
