"""Errors on the command line: one line each, with an exit code."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import click

from ckptavg.cli.wording import for_shell
from ckptavg.errors import CkptavgError, SpecError, UsageError
from ckptavg.errors.printable import escape_unseen, without_secrets
from ckptavg.errors.system import unreadable

_WHERE = "--debug shows where."


class Failure(click.ClickException):
    """Error of this package, shown by click in one line with the error's exit code."""

    def __init__(self, error: CkptavgError) -> None:
        text = str(error)
        if _is_of_users_code(error):
            text = str(CkptavgError(error.message, _WHERE))
        super().__init__(for_shell(text))
        self.exit_code = error.exit_code  # type: ignore[misc]


@contextmanager
def show_in_one_line(debug: bool) -> Iterator[None]:
    """Turn errors into click's, one line each; with ``debug`` the traceback is kept."""
    try:
        yield
    except (click.ClickException, click.exceptions.Exit):
        raise  # click's own
    except Exception as error:
        if debug:
            _make_printable(error)
            raise
        if isinstance(error, UsageError):
            raise click.UsageError(for_shell(str(error))) from error
        if isinstance(error, CkptavgError):
            raise Failure(error) from error
        raise Failure(_to_ckptavg_error(error)) from error


def _is_of_users_code(error: CkptavgError) -> bool:
    """Return True for the failure of users' code without a remedy."""
    is_caused = error.__cause__ is not None and not isinstance(error.__cause__, CkptavgError)
    return isinstance(error, SpecError) and is_caused and not error.remedy


def _make_printable(error: BaseException | None) -> None:
    """Escape the text of an error and of the causes, for Python's traceback."""
    visited: set[int] = set()
    waiting = [error]
    while waiting:
        error = waiting.pop()
        if error is None or id(error) in visited:
            continue
        visited.add(id(error))
        error.args = tuple(map(_printable_argument, error.args))
        waiting += [error.__cause__, error.__context__]


def _printable_argument(argument: object) -> object:
    """Escape an argument of an error if it is a text."""
    if not isinstance(argument, str):
        return argument
    return escape_unseen(without_secrets(argument), keep="\n\t")


def _to_ckptavg_error(error: Exception) -> CkptavgError:
    """Word the error for a failure in user code or in this package."""
    if isinstance(error, OSError) and error.filename is not None:
        return unreadable(error.filename, error)
    return CkptavgError(f"{type(error).__name__}: {error}", _WHERE)
