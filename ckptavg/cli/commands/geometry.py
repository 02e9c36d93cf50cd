"""Tables of ``--geometry``, for a run that is inspected or averaged."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from ckptavg.cli.console import Report
from ckptavg.display.tables import NOTHING
from ckptavg.errors import first_few
from ckptavg.runs.discovery.numbered import short_names

if TYPE_CHECKING:
    from ckptavg.formats import Checkpoint
    from ckptavg.inspection.geometry import Geometry


def show(report: Report, geometry: Geometry) -> None:
    """Show a table of lengths, and a line on checkpoints that stand apart."""
    ordered = geometry.distances.sort(1).values
    columns = {
        "norm": geometry.norms.tolist(),
        "step": _by_checkpoint(geometry),
        "to mean": geometry.to_mean.tolist(),
        "to nearest": ordered[:, 1].tolist(),
        "to farthest": ordered[:, -1].tolist(),
    }
    names = short_names([checkpoint.path for checkpoint in geometry.checkpoints])
    rows = []
    for name, *lengths in zip(names, *columns.values(), strict=True):
        rows.append((name, *map(_length_text, lengths)))
    title = "geometry of the weights (Euclidean; step: from the one before)"
    report.table(("checkpoint", *columns), rows, title=title)
    if geometry.step_cosines.isfinite().any():
        cosine = geometry.step_cosines.nanmean()
        report.line(
            f"successive steps: mean cosine {cosine:.2f} (1 straight, 0 random walk, -0.5 scatter)"
        )
    report.line(_verdict(geometry))


def _by_checkpoint(geometry: Geometry) -> list[float | None]:
    """Return the length of the step to each checkpoint; None for the first of a training."""
    steps = geometry.steps.tolist()
    lengths: list[float | None] = []
    for training in geometry.run.trainings:
        count = len(training) - 1
        lengths += [None, *steps[:count]]
        steps = steps[count:]
    return lengths


def _length_text(value: float | None) -> str:
    if value is None:
        return NOTHING
    return f"{value:#.4g}".rstrip(".")


def _verdict(geometry: Geometry) -> str:
    """Word a line about checkpoints that stand apart."""
    outliers, groups = geometry.outliers, geometry.groups
    if outliers is not None:
        names = _names_within(geometry, outliers.checkpoints)
        verb = "stand"
        if len(names) == 1:
            verb = "stands"
        return (
            f"{first_few(names)} {verb} apart: {outliers.distance:.4g} to the nearest of the "
            f"others, which all have one within {outliers.typical:.4g}"
        )
    if len(groups.members) > 1:
        sizes = " and ".join(str(len(group)) for group in groups.members)
        return (
            f"the checkpoints fall into groups of {sizes}, at least {groups.distance:.4g} apart; "
            f"links within a group are at most {groups.typical:.4g}. Is the run one training?"
        )
    if len(geometry.checkpoints) < 4:
        return "too few checkpoints to tell whether one stands apart"
    return "no checkpoint stands apart"


def _names_within(geometry: Geometry, checkpoints: Sequence[Checkpoint]) -> list[str]:
    """Return names of some checkpoints, as short as the table has them."""
    paths = [checkpoint.path for checkpoint in geometry.checkpoints]
    name_by_path = dict(zip(paths, short_names(paths), strict=True))
    return [name_by_path[checkpoint.path] for checkpoint in checkpoints]


def values(geometry: Geometry) -> dict[str, Any]:
    """Return a geometry as plain values for JSON."""
    outliers = geometry.outliers
    odd = None
    if outliers is not None:
        odd = {
            "checkpoints": _paths(outliers.checkpoints),
            "distance": outliers.distance,
            "usual": outliers.typical,
        }
    return {
        "gram": geometry.gram.tolist(),
        "distances": geometry.distances.tolist(),
        "cosines": geometry.cosines.tolist(),
        "norms": geometry.norms.tolist(),
        "steps": geometry.steps.tolist(),
        "turns": geometry.step_cosines.tolist(),
        "to_mean": geometry.to_mean.tolist(),
        "odd": odd,
        "groups": list(map(_paths, geometry.groups.members)),
    }


def _paths(checkpoints: Iterable[Checkpoint]) -> list[str]:
    return [str(checkpoint.path) for checkpoint in checkpoints]
