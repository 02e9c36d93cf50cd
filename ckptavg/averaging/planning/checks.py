"""Checks that checkpoints fit each other, and that tensors can be averaged or copied."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import NoReturn

from ckptavg.averaging.planning.quantization import check_not_quantized
from ckptavg.errors import (
    CheckpointError,
    MismatchError,
    UnsupportedTensorError,
    first_few,
    short,
)
from ckptavg.formats import Checkpoint

_PLAIN = "Save plain tensors in their place (to_dense(), dequantize(), full_tensor())"


def check_names(
    checkpoints: Sequence[Checkpoint], names: Sequence[str], averages: Callable[[str], bool]
) -> None:
    """Require the same tensors to be averaged in all checkpoints.

    Args:
        checkpoints: The selected checkpoints, in order.
        names: Names of the last checkpoint's tensors that are to be averaged.
        averages: Returns True if a tensor of this name is averaged.

    Raises:
        MismatchError: A checkpoint lacks some of these tensors, or has others to average.
        CheckpointError: A checkpoint holds other networks than the last one.
    """
    last, expected = checkpoints[-1], set(names)
    for checkpoint in checkpoints[:-1]:
        # Refused tensors count as present: check_supported tells why they have no mean.
        present = set(filter(averages, (*checkpoint.tensors, *checkpoint.refused)))
        missing, extra = sorted(expected - present), sorted(present - expected)
        if missing or extra:
            _refuse_names(checkpoint, last, missing, extra, are_disjoint=present <= set(extra))


def _refuse_names(
    checkpoint: Checkpoint,
    last: Checkpoint,
    missing: list[str],
    extra: list[str],
    *,
    are_disjoint: bool,
) -> NoReturn:
    """Raise an error that tells how a checkpoint's names differ from the last checkpoint's.

    Args:
        checkpoint: The checkpoint.
        last: The last checkpoint.
        missing: Names that only the last checkpoint has.
        extra: Names that only the checkpoint has.
        are_disjoint: True if the two have no name in common.

    Raises:
        MismatchError: The names differ.
        CheckpointError: The checkpoint holds other networks than the last one.
    """
    if set(checkpoint.networks) != set(last.networks):
        raise CheckpointError(
            f"{checkpoint.path} and {last.path} hold different networks: "
            f"{_describe_networks(checkpoint)} against {_describe_networks(last)}",
            "Name the entry that holds the weights of both with `key`.",
        )
    # Without a common name these are two models: a list of missing tensors would not help.
    if extra and are_disjoint:
        raise MismatchError(
            f"{checkpoint.path} and {last.path} hold different networks: no tensor name in "
            f"common ({extra[0]!r} against {missing[0]!r})",
            _suggest_pattern(checkpoint, last) or "Select one network's checkpoints with `glob`.",
        )
    differences = []
    if missing:
        differences.append(f"lacks {len(missing)} tensors ({first_few(missing)})")
    if extra:
        differences.append(f"has {len(extra)} more ({first_few(extra)})")
    raise MismatchError(
        f"{checkpoint.path} {' and '.join(differences)}, compared with {last.path}",
        _suggest_pattern(checkpoint, last)
        or "Leave the checkpoint out, or the tensors with `exclude`.",
    )


def _describe_networks(checkpoint: Checkpoint) -> str:
    """Name the entries that a checkpoint's networks come from, for a message."""
    entries = [short(entry) or "the file itself" for entry in checkpoint.entries]
    if checkpoint.networks:
        return f"those under {first_few(entries)}"
    return f"one, {entries[0]}"


def _suggest_pattern(first: Checkpoint, second: Checkpoint) -> str:
    """Suggest a pattern that selects a single network; empty where the files' names are alike."""
    if first.pattern == second.pattern:
        return ""
    pattern, other = sorted({first.pattern, second.pattern})
    return f"If these are different networks, select one: `glob={pattern!r}` or `glob={other!r}`."


def check_supported(
    checkpoints: Sequence[Checkpoint], names: Sequence[str], averages: Callable[[str], bool]
) -> None:
    """Make sure that all tensors to be averaged have a mean.

    Args:
        checkpoints: The selected checkpoints, in order.
        names: Names of the tensors to be averaged.
        averages: Returns True if a tensor of this name is averaged.

    Raises:
        UnsupportedTensorError: Some tensors are not plain, or are quantized weights.
    """
    for checkpoint in checkpoints:
        refused: list[str] = []
        packed: list[str] = []
        for name in names:
            if name in checkpoint.refused:
                refused.append(f"{name} ({checkpoint.refused[name]})")
            elif checkpoint.tensors[name].dtype.kind == "packed":
                packed.append(f"{name} ({checkpoint.tensors[name].dtype.name})")
        if refused:
            raise UnsupportedTensorError(
                f"{checkpoint.path} holds tensors that cannot be averaged: {first_few(refused)}",
                f"{_PLAIN}, or leave them out with `exclude`: the output will lack them.",
            )
        if packed:
            raise UnsupportedTensorError(
                f"{checkpoint.path}: 8-bit floats are quantized weights, which have no meaningful "
                f"mean without their scales: {first_few(packed)}",
                "Average the checkpoints before quantization, or leave the tensors out, scales "
                "too, with `exclude`.",
            )
    check_not_quantized(checkpoints, averages)


def check_alike(name: str, checkpoints: Sequence[Checkpoint]) -> None:
    """Make sure that a tensor has the same shape and kind in all checkpoints.

    Raises:
        MismatchError: The shapes or the kinds differ.
    """
    last = checkpoints[-1]
    expected = last.tensors[name]
    for checkpoint in checkpoints[:-1]:
        tensor = checkpoint.tensors[name]
        if tensor.shape != expected.shape:
            raise MismatchError(
                f"{name} has the shape {tensor.shape} in {checkpoint.path} "
                f"but {expected.shape} in {last.path}",
                _suggest_pattern(checkpoint, last) or _leave_out(name),
            )
        # Floats of different width may mix.
        if tensor.dtype.kind != expected.dtype.kind:
            raise MismatchError(
                f"{name} is {tensor.dtype.name} in {checkpoint.path} "
                f"but {expected.dtype.name} in {last.path}",
                _leave_out(name),
            )


def _leave_out(name: str) -> str:
    """Return the remedy for a tensor that differs in one of the checkpoints."""
    return f"Leave the checkpoint out, or the tensor: `exclude={name!r}`."


def check_copied(checkpoint: Checkpoint, names: Collection[str]) -> None:
    """Make sure that tensors of a checkpoint can be copied.

    Args:
        checkpoint: The checkpoint.
        names: Names of its tensors to copy.

    Raises:
        UnsupportedTensorError: Some are not plain tensors, or have less than a byte per element.
    """
    special = [f"{name} ({why})" for name, why in checkpoint.refused.items() if name in names]
    if special:
        raise UnsupportedTensorError(
            f"{checkpoint.path} holds tensors that are not plain: {first_few(special)}",
            f"{_PLAIN}.",
        )
    small: list[str] = []
    for name, tensor in checkpoint.tensors.items():
        if name in names and tensor.dtype.size == 0:
            small.append(f"{name} ({tensor.dtype.name})")
    if small:
        raise UnsupportedTensorError(
            f"{checkpoint.path} holds tensors of less than a byte per element: {first_few(small)}",
            "Take the checkpoints from before quantization.",
        )
