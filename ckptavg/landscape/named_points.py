"""Points of a run by name: a checkpoint, the average, or the end of another run."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

from ckptavg.errors import UsageError, short
from ckptavg.errors.spelling import close_names, did_you_mean
from ckptavg.formats import Checkpoint
from ckptavg.io.paths import RemotePath, locate
from ckptavg.runs.discovery.numbered import short_names
from ckptavg.runs.order import paths_of
from ckptavg.runs.run import Run, as_run, open_run

AVERAGE, FIRST, MIDDLE, LAST = "average", "first", "middle", "last"

PointName: TypeAlias = "str | os.PathLike[str] | Checkpoint"
"""``average``, ``first``, ``middle``, ``last``, a checkpoint of the run, or the path of another
run."""


@dataclass(frozen=True)
class NamedPoint:
    """A point of weight space under a name.

    Attributes:
        name: Name in figures.
        coefficients: One per checkpoint, with sum 1.
    """

    name: str
    coefficients: tuple[float, ...]

    @property
    def position(self) -> int | None:
        """Position of the only checkpoint; None for an average of several."""
        return only_position(self.coefficients)


def only_position(coefficients: Sequence[float]) -> int | None:
    """Return the position of the only checkpoint with a coefficient; None where several have one.

    Args:
        coefficients: One per checkpoint.
    """
    weighted = [position for position, value in enumerate(coefficients) if value]
    if len(weighted) == 1:
        return weighted[0]
    return None


@dataclass(frozen=True)
class NamedPoints:
    """Points by name, over one run.

    Attributes:
        run: The run, followed by the final checkpoints of other runs among the points.
        own: Number of checkpoints of the run itself.
        points: The points, in the order of the names.
    """

    run: Run
    own: int
    points: tuple[NamedPoint, ...]


def find_points(run: Run, names: Sequence[PointName]) -> NamedPoints:
    """Find points by name.

    Args:
        run: The checkpoints.
        names: ``average`` (the uniform average of the run), ``first``, ``middle`` or ``last``; a
            checkpoint by its file name, with or without suffix, or its path; or the path of another
            run or checkpoint, whose final checkpoint is the point.

    Raises:
        UsageError: A name is unknown, or two checkpoints have the name.
        CkptavgError: Another run cannot be opened.
    """
    own = run.checkpoints
    checkpoints = [*own]
    positions: list[int | None] = []
    for name in names:
        _check_name(name)
        position = None
        if name != AVERAGE:
            position = _find_position(own, name)
            if position is None:
                position = len(checkpoints)
                checkpoints.append(_open_end(own, name))
        positions.append(position)
    extended = run
    if len(checkpoints) > len(own):
        extended = as_run(checkpoints)
    labels = short_names(paths_of(checkpoints))
    points: list[NamedPoint] = []
    for name, position in zip(names, positions, strict=True):
        label = str(name)
        # The words say more than a file name.
        if position is not None and name not in (FIRST, MIDDLE, LAST):
            label = labels[position]
        points.append(NamedPoint(label, _coefficients(position, len(own), len(checkpoints))))
    return NamedPoints(extended, len(own), tuple(points))


def _coefficients(position: int | None, own: int, count: int) -> tuple[float, ...]:
    """Return the coefficients of a checkpoint, or of the average of the run.

    Args:
        position: Position of the checkpoint; None for the average.
        own: Number of checkpoints of the run.
        count: Number of all checkpoints.
    """
    if position is None:
        return (1 / own,) * own + (0.0,) * (count - own)
    return tuple(float(number == position) for number in range(count))


def _check_name(name: object) -> None:
    """Refuse what is no name of a point.

    Raises:
        UsageError: It is something else.
    """
    if not isinstance(name, (str, os.PathLike, RemotePath, Checkpoint)):
        raise UsageError(f"a point is expected to be a name or a path but got {short(repr(name))}")


def _find_position(checkpoints: Sequence[Checkpoint], name: PointName) -> int | None:
    """Return the position of a checkpoint in the run; None where no checkpoint has the name.

    Raises:
        UsageError: Two checkpoints have the name.
    """
    words = {FIRST: 0, MIDDLE: len(checkpoints) // 2, LAST: len(checkpoints) - 1}
    if isinstance(name, str) and name in words:
        return words[name]
    positions: list[int] = []
    for position, checkpoint in enumerate(checkpoints):
        if name is checkpoint or name in _names_of(checkpoint):
            positions.append(position)
    if not positions and not isinstance(name, Checkpoint):
        resolved = locate(name).resolve()
        for position, checkpoint in enumerate(checkpoints):
            if checkpoint.path.resolve() == resolved:
                positions.append(position)
    if len(positions) > 1:
        paths = [str(checkpoints[position].path) for position in positions[:2]]
        raise UsageError(
            f"two checkpoints are called {name}: {paths[0]} and {paths[1]}", "Name the path."
        )
    if positions:
        return positions[0]
    return None


def _names_of(checkpoint: Checkpoint) -> tuple[str, ...]:
    return checkpoint.path.name, checkpoint.path.stem, str(checkpoint.path)


def _open_end(checkpoints: Sequence[Checkpoint], name: PointName) -> Checkpoint:
    """Open the final checkpoint of another run.

    Raises:
        UsageError: There is no such path.
    """
    if isinstance(name, Checkpoint):
        return name
    if locate(name).exists():
        return open_run(name).last(1)[0]
    known = [AVERAGE, FIRST, MIDDLE, LAST]
    known += short_names(paths_of(checkpoints))
    remedy = did_you_mean(close_names(str(name), known))
    if not remedy:
        remedy = (
            "Name average, first, middle, last, a checkpoint's file or the path of another run."
        )
    raise UsageError(f"no point is called {short(str(name))!r}", remedy)
