"""The registry of schemes: help and README list each, and examples parse."""

import contextlib
import math
from pathlib import Path

import pytest
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st

from ckptavg.averaging import schemes
from ckptavg.averaging.schemes import SCHEMES, RunRecord
from ckptavg.cli import main
from ckptavg.errors import RunError, UsageError

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


words = st.sampled_from([
    *SCHEMES, *(option for kind in SCHEMES.values() for option in kind.options), "true", "step",
    "cosine", "0.9", "0.1", "10%", "1e-320", "1e308", "nan", "inf", "-1", "9" * 5000, "0.05/0.1",
    "val_loss", "max", "", "\n", "²",
])  # fmt: skip
pieces = st.lists(st.one_of(words, st.sampled_from(":=,%/ @"), st.text(max_size=3)), max_size=9)


@settings(derandomize=True, deadline=None, max_examples=150)
@given(pieces.map("".join))
def test_parse_raises_only_its_own_error(text):
    with contextlib.suppress(UsageError):
        assert schemes.parse(text).text == text.strip()


values = st.sampled_from(["0.9", "0.1", "10%", "0.25", "1e-299", "1e308", "1", "5", "cosine"])
steps = st.lists(st.floats(0, 1e300), min_size=1, max_size=6, unique=True).map(sorted)


@settings(derandomize=True, deadline=None, max_examples=150)
@given(st.sampled_from(list(SCHEMES.values())), values, steps)
def test_coefficients_are_finite_or_an_error(kind, value, steps):
    options = [f"{option.partition('=')[0]}={value}" for option in kind.example]
    widths = tuple((0.05, 0.1, 0.2)[i % 3] for i in range(len(steps)))
    record = RunRecord(tuple(steps), ({"0.9": 1.0, "5": 2.0},) * len(steps), widths)
    try:
        scheme = schemes.parse(":".join(filter(None, [kind.name, ",".join(options)])))
        found = scheme.coefficients(record)
    except (UsageError, RunError):
        return
    assert all(map(math.isfinite, schemes.normalize(found)))
    assert isinstance(scheme.note(found, record), str)
