"""A report as blocks, and the two forms it is written in: Markdown and one HTML page that asks nobody for anything.

All text from files passes `_html` or `_markdown` here and nowhere else. The page has no script, and its content
security policy would let none run.
"""

import html
import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Literal

from tinygpt.report._style import STYLE

Level = Literal["good", "note", "warning"]
_MARKS = {"good": "✓", "note": "•", "warning": "!"}


@dataclass(frozen=True)
class Paragraph:
    """Plain text."""

    text: str


@dataclass(frozen=True)
class Table:
    """Rows of cells, all but the first to the right if `numeric`; `folded` is the title a page folds it under."""

    header: tuple[str, ...]
    rows: Sequence[tuple[str, ...]]
    numeric: bool = False
    folded: str = ""


@dataclass(frozen=True)
class Remark:
    """An observation with the rule it follows."""

    level: Level
    text: str
    rule: str


@dataclass(frozen=True)
class Cards:
    """The few numbers that come first: label and value."""

    items: Sequence[tuple[str, str]]


@dataclass(frozen=True)
class Chart:
    """A drawing: its SVG for the page, the file beside the Markdown, and what it shows."""

    name: str
    title: str
    caption: str
    svg: str


@dataclass(frozen=True)
class Quote:
    """Text a model wrote, under a label."""

    label: str
    text: str


@dataclass(frozen=True)
class Command:
    """A command to type and what it is for."""

    command: str
    purpose: str


Block = Paragraph | Table | Remark | Cards | Chart | Quote | Command


@dataclass(frozen=True)
class Section:
    """A heading with its blocks."""

    title: str
    blocks: Sequence[Block]


@dataclass(frozen=True)
class Page:
    """A whole report."""

    title: str
    subtitle: str
    sections: Sequence[Section]
    footer: str


def to_markdown(page: Page) -> str:
    """Return the page as Markdown; charts are the PNG files beside it."""
    lines = [f"# {_markdown(page.title)}", "", _markdown(page.subtitle), ""]
    for section in page.sections:
        if section.title:
            lines += [f"## {_markdown(section.title)}", ""]
        for block, following in zip(section.blocks, [*section.blocks[1:], None], strict=True):
            lines += _markdown_block(block)
            if not (isinstance(block, Remark) and isinstance(following, Remark)):
                lines.append("")
    return "\n".join([*lines, "---", "", _markdown(page.footer), ""])


def _markdown_block(block: Block) -> list[str]:
    match block:
        case Paragraph(text):
            return [_markdown(text)]
        case Table(header, rows, numeric, folded):
            rule = "|---|" + ("---:|" if numeric else "---|") * (len(header) - 1)
            lines = ["| " + " | ".join(_markdown(cell) for cell in row) + " |" for row in (header, *rows)]
            return [*([f"**{_markdown(folded)}**", ""] if folded else []), lines[0], rule, *lines[1:]]
        case Remark(level, text, rule):
            return [f"- {'**!** ' if level == 'warning' else ''}{_markdown(text)} *Rule: {_markdown(rule)}*"]
        case Cards(items):
            return _markdown_block(Table(("", ""), items))
        case Chart(name, title, caption, _):
            return [f"![{_markdown(title)}]({name}.png)", "", _markdown(f"{title}. {caption}".strip())]
        case Quote(label, text):
            return [_markdown(label), "", *_fenced(text)]
        case Command(command, purpose):
            return [_markdown(purpose) + ":", "", *_fenced(command)]


def _fenced(text: str) -> list[str]:
    longest = max((len(run) for run in re.findall("`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return [fence + "text", *_clean(text).splitlines(), fence]


def _markdown(text: str) -> str:
    """Return text that Markdown shows as it is, in one line: no markup, no HTML, no new cell."""
    line = " ".join(_clean(text).split())
    # An underscore within a word is only that, and a sign before a number as well.
    markup = r"([\\`*\[\]|~]|(?<!\w)_|_(?!\w)|^[#>]|^[-+](?=\s))"
    return re.sub(markup, r"\\\1", line.replace("&", "&amp;").replace("<", "&lt;"))


def to_html(page: Page) -> str:
    """Return the page as one HTML file with everything in it."""
    sections = "".join(_html_section(section) for section in page.sections)
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n'
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">\n"
        f"<title>{_html(page.title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n<main>\n"
        f"<header><h1>{_html(page.title)}</h1><p>{_html(page.subtitle)}</p></header>\n"
        f"{sections}<footer>{_html(page.footer)}</footer>\n</main>\n</body>\n</html>\n"
    )


def _html_section(section: Section) -> str:
    parts = [f"<h2>{_html(section.title)}</h2>"] if section.title else []
    # Neighbours of one kind share a frame: charts a grid, remarks a list.
    for kind, blocks in groupby(section.blocks, key=type):
        inside = "".join(map(_html_block, blocks))
        if kind is Chart:
            inside = f'<div class="charts">{inside}</div>'
        elif kind is Remark:
            inside = f'<ul class="remarks">{inside}</ul>'
        parts.append(inside)
    return f"<section>{''.join(parts)}</section>\n"


def _html_block(block: Block) -> str:
    match block:
        case Paragraph(text):
            return f"<p>{_html(text)}</p>"
        case Table(header, rows, numeric, folded):
            head = "".join(f'<th scope="col">{_html(cell)}</th>' for cell in header)
            body = "".join(f"<tr>{''.join(f'<td>{_html(cell)}</td>' for cell in row)}</tr>" for row in rows)
            kind = "numbers" if numeric else "words"
            table = f'<table class="{kind}"><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>'
            table = f'<div class="scroll" tabindex="0">{table}</div>'
            return f"<details><summary>{_html(folded)}</summary>{table}</details>" if folded else table
        case Remark(level, text, rule):
            mark = f'<b class="mark" title="{level}">{_MARKS[level]}</b>'
            why = f"<details><summary>rule</summary>{_html(rule)}</details>"
            return f'<li class="{level}">{mark}<div>{_html(text)} {why}</div></li>'
        case Cards(items):
            cards = "".join(f"<div><dt>{_html(label)}</dt><dd>{_html(value)}</dd></div>" for label, value in items)
            return f'<dl class="cards">{cards}</dl>'
        case Chart(name, title, caption, svg):
            below = f"<figcaption><b>{_html(title)}</b> {_html(caption)}</figcaption>"
            return f'<figure id="{_html(name)}">{svg}{below}</figure>'
        case Quote(label, text):
            return f'<figure class="quote"><figcaption>{_html(label)}</figcaption><pre>{_html(text)}</pre></figure>'
        case Command(command, purpose):
            return f'<p class="command">{_html(purpose)}<code>{_html(command)}</code></p>'


def _html(text: str) -> str:
    return html.escape(_clean(text), quote=True)


def _clean(text: str) -> str:
    """Replace what has no place in a page: control characters, and lone surrogates, which cannot be written."""
    return re.sub(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff]", "\ufffd", text)
