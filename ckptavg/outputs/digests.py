"""Digests of weights, computed from the bytes while a stream reads or writes the weights.

The contents are hashed, not the files that store them. For every tensor, under its bare name, the
elements in row-major order are cut into leaves of ``LEAF`` elements; the last leaf may be shorter.
Each leaf is hashed with SHA-256. Then one line per tensor is made, and the lines are sorted by
name::

    json.dumps([name, dtype, shape, [hexadecimal digest of each leaf]]) + "\\n"

with the dtype as torch spells it, without ``torch.``. The digest is the SHA-256 of these lines,
written as ``sha256-tree:`` and hexadecimal digits. The digest does not depend on layout, shards,
block size or threads. Each tied name has a line of its own. Tensors without plain bytes have no
line: quantized tensors, and tensors of types smaller than a byte.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from ckptavg.formats import Checkpoint, Tensor
from ckptavg.formats.checkpoint import DType
from ckptavg.formats.file_layout import OutputTensor
from ckptavg.outputs.sinks import Sink

# Elements. It divides the stream's TASK, so that a single thread sees each leaf, in order.
LEAF = 1 << 20
_SIZE = 32  # bytes of a SHA-256
_MISSING = bytes(_SIZE)
_WEIGHTS = "sha256-tree:"

Row = tuple[str, DType, tuple[int, ...], bytes]
"""Name, dtype and shape of a tensor, and the concatenated digests of the tensor's leaves."""


class Leaves:
    """Digests of the leaves of several tensors, updated with the tensors' bytes.

    Several threads may update the digests, as long as each leaf is updated by a single thread.

    Args:
        tensors: Number of elements and element size in bytes of each tensor.

    Attributes:
        done: Position of a tensor → the concatenated digests of the tensor's leaves. A leaf that
            is not complete yet has zeros.
    """

    def __init__(self, tensors: Iterable[tuple[int, int]]) -> None:
        self._sizes = list(tensors)
        self.done = {
            i: bytearray(_SIZE * -(-numel // LEAF)) for i, (numel, _) in enumerate(self._sizes)
        }
        self._begun: dict[tuple[int, int], tuple[int, Any]] = {}

    def update(self, number: int, offset: int, data: memoryview) -> None:
        """Hash bytes of a tensor.

        The bytes of one leaf have to come in order and without gaps.

        Args:
            number: Position of the tensor.
            offset: Position in the tensor of the first byte, in bytes.
            data: The bytes.

        Raises:
            RuntimeError: The bytes of a leaf do not come in order.
        """
        numel, size = self._sizes[number]
        while data:
            leaf, within = divmod(offset, LEAF * size)
            length = min(LEAF * size, numel * size - leaf * LEAF * size)
            part = data[: length - within]
            self._feed((number, leaf), within, part, length)
            offset, data = offset + len(part), data[len(part) :]

    def merge(self, done: Mapping[int, bytes | bytearray]) -> None:
        """Add the digests of leaves that another process has hashed of the same tensors."""
        for number, incoming in done.items():
            digests = self.done[number]
            for at in range(0, len(digests), _SIZE):
                if digests[at : at + _SIZE] == _MISSING:
                    digests[at : at + _SIZE] = incoming[at : at + _SIZE]

    def of(self, number: int) -> bytes:
        """Return the concatenated digests of a tensor's leaves.

        Raises:
            RuntimeError: A leaf has not been hashed completely.
        """
        hashes = bytes(self.done[number])
        for at in range(0, len(hashes), _SIZE):
            if hashes[at : at + _SIZE] == _MISSING:
                raise RuntimeError(f"not all of tensor {number} has been read")
        return hashes

    def _feed(self, leaf: tuple[int, int], within: int, part: memoryview, length: int) -> None:
        expected, state = self._begun.pop(leaf, (0, None))
        if within != expected:
            raise RuntimeError(f"byte {within} of leaf {leaf} came where {expected} was expected")
        if state is None:
            state = hashlib.sha256()
        state.update(part)
        end = within + len(part)
        if end < length:
            self._begun[leaf] = end, state
            return
        number, index = leaf
        self.done[number][index * _SIZE : (index + 1) * _SIZE] = state.digest()


class InputDigests:
    """Digests of checkpoints whose tensors a stream passes to ``watch``.

    Args:
        checkpoints: The checkpoints to hash.

    Attributes:
        tensors: The tensors that the stream has to pass to ``watch``.
    """

    def __init__(self, checkpoints: Iterable[Checkpoint]) -> None:
        # A dict is an ordered set here: tied names of a checkpoint share a tensor, hashed once.
        distinct: dict[Tensor, None] = {}
        for checkpoint in checkpoints:
            distinct |= dict.fromkeys(t for t in checkpoint.tensors.values() if t.dtype.size)
        self.tensors = list(distinct)
        self._numbers = {tensor: i for i, tensor in enumerate(self.tensors)}
        self.leaves = Leaves((t.numel, t.dtype.size) for t in self.tensors)
        # Path and weights key of a checkpoint → digest.
        self._digests: dict[tuple[str, str], str] = {}

    def watch(self, source: Tensor, start: int, data: memoryview) -> None:
        """Hash a block of a tensor. The method is an ``Observer`` of a stream.

        Args:
            source: The tensor.
            start: Index of the block's first element in the tensor.
            data: The block's bytes.
        """
        self.leaves.update(self._numbers[source], start * source.dtype.size, data)

    def of(self, checkpoint: Checkpoint) -> str:
        """Return the digest of a checkpoint whose tensors have all been hashed.

        Raises:
            RuntimeError: A tensor has not been hashed completely.
        """
        # A file may hold several networks, each under a key of its own.
        key = str(checkpoint.path), checkpoint.key
        if key not in self._digests:
            rows: list[Row] = []
            for name, tensor in checkpoint.tensors.items():
                if tensor.dtype.size:
                    leaves = self.leaves.of(self._numbers[tensor])
                    rows.append((name, tensor.dtype, tensor.shape, leaves))
            self._digests[key] = combine_leaves(rows)
        return self._digests[key]


class OutputDigest:
    """A sink that hashes the bytes of an output before another sink writes the bytes.

    Args:
        sink: The sink that writes.
        tensors: The tensors of the output.
    """

    def __init__(self, sink: Sink, tensors: Sequence[OutputTensor]) -> None:
        self._sink = sink
        self._tensors = tensors
        self._numbers = {t.name: i for i, t in enumerate(tensors)}
        self.leaves = Leaves((t.numel, t.dtype.size) for t in tensors)

    def write(self, name: str, offset: int, data: memoryview) -> None:
        """Hash bytes of a tensor and pass the bytes on, see ``Sink``.

        Args:
            name: The tensor.
            offset: Position in the tensor of the first byte, in bytes.
            data: The bytes, valid only during the call.
        """
        self.leaves.update(self._numbers[name], offset, data)
        self._sink.write(name, offset, data)

    @property
    def digest(self) -> str:
        """The digest of the whole output, once every tensor has been written.

        Raises:
            RuntimeError: A tensor has not been written completely.
        """
        rows: list[Row] = []
        for tensor in self._tensors:
            number = self._numbers[tensor.tied_to or tensor.name]
            rows.append((tensor.name, tensor.dtype, tensor.shape, self.leaves.of(number)))
        return combine_leaves(rows)


def combine_leaves(rows: Iterable[Row]) -> str:
    """Combine the digests of leaves into the digest of a table of tensors."""
    table_hash = hashlib.sha256()
    for name, dtype, shape, leaves in sorted(rows, key=lambda row: row[0]):
        digests = [leaves[at : at + _SIZE].hex() for at in range(0, len(leaves), _SIZE)]
        table_hash.update(f"{json.dumps([name, dtype.name, shape, digests])}\n".encode())
    return _WEIGHTS + table_hash.hexdigest()
