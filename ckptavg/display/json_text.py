"""JSON text that every parser reads and that is safe to print."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

from ckptavg.errors.printable import escape_unseen, without_secrets


def json_text(value: Any, *, ascii_only: bool = False) -> str:
    """Format plain values as strict JSON with a final newline.

    Numbers that are not finite become null. Control characters and invisible characters are
    escaped. Lone surrogates are escaped, too, so that the text can be encoded. Secrets are removed
    from URLs among the values.

    Args:
        value: Mappings, sequences and plain values.
        ascii_only: True to escape all characters that are not ASCII.
    """
    text = json.dumps(_strict(value), indent=2, ensure_ascii=ascii_only, allow_nan=False)
    # In JSON's own escapes: a parser returns the values as they were.
    return escape_unseen(text, lambda c: json.dumps(c)[1:-1], keep="\n") + "\n"


def _strict(value: Any) -> Any:
    """Replace numbers that are not finite by None, and remove secrets from texts."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, str):
        return without_secrets(value)
    if isinstance(value, Mapping):
        return {key: _strict(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_strict(item) for item in value]
    return value
