"""Text that is safe to print, without control characters, invisible characters and secrets.

Names come out of files, and files may be untrusted.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

_LONGEST = 1200  # characters per line
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
# Below this a float holds every whole number.
_EXACT = 1e15


def printable(text: str) -> str:
    """Make a single line of bounded length that is safe to print.

    Characters that control a terminal or are invisible are escaped as in Python's strings.
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
    """Escape the control characters and the invisible characters of a text.

    These are controls, marks of direction, characters of no width, and the surrogates that stand
    for the bytes of a file name that is not UTF-8.

    Args:
        text: Any text.
        escape: Function that returns the escape of a character; by default as in Python's strings.
        keep: Characters that are not escaped.

    Returns:
        The text with escapes.
    """
    escapes = {
        ord(c): escape(c)
        for c in set(text)
        if (not c.isprintable() or c in _BLANKS) and c not in keep
    }
    return text.translate(escapes) if escapes else text


def without_secrets(text: str) -> str:
    """Remove passwords of users and queries with signatures from the URLs in a text."""
    before, *later_parts = text.split("://")
    parts = [before]
    for part in later_parts:
        end = _END_OF_URL.search(part)
        size = end.start() if end else len(part)
        parts.append(bare_location(before, part[:size]) + part[size:])
        before = part
    return "://".join(parts)


def bare_location(scheme: str, location: str) -> str:
    """Return a URL's host and path without a password, and without the query of a web address.

    Args:
        scheme: Text that ends with the URL's scheme.
        location: Text after ``://``.
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
    """Split paths into the shared directory and the remainder of each path.

    Returns:
        The shared directory, empty if there is none, and each path relative to this directory.
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
    """Format a step for a message.

    Whole steps below 1e15 are written in full, without an exponent. All other steps get six
    significant digits.
    """
    return f"{step:.0f}" if step == round(step, 0) and abs(step) < _EXACT else f"{step:.6g}"


def size_text(count: float) -> str:
    """Format a number of bytes to three significant digits with a decimal unit."""
    for unit in ("B", "kB", "MB", "GB"):
        # Compare the rounded number: 999.9 kB would be written as 1e+03 kB.
        if float(f"{count:.3g}") < _THOUSAND:
            return f"{count:.3g} {unit}"
        count /= _THOUSAND
    return f"{three_digits(count)} TB"


def three_digits(value: float) -> str:
    """Format a positive number to three significant digits without an exponent."""
    rounded = float(f"{value:.3g}")
    return f"{rounded:,.0f}" if rounded >= _THOUSAND else f"{rounded:.3g}"
