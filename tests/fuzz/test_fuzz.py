"""The saved inputs again, and a short run of chance, on every target; ``run.py`` runs longer."""

from __future__ import annotations

import itertools
import pickle
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from run import mutations
from targets import CORPUS, TARGETS

from ckptavg.formats import parts
from ckptavg.formats.safe_pickle import unpickler
from ckptavg.formats.safetensors import header
from ckptavg.formats.torch_save import zip_reader

RUNS = {"average": 20}
_MOST_RUNS = 200


def saved(name: str) -> list[bytes]:
    return [path.read_bytes() for path in sorted((CORPUS / name).iterdir())]


def replay(name: str, tmp_path: Path) -> None:
    for data in saved(name):
        TARGETS[name].run(data, tmp_path / "room")


@pytest.mark.parametrize("name", TARGETS)
def test_fuzz_corpus_is_small_and_passes(name, tmp_path):
    inputs = saved(name)
    assert 5 < len(inputs) < 60
    assert max(map(len, inputs)) <= 20_000
    replay(name, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("name", TARGETS)
def test_fuzz_mutations_find_nothing(name, tmp_path):
    target = TARGETS[name]
    seeds = [*target.seeds(), *saved(name)]
    for data in itertools.islice(mutations(seeds, seed=1), RUNS.get(name, _MOST_RUNS)):
        target.run(data, tmp_path / "room")


def test_mutations_follow_seed():
    first, again, other = (list(itertools.islice(mutations([b"abc"], n), 50)) for n in (1, 1, 2))
    assert first == again != other


def unpickled(_data):
    return pickle.loads(b"cos\nsystem\n.")


@pytest.mark.parametrize(
    ("name", "place", "breakage"),
    [
        ("torch_pickle", (unpickler, "loads"), unpickled),
        ("torch_pickle", (parts, "_MOST_REPEATED"), 2**60),
        ("torch_zip", (zip_reader, "_DAMAGE"), ()),
        ("safetensors", (header, "_check_ranges"), lambda *_: None),
    ],
)
def test_fuzz_finds_broken_parser(name, place, breakage, tmp_path, monkeypatch):
    """What is fuzzed is really run, and what goes wrong in it is seen."""
    monkeypatch.setattr(*place, breakage)
    with pytest.raises(BaseException):  # noqa: B017 - whatever it is
        replay(name, tmp_path)
