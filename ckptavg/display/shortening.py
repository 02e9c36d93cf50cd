"""Names shortened in the middle, and texts wrapped between words."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from rich.cells import cell_len

ELLIPSIS = "…"
_FEWEST = 3  # columns of a shortened name: a character, the ellipsis, a character
_MOST_CUTS = 100_000  # names times places that are tried
# A number stays with its interval, and an interval whole: +1.50 [+0.46, +2.55].
# Marks at the end of a name, one of them, and its text: epoch_9.pt (last) [model].
_MARKS = re.compile(r"(?: \([^()]*\)| \[[^][]*\])*$")
_MARK = re.compile(r"( [(\[])([^][()]*)([)\]])")
_WHOLE_NUMBER = re.compile(r"(?<![\d.])\d+(?!\d|\.\d)")
_BREAKS = re.compile(r" (?!\[[-+\d]|[-+.,\deainf]+\])")


def shorten_names(names: Sequence[str], room: int) -> list[str]:
    """Shorten names to a width, so that different names stay different where that can be.

    Marks at their ends stay, as of ``epoch_9.pt (last) [model]``, if they leave the names half of
    the room; marks that tell names apart stay in less, and are shortened themselves. Else all names
    are cut at the same place, in the middle if that tells them apart. Names that no such cut tells
    apart show the part in which they differ.

    Args:
        names: Any texts.
        room: Width in columns of a terminal, 3 or more.

    Returns:
        A name per name, in their order.
    """
    room = max(room, _FEWEST)
    different = list(dict.fromkeys(names))
    long = [name for name in different if cell_len(name) > room]
    if not long:
        return list(names)
    whole = [name for name in different if cell_len(name) <= room]
    shortened = _cut_before_marks(long, room)
    if len({*shortened.values(), *whole}) < len(different):
        cut = _cut_alike(long, room, whole)
        windows = dict(cut)
        for group in _groups_of_same(cut):
            windows |= _show_differences(group, room)
        ways = (shortened, cut, windows, _show_differences(long, room))
        shortened = max(ways, key=lambda way: len({*way.values(), *whole}))
    return [shortened.get(name, name) for name in names]


def wrap_words(text: str, room: int) -> list[str]:
    """Wrap a text between words. A word that is longer than a line stays whole, as intervals do.

    Args:
        text: One line.
        room: Width in columns of a terminal.
    """
    lines: list[str] = []
    for word in _BREAKS.split(text):
        if lines and cell_len(lines[-1]) + 1 + cell_len(word) <= room:
            lines[-1] += f" {word}"
        else:
            lines.append(word)
    return lines


def _cut_before_marks(names: Sequence[str], room: int) -> dict[str, str]:
    """Shorten what stands before the marks of names; empty where these leave too little room."""
    stems = {name: _MARKS.sub("", name) for name in names}
    marks = {name: name[len(stem) :] for name, stem in stems.items()}
    tell_apart = len({*stems.values()}) < len(names)
    least = max(room // 3 if tell_apart else (room + 1) // 2, _FEWEST)
    kept = {mark: mark for mark in marks.values()}
    if max(map(cell_len, kept)) > room - least:
        kept = _shorten_marks(list(kept), room - least) if tell_apart else {}
    if not any(kept):
        return {}
    shortened = {}
    for mark in dict.fromkeys(marks.values()):
        marked = [name for name in names if marks[name] == mark]
        left = room - cell_len(kept[mark])
        for name, stem in zip(
            marked, shorten_names([stems[name] for name in marked], left), strict=True
        ):
            shortened[name] = stem + kept[mark]
    return shortened


def _shorten_marks(marks: Sequence[str], room: int) -> dict[str, str]:
    """Shorten the texts in marks as little as they have to be; empty where they cannot be."""
    texts = list(dict.fromkeys(text for mark in marks for _, text, _ in _MARK.findall(mark)))
    for most in range(max(map(cell_len, texts)), _FEWEST - 1, -1):
        short = dict(zip(texts, shorten_names(texts, most), strict=True))
        kept = {mark: _replace_texts(mark, short) for mark in marks}
        if max(map(cell_len, kept.values())) <= room:
            return kept
    return {}


def _replace_texts(marks: str, texts: Mapping[str, str]) -> str:
    return _MARK.sub(lambda mark: mark[1] + texts[mark[2]] + mark[3], marks)


def _cut_alike(names: Sequence[str], room: int, whole: Sequence[str]) -> dict[str, str]:
    """Cut all names at the best place, the nearest to the middle of those that are equally good.

    The more names stay different, the better, then the fewer numbers are cut in two: of
    ``checkpoint-144.pt``, ``checkpoint-14…`` would name another. Then the last whole number should
    stay, which mostly is the step.
    """
    middle = (room - 1) // 2
    tails = sorted(range(room - 1), key=lambda tail: abs(tail - middle))
    tails = tails[: max(_MOST_CUTS // len(names), 1)]
    best: dict[str, str] = {}
    highest = (0, 0, 0)
    for tail in tails:
        shortened = {name: _cut(name, room, tail) for name in names}
        count = len({*shortened.values(), *whole})
        intact = sum(not _cuts_number(*pair) for pair in shortened.items())
        numbered = sum(_keeps_step(*pair) for pair in shortened.items())
        if (count, intact, numbered) > highest:
            best, highest = shortened, (count, intact, numbered)
        if highest == (len(names) + len(whole), len(names), len(names)):
            break
    return best


def _cuts_number(name: str, shortened: str) -> bool:
    """Tell whether a cut parts the digits of a number."""
    head, _, tail = shortened.partition(ELLIPSIS)
    after_head = name[len(head)].isdigit()
    before_tail = name[-len(tail) - 1].isdigit()
    return (head[-1:].isdigit() and after_head) or (tail[:1].isdigit() and before_tail)


def _keeps_step(name: str, shortened: str) -> bool:
    """Tell whether a shortened name begins readably and has the last whole number, if any."""
    numbers = [*_WHOLE_NUMBER.finditer(name)]
    if not numbers:
        return True
    head, _, tail = shortened.partition(ELLIPSIS)
    start, end = numbers[-1].span()
    return len(head) >= _FEWEST and (end <= len(head) or start >= len(name) - len(tail))


def _cut(name: str, room: int, tail: int) -> str:
    """Keep the beginning of a name, and as many columns of its end as ``tail``."""
    end = _take(name[::-1], tail)[::-1]
    return _take(name, room - 1 - tail) + ELLIPSIS + end


def _groups_of_same(shortened: Mapping[str, str]) -> list[list[str]]:
    """Group the names that are the same when shortened; those that are alone are left out."""
    groups: dict[str, list[str]] = {}
    for name, short in shortened.items():
        groups.setdefault(short, []).append(name)
    return [group for group in groups.values() if len(group) > 1]


def _show_differences(names: Sequence[str], room: int) -> dict[str, str]:
    """Shorten names on both sides of the part in which they differ.

    Where that part alone leaves no room, what stands before it goes first.
    """
    beginning = _common_beginning(names)
    ending = _common_beginning([name[::-1] for name in names])
    differing = max(map(len, names)) - beginning - ending
    before = min(max(room - 2 - differing, 0), (room - 2) // 2)
    start = max(beginning - before, 1)
    shortened = {}
    for name in names:
        rest = name[start:]
        if cell_len(rest) > room - 1:
            rest = _take(rest, room - 2) + ELLIPSIS
        shortened[name] = ELLIPSIS + rest
    for group in _groups_of_same(shortened):
        if len(group) < len(names):
            shortened |= _show_differences(group, room)
    return shortened


def _common_beginning(names: Sequence[str]) -> int:
    """Return the number of characters that all of some different names begin with."""
    first, last = min(names), max(names)
    pairs = enumerate(zip(first, last, strict=False))
    return next((i for i, (a, b) in pairs if a != b), min(len(first), len(last)))


def _take(text: str, width: int) -> str:
    """Return the beginning of a text that takes some columns of a terminal at most."""
    if text.isascii():
        return text[:width]
    for end in range(1, len(text) + 1):
        if cell_len(text[:end]) > width:
            return text[: end - 1]
    return text
