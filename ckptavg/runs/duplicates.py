"""Checkpoints with the same weights, found by reading as little as possible."""

from __future__ import annotations

import bisect
import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal

from ckptavg.errors.system import guard_reads
from ckptavg.formats.checkpoint import Checkpoint, Piece, Tensor
from ckptavg.formats.torch_save import zip_reader
from ckptavg.io import paths

_HEAD = 4096  # bytes of each tensor that are looked at first: most differ there already
_BLOCK = 1 << 20
Extent = Literal["head", "whole"]


class SameWeights:
    """Some checkpoints, among which one with the same tensors as another is found.

    No byte is read twice, however many checkpoints there are, and none where the checksums of zip
    files or a remote store tell.

    Args:
        contents: What is known of the bytes in their files; several of these may share it.
    """

    def __init__(self, contents: Contents) -> None:
        self._contents = contents
        self._families: dict[object, _Family] = {}

    def find(self, checkpoint: Checkpoint) -> Checkpoint | None:
        """The first of them that holds the same tensors, whatever else the files hold.

        Raises:
            CheckpointError: A file cannot be read.
        """
        family = self._families.get(_form(checkpoint))
        return None if family is None else family.find(checkpoint)

    def add(self, checkpoint: Checkpoint) -> None:
        """Put one more among them; it is read once it has to be compared."""
        form = _form(checkpoint)
        if form not in self._families:
            self._families[form] = _Family(self._contents)
        self._families[form].add(checkpoint)


@dataclass(frozen=True, slots=True)
class _Range:
    """The bytes that a piece of a tensor spans in its file."""

    file: str
    start: int
    size: int


@dataclass(frozen=True, slots=True)
class _Part:
    """Where in its storage a range begins, and the storage's size and checksum."""

    within: int
    size: int
    checksum: int


class Contents:
    """What is known of ranges of files: the checksums of zip files, digests of what was read."""

    def __init__(self) -> None:
        self._entries: dict[str, tuple[list[int], list[zip_reader.StoredEntry]]] = {}
        self._starts: dict[tuple[str, int], int] = {}
        self._digests: dict[tuple[_Range, Extent], bytes] = {}

    def part(self, span: _Range) -> _Part | None:
        """The part of a storage that a range is; None where the storage has no checksum."""
        if span.file not in self._entries:
            entries = zip_reader.storages(span.file)
            self._entries[span.file] = [stored.entry.header for stored in entries], entries
        offsets, entries = self._entries[span.file]
        i = bisect.bisect_right(offsets, span.start) - 1
        if i < 0:
            return None
        entry = entries[i].entry
        if span.size == entry.size:  # all of it: where it begins need not be read
            return _Part(0, entry.size, entry.crc)
        within = span.start - self._start(span.file, i)
        fits = within >= 0 and within + span.size <= entry.size
        return _Part(within, entry.size, entry.crc) if fits else None

    def _start(self, path: str, i: int) -> int:
        """The offset in its file of a storage's first byte."""
        if (path, i) not in self._starts:
            self._starts[path, i] = self._entries[path][1][i].start(path)
        return self._starts[path, i]

    def digest(self, span: _Range, extent: Extent) -> bytes:
        """A digest of a range's first bytes, or of all of them."""
        if (span, extent) not in self._digests:
            digest = hashlib.blake2b(digest_size=16)
            for block in _blocks(span, _HEAD if extent == "head" else None):
                digest.update(block)
            self._digests[span, extent] = digest.digest()
        return self._digests[span, extent]


class _Family:
    """Checkpoints whose tensors are laid out alike, by their contents."""

    def __init__(self, contents: Contents) -> None:
        self._contents = contents
        self._new: list[Checkpoint] = []
        self._by_store: dict[object, Checkpoint] = {}
        self._by_checksums: dict[object, Checkpoint] = {}
        self._by_bytes = _Tree(contents)
        self._summed: list[Checkpoint] = []  # by checksums, and not by bytes as yet

    def add(self, checkpoint: Checkpoint) -> None:
        self._new.append(checkpoint)
        if contents := _stored_contents(checkpoint):
            self._by_store.setdefault(contents, checkpoint)

    def find(self, checkpoint: Checkpoint) -> Checkpoint | None:
        known = self._by_store.get(_stored_contents(checkpoint))
        if known is not None:  # before anything is read
            return known
        for member in self._new:
            self._sort_in(member)
        self._new = []
        parts = self._parts(checkpoint)
        known = None if parts is None else self._by_checksums.get(parts)
        if known is not None:
            return known
        if not _is_decided(checkpoint, parts):
            for member in self._summed:
                self._by_bytes.add(member)
            self._summed = []
        return self._by_bytes.find(checkpoint)

    def _sort_in(self, member: Checkpoint) -> None:
        parts = self._parts(member)
        if parts is not None:
            self._by_checksums.setdefault(parts, member)
        if _is_decided(member, parts):
            self._summed.append(member)
        else:
            self._by_bytes.add(member)

    def _parts(self, checkpoint: Checkpoint) -> tuple[_Part, ...] | None:
        """The parts of storages that its tensors are; None where a checksum lacks."""
        parts: list[_Part] = []
        for span in _ranges(checkpoint):
            part = self._contents.part(span)
            if part is None:
                return None
            parts.append(part)
        return tuple(parts)


def _is_decided(checkpoint: Checkpoint, parts: Sequence[_Part] | None) -> bool:
    """Whether checksums tell it from all others that have them: each is of one tensor alone."""
    if parts is None:
        return False
    return all(s.size == p.size for s, p in zip(_ranges(checkpoint), parts, strict=True))


def _stored_contents(checkpoint: Checkpoint) -> object:
    """Equal where a remote store knows the files to be the same; None where it does not tell."""
    contents = tuple(paths.content_of(stamp.token) for stamp in checkpoint.files)
    return contents if all(contents) else None


@dataclass(frozen=True)
class _Member:
    """A checkpoint and the ranges that are compared of it, in their order."""

    checkpoint: Checkpoint
    looks: list[tuple[_Range, Extent]]


@dataclass
class _Node:
    """Checkpoints that are equal in some first ranges.

    Attributes:
        member: The only one, if there is one only, or if no range is left to tell them apart.
        children: The nodes of several, by the digest of the next range.
    """

    member: _Member | None = None
    children: dict[bytes, _Node] = field(default_factory=dict)


class _Tree:
    """Checkpoints by the bytes of their ranges, of which as many are read as tell them apart.

    The heads of all ranges come first.
    """

    def __init__(self, contents: Contents) -> None:
        self._contents = contents
        self._root: _Node | None = None

    def find(self, checkpoint: Checkpoint) -> Checkpoint | None:
        """The member whose ranges all have the same bytes."""
        if self._root is None:
            return None
        node, _ = self._descend(self._root, _looks(checkpoint))
        return None if node.member is None else node.member.checkpoint

    def add(self, checkpoint: Checkpoint) -> None:
        """Put a checkpoint in, unless an equal one is there."""
        member = _Member(checkpoint, _looks(checkpoint))
        if self._root is None:
            self._root = _Node(member)
            return
        node, digest = self._descend(self._root, member.looks)
        if digest is not None:
            node.children[digest] = _Node(member)

    def _descend(
        self, node: _Node, looks: Sequence[tuple[_Range, Extent]]
    ) -> tuple[_Node, bytes | None]:
        """The last node on a checkpoint's way, and the digest that leads no further from there.

        The digest is None at the end of the ranges.
        """
        for depth, look in enumerate(looks):
            if node.member is not None:  # it has not been read this far
                digest = self._contents.digest(*node.member.looks[depth])
                node.children[digest] = _Node(node.member)
                node.member = None
            digest = self._contents.digest(*look)
            if digest not in node.children:
                return node, digest
            node = node.children[digest]
        return node, None


def _looks(checkpoint: Checkpoint) -> list[tuple[_Range, Extent]]:
    """The ranges in the order in which they are compared: the heads of all, then the long ones."""
    ranges = _ranges(checkpoint)
    heads: list[tuple[_Range, Extent]] = [(span, "head") for span in ranges]
    return heads + [(span, "whole") for span in ranges if span.size > _HEAD]


def _form(checkpoint: Checkpoint) -> object:
    """Equal for checkpoints whose tensors are laid out alike under the same names."""
    tensors = tuple((name, _form_of(tensor)) for name, tensor in _by_name(checkpoint))
    return tensors, frozenset(checkpoint.refused.items())


def _by_name(checkpoint: Checkpoint) -> list[tuple[str, Tensor]]:
    return sorted(checkpoint.tensors.items(), key=lambda item: item[0])


def _form_of(tensor: Tensor) -> object:
    return tensor.dtype.name, tensor.shape, tuple(map(_form_of_piece, tensor.pieces))


def _form_of_piece(piece: Piece) -> object:
    """Equal for pieces whose elements follow each other alike: some strides mean nothing."""
    strides = [s for n, s in zip(piece.shape, piece.stride, strict=True) if n > 1]
    return piece.shape, piece.start, () if 0 in piece.shape else tuple(strides)


def _ranges(checkpoint: Checkpoint) -> list[_Range]:
    """The bytes of all tensors, in the order of their names."""
    return [
        _Range(piece.file, *(piece.text or (piece.offset, tensor.dtype.nbytes(_span(piece)))))
        for _, tensor in _by_name(checkpoint)
        for piece in tensor.pieces
        if 0 not in piece.shape
    ]


def _span(piece: Piece) -> int:
    """Elements from a piece's first to its last, in the file."""
    return 1 + sum((n - 1) * s for n, s in zip(piece.shape, piece.stride, strict=True))


def _blocks(span: _Range, limit: int | None) -> Iterator[bytes]:
    size = span.size if limit is None else min(span.size, limit)
    with guard_reads(span.file), paths.open_binary(span.file) as file:
        file.seek(span.start)
        for done in range(0, size, _BLOCK):
            yield file.read(min(_BLOCK, size - done))
