"""Values as JSON that any reader takes and any terminal may show."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

from ckptavg.errors.printable import escape_unseen, without_secrets


def json_text(value: Any, *, ascii_only: bool = False) -> str:
    """Plain values as strict JSON, and a final newline.

    What is not finite is null. Characters that steer a terminal, or are unseen, are escaped, and a
    lone surrogate too, so that the text can be encoded. URLs among the values lose their secrets.

    Args:
        value: Mappings, sequences and plain values.
        ascii_only: True to escape all characters that are not ASCII.
    """
    text = json.dumps(_strict(value), indent=2, ensure_ascii=ascii_only, allow_nan=False)
    return escape_unseen(text, lambda c: json.dumps(c)[1:-1], keep="\n") + "\n"


def _strict(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, str):
        return without_secrets(value)
    if isinstance(value, Mapping):
        return {key: _strict(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_strict(item) for item in value]
    return value
