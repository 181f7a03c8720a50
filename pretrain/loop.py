"""The training loop: set the rate, accumulate, step, record, maybe evaluate, maybe save, until done or told to stop."""

from __future__ import annotations

import logging
import math
import signal
from dataclasses import dataclass, replace
from types import FrameType, TracebackType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from data.loader import Windows
from data.shards import open_split
from pretrain import checkpoint
from pretrain.batches import Batches
from pretrain.checkpoint import Progress
from pretrain.config import EXIT_DIVERGED, EXIT_PREEMPTED, RunConfig, dump
from pretrain.energy import Meter, Spent, zeus_counter
from pretrain.engine import Step, Trainer
from pretrain.evaluate import evaluate
from pretrain.fragments import Fragment, finish_load, head_fragments, trunk_fragments
from pretrain.metrics import Recorder, peak_flops, read_records
from pretrain.ranks import Ranks

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Outcome:
    """How a run ended: the exit code and why, in words."""

    code: int
    reason: str
    step: int


class StopSignal:
    """Remembers a SIGTERM, SIGINT or SIGUSR1 until the ranks agree on it; a second SIGINT interrupts at once."""

    SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)

    def __init__(self) -> None:
        self.received: str | None = None

    def __enter__(self) -> StopSignal:
        self._before = {number: signal.signal(number, self._note) for number in self.SIGNALS}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, _: FrameType | None) -> None:
        if self.received == "SIGINT" and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = signal.Signals(number).name


class Run:
    """One rank's run: trainer, data, meter, recorder, and the progress that is saved and resumed."""

    def __init__(self, cfg: RunConfig, ranks: Ranks) -> None:
        self.cfg, self.ranks = cfg, ranks
        self.folder = cfg.run / "checkpoints"
        train = open_split(cfg.data.path, "train")
        self.val = open_split(cfg.data.path, "val")
        self.who = checkpoint.identity(cfg, train.fingerprint, train.tokenizer_sha256)
        self.batches = Batches(Windows(train, cfg.model.seq_len, cfg.train.seed), cfg, ranks)
        found = checkpoint.find(self.folder, cfg.resume)
        if found is not None:
            checkpoint.check_identity(found, self.who)
        ranks.barrier()  # everybody has looked before anything is touched
        if ranks.first:
            checkpoint.remove_drafts(self.folder)
            cfg.run.mkdir(parents=True, exist_ok=True)
            (cfg.run / "config.yaml").write_text(dump(cfg))
        self.trainer = Trainer(cfg, ranks)
        self.progress = Progress()
        self.meter = Meter(ranks, zeus_counter(ranks))
        if found is not None:
            self.progress = checkpoint.load(found, self._fragments())
            finish_load(self.trainer.engine, self.trainer.head_optimizer, self.progress.updates)
        self.trainer.head.progress = cfg.head_progress(self.progress.step - 1)  # as the last update left it
        self.recorder = None
        if ranks.first:
            self.recorder = Recorder(cfg.run, self.progress.step, cfg.train.steps, cfg.logging.tensorboard)
            self.say(f"resumed from {found}" if found else f"started in {cfg.run}")
        self.skipped_in_a_row = 0
        self._saved_step: int | None = self.progress.step if found else None

    def say(self, text: str) -> None:
        if self.recorder is not None:
            self.recorder.say(text)

    def train(self) -> Outcome:
        """Trains to the last step, or to a signal, or until too many steps in a row were not finite."""
        cfg = self.cfg
        with StopSignal() as stop:
            window = _Window(self)
            for step in range(self.progress.step, cfg.train.steps):
                torch.manual_seed(_dropout_seed(cfg.train.seed, step, self.ranks.rank))
                self.trainer.head.progress = cfg.head_progress(step)
                taken = self.trainer.train_step(self.batches.of(step), cfg.lr_at(step))
                self._advance(taken)
                window.add(taken)
                done = step + 1
                last = done == cfg.train.steps
                stopping = self.ranks.any(stop.received is not None)
                diverged = self.skipped_in_a_row >= cfg.optim.max_skipped
                evaluating = not (stopping or diverged) and (last or due(done, cfg.evaluation.every))
                saving = not diverged and (last or stopping or due(done, cfg.checkpoint.every))
                if last or stopping or diverged or evaluating or saving or due(done, cfg.logging.every):
                    window.close(done, cfg.lr_at(step))
                    if evaluating:
                        self.evaluate()
                    if saving:
                        self.save()
                    window = _Window(self)
                if diverged:
                    return Outcome(EXIT_DIVERGED, f"{self.skipped_in_a_row} steps in a row were not finite", done)
                if stopping and not last:
                    return Outcome(EXIT_PREEMPTED, f"stopped by {stop.received or 'a signal to another rank'}", done)
            window.drop()
        if not self.ranks.any(self._evaluated()):  # nothing was left to train, and the last evaluation was cut off
            self.evaluate()
        return Outcome(0, "done", self.progress.step)

    def _evaluated(self) -> bool:
        """Whether this rank, the first, knows of an evaluation of the present step."""
        step = self.progress.step
        return self.recorder is not None and any(
            record["kind"] == "eval" and record["step"] == step for record in read_records(self.cfg.run)
        )

    def _advance(self, taken: Step) -> None:
        self.skipped_in_a_row = 0 if taken.applied else self.skipped_in_a_row + 1
        self.progress = replace(
            self.progress,
            step=self.progress.step + 1,
            updates=self.progress.updates + int(taken.applied),
            tokens=self.progress.tokens + self.cfg.train.tokens_per_step,
        )

    def evaluate(self) -> None:
        """Scores the whole held-out split; its time and energy are accounted apart."""
        cfg, step = self.cfg, self.progress.step
        with self.meter.window("eval") as spent:
            micro_batch = cfg.evaluation.micro_batch or cfg.train.micro_batch
            found = evaluate(self.trainer.token_losses, self.val, cfg.model.seq_len, micro_batch, self.ranks)
        if self.recorder is not None:
            values = {**found.as_dict(), "seconds": spent[0].seconds, "gpu_j": spent[0].gpu_j}
            self.recorder.record("eval", step, values)
            self.say(f"held-out perplexity {found.perplexity:.2f}, {found.bits_per_byte:.4f} bits/byte at step {step}")

    def save(self) -> None:
        """Writes a checkpoint, unless this step's is there already."""
        step = self.progress.step
        if self._saved_step == step:
            return
        with self.meter.window("save") as spent:
            layout = {"world": self.ranks.world, "parallel": self.cfg.parallel.model_dump(mode="json")}
            path = checkpoint.save(
                self.folder, self._fragments(), self.progress, self.who, layout, self.ranks, self.cfg.checkpoint.keep
            )
        self._saved_step = step
        if self.recorder is not None:
            self.recorder.record("save", step, {"seconds": spent[0].seconds, "gpu_j": spent[0].gpu_j})
            self.say(f"saved {path} in {spent[0].seconds:.1f} s")

    def _fragments(self) -> dict[str, Fragment]:
        head = head_fragments(self.trainer.head, self.trainer.head_optimizer, writes=self._first_replica())
        return {**trunk_fragments(self.trainer.engine, self.ranks.first), **head}

    def _first_replica(self) -> bool:
        return self.ranks.replicas is None or torch.distributed.get_rank(self.ranks.replicas) == 0

    def close(self) -> None:
        if self.recorder is not None:
            self.recorder.close()


class _Window:
    """The steps between two records: their losses stay on the device until the record is written."""

    def __init__(self, run: Run) -> None:
        self.run = run
        self.losses: list[Tensor] = []
        self.norm = torch.zeros(())
        self.skipped = 0
        run.batches.waited_s = 0.0
        run.meter.begin("train")

    def add(self, taken: Step) -> None:
        self.losses.append(taken.loss)
        self.norm = taken.norm
        self.skipped += not taken.applied

    def drop(self) -> None:
        self.run.meter.end()

    def close(self, step: int, lr: float) -> None:
        """Ends the window and records it. Every rank calls it."""
        run, cfg = self.run, self.run.cfg
        spent = run.meter.end()
        loss = run.ranks.sum(torch.stack(self.losses).double()) / run.ranks.world
        before = run.progress
        total = Spent(before.train_seconds, before.train_gpu_j if before.train_seconds else 0.0) + spent
        run.progress = replace(before, train_seconds=total.seconds, train_gpu_j=total.gpu_j)
        if run.recorder is None:
            return
        tokens = len(self.losses) * cfg.train.tokens_per_step
        rate = tokens / spent.seconds
        peak = peak_flops(run.ranks.device)
        norm = self.norm.item()
        head = run.trainer.head
        values: dict[str, Any] = {
            "loss": loss[-1].item(),
            "loss_mean": loss.mean().item(),
            "tokens": run.progress.tokens,
            "lr": lr,
            "exponent": torch.as_tensor(head.exponent).item() if head.has_exponent else None,
            "grad_norm": norm if math.isfinite(norm) else None,
            "grad_norm_clipped": min(norm, cfg.optim.clip or norm) if math.isfinite(norm) else None,
            "skipped": self.skipped,
            "seconds": spent.seconds,
            "tokens_per_s": rate,
            "data_wait_s": run.batches.waited_s,
            "gpu_j": spent.gpu_j,
            "gpu_j_per_token": None if spent.gpu_j is None else spent.gpu_j / tokens,
            "mfu": None if peak is None else cfg.model.flops_per_token() * rate / (peak * run.ranks.world),
        }
        run.recorder.record("train", step, values)
        left = (cfg.train.steps - step) * spent.seconds / len(self.losses)
        run.recorder.progress(step, values, left)


def due(step: int, every: int | None) -> bool:
    return every is not None and step % every == 0


def _dropout_seed(seed: int, step: int, rank: int) -> int:
    """Dropout's random numbers are a function of (seed, step, rank), so a resumed run draws what the unbroken one
    drew.
    """
    return int(np.random.SeedSequence([seed, step, rank]).generate_state(1, np.uint64)[0] >> 1)
