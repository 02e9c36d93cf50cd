"""Checkpoints with pickles that would run something: found, averaged or refused, never obeyed."""

from __future__ import annotations

import copyreg
import os
import pickle
import subprocess
import sys
from pathlib import Path
from pickle import POP, PROTO, STOP

import pytest
import torch
from assembler import text
from click.testing import CliRunner, Result
from fuzz.watch import Ran, watched
from gadgets import EXTENSIONS, PLACES, TRAP, WEIGHTS, as_legacy, as_zip, gadgets, state
from helpers import listing
from selecting import combinations

import ckptavg
from ckptavg.cli import main

WRITERS = {"zip": as_zip, "legacy": as_legacy}
OTHER_PICKLES = ("protocol", "system", "keys")  # of a legacy file


@pytest.fixture
def trapdoor(tmp_path, monkeypatch):
    """What the gadgets reach for is there: a module to import, a registry of extensions."""
    (tmp_path / "modules").mkdir()
    (tmp_path / "modules" / "trapdoor.py").write_text(TRAP)
    monkeypatch.syspath_prepend(tmp_path / "modules")
    for code in EXTENSIONS:
        copyreg.add_extension("os", f"system{code}", code)
    yield
    for code in EXTENSIONS:
        copyreg.remove_extension("os", f"system{code}", code)


_UNPICKLE = """
import contextlib, copyreg, os, pathlib, pickle, sys
import torch
for code in (200, 2000, 200_000):
    setattr(os, f"system{code}", os.system)
    copyreg.add_extension("os", f"system{code}", code)
for path in pathlib.Path(sys.argv[1]).iterdir():
    with contextlib.suppress(BaseException):
        pickle.loads(path.read_bytes())
"""


@pytest.mark.slow
def test_gadgets_all_run_in_plain_unpickler(tmp_path, trapdoor):
    (tmp_path / "pickles").mkdir()
    names = list(gadgets(""))
    for i, name in enumerate(names):
        gadget = gadgets(str(tmp_path / f"canary{i}"))[name]
        (tmp_path / "pickles" / str(i)).write_bytes(gadget + STOP)
    environment = os.environ | {"PYTHONPATH": str(tmp_path / "modules")}
    command = [sys.executable, "-W", "ignore", "-c", _UNPICKLE, str(tmp_path / "pickles")]
    subprocess.run(command, env=environment, check=True, timeout=240, capture_output=True)
    harmless = [n for i, n in enumerate(names) if not (tmp_path / f"canary{i}").exists()]
    assert not harmless


@pytest.mark.parametrize("deed", [
    lambda room: os.system("true"),
    lambda room: subprocess.run(["true"], check=False),
    lambda room: exec("1"),
    lambda room: __import__("this"),
    lambda room: (room.parent / "outside").touch(),
    lambda room: pickle.loads(b"cos\nsystem\n."),
], ids=["system", "subprocess", "exec", "import", "write", "unpickle"])  # fmt: skip
def test_watched_detects_each_deed(deed, tmp_path):
    room = tmp_path / "room"
    room.mkdir()
    with pytest.raises(Ran), watched(room):
        deed(room)
    assert not (tmp_path / "outside").exists()


def average(room: Path, *flags: str) -> Result:
    """Average the run in a room by the command line, under watch."""
    arguments = ["average", str(room / "run"), "-o", str(room / "out.pt"), *flags]
    with watched(room):
        return CliRunner().invoke(main, arguments)


@pytest.fixture
def room(tmp_path):
    """A run whose second checkpoint is honest; averaged once, so that all modules are loaded."""
    room = tmp_path / "room"
    (room / "run").mkdir(parents=True)
    torch.save({"w": torch.zeros(4)}, room / "run" / "epoch_2.pt")
    arguments = ["average", str(room / "run"), "-o", str(tmp_path / "first.pt")]
    assert CliRunner().invoke(main, arguments).exit_code == 0
    return room


def check_average(room: Path, count: int = 2) -> None:
    """The result is the mean of zeros and of the weights beside the gadget; or zeros alone."""
    found = torch.load(room / "out.pt", weights_only=True)["state_dict"]["w"]
    assert found.tolist() == [w / 2 if count == 2 else 0.0 for w in WEIGHTS]
    (room / "out.pt").unlink()


def check_refusal(result: Result, room: Path, why: str = "epoch_1.pt") -> None:
    """One line that names the file, exit 1, and nothing left behind."""
    assert result.exit_code == 1, result.output
    assert result.stdout == ""
    assert len(result.stderr.splitlines()) == 1, result.stderr
    assert result.stderr.startswith("Error: ")
    assert why in result.stderr
    assert listing(room) == ["run", "run/epoch_1.pt", "run/epoch_2.pt"]


def check(result: Result, room: Path, fate: str) -> None:
    if fate == "refused":
        check_refusal(result, room)
    else:
        assert result.exit_code == 0, result.output
        check_average(room, 2 if fate == "read" else 0)


def _fate(name: str, form: str, place: str, fate: str) -> str:
    """What becomes of a file where it is not the place that decides."""
    if place == "after the end" and form == "zip":
        return "read"
    if name == "ADDITEMS" or name.startswith("extension"):
        return "refused"  # nothing honest uses these on anything but a set, or at all
    if form == "legacy" and (place == "after the end" or fate == "left out"):
        return "refused"  # its list of storages does not fit
    return fate


@combinations(name=gadgets(""), form=WRITERS)
def test_gadgets_never_run_in_any_place(name, form, room, tmp_path, trapdoor):
    canary = tmp_path / "canary"
    gadget = gadgets(str(canary))[name]
    for place, (build, fate) in PLACES.items():
        WRITERS[form](room / "run" / "epoch_1.pt", PROTO + b"\2" + build(gadget) + STOP)
        result = average(room)
        assert not canary.exists(), place
        check(result, room, _fate(name, form, place, fate))
    assert "trapdoor" not in sys.modules


@pytest.mark.parametrize("name", gadgets(""))
def test_gadgets_never_run_as_whole_file_or_side_pickle(name, room, tmp_path, trapdoor):
    canary, path = tmp_path / "canary", room / "run" / "epoch_1.pt"
    gadget = gadgets(str(canary))[name]
    path.write_bytes(PROTO + b"\4" + gadget + STOP)
    check_refusal(average(room), room)
    for other in OTHER_PICKLES:
        before = gadget + POP + pickle.dumps(["0"])  # which is the right list of keys
        as_legacy(path, state() + STOP, **{other: before if other == "keys" else gadget + STOP})
        result = average(room)
        if result.exit_code == 0:
            check_average(room)
        else:
            check_refusal(result, room)
        assert not canary.exists(), other


@pytest.mark.parametrize("protocol", [0, 1, 3, 5, 6, 200, 255])
def test_pickle_protocol_number_changes_nothing(protocol, room, tmp_path):
    pickled = PROTO + bytes([protocol]) + state(text("x") + gadgets(str(tmp_path / "c"))["exec"])
    as_zip(room / "run" / "epoch_1.pt", pickled + STOP)
    assert average(room).exit_code == 0
    check_average(room)
    assert not (tmp_path / "c").exists()


def test_inspect_and_key_run_no_gadget(room, tmp_path):
    """Inspecting and naming what stands beside the weights runs nothing either."""
    canary = tmp_path / "canary"
    build, _ = PLACES["beside the weights"]
    path = room / "run" / "epoch_1.pt"
    as_zip(path, build(gadgets(str(canary))["os.system"]) + STOP)
    with watched(room):
        assert CliRunner().invoke(main, ["inspect", str(path), "--json", "-v"]).exit_code == 0
        refused = CliRunner().invoke(main, ["inspect", str(path), "--key", "x"])
    assert (refused.exit_code, len(refused.stderr.splitlines())) == (1, 1)
    assert not canary.exists()


def test_output_holds_no_gadget(room, tmp_path):
    """An output is read by others, with torch.load: only plain values may stand in it."""
    (room / "run" / "epoch_2.pt").unlink()
    build, _ = PLACES["beside the weights"]
    as_zip(room / "run" / "epoch_1.pt", build(gadgets(str(tmp_path / "canary"))["exec"]) + STOP)
    run = ckptavg.open_run(room / "run")
    ckptavg.average(run, out=room / "out.pt")
    found = torch.load(room / "out.pt", weights_only=True)
    assert set(found) == {"model", "state_dict", "ckptavg"}
    assert b"exec" not in (room / "out.pt").read_bytes()
