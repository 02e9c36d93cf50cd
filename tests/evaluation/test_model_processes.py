"""Several processes that run a model: what they find is what one finds, and how all end."""

from __future__ import annotations

import json
import os
import re
from collections import Counter
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from helpers import listing, save_states
from launching import TORCHRUN, error_of, launch, run_alone
from torch import nn

from ckptavg.evaluation import session

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="starts processes by fork")
CLOSE = 1e-6  # relative, of figures and statistics
NET = '''
import os, signal, time
import torch
import ckptavg.evaluation
from ckptavg.tasks.classification import Classification
from torch import distributed as dist, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset
from torch.utils.data.distributed import DistributedSampler

def model():
    return nn.Sequential(
        nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 6, 3), nn.BatchNorm2d(6),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 4))

def synchronized():
    return nn.SyncBatchNorm.convert_sync_batchnorm(model())

def tight():
    ckptavg.evaluation.session.count_models_that_fit = lambda *_: 2  # models at a time
    return model()

class Images(Dataset):
    """Normal values far from 0, which notes what is read; one of them may do harm."""

    def __init__(self, n=53, seed=0, note="", harm="", at=-1):
        g = torch.Generator().manual_seed(seed)
        self.x = torch.randn(n, 3, 8, 8, generator=g) * 2 + 10
        self.targets = torch.randint(0, 4, (n,), generator=g).tolist()
        self.note, self.harm, self.at = note, harm, at
        self.passes = 0

    def __len__(self):
        return len(self.x)

    def __getitem__(self, i):
        if self.note:
            with open(self.note, "a") as f:
                f.write(f"{i} ")
        self.passes += i == 17
        if i == 17 and self.passes == 2 and os.path.exists("harmful"):
            while not os.path.exists("r.json"):  # which the first process writes about now
                time.sleep(0.01)
            os.remove("harmful")
            os.kill(os.getpid(), signal.SIGINT)
        if i != self.at:
            return self.x[i], self.targets[i]
        if self.harm == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if self.harm == "raise":
            raise OSError("image 17 is\\ndamaged")
        return self.x[i] * float("nan"), self.targets[i]

def shuffled(seed=None, **how):
    g = None if seed is None else torch.Generator().manual_seed(seed)
    return DataLoader(Images(**how), 8, shuffle=True, generator=g)

class Sampled:
    def __init__(self, n):
        self.n = n
    def __len__(self):
        return self.n
    def __iter__(self):
        order = list(range(self.n))
        __import__("random").Random(os.getpid()).shuffle(order)
        return iter(order)

def unseeded(n=53):
    return DataLoader(Images(n), 8, sampler=Sampled(n))

def tensors():
    return DataLoader(Images(), batch_sampler=torch.arange(52).view(13, 4))

def distributed(n=56, **how):
    own = DistributedSampler(range(n), **how) if dist.is_initialized() else None
    return DataLoader(Images(n), 8, sampler=own)

def batches():
    data = Images()
    return [torch.utils.data.default_collate([data[i] for i in range(a, min(a + 8, 53))])
            for a in range(0, 53, 8)]

class Stream(IterableDataset):
    def __iter__(self):
        data = Images()
        return (data[i] for i in range(len(data)))

def line():
    return nn.Linear(3, 2)

def points():
    g = torch.Generator().manual_seed(7)
    return torch.utils.data.TensorDataset(
        torch.randn(47, 3, generator=g), torch.randn(47, 2, generator=g))

class Words(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Embedding(11, 5), nn.Linear(5, 11)
    def forward(self, input_ids):
        return self.last(self.first(input_ids))

class Closed(Classification):
    def scores(self):
        return object()

class Sharded(IterableDataset):
    """Takes its own part, as streams made for several processes do."""

    def __iter__(self):
        data = Images()
        rank, count = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        return (data[i] for i in range(rank, len(data), count))

def nothing():
    return []

def as_json(results):
    return [r.as_json() for r in results]

def statistics(network):
    return [network[1].running_mean.tolist(), network[4].running_var.tolist()]

def library():
    """What the API finds: in a Dataset, shared; in loaders that are each process's own."""
    rank, count = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    whole = batches()
    own = whole[rank::count]
    paths = ["run/epoch_1.pt", "run/epoch_3.pt"]
    shared = ckptavg.evaluate(paths, model(), Images(), batch_size=8)
    parts = ckptavg.evaluate(paths, model(), own)
    found = []
    drawn = {"bn_samples": 20, "seed": 3}
    for data, how in [(Images(), drawn), (own, {}), (own, {"bn_samples": 24})]:
        torch.manual_seed(0)
        network = model()
        ckptavg.update_bn(network, data, batch_size=8, **how)
        found.append(statistics(network))
    wrapped = nn.parallel.DistributedDataParallel if dist.is_initialized() else lambda bare: bare
    torch.manual_seed(0)
    network = model()
    uneven = whole if rank == count // 2 else []  # the first hands buffers round where it has data
    ckptavg.update_bn(wrapped(network), uneven)
    again = ckptavg.evaluate(paths, wrapped(model()), uneven)
    recompute = ckptavg.Recompute(model(), own)
    out = ckptavg.average("run", out="library.pt", overwrite=True, recompute=recompute)
    written = torch.load(out, weights_only=True)["state_dict"]
    averaged = {name: value.tolist() for name, value in written.items() if "running" in name}
    return {"shared": as_json(shared), "parts": as_json(parts), "statistics": found[:2],
            "some": found[2], "wrapped": [as_json(again), statistics(network)],
            "averaged": averaged}
'''
MODEL = ("--model", "net.py:model", "--device", "cpu")
TRAIN = ("--train-data", "net.py:Images", "--train-data-arg", "n=41", "--train-data-arg", "seed=1")
DATA = ("--data", "net.py:Images")
ALL = ("eval", "--run", "run", *MODEL, *TRAIN, "--each", "--compare", "fge", "--json")
EVAL = ("eval", "run/epoch_1.pt", "run/epoch_2.pt", *MODEL, "--json", "--data")


def network() -> nn.Module:
    scope: dict[str, Any] = {}
    exec(NET, scope)
    model: nn.Module = scope["model"]()
    return model


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory with a run of three checkpoints, and factories in net.py."""
    states = []
    for seed in (1, 2, 3):
        torch.manual_seed(seed)
        states.append(network().state_dict())
    save_states(tmp_path / "run", states)
    (tmp_path / "net.py").write_text(NET)
    for name in ("out", "alone"):
        (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path)
    return tmp_path


def close(mine: Any, theirs: Any) -> None:
    """Assert that plain values are the same, figures within rounding."""
    if isinstance(theirs, dict):
        assert mine.keys() == theirs.keys()
        for key in theirs:
            close(mine[key], theirs[key])
    elif isinstance(theirs, list):
        assert len(mine) == len(theirs)
        for one, other in zip(mine, theirs, strict=True):
            close(one, other)
    elif isinstance(theirs, float):
        assert mine == pytest.approx(theirs, rel=CLOSE, abs=1e-9)
    else:
        assert mine == theirs


def only_the_first_speaks(result: list[dict[str, Any]]) -> str:
    """What the processes of a command that succeeded have said."""
    assert [of_one["code"] for of_one in result] == [0] * len(result), result
    assert not any(of_one["out"] or of_one["err"] for of_one in result[1:])
    return str(result[0]["out"])


def all_failed(result: list[dict[str, Any]], message: str) -> None:
    """Assert that what all processes meet is said as one's own error once.

    Others may hear of it before they meet it themselves.
    """
    assert [of_one["code"] for of_one in result] == [1] * len(result), result
    told = [error_of(of_one) for of_one in result if "Error: " in of_one["err"]]
    assert told
    assert [line for line in told if message not in line] == []
    own = [line for line in told if not line.startswith("process ")]
    assert len(own) == len(set(own))


def same_files(home: Path) -> None:
    names = listing(home / "alone")
    assert listing(home / "out") == names
    for name in names:
        mine, theirs = (torch.load(home / place / name) for place in ("out", "alone"))
        assert mine["ckptavg"] == theirs["ckptavg"]
        for key, expected in theirs["state_dict"].items():
            torch.testing.assert_close(mine["state_dict"][key], expected, rtol=CLOSE, atol=0)


WRITERS = (
    ("update-bn", "run/epoch_1.pt", *MODEL, *TRAIN, "-b", "8", "--json", "-o", "{}/bn.pt"),
    ("average", "run", *MODEL, *TRAIN, "-b", "8", "-o", "{}/a.pt", "--also", "b.pt=ema:decay=0.5",
     "--bn-samples", "21:stratified"),
    ("average", "run", *MODEL, *TRAIN, "-b", "30", "-o", "{}/few.pt"),
    ("update-bn", "run/epoch_2.pt", *MODEL, "--model", "net.py:synchronized", *TRAIN, "-b", "6",
     "-o", "{}/synchronized.pt"),
)  # fmt: skip


def placed(command: tuple[str, ...], place: str) -> list[str]:
    return [arg.format(place) for arg in command]


@pytest.mark.slow
def test_torchrun_matches_one_process(home: Path) -> None:
    evaluation = [*ALL, *DATA, "-b", "8", "--results", "{}.json"]
    commands = [placed((*evaluation,), "out"), *(placed(c, "out") for c in WRITERS)]
    worse = [*ALL[:-1], *DATA, "--fail-if-worse", "--results", "worse.json"]
    planned = [{"args": args} for args in commands] + [{"call": "net.py:library"}]
    expected = json.loads(run_alone(*placed((*evaluation,), "alone")))
    for command in WRITERS:
        run_alone(*placed(command, "alone"))
    scope: dict[str, Any] = {}
    exec(NET, scope)
    library = scope["library"]()

    found = launch(
        "three", [*planned, {"args": worse}], *TORCHRUN, "--standalone", "--nproc-per-node=3",
        count=3,
    )  # fmt: skip
    *good, called, compared = found
    said = [only_the_first_speaks(result) for result in good]
    close(json.loads(said[0]), expected)
    assert [c["bn"] for c in expected["candidates"]][-3:] == ["stale", "recomputed", "own"]
    close(json.loads(Path("out.json").read_text()), expected)
    close(json.loads(Path("alone.json").read_text()), expected)
    assert json.loads(said[1])["samples"] == 41
    same_files(home)

    for of_one in called:
        assert of_one["value"]["some"] == called[0]["value"]["some"]
        for key in ("shared", "parts", "statistics", "wrapped", "averaged"):
            close(of_one["value"][key], library[key])

    assert [of_one["code"] for of_one in compared] == [compared[0]["code"]] * 3
    assert compared[0]["code"] in (0, 3)
    assert len(json.loads(Path("worse.json").read_text())["candidates"]) == len(
        expected["candidates"]
    )


LOADERS = {
    "net.py:shuffled": ["--data-arg", "seed=4"],
    "net.py:batches": [],
    "net.py:Stream": ["-b", "8"],
    "net.py:distributed": [],
    "net.py:tensors": [],
}


@pytest.mark.slow
def test_data_sources_count_each_sample_once(home: Path) -> None:
    commands = [[*EVAL, name, *args] for name, args in LOADERS.items()]
    commands.append([*EVAL, "net.py:shuffled"])
    commands.append([*EVAL, "net.py:Images", "-b", "30", "-j", "1", "--data-arg", "note=seen"])
    expected = [json.loads(run_alone(*args)) for args in commands]
    Path("seen").unlink()
    found = launch("any", [{"args": args} for args in commands], count=4)
    for result, theirs in zip(found, expected, strict=True):
        mine = json.loads(only_the_first_speaks(result))
        for one, other in zip(mine["candidates"], theirs["candidates"], strict=True):
            close(one["metrics"], other["metrics"])
    assert Counter(Path("seen").read_text().split()) == {str(i): 1 for i in range(53)}


TASKS = {
    "regression": ("line", ["net.py:line", "--data", "net.py:points"]),
    "causal-lm": ("words", ["net.py:Words", "--data", "tokens:ids.npy", "--data-arg",
                            "length=7"]),
    "image-classification": ("run", [*MODEL[1:], *DATA]),
}  # fmt: skip


@pytest.mark.slow
def test_tasks_match_one_process(home: Path) -> None:
    scope: dict[str, Any] = {}
    exec(NET, scope)
    for name, factory in [("line", "line"), ("words", "Words")]:
        save_states(home / name, [scope[factory]().state_dict() for _ in range(3)])
    numpy.save("ids.npy", numpy.random.default_rng(0).integers(0, 11, 400))
    commands = [
        ["eval", "--run", run, "--task", task, "--each", "--compare", "fge", "--json", "-b", size,
         "--device", "cpu", "--model", *args]
        for size, (task, (run, args)) in zip(("5", "30", "30"), TASKS.items(), strict=True)
    ]  # fmt: skip
    expected = [json.loads(run_alone(*args)) for args in commands]
    found = launch("tasks", [{"args": args} for args in commands], count=4)
    for result, theirs in zip(found, expected, strict=True):
        close(json.loads(only_the_first_speaks(result)), theirs)
        assert [("versus" in c) for c in theirs["candidates"]] == [True, True, False, True, True]


@pytest.mark.slow
def test_bn_samples_are_the_same_in_several_processes(home: Path) -> None:
    command = ["update-bn", "run/epoch_1.pt", *MODEL, *TRAIN, "-b", "4", "--bn-samples"]
    commands = []
    for place in ("alone", "out"):
        for how in ("20", "21:stratified"):
            note = ["--train-data-arg", f"note={place}/{how}"]
            commands.append([*command, how, *note, "-o", f"{place}/{how}.pt"])
    for args in commands[:2]:
        run_alone(*args)
    launch("few", [{"args": args} for args in commands[2:]], count=2)
    drawn = {
        name: Counter(Path(name).read_text().split())
        for name in ("alone/20", "out/20", "alone/21:stratified", "out/21:stratified")
    }
    assert drawn["alone/20"] == drawn["out/20"]
    assert drawn["alone/21:stratified"] == drawn["out/21:stratified"]
    for name, samples in drawn.items():
        assert set(samples.values()) == {1}
        assert len(samples) == int(name.partition("/")[2][:2])
    scope: dict[str, Any] = {}
    exec(NET, scope)
    targets = scope["Images"](41, 1).targets
    share = Counter(targets[int(i)] for i in drawn["out/21:stratified"])
    for label, size in Counter(targets).items():
        assert abs(share[label] - 21 * size / 41) < 1


@pytest.mark.slow
def test_loaders_that_cannot_be_shared_are_errors(home: Path) -> None:
    distributed = [*EVAL, "net.py:distributed"]
    commands = [
        [*distributed, "--data-arg", "n=53"],
        [*distributed, "--data-arg", "num_replicas=2", "--data-arg", "rank=0"],
        [*EVAL, "net.py:unseeded"],
        [*EVAL, "net.py:Sharded"],
        [*EVAL, "net.py:nothing"],
        [*EVAL, "net.py:Images", "--task", "net.py:Closed"],
        ["update-bn", "run/epoch_1.pt", *MODEL, "--train-data", "net.py:nothing", "-o", "o.pt"],
    ]
    found = launch("apart", [{"args": args} for args in commands], count=3)
    messages = [
        "the data loader's DistributedSampler repeats samples",
        "DistributedSampler is for 2 processes, but 3 share the data",
        "the data loader draws different batches in each process",
        "the data loader draws different batches in each process",
        "the evaluation data is empty",
        "the scores of Closed have no state and no merge",
        "the training data is empty",
    ]
    for result, message in zip(found, messages, strict=True):
        all_failed(result, message)
        assert not any(of_one["out"] for of_one in result)
    assert "o.pt" not in listing(home)


@pytest.mark.slow
def test_process_failure_ends_all_and_writes_nothing(home: Path) -> None:
    average = ["average", "run", *MODEL, "-b", "2", "-o", "out/a.pt"]
    commands = []
    for harm in ("kill", "raise", "nan"):
        args = ["n=53", f"harm={harm}", "at=17"]
        of_data = [word for arg in args for word in ("--data-arg", arg)]
        of_training = [word for arg in args for word in ("--train-data-arg", arg)]
        train = ["--train-data", "net.py:Images"]
        commands += [
            [*EVAL, "net.py:Images", *of_data, "-b", "2", "--results", "out/r.json"],
            [*average, *train, *of_training],
        ]
    commands.append([*commands[2], "-j", "1"])
    started_all = launch("harmed", [{"args": args} for args in commands], count=3)
    killed, broken, not_finite = started_all[:2], started_all[2:4], started_all[4:6]
    for result in killed:
        assert result.count(None) == 1
        for of_one in filter(None, result):
            assert "has died without a message: its own output may say why" in error_of(of_one)
    for result in [*broken, started_all[6]]:
        said = [error_of(of_one) for of_one in result]
        assert all("OSError: image 17 is" in line and "Traceback" not in line for line in said)
        assert sum(line.startswith("process ") for line in said) == 2
    evaluated, averaged = not_finite
    said = [error_of(of_one) for of_one in evaluated]
    assert all("run/epoch_1.pt: the outputs are not finite" in line for line in said)
    all_failed(averaged, "are not finite")
    assert [name for name in listing(home / "out") if not name.startswith(".a.pt.")] == []


@pytest.mark.slow
def test_resume_after_an_interrupt_in_several_processes(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        session, "count_models_that_fit", session.count_models_that_fit
    )  # which the model's factory changes
    command = [*ALL, *DATA, "--model", "net.py:tight", "-b", "8", "--results"]
    expected = json.loads(run_alone(*command, "alone/r.json"))
    Path("harmful").touch()
    interrupted, resumed = launch(
        "again", [{"args": [*command, "r.json"]}, {"args": [*command, "r.json", "--resume"]}],
        count=3,
    )  # fmt: skip
    (cause,) = (rank for rank, of_one in enumerate(interrupted) if of_one["code"] == 130)
    for rank, of_one in enumerate(interrupted):
        if rank != cause:
            assert error_of(of_one) == f"process {cause} was interrupted"
    close(json.loads(only_the_first_speaks(resumed)), expected)
    close(json.loads(Path("r.json").read_text()), expected)
    kept = re.search(r"(\d) of 6 candidates are in r.json", resumed[0]["err"])
    assert kept is not None
    assert 2 <= int(kept[1]) < 6
