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

    def beside(self, module: str) -> Iterator[str]:
        """Last parts of the names in the module around one."""
        yield from self.tensors.get(split_name(module[:-1])[0], {})

    def companions(self, name: str) -> Iterator[tuple[str, Tensor]]:
        """Tensors beside one by their names, and those below it as ``weight.absmax`` is."""
        module, leaf = split_name(name)
        for other, tensor in self.tensors.get(module, {}).items():
            if other != leaf:
                yield module + other, tensor
        for separator in ".:":
            inner = name + separator
            for other, tensor in self.tensors.get(inner, {}).items():
                yield inner + other, tensor


def split_name(name: str) -> tuple[str, str]:
    """The module's part of a tensor's name, with its separator, and the last part."""
    end = max(name.rfind("."), name.rfind(":")) + 1
    return name[:end], name[end:]
