"""What the environment says of this process, checked in one place: which rank it is, of how many, where they meet.

deepspeed and torchrun say so in RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_SIZE or LOCAL_WORLD_SIZE, MASTER_ADDR and
MASTER_PORT; Open MPI in names of its own, which are adopted. Nothing said, or a world of one, is one process alone. A
variable that is empty counts as one that is not set.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass

from common.errors import ConfigError
from common.variables import BIND_VARIABLE, RANKS_HERE, ranks_per_node

OPEN_MPI = {
    "RANK": "OMPI_COMM_WORLD_RANK",
    "WORLD_SIZE": "OMPI_COMM_WORLD_SIZE",
    "LOCAL_RANK": "OMPI_COMM_WORLD_LOCAL_RANK",
    "LOCAL_SIZE": "OMPI_COMM_WORLD_LOCAL_SIZE",
}
MEETING = ("MASTER_ADDR", "MASTER_PORT")
# Launchers that do not tell the ranks where they meet: the variable of a process's number, and those of how many.
OTHERS = {
    "Slurm": ("SLURM_PROCID", ("SLURM_STEP_NUM_TASKS", "SLURM_NTASKS", "SLURM_NPROCS")),
    "MPI": ("PMI_RANK", ("PMI_SIZE",)),
    "MVAPICH": ("MV2_COMM_WORLD_RANK", ("MV2_COMM_WORLD_SIZE",)),
    "PMIx": ("PMIX_RANK", ()),
}
LAUNCH = "`overtone run CONFIG` or `deepspeed --module`"
ALONE = f"Start ranks with {LAUNCH}, which set it; for one process, `unset RANK WORLD_SIZE LOCAL_RANK`"


@dataclass(frozen=True)
class Place:
    """This process among the others."""

    rank: int
    world: int
    local_rank: int  # among those on this host
    local_world: int


def adopt(environment: MutableMapping[str, str]) -> None:
    """Takes out what is empty, and adds the variables that deepspeed's launcher sets where it left them to Open MPI,
    which has names of its own, and shows every rank a terminal, whatever its own output goes to.
    """
    names = (*OPEN_MPI, *OPEN_MPI.values(), *RANKS_HERE, *MEETING)
    for name in {name for name in names if not environment.get(name, "-").strip()}:
        del environment[name]
    if "RANK" not in environment:
        for ours, theirs in OPEN_MPI.items():
            if theirs in environment:
                environment[ours] = environment[theirs]
    if OPEN_MPI["RANK"] in environment:
        environment.setdefault("TTY_COMPATIBLE", "0")  # read by rich: no bars and colours in a log


def place_of(environment: Mapping[str, str], meeting: bool = True) -> Place:
    """Checks what an environment says once it is adopted.

    Args:
        meeting: whether the ranks still have to meet; False: they have.

    Raises:
        ConfigError: a variable that is missing, malformed or at odds with another, by name and value.
    """
    check_threads(environment)
    binds_cores(environment)
    rank, world = _number(environment, "RANK"), _number(environment, "WORLD_SIZE", 1)
    if rank is None and world in (None, 1):
        _check_alone(environment)
        rank, world = 0, 1
    if rank is None:
        raise ConfigError(f"{_shown(environment, 'WORLD_SIZE')}, but RANK is not set. {ALONE}")
    if world is None:
        raise ConfigError(f"{_shown(environment, 'RANK')}, but WORLD_SIZE is not set. {ALONE}")
    if rank >= world:
        raise ConfigError(
            f"{_shown(environment, 'RANK')}: expected a number from 0 to {world - 1}, since "
            f"{_shown(environment, 'WORLD_SIZE')}. {ALONE}"
        )
    local_rank = _number(environment, "LOCAL_RANK")
    if local_rank is None and world > 1:
        raise ConfigError(f"{_shown(environment, 'WORLD_SIZE')}, but LOCAL_RANK is not set. {ALONE}")
    size = next((name for name in RANKS_HERE if name in environment), None)
    if size is not None:
        _number(environment, size, 1)
    place = Place(rank, world, local_rank or 0, ranks_per_node(environment))
    if place.local_world > world:
        raise ConfigError(
            f"{_shown(environment, str(size))} ranks on this host, but there are {world} in all. {ALONE}, or `unset "
            f"{size}` if it is another job's"
        )
    if place.local_rank >= place.local_world:
        raise ConfigError(
            f"{_shown(environment, 'LOCAL_RANK')}: expected a number from 0 to {place.local_world - 1}, since "
            f"{'there is one process' if size is None else _shown(environment, size)}. {ALONE}"
        )
    if meeting:
        _check_meeting(environment, world)
    return place


def check_threads(environment: Mapping[str, str]) -> None:
    """Raises ConfigError for an OMP_NUM_THREADS that OpenMP would ignore: every rank would then take all cores."""
    given = environment.get("OMP_NUM_THREADS", "").strip()
    if given and not re.fullmatch(r"[1-9]\d{0,8}(\s*,\s*[1-9]\d{0,8})*", given, re.ASCII):
        raise ConfigError(
            f"OMP_NUM_THREADS={given}: expected a number of threads from 1 on; `unset OMP_NUM_THREADS` to let every "
            "process choose"
        )


def binds_cores(environment: Mapping[str, str]) -> bool:
    """Whether each rank keeps to its share of the cores. Raises ConfigError for what is neither yes nor no."""
    given = environment.get(BIND_VARIABLE, "").strip()
    if given not in ("", "0", "1"):
        raise ConfigError(f"{BIND_VARIABLE}={given}: expected 1 (each rank keeps to its share of the cores) or 0")
    return given == "1"


def _number(environment: Mapping[str, str], name: str, least: int = 0, most: int = 10**9 - 1) -> int | None:
    given = environment.get(name)
    if given is None:
        return None
    if not re.fullmatch(r"\d{1,9}", given.strip(), re.ASCII) or not least <= int(given) <= most:
        upto = "on" if most == 10**9 - 1 else f"to {most}"
        remedy = ALONE if f" {name}" in ALONE else f"{ALONE.removesuffix('`')} {name}`"
        raise ConfigError(f"{_shown(environment, name)}: expected a whole number from {least} {upto}. {remedy}")
    return int(given)


def _shown(environment: Mapping[str, str], name: str) -> str:
    """A variable and its value, and whose it is."""
    theirs = OPEN_MPI.get(name)
    source = f" (from {theirs})" if theirs and environment.get(theirs) == environment.get(name) else ""
    return f"{name}={environment.get(name, '')}{source}"


def _check_meeting(environment: Mapping[str, str], world: int) -> None:
    _number(environment, "MASTER_PORT", 1, 65535)
    missing = [name for name in MEETING if name not in environment]
    if world > 1 and missing:
        by_mpi = OPEN_MPI["WORLD_SIZE"] in environment
        hand_on = "mpirun -x MASTER_ADDR=HOST -x MASTER_PORT=29500 ..." if by_mpi else "export MASTER_ADDR=HOST ..."
        launcher = " --hostfile H --launcher openmpi" if by_mpi else ""
        raise ConfigError(
            f"{_shown(environment, 'WORLD_SIZE')}, but {' and '.join(missing)} {'is' if len(missing) == 1 else 'are'} "
            f"not set: the ranks do not know where they meet. Start them with `overtone run CONFIG{launcher}`, "
            f"or say the host of rank 0 and a free port there: `{hand_on}`"
        )


def _check_alone(environment: Mapping[str, str]) -> None:
    """Raises ConfigError for a process that another launcher started as one of several."""
    for launcher, (number, counts) in OTHERS.items():
        if not environment.get(number, "").strip():
            continue
        count = next((name for name in counts if environment.get(name, "").strip()), None)
        processes = 1 if count is None else _number(environment, count, 1) or 1
        if _number(environment, number) or processes > 1:
            said = _shown(environment, number) + (f", {_shown(environment, count)}" if count else "")
            remedy = "`overtone run CONFIG --launcher slurm` or `overtone slurm CONFIG`"
            raise ConfigError(
                f"{said}: {launcher} started this process as one of several, but not how they find each other (RANK, "
                f"WORLD_SIZE, MASTER_ADDR): each would train alone. Start the ranks with "
                f"{remedy if launcher == 'Slurm' else LAUNCH}; for one process, `unset {number}`"
            )
