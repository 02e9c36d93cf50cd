"""A run's geometry as a table and in words."""

from __future__ import annotations

from collections.abc import Sequence

from ckptavg.display.tables import NOTHING, Column, Table, rows_of_texts
from ckptavg.errors import first_few
from ckptavg.formats import Checkpoint
from ckptavg.inspection.geometry import Geometry
from ckptavg.runs.discovery.numbered import short_names

# Fewer checkpoints always form one group.
_FEWEST_TO_SPLIT = 4


def tabulate_geometry(geometry: Geometry) -> Table:
    """Make the table of norms and distances, a row per checkpoint."""
    # The first of each sorted row is the distance of a checkpoint to itself.
    ordered = geometry.distances.sort(1).values
    lengths = {
        "norm": geometry.norms.tolist(),
        "step": _by_checkpoint(geometry),
        "to mean": geometry.to_mean.tolist(),
        "to nearest": ordered[:, 1].tolist(),
        "to farthest": ordered[:, -1].tolist(),
    }
    names = short_names([checkpoint.path for checkpoint in geometry.checkpoints])
    rows: list[list[str]] = []
    for name, *values in zip(names, *lengths.values(), strict=True):
        rows.append([name, *map(_length_text, values)])
    columns = [Column("checkpoint", "name")]
    columns += [Column(title, "number") for title in lengths]
    title = "geometry of the weights (Euclidean; step: from the one before)"
    return Table(title, tuple(columns), rows_of_texts(rows))


def describe_motion(geometry: Geometry) -> str | None:
    """Word the mean cosine between successive steps; None where it is not known."""
    if not geometry.step_cosines.isfinite().any():
        return None
    cosine = geometry.step_cosines.nanmean()
    return f"successive steps: mean cosine {cosine:.2f} (1 straight, 0 random walk, -0.5 scatter)"


def describe_groups(geometry: Geometry) -> str:
    """Word a line about checkpoints that stand apart."""
    outliers, groups = geometry.outliers, geometry.groups
    if outliers is not None:
        names = _names_within(geometry, outliers.checkpoints)
        verb = "stand"
        if len(names) == 1:
            verb = "stands"
        return (
            f"{first_few(names)} {verb} apart: {outliers.distance:.4g} to the nearest of the "
            f"others; each of the others has a neighbour within {outliers.typical:.4g}"
        )
    if len(groups.members) > 1:
        sizes = " and ".join(str(len(group)) for group in groups.members)
        return (
            f"the checkpoints fall into groups of {sizes}, at least {groups.distance:.4g} apart; "
            f"links within a group are at most {groups.typical:.4g}. Is the run one training?"
        )
    if len(geometry.checkpoints) < _FEWEST_TO_SPLIT:
        return "too few checkpoints to tell whether one stands apart"
    return "no checkpoint stands apart"


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


def _names_within(geometry: Geometry, checkpoints: Sequence[Checkpoint]) -> list[str]:
    """Return names of some checkpoints, as short as the table has them."""
    paths = [checkpoint.path for checkpoint in geometry.checkpoints]
    name_by_path = dict(zip(paths, short_names(paths), strict=True))
    return [name_by_path[checkpoint.path] for checkpoint in checkpoints]
