"""Measures of geometry on cases with known answers."""

from __future__ import annotations

import math
import re
from itertools import permutations
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from model.distances import DISTANCES
from model.head import HarmonicHead
from model.reference import distances_reference
from pretrain.analysis import geometry, papers, start

PAGE = Path("docs/interpretability.md")


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def rotation(dim: int, seed: int = 0) -> Tensor:
    return torch.linalg.qr(drawn(dim, dim, seed=seed)).Q


def with_variances(variances: list[float], rows: int, dim: int) -> Tensor:
    """(rows, dim), with exactly these variances along rotated axes and a mean far from zero."""
    white = torch.linalg.qr(drawn(rows, len(variances)) - drawn(rows, len(variances)).mean(0)).Q * rows**0.5
    return white * torch.tensor(variances, dtype=torch.float64).sqrt() @ rotation(dim)[: len(variances)] + 3.0


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(geometry, "CHUNK", 7)  # so that sizes do not divide
    monkeypatch.setattr(geometry, "PAIRS", 13)


# ---- spectra


def test_variances_are_found() -> None:
    found = geometry.spectrum(with_variances([8, 4, 2, 1, 1], rows=50, dim=9))
    assert found.variances.tolist() == pytest.approx([8, 4, 2, 1, 1, 0, 0, 0, 0])
    assert found.explained(2) == pytest.approx(12 / 16) and found.explained(5) == pytest.approx(1)
    assert [found.dimensions(share) for share in (0.5, 0.75, 0.76, 0.9, 0.95, 1.0)] == [1, 2, 3, 4, 5, 5]
    assert found.participation_ratio == pytest.approx(16**2 / (64 + 16 + 4 + 1 + 1))


def test_equal_variances_count_as_so_many_dimensions() -> None:
    found = geometry.spectrum(with_variances([2.0] * 10, rows=40, dim=16))
    assert found.dimensions(0.9) == 9 and found.dimensions(0.95) == 10
    assert found.participation_ratio == pytest.approx(10)


def test_no_variance_is_no_figure() -> None:
    found = geometry.spectrum(torch.ones(5, 3))
    assert found.dimensions(0.9) == 0 and math.isnan(found.explained(2)) and math.isnan(found.participation_ratio)
    assert math.isnan(geometry.effective_rank(torch.zeros(5, 3)))


def test_effective_rank_is_the_exponential_of_the_spectrums_entropy() -> None:
    assert geometry.effective_rank(torch.eye(6)) == pytest.approx(6)
    assert geometry.effective_rank(torch.outer(drawn(9), drawn(4))) == pytest.approx(1)
    p = torch.tensor([0.7, 0.2, 0.1], dtype=torch.float64)
    matrix = rotation(12)[:, :3] * p * 5 @ rotation(8, seed=1)[:3]
    assert geometry.effective_rank(matrix) == pytest.approx(math.exp(-(p * p.log()).sum()))
    shifted = drawn(30, 5) + 100
    s = torch.linalg.svdvals(shifted)
    entropy = -(s / s.sum() * (s / s.sum()).log()).sum().item()
    assert geometry.effective_rank(shifted) == pytest.approx(math.exp(entropy)), "of the matrix as it is"


@settings(max_examples=20, deadline=None)
@given(st.integers(2, 40), st.integers(1, 12), st.floats(1e-3, 1e3), st.integers(0, 1000))
def test_spectra_have_no_units(rows: int, dim: int, factor: float, seed: int) -> None:
    points = drawn(rows, dim, seed=seed)
    moved = factor * points @ rotation(dim, seed=seed + 1) + 5 * factor
    one, other = geometry.spectrum(points), geometry.spectrum(moved)
    assert other.participation_ratio == pytest.approx(one.participation_ratio, rel=1e-6)
    assert 1 - 1e-9 <= one.participation_ratio <= min(dim, rows - 1) + 1e-9
    rank = geometry.effective_rank(points)
    assert geometry.effective_rank(factor * points) == pytest.approx(rank, rel=1e-6)
    assert 1 - 1e-9 <= rank <= min(dim, rows) + 1e-9


def test_norms_are_told_by_quantiles() -> None:
    found = geometry.norms(torch.diag(torch.arange(1.0, 22.0)))
    expected = {"min": 1, "5%": 2, "25%": 6, "median": 11, "75%": 16, "95%": 20, "max": 21, "max/median": 21 / 11}
    assert found == pytest.approx(expected)
    assert math.isnan(geometry.norms(torch.zeros(3, 2))["max/median"])


@pytest.mark.parametrize("bad", [torch.zeros(3), torch.zeros(0, 2), torch.tensor([[1.0, math.nan]])], ids=str)
def test_what_is_no_matrix_is_refused(bad: Tensor) -> None:
    for measure in (geometry.spectrum, geometry.effective_rank, geometry.norms, geometry.equiangular):
        with pytest.raises(ValueError, match="a matrix of shape"):
            measure(bad)


# ---- neighbours


@pytest.mark.parametrize("name", DISTANCES)
def test_nearest_is_by_the_heads_own_distance(name: str) -> None:
    head = HarmonicHead(23, 4, distance=name, seed=3).eval()
    if name == "mahalanobis":
        head.factor.data = torch.tensor([4.0, 0.0, -4.0, 0.0])
    found = geometry.nearest(head.prototypes, [5, 0], 3, head.score_function)
    for place, row in enumerate((5, 0)):
        d = distances_reference(head.prototypes[row : row + 1], head.prototypes, head.score_function)[0].tolist()
        order = sorted(
            (j for j in range(23) if j != row), key=lambda j: d[j], reverse=name in ("dot", "cosine_softmax")
        )[:3]
        assert found.indices[place].tolist() == order
        assert found.distances[place].tolist() == pytest.approx([d[j] for j in order])


def test_nearest_of_all_and_of_none() -> None:
    assert geometry.nearest(drawn(3, 2), [1], 10).indices.shape == (1, 2), "there are no more"
    assert geometry.nearest(drawn(3, 2), [], 2).indices.shape == (0, 2)


# ---- classes


def simplex(classes: int, dim: int) -> Tensor:
    return (torch.eye(classes, dtype=torch.float64) - 1 / classes) @ rotation(dim)[:classes] + 2.0


def test_class_sums_are_those_of_loops() -> None:
    rows, labels = drawn(60, 3), torch.randint(0, 9, (60,), generator=torch.Generator().manual_seed(1)) * 10
    found = geometry.classes_of(rows, labels, least=6)
    groups = {c: rows[labels == c] for c in labels.unique().tolist() if (labels == c).sum() >= 6}
    assert found.labels.tolist() == sorted(groups) and 2 <= len(groups) < 9, "some are left out, some are not"
    assert found.counts.tolist() == [len(part) for part in groups.values()]
    means = torch.stack([part.mean(0) for part in groups.values()])
    assert torch.allclose(found.means, means)
    spreads = [part.var(0).sum().sqrt().item() for part in groups.values()]
    assert found.spreads.tolist() == pytest.approx(spreads)
    within = sum(part.T.cov(correction=0) for part in groups.values()) / len(groups)
    between = means.T.cov(correction=0)
    assert torch.allclose(found.within, within) and torch.allclose(found.between, between)
    assert found.scatter == pytest.approx((within.trace() / between.trace()).item())
    assert found.nc1 == pytest.approx((torch.linalg.inv(between) @ within).trace().item() / len(groups))
    with pytest.raises(ValueError, match="at least 2 classes"):
        geometry.classes_of(rows, labels, least=60)
    with pytest.raises(ValueError, match="one for each"):
        geometry.classes_of(rows, labels[1:])


def test_collapsed_classes_read_zero() -> None:
    means = simplex(5, 8)
    labels = torch.arange(5).repeat(4)
    found = geometry.classes_of(means[labels], labels)
    assert found.scatter == pytest.approx(0, abs=1e-20) and found.nc1 == pytest.approx(0, abs=1e-12)
    assert geometry.equinorm(found.means) == pytest.approx(0, abs=1e-12)
    assert geometry.equiangular(found.means) == pytest.approx((0, 0), abs=1e-7)
    assert geometry.self_duality(7 * means - 4, found) == pytest.approx(0, abs=1e-12), "but for factor and place"
    assert geometry.self_duality(-means, found) == pytest.approx(4)


def test_nc1_of_isotropic_noise() -> None:
    """Means +-a on every axis, C = 2 D: S_B = a^2 / D I, S_W = b^2 I, tr(S_W S_B^+) / C = D b^2 / 2 a^2."""
    dim, a, b = 3, 2.0, 0.5
    means = a * torch.cat((torch.eye(dim), -torch.eye(dim)))
    noise = b * dim**0.5 * torch.cat((torch.eye(dim), -torch.eye(dim)))
    rows = (means[:, None] + noise[None]).reshape(-1, dim)
    found = geometry.classes_of(rows, torch.arange(2 * dim).repeat_interleave(2 * dim))
    assert found.nc1 == pytest.approx(dim * b**2 / (2 * a**2))
    assert found.scatter == pytest.approx(b**2 * dim / a**2)


def test_equal_lengths_and_angles_are_two_things() -> None:
    square = torch.tensor([[1.0, 0], [0, 1], [-1, 0], [0, -1]])
    assert geometry.equinorm(square) == pytest.approx(0)
    cosines = torch.tensor([0.0] * 8 + [-1.0] * 4)
    gap = (cosines + 1 / 3).abs().mean().item()
    assert geometry.equiangular(square) == pytest.approx((cosines.std(correction=0).item(), gap))
    longer = torch.tensor([[2.0, 0], [0, 1], [-2, 0], [0, -1]])
    assert geometry.equinorm(longer) == pytest.approx(1 / 3)
    assert geometry.equiangular(longer) == pytest.approx(geometry.equiangular(square))


def test_unrelated_prototypes_are_at_two() -> None:
    rows = drawn(400, 50)
    found = geometry.classes_of(rows, torch.arange(200).repeat(2))
    assert geometry.self_duality(drawn(200, 50, seed=9), found) == pytest.approx(2, abs=0.1)
    with pytest.raises(ValueError, match="one for each class"):
        geometry.self_duality(drawn(199, 50), found)


def test_a_true_centre_reads_one_over_root_n() -> None:
    centres, n = 10 * drawn(40, 16), 25
    labels = torch.arange(40).repeat(n)
    found = geometry.classes_of(centres[labels] + drawn(40 * n, 16, seed=5), labels)
    assert geometry.centre_distances(found.means, found).abs().max() < 1e-12
    read = geometry.centre_distances(centres, found)
    assert read.square().mean().sqrt().item() == pytest.approx(n**-0.5, rel=0.15)
    one_row = centres + drawn(40, 16, seed=6)
    assert geometry.centre_distances(one_row, found).median().item() == pytest.approx(1, rel=0.15)


# ---- relations


def test_parallelograms_read_zero_and_independent_rows_one() -> None:
    firsts = drawn(12, 6)
    rows = torch.cat((firsts, firsts + drawn(6, seed=1)))
    pairs = torch.stack((torch.arange(12), torch.arange(12, 24)), 1)
    found = geometry.parallelogram_loss(rows, pairs)
    assert found.loss == pytest.approx(0, abs=1e-12) and found.shuffled > 0.2
    independent = geometry.parallelogram_loss(drawn(2000, 30), torch.arange(2000).view(-1, 2))
    assert independent == pytest.approx((1, 1, 1), abs=0.05)
    with pytest.raises(ValueError, match="P at least 2"):
        geometry.parallelogram_loss(rows, pairs[:1])


def test_parallelogram_loss_is_the_mean_over_pairs_of_pairs() -> None:
    rows, pairs = drawn(40, 5) + 3, torch.tensor([[3, 9], [30, 1], [12, 13], [0, 39]])
    off = rows[pairs[:, 1]] - rows[pairs[:, 0]]
    squares = [(off[i] - off[j]).square().sum().item() for i in range(4) for j in range(i)]
    unit = (rows - rows.mean(0)).square().sum(1).mean().item()
    found = geometry.parallelogram_loss(rows, pairs)
    assert found.loss == pytest.approx(sum(squares) / 6 / (4 * unit))
    assert geometry.parallelogram_loss(50 * rows - 7, pairs) == pytest.approx(found)


def test_baselines_are_means_over_pairings() -> None:
    rows, words = drawn(20, 3), (2, 5, 7, 11, 13, 17)
    pairs = torch.tensor(words).view(3, 2)
    found = geometry.parallelogram_loss(rows, pairs)

    def mean_loss(pairings: list[Tensor]) -> float:
        return sum(geometry.parallelogram_loss(rows, one).loss for one in pairings) / len(pairings)

    assert found.random == pytest.approx(mean_loss([torch.tensor(one).view(3, 2) for one in permutations(words)]))
    sides = [torch.stack((pairs[:, 0], torch.tensor(ends)), 1) for ends in permutations(pairs[:, 1].tolist())]
    assert found.shuffled == pytest.approx(mean_loss(sides))


def test_linear_cka_is_that_of_kernels_and_has_no_units() -> None:
    x, y = drawn(30, 5) + 2, drawn(30, 8, seed=1)
    assert geometry.linear_cka(x, 0.1 * x @ rotation(5) - 40) == pytest.approx(1)
    assert geometry.linear_cka(x, y) == pytest.approx(geometry.linear_cka(y, x))
    a, b = (rows - rows.mean(0) for rows in (x, y))
    k, gram = a @ a.T, b @ b.T
    assert geometry.linear_cka(x, y) == pytest.approx(((k * gram).sum() / k.norm() / gram.norm()).item()), "kernels"
    apart = torch.linalg.qr(torch.cat((torch.ones(30, 1), drawn(30, 6)), 1)).Q[:, 1:]
    assert geometry.linear_cka(apart[:, :3], apart[:, 3:]) == pytest.approx(0, abs=1e-20)
    with pytest.raises(ValueError, match="the same things"):
        geometry.linear_cka(x, y[1:])


# ---- crystals


@settings(max_examples=20, deadline=None)
@given(st.integers(3, 40), st.integers(1, 39), st.integers(0, 100))
def test_a_circle_in_cyclic_order_scores_one(p: int, k: int, seed: int) -> None:
    k = k % p or 1
    angle = 2 * math.pi * k * torch.arange(p, dtype=torch.float64) / p
    circle = torch.stack((angle.cos(), angle.sin()), 1) @ rotation(6, seed)[:2] * 3 + 1
    found = geometry.circle_score(circle + 0.1 * drawn(p, 1, seed=seed) @ rotation(6, seed)[2:3])
    if math.gcd(k, p) == 1:
        assert found.score > 0.95 and found.frequency == min(k, p - k)
        assert geometry.circle_score(circle) == pytest.approx((1.0, min(k, p - k)))
    else:
        assert geometry.circle_score(circle).score < 1e-9, "points coincide"


def test_other_shapes_are_no_circles() -> None:
    p = 31
    angle = 2 * math.pi * torch.arange(p, dtype=torch.float64) / p
    circle = torch.stack((angle.cos(), angle.sin()), 1)
    assert geometry.circle_score(circle * torch.tensor([2.0, 1.0])).score == pytest.approx(0.9), "9 to 1 by frequency"
    assert geometry.circle_score(circle * torch.tensor([1.0, 0.0])).score == pytest.approx(0.5), "a line"
    shuffled = circle[torch.randperm(p, generator=torch.Generator().manual_seed(1))]
    assert geometry.circle_score(shuffled).score < 0.4, "out of order"
    assert geometry.circle_score(drawn(p, 10)).score < 0.4
    assert math.isnan(geometry.circle_score(torch.ones(5, 3)).score)


def test_a_slanted_lattice_scores_one() -> None:
    grid = torch.cartesian_prod(torch.arange(5), torch.arange(4))
    slanted = grid.double() @ torch.tensor([[1.0, 0.3], [0.5, 0.2]], dtype=torch.float64)
    embedded = slanted @ rotation(7)[:2] + 9
    assert geometry.lattice_score(embedded, grid) == pytest.approx(1)
    assert geometry.lattice_score(embedded[torch.randperm(20)], grid) < 0.7
    assert geometry.lattice_score(embedded @ torch.outer(drawn(7), drawn(7)), grid) == pytest.approx(0.5), "one line"
    assert math.isnan(geometry.lattice_score(torch.ones(20, 3), grid))
    with pytest.raises(ValueError, match="span a plane"):
        geometry.lattice_score(embedded, grid[:, :1].expand(-1, 2))


def test_groups_score_the_share_of_variance_between_them() -> None:
    groups = torch.arange(40) % 5
    means = drawn(5, 7)
    assert geometry.group_score(means[groups] + 3, groups) == pytest.approx(1)
    within = drawn(40, 7)
    within -= torch.stack([within[groups == g].mean(0) for g in range(5)])[groups]
    assert geometry.group_score(within, groups) == pytest.approx(0, abs=1e-6)
    between, noise = (x.square().sum().item() for x in (means[groups] - means.mean(0), within))
    assert geometry.group_score(means[groups] + within, groups) == pytest.approx(between / (between + noise), rel=1e-5)
    unrelated = [geometry.group_score(torch.randn(40, 7), groups) for _ in range(300)]
    assert sum(unrelated) / 300 == pytest.approx(4 / 39, abs=0.01)
    assert math.isnan(geometry.group_score(torch.ones(40, 3), groups))
    with pytest.raises(ValueError, match=r"groups of shape \(39,\): expected \(40,\)"):
        geometry.group_score(within, groups[:39])


def test_rows_without_gradient_on_any_dtype() -> None:
    rows = drawn(12, 4).to(torch.bfloat16).requires_grad_()
    labels = torch.arange(3).repeat(4)
    classes = geometry.classes_of(rows, labels)
    own = rows[:3]
    tensors = [geometry.spectrum(rows).variances, classes.within, geometry.centre_distances(own, classes)]
    assert not any(tensor.requires_grad for tensor in tensors)
    assert math.isfinite(geometry.circle_score(rows).score) and math.isfinite(geometry.self_duality(own, classes))


# ---- the page


@pytest.mark.slow
def test_the_pages_python_runs() -> None:
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    assert blocks
    for block in blocks:
        exec(compile(block, str(PAGE), "exec"), {})


def test_the_page_names_every_measure() -> None:
    text = PAGE.read_text()
    rooms = (geometry, papers, start)
    named = [(room, name, one) for room in rooms for name, one in vars(room).items()]
    public = [name for room, name, one in named if getattr(one, "__module__", "") == room.__name__]
    functions = [name for name in public if not name.startswith("_") and name[0].islower()]
    assert len(functions) >= 20 and all(f"`{name}" in text for name in functions)
