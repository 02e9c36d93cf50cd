"""Notes of other libraries while a command runs."""

import logging
import os
from types import SimpleNamespace

import pytest

from ckptavg.cli.libraries import silence_libraries

WARNING, ERROR = logging.WARNING, logging.ERROR


@pytest.fixture(autouse=True)
def loggers(monkeypatch):
    """Loggers as the libraries set them up when they are imported."""
    monkeypatch.delenv("TRANSFORMERS_VERBOSITY", raising=False)
    found = SimpleNamespace(
        transformers=logging.getLogger("transformers"), deepspeed=logging.getLogger("DeepSpeed")
    )
    before = [(logger, logger.level) for logger in vars(found).values()]
    for logger, _ in before:
        logger.setLevel(logging.WARNING)
    yield found
    for logger, level in before:
        logger.setLevel(level)


def said(logger):
    """The levels at which a logger says something."""
    heard = []
    handler = logging.Handler()
    handler.emit = lambda record: heard.append(record.levelno)
    logger.addHandler(handler)
    try:
        for level in (logging.INFO, WARNING, ERROR):
            logger.log(level, "a note")
    finally:
        logger.removeHandler(handler)
    return heard


def test_silence_libraries_lets_errors_through(loggers):
    with silence_libraries(verbose=False):
        assert said(loggers.transformers) == said(loggers.deepspeed) == [ERROR]
        assert said(logging.getLogger("transformers.a.module")) == [ERROR]
        assert os.environ["TRANSFORMERS_VERBOSITY"] == "error"
    assert said(loggers.transformers) == said(loggers.deepspeed) == [WARNING, ERROR]
    assert "TRANSFORMERS_VERBOSITY" not in os.environ


def test_silence_libraries_holds_when_deepspeed_sets_its_level(loggers):
    with silence_libraries(verbose=False):
        loggers.deepspeed.setLevel(logging.INFO)
        assert said(loggers.deepspeed) == [ERROR]


def test_silence_libraries_restores_levels_after_an_error(loggers):
    loggers.transformers.setLevel(logging.INFO)
    with pytest.raises(ZeroDivisionError), silence_libraries(verbose=False):
        raise ZeroDivisionError
    assert loggers.transformers.level == logging.INFO


def test_silence_libraries_does_nothing_when_verbose(loggers):
    with silence_libraries(verbose=True):
        assert said(loggers.transformers) == said(loggers.deepspeed) == [WARNING, ERROR]
        assert "TRANSFORMERS_VERBOSITY" not in os.environ


def test_silence_libraries_respects_transformers_verbosity(loggers, monkeypatch):
    monkeypatch.setenv("TRANSFORMERS_VERBOSITY", "info")
    loggers.transformers.setLevel(logging.INFO)
    with silence_libraries(verbose=False):
        assert said(loggers.transformers) == [logging.INFO, WARNING, ERROR]
        assert said(loggers.deepspeed) == [ERROR]
    assert os.environ["TRANSFORMERS_VERBOSITY"] == "info"
