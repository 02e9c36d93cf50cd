"""Search for checkpoints with the same weights, by as few reads as possible."""

from __future__ import annotations

import bisect
import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal

from ckptavg.errors.system import guard_reads
from ckptavg.formats.checkpoint import Checkpoint, Piece, Tensor
from ckptavg.formats.torch_save import zip_checksums
from ckptavg.io import paths

# Bytes at the beginning of each tensor that are compared first. Most tensors differ there already.
_HEAD = 4096
# Bytes per read.
_BLOCK = 1 << 20
Extent = Literal["head", "whole"]


class SameWeights:
    """Collection of checkpoints with a search for equal tensors.

    No byte is read twice, however many checkpoints there are. No byte is read where the checksums
    of zip files or of a remote store decide.

    Args:
        contents: Cache of checksums and digests, which several collections may share.
    """

    def __init__(self, contents: Contents) -> None:
        self._contents = contents
        self._families: dict[object, _Family] = {}

    def find(self, checkpoint: Checkpoint) -> Checkpoint | None:
        """Find the first added checkpoint with the same tensors, whatever else the files hold.

        Raises:
            CheckpointError: A file cannot be read.
        """
        family = self._families.get(_form(checkpoint))
        if family is None:
            return None
        return family.find(checkpoint)

    def add(self, checkpoint: Checkpoint) -> None:
        """Add a checkpoint, which is read only when a comparison needs the bytes."""
        form = _form(checkpoint)
        if form not in self._families:
            self._families[form] = _Family(self._contents)
        self._families[form].add(checkpoint)


@dataclass(frozen=True, slots=True)
class _Range:
    """Range of bytes that a piece of a tensor spans in a file."""

    file: str
    start: int
    size: int


@dataclass(frozen=True, slots=True)
class _Part:
    """Part of a storage: offset of a range, and the storage's size and checksum."""

    within: int
    size: int
    checksum: int


class Contents:
    """Cache of known contents of files: checksums in zip files, digests of ranges already read."""

    def __init__(self) -> None:
        # Path → offsets of the local headers, for bisection, and the entries in the same order.
        self._entries: dict[str, tuple[list[int], list[zip_checksums.StoredEntry]]] = {}
        self._starts: dict[tuple[str, int], int] = {}
        self._digests: dict[tuple[_Range, Extent], bytes] = {}

    def part(self, span: _Range) -> _Part | None:
        """Return the part of a storage that a range covers; None for a storage without checksum."""
        if span.file not in self._entries:
            entries = zip_checksums.storages(span.file)
            self._entries[span.file] = [stored.entry.header for stored in entries], entries
        offsets, entries = self._entries[span.file]
        i = bisect.bisect_right(offsets, span.start) - 1
        if i < 0:
            return None
        entry = entries[i].entry
        # A range of the whole size begins at 0, so the local header need not be read.
        if span.size == entry.size:
            return _Part(0, entry.size, entry.crc)
        within = span.start - self._start(span.file, i)
        if within < 0 or within + span.size > entry.size:
            return None
        return _Part(within, entry.size, entry.crc)

    def _start(self, path: str, i: int) -> int:
        """Return the offset of a storage's first byte in the file."""
        if (path, i) not in self._starts:
            self._starts[path, i] = self._entries[path][1][i].start(path)
        return self._starts[path, i]

    def digest(self, span: _Range, extent: Extent) -> bytes:
        """Return the digest of the first bytes of a range, or of the whole range."""
        if (span, extent) not in self._digests:
            digest = hashlib.blake2b(digest_size=16)
            size = min(span.size, _HEAD) if extent == "head" else span.size
            for block in _blocks(span, size):
                digest.update(block)
            self._digests[span, extent] = digest.digest()
        return self._digests[span, extent]


class _Family:
    """Collection of checkpoints with the same layout of tensors, searched by contents."""

    def __init__(self, contents: Contents) -> None:
        self._contents = contents
        self._new: list[Checkpoint] = []
        self._by_store: dict[object, Checkpoint] = {}
        self._by_checksums: dict[object, Checkpoint] = {}
        self._by_bytes = _Tree(contents)
        # Members that are in ``_by_checksums``, and not yet in ``_by_bytes``.
        self._summed: list[Checkpoint] = []

    def add(self, checkpoint: Checkpoint) -> None:
        """Add a checkpoint, which is read only when a search needs the bytes."""
        self._new.append(checkpoint)
        if contents := _stored_contents(checkpoint):
            self._by_store.setdefault(contents, checkpoint)

    def find(self, checkpoint: Checkpoint) -> Checkpoint | None:
        """Find a member with the same tensors, by the cheapest test that decides."""
        duplicate = self._by_store.get(_stored_contents(checkpoint))
        # First, since this reads nothing.
        if duplicate is not None:
            return duplicate
        for member in self._new:
            self._sort_in(member)
        self._new = []
        parts = self._parts(checkpoint)
        if parts is not None and parts in self._by_checksums:
            return self._by_checksums[parts]
        if not _is_decided(checkpoint, parts):
            for member in self._summed:
                self._by_bytes.add(member)
            self._summed = []
        return self._by_bytes.find(checkpoint)

    def _sort_in(self, member: Checkpoint) -> None:
        """Index a member by checksums if these decide, else by bytes."""
        parts = self._parts(member)
        if parts is not None:
            self._by_checksums.setdefault(parts, member)
        if _is_decided(member, parts):
            self._summed.append(member)
        else:
            self._by_bytes.add(member)

    def _parts(self, checkpoint: Checkpoint) -> tuple[_Part, ...] | None:
        """Return the parts of storages with the tensors; None where a checksum is missing."""
        parts: list[_Part] = []
        for span in _ranges(checkpoint):
            part = self._contents.part(span)
            if part is None:
                return None
            parts.append(part)
        return tuple(parts)


def _is_decided(checkpoint: Checkpoint, parts: Sequence[_Part] | None) -> bool:
    """Return True if each checksum covers exactly one tensor, so that checksums alone decide."""
    if parts is None:
        return False
    return all(s.size == p.size for s, p in zip(_ranges(checkpoint), parts, strict=True))


def _stored_contents(checkpoint: Checkpoint) -> object:
    """Return a key of the files' contents in a remote store; None where the store has no key."""
    contents = tuple(paths.content_of(stamp.token) for stamp in checkpoint.files)
    if not all(contents):
        return None
    return contents


@dataclass(frozen=True)
class _Member:
    """Checkpoint with the ranges to compare, in order."""

    checkpoint: Checkpoint
    looks: list[tuple[_Range, Extent]]


@dataclass
class _Node:
    """Node of the tree: checkpoints that are equal in the first ranges.

    Attributes:
        member: The only checkpoint of the node; None if there are several.
        children: Digest of the next range → node, if there are several checkpoints.
    """

    member: _Member | None = None
    children: dict[bytes, _Node] = field(default_factory=dict)


class _Tree:
    """Search tree of checkpoints by the bytes of the ranges.

    Only as many ranges are read as are needed to tell the checkpoints apart. The heads of all
    ranges come first.
    """

    def __init__(self, contents: Contents) -> None:
        self._contents = contents
        self._root: _Node | None = None

    def find(self, checkpoint: Checkpoint) -> Checkpoint | None:
        """Find the member whose ranges all have the same bytes."""
        if self._root is None:
            return None
        node, _ = self._descend(self._root, _list_looks(checkpoint))
        if node.member is None:
            return None
        return node.member.checkpoint

    def add(self, checkpoint: Checkpoint) -> None:
        """Add a checkpoint, unless the tree has an equal checkpoint."""
        member = _Member(checkpoint, _list_looks(checkpoint))
        if self._root is None:
            self._root = _Node(member)
            return
        node, digest = self._descend(self._root, member.looks)
        if digest is not None:
            node.children[digest] = _Node(member)

    def _descend(
        self, node: _Node, looks: Sequence[tuple[_Range, Extent]]
    ) -> tuple[_Node, bytes | None]:
        """Follow the ranges of a checkpoint down the tree.

        Returns:
            The last node that matches, and the digest without a child there; None in the place of
            the digest at the end of the ranges.
        """
        for depth, look in enumerate(looks):
            # A single member has not been read this far, so it moves down one level.
            if node.member is not None:
                digest = self._contents.digest(*node.member.looks[depth])
                node.children[digest] = _Node(node.member)
                node.member = None
            digest = self._contents.digest(*look)
            if digest not in node.children:
                return node, digest
            node = node.children[digest]
        return node, None


def _list_looks(checkpoint: Checkpoint) -> list[tuple[_Range, Extent]]:
    """List the ranges in the order of comparison: first all heads, then the long ranges."""
    ranges = _ranges(checkpoint)
    heads: list[tuple[_Range, Extent]] = [(span, "head") for span in ranges]
    # A range no longer than a head is already read whole.
    return heads + [(span, "whole") for span in ranges if span.size > _HEAD]


def _form(checkpoint: Checkpoint) -> object:
    """Return a key of the layout, equal for checkpoints with equal names, shapes and types."""
    tensors = tuple((name, _form_of(tensor)) for name, tensor in _by_name(checkpoint))
    return tensors, frozenset(checkpoint.refused.items())


def _by_name(checkpoint: Checkpoint) -> list[tuple[str, Tensor]]:
    """List the tensors in the order of the names."""
    return sorted(checkpoint.tensors.items(), key=lambda item: item[0])


def _form_of(tensor: Tensor) -> object:
    """Return a key of a tensor's layout: element type, shape and pieces."""
    return tensor.dtype.name, tensor.shape, tuple(map(_form_of_piece, tensor.pieces))


def _form_of_piece(piece: Piece) -> object:
    """Return a key of a piece's layout, without the strides that have no meaning."""
    if 0 in piece.shape:
        return piece.shape, piece.start, ()
    strides = [s for n, s in zip(piece.shape, piece.stride, strict=True) if n > 1]
    return piece.shape, piece.start, tuple(strides)


def _ranges(checkpoint: Checkpoint) -> list[_Range]:
    """List the byte ranges of all tensors, in the order of the names."""
    ranges: list[_Range] = []
    for _, tensor in _by_name(checkpoint):
        for piece in tensor.pieces:
            if 0 in piece.shape:
                continue
            # Where a text stores the bytes, the text itself is compared.
            start, size = piece.text or (piece.offset, tensor.dtype.nbytes(_span(piece)))
            ranges.append(_Range(piece.file, start, size))
    return ranges


def _span(piece: Piece) -> int:
    """Count the elements in the file from a piece's first to the last, gaps included."""
    return 1 + sum((n - 1) * s for n, s in zip(piece.shape, piece.stride, strict=True))


def _blocks(span: _Range, size: int) -> Iterator[bytes]:
    """Read the first bytes of a range in blocks.

    Args:
        span: The range.
        size: Number of bytes to read.
    """
    with guard_reads(span.file), paths.open_binary(span.file) as file:
        file.seek(span.start)
        for bytes_read in range(0, size, _BLOCK):
            yield file.read(min(_BLOCK, size - bytes_read))
