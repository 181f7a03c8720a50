"""The training loop: set the rate, accumulate, step, record, maybe evaluate, maybe save, until done or told to stop.

pretrain/opening.py opens a run; pretrain/decisions.py says what a step leads to.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from data.loader import EvaluationWindows
from data.masking import mask_id
from pretrain.analysis import lengths
from pretrain.analysis.heldout import identify
from pretrain.analysis.scoring import evaluate, figure, scoring
from pretrain.batches import Batches
from pretrain.checkpoints.folder import Progress
from pretrain.checkpoints.saver import SaveError, Saver
from pretrain.config import STEP_S, RunConfig
from pretrain.decisions import Next, Outcome, Seen, decide, ends_early, must_stop_unsaved, outcome
from pretrain.energy.meter import Meter, Spent
from pretrain.engine import Step, Trainer
from pretrain.recorder import Recorder
from pretrain.records import Counters, Eval, Lengths, Save
from pretrain.run_folder import RunFolder
from pretrain.runtime.ranks import Ranks
from pretrain.runtime.signals import StopSignal
from pretrain.window import Window

log = logging.getLogger(__name__)


@dataclass(eq=False)
class Run:
    """One rank's run, opened; its progress is what is saved and resumed."""

    cfg: RunConfig
    ranks: Ranks
    trainer: Trainer
    batches: Batches
    held_out: EvaluationWindows
    meter: Meter
    saver: Saver
    recorder: Recorder | None  # on the first rank
    state: Mapping[str, Any]  # that every checkpoint tells of the run
    progress: Progress
    pulse: Callable[[float | None], None]
    saved_step: int | None = None  # of the newest checkpoint
    save_failed: str | None = None  # why the last one could not be written
    skipped_in_a_row: int = 0
    _longest_s: float = 0.0  # of a step, on the first rank
    _stall: Spent = field(default_factory=lambda: Spent(0.0))  # while training waited for the save under way to begin
    _counters: dict[str, str] | None = None  # the missing parts of the machine that were recorded last

    def __post_init__(self) -> None:
        self._budgeted = set(self.progress.joules or ())  # the parts of the machine that a budget is of

    def train(self, stop: StopSignal | None = None) -> Outcome:
        """Trains to the last step, or to a signal (`stop`: that listens already), or until evaluations have not
        improved for too long, the budget of joules is spent, too many steps in a row were not finite, or no checkpoint
        can be written.
        """
        with StopSignal() if stop is None else nullcontext(stop) as stop:
            window = Window(self.batches, self.meter)
            for step in () if self._ends_early() else range(self.progress.step, self.cfg.train.steps):
                window.add(self._advance(self.step(step)))
                seen = self._seen(stop)
                then = decide(self.cfg, step + 1, seen)
                self.pulse(self._limit_s(then))
                if then.record:
                    self._record(window)
                    then = self._evaluate_and_save(seen)
                    window = Window(self.batches, self.meter)
                    self.pulse(self.cfg.timeouts.collective_s)
                seen = replace(seen, save_failed=self.save_failed)
                if mishap := outcome(self.cfg, step + 1, seen, then.end, stop.received):
                    return mishap
                if then.end:
                    break
            window.drop()
        if not self.ranks.any(self._evaluated()):  # nothing was left to train, and the last evaluation was cut off
            self.evaluate()
        if early := self._ends_early():
            self.say(early)
        return Outcome(0, early or "done", self.progress.step)

    def step(self, step: int) -> Step:
        """The update `step`: everything in it is a function of the weights, the moments and this number."""
        torch.manual_seed(_dropout_seed(self.cfg.train.seed, step, self.ranks.rank))
        self.trainer.head.progress = self.cfg.head_progress(step)
        return self.trainer.train_step(self._pulsing(self.batches.of(step)), self.cfg.lr_at(step))

    def _pulsing(self, passes: Iterator[Tensor]) -> Iterator[Tensor]:
        for batch in passes:
            self.pulse(None)
            yield batch

    def _advance(self, step: Step) -> Step:
        self.skipped_in_a_row = 0 if step.applied else self.skipped_in_a_row + 1
        self.progress = replace(
            self.progress,
            step=self.progress.step + 1,
            updates=self.progress.updates + int(step.applied),
            tokens=self.progress.tokens + self.cfg.train.tokens_per_step,
        )
        return step

    def _seen(self, stop: StopSignal) -> Seen:
        """What all ranks know now. Collective."""
        signalled, saved = self.ranks.each_any(stop.received is not None, self.saver.done())
        if saved:
            self.finish_save()
        return Seen(signalled, self.skipped_in_a_row, self.save_failed)

    def _ends_early(self) -> str | None:
        return ends_early(self.cfg, self.progress, self._budgeted)

    def _limit_s(self, then: Next) -> float:
        """For how long this rank may show no sign of getting on."""
        rare = then.end or then.evaluate or then.save
        return self.cfg.timeouts.save_s if rare else self.cfg.timeouts.collective_s

    def _evaluate_and_save(self, seen: Seen) -> Next:
        """Does what is due after a record, which may say that the run ends early, as an evaluation may."""
        step = self.progress.step
        then = decide(self.cfg, step, seen, self._ends_early())
        if then.evaluate:
            best = self.evaluate()
            then = decide(self.cfg, step, seen, self._ends_early(), best)
        if then.save:
            self.save()
        if then.end:
            self.finish_save()
        return then

    def _record(self, window: Window) -> None:
        """Ends the window and records it. Collective."""
        spent = window.close(self.ranks)
        self.progress = replace(self.progress, train_seconds=self.progress.train_seconds + spent.seconds)
        self._account(spent)
        if self.recorder is None:
            return
        step, head = self.progress.step, self.trainer.head
        record = window.record(self.cfg, self.ranks, head, spent, step, self.progress.tokens)
        self.recorder.record(record)
        per_step_s = spent.seconds / len(window.losses)
        self.recorder.progress(record, (self.cfg.train.steps - step) * per_step_s)
        self._longest_s, before_s = max(self._longest_s, per_step_s), self._longest_s
        if per_step_s > self.cfg.checkpoint.stop_s >= before_s:
            log.warning(
                f"a step takes {per_step_s:.0f} s, but a preempted job has {self.cfg.checkpoint.stop_s:.0f} s for one "
                f"and the save (checkpoint.grace_s, and {STEP_S:.0f} s): it may be cut off"
            )

    def _evaluated(self) -> bool:
        """Whether this rank, the first, knows of an evaluation of the present step."""
        step = self.progress.step
        evaluations = RunFolder(self.cfg.run).records(Eval) if self.recorder is not None else []
        return any(record.step == step for record in evaluations)

    def evaluate(self) -> bool:
        """Scores the whole held-out split; its time and energy are accounted apart. Returns whether it is the best."""
        cfg, step = self.cfg, self.progress.step
        about = self._held_out_text if self.recorder is not None else {}
        with self.meter.window("eval") as spent:
            micro_batch = cfg.evaluation.micro_batch or cfg.train.micro_batch
            scores = evaluate(scoring(self._score, cfg.model, cfg.data.path), self.held_out, micro_batch, self.ranks)
            mask = None if cfg.model.causal else mask_id(cfg.data.path)
            states = lengths.of_states(self._states, self.held_out, micro_batch, mask, self.ranks.device)
        self._account(spent[0])
        if self.recorder is not None:
            figures: dict[str, Any] = {**scores.as_dict(), **about, **spent[0].as_dict()}
            self.recorder.record(Eval(step=step, seconds=spent[0].seconds, **figures))
            bits = "" if scores.bits_per_byte is None else f", {scores.bits_per_byte:.4f} bits/byte"
            self.say(f"held-out {figure(cfg.model)} {scores.perplexity:.2f}{bits} at step {step}")
            if spent[0].seconds > cfg.checkpoint.grace_s:
                log.warning(
                    f"an evaluation takes {spent[0].seconds:.0f} s, in which a preempted job does not save, and it has "
                    f"{cfg.checkpoint.grace_s:.0f} s (checkpoint.grace_s): it may be cut off"
                )
        self.record_lengths(**states)
        least = self.progress.best_nats
        best = math.isfinite(scores.loss) and (least is None or scores.loss < least)
        changed = (
            {"best_nats": scores.loss, "best_step": step, "stale": 0} if best else {"stale": self.progress.stale + 1}
        )
        self.progress = replace(self.progress, **changed)
        return best

    @cached_property
    def _held_out_text(self) -> dict[str, str | None]:
        return identify(self.cfg)

    def _score(self, inputs: Tensor, at: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        self.pulse(None)
        return self.trainer.score(inputs, at, targets)

    def _states(self, inputs: Tensor) -> Tensor:
        self.pulse(None)
        return self.trainer.states(inputs)

    def record_lengths(self, **states: float | None) -> None:
        """Records how long the prototypes are now, and `states`, what is known of hidden states. Collective."""
        prototypes = lengths.of_prototypes(self.trainer.head)
        if self.recorder is not None:
            self.recorder.record(Lengths(step=self.progress.step, **prototypes, **states))

    def save(self) -> None:
        """Begins to write a checkpoint, unless this step's is there already; the save before it ends first."""
        if self.saved_step == self.progress.step:
            return
        with self.meter.window("save") as spent:
            self.finish_save()
            if must_stop_unsaved(self.cfg, Seen(save_failed=self.save_failed)):
                return
            self.saver.start(self.trainer.fragments(own_part=True), self.progress, self.state)
        self.saved_step, self._stall = self.progress.step, spent[0]
        self._account(spent[0])

    def finish_save(self) -> None:
        """Waits for the save under way, if there is one, and tells how it went."""
        try:
            saved = self.saver.wait()
        except SaveError as error:
            self.save_failed, self.saved_step = f"no checkpoint could be written: {error}", None
            log.error("%s; the checkpoints before it are untouched", self.save_failed)
            return
        if saved is None:
            return
        self.save_failed = None
        if self.recorder is None:
            return
        stall = self._stall
        self.recorder.record(
            Save(step=saved.step, seconds=saved.seconds, bytes=saved.size, stall_s=stall.seconds, **stall.as_dict())
        )
        self.say(f"saved {saved.path} in {saved.seconds:.1f} s; training waited {stall.seconds:.2f} s")
        if saved.seconds > self.cfg.checkpoint.grace_s:
            log.warning(
                f"a save takes {saved.seconds:.0f} s, but a preempted job has {self.cfg.checkpoint.grace_s:.0f} s "
                "(checkpoint.grace_s): it may be cut off"
            )

    def _account(self, spent: Spent) -> None:
        """Adds a phase's joules to the run's."""
        before = self.progress.joules or {}
        joules = {part: before[part] + spent.joules[part] for part in before if part in spent.joules}
        self.progress = replace(self.progress, joules=joules or None)
        self.record_counters()

    def record_counters(self) -> None:
        """Records which parts are measured from here on, and why others are not, when that is news."""
        if self._counters == self.meter.missing:
            return
        self._counters = dict(self.meter.missing)
        if self.recorder is not None:
            step, measured = self.progress.step, list(self.meter.measured)
            self.recorder.record(Counters(step=step, measured=measured, missing=self._counters))

    def say(self, text: str) -> None:
        """Prints a line on the console, on the first rank."""
        if self.recorder is not None:
            self.recorder.say(text)

    def close(self) -> None:
        """Ends the threads and files of a run, which may not go on; a save under way ends first."""
        self.saver.close()
        if self.recorder is not None:
            self.recorder.close()


def _dropout_seed(seed: int, step: int, rank: int) -> int:
    """Dropout's random numbers are a function of (seed, step, rank), so a resumed run draws what the unbroken one
    drew.
    """
    return int(np.random.SeedSequence([seed, step, rank]).generate_state(1, np.uint64)[0] >> 1)
