"""Masked language modelling: which tokens of a sample are hidden, as a pure function of (seed, sample number).

The scheme is BERT's (arXiv:1810.04805, section 3.1), with as many hidden tokens in each sequence, so that the mean over
a batch is that over its parts. Legend: B sequences, T tokens.
"""

from pathlib import Path

import numpy as np

from common.errors import ConfigError
from data.loader import IGNORED
from data.manifest import TOKENIZER
from data.tokenizer import Tokenizer

HIDDEN = 0.15  # of a sequence's tokens
MASKED, RANDOM = 0.8, 0.1  # of these: become [MASK], become any token; the rest stay as they are


def mask_id(folder: Path) -> int:
    """The id of [MASK] in prepared data.

    Raises:
        ConfigError: their tokenizer has none.
    """
    mask = Tokenizer(folder / TOKENIZER).mask_id
    if mask is None:
        raise ConfigError(
            f"{folder / TOKENIZER}: this tokenizer has no <mask> symbol, which model.objective=masked needs; prepare "
            "with a tokenizer trained here, or with one that has it"
        )
    return mask


def masked(
    tokens: np.ndarray, samples: np.ndarray, seed: int, *, mask_id: int, vocab_size: int
) -> tuple[np.ndarray, np.ndarray]:
    """Hides 15% of each sequence, one token at least.

    Args:
        tokens: (B, T) int64.
        samples: (B,) numbers of the sequences, which with the seed decide everything.

    Returns:
        inputs (B, T); and targets (B, T), the hidden tokens, -100 where none is hidden.
    """
    b, t = tokens.shape
    drawn = np.stack([_draws(seed, int(sample), 3 * t) for sample in samples]).reshape(b, 3, t)
    # where the smallest draws are: each set of so many places is as likely
    places = np.argsort(drawn[:, 0], axis=1)[:, : max(1, round(HIDDEN * t))]
    hidden = np.zeros((b, t), dtype=bool)
    np.put_along_axis(hidden, places, True, axis=1)
    fate = drawn[:, 1] / 2.0**64
    inputs = np.where(hidden & (fate < MASKED), mask_id, tokens)
    other = (drawn[:, 2] % np.uint64(vocab_size)).astype(np.int64)
    inputs = np.where(hidden & (fate >= MASKED) & (fate < MASKED + RANDOM), other, inputs)
    return inputs, np.where(hidden, tokens, IGNORED)


def _draws(seed: int, sample: int, count: int) -> np.ndarray:
    """64 random bits each, (count,): raw ones, which numpy promises not to change."""
    return np.random.Philox(key=np.array([seed, sample], dtype=np.uint64)).random_raw(count)
