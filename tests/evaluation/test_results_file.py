"""The file that keeps the scores of candidates."""

import csv
import json
import os
import threading

import pytest
from helpers import listing
from hypothesis import given, settings
from hypothesis import strategies as st

from ckptavg.errors import OutputError
from ckptavg.evaluation.results_file import ResultsFile
from ckptavg.io import lock, temporaries


def result(key, name="x", **metrics):
    return {
        "name": name, "kind": "checkpoint", "checkpoints": [f"{name}.pt"], "coefficients": [1.0],
        "metrics": metrics or {"top1": 50.0}, "bn": "own", "forwards": 1, "key": key,
    }  # fmt: skip


def held(path):
    if path.suffix == ".json":
        return json.loads(path.read_text())["candidates"]
    with path.open(newline="") as file:
        return [*csv.DictReader(file)]


def keys(path):
    return [entry["key"] for entry in held(path)]


@pytest.fixture(params=["r.json", "r.csv"])
def path(request, tmp_path):
    return tmp_path / request.param


def test_results_file_replaces_results_by_key(path):
    file = ResultsFile(path)
    assert file.merge([result("a"), result("b", top1=1.0)]) == 0
    assert ResultsFile(path).merge([result("c", other=2.0)]) == 2
    assert ResultsFile(path).merge([result("b", top1=3.0), result("d")]) == 2
    assert keys(path) == ["a", "c", "b", "d"]
    figures = held(path)[2].get("metrics", held(path)[2])
    assert float(figures["top1"]) == 3.0
    assert [p.name for p in path.parent.iterdir()] == [path.name]


@given(st.lists(st.lists(st.sampled_from("abcdef"), max_size=4), max_size=5))
@settings(max_examples=25, deadline=None)
def test_results_file_loses_no_result(tmp_path_factory, calls):
    path = tmp_path_factory.mktemp("r") / "r.json"
    for number, names in enumerate(calls):
        ResultsFile(path).merge([result(key, call=number) for key in names])
    last = {key: number for number, names in enumerate(calls) for key in names}
    if calls:
        assert {e["key"]: e["metrics"]["call"] for e in held(path)} == last


def merge_at_once(path, writers=8, times=5):
    def work(writer):
        for i in range(times):
            ResultsFile(path).merge([result(f"{writer}.{j}") for j in range(i + 1)])

    threads = [threading.Thread(target=work, args=(writer,)) for writer in range(writers)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return sorted(f"{writer}.{j}" for writer in range(writers) for j in range(times))


def test_results_file_keeps_results_of_concurrent_runs(tmp_path):
    path = tmp_path / "r.json"
    expected = merge_at_once(path)
    assert sorted(keys(path)) == expected
    assert listing(tmp_path) == ["r.json"]


def test_results_file_is_written_without_locks(tmp_path, monkeypatch):
    monkeypatch.setattr(temporaries, "lock", lambda *_: None)
    path = tmp_path / "r.json"
    for key in "abc":
        ResultsFile(path).merge([result(key)])
    assert keys(path) == ["a", "b", "c"]
    assert listing(tmp_path) == ["r.json"]


def test_results_file_does_not_wait_forever_for_a_lock(tmp_path, monkeypatch):
    monkeypatch.setattr(lock, "_PATIENCE", 0.05)
    path = tmp_path / "r.json"
    with lock.lock_beside(path):
        ResultsFile(path).merge([result("a")])
        assert keys(path) == ["a"]
        assert len(listing(tmp_path)) == 2
    assert listing(tmp_path) == ["r.json"]


def test_results_file_takes_over_an_abandoned_lock(tmp_path):
    (tmp_path / ".r.json.ckptavg-lock").touch()
    ResultsFile(tmp_path / "r.json").merge([result("a")])
    assert listing(tmp_path) == ["r.json"]


STRANGERS = {
    "r.json": ['{"lr": 0.1}', "[]", "{", "3", "\xff", '{"candidates": [{"votes": 3}]}', "[" * 10**5,
               '{"candidates": [], "candidates": []}'],
    "r.csv": ["epoch,loss\n1,2\n", "text", "name,kind\nx,y\n", "\0", '"', "\xff",
              "name,kind,checkpoints,coefficients\nx,checkpoint,a.pt,1,more\n"],
}  # fmt: skip


@pytest.mark.parametrize(("name", "text"), [(n, t) for n, ts in STRANGERS.items() for t in ts])
def test_results_file_refuses_other_content(tmp_path, name, text):
    path = tmp_path / name
    path.write_bytes(text.encode("latin-1"))
    for refused in (ResultsFile(path).check, lambda: ResultsFile(path).merge([result("a")])):
        with pytest.raises(OutputError, match=r"does not hold results.*another file"):
            refused()
    assert path.read_bytes() == text.encode("latin-1")
    assert listing(tmp_path) == [name]


def test_results_file_keeps_other_entries(tmp_path):
    path = tmp_path / "r.json"
    path.write_text('{"note": "mine", "candidates": []}')
    ResultsFile(path).merge([result("a")])
    assert json.loads(path.read_text()) == {"note": "mine", "candidates": [result("a")]}


def test_results_file_may_be_empty(path):
    path.touch()
    ResultsFile(path).check()
    ResultsFile(path).merge([result("a")])
    assert keys(path) == ["a"]


def test_results_file_follows_a_link(path):
    target = path.parent / f"elsewhere{path.suffix}"
    path.symlink_to(target)
    ResultsFile(path).check()
    ResultsFile(path).merge([result("a")])
    assert path.is_symlink()
    assert keys(target) == ["a"]


def test_results_file_replaces_rows_without_keys_by_name(tmp_path):
    path = tmp_path / "r.csv"
    path.write_text("name,kind,checkpoints,coefficients,top1\nx,checkpoint,x.pt,1,2\n"
                    "y,checkpoint,y.pt,1,3\n")  # fmt: skip
    ResultsFile(path).merge([result("a", "x")])
    assert [(row["name"], row["key"]) for row in held(path)] == [("y", ""), ("x", "a")]


def test_results_file_reads_long_rows(tmp_path):
    path = tmp_path / "r.csv"
    long = result("a") | {"checkpoints": [f"{'x' * 90}{i}.pt" for i in range(2000)]}
    ResultsFile(path).merge([long])
    limit = csv.field_size_limit()
    assert ResultsFile(path).merge([result("b")]) == 1
    assert csv.field_size_limit() == limit


def test_results_file_hides_secrets_and_escapes_controls(path):
    name = "https://me:secret@host/w\u202e.pt?sig=secret"
    ResultsFile(path).merge([result("a", name)])
    text = path.read_text()
    assert "secret" not in text
    assert "\u202e" not in text
    assert r"\u202e" in text


@pytest.mark.parametrize(
    ("name", "words"),
    [("nowhere/r.json", "does not exist"), ("pipe.json", "not a regular file"),
     ("x" * 300 + ".json", "too long"), ("loop.json", "symbolic links"),
     ("file/r.json", "does not exist")],
)  # fmt: skip
def test_results_file_check_refuses_unusable_paths(tmp_path, name, words):
    os.mkfifo(tmp_path / "pipe.json")
    (tmp_path / "loop.json").symlink_to("loop.json")
    (tmp_path / "file").touch()
    before = listing(tmp_path)
    with pytest.raises(OutputError, match=words) as caught:
        ResultsFile(tmp_path / name).check()
    assert caught.value.remedy
    assert listing(tmp_path) == before


def test_results_file_survives_a_full_disk(tmp_path, monkeypatch):
    path = tmp_path / "r.json"
    ResultsFile(path).merge([result("a")])
    full = OSError(28, "No space left on device")
    monkeypatch.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(full))
    with pytest.raises(OutputError, match=r"disk ran full while .*r\.json"):
        ResultsFile(path).merge([result("b")])
    assert keys(path) == ["a"]
    assert listing(tmp_path) == ["r.json"]
