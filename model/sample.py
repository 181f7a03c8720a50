"""Continuations of token sequences, one token at a time, from any head's probabilities.

Every token is read again for each new one: there is no cache of keys and values. Legend: B sequences, T tokens given.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator

import torch
from torch import Tensor

from model.decoder import Decoder
from model.head import HarmonicHead


@torch.no_grad()
def generate(
    decoder: Decoder,
    head: HarmonicHead,
    tokens: Tensor,
    *,
    max_tokens: int,
    temperature: float = 1.0,
    stop: Collection[int] = (),
    generator: torch.Generator | None = None,
) -> Iterator[Tensor]:
    """The next token of each row, (B,), up to `max_tokens` times. Decoder and head are used as they are: `eval()` them.

    Args:
        tokens: (B, T) what is given, T at least 1.
        temperature: divides log-probabilities; 0 takes the most probable token.
        stop: a row that has drawn one of these repeats it; when all rows have, that is the end.
        generator: of the draws, on the device of `tokens`.

    Raises:
        ValueError: more tokens than the decoder has positions.
    """
    dtype = next(decoder.parameters()).dtype
    ends = torch.tensor(sorted(stop), dtype=tokens.dtype, device=tokens.device)
    stopped = torch.zeros(len(tokens), dtype=torch.bool, device=tokens.device)
    for _ in range(max_tokens):
        hidden = decoder(head.embed(tokens).to(dtype) if decoder.config.tied else tokens)[:, -1]
        if temperature == 0:
            drawn = head.predict(hidden)
        else:
            probs = (head.log_probs(hidden).float() / temperature).softmax(-1)
            drawn = torch.multinomial(probs, 1, generator=generator)[:, 0]
        drawn = torch.where(stopped, tokens[:, -1], drawn)
        yield drawn
        stopped |= torch.isin(drawn, ends)
        if stopped.all():
            return
        tokens = torch.cat((tokens, drawn[:, None]), 1)
