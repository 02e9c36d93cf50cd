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


def test_notes_are_collected_and_handlers_get_what_they_got_before(handler):
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


def test_collections_may_be_nested_and_end_with_an_error():
    with collect_notes() as outer:
        inner = fail_with_a_note()
        log.info("after")
    assert (outer, inner) == (["within", "after"], ["within"])
    assert not log.isEnabledFor(logging.INFO)


def test_other_threads_notes_are_theirs():
    with collect_notes() as notes:
        thread = threading.Thread(target=lambda: log.info("from elsewhere"))
        thread.start()
        thread.join()
    assert notes == []


def test_a_switched_off_logger_stays_silent(handler):
    logging.disable(logging.CRITICAL)
    try:
        with collect_notes() as notes:
            log.warning("hello")
    finally:
        logging.disable(logging.NOTSET)
    assert (notes, handler.texts) == (["hello"], [])
