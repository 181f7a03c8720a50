"""`train.deterministic`: the same inputs give the same bits on a GPU too. On a CPU they do anyway."""

from __future__ import annotations

import os
from collections.abc import MutableMapping

import torch
from torch.utils import deterministic as memory

from common.errors import ConfigError

CUBLAS = "CUBLAS_WORKSPACE_CONFIG"
REPEATABLE = (":4096:8", ":16:8")  # of cuBLAS' documentation, "Results reproducibility"; the first is the faster


def set_deterministic(wanted: bool) -> None:
    """Has torch take algorithms that repeat from here on, or as it comes. Before CUDA starts: cuBLAS reads the
    environment once.

    An operation that has no such algorithm is an error that names it. Memory that is not initialised stays so: nothing
    reads it.

    Raises:
        ConfigError: the environment asks cuBLAS for products that do not repeat.
    """
    if wanted:
        fix_workspace(os.environ)
        torch.backends.cudnn.benchmark = False
        memory.fill_uninitialized_memory = False  # type: ignore[attr-defined] # a property of the module's class
    if torch.are_deterministic_algorithms_enabled() != wanted:
        torch.use_deterministic_algorithms(wanted)


def fix_workspace(environment: MutableMapping[str, str]) -> None:
    """Has cuBLAS repeat its products, as the environment says or else by REPEATABLE's first. Raises ConfigError."""
    given = environment.get(CUBLAS, "").strip()
    if given and given not in REPEATABLE:
        raise ConfigError(
            f"{CUBLAS}={given}: expected {' or '.join(REPEATABLE)}, with which cuBLAS repeats its products, since "
            f"train.deterministic=true. `unset {CUBLAS}` to have the first"
        )
    environment[CUBLAS] = given or REPEATABLE[0]
