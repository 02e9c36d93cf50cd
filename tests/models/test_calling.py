"""What of a batch reaches a model: the signature of its forward decides."""

import dataclasses
import functools
from collections import OrderedDict, UserDict, namedtuple
from types import SimpleNamespace
from typing import Optional

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import PackedSequence, pack_sequence

from ckptavg.errors import EvaluationError
from ckptavg.models.calling import call, call_on_inputs
from ckptavg.models.inputs import inputs_of, split_batch, split_labels

A, B, C = torch.rand(4, 2), torch.rand(4, 3), torch.rand(4, 2)
Y, L = torch.tensor([0, 1, 1, 2]), torch.tensor([2, 2, 1, 1])
M = torch.tensor([[True, True], [True, False], [True, True], [True, False]])
ONES = M.long()
IMAGES = (torch.rand(3, 5, 6), torch.rand(3, 7, 4))
BOXES = ({"boxes": torch.rand(1, 4)}, {"boxes": torch.rand(2, 4)})
Pair = namedtuple("Pair", "image label")
Spoken = namedtuple("Spoken", "audio lengths text")


class Model(nn.Module):
    """Tells what it gets, as ``got(...)`` does."""


class One(Model):
    def forward(self, x):
        return got(x)


class Masked(Model):
    def forward(self, x, mask=None):
        return got(x, mask)


class Two(Model):
    def forward(self, z, y):
        return got(z, y)


class TwoAndMask(Model):
    def forward(self, a, b, src_mask=None):
        return got(a, b, src_mask)


class Lossy(Model):
    """Gives its loss as well."""

    def forward(self, x, labels):
        return got(x, labels)


class TwoAndMore(Model):
    def forward(self, a, b, c=None):
        return got(a, b, c)


class Speech(Model):
    def forward(self, audio, lengths):
        return got(audio, lengths)


class WithLengths(Model):
    def forward(self, audio, lengths=None):
        return got(audio, lengths)


class Keyword(Model):
    def forward(self, x, *, lengths):
        return got(x, lengths)


class Labelled(Model):
    """As the models of transformers are."""

    def forward(self, pixel_values=None, labels=None, return_dict=None):
        return got(pixel_values, labels, return_dict)


class Keywords(Model):
    def forward(self, **inputs):
        return inputs


class Further(Model):
    def forward(self, x, **further):
        return got(x, further)


class Many(Model):
    def forward(self, *inputs):
        return inputs


class Graph(Model):
    def forward(self, x, edge_index, batch=None):
        return got(x, edge_index, batch)


class Whole(Model):
    def forward(self, batch):
        return got(batch)


class Dict(Model):
    def forward(self, x: dict[str, torch.Tensor]):
        return got(x)


class Images(Model):
    """As the detectors of torchvision are."""

    def forward(self, images: list[torch.Tensor], targets=None):
        return got(images, targets)


class Ids(Model):
    """As the models of transformers are."""

    def forward(
        self, input_ids: torch.LongTensor | None = None, labels: torch.LongTensor | None = None
    ):
        return got(input_ids, labels)


class Tiles(Model):
    def forward(self, images: list[torch.Tensor] | None = None):
        return got(images)


class TilesToo(Model):
    def forward(self, images: Optional[list[torch.Tensor]] = None):  # noqa: UP045
        return got(images)


def got(*values):
    return values


def wrapped(model):
    return torch.optim.swa_utils.AveragedModel(model)


def decorated(forward):
    @functools.wraps(forward)
    def run(*args, **kwargs):
        return forward(*args, **kwargs)

    return run


class Decorated(Model):
    @decorated
    def forward(self, z, y):
        return got(z, y)


def same(found, expected):
    """Whether values are the same, tensors by identity, or equal where a wrapper copies them."""
    if isinstance(expected, torch.Tensor):
        return found is expected
    if isinstance(expected, dict):
        return found.keys() == expected.keys() and all(same(found[k], expected[k]) for k in found)
    if isinstance(expected, (list, tuple)):
        pairs = zip(found, expected, strict=True) if len(found) == len(expected) else [(0, 1)]
        return isinstance(found, type(expected)) and all(same(f, e) for f, e in pairs)
    return found is expected or found == expected


@dataclasses.dataclass
class Clip:
    """A batch of a class of its own."""

    z: torch.Tensor
    y: torch.Tensor
    name: str = "clip"


class Data:
    """A batch as torch_geometric has them: attributes, of which ``to`` moves all."""

    def __init__(self, **attributes):
        self.__dict__.update(attributes)

    def to(self, device):
        for name, value in vars(self).items():
            setattr(self, name, value.to(device))
        return self


GRAPH = Data(x=A, edge_index=L, batch=Y, y=Y)
PACKED = pack_sequence([torch.rand(3, 2), torch.rand(2, 2)])
CLIP = Clip(A, Y)
SPACE = SimpleNamespace(image=A)
DETECTED = [{"image": IMAGES[0], "height": 5}, {"image": IMAGES[1], "height": 7}]

CASES = [
    # one input
    (One, A, (A,)),
    (One, (A,), (A,)),
    (One, (A, Y), (A,)),
    (One, [A, Y], (A,)),
    (One, (A, Y, ["name"] * 4), (A,)),
    (One, ((A,), Y), (A,)),
    (One, {"x": A}, (A,)),
    (One, {"x": A, "label": Y, "path": ["a"] * 4}, (A,)),
    (One, ({"x": A}, Y), (A,)),
    (One, OrderedDict(x=A, y=Y), (A,)),
    (One, UserDict(x=A, y=Y), (A,)),
    (One, Pair(A, Y), (A,)),
    (One, {"img": A, "label": Y}, (A,)),  # the only tensor that is no label
    (One, ([A, C], Y), ([A, C],)),  # two views, for a model that takes them
    (One, SPACE, (SPACE,)),
    (One, (PACKED, Y), (PACKED,)),
    (nn.Identity, (A, Y), A),
    # what is optional is not filled by what stands behind the input
    (Masked, A, (A, None)),
    (Masked, (A, Y), (A, None)),
    (Masked, (A, B, Y), (A, None)),
    (Masked, (A, ONES), (A, None)),
    (Masked, (A, L, Y), (A, None)),
    # but for a mask, which has the shape of the input's first axes
    (Masked, (A, M, Y), (A, M)),
    (Masked, [A, ONES, Y], (A, ONES)),
    (Masked, (A, M), (A, M)),
    (Masked, (A, Y, M), (A, M)),
    (Masked, ((A, M), Y), (A, M)),
    (Masked, (A, 2 * ONES, Y), (A, None)),
    (Masked, (A, M[:, :1], Y, L), (A, None)),
    (One, (A, M, Y), (A,)),
    (TwoAndMask, (A, C, M, Y), (A, C, M)),
    # pipelines that give a list of one mapping for each GPU
    (One, [{"data": A, "label": Y[:, None]}], (A,)),
    (Masked, [{"x": A, "mask": M, "label": Y}], (A, M)),
    (Masked, {"x": A, "mask": B, "y": Y}, (A, B)),
    (Masked, {"x": A, "y": Y}, (A, None)),
    # two inputs
    (Two, ((A, Y), L), (A, Y)),
    (Two, [[A, Y], L], (A, Y)),
    (Two, (A, Y, L), (A, Y)),
    (Two, (A, Y), (A, Y)),
    (Two, {"z": A, "y": Y}, (A, Y)),
    (Two, {"z": A, "y": Y, "labels": L}, (A, Y)),
    (Two, ({"z": A, "y": Y}, L), (A, Y)),
    (Two, CLIP, (A, Y)),
    (Decorated, (A, Y, L), (A, Y)),
    (TwoAndMore, (A, B, Y), (A, B, None)),
    (TwoAndMore, ((A, B), Y), (A, B, None)),
    (TwoAndMore, ((A, B, C), Y), (A, B, C)),
    (Speech, (A, L, Y), (A, L)),
    (Speech, (A, [2, 2, 1, 1], Y), (A, [2, 2, 1, 1])),
    (Speech, Spoken(A, L, Y), (A, L)),
    (Keyword, (A, L, Y), (A, L)),
    # as many as there are
    (Many, ((A, B), Y), (A, B)),
    (Many, (A, Y), (A,)),
    (Keywords, {"z": A, "labels": Y}, {"z": A}),
    (Further, {"x": A, "scale": B, "labels": Y, "path": ["a"]}, (A, {"scale": B})),
    # transformers
    (Labelled, {"pixel_values": A, "labels": Y, "path": ["a"] * 4}, (A, Y, None)),
    (Labelled, (A, Y), (A, None, None)),
    (Labelled, {"image": A, "label": Y}, (A, None, None)),
    # objects
    (Whole, GRAPH, (GRAPH,)),
    (Graph, GRAPH, (A, L, Y)),
    (Whole, (GRAPH, Y), (GRAPH,)),
    (One, [GRAPH, GRAPH], ([GRAPH, GRAPH],)),
    # wholes
    (Whole, {"image": A, "mask": B, "label": Y}, ({"image": A, "mask": B, "label": Y},)),
    (Whole, {"image": A, "label": Y}, ({"image": A, "label": Y},)),
    (Dict, {"image": A, "label": Y}, ({"image": A, "label": Y},)),
    (One, {"image": A, "mask": B}, ({"image": A, "mask": B},)),
    # lists of images, as tuple(zip(*samples)) makes them
    (Images, (IMAGES, BOXES), ([*IMAGES], None)),
    (Images, (IMAGES[:1], BOXES[:1]), ([IMAGES[0]], None)),
    (Images, [[*IMAGES], [*BOXES]], ([*IMAGES], None)),
    (Images, [*IMAGES], ([*IMAGES], None)),
    (Images, ([*IMAGES], Y[:2]), ([*IMAGES], None)),
    (Tiles, [*IMAGES], ([*IMAGES],)),
    (TilesToo, [*IMAGES], ([*IMAGES],)),
    (One, (IMAGES, (0, 1)), ([*IMAGES],)),
    (One, DETECTED, (DETECTED,)),
    (Two, (IMAGES, IMAGES, BOXES), ([*IMAGES], [*IMAGES])),
]


@pytest.mark.parametrize(("model", "batch", "expected"), CASES)
def test_call_passes_batch_by_signature(model, batch, expected):
    assert same(call(model(), batch), expected)


@pytest.mark.parametrize(("model", "batch", "expected"), CASES)
@pytest.mark.parametrize("wrap", [wrapped, nn.DataParallel], ids=["average", "parallel"])
def test_call_unwraps_average_and_parallel(wrap, model, batch, expected):
    if torch.cuda.is_available() and wrap is nn.DataParallel:
        pytest.skip("would scatter the batch")
    assert same(call(wrap(model()), batch), expected)


def test_call_unwraps_compiled_model():
    class Sum(nn.Module):
        def forward(self, a, b):
            return a + b

    compiled = torch.compile(Sum(), backend="eager")
    assert torch.equal(call(compiled, (A, C, Y)), A + C)
    assert torch.equal(call(compiled, {"b": C, "a": A, "label": Y}), A + C)


class Scaled(nn.Module):
    def forward(self, x: torch.Tensor, scale: torch.Tensor, shift: float = 0.0) -> torch.Tensor:
        return x * scale + shift


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is")
@pytest.mark.parametrize("batch", [(A, C, Y), {"x": A, "scale": C, "y": Y}], ids=["tuple", "dict"])
def test_call_reads_scripted_signature(batch):
    assert torch.equal(call(torch.jit.script(Scaled()), batch), A * C)


class Unsigned(nn.Module):
    """Its forward tells nothing, and it has two children."""

    def __init__(self):
        super().__init__()
        self.one, self.two = nn.Identity(), nn.Identity()

    def forward(self, *args, **kwargs):
        return args, kwargs


@pytest.mark.parametrize(
    ("batch", "expected"),
    [
        ((A, Y), ((A,), {})),
        (((A, B), Y), ((A, B), {})),
        ({"x": A, "m": B, "y": Y}, ((), {"x": A, "m": B})),
    ],
)
def test_call_passes_all_but_labels_without_signature(batch, expected):
    assert same(call(Unsigned(), batch), expected)


@pytest.mark.parametrize(
    ("model", "batch", "held"),
    [
        (Two, A, r"float32 of 4 × 2, .*forward\(z, y\)"),
        (Two, (A,), r"float32 of 4 × 2, .*forward\(z, y\)"),
        (Two, {"z": A, "labels": Y}, r"\{z: float32 of 4 × 2, labels: int64 of 4\}, .*\(z, y\)"),
        (Speech, {"clip": A, "n": L}, r"\{clip: .*, n: .*\}, .*forward\(audio, lengths\)"),
        (Two, GRAPH, r"a Data, .*forward\(z, y\)"),
        (Masked, (), r"a tuple, .*forward\(x, mask=\)"),
        (One, "x", "a str, "),
        (One, None, "a NoneType, "),
    ],
)
def test_call_names_batch_and_signature_on_error(model, batch, held):
    with pytest.raises(EvaluationError, match=f"a batch is {held}.* by `forward=fn`"):
        call(model(), batch)


# Labels


@pytest.mark.parametrize(
    ("model", "batch", "inputs", "labels"),
    [
        (One, (A, Y), A, Y),
        (One, [A, Y], A, Y),
        (One, Pair(A, Y), A, Y),
        (One, (A, Y, ["path"]), A, Y),
        (Masked, (A, Y), A, Y),
        (Two, (A, L, Y), (A, L), Y),
        (Two, ((A, L), Y), (A, L), Y),
        (Speech, Spoken(A, L, Y), {"audio": A, "lengths": L, "text": Y}, None),
        (Two, ({"z": A, "y": L}, Y), {"z": A, "y": L}, Y),
        (Two, {"z": A, "y": L, "target": Y}, {"z": A, "y": L}, Y),
        (Two, {"z": A, "y": Y}, {"z": A, "y": Y}, Y),  # required, though it is what is scored
        (Lossy, {"x": A, "labels": Y}, {"x": A, "labels": Y}, Y),
        (Lossy, (A, Y), (A, Y), Y),
        (Labelled, {"pixel_values": A, "labels": Y}, {"pixel_values": A}, Y),
        (Masked, (A, M, Y), {"x": A, "mask": M}, Y),
        (Masked, (A, Y, M), {"x": A, "mask": M}, Y),
        (One, [{"data": A, "label": Y}], {"data": A}, Y),
        (Whole, GRAPH, GRAPH, Y),
        (Images, ([*IMAGES], Y[:2]), [*IMAGES], Y[:2]),
        (Ids, (ONES, Y), ONES, Y),
        (Ids, [ONES, Y], ONES, Y),
    ],
)
def test_split_batch_finds_labels_by_place_or_name(model, batch, inputs, labels):
    if labels is None:
        with pytest.raises(EvaluationError, match=r"the model has forward\(audio, lengths\)"):
            split_batch(model(), batch)
        return
    found = split_batch(model(), batch)
    assert same(found[0], inputs)
    assert torch.equal(found[1], labels)


@pytest.mark.parametrize(
    "batch",
    [(A, Y), [A, Y], Pair(A, Y), (A, Y, "path")],
    ids=["tuple", "list", "namedtuple", "path"],
)
def test_split_labels_takes_second_part(batch):
    inputs, labels = split_labels(batch)
    assert inputs is A
    assert labels is Y


@pytest.mark.parametrize(
    "batch",
    [
        (A, {"path": ["a"] * 4, "label": Y}),
        ({"image": A}, {"label": Y}),
        (A, Y.tolist()),
        {"x": A, "labels": Y.tolist()},
        {"x": A, "target": {"y": Y, "id": L}},
    ],
    ids=["mapping behind", "two mappings", "list behind", "list by name", "nested"],
)
def test_split_batch_takes_nested_or_listed_labels(batch):
    inputs, labels = split_batch(One(), batch)
    assert same(inputs["x"] if isinstance(batch, dict) else call_on_inputs(One(), inputs)[0], A)
    assert torch.equal(labels, Y)


@pytest.mark.parametrize("name", ["labels", "label", "target", "targets", "y"])
def test_split_labels_removes_labels_from_dict(name):
    inputs, labels = split_labels({"x": A, name: Y})
    assert inputs == {"x": A}
    assert labels is Y


@pytest.mark.parametrize(
    "batch",
    [A, (A,), {"x": A}, None, (A, "cat"), ()],
    ids=["tensor", "tuple", "dict", "none", "text", "empty"],
)
def test_split_labels_refuses_batch_without_labels(batch):
    with pytest.raises(EvaluationError, match="or a dict with one of labels, label, target"):
        split_labels(batch)


@pytest.mark.parametrize(
    ("batch", "expected"),
    [((A, Y), A), (A, A), ((A,), A), ({"x": A}, {"x": A}), ({"x": A, "y": Y}, {"x": A})],
)
def test_inputs_of_works_with_and_without_labels(batch, expected):
    assert same(inputs_of(One(), batch), expected)


@pytest.mark.parametrize(
    ("model", "batch", "is_said"),
    [
        (Masked, (A, B, Y), True),
        (Masked, (A, Y, B), False),
        (Masked, (A, Y, ["path"] * 4), False),
        (Masked, (A, M, Y), False),
        (One, (A, B, Y), False),
        (Many, (A, B, Y), True),
        (WithLengths, (A, L, Y), True),
        (Images, (A, B, Y), False),
    ],
)
def test_call_warns_once_about_unpassed_part(caplog, model, batch, is_said):
    made = model()
    for _ in range(2):
        call(made, batch)
    warned = [text for text in caplog.messages if "by `forward=fn`" in text]
    assert len(warned) == is_said
    assert all("of the 3 parts of a batch the model's forward(" in text for text in warned)


@pytest.mark.parametrize("kind", [tuple, list, dict])
def test_call_converts_arrays_to_tensors(kind):
    batch = {"x": A.numpy(), "y": Y.numpy(), "name": ["a"] * 4}
    given = batch if kind is dict else kind(batch.values())
    (found,) = call(One(), given)
    assert torch.equal(found, A)
    inputs, labels = split_batch(One(), given)
    assert torch.equal(inputs["x"] if kind is dict else inputs, A)
    assert torch.equal(labels, Y)
    assert batch["x"] is (given["x"] if kind is dict else given[0])


def test_call_keeps_packed_sequence_whole():
    assert isinstance(call(One(), PACKED)[0], PackedSequence)
