"""The training loop: set the rate, accumulate, step, record, maybe evaluate, maybe save, until done or told to stop."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from common.errors import ConfigError
from common.exits import EXIT_DIVERGED, EXIT_NOT_SAVED, EXIT_PREEMPTED
from common.files import replace_file
from data.loader import EvaluationWindows, Windows
from data.shards import open_split
from pretrain.analysis.heldout import identify
from pretrain.analysis.scoring import evaluate, figure, scoring
from pretrain.batches import Batches
from pretrain.checkpoints import folder as checkpoint
from pretrain.checkpoints.folder import Progress
from pretrain.checkpoints.fragments import Fragment, finish_load, head_fragments, trunk_fragments
from pretrain.checkpoints.saver import SaveError, Saver, versions
from pretrain.config import RunConfig, dump
from pretrain.energy.meter import Meter, Spent, zeus_counter
from pretrain.energy.sustainability import COUNTERS
from pretrain.engine import Step, Trainer
from pretrain.metrics import Recorder, peak_flops, read_records
from pretrain.run_folder import EXIT_RECORD
from pretrain.runtime.ranks import Ranks
from pretrain.runtime.signals import StopSignal

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Outcome:
    """How a run ended: the exit code and why, in words."""

    code: int
    reason: str
    step: int


class Run:
    """One rank's run: trainer, data, meter, recorder, and the progress that is saved and resumed."""

    def __init__(self, cfg: RunConfig, ranks: Ranks, pulse: Callable[[float | None], None] = lambda limit_s: None):
        """The run folder is the caller's: its lock is held, or nobody else knows of it.

        `pulse` hears that this rank gets on, and in how many seconds again if that is not as before.
        """
        self.cfg, self.ranks, self.pulse = cfg, ranks, pulse
        self.folder = cfg.run / "checkpoints"
        train = open_split(cfg.data.path, "train")
        self.val = EvaluationWindows(open_split(cfg.data.path, "val"), cfg.model.seq_len)
        self.who = checkpoint.identity(cfg, train.fingerprint, train.tokenizer_sha256)
        self.batches = Batches(Windows(train, cfg.model.seq_len, cfg.train.seed), cfg, ranks)
        found = checkpoint.find(self.folder, cfg.resume, ranks, cfg.resume_check)
        if found is not None:
            now = {**self._state(), "versions": versions()}
            differing = checkpoint.audit(checkpoint.read_state(found), now, cfg.resume_allow)
            checkpoint.check_audit(found, differing)
        self.meter = Meter(ranks, zeus_counter(ranks))
        self._check_budget(found)
        ranks.barrier()  # everybody has looked before anything is touched
        self._put_in_order()
        self.trainer = Trainer(cfg, ranks, train.eos_id)
        self.saver = Saver(self.folder, ranks, cfg.checkpoint, cfg.timeouts.save_s)
        self.progress = Progress(joules=dict.fromkeys(self.meter.measured, 0.0))
        if found is not None:
            self.progress = checkpoint.load(found, self._fragments())
            finish_load(self.trainer.engine, self.trainer.head_optimizer, self.progress.updates)
        self._counted = set(self.progress.joules or ())  # the parts of the machine that a budget is of
        self.trainer.head.progress = cfg.head_progress(self.progress.step - 1)  # as the last update left it
        self.recorder = None
        if ranks.first:
            self.recorder = Recorder(cfg.run, self.progress.step, cfg.train.steps, cfg.logging.tensorboard)
            self.say(f"resumed from {found}" if found else f"started in {cfg.run}")
        self._told_missing: dict[str, str] | None = None
        self._tell_counters()
        self.skipped_in_a_row = 0
        self._saved_step: int | None = self.progress.step if found and found.parent == self.folder else None
        self._save_failed: str | None = None
        self._stall = Spent(0.0)  # while training waited for the save under way to begin

    def _put_in_order(self) -> None:
        """Removes from the run folder what does not hold from here on, and writes the configuration.

        Raises:
            ConfigError: it cannot be written.
        """
        run, problem = self.cfg.run, None
        if self.ranks.first:
            try:
                run.mkdir(parents=True, exist_ok=True)
                checkpoint.remove_drafts(self.folder)
                replace_file(run / "config.yaml", dump(self.cfg))
                (run / EXIT_RECORD).unlink(missing_ok=True)
            except OSError as error:
                problem = f"{run}: cannot be written ({error}); make room, or give a folder you may write (run=...)"
        told = self.ranks.gather(problem)[0]
        if told:
            raise ConfigError(told)

    def _check_budget(self, found: Path | None) -> None:
        """Raises ConfigError if the run has a budget of joules and could never stop by it."""
        budget = self.cfg.energy.stop_at_joules
        if budget is None:
            return
        why = None
        if not self.meter.measured:
            why = "no energy is measured here: " + "; ".join(
                f"{part}: {told}" for part, told in self.meter.missing.items()
            )
        elif found is not None:
            before = checkpoint.read_state(found).get("joules")
            lost = sorted(before.keys() - set(self.meter.measured)) if isinstance(before, dict) else []
            if checkpoint.total_j(before) is None:
                why = f"{found} does not know what was spent before it"
            elif lost:
                why = f"{found} counts {' and '.join(lost)} too: " + "; ".join(
                    self.meter.missing[part] for part in lost
                )
        if why:
            raise ConfigError(
                f"energy.stop_at_joules={budget:g}: the run could never stop by it, since {why}. Leave it out, or see "
                "docs/energy.md for who may read which counter"
            )

    def _tell_counters(self) -> None:
        """Records which parts are measured from here on, and why others are not, when that is news."""
        if self._told_missing == self.meter.missing:
            return
        self._told_missing = dict(self.meter.missing)
        if self.recorder is not None:
            values = {"measured": list(self.meter.measured), "missing": self._told_missing}
            self.recorder.record(COUNTERS, self.progress.step, values)

    def _account(self, spent: Spent) -> None:
        """Adds a phase's joules to the run's."""
        before = self.progress.joules or {}
        joules = {part: before[part] + spent.joules[part] for part in before if part in spent.joules}
        self.progress = replace(self.progress, joules=joules or None)
        self._tell_counters()

    def say(self, text: str) -> None:
        if self.recorder is not None:
            self.recorder.say(text)

    def train(self, stop: StopSignal | None = None) -> Outcome:
        """Trains to the last step, or to a signal (`stop`: that listens already), or until evaluations have not
        improved for too long, the budget of joules is spent, too many steps in a row were not finite, or no checkpoint
        can be written.
        """
        cfg = self.cfg
        with StopSignal() if stop is None else nullcontext(stop) as stop:
            window = _Window(self)
            for step in () if self._stopped_early() else range(self.progress.step, cfg.train.steps):
                taken = self.step(step)
                self._advance(taken)
                window.add(taken)
                done = step + 1
                last = done == cfg.train.steps
                stopping, saved = self.ranks.each_any(stop.received is not None, self.saver.done())
                if saved:
                    self.finish_save()
                diverged = self.skipped_in_a_row >= cfg.optim.max_skipped
                ending = last or stopping or diverged or self._unsaved()
                evaluating = not (stopping or diverged or self._unsaved()) and (last or due(done, cfg.evaluation.every))
                saving = not diverged and (last or stopping or due(done, cfg.checkpoint.every))
                self.pulse(cfg.timeouts.save_s if ending or evaluating or saving else cfg.timeouts.collective_s)
                if ending or evaluating or saving or due(done, cfg.logging.every):
                    window.close(done, cfg.lr_at(step))
                    spent = not (stopping or diverged or self._unsaved()) and self._stopped_early() is not None
                    if evaluating or spent:
                        best = self.evaluate()
                        ending = ending or self._stopped_early() is not None
                        saving = saving or ending or (best and cfg.checkpoint.keep_best)
                    if saving:
                        self.save()
                    if ending:
                        self.finish_save()
                    window = _Window(self)
                    self.pulse(cfg.timeouts.collective_s)
                if diverged:
                    return Outcome(EXIT_DIVERGED, f"{self.skipped_in_a_row} steps in a row were not finite", done)
                if self._unsaved() or (ending and self._save_failed):
                    return Outcome(EXIT_NOT_SAVED, str(self._save_failed), done)
                if stopping and not last:
                    return Outcome(EXIT_PREEMPTED, f"stopped by {stop.received or 'a signal to another rank'}", done)
                if ending:
                    break
            window.drop()
        if not self.ranks.any(self._evaluated()):  # nothing was left to train, and the last evaluation was cut off
            self.evaluate()
        if early := self._stopped_early():
            self.say(early)
        return Outcome(0, early or "done", self.progress.step)

    def _stopped_early(self) -> str | None:
        """Why nothing is left to train before the last step: no evaluation has been the best for too long, or the
        budget of joules is spent or can no longer be kept.
        """
        done, patience, budget = self.progress, self.cfg.evaluation.patience, self.cfg.energy.stop_at_joules
        if done.step >= self.cfg.train.steps:
            return None
        early = f"stopped early at step {done.step}: "
        if patience is not None and done.stale >= patience:
            return f"{early}no evaluation was better than that of step {done.best_step} since"
        if budget is not None and self._counted != set(done.joules or ()):
            return f"{early}energy is no longer measured, so energy.stop_at_joules={budget:g} cannot be kept"
        if budget is not None and (spent := done.total_j or 0.0) >= budget:
            return f"{early}{spent:,.0f} J were spent of energy.stop_at_joules={budget:g}"
        return None

    def step(self, step: int) -> Step:
        """The update `step`: everything in it is a function of the weights, the moments and this number."""
        torch.manual_seed(_dropout_seed(self.cfg.train.seed, step, self.ranks.rank))
        self.trainer.head.progress = self.cfg.head_progress(step)
        return self.trainer.train_step(self._pulsing(self.batches.of(step)), self.cfg.lr_at(step))

    def _pulsing(self, passes: Iterator[Tensor]) -> Iterator[Tensor]:
        for batch in passes:
            self.pulse(None)
            yield batch

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

    def evaluate(self) -> bool:
        """Scores the whole held-out split; its time and energy are accounted apart. Returns whether it is the best."""
        cfg, step = self.cfg, self.progress.step
        about = self._held_out if self.recorder is not None else {}
        with self.meter.window("eval") as spent:
            micro_batch = cfg.evaluation.micro_batch or cfg.train.micro_batch
            found = evaluate(scoring(self._score, cfg.model, cfg.data.path), self.val, micro_batch, self.ranks)
        self._account(spent[0])
        if self.recorder is not None:
            values = {**found.as_dict(), **about, "seconds": spent[0].seconds, **spent[0].as_dict()}
            self.recorder.record("eval", step, values)
            bits = "" if found.bits_per_byte is None else f", {found.bits_per_byte:.4f} bits/byte"
            self.say(f"held-out {figure(cfg.model)} {found.perplexity:.2f}{bits} at step {step}")
            if spent[0].seconds > cfg.checkpoint.grace_s:
                log.warning(
                    "an evaluation takes %.0f s, in which a preempted job does not save, and it has %.0f s "
                    "(checkpoint.grace_s): it may be cut off",
                    spent[0].seconds,
                    cfg.checkpoint.grace_s,
                )
        least = self.progress.best_nats
        best = math.isfinite(found.loss) and (least is None or found.loss < least)
        changed = (
            {"best_nats": found.loss, "best_step": step, "stale": 0} if best else {"stale": self.progress.stale + 1}
        )
        self.progress = replace(self.progress, **changed)
        return best

    @cached_property
    def _held_out(self) -> dict[str, str | None]:
        return identify(self.cfg)

    def _score(self, inputs: Tensor, at: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        self.pulse(None)
        return self.trainer.score(inputs, at, targets)

    def save(self) -> None:
        """Begins to write a checkpoint, unless this step's is there already; the save before it ends first."""
        step = self.progress.step
        if self._saved_step == step:
            return
        with self.meter.window("save") as spent:
            self.finish_save()
            if self._unsaved():
                return
            self.saver.start(self._fragments((self.ranks.rank, self.ranks.world)), self.progress, self._state())
        self._saved_step, self._stall = step, spent[0]
        self._account(spent[0])

    def _unsaved(self) -> bool:
        """Whether a checkpoint could not be written, and the run is to stop for it."""
        return self._save_failed is not None and self.cfg.checkpoint.on_failure == "stop"

    def finish_save(self) -> None:
        """Waits for the save under way, if there is one, and tells how it went."""
        try:
            saved = self.saver.wait()
        except SaveError as error:
            self._save_failed, self._saved_step = f"no checkpoint could be written: {error}", None
            log.error("%s; the checkpoints before it are untouched", self._save_failed)
            return
        if saved is None:
            return
        self._save_failed = None
        if self.recorder is None:
            return
        values: dict[str, float | None] = {"seconds": saved.seconds, "bytes": saved.size}
        values |= {"stall_s": self._stall.seconds, **self._stall.as_dict()}
        self.recorder.record("save", saved.step, values)
        self.say(f"saved {saved.path} in {saved.seconds:.1f} s; training waited {self._stall.seconds:.2f} s")
        if saved.seconds > self.cfg.checkpoint.grace_s:
            log.warning(
                "a save takes %.0f s, but a preempted job has %.0f s (checkpoint.grace_s): it may be cut off",
                saved.seconds,
                self.cfg.checkpoint.grace_s,
            )

    def _state(self) -> dict[str, Any]:
        layout = {"world": self.ranks.world, "parallel": self.cfg.parallel.model_dump(mode="json")}
        return {"identity": self.who, "config": self.cfg.model_dump(mode="json"), "layout": layout}

    def _fragments(self, part: tuple[int, int] | None = None) -> dict[str, Fragment]:
        head = head_fragments(self.trainer.head, self.trainer.head_optimizer, writes=self._first_replica())
        return {**trunk_fragments(self.trainer.engine, part), **head}

    def _first_replica(self) -> bool:
        return self.ranks.replicas is None or torch.distributed.get_rank(self.ranks.replicas) == 0

    def close(self) -> None:
        self.saver.close()
        if self.recorder is not None:
            self.recorder.close()


class _Window:
    """The steps between two records: their losses stay on the device until the record is written."""

    def __init__(self, run: Run) -> None:
        self.run = run
        self.losses: list[Tensor] = []
        self.norms: list[Tensor] = []
        self.skipped = 0
        run.batches.restart()
        run.meter.begin("train")

    def add(self, taken: Step) -> None:
        self.losses.append(taken.loss)
        self.norms.append(taken.norm)
        self.skipped += not taken.applied

    def drop(self) -> None:
        self.run.meter.end()

    def close(self, step: int, lr: float) -> None:
        """Ends the window and records it. Every rank calls it."""
        run, cfg = self.run, self.run.cfg
        spent = run.meter.end()
        loss = run.ranks.sum(torch.stack(self.losses).double()) / run.ranks.world
        run.progress = replace(run.progress, train_seconds=run.progress.train_seconds + spent.seconds)
        run._account(spent)
        batch = run.batches.fingerprint()
        by_source = run.batches.tokens_by_source()
        if run.recorder is None:
            return
        tokens = len(self.losses) * cfg.train.tokens_per_step
        rate = tokens / spent.seconds
        peak = peak_flops(run.ranks.device)
        norms = [_finite(norm) for norm in torch.stack(self.norms).tolist()]
        losses = [_finite(one) for one in loss.tolist()]
        joules = spent.as_dict()
        head = run.trainer.head
        values: dict[str, Any] = {
            "loss": losses[-1],
            "loss_mean": _finite(loss.mean().item()),
            "tokens": run.progress.tokens,
            "tokens_by_source": by_source,
            "batch": batch,
            "lr": lr,
            "exponent": torch.as_tensor(head.exponent).item() if head.has_exponent else None,
            "losses": losses,  # of every step, as the norms; None: not finite
            "grad_norms": norms,
            "grad_norm": norms[-1],
            "grad_norm_clipped": None if norms[-1] is None else min(norms[-1], cfg.optim.clip or norms[-1]),
            "skipped": self.skipped,
            "seconds": spent.seconds,
            "tokens_per_s": rate,
            "data_wait_s": run.batches.waited_s,
            **joules,
            "gpu_j_per_token": None if joules["gpu_j"] is None else joules["gpu_j"] / tokens,
            "mfu": None if peak is None else cfg.model.flops_per_token() * rate / (peak * run.ranks.world),
        }
        run.recorder.record("train", step, values)
        left = (cfg.train.steps - step) * spent.seconds / len(self.losses)
        run.recorder.progress(step, values, left)


def _finite(x: float) -> float | None:
    return x if math.isfinite(x) else None


def due(step: int, every: int | None) -> bool:
    return every is not None and step % every == 0


def _dropout_seed(seed: int, step: int, rank: int) -> int:
    """Dropout's random numbers are a function of (seed, step, rank), so a resumed run draws what the unbroken one
    drew.
    """
    return int(np.random.SeedSequence([seed, step, rank]).generate_state(1, np.uint64)[0] >> 1)
