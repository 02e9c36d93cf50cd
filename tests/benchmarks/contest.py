"""Who else averages checkpoints, on the same files, and whether all come to the same result."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import commands
import measuring
from bench import FLOOR, IMPORT, OURS, Bench, difference, files_of, gross, net, peak, ratio
from measuring import Trial
from tables import Cells, Figure, Table

_MERGEKIT = "mergekit"


@dataclass(frozen=True)
class Contender:
    """A program that averages.

    Attributes:
        command: Its command line.
        out: The file or directory that it writes.
        base: Name of the measurement of ``import torch`` in its environment.
    """

    command: commands.Command
    out: Path
    base: str = IMPORT


def contenders(bench: Bench) -> list[Table]:
    """Everybody on the same warm float32 files: time, memory, and how far apart they are."""
    title = f"contenders, {bench.amount} float32, warm"
    with bench.run_of(bench.checkpoints, bench.nbytes, ("safetensors",)) as directory:
        rows = _contest(bench, directory / "safetensors")
    if bench.mergekit is None:
        rows[_MERGEKIT] = {"seconds": "not installed"}
    return [Table(title, rows)]


def _contest(bench: Bench, run: Path) -> dict[str, Cells]:
    found = dict(_contenders(bench, run))
    agreement = _Agreement(bench.room / "reference.safetensors")
    inputs = files_of(run)
    trials = [
        Trial(name, _runner(one.command), inputs, agreement.check(name, one.out))
        for name, one in found.items()
    ]
    if bench.mergekit is not None:
        trials.append(Trial(_base(_MERGEKIT), _runner(commands.beside(bench.mergekit))))
    measured = bench.measure([bench.floor(run), *trials])
    agreement.reference.unlink()
    floor = gross(measured, FLOOR)
    rows: dict[str, Cells] = {"cat and write (the floor)": {"seconds": Figure(floor, "s")}}
    for name, one in found.items():
        seconds = net(measured, name, one.base)
        rows[name] = {
            "seconds": Figure(seconds, "s"),
            "against the floor": ratio(seconds, floor),
            "peak": peak(measured, name, one.base),
            "apart": agreement.text(name),
        }
    return rows


def _contenders(bench: Bench, run: Path) -> Iterator[tuple[str, Contender]]:
    """By name; ckptavg is the first, as its result is what the others' are compared with."""
    inputs = files_of(run)
    out = bench.outputs / "out.safetensors"
    yield OURS, Contender(commands.average(run, out), out)
    yield "load and add", Contender(commands.load_and_add(inputs, out), out)
    yield "AveragedModel", Contender(commands.averaged_model(inputs, out), out)
    if bench.mergekit is not None:
        merged = bench.outputs / "merged"
        configuration = run.parent / "mergekit.json"
        command = commands.mergekit(bench.mergekit, inputs, merged, configuration)
        yield _MERGEKIT, Contender(command, merged, _base(_MERGEKIT))


def _base(name: str) -> str:
    return f"{IMPORT} beside {name}"


def _runner(command: commands.Command) -> Callable[[], measuring.Usage]:
    foreign = Path(command[0]).parent != Path(commands.IMPORT_TORCH[0]).parent
    return lambda: measuring.run(command, foreign)


@dataclass
class _Agreement:
    """How far the first output of each is from ckptavg's, which runs before them."""

    reference: Path
    found: dict[str, float] = field(default_factory=dict)

    def check(self, name: str, out: Path) -> Callable[[], None]:
        """What to call when the output is there."""

        def finish() -> None:
            if name == OURS:
                if not self.reference.exists():
                    out.rename(self.reference)
            elif self.reference.exists() and name not in self.found:
                self.found[name] = difference(self.reference, out)

        return finish

    def text(self, name: str) -> str:
        return f"{self.found[name]:.1e}" if name in self.found else ""
