"""Directories that are named after steps, and places of checkpoints below.

Trainers save ``checkpoint-500/unet/`` or ``global_step_500/actor/huggingface/``: the step is in the
name of a directory above the checkpoint. The ``unet`` below all steps is one run.
"""

from __future__ import annotations

import glob
import re
from collections import Counter, defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain

from ckptavg.formats import is_checkpoint_directory
from ckptavg.io.paths import Location, ancestors
from ckptavg.runs.discovery.file_names import (
    has_suffix,
    last_names,
    list_visible,
    stem_of,
    why_no_weights,
)
from ckptavg.runs.discovery.steps_in_names import DATE

# Levels between a checkpoint and the directory that is named after the step.
DEEPEST = 5
# Directories per level below a step, since a data set may be stored there too.
_MOST_LOOKED_INTO = 200
_WORDS = r"(?:global_?)?steps?|iter(?:ation)?s?|epochs?|checkpoints?|ckpts?|chkpts?"
_STEP_IN_NAME = re.compile(
    rf"(?<![a-z])(?:{_WORDS}|ep|ba|snapshots?|updates?|rounds?|tokens?)[-_= ]?\d+[kmbt]?|"
    r"(?<![a-z\d.])\d+[kmbt]?[-_ ]?(?:steps?|iter(?:ation)?s?|epochs?)(?![a-z])|"
    r"(?<=:v)\d+$",
    re.IGNORECASE,
)
# Metrics in names (``epoch=3-loss=0.12``) differ from step to step as the step does.
_SCORE = re.compile(r"(?<!\d)-?\d+\.\d+")
_COUNT = re.compile(r"\d+(?:[kmbt](?![a-z]))?", re.IGNORECASE)
_BARE_NUMBER = re.compile(r"\d+(?:[-_.: T]\d+)*")


@dataclass(frozen=True)
class Place:
    """Place at which each step of a training has a checkpoint.

    Attributes:
        base: Directory of the training.
        series: Shell pattern of the directories that are named after the training's steps.
        below: Shell patterns of the names from a step's directory down to the checkpoint.
    """

    base: Location
    series: str
    below: tuple[str, ...]

    @property
    def pattern(self) -> str:
        """Shell pattern of the paths at this place, below any step's directory."""
        return "/".join(("*", *self.below))

    @property
    def full_pattern(self) -> str:
        """Shell pattern of the paths at this place, below this series of directories alone."""
        return "/".join((self.series, *self.below))

    @property
    def name(self) -> str:
        """Path below each step."""
        return "/".join(self.below)


def mask_step(name: str) -> str | None:
    """Replace the step in a name by a star; None where the name tells no step."""
    if _BARE_NUMBER.fullmatch(name):
        return "*"
    if not DATE.search(name) and not _STEP_IN_NAME.search(name):
        return None
    # A NUL, which no name has, marks the place of each star while the rest is escaped.
    masked = DATE.sub("\0", name)
    masked = _STEP_IN_NAME.sub(lambda step: _COUNT.sub("\0", step[0]), masked)
    return glob.escape(_SCORE.sub("\0", masked)).replace("\0", "*")


def names_step(name: str) -> bool:
    """Return True if a name tells a step."""
    return mask_step(name) is not None


def step_directory(path: Location) -> Location | None:
    """Find the nearest directory above a checkpoint that is named after a step."""
    for parent in ancestors(path, DEEPEST):
        if names_step(parent.name):
            return parent
    return None


def find_place(path: Location, *, masked: bool = False) -> Place | None:
    """Return the place of a checkpoint below the directory of the step; None without a step.

    Args:
        path: The checkpoint.
        masked: True to replace the same step in names further down, too:
            ``checkpoint-5/global_step5``.
    """
    home = step_directory(path)
    if home is None:
        return None
    numbers = _numbers(home.name)
    names: list[str] = []
    while path != home:
        same_step = masked and _numbers(path.name) <= numbers
        names.append((same_step and mask_step(path.name)) or glob.escape(path.name))
        path = path.parent
    return Place(home.parent, mask_step(home.name) or "", tuple(reversed(names)))


def find_labels(paths: Sequence[Location]) -> dict[Location, Location]:
    """Find the label of each path: the path, or a directory above, whose name tells the step.

    The labels are on the lowest level on which the names are not all the same.
    """
    roots = find_roots(paths)
    members = [path for path in paths if path not in roots]
    labels = dict(zip(paths, paths, strict=True))
    # With one member there are no other names to compare, so the name itself decides.
    if len(members) == 1:
        labels[members[0]] = _label_of(members[0])
        return labels
    lines = [[path, *ancestors(path, DEEPEST + 1)] for path in members]
    # The first level is the paths, the next the directories above them, and so on.
    for level in zip(*lines, strict=False):
        names = {location.name for location in level}
        if len(names) > 1:
            labels.update(zip(members, level, strict=True))
            return labels
    return labels


def short_names(paths: Sequence[Location]) -> list[str]:
    """Name the paths, with as many directories as are needed to make the names unique."""
    names: list[str] = []
    for level in range(DEEPEST + 2):
        names = [last_names(path, level) for path in paths]
        if len(set(names)) == len(set(paths)):
            break
    return names


def find_roots(paths: Sequence[Location]) -> set[Location]:
    """Find the paths that are directories above other paths."""
    above: set[Location] = set()
    for path in paths:
        above.update(ancestors(path, DEEPEST + 1))
    return above.intersection(paths)


def find_weights_below(directory: Location) -> list[Location]:
    """Find the checkpoints below a directory, on any level: directories, or else files.

    A file beside a model's directory holds another state: of a data loader, or of a rank.
    """
    directories: list[Location] = []
    level = [directory]
    files: list[Location] = []
    for _ in range(DEEPEST):
        deeper: list[Location] = []
        level_files: list[Location] = []
        for path in chain.from_iterable(map(list_visible, level)):
            if why_no_weights(stem_of(path)):
                continue
            if is_checkpoint_directory(path):
                directories.append(path)
            elif path.is_dir():
                deeper.append(path)
            elif has_suffix(path):
                level_files.append(path)
        # Only the files of the uppermost level with files count.
        files = files or level_files
        level = deeper[:_MOST_LOOKED_INTO]
    return directories or files


def is_series(members: Sequence[Location]) -> bool:
    """Return True if neighbours are several steps by name, and not several networks."""
    if any(names_step(stem_of(path)) for path in members):
        return True
    files = Counter(re.sub(r"\d+", "*", path.name) for path in members if path.is_file())
    return any(count > 1 for count in files.values())


def group_by_place(
    homes: Mapping[Location, Sequence[Location]], apart: Collection[Location]
) -> dict[Location | Place, list[Location]]:
    """Group checkpoints by training, which is the place below the directories of steps.

    Neighbours stay together if they are a series themselves, or if no other step has a checkpoint
    at the place of a neighbour.

    Args:
        homes: Directory → checkpoints that were found in the directory.
        apart: Directories whose members are several networks in any case.

    Returns:
        Place, or directory of a run without places → checkpoints.
    """
    place_by_path = _find_places(list(chain.from_iterable(homes.values())))
    counts = Counter(place_by_path.values())
    groups: dict[Location | Place, list[Location]] = defaultdict(list)
    shared = {path for path, place in place_by_path.items() if counts[place] > 1}
    for home, members in homes.items():
        is_split = home in apart
        # The names are looked at only where another step has a checkpoint at the same place.
        if not is_split and not shared.isdisjoint(members):
            is_split = len(members) == 1 or not is_series(members)
        for path in members:
            if is_split and path in place_by_path:
                groups[place_by_path[path]].append(path)
            else:
                groups[home].append(path)
    return groups


def _find_places(paths: Sequence[Location]) -> dict[Location, Place]:
    """Find the places of the paths below directories of steps.

    The only path at a place may repeat the step further down. The repeated step is then masked.
    """
    # Only the directories are resolved: a link counts under the name of the link.
    resolved: dict[Location, Location] = {}
    place_by_path: dict[Location, Place] = {}
    for path in paths:
        resolved[path] = path.parent.resolve() / path.name
        unmasked = find_place(resolved[path])
        if unmasked is not None:
            place_by_path[path] = unmasked
    counts = Counter(place_by_path.values())
    for path, unmasked in place_by_path.items():
        if counts[unmasked] == 1:
            place_by_path[path] = find_place(resolved[path], masked=True) or unmasked
    return place_by_path


def _label_of(path: Location) -> Location:
    """Return the label of a single checkpoint: the path, or the directory of the step."""
    numbered_file = not path.is_dir() and re.search(r"\d", stem_of(path))
    if numbered_file or names_step(stem_of(path)):
        return path
    return step_directory(path) or path


def _numbers(name: str) -> set[str]:
    """Find the numbers in a name, without leading zeros."""
    return {digits.lstrip("0") for digits in re.findall(r"\d+", name)}
