"""Scores of a search in a file, written pass by pass and continued by a later search."""

from __future__ import annotations

import base64
import logging
import os
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from ckptavg.display.json_text import json_text
from ckptavg.distributed.peers import Peers
from ckptavg.errors import OutputError, UsageError
from ckptavg.errors.system import guard_writes
from ckptavg.io import bounded_json
from ckptavg.io.atomic import Publication
from ckptavg.models.batches import bytes_of
from ckptavg.searching.election import Scored

log = logging.getLogger("ckptavg")
_KIND = "search"
_ELSEWHERE = "Name another file for the results, or move that one away."


class ScoreStore:
    """File of the scores of a search.

    Each entry has a key: a digest of weights, model, data and options. So a changed input is scored
    anew. The values of the samples are stored as compressed bytes in base 85.

    Args:
        path: ``.json`` file; None to store nothing.
        resume: True to use the scores in the file.
        peers: The processes that score the same candidates; the first reads and writes the file.

    Raises:
        UsageError: The file has another suffix, or there is none to resume.
        OutputError: The directory does not exist, or the file holds something else.
    """

    def __init__(self, path: str | os.PathLike[str] | None, *, resume: bool, peers: Peers) -> None:
        self._path: Path | None = None
        self._peers = peers
        self._entries: dict[str, dict[str, Any]] = {}
        if path is None:
            if resume:
                raise UsageError("`resume` needs a `results` file")
            return
        self._path = Path(path)
        if self._path.suffix != ".json":
            raise UsageError(f"the results of a search are a .json file, but got {path}")
        if not self._path.parent.is_dir():
            raise OutputError(
                f"the directory {self._path.parent} does not exist", "Create it first."
            )
        # Also without resuming: a file of something else must not be replaced.
        stored = self._read()
        if resume:
            # Hosts may see other files and times, so the first process decides.
            self._entries = peers.gather(stored)[0]

    def find(self, key: str) -> Mapping[str, Any] | None:
        """Return the entry of a key; None if the candidate is to be scored."""
        return self._entries.get(key)

    def add(self, key: str, scored: Scored) -> None:
        """Add the scores of a candidate; ``save`` writes them."""
        proposal = scored.proposal
        entry: dict[str, Any] = {
            "key": key,
            "name": proposal.name,
            "family": proposal.family,
            "coefficients": list(proposal.coefficients),
            "bn": scored.bn,
            "metrics": dict(scored.metrics),
            "scale": scored.scale,
            "values": _encode(scored.values),
            "weights": None,
        }
        if scored.weights is not None:
            entry["weights"] = _encode(scored.weights)
        self._entries[key] = entry

    def save(self, result: Mapping[str, Any] | None = None) -> None:
        """Write all entries; a failure is noted, since scoring again would take long.

        Args:
            result: The result of the search as plain values; None while it goes on.
        """
        if self._path is None or self._peers.rank != 0:
            return
        plain = {"kind": _KIND, **(result or {}), "scores": list(self._entries.values())}
        try:
            with (
                guard_writes(self._path),
                Publication(self._path, directory=False, overwrite=True) as publication,
            ):
                publication.temporary.write_text(json_text(plain), encoding="utf-8")
                publication.publish()
        except OutputError as error:
            log.warning("%s (the search goes on)", error)

    def _read(self) -> dict[str, dict[str, Any]]:
        """Return the entries of the file by key; none if there is no file.

        Raises:
            OutputError: The file holds something else.
        """
        path = self._path
        if path is None or self._peers.rank != 0 or not path.exists() or not path.stat().st_size:
            return {}
        try:
            stored = bounded_json.read(path)
            if not isinstance(stored, dict) or stored.get("kind") != _KIND:
                raise ValueError("it is no result of a search")
            return {entry["key"]: entry for entry in stored["scores"]}
        except (ValueError, KeyError, TypeError) as error:
            raise OutputError(
                f"{path} is not replaced: it holds no results of a search", _ELSEWHERE
            ) from error


def restore(entry: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of ``Scored`` beside the proposal from an entry of the store.

    Raises:
        OutputError: The entry is damaged.
    """
    try:
        weights = None
        if entry["weights"] is not None:
            weights = _decode(entry["weights"])
        return {
            "bn": entry["bn"],
            "values": _decode(entry["values"]),
            "weights": weights,
            "scale": entry["scale"],
            "metrics": dict(entry["metrics"]),
        }
    except (ValueError, KeyError, TypeError, AttributeError, zlib.error) as error:
        raise OutputError(
            f"the stored scores of {entry.get('name')} are damaged: {error}", _ELSEWHERE
        ) from error


def _encode(values: torch.Tensor) -> list[str]:
    """Encode a tensor of one axis: its dtype, and its bytes compressed."""
    # Right and wrong take a byte per sample, and compress to an eighth or less.
    packed = zlib.compress(bytes_of(values))
    return [str(values.dtype).removeprefix("torch."), base64.b85encode(packed).decode()]


def _decode(encoded: Sequence[str]) -> torch.Tensor:
    dtype_name, text = encoded
    data = bytearray(zlib.decompress(base64.b85decode(text)))
    dtype = _DTYPES[dtype_name]
    if not data:
        return torch.empty(0, dtype=dtype)
    return torch.frombuffer(data, dtype=dtype)


_DTYPES = {
    "uint8": torch.uint8, "int64": torch.int64, "float32": torch.float32, "float64": torch.float64,
}  # fmt: skip
