"""Drawing of tables for ``print``."""

from __future__ import annotations

import shutil
import sys

from ckptavg.display.table_layout import table_text
from ckptavg.display.tables import Table


def printed_table(table: Table) -> str:
    """Draw a table for stdout: as wide as the terminal, or whole if stdout is no terminal."""
    # Programs without a console (pythonw) have no stdout.
    if sys.stdout is None or not sys.stdout.isatty():
        return table_text(table)
    return table_text(table, shutil.get_terminal_size().columns)
