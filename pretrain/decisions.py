"""What a step leads to: functions of the configuration, the progress and what was seen. No rank, no device, no file."""

from __future__ import annotations

from collections.abc import Set
from dataclasses import dataclass

from common.exits import EXIT_DIVERGED, EXIT_NOT_SAVED, EXIT_PREEMPTED
from pretrain.checkpoints.folder import Progress
from pretrain.config import RunConfig


@dataclass(frozen=True)
class Seen:
    """What all ranks know after a step."""

    stop: bool = False  # a signal to one of them
    skipped_in_a_row: int = 0  # steps that were not finite
    save_failed: str | None = None  # why the last checkpoint could not be written


@dataclass(frozen=True)
class Next:
    """What is done after a step, in this order, before the next one or the end."""

    record: bool
    evaluate: bool
    save: bool
    end: bool


@dataclass(frozen=True)
class Outcome:
    """How a run ended: the exit code and why, in words."""

    code: int
    reason: str
    step: int


def decide(cfg: RunConfig, step: int, seen: Seen, early: str | None = None, best: bool = False) -> Next:
    """What follows the update number `step` (the first is 1).

    Args:
        early: why nothing is left to train before the last step, as `ends_early` says.
        best: the evaluation of this step is the best so far.
    """
    last, diverged = step == cfg.train.steps, is_diverged(cfg, seen)
    cut_off = seen.stop or diverged or must_stop_unsaved(cfg, seen)  # no time, or no use, for an evaluation
    over = last or (early is not None and not cut_off)
    evaluate = not cut_off and (over or due(step, cfg.evaluation.every))
    wanted = over or seen.stop or due(step, cfg.checkpoint.every) or (best and cfg.checkpoint.keep_best)
    save = wanted and not diverged
    end = over or cut_off
    return Next(end or evaluate or save or due(step, cfg.logging.every), evaluate, save, end)


def ends_early(cfg: RunConfig, progress: Progress, counted: Set[str]) -> str | None:
    """Why nothing is left to train before the last step: no evaluation has been the best for too long, or the budget of
    joules is spent or can no longer be kept.

    Args:
        counted: the parts of the machine that the budget is of.
    """
    patience, budget = cfg.evaluation.patience, cfg.energy.stop_at_joules
    if progress.step >= cfg.train.steps:
        return None
    early = f"stopped early at step {progress.step}: "
    if patience is not None and progress.stale >= patience:
        return f"{early}no evaluation was better than that of step {progress.best_step} since"
    if budget is not None and counted != set(progress.joules or ()):
        return f"{early}energy is no longer measured, so energy.stop_at_joules={budget:g} cannot be kept"
    if budget is not None and (spent := progress.total_j or 0.0) >= budget:
        return f"{early}{spent:,.0f} J were spent of energy.stop_at_joules={budget:g}"
    return None


def outcome(cfg: RunConfig, step: int, seen: Seen, ending: bool, signal: str | None) -> Outcome | None:
    """How a run ends after the update number `step`, once what was decided is done; None: not by a mishap."""
    if is_diverged(cfg, seen):
        return Outcome(EXIT_DIVERGED, f"{seen.skipped_in_a_row} steps in a row were not finite", step)
    if must_stop_unsaved(cfg, seen) or (ending and seen.save_failed):
        return Outcome(EXIT_NOT_SAVED, str(seen.save_failed), step)
    if seen.stop and step < cfg.train.steps:
        return Outcome(EXIT_PREEMPTED, f"stopped by {signal or 'a signal to another rank'}", step)
    return None


def is_diverged(cfg: RunConfig, seen: Seen) -> bool:
    """Whether too many steps in a row were not finite."""
    return seen.skipped_in_a_row >= cfg.optim.max_skipped


def must_stop_unsaved(cfg: RunConfig, seen: Seen) -> bool:
    """Whether a checkpoint could not be written, and the run is to stop for it."""
    return seen.save_failed is not None and cfg.checkpoint.on_failure == "stop"


def due(step: int, every: int | None) -> bool:
    """Whether what is done every so many steps (None: never) is done after the update number `step`."""
    return every is not None and step % every == 0
