"""Text as a terminal may show it: nothing that steers it, nothing unseen, no secrets of URLs.

Names come out of files, and files out of strange hands.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

_LONGEST = 1200  # characters of a line
# Characters that Python calls printable although a terminal shows nothing for them: Unicode's
# default ignorable code points, and the blank of Braille.
_BLANKS = frozenset(
    chr(code)
    for first, last in (
        (0x034F, 0x034F),  # combining grapheme joiner
        (0x115F, 0x1160),  # fillers of Hangul
        (0x17B4, 0x17B5),  # inherent vowels of Khmer
        (0x180B, 0x180F),  # variation selectors and separators of Mongolian
        (0x2800, 0x2800),
        (0x3164, 0x3164),
        (0xFE00, 0xFE0F),  # variation selectors
        (0xFFA0, 0xFFA0),
        (0xE0100, 0xE01EF),
    )
    for code in range(first, last + 1)
)
_END_OF_URL = re.compile(r"[\s\"'<>]")
_END_OF_HOST = re.compile(r"[/?#]")
_THOUSAND = 1e3
_EXACT = 1e15  # below it a float holds every whole number


def printable(text: str) -> str:
    """Make a text one line of bounded length that a terminal shows as it is.

    Characters that steer a terminal or leave no mark are escaped as in Python's strings.
    """
    line = " ".join(without_secrets(text).split())
    if len(line) > _LONGEST:
        line = f"{line[: _LONGEST // 2]} ... {line[-_LONGEST // 2 :]}"
    return escape_unseen(line)


def escape_unseen(
    text: str,
    escape: Callable[[str], str] = lambda c: c.encode("unicode_escape").decode("ascii"),
    *,
    keep: str = "",
) -> str:
    """Escape the characters of a text that steer a terminal or leave no mark on it.

    Controls, marks of direction, characters of no width, and the surrogates that stand for the
    bytes of a file's name that is no UTF-8.

    Args:
        text: Any text.
        escape: Gives the escape of a character; usually as in Python's strings.
        keep: Characters that stay.
    """
    escapes = {
        ord(c): escape(c)
        for c in set(text)
        if (not c.isprintable() or c in _BLANKS) and c not in keep
    }
    return text.translate(escapes) if escapes else text


def without_secrets(text: str) -> str:
    """Return a text whose URLs have lost their users' passwords and the queries that sign them."""
    before, *others = text.split("://")
    parts = [before]
    for part in others:
        end = _END_OF_URL.search(part)
        size = end.start() if end else len(part)
        parts.append(bare_location(before, part[:size]) + part[size:])
        before = part
    return "://".join(parts)


def bare_location(scheme: str, location: str) -> str:
    """Return a URL's host and path without a password, and without the query of a web address.

    Args:
        scheme: Ends with the URL's scheme.
        location: Whatever stands after ``://``.
    """
    web = scheme.lower().endswith(("http", "https"))
    end = _END_OF_HOST.search(location)
    size = end.start() if end else len(location)
    user, _, bare = location[:size].rpartition("@")
    # The user of a web address may be a token; a bucket's may be its name.
    host = bare if web or ":" in user else location[:size]
    path = location[size:]
    return host + (path.partition("?")[0] if web else path)


def split_directory(paths: Sequence[str]) -> tuple[str, list[str]]:
    """Split the directory that all of some paths share off them.

    Returns:
        The directory, empty if there is none, and each path from there on.
    """
    parents = [path.split("/")[:-1] for path in paths]
    shared = 0
    for names in zip(*parents, strict=False):
        if len({*names}) > 1:
            break
        shared += 1
    directory = "/".join(parents[0][:shared]) if parents else ""
    return directory, ["/".join(path.split("/")[shared:]) for path in paths]


def step_text(step: float) -> str:
    """Write a step for a message: whole ones in full, however large, never with an exponent."""
    return f"{step:.0f}" if step == round(step, 0) and abs(step) < _EXACT else f"{step:.6g}"


def size_text(count: float) -> str:
    """Write a number of bytes to three digits, with a decimal unit."""
    for unit in ("B", "kB", "MB", "GB"):
        if float(f"{count:.3g}") < _THOUSAND:
            return f"{count:.3g} {unit}"
        count /= _THOUSAND
    return f"{three_digits(count)} TB"


def three_digits(value: float) -> str:
    """Write a positive number to three digits but without an exponent."""
    rounded = float(f"{value:.3g}")
    return f"{rounded:,.0f}" if rounded >= _THOUSAND else f"{rounded:.3g}"
