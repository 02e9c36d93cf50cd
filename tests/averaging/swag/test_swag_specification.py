"""Options of SWAG as texts and as arguments."""

import pytest

from ckptavg.averaging.swag.specification import Swag, parse_swag
from ckptavg.errors import UsageError


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("swag", Swag(20, 10, None, 0)),
        ("swag:", Swag()),
        ("swag:samples=3", Swag(samples=3)),
        (" swag:rank=4, scale=2, seed=7,samples=5 ", Swag(5, 4, 2.0, 7)),
        ("swag:rank=0", Swag(rank=0)),
        ("swag:scale=0", Swag(scale=0.0)),
        ("swag:scale=1e-2", Swag(scale=0.01)),
    ],
)
def test_parse_swag_reads_options(text, expected):
    assert parse_swag(text) == expected


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("swag:sample=3", "but got 'sample=3'. Did you mean samples=3?"),
        ("swag:Rank=3", "but got 'Rank=3'. Did you mean rank=3?"),
        ("swag:rank", "but got 'rank'. Did you mean rank=...?"),
        ("swag:xyz=1", "samples=..., rank=..., scale=..., seed=... but got 'xyz=1'"),
        ("swag:rank=3,rank=4", "but got 'rank=4'. Give rank once."),
        ("swag:rank=x", "rank of swag is expected to be a number but got 'x'"),
        ("swag:samples=1_0", "samples of swag is expected to be a number but got '1_0'"),
        ("swag:samples=2.5", "samples of swag is expected to be a number but got '2.5'"),
        ("swag:seed=-1", "seed of swag is expected to be a number but got '-1'"),
        ("swag:samples=0", "samples of swag is expected to be a whole number from 1 on but is 0"),
        ("swag:rank=1", "but is 1: a covariance needs two columns. rank=0 samples from the diag"),
        ("swag:scale=-1", "scale of swag is expected to be 0 or more but is -1.0"),
        ("swag:scale=nan", "scale of swag is expected to be 0 or more but is nan"),
        ("swag:scale=inf", "scale of swag is expected to be 0 or more but is inf"),
    ],
)
def test_parse_swag_refuses_options(text, message):
    with pytest.raises(UsageError) as error:
        parse_swag(text)
    assert message in str(error.value)


@pytest.mark.parametrize(
    "options",
    [{"samples": True}, {"samples": 2.0}, {"rank": -1}, {"seed": "1"}, {"scale": "1"}],
    ids=str,
)
def test_swag_refuses_values_of_other_types(options):
    with pytest.raises(UsageError, match="of swag is expected to be"):
        Swag(**options)


def test_swag_has_scale_of_the_paper():
    assert Swag().covariance_scale == 0.5
    assert Swag(rank=0).covariance_scale == 1.0
    assert Swag(rank=0, scale=0.25).covariance_scale == 0.25


def test_swag_columns_are_those_of_checkpoints_there_are():
    assert [Swag(rank=10).columns(count) for count in (2, 10, 11)] == [2, 10, 10]
    assert Swag(rank=0).columns(5) == 0


def test_swag_title_names_options_that_are_not_default():
    assert Swag().title == "SWAG ensemble of 20"
    assert Swag(5, 3, 1.0, 2).title == "SWAG ensemble of 5 (rank 3, scale 1, seed 2)"
