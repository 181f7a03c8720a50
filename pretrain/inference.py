"""A checkpoint's decoder and head for evaluation and sampling: loaded into this world's layout, without DeepSpeed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from common.errors import ConfigError
from model.decoder import Decoder
from model.head import HarmonicHead
from pretrain.checkpoints.contents import read_state
from pretrain.checkpoints.loading import load_weights
from pretrain.checkpoints.reading import agreed, held
from pretrain.checkpoints.resume import TOKENIZER, identity
from pretrain.config import RunConfig
from pretrain.modules import build_modules, compute_dtype, hidden_states, score_positions
from pretrain.runtime.ranks import Ranks


class Model:
    """A decoder and a head as they are after `step` updates: no dropout, no noise."""

    def __init__(self, cfg: RunConfig, decoder: Decoder, head: HarmonicHead, step: int, eos_id: int) -> None:
        self.cfg, self.step, self.eos_id = cfg, step, eos_id
        self.decoder, self.head = decoder.to(compute_dtype(cfg)).eval(), head.eval()
        self.head.progress = cfg.head_progress(step - 1)

    @torch.no_grad()
    def hidden(self, tokens: Tensor) -> Tensor:
        """Tokens (B, T) -> hidden states (B, T, D). Every rank of the vocabulary group calls it, with as many."""
        return hidden_states(self.decoder, self.head, tokens, self.cfg, self.eos_id)

    def score(self, inputs: Tensor, at: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Inputs (B, T), positions and targets (B, S) -> nats and most probable tokens, (B * S,) each, as
        `pretrain.modules.score_positions` gives them. Every rank of the vocabulary group calls it, with as many.
        """
        return score_positions(self.head, self.hidden(inputs), at, targets)


def fitting_state(checkpoint: Path, cfg: RunConfig, tokenizer_sha256: str | None) -> dict[str, Any]:
    """A checkpoint's state. Raises ConfigError if it is of another model or tokenizer."""
    state = read_state(checkpoint)
    expected = identity(cfg, "", tokenizer_sha256)
    for key, was in state["identity"].items():
        if key in expected and was != expected[key] and (key == TOKENIZER or key.startswith(("model.", "head."))):
            raise ConfigError(
                f"{checkpoint}: {key} is {was!r} in this checkpoint, but {expected[key]!r} was given. Evaluate it with "
                "the configuration and the tokenizer that it was trained with."
            )
    return state


def load_model(checkpoint: Path, cfg: RunConfig, tokenizer_sha256: str | None, eos_id: int, ranks: Ranks) -> Model:
    """Collective.

    Args:
        checkpoint: the folder of a whole one.
        cfg: of its run.
        tokenizer_sha256: of the tokenizer whose ids the model is to read.
        eos_id: of that tokenizer.

    Raises:
        ConfigError: the checkpoint is of another model or tokenizer, or a weight in it is not finite.
    """

    def read() -> tuple[dict[str, Any], Decoder, HarmonicHead]:
        with held(checkpoint):
            state = fitting_state(checkpoint, cfg, tokenizer_sha256)
            decoder, head = build_modules(cfg, ranks)
            load_weights(checkpoint, decoder, head)
            return state, decoder, head

    state, decoder, head = agreed(ranks, read)
    parameters = [
        (f"{part}.{n}", p) for part, m in (("decoder", decoder), ("head", head)) for n, p in m.named_parameters()
    ]
    wrong = [name for name, parameter in parameters if not parameter.isfinite().all()]
    if bad := [name for names in ranks.gather(wrong) for name in names]:
        raise ConfigError(
            f"{checkpoint}: {bad[0]} holds values that are not finite ({len(set(bad))} such tensors in all); "
            "give an earlier checkpoint"
        )
    return Model(cfg, decoder, head, state["step"], eos_id)
