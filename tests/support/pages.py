"""A reader of HTML, for tests of pages."""

from __future__ import annotations

from html.parser import HTMLParser

VOID = {"meta", "br", "input", "img", "hr", "link"}


class Tree(HTMLParser):
    """Checks that tags nest, and keeps what tests ask for."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.rows: list[list[str]] = []
        self.words: list[str] = []
        self.feed(html)
        self.close()
        assert not self.open, f"not closed: {self.open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert len(attrs) == len(dict(attrs)), f"an attribute twice in {tag}"
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open[-1] == tag, f"</{tag}> in {self.open}"
        self.open.pop()

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] not in ("script", "style"):
            self.words.append(data)
        if "td" in self.open or "th" in self.open:
            self.rows[-1][-1] += f" {data.strip()}"

    def row(self, head: str) -> str:
        """The main table's row of a head, as text."""
        found = [row for row in self.rows if len(row) > 9 and row[0].split()[:1] == [head]]
        assert len(found) == 1
        return " ".join(" ".join(found[0]).split())

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())
