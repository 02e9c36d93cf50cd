"""The parts of the benchmark: each makes its data, measures, and returns its tables."""

from __future__ import annotations

import json
import os
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import checkpoints
import commands
import measuring
from bench import FLOOR, IMPORT, OURS, Bench, Measured, files_of, gross, net, peak, ratio
from contest import contenders
from measuring import BenchmarkError, Trial
from tables import Cells, Figure, Table

SPEED_GOALS = {"float32": 1.5, "float64": 1.5, "bfloat16": 2.0, "float16": 2.0}
COLD_GOAL = 1.1
TORCH_FILES_GOAL = 1.1
MEMORY_GOAL = 128  # MB
GROWTH_GOAL = 1.15
WINDOWS = 16
PROCESSES = (1, 2, 4)
_SMALL, _LARGE = 10**8, 10**10  # bytes of a checkpoint, where memory is measured
_KINDS = ((".safetensors", 0), (".pt", 0), ("", 8))  # of outputs: suffix, shards


@dataclass(frozen=True)
class Part:
    """Something to measure.

    Attributes:
        run: Measures it.
        disk: Bytes that it takes on the disk.
        cached: Bytes that must fit into memory for its inputs to stay warm.
    """

    run: Callable[[Bench], list[Table]]
    disk: Callable[[Bench], int]
    cached: Callable[[Bench], int]


def speed(bench: Bench) -> list[Table]:
    """Warm inputs of each type, as safetensors and torch files."""
    rows: dict[str, Cells] = {}
    for dtype, goal in SPEED_GOALS.items():
        with bench.run_of(
            bench.checkpoints, bench.nbytes, ("safetensors", "pt"), dtype
        ) as directory:
            rows |= _speed_rows(bench, directory, dtype, goal)
    return [Table(f"warm, {bench.amount}", rows)]


def _speed_rows(bench: Bench, directory: Path, dtype: str, goal: float) -> dict[str, Cells]:
    plain, torch_files = directory / "safetensors", directory / "pt"
    found = bench.measure([
        bench.floor(plain),
        bench.ours(plain, ".safetensors"),
        bench.ours(torch_files, ".safetensors", "from .pt"),
        bench.ours(torch_files, ".pt", "from .pt to .pt"),
    ])  # fmt: skip
    rows: dict[str, Cells] = {f"{dtype}, against the floor": _against_floor(found, goal)}
    for kind, limit in (("from .pt", TORCH_FILES_GOAL), ("from .pt to .pt", None)):
        against = ratio(net(found, kind), net(found, OURS), limit)
        rows[f"{dtype}, {kind}, against safetensors"] = {"time": against}
    return rows


def _against_floor(found: Measured, goal: float) -> Cells:
    ours, floor = net(found, OURS), gross(found, FLOOR)
    return {"time": ratio(ours, floor, goal), OURS: Figure(ours, "s"), FLOOR: Figure(floor, "s")}


def cold(bench: Bench) -> list[Table]:
    """Inputs that are not in the page cache."""
    rows: dict[str, Cells] = {}
    for dtype in ("float32", "bfloat16"):
        with bench.run_of(
            bench.checkpoints, bench.nbytes, ("safetensors", "pt"), dtype
        ) as directory:
            for kind in ("safetensors", "pt"):
                rows[f"{dtype}, .{kind}, against the floor"] = _cold_row(bench, directory / kind)
    return [Table(f"cold, {bench.amount}", rows)]


def _cold_row(bench: Bench, run: Path) -> Cells:
    check_cold(files_of(run))
    found = bench.measure(
        [bench.floor(run), bench.ours(run, f".{run.name}")], prepare=measuring.cold
    )
    return _against_floor(found, COLD_GOAL)


def check_cold(inputs: Sequence[Path]) -> None:
    """Refuse to call cold what the system keeps in memory whatever it is told.

    Raises:
        BenchmarkError: It does.
    """
    os.sync()
    measuring.cold(inputs)
    share = measuring.cached(inputs)
    if share > 0.05:
        raise BenchmarkError(
            f"{share:.0%} of the inputs stay in memory: choose a --dir on a file system with a disk"
        )


def memory(bench: Bench) -> list[Table]:
    """Peak memory: few and many, small and large checkpoints, and each kind of file."""
    small = min(_SMALL, bench.nbytes)
    cases = [(n, small, *kind) for kind in _KINDS for n in (4, 64)]
    if bench.large:
        cases += [(4, _LARGE, *kind) for kind in _KINDS] + [(64, _LARGE, *_KINDS[0])]
    rows = _memory_of_torch_files(bench, small)
    for case in cases:
        rows |= _memory_row(bench, *case)
    return [Table("memory, float32", rows)]


def _memory_row(
    bench: Bench, count: int, nbytes: int, suffix: str, shards: int
) -> dict[str, Cells]:
    """Average sparse safetensors; they are read like others, but take no room."""
    rounds = 1 if nbytes == _LARGE else bench.rounds
    kind = "shards to shards" if shards else f".safetensors to {suffix}"
    with bench.directory() as directory:
        run = directory / "run"
        checkpoints.sparse_run(run, count, nbytes, shards)
        found = bench.measure([bench.ours(run, suffix)], prepare=lambda _: None, rounds=rounds)
    cells: Cells = {"peak": peak(found, OURS, goal=MEMORY_GOAL)}
    return {f"{count} × {nbytes / 1e9:.3g} GB, {kind}": cells}


def _memory_of_torch_files(bench: Bench, nbytes: int) -> dict[str, Cells]:
    with bench.run_of(4, nbytes, ("pt",)) as directory:
        found = bench.measure([bench.ours(directory / "pt", ".pt")])
    name = f"4 × {nbytes / 1e9:.3g} GB, .pt to .pt"
    return {name: {"peak": peak(found, OURS, goal=MEMORY_GOAL)}}


def growth(bench: Bench) -> list[Table]:
    """Seconds a GB of input for totals that double; all of them lie in the largest one's shards."""
    with bench.run_of(bench.checkpoints, 2 * bench.nbytes, ("sharded",)) as directory:
        runs = {n: _partial(directory, n) for n in (1, 2, 4, 8, 16)}
        gigabytes = {n: measuring.size(files_of(run)) / 1e9 for n, run in runs.items()}
        found = _growing(bench, list(runs.values()))
    ours, floor = (
        {n: [s / gigabytes[n] for s in found[kind + run.name]] for n, run in runs.items()}
        for kind in ("", f"{FLOOR} ")
    )
    rows: dict[str, Cells] = {
        f"{gigabytes[n]:.3g} GB in all, against the most": {
            "seconds a GB": ratio(ours[n], ours[16]),
            OURS: Figure(ours[n], "s/GB"), FLOOR: Figure(floor[n], "s/GB"),
        }
        for n in runs
    }  # fmt: skip
    medians = [statistics.median(seconds) for seconds in ours.values()]
    extremes = Figure([max(medians) / min(medians)], "×", GROWTH_GOAL)
    rows["the dearest against the cheapest, medians"] = {"seconds a GB": extremes}
    return [Table(f"growth, {bench.checkpoints} checkpoints, float32, warm, one process", rows)]


def _growing(bench: Bench, runs: Sequence[Path]) -> dict[str, list[float]]:
    """What growing.py finds."""
    report = bench.room / "growing.json"
    program = Path(__file__).with_name("growing.py")
    bench.progress(f"measuring {len(runs)} sizes, {bench.rounds} rounds")
    numbers = [str(bench.rounds), str(bench.pause)]
    measuring.run([sys.executable, program, report, *numbers, bench.outputs, *runs])
    found: dict[str, list[float]] = json.loads(report.read_text())
    return found


def _partial(directory: Path, count: int) -> Path:
    """A run of the first shards of each checkpoint; the files are the same ones."""
    run = directory / f"first{count}"
    for whole in (directory / "sharded").iterdir():
        checkpoint = run / whole.name
        checkpoint.mkdir(parents=True)
        names = json.loads((whole / checkpoints.INDEX).read_text())["weight_map"]
        shards = {
            shard: [name for name, where in names.items() if where == shard]
            for shard in sorted(set(names.values()))[:count]
        }
        for shard in shards:
            os.link(whole / shard, checkpoint / shard)
        checkpoints.write_index(checkpoint, shards)
    return run


def many(bench: Bench) -> list[Table]:
    """The windows of a run in one pass, against separate passes and against a single one."""
    nbytes = bench.total // WINDOWS
    with bench.run_of(WINDOWS, nbytes, ("safetensors",)) as directory:
        rows = _many_rows(bench, directory / "safetensors")
    amount = f"{WINDOWS} × {nbytes / 1e9:.3g} GB"
    return [Table(f"the last 1, 2, ... {WINDOWS} at once, {amount} float32", rows)]


def _many_rows(bench: Bench, run: Path) -> dict[str, Cells]:
    inputs = files_of(run)
    windows = range(1, WINDOWS + 1)
    command = commands.average_many(run, bench.outputs, windows)
    together = Trial("together", lambda: measuring.run(command), inputs)
    single = [
        commands.average(run, bench.outputs / f"last{n}.safetensors", "--last", str(n))
        for n in windows
    ]
    apart = Trial("apart", lambda: measuring.chain(*map(measuring.run, single)), inputs)
    warm = bench.measure([together, apart])
    targets = bench.targets(run, WINDOWS - 1)
    writes = Trial("writes", lambda: measuring.floor((), targets))
    check_cold(inputs)
    cold = bench.measure([together, bench.ours(run, ".safetensors"), writes], measuring.cold)
    importing = statistics.median(gross(warm, IMPORT)) * (WINDOWS - 1)  # of all but one
    separate = [seconds - importing for seconds in net(warm, "apart")]
    reading = [a - b for a, b in zip(net(cold, "together"), gross(cold, "writes"), strict=True)]
    return {
        f"warm, against {WINDOWS} runs": {"time": ratio(net(warm, "together"), separate, 0.5)},
        "cold less its further writes, against one run": {
            "time": ratio(reading, net(cold, OURS), 2.5)
        },
        "memory": {"peak": peak(warm, "together", goal=MEMORY_GOAL)},
    }


def processes(bench: Bench) -> list[Table]:
    """The same average by several processes, without what torchrun and its imports take."""
    with bench.run_of(bench.checkpoints, bench.nbytes, ("safetensors",)) as directory:
        run = directory / "safetensors"
        inputs = files_of(run)
        trials = [bench.floor(run), bench.ours(run, ".safetensors")]
        for n in PROCESSES:
            command = commands.average(run, bench.outputs / "average.safetensors")
            trials += [
                _launched(n, commands.IMPORT_TORCH, f"{IMPORT} {n}"),
                _launched(n, command, str(n), inputs),
            ]
        found = bench.measure(trials)
    rows: dict[str, Cells] = {"without torchrun": _against(found, net(found, OURS))}
    for n in PROCESSES:
        rows[f"torchrun, {n}"] = _against(found, net(found, str(n), f"{IMPORT} {n}"))
    return [Table(f"processes, {bench.amount} float32, warm", rows)]


def _launched(n: int, command: commands.Command, name: str, inputs: Sequence[Path] = ()) -> Trial:
    return Trial(name, lambda: measuring.run(commands.across(n, command)), inputs)


def _against(found: Measured, seconds: Sequence[float]) -> Cells:
    return {
        "seconds": Figure(seconds, "s"), "against the floor": ratio(seconds, gross(found, FLOOR)),
    }  # fmt: skip


def _memory_disk(bench: Bench) -> int:
    return _LARGE if bench.large else 6 * min(_SMALL, bench.nbytes)


PARTS = {
    "speed": Part(speed, lambda b: 2 * b.total + b.nbytes, lambda b: 2 * b.total + b.nbytes),
    "cold": Part(cold, lambda b: 2 * b.total + b.nbytes, lambda b: 0),
    "contenders": Part(
        contenders, lambda b: b.total + 2 * b.nbytes, lambda b: b.total + 5 * b.nbytes
    ),
    "memory": Part(memory, _memory_disk, lambda b: 0),
    "growth": Part(growth, lambda b: 2 * (b.total + b.nbytes), lambda b: 2 * (b.total + b.nbytes)),
    "many": Part(many, lambda b: 2 * b.total, lambda b: 2 * b.total),
    "processes": Part(processes, lambda b: b.total + b.nbytes, lambda b: b.total + b.nbytes),
}
