"""Windows of tokens: for training in a shuffled order, for evaluation in order, each token scored once.

The training order is a pure function of (seed, sample number): nothing is remembered, so any number of ranks, and a run
resumed at any sample, reads the same stream.
"""

import hashlib

import numpy as np

from data.settings import ConfigError
from data.shards import Split

ROUNDS = 8
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


def evaluation_count(split: Split, seq_len: int) -> int:
    """Windows that score every token of the split once."""
    return -(-split.tokens // seq_len)


def evaluation_windows(split: Split, seq_len: int, first: int, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Windows first .. first+count-1 for evaluation, in stream order.

    Window k scores tokens k*T .. k*T+T-1, each from the tokens before it in the window; before the first token of the
    split stands eos. Windows may lie past the end, so that every rank can ask for equally many.

    Returns:
        inputs (count, T) and targets (count, T), int64; past the end of the split inputs are eos and targets -100.
    """
    start = first * seq_len - 1  # one before the first target
    begin, end = max(start, 0), min(start + count * seq_len + 1, split.tokens)
    stream = np.full(count * seq_len + 1, split.eos_id, dtype=np.int64)
    if end > begin:
        stream[begin - start : end - start] = split.read(begin, end - begin)
    inputs, targets = stream[:-1].copy(), stream[1:].copy()
    targets[max(split.tokens - first * seq_len, 0) :] = IGNORED  # inputs are eos there, as the split's last token is
    return inputs.reshape(count, seq_len), targets.reshape(count, seq_len)
