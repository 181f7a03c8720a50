"""Hosts that differ do not train together: found before the first step, with the host and what differs named."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

from benchmarks.hosts.network import Hosts
from tests.support.hosts import needs_hosts
from tests.support.tiny import make_data
from tests.system.test_hosts_job import LAUNCH, config

pytestmark = [needs_hosts, pytest.mark.hosts, pytest.mark.timeout(600)]
DECODER = Path("model/decoder.py").resolve()


def test_what_differs_on_a_host_is_named(tmp_path: Path) -> None:
    """Another rate in its YAML, an edited decoder, other data of the same size; then code alone, which may differ where
    that is meant, and a run folder of its own. Nothing is saved, and no token stays.
    """
    path = config(tmp_path, train__steps=3)
    with Hosts(2, tmp_path) as hosts:

        def refused(*more: str) -> str:
            job = hosts[0].call(*LAUNCH, str(path), "--hostfile", str(hosts.hostfile()), *more)
            assert job.returncode == 2, job.stdout + job.stderr
            assert not list(tmp_path.glob("run/checkpoints/*")) and not list(tmp_path.glob("run/.shared-*"))
            return job.stderr

        other = tmp_path / "other.yaml"
        other.write_text(re.sub(r"(?m)^( *lr:).*$", r"\1 0.5", path.read_text()))
        hosts[1].hide(path, other)
        edited = tmp_path / "decoder.py"
        edited.write_text(DECODER.read_text() + "# edited\n")
        hosts[1].hide(DECODER, edited)
        prepared = make_data(tmp_path / "prepared", seed=6)
        hosts[1].hide(tmp_path / "data", prepared)
        told = refused().splitlines()[-1]
        assert "node2: optim.lr is 0.5, not 0.01" in told and "node2: code sources is " in told, told
        assert "node2: data fingerprint is " in told and "--allow-different-code" in told, told

        for alike in (path, tmp_path / "data"):
            subprocess.run(hosts[1].words("umount", str(alike)), check=True)
        (tmp_path / "elsewhere").mkdir()
        hosts[1].hide(tmp_path / "run", tmp_path / "elsewhere")
        told = refused("--allow-different-code")
        assert "on node2 it is another folder than on the first host, node1" in told.splitlines()[-1], told
        assert "--allow-different-code: node2: code sources is " in told, "allowed, and told"
        assert "optim.lr" not in told

        subprocess.run(hosts[1].words("umount", str(tmp_path / "run")), check=True)
        twice = tmp_path / "twice"
        twice.write_text("node1 slots=1\n10.77.0.1 slots=1\n")
        job = hosts[0].call(*LAUNCH, str(path), "--hostfile", str(twice), "--dry-run")
        assert job.returncode == 2 and "10.77.0.1: it is the same host as node1" in job.stderr, job.stderr
