"""Companions of a model's weights: files of the model's directory that an average takes along.

A directory holds more than weights: configuration, tokenizer, pooling, code, a licence. These files
belong to the average of several directories too. Left out are files that are not true of an
average: the state of training, and tensors that were not averaged.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from enum import Enum
from itertools import islice

from ckptavg.errors import first_few, short
from ckptavg.errors.system import guard_reads
from ckptavg.formats import registry
from ckptavg.io.paths import Location, is_url
from ckptavg.io.stamp import FileStamp

# Files below one directory beside the weights. More are a data set, and no configuration.
_MOST_FILES = 5000
# Levels of directories: far above any model's, and below the interpreter's recursion limit.
_DEEPEST = 16
# Names in a note.
_MOST_NAMES = 20


class Reason(Enum):
    """Reason for not copying a file or directory, in the words of a note."""

    TRAINING = "the state and the records of training"
    TENSORS = "tensors that were not averaged"
    CHECKPOINT = "other checkpoints"
    HIDDEN = "hidden"
    UNREADABLE = "neither a file nor a directory that is there"
    DATA = f"more than {_MOST_FILES} files"


# Files of other tools that hold tensors, and indices.
_OTHER_TENSORS = re.compile(
    r".*(\.(h5|hdf5|keras|msgpack|npz|onnx|onnx_data|ort|gguf"
    r"|ggml|ot|tflite|pb|pte|pt2|ptl|torchscript|nemo|mlmodel|engine|trt|pdparams|pdmodel|dduf)"
    r"|\.ckpt\.(index|meta|data-\d+-of-\d+)|\.(safetensors|bin|msgpack|h5)\.index(\.\w+)?\.json)",
    re.IGNORECASE,
)
_TRAINING = re.compile(
    r"trainer_state\.json|training_args\.\w+"
    r"|([\w.-]+[-_.])?(results?|metrics|scores?)\.(json|jsonl|csv|tsv|txt|ya?ml)"
    r"|(optimizer|optim|lr_scheduler|scheduler|rng_state|rng|random_states?|scaler|grad_scaler"
    r"|sampler|dl_state_dict|custom_checkpoint)[-_.\d]*\.(pt|pth|bin|ckpt|pkl|pickle|safetensors)"
    r"|zero_pp_rank_.*|.*optim_states\.pt|events\.out\.tfevents\..*|zero_to_fp32\.py|latest"
    r"|latest_checkpointed_iteration\.txt|.*\.log|nohup\.out|log\.txt|log_history\.json",
    re.IGNORECASE,
)
_TRAINING_DIRECTORIES = re.compile(
    r"global_step\d+|(optimizer|sampler|scheduler)_\d+|wandb|mlruns|lightning_logs|logs"
)
_CHECKPOINTS = re.compile(
    r"(checkpoint|ckpt|global_?step|step|iter|iteration|epoch)[-_= ]?\d.*", re.IGNORECASE
)
# Diffusers saves these without a configuration.
_ALWAYS_ALONE = ("pytorch_lora_weights.safetensors", "pytorch_lora_weights.bin")
# Configurations that have no "config" in their names.
_CONFIGURATIONS = ("params.json", "hparams.yaml", "hyperparams.yaml")
_CACHES = ("__pycache__",)
_CODE = (".py", ".pkl", ".pickle", ".joblib")


@dataclass
class Companions:
    """Files beside the weights of a model.

    Attributes:
        copies: Path below the directory, with slashes → the file, which is copied unchanged.
        left_out: Paths that are not copied, with reasons. Paths of directories end in a slash.
    """

    copies: dict[str, FileStamp] = field(default_factory=dict)
    left_out: list[tuple[str, Reason]] = field(default_factory=list)

    @property
    def notes(self) -> list[str]:
        """Notes for the user about files that are not copied, and about copied code."""
        notes: list[str] = []
        for reason in Reason:
            names = [short(name) for name, against in self.left_out if against is reason]
            if names:
                notes.append(f"not copied ({reason.value}): {first_few(names, _MOST_NAMES)}")
        if code := [name for name in self.copies if name.endswith(_CODE)]:
            notes.append(f"code of the input's is copied along: {first_few(code)}")
        return notes


def gather(
    directory: Location,
    weights: Collection[str],
    folders: Collection[str] = (),
    *,
    deep: bool = True,
) -> Companions:
    """List the files that go along with the weights of a directory.

    Links are followed, since the user made them.

    Args:
        directory: The model's directory.
        weights: Paths of files that the output writes anew. They are neither copied nor noted.
        folders: Relative paths of the directories below that hold some of the weights. Any other
            directory with tensors is another model, or the same model in another format. Such a
            directory is left out as a whole.
        deep: True to take along the files in directories below, too.

    Returns:
        The files to copy, and the paths that are left out.
    """
    walk = _Walk(weights, folders)
    companions = Companions()
    with guard_reads(directory):
        for path in _children(directory):
            if path.is_dir() and not deep:
                continue
            # Counted per directory, so that one full of data does not hide its neighbours.
            walk.remaining = _MOST_FILES
            walk.look_at(path, path.name, (directory,), companions)
    return companions


def is_alone(file: Location) -> bool:
    """Return True if a file has the only weights in a directory with a configuration."""
    with guard_reads(file.parent):
        names = [path.name for path in file.parent.iterdir() if path.is_file()]
    weights = [name for name in names if _is_weights(name)]
    configured = file.name in _ALWAYS_ALONE or any(map(_is_configuration, names))
    return weights == [file.name] and configured


def _is_weights(name: str) -> bool:
    """Return True if a file holds weights, judged by the file's name."""
    return _holds_tensors(name) and not _TRAINING.fullmatch(name)


def _holds_tensors(name: str) -> bool:
    """Return True if a file holds tensors in any format, judged by the file's name."""
    return registry.holds_tensors(name) or bool(_OTHER_TENSORS.fullmatch(name))


def _is_configuration(name: str) -> bool:
    if name in _CONFIGURATIONS:
        return True
    return "config" in name.lower() and name.endswith((".json", ".yaml", ".yml"))


class _TooManyError(Exception):
    """Signal that a directory holds more files than any model."""


@dataclass
class _Walk:
    """Walk through the directories below a model's directory.

    Attributes:
        weights: As for ``gather``.
        folders: As for ``gather``.
        remaining: Number of files that the walk may still visit.
    """

    weights: Collection[str]
    folders: Collection[str]
    remaining: int = _MOST_FILES

    def look_at(
        self, path: Location, name: str, above: tuple[Location, ...], companions: Companions
    ) -> None:
        """Add a file or a directory to the companions.

        Args:
            path: The file or directory.
            name: Path below the model's directory.
            above: Directories above the path, outermost first.
            companions: Companions that get the path, as a copy or with the reason against it.
        """
        if str(path) in self.weights:
            return
        if path.is_dir():
            self._look_into(path, name, above, companions)
        elif reason := _reason_against(path):
            companions.left_out.append((name, reason))
        else:
            companions.copies[name] = FileStamp.of(path)

    def _look_into(
        self, path: Location, name: str, above: tuple[Location, ...], companions: Companions
    ) -> None:
        """Add a directory: the files one by one, or the reason against the whole directory."""
        # Collected apart, since a single file may show that the whole directory is left out.
        within = Companions()
        reason = _reason_against_directory(path, above)
        if reason is None or self._is_way(name):
            try:
                for child in self._list_bounded(path):
                    self.look_at(child, f"{name}/{child.name}", (*above, path), within)
            except _TooManyError:
                # Passed on to the uppermost directory, which is left out as a whole.
                if len(above) > 1:
                    raise
                within, reason = Companions(), Reason.DATA
        if reason is None and not self._is_way(name):
            reason = _reason_against_whole(within)
        if reason is None or self._is_way(name):
            companions.copies |= within.copies
            companions.left_out += within.left_out
        else:
            companions.left_out.append((f"{name}/", reason))

    def _is_way(self, name: str) -> bool:
        """Return True if averaged weights are stored in a directory or below."""
        return any(f"{folder}/".startswith(f"{name}/") for folder in self.folders)

    def _list_bounded(self, directory: Location) -> list[Location]:
        """List a directory.

        Raises:
            _TooManyError: The directory holds more files than the walk may still visit.
        """
        children: list[Location] = []
        children += islice(directory.iterdir(), self.remaining + 1)
        self.remaining -= len(children)
        if self.remaining < 0:
            raise _TooManyError
        return sorted(children, key=_name_of)


def _children(directory: Location) -> list[Location]:
    """List a directory in order, without the nameless links elsewhere that web servers list."""
    return sorted(filter(_name_of, directory.iterdir()), key=_name_of)


def _name_of(path: Location) -> str:
    return path.name


def _reason_against(path: Location) -> Reason | None:
    """Return the reason for not copying a file; None if the file is copied."""
    if path.name.startswith("."):
        return Reason.HIDDEN
    # A dangling link, a pipe, a socket.
    if not path.is_file():
        return Reason.UNREADABLE
    if _TRAINING.fullmatch(path.name):
        return Reason.TRAINING
    if _holds_tensors(path.name):
        return Reason.TENSORS
    return None


def _reason_against_directory(path: Location, above: Sequence[Location]) -> Reason | None:
    """Return the reason for not entering a directory; None if the directory is entered."""
    if path.name.startswith(".") or path.name in _CACHES:
        return Reason.HIDDEN
    if len(above) > _DEEPEST or (not is_url(str(path)) and _is_loop(path, above)):
        return Reason.UNREADABLE
    if _TRAINING_DIRECTORIES.fullmatch(path.name):
        return Reason.TRAINING
    if _CHECKPOINTS.fullmatch(path.name):
        return Reason.CHECKPOINT
    return None


def _is_loop(path: Location, above: Sequence[Location]) -> bool:
    """Return True if a link leads back to a directory above the link."""
    return path.is_symlink() and path.resolve() in [directory.resolve() for directory in above]


def _reason_against_whole(within: Companions) -> Reason | None:
    """Return the reason for copying nothing of a directory, judged by the contents."""
    reasons = [reason for _, reason in within.left_out]
    if Reason.TENSORS in reasons:
        return Reason.TENSORS
    if reasons and not within.copies:
        return reasons[0]
    return None
