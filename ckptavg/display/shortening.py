"""Shortening of names in the middle, and wrapping of texts between words."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from rich.cells import cell_len

ELLIPSIS = "…"
# Columns of a shortened name: a character, the ellipsis, a character.
_FEWEST = 3
# Names times places of a cut that are tried: a limit on the time for very many names.
_MOST_CUTS = 100_000
# A number stays with its interval, and an interval whole: +1.50 [+0.46, +2.55].
# Marks at the end of a name, one of them, and its text: epoch_9.pt (last) [model].
_MARKS = re.compile(r"(?: \([^()]*\)| \[[^][]*\])*$")
_MARK = re.compile(r"( [(\[])([^][()]*)([)\]])")
_WHOLE_NUMBER = re.compile(r"(?<![\d.])\d+(?!\d|\.\d)")
_BREAKS = re.compile(r" (?!\[[-+\d]|[-+.,\deainf]+\])")


def shorten_names(names: Sequence[str], room: int) -> list[str]:
    """Shorten names to a width and keep different names different if possible.

    Marks at the ends of names, as of ``epoch_9.pt (last) [model]``, are kept if they leave half of
    the room to the names. Marks that distinguish names are kept in less room, and are shortened
    themselves. Otherwise all names are cut at the same place: in the middle if the names stay
    different. Names that no such cut distinguishes show the part in which they differ.

    Args:
        names: Any texts.
        room: Width in columns of a terminal, 3 or more.

    Returns:
        A name per name, in their order.
    """
    room = max(room, _FEWEST)
    different = list(dict.fromkeys(names))
    # A shortened name must not equal a name that fits.
    long: list[str] = []
    fitting: list[str] = []
    for name in different:
        if cell_len(name) > room:
            long.append(name)
        else:
            fitting.append(name)
    if not long:
        return list(names)
    shortened = _cut_before_marks(long, room)
    if len({*shortened.values(), *fitting}) < len(different):
        cut = _cut_alike(long, room, fitting)
        windows = dict(cut)
        for group in _groups_of_same(cut):
            windows |= _show_differences(group, room)
        ways = (shortened, cut, windows, _show_differences(long, room))
        shortened = max(ways, key=lambda way: len({*way.values(), *fitting}))
    return [shortened.get(name, name) for name in names]


def wrap_words(text: str, room: int) -> list[str]:
    """Wrap a text between words.

    Words that are longer than a line stay whole, and so do intervals.

    Args:
        text: One line.
        room: Width in columns of a terminal.

    Returns:
        The lines.
    """
    lines: list[str] = []
    for word in _BREAKS.split(text):
        if lines and cell_len(lines[-1]) + 1 + cell_len(word) <= room:
            lines[-1] += f" {word}"
        else:
            lines.append(word)
    return lines


def _cut_before_marks(names: Sequence[str], room: int) -> dict[str, str]:
    """Shorten the part of names before the marks; return nothing if the room is too small."""
    # Mark → name with this mark → stem, which is the name without the mark.
    stems_by_mark: dict[str, dict[str, str]] = {}
    different_stems: set[str] = set()
    for name in names:
        stem = _MARKS.sub("", name)
        stems_by_mark.setdefault(name[len(stem) :], {})[name] = stem
        different_stems.add(stem)
    marks = list(stems_by_mark)
    marks_distinguish = len(different_stems) < len(names)
    least = max((room + 1) // 2, _FEWEST)
    if marks_distinguish:
        least = max(room // 3, _FEWEST)
    short_marks = dict(zip(marks, marks, strict=True))
    if max(map(cell_len, marks)) > room - least:
        if not marks_distinguish:
            return {}
        short_marks = _shorten_marks(marks, room - least)
    if not any(short_marks):
        return {}
    shortened = {}
    for mark, stems in stems_by_mark.items():
        short_mark = short_marks[mark]
        short_stems = shorten_names(list(stems.values()), room - cell_len(short_mark))
        for name, stem in zip(stems, short_stems, strict=True):
            shortened[name] = stem + short_mark
    return shortened


def _shorten_marks(marks: Sequence[str], room: int) -> dict[str, str]:
    """Shorten the texts in marks as little as necessary; return nothing if that does not fit."""
    texts_in_order: dict[str, None] = {}
    for mark in marks:
        for _, text, _ in _MARK.findall(mark):
            texts_in_order[text] = None
    texts = list(texts_in_order)
    for most in range(max(map(cell_len, texts)), _FEWEST - 1, -1):
        short = dict(zip(texts, shorten_names(texts, most), strict=True))
        short_marks = {mark: _replace_texts(mark, short) for mark in marks}
        if max(map(cell_len, short_marks.values())) <= room:
            return short_marks
    return {}


def _replace_texts(marks: str, texts: Mapping[str, str]) -> str:
    """Replace the texts in the brackets of marks."""
    return _MARK.sub(lambda mark: mark[1] + texts[mark[2]] + mark[3], marks)


def _cut_alike(names: Sequence[str], room: int, whole: Sequence[str]) -> dict[str, str]:
    """Cut all names at the best place, and of equally good places at the nearest to the middle.

    A place is better if more names stay different, then if fewer numbers are cut in two: of
    ``checkpoint-144.pt``, ``checkpoint-14…`` would name another checkpoint. Then a place is better
    if more names keep the last whole number, which mostly is the step.
    """
    middle = (room - 1) // 2
    tails = sorted(range(room - 1), key=lambda tail: abs(tail - middle))
    tails = tails[: max(_MOST_CUTS // len(names), 1)]
    best: dict[str, str] = {}
    highest = (0, 0, 0)
    for tail in tails:
        shortened = {name: _cut(name, room, tail) for name in names}
        count = len({*shortened.values(), *whole})
        intact = numbered = 0
        for name, short in shortened.items():
            intact += not _cuts_number(name, short)
            numbered += _keeps_step(name, short)
        if (count, intact, numbered) > highest:
            best, highest = shortened, (count, intact, numbered)
        if highest == (len(names) + len(whole), len(names), len(names)):
            break
    return best


def _cuts_number(name: str, shortened: str) -> bool:
    """Return True if a cut separates the digits of a number."""
    head, _, tail = shortened.partition(ELLIPSIS)
    after_head = name[len(head)].isdigit()
    before_tail = name[-len(tail) - 1].isdigit()
    return (head[-1:].isdigit() and after_head) or (tail[:1].isdigit() and before_tail)


def _keeps_step(name: str, shortened: str) -> bool:
    """Return True if a shortened name keeps a readable beginning and the last whole number."""
    numbers = [*_WHOLE_NUMBER.finditer(name)]
    if not numbers:
        return True
    head, _, tail = shortened.partition(ELLIPSIS)
    start, end = numbers[-1].span()
    return len(head) >= _FEWEST and (end <= len(head) or start >= len(name) - len(tail))


def _cut(name: str, room: int, tail: int) -> str:
    """Cut a name in the middle and keep ``tail`` columns of the end."""
    end = _take(name[::-1], tail)[::-1]
    return _take(name, room - 1 - tail) + ELLIPSIS + end


def _groups_of_same(shortened: Mapping[str, str]) -> list[list[str]]:
    """Group the names that are equal when shortened; leave out groups of a single name."""
    groups: dict[str, list[str]] = {}
    for name, short in shortened.items():
        groups.setdefault(short, []).append(name)
    return [group for group in groups.values() if len(group) > 1]


def _show_differences(names: Sequence[str], room: int) -> dict[str, str]:
    """Shorten names on both sides of the differing part.

    If that part leaves no room, the text before the part is cut first.
    """
    beginning = _common_beginning(names)
    ending = _common_beginning([name[::-1] for name in names])
    differing = max(map(len, names)) - beginning - ending
    before = min(max(room - 2 - differing, 0), (room - 2) // 2)
    start = max(beginning - before, 1)
    shortened = {}
    for name in names:
        tail = name[start:]
        if cell_len(tail) > room - 1:
            tail = _take(tail, room - 2) + ELLIPSIS
        shortened[name] = ELLIPSIS + tail
    for group in _groups_of_same(shortened):
        # A group of all names would be the same again, without end.
        if len(group) < len(names):
            shortened |= _show_differences(group, room)
    return shortened


def _common_beginning(names: Sequence[str]) -> int:
    """Return the number of first characters that different names share."""
    # In sorted order, the first and the last name differ earliest.
    first, last = min(names), max(names)
    for i, (left, right) in enumerate(zip(first, last, strict=False)):
        if left != right:
            return i
    return min(len(first), len(last))


def _take(text: str, width: int) -> str:
    """Return the beginning of a text that fits a width in columns of a terminal."""
    # A shortcut: measuring every beginning takes time quadratic in the length.
    if text.isascii():
        return text[:width]
    for end in range(1, len(text) + 1):
        if cell_len(text[:end]) > width:
            return text[: end - 1]
    return text
