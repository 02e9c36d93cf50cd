"""Directories of data, and a place of their own for what tests import."""

import pickle
import sys

import numpy as np
import pytest
from PIL import Image
from spec_helpers import COLOUR
from torchvision import datasets


@pytest.fixture(autouse=True)
def imports_of_its_own(tmp_path, monkeypatch):
    """Undo what a test imports from its directory, and run it there."""
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.chdir(tmp_path)
    before = dict(sys.modules)
    yield
    for name in sys.modules.keys() - before.keys():
        if str(tmp_path) in str(getattr(sys.modules[name], "__file__", "")):
            del sys.modules[name]
    for name, module in before.items():
        sys.modules[name] = module


@pytest.fixture
def folder(tmp_path):
    """Two classes of small images of one colour."""
    for name, kind in {"cats/a": "png", "cats/b": "png", "dogs/a": "bmp"}.items():
        path = tmp_path / "images" / f"{name}.{kind}"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (40, 30), COLOUR).save(path)
    return f"imagefolder:{tmp_path / 'images'}"


@pytest.fixture
def cifar(tmp_path, monkeypatch):
    """Small CIFAR directories; torchvision takes them although their checksums differ."""
    monkeypatch.setattr(datasets.cifar, "check_integrity", lambda *_: True)
    pixels = np.repeat(np.uint8(COLOUR), 32 * 32)[None]

    def store(path, content):
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(pickle.dumps(content))

    ten, hundred = tmp_path / "cifar-10-batches-py", tmp_path / "cifar-100-python"
    for i in range(1, 6):
        store(ten / f"data_batch_{i}", {"data": pixels, "labels": [i]})
    store(ten / "test_batch", {"data": pixels, "labels": [9]})
    store(ten / "batches.meta", {"label_names": list("abcdefghij")})
    for split, label in {"train": 42, "test": 99}.items():
        store(hundred / split, {"data": pixels, "fine_labels": [label]})
    store(hundred / "meta", {"fine_label_names": [str(i) for i in range(100)]})
    return tmp_path
