"""What a step leads to, by table."""

from __future__ import annotations

from typing import Any

import pytest

from common.exits import EXIT_DIVERGED, EXIT_NOT_SAVED, EXIT_PREEMPTED
from pretrain.checkpoints.folder import Progress
from pretrain.decisions import Outcome, Seen, decide, ends_early, outcome
from tests.support.tiny import tiny_config

SETTINGS: dict[str, Any] = {
    "train__steps": 12, "evaluation__every": 4, "evaluation__patience": 2, "checkpoint__every": 3, "logging__every": 2,
    "optim__max_skipped": 2, "energy__stop_at_joules": 100.0,
}  # fmt: skip
CFG = tiny_config(**SETTINGS)
GOES_ON = tiny_config(**SETTINGS, checkpoint__on_failure="go on")
KEEPS_BEST = tiny_config(**SETTINGS, checkpoint__keep_best=True)
STOP, DIVERGED, FAILED = Seen(stop=True), Seen(skipped_in_a_row=2), Seen(save_failed="full")


@pytest.mark.parametrize(
    ("cfg", "step", "seen", "more", "done"),
    [
        (CFG, 1, Seen(), {}, ""),
        (CFG, 2, Seen(), {}, "record"),
        (CFG, 3, Seen(), {}, "record save"),
        (CFG, 4, Seen(), {}, "record evaluate"),
        (CFG, 4, Seen(), {"best": True}, "record evaluate"),
        (KEEPS_BEST, 4, Seen(), {"best": True}, "record evaluate save"),
        (CFG, 11, Seen(), {}, ""),
        (CFG, 12, Seen(), {}, "record evaluate save end"),
        (CFG, 12, STOP, {}, "record save end"),
        (CFG, 1, STOP, {}, "record save end"),
        (CFG, 4, STOP, {}, "record save end"),
        (CFG, 4, STOP, {"early": "spent"}, "record save end"),
        (CFG, 12, DIVERGED, {}, "record end"),
        (CFG, 3, DIVERGED, {}, "record end"),
        (CFG, 3, Seen(skipped_in_a_row=1), {}, "record save"),
        (CFG, 1, FAILED, {}, "record end"),
        (CFG, 4, FAILED, {}, "record end"),
        (GOES_ON, 1, FAILED, {}, ""),
        (GOES_ON, 4, FAILED, {}, "record evaluate"),
        (CFG, 2, Seen(), {"early": "spent"}, "record evaluate save end"),
        (CFG, 2, DIVERGED, {"early": "spent"}, "record end"),
        (CFG, 2, FAILED, {"early": "spent"}, "record end"),
    ],
)
def test_what_follows_a_step(cfg: Any, step: int, seen: Seen, more: dict[str, Any], done: str) -> None:
    then = decide(cfg, step, seen, **more)
    assert " ".join(name for name in ("record", "evaluate", "save", "end") if getattr(then, name)) == done


@pytest.mark.parametrize(
    ("progress", "counted", "why"),
    [
        (Progress(step=4, joules={"gpu": 99.0}), {"gpu"}, None),
        (Progress(step=4, joules={"gpu": 60.0, "cpu": 40.0}), {"gpu", "cpu"}, "100 J were spent"),
        (Progress(step=4, joules=None), {"gpu"}, "energy is no longer measured"),
        (Progress(step=4, joules={"gpu": 1.0}), {"gpu", "cpu"}, "energy is no longer measured"),
        (Progress(step=4, joules={"gpu": 1.0}, stale=1, best_step=3), {"gpu"}, None),
        (Progress(step=4, joules={"gpu": 1.0}, stale=2, best_step=3), {"gpu"}, "better than that of step 3"),
        (Progress(step=12, joules={"gpu": 999.0}, stale=9), {"gpu"}, None),
    ],
)
def test_why_a_run_ends_before_its_last_step(progress: Progress, counted: set[str], why: str | None) -> None:
    early = ends_early(CFG, progress, counted)
    assert early is None if why is None else why in str(early)


@pytest.mark.parametrize(
    ("cfg", "step", "seen", "ending", "end"),
    [
        (CFG, 4, Seen(), False, None),
        (CFG, 12, Seen(), True, None),
        (CFG, 4, DIVERGED, True, Outcome(EXIT_DIVERGED, "2 steps in a row were not finite", 4)),
        (CFG, 4, FAILED, True, Outcome(EXIT_NOT_SAVED, "full", 4)),
        (GOES_ON, 4, FAILED, False, None),
        (GOES_ON, 12, FAILED, True, Outcome(EXIT_NOT_SAVED, "full", 12)),
        (CFG, 4, STOP, True, Outcome(EXIT_PREEMPTED, "stopped by SIGTERM", 4)),
        (CFG, 12, STOP, True, None),
    ],
)
def test_how_a_run_ends(cfg: Any, step: int, seen: Seen, ending: bool, end: Outcome | None) -> None:
    assert outcome(cfg, step, seen, ending, "SIGTERM") == end


def test_a_signal_to_another_rank_is_told_as_such() -> None:
    end = outcome(CFG, 4, STOP, True, None)
    assert end is not None and end.reason == "stopped by a signal to another rank"
