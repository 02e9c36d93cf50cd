"""DeepSpeed checkpoints: a tag's directory (global_step500) with the state of each rank.

With ZeRO stages 1 and 2, ``mp_rank_00_model_states.pt`` holds the whole weights in the element type
of training. The float32 copies are spread over the optimizer's files. With stage 3 the model's
files hold placeholders. DeepSpeed's script ``zero_to_fp32.py``, stored beside the tags, converts
either kind.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from ckptavg.errors import CheckpointError, first_few
from ckptavg.formats.checkpoint import Tensor
from ckptavg.formats.huggingface.trainer_state import TRAINER_STATE
from ckptavg.io.paths import Location

WHOLE = "mp_rank_00_model_states.pt"
# The model file of one rank under ZeRO stage 3.
_PARTITION = re.compile(r"zero_pp_rank_\d+_mp_rank_\d+_model_states\.pt")
# Files of models that are split in another way, and the holder of each part, for a message.
_SPLIT = (
    (re.compile(r"mp_rank_(?!00_)\d+_model_states\.pt"), "tensor-parallel ranks hold slices of"),
    (re.compile(r"layer_\d+-model_\d+-model_states\.pt"), "pipeline stages hold parts of"),
    (
        re.compile(r".*expert_\d+_mp_rank_\d+_model_states\.pt"),
        "expert-parallel ranks hold parts of",
    ),
)
# The file that names the last tag.
_LATEST = "latest"
_CONVERTER = "zero_to_fp32.py"
# Most characters of commands in a message.
_ROOM = 800
_SIXTEEN_BIT = (
    f"DeepSpeed's 16-bit weights are taken; its {_CONVERTER} gives the float32 ones "
    "(average its outputs instead)"
)


def is_tag(directory: Location) -> bool:
    """Return True if a directory holds the model states of one checkpoint's ranks."""
    return any(path.is_file() for path in directory.glob("*model_states.pt"))


def tag_of(directory: Location) -> Location | None:
    """Find the tag of a checkpoint: the directory itself, or the only tag below the directory.

    The Trainer keeps ``global_step500`` inside ``checkpoint-500``. Lightning keeps ``checkpoint``
    inside ``x.ckpt``. A directory of ``global_step`` tags without a ``trainer_state.json`` is a
    run.

    Returns:
        The tag's directory; None if there is no tag, or if the directory is a run.
    """
    if is_tag(directory):
        return directory
    if not (directory / _LATEST).is_file():
        return None
    tags = [p for p in directory.iterdir() if p.is_dir() and is_tag(p)]
    if len(tags) != 1:
        return None
    # DeepSpeed alone writes such tags directly into a run; the Trainer's file marks a checkpoint.
    if tags[0].name.startswith("global_step") and not (directory / TRAINER_STATE).is_file():
        return None
    return tags[0]


def model_file(tag: Location) -> Location:
    """Return the path of the file that holds a tag's whole weights.

    Raises:
        CheckpointError: The weights are spread over several files.
    """
    names = sorted(path.name for path in tag.glob("*model_states.pt"))
    for pattern, holder in _SPLIT:
        split = [name for name in names if pattern.fullmatch(name)]
        if split:
            raise CheckpointError(
                f"{tag} is split: {holder} the model ({first_few(split)})",
                "Save whole models from DeepSpeed (engine.save_16bit_model) and average those.",
            )
    refuse_partitioned([tag])
    return tag / WHOLE


def notes(tag: Location, tensors: Mapping[str, Tensor]) -> list[str]:
    """Make the notes for the user about the precision of a tag's weights."""
    floats = {t.dtype.bits for t in tensors.values() if t.dtype.kind == "float"}
    if 16 in floats and any(tag.glob("*optim_states.pt")):
        return [_SIXTEEN_BIT]
    return []


def refuse_partitioned(directories: Iterable[Location]) -> None:
    """Make sure that no checkpoint is of ZeRO stage 3.

    Raises:
        CheckpointError: At least one is. The error holds the commands that convert the tags.
    """
    partitioned: list[Location] = []
    for path in directories:
        tag = tag_of(path)
        if tag is not None and any(_PARTITION.fullmatch(file.name) for file in tag.iterdir()):
            # The paths "." and ".." hide the name of the directory, which the commands need.
            partitioned.append(tag.resolve() if tag.name in ("", "..") else tag)
    if not partitioned:
        return
    raise CheckpointError(
        f"{first_few([*map(str, partitioned)])}: saved with DeepSpeed ZeRO stage 3, where the "
        "model's files hold placeholders, and the weights are spread over the optimizer's files, "
        "one part per rank",
        f"Convert, then average {_list_outputs(partitioned)}: {_list_commands(partitioned)}",
    )


def _target(tag: Location) -> Location:
    """Choose the directory of a converted checkpoint: beside the run, with the step in the name."""
    checkpoint = tag
    is_run = tag.name.startswith("global_step") and not (tag.parent / TRAINER_STATE).is_file()
    if not is_run:
        checkpoint = tag.parent
    run = checkpoint.parent
    if run.name in ("", ".."):
        return run / "fp32" / checkpoint.name
    return run.parent / f"{run.name}-fp32" / checkpoint.name


def _list_outputs(tags: Sequence[Location]) -> str:
    """List the directories of converted checkpoints, quoted for a shell."""
    return " and ".join(dict.fromkeys(shlex.quote(str(_target(tag).parent)) for tag in tags))


def _list_commands(tags: Sequence[Location]) -> str:
    """Write one shell command per tag, up to the length that fits a message."""
    shown: list[str] = []
    for tag in tags:
        home = tag.parent
        words = ("python", home / _CONVERTER, home, _target(tag), "-t", tag.name)
        command = shlex.join(map(str, words))
        if shown and sum(map(len, shown)) + len(command) > _ROOM:
            return f"{' && '.join(shown)} (and likewise for {len(tags) - len(shown)} more)"
        shown.append(command)
    return " && ".join(shown)


def refuse_placeholders(path: Location, tree: Any, tensors: Mapping[str, Tensor]) -> None:
    """Make sure that a single file is no model file of ZeRO stage 3.

    Args:
        path: The file.
        tree: The object that was saved in the file.
        tensors: The file's tensors by name.

    Raises:
        CheckpointError: A parameter is empty although ``param_shapes`` lists a shape for the name.
    """
    groups = tree.get("param_shapes") if isinstance(tree, dict) else None
    names: set[Any] = set()
    for group in groups if isinstance(groups, list) else ():
        if isinstance(group, dict):
            names.update(group)
    empty = [name for name, tensor in tensors.items() if name in names and not tensor.numel]
    if empty:
        # Tried first: the error for a whole tag holds the commands to convert the weights.
        refuse_partitioned([path.parent])
        raise CheckpointError(
            f"{path} holds placeholders and no weights, as DeepSpeed ZeRO stage 3 writes them: "
            f"{first_few(empty)}",
            f"Convert the whole checkpoint with the {_CONVERTER} in a directory above.",
        )
