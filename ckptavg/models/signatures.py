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
    """Parameters of a model's ``forward``.

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
        """Return the signature of a model; of a wrapper that passes all on, the inner model's."""
        signature = _signature(model)
        while not signature.parameters and signature.further:
            inner = [*model.children()]
            if len(inner) != 1:
                break
            model = inner[0]
            signature = _signature(model)
        return signature

    @property
    def required(self) -> list[Parameter]:
        """Parameters without a default, in order."""
        return [p for p in self.parameters if p.default is Parameter.empty]

    @property
    def names(self) -> set[str]:
        """Names that can be passed by keyword."""
        return {p.name for p in self.parameters if p.kind in NAMED}

    @property
    def first(self) -> Parameter | None:
        """The parameter that a single input goes to."""
        return next((p for p in self.parameters if p.kind in PLACED), None)

    def takes(self, count: int) -> bool:
        """Return True if a tuple of this many inputs is taken as several inputs."""
        if not self.parameters:
            return self.many
        slots = sum(p.kind in PLACED for p in self.parameters)
        slots += sum(p.kind is Parameter.KEYWORD_ONLY for p in self.required)
        return 1 < len(self.required) <= count and (count <= slots or self.many)

    def __str__(self) -> str:
        shown = [p.name if p.default is Parameter.empty else f"{p.name}=" for p in self.parameters]
        shown += ["*inputs"] * self.many + ["**inputs"] * self.further
        return f"forward({', '.join(shown)})"


def _signature(model: nn.Module) -> Signature:
    """Return the signature of a model's own forward; any arguments where there is none."""
    try:
        parameters = [*inspect.signature(model.forward).parameters.values()]
    except (TypeError, ValueError):
        parameters = _scripted(model)
        if not parameters:
            return Signature((), many=True, further=True)
    plain_parameters = tuple(p for p in parameters if p.kind in (*NAMED, Parameter.POSITIONAL_ONLY))
    kinds = {p.kind for p in parameters}
    return Signature(
        plain_parameters, Parameter.VAR_POSITIONAL in kinds, Parameter.VAR_KEYWORD in kinds
    )


def _scripted(model: nn.Module) -> list[Parameter]:
    """Return the parameters of a scripted or traced forward."""
    schema = getattr(model.forward, "schema", None)
    parameters = []
    for argument in schema.arguments[1:] if schema is not None else ():
        default = argument.default_value if argument.has_default_value() else Parameter.empty
        parameters.append(
            Parameter(argument.name, Parameter.POSITIONAL_OR_KEYWORD, default=default)
        )
    return parameters
