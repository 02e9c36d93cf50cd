"""Text that a terminal may show."""

import json
import logging
import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ckptavg.display.json_text import json_text
from ckptavg.errors.printable import escape_unseen, printable, split_directory, without_secrets

STEERING = ["\u202e", "\u2066", "\u200b", "\u200f", "\u2060", "\ufeff", "\x1b", "\x9b", "\x7f",
            "\u2028", "\udc9b", "\U000e0041", "\u00ad", "\u034f", "\ufe0f", "\u3164"]  # fmt: skip


@pytest.mark.parametrize("character", STEERING)
def test_printable_escapes_terminal_controls(character):
    shown = printable(f"a{character}b")
    assert character not in shown
    assert shown.isprintable()
    assert printable(shown) == shown


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("w\u202ecod.exe", r"w\u202ecod.exe"),
        ("\x9b2J", r"\x9b2J"),
        ("caf\udce9.pt", r"caf\udce9.pt"),
        ("\U000e0041", r"\U000e0041"),
        ("Grüße, 層.weight – Δ²", "Grüße, 層.weight – Δ²"),
        (r"C:\new\u.pt", r"C:\new\u.pt"),
    ],
)
def test_printable_escapes_as_python_and_keeps_other_text(text, shown):
    assert printable(text) == shown


@given(st.text(st.characters() | st.sampled_from(STEERING)))
def test_json_text_round_trips_and_escapes_unseen(name):
    text = json_text({name: [1.5, float("nan")]})
    assert json.loads(text) == {name: [1.5, None]}
    assert text.encode().decode() == text
    kinds = {unicodedata.category(c) for c in text.replace("\n", "")}
    assert kinds.isdisjoint({"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"})


@given(st.text(), st.text())
def test_escape_unseen_keeps_names_different(name, other):
    alike = escape_unseen(name) == escape_unseen(other)
    assert alike == (name == other) or "\\" in name + other


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("s3://me:secret@host/run is empty", "s3://host/run is empty"),
        ("'https://me:secret@host:8080/a.pt?sig=secret' is not there",
         "'https://host:8080/a.pt' is not there"),
        ("https://secret@host/a.pt, http://host?sig=secret", "https://host/a.pt, http://host"),
        ("a ftp://me:sec@ret@host/x and abfs://box@store/y?v=1",
         "a ftp://host/x and abfs://box@store/y?v=1"),
        ("mail me@host about ://", "mail me@host about ://"),
    ],
)  # fmt: skip
def test_without_secrets_strips_urls(text, shown):
    assert without_secrets(text) == shown
    assert printable(text) == shown
    assert json.loads(json_text([text])) == [shown]


def test_log_is_printable_for_any_handler(caplog):
    with caplog.at_level(logging.INFO, "ckptavg"):
        logging.getLogger("ckptavg").info("%s of %d", "a\u202eb\n\x1b[2J", 3)
    assert caplog.messages == [r"a\u202eb \x1b[2J of 3"]


def test_printable_cuts_long_texts():
    assert len(printable("\u202e" * 10**6)) < 10_000
    assert len(printable("a://" * 10**5 + "?" * 10**5)) < 10_000


@pytest.mark.parametrize(
    ("paths", "directory", "names"),
    [
        (["/a/b/x.pt", "/a/b/y.pt"], "/a/b", ["x.pt", "y.pt"]),
        (["/a/b/x.pt", "/a/c/x.pt"], "/a", ["b/x.pt", "c/x.pt"]),
        (["/a/bc/x.pt", "/a/b/x.pt"], "/a", ["bc/x.pt", "b/x.pt"]),
        (["a/x.pt", "/a/x.pt"], "", ["a/x.pt", "/a/x.pt"]),
        (["s3://box/run/x.pt", "s3://box/run/x.pt"], "s3://box/run", ["x.pt", "x.pt"]),
        (["x.pt"], "", ["x.pt"]),
        ([], "", []),
    ],
)
def test_split_directory_takes_shared_parent(paths, directory, names):
    assert split_directory(paths) == (directory, names)
