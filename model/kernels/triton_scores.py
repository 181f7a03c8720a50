"""Triton kernels over scores (M, V): their sums per token in one pass, and their gradients in another.

Kinds: "quadratic" reads dot products and makes the squared distance q of them, "log" reads distances c, "dot" reads
products; s = -coefficient * log q, -coefficient * log c, or LINEAR: -coefficient * q, and coefficient times the product
(or as read). CAP, MORE and OPTIONS are a cap on scores, seven sums and weights of their own (eager.py): where they are
off, nothing of them is compiled. Everything is float32 but for the gradients, which may be bfloat16.

Every sum has an order that depends on the shapes alone, so the same inputs give the same bits. Offsets are 64 bits
wide, as M * V passes 2^31. Block sizes were reasoned (bytes in flight, registers), not measured.

Legend: M tokens of a chunk, V prototypes on this rank.
"""

# Annotations must stay objects here: Triton's interpreter reads `tl.constexpr` from them.

from contextlib import nullcontext
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .eager import FLOOR_MARGIN, Given, Squares, Sums, Upstream
from .triton_functions import LN2, LOG2E, log2, not_below, tanh

WARPS = 8
LOWEST = tl.constexpr(-3e38)  # no score is lower
PROGRAMS = 2048  # about four times what the 132 multiprocessors of an H100 hold at once: no long last wave
COLUMNS, ROUNDS = 1024, 4  # of a row that a program reads at a time for the sums: 64 bytes per thread
TILE = (16, 256)  # tokens and prototypes that a program reads at a time for the gradient: 64 bytes per thread
ROW_START = 64  # entries: rows of scores and of prototypes start on lines of 128 bytes, as the fastest products ask for


def launch(kernel: Any, grid: tuple[int, ...], *arguments: Any, warps: int = WARPS, **options: Any) -> None:
    """Runs a kernel on the device of its first tensor, in that device's current stream."""
    first = next(argument for argument in arguments if isinstance(argument, Tensor))
    with torch.cuda.device_of(first) if first.is_cuda else nullcontext():
        kernel[grid](*arguments, num_warps=warps, **options)


@triton.jit
def _distance(value, x_square, row_square, floor, KIND: tl.constexpr, LINEAR: tl.constexpr):
    """c or q, not below its floor; NaN stays NaN."""
    if KIND == "quadratic":
        value = value * -2 + (x_square + row_square)
    if not LINEAR:
        value = not_below(value, floor)
    return value


@triton.jit
def steepness(coefficient, KIND: tl.constexpr):
    """Of the scores by what is kept; `coefficient`: where it lies, or None for 1."""
    steep = 1.0
    if coefficient is not None:
        steep = tl.load(coefficient)
        if KIND != "dot":
            steep = -steep
    return steep


@triton.jit
def _score(value, distance, steep, KIND: tl.constexpr, LINEAR: tl.constexpr):
    """In base 2, as the hardware's lg2 and ex2 are, and the logarithm of c or q in it (LINEAR: anything)."""
    log = distance
    if KIND == "log":
        log = value
    elif not LINEAR:
        log = log2(distance)
    score = distance * (steep * LOG2E) if LINEAR else steep * log
    return score, log


@triton.jit
def _capped(score, steep, cap, lift):
    """A score in base 2 with its cap, its u = n ds/dn, and the slope of the cap."""
    raw = score * LN2 + steep * lift
    bent, slope = tanh(raw / cap)
    return bent * (cap * LOG2E), slope * (raw * LOG2E), slope


@triton.jit
def _statistics(
    values, local, coefficient, floors, x_squares, row_squares, targets, sums, columns, padded, stride, segment, cap,
    lift, KIND: tl.constexpr, LINEAR: tl.constexpr, CAP: tl.constexpr, MORE: tl.constexpr, ROUNDS: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """One token and a segment of its row: the max of the scores, sum exp(s - max), sum u exp(s - max), s of the target;
    and with MORE sum s, u of the target, sum u. sums (4 or 7, M, segments).

    ROUNDS x BLOCK numbers are read at a time, a thread's own below one another, and every column of the block has a
    running max and running sums: a reduction over threads comes once, at the end.
    """
    row = tl.program_id(0).to(tl.int64)
    first = tl.program_id(1) * segment
    last = tl.minimum(first + segment, padded)
    target_column = tl.load(local + row).to(tl.int32)  # as wide as the offsets that it is compared with
    lanes = tl.arange(0, ROUNDS)[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    steep = steepness(coefficient, KIND)
    floor = 0.0 if LINEAR else tl.load(floors + row)
    x_square = tl.load(x_squares + row) if KIND == "quadratic" else 0.0
    target = tl.load(targets + row) if KIND == "quadratic" else 0.0
    target_score, target_share = 0.0, 0.0
    top = tl.full((1, BLOCK), LOWEST, tl.float32)
    total = tl.zeros((1, BLOCK), tl.float32)
    moment, every, shares = total, total, total
    for start in range(first, last, ROUNDS * BLOCK):
        offsets = start + lanes
        value = tl.load(values + row * stride + offsets, mask=offsets < last, other=1.0)  # of which the logarithm is 0
        at_target = offsets == target_column
        if KIND == "quadratic":
            row_square = tl.load(row_squares + offsets, mask=offsets < last, other=1.0)
            value = value * -2 + (x_square + row_square)
            value = tl.where(at_target, target, value)  # its own difference: no digits cancelled
        value = value if LINEAR else log2(not_below(value, floor))
        if KIND == "log":
            tl.store(values + row * stride + offsets, value * LN2, mask=offsets < last)
        score = value * (steep * LOG2E) if LINEAR else steep * value
        share = score
        if CAP:
            score, share, _ = _capped(score, steep, cap, lift)
        if (target_column >= start) & (target_column < start + ROUNDS * BLOCK):
            target_score = tl.sum(tl.where(at_target, score, 0.0))  # over all threads, in this one block
            target_share = tl.sum(tl.where(at_target, share, 0.0))
        real = offsets < columns  # `last` may lie behind the last prototype, in the padding of the row
        share = tl.where(real, share, 0.0 if CAP else LOWEST)
        if MORE:
            every += tl.sum(tl.where(real, score, 0.0), 0)[None, :]
            shares += tl.sum(tl.where(real, share, 0.0), 0)[None, :]
        score = tl.where(real, score, LOWEST)
        new_top = tl.maximum(top, tl.max(score, 0)[None, :])  # sums are scaled down to it: arXiv:1805.02867
        weight = tl.where(real, tl.exp2(score - new_top), 0.0)  # 1 where all were LOWEST so far, hence the mask
        scale = tl.exp2(top - new_top)
        total = total * scale + tl.sum(weight, 0)[None, :]
        moment = moment * scale + tl.sum(share * weight, 0)[None, :]
        top = new_top
    _store_sums(sums, top, total, moment, target_score, every, target_share, shares, MORE)


@triton.jit
def _store_sums(sums, top, total, moment, target_score, every, target_share, shares, MORE: tl.constexpr):
    """What a program of `_statistics` found, out of base 2: one factor a token here, not each."""
    highest = tl.max(top)
    scale = tl.exp2(top - highest)
    out = sums + tl.program_id(0).to(tl.int64) * tl.num_programs(1) + tl.program_id(1)
    plane = tl.num_programs(0).to(tl.int64) * tl.num_programs(1)
    tl.store(out, highest * LN2)
    tl.store(out + plane, tl.sum(total * scale))
    tl.store(out + 2 * plane, tl.sum(moment * scale) * LN2)
    tl.store(out + 3 * plane, target_score * LN2)
    if MORE:
        tl.store(out + 4 * plane, tl.sum(every) * LN2)
        tl.store(out + 5 * plane, target_share * LN2)
        tl.store(out + 6 * plane, tl.sum(shares) * LN2)


def statistics(values: Tensor, given: Given, block: int | None = None, segments: int | None = None) -> Sums:
    """As eager.statistics, but for dot products, which stay as they are. A row is read by `segments` programs, `block`
    columns at a time (None: chosen by the shape).
    """
    m, v = _shape(values)
    squares = given.squares or Squares(None, None, None)  # type: ignore[arg-type]
    block = block or min(COLUMNS, triton.next_power_of_2(v))
    rounds = min(ROUNDS, triton.cdiv(triton.next_power_of_2(v), block))
    # few tokens: several programs share a row, but no segment is shorter than what one reads at a time
    segments = segments or min(triton.cdiv(PROGRAMS, max(1, m)), triton.cdiv(v, rounds * block))
    segment = triton.cdiv(triton.cdiv(v, segments), rounds * block) * rounds * block
    sums = values.new_empty(7 if given.more else 4, m, triton.cdiv(v, segment))
    launch(
        _statistics, (m, sums.shape[2]), values, given.local, beside(values, given.coefficient), given.floor,
        squares.x, squares.rows, squares.target, sums, v, padded(values), values.stride(0), segment,
        given.cap or 0.0, given.lift, KIND=given.kind, LINEAR=given.linear, CAP=given.cap is not None,
        MORE=given.more, ROUNDS=rounds, BLOCK=block,
        enable_fp_fusion=False,  # else s - max would not be 0 where s is the max, nor log p where p is 1
    )  # fmt: skip
    if sums.shape[2] == 1:
        return tuple(sums[:, :, 0])
    tops, totals, moments, *rest = sums
    return *combined(tops, totals, moments, dim=1), *(part.sum(1) for part in rest)


def combined(tops: Tensor, totals: Tensor, moments: Tensor, dim: int) -> tuple[Tensor, Tensor, Tensor]:
    """One max, sum exp(s - max) and sum s exp(s - max) of those of several parts, which lie along `dim`."""
    top = tops.amax(dim)
    scale = (tops - top.unsqueeze(dim)).exp_()
    return top, torch.linalg.vecdot(totals, scale, dim=dim), torch.linalg.vecdot(moments, scale, dim=dim)


@triton.jit
def target_gradient(score, lse, slope, apart, steep, KIND: tl.constexpr, LINEAR: tl.constexpr):
    """G at the target of a token: slope * (p - 1) / c, with slope = weight * ds / d log c (LINEAR: ds / dvalue, without
    c). p is exactly 1 where the score is the log-sum-exp.
    """
    wrong = (tl.exp2((score - lse) * LOG2E) - 1.0) * slope
    if (KIND == "quadratic") and (not LINEAR):
        wrong = wrong / apart
    if KIND == "log":
        wrong = wrong * tl.exp2(score * LOG2E / -steep)
    return wrong


@triton.jit
def _plain_tile(
    value, distance, at_target, lse, slope, score, apart, floor, steep, MARGIN: tl.constexpr, KIND: tl.constexpr,
    LINEAR: tl.constexpr,
):  # fmt: skip
    """G = slope * (p - onehot) / c of a tile, slope = weight * ds / d log c; 0 within MARGIN of the floor's log q, as
    the plain form says.
    """
    least = floor * (1.0 + MARGIN)
    lse2 = (lse * LOG2E)[:, None]
    target = target_gradient(score, lse, slope, apart, steep, KIND, LINEAR)
    if LINEAR:
        grad = tl.exp2(distance * (steep * LOG2E) - lse2) * slope[:, None]
    elif KIND == "quadratic":
        target = tl.where(apart <= least, 0.0, target)
        grad = tl.exp2((steep - 1.0) * log2(distance) - lse2) * slope[:, None]  # p / q
        grad = tl.where(distance <= least[:, None], 0.0, grad)  # a constant has no slope
    else:
        least = log2(floor) * LN2 + MARGIN
        target = tl.where(score / steep <= least, 0.0, target)
        grad = tl.exp2((steep - 1.0) * (value * LOG2E) - lse2) * slope[:, None]
        grad = tl.where(value <= least[:, None], 0.0, grad)
    return tl.where(at_target, target[:, None], grad)


@triton.jit
def _shaped_tile(
    value, distance, lse, slope, less, floor, steep, cap, lift, MARGIN: tl.constexpr, KIND: tl.constexpr,
    LINEAR: tl.constexpr, CAP: tl.constexpr,
):  # fmt: skip
    """G = (slope p - less) / c of a tile, `less` (tokens, prototypes), times the slope of a cap; `distance`: c of the
    target by its own difference too.
    """
    score, log = _score(value * LOG2E, distance, steep, KIND, LINEAR)
    bend = 1.0
    if CAP:
        score, _, bend = _capped(score, steep, cap, lift)
    score -= (lse * LOG2E)[:, None]
    if not LINEAR:
        score -= log  # p / c by one exponential
        less = less * tl.exp2(-log)
    grad = (tl.exp2(score) * slope[:, None] - less) * bend
    if KIND == "log":
        grad = tl.where(value <= (log2(floor) * LN2 + MARGIN)[:, None], 0.0, grad)
    elif not LINEAR:
        grad = tl.where(distance <= (floor * (1.0 + MARGIN))[:, None], 0.0, grad)
    return grad


@triton.jit
def _gradients(
    values, local, coefficient, floors, x_squares, row_squares, targets, scores, lses, weights, owns, uniforms, out,
    over_rows, over_columns, rows, columns, padded, stride, out_stride, stretch, cap, lift, MARGIN: tl.constexpr,
    KIND: tl.constexpr, LINEAR: tl.constexpr, CAP: tl.constexpr, OPTIONS: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_V: tl.constexpr,
):  # fmt: skip
    """A stretch of tokens in a block of prototypes, tile by tile: G = weight * (p - onehot) * ds/dvalue, or with
    OPTIONS (weight p - own onehot - uniform) * ds/dvalue, rounded, 0 in columns beyond the last prototype; and for
    "quadratic" its sums, over_rows (M, column blocks), over_columns (stretches, V): of G as rounded, since
    dx = 2 (x sum G - G w) cancels near a match.
    """
    offsets = tl.program_id(0) * BLOCK_V + tl.arange(0, BLOCK_V)
    in_row, real = offsets < padded, (offsets < columns)[None, :]
    steep = steepness(coefficient, KIND)
    if KIND == "quadratic":
        row_square = tl.load(row_squares + offsets, mask=in_row, other=1.0)[None, :]
    column_sums = tl.zeros((BLOCK_M, BLOCK_V), tl.float32)
    first = tl.program_id(1) * stretch
    for start in range(first, tl.minimum(first + stretch, rows), BLOCK_M):
        token = start + tl.arange(0, BLOCK_M)
        there = token < rows
        inside = there[:, None] & in_row[None, :]
        wide = token.to(tl.int64)[:, None]
        value = tl.load(values + wide * stride + offsets[None, :], mask=inside, other=1.0)
        at_target = offsets[None, :] == tl.load(local + token, mask=there, other=-1).to(tl.int32)[:, None]
        lse = tl.load(lses + token, mask=there, other=0.0)
        slope = tl.load(weights + token, mask=there, other=0.0) * steep
        floor = lse if LINEAR else tl.load(floors + token, mask=there, other=1.0)
        distance, apart = value, lse
        if KIND == "quadratic":
            apart = tl.load(targets + token, mask=there, other=1.0)
            apart = apart if LINEAR else not_below(apart, floor)
            x_square = tl.load(x_squares + token, mask=there, other=1.0)[:, None]
            distance = _distance(value, x_square, row_square, floor[:, None], KIND, LINEAR)
        if OPTIONS:
            own = tl.load(owns + token, mask=there, other=0.0) * steep
            less = tl.where(at_target, own[:, None], 0.0)
            if uniforms is not None:
                less += (tl.load(uniforms + token, mask=there, other=0.0) * steep)[:, None]
            distance = tl.where(at_target, apart[:, None], distance) if KIND == "quadratic" else distance
            grad = _shaped_tile(value, distance, lse, slope, less, floor, steep, cap, lift, MARGIN, KIND, LINEAR, CAP)
        else:
            score = tl.load(scores + token, mask=there, other=0.0)
            grad = _plain_tile(value, distance, at_target, lse, slope, score, apart, floor, steep, MARGIN, KIND, LINEAR)
        rounded = tl.where(real, grad, 0.0).to(out.dtype.element_ty)  # zeros behind: products read them
        tl.store(out + wide * out_stride + offsets[None, :], rounded, mask=inside)
        if KIND == "quadratic":
            summand = tl.where(there[:, None], rounded.to(tl.float32), 0.0)
            column_sums += summand  # in registers over the whole stretch; over threads once, at the end
            row_sum = over_rows + token.to(tl.int64) * tl.num_programs(0) + tl.program_id(0)
            tl.store(row_sum, tl.sum(summand, 1), mask=there)
    if KIND == "quadratic":
        tl.store(over_columns + tl.program_id(1).to(tl.int64) * padded + offsets, tl.sum(column_sums, 0), mask=in_row)


def gradients(
    values: Tensor,
    given: Given,
    loss: Upstream,
    out: Tensor,
    tile: tuple[int, int] | None = None,
    stretch: int | None = None,
) -> tuple[Tensor | None, Tensor | None]:
    """Writes G (M, V) to `out`, which may be `values`, with zeros in the padding of its rows; returns its sums over
    rows (M,) and columns (V,), as rounded, for "quadratic".

    `tile`: tokens and prototypes read at a time; `stretch`: tokens of a program (None: chosen by the shape).
    """
    assert loss.score is not None, "these kernels do not look for the target's score among the others"
    m, v = _shape(values)
    squares = given.squares or Squares(None, None, None)  # type: ignore[arg-type]
    options = loss.own is not None or given.cap is not None
    block_m, block_v = tile or TILE
    wide = min(padded(values), padded(out))  # where either has no padding, neither is touched behind V
    grid, stretch, over_rows, over_columns = partial_sums(given.kind, m, wide, block_m, block_v, values.device, stretch)
    launch(
        _gradients, grid, values, given.local, beside(values, given.coefficient), given.floor,
        squares.x, squares.rows, squares.target, loss.score, loss.lse, loss.weight,
        loss.weight if loss.own is None else loss.own, loss.uniform, out, over_rows, over_columns, m, v, wide,
        values.stride(0), out.stride(0), stretch, given.cap or 0.0, given.lift, MARGIN=FLOOR_MARGIN, KIND=given.kind,
        LINEAR=given.linear, CAP=given.cap is not None, OPTIONS=options, BLOCK_M=block_m, BLOCK_V=block_v,
        enable_fp_fusion=False,  # else p would not be 1 where it is
    )  # fmt: skip
    return summed(over_rows, over_columns, v)


def summed(over_rows: Tensor, over_columns: Tensor, columns: int) -> tuple[Tensor | None, Tensor | None]:
    """(M,) and (columns,) from what the programs of a pass left in `partial_sums`; None where there is nothing."""
    return (over_rows.sum(1), over_columns.sum(0)[:columns]) if over_rows.shape[1] else (None, None)


def partial_sums(
    kind: str, m: int, columns: int, block_m: int, block_v: int, device: torch.device, stretch: int | None = None
) -> tuple[tuple[int, int], int, Tensor, Tensor]:
    """The grid of a pass that makes G (M, columns), tokens of a program (None: so many that there are about PROGRAMS of
    them), and where programs leave their sums over rows (M, column blocks) and columns (stretches, columns) of
    "quadratic" (empty otherwise).
    """
    blocks = triton.cdiv(columns, block_v)
    if stretch is None:  # each leaves a row of sums over columns: no more of them than keep a GPU busy
        stretch = triton.cdiv(triton.cdiv(m, max(1, PROGRAMS // blocks)), block_m) * block_m
    stretches = triton.cdiv(m, stretch) if m else 0
    summed = kind == "quadratic"
    over_rows = torch.empty(m, blocks if summed else 0, dtype=torch.float32, device=device)
    over_columns = torch.empty(stretches, columns if summed else 0, dtype=torch.float32, device=device)
    return (blocks, stretches), stretch, over_rows, over_columns


def padded(values: Tensor) -> int:
    """How many columns of (M, V) may be read and written: with those up to a multiple of ROW_START, where rows have
    them (`padded_rows`), a thread reads 16 bytes at a time whatever V is.
    """
    v, stride = values.shape[1], values.stride(0)
    return triton.cdiv(v, ROW_START) * ROW_START if stride % ROW_START == 0 else v


def padded_rows(m: int, v: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """(M, V), uninitialised, with rows that start on a multiple of ROW_START entries."""
    return torch.empty(m, triton.cdiv(v, ROW_START) * ROW_START, dtype=dtype, device=device)[:, :v]


def beside(values: Tensor, number: Tensor | None) -> Tensor | None:
    """The number where the kernels can read it: an exponent may have been left on the host."""
    return number if number is None else number.to(values.device, torch.float32, non_blocking=True)


def _shape(values: Tensor) -> tuple[int, int]:
    m, v = values.shape
    assert values.dtype == torch.float32 and (v == 1 or values.stride(1) == 1), "the kernels read rows of float32"
    return m, v
