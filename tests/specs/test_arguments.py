"""``key=value`` arguments, read as the functions that get them expect."""

import functools
from pathlib import Path
from typing import Literal

import pytest

from ckptavg.errors import SpecError
from ckptavg.specs.arguments import fit_arguments, parse_arguments, read_value


def fitted(function, pair):
    name = pair.partition("=")[0]
    return fit_arguments(function, parse_arguments([pair]))[name]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        *[(word, True) for word in ("yes", "on", "true", "True", "YES")],
        *[(word, False) for word in ("no", "off", "false", "False", "No")],
        *[(word, None) for word in ("none", "None", "null")],
        ("'no'", "no"),
        ("-2", -2),
        ("1,2", (1, 2)),
        ("[yes,no]", [True, False]),
        ("[a, b]", ["a", "b"]),
        ('{"a": true}', {"a": True}),
        ("a,b", "a,b"),
        ("007", "007"),
        ("{[]: 1}", "{[]: 1}"),
        ("(" * 3000, "(" * 3000),
        (r"'\d'", r"\d"),
    ],
)
def test_argument_without_a_type_is_read_as_a_literal(text, expected, recwarn):
    value = read_value(text)
    assert value == expected
    assert type(value) is type(expected)
    assert not recwarn.list


def data(train=False, norm="batch", width=3, rate=0.1, sizes=(1, 2), names=None):
    return train, norm, width, rate, sizes, names


@pytest.mark.parametrize(
    ("pair", "expected"),
    [
        ("train=no", False),
        ("train=1", True),
        ("norm=no", "no"),
        ("norm=3", "3"),
        ("norm='3'", "3"),
        ("norm=None", None),
        ("width=1e3", 1000),
        ("width=auto", "auto"),
        ("rate=inf", float("inf")),
        ("sizes=3", (3,)),
        ("names=no", False),
    ],
)
def test_argument_follows_type_of_default(pair, expected):
    value = fitted(data, pair)
    assert value == expected
    assert type(value) is type(expected)


@pytest.mark.parametrize("text", ["maybe", "2", "none", "train", ""])
def test_argument_with_bool_default_refuses_text(text):
    with pytest.raises(SpecError) as caught:
        fitted(data, f"train={text}")
    assert str(caught.value) == (
        f"train is expected to be yes or no (its default is False) but got {text!r}"
    )


def annotated(
    flag: bool,
    count: int,
    name: str,
    names: list[str],
    path: Path,
    pool: int | str = 1,
    mode: Literal["max", "min"] = "max",
    limit: float | None = None,
    old: "int" = None,  # noqa: RUF013
    unknown: "Unknown" = 0,  # noqa: F821
):
    return flag, count, name, names, path, pool, mode, limit, old, unknown


@pytest.mark.parametrize(
    ("pair", "expected"),
    [
        ("flag=off", False),
        ("count=3", 3),
        ("name=yes", "yes"),
        ("name=none", "none"),
        ("names=a,b", ["a", "b"]),
        ("names=no", ["no"]),
        ("names=[a,b]", ["a", "b"]),
        ("names=1", ["1"]),
        ("path=/data", Path("/data")),
        ("pool=3", 3),
        ("pool=avg", "avg"),
        ("mode=min", "min"),
        ("limit=none", None),
        ("limit=2", 2),
        ("old=none", None),
        ("unknown=yes", True),
    ],
)
def test_argument_follows_annotation(pair, expected):
    value = fitted(annotated, pair)
    assert value == expected
    assert type(value) is type(expected)


@pytest.mark.parametrize("pair", ["flag=maybe", "count=many", "mode=mid", "limit=no-one"])
def test_argument_against_its_annotation_is_an_error(pair):
    name, _, text = pair.partition("=")
    with pytest.raises(SpecError, match=f"{name} is expected to be .* but got '{text}'"):
        fitted(annotated, pair)


class Net:
    def __init__(self, bias: bool = True, **rest):
        self.bias, self.rest = bias, rest


def test_fit_arguments_takes_classes_partials_and_keywords():
    assert fitted(Net, "bias=no") is False
    assert fitted(Net, "depth=no") is False
    assert fitted(functools.partial(data, width=4), "train=no") is False
    assert fitted(print, "sep=no") == "no"


def test_fit_arguments_keeps_values_that_are_not_texts():
    assert fit_arguments(data, {"train": "maybe"}) == {"train": "maybe"}


@pytest.mark.parametrize("text", ["24x", "-1e", "1,5x"])
def test_argument_with_int_default_refuses_broken_numbers(text):
    def build(width=24):
        return width

    with pytest.raises(SpecError, match="width is expected to be int"):
        fit_arguments(build, parse_arguments([f"width={text}"]))
    assert fit_arguments(build, parse_arguments(["width=auto"])) == {"width": "auto"}
