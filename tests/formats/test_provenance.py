"""The record of how an output was made: read with tolerance, and changed in known places only."""

import json

import pytest

from ckptavg.formats.provenance import PENDING, Provenance, Source
from ckptavg.formats.running_statistics import Statistics

INPUTS = [Source("a.pt", 10, 1.5, 1, 0.25), Source("b.pt", 10, 2.5, None, 0.75)]
BASE = Source("base.pt", 7, 0.5)
STALE = Statistics("stale", ("bn", "stem"), ("stem",))


def test_provenance_is_json_of_known_form():
    record = Provenance.of("uniform", INPUTS, STALE, [("x", "y")], BASE)
    entries = json.loads(record.to_json())
    assert list(entries) == ["version", "scheme", "checkpoints", "bn", "bn_layers", "base", "tied"]
    assert entries["checkpoints"][1] == {
        "path": "b.pt", "step": None, "coefficient": 0.75, "size": 10, "mtime": 2.5,
    }  # fmt: skip
    assert entries["base"] == {"path": "base.pt", "size": 7, "mtime": 0.5}
    assert Provenance.from_json(record.to_json()) == record
    assert (record.inputs, record.base) == (tuple(INPUTS), BASE)
    assert (record.scheme, record.bn, record.bn_layers) == (
        "uniform",
        "stale",
        {"frozen": ["stem"]},
    )


@pytest.mark.parametrize(
    "text",
    [
        None, 5, "", "{", "[]", "null", "{}", '{"checkpoints": 1}', '{"checkpoints": [1]}',
        '{"checkpoints": [{"step": "one"}]}', '{"checkpoints": [{"coefficient": true}]}',
        '{"checkpoints": [], "checkpoints": []}',
    ],
)  # fmt: skip
def test_provenance_of_other_values_is_none(text):
    assert Provenance.from_json(text) is None


def test_provenance_keeps_entries_of_other_versions():
    entries = {"checkpoints": [{"path": "a", "host": "h"}], "later": [1], "bn": "stale", "n": None}
    record = Provenance.from_json(json.dumps(entries))
    changed = record.with_statistics(Statistics("recomputed")).with_files(["b", "a"]).with_digest()
    assert changed.entries["later"] == [1]
    assert changed.entries["checkpoints"] == entries["checkpoints"]
    assert (changed.bn, changed.files, changed.digest) == ("recomputed", ["a", "b"], PENDING)
    assert list(changed.with_files([]).entries) == [*entries, "digest", "seal"]


def test_provenance_ignores_malformed_entries():
    odd = {"path": 5, "size": "1", "mtime": [], "digest": 1, "key": 2}
    entries = {
        "checkpoints": [odd], "base": 3, "version": 1, "scheme": None, "bn": [], "digest": 7,
        "bn_layers": {"frozen": "stem", "excluded": ["bn"]}, "files": ["a", 1],
    }  # fmt: skip
    record = Provenance.from_json(json.dumps(entries))
    assert record.inputs == (Source(None, key=None),)
    assert (record.base, record.version, record.scheme, record.bn) == (None,) * 4
    assert (record.digest, record.is_average) == (None, True)
    assert (record.bn_layers, record.files) == ({"excluded": ["bn"]}, ["a"])


def test_provenance_checksum_detects_damage_but_not_order():
    record = Provenance.of("uniform", INPUTS, STALE, base=BASE)
    assert record.with_checksum() == record
    hashed = record.with_digests([s.with_digest(PENDING, "model") for _, s in record.sources])
    assert hashed.is_intact
    assert hashed.base == BASE.with_digest(PENDING, "model")
    assert Provenance(dict(reversed(hashed.entries.items()))).is_intact
    assert not Provenance({**hashed.entries, "bn": "own"}).is_intact
