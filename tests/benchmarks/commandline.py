"""What the benchmark's commands share: options, a room for data, what is printed at the end."""

from __future__ import annotations

import argparse
import json
import signal
import sys
import tempfile
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from measuring import BenchmarkError
from tables import Table, markdown, plain

Measured = tuple[Sequence[Table], dict[str, str]]
"""Tables, and what they were measured on."""


def parser(description: str | None, parts: Iterable[str], rounds: int) -> argparse.ArgumentParser:
    """A parser of the options that every command has.

    Args:
        description: The command's own.
        parts: Names for ``--only``.
        rounds: How often everything is measured if nothing is said.
    """
    made = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = made.add_argument
    add("--rounds", type=positive, default=rounds,
        help=f"how often each is run (default: {rounds})")  # fmt: skip
    add("--pause", type=float, default=2.0, metavar="SECONDS",
        help="before each run, in which a rented disk's budget recovers (default: 2)")  # fmt: skip
    add("--dir", type=Path, default=Path(), help="where the data goes (default: here)")
    add("--only", action="append", choices=[*parts], help="a part; may be repeated")
    add("--markdown", action="store_true", help="print Markdown")
    add("--json", type=Path, metavar="FILE", help="store every round of every figure")
    return made


def positive(text: str) -> int:
    """A number from 1 on."""
    if (number := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"expected 1 or more but got {number}")
    return number


def run(options: argparse.Namespace, measure: Callable[[Path], Measured]) -> int:
    """Measure in a directory of its own, then print; returns the exit code."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the data is removed
    options.dir.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="ckptavg-benchmark-", dir=options.dir) as room:
        try:
            tables, about = measure(Path(room).resolve())
        except BenchmarkError as error:
            print(f"error: {error}", file=sys.stderr)
            return 1
    _show(tables, about, options)
    return 0


def progress(line: str) -> None:
    """Say what is going on."""
    print(line, file=sys.stderr, flush=True)


def listed(about: dict[str, str]) -> str:
    """What something is measured on, in a line."""
    return ", ".join(f"{name} {value}" for name, value in about.items())


def _show(tables: Sequence[Table], about: dict[str, str], options: argparse.Namespace) -> None:
    """Print the tables and what they were measured on, and store the figures."""
    note = f"medians of {options.rounds} (least–most); {listed(about)}"
    print((markdown if options.markdown else plain)(tables), note, sep="\n\n")
    if options.json:
        found = [table.as_json() for table in tables]
        stored = {"machine": about, "rounds": options.rounds, "tables": found}
        options.json.write_text(json.dumps(stored, indent=1))
