"""``ckptavg plot plane`` and ``ckptavg plot pca``."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from command_line import ckptavg, one_line_error
from launching import launch, run_alone

from ckptavg.landscape.landscape import Landscape

OWN = ["--model", "net.py:model", "--data", "net.py:data"]
TRAINED = [*OWN, "--train-data", "net.py:data", "--train-data-arg", "seed=1"]
SMALL = ["--points", "3"]


def test_plot_plane_prints_marked_points_and_stores_all(home: Path) -> None:
    result = ckptavg(
        "plot", "plane", "run", *TRAINED, *SMALL, "--weight-decay", "5e-4", "--results", "p.json"
    )
    assert result.exit_code == 0, result.output
    lines = result.stdout.splitlines()
    assert lines[0] == "the plane through first, middle, last; values are exact"
    assert " ".join(lines[1].split()) == "point step x y distance top-1 % NLL ECE train loss + L2"
    assert [line.split()[0] for line in lines[3:8]] == [f"epoch_{i}.pt" for i in range(1, 5)] + [
        "average"
    ]
    stored = json.loads(Path("p.json").read_text())
    assert len(stored["points"]) == 9
    assert stored["kind"] == "plane"


def test_plot_plane_json_has_the_promised_shape(home: Path) -> None:
    shown = json.loads(ckptavg("plot", "plane", "run", *TRAINED, *SMALL, "--json").stdout)
    assert shown["units"]["top1"] == "%"
    assert {"x", "y", "coefficients", "data", "train"} <= shown["points"][0].keys()
    wanted = {"path", "step", "lr", "x", "y", "distance", "data"}
    assert all(wanted <= mark.keys() for mark in shown["checkpoints"])


def test_plot_plane_scores_what_eval_scores(home: Path) -> None:
    shown = json.loads(ckptavg("plot", "plane", "run", *TRAINED, *SMALL, "--json").stdout)
    paths = [mark["path"] for mark in shown["checkpoints"]]
    scored = json.loads(ckptavg("eval", *paths, *OWN, "--json").stdout)["candidates"]
    assert [mark["data"] for mark in shown["checkpoints"]] == [c["metrics"] for c in scored]


def test_plot_plane_continues_a_file(home: Path) -> None:
    command = ["plot", "plane", "run", *TRAINED, "--results", "p.json"]
    ckptavg(*command, *SMALL)
    result = ckptavg(*command, "--points", "5", "--resume")
    assert "14 of 30 points are in p.json" in result.stderr
    again = ckptavg(*command, "--points", "5", "--resume")
    assert "30 of 30 points are in p.json" in again.stderr
    assert again.stdout == result.stdout


def test_plot_plane_scores_anew_with_other_options(home: Path) -> None:
    command = ["plot", "plane", "run", *TRAINED, *SMALL, "--results", "p.json"]
    ckptavg(*command)
    result = ckptavg(*command, "--resume", "--batch-size", "7")
    assert "p.json holds points of other weights, data or options" in result.stderr


def test_plot_pca_prints_the_share_of_variance(home: Path) -> None:
    result = ckptavg("plot", "pca", "run", *TRAINED, *SMALL)
    assert result.exit_code == 0, result.output
    assert result.stdout.startswith("principal components with 4")
    assert "% of the variance" in result.stdout


def test_plot_plane_without_training_data_says_what_that_means(home: Path) -> None:
    result = ckptavg("plot", "plane", "run", *OWN, *SMALL)
    assert result.exit_code == 0, result.output
    assert "stale: pass --train-data to recompute them" in result.stderr.replace("\n", " ")
    assert "train loss" not in result.stdout


def test_plot_plane_tells_the_time_on_stderr(home: Path) -> None:
    result = ckptavg("plot", "plane", "run", *TRAINED, "--points", "5", "--json")
    assert "note: 30 points in about 3 passes over the data, at most about" in result.stderr
    assert "at most about" not in json.loads(result.stdout)["notes"]


@pytest.mark.parametrize(
    ("flags", "code", "text"),
    [
        (["--through", "frist,middle,last"], 2, "Did you mean first?"),
        (["--through", "first,last"], 2, "--through is expected to name three points"),
        (["--through", "first,last,"], 2, "--through is expected to name three points"),
        (["--points", "1"], 2, "--points"),
        (["--last", "2"], 2, "the run has 2 checkpoints"),
        (["--last", "2", "--through", "first,last,average"], 2, "on a line"),
        (["-o", "p.gif"], 2, "p.gif"),
        (["-o", "no/p.png"], 1, "the directory no does not exist"),
        (["--results", "no/p.json"], 1, "the directory no does not exist"),
        (["--results", "net.json"], 1, "net.json is not replaced"),
        (["--resume"], 2, "--resume needs"),
    ],
)
def test_plot_plane_errors_are_a_line(home: Path, flags: list[str], code: int, text: str) -> None:
    Path("net.json").write_text("[1]")
    assert text in one_line_error(ckptavg("plot", "plane", "run", *TRAINED, *SMALL, *flags), code)
    assert not list(Path().glob("p.*"))


def test_weight_decay_needs_training_data(home: Path) -> None:
    result = ckptavg("plot", "plane", "run", *OWN, "--weight-decay", "1e-4")
    assert "needs --train-data" in one_line_error(result, 2)


@pytest.mark.parametrize("args", [["plot", "--help"], ["plot", "plane", "-h"]])
def test_plot_help_does_not_import_torch(args: list[str]) -> None:
    code = (
        "import sys; from ckptavg.cli import main; main(sys.argv[1:], standalone_mode=False); "
        "assert 'torch' not in sys.modules and 'matplotlib' not in sys.modules"
    )
    command = [sys.executable, "-c", code, *args]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "plane" in done.stdout


def test_plot_plane_help_shows_the_essentials_first() -> None:
    first_screen = "\n".join(ckptavg("plot", "plane", "--help").stdout.splitlines()[:24])
    for text in ("--model", "--data", "--train-data", "--weight-decay", "-o", "--through"):
        assert text in first_screen


def test_plot_plane_that_is_interrupted_keeps_what_was_scored(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save = Landscape.save

    def interrupt(self: Landscape, path: Path) -> None:
        save(self, path)
        raise KeyboardInterrupt

    command = ["plot", "plane", "run", *TRAINED, "--points", "5", "--results", "p.json"]
    with monkeypatch.context() as patch:
        patch.setattr(Landscape, "save", interrupt)
        result = ckptavg(*command, "-o", "p.svg")
    assert result.exit_code == 130
    last = result.stderr.splitlines()[-1]
    assert last == "Interrupted: p.svg and p.json had been written."
    assert Path("p.svg").read_text().startswith("<?xml")
    assert len(json.loads(Path("p.json").read_text())["points"]) == 5
    result = ckptavg(*command, "--resume")
    assert "9 of 30 points are in p.json" in result.stderr
    whole = json.loads(Path("p.json").read_text())["points"]
    ckptavg(*command[:-1], "whole.json")
    assert json.loads(Path("whole.json").read_text())["points"] == whole


@pytest.mark.slow
def test_plot_plane_is_the_same_for_any_number_of_processes(home: Path) -> None:
    command = ["plot", "plane", "run", *TRAINED, "--batch-size", "8", "--weight-decay", "1e-3"]
    alone = json.loads(run_alone(*command, *SMALL, "--json"))
    together = [*command, "--results", "p.json", "--json"]
    calls = [[*together, *SMALL], [*together, "--points", "5", "--resume"]]
    first, resumed = launch("plane", [{"args": args} for args in calls], count=2)
    assert [result["code"] for result in (*first, *resumed)] == [0] * 4
    assert not first[1]["out"]
    shown = json.loads(first[0]["out"])
    for wanted, point in zip(alone["points"], shown["points"], strict=True):
        for data in ("data", "train"):
            assert point[data] == pytest.approx(wanted[data], rel=1e-6)
    assert "14 of 30 points are in p.json" in resumed[0]["err"]


@pytest.mark.slow
def test_plot_plane_has_a_hole_where_any_process_meets_one(home: Path) -> None:
    """The sample that makes NaN is in the last batch, which a single process gets."""
    Path("bad.py").write_text(
        "import torch\n"
        "from net import data as others, model as network\n"
        "class Bad(torch.nn.Module):\n"
        "    def __init__(self):\n"
        "        super().__init__()\n"
        "        self.inner = network()\n"
        "        self.load_state_dict = self.inner.load_state_dict\n"
        "        self.state_dict = self.inner.state_dict\n"
        "    def forward(self, x):\n"
        "        outputs = self.inner(x)\n"
        "        return outputs * float('nan') if (x == 9.0).any() else outputs\n"
        "model = Bad\n"
        "def data():\n"
        "    x, y = others().tensors\n"
        "    x[-1] = 9.0\n"
        "    return torch.utils.data.TensorDataset(x, y)\n"
    )
    command = ["plot", "plane", "run", "--model", "bad.py:model", "--data", "bad.py:data"]
    flags = ["--train-data", "net.py:data", "--batch-size", "8", *SMALL]
    ((first, second),) = launch("holes", [{"args": [*command, *flags]}], count=2)
    assert [first["code"], second["code"]] == [1, 1]
    assert "the outputs are not finite at any of 14 points" in first["err"]
