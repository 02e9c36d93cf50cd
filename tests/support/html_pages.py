"""HTML pages as a reader of them sees them: parsed, with checks that they are whole and inert."""

from __future__ import annotations

import re
from html.parser import HTMLParser

# Elements that have no end.
_VOID = {"meta", "br", "hr", "img", "link", "input", "col", "base"}
# Elements of which a report has none.
ACTIVE = {"script", "link", "iframe", "object", "embed", "img", "base", "form", "foreignobject"}


class Parsed(HTMLParser):
    """A page: its elements, texts and tables.

    Attributes:
        elements: Each start tag with its attributes, in order.
        errors: End tags without a start, and starts without an end.
        sections: Text below each heading of level 2, by the heading's anchor.
        tables: Rows of cells of each table, head included.
        code: Text of each ``code`` element.
    """

    def __init__(self, html: str) -> None:
        super().__init__(convert_charrefs=True)
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.errors: list[str] = []
        self.sections: dict[str, str] = {}
        self.tables: list[list[list[str]]] = []
        self.code: list[str] = []
        self.texts: list[str] = []
        self._open: list[str] = []
        self._anchor = ""
        self.feed(html)
        self.close()
        self.errors += [f"<{tag}> has no end" for tag in self._open]

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in _VOID:
            self._open.append(tag)
        if tag == "h2":
            self._anchor = dict(attrs)["id"] or ""
            self.sections[self._anchor] = ""
        elif tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self.tables[-1][-1].append("")
        elif tag == "code":
            self.code.append("")

    def handle_startendtag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        if not self._open or self._open[-1] != tag:
            self.errors.append(f"</{tag}> within {self._open[-3:]}")
        else:
            self._open.pop()

    def handle_data(self, data):
        data = data.replace("\u00a0", " ")
        if "style" in self._open:
            return
        self.texts.append(data)
        if self._anchor:
            self.sections[self._anchor] += data
        if "td" in self._open or ("th" in self._open and self.tables):
            self.tables[-1][-1][-1] += data.strip()
        if "code" in self._open:
            self.code[-1] += data

    def table(self, title: str) -> list[list[str]]:
        """The table whose head has a column of this title."""
        (table,) = [table for table in self.tables if title in table[0]]
        return table


def check_inert(html: str) -> Parsed:
    """Check that a page is whole, runs nothing and loads nothing; return it parsed."""
    page = Parsed(html)
    assert not page.errors
    ids = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    assert len(ids) == len({*ids})
    for tag, attributes in page.elements:
        assert tag not in ACTIVE
        for name, value in attributes.items():
            assert not name.startswith("on"), (tag, name)
            if name in ("href", "xlink:href", "src"):
                assert (value or "").startswith("#"), (tag, name, value)
                assert (value or "")[1:] in ids, (tag, name, value)
            if not name.startswith("xmlns"):
                assert "javascript:" not in (value or "")
            for target in re.findall(r"url\(([^)]*)\)", value or ""):
                assert target.strip("'\"").startswith("#")
                assert target.strip("'\"")[1:] in ids, target
    policies = [a["content"] for _, a in page.elements if a.get("http-equiv")]
    assert policies == [
        "default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"
    ]
    assert "@import" not in html
    return page
