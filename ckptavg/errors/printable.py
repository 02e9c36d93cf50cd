"""Text that is safe to print, without control characters, invisible characters and secrets.

Names come out of files, and files may be untrusted.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

_LONGEST = 1200  # characters per line
# Characters that Python calls printable although a terminal shows nothing for them: Unicode's
# default ignorable code points, and the blank of Braille.
_BLANK_RANGES = (
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
_BLANKS = frozenset(chr(code) for first, last in _BLANK_RANGES for code in range(first, last + 1))
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
    escapes: dict[int, str] = {}
    for character in {*text} - {*keep}:
        if not character.isprintable() or character in _BLANKS:
            escapes[ord(character)] = escape(character)
    return text.translate(escapes)


def without_secrets(text: str) -> str:
    """Remove passwords of users and queries with signatures from the URLs in a text."""
    before, *later_parts = text.split("://")
    parts = [before]
    for part in later_parts:
        location, remainder = _split_before(_END_OF_URL, part)
        parts.append(bare_location(before, location) + remainder)
        before = part
    return "://".join(parts)


def _split_before(end: re.Pattern[str], text: str) -> tuple[str, str]:
    """Split a text before the first match of a pattern, or at the end."""
    if (match := end.search(text)) is None:
        return text, ""
    return text[: match.start()], text[match.start() :]


def bare_location(scheme: str, location: str) -> str:
    """Return a URL's host and path without a password, and without the query of a web address.

    Args:
        scheme: Text that ends with the URL's scheme.
        location: Text after ``://``.
    """
    is_web = scheme.lower().endswith(("http", "https"))
    host, path = _split_before(_END_OF_HOST, location)
    user, _, bare_host = host.rpartition("@")
    # The user of a web address may be a token; a bucket's may be its name.
    if is_web or ":" in user:
        host = bare_host
    if is_web:
        path = path.partition("?")[0]
    return host + path


def split_directory(paths: Sequence[str]) -> tuple[str, list[str]]:
    """Split paths into the shared directory and the remainder of each path.

    Returns:
        The shared directory, empty if there is none, and each path relative to this directory.
    """
    parts = [path.split("/") for path in paths]
    shared: list[str] = []
    # The last part of each path is a name, and no directory.
    for names in zip(*(names[:-1] for names in parts), strict=False):
        if len({*names}) > 1:
            break
        shared.append(names[0])
    return "/".join(shared), ["/".join(names[len(shared) :]) for names in parts]


def step_text(step: float) -> str:
    """Format a step for a message.

    Whole steps below 1e15 are written in full, without an exponent. All other steps get six
    significant digits.
    """
    if step == round(step, 0) and abs(step) < _EXACT:
        return f"{step:.0f}"
    return f"{step:.6g}"


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
    if rounded >= _THOUSAND:
        return f"{rounded:,.0f}"
    return f"{rounded:.3g}"
