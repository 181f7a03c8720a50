"""Opening a run: its data, the checkpoint that it goes on from, its folder, its trainer; in that order, so that what
cannot go on is refused before anything is touched.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from common.errors import ConfigError
from common.files import ROOM_BYTES, check_writable, discard, free_name, replacing, writing
from data.loader import EvaluationWindows, Windows
from data.shards import open_split
from pretrain.batches import Batches
from pretrain.checkpoints import resume
from pretrain.checkpoints.contents import read_state
from pretrain.checkpoints.folder import Progress, remove_drafts, total_j
from pretrain.checkpoints.loading import load
from pretrain.checkpoints.reading import agreed, held_by_all
from pretrain.checkpoints.saver import Saver, versions
from pretrain.checkpoints.traces import set_aside
from pretrain.config import RunConfig, dump
from pretrain.energy.meter import Meter, zeus_counter
from pretrain.engine import Trainer
from pretrain.loop import Run
from pretrain.recorder import Recorder
from pretrain.run_folder import CONFIG, METRICS, RunFolder
from pretrain.runtime.ranks import Ranks

log = logging.getLogger(__name__)


def open_run(cfg: RunConfig, ranks: Ranks, pulse: Callable[[float | None], None] = lambda limit_s: None) -> Run:
    """A run, ready for its next step. Collective. The run folder is the caller's: its lock is held, or nobody else
    knows of it.

    Args:
        pulse: hears that this rank gets on, and in how many seconds again if that is not as before.
    Raises:
        ConfigError: data, checkpoint, folder or budget do not allow it; nothing was touched, or nothing lost.
    """
    folder = RunFolder(cfg.run)
    train = open_split(cfg.data.path, "train")
    held_out = EvaluationWindows(open_split(cfg.data.path, "val"), cfg.model.seq_len)
    batches = Batches(Windows(train, cfg.model.seq_len, cfg.train.seed), cfg, ranks)
    state = resume.state_of(cfg, ranks, train.fingerprint, train.tokenizer_sha256)
    start = resume.find(folder.checkpoints_folder, cfg.resume, ranks, cfg.resume_check)
    if start is not None:
        resume.check(start, {**state, "versions": versions()}, cfg.resume_allow)
    meter = Meter(ranks, zeus_counter(ranks))
    check_budget(cfg, meter, start)
    ranks.barrier()  # everybody has looked before anything is touched
    with held_by_all(start, ranks), put_in_order(folder, cfg, ranks):
        trainer = Trainer(cfg, ranks, train.eos_id)
        saver = Saver(folder.checkpoints_folder, ranks, cfg.checkpoint, cfg.timeouts.save_s)
        progress = Progress(joules=dict.fromkeys(meter.measured, 0.0))
        if start is not None:
            progress = load(start, trainer.fragments())
            trainer.finish_load(progress.updates)
        trainer.head.progress = cfg.head_progress(progress.step - 1)  # as the last update left it
        own = start is not None and start.parent == folder.checkpoints_folder
        recorder = agreed(ranks, lambda: open_records(folder, cfg, progress.step, own) if ranks.first else None)
    run = Run(cfg, ranks, trainer, batches, held_out, meter, saver, recorder, state, progress, pulse)
    run.say(f"resumed from {start}" if start else f"started in {cfg.run}")
    run.record_counters()
    if not progress.step:
        run.record_lengths()
    if own:
        run.saved_step = progress.step
    return run


@contextmanager
def put_in_order(folder: RunFolder, cfg: RunConfig, ranks: Ranks) -> Iterator[None]:
    """Removes from a run folder what does not hold from here on, and writes the configuration, which is there when the
    block has ended well; else the folder is as it was. Collective.

    Raises:
        ConfigError: it cannot be written.
    """
    with ExitStack() as stack:
        agreed(ranks, lambda: _begin(folder, cfg, stack) if ranks.first else None)
        yield
        agreed(ranks, lambda: _finish(folder, stack) if ranks.first else None)


def _begin(folder: RunFolder, cfg: RunConfig, stack: ExitStack) -> None:
    records = folder.metrics.stat().st_size if folder.metrics.is_file() else 0  # they are written anew
    check_writable(folder.path, ROOM_BYTES + records)
    with writing(folder.path):
        for made in (folder.path, folder.checkpoints_folder):
            if not made.exists():
                made.mkdir(parents=True)  # only now: should it vanish later, a save fails and says so
                stack.push(lambda kind, *_, made=made: _remove_empty(made) if kind else None)
        remove_drafts(folder.checkpoints_folder)
        for name in (CONFIG, METRICS):
            for draft in folder.path.glob(f"draft-*-{name}"):
                discard(draft)
        stack.enter_context(replacing(folder.config)).write_text(dump(cfg), encoding="utf-8")


def _remove_empty(folder: Path) -> None:
    with suppress(OSError):
        folder.rmdir()


def _finish(folder: RunFolder, stack: ExitStack) -> None:
    with writing(folder.path):
        stack.close()
        if folder.exit_record.is_dir():
            os.replace(folder.exit_record, free_name(folder.exit_record))  # it is not ours
        folder.exit_record.unlink(missing_ok=True)


def open_records(folder: RunFolder, cfg: RunConfig, step: int, own: bool) -> Recorder:
    """The records of a run that goes on after `step` updates (`own`: its own); what an earlier one left is set aside
    where a fresh start was asked for. Raises ConfigError.
    """
    with writing(folder.path):
        aside = set_aside(folder.checkpoints_folder) if cfg.resume == "never" else None
        if aside is not None:
            log.warning("resume=never: the records of the training before are kept in %s", aside)
        return Recorder(folder, step, cfg.train.steps, cfg.logging.tensorboard, own=own)


def check_budget(cfg: RunConfig, meter: Meter, start: Path | None) -> None:
    """Raises ConfigError if a run has a budget of joules and could never stop by it."""
    budget = cfg.energy.stop_at_joules
    why = None if budget is None else _why_never(meter, start)
    if why:
        raise ConfigError(
            f"energy.stop_at_joules={budget:g}: the run could never stop by it, since {why}. Leave it out, or see "
            "docs/energy.md for who may read which counter"
        )


def _why_never(meter: Meter, start: Path | None) -> str | None:
    if not meter.measured:
        return "no energy is measured here: " + "; ".join(f"{part}: {why}" for part, why in meter.missing.items())
    if start is None:
        return None
    before = read_state(start).get("joules")
    if total_j(before) is None:
        return f"{start} does not know what was spent before it"
    lost = sorted(set(before or ()) - set(meter.measured))
    reasons = "; ".join(meter.missing[part] for part in lost)
    return f"{start} counts {' and '.join(lost)} too: {reasons}" if lost else None
