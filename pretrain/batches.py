"""Which samples a rank reads in a step: a function of global sample numbers, the same stream for any layout."""

from __future__ import annotations

import time
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from data.loader import Windows
from pretrain.config import RunConfig
from pretrain.ranks import Ranks


def samples_of(step: int, rank: int, ranks: int, per_step: int) -> np.ndarray:
    """Global numbers of the samples that a rank reads in a step; together the ranks read each number once."""
    return np.arange(step * per_step + rank, (step + 1) * per_step, ranks)


class Batches:
    """This rank's passes of a step, (B, T+1) tokens each, and the seconds that reading them took."""

    def __init__(self, windows: Windows, cfg: RunConfig, ranks: Ranks) -> None:
        self.windows, self.cfg, self.ranks = windows, cfg, ranks
        self.waited_s = 0.0

    def of(self, step: int) -> Iterator[Tensor]:
        numbers = samples_of(step, self.ranks.rank, self.ranks.world, self.cfg.sequences_per_step())
        for first in range(0, len(numbers), self.cfg.train.micro_batch):
            began = time.perf_counter()
            tokens = self.windows.samples(numbers[first : first + self.cfg.train.micro_batch])
            batch = torch.from_numpy(tokens).to(self.ranks.device, non_blocking=True)
            self.waited_s += time.perf_counter() - began
            yield batch
