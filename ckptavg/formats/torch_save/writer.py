"""Writer of ``torch.save`` outputs.

As a rule an output holds all that the last input held, with other weights. Programs that load the
inputs then load the output. A ``.pt`` also loads in programs that do not know the inputs.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ckptavg.errors import CheckpointError
from ckptavg.formats import state_dict
from ckptavg.formats.checkpoint import Checkpoint
from ckptavg.formats.file_layout import FileLayout, OutputTensor
from ckptavg.formats.provenance import PROVENANCE
from ckptavg.formats.reader import Reader
from ckptavg.formats.safe_pickle.allowlist import CarryOver
from ckptavg.formats.safe_pickle.values import MalformedPickle, TensorView
from ckptavg.formats.torch_save import zip_reader
from ckptavg.formats.torch_save.archive import Archive, StorageStub, TensorStub, dumps
from ckptavg.formats.torch_save.format import TORCH_SAVE
from ckptavg.formats.torch_save.zip_reader import PROVENANCE_RECORD, TorchFile
from ckptavg.formats.tree import EntryLocation, identity, join, locate

PLAIN_SUFFIX = ".pt"
STATE_DICT = "state_dict"
_FASTAI_MODEL = "model"
# Entries of a file that fastai saves, and of fastai's optimizer state.
_FASTAI = frozenset([_FASTAI_MODEL, "opt"])
_FASTAI_STATE = frozenset(["hypers", "state"])
# Elements. A tensor among other values counts as a value itself up to this size.
_SMALL = 1 << 14
# Limits on the kept small tensors: a small file can hold millions of views of one storage.
_MOST_VALUES, _MOST_BYTES = 10_000, 1 << 24
_BARE = (
    "the weights are stored under 'state_dict'; `out='OUT.pth'` gives a bare state dict like the "
    "inputs"
)
_LISTED = (
    "the weights are stored under 'state_dict'; `out='OUT.pth'` gives a list or a tuple like the "
    "inputs'"
)
_MODULE = "a pickled module is written as its state dict: its class is not known here"


@dataclass
class Contents:
    """Contents of an output file.

    Attributes:
        tree: The object to pickle, with stubs for tensors.
        records: Further entries of the zip, for facts that have no place in the object.
        notes: Remarks about parts of the input that are left out.
    """

    tree: Any
    records: Mapping[str, bytes]
    notes: Sequence[str] = ()


def lay_out(
    path: str, tensors: Sequence[OutputTensor], provenance: str, template: Checkpoint
) -> tuple[FileLayout, Sequence[str]]:
    """Plan a ``torch.save`` file.

    Inputs from ``torch.save`` give an output like the last input. The weights are replaced in the
    entry of the input and under the names of the input. If another entry than the default one was
    averaged, and the default entry has the same names, the weights go into that entry as well. The
    rest of the input is kept as far as the allowlist of ``safe_pickle`` permits.

    A ``.pt`` also has the weights under ``state_dict`` with bare names. If the input was a bare
    state dict, they are stored only there. A ``.pt`` loads by the safe default of ``torch.load``.
    An output of other inputs has the same form, with any suffix.

    Args:
        path: The output, whose suffix decides the form.
        tensors: Tensors of the output, under bare names.
        provenance: Record of how the output was made, as JSON.
        template: The last input.

    Returns:
        The layout, and notes about parts of the input that are left out.
    """
    storages = _Storages(tensors)
    contents = _plan_contents(Path(path).suffix, provenance, template, storages)
    archive = Archive()
    archive.add("data.pkl", dumps(contents.tree))
    archive.add("byteorder", b"little")
    for tensor in tensors:
        if tensor.tied_to is None:
            archive.reserve(
                f"data/{storages.stubs[tensor.name].storage.key}", tensor.nbytes, tensor.name
            )
    # Small tensors beside the weights are stored at once, without a reserved range.
    for key, value in storages.values.items():
        archive.add(f"data/{key}", value)
    archive.add("version", b"3\n")
    for name, content in contents.records.items():
        archive.add(name, content)
    parts = archive.close()
    file = FileLayout("", archive.size, parts, archive.offsets, archive.checksums)
    return file, contents.notes


class _Storages:
    """Tensors of an output by bare name, and small tensors that are kept by value.

    Attributes:
        stubs: Bare name → stub of the tensor. Tied tensors share a storage.
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
        """Keep a small tensor beside the weights by value.

        Returns:
            The stub of the tensor; None where the limits on kept values are reached.
        """
        same = identity(view)
        room = len(self._kept) < _MOST_VALUES and self._bytes < _MOST_BYTES
        if same not in self._kept and room:
            self._kept[same] = self._read(view, file)
        return self._kept.get(same)

    def _read(self, view: TensorView, file: TorchFile) -> TensorStub:
        """Read the bytes of a tensor into a new storage."""
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


def _plan_contents(
    suffix: str, provenance: str, template: Checkpoint, storages: _Storages
) -> Contents:
    """Choose the contents of an output by the layout of the last input."""
    plain = suffix == PLAIN_SUFFIX
    if template.format is TORCH_SAVE:
        return _plan_like_file(plain, provenance, template, storages)
    return _plan_like_other_format(plain, provenance, template, storages)


def _plan_like_file(
    plain: bool, provenance: str, template: Checkpoint, storages: _Storages
) -> Contents:
    """Plan an output like a ``torch.save`` file: all entries kept, the weights replaced."""
    bare = OrderedDict(storages.stubs)
    alone = {STATE_DICT: bare, PROVENANCE: provenance}
    template.files[0].verify()
    file = zip_reader.read(template.files[0].path)
    networks = _locate_networks(file, template)
    pickled = any(network.pickled for network in networks.values())
    notes: list[str] = []
    if pickled or not networks:
        notes.append(_MODULE)
    if not networks or not all(network.within_plain for network in networks.values()):
        return Contents(alone, {}, notes)
    # A bare state dict: the whole object is the weights.
    is_bare = any(network.value is file.tree for network in networks.values())
    # A list or a tuple has no names under which further entries could stand.
    unnamed = not isinstance(file.tree, dict)
    if plain and unnamed:
        return Contents(alone, {}, notes or [_LISTED])
    if plain and is_bare and not template.networks:
        return Contents(alone, {}, notes or [_BARE])
    if is_bare and pickled:
        return Contents(alone, {}, notes)
    carry_over = _make_filter(plain, template, storages, file, networks)
    entries = _build_entries(template, storages, carry_over, networks)
    fastai = not unnamed and file.tree.keys() == _FASTAI and template.key == _FASTAI_MODEL
    if fastai and not plain:
        return _plan_like_fastai(entries[""], provenance, file, carry_over)
    if is_bare:
        tree: Any = entries[""]
    else:
        default = _locate_default_entry(file, template, networks)
        if default is not None:
            carry_over.replaced = {**carry_over.replaced, id(default.value): entries[""]}
        tree = carry_over.filter_object(file.tree)
    records: dict[str, bytes] = {}
    if is_bare or unnamed:
        records[PROVENANCE_RECORD] = provenance.encode()
    else:
        tree = {**tree, PROVENANCE: provenance}
    if plain:
        tree = {**tree, STATE_DICT: bare}
    return Contents(tree, records, notes + carry_over.notes)


def _plan_like_other_format(
    plain: bool, provenance: str, template: Checkpoint, storages: _Storages
) -> Contents:
    """Plan an output for a checkpoint that is no ``torch.save`` file.

    Shards of Lightning's Trainer give a checkpoint that the Trainer loads.
    """
    meta = template.format.read_meta(template, plain=plain)
    if meta is None or not meta.of_trainer:
        return Contents({STATE_DICT: OrderedDict(storages.stubs), PROVENANCE: provenance}, {})
    state: OrderedDict[str, TensorStub] = OrderedDict()
    for name, stub in storages.stubs.items():
        if plain:
            state[name] = stub
        else:
            state[template.stored_name(name)] = stub
    tree = {**meta.entries, STATE_DICT: state, PROVENANCE: provenance}
    return Contents(tree, {}, meta.notes)


def _plan_like_fastai(
    weights: OrderedDict[Any, Any], provenance: str, file: TorchFile, carry_over: CarryOver
) -> Contents:
    """Plan an output that fastai's ``Learner.load`` accepts.

    ``Learner.load`` takes exactly the entries ``model`` and ``opt``, or a bare state dict. Without
    an optimizer state it warns, and starts the optimizer anew.
    """
    optimizer = file.tree["opt"]
    entries: dict[Any, Any] = {}
    if isinstance(optimizer, dict) and optimizer.keys() >= _FASTAI_STATE:
        carry_over.dropped.append("opt")
    else:
        entries = carry_over.filter_entries({"opt": optimizer})
    tree = {_FASTAI_MODEL: weights, "opt": entries.get("opt")}
    return Contents(tree, {PROVENANCE_RECORD: provenance.encode()}, carry_over.notes)


def _locate_networks(file: TorchFile, template: Checkpoint) -> dict[str, EntryLocation]:
    """Locate the weights of each network in a file.

    Returns:
        Path of the network below the key → its location; empty if a network cannot be located.
    """
    networks: dict[str, EntryLocation] = {}
    for path in template.networks or ("",):
        network = locate(file.tree, join(template.key, path))
        if network is None:
            return {}
        networks[path] = network
    return networks


def _locate_default_entry(
    file: TorchFile, template: Checkpoint, locations: Mapping[str, EntryLocation]
) -> EntryLocation | None:
    """Locate the entry that loaders read, if another entry with the same names was averaged.

    Returns:
        Its location; None where there is no such entry.
    """
    # Checked first: the search takes long in a file of very many networks.
    if template.networks:
        return None
    try:
        default = state_dict.find_weights(file.path, file.tree, None)
    except (CheckpointError, MalformedPickle):
        return None
    if default.networks or default.entry.keys() != locations[""].entry.keys():
        return None
    network = locate(file.tree, default.key)
    if network is None or not network.within_plain or network.value is file.tree:
        return None
    return network


def _make_filter(
    plain: bool,
    template: Checkpoint,
    storages: _Storages,
    file: TorchFile,
    locations: Mapping[str, EntryLocation],
) -> CarryOver:
    """Make the filter, which keeps small tensors, and further names of the weights."""
    bare = {stored: name for name, stored in template.stored_names.items()}
    same: dict[object, TensorStub] = {}
    for path, network in locations.items():
        for name, view in network.entry.items():
            bare_name = isinstance(view, TensorView) and bare.get(join(path, name))
            if bare_name in storages.stubs:
                same[identity(view)] = storages.stubs[bare_name]

    def tensor(view: TensorView, among_values: bool) -> TensorStub | None:
        """Return the stub of a tensor that may go out, else None."""
        if stub := same.get(identity(view)):
            return stub
        small = not view.shape or (among_values and math.prod(view.shape) <= _SMALL)
        if not small or not view.dtype.size:
            return None
        return storages.keep(view, file)

    return CarryOver(template.key, plain, tensor, {}, template.networks, template.momentary)


def _build_entries(
    template: Checkpoint,
    storages: _Storages,
    carry_over: CarryOver,
    locations: Mapping[str, EntryLocation],
) -> dict[str, OrderedDict[Any, Any]]:
    """Build the entries that hold the weights, and set the filter to put each entry in place.

    An entry within another entry is built before the outer one.

    Returns:
        Path of a network → the entry.
    """
    file_entries: dict[str, OrderedDict[Any, Any]] = {}
    bare = {stored: name for name, stored in template.stored_names.items()}
    replaced = dict(carry_over.replaced)
    carry_over.replaced = replaced
    # Longest paths first, so that an entry within another is replaced there.
    for path in sorted(locations, key=len, reverse=True):
        entry = _build_entry(template, storages, carry_over, path, locations[path], bare)
        file_entries[path] = entry
        replaced[id(locations[path].value)] = entry
    for name in storages.stubs:
        # A tensor that the last input lacks comes from another base.
        if name not in template.stored_names:
            stored = template.stored_name(name)
            homes = [path for path in locations if stored.startswith(_prefix(path))]
            home = max(homes, key=len, default=next(iter(locations)))
            file_entries[home][stored.removeprefix(_prefix(home))] = storages.stubs[name]
    return file_entries


def _build_entry(
    template: Checkpoint,
    storages: _Storages,
    carry_over: CarryOver,
    path: str,
    location: EntryLocation,
    bare: Mapping[str, str],
) -> OrderedDict[Any, Any]:
    """Build the entry of a network: weights and kept values, under the input's names and order.

    Args:
        template: The last input.
        storages: The output's tensors.
        carry_over: Filter for the values that stand among the weights.
        path: Dotted path of the entry.
        location: Location of the entry in the input.
        bare: Stored name of each weight → its bare name.
    """
    bare_names: dict[str, str] = {}
    values: dict[Any, Any] = {}
    for name, value in location.entry.items():
        if isinstance(name, str) and join(path, name) in bare:
            bare_names[name] = bare[join(path, name)]
        else:
            values[name] = value
    filtered = carry_over.filter_entries(values, _prefix(join(template.key, path)))
    entry: OrderedDict[Any, Any] = OrderedDict()
    for name in location.entry:
        if name in filtered:
            entry[name] = filtered[name]
        elif bare_names.get(name) in storages.stubs:
            entry[name] = storages.stubs[bare_names[name]]
    return entry


def _prefix(path: str) -> str:
    """Return the beginning of names below a dotted path; empty for the root."""
    if not path:
        return ""
    return f"{path}."
