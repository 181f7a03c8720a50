"""Whether a run folder is whole, and whether its training repeats: see pretrain/verify.py."""

from __future__ import annotations

import contextlib
import io
import math
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from common.errors import ConfigError
from common.files import read_bounded
from pretrain.checkpoints.contents import damage, read_state
from pretrain.checkpoints.folder import LATEST, step_of
from pretrain.checkpoints.reading import Vanished, again, agreed, held, held_by_all, looked_at
from pretrain.config import RunConfig, check_data, check_layout
from pretrain.records import Train, of_kind, scan
from pretrain.run_folder import RunFolder
from pretrain.runtime import ranks as process
from pretrain.runtime.ranks import Ranks

SETTLED_S = 1.0  # from the publishing of a checkpoint to `latest` naming it
Found = TypeVar("Found")

TOLERANCE = {"float32": 2e-5, "bf16": 2e-2}  # nats of a loss, on another layout


class Differs(Exception):
    """Something in the run folder is not what it should be; the message says where."""


class LossDiffers(Differs):
    """A loss is not the logged one."""


@dataclass(frozen=True)
class Replay:
    """From which checkpoint to train again, and what metrics.jsonl says of the logged steps after it."""

    start: Path
    trained: dict[str, Any]  # state of the checkpoint that these steps led to; of `start` if there is none
    records: list[Train]


def check_files(run: RunFolder, ranks: Ranks) -> list[Path]:
    """Reads the files of all of a run's checkpoints, shared among the ranks; returns those that are whole: all but what
    a run that trains has deleted meanwhile.

    Raises:
        Differs: there is none, one is damaged, or `latest` does not name the newest.
        Vanished: all were deleted.
    """
    whole: list[Path] = []
    vanished: Vanished | None = None
    for path in _first_finds(ranks, lambda: _published(run)):
        try:
            looked = partial(looked_at, path, partial(damage, path, share=(ranks.rank, ranks.world)))
            found = ranks.gather(agreed(ranks, looked))
        except Vanished as gone:
            vanished = gone
            continue
        if wrong := next(filter(None, found), None):
            raise Differs(wrong)
        whole.append(path)
    if vanished is not None and not whole:
        raise vanished
    return whole


def _published(run: RunFolder) -> list[Path]:
    """A run's checkpoints. Raises Differs if there is none, or `latest` does not name the newest, nor will at once."""
    deadline = time.monotonic() + SETTLED_S
    while True:
        published, named = run.checkpoints(), run.checkpoints_folder / LATEST
        if not published:
            raise Differs(f"{run.checkpoints_folder}: there is no checkpoint")
        try:
            name = read_bounded(named, 1000).decode(errors="backslashreplace").strip()
        except OSError as problem:
            name = "missing" if isinstance(problem, FileNotFoundError) else str(problem.strerror)
        if name == published[-1].name:
            return published
        if time.monotonic() > deadline:
            raise Differs(f"{named}: {name}, but the newest checkpoint is {published[-1].name}")
        time.sleep(0.05)


def _first_finds(ranks: Ranks, work: Callable[[], Found]) -> Found:
    """What the first rank finds, for all: a run that trains would show each another state. Collective."""
    found: Any = None
    if ranks.first:
        try:
            found = work()
        except (Differs, ConfigError) as problem:
            found = problem
    found = ranks.gather(found)[0]
    if isinstance(found, Exception):
        raise found
    return found


def choose_replay(run: RunFolder, published: Sequence[Path], steps: int, last: bool = False) -> Replay | None:
    """The first `steps` logged steps after the newest checkpoint that has so many, else after the one that has most.

    Args:
        published: the run's checkpoints, oldest first.
        last: the last `steps` logged steps, and those before them up to a checkpoint.
    Returns:
        None if no step, or with `last` not so many, was logged after a checkpoint.
    Raises:
        Differs: metrics.jsonl holds a line that is no record, or none of steps that were trained.
    """
    lines = scan(run.metrics)
    if lines.wrong:
        raise Differs(f"{run.metrics}, {lines.wrong[0]} ({len(lines.wrong)} such lines)")
    if lost := lines.lost(max(map(step_of, published), default=0)):
        raise Differs(f"{run.metrics}: no record is left of {', '.join(lost)}")
    records = of_kind(lines.records, Train)

    def after(path: Path) -> list[Train]:
        later = [record for record in records if record.step > step_of(path)]
        return later if last else later[:steps]

    starts = list(published)
    if last:
        starts = [path for path in published if len(after(path)) >= steps][-1:]
    start = max(starts, key=lambda path: (len(after(path)), path.name), default=None)
    if start is None or not after(start):
        return None
    led_to = next((path for path in published if path > start), start)
    with held(start):
        try:
            trained = read_state(led_to)
        except ConfigError:  # a run that trains has deleted it
            trained = read_state(start)
    return Replay(start, trained, after(start))


def replay(cfg: RunConfig, planned: Replay, ranks: Ranks, tolerance: float) -> float:
    """Trains the planned steps again; returns the largest difference of a loss, in nats. Collective.

    Args:
        tolerance: nats by which a loss may differ from the logged one.

    Raises:
        Differs: another batch than the logged one, or a loss further from the logged one than `tolerance`.
        ConfigError: these ranks cannot repeat the run.
    """
    from pretrain.opening import open_run  # DeepSpeed: after it was told the device

    ranks = process.with_groups(ranks, cfg.parallel.vocab_ranks(ranks.world, ranks.local_world))
    with tempfile.TemporaryDirectory(prefix="verify-") as folder:
        aside = {
            "run": Path(folder),
            "resume": str(planned.start),
            "resume_check": "size",  # its hashes have just been compared
            "logging": cfg.logging.model_copy(update={"tensorboard": False}),
            "energy": cfg.energy.model_copy(update={"stop_at_joules": None}),
        }
        with contextlib.redirect_stdout(io.StringIO()):  # a run tells its progress there
            run = open_run(cfg.model_copy(update=aside), ranks)
            try:
                _check_noise(run, planned.trained)
                return _largest_difference(run, planned.records, tolerance)
            finally:
                run.close()


def _check_noise(run: Any, trained: dict[str, Any]) -> None:
    """Raises ConfigError if the run draws random numbers while it trains, and these ranks would draw others."""
    run.trainer.head.train()
    distance = run.trainer.head.score_function
    noisy = run.cfg.model.dropout > 0 or distance.evaluated() is not distance
    world, before = trained["layout"]["world"], trained["config"]
    vocab, micro_batch = before["parallel"]["vocab"], before["train"]["micro_batch"]
    now = (run.ranks.world, run.cfg.parallel.vocab, run.cfg.train.micro_batch)
    if noisy and now != (world, vocab, micro_batch):
        raise ConfigError(
            "dropout and noise are drawn by rank and pass, so this run repeats only on the layout that trained it: "
            f"{world} ranks, parallel.vocab={vocab}, train.micro_batch={micro_batch}"
        )


def _largest_difference(run: Any, records: list[Train], tolerance: float) -> float:
    logged = {record.step: record for record in records}
    largest = 0.0
    for step in range(run.progress.step, max(logged)):
        taken = run.step(step)
        batch = run.batches.fingerprint()
        loss = (run.ranks.sum(taken.loss.double()) / run.ranks.world).item()
        record = logged.get(step + 1)
        if record is None:
            continue
        if batch != record.batch:
            raise Differs(f"step {step + 1}: the batch {batch} is not the logged {record.batch}")
        logged_loss = math.nan if record.loss is None else record.loss
        difference = _distance(loss, logged_loss)
        if difference > tolerance:
            raise LossDiffers(f"step {step + 1}: the loss {loss!r} is not the logged {logged_loss!r}")
        largest = max(largest, difference)
    return largest


def _unpromised(trained: dict[str, Any], ranks: Ranks) -> str:
    """Why the bits of a run may differ though nothing is wrong; empty: they are promised."""
    if ranks.device.type != "cuda" or trained["config"]["train"].get("deterministic"):
        return ""
    return (
        "; on a GPU bits are only promised to a run with train.deterministic=true, which this one was not: leave "
        "--exact out to compare to rounding"
    )


def _distance(loss: float, logged: float) -> float:
    """Between two losses: 0 for equals, and for two that are not finite, which are logged alike; infinite for one of
    them and a number.
    """
    if math.isfinite(loss) and math.isfinite(logged):
        return abs(loss - logged)
    return math.inf if math.isfinite(loss) or math.isfinite(logged) else 0.0


def verify(
    folder: Path, overrides: Sequence[str], steps: int, ranks: Ranks, *, last: bool = False, exact: bool = False
) -> str:
    """What was found to be right, in words. Collective. Raises Differs and ConfigError."""
    if steps < 1:
        raise ConfigError(f"--steps {steps}: must be 1 or more")
    run = RunFolder.trained(folder)
    cfg = run.settings(overrides)
    check_layout(cfg, ranks.world, ranks.local_world)
    return again(lambda: _verified(run, cfg, steps, ranks, last=last, exact=exact))


def _verified(run: RunFolder, cfg: RunConfig, steps: int, ranks: Ranks, *, last: bool, exact: bool) -> str:
    published = check_files(run, ranks)
    count = len(published)
    whole = f"{count} checkpoint{'s are' if count > 1 else ' is'} whole"
    planned = _first_finds(ranks, lambda: choose_replay(run, published, steps, last))
    if planned is None:
        fewer = f"fewer than {steps} steps were" if last else "no step was"
        return f"{whole}; {fewer} logged after one, so none was trained again"
    check_data(cfg)
    try:
        with held_by_all(planned.start, ranks):
            largest = replay(cfg, planned, ranks, 0.0 if exact else TOLERANCE[cfg.train.precision])
    except LossDiffers as wrong:
        raise LossDiffers(f"{wrong}{_unpromised(planned.trained, ranks) if exact else ''}") from None
    near = "bit for bit" if largest == 0 else f"to {largest:.1e} nats"
    first, final = planned.records[0].step, planned.records[-1].step
    again = f"{f'steps {first} to {final}' if final > first else f'step {first}'} again from {planned.start.name}"
    return f"{whole}; {again}: the logged batches, and the logged losses {near}"
