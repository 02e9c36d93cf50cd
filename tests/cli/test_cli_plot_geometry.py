"""``ckptavg plot geometry``: no model, no data."""

import json

import pytest
import torch
from click.testing import CliRunner
from helpers import counted_reads, save_states

import ckptavg
from ckptavg.cli import main


@pytest.fixture
def run(tmp_path):
    generator = torch.Generator().manual_seed(0)
    save_states(tmp_path / "run", [{"w": torch.randn(50, generator=generator)} for _ in range(4)])
    return tmp_path / "run"


def plot(*arguments):
    return CliRunner().invoke(main, ["plot", "geometry", *map(str, arguments)])


def test_plot_geometry_reads_the_selection_once(run, monkeypatch):
    read = counted_reads(monkeypatch)
    result = plot(run, "--last", 3, "--json")
    assert result.exit_code == 0, result.output
    selected = ckptavg.open_run(run).last(3)
    assert read == {str(checkpoint.path): checkpoint.nbytes for checkpoint in selected}
    shown = json.loads(result.stdout)
    assert shown["kind"] == "geometry"
    assert shown["facts"]["to_mean"] == pytest.approx(ckptavg.geometry(selected).to_mean.tolist())


def test_plot_geometry_stores_its_data(run, tmp_path):
    result = plot(run, "--results", tmp_path / "g.json")
    assert result.exit_code == 0, result.output
    assert "mean cosine" in result.stdout
    assert json.loads((tmp_path / "g.json").read_text())["kind"] == "geometry"


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        (["--last", "1"], 2, "several checkpoints"),
        (["--resume"], 2, "--resume is for points to score"),
        (["-o", "g.bmp"], 2, "figures end in .png, .svg, .pdf"),
        (["--results", "missing/g.json"], 1, "the directory missing does not exist"),
        (["--metric", "acc"], 2, "--metric needs --best"),
    ],
)
def test_plot_geometry_refuses_before_it_reads(run, monkeypatch, options, code, message):
    read = counted_reads(monkeypatch)
    result = plot(run, *options)
    assert result.exit_code == code
    assert message in result.output
    assert not read
