"""Prose out of pages and text files, without markup, navigation, scripts and listings, and long texts cut."""

import re
from html.parser import HTMLParser

PARAGRAPH = "\n\n"
CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\xad\u200b\ufeff]|.\x08")
WORD = re.compile(r"[\"'(\u2018\u201c]*[^\W\d_]+(?:['\u2019-][^\W\d_]+)*[\"').,;:!?\u2019\u201d]*")
FULL = 0.75  # how full parts of a text are to be
PROSE_WORDS = 8  # in a paragraph of prose, at least
PROSE_SHARE = 0.7  # of its words consist of letters, at least

SKIPPED = """
    script style head nav header footer form select button svg math object template noscript pre
"""
ENDING_PARAGRAPHS = """
    address article aside blockquote body caption center dd details div dl dt fieldset figcaption figure h1 h2 h3 h4 h5
    h6 hr html item li list main note ol p page pre section steps subtitle summary table tbody td terms tfoot th thead
    title tr ul
"""
FRAMES = """
    contents footer header headerlink index menu nav nav-panel navfooter navheader navigation related sidebar
    sphinxsidebar toc toctree-wrapper
"""
LEFT_OUT = frozenset(SKIPPED.split())  # elements
MUST_END = LEFT_OUT | {
    "div",
    "span",
    "table",
    "ul",
    "ol",
    "dl",
    "section",
    "aside",
    "a",
}  # HTML lets no end be left out
BLOCKS = frozenset(ENDING_PARAGRAPHS.split())
NAVIGATION = frozenset(FRAMES.split())  # classes and roles


class _Page(HTMLParser):
    """Collects the paragraphs of a page."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.paragraphs: list[str] = []
        self._pieces: list[str] = []
        self._skipped: str | None = None  # the element that is being left out
        self._depth = 0  # how many of its name are open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if self._skipped == "head" and tag == "body":
            self._skipped = None  # its end may be left out
        if self._skipped is not None:
            self._depth += tag == self._skipped
        elif tag in LEFT_OUT or (tag in MUST_END and _is_navigation(dict(attrs))):
            self._end_paragraph(tag in BLOCKS)
            self._skipped, self._depth = tag, 1
        else:
            self._end_paragraph(tag in BLOCKS)
            if tag == "br":
                self._pieces.append("\n")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if self._skipped is None and tag not in LEFT_OUT and tag not in MUST_END:  # an empty element has no text
            self.handle_starttag(tag, attrs)

    def handle_endtag(self, tag: str) -> None:
        if self._skipped is None:
            self._end_paragraph(tag in BLOCKS)
        elif tag == self._skipped:
            self._depth -= 1
            if self._depth == 0:
                self._skipped = None

    def handle_data(self, data: str) -> None:
        if self._skipped is None:
            self._pieces.append(re.sub(r"\s+", " ", data))

    def close(self) -> None:
        super().close()
        self._end_paragraph(True)

    def _end_paragraph(self, ends: bool) -> None:
        if ends and self._pieces:
            lines = (" ".join(line.split()) for line in "".join(self._pieces).split("\n"))
            if paragraph := "\n".join(line for line in lines if line):
                self.paragraphs.append(paragraph)
            self._pieces = []


def _is_navigation(attributes: dict[str, str | None]) -> bool:
    named = f"{attributes.get('class') or ''} {attributes.get('role') or ''}".lower()
    return not NAVIGATION.isdisjoint(named.split())


def text_of_page(page: str) -> str:
    """The paragraphs of an HTML (or Mallard) page, with a blank line between them: without what heads and frames the
    page (navigation, contents, scripts, forms) and without listings (`pre`).
    """
    reader = _Page()
    reader.feed(page)
    reader.close()
    return tidy(PARAGRAPH.join(reader.paragraphs))


def tidy(text: str) -> str:
    """A text with its line ends as newlines, without control characters, blanks at ends of lines and runs of blank
    lines. Letters struck over, as printers made bold of them, are single ones; a line of `%`, which stands between the
    sayings of fortune files, is a blank one.
    """
    text = CONTROL.sub("", text.replace("\r\n", "\n").replace("\r", "\n").replace("\f", PARAGRAPH))
    lines = ("" if line == "%" else line.rstrip() for line in text.replace("\xa0", " ").split("\n"))
    return re.sub("\n{3,}", PARAGRAPH, "\n".join(lines)).strip("\n")


def prose_of(text: str) -> tuple[str, float]:
    """A text's paragraphs of prose, each with the heading before it, and their share of its characters, 0 to 1.

    A paragraph is of prose if it has PROSE_WORDS words or more, and PROSE_SHARE of them are of letters alone. What is
    none, in one line and right before one that is, is taken for its heading. Tables, listings, lists of names, formulas
    and what is left of navigation go.
    """
    paragraphs = text.split(PARAGRAPH)
    of_prose = [_is_prose(paragraph) for paragraph in paragraphs]
    kept = [
        paragraph
        for paragraph, here, next_one in zip(paragraphs, of_prose, [*of_prose[1:], False], strict=True)
        if here or (next_one and "\n" not in paragraph)
    ]
    return PARAGRAPH.join(kept), sum(map(len, kept)) / max(1, sum(map(len, paragraphs)))


def _is_prose(paragraph: str) -> bool:
    words = paragraph.split()
    return len(words) >= PROSE_WORDS and sum(map(bool, map(WORD.fullmatch, words))) >= PROSE_SHARE * len(words)


def cut(text: str, most: int) -> list[str]:
    """A text in parts of about equal length, none over `most` characters if its paragraphs allow that: cut between
    paragraphs alone.
    """
    if len(text) <= most:
        return [text]
    aim = len(text) / (len(text) // (FULL * most) + 1)  # some room is left, so that no part must pass `most`
    parts: list[list[str]] = [[]]
    size = position = 0
    for paragraph in text.split(PARAGRAPH):
        grown = size + len(PARAGRAPH) + len(paragraph) if parts[-1] else len(paragraph)
        if parts[-1] and (grown > most or position + len(paragraph) / 2 >= aim * len(parts)):
            parts.append([])
            grown = len(paragraph)
        parts[-1].append(paragraph)
        size = grown
        position += len(paragraph) + len(PARAGRAPH)
    return [PARAGRAPH.join(part) for part in parts]
