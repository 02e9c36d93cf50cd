"""Commands whose system calls fail, one after another, and what is wrong then.

    cc -shared -fPIC -O1 -o faulty_calls.so tests/support/faulty_calls.c -ldl
    LD_PRELOAD=./faulty_calls.so python tests/support/faulty_calls.py FAULT... [--of SCENARIO]

A FAULT is an error's name, SIGINT, or EOF for reads that end early, and what it is about:
``EIO``, ``EIO:every=10`` (each tenth call), ``EIO:below=.`` (calls about hidden files, which
temporaries are), ``EPERM:only=flock:lasting=1`` (calls of one name, and all later ones as well).

All in this one process: for each scenario, the first call about a file of its directory fails, then
the second of a new run, and so on until a run has no such call. Prints a line of JSON for each
fault of a scenario: how many calls failed, and each outcome that breaks a promise: another exit
code, a line without the path or with a traceback, an output that is torn, or something left.
"""

from __future__ import annotations

import argparse
import ctypes
import errno
import json
import os
import shutil
import signal
import tempfile
import warnings
from dataclasses import dataclass
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"

import torch
import torch.distributed.checkpoint as dcp
from click.testing import CliRunner, Result
from helpers import listing
from safetensors.torch import save_file

from ckptavg.cli import main

MODEL = """
import torch
def model():
    return torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4))
def data():
    generator = torch.Generator().manual_seed(0)
    samples = [(torch.randn(3, generator=generator), i % 4) for i in range(8)]
    return torch.utils.data.DataLoader(samples, batch_size=4)
"""
NUMBERS = {"SIGINT": -1, "EOF": -2}


@dataclass(frozen=True)
class Scenario:
    """A command and its output.

    Attributes:
        name: What it is called.
        command: Its arguments; DIR stands for the directory of the run, CODE for the model's file.
        outputs: What it writes, below the directory.
        old: Whether an older output is there before.
    """

    name: str
    command: str
    outputs: tuple[str, ...]
    old: bool = False


STATISTICS = "--model CODE:model --train-data CODE:data"
SCENARIOS = [
    Scenario("file", "average DIR/files -o DIR/out.safetensors", ("out.safetensors",)),
    Scenario("torch", "average DIR/files --overwrite -o DIR/out.pt", ("out.pt",), old=True),
    Scenario("directory", "average DIR/models -o DIR/out", ("out",)),
    Scenario("replaced", "average DIR/models --overwrite -o DIR/out", ("out",), old=True),
    Scenario("sharded", "average DIR/sharded -o DIR/out.safetensors", ("out.safetensors",)),
    Scenario("distributed", "average DIR/distributed -o DIR/out.pt", ("out.pt",)),
    Scenario("update-bn", f"update-bn DIR/files/epoch_1.pt {STATISTICS} -o DIR/out.pt",
             ("out.pt",)),
    Scenario("eval", "eval --run DIR/files --model CODE:model --data CODE:data "
             "--results DIR/scores.json", ("scores.json",)),
]  # fmt: skip


@dataclass(frozen=True)
class Fault:
    """How calls fail.

    Attributes:
        name: Of the error; or SIGINT, or EOF.
        every: Each so many calls fails.
        below: What the paths below the directory begin with.
        only: Name of the calls; of any where empty.
        lasting: Whether later calls of the same name fail, too.
    """

    name: str
    every: int = 1
    below: str = ""
    only: str = ""
    lasting: bool = False

    @property
    def number(self) -> int:
        """The error's number, or what the library has in place of one."""
        return NUMBERS.get(self.name) or getattr(errno, self.name)

    @classmethod
    def parse(cls, text: str) -> Fault:
        """Read ``NAME[:key=value]...``."""
        name, *settings = text.split(":")
        given = dict(setting.split("=") for setting in settings)
        return cls(
            name,
            int(given.get("every", 1)),
            given.get("below", ""),
            given.get("only", ""),
            "lasting" in given,
        )


class Calls:
    """The preloaded library."""

    def __init__(self) -> None:
        self._library = ctypes.CDLL(None)
        self._library.faulty_failure.restype = ctypes.c_char_p

    def arm(self, directory: Path, fault: Fault, call: int) -> None:
        """Let a call about what is below a directory fail."""
        beginning = f"{directory}/{fault.below}".rstrip("/")
        self._library.faulty_arm(
            os.fsencode(beginning), fault.only.encode(), call, fault.number, int(fault.lasting)
        )

    def disarm(self) -> str:
        """The call that failed, and its path; empty if none did."""
        self._library.faulty_disarm()
        return self._library.faulty_failure().decode()


def make_inputs(home: Path) -> None:
    """Two checkpoints in each of some layouts."""
    generator = torch.Generator().manual_seed(0)
    scope: dict[str, object] = {}
    exec(MODEL, scope)
    (home / "code.py").write_text(MODEL)
    (home / "place" / "files").mkdir(parents=True)
    for step in (1, 2):
        state = scope["model"]().state_dict()
        state["0.weight"] = torch.randn(4, 3, generator=generator)
        torch.save(state, home / "place" / "files" / f"epoch_{step}.pt")
        model = home / "place" / "models" / f"checkpoint-{step}"
        model.mkdir(parents=True)
        save_file(state, model / "model.safetensors", metadata={"format": "pt"})
        (model / "config.json").write_text('{"model_type": "toy"}')
        (model / "trainer_state.json").write_text(json.dumps({"global_step": step}))
        make_shards(home / "place" / "sharded" / f"checkpoint-{step}", state)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a process that saves alone
            dcp.save({"model": state}, checkpoint_id=home / "place" / "distributed" / f"step{step}")


def make_shards(path: Path, state: dict[str, torch.Tensor]) -> None:
    """A Hugging Face directory with a shard for each tensor."""
    path.mkdir(parents=True)
    weight_map = {}
    for i, (name, tensor) in enumerate(state.items(), 1):
        weight_map[name] = f"model-{i:05d}-of-{len(state):05d}.safetensors"
        save_file({name: tensor}, path / weight_map[name])
    index = {"metadata": {}, "weight_map": weight_map}
    (path / "model.safetensors.index.json").write_text(json.dumps(index))


def invoke(home: Path, scenario: Scenario, *options: str) -> Result:
    """Run a scenario's command."""
    words = scenario.command.replace("DIR", str(home / "place"))
    words = words.replace("CODE", str(home / "code.py"))
    return CliRunner().invoke(main, [*words.split(), *options])


def snapshot(place: Path) -> dict[str, bytes]:
    """What is below a directory but the inputs."""
    inputs = ("files", "models", "sharded", "distributed")
    return {
        name: (place / name).read_bytes() if (place / name).is_file() else b""
        for name in listing(place)
        if name.split("/")[0] not in inputs
    }


def reset(place: Path, before: dict[str, bytes]) -> None:
    """Put back what stood beside the inputs."""
    for name in snapshot(place):
        path = place / name
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        elif os.path.lexists(path):
            path.unlink()
    for name, content in before.items():
        (place / name).parent.mkdir(exist_ok=True)
        if content:
            (place / name).write_bytes(content)


def complaint(
    result: Result, home: Path, before: dict[str, bytes], after: dict[str, bytes], fault: Fault
) -> str:
    """The promise that an outcome breaks; empty if it breaks none."""
    now, said = snapshot(home / "place"), result.stderr.strip()
    last = said.splitlines()[-1] if said else ""
    if now not in (before, after):
        names = sorted(set(now) ^ set(after)) or "the output's bytes"
        return f"left: {names}"
    if fault.name == "SIGINT":
        truth = "nothing was written" if now == before else "had been written"
        return "" if result.exit_code == 130 and truth in last else "not 130, or untrue"
    if result.exit_code == 0:
        return "" if now == after else "exit 0 without the output"
    if result.exit_code != 1:
        return "neither exit 0 nor 1"
    if "Traceback" in said or "--debug" in said or len(said.split("Error: ")) != 2:
        return "raw"
    if str(home / "place") not in last:
        return "no path"
    if not last.endswith(".") or ". " not in last:
        return "no remedy"
    denied = now == after != before and "cannot be written" in last
    return "it is denied that the output is there" if denied else ""


def run(home: Path, scenario: Scenario, fault: Fault, calls: Calls) -> dict[str, object]:
    """Fail calls of a scenario in turn: how many failed, and what is wrong."""
    place, before = home / "place", {}
    reset(place, before)
    if scenario.old:
        invoke(home, scenario, "--last", "1")
        before = snapshot(place)
    expected = invoke(home, scenario)
    assert expected.exit_code == 0, expected.output
    after, wrong, count, call = snapshot(place), [], 0, 1
    while True:
        reset(place, before)
        calls.arm(place, fault, call)
        try:
            result = invoke(home, scenario)
        finally:
            failed = calls.disarm()
        if not failed:
            return {"scenario": scenario.name, "calls": count, "wrong": wrong}
        count, call = count + 1, call + fault.every
        if complained := complaint(result, home, before, after, fault):
            said = [line for line in result.stderr.splitlines() if not line.startswith("note")]
            failed = failed.replace(str(home), "")
            wrong.append([complained, result.exit_code, failed, *said])


def fail_calls() -> None:
    """Fail what was asked for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("faults", nargs="+", type=Fault.parse, metavar="FAULT")
    parser.add_argument("--of", action="append", metavar="SCENARIO")
    given = parser.parse_args()
    signal.signal(signal.SIGINT, signal.default_int_handler)
    calls = Calls()
    with tempfile.TemporaryDirectory() as directory:
        home = Path(directory).resolve()
        make_inputs(home)
        for fault in given.faults:
            for scenario in SCENARIOS:
                if not given.of or scenario.name in given.of:
                    print(json.dumps(run(home, scenario, fault, calls)), flush=True)


if __name__ == "__main__":
    fail_calls()
