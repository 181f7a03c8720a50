"""Who this process is among the others: found out once, here, and handed on as a value."""

from __future__ import annotations

import ctypes
import logging
import os
import socket
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import psutil
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from common.command import refuse
from common.errors import ConfigError
from model.vocab_parallel import VocabShard, group_members, shard_of
from pretrain.config import RunConfig
from pretrain.runtime.deterministic import set_deterministic
from pretrain.runtime.environment import adopt, binds_cores, place_of
from pretrain.runtime.meeting import Meeting, agree, meet

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Ranks:
    """This process among the others, its device, and the groups that it reduces with."""

    rank: int
    world: int  # ranks on all hosts
    local_rank: int  # among those on this host
    local_world: int
    device: torch.device
    own_gpu: bool = False  # each rank of this host sees a GPU of its own and no other
    vocab: ProcessGroup | None = None  # ranks that hold one set of prototypes; None: this rank holds all
    replicas: ProcessGroup | None = None  # ranks that hold the same prototypes as this one; None: only this

    @property
    def first(self) -> bool:
        """Whether it is the rank that writes and prints for all."""
        return self.rank == 0

    @property
    def replica_count(self) -> int:
        """Ranks that hold the same prototypes, this one among them."""
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
        values: list[Any] = [value] * self.world
        if self.world > 1:
            dist.all_gather_object(values, value)
        return values

    def barrier(self) -> None:
        """Returns once every rank has come here; nobody's device is waited for."""
        self.sum(torch.zeros(()))


def alone() -> Ranks:
    """This process without others, on the first GPU if there is one; no process group is needed."""
    return Ranks(0, 1, 0, 1, torch.device("cuda" if torch.cuda.is_available() else "cpu"))


def start(timeout_s: float = 1800, cfg: RunConfig | None = None, meeting: Meeting | None = None) -> Ranks:
    """Joins the process group that the launcher described in the environment, or makes one of a single process.

    Args:
        cfg: says what the process is to be for (`train.deterministic`, `parallel.backend`); None: nothing.
        meeting: where the ranks have met; None: they meet here.

    Raises:
        ConfigError: the environment is at odds with itself or with this machine.
    """
    adopt(os.environ)
    place = place_of(os.environ, meeting=not dist.is_initialized())
    rank, world, local_rank, local_world = place.rank, place.world, place.local_rank, place.local_world
    if world == 1:
        _describe_alone()
    sharing = cfg is not None and cfg.parallel.backend == "gloo"
    if cfg is not None:
        set_deterministic(cfg.train.deterministic)
    if torch.cuda.is_available():
        device = _gpu_of(local_rank, local_world, sharing)
        torch.cuda.set_device(device)
        backend = "cpu:gloo,cuda:gloo" if sharing else "cpu:gloo,cuda:nccl"
        if sharing:
            log.warning(
                "parallel.backend=gloo is for tests: what ranks tell each other goes through host memory, and they may "
                "share a GPU"
            )
    else:
        _keep_memory()
        if binds_cores(os.environ):
            _bind_cores(local_rank, local_world)
        device, backend = torch.device("cpu"), "gloo"
    _choose_accelerator(device)
    if world > 1:
        _choose_interface(os.environ["MASTER_ADDR"], world > local_world)
    if not dist.is_initialized():
        store = dist.HashStore() if world == 1 else (meeting or meet(timeout_s)).store  # one rank needs no port
        met: dict[str, Any] = {"store": store, "rank": rank, "world_size": world}
        dist.init_process_group(backend, timeout=timedelta(seconds=timeout_s), **met)
    ranks = Ranks(rank, world, local_rank, local_world, device)
    if device.type == "cpu":
        return ranks
    shared = _shared_gpu(ranks)
    if shared and not sharing:
        raise ConfigError(
            f"{shared}: each rank needs one of its own. Start no more ranks on a host than it has GPUs, and give each "
            "all GPUs of its host in CUDA_VISIBLE_DEVICES, or another one (Slurm: --gpus-per-task=1)"
        )
    return replace(ranks, own_gpu=local_world > 1 and torch.cuda.device_count() == 1 and not shared)


def _gpu_of(local_rank: int, local_world: int, sharing: bool) -> torch.device:
    """The GPU of a rank: that of its number on the host, or the only one that it sees; with `sharing`, in turn.

    Raises:
        ConfigError: it sees several, and none for it.
    """
    seen = torch.cuda.device_count()
    index = 0 if seen == 1 and local_world > 1 else local_rank % seen if sharing else local_rank
    if index >= seen:
        raise ConfigError(
            f"LOCAL_RANK={local_rank}: this process sees {seen} GPU(s) (CUDA_VISIBLE_DEVICES="
            f"{os.environ.get('CUDA_VISIBLE_DEVICES', 'not set')}). Start as many ranks as there are GPUs, each of "
            "which sees all GPUs of its host, or its own alone"
        )
    return torch.device("cuda", index)


def _shared_gpu(ranks: Ranks) -> str | None:
    """Which two ranks are on one GPU, by its UUID, in words; None: each has its own. Collective."""
    first: dict[str, int] = {}
    uuid = str(torch.cuda.get_device_properties(ranks.device).uuid)
    for rank, (gpu, host) in enumerate(ranks.gather((uuid, socket.gethostname()))):
        if first.setdefault(gpu, rank) != rank:
            return f"ranks {first[gpu]} and {rank} are both on the GPU {gpu} of {host}"
    return None


def start_command(
    timeout_s: float = 1800,
    cfg: RunConfig | None = None,
    *,
    allow_code: bool = False,
    data: Path | None = None,
    texts: Sequence[Path] = (),
) -> Ranks:
    """`start` for a command, which ends with the code of bad input and a message if the environment is not right, or
    the hosts have not the same of what the command reads.

    Args:
        allow_code: their code may differ.
        data: the prepared folder that it reads; None: that of `cfg`.
        texts: the files of text that it reads.
    """
    try:
        meeting = meet(timeout_s)
    except ConfigError as error:
        raise SystemExit(refuse(error)) from None
    try:
        agree(meeting, cfg, allow_code, data, texts)
        return start(timeout_s, cfg, meeting)
    except ConfigError as error:
        raise SystemExit(refuse(error, says=meeting.rank == 0)) from None


def _describe_alone() -> None:
    """Says in the environment, for DeepSpeed, that this process is alone, where it does not say so yet."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    alone: dict[str, object] = {"RANK": 0, "WORLD_SIZE": 1, "LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": 1}
    alone |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    for name, value in alone.items():
        os.environ.setdefault(name, str(value))


def _choose_accelerator(device: torch.device) -> None:
    """Has DeepSpeed use this device: it would guess, with a warning. Raises ConfigError if it was told another."""
    given = os.environ.get("DS_ACCELERATOR", "").strip()
    if given and given != device.type:
        remedy = (
            "set CUDA_VISIBLE_DEVICES= (empty) to use the CPU" if given == "cpu" else "no such device is found here"
        )
        raise ConfigError(f"DS_ACCELERATOR={given}: this process uses {device.type}; `unset DS_ACCELERATOR`: {remedy}")
    if device.type == "cpu":
        os.environ["DS_ACCELERATOR"] = "cpu"


def interface_to(address: str) -> str | None:
    """The network interface by which this host reaches an address, which may be its own; None if it does not."""
    try:
        family, _, _, _, target = socket.getaddrinfo(address, 9, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.connect(target)  # sends nothing
            own = probe.getsockname()[0]
    except OSError:
        return None
    held = psutil.net_if_addrs().items()
    names = (name for name, addresses in held if any(its.address == own for its in addresses))
    return next(names, None)


def _choose_interface(address: str, many_hosts: bool) -> None:
    """Has gloo, and NCCL's bootstrap between hosts, use the interface to rank 0, unless the user chose one.

    Left alone, gloo takes the address of the host's own name, which is a loopback one on many systems.

    Raises:
        ConfigError: the user chose one that this host does not have.
    """
    if given := os.environ.get("GLOO_SOCKET_IFNAME", "").strip():
        names = psutil.net_if_addrs()
        if unknown := [asked for asked in given.split(",") if asked.strip() not in names]:
            raise ConfigError(
                f"GLOO_SOCKET_IFNAME={given}: this host has no network interface {', '.join(unknown)}, but "
                f"{', '.join(names)}. Name one of these, or unset it to have the one that leads to {address}"
            )
    else:
        os.environ.pop("GLOO_SOCKET_IFNAME", None)
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
    return replace(ranks, vocab=vocab, replicas=replicas)


def _own_group(ranks: Ranks, members: list[list[int]]) -> ProcessGroup | None:
    if len(members[0]) == 1:
        return None
    groups: list[Any] = [dist.new_group(group) for group in members]  # collective: every rank makes every group
    return next(made for made, group in zip(groups, members, strict=True) if ranks.rank in group)


def stop() -> None:
    """Leaves the process group together, so that no rank sees another vanish. The process may start again."""
    if not dist.is_initialized():
        return
    dist.barrier()
    # DeepSpeed, where it met the group, remembers subgroups of it, and only its own call forgets them.
    engine_comm = sys.modules.get("deepspeed.comm")
    met = engine_comm is not None and engine_comm.is_initialized()
    (engine_comm if met else dist).destroy_process_group()  # type: ignore[union-attr]
