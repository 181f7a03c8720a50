"""The deepspeed command and its environment."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from common.errors import ConfigError
from common.variables import BIND_VARIABLE, JOB_VARIABLE, LEASE_VARIABLE
from launch import invocation
from launch.hosts import Placement
from launch.invocation import (
    check_launcher,
    command,
    environment,
    free_port,
    meeting_point,
    one_line,
    own_node,
    srun,
    write_files,
)
from launch.reach import Facts
from pretrain.runtime.claim import Holder, hold

TWO = Placement({"localhost": 2})

# ---- what is composed


def test_ranks_on_this_machine():
    words = command("c.yaml", ["a.b=1", "s={kind: files}"], TWO, port=23456)
    assert words[0] == str(Path(sys.executable).parent / "deepspeed")
    assert words[1:5] == ["--num_gpus", "2", "--master_port", "23456"]
    assert words[-5:] == ["--module", "pretrain", "c.yaml", "a.b=1", "s={kind: files}"]
    assert "--no_local_rank" in words


def test_gpus_are_counted_or_named():
    assert command("c", [], Placement({"localhost": 2}, gpus=(0, 1)))[1:3] == ["--num_gpus", "2"]
    assert command("c", [], Placement({"localhost": 2}, gpus=(2, 6)))[1:3] == ["--include", "localhost:2,6"]


def test_a_hostfile_of_the_site_is_not_taken_unasked(monkeypatch, tmp_path):
    monkeypatch.setattr(invocation, "SITE_HOSTFILE", tmp_path)
    assert command("c", [], TWO)[1:5] == ["--num_gpus", "2", "--hostfile", os.devnull]


def test_ranks_on_hosts():
    words = command("c.yaml", [], Placement({"a": 2, "b": 2}, Path("hosts")))
    assert words[1:5] == ["--hostfile", "hosts", "--force_multi", "--no_ssh_check"]
    some = Placement({"a": 2, "b": 1}, Path("hosts"), chosen="a:0,1@b:1")
    words = command("c.yaml", [], some, address="10.0.0.1", port=23456)
    assert words[3:5] == ["--include", "a:0,1@b:1"]
    assert words[words.index("--master_addr") + 1] == "10.0.0.1"


def test_each_host_has_a_command_of_its_own_without_a_launcher():
    placement = Placement({"a": 2, "b": 2}, Path("hosts"))
    words = command("c.yaml", ["x={a: 1}"], placement, launcher="none", address="10.0.0.1", port=29500, node=1)
    assert words[1:6] == ["--hostfile", "hosts", "--no_ssh", "--node_rank", "1"]
    assert words[-1] == "x={a: 1}"  # no remote shell reads it


def test_open_mpi_gets_a_whole_hostfile_and_exports_by_name(monkeypatch, tmp_path):
    monkeypatch.setenv("NCCL_DEBUG", "a b")
    some = Placement({"b": 1}, Path("hosts"), chosen="b:0")
    words = command("c.yaml", ["x={a: 1}"], some, launcher="openmpi", folder=tmp_path, exports=["MASTER_ADDR"])
    assert words[words.index("--hostfile") + 1] == str(tmp_path / "launch.hosts")
    assert "--include" not in words and words[-1] == "x={a: 1}"
    told = words[words.index("--launcher_args") + 1].split()
    assert "-x NCCL_DEBUG" in " ".join(told) and "-x MASTER_ADDR" in " ".join(told)
    write_files(some, {}, tmp_path)
    assert (tmp_path / "launch.hosts").read_text() == "b slots=1\n"
    with pytest.raises(ConfigError, match="the first slots of a host only"):
        check_launcher(Placement({"b": 1}, Path("hosts"), chosen="b:1"), "openmpi")


def test_slurm_starts_one_launcher_on_each_host():
    words = srun("c.yaml", ["x=1"], Placement({"a": 2, "b": 2}, Path("hosts"), chosen="a:0,1@b:0,1"), port=23456)
    assert words[:7] == ["srun", "--nodes", "2", "--ntasks", "2", "--ntasks-per-node", "1"]
    assert words[words.index("--nodelist") + 1] == "a,b"
    inner = ["--hostfile", "hosts", "--launcher", "none", "--master-port", "23456", "--include", "a:0,1@b:0,1"]
    assert words[-len(inner) - 5 :] == ["-m", "launch", "run", "c.yaml", "x=1", *inner]


def test_a_launcher_wants_hosts():
    with pytest.raises(ConfigError, match="needs a --hostfile"):
        check_launcher(TWO, "none")


def facts(**changes) -> Facts:
    return {"address": "10.0.0.1", "port": 23456, "cores": 8, "gpus": 0, **changes}


def test_ranks_meet_where_the_first_host_was_reached():
    placement = Placement({"a": 1, "b": 1}, Path("hosts"))
    assert meeting_point(placement, {"a": facts(), "b": facts(address="10.0.0.2")}) == ("10.0.0.1", 23456)
    for address in ("127.0.1.1", None):
        with pytest.raises(ConfigError, match="a: its address here is"):
            meeting_point(placement, {"a": facts(address=address), "b": facts()})
    assert meeting_point(Placement({"127.0.0.1": 1}, Path("hosts")), {}) == ("127.0.0.1", 29500)


def test_the_first_host_may_know_its_own_name_as_a_loopback_address(monkeypatch):
    placement = Placement({"me@a": 1, "b": 1}, Path("hosts"))
    monkeypatch.setattr(invocation.socket, "gethostbyname", lambda name: {"a": "127.0.1.1", "b": "10.0.0.2"}[name])
    monkeypatch.setattr(invocation, "_address_towards", lambda host: "10.0.0.1")
    with pytest.raises(ConfigError, match="me@a: its address here is 127.0.1.1"):
        meeting_point(placement, {})
    monkeypatch.setattr(invocation.socket, "gethostname", lambda: "a")
    assert meeting_point(placement, {}) == ("10.0.0.1", 29500)
    monkeypatch.setattr(invocation, "_address_towards", lambda host: None)
    with pytest.raises(ConfigError, match="me@a: its address here is 127.0.1.1"):
        meeting_point(placement, {})


def test_a_host_knows_which_one_it_is(monkeypatch):
    monkeypatch.setenv("SLURMD_NODENAME", "198.51.100.8")
    assert own_node(Placement({"198.51.100.7": 1, "198.51.100.8": 1}, Path("hosts"))) == 1
    monkeypatch.delenv("SLURMD_NODENAME")
    monkeypatch.setattr(invocation.socket, "gethostname", lambda: "here")
    assert own_node(Placement({"198.51.100.7": 1, "me@here": 1}, Path("hosts"))) == 1
    with pytest.raises(ConfigError, match="this machine is 0 of the hosts 198.51.100.7; say which with --node-rank"):
        own_node(Placement({"198.51.100.7": 1}, Path("hosts")))


def test_other_hosts_get_their_share_of_threads(monkeypatch, tmp_path):
    for name in ("OMP_NUM_THREADS", "DS_ACCELERATOR", "DS_ENV_FILE", BIND_VARIABLE):
        monkeypatch.delenv(name, raising=False)
    placement = Placement({"a": 2, "b": 1}, Path("hosts"))
    with hold(tmp_path, Holder("j-1", launcher=True)) as claim:
        write_files(placement, {"a": facts(), "b": facts(cores=3)}, tmp_path, claim=claim)
    lines = (tmp_path / "launch.env").read_text().splitlines()
    assert "OMP_NUM_THREADS=3" in lines and f"{LEASE_VARIABLE}={tmp_path}/lease-0" in lines
    assert f"{JOB_VARIABLE}=j-1" in lines
    assert lines[-1] == f"PATH=$PATH:{Path(sys.executable).parent}"
    write_files(placement, {"a": facts(gpus=2), "b": facts(gpus=1)}, tmp_path)
    assert "OMP_NUM_THREADS" not in (tmp_path / "launch.env").read_text()
    assert environment(placement, folder=tmp_path)["DS_ENV_FILE"] == str(tmp_path / "launch.env")


@pytest.mark.parametrize(
    "override", ["a=1", "a={kind: files, paths: [x]}", "a=$HOME `x` \"q\" 'p' \\", "a=[1,2]*$X;'", "a=%h {b: %n}"]
)
def test_overrides_reach_other_hosts_as_they_are(override):
    (argument,) = command("c", [override], Placement({"a": 1}, Path("h")))[-1:]
    if " " in argument:  # as deepspeed's pdsh runner does
        argument = '"{}"'.format(argument.replace('"', '\\"'))
    argument = argument.replace("%%", "\0").replace("%h", "HOST").replace("%n", "RANK").replace("\0", "%")  # as pdsh
    assert subprocess.run(["sh", "-c", f"printf %s {argument}"], capture_output=True, text=True).stdout == override


def test_the_environment_spares_cores_and_what_the_user_set(monkeypatch):
    for name in ("OMP_NUM_THREADS", "DS_ACCELERATOR", BIND_VARIABLE):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PATH", "/usr/bin")
    monkeypatch.setattr(invocation, "cores", lambda: 7)
    tools = str(Path(sys.executable).parent)
    ours = {"OMP_NUM_THREADS": "3", "DS_ACCELERATOR": "cpu", BIND_VARIABLE: "1"}
    assert environment(TWO) == {"PATH": f"/usr/bin:{tools}", **ours}
    assert environment(Placement({"localhost": 9}))["OMP_NUM_THREADS"] == "1"
    monkeypatch.setenv("OMP_NUM_THREADS", "5")
    assert "OMP_NUM_THREADS" not in environment(TWO)
    monkeypatch.setenv("PATH", f"/bin:{tools}")
    assert environment(Placement({"localhost": 2}, gpus=(0, 1))) == {}
    hosts = Placement({"a": 2, "b": 2}, Path("hosts"))  # which start their own ranks, and say nothing of themselves
    monkeypatch.setattr(invocation, "_gpus", lambda: 0)
    assert environment(hosts)["DS_ACCELERATOR"] == "cpu"
    monkeypatch.setattr(invocation, "_gpus", lambda: 8)
    assert environment(hosts) == {}


def test_the_line_can_be_run_by_a_shell(tmp_path):
    script = "import os, sys; print(os.environ['A'], os.environ['PATH'], sys.argv[1:])"
    added = {"A": "x y", "PATH": f"{os.environ['PATH']}:{tmp_path}/a b"}
    text = one_line([sys.executable, "-c", script, "k={v: $1}"], added)
    assert "\n" not in text
    ran = subprocess.run(text, shell=True, capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == f"x y {added['PATH']} ['k={{v: $1}}']"


def test_a_free_port_can_be_bound():
    assert 20_000 <= free_port() < 32_000
