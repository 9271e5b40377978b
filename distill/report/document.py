"""A report as data (sections of text, tables and pictures) and its two forms: one HTML file, and Markdown."""

from __future__ import annotations

import base64
import html
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

UNKNOWN = "\u2013"
"""Shown for a value that is null: an en dash."""


@dataclass(frozen=True)
class Picture:
    """name: file stem in figures/; alt: what it shows; png: file content; svg: inline form for the HTML page."""

    name: str
    alt: str
    png: bytes
    svg: str | None = None


@dataclass(frozen=True)
class Cell:
    """text with a smaller note under it; shade in [0, 1] tints the cell."""

    text: str
    note: str = ""
    tone: Literal["", "good", "bad", "even", "muted"] = ""
    strong: bool = False
    shade: float | None = None


@dataclass(frozen=True)
class Text:
    text: str
    kind: Literal["plain", "lead", "caption", "missing"] = "plain"


@dataclass(frozen=True)
class Table:
    """The first column of each row is its header."""

    head: Sequence[str]
    rows: Sequence[Sequence[str | Cell | Picture]]
    kind: Literal["numbers", "text", "pictures"] = "text"


@dataclass(frozen=True)
class Fold:
    """Shown on demand."""

    title: str
    blocks: Sequence[Text | Table | Picture]


Block = Text | Table | Picture | Fold


@dataclass(frozen=True)
class Section:
    """anchor: id in the page; short: name in the navigation."""

    anchor: str
    short: str
    title: str
    blocks: Sequence[Block]


@dataclass(frozen=True)
class Document:
    title: str
    subtitle: str
    sections: Sequence[Section]


def pictures(document: Document) -> list[Picture]:
    """Every picture of the document, in order."""
    found: list[Picture] = []

    def visit(block: Block) -> None:
        if isinstance(block, Picture):
            found.append(block)
        elif isinstance(block, Fold):
            for inner in block.blocks:
                visit(inner)
        elif isinstance(block, Table):
            found.extend(cell for row in block.rows for cell in row if isinstance(cell, Picture))

    for section in document.sections:
        for block in section.blocks:
            visit(block)
    return found


# ---------------------------------------------------------------------------------------------------------------- HTML

# The policy forbids scripts and every request, whatever a caption may hold.
_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"

_CSS = """
:root { color-scheme: light dark; --page: #f6f7f9; --panel: #fff; --ink: #1c2430; --soft: #5d6878; --line: #e1e5eb;
  --accent: #2f6fd0; --good: #1a7f4b; --good-bg: #e3f4ea; --bad: #b3372f; --bad-bg: #fbe7e5; --even: #7a5a00;
  --even-bg: #fbf2d9; --muted-bg: #eef0f3; }
@media (prefers-color-scheme: dark) { :root { --page: #12161c; --panel: #1a2029; --ink: #e4e8ee; --soft: #98a3b3;
  --line: #2c3440; --accent: #7fb0ff; --good: #7fd6a4; --good-bg: #17382a; --bad: #ff9f97; --bad-bg: #432221;
  --even: #e8c66b; --even-bg: #3a3117; --muted-bg: #242b35; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink); font: 15px/1.55 system-ui, -apple-system, "Segoe UI",
  Roboto, "Noto Sans", "Liberation Sans", sans-serif; }
main { max-width: 1160px; margin: 0 auto; padding: 2.2rem 1.4rem 4rem; }
h1 { font-size: 1.85rem; line-height: 1.2; margin: 0 0 .3rem; letter-spacing: -.015em; overflow-wrap: anywhere; }
h2 { font-size: 1.2rem; margin: 0 0 .8rem; letter-spacing: -.005em; }
.subtitle { color: var(--soft); margin: 0 0 1.1rem; overflow-wrap: anywhere; }
nav { display: flex; flex-wrap: wrap; gap: .3rem .4rem; margin-bottom: 1.3rem; }
nav a { color: var(--soft); text-decoration: none; border: 1px solid var(--line); border-radius: 99px;
  padding: .12rem .75rem; font-size: .84rem; background: var(--panel); }
nav a:hover { color: var(--accent); border-color: var(--accent); }
section { background: var(--panel); border: 1px solid var(--line); border-radius: 12px; padding: 1.3rem 1.4rem 1.4rem;
  margin-bottom: 1.1rem; scroll-margin-top: 1rem; }
p { margin: .55rem 0; max-width: 82ch; color: var(--soft); overflow-wrap: anywhere; }
p.lead { color: var(--ink); }
p.caption { color: var(--ink); margin: 1.3rem 0 .45rem; max-width: none; }
p.caption::before { content: ""; display: inline-block; width: .25rem; height: .95em; margin-right: .6rem;
  background: var(--accent); border-radius: 2px; vertical-align: -.12em; }
p.missing { background: var(--even-bg); color: var(--even); border-radius: 8px; padding: .45rem .8rem; }
.scroll { overflow-x: auto; margin: .6rem 0; }
table { border-collapse: collapse; width: 100%; font-size: .88rem; }
th, td { padding: .42rem .6rem; text-align: left; vertical-align: top; border-bottom: 1px solid var(--line); }
tr:last-child > th, tr:last-child > td { border-bottom: 0; }
thead th { color: var(--soft); font-weight: 600; font-size: .78rem; vertical-align: bottom; white-space: nowrap;
  border-bottom: 1px solid var(--soft) !important; }
tbody th { font-weight: 600; }
td small { display: block; color: var(--soft); font-size: .74rem; line-height: 1.35; white-space: nowrap; }
.numbers th:not(:first-child), .numbers td { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap;
  padding-left: .35rem; padding-right: .5rem; }
table.numbers { width: auto; }
.numbers tbody th { white-space: nowrap; }
.numbers tbody tr:hover { background: var(--muted-bg); }
.text tbody th, .text td { overflow-wrap: anywhere; }
.text tbody th { min-width: 8rem; max-width: 24rem; }
.text .tone { white-space: nowrap; }
thead:not(:has(th:not(:empty))) { display: none; }
.text td small { white-space: normal; }
.pictures { table-layout: fixed; }
.pictures th, .pictures td { border: 0; padding: .2rem; text-align: center; vertical-align: middle;
  overflow-wrap: anywhere; font-size: .78rem; line-height: 1.35; }
.pictures thead th { border: 0 !important; white-space: normal; }
.pictures thead th:first-child, .pictures tbody th { width: 7.4rem; text-align: left; color: var(--soft); }
.pictures td { color: var(--soft); }
.pictures td:has(img) { vertical-align: top; }
.pictures img { display: block; width: 100%; aspect-ratio: 1; object-fit: contain; border-radius: 5px;
  background: #000; }
.tone { display: inline-block; border-radius: 99px; padding: .02rem .6rem; font-weight: 600; font-size: .82rem;
  line-height: 1.5; }
.good { color: var(--good); background: var(--good-bg); } .bad { color: var(--bad); background: var(--bad-bg); }
.even { color: var(--even); background: var(--even-bg); } .muted { color: var(--soft); background: var(--muted-bg); }
.none { color: var(--soft); }
figure { margin: .6rem 0; overflow-x: auto; }
figure svg { display: block; max-width: 100%; height: auto; margin: 0 auto; }
figure svg text { font-family: inherit !important; }
details { border-top: 1px solid var(--line); padding: .5rem 0; margin-top: .6rem; }
details + details { margin-top: 0; } summary { cursor: pointer; font-weight: 600;
  font-size: .9rem; }
@media print { body { background: #fff; } section { break-inside: avoid; border: 0; padding: 0; }
  nav { display: none; } }
"""


def _html_picture(picture: Picture) -> str:
    if picture.svg is not None:
        return f'<figure role="img" aria-label="{html.escape(picture.alt)}">{picture.svg}</figure>'
    content = base64.b64encode(picture.png).decode("ascii")
    return f'<img alt="{html.escape(picture.alt)}" src="data:image/png;base64,{content}">'


def _html_cell(cell: str | Cell | Picture, tag: str = "td") -> str:
    if isinstance(cell, Picture):
        return f"<td>{_html_picture(cell)}</td>"
    if isinstance(cell, str):
        cell = Cell(cell)
    content = html.escape(cell.text)
    if cell.tone:
        content = f'<span class="tone {cell.tone}">{content}</span>'
    elif cell.text == UNKNOWN:
        content = f'<span class="none">{UNKNOWN}</span>'
    if cell.strong:
        content = f"<strong>{content}</strong>"
    if cell.note:
        content += f"<small>{html.escape(cell.note)}</small>"
    style = ""
    if cell.shade is not None:
        percent = round(100 * min(max(cell.shade, 0.0), 1.0))
        style = f' style="background: color-mix(in srgb, var(--accent) {percent}%, transparent)"'
    return f"<{tag}{style}>{content}</{tag.split()[0]}>"


def _html_table(table: Table) -> str:
    head = "".join(f'<th scope="col">{html.escape(name)}</th>' for name in table.head)
    rows = []
    for first, *cells in table.rows:
        header = _html_cell(first, 'th scope="row"')
        rows.append(f"<tr>{header}{''.join(map(_html_cell, cells))}</tr>")
    # Few columns of pictures must not blow them up.
    width = f' style="max-width: {7.4 + 13 * (len(table.head) - 1):g}rem"' if table.kind == "pictures" else ""
    return (
        f'<div class="scroll"><table class="{table.kind}"{width}><thead><tr>{head}</tr></thead>'
        f"<tbody>\n{chr(10).join(rows)}\n</tbody></table></div>"
    )


def _html_block(block: Block) -> str:
    if isinstance(block, Text):
        return f'<p class="{block.kind}">{html.escape(block.text)}</p>'
    if isinstance(block, Table):
        return _html_table(block)
    if isinstance(block, Picture):
        return _html_picture(block)
    inner = "\n".join(map(_html_block, block.blocks))
    return f"<details><summary>{html.escape(block.title)}</summary>{inner}</details>"


def render_html(document: Document) -> str:
    """One HTML page without script, link to the outside or request; every text is escaped."""
    title = html.escape(document.title)
    links = "".join(f'<a href="#{section.anchor}">{html.escape(section.short)}</a>' for section in document.sections)
    sections = "\n".join(
        f'<section id="{section.anchor}"><h2>{html.escape(section.title)}</h2>\n'
        + "\n".join(map(_html_block, section.blocks))
        + "\n</section>"
        for section in document.sections
    )
    return (
        f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{title}</title><style>{_CSS}</style></head>\n<body><main>\n"
        f'<h1>{title}</h1>\n<p class="subtitle">{html.escape(document.subtitle)}</p>\n<nav>{links}</nav>\n'
        f"{sections}\n</main></body></html>\n"
    )


# ------------------------------------------------------------------------------------------------------------ Markdown


def escape_markdown(text: str) -> str:
    """One line of Markdown that shows `text` as it is: no markup, HTML, link, picture or table cell of its own."""
    text = html.escape(" ".join(text.split()), quote=False)
    text = re.sub(r"([\\`*_\[\]#~!$|])", r"\\\1", text)
    return re.sub(r"^(\d+)([.)])(?=\s|$)", r"\1\\\2", re.sub(r"^([-+=])", r"\\\1", text))


def _markdown_cell(cell: str | Cell | Picture) -> str:
    if isinstance(cell, Picture):
        return _markdown_picture(cell)
    if isinstance(cell, str):
        cell = Cell(cell)
    text = escape_markdown(cell.text)
    if cell.strong and text:
        text = f"**{text}**"
    return f"{text} {escape_markdown(cell.note)}".strip()


def _markdown_picture(picture: Picture) -> str:
    return f"![{escape_markdown(picture.alt)}](figures/{picture.name}.png)"


def markdown_table(table: Table) -> str:
    """A pipe table with every cell escaped."""
    align = "---:" if table.kind == "numbers" else "---"
    lines = [[escape_markdown(name) for name in table.head], ["---"] + [align] * (len(table.head) - 1)]
    lines += [[_markdown_cell(cell) for cell in row] for row in table.rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _markdown_block(block: Block) -> str:
    if isinstance(block, Text):
        text = escape_markdown(block.text)
        return {"caption": f"> {text}", "missing": f"*{text}*"}.get(block.kind, text)
    if isinstance(block, Table):
        return markdown_table(block)
    if isinstance(block, Picture):
        return _markdown_picture(block)
    return "\n\n".join([f"### {escape_markdown(block.title)}", *map(_markdown_block, block.blocks)])


def render_markdown(document: Document) -> str:
    """Markdown with every text escaped; pictures are expected as figures/<name>.png beside it."""
    parts = [f"# {escape_markdown(document.title)}", escape_markdown(document.subtitle)]
    for section in document.sections:
        parts.append(f"## {escape_markdown(section.title)}")
        parts += [_markdown_block(block) for block in section.blocks]
    return "\n\n".join(parts) + "\n"
