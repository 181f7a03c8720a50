"""The hosts that other tests use are hosts: names, addresses, ssh, and nothing left of them."""

from __future__ import annotations

import subprocess
import time
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from benchmarks.hosts.network import Hosts
from tests.support.hosts import needs_hosts

pytestmark = [needs_hosts, pytest.mark.hosts]


def test_hosts_reach_each_other_and_vanish(tmp_path: Path) -> None:
    before = {process.pid for process in psutil.process_iter()}
    links = subprocess.run(["ip", "link"], capture_output=True, text=True).stdout
    other = tmp_path / "other"
    other.write_text("another")
    with Hosts(3, tmp_path) as hosts:
        for name in hosts.names:
            assert hosts[0].call("ssh", *hosts.ssh, name, "hostname").stdout == f"{name}\n"
        told = hosts[0].call("pdsh", "-R", "ssh", "-w", "node2,node3", "hostname", "-I").stdout
        assert sorted(told.split()) == ["10.77.0.2", "10.77.0.3", "node2:", "node3:"]
        shared = tmp_path / "shared"
        shared.write_text("the same")
        hosts[1].hide(shared, other)
        assert [host.call("cat", str(shared)).stdout for host in hosts] == ["the same", "another", "the same"]
        hosts[2].start("sleep", "1234")
        deadline = time.monotonic() + 30
        while not hosts[2].running("sleep 1234"):
            assert time.monotonic() < deadline
            time.sleep(0.05)
        hosts[1].cut()
        assert hosts[0].call("ssh", *hosts.ssh, "-o", "ConnectTimeout=1", "node2", "true").returncode == 255
        assert hosts[0].call("ssh", *hosts.ssh, "node3", "true").returncode == 0
    assert subprocess.run(["ip", "link"], capture_output=True, text=True).stdout == links
    left = []
    for process in psutil.process_iter():
        with suppress(psutil.NoSuchProcess):  # of another test
            left.append([] if process.pid in before else process.cmdline())
    assert not any(words[:1] == ["sleep"] and (words[1:] == ["1234"] or str(tmp_path) in str(words)) for words in left)
