"""Processes measured from outside, in alternation, and the floor that they are measured against.

Nothing here imports torch, so that a fork is cheap and the page cache is left to the files.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

BLOCK = 1 << 20
_SAMPLES = 32
_PEAK = Path(__file__).parent / "peak"


class BenchmarkError(Exception):
    """Something that was to be measured did not run."""


@dataclass(frozen=True)
class Usage:
    """What a process took.

    Attributes:
        seconds: Wall clock, from its start to its end.
        peak: Bytes that it, or the largest Python below it, held in memory at most until its work
            was done.
        device_peak: Bytes that it held on the GPU at most, where that is known.
    """

    seconds: float
    peak: int = 0
    device_peak: int = 0


@dataclass(frozen=True)
class Trial:
    """Something to measure again and again.

    Attributes:
        name: In the results.
        run: Does it once, and says what it took.
        inputs: Files that it reads, made warm or cold before each time.
        finish: Called after each time, not measured, before the outputs are removed.
    """

    name: str
    run: Callable[[], Usage]
    inputs: Sequence[Path] = ()
    finish: Callable[[], None] | None = None


def run(command: Sequence[str | Path], foreign: bool = False) -> Usage:
    """Run a Python program to its end.

    Args:
        command: The program and its arguments.
        foreign: It belongs to another environment, so PYTHONPATH is not for it.

    Raises:
        BenchmarkError: It failed; with the end of what it wrote to stderr.
    """
    with tempfile.TemporaryFile() as errors, tempfile.NamedTemporaryFile() as peaks:
        start = time.perf_counter()
        process = subprocess.Popen(
            list(map(str, command)), stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
            stderr=errors, env=_environment(peaks.name, foreign),
        )  # fmt: skip
        try:
            process.wait()
        except BaseException:
            process.kill()
            process.wait()
            raise
        seconds = time.perf_counter() - start
        if process.returncode:
            errors.seek(0)
            said = errors.read()[-2000:].decode(errors="replace")
            raise BenchmarkError(f"{' '.join(map(str, command))[:300]}\nfailed:\n{said}")
        return Usage(seconds, 1024 * max(map(int, Path(peaks.name).read_text().split())))


def _environment(peaks: str, foreign: bool) -> dict[str, str]:
    """Variables that make a Python tell its peak memory."""
    paths = [str(_PEAK), *([] if foreign else os.environ.get("PYTHONPATH", "").split(os.pathsep))]
    return {
        **os.environ, "BENCHMARK_PEAKS": peaks, "PYTHONPATH": os.pathsep.join(filter(None, paths)),
    }  # fmt: skip


def chain(*usages: Usage) -> Usage:
    """What processes took one after another."""
    return Usage(sum(usage.seconds for usage in usages), max(usage.peak for usage in usages))


def floor(inputs: Sequence[Path], outputs: Sequence[tuple[Path, int]]) -> Usage:
    """The least that any program could take: read every input, write and fsync every output.

    Args:
        inputs: Files, read by ``cat``.
        outputs: Files to write, and their sizes in bytes.
    """
    block = os.urandom(BLOCK)
    start = time.perf_counter()
    if inputs:
        subprocess.run(["cat", *inputs], stdout=subprocess.DEVNULL, check=True)
    for path, size in outputs:
        _write(path, size, block)
    return Usage(time.perf_counter() - start)


def _write(path: Path, size: int, block: bytes) -> None:
    with path.open("wb", buffering=0) as file:
        for start in range(0, size, BLOCK):
            file.write(block[: size - start])
        os.fsync(file.fileno())


def alternate(
    trials: Sequence[Trial],
    rounds: int,
    room: Path | None = None,
    prepare: Callable[[Sequence[Path]], None] = lambda _: None,
    progress: Callable[[str], None] = lambda _: None,
    uncounted: int | None = None,
    pause: float = 0.0,
) -> dict[str, list[Usage]]:
    """Run every trial once a round, each other round in the opposite order.

    Args:
        trials: What to run.
        rounds: How often.
        room: Directory of the outputs, emptied after each run.
        prepare: Makes a trial's inputs warm or cold.
        progress: Told what was measured.
        uncounted: Rounds before those that count, to bring the programs themselves into the page
            cache; one where there are several rounds, if nothing is said.
    """
    found: dict[str, list[Usage]] = {trial.name: [] for trial in trials}
    if uncounted is None:
        uncounted = 0 if rounds == 1 else 1
    for number in range(uncounted + rounds):
        for trial in trials[:: -1 if number % 2 else 1]:
            os.sync()  # so that nothing is left to be written for what ran before
            prepare(trial.inputs)
            time.sleep(pause)
            usage = trial.run()
            if number >= uncounted:
                found[trial.name].append(usage)
            progress(f"round {number - uncounted + 1}: {trial.name}: {usage.seconds:.3f} s")
            if trial.finish is not None:
                trial.finish()
            if room is not None:
                empty(room)
    return found


def empty(directory: Path) -> None:
    """Remove what is in a directory."""
    for path in directory.iterdir():
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def warm(paths: Sequence[Path]) -> None:
    """Bring files into the page cache."""
    if paths:
        subprocess.run(["cat", *paths], stdout=subprocess.DEVNULL, check=True)


def cold(paths: Sequence[Path]) -> None:
    """Put files out of the page cache; they must have been written to the disk."""
    for path in paths:
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def cached(paths: Sequence[Path]) -> float:
    """The share of some pages of the files that the page cache holds; it may then hold more."""
    held = tried = 0
    for path in paths:
        size = path.stat().st_size
        with path.open("rb", buffering=0) as file:
            for i in range(_SAMPLES):
                tried += 1
                with contextlib.suppress(BlockingIOError):
                    at = size * i // _SAMPLES
                    held += os.preadv(file.fileno(), [bytearray(1)], at, os.RWF_NOWAIT)
    return held / tried


def files(paths: Sequence[Path]) -> list[Path]:
    """The tensors' files of checkpoints that are files or directories."""
    return [
        file
        for path in paths
        for file in (sorted(path.glob("*.safetensors")) if path.is_dir() else [path])
    ]


def size(paths: Sequence[Path]) -> int:
    """Bytes of some files."""
    return sum(path.stat().st_size for path in paths)
