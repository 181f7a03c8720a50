"""What of a run's prototypes is learnt, and what is still the noise that they were started with."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from pretrain.analysis import geometry, lengths
from pretrain.config import RunConfig
from pretrain.modules import initial_prototypes
from pretrain.records import Lengths, Train
from pretrain.run_folder import RunFolder

SAME = 2e-6  # relative difference of two quantiles of lengths that are one, to float32's rounding
NOISE_SEED = 0


class Start(NamedTuple):
    """The prototypes w0 that a run began with, (V, D) float32; without them, why."""

    prototypes: Tensor | None
    unknown: str | None  # None: they are known


def start_of(run: RunFolder, cfg: RunConfig) -> Start:
    """Draws a run's initial prototypes again from its configuration, and takes them only if they are as long as the run
    recorded at its start: a run that went on from other weights, or was drawn by other code, has none.
    """
    train, recorded = run.records(Train), [record for record in run.records(Lengths) if record.step == 0]
    if not recorded:
        first = train[0].step - len(train[0].losses or ()) if train else 0
        if first > 0:
            return Start(None, f"its records begin after {first} updates: it went on from other weights")
        return Start(None, "its records do not tell how long its prototypes were at the start (an older version's)")
    drawn = initial_prototypes(cfg)
    found = lengths.quantiles(torch.linalg.vector_norm(drawn, dim=1))
    was, median = recorded[-1].prototypes_median, found["median"]
    told = (was, recorded[-1].prototypes_p95)
    same = (
        it is not None and math.isclose(mine, it, rel_tol=SAME) for it, mine in zip(told, found.values(), strict=True)
    )
    if not all(same):
        return Start(
            None,
            f"drawn again from its configuration they have a median length of {median:.6g}, but the run recorded {was} "
            "at its start: it began with other weights, or other code drew them",
        )
    return Start(drawn, None)


class Noise(NamedTuple):
    """How much of rows is what they were at the start; both centred by the mean of their rows."""

    cosine: float  # of the two matrices, as vectors: 1 at the start, 0 (+- 1 / sqrt(V D)) for unrelated ones
    share: float  # of the variance that is along the start: cosine^2
    kept: float  # <w, w0> / <w0, w0>: what is left of the start's own length; decay makes it less than 1
    median_row_cosine: float  # of w_v and w0_v, over rows


def still_noise(rows: Tensor, start: Tensor) -> Noise:
    """Prototypes now and at the start, (V, D) each -> how much they have in common.

    Raises ValueError if shapes differ.
    """
    if rows.shape != start.shape:
        raise ValueError(f"a start of shape {tuple(start.shape)}: expected {tuple(rows.shape)}")
    now, then = rows.double() - rows.mean(0, dtype=torch.float64), start.double() - start.mean(0, dtype=torch.float64)
    by_row = (now * then).sum(1)
    cross, along = by_row.sum(), then.square().sum()
    cosine = (cross / (now.square().sum() * along).sqrt()).item()
    of_rows = by_row / (now.norm(dim=1) * then.norm(dim=1))
    return Noise(cosine, cosine**2, (cross / along).item(), of_rows.nanmedian().item())


class WithCount(NamedTuple):
    """|Pearson correlation| of a coordinate of tokens with how often they come; nan where fewer than 3 tokens, or all
    alike, are left.
    """

    every_token: float  # with ln(1 + count)
    of_those_that_occur: float  # with ln(count)


def count_correlation(rows: Tensor, counts: Tensor) -> WithCount:
    """Of the first principal component's coordinate of each row (V, D), D >= 2, with its token's count (V,).

    Tokens that never occur are pushed away by all others and lie apart; they alone can make the first correlation
    large, which is why there are two.
    """
    first, counts = geometry.plane(rows)[:, 0], counts.double()
    seen = counts > 0
    return WithCount(_correlation(first, (1 + counts).log()), _correlation(first[seen], counts[seen].log()))


def _correlation(x: Tensor, y: Tensor) -> float:
    return torch.corrcoef(torch.stack((x, y)))[0, 1].abs().item() if len(x) >= 3 else math.nan


def noise_rows(count: int, dim: int) -> Tensor:
    """(count, dim) independent normal entries, from NOISE_SEED: against which figures of the same shape are held."""
    return torch.randn(count, dim, generator=torch.Generator().manual_seed(NOISE_SEED))
