"""Who failed first: read from what the ranks left in the run folder's `failures/`, and from who left nothing."""

from __future__ import annotations

from collections.abc import Sequence, Set
from dataclasses import dataclass

from common.exits import EXIT_BAD_INPUT
from launch.hosts import Placement
from pretrain.runtime.endings import Failure


@dataclass(frozen=True)
class Verdict:
    """The rank that failed first, as far as can be told."""

    rank: int
    host: str
    phase: str | None  # None: not known
    error: str
    traceback: str
    code: int

    def __str__(self) -> str:
        where = f", in {self.phase}" if self.phase else ""
        return f"rank {self.rank} on {self.host} failed first{where}: {self.error}"


def first(failures: Sequence[Failure], placement: Placement, gone: Set[str] = frozenset()) -> Verdict | None:
    """The first of the failures; None if there is none.

    In this order: a rank that refused what it was given; a rank's own exception, the earliest; a rank that left no
    record, so that it was killed or frozen, or
    its host is gone; a rank that others missed, on a host that cannot be reached; a rank that got stuck outside of a
    collective, where the others waited for it; who reported first.

    Args:
        gone: the hosts that do not answer.
    """
    if not failures:
        return None
    hosts = [host for host, ranks in placement.ranks.items() for _ in range(ranks)]
    by_rank = {failure.rank: failure for failure in failures}
    errors = [failure for failure in failures if failure.kind == "error"]
    refused = [failure for failure in errors if failure.code == EXIT_BAD_INPUT]
    if errors:
        return _of((refused or errors)[0], hosts)
    missed = [rank for failure in failures if failure.kind == "lost" for rank in failure.suspects]
    silent = [rank for rank in range(len(hosts)) if rank not in by_rank]
    if silent:
        rank = next((rank for rank in missed if rank in silent), silent[0])
        witness = next((f for f in failures if f.kind != "told"), failures[0])
        error = (
            f"it left no word, so it was killed (out of memory?) or frozen, or its host went down; rank {witness.rank} "
            f"on {hosts[witness.rank]}, in {witness.phase}, saw: {_line(witness.error)}"
        )
        return Verdict(rank, hosts[rank], None, error, "", 1)
    if missed:
        by_first = [r for f in failures if f.kind == "lost" and f.rank == 0 for r in f.suspects]  # it keeps the signs
        rank = next((rank for rank in missed if hosts[rank] in gone), (by_first or missed)[0])
        witness = next(failure for failure in failures if rank in failure.suspects)
        away = f"{hosts[rank]} cannot be reached; " if hosts[rank] in gone else ""
        record, error = by_rank[rank], f"{away}rank {witness.rank}: {witness.error}"
        return Verdict(rank, hosts[rank], record.phase, error, record.traceback, 1)
    if any(failure.kind in ("stuck", "collective") for failure in failures):
        held_up = [f for f in failures if f.kind in ("stuck", "told") and f.phase not in ("collective", "rendezvous")]
        if held_up:
            return _of(held_up[0], hosts)
    return _of(next((failure for failure in failures if failure.kind != "told"), failures[0]), hosts)


def _of(failure: Failure, hosts: Sequence[str]) -> Verdict:
    host = hosts[failure.rank] if failure.rank < len(hosts) else failure.host
    return Verdict(failure.rank, host, failure.phase, _line(failure.error), failure.traceback, failure.code)


def _line(text: str) -> str:
    return text.strip().splitlines()[-1] if text.strip() else "no message"
