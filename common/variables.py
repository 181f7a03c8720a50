"""How launchers and ranks speak to each other: names of environment variables, and marks in what is printed."""

from __future__ import annotations

from collections.abc import Mapping

JOB_VARIABLE = "OVERTONE_JOB"  # the id of the job that a launcher started: what it reads is of that job alone
LEASE_VARIABLE = "OVERTONE_LEASE"  # names the file by which a launcher tells its ranks that it lives
BIND_VARIABLE = "OVERTONE_BIND_CORES"  # 1: each rank keeps to its share of the host's cores
LINK_MARK = "overtone-link:"  # before what pretrain/runtime/link.py prints, since launchers print too
RANKS_HERE = ("LOCAL_SIZE", "LOCAL_WORLD_SIZE", "WORLD_SIZE")  # that tell the ranks on this host; the first that is set


def ranks_per_node(environment: Mapping[str, str]) -> int:
    """Ranks on this host, by what the launcher said: deepspeed and OpenMPI in LOCAL_SIZE, torchrun in LOCAL_WORLD_SIZE,
    which a job that was started from within another may have inherited. See pretrain/runtime/environment.py for their
    check.
    """
    return next((int(environment[name]) for name in RANKS_HERE if environment.get(name)), 1)
