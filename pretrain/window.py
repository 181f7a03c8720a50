"""The steps between two records of training."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from model.head import HarmonicHead
from pretrain.batches import Batches
from pretrain.config import RunConfig
from pretrain.energy.meter import Meter, Spent
from pretrain.engine import Step
from pretrain.recorder import peak_flops
from pretrain.records import Train
from pretrain.runtime.ranks import Ranks


class Window:
    """Opens with its first step; losses and norms stay on the device until the record is written."""

    def __init__(self, batches: Batches, meter: Meter) -> None:
        self.batches, self.meter = batches, meter
        self.losses: list[Tensor] = []
        self.norms: list[Tensor] = []
        self.skipped = 0
        batches.restart()
        meter.begin("train")

    def add(self, step: Step) -> None:
        """Notes what an update did, without waiting for the device."""
        self.losses.append(step.loss)
        self.norms.append(step.norm)
        self.skipped += not step.applied

    def drop(self) -> None:
        """Ends the window without a record. Collective."""
        self.meter.end()

    def close(self, ranks: Ranks) -> Spent:
        """Ends the window and agrees with the other ranks on what was in it. Collective."""
        spent = self.meter.end()
        self._loss = ranks.sum(torch.stack(self.losses).double()) / ranks.world
        self._batch, self._by_source = self.batches.fingerprint(), self.batches.tokens_by_source()
        return spent

    def record(self, cfg: RunConfig, ranks: Ranks, head: HarmonicHead, spent: Spent, step: int, tokens: int) -> Train:
        """Of the closed window, which took what was `spent`: `tokens` were trained on since the run began."""
        losses, norms = _finite(self._loss), _finite(torch.stack(self.norms))
        trained = len(losses) * cfg.train.tokens_per_step
        rate, peak, joules = trained / spent.seconds, peak_flops(ranks.device), spent.as_dict()
        return Train(
            step=step,
            loss=losses[-1],
            loss_mean=_finite(self._loss.mean())[0],
            tokens=tokens,
            tokens_by_source=self._by_source,
            batch=self._batch,
            lr=cfg.lr_at(step - 1),
            exponent=torch.as_tensor(head.exponent).item() if head.has_exponent else None,
            losses=losses,
            grad_norms=norms,
            grad_norm=norms[-1],
            grad_norm_clipped=None if norms[-1] is None else min(norms[-1], cfg.optim.clip or norms[-1]),
            skipped=self.skipped,
            seconds=spent.seconds,
            tokens_per_s=rate,
            data_wait_s=self.batches.waited_s,
            **joules,
            gpu_j_per_token=None if joules["gpu_j"] is None else joules["gpu_j"] / trained,
            mfu=None if peak is None else cfg.model.flops_per_token() * rate / (peak * ranks.world),
        )


def _finite(values: Tensor) -> list[float | None]:
    return [value if math.isfinite(value) else None for value in values.reshape(-1).tolist()]
