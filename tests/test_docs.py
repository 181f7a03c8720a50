"""The guides keep their word: links, paths and commands are there, every page is in the site, and the site builds."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

PAGES = [path for path in map(Path, ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")) if path.exists()]
PAGES += sorted(Path("docs").rglob("*.md"))
RECIPES = sorted(Path("configs").glob("*.yaml"))
ROOMS = "common|data|model|pretrain|launch|cli|benchmarks|examples|tests|docs|configs|requirements"
OTHERS = {"data/openwebtext/prepare.py", "data/shakespeare"}  # nanoGPT's


def prose(path: Path) -> str:
    """The text without code, in which brackets are no links and # opens no heading."""
    text = re.sub(r"^```.*?^```$", "", path.read_text(), flags=re.MULTILINE | re.DOTALL)
    return re.sub(r"^    .*$", "", text, flags=re.MULTILINE)


def anchors(path: Path) -> set[str]:
    """What a page's headings are linked by, on the repository's pages and in the site alike."""
    headings = re.findall(r"^#+ (.*)$", prose(path), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def broken_links(path: Path) -> list[str]:
    broken = []
    for link in re.findall(r"\]\(([^)\s]+)\)", re.sub(r"`[^`\n]+`", "", prose(path))):
        if re.match(r"\w+:", link):
            continue
        name, _, anchor = link.partition("#")
        target = path.parent / name if name else path
        if not target.exists() or (anchor and anchor not in anchors(target)):
            broken.append(link)
    return broken


@pytest.mark.parametrize("path", PAGES, ids=str)
def test_links_lead_somewhere(path: Path) -> None:
    assert not broken_links(path)


def test_a_broken_link_is_seen(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("# A page\n[a](page.md#a-page) [b](#a-page) [c](https://c) `[d](d)`\n[e](e.md) [f](page.md#f)\n")
    assert broken_links(page) == ["e.md", "page.md#f"]


@pytest.mark.parametrize("path", PAGES, ids=str)
def test_files_that_a_page_names_are_there(path: Path) -> None:
    named = set(re.findall(rf"`((?:{ROOMS})/[\w./-]*)`", path.read_text())) - OTHERS
    assert not [name for name in named if not Path(name).exists()]


def named_in(pages: list[Path], pattern: str) -> set[str]:
    return {name for path in pages for name in re.findall(pattern, path.read_text())}


def test_modules_that_pages_run_are_there() -> None:
    for name in named_in([*PAGES, *RECIPES], r"python -m ([a-z_.]*[a-z])"):
        spec = importlib.util.find_spec(name)
        assert spec is not None, name
        assert not spec.submodule_search_locations or importlib.util.find_spec(f"{name}.__main__"), name


def test_commands_that_pages_name_are_in_the_table() -> None:
    from cli.__main__ import TABLE

    assert named_in([*PAGES, *RECIPES], r"\bovertone ([a-z][a-z-]+)") <= {*TABLE, "help"}


def test_every_page_is_in_the_site() -> None:
    def leaves(entry: Any) -> list[str]:
        if isinstance(entry, str):
            return [entry]
        return [leaf for one in (entry.values() if isinstance(entry, dict) else entry) for leaf in leaves(one)]

    named = leaves(yaml.safe_load(Path("mkdocs.yml").read_text())["nav"])
    outside = [path.as_posix() for path in Path("benchmarks/results").glob("*.md")]
    inside = [path.relative_to("docs").as_posix() for path in Path("docs").rglob("*.md")]
    assert sorted(named) == sorted([*inside, *outside, "CONTRIBUTING.md", "CHANGELOG.md"])


@pytest.mark.slow
def test_the_site_builds_without_a_warning_and_asks_the_network_for_nothing(tmp_path: Path) -> None:
    missing = [name for name in ("mkdocs", "material", "mkdocstrings_handlers") if not importlib.util.find_spec(name)]
    if missing:
        pytest.skip(f"{', '.join(missing)} not installed: pip install -e '.[docs]'")
    words = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")]
    done = subprocess.run(words, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for page in (tmp_path / "site").rglob("*.html"):
        assert not re.search(r'<(?:script|link|img|iframe)[^>]*\b(?:src|href)="?(?:https?:)?//', page.read_text()), page
    assert "HarmonicHead" in (tmp_path / "site/reference/head.html").read_text()
