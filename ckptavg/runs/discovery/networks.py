"""Rules for several networks per step of a training, and for EMA copies."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Literal

from ckptavg.errors import CheckpointError, NoWeightsError, RunError, first_few
from ckptavg.formats import open_checkpoint
from ckptavg.formats.unsupported_files import is_text
from ckptavg.io.paths import Location
from ckptavg.runs.discovery.file_names import is_ema_name, possible_originals
from ckptavg.runs.discovery.numbered import Place

Groups = dict[Location | Place, list[Location]]
_Content = Literal["weights", "integers", "nothing", "unknown"]


def merge_roots(groups: Groups) -> Groups:
    """Move each model at the root of a run to the end of that run's group."""
    runs: dict[Location, list[Place]] = defaultdict(list)
    for home in groups:
        if isinstance(home, Place):
            runs[home.base].append(home)
    for home, members in list(groups.items()):
        if isinstance(home, Place) or len(members) != 1:
            continue
        # With several networks per step, it is unknown to which network the root belongs.
        series = runs[members[0].resolve()]
        if len(series) == 1:
            groups[series[0]] += groups.pop(home)
    return groups


def split_copies(groups: Groups, listed: set[Location]) -> tuple[Groups, list[Location]]:
    """Split off the EMA copies of other checkpoints.

    Args:
        groups: The checkpoints of each training.
        listed: Checkpoints that the user did not name. A named one is no copy.

    Returns:
        The groups without copies, and the copies.
    """
    with_originals: set[Location] = set()
    for home in groups:
        if isinstance(home, Place) and not is_ema_name(home.name):
            with_originals.add(home.base)
    originals: Groups = {}
    copies: list[Location] = []
    for home, members in groups.items():
        named_as_copies: set[Location] = set()
        if not isinstance(home, Place):
            named_as_copies = _copies_among(members)
        elif is_ema_name(home.name) and home.base in with_originals:
            named_as_copies = set(members)
        remaining: list[Location] = []
        for path in members:
            if path in named_as_copies and path in listed:
                copies.append(path)
            else:
                remaining.append(path)
        if remaining:
            originals[home] = remaining
    return originals, copies


def _copies_among(neighbours: Sequence[Location]) -> set[Location]:
    """Find the directories that are EMA copies of a neighbour, by name."""
    names = {path.name for path in neighbours}
    copies: set[Location] = set()
    for path in neighbours:
        if not names.isdisjoint(possible_originals(path.name)) and path.is_dir():
            copies.add(path)
    return copies


def split_weightless(groups: Groups, listed: set[Location]) -> tuple[Groups, list[Location]]:
    """Split off files without weights beside the network of each step: a counter, a schedule.

    Args:
        groups: The checkpoints of each training.
        listed: Checkpoints that the user did not name.

    Returns:
        The groups with weights, and the members of the groups without.
    """
    weightless: list[Place] = []
    for siblings in _several_networks(groups, listed).values():
        # One member per place is opened, and decides for all members of the place.
        contents = {network: _content_of(groups[network][-1]) for network in siblings}
        has_weights = "weights" in contents.values()
        for network, content in contents.items():
            # Beside weights, tensors of integers alone are the state of a random generator or a
            # data loader.
            if content == "nothing" or (content == "integers" and has_weights):
                weightless.append(network)
    networks = dict(groups)
    paths: list[Location] = []
    for network in weightless:
        paths += networks.pop(network)
    return networks, paths


def _content_of(path: Location) -> _Content:
    """Classify the contents of a file or directory."""
    try:
        checkpoint = open_checkpoint(path)
    except NoWeightsError:
        return "nothing"
    except CheckpointError:
        # A damaged file may hold weights, and a pointer stands for weights, so neither is passed
        # over. A text holds no weights.
        if path.is_file() and is_text(path):
            return "nothing"
        return "unknown"
    all_integers = all(tensor.dtype.kind == "int" for tensor in checkpoint.tensors.values())
    if all_integers and not checkpoint.refused:
        return "integers"
    return "weights"


def refuse_networks(groups: Groups, listed: set[Location]) -> None:
    """Refuse a directory that holds several networks at each step.

    Args:
        groups: The checkpoints of each training.
        listed: Checkpoints that the user did not name.

    Raises:
        RunError: The directory holds several networks, and the user named none.
    """
    for base, networks in _several_networks(groups, listed).items():
        # Two series of steps may have networks of equal names. The pattern then names the series.
        share_names = len({network.name for network in networks}) < len(networks)
        patterns: list[str] = []
        for network in networks:
            pattern = network.full_pattern if share_names else network.pattern
            patterns.append(repr(pattern))
        raise RunError(
            f"{base} holds {len(networks)} networks side by side: {first_few(patterns, 8)}",
            f"Select one with `glob={patterns[0]}`.",
        )


def _several_networks(groups: Groups, listed: set[Location]) -> dict[Location, list[Place]]:
    """Find the directories with several networks per step.

    Returns:
        Directory → places of the networks.
    """
    by_base: dict[Location, list[Place]] = defaultdict(list)
    for home, members in groups.items():
        if isinstance(home, Place) and listed.issuperset(members):
            by_base[home.base].append(home)
    return {base: networks for base, networks in by_base.items() if len(networks) > 1}
