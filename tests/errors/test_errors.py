"""Errors: one line each, with an exit code and a remedy."""

import pytest

from ckptavg import errors


def every_error(kind=errors.CkptavgError):
    return [kind] + [e for child in kind.__subclasses__() for e in every_error(child)]


@pytest.mark.parametrize("kind", every_error())
def test_exit_code_is_2_for_usage_and_1_otherwise(kind):
    assert kind("it failed").exit_code == (2 if issubclass(kind, errors.UsageError) else 1)


def test_usage_error_is_value_error():
    assert issubclass(errors.UsageError, ValueError)


def test_no_weights_error_is_checkpoint_error():
    assert issubclass(errors.NoWeightsError, errors.CheckpointError)


def test_message_and_remedy_make_one_line():
    error = errors.CkptavgError("a file\nwith a\tbad   name", "Rename\nit.")
    assert str(error) == "a file with a bad name. Rename it."
    assert (error.message, error.remedy) == ("a file with a bad name", "Rename it.")


@pytest.mark.parametrize("control", ["\x1b[31m", "\r", "\x07", "\x9b2J", "\u202e"])
def test_message_escapes_terminal_controls(control):
    error = errors.CkptavgError(f"tensor {control}x differs", f"Leave {control}x out.")
    assert str(error).isprintable()


@pytest.mark.parametrize("message", ["It failed.", "was it swapped?", "it failed!"])
def test_message_ending_sentence_gets_no_second_stop(message):
    assert str(errors.CkptavgError(message, "Look.")) == f"{message} Look."


def test_message_stands_alone_without_remedy():
    assert str(errors.CkptavgError("it failed")) == "it failed"


@pytest.mark.parametrize(
    ("count", "expected"),
    [(1, "n0"), (3, "n0, n1, n2"), (4, "n0, n1, n2 and 1 more"), (90, "n0, n1, n2 and 87 more")],
)
def test_first_few_says_how_many_more(count, expected):
    assert errors.first_few([f"n{i}" for i in range(count)]) == expected
