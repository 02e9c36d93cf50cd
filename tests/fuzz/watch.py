"""An eye on the interpreter: whatever a hostile file might set going ends the case at once."""

from __future__ import annotations

import codecs
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

_NEVER = (
    "code.__new__", "compile", "ctypes.", "exec", "ftplib.", "function.__new__", "imaplib.",
    "import", "marshal.load", "os.exec", "os.fork", "os.posix_spawn", "os.spawn", "os.system",
    "pickle.find_class", "pty.spawn", "runpy.", "smtplib.", "socket.", "subprocess.", "telnetlib.",
    "urllib.", "webbrowser.",
)  # fmt: skip
_ONLY_INSIDE = (
    "os.chmod", "os.link", "os.mkdir", "os.remove", "os.rename", "os.rmdir", "os.symlink",
    "os.truncate", "shutil.",
)  # fmt: skip
for _codec in ("cp437", "latin-1", "raw_unicode_escape", "unicode_escape"):
    codecs.lookup(_codec)  # zipfile and pickletools load them when they must
_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND


class Ran(BaseException):
    """Something ran. No ``except Exception`` on its way catches it."""


class _Watch:
    """The one audit hook of this process, idle until a case begins.

    Attributes:
        room: The directory that the case may write to; None between cases.
        seen: What happened although it must not.
    """

    def __init__(self) -> None:
        self.room: Path | None = None
        self.seen: list[str] = []

    def __call__(self, event: str, args: tuple[Any, ...]) -> None:
        if self.room is not None and self._forbidden(event, args):
            self.seen.append(f"{event} {args!r}"[:500])
            raise Ran(self.seen[-1])

    def _forbidden(self, event: str, args: tuple[Any, ...]) -> bool:
        if event == "open":
            mode, flags = args[1], args[2]
            writes = flags & _WRITING if flags else any(c in (mode or "") for c in "wax+")
            return bool(writes) and not self._inside(args[0])
        if event.startswith(_ONLY_INSIDE):
            return not self._inside(args[0])
        return event.startswith(_NEVER)

    def _inside(self, path: Any) -> bool:
        if isinstance(path, int):
            return True  # opened before, and looked at then
        return self.room is not None and self.room in Path(os.fsdecode(path)).parents


_watch: list[_Watch] = []


@contextmanager
def watched(room: Path) -> Iterator[None]:
    """Nothing runs inside this context, nothing is imported, written only below ``room``.

    Raises:
        Ran: Something else happened.
    """
    if not _watch:
        _watch.append(_Watch())
        sys.addaudithook(_watch[0])
    watch = _watch[0]
    watch.room, watch.seen = room, []
    try:
        yield
    finally:
        watch.room = None
    if watch.seen:
        raise Ran("; ".join(watch.seen))
