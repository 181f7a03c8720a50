"""The stages of `python -m benchmarks.gpu`, the most valuable first."""

from __future__ import annotations

import importlib
import importlib.util
import sys
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.gpu.findings import Findings


@dataclass(frozen=True)
class Stage:
    """One part of the measurement, in a process group of its own.

    `module` has a function `measure(findings)`; `command` is run in its place if it is given. Either way the words
    `--findings FILE --seconds S [--small]` follow.
    """

    name: str
    what: str
    share: float  # of the time, beside the other stages'
    least_s: float  # with less it is not begun
    module: str = ""
    needs: tuple[str, ...] = ()  # packages without which it is skipped
    command: tuple[str, ...] | None = None

    def words(self, findings: Path, seconds: float, small: bool) -> list[str]:
        """The command line of its process, which is to end within `seconds` by itself."""
        own = self.command or (sys.executable, "-m", "benchmarks.gpu", "--stage", self.name)
        return [*own, "--findings", str(findings), "--seconds", f"{seconds:.1f}", *(["--small"] if small else [])]

    def run(self, path: Path, seconds: float, small: bool) -> int:
        """What the child does; its exit code."""
        findings = Findings(path, seconds, small, scratch=path.parent)
        if missing := [package for package in self.needs if importlib.util.find_spec(package) is None]:
            findings.skip_all(f"not installed: {', '.join(missing)}")
            return 0
        try:
            importlib.import_module(self.module).measure(findings)
        except Exception as error:
            traceback.print_exc()
            findings.problem(f"{type(error).__name__}: {(str(error).splitlines() or ['no reason given'])[0]}")
        return int(bool(findings.problems))


TRAINING = ("pydantic", "yaml", "deepspeed")
STAGES = (
    Stage("facts", "the device, copy bandwidth, product rates", 0.04, 15, "benchmarks.gpu.facts"),
    Stage(
        "tests", "tests that need a GPU, and those beside them", 0.15, 30, "benchmarks.gpu.checks", needs=("pytest",)
    ),
    Stage("head", "the loss with its gradients against three products", 0.29, 30, "benchmarks.gpu.head"),
    Stage("train", "the main job, and plain PyTorch beside it", 0.42, 60, "benchmarks.gpu.train", needs=TRAINING),
    Stage("ranks", "two ranks on one device against one", 0.07, 25, "benchmarks.gpu.ranks", needs=TRAINING),
    Stage("energy", "Zeus against nvidia-smi", 0.03, 15, "benchmarks.gpu.energy"),
)


def chosen(names: str | None, stages: Sequence[Stage]) -> list[Stage]:
    """The stages of a comma-separated list, in their own order; None: all. Raises ValueError."""
    if names is None:
        return list(stages)
    asked = [name.strip() for name in names.split(",") if name.strip()]
    known = [stage.name for stage in stages]
    if unknown := [name for name in asked if name not in known]:
        raise ValueError(f"--stages {names}: there is no stage {', '.join(unknown)}; give some of {','.join(known)}")
    if not asked:
        raise ValueError(f"--stages {names!r} names no stage; give some of {','.join(known)}, or leave it out for all")
    return [stage for stage in stages if stage.name in asked]
