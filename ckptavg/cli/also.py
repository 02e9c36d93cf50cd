"""``--also NAME=SCHEME[@SELECTION]``: further averages from the same read."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ckptavg.cli.param_types import pair, positive
from ckptavg.cli.param_types import scheme as read_scheme
from ckptavg.cli.selection import SELECTION, check_picks, plan_selection, select_for_average
from ckptavg.errors import CkptavgError

if TYPE_CHECKING:
    from ckptavg.averaging.plan import Average
    from ckptavg.runs.run import Run

_UNIFORM = "uniform"
_VALUES: dict[str, tuple[str, Callable[[str], Any]]] = {
    "from": ("first", float),
    "to": ("final", float),
    "every": ("every", positive),
    "cycle": ("cycle", pair),
    "best": ("best", positive),
    "metric": ("metric", str),
    "mode": ("mode", str),
    "sample": ("sample", pair),
    "last": ("last", positive),
}
_FLAGS = {"at-lr-min": "at_lr_min"}


@dataclass(frozen=True)
class Also:
    """A further average.

    Attributes:
        name: Of its output.
        scheme: How it is weighted.
        picks: Its own selection, by the names in ``SELECTION``; None for the command's.
    """

    name: str
    scheme: str
    picks: dict[str, Any] | None

    def path(self, out: str) -> str:
        """Return the output's path: beside the command's, in the same format without a suffix."""
        from ckptavg.formats.registry import (  # noqa: PLC0415 - help is shown without torch
            has_suffix,
        )

        output = Path(out)
        suffix = "" if has_suffix(self.name) or not has_suffix(out) else output.suffix
        return str(output.parent / (self.name + suffix))


def also(text: str) -> Also:
    """Read ``NAME=SCHEME[@SELECTION]``; an empty scheme is uniform.

    Raises:
        click.BadParameter: It is otherwise.
    """
    name, separator, definition = text.partition("=")
    scheme, at, selection = definition.partition("@")
    if (
        not name
        or not name.isprintable()
        or not separator
        or Path(name).name != name
        or name == ".."
    ):
        raise click.BadParameter(
            f"expected NAME=SCHEME[@SELECTION], as in last5=uniform@last=5, but got {text!r}"
        )
    try:
        read_scheme(scheme or _UNIFORM)
    except click.BadParameter as error:
        raise click.BadParameter(f"{name}: {error.message}") from None
    return Also(name, scheme or _UNIFORM, _picks(selection) if at else None)


def planned_also(one: Also, run: Run, selection: Run, settings: Mapping[str, Any]) -> Average:
    """Plan a further average: of a selection of the whole run, or of the command's selection."""
    if one.picks is not None:
        check_picks(one.picks)
        selection = select_for_average(run, one.picks)
    try:
        return plan_selection(selection, settings, scheme=one.scheme)
    except CkptavgError as error:
        error.message = f"--also {one.name}: {error.message}"
        raise


def _picks(text: str) -> dict[str, Any]:
    picks: dict[str, Any] = dict.fromkeys(SELECTION) | {"at_lr_min": False}
    keys: set[str] = set()
    for part in text.split(","):
        key, separator, value = part.strip().partition("=")
        if key in keys:
            raise click.BadParameter(f"{key!r} is given twice in {text!r}")
        keys.add(key)
        if key in _FLAGS and not separator:
            picks[_FLAGS[key]] = True
        elif key in _VALUES and value:
            name, convert = _VALUES[key]
            picks[name] = _converted(part, value, convert)
        else:
            expected = ", ".join([*(f"{name}=..." for name in _VALUES), *_FLAGS])
            raise click.BadParameter(f"expected one of {expected} after @ but got {part!r}")
    return picks


def _converted(part: str, value: str, convert: Callable[[str], Any]) -> Any:
    try:
        return convert(value)
    except ValueError:
        raise click.BadParameter(f"expected a number in {part!r}") from None
