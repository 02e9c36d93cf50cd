"""The parts of the benchmark of scoring: each makes its data, measures, and returns its tables."""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import commands
import measuring
from bench import MEGABYTE, OURS, Measured, Workplace, gross, ratio
from contenders.scene import Scene
from measuring import BenchmarkError, Trial, Usage
from tables import Cells, Figure, Table

FASTER_GOAL, FASTER_AT = 5.0, 8  # times, and with how many candidates
DOMINATES = 50  # % of the loop one by one that decoding has to take for that goal
LIMIT_GOAL = 85  # % of the bare forward's images a second
LIMIT_MOST = 8  # models side by side there
PASS_GOAL = 1.05
LOADER = "bare loader"
CONTENDERS = {"torch": "update_bn, one by one", "fvcore": "fvcore, one by one"}
_MODEL, _PIXELS = "resnet50", (500, 375)
_LIGHT_MODEL, _LARGE_PIXELS = "mobilenet_v3_small", (4000, 3000)
_HERE = Path(__file__).parent


@dataclass(frozen=True, kw_only=True)
class Scoring(Workplace):
    """One run of the benchmark of scoring.

    Attributes:
        device: ``cpu`` or ``cuda``.
        fvcore: Whether it is installed.
        candidates: How many averages are scored; each of these numbers is measured.
        checkpoints: In the run that the averages are of.
        images: In the training and in the evaluation data, which are the same.
        crop: Width and height in pixels of what the model sees.
        batch_size: Of the loaders.
        workers: Of the loaders.
        model: In the place of each part's own, or None.
        pixels: Width and height of a photo, in the place of each part's own, or None.
    """

    device: str
    fvcore: bool
    candidates: Sequence[int]
    checkpoints: int
    images: int
    crop: int
    batch_size: int
    workers: int
    model: str | None
    pixels: tuple[int, int] | None

    @contextmanager
    def scene(
        self, averages: int, model: str = _MODEL, pixels: tuple[int, int] = (0, 0)
    ) -> Iterator[Scene]:
        """A scene, removed at the end."""
        with self.directory() as directory:
            scene = Scene(
                str(directory), self.model or model, self.checkpoints, averages, self.images,
                *pixels, self.crop, self.batch_size, self.workers, self.device,
            )  # fmt: skip
            self.progress(f"making {averages} averages of {scene.model} and {_photos(scene)}")
            scene.save()
            measuring.run([sys.executable, _HERE / "scenes.py", directory])
            yield scene

    def rates(self, scene: Scene, *arguments: object) -> dict[str, Any]:
        """What rates.py finds."""
        self.progress(f"measuring {' '.join(map(str, arguments))}")
        out = self.room / "rates.json"
        program = [sys.executable, _HERE / "rates.py", scene.directory, out, self.rounds]
        measuring.run(list(map(str, [*program, *arguments])))
        found: dict[str, Any] = json.loads(out.read_text())
        return found


def _photos(scene: Scene) -> str:
    if not scene.width:
        return f"{scene.images} images in memory"
    return f"{scene.images} JPEG files of {scene.width}×{scene.height}"


def _title(what: str, scene: Scene) -> str:
    size = f"{scene.model} at {scene.crop} px, {_photos(scene)} in batches of {scene.batch_size}"
    loaded = f", {scene.workers} workers" if scene.width else ""
    return f"{what}: {size}{loaded}, {scene.device}"


def candidates(bench: Scoring) -> list[Table]:
    """Averages of a usual model, from photos of a usual data set."""
    return [_from_files(bench, _MODEL, _PIXELS)]


def decoding(bench: Scoring) -> list[Table]:
    """Averages of a light model, from a camera's photos."""
    return [_from_files(bench, _LIGHT_MODEL, _LARGE_PIXELS)]


def _from_files(bench: Scoring, model: str, pixels: tuple[int, int]) -> Table:
    with bench.scene(max(bench.candidates), model, bench.pixels or pixels) as scene:
        contest = _Contest(bench, scene)
        trials = [contest.trial(LOADER, "bare_loader")]
        for count in bench.candidates:
            trials += contest.trials(count)
        found = measuring.alternate(
            trials,
            bench.rounds,
            bench.outputs,
            measuring.warm,
            bench.progress,
            uncounted=0,
            pause=bench.pause,
        )
        once = Figure(gross(found, LOADER), "s")
        rows: dict[str, Cells] = {"decoding twice, no model": {"seconds": once}}
        for count in bench.candidates:
            rows |= contest.rows(found, count)
        if not bench.fvcore:
            rows[CONTENDERS["fvcore"]] = {"seconds": "not installed"}
        return Table(_title("K averages, BatchNorm recomputed and scored", scene), rows)


@dataclass(frozen=True)
class _Contest:
    """ckptavg and those who score one candidate after another, on the same files.

    Attributes:
        scores: Each program's, (top-1 in %, NLL) a candidate.
    """

    bench: Scoring
    scene: Scene
    scores: dict[str, list[tuple[float, float]]] = field(default_factory=dict)

    @property
    def others(self) -> list[str]:
        return [name for name in CONTENDERS if self.bench.fvcore or name != "fvcore"]

    def trials(self, count: int) -> list[Trial]:
        """Everybody with so many candidates."""
        ours = self.trial(_named(OURS, count), "together", count)
        others = (
            self.trial(_named(name, count), "one_by_one", count, name) for name in self.others
        )
        return [ours, *others]

    def trial(self, name: str, script: str, *arguments: object) -> Trial:
        """A program that reports what it took."""
        report = self.bench.outputs / "report.json"
        command = commands.contender(script, self.scene.directory, report, *arguments)

        def run() -> Usage:
            measuring.run(command)
            told = json.loads(report.read_text())
            self.scores[name] = told.pop("scores")
            return Usage(**told)

        files = [path for path in Path(self.scene.directory).rglob("*") if path.is_file()]
        return Trial(name, run, files)

    def rows(self, found: Measured, count: int) -> dict[str, Cells]:
        """The rows of so many candidates."""
        mine = _named(OURS, count)
        ours: Cells = {"seconds": Figure(gross(found, mine), "s"), **self._memory(found, mine)}
        rows = {f"K = {count}, {OURS}": ours}
        for name in self.others:
            rows[f"K = {count}, {CONTENDERS[name]}"] = self._against(found, name, count)
        return rows

    def _against(self, found: Measured, other: str, count: int) -> Cells:
        mine, name = _named(OURS, count), _named(other, count)
        seconds = gross(found, name)
        share = _percent([count * once for once in gross(found, LOADER)], seconds)
        wanted = other == "torch" and count == FASTER_AT and statistics.median(share) > DOMINATES
        faster = ratio(seconds, gross(found, mine)).values
        points, nats = self._apart(mine, name)
        return {
            "seconds": Figure(seconds, "s"),
            "ckptavg is faster by": Figure(faster, "×", FASTER_GOAL if wanted else None, True),
            "decoding alone": Figure(share, "%"),
            **self._memory(found, name),
            "top-1 apart": f"{points:.2g} points",
            "NLL apart": f"{nats:.1e}",
        }

    def _memory(self, found: Measured, name: str) -> Cells:
        usages = found[name]
        cells: Cells = {"peak": Figure([usage.peak / MEGABYTE for usage in usages], "MB")}
        if self.bench.device == "cuda":
            cells["GPU peak"] = Figure([usage.device_peak / MEGABYTE for usage in usages], "MB")
        return cells

    def _apart(self, one: str, other: str) -> tuple[float, float]:
        """The largest differences of any candidate's top-1 and NLL."""
        pairs = list(zip(self.scores[one], self.scores[other], strict=True))
        points, nats = ([abs(a[i] - b[i]) for a, b in pairs] for i in (0, 1))
        return max(points), max(nats)


def _named(program: str, count: int) -> str:
    return f"{program}, K = {count}"


def _percent(parts: Sequence[float], wholes: Sequence[float]) -> list[float]:
    return [100 * part / whole for part, whole in zip(parts, wholes, strict=True)]


def limit(bench: Scoring) -> list[Table]:
    """Evaluation of decoded images, set-up aside, against the models' bare forward."""
    counts = [count for count in bench.candidates if count <= LIMIT_MOST]
    with bench.scene(max(counts)) as scene:
        rows = {
            f"K = {count}": _limit_row(scene, bench.rates(scene, "limit", count)["seconds"])
            for count in counts
        }
        return [Table(_title("evaluation against the bare forward", scene), rows)]


def _limit_row(scene: Scene, seconds: dict[str, list[float]]) -> Cells:
    """What the first batch takes is set-up, in most: it is taken off, with its images."""
    further = scene.images - scene.batch_size
    rate = [
        further / (every - first)
        for every, first in zip(seconds["all"], seconds["first"], strict=True)
    ]
    bare = [scene.images / taken for taken in seconds["bare"]]
    return {
        "ckptavg.evaluate": Figure(rate, "images/s"),
        "bare forward": Figure(bare, "images/s"),
        "share": Figure(_percent(rate, bare), "%", LIMIT_GOAL, True),
        "set-up and first batch": Figure(seconds["first"], "s"),
    }


def passes(bench: Scoring) -> list[Table]:
    """A pass for statistics against a bare forward in training mode; and how exact it is."""
    with bench.scene(1) as scene:
        found = bench.rates(scene, "statistics")
        seconds, off = found["seconds"], found["off"]
        rows: dict[str, Cells] = {
            "bare forward, training mode": {"seconds": Figure(seconds["bare"], "s")}
        }
        for name, text in (
            ("ckptavg", "ckptavg.update_bn"), ("torch", "swa_utils.update_bn"),
            ("fvcore", "fvcore's update_bn_stats"),
        ):  # fmt: skip
            if name not in off:
                rows[text] = {"seconds": "not installed"}
                continue
            rows[text] = {
                "seconds": Figure(seconds[name], "s"),
                "against the bare forward": ratio(
                    seconds[name], seconds["bare"], PASS_GOAL if name == OURS else None
                ),
                "first layer's variance off by": f"{off[name]:.1e}",
            }
        return [Table(_title("statistics", scene), rows)]


def check_sizes(bench: Scoring, names: Sequence[str]) -> None:
    """Refuse what cannot be measured.

    Raises:
        BenchmarkError: There are too few images for what is to be measured.
    """
    if "limit" in names and bench.images <= bench.batch_size:
        raise BenchmarkError(
            f"{bench.images} images are no more than one batch of {bench.batch_size}, which is "
            "taken off as set-up: take more --images or a smaller --batch-size"
        )
    if "limit" in names and min(bench.candidates) > LIMIT_MOST:
        raise BenchmarkError(f"the limit is measured with up to {LIMIT_MOST} --candidates")


PARTS: dict[str, Callable[[Scoring], list[Table]]] = {
    "candidates": candidates,
    "decoding": decoding,
    "limit": limit,
    "statistics": passes,
}
