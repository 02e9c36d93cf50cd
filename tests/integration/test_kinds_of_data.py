"""Data and models of all kinds, from the command line to the statistics, against float64."""

from __future__ import annotations

import itertools
import sys
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from helpers import save
from torch import nn

import ckptavg
from ckptavg.cli import main

MODULE = """
import torch
from torch import nn
from torch.nn.utils.rnn import PackedSequence, pack_sequence
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

COUNT = 50
DRAWN = torch.Generator().manual_seed(1)
LABELS = torch.randint(3, (COUNT,), generator=DRAWN)
ROWS = torch.randn(COUNT, 4, generator=DRAWN) + LABELS[:, None]
OTHERS = 2 * torch.randn(COUNT, 4, generator=DRAWN) - 1
SIZES = torch.randint(1, 6, (COUNT,), generator=DRAWN)
PADDED = torch.randn(COUNT, 5, 4, generator=DRAWN) + 3
REAL = torch.arange(5) < SIZES[:, None]

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.fc, self.bn, self.head = nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Linear(5, 3)

    def encode(self, x):
        return self.bn(self.fc(x)).relu()

    def forward(self, x):
        return self.head(self.encode(x))

class Siamese(Net):
    def forward(self, one, other):
        return self.head((self.encode(one) - self.encode(other)).abs())

class Views(Net):
    def forward(self, views):
        return self.head(sum(self.encode(view) for view in views))

class Generator(Net):
    def __init__(self):
        super().__init__()
        self.gain = nn.Embedding(3, 5)

    def forward(self, z, y):
        return self.head(self.encode(z) * self.gain(y))

class Named(Generator):
    def forward(self, z, classes):
        return super().forward(z, classes)

class Masked(Net):
    def forward(self, x, mask=None):
        if mask is None:
            mask = torch.ones(x.shape[:2], dtype=torch.bool)
        out = torch.zeros(*x.shape[:2], 5)
        out[mask] = self.encode(x[mask])
        return self.head(out.sum(1) / mask.sum(1, keepdim=True))

class Packed(Net):
    def forward(self, packed):
        states = self.encode(packed.data)
        return self.head(torch.zeros(len(packed.sorted_indices), 5) + states.mean(0))

class Detector(Net):
    def forward(self, images, targets=None):
        return self.head(self.encode(torch.stack(images)))

class Samples(Dataset):
    def __init__(self, sample):
        self.sample = sample

    def __len__(self):
        return COUNT

    def __getitem__(self, i):
        return self.sample(i)

class Stream(IterableDataset):
    def __init__(self, items):
        self.items = items

    def __iter__(self):
        return iter(self.items())

class Table:
    def __len__(self):
        return COUNT

    def __getitem__(self, i):
        if i >= COUNT:
            raise IndexError
        return {"x": ROWS[i], "labels": LABELS[i]}

class Pipeline:
    def __iter__(self):
        return ([{"data": x, "label": y[:, None]}] for x, y in batches())

def samples():
    return [(x, int(y)) for x, y in zip(ROWS, LABELS)]

def table():
    return Table()

def described():
    return Samples(lambda i: {
        "image": ROWS[i], "label": int(LABELS[i]), "path": f"{i}.png", "meta": {"id": i, "by": "me"}
    })

def named_by_hand():
    return Samples(lambda i: (ROWS[i], int(LABELS[i]), f"{i}.png"))

def batches():
    for part in torch.arange(COUNT).split(20):
        yield ROWS[part], LABELS[part]

def samples_one_by_one():
    yield from samples()

def arrays():
    return [(x.numpy(), y.numpy()) for x, y in batches()]

def stream():
    return Stream(samples)

def stream_of_batches():
    return Stream(batches)

def stream_of_mappings():
    return Stream(lambda: ({"x": x, "labels": y, "name": ["a"] * len(x)} for x, y in batches()))

def pipeline():
    return Pipeline()

def one_hot():
    return TensorDataset(ROWS, nn.functional.one_hot(LABELS, 3).float())

def column():
    return TensorDataset(ROWS, LABELS[:, None])

def pairs():
    return Samples(lambda i: (ROWS[i], OTHERS[i], int(LABELS[i])))

def nested_pairs():
    return Samples(lambda i: ((ROWS[i], OTHERS[i]), int(LABELS[i])))

def named_pairs():
    return Samples(lambda i: {
        "one": ROWS[i], "other": OTHERS[i], "label": int(LABELS[i]), "id": str(i)
    })

def noise():
    return Samples(lambda i: (ROWS[i], LABELS[i], int(LABELS[i])))

def nested_noise():
    return Samples(lambda i: ((ROWS[i], LABELS[i]), int(LABELS[i])))

def named_noise():
    return Samples(lambda i: {"z": ROWS[i], "y": LABELS[i], "labels": int(LABELS[i])})

def noise_and_classes():
    return Samples(lambda i: {"z": ROWS[i], "classes": LABELS[i], "labels": int(LABELS[i])})

def padded():
    return Samples(lambda i: (PADDED[i], REAL[i], int(LABELS[i])))

def padded_behind():
    return Samples(lambda i: (PADDED[i], int(LABELS[i]), REAL[i]))

def nested_padded():
    return Samples(lambda i: ((PADDED[i], REAL[i]), int(LABELS[i])))

def named_padded():
    return Samples(lambda i: {"x": PADDED[i], "mask": REAL[i], "labels": int(LABELS[i])})

def put_in_sequence(samples):
    return pack_sequence([x for x, _ in samples], enforce_sorted=False), torch.tensor(
        [y for _, y in samples]
    )

def sequences():
    data = Samples(lambda i: (PADDED[i, : SIZES[i]], int(LABELS[i])))
    return DataLoader(data, 20, collate_fn=put_in_sequence)

def listed_sequences():
    return list(sequences())

def unzip(samples):
    return tuple(zip(*samples))

def detections():
    data = Samples(lambda i: (ROWS[i], [{"box": torch.rand(4), "label": LABELS[i]}]))
    return DataLoader(data, 20, collate_fn=unzip)
"""

PLAIN = (
    "samples", "table", "described", "named_by_hand", "batches", "samples_one_by_one", "arrays",
    "stream", "stream_of_batches", "stream_of_mappings", "pipeline", "one_hot", "column",
)  # fmt: skip
CASES = {
    "Net": PLAIN,
    "Siamese": ("pairs", "nested_pairs", "named_pairs"),
    "Views": ("nested_pairs",),
    "Generator": ("noise", "nested_noise", "named_noise"),
    "Named": ("noise", "noise_and_classes"),
    "Masked": ("padded", "padded_behind", "nested_padded", "named_padded"),
    "Packed": ("sequences", "listed_sequences"),
    "Detector": ("detections",),
}
ALL = [(model, data) for model, kinds in CASES.items() for data in kinds]


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "kinds.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    monkeypatch.delitem(sys.modules, "kinds", raising=False)
    return tmp_path


def values_of(name: str, model: nn.Module, kinds: object) -> torch.Tensor:
    """What a model's layer sees of all of the data."""
    rows, others, padded, real = (
        getattr(kinds, which) for which in ("ROWS", "OTHERS", "PADDED", "REAL")
    )
    seen = rows
    if name in {"Siamese", "Views"}:
        seen = torch.cat((rows, others))
    if name in {"Masked", "Packed"}:
        seen = padded[real]
    with torch.no_grad():
        return model.double().fc(seen.double())


def assert_right(state: dict[str, torch.Tensor], values: torch.Tensor) -> None:
    found = [state[f"bn.running_{name}"].double() for name in ("mean", "var")]
    for value, expected in zip(found, (values.mean(0), values.var(0)), strict=True):
        torch.testing.assert_close(value, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(("model", "data"), ALL)
def test_update_bn_covers_all_samples(home: Path, model: str, data: str) -> None:
    import kinds

    save(home / "net.pt", getattr(kinds, model)().state_dict())
    args = ["net.pt", "--model", f"kinds.py:{model}", "--train-data", f"kinds.py:{data}"]
    result = CliRunner().invoke(main, ["update-bn", *args, "-b", "20", "-o", "out.pth"])
    assert result.exit_code == 0, result.output
    assert "warning" not in result.output
    values = values_of(model, getattr(kinds, model)(), kinds)
    assert_right(torch.load("out.pth"), values)
    net = getattr(kinds, model)()
    assert ckptavg.update_bn(net, getattr(kinds, data)(), batch_size=20).samples == 50
    assert_right(net.state_dict(), values)


SCORED = [case for case in ALL if case[0] not in {"Packed", "Detector"}]


@pytest.mark.parametrize(("model", "data"), SCORED)
def test_evaluate_covers_all_samples(home: Path, model: str, data: str) -> None:
    import kinds

    net = getattr(kinds, model)()
    save(home / "net.pt", net.state_dict())
    first = {
        "Net": (kinds.ROWS,),
        "Siamese": (kinds.ROWS, kinds.OTHERS),
        "Views": ([kinds.ROWS, kinds.OTHERS],),
        "Masked": (kinds.PADDED, kinds.REAL),
    }.get(model, (kinds.ROWS, kinds.LABELS))
    with torch.no_grad():
        logits = net.eval()(*first).double()
    [result] = ckptavg.evaluate(
        [home / "net.pt"], getattr(kinds, model)(), getattr(kinds, data)(), batch_size=20
    )
    expected = nn.functional.cross_entropy(logits, kinds.LABELS).item()
    assert result.metrics["n"] == 50
    assert result.metrics["nll"] == pytest.approx(expected, rel=1e-5)


def test_kinds_of_data_are_all_tried() -> None:
    named = {name.partition("(")[0] for name in MODULE.split("\ndef ")[1:]}
    tried = {*itertools.chain(*CASES.values())}
    assert named - tried == {"put_in_sequence", "unzip"}
