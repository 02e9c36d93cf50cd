"""The registry of schemes: help and README list each, and examples parse."""

from pathlib import Path

import pytest
from click.testing import CliRunner

from ckptavg.averaging import schemes
from ckptavg.averaging.schemes import SCHEMES
from ckptavg.cli import main

README = Path(__file__).parents[3] / "README.md"


@pytest.mark.parametrize("flag", ["--help", "--help-all"])
@pytest.mark.parametrize("command", ["average", "eval", "inspect"])
def test_help_has_a_line_per_scheme(command, flag):
    result = CliRunner().invoke(main, [command, flag], env={"COLUMNS": "80"})
    lines = result.output.splitlines()
    listed = [line.split("  ")[1] for line in lines if line.startswith("  ")]
    for kind in SCHEMES.values():
        if command == "inspect":
            assert kind.usage not in listed
        else:
            (line,) = [line for line in lines if line.startswith(f"  {kind.usage} ")]
            assert line.endswith(kind.summary)


@pytest.mark.parametrize("kind", SCHEMES.values(), ids=SCHEMES)
def test_scheme_kind_has_an_example_that_parses(kind):
    text = ":".join(filter(None, [kind.name, ",".join(kind.example)]))
    scheme = schemes.parse(text)
    assert (scheme.name, scheme.text) == (kind.name, text)


@pytest.mark.parametrize("kind", SCHEMES.values(), ids=SCHEMES)
def test_readme_names_each_scheme(kind):
    assert f"`{kind.name}" in README.read_text(encoding="utf-8").partition("## Schemes")[2]


@pytest.mark.parametrize("kind", SCHEMES.values(), ids=SCHEMES)
def test_scheme_kind_names_only_its_own_options(kind):
    assert set(kind.choices) <= set(kind.options)
    for option in kind.example:
        assert option.partition("=")[0] in kind.options
