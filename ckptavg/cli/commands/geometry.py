"""Tables of ``--geometry``, for a run that is inspected or averaged."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from ckptavg.cli.console import Report

if TYPE_CHECKING:
    from ckptavg.formats import Checkpoint
    from ckptavg.inspection.geometry import Geometry


def show(report: Report, geometry: Geometry) -> None:
    """Show a table of lengths, and a line on checkpoints that stand apart."""
    from ckptavg.inspection import geometry_table  # noqa: PLC0415 - help is shown without torch

    table = geometry_table.tabulate_geometry(geometry)
    titles = [column.title for column in table.columns]
    report.table(titles, [row.texts for row in table.rows], title=table.title)
    motion = geometry_table.describe_motion(geometry)
    if motion is not None:
        report.line(motion)
    report.line(geometry_table.describe_groups(geometry))


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
