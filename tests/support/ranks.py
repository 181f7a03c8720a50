"""Runs a check on N gloo ranks of this machine, each a process of its own, and brings back what they returned or
raised.
"""

from __future__ import annotations

import multiprocessing
import os
import traceback
import warnings
from collections.abc import Callable, Mapping
from multiprocessing import reduction
from pathlib import Path
from typing import Any

TIMEOUT_S = 540  # below pytest's own


class Caller:
    """Gives a process that a fork server makes what a child of the caller would have: environment and output."""

    def __init__(self, environment: Mapping[str, str] = os.environ, output: int = 1, errors: int = 2) -> None:
        self.environment, self.output, self.errors = environment, output, errors

    def __reduce__(self) -> tuple[Any, ...]:
        return _become, (dict(self.environment), reduction.DupFd(self.output), reduction.DupFd(self.errors))


def _become(environment: dict[str, str], output: Any, errors: Any) -> None:
    os.environ.clear()
    os.environ.update(environment)
    os.dup2(output.detach(), 1)
    os.dup2(errors.detach(), 2)


def context() -> Any:
    """Processes are forked from a process that has imported the program, which takes seconds; not where CUDA could have
    been initialised in it.
    """
    if Path("/dev/nvidiactl").exists():
        return multiprocessing.get_context("spawn")
    server = multiprocessing.get_context("forkserver")
    server.set_forkserver_preload(["tests.support.preloaded"])
    return server


def _rank(
    caller: Any, rank: int, world: int, store: str, check: Callable[..., Any], arguments: dict[str, Any], results: Any
) -> None:
    os.environ.update(
        RANK=str(rank), WORLD_SIZE=str(world), LOCAL_RANK=str(rank), LOCAL_WORLD_SIZE=str(world), OMP_NUM_THREADS="1"
    )
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="0")
    import torch
    import torch.distributed as dist

    warnings.filterwarnings(
        "ignore", category=FutureWarning, module="torch.distributed"
    )  # DeepSpeed's and our names for collectives
    torch.set_num_threads(1)
    try:
        dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world)
        results.put((rank, check(**arguments), None))
        if dist.is_initialized():  # not where the check left the group
            dist.barrier()
    except BaseException:
        results.put((rank, None, traceback.format_exc()))
        raise
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def run_ranks(check: Callable[..., Any], world: int, tmp_path: Any, **arguments: Any) -> list[Any]:
    """Calls `check(**arguments)` on every rank of a world of `world`; returns the results by rank (plain values or
    numpy).

    `check` is a module-level function. Raises AssertionError with the traceback of the first rank that failed.
    """
    forks = context()
    results = forks.Queue()
    store = tmp_path / f"store-{os.urandom(4).hex()}"
    processes = [
        forks.Process(target=_rank, args=(Caller(), rank, world, str(store), check, arguments, results), daemon=True)
        for rank in range(world)
    ]
    for process in processes:
        process.start()
    found: dict[int, Any] = {}
    try:
        for _ in range(world):
            rank, value, error = results.get(timeout=TIMEOUT_S)
            assert error is None, f"rank {rank} of {world}:\n{error}"
            found[rank] = value
        for process in processes:
            process.join(timeout=30)
    finally:
        for process in processes:
            if process.is_alive():
                process.kill()
    return [found[rank] for rank in range(world)]
