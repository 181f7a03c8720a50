"""Documents whose figures are held to published results."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

FIGURE = re.compile(r"(?<![\w.^-])[-+]?\d[\d,]*(?:\.\d+)?%?")
APART = (  # what holds no figure of a result
    re.compile(r"```.*?```", re.DOTALL),
    re.compile(r"^ {4}.*$", re.MULTILINE),  # commands
    re.compile(r"`[^`]*`"),
    re.compile(r"\]\([^)]*\)"),  # targets of links
    re.compile(r"arXiv:\d{4}\.\d{5}(?:, section [\d.]+)?"),
    re.compile(r"^#+ .*$", re.MULTILINE),
)


class Prose:
    """A document, or a part of one, from which a test takes away whatever it has shown to be true. What is left in the
    end may hold no figure: so none stands there that no test knows.
    """

    def __init__(self, file: str | Path, *sections: str) -> None:
        """`sections`: their headings at the second level; without any, the whole document."""
        text = Path(file).read_text(encoding="utf-8")
        parts = re.split(r"^## (.*)$", text, flags=re.MULTILINE)
        by_name = dict(zip(parts[1::2], parts[2::2], strict=True))
        text = "".join(by_name[name] for name in sections) if sections else text
        self.tables = re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE)
        text = re.sub(r"^\|.*\n", "", text, flags=re.MULTILINE)
        for pattern in APART:
            text = pattern.sub(" ", text)
        self.left = " ".join(re.sub(r"^> ?", "", text, flags=re.MULTILINE).split())

    def holds(self, *phrases: str) -> None:
        """That these words stand in it, one after another or not; they are taken away."""
        for phrase in phrases:
            words = " ".join(phrase.split())
            assert words in self.left, f"not in the document: {words}"
            self.left = self.left.replace(words, " ", 1)

    def table(self, rows: Sequence[Sequence[str]]) -> None:
        """That one of its tables has exactly these rows, the first being its heading; it is taken away."""
        told = [[cell.strip() for cell in line.strip().strip("|").split("|")] for line in self._lines(rows[0])]
        assert told[2:] == [list(row) for row in rows[1:]]

    def _lines(self, heading: Sequence[str]) -> list[str]:
        first = f"| {' | '.join(heading)} |"
        found = next((table for table in self.tables if table.startswith(first + "\n")), None)
        assert found is not None, f"no table with the heading {first}"
        self.tables.remove(found)
        return found.strip().splitlines()

    def figures(self) -> list[str]:
        """What is left of figures, in tables too."""
        return FIGURE.findall(self.left) + [line for table in self.tables for line in table.splitlines()]
