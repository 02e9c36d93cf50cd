"""Notes that are collected for whoever called, beside those that a logger's handlers get."""

from __future__ import annotations

import contextlib
import logging
import threading

import pytest

from ckptavg.errors.notes import collect_notes, log


class Kept(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.texts: list[str] = []

    def emit(self, record):
        self.texts.append(record.getMessage())


@pytest.fixture
def handler():
    handler = Kept()
    log.addHandler(handler)
    yield handler
    log.removeHandler(handler)


def test_collect_notes_leaves_handlers_as_before(handler):
    before = log.level
    with collect_notes() as notes:
        log.debug("detail")
        log.info("%d samples", 3)
        log.info("%d samples", 3)
        log.warning("careful\nnow")
    log.info("afterwards")
    assert notes == ["3 samples", "careful now"]
    assert handler.texts == ["careful now"]  # the root's level is WARNING
    assert log.level == before


def fail_with_a_note():
    with contextlib.suppress(ValueError), collect_notes() as notes:
        log.info("within")
        raise ValueError
    return notes


def test_collect_notes_nests_and_ends_with_error():
    with collect_notes() as outer:
        inner = fail_with_a_note()
        log.info("after")
    assert (outer, inner) == (["within", "after"], ["within"])
    assert not log.isEnabledFor(logging.INFO)


def test_collect_notes_ignores_other_threads():
    with collect_notes() as notes:
        thread = threading.Thread(target=lambda: log.info("from elsewhere"))
        thread.start()
        thread.join()
    assert notes == []


def test_collect_notes_works_with_logging_disabled(handler):
    logging.disable(logging.CRITICAL)
    try:
        with collect_notes() as notes:
            log.warning("hello")
    finally:
        logging.disable(logging.NOTSET)
    assert (notes, handler.texts) == (["hello"], [])
