"""Loader: an order that is a pure function of (seed, sample), whole epochs, and evaluation of each token once."""

from pathlib import Path

import numpy as np
import pytest

from common.errors import ConfigError
from data.loader import EvaluationWindows, Windows
from data.shards import Split, open_split
from tests.support.shards import EOS, make_folder


def make_split(folder: Path, tokens: int, shard_tokens: int = 97) -> tuple[Split, np.ndarray]:
    """A split whose k-th token is 5 + k, but for the eos of each document; and its stream."""
    lengths = [min(12, tokens - start) - 1 for start in range(0, tokens, 12)]
    starts = np.arange(0, tokens, 12)
    documents = [5 + start + np.arange(length) for start, length in zip(starts, lengths, strict=True)]
    stream = make_folder(folder, shard_tokens, train=documents)["train"]
    return open_split(folder, "train"), stream


@pytest.fixture(scope="module")
def large(tmp_path_factory) -> tuple[Split, np.ndarray]:
    return make_split(tmp_path_factory.mktemp("loader") / "data", 5000)


def samples_of(step: int, rank: int, ranks: int, per_step: int) -> range:
    first = step * per_step
    return range(first + rank, first + per_step, ranks)


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 15, 16, 17, 63, 64, 65, 100, 255, 257, 1000])
def test_every_epoch_covers_every_window_once(tmp_path, large, count):
    windows = Windows(large[0], 4, seed=3)
    windows.count = count  # the order knows nothing else of the split
    for epoch in (0, 1, 7, 10**9):
        order = windows.order(epoch * count + np.arange(count))
        assert sorted(order.tolist()) == list(range(count))


def test_a_large_permutation_is_whole_and_mixed(large):
    windows = Windows(large[0], 4, seed=0)
    windows.count = count = 100_003
    order = windows.order(np.arange(count))
    assert (np.bincount(order, minlength=count) == 1).all()
    # Spearman's rho of a random permutation has a deviation of 1/sqrt(count - 1), here 0.003.
    assert abs(np.corrcoef(order, np.arange(count))[0, 1]) < 0.016
    assert abs(np.corrcoef(order[1:], order[:-1])[0, 1]) < 0.016
    assert (order == np.arange(count)).sum() < 12  # 1 expected
    steps = np.bincount(np.diff(order) % count, minlength=count)
    assert steps.max() < 14  # Poisson of mean 1


def test_small_permutations_are_varied(large):
    windows = Windows(large[0], 4, seed=0)
    windows.count = 5
    first = np.bincount(windows.order(5 * np.arange(2000)), minlength=5)
    assert first.min() > 300 and first.max() < 500  # 400 expected, deviation 18


def test_epochs_and_seeds_differ(large):
    orders = [
        tuple(Windows(large[0], 4, seed).order(epoch * 1249 + np.arange(1249)).tolist())
        for seed in (0, 1, 2)
        for epoch in (0, 1, 2)
    ]
    assert Windows(large[0], 4, 0).count == 1249
    assert len(set(orders)) == 9
    for a in range(9):
        for b in range(a):
            assert sum(x == y for x, y in zip(orders[a], orders[b], strict=True)) < 12


def test_the_order_stays_what_it_was(large):
    """A new release must not change the data of a run that is resumed."""
    assert Windows(large[0], 4, seed=1234).order(np.arange(8)).tolist() == [148, 677, 1068, 27, 546, 438, 1148, 454]


def test_windows_hold_their_tokens(large):
    split, stream = large
    windows = Windows(split, 16, seed=1)
    order = windows.order(np.arange(2 * windows.count))
    batch = windows.batch(0, 2 * windows.count)
    assert batch.dtype == np.int64 and batch.shape == (2 * windows.count, 17)
    for row, window in zip(batch, order, strict=True):
        np.testing.assert_array_equal(row, stream[16 * window : 16 * window + 17])


def test_an_epoch_holds_every_target_once(large):
    split, stream = large
    windows = Windows(split, 16, seed=1)
    targets = windows.batch(windows.count, windows.count)[:, 1:]
    scored = stream[1 : 1 + 16 * windows.count]
    np.testing.assert_array_equal(np.sort(targets.ravel()), np.sort(scored))
    assert len(stream) - 1 - len(scored) < 16


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_ranks_deal_the_same_samples(large, ranks):
    windows = Windows(large[0], 16, seed=5)
    whole = windows.batch(0, 6 * 120)  # more than two epochs
    assert windows.count < 6 * 60
    for step in range(120):
        parts = [Windows(large[0], 16, 5).samples(np.array(samples_of(step, r, ranks, 6))) for r in range(ranks)]
        dealt = np.empty((6, 17), dtype=np.int64)
        for rank, part in enumerate(parts):
            dealt[rank::ranks] = part
        np.testing.assert_array_equal(dealt, whole[6 * step : 6 * step + 6])


def test_resuming_at_any_sample_continues_the_stream(large):
    whole = Windows(large[0], 64, seed=9).batch(0, 200)
    for first in range(200):
        np.testing.assert_array_equal(Windows(large[0], 64, 9).batch(first, 200 - first), whole[first:])
    mixed = np.random.default_rng(0).permutation(200)
    np.testing.assert_array_equal(Windows(large[0], 64, 9).samples(mixed), whole[mixed])


def test_a_split_smaller_than_a_window_is_refused(tmp_path):
    split, _ = make_split(tmp_path / "data", 24)
    assert Windows(split, 23, 0).count == 1
    with pytest.raises(ConfigError, match=r"the train split has 24 tokens, fewer than one window of 24 \+ 1"):
        Windows(split, 24, 0)


@pytest.mark.parametrize("tokens", [16, 17, 31, 32, 33, 250])
@pytest.mark.parametrize("stride", [1, 5, 15, 16])
@pytest.mark.parametrize("ranks", [1, 3])
def test_evaluation_scores_every_token_once_from_what_stands_before_it(tmp_path, tokens, stride, ranks):
    split, stream = make_split(tmp_path / "data", tokens)
    seq_len, per_call = 16, 3
    windows = EvaluationWindows(split, seq_len, stride)
    assert windows.count == -(-tokens // stride)
    before = np.concatenate([[EOS], stream])  # before[i] is read when token i is scored
    scored = []
    for first in range(0, windows.count, per_call * ranks):  # every rank makes as many calls, some past the end
        for rank in range(ranks):
            mine = first + rank * per_call
            inputs, at, targets = windows.batch(mine, per_call)
            assert inputs.shape == (per_call, seq_len) and at.shape == targets.shape == (per_call, stride)
            assert inputs.dtype == at.dtype == targets.dtype == np.int64
            place = (mine * stride + np.arange(per_call * stride)).reshape(per_call, stride)
            assert (targets[place >= tokens] == -100).all() and ((at >= 0) & (at < seq_len)).all()
            for row, offsets, wanted, places in zip(inputs, at, targets, place, strict=True):
                for offset, target, k in zip(offsets, wanted, places, strict=True):
                    if k < tokens:
                        scored.append(k)
                        assert target == stream[k]
                        np.testing.assert_array_equal(row[: offset + 1], before[k - offset : k + 1])
                        assert offset >= min(k, seq_len - stride), "context"
    assert scored == list(range(tokens))


def test_evaluation_past_the_end_reads_eos_and_scores_nothing(tmp_path):
    split, _ = make_split(tmp_path / "data", 20)
    inputs, _, targets = EvaluationWindows(split, 16).batch(7, 2)
    assert (inputs == EOS).all() and (targets == -100).all()


def test_evaluation_refuses_a_split_without_a_window_and_a_stride_that_skips_tokens(tmp_path):
    split, _ = make_split(tmp_path / "data", 24)
    with pytest.raises(ConfigError, match="the train split has 24 tokens, fewer than one window of 25"):
        EvaluationWindows(split, 25)
    for stride in (0, 17):
        with pytest.raises(ConfigError, match=f"a stride of {stride}: expected 1 to 16"):
            EvaluationWindows(split, 16, stride)
