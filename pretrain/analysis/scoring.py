"""Held-out figures: the true negative log-likelihood of a split, without smoothing or clamp, kept by document, so that
standard errors, sources and comparisons need no second pass.

Documents are the units of resampling: tokens of one document are not independent of each other.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from data.loader import IGNORED, EvaluationWindows
from data.masking import mask_id
from data.shards import Split
from model.config import DecoderConfig
from pretrain.runtime.ranks import Ranks

UNIGRAM_TOKENS = 50_000_000  # enough training tokens for the frequencies of a vocabulary
RESAMPLES = 1000
SEED = 20_250_203  # of the resampling: the same documents give the same errors
INTERVAL = 0.95
MASKINGS = 7  # passes that score a masked model: each hides every seventh token, about as many as training does

Score = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]  # see pretrain.modules.score_positions


def scoring(score: Score, model: DecoderConfig, folder: Path) -> Score:
    """What evaluation scores with. Of a masked model: each token once, from all but every MASKINGS-th token of its
    window, itself among these. That is a pseudo-likelihood, which does not compare with a causal model's likelihood.

    Args:
        folder: prepared data, whose tokenizer has the mask.
    """
    if model.causal:
        return score
    mask = mask_id(folder)

    def pseudo(inputs: Tensor, at: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        nats = predicted = torch.zeros(())
        for masked, hidden in maskings(inputs, targets, mask):
            found, likeliest = score(masked, at, targets.where(hidden, IGNORED))
            nats, predicted = nats + found, torch.where(hidden.reshape(-1), likeliest, predicted)
        return nats, predicted

    return pseudo


def maskings(inputs: Tensor, targets: Tensor, mask: int) -> Iterator[tuple[Tensor, Tensor]]:
    """A masked model's passes over whole windows, (B, T) inputs and targets as of a causal one: the window's tokens
    with some behind the mask, and which, bool (B, T). Each is behind it once.
    """
    assert targets.shape == inputs.shape, "a masked model scores whole windows"
    tokens = torch.where(targets == IGNORED, inputs, targets)
    turn = torch.arange(tokens.shape[1], device=tokens.device) % MASKINGS
    for k in range(MASKINGS):
        hidden = (turn == k).expand_as(tokens)
        yield tokens.where(~hidden, mask), hidden


def figure(model: DecoderConfig) -> str:
    """What the exponential of a scored loss is called."""
    return "perplexity" if model.causal else "pseudo-perplexity"


@dataclass(frozen=True, eq=False)
class Evaluation:
    """What a split came to, by document, (documents,) each. `text_bytes` are those of its UTF-8 text (-1: not known),
    the end mark not counted; an end mark is a token, scored like any other.
    """

    nats: np.ndarray
    hits: np.ndarray  # tokens that were the most probable one
    tokens: np.ndarray
    text_bytes: np.ndarray

    @property
    def loss(self) -> float:
        """Nats per token."""
        return float(np.divide(self.nats.sum(), self.tokens.sum()))

    @property
    def perplexity(self) -> float:
        """The exponential of the loss; infinite where that is no float."""
        try:
            return math.exp(self.loss)
        except OverflowError:  # e**710 is no float
            return math.inf

    @property
    def bits_per_byte(self) -> float | None:
        """None where the bytes of a document are not known."""
        return float(self.nats.sum() / math.log(2) / self.text_bytes.sum()) if self._bytes_known else None

    @property
    def _bytes_known(self) -> bool:
        return bool((self.text_bytes >= 0).all())

    @property
    def accuracy(self) -> float:
        """Share of the tokens that were the most probable one."""
        return float(np.divide(self.hits.sum(), self.tokens.sum()))

    def of(self, chosen: np.ndarray) -> Evaluation:
        """Of some of the documents: a bool (documents,)."""
        return Evaluation(self.nats[chosen], self.hits[chosen], self.tokens[chosen], self.text_bytes[chosen])

    def as_dict(self) -> dict[str, float | int | None]:
        """The figures and counts of the whole, under the names that records have; None for what is not known."""
        return {
            "loss": self.loss,
            "perplexity": self.perplexity,
            "bits_per_byte": self.bits_per_byte,
            "accuracy": self.accuracy,
            "tokens": int(self.tokens.sum()),
            "text_bytes": int(self.text_bytes.sum()) if self._bytes_known else None,
            "documents": len(self.nats),
        }

    def standard_errors(self) -> dict[str, float | None]:
        """Of loss and bits per byte, by bootstrap over the documents; None where there are fewer than two."""
        if len(self.nats) < 2:
            return {"loss_se": None, "bits_per_byte_se": None}
        nats, tokens, text_bytes = resampled(self.nats, self.tokens, self.text_bytes)
        return {
            "loss_se": float(np.std(nats / tokens, ddof=1)),
            "bits_per_byte_se": float(np.std(nats / math.log(2) / text_bytes, ddof=1)) if self._bytes_known else None,
        }


def evaluate(score: Score, windows: EvaluationWindows, micro_batch: int, ranks: Ranks) -> Evaluation:
    """Scores every token of a split once, `micro_batch` windows at a time on every rank. Collective; every rank gets
    the whole result.
    """
    split = windows.split
    starts = split.document_starts()
    sums = np.zeros((3, len(starts)))  # nats, hits and tokens of each document
    # as many passes on every rank, the last ones past the end: scoring is collective
    for first in range(ranks.rank * micro_batch, windows.count + ranks.rank * micro_batch, micro_batch * ranks.world):
        inputs, at, targets = windows.batch(first, micro_batch)
        on_device = (torch.from_numpy(part).to(ranks.device) for part in (inputs, at, targets))
        nats, predicted = (found.cpu().numpy() for found in score(*on_device))
        real = targets.ravel() >= 0
        places = first * windows.stride + np.flatnonzero(real)
        document = np.searchsorted(starts, places, side="right") - 1
        if len(document):
            low, high = document[0], document[-1] + 1
            for total, values in zip(sums, (nats, predicted == targets.ravel(), np.ones(len(real))), strict=True):
                total[low:high] += np.bincount(document - low, weights=values[real], minlength=high - low)
    nats, hits, tokens = ranks.sum(torch.from_numpy(sums)).numpy()
    lengths = np.diff(starts, append=split.tokens)
    assert np.array_equal(tokens, lengths), "every token is scored once"
    return Evaluation(nats, hits, lengths, split.document_bytes())


def resampled(*values: np.ndarray) -> np.ndarray:
    """Sums of values (documents,) over as many documents drawn with replacement, (values, RESAMPLES)."""
    draw = np.random.default_rng(SEED)
    table = np.stack(values).astype(np.float64)
    count = table.shape[1]
    drawn = (np.bincount(draw.integers(count, size=count), minlength=count) for _ in range(RESAMPLES))
    return np.stack([table @ times for times in drawn], axis=1)


@dataclass(frozen=True)
class Difference:
    """Bits per byte of one evaluation less those of another; the error and the bounds are None for one document."""

    bits_per_byte_difference: float
    standard_error: float | None = None
    low: float | None = None  # of the interval
    high: float | None = None


def compare(a: Evaluation, b: Evaluation) -> Difference:
    """Of `a` less `b`, which scored the same documents: with a percentile interval by paired bootstrap over them."""
    nats = a.nats - b.nats
    difference = float(nats.sum() / math.log(2) / a.text_bytes.sum())
    if len(nats) < 2:
        return Difference(difference)
    drawn, text_bytes = resampled(nats, a.text_bytes)
    drawn = drawn / math.log(2) / text_bytes
    low, high = np.quantile(drawn, [(1 - INTERVAL) / 2, (1 + INTERVAL) / 2]).tolist()
    return Difference(difference, float(np.std(drawn, ddof=1)), low, high)


def token_counts(split: Split) -> np.ndarray:
    """(V,) how often each token is among the first UNIGRAM_TOKENS of a split."""
    return np.bincount(split.read(0, min(split.tokens, UNIGRAM_TOKENS)), minlength=split.vocab_size)


def unigram_bits_per_byte(train: Split, held_out: Split) -> float | None:
    """Bits per byte of the model that knows token frequencies (add one) and nothing else: what any model must beat.
    None where the bytes of the text are not known.
    """
    if held_out.text_bytes is None:
        return None
    seen = token_counts(train) + 1.0
    nats = -np.log(seen / seen.sum())
    counts = token_counts(held_out)
    share = counts.sum() / held_out.tokens
    return float(counts @ nats) / math.log(2) / (held_out.text_bytes * share)
