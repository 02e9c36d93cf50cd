"""Help in two sizes: common options, and all options in groups."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from typing import Any

import click

EVERYWHERE = "Everywhere"
"""The group of the options that every command has; it stands last."""

OWN_CODE = """\
An own model and own data are functions of a Python file:

\b
  # train.py                            # --model train.py:model
  def model(width=64):                  # --model-arg width=128
      return Net(width)
\b
  def data(train=False):                # --data train.py:data
      return MyDataset(train=train)     # --train-data train.py:data
                                        # --train-data-arg train=true

K=V is given to that function: numbers, true, false, yes, no, none, lists and quoted text are read
as such, all else is text. Data is a Dataset or a loader of (input, label) batches."""
"""How the functions look that --model and --data name."""

OWN_CODE_HINT = (
    "It also shows what functions of your own look like, which --model-arg K=V and the like give "
    "arguments."
)


class GroupedOption(click.Option):
    """Option with a group and a size of the help.

    Args:
        group: Title of its group.
        common: Whether the short help shows it.
        values: Forms of its value, each with a line on what it means; a table of the help's own.
    """

    def __init__(
        self,
        *args: Any,
        group: str,
        common: bool = False,
        values: Sequence[tuple[str, str]] = (),
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self.group = group
        self.common = common
        self.values = values


class GroupedCommand(click.Command):
    """Command with a short help and a full one, which takes no file name for an option."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.params.append(
            click.Option(
                ["--help-all"], is_flag=True, is_eager=True, expose_value=False,
                callback=_show_full_help, help="Show all options and exit.",
            )
        )  # fmt: skip

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Refuse options that are names of files: the shell's ``*`` hands on any name there is.

        Raises:
            click.UsageError: An argument could be either.
        """
        if ctx.resilient_parsing:
            return super().parse_args(ctx, args)
        for arg in args:
            if arg.startswith("-") and os.path.lexists(arg):
                raise click.UsageError(
                    f"{arg} is the name of a file in this directory, and would be taken for an "
                    "option. Write ./* for * to name files, or rename that file.",
                    ctx,
                )
            if arg == "--":
                break
        return super().parse_args(ctx, args)

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the common options, and how to see the rest."""
        records = []
        further: Counter[str] = Counter()
        for option in self._options(ctx):
            record = option.get_help_record(ctx)
            if record is None:
                continue
            if option.common:
                records.append(record)
            else:
                further[option.group] += 1
        with formatter.section("Options"):
            formatter.write_dl([*records, ("-h, --help", "Show this message and exit.")])
        self._write_values(ctx, formatter)
        titles = [group.partition(" (")[0].lower() for group in further]
        text = f"{ctx.command_path} --help-all shows {further.total()} more: {', '.join(titles)}."
        if self._runs_a_model(ctx):
            text += f" {OWN_CODE_HINT}"
        formatter.write_paragraph()
        formatter.write_text(text)

    def format_full_help(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write all options in groups, in the order of each group's first option."""
        self.format_usage(ctx, formatter)
        self.format_help_text(ctx, formatter)
        groups: dict[str, list[tuple[str, str]]] = {}
        for option in self._options(ctx):
            record = option.get_help_record(ctx)
            if record is not None:
                groups.setdefault(option.group, []).append(record)
        own_options = groups.setdefault(EVERYWHERE, [])
        own_options += [
            ("-h, --help", "Show the options that most people use and exit."),
            ("--help-all", "Show this message and exit."),
        ]
        groups[EVERYWHERE] = groups.pop(EVERYWHERE)
        for group, records in groups.items():
            with formatter.section(group):
                formatter.write_dl(records)
        self._write_values(ctx, formatter)
        if self._runs_a_model(ctx):
            with formatter.section("Own code"):
                formatter.write_text(OWN_CODE)

    def _write_values(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the tables of options that list the forms of their values."""
        for option in self._options(ctx):
            if option.values:
                with formatter.section(f"Values of {option.opts[0]}"):
                    formatter.write_dl(option.values)

    def _runs_a_model(self, ctx: click.Context) -> bool:
        return any(option.name == "model_spec" for option in self._options(ctx))

    def _options(self, ctx: click.Context) -> list[GroupedOption]:
        return [option for option in self.get_params(ctx) if isinstance(option, GroupedOption)]


class CommandGroup(click.Group):
    """Commands whose summaries are listed in full."""

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write each command with the first sentence of its help, however long."""
        del ctx
        rows = [
            (name, command.get_short_help_str(limit=10_000))
            for name, command in self.commands.items()
        ]
        with formatter.section("Commands"):
            formatter.write_dl(rows)


def _show_full_help(ctx: click.Context, option: click.Parameter, value: bool) -> None:
    """Print the full help if requested, and end the command."""
    del option
    if not value or ctx.resilient_parsing or not isinstance(ctx.command, GroupedCommand):
        return
    formatter = ctx.make_formatter()
    ctx.command.format_full_help(ctx, formatter)
    click.echo(formatter.getvalue().rstrip("\n"), color=ctx.color)
    ctx.exit()
