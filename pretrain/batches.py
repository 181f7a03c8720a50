"""Which samples a rank reads in a step, and what a model is asked about them: functions of global sample numbers, the
same stream for any layout.

Legend: B sequences, T tokens of each.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from data.loader import Windows
from data.masking import mask_id, masked
from pretrain.config import RunConfig
from pretrain.runtime.ranks import Ranks


def samples_of(step: int, rank: int, ranks: int, per_step: int) -> np.ndarray:
    """Global numbers of the samples that a rank reads in a step, (samples,); together the ranks read each number once.

    Args:
        per_step: samples of the whole world in a step.
    """
    return np.arange(step * per_step + rank, (step + 1) * per_step, ranks)


def inputs_and_targets(batch: Tensor, masked: bool) -> tuple[Tensor, Tensor]:
    """A pass's tensor -> inputs and targets, (B, T) each: two views of (B, T+1) tokens; the halves of (B, 2T)."""
    if masked:
        inputs, targets = batch.chunk(2, 1)
        return inputs, targets
    return batch[:, :-1], batch[:, 1:]


@dataclass(frozen=True)
class Reading:
    """This rank's samples of a step."""

    tokens: Tensor  # int64 (samples, T + 1), of a masked model (samples, 2 T); pinned for a GPU
    hashes: int  # of the samples, summed up
    by_source: np.ndarray  # tokens of each source of the data, int64 (sources,)


class Batches:
    """This rank's passes of a step, each as `inputs_and_targets` takes it, in host memory; a thread reads them one step
    ahead. Since `restart`: the seconds that training waited for them, and the tokens of each source in them.
    """

    def __init__(self, windows: Windows, cfg: RunConfig, ranks: Ranks) -> None:
        self.windows, self.cfg, self.ranks = windows, cfg, ranks
        self.restart()
        self._hashes = 0  # of the last step
        self._mask = None if cfg.model.causal else mask_id(cfg.data.path)
        self._reader = ThreadPoolExecutor(1, thread_name_prefix="reader")
        self._ahead: tuple[int, Future[Reading]] | None = None  # a step that is being read

    def restart(self) -> None:
        """Counts seconds and tokens from 0 again, as each record of training does."""
        self.waited_s = 0.0
        self._by_source = np.zeros(len(self.windows.split.sources), dtype=np.int64)

    def of(self, step: int) -> Iterator[Tensor]:
        """The passes of a step, each int64 (B, T + 1), of a masked model (B, 2 T), B being train.micro_batch."""
        began = time.perf_counter()
        asked, reading = self._ahead or (None, None)
        if reading is None or asked != step:
            reading = self._reader.submit(self.read, step)
        self._ahead = step + 1, self._reader.submit(self.read, step + 1)
        read = reading.result()
        self._hashes = read.hashes
        self._by_source += read.by_source
        for batch in read.tokens.split(self.cfg.train.micro_batch):
            self.waited_s += time.perf_counter() - began
            yield batch
            began = time.perf_counter()

    def read(self, step: int) -> Reading:
        """This rank's samples of a step."""
        numbers = samples_of(step, self.ranks.rank, self.ranks.world, self.cfg.sequences_per_step())
        tokens = self.windows.samples(numbers)
        hashes = sum(map(_hashed, numbers, tokens))
        if self._mask is not None:
            whole, seed, vocab_size = tokens[:, :-1], self.cfg.train.seed, self.cfg.model.vocab_size
            hidden = masked(whole, numbers, seed, mask_id=self._mask, vocab_size=vocab_size)
            tokens = np.concatenate(hidden, axis=1)
        batch = torch.from_numpy(tokens)
        pinned = batch.pin_memory() if self.ranks.device.type == "cuda" else batch
        return Reading(pinned, hashes, self.windows.tokens_by_source(numbers))

    def tokens_by_source(self) -> dict[str, int]:
        """Of the whole batches since `restart`, by the source's name. Every rank calls it."""
        total = self.ranks.sum(torch.from_numpy(self._by_source.copy())).tolist()
        return dict(zip(self.windows.split.sources, total, strict=True))

    def fingerprint(self) -> str:
        """Of the last step's whole batch: which samples it had and what was in them, equal for every layout. Every rank
        calls it.
        """
        return f"{self.ranks.sum(torch.tensor(self._hashes)).item():016x}"


def _hashed(number: int, tokens: np.ndarray) -> int:
    """48 bits of a sample's number and tokens: sums of thousands of them fit 64 bits."""
    content = int(number).to_bytes(8, "little") + tokens.astype("<i8").tobytes()
    return int.from_bytes(hashlib.blake2b(content, digest_size=6).digest(), "little")
