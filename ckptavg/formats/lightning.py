"""The file ``meta.pt`` of Lightning's sharded checkpoints: all values except the tensors.

The checkpoints themselves are of ``torch.distributed.checkpoint``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ckptavg.errors import CheckpointError
from ckptavg.formats.safe_pickle.allowlist import CarryOver
from ckptavg.formats.torch_save import zip_reader
from ckptavg.formats.torch_save.archive import Archive, dumps
from ckptavg.io.paths import Location
from ckptavg.io.stamp import FileStamp

META = "meta.pt"
# The entry without which load_from_checkpoint takes no file.
_VERSION = "pytorch-lightning_version"


@dataclass(frozen=True)
class Meta:
    """The values in ``meta.pt`` that an output may take over.

    Attributes:
        entries: Hyperparameters, the epoch, versions, the callbacks' states.
        notes: Remarks about values that are left out: the state of training, unknown objects,
            metrics.
    """

    entries: Mapping[Any, Any]
    notes: list[str]

    @property
    def of_trainer(self) -> bool:
        """True if Lightning's Trainer wrote the file, False if a user of Fabric did."""
        return _VERSION in self.entries

    def to_file(self) -> bytes:
        """Build the bytes of a ``meta.pt`` with the entries."""
        archive = Archive()
        archive.add("data.pkl", dumps(dict(self.entries)))
        archive.add("byteorder", b"little")
        archive.add("version", b"3\n")
        return b"".join(content for _, content in archive.close())


def read_meta(directory: Location, *, plain: bool = False) -> Meta | None:
    """Read the values that Lightning keeps beside the shards; None if no values are found.

    Args:
        directory: The checkpoint's directory.
        plain: Keep only values that ``torch.load`` reads by default, with ``weights_only=True``.
    """
    path = directory / META
    if not path.is_file():
        return None
    stamp = FileStamp.of(path)
    try:
        tree = zip_reader.read(path).tree
    except CheckpointError:
        # Another tool may write a file of the same name, which is not an error.
        return None
    # The file may have been replaced while it was read.
    stamp.verify()
    if not isinstance(tree, dict):
        return None
    carry_over = CarryOver(key="", plain=plain, tensor=lambda *_: None, replaced={})
    return Meta(carry_over.filter_entries(tree), carry_over.notes)
