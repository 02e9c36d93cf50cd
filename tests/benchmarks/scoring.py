"""Measure the scoring of averages: many in one pass against one by one, and against the hardware.

``python tests/benchmarks/scoring.py`` makes its own checkpoints and photos and measures, in
alternation, on a GPU where there is one:

candidates: K averages of a run, each with recomputed BatchNorm statistics, scored by ckptavg in one
    pass, and by scripts one after another; programs of their own, with the same loader; seconds
    without the import of torch and torchvision
decoding: the same where decoding takes most of the time even without a GPU
limit: evaluation of images in memory against the bare forward pass of the same models
statistics: update_bn against a bare forward pass in training mode

Linux only.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import commandline
import machine
from commandline import Measured, positive
from measuring import BenchmarkError
from scoring_parts import PARTS, Scoring, check_sizes

_IMAGES = {"cpu": 64, "cuda": 2048}
_BATCH_SIZE = {"cpu": 16, "cuda": 128}
_NOT_ON = {"cuda": "decoding"}  # photos of any size keep a GPU waiting


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse the command line, measure, print; returns the exit code."""
    options = _parser().parse_args(arguments)
    return commandline.run(options, lambda room: _measured(options, room))


def _measured(options: argparse.Namespace, room: Path) -> Measured:
    found = _device(options.device)
    bench = _bench(options, room, found)
    names = options.only or [name for name in PARTS if name != _NOT_ON.get(bench.device)]
    check_sizes(bench, names)
    about = machine.about(options.dir) | found["about"]
    bench.progress(commandline.listed(about))
    return [table for name in names for table in PARTS[name](bench)], about


def _parser() -> argparse.ArgumentParser:
    parser = commandline.parser(__doc__, PARTS, rounds=3)
    add = parser.add_argument
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="(default: auto)")
    add("--candidates", type=positive, nargs="+", default=[1, 8, 16], metavar="K",
        help="how many averages (default: 1 8 16)")  # fmt: skip
    add("--checkpoints", type=positive, default=5, help="that they are of (default: 5)")
    add("--images", type=positive, help=f"files, or in memory (default: {_told(_IMAGES)})")
    add("--pixels", type=_pixels, metavar="WxH", help="of a photo (default: each part's own)")
    add("--crop", type=positive, default=224, help="pixels that the model sees (default: 224)")
    add("--model", help="a name of torchvision's (default: each part's own)")
    add("-b", "--batch-size", type=positive, help=f"(default: {_told(_BATCH_SIZE)})")
    add("-j", "--workers", type=int, default=machine.cores(), help="(default: as many as cores)")
    return parser


def _told(defaults: dict[str, int]) -> str:
    return ", ".join(f"{value} on {device}" for device, value in defaults.items())


def _pixels(text: str) -> tuple[int, int]:
    width, x, height = text.partition("x")
    if not x:
        raise argparse.ArgumentTypeError(f"expected WIDTHxHEIGHT but got {text!r}")
    return positive(width), positive(height)


def _device(asked: str) -> dict[str, Any]:
    """What device.py finds."""
    program = Path(__file__).with_name("device.py")
    run = subprocess.run(
        [sys.executable, program, asked], check=False, capture_output=True, text=True
    )
    if run.returncode:
        raise BenchmarkError(run.stderr.strip().splitlines()[-1])
    found: dict[str, Any] = json.loads(run.stdout)
    return found


def _bench(options: argparse.Namespace, room: Path, found: dict[str, Any]) -> Scoring:
    device = found["device"]
    bench = Scoring(
        rounds=options.rounds, room=room, progress=commandline.progress, pause=options.pause,
        device=device, fvcore="fvcore" in found["about"],
        candidates=sorted(set(options.candidates)), checkpoints=options.checkpoints,
        images=options.images or _IMAGES[device], crop=options.crop,
        batch_size=options.batch_size or _BATCH_SIZE[device], workers=options.workers,
        model=options.model, pixels=options.pixels,
    )  # fmt: skip
    bench.outputs.mkdir()
    return bench


if __name__ == "__main__":
    sys.exit(main())
