"""The baseline: the same model and step as one would write them in plain PyTorch."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from model.decoder import Decoder
from pretrain.config import RunConfig
from pretrain.optim import parameter_groups

LEARNING_RATE = 1e-4


class PlainModel(nn.Module):
    """The decoder, and a linear layer whose logits are all in memory."""

    def __init__(self, decoder: Decoder, dim: int, vocab: int) -> None:
        super().__init__()
        self.decoder, self.head = decoder, nn.Linear(dim, vocab, bias=False)
        nn.init.normal_(self.head.weight, std=0.02)

    def forward(self, windows: Tensor) -> Tensor:
        """Windows (B, T + 1) -> the mean loss."""
        logits = self.head(self.decoder(windows[:, :-1]))
        return F.cross_entropy(logits.view(-1, logits.shape[-1]), windows[:, 1:].reshape(-1))


class Plain:
    """Softmax cross-entropy, bf16 autocast, fused AdamW."""

    def __init__(
        self, cfg: RunConfig, device: torch.device, decoder: Decoder, vocab: int | None = None, compiled: bool = False
    ) -> None:
        """`decoder` takes the place of the configuration's; `vocab`: rows of the head, the vocabulary's by default."""
        self.cfg, self.device = cfg, device
        self.model = PlainModel(decoder, cfg.model.dim, vocab or cfg.model.vocab_size).to(device)
        self.loss = torch.compile(self.model) if compiled else self.model
        groups = parameter_groups([self.model], cfg.optim)
        self.optimizer = torch.optim.AdamW(groups, lr=LEARNING_RATE, betas=cfg.optim.betas, fused=True)

    def step(self, batches: Iterable[Tensor], bf16: bool = True) -> Tensor:
        """Windows of all passes -> their mean loss, on the device."""
        losses = []
        for batch in batches:
            with torch.autocast(self.device.type, torch.bfloat16, enabled=bf16):
                loss = self.loss(batch.to(self.device, non_blocking=True))
            (loss / self.cfg.accumulation(1)).backward()
            losses.append(loss.detach())
        nn.utils.clip_grad_norm_(self.model.parameters(), self.cfg.optim.clip or 1e30)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return torch.stack(losses).mean()
