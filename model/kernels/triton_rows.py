"""Triton kernels over rows (N, D), one row a program: what both sides are before they meet, and their gradients after.

Each reads and writes every number once: rows are scaled, brought to length 1 if asked, rounded and squared in one pass;
their gradient is finished in another. Sums are float32 in an order that depends on D alone.

Legend: N rows, D width.
"""

# Annotations must stay objects here: Triton's interpreter reads `tl.constexpr` from them.

import torch
import triton
import triton.language as tl
from torch import Tensor

from .triton_scores import launch

WIDEST = 4096  # entries that a program holds at a time


@triton.jit
def _whole(rows, row, width, scale, BLOCK: tl.constexpr):
    """The largest entry of a row, 1 for a row of zeros, and the length of the row divided by it: squares of its own
    entries would overflow, or vanish.
    """
    largest = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, width, BLOCK):
        at = start + tl.arange(0, BLOCK)
        entries = tl.load(rows + row * width + at, mask=at < width, other=0.0).to(tl.float32) * scale
        largest = tl.maximum(largest, tl.abs(entries), propagate_nan=tl.PropagateNan.ALL)
    most = tl.max(largest, 0)
    most = tl.where(most > 0, most, 1.0)
    squares = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, width, BLOCK):
        at = start + tl.arange(0, BLOCK)
        entries = tl.load(rows + row * width + at, mask=at < width, other=0.0).to(tl.float32) * scale / most
        squares += entries * entries
    length = tl.sqrt_rn(tl.sum(squares, 0))  # rounded to nearest, as plain PyTorch's: Triton's own is approximate
    return most, tl.where(length == 0, 1.0, length)


@triton.jit
def _prepare(
    rows, scales, out, squares, width, SCALED: tl.constexpr, SCALE_STRIDE: tl.constexpr, UNIT: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """rows * scale, of length 1 if UNIT, as rounded to `out`, and the squared norms of what was rounded."""
    row = tl.program_id(0).to(tl.int64)
    scale = 1.0
    if SCALED:
        scale = tl.load(scales + row * SCALE_STRIDE)
    most, length = 1.0, 1.0
    if UNIT:
        most, length = _whole(rows, row, width, scale, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, width, BLOCK):
        at = start + tl.arange(0, BLOCK)
        entries = tl.load(rows + row * width + at, mask=at < width, other=0.0).to(tl.float32) * scale
        if UNIT:
            entries = tl.div_rn(tl.div_rn(entries, most), length)  # one after the other: their product may overflow
        rounded = entries.to(out.dtype.element_ty)
        tl.store(out + row * width + at, rounded, mask=at < width)
        total += rounded.to(tl.float32) * rounded.to(tl.float32)  # as rounded: q is made of what the product reads
    tl.store(squares + row, tl.sum(total, 0))


def prepare(rows: Tensor, scale: Tensor | None, unit: bool, out: Tensor, squares: Tensor) -> None:
    """Fills `out` (N, D) with rows * scale (scale: one number, or (N, 1)), of length 1 if `unit`, and `squares` (N,)
    with the squared norms of what it holds.
    """
    n, d = rows.shape
    assert rows.is_contiguous() and out.is_contiguous(), "rows are read one behind the other"
    if n:
        launch(
            _prepare, (n,), rows, scale, out, squares, d, SCALED=scale is not None,
            SCALE_STRIDE=0 if scale is None or scale.numel() == 1 else 1, UNIT=unit, BLOCK=_block(d), warps=_warps(d),
            enable_fp_fusion=True,
        )  # fmt: skip


@triton.jit
def _finished(total, rows, row, width, at, twice_sum, SUMMED: tl.constexpr):
    """2 (sum * row - total), or total."""
    entries = tl.load(total + row * width + at, mask=at < width, other=0.0)
    if SUMMED:
        prepared = tl.load(rows + row * width + at, mask=at < width, other=0.0).to(tl.float32)
        entries = prepared * twice_sum - entries * 2
    return entries


@triton.jit
def _finish(
    total, rows, sums, source, scales, out, width, SUMMED: tl.constexpr, SCALED: tl.constexpr,
    SCALE_STRIDE: tl.constexpr, UNIT: tl.constexpr, MOST: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The gradient of the rows that `_prepare` was given, from the product G w or G' x of the chunk."""
    row = tl.program_id(0).to(tl.int64)
    twice_sum = 0.0
    if SUMMED:
        twice_sum = tl.load(sums + row) * 2
    scale = 1.0
    if SCALED:
        scale = tl.load(scales + row * SCALE_STRIDE)
    most, length, along, zero = 1.0, 1.0, 0.0, False
    if UNIT:
        most, length = _whole(source, row, width, 1.0, BLOCK)
        dots = tl.zeros((BLOCK,), tl.float32)
        sizes = tl.zeros((BLOCK,), tl.float32)
        for start in range(0, width, BLOCK):
            at = start + tl.arange(0, BLOCK)
            entries = tl.load(source + row * width + at, mask=at < width, other=0.0).to(tl.float32)
            dots += entries / most / length * _finished(total, rows, row, width, at, twice_sum, SUMMED)
            sizes += tl.abs(entries)  # not `most`, which is 1 for a row of zeros
        along = tl.sum(dots, 0)
        zero = tl.sum(sizes, 0) == 0
    for start in range(0, width, BLOCK):
        at = start + tl.arange(0, BLOCK)
        grad = _finished(total, rows, row, width, at, twice_sum, SUMMED)
        if UNIT:
            entries = tl.load(source + row * width + at, mask=at < width, other=0.0).to(tl.float32)
            grad = (grad - entries / most / length * along) / length / most
            grad = tl.where(zero, 0.0, tl.clamp(grad, -MOST, MOST, propagate_nan=tl.PropagateNan.ALL))
        if SCALED:
            # of the tiniest of rows it passes the largest number, and stays there; NaN is told
            grad = tl.clamp(grad * scale, -MOST, MOST, propagate_nan=tl.PropagateNan.ALL)
        tl.store(out + row * width + at, grad.to(out.dtype.element_ty), mask=at < width)


def finish(
    total: Tensor,
    rows: Tensor,
    sums: Tensor | None,
    source: Tensor,
    scale: Tensor | None,
    unit: bool,
    out: Tensor,
) -> None:
    """As eager.finish."""
    if sums is None and scale is None and not unit:
        if out.data_ptr() != total.data_ptr():
            out.copy_(total)
        return
    source = source.contiguous() if unit else rows
    n, d = total.shape
    assert all(t.is_contiguous() for t in (total, rows, source, out)), "rows are read one behind the other"
    if n:
        launch(
            _finish, (n,), total, rows, sums, source, scale, out, d, SUMMED=sums is not None, SCALED=scale is not None,
            SCALE_STRIDE=0 if scale is None or scale.numel() == 1 else 1, UNIT=unit, MOST=torch.finfo(out.dtype).max,
            BLOCK=_block(d), warps=_warps(d), enable_fp_fusion=True,
        )  # fmt: skip


@triton.jit
def _meet(x, w, local, out, width, PRODUCT: tl.constexpr, BLOCK: tl.constexpr):
    """|x - w|^2, or x . w, of a token and its target; 0 where that is not here."""
    row = tl.program_id(0).to(tl.int64)
    target = tl.load(local + row)
    total = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, width, BLOCK):
        at = start + tl.arange(0, BLOCK)
        inside = (at < width) & (at * 0 + target >= 0)  # `at * 0`: the one number as a mask of the block's shape
        a = tl.load(x + row * width + at, mask=inside, other=0.0).to(tl.float32)
        b = tl.load(w + target * width + at, mask=inside, other=0.0).to(tl.float32)
        if PRODUCT:
            total += a * b
        else:
            total += (a - b) * (a - b)
    tl.store(out + row, tl.sum(total, 0))


def to_targets(x: Tensor, w: Tensor, local: Tensor, product: bool) -> Tensor:
    """As eager.to_targets; 0 where local is -1."""
    out = torch.empty(x.shape[0], dtype=torch.float32, device=x.device)
    if x.shape[0]:
        d = x.shape[1]
        launch(
            _meet, x.shape[:1], x, w, local, out, d, PRODUCT=product, BLOCK=_block(d), warps=_warps(d),
            enable_fp_fusion=True,
        )  # fmt: skip
    return out


def _block(width: int) -> int:
    return min(WIDEST, triton.next_power_of_2(max(1, width)))


def _warps(width: int) -> int:
    """So many that a thread holds 8 entries at a time, or 16 of the widest rows."""
    return max(1, min(8, _block(width) // 256))
