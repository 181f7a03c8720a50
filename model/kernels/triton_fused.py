"""The first product with the passes over scores in its epilogue, as Triton kernels: no float32 scores in memory.

`scores`: a tile of x w' becomes squared distances q = |x|^2 + |w|^2 - 2 x.w (or stays x.w for "dot"), then E = (q /
least)^-(coefficient + 1), where least is the smallest q of a token in the tile, and the tile's sums of E q: the
normaliser up to least^-(coefficient + 1). E is 1 at most (in float32, but for rounding), however much likelier than
the target a rival is. E is kept in the operands' dtype; where q is at its floor it is 0, as the gradient is, and the
sums count it. Of scores that are LINEAR in x.w or in q, E = exp(score - greatest). `gradients`: E becomes G = weight *
(p - onehot) * ds/dq in place, one factor per token and tile, with its sums as rounded.

E is rounded, and so is G: 2^-9 each in bfloat16, where G alone is rounded by the separate passes. The target's entry is
made of its own difference, in float32.

Legend: M tokens of a chunk, V prototypes on this rank, padded to whole lines of memory, D width.
"""

# Annotations must stay objects here: Triton's interpreter reads `tl.constexpr` from them.

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from .eager import Given, Scored, Sums, Upstream
from .triton_functions import LN2, LOG2E, log2, not_below, settled
from .triton_scores import (
    LOWEST,
    ROW_START,
    TILE,
    beside,
    launch,
    padded,
    padded_rows,
    partial_sums,
    steepness,
    summed,
    target_gradient,
)

BEHIND = tl.constexpr(2.0**126)  # |w|^2 of what lies behind the last prototype


class Tile(NamedTuple):
    """How the product is cut: tokens, prototypes and entries at a time, warps, stages of the pipeline of loads."""

    tokens: int
    prototypes: int
    entries: int
    warps: int
    stages: int


TILES = (  # reasoned, and compiled within the registers of an H100; `python -m benchmarks.gpu` times them
    Tile(128, 256, 64, 8, 3),
    Tile(128, 256, 64, 8, 4),
    Tile(128, 128, 64, 8, 3),
)
WITH_MOMENT = TILES[2]  # a third sum needs more registers
GROUP = 8  # blocks of tokens that go along the prototypes together, so that both sides stay in the L2 cache


@triton.jit
def _linear(value, steep, real):
    """Of the products or q of a tile: E = exp(score - top), top, sum E and sum score E."""
    score = tl.where(real, value * steep, LOWEST)  # a product of 0 behind may be the greatest
    top = tl.max(score, 1)
    kept = tl.exp2((score - top[:, None]) * LOG2E)
    return kept, top, tl.sum(kept, 1), tl.sum(score * kept, 1)


@triton.jit
def _powers(q, slope, floor, x_square, behind):
    """Of the q of a tile: E = (q / least)^slope, log2 of the least, and sums without the columns `behind` the last."""
    q = not_below(q, floor)
    least = tl.min(q, 1)
    top = log2(least)  # of this tile alone: E waits for no other, and is made while q is in registers
    shift = top * slope
    log = log2(q)
    weight = tl.exp2(tl.fma(log, slope, -shift[:, None]))
    kept = settled(tl.where(q > floor, weight, 0.0))  # chosen in float32: see `settled`
    weight = weight * q  # E q: p up to a factor, where E is p / q, as the gradient needs it
    # of the least q: 1 but for the rounding of the shift; divided by it, what takes all has a share of 1, exactly
    unit = tl.exp2(tl.fma(top, slope, -shift)) * least
    log_behind = log2(x_square + BEHIND)
    weight_behind = tl.exp2(tl.fma(log_behind, slope, -shift)) * (x_square + BEHIND) * behind
    total = tl.div_rn(tl.sum(weight, 1) - weight_behind, unit)
    moment = tl.sum(weight * (log - top[:, None]), 1) - weight_behind * (log_behind - top)
    return kept, top, total, tl.div_rn(moment, unit)


@triton.jit
def _scores(
    x_tiles, w_tiles, kept_tiles, local, coefficient, floors, x_squares, row_squares, targets, tops, totals, moments,
    rows, columns, padded, width,
    KIND: tl.constexpr, LINEAR: tl.constexpr, KEEP: tl.constexpr, MOMENT: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_V: tl.constexpr, BLOCK_D: tl.constexpr, GROUP: tl.constexpr, STAGES: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """One tile. tops, totals and moments (tiles along V, M): log2 of the least q, sum q E / (least q) and
    sum log2(q / least q) q E / (least q); LINEAR: the greatest score, sum E and sum score E.

    Columns behind the last have q = BEHIND + |x|^2, without a question for each score; what they add to the sums is
    taken off at the end. Their E is anything. (Linear scores are asked.)
    """
    along, across = tl.cdiv(rows, BLOCK_M), tl.cdiv(columns, BLOCK_V)
    tile = tl.program_id(0)
    first = tile // (GROUP * across) * GROUP  # GROUP blocks of tokens pass each block of prototypes while it is in L2
    size = tl.minimum(along - first, GROUP)
    block_m, block_v = first + tile % (GROUP * across) % size, tile % (GROUP * across) // size
    value = tl.zeros((BLOCK_M, BLOCK_V), tl.float32)  # rounded, a near match would lose all digits
    for k in tl.range(0, width, BLOCK_D, num_stages=STAGES):
        a = x_tiles.load([block_m * BLOCK_M, k])
        b = w_tiles.load([block_v * BLOCK_V, k])
        value = tl.dot(a, b.T, value, input_precision="ieee")  # else float32 operands would be cut to TF32
    token = block_m * BLOCK_M + tl.arange(0, BLOCK_M)
    column = block_v * BLOCK_V + tl.arange(0, BLOCK_V)
    there = token < rows
    target = tl.load(targets + token, mask=there, other=1.0)[:, None]
    at_target = column[None, :] == tl.load(local + token, mask=there, other=-1).to(tl.int32)[:, None]
    x_square = target
    if KIND == "quadratic":
        x_square = tl.load(x_squares + token, mask=there, other=1.0)
        row_square = tl.load(row_squares + column, mask=column < padded, other=BEHIND)[None, :]
        value = value * -2 + (x_square[:, None] + row_square)
    value = tl.where(at_target, target, value)
    if LINEAR:
        steep = steepness(coefficient, KIND)
        kept, top, total, moment = _linear(value, steep, (column < columns)[None, :])
    else:
        floor = tl.load(floors + token, mask=there, other=1.0)[:, None]
        behind = tl.maximum((block_v + 1) * BLOCK_V - columns, 0).to(tl.float32)
        kept, top, total, moment = _powers(value, -(tl.load(coefficient) + 1.0), floor, x_square, behind)
    if MOMENT:
        tl.store(moments + block_v * rows + token, moment, mask=there)
    if KEEP:  # what reaches beyond the last token or line, the hardware leaves out
        kept_tiles.store([block_m * BLOCK_M, block_v * BLOCK_V], kept.to(DTYPE))
    tl.store(tops + block_v * rows + token, top, mask=there)
    tl.store(totals + block_v * rows + token, total, mask=there)


def scores(
    x: Tensor,
    rows: Tensor,
    given: Given,
    targets: Tensor,
    keep: bool,
    moment: bool,
    tile: Tile | None = None,
) -> tuple[Sums, Scored | None]:
    """x (M, D) and prototypes (V, D), with `squares` that go on to whole lines -> four (M,): max s, sum exp(s - max),
    sum s exp(s - max) (0 unless `moment`) and s of the target; and E if `keep`.

    `targets` (M,): q of the target, or x . w for "dot". `tile`: None for the first of TILES, or one for a third sum.
    """
    (m, d), v = x.shape, rows.shape[0]
    tile, squares = tile or (WITH_MOMENT if moment else TILES[0]), given.squares
    kept = padded_rows(m, v if keep else 1, x.dtype, x.device)
    tiles = triton.cdiv(v, tile.prototypes)
    sums = torch.empty(3 if moment else 2, tiles, m, dtype=torch.float32, device=x.device)
    blocks = [tile.tokens, tile.entries], [tile.prototypes, tile.entries], [tile.tokens, tile.prototypes]
    steep, floor = beside(x, given.coefficient), given.floor
    described = [
        TensorDescriptor.from_tensor(t, block) for t, block in zip((x, rows, _whole(kept)), blocks, strict=True)
    ]
    launch(
        _scores, (triton.cdiv(m, tile.tokens) * tiles,), *described, given.local, steep, floor, squares and squares.x,
        squares and squares.rows, targets, sums[0], sums[1], sums[2] if moment else None, m, v,
        triton.cdiv(v, ROW_START) * ROW_START, d, KIND=given.kind, LINEAR=given.linear, KEEP=keep, MOMENT=moment,
        BLOCK_M=tile.tokens, BLOCK_V=tile.prototypes, BLOCK_D=tile.entries, GROUP=GROUP, STAGES=tile.stages,
        DTYPE=_TYPES[x.dtype], warps=tile.warps, num_stages=tile.stages,
        enable_fp_fusion=True,
    )  # fmt: skip
    return (*_combined(sums, None if given.linear else given.coefficient), _score_of(targets, given, steep)), (
        Scored(kept, sums[0], tile.prototypes) if keep else None
    )


def _combined(sums: Tensor, coefficient: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Of all tiles: the max of the scores, sum exp(s - max), sum s exp(s - max) (0 where it was not asked for).
    `coefficient`: None for linear scores.
    """
    tops, totals = sums[0], sums[1]
    if coefficient is None:
        top = tops.amax(0)
        factor = (tops - top).exp_()
        moment = torch.linalg.vecdot(factor, sums[2], dim=0) if len(sums) == 3 else torch.zeros_like(top)
        return top, torch.linalg.vecdot(factor, totals, dim=0), moment
    least = tops.amin(0)
    apart = tops - least
    factor = (apart * -coefficient).exp2_()  # from the units of a tile to those of the nearest of all
    total = torch.linalg.vecdot(factor, totals, dim=0)
    top = least * -coefficient * LN2.value
    if len(sums) == 2:
        return top, total, torch.zeros_like(top)
    logs = torch.linalg.vecdot(factor, sums[2].addcmul_(apart, totals), dim=0)
    return top, total, top * total - logs * (coefficient * LN2.value)


@triton.jit
def _target_score(
    targets, floors, coefficient, local, out, rows, KIND: tl.constexpr, LINEAR: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    token = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    there = token < rows
    score = tl.load(targets + token, mask=there, other=1.0)
    if LINEAR:
        score = score * steepness(coefficient, KIND)
    else:
        floor = tl.load(floors + token, mask=there, other=1.0)
        score = log2(not_below(score, floor)) * -tl.load(coefficient) * LN2
    here = tl.load(local + token, mask=there, other=-1) >= 0
    tl.store(out + token, tl.where(here, score, 0.0), mask=there)


def _score_of(targets: Tensor, given: Given, steep: Tensor | None) -> Tensor:
    """(M,) of the target, by the very operations of `_combined`: a token whose target takes all has loss 0."""
    out = torch.empty_like(targets)
    grid = (triton.cdiv(len(targets), 256),)
    launch(
        _target_score, grid, targets, given.floor, steep, given.local, out, len(targets), KIND=given.kind,
        LINEAR=given.linear, BLOCK=256, warps=4, enable_fp_fusion=False,
    )  # fmt: skip
    return out


_TYPES = {torch.bfloat16: tl.bfloat16, torch.float32: tl.float32}


def _whole(kept: Tensor) -> Tensor:
    """(M, V) with the padding of its rows."""
    return kept.as_strided((kept.shape[0], padded(kept)), kept.stride())


@triton.jit
def _gradients(
    kept, local, coefficient, floors, targets, tops, scores, lses, weights, owns, over_rows, over_columns, rows,
    columns, padded, stride, stretch,
    KIND: tl.constexpr, LINEAR: tl.constexpr, WIDTH: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """A stretch of tokens in a block of prototypes that lies in one tile of `_scores`: E becomes G, in place. `owns`:
    weights of the targets, None where they are `weights`.
    """
    offsets = tl.program_id(0) * BLOCK_V + tl.arange(0, BLOCK_V)
    in_row = offsets < padded
    real = (offsets < columns)[None, :]
    steep = steepness(coefficient, KIND)
    # a block is no wider than a tile of `_scores`, and lies in one: one factor for each token
    tile_tops = tops + (tl.program_id(0) * BLOCK_V // WIDTH).to(tl.int64) * rows
    column_sums = tl.zeros((BLOCK_M, BLOCK_V), tl.float32)
    first = tl.program_id(1) * stretch
    for start in range(first, tl.minimum(first + stretch, rows), BLOCK_M):
        token = start + tl.arange(0, BLOCK_M)
        there = token < rows
        inside = there[:, None] & in_row[None, :]
        at = kept + token.to(tl.int64)[:, None] * stride + offsets[None, :]
        value = tl.load(at, mask=inside, other=0.0).to(tl.float32)
        at_target = offsets[None, :] == tl.load(local + token, mask=there, other=-1).to(tl.int32)[:, None]
        lse = tl.load(lses + token, mask=there, other=0.0)
        slope = tl.load(weights + token, mask=there, other=0.0) * steep
        score = tl.load(scores + token, mask=there, other=0.0)
        top = tl.load(tile_tops + token, mask=there, other=0.0)
        if LINEAR:
            factor = tl.exp2((top - lse) * LOG2E) * slope
            target = target_gradient(score, lse, slope, None, steep, KIND, LINEAR)
        else:
            factor = tl.exp2(top * (steep - 1.0) - lse * LOG2E) * slope  # E factor = slope p / q
            floor = tl.load(floors + token, mask=there, other=1.0)
            apart = not_below(tl.load(targets + token, mask=there, other=1.0), floor)
            target = target_gradient(score, lse, slope, apart, steep, KIND, LINEAR)
        if owns is not None:
            more = slope - tl.load(owns + token, mask=there, other=0.0) * steep
            if not LINEAR:
                more = more / apart
            target += more
        if not LINEAR:
            target = tl.where(apart > floor, target, 0.0)
        grad = tl.where(at_target, target[:, None], value * factor[:, None])
        rounded = tl.where(real, grad, 0.0).to(kept.dtype.element_ty)
        tl.store(at, rounded, mask=inside)
        if KIND == "quadratic":
            summand = rounded.to(tl.float32)
            column_sums += summand
            row_sum = over_rows + token.to(tl.int64) * tl.num_programs(0) + tl.program_id(0)
            tl.store(row_sum, tl.sum(summand, 1), mask=there)
    if KIND == "quadratic":
        stretch_row = tl.program_id(1).to(tl.int64) * padded
        tl.store(over_columns + stretch_row + offsets, tl.sum(column_sums, 0), mask=in_row)


def gradients(scored: Scored, given: Given, loss: Upstream) -> tuple[Tensor | None, Tensor | None]:
    """E (M, V) becomes G, with zeros in the padding of its rows; returns its sums over rows (M,) and columns (V,), as
    rounded, for "quadratic".
    """
    kept, tops, width = scored
    m, v = kept.shape  # without the padding, which is made zeros: products read it
    block_m, block_v = TILE[0], min(TILE[1], width)
    wide, targets = padded(kept), given.squares and given.squares.target
    grid, stretch, over_rows, over_columns = partial_sums(given.kind, m, wide, block_m, block_v, kept.device)
    launch(
        _gradients, grid, kept, given.local, beside(kept, given.coefficient), given.floor, targets, tops, loss.score,
        loss.lse, loss.weight, loss.own, over_rows, over_columns, m, v, wide, kept.stride(0), stretch,
        KIND=given.kind, LINEAR=given.linear, WIDTH=width, BLOCK_M=block_m, BLOCK_V=block_v, enable_fp_fusion=True,
    )  # fmt: skip
    return summed(over_rows, over_columns, v)


def serves(x: Tensor) -> bool:
    """Whether tiles of these tokens (M, D) can be described to the hardware: rows of whole 16 bytes."""
    return x.shape[1] * x.element_size() % 16 == 0


assert ROW_START % 16 == 0, "and those of E are"
