"""A failed job started again from its newest checkpoint: with back-off, on the hosts that answer, and not for ever."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Container
from pathlib import Path

from common.errors import ConfigError
from common.exits import EXIT_BAD_INPUT, EXIT_DIVERGED, EXIT_NOT_SAVED, EXIT_PREEMPTED
from launch.hosts import Placement, without
from launch.invocation import check
from launch.job import End
from launch.reach import ask
from pretrain.config import RunConfig
from pretrain.run_folder import RunFolder

FINAL = (0, EXIT_BAD_INPUT, EXIT_DIVERGED, EXIT_NOT_SAVED, EXIT_PREEMPTED)  # would end so again, or are no failure
IN_VAIN = 3  # starts in a row without a new checkpoint, after which another one is no use
BACK_OFF_S, LONGEST_S = 5.0, 300.0


def keep_running(
    start: Callable[[Placement], End],
    cfg: RunConfig,
    placement: Placement,
    *,
    restarts: int,
    elastic: bool = False,
    back_off_s: float = BACK_OFF_S,
) -> int:
    """Runs a job, and runs it again while it fails; returns its exit code.

    Args:
        start: runs it once on a placement.
        restarts: how often it is run again at most.
        elastic: hosts that do not answer are left out, and are in again once they do.
        back_off_s: seconds before the first restart; doubled while no checkpoint comes of it.
    Raises:
        ConfigError: the first start cannot be made.
    """
    in_vain, newest = 0, newest_checkpoint(cfg.run)
    end = start(placement)
    for number in range(1, restarts + 1):
        if end.told or (end.code in FINAL and not end.cut_off):
            break
        reached = newest_checkpoint(cfg.run)
        in_vain, newest = (in_vain + 1 if reached == newest else 0), reached
        if in_vain == IN_VAIN:
            _say(f"{IN_VAIN} starts in a row brought no new checkpoint, so there is no other; the last: {end.reason}")
            break
        pause_s = min(LONGEST_S, back_off_s * 2**in_vain)
        _say(f"restart {number} of {restarts} in {pause_s:.0f} s, from {newest or 'the beginning'}")
        time.sleep(pause_s)
        try:
            end = start(_answering(cfg, placement) if elastic else placement)
        except ConfigError as error:  # a host may be back at the next start
            _say(f"restart {number} of {restarts} cannot be made: {error}")
    return end.code


def newest_checkpoint(run: Path) -> str | None:
    """The name of a run's newest checkpoint."""
    return max((path.name for path in RunFolder(run).checkpoints()), default=None)


def _answering(cfg: RunConfig, placement: Placement) -> Placement:
    """The part of a placement whose hosts answer and that the layout permits. Raises ConfigError if there is none."""
    answers = ask(list(placement.ranks))
    gone = {host: problem for host, problem in answers.items() if isinstance(problem, str)}
    for problem in gone.values():
        _say(f"without {problem}")
    return fitting(cfg, placement, gone) if gone else placement


def fitting(cfg: RunConfig, placement: Placement, gone: Container[str]) -> Placement:
    """A placement without the hosts that are gone, and without as many of the last ones as the layout asks for.

    Raises:
        ConfigError: no number of hosts will do.
    """
    left = without(placement, gone)
    reason = "no host answers"
    while left is not None:
        try:
            check(cfg, left)
            return left
        except ConfigError as error:
            reason = str(error)
        last = list(left.ranks)[-1]
        _say(f"without {last} too: {reason}")
        left = without(left, {last})
    raise ConfigError(f"--elastic: no part of the hosts that answer can go on: {reason}")


def _say(text: str) -> None:
    print(f"launch: {text}", file=sys.stderr, flush=True)
