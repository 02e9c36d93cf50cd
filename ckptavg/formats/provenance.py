"""Provenance: the record in an output of how ckptavg made the output, as JSON.

The record may be of another version, damaged, or written by another program under the same name.
So it is kept as read, entries of other versions included, and is read by properties that tell None
or nothing for what is malformed.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal

from ckptavg._version import __version__
from ckptavg.formats.running_statistics import LAYERS, Statistics
from ckptavg.io import bounded_json

# The entry of a file, or the metadata, that holds the record.
PROVENANCE = "ckptavg"
# The scheme of a single checkpoint with new statistics.
REFRESHED = "none"
_CHECKSUM = "sha256:"
# Stands for a digest that is not known yet. Its length is that of any digest, so that the digest
# can later be written over it in place.
PENDING = "sha256-tree:" + "0" * 64

Role = Literal["input", "base"]


@dataclass(frozen=True)
class Source:
    """A checkpoint that an output was made of.

    Attributes:
        path: The path as given, or the URL without credentials; None where malformed.
        size: Bytes on disk.
        mtime: Time of the last change, in seconds since 1970.
        step: Position in training.
        coefficient: Coefficient of the checkpoint in the average, normalized; None for a base.
        digest: Digest of the weights; None where none was recorded, or where malformed.
        key: Dotted path of the entry that holds the weights, recorded beside a digest; None where
            malformed.
    """

    path: str | None
    size: int | None = None
    mtime: float | None = None
    step: float | None = None
    coefficient: float | None = None
    digest: str | None = None
    key: str | None = ""

    @classmethod
    def from_entry(cls, entry: Mapping[str, Any]) -> Source:
        """Read the source from its entry in a record."""
        return cls(
            path=_text(entry.get("path")),
            size=_integer(entry.get("size")),
            mtime=_number(entry.get("mtime")),
            step=_number(entry.get("step")),
            coefficient=_number(entry.get("coefficient")),
            digest=_text(entry.get("digest")),
            key=_text(entry.get("key", "")),
        )

    def to_entry(self, role: Role) -> dict[str, Any]:
        """Return the source as plain values for JSON."""
        entry: dict[str, Any] = {"path": self.path}
        if role == "input":
            entry |= {"step": self.step, "coefficient": self.coefficient}
        entry |= {"size": self.size, "mtime": self.mtime}
        if self.digest is not None:
            entry["digest"] = self.digest
            if self.key:
                entry["key"] = self.key
        return entry

    def with_digest(self, digest: str, key: str) -> Source:
        """Return the source with a digest of its weights.

        Args:
            digest: The digest.
            key: Dotted path of the entry that holds the weights.
        """
        return replace(self, digest=digest, key=key)


@dataclass(frozen=True)
class Provenance:
    """The record of how an output was made.

    Attributes:
        entries: The record as plain values for JSON. ``version``, ``scheme``, ``checkpoints`` (each
            with ``path``, ``step``, ``coefficient``, ``size`` in bytes and ``mtime`` in seconds)
            and ``bn``. Where there are any, also ``bn_layers`` (the layers that ``bn`` does not
            hold for, by kind), ``base`` and ``tied`` names. With digests, ``digest`` and ``seal``.
            The record of a directory has ``files`` too, the names of all files.
    """

    entries: Mapping[str, Any]

    @classmethod
    def of(
        cls,
        scheme: str,
        inputs: Iterable[Source],
        statistics: Statistics,
        ties: Sequence[Sequence[str]] = (),
        base: Source | None = None,
    ) -> Provenance:
        """Record the origin of an output.

        Args:
            scheme: The scheme's whole specification.
            inputs: The selected checkpoints, in order.
            statistics: The state of the BatchNorm running statistics.
            ties: Groups of names that share their contents.
            base: The checkpoint that the tensors outside the average come from, where it is not one
                of ``inputs``.
        """
        entries: dict[str, Any] = {
            "version": __version__,
            "scheme": scheme,
            "checkpoints": [source.to_entry("input") for source in inputs],
            **statistics.plain,
        }
        if base is not None:
            entries["base"] = base.to_entry("base")
        if ties:
            entries["tied"] = [list(group) for group in ties]
        return cls(entries)

    @classmethod
    def from_json(cls, text: object) -> Provenance | None:
        """Parse a record; return None for any other value."""
        if not isinstance(text, str):
            return None
        try:
            value = bounded_json.loads(text.encode())
        except ValueError:
            return None
        # Another tool may use the same name for an entry, so the form is checked.
        inputs = value.get("checkpoints") if isinstance(value, dict) else None
        if not isinstance(inputs, list) or not all(map(_is_input, inputs)):
            return None
        return cls(value)

    def to_json(self) -> str:
        """Return the record as JSON."""
        return json.dumps(dict(self.entries))

    @property
    def version(self) -> str | None:
        """The version of ckptavg that made the output."""
        return _text(self.entries.get("version"))

    @property
    def scheme(self) -> str | None:
        """The scheme's whole specification."""
        return _text(self.entries.get("scheme"))

    @property
    def is_average(self) -> bool:
        """True, except for a single checkpoint with new statistics."""
        return self.scheme != REFRESHED

    @cached_property
    def inputs(self) -> tuple[Source, ...]:
        """The selected checkpoints, in order."""
        return tuple(Source.from_entry(entry) for entry in self.entries["checkpoints"])

    @cached_property
    def base(self) -> Source | None:
        """The checkpoint that the tensors outside the average come from; None if an input."""
        base = self.entries.get("base")
        if not isinstance(base, dict):
            return None
        return Source.from_entry(base)

    @property
    def sources(self) -> list[tuple[Role, Source]]:
        """The inputs and the base, each with its role."""
        sources: list[tuple[Role, Source]] = [("input", source) for source in self.inputs]
        if self.base is not None:
            sources.append(("base", self.base))
        return sources

    @property
    def bn(self) -> str | None:
        """The state of the running statistics, see ``ckptavg.formats.running_statistics``."""
        return _text(self.entries.get("bn"))

    @property
    def bn_layers(self) -> dict[str, list[str]]:
        """The layers that ``bn`` does not hold for, by kind; malformed lists are left out."""
        layers = self.entries.get(LAYERS)
        if not isinstance(layers, Mapping):
            return {}
        return {kind: names for kind, names in layers.items() if _is_list_of_text(names)}

    @property
    def files(self) -> list[str]:
        """Names of all files of the output, if the output is a directory."""
        names = self.entries.get("files")
        if not isinstance(names, list):
            return []
        return [name for name in names if isinstance(name, str)]

    @property
    def digest(self) -> str | None:
        """The digest of the output's weights, see ``ckptavg.outputs.digests``."""
        return _text(self.entries.get("digest"))

    @property
    def is_intact(self) -> bool:
        """True if a record with digests has not changed since it was written."""
        return bool(self.entries.get("seal") == self._checksum())

    def with_statistics(self, statistics: Statistics) -> Provenance:
        """Return the record with another state of the running statistics."""
        return Provenance(self._entries_without(LAYERS) | statistics.plain)

    def with_files(self, names: Iterable[str]) -> Provenance:
        """Return the record with the names of all files of a directory, or without any names."""
        # The record may be copied from an input, whose files are not the output's.
        entries = self._entries_without("files")
        if files := sorted(names):
            entries["files"] = files
        return Provenance(entries)

    def with_digests(self, sources: Iterable[Source], output: str = PENDING) -> Provenance:
        """Return the record with digests and a checksum.

        The length of the record does not depend on the values of the digests.

        Args:
            sources: The inputs, then the base if there is one, with digests.
            output: The digest of the output.
        """
        count = len(self.entries["checkpoints"])
        hashed = list(sources)
        entries = {
            **self.entries,
            "checkpoints": [source.to_entry("input") for source in hashed[:count]],
        }
        for base in hashed[count:]:
            entries["base"] = base.to_entry("base")
        return Provenance(entries).with_digest(output)

    def with_digest(self, output: str = PENDING) -> Provenance:
        """Return the record with another digest of the output, and a checksum."""
        return Provenance({**self.entries, "digest": output}).with_checksum()

    def with_checksum(self) -> Provenance:
        """Return the record with a checksum of itself if it has digests.

        By the checksum, damage to the record is detected.
        """
        if self.digest is None:
            return self
        return Provenance({**self.entries, "seal": self._checksum()})

    def _entries_without(self, name: str) -> dict[str, Any]:
        return {key: value for key, value in self.entries.items() if key != name}

    def _checksum(self) -> str:
        # With sorted keys, a tool that rewrites the JSON in another order does not break the seal.
        text = json.dumps(self._entries_without("seal"), sort_keys=True)
        return _CHECKSUM + hashlib.sha256(text.encode()).hexdigest()


def _is_input(entry: object) -> bool:
    """Return True if an entry describes a checkpoint as ckptavg does."""
    return isinstance(entry, dict) and all(
        entry.get(key) is None or _number(entry[key]) is not None for key in ("step", "coefficient")
    )


def _number(value: object) -> float | None:
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        return None
    # A float ends at 2**1024, and JSON can hold an int of any size.
    if isinstance(value, int) and abs(value) >= 2**1000:
        return None
    return value


def _integer(value: object) -> int | None:
    return value if isinstance(value, int) else None


def _text(value: object) -> str | None:
    return value if isinstance(value, str) else None


def _is_list_of_text(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(item, str) for item in value)
