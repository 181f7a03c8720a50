"""Held-out perplexity and bits per byte over a whole split, every token scored exactly once, the same on any number
of ranks.

`python -m pretrain.evaluate RUN [--split val] [--json]` scores the newest whole checkpoint of a run folder (or one
checkpoint's folder); `deepspeed --module pretrain.evaluate RUN` does so on many ranks. The number is the true
negative log-likelihood: no smoothing, no clamp. Of a masked model it is a pseudo-likelihood (`batches.scoring`).
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from data.loader import evaluation_count, evaluation_windows
from data.settings import ConfigError
from data.shards import Split, open_split
from pretrain import ranks as process
from pretrain.batches import figure, scoring
from pretrain.checkpoint import find_given, load_weights, read_state
from pretrain.config import EXIT_BAD_INPUT, RunConfig, load
from pretrain.modules import build_modules, compute_dtype, hidden_states
from pretrain.ranks import Ranks

UNIGRAM_TOKENS = 50_000_000  # enough training tokens for the frequencies of a vocabulary


@dataclass(frozen=True)
class Evaluation:
    """Negative log-likelihood of a split. `text_bytes` are the documents' UTF-8 bytes, end marks not counted."""

    nats: float
    tokens: int
    text_bytes: int

    @property
    def loss(self) -> float:
        """Nats per token."""
        return self.nats / self.tokens

    @property
    def perplexity(self) -> float:
        return math.exp(min(self.loss, 700.0))  # e**710 is no float

    @property
    def bits_per_byte(self) -> float:
        return self.nats / math.log(2) / self.text_bytes

    def as_dict(self) -> dict[str, float | int]:
        return {
            "loss": self.loss,
            "perplexity": self.perplexity,
            "bits_per_byte": self.bits_per_byte,
            "tokens": self.tokens,
            "text_bytes": self.text_bytes,
        }


def evaluate(
    token_losses: Callable[[Tensor, Tensor], Tensor], split: Split, seq_len: int, micro_batch: int, ranks: Ranks
) -> Evaluation:
    """Scores a split in windows of `seq_len`, `micro_batch` at a time on every rank. Collective.

    Args:
        token_losses: (B, T) inputs and targets -> (B * T,) nats, 0 where the target is -100.
    """
    sums = torch.zeros(2, dtype=torch.float64, device=ranks.device)  # nats, tokens
    per_round = micro_batch * ranks.world
    for first in range(0, evaluation_count(split, seq_len), per_round):
        inputs, targets = (
            torch.from_numpy(part).to(ranks.device)
            for part in evaluation_windows(split, seq_len, first + ranks.rank * micro_batch, micro_batch)
        )
        sums += torch.stack((token_losses(inputs, targets).double().sum(), (targets >= 0).sum().double()))
    nats, tokens = ranks.sum(sums).tolist()
    assert tokens == split.tokens, f"scored {tokens} of {split.tokens} tokens"
    return Evaluation(nats, int(tokens), split.text_bytes)


def unigram_bits_per_byte(train: Split, held_out: Split) -> float:
    """Bits per byte of the model that knows token frequencies (add one) and nothing else: what any model must beat."""
    seen = np.bincount(train.read(0, min(train.tokens, UNIGRAM_TOKENS)), minlength=train.vocab_size) + 1.0
    nats = -np.log(seen / seen.sum())
    counts = np.bincount(held_out.read(0, min(held_out.tokens, UNIGRAM_TOKENS)), minlength=train.vocab_size)
    share = counts.sum() / held_out.tokens
    return float(counts @ nats) / math.log(2) / (held_out.text_bytes * share)


def evaluate_run(path: Path, split_name: str, ranks: Ranks) -> tuple[Evaluation, RunConfig, Path]:
    """Loads a run's (or checkpoint's) weights into this world's layout and scores a split of its data."""
    checkpoint, run = find_given(path, ranks)
    cfg = load(run / "config.yaml")
    split = open_split(cfg.data.path, split_name)
    ranks = process.with_groups(ranks, ranks.world)
    decoder, head = build_modules(cfg, ranks)
    load_weights(checkpoint, decoder, head)
    decoder.to(compute_dtype(cfg)).eval()
    head.eval().progress = cfg.head_progress(read_state(checkpoint)["step"] - 1)

    @torch.no_grad()
    def token_losses(inputs: Tensor, targets: Tensor) -> Tensor:
        return head(hidden_states(decoder, head, inputs, cfg, split.eos_id), targets, reduction="none")

    micro_batch = cfg.evaluation.micro_batch or cfg.train.micro_batch
    return evaluate(scoring(token_losses, cfg), split, cfg.model.seq_len, micro_batch, ranks), cfg, checkpoint


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m pretrain.evaluate", description="Held-out perplexity of a run.")
    parser.add_argument("run", type=Path, help="a run folder (its newest whole checkpoint), or one checkpoint's folder")
    parser.add_argument("--split", default="val", choices=("val", "train"))
    parser.add_argument("--json", action="store_true", help="one JSON object instead of text")
    args = parser.parse_args(argv)
    ranks = process.start()
    try:
        result, cfg, checkpoint = evaluate_run(args.run, args.split, ranks)
    except ConfigError as error:
        if ranks.first:
            print(f"error: {error}", file=sys.stderr)
        return EXIT_BAD_INPUT
    if ranks.first:
        found = {"checkpoint": str(checkpoint), "split": args.split, **result.as_dict()}
        print(json.dumps(found) if args.json else _told(found, figure(cfg)))
    process.stop()
    return 0


def _told(found: dict, figure: str) -> str:
    return (
        f"{found['checkpoint']} on {found['split']}: {figure} {found['perplexity']:.3f}, {found['loss']:.5f} "
        f"nats/token, "
        f"{found['bits_per_byte']:.4f} bits/byte over {found['tokens']:,} tokens, {found['text_bytes']:,} bytes"
    )


if __name__ == "__main__":
    sys.exit(main())
