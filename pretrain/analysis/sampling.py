"""Text from a run's newest whole checkpoint, token by token."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch

from common.errors import ConfigError
from data.vocabulary import open_tokenizer
from model.sample import generate, texts
from pretrain.run_folder import RunFolder


def continuation(
    run: Path,
    prompt: str,
    tokens: int | None = None,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int | None = None,
) -> Iterator[str]:
    """The text that a model adds to a prompt, as it comes; the loading is done when this returns.

    Args:
        run: a run folder (its newest whole checkpoint), or one checkpoint's folder.
        prompt: what to go on from; empty: a new document.
        tokens: most tokens to add; None: as many as there are positions for.
        temperature: 0 takes the likeliest token.
        top_k: draw from the K likeliest alone.
        top_p: draw from the likeliest that together reach P alone.
        seed: the same one draws the same tokens; None: another each time.
    Raises:
        ConfigError: no such run, no checkpoint, or a value out of its range.
    """
    folder = RunFolder.containing(run)
    cfg = folder.settings()
    tokenizer = open_tokenizer(cfg.data.path)
    model = folder.read(folder.open_model, run)
    device = model.head.prototypes.device
    given = [tokenizer.eos_id, *tokenizer.encode(prompt)]  # which opens a document
    draws = torch.Generator(device)
    draws.seed() if seed is None else draws.manual_seed(seed)
    try:
        drawn = generate(
            model.decoder,
            model.head,
            torch.tensor([given], device=device),
            max_tokens=max(0, cfg.model.seq_len + 1 - len(given)) if tokens is None else tokens,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            stop=(tokenizer.eos_id,),
            generator=draws,
        )
    except ValueError as error:
        raise ConfigError(str(error)) from None
    return texts((int(one) for one in drawn), tokenizer.decode, given)
