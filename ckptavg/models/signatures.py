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
        parameters: Named parameters, in order.
        many: True if any number of further inputs is taken: ``*inputs``.
        further: True if any further keywords are taken: ``**inputs``.
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
    def required_names(self) -> list[str]:
        """Names of the parameters without a default, in order."""
        return [p.name for p in self.required]

    @property
    def names(self) -> set[str]:
        """Names that can be passed by keyword."""
        return {p.name for p in self.parameters if p.kind in NAMED}

    @property
    def first(self) -> Parameter | None:
        """The parameter that a single input goes to."""
        for parameter in self.parameters:
            if parameter.kind in PLACED:
                return parameter
        return None

    @property
    def mask_name(self) -> str | None:
        """Name of the first optional mask; None without a mask."""
        for parameter in self.parameters:
            if "mask" in parameter.name and parameter.default is None:
                return parameter.name
        return None

    def takes(self, count: int) -> bool:
        """Return True if a tuple of this many inputs is taken as several inputs."""
        if not self.parameters:
            return self.many
        slots = sum(p.kind in PLACED for p in self.parameters)
        slots += sum(p.kind is Parameter.KEYWORD_ONLY for p in self.required)
        return 1 < len(self.required) <= count and (count <= slots or self.many)

    def __str__(self) -> str:
        words: list[str] = []
        for parameter in self.parameters:
            is_required = parameter.default is Parameter.empty
            words.append(parameter.name + "=" * (not is_required))
        words += ["*inputs"] * self.many + ["**inputs"] * self.further
        return f"forward({', '.join(words)})"


def _signature(model: nn.Module) -> Signature:
    """Return the signature of a model's own forward; any arguments where there is none."""
    try:
        parameters = [*inspect.signature(model.forward).parameters.values()]
    except (TypeError, ValueError):
        # A scripted or traced forward is no Python function.
        parameters = _scripted_parameters(model)
        if not parameters:
            return Signature((), many=True, further=True)
    named: list[Parameter] = []
    many = further = False
    for parameter in parameters:
        if parameter.kind is Parameter.VAR_POSITIONAL:
            many = True
        elif parameter.kind is Parameter.VAR_KEYWORD:
            further = True
        else:
            named.append(parameter)
    return Signature(tuple(named), many, further)


def _scripted_parameters(model: nn.Module) -> list[Parameter]:
    """Return the parameters of a scripted or traced forward."""
    schema = getattr(model.forward, "schema", None)
    if schema is None:
        return []
    parameters: list[Parameter] = []
    # The first argument is the module itself.
    for argument in schema.arguments[1:]:
        default = Parameter.empty
        if argument.has_default_value():
            default = argument.default_value
        parameters.append(
            Parameter(argument.name, Parameter.POSITIONAL_OR_KEYWORD, default=default)
        )
    return parameters


def is_annotated_as(parameter: Parameter, kinds: tuple[str, ...]) -> bool:
    """Return True if a parameter is annotated as a container of the given kinds."""
    annotation = parameter.annotation
    # A text already where the user's file imports annotations from __future__.
    text = str(annotation)
    # list[Tensor] is a class as well, but has no name of its own.
    if isinstance(annotation, type) and not hasattr(annotation, "__origin__"):
        text = annotation.__name__
    text = text.lower().replace("typing.", "").replace("collections.abc.", "")
    return text.removeprefix("optional[").startswith(kinds)
