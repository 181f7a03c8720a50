"""The tests that need a GPU, and the tests beside them, with a limit of time: counts, and the names of what failed.

pytest runs in a process of its own; `tally` writes down each outcome as it comes, so a run that is cut off counts too.
"""

from __future__ import annotations

import importlib.util
import json
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from benchmarks.gpu.findings import Findings
from benchmarks.gpu.tally import VARIABLE
from benchmarks.processes import ROOT, finish, start

FOLDERS = ("tests/model", "tests/pretrain")
ALWAYS = (
    "tests/pretrain/test_batches.py",
    "tests/model/test_attention.py",
    "tests/model/test_scales.py",
    "tests/model/test_gpu_kernels.py",
)
SMALL = ALWAYS[:1]
MARKED = re.compile(r"\bmark\.gpu\b|\bon_gpu\b")
WORKERS = 8
TEST_S = 120  # a single test's, where pytest-timeout is installed
SHOWN = 40  # names of failed tests


def files_with_marks() -> list[str]:
    """Files of tests that need a GPU, the fast ones first: found by the mark's text, without importing any."""
    found = [
        path.relative_to(ROOT).as_posix()
        for folder in FOLDERS
        for path in sorted((ROOT / folder).rglob("test_*.py"))
        if MARKED.search(path.read_text(encoding="utf-8"))
    ]
    return [*ALWAYS[:-1], *(path for path in found if path not in ALWAYS), ALWAYS[-1]]


def command(files: Sequence[str], marks: str, workers: int) -> list[str]:
    """pytest over files, with the tally; `marks` chooses tests, 0 `workers` is this process alone."""
    words = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "benchmarks.gpu.tally"]
    words += ["--continue-on-collection-errors", "-rfE", "--tb=short", "-m", marks]
    if importlib.util.find_spec("pytest_timeout"):
        words += [f"--timeout={TEST_S}"]
    if workers:
        words += ["-n", str(workers)]
    return [*words, *files]


def outcomes(path: Path) -> dict[str, str]:
    """Test -> passed, failed or skipped, of a tally."""
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    found: dict[str, str] = {}
    for line in lines:
        try:
            name, outcome = json.loads(line)
        except ValueError:  # cut off
            continue
        if found.get(name) != "failed":
            found[name] = outcome
    return found


def measure(findings: Findings) -> None:
    """Counts outcomes of GPU tests first, in most of the time, then of the tests beside them."""
    workers = 0
    if importlib.util.find_spec("xdist") is None:
        findings.skip("several tests at a time", "pytest-xdist is not installed: one process")
    elif not findings.small:
        workers = WORKERS
    findings.figure("workers", workers or 1)
    files = list(SMALL) if findings.small else files_with_marks()
    findings.figure("files", ", ".join(files))
    total: Counter[str] = Counter()
    failed: list[str] = []
    for marks, share in {"gpu": 0.7, "not gpu": 1.0}.items():
        tally = findings.scratch / f"tally-{marks.replace(' ', '-')}"
        limit_s = max(1.0, findings.left_s * share)
        words = command(files, marks, workers)
        process = start(words, None, subprocess.STDOUT, extra={VARIABLE: str(tally), "OMP_NUM_THREADS": "1"})
        code = finish(process, limit_s)
        found = outcomes(tally)
        counts = Counter(found.values())
        total += counts
        failed += [name for name, outcome in found.items() if outcome == "failed"]
        findings.row("runs", marks=marks, passed=counts["passed"], failed=counts["failed"],
                     skipped=counts["skipped"], exit_code=code)  # fmt: skip
        if code is None:
            findings.leave_out(f"the rest of the tests with -m {marks!r}, after {sum(counts.values())} of them")
        elif code not in (0, 1, 5) or (code == 1 and not counts["failed"]):  # 5: none was chosen
            findings.problem(f"pytest -m {marks!r} ended with exit code {code}")
    for outcome in ("passed", "failed", "skipped"):
        findings.figure(outcome, total[outcome])
    findings.figures["failed_tests"] = failed[:SHOWN]
    findings.tell(f"{total['passed']} passed, {total['failed']} failed, {total['skipped']} skipped")
    if failed:
        findings.problem(f"failed: {', '.join(failed[:3])}{' and more' if len(failed) > 3 else ''}")
