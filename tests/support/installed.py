"""What is installed here: the package `overtone`, and what a distribution requires."""

from __future__ import annotations

import os
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

PACKAGE = Path("model").resolve()


def environment(folder: Path) -> dict[str, str]:
    """The environment of a process that imports this checkout's model/ as `overtone`; where that is not installed, from
    a link in `folder`.
    """
    spec = find_spec("overtone")
    if spec and spec.origin and Path(spec.origin).resolve().parent == PACKAGE:
        return dict(os.environ)
    (folder / "overtone").symlink_to(PACKAGE)
    return {**os.environ, "PYTHONPATH": os.pathsep.join([str(folder), os.environ.get("PYTHONPATH", "")])}


def requirements_of(*distributions: str) -> set[str]:
    """These distributions and all that they require without extras, by canonical name."""
    known: set[str] = set()
    left = list(distributions)
    while left:
        name = canonicalize_name(left.pop())
        if name in known:
            continue
        try:
            requirements = [Requirement(word) for word in metadata.requires(name) or ()]
        except metadata.PackageNotFoundError:
            continue  # optional on this platform
        known.add(name)
        left += [each.name for each in requirements if each.marker is None or each.marker.evaluate({"extra": ""})]
    return known


def required_by(*distributions: str) -> set[str]:
    """Names of the modules that distributions bring, and what they require without extras."""
    names = requirements_of(*distributions)
    modules = metadata.packages_distributions().items()
    return {module for module, brought_by in modules if names & {canonicalize_name(one) for one in brought_by}}
