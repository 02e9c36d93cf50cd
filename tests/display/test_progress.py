"""Progress as callers may ask for it: bars of tqdm and rich, functions of two forms."""

from __future__ import annotations

import io

import pytest

from ckptavg.display.progress import open_phase, open_progress
from ckptavg.errors import UsageError

CALLS = [("BatchNorm", 4, 8), ("BatchNorm", 8, 8), ("evaluation", 5, 0), ("evaluation", 9, 0)]


def tell(progress, unit="samples"):
    with open_progress(progress, unit) as opened:
        for call in CALLS:
            opened(*call)


class Recorder:
    """Functions of all forms that a callback may have."""

    def __init__(self):
        self.calls = []

    def three(self, phase, done, total):
        self.calls.append((phase, done, total))

    def two(self, done, total):
        self.calls.append((done, total))

    def any(self, *call):
        self.calls.append(call)

    def more(self, phase, done, total, note=""):
        self.calls.append((phase, done, total))


@pytest.mark.parametrize("form", ["three", "two", "any", "more"])
def test_progress_function_gets_phase_where_taken(form):
    recorder = Recorder()
    tell(getattr(recorder, form))
    expected = [call[1:] for call in CALLS] if form == "two" else CALLS
    assert recorder.calls == expected


@pytest.mark.parametrize("nothing", [None, False])
def test_progress_none_shows_nothing(nothing):
    with open_progress(nothing, "bytes") as opened:
        assert opened is None
    with open_phase(nothing, "averaging", "bytes") as opened:
        assert opened is None


@pytest.mark.parametrize("unusable", [3, "yes", lambda: None, lambda a, b, c, d: None, [print]])
def test_progress_refuses_unusable_objects(unusable):
    with pytest.raises(UsageError, match="progress"):
        tell(unusable)


def test_open_phase_passes_name():
    recorder = Recorder()
    with open_phase(recorder.three, "averaging", "bytes") as told:
        told(3, 7)
    assert recorder.calls == [("averaging", 3, 7)]


def test_progress_resets_tqdm_bar_per_phase():
    tqdm = pytest.importorskip("tqdm").tqdm
    with tqdm(file=io.StringIO(), mininterval=0) as bar, open_progress(bar, "samples") as opened:
        opened("BatchNorm", 4, 8)
        assert (bar.n, bar.total, bar.desc) == (4, 8, "BatchNorm: ")
        opened("evaluation", 5, 0)
        assert (bar.n, bar.total, bar.desc) == (5, None, "evaluation: ")
        opened("evaluation", 9, 12)
        assert (bar.n, bar.total) == (9, 12)


def test_progress_makes_bar_per_phase_of_tqdm_class(capsys):
    tqdm = pytest.importorskip("tqdm").tqdm
    tell(tqdm)
    shown = capsys.readouterr().err
    assert "BatchNorm: 100%" in shown
    assert "8/8" in shown
    assert "evaluation: 9samples" in shown


def test_progress_makes_rich_task_per_phase():
    from rich.progress import Progress

    bars = Progress(disable=True)
    tell(bars)
    assert [(t.description, t.completed, t.total) for t in bars.tasks] == [
        ("BatchNorm", 8, 8),
        ("evaluation", 9, None),
    ]


@pytest.mark.parametrize("unit", ["samples", "bytes"])
def test_progress_true_shows_bar_on_stderr(capsys, unit):
    tell(True, unit)
    shown = capsys.readouterr()
    assert shown.out == ""
    assert "BatchNorm" in shown.err
    assert "evaluation" in shown.err
