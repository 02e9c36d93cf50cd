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
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import machine
from measuring import BenchmarkError
from scoring_parts import PARTS, Scoring, check_sizes
from tables import show

_IMAGES = {"cpu": 64, "cuda": 2048}
_BATCH_SIZE = {"cpu": 16, "cuda": 128}
_NOT_ON = {"cuda": "decoding"}  # photos of any size keep a GPU waiting


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse the command line, measure, print; returns the exit code."""
    options = _parser().parse_args(arguments)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the data is removed
    options.dir.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="ckptavg-benchmark-", dir=options.dir) as room:
        try:
            found = _device(options.device)
            bench = _bench(options, Path(room), found)
            names = options.only or [name for name in PARTS if name != _NOT_ON.get(bench.device)]
            check_sizes(bench, names)
            about = machine.about(options.dir) | found["about"]
            bench.progress(", ".join(f"{name} {value}" for name, value in about.items()))
            tables = [table for name in names for table in PARTS[name](bench)]
        except BenchmarkError as error:
            print(f"error: {error}", file=sys.stderr)
            return 1
    show(tables, about, options.rounds, options.markdown, options.json)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="(default: auto)")
    add("--candidates", type=_positive, nargs="+", default=[1, 8, 16], metavar="K",
        help="how many averages (default: 1 8 16)")  # fmt: skip
    add("--checkpoints", type=_positive, default=5, help="that they are of (default: 5)")
    add("--images", type=_positive, help=f"files, or in memory (default: {_told(_IMAGES)})")
    add("--pixels", type=_pixels, metavar="WxH", help="of a photo (default: each part's own)")
    add("--crop", type=_positive, default=224, help="pixels that the model sees (default: 224)")
    add("--model", help="a name of torchvision's (default: each part's own)")
    add("-b", "--batch-size", type=_positive, help=f"(default: {_told(_BATCH_SIZE)})")
    add("-j", "--workers", type=int, default=machine.cores(), help="(default: as many as cores)")
    add("--rounds", type=_positive, default=3, help="how often each is run (default: 3)")
    add("--dir", type=Path, default=Path(), help="where the data goes (default: here)")
    add("--only", action="append", choices=PARTS, help="a part; may be repeated")
    add("--markdown", action="store_true", help="print Markdown")
    add("--json", type=Path, metavar="FILE", help="store every round of every figure")
    return parser


def _told(defaults: dict[str, int]) -> str:
    return ", ".join(f"{value} on {device}" for device, value in defaults.items())


def _positive(text: str) -> int:
    if (number := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"expected 1 or more but got {number}")
    return number


def _pixels(text: str) -> tuple[int, int]:
    width, x, height = text.partition("x")
    if not x:
        raise argparse.ArgumentTypeError(f"expected WIDTHxHEIGHT but got {text!r}")
    return _positive(width), _positive(height)


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
        rounds=options.rounds, room=room.resolve(),
        progress=lambda line: print(line, file=sys.stderr, flush=True),
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
