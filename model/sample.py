"""Continuations of token sequences, one token at a time, from a decoder's KV cache and any head's probabilities.

Legend: B sequences, T tokens given, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator

import torch
from torch import Tensor

from .decoder import Decoder
from .head import HarmonicHead


def generate(
    decoder: Decoder,
    head: HarmonicHead,
    tokens: Tensor,
    *,
    max_tokens: int,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    stop: Collection[int] = (),
    generator: torch.Generator | None = None,
) -> Iterator[Tensor]:
    """The next token of each row, (B,), up to `max_tokens` times. Decoder and head are used as they are: `eval()` them.

    Args:
        tokens: (B, T) what is given, one document a row, T at least 1.
        temperature: divides log-probabilities; 0 takes the most probable token.
        top_k: only so many of the most probable tokens are drawn from.
        top_p: only the most probable tokens that together reach this probability, at the temperature.
        stop: a row that has drawn one of these repeats it; when all rows have, that is the end.
        generator: of the draws, on the device of `tokens`.

    Raises:
        ValueError: nothing is given, more is asked for than the decoder's `seq_len` has room for, it sees what comes
            after, or a setting is out of its range.
    """
    _check(decoder, tokens.shape[1], max_tokens, temperature, top_k, top_p)
    return _generate(decoder, head, tokens, max_tokens, temperature, top_k, top_p, stop, generator)


@torch.no_grad()
def _generate(
    decoder: Decoder,
    head: HarmonicHead,
    tokens: Tensor,
    max_tokens: int,
    temperature: float,
    top_k: int | None,
    top_p: float | None,
    stop: Collection[int],
    generator: torch.Generator | None,
) -> Iterator[Tensor]:
    memories = decoder.memories(len(tokens), tokens.shape[1] + max_tokens)
    dtype = memories[0].keys.dtype
    ends = torch.tensor(sorted(stop), dtype=tokens.dtype, device=tokens.device)
    stopped = torch.zeros(len(tokens), dtype=torch.bool, device=tokens.device)
    last = tokens[:, -1]
    for _ in range(max_tokens):
        inputs = head.embed(tokens).to(dtype) if decoder.config.tied else tokens
        log_probs = head.log_probs(decoder(inputs, memories=memories)[:, -1])
        drawn = draw(log_probs, temperature, top_k, top_p, generator)
        last = torch.where(stopped, last, drawn)
        yield last
        stopped |= torch.isin(last, ends)
        if stopped.all():
            return
        tokens = last[:, None]


def draw(
    log_probs: Tensor,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """(B, V) log-probabilities -> (B,) tokens: see `generate`."""
    if temperature == 0:
        return log_probs.argmax(-1)
    scores, order = (log_probs.float() / temperature).sort(stable=True, descending=True)
    if top_k is not None:
        scores[:, top_k:] = -torch.inf
    probs = scores.softmax(-1)
    if top_p is not None:
        probs[probs.cumsum(-1) - probs >= top_p] = 0  # those before it reach top_p; the first always stays
    chosen = torch.multinomial(probs, 1, generator=generator)
    return order.gather(-1, chosen)[:, 0]


def texts(ids: Iterable[int], decode: Callable[[list[int]], str], before: Collection[int] = ()) -> Iterator[str]:
    """The text that each token adds to what it had with those `before` it. Bytes of an unfinished character wait until
    it is whole; those that are none come as U+FFFD.

    Args:
        decode: text of a list of tokens, U+FFFD for each byte that is no UTF-8.
    """
    read = list(before)
    written = len(decode(read))
    for index in ids:
        read.append(index)
        text = decode(read)
        unsure = min(3, len(text) - len(text.rstrip("\ufffd")))  # a character has four bytes at most
        yield text[written : len(text) - unsure]
        written = max(written, len(text) - unsure)
    yield decode(read)[written:]


def _check(
    decoder: Decoder, prompt: int, max_tokens: int, temperature: float, top_k: int | None, top_p: float | None
) -> None:
    most = decoder.config.seq_len - prompt + 1  # the last one drawn is not read any more
    if not decoder.config.causal:
        raise ValueError("this decoder is a masked one, which sees what comes after: it has no next token")
    if prompt < 1:
        raise ValueError("no token is given to go on from: begin with the end of text")
    if not 0 <= max_tokens <= most:
        raise ValueError(
            f"{max_tokens} tokens asked for after {prompt}: the decoder has {decoder.config.seq_len} positions; "
            f"ask for {max(0, most)} at most, or give fewer"
        )
    if not temperature >= 0:
        raise ValueError(f"temperature={temperature}: expected a number from 0 on")
    if top_k is not None and top_k < 1:
        raise ValueError(f"top_k={top_k}: expected 1 or more")
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(f"top_p={top_p}: expected a probability above 0, up to 1")
