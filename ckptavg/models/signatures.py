"""Signatures of models: the parameters that a model's ``forward`` takes."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from inspect import Parameter

from torch import nn

NAMED = (Parameter.POSITIONAL_OR_KEYWORD, Parameter.KEYWORD_ONLY)
PLACED = (Parameter.POSITIONAL_ONLY, Parameter.POSITIONAL_OR_KEYWORD)


@dataclass(frozen=True)
class Signature:
    """What a model's forward takes.

    Attributes:
        parameters: Those that have a name of their own, in order.
        many: Whether it takes any number of inputs beside them: ``*inputs``.
        further: Whether it takes any keywords beside them: ``**inputs``.
    """

    parameters: tuple[Parameter, ...]
    many: bool = False
    further: bool = False

    @classmethod
    def of(cls, model: nn.Module) -> Signature:
        """The signature of a model, or of the one that a wrapper hands everything on to."""
        found = _signature(model)
        while not found.parameters and found.further:
            inner = [*model.children()]
            if len(inner) != 1:
                break
            model = inner[0]
            found = _signature(model)
        return found

    @property
    def required(self) -> list[Parameter]:
        """The parameters without a default, in order."""
        return [p for p in self.parameters if p.default is Parameter.empty]

    @property
    def names(self) -> set[str]:
        """The names that can be passed by keyword."""
        return {p.name for p in self.parameters if p.kind in NAMED}

    @property
    def first(self) -> Parameter | None:
        """The parameter that a single input goes to."""
        return next((p for p in self.parameters if p.kind in PLACED), None)

    def takes(self, count: int) -> bool:
        """Whether a tuple of several inputs is one that it requires as such."""
        if not self.parameters:
            return self.many
        places = sum(p.kind in PLACED for p in self.parameters)
        places += sum(p.kind is Parameter.KEYWORD_ONLY for p in self.required)
        return 1 < len(self.required) <= count and (count <= places or self.many)

    def __str__(self) -> str:
        shown = [p.name if p.default is Parameter.empty else f"{p.name}=" for p in self.parameters]
        shown += ["*inputs"] * self.many + ["**inputs"] * self.further
        return f"forward({', '.join(shown)})"


def _signature(model: nn.Module) -> Signature:
    """The signature of a model's own forward; anything goes where it does not tell."""
    try:
        parameters = [*inspect.signature(model.forward).parameters.values()]
    except (TypeError, ValueError):
        parameters = _scripted(model)
        if not parameters:
            return Signature((), many=True, further=True)
    own = tuple(p for p in parameters if p.kind in (*NAMED, Parameter.POSITIONAL_ONLY))
    kinds = {p.kind for p in parameters}
    return Signature(own, Parameter.VAR_POSITIONAL in kinds, Parameter.VAR_KEYWORD in kinds)


def _scripted(model: nn.Module) -> list[Parameter]:
    """The parameters of a scripted or traced forward."""
    schema = getattr(model.forward, "schema", None)
    found = []
    for argument in schema.arguments[1:] if schema is not None else ():
        default = argument.default_value if argument.has_default_value() else Parameter.empty
        found.append(Parameter(argument.name, Parameter.POSITIONAL_OR_KEYWORD, default=default))
    return found
