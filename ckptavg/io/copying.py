"""Files copied whole, or not at all."""

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
# Seconds. A file that was written less long ago may still be half a file.
_FRESH = 0.1


def copy(source: FileStamp, target: Path) -> None:
    """Copy a file as it was when it was stamped.

    What was written is read back and compared with the source, read once more: a rewrite within a
    tick of the file system's clock changes no stamp.

    Args:
        source: The file's stamp.
        target: The copy's path, at which there is nothing yet.

    Raises:
        CheckpointError: The source cannot be read, or is no longer what was stamped.
        OSError: The target cannot be written.
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
    """Make sure that files that were copied were whole, and not in the midst of being written.

    One that was written just now may be empty for a moment and look as if it stayed so.

    Raises:
        CheckpointError: One has changed.
    """
    age = time.time() - max((source.mtime_ns for source in sources), default=0) / 1e9
    if abs(age) < _FRESH:
        time.sleep(_FRESH)
    for source in sources:
        source.verify()


def read(source: FileStamp) -> Iterator[bytes]:
    """Read the contents of a file that was stamped, chunk by chunk.

    Raises:
        CheckpointError: It cannot be read, or has another size than was stamped.
    """
    count = 0
    with paths.open_binary(source.path) as file:
        while chunk := file.read(_CHUNK):
            count += len(chunk)
            yield chunk
    if count != source.size:
        source.verify()
        raise CheckpointError(
            f"{source.path} has {source.size} bytes, but {count} could be read of it",
            "Make sure that its disk is well, then try again.",
        )


def read_whole(source: FileStamp) -> bytes:
    """Read the contents of a small file, as it was when it was stamped.

    Raises:
        CheckpointError: As for ``read``; or it has changed.
    """
    content = b"".join(read(source))
    source.verify()
    return content


def _digest(chunks: Iterable[bytes]) -> bytes:
    digest = hashlib.blake2b()
    for chunk in chunks:
        digest.update(chunk)
    return digest.digest()
