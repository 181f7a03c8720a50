"""What a run tells: `metrics.jsonl` and TensorBoard with the same figures, and a line on the console. Rank 0 only."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from common.errors import ConfigError
from common.files import free_name, replacing
from common.gpus import PEAK_FLOPS
from common.machine import cores, cpu_name
from common.strict_json import plain, to_json
from common.units import clock
from pretrain.records import Lines, Record, Train, scan
from pretrain.run_folder import RunFolder

log = logging.getLogger(__name__)


def peak_flops(device: torch.device) -> float | None:
    """Dense bf16 peak of a device in FLOP/s; None where it is not known."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for part, peak in PEAK_FLOPS.items() if part in name), None)


def machine() -> str:
    """The device, in words."""
    if torch.cuda.is_available():
        return f"{torch.cuda.device_count()} x {torch.cuda.get_device_name()}"
    return f"{cores()} cores of {cpu_name()}"


def trim(metrics: Path, step: int, own: bool = False) -> None:
    """Writes a metrics.jsonl, if there is one, anew without the records after `step` and without wrong lines. One with
    wrong lines, or that is no file, is kept beside it.

    Args:
        own: the steps so far were trained in its run folder, so that they all have a record: what is lost is told.

    Raises OSError.
    """
    lines, odd, until = Lines(), False, step if own else 0
    try:
        lines = scan(metrics)
    except FileNotFoundError:
        lines.warn(metrics, until)
        return
    except ConfigError as error:
        log.warning("%s", error)
        odd = True
    kept = [at for at, record in enumerate(lines.records) if record.step <= step]
    lines = Lines([lines.values[at] for at in kept], [lines.records[at] for at in kept], lines.wrong)
    lines.warn(metrics, until)
    with replacing(metrics) as draft:
        draft.write_text("".join(to_json(line) + "\n" for line in lines.values), encoding="utf-8")
        if odd or lines.wrong:
            aside = free_name(metrics.with_name(f"{metrics.name}.damaged"))
            try:
                os.link(metrics, aside, follow_symlinks=False)
            except OSError:  # a folder, or a file system without links
                os.replace(metrics, aside)
            log.warning("%s as it was is kept as %s", metrics, aside.name)


class Recorder:
    """Where a run's records go: `metrics.jsonl`, TensorBoard, the console. One that is opened at `first_step`, the
    updates so far, drops the records of later steps, which are from before a resume; `own`: as of `trim`.

    A disk that is full does not end the run: records wait in memory for room, TensorBoard's are given up.
    """

    def __init__(
        self,
        run: RunFolder,
        first_step: int,
        steps: int,
        tensorboard: bool,
        console: Console | None = None,
        own: bool = False,
    ) -> None:
        trim(run.metrics, first_step, own)
        self._file = run.metrics.open("ab", buffering=0)  # so that a write tells what the disk took of it
        self._pending = b""
        self._writer = None
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            with self._giving_up_events():
                self._writer = SummaryWriter(str(run.path), purge_step=first_step + 1)
        self._steps = steps
        self._console = console or Console(highlight=False)
        self._live: Progress | None = None
        if self._console.is_terminal:
            columns = (BarColumn(), TextColumn("{task.fields[told]}"), TimeRemainingColumn())
            self._live = Progress(*columns, console=self._console)
            self._task = self._live.add_task("train", total=steps, completed=first_step, told="")
            self._live.start()

    def record(self, record: Record) -> None:
        """Appends one record, and its numbers to TensorBoard."""
        waiting = bool(self._pending)
        self._pending += record.line().encode() + b"\n"
        try:
            while self._pending:
                self._pending = self._pending[self._file.write(self._pending) :]
        except OSError as error:
            if not waiting:
                log.error("%s: %s; records wait in memory until they can be written", self._file.name, error)
        with self._giving_up_events():
            for name, value in plain(record.values()).items():
                if self._writer is not None and isinstance(value, int | float):
                    self._writer.add_scalar(f"{record.kind}/{name}", value, record.step)

    @contextmanager
    def _giving_up_events(self) -> Iterator[None]:
        """TensorBoard's thread ends when it cannot write, and says so at the next call."""
        try:
            yield
        except OSError as error:
            log.error("TensorBoard's events cannot be written (%s): metrics.jsonl has the same figures", error)
            self._writer = None

    def progress(self, record: Train, seconds_left: float) -> None:
        """The training line: live on a terminal, a plain line elsewhere."""
        line = f"{record.step}/{self._steps} {training_line(record)}"
        if self._live is not None:
            self._live.update(self._task, completed=record.step, told=line)
        else:
            self.say(f"step {line} eta {clock(seconds_left)}")

    def say(self, text: str) -> None:
        """Prints a line, above the live one on a terminal."""
        self._console.print(text, soft_wrap=True)

    def close(self) -> None:
        """Ends the live line and the files; what still waits for room on the disk is lost."""
        if self._live is not None:
            self._live.stop()
        self._file.close()
        with self._giving_up_events():
            if self._writer is not None:
                self._writer.close()


def training_line(record: Train) -> str:
    """A record of training as the console shows it, without its step; what was not measured is left out."""
    before, after = record.grad_norm, record.grad_norm_clipped
    parts = [
        "loss not finite" if record.loss is None else f"loss {record.loss:.4f}",
        f"{record.tokens_per_s:,.0f} tok/s",
        "norm not finite" if before is None else f"norm {before:.3f}->{after:.3f}",
        f"lr {record.lr:.2e}",
    ]
    if record.gpu_j_per_token is not None:
        parts.append(f"{record.gpu_j_per_token:.2e} J/tok")
    if record.mfu is not None:
        parts.append(f"MFU {record.mfu:.1%}")
    if record.skipped:
        parts.append(f"skipped {record.skipped}")
    return " ".join(parts)
