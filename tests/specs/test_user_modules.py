"""Users' files as modules: those of a directory find each other."""

import importlib
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
from spec_helpers import error_of, write

from ckptavg.specs.importing import find_object
from ckptavg.specs.sources import make_model


def test_files_of_the_same_name_stay_the_same_when_they_are_named_again():
    paths = [write(f"run{width}/nets.py", f"WIDTH = {width}") for width in (3, 4, 5)]
    found = [find_object(str(path), "WIDTH") for path in paths * 2]
    assert found == [3, 4, 5, 3, 4, 5]
    names = {find_object(str(path), "__name__") for path in paths}
    assert len(names) == 3
    assert all(sys.modules[name].__name__ == name for name in names)


@pytest.mark.parametrize("is_package", [False, True])
@pytest.mark.parametrize("imports", ["import {0}", "def late():\n    import {0}\n    return {0}"])
def test_files_find_their_own_siblings(imports, is_package):
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


def test_a_sibling_is_the_module_that_is_named_by_its_path():
    for width in (3, 4):
        write(f"run{width}/nets.py", "class Net: pass")
        write(f"run{width}/uses.py", "import nets\nNet = nets.Net")
    for width in (3, 4):
        net = find_object(f"run{width}/nets.py", "Net")
        assert find_object(f"run{width}/uses.py", "Net") is net


def test_imports_of_others_are_as_they_were():
    write("run3/sizes.py", "WIDTH = 3")
    write("run4/sizes.py", "WIDTH = 4")
    write("run4/uses.py", "import sizes\nWIDTH = sizes.WIDTH")
    sys.path.insert(0, str(Path("run3").resolve()))
    theirs = importlib.import_module("sizes")
    assert find_object("run4/uses.py", "WIDTH") == 4
    assert importlib.import_module("sizes") is theirs
    assert sys.path[0] == str(Path("run3").resolve())


def test_a_name_that_is_not_there_gets_those_that_are_like_it():
    write("nets.py", "def make_net(): ...\ndef make_data(): ...")
    said = error_of(find_object, "nets.py", "make")
    assert said == "nets.py has no attribute 'make'. Did you mean make_net or make_data?"
    assert error_of(find_object, "nets.py", "x").endswith("Check the name.")
    assert error_of(find_object, "net.py", "x").endswith("Did you mean nets.py?")


def test_other_processes_import_the_same_files():
    """Workers that are started anew have no more than a function's name, and ``sys.path``."""
    for width in (3, 4):
        write(f"run{width}/sizes.py", f"WIDTH = {width}\ndef tell(): return 10 * WIDTH")
        write(f"run{width}/uses.py", "import sizes\ndef tell(): return sizes.WIDTH")
    write("run4/more.py", "import sizes\ndef tell(): return 100 * sizes.WIDTH")
    named = ["run3/uses.py", "run4/uses.py", "run4/sizes.py", "run4/more.py", "run3/sizes.py"]
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
