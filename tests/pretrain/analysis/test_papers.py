"""The papers' own measures, against numpy and sums over every case, and on points with known answers."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from torch import Tensor

from pretrain.analysis import geometry
from pretrain.analysis.papers import KEPT, function_vectors, parallelogram_2502, spectrum_2603
from tests.pretrain.analysis.test_geometry import drawn, rotation, small_chunks  # noqa: F401


def entropy_rank(values: np.ndarray) -> float:
    shares = values[values > 0] / values.sum()
    return float(np.exp(-(shares * np.log(shares)).sum()))


def test_standardised_features_have_the_spectrum_of_their_correlations() -> None:
    width = KEPT + 10
    rows = drawn(200, width) @ (torch.eye(width, dtype=torch.float64) + rotation(width))
    rows = rows * torch.logspace(-3, 3, width, dtype=torch.float64) + 7.0
    values = np.linalg.eigvalsh(np.corrcoef(rows.numpy().T))[::-1]
    found = spectrum_2603(rows)
    assert found.effective_rank == pytest.approx(entropy_rank(values))
    assert found.effective_rank_50 == pytest.approx(entropy_rank(values[:KEPT]))
    assert found.effective_rank_50 < 0.99 * found.effective_rank
    assert found.first_2 == pytest.approx(values[:2].sum() / values.sum())
    assert found.participation_ratio == pytest.approx(values.sum() ** 2 / (values**2).sum())
    assert found.dimensions_90 == int((values.cumsum() < 0.9 * values.sum()).sum()) + 1
    assert found.effective_rank_as_is == pytest.approx(entropy_rank(np.linalg.svd(rows.numpy(), compute_uv=False)))


def test_the_papers_rank_and_ours_are_not_the_same_figure() -> None:
    rows = torch.cat((100 * drawn(400, 1), drawn(400, 9, seed=1)), 1)
    found, ours = spectrum_2603(rows), geometry.effective_rank(rows - rows.mean(0))
    assert found.effective_rank == pytest.approx(10, rel=0.02), "every column counts alike"
    assert ours < 2 and geometry.spectrum(rows).explained(1) > 0.99
    apart = spectrum_2603(rows * torch.linspace(0.1, 9, 10, dtype=torch.float64) - 3.0)
    assert apart[:5] == pytest.approx(found[:5], rel=1e-9), "units of columns do not matter, nor does the origin"


def test_columns_that_do_not_vary_are_no_features() -> None:
    rows = torch.cat((drawn(50, 3), torch.full((50, 2), 1e6, dtype=torch.float64)), 1)
    assert spectrum_2603(rows)[:5] == pytest.approx(spectrum_2603(rows[:, :3])[:5], rel=1e-9)
    with pytest.raises(ValueError, match="a matrix of shape"):
        spectrum_2603(torch.full((3, 2), torch.nan))


def parallelograms(dim: int = 16) -> tuple[Tensor, Tensor]:
    """12 rows in a plane of `dim` dimensions, of which the first six pairs have one difference."""
    first = drawn(6, 2)
    rows = torch.cat((first, first + torch.tensor([1.5, -0.7]))) @ rotation(dim)[:2] + 5.0
    return rows, torch.tensor([(k, k + 6) for k in range(6)])


def test_parallelograms_close() -> None:
    rows, pairs = parallelograms()
    found = parallelogram_2502(geometry.plane(rows), pairs)
    assert found.loss == pytest.approx(0.0, abs=1e-6) and found.shuffled > 0.3
    assert geometry.parallelogram_loss(rows, pairs).loss == pytest.approx(0.0, abs=1e-9)
    vectors = function_vectors(rows, pairs)
    assert (vectors.mean_cosine, vectors.shared) == pytest.approx((1.0, 1.0)) and vectors.shuffled < 0.9


def test_what_the_plane_leaves_out_only_the_full_space_sees() -> None:
    first = 10 * drawn(6, 2)
    flat = torch.cat((first, first + 4.0))
    others = drawn(12, 5, seed=1) * torch.tensor(0.1).sqrt()  # no parallelograms, in directions of little variance
    pairs = torch.tensor([(k, k + 6) for k in range(6)])
    points = torch.cat((flat, others), 1)
    assert parallelogram_2502(geometry.plane(points), pairs).loss < 0.02
    beyond = geometry.parallelogram_loss(others, pairs).loss
    assert beyond > 0.5
    share = geometry.covariance(others).trace() / geometry.covariance(points).trace()
    assert geometry.parallelogram_loss(points, pairs).loss == pytest.approx(beyond * share.item(), rel=1e-6)


def test_figures_are_means_over_all_cases() -> None:
    rows, pairs = drawn(40, 7), torch.tensor([(k, 39 - 2 * k) for k in range(5)])
    e = geometry.plane(rows).numpy()
    sigma = np.sqrt((e**2).sum(1).mean())
    closing = [
        np.linalg.norm(e[i] + e[n] - e[j] - e[m]) for (i, j), (m, n) in itertools.combinations(pairs.tolist(), 2)
    ]
    found = parallelogram_2502(geometry.plane(rows), pairs)
    assert found.loss == pytest.approx(np.mean(closing) / sigma)
    a, b = pairs.t().tolist()
    words = [
        (i, j, k, m) for i, j in itertools.permutations(range(5), 2) for k, m in itertools.permutations(range(5), 2)
    ]
    anyhow = [np.linalg.norm(e[b[k]] - e[a[i]] - e[b[m]] + e[a[j]]) for i, j, k, m in words]
    assert found.shuffled == pytest.approx(np.mean(anyhow) / sigma)
    assert parallelogram_2502(geometry.plane(3 * rows + 1), pairs) == pytest.approx(found, rel=1e-9)

    w = rows.numpy()

    def cosine(x: np.ndarray, y: np.ndarray) -> float:
        return float(x @ y / np.linalg.norm(x) / np.linalg.norm(y))

    d = w[b] - w[a]
    vectors = function_vectors(rows, pairs)
    both = list(itertools.combinations(range(5), 2))
    assert vectors.mean_cosine == pytest.approx(np.mean([cosine(d[i], d[j]) for i, j in both]))
    assert vectors.shared == pytest.approx(np.mean([d[i] @ d[j] for i, j in both]) / (d**2).sum(1).mean())
    assert vectors.shuffled == pytest.approx(
        np.mean([cosine(w[b[k]] - w[a[i]], w[b[m]] - w[a[j]]) for i, j, k, m in words])
    )


def test_independent_rows_share_no_vector() -> None:
    found = function_vectors(drawn(60, 512), torch.tensor([(k, k + 30) for k in range(30)]))
    assert abs(found.mean_cosine) < 0.01 and abs(found.shared) < 0.01 and abs(found.shuffled) < 0.01
    apart = drawn(60, 512)
    apart[30:] += 1.0  # every second word has something that no first one has
    shifted = function_vectors(apart, torch.tensor([(k, k + 30) for k in range(30)]))
    assert shifted.mean_cosine > 0.3 and shifted.mean_cosine == pytest.approx(shifted.shuffled, abs=0.01)
