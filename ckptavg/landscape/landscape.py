"""Scored points of weight space as data, which is what figures are drawn from."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

from ckptavg.display.json_text import json_text
from ckptavg.errors import OutputError, SpecError, UsageError
from ckptavg.errors.printable import without_secrets
from ckptavg.errors.system import guard_writes
from ckptavg.io import bounded_json
from ckptavg.io.atomic import Publication
from ckptavg.landscape.arrays import write_arrays
from ckptavg.optional import import_optional
from ckptavg.tasks import Metric

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Kind = Literal["curve", "plane", "pca", "segment", "rays", "ensemble", "geometry", "reliability"]
SUFFIXES = (".json", ".npz")
L2_LOSS = "l2_loss"
"""Key of the loss with the L2 term among the metrics on training data."""


@dataclass(frozen=True)
class Point:
    """A scored point.

    A metric that is not finite is a hole: the point was scored, and the network gave no numbers.

    Attributes:
        x: Coordinate along the first axis: a distance, a share of a segment, or a step.
        y: Coordinate along the second axis; None where there is one axis.
        coefficients: The point's coefficients, one per checkpoint with sum 1; None for a point that
            is no such sum, as on a ray.
        data: Metrics on the evaluation data, by key; empty where they were not measured.
        train: Metrics on the training data; None without any. ``l2_loss`` is the loss with the L2
            term.
        interval: 95 % interval of metrics on the evaluation data, by key.
        series: Name of the line that the point belongs to; empty where there is one.
    """

    x: float
    y: float | None = None
    coefficients: tuple[float, ...] | None = None
    data: Mapping[str, float] = field(default_factory=dict)
    train: Mapping[str, float] | None = None
    interval: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    series: str = ""

    def as_json(self) -> dict[str, Any]:
        """Return the point as plain values for JSON."""
        plain: dict[str, Any] = {
            "x": self.x,
            "y": self.y,
            "coefficients": None,
            "data": dict(self.data),
            "train": None,
        }
        if self.coefficients is not None:
            plain["coefficients"] = list(self.coefficients)
        if self.train is not None:
            plain["train"] = dict(self.train)
        if self.interval:
            plain["interval"] = {key: list(ends) for key, ends in self.interval.items()}
        if self.series:
            plain["series"] = self.series
        return plain

    @classmethod
    def of_json(cls, value: Mapping[str, Any]) -> Point:
        """Restore a point from the output of ``as_json``."""
        coefficients = value["coefficients"]
        train = value["train"]
        interval: dict[str, tuple[float, float]] = {}
        for key, (low, high) in value.get("interval", {}).items():
            interval[key] = (_number(low), _number(high))
        return cls(
            x=value["x"],
            y=value["y"],
            coefficients=None if coefficients is None else tuple(coefficients),
            data=_numbers(value["data"]),
            train=None if train is None else _numbers(train),
            interval=interval,
            series=value.get("series", ""),
        )


@dataclass(frozen=True)
class Landmark:
    """A checkpoint, or an average of checkpoints, among the points.

    Attributes:
        name: Name in the figure.
        path: Path of the checkpoint; None for an average.
        step: Recorded position in training; None where unknown.
        lr: Recorded learning rate; None where unknown.
        x: Coordinate along the first axis.
        y: Coordinate along the second axis; None where there is one axis.
        distance: Distance off the plane or line, in weight space; 0 on it.
        data: Exact metrics on the evaluation data, by key; empty where not measured.
        train: Exact metrics on the training data; None without any.
        coefficients: One per checkpoint of the run with sum 1; None where they are not kept.
    """

    name: str
    path: str | None
    step: float | None
    lr: float | None
    x: float | None
    y: float | None = None
    distance: float = 0.0
    data: Mapping[str, float] = field(default_factory=dict)
    train: Mapping[str, float] | None = None
    coefficients: tuple[float, ...] | None = None

    def as_json(self) -> dict[str, Any]:
        """Return the landmark as plain values for JSON, without secrets in the path."""
        plain: dict[str, Any] = {
            "name": without_secrets(self.name),
            "path": None,
            "step": self.step,
            "lr": self.lr,
            "x": self.x,
            "y": self.y,
            "distance": self.distance,
            "coefficients": None,
            "data": dict(self.data),
            "train": None,
        }
        if self.path is not None:
            plain["path"] = without_secrets(self.path)
        if self.coefficients is not None:
            plain["coefficients"] = list(self.coefficients)
        if self.train is not None:
            plain["train"] = dict(self.train)
        return plain

    @classmethod
    def of_json(cls, value: Mapping[str, Any]) -> Landmark:
        """Restore a landmark from the output of ``as_json``."""
        train, coefficients = value["train"], value.get("coefficients")
        return cls(
            **{key: value[key] for key in ("name", "path", "step", "lr", "x", "y", "distance")},
            coefficients=None if coefficients is None else tuple(coefficients),
            data=_numbers(value["data"]),
            train=None if train is None else _numbers(train),
        )


@dataclass(frozen=True)
class Landscape:
    """Scored points of weight space, with all that a figure of them needs.

    Attributes:
        kind: What the points are: a curve over training, a plane, a segment, ...
        axes: Titles of the two axes with their units; the second is empty where there is one.
        metrics: The task's metrics, the decisive one first.
        points: The points, in the order of the figure.
        checkpoints: The run's checkpoints, in order.
        averages: Averages among the points.
        facts: Further figures of this kind as plain values: the barrier's height, the explained
            variance, the seed of directions.
        notes: Remarks on how the figures came about.
    """

    kind: Kind
    axes: tuple[str, str]
    metrics: tuple[Metric, ...]
    points: tuple[Point, ...]
    checkpoints: tuple[Landmark, ...] = ()
    averages: tuple[Landmark, ...] = ()
    facts: Mapping[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def __repr__(self) -> str:
        """Return one line for tracebacks and notebooks."""
        marks = len(self.checkpoints) + len(self.averages)
        return (
            f"<Landscape of kind {self.kind}: {len(self.points)} points, {marks} marked "
            "checkpoints and averages>"
        )

    def __str__(self) -> str:
        # Imported on demand: only a printed table needs the layout.
        from ckptavg.display.terminal import printed_table  # noqa: PLC0415
        from ckptavg.landscape.landmark_table import tabulate_landmarks  # noqa: PLC0415

        if not (self.checkpoints or self.averages):
            return repr(self)
        title = f"{self.kind} of {len(self.points)} points; marked points"
        return printed_table(tabulate_landmarks(self, title))

    @property
    def units(self) -> dict[str, str]:
        """Units of the metrics, by key."""
        return {metric.key: metric.unit for metric in self.metrics}

    def as_json(self) -> dict[str, Any]:
        """Return everything as plain values for JSON."""
        metrics = []
        for metric in self.metrics:
            metrics.append(
                {"key": metric.key, "title": metric.title, "form": metric.form,
                 "higher": metric.higher, "unit": metric.unit}
            )  # fmt: skip
        return {
            "kind": self.kind,
            "units": self.units,
            "axes": list(self.axes),
            "metrics": metrics,
            "points": [point.as_json() for point in self.points],
            "checkpoints": [checkpoint.as_json() for checkpoint in self.checkpoints],
            "averages": [average.as_json() for average in self.averages],
            "facts": dict(self.facts),
            "notes": list(self.notes),
        }

    @classmethod
    def of_json(cls, value: Mapping[str, Any]) -> Landscape:
        """Restore a landscape from the output of ``as_json``.

        Raises:
            ValueError: The value is something else.
        """
        try:
            if value["kind"] not in get_args(Kind):
                raise ValueError(f"kind {value['kind']!r} is unknown")
            return cls(
                kind=value["kind"],
                axes=(value["axes"][0], value["axes"][1]),
                metrics=tuple(Metric(**metric) for metric in value["metrics"]),
                points=tuple(Point.of_json(point) for point in value["points"]),
                checkpoints=tuple(Landmark.of_json(entry) for entry in value["checkpoints"]),
                averages=tuple(Landmark.of_json(entry) for entry in value["averages"]),
                facts=value["facts"],
                notes=tuple(value["notes"]),
            )
        except (KeyError, TypeError, IndexError) as error:
            raise ValueError(f"it does not hold a landscape: {error}") from error

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write everything to a ``.json`` file, or the numbers as arrays to an ``.npz`` file.

        Args:
            path: The file, which is replaced if it exists.

        Raises:
            UsageError: The path ends in something else.
            OutputError: The file cannot be written.
        """
        target = Path(path)
        check_suffix(target)
        with (
            guard_writes(target),
            Publication(target, directory=False, overwrite=True) as publication,
        ):
            if target.suffix == ".json":
                publication.temporary.write_text(json_text(self.as_json()), encoding="utf-8")
            else:
                write_arrays(publication.temporary, self.as_json())
            publication.publish()

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Landscape:
        """Read a ``.json`` file that ``save`` has written.

        Raises:
            OutputError: The file cannot be read, or holds something else.
        """
        try:
            return cls.of_json(bounded_json.read(Path(path)))
        except ValueError as error:
            raise OutputError(
                f"{path} holds no landscape: {error}", "Name another file."
            ) from error

    def plot(self, ax: Axes | Sequence[Axes] | None = None) -> tuple[Figure, Any]:
        """Draw the figure of this kind with matplotlib.

        Args:
            ax: Axes to draw on, or one per panel; a new figure where None.

        Returns:
            The figure and its axes.

        Raises:
            SpecError: matplotlib is not installed.
        """
        # The room of figures is above this one, and only a figure needs it.
        drawing = import_optional("ckptavg.plots.draw", "matplotlib", "plot")
        figure_and_axes: tuple[Figure, Any] = drawing.draw(self, ax)
        return figure_and_axes

    def save_figure(self, path: str | os.PathLike[str]) -> None:
        """Draw the figure into a ``.png``, ``.svg`` or ``.pdf`` file.

        Args:
            path: The file, which is replaced if it exists.

        Raises:
            SpecError: matplotlib is not installed.
            OutputError: The file cannot be written.
        """
        drawing = import_optional("ckptavg.plots.draw", "matplotlib", "plot")
        drawing.save_figure(self, Path(path))

    def _repr_png_(self) -> bytes | None:
        """Draw the figure for a notebook; None without matplotlib, or without a point."""
        if not self.points:
            return None
        try:
            drawing = import_optional("ckptavg.plots.draw", "matplotlib", "plot")
        except SpecError:
            return None
        contents: bytes = drawing.render(self, "png")
        return contents


def check_suffix(path: Path) -> None:
    """Refuse a file of results of another kind, before any work.

    Raises:
        UsageError: The path ends neither in ``.json`` nor in ``.npz``.
    """
    if path.suffix not in SUFFIXES:
        raise UsageError(
            f"results are expected in a file that ends in {' or '.join(SUFFIXES)}, but got {path}"
        )


def _numbers(values: Mapping[str, float | None]) -> dict[str, float]:
    return {key: _number(value) for key, value in values.items()}


def _number(value: float | None) -> float:
    """Return a number from JSON, where null is a number that is not finite."""
    if value is None:
        return math.nan
    return float(value)
