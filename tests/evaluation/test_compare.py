"""compare() beside the command that it is the same as, and the results as people use them."""

from __future__ import annotations

import json
import sys

import pytest
import torch
from click.testing import CliRunner
from helpers import save
from torch import nn
from torch.utils.data import TensorDataset

import ckptavg
from ckptavg import Candidate, Results, compare, evaluate
from ckptavg.cli import main
from ckptavg.errors import MissingPackageError, UsageError

FACTORIES = """
import torch
from torch import nn

def model():
    return nn.Sequential(nn.Linear(8, 4), nn.BatchNorm1d(4), nn.Linear(4, 3))

def data(seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(60, 8, generator=generator)
    return torch.utils.data.TensorDataset(x, torch.randint(0, 3, (60,), generator=generator))
"""


def network():
    return nn.Sequential(nn.Linear(8, 4), nn.BatchNorm1d(4), nn.Linear(4, 3))


def data(seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(60, 8, generator=generator)
    return TensorDataset(x, torch.randint(0, 3, (60,), generator=generator))


def state_of(seed):
    torch.manual_seed(seed)
    state = network().state_dict()
    return state | {"1.running_mean": torch.randn(4), "1.running_var": torch.rand(4) + 0.5}


@pytest.fixture
def home(tmp_path, monkeypatch):
    (tmp_path / "net.py").write_text(FACTORIES)
    for epoch in range(1, 5):
        beside = {"epoch": epoch, "lr": 0.1, "val_acc": 0.5 + epoch / 100}
        save(tmp_path / "run" / f"epoch_{epoch}.pt", state_of(epoch), **beside)
    monkeypatch.chdir(tmp_path)
    return tmp_path


TRAIN = ["--train-data", "net.py:data"]
EVAL = ["--model", "net.py:model", "--data", "net.py:data", "--data-arg", "seed=1"]


def command(*args):
    result = CliRunner().invoke(main, ["eval", *map(str, args), *EVAL])
    assert result.exit_code == 0, result.output
    return result


def plain(results):
    return [result.as_json() for result in results]


def without_keys(result):
    candidates = json.loads(result.stdout)["candidates"]
    return [{k: v for k, v in c.items() if k != "key"} for c in candidates]


# The same as the command


@pytest.mark.parametrize(
    ("options", "flags"),
    [
        ({}, []),
        ({"each": True, "ensemble": True}, ["--each", "--compare", "fge"]),
        ({"scheme": "ema:decay=0.5"}, ["--scheme", "ema:decay=0.5"]),
        ({"weights": [1, 2, 3, 4]}, ["--weights", "1,2,3,4"]),
        ({"train_data": data()}, TRAIN),
        ({"train_data": data(), "stale": False, "each": True}, [*TRAIN, "--no-stale", "--each"]),
        ({"train_data": data(), "bn_samples": 16, "seed": 3},
         [*TRAIN, "--bn-samples", "16", "--seed", "3"]),
        ({"train_data": data(), "exclude": "1"}, [*TRAIN, "--bn-exclude", "1"]),
        ({"also": {"ema": "ema:decay=0.5"}, "train_data": data()},
         ["--also", "ema=ema:decay=0.5", *TRAIN]),
        ({"exclude_tensors": "2.*", "dtype": "float64"},
         ["--exclude", "2.*", "--dtype", "float64"]),
        ({"candidates": {"run/epoch_2.pt": "run/epoch_2.pt"}}, ["run/epoch_2.pt"]),
    ],
    ids=[
        "plain", "each and ensemble", "scheme", "weights", "recomputed", "no stale", "samples",
        "kept layers", "also", "tensors and dtype", "a file beside",
    ],
)  # fmt: skip
@pytest.mark.parametrize("as_path", [True, False])
def test_compare_gives_results_of_the_command(home, options, flags, as_path):
    run = "run" if as_path else ckptavg.open_run("run")
    results = compare(run, network(), data(1), **options)
    assert plain(results) == without_keys(command("--run", "run", *flags, "--json"))


def test_selection_is_compared_with_last_of_run(home):
    run = ckptavg.open_run("run")
    results = compare(run, network(), data(1), selection=run[:2], also={"two": run.last(2)})
    flags = ["--to", "2", "--also", "two=@last=2"]
    assert plain(results) == without_keys(command("--run", "run", *flags, "--json"))
    assert results[0].candidate.last
    assert results[0].candidate.name == "epoch_4.pt (last)"
    with pytest.raises(UsageError, match="the run does not have"):
        compare(run, network(), data(1), selection=ckptavg.open_run("run"))


def test_compare_words_notes_of_the_command_for_python(home):
    for epoch, rate in enumerate([0.1, 0.01, 0.1, 0.01], 1):
        save(home / "run" / f"epoch_{epoch}.pt", state_of(epoch), epoch=epoch, lr=rate)
    (home / "run" / "last.pt").symlink_to("epoch_4.pt")
    results = compare("run", network(), data(1))
    assert any("last.pt repeats" in note for note in results.notes)
    (cycles,) = [note for note in results.notes if "cyclical" in note]
    assert "`.at_lr_min()` takes the 2 at the ends" in cycles
    told = command("--run", "run").stderr
    assert set(results.notes) - {cycles} <= {
        line.removeprefix("note: ").removeprefix("warning: ") for line in told.splitlines()
    }


def test_compare_reports_progress_of_all_phases(home):
    calls = []
    compare("run", network(), data(1), train_data=data(), progress=lambda *at: calls.append(at))
    assert dict.fromkeys(phase for phase, *_ in calls) == {"BatchNorm": None, "evaluation": None}
    assert calls[-1] == ("evaluation", 60, 60)


# Results


@pytest.fixture
def results(home):
    return compare("run", network(), data(1), train_data=data(), each=True, ensemble=True)


def test_results_are_indexed_by_position_and_by_name(results):
    assert len(results) == 7
    assert results[-1].candidate.kind == "ensemble"
    assert isinstance(results[1:3], Results)
    assert list(results[1:3]) == list(results)[1:3]
    assert results["epoch_2.pt"] is results[1]
    average = results["average of 4 (uniform)"]
    assert average.bn == "recomputed"
    assert results["average of 4 (uniform)", "stale"] is results[4]
    with pytest.raises(KeyError, match=r"no candidate is called 'epoch_9\.pt'; there are epoch_1"):
        results["epoch_9.pt"]
    with pytest.raises(KeyError, match="with own statistics"):
        results["average of 4 (uniform)", "own"]


def test_results_best_follows_a_metric(results):
    best = max(results, key=lambda result: result.metrics["top1"])
    assert results.best() is best
    assert results.best("nll").metrics["nll"] == min(r.metrics["nll"] for r in results)
    with pytest.raises(UsageError, match="metric is expected to be one of top1, top5, nll, ece"):
        results.best("loss")


def test_results_print_a_table_and_repr_one_line(results):
    text = str(results)
    for result in results:
        assert f"{result.metrics['top1']:.2f}" in text
        assert result.candidate.name in text
    assert repr(results).startswith("<Results of 7 candidates: epoch_1.pt, epoch_2.pt, ")
    assert "\n" not in repr(results)


def test_results_html_escapes_names(home):
    save(home / "<img src=x>.pt", state_of(1))
    html = evaluate(["<img src=x>.pt", "run/epoch_2.pt"], network(), data(1))._repr_html_()
    assert "&lt;img src=x&gt;.pt" in html
    assert "<img" not in html
    assert html.count("<tr>") == 3


def test_results_frame_has_row_per_candidate(results):
    pytest.importorskip("pandas")
    frame = results.to_frame()
    assert list(frame["name"]) == [result.candidate.name for result in results]
    assert list(frame["bn"]) == [result.bn for result in results]
    for key in ("top1", "nll", "ece", "n"):
        assert list(frame[key]) == [result.metrics[key] for result in results]
    assert frame["versus_difference"].isna().sum() == 1  # the reference's own
    assert frame["versus_p"].iloc[0] == results[0].versus.difference.p


def test_results_frame_without_pandas_names_the_package(results, monkeypatch):
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(MissingPackageError, match="pip install pandas"):
        results.to_frame()


# What is scored


def scores_of(model):
    """NLL and top-1 by torch's own loss in float64."""
    inputs, labels = data(1).tensors
    outputs = model.double().eval()(inputs.double())
    right = (outputs.argmax(1) == labels).double().mean()
    return nn.functional.cross_entropy(outputs, labels).item(), 100 * right.item()


def loaded(state):
    model = network()
    model.load_state_dict(state)
    return model


def mean_state(states):
    keys = states[0]
    return {k: torch.stack([s[k].double() for s in states]).mean(0).to(keys[k].dtype) for k in keys}


def with_statistics(state):
    """The state with the moments of what its norm gets of all training data, in float64."""
    x = data().tensors[0].double() @ state["0.weight"].double().T + state["0.bias"].double()
    return state | {"1.running_mean": x.mean(0), "1.running_var": x.var(0)}


def assert_scores(result, state):
    nll, top1 = scores_of(loaded(state))
    assert result.metrics["nll"] == pytest.approx(nll, rel=1e-5)
    assert result.metrics["top1"] == pytest.approx(top1)


def test_evaluate_scores_modules_states_paths_candidates(home):
    states = [state_of(seed) for seed in (1, 2, 3, 4)]
    wrapped = nn.Module()
    wrapped.module = loaded(states[2])
    candidates = [
        loaded(states[0]),
        states[1],
        {f"module.{name}": value for name, value in states[2].items()},
        "run/epoch_4.pt",
        home / "run" / "epoch_4.pt",
        ckptavg.open_checkpoint("run/epoch_4.pt"),
        Candidate.of_average("run", scheme="linear"),
        Candidate.of_average(ckptavg.open_run("run").last(2), "two", weights=[1, 1]),
        Candidate.of_ensemble(ckptavg.open_run("run")),
    ]
    results = evaluate(candidates, network(), data(1))
    assert [result.candidate.name for result in results] == [
        "Sequential", "state dict 1", "state dict 2", *["epoch_4.pt"] * 3,
        "average of 4 (linear)", "two", "FGE ensemble",
    ]  # fmt: skip
    for result, state in zip(results, [*states, states[3], states[3]], strict=False):
        assert_scores(result, state)
    assert_scores(results["two"], mean_state(states[2:]))
    assert [r.bn for r in results] == [*["own"] * 6, "stale", "stale", "own"]
    named = evaluate({"old": states[0], "new": "run/epoch_4.pt"}, network(), data(1))
    assert [result.candidate.name for result in named] == ["old", "new"]
    assert named["new"].metrics == results[3].metrics


def test_evaluate_leaves_weights_in_memory_unchanged(home):
    model = loaded(state_of(1)).train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    candidate = Candidate.of_weights(model, recompute=True)
    (result,) = evaluate([candidate], network(), data(1), train_loader=data())
    assert result.bn == "recomputed"
    assert_scores(result, with_statistics(state_of(1)))
    assert model.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("thing", [3, None, {"a": 1}, ["run"]])
def test_evaluate_refuses_other_objects(home, thing):
    with pytest.raises(UsageError, match="expected to be a checkpoint, its path, a module"):
        evaluate([thing], network(), data(1))


@pytest.mark.parametrize("kind", ["file", "file that torch saved", "state dict", "candidate"])
def test_stale_statistics_are_recomputed_with_training_data(home, kind):
    averaged = ckptavg.average("run")
    torch.save(averaged, home / "kept.pth")
    stale = {
        "file": lambda: ckptavg.average("run", out=home / "swa.pt"),
        "file that torch saved": lambda: torch.load(home / "kept.pth"),
        "state dict": lambda: averaged,
        "candidate": lambda: Candidate.of_checkpoint(ckptavg.average("run", out=home / "s.pt")),
    }[kind]()
    mean = mean_state([state_of(seed) for seed in (1, 2, 3, 4)])
    both = [stale, "run/epoch_1.pt"]
    result, other = evaluate(both, network(), data(1), train_loader=data())
    assert (result.bn, other.bn) == ("recomputed", "own")
    assert_scores(result, with_statistics(mean))
    assert_scores(other, state_of(1))
    result, _ = evaluate(both, network(), data(1))
    assert result.bn == "stale"
    assert_scores(result, mean)


def test_training_data_without_use_is_noted(home):
    results = evaluate(["run/epoch_1.pt"], network(), data(1), train_loader=data())
    assert any("nothing is recomputed from the training data" in note for note in results.notes)


def test_average_without_recomputed_layers_appears_once(home):
    results = ckptavg.compare("run", network(), data(1), train_data=data(), exclude="*")
    assert [result.bn for result in results] == ["own", "stale"]
    assert results["average of 4 (uniform)"].bn == "stale"


def test_eval_command_recomputes_a_stale_file(home):
    ckptavg.average("run", out="swa.pt")
    found = without_keys(command("swa.pt", "run/epoch_1.pt", *TRAIN, "--json"))
    assert [(c["name"], c["bn"]) for c in found] == [
        ("swa.pt", "stale"), ("swa.pt", "recomputed"), ("run/epoch_1.pt", "own"),
    ]  # fmt: skip
    (expected,) = evaluate(["swa.pt"], network(), data(1), train_loader=data())
    assert found[1]["metrics"] == expected.metrics
    (alone,) = without_keys(command("swa.pt", *TRAIN, "--no-stale", "--json"))
    assert (alone["bn"], alone["metrics"]) == ("recomputed", expected.metrics)


def test_eval_command_notes_training_data_without_use(home):
    result = command("run/epoch_1.pt", *TRAIN)
    assert "nothing is recomputed from the training data" in result.stderr


def test_resume_distinguishes_stale_and_recomputed(home):
    ckptavg.average("run", out="swa.pt")
    first = command("swa.pt", "--results", "r.json", "--json")
    both = command("swa.pt", *TRAIN, "--results", "r.json", "--resume", "--json")
    assert without_keys(both)[0]["metrics"] == without_keys(first)[0]["metrics"]
    again = command("swa.pt", *TRAIN, "--results", "r.json", "--resume", "--json")
    assert without_keys(again) == without_keys(both)
    assert "2 of 2 candidates are in r.json" in again.stderr
