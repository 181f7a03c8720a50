"""The HTML around plots and tables: one file that requests nothing, in light and dark, readable without its script.

Names get a number each (`style` in charts/svg.py; 0 is the baseline). `toggles` lists them once; unticking one hides
whatever carries its `data-k`, by the style sheet alone. The script only shows tips and ticks all boxes at once.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import NamedTuple

from pretrain.study.page.charts.svg import style_class

NONE = "-"
MINUS = "\N{MINUS SIGN}"
SHEET, SCRIPT = (Path(__file__).with_name(f"page.{kind}").read_text(encoding="utf-8") for kind in ("css", "js"))

# Of equal lightness (OKLCH), at least 4.4 to 1 against a card; those that a colour-blind reader may take for each other
# have different dashes. The baseline has the colour of the text.
LIGHT = ("#1762b6", "#b05a02", "#027e47", "#903d8b", "#067d82", "#af3c3a", "#846e03", "#6b4cae", "#4e6801")
DARK = ("#6ba8f5", "#f59e60", "#5ec386", "#d386cc", "#13ced7", "#f28881", "#d0b548", "#ab94ee", "#8dad4d")
DASHES = ("", "6 3", "1.5 2.5", "9 2.5 1.5 2.5", "4 2", "", "7 2 1.5 2 1.5 2", "6 3", "12 3")


def _sheet(styles: int) -> str:
    """With a colour and a dash for each style, and a rule that hides each of 0..styles - 1."""
    sheet = SHEET
    for name, colours in (("LIGHT_COLOURS", LIGHT), ("DARK_COLOURS", DARK)):
        sheet = sheet.replace(name, ";".join(f"--k{place}:{colour}" for place, colour in enumerate(colours, start=1)))
    rules = [".k0{--c:var(--k0);--d:none}"]
    for place, dash in enumerate(DASHES, start=1):
        border = "dotted" if dash.startswith("1.5") else "dashed" if dash else "solid"
        rules.append(f".k{place}{{--c:var(--k{place});--d:{dash or 'none'};--b:{border}}}")
    rules += [f'body:has(#show-{style}:not(:checked)) [data-k="{style}"]{{display:none}}' for style in range(styles)]
    return sheet + "\n".join(rules)


class Section(NamedTuple):
    """A part of a page, to which the list of contents links."""

    name: str  # of the link's target
    link: str
    title: str
    body: str  # HTML


def document(
    title: str,
    lede: str,
    budget: str,
    sections: Sequence[Section],
    heads: Sequence[str],
    footer: str,
) -> str:
    """The whole page. The boxes that choose heads come after the first section, which shows them all.

    Args:
        budget: HTML, such as `facts` gives.
        heads: their names, in the order of styles.
    """
    links = "".join(f'<li><a href="#{section.name}">{escape(section.link)}</a></li>' for section in sections)
    first, *others = (
        f'<section id="{section.name}"><h2>{escape(section.title)}</h2>{section.body}</section>' for section in sections
    )
    parts = [
        f'<header><h1>{escape(title)}</h1><p class="lede">{escape(lede)}</p></header>',
        f'<nav aria-label="Contents"><ul>{links}</ul></nav>',
        *(budget, first, _toggles(heads), *others),
        f"<footer>{escape(footer)} This file needs no network.</footer>",
    ]
    body = "\n".join(parts)
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width,initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>\n{_sheet(len(heads))}</style>\n</head>\n"
        f'<body>\n<main>\n{body}\n</main>\n<div id="tip" role="status" hidden></div>\n<script>\n{SCRIPT}</script>\n'
        "</body>\n</html>\n"
    )


def _toggles(names: Sequence[str]) -> str:
    """One box per name, in the order of styles."""
    legend = "Choose the heads that the plots show"
    boxes = "".join(
        f'<label><input type="checkbox" id="show-{style}" checked autocomplete="off">{named(style, name)}</label>'
        for style, name in enumerate(names)
    )
    buttons = "".join(f'<button type="button" data-set="{to}" hidden>{to}</button>' for to in ("all", "none"))
    return (
        f'<p class="soft choose" aria-hidden="true">{legend}</p>'
        f'<fieldset class="toggles"><legend>{legend}</legend><div class="row">{boxes}{buttons}</div></fieldset>'
    )


def written(value: object, form: str = "{:,}", missing: str = NONE) -> str:
    """Escaped; what is None or not finite is `missing`."""
    if value is None or (isinstance(value, float) and not math.isfinite(value)):
        return missing
    return escape(form.format(value)).replace("-", MINUS) if isinstance(value, int | float) else escape(str(value))


def plural(count: int, noun: str) -> str:
    """The count and its noun: 1 seed, 3 seeds."""
    return f"{count} {noun}{'s' * (count != 1)}"


# ---- parts of the page; arguments are plain text where nothing else is said


def facts(entries: Iterable[tuple[str, str, str]]) -> str:
    """Name, figure and a line beneath, as HTML."""
    terms = "".join(f"<div><dt>{escape(name)}</dt><dd>{value}{small(more)}</dd></div>" for name, value, more in entries)
    return f'<dl class="card facts">{terms}</dl>'


def methods(definitions: Mapping[str, str], limits: Sequence[str]) -> str:
    """Terms with what they mean, and what the page cannot say."""
    terms = "".join(f"<div><dt>{escape(name)}</dt><dd>{escape(text)}</dd></div>" for name, text in definitions.items())
    return f'<dl class="methods">{terms}</dl><h3>Limits</h3>{findings(map(escape, limits), "findings soft")}'


def findings(lines: Iterable[str], kind: str = "findings") -> str:
    """A list; its lines are HTML."""
    return f'<ul class="{kind}">{"".join(f"<li>{line}</li>" for line in lines)}</ul>'


def soft(text: str, kind: str = "soft") -> str:
    """A paragraph that explains."""
    return f'<p class="{kind}">{escape(text)}</p>'


def small(html: str) -> str:
    """A line beneath a figure, if it says anything."""
    return f"<small>{html}</small>" if html else ""


def named(style: int, name: str, more: str = "") -> str:
    """A name beside its swatch; `more` is HTML, beneath it."""
    swatch = f'<span class="swatch {style_class(style)}" aria-hidden="true"></span>'
    return f"{swatch}{escape(name)}{small(more)}"


def figure(svg: str, caption: str, missing: str, style: int | None = None, below: str = "") -> str:
    """A plot in a card, or, if it is '', why it is missing. `caption` and `below` are HTML; a style makes it hide."""
    key = "" if style is None else f' data-k="{style}"'
    title = f"<figcaption>{caption}</figcaption>"
    if not svg:
        return f'<figure class="card empty"{key}>{title}<p>{escape(missing)}</p></figure>'
    return f'<figure class="card"{key}>{title}{svg}{below}</figure>'


def grid(figures: Iterable[str], kind: str = "") -> str:
    """Figures side by side, as many as fit; `kind` is the sheet's class for how narrow they may be."""
    return f'<div class="grid {kind}">{"".join(figures)}</div>'


def table(caption: str, columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Cells are HTML; the first of a row is its header. In a box of its own, which scrolls."""
    head = "".join(f'<th scope="col">{column}</th>' for column in columns)
    body = [
        f'<tr><th scope="row">{first}</th>{"".join(f"<td>{cell}</td>" for cell in cells)}</tr>'
        for first, *cells in rows
    ]
    label = escape(caption)
    return (
        f'<div class="scroll" tabindex="0" role="region" aria-label="{label}"><table aria-label="{label}">'
        f"<thead><tr>{head}</tr></thead><tbody>{''.join(body)}</tbody></table></div>"
    )
