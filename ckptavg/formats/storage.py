"""Where inputs lie: local paths as ever, and URLs that are listed and read by ranges.

fsspec knows the protocols (``s3://``, ``gs://``, ``https://``, ``hf://``, ...) and is imported only
when a URL is given. Nothing is copied to the disk, and no file is asked for as a whole.
"""

from __future__ import annotations

import filecmp
import fnmatch
import io
import os
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, TypeAlias, cast
from urllib.request import url2pathname

from ckptavg.errors import CheckpointError, CkptavgError, UsageError

_HEAD = 1 << 18  # bytes; headers are small and requests slow, so they are read in pieces like this
_COMPARED = 1 << 22  # bytes that are compared at a time
_TRIES = 3  # of a request, where the file system makes none of its own
_URL = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+)(::.*)?://")
_VERSIONS = (
    "ETag", "etag", "generation", "md5Hash", "blob_id", "mtime", "LastModified", "last_modified",
    "modified", "created",
)  # fmt: skip
_TIMES = ("LastModified", "last_modified", "mtime", "updated", "modified", "created")
_MD5 = re.compile(r"[0-9a-f]{32}(-\d+)?")

Range = tuple[str, int, int]
"""A file and the first byte and the end of a range of it."""


class Stat(NamedTuple):
    """What a file is known by. ``token`` is the store's own word for its contents or version."""

    size: int
    mtime_ns: int
    inode: int
    device: int
    token: str


@dataclass(frozen=True, order=True)
class RemotePath:
    """A URL with as much of ``pathlib.Path`` as inputs need.

    What is known of it is kept: a directory is listed once, and that answers for what is in it.
    """

    url: str
    _home: RemotePath | None = field(default=None, compare=False, repr=False)

    def __str__(self) -> str:
        return self.url

    def __truediv__(self, name: str) -> RemotePath:
        return RemotePath(f"{self.url}/{name}", self)

    @property
    def name(self) -> str:
        """The last part."""
        last = self.url.rpartition("/")[2]
        return last.partition("?")[0] if self.url.startswith("http") else last

    @property
    def suffix(self) -> str:
        """The suffix of the name."""
        return Path(self.name).suffix

    @property
    def parent(self) -> RemotePath:
        """The directory; a bucket or a host is its own."""
        scheme, _, rest = self.url.partition("://")
        above = rest.rpartition("/")[0]
        return self._home or (RemotePath(f"{scheme}://{above}") if above.strip("/") else self)

    @property
    def parents(self) -> list[RemotePath]:
        """The directories from the nearest on."""
        above = self.parent
        return [] if above == self else [above, *above.parents]

    def resolve(self) -> RemotePath:
        """Itself: a URL has no links."""
        return self

    def is_symlink(self) -> bool:
        """No URL is."""
        return False

    @property
    def alone(self) -> RemotePath:
        """The same, asked for by itself: some list a directory in other words."""
        return RemotePath(self.url) if self._home is not None else self

    def exists(self) -> bool:
        """Whether there is a file or a directory."""
        return self.info is not None

    def is_dir(self) -> bool:
        """Whether it is a directory, or a prefix of keys in a bucket."""
        return self.info is not None and self.info.get("type") == "directory"

    def is_file(self) -> bool:
        """Whether it is a file."""
        return self.info is not None and self.info.get("type") == "file"

    def iterdir(self) -> Iterator[RemotePath]:
        """What is in a directory."""
        return (self / name for name in self._listing)

    def glob(self, pattern: str) -> Iterator[RemotePath]:
        """What in a directory has a name that matches."""
        return (self / name for name in self._listing if fnmatch.fnmatchcase(name, pattern))

    def read_bytes(self) -> bytes:
        """All of a small file."""
        size = stat(self).size
        return read_ranges([(self.url, 0, size)])[0] if size else b""

    def read_text(self, encoding: str) -> str:
        """All of a small file of text.

        Raises:
            FileNotFoundError: There is none.
        """
        if not self.is_file():
            raise FileNotFoundError(f"{self} does not exist")
        return self.read_bytes().decode(encoding)

    def stat(self) -> os.stat_result:
        """Size and time, for those who expect no more."""
        found = stat(self)
        seconds = found.mtime_ns // 10**9
        return os.stat_result((0, 0, 0, 1, 0, 0, found.size, seconds, seconds, seconds))

    @cached_property
    def info(self) -> Mapping[str, Any] | None:
        """What the file system says about it; None where there is nothing."""
        if self._home is not None:
            return self._home._listing.get(self.url.rpartition("/")[2])
        system, path = _file_system(self.url)
        try:
            return dict(system.info(path))
        except FileNotFoundError as error:
            if _is_disguised(error):
                raise unreadable(self.url, cast("Exception", error.__cause__)) from error
            return None
        except Exception as error:
            raise unreadable(self.url, error) from error

    @cached_property
    def _listing(self) -> dict[str, Mapping[str, Any]]:
        system, path = _file_system(self.url)
        try:
            entries = system.ls(path, detail=True)
        except FileNotFoundError:
            return {}
        except Exception as error:
            raise unreadable(self.url, error) from error
        here = path.rstrip("/")
        below = [(str(e["name"]).rstrip("/"), e) for e in entries]
        return {name.rpartition("/")[2]: e for name, e in below if name != here}


Location: TypeAlias = Path | RemotePath
Named: TypeAlias = str | os.PathLike[str] | RemotePath


def is_url(name: str) -> bool:
    """Whether a file's name is a URL; a path's text never has two slashes in a row."""
    return "://" in name


def locate(name: Named) -> Location:
    """The place that a user or a table names.

    A URL is looked at anew: what file systems remember of directories is forgotten.

    Raises:
        UsageError: It is a URL of an unknown kind.
        CkptavgError: What is needed to read such URLs is not installed.
    """
    if isinstance(name, RemotePath):
        return name
    text = os.fspath(name)
    found = _URL.match(text)
    if found is None:
        return Path(text)
    if found[2]:
        raise UsageError(f"{text} is a chain of URLs: a plain one is expected")
    if found[1].lower() == "file":
        return _local(text)
    url = text if text.startswith("http") else text.rstrip("/")
    if is_url(url):
        system, _ = _file_system(url)
        system.invalidate_cache()
        return RemotePath(url)
    raise UsageError(f"{text} names no file or directory")


def check_output(name: Named) -> None:
    """Make sure that an output is not a URL.

    Raises:
        UsageError: It is.
    """
    text = str(name)
    if _URL.match(text):
        raise UsageError(
            f"outputs are written to local paths but got {text}", "Write it here, then copy it."
        )


def without_secrets(name: str) -> str:
    """A name fit to be written into files: a URL without its user and what signs it."""
    if not is_url(name):
        return name
    scheme, _, rest = name.partition("://")
    host, slash, path = rest.partition("/")
    user, _, bare = host.rpartition("@")
    host = bare if ":" in user else host
    path = path.partition("?")[0] if scheme.startswith("http") else path
    return f"{scheme}://{host}{slash}{path}"


def stat(place: Named) -> Stat:
    """Size and version of a file.

    Raises:
        OSError: A local file is not there or may not be read.
        CheckpointError: A remote one.
    """
    if isinstance(place, str) and is_url(place):
        place = locate(place)
    if not isinstance(place, RemotePath):
        info = os.stat(place)
        return Stat(info.st_size, info.st_mtime_ns, info.st_ino, info.st_dev, "")
    known = place.alone.info
    if known is None:
        raise CheckpointError(f"{place} is not there")
    size = known.get("size")
    if not isinstance(size, int):
        raise CheckpointError(f"{place} cannot be read by ranges: its server tells no size")
    token = next((f"{name} {_plain(known[name])}" for name in _VERSIONS if known.get(name)), "")
    return Stat(size, _time(known), 0, 0, token)


def content_of(token: str) -> str:
    """The part of a token that is the same for the same contents anywhere; empty if none is.

    An ETag is so where it is what S3 makes of MD5 sums; web servers make theirs of dates.
    """
    kind, _, value = token.partition(" ")
    return value if kind == "ETag" and _MD5.fullmatch(value) else ""


def open_binary(place: Named) -> BinaryIO:
    """A file to read headers from: seeking is free, and reading takes few requests.

    Raises:
        OSError: A local file is not there or may not be read.
        CheckpointError: A remote one.
    """
    if isinstance(place, str) and is_url(place):
        place = RemotePath(place)  # what was known when it was found will do
    if not isinstance(place, RemotePath):
        return open(place, "rb")
    found = stat(place)
    held = _held(place.url, found.size, found.token) if found.token else {}
    return cast("BinaryIO", io.BufferedReader(_RangeFile(place.url, found.size, held)))


def read_ranges(ranges: Sequence[Range]) -> list[bytes]:
    """Read ranges of remote files, those of one file system at once.

    A range that ends beyond its file comes shortened.

    Raises:
        CheckpointError: One cannot be read.
    """
    found: list[Any] = [None] * len(ranges)
    systems: dict[int, tuple[Any, list[tuple[int, str]]]] = {}
    for i, (url, _, _) in enumerate(ranges):
        system, path = _file_system(url)
        systems.setdefault(id(system), (system, []))[1].append((i, path))
    for system, members in systems.values():
        waiting = members
        for attempt in range(1 if hasattr(system, "retries") else _TRIES):
            time.sleep(attempt)
            _fetch(system, waiting, ranges, found)
            waiting = [(i, path) for i, path in waiting if _is_passing(found[i])]
            if not waiting:
                break
    for (url, start, end), content in zip(ranges, found, strict=True):
        if not isinstance(content, bytes):
            raise unreadable(url, content) from content
        if len(content) > end - start:
            raise CheckpointError(f"{url} cannot be read by ranges: its server sends all of it")
    return found


def same_bytes(one: str, other: str, size: int) -> bool:
    """Whether two files of the same size hold the same; remote ones are read block by block."""
    if not is_url(one) and not is_url(other):
        return filecmp.cmp(one, other, shallow=False)
    start, count = 0, _HEAD  # what differs mostly does so early
    while start < size:
        end = min(start + count, size)
        if _read_range(one, start, end) != _read_range(other, start, end):
            return False
        start, count = end, min(4 * count, _COMPARED)
    return True


def _read_range(path: str, start: int, end: int) -> bytes:
    if is_url(path):
        return read_ranges([(path, start, end)])[0]
    with open(path, "rb") as file:
        file.seek(start)
        return file.read(end - start)


def unreadable(url: str, error: Exception) -> CkptavgError:
    """The error for what a file system says of a URL."""
    if isinstance(error, CkptavgError):
        return error
    told = " ".join(str(getattr(error, "strerror", None) or error).split())
    if isinstance(error, FileNotFoundError):
        return CheckpointError(f"{url} is not there")
    if isinstance(error, PermissionError) or "redential" in type(error).__name__:
        return CheckpointError(
            f"{url} may not be read: {told or 'access is denied'}",
            "Give credentials where the store's own tools look for them, in the environment or "
            "their files (FSSPEC_S3_ANON=true for a public bucket).",
        )
    return CheckpointError(
        f"{url} cannot be read: {told or type(error).__name__}",
        "Check the URL and the connection, then try again.",
    )


class _RangeFile(io.RawIOBase):
    """A remote file read by ranges; those that were read are held, and shared by its readers."""

    def __init__(self, url: str, size: int, held: dict[int, bytes]) -> None:
        self._url = url
        self._size = size
        self._held = held
        self._at = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._size}[whence]
        if base + offset < 0:
            raise OSError("a negative position")
        self._at = base + offset
        return self._at

    def readinto(self, buffer: Any) -> int:
        count = min(len(buffer), self._size - self._at)
        if count <= 0:
            return 0
        known = (s for s, raw in self._held.items() if s <= self._at < s + len(raw))
        start = next(known, None)
        if start is None:
            start = min(self._at, max(self._size - _HEAD, 0))
            end = min(max(self._at + count, start + _HEAD), self._size)
            self._held[start] = read_ranges([(self._url, start, end)])[0]
        part = self._held[start][self._at - start :][:count]
        buffer[: len(part)] = part
        self._at += len(part)
        return len(part)


@lru_cache(maxsize=4)
def _held(url: str, size: int, token: str) -> dict[int, bytes]:  # noqa: ARG001 - they are the key
    """What was read of a version of a file: it is opened several times in a row."""
    return {}


def _fetch(
    system: Any, members: list[tuple[int, str]], ranges: Sequence[Range], found: list[Any]
) -> None:
    """Ask once; an exception stands where an answer would."""
    paths = [path for _, path in members]
    starts, ends = ([ranges[i][k] for i, _ in members] for k in (1, 2))
    try:
        answers = system.cat_ranges(paths, starts, ends, on_error="return")
    except Exception as error:
        answers = [error] * len(members)
    for (i, _), answer in zip(members, answers, strict=True):
        found[i] = answer


def _is_passing(answer: Any) -> bool:
    """Whether a request failed in a way that another try may not."""
    return not isinstance(answer, (bytes, FileNotFoundError, PermissionError))


def _is_disguised(error: FileNotFoundError) -> bool:
    """Whether a web server did not answer, or otherwise than that there is nothing."""
    cause = error.__cause__
    if isinstance(cause, OSError):
        return not isinstance(cause, FileNotFoundError)
    return getattr(cause, "status", 404) != 404


def _file_system(url: str) -> tuple[Any, str]:
    """The file system of a URL, and the URL's path in it.

    Raises:
        UsageError: No file system is known for it.
        CkptavgError: A package is missing.
    """
    s3 = url.startswith(("s3://", "s3a://"))
    try:
        from fsspec.core import url_to_fs  # noqa: PLC0415 - only URLs need it
    except ImportError as error:
        install = 'pip install "ckptavg[s3]"' if s3 else "pip install fsspec"
        raise CkptavgError(f"reading {url} needs fsspec", f"Install it with {install}.") from error
    try:
        system, path = url_to_fs(url)
    except ImportError as error:
        install = 'Install it with pip install "ckptavg[s3]".' if s3 else f"{error}."
        raise CkptavgError(f"reading {url} needs one more package", install) from error
    except ValueError as error:
        raise UsageError(f"{url} cannot be read: {error}") from error
    except Exception as error:
        raise unreadable(url, error) from error
    return system, path


def _local(url: str) -> Path:
    """The path that a ``file://`` URL names."""
    host, slash, path = url.partition("://")[2].partition("/")
    if host not in ("", "localhost") or not slash:
        raise UsageError(f"{url} names the host {host!r}", "Expected file:///absolute/path.")
    return Path(url2pathname(slash + path))


def _plain(value: object) -> str:
    """A version in one spelling: there are servers that quote it now and then."""
    return str(value).strip('"')


def _time(known: Mapping[str, Any]) -> int:
    """When a file was last changed, in whole seconds given in ns; 0 where nobody says."""
    value = next((known[name] for name in _TIMES if known.get(name)), 0)
    if isinstance(value, datetime):
        value = value.timestamp()
    return int(value) * 10**9 if isinstance(value, (int, float)) else 0
