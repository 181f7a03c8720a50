"""Windows of tokens: for training in a shuffled order, for evaluation in order, each token scored once.

The training order is a pure function of (seed, sample number): nothing is remembered, so any number of ranks, and a run
resumed at any sample, reads the same stream.
"""

import hashlib
from typing import Protocol

import numpy as np

from common.errors import ConfigError
from data.shards import Split

ROUNDS = 8  # of the permutation's Feistel network
IGNORED = -100  # the target that no loss counts

# T tokens per window, B windows asked for


class Windows:
    """The windows of a split, shuffled anew in every epoch.

    Window w is stream tokens w*T .. w*T+T, so that each token but the first (and fewer than T at the end, which no
    window reaches) is a target once per epoch. Sample s is in epoch s // count; there, a keyed permutation chooses
    its window.

    Attributes: `count`, the windows of an epoch.

    Raises:
        ConfigError: the split is smaller than one window.
    """

    def __init__(self, split: Split, seq_len: int, seed: int) -> None:
        self.split, self.seq_len, self.seed = split, seq_len, seed
        self.count = (split.tokens - 1) // seq_len
        if self.count < 1:
            raise ConfigError(
                f"the {split.name} split has {split.tokens} tokens, fewer than one window of {seq_len} + 1; "
                "give more text or a shorter sequence length"
            )

    def samples(self, numbers: np.ndarray) -> np.ndarray:
        """Tokens of the samples with these global numbers (B,), int64 (B, T+1); numbers count on across epochs."""
        windows = self.order(np.asarray(numbers, dtype=np.int64))
        out = np.empty((len(windows), self.seq_len + 1), dtype=np.int64)
        for row, window in zip(out, windows.tolist(), strict=True):
            row[:] = self.split.read(window * self.seq_len, self.seq_len + 1)
        return out

    def tokens_by_source(self, numbers: np.ndarray) -> np.ndarray:
        """Input tokens of these samples in each source of the split, int64 (sources,)."""
        sources = len(self.split.sources)
        if sources == 1:
            return np.array([len(numbers) * self.seq_len])
        starts = self.order(np.asarray(numbers, dtype=np.int64))[:, None] * self.seq_len
        by_token = self.split.token_sources(starts + np.arange(self.seq_len))
        return np.bincount(by_token.ravel(), minlength=sources)

    def batch(self, first: int, count: int) -> np.ndarray:
        """Tokens of samples first .. first+count-1, int64 (count, T+1)."""
        return self.samples(np.arange(first, first + count))

    def order(self, numbers: np.ndarray) -> np.ndarray:
        """Window of each sample number (B,), int64 (B,)."""
        assert (numbers >= 0).all(), "sample numbers count from zero"
        epochs, positions = np.divmod(numbers, self.count)
        windows = np.empty_like(positions)
        for epoch in np.unique(epochs).tolist():
            here = epochs == epoch
            windows[here] = permute(positions[here], self.count, _keys(self.seed, epoch))
        return windows


def permute(positions: np.ndarray, count: int, keys: np.ndarray) -> np.ndarray:
    """A keyed bijection of 0 .. count-1, applied to int64 positions (B,), in memory O(B).

    A Feistel network permutes the numbers below the next power of four; whatever lands at count or beyond goes through
    it again until it lands below ("cycle walking": Black and Rogaway, Ciphers with Arbitrary Finite Domains, 2002).
    Fewer than 4 passes are needed on average.
    """
    # uint64 on both sides of every operation: with int64, numpy would go on in float64
    half = np.uint64(max(1, ((count - 1).bit_length() + 1) // 2))  # bits of each side
    values = _feistel(positions.astype(np.uint64), half, keys)
    while (outside := np.flatnonzero(values >= count)).size:
        values[outside] = _feistel(values[outside], half, keys)
    return values.astype(np.int64)


def _feistel(values: np.ndarray, half: np.uint64, keys: np.ndarray) -> np.ndarray:
    mask = (np.uint64(1) << half) - np.uint64(1)
    left, right = values >> half, values & mask
    for key in keys:
        left, right = right, left ^ (_mix(right ^ key) & mask)
    return left << half | right


def _mix(x: np.ndarray) -> np.ndarray:
    """The finaliser of splitmix64 (Steele, Lea and Flood, 2014): each bit in moves half the bits out."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def _keys(seed: int, epoch: int) -> np.ndarray:
    """One uint64 for each round."""
    return np.frombuffer(hashlib.sha512(f"{seed}:{epoch}".encode()).digest(), dtype="<u8", count=ROUNDS)


class Scorable(Protocol):
    """What evaluation reads: a `data.shards.Split`, or `data.texts.Texts`."""

    name: str
    tokens: int
    documents: int
    eos_id: int
    sources: tuple[str, ...]

    def read(self, start: int, count: int) -> np.ndarray:
        """Tokens start .. start+count-1 of the stream, int64 (count,)."""

    def document_starts(self) -> np.ndarray:
        """Position in the stream at which each document starts, int64 (documents,)."""

    def document_bytes(self) -> np.ndarray:
        """Bytes of each document's UTF-8 text, int64 (documents,); -1 where they are not known."""

    def document_sources(self) -> np.ndarray:
        """Place in `sources` of each document's source, integers (documents,)."""


class EvaluationWindows:
    """Windows that score every token of a split once, in stream order.

    Window k scores tokens k*S .. k*S+S-1 (S the stride). It holds the T tokens that end there, or the first T of the
    split, so a token is scored from at least T - S tokens before it once past the start, from all of them within the
    first T. Before the first token of the split stands eos. S = T is cheapest; a smaller stride costs T / S times that.

    Attributes: `count` of windows.

    Raises:
        ConfigError: the split is smaller than one window, or the stride is not within 1 .. T.
    """

    def __init__(self, split: Scorable, seq_len: int, stride: int | None = None) -> None:
        self.split, self.seq_len, self.stride = split, seq_len, seq_len if stride is None else stride
        if not 1 <= self.stride <= seq_len:
            raise ConfigError(f"a stride of {stride}: expected 1 to {seq_len}, the sequence length")
        if split.tokens < seq_len:
            raise ConfigError(
                f"the {split.name} split has {split.tokens} tokens, fewer than one window of {seq_len}; "
                "give more text or a shorter sequence length"
            )
        self.count = -(-split.tokens // self.stride)

    def batch(self, first: int, count: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Windows first .. first+count-1; they may lie past the end, so that every rank can ask for equally many.

        Returns:
            inputs (count, T); the positions in them that are scored, (count, S); and their targets (count, S). All are
            int64; past the end of the split inputs are eos and targets -100.
        """
        scored = np.arange(first, first + count)[:, None] * self.stride + np.arange(self.stride)  # (count, S) in stream
        starts = np.maximum(scored[:, -1:] + 1 - self.seq_len, 0)  # (count, 1) of each window's first target
        before = int(starts[0, 0]) - 1  # the first input
        begin, end = max(before, 0), min(int(starts[-1, 0]) + self.seq_len, self.split.tokens)
        stream = np.full(int(starts[-1, 0]) + self.seq_len - before, self.split.eos_id, dtype=np.int64)
        if end > begin:
            stream[begin - before : end - before] = self.split.read(begin, end - begin)
        targets = np.where(scored < self.split.tokens, stream[scored - before], IGNORED)
        return stream[starts - 1 - before + np.arange(self.seq_len)], scored - starts, targets
