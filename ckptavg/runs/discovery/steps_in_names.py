"""Steps in names of checkpoints, for use where training recorded no step."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Literal

from ckptavg.formats.metric_names import METRIC_WORDS

Unit = Literal["step", "epoch"]
_FACTORS = {"": 1, "k": 10**3, "m": 10**6}
# Digits with dots between, and thousands or millions by a letter: 0.25, 1.2.3, 10k, 1.5m.
_NUMBER = re.compile(r"(\d+(?:\.\d+)*)([km](?![a-z0-9]))?")
_WORDS: dict[Unit, str] = {
    "step": "(?:global_?)?steps?|iter|iteration|iters|iterations|updates?",
    "epoch": "epochs?|ep",
}
_WORD_FIRST = {
    unit: re.compile(rf"(?<![a-z])(?:{words})[-_= ]?(?=\d)") for unit, words in _WORDS.items()
}
_NUMBER_FIRST = {
    unit: re.compile(rf"(?<![\d.]){_NUMBER.pattern}[-_ ]?(?:{words})(?![a-z]|[-_= ]?\d)")
    for unit, words in _WORDS.items()
}
_INDEXED = re.compile(r"(\d{1,2})\.([1-9]\d{0,17})")
_WORD_BEFORE = re.compile(r"([a-z]+)([^a-z]*)$")
# A day, and perhaps a time of day: 2024-01-31, 20240131_235959, 2024-01-31T23:59:59,
# 2024-01-31+23-59-59.
DATE = re.compile(
    r"(?<!\d)(?:19|20)\d\d([-_.]?)[01]\d\1[0-3]\d"
    r"(?:[-_T +]?[0-2]\d[-_.:h]?[0-5]\d(?:[-_.:m]?[0-5]\d)?)?(?!\d)",
    re.IGNORECASE,
)
_LONGEST_WORD, _MOST_DIGITS = 40, 300
# Words of METRIC_WORDS that have other meanings in the names of checkpoints.
_OTHER_MEANINGS = frozenset(
    ["ap", "ar", "em", "fid", "kl", "map", "metric", "metrics", "result", "results", "success"]
)
_SCORES = METRIC_WORDS - _OTHER_MEANINGS
# Endings of compound words for scores: valloss, bestacc.
_ENDS_OF_SCORES = ("loss", "acc", "accuracy", "score")
# Numbers in the names of metrics: top5, f1.
_CUTOFFS = frozenset(["1", "2", "3", "5", "10", "50", "75", "95"])


@dataclass(frozen=True)
class NamedStep:
    """Step in the name of a checkpoint.

    Attributes:
        value: A whole number; None where the name has no number that may be a step.
        unit: Unit that a word in the name states; None without such a word.
        within: Step within the epoch, if the value is an epoch and steps restart in each epoch.
    """

    value: int | None
    unit: Unit | None = None
    within: int | None = None


def read_steps(stems: Sequence[str]) -> list[NamedStep]:
    """Read the steps in names: the numbers after a word like step or epoch, if any.

    Without such a word, the step is the first number that tells the names apart, or the last number
    of a single name. A date is one number, with the year in front. Scores are no steps: numbers
    that are not whole, and numbers after the name of a metric.

    Args:
        stems: The names of a run's checkpoints, without suffixes.

    Returns:
        A step per name; without a value where the name tells none.
    """
    names = [stem.lower() for stem in stems]
    if (by_word := _common_word(names)) is not None:
        return by_word
    if (by_date := _dates(names)) is not None:
        return by_date
    if (by_index := _steps_of_indices(names)) is not None:
        return by_index
    numbers = [_whole_numbers(name) for name in names]
    index = _differing_index([values for values in numbers if values])
    steps: list[NamedStep] = []
    for name, values in zip(names, numbers, strict=True):
        value = values[index] if values else None
        steps.append(NamedStep(value, read_unit(name)))
    return steps


def _differing_index(numbers: Sequence[Sequence[int]]) -> int:
    """Return the index of the first number that differs between names; -1 where none does."""
    for index, values in enumerate(zip(*numbers, strict=False)):
        if len(set(values)) > 1:
            return index
    return -1


def read_unit(stem: str) -> Unit | None:
    """Read the unit of the number in a name from the word beside the number."""
    name = stem.lower()
    for unit in _WORDS:
        if _by_word(name, unit) is not None:
            return unit
    return None


def _common_word(names: Sequence[str]) -> list[NamedStep] | None:
    """Read the steps by a word in all names, preferably a word that tells the names apart."""
    by_unit: dict[Unit, list[int | None]] = {}
    for unit in _WORDS:
        by_unit[unit] = [_by_word(name, unit) for name in names]
    # Tried first: steps that restart in each epoch differ between names, but do not order these.
    if (restarting := _steps_of_epochs(by_unit["epoch"], by_unit["step"])) is not None:
        return restarting
    constant: list[NamedStep] | None = None
    for unit, values in by_unit.items():
        if None in values:
            continue
        steps = [NamedStep(value, unit) for value in values]
        if len(set(values)) > 1 or len(values) == 1:
            return steps
        constant = constant or steps
    return constant


def _steps_of_epochs(
    epochs: Sequence[int | None], steps: Sequence[int | None]
) -> list[NamedStep] | None:
    """Read steps that restart in each epoch.

    Args:
        epochs: The epoch in each name, if any.
        steps: The step in each name, if any.

    Returns:
        Epochs with the steps within; None where steps count on over the epochs, or where a name
        lacks an epoch or a step.
    """
    pairs: list[tuple[int, int]] = []
    for epoch, step in zip(epochs, steps, strict=True):
        if epoch is not None and step is not None:
            pairs.append((epoch, step))
    ordered = [step for _, step in sorted(pairs)]
    if len(pairs) < len(epochs) or ordered == sorted(ordered):
        return None
    return [NamedStep(epoch, "epoch", within=step) for epoch, step in pairs]


def _dates(names: Sequence[str]) -> list[NamedStep] | None:
    """Read the steps by the date that all names have, written to the same precision."""
    dates: list[str] = []
    for name in names:
        date = DATE.search(name)
        if date is None:
            return None
        dates.append(re.sub(r"\D", "", date[0]))
    if len(set(map(len, dates))) != 1:
        return None
    return [NamedStep(int(date)) for date in dates]


def _steps_of_indices(names: Sequence[str]) -> list[NamedStep] | None:
    """Read the steps in names of an index and a step, as ema-pytorch's ``0.500`` and ``1.500``.

    Returns:
        The steps; None where the indices do not count from 0, or one lacks a step of another.
    """
    steps: dict[int, set[int]] = {}
    in_order: list[NamedStep] = []
    for name in names:
        match = _INDEXED.fullmatch(name)
        if match is None:
            return None
        steps.setdefault(int(match[1]), set()).add(int(match[2]))
        in_order.append(NamedStep(int(match[2])))
    # A single index may be the whole part of scores: 0.25, 0.5.
    if len(steps) < 2 or set(steps) != set(range(len(steps))):
        return None
    if any(known != steps[0] for known in steps.values()):
        return None
    return in_order


def _by_word(name: str, unit: Unit) -> int | None:
    """Read the whole number beside a word of a unit."""
    for word in _WORD_FIRST[unit].finditer(name):
        number = _NUMBER.match(name, word.end())
        if number is not None and (value := _read_whole(number)) is not None:
            return value
    number = _NUMBER_FIRST[unit].search(name)
    if number is None:
        return None
    return _read_whole(number)


def _read_whole(number: re.Match[str]) -> int | None:
    """Return the value of a number with or without a factor; None if not whole."""
    digits, factor = number[1], number[2]
    if len(digits) > _MOST_DIGITS or digits.count(".") > 1 or ("." in digits and not factor):
        return None
    # Computed exactly, since in floats 1.001k is not whole.
    value = Fraction(digits) * _FACTORS[factor or ""]
    if value.denominator != 1:
        return None
    return int(value)


def _whole_numbers(name: str) -> list[int]:
    """List the numbers of a name that may be a step, in order."""
    numbers: list[int] = []
    end, value_follows = 0, False
    for number in _NUMBER.finditer(name):
        between, end = name[end : number.start()], number.end()
        word = _WORD_BEFORE.search(between[-_LONGEST_WORD:])
        # In top1_76 the metric's name ends in a number (top1), so the next number is the value.
        if word is None and value_follows:
            value_follows = False
        elif word is not None and _names_score(word[1], number[0]):
            value_follows = word[2] in ("", "@") and number[0] in _CUTOFFS
        else:
            numbers += _split_dotted(name, number)
    return numbers


def _names_score(word: str, number: str) -> bool:
    """Return True if a word is a metric's name, alone or with the number behind."""
    return word in _SCORES or word + number in _SCORES or word.endswith(_ENDS_OF_SCORES)


def _split_dotted(name: str, number: re.Match[str]) -> list[int]:
    """Split numbers at dots: 1.2.3 gives 1, 2 and 3. A decimal such as 0.25 is a score: none.

    Args:
        name: The whole name.
        number: Match of digits and dots in the name.
    """
    digits = number[1].split(".")
    is_list = len(digits) > 2 or (digits[0] != "0" and name[: number.start()].endswith("."))
    if len(digits) > 1 and is_list and number[2] is None:
        return [int(text) for text in digits if len(text) <= _MOST_DIGITS]
    value = _read_whole(number)
    if value is None:
        return []
    return [value]
