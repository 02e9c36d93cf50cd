"""Declaration of options in groups, and of groups that become one argument of a command."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any, TypeVar

import click

from ckptavg.cli.options.help import GroupedOption

F = TypeVar("F", bound=Callable[..., Any])


def option(group: str, *names: str, **settings: Any) -> Callable[[F], F]:
    """Make a ``click.option`` in a group of the help; ``common`` ones are in the short help."""
    return click.option(*names, cls=GroupedOption, group=group, **settings)


def together(*decorators: Callable[[F], F]) -> Callable[[F], F]:
    """Combine decorators into one, the first outermost, so that help keeps the order."""

    def decorate(function: F) -> F:
        return functools.reduce(lambda f, d: d(f), reversed(decorators), function)

    return decorate


def bundle(
    argument: str, make: Callable[..., Any], *decorators: Callable[[Any], Any]
) -> Callable[[F], F]:
    """Combine options into one decorator that passes their values as one argument.

    Args:
        argument: Name of the argument that the command receives.
        make: Dataclass or function that takes the values by name. A parameter without an option
            keeps its default.
        decorators: The options, in the order of the help.

    Returns:
        The decorator of a command's function.
    """
    names = list(inspect.signature(make).parameters)

    def decorate(function: F) -> F:
        @functools.wraps(function)
        def run(**values: Any) -> Any:
            chosen = {name: values.pop(name) for name in names if name in values}
            return function(**values, **{argument: make(**chosen)})

        for add_option in reversed(decorators):
            run = add_option(run)
        return run  # type: ignore[return-value]

    return decorate
