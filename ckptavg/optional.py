"""Import of optional packages."""

from __future__ import annotations

import importlib
from typing import Any

from ckptavg.errors import SpecError


def import_optional(module: str, package: str, extra: str = "") -> Any:
    """Import a module of an optional package.

    Args:
        module: Dotted name of the module.
        package: Name under which pip installs the package.
        extra: Extra of ckptavg that installs the package, and what else is needed with it.

    Returns:
        The module.

    Raises:
        SpecError: The module cannot be imported.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        # The package may be there, and a package that it imports not.
        missing = (error.name or "").partition(".")[0]
        elsewhere = missing not in ("", module.partition(".")[0])
        if extra:
            remedy = f'Install it with pip install "ckptavg[{extra}]".'
        elif isinstance(error, ModuleNotFoundError) and elsewhere:
            remedy = f"Install {missing}, which it needs."
        else:
            remedy = f"Install it with pip install {package}."
        raise SpecError(f"{package} cannot be imported: {error}", remedy) from error
