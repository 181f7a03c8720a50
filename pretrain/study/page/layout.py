"""The HTML around plots and tables: one file that requests nothing, in light and dark, readable without its script.

Names get a number each (`style` in charts.py; 0 is the baseline). `toggles` lists them once; unticking one hides
whatever carries its `data-k`, by the style sheet alone. The script only shows tips and ticks all boxes at once.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from html import escape

from pretrain.study.page.charts.axes import style_class

NONE = "-"
MINUS = "\N{MINUS SIGN}"

# Of equal lightness (OKLCH), at least 4.4 to 1 against a card; those that a colour-blind reader may take for each other
# have different dashes. The baseline has the colour of the text.
LIGHT = ("#1762b6", "#b05a02", "#027e47", "#903d8b", "#067d82", "#af3c3a", "#846e03", "#6b4cae", "#4e6801")
DARK = ("#6ba8f5", "#f59e60", "#5ec386", "#d386cc", "#13ced7", "#f28881", "#d0b548", "#ab94ee", "#8dad4d")
DASHES = ("", "6 3", "1.5 2.5", "9 2.5 1.5 2.5", "4 2", "", "7 2 1.5 2 1.5 2", "6 3", "12 3")

STYLE = """
:root{color-scheme:light dark;--page:#f6f6f3;--card:#fff;--text:#1c1f24;--soft:#565c66;--rule:#e7e7e3;--axis:#a9acb2;
--edge:#e4e4df;--good:#0b6b3a;--bad:#a3282a;--k0:#1c1f24;LIGHT_COLOURS}
@media (prefers-color-scheme:dark){:root{--page:#121418;--card:#1b1e24;--text:#e8eaed;--soft:#a5abb5;--rule:#2b2f37;
--axis:#5d636d;--edge:#2a2e36;--good:#6fd39b;--bad:#f59a97;--k0:#e8eaed;DARK_COLOURS}}
*{box-sizing:border-box}
html{-webkit-text-size-adjust:100%;scroll-behavior:smooth;scroll-padding-top:92px}
body{margin:0;background:var(--page);color:var(--text);font:16px/1.55 system-ui,-apple-system,"Segoe UI",Roboto,Inter,
"Helvetica Neue",Arial,sans-serif;font-variant-numeric:tabular-nums;overflow-wrap:break-word}
main{max-width:1180px;margin:0 auto;padding:40px 16px 72px}
h1{font-size:clamp(1.7rem,1.2rem + 2.2vw,2.6rem);line-height:1.15;letter-spacing:-.02em;margin:0 0 12px;
text-wrap:balance}
h2{font-size:1.35rem;letter-spacing:-.01em;line-height:1.3;margin:56px 0 6px}
h3{font-size:1rem;margin:22px 0 8px}
p{margin:0 0 14px;max-width:72ch}
.lede{font-size:1.12rem;max-width:62ch}
.notice{border-left:4px solid var(--bad);padding:10px 14px;background:var(--card);color:var(--text)}
.soft,figcaption,.note-text{color:var(--soft)}
.note-text{font-size:.9rem}
a{color:inherit;text-decoration-color:var(--axis);text-underline-offset:3px}
nav{margin:18px 0 26px;font-size:.92rem}
nav ul{display:flex;flex-wrap:wrap;gap:4px 18px;list-style:none;margin:0;padding:0}
code{font:.9em ui-monospace,SFMono-Regular,Menlo,Consolas,monospace;overflow-wrap:anywhere}
.card{background:var(--card);border:1px solid var(--edge);border-radius:12px;margin:0;padding:14px;min-width:0}
.facts{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,220px),1fr));gap:14px 26px;margin:0}
.facts dt{color:var(--soft);font-size:.84rem}
.facts dd{margin:0;font-weight:600}
.facts dd small{display:block;font-weight:400;color:var(--soft);font-size:.84rem;line-height:1.4}
.findings{margin:0 0 18px;padding-left:1.2em;max-width:74ch}
.findings li{margin:4px 0}
.grid{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,var(--least,300px)),1fr));gap:12px;
margin:14px 0}
.grid.pair{--least:400px}
.grid.small{--least:194px}
.grid.duo{--least:148px}
.grid.small .card,.grid.duo .card{padding:10px}
@media (max-width:699px){.grid.duo{gap:8px}.grid.duo .card{padding:8px 6px}}
figure figcaption{font-size:.92rem;margin:0 0 6px;font-weight:600;color:var(--text);line-height:1.35}
figure figcaption small{display:block;font-weight:400;color:var(--soft);font-size:.84rem}
.empty{display:flex;flex-direction:column}
.empty p{margin:auto;padding:24px 10px;color:var(--soft);text-align:center;font-size:.92rem;max-width:34ch}
.values{width:100%;border-collapse:collapse;font-size:.8rem;margin-top:4px}
.values th{font-weight:400;text-align:left;color:var(--soft);padding:0}
.values td{text-align:right;padding:0}
svg.plot{display:block;width:100%;height:auto;max-width:calc(var(--w)*1.35px);margin:0 auto;overflow:visible;
touch-action:pan-y}
svg text{fill:var(--soft);font-size:12px;font-family:inherit}
svg .tick{font-size:11.5px}
svg .note{font-size:11.5px;font-style:italic;paint-order:stroke;stroke:var(--card);stroke-width:3px}
svg .label{fill:var(--text);font-size:11.5px;paint-order:stroke;stroke:var(--card);stroke-width:3px;
stroke-linejoin:round}
svg .direct{dominant-baseline:central;fill:var(--c);font-weight:600;font-size:11.5px}
@media (min-width:700px){.grid.duo{--least:196px}.grid.duo svg text{font-size:9.4px}}
@media (min-width:1150px){.grid.pair svg.plot{max-width:none}.grid.pair svg text{font-size:7.8px}}
@media (max-width:499px){.grid.small svg text{font-size:9px}}
svg path,svg circle{vector-effect:non-scaling-stroke}
svg .rule{stroke:var(--rule);fill:none}
svg .axis{stroke:var(--axis);fill:none}
svg .limit{stroke:var(--soft);fill:none;stroke-dasharray:2 3}
svg .line{stroke:var(--c);fill:none;stroke-width:1.9;stroke-linejoin:round;stroke-linecap:butt;
stroke-dasharray:var(--d)}
svg .k0 .line{stroke-width:2.8}
svg .muted .line{stroke:var(--axis);stroke-width:1.8}
svg .band{fill:var(--c);opacity:.14}
svg .lead{stroke:var(--c);fill:none;opacity:.4}
svg .dot{fill:var(--c)}
svg .ring{stroke:var(--c);fill:none;stroke-width:1.8}
svg .cross{stroke:var(--c);fill:none;stroke-width:1.8}
svg .points{stroke:var(--c);fill:none;stroke-linecap:round}
svg .heavy{stroke-width:5px;opacity:.75}
svg .light{stroke-width:3.4px;opacity:.42}
svg .outline{stroke:var(--c);stroke-width:1.9;stroke-linejoin:round;fill:var(--c);fill-opacity:.16}
svg .muted .outline{stroke:var(--soft);fill:none;stroke-width:1.4;stroke-dasharray:3 2.5}
svg .whisker{stroke:var(--c);stroke-width:3}
svg .mean{fill:var(--c);stroke:var(--card);stroke-width:1}
svg .faint{fill:var(--c);opacity:.35}
svg .here{fill:none;stroke:var(--text);stroke-width:2}
.swatch{display:inline-block;width:20px;height:0;border-top:3px var(--b,solid) var(--c);vertical-align:.28em;
margin-right:7px}
.choose{margin:34px 0 4px;font-size:.9rem}
.toggles{position:sticky;top:0;z-index:3;margin:0 -16px;padding:6px 14px;border:0;min-width:0;
background:color-mix(in srgb,var(--page) 90%,transparent);backdrop-filter:blur(8px);border-bottom:1px solid var(--edge)}
.toggles legend{position:absolute;clip-path:inset(50%)}
.toggles .row{display:flex;gap:6px;overflow-x:auto;scrollbar-width:thin;padding:2px}
.toggles label,.toggles button{flex:none;position:relative;display:inline-flex;align-items:center;font:inherit;
font-size:.86rem;line-height:1.3;padding:4px 10px;border:1px solid var(--edge);border-radius:99px;
background:var(--card);color:var(--text);cursor:pointer;white-space:nowrap}
.toggles input{position:absolute;opacity:0;pointer-events:none}
.toggles label:has(:focus-visible){outline:2px solid var(--text);outline-offset:1px}
.toggles label:not(:has(:checked)){color:var(--soft);text-decoration:line-through;background:none}
.toggles label:not(:has(:checked)) .swatch{opacity:.3}
@media (min-width:700px){.toggles .row{flex-wrap:wrap}}
.scroll{overflow-x:auto;border:1px solid var(--edge);border-radius:12px;background:var(--card);margin:14px 0}
.scroll:focus-visible{outline:2px solid var(--text);outline-offset:2px}
.scroll table{border-collapse:collapse;width:100%;font-size:.82rem;line-height:1.35}
.scroll th,.scroll td{padding:8px 7px;text-align:right;white-space:nowrap;border-bottom:1px solid var(--rule);
vertical-align:top}
.scroll thead th{font-weight:600;vertical-align:bottom;color:var(--soft);white-space:normal}
.scroll tbody tr:last-child>*{border-bottom:0}
.scroll tbody th,.scroll thead th:first-child{text-align:left;position:sticky;left:0;background:var(--card);z-index:1;
font-weight:600}
.scroll td{max-width:250px}
.scroll .wrap{white-space:normal;display:inline-block;max-width:9ch}
.scroll small{display:block;font-weight:400;color:var(--soft);font-size:.8rem}
.tag{font-size:.76rem;font-weight:600;border:1px solid currentColor;border-radius:99px;padding:0 7px;color:var(--soft);
white-space:nowrap;display:inline-block}
.better{color:var(--good)}.worse{color:var(--bad)}
.methods{columns:2 380px;column-gap:40px;margin:10px 0 0}
.methods div{break-inside:avoid;padding-bottom:12px}
.methods dt{font-weight:600}
.methods dd{margin:2px 0 0;max-width:76ch;color:var(--soft)}
footer{margin-top:56px;padding-top:14px;border-top:1px solid var(--edge);font-size:.88rem;color:var(--soft)}
#tip{position:fixed;z-index:9;pointer-events:none;max-width:min(280px,calc(100vw - 16px));background:var(--text);
color:var(--page);font-size:13px;line-height:1.35;padding:6px 9px;border-radius:8px;white-space:pre-wrap;
box-shadow:0 4px 16px #0003}
#tip b{display:block}
[hidden]{display:none!important}
@media print{.toggles,nav{display:none}.card{break-inside:avoid}}
@media (prefers-reduced-motion:reduce){html{scroll-behavior:auto}}
"""

SCRIPT = """
(() => {
  const tip = document.getElementById('tip'), reach = 42;
  const name = document.createElement('b'), text = document.createElement('span');
  tip.append(name, text);
  const read = group => group.points || (group.points = JSON.parse(group.dataset.tips));
  let ring = null;
  const hide = () => { tip.hidden = true; if (ring) { ring.remove(); ring = null; } };
  const show = event => {
    const svg = event.target.closest && event.target.closest('svg.plot');
    hide();
    if (!svg) return;
    const matrix = svg.getScreenCTM(), scale = matrix.a;
    const x = (event.clientX - matrix.e) / scale, y = (event.clientY - matrix.f) / scale;
    let best = null, least = reach / scale;
    for (const group of svg.querySelectorAll('[data-tips]')) {
      if (getComputedStyle(group).display === 'none') continue;
      for (const point of read(group)) {
        const far = Math.hypot(point[0] - x, point[1] - y);
        if (far < least) { least = far; best = [group, point]; }
      }
    }
    if (!best) return;
    const [group, [px, py, told]] = best;
    name.textContent = group.dataset.name;
    name.hidden = !group.dataset.name;
    text.textContent = told;
    tip.hidden = false;
    ring = document.createElementNS('http://www.w3.org/2000/svg', 'circle');
    ring.setAttribute('class', 'here');
    ring.setAttribute('cx', px); ring.setAttribute('cy', py); ring.setAttribute('r', 5.5);
    svg.append(ring);
    const left = matrix.e + px * scale, top = matrix.f + py * scale, box = tip.getBoundingClientRect();
    const at = Math.min(Math.max(8, left - box.width / 2), document.documentElement.clientWidth - box.width - 8);
    tip.style.left = at + 'px';
    tip.style.top = (top - box.height - 12 > 56 ? top - box.height - 12 : top + 14) + 'px';
  };
  document.addEventListener('pointermove', event => { if (event.pointerType !== 'touch') show(event); });
  document.addEventListener('pointerdown', show);
  document.addEventListener('scroll', hide, {passive: true});
  document.addEventListener('keydown', event => { if (event.key === 'Escape') hide(); });
  for (const button of document.querySelectorAll('.toggles button')) {
    button.hidden = false;
    button.addEventListener('click', () => {
      for (const box of document.querySelectorAll('.toggles input')) box.checked = button.dataset.set === 'all';
    });
  }
})();
"""


def _style(styles: int) -> str:
    """With a colour and a dash for each style, and a rule that hides each of 0..styles - 1."""
    sheet = STYLE
    for name, colours in (("LIGHT_COLOURS", LIGHT), ("DARK_COLOURS", DARK)):
        sheet = sheet.replace(name, ";".join(f"--k{place}:{colour}" for place, colour in enumerate(colours, start=1)))
    rules = [".k0{--c:var(--k0);--d:none}"]
    for place, dash in enumerate(DASHES, start=1):
        border = "dotted" if dash.startswith("1.5") else "dashed" if dash else "solid"
        rules.append(f".k{place}{{--c:var(--k{place});--d:{dash or 'none'};--b:{border}}}")
    rules += [f'body:has(#show-{one}:not(:checked)) [data-k="{one}"]{{display:none}}' for one in range(styles)]
    return sheet + "\n".join(rules)


def document(title: str, body: str, styles: int, language: str = "en") -> str:
    """The whole page. `styles`: how many names the toggles have."""
    return (
        f'<!doctype html>\n<html lang="{language}">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width,initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{_style(styles)}</style>\n</head>\n"
        f'<body>\n<main>\n{body}\n</main>\n<div id="tip" role="status" hidden></div>\n<script>{SCRIPT}</script>\n'
        "</body>\n</html>\n"
    )


def written(value: object, form: str = "{:,}", missing: str = NONE) -> str:
    """Escaped; what is None or not finite is `missing`."""
    if value is None or (isinstance(value, float) and not math.isfinite(value)):
        return missing
    return escape(form.format(value)).replace("-", MINUS) if isinstance(value, int | float) else escape(str(value))


def opening(title: str, lede: str, notice: str | None = None) -> str:
    """`notice`: what a reader must know before anything else, such as that a result does not stand."""
    warning = f'<p class="notice" role="note"><strong>{escape(notice)}</strong></p>' if notice else ""
    return f'<header><h1>{escape(title)}</h1>{warning}<p class="lede">{escape(lede)}</p></header>'


def methods(definitions: Mapping[str, str], limits: Sequence[str]) -> str:
    """Terms with what they mean, and what the page cannot say."""
    terms = "".join(f"<div><dt>{escape(name)}</dt><dd>{escape(told)}</dd></div>" for name, told in definitions.items())
    lines = "".join(f"<li>{escape(line)}</li>" for line in limits)
    return f'<dl class="methods">{terms}</dl><h3>Limits</h3><ul class="findings soft">{lines}</ul>'


def section(name: str, title: str, body: str) -> str:
    return f'<section id="{name}"><h2>{escape(title)}</h2>{body}</section>'


def contents(places: Mapping[str, str]) -> str:
    """Links to sections by their names."""
    links = "".join(f'<li><a href="#{place}">{escape(name)}</a></li>' for place, name in places.items())
    return f'<nav aria-label="Contents"><ul>{links}</ul></nav>'


def swatch(style: int) -> str:
    return f'<span class="swatch {style_class(style)}" aria-hidden="true"></span>'


def named(style: int, name: str, more: str = "") -> str:
    """A name beside its swatch; `more` is HTML, beneath it."""
    return f"{swatch(style)}{escape(name)}" + (f"<small>{more}</small>" if more else "")


def toggles(legend: str, names: Sequence[str]) -> str:
    """One box per name, in the order of styles."""
    boxes = "".join(
        f'<label><input type="checkbox" id="show-{place}" checked autocomplete="off">'
        f"{swatch(place)}{escape(name)}</label>"
        for place, name in enumerate(names)
    )
    buttons = "".join(f'<button type="button" data-set="{to}" hidden>{to}</button>' for to in ("all", "none"))
    return (
        f'<p class="soft choose" aria-hidden="true">{escape(legend)}</p>'
        f'<fieldset class="toggles"><legend>{escape(legend)}</legend><div class="row">{boxes}{buttons}</div></fieldset>'
    )


def figure(svg: str, caption: str, missing: str, style: int | None = None, below: str = "") -> str:
    """A plot in a card, or, if it is '', why it is missing. `caption` and `below` are HTML; a style makes it hide."""
    key = "" if style is None else f' data-k="{style}"'
    told = f"<figcaption>{caption}</figcaption>"
    if not svg:
        return f'<figure class="card empty"{key}>{told}<p>{escape(missing)}</p></figure>'
    return f'<figure class="card"{key}>{told}{svg}{below}</figure>'


def grid(figures: Iterable[str], kind: str = "") -> str:
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


def facts(entries: Iterable[tuple[str, str, str]]) -> str:
    """Name, figure and a line beneath, as HTML."""
    told = "".join(
        f"<div><dt>{escape(name)}</dt><dd>{value}{f'<small>{more}</small>' if more else ''}</dd></div>"
        for name, value, more in entries
    )
    return f'<dl class="card facts">{told}</dl>'
