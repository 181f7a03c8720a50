"""Pages of the site that lie outside docs/: they are added under their own paths, and links to and from them follow."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
OUTSIDE = ("CONTRIBUTING.md", "CHANGELOG.md", "benchmarks/results/*")


def on_files(files: Any, *, config: Any) -> Any:
    """mkdocs' hook: adds the files OUTSIDE docs/."""
    from mkdocs.structure.files import File

    for path in sorted(path for pattern in OUTSIDE for path in ROOT.glob(pattern)):
        name = path.relative_to(ROOT).as_posix()
        files.append(File.generated(config, name, abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, *, page: Any, **_: Any) -> str:
    """In the repository a guide is in docs/ and links to ../FILE; in the site docs/ is the root."""
    depth = page.file.src_uri.count("/")
    own, gone = (rf"(?:\.\./){{{depth}}}", r"\.\./") if page.file.generated_by is None else (r"(?:\.\./)*", "docs/")
    return re.sub(rf"(\]\({own}){gone}", r"\1", markdown)
