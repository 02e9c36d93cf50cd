"""``python -m ckptavg``."""

import os
import sys


def _distrust_working_directory() -> None:
    """Take back the first place among modules that ``-m`` gave to the working directory.

    That directory may be untrusted: a ``torch.py`` there would be run. A directory that ckptavg
    itself comes from goes last instead, for the processes that load data. A model named
    ``package.module:factory`` asks for the working directory by itself.
    """
    try:
        directory = os.getcwd()  # noqa: PTH109 - pathlib is not to be imported yet
    except OSError:  # it has been removed
        directory = ""
    if getattr(sys.flags, "safe_path", False) or sys.path[:1] not in ([directory], [""]):
        return
    del sys.path[0]
    home = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))  # noqa: PTH120
    if home == directory:
        sys.path.append(directory)


_distrust_working_directory()

from ckptavg.cli import main  # noqa: E402

main(prog_name="ckptavg")
