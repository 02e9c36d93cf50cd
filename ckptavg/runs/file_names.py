"""What the name of a file says: whether it holds weights, when it was saved, how it sorts."""

from __future__ import annotations

import re
from collections.abc import Sequence

from ckptavg.formats.storage import Location

SUFFIXES = (".safetensors", ".pt", ".pth", ".ckpt", ".bin", ".pt.tar", ".pth.tar", ".ckpt.tar")
NOT_WEIGHTS = "not a model's weights"
OTHER_STATE = re.compile(
    r"(optimizer|optim|lr_scheduler|scheduler|rng_state|rng|random_states?|training_args|scaler|"
    r"sampler|trainer_state|zero_pp_rank_.*|.*optim_states)([-_.]?\d+)*"
)
_TEMPORARY = re.compile(r"(.*[-_.])?te?mp")  # what a crash while saving leaves
STRANGERS = (
    (re.compile(r"(?<![a-z])(ave|avg|averaged?)(?![a-z])"), "an average already, by its name"),
    (re.compile(r"(?<![a-z])ema(?![a-z])"), "an EMA copy, by its name"),
    (re.compile(r"(?<![a-z])init(ial)?(?![a-z])"), "from before training, by its name"),
)
_ALIAS_WORD = re.compile(r"(?<![a-z])(last|latest|best|final|newest|current)(?![a-z])")
STEP_NUMBER = re.compile(
    r"(?<![a-z])(checkpoint|ckpt|(?:global_?)?steps?|iters?|iterations?|epochs?|ep)[-_= ]?\d+",
    re.IGNORECASE,
)


def why_not(stem: str) -> str:
    """Why a file that is called so is not opened; empty if it is."""
    if OTHER_STATE.fullmatch(stem):
        return NOT_WEIGHTS
    return "a temporary file, by its name" if _TEMPORARY.fullmatch(stem) else ""


def stem_of(path: Location) -> str:
    """The name without a checkpoint's suffix."""
    if path.is_dir():
        return path.name
    suffix = max((s for s in SUFFIXES if path.name.endswith(s)), key=len, default="")
    return path.name[: len(path.name) - len(suffix)]


def text_and_numbers(name: str) -> list[str]:
    """Text and numbers by turns: text at even places, numbers at odd ones."""
    return re.split(r"(\d+)", name.lower())


def natural(path: Location) -> tuple[object, ...]:
    """Sort key under which 2 comes before 10, and a name without a number after all that have."""
    parts = text_and_numbers(stem_of(path))
    key = [int(part) if i % 2 else part for i, part in enumerate(parts)]
    return (is_alias_name(path), *key)


def is_alias_name(path: Location) -> bool:
    """Whether a name says nothing of when: no number, or a word like last or best."""
    stem = stem_of(path).lower()
    return not re.search(r"\d", stem) or bool(_ALIAS_WORD.search(stem))


def labels_of(paths: Sequence[Location]) -> dict[Location, Location]:
    """For each path the one whose name says when: the directory's where the files' are the same."""
    alike = len(paths) > 1 and len({path.name for path in paths}) == 1
    return {path: path.parent if alike else path for path in paths}
