"""Who failed first, by what the ranks left."""

from __future__ import annotations

import json
import re
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from launch.failures import first
from launch.hosts import Placement
from pretrain.runtime.claim import Holder, hold
from pretrain.runtime.endings import Failure, read_failures, set_aside_failures

PLACEMENT = Placement({"a": 2, "b": 1})


def failure(rank: int, kind: str, time: float = 0.0, phase: str = "collective", **more: Any) -> Failure:
    values = {
        "error": f"{kind} of {rank}",
        "traceback": f"trace {rank}",
        "code": 1,
        "suspects": [],
        "job": "mine",
        **more,
    }
    return Failure(rank, "h", time, kind, phase, **values)


@pytest.mark.parametrize(
    ("failures", "gone", "rank", "told"),
    [
        # its own exception comes before the errors that it causes, whatever the clocks say
        ([failure(0, "collective", 1), failure(1, "collective", 2), failure(2, "error", 3, "data")], (), 2, "in data"),
        ([failure(2, "error", 5, "data"), failure(0, "error", 4, "save")], (), 0, "in save: error of 0"),
        # a rank that refused what it was given comes before all, whoever wrote first
        (
            [failure(0, "error", 1, "rendezvous"), failure(2, "error", 9, "start", code=2), failure(1, "collective")],
            (),
            2,
            "in start",
        ),
        # killed: no word of it
        ([failure(0, "collective", 1), failure(2, "collective", 2)], (), 1, "no word, .* rank 0 on a, in collective"),
        ([failure(0, "lost", 1, suspects=[2])], (), 2, "it left no word"),
        # two hosts that miss each other: the one that cannot be reached
        (
            [failure(2, "lost", 1, suspects=[0]), failure(0, "lost", 2, suspects=[2]), failure(1, "told")],
            {"b"},
            2,
            "b c",
        ),
        (
            [failure(2, "lost", 1, suspects=[0]), failure(0, "lost", 2, suspects=[2]), failure(1, "told")],
            {"a"},
            0,
            "a c",
        ),
        (
            [failure(2, "lost", 1, suspects=[0]), failure(0, "lost", 2, suspects=[2]), failure(1, "told")],
            (),
            2,
            "lost of",
        ),
        # stuck: the one that the others waited for
        ([failure(0, "stuck", 1), failure(1, "told", 2, "data"), failure(2, "told", 3)], (), 1, "in data"),
        ([failure(0, "stuck", 1), failure(1, "told", 2), failure(2, "told", 3)], (), 0, "stuck of 0"),
        ([failure(0, "collective", 1), failure(1, "collective", 2), failure(2, "told", 3)], (), 0, "collective of 0"),
    ],
)
def test_the_first_of_the_failures(failures: list[Failure], gone: set[str], rank: int, told: str) -> None:
    verdict = first(sorted(failures, key=lambda one: one.time), PLACEMENT, frozenset(gone))
    assert verdict is not None and verdict.rank == rank and verdict.host == ("b" if rank == 2 else "a")
    assert re.search(told, str(verdict)), str(verdict)


def test_no_failure_no_verdict() -> None:
    assert first([], PLACEMENT) is None


def leave(run: Path, one: Failure) -> None:
    (run / "failures").mkdir(exist_ok=True)
    (run / "failures" / f"rank-{one.rank}.json").write_text(json.dumps(asdict(one)))


def test_records_are_read_in_order_and_an_earlier_jobs_are_kept_aside(tmp_path: Path) -> None:
    with hold(tmp_path, Holder("mine", launcher=True)) as claim:
        for start in range(2):
            for one in (failure(0, "told", 9.0), failure(1, "error", 3.0)):
                leave(tmp_path, one)
            (tmp_path / "failures" / "rank-2.json").write_text('{"rank": 2')
            assert [one.rank for one in read_failures(claim.run, claim.job)] == [1, 0]
            set_aside_failures(tmp_path)
            assert (
                read_failures(claim.run, claim.job) == []
                and (tmp_path / f"failures-{start + 1}" / "rank-0.json").exists()
            )


def test_another_jobs_records_are_not_read(tmp_path: Path) -> None:
    """Those of before there were ids too."""
    with hold(tmp_path, Holder("mine", launcher=True)) as claim:
        leave(tmp_path, failure(0, "error", job="other"))
        leave(tmp_path, failure(1, "error", job=None))
        old = {key: value for key, value in asdict(failure(2, "error")).items() if key != "job"}
        (tmp_path / "failures" / "rank-2.json").write_text(json.dumps(old))
        assert read_failures(claim.run, claim.job) == []
        leave(tmp_path, failure(3, "told"))
        assert [one.rank for one in read_failures(claim.run, claim.job)] == [3]
