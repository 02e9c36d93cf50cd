"""The contract of a checkpoint format: recognition, reading, and the layout of outputs.

A format is one object with a class of its own: a ``FileFormat`` or a ``DirectoryFormat``. The
object is registered in ``file_formats.FILE_FORMATS`` or ``registry.DIRECTORY_FORMATS``.
"""

# ruff: noqa: ARG002 - defaults of methods that a format may override

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from ckptavg.io.paths import Location

if TYPE_CHECKING:
    from ckptavg.formats.checkpoint import Checkpoint
    from ckptavg.formats.file_layout import Layout, OutputTensor
    from ckptavg.formats.lightning import Meta
    from ckptavg.formats.parts import Part
    from ckptavg.io.stamp import FileStamp


class Format(ABC):
    """A checkpoint format.

    Attributes:
        name: Short name, as users see it in ``Checkpoint.layout``.
        label: Name of the format in messages.
        is_directory: True if a checkpoint is a directory, False if it is a file.
    """

    name: ClassVar[str]
    label: ClassVar[str]
    is_directory: ClassVar[bool]

    def __repr__(self) -> str:
        return f"<{type(self).__name__}>"

    @abstractmethod
    def owns(self, name: str) -> bool:
        """Return True if a file holds tensors in this format, judged by the file's name."""

    def read_settings(self, checkpoint: Checkpoint) -> Mapping[Any, Any]:
        """Read the entries beside the weights of a checkpoint, as plain values.

        Raises:
            CheckpointError: The checkpoint can no longer be read.
        """
        return {}

    def read_meta(self, checkpoint: Checkpoint, *, plain: bool = False) -> Meta | None:
        """Read what Lightning keeps in a file beside the weights; None without such a file.

        Args:
            checkpoint: A checkpoint of this format.
            plain: Keep only values that ``torch.load`` reads by default.
        """
        return None


class FileFormat(Format):
    """A format of single files.

    Attributes:
        suffixes: Suffixes that checkpoints of a run have. Files with these suffixes are opened.
        rare_suffixes: Suffixes that other files have as well. Such files are opened in some runs.
        output_suffixes: Suffixes of an output's path that select this format; empty for a format
            that is read and not written.
    """

    is_directory = False
    suffixes: ClassVar[tuple[str, ...]]
    rare_suffixes: ClassVar[tuple[str, ...]] = ()
    output_suffixes: ClassVar[tuple[str, ...]] = ()

    @abstractmethod
    def looks_like(self, start: bytes) -> bool:
        """Return True if the first bytes of a file are enough to read the file as this format."""

    def begins(self, start: bytes) -> bool:
        """Return True if the first bytes make sure of this format, whatever the file's name."""
        return self.looks_like(start)

    def claims(self, path: Location) -> bool:
        """Return True if a file with an unknown beginning is a damaged file of this format."""
        return False

    def owns(self, name: str) -> bool:
        """Return True if a file holds tensors in this format, judged by the file's name."""
        return name.lower().endswith(self.suffixes + self.output_suffixes)

    @abstractmethod
    def read(self, path: Location, stamp: FileStamp, key: str | None) -> Part:
        """Read the header of a file.

        Args:
            path: The file.
            stamp: The file's stamp.
            key: Dotted path of the entry that holds the weights; None to find the entry.

        Raises:
            CheckpointError: The file is damaged, or holds no weights that can be found.
        """

    def lay_out(
        self, path: str, tensors: Sequence[OutputTensor], provenance: str, template: Checkpoint
    ) -> Layout:
        """Plan an output file.

        Args:
            path: The output, with one of ``output_suffixes``.
            tensors: Tensors of the output, under bare names.
            provenance: Record of how the output was made, as JSON.
            template: The last input.

        Raises:
            UnsupportedTensorError: The format cannot store one of the tensors.
        """
        raise NotImplementedError(f"{self.label} are not written")


@dataclass(frozen=True)
class Unfinished:
    """A directory whose save was interrupted.

    Attributes:
        reason: Clause that follows the directory's name in a message.
        remedy: What to do; empty where the checkpoint is to be copied again.
    """

    reason: str
    remedy: str = ""


class DirectoryFormat(Format):
    """A format of directories.

    Attributes:
        is_written: True if the format writes the average of its own checkpoints; else outputs are
            Hugging Face directories.
    """

    is_directory = True
    is_written: ClassVar[bool] = False

    @abstractmethod
    def detects(self, directory: Location) -> bool:
        """Return True if a directory is a checkpoint of this format."""

    @abstractmethod
    def open(self, directory: Location, key: str | None) -> Checkpoint | None:
        """Open a checkpoint; return None if the directory is of another format.

        Args:
            directory: Any directory.
            key: Dotted path of the entry that holds the weights; None to find the entry.

        Raises:
            CheckpointError: The checkpoint is damaged, or holds no weights that can be found.
        """

    def owns(self, name: str) -> bool:
        """Return True if a file holds tensors in this format, judged by the file's name."""
        return False

    def lay_out(
        self, tensors: Sequence[OutputTensor], provenance: str, template: Checkpoint
    ) -> Layout:
        """Plan an output directory.

        Args:
            tensors: Tensors of the output, under bare names.
            provenance: Record of how the output was made, as JSON.
            template: The last input.

        Raises:
            UnsupportedTensorError: The format cannot store one of the tensors.
        """
        raise NotImplementedError(f"{self.label} are not written")

    def find_homes(self, paths: Sequence[Location]) -> dict[Location, Location]:
        """Find the files that are parts of a checkpoint of this format.

        Args:
            paths: Files and directories that a user named.

        Returns:
            File → the directory that is the checkpoint.

        Raises:
            CheckpointError: The files make up a part of a checkpoint only.
        """
        return {path: path.parent for path in paths if self.is_part(path)}

    def is_part(self, path: Location) -> bool:
        """Return True if a file is a part of the checkpoint that its directory is."""
        return False

    def component_names(self, directory: Location) -> set[str]:
        """Return the names of subdirectories that hold further weights of the same model.

        Raises:
            CheckpointError: A list of the components names a directory outside.
        """
        return set()

    def is_nested_state(self, directory: Location) -> bool:
        """Return True if a directory within a checkpoint holds state that belongs to it."""
        return False

    def why_unfinished(self, directory: Location) -> Unfinished | None:
        """Describe a directory of this format whose save was interrupted; None for any other."""
        return None

    def check_run(self, directories: Sequence[Location]) -> None:
        """Make sure that the checkpoints of a run are readable.

        Raises:
            CheckpointError: Checkpoints need to be converted, which the error says for all at once.
        """
