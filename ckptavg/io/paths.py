"""Where inputs lie: local paths as ever, and URLs that are listed and read by ranges.

Any URL will do that fsspec knows (``s3://``, ``gs://``, ``https://``, ``hf://``, ...). Nothing is
copied to the disk, and no file is asked for as a whole.
"""

from __future__ import annotations

import fnmatch
import io
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from functools import cached_property
from pathlib import Path
from stat import S_ISREG
from typing import Any, BinaryIO, NamedTuple, TypeAlias, cast
from urllib.request import url2pathname

from ckptavg.errors import CheckpointError, UsageError
from ckptavg.errors.printable import bare_location
from ckptavg.errors.system import guard_reads
from ckptavg.io.remote import file_system, open_ranges, read_ranges, unreadable

_URL = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+)(::.*)?://")
_VERSIONS = (
    "ETag", "etag", "generation", "md5Hash", "blob_id", "mtime", "LastModified", "last_modified",
    "modified", "created",
)  # fmt: skip
_TIMES = ("LastModified", "last_modified", "mtime", "updated", "modified", "created")
_MD5 = re.compile(r"[0-9a-f]{32}(-\d+)?")


class Stat(NamedTuple):
    """What a file is known by.

    Attributes:
        size: In bytes.
        mtime_ns: When its contents were last changed, as its owner may set it.
        inode: Its number on its device; 0 if it is remote.
        device: Where that is; 0 if it is remote.
        token: The store's own word for its contents or version; empty if it is local.
        ctime_ns: When anything of it was last changed, as the system keeps it; 0 if it is remote.
        status: Its number of links, its mode and its owners: a change of these moves ``ctime_ns``,
            too.
    """

    size: int
    mtime_ns: int
    inode: int
    device: int
    token: str
    ctime_ns: int = 0
    status: tuple[int, ...] = ()


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
    def stem(self) -> str:
        """The name without its suffix."""
        return Path(self.name).stem

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
        system, path = file_system(self.url)
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
        system, path = file_system(self.url)
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
        system, _ = file_system(url)
        system.invalidate_cache()
        return RemotePath(url)
    raise UsageError(f"{text} names no file or directory")


def ancestors(place: Location, levels: int) -> list[Location]:
    """The directories above a place from the nearest on, as far as its path names them."""
    above: list[Location] = []
    while len(above) < levels and place.parent != place:
        place = place.parent
        above.append(place)
    return above


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
    scheme, _, location = name.partition("://")
    return f"{scheme}://{bare_location(scheme, location)}"


def stat(place: Named) -> Stat:
    """Size and version of a file.

    Raises:
        CheckpointError: It is not there, may not be read, or is no file that can be read to an end.
    """
    if isinstance(place, str) and is_url(place):
        place = locate(place)
    if not isinstance(place, RemotePath):
        with guard_reads(place):
            info = os.stat(place)
        _check_regular(place, info)
        status = (info.st_nlink, info.st_mode, info.st_uid, info.st_gid)
        times = info.st_mtime_ns, info.st_ctime_ns
        return Stat(info.st_size, times[0], info.st_ino, info.st_dev, "", times[1], status)
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
        CheckpointError: It is not there, may not be read, or is no regular file; reading on may
            raise this too.
    """
    if isinstance(place, str) and is_url(place):
        place = RemotePath(place)  # what was known when it was found will do
    if not isinstance(place, RemotePath):
        return cast("BinaryIO", io.BufferedReader(open_unbuffered(place)))
    known = stat(place)
    return open_ranges(place.url, known.size, known.token)


def open_unbuffered(path: str | os.PathLike[str]) -> io.FileIO:
    """A local file to read from at any place.

    Raises:
        CheckpointError: As for ``open_binary``.
    """
    with guard_reads(path):
        return _LocalFile(path, opener=_open_at_once)


class _LocalFile(io.FileIO):
    """A local file whose failures are told as ours.

    Parsers such as zipfile take an ``OSError`` for damage of what they read.
    """

    def readinto(self, buffer: Any) -> int | None:
        with guard_reads(self.name):
            return super().readinto(buffer)

    def readall(self) -> bytes:
        with guard_reads(self.name):
            return super().readall()

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        with guard_reads(self.name):
            return super().seek(offset, whence)


def _open_at_once(path: str, flags: int) -> int:
    """Open a regular file; what has come into its place, a pipe that waits for a writer, is not.

    Raises:
        OSError: It cannot be opened.
        CheckpointError: It is no regular file.
    """
    handle = os.open(path, flags | getattr(os, "O_NONBLOCK", 0))
    try:
        _check_regular(path, os.fstat(handle))
    except BaseException:
        os.close(handle)
        raise
    return handle


def _check_regular(path: object, info: os.stat_result) -> None:
    """Make sure that a file can be read to an end.

    Raises:
        CheckpointError: It is a pipe, a device or a directory.
    """
    if not S_ISREG(info.st_mode):
        raise CheckpointError(f"{path} is not a regular file", "Name a file or a directory.")


def _is_disguised(error: FileNotFoundError) -> bool:
    """Whether a web server did not answer, or otherwise than that there is nothing."""
    cause = error.__cause__
    if isinstance(cause, OSError):
        return not isinstance(cause, FileNotFoundError)
    return getattr(cause, "status", 404) != 404


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
