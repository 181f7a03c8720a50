"""`python -m benchmarks.gpu [--minutes 9] [--out DIR] [--stages a,b] [--small]`: the most of a GPU's first minutes.

Stages run one after the other, the most valuable first: facts of the device, tests, the head, training, two ranks on
one device, energy. Each is a process group of its own, with a limit that follows from the minutes left and from its
share among the stages that are still to come; one that passes its limit is killed with all its processes, and the next
begins. What is found is in `DIR/gpu-DEVICE.json` and `.md` as soon as it is found; all output is in `.log`. This
process never touches the device. Without a GPU the sizes are small (`--small`), to try the command itself.

Exit codes: 0 every stage is done, or skipped or cut short for a reason that is told; 1 one failed, hung or was not
begun; 2 bad input.
"""

from __future__ import annotations

import argparse
import math
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from rich.console import Console

from benchmarks.gpu.findings import read_found
from benchmarks.gpu.report import Report, Result
from benchmarks.gpu.stages import STAGES, Stage, chosen
from benchmarks.measuring import parser, wide_console
from benchmarks.processes import ROOT, finish, start, tail
from common.machine import cpu_name

PROBE = "import torch; print(torch.cuda.get_device_name() if torch.cuda.is_available() else '')"
PROBE_S = 120.0
ENDING_S = 4.0  # kept back for the last page, and of each stage's limit for its own end
RESULTS = ROOT / "benchmarks" / "results"


class Interrupted(Exception):
    """A signal told this process to end."""


def gpu_name() -> str | None:
    """The first GPU as a process of its own sees it; None: there is none."""
    said = subprocess.run([sys.executable, "-c", PROBE], cwd=ROOT, capture_output=True, text=True, timeout=PROBE_S)
    if said.returncode:
        raise RuntimeError(f"torch cannot be imported:\n{tail(said.stderr)}")
    return said.stdout.strip() or None


def limit_of(stage: Stage, later: Sequence[Stage], left_s: float) -> float:
    """Seconds for a stage, if so many are left for it and the later ones."""
    shared = left_s * stage.share / (stage.share + sum(other.share for other in later))
    return min(left_s, max(shared, stage.least_s))


def run_stage(stage: Stage, limit_s: float, report: Report, scratch: Path, log: IO[bytes]) -> Result:
    """Runs one stage; its findings are on disk while it runs, and its result when this returns or raises."""
    result = report.results[stage.name] = Result("running", limit_s=limit_s)
    folder = scratch / stage.name
    folder.mkdir()
    path = folder / "findings.json"
    log.write(f"\n==== {stage.name}: {stage.what}; up to {limit_s:.0f} s\n".encode())
    log.flush()
    first, began = log.tell(), time.monotonic()
    seen = 0

    def look() -> None:
        nonlocal seen
        with suppress(OSError):
            if (changed := path.stat().st_mtime_ns) != seen:
                seen, result.found, result.seconds = changed, read_found(path), time.monotonic() - began
                report.write()

    own_s = max(limit_s * 0.5, limit_s - ENDING_S)
    process = start(stage.words(path, own_s, report.small), log, subprocess.STDOUT, group=True)
    try:
        code = finish(process, limit_s, look)
    except BaseException:
        result.outcome, result.reason = "interrupted", "this command was told to end"
        raise
    else:
        result.found = read_found(path)
        result.outcome, result.reason = outcome_of(result, code, limit_s)
    finally:
        result.seconds = time.monotonic() - began
        if result.outcome not in ("ok", "skipped"):
            result.output_tail = tail(written(Path(log.name), first)) or None
        report.write()
    return result


def outcome_of(result: Result, code: int | None, limit_s: float) -> tuple[str, str | None]:
    """The outcome and why, in words."""
    findings = result.found
    if code is None:
        return "timed out", f"killed after its {limit_s:.0f} s"
    if findings.problems:
        more = f" (and {len(findings.problems) - 1} more)" if len(findings.problems) > 1 else ""
        return "failed", findings.problems[0] + more
    if code:
        return "failed", f"ended with exit code {code}" if code > 0 else f"ended by signal {-code}"
    if findings.not_run:
        return "skipped", findings.not_run
    if findings.left_out:
        return "cut short", f"no time for {len(findings.left_out)}: {', '.join(findings.left_out[:3])}"
    return "ok", None


def written(path: Path, first: int) -> str:
    """What the log holds from a byte on, or its last 100,000 bytes if that is more."""
    with path.open("rb") as log:
        log.seek(max(first, path.stat().st_size - 100_000))
        return log.read().decode(errors="replace")


def run_all(stages: Sequence[Stage], report: Report, minutes: float, began: float, console: Console) -> None:
    """Runs the stages in turn, as long as there is time."""
    stop = began + 60 * minutes - ENDING_S
    with tempfile.TemporaryDirectory(prefix="overtone-gpu-") as scratch, report.path(".log").open("wb") as log:
        for index, stage in enumerate(stages):
            left_s = stop - time.monotonic()
            if left_s < stage.least_s:
                reason = f"{max(0.0, left_s):.0f} s were left, and it needs {stage.least_s:.0f}"
                report.results[stage.name] = Result("no time", reason=reason)
                report.write()
                continue
            limit_s = limit_of(stage, stages[index + 1 :], left_s)
            console.print(f"{stage.name}: {stage.what} (up to {limit_s:.0f} s)")
            try:
                result = run_stage(stage, limit_s, report, Path(scratch), log)
            finally:
                report.seconds = time.monotonic() - began
            console.print(f"  {result.outcome} after {result.seconds:.0f} s", highlight=False)
        report.seconds = time.monotonic() - began
        report.write()


def arguments() -> argparse.ArgumentParser:
    """The command's options, and the hidden ones by which it calls itself for a stage."""
    command = parser("gpu", __doc__)
    command.add_argument("--minutes", type=float, default=9.0, help="for all stages together (default %(default)g)")
    command.add_argument("--out", type=Path, default=RESULTS, metavar="DIR", help="default: benchmarks/results")
    names = ",".join(stage.name for stage in STAGES)
    command.add_argument("--stages", metavar="A,B", help=f"of {names} (default: all)")
    command.add_argument("--small", action="store_true", help="small sizes; so it is without a GPU")
    command.add_argument("--stage", help=argparse.SUPPRESS)  # the child of run_stage
    command.add_argument("--findings", type=Path, help=argparse.SUPPRESS)
    command.add_argument("--seconds", type=float, help=argparse.SUPPRESS)
    return command


@contextmanager
def stopped_by_signals() -> Iterator[None]:
    """Turns a signal to end into `Interrupted`, so that stages are killed and the page is written."""

    def stop(number: int, frame: object) -> None:
        raise Interrupted(signal.Signals(number).name)

    numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
    before = {number: signal.signal(number, stop) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def main(argv: Sequence[str] | None = None, stages: Sequence[Stage] = STAGES) -> int:
    """The command, and its child for one stage; `stages` are others in tests. Exit codes are in the file's head."""
    began = time.monotonic()
    args = arguments().parse_args(argv)
    if args.stage is not None:
        return chosen(args.stage, stages)[0].run(args.findings, args.seconds, args.small)
    console = wide_console()
    try:
        if not (math.isfinite(args.minutes) and args.minutes > 0):
            raise ValueError(f"--minutes {args.minutes:g}: expected a number above 0, such as --minutes 9")
        picked = chosen(args.stages, stages)
        try:
            args.out.mkdir(parents=True, exist_ok=True)
            if not os.access(args.out, os.W_OK):
                raise PermissionError("it may not be written to")
        except OSError as error:
            raise ValueError(f"--out {args.out}: {error}; give a folder that can be written") from None
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    try:
        gpu = gpu_name()
    except (RuntimeError, subprocess.SubprocessError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    report = Report(
        device=gpu or "cpu",
        small=args.small or gpu is None,
        minutes=args.minutes,
        command=list(sys.argv[1:] if argv is None else argv),
        folder=args.out,
        results={stage.name: Result() for stage in picked},
    )
    report.write()
    console.print(f"{gpu or cpu_name()}; small sizes: {report.small}; {report.path('.md')}", soft_wrap=True)
    try:
        with stopped_by_signals():
            run_all(picked, report, args.minutes, began, console)
    except Interrupted as signalled:
        console.print(f"ended by {signalled}")
        report.write()
    report.show(console)
    if report.failed:
        console.print(f"not done: {', '.join(report.failed)}")
    return int(bool(report.failed))


if __name__ == "__main__":
    sys.exit(main())
