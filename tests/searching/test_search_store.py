"""Searches that a file continues."""

import json

import pytest
import torch
from noisy_runs import TRUTH, Linear, samples, save_noisy_run

import ckptavg
from ckptavg import search
from ckptavg.errors import OutputError, UsageError

DATA = samples(1, 400)


def without_notes(result):
    return {key: value for key, value in result.as_json().items() if key != "notes"}


class CountedData(torch.utils.data.Dataset):
    """Samples that count how often they are read, and fail from one reading on."""

    def __init__(self, fail_at=None):
        self.reads = 0
        self.fail_at = fail_at

    def __len__(self):
        return len(DATA)

    def __getitem__(self, index):
        self.reads += 1
        if self.fail_at is not None and self.reads > self.fail_at:
            raise KeyboardInterrupt
        return DATA[index]


@pytest.fixture
def run(tmp_path):
    return save_noisy_run(tmp_path / "run")


def test_resumed_search_scores_nothing_again(run, tmp_path):
    path = tmp_path / "r.json"
    first = search(run, Linear(), CountedData(), budget=20, results=path)
    data = CountedData()
    second = search(run, Linear(), data, budget=20, results=path, resume=True)
    # Identifying the data reads some samples, a pass reads all.
    assert data.reads < len(DATA) / 2
    assert without_notes(second) == without_notes(first)


def test_interrupted_search_goes_on(run, tmp_path, monkeypatch):
    monkeypatch.setattr("ckptavg.evaluation.session.count_models_that_fit", lambda *_: 4)
    path = tmp_path / "r.json"
    whole = search(run, Linear(), CountedData(), budget=20)
    with pytest.raises(KeyboardInterrupt):
        search(run, Linear(), CountedData(fail_at=900), budget=20, results=path)
    stored = len(json.loads(path.read_text())["scores"])
    assert stored >= 4
    data = CountedData()
    resumed = search(run, Linear(), data, budget=20, results=path, resume=True)
    assert without_notes(resumed) == without_notes(whole)


def test_resumed_search_scores_changed_checkpoints(run, tmp_path):
    path = tmp_path / "r.json"
    search(run, Linear(), DATA, budget=20, results=path)
    torch.save({"state_dict": {"head.weight": TRUTH}, "step": 3}, run[2].path)
    run = ckptavg.open_run(tmp_path / "run")
    resumed = search(run, Linear(), DATA, budget=20, results=path, resume=True)
    assert without_notes(resumed) == without_notes(search(run, Linear(), DATA, budget=20))


def test_resumed_search_may_have_another_split(run, tmp_path):
    path = tmp_path / "r.json"
    search(run, Linear(), DATA, budget=20, results=path)
    data = CountedData()
    resumed = search(run, Linear(), data, budget=20, results=path, resume=True, select_fraction=0.3)
    assert resumed.selection_count == 120


def test_search_file_holds_the_result(run, tmp_path):
    path = tmp_path / "r.json"
    result = search(run, Linear(), DATA, budget=20, results=path)
    stored = json.loads(path.read_text())
    for key, value in json.loads(json.dumps(result.as_json())).items():
        assert stored[key] == value


@pytest.mark.parametrize("text", ["{}", '{"candidates": []}', "[", '{"kind": "search"}'])
def test_search_refuses_another_file(run, tmp_path, text):
    path = tmp_path / "r.json"
    path.write_text(text)
    with pytest.raises(OutputError, match="holds no results of a search"):
        search(run, Linear(), DATA, results=path)
    assert path.read_text() == text


def test_search_refuses_damaged_scores(run, tmp_path):
    path = tmp_path / "r.json"
    search(run, Linear(), DATA, budget=20, results=path)
    stored = json.loads(path.read_text())
    for entry in stored["scores"]:
        entry["values"][1] = entry["values"][1][:-5]
    path.write_text(json.dumps(stored))
    with pytest.raises(OutputError, match="are damaged"):
        search(run, Linear(), DATA, budget=20, results=path, resume=True)


def test_search_refuses_wrong_files_before_work(run, tmp_path):
    data = CountedData()
    with pytest.raises(UsageError, match=r"\.json"):
        search(run, Linear(), data, results=tmp_path / "r.csv")
    with pytest.raises(UsageError, match="needs a `results` file"):
        search(run, Linear(), data, resume=True)
    with pytest.raises(OutputError, match="does not exist"):
        search(run, Linear(), data, results=tmp_path / "none" / "r.json")
    assert not data.reads
