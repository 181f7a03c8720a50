"""Masking: the rates, what stays, and that nothing but (seed, sample) decides."""

from pathlib import Path

import numpy as np
import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st

from common.errors import ConfigError
from data.loader import IGNORED
from data.masking import mask_id, masked
from data.tokenizer import MASK, train
from tests.data.test_tokenizer import TEXTS, VOCAB

V = 1000


def some(b: int, t: int, seed: int = 1, first: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    tokens = np.random.default_rng(7).integers(5, V, size=(b, t))
    inputs, targets = masked(tokens, np.arange(first, first + b), seed, mask_id=MASK, vocab_size=V)
    return tokens, inputs, targets


def test_rates_are_those_of_bert() -> None:
    tokens, inputs, targets = some(400, 512)
    hidden = targets != IGNORED
    assert (hidden.sum(1) == 77).all(), "15% of each"
    assert np.array_equal(targets[hidden], tokens[hidden]) and np.array_equal(inputs[~hidden], tokens[~hidden])
    now, before = inputs[hidden], tokens[hidden]
    count, deviation = hidden.sum(), 4 / hidden.sum() ** 0.5 / 2
    assert abs((now == MASK).sum() / count - 0.8) < deviation
    assert abs((now == before).sum() / count - 0.1 - 0.1 / V) < deviation
    other = now[(now != MASK) & (now != before)]
    assert abs(len(other) / count - 0.1) < deviation
    assert other.min() < 20 and other.max() >= V - 20 and abs(other.mean() - V / 2) < 20, "from the whole vocabulary"
    assert abs(hidden.mean(0) - 0.15).max() < 0.08, "at every place alike"


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 6), st.integers(1, 70), st.integers(0, 2**63), st.integers(0, 2**40))
def test_a_sample_is_masked_alike_in_any_batch(b: int, t: int, seed: int, first: int) -> None:
    tokens, inputs, targets = some(b, t, seed, first)
    assert inputs.dtype == targets.dtype == np.int64
    assert ((targets != IGNORED).sum(1) == max(1, round(0.15 * t))).all()
    for row in range(b):
        alone = masked(tokens[row : row + 1], np.array([first + row]), seed, mask_id=MASK, vocab_size=V)
        assert np.array_equal(alone[0][0], inputs[row]) and np.array_equal(alone[1][0], targets[row])


def test_seeds_and_samples_differ() -> None:
    targets = [some(1, 200, seed, first)[2] for seed, first in ((1, 0), (1, 1), (2, 0), (0, 1))]
    assert all(not np.array_equal(a, b) for i, a in enumerate(targets) for b in targets[:i])


def test_the_draws_never_change() -> None:
    """A resumed run must hide what the unbroken one would have hidden, with any version of numpy."""
    _, targets = masked(np.arange(20)[None], np.array([3]), 1, mask_id=MASK, vocab_size=V)
    assert np.flatnonzero(targets[0] != IGNORED).tolist() == [2, 3, 5]


def test_the_mask_is_the_tokenizers_own(tmp_path: Path) -> None:
    train(TEXTS, VOCAB, tmp_path / "tokenizer.model")
    assert mask_id(tmp_path) == MASK


def test_a_tokenizer_without_a_mask_is_refused(tmp_path: Path) -> None:
    with (tmp_path / "tokenizer.model").open("wb") as writer:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(TEXTS), model_writer=writer, vocab_size=VOCAB, byte_fallback=True, minloglevel=2
        )
    with pytest.raises(ConfigError, match="no <mask> symbol, which model.objective=masked needs"):
        mask_id(tmp_path)
