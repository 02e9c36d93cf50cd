"""Averages of runs of several sizes, in one process.

``growing.py REPORT ROUNDS PAUSE OUTPUTS RUN...`` counts no start-up, which varies by more than the
smallest of them takes. Writes the seconds of every round by the name of the run, and of its floor,
as JSON.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import measuring
from bench import FLOOR, files_of
from measuring import Trial, Usage

import ckptavg


def main(report: str, rounds: str, pause: str, outputs: str, *runs: str) -> None:
    """Measure every run, in alternation, and write what was found."""
    room = Path(outputs)
    trials = [trial for run in map(Path, runs) for trial in _trials(run, room)]
    found = measuring.alternate(
        trials, int(rounds), room, measuring.warm, lambda line: print(line, file=sys.stderr),
        pause=float(pause),
    )  # fmt: skip
    seconds = {name: [usage.seconds for usage in usages] for name, usages in found.items()}
    Path(report).write_text(json.dumps(seconds))


def _trials(run: Path, room: Path) -> list[Trial]:
    """The floor of a run, and its average."""
    inputs = files_of(run)
    floor = [(room / "floor", measuring.size(inputs) // len(list(run.iterdir())))]
    return [
        Trial(f"{FLOOR} {run.name}", lambda: measuring.floor(inputs, floor), inputs),
        Trial(run.name, lambda: _averaged(run, room / "average"), inputs),
    ]


def _averaged(run: Path, out: Path) -> Usage:
    start = time.perf_counter()
    ckptavg.average(ckptavg.open_run(run), out=out)
    return Usage(time.perf_counter() - start)


if __name__ == "__main__":
    main(*sys.argv[1:])
