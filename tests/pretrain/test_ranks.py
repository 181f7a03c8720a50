"""What a process finds out about itself: which rank, which interface, which cores."""

from __future__ import annotations

import os
import socket
import subprocess
import sys

from pretrain.ranks import _bind_cores, interface_to
from tests.ranks import run_ranks


def test_the_interface_to_an_address() -> None:
    assert interface_to("127.0.0.1") == "lo"
    assert interface_to("no such name.invalid") is None


def test_each_rank_keeps_to_its_share_of_the_cores() -> None:
    code = (
        "import os; from pretrain.ranks import _bind_cores; _bind_cores({}, {}); print(sorted(os.sched_getaffinity(0)))"
    )
    cores = sorted(os.sched_getaffinity(0))

    def bound(rank: int, world: int) -> list[int]:
        words = [sys.executable, "-c", code.format(rank, world)]
        return list(eval(subprocess.run(words, capture_output=True, text=True, check=True).stdout))

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

    from pretrain import ranks as process

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
