"""Outputs that appear whole or not at all, and never in another thing's place."""

from __future__ import annotations

import errno
import os
import sys
import threading
from pathlib import Path

import pytest
from output_files import content_of, fill, names, write

from ckptavg.errors import OutputError
from ckptavg.io import atomic, rename, temporaries
from ckptavg.io.atomic import Publication

posix = pytest.mark.skipif(os.name == "nt", reason="locks and renames of POSIX")


# --------------------------------------------------------------------------------------- publishing


def lacks(monkeypatch, system: str) -> None:
    """Take from the system what it can do at best."""

    def unsupported(self, target):
        raise OSError(errno.EPERM, "Operation not permitted")

    if system != "one step":
        monkeypatch.setattr(rename, "_RENAMEAT2", None)
    if system == "no hard links":
        monkeypatch.setattr(Path, "hardlink_to", unsupported)


kinds = pytest.mark.parametrize("directory", [False, True], ids=["file", "directory"])


@kinds
@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("system", ["one step", "hard links", "no hard links"])
def test_publication_appears_only_once_published(
    tmp_path, monkeypatch, directory, overwrite, system
):
    lacks(monkeypatch, system)
    out = tmp_path / "out"
    with Publication(out, directory=directory, overwrite=overwrite) as publication:
        assert publication.temporary.parent == tmp_path
        assert publication.temporary.name.startswith(".")
        write(publication)
        assert not out.exists()
        publication.publish()
    assert content_of(out) == "new"
    assert names(tmp_path) == {"out"}


@kinds
@pytest.mark.parametrize("linked", [False, True])
@pytest.mark.parametrize("exchange", [True, False], ids=["exchange", "two steps"])
def test_publication_replaces_existing_output(tmp_path, monkeypatch, directory, linked, exchange):
    """Also the one that a link leads to, as ``torch.save`` and ``cp`` do it."""
    if not exchange:
        monkeypatch.setattr(rename, "exchange", lambda one, other: False)
    out, elsewhere = tmp_path / "out", tmp_path / "elsewhere"
    made = elsewhere if linked else out
    if directory:
        fill(made, "config.json")
    else:
        made.write_text("old")
    if linked:
        out.symlink_to(elsewhere)
    publication = Publication(out, directory=directory, overwrite=True, replaceable=["config.json"])
    with publication:
        write(publication)
        assert content_of(out) == "old"
        publication.publish()
    assert content_of(out) == "new"
    assert out.is_symlink() == linked
    assert names(tmp_path) == {"out"} | ({"elsewhere"} if linked else set())
    if directory:
        assert names(out) == {"model.safetensors"}


@posix
@pytest.mark.parametrize("mode", [0o600, 0o640, 0o664])
def test_publication_keeps_mode_of_replaced_file(tmp_path, mode):
    out = tmp_path / "out"
    out.write_text("old")
    out.chmod(mode)
    with Publication(out, directory=False, overwrite=True) as publication:
        write(publication)
        publication.publish()
    assert content_of(out) == "new"
    assert out.stat().st_mode & 0o777 == mode


@posix
def test_publication_keeps_modes_of_replaced_directory(tmp_path):
    out = fill(tmp_path / "out")
    out.chmod(0o750)
    (out / "model.safetensors").chmod(0o600)
    with Publication(out, directory=True, overwrite=True) as publication:
        fill(publication.temporary, "config.json", content="new")
        publication.publish()
    modes = {p.name: p.stat().st_mode & 0o777 for p in (out, *out.iterdir())}
    umask = os.umask(0)
    os.umask(umask)
    assert modes == {
        "out": 0o750, "model.safetensors": 0o600, "config.json": 0o666 & ~umask,
    }  # fmt: skip


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="root gives files away")
def test_publication_by_root_keeps_owner(tmp_path):
    out = tmp_path / "out"
    out.write_text("old")
    os.chown(out, 12345, 54321)
    with Publication(out, directory=False, overwrite=True) as publication:
        write(publication)
        publication.publish()
    assert (out.stat().st_uid, out.stat().st_gid) == (12345, 54321)


@kinds
@pytest.mark.parametrize("length", [233, 234, 255])
def test_publication_takes_longest_names(tmp_path, directory, length):
    out = tmp_path / ("ü" * 60 + "o" * (length - 120))
    with Publication(out, directory=directory, overwrite=False) as publication:
        write(publication)
        publication.publish()
    assert content_of(out) == "new"
    assert names(tmp_path) == {out.name}


def test_remove_stale_clears_leftovers_of_long_name(tmp_path, monkeypatch):
    out = tmp_path / ("o" * 250)
    monkeypatch.setattr(temporaries, "remove", lambda path: None)
    with Publication(out, directory=False, overwrite=False):
        pass
    monkeypatch.undo()
    assert len(names(tmp_path)) == 1
    temporaries.remove_stale(out)
    assert names(tmp_path) == set()


@kinds
@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, SystemExit])
@pytest.mark.parametrize("existing", [False, True])
def test_publication_leaves_nothing_after_exception(tmp_path, directory, error, existing):
    out = tmp_path / "out"
    if existing:
        out.write_text("old")

    def work():
        with Publication(out, directory=directory, overwrite=True) as publication:
            write(publication)
            raise error

    with pytest.raises(error):
        work()
    assert names(tmp_path) == ({"out"} if existing else set())
    assert not existing or content_of(out) == "old"


@pytest.mark.parametrize(
    ("number", "expected"), [(errno.ENOSPC, "ran full"), (errno.EIO, "cannot be written")]
)
def test_publication_reports_system_error_in_one_line(tmp_path, number, expected):
    with (
        pytest.raises(OutputError, match=expected) as caught,
        Publication(tmp_path / "out", directory=False, overwrite=False),
    ):
        raise OSError(number, os.strerror(number))
    assert str(tmp_path / "out") in str(caught.value)
    assert names(tmp_path) == set()


@kinds
def test_publication_refuses_missing_parent(tmp_path, directory):
    with (
        pytest.raises(OutputError),
        Publication(tmp_path / "gone" / "out", directory=directory, overwrite=False),
    ):
        pytest.fail("it was opened")


@kinds
def test_publication_unpublished_leaves_nothing(tmp_path, directory):
    with Publication(tmp_path / "out", directory=directory, overwrite=True) as publication:
        write(publication)
    assert names(tmp_path) == set()


@kinds
@pytest.mark.parametrize("appeared", ["file", "directory", "broken link"])
@pytest.mark.parametrize("system", ["one step", "hard links", "no hard links"])
def test_publication_keeps_path_that_appears_meanwhile(
    tmp_path, monkeypatch, directory, appeared, system
):
    lacks(monkeypatch, system)
    out = tmp_path / "out"

    def work():
        with Publication(out, directory=directory, overwrite=False) as publication:
            write(publication)
            if appeared == "file":
                out.write_text("theirs")
            elif appeared == "directory":
                fill(out, content="theirs")
            else:
                out.symlink_to("nowhere")
            publication.publish()

    with pytest.raises(OutputError, match="has appeared"):
        work()
    assert names(tmp_path) == {"out"}
    assert out.is_symlink() if appeared == "broken link" else content_of(out) == "theirs"


@kinds
def test_publication_flushes_before_rename(tmp_path, monkeypatch, directory):
    out, flushed = tmp_path / "out", []
    monkeypatch.setattr(atomic, "_fsync", lambda path: flushed.append((path, out.exists())))
    with Publication(out, directory=directory, overwrite=False) as publication:
        write(publication)
        expected = {publication.temporary, *publication.temporary.rglob("*")}
        publication.publish()
    assert flushed[-1] == (tmp_path, True)
    assert {path for path, _ in flushed[:-1]} == expected
    assert not any(placed for _, placed in flushed[:-1])


@posix
@kinds
def test_publication_has_mode_of_new_file(tmp_path, directory):
    plain = tmp_path / "plain"
    plain.mkdir() if directory else plain.touch()
    with Publication(tmp_path / "out", directory=directory, overwrite=False) as publication:
        publication.publish()
    assert (tmp_path / "out").stat().st_mode == plain.stat().st_mode


@pytest.mark.skipif(sys.platform != "linux", reason="renameat2 is Linux's")
def test_publication_never_leaves_directory_missing(tmp_path):
    out = fill(tmp_path / "out")
    seen, stop = set(), threading.Event()

    def watch():
        while not stop.is_set():
            try:
                seen.add((out / "model.safetensors").read_text())
            except FileNotFoundError:
                if not out.exists():
                    seen.add("missing")

    watcher = threading.Thread(target=watch)
    watcher.start()
    for i in range(50):
        with Publication(out, directory=True, overwrite=True) as publication:
            write(publication, str(i))
            publication.publish()
    stop.set()
    watcher.join()
    assert "missing" not in seen
    assert "" not in seen
    assert content_of(out) == "49"
