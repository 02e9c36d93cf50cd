"""Each system call of a command made to fail in turn: told in a line, whole or absent, clean."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

SUPPORT = Path(__file__).parents[1] / "support"
COMPILER = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
pytestmark = [
    pytest.mark.skipif(sys.platform != "linux", reason="preloads a library of Linux's calls"),
    pytest.mark.skipif(COMPILER is None, reason="needs a C compiler"),
]


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("library") / "faulty_calls.so"
    source = SUPPORT / "faulty_calls.c"
    command = [COMPILER, "-shared", "-fPIC", "-O1", "-o", target, source, "-ldl"]
    subprocess.run(command, check=True)
    return target


FAULTS = {
    "failing temporaries": ["EIO:below=.:every=3"],
    "failing calls of all kinds": ["EIO:every=41", "EACCES:every=83"],
    "reads that end early": ["EOF:every=53"],
    "too many open files": ["EMFILE:only=open64:every=7"],
    "a file system without locks": ["EPERM:only=flock:lasting=1", "EIO:only=flock:lasting=1"],
    "Ctrl-C while temporaries are at work": ["SIGINT:below=.:every=4"],
}


@pytest.mark.slow
@pytest.mark.parametrize("faults", FAULTS.values(), ids=FAULTS)
def test_faulty_calls_are_reported_and_leave_all_whole(library, faults):
    environment = os.environ | {"LD_PRELOAD": str(library), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, SUPPORT / "faulty_calls.py", *faults]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    outcomes = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(outcomes) == 8 * len(faults)
    assert sum(outcome["calls"] for outcome in outcomes) > 5
    wrong = [(o["scenario"], *told) for o in outcomes for told in o["wrong"]]
    assert not wrong, "\n".join(map(str, wrong))
