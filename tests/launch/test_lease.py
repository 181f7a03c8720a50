"""When a launcher takes a run folder, waits for it, or is refused."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import pytest

from common.errors import ConfigError
from launch.hosts import Placement
from launch.lease import Lease, lease_of, take
from pretrain.runtime.claim import Held, Holder, hold

ONE, TWO = Placement({"localhost": 1}), Placement({"a": 1, "b": 1})


def test_a_launcher_that_lives_is_not_disturbed(tmp_path: Path) -> None:
    with take(tmp_path, ONE) as claim, Lease(lease_of(tmp_path), claim.job) as lease:
        began = time.monotonic()
        with pytest.raises(Held, match="another job trains in this folder"):
            take(tmp_path, ONE)
        assert time.monotonic() - began < 30
        assert lease.path.read_text().split()[0] == claim.job
    take(tmp_path, ONE).release()


def test_a_job_without_a_launcher_is_not_waited_for(tmp_path: Path) -> None:
    with hold(tmp_path, Holder("direct", launcher=False)):
        began = time.monotonic()
        with pytest.raises(Held):
            take(tmp_path, ONE)
        assert time.monotonic() - began < 30


@pytest.mark.parametrize("lease", [None, "gone 57"])
def test_ranks_whose_launcher_is_gone_are_waited_for(tmp_path: Path, lease: str | None) -> None:
    launcher = hold(tmp_path, Holder("gone", launcher=True))
    rank = hold(tmp_path, Holder("gone", launcher=False))
    launcher.release()
    if lease is not None:
        lease_of(tmp_path).write_text(lease)
    with pytest.raises(Held, match="or ranks whose launcher was killed still do"):
        take(tmp_path, ONE, patience_s=1)
    leaving = threading.Timer(1.0, rank.release)
    leaving.start()
    with take(tmp_path, ONE) as claim:
        assert claim.job != "gone"
    leaving.join()


@pytest.mark.slow
def test_every_host_with_a_launcher_of_its_own_is_of_the_first_ones_job(tmp_path: Path) -> None:
    lease_of(tmp_path).write_text("earlier 57")  # of a launcher that was killed
    with pytest.raises(ConfigError, match="the launcher of a did not begin in .* within 1 s"):
        take(tmp_path, TWO, 1, patience_s=1)
    with take(tmp_path, TWO, 0) as first, Lease(lease_of(tmp_path, 0), first.job), take(tmp_path, TWO, 1) as second:
        assert second.job == first.job
        with pytest.raises(Held):
            take(tmp_path, TWO, 1)
        with pytest.raises(Held):
            take(tmp_path, TWO, 0)
        with pytest.raises(Held):
            take(tmp_path, Placement({"a": 1, "c": 1}), 1)
