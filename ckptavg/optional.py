"""Packages that not everyone needs."""

from __future__ import annotations

import importlib
from typing import Any

from ckptavg.errors import SpecError


def import_optional(module: str, package: str) -> Any:
    """Import a module of a package that not everyone needs.

    Args:
        module: Its dotted name.
        package: What is installed to have it.

    Raises:
        SpecError: It cannot be imported.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        missing = (error.name or "").partition(".")[0]
        if isinstance(error, ModuleNotFoundError) and missing not in ("", module.partition(".")[0]):
            remedy = f"Install {missing}, which it needs."
        else:
            remedy = f"Install it with pip install {package}."
        raise SpecError(f"{package} cannot be imported: {error}", remedy) from error
