"""`launch doctor` between hosts: it finds what is wrong on one of them, and names the remedy."""

from __future__ import annotations

import shutil
import sys
from importlib.metadata import distribution
from pathlib import Path

import pytest
import yaml

from benchmarks.hosts.network import Hosts
from tests.support.hosts import needs_hosts
from tests.support.tiny import make_data, tiny_tree

pytestmark = [needs_hosts, pytest.mark.hosts, pytest.mark.timeout(600)]
DOCTOR = [sys.executable, "-m", "launch", "doctor"]


def test_what_is_wrong_on_a_host_is_found(tmp_path: Path) -> None:
    """First nothing is; then one host has another torch, a shard less, a late clock and a run folder of its own, and a
    third one does not answer.
    """
    make_data(tmp_path / "data")
    (tmp_path / "run").mkdir()
    tree = tiny_tree(run=str(tmp_path / "run"), data__path=str(tmp_path / "data"))
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(tree))
    with Hosts(3, tmp_path) as hosts:
        asked = [*DOCTOR, str(tmp_path / "config.yaml"), "--hostfile", str(hosts.hostfile())]
        fine = hosts[0].call(*asked)
        assert fine.returncode == 0, fine.stdout + fine.stderr
        assert "no problem found" in fine.stdout and "all-reduce between 3 hosts by eth0: " in fine.stdout

        lacking = tmp_path / "lacking"
        shutil.copytree(tmp_path / "data", lacking)
        (lacking / "train-00000.bin").unlink()
        hosts[1].hide(tmp_path / "data", lacking)
        (tmp_path / "elsewhere").mkdir()
        hosts[1].hide(tmp_path / "run", tmp_path / "elsewhere")
        metadata = next(file for file in distribution("torch").files or () if file.name == "METADATA").locate()
        other = tmp_path / "METADATA"
        text = Path(metadata).read_text().splitlines(keepends=True)
        other.write_text("".join("Version: 1.0\n" if line.startswith("Version: ") else line for line in text))
        hosts[1].hide(Path(metadata), other)
        late = tmp_path / "late.pth"
        late.write_text("import time; time.time = lambda now=time.time: now() - 3600\n")
        hosts[1].hide(next(Path(metadata).parents[1].glob("*.pth")), late)
        hosts[2].cut()
        found = hosts[0].call(*asked)
        assert found.returncode == 1, found.stderr
        for problem in (
            "node2: torch is 1.0, not ",
            f"node2: {tmp_path}/data/train-00000.bin: missing; copy the prepared folder there",
            "node2: its clock is -",
            "node2: its run folder is not this machine's; put it on storage that all hosts share",
            "node3: cannot be reached by ssh",
        ):
            assert problem in found.stdout, found.stdout


def test_closed_ports_are_found(tmp_path: Path) -> None:
    with Hosts(2, tmp_path) as hosts:
        closed = hosts[1].call(*["ip", "rule", "add", "ipproto", "tcp", "dport", "16000-33000", "unreachable"])
        assert closed.returncode == 0, closed.stderr
        found = hosts[0].call(*DOCTOR, "--hostfile", str(hosts.hostfile()))
        assert found.returncode == 1
        assert "the ranks could not reduce together (" in found.stdout and "open all TCP ports" in found.stdout
