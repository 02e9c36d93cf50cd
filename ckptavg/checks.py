"""Whether checkpoints fit each other, and whether all that they hold can be dealt with."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence

from ckptavg.errors import (
    CheckpointError,
    MismatchError,
    UnsupportedTensorError,
    first_few,
    short,
)
from ckptavg.formats import Checkpoint
from ckptavg.quantization import check_not_quantized

_PLAIN = "Save plain tensors in their place (to_dense(), dequantize(), full_tensor())"


def check_names(
    checkpoints: Sequence[Checkpoint], names: Sequence[str], averages: Callable[[str], bool]
) -> None:
    """Make sure that all checkpoints hold the same tensors to be averaged.

    Args:
        checkpoints: What was selected, in order.
        names: Those of the last one that are to be averaged.
        averages: Whether a tensor is to be averaged, by its name.

    Raises:
        MismatchError: One lacks some or has more.
        CheckpointError: One holds several networks, and another one others or a single one.
    """
    last, expected = checkpoints[-1], set(names)
    for checkpoint in checkpoints[:-1]:
        held = {n for n in (*checkpoint.tensors, *checkpoint.refused) if averages(n)}
        lost, extra = sorted(expected - held), sorted(held - expected)
        if not lost and not extra:
            continue
        if set(checkpoint.networks) != set(last.networks):
            raise CheckpointError(
                f"{checkpoint.path} and {last.path} hold different networks: "
                f"{_networks_text(checkpoint)} against {_networks_text(last)}",
                "Name the entry that holds the weights of both with --key.",
            )
        if held and not held & expected:
            raise MismatchError(
                f"{checkpoint.path} and {last.path} hold different networks: no tensor name in "
                f"common ({extra[0]!r} against {lost[0]!r})",
                _one_network(checkpoint, last) or "Select one network's checkpoints with --glob.",
            )
        parts = []
        if lost:
            parts.append(f"lacks {len(lost)} tensors ({first_few(lost)})")
        if extra:
            parts.append(f"has {len(extra)} more ({first_few(extra)})")
        raise MismatchError(
            f"{checkpoint.path} {' and '.join(parts)}, compared with {last.path}",
            _one_network(checkpoint, last)
            or "Leave the checkpoint out, or the tensors with --exclude.",
        )


def _networks_text(checkpoint: Checkpoint) -> str:
    entries = [short(entry) or "the file itself" for entry in checkpoint.entries]
    return f"those under {first_few(entries)}" if checkpoint.networks else f"one, {entries[0]}"


def _one_network(one: Checkpoint, other: Checkpoint) -> str:
    """How to select one of two networks, where the files' names tell them apart."""
    if one.pattern == other.pattern:
        return ""
    patterns = " or ".join(
        f"--glob '{pattern}'" for pattern in sorted({one.pattern, other.pattern})
    )
    return f"If these are different networks, select one with {patterns}."


def check_supported(
    checkpoints: Sequence[Checkpoint], names: Sequence[str], averages: Callable[[str], bool]
) -> None:
    """Make sure that all tensors to be averaged have a mean.

    Args:
        checkpoints: What was selected, in order.
        names: The tensors to be averaged.
        averages: Whether a tensor is to be averaged, by its name.

    Raises:
        UnsupportedTensorError: Some are no plain tensors, 8-bit floats, or quantized weights.
    """
    for checkpoint in checkpoints:
        refused = [f"{n} ({checkpoint.refused[n]})" for n in names if n in checkpoint.refused]
        if refused:
            raise UnsupportedTensorError(
                f"{checkpoint.path} holds tensors that cannot be averaged: {first_few(refused)}",
                f"{_PLAIN}, or leave them out with --exclude: the output will lack them.",
            )
        packed = [
            f"{name} ({checkpoint.tensors[name].dtype.name})"
            for name in names
            if checkpoint.tensors[name].dtype.kind == "packed"
        ]
        if packed:
            raise UnsupportedTensorError(
                f"{checkpoint.path}: 8-bit floats are quantized weights, which have no meaningful "
                f"mean without their scales: {first_few(packed)}",
                "Average the checkpoints before quantization, or leave the tensors out, scales "
                "too, with --exclude.",
            )
    check_not_quantized(checkpoints, averages)


def check_alike(name: str, checkpoints: Sequence[Checkpoint]) -> None:
    """Make sure that a tensor has the same shape and kind in all checkpoints.

    Raises:
        MismatchError: It has not.
    """
    last = checkpoints[-1]
    model = last.tensors[name]
    for checkpoint in checkpoints[:-1]:
        tensor = checkpoint.tensors[name]
        if tensor.shape != model.shape:
            raise MismatchError(
                f"{name} has the shape {tensor.shape} in {checkpoint.path} "
                f"but {model.shape} in {last.path}",
                _one_network(checkpoint, last)
                or f"Leave the checkpoint out, or the tensor with --exclude '{name}'.",
            )
        if tensor.dtype.kind != model.dtype.kind:
            raise MismatchError(
                f"{name} is {tensor.dtype.name} in {checkpoint.path} "
                f"but {model.dtype.name} in {last.path}",
                f"Leave the checkpoint out, or the tensor with --exclude '{name}'.",
            )


def check_copied(checkpoint: Checkpoint, names: Collection[str]) -> None:
    """Make sure that tensors of a checkpoint can be copied.

    Args:
        checkpoint: Whose.
        names: Which.

    Raises:
        UnsupportedTensorError: Some are no plain tensors, or smaller than a byte per element.
    """
    special = [f"{n} ({why})" for n, why in checkpoint.refused.items() if n in names]
    if special:
        raise UnsupportedTensorError(
            f"{checkpoint.path} holds tensors without plain bytes: {first_few(special)}",
            f"{_PLAIN}.",
        )
    tensors = checkpoint.tensors.items()
    small = [f"{n} ({t.dtype.name})" for n, t in tensors if n in names and t.dtype.size == 0]
    if small:
        raise UnsupportedTensorError(
            f"{checkpoint.path} holds tensors without plain bytes: {first_few(small)}",
            "Take the checkpoints from before quantization.",
        )
