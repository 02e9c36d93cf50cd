"""What the errors about specifications suggest: what was probably meant."""

import sys

import pytest
from PIL import Image
from spec_helpers import error_of, write

from ckptavg.errors import SpecError, UsageError
from ckptavg.specs.sources import make_data, make_model

NET = """
raise RuntimeError("only read, never run")

class SmallCNN: ...
class _Hidden: ...
def make_net(): ...
async def later(): ...
"""


def about_data(spec, kind=UsageError):
    return error_of(make_data, spec, train=False, kind=kind)


def about_model(spec, kind=UsageError):
    return error_of(make_model, spec, kind=kind)


@pytest.fixture
def home(tmp_path):
    """Files and directories of all kinds, in the working directory."""
    write("val.txt", "a text")
    write("notes.md", "ein wort\u00e4" * 2000)
    write("val.bin", "\0\1")
    write("rows.csv", "a,b")
    write("net.py", NET)
    write("one.py", "def make(): ...")
    write("none.py", "x = 1")
    write("wrong.py", "def make(:")
    for folder in ("pets/cat", "pets/dog", "sorted/train/cat", "sorted/val/cat"):
        (tmp_path / folder).mkdir(parents=True)
        Image.new("RGB", (2, 2)).save(tmp_path / folder / "a.JPEG")
    (tmp_path / "cifar" / "cifar-10-batches-py").mkdir(parents=True)
    (tmp_path / "cifar" / "cifar-100-python").mkdir()
    write("lm/config.json", "{}")
    write("run/checkpoint-10/config.json", "{}")


@pytest.mark.parametrize(
    ("spec", "meant"),
    [
        ("val.txt", "text:val.txt"),
        ("./val.txt", "text:val.txt"),
        ("val.tx", "text:val.txt"),
        ("notes.md", "text:notes.md"),
        ("val.bin", "tokens:val.bin"),
        ("pets", "imagefolder:pets"),
        ("pet", "imagefolder:pets"),
        ("sorted", "imagefolder:sorted/val"),
        ("cifar", "cifar10:cifar"),
        ("cifar/cifar-10-batches-py", "cifar10:cifar"),
        ("cifar/cifar-100-python", "cifar100:cifar"),
        ("one.py", "one.py:make"),
        ("one", "one.py:make"),
    ],
)
def test_data_without_prefix_gets_a_suggestion(home, spec, meant):
    assert about_data(spec).endswith(f"but got {spec!r}. Did you mean {meant}?")


def test_data_table_needs_a_function(home):
    assert "Write a function that returns a Dataset of it" in about_data("rows.csv")


@pytest.mark.parametrize(
    ("spec", "meant"),
    [
        ("lm", "Did you mean hf:lm?"),
        ("run", "Did you mean hf:run?"),
        ("net.py", "Name one of its functions: net.py:SmallCNN, net.py:make_net."),
        ("net.py:", "Name one of its functions: net.py:SmallCNN, net.py:make_net."),
        ("net", "Name one of its functions: net.py:SmallCNN, net.py:make_net."),
        ("none.py", "Name a function of it: none.py:FUNCTION."),
        ("wrong.py", "Name a function of it: wrong.py:FUNCTION."),
        ("val.bin", "what is wanted is the network that takes its weights."),
        ("resnet81", "Did you mean torchvision:resnet18?"),
        ("torchvision", "Name a model after it: torchvision:NAME."),
    ],
)
def test_model_without_prefix_gets_a_suggestion(home, spec, meant):
    assert about_model(spec).endswith(meant)


@pytest.mark.parametrize(
    ("library", "meant"),
    [
        ("timm", "torchvision:resnet18?"),
        ("torchvision", "timm:resnet18?"),
    ],
)
def test_model_name_suggests_its_library(monkeypatch, library, meant):
    class Library:
        @staticmethod
        def list_models():
            return ["resnet18", "resnet34"]

    monkeypatch.setitem(sys.modules, "timm", Library)
    monkeypatch.setitem(sys.modules, "torchvision.models", Library)
    monkeypatch.setitem(sys.modules, library if library == "timm" else "torchvision.models", None)
    assert about_model("resnet18").endswith(f"Did you mean {meant}")


def test_model_name_suggests_both_libraries(monkeypatch):
    class Library:
        @staticmethod
        def list_models():
            return ["resnet18"]

    monkeypatch.setitem(sys.modules, "timm", Library)
    meant = "Did you mean torchvision:resnet18 or timm:resnet18?"
    assert about_model("resnet18").endswith(meant)


@pytest.mark.parametrize(
    ("spec", "meant"),
    [
        ("imagfolder:pets", "imagefolder:pets"),
        ("image_folder:pets", "imagefolder:pets"),
        ("ImageFolder:pets", "imagefolder:pets"),
        ("folder:pets", "imagefolder:pets"),
        ("CIFAR10:cifar", "cifar10:cifar"),
        ("cifar-100:cifar", "cifar100:cifar"),
        ("txt:val.txt", "text:val.txt"),
    ],
)
def test_data_prefix_mistyped_gets_a_suggestion(home, spec, meant):
    assert about_data(spec, SpecError).endswith(f"Did you mean {meant}?")


@pytest.mark.parametrize(
    ("spec", "meant"),
    [
        ("torchvison:resnet18", "torchvision:resnet18"),
        ("tim:resnet18", "timm:resnet18"),
        ("huggingface:lm", "hf:lm"),
        ("lightening:lit.Lit", "lightning:lit.Lit"),
    ],
)
def test_model_prefix_mistyped_gets_a_suggestion(home, spec, meant):
    assert about_model(spec, SpecError).endswith(f"Did you mean {meant}?")


def test_prefix_of_other_kind_is_an_error():
    assert "torchvision:resnet18 names a model, not data" in about_data(
        "torchvision:resnet18", SpecError
    )
    assert "imagefolder:pets names data, not a model" in about_model("imagefolder:pets", SpecError)


def test_module_name_is_not_taken_for_a_prefix():
    write("texts.py", "def rows(): return [0]")
    assert make_data("texts:rows", train=False) == [0]


@pytest.mark.parametrize(
    ("spec", "meant"),
    [
        ("imagefolder:pet", "imagefolder:pets"),
        ("imagefolder:sorted", "imagefolder:sorted/val"),
        ("imagefolder:pets/cat", "imagefolder:pets"),
        ("imagefolder:cifar", "cifar10:cifar"),
        ("cifar10:cifar/cifar-10-batches-py", "cifar10:cifar"),
    ],
)
def test_image_directory_gets_a_suggestion(home, spec, meant):
    assert about_data(spec, SpecError).endswith(f"Did you mean {meant}?")


def test_file_mistyped_gets_a_suggestion(home):
    assert about_model("nets.py:make_net", SpecError) == (
        "the file nets.py does not exist. Did you mean net.py?"
    )


def test_hub_name_is_not_downloaded():
    message = about_model("hf:someone/model", SpecError)
    assert "someone/model does not exist. Nothing is downloaded: hf download" in message


# Errors out of the users' code


OWN = """
def width():
    raise KeyError("width")

def make(size):
    return width()

def data():
    import torch
    return torch.ones(2) @ torch.ones(3)

def ends():
    raise SystemExit("usage: train.py --data DIR")

def prints():
    print("building")
    return [0]
"""


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("make", "own.py:make failed: TypeError: make() missing 1 required positional argument"),
        ("data", "own.py:data failed: RuntimeError: "),
        ("ends", "own.py:ends failed: SystemExit: usage: train.py --data DIR (own.py:13 in ends)"),
    ],
)
def test_factory_error_names_the_function(name, said):
    write("own.py", OWN)
    message = about_data(f"own.py:{name}", SpecError)
    assert message.startswith(said)
    assert "\n" not in message


def test_factory_error_gives_innermost_line_of_user_code():
    write("own.py", OWN)
    message = error_of(make_data, "own.py:make", {"size": 1}, train=False)
    assert "KeyError: 'width' (own.py:3 in width)" in message
    assert "(own.py:10 in data)" in about_data("own.py:data", SpecError)


def test_factory_error_names_missing_arguments():
    write("own.py", OWN)
    assert about_data("own.py:make", SpecError).endswith("Pass size=VALUE among its arguments.")


@pytest.mark.parametrize("home_", ["script.py", "script"])
def test_script_that_runs_on_import_is_an_error(home_):
    write("script.py", "import argparse\nargparse.ArgumentParser().parse_args(['--nothing'])")
    message = about_data(f"{home_}:make", SpecError)
    assert f"importing {home_} ended the program (script.py:2)" in message
    assert '__name__ == "__main__"' in message


def test_factory_prints_go_to_stderr(capsys):
    write("own.py", "print('importing')\n" + OWN)
    make_data("own.py:prints", train=False)
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err == "importing\nbuilding\n"
