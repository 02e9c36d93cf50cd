"""Users' files as modules: those of a directory find each other."""

import importlib
import os
import pickle
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from helpers import save
from spec_helpers import error_of, write

from ckptavg.cli import main
from ckptavg.specs.importing import call_factory, find_object
from ckptavg.specs.sources import make_model
from ckptavg.specs.user_modules import keep_imports


def test_find_object_separates_files_of_one_name():
    paths = [write(f"run{width}/nets.py", f"WIDTH = {width}") for width in (3, 4, 5)]
    found = [find_object(str(path), "WIDTH") for path in paths * 2]
    assert found == [3, 4, 5, 3, 4, 5]
    names = {find_object(str(path), "__name__") for path in paths}
    assert len(names) == 3
    assert all(sys.modules[name].__name__ == name for name in names)


@pytest.mark.parametrize("is_package", [False, True])
@pytest.mark.parametrize("imports", ["import {0}", "def late():\n    import {0}\n    return {0}"])
def test_user_modules_import_their_own_siblings(imports, is_package):
    """Two directories have files of the same names; one is imported by name elsewhere already."""
    for width in (3, 4):
        write(f"run{width}/sizes/__init__.py" if is_package else f"run{width}/sizes.py",
              "from sizes.nets import WIDTH" if is_package else f"WIDTH = {width}")  # fmt: skip
        if is_package:
            write(f"run{width}/sizes/nets.py", f"WIDTH = {width}")
        write(f"run{width}/uses.py", "from torch import nn\n" + imports.format("sizes")
              + ("" if "late" in imports else "\ndef late(): return sizes")
              + "\ndef make(): return nn.Linear(late().WIDTH, 1)")  # fmt: skip
    for width in (3, 4, 3, 4):
        assert make_model(f"run{width}/uses.py:make").in_features == width


def test_user_modules_share_a_sibling_named_by_path():
    for width in (3, 4):
        write(f"run{width}/nets.py", "class Net: pass")
        write(f"run{width}/uses.py", "import nets\nNet = nets.Net")
    for width in (3, 4):
        net = find_object(f"run{width}/nets.py", "Net")
        assert find_object(f"run{width}/uses.py", "Net") is net


def test_find_object_keeps_modules_of_others():
    write("run3/sizes.py", "WIDTH = 3")
    write("run4/sizes.py", "WIDTH = 4")
    write("run4/uses.py", "import sizes\nWIDTH = sizes.WIDTH")
    sys.path.insert(0, str(Path("run3").resolve()))
    theirs = importlib.import_module("sizes")
    assert find_object("run4/uses.py", "WIDTH") == 4
    assert importlib.import_module("sizes") is theirs
    assert sys.path[0] == str(Path("run3").resolve())


def test_find_object_suggests_similar_names():
    write("nets.py", "def make_net(): ...\ndef make_data(): ...")
    said = error_of(find_object, "nets.py", "make")
    assert said == "nets.py has no attribute 'make'. Did you mean make_net or make_data?"
    assert error_of(find_object, "nets.py", "x").endswith("Check the name.")
    assert error_of(find_object, "net.py", "x").endswith("Did you mean nets.py?")


def test_keep_imports_serves_other_processes():
    """Workers that are started anew have no more than a function's name, and ``sys.path``."""
    for width in (3, 4):
        write(f"run{width}/sizes.py", f"WIDTH = {width}\ndef tell(): return 10 * WIDTH")
        write(f"run{width}/uses.py", "import sizes\ndef tell(): return sizes.WIDTH")
    write("run4/more.py", "import sizes\ndef tell(): return 100 * sizes.WIDTH")
    named = ["run3/uses.py", "run4/uses.py", "run4/sizes.py", "run4/more.py", "run3/sizes.py"]
    with keep_imports():
        functions = [find_object(path, "tell") for path in named]
        for order in (functions, functions[::-1]):
            code = (
                f"import pickle, sys; sys.path = {sys.path!r}\n"
                f"print([tell() for tell in pickle.loads({pickle.dumps(order)!r})])"
            )
            done = subprocess.run(
                [sys.executable, "-c", code], capture_output=True, text=True, check=False
            )
            assert done.stdout.strip() == str([tell() for tell in order]), done.stderr
        assert [tell() for tell in functions] == [3, 4, 40, 400, 30]


def test_find_object_restores_sys_path():
    write("run3/sizes.py", "WIDTH = 3")
    write("run3/uses.py", "import sizes\ndef make(): return sizes.WIDTH")
    write("package_beside/nets.py", "WIDTH = 4")
    before = list(sys.path)
    assert find_object("package_beside.nets", "WIDTH") == 4
    assert call_factory("run3/uses.py:make") == 3
    assert error_of(find_object, "run3/none.py", "WIDTH")
    assert sys.path == before


def test_keep_imports_keeps_directories_of_the_caller(tmp_path):
    write("run3/sizes.py", "WIDTH = 3")
    sys.path.append(str(tmp_path / "run3"))
    before = list(sys.path)
    with keep_imports():
        assert find_object("run3/sizes.py", "WIDTH") == 3
        assert sys.path == before
    assert sys.path == before


def test_keep_imports_allows_late_imports():
    for name in ("late", "later"):
        write(f"run3/{name}.py", "WIDTH = 3")
    write("run3/uses.py", "def late():\n    import late\n    return late.WIDTH\n"
          "def later():\n    import later\n    return later.WIDTH")  # fmt: skip
    before = list(sys.path)
    with keep_imports():
        late, later = (find_object("run3/uses.py", name) for name in ("late", "later"))
        with keep_imports():
            find_object("run3/uses.py", "late")
        assert late() == 3
        assert sys.path != before
    assert sys.path == before
    with pytest.raises(ModuleNotFoundError):
        later()


def test_keep_imports_separates_threads():
    for width in (3, 4):
        write(f"run{width}/sizes.py", f"import time\ntime.sleep(0.05)\nWIDTH = {width}")
        write(f"run{width}/uses.py", "def make():\n    import sizes\n    return sizes.WIDTH")
    before, output = list(sys.path), sys.stdout
    opened, results = threading.Barrier(2), {}

    def use(width):
        with keep_imports():
            opened.wait(60)
            results[width] = [call_factory(f"run{width}/uses.py:make") for _ in range(3)]
            opened.wait(60)

    threads = [threading.Thread(target=use, args=(width,)) for width in (3, 4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert results == {3: [3] * 3, 4: [4] * 3}
    assert sys.path == before
    assert sys.stdout is output


@pytest.mark.parametrize("own", ["nets.py", "run3/nets.py"])
def test_eval_command_restores_sys_path(own):
    """The neighbour is imported by the loader, long after the file of the data."""
    write(own, "import torch\n"
          "def net(): return torch.nn.Linear(3, 2)\n"
          "class Rows(torch.utils.data.Dataset):\n"
          "    def __len__(self): return 4\n"
          "    def __getitem__(self, i):\n"
          "        import late\n"
          "        return torch.full((3,), late.WIDTH), 0")  # fmt: skip
    write(Path(own).with_name("late.py"), "WIDTH = 3.0")
    save(Path("a.pt"), {"weight": torch.ones(2, 3), "bias": torch.zeros(2)})
    before = list(sys.path)
    arguments = ["eval", "a.pt", "--model", f"{own}:net", "--data", f"{own}:Rows"]
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 0, result.output
    assert sys.path == before


@pytest.mark.filterwarnings("ignore:.*multi-threaded:DeprecationWarning")
@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")
def test_find_object_works_in_a_forked_process():
    write("run3/slow.py", "import time\nfor _ in range(40): time.sleep(0.02)")
    write("run4/sizes.py", "WIDTH = 4")
    thread = threading.Thread(target=lambda: find_object("run3/slow.py", "time"))
    thread.start()
    child = os.fork()
    if child == 0:
        os._exit(find_object("run4/sizes.py", "WIDTH"))
    _, status = os.waitpid(child, 0)
    assert thread.is_alive()
    assert os.waitstatus_to_exitcode(status) == 4
    thread.join(60)
