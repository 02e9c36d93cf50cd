"""Outputs that appear whole or not at all, and never in another thing's place."""

from __future__ import annotations

import errno
import os
import shutil
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
from outputs import content_of, fill, names, write

from ckptavg.errors import OutputError
from ckptavg.formats import publish, renaming
from ckptavg.formats.publish import Publication, check_room, check_target

posix = pytest.mark.skipif(os.name == "nt", reason="locks and renames of POSIX")


def refused(path: Path, overwrite=True, inputs=()) -> str:
    with pytest.raises(OutputError) as caught:
        check_target(path, overwrite=overwrite, inputs=inputs)
    assert len(str(caught.value).splitlines()) == 1
    return str(caught.value)


# ------------------------------------------------------------------- what may be written, and where


def test_a_new_output_may_be_written(tmp_path):
    check_target(tmp_path / "out.pt", overwrite=False, inputs=[tmp_path / "in.pt"])


@pytest.mark.parametrize("existing", ["file", "directory", "link", "broken link"])
def test_an_existing_output_needs_overwrite(tmp_path, existing):
    out = tmp_path / "out"
    if existing == "file":
        out.write_text("old")
    elif existing == "directory":
        fill(out, "config.json", "tokenizer.model", "model-00001-of-00002.safetensors")
    else:
        out.symlink_to(tmp_path / "target")
        if existing == "link":
            (tmp_path / "target").write_text("old")
    assert "--overwrite" in refused(out, overwrite=False)
    check_target(out, overwrite=True, inputs=[])


INPUTS = {
    "the input itself": "in.pt",
    "the input by another path": "folder/../in.pt",
    "a link to the input": "link.pt",
    "the input through a linked directory": "linked/in.pt",
    "an input directory": "model",
    "an input directory with a slash": "model/",
    "a file inside an input directory": "model/average.pt",
    "a directory that holds an input": "folder",
    "a linked directory that holds an input": "linked folder",
}


@pytest.mark.parametrize("path", INPUTS.values(), ids=INPUTS)
@pytest.mark.parametrize("overwrite", [True, False])
def test_an_input_is_never_the_output(tmp_path, path, overwrite):
    (tmp_path / "in.pt").write_text("in")
    (tmp_path / "link.pt").symlink_to("in.pt")
    (tmp_path / "linked").symlink_to(tmp_path, target_is_directory=True)
    fill(tmp_path / "model")
    fill(tmp_path / "folder")
    (tmp_path / "linked folder").symlink_to("folder", target_is_directory=True)
    inputs = [tmp_path / name for name in ("in.pt", "model", "folder/model.safetensors")]
    assert "is an input" in refused(tmp_path / path, overwrite, inputs)


def test_an_input_that_is_a_link_protects_what_it_leads_to(tmp_path):
    (tmp_path / "blob").write_text("in")
    (tmp_path / "in.pt").symlink_to("blob")
    assert "is an input" in refused(tmp_path / "blob", inputs=[tmp_path / "in.pt"])


def test_a_neighbour_of_the_inputs_may_be_written(tmp_path):
    fill(tmp_path / "model")
    check_target(tmp_path / "model2", overwrite=False, inputs=[tmp_path / "model"])


@pytest.mark.parametrize("parent", ["missing", "file"])
def test_a_parent_that_is_no_directory_is_refused(tmp_path, parent):
    (tmp_path / "file").write_text("")
    assert "does not exist" in refused(tmp_path / parent / "out.pt")


def test_a_parent_that_may_not_be_written_to_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, mode: not (mode & os.W_OK))
    assert "may not be written" in refused(tmp_path / "out.pt")


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write all")
def test_permission_bits_of_the_parent_bind(tmp_path):
    tmp_path.chmod(0o555)
    try:
        assert "may not be written" in refused(tmp_path / "out.pt")
    finally:
        tmp_path.chmod(0o755)


OTHERS = ["optimizer.pt", "checkpoint-100/", ".git/", "photo.jpg", "results.csv", "notes.txt",
          "results.json", "optimizer.bin"]  # fmt: skip


@pytest.mark.parametrize("other", OTHERS)
def test_a_directory_that_holds_other_things_is_not_replaced(tmp_path, other):
    assert "not replaced" in refused(fill(tmp_path / "out", "config.json", other))


def test_a_directory_without_a_model_is_not_replaced(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "config.json").write_text("{}")
    refused(tmp_path / "out")


def test_an_empty_directory_may_be_replaced(tmp_path):
    (tmp_path / "out").mkdir()
    check_target(tmp_path / "out", overwrite=True, inputs=[])


def test_what_ckptavg_writes_may_be_replaced(tmp_path):
    fill(tmp_path / "out", "config.json", "generation_config.json", "tokenizer.json", "vocab.txt",
         "spiece.model", "modeling_x.py", "model.safetensors.index.json",
         "model-00001-of-00002.safetensors", "chat_template.jinja", "merges.txt")  # fmt: skip
    check_target(tmp_path / "out", overwrite=True, inputs=[])


@pytest.mark.parametrize(("needed", "fits"), [(0, True), (1000, True), (1001, False)])
def test_the_room_on_the_disk_is_looked_at_where_the_output_goes(
    tmp_path, monkeypatch, needed, fits
):
    asked = []

    def usage(path):
        asked.append(Path(path))
        return SimpleNamespace(free=1000)

    monkeypatch.setattr(shutil, "disk_usage", usage)
    if fits:
        check_room(tmp_path / "out.pt", needed)
    else:
        with pytest.raises(OutputError, match="GB are free"):
            check_room(tmp_path / "out.pt", needed)
    assert asked == [tmp_path]


# --------------------------------------------------------------------------------------- publishing


def lacks(monkeypatch, system: str) -> None:
    """Take from the system what it can do at best."""

    def unsupported(self, target):
        raise OSError(errno.EPERM, "Operation not permitted")

    if system != "one step":
        monkeypatch.setattr(renaming, "_renameat2", lambda *_: errno.ENOSYS)
    if system == "no hard links":
        monkeypatch.setattr(Path, "hardlink_to", unsupported)


kinds = pytest.mark.parametrize("directory", [False, True], ids=["file", "directory"])


@kinds
@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("system", ["one step", "hard links", "no hard links"])
def test_an_output_appears_when_published_and_leaves_nothing_else(
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
@pytest.mark.parametrize("old", ["file", "directory", "link", "linked directory"])
@pytest.mark.parametrize("exchange", [True, False], ids=["exchange", "two steps"])
def test_an_existing_output_is_replaced(tmp_path, monkeypatch, directory, old, exchange):
    if not exchange:
        monkeypatch.setattr(renaming, "exchange", lambda one, other: False)
    out, elsewhere = tmp_path / "out", tmp_path / "elsewhere"
    made = out if "link" not in old else elsewhere
    if "directory" in old:
        fill(made, "config.json")
    else:
        made.write_text("old")
    if "link" in old:
        out.symlink_to(elsewhere)
    with Publication(out, directory=directory, overwrite=True) as publication:
        write(publication)
        assert content_of(out) == "old"
        publication.publish()
    assert content_of(out) == "new"
    assert not out.is_symlink()
    if "link" in old:
        assert content_of(elsewhere) == "old"
    assert names(tmp_path) == {"out"} | ({"elsewhere"} if "link" in old else set())
    if directory:
        assert names(out) == {"model.safetensors"}


@kinds
@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, SystemExit])
@pytest.mark.parametrize("existing", [False, True])
def test_an_exception_inside_leaves_nothing_behind(tmp_path, directory, error, existing):
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
def test_an_error_of_the_system_is_told_in_one_line(tmp_path, number, expected):
    with (
        pytest.raises(OutputError, match=expected) as caught,
        Publication(tmp_path / "out", directory=False, overwrite=False),
    ):
        raise OSError(number, os.strerror(number))
    assert str(tmp_path / "out") in str(caught.value)
    assert names(tmp_path) == set()


@kinds
def test_a_parent_that_went_away_is_told_in_one_line(tmp_path, directory):
    with (
        pytest.raises(OutputError),
        Publication(tmp_path / "gone" / "out", directory=directory, overwrite=False),
    ):
        pytest.fail("it was opened")


@kinds
def test_leaving_without_publishing_leaves_nothing(tmp_path, directory):
    with Publication(tmp_path / "out", directory=directory, overwrite=True) as publication:
        write(publication)
    assert names(tmp_path) == set()


@kinds
@pytest.mark.parametrize("appeared", ["file", "directory", "broken link"])
@pytest.mark.parametrize("system", ["one step", "hard links", "no hard links"])
def test_what_appears_meanwhile_is_not_replaced(tmp_path, monkeypatch, directory, appeared, system):
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
def test_everything_is_on_the_disk_before_it_takes_its_place(tmp_path, monkeypatch, directory):
    out, flushed = tmp_path / "out", []
    monkeypatch.setattr(publish, "_fsync", lambda path: flushed.append((path, out.exists())))
    with Publication(out, directory=directory, overwrite=False) as publication:
        write(publication)
        expected = {publication.temporary, *publication.temporary.rglob("*")}
        publication.publish()
    assert flushed[-1] == (tmp_path, True)
    assert {path for path, _ in flushed[:-1]} == expected
    assert not any(placed for _, placed in flushed[:-1])


@posix
@kinds
def test_an_output_has_the_permissions_of_any_new_file(tmp_path, directory):
    plain = tmp_path / "plain"
    plain.mkdir() if directory else plain.touch()
    with Publication(tmp_path / "out", directory=directory, overwrite=False) as publication:
        publication.publish()
    assert (tmp_path / "out").stat().st_mode == plain.stat().st_mode


@pytest.mark.skipif(sys.platform != "linux", reason="renameat2 is Linux's")
def test_a_directory_is_never_missing_while_it_is_replaced(tmp_path):
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
