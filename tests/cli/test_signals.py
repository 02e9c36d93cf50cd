"""Ctrl-C and SIGTERM: nothing is left behind, and the last line says what was written."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import click
import pytest
import torch
from click.testing import CliRunner, Result
from helpers import listing, save, save_states
from selecting import first_only

from ckptavg.averaging import pipeline
from ckptavg.cli import main, signals
from ckptavg.cli.signals import Terminated, unwind_on_signals
from ckptavg.runs import run

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="signals of POSIX")
numbers = pytest.mark.parametrize(
    ("number", "word", "code"),
    [(signal.SIGINT, "Interrupted", 130), (signal.SIGTERM, "Terminated", 143)],
)

# Threads that keep the interpreter busy with every block, for seconds in all
BUSY = """
import os, signal, time
signal.signal(signal.SIGINT, signal.default_int_handler)  # even if started in the background
preadv = os.preadv
def slow(*arguments):
    end = time.monotonic() + 0.5
    while time.monotonic() < end:
        pass
    return preadv(*arguments)
os.preadv = slow
from ckptavg.cli import main
main()
"""


@pytest.fixture(autouse=True)
def usual_handlers() -> Iterator[None]:
    """The handlers that a fresh process has; trainers leave others behind."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """A directory with a run."""
    save_states(tmp_path / "run", [{"w": torch.full((50,), float(i))} for i in range(3)])
    return tmp_path


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 40 MB."""
    home = tmp_path_factory.mktemp("large")
    return save(home / "run" / "epoch_1.pt", {"w": torch.zeros(10_000_000)}).parent


def average(home: Path, *options: str) -> Result:
    return CliRunner().invoke(main, ["average", str(home / "run"), *options])


# ----------------------------------------------------------------------------------- real processes

BURSTS = {
    "SIGINT": [signal.SIGINT],
    "SIGTERM": [signal.SIGTERM],
    "SIGINT twice": [signal.SIGINT] * 2,
    "SIGTERM twice": [signal.SIGTERM] * 2,
    "both": [signal.SIGINT, signal.SIGTERM],
}


@pytest.mark.skipif(not hasattr(os, "preadv"), reason="slows reads through preadv")
@first_only("burst", BURSTS)
def test_signal_during_busy_threads_leaves_no_files(large, tmp_path, burst):
    name = "swa" if burst == "both" else "swa.pt"
    command = [sys.executable, "-c", BUSY, "average", large]
    command += ["-o", tmp_path / name]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        deadline = time.monotonic() + 240
        while not list(tmp_path.iterdir()) and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(0.1)
        assert len(list(tmp_path.iterdir())) == 1  # the temporary
        for number in BURSTS[burst]:
            process.send_signal(number)
            time.sleep(0.01)
        _, stderr = process.communicate(timeout=240)
    first = BURSTS[burst][0]
    assert process.returncode == 128 + first
    word = "Interrupted" if first == signal.SIGINT else "Terminated"
    assert stderr.splitlines()[-1] == f"{word}: nothing was written."
    assert "Traceback" not in stderr
    assert listing(tmp_path) == []


CHILD = """
import os, signal, sys
from ckptavg.cli.signals import unwind_on_signals
with unwind_on_signals():
    child = os.fork()
    if child == 0:
        signal.raise_signal(getattr(signal, sys.argv[1]))
        os._exit(0)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


@pytest.mark.slow
def test_sigterm_kills_a_child_process():
    """A loader's worker is a copy of the command and must not end as the command does."""
    done = subprocess.run(
        [sys.executable, "-c", CHILD, "SIGTERM"], capture_output=True, text=True, check=True
    )
    assert int(done.stdout) == -signal.SIGTERM


# ----------------------------------------------------------------------------- in this very process


def raised(number: signal.Signals, work: Callable[..., object]) -> Callable[..., object]:
    """Some work and, once it is done, a signal."""

    def disturbed(*arguments: object, **keywords: object) -> object:
        answer = work(*arguments, **keywords)
        signal.raise_signal(number)
        return answer

    return disturbed


@numbers
@pytest.mark.parametrize("existing", [False, True])
def test_signal_after_writing_names_the_output(home, monkeypatch, number, word, code, existing):
    out = home / "swa.pt"
    if existing:
        save(out, {"w": torch.zeros(1)})
    monkeypatch.setattr(pipeline, "write_averages", raised(number, pipeline.write_averages))
    result = average(home, "-o", str(out), "--overwrite")
    assert result.exit_code == code
    assert result.stderr.splitlines()[-1] == f"{word}: {out} had been written."
    assert torch.load(out, weights_only=True)["state_dict"]["w"].tolist() == [1.0] * 50
    assert listing(home) == ["run", *(f"run/epoch_{i}.pt" for i in (1, 2, 3)), "swa.pt"]


@numbers
@pytest.mark.parametrize("existing", [False, True])
def test_signal_before_writing_names_no_output(home, monkeypatch, number, word, code, existing):
    out = home / "swa.pt"
    if existing:
        save(out, {"w": torch.zeros(1)})
    before = listing(home)
    monkeypatch.setattr(run, "open_run", raised(number, run.open_run))
    result = average(home, "-o", str(out), "--overwrite")
    assert result.exit_code == code
    assert result.stderr.splitlines()[-1] == f"{word}: nothing was written."
    assert listing(home) == before


@numbers
@pytest.mark.parametrize("existing", [False, True])
def test_signal_at_the_end_of_a_command_is_reported(
    home, monkeypatch, number, word, code, existing
):
    """Whether the command has done its work or failed."""
    report_interrupt, ended = signals.report_interrupt, []

    @contextmanager
    def ends_slowly(outputs, *signals):
        try:
            with report_interrupt(outputs, *signals):
                yield
        finally:
            ended.append(outputs)
            if outputs == [] and ended.count([]) == 2:  # the first is of reading the command line
                signal.raise_signal(number)

    monkeypatch.setattr(signals, "report_interrupt", ends_slowly)
    out = home / "swa.pt"
    if existing:
        save(out, {"w": torch.zeros(1)})
    result = average(home, "-o", str(out))
    assert result.exit_code == code
    assert result.stderr.splitlines()[-1] == f"{word}."
    assert "Aborted" not in result.stderr
    assert out.exists()


@numbers
@pytest.mark.parametrize("moment", ["before", "after"])
@pytest.mark.parametrize("fate", ["lost", "another error"])
def test_signal_swallowed_by_other_code_is_reported(
    home, monkeypatch, number, word, code, moment, fate
):
    """Destructors swallow exceptions, and libraries in C++ make others of them."""
    write_averages, out = pipeline.write_averages, home / "swa.pt"

    def disturbed(*arguments: object, **keywords: object) -> object:
        answer = write_averages(*arguments, **keywords) if moment == "after" else None
        try:
            signal.raise_signal(number)
        except KeyboardInterrupt:
            if fate == "another error":
                raise RuntimeError("an error of C++") from None
        return write_averages(*arguments, **keywords) if moment == "before" else answer

    monkeypatch.setattr(pipeline, "write_averages", disturbed)
    result = average(home, "-o", str(out))
    assert result.exit_code == code
    left = f"{out} had been written" if out.exists() else "nothing was written"
    assert result.stderr.splitlines()[-1] == f"{word}: {left}."
    assert out.exists() == (moment == "after" or fate == "lost")


@numbers
def test_signal_during_parsing_is_reported(home, monkeypatch, number, word, code):
    parse = click.Command.parse_args
    monkeypatch.setattr(click.Command, "parse_args", raised(number, parse))
    result = average(home, "-o", str(home / "swa.pt"))
    assert result.exit_code == code
    assert result.stderr.splitlines()[-1] == f"{word}: nothing was written."


LINES = 40  # moments


# Between the opening of a file and what closes it, an interrupt leaves that to the collector.
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_signal_at_any_line_leaves_no_temporaries(home):
    """Moments drawn evenly over all lines of Python that the command runs through."""
    out, before = home / "swa.pt", listing(home)
    count = 0

    def interrupt(at: int) -> Result:
        nonlocal count
        count = 0

        def trace(frame, event, argument):
            nonlocal count
            # logging keeps its lock for ever if it is interrupted in the midst of taking it
            if any(name in frame.f_code.co_filename for name in ("click/testing", "/logging/")):
                return None
            count += event == "line"
            if count == at and event == "line":
                signal.raise_signal(signal.SIGINT)
            return trace

        sys.settrace(trace)
        try:
            return average(home, "-o", str(out))
        finally:
            sys.settrace(None)

    assert interrupt(0).exit_code == 0
    out.unlink()
    total = count
    for i in range(1, LINES):  # not the very first, which are of the harness
        result = interrupt(total * i // LINES)
        assert result.exit_code == 130, result.output
        left = f"{out} had been written" if out.exists() else "nothing was written"
        assert result.stderr.splitlines()[-1] == f"Interrupted: {left}."
        out.unlink(missing_ok=True)
        assert listing(home) == before


def test_signal_handlers_are_restored(home):
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    assert average(home, "-o", str(home / "swa.pt")).exit_code == 0
    assert average(home, "-o", str(home / "swa.pt")).exit_code == 1
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before


@pytest.mark.parametrize("theirs", [signal.SIG_IGN, lambda *_: None], ids=["ignored", "handled"])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signal_handlers_of_others_are_kept(number, theirs):
    before = signal.signal(number, theirs)
    try:
        with unwind_on_signals():
            assert signal.getsignal(number) == theirs
            signal.raise_signal(number)
    finally:
        signal.signal(number, before)


def test_commands_work_outside_the_main_thread(home):
    results: list[Result] = []
    thread = threading.Thread(
        target=lambda: results.append(average(home, "-o", str(home / "swa.pt")))
    )
    thread.start()
    thread.join()
    assert results[0].exit_code == 0


def test_signal_repeated_is_delayed_once():
    after: list[str] = []

    def work() -> None:
        with unwind_on_signals():
            try:
                signal.raise_signal(signal.SIGTERM)
            finally:
                signal.raise_signal(signal.SIGINT)
                after.append("second")
                signal.raise_signal(signal.SIGINT)
                after.append("third")

    with pytest.raises(KeyboardInterrupt) as caught:
        work()
    assert after == ["second"]
    assert not isinstance(caught.value, Terminated)
    assert isinstance(caught.value.__context__, Terminated)
