"""The benchmark at sizes that take no time: it compares like with like, and its tables come out.

Nothing here depends on how long anything takes.
"""

from __future__ import annotations

import itertools
import json
import os
import runpy
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import pytest
from click.testing import CliRunner

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the benchmark is for Linux")
sys.path.insert(0, str(Path(__file__).parent))

import averaging  # noqa: E402
import bench  # noqa: E402
import checkpoints  # noqa: E402
import growing  # noqa: E402
import landscape  # noqa: E402
import machine  # noqa: E402
import measuring  # noqa: E402
import parts  # noqa: E402
import scoring  # noqa: E402
import scoring_parts  # noqa: E402
from measuring import Trial, Usage  # noqa: E402
from tables import Figure, Table, markdown, plain  # noqa: E402

from ckptavg.cli import main as ckptavg  # noqa: E402

TINY = ["--checkpoints", "3", "--gigabytes", "0.004", "--rounds", "1", "--pause", "0"]
SCRIPT = str(Path(averaging.__file__))


@pytest.mark.slow
def test_contenders_reach_same_average(tmp_path):
    stored = tmp_path / "figures.json"
    where = ["--dir", tmp_path / "room", "--json", stored]
    command = [sys.executable, SCRIPT, *TINY, "--only", "contenders", "--markdown", *where]
    printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    (table,) = json.loads(stored.read_text())["tables"]
    rows = table["rows"]
    for name in ("load and add", "AveragedModel", "mergekit"):
        if rows[name]["seconds"] == "not installed":
            assert name == "mergekit"
            continue
        assert 0 < float(rows[name]["apart"]) < 1e-6  # of float32, added in other orders
        assert rows[name]["peak"]["unit"] == "MB"
    assert rows["ckptavg"]["apart"] == ""
    assert printed.startswith("| contenders, 3 × 0.004 GB float32, warm | seconds |")
    assert all(f"\n| {name} |" in printed for name in rows)
    assert not list((tmp_path / "room").iterdir())


@pytest.mark.slow
def test_difference_finds_unequal_averages(tmp_path):
    names = checkpoints.shapes(10_000)
    for name in ("one", "other", "less"):
        checkpoints.sparse(tmp_path / name, names)
    with (tmp_path / "one").open("r+b") as file:
        file.seek(-4, os.SEEK_END)
        file.write(b"\0\0\x80\x3f")  # 1.0
    assert bench.difference(tmp_path / "one", tmp_path / "other") == 1.0
    checkpoints.sparse(tmp_path / "less", dict(list(names.items())[1:]))
    with pytest.raises(measuring.BenchmarkError, match=r"not the same tensors: \['wte"):
        bench.difference(tmp_path / "one", tmp_path / "less")


@pytest.fixture
def written(monkeypatch):
    """Runs ckptavg here, as a process each would take long; returns what every run wrote."""
    outputs = []

    def run(command, foreign=False):
        arguments = list(map(str, command))
        if arguments[1] == str(bench.DATA):
            monkeypatch.setattr(sys, "argv", arguments[1:])
            checkpoints.main()
        elif arguments[1].endswith("growing.py"):
            growing.main(*arguments[2:])
        elif "ckptavg" in arguments:
            arguments = arguments[arguments.index("ckptavg") + 1 :]
            result = CliRunner().invoke(ckptavg, arguments)
            assert result.exit_code == 0, result.output
            out = Path(arguments[arguments.index("-o") + 1])
            outputs.append((out.name, measuring.size(measuring.files([out]))))
            return Usage(2.0, 300_000_000)
        return Usage(1.0, 200_000_000)

    monkeypatch.setattr(measuring, "run", run)
    monkeypatch.setattr(measuring, "floor", lambda inputs, outputs: Usage(0.5))
    monkeypatch.setattr(parts, "check_cold", lambda inputs: None)
    return outputs


def measured(name, tmp_path):
    stored = tmp_path / "figures.json"
    room = tmp_path / "room"
    assert averaging.main([*TINY, "--only", name, "--dir", str(room), "--json", str(stored)]) == 0
    assert not list(room.iterdir())
    (table,) = json.loads(stored.read_text())["tables"]
    return table["rows"]


@pytest.mark.slow
def test_speed_excludes_import(written, tmp_path):
    rows = measured("speed", tmp_path)
    assert len(rows) == 3 * len(parts.SPEED_GOALS)
    row = rows["float32, against the floor"]
    assert row["time"]["median"] == 2.0  # (2.0 s - 1.0 s) / 0.5 s
    assert (row["time"]["goal"], row["time"]["met"]) == (1.5, False)
    assert rows["bfloat16, against the floor"]["time"]["met"]
    assert rows["float16, from .pt, against safetensors"]["time"]["median"] == 1.0
    assert {name for name, _ in written} == {"average.safetensors", "average.pt"}
    assert all(size == pytest.approx(4e6, rel=0.05) for _, size in written)


def test_cold_evicts_inputs_before_each_run(written, tmp_path, monkeypatch):
    evicted = []
    monkeypatch.setattr(measuring, "cold", lambda inputs: evicted.append(len(inputs)))
    rows = measured("cold", tmp_path)
    assert len(rows) == 4
    assert evicted == [0, 3, 3] * 4  # import torch, the floor, ckptavg


@pytest.mark.slow
def test_memory_excludes_import(written, tmp_path):
    rows = measured("memory", tmp_path)
    assert {row["peak"]["median"] for row in rows.values()} == {100.0}
    assert all(row["peak"]["met"] for row in rows.values())
    assert [name for name, _ in written].count("average") == 2  # directories of shards
    assert all(size == pytest.approx(4e6, rel=0.05) for _, size in written)


def test_growth_measures_doubling_runs(written, tmp_path):
    *sizes, extremes = measured("growth", tmp_path).items()
    assert len(sizes) == 5
    gigabytes = [float(name.split(" GB")[0]) for name, _ in sizes]
    assert gigabytes[-1] == pytest.approx(0.024, rel=0.05)  # twice that of three checkpoints
    for less, more in itertools.pairwise(gigabytes):
        assert more / less == pytest.approx(2, rel=0.15)
    for amount, (_, row) in zip(gigabytes, sizes, strict=True):
        assert row["floor"]["median"] == pytest.approx(0.5 / amount, rel=0.01)  # 0.5 s each, here
        assert row["ckptavg"]["median"] > 0
    medians = [row["ckptavg"]["median"] for _, row in sizes]
    dearest = extremes[1]["seconds a GB"]["median"]
    assert dearest == pytest.approx(max(medians) / min(medians))


@pytest.mark.slow
def test_many_compares_with_many_runs_and_one(written, tmp_path):
    rows = measured("many", tmp_path)
    assert rows["warm, against 16 runs"]["time"]["median"] == pytest.approx(1 / 16)
    assert rows["cold less its further writes, against one run"]["time"]["median"] == 0.5
    assert {name for name, _ in written} > {"last1.safetensors", "last16.safetensors"}


SMALL = [
    "--model", "shufflenet_v2_x0_5", "--crop", "64", "--pixels", "96x80", "--images", "8",
    "--checkpoints", "2", "--candidates", "2", "--workers", "0", "--device", "cpu",
    "--pause", "0",
]  # fmt: skip
SCORING = str(Path(scoring.__file__))


def scored(arguments, tmp_path):
    """Runs the command as one would; returns its tables, and what it printed."""
    stored, room = tmp_path / "figures.json", tmp_path / "room"
    command = [sys.executable, SCORING, *SMALL, *arguments, "--dir", room, "--json", stored]
    done = subprocess.run(list(map(str, command)), check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert not list(room.iterdir())
    return json.loads(stored.read_text()), done.stdout


@pytest.mark.slow
def test_scoring_contenders_reach_same_scores(tmp_path):
    """With a single batch, the mean of the batches' variances is the population's."""
    arguments = ["--only", "candidates", "--batch-size", "8", "--rounds", "1", "--markdown"]
    stored, printed = scored(arguments, tmp_path)
    (table,) = stored["tables"]
    rows = table["rows"]
    assert set(stored["machine"]) >= {"CPU", "cores", "torch", "torchvision", "Linux"}
    assert printed.startswith("| K averages, BatchNorm recomputed and scored: shufflenet_v2_x0_5")
    assert all(f"\n| {name} |" in printed for name in rows)
    assert rows["decoding twice, no model"]["seconds"]["median"] > 0
    one = rows["K = 2, update_bn, one by one"]
    assert float(one["NLL apart"]) < 1e-4
    assert one["top-1 apart"] == "0 points"
    assert one["ckptavg is faster by"]["goal"] is None  # that is for eight
    for row in (rows["K = 2, ckptavg"], one):
        assert row["seconds"]["median"] > 0
        assert row["peak"]["unit"] == "MB"


@pytest.fixture
def scripts(monkeypatch):
    """Runs the benchmark's scripts here, as a process each would take long; returns their names."""
    ran = []
    monkeypatch.syspath_prepend(str(Path(scoring.__file__).parent / "contenders"))

    def run(command, foreign=False):
        _, script, *arguments = map(str, command)
        ran.append((Path(script).stem, *arguments[2:]))
        monkeypatch.setattr(sys, "argv", [script, *arguments])
        runpy.run_path(script, run_name="__main__")
        return Usage(0.0)

    monkeypatch.setattr(measuring, "run", run)
    monkeypatch.setattr(scoring, "_device", lambda _: {"device": "cpu", "about": {}})
    return ran


def scored_here(name, tmp_path, *arguments):
    stored = tmp_path / "figures.json"
    where = ["--dir", str(tmp_path / "room"), "--json", str(stored)]
    assert scoring.main([*SMALL, "--batch-size", "4", *arguments, "--only", name, *where]) == 0
    assert not list((tmp_path / "room").iterdir())
    (table,) = json.loads(stored.read_text())["tables"]
    return table


@pytest.mark.slow
@pytest.mark.parametrize("part", ["files", "memory"])
def test_planes_of_both_programs_agree(scripts, tmp_path, part):
    """Weights along axes that a script lays itself, with statistics that it computes itself."""
    stored, room = tmp_path / "figures.json", tmp_path / "room"
    arguments = ["--points", "2", "--images", "8", "-b", "4", "--pause", "0", "--device", "cpu"]
    where = ["--dir", str(room), "--json", str(stored), "--only", part]
    assert landscape.main([*arguments, *where]) == 0
    (table,) = json.loads(stored.read_text())["tables"]
    check = table["rows"]["population statistics, every 10th point"]
    assert float(check["loss apart"]) < 1e-5
    assert scripts.count(("plane_one_by_one", "torch", "1")) == 1
    assert not list(room.iterdir())


@pytest.mark.slow
def test_decoding_measures_each_count_in_each_round(scripts, tmp_path):
    arguments = ["--candidates", "2", "1", "--rounds", "2"]
    rows = scored_here("decoding", tmp_path, *arguments)["rows"]
    assert scripts.count(("bare_loader",)) == 2
    for count in ("1", "2"):
        assert scripts.count(("together", count)) == 2
        assert scripts.count(("one_by_one", count, "torch")) == 2
        row = rows[f"K = {count}, update_bn, one by one"]
        assert len(row["seconds"]["values"]) == len(row["decoding alone"]["values"]) == 2
    assert rows["fvcore, one by one"]["seconds"] == "not installed"


def test_limit_compares_rates_with_bare_forward(scripts, tmp_path):
    table = scored_here("limit", tmp_path, "--rounds", "1")
    assert "8 images in memory in batches of 4" in table["title"]
    row = table["rows"]["K = 2"]
    assert (row["share"]["goal"], row["share"]["least"]) == (85, True)
    assert row["bare forward"]["median"] > 0


@pytest.mark.filterwarnings("ignore:.*torch.jit.script:FutureWarning")  # fvcore's import
def test_statistics_compares_with_pass_and_population(scripts, tmp_path):
    rows = scored_here("statistics", tmp_path, "--rounds", "1")["rows"]
    off = {name: row.get("first layer's variance off by") for name, row in rows.items()}
    assert float(off["ckptavg.update_bn"]) < 1e-6
    assert float(off["swa_utils.update_bn"]) > 1e-4  # the images are brighter in some batches
    assert rows["ckptavg.update_bn"]["against the bare forward"]["goal"] == 1.05


def usages(*seconds):
    return [Usage(value, 3_000_000, 5_000_000) for value in seconds]


@pytest.mark.parametrize(("decoding", "goal"), [(0.6, None), (1.8, 5.0)])
def test_contest_goal_needs_dominant_decoding(decoding, goal):
    contest = scoring_parts._Contest(Namespace(device="cuda", fvcore=False), None)
    contest.scores["ckptavg, K = 8"] = [(50.0, 1.25), (25.0, 2.0)]
    contest.scores["torch, K = 8"] = [(50.0, 1.5), (37.5, 2.0)]
    found = {
        "bare loader": usages(decoding, decoding),
        "ckptavg, K = 8": usages(4.0, 5.0),
        "torch, K = 8": usages(16.0, 16.0),
    }
    ours, row = contest.rows(found, 8).values()
    assert ours["GPU peak"].median == 5.0
    assert row["decoding alone"].median == pytest.approx(8 * decoding / 16 * 100)
    assert list(row["ckptavg is faster by"].values) == [4.0, 3.2]
    assert row["ckptavg is faster by"].goal == goal
    assert row["ckptavg is faster by"].met is (None if goal is None else False)
    assert (row["top-1 apart"], row["NLL apart"]) == ("12 points", "2.5e-01")


def test_limit_rate_excludes_first_batch():
    scene = Namespace(images=100, batch_size=20)
    row = scoring_parts._limit_row(scene, {"all": [5.0], "first": [3.0], "bare": [2.0]})
    assert row["ckptavg.evaluate"].median == 40.0  # (100 - 20) / (5 s - 3 s)
    assert (row["share"].median, row["share"].met) == (80.0, False)


def refused(arguments, tmp_path, **environment):
    """What the command says when it cannot measure anything."""
    command = [sys.executable, SCORING, *arguments, "--dir", str(tmp_path / "room")]
    everything = {**os.environ, **environment}
    done = subprocess.run(command, check=False, capture_output=True, text=True, env=everything)
    assert done.returncode == 1
    assert not done.stdout
    (line,) = done.stderr.splitlines()
    return line


@pytest.mark.slow
def test_scoring_needs_torchvision(tmp_path):
    (tmp_path / "torchvision.py").write_text("raise ImportError('no such thing')")
    path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    said = refused(SMALL, tmp_path, PYTHONPATH=path)
    assert said.startswith("error: torchvision cannot be imported (no such thing): pip install")


@pytest.mark.slow
def test_scoring_on_cuda_needs_gpu(tmp_path):
    said = refused(["--device", "cuda"], tmp_path, CUDA_VISIBLE_DEVICES="")
    assert said == "error: there is no CUDA device: take --device cpu, or auto"


def test_limit_refuses_single_batch(scripts, tmp_path, capsys):
    arguments = [*SMALL, "--batch-size", "8", "--only", "limit", "--dir", str(tmp_path)]
    assert scoring.main(arguments) == 1
    assert "take more --images or a smaller --batch-size" in capsys.readouterr().err
    assert not scripts


@pytest.mark.parametrize("arguments", [["--pixels", "640"], ["--images", "0"]])
def test_scoring_refuses_impossible_sizes(arguments, capsys):
    with pytest.raises(SystemExit, match="2"):
        scoring.main(arguments)
    assert "expected" in capsys.readouterr().err


def test_averaging_refuses_sizes_beyond_disk(tmp_path, capsys):
    assert averaging.main(["--gigabytes", "1e6", "--dir", str(tmp_path)]) == 1
    said = capsys.readouterr()
    assert "GB needed: choose another --dir" in said.err
    assert not said.out
    assert not list(tmp_path.iterdir())


def test_speed_refuses_inputs_beyond_memory(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(machine, "memory", lambda _: 10**6)
    assert averaging.main([*TINY, "--only", "speed", "--dir", str(tmp_path)]) == 1
    assert "needed for files to stay warm" in capsys.readouterr().err


def test_alternate_reverses_rounds_and_drops_first(tmp_path):
    order = []

    def trial(name):
        def run():
            order.append(name)
            (tmp_path / name).touch()
            return Usage(len(order))

        return Trial(name, run)

    found = measuring.alternate(
        [trial("a"), trial("b")], 2, tmp_path, lambda _: None, lambda _: None
    )
    assert "".join(order) == "ab" + "ba" + "ab"
    assert found == {"a": [Usage(4), Usage(5)], "b": [Usage(3), Usage(6)]}
    assert not list(tmp_path.iterdir())


def test_peak_excludes_parent_and_exit():
    """Neither the parent's, which a child begins with, nor that of the end of the process."""
    at_the_end = "class End:\n    def __del__(self): bytearray(10**9)\nend = End()"
    small = measuring.run([sys.executable, "-c", at_the_end]).peak
    large = measuring.run([sys.executable, "-c", "bytearray(2 * 10**8)"]).peak
    assert small < 100e6
    assert 195e6 < large - small < 205e6


def test_peak_includes_largest_child():
    below = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'bytearray(10**8)'])"
    assert measuring.run([sys.executable, "-c", below]).peak > 100e6


def test_run_reports_failing_command():
    code = "import sys; sys.exit('no such thing')"
    with pytest.raises(measuring.BenchmarkError, match="no such thing"):
        measuring.run([sys.executable, "-c", code])


def test_floor_writes_given_sizes(tmp_path):
    written = [(tmp_path / "small", 10), (tmp_path / "large", measuring.BLOCK * 2 + 1)]
    measuring.floor([Path(__file__)], written)
    assert [path.stat().st_size for path, _ in written] == [size for _, size in written]


def test_cold_drops_files_from_page_cache(tmp_path, monkeypatch):
    path = tmp_path / "file"
    path.write_bytes(os.urandom(1 << 24))
    os.sync()
    measuring.warm([path])
    assert measuring.cached([path]) == 1
    with path.open("rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    if measuring.cached([path]) > 0.05:
        pytest.skip("this file system has no disk below it")
    measuring.warm([path])
    measuring.cold([path])
    assert measuring.cached([path]) < 0.05
    monkeypatch.setattr(measuring, "cold", measuring.warm)
    with pytest.raises(measuring.BenchmarkError, match="stay in memory"):
        parts.check_cold([path])


def test_figure_shows_median_spread_and_goal():
    figure = Figure([1.2, 3.0, 1.6], "×", 1.5)
    assert (figure.median, figure.met) == (1.6, False)
    assert figure.text() == "1.60 × (1.20–3.00)"
    assert figure.goal_text() == "≤ 1.50 ×, missed"
    assert Figure([1.5], "×", 1.5).goal_text() == "≤ 1.50 ×"
    assert Figure([4.9], "×", 5, least=True).goal_text() == "≥ 5.00 ×, missed"
    assert Figure([5.1], "×", 5, least=True).met
    assert Figure([123.4], "MB").goal_text() == ""


def test_tables_hold_every_cell_and_goal():
    table = Table("size", {"a": {"time": Figure([2.0], "s", 1.0)}, "b": {"peak": "none"}, "c": {}})
    assert markdown([table]) == (
        "| size | time | peak | goal |\n"
        "| --- | --- | --- | --- |\n"
        "| a | 2.00 s | | ≤ 1.00 s, missed |\n"
        "| b | | none | |\n"
        "| c | | | |"
    )
    assert plain([table]).splitlines()[-2].split() == ["b", "none"]
