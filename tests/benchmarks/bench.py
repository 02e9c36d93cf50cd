"""What the parts of the benchmark share: sizes, room, data, and ratios of what was measured."""

from __future__ import annotations

import shutil
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import commands
import measuring
from measuring import BenchmarkError, Trial, Usage
from tables import Figure

DATA = Path(__file__).with_name("checkpoints.py")
IMPORT = "import torch"
FLOOR = "floor"
OURS = "ckptavg"
MEGABYTE = 1e6

Measured = dict[str, list[Usage]]


@dataclass(frozen=True, kw_only=True)
class Workplace:
    """Where and how often something is measured.

    Attributes:
        rounds: How often everything is measured.
        room: A directory of the benchmark's own.
        progress: Told what is going on, a line each.
        pause: Seconds before each run.
    """

    rounds: int
    room: Path
    progress: Callable[[str], None]
    pause: float

    @property
    def outputs(self) -> Path:
        """Where everything that is measured writes; emptied after each time."""
        return self.room / "outputs"

    @contextmanager
    def directory(self) -> Iterator[Path]:
        """A directory for data, removed at the end."""
        directory = self.room / "data"
        directory.mkdir()
        try:
            yield directory
        finally:
            shutil.rmtree(directory)


@dataclass(frozen=True, kw_only=True)
class Bench(Workplace):
    """One run of the benchmark of averaging.

    Attributes:
        checkpoints: How many are averaged, where nothing else is said.
        nbytes: Of each, where nothing else is said.
        large: Whether memory is measured with checkpoints of 10 GB, too.
        mergekit: The program, or None where it is not installed.
    """

    checkpoints: int
    nbytes: int
    large: bool
    mergekit: str | None

    @property
    def total(self) -> int:
        """Bytes of all checkpoints."""
        return self.checkpoints * self.nbytes

    @property
    def amount(self) -> str:
        """All checkpoints, in words."""
        return f"{self.checkpoints} × {self.nbytes / 1e9:.3g} GB"

    @contextmanager
    def run_of(
        self, checkpoints: int, nbytes: int, kinds: Sequence[str], dtype: str = "float32"
    ) -> Iterator[Path]:
        """A directory with a run in each of the kinds, removed at the end."""
        amount = f"{checkpoints} × {nbytes / 1e9:.3g} GB {dtype}"
        self.progress(f"making {amount} ({', '.join(kinds)})")
        with self.directory() as directory:
            command = [
                sys.executable, DATA, directory, "--checkpoints", checkpoints,
                "--bytes", nbytes, "--dtype", dtype, "--kinds", *kinds,
            ]  # fmt: skip
            measuring.run(list(map(str, command)))
            yield directory

    def measure(
        self,
        trials: Sequence[Trial],
        prepare: Callable[[Sequence[Path]], None] = measuring.warm,
        rounds: int | None = None,
    ) -> Measured:
        """Measure in alternation, ``import torch`` too."""
        importing = Trial(IMPORT, lambda: measuring.run(commands.IMPORT_TORCH))
        return measuring.alternate(
            [importing, *trials], rounds or self.rounds, self.outputs, prepare, self.progress,
            pause=self.pause,
        )  # fmt: skip

    def floor(self, run: Path, name: str = FLOOR) -> Trial:
        """Read a run, write and fsync one output as large as one of its checkpoints."""
        inputs, targets = files_of(run), self.targets(run, 1)
        return Trial(name, lambda: measuring.floor(inputs, targets), inputs)

    def targets(self, run: Path, count: int) -> list[tuple[Path, int]]:
        """So many files to write, as large as a checkpoint of the run each."""
        nbytes = measuring.size(files_of(run)) // len(list(run.iterdir()))
        return [(self.outputs / f"floor{i}", nbytes) for i in range(count)]

    def ours(self, run: Path, suffix: str, name: str = OURS, *options: str) -> Trial:
        """Average a run of checkpoints."""
        command = commands.average(run, self.outputs / f"average{suffix}", *options)
        return Trial(name, lambda: measuring.run(command), files_of(run))


def files_of(run: Path) -> list[Path]:
    """The tensors' files of a run."""
    return measuring.files(sorted(run.iterdir()))


def net(measured: Measured, name: str, base: str = IMPORT) -> list[float]:
    """Seconds in each round, without those of importing torch (median of the rounds)."""
    importing = statistics.median(usage.seconds for usage in measured[base])
    return [usage.seconds - importing for usage in measured[name]]


def gross(measured: Measured, name: str) -> list[float]:
    """Seconds in each round."""
    return [usage.seconds for usage in measured[name]]


def ratio(above: Sequence[float], below: Sequence[float], goal: float | None = None) -> Figure:
    """Quotients, round by round."""
    return Figure([a / b for a, b in zip(above, below, strict=True)], "×", goal)


def peak(measured: Measured, name: str, base: str = IMPORT, goal: float | None = None) -> Figure:
    """Megabytes above what importing torch takes (median of the rounds)."""
    importing = statistics.median(usage.peak for usage in measured[base])
    values = [(usage.peak - importing) / MEGABYTE for usage in measured[name]]
    return Figure(values, "MB", goal)


def difference(one: Path, other: Path) -> float:
    """How far two averages are apart, relative to the largest value.

    Raises:
        BenchmarkError: They do not have the same tensors.
    """
    found = subprocess.run(
        commands.difference(one, other), check=False, capture_output=True, text=True
    )
    if found.returncode:
        raise BenchmarkError(f"{other.name} is another result than ckptavg's: {found.stderr}")
    return float(found.stdout)
