"""Who this process is among the others: found out once, here, and handed on as a value."""

from __future__ import annotations

import ctypes
import logging
import os
import socket
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import psutil
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from model.vocab_parallel import VocabShard, group_members, shard_of
from pretrain.config import BIND_VARIABLE, ranks_per_node

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Ranks:
    rank: int
    world: int
    local_rank: int
    local_world: int
    device: torch.device
    vocab: ProcessGroup | None = None  # ranks that hold one set of prototypes; None: this rank holds all
    replicas: ProcessGroup | None = None  # ranks that hold the same prototypes as this one; None: only this

    @property
    def first(self) -> bool:
        return self.rank == 0

    @property
    def replica_count(self) -> int:
        return 1 if self.replicas is None else dist.get_world_size(self.replicas)

    def shard(self, total: int) -> VocabShard:
        """The rows of `total` prototypes that this rank holds."""
        return shard_of(total, self.vocab)

    def sum(self, x: Tensor) -> Tensor:
        """Sum over the world, in place; a CPU tensor takes gloo and does not touch the device."""
        if self.world > 1:
            dist.all_reduce(x)
        return x

    def any(self, flag: bool) -> bool:
        """Whether the flag is up on any rank."""
        return self.each_any(flag)[0]

    def each_any(self, *flags: bool) -> list[bool]:
        """Whether each flag is up on any rank."""
        return [bool(count) for count in self.sum(torch.tensor(flags, dtype=torch.int64)).tolist()]

    def gather(self, value: Any) -> list[Any]:
        """A plain value of every rank, in their order."""
        found: list[Any] = [value] * self.world
        if self.world > 1:
            dist.all_gather_object(found, value)
        return found

    def barrier(self) -> None:
        self.sum(torch.zeros(()))


def start(timeout_s: float = 1800) -> Ranks:
    """Joins the process group that the launcher described in the environment, or makes one of a single process."""
    if "RANK" not in os.environ:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        alone = {"RANK": 0, "WORLD_SIZE": 1, "LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": 1, "MASTER_ADDR": "127.0.0.1"}
        os.environ.update({key: str(value) for key, value in {**alone, "MASTER_PORT": port}.items()})
    rank, world, local_rank = (int(os.environ[key]) for key in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))
    local_world = ranks_per_node(os.environ)
    if torch.cuda.is_available():
        torch.cuda.set_device(local_rank)
        device, backend = torch.device("cuda", local_rank), "cpu:gloo,cuda:nccl"
    else:
        _keep_memory()
        if os.environ.get(BIND_VARIABLE):
            _bind_cores(local_rank, local_world)
        device, backend = torch.device("cpu"), "gloo"
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # or DeepSpeed guesses, with a warning
    if world > 1:
        _choose_interface(os.environ["MASTER_ADDR"], world > local_world)
    if not dist.is_initialized():
        # one rank needs no port
        met: dict[str, Any] = {"store": dist.HashStore(), "rank": 0, "world_size": 1} if world == 1 else {}
        dist.init_process_group(backend, timeout=timedelta(seconds=timeout_s), **met)
    return Ranks(rank, world, local_rank, local_world, device)


def interface_to(address: str) -> str | None:
    """The network interface by which this host reaches an address, which may be its own; None if it does not."""
    try:
        family, _, _, _, target = socket.getaddrinfo(address, 9, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.connect(target)  # sends nothing
            own = probe.getsockname()[0]
    except OSError:
        return None
    found = (name for name, held in psutil.net_if_addrs().items() if any(one.address == own for one in held))
    return next(found, None)


def _choose_interface(address: str, many_hosts: bool) -> None:
    """Has gloo, and NCCL's bootstrap between hosts, use the interface to rank 0, unless the user chose one.

    Left alone, gloo takes the address of the host's own name, which is a loopback one on many systems.
    """
    name = interface_to(address)
    if name is None or (many_hosts and name == "lo"):
        return
    os.environ.setdefault("GLOO_SOCKET_IFNAME", name)
    if many_hosts:
        os.environ.setdefault("NCCL_SOCKET_IFNAME", f"={name}")  # "=": not also eth01 for eth0


def _bind_cores(local_rank: int, local_world: int) -> None:
    """Gives this rank its share of the cores that the process may use; too few to share: no rank is bound."""
    cores = sorted(os.sched_getaffinity(0))
    share = len(cores) // local_world
    if share:
        mine = cores[local_rank * share : (local_rank + 1) * share]
        try:
            os.sched_setaffinity(0, mine)
        except OSError as error:  # some containers list cores that they do not give
            log.warning("this rank is not bound to cores %s, which costs speed alone: %s", mine, error)


def _keep_memory() -> None:
    """Has glibc keep what is freed: giving pages back and faulting them in again costs 5% of a CPU step."""
    trim_threshold, mmap_max = -1, -4  # M_TRIM_THRESHOLD, M_MMAP_MAX of malloc.h
    with suppress(OSError, AttributeError):  # another C library
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(trim_threshold, -1)
        libc.mallopt(mmap_max, 0)


def with_groups(ranks: Ranks, vocab_ranks: int) -> Ranks:
    """The same ranks with their vocabulary and replica groups made. Every rank calls it."""
    vocab, replicas = (_own_group(ranks, members) for members in group_members(ranks.world, vocab_ranks))
    return Ranks(ranks.rank, ranks.world, ranks.local_rank, ranks.local_world, ranks.device, vocab, replicas)


def _own_group(ranks: Ranks, members: list[list[int]]) -> ProcessGroup | None:
    if len(members[0]) == 1:
        return None
    groups = [dist.new_group(group) for group in members]  # collective: every rank makes every group
    return next(made for made, group in zip(groups, members, strict=True) if ranks.rank in group)


def stop() -> None:
    """Leaves the process group together, so that no rank sees another vanish."""
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()
