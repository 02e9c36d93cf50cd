"""``ckptavg average --geometry``: the geometry of what is averaged, from the same read."""

import json

import pytest
import torch
from click.testing import CliRunner
from helpers import counted_reads, listing, save_states

import ckptavg
from ckptavg.cli import main


def states(count, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [
        {"w": torch.randn(3000, generator=generator), "n": torch.tensor(i)} for i in range(count)
    ]


@pytest.fixture
def home(tmp_path):
    save_states(tmp_path / "run", states(5))
    return tmp_path


def command(*arguments):
    return CliRunner().invoke(main, ["average", *map(str, arguments)])


@pytest.mark.parametrize("further", [(), ("--also", "ema=ema:decay=0.9", "--hash")])
def test_geometry_of_average_needs_no_second_read(home, monkeypatch, further):
    read = counted_reads(monkeypatch)
    out = home / "swa.pt"
    result = command(home / "run", "--last", 4, "-o", out, "--geometry", "--json", *further)
    assert result.exit_code == 0, result.output
    run = ckptavg.open_run(home / "run").last(4)
    assert read == {str(checkpoint.path): checkpoint.nbytes for checkpoint in run}
    shown = json.loads(result.stdout)["geometry"]
    expected = ckptavg.geometry(run)
    for name in ("gram", "distances", "steps", "to_mean"):
        torch.testing.assert_close(
            torch.tensor(shown[name], dtype=torch.float64), getattr(expected, name)
        )
    alone = ckptavg.average(run, out=home / "alone.pt", digests="--hash" in further)
    assert out.read_bytes() == alone.read_bytes()


def test_geometry_ignores_excluded_tensors(home):
    made = [state | {"head": torch.full((2,), 1e6 * i)} for i, state in enumerate(states(5), 1)]
    save_states(home / "run", made)
    result = command(
        home / "run", "-o", home / "swa.pt", "--exclude", "head", "--geometry", "--json"
    )
    assert max(json.loads(result.stdout)["geometry"]["norms"]) < 100


def test_geometry_has_no_step_between_trainings(home):
    save_states(home / "other", states(3, seed=1))
    result = command(home / "run", home / "other", "-o", home / "swa.pt", "--geometry")
    assert result.exit_code == 0, result.output
    measured = result.stdout.partition("geometry of the weights")[2].splitlines()
    rows = [line.split() for line in measured if line.startswith(("run/", "other/"))]
    assert [row[2] == "–" for row in rows] == [True, *[False] * 4, True, *[False] * 2]


def test_geometry_is_null_for_weights_not_finite(home):
    made = states(3)
    made[1]["w"][7] = float("inf")
    save_states(home / "bad", made)
    options = ("--on-nonfinite", "keep", "--geometry", "--json")
    result = command(home / "bad", "-o", home / "swa.pt", *options)
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["geometry"] is None
    assert "no geometry: NaN, infinite or huge weights in" in result.stderr
    assert "epoch_2.pt" in result.stderr
    assert (home / "swa.pt").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--last", "1"], "the geometry is that of several checkpoints"),
        (["--dry-run"], "--geometry and --dry-run exclude each other"),
        (
            ["--model", "x:y", "--train-data", "x:y"],
            "--geometry and --train-data exclude each other",
        ),
    ],
)
def test_geometry_refuses_other_options(home, options, message):
    before = listing(home)
    result = command(home / "run", "-o", home / "swa.pt", "--geometry", *options)
    assert result.exit_code == 2
    assert message in result.stderr
    assert listing(home) == before
