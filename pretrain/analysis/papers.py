"""Measures as the two papers on harmonic heads define them, where they differ from those of
pretrain/analysis/geometry.py, beside which the report shows them.

- arXiv:2603.10225 (other distances than the Euclidean one), as its published code has them, repository
  maxwellmg/rethinking-harmonic-loss: `vision/utils/pca_analysis.py` for vision, which standardises features, and
  `llms/analysis/extract_checkpoint_metrics.py` for language models, which takes matrices as they are.
- arXiv:2502.01628 (harmonic loss): the parallelogram loss of its equation 3, and function vectors, the differences
  between the two words of a pair.

Matrices, chunks and errors are as in geometry.py. Legend: N rows, D width, P pairs.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from pretrain.analysis import geometry
from pretrain.analysis.geometry import Spectrum

KEPT = 50  # components that the published code of arXiv:2603.10225 looks at


class Spectrum2603(NamedTuple):
    """Figures of arXiv:2603.10225."""

    dimensions_90: int  # the fewest components of standardised features with 90% of the variance
    first_2: float  # share of it in the first two
    effective_rank: float  # exp(-sum p ln p), p the eigenvalues of the correlation matrix over their sum
    effective_rank_50: float  # the same of the KEPT largest, over their own sum, as the published code has it
    participation_ratio: float  # of these eigenvalues
    effective_rank_as_is: float  # of singular values, neither centred nor standardised: its script for language models


def spectrum_2603(rows: Tensor) -> Spectrum2603:
    """(N, D) -> principal component analysis of standardised features: each column less its mean, over its deviation
    (with N). A column that does not vary is 0.

    Its effective rank is of eigenvalues, where that of Roy and Vetterli, which `geometry.effective_rank` is, takes
    singular values, their roots, and so weighs small components more. Standardising makes every column count alike:
    a direction in which a few columns vary much is no longer a large one.
    """
    covariance = geometry.covariance(rows)
    variances = covariance.diagonal()
    deviations = torch.where(variances > geometry.ROUNDING**2 * variances.max(), variances, torch.inf).sqrt()
    standard = Spectrum.of(covariance / torch.outer(deviations, deviations))
    return Spectrum2603(
        standard.dimensions(0.9),
        standard.explained(2),
        _entropy_rank(standard.variances),
        _entropy_rank(standard.variances[:KEPT]),
        standard.participation_ratio,
        geometry.effective_rank(rows),
    )


def _entropy_rank(values: Tensor) -> float:
    return torch.special.entr(values / values.sum()).sum().exp().item()


class Parallelogram2502(NamedTuple):
    """Means of |(b_i - a_i) - (b_j - a_j)| / sigma in two components."""

    loss: float  # over every two pairs
    shuffled: float  # over every two pairs of a first word and any second word, no word twice


def parallelogram_2502(points: Tensor, pairs: Tensor) -> Parallelogram2502:
    """How far pairs (a, b) of one relation are from sides of parallelograms in the plane of the first two principal
    components: arXiv:2502.01628, equation 3, |E_a + E_d - E_b - E_c| / sigma for a : b like c : d, sigma the root of
    the mean of |E|^2 over all rows. The paper averages over quadruples that it draws; this is over all of them.

    Two components may hold little of the variance, and none of a relation: the loss says how the picture looks.
    `geometry.parallelogram_loss` is of the full space, squared, and in units in which independent rows have 1.

    Args:
        points: (N, 2) `geometry.plane` of all rows.
        pairs: (P, 2) integers, rows of the first and of the second word, P >= 2.
    """
    first, second = points[pairs[:, 0]], points[pairs[:, 1]]
    sigma = points.square().sum(1).mean().sqrt()
    one, other = torch.triu_indices(len(pairs), len(pairs), offset=1)
    sides = second - first
    loss = (sides[one] - sides[other]).norm(dim=1).mean() / sigma
    return Parallelogram2502(loss.item(), (_apart(first, second) / sigma).item())


def _apart(first: Tensor, second: Tensor) -> Tensor:
    """Mean |(b_k - b_l) - (a_i - a_j)| over i < j and all k, l that differ."""
    one, other = torch.triu_indices(len(first), len(first), offset=1)
    of_first, of_second = first[one] - first[other], second[one] - second[other]
    both_ways = torch.cat((of_second, -of_second))
    return torch.cdist(both_ways, of_first, compute_mode="donot_use_mm_for_euclid_dist").mean()


class FunctionVectors(NamedTuple):
    """Whether a relation is one vector: figures of the differences d = b - a of its pairs."""

    mean_cosine: float  # over every two pairs: 1 if all differences are parallel, 0 expected of independent rows
    shuffled: float  # the same if every first word had the second word of any pair, no word twice
    shared: float  # mean d_i . d_j over every two pairs, over mean |d|^2: the share that a common vector holds


def function_vectors(rows: Tensor, pairs: Tensor) -> FunctionVectors:
    """The differences of pairs (a, b) of one relation, after the function vectors of arXiv:2502.01628, in the full
    space. First words that are alike, and second words too, have parallel differences however they are paired: only
    what is above `shuffled` is a matter of the pairs.

    Args:
        rows: (N, D) prototypes or embeddings.
        pairs: (P, 2) integers, P >= 2.
    """
    first, second = rows[pairs[:, 0]].double(), rows[pairs[:, 1]].double()
    count = len(pairs)
    sides = second - first
    products = sides @ sides.t()
    apart = ~torch.eye(count, dtype=torch.bool, device=rows.device)
    shared = products[apart].mean() / products.diagonal().mean()
    unit = sides / sides.norm(dim=1, keepdim=True)
    any_sides = (second[None] - first[:, None]).flatten(0, 1)  # (P^2, D): b_k - a_i at i P + k
    any_unit = any_sides / any_sides.norm(dim=1, keepdim=True)
    cosines = (any_unit @ any_unit.t()).view(count, count, count, count)  # of (i, k) and (j, l)
    shuffled = cosines.transpose(1, 2)[apart][:, apart].mean()
    return FunctionVectors((unit @ unit.t())[apart].mean().item(), shuffled.item(), shared.item())
