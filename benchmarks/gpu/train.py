"""The main job as its user starts it, one process under DeepSpeed ZeRO 1, and the same trunk in plain PyTorch.

Runs train on random ids until their share of the time is over, each a process of its own; figures are of the records
after the first ones, which hold compiling. The first run is stopped by a signal, saves, and is resumed at the end.
"""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from benchmarks.gpu import tokens
from benchmarks.gpu.findings import Findings
from benchmarks.measuring import batches_of, parser, timed, trainer_of, wait
from benchmarks.processes import finish, start
from common.strict_json import to_json
from pretrain.records import read_lines

CONFIG = "configs/gpt2-124m-untied.yaml"
VOCAB, PADDED = 50_257, 50_304  # of the ids; of plain PyTorch's logits, as nanoGPT pads them
STEPS, OTHERS = 60, 12  # that the first run and the others take if there is time
MORE = 3  # after the resume
WARM_STEPS = 3  # that do not count: compiling, the allocator's first passes
LEAST = 2  # steady steps without which no run is ended, but at its limit
SAVE_S = 14.0  # from the signal to the end of a run that saves
SHORT_S = 120.0  # a stage of less takes fewer tokens per step
SHORT_TOKENS = 8 * 15 * 1024
NEED_S = 38.0  # with less no run is begun
SMALL = (
    "model={seq_len: 32, layers: 2, heads: 2, dim: 64}", "train={steps: 10000, tokens_per_step: 256, micro_batch: 4, "
    "precision: float32}",
)  # fmt: skip
SMALL_VOCAB, SMALL_STEPS = 512, 12
USUAL = ("parallel.zero=1", "evaluation.every=null", "checkpoint.every=null", "logging.tensorboard=false",
         "logging.every=1")  # fmt: skip


@dataclass(frozen=True)
class Part:
    """One measurement of the stage."""

    name: str
    share: float  # of the time, beside the others'
    kind: str  # run, plain, phases or resume
    overrides: tuple[str, ...] = ()


PARTS = (
    Part("euclidean", 5.0, "run"),
    Part("dot", 2.0, "run", ("head.distance=dot",)),
    Part("plain PyTorch, softmax", 2.0, "plain", ("head.distance=dot",)),
    Part("phases of a step, euclidean", 2.0, "phases"),
    Part("resume, euclidean", 1.5, "resume"),
    Part("euclidean, head.fused=true", 1.7, "run", ("head.fused=true",)),
    Part("euclidean, train.deterministic=true", 1.7, "run", ("train.deterministic=true",)),
    Part("euclidean, head.fused=false", 1.7, "run", ("head.fused=false",)),
)
SMALL_PARTS = tuple(part for part in PARTS if part.name == "euclidean" or part.kind in ("plain", "resume"))


def records_of(run: Path) -> list[dict[str, Any]]:
    """The records of a run so far, without a line that is only half there."""
    with suppress(OSError):
        return read_lines(run / "metrics.jsonl")
    return []


def steady(records: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
    """Figures of the training records after the first ones; None: there is none."""
    train = [record for record in records if record["kind"] == "train"]
    late = [record for record in train if record["step"] - len(record["losses"]) >= WARM_STEPS] or train[1:]
    if not late:
        return None
    seconds = sum(record["seconds"] for record in late)
    taken = sum(record["seconds"] * record["tokens_per_s"] for record in late)
    joules = [record["gpu_j"] for record in late]
    mfu = late[-1]["mfu"]
    return {
        "tokens_per_s": taken / seconds,
        "mfu": None if mfu is None else mfu / late[-1]["tokens_per_s"] * taken / seconds,
        "gpu_j_per_token": None if None in joules else sum(joules) / taken,
        "data_wait_share": sum(record["data_wait_s"] for record in late) / seconds,
        "steps_measured": sum(len(record["losses"]) for record in late),
        "steps": train[-1]["step"],
        "last_loss": train[-1]["loss"],
    }


class Trained:
    """The stage's runs in their turn."""

    def __init__(self, findings: Findings, prepared: Path, vocab: int, short: bool) -> None:
        self.findings = findings
        self.runs = findings.scratch / "runs"
        self.overrides = [tokens.settings(prepared, vocab), *USUAL]
        if findings.small:
            self.overrides += SMALL
        elif short:
            self.overrides.append(f"train.tokens_per_step={SHORT_TOKENS}")
        self.first: tuple[Part, int] | None = None  # a run that was saved, and at which step

    def run(self, part: Part, limit_s: float) -> None:
        """Trains until the steps are done or the time is over; the first run saves, others are ended as they are."""
        folder = self.runs / part.name.replace(" ", "-")
        keep = part is PARTS[0]
        steps = SMALL_STEPS if self.findings.small else STEPS if keep else OTHERS
        stop_s = limit_s - (SAVE_S if keep and not self.findings.small else 2.0)
        began = time.monotonic()
        process = self._start(part, folder)
        stopped = False

        def tick() -> None:
            nonlocal stopped
            step = max((record["step"] for record in records_of(folder) if record["kind"] == "train"), default=0)
            enough = step >= WARM_STEPS + LEAST and time.monotonic() - began > stop_s
            if (step >= steps or enough) and not stopped:
                if not keep:
                    raise TimeoutError  # nobody asks for its checkpoint
                stopped = True
                process.send_signal(signal.SIGTERM)

        code: int | None = 0
        with suppress(TimeoutError):
            code = finish(process, limit_s, tick)
        figures = steady(records_of(folder))
        if keep and code == 75 and figures:
            self.first = part, figures["steps"]
        if code is None:
            self.findings.problem(f"{part.name}: not done within its {limit_s:.0f} s")
        elif code not in (0, 75) or (keep and code != 75):
            self.findings.problem(f"{part.name}: ended with exit code {code}")
        if figures is None:
            self.findings.problem(f"{part.name}: no record after the first")
            return
        if figures["last_loss"] is None:
            self.findings.problem(f"{part.name}: a loss is not finite")
        self.findings.row("runs", run=part.name, **figures, seconds=time.monotonic() - began)

    def _start(self, part: Part, folder: Path, output: IO[bytes] | None = None) -> subprocess.Popen[bytes]:
        words = [sys.executable, "-m", "pretrain", CONFIG, *self.overrides, *part.overrides, f"run={folder}"]
        return start(words, output, subprocess.STDOUT)

    def resume(self, part: Part, limit_s: float) -> None:
        """Goes on from the first run's checkpoint: it must say so, and count on."""
        if self.first is None:
            self.findings.skip(part.name, "the first run left no checkpoint")
            return
        run, saved = self.first
        folder, log = self.runs / run.name, self.findings.scratch / "resume.log"
        began = time.monotonic()

        def later() -> list[dict[str, Any]]:
            return [record for record in records_of(folder) if record["kind"] == "train" and record["step"] > saved]

        def tick() -> None:
            if any(record["step"] >= saved + MORE for record in later()):
                raise TimeoutError

        code: int | None = 0
        with log.open("wb") as output, suppress(TimeoutError):
            code = finish(self._start(run, folder, output), limit_s, tick)
        said = log.read_text(errors="replace")
        print(said, flush=True)
        train = later()
        losses = [loss for record in train for loss in record["losses"]]
        wrong = []
        if code:
            wrong.append(f"exit code {code}")
        if code is None:
            wrong.append(f"not done within its {limit_s:.0f} s")
        if f"step-{saved:08d}" not in said or "resumed from" not in said:
            wrong.append(f"it does not say that it resumed from step {saved}")
        last = train[-1]["step"] if train else None
        if last != saved + len(losses) or not losses:
            wrong.append(f"{len(losses)} steps after step {saved} do not lead to {last}")
        if None in losses:
            wrong.append("a loss is not finite")
        self.findings.row("resume", from_step=saved, to_step=last,
                          steps=len(losses), first_loss=losses[0] if losses else None,
                          last_loss=losses[-1] if losses else None, seconds=time.monotonic() - began)  # fmt: skip
        if wrong:
            self.findings.problem(f"{part.name}: {'; '.join(wrong)}")

    def worker(self, part: Part, limit_s: float) -> dict[str, Any] | None:
        """What a child of this module says as JSON in its last line."""
        words = [sys.executable, "-m", "benchmarks.gpu.train", part.kind, *self.overrides, *part.overrides]
        words += [f"run={self.runs / part.kind}", f"--seconds={max(1.0, limit_s - 3):.1f}"]
        output = self.findings.scratch / f"{part.kind}.out"
        with output.open("wb") as file:
            code = finish(start([*words, *(["--small"] if self.findings.small else [])], file), limit_s)
        lines = [line for line in output.read_text(errors="replace").splitlines() if line.startswith("{")]
        if code or not lines:
            why = f"not done within its {limit_s:.0f} s" if code is None else f"ended with exit code {code}"
            self.findings.problem(f"{part.name}: {why}")
            return None
        return json.loads(lines[-1])

    def plain(self, part: Part, limit_s: float) -> None:
        """A row of plain PyTorch beside those of our runs."""
        figures = self.worker(part, limit_s)
        if figures is not None:
            self.findings.row("runs", run=part.name, **figures)

    def phases(self, part: Part, limit_s: float) -> None:
        """Tables of a step's phases and kernels, and its memory."""
        figures = self.worker(part, limit_s)
        if figures is None:
            return
        whole = sum(figures["phases_s"].values())
        for name, seconds in figures["phases_s"].items():
            self.findings.row("phases of a step, euclidean", phase=name, seconds=seconds, share=seconds / whole)
        for kernel in figures["kernels"]:
            self.findings.row("kernels of a step, euclidean", **kernel)
        self.findings.figure("kernel_launches_per_step", figures["launches"])
        self.findings.figure("device_share_of_step", figures["device_share"])
        self.findings.figure("peak_memory_gib", figures["peak_memory_gib"])


def headline(rows: Sequence[dict[str, Any]]) -> list[str]:
    """A line for each run: tokens per second, and MFU where the device's peak is known."""
    lines = []
    for row in rows:
        mfu = f", MFU {row['mfu']:.1%}" if row.get("mfu") else ""
        lines.append(f"{row['run']} {row['tokens_per_s']:,.0f} tokens/s{mfu}")
    return lines


def measure(findings: Findings) -> None:
    """The parts in their order, each with its share of the time left."""
    vocab = SMALL_VOCAB if findings.small else VOCAB
    sizes = (40_000, 2_000) if findings.small else (12_000_000, 60_000)
    prepared = tokens.make(findings.scratch / "data", vocab, *sizes)
    trained = Trained(findings, prepared, vocab, short=findings.left_s < SHORT_S)
    parts = SMALL_PARTS if findings.small else PARTS
    if findings.small:
        findings.skip("other runs", "left out of small sizes")
    does: dict[str, Callable[[Part, float], None]] = {
        "run": trained.run, "plain": trained.plain, "phases": trained.phases, "resume": trained.resume,
    }  # fmt: skip
    for index, part in enumerate(parts):
        left = findings.left_s
        if left < (1 if findings.small else NEED_S):
            findings.leave_out(part.name)
            continue
        limit_s = min(left, max(NEED_S, left * part.share / sum(other.share for other in parts[index:])))
        does[part.kind](part, limit_s)
        findings.headline = headline(findings.tables.get("runs", []))
        findings.save()


# ---- processes of their own: plain PyTorch, and a step's phases


def plain_process(cfg: Any, seconds: float, small: bool) -> dict[str, Any]:
    """nanoGPT's way: the same decoder and a linear layer in one compiled module, bf16 autocast, the recipe's
    accumulation.
    """
    deadline = time.monotonic() + seconds
    import torch

    from benchmarks.plain import Plain
    from model.decoder import Decoder
    from pretrain.recorder import peak_flops
    from pretrain.runtime import ranks as process

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    decoder = Decoder(cfg.model.model_copy(update={"compile": False, "tied": False, "attention": "sdpa"}), seed=1)
    plain = Plain(cfg, device, decoder, cfg.model.vocab_size if small else PADDED, compiled=not small)
    batches = batches_of(cfg, process.Ranks(0, 1, 0, 1, device))

    def step(number: int) -> torch.Tensor:
        return plain.step(batches.of(number), cfg.train.precision == "bf16")

    joules = joules_of(device)
    for number in range(WARM_STEPS):
        step(number)
    before, began, done = joules(), time.perf_counter(), 0
    most = SMALL_STEPS if small else STEPS
    while done < 2 or (done < most and time.monotonic() < deadline):
        loss = step(WARM_STEPS + done).item()  # waits for the device
        done += 1
    after, spent = joules(), time.perf_counter() - began
    taken = done * cfg.train.tokens_per_step
    peak = peak_flops(device)
    return {
        "tokens_per_s": taken / spent,
        "mfu": None if peak is None else cfg.model.flops_per_token() * taken / spent / peak,
        "gpu_j_per_token": None if before is None or after is None else (after - before) / taken,
        "data_wait_share": None,
        "steps_measured": done,
        "steps": WARM_STEPS + done,
        "last_loss": loss,
    }


def joules_of(device: Any) -> Callable[[], float | None]:
    """A reader of the GPU's counter, once the device has done what it was told; of None without one."""
    from pretrain.energy.meter import ZeusCounter

    counter = ZeusCounter(int(device.type == "cuda"))

    def read() -> float | None:
        wait(device)
        return None if "gpu" in counter.missing else counter.read()["gpu"][0]

    return read


def phases_process(cfg: Any, seconds: float, small: bool) -> dict[str, Any]:
    """Seconds of a step's phases, which are waited for one by one, and a step's kernels."""
    import torch

    from benchmarks.gpu.kernels import breakdown
    from benchmarks.train import phases_of
    from pretrain.runtime import ranks as process

    trainer = trainer_of(cfg)
    batches, device = batches_of(cfg, trainer.ranks), trainer.ranks.device
    numbers = iter(range(1000))

    def step() -> None:
        trainer.train_step(batches.of(next(numbers)), 1e-4)

    step()
    step()
    free = timed(step, device)  # nothing is waited for within it
    phases_s = phases_of(trainer, batches, lambda: timed(step, device))
    phases_s.pop("communication", None)
    phases_s["rest"] = max(0.0, phases_s["rest"])
    split = breakdown(step, device)
    process.stop()
    share = split.total_ms / 1e3 / free if device.type == "cuda" else None
    return {"phases_s": phases_s, "kernels": split.kernels, "launches": split.launches, "device_share": share,
            "peak_memory_gib": torch.cuda.max_memory_allocated() / 2**30 if share is not None else None}  # fmt: skip


def main() -> int:
    """A child: loads the configuration, measures, and prints its figures as JSON."""
    command = parser("gpu.train", "A child of the stage `train`.")
    command.add_argument("kind", choices=("plain", "phases"))
    command.add_argument("overrides", nargs="*", metavar="key=value")
    command.add_argument("--seconds", type=float, default=60.0)
    command.add_argument("--small", action="store_true")
    args = command.parse_intermixed_args()
    from pretrain.config import load

    cfg = load(CONFIG, args.overrides)
    does = {"plain": plain_process, "phases": phases_process}[args.kind]
    print(to_json(does(cfg, args.seconds, args.small)), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
