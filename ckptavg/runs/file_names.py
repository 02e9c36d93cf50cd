"""What the name of a file says: whether it holds weights, when it was saved, how it sorts."""

from __future__ import annotations

import fnmatch
import re
from pathlib import Path

from ckptavg.formats.storage import Location, ancestors

SUFFIXES = (".safetensors", ".pt", ".pth", ".ckpt", ".bin", ".pt.tar", ".pth.tar", ".ckpt.tar")
NOT_WEIGHTS = "not a model's weights"
OTHER_STATE = re.compile(
    r"(optimizer|optim|distrib_optim|lr_scheduler|scheduler|rng_state|rng|random_states?|"
    r"training_args|scaler|sampler|trainer_state|extra_state|zero_pp_rank_.*|.*optim_states)"
    # Of a rank or a step: _0, _fsdp_rank0, _world_size_8_rank_0. No digits are split in two.
    r"(?:[-_.]\d+|(?<!\d)\d+|[-_.](?:fsdp[-_])?(?:world_size_\d+_)?rank[-_]?\d+)*"
)
_TEMPORARY = re.compile(r"(.*[-_.])?te?mp")  # what a crash while saving leaves
EMA_COPY = "an EMA copy, by its name"
_EMA_WORD = re.compile(r"(?<![a-z])ema(?![a-z])")
STRANGERS = (
    (re.compile(r"(?<![a-z])(ave|avg|averaged?)(?![a-z])"), "an average already, by its name"),
    (_EMA_WORD, EMA_COPY),
    (re.compile(r"(?<![a-z])init(ial)?(?![a-z])"), "from before training, by its name"),
)
_ALIAS_WORD = re.compile(r"(?<![a-z])(last|latest|best|final|newest|current)(?![a-z])")


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


def is_ema_name(name: str) -> bool:
    """Whether a name says that something is an exponential moving average."""
    return bool(_EMA_WORD.search(name.lower()))


def original_names(name: str) -> list[str]:
    """The names that the original of an EMA copy of this name may have; none if it is no copy."""
    match = _EMA_WORD.search(name.lower())
    if match is None:
        return []
    before, after = name[: match.start()], name[match.end() :]
    return [before.rstrip("-_.") + after, before + after.lstrip("-_.")]


def matches(path: Location, pattern: str) -> bool:
    """Whether a path's name matches a shell pattern, or as many last parts as the pattern has."""
    whole = path.absolute() if isinstance(path, Path) else path
    line = [whole, *ancestors(whole, pattern.count("/"))]
    return fnmatch.fnmatchcase("/".join(part.name for part in reversed(line)), pattern)


def text_and_numbers(name: str) -> list[str]:
    """Text and numbers by turns: text at even places, numbers at odd ones."""
    return re.split(r"(\d+)", name.lower())


def natural(path: Location) -> tuple[object, ...]:
    """Sort key under which 2 comes before 10, and a name without a number after all that have."""
    parts = text_and_numbers(stem_of(path))
    key = [_magnitude(part) if i % 2 else part for i, part in enumerate(parts)]
    return (is_alias_name(path), *key)


def _magnitude(digits: str) -> tuple[int, str]:
    """Sort key of a whole number, of any length: Python converts no more than 4300 digits."""
    significant = digits.lstrip("0")
    return len(significant), significant


def is_alias_name(path: Location) -> bool:
    """Whether a name says nothing of when: no number, or a word like last or best."""
    stem = stem_of(path).lower()
    return not re.search(r"\d", stem) or bool(_ALIAS_WORD.search(stem))
