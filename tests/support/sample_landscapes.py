"""Landscapes of all kinds with values from simple formulas, as samples for figures.

``python tests/support/sample_landscapes.py DIR`` draws all of them, to be looked at.
"""

from __future__ import annotations

import math
import random
import sys
from dataclasses import replace
from pathlib import Path

from ckptavg.landscape.landscape import Landmark, Landscape, Point
from ckptavg.tasks import Metric

CLASSIFICATION = (
    Metric("top1", "top-1 %", ".2f", True, "%"),
    Metric("top5", "top-5 %", ".2f", True, "%"),
    Metric("nll", "NLL", ".4f", False, "nats"),
    Metric("ece", "ECE", ".4f", False),
)
REGRESSION = (Metric("rmse", "RMSE", ".5g", False), Metric("r2", "R²", ".5f", True))
PLANE_AXES = ("x (distance in weight space)", "y (distance in weight space)")


def scores(x, y, scale=1.0):
    """Metrics in a bowl whose training minimum lies beside the evaluation minimum."""
    far = ((x - 2.1) ** 2 / 6 + (y - 1.3) ** 2 / 2) * scale
    error = 4.2 + 60 * (1 - math.exp(-far / 6))
    train = 0.02 + 0.04 * ((x - 2.9) ** 2 / 5 + (y - 0.8) ** 2 / 1.5) ** 1.3
    data = {"top1": 100 - error, "top5": 99.0, "nll": error / 30, "ece": 0.01}
    return data, {"top1": 99.0, "nll": train, "l2_loss": train + 0.11}


def plane(size=13, holes=(), train=True, checkpoints=11, unfinished=0):
    """A plane through three checkpoints, with others off it."""
    corners = [(0.0, 0.0), (4.6, 0.0), (2.0, 3.1)]
    points = []
    for row in range(size):
        for column in range(size):
            x = -0.9 + 6.4 * column / (size - 1)
            y = -0.7 + 4.6 * row / (size - 1)
            data, training = scores(x, y)
            if (row, column) in holes:
                data = dict.fromkeys(data, math.nan)
                training = dict.fromkeys(training, math.nan)
            points.append(Point(x, y, (0.2, 0.3, 0.5), data, training if train else None))
    if unfinished:
        points = points[:unfinished]
    marks = []
    noise = random.Random(0)
    off = [0.0, 0.0, 0.0]
    for number in range(checkpoints):
        name = f"epoch_{160 + 5 * number}.pt"
        corner = {0: 0, checkpoints // 2: 1, checkpoints - 1: 2}.get(number)
        if corner is not None:
            x, y = corners[corner]
            distance = 0.0
        else:
            pull = 8 / max(checkpoints, 20)
            off = [old * (1 - pull) + noise.gauss(0, 2.2 * pull**0.5) for old in off]
            x, y = 2.2 + 0.5 * off[0], 1.0 + 0.35 * off[1]
            distance = abs(off[2])
        data, training = scores(x, y)
        marks.append(
            Landmark(name, f"/run/{name}", 160 + 5 * number, 0.05, x, y, distance, data,
                     training if train else None)
        )  # fmt: skip
    x, y = 2.2, 31 / 30
    data, training = scores(x, y)
    average = Landmark("average", None, None, None, x, y, 0.0, data, training if train else None)
    return Landscape("plane", PLANE_AXES, CLASSIFICATION, tuple(points), tuple(marks), (average,))


def interval(error, samples=1000):
    """A 95 % interval of an accuracy in percent."""
    half = 1.96 * math.sqrt(error * (100 - error) / samples)
    return {
        "top1": (100 - error - half, 100 - error + half),
        "nll": (error / 30 - 0.03, error / 30 + 0.03),
    }


def curve(checkpoints=30, train=True, rates=True):
    """A run at a constant learning rate, its running average and its windows."""
    noise = random.Random(1)
    points = {"checkpoints": [], "running average": [], "average of the last 5": []}
    marks = []
    for number in range(checkpoints):
        step = 20_000 + 500 * number
        share = number / max(checkpoints - 1, 1)
        errors = {
            "checkpoints": 9.5 - 1.2 * share + noise.gauss(0, 0.45),
            "running average": 6.1 + 2.4 * math.exp(-6 * share),
            "average of the last 5": 6.6 + 2.0 * math.exp(-9 * share) - 0.2 * share,
        }
        for series, error in errors.items():
            training = {"top1": 100 - error / 3, "nll": error / 90}
            data = {"top1": 100 - error, "nll": error / 30}
            points[series].append(
                Point(step, None, None, data, training if train else None, interval(error), series)
            )
        rate = 0.05 if number % 2 else 0.001
        if rates:
            name = f"step_{step}.pt"
            marks.append(
                Landmark(name, name, step, rate, step, None, 0.0, points["checkpoints"][-1].data)
            )
    ordered = [point for series in points.values() for point in series]
    return Landscape("curve", ("step", ""), CLASSIFICATION, tuple(ordered), tuple(marks))


def two_runs():
    """Two runs on one axis of steps."""
    first, second = curve(20), curve(25)
    points = [replace(point, series=f"constant: {point.series}") for point in first.points]
    for point in second.points:
        data = {"top1": point.data["top1"] - 1.5, "nll": point.data["nll"] + 0.05}
        points.append(replace(point, data=data, interval={}, series=f"cyclical: {point.series}"))
    return replace(first, points=tuple(points), checkpoints=first.checkpoints + second.checkpoints)


def segment(barrier=True, holes=()):
    """From the last checkpoint to the average."""
    points = []
    for number in range(21):
        t = number / 20
        error = 9 - 4 * t + (6 * math.sin(math.pi * t) if barrier else -2 * t * (1 - t))
        train = 0.05 + 0.03 * t + (0.2 * math.sin(math.pi * t) ** 2 if barrier else 0.0)
        data, training = (
            {"top1": 100 - error, "nll": error / 30},
            {"nll": train, "l2_loss": train + 0.1},
        )
        if number in holes:
            data, training = dict.fromkeys(data, math.nan), dict.fromkeys(training, math.nan)
        points.append(Point(t, None, (1 - t, t), data, training))
    first = Landmark(
        "epoch_200.pt",
        "/run/epoch_200.pt",
        200,
        0.01,
        0.0,
        None,
        0.0,
        points[0].data,
        points[0].train,
    )
    last = Landmark("average", None, None, None, 1.0, None, 0.0, points[-1].data, points[-1].train)
    return Landscape(
        "segment",
        ("t (0 checkpoint, 1 average)", ""),
        CLASSIFICATION,
        tuple(points),
        (first,),
        (last,),
    )


def geometry(checkpoints=20):
    """Checkpoints on a sphere around their mean."""
    noise = random.Random(2)
    places = [
        [noise.gauss(0, 1) + 0.3 * k / checkpoints for _ in range(40)] for k in range(checkpoints)
    ]
    mean = [sum(column) / checkpoints for column in zip(*places, strict=True)]
    distances = [[math.dist(a, b) for b in places] for a in places]
    points = []
    for number, place in enumerate(places):
        points.append(Point(number + 1, math.dist(place, mean), series="to mean"))
        points.append(Point(number + 1, 31 + 0.05 * number, series="norm"))
        if number:
            points.append(Point(number + 1, distances[number][number - 1], series="step"))
        if 0 < number < checkpoints - 1:
            points.append(Point(number + 1, -0.45 + noise.gauss(0, 0.1), series="cosine"))
    return Landscape(
        "geometry",
        ("step", "distance in weight space"),
        (),
        tuple(points),
        facts={"distances": distances},
    )


SAMPLES = {
    "plane": plane,
    "plane-holes": lambda: plane(holes=[(3, 4), (3, 5), (12, 0), (12, 1), (11, 0)]),
    "plane-no-training": lambda: plane(train=False),
    "plane-many": lambda: plane(checkpoints=200),
    "plane-unfinished": lambda: plane(unfinished=100),
    "curve": curve,
    "curve-many": lambda: curve(checkpoints=200, rates=False, train=False),
    "curve-two": two_runs,
    "curve-one": lambda: curve(checkpoints=1),
    "segment": segment,
    "segment-flat": lambda: segment(barrier=False, holes=(4, 5)),
    "geometry": geometry,
    "geometry-many": lambda: geometry(200),
    "geometry-three": lambda: geometry(3),
}


def main():
    from ckptavg.plots.draw import render

    directory = Path(sys.argv[1])
    directory.mkdir(exist_ok=True)
    wanted = sys.argv[2:] or SAMPLES
    for name in wanted:
        contents = render(SAMPLES[name](), "png")
        (directory / f"{name}.png").write_bytes(contents)
        print(name, len(contents))


if __name__ == "__main__":
    main()
