"""Reads what ``torch.save`` pickles, and nothing that a pickle can hold makes it do anything."""

from __future__ import annotations

import argparse
import collections
import contextlib
import dataclasses
import datetime
import enum
import io
import pathlib
import pickle
import pickletools
import struct
import zipfile

from pickle import (  # isort: skip
    ADDITEMS, APPEND, APPENDS, BINPERSID, BINUNICODE, BUILD, EMPTY_DICT, EMPTY_LIST, EMPTY_TUPLE,
    INST, MARK, MEMOIZE, NEWOBJ, NEWOBJ_EX, NONE, OBJ, POP, PROTO, REDUCE, SETITEM, SETITEMS,
    STACK_GLOBAL, STOP, TUPLE, TUPLE1, TUPLE2,
)  # fmt: skip

import numpy as np
import pytest
import torch
from assembler import get, glob, put, storage, tensor, text
from hypothesis import given, settings
from hypothesis import strategies as st

from ckptavg.formats.safe_pickle import machine, unpickler
from ckptavg.formats.safe_pickle.values import Global, MalformedPickle, Opaque, Refused, TensorView

PROTOCOLS = range(pickle.HIGHEST_PROTOCOL + 1)


def saved_pickle(value, protocol=2) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer, pickle_protocol=protocol)
    return zipfile.ZipFile(buffer).read("archive/data.pkl")


def saved(value, protocol=2):
    """What the inert unpickler makes of a file that ``torch.save`` wrote."""
    return unpickler.loads(saved_pickle(value, protocol))


def outline(value):
    """A tree with every tensor, torch's or ours, replaced by what describes its view."""
    if isinstance(value, torch.Tensor):
        kind = str(value.dtype).removeprefix("torch.")
        nbytes = value.untyped_storage().nbytes()
        return (kind, value.storage_offset(), tuple(value.shape), value.stride(), nbytes)
    if isinstance(value, TensorView):
        nbytes = value.storage.numel * (value.storage.dtype.size if value.storage.dtype else 1)
        return (value.dtype.name, value.offset, value.shape, value.stride, nbytes)
    if isinstance(value, dict):
        return {k: outline(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(map(outline, value)) if type(value) is list else [*map(outline, value)]
    return value


# --------------------------------------------------------------------------- what torch.save writes

PLAIN = [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.complex128,
         torch.complex64, torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8,
         torch.uint16, torch.uint32, torch.uint64, torch.bool, torch.float8_e5m2,
         torch.float8_e4m3fn, torch.float8_e5m2fnuz, torch.float8_e4m3fnuz, torch.float8_e8m0fnu,
         torch.complex32]  # fmt: skip


@pytest.mark.parametrize("protocol", range(2, 6))
@pytest.mark.parametrize("dtype", PLAIN, ids=str)
@pytest.mark.filterwarnings("ignore:ComplexHalf")
def test_unpickler_reads_every_dtype(dtype, protocol):
    value = {"a": torch.zeros(2, 3, dtype=dtype), "b": torch.zeros(5, dtype=dtype)[2:]}
    assert outline(saved(value, protocol)) == outline(value)


VIEWS = {
    "transposed": torch.zeros(3, 4).t(),
    "sliced": torch.zeros(6, 7)[1::2, 2:5],
    "permuted": torch.zeros(2, 3, 4).permute(2, 0, 1),
    "expanded": torch.zeros(3, 1).expand(3, 8),
    "windows": torch.zeros(10).unfold(0, 4, 2),
    "0-d": torch.tensor(1.5),
    "0-d of a larger one": torch.zeros(4)[2],
    "empty": torch.zeros(0),
    "empty matrix": torch.zeros(3, 0, 2),
    "parameter": torch.nn.Parameter(torch.zeros(3)),
    "frozen parameter": torch.nn.Parameter(torch.zeros(3), requires_grad=False),
    "buffer": torch.nn.Buffer(torch.zeros(3)),
    "requires grad": torch.zeros(2, requires_grad=True),
    "channels last": torch.zeros(1, 2, 3, 4).to(memory_format=torch.channels_last),
}


@pytest.mark.parametrize("view", VIEWS.values(), ids=VIEWS)
def test_unpickler_keeps_offset_shape_and_strides(view):
    assert outline(saved(view)) == outline(view)


class Subclass(torch.Tensor):
    pass


def test_unpickler_reads_tensors_with_attributes_or_subclass():
    marked, parameter = torch.zeros(2), torch.nn.Parameter(torch.zeros(3))
    marked.owner = parameter.owner = "someone"
    value = {"a": marked, "p": parameter, "s": torch.zeros(4).as_subclass(Subclass)}
    assert outline(saved(value)) == outline(value)


def test_unpickler_keeps_ties():
    weight = torch.zeros(4)
    tree = saved({"a": weight, "b": weight[1:], "c": torch.zeros(4)})
    assert tree["a"].storage == tree["b"].storage
    assert tree["a"].storage.key != tree["c"].storage.key


def test_unpickler_keeps_order_of_state_dict():
    module = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.BatchNorm1d(3))
    state = module.state_dict()
    assert hasattr(state, "_metadata")
    tree = saved({"state_dict": state})["state_dict"]
    assert list(tree) == list(state)
    assert outline(tree) == outline(dict(state))


NOT_PLAIN = {  # half of these are beta or deprecated in torch, which it warns of
    "sparse": lambda: torch.eye(3).to_sparse(),
    "sparse ": lambda: torch.eye(3).to_sparse_csr(),
    "nested": lambda: torch.nested.nested_tensor([torch.zeros(2), torch.zeros(3)]),
    "meta": lambda: torch.zeros(3, device="meta"),
    "conjugated": lambda: torch.zeros(3, dtype=torch.complex64).conj(),
    "no arithmetic": lambda: torch.empty(4, dtype=torch.bits8),
    "quantized": lambda: torch.quantize_per_tensor(torch.zeros(3), 0.1, 0, torch.quint8),
    "quantized ": lambda: torch.quantize_per_channel(
        torch.zeros(2, 3), torch.ones(2), torch.zeros(2, dtype=torch.int64), 0, torch.qint8
    ),
}


@pytest.mark.parametrize("why", NOT_PLAIN)
@pytest.mark.filterwarnings("ignore")
def test_unpickler_refuses_tensor_without_plain_bytes(why):
    tree = saved({"weight": NOT_PLAIN[why](), "other": torch.zeros(2)})
    assert isinstance(tree["weight"], Refused)
    assert why.strip() in tree["weight"].why
    assert isinstance(tree["other"], TensorView)


@dataclasses.dataclass
class Config:
    width: int
    name: str


@dataclasses.dataclass(slots=True)
class Slotted:
    width: int
    name: str


class Mode(enum.Enum):
    TRAIN = "train"


@pytest.mark.parametrize("protocol", range(2, 6))
def test_unpickler_turns_foreign_objects_into_opaque(protocol):
    value = {
        "args": argparse.Namespace(lr=0.1, layers=[1, 2], out=pathlib.PurePosixPath("runs/a")),
        "config": Config(3, "wide"),
        "slotted": Slotted(4, "slim"),
        "mode": Mode.TRAIN,
        "step": 7,
    }
    tree = saved(value, protocol)
    assert tree["step"] == 7
    args = tree["args"]
    assert isinstance(args, Opaque)
    assert (args.state["lr"], args.state["layers"]) == (0.1, [1, 2])
    assert args.state["out"].args[-2:] == ("runs", "a")
    assert tree["config"].state == {"width": 3, "name": "wide"}
    assert {"width": 4, "name": "slim"}.items() <= _slots(tree["slotted"].state).items()
    assert tree["mode"].args == ("train",)


def _slots(state) -> dict:
    return state if isinstance(state, dict) else dict(zip(("width", "name"), state, strict=True))


NUMBERS = [np.float64(1.5), np.float32(0.25), np.float16(2.5), np.int64(-7), np.int32(9),
           np.bool_(True), np.int16(-3), np.int8(-3), np.uint8(200),
           np.uint64(2**63)]  # fmt: skip


@pytest.mark.parametrize("protocol", [2, 5])
@pytest.mark.parametrize("number", NUMBERS, ids=lambda n: f"{n.dtype}")
def test_unpickler_reads_numpy_scalars(number, protocol):
    found = unpickler.loads(pickle.dumps(number, protocol))
    assert found == number.item()
    assert type(found) is type(number.item())


class BigEndian:
    """Pickled as NumPy on a big-endian machine pickles 1.5."""

    def __reduce__(self):
        return np.float64().__reduce__()[0], (np.dtype(">f8"), struct.pack(">d", 1.5))


def test_unpickler_reads_big_endian_numbers():
    data = pickle.dumps(BigEndian())
    assert pickle.loads(data) == unpickler.loads(data) == 1.5


DEEP = ("srv", "datasets", "imagenet_resized_224", "training_split")
HONEST = {
    "numpy array": np.arange(10_000),
    "numpy arrays": [np.arange(50) for _ in range(100)],
    "numpy generator state": np.random.RandomState(0).get_state(),
    "paths": [pathlib.PurePosixPath(*DEEP, f"{i}.jpg") for i in range(3000)],
    "enum": [Mode.TRAIN] * 1000,
    "counter": collections.Counter("abcab" * 100),
    "deque": collections.deque(range(1000), maxlen=2000),
    "times": [datetime.datetime(2024, 1, 1, minute=i % 60) for i in range(1000)],
    "devices": [torch.device("cuda", i % 8) for i in range(1000)],
    "ordered": collections.OrderedDict((str(i), [i]) for i in range(1000)),
    "set": set(range(5000)),
    "set of 64-bit hashes": set(np.random.RandomState(0).randint(2**62, 2**63 - 1, 5000).tolist()),
}


@pytest.mark.parametrize("protocol", [2, 3, 5])
@pytest.mark.parametrize("value", [pytest.param(v, id=k) for k, v in HONEST.items()])
def test_unpickler_accepts_large_honest_objects(value, protocol):
    assert unpickler.loads(pickle.dumps({"it": value, "step": 3}, protocol))["step"] == 3


scalars = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False)
    | st.text(st.characters(exclude_categories=()))  # surrogates too, which pickle lets through
    | st.binary()
)
keys = scalars | st.tuples(st.integers(), st.text())
plain = st.recursive(
    scalars | st.sets(keys, max_size=4) | st.frozensets(keys, max_size=4),
    lambda inner: (
        st.lists(inner, max_size=5)
        | st.lists(inner, max_size=5).map(tuple)
        | st.dictionaries(keys, inner, max_size=5)
        | st.dictionaries(keys, inner, max_size=5).map(collections.OrderedDict)
    ),
    max_leaves=20,
)


def typed(value):
    """Type and contents, so that 1, 1.0 and True are told apart; every mapping is a dict."""
    if isinstance(value, dict):
        return dict, [(typed(k), typed(v)) for k, v in value.items()]
    if isinstance(value, (list, tuple)):
        return type(value), [typed(v) for v in value]
    if isinstance(value, (set, frozenset)):
        return type(value), {typed(v) if not isinstance(v, tuple) else v for v in value}
    return type(value), value


@settings(max_examples=120, deadline=None)
@given(plain, st.sampled_from(PROTOCOLS))
def test_unpickler_round_trips_plain_data(value, protocol):
    assert typed(unpickler.loads(pickle.dumps(value, protocol))) == typed(value)


def test_unpickler_keeps_shared_and_cyclic_structure():
    shared: list = [1]
    shared.append(shared)
    found = unpickler.loads(pickle.dumps({"a": shared, "b": shared}))
    assert found["a"] is found["b"]
    assert found["a"][1] is found["a"]


REPEATS = {
    "lists": EMPTY_LIST,
    "calls": glob("x", "y"),
    "storages": storage(),
    "memo entries": NONE + MEMOIZE,
}


@pytest.mark.parametrize("part", REPEATS.values(), ids=REPEATS)
def test_unpickler_limits_containers(part, monkeypatch):
    monkeypatch.setattr(machine, "_MOST_CONTAINERS", 100)
    few, many = (MARK + part * n + TUPLE + STOP for n in (30, 101))
    assert len(unpickler.loads(few)) == 30
    with pytest.raises(MalformedPickle, match="more than 100"):
        unpickler.loads(many)


# ---------------------------------------------------------------------------------- hostile pickles


def hostile(canary: str) -> dict[str, bytes]:
    """Pickles that create the canary when Python's own unpickler reads them."""
    system, call = glob("os", "system"), text(f"touch {canary}") + TUPLE1 + REDUCE
    trap, path = glob("traps", "Trap"), text(canary)
    made = trap + EMPTY_TUPLE + NEWOBJ
    code = text(f"open({canary!r}, 'w').close()")
    getattr_ = glob("builtins", "getattr")
    os_ = getattr_ + glob("pathlib", "os") + text("path") + TUPLE2 + REDUCE
    os_ = getattr_ + os_ + text("os") + TUPLE2 + REDUCE
    from_type = glob("torch._tensor", "_rebuild_from_type_v2")
    return {
        "REDUCE": system + call,
        "STACK_GLOBAL": PROTO + b"\4" + text("os") + text("system") + STACK_GLOBAL + call,
        "INST": MARK + path + INST + b"traps\nTrap\n",
        "OBJ": MARK + trap + path + OBJ,
        "NEWOBJ": trap + path + TUPLE1 + NEWOBJ,
        "NEWOBJ_EX": trap + EMPTY_TUPLE + EMPTY_DICT + text("path") + path + SETITEM + NEWOBJ_EX,
        "BUILD": made + path + BUILD,
        "SETITEM": made + path + NONE + SETITEM,
        "SETITEMS": made + MARK + path + NONE + SETITEMS,
        "APPENDS": made + MARK + path + APPENDS,
        "ADDITEMS": made + MARK + path + ADDITEMS,
        "eval": glob("builtins", "eval") + code + TUPLE1 + REDUCE,
        "exec": glob("builtins", "exec") + code + TUPLE1 + REDUCE,
        "getattr chain": getattr_ + os_ + text("system") + TUPLE2 + REDUCE + call,
        "dotted name": PROTO + b"\4" + text("pathlib") + text("os.system") + STACK_GLOBAL + call,
        "partial": glob("functools", "partial") + MARK + system + text(f"touch {canary}") + TUPLE
        + REDUCE + EMPTY_TUPLE + REDUCE,
        "runpy": glob("runpy", "_run_code") + code + EMPTY_DICT + TUPLE2 + REDUCE,
        "memo": system + put(7) + POP + text(f"touch {canary}") + MEMOIZE + TUPLE1 + put(300) + POP
        + get(7) + get(300) + REDUCE,
        "inside a tensor's type": from_type + MARK + system + glob("torch", "Tensor")
        + text(f"touch {canary}") + TUPLE1 + NONE + TUPLE + REDUCE,
        "as a key": EMPTY_DICT + system + call + NONE + SETITEM,
    }  # fmt: skip


@pytest.mark.parametrize("way", hostile(""))
def test_unpickler_runs_nothing_of_hostile_pickle(way, tmp_path):
    canary = tmp_path / "canary"
    data = hostile(str(canary))[way] + STOP
    with contextlib.suppress(Exception):  # some of them fail once they have done their work
        pickle.loads(data)
    assert canary.exists(), "this pickle is harmless and proves nothing"
    canary.unlink()
    with contextlib.suppress(MalformedPickle):
        unpickler.loads(data)
    assert not canary.exists()


def test_unpickler_records_calls():
    found = unpickler.loads(glob("os", "system") + text("true") + TUPLE1 + REDUCE + STOP)
    assert (found.type, found.args) == (Global("os", "system"), ("true",))


def test_unpickler_imports_nothing(tmp_path, monkeypatch):
    (tmp_path / "trapdoor.py").write_text("raise SystemExit('imported')")
    monkeypatch.syspath_prepend(tmp_path)
    found = unpickler.loads(glob("trapdoor", "x") + EMPTY_TUPLE + NEWOBJ + STOP)
    assert found.type == Global("trapdoor", "x")


MALFORMED = {
    "empty": b"",
    "no STOP": EMPTY_LIST,
    "nothing on the stack": STOP,
    "only a mark": MARK + STOP,
    "pop from an empty stack": POP + STOP,
    "a mark as a value": EMPTY_LIST + MARK + APPEND + STOP,
    "no mark": EMPTY_LIST + APPENDS + STOP,
    "unknown memo": get(5) + STOP,
    "a memo of nothing": put(5) + STOP,
    "unhashable keys are kept, an odd one is not": EMPTY_DICT + MARK + NONE + SETITEMS + STOP,
    "append to None": NONE + NONE + APPEND + STOP,
    "items of a list": EMPTY_LIST + NONE + NONE + SETITEM + STOP,
    "add to a dict": EMPTY_DICT + MARK + NONE + ADDITEMS + STOP,
    "a call without a tuple": glob("os", "system") + NONE + REDUCE + STOP,
    "a global without names": NONE + NONE + STACK_GLOBAL + STOP,
    "extension": b"\x82\x01" + EMPTY_TUPLE + REDUCE + STOP,
    "extension, 2 bytes": b"\x83\x01\x00" + STOP,
    "extension, 4 bytes": b"\x84\x01\x00\x00\x00" + STOP,
    "persistent id that is no storage": text("x") + BINPERSID + STOP,
    "out-of-band buffer": b"\x97" + STOP,
    "string past the end": BINUNICODE + b"\xff\xff\xff\xff" + STOP,
    "bytes past the end": b"\x8e" + b"\xff" * 8 + STOP,
    "number past the end": b"\x8b\xff\xff\xff\x7f" + STOP,
    "negative length": b"\x8b\xff\xff\xff\xff" + STOP,
    "a number of many digits": b"L" + b"9" * 5000 + b"L\n" + STOP,
    "unknown opcode": b"\xff" + STOP,
}


@pytest.mark.parametrize("data", MALFORMED.values(), ids=MALFORMED)
def test_unpickler_refuses_malformed_pickle(data):
    with pytest.raises(MalformedPickle):
        unpickler.loads(data)


IMPOSSIBLE_TENSORS = {
    "past the end of its storage": tensor(shape=(5,)),
    "past the end by its offset": tensor(offset=1),
    "past the end by its strides": tensor(shape=(2, 2), stride=(3, 1)),
    "negative offset": tensor(offset=-1, shape=(1,)),
    "negative shape": tensor(shape=(-1,)),
    "negative stride": tensor(shape=(2,), stride=(-1,)),
    "strides of another rank": tensor(shape=(2, 2), stride=(1,)),
    "too many dimensions": tensor(shape=(1,) * 65, stride=(1,) * 65),
    "huge extent": tensor(shape=(2**63,), stride=(0,)),
    "more elements than can be counted": tensor(shape=(2**40, 2**40), stride=(0, 0)),
    "negative storage": tensor(shape=(0,), numel=-1),
    "huge storage": tensor(numel=2**70),
    "unknown storage type": tensor(kind="SystemStorage"),
    "untyped storage without a dtype": tensor(kind="UntypedStorage", numel=16),
    "an untyped storage too short for the dtype": tensor(
        kind="UntypedStorage", numel=31, dtype="float64"
    ),
    "a typed storage too short for a wider dtype": tensor(dtype="float64"),
}


@pytest.mark.parametrize("data", IMPOSSIBLE_TENSORS.values(), ids=IMPOSSIBLE_TENSORS)
def test_unpickler_refuses_impossible_tensor(data):
    with pytest.raises(MalformedPickle):
        unpickler.loads(data + STOP)


@pytest.mark.parametrize(
    "data",
    [tensor(), tensor(kind="UntypedStorage", numel=16, dtype="float32"), tensor(dtype="float32")],
)
def test_unpickler_reads_tensor_within_storage(data):
    found = unpickler.loads(data + STOP)
    assert (found.shape, found.stride, found.dtype.name) == ((4,), (1,), "float32")


# ----------------------------------------------------------------------------------- random pickles

SEEDS = [
    saved_pickle({"state_dict": torch.nn.Linear(2, 2).state_dict(), "epoch": 3}),
    saved_pickle({"a": torch.zeros(2, dtype=torch.uint16), "n": np.float64(1)}, 4),
    pickle.dumps({"args": argparse.Namespace(a={1, 2}), "f": frozenset([1]), "b": b"xyz"}, 5),
    *(data + STOP for data in hostile("/nonexistent/canary").values()),
]
OPCODES = st.sampled_from([op.code.encode("latin1") for op in pickletools.opcodes])


@st.composite
def mutated(draw):
    data = bytearray(draw(st.sampled_from(SEEDS)))
    for _ in range(draw(st.integers(1, 6))):
        at = draw(st.integers(0, len(data)))
        end = min(len(data), at + draw(st.integers(0, 8)))
        data[at:end] = draw(st.binary(max_size=4) | OPCODES | st.just(bytes(data[end:])))
    return bytes(data)


@settings(max_examples=500, deadline=None)
@given(st.binary(max_size=60) | mutated() | st.lists(OPCODES, max_size=30).map(b"".join))
def test_unpickler_raises_only_malformed_pickle(data):
    with contextlib.suppress(MalformedPickle):
        unpickler.loads(data)
