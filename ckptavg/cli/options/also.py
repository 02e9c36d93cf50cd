"""``--also NAME=SCHEME[@SELECTION]``: further averages from the same read."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ckptavg.cli.options.averaging import TensorOptions, WeightingOptions, plan_selection
from ckptavg.cli.options.param_types import pair, positive, window
from ckptavg.cli.options.param_types import scheme as read_scheme
from ckptavg.cli.options.selection import Picks
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
    "last": ("last", window),
}
_SIGN = re.compile(r"@\s*(?P<word>[a-z-]+)(?=\s*(?:[=,]|$))")
_SWITCHES = {"at-lr-min": "at_lr_min"}


@dataclass(frozen=True)
class AlsoAverage:
    """A further average.

    Attributes:
        name: Name of the output.
        scheme: Name of a scheme, with its options.
        picks: Its own selection of the whole run; None for the command's selection.
    """

    name: str
    scheme: str
    picks: Picks | None

    def path(self, out: str) -> str:
        """Return the output's path: beside the command's, in the same format without a suffix."""
        from ckptavg.formats.registry import (  # noqa: PLC0415 - help is shown without torch
            has_suffix,
        )

        output = Path(out)
        name = self.name
        if has_suffix(out) and not has_suffix(name):
            name += output.suffix
        return str(output.parent / name)

    def plan(self, run: Run, selection: Run, tensors: TensorOptions) -> Average:
        """Plan the average.

        Args:
            run: The whole run.
            selection: The command's selection, used where the average has none of its own.
            tensors: Options on the tensors.

        Raises:
            CkptavgError: The checkpoints cannot be averaged in this way.
        """
        if self.picks is not None:
            self.picks.check()
            selection = self.picks.select_for_average(run)
        try:
            return plan_selection(selection, WeightingOptions(self.scheme), tensors)
        except CkptavgError as error:
            error.message = f"--also {self.name}: {error.message}"
            raise


def read_also(text: str) -> AlsoAverage:
    """Read ``NAME=SCHEME[@SELECTION]``; an empty scheme is uniform.

    Raises:
        click.BadParameter: The text has another form.
    """
    name, separator, definition = text.partition("=")
    scheme, at, selection = _split_selection(definition)
    is_file_name = bool(name) and name.isprintable() and Path(name).name == name and name != ".."
    if not separator or not is_file_name:
        raise click.BadParameter(
            f"expected NAME=SCHEME[@SELECTION], as in last5=uniform@last=5, but got {text!r}"
        )
    scheme = scheme or _UNIFORM
    try:
        read_scheme(scheme)
    except click.BadParameter as error:
        raise click.BadParameter(f"{name}: {error.message}") from None
    if not at:
        return AlsoAverage(name, scheme, None)
    return AlsoAverage(name, scheme, _read_picks(selection))


def _split_selection(definition: str) -> tuple[str, str, str]:
    """Split ``SCHEME@SELECTION`` at the sign before a selection's word.

    Names of metrics in a scheme may have the sign as well: ``softmax:metric=map@50,...``.

    Returns:
        The scheme, the sign, and the selection; the last two empty if there is no selection.
    """
    for match in reversed(list(_SIGN.finditer(definition))):
        if match["word"] in _VALUES or match["word"] in _SWITCHES:
            return definition[: match.start()], "@", definition[match.start() + 1 :]
    try:
        read_scheme(definition)
    except click.BadParameter:
        return definition.partition("@")
    return definition, "", ""


def _read_picks(text: str) -> Picks:
    picks: dict[str, Any] = {}
    keys: set[str] = set()
    for part in text.split(","):
        key, separator, value = part.strip().partition("=")
        if key in keys:
            raise click.BadParameter(f"{key!r} is given twice in {text!r}")
        keys.add(key)
        if key in _SWITCHES and not separator:
            picks[_SWITCHES[key]] = True
        elif key in _VALUES and value:
            name, convert = _VALUES[key]
            picks[name] = _convert(part, value, convert)
        else:
            forms = [f"{name}=..." for name in _VALUES]
            expected = ", ".join([*forms, *_SWITCHES])
            raise click.BadParameter(f"expected one of {expected} after @ but got {part!r}")
    return Picks(**picks)


def _convert(part: str, value: str, convert: Callable[[str], Any]) -> Any:
    try:
        return convert(value)
    except ValueError:
        raise click.BadParameter(f"expected a number in {part!r}") from None
