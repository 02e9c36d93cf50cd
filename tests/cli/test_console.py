"""Tables, JSON and progress, drawn on consoles that the tests own."""

from __future__ import annotations

import errno
import io
import json
import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from helpers import save
from rich.console import Console
from rich.text import Text

from ckptavg.cli import main
from ckptavg.cli.console import Report, number_text, rate_text
from ckptavg.display.tables import Cell, Column, Row, Table
from ckptavg.errors import OutputError
from ckptavg.errors.printable import size_text


def report(*, terminal: bool = False, **options: object) -> tuple[Report, io.StringIO, io.StringIO]:
    out, err = io.StringIO(), io.StringIO()
    consoles = [
        Console(file=file, force_terminal=terminal, width=100, highlight=False, _environ={})
        for file in (out, err)
    ]
    return Report(stdout=consoles[0], stderr=consoles[1], **options), out, err  # type: ignore[arg-type]


def plain(file: io.StringIO) -> str:
    return Text.from_ansi(file.getvalue()).plain


def test_table_keeps_brackets_and_aligns_numbers_right() -> None:
    drawn, out, _ = report()
    drawn.table(("name", "value"), [("[red]a[/red]", "5"), ("b", "10")], title="two [rows]")
    lines = out.getvalue().splitlines()
    assert lines[0] == "two [rows]"
    assert lines[3] == "[red]a[/red]      5"
    assert lines[4] == "b                10"


def test_table_fits_a_terminal_and_is_unlimited_elsewhere() -> None:
    rows = [(f"a_run/checkpoint-{n:03}", "w" * 30, "is left out since it repeats another") for n in
            range(9)]  # fmt: skip
    drawn, out, _ = report(terminal=True)
    drawn.table(("name", "text", "why"), rows * 2)
    assert max(map(len, plain(out).splitlines())) <= 100
    drawn, out, _ = report()
    drawn.table(("name", "text", "why"), [(f"{name}/{'x' * 300}", w, why) for name, w, why in rows])
    assert len(out.getvalue().splitlines()) == 2 + len(rows) + 1


def test_table_highlights_best_and_significant_cells() -> None:
    columns = (Column("name", "name"), Column("Δ", "number"))
    rows = (Row((Cell("a"), Cell("1"))), Row((Cell("b", "best"), Cell("2", "significant")), True))
    drawn, out, _ = report(terminal=True)
    drawn.draw(Table("", columns, rows, significance="bold Δ: p < 0.05"))
    assert "\x1b[1;35mb" in out.getvalue()
    assert "\x1b[1m2\x1b[0m" in out.getvalue()
    assert plain(out).splitlines()[2:] == ["  a     1", "* b     2", "", "bold Δ: p < 0.05", ""]
    drawn, out, _ = report()
    drawn.draw(Table("", columns, rows, significance="bold Δ: p < 0.05"))
    assert out.getvalue().splitlines()[2:] == ["  a     1", "* b     2", ""]


def test_force_color_does_not_make_a_pipe_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("FORCE_COLOR", "COLUMNS"):
        monkeypatch.setenv(name, "40")
    out, err = io.StringIO(), io.StringIO()
    monkeypatch.setattr(sys, "stdout", out)
    monkeypatch.setattr(sys, "stderr", err)
    drawn = Report()
    drawn.table(("name",), [("x" * 300,)], title="t " * 200)
    with drawn.notes(), drawn.samples_progress() as progress:
        logging.getLogger("ckptavg").info("a b " * 100)
        progress("BatchNorm", 1, 2)
    assert len(out.getvalue().splitlines()) == 5
    assert "\x1b[1m" in out.getvalue()
    assert len(err.getvalue().splitlines()) == 1
    assert "BatchNorm" not in err.getvalue()


def test_table_needs_no_unicode(monkeypatch: pytest.MonkeyPatch) -> None:
    out = io.TextIOWrapper(io.BytesIO(), "ascii")
    monkeypatch.setattr(sys, "stdout", out)
    Report().table(("a",), [("–",)])
    assert out.buffer.getvalue().decode().splitlines() == ["a", "-", "-", ""]  # type: ignore[attr-defined]


def test_notes_keep_words_whole_and_appear_once() -> None:
    text = "layers.8.num_batches_tracked differs between checkpoints: it is the last one's, " * 2
    drawn, _, err = report(terminal=True)
    with drawn.notes():
        for _ in range(2):
            logging.getLogger("ckptavg").info(text.strip())
    lines = plain(err).splitlines()
    assert len(lines) == 2
    assert " ".join(line.strip() for line in lines) == f"note: {text.strip()}"
    assert lines[1].startswith("  ")
    drawn, _, err = report()
    with drawn.notes():
        logging.getLogger("ckptavg").info(text.strip())
    assert err.getvalue() == f"note: {text.strip()}\n"


def test_json_replaces_tables() -> None:
    drawn, out, _ = report(as_json=True)
    drawn.table(("a",), [("1",)])
    drawn.line("text")
    drawn.result({"x": [1, "ü"]})
    assert json.loads(out.getvalue()) == {"x": [1, "ü"]}


def test_result_is_silent_without_json() -> None:
    drawn, out, _ = report()
    drawn.result({"x": 1})
    assert out.getvalue() == ""


@pytest.mark.parametrize(
    ("verbosity", "shown"),
    [(-1, []), (0, ["note: n", "warning: w"]), (1, ["note: d", "note: n", "warning: w"])],
)
def test_notes_follow_the_verbosity(verbosity: int, shown: list[str]) -> None:
    drawn, out, err = report(verbosity=verbosity)
    log = logging.getLogger("ckptavg")
    with drawn.notes():
        log.debug("d")
        log.info("n")
        log.warning("w")
    log.warning("after the command")
    assert err.getvalue().splitlines() == shown
    assert out.getvalue() == ""


def test_progress_shows_bytes_and_rate_on_a_terminal_only() -> None:
    for terminal in (True, False):
        drawn, out, err = report(terminal=terminal)
        with drawn.bytes_progress("averaging") as progress:
            progress(0, 2_000_000)
            progress(1_000_000, 2_000_000)
        assert ("averaging" in err.getvalue()) is terminal
        assert ("2.0 MB" in err.getvalue()) is terminal
        assert out.getvalue() == ""


def test_progress_is_hidden_when_quiet() -> None:
    drawn, _, err = report(terminal=True, verbosity=-1)
    with drawn.samples_progress() as progress:
        progress("BatchNorm", 1, 2)
    assert err.getvalue() == ""


def test_progress_has_a_bar_for_each_phase() -> None:
    drawn, _, err = report(terminal=True)
    with drawn.samples_progress() as progress:
        progress("BatchNorm", 1, 0)
        progress("evaluation", 3, 4)
    assert "BatchNorm" in err.getvalue()
    assert "3/4" in err.getvalue()


def test_no_color_is_honoured(monkeypatch: pytest.MonkeyPatch) -> None:
    out = io.StringIO()
    console = Console(file=out, force_terminal=True, width=80, _environ={"NO_COLOR": "1"})
    with Report(stdout=console, stderr=console).notes():
        logging.getLogger("ckptavg").warning("careful")
    assert "\x1b[33m" not in out.getvalue()
    assert "warning: careful" in out.getvalue()


class Closed(io.StringIO):
    """A pipe whose reader has gone."""

    def __init__(self, error: OSError) -> None:
        super().__init__()
        self.error = error

    def write(self, text: str) -> int:
        raise self.error


def say_everything(drawn: Report) -> None:
    drawn.table(("a",), [("1",)], title="t")
    drawn.line("text")
    drawn.result({"x": 1})
    with drawn.notes(), drawn.samples_progress() as progress:
        logging.getLogger("ckptavg").warning("careful")
        progress("BatchNorm", 1, 2)
    drawn.remark("worse")


@pytest.mark.parametrize("as_json", [False, True])
def test_report_survives_closed_streams(monkeypatch: pytest.MonkeyPatch, as_json: bool) -> None:
    monkeypatch.setattr(sys, "stdout", Closed(BrokenPipeError(errno.EPIPE, "Broken pipe")))
    monkeypatch.setattr(sys, "stderr", Closed(OSError(errno.EIO, "Input/output error")))
    say_everything(Report(as_json=as_json))
    monkeypatch.setattr(sys, "stdout", None)
    say_everything(Report(as_json=as_json))


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no device that is always full")
def test_result_on_a_full_device_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    with open("/dev/full", "w", encoding="utf-8") as full:
        monkeypatch.setattr(sys, "stdout", full)
        with pytest.raises(OutputError, match="disk ran full while the standard output"):
            Report(as_json=True).result({"x": 1})


def test_report_escapes_characters_for_ascii(monkeypatch: pytest.MonkeyPatch) -> None:
    out = io.TextIOWrapper(io.BytesIO(), "ascii")
    monkeypatch.setattr(sys, "stdout", out)
    Report(as_json=True).result({"ü": 1})
    Report().line("– ü")
    lines = out.buffer.getvalue().decode().splitlines()  # type: ignore[attr-defined]
    assert json.loads("".join(lines[:-1])) == {"ü": 1}
    assert lines[-1] == r"\u2013 \xfc"


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1 kB"),
        (4798, "4.8 kB"),
        (3.7e9, "3.7 GB"),
        (999.4e3, "999 kB"),
        (999.6e3, "1 MB"),
        (2e12, "2 TB"),
        (4e15, "4,000 TB"),
    ],
)
def test_size_text_has_decimal_units(count: float, text: str) -> None:
    assert size_text(count) == text


@pytest.mark.parametrize(
    ("speed", "text"),
    [(0.0461, "0.0461"), (3.333, "3.33"), (42.47, "42.5"), (999.7, "1,000"), (36_651.0, "36,700")],
)
def test_rate_text_has_three_digits_and_no_exponent(speed: float, text: str) -> None:
    assert rate_text(speed) == f"{text} samples/s"


def test_number_text_is_short_and_a_dash_for_none() -> None:
    assert [number_text(x) for x in (None, 3, 0.05, 1e-7)] == ["–", "3", "0.05", "1e-07"]


@pytest.mark.parametrize("step", [0, 999_999, 1_000_000, 1_234_567, 89_999_999_999, 10**14 + 1])
@pytest.mark.parametrize("kind", [int, float])
def test_number_text_shows_steps_in_full(step, kind):
    assert number_text(kind(step)) == str(step)


def test_number_text_of_huge_numbers_is_short():
    assert [number_text(x) for x in (1e30, float("inf"), float("nan"))] == ["1e+30", "inf", "nan"]


def test_table_escapes_names_from_files(tmp_path):
    metrics = {"[/red]": 1.5, "\x1b[2J": 2.5}
    for epoch in (1, 2):
        save(tmp_path / f"epoch_{epoch}.pt", {"w": torch.zeros(1)}, epoch=epoch, **metrics)
    result = CliRunner().invoke(main, ["inspect", str(tmp_path)])
    assert result.exit_code == 0, result.output
    assert "[/red]" in result.output
    assert "\x1b" not in result.output


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="no pseudo-terminals")
def test_errors_keep_words_whole_on_a_terminal(tmp_path):
    command = [sys.executable, "-m", "ckptavg", "inspect", f"{'some_name/' * 9}{'a run of ' * 9}it"]
    piped = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False)
    reader, writer = os.openpty()
    with open(reader, "rb", buffering=0) as shown, open(writer, "wb") as terminal:
        env = os.environ | {"COLUMNS": "50"}
        subprocess.run(command, stderr=terminal, cwd=tmp_path, env=env, check=False)
        lines = shown.read(10_000).decode().splitlines()
    assert piped.stderr.startswith("Error: ")
    assert piped.stderr.count("\n") == 1
    assert len(lines) > 2
    assert " ".join(line.strip() for line in lines) == piped.stderr.strip()
    assert all(len(line) <= 50 for line in lines[1:])
