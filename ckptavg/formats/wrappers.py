"""Bare names of tensors: the names that a model has without the wrappers of training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ckptavg.formats.tree import join

# Prefixes that DDP, torch.compile, FSDP and activation checkpointing add.
LEADING_WRAPPERS = ("module.", "_orig_mod.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module.")
# The prefixes that are dropped inside a name too. There `module.` may be the model's own.
INNER_WRAPPERS = LEADING_WRAPPERS[1:]
# Counters of updates beside `module.` in averaged models: torch's AveragedModel, mmengine's.
TORCH_COUNTER, MMENGINE_COUNTER = "n_averaged", "steps"
COUNTERS = (TORCH_COUNTER, MMENGINE_COUNTER)
_MODULE_DROPPED = (
    "'module.' in front of every name is taken for DDP's wrapper and dropped; where it is the "
    "model's own, write a .pth or .ckpt, which keeps the names as they are"
)


def bare_names(names: Sequence[str]) -> dict[str, str]:
    """Map stored names to bare names, which the model has without wrappers.

    DDP, torch.compile, FSDP and activation checkpointing add wrappers. A wrapper in front is
    dropped if every name has that wrapper, repeatedly. Inside a name the latter three are dropped
    too. The counter of an averaged model is dropped together with the wrapper. All names are left
    unchanged if bare names would collide.
    """
    unchanged = dict(zip(names, names, strict=True))
    bare = unchanged
    while wrapper := _common_wrapper([b for b in bare.values() if b not in COUNTERS]):
        bare = {name: b[len(wrapper) :] for name, b in bare.items() if b not in COUNTERS}
    bare = {name: _without_inner(b) for name, b in bare.items()}
    if len(set(bare.values())) < len(bare) or "" in bare.values():
        return unchanged
    return bare


def bare_network_names(networks: Mapping[str, list[str]]) -> dict[str, str]:
    """Map stored names to bare names, network by network, since each may have another wrapper.

    Args:
        networks: Dotted path → stored names.

    Returns:
        Stored name → bare name, both with the network's path in front.
    """
    bare: dict[str, str] = {}
    for path, names in networks.items():
        for stored, name in bare_names(names).items():
            bare[join(path, stored)] = join(path, name)
    if len(set(bare.values())) == len(bare):
        return bare
    stored_names = [join(path, name) for path, names in networks.items() for name in names]
    return dict(zip(stored_names, stored_names, strict=True))


def note_wrapper(names: Sequence[str]) -> list[str]:
    """Make a note if the dropped prefix ``module.`` may be part of the model.

    DDP's wrapper is named ``module``, but some models name a network so too.
    """
    bare = bare_names(names)
    # A dropped counter proves that the prefix is a wrapper.
    if len(bare) < len(names):
        return []
    dropped = {stored[: len(stored) - len(name)] for stored, name in bare.items()}
    if dropped in (set(), {""}):
        return []
    if any(prefix.replace("module.", "") for prefix in dropped):
        return []
    return [_MODULE_DROPPED]


def _common_wrapper(names: Sequence[str]) -> str | None:
    """Return the wrapper that all names begin with; None if there is none."""
    if not names:
        return None
    for wrapper in LEADING_WRAPPERS:
        if all(name.startswith(wrapper) for name in names):
            return wrapper
    return None


def _without_inner(name: str) -> str:
    """Drop the wrappers inside a name."""
    return ".".join(part for part in name.split(".") if f"{part}." not in INNER_WRAPPERS)
