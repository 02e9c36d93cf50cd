"""Recognition of unsupported files by the first bytes, with a remedy for each kind of file."""

from __future__ import annotations

import codecs
import io
import re
from collections.abc import Collection
from dataclasses import dataclass
from typing import BinaryIO

from ckptavg.errors import CheckpointError
from ckptavg.formats.protobuf import is_onnx, is_saved_model
from ckptavg.io import paths
from ckptavg.io.paths import Location

# Bytes at the beginning of a file, by which most kinds are recognized.
HEAD = 4096
# Bytes at the end of a file. PaddlePaddle writes the table of names last.
_TAIL = 1 << 16
_TAR_BLOCK = 512
# Members of a tar archive that are looked at: the characteristic members come first.
_MOST_MEMBERS = 64


@dataclass(frozen=True, slots=True)
class ForeignKind:
    """A kind of file that is no checkpoint.

    Attributes:
        noun: Noun phrase for the kind, with an article.
        remedy: The way from such a file to an average.
    """

    noun: str
    remedy: str

    def refusal(self, path: str | Location) -> CheckpointError:
        """Word the error for a file of this kind."""
        return CheckpointError(f"{path} is {self.noun}, not a checkpoint", self.remedy)


def _packed(tool: str, command: str) -> ForeignKind:
    """Describe the kind of files that a tool compressed."""
    return ForeignKind(
        f"compressed by {tool}", f"Decompress it first ({command}), then name the result."
    )


_BEFORE_EXPORT = "Average the checkpoints that it was made of, then export the average."
_RESAVE = "Save its weights as tensors, with torch.save or safetensors, and average those files."
_NAME_DIRECTORY = "Name the directory that holds it."
_ASK_AGAIN = (
    "Download the file itself: servers send such texts for wrong links, missing logins and limits."
)

_EMPTY = ForeignKind("empty", "It may still be being written; copy it again or leave it out.")
_ZEROS = ForeignKind(
    "nothing but zeros at its beginning",
    "A crash or an unfinished download leaves that; copy it again or leave it out.",
)
_LFS = ForeignKind("a Git LFS pointer to the file", "Fetch the file itself with git lfs pull.")
_ANNEX = ForeignKind("a git-annex pointer to the file", "Fetch the file itself with git annex get.")
_HTML = ForeignKind("an HTML page", _ASK_AGAIN)
_XML = ForeignKind("an XML text", _ASK_AGAIN)
_JSON = ForeignKind("a JSON text", "Name a file of weights, or leave it out.")
_TEXT = ForeignKind("a text", "Name a file of weights, or leave it out.")
_INDEX = ForeignKind("an index of shards", _NAME_DIRECTORY)
_SHARD = ForeignKind("a shard of a distributed checkpoint", _NAME_DIRECTORY)
_METADATA = ForeignKind("the metadata of a distributed checkpoint", _NAME_DIRECTORY)
_TENSORFLOW = ForeignKind(
    "a part of a TensorFlow checkpoint", f"Load it with TensorFlow. {_RESAVE}"
)
_SAVED_MODEL = ForeignKind("a TensorFlow SavedModel", f"Load it with TensorFlow. {_RESAVE}")
_ONNX = ForeignKind("an ONNX model", _BEFORE_EXPORT)
_PICKLE = ForeignKind(
    "a plain pickle", f"If you trust who made it, load it with pickle.load. {_RESAVE}"
)
_PADDLE = ForeignKind("a PaddlePaddle state", f"Load it with paddle.load. {_RESAVE}")
_FLAX = ForeignKind("a MessagePack file, as Flax writes it", f"Load it with Flax. {_RESAVE}")
_NEMO = ForeignKind(
    "a NeMo archive", "Unpack each (tar xf), and name the model_weights.ckpt that it held."
)
_OLD_TORCH = ForeignKind(
    "a tar file of torch 0.1",
    "If you trust who made it, load it with torch.load(weights_only=False) and save it again.",
)
_TAR = ForeignKind("a tar archive", "Unpack it (tar xf), and name a checkpoint that it held.")
_ZIP = ForeignKind("a zip archive of other files", "Unpack it, and name a checkpoint that it held.")
_TORCHSCRIPT = ForeignKind(
    "a TorchScript archive", "Save the module's state_dict() with torch.save and average that."
)
_EXPORTED = ForeignKind(
    "a torch.export archive",
    "Save the state_dict of torch.export.load(...) with torch.save and average that.",
)
_PACKAGE = ForeignKind("a torch.package archive", _BEFORE_EXPORT)
_GGML = ForeignKind("a GGML model", _BEFORE_EXPORT)
_KERAS = ForeignKind("a Keras model", f"Load it with Keras. {_RESAVE}")
_ARRAYS = ForeignKind("a NumPy file", f"Load it with numpy.load. {_RESAVE}")

# Byte offset, the bytes at the offset, and the kind of file.
_MAGIC: tuple[tuple[int, bytes, ForeignKind], ...] = (
    (0, b"GGUF", ForeignKind("a GGUF model", _BEFORE_EXPORT)),
    (0, b"lmgg", _GGML),
    (0, b"fmgg", _GGML),
    (0, b"tjgg", _GGML),
    (0, b"algg", _GGML),
    (
        0,
        b"\x89HDF\r\n\x1a\n",
        ForeignKind("an HDF5 file, as Keras writes it", f"Load it. {_RESAVE}"),
    ),
    (0, b"\x93NUMPY", _ARRAYS),
    (0, b"\x12\x01\0\0\0\0\0\0", ForeignKind("an MXNet file", f"Load it with MXNet. {_RESAVE}")),
    (4, b"ET12", ForeignKind("an ExecuTorch program", _BEFORE_EXPORT)),
    (4, b"TFL3", ForeignKind("a TensorFlow Lite model", _BEFORE_EXPORT)),
    (4, b"PTMF", ForeignKind("a PyTorch Mobile module", _BEFORE_EXPORT)),
    (0, b"\x1f\x8b", _packed("gzip", "gzip -dc FILE > COPY")),
    (0, b"\x28\xb5\x2f\xfd", _packed("zstd", "zstd -dc FILE > COPY")),
    (0, b"\xfd7zXZ\0", _packed("xz", "xz -dc FILE > COPY")),
    (0, b"BZh", _packed("bzip2", "bzip2 -dc FILE > COPY")),
    (0, b"\x04\x22\x4d\x18", _packed("lz4", "lz4 -dc FILE > COPY")),
    (0, b"LZIP", _packed("lzip", "lzip -dc FILE > COPY")),
    (0, b"7z\xbc\xaf\x27\x1c", _packed("7-Zip", "7z x FILE")),
    (0, b"Rar!\x1a\x07", _packed("RAR", "unrar x FILE")),
    (0, b"version https://git-lfs.github.com/spec/", _LFS),
    (0, b"version https://hawser.github.com/spec/", _LFS),
    (0, b"/annex/objects/", _ANNEX),
    (0, b"model_checkpoint_path:", _TENSORFLOW),
)
# The magic number at the end of LevelDB's tables. TensorFlow keeps the index of tensors in one.
_TENSORFLOW_INDEX = b"\x57\xfb\x80\x8b\x24\x75\x47\xdb"
_TENSORFLOW_DATA = re.compile(r".*\.(data-\d{5}-of-\d{5}|index|meta)")
# Protocols 0 and 1 have no frame: a dict, a list or a global comes first.
_OLD_PICKLE = re.compile(rb"\((dp|lp)\d+\n|c[A-Za-z_][\w.]*\n[A-Za-z_]\w*\n|[}\]]q\0")
_PADDLE_NAMES = b"StructuredToParameterName@@"


@dataclass(frozen=True)
class _Sample:
    """A file to identify: the path, the opened file, and the first ``HEAD`` bytes."""

    path: Location
    file: BinaryIO
    start: bytes

    def end(self) -> bytes:
        """Read the last bytes of the file."""
        # A file may be shorter than the tail.
        length = self.file.seek(0, io.SEEK_END)
        self.file.seek(max(0, length - _TAIL))
        return self.file.read(_TAIL)


def identify(path: Location, file: BinaryIO, start: bytes) -> ForeignKind | None:
    """Identify the kind of an unsupported file; return None if no kind matches.

    Args:
        path: The file's path.
        file: The opened file.
        start: The file's first ``HEAD`` bytes.
    """
    sample = _Sample(path, file, start)
    # From the surest sign to the weakest: any file may happen to look like a short message.
    for recognize in (_match_magic, _match_tar, _match_pickle, _match_message, _match_text):
        if kind := recognize(sample):
            return kind
    return None


def is_text(path: Location) -> bool:
    """Return True if a file is text: trainers write counters and settings under any suffix."""
    with paths.open_binary(path) as file:
        return identify(path, file, file.read(HEAD)) in (_JSON, _TEXT)


def identify_name(path: Location) -> ForeignKind | None:
    """Identify the kind of a file by name; return None if the name is of no known kind."""
    # The contents of these files do not show the kind: shards and pickles begin like other files.
    if path.suffix == ".distcp":
        return _SHARD
    if path.name == ".metadata":
        return _METADATA
    return None


def identify_archive(names: Collection[str]) -> ForeignKind | None:
    """Identify a zip file by the names of the entries; return None for a ``torch.save`` file."""
    leaves = {name.rpartition("/")[2] for name in names}
    if leaves & {"constants.pkl", "bytecode.pkl"}:
        return _TORCHSCRIPT
    if leaves & {"archive_format", "serialized_exported_program.json", "serialized_state_dict.pt"}:
        return _EXPORTED
    if any(name.endswith("/.data/extern_modules") for name in names):
        return _PACKAGE
    if "model.weights.h5" in names:
        return _KERAS
    if names and all(name.endswith(".npy") for name in names):
        return _ARRAYS
    return None if "data.pkl" in leaves else _ZIP


def _match_magic(sample: _Sample) -> ForeignKind | None:
    for offset, magic, kind in _MAGIC:
        if sample.start.startswith(magic, offset):
            return kind
    if not sample.start:
        return _EMPTY
    if not sample.start.strip(b"\0"):
        return _ZEROS
    return None


def _match_tar(sample: _Sample) -> ForeignKind | None:
    # The magic number of a tar header is at offset 257.
    if sample.start[257:262] != b"ustar":
        return None
    members = _tar_members(sample.file)
    if any(name.endswith("model_weights.ckpt") for name in members):
        return _NEMO
    if {"sys_info", "pickle", "storages"} <= members:
        return _OLD_TORCH
    return _TAR


def _tar_members(file: BinaryIO) -> set[str]:
    """Read the names of the first members of a tar archive, without directories.

    ``tarfile`` is not used, since ``tarfile`` trusts the sizes in a header without bounds.
    """
    names: set[str] = set()
    position = 0
    for _ in range(_MOST_MEMBERS):
        file.seek(position)
        header = file.read(_TAR_BLOCK)
        try:
            # The fields of a ustar header: name at 0, size in octal digits at 124.
            size = int(header[124:136].strip(b" \0") or b"0", 8)
        except ValueError:
            break
        name = header[:100].rstrip(b"\0")
        if not name or size < 0:
            break
        names.add(name.decode("utf-8", "replace").rpartition("/")[2])
        # The contents of a member are padded to whole blocks.
        position += _TAR_BLOCK + (size + _TAR_BLOCK - 1) // _TAR_BLOCK * _TAR_BLOCK
    return names


def _match_pickle(sample: _Sample) -> ForeignKind | None:
    # Protocols 2 to 5 begin with a byte 0x80 and the number of the protocol.
    framed = sample.start[:1] == b"\x80" and sample.start[1:2] in (b"\2", b"\3", b"\4", b"\5")
    if not framed and not _OLD_PICKLE.match(sample.start):
        return None
    # PaddlePaddle pickles plainly: only the suffix or the table of names tells the two apart.
    if sample.path.suffix in (".pdparams", ".pdopt") or _PADDLE_NAMES in sample.end():
        return _PADDLE
    return _PICKLE


def _match_message(sample: _Sample) -> ForeignKind | None:
    """Identify protocol buffers and other formats without a magic number."""
    if is_onnx(sample.start):
        return _ONNX
    if is_saved_model(sample.start):
        return _SAVED_MODEL
    if _is_message_pack(sample.start):
        return _FLAX
    is_data = _TENSORFLOW_DATA.fullmatch(sample.path.name)
    if is_data or sample.end().endswith(_TENSORFLOW_INDEX):
        return _TENSORFLOW
    return None


def _is_message_pack(start: bytes) -> bool:
    """Return True if a file begins with a MessagePack map whose first key is a name."""
    # Maps: of up to 15 entries (0x8n), or with a length of 2 or 4 bytes (0xDE, 0xDF).
    head = {0xDE: 3, 0xDF: 5}.get(start[0], 0)
    if 0x81 <= start[0] <= 0x8F:
        head = 1
    if not head or len(start) < head + 2:
        return False
    # Strings: of up to 31 bytes (0xA0 + length), or with a length of one byte (0xD9).
    length, begin = start[head] - 0xA0, head + 1
    if start[head] == 0xD9:
        length, begin = start[head + 1], head + 2
    key = start[begin : begin + length]
    return 0 < length < 256 and len(key) == length and key.isascii() and key.decode().isprintable()


def _match_text(sample: _Sample) -> ForeignKind | None:
    text = _decode(sample.start)
    if text is None or not all(c.isprintable() or c in "\t\r\n\f" for c in text):
        return None
    begin = text.lstrip()[:20].lower()
    if begin.startswith(("<!doctype html", "<html", "<head", "<body", "<!--")):
        return _HTML
    if begin.startswith(("<?xml", "<error")):
        return _XML
    if sample.path.name.endswith(".index.json"):
        return _INDEX
    if begin.startswith(("{", "[")):
        return _JSON
    return _TEXT


def _decode(start: bytes) -> str | None:
    """Decode the text at the beginning of a file; return None if the bytes are not UTF-8."""
    raw = start.removeprefix(codecs.BOM_UTF8)
    try:
        return raw.decode()
    except UnicodeDecodeError as error:
        # The last character may be cut off where the read bytes end.
        if len(start) != HEAD or error.start <= len(raw) - 4:
            return None
        return raw[: error.start].decode()
