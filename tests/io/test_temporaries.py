"""What a run that died leaves beside its output: cleared by the next, unless it is not dead."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest
from output_files import content_of, fill, names, write
from selecting import first_only

from ckptavg.errors import OutputError
from ckptavg.io import atomic, rename, temporaries
from ckptavg.io.atomic import Publication
from ckptavg.io.output_paths import check_target

posix = pytest.mark.skipif(os.name == "nt", reason="locks of POSIX")
kinds = pytest.mark.parametrize("directory", [False, True], ids=["file", "directory"])

PROCESS = """
import os, sys
from pathlib import Path
from ckptavg.io.atomic import Publication
out, directory = Path(sys.argv[1]), sys.argv[2] == "directory"
with Publication(out, directory=directory, overwrite=True) as publication:
    file = publication.temporary / "model.safetensors" if directory else publication.temporary
    file.write_text("theirs")
    print("ready", flush=True)
    if sys.stdin.readline() == "publish\\n":
        publication.publish()
"""


@pytest.fixture
def other_process():
    """Another process that is in the middle of writing an output."""
    started = []

    def start(out: Path, kind: str) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [sys.executable, "-c", PROCESS, os.fspath(out), kind],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        started.append(process)
        assert process.stdout.readline() == "ready\n"
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate()


@posix
@first_only("kind", ["file", "directory"])
def test_temporary_is_cleared_only_once_its_run_died(tmp_path, other_process, kind):
    out = tmp_path / "out"
    process = other_process(out, kind)
    (theirs,) = names(tmp_path)
    with Publication(out, directory=kind == "directory", overwrite=True) as publication:
        assert theirs in names(tmp_path)
        write(publication)
        publication.publish()
    assert names(tmp_path) == {"out", theirs}
    process.kill()
    process.wait()
    assert names(tmp_path) == {"out", theirs}
    with Publication(out, directory=kind == "directory", overwrite=True) as publication:
        assert names(tmp_path) == {"out", publication.temporary.name}
    assert content_of(out) == "new"


@posix
@first_only("kind", ["file", "directory"])
def test_publication_survives_publication_of_another_run(tmp_path, other_process, kind):
    out = tmp_path / "out"
    process = other_process(out, kind)
    with Publication(out, directory=kind == "directory", overwrite=True) as publication:
        write(publication)
        publication.publish()
    process.communicate("publish\n")
    assert process.returncode == 0
    assert content_of(out) == "theirs"
    assert names(tmp_path) == {"out"}


@kinds
def test_publications_of_one_process_do_not_clear_each_other(tmp_path, directory):
    out = tmp_path / "out"
    with Publication(out, directory=directory, overwrite=True) as one:
        with Publication(out, directory=directory, overwrite=True) as two:
            write(one, "one")
            write(two, "two")
            two.publish()
        one.publish()
    assert content_of(out) == "one"
    assert names(tmp_path) == {"out"}


NEIGHBOURS = [".out.pt.1234abcd.ckptavg-tmp", ".out.v2.1234abcd.ckptavg-tmp", ".other.12345678.tmp",
              "out.1234abcd.ckptavg-tmp", ".outer.1234abcd.ckptavg-tmp"]  # fmt: skip


@pytest.mark.parametrize("neighbour", NEIGHBOURS)
def test_temporaries_of_other_outputs_are_kept(tmp_path, neighbour):
    (tmp_path / neighbour).write_text("theirs")
    with Publication(tmp_path / "out", directory=False, overwrite=True):
        pass
    assert names(tmp_path) == {neighbour}


@pytest.mark.parametrize("exists", [True, False])
def test_backup_of_another_output_is_kept(tmp_path, exists):
    backup = fill(tmp_path / ".out.v2.1234abcd.ckptavg-old")
    if exists:
        (tmp_path / "out").write_text("old")
    with Publication(tmp_path / "out", directory=False, overwrite=False):
        pass
    assert content_of(backup) == "old"
    assert names(tmp_path) == {backup.name} | ({"out"} if exists else set())


@pytest.mark.parametrize("name", ["out[1].pt", "o*t.pt", "out?.pt", "out 1.pt"])
def test_temporaries_of_names_with_wildcards_are_cleared(tmp_path, name):
    left, other = f".{name}.1234abcd.ckptavg-tmp", ".out1.pt.1234abcd.ckptavg-tmp"
    (tmp_path / left).write_text("dead")
    (tmp_path / other).write_text("another's")
    with Publication(tmp_path / name, directory=False, overwrite=True):
        assert left not in names(tmp_path)
    assert names(tmp_path) == {other}


CRASH = """
import os, sys
from pathlib import Path
from ckptavg.io import rename
from ckptavg.io.atomic import Publication
out, steps = Path(sys.argv[1]), int(sys.argv[2])
rename._RENAMEAT2 = None
rename_path, done = Path.rename, []
def crash(self, target):
    if len(done) == steps:
        os._exit(9)
    done.append(target)
    return rename_path(self, target)
Path.rename = crash
with Publication(
    out, directory=True, overwrite=True, replaceable=["config.json"]
) as publication:
    (publication.temporary / "model.safetensors").write_text("new")
    publication.publish()
    os._exit(0)
"""


@posix
@first_only("steps", [1, 0, 2, 3])
def test_replacement_in_two_steps_survives_crash(tmp_path, steps):
    out = fill(tmp_path / "out", "config.json")
    done = subprocess.run([sys.executable, "-c", CRASH, out, str(steps)], check=False)
    assert done.returncode == (0 if steps == 3 else 9)
    assert out.exists() == (steps != 1)
    with Publication(out, directory=True, overwrite=True) as publication:
        assert content_of(out) == ("new" if steps >= 2 else "old")
        assert names(tmp_path) == {"out", publication.temporary.name}
    assert content_of(out) == ("new" if steps >= 2 else "old")


@pytest.mark.parametrize("directory", [False, True])
def test_publication_works_without_file_locks(tmp_path, monkeypatch, directory):
    def flock(*_):
        raise OSError(errno.ENOSYS, "no locks here")

    left = tmp_path / ".out.1234abcd.ckptavg-tmp"
    left.write_text("whose is it?")
    monkeypatch.setattr("fcntl.flock", flock)
    with Publication(tmp_path / "out", directory=directory, overwrite=False) as publication:
        target = publication.temporary / "x" if directory else publication.temporary
        target.write_text("new")
        publication.publish()
    assert (tmp_path / "out").exists()
    assert left.exists()


# ------------------------------------------------------------- two runs at the same moment, or none


@posix
@kinds
@pytest.mark.parametrize("moment", ["before the lock", "while it is locked for removal"])
def test_temporary_cleared_before_its_lock_is_error(tmp_path, monkeypatch, directory, moment):
    """Another run's cleaning comes between making a temporary and locking it."""
    out, lock = tmp_path / "out", temporaries.lock

    def disturbed(handle, path):
        monkeypatch.setattr(temporaries, "lock", lock)
        if moment == "before the lock":
            temporaries.remove_stale(out)
            return lock(handle, path)
        with temporaries._lock_if_stale(path) as stale:
            assert stale
            return lock(handle, path)

    monkeypatch.setattr(temporaries, "lock", disturbed)
    with (
        pytest.raises(OutputError, match="another run writes it at the same time"),
        Publication(out, directory=directory, overwrite=False),
    ):
        pytest.fail("it was opened")
    assert names(tmp_path) == set()


CLEANER = """
import sys
from pathlib import Path
from ckptavg.io import temporaries
print("ready", flush=True)
while True:
    temporaries.remove_stale(Path(sys.argv[1]))
"""


@pytest.mark.slow
@posix
@kinds
def test_publications_survive_concurrent_cleaning(tmp_path, directory):
    """Each run publishes, or is told that another disturbed it; what was published stays."""
    out, published = tmp_path / "out", []
    command = [sys.executable, "-c", CLEANER, os.fspath(out)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as cleaner:
        assert cleaner.stdout.readline() == "ready\n"
        for i in range(150):
            with (
                suppress(OutputError),
                Publication(out, directory=directory, overwrite=True) as publication,
            ):
                write(publication, str(i))
                publication.publish()
                published.append(str(i))
            assert not published or content_of(out) == published[-1]
        assert cleaner.poll() is None
        cleaner.kill()
    temporaries.remove_stale(out)
    assert published
    assert names(tmp_path) == {"out"}


@pytest.mark.slow
@posix
def test_backup_of_living_run_is_kept(tmp_path, other_process):
    """Between its two renames, the output is absent; another run must not put the old one back."""
    out = fill(tmp_path / "out")
    process = other_process(out, "directory")
    (temporary,) = (path for path in tmp_path.iterdir() if path != out)
    backup = temporaries.backup_of(temporary)
    out.rename(backup)
    temporaries.remove_stale(out)
    assert names(tmp_path) == {temporary.name, backup.name}
    process.kill()
    process.wait()
    temporaries.remove_stale(out)
    assert names(tmp_path) == {"out"}
    assert content_of(out) == "old"


@posix
def test_replacement_in_two_steps_interrupted_restores_old(tmp_path, monkeypatch):
    out, rename_path, done = fill(tmp_path / "out"), Path.rename, []

    def interrupted(self, target):
        if len(done) == 1:
            done.append(self)
            raise KeyboardInterrupt
        done.append(self)
        return rename_path(self, target)

    def work():
        with Publication(out, directory=True, overwrite=True) as publication:
            write(publication)
            publication.publish()

    monkeypatch.setattr(rename, "_RENAMEAT2", None)
    monkeypatch.setattr(Path, "rename", interrupted)
    with pytest.raises(KeyboardInterrupt):
        work()
    assert names(tmp_path) == {"out"}
    assert content_of(out) == "old"


@posix
@pytest.mark.parametrize("steps", [True, False], ids=["two steps", "one step"])
def test_replacement_keeps_directory_placed_by_another_run(tmp_path, monkeypatch, steps):
    """It comes between the look at the place and the rename; it stays, and this run is told."""
    out, theirs = tmp_path / "out", fill(tmp_path / "theirs", content="theirs")
    rename_new = rename.rename_new

    def raced(old, new):
        theirs.rename(out)
        rename_new(old, new)

    def work():
        with Publication(out, directory=True, overwrite=True) as publication:
            write(publication)
            publication.publish()

    if steps:
        fill(out)
        monkeypatch.setattr(rename, "_RENAMEAT2", None)
    monkeypatch.setattr(rename, "rename_new", raced)
    with pytest.raises(OutputError, match="has appeared"):
        work()
    assert content_of(out) == "theirs"
    assert names(tmp_path) == {"out"}


def test_publication_keeps_directory_of_other_files(tmp_path):
    out = tmp_path / "out"

    def work():
        with Publication(out, directory=True, overwrite=True) as publication:
            write(publication)
            fill(out, "thesis.tex", content="theirs")
            publication.publish()

    with pytest.raises(OutputError, match="not replaced"):
        work()
    assert names(tmp_path) == {"out"}
    assert names(out) == {"model.safetensors", "thesis.tex"}


# ------------------------------------------------------------------------- before any work is begun


@posix
def test_check_target_clears_leftovers_even_if_refused(tmp_path):
    out, left = tmp_path / "out.pt", tmp_path / ".out.pt.1234abcd.ckptavg-tmp"
    out.write_text("whole")
    left.hardlink_to(out)  # a run that died between giving it the new name and taking the old
    with pytest.raises(OutputError, match="exists already"):
        check_target(out, overwrite=False, inputs=[])
    assert names(tmp_path) == {"out.pt"}
    assert content_of(out) == "whole"


@posix
def test_check_target_restores_backup_and_requires_overwrite(tmp_path):
    fill(tmp_path / ".out.1234abcd.ckptavg-old")
    with pytest.raises(OutputError, match="exists already"):
        check_target(tmp_path / "out", overwrite=False, inputs=[])
    assert content_of(tmp_path / "out") == "old"


@posix
def test_backup_is_renamed_before_removal(tmp_path, monkeypatch):
    """Else it would be put back once somebody has taken the new one away."""
    out, backup = tmp_path / "out", fill(tmp_path / ".out.1234abcd.ckptavg-old")
    fill(out, content="new")
    monkeypatch.setattr(
        temporaries, "remove", lambda path: (path / "model.safetensors").unlink(missing_ok=True)
    )
    temporaries.remove_stale(out)
    assert not backup.exists()
    monkeypatch.undo()
    temporaries.remove_stale(out)
    assert names(tmp_path) == {"out"}
    assert content_of(out) == "new"


@kinds
def test_publication_interrupted_twice_leaves_nothing(tmp_path, monkeypatch, directory):
    remove, calls = temporaries.remove, []

    def interrupted(path):
        calls.append(path)
        if len(calls) == 1:
            raise KeyboardInterrupt
        remove(path)

    def work():
        with Publication(tmp_path / "out", directory=directory, overwrite=False) as publication:
            write(publication)
            monkeypatch.setattr(temporaries, "remove", interrupted)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        work()
    assert names(tmp_path) == set()


@posix
@kinds
@pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError])
def test_publication_interrupted_at_lock_leaves_nothing(tmp_path, monkeypatch, directory, error):
    def interrupted(handle, path):
        raise error

    monkeypatch.setattr(temporaries, "lock", interrupted)
    with (
        pytest.raises(error),
        Publication(tmp_path / "out", directory=directory, overwrite=False),
    ):
        pytest.fail("it was opened")
    assert names(tmp_path) == set()


# ----------------------------------------------------------------------------- systems that lack it


@kinds
def test_leftovers_without_file_locks_are_kept_and_noted(tmp_path, monkeypatch, caplog, directory):
    left = tmp_path / ".out.1234abcd.ckptavg-tmp"
    fill(left) if directory else left.write_text("whose is it?")
    monkeypatch.setattr(temporaries, "fcntl", None)  # as on Windows
    caplog.set_level("INFO", "ckptavg")
    with Publication(tmp_path / "out", directory=directory, overwrite=False) as publication:
        write(publication)
        publication.publish()
    assert names(tmp_path) == {"out", left.name}
    assert any(f"{left} may be from a crashed run" in line for line in caplog.messages)


@posix
def test_publication_tolerates_unflushable_directories(tmp_path, monkeypatch, caplog):
    fsync = os.fsync

    def refuse(handle):
        if os.path.isdir(f"/proc/self/fd/{handle}"):
            raise OSError(errno.EINVAL, "Invalid argument")
        fsync(handle)

    if not os.path.isdir("/proc/self/fd"):
        pytest.skip("needs /proc")
    monkeypatch.setattr(os, "fsync", refuse)
    with Publication(tmp_path / "out", directory=True, overwrite=False) as publication:
        write(publication)
        publication.publish()
    assert content_of(tmp_path / "out") == "new"
    assert not caplog.messages


@posix
def test_publication_warns_if_final_flush_fails(tmp_path, monkeypatch, caplog):
    flush = atomic._fsync

    def refuse(path):
        if path == tmp_path:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        flush(path)

    monkeypatch.setattr(atomic, "_fsync", refuse)
    with Publication(tmp_path / "out", directory=False, overwrite=False) as publication:
        write(publication)
        publication.publish()
    assert content_of(tmp_path / "out") == "new"
    assert any("may not survive a power cut" in line for line in caplog.messages)
