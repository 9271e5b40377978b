"""Parts of a report, and their Markdown form. The HTML form is page.html.j2."""

from __future__ import annotations

import html
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

UNKNOWN = "\u2013"
"""Shown for a value that is null: an en dash."""


@dataclass(frozen=True)
class Picture:
    """name: stem of its file. alt: what it shows. svg: inline form for the HTML page. png: for files in Markdown."""

    name: str
    alt: str
    svg: str
    png: bytes = b""


@dataclass(frozen=True)
class Cell:
    """text with a smaller note under it. tone: "good", "bad", "even" or none."""

    text: str
    note: str = ""
    tone: str = ""


@dataclass(frozen=True)
class Table:
    """The first cell of each row is its header. name: for screen readers."""

    head: Sequence[str]
    rows: Sequence[Sequence[str | Cell]]
    kind: Literal["numbers", "text"] = "text"
    name: str = "table"


@dataclass(frozen=True)
class Section:
    title: str
    text: Sequence[str] = ()
    charts: Sequence[Picture] = ()
    tables: Sequence[Table] = ()
    folded: bool = False


def escape_markdown(text: str) -> str:
    """One line of Markdown that shows `text` as it is: no markup, HTML, link, picture or table cell of its own."""
    text = html.escape(" ".join(text.split()), quote=False)
    text = re.sub(r"([\\`*_\[\]#~!$|])", r"\\\1", text)
    return re.sub(r"^(\d+)([.)])(?=\s|$)", r"\1\\\2", re.sub(r"^([-+=])", r"\\\1", text))


def markdown_table(table: Table) -> str:
    """A pipe table with every cell escaped."""
    align = "---:" if table.kind == "numbers" else "---"
    rows = [[f"{cell.text} {cell.note}" if isinstance(cell, Cell) else cell for cell in row] for row in table.rows]
    lines = [[escape_markdown(cell) for cell in row] for row in [table.head, *rows]]
    lines.insert(1, ["---", *[align] * (len(table.head) - 1)])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def markdown_section(section: Section) -> str:
    """Heading, text, pictures (in figures/) and tables."""
    parts = [f"## {escape_markdown(section.title)}", *map(escape_markdown, section.text)]
    parts += [f"![{escape_markdown(picture.alt)}](figures/{picture.name}.png)" for picture in section.charts]
    return "\n\n".join([*parts, *map(markdown_table, section.tables)])
