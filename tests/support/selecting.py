"""Parameters of which the default run of the tests takes a part. The marker `slow` has the rest."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable
from typing import Any

import pytest


def first_only(
    names: str | tuple[str, ...], values: Iterable[Any], ids: Iterable[str] | None = None
) -> pytest.MarkDecorator:
    """Parametrize a test by values, all of which but the first are slow.

    Args:
        names: Name of the parameter, or names of several.
        values: The values; a tuple per value where there are several names.
        ids: Names of the values.
    """
    parameters = []
    for position, value in enumerate(values):
        parts = value if isinstance(names, tuple) else (value,)
        parameters.append(_parameter(parts, is_slow=position > 0))
    return pytest.mark.parametrize(names, parameters, ids=ids)


def combinations(
    ids: Callable[[Any], str | None] | None = None, **axes: Iterable[Any]
) -> pytest.MarkDecorator:
    """Parametrize a test by all combinations of values.

    In the default run each value occurs, in as few combinations as possible. All others are slow.

    Args:
        ids: Returns the name of a value, or None for pytest's own.
        axes: Name of each parameter and its values.
    """
    values = [list(axis) for axis in axes.values()]
    chosen = set()
    for number in range(max(map(len, values))):
        chosen.add(tuple(number % len(axis) for axis in values))
    parameters = []
    for positions in itertools.product(*(range(len(axis)) for axis in values)):
        parts = [axis[position] for axis, position in zip(values, positions, strict=True)]
        parameters.append(_parameter(parts, is_slow=positions not in chosen))
    return pytest.mark.parametrize(tuple(axes), parameters, ids=ids)


def _parameter(parts: Iterable[Any], *, is_slow: bool) -> Any:
    marks = [pytest.mark.slow] if is_slow else []
    return pytest.param(*parts, marks=marks)
