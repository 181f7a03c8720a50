"""The decoder and the head of a configuration, in float32, with the same weights for every layout."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from model.decoder import Decoder, document_positions
from model.head import HarmonicHead
from model.vocab_parallel import VocabShard
from pretrain.config import RunConfig
from pretrain.runtime.ranks import Ranks


def build_modules(cfg: RunConfig, ranks: Ranks) -> tuple[Decoder, HarmonicHead]:
    """The decoder, and this rank's part of the head, on the rank's device."""
    decoder = Decoder(cfg.model, hidden_length=cfg.hidden_length(), seed=cfg.train.seed)
    head = _head(cfg, ranks.shard(cfg.model.vocab_size))
    return decoder.to(ranks.device), head.to(ranks.device)


def _head(cfg: RunConfig, shard: VocabShard | None = None) -> HarmonicHead:
    settings = cfg.head.arguments()
    return HarmonicHead(cfg.model.vocab_size, cfg.model.dim, shard=shard, seed=cfg.train.seed + 1, **settings)


def initial_prototypes(cfg: RunConfig) -> Tensor:
    """All prototypes (V, D) as a fresh run of this configuration starts with them, on the CPU; tied ones are the
    embedding too.
    """
    return _head(cfg).prototypes.detach()


def hidden_states(
    decoder: nn.Module,
    head: HarmonicHead,
    inputs: Tensor,
    cfg: RunConfig,
    eos_id: int | None,
    documents: int | None = None,
) -> Tensor:
    """Tokens (B, T) -> hidden states (B, T, D) of a decoder, which may be wrapped, in the configuration's dtype.

    Args:
        eos_id: the token that ends documents, which `model.document_mask` keeps apart.
        documents: how many there are, where the host knows it.
    """
    embedded = head.embed(inputs).to(compute_dtype(cfg)) if cfg.model.tied else inputs
    if not cfg.model.document_mask:
        return decoder(embedded)
    assert eos_id is not None, "a document mask needs the end of text"
    return decoder(embedded, document_positions(inputs, eos_id), documents=documents)


def compute_dtype(cfg: RunConfig) -> torch.dtype:
    """The dtype of activations and products; masters, scores and sums are float32."""
    return torch.bfloat16 if cfg.train.precision == "bf16" else torch.float32


@torch.no_grad()
def score_positions(head: HarmonicHead, hidden: Tensor, at: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Scores some positions of each sequence. Every rank of the vocabulary group calls it, with as many.

    Args:
        hidden: (B, T, D).
        at: (B, S) positions.
        targets: (B, S) tokens, or -100.
    Returns:
        (B * S,) each: nats of the targets, 0 where they are -100, and the most probable tokens.
    """
    return head.score(hidden.gather(1, at[..., None].expand(-1, -1, hidden.shape[-1])), targets)
