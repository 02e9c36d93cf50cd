"""Paths that outputs may go to: what is refused there before any work."""

from __future__ import annotations

import os
import shutil
import socket
import stat
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from output_files import fill

from ckptavg.errors import OutputError
from ckptavg.io.output_paths import check_replaceable, check_room, check_target

posix = pytest.mark.skipif(os.name == "nt", reason="files of POSIX")


def refused(path: Path, overwrite=True, inputs=()) -> str:
    with pytest.raises(OutputError) as caught:
        check_target(path, overwrite=overwrite, inputs=inputs)
    assert len(str(caught.value).splitlines()) == 1
    return str(caught.value)


# ------------------------------------------------------------------- what may be written, and where


def test_check_target_accepts_new_output(tmp_path):
    check_target(tmp_path / "out.pt", overwrite=False, inputs=[tmp_path / "in.pt"])


@pytest.mark.parametrize("existing", ["file", "directory", "link", "broken link"])
def test_check_target_requires_overwrite_for_existing(tmp_path, existing):
    out = tmp_path / "out"
    if existing == "file":
        out.write_text("old")
    elif existing == "directory":
        fill(out, "config.json", "tokenizer.model", "model-00001-of-00002.safetensors")
    else:
        out.symlink_to(tmp_path / "target")
        if existing == "link":
            (tmp_path / "target").write_text("old")
    assert "`overwrite=True`" in refused(out, overwrite=False)
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
def test_check_target_refuses_input(tmp_path, path, overwrite):
    (tmp_path / "in.pt").write_text("in")
    (tmp_path / "link.pt").symlink_to("in.pt")
    (tmp_path / "linked").symlink_to(tmp_path, target_is_directory=True)
    fill(tmp_path / "model")
    fill(tmp_path / "folder")
    (tmp_path / "linked folder").symlink_to("folder", target_is_directory=True)
    inputs = [tmp_path / name for name in ("in.pt", "model", "folder/model.safetensors")]
    assert "is an input" in refused(tmp_path / path, overwrite, inputs)


def test_check_target_refuses_target_of_input_link(tmp_path):
    (tmp_path / "blob").write_text("in")
    (tmp_path / "in.pt").symlink_to("blob")
    assert "is an input" in refused(tmp_path / "blob", inputs=[tmp_path / "in.pt"])


def test_check_target_accepts_neighbour_of_input(tmp_path):
    fill(tmp_path / "model")
    check_target(tmp_path / "model2", overwrite=False, inputs=[tmp_path / "model"])


@pytest.mark.parametrize("parent", ["missing", "file"])
def test_check_target_refuses_parent_not_directory(tmp_path, parent):
    (tmp_path / "file").write_text("")
    assert "does not exist" in refused(tmp_path / parent / "out.pt")


def test_check_target_refuses_unwritable_parent(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, mode: not (mode & os.W_OK))
    assert "may not be written" in refused(tmp_path / "out.pt")


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write all")
def test_check_target_heeds_permission_bits_of_parent(tmp_path):
    tmp_path.chmod(0o555)
    try:
        assert "may not be written" in refused(tmp_path / "out.pt")
    finally:
        tmp_path.chmod(0o755)


def unreplaceable(path: Path, *names: str, directory: bool = True) -> str:
    with pytest.raises(OutputError) as caught:
        check_replaceable(path, directory=directory, names=names)
    assert len(str(caught.value).splitlines()) == 1
    return str(caught.value)


OTHERS = ["optimizer.pt", "checkpoint-100/", ".git/", "photo.jpg", "train.py", "prepare.py",
          "model-00002-of-00002.safetensors", "tokenizer.model", ".env"]  # fmt: skip


@pytest.mark.parametrize("other", OTHERS)
def test_check_replaceable_refuses_directory_of_other_files(tmp_path, other):
    out = fill(tmp_path / "out", "config.json", other)
    said = unreplaceable(out, "model.safetensors", "config.json")
    assert "not replaced" in said
    assert other.rstrip("/") in said


def test_check_replaceable_finds_files_in_subdirectory(tmp_path):
    out = fill(tmp_path / "out", "1_Pooling/")
    for name in ("config.json", "notes.txt"):
        (out / "1_Pooling" / name).write_text("")
    said = unreplaceable(out, "model.safetensors", "1_Pooling/config.json")
    assert "1_Pooling/notes.txt" in said
    check_replaceable(
        out, directory=True, names=["model.safetensors", *(f"1_Pooling/{n}" for n in
                                                           ("config.json", "notes.txt"))],
    )  # fmt: skip


def test_check_replaceable_refuses_link_to_directory(tmp_path):
    out, elsewhere = fill(tmp_path / "out"), fill(tmp_path / "elsewhere")
    (out / "data").symlink_to(elsewhere)
    assert "data" in unreplaceable(out, "model.safetensors")


def test_check_replaceable_accepts_empty_directory(tmp_path):
    (tmp_path / "out").mkdir()
    check_replaceable(tmp_path / "out", directory=True, names=[])


def test_check_replaceable_accepts_part_of_output(tmp_path):
    out = fill(tmp_path / "out", "config.json")
    names = ["config.json", "tokenizer.json", "model.safetensors", "1_Pooling/config.json"]
    check_replaceable(out, directory=True, names=names)


@pytest.mark.parametrize("linked", [False, True])
def test_check_replaceable_refuses_other_kind(tmp_path, linked):
    directory, file = fill(tmp_path / "directory"), tmp_path / "file"
    file.write_text("")
    if linked:
        for path in (directory, file):
            path.with_suffix(".link").symlink_to(path)
        directory, file = directory.with_suffix(".link"), file.with_suffix(".link")
    assert "is a directory and" in unreplaceable(directory, directory=False)
    assert "is a file and" in unreplaceable(file, directory=True)


# ----------------------------------------------------------- what is neither a file nor a directory


def stand(path: Path, kind: str) -> None:
    """Put something at a path that is no file."""
    if kind == "a pipe":
        os.mkfifo(path)
    elif kind == "a socket":
        with socket.socket(socket.AF_UNIX) as server:
            os.chdir(path.parent)  # a socket's path has to be short
            server.bind(path.name)
    elif os.geteuid() == 0:
        os.mknod(path, stat.S_IFCHR | 0o666, os.makedev(1, 3))
    else:
        pytest.skip("only root makes devices")


@posix
@pytest.mark.parametrize("kind", ["a pipe", "a socket", "a device"])
@pytest.mark.parametrize("linked", [False, True])
@pytest.mark.parametrize("overwrite", [False, True])
def test_check_target_refuses_special_files(tmp_path, monkeypatch, kind, linked, overwrite):
    monkeypatch.chdir(tmp_path)
    out = tmp_path / "out"
    stand(out, kind)
    before = out.lstat()
    if linked:
        out = tmp_path / "link"
        out.symlink_to("out")
    assert kind in refused(out, overwrite)
    assert (tmp_path / "out").lstat() == before


@posix
@pytest.mark.parametrize("overwrite", [False, True])
def test_check_target_refuses_dev_null(overwrite):
    assert "/dev/null is a device" in refused(Path("/dev/null"), overwrite)


MOUNTED = """
import subprocess, sys
from pathlib import Path
from ckptavg.errors import OutputError
from ckptavg.io.output_paths import check_target
home = Path(sys.argv[1])
for kind, source in (("tmpfs", "none"), ("bind", "source")):
    for name in ("out", "out with a blank") if kind == "bind" else ("disk",):
        (home / name).mkdir()
        options = ["-t", "tmpfs"] if kind == "tmpfs" else ["--bind"]
        subprocess.run(["mount", *options, home / source, home / name], check=True)
        try:
            check_target(home / name, overwrite=True, inputs=[])
        except OutputError as error:
            print(error)
subprocess.run(["mount", "--bind", home / "file", home / "out.pt"], check=True)
try:
    check_target(home / "out.pt", overwrite=True, inputs=[])
except OutputError as error:
    print(error)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="mount namespaces of Linux")
def test_check_target_refuses_mount_point(tmp_path):
    (tmp_path / "source").mkdir()
    for name in ("file", "out.pt"):
        (tmp_path / name).write_text("")
    command = ["unshare", "-rm", sys.executable, "-c", MOUNTED, tmp_path]
    probe = [*command[:2], "true"]
    if not shutil.which("unshare") or subprocess.run(probe, check=False).returncode:
        pytest.skip("needs a mount namespace (unshare -rm)")
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert len(done.stdout.splitlines()) == 4
    assert all("is a mount point" in line for line in done.stdout.splitlines())


# ---------------------------------------------------------------------------------- names and room


@posix
def test_check_target_refuses_too_long_name(tmp_path):
    assert "Choose a shorter name" in refused(tmp_path / ("o" * 256))


def test_check_target_refuses_link_to_itself(tmp_path):
    (tmp_path / "out").symlink_to("out")
    assert "links" in refused(tmp_path / "out")


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write all")
def test_check_target_refuses_write_protected_file(tmp_path):
    (tmp_path / "out").write_text("old")
    (tmp_path / "out").chmod(0o444)
    assert "may not be written to" in refused(tmp_path / "out")


@pytest.mark.parametrize(("needed", "fits"), [(0, True), (1000, True), (1001, False)])
def test_check_room_asks_disk_of_output(tmp_path, monkeypatch, needed, fits):
    asked = []

    def usage(path):
        asked.append(Path(path))
        return SimpleNamespace(free=1000)

    monkeypatch.setattr(shutil, "disk_usage", usage)
    if fits:
        check_room(tmp_path / "out.pt", needed)
    else:
        with pytest.raises(OutputError, match=r"needs 1 kB where 1 kB are free, 1 B too"):
            check_room(tmp_path / "out.pt", needed)
    assert asked == [tmp_path]
