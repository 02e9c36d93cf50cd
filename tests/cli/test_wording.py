"""Python's arguments in messages, as flags on the command line."""

import ast
import functools
import io
import logging
import re
from collections.abc import Iterator
from pathlib import Path

import click
import pytest
from fuzz.watch import watched
from rich.console import Console

import ckptavg
from ckptavg.cli import main
from ckptavg.cli.console import Report
from ckptavg.cli.error_lines import show_in_one_line
from ckptavg.cli.wording import flags_of, for_shell
from ckptavg.errors import OutputError, UsageError

PACKAGE = Path(ckptavg.__file__).parent


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("Pass `overwrite=True` to replace it.", "Pass --overwrite to replace it."),
        ("Name an entry: `key='state.my model'`.", "Name an entry: --key 'state.my model'."),
        ("Choose by `key`.", "Choose by --key."),
        ("Leave it out: `exclude='*.bias'`.", "Leave it out: --exclude '*.bias'."),
        ("`exclude_tensors=['a.*', 'b']`", "--exclude 'a.*' --exclude b"),
        ("`update_bn(exclude='*')` keeps them", "--bn-exclude '*' keeps them"),
        ("`on_nonfinite='keep'`", "--on-nonfinite keep"),
        ("`weights=[1, 2]`", "--weights 1 --weights 2"),
        ("`forward=fn` and `task=Task`", "--forward path/file.py:fn and --task path/file.py:Task"),
        ("`batch_size=N`", "--batch-size N"),
        ("`.last()` or `.every(2)`", "--last or --every 2"),
        ("`.last('10%')`", "--last 10%"),
        ("`.cycle(4)`, `.cycle(4, 1)`", "--cycle 4, --cycle 4:1"),
        ("`.best(3, metric='val/acc')`", "--best 3 --metric val/acc"),
        ("`.steps(10, 20)`", "--from 10 --to 20"),
        ("`ckptavg inspect` shows it", "`ckptavg inspect` shows it"),
        ("data with `targets`, `open(x)`", "data with `targets`, `open(x)`"),
        ("a file named `key='x", "a file named `key='x"),
    ],
    ids=lambda value: re.sub(r"\W+", "-", value),
)
def test_wording_of_options(text: str, shown: str) -> None:
    assert for_shell(text) == shown


@pytest.mark.parametrize("name", ["-" * 100_000 + "1", "f(" * 100_000, "key=" * 50_000])
def test_wording_leaves_names_out_of_files_alone(name: str, tmp_path: Path) -> None:
    with watched(tmp_path):
        assert for_shell(f"no tensor `{name}`") == f"no tensor `{name}`"


@functools.cache
def spans_of_messages() -> list[tuple[str, str]]:
    """List what stands between backticks in the library's strings, docstrings aside."""
    spans: list[tuple[str, str]] = []
    for path in sorted(PACKAGE.rglob("*.py")):
        if path.is_relative_to(PACKAGE / "cli"):
            continue
        tree = ast.parse(path.read_text(encoding="utf-8"))
        docstrings = {
            id(node.value)
            for node in ast.walk(tree)
            if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        }
        pieces = {
            id(piece)
            for node in ast.walk(tree)
            if isinstance(node, ast.JoinedStr)
            for piece in node.values
        }
        for node in ast.walk(tree):
            if id(node) in docstrings or id(node) in pieces:
                continue
            text = text_of(node)
            spans += [(path.name, span) for span in re.findall(r"`([^`]+)`", text)]
    return spans


def text_of(node: ast.AST) -> str:
    """Return a string's text, with a name in each place that is filled in."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.JoinedStr):
        values = (text_of(value) or "VALUE" for value in node.values)
        return "".join(values).replace("'VALUE'", "VALUE")
    return ""


def test_wording_knows_every_argument_in_messages() -> None:
    arguments = [
        (name, span) for name, span in spans_of_messages() if "=" in span or span.startswith(".")
    ]
    assert [a for a in arguments if flags_of(a[1]) is None] == []


def commands_of(group: click.Group) -> Iterator[click.Command]:
    """List the commands of a group, those of groups in it included."""
    for command in group.commands.values():
        if isinstance(command, click.Group):
            yield from commands_of(command)
        else:
            yield command


def test_wording_gives_flags_that_exist() -> None:
    options = {
        option
        for command in commands_of(main)
        for parameter in command.params
        if isinstance(parameter, click.Option)
        for option in (*parameter.opts, *parameter.secondary_opts)
    }
    for name, span in spans_of_messages():
        words = (flags_of(span) or "").split()
        flags = [word for word in words if word.startswith("--")]
        assert options.issuperset(flags), (name, span)


@pytest.mark.parametrize(("error", "code"), [(OutputError, 1), (UsageError, 2)])
def test_wording_of_errors_on_the_command_line(
    error: type[OutputError] | type[UsageError], code: int
) -> None:
    with pytest.raises(click.ClickException) as shown, show_in_one_line(debug=False):
        raise error("out.pt exists", "Pass `overwrite=True` to replace it.")
    assert shown.value.message == "out.pt exists. Pass --overwrite to replace it."
    assert shown.value.exit_code == code


def test_wording_of_notes_on_the_command_line() -> None:
    stderr = io.StringIO()
    report = Report(stderr=Console(file=stderr, width=200))
    with report.notes():
        logging.getLogger("ckptavg").warning("a scale is left out: `exclude='*.scale'`")
    assert stderr.getvalue() == "warning: a scale is left out: --exclude '*.scale'\n"
