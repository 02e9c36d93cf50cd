"""``ckptavg eval``: what it goes on from, a user's own task, how much data, and Ctrl-C."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result
from helpers import listing, save_states
from selecting import first_only
from torch import nn

from ckptavg.cli import main
from ckptavg.evaluation import session
from ckptavg.evaluation.resume import ResultStore
from ckptavg.specs import sources

NET = """
import os, pathlib, time
import torch
from torch import nn

def model(classes=3):
    return nn.Sequential(nn.Flatten(), nn.Linear(8, 4), nn.BatchNorm1d(4), nn.Linear(4, classes))

def data(n=40, seed=0, how=None):
    g = torch.Generator().manual_seed(seed)
    found = torch.utils.data.TensorDataset(
        torch.randn(n, 8, generator=g), torch.randint(0, 3, (n,), generator=g))
    return found

def splits():
    return {"train": data(), "val": data(20, seed=1)}

def labelled():
    found = data()
    found.targets = found.tensors[1].tolist()
    return found

def batches():
    return list(torch.utils.data.DataLoader(data(), 10))

class Slow(torch.utils.data.Dataset):
    def __len__(self):
        return 1000
    def __getitem__(self, i):
        pathlib.Path("workers", str(os.getpid())).touch()
        time.sleep(0.05)
        return torch.zeros(8), 0

class Damaged(Slow):
    def __getitem__(self, i):
        raise OSError("image 17 is damaged")
"""
TASKS = """
import torch
from ckptavg.tasks.classification import Classification
from ckptavg.tasks.base import Metric, Task

class Confusion:
    def __init__(self):
        self.n, self.found = 0, torch.zeros(3, 3, dtype=torch.float64)

    def update(self, predictions, targets):
        pairs = 3 * targets.flatten() + predictions.argmax(1).flatten()
        self.found += torch.bincount(pairs, minlength=9).view(3, 3)
        self.n += len(targets)

    def compute(self):
        hit, union = self.found.diag(), self.found.sum(0) + self.found.sum(1) - self.found.diag()
        wrong = 1 - hit.sum() / self.found.sum()
        return {"miou": float((hit / union).mean()), "wrong": float(wrong), "n": self.n}

    def state(self):
        return [self.n, self.found.tolist()]

    def merge(self, state):
        self.n, self.found = self.n + state[0], self.found + torch.tensor(state[1])

class Segmentation(Task):
    metrics = (Metric("miou", "mIoU", ".4f", True), Metric("wrong", "wrong %", ".2%", False))

    def predict(self, outputs, targets):
        return outputs.double().softmax(1)

    def scores(self):
        return Confusion()

class Errors(Segmentation):
    metrics = Segmentation.metrics[::-1]

class Unranked(Segmentation):
    metrics = (Metric("miou", "mIoU", ".4f", None),)

class Forgetful(Segmentation):
    metrics = (Metric("dice", "Dice", ".4f", True),)

class Transposed(Classification):
    def forward(self, model, inputs):
        return model(inputs.flip(1))

class Empty(Task):
    pass

class Nowhere(Confusion):
    def compute(self):
        return super().compute() | {"miou": float("nan")}

class Undefined(Segmentation):
    scores = Nowhere

class Half(Segmentation):
    scores = Task.scores

class Other:
    pass

def pixels(classes=3):
    return torch.nn.Conv2d(2, classes, 1)

def masks(n=7):
    g = torch.Generator().manual_seed(5)
    return torch.utils.data.TensorDataset(
        torch.randn(n, 2, 6, 5, generator=g), torch.randint(0, 3, (n, 6, 5), generator=g))
"""
MODEL = ("--model", "net.py:model", "--device", "cpu")
DATA = ("--data", "net.py:data")
TRAIN = ("--train-data", "net.py:data", "--train-data-arg", "seed=1")
ALL = ("eval", "--run", "run", *MODEL, *DATA, *TRAIN, "--each", "--compare", "fge")
PIXELS = ("--model", "own.py:pixels", "--device", "cpu", "--data", "own.py:masks")


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory with a run of four checkpoints, factories in net.py, tasks in own.py."""
    (tmp_path / "net.py").write_text(NET)
    (tmp_path / "own.py").write_text(TASKS)
    states, images = [], []
    for seed in range(1, 5):
        torch.manual_seed(seed)
        layers = (nn.Flatten(), nn.Linear(8, 4), nn.BatchNorm1d(4), nn.Linear(4, 3))
        states.append(nn.Sequential(*layers).state_dict())
        images.append(nn.Conv2d(2, 3, 1).state_dict())
    save_states(tmp_path / "run", states)
    save_states(tmp_path / "images", images)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def ckptavg(*args: object) -> Result:
    return CliRunner().invoke(main, [str(arg) for arg in args])


def found(*args: object) -> list[dict[str, Any]]:
    result = ckptavg(*args, "--json")
    assert result.exit_code == 0, result.output
    candidates: list[dict[str, Any]] = json.loads(result.stdout)["candidates"]
    return candidates


def error(result: Result, code: int = 1) -> str:
    """The error of a failed command, which is a single line."""
    assert result.exit_code == code, result.output
    line = result.stderr.strip().splitlines()[-1]
    assert line.startswith("Error: ")
    assert "Traceback" not in result.output
    return line


@pytest.fixture
def scored(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the candidates that were scored, as they come."""
    names: list[str] = []
    score = session.score

    def noted(candidates: Any, *args: Any, **options: Any) -> Any:
        names.extend(f"{c.name}{' anew' * c.recompute}" for c in candidates)
        return score(candidates, *args, **options)

    monkeypatch.setattr(session, "score", noted)
    return names


@pytest.fixture
def one_a_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory for a single model."""
    monkeypatch.setattr(session, "count_models_that_fit", lambda *_: 1)


def interrupt_after(monkeypatch: pytest.MonkeyPatch, passes: int) -> None:
    """Ctrl-C once the results of so many passes are in the file."""
    save, saved = ResultStore.save, []

    def interrupted(self: ResultStore, results: Any) -> int:
        others = save(self, results)
        saved.append(results)
        if len(saved) == passes:
            raise KeyboardInterrupt
        return others

    monkeypatch.setattr(ResultStore, "save", interrupted)


# Going on


@pytest.mark.usefixtures("one_a_pass")
@pytest.mark.parametrize("passes", [1, 2, 5])
def test_resume_completes_an_interrupted_evaluation(
    home: Path, monkeypatch: pytest.MonkeyPatch, scored: list[str], passes: int
) -> None:
    whole = ckptavg(*ALL, "--results", "whole.json")
    names, every = [c["name"] for c in json.loads(Path("whole.json").read_text())["candidates"]], 7
    assert len(scored) == len(names) == every
    with monkeypatch.context() as patched:
        interrupt_after(patched, passes)
        result = ckptavg(*ALL, "--results", "r.json")
    assert result.exit_code == 130
    assert result.stderr.splitlines()[-1] == "Interrupted: r.json had been written."
    held = json.loads(Path("r.json").read_text())["candidates"]
    complete = json.loads(Path("whole.json").read_text())["candidates"]
    assert held == [c for c in complete if c in held]
    assert "epoch_4.pt (last)" in [c["name"] for c in held]
    scored.clear()
    resumed = ckptavg(*ALL, "--results", "r.json", "--resume")
    assert resumed.stdout == whole.stdout
    assert Path("r.json").read_bytes() == Path("whole.json").read_bytes()
    assert f"{len(held)} of {every} candidates are in r.json" in resumed.stderr
    assert len(scored) == every - len(held) + 1  # the others are compared with the last
    assert [name for name in listing(home) if "tmp" in name] == []


def test_resume_of_complete_results_builds_no_model(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = ckptavg(*ALL, "--results", "r.json", "--fail-if-worse")
    monkeypatch.setattr(sources, "make_model", None)
    monkeypatch.setattr(sources, "make_data", None)
    again = ckptavg(*ALL, "--results", "r.json", "--resume", "--fail-if-worse")
    assert (again.exit_code, again.stdout) == (whole.exit_code, whole.stdout)
    assert "7 of 7 candidates are in r.json" in again.stderr


def test_resume_keeps_repeated_candidates_of_a_run(home: Path) -> None:
    twice = (*ALL, "run/epoch_4.pt", "run/epoch_3.pt")
    whole = ckptavg(*twice, "--results", "r.json")
    again = ckptavg(*twice, "--results", "r.json", "--resume")
    assert again.stdout == whole.stdout
    assert "9 of 9 candidates are in r.json" in again.stderr


@pytest.mark.parametrize(
    ("data", "training", "is_told"),
    [
        (["net.py:data"], ["net.py:data"], True),
        (["net.py:data"], ["net.py:data", "seed=1"], False),
        (["net.py:data"], ["net.py:labelled"], False),
        (["net.py:splits"], ["net.py:splits"], False),
        (["net.py:data", "n=20"], ["net.py:data", "n=20"], True),
    ],
    ids=["same", "other argument", "other function", "splits", "same arguments"],
)
def test_eval_warns_of_scores_on_training_data(
    home: Path, data: list[str], training: list[str], is_told: bool
) -> None:
    flags = ["--data", data[0], *(f"--data-arg={pair}" for pair in data[1:])]
    flags += ["--train-data", training[0], *(f"--train-data-arg={p}" for p in training[1:])]
    done = ckptavg("eval", "--run", "run", *MODEL, *flags)
    assert done.exit_code == 0, done.stderr
    assert ("warning: --data and --train-data name the same" in done.stderr) is is_told


AVERAGES = ["average of 4 (uniform)", "average of 4 (uniform) anew"]
EVERY = [f"epoch_{i}.pt" for i in (1, 2, 3)] + ["epoch_4.pt (last)", *AVERAGES, "FGE ensemble of 4"]


@pytest.mark.parametrize(
    ("flags", "again"),
    [
        ([], []),
        (["--workers", 1, "--quiet"], []),
        (["--bn-samples", 20], [AVERAGES[1]]),
        (["--train-data-arg", "n=20"], [AVERAGES[1]]),
        (["--dtype", "float64"], AVERAGES),
        (["--exclude", "3.bias"], AVERAGES),
        (["--amp", "bf16"], EVERY),
        (["--data-arg", "seed=2"], EVERY),
        (["--task", "own.py:Transposed"], EVERY),
        (["--model", "net.py:model", "--model-arg", "classes=3"], EVERY),
        (["--last", 3], ["average of 3 (uniform)", "average of 3 (uniform) anew",
                         "FGE ensemble of 3"]),
    ],
)  # fmt: skip
def test_resume_scores_only_candidates_that_options_change(
    home: Path, scored: list[str], flags: list[object], again: list[str]
) -> None:
    found(*ALL, "--results", "r.json")
    scored.clear()
    resumed = found(*ALL, *flags, "--results", "r.json", "--resume")
    with_the_last = again if EVERY[3] in again or not again else [EVERY[3], *again]
    assert scored == with_the_last
    assert resumed == found(*ALL, *flags)


def test_resume_scores_a_changed_checkpoint(home: Path, scored: list[str]) -> None:
    paths = [f"run/epoch_{i}.pt" for i in (1, 2, 3)]
    command = ["eval", *paths, *MODEL, *DATA, "--results", "r.json"]
    found(*command)
    scored.clear()
    os.utime(paths[1], ns=(0, 0))
    found(*command, "--resume")
    assert scored == paths[:2]
    scored.clear()
    kept = os.stat(paths[2])
    torch.save({"state_dict": torch.load(paths[2]), "epoch": 3}, paths[2])
    os.utime(paths[2], ns=(kept.st_atime_ns, kept.st_mtime_ns))
    found(*command, "--resume")
    assert scored == [paths[0], paths[2]]
    scored.clear()
    os.utime(paths[0], ns=(0, 0))
    found(*command, "--resume")
    assert scored == paths


def test_resume_scores_averages_of_a_changed_base(home: Path, scored: list[str]) -> None:
    command = [
        "eval",
        "--run",
        "run",
        "--last",
        "2",
        "--exclude",
        "3.*",
        "--base",
        "run/epoch_1.pt",
    ]
    command += [*MODEL, *DATA, "--results", "r.json"]
    found(*command)
    scored.clear()
    os.utime("run/epoch_1.pt", ns=(0, 0))
    found(*command, "--resume")
    assert scored == ["epoch_4.pt (last)", "average of 2 (uniform)"]


@pytest.mark.parametrize(
    ("changed", "again"), [("net.py", 3), ("own.py", 3), ("how.py", 3), ("train.py", 0)]
)
def test_resume_notices_changed_python_files(
    home: Path, scored: list[str], changed: str, again: int
) -> None:
    paths = [f"run/epoch_{i}.pt" for i in (1, 2, 3)]
    Path("how.py").touch()
    command = ["eval", *paths, *MODEL, *DATA, "--data-arg", "how=how.py:fn"]
    command += ["--task", "own.py:Transposed", "--results", "r.json"]
    found(*command)
    scored.clear()
    Path(changed).touch()
    os.utime(changed, ns=(0, 0))
    found(*command, "--resume")
    assert len(scored) == again


def test_resume_compares_with_another_reference(home: Path, scored: list[str]) -> None:
    paths = [f"run/epoch_{i}.pt" for i in (1, 2, 3)]
    found("eval", *paths, *MODEL, *DATA, "--results", "r.json")
    scored.clear()
    resumed = found("eval", *paths[1:], *MODEL, *DATA, "--results", "r.json", "--resume")
    assert scored == paths[1:]
    assert resumed == found("eval", *paths[1:], *MODEL, *DATA)


def test_eval_keeps_a_checkpoint_that_is_named_twice(home: Path) -> None:
    command = ["eval", "run/epoch_1.pt", "run/epoch_2.pt", "run/epoch_1.pt", "run/epoch_2.pt"]
    command += [*MODEL, *DATA, "--results", "r.json"]
    whole = found(*command)
    assert [c["name"] for c in whole] == command[1:5]
    assert whole[2]["versus"]["difference"] == 0
    assert whole[1] == whole[3]
    assert found(*command, "--resume") == whole


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", "3", '{"candidates": 3}', '{"candidates": {"a": 1}}', '{"candidates": [[]]}',
     '{"candidates": [{"key": "k"}]}', '{"candidates": [{"metrics": {}}]}', "\xff\xfe",
     '{"candidates": [{"key": "k", "bn": "own", "metrics": 3}]}'],
)  # fmt: skip
def test_resume_refuses_a_file_of_other_content(home: Path, text: str) -> None:
    Path("r.json").write_bytes(text.encode("latin-1"))
    line = error(ckptavg(*ALL, "--results", "r.json", "--resume"))
    assert "r.json cannot be resumed: it does not hold results of this command" in line
    assert Path("r.json").read_bytes() == text.encode("latin-1")


@pytest.mark.parametrize("flags", [[], ["--resume"]])
def test_results_file_keeps_other_candidates(home: Path, flags: list[str]) -> None:
    first = found("eval", "run/epoch_1.pt", *MODEL, *DATA, "--results", "r.json")
    again = ckptavg("eval", "run/epoch_2.pt", *MODEL, *DATA, "--results", "r.json", *flags)
    assert again.stderr.count("r.json keeps results of other candidates: 1") == 1
    held = json.loads(Path("r.json").read_text())["candidates"]
    assert held[0] == first[0]
    assert [c["name"] for c in held] == ["run/epoch_1.pt", "run/epoch_2.pt"]


@pytest.mark.parametrize("name", ["r.json", "r.csv"])
def test_results_file_of_other_content_is_refused_first(
    home: Path, scored: list[str], name: str
) -> None:
    Path(name).write_text('{"lr": 0.1}')
    Path(f".{name}.tmp").write_text("mine")
    line = error(ckptavg(*ALL, "--results", name))
    assert f"{name} is not replaced: it does not hold results of this command" in line
    assert "Name another file" in line
    assert Path(name).read_text() == '{"lr": 0.1}'
    assert ckptavg(*ALL, "--results", f"new-{name}").exit_code == 0
    assert len(scored) == len(EVERY)
    assert Path(f".{name}.tmp").read_text() == "mine"


def test_results_are_shown_on_a_full_disk(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    command = ["eval", "run/epoch_1.pt", *MODEL, *DATA]
    table = ckptavg(*command).stdout
    monkeypatch.setattr(os, "fsync", full)
    result = ckptavg(*command, "--results", "r.json")
    assert "the disk ran full" in error(result)
    assert result.stdout == table
    assert "(the evaluation goes on)" in result.stderr
    assert not Path("r.json").exists()


@pytest.mark.parametrize("flags", [[], ["--results", "r.csv"]])
def test_resume_needs_a_json_file(home: Path, flags: list[str]) -> None:
    assert "--resume needs a --results file that ends in .json" in error(
        ckptavg(*ALL, *flags, "--resume"), 2
    )


def test_resume_scores_entries_with_missing_metrics(home: Path, scored: list[str]) -> None:
    paths = ["run/epoch_1.pt", "run/epoch_2.pt"]
    command = ["eval", *paths, *MODEL, *DATA, "--results", "r.json"]
    whole = ckptavg(*command).stdout
    kept = json.loads(Path("r.json").read_text())
    kept["candidates"][1]["metrics"]["nll"] = None
    Path("r.json").write_text(json.dumps(kept))
    scored.clear()
    assert ckptavg(*command, "--resume").stdout == whole
    assert scored == paths


# A user's own task


def segmented(seeds: list[int]) -> dict[str, float]:
    """Mean intersection over union, and the share of wrong pixels, in numpy."""
    g = torch.Generator().manual_seed(5)
    x = torch.randn(7, 2, 6, 5, generator=g).double().numpy()
    truth = torch.randint(0, 3, (7, 6, 5), generator=g).numpy()
    total = np.zeros((7, 3, 6, 5))
    for seed in seeds:
        state = torch.load(f"images/epoch_{seed}.pt")
        weight = state["weight"].double().numpy()[:, :, 0, 0]
        bias = state["bias"].double().numpy()[None, :, None, None]
        logits = np.exp(np.einsum("nchw,kc->nkhw", x, weight) + bias)
        total += logits / logits.sum(1, keepdims=True)
    chosen = total.argmax(1)
    shares = [
        ((chosen == k) & (truth == k)).sum() / ((chosen == k) | (truth == k)).sum()
        for k in range(3)
    ]
    return {"miou": float(np.mean(shares)), "wrong": float((chosen != truth).mean()), "n": 7}


def test_task_of_user_has_its_columns_and_ensemble(home: Path) -> None:
    command = ["eval", "--run", "images", *PIXELS, "--task", "own.py:Segmentation", "-b", "3"]
    command += ["--each", "--compare", "fge"]
    results = found(*command)
    for result, seeds in zip(results, [[1], [2], [3], [4], None, [1, 2, 3, 4]], strict=True):
        if seeds is not None:
            assert result["metrics"] == pytest.approx(segmented(seeds))
        assert not {"versus", "disagreement", "reliability"} & result.keys()
    table = ckptavg(*command).stdout
    assert table.startswith("7 samples\n")
    assert "mIoU" in table
    assert f"{results[0]['metrics']['wrong']:.2%}" in table
    assert "Δ" not in table


@pytest.mark.parametrize("name", ["Segmentation", "Errors"])
def test_fail_if_worse_follows_first_metric_of_task(home: Path, name: str) -> None:
    command = ["eval", "--run", "images", *PIXELS, "--task", f"own.py:{name}"]
    last, average = (c["metrics"] for c in found(*command))
    worse = {
        "Segmentation": average["miou"] < last["miou"],
        "Errors": average["wrong"] > last["wrong"],
    }
    assert ckptavg(*command, "--fail-if-worse").exit_code == (3 if worse[name] else 0)


def test_task_may_change_only_the_forward(home: Path) -> None:
    plain, turned = (
        found("eval", "run/epoch_1.pt", *MODEL, *DATA, *flags)[0]["metrics"]
        for flags in ([], ["--task", "own.py:Transposed"])
    )
    assert plain.keys() == turned.keys()
    assert plain["nll"] != turned["nll"]


def test_task_forward_serves_update_bn(home: Path) -> None:
    for name, flags in [("plain", []), ("turned", ["--task", "own.py:Transposed"])]:
        command = ["update-bn", "run/epoch_1.pt", *MODEL, *TRAIN, *flags, "-o", f"{name}.pt"]
        assert ckptavg(*command).exit_code == 0
    plain, turned = (torch.load(f"{name}.pt")["state_dict"] for name in ("plain", "turned"))
    assert not torch.equal(plain["2.running_mean"], turned["2.running_mean"])


@pytest.mark.parametrize(
    ("task", "code", "words"),
    [
        ("segmentation", 2, "task is expected to be one of image-classification"),
        ("own.py:Segmentatoin", 1, "Did you mean Segmentation"),
        ("nowhere.py:Task", 1, "nowhere.py does not exist"),
        ("own.py:Empty", 1, "own.py:Empty has no metrics"),
        ("own.py:Half", 1, "own.py:Half does not define scores"),
        ("own.py:Other", 1, "is expected to give a ckptavg.tasks.Task but gives a Other"),
        ("own.py:pixels", 1, "is expected to give a ckptavg.tasks.Task but gives a Conv2d"),
        ("own.py:Forgetful", 1, "the scores of Forgetful lack dice"),
    ],
)
def test_task_option_refuses_other_objects(home: Path, task: str, code: int, words: str) -> None:
    assert words in error(ckptavg("eval", "--run", "images", *PIXELS, "--task", task), code)


def test_fail_if_worse_counts_nan_as_worse(home: Path, scored: list[str]) -> None:
    command = ["eval", "--run", "images", *PIXELS, "--task", "own.py:Undefined"]
    command += ["--results", "r.json", "--fail-if-worse"]
    whole = ckptavg(*command)
    assert whole.exit_code == 3
    assert "nan" in whole.stdout
    again = ckptavg(*command, "--resume")  # JSON has no word for it: it is scored again
    assert (again.exit_code, again.stdout) == (3, whole.stdout)
    assert len(scored) == 4


def test_fail_if_worse_needs_a_ranked_metric(home: Path) -> None:
    flags = ["--task", "own.py:Unranked", "--fail-if-worse"]
    line = error(ckptavg("eval", "--run", "images", *PIXELS, *flags), 2)
    assert "miou does not" in line


# Further averages


def test_also_option_scores_averages_as_their_files(home: Path) -> None:
    also = ["--also", "two=@last=2", "--also", "ema=ema:decay=0.5"]
    candidates = found("eval", "--run", "run", *also, *MODEL, *DATA, "--train-data", "net.py:data")
    for name in ("two", "ema"):
        stale, fresh = (c for c in candidates if c["name"] == name)
        assert (stale["bn"], fresh["bn"]) == ("stale", "recomputed")
    flags = ["--train-data", "net.py:data", *MODEL, "-o", "all.pt"]
    result = ckptavg("average", "run", *also, *flags)
    assert result.exit_code == 0, result.output
    written = found("eval", "all.pt", "two.pt", "ema.pt", *MODEL, *DATA)
    assert [c["bn"] for c in written] == ["recomputed"] * 3
    expected = [c for c in candidates if c["bn"] == "recomputed"]
    for one, other in zip(written, expected, strict=True):
        assert one["metrics"] == pytest.approx(other["metrics"], rel=1e-6)


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["run/epoch_1.pt", "--also", "a=linear"], "--also needs --run"),
        (["--run", "run", "--also", "a=linear", "--also", "a=@last=2"], "called a"),
    ],
)
def test_also_option_needs_a_run_and_unique_names(home: Path, args: list[str], words: str) -> None:
    assert words in error(ckptavg("eval", *args, *MODEL, *DATA), 2)


# How much of the training data


def recomputed(data: str, *flags: object) -> dict[str, Any]:
    """What ``update-bn`` says it did."""
    args = ("update-bn", "run/epoch_1.pt", *MODEL, "--train-data", f"net.py:{data}", *flags)
    result = ckptavg(*args, "-o", "o.pt", "--overwrite", "--json")
    assert result.exit_code == 0, result.output
    done: dict[str, Any] = json.loads(result.stdout)
    return done


@pytest.mark.parametrize(
    ("data", "wanted", "samples"),
    [("data", "7", 7), ("labelled", "7:stratified", 7), ("data", "41", 40), ("data", "40", 40),
     ("batches", "11", 20), ("batches", "10", 10), ("batches", "999", 40)],
)  # fmt: skip
def test_bn_samples_limits_samples(home: Path, data: str, wanted: str, samples: int) -> None:
    assert recomputed(data, "--bn-samples", wanted)["samples"] == samples


def test_bn_samples_follow_the_seed(home: Path) -> None:
    means = []
    for flags in ([], [], ["--seed", 1]):
        recomputed("data", "--bn-samples", "7", *flags)
        means.append(torch.load("o.pt")["state_dict"]["2.running_mean"])
    assert torch.equal(means[0], means[1])
    assert not torch.equal(means[0], means[2])


@pytest.mark.parametrize(
    ("data", "wanted", "words"),
    [
        ("data", "0", "expected N or N:stratified"),
        ("data", "-3", "expected N or N:stratified"),
        ("data", "5:strat", "expected N or N:stratified"),
        ("data", "5:stratified", "needs data with `targets`"),
        ("batches", "5:stratified", "drawn from a Dataset with targets, not from a loader"),
    ],
)
@pytest.mark.parametrize("command", ["eval", "update-bn", "average"])
def test_bn_samples_refuses_impossible_subsets(
    home: Path, command: str, data: str, wanted: str, words: str
) -> None:
    training = [*MODEL, "--train-data", f"net.py:{data}", f"--bn-samples={wanted}"]
    args = {
        "eval": ["eval", "--run", "run", *DATA, *training],
        "update-bn": ["update-bn", "run/epoch_1.pt", *training, "-o", "o.pt"],
        "average": ["average", "run", *training, "-o", "o.pt"],
    }[command]
    result = ckptavg(*args)
    assert result.exit_code == 2, result.output
    assert words in result.stderr
    assert not Path("o.pt").exists()


# How it ends


def lives(process: int) -> bool:
    """Whether a process still runs: one that only its parent has to hear of does not."""
    try:
        state = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"


def heed_interrupts() -> None:  # which a process started in the background does not
    signal.signal(signal.SIGINT, signal.SIG_DFL)


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="looks at processes in /proc")
@first_only(
    "command",
    [["eval", "--run", "run", *MODEL, "--data", "net.py:Slow", "--results", "o.json"],
     ["average", "run", *MODEL, "--train-data", "net.py:Slow", "-o", "o.pt"]],
    ids=["eval", "average"],
)  # fmt: skip
def test_interrupt_leaves_no_worker_and_one_line(home: Path, command: list[str]) -> None:
    (home / "workers").mkdir()
    before = listing(home)
    line = [sys.executable, "-m", "ckptavg", *command, "--workers", "2", "-b", "20"]
    with subprocess.Popen(
        line, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=home,
        start_new_session=True, preexec_fn=heed_interrupts,  # noqa: PLW1509 - takes no lock
    ) as process:  # fmt: skip
        until = time.monotonic() + 240
        while len(list((home / "workers").iterdir())) < 2 and time.monotonic() < until:
            time.sleep(0.05)
        os.killpg(process.pid, signal.SIGINT)  # as a terminal does
        err = process.communicate(timeout=240)[1]
    assert process.returncode == 130, err
    *notes, last = err.splitlines()
    assert last == "Interrupted: nothing was written."
    assert all(note.startswith("note: ") for note in notes), err
    workers = [int(path.name) for path in (home / "workers").iterdir()]
    assert len(workers) == 2
    assert not any(map(lives, workers))
    assert [n for n in listing(home) if "workers/" not in n and "__pycache__" not in n] == before


@pytest.mark.parametrize("workers", [0, 1])
def test_data_errors_are_one_line(home: Path, workers: int) -> None:
    result = ckptavg("eval", "--run", "run", *MODEL, "--data", "net.py:Damaged", "-j", workers)
    assert error(result) == "Error: OSError: image 17 is damaged. --debug shows where."
