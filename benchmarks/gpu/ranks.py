"""Two ranks on one device against one rank: the same losses, step by step, at every ZeRO stage.

The ranks are started as a launcher starts them, by their environment. They meet over gloo, which carries a GPU's
tensors too (`parallel.backend=gloo`), since NCCL refuses two ranks on one GPU.
"""

from __future__ import annotations

import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu import tokens
from benchmarks.gpu.findings import Findings
from benchmarks.gpu.train import records_of
from benchmarks.processes import end, finish, start
from launch.invocation import free_port

VOCAB, STEPS = 67, 6
APART = 1e-5  # of a loss in float32
CONFIG = """\
run: {run}
data: {{path: '{data}', source: {{kind: prepared}}, tokenizer: {{vocab_size: {vocab}}}}}
model: {{seq_len: 16, layers: 2, heads: 2, dim: 32}}
train: {{steps: {steps}, tokens_per_step: 128, micro_batch: 4, precision: float32}}
optim: {{lr: 2.0e-3, eps: 1.0e-4}}  # a large one, so that rounding does not grow
logging: {{every: 1, tensorboard: false}}
"""


@dataclass(frozen=True)
class Layout:
    """How a run is spread; its vocabulary group is all of its ranks."""

    ranks: int
    zero: int

    @property
    def name(self) -> str:
        """In words, for rows and problems."""
        return f"{self.ranks} rank{'s' * (self.ranks > 1)}, ZeRO {self.zero}"


ONE = Layout(1, 1)
TWO = (Layout(2, 1), Layout(2, 2), Layout(2, 3))


def begin(config: Path, run: Path, layout: Layout, shared: bool) -> list[subprocess.Popen[bytes]]:
    """Starts the ranks of a run."""
    settings = [f"run={run}", f"parallel.zero={layout.zero}", f"parallel.vocab={layout.ranks}"]
    if shared and layout.ranks > 1:
        settings.append("parallel.backend=gloo")
    words = [sys.executable, "-m", "pretrain", str(config), *settings]
    if layout.ranks == 1:
        return [start(words, None, subprocess.STDOUT)]
    meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "OMP_NUM_THREADS": "1"}
    world = {"WORLD_SIZE": str(layout.ranks), "LOCAL_SIZE": str(layout.ranks)}
    return [
        start(words, None, subprocess.STDOUT, extra={**meeting, **world, "RANK": str(rank), "LOCAL_RANK": str(rank)})
        for rank in range(layout.ranks)
    ]


def losses_of(run: Path) -> list[float | None]:
    """The loss of every step of a run, in nats per token; None: not finite."""
    return [loss for record in records_of(run) if record["kind"] == "train" for loss in record["losses"]]


def furthest(one: list[Any], two: list[Any]) -> float | None:
    """The largest relative difference of two rows of losses; None where they do not cover the steps."""
    if len(one) != STEPS or len(two) != STEPS or None in one or None in two:
        return None
    return max(abs(a - b) / abs(a) for a, b in zip(one, two, strict=True))


def measure(findings: Findings) -> None:
    """Runs every layout and compares its losses with those of one rank, step by step."""
    on_gpu = torch.cuda.is_available()
    data = tokens.make(findings.scratch / "data", VOCAB, 20_000, 1_000)
    config = findings.scratch / "tiny.yaml"
    config.write_text(CONFIG.format(run=findings.scratch / "run", data=data, vocab=VOCAB, steps=STEPS))
    layouts = [ONE, *(TWO[-1:] if findings.small else TWO)]
    if findings.small:
        findings.skip("other ZeRO stages", "left out of small sizes")
    runs = {layout: findings.scratch / f"ranks-{layout.ranks}-{layout.zero}" for layout in layouts}
    jobs: dict[Layout, list[subprocess.Popen[bytes]]] = {}
    codes: dict[Layout, list[int | None]] = {}
    deadline = time.monotonic() + findings.left_s
    try:
        for layout in layouts:  # side by side on a GPU's machine; in turn where there may be two cores
            jobs[layout] = begin(config, runs[layout], layout, on_gpu)
            if not on_gpu:
                codes[layout] = [finish(one, deadline - time.monotonic()) for one in jobs[layout]]
        for layout, job in jobs.items():
            if layout not in codes:
                codes[layout] = [finish(one, deadline - time.monotonic()) for one in job]
    finally:
        for job in jobs.values():
            for process in job:
                end(process)
    truth = losses_of(runs[ONE])
    apart: list[float] = []
    for layout in layouts:
        found = losses_of(runs[layout])
        difference = None if layout == ONE else furthest(truth, found)
        findings.row("layouts", layout=layout.name, vocabulary_group=layout.ranks, steps=len(found),
                     last_loss=found[-1] if found else None, relative_difference=difference)  # fmt: skip
        if any(codes[layout]) or None in codes[layout]:
            ends = ["past the limit" if code is None else f"code {code}" for code in codes[layout]]
            findings.problem(f"{layout.name}: its processes ended with {', '.join(ends)}")
        elif layout != ONE and difference is None:
            findings.problem(f"{layout.name}: {len(found)} finite losses, expected {STEPS}")
        elif difference is not None:
            apart.append(difference)
            if difference > APART:
                findings.problem(f"{layout.name}: losses differ by {difference:.1e} of one rank's, more than {APART}")
    if apart:
        findings.figure("largest_relative_difference", max(apart))
        findings.tell(f"{len(apart)} layouts of two ranks within {max(apart):.1e} of one rank's losses")
