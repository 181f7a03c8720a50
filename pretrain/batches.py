"""Which samples a rank reads in a step, and what a model is asked about them: functions of global sample numbers, the
same stream for any layout.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import Tensor

from data.loader import IGNORED, Windows
from data.masking import mask_id, masked
from pretrain.config import RunConfig
from pretrain.ranks import Ranks


def samples_of(step: int, rank: int, ranks: int, per_step: int) -> np.ndarray:
    """Global numbers of the samples that a rank reads in a step; together the ranks read each number once."""
    return np.arange(step * per_step + rank, (step + 1) * per_step, ranks)


MASKINGS = 7  # passes that score a masked model: each hides every seventh token, about as many as training does

TokenLosses = Callable[[Tensor, Tensor], Tensor]  # (B, T) inputs and targets -> (B * T,) nats, 0 where it is -100


def inputs_and_targets(batch: Tensor, masked: bool) -> tuple[Tensor, Tensor]:
    """A pass's tensor -> inputs and targets, (B, T) each: two views of (B, T+1) tokens; the halves of (B, 2T)."""
    if masked:
        inputs, targets = batch.chunk(2, 1)
        return inputs, targets
    return batch[:, :-1], batch[:, 1:]


def scoring(token_losses: TokenLosses, cfg: RunConfig) -> TokenLosses:
    """What evaluation scores with. Of a masked model: each token once, from all but every MASKINGS-th token of its
    window, itself among these. That is a pseudo-likelihood, which does not compare with a causal model's likelihood.
    """
    if cfg.model.causal:
        return token_losses
    mask = mask_id(cfg.data.path)

    def pseudo(inputs: Tensor, targets: Tensor) -> Tensor:
        tokens = torch.where(targets == IGNORED, inputs, targets)
        turn = torch.arange(tokens.shape[1], device=tokens.device) % MASKINGS
        passes = ((tokens.where(turn != k, mask), targets.where(turn == k, IGNORED)) for k in range(MASKINGS))
        return torch.stack([token_losses(*one) for one in passes]).sum(0)

    return pseudo


def figure(cfg: RunConfig) -> str:
    """What the exponential of a scored loss is called."""
    return "perplexity" if cfg.model.causal else "pseudo-perplexity"


class Batches:
    """This rank's passes of a step, each as `inputs_and_targets` takes it, and the seconds that reading them took."""

    def __init__(self, windows: Windows, cfg: RunConfig, ranks: Ranks) -> None:
        self.windows, self.cfg, self.ranks = windows, cfg, ranks
        self.waited_s = 0.0
        self._hashes = 0  # of this rank's samples of the last step, summed up
        self._mask = None if cfg.model.causal else mask_id(cfg.data.path)

    def of(self, step: int) -> Iterator[Tensor]:
        self._hashes = 0
        numbers = samples_of(step, self.ranks.rank, self.ranks.world, self.cfg.sequences_per_step())
        for first in range(0, len(numbers), self.cfg.train.micro_batch):
            began = time.perf_counter()
            chosen = numbers[first : first + self.cfg.train.micro_batch]
            tokens = self.windows.samples(chosen)
            self._hashes += sum(map(_hashed, chosen, tokens))
            if self._mask is not None:
                whole, seed, vocab_size = tokens[:, :-1], self.cfg.train.seed, self.cfg.model.vocab_size
                hidden = masked(whole, chosen, seed, mask_id=self._mask, vocab_size=vocab_size)
                tokens = np.concatenate(hidden, axis=1)
            batch = torch.from_numpy(tokens).to(self.ranks.device, non_blocking=True)
            self.waited_s += time.perf_counter() - began
            yield batch

    def fingerprint(self) -> str:
        """Of the last step's whole batch: which samples it had and what was in them, equal for every layout. Every rank
        calls it.
        """
        return f"{self.ranks.sum(torch.tensor(self._hashes)).item():016x}"


def _hashed(number: int, tokens: np.ndarray) -> int:
    """48 bits of a sample's number and tokens: sums of thousands of them fit 64 bits."""
    content = int(number).to_bytes(8, "little") + tokens.astype("<i8").tobytes()
    return int.from_bytes(hashlib.blake2b(content, digest_size=6).digest(), "little")
