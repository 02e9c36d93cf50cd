"""Tensors by the module that holds them, as their names tell."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from ckptavg.formats.table import Tensor


class Modules:
    """Which tensors stand beside which: those whose names are alike up to the last dot.

    A colon separates as a dot does: flattened tensor subclasses have it.

    Args:
        tensors: The table of a checkpoint.

    Attributes:
        tensors: Module → last part of the name → tensor. The module's name ends in its separator.
    """

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self.tensors: dict[str, dict[str, Tensor]] = {}
        for name, tensor in tensors.items():
            module, leaf = split_name(name)
            self.tensors.setdefault(module, {})[leaf] = tensor

    def __iter__(self) -> Iterator[tuple[str, dict[str, Tensor]]]:
        return iter(self.tensors.items())


def split_name(name: str) -> tuple[str, str]:
    """The module's part of a tensor's name, with its separator, and the last part."""
    end = max(name.rfind("."), name.rfind(":")) + 1
    return name[:end], name[end:]
