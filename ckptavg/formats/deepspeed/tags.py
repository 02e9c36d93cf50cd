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
    within = (directory / "trainer_state.json").is_file()
    return tags[0] if within or not tags[0].name.startswith("global_step") else None


def model_file(tag: Location) -> Location:
    """Return the path of the file that holds a tag's whole weights.

    Raises:
        CheckpointError: The weights are spread over several files.
    """
    names = sorted(path.name for path in tag.glob("*model_states.pt"))
    for pattern, holder in _SPLIT:
        if split := [name for name in names if pattern.fullmatch(name)]:
            raise CheckpointError(
                f"{tag} is split: {holder} the model ({first_few(split)})",
                "Save whole models from DeepSpeed (engine.save_16bit_model) and average those.",
            )
    refuse_partitioned([tag])
    return tag / WHOLE


def notes(tag: Location, tensors: Mapping[str, Tensor]) -> list[str]:
    """Make the notes for the user about the precision of a tag's weights."""
    narrow = any(t.dtype.kind == "float" and t.dtype.bits == 16 for t in tensors.values())
    return [_SIXTEEN_BIT] if narrow and any(tag.glob("*optim_states.pt")) else []


def refuse_partitioned(directories: Iterable[Location]) -> None:
    """Make sure that no checkpoint is of ZeRO stage 3.

    Raises:
        CheckpointError: At least one is. The error holds the commands that convert the tags.
    """
    tags = [tag for path in directories if (tag := tag_of(path)) is not None]
    parted = [t for t in tags if any(_PARTITION.fullmatch(p.name) for p in t.iterdir())]
    # The paths "." and ".." hide the name of the directory, which the commands need.
    parted = [t if t.name not in ("", "..") else t.resolve() for t in parted]
    if not parted:
        return
    files = (
        "the model's files hold placeholders, and the weights are spread over the optimizer's "
        "files, a part a rank"
    )
    raise CheckpointError(
        f"{first_few([str(tag) for tag in parted])}: saved with DeepSpeed ZeRO stage 3, where "
        f"{files}",
        f"Convert, then average {_outputs(parted)}: {_commands(parted)}",
    )


def _target(tag: Location) -> Location:
    """Choose the directory of a converted checkpoint: beside the run, with the step in the name."""
    alone = not tag.name.startswith("global_step")
    within = alone or (tag.parent / "trainer_state.json").is_file()
    checkpoint = tag.parent if within else tag
    run = checkpoint.parent
    named = run.name not in ("", "..")
    return (run.parent / f"{run.name}-fp32" if named else run / "fp32") / checkpoint.name


def _outputs(tags: Sequence[Location]) -> str:
    return " and ".join(dict.fromkeys(shlex.quote(str(_target(tag).parent)) for tag in tags))


def _commands(tags: Sequence[Location]) -> str:
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
    shapes = groups if isinstance(groups, list) else []
    names = {name for group in shapes if isinstance(group, dict) for name in group}
    empty = [name for name, tensor in tensors.items() if name in names and not tensor.numel]
    if empty:
        # Tried first: the error for a whole tag holds the commands to convert the weights.
        refuse_partitioned([path.parent])
        raise CheckpointError(
            f"{path} holds placeholders and no weights, as DeepSpeed ZeRO stage 3 writes them: "
            f"{first_few(empty)}",
            f"Convert the whole checkpoint with the {_CONVERTER} that lies above it.",
        )
