"""Rules for names of files: kinds of contents, kinds of checkpoints, and a sort order."""

from __future__ import annotations

import fnmatch
import re
from dataclasses import dataclass
from pathlib import Path

from ckptavg.formats.file_formats import checkpoint_suffixes
from ckptavg.io.paths import Location, ancestors
from ckptavg.runs.discovery.reason import Reason

OTHER_STATE = re.compile(
    r"(optimizer|optim|distrib_optim|lr_scheduler|scheduler|rng_state|rng|random_states?|"
    r"training_args|scaler|sampler|trainer_state|extra_state|zero_pp_rank_.*|.*optim_states)"
    # Of a rank or a step: _0, _fsdp_rank0, _world_size_8_rank_0. No digits are split in two.
    r"(?:[-_.]\d+|(?<!\d)\d+|[-_.](?:fsdp[-_])?(?:world_size_\d+_)?rank[-_]?\d+)*"
)
# Files that a crash while saving leaves.
_TEMPORARY = re.compile(r"(.*[-_.])?te?mp")
_EMA_WORD = re.compile(r"(?<![a-z])ema(?![a-z])")
# Names of checkpoints that are no step of a training, with the reason to leave them out.
_EXCLUDED_NAMES = (
    (re.compile(r"(?<![a-z])(ave|avg|averaged?)(?![a-z])"), Reason.NAMED_AVERAGE),
    (_EMA_WORD, Reason.NAMED_EMA),
    (re.compile(r"(?<![a-z])init(ial)?(?![a-z])"), Reason.NAMED_INITIAL),
)
_ALIAS_WORD = re.compile(r"(?<![a-z])(last|latest|best|final|newest|current)(?![a-z])")
_BEST_WORD = re.compile(r"(?<![a-z])best(?![a-z])")


@dataclass(frozen=True)
class Patterns:
    """Shell patterns by which a user selects the checkpoints of a run.

    A pattern with slashes, such as ``unet/*``, is matched with as many of a path's last names.

    Attributes:
        glob: Pattern that a checkpoint must match; None admits all.
        skip: Patterns that neither a checkpoint nor a directory on the way to it may match.
    """

    glob: str | None = None
    skip: tuple[str, ...] = ()

    def skipping(self, path: Location, root: Location) -> set[str]:
        """Return the patterns that skip a checkpoint, or a directory below the root."""
        if not self.skip:
            return set()
        line = [path]
        # Names above the root do not count. The name of the root counts only for the root itself.
        while root not in (line[-1], line[-1].parent) and line[-1].parent != line[-1]:
            line.append(line[-1].parent)
        skipping: set[str] = set()
        for pattern in self.skip:
            if any(matches(ancestor, pattern) for ancestor in line):
                skipping.add(pattern)
        return skipping


def why_no_weights(stem: str) -> Reason | None:
    """Return the reason for not opening a file with a stem; None if the file is opened."""
    if OTHER_STATE.fullmatch(stem):
        return Reason.NOT_WEIGHTS
    if _TEMPORARY.fullmatch(stem):
        return Reason.TEMPORARY
    return None


def why_no_step(stem: str) -> Reason | None:
    """Return the reason why a file is no step of a training, by its name; None for others."""
    lower = stem.lower()
    for word, reason in _EXCLUDED_NAMES:
        if word.search(lower):
            return reason
    return None


def stem_of(path: Location) -> str:
    """Return a path's name without a checkpoint's suffix."""
    # A directory has no suffix: checkpoint-1.5 is the whole name.
    if path.is_dir():
        return path.name
    longest = ""
    for suffix in checkpoint_suffixes():
        if path.name.endswith(suffix) and len(suffix) > len(longest):
            longest = suffix
    return path.name.removesuffix(longest)


def has_suffix(path: Location) -> bool:
    """Return True if a name ends in a checkpoint's suffix."""
    return path.name.endswith(checkpoint_suffixes())


def is_ema_name(name: str) -> bool:
    """Return True if a name is the name of an exponential moving average."""
    return bool(_EMA_WORD.search(name.lower()))


def possible_originals(name: str) -> list[str]:
    """List possible names of the original of an EMA copy; empty for other names."""
    match = _EMA_WORD.search(name.lower())
    if match is None:
        return []
    before, after = name[: match.start()], name[match.end() :]
    return [before.rstrip("-_.") + after, before + after.lstrip("-_.")]


def matches(path: Location, pattern: str) -> bool:
    """Return True if a path matches a shell pattern, in as many last names as the pattern has."""
    absolute = path.absolute() if isinstance(path, Path) else path
    return fnmatch.fnmatchcase(last_names(absolute, pattern.count("/")), pattern)


def last_names(path: Location, levels: int) -> str:
    """Join the names of the directories up to some levels above a path, and its own name."""
    line = [path, *ancestors(path, levels)]
    return "/".join(location.name for location in reversed(line))


def list_visible(directory: Location) -> list[Location]:
    """List the files and directories in a directory that are not hidden, in order of names."""
    visible: list[Location] = []
    for path in directory.iterdir():
        if not path.name.startswith("."):
            visible.append(path)
    return sorted(visible, key=lambda path: path.name)


def split_numbers(name: str) -> list[str]:
    """Split a name into text (at even indices) and numbers (at odd indices)."""
    return re.split(r"(\d+)", name.lower())


def natural_key(path: Location) -> tuple[object, ...]:
    """Return a natural sort key: 2 comes before 10, and names without a step come last."""
    key: list[object] = [is_alias_name(path)]
    for index, segment in enumerate(split_numbers(stem_of(path))):
        is_number = index % 2 == 1
        key.append(_magnitude(segment) if is_number else segment)
    return tuple(key)


def _magnitude(digits: str) -> tuple[int, str]:
    """Return a sort key of a whole number of any length."""
    # Compared by length and text, since Python converts at most 4300 digits to an int.
    significant = digits.lstrip("0")
    return len(significant), significant


def is_alias_name(path: Location) -> bool:
    """Return True if a name tells no step: no number, or a word like last or best."""
    stem = stem_of(path).lower()
    return not re.search(r"\d", stem) or bool(_ALIAS_WORD.search(stem))


def is_best_name(path: Location) -> bool:
    """Return True if a name marks the best checkpoint of a run."""
    return bool(_BEST_WORD.search(stem_of(path).lower()))
