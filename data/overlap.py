"""Near copies: documents that share many runs of 13 words.

Words are runs of letters and digits, without regard to case; Han characters and kana are words each. So other line
ends, punctuation or capitals do not hide a copy. A shorter document is one run. Runs are told apart by 64-bit hashes.
"""

import hashlib
import re
from collections.abc import Iterable
from functools import lru_cache

import numpy as np

RUN_WORDS = 13
WORD = re.compile(r"[\u3040-\u30ff\u3400-\u9fff]|[^\W\u3040-\u30ff\u3400-\u9fff]+")
FACTOR = np.uint64(0x9E3779B97F4A7C15)


def runs_of(text: str) -> np.ndarray:
    """Hashes of the distinct runs of words in a text, uint64 (runs,), sorted."""
    words = WORD.findall(text.casefold())
    length = min(RUN_WORDS, len(words))
    if not words:
        return np.empty(0, dtype=np.uint64)
    codes = np.fromiter(map(_code, words), dtype=np.uint64, count=len(words))
    hashes = np.zeros(len(words) - length + 1, dtype=np.uint64)  # polynomials in FACTOR of the codes, modulo 2**64
    for offset in range(length):
        hashes = hashes * FACTOR + codes[offset : offset + len(hashes)]
    return np.unique(hashes)


@lru_cache(maxsize=1 << 18)
def _code(word: str) -> int:
    return int.from_bytes(hashlib.blake2b(word.encode(), digest_size=8).digest(), "little")


def union(parts: Iterable[np.ndarray]) -> np.ndarray:
    """All the hashes of several sorted arrays, uint64 (any number,) each, sorted, each once."""
    sets = [np.empty(0, dtype=np.uint64)]
    for part in parts:
        sets.append(part)
        while len(sets) > 1 and len(sets[-2]) < 2 * len(sets[-1]):  # so that memory stays near the size of the union
            sets[-2:] = [np.union1d(sets[-2], sets[-1])]
    return np.unique(np.concatenate(sets))


def overlap(runs: np.ndarray, known: np.ndarray) -> float:
    """Share of a document's runs (runs,) that are among the known ones (known,), sorted: 0 to 1."""
    if not len(runs) or not len(known):
        return 0.0
    at = np.minimum(np.searchsorted(known, runs), len(known) - 1)  # past the last known one: no match either
    return float((known[at] == runs).mean())
