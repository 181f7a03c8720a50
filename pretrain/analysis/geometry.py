"""Measures of geometry: how prototypes, embeddings and hidden states lie, as figures without units.

Every function takes plain matrices, whose rows are points, and can be used alone. Sums are in float64 on the device of
the input, in chunks of rows: beside the input, memory is of the size D x D or C x D, never N x N. Only `norms` and
`nearest` have the units of the rows. Where a figure is 0/0 it is nan. Matrices that are empty, not finite or of another
shape raise ValueError.

Legend: N rows, D width, C classes, P pairs.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from model.distances import Distance, resolve
from model.reference import distances_reference

CHUNK = 4096  # rows that are in float64 at a time
PAIRS = 2**22  # cosines at a time
ROUNDING = 1e-9  # of a share of the variance

QUANTILES = {"min": 0.0, "5%": 0.05, "25%": 0.25, "median": 0.5, "75%": 0.75, "95%": 0.95, "max": 1.0}


# ---- spectra


@dataclass(frozen=True, eq=False)
class Spectrum:
    """Principal component analysis: the variances along the principal components, (D,) float64, descending."""

    variances: Tensor

    @classmethod
    def of(cls, covariance: Tensor) -> Spectrum:
        """(D, D) float64, symmetric."""
        return cls(_eigenvalues(covariance))

    def dimensions(self, share: float) -> int:
        """The fewest leading components that hold at least `share` (0 to 1) of the variance; 0 if there is none."""
        held = self.variances.cumsum(0)
        if held[-1] == 0:
            return 0
        return min(int((held < (share - ROUNDING) * held[-1]).sum()) + 1, len(held))

    def explained(self, components: int) -> float:
        """Share of the variance, 0 to 1, in the first `components` components."""
        return (self.variances[:components].sum() / self.variances.sum()).item()

    @property
    def participation_ratio(self) -> float:
        """(sum l)^2 / sum l^2 of the variances l, 1 to D: k if k of them are equal and the others 0 (Gao et al., A
        theory of multineuronal dimensionality, 2017).
        """
        return (self.variances.sum().square() / self.variances.square().sum()).item()


def covariance(rows: Tensor) -> Tensor:
    """(N, D) -> (D, D) float64, of the rows, centred by their mean and divided by N."""
    rows = _matrix(rows)
    return _moments(rows, _mean(rows))


def spectrum(rows: Tensor) -> Spectrum:
    """(N, D) -> eigenvalues of the covariance of the rows."""
    return Spectrum.of(covariance(rows))


def effective_rank(rows: Tensor) -> float:
    """(N, D) -> exp(-sum p_i log p_i), p_i = s_i / sum s, of the matrix's singular values s: 1 to its rank (Roy and
    Vetterli, The effective rank, 2007).

    Of the matrix as it is: subtract the mean of the rows first where the origin means nothing. Singular values below
    sqrt(D 2^-52) of the largest count as 0.
    """
    rows = _matrix(rows)
    singular = _eigenvalues(_moments(rows, rows.new_zeros(rows.shape[1], dtype=torch.float64))).sqrt()
    return torch.special.entr(singular / singular.sum()).sum().exp().item()


def plane(rows: Tensor) -> Tensor:
    """Rows (N, D), D >= 2 -> (N, 2) float64, their first two principal components."""
    if rows.shape[1] < 2:
        raise ValueError("rows of width 1: expected 2 or more")
    mean = _mean(rows)
    axes = torch.linalg.eigh(_moments(rows, mean)).eigenvectors[:, -2:].flip(1)
    return torch.cat([(part - mean) @ axes for part in _doubles(rows)])


def norms(rows: Tensor) -> dict[str, float]:
    """(N, D) -> quantiles of the rows' Euclidean lengths, in the units of the rows, and "max/median"."""
    lengths = torch.cat([part.norm(dim=1) for part in _doubles(_matrix(rows))])
    levels = lengths.new_tensor(list(QUANTILES.values()))
    quantiles = dict(zip(QUANTILES, torch.quantile(lengths, levels).tolist(), strict=True))
    return {**quantiles, "max/median": quantiles["max"] / quantiles["median"] if quantiles["median"] else math.nan}


# ---- neighbours


class Neighbours(NamedTuple):
    """The nearest rows of some rows: (T, count) each, the nearest first."""

    indices: Tensor
    distances: Tensor


@torch.no_grad()
def nearest(
    prototypes: Tensor, chosen: Sequence[int], count: int, distance: str | Distance = "euclidean", **params: Any
) -> Neighbours:
    """The other prototypes (V, D) that are nearest to the chosen ones, which are taken as x of d(x, w).

    Args:
        distance: as in `model.harmonic.harmonic_loss`, or a head's `score_function`. For `dot` and `cosine_softmax`,
            which are no distances, the largest products and cosines come first.
    """
    prototypes, entry = _matrix(prototypes), resolve(distance, params).evaluated()
    count = min(count, len(prototypes) - 1)
    neighbours = Neighbours(
        torch.empty(len(chosen), count, dtype=torch.int64), torch.empty(len(chosen), count, dtype=torch.float64)
    )
    for place, row in enumerate(chosen):
        parts = [distances_reference(prototypes[row : row + 1], part, entry) for part in prototypes.split(CHUNK)]
        d = torch.cat(parts, dim=1)[0]
        d[row] = -math.inf if entry.slope > 0 else math.inf
        neighbours.distances[place], neighbours.indices[place] = d.topk(count, largest=entry.slope > 0)
    return neighbours


# ---- classes


@dataclass(frozen=True, eq=False)
class Classes:
    """Rows by class: what the measures of neural collapse need of them. Every class counts alike, however many rows it
    has; "of the classes" below means the average over classes.
    """

    labels: Tensor  # (C,) ascending
    counts: Tensor  # (C,) rows
    means: Tensor  # (C, D) float64
    spreads: Tensor  # (C,) root of the mean square distance of rows from their mean, with n - 1
    within: Tensor  # (D, D) average over classes of the covariance within one, with n
    between: Tensor  # (D, D) covariance of the C means

    @property
    def scatter(self) -> float:
        """tr S_W / tr S_B: the variance within classes over that of the class means; 0 when classes are points."""
        return (self.within.trace() / self.between.trace()).item()

    @property
    def nc1(self) -> float:
        """tr(S_W S_B^+) / C, S_B^+ the pseudo-inverse of the covariance of means: 0 when classes are points (Papyan,
        Han and Donoho, arXiv:2008.08186, NC1).

        Directions in which the means hardly differ weigh most; `scatter` weighs all directions by their variance.
        """
        inverse = torch.linalg.pinv(self.between, hermitian=True)
        return ((self.within * inverse).sum() / len(self.labels)).item()


def classes_of(rows: Tensor, labels: Tensor, least: int = 2) -> Classes:
    """Groups rows (N, D) by labels (N,); classes with fewer than `least` (2 or more) rows are left out.

    Raises:
        ValueError: fewer than 2 classes are left.
    """
    rows = _matrix(rows)
    if labels.shape != rows.shape[:1]:
        raise ValueError(f"labels of shape {tuple(labels.shape)}: expected one for each of {len(rows)} rows")
    names, group, counts = labels.unique(return_inverse=True, return_counts=True)
    enough = counts >= max(least, 2)
    if enough.sum() < 2:
        raise ValueError(f"{int(enough.sum())} classes have {max(least, 2)} rows or more: expected at least 2 classes")
    kept = enough[group]
    rows, group, counts = rows[kept], (enough.cumsum(0) - 1)[group[kept]], counts[enough]
    width = rows.shape[1]
    means = rows.new_zeros(len(counts), width, dtype=torch.float64)
    for part, of in zip(_doubles(rows), group.split(CHUNK), strict=True):
        means.index_add_(0, of, part)
    means /= counts[:, None]
    squares = means.new_zeros(len(counts))
    within = means.new_zeros(width, width)
    for part, of in zip(_doubles(rows), group.split(CHUNK), strict=True):
        off = part - means[of]
        squares.index_add_(0, of, off.square().sum(1))
        within += off.t() @ (off / counts[of, None])
    between = _moments(means, means.mean(0))
    return Classes(names[enough], counts, means, (squares / (counts - 1)).sqrt(), within / len(counts), between)


def centre_distances(prototypes: Tensor, classes: Classes) -> Tensor:
    """(C,) |w_c - m_c| / s_c: how far the prototype of a class is from the mean m_c of its rows, in spreads s_c.

    0: the prototype is the class's centre; 1: as far from it as a row is. The mean of n rows is itself s_c / sqrt(n)
    off the true centre (root mean square), so that a true centre that other rows told reads about 1 / sqrt(n).

    Args:
        prototypes: (C, D), one for each of `classes.labels`.
    """
    return (_of_classes(prototypes, classes) - classes.means).norm(dim=1) / classes.spreads


def equinorm(rows: Tensor) -> float:
    """(C, D) class means or prototypes -> deviation over mean of their lengths, measured from their common mean: 0 when
    all are equally long (arXiv:2008.08186, NC2).
    """
    lengths = _centred(_matrix(rows)).norm(dim=1)
    return (lengths.std(correction=0) / lengths.mean()).item()


class Angles(NamedTuple):
    """Over all pairs of rows, by the cosines of their angles as seen from the common mean."""

    deviation: float  # of the cosines: 0 when all angles are equal
    simplex_gap: float  # mean |cos + 1 / (C - 1)|: 0 when angles are equal and as wide as possible


def equiangular(rows: Tensor) -> Angles:
    """(C, D) class means or prototypes -> how far their angles are from those of a simplex (arXiv:2008.08186, NC2)."""
    unit = _centred(_matrix(rows, least=2))
    unit /= unit.norm(dim=1, keepdim=True)
    classes = len(unit)
    total = square = gap = unit.new_zeros(())
    at_once = max(1, PAIRS // classes)
    for first in range(0, classes, at_once):
        off = unit[first : first + at_once] @ unit.t() + 1 / (classes - 1)
        off[torch.arange(len(off)), torch.arange(first, first + len(off))] = 0.0
        total, square, gap = total + off.sum(), square + off.square().sum(), gap + off.abs().sum()
    pairs = classes * (classes - 1)
    variance = square / pairs - (total / pairs).square()
    return Angles(variance.clamp_min(0).sqrt().item(), (gap / pairs).item())


def self_duality(prototypes: Tensor, classes: Classes) -> float:
    """|W/|W| - M/|M||^2 of prototypes W and class means M (C, D), both centred, |.| the Frobenius norm: 0 when they are
    the same but for a factor, 2 when unrelated, 4 when opposite (arXiv:2008.08186, NC3).
    """
    w, m = _centred(_of_classes(prototypes, classes)), _centred(classes.means)
    return (w / w.norm() - m / m.norm()).square().sum().item()


def _of_classes(prototypes: Tensor, classes: Classes) -> Tensor:
    if prototypes.shape != classes.means.shape:
        raise ValueError(
            f"prototypes of shape {tuple(prototypes.shape)}: expected {tuple(classes.means.shape)}, one for each class"
        )
    return _matrix(prototypes).double()


# ---- relations


class Parallelograms(NamedTuple):
    """Losses of word pairs: 1 is what independent rows would have."""

    loss: float  # of the pairs
    random: float  # expected if the same words were paired at random
    shuffled: float  # expected if every first word got the second word of a random pair


def parallelogram_loss(rows: Tensor, pairs: Tensor) -> Parallelograms:
    """Whether pairs (a, b) of one relation are sides of parallelograms: w_b - w_a the same for all.

    loss = mean over i < j of |(b_i - a_i) - (b_j - a_j)|^2 / (4 s^2), s^2 = mean |w - mean w|^2 over all rows: 0 for
    parallelograms, 1 expected of independent rows. After arXiv:2502.01628, with the spread of all rows as the unit.
    `random` and `shuffled` are expectations over all pairings, in closed form: the variance of the 2 P words over s^2,
    and the summed variances of the P first and the P second words over 2 s^2. A loss below `random` may come from first
    words being alike; one below `shuffled` is a matter of the pairs.

    Args:
        rows: (N, D) prototypes or embeddings.
        pairs: (P, 2) integers, rows of the first and of the second word, P >= 2.
    """
    rows = _matrix(rows)
    if pairs.dim() != 2 or pairs.shape[1] != 2 or len(pairs) < 2:
        raise ValueError(f"pairs of shape {tuple(pairs.shape)}: expected (P, 2), P at least 2")
    first, second = rows[pairs[:, 0]].double(), rows[pairs[:, 1]].double()
    unit = _moments(rows, _mean(rows)).trace()
    apart = _variance(second - first) / 2
    anyhow = _variance(torch.cat((first, second)))
    by_side = (_variance(first) + _variance(second)) / 2
    return Parallelograms((apart / unit).item(), (anyhow / unit).item(), (by_side / unit).item())


def _variance(rows: Tensor) -> Tensor:
    """Summed over columns, with n - 1."""
    return rows.var(0).sum()


def linear_cka(x: Tensor, y: Tensor) -> float:
    """Linear centred kernel alignment of two representations of the same N things: |Y'X|^2 / (|X'X| |Y'Y|), columns
    centred, Frobenius norms; 0 to 1, 1 if they are the same but for rotation and scale (Kornblith et al.,
    arXiv:1905.00414, section 3, in the form of features).

    Args:
        x: (N, D); y: (N, E). The widths may differ.
    """
    x, y = _matrix(x, least=2), _matrix(y, least=2)
    if len(x) != len(y):
        raise ValueError(f"{len(x)} and {len(y)} rows: expected the same things in both")
    mean_x, mean_y = _mean(x), _mean(y)
    cross = mean_y.new_zeros(y.shape[1], x.shape[1])
    for part_x, part_y in zip(_doubles(x), _doubles(y), strict=True):
        cross += (part_y - mean_y).t() @ (part_x - mean_x)
    own = _moments(x, mean_x).norm() * _moments(y, mean_y).norm()
    return ((cross / len(x)).square().sum() / own).item()


# ---- crystals


class Circle(NamedTuple):
    """How near points are to a circle, and in which order they run around it."""

    score: float  # 0 to 1
    frequency: int  # steps of 1 / p of a turn from one row to the next


def circle_score(rows: Tensor) -> Circle:
    """Whether prototypes of 0 .. p-1 (p, D), p >= 3, lie on a circle in cyclic order, as in modular addition.

    With z_j the first two principal components as a complex number, the score is the share of sum |z_j|^2 that one
    rotation c exp(2 pi i k j / p) holds: max over k of |Z_k|^2 / sum |Z|^2, Z the discrete Fourier transform of z. It
    is 1 if and only if the points are on a circle, evenly and in order, k steps apart. Only k without a common divisor
    with p count, else points would coincide; k and p - k are the same circle.
    """
    rows = _matrix(rows, least=3)
    p = len(rows)
    power = torch.fft.fft(torch.view_as_complex(plane(rows))).abs().square()
    steps = [k for k in range(1, p) if math.gcd(k, p) == 1]
    shares = power[torch.tensor(steps, device=power.device)] / power.sum()
    best = int(shares.argmax())
    return Circle(shares[best].item(), min(steps[best], p - steps[best]))


def lattice_score(rows: Tensor, coordinates: Tensor) -> float:
    """Whether rows (N, D) that stand for points of a grid lie on a lattice, however slanted or stretched.

    The mean of the squared canonical correlations (Hotelling, 1936) between the first two principal components and the
    grid coordinates: 1 if and only if the components are an invertible affine map of the coordinates, 1/2 when one
    direction alone is kept.

    Args:
        coordinates: (N, 2) of the grid, which span a plane.
    """
    rows, grid = _matrix(rows, least=3), _centred(_matrix(coordinates))
    if grid.shape != (len(rows), 2) or torch.linalg.matrix_rank(grid) < 2:
        raise ValueError(f"coordinates of shape {tuple(grid.shape)}: expected ({len(rows)}, 2) that span a plane")
    points = plane(rows)
    lengths = points.norm(dim=0)
    axes = points / torch.where(lengths > ROUNDING * lengths.max(), lengths, math.inf)  # components are uncorrelated
    return ((torch.linalg.qr(grid).Q.t() @ axes).square().sum() / 2).item() if lengths.max() > 0 else math.nan


def group_score(rows: Tensor, groups: Tensor) -> float:
    """The share of the variance of rows (N, D) that lies between groups (N,): Pearson's correlation ratio.

    1 if all rows of a group are one point, 0 if all groups have one mean; G groups of unrelated rows have
    (G - 1) / (N - 1) in the mean.
    """
    rows = _matrix(rows, least=2)
    if groups.shape != (len(rows),):
        raise ValueError(f"groups of shape {tuple(groups.shape)}: expected ({len(rows)},), one for each row")
    centred = _centred(rows)
    _, places, counts = groups.unique(return_inverse=True, return_counts=True)
    sums = centred.new_zeros(len(counts), rows.shape[1]).index_add_(0, places, centred)
    total = centred.square().sum().item()
    return (sums.square().sum(1) / counts).sum().item() / total if total > 0 else math.nan


# ---- sums


def _matrix(rows: Tensor, least: int = 1) -> Tensor:
    if rows.dim() != 2 or len(rows) < least or not rows.shape[1]:
        raise ValueError(f"a matrix of shape {tuple(rows.shape)}: expected (N, D), N at least {least}")
    if not rows.isfinite().all():
        raise ValueError(f"a matrix of shape {tuple(rows.shape)}: not all of its entries are finite")
    return rows.detach()


def _doubles(rows: Tensor) -> Iterator[Tensor]:
    return (part.double() for part in rows.split(CHUNK))


def _mean(rows: Tensor) -> Tensor:
    return rows.mean(0, dtype=torch.float64)


def _centred(rows: Tensor) -> Tensor:
    return rows.double() - _mean(rows)


def _moments(rows: Tensor, about: Tensor) -> Tensor:
    """(D, D) mean of (row - about)(row - about)'."""
    total = about.new_zeros(rows.shape[1], rows.shape[1])
    for part in _doubles(rows):
        total.addmm_((part - about).t(), part - about)
    return total / len(rows)


def _eigenvalues(moments: Tensor) -> Tensor:
    """(D,) descending; what is rounding, D 2^-52 of the largest and less, is 0."""
    values = torch.linalg.eigvalsh(moments).flip(0)
    return torch.where(values > len(values) * torch.finfo(values.dtype).eps * values[0], values, 0.0)
