"""``ckptavg plot segment`` and ``rays`` in several processes."""

import json
from pathlib import Path

import pytest
from launching import launch, run_alone

TRAINED = [
    "--model", "net.py:model", "--data", "net.py:data",
    "--train-data", "net.py:data", "--train-data-arg", "seed=1", "--batch-size", "8",
]  # fmt: skip


@pytest.mark.slow
def test_plot_lines_are_the_same_for_any_number_of_processes(home: Path) -> None:
    calls = [
        ["plot", "rays", "run", *TRAINED, "--directions", "2", "--points", "3", "--json"],
        ["plot", "segment", "run", *TRAINED, "--points", "3", "--json"],
    ]
    together = launch("lines", [{"args": args} for args in calls], count=2)
    for args, (first, second) in zip(calls, together, strict=True):
        assert (first["code"], second["code"], second["out"]) == (0, 0, "")
        alone, shown = json.loads(run_alone(*args)), json.loads(first["out"])
        assert alone["facts"].get("radius") == shown["facts"].get("radius")
        for wanted, point in zip(alone["points"], shown["points"], strict=True):
            for data in ("data", "train"):
                assert point[data] == pytest.approx(wanted[data], rel=1e-6)
