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
def test_key_options_give_candidates_of_each_alone(home: Path, keys: list[str]) -> None:
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


def test_key_options_compare_with_last_of_first_key(home: Path) -> None:
    result = ckptavg("--run", "run", "--key", "state_dict", "--key", "state_dict_ema")
    assert result.exit_code == 0, result.output
    assert "Δ: less epoch_3.pt (last) [state_dict] on the same samples" in result.stdout


def test_key_option_repeated_leaves_names_plain(home: Path) -> None:
    once = ckptavg("--run", "run", "--key", "state_dict")
    assert once.stdout == ckptavg("--run", "run", *("--key", "state_dict") * 2).stdout
    assert "[state_dict]" not in once.stdout


def test_key_options_give_each_note_once(home: Path) -> None:
    result = ckptavg("--run", "run", "--key", "state_dict", "--key", "state_dict_ema")
    notes = [line for line in result.stderr.splitlines() if line.startswith("note: ")]
    assert notes
    assert len({*notes}) == len(notes)


def test_key_option_unknown_names_the_entries(home: Path) -> None:
    result = ckptavg("run/epoch_1.pt", "--key", "state_dict", "--key", "ema")
    assert "state_dict_ema" in errors(result, 1)


def test_key_options_resume_results(home: Path) -> None:
    keys = ("--key", "state_dict", "--key", "state_dict_ema", "--results", "r.json")
    first = ckptavg("--run", "run", *keys)
    again = ckptavg("--run", "run", *keys, "--resume")
    assert again.stdout == first.stdout
    assert "4 of 4 candidates" in again.stderr


def test_no_stale_omits_averages_that_are_recomputed(home: Path) -> None:
    whole = scores(*OPTIONS)
    assert [bn for _, bn in whole].count("stale") == 2
    shown = scores(*OPTIONS, "--no-stale")
    assert shown == {key: metrics for key, metrics in whole.items() if key[1] != "stale"}


def test_no_stale_keeps_averages_without_batchnorm(home: Path) -> None:
    net = FACTORIES.replace("nn.BatchNorm1d(4)", "nn.ReLU()")
    (home / "net.py").write_text(net)
    for epoch in range(1, 4):
        layers = (nn.Flatten(), nn.Linear(8, 4), nn.ReLU(), nn.Linear(4, 3))
        torch.save(nn.Sequential(*layers).state_dict(), home / "run" / f"epoch_{epoch}.pt")
    names = scores("--run", "run", *TRAIN, "--no-stale")
    assert list(names) == [("epoch_3.pt (last)", "none"), ("average of 3 (uniform)", "none")]


def test_no_stale_needs_training_data(home: Path) -> None:
    assert "--train-data" in errors(ckptavg("--run", "run", "--no-stale"), 2)
    assert "--train-data" in errors(ckptavg("run/epoch_1.pt", "--no-stale"), 2)
