"""Tensors of a checkpoint, grouped by module according to the tensors' names."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from ckptavg.formats.checkpoint import Tensor


class Modules:
    """The tensors of a checkpoint by module. The module is the name up to the last dot.

    A colon separates as a dot does: the names of flattened tensor subclasses have one.

    Args:
        tensors: Name → tensor of a checkpoint.

    Attributes:
        tensors: Module → last part of the name → tensor. The module's name includes the separator
            at its end.
    """

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self.tensors: dict[str, dict[str, Tensor]] = {}
        for name, tensor in tensors.items():
            module, leaf = split_name(name)
            self.tensors.setdefault(module, {})[leaf] = tensor

    def __iter__(self) -> Iterator[tuple[str, dict[str, Tensor]]]:
        return iter(self.tensors.items())


def split_name(name: str) -> tuple[str, str]:
    """Split a tensor's name into the module, including the separator, and the last part."""
    end = max(name.rfind("."), name.rfind(":")) + 1
    return name[:end], name[end:]
