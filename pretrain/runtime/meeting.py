"""Where the ranks of a world meet first: a key-value store that the first rank keeps, before any process group is made.

What would keep the ranks from training together is found here, since groups of ranks that differ hang or abort.
"""

from __future__ import annotations

import json
import logging
import os
import socket
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import torch.distributed as dist

from common.errors import ConfigError
from common.files import unwritable
from common.strict_json import to_json
from pretrain.config import RunConfig
from pretrain.runtime import agreement
from pretrain.runtime.environment import adopt, place_of

log = logging.getLogger(__name__)

LINGER_S = 5.0  # that the first rank, which keeps the store, waits for the others to hear a verdict


@dataclass(frozen=True)
class Meeting:
    """A rank among those that have met; a world of one needs no store."""

    rank: int
    world: int
    store: Any = None

    def decide(self, about: str, value: Any, judge: Callable[[list[Any]], Any]) -> Any:
        """Every rank gives a value; the first one judges those of all, in their order; all get its verdict.

        Args:
            about: a word that no other decision of the meeting has.
            value: and the verdict: what JSON can tell.
        """
        if self.world == 1:
            return judge([value])
        keys = [f"meeting/{about}/{rank}" for rank in range(self.world)]
        told, heard = f"meeting/{about}", f"meeting/{about}/heard"
        self.store.set(keys[self.rank], to_json(value))
        if self.rank:
            verdict = json.loads(self.store.get(told))  # waits
            self.store.add(heard, 1)
            return verdict
        verdict = judge([json.loads(self.store.get(key)) for key in keys])
        self.store.set(told, to_json(verdict))
        deadline = time.monotonic() + LINGER_S
        while self.store.add(heard, 0) < self.world - 1 and time.monotonic() < deadline:
            time.sleep(0.01)
        return verdict


def meet(timeout_s: float = 1800) -> Meeting:
    """Waits for all ranks that the environment tells of. Raises ConfigError if it is at odds with itself.

    Args:
        timeout_s: seconds to wait at most, here and in each decision.
    """
    adopt(os.environ)
    place = place_of(os.environ, meeting=not dist.is_initialized())
    if place.world == 1 or dist.is_initialized():
        return Meeting(0, 1)
    store, _, _ = next(dist.rendezvous("env://", timeout=timedelta(seconds=timeout_s)))
    return Meeting(place.rank, place.world, store)


def agree(
    meeting: Meeting,
    cfg: RunConfig | None,
    allow_code: bool = False,
    data: Path | None = None,
    texts: Sequence[Path] = (),
) -> None:
    """Raises ConfigError on every rank if hosts differ in what `agreement.facts_here` tells. Collective."""
    if meeting.world == 1:
        return
    told = (socket.gethostname(), agreement.facts_here(cfg, data, texts))
    verdict = meeting.decide("agreement", told, partial(agreement.judge, allow_code=allow_code))
    if verdict["refused"]:
        raise ConfigError(verdict["refused"])
    if verdict["allowed"] and meeting.rank == 0:
        log.warning(verdict["allowed"])


def check_shared(meeting: Meeting, run: Path) -> None:
    """Raises ConfigError on every rank if the run folder, which the first one holds, is not one for all. Collective."""
    if meeting.world == 1:
        return
    with ExitStack() as stack:
        name = problem = None
        if meeting.rank == 0:
            try:
                name = stack.enter_context(agreement.token(run))
            except OSError as error:
                problem = str(unwritable(run, error))
        name, problem = meeting.decide("token", (name, problem), lambda told: told[0])
        seen = (socket.gethostname(), problem is None and agreement.sees(run / name))
        problem = meeting.decide("folder", seen, lambda told: problem or agreement.not_shared(run, told))
    if problem:
        raise ConfigError(problem)
