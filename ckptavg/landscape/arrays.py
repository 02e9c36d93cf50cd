"""Numbers of a landscape as NumPy arrays in an ``.npz`` file."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ckptavg.optional import import_optional


def write_arrays(path: Path, values: Mapping[str, Any]) -> None:
    """Write points and landmarks as arrays of columns.

    ``x``, ``y``, ``series``, ``data_KEY``, ``train_KEY`` and ``coefficients`` have a row per point;
    ``checkpoint_x`` and so on a row per checkpoint, ``average_x`` one per average. Numbers are
    float64, with NaN where there is none. ``about`` is JSON of everything else.

    Args:
        path: The file.
        values: The output of ``Landscape.as_json``.

    Raises:
        SpecError: NumPy is not installed.
    """
    numpy = import_optional("numpy", "numpy")
    columns: dict[str, Any] = {}
    for prefix, name in (("", "points"), ("checkpoint_", "checkpoints"), ("average_", "averages")):
        for key, column in _columns(values[name]).items():
            columns[prefix + key] = _array(numpy, column)
    rest = {key: value for key, value in values.items() if key not in _TABLES}
    columns["about"] = numpy.array(json.dumps(rest))
    with path.open("wb") as file:
        numpy.savez_compressed(file, **columns)


_TABLES = ("points", "checkpoints", "averages")


def _columns(rows: Sequence[Mapping[str, Any]]) -> dict[str, list[Any]]:
    """Turn rows into columns; dictionaries of numbers become a column per key."""
    flat_rows: list[dict[str, Any]] = []
    names: dict[str, None] = {}
    for row in rows:
        flat: dict[str, Any] = {}
        for key, value in row.items():
            if isinstance(value, Mapping):
                flat |= {f"{key}_{inner}": entry for inner, entry in value.items()}
            elif key not in ("data", "train"):
                flat[key] = value
        flat_rows.append(flat)
        names |= dict.fromkeys(flat)
    columns: dict[str, list[Any]] = {}
    for name in names:
        columns[name] = [flat.get(name) for flat in flat_rows]
    return columns


def _array(numpy: Any, column: Sequence[Any]) -> Any:
    """Make an array of texts, of numbers, or of rows of numbers, with NaN for what is missing."""
    if any(isinstance(value, str) for value in column):
        return numpy.array(["" if value is None else value for value in column])
    width = max((len(value) for value in column if isinstance(value, list)), default=0)
    missing: Any = numpy.nan
    if width:
        missing = [numpy.nan] * width
    return numpy.array([missing if value is None else value for value in column], numpy.float64)
