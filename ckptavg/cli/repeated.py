"""Options of a command as typed, for the line of another command."""

from __future__ import annotations

from collections.abc import Collection

import click

TYPED = "ckptavg.cli.typed"
"""Name under which a context keeps the arguments as typed."""


def repeat_options(
    context: click.Context, other: click.Command, leave_out: Collection[str] = ()
) -> dict[str, list[str]]:
    """Return the words of the given options that another command has under the same name.

    Args:
        context: Context of a command that was parsed.
        other: The other command.
        leave_out: Names of parameters that are not repeated.

    Returns:
        The words by parameter, in the order of the command's help.
    """
    known = {option for parameter in other.params for option in parameter.opts}
    typed = list(context.meta[TYPED])
    values, _, _ = context.command.make_parser(context).parse_args(typed)
    words: dict[str, list[str]] = {}
    for parameter in context.command.params:
        name = parameter.name or ""
        flag = max(parameter.opts, key=len)
        given = isinstance(parameter, click.Option) and name in values
        if not given or name in leave_out or flag not in known:
            continue
        value = values[name]
        if isinstance(value, (list, tuple)):
            words[name] = []
            for item in value:
                words[name] += [flag, str(item)]
        elif isinstance(value, str):
            words[name] = [flag, value]
        else:
            words[name] = [flag]
    return words
