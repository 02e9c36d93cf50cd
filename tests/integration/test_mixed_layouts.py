"""One call over checkpoints of every layout at once: what counts is that the names agree."""

from __future__ import annotations

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file
from writers import WRITERS

import ckptavg
from ckptavg.cli import main

SHAPES = {"body.weight": (4, 3), "body.bias": (4,), "head.weight": (2, 4)}


def state(seed: int) -> dict[str, torch.Tensor]:
    torch.manual_seed(seed)
    return {name: torch.randn(shape) for name, shape in SHAPES.items()}


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled, unavailable")
def test_average_mixes_all_layouts(tmp_path):
    states = [state(i) for i in range(len(WRITERS))]
    paths = []
    for (name, write), values in zip(WRITERS.items(), states, strict=True):
        folder = tmp_path / name.split(".")[0]
        folder.mkdir()
        write(values, folder / name)
        paths.append(str(folder / name))
    out = tmp_path / "out.safetensors"
    result = CliRunner().invoke(main, ["average", *paths, "-o", str(out)])
    assert result.exit_code == 0, result.output
    found = load_file(out)
    assert set(found) == set(SHAPES)
    for name, tensor in found.items():
        assert torch.equal(tensor, (sum(s[name].double() for s in states) / 8).float())


def test_average_ignores_wrappers_in_names(tmp_path):
    values = state(0)
    torch.save({f"module.{n}": t for n, t in values.items()}, tmp_path / "step_1.pt")
    torch.save({f"module._orig_mod.{n}": t for n, t in values.items()}, tmp_path / "step_2.pt")
    save_file(values, tmp_path / "step_3.safetensors")
    average = ckptavg.average(ckptavg.open_run(tmp_path))
    assert set(average) == set(SHAPES)
