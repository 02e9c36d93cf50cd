"""Kill averages at random moments, look at what is on the disk, and let the next run clear it.

    python tests/support/kills.py --kills 200 [--signal INT|TERM]

Each run is a child of this process, which has imported torch and started no thread. The moments are
drawn evenly over the time that a run takes, which varies with the disk: a kill that comes too late
makes it shorter by a tenth, any other longer by a fiftieth. Prints, for each kind of output, how
many kills came before the temporary was there, while it was written, and after the output was in
its place; ends with an error as soon as anything is found that should not be. After another signal
than KILL, nothing may be left for the next run.
"""

from __future__ import annotations

import argparse
import filecmp
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"  # torch must have no threads of its own when children start

import torch
from safetensors.torch import load_file, save_file

from ckptavg import average, open_run
from ckptavg.cli.signals import unwind_on_signals
from ckptavg.io.atomic import Publication

BEFORE, WRITING, AFTER = "before the temporary", "during the write", "after publication"
MARKS = (".ckptavg-tmp", ".ckptavg-old")
SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
Check = Callable[[bool, str], None]


class Scenario:
    """One kind of output, made again and again in a directory of its own.

    Args:
        home: The directory; ``run`` in it is averaged.
        name: Of the output.
        overwrite: Whether an older average is there before.
    """

    def __init__(self, home: Path, name: str, *, overwrite: bool) -> None:
        self.home, self.overwrite = home, overwrite
        self.place = home / "place"
        self.out = self.place / name
        self.text = f"{'overwriting' if overwrite else 'a new'} {name}"
        self.found: Counter[str] = Counter()
        self.place.mkdir()

    def average(self, run: str = "run") -> None:
        """What is going to be killed."""
        average(open_run(self.home / run), out=self.out, overwrite=self.overwrite)

    def measure(self) -> None:
        """Make the outputs to compare with, and time an undisturbed run."""
        if self.overwrite:
            in_child(lambda: self.average("old run"))
            self.out.rename(self.home / "old")
        self.reset()
        in_child(self.average)
        self.out.rename(self.home / "new")
        check_values(self.home)
        self.reset()
        start = time.monotonic()
        in_child(self.average)
        self.span = time.monotonic() - start

    def reset(self) -> None:
        """Put the place into the state before a run."""
        shutil.rmtree(self.place)
        self.place.mkdir()
        old = self.home / "old"
        if old.is_dir():
            shutil.copytree(old, self.out)
        elif old.exists():
            shutil.copy(old, self.out)

    def kill(self, delay: float, number: signal.Signals) -> None:
        """Run once, kill it after so many seconds, and look at what there is."""
        self.reset()
        child = start_child(self.average)
        time.sleep(delay)
        os.kill(child, number)
        os.waitpid(child, 0)
        state, left = self.state(), self.left()
        require(state != "torn", f"{self.text}: the output is torn after {delay:.4f} s")
        before = "old" if self.overwrite else "absent"
        require(state in ("new", before), f"{self.text}: the output is {state}, not {before}")
        moment = AFTER if state == "new" else WRITING if left else BEFORE
        self.found[moment] += 1
        self.span *= 0.9 if moment == AFTER else 1.02
        self.found["leftovers"] += bool(left)
        clean = number == signal.SIGKILL or not left
        require(clean, f"{self.text}: {left} after {number.name}")

    def follow(self, *, whole: bool) -> None:
        """The next run, or its beginning and no more, which must clear what is left."""
        state = self.state()
        if whole:
            self.overwrite, before = True, self.overwrite
            in_child(self.average)
            self.overwrite, state = before, "new"
        else:
            with Publication(self.out, directory=self.out.is_dir(), overwrite=True):
                pass
        require(not self.left(), f"{self.text}: the next run left {self.left()}")
        require(self.state() == state, f"{self.text}: {self.state()} after the next run")

    def left(self) -> list[str]:
        """Whatever is beside the output."""
        beside = [path.name for path in self.place.iterdir() if path != self.out]
        strange = [name for name in beside if not name.endswith(MARKS)]
        require(not strange, f"{self.text}: {strange} beside the output")
        return beside

    def state(self) -> str:
        """``absent``, ``old`` or ``new``, each byte for byte; else ``torn``."""
        if not os.path.lexists(self.out):
            return "absent"
        known = (name for name in ("old", "new") if (self.home / name).exists())
        return next((name for name in known if same(self.out, self.home / name)), "torn")


def same(one: Path, other: Path) -> bool:
    """Whether two files, or two flat directories, hold the same bytes."""
    if one.is_dir() != other.is_dir():
        return False
    if not one.is_dir():
        return filecmp.cmp(one, other, shallow=False)
    names = sorted(os.listdir(one))
    return names == sorted(os.listdir(other)) and all(
        filecmp.cmp(one / name, other / name, shallow=False) for name in names
    )


def require(true: bool, otherwise: str) -> None:
    """End with an error unless something holds."""
    if not true:
        sys.exit(otherwise)


def start_child(work: Callable[[], None]) -> int:
    """Start some work in a child of this process."""
    child = os.fork()
    if child:
        return child
    try:
        with unwind_on_signals():
            work()
    except KeyboardInterrupt:
        os._exit(130)
    except BaseException as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
        os._exit(1)
    os._exit(0)


def in_child(work: Callable[[], None]) -> None:
    """Do some work in a child of this process, to its end."""
    require(os.waitpid(start_child(work), 0)[1] == 0, "an undisturbed run failed")


def check_values(home: Path) -> None:
    """Compare the average that the others are compared with to one computed by torch."""
    new = home / "new"
    if new.is_dir():
        found = {k: v for name in SHARDS for k, v in load_file(new / name).items()}
    elif zipped(new):
        found = torch.load(new, weights_only=True)["state_dict"]
    else:
        found = load_file(new)
    states = [read(path) for path in sorted((home / "run").iterdir())]
    for name, tensor in found.items():
        mean = sum(state[name].double() for state in states) / len(states)
        require(torch.equal(tensor, mean.float()), f"{name} is no average")
    require(set(found) == set(states[0]), "tensors are missing")


def zipped(path: Path) -> bool:
    """Whether a file is one of ``torch.save``."""
    with open(path, "rb") as file:
        return file.read(2) == b"PK"


def read(path: Path) -> dict[str, torch.Tensor]:
    """The weights of a checkpoint of ours."""
    if path.is_dir():
        return {k: v for name in SHARDS for k, v in load_file(path / name).items()}
    return torch.load(path, weights_only=True) if zipped(path) else load_file(path)


def make_run(directory: Path, suffix: str, megabytes: float, seed: int) -> None:
    """Two checkpoints of two tensors, of so many megabytes each."""
    directory.mkdir(parents=True)
    generator = torch.Generator().manual_seed(seed)
    numel = int(megabytes * 1e6 / 8)
    for step in (1, 2):
        state = {name: torch.randn(numel, generator=generator) for name in ("a", "b")}
        path = directory / f"checkpoint-{step}{suffix}"
        if suffix == ".pt":
            torch.save(state, path)
        elif suffix:
            save_file(state, path)
        else:
            make_model(path, state)


def make_model(path: Path, state: dict[str, torch.Tensor]) -> None:
    """A Hugging Face directory of two shards."""
    path.mkdir()
    shards = dict(zip(SHARDS, state.items(), strict=True))
    for shard, (name, tensor) in shards.items():
        save_file({name: tensor}, path / shard, metadata={"format": "pt"})
    weight_map = {name: shard for shard, (name, _) in shards.items()}
    index = {"metadata": {}, "weight_map": weight_map}
    (path / "model.safetensors.index.json").write_text(json.dumps(index))
    (path / "config.json").write_text("{}")


def scenarios(home: Path, megabytes: float) -> list[Scenario]:
    """A new file of each kind, a file replaced, a sharded directory replaced."""
    kinds = [("swa.safetensors", False), ("swa.pt", False), ("swa.safetensors", True)]
    found = []
    for i, (name, overwrite) in enumerate([*kinds, ("swa", True), ("swa", False)]):
        place = home / str(i)
        for run, seed in (("run", 1), ("old run", 2)):
            make_run(place / run, Path(name).suffix, megabytes, seed)
        found.append(Scenario(place, name, overwrite=overwrite))
    return found


def main() -> None:
    """Kill, and print what was found."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--megabytes", type=float, default=16, help="of each checkpoint")
    parser.add_argument("--whole", type=int, default=5, help="every Nth next run goes to its end")
    parser.add_argument("--dir", type=Path, help="where to work; on the disk that matters")
    parser.add_argument("--signal", choices=["KILL", "INT", "TERM"], default="KILL")
    given = parser.parse_args()
    number = signal.Signals[f"SIG{given.signal}"]
    with tempfile.TemporaryDirectory(dir=given.dir) as directory:
        kinds = scenarios(Path(directory), given.megabytes)
        for scenario in kinds:
            scenario.measure()
        moments = random.Random(given.seed)
        for i in range(given.kills):
            scenario = kinds[i % len(kinds)]
            scenario.kill(moments.uniform(0, scenario.span), number)
            scenario.follow(whole=(i // len(kinds)) % given.whole == 0)
        report(kinds)


def report(kinds: list[Scenario]) -> None:
    """Print the figures."""
    moments, total = (BEFORE, WRITING, AFTER), sum((s.found for s in kinds), Counter())
    kills = sum(total[moment] for moment in moments)
    for scenario in kinds:
        counts = ", ".join(f"{scenario.found[moment]} {moment}" for moment in moments)
        print(f"{scenario.text} (in {scenario.span:.3f} s): {counts}")
    shares = ", ".join(f"{total[moment] / kills:.0%} {moment}" for moment in moments)
    print(f"{kills} kills: {shares}; {total['leftovers']} left something, all cleared; none torn")


if __name__ == "__main__":
    main()
