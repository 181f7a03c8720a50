"""What is learnt and what is the start's noise: on matrices with known shares."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from scipy.stats import pearsonr

from model.head import HarmonicHead
from pretrain.analysis import geometry, lengths
from pretrain.analysis.start import NOISE_SEED, count_correlation, noise_rows, start_of, still_noise
from pretrain.config import dump
from pretrain.modules import build_modules, initial_prototypes
from pretrain.records import Lengths
from pretrain.run_folder import RunFolder
from pretrain.runtime.ranks import alone
from tests.pretrain.analysis.test_geometry import drawn, small_chunks  # noqa: F401
from tests.support.tiny import V, tiny_config


@pytest.mark.parametrize("distance", ["dot", "euclidean", "cosine", "manhattan"])
@pytest.mark.parametrize("tied", [False, True])
def test_a_start_drawn_again_is_that_of_a_fresh_run(distance: str, tied: bool) -> None:
    cfg = tiny_config(head__distance=distance, model__tied=tied, train__seed=3)
    _, head = build_modules(cfg, alone())
    assert torch.equal(initial_prototypes(cfg), head.prototypes)
    again = HarmonicHead(V, cfg.model.dim, seed=4, **cfg.head.arguments())
    assert torch.equal(initial_prototypes(cfg), again.prototypes), "the seed is train.seed + 1"


@pytest.mark.parametrize(("median", "p95", "known"), [(1, 1, True), (1 + 2e-5, 1, False), (1, 1 - 2e-5, False)])
def test_a_start_of_about_the_same_lengths_is_not_taken(tmp_path: Path, median: float, p95: float, known: bool) -> None:
    """Medians of other draws lie as close as 1e-4 where there are many rows; those of the same agree to rounding."""
    cfg = tiny_config(run=str(tmp_path))
    found = lengths.quantiles(initial_prototypes(cfg).norm(dim=1))
    (tmp_path / "config.yaml").write_text(dump(cfg))
    told = {"prototypes_median": found["median"] * median, "prototypes_p95": found["p95"] * p95}
    (tmp_path / "metrics.jsonl").write_text(Lengths(step=0, **told).line() + "\n")
    start = start_of(RunFolder(tmp_path), cfg)
    assert (start.prototypes is not None) == known and (known or "at its start" in str(start.unknown))


def test_the_share_of_the_start_is_found() -> None:
    start, moved = drawn(300, 20), drawn(300, 20, seed=1)
    start, moved = start - start.mean(0), moved - moved.mean(0)
    moved -= start * (moved * start).sum() / start.square().sum()  # nothing of it along the start
    moved *= start.norm() / moved.norm()
    now = 0.8 * start + 0.6 * moved + drawn(1, 20, seed=2)  # and a mean that all have in common
    found = still_noise(now, start + 4.0)
    assert (found.cosine, found.share, found.kept) == pytest.approx((0.8, 0.64, 0.8))
    assert found.median_row_cosine == pytest.approx(0.8, abs=0.05)
    assert still_noise(3 * start, start)[:3] == pytest.approx((1.0, 1.0, 3.0))
    assert abs(still_noise(moved, start).share) < 1e-12
    unrelated = still_noise(drawn(300, 20, seed=5), start)
    assert abs(unrelated.cosine) < 4 / math.sqrt(300 * 20)
    with pytest.raises(ValueError, match=r"a start of shape \(4, 2\): expected \(300, 20\)"):
        still_noise(start, torch.zeros(4, 2))


def test_a_first_component_of_counts_is_found_and_noise_is_not() -> None:
    counts = torch.randint(1, 1000, (400,), generator=torch.Generator().manual_seed(0))
    counts[:50] = 0
    along = torch.outer(-(1 + counts).double().log(), drawn(8)) + 0.1 * drawn(400, 8, seed=1)
    assert min(count_correlation(along, counts)) > 0.98, "whatever its sign"
    assert max(count_correlation(drawn(400, 8, seed=2), counts)) < 0.25
    x, y = geometry.plane(along)[50:, 0].numpy(), counts[50:].double().log().numpy()
    assert count_correlation(along, counts).of_those_that_occur == pytest.approx(abs(pearsonr(x, y).statistic))


def test_tokens_that_never_occur_can_make_the_correlation_alone() -> None:
    counts = torch.randint(100, 1000, (400,), generator=torch.Generator().manual_seed(0))
    counts[:100] = 0
    rows = drawn(400, 8)
    rows[:100, 3] += 50
    found = count_correlation(rows, counts)
    assert found.every_token > 0.95 and found.of_those_that_occur < 0.2
    assert all(math.isnan(one) for one in count_correlation(rows, torch.zeros(400))), "all alike"
    assert all(math.isnan(one) for one in count_correlation(rows[:2], torch.tensor([1, 2]))), "two tokens"


def test_noise_of_a_shape_has_the_spectrum_of_its_shape() -> None:
    """Marchenko and Pastur: squares of the eigenvalues have the mean 1 + D / N, those themselves 1."""
    count, dim = 1500, 100
    noise = noise_rows(count, dim)
    assert torch.equal(noise, noise_rows(count, dim)) and NOISE_SEED == 0
    found = geometry.spectrum(noise)
    assert found.participation_ratio == pytest.approx(dim / (1 + dim / count), rel=0.01)
    head = HarmonicHead(count, dim, seed=9)
    fresh = geometry.spectrum(head.prototypes.detach())
    assert abs(fresh.dimensions(0.9) - found.dimensions(0.9)) <= 1, "what was never trained is recognised"
    assert fresh.participation_ratio == pytest.approx(found.participation_ratio, rel=0.01)
    learnt = head.prototypes.detach() + 3 * head.init_std * torch.outer(drawn(count), drawn(dim)).float()
    assert geometry.spectrum(learnt).dimensions(0.9) < found.dimensions(0.9) / 2
