"""What is done to each document apart from all others, in whatever process: hash, checks and token ids."""

import hashlib
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path

import numpy as np

from data.config import DataConfig
from data.manifest import DTYPES
from data.overlap import overlap, runs_of, union
from data.sources.corpus import is_empty
from data.tokenizer import Tokenizer

FINE, EMPTY, SHORT = range(3)


def digest_of(text: str) -> int:
    """First 8 bytes of a document's SHA-256, as a number below 2**64.

    Two different documents among 8 million share it with a probability of 2 in a million.
    """
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")


@dataclass(frozen=True)
class Fractions:
    """Which shares of the documents are held out. What split a document is of depends on nothing but its text.

    val is the lower end of the range of hashes, test the upper one: neither depends on the other's share.
    """

    val: float
    test: float = 0.0

    def split_of(self, digest: int) -> str:
        """`train`, `val` or `test`, of a document by its `digest_of`."""
        place = digest / 2**64
        if place < self.val:
            return "val"
        return "test" if self.test and place >= 1 - self.test else "train"

    def held_out(self, digest: int) -> bool:
        """Whether a document is of another split than train."""
        return self.split_of(digest) != "train"


def fractions_of(cfg: DataConfig) -> Fractions:
    """The shares that the settings ask for."""
    return Fractions(cfg.val_fraction, cfg.test_fraction)


@dataclass(frozen=True)
class EncodedBatch:
    """N documents, in order."""

    verdicts: np.ndarray  # uint8 (N,): FINE, EMPTY or SHORT; what is not fine has no ids
    digests: np.ndarray  # uint64 (N,)
    text_bytes: np.ndarray  # int64 (N,)
    near: np.ndarray  # bool (N,): a near copy of a held-out document
    lengths: np.ndarray  # int64 (N,), tokens without eos
    ids: np.ndarray  # all tokens, one document after the other


@dataclass(frozen=True)
class Encoder:
    """Makes tokens of texts, in whatever process: it is sent there without what it has read."""

    model: Path
    dtype: str
    min_chars: int
    fractions: Fractions
    val_overlap: float | None
    held_out_runs: Path | None  # sorted uint64, as `HeldOutRuns` finds them

    def __getstate__(self) -> dict[str, object]:  # without the cached properties, which each process reads itself
        return {field.name: getattr(self, field.name) for field in fields(self)}

    @cached_property
    def _tokenizer(self) -> Tokenizer:
        return Tokenizer(self.model)

    @cached_property
    def _known(self) -> np.ndarray:
        assert self.held_out_runs is not None
        return np.load(self.held_out_runs, mmap_mode="r")

    def __call__(self, texts: list[str]) -> EncodedBatch:
        """Checks, hashes and encodes the texts of N documents."""
        verdicts = np.array([verdict(text, self.min_chars) for text in texts], dtype=np.uint8)
        fine = [texts[place] for place in np.flatnonzero(verdicts == FINE)]
        tokens = [self._tokenizer.encode_array(text) for text in fine]
        digests, text_bytes, lengths = (np.zeros(len(texts), dtype=kind) for kind in (np.uint64, np.int64, np.int64))
        near = np.zeros(len(texts), dtype=bool)
        for place, text, ids in zip(np.flatnonzero(verdicts == FINE), fine, tokens, strict=True):
            digests[place] = digest = digest_of(text)
            text_bytes[place] = len(text.encode())
            lengths[place] = len(ids)
            if self.val_overlap is not None and not self.fractions.held_out(digest):
                near[place] = overlap(runs_of(text), self._known) >= self.val_overlap
        ids = np.concatenate([np.empty(0, dtype=np.int32), *tokens]).astype(DTYPES[self.dtype])
        return EncodedBatch(verdicts, digests, text_bytes, near, lengths, ids)


@dataclass(frozen=True)
class HeldOutRuns:
    """Finds the runs of words in the held-out documents among texts: hashes, uint64, sorted."""

    min_chars: int
    fractions: Fractions

    def __call__(self, texts: list[str]) -> np.ndarray:
        """The distinct runs of those of the texts that are held out, uint64 (runs,)."""
        fine = (text for text in texts if verdict(text, self.min_chars) == FINE)
        return union(runs_of(text) for text in fine if self.fractions.held_out(digest_of(text)))


def verdict(text: str, min_chars: int) -> int:
    """FINE, EMPTY or SHORT: what a text alone tells of whether it is taken."""
    return EMPTY if is_empty(text) else SHORT if len(text) < min_chars else FINE
