"""The report: its page as a reader sees it, its numbers, its command, and what it refuses."""

from __future__ import annotations

import json
import re
import shlex
import signal
import subprocess
import sys
import time
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from helpers import save
from html_pages import check_inert
from torch import nn
from torch.utils.data import TensorDataset

import ckptavg
from ckptavg import Candidate, Results
from ckptavg.cli import main
from ckptavg.errors import OutputError, SpecError, UsageError
from ckptavg.evaluation.score_table import tabulate_scores
from ckptavg.plots.report import build

FACTORIES = """
import torch
from torch import nn

def model():
    return nn.Sequential(nn.Linear(8, 4), nn.BatchNorm1d(4), nn.Linear(4, 3))

def data(seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(60, 8, generator=generator)
    return torch.utils.data.TensorDataset(x, torch.randint(0, 3, (60,), generator=generator))
"""
SPECS = ["--model", "net.py:model", "--data", "net.py:data", "--data-arg", "seed=1"]
TRAIN = ["--train-data", "net.py:data"]
PLAIN = ["--figures", "none"]
HOSTILE = "<script>alert(1)<|script>\"'&amp;\u202e\x1b[31m{{ 7*7 }}$x$"


def network():
    return nn.Sequential(nn.Linear(8, 4), nn.BatchNorm1d(4), nn.Linear(4, 3))


def data(seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(60, 8, generator=generator)
    return TensorDataset(x, torch.randint(0, 3, (60,), generator=generator))


def state_of(seed):
    torch.manual_seed(seed)
    state = network().state_dict()
    return state | {"1.running_mean": torch.randn(4), "1.running_var": torch.rand(4) + 0.5}


def save_run(directory, count=4, **beside):
    for epoch in range(1, count + 1):
        save(directory / f"epoch_{epoch}.pt", state_of(epoch), epoch=epoch, **beside)


@pytest.fixture
def home(tmp_path, monkeypatch):
    (tmp_path / "net.py").write_text(FACTORIES)
    save_run(tmp_path / "run", lr=0.1)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def command(*args, code=0):
    result = CliRunner().invoke(main, ["report", *map(str, args)])
    assert result.exit_code == code, result.output
    return result


def page_of(path="r.html"):
    return check_inert(Path(path).read_text(encoding="utf-8"))


def report_python(run="run", **options):
    return ckptavg.report(run, network(), data(1), train_data=data(), **options)


def test_report_has_all_sections_and_is_inert(home):
    command("run", *SPECS, *TRAIN, "-o", "r.html")
    page = page_of()
    assert [*page.sections] == [
        "verdict", "run", "candidates", "curve", "geometry", "segment", "reliability",
        "make", "origin",
    ]  # fmt: skip
    labels = [a["aria-label"] for tag, a in page.elements if tag == "svg"]
    assert len(labels) == 4
    assert all(labels)
    assert "Learning rate0.1 throughout" in "".join(page.sections["run"].split("\n"))
    assert dict(page.elements[0][1]) == {"lang": "en"}


def test_report_numbers_are_those_of_eval(home):
    command("run", *SPECS, *PLAIN, *TRAIN, "--each", "-o", "r.html")
    run = ckptavg.open_run("run")
    candidates = [Candidate.of_checkpoint(run[-1], "epoch_4.pt (last)", recompute=True)]
    results = ckptavg.compare(
        run, network(), data(1), train_data=data(), each=True, ensemble=True, candidates=candidates
    )
    # The page has the last checkpoint with recomputed statistics below the last checkpoint.
    results = Results([*results[1:5], results[0], *results[5:]], results.task)
    table = tabulate_scores(results, results.task)
    shown = page_of().table("NLL")
    assert shown[0] == [column.title for column in table.columns]
    for row, expected in zip(shown[1:], table.rows, strict=True):
        assert [cell.removeprefix("*") for cell in row] == expected.texts


def test_report_verdict_is_that_of_the_comparison(home):
    shown = json.loads(command("run", *SPECS, *PLAIN, *TRAIN, "-o", "r.html", "--json").stdout)
    results = ckptavg.compare("run", network(), data(1), train_data=data())
    difference = results["average of 4 (uniform)"].versus.difference
    assert f"from {difference.low:+.2f} to {difference.high:+.2f}" in shown["text"]
    assert shown["text"] in page_of().sections["verdict"]


@pytest.mark.parametrize(
    "options",
    [
        [],
        TRAIN,
        [*TRAIN, "--last", "2", "--scheme", "ema:decay=0.5", "--exclude", "0.b*", "-b", "16"],
        [*TRAIN, "--weights", "1,2,3,4", "--bn-samples", "30", "--skip", "nothing here"],
        ["--from", "2", "--to", "3"],
    ],
    ids=["stale", "recomputed", "last", "weights", "steps"],
)
def test_report_command_and_code_make_the_winner(home, options):
    shown = json.loads(command("run", *SPECS, *PLAIN, *options, "-o", "r.html", "--json").stdout)
    page = page_of()
    assert page.code == [shown["command"], shown["python"]]
    program, *words = shlex.split(page.code[0])
    assert program == "ckptavg"
    made = CliRunner().invoke(main, words)
    assert made.exit_code == 0, made.output
    (scored,) = ckptavg.evaluate(["averaged.pt"], network(), data(1))
    averages = [c for c in shown["candidates"] if c["kind"] == "average"]
    assert scored.metrics["nll"] == pytest.approx(averages[-1]["metrics"]["nll"], rel=1e-5)
    assert scored.bn == averages[-1]["bn"]
    Path("averaged.pt").rename("by_command.pt")
    with pytest.warns() if scored.bn == "stale" else nullcontext():
        exec(page.code[1], {"model": network(), "train_data": data()})
    by_command, by_code = (torch.load(p)["state_dict"] for p in ("by_command.pt", "averaged.pt"))
    for name, value in by_command.items():
        assert torch.equal(value, by_code[name]), name


def shown_scores(figure):
    scores = {}
    for point in figure["points"]:
        scores[point.get("series", ""), point["x"]] = point["data"]["nll"]
    return scores


def test_report_figures_have_the_scores_of_the_figures_by_themselves(home):
    report = report_python()
    figures = json.loads(json.dumps({k: f.as_json() for k, f in report.figures.items()}))
    run = ckptavg.open_run("run")
    curve = ckptavg.curve(run, network(), data(1), train_data=data()).as_json()
    assert shown_scores(figures["curve"]) == pytest.approx(shown_scores(curve), rel=1e-6)
    assert figures["curve"]["facts"]["comparisons"] == curve["facts"]["comparisons"]
    segment = ckptavg.segment(run, network(), data(1), train_data=data(), points=11, beyond=0)
    assert shown_scores(figures["segment"]) == pytest.approx(
        shown_scores(segment.as_json()), rel=1e-6
    )


class Counting(TensorDataset):
    reads = 0

    def __getitem__(self, position):
        self.reads += 1
        return super().__getitem__(position)


def test_report_reads_the_data_once(home):
    scored, training = Counting(*data(1).tensors), Counting(*data().tensors)
    ckptavg.report("run", network(), scored, train_data=training)
    assert scored.reads == 60
    assert training.reads == 60


def test_report_points_tell_their_checkpoint_and_scores(home):
    command("run", *SPECS, *TRAIN, "-o", "r.html")
    results = ckptavg.compare("run", network(), data(1), train_data=data())
    text = Path("r.html").read_text(encoding="utf-8")
    last = results[0].metrics
    told = f"epoch_4.pt, step 4, LR 0.1, top-1 {last['top1']:.2f} %, NLL {last['nll']:.4f}"
    assert f"<title>{told}" in text.replace(" nats", "")
    assert text.count("<circle") > 30
    assert re.search(r"<title>running average, epoch_3\.pt, step 3, top-1", text)
    # The end of the segment has recomputed statistics, unlike the last checkpoint itself.
    refreshed = re.findall(r"<title>t 1, top-1 [^<]*", text)
    own = re.findall(r"<title>last, its own statistics, [^<]*", text)
    assert refreshed
    assert own
    assert all(f"{last['nll']:.4f}" in title for title in own)
    assert not any(f"{last['nll']:.4f}" in title for title in refreshed)


def test_report_shows_the_figures_that_are_asked_for(home):
    command("run", *SPECS, "-o", "r.html", "--figures", "segment")
    assert "curve" not in page_of().sections
    assert "segment" in page_of().sections
    command("run", *SPECS, "-o", "none.html", *PLAIN)
    assert "<svg" not in Path("none.html").read_text(encoding="utf-8")
    command("run", *SPECS, "-o", "x.html", "--figures", "pie", code=2)
    with pytest.raises(UsageError):
        report_python(figures="curve")


def test_report_says_which_figures_cannot_be_made(home):
    command("run", *SPECS, "-o", "r.html", "--exclude", "0.*")
    page = page_of()
    assert "segment" not in page.sections
    assert "no curve is shown" in page.sections["notes"]


def test_report_without_a_learning_rate(home):
    save_run(home / "bare", count=3)
    command("bare", *SPECS, *PLAIN, "-o", "r.html")
    assert "not recorded" in page_of().sections["run"]


def test_report_python_is_that_of_the_command(home):
    command("run", *SPECS, *TRAIN, *PLAIN, "-o", "r.html")
    report = report_python(out="python.html", figures=())
    assert str(report) in page_of().sections["verdict"]
    assert page_of("python.html").table("NLL") == page_of().table("NLL")
    assert report.html == Path("python.html").read_text(encoding="utf-8")


@pytest.mark.slow
def test_report_of_the_same_inputs_has_the_same_bytes(home):
    for name in ("a.html", "b.html"):
        command("run", *SPECS, *TRAIN, "-o", name)
    assert Path("a.html").read_bytes() == Path("b.html").read_bytes()
    command("run", *SPECS, *TRAIN, "-o", "c.html", "--date", "1 May <2026>")
    assert "1 May <2026>" in "".join(page_of("c.html").texts)


def test_report_shows_hostile_names_as_text(home):
    directory = home / HOSTILE
    save_run(directory, count=3)
    save(directory / f"{HOSTILE}_4.pt", state_of(4), epoch=4)
    save(directory / "last.pt", state_of(4), epoch=4)
    command(HOSTILE, *SPECS, "--each", "-o", "r.html", "--date", HOSTILE)
    page = page_of()
    text = "".join(page.texts)
    assert "<script>alert(1)<|script>" in text
    assert "{{ 7*7 }}" in text
    for character in ("\u202e", "\x1b"):
        assert character not in text


def test_report_removes_secrets(home):
    report = report_python(figures=(), date="https://user:word@host/x?token=1")
    assert "word@" not in report.html
    assert "token" not in report.html


def test_report_refuses_an_existing_file_before_work(home, monkeypatch):
    Path("r.html").write_text("mine")
    monkeypatch.setattr(build, "build_report", None)
    output = command("run", *SPECS, *PLAIN, "-o", "r.html", code=1).output
    assert "--overwrite" in output
    assert Path("r.html").read_text() == "mine"
    with pytest.raises(OutputError):
        report_python(out="r.html")
    command("run", *SPECS, *PLAIN, "-o", "r.txt", code=2)
    with pytest.raises(UsageError):
        report_python(out="r.txt")


def test_report_overwrites_where_asked(home):
    Path("r.html").write_text("mine")
    command("run", *SPECS, *PLAIN, "-o", "r.html", "--overwrite")
    page_of()


def test_report_leaves_nothing_half_written(home, monkeypatch):
    before = sorted(Path().iterdir())

    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("ckptavg.io.atomic._fsync", interrupt)
    with pytest.raises(KeyboardInterrupt):
        report_python(out="r.html", figures=())
    assert sorted(Path().iterdir()) == before


def test_report_of_one_checkpoint_leaves_sections_out(home):
    save_run(home / "one", count=1)
    command("one", *SPECS, "-o", "r.html")
    page = page_of()
    assert "Nothing to average" in page.sections["verdict"]
    assert "make" not in page.sections
    assert "geometry" not in page.sections
    assert "no distances are shown" in page.sections["notes"]
    assert "not recorded" in page.sections["run"]


def test_report_lists_what_is_left_out(home):
    save(home / "run" / "last.pt", state_of(4), epoch=4)
    (home / "run" / "optimizer.pt").write_bytes(b"x")
    command("run", *SPECS, *PLAIN, "-o", "r.html")
    table = page_of().table("left out")
    assert any("last.pt" in path and "repeats" in why for path, why in table[1:])
    assert any("optimizer.pt" in path for path, _ in table[1:])


def test_report_of_several_trainings(home):
    for name in ("a", f"b {HOSTILE}"):
        save_run(home / "seeds" / name, count=2)
    command(home / "seeds" / "a", home / "seeds" / f"b {HOSTILE}", *SPECS, "-o", "r.html")
    page = page_of()
    assert "2 trainings" in page.sections["run"]
    assert "<script>" in page.sections["curve"]
    command("seeds/a", f"seeds/b {HOSTILE}", *SPECS, *PLAIN, "--last", "1", "-o", "last.html")
    assert "curve" not in page_of("last.html").sections


def test_report_of_other_tasks_leaves_reliability_out(home):
    for epoch in (1, 2, 3):
        torch.manual_seed(epoch)
        save(home / "line" / f"epoch_{epoch}.pt", nn.Linear(8, 1).state_dict(), epoch=epoch)
    inputs, targets = torch.randn(40, 8), torch.randn(40, 1)
    report = ckptavg.report(
        "line", nn.Linear(8, 1), TensorDataset(inputs, targets), task="regression",
        figures=["reliability"],
    )  # fmt: skip
    page = check_inert(report.html)
    assert "reliability" not in page.sections
    assert "no reliability is shown" in page.sections["notes"]


def test_report_of_the_same_weights_leaves_the_segment_out(home):
    for epoch in (1, 2, 3):
        save(home / "same" / f"epoch_{epoch}.pt", state_of(1), epoch=epoch)
    report = ckptavg.report("same", network(), data(1), figures=["segment"])
    assert "segment" not in check_inert(report.html).sections
    assert report.verdict.outcome == "undecided"


def test_report_of_outputs_that_are_not_finite_is_the_error_of_eval(home):
    save(
        home / "run" / "epoch_4.pt", state_of(4) | {"2.bias": torch.full((3,), torch.nan)}, epoch=4
    )
    for options in ([], PLAIN):
        output = command("run", *SPECS, *options, "-o", "r.html", code=1).output
        assert "2.bias" in output
    assert not Path("r.html").exists()


def test_report_needs_its_packages_before_work(home, monkeypatch):
    monkeypatch.setitem(sys.modules, "jinja2", None)
    output = command(
        "run", "--model", "missing.py:model", "--data", "x", "-o", "r.html", code=1
    ).output
    assert "pip install jinja2" in output
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(SpecError, match="pip install"):
        ckptavg.report("missing", network(), data(1))


@pytest.mark.slow
def test_report_that_is_interrupted_writes_nothing(home):
    (home / "slow.py").write_text(
        FACTORIES + "\ndef slow():\n"
        "    import pathlib, time\n"
        "    pathlib.Path('started').touch()\n"
        "    time.sleep(300)\n"
    )
    words = ["report", "run", "--model", "slow.py:model", "--data", "slow.py:slow", "-o", "r.html"]

    def heed_interrupts():  # which a process started in the background does not
        signal.signal(signal.SIGINT, signal.SIG_DFL)

    with subprocess.Popen(
        [sys.executable, "-m", "ckptavg", *words],
        stderr=subprocess.PIPE,
        preexec_fn=heed_interrupts,  # noqa: PLW1509 - a call that takes no lock
    ) as process:
        while not Path("started").exists():
            assert process.poll() is None
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        _, message = process.communicate(timeout=240)
    assert process.returncode == 130
    assert b"nothing was written" in message
    assert not [path for path in Path().iterdir() if "r.html" in path.name]
