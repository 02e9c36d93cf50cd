"""Landscapes of all kinds with values from simple formulas, as samples for figures.

``python tests/support/sample_landscapes.py DIR [NAME...]`` draws them, to be looked at.
"""

from __future__ import annotations

import math
import random
import sys
from dataclasses import replace
from pathlib import Path

from ckptavg.landscape.landscape import Landmark, Landscape, Point
from ckptavg.landscape.lines.barrier import measure_barriers
from ckptavg.tasks import Metric

CLASSIFICATION = (
    Metric("top1", "top-1 %", ".2f", True, "%"),
    Metric("top5", "top-5 %", ".2f", True, "%"),
    Metric("nll", "NLL", ".4f", False, "nats"),
    Metric("ece", "ECE", ".4f", False),
)
L2_LOSS = Metric("l2_loss", "loss with the L2 term", ".4f", False, "nats")
PLANE_AXES = (
    "distance from epoch_160.pt towards epoch_185.pt",
    "distance from that line towards epoch_210.pt",
)


def mark(name, x, y=None, distance=0.0, scores=({}, None), step=None, lr=None):
    """A checkpoint or an average; a checkpoint is one with a step."""
    path = None if step is None else f"/run/{name}"
    data, train = scores
    return Landmark(name, path, step, lr, x, y, distance, data=data, train=train)


def holes_of(scores):
    """The same metrics, all NaN."""
    data, train = scores
    return dict.fromkeys(data, math.nan), None if train is None else dict.fromkeys(train, math.nan)


def bowl(x, y, train=True):
    """Metrics in a bowl whose training minimum lies beside the evaluation minimum."""
    far = (x - 2.1) ** 2 / 6 + (y - 1.3) ** 2 / 2
    error = 4.2 + 60 * (1 - math.exp(-far / 6))
    loss = 0.02 + 0.04 * ((x - 2.9) ** 2 / 5 + (y - 0.8) ** 2 / 1.5) ** 1.3
    data = {"top1": 100 - error, "top5": 99.0, "nll": error / 30, "ece": 0.01}
    if not train:
        return data, None
    return data, {"top1": 99.0, "nll": loss, "l2_loss": loss + 0.11}


def plane(size=13, holes=(), train=True, checkpoints=11, unfinished=0):
    """A plane through three checkpoints, with others off it."""
    points = []
    for row in range(size):
        for column in range(size):
            x = -0.9 + 6.4 * column / (size - 1)
            y = -0.7 + 4.6 * row / (size - 1)
            scores = bowl(x, y, train)
            if (row, column) in holes:
                scores = holes_of(scores)
            points.append(Point(x, y, (0.2, 0.3, 0.5), *scores))
    if unfinished:
        points = points[:unfinished]
    corners = {0: (0.0, 0.0), checkpoints // 2: (4.6, 0.0), checkpoints - 1: (2.0, 3.1)}
    marks = []
    noise = random.Random(0)
    off = [0.0, 0.0, 0.0]
    for number in range(checkpoints):
        pull = 8 / max(checkpoints, 20)
        off = [old * (1 - pull) + noise.gauss(0, 2.2 * pull**0.5) for old in off]
        distance = 0.0 if number in corners else abs(off[2])
        x, y = corners.get(number, (2.2 + 0.5 * off[0], 1.0 + 0.35 * off[1]))
        step = 160 + 5 * number
        marks.append(mark(f"epoch_{step}.pt", x, y, distance, bowl(x, y, train), step, 0.05))
    average = mark("average", 2.2, 31 / 30, 0.0, bowl(2.2, 31 / 30, train))
    facts = {"through": [marks[number].name for number in corners], "shape": [size, size]}
    return Landscape(
        "plane", PLANE_AXES, CLASSIFICATION, tuple(points), tuple(marks), (average,), facts
    )


def pca(checkpoints=15):
    """A trajectory that circles its average, far longer than wide."""
    points = []
    for row in range(11):
        for column in range(11):
            x, y = -14 + 2.8 * column, -1.5 + 0.3 * row
            points.append(Point(x, y, None, *bowl(2.1 + x / 6, 1.3 + y)))
    marks = []
    for number in range(checkpoints):
        angle = 2 * math.pi * number / checkpoints
        x, y = 11 * math.cos(angle) * (1 - 0.02 * number), math.sin(angle)
        scores = bowl(2.1 + x / 6, 1.3 + y)
        marks.append(mark(f"step_{500 * number}.ckpt", x, y, 2 + number / 5, scores, 500 * number))
    average = mark("average", 0.0, 0.0, 0.0, bowl(2.1, 1.3))
    axes = ("1st principal component (83% of variance)", "2nd principal component (9%)")
    return Landscape(
        "pca", axes, CLASSIFICATION, tuple(points), tuple(marks), (average,),
        {"explained": [0.83, 0.09]},
    )  # fmt: skip


def interval(error, samples=1000):
    """95 % intervals of an accuracy in percent and of a loss."""
    half = 1.96 * math.sqrt(error * (100 - error) / samples)
    return {
        "top1": (100 - error - half, 100 - error + half),
        "nll": (error / 30 - 0.03, error / 30 + 0.03),
    }


def curve(checkpoints=30, train=True, rates=True):
    """A cyclical run, its running average and its windows."""
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
            training = {"top1": 100 - error / 3, "nll": error / 90} if train else None
            data = {"top1": 100 - error, "nll": error / 30}
            points[series].append(Point(step, None, None, data, training, interval(error), series))
        scores = points["checkpoints"][-1].data, None
        rate = (0.05 if number % 2 else 0.001) if rates else None
        marks.append(mark(f"step_{step}.pt", step, None, 0.0, scores, step, rate))
    ordered = [point for series in points.values() for point in series]
    facts = {"lines": [{"series": name, "run": "swa", "line": name} for name in points]}
    return Landscape(
        "curve", ("step", ""), CLASSIFICATION, tuple(ordered), tuple(marks), facts=facts
    )


def two_runs():
    """Two runs on one axis of steps."""
    first, second = curve(20), curve(25)
    points = [replace(point, series=f"constant: {point.series}") for point in first.points]
    for point in second.points:
        data = {"top1": point.data["top1"] - 1.5, "nll": point.data["nll"] + 0.05}
        points.append(replace(point, data=data, interval={}, series=f"cyclical: {point.series}"))
    lines = []
    for run in ("constant", "cyclical"):
        for entry in first.facts["lines"]:
            series = f"{run}: {entry['line']}"
            lines.append({"series": series, "run": run, "line": entry["line"]})
    marks = first.checkpoints + second.checkpoints
    return replace(first, points=tuple(points), checkpoints=marks, facts={"lines": lines})


def segment(barrier=True, holes=(), beyond=0):
    """From the last checkpoint to the average."""
    points = []
    for number in range(-beyond, 21 + beyond):
        t = number / 20
        error = 9 - 4 * t - 2 * t * (1 - t)
        train = 0.05 + 0.03 * t
        if barrier:
            error += 2 * t * (1 - t) + 6 * math.sin(math.pi * t)
            train += 0.2 * math.sin(math.pi * t) ** 2
        scores = {"top1": 100 - error, "nll": error / 30}, {"nll": train, "l2_loss": train + 0.1}
        if number in holes:
            scores = holes_of(scores)
        points.append(Point(t, None, (1 - t, t), *scores, interval=interval(error)))
    start, end = points[beyond], points[-beyond - 1]
    first = mark("epoch_200.pt", 0.0, scores=(start.data, start.train), step=200)
    other = mark("epoch_190.pt", 0.4, distance=3.0, step=190)
    last = mark("average", 1.0, scores=(end.data, end.train))
    barriers = measure_barriers(points, (*CLASSIFICATION[:1], L2_LOSS))
    facts = {"ends": ["last", "average"], "barriers": [entry.as_json() for entry in barriers]}
    axes = ("t, from last (0) to average (1)", "")
    return Landscape("segment", axes, CLASSIFICATION, tuple(points), (other, first), (last,), facts)


def rays(directions=10, radius=40.0):
    """Rays from a wide average and a narrower checkpoint."""
    noise = random.Random(3)
    slopes = [math.exp(noise.gauss(0, 0.35)) for _ in range(directions)]
    points, widths, marks = [], [], {}
    for center, sharpness, error in (("average", 1.0, 4.0), ("last", 1.9, 5.2)):
        curves = [*slopes, sum(slopes) / directions]
        for number, slope in enumerate(curves):
            series = center if number == directions else f"{center}, direction {number + 1}"
            for position in range(21):
                t = radius * position / 20
                rise = sharpness * slope * (t / 60) ** 2
                data = {"top1": 100 - error - 30 * rise, "nll": error / 20 + 2 * rise}
                ends = {}
                if number == directions and t:
                    ends = {"top1": (data["top1"] - 4 * rise, data["top1"] + 4 * rise)}
                train = {"nll": error / 40 + rise}
                points.append(Point(t, data=data, train=train, interval=ends, series=series))
        each = [60 * math.sqrt(0.1 / (sharpness * slope)) for slope in slopes]
        mean = sum(each) / directions
        widths.append({"center": center, "mean": mean, "low": mean - 2, "high": mean + 2})
        marks[center] = mark(center, 0.0, scores=({"top1": 100 - error}, None))
    facts = {
        "centers": ["average", "last"],
        "directions": directions,
        "radius": radius,
        "rise": {"metric": "nll", "unit": "nats", "data": "training data", "value": 0.1},
        "widths": widths,
    }
    axes = ("t, distance from the centre in weight space", "")
    return Landscape(
        "rays", axes, CLASSIFICATION, tuple(points), (marks["last"],), (marks["average"],), facts
    )


def ensemble(checkpoints=12):
    """The average and the ensemble of more and more checkpoints."""
    points = []
    for series, floor in (("average", 5.2), ("ensemble", 5.0)):
        for count in range(1, checkpoints + 1):
            error = floor + (9 - floor) / count
            data = {"top1": 100 - error, "nll": error / 30}
            if series == "ensemble" and count > 1:
                data |= {"output_gap": 0.04 + 0.05 / count, "last_gap": 0.3 + 0.1 / count}
            points.append(Point(count, None, None, data, None, interval(error), series))
    gaps = (
        Metric("output_gap", "ensemble's outputs to the average's", ".4f", None),
        Metric("last_gap", "single checkpoint's outputs to the average's", ".4f", None),
    )
    lines = [{"series": name, "run": "", "line": name} for name in ("average", "ensemble")]
    return Landscape(
        "ensemble", ("number of checkpoints", ""), (*CLASSIFICATION, *gaps), tuple(points),
        facts={"lines": lines},
    )  # fmt: skip


def reliability(names=("epoch_200.pt (last)", "average", "ensemble"), samples=10_000):
    """Bins of candidates that are more and more careful."""
    points, ece = [], {}
    for number, name in enumerate(names):
        for position in range(1, 15):
            confidence = (position + 0.6) / 15
            share = confidence ** (1.35 - 0.15 * number)
            count = max(int(samples * math.exp(1.1 * (position - 14))), 3)
            half = 1.96 * math.sqrt(share * (1 - share) / count)
            ends = {"accuracy": (max(share - half, 0.0), min(share + half, 1.0))}
            points.append(Point(confidence, share, data={"n": count}, interval=ends, series=name))
        ece[name] = 0.03 - 0.01 * number
    axes = ("confidence", "share that is right")
    return Landscape("reliability", axes, CLASSIFICATION, tuple(points), facts={"ece": ece})


def geometry(checkpoints=20):
    """Checkpoints on a sphere around their mean."""
    noise = random.Random(2)
    places = []
    for number in range(checkpoints):
        places.append([noise.gauss(0, 1) + 0.3 * number / checkpoints for _ in range(40)])
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
    axes = ("step", "distance in weight space")
    return Landscape("geometry", axes, (), tuple(points), facts={"distances": distances})


SAMPLES = {
    "plane": plane,
    "plane-holes": lambda: plane(holes=[(3, 4), (3, 5), (12, 0), (12, 1), (11, 0)]),
    "plane-no-training": lambda: plane(train=False),
    "plane-many": lambda: plane(checkpoints=200),
    "plane-unfinished": lambda: plane(unfinished=100),
    "pca": pca,
    "curve": curve,
    "curve-many": lambda: curve(checkpoints=200, rates=False, train=False),
    "curve-two": two_runs,
    "curve-one": lambda: curve(checkpoints=1),
    "segment": segment,
    "segment-flat": lambda: segment(barrier=False, holes=(4, 5), beyond=4),
    "rays": rays,
    "ensemble": ensemble,
    "reliability": reliability,
    "reliability-each": lambda: reliability(tuple(f"epoch_{n}.pt" for n in range(9)), 200),
    "geometry": geometry,
    "geometry-many": lambda: geometry(200),
    "geometry-three": lambda: geometry(3),
}


def main():
    from ckptavg.plots.draw import render

    directory = Path(sys.argv[1])
    directory.mkdir(exist_ok=True)
    for name in sys.argv[2:] or SAMPLES:
        contents = render(SAMPLES[name](), "png")
        (directory / f"{name}.png").write_bytes(contents)
        print(name, len(contents))


if __name__ == "__main__":
    main()
