"""Triton kernels over scores (M, V): their sums per token in one pass, and their gradients in another.

Kinds: "quadratic" reads dot products and makes the squared distance q of them, "log" reads distances c, "dot" reads
the scores themselves; s = -coefficient * log q, -coefficient * log c, or as read. Everything is float32 but for the
gradients, which may be bfloat16.

Every sum has an order that depends on the shapes alone, so the same inputs give the same bits. Offsets are 64 bits
wide, as M * V passes 2^31. Block sizes were reasoned (bytes in flight, registers), not measured.

Legend: M tokens of a chunk, V prototypes on this rank.
"""

# Annotations must stay objects here: Triton's interpreter reads `tl.constexpr` from them.

from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from model.kernels.eager import FLOOR_MARGIN, Squares

WARPS = 8
ABSENT = tl.constexpr(-1e38)  # the score of a column beyond the row: exp gives 0, and 0 times it is 0
PROGRAMS = 2048  # about four times what the 132 multiprocessors of an H100 hold at once: no long last wave
COLUMNS = 2048  # of a row that a program reads at a time for the sums: 32 bytes per thread
TILE = (16, 256)  # tokens and prototypes that a program reads at a time for the gradient: 64 bytes per thread


def launch(kernel: Any, grid: tuple[int, ...], *arguments: Any, **options: Any) -> None:
    """Runs a kernel on the device of its first argument, in that device's current stream."""
    first: Tensor = arguments[0]
    with torch.cuda.device_of(first) if first.is_cuda else nullcontext():
        kernel[grid](*arguments, num_warps=WARPS, **options)


class Given(NamedTuple):
    """What the kernels read beside the values (M, V); None where the kind has none."""

    local: Tensor  # (M,) the target's column, -1 where it is not here
    coefficient: Tensor | None = None  # one element
    floor: Tensor | None = None  # (M,)
    squares: Squares | None = None  # its floor is `floor`


@triton.jit
def _distance(value, x_square, row_square, target, floor, at_target, KIND: tl.constexpr):
    """c or q, not below its floor; NaN stays NaN, as tl.maximum would not leave it."""
    if KIND == "quadratic":
        value = value * -2 + x_square + row_square
        value = tl.where(at_target, target, value)
    return tl.where(value < floor, floor, value)


@triton.jit
def _statistics(
    values,
    local,
    coefficient,
    floors,
    x_squares,
    row_squares,
    targets,
    sums,
    columns,
    stride,
    segment,
    KIND: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One token and a segment of its row: the max of the scores, sum exp(s - max), sum s exp(s - max), s of the target.

    sums (4, M, segments). The running sums are as wide as a block and scaled by exp(old max - new max), so that a block
    costs one reduction.
    """
    row = tl.program_id(0).to(tl.int64)
    first = tl.program_id(1) * segment
    last = tl.minimum(first + segment, columns)
    target_column = tl.load(local + row).to(tl.int32)
    if KIND != "dot":
        steep = -tl.load(coefficient)
        floor = tl.load(floors + row)
    if KIND == "quadratic":
        x_square = tl.load(x_squares + row)
        target = tl.load(targets + row)
    top = ABSENT
    target_score = 0.0
    total = tl.zeros((BLOCK,), tl.float32)
    moment = tl.zeros((BLOCK,), tl.float32)
    for start in range(first, last, BLOCK):
        offsets = start + tl.arange(0, BLOCK)
        inside = offsets < last
        at_target = offsets == target_column
        score = tl.load(values + row * stride + offsets, mask=inside, other=1.0)
        if KIND == "quadratic":
            row_square = tl.load(row_squares + offsets, mask=inside, other=1.0)
            score = steep * tl.log(_distance(score, x_square, row_square, target, floor, at_target, KIND))
        if KIND == "log":
            log = tl.log(_distance(score, 0, 0, 0, floor, at_target, KIND))
            tl.store(values + row * stride + offsets, log, mask=inside)
            score = steep * log
        if (target_column >= start) & (target_column < start + BLOCK):
            target_score = tl.sum(tl.where(at_target, score, 0.0), 0)
        score = tl.where(inside, score, ABSENT)
        new_top = tl.maximum(top, tl.max(score, 0))
        scale = tl.exp(top - new_top)
        weight = tl.exp(score - new_top)
        total = total * scale + weight
        moment = moment * scale + score * weight
        top = new_top
    out = sums + row * tl.num_programs(1) + tl.program_id(1)
    plane = tl.num_programs(0).to(tl.int64) * tl.num_programs(1)
    tl.store(out, top)
    tl.store(out + plane, tl.sum(total, 0))
    tl.store(out + 2 * plane, tl.sum(moment, 0))
    tl.store(out + 3 * plane, target_score)


def statistics(
    kind: str, values: Tensor, given: Given, block: int | None = None, segments: int | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(M, V) -> four (M,): max s, sum exp(s - max), sum s exp(s - max), s of the target (0 where it is not here).

    "log" writes log c over the values. A row is read by `segments` programs, `block` columns at a time (None: chosen
    by the shape).
    """
    m, v = _shape(values)
    squares = given.squares or Squares(None, None, None, None)  # type: ignore[arg-type]
    block = block or min(COLUMNS, triton.next_power_of_2(v))
    segments = segments or min(triton.cdiv(PROGRAMS, max(1, m)), triton.cdiv(v, block))
    segment = triton.cdiv(triton.cdiv(v, segments), block) * block
    sums = values.new_empty(4, m, triton.cdiv(v, segment))
    launch(
        _statistics, (m, sums.shape[2]), values, given.local, _beside(values, given.coefficient), given.floor,
        squares.x, squares.rows, squares.target, sums, v, values.stride(0), segment, KIND=kind, BLOCK=block,
        enable_fp_fusion=False,  # else s - max would not be 0 where s is the max, nor log p where p is 1
    )  # fmt: skip
    tops, totals, moments, targets = sums
    if sums.shape[2] == 1:
        return tops[:, 0], totals[:, 0], moments[:, 0], targets[:, 0]
    top = tops.amax(1)
    scale = (tops - top[:, None]).exp_()
    return top, totals.mul_(scale).sum(1), moments.mul_(scale).sum(1), targets.sum(1)


@triton.jit
def _gradients(
    values,
    local,
    coefficient,
    floors,
    x_squares,
    row_squares,
    targets,
    lses,
    weights,
    out,
    over_rows,
    over_columns,
    rows,
    columns,
    stride,
    out_stride,
    stretch,
    MARGIN: tl.constexpr,
    KIND: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """A stretch of tokens in a block of prototypes, tile by tile: G = weight * (p - onehot) * ds/dvalue, rounded.

    "quadratic" leaves the sums of the rounded G too: over_rows (M, column blocks), over_columns (stretches, V).
    """
    offsets = tl.program_id(0) * BLOCK_V + tl.arange(0, BLOCK_V)
    in_row = offsets < columns
    if KIND != "dot":
        steep = -tl.load(coefficient)
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
        onehot = tl.where(at_target, 1.0, 0.0)
        lse = tl.load(lses + token, mask=there, other=0.0)[:, None]
        weight = tl.load(weights + token, mask=there, other=0.0)[:, None]
        if KIND == "dot":
            grad = (tl.exp(value - lse) - onehot) * weight
        else:
            floor = tl.load(floors + token, mask=there, other=1.0)[:, None]
            if KIND == "quadratic":
                x_square = tl.load(x_squares + token, mask=there, other=1.0)[:, None]
                target = tl.load(targets + token, mask=there, other=1.0)[:, None]
                distance = _distance(value, x_square, row_square, target, floor, at_target, KIND)
                log = tl.log(distance)
                inverse = 1.0 / distance
            else:
                log = value
                inverse = tl.exp(-log)
            grad = (tl.exp(steep * log - lse) - onehot) * inverse * (steep * weight)
            grad = tl.where(log <= tl.log(floor) + MARGIN, 0.0, grad)
        rounded = grad.to(out.dtype.element_ty)
        tl.store(out + wide * out_stride + offsets[None, :], rounded, mask=inside)
        if KIND == "quadratic":
            summand = tl.where(inside, rounded.to(tl.float32), 0.0)
            column_sums += summand
            row_sum = over_rows + token.to(tl.int64) * tl.num_programs(0) + tl.program_id(0)
            tl.store(row_sum, tl.sum(summand, 1), mask=there)
    if KIND == "quadratic":
        stretch_row = tl.program_id(1).to(tl.int64) * columns
        tl.store(over_columns + stretch_row + offsets, tl.sum(column_sums, 0), mask=in_row)


def gradients(
    kind: str,
    values: Tensor,
    given: Given,
    lse: Tensor,
    weight: Tensor,
    out: Tensor,
    tile: tuple[int, int] | None = None,
    stretch: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Writes G (M, V) to `out`, which may be `values`; returns its sums over rows (M,) and columns (V,), as rounded,
    for "quadratic" (empty otherwise).

    `tile`: tokens and prototypes read at a time; `stretch`: tokens of a program (None: chosen by the shape).
    """
    m, v = _shape(values)
    squares = given.squares or Squares(None, None, None, None)  # type: ignore[arg-type]
    block_m, block_v = tile or TILE
    column_blocks = triton.cdiv(v, block_v)
    if stretch is None:
        stretch = triton.cdiv(triton.cdiv(m, max(1, PROGRAMS // column_blocks)), block_m) * block_m
    stretches = triton.cdiv(m, stretch) if m else 0
    summed = kind == "quadratic"
    over_rows = values.new_empty(m, column_blocks if summed else 0)
    over_columns = values.new_empty(stretches, v if summed else 0)
    launch(
        _gradients, (column_blocks, stretches), values, given.local, _beside(values, given.coefficient), given.floor,
        squares.x, squares.rows, squares.target, lse, weight, out, over_rows, over_columns, m, v,
        values.stride(0), out.stride(0), stretch, MARGIN=FLOOR_MARGIN, KIND=kind, BLOCK_M=block_m, BLOCK_V=block_v,
        enable_fp_fusion=False,  # else p would not be 1 where it is
    )  # fmt: skip
    return over_rows.sum(1), over_columns.sum(0)


def _beside(values: Tensor, number: Tensor | None) -> Tensor | None:
    """The number where the kernels can read it: an exponent may have been left on the host."""
    return number if number is None else number.to(values.device, torch.float32, non_blocking=True)


def _shape(values: Tensor) -> tuple[int, int]:
    m, v = values.shape
    assert values.dtype == torch.float32 and (v == 1 or values.stride(1) == 1), "the kernels read rows of float32"
    return m, v
