"""What a run tells: `metrics.jsonl` and TensorBoard with the same figures, and a line on the console. Rank 0 only.

A record of metrics.jsonl has a `kind` (train, eval, save) and a `step`; what was not measured, or is not finite, is
null.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from common.gpus import PEAK_FLOPS
from common.machine import cores, cpu_name
from common.plain import from_json, plain, to_json
from common.units import clock

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


def read_records(run: Path) -> list[dict[str, Any]]:
    """The records of a run's metrics.jsonl; a last line that was cut off is left out, a NaN of an older one is None."""
    records = []
    for line in (run / "metrics.jsonl").read_text().splitlines():
        try:
            records.append(from_json(line))
        except json.JSONDecodeError:
            log.warning("%s: a line that was cut off is left out", run / "metrics.jsonl")
    return records


class Recorder:
    """Open with the first step that is still to come: records of later steps, from before a resume, are dropped.

    A disk that is full does not end the run: records wait in memory for room, TensorBoard's are given up.
    """

    def __init__(
        self, run: Path, first_step: int, steps: int, tensorboard: bool, console: Console | None = None
    ) -> None:
        path = run / "metrics.jsonl"
        if path.exists():
            kept = [record for record in read_records(run) if record["step"] <= first_step]
            draft = path.with_suffix(".draft")
            draft.write_text("".join(to_json(record) + "\n" for record in kept))
            os.replace(draft, path)
        self._file = path.open("ab", buffering=0)
        self._pending = b""
        self._writer = None
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self._writer = SummaryWriter(str(run), purge_step=first_step + 1)
        self._steps = steps
        self._console = console or Console(highlight=False)
        self._live: Progress | None = None
        if self._console.is_terminal:
            columns = (BarColumn(), TextColumn("{task.fields[told]}"), TimeRemainingColumn())
            self._live = Progress(*columns, console=self._console)
            self._task = self._live.add_task("train", total=steps, completed=first_step, told="")
            self._live.start()

    def record(self, kind: str, step: int, values: dict[str, Any]) -> None:
        """Appends one record, and its numbers to TensorBoard."""
        waiting, values = bool(self._pending), plain(values)
        self._pending += to_json({"kind": kind, "step": step, **values}).encode() + b"\n"
        try:
            while self._pending:
                self._pending = self._pending[self._file.write(self._pending) :]
        except OSError as error:
            if not waiting:
                log.error("%s: %s; records wait in memory until they can be written", self._file.name, error)
        with self._giving_up_events():
            for name, value in values.items():
                if self._writer is not None and isinstance(value, int | float):
                    self._writer.add_scalar(f"{kind}/{name}", value, step)

    @contextmanager
    def _giving_up_events(self) -> Iterator[None]:
        """TensorBoard's thread ends when it cannot write, and says so at the next call."""
        try:
            yield
        except OSError as error:
            log.error("TensorBoard's events cannot be written (%s): metrics.jsonl has the same figures", error)
            self._writer = None

    def progress(self, step: int, values: dict[str, Any], seconds_left: float) -> None:
        """The training line: live on a terminal, a plain line elsewhere."""
        told = training_line(values)
        if self._live is not None:
            self._live.update(self._task, completed=step, told=f"{step}/{self._steps} {told}")
        else:
            self.say(f"step {step}/{self._steps} {told} eta {clock(seconds_left)}")

    def say(self, text: str) -> None:
        self._console.print(text, soft_wrap=True)

    def close(self) -> None:
        if self._live is not None:
            self._live.stop()
        self._file.close()
        with self._giving_up_events():
            if self._writer is not None:
                self._writer.close()


def training_line(values: dict[str, Any]) -> str:
    parts = [
        "loss not finite" if values["loss"] is None else f"loss {values['loss']:.4f}",
        f"{values['tokens_per_s']:,.0f} tok/s",
        "norm not finite"
        if values["grad_norm"] is None
        else f"norm {values['grad_norm']:.3f}->{values['grad_norm_clipped']:.3f}",
        f"lr {values['lr']:.2e}",
    ]
    if values["gpu_j_per_token"] is not None:
        parts.append(f"{values['gpu_j_per_token']:.2e} J/tok")
    if values["mfu"] is not None:
        parts.append(f"MFU {values['mfu']:.1%}")
    if values["skipped"]:
        parts.append(f"skipped {values['skipped']}")
    return " ".join(parts)
