"""Measure averaging against the disk, the usual script, torch and mergekit.

``python tests/benchmarks/averaging.py`` makes its own checkpoints, runs every program as a process
of its own, in alternation, and prints the medians with their spread; seconds are those of the whole
process without those of ``import torch``, which is measured among them. The floor is ``cat`` of the
inputs to /dev/null, and one output of the same size, written and fsynced. Linux only.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

import commandline
import machine
from bench import Bench
from commandline import Measured
from measuring import BenchmarkError
from parts import PARTS

_SPARE = 1.05


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse the command line, measure, print; returns the exit code."""
    options = _parser().parse_args(arguments)
    return commandline.run(options, lambda room: _measured(options, room))


def _measured(options: argparse.Namespace, room: Path) -> Measured:
    bench = Bench(
        checkpoints=options.checkpoints, nbytes=int(options.gigabytes * 1e9),
        rounds=options.rounds, large=options.large, mergekit=options.mergekit,
        room=room, progress=commandline.progress, pause=options.pause,
    )  # fmt: skip
    bench.outputs.mkdir()
    names = options.only or list(PARTS)
    check_room(bench, names)
    about = ran_on(options.dir, bench.mergekit)
    bench.progress(commandline.listed(about))
    return [table for name in names for table in PARTS[name].run(bench)], about


def _parser() -> argparse.ArgumentParser:
    parser = commandline.parser(__doc__, PARTS, rounds=6)
    add = parser.add_argument
    add("--checkpoints", type=int, default=8, help="how many are averaged (default: 8)")
    add("--gigabytes", type=float, default=0.94, help="of each (default: 0.94)")
    add("--large", action="store_true", help="memory with (sparse) checkpoints of 10 GB, too")
    add("--mergekit", default=shutil.which("mergekit-pytorch"), metavar="PROGRAM",
        help="mergekit-pytorch (default: the one on PATH)")  # fmt: skip
    return parser


def check_room(bench: Bench, names: Sequence[str]) -> None:
    """Refuse to start what cannot end, or would not measure what it says.

    Raises:
        BenchmarkError: The disk is too small, or the inputs would not stay in memory.
    """
    disk = max(PARTS[name].disk(bench) for name in names) * _SPARE
    free = shutil.disk_usage(bench.room).free
    if disk > free:
        raise BenchmarkError(
            f"{bench.room.parent} has {free / 1e9:.1f} GB free, of {disk / 1e9:.1f} GB needed: "
            "choose another --dir, or less with --checkpoints, --gigabytes or --only"
        )
    memory = max(PARTS[name].cached(bench) for name in names) * _SPARE
    available = machine.memory("MemAvailable")
    if memory > available:
        raise BenchmarkError(
            f"{available / 1e9:.1f} GB of memory are available, and {memory / 1e9:.1f} GB are "
            "needed for files to stay warm: take less with --checkpoints, --gigabytes or --only"
        )


def ran_on(directory: Path, mergekit: str | None) -> dict[str, str]:
    """What this ran on."""
    about = machine.about(directory)
    about |= machine.versions(sys.executable, "ckptavg", "torch", "safetensors")
    if mergekit is not None:
        python = Path(mergekit).with_name("python")
        about |= machine.versions(str(python), "mergekit") if python.exists() else {}
    return about


if __name__ == "__main__":
    sys.exit(main())
