"""Guesses of the specifications that users meant by wrong ones."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping

from ckptavg.averaging.schemes.scheme import Scheme, SchemeKind
from ckptavg.errors import UsageError
from ckptavg.errors.spelling import close_names

_NAME = re.compile(r"\s*([A-Za-z]+(?:[-_ ][A-Za-z]+)*)")
_SEPARATORS = re.compile(r"[\s:=()]+|^[-_]")
_NUMBER = re.compile(r"\.?\d[\d.]*(e-?\d+)?%?")
# Words for a truth value in other tools.
_OTHER_VALUES = {
    "1": "true", "on": "true", "yes": "true", "0": "false", "no": "false", "off": "false",
    "": "true",
}  # fmt: skip


def suggest(
    text: str, kinds: Mapping[str, SchemeKind], parse: Callable[[str], Scheme]
) -> list[str]:
    """Guess the specification that a user meant by a wrong text; empty without a guess.

    Args:
        text: The wrong specification.
        kinds: Kinds of schemes by name.
        parse: Function that raises an error for wrong specifications. Only a guess that parses is
            suggested.
    """
    start = _NAME.match(text)
    if start is None:
        return []
    kind = _guess_kind(start[1], kinds)
    if kind is None:
        return []
    words = text[start.end() :].strip(" :=(),")
    options = list(kind.example)
    if words:
        options = [_correct_option(kind, part) for part in re.split("[,;]", words)]
    suggestion = kind.name
    if options:
        suggestion = f"{kind.name}:{','.join(options)}"
    # A guess that does not parse would only lead the user to the next error.
    try:
        parse(suggestion)
    except UsageError:
        return []
    return [suggestion]


def _guess_kind(word: str, kinds: Mapping[str, SchemeKind]) -> SchemeKind | None:
    """Return the kind of scheme that a word may mean, if any."""
    word = re.sub("[_ ]", "-", word.lower())
    for kind in kinds.values():
        if word in kind.other_names:
            return kind
    name = _closest(word, kinds, "")
    return kinds.get(name)


def _closest(word: str, choices: Iterable[str], default: str) -> str:
    """Return the choice that is spelled most like a word; the default where none is close."""
    close = close_names(word, choices, 1)
    if close:
        return close[0]
    return default


def _correct_option(kind: SchemeKind, part: str) -> str:
    """Correct the spelling of a scheme's option. A value alone is for the first option."""
    words = [word for word in _SEPARATORS.split(part) if word]
    if not words or not kind.options:
        return part
    key, value = words[0], " ".join(words[1:])
    first = kind.options[0]
    if not value and (_NUMBER.fullmatch(key) or key in kind.choices.get(first, ())):
        return f"{first}={key}"
    fallback = key
    # Of a scheme with one option, a word of any spelling means this option.
    if len(kind.options) == 1:
        fallback = first
    key = _closest(key, kind.options, fallback)
    choices = kind.choices.get(key, (value,))
    if value not in choices:
        value = _OTHER_VALUES.get(value.lower()) or _closest(value, choices, value)
    return f"{key}={value}"
