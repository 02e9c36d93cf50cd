"""Evaluations that go on from a file of results, as Python calls them."""

from __future__ import annotations

import json

import pytest
import torch
from fellows import together
from helpers import save
from torch import nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

from ckptavg import Candidate, compare, evaluate, open_run
from ckptavg.errors import OutputError, UsageError
from ckptavg.evaluation import evaluate as evaluation
from ckptavg.evaluation import session
from ckptavg.evaluation.results_file import ResultsFile
from ckptavg.evaluation.resume import Identity, ResultStore
from ckptavg.tasks.classification import Classification


def network(width=4):
    return nn.Sequential(nn.Linear(8, width), nn.BatchNorm1d(width), nn.Linear(width, 3))


def data(seed=1, count=60):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, 8, generator=generator)
    return TensorDataset(x, torch.randint(0, 3, (count,), generator=generator))


def state_of(seed):
    torch.manual_seed(seed)
    state = network().state_dict()
    return state | {"1.running_mean": torch.randn(4), "1.running_var": torch.rand(4) + 0.5}


class Augmented(Dataset):
    """Training data that draws from the global generator."""

    def __init__(self, scale=0.1):
        self.samples, self.scale = data(0), scale

    def __len__(self):
        return len(self.samples)

    def __getitem__(self, position):
        x, label = self.samples[position]
        return x + self.scale * torch.randn(8), label


class Calls(Classification):
    """A task of a user's with a setting."""

    def __init__(self, power=1):
        self.power = power


@pytest.fixture
def home(tmp_path, monkeypatch):
    for epoch in range(1, 5):
        save(tmp_path / "run" / f"epoch_{epoch}.pt", state_of(epoch), epoch=epoch)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def scored(monkeypatch):
    """The names of the candidates that are scored, as they come."""
    names = []
    score = session.score

    def noted(candidates, *args, **options):
        names.extend(candidate.name for candidate in candidates)
        return score(candidates, *args, **options)

    monkeypatch.setattr(evaluation, "score", noted)
    return names


def plain(results):
    return [result.as_json() for result in results]


def entries(path):
    return json.loads(path.read_text())["candidates"]


ALL = {"train_data": data(0), "each": True, "ensemble": True}
LAST, AVERAGE = "epoch_4.pt (last)", "average of 4 (uniform)"


def test_results_are_stored_as_json(home):
    results = compare("run", network(), data(), **ALL, results="r.json")
    stored = [dict(entry) for entry in entries(home / "r.json")]
    assert len({entry.pop("key") for entry in stored}) == len(stored) == 7
    assert stored == json.loads(json.dumps(plain(results)))


@pytest.mark.parametrize("passes", [1, 2, 4])
def test_resume_continues_an_interrupted_evaluation(home, monkeypatch, scored, passes):
    monkeypatch.setattr(session, "count_models_that_fit", lambda *_: 1)
    whole = compare("run", network(), data(), **ALL)
    scored.clear()
    save_results, saved = ResultStore.save, []

    def interrupted(store, results):
        saved.append(save_results(store, results))
        if len(saved) == passes:
            raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(ResultStore, "save", interrupted)
        with pytest.raises(KeyboardInterrupt):
            compare("run", network(), data(), **ALL, results="r.json")
    done = len(entries(home / "r.json"))
    assert 0 < done < 7
    scored.clear()
    resumed = compare("run", network(), data(), **ALL, results="r.json", resume=True)
    # The baseline is scored again, since the others are compared with it.
    assert len(scored) == 7 - done + 1
    assert plain(resumed) == plain(whole)
    assert len(entries(home / "r.json")) == 7
    assert f"{done} of 7 candidates are in r.json" in resumed.notes


def test_resume_does_not_score_complete_results(home, scored):
    first = compare("run", network(), data(), **ALL, results="r.json")
    scored.clear()
    again = compare("run", network(), data(), **ALL, results="r.json", resume=True)
    assert scored == []
    assert plain(again) == plain(first)
    assert str(again) == str(first)


def test_results_without_resume_are_replaced(home, scored):
    for _ in range(2):
        scored.clear()
        compare("run", network(), data(), results="r.json")
        assert len(scored) == len(entries(home / "r.json")) == 2


@pytest.mark.parametrize(
    "changed",
    [
        {"data": data(2)},
        {"data": data(1, 59)},
        {"data": DataLoader(data(), 7)},
        {"task": Calls()},
        {"forward": lambda model, batch: model(batch[0])},
        {"amp": "bf16"},
        {"seed": 1},
        {"batch_size": 16},
    ],
    ids=["data", "count", "loader", "task", "forward", "amp", "seed", "batch size"],
)
def test_resume_notices_changed_settings(home, scored, changed):
    arguments = {"data": data(), **changed}
    evaluate(["run/epoch_1.pt", "run/epoch_2.pt"], network(), data(), results="r.json")
    scored.clear()
    evaluate(["run/epoch_2.pt"], network(), results="r.json", resume=True, **arguments)
    assert scored == ["epoch_2.pt"]


def test_resume_notices_a_changed_task_setting(home, scored):
    for power, expected in ((1, 1), (1, 0), (2, 1)):
        scored.clear()
        evaluate(["run/epoch_1.pt"], network(), data(), task=Calls(power), results="r.json",
                 resume=True)  # fmt: skip
        assert len(scored) == expected


def test_resume_notices_a_changed_layer_setting(home, scored):
    for eps, expected in ((1e-5, 1), (1e-5, 0), (1e-3, 1)):
        scored.clear()
        model = network()
        model[1].eps = eps
        evaluate(["run/epoch_1.pt"], model, data(), results="r.json", resume=True)
        assert len(scored) == expected


def test_resume_scores_a_changed_checkpoint(home, scored):
    paths = ["run/epoch_1.pt", "run/epoch_2.pt", "run/epoch_3.pt"]
    evaluate(paths, network(), data(), results="r.json")
    save(home / "run" / "epoch_2.pt", state_of(9), epoch=2)
    scored.clear()
    results = evaluate(paths, network(), data(), results="r.json", resume=True)
    assert scored == ["epoch_1.pt", "epoch_2.pt"]
    assert plain(results) == plain(evaluate(paths, network(), data()))


def test_resume_scores_changed_weights_in_memory(home, scored):
    states = {"a": state_of(1), "b": state_of(2)}
    evaluate(states, network(), data(), results="r.json")
    scored.clear()
    evaluate(states, network(), data(), results="r.json", resume=True)
    assert scored == []
    states["b"]["2.bias"] += 1
    results = evaluate(states, network(), data(), results="r.json", resume=True)
    assert scored == ["a", "b"]
    assert plain(results) == plain(evaluate(states, network(), data()))


def test_resume_scores_only_averages_for_tensor_rules(home, scored):
    compare("run", network(), data(), **ALL, results="r.json")
    scored.clear()
    compare("run", network(), data(), **ALL, exclude_tensors="2.bias", results="r.json",
            resume=True)  # fmt: skip
    assert scored == [LAST, AVERAGE, AVERAGE]


@pytest.mark.parametrize(
    "changed",
    [{"bn_samples": 20}, {"train_data": data(3)}, {"exclude": "1"}],
    ids=["subset", "data", "layers"],
)
def test_resume_scores_only_recomputed_for_training_data(home, scored, changed):
    compare("run", network(), data(), **ALL, results="r.json")
    scored.clear()
    compare("run", network(), data(), **(ALL | changed), results="r.json", resume=True)
    assert scored == [LAST, AVERAGE]


def test_resume_recognizes_random_training_data(home, scored):
    arguments = {"train_data": Augmented(), "results": "r.json"}
    compare("run", network(), data(), **arguments)
    scored.clear()
    model, held_out = network(), data()
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    compare("run", model, held_out, **arguments, resume=True)
    assert scored == []
    assert torch.equal(torch.rand(3), expected)
    compare("run", network(), data(), **(arguments | {"train_data": Augmented(0.2)}), resume=True)
    assert scored == [LAST, AVERAGE]


def test_resume_never_recognizes_iterators(home, scored):
    for _ in range(2):
        scored.clear()
        batches = iter(DataLoader(data(), 20))
        evaluate(["run/epoch_1.pt"], network(), batches, results="r.json", resume=True)
        assert scored == ["epoch_1.pt"]


def test_resume_recognizes_lists_of_batches(home, scored):
    for expected in (["epoch_1.pt"], []):
        scored.clear()
        batches = list(DataLoader(data(), 20))
        evaluate(["run/epoch_1.pt"], network(), batches, results="r.json", resume=True)
        assert scored == expected


def test_resume_recognizes_planned_averages(home, scored):
    run = open_run("run")
    for expected in (3, 0):
        scored.clear()
        candidates = [Candidate.of_average(run.last(k)) for k in (2, 3, 4)]
        evaluate(candidates, network(), data(), results="r.json", resume=True)
        assert len(scored) == expected


def test_resume_refuses_csv_files(home):
    evaluate(["run/epoch_1.pt"], network(), data(), results="r.csv")
    assert (home / "r.csv").read_text().startswith("name,kind,")
    with pytest.raises(UsageError, match=r"`resume` needs a `results` file .* \.json"):
        evaluate(["run/epoch_1.pt"], network(), data(), results="r.csv", resume=True)


@pytest.mark.parametrize("path", ["r.txt", "r"])
def test_results_option_refuses_other_suffixes(home, path):
    with pytest.raises(UsageError, match=r"`results` is expected to end in \.json or \.csv"):
        evaluate(["run/epoch_1.pt"], network(), data(), results=path)


def test_resume_needs_a_file(home):
    with pytest.raises(UsageError, match="needs a `results` file"):
        evaluate(["run/epoch_1.pt"], network(), data(), resume=True)


def test_results_option_refuses_a_file_of_other_content(home, scored):
    (home / "r.json").write_text('{"a": 1}')
    with pytest.raises(OutputError, match="is not replaced"):
        evaluate(["run/epoch_1.pt"], network(), data(), results="r.json")
    assert scored == []


def test_results_that_cannot_be_stored_are_noted(home, monkeypatch):
    def full(store, results):
        raise OutputError("r.json cannot be written", "Free some space.")

    monkeypatch.setattr(ResultStore, "save", full)
    results = evaluate(["run/epoch_1.pt"], network(), data(), results="r.json")
    assert len(results) == 1
    assert any("r.json cannot be written" in note for note in results.notes)


def test_result_store_of_first_process_decides_and_writes(home):
    evaluate({"a": state_of(1)}, network(), data(), results="r.json")
    file = ResultsFile(home / "r.json")
    run = open_run("run")
    candidates = [Candidate.of_checkpoint(checkpoint) for checkpoint in run]

    def work(peers):
        # Hosts may see other times of files.
        def identify(candidate):
            return Identity({"host": peers.rank})

        store = ResultStore(candidates, identify, file, resume=True, peers=peers)
        return store.keys, [candidate.name for candidate in store.missing], store.file

    (keys, missing, first_file), *others = together(3, work)
    assert len(keys) == len(missing) == 4
    assert first_file is file
    assert others == [(keys, missing, None)] * 2
