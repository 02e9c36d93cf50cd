"""Measure the scoring of a plane of points: ckptavg against the usual loop over points.

``python tests/benchmarks/landscape.py`` makes a run of a small network with BatchNorm and measures
its plane of 21 × 21 points, each with recomputed statistics, loss on training data and error on
evaluation data; programs of their own, with the same batches; seconds without the import of torch:

files: images decoded from JPEG files
memory: images in memory

*Apart* is the largest difference from ckptavg's figures. ``update_bn`` averages the variances of
batches, which is another statistic; a loop with the variance of all values, as ckptavg has it, is
run on every tenth point, and has to agree.

A few minutes on two cores. Linux only.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import commandline
import commands
import machine
import measuring
import scoring
from bench import OURS, Workplace, gross, ratio
from commandline import Measured, positive
from contenders.scene import SMALL, Scene
from measuring import BenchmarkError, Trial, Usage
from tables import Cells, Figure, Table

_HERE = Path(__file__).parent
_USUAL, _CHECK = "update_bn, point by point", "population statistics, every 10th point"
_STRIDE = 10
# Losses and percentages of programs with the same statistics differ by rounding.
_TOLERANCE = 1e-4
_PHOTO = (500, 375)
# Decoding takes most of the time of a photo; of images in memory more are needed to measure.
_IMAGES = {"files": 48, "memory": 256}
_BATCH_SIZE = {"files": 16, "memory": 64}


@dataclass(frozen=True, kw_only=True)
class Planes(Workplace):
    """One run of the benchmark.

    Attributes:
        points: Along each axis.
        images: In the training and in the evaluation data, which are the same; None for each
            part's own number.
        crop: Width and height in pixels of what the network sees.
        batch_size: Of the loaders; None for each part's own.
        workers: Of the loaders.
        device: ``cpu`` or ``cuda``.
        scores: Each program's (top-1 in %, loss with L2 term) a point.
    """

    points: int
    images: int | None
    crop: int
    batch_size: int | None
    workers: int
    device: str
    scores: dict[str, list[tuple[float, float]]] = field(default_factory=dict)

    def table(self, part: str, what: str, photo: tuple[int, int]) -> Table:
        """Measure one kind of data.

        Raises:
            BenchmarkError: Two programs with the same statistics come to other figures.
        """
        with self.directory() as directory:
            scene = Scene(
                str(directory), SMALL, 5, 1, self.images or _IMAGES[part], *photo, self.crop,
                self.batch_size or _BATCH_SIZE[part], self.workers, self.device,
            )  # fmt: skip
            self.progress(f"making a run and {scene.images} images")
            scene.save()
            measuring.run([sys.executable, _HERE / "scenes.py", directory])
            found = self._measure(scene)
        seconds = {name: gross(found, name) for name in (OURS, _USUAL)}
        rows: dict[str, Cells] = {OURS: {"seconds": Figure(seconds[OURS], "s")}}
        for name in (_USUAL, _CHECK):
            points, nats = self._apart(name)
            rows[name] = {"top-1 apart": f"{points:.2g} points", "loss apart": f"{nats:.1e}"}
        rows[_USUAL] |= {
            "seconds": Figure(seconds[_USUAL], "s"),
            "ckptavg is faster by": ratio(seconds[_USUAL], seconds[OURS]),
        }
        if max(self._apart(_CHECK)) > _TOLERANCE:
            raise BenchmarkError(f"the figures are not the same: {rows[_CHECK]}")
        return Table(
            f"plane of {self.points} × {self.points} points, {scene.images} {what} at {self.crop} "
            f"px in batches of {scene.batch_size}, {self.workers} workers, {self.device}",
            rows,
        )

    def _measure(self, scene: Scene) -> dict[str, list[Usage]]:
        # The first trial stores the coordinates that the others score.
        mine = self._trial(scene, OURS, "plane_together", self.points)
        usual = self._trial(scene, _USUAL, "plane_one_by_one", "torch", 1)
        check = self._trial(scene, _CHECK, "plane_one_by_one", "population", _STRIDE)
        mine.run()
        found = measuring.alternate(
            [mine, usual], self.rounds, self.outputs, measuring.warm, self.progress, uncounted=0,
            pause=self.pause,
        )  # fmt: skip
        check.run()
        return found

    def _trial(self, scene: Scene, name: str, script: str, *arguments: object) -> Trial:
        """A program that reports what it took."""
        report = self.room / "report.json"
        command = commands.contender(script, scene.directory, report, *arguments)

        def run() -> Usage:
            measuring.run(command)
            told = json.loads(report.read_text())
            self.scores[name] = told.pop("scores")
            return Usage(**told)

        return Trial(name, run)

    def _apart(self, name: str) -> tuple[float, float]:
        """The largest differences of top-1 and loss from ckptavg's."""
        stride = _STRIDE if name == _CHECK else 1
        pairs = list(zip(self.scores[OURS][::stride], self.scores[name], strict=True))
        points, nats = ([abs(a[i] - b[i]) for a, b in pairs] for i in (0, 1))
        return max(points), max(nats)


PARTS: dict[str, Callable[[Planes], Table]] = {
    "files": lambda planes: planes.table("files", "JPEG files of 500×375", _PHOTO),
    "memory": lambda planes: planes.table("memory", "images in memory", (0, 0)),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse the command line, measure, print; returns the exit code."""
    options = _parser().parse_args(arguments)
    return commandline.run(options, lambda room: _measured(options, room))


def _measured(options: argparse.Namespace, room: Path) -> Measured:
    found: dict[str, Any] = scoring._device(options.device)
    planes = Planes(
        rounds=options.rounds, room=room, progress=commandline.progress, pause=options.pause,
        points=options.points, images=options.images, crop=options.crop,
        batch_size=options.batch_size, workers=options.workers, device=found["device"],
    )  # fmt: skip
    planes.outputs.mkdir()
    about = machine.about(options.dir) | found["about"]
    planes.progress(commandline.listed(about))
    return [PARTS[name](planes) for name in options.only or PARTS], about


def _parser() -> argparse.ArgumentParser:
    parser = commandline.parser(__doc__, PARTS, rounds=1)
    add = parser.add_argument
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="(default: auto)")
    add("--points", type=positive, default=21, help="along each axis (default: 21)")
    add("--images", type=positive, help=f"(default: {scoring._told(_IMAGES)})")
    add("--crop", type=positive, default=32, help="pixels that the network sees (default: 32)")
    add("-b", "--batch-size", type=positive, help=f"(default: {scoring._told(_BATCH_SIZE)})")
    add("-j", "--workers", type=int, default=0, help="(default: 0)")
    return parser


if __name__ == "__main__":
    sys.exit(main())
