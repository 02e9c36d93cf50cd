"""``average --hash`` and ``inspect --verify`` as a person types them."""

import json

import pytest
import torch
from click.testing import CliRunner
from command_line import ckptavg, one_line_error
from digest_rule import by_rule, flip, randoms
from helpers import save

from ckptavg.cli import main
from ckptavg.formats import open_checkpoint


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Three checkpoints under run/."""
    for i in (1, 2, 3):
        save(tmp_path / "run" / f"epoch_{i}.pt", randoms(i), epoch=i)
    monkeypatch.chdir(tmp_path)
    return tmp_path / "run"


def verified(path, *flags, code=0):
    """What ``inspect --verify --json`` tells: part and state of each."""
    result = ckptavg("inspect", path, "--verify", "--json", *flags)
    assert result.exit_code == code, result.output
    return [(f["part"], f["state"]) for f in json.loads(result.stdout)["verified"]]


def test_hash_records_digests_that_verify_checks(run):
    result = ckptavg("average", "run", "-o", "o.pt", "--hash", "--json")
    assert result.exit_code == 0, result.output
    told = json.loads(result.stdout)
    assert [c["digest"] for c in told["checkpoints"]] == [by_rule(randoms(i)) for i in (1, 2, 3)]
    recorded = open_checkpoint(run.parent / "o.pt").provenance.entries
    assert told == {**recorded, "output": "o.pt", "bytes": told["bytes"]}
    assert verified("o.pt") == [
        ("archive", "same"), ("record", "same"), ("weights", "same"), *[("input", "same")] * 3,
    ]  # fmt: skip
    result = ckptavg("inspect", "o.pt", "--verify")
    assert result.stdout.endswith("\n6 same\n")
    result = ckptavg("average", "run", "-o", "o.safetensors", "--hash")
    for shown in (result.stdout, ckptavg("inspect", "o.safetensors").stdout):
        assert f"digest of its weights: {recorded['digest']}" in shown


def test_verify_needs_an_output_with_hash(run):
    ckptavg("average", "run", "-o", "o.safetensors")
    made = open_checkpoint(run.parent / "o.safetensors").provenance.entries
    assert set(made) == {"version", "scheme", "checkpoints", "bn"}
    line = one_line_error(ckptavg("inspect", "o.safetensors", "--verify"))
    assert "nothing was recorded" in line
    assert "average --digests" in line


def test_verify_names_a_changed_input(run):
    ckptavg("average", "run", "-o", "o.safetensors", "--hash")
    weight = open_checkpoint(run / "epoch_2.pt").tensors["body.weight"]
    flip(run / "epoch_2.pt", weight.pieces[0].offset)
    result = ckptavg("inspect", "o.safetensors", "--verify")
    assert "run/epoch_2.pt (changed)" in one_line_error(result)
    assert "CHANGED" in result.stdout
    assert verified("o.safetensors", code=1) == [
        ("record", "same"), ("weights", "same"),
        ("input", "same"), ("input", "changed"), ("input", "same"),
    ]  # fmt: skip


def test_verify_names_a_changed_output(run):
    ckptavg("average", "run", "-o", "o.safetensors", "--hash")
    path = run.parent / "o.safetensors"
    flip(path, path.stat().st_size - 1)
    result = ckptavg("inspect", "o.safetensors", "--verify")
    assert "weights o.safetensors (changed)" in one_line_error(result)


def test_verify_shows_a_missing_input_without_error(run):
    ckptavg("average", "run", "-o", "o.safetensors", "--hash")
    (run / "epoch_1.pt").unlink()
    assert ("input", "not there") in verified("o.safetensors")
    result = ckptavg("inspect", "o.safetensors", "--verify")
    assert result.stdout.endswith("\n4 same, 1 not there\n")


def test_verify_checks_a_run_and_its_averages(run):
    ckptavg("average", "run", "-o", "run/swa.pt", "--hash", "--last", 2)
    assert verified("run") == [
        *[("archive", "same")] * 4, ("record", "same"), ("weights", "same"),
        *[("input", "same")] * 2,
    ]  # fmt: skip
    weight = open_checkpoint(run / "epoch_1.pt").tensors["body.weight"]
    flip(run / "epoch_1.pt", weight.pieces[0].offset)
    line = one_line_error(ckptavg("inspect", "run", "--verify"))
    assert "archive run/epoch_1.pt (changed)" in line


def test_verify_shows_files_without_a_record(run):
    ckptavg("average", "run", "-o", "run/a.safetensors", "--hash", "--last", 1)
    for path in run.glob("*.pt"):
        state = torch.load(path)["state_dict"]
        save(path.with_suffix(".safetensors"), state, epoch=path.stem[-1])
        path.unlink()
    assert verified("run") == [
        *[("weights", "nothing recorded")] * 3, ("record", "same"), ("weights", "same"),
        ("input", "not there"),
    ]  # fmt: skip


def test_hash_records_digests_of_further_averages(run):
    result = ckptavg(
        "average", "run", "-o", "all.pt", "--also", "two=uniform@last=2", "--hash", "--json"
    )
    told = json.loads(result.stdout)
    for path, made in (("all.pt", told), ("two.pt", told["also"][0])):
        assert made["digest"] == open_checkpoint(run.parent / path).provenance.digest
        assert {state for _, state in verified(path)} == {"same"}


def test_hash_covers_recomputed_statistics(home):
    result = ckptavg(
        "average", "run", "-o", "o.pt", "--hash",
        "--model", "net.py:model", "--train-data", "net.py:data", "--json",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["bn"] == "recomputed"
    state = torch.load(home / "o.pt")["state_dict"]
    assert json.loads(result.stdout)["digest"] == by_rule(state)
    assert {state for _, state in verified("o.pt")} == {"same"}


def test_verify_takes_the_key(run):
    for i in (1, 2, 3):
        torch.save({"odd": randoms(i)}, run / f"epoch_{i}.pt")
    ckptavg("average", "run", "--key", "odd", "-o", "o.ckpt", "--hash")
    assert {state for _, state in verified("o.ckpt", "--key", "odd")} == {"same"}


def test_help_names_hash_and_verify(run):
    assert "--hash" in CliRunner().invoke(main, ["average", "--help-all"]).output
    assert "--verify" in CliRunner().invoke(main, ["inspect", "-h"]).output
