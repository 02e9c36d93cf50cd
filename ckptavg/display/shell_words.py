"""Words of a command line, quoted so that a shell reads them as they are."""

from __future__ import annotations

import shlex

from ckptavg.errors.printable import escape_unseen, without_secrets

# The last byte that is a character of its own in UTF-8.
_LAST_ASCII = 0x7F
# Surrogates that stand for the bytes of a name that is not UTF-8.
_FIRST_BYTE, _LAST_BYTE = 0xDC80, 0xDCFF


def quote(word: str) -> str:
    """Quote a word for a shell; what cannot be seen is escaped, in the form of bash and zsh."""
    word = without_secrets(word)
    if escape_unseen(word) == word:
        return shlex.quote(word)
    escaped = word.replace("\\", "\\\\").replace("'", "\\'")
    return f"$'{escape_unseen(escaped, _shell_escape)}'"


def _shell_escape(character: str) -> str:
    code = ord(character)
    if _FIRST_BYTE <= code <= _LAST_BYTE:
        return f"\\x{code - 0xDC00:02x}"
    if code <= _LAST_ASCII:
        return f"\\x{code:02x}"
    return f"\\U{code:08x}"
