"""Token windows for scoring causal language models, from a text file or a file of token ids."""

from __future__ import annotations

import json
import logging
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import torch
from torch.utils.data import Dataset

from ckptavg.data.hub import offline
from ckptavg.errors import SpecError
from ckptavg.errors.spelling import close_names, did_you_mean
from ckptavg.optional import import_optional

log = logging.getLogger("ckptavg")

IGNORED = -100
"""The label of a position that is not predicted, as in transformers and torch."""

# Tokens per window. Used where the model's context is unknown or longer.
_LENGTH = 1024
_CONTEXT = ("max_position_embeddings", "n_positions", "n_ctx")
_DTYPES = ("uint8", "int16", "uint16", "int32", "uint32", "int64", "uint64")


class Tokens(Protocol):
    """A sequence of token ids."""

    def __len__(self) -> int: ...

    def __getitem__(self, part: slice) -> torch.Tensor: ...


class Windows(Dataset[dict[str, torch.Tensor]]):
    """Windows of a sequence of tokens in which every token but the first is predicted once.

    An item has ``input_ids`` and ``labels``, both (length,) int64, at the same positions, as in
    transformers: the output at position t predicts the label at t + 1. A label is −100 if an
    earlier window predicts the token, or if the position is beyond the end. Padding of the last
    window follows the tokens, where a causal model cannot look, so there is no attention mask.

    Args:
        tokens: At least 2 tokens; a slice gives int64.
        length: Tokens per window, at least 2; reduced to the number of tokens in all.
        stride: Tokens between the starts of successive windows, at most length − 1. The default of
            length − 1 makes windows share one token. A smaller stride gives every token at least
            length − stride tokens of context (except at the beginning), and costs more passes.

    Raises:
        SpecError: There is nothing to predict, or ``length`` and ``stride`` do not fit together.
    """

    def __init__(self, tokens: Tokens, length: int = _LENGTH, stride: int | None = None) -> None:
        # By the exact type, since a bool is an int too.
        if type(length) is not int or length < 2:
            raise SpecError(f"length is expected to be a number of tokens from 2 but got {length}")
        if stride is not None and (type(stride) is not int or not 0 < stride < length):
            raise SpecError(
                f"stride is expected to be from 1 to length - 1 ({length - 1}) but got {stride}",
                "Windows share a token, so that each but the first is predicted.",
            )
        if len(tokens) < 2:
            raise SpecError(
                f"the data has {len(tokens)} tokens", "Two are needed for one to be predicted."
            )
        self.tokens = tokens
        self.length = min(length, len(tokens))
        self.stride = min(stride or length - 1, self.length - 1)

    def __len__(self) -> int:
        return 1 + -(-(len(self.tokens) - self.length) // self.stride)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        # An IndexError ends a plain loop over the Dataset.
        if not 0 <= index < len(self):
            raise IndexError(f"there are {len(self)} windows, and none is number {index}")
        start = index * self.stride
        ids = self.tokens[start : start + self.length]
        labels = ids.clone()
        # The previous window has predicted these tokens already; here they are context.
        if index:
            labels[: self.length - self.stride] = IGNORED
        beyond = (0, self.length - len(ids))
        return {
            "input_ids": torch.nn.functional.pad(ids, beyond),
            "labels": torch.nn.functional.pad(labels, beyond, value=IGNORED),
        }


class TokenFile:
    """Memory-mapped file of token ids; every process maps the file separately.

    Args:
        path: ``.npy`` with one dimension of integers; any other suffix: raw little-endian integers.
        dtype: Type of raw integers.

    Raises:
        SpecError: The file does not exist, or does not hold token ids.
    """

    def __init__(self, path: Path, dtype: str) -> None:
        self.path = path
        self.dtype = dtype
        _check_file(path)
        if self._ids.ndim != 1 or self._ids.dtype.kind not in "iu":
            raise SpecError(
                f"{path} is expected to hold one dimension of integers but holds "
                f"{self._ids.dtype} of shape {self._ids.shape}",
                "Write it by numpy.save(path, ids.astype(numpy.uint32)).",
            )

    def __len__(self) -> int:
        return len(self._ids)

    def __getitem__(self, part: slice) -> torch.Tensor:
        return torch.from_numpy(self._ids[part].astype("int64"))

    def __getstate__(self) -> dict[str, Any]:
        # Without the map: pickling it for a worker process would copy the whole file.
        return {"path": self.path, "dtype": self.dtype}

    @cached_property
    def _ids(self) -> Any:
        numpy = import_optional("numpy", "numpy")
        try:
            if self.path.suffix == ".npy":
                return numpy.lib.format.open_memmap(self.path, mode="r")
            return numpy.memmap(self.path, numpy.dtype(self.dtype).newbyteorder("<"), mode="r")
        except (OSError, ValueError) as error:
            raise SpecError(
                f"{self.path} cannot be read as token ids: {error}",
                "Expected a .npy file, or raw little-endian integers of the type dtype=.",
            ) from error


def open_tokens(
    path: str, *, length: int = _LENGTH, stride: int | None = None, dtype: str | None = None
) -> Windows:
    """Make windows from a file of token ids.

    Args:
        path: As for ``TokenFile``.
        length: Tokens per window.
        stride: Tokens between the starts of windows; see ``Windows``.
        dtype: Type of raw integers; ``uint16``, as nanoGPT writes, where None.

    Raises:
        SpecError: The file cannot be used, or an argument is invalid.
    """
    if dtype is not None and dtype not in _DTYPES:
        raise SpecError(f"dtype is expected to be one of {', '.join(_DTYPES)} but got {dtype!r}")
    if dtype is not None and path.endswith(".npy"):
        raise SpecError(f"the header of {path} gives the type", "Leave dtype out.")
    return _log_size(path, Windows(TokenFile(Path(path), dtype or "uint16"), length, stride))


def open_text(
    path: str, *, tokenizer: str | None = None, length: int = _LENGTH, stride: int | None = None
) -> Windows:
    """Make windows from a UTF-8 text file, which is tokenized as a whole.

    Args:
        path: The file.
        tokenizer: A directory that holds a tokenizer of transformers. Special tokens that the
            tokenizer adds to a text (a beginning-of-sequence token) are kept.
        length: Tokens per window.
        stride: Tokens between the starts of windows; see ``Windows``.

    Raises:
        SpecError: The file or the tokenizer cannot be used, or an argument is invalid.
    """
    _check_file(Path(path))
    if tokenizer is None:
        raise SpecError(
            f"{path} needs a tokenizer",
            "Pass the argument tokenizer=DIR of the data, or name the model by hf:DIR.",
        )
    try:
        content = Path(path).read_bytes().decode()
    except UnicodeDecodeError as error:
        raise SpecError(f"{path} is no UTF-8 text: {error}", "Convert it first.") from error
    # Else transformers warns that the text is longer than the model's context.
    ids = _load_tokenizer(Path(tokenizer))(content, verbose=False)["input_ids"]
    return _log_size(path, Windows(torch.tensor(ids, dtype=torch.int64), length, stride))


def default_length(directory: Path) -> int:
    """Return the tokens per window for the model in a directory: the context, at most 1024."""
    try:
        config = json.loads((directory / "config.json").read_text("utf-8"))
    except (OSError, ValueError):
        # Building the model reports the broken configuration.
        config = None
    length = _LENGTH
    if isinstance(config, dict):
        for key in _CONTEXT:
            if type(config.get(key)) is int and config[key] > 1:
                length = min(length, config[key])
    return length


def _log_size(path: str, windows: Windows) -> Windows:
    """Log the numbers of tokens and windows; return the windows."""
    log.info(
        "%s: %d tokens in %d windows of %d, %d apart",
        path, len(windows.tokens), len(windows), windows.length, windows.stride,
    )  # fmt: skip
    return windows


def _check_file(path: Path) -> None:
    """Make sure that there is a file with content."""
    if not path.is_file():
        state = "does not exist"
        if path.exists():
            state = "is no file"
        near = [str(path.with_name(name)) for name in close_names(path.name, _files_beside(path))]
        remedy = "Expected text:FILE or tokens:FILE."
        if near:
            remedy = did_you_mean(near)
        raise SpecError(f"{path} {state}", remedy)
    if not path.stat().st_size:
        raise SpecError(f"{path} is empty")


def _files_beside(path: Path) -> list[str]:
    """List the names of the files in a file's directory."""
    try:
        return sorted(sibling.name for sibling in path.parent.iterdir() if sibling.is_file())
    except OSError:
        return []


def _load_tokenizer(directory: Path) -> Any:
    """Load the tokenizer of a directory without downloads and without running code from it."""
    transformers = import_optional("transformers", "transformers")
    remedy = "Pass tokenizer=DIR, a directory that tokenizer.save_pretrained(DIR) has written."
    files = [*directory.glob("tokenizer*"), *directory.glob("vocab*"), *directory.glob("*.model")]
    if not files:
        # transformers would make an empty tokenizer from the model's configuration.
        raise SpecError(f"{directory} holds no tokenizer", remedy)
    try:
        with offline():
            return transformers.AutoTokenizer.from_pretrained(
                str(directory), local_files_only=True, trust_remote_code=False
            )
    except Exception as error:
        raise SpecError(
            f"{directory} holds no tokenizer that transformers can load: {error}", remedy
        ) from error
