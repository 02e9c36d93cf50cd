"""Search for runs near a path without a run, for use or for error messages."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from ckptavg.errors import RunError, first_few
from ckptavg.formats import is_checkpoint_directory
from ckptavg.formats.file_formats import checkpoint_suffixes
from ckptavg.io.paths import Location
from ckptavg.runs.discovery.file_names import (
    OTHER_STATE,
    has_suffix,
    list_visible,
    natural_key,
    stem_of,
)
from ckptavg.runs.discovery.numbered import find_weights_below, names_step, step_directory
from ckptavg.runs.discovery.ranks import find_replicas

# Limits of the search for runs: levels, and directories per level.
_DEEPEST_RUN, _MOST_LOOKED_INTO = 4, 200


def find_only_run(
    directory: Location, admits: Callable[[Location], bool], loose: Sequence[Location] = ()
) -> Location:
    """Find the only run below a directory that is no run itself.

    Args:
        directory: The directory that the user named.
        admits: Test for directories that the user does not skip.
        loose: Checkpoints directly in the directory, too few to be the run that was meant.

    Returns:
        The directory of the run.

    Raises:
        RunError: There are several runs or no run, or it is not certain which is meant.
        CheckpointError: The directory holds the parts of different ranks.
    """
    # First, since the error about parts of ranks says more than the errors below.
    find_replicas(find_weights_below(directory))
    runs = find_runs_below(directory, admits)
    if len(runs) > 1:
        raise RunError(
            f"{directory} holds {len(runs)} runs: {first_few([*map(str, runs)], 8)}",
            "Name one, or name each of them to average across runs.",
        )
    if runs and loose:
        names = first_few([path.name for path in loose])
        raise RunError(
            f"{directory} holds {names}, and a run in {runs[0].name}", "Name either of them."
        )
    if runs:
        return runs[0]
    raise RunError(
        f"{directory} holds no checkpoint",
        f"Expected directories of a known format, or files with the suffixes {_list_suffixes()}; "
        "name files with other suffixes one by one.",
    )


def _list_suffixes() -> str:
    """List the suffixes of checkpoints for a message, without pairs such as .pt.tar."""
    return ", ".join(suffix for suffix in checkpoint_suffixes() if suffix.count(".") == 1)


def leads_to_checkpoints(directory: Location) -> bool:
    """Return True if a directory holds checkpoints, directly or in runs below."""
    return holds_checkpoints(directory) or bool(find_runs_below(directory, lambda _: True))


def find_runs_below(directory: Location, admits: Callable[[Location], bool]) -> list[Location]:
    """Find the uppermost directories with checkpoints below a directory."""
    runs: dict[Location, None] = {}
    level = [directory]
    for _ in range(_DEEPEST_RUN):
        below: list[Location] = []
        for parent in level:
            below += [path for path in _folders(parent) if admits(path)]
        level = []
        for path in below[:_MOST_LOOKED_INTO]:
            if _is_of_a_run(path):
                runs.setdefault(_training_of(path, directory))
            else:
                level.append(path)
    return list(runs)


def _is_of_a_run(directory: Location) -> bool:
    """Return True if a directory holds checkpoints, or is a step with checkpoints below."""
    if holds_checkpoints(directory):
        return True
    return names_step(directory.name) and bool(find_weights_below(directory))


def _training_of(holder: Location, directory: Location) -> Location:
    """Return the directory that a user names to get the checkpoints in a holder.

    This is the directory above the steps, if it is below the directory of the search.
    """
    step = step_directory(holder)
    if names_step(holder.name):
        step = holder
    if step is None or directory not in step.parents or step.parent == directory:
        return holder
    return step.parent


def _folders(directory: Location) -> list[Location]:
    """List the visible subdirectories of a directory, in natural order."""
    folders = [path for path in list_visible(directory) if path.is_dir()]
    return sorted(folders, key=natural_key)


def holds_checkpoints(directory: Location) -> bool:
    """Return True if a checkpoint is stored directly in a directory."""
    for path in directory.iterdir():
        if path.name.startswith("."):
            continue
        if is_checkpoint_directory(path):
            return True
        is_file = path.is_file() and has_suffix(path)
        if is_file and not OTHER_STATE.fullmatch(stem_of(path)):
            return True
    return False
