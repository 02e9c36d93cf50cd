"""The format of DeepSpeed's checkpoints, as an entry of the registry."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from ckptavg.formats.checkpoint import Checkpoint
from ckptavg.formats.deepspeed import tags
from ckptavg.formats.file_formats import read_file
from ckptavg.formats.format import DirectoryFormat
from ckptavg.formats.huggingface import layout
from ckptavg.formats.huggingface.trainer_state import find_record
from ckptavg.formats.parts import build_checkpoint
from ckptavg.io.paths import Location


class DeepSpeed(DirectoryFormat):
    """Directories of DeepSpeed, which are read and not written."""

    name = "deepspeed"
    label = "DeepSpeed directories"

    def detects(self, directory: Location) -> bool:
        """Return True if a directory is a tag, or holds the tag of one checkpoint."""
        return tags.tag_of(directory) is not None

    def open(self, directory: Location, key: str | None) -> Checkpoint | None:
        """Open the model's file of a tag."""
        tag = tags.tag_of(directory)
        if tag is None:
            return None
        part = read_file(tags.model_file(tag), key)
        record = find_record(directory) or part.record
        checkpoint = build_checkpoint(directory, self, [part], record)
        notes = tags.notes(tag, checkpoint.tensors)
        return replace(checkpoint, notes=(*checkpoint.notes, *notes))

    def is_nested_state(self, directory: Location) -> bool:
        """Return True for a tag: the Trainer keeps one within a checkpoint, to resume from."""
        return tags.is_tag(directory)

    def check_run(self, directories: Sequence[Location]) -> None:
        """Refuse weights that are spread over ranks, with the commands that convert them."""
        # Whole weights beside the ranks' files are usable as they are.
        tags.refuse_partitioned(p for p in directories if layout.find_main_file(p) is None)


DEEPSPEED = DeepSpeed()
