"""What is fuzzed: each target makes a checkpoint of some bytes and opens it.

A target is a function of bytes and of an empty directory to write to. It may end in a
``CkptavgError``; anything else that comes out of it is a finding. To add one: write the function,
and enter it in ``TARGETS`` with a few honest inputs.
"""

from __future__ import annotations

import argparse
import io
import json
import shutil
import struct
import tempfile
import warnings
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pickle import (  # isort: skip
    ADDITEMS, APPEND, APPENDS, BINFLOAT, BINPERSID, BUILD, DUP, EMPTY_DICT, EMPTY_LIST, EMPTY_SET,
    EMPTY_TUPLE, FROZENSET, INST, MARK, MEMOIZE, NEWOBJ, NEWOBJ_EX, NEWTRUE, NONE, OBJ, POP, REDUCE,
    SETITEM, SETITEMS, SHORT_BINBYTES, STACK_GLOBAL, STOP, TUPLE, TUPLE1, TUPLE2,
)  # fmt: skip

import torch
import torch.distributed.checkpoint as dcp
from assembler import get, glob, number, numbers, put, storage, tensor, text
from watch import watched

from ckptavg.averaging.api import average
from ckptavg.averaging.weights import with_provenance
from ckptavg.errors import CheckpointError, CkptavgError
from ckptavg.formats import open_checkpoint, state_dict, training_record, wrappers
from ckptavg.formats.checkpoint import DTYPES
from ckptavg.formats.network_entries import KNOWN_ENTRIES
from ckptavg.formats.provenance import Provenance
from ckptavg.formats.safe_pickle import unpickler
from ckptavg.formats.safe_pickle.calls import KNOWN_CALLS
from ckptavg.formats.safe_pickle.values import (
    Global,
    MalformedPickle,
    Opaque,
    Refused,
    Storage,
    TensorView,
)

# The writer is imported ahead: an import while a file is read would count as a finding.
from ckptavg.formats.torch_save import legacy_reader, writer  # noqa: F401
from ckptavg.runs.run import open_run

torch.set_num_threads(1)
CORPUS = Path(__file__).with_name("corpus")
_MOST_MEMORY = 300 * 2**20  # of an average: what a small file may grow to, and some


@dataclass(frozen=True)
class Target:
    """One way into the program.

    Attributes:
        feed: Takes the bytes; raises only what is a finding.
        seeds: Honest inputs to begin with.
    """

    feed: Callable[[bytes, Path], None]
    seeds: Callable[[], Iterable[bytes]]

    def run(self, data: bytes, room: Path) -> None:
        """Feed it under watch, in a directory that is empty before and after."""
        room.mkdir()
        try:
            with watched(room):
                self.feed(data, room)
        finally:
            shutil.rmtree(room)


def _pickle(data: bytes, room: Path) -> None:
    try:
        tree = unpickler.loads(data)
    except MalformedPickle as error:
        _check_message(CheckpointError(str(error)))  # which is what becomes of it
        return
    _look_into(tree)


def _tree(data: bytes, room: Path) -> None:
    _look_into(_grown(io.BytesIO(data)))


def _look_into(tree: Any) -> None:
    """All that is asked of a tree when a checkpoint is opened."""
    state_dict.count_tensors(tree)
    for key in (None, "a", "a.b", "state_dict", "model.a"):
        with suppress(CkptavgError, MalformedPickle):
            found = state_dict.find_weights("file", tree, key)
            training_record.from_tree(tree, found.record_key)
            state_dict.describe_other_entries(tree, found.paths)
            wrappers.bare_names([name for name in found.entry if isinstance(name, str)])


def _file(name: str) -> Callable[[bytes, Path], None]:
    def feed(data: bytes, room: Path) -> None:
        path = room / name
        path.write_bytes(data)
        _open(path)

    return feed


def _torch_pickle(data: bytes, room: Path) -> None:
    _open(_archive(room / "epoch_1.pt", data))


def _assembled(data: bytes, room: Path) -> None:
    """A pickle of whole opcodes beside a tensor: most of what bytes alone give is malformed."""
    parts = b"".join(_PARTS[b % len(_PARTS)] for b in data)
    pickled = EMPTY_DICT + MARK + text("w") + tensor() + parts + SETITEMS + STOP
    _pickle(pickled, room)
    _torch_pickle(pickled, room)


def _legacy(data: bytes, room: Path) -> None:
    path = room / "epoch_1.pt"
    path.write_bytes(legacy_reader.START + data)
    _open(path)


def _safetensors(data: bytes, room: Path) -> None:
    path = room / "model.safetensors"
    path.write_bytes(_framed(data))
    _open(path)


def _index(data: bytes, room: Path) -> None:
    _shards(room)
    (room / "model.safetensors.index.json").write_bytes(data)
    _open(room)


def _trainer_state(data: bytes, room: Path) -> None:
    (room / "model.safetensors").write_bytes(_framed(_HEADER))
    (room / "trainer_state.json").write_bytes(data)
    _open(room)
    with suppress(ValueError, RecursionError, AttributeError):
        metadata = json.loads(data.decode())
        training_record.from_metadata({str(k): str(v) for k, v in metadata.items()})


def _average(data: bytes, room: Path) -> None:
    """Two checkpoints, one of them honest: found, opened, averaged in memory and into a file."""
    run = room / "run"
    run.mkdir()
    _archive(run / "epoch_1.pt", data)
    _archive(run / "epoch_2.pt", data + b"the same again")
    for scheme in ("uniform", "ema:decay=0.5,per=step"):
        with suppress(CkptavgError):
            found = average(open_run(run), scheme, on_nonfinite="keep")
            assert sum(t.nbytes for t in found.values()) < _MOST_MEMORY
    for name in ("out.safetensors", "out.pt"):
        try:
            out = average(open_run(run), out=room / name)
        except CkptavgError as error:
            _check_message(error)
            _check_empty(room, run)
            continue
        if name.endswith(".pt"):
            torch.load(out, weights_only=True)  # nothing of the input's that it would refuse
        assert open_checkpoint(out).is_average
        out.unlink()


def _metadata(data: bytes, room: Path) -> None:
    """The metadata of a distributed checkpoint, beside the honest file that it places things in."""
    directory = room / "step_1"
    directory.mkdir()
    (directory / ".metadata").write_bytes(data)
    (directory / "__0_0.distcp").write_bytes(_PLACES)
    _open(directory)


def _open(path: Path) -> None:
    try:
        checkpoint = open_checkpoint(path)
    except CkptavgError as error:
        _check_message(error)
        return
    sizes = {stamp.path: stamp.size for stamp in checkpoint.files}
    assert checkpoint.nbytes < _MOST_MEMORY
    for held in checkpoint.tensors.values():
        for piece in held.pieces:
            reach = sum((n - 1) * s for n, s in zip(piece.shape, piece.stride, strict=True))
            end = piece.offset + (reach + 1) * held.dtype.size if held.numel else piece.offset
            assert 0 <= piece.offset <= end <= sizes[piece.file]
    checkpoint.ties()


def _check_message(error: CkptavgError) -> None:
    assert 0 < len(str(error)) < 3000
    assert "\n" not in str(error)


def _check_empty(room: Path, run: Path) -> None:
    assert list(room.iterdir()) == [run]


def _archive(path: Path, pickle: bytes) -> Path:
    """The zip file that ``torch.save`` would have made of a pickle and its storages."""
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", pickle)
        for key, content in _STORAGES.items():
            archive.writestr(f"archive/data/{key}", content)
    return path


def _framed(header: bytes) -> bytes:
    return struct.pack("<Q", len(header)) + header + bytes(32)


def _shards(room: Path) -> None:
    (room / "model-1.safetensors").write_bytes(_framed(_HEADER))
    (room / "model-2.safetensors").write_bytes(_framed(_HEADER.replace(b'"b"', b'"c"')))


_STORAGES = {"0": bytes(16), "1": bytes(16), "2": b"", "3": bytes(range(8))}
_HEADER = json.dumps(
    {
        "__metadata__": {"format": "pt", "step": "3"},
        "b": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]},
        "n": {"dtype": "I64", "shape": [], "data_offsets": [24, 32]},
    }
).encode()


def _grown(source: io.BytesIO, depth: int = 0, known: list[Any] | None = None) -> Any:
    """A tree of what an inert pickle can hold, as the bytes say, its parts shared."""
    known = [] if known is None else known
    kind, size = (*source.read(2), 0, 0)[:2]
    if depth > 8 or kind % 8 == 0:
        return _LEAVES[size % len(_LEAVES)]
    if kind % 8 == 1 and known:
        return known[size % len(known)]
    parts = [_grown(source, depth + 1, known) for _ in range(size % 6)]
    names = [_NAMES[b % len(_NAMES)] for b in source.read(len(parts))]
    grown: Any = dict(zip(names, parts, strict=False))
    if kind % 8 == 2:
        grown = parts
    if kind % 8 == 3:
        grown = tuple(parts)
    if kind % 8 == 4:
        grown = Opaque(Global("x", "Module"), tuple(parts), grown)
    if kind % 8 == 5:
        inner = {key: {} for key in ("_parameters", "_buffers", "_modules")} | grown
        grown = Opaque(Global("x", "Module"), (), inner)
    known.append(grown)
    return grown


_VIEW = TensorView(Storage("0", DTYPES["float32"], 4), DTYPES["float32"], 0, (2,), (1,))
_PARTS = [
    MARK, TUPLE, TUPLE1, TUPLE2, EMPTY_TUPLE, EMPTY_LIST, EMPTY_DICT, EMPTY_SET, APPEND, APPENDS,
    SETITEM, SETITEMS, ADDITEMS, FROZENSET, REDUCE, NEWOBJ, NEWOBJ_EX, BUILD, OBJ, BINPERSID, NONE,
    POP, DUP, MEMOIZE, STACK_GLOBAL, put(0), get(0), put(1), get(1), tensor(), storage(), storage(),
    tensor(dtype="bfloat16"), tensor(kind="UntypedStorage", key="1", numel=16, dtype="int64"),
    INST + b"builtins\ntuple\n", NEWTRUE, BINFLOAT + bytes(8), SHORT_BINBYTES + b"\2ab",
    *(glob(*name) for name in KNOWN_CALLS), glob("torch", "float16"), glob("os", "system"),
    glob("torch._tensor", "_rebuild_from_type_v2"), glob("torch", "FloatStorage"),
    *map(number, (0, 1, 2, 4, -1, 2**40, 2**62, 2**1001)), numbers((2, 2)), numbers((1, 0)),
    *map(text, ("model", "state_dict", "w", "a", "storage", "0", "cpu", "lr", "step", "latin1",
                "_parameters", "_buffers", "_modules", "module.", "f4", "ckptavg", "{}")),
]  # fmt: skip
_LEAVES = (_VIEW, _VIEW, _VIEW, Refused("quantized"), None, 1, -(2**2000), 1e308, float("nan"), "x",
           b"", True, Global("os", "system"), {"lr": 0.1}, [{"lr": 2**900}], {"a"})  # fmt: skip
_NAMES = (
    *KNOWN_ENTRIES, *wrappers.LEADING_WRAPPERS,
    *training_record.STEP_NAMES, *training_record.LR_NAMES, *training_record.EPOCH_NAMES,
    *training_record.OPTIMIZER_NAMES, "ema", "state", "param_groups", "n_averaged",
    "a", "b", "", "module.module.a", "_parameters", "_buffers", "_modules", "ckptavg",
    "_non_persistent_buffers_set", 3, None, (1, "a"), Global("x", "y"),
)  # fmt: skip


def _trees() -> list[Any]:
    """Honest contents of a ``torch.save`` file."""
    base = torch.arange(16.0)
    module = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.BatchNorm1d(2))
    optimizer = torch.optim.SGD(module.parameters(), 0.1)
    made = Provenance({"scheme": "uniform", "checkpoints": [{"step": 1}]})
    return [
        {"w": base.view(4, 4).t(), "v": base[::2], "n": torch.tensor(3)},
        {"state_dict": module.state_dict(), "optimizer": optimizer.state_dict(), "epoch": 3},
        {"model": module, "ema": {"a": base.half()}, "args": argparse.Namespace(lr=0.1)},
        OrderedDict({"module.a": torch.nn.Parameter(base), "n_averaged": torch.tensor(1)}),
        {"state": {"model": {"e": base[:1].expand(4)}}, "lr": [1e-3], "val": {"acc": 0.5}},
        {"q": torch.eye(2).to_sparse(), "c": torch.zeros(2, dtype=torch.complex64).conj()},
        {"model": with_provenance({"a": base}, made)},
    ]


def _saved(tree: Any, **options: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(tree, buffer, **options)
    return buffer.getvalue()


def _zips() -> list[bytes]:
    return [_saved(tree) for tree in _trees()]


def _pickles() -> list[bytes]:
    """Their pickles, by the protocols that torch can be asked for."""
    found = []
    for protocol in (2, 4):
        for tree in _trees():
            with zipfile.ZipFile(io.BytesIO(_saved(tree, pickle_protocol=protocol))) as archive:
                found.append(archive.read("archive/data.pkl"))
    return found


def _legacies() -> list[bytes]:
    files = [_saved(tree, _use_new_zipfile_serialization=False) for tree in _trees()]
    return [file.removeprefix(legacy_reader.START) for file in files]


def _headers() -> list[bytes]:
    made = json.dumps({"scheme": "none", "checkpoints": [{"path": "a", "step": 3}]})
    return [
        _HEADER,
        _HEADER.replace(b'"format": "pt"', b'"ckptavg": ' + json.dumps(made).encode()),
        b'{"a":{"dtype":"F8_E4M3","shape":[0],"data_offsets":[0,0]},'
        b'"b":{"dtype":"BF16","shape":[16],"data_offsets":[0,32]}}',
    ]


def _indices() -> list[bytes]:
    mapping = {"b": "model-1.safetensors", "c": "model-2.safetensors"}
    return [json.dumps({"metadata": {"total_size": 64}, "weight_map": mapping}).encode()]


def _states() -> list[bytes]:
    history = [{"loss": 0.5, "learning_rate": 1e-4, "step": 10, "epoch": 0.5}, {"eval_loss": 1}]
    return [json.dumps({"global_step": 20, "epoch": 1.0, "log_history": history}).encode()]


def _distributed() -> tuple[bytes, bytes]:
    """The metadata and the tensors of a distributed checkpoint of one process."""
    state = {"model": {"a": torch.ones(2, 3), "b": torch.ones(4)}, "epoch": 3, "app": {"x": [1]}}
    with tempfile.TemporaryDirectory() as room, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.save(state, checkpoint_id=room)
        return (Path(room) / ".metadata").read_bytes(), (Path(room) / "__0_0.distcp").read_bytes()


_PLACED, _PLACES = _distributed()


def _metadatas() -> list[bytes]:
    return [_PLACED]


def _seeds_of_trees() -> list[bytes]:
    return [bytes((7 * i + n) % 256 for i in range(60)) for n in range(12)]


TARGETS = {
    "pickle": Target(_pickle, _pickles),
    "tree": Target(_tree, _seeds_of_trees),
    "torch_zip": Target(_file("epoch_1.pt"), _zips),
    "torch_pickle": Target(_torch_pickle, _pickles),
    "assembled": Target(_assembled, _seeds_of_trees),
    "torch_legacy": Target(_legacy, _legacies),
    "safetensors": Target(_safetensors, _headers),
    "hf_index": Target(_index, _indices),
    "trainer_state": Target(_trainer_state, _states),
    "average": Target(_average, _pickles),
    "distributed": Target(_metadata, _metadatas),
}
