"""The page of a report: sections of blocks, drawn as HTML."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from ckptavg.display.table_layout import BEST
from ckptavg.display.tables import Table
from ckptavg.errors.printable import escape_unseen, printable, without_secrets
from ckptavg.optional import import_optional

_NO_BREAK = "\u00a0"
BlockKind = Literal["paragraph", "facts", "table", "figure", "code", "list"]


@dataclass(frozen=True)
class Paragraph:
    """Sentences that belong together."""

    text: str
    kind: BlockKind = "paragraph"


@dataclass(frozen=True)
class Facts:
    """Names with a text each."""

    rows: tuple[tuple[str, str], ...]
    kind: BlockKind = "facts"


@dataclass(frozen=True)
class Tabulated:
    """A table with its legend.

    Attributes:
        table: The table; nothing is left out or shortened.
        caption: Text above the table.
    """

    table: Table
    caption: str
    kind: BlockKind = "table"


@dataclass(frozen=True)
class Drawing:
    """A figure.

    Attributes:
        svg: An SVG element with a label, safe to put into the page as it is.
        caption: Text below the figure.
    """

    svg: str
    caption: str = ""
    kind: BlockKind = "figure"


@dataclass(frozen=True)
class Code:
    """Text to copy.

    Attributes:
        text: The text, already free of what cannot be seen.
        title: The language in a word or two.
    """

    text: str
    title: str
    kind: BlockKind = "code"


@dataclass(frozen=True)
class Listing:
    """Sentences as a list."""

    items: tuple[str, ...]
    kind: BlockKind = "list"


Block = Paragraph | Facts | Tabulated | Drawing | Code | Listing


@dataclass(frozen=True)
class Section:
    """A part of the page.

    Attributes:
        anchor: Name in links; unique on the page.
        title: Heading.
        blocks: Contents from top to bottom.
    """

    anchor: str
    title: str
    blocks: tuple[Block, ...]


@dataclass(frozen=True)
class Page:
    """A report's page.

    Attributes:
        title: Heading of the page.
        subtitle: Line below the heading.
        outcome: Verdict in a word, which chooses a color.
        heading: Verdict in a few words.
        verdict: Verdict in a sentence.
        advice: Sentences on what follows.
        sections: Further contents.
    """

    title: str
    subtitle: str
    outcome: str
    heading: str
    verdict: str
    advice: tuple[str, ...]
    sections: tuple[Section, ...]


def render(page: Page) -> str:
    """Draw a page as HTML that needs nothing else.

    All texts are escaped and made printable, whatever they hold. Only ``Drawing.svg`` is put in as
    it is.

    Raises:
        SpecError: jinja2 is not installed.
    """
    jinja2 = import_optional("jinja2", "jinja2")
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("ckptavg.plots", "templates"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        finalize=_finalize,
    )
    environment.filters["code"] = _escape_code
    environment.filters["tied"] = _tie_units
    environment.filters["drawn"] = import_optional("markupsafe", "markupsafe").Markup
    text: str = environment.get_template("report.html").render(page=page, best=BEST)
    return text


def _finalize(value: Any) -> Any:
    """Make a text printable; markup has been made printable before."""
    if type(value) is str:
        return printable(value)
    return value


def _tie_units(text: str) -> Any:
    """Escape a sentence, in which no line ends between a number and its unit."""
    markupsafe = import_optional("markupsafe", "markupsafe")
    escaped = str(markupsafe.escape(printable(text)))
    for sign in ("%", "= ", "&lt; "):
        escaped = escaped.replace(f" {sign}", f"{_NO_BREAK}{sign.replace(' ', _NO_BREAK)}")
    return markupsafe.Markup(escaped)


def _escape_code(text: str) -> Any:
    """Escape a text of several lines, whose line breaks stay."""
    markupsafe = import_optional("markupsafe", "markupsafe")
    return markupsafe.escape(escape_unseen(without_secrets(text), keep="\n"))
