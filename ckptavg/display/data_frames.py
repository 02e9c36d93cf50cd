"""Conversion of rows into a pandas DataFrame, if pandas is installed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ckptavg.errors import MissingPackageError

if TYPE_CHECKING:
    import pandas


def data_frame(rows: Sequence[Mapping[str, Any]]) -> pandas.DataFrame:
    """Make a DataFrame of rows, with columns in the order of first appearance.

    Raises:
        MissingPackageError: pandas is not installed.
    """
    try:
        # Imported here: an optional package, which is slow to import.
        import pandas  # noqa: PLC0415
    except ImportError as error:
        raise MissingPackageError(
            f"a DataFrame needs pandas, which cannot be imported ({error})",
            "Install it with pip install pandas.",
        ) from error
    columns: dict[str, None] = {}
    for row in rows:
        columns |= dict.fromkeys(row)
    return pandas.DataFrame.from_records(rows, columns=list(columns))
