"""Schemes as typed: the plan, the weights that are written, and how they were made."""

import json
import shutil

import pytest
import torch
from click.testing import CliRunner
from helpers import save

from ckptavg.cli import main
from ckptavg.formats import open_checkpoint


def ckptavg(*args):
    return CliRunner().invoke(main, list(map(str, args)))


@pytest.fixture
def snapshots(tmp_path):
    """Snapshots of two EMAs in one directory, as EDM2 names them."""
    generator = torch.Generator().manual_seed(0)
    for step in (500, 1000):
        for sigma in ("0.050", "0.100"):
            path = tmp_path / "run" / f"network-snapshot-{step:07d}-{sigma}.pt"
            save(path, {"w": torch.randn(5, generator=generator)})
    return tmp_path / "run"


WORKED = [0.00013575, -0.00242663, 0.34296904, 0.65932184]


def test_posthoc_ema_combines_snapshots_of_one_directory(snapshots, tmp_path):
    scheme, out = "posthoc-ema:sigma=0.075", tmp_path / "ema.pt"
    result = ckptavg("average", snapshots, "-o", out, "--scheme", scheme, "--json")
    assert result.exit_code == 0, result.stderr
    made = json.loads(result.stdout)
    assert made["scheme"] == scheme
    found = [checkpoint["coefficient"] for checkpoint in made["checkpoints"]]
    assert found == pytest.approx(WORKED, abs=5e-9)
    assert "sigmas of the snapshots, as recorded or named: 0.05, 0.1" in result.stderr
    assert "share the step" not in result.stderr
    expected = torch.zeros(5, dtype=torch.float64)
    for checkpoint in made["checkpoints"]:
        expected += checkpoint["coefficient"] * torch.load(checkpoint["path"])["w"].double()
    assert torch.load(out)["state_dict"]["w"] == pytest.approx(expected.float(), rel=1e-6)
    assert open_checkpoint(out).provenance.scheme == scheme


def test_uniform_still_refuses_two_series(snapshots, tmp_path):
    result = ckptavg("average", snapshots, "-o", tmp_path / "o.pt")
    assert result.exit_code == 1
    assert "holds 2 checkpoints of each step" in result.stderr


def test_posthoc_ema_takes_a_run_per_sigma(snapshots, tmp_path):
    for sigma in ("0.050", "0.100"):
        for path in snapshots.glob(f"*-{sigma}.pt"):
            target = tmp_path / f"track{sigma[2:]}" / f"step_{path.name[17:24]}.pt"
            target.parent.mkdir(exist_ok=True)
            path.rename(target)
    runs = [tmp_path / "track050", tmp_path / "track100"]
    result = ckptavg(
        "average", *runs, "-o", "o.pt", "--dry-run", "--scheme", "posthoc-ema:sigma=.1"
    )
    assert result.exit_code == 1
    assert "neither recorded nor in its name" in result.stderr
    scheme = "posthoc-ema:sigma=0.075,sigmas=0.05/0.1"
    result = ckptavg("average", *runs, "-o", "o.pt", "--dry-run", "--scheme", scheme)
    assert result.exit_code == 0, result.stderr
    shown = [line.split()[-1] for line in result.stdout.splitlines() if "step_" in line]
    expected = [WORKED[0], WORKED[2], WORKED[1], WORKED[3]]
    assert list(map(float, shown)) == pytest.approx(expected, rel=1e-4)


@pytest.fixture
def run(tmp_path):
    for epoch in range(1, 5):
        save(
            tmp_path / "run" / f"epoch_{epoch}.pt", {"w": torch.tensor([float(2 ** (epoch - 1))])},
            epoch=epoch, val_loss=1 / epoch,
        )  # fmt: skip
    return tmp_path / "run"


@pytest.mark.parametrize(
    ("scheme", "expected"),
    [
        ("wsm:decay=linear", 3.75),
        ("wsm:decay=cosine", 3.439340),
        ("wsm:decay=sqrt", 2.621685),
        ("polynomial:eta=3", 5.971429),
        ("pma:alpha=0.2", 3.008),
        ("lookahead:alpha=0.5", 5.375),
        ("power-ema:sigma=0.25", 4.861801),
        ("ema:halflife=25%", 5.375),
        ("lawa:k=50%", 6.0),
    ],
)
def test_scheme_writes_its_worked_value(run, tmp_path, scheme, expected):
    out = tmp_path / "o.pt"
    result = ckptavg("average", run, "-o", out, "--scheme", scheme)
    assert result.exit_code == 0, result.stderr
    saved = torch.load(out)
    assert saved["state_dict"]["w"].item() == pytest.approx(expected, abs=1e-6)
    assert json.loads(saved["ckptavg"])["scheme"] == scheme


def test_softmax_uses_recorded_metrics(run, tmp_path):
    scheme = "softmax:metric=val_loss,temperature=0.5"
    result = ckptavg("average", run, "-o", tmp_path / "o.pt", "--scheme", scheme)
    assert result.exit_code == 0, result.stderr
    powers = torch.exp(-2 / torch.arange(1, 5, dtype=torch.float64))
    expected = (powers / powers.sum() * torch.tensor([1, 2, 4, 8])).sum()
    found = torch.load(tmp_path / "o.pt")["state_dict"]["w"].item()
    assert found == pytest.approx(expected.item(), rel=1e-6)


@pytest.mark.parametrize(
    ("scheme", "code", "words"),
    [
        (
            "softmax:metric=val_los,temperature=1",
            1,
            "records no metric 'val_los'. Did you mean val_",
        ),
        ("softmax:metric=top1,temperature=1", 1, "It records val_loss"),
        ("softmax:metric=val_loss,temperature=0", 2, "T > 0"),
        ("power-ema:sigma=0.3", 2, "1/sqrt(12)"),
        ("posthoc-ema:sigma=0.1", 1, "Add the sigmas to the scheme"),
        ("power_ema:0.1", 2, "Did you mean power-ema:sigma=0.1?"),
    ],
)
def test_scheme_error_is_one_line_before_work(run, tmp_path, scheme, code, words):
    result = ckptavg("average", run, "-o", tmp_path / "o.pt", "--scheme", scheme)
    assert result.exit_code == code
    assert words in result.stderr.splitlines()[-1]
    assert not (tmp_path / "o.pt").exists()


@pytest.mark.parametrize(("weights", "noted"), [("-1,3", True), ("1,3", False)])
def test_negative_coefficients_are_noted_beside_running_variances(tmp_path, weights, noted):
    for epoch in (1, 2):
        layer = torch.nn.BatchNorm1d(2)
        layer.running_var += epoch
        save(tmp_path / "run" / f"epoch_{epoch}.pt", layer.state_dict())
    result = ckptavg("average", tmp_path / "run", "-o", tmp_path / "o.pt", f"--weights={weights}")
    assert result.exit_code == 0, result.stderr
    assert ("can make averaged running variances negative" in result.stderr) is noted


@pytest.mark.parametrize(
    ("definition", "shown"),
    [
        ("softmax:metric=metrics.map@50,temperature=1", "x: 4 checkpoints"),
        ("softmax:metric=metrics.map@50,temperature=1@last=2", "x: 2 checkpoints"),
        ("@last=50%,every=1", "x: 2 checkpoints, uniform"),
        ("ema:decay=0.5@at-lr-min", "x: 4 checkpoints, ema:decay=0.5"),
    ],
)
def test_also_splits_scheme_and_selection(tmp_path, definition, shown):
    for epoch in range(1, 5):
        beside = {"epoch": epoch, "lr": 0.1, "metrics": {"map@50": float(epoch)}}
        save(tmp_path / "run" / f"epoch_{epoch}.pt", {"w": torch.randn(2)}, **beside)
    options = ["--also", f"x={definition}", "--dry-run", "-o", tmp_path / "o.pt"]
    result = ckptavg("average", tmp_path / "run", *options)
    assert result.exit_code == 0, result.stderr
    assert shown in result.stdout


def test_also_names_the_words_of_a_selection(tmp_path):
    result = ckptavg("average", tmp_path, "-o", "o.pt", "--also", "x=uniform@lst=5")
    assert result.exit_code == 2
    assert "at-lr-min after @ but got 'lst=5'" in result.stderr


@pytest.mark.parametrize("scheme", ["power-ema:sigma=0.1", "ema:halflife=10%"])
def test_scheme_by_steps_takes_one_training(run, tmp_path, scheme):
    shutil.copytree(run, tmp_path / "other")
    paths = [run, tmp_path / "other"]
    result = ckptavg("average", *paths, "-o", tmp_path / "o.pt", "--scheme", scheme)
    assert result.exit_code == 1
    assert "needs the steps of one training, and those of 2 runs do not go on" in result.stderr


def test_scheme_by_steps_takes_a_training_in_two_parts(run, tmp_path):
    for epoch in (3, 4):
        (tmp_path / "rest").mkdir(exist_ok=True)
        (run / f"epoch_{epoch}.pt").rename(tmp_path / "rest" / f"epoch_{epoch}.pt")
    out = tmp_path / "o.pt"
    scheme = ["--scheme", "power-ema:sigma=0.25"]
    result = ckptavg("average", run, tmp_path / "rest", "-o", out, *scheme)
    assert result.exit_code == 0, result.stderr
    assert torch.load(out)["state_dict"]["w"].item() == pytest.approx(4.861801, abs=1e-6)


def test_posthoc_ema_combines_averages_that_are_emas(tmp_path):
    generator, weight = torch.Generator().manual_seed(0), torch.zeros(50)
    for epoch in range(1, 41):
        weight = weight + torch.randn(50, generator=generator)
        save(tmp_path / "run" / f"epoch_{epoch}.pt", {"w": weight}, epoch=epoch)
    snapshots = []
    for last in (20, 40):
        for sigma in (0.1, 0.2):
            snapshots.append(tmp_path / f"{last}-{sigma}.pt")
            options = ["--to", last, "--scheme", f"power-ema:sigma={sigma}"]
            assert (
                ckptavg("average", tmp_path / "run", "-o", snapshots[-1], *options).exit_code == 0
            )
    made = ["-o", tmp_path / "made.pt", "--scheme", "posthoc-ema:sigma=0.15"]
    result = ckptavg("average", *snapshots, *made)
    assert result.exit_code == 0, result.stderr
    assert "share the step" not in result.stderr
    direct = ["-o", tmp_path / "direct.pt", "--scheme", "power-ema:sigma=0.15"]
    ckptavg("average", tmp_path / "run", *direct)
    found, expected, last = (
        torch.load(tmp_path / name)["state_dict"]["w"]
        for name in ("made.pt", "direct.pt", "run/epoch_40.pt")
    )
    assert (found - expected).norm() < 0.05 * (last - expected).norm()
