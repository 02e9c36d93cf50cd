"""The logger of the library's notes, whose records any handler may show."""

from __future__ import annotations

import logging

from ckptavg.display import printable


class PrintableRecords(logging.Filter):
    """Makes messages printable, whoever's handler gets them."""

    def filter(self, record: logging.LogRecord) -> bool:
        """Put the finished message in the place of the record's own."""
        record.msg, record.args = printable(record.getMessage()), None
        return True


log = logging.getLogger("ckptavg")
log.addHandler(logging.NullHandler())
log.addFilter(PrintableRecords())
