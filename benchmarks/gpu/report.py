"""The result files of `python -m benchmarks.gpu`: the same figures as JSON and as a page, written anew at any time."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.gpu.findings import Found
from benchmarks.machine import slug
from benchmarks.measuring import markdown
from benchmarks.processes import ROOT
from common.files import replace_file
from common.strict_json import to_json

FORMAT = 1
MARK = "Made by `python -m benchmarks.gpu"  # in every page of ours: no page by hand is written over
GOOD = ("ok", "skipped", "cut short")  # what was run went well


@dataclass
class Result:
    """How a stage went: ok, failed, timed out, cut short (it left parts out for want of time), no time (not begun),
    interrupted, skipped; None: not yet begun; running.
    """

    outcome: str | None = None
    seconds: float | None = None
    limit_s: float | None = None
    reason: str | None = None
    found: Found = field(default_factory=Found)
    output_tail: str | None = None  # of a stage that failed


@dataclass
class Report:
    """All stages and how they went, in files `gpu-DEVICE.*` of `folder`."""

    device: str
    small: bool
    minutes: float
    command: Sequence[str]
    folder: Path
    results: dict[str, Result]
    began: str = field(default_factory=lambda: time.strftime("%Y-%m-%d %H:%M:%S"))
    seconds: float = 0.0

    def __post_init__(self) -> None:
        self.commit = _git("rev-parse", "HEAD")
        self.changed = None if self.commit is None else bool(_git("status", "--porcelain", "--untracked-files=no"))
        self.stem = f"gpu-{slug(self.device)}"
        page = self.folder / f"{self.stem}.md"
        if page.exists() and MARK not in page.read_text(encoding="utf-8", errors="replace"):
            self.stem += f"-{self.began[:10]}"

    def path(self, suffix: str) -> Path:
        """The file with this suffix; a page by hand in its place is left, and the date is added."""
        return self.folder / f"{self.stem}{suffix}"

    @property
    def failed(self) -> list[str]:
        """Names of stages that did not go well, those not yet begun among them."""
        return [name for name, result in self.results.items() if result.outcome not in GOOD]

    def tree(self) -> dict[str, Any]:
        """The JSON file's plain values; format FORMAT."""
        stages = {name: asdict(result) for name, result in self.results.items()}
        for stage in stages.values():
            stage |= stage.pop("found")
        return {
            "format": FORMAT,
            "device": self.device,
            "small": self.small,
            "minutes": self.minutes,
            "command": list(self.command),
            "began": self.began,
            "seconds": self.seconds,
            "commit": self.commit,
            "changed_since_commit": self.changed,
            "stages": stages,
        }

    def write(self) -> None:
        """Replaces both files, each at once: a reader never finds half of one."""
        replace_file(self.path(".json"), to_json(self.tree(), indent=1) + "\n")
        replace_file(self.path(".md"), "\n".join(self.page()) + "\n")

    def page(self) -> Iterator[str]:
        """The lines of the Markdown file."""
        yield from (f"# {self.device}, {self.began[:10]}", "")
        state = "no git here" if self.commit is None else self.commit[:12] + (", with changes" if self.changed else "")
        yield f"{MARK} {' '.join(self.command)}`, begun {self.began}; the code is {state}."
        if self.small:
            yield "Sizes are small, to try the command itself: these figures say nothing of the code's speed."
        yield "What is empty was not measured."
        yield ""
        yield from _table([self._short(name) for name in self.results])
        for name, result in self.results.items():
            yield from _section(name, result)

    def _short(self, name: str) -> dict[str, Any]:
        result = self.results[name]
        told = [*result.found.headline, *([result.reason] if result.reason else [])]
        return {"stage": name, "outcome": result.outcome or "not begun", "seconds": result.seconds,
                "what came of it": "; ".join(told)}  # fmt: skip

    def show(self, console: Console) -> None:
        """Prints a row for each stage, and where the files are."""
        table = Table("stage", "outcome", "seconds", "what came of it", title=f"{self.device}, {self.seconds:.0f} s")
        for name in self.results:
            table.add_row(*(shown(value) for value in self._short(name).values()))
        console.print(table)
        console.print(f"{self.path('.md')}, {self.path('.json').name}, {self.path('.log').name}", soft_wrap=True)


def _section(name: str, result: Result) -> Iterator[str]:
    found = result.found
    lists = {"Problems": found.problems, "Left out for want of time": found.left_out}
    lists["Not measured here"] = [f"{what}: {why}" for what, why in found.skipped.items()]
    if not (found.figures or found.tables or any(lists.values()) or result.output_tail):
        return
    yield from ("", f"## {name}")
    if found.figures:
        yield ""
        yield from _table([{"figure": key, "value": value} for key, value in found.figures.items()])
    for title, rows in found.tables.items():
        yield from ("", f"### {title}", "")
        yield from _table(rows)
    for title, lines in lists.items():
        if lines:
            yield from ("", f"{title}:", "")
            yield from (f"- {' '.join(line.split())}" for line in lines)
    if result.output_tail:
        yield from ("", "The end of its output:", "", "```", result.output_tail.replace("```", "'''"), "```")


def _table(rows: Sequence[dict[str, Any]]) -> Iterator[str]:
    """Rows as a table, with every column that some row has."""
    columns = list(dict.fromkeys(column for row in rows for column in row))
    cells = ([shown(row.get(column)).replace("|", "/") for column in columns] for row in rows)
    return markdown([columns, *cells])


def shown(value: Any) -> str:
    """A value as a person reads it: four digits of a fraction, thousands apart; nothing for None."""
    if value is None:
        return ""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    if isinstance(value, int) or abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.4g}"


def _git(*words: str) -> str | None:
    try:
        said = subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.SubprocessError):
        return None
    return said.stdout.strip() if said.returncode == 0 else None
