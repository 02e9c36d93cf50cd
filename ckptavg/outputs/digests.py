"""Digests of weights, taken from the bytes as they stream.

What is hashed is the contents, whatever file they lie in: for every tensor under its bare name, its
elements in row-major order are cut into leaves of ``LEAF``, the last one shorter, and each leaf is
hashed with SHA-256. One line a tensor follows, sorted by name::

    json.dumps([name, dtype, shape, [hexadecimal digest of each leaf]]) + "\\n"

with the dtype as torch spells it, without ``torch.``. The SHA-256 of these lines is the digest,
written ``sha256-tree:`` and hexadecimal. Layout, shards, block size and threads leave no trace.
Tied names count one by one. Tensors without plain bytes of their own do not count: quantized ones,
and types smaller than a byte.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from ckptavg.formats import Checkpoint, Tensor
from ckptavg.formats.checkpoint import DType
from ckptavg.formats.file_layout import OutputTensor
from ckptavg.outputs.sinks import Sink

LEAF = 1 << 20  # elements; divides the stream's TASK, so that one thread sees a leaf in order
DIGEST, SEAL, KEY = "digest", "seal", "key"  # in the provenance
_SIZE = 32  # bytes of a SHA-256
_MISSING = bytes(_SIZE)
_WEIGHTS = "sha256-tree:"
_RECORD = "sha256:"
PENDING = _WEIGHTS + "0" * 2 * _SIZE  # stands for a digest that is not known yet

Row = tuple[str, DType, tuple[int, ...], bytes]
"""A tensor's name, dtype and shape, and the digests of its leaves one after another."""


class Leaves:
    """Digests of the leaves of some tensors, taken from their bytes as they go by.

    Threads may take part in it as long as each leaf is left to one of them.

    Args:
        tensors: Number of elements and element size in bytes of each tensor.

    Attributes:
        done: Position of a tensor → the digests of its leaves one after another, zeros for those
            that have not gone by.
    """

    def __init__(self, tensors: Iterable[tuple[int, int]]) -> None:
        self._sizes = list(tensors)
        self.done = {
            i: bytearray(_SIZE * -(-numel // LEAF)) for i, (numel, _) in enumerate(self._sizes)
        }
        self._begun: dict[tuple[int, int], tuple[int, Any]] = {}

    def update(self, number: int, offset: int, data: memoryview) -> None:
        """Take bytes of a tensor: all of each leaf in order.

        Args:
            number: Position of the tensor.
            offset: Of the first byte in the tensor.
            data: The bytes.
        """
        numel, size = self._sizes[number]
        while data:
            leaf, within = divmod(offset, LEAF * size)
            length = min(LEAF * size, numel * size - leaf * LEAF * size)
            part = data[: length - within]
            self._feed((number, leaf), within, part, length)
            offset, data = offset + len(part), data[len(part) :]

    def merge(self, done: Mapping[int, bytes | bytearray]) -> None:
        """Add the leaves that another process saw of the same tensors."""
        for number, theirs in done.items():
            mine = self.done[number]
            for at in range(0, len(mine), _SIZE):
                if mine[at : at + _SIZE] == _MISSING:
                    mine[at : at + _SIZE] = theirs[at : at + _SIZE]

    def of(self, number: int) -> bytes:
        """The digests of a tensor's leaves one after another.

        Raises:
            RuntimeError: Some have not gone by.
        """
        found = bytes(self.done[number])
        if any(found[at : at + _SIZE] == _MISSING for at in range(0, len(found), _SIZE)):
            raise RuntimeError(f"not all of tensor {number} has been read")
        return found

    def _feed(self, leaf: tuple[int, int], within: int, part: memoryview, length: int) -> None:
        expected, state = self._begun.pop(leaf, (0, None))
        if within != expected:
            raise RuntimeError(f"byte {within} of leaf {leaf} came where {expected} was expected")
        state = hashlib.sha256() if state is None else state
        state.update(part)
        end = within + len(part)
        if end < length:
            self._begun[leaf] = end, state
            return
        number, place = leaf
        self.done[number][place * _SIZE : (place + 1) * _SIZE] = state.digest()


class InputDigests:
    """Digests of checkpoints whose tensors a stream shows.

    Args:
        checkpoints: Whose.

    Attributes:
        tensors: What the stream has to show.
    """

    def __init__(self, checkpoints: Iterable[Checkpoint]) -> None:
        distinct = {t: None for c in checkpoints for t in c.tensors.values() if t.dtype.size}
        self.tensors = list(distinct)
        self._numbers = {tensor: i for i, tensor in enumerate(self.tensors)}
        self.leaves = Leaves((t.numel, t.dtype.size) for t in self.tensors)
        self._found: dict[int, tuple[Checkpoint, str]] = {}

    def watch(self, source: Tensor, start: int, data: memoryview) -> None:
        """Take a block of a tensor; a stream's ``Watcher``."""
        self.leaves.update(self._numbers[source], start * source.dtype.size, data)

    def of(self, checkpoint: Checkpoint) -> str:
        """The digest of a checkpoint, all of which has been shown."""
        if id(checkpoint) not in self._found:
            rows = (
                (name, t.dtype, t.shape, self.leaves.of(self._numbers[t]))
                for name, t in checkpoint.tensors.items()
                if t.dtype.size
            )
            self._found[id(checkpoint)] = checkpoint, combined(rows)
        return self._found[id(checkpoint)][1]


class OutputDigest:
    """A sink that hashes what goes on to another one.

    Args:
        sink: The other one.
        tensors: What will come.
    """

    def __init__(self, sink: Sink, tensors: Sequence[OutputTensor]) -> None:
        self._sink = sink
        self._tensors = tensors
        self._numbers = {t.name: i for i, t in enumerate(tensors)}
        self.leaves = Leaves((t.numel, t.dtype.size) for t in tensors)

    def write(self, name: str, offset: int, data: memoryview) -> None:
        """Take bytes of a tensor, see ``Sink``."""
        self.leaves.update(self._numbers[name], offset, data)
        self._sink.write(name, offset, data)

    @property
    def digest(self) -> str:
        """The digest of all that should have come."""
        return combined(
            (t.name, t.dtype, t.shape, self.leaves.of(self._numbers[t.tied_to or t.name]))
            for t in self._tensors
        )


def combined(rows: Iterable[Row]) -> str:
    """The digest of a table of tensors."""
    whole = hashlib.sha256()
    for name, dtype, shape, leaves in sorted(rows, key=lambda row: row[0]):
        digests = [leaves[at : at + _SIZE].hex() for at in range(0, len(leaves), _SIZE)]
        whole.update(f"{json.dumps([name, dtype.name, shape, digests])}\n".encode())
    return _WEIGHTS + whole.hexdigest()


def recorded(
    made: Mapping[str, Any],
    inputs: Sequence[Checkpoint],
    of: Callable[[Checkpoint], str] = lambda _: PENDING,
    output: str = PENDING,
) -> dict[str, Any]:
    """Provenance with digests in it; of the same length whatever they are.

    Args:
        made: The provenance without.
        inputs: The checkpoints that it lists, and its base if it names one.
        of: The digest of each.
        output: That of the output.
    """
    accounts = [account for _, account in accounts_of(made)]
    told = [
        {**account, DIGEST: of(checkpoint)} | ({KEY: checkpoint.key} if checkpoint.key else {})
        for account, checkpoint in zip(accounts, inputs, strict=True)
    ]
    count = len(made["checkpoints"])
    base = {"base": told[count]} if told[count:] else {}
    return sealed({**made, "checkpoints": told[:count], **base, DIGEST: output})


def accounts_of(made: Mapping[str, Any]) -> list[tuple[str, Mapping[str, Any]]]:
    """What provenance says of each input, with the input's part in it."""
    found = [("input", account) for account in made["checkpoints"]]
    return found + ([("base", made["base"])] if isinstance(made.get("base"), dict) else [])


def sealed(made: Mapping[str, Any]) -> dict[str, Any]:
    """Provenance with a digest of all that it says, so that a damaged record shows."""
    return {**made, SEAL: _seal(made)}


def is_recorded(made: Mapping[str, Any] | None) -> bool:
    """Whether provenance tells digests."""
    return made is not None and isinstance(made.get(DIGEST), str)


def is_sealed(made: Mapping[str, Any]) -> bool:
    """Whether provenance with digests says what it said when it was written."""
    return bool(made.get(SEAL) == _seal(made))


def _seal(made: Mapping[str, Any]) -> str:
    text = json.dumps({k: v for k, v in made.items() if k != SEAL}, sort_keys=True)
    return _RECORD + hashlib.sha256(text.encode()).hexdigest()
