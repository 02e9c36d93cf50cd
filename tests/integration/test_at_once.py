"""Real processes: several that write one output, and some that are killed."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from helpers import listing, save_states
from safetensors.torch import load_file
from selecting import first_only

SUPPORT = Path(__file__).parents[1] / "support"
ROUNDS = 10
pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="locks and signals of POSIX")
linux = pytest.mark.skipif(sys.platform != "linux", reason="forks a process that has torch")
OUTPUTS = ["swa.safetensors", "swa.pt", "swa"]
# What a run is told that another, writing the same output, disturbed within the same microseconds
RACED = (
    r"(cannot be written: (another run writes it at the same time|its directory or its temporary "
    r"was removed meanwhile)|has appeared while the output was being written)\. .*"
)

# Averages its run onto what a line on stdin names, again and again, and tells how that went
WRITER = """
import json, sys
from ckptavg import average, open_run
from ckptavg.errors import CkptavgError
run = open_run(sys.argv[1])
print("ready", flush=True)
for line in sys.stdin:
    out, overwrite = json.loads(line)
    try:
        average(run, out=out, overwrite=overwrite)
        print("written", flush=True)
    except CkptavgError as error:
        print(f"{type(error).__name__}: {error}", flush=True)
"""


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two runs whose averages are 1 and 11 everywhere."""
    home = tmp_path_factory.mktemp("runs")
    for first in (0, 10):
        states = [{"w": torch.full((300_000,), float(first + i))} for i in (0, 2)]
        save_states(home / str(first), states)
    return [home / "0", home / "10"]


@pytest.fixture(scope="module")
def writers(runs: list[Path]) -> Iterator[list[subprocess.Popen[str]]]:
    """Two processes that write the averages of the two runs."""
    started = [
        subprocess.Popen(
            [sys.executable, "-c", WRITER, run],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for run in runs
    ]
    for writer in started:
        assert writer.stdout.readline() == "ready\n"
    yield started
    for writer in started:
        writer.communicate()


def told(writers: list[subprocess.Popen[str]], out: Path, *, overwrite: bool) -> list[str]:
    """Let all write one output at the same time; what each says."""
    for writer in writers:
        writer.stdin.write(f'["{out}", {str(overwrite).lower()}]\n')
    for writer in writers:
        writer.stdin.flush()
    return [writer.stdout.readline().strip() for writer in writers]


def value(out: Path) -> float:
    """The only value in an output, which is whole."""
    if out.suffix == ".pt":
        found = torch.load(out, weights_only=True)["state_dict"]["w"]
    else:
        found = load_file(out / "model.safetensors" if out.is_dir() else out)["w"]
    assert found.shape == (300_000,)
    assert bool((found == found[0]).all())
    return float(found[0])


@first_only("name", OUTPUTS)
def test_output_written_at_once_refuses_slower(writers, tmp_path, name):
    for i in range(ROUNDS):
        place = tmp_path / str(i)
        place.mkdir()
        answers = told(writers, place / name, overwrite=False)
        winner = answers.index("written")
        (loser,) = (answer for k, answer in enumerate(answers) if k != winner)
        appeared = (
            r"(has appeared while the output was being written|exists already)\. "
            r"Pass `overwrite=True` .*"
        )
        expected = rf"OutputError: {re.escape(str(place / name))} ({appeared}|{RACED})"
        assert re.fullmatch(expected, loser)
        assert value(place / name) == (1.0, 11.0)[winner]
        assert os.listdir(place) == [name]


@first_only("name", OUTPUTS)
def test_output_overwritten_at_once_is_whole(writers, tmp_path, name):
    for _ in range(ROUNDS):
        answers = told(writers, tmp_path / name, overwrite=True)
        values = {v for v, answer in zip((1.0, 11.0), answers, strict=True) if answer == "written"}
        assert value(tmp_path / name) in values
        errors = [answer for answer in answers if answer != "written"]
        expected = rf"OutputError: {re.escape(str(tmp_path / name))} {RACED}"
        assert all(re.fullmatch(expected, error) for error in errors)
        assert os.listdir(tmp_path) == [name]


SIX_AT_ONCE = """
import os, random, sys, time
from pathlib import Path
from ckptavg import average, open_run
from ckptavg.errors import OutputError
from ckptavg.io import rename as renaming
rename = Path.rename
def slow(self, target):
    rename(self, target)
    time.sleep(random.random() / 100)
if sys.argv[3] == "steps":
    renaming._RENAMEAT2 = None  # a system that swaps nothing in one step
    Path.rename = slow
children = []
for _ in range(6):
    child = os.fork()
    if child == 0:
        written = 0
        for _ in range(10):
            try:
                average(open_run(sys.argv[1]), out=sys.argv[2], overwrite=True)
                written += 1
            except OutputError as error:
                print(error, file=sys.stderr)
        os._exit(0 if written else 1)
    children.append(child)
sys.exit(any([os.waitpid(child, 0)[1] for child in children]))
"""


@pytest.mark.slow
@linux
@pytest.mark.parametrize("system", ["one step", "steps"])
def test_output_directory_overwritten_by_six_is_whole(runs, tmp_path, system):
    """A reader may find it missing for a moment where it is swapped in steps; each run succeeds, or
    is told that another one came between."""
    save_states(tmp_path / "run", [{"w": torch.full((300_000,), float(i))} for i in (0, 2)])
    command = [sys.executable, "-c", SIX_AT_ONCE, tmp_path / "run", tmp_path / "swa", system]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr[-1000:]
    expected = re.compile(rf"{re.escape(str(tmp_path / 'swa'))} {RACED}")
    assert all(expected.fullmatch(line) for line in done.stderr.splitlines()), done.stderr[-1000:]
    assert value(tmp_path / "swa") == 1.0
    assert sorted(os.listdir(tmp_path)) == ["run", "swa"]


@linux
@pytest.mark.slow
@pytest.mark.parametrize(("number", "kills"), [("KILL", 60), ("TERM", 20)])
def test_killed_runs_leave_nothing_torn(tmp_path, number, kills):
    command = [sys.executable, SUPPORT / "kills.py", "--dir", tmp_path, "--signal", number]
    command += ["--kills", str(kills), "--megabytes", "8", "--whole", "4"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr[-1000:]
    last = done.stdout.splitlines()[-1]
    assert last.startswith(f"{kills} kills")
    if number == "KILL":
        assert " 0% during the write" not in last
    assert listing(tmp_path) == []
