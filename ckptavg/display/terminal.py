"""Tables as ``print`` shows them."""

from __future__ import annotations

import shutil
import sys

from ckptavg.display.table_layout import table_text
from ckptavg.display.tables import Table


def printed_table(table: Table) -> str:
    """Draw a table for stdout: as wide as the terminal, or with all there is where it is none."""
    is_terminal = sys.stdout is not None and sys.stdout.isatty()
    return table_text(table, shutil.get_terminal_size().columns if is_terminal else None)
