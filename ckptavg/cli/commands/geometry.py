"""Tables of ``--geometry``, for a run that is inspected or averaged."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ckptavg.cli.console import Report
from ckptavg.errors import first_few
from ckptavg.runs.discovery.numbered import short_names

if TYPE_CHECKING:
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
    texts = [list(map(_length_text, values)) for values in columns.values()]
    names = short_names([c.path for c in geometry.checkpoints])
    title = "geometry of the weights (Euclidean; step: from the one before)"
    report.table(("checkpoint", *columns), list(zip(names, *texts, strict=True)), title=title)
    if geometry.step_cosines.isfinite().any():
        cosine = geometry.step_cosines.nanmean()
        report.line(
            f"successive steps: mean cosine {cosine:.2f} (1 straight, 0 random walk, -0.5 scatter)"
        )
    report.line(_verdict(geometry))


def _by_checkpoint(geometry: Geometry) -> list[float | None]:
    """Return the length of the step to each checkpoint; None for the first of a training."""
    steps = iter(geometry.steps.tolist())
    return [
        next(steps) if i else None
        for training in geometry.run.trainings
        for i in range(len(training))
    ]


def _length_text(value: float | None) -> str:
    return "–" if value is None else f"{value:#.4g}".rstrip(".")


def _verdict(geometry: Geometry) -> str:
    """Word a line about checkpoints that stand apart."""
    outliers, groups = geometry.outliers, geometry.groups
    if outliers is not None:
        paths = [checkpoint.path for checkpoint in geometry.checkpoints]
        name_by_path = dict(zip(paths, short_names(paths), strict=True))
        names = [name_by_path[checkpoint.path] for checkpoint in outliers.checkpoints]
        return (
            f"{first_few(names)} {'stands' if len(names) == 1 else 'stand'} apart: "
            f"{outliers.distance:.4g} to the nearest of the others, which all have one within "
            f"{outliers.typical:.4g}"
        )
    if len(groups.members) > 1:
        sizes = " and ".join(str(len(group)) for group in groups.members)
        return (
            f"the checkpoints fall into groups of {sizes}: {groups.distance:.4g} apart at least, "
            f"where those of a group are linked within {groups.typical:.4g}. Is it one training?"
        )
    few = len(geometry.checkpoints) < 4
    return f"{'too few to tell whether one' if few else 'no checkpoint'} stands apart"


def values(geometry: Geometry) -> dict[str, Any]:
    """Return a geometry as plain values for JSON."""
    outliers = geometry.outliers
    odd = None
    if outliers is not None:
        odd = {
            "checkpoints": [str(c.path) for c in outliers.checkpoints],
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
        "groups": [[str(c.path) for c in group] for group in geometry.groups.members],
    }
