"""Verified copies of files."""

from __future__ import annotations

import errno
import hashlib
import time
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path

from ckptavg.errors import CheckpointError
from ckptavg.io import paths
from ckptavg.io.stamp import FileStamp, changed

_CHUNK = 1 << 20  # bytes
# In seconds: a file that was written more recently may be incomplete.
_FRESH = 0.1


def copy(source: FileStamp, target: Path) -> None:
    """Copy a file in the state of a stamp.

    The copy is read back and compared with the source. A local source is read once more: a rewrite
    within a tick of the file system's clock changes no stamp.

    Args:
        source: Stamp of the file to copy.
        target: Path of the copy, which must not exist.

    Raises:
        CheckpointError: The source cannot be read, or has changed since it was stamped.
        OSError: The target cannot be written, or is not read back as written.
    """
    source.verify()
    copied = hashlib.blake2b()
    with target.open("xb") as file:
        for chunk in read(source):
            copied.update(chunk)
            file.write(chunk)
    with target.open("rb") as file:
        if _digest(iter(lambda: file.read(_CHUNK), b"")) != copied.digest():
            raise OSError(errno.EIO, "what was written is not what is read back")
    if not paths.is_url(source.path) and _digest(read(source)) != copied.digest():
        raise changed(source.path)
    source.verify()


def verify_settled(sources: Collection[FileStamp]) -> None:
    """Verify that nobody was writing the files that were copied.

    A file that was written just now may be empty for a moment, with a stamp that looks final.

    Raises:
        CheckpointError: A file has changed.
    """
    # The newest file decides. Clocks of file servers may be ahead, hence the absolute value.
    age = time.time() - max((source.mtime_ns for source in sources), default=0) / 1e9
    if abs(age) < _FRESH:
        time.sleep(_FRESH)
    for source in sources:
        source.verify()


def read(source: FileStamp) -> Iterator[bytes]:
    """Read the contents of a stamped file in chunks.

    Raises:
        CheckpointError: The file cannot be read, or has another size than its stamp.
    """
    count = 0
    with paths.open_binary(source.path) as file:
        while chunk := file.read(_CHUNK):
            count += len(chunk)
            yield chunk
    if count != source.size:
        source.verify()
        raise CheckpointError(
            f"{source.path} has {source.size} bytes, of which {count} could be read",
            "Check its disk, then try again.",
        )


def read_whole(source: FileStamp) -> bytes:
    """Read the contents of a small file in the state of a stamp.

    Raises:
        CheckpointError: The file cannot be read, or has changed.
    """
    content = b"".join(read(source))
    source.verify()
    return content


def _digest(chunks: Iterable[bytes]) -> bytes:
    """Return the BLAKE2b digest of chunks."""
    digest = hashlib.blake2b()
    for chunk in chunks:
        digest.update(chunk)
    return digest.digest()
