"""Names and patterns that a mistyped one may have been meant for."""

from __future__ import annotations

import fnmatch

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ckptavg.errors.spelling import close_names, close_patterns, did_you_mean

METRICS = ["val_acc", "val_loss", "train_loss", "epoch"]
TENSORS = [
    "backbone.stem.weight",
    "backbone.layer1.0.conv.weight",
    "backbone.layer1.0.bn.weight",
    "backbone.layer1.0.bn.running_mean",
    "head.fc.weight",
    "head.fc.bias",
]


@pytest.mark.parametrize(
    ("name", "close"),
    [
        ("val_ac", ["val_acc"]),
        ("VAL_ACC", ["val_acc"]),
        ("acc", ["val_acc"]),
        ("val/acc", ["val_acc"]),
        ("loss", ["val_loss", "train_loss"]),
        ("epohc", ["epoch"]),
        ("bleu", []),
        ("", []),
    ],
)
def test_close_names_finds_mistyped_name(name, close):
    found = close_names(name, METRICS)
    assert found[: len(close)] == close
    assert close or not found


def test_close_names_matches_end_of_dotted_name():
    assert close_names("model.fc", ["fc", "stem"]) == ["fc"]


@pytest.mark.parametrize(
    ("pattern", "close"),
    [
        ("backbne.*", ["backbone.*"]),
        ("*.wieght", ["*.weight"]),
        ("Head.*", ["head.*"]),
        ("fc", ["*.fc.*"]),
        ("head", ["head.*"]),
        ("head.fc", ["head.fc.*"]),
        ("bn*", ["*.bn.*"]),
        ("module.head.*", ["head.*"]),
        ("model.backbone.stem.weight", ["backbone.stem.weight"]),
        ("backbone.layer2.*", ["backbone.layer1.*"]),
        ("layer2*", ["*.layer1*"]),
        ("runing_*", ["*.running_mean*"]),
        ("transformer.*", []),
        ("*", []),
        ("[ab]", []),
    ],
)
def test_close_patterns_finds_mistyped_pattern(pattern, close):
    assert close_patterns(pattern, TENSORS)[:1] == close


@settings(deadline=None)
@given(st.text("abd.*?[]_1", max_size=12), st.lists(st.text("abd._1", max_size=9)))
def test_close_patterns_offers_only_matching(pattern, names):
    for offered in close_patterns(pattern, names):
        assert any(fnmatch.fnmatchcase(name, offered) for name in names)


@settings(deadline=None)
@given(st.text(), st.lists(st.text()))
def test_close_names_offers_only_known(name, known):
    assert set(close_names(name, known)) <= set(known)


def test_close_names_skips_hostile_lengths():
    assert close_names("a" * 10**6, ["a" * 10**6]) == []
    assert close_names("weight", ["w" * 10**6, "weigth"]) == ["weigth"]


@pytest.mark.parametrize(
    ("names", "words"),
    [
        ([], ""),
        (["a"], "Did you mean a?"),
        (["a", "b"], "Did you mean a or b?"),
        (["a", "b", "c"], "Did you mean a, b or c?"),
    ],
)
def test_did_you_mean_lists_names(names, words):
    assert did_you_mean(names) == words
