"""Locations of inputs: local paths, and URLs that are listed and read by ranges.

Any URL that fsspec supports is accepted (``s3://``, ``gs://``, ``https://``, ``hf://``, ...).
Nothing is copied to the disk, and no large file is requested as a whole.
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
# Entries of fsspec's file info that tell versions apart, the most reliable first: stores differ.
_VERSIONS = (
    "ETag", "etag", "generation", "md5Hash", "blob_id", "mtime", "LastModified", "last_modified",
    "modified", "created",
)  # fmt: skip
_TIMES = ("LastModified", "last_modified", "mtime", "updated", "modified", "created")
# An ETag of S3: an MD5 sum, with the number of parts after an upload in parts.
_MD5 = re.compile(r"[0-9a-f]{32}(-\d+)?")


class Stat(NamedTuple):
    """Size, times and identity of a file.

    Attributes:
        size: Size in bytes.
        mtime_ns: Time of the last change of the contents, in ns since 1970; the owner may set it.
        inode: Inode number on the device; 0 for a remote file.
        device: Device number; 0 for a remote file.
        token: Version or checksum that the store gives, after the name of the entry; empty for a
            local file.
        ctime_ns: Time of the last change of contents or status, in ns since 1970, which only the
            system sets; 0 for a remote file.
        status: Number of links, mode, user and group: a change of these moves ``ctime_ns``, too.
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
    """URL with the part of the interface of ``pathlib.Path`` that inputs need.

    Answers of the file system are kept: a directory is listed once, and the listing also answers
    questions about its entries.
    """

    url: str
    _home: RemotePath | None = field(default=None, compare=False, repr=False)

    def __str__(self) -> str:
        return self.url

    def __truediv__(self, name: str) -> RemotePath:
        return RemotePath(f"{self.url}/{name}", self)

    @property
    def name(self) -> str:
        """Last part of the URL's path."""
        # Queries are part of the name elsewhere: keys of a bucket may hold a question mark.
        last = self.url.rpartition("/")[2]
        if self.url.startswith("http"):
            return last.partition("?")[0]
        return last

    @property
    def stem(self) -> str:
        """Name without the suffix."""
        return Path(self.name).stem

    @property
    def suffix(self) -> str:
        """Suffix of the name."""
        return Path(self.name).suffix

    @property
    def parent(self) -> RemotePath:
        """Directory of the URL; the parent of a bucket or a host is the bucket or host itself."""
        if self._home is not None:
            return self._home
        scheme, _, host_and_path = self.url.partition("://")
        above = host_and_path.rpartition("/")[0]
        if not above.strip("/"):
            return self
        return RemotePath(f"{scheme}://{above}")

    @property
    def parents(self) -> list[RemotePath]:
        """Directories above the URL, the nearest first."""
        above = self.parent
        if above == self:
            return []
        return [above, *above.parents]

    def resolve(self) -> RemotePath:
        """Return the same path, since a URL has no links."""
        return self

    def is_symlink(self) -> bool:
        """Return False, since a URL is never a link."""
        return False

    def exists(self) -> bool:
        """Return True if a file or a directory exists at the URL."""
        return self.info is not None

    def is_dir(self) -> bool:
        """Return True if the URL is a directory, or a prefix of keys in a bucket."""
        return self.info is not None and self.info.get("type") == "directory"

    def is_file(self) -> bool:
        """Return True if the URL is a file."""
        return self.info is not None and self.info.get("type") == "file"

    def iterdir(self) -> Iterator[RemotePath]:
        """Iterate over the entries of a directory."""
        return (self / name for name in self._listing)

    def glob(self, pattern: str) -> Iterator[RemotePath]:
        """Iterate over the entries of a directory whose names match a shell pattern."""
        return (self / name for name in self._listing if fnmatch.fnmatchcase(name, pattern))

    def read_bytes(self) -> bytes:
        """Read a small file."""
        # A range of no bytes cannot be requested.
        size = stat(self).size
        if size == 0:
            return b""
        return read_ranges([(self.url, 0, size)])[0]

    def stat(self) -> os.stat_result:
        """Return a stat result that has only the size and the times in whole seconds."""
        status = stat(self)
        seconds = status.mtime_ns // 10**9
        return os.stat_result((0, 0, 0, 1, 0, 0, status.size, seconds, seconds, seconds))

    @cached_property
    def info(self) -> Mapping[str, Any] | None:
        """File info of fsspec; None if nothing exists at the URL."""
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
        """File info of each entry of a directory by the entry's name."""
        system, path = file_system(self.url)
        try:
            entries = system.ls(path, detail=True)
        except FileNotFoundError:
            return {}
        except Exception as error:
            raise unreadable(self.url, error) from error
        # Some stores list the directory itself, too.
        directory = path.rstrip("/")
        listing: dict[str, Mapping[str, Any]] = {}
        for entry in entries:
            entry_path = str(entry["name"]).rstrip("/")
            if entry_path != directory:
                listing[entry_path.rpartition("/")[2]] = entry
        return listing


Location: TypeAlias = Path | RemotePath
PathOrUrl: TypeAlias = str | os.PathLike[str] | RemotePath


def is_url(name: str) -> bool:
    """Return True if the name of a file is a URL."""
    # The text of a ``Path`` never has two slashes in a row.
    return "://" in name


def locate(name: PathOrUrl) -> Location:
    """Make a location of a path or URL that a user or a table names.

    The cache of directory listings of a URL's file system is cleared, so that the URL is inspected
    anew.

    Raises:
        UsageError: The URL is of an unknown kind.
        CkptavgError: A package that is needed to read the URL is not installed.
    """
    if isinstance(name, RemotePath):
        return name
    text = os.fspath(name)
    url_match = _URL.match(text)
    if url_match is None:
        return Path(text)
    if url_match[2]:
        raise UsageError(f"{text} is a chain of URLs: a plain one is expected")
    if url_match[1].lower() == "file":
        return _local(text)
    # A web server may answer differently without the last slash.
    url = text if text.startswith("http") else text.rstrip("/")
    if is_url(url):
        system, _ = file_system(url)
        system.invalidate_cache()
        return RemotePath(url)
    raise UsageError(f"{text} names no file or directory")


def ancestors(path: Location, levels: int) -> list[Location]:
    """List up to ``levels`` directories above a location that the path names, the nearest first."""
    above: list[Location] = []
    while len(above) < levels and path.parent != path:
        path = path.parent
        above.append(path)
    return above


def check_output(name: PathOrUrl) -> None:
    """Check that an output is not a URL.

    Raises:
        UsageError: The output is a URL.
    """
    text = str(name)
    if _URL.match(text):
        raise UsageError(
            f"outputs are written to local paths but got {text}", "Write it here, then copy it."
        )


def without_secrets(name: str) -> str:
    """Remove the credentials from a URL for writing into files; return a path unchanged."""
    if not is_url(name):
        return name
    scheme, _, location = name.partition("://")
    return f"{scheme}://{bare_location(scheme, location)}"


def stat(path: PathOrUrl) -> Stat:
    """Return size, times and identity of a file.

    Raises:
        CheckpointError: The file does not exist, may not be read, or is not a regular file.
    """
    if isinstance(path, str) and is_url(path):
        path = locate(path)
    if isinstance(path, RemotePath):
        return _stat_remote(path)
    with guard_reads(path):
        info = os.stat(path)
    _check_regular(path, info)
    return Stat(
        info.st_size,
        info.st_mtime_ns,
        info.st_ino,
        info.st_dev,
        token="",
        ctime_ns=info.st_ctime_ns,
        status=(info.st_nlink, info.st_mode, info.st_uid, info.st_gid),
    )


def _stat_remote(path: RemotePath) -> Stat:
    """Return size, time and version of a remote file."""
    # A new path object requests the info itself: in the listing of a directory, some file systems
    # describe a file differently.
    info = RemotePath(path.url).info
    if info is None:
        raise CheckpointError(f"{path} is not there")
    size = info.get("size")
    if not isinstance(size, int):
        raise CheckpointError(
            f"{path} cannot be read by ranges: its server does not report the size",
            "Download it first.",
        )
    token = ""
    for name in _VERSIONS:
        if info.get(name):
            # Some servers put the version in quotes in some answers only.
            version = str(info[name]).strip('"')
            token = f"{name} {version}"
            break
    return Stat(size, _read_time(info), 0, 0, token)


def content_of(token: str) -> str:
    """Return the checksum of the contents in a token; return an empty text if there is none.

    Equal contents have equal checksums anywhere. An ETag is a checksum if it has the form that S3
    makes of MD5 sums. Web servers make ETags of dates.
    """
    kind, _, value = token.partition(" ")
    if kind != "ETag" or not _MD5.fullmatch(value):
        return ""
    return value


def open_binary(path: PathOrUrl) -> BinaryIO:
    """Open a file to read headers: seeking is free, and reading takes few requests.

    Raises:
        CheckpointError: The file does not exist, may not be read, or is not a regular file. Reading
            from the returned file may raise this, too.
    """
    if isinstance(path, str) and is_url(path):
        # Not ``locate``, which would clear the cache of listings at each opening.
        path = RemotePath(path)
    if not isinstance(path, RemotePath):
        return cast("BinaryIO", io.BufferedReader(open_unbuffered(path)))
    status = stat(path)
    return open_ranges(path.url, status.size, status.token)


def open_unbuffered(path: str | os.PathLike[str]) -> io.FileIO:
    """Open a local file to read at any offset, without a buffer.

    Raises:
        CheckpointError: The file does not exist, may not be read, or is not a regular file.
    """
    with guard_reads(path):
        return _LocalFile(path, opener=_open_at_once)


class _LocalFile(io.FileIO):
    """Local file that raises ckptavg errors instead of system errors.

    Parsers such as ``zipfile`` take an ``OSError`` for damage of the file.
    """

    def readinto(self, buffer: Any) -> int | None:
        """Read bytes into a buffer, and return the number of bytes."""
        with guard_reads(self.name):
            return super().readinto(buffer)

    def readall(self) -> bytes:
        """Read all bytes up to the end."""
        with guard_reads(self.name):
            return super().readall()

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Move to an offset, and return the new position."""
        with guard_reads(self.name):
            return super().seek(offset, whence)


def _open_at_once(path: str, flags: int) -> int:
    """Open a regular file without waiting, even if a pipe has replaced the file meanwhile.

    Raises:
        OSError: The file cannot be opened.
        CheckpointError: The path is not a regular file.
    """
    # Opening a pipe would otherwise wait for a writer.
    handle = os.open(path, flags | getattr(os, "O_NONBLOCK", 0))
    try:
        _check_regular(path, os.fstat(handle))
    except BaseException:
        os.close(handle)
        raise
    return handle


def _check_regular(path: object, info: os.stat_result) -> None:
    """Check that a file can be read to an end.

    Raises:
        CheckpointError: The path is a pipe, a device or a directory.
    """
    if not S_ISREG(info.st_mode):
        raise CheckpointError(f"{path} is not a regular file", "Name a file or a directory.")


def _is_disguised(error: FileNotFoundError) -> bool:
    """Return True if a "not found" error hides a failed request or another HTTP status than 404."""
    # fsspec raises ``FileNotFoundError`` for every failure of a web server, with the true cause.
    cause = error.__cause__
    if isinstance(cause, OSError):
        return not isinstance(cause, FileNotFoundError)
    return getattr(cause, "status", 404) != 404


def _local(url: str) -> Path:
    """Convert a ``file://`` URL to a local path.

    Raises:
        UsageError: The URL names another host.
    """
    host, slash, path = url.partition("://")[2].partition("/")
    if host not in ("", "localhost") or not slash:
        raise UsageError(f"{url} names the host {host!r}", "Expected file:///absolute/path.")
    return Path(url2pathname(slash + path))


def _read_time(info: Mapping[str, Any]) -> int:
    """Return the time of a remote file's last change in ns, cut to whole seconds; 0 if unknown."""
    value = next(filter(None, map(info.get, _TIMES)), 0)
    if isinstance(value, datetime):
        value = value.timestamp()
    if not isinstance(value, (int, float)):
        return 0
    return int(value) * 10**9
