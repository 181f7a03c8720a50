"""Which parameters decay, and the AdamW that steps them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from torch import nn

from model.decoder import Decoder
from model.head import HarmonicHead
from pretrain.config import OptimConfig

Group = dict[str, object]
FUSED = partial(torch.optim.AdamW, fused=True)


def kind_of(module: nn.Module, name: str, parameter: nn.Parameter) -> str:
    """matrices, norms, biases, embeddings, prototypes, exponent or factor: what a parameter is, by its owner."""
    if isinstance(module, HarmonicHead):
        return {"prototypes": "prototypes", "log_exponent": "exponent"}.get(name, "factor")
    if isinstance(module, nn.Embedding):
        return "embeddings"
    if isinstance(module, nn.LayerNorm | nn.RMSNorm):
        return "norms"
    return "biases" if parameter.dim() == 1 else "matrices"


def parameter_groups(modules: Iterable[nn.Module], cfg: OptimConfig) -> list[Group]:
    """Every trainable parameter once: those that decay most, then the others; `names` says which they are. `lr_scale`
    times the learning rate is theirs: not 1 for the matrices of a decoder with `base_dim`, a group of their own then,
    and for a head with `head_lr_scale`.
    """
    found: dict[tuple[float, float], list[tuple[str, nn.Parameter]]] = {}
    for root in modules:
        width_scale = root.config.width_scale() if isinstance(root, Decoder) else 1.0
        for path, module in root.named_modules():
            for name, parameter in module.named_parameters(recurse=False):
                kind = kind_of(module, name, parameter)
                lr_scale = cfg.head_lr_scale if isinstance(module, HarmonicHead) else 1.0
                group = (cfg.decay_of(kind), width_scale if kind == "matrices" else lr_scale)
                found.setdefault(group, []).append((f"{path}.{name}".lstrip("."), parameter))
    return [
        {
            "params": [p for _, p in chosen],
            "names": [n for n, _ in chosen],
            "weight_decay": decay,
            "lr_scale": scale,
        }
        for (decay, scale), chosen in sorted(found.items(), key=lambda item: item[0], reverse=True)
    ]


def adamw(module: Decoder | HarmonicHead, cfg: OptimConfig, make: Callable[..., Any] = FUSED) -> Any:
    """AdamW over one module; `make` gives the optimiser of its groups, by default torch's in one pass per group."""
    groups = parameter_groups([module], cfg)
    for group in groups:
        del group["names"]  # DeepSpeed and torch keep their own books
    return make(groups, lr=cfg.lr, betas=cfg.betas, eps=cfg.eps)
