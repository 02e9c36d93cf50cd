"""What a ``torch.save`` output holds.

As a rule all that the last of its inputs held, but for the weights: what loads the inputs then
loads the output. A ``.pt`` is for everybody else as well.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ckptavg.errors import CheckpointError
from ckptavg.formats import lightning, state_dict
from ckptavg.formats.checkpoint import PROVENANCE, Checkpoint
from ckptavg.formats.file_layout import FileLayout, OutputTensor
from ckptavg.formats.reader import Reader
from ckptavg.formats.safe_pickle.allowlist import Keeper
from ckptavg.formats.safe_pickle.values import MalformedPickle, TensorView
from ckptavg.formats.torch_save import zip_reader
from ckptavg.formats.torch_save.archive import Archive, StorageStub, TensorStub, dumps
from ckptavg.formats.torch_save.zip_reader import PROVENANCE_RECORD, TorchFile
from ckptavg.formats.tree import Place, join, locate

PLAIN_SUFFIX = ".pt"
STATE_DICT = "state_dict"
_FASTAI_MODEL = "model"
_FASTAI = frozenset([_FASTAI_MODEL, "opt"])  # entries of a file of fastai's
_FASTAI_STATE = frozenset(["hypers", "state"])  # of its optimizer
_SMALL = 1 << 14  # elements of a tensor that counts as a value where it stands among others
_MOST_VALUES, _MOST_BYTES = 10_000, 1 << 24  # of those: a small file can hold them by the million
_BARE = "the weights stand under 'state_dict'; -o OUT.pth gives a bare state dict like the inputs"
_LISTED = (
    "the weights stand under 'state_dict'; -o OUT.pth gives a list or a tuple like the inputs'"
)
_MODULE = "a pickled module is written as its state dict: its class is not known here"


@dataclass
class Contents:
    """What goes into a file.

    Attributes:
        tree: The object, with stubs for tensors.
        records: Further entries of the zip, where the object has no room for them.
        notes: What of the input is not in it.
    """

    tree: Any
    records: Mapping[str, bytes]
    notes: Sequence[str] = ()


def lay_out(
    path: str, tensors: Sequence[OutputTensor], provenance: str, template: Checkpoint
) -> tuple[FileLayout, Sequence[str]]:
    """Plan a ``torch.save`` file.

    Inputs from ``torch.save`` give an output like the last of them: weights replaced in the entry
    and under the names that they had (and in the one that loaders look into, if it has the same
    names and another was averaged), the rest kept as far as it may go out (``harmless``). A
    ``.pt`` has the weights under ``state_dict`` with bare names besides, or only there if the
    input was a bare state dict, and loads by the safe default of ``torch.load``. So has an output
    of other inputs, whatever its suffix.

    Args:
        path: Decides by its suffix.
        tensors: What it will hold, under bare names.
        provenance: How it was made, as JSON.
        template: The last input.

    Returns:
        The layout, and notes about what is left out.
    """
    book = _Storages(tensors)
    contents = _contents(Path(path).suffix, provenance, template, book)
    archive = Archive()
    archive.add("data.pkl", dumps(contents.tree))
    archive.add("byteorder", b"little")
    for tensor in tensors:
        if tensor.tied_to is None:
            archive.reserve(
                f"data/{book.stubs[tensor.name].storage.key}", tensor.nbytes, tensor.name
            )
    for key, value in book.values.items():
        archive.add(f"data/{key}", value)
    archive.add("version", b"3\n")
    for name, content in contents.records.items():
        archive.add(name, content)
    parts = archive.close()
    file = FileLayout("", archive.size, parts, archive.offsets, archive.checksums)
    return file, contents.notes


class _Storages:
    """The tensors of an output by their bare names, and the few that are kept by value.

    Attributes:
        stubs: Bare name → what stands for the tensor; tied ones share their storage.
        values: Storage key → bytes of a tensor beside the weights.
    """

    def __init__(self, tensors: Sequence[OutputTensor]) -> None:
        self.stubs: dict[str, TensorStub] = {}
        self.values: dict[str, bytes] = {}
        self._kept: dict[object, TensorStub] = {}
        self._bytes = 0
        for tensor in tensors:
            if tensor.tied_to is not None:
                storage = self.stubs[tensor.tied_to].storage
            else:
                storage = StorageStub(str(len(self.stubs)), tensor.dtype, tensor.numel)
            self.stubs[tensor.name] = TensorStub(storage, tensor.dtype, tensor.shape)

    def keep(self, view: TensorView, file: TorchFile) -> TensorStub | None:
        """A small tensor with its values; None if there are too many."""
        same = state_dict.identity(view)
        room = len(self._kept) < _MOST_VALUES and self._bytes < _MOST_BYTES
        if same not in self._kept and room:
            self._kept[same] = self._read(view, file)
        return self._kept.get(same)

    def _read(self, view: TensorView, file: TorchFile) -> TensorStub:
        numel = math.prod(view.shape)
        value = bytearray(numel * view.dtype.size)
        reader = Reader()
        try:
            if numel:
                reader.read(file.tensor(view), 0, numel, memoryview(value))
        finally:
            reader.close()
        key = str(len(self.stubs) + len(self.values))
        self.values[key] = bytes(value)
        self._bytes += len(value)
        return TensorStub(StorageStub(key, view.dtype, numel), view.dtype, view.shape)


def _contents(suffix: str, provenance: str, template: Checkpoint, book: _Storages) -> Contents:
    plain = suffix == PLAIN_SUFFIX
    if template.layout == "torch":
        return _like_file(plain, provenance, template, book)
    if template.layout == "distributed":
        return _like_shards(plain, provenance, template, book)
    return Contents({STATE_DICT: OrderedDict(book.stubs), PROVENANCE: provenance}, {})


def _like_file(plain: bool, provenance: str, template: Checkpoint, book: _Storages) -> Contents:
    """What a file of ``torch.save`` gives: all that it held, with other weights."""
    bare = OrderedDict(book.stubs)
    alone = {STATE_DICT: bare, PROVENANCE: provenance}
    template.files[0].verify()
    file = zip_reader.read(template.files[0].path)
    places = _places(file, template)
    pickled = any(place.pickled for place in places.values())
    notes = [_MODULE] if pickled or not places else []
    if not places or not all(place.within_plain for place in places.values()):
        return Contents(alone, {}, notes)
    whole = any(place.value is file.tree for place in places.values())
    unnamed = not isinstance(file.tree, dict)  # there is no name to put more under
    if plain and (unnamed or (whole and not template.networks)):
        return Contents(alone, {}, notes or [_LISTED if unnamed else _BARE])
    if whole and pickled:
        return Contents(alone, {}, notes)
    keeper = _keeper(plain, template, book, file, places)
    own = _own_entries(template, book, keeper, places)
    fastai = not unnamed and file.tree.keys() == _FASTAI and template.key == _FASTAI_MODEL
    if fastai and not plain:
        return _like_fastai(own[""], provenance, file, keeper)
    if not whole and (usual := _usual_place(file, template, places)) is not None:
        keeper.replaced = {**keeper.replaced, id(usual.value): own[""]}
    tree = own[""] if whole else keeper.whole(file.tree)
    if whole or unnamed:
        records = {PROVENANCE_RECORD: provenance.encode()}
        return Contents(_with_state_dict(tree, bare, plain), records, notes + keeper.notes)
    return Contents(
        _with_state_dict(tree | {PROVENANCE: provenance}, bare, plain), {}, notes + keeper.notes
    )


def _like_shards(plain: bool, provenance: str, template: Checkpoint, book: _Storages) -> Contents:
    """What a directory of shards gives: of Lightning's Trainer, a checkpoint as it loads it."""
    meta = lightning.read_meta(template.path, plain=plain)
    if meta is None or not meta.of_trainer:
        return Contents({STATE_DICT: OrderedDict(book.stubs), PROVENANCE: provenance}, {})
    names = {name: name if plain else template.stored_name(name) for name in book.stubs}
    state = OrderedDict((names[name], stub) for name, stub in book.stubs.items())
    tree = {**meta.entries, STATE_DICT: state, PROVENANCE: provenance}
    return Contents(tree, {}, meta.notes)


def _like_fastai(
    own: OrderedDict[Any, Any], provenance: str, file: TorchFile, keeper: Keeper
) -> Contents:
    """What fastai's Learner.load takes: exactly these two entries, or a bare state dict.

    It starts the optimizer anew where it finds none, and warns.
    """
    held = file.tree["opt"]
    state = isinstance(held, dict) and held.keys() >= _FASTAI_STATE
    kept = {} if state else keeper.entries({"opt": held})
    keeper.dropped += ["opt"] if state else []
    tree = {_FASTAI_MODEL: own, "opt": kept.get("opt")}
    return Contents(tree, {PROVENANCE_RECORD: provenance.encode()}, keeper.notes)


def _places(file: TorchFile, template: Checkpoint) -> dict[str, Place]:
    """Where the weights lie, by the network's path below the key; none if that cannot be told."""
    places: dict[str, Place] = {}
    for path in template.networks or ("",):
        place = locate(file.tree, join(template.key, path))
        if place is None:
            return {}
        places[path] = place
    return places


def _with_state_dict(tree: Any, bare: Mapping[str, TensorStub], plain: bool) -> Any:
    return {**tree, STATE_DICT: bare} if plain else tree


def _usual_place(
    file: TorchFile, template: Checkpoint, places: Mapping[str, Place]
) -> Place | None:
    """Where loaders look for the weights, if another entry of the same names was averaged."""
    try:
        usual = state_dict.find_weights(file.path, file.tree, None)
    except (CheckpointError, MalformedPickle):
        return None
    if template.networks or usual.networks or usual.entry.keys() != places[""].entry.keys():
        return None
    found = locate(file.tree, usual.key)
    return found if found and found.within_plain and found.value is not file.tree else None


def _keeper(
    plain: bool,
    template: Checkpoint,
    book: _Storages,
    file: TorchFile,
    places: Mapping[str, Place],
) -> Keeper:
    """Keeps, of tensors, those that are the weights under another name, and small ones."""
    bare = {stored: name for name, stored in template.stored_names.items()}
    same: dict[object, TensorStub] = {}
    for path, place in places.items():
        for name, view in place.entry.items():
            known = isinstance(view, TensorView) and bare.get(join(path, name))
            if known in book.stubs:
                same[state_dict.identity(view)] = book.stubs[known]

    def tensor(view: TensorView, among_values: bool) -> TensorStub | None:
        if found := same.get(state_dict.identity(view)):
            return found
        small = not view.shape or (among_values and math.prod(view.shape) <= _SMALL)
        return book.keep(view, file) if small and view.dtype.size else None

    return Keeper(template.key, plain, tensor, {}, template.networks, template.momentary)


def _own_entries(
    template: Checkpoint, book: _Storages, keeper: Keeper, places: Mapping[str, Place]
) -> dict[str, OrderedDict[Any, Any]]:
    """The entries that hold the weights, by network, and the keeper told to put them in place.

    One that lies in another is made before it.
    """
    file_entries: dict[str, OrderedDict[Any, Any]] = {}
    bare = {stored: name for name, stored in template.stored_names.items()}
    replaced = dict(keeper.replaced)
    keeper.replaced = replaced
    for path in sorted(places, key=len, reverse=True):
        own = _own_entry(template, book, keeper, path, places[path], bare)
        file_entries[path] = own
        replaced[id(places[path].value)] = own
    for name in book.stubs:
        if name not in template.stored_names:  # what another base brings
            stored = template.stored_name(name)
            homes = [path for path in places if stored.startswith(f"{path}." if path else "")]
            home = max(homes, key=len, default=next(iter(places)))
            within = stored.removeprefix(f"{home}.") if home else stored
            file_entries[home][within] = book.stubs[name]
    return file_entries


def _own_entry(
    template: Checkpoint,
    book: _Storages,
    keeper: Keeper,
    path: str,
    place: Place,
    bare: Mapping[str, str],
) -> OrderedDict[Any, Any]:
    """The weights under the names that they had, in their order, and what stood among them.

    Args:
        template: The last input.
        book: The output's tensors.
        keeper: Says what may go out of what stands among the weights.
        path: Dotted path of the entry.
        place: Where it lies.
        bare: Stored name of each weight → its bare name.
    """
    taken = {
        name: bare[join(path, name)]
        for name in place.entry
        if isinstance(name, str) and join(path, name) in bare
    }
    others = {name: value for name, value in place.entry.items() if name not in taken}
    above = join(template.key, path)
    kept = keeper.entries(others, f"{above}." if above else "")
    own: OrderedDict[Any, Any] = OrderedDict()
    for name in place.entry:
        if name in kept:
            own[name] = kept[name]
        elif taken.get(name) in book.stubs:
            own[name] = book.stubs[taken[name]]
    return own
