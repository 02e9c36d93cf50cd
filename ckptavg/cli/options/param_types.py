"""Texts of options read as numbers, pairs and schemes."""

from __future__ import annotations

import click

from ckptavg.errors import UsageError
from ckptavg.runs.window import is_share, parse_share


def pair(text: str) -> tuple[int, int | None]:
    """Read ``N`` or ``N:M``, two whole numbers."""
    first, separator, second = text.partition(":")
    try:
        if not separator:
            return int(first), None
        return int(first), int(second)
    except ValueError:
        raise click.BadParameter(f"expected N or N:M but got {text!r}") from None


def numbers(text: str) -> list[float]:
    """Read numbers separated by commas."""
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise click.BadParameter(f"expected numbers like 2,3,5 but got {text!r}") from None


def whole(text: str) -> int:
    """Read a whole number, 0 or more."""
    if not text.isdecimal():
        raise click.BadParameter(f"expected a whole number but got {text!r}")
    return int(text)


def positive(text: str) -> int:
    """Read a whole number, 1 or more."""
    if not text.isdecimal() or not int(text):
        raise click.BadParameter(f"expected a whole number from 1 on but got {text!r}")
    return int(text)


def window(text: str) -> int | str:
    """Read a number of checkpoints, 1 or more, or a share of training such as ``10%``."""
    if not is_share(text):
        return positive(text)
    try:
        parse_share("a share of training", text)
    except UsageError as error:
        raise click.BadParameter(str(error)) from None
    return text


def output(text: str) -> str:
    """Read the path of an output; standard output is refused."""
    if text == "-":
        raise click.BadParameter(
            "expected a file or a directory but got '-': weights are not written to standard output"
        )
    return text


def subset(text: str) -> tuple[int, bool]:
    """Read ``N`` or ``N:stratified``."""
    count, separator, how = text.partition(":")
    if not count.isdecimal() or not int(count) or (separator and how != "stratified"):
        raise click.BadParameter(f"expected N or N:stratified but got {text!r}")
    return int(count), bool(separator)


def scheme(text: str) -> str:
    """Check an averaging scheme before any file is opened."""
    from ckptavg.averaging import schemes  # noqa: PLC0415 - help is shown without it

    try:
        schemes.parse(text)
    except UsageError as error:
        raise click.BadParameter(str(error)) from None
    return text


def ensemble(text: str) -> str:
    """Check the name and the options of an ensemble before any file is opened."""
    from ckptavg.evaluation.ensembles import parse_ensembles  # noqa: PLC0415 - as above

    try:
        parse_ensembles(text)
    except UsageError as error:
        raise click.BadParameter(str(error)) from None
    return text
