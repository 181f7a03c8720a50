"""What launchers leave in the environment: who this process is, or a refusal that names the variable."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from common.errors import ConfigError
from common.variables import BIND_VARIABLE, ranks_per_node
from launch.exports import env_file
from launch.probe import gpus, more_facts
from launch.reach import ssh_arguments
from pretrain.runtime import ranks as process
from pretrain.runtime.environment import Place, adopt, binds_cores, place_of
from tests.support.commands import call

MEETING = {"MASTER_ADDR": "node1", "MASTER_PORT": "29500"}
TORCHRUN = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2", **MEETING}
OPEN_MPI = {
    "OMPI_COMM_WORLD_RANK": "3",
    "OMPI_COMM_WORLD_SIZE": "4",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
}
ALONE_IN_MPI = dict(zip(OPEN_MPI, ("0", "1", "0", "1"), strict=True))


def place(environment: dict[str, str]) -> Place:
    found = dict(environment)
    adopt(found)
    return place_of(found)


def test_open_mpis_names_are_taken_where_deepspeeds_are_missing() -> None:
    found = dict(OPEN_MPI)
    adopt(found)
    assert [found[name] for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_SIZE")] == ["3", "4", "1", "2"]
    ours = {**OPEN_MPI, "RANK": "0"}
    adopt(ours)
    assert ours == {**OPEN_MPI, "RANK": "0", "TTY_COMPATIBLE": "0"}, "its terminals are none"


def test_deepspeeds_word_on_the_ranks_here_is_before_an_inherited_one() -> None:
    assert ranks_per_node({"LOCAL_SIZE": "2", "LOCAL_WORLD_SIZE": "1", "WORLD_SIZE": "4"}) == 2
    assert ranks_per_node({"LOCAL_WORLD_SIZE": "3", "WORLD_SIZE": "6"}) == 3
    assert ranks_per_node({"WORLD_SIZE": "6", "LOCAL_SIZE": ""}) == 6 and ranks_per_node({}) == 1


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, Place(0, 1, 0, 1)),
        (TORCHRUN, Place(3, 4, 1, 2)),
        ({**OPEN_MPI, **MEETING}, Place(3, 4, 1, 2)),
        ({**TORCHRUN, "LOCAL_SIZE": "4"}, Place(3, 4, 1, 4)),
        (ALONE_IN_MPI, Place(0, 1, 0, 1)),  # mpirun -n 1: there is nobody to meet
        ({"WORLD_SIZE": "1"}, Place(0, 1, 0, 1)),
        ({"RANK": "", "WORLD_SIZE": " ", "MASTER_PORT": ""}, Place(0, 1, 0, 1)),
        ({**TORCHRUN, "SLURM_PROCID": "1", "SLURM_NTASKS": "2", "PMI_RANK": "1"}, Place(3, 4, 1, 2)),
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "1"}, Place(0, 1, 0, 1)),
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "4", "SLURM_STEP_NUM_TASKS": "1"}, Place(0, 1, 0, 1)),
        ({"SLURM_NTASKS": "4"}, Place(0, 1, 0, 1)),  # a shell of salloc
        ({"OMP_NUM_THREADS": "4,2", BIND_VARIABLE: "1"}, Place(0, 1, 0, 1)),
    ],
)
def test_who_this_process_is(environment: dict[str, str], expected: Place) -> None:
    assert place(environment) == expected


REFUSED: list[tuple[dict[str, str], str]] = [
    (OPEN_MPI, r"WORLD_SIZE=4 \(from OMPI_COMM_WORLD_SIZE\), but MASTER_ADDR and MASTER_PORT are not set.*mpirun -x"),
    ({**OPEN_MPI, "MASTER_ADDR": "node1"}, r"but MASTER_PORT is not set"),
    ({"OMPI_COMM_WORLD_SIZE": "4"}, r"WORLD_SIZE=4 \(from OMPI_COMM_WORLD_SIZE\), but RANK is not set"),
    ({"OMPI_COMM_WORLD_RANK": "0"}, r"RANK=0 \(from OMPI_COMM_WORLD_RANK\), but WORLD_SIZE is not set"),
    ({**OPEN_MPI, "OMPI_COMM_WORLD_SIZE": "many"}, r"WORLD_SIZE=many \(from .*\): expected a whole number from 1 on"),
    ({"WORLD_SIZE": "4"}, r"^WORLD_SIZE=4, but RANK is not set.*unset RANK"),
    ({"WORLD_SIZE": "0"}, r"^WORLD_SIZE=0: expected a whole number from 1 on"),
    ({"WORLD_SIZE": "-1"}, r"^WORLD_SIZE=-1: expected"),
    ({"RANK": "0"}, r"^RANK=0, but WORLD_SIZE is not set"),
    ({**TORCHRUN, "RANK": ""}, r"^WORLD_SIZE=4, but RANK is not set"),
    ({**TORCHRUN, "RANK": "4"}, r"^RANK=4: expected a number from 0 to 3, since WORLD_SIZE=4"),
    ({**TORCHRUN, "RANK": "-1"}, r"^RANK=-1: expected a whole number from 0 on"),
    ({**TORCHRUN, "RANK": "1.0"}, r"^RANK=1.0: expected"),
    ({**TORCHRUN, "RANK": "9" * 5000}, r"^RANK=9+: expected"),
    ({**TORCHRUN, "RANK": "\u0663"}, r"^RANK=.: expected"),
    ({**TORCHRUN, "LOCAL_RANK": ""}, r"^WORLD_SIZE=4, but LOCAL_RANK is not set"),
    ({**TORCHRUN, "LOCAL_RANK": "two"}, r"^LOCAL_RANK=two: expected"),
    ({**TORCHRUN, "LOCAL_RANK": "2"}, r"^LOCAL_RANK=2: expected a number from 0 to 1, since LOCAL_WORLD_SIZE=2"),
    ({"LOCAL_RANK": "1"}, r"^LOCAL_RANK=1: expected a number from 0 to 0, since there is one process"),
    ({**TORCHRUN, "LOCAL_WORLD_SIZE": "0"}, r"^LOCAL_WORLD_SIZE=0: expected"),
    ({**TORCHRUN, "LOCAL_SIZE": "x"}, r"^LOCAL_SIZE=x: expected"),
    ({**TORCHRUN, "LOCAL_SIZE": "8"}, r"^LOCAL_SIZE=8 ranks on this host, but there are 4 in all.*unset LOCAL_SIZE"),
    ({**TORCHRUN, "MASTER_ADDR": ""}, r"but MASTER_ADDR is not set"),
    ({**TORCHRUN, "MASTER_PORT": "http"}, r"^MASTER_PORT=http: expected a whole number from 1 to 65535"),
    ({**TORCHRUN, "MASTER_PORT": "0"}, r"^MASTER_PORT=0: expected"),
    ({**TORCHRUN, "MASTER_PORT": "65536"}, r"^MASTER_PORT=65536: expected"),
    ({"MASTER_PORT": "http"}, r"^MASTER_PORT=http: expected.*unset RANK WORLD_SIZE LOCAL_RANK MASTER_PORT`$"),
    ({"SLURM_PROCID": "1", "SLURM_NTASKS": "2"}, r"^SLURM_PROCID=1, SLURM_NTASKS=2: Slurm .*overtone slurm"),
    ({"SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "2"}, r"^SLURM_PROCID=0, SLURM_STEP_NUM_TASKS=2: Slurm"),
    ({"SLURM_PROCID": "abc"}, r"^SLURM_PROCID=abc: expected"),
    ({"PMI_RANK": "0", "PMI_SIZE": "2"}, r"^PMI_RANK=0, PMI_SIZE=2: MPI started this process as one of several"),
    ({"PMIX_RANK": "1"}, r"^PMIX_RANK=1: PMIx started"),
    ({"OMP_NUM_THREADS": "abc"}, r"^OMP_NUM_THREADS=abc: expected"),
    ({"OMP_NUM_THREADS": "0"}, r"^OMP_NUM_THREADS=0: expected"),
    ({BIND_VARIABLE: "no"}, rf"^{BIND_VARIABLE}=no: expected 1"),
]


@pytest.mark.parametrize(("environment", "told"), REFUSED, ids=[" ".join(one)[:60] for one, _ in REFUSED])
def test_what_makes_no_sense_is_refused_by_name(environment: dict[str, str], told: str) -> None:
    with pytest.raises(ConfigError, match=f"(?s){told}"):
        place(environment)


def test_cores_are_bound_where_it_says_so() -> None:
    assert binds_cores({BIND_VARIABLE: "1"}) and not binds_cores({BIND_VARIABLE: "0"}) and not binds_cores({})


@pytest.mark.parametrize(
    "command",
    [
        ["pretrain", "configs/quickstart.yaml"],
        ["pretrain.evaluate", "nowhere"],
        ["pretrain.runtime.link"],
    ],
    ids=lambda words: words[0],
)
def test_every_command_ends_as_for_bad_input(command: list[str]) -> None:
    clean = {name: value for name, value in os.environ.items() if name not in ("RANK", *MEETING, "LOCAL_RANK")}
    done = call("-m", *command, environment={**clean, "WORLD_SIZE": "4"})
    assert done.returncode == 2 and done.stderr.startswith("error: WORLD_SIZE=4, but RANK is not set"), done.stderr


def test_the_machine_is_what_the_environment_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DS_ACCELERATOR", "xpu")
    with pytest.raises(ConfigError, match=r"^DS_ACCELERATOR=xpu: this process uses cpu"):
        process._choose_accelerator(torch.device("cpu"))
    monkeypatch.setenv("DS_ACCELERATOR", "")
    process._choose_accelerator(torch.device("cpu"))
    assert os.environ["DS_ACCELERATOR"] == "cpu"
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo,eth99")
    with pytest.raises(ConfigError, match=r"^GLOO_SOCKET_IFNAME=lo,eth99: this host has no network interface eth99"):
        process._choose_interface("127.0.0.1", many_hosts=False)


def test_a_rank_beyond_the_gpus_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    for name, value in {**TORCHRUN, "LOCAL_RANK": "2", "LOCAL_WORLD_SIZE": "3"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,4")
    with pytest.raises(ConfigError, match=r"^LOCAL_RANK=2: this process sees 2 GPU\(s\) \(CUDA_VISIBLE_DEVICES=3,4\)"):
        process.start()


def test_a_launchers_own_variables_are_checked(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PDSH_SSH_ARGS_APPEND", "-o 'User=me")
    with pytest.raises(ConfigError, match="PDSH_SSH_ARGS_APPEND=-o 'User=me: not arguments"):
        ssh_arguments()
    monkeypatch.setenv("DS_ENV_FILE", str(tmp_path / "gone"))
    with pytest.raises(ConfigError, match="DS_ENV_FILE=.*gone: there is no such file"):
        env_file({})
    (tmp_path / "binary").write_bytes(b"\xff\xfe")
    monkeypatch.setenv("DS_ENV_FILE", str(tmp_path / "binary"))
    with pytest.raises(ConfigError, match="binary: cannot be read as UTF-8"):
        env_file({})
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "-1")
    assert gpus() == 0
    monkeypatch.delenv("PATH")
    assert "ninja" in more_facts(tmp_path, tmp_path, "none")
