"""Tables in lines of a width: what leaves, what is shortened, what goes on in further lines."""

import re

import pytest

from ckptavg.display.table_html import BEST_COLOR, table_html
from ckptavg.display.table_layout import lay_out, table_text, wrap_note
from ckptavg.display.tables import Cell, Column, Row, Table, rows_of_texts


def test_table_aligns_numbers_right_and_text_left():
    table = Table("t", (Column("name", "name"), Column("kind"), Column("n", "number")),
                  rows_of_texts([("a", "xyz", "5"), ("層", "x", "10")]))  # fmt: skip
    assert table_text(table).splitlines() == [
        "t",
        "name  kind   n",
        "──────────────",
        "a     xyz    5",
        "層    x     10",
    ]


def test_table_drops_columns_in_turn_and_names_them():
    columns = (Column("name", "name"), Column("second", "number", 2), Column("stays", "number"),
               Column("first", "number", 1))  # fmt: skip
    table = Table("", columns, rows_of_texts([("abcdef", "1", "2", "3")]))
    heads = {width: table_text(table, width).splitlines()[0].split() for width in range(12, 40)}
    for width, head in heads.items():
        if width >= 6 + 2 + 6 + 2 + 5 + 2 + 5:
            assert head == ["name", "second", "stays", "first"]
        elif width >= 6 + 2 + 6 + 2 + 5:
            assert head == ["name", "second", "stays"]
        else:
            assert head == ["name", "stays"]
    below = table_text(table, 20).replace("\n  ", " ").splitlines()[-1]
    assert below == "not shown at this width: second, first"


def test_table_shortens_names_before_dropping_columns():
    columns = (Column("name", "name"), Column("a", "number", 1, shortens=20),
               Column("b", "number", 2, shortens=10))  # fmt: skip
    table = Table("", columns, rows_of_texts([("n" * 30, "12345", "12345")]))
    shown = {width: table_text(table, width).splitlines()[2].split() for width in (44, 36, 33, 17)}
    assert {width: (len(cells[0]), len(cells)) for width, cells in shown.items()} == {
        44: (30, 3), 36: (22, 3), 33: (26, 2), 17: (10, 2),
    }  # fmt: skip
    assert len(table_text(table, 16).splitlines()[2].split()) == 1


@pytest.mark.parametrize("width", range(24, 90, 7))
def test_table_wraps_prose_between_words(width):
    why = "a run of its own: it holds more than the models and is left out"
    table = Table("", (Column("left out", "name"), Column("why", "prose")),
                  rows_of_texts([("some_run/checkpoint-10", why), ("b", "short")]))  # fmt: skip
    lines = table_text(table, width).splitlines()
    assert all(len(line) <= width for line in lines)
    start = lines[0].index("why")
    told = [line[start:].strip() for line in lines[2:]]
    assert " ".join(told) == f"{why} short"
    assert table_text(table).count("\n") == 3


def test_table_marks_have_style_and_star():
    rows = (Row((Cell("a"), Cell("1"))), Row((Cell("b", "best"), Cell("2", "significant")), True))
    lines = lay_out(Table("t", (Column("x", "name"), Column("y", "number")), rows), 80)
    assert ["".join(piece.text for piece in line) for line in lines] == [
        "t", "  x  y", "──────", "  a  1", "* b  2",
    ]  # fmt: skip
    styled = [(piece.text, piece.style) for line in lines for piece in line if piece.style]
    assert styled == [("t", "title"), ("  x  y", "head"), ("──────", "rule"), ("* ", "best"),
                      ("b", "best"), ("2", "significant")]  # fmt: skip


def test_wrap_note_breaks_no_word():
    note = "note: blocks.8.num_batches_tracked differs between the checkpoints"
    assert wrap_note(note, None) == [note]
    assert wrap_note(note, 30) == [
        "note:", "  blocks.8.num_batches_tracked", "  differs between the", "  checkpoints",
    ]  # fmt: skip


def test_table_escapes_terminal_controls():
    table = Table(
        "\x1b[2J", (Column("a\x9b", "name"),), rows_of_texts([("b\u202e<b>&",)]), ("\x07",)
    )
    for drawn in (table_text(table, 80), table_html(table)):
        assert all(c.isprintable() or c == "\n" for c in drawn)
    assert r"b\u202e&lt;b&gt;&amp;" in table_html(table)


def test_table_html_has_all_cells_and_contrast():
    rows = (Row((Cell("a"), Cell("1"))), Row((Cell("b", "best"), Cell("2", "significant")), True))
    columns = (Column("x", "name"), Column("y", "number", 1))
    drawn = table_html(Table("t & u", columns, rows, ("below",), "bold: significant"))
    assert re.findall(r">([^<>\n]+)<", drawn) == [
        "t &amp; u", "x", "y", "a", "1", "* b", "2", "below", "bold: significant",
    ]  # fmt: skip
    channels = [int(BEST_COLOR[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    # WCAG 2's relative luminance and contrast.
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    luminance = sum(w * c for w, c in zip((0.2126, 0.7152, 0.0722), linear, strict=True))
    assert min(1.05 / (luminance + 0.05), (luminance + 0.05) / 0.05) >= 4.5
