"""What a process finds out about itself: which rank, which interface, which cores."""

from __future__ import annotations

import os
import re
import socket
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from common.errors import ConfigError
from pretrain.runtime import ranks as process
from pretrain.runtime.deterministic import CUBLAS
from pretrain.runtime.ranks import _bind_cores, interface_to
from tests.support.commands import call
from tests.support.ranks import run_ranks
from tests.support.tiny import make_data, outcome_of, tiny_config


def test_the_interface_to_an_address() -> None:
    assert interface_to("127.0.0.1") == "lo"
    assert interface_to("no such name.invalid") is None


def test_each_rank_keeps_to_its_share_of_the_cores() -> None:
    bind = "from pretrain.runtime.ranks import _bind_cores; _bind_cores({}, {})"
    code = f"import os; {bind}; print(sorted(os.sched_getaffinity(0)))"
    cores = sorted(os.sched_getaffinity(0))

    def bound(rank: int, world: int) -> list[int]:
        return list(eval(call("-c", code.format(rank, world)).stdout))

    half = len(cores) // 2
    if half:
        assert bound(0, 2) == cores[:half] and bound(1, 2) == cores[half : 2 * half]
    assert bound(0, len(cores) + 1) == cores


def test_cores_that_are_listed_and_not_given_bind_nothing(monkeypatch, caplog) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {4000, 4001})  # this machine has fewer
    _bind_cores(0, 2)
    assert "not bound to cores [4000]" in caplog.text


def test_a_process_alone_may_start_again_whatever_listens_on_its_port(tmp_path) -> None:
    (told,) = run_ranks(check_started_again, 1, tmp_path)
    assert told == [(0, 1), (0, 1)]


def check_started_again() -> list[tuple[int, int]]:
    import torch.distributed as dist

    dist.destroy_process_group()
    found = []
    with socket.create_server(("127.0.0.1", 0)) as taken:
        for port in (taken.getsockname()[1],) * 2:
            os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
            ranks = process.start()
            found.append((ranks.rank, ranks.world))
            process.stop()
    process.start()  # for the one that runs this
    return found


def test_a_process_may_train_again_after_it_stopped(tmp_path) -> None:
    (codes,) = run_ranks(check_trained_again, 1, tmp_path, base=tmp_path)
    assert codes == [0, 0]


def check_trained_again(base: Path) -> list[int]:
    make_data(base / "data")
    os.environ["MASTER_PORT"] = "29500"  # one that a launcher might have given; a process alone does not listen
    codes = []
    for name in ("one", "other"):
        cfg = tiny_config(run=str(base / name), data__path=str(base / "data"), train__steps=1)
        codes.append(outcome_of(cfg).code)
        process.stop()
    return codes


LAYOUTS: dict[str, dict[str, Any]] = {  # GPUs that a rank sees, their UUIDs by rank, and the backend
    "all GPUs of the host": {"seen": 2, "uuids": "AB", "device": [0, 1]},
    "its own alone": {"seen": 1, "uuids": "AB", "device": [0, 0], "own": True},
    "the same one": {"seen": 1, "uuids": "AA", "told": r"ranks 0 and 1 are both on the GPU A of .*--gpus-per-task=1"},
    "the same one, for tests": {"seen": 1, "uuids": "AA", "backend": "gloo", "device": [0, 0]},
    "its own alone, for tests": {"seen": 1, "uuids": "AB", "backend": "gloo", "device": [0, 0], "own": True},
}


def check_gpus() -> dict[str, Any]:
    """This rank's device in each of LAYOUTS, and the one that it chose for CUDA; or what it was told."""
    found: dict[str, Any] = {}
    os.environ.pop("DS_ACCELERATOR", None)
    for name, layout in LAYOUTS.items():
        chosen: list[torch.device] = []
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch.cuda, "is_available", lambda: True)
            patch.setattr(torch.cuda, "device_count", lambda layout=layout: layout["seen"])
            patch.setattr(torch.cuda, "set_device", chosen.append)
            uuid = layout["uuids"][int(os.environ["RANK"])]
            patch.setattr(torch.cuda, "get_device_properties", lambda _, uuid=uuid: SimpleNamespace(uuid=uuid))
            try:
                ranks = process.start(cfg=tiny_config(parallel__backend=layout.get("backend", "auto")))
            except ConfigError as error:
                found[name] = str(error)
                continue
        assert chosen == [ranks.device] and process.with_groups(ranks, 2).own_gpu == ranks.own_gpu
        found[name] = (str(ranks.device), ranks.own_gpu)
    return found


def test_a_rank_takes_the_gpu_of_its_number_or_the_only_one_that_it_sees(tmp_path) -> None:
    told = run_ranks(check_gpus, 2, tmp_path)
    for name, layout in LAYOUTS.items():
        for rank in range(2):
            if "told" in layout:
                assert re.search(layout["told"], told[rank][name]), told[rank][name]
            else:
                assert told[rank][name] == (f"cuda:{layout['device'][rank]}", layout.get("own", False)), name


def test_ranks_share_gpus_in_turn_for_tests_alone(monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert [process._gpu_of(rank, 4, sharing=True).index for rank in range(4)] == [0, 1, 0, 1]
    with pytest.raises(ConfigError, match=r"^LOCAL_RANK=2: this process sees 2 GPU\(s\)"):
        process._gpu_of(2, 4, sharing=False)


@pytest.fixture
def one_gpu(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """A process alone that would have a GPU: what it did, in order, up to its process group."""
    done: list[Any] = []
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "LOCAL_SIZE", "DS_ACCELERATOR", CUBLAS):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setattr(process, "_describe_alone", lambda: None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(uuid="A"))
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: done.append((device.index, os.environ.get(CUBLAS))))
    monkeypatch.setattr(torch, "use_deterministic_algorithms", done.append)
    monkeypatch.setattr(process.dist, "is_initialized", lambda: False)
    monkeypatch.setattr(process.dist, "init_process_group", lambda backend, **_: done.append(backend))
    return done


def test_the_backend_is_the_one_that_is_asked_for(one_gpu: list[Any], caplog) -> None:
    process.start(cfg=tiny_config())
    process.start()
    assert one_gpu == [(0, None), "cpu:gloo,cuda:nccl"] * 2 and not caplog.messages
    process.start(cfg=tiny_config(parallel__backend="gloo"))
    assert one_gpu[-1] == "cpu:gloo,cuda:gloo" and "parallel.backend=gloo is for tests" in caplog.text


def test_bits_that_repeat_are_asked_for_before_cuda_starts(one_gpu: list[Any], monkeypatch) -> None:
    cfg = tiny_config(train__deterministic=True)
    process.start(cfg=cfg)
    assert one_gpu == [True, (0, ":4096:8"), "cpu:gloo,cuda:nccl"]
    monkeypatch.setenv(CUBLAS, ":16:8")
    process.start(cfg=cfg)
    assert os.environ[CUBLAS] == ":16:8", "as the user chose"
    monkeypatch.setenv(CUBLAS, ":8:4096")
    process.start(cfg=tiny_config())
    with pytest.raises(ConfigError, match=r"^CUBLAS_WORKSPACE_CONFIG=:8:4096: expected :4096:8 or :16:8, .*`unset"):
        process.start(cfg=cfg)


def test_deepspeed_takes_the_device_that_the_rank_has(monkeypatch) -> None:
    from pretrain.engine import _name_device

    for name in ("LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_RANK"):
        monkeypatch.setenv(name, "3")
    _name_device(process.Ranks(3, 4, 3, 4, torch.device("cuda", 3)))
    _name_device(process.Ranks(3, 4, 3, 4, torch.device("cpu")))
    assert os.environ["LOCAL_RANK"] == "3"
    _name_device(process.Ranks(3, 4, 3, 4, torch.device("cuda", 0), own_gpu=True))
    assert os.environ["LOCAL_RANK"] == os.environ["OMPI_COMM_WORLD_LOCAL_RANK"] == "0"
