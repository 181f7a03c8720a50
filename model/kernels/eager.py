"""The head's chunk operations in plain PyTorch: the readable twin of every kernel, and the path where there is none.

Legend: M tokens of a chunk, V prototypes on this rank, D width. Scores are s = -coefficient * log c with c what a
contraction of x and w makes, in the *quadratic* family the squared distance q; or *linear*: -coefficient * q, or
coefficient times the product (the product itself, of `dot`). Operands of products have the compute dtype (bfloat16,
float32 or float64); scores and sums are float32 (float64 for float64 operands).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from .eager_elementwise import Terms as Terms
from .eager_elementwise import contract as contract
from .eager_elementwise import contract_gradient as contract_gradient
from .eager_elementwise import copy as copy

SummedGradient = tuple[Tensor, Tensor | None, Tensor | None]  # G (M, V); of q its sums over rows (M,), columns (V,)
# (M,) each: max s, sum exp(s - max), sum u exp(s - max), s of the target; where `Given.more` asks for them too: sum s,
# u of the target, sum u. u is n ds/dn: s itself, or with a cap what is left of it.
Sums = tuple[Tensor, ...]

FLOOR_MARGIN = 2.0**-18  # log q this close to the floor's logarithm is at the floor: both were rounded as logarithms


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """The dtype of scores and sums for operands of `dtype`."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def empty(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """As torch.empty, for what is as large as the prototypes."""
    return torch.empty(shape, dtype=dtype, device=device)


TEMPORARIES = 1  # float32 tensors (M, V) that the passes over a product's scores need for a moment
TILE = 256  # prototypes that share the largest score to which `fused_statistics` relates their weights


def rows_at_a_time(width: int, fused: bool) -> int:
    """Prototypes (V, width) that are taken at a time on the way to `Rows` and back; `fused`: by `prepare`, `finish`."""
    return 1024


def tokens_per_wave(width: int, processors: int) -> int:
    """Chunks of a multiple of so many tokens leave no processor idle."""
    return 1


class Rows:
    """The prototypes of one call, laid out for the products that read them. (V, D) in the compute dtype.

    `chunks`: of how many chunks the scores are alive at once. `squares` (V,): their squared norms, if known.
    """

    def __init__(self, rows: Tensor, chunks: int = 1, squares: Tensor | None = None) -> None:
        self.rows = rows
        self.squares = square_norms(rows) if squares is None else squares

    @functools.cached_property
    def sizes(self) -> Tensor:
        """(V,) sums of the absolute entries, made when one asks for them."""
        return self.rows.abs().sum(1)

    def gradient(self) -> Tensor:
        """(V, D), uninitialised, in the accumulator's dtype."""
        return empty(self.rows.shape, accumulator(self.rows.dtype), self.rows.device)


class Tokens:
    """The tokens of one chunk (M, D) in the compute dtype. `squares` (M,): their squared norms, if known."""

    def __init__(self, rows: Tensor, squares: Tensor | None = None) -> None:
        self.rows = rows
        if squares is not None:
            self.squares = squares

    @functools.cached_property
    def squares(self) -> Tensor:
        """(M,), made when one asks for them."""
        return square_norms(self.rows)


def unscaled(grad: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """The gradient of rows from that of rows * scale, in place: of the tiniest of rows it passes the largest number
    of `dtype`, and stays there.
    """
    most = torch.finfo(dtype).max
    return grad.mul_(scale).clamp_(-most, most)


def to_targets(x: Tensor, rows: Tensor, local: Tensor, product: bool) -> Tensor:
    """(M,) |x - w|^2 of tokens (M, D) and their targets' rows, or x . w if `product`; any number where local is -1."""
    wide = accumulator(x.dtype)
    a, b = x.to(wide), rows[local.clamp_min(0)].to(wide)
    return torch.linalg.vecdot(a, b) if product else square_norms(a - b)


def square_norms(rows: Tensor) -> Tensor:
    """(N, D) -> (N,) squared norms of the rows as rounded, in the accumulator dtype."""
    wide = rows.to(accumulator(rows.dtype))
    return torch.linalg.vecdot(wide, wide)


def product(a: Tensor, b: Tensor) -> Tensor:
    """(M, K) @ (K, N) with float32 sums *and* result: rounding a dot product to bfloat16 would ruin near matches."""
    wide = accumulator(a.dtype)
    if a.dtype == wide:
        return a @ b
    if a.is_cuda:
        return torch.mm(a, b, out_dtype=wide)
    return a.to(wide) @ b.to(wide)  # exact but for the sums: two times 8 bits make 16, float32 holds 24


def products(x: Tensor, rows: Rows) -> Tensor:
    """(M, D) -> (M, V) dot products with every prototype."""
    return product(x, rows.rows.t())


def hidden_product(grads: Tensor, rows: Rows) -> Tensor:
    """(M, V) -> (M, D): grads @ rows."""
    return product(grads, rows.rows)


def add_rows_product(total: Tensor, grads: Tensor, x: Tensor, first: bool = False) -> None:
    """total (V, D) += grads.T @ x, for grads (M, V) and x (M, D); `first`: total holds nothing yet."""
    addend = product(grads.t(), x)
    total.copy_(addend) if first else total.add_(addend)


def unit_rows(rows: Tensor) -> Tensor:
    """Rows (N, D) of length 1 (a row of zeros stays one)."""
    scaled, length, _ = _lengths(rows)
    return scaled / length


def unit_rows_gradient(rows: Tensor, grad: Tensor) -> Tensor:
    """The gradient of `rows` from that of unit_rows(rows): 0 for a row of zeros, and finite for the shortest of
    rows.
    """
    scaled, length, largest = _lengths(rows)
    unit = scaled / length
    along = torch.linalg.vecdot(unit, grad)[:, None]
    # divided twice: the product of both may pass the largest number, as may the result for the shortest of rows
    across = ((grad - unit * along) / length / largest).clamp(-torch.finfo(grad.dtype).max, torch.finfo(grad.dtype).max)
    return torch.where(rows.any(1, keepdim=True), across, 0)


def _lengths(rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Rows divided by their largest entry (then their squares cannot overflow), the length of that, the largest
    entry.
    """
    largest = rows.abs().amax(1, keepdim=True)
    largest = torch.where(largest > 0, largest, 1)
    scaled = rows / largest
    length = torch.linalg.vector_norm(scaled, dim=1, keepdim=True)
    return scaled, torch.where(length == 0, 1, length), largest


def finish_rows(total: Tensor, rows: Tensor, columns: Tensor) -> None:
    """total (V, D) = 2 (columns (V,) * rows (V, D) - total), in place."""
    total.neg_().addcmul_(rows, columns[:, None]).mul_(2)


def prepare(
    rows: Tensor,
    scale: Tensor | None,
    unit: bool,
    out: Tensor,
    to_unit: Callable[[Tensor], Tensor] = unit_rows,
) -> Tensor | None:
    """Fills `out` (N, D) with rows * scale (one number, or (N, 1)), of length 1 if `unit`; returns the squared norms
    (N,) of what it holds where they cost nothing more.
    """
    wide = rows.to(accumulator(out.dtype))
    wide = wide if scale is None else wide * scale
    out.copy_(to_unit(wide) if unit else wide)
    return None


def finish(
    total: Tensor,
    rows: Tensor,
    sums: Tensor | None,
    source: Tensor,
    scale: Tensor | None,
    unit: bool,
    out: Tensor,
    with_sums: Callable[[Tensor, Tensor, Tensor], None] = finish_rows,
    from_unit: Callable[[Tensor, Tensor], Tensor] = unit_rows_gradient,
) -> None:
    """Fills `out` (N, D) with the gradient of `source` from that of the `rows` that `prepare` made of it: total, or
    2 (sums * rows - total) where `sums` (N,) are given. Consumes `total`, which may be `out`.
    """
    if sums is not None:
        with_sums(total, rows, sums)
    if unit:
        total = from_unit(source.to(total.dtype), total)
    total = total if scale is None else unscaled(total, scale, out.dtype)
    if out.data_ptr() != total.data_ptr():
        out.copy_(total)


class Squares(NamedTuple):
    """What turns the dot products of a chunk into squared distances q = |x|^2 + |w|^2 - 2 x.w."""

    x: Tensor  # (M,) |x|^2
    rows: Tensor  # (V,) |w|^2
    target: Tensor  # (M,) q of the target, by direct difference
    floor: Tensor | None = None  # (M,) the least that q may be; None: no floor, as scores are linear in q


class Given(NamedTuple):
    """What makes scores of a chunk's values (M, V); None where their kind has none."""

    local: Tensor  # (M,) the target's column, -1 where it is not here
    coefficient: Tensor | None = None  # one element; None: 1, of products
    floor: Tensor | None = None  # (M,) the least that c, or q, may be; None: scores are linear
    squares: Squares | None = None  # its floor is `floor`
    cap: float | None = None  # scores are cap * tanh(score / cap)
    lift: float = 0.0  # what log c lacks of what the coefficient belongs to: a cap reads it, no probability does
    smooth: bool = False  # sums over all scores are asked for

    @property
    def kind(self) -> Literal["quadratic", "log", "dot"]:
        """What the values are: dot products that make q, distances c, or dot products as they are."""
        if self.squares is not None:
            return "quadratic"
        return "dot" if self.floor is None else "log"

    @property
    def linear(self) -> bool:
        """Whether scores are linear in the product or in q, without a logarithm and a floor."""
        return self.floor is None

    @property
    def more(self) -> bool:
        """Whether all seven sums are asked for."""
        return self.smooth or self.cap is not None

    @property
    def steep(self) -> Tensor | None:
        """What a kept value is multiplied by to be its score: log c, log q, q, or a product; None: 1."""
        return self.coefficient if self.coefficient is None or self.kind == "dot" else -self.coefficient


class Upstream(NamedTuple):
    """What turns a chunk's scores into G = d(weight * loss)/dvalue: (M,) each."""

    lse: Tensor  # log sum exp of the scores, over the whole group
    weight: Tensor  # of the probabilities: the token's, or more with a z-loss
    score: Tensor | None = None  # of the target; for kernels that do not look for it among the others
    own: Tensor | None = None  # weight of the target; None: `weight`
    uniform: Tensor | None = None  # and of each class; None: 0


def statistics(values: Tensor, given: Given) -> Sums:
    """Sums up the scores s of every token; the values (M, V) become what is *kept* for `scores` and `gradients`: here
    log q, log c or q. Dot products stay.

    Returns `Sums`; those of the target are 0 where it is not here.
    """
    column, here = given.local.clamp_min(0)[:, None], given.local >= 0
    if given.squares is not None:
        values.mul_(-2).add_(given.squares.x[:, None]).add_(given.squares.rows)
        # the target by its own difference, as the sum above cancels near a match; others write back what is there
        near = torch.where(here[:, None], given.squares.target[:, None], values.gather(1, column))
        values.scatter_(1, column, near)
    if given.floor is not None:
        torch.maximum(values, given.floor[:, None], out=values).log_()
    every = scores(values, given)
    shares = every  # u
    if given.cap is not None:
        shares = _slope_of_cap(every, given.cap).mul_(_raw(values, given))
    target = torch.where(here, every.gather(1, column)[:, 0], 0)
    top = every.amax(1)
    weights = (every - top[:, None]).exp_()
    sums = top, weights.sum(1), torch.linalg.vecdot(weights, shares), target
    if not given.more:
        return sums
    return *sums, every.sum(1), torch.where(here, shares.gather(1, column)[:, 0], 0), shares.sum(1)


def scores(kept: Tensor, given: Given) -> Tensor:
    """(M, V) scores from what `statistics` kept."""
    raw = _raw(kept, given)
    return raw if given.cap is None else (raw / given.cap).tanh_().mul_(given.cap)


def _raw(kept: Tensor, given: Given) -> Tensor:
    raw = kept if given.steep is None else kept * given.steep
    return raw if given.cap is None or given.steep is None else raw + given.lift * given.steep


def _slope_of_cap(scores: Tensor, cap: float) -> Tensor:
    """d (cap tanh(s / cap)) / ds of capped scores."""
    return (scores / cap).square_().neg_().add_(1)


def gradients(kept: Tensor, given: Given, loss: Upstream, dtype: torch.dtype) -> SummedGradient:
    """G = d(weight * loss)/dvalue (M, V), rounded to `dtype`, and of q its sums over rows (M,) and columns (V,): those
    of the *rounded* G, since dx = 2 (x sum G - G w) cancels near a match. `kept` is consumed.

    G = -coefficient * weight * (p - onehot) / c, and 0 at the floor; of linear scores, without c. With the weights of
    options: weight * p - own * onehot - uniform in place of weight * (p - onehot), and a cap's slope.
    """
    if loss.own is not None or given.cap is not None:
        rounded = _gradients_of_options(kept, given, loss).to(dtype)
    else:
        rounded = _gradients(kept, given, loss).to(dtype)
    if given.squares is None:
        return rounded, None, None
    wide = rounded.to(loss.lse.dtype)
    return rounded, wide.sum(1), wide.sum(0)


def _gradients(kept: Tensor, given: Given, loss: Upstream) -> Tensor:
    here, column = (given.local >= 0)[:, None], given.local.clamp_min(0)[:, None]
    if given.floor is None:
        probabilities = _raw(kept, given).sub_(loss.lse[:, None]).exp_()
        probabilities.scatter_add_(1, column, torch.where(here, -1.0, 0.0).to(kept.dtype))
        slope = loss.weight if given.steep is None else loss.weight * given.steep
        return probabilities.mul_(slope[:, None])
    assert given.coefficient is not None
    target_log = kept.gather(1, column)
    floored = kept <= given.floor.log()[:, None] + FLOOR_MARGIN
    # p / c by one exponential: one pass, and p alone may be too small for float32 where p / c is not
    grads = (kept * -(given.coefficient + 1)).sub_(loss.lse[:, None]).exp_()
    grads.scatter_add_(1, column, torch.where(here, -target_log.neg().exp(), 0))
    return grads.mul_((-given.coefficient * loss.weight)[:, None]).masked_fill_(floored, 0)


def _gradients_of_options(kept: Tensor, given: Given, loss: Upstream) -> Tensor:
    here, column = (given.local >= 0)[:, None], given.local.clamp_min(0)[:, None]
    own = loss.weight if loss.own is None else loss.own
    every = scores(kept, given)
    grads = (every - loss.lse[:, None]).sub_(0 if given.linear else kept).exp_().mul_(loss.weight[:, None])  # p / c
    inverse = torch.ones_like(kept) if given.linear else kept.neg().exp_()
    grads.scatter_add_(1, column, torch.where(here, -own[:, None] * inverse.gather(1, column), 0))
    if loss.uniform is not None:
        grads.sub_(inverse.mul_(loss.uniform[:, None]))
    if given.cap is not None:
        grads.mul_(_slope_of_cap(every, given.cap))
    if given.steep is not None:
        grads.mul_(given.steep)
    if given.floor is not None:
        grads.masked_fill_(kept <= given.floor.log()[:, None] + FLOOR_MARGIN, 0)
    return grads


class Scored(NamedTuple):
    """What `fused_statistics` keeps of a chunk: E (M, V), and how to read it."""

    kept: Tensor  # (M, V) in the operands' dtype: (q / least)^-(coefficient + 1); linear: exp(score - top). 1 at most
    tops: Tensor  # (tiles, M) log2 of the least q, or the greatest score
    tile: int  # prototypes that share one


def fused_statistics(
    x: Tokens, rows: Rows, given: Given, target: Tensor, keep: bool, moment: bool
) -> tuple[Sums, Scored | None]:
    """The product and its statistics in one: the four sums of `statistics` (up to the max, which may be any number near
    it, and the third, which is asked for by `moment`), and E if `keep`.

    `target` (M,): q of the target, or its product. The plain form of a kernel that keeps no float32 scores; on purpose
    with that kernel's roundings.
    """
    ln2, here = math.log(2), given.local >= 0  # base 2 within, as the kernel is: its hardware has no other logarithm
    values = products(x.rows, rows)
    if given.linear:
        if given.squares is not None:
            values = values * -2 + given.squares.x[:, None] + given.squares.rows
        parts = _raw(_with_targets(values, target, given.local), given).split(TILE, 1)
        tops = torch.stack([part.amax(1) for part in parts])
        weights = [(part - top[:, None]).exp() for part, top in zip(parts, tops, strict=True)]
        top = tops.amax(0)
        factor = (tops - top).exp()
        total = (factor * torch.stack([part.sum(1) for part in weights])).sum(0)
        moments = torch.stack([(weight * part).sum(1) for weight, part in zip(weights, parts, strict=True)])
        moment_sum = (factor * moments).sum(0)
        kept = torch.cat(weights, 1)
        sums = top, total, moment_sum, torch.where(here, _raw(target, given), 0)
    else:
        assert given.coefficient is not None and given.squares is not None and given.squares.floor is not None
        squares, coefficient, least_q = given.squares, given.coefficient, given.squares.floor
        floor = least_q[:, None]
        q = values * -2 + squares.x[:, None] + squares.rows
        q = torch.maximum(_with_targets(q, target, given.local), floor)
        parts = q.split(TILE, 1)
        least = torch.stack([part.amin(1) for part in parts])
        tops = least.log2()
        logs = [part.log2() - top[:, None] for part, top in zip(parts, tops, strict=True)]
        weights = [(log * -(coefficient + 1)).exp2() for log in logs]
        shares = [weight * part / unit[:, None] for weight, part, unit in zip(weights, parts, least, strict=True)]
        totals = torch.stack([share.sum(1) for share in shares])
        moments = torch.stack([(share * log).sum(1) for share, log in zip(shares, logs, strict=True)])
        apart = tops - tops.amin(0)  # the sums of a tile are in units of its own least q: brought to the least of all
        factor = (apart * -coefficient).exp2()
        top, total = tops.amin(0) * -coefficient * ln2, (factor * totals).sum(0)
        moment_sum = top * total - (factor * (moments + apart * totals)).sum(0) * (coefficient * ln2)
        score = torch.maximum(target, least_q).log2() * -coefficient * ln2
        kept = torch.cat(weights, 1).masked_fill(q <= floor, 0)  # no gradient at the floor, which the sums count
        sums = top, total, moment_sum, torch.where(here, score, 0)
    return sums, Scored(kept.to(x.rows.dtype), tops, TILE) if keep else None


def _with_targets(values: Tensor, target: Tensor, local: Tensor) -> Tensor:
    """(M, V) with (M,) in the targets' columns, where they are here."""
    column = local.clamp_min(0)[:, None]
    return values.scatter(1, column, torch.where((local >= 0)[:, None], target[:, None], values.gather(1, column)))


def fused_gradient(scored: Scored, given: Given, loss: Upstream) -> SummedGradient:
    """G of `gradients` from what `fused_statistics` kept, and its sums as rounded: G (M, V), (M,), (V,)."""
    assert loss.score is not None and loss.uniform is None and not given.more
    kept, tops, width = scored
    steep = 1.0 if given.steep is None else given.steep
    slope = loss.weight * steep
    if given.linear:
        logs = tops - loss.lse
    else:
        assert given.coefficient is not None
        logs = tops * (-(given.coefficient + 1) * math.log(2)) - loss.lse
    factor = logs.exp().repeat_interleave(width, 0)[: kept.shape[1]].t()
    grads = kept.to(loss.lse.dtype) * factor * slope[:, None]
    target = torch.expm1(loss.score - loss.lse) * slope  # p - 1, with all its digits where p is near 1
    if loss.own is not None:
        target = target + (loss.weight - loss.own) * steep
    if given.squares is not None and given.squares.floor is not None:
        apart = torch.maximum(given.squares.target, given.squares.floor)
        target = torch.where(apart > given.squares.floor, target / apart, 0)
    rounded = _with_targets(grads, target, given.local).to(kept.dtype)
    if given.squares is None:
        return rounded, None, None
    wide = rounded.to(loss.lse.dtype)
    return rounded, wide.sum(1), wide.sum(0)
