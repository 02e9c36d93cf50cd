"""Which candidates ``ckptavg eval`` scores: of several entries of a file, with stale statistics."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result
from command_line import FACTORIES, network
from torch import nn

from ckptavg.cli import main

SCORED = ("--model", "net.py:model", "--device", "cpu", "--data", "net.py:data")
TRAIN = ("--train-data", "net.py:data", "--train-data-arg", "seed=1")


def state(seed: int) -> dict[str, torch.Tensor]:
    torch.manual_seed(seed)
    return network().state_dict()


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run whose files hold weights, their moving average, and it once more below ``swa``."""
    (tmp_path / "net.py").write_text(FACTORIES)
    (tmp_path / "run").mkdir()
    for epoch in range(1, 4):
        ema = state(epoch + 10)
        saved = {"epoch": epoch, "state_dict": state(epoch), "state_dict_ema": ema,
                 "swa": {"model": state(epoch + 20)}}  # fmt: skip
        torch.save(saved, tmp_path / "run" / f"epoch_{epoch}.pt")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def ckptavg(*args: object) -> Result:
    return CliRunner().invoke(main, ["eval", *(str(arg) for arg in args), *SCORED])


def scores(*args: object) -> dict[tuple[str, str], dict[str, float]]:
    result = ckptavg(*args, "--json")
    assert result.exit_code == 0, result.output
    candidates: list[dict[str, Any]] = json.loads(result.stdout)["candidates"]
    named = {(c["name"], c["bn"]): c["metrics"] for c in candidates}
    assert len(named) == len(candidates)
    return named


def errors(result: Result, code: int) -> str:
    assert result.exit_code == code, result.output
    return result.stderr.strip().splitlines()[-1]


OPTIONS = ("--run", "run", *TRAIN, "--each", "--compare", "fge", "--last", 2, "--also", "b=linear")


@pytest.mark.parametrize(
    "keys", [["state_dict", "state_dict_ema"], ["state_dict_ema", "swa.model", "state_dict"]]
)
def test_each_key_has_the_candidates_that_it_has_alone(home: Path, keys: list[str]) -> None:
    args = ("run/epoch_1.pt", *OPTIONS)
    together = scores(*args, *(part for key in keys for part in ("--key", key)))
    alone: dict[tuple[str, str], dict[str, float]] = {}
    for key in keys:
        found = scores(*args, "--key", key)
        assert len(found) == 8
        alone |= {(f"{name} [{key}]", bn): metrics for (name, bn), metrics in found.items()}
    assert list(together) == list(alone)
    for name, metrics in together.items():
        assert metrics == pytest.approx(alone[name], abs=1e-6)
    assert len({metrics["nll"] for metrics in together.values()}) == len(together)


def test_the_last_checkpoint_of_the_first_key_is_the_reference(home: Path) -> None:
    result = ckptavg("--run", "run", "--key", "state_dict", "--key", "state_dict_ema")
    assert result.exit_code == 0, result.output
    assert "Δ: less epoch_3.pt (last) [state_dict] on the same samples" in result.stdout


def test_a_key_that_is_given_once_or_twice_alike_names_nothing(home: Path) -> None:
    once = ckptavg("--run", "run", "--key", "state_dict")
    assert once.stdout == ckptavg("--run", "run", *("--key", "state_dict") * 2).stdout
    assert "[state_dict]" not in once.stdout


def test_notes_on_several_entries_come_once(home: Path) -> None:
    result = ckptavg("--run", "run", "--key", "state_dict", "--key", "state_dict_ema")
    notes = [line for line in result.stderr.splitlines() if line.startswith("note: ")]
    assert notes
    assert len({*notes}) == len(notes)


def test_an_entry_that_is_not_there_is_an_error_that_names_the_entries(home: Path) -> None:
    result = ckptavg("run/epoch_1.pt", "--key", "state_dict", "--key", "ema")
    assert "state_dict_ema" in errors(result, 1)


def test_results_of_several_keys_are_kept_and_resumed(home: Path) -> None:
    keys = ("--key", "state_dict", "--key", "state_dict_ema", "--results", "r.json")
    first = ckptavg("--run", "run", *keys)
    again = ckptavg("--run", "run", *keys, "--resume")
    assert again.stdout == first.stdout
    assert "4 of 4 candidates" in again.stderr


def test_stale_averages_are_left_out_where_recomputed_ones_stand(home: Path) -> None:
    whole = scores(*OPTIONS)
    assert [bn for _, bn in whole].count("stale") == 2
    shown = scores(*OPTIONS, "--no-stale")
    assert shown == {key: metrics for key, metrics in whole.items() if key[1] != "stale"}


def test_without_batchnorm_an_average_is_never_left_out(home: Path) -> None:
    net = FACTORIES.replace("nn.BatchNorm1d(4)", "nn.ReLU()")
    (home / "net.py").write_text(net)
    for epoch in range(1, 4):
        layers = (nn.Flatten(), nn.Linear(8, 4), nn.ReLU(), nn.Linear(4, 3))
        torch.save(nn.Sequential(*layers).state_dict(), home / "run" / f"epoch_{epoch}.pt")
    names = scores("--run", "run", *TRAIN, "--no-stale")
    assert list(names) == [("epoch_3.pt (last)", "none"), ("average of 3 (uniform)", "none")]


def test_no_stale_needs_what_statistics_are_recomputed_from(home: Path) -> None:
    assert "--train-data" in errors(ckptavg("--run", "run", "--no-stale"), 2)
    assert "--train-data" in errors(ckptavg("run/epoch_1.pt", "--no-stale"), 2)
