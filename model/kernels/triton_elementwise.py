"""Triton kernels for contractions that are no matrix product: sums, or the largest, over the entries of x and w.

A program keeps a tile of results in registers and walks along the entries. What varies along the tile's short side is
the same for a whole warp (one broadcast read), what varies along its long side is read side by side: a tile of 64 x 128
makes one read for every seven operations. Both sides of the tile have fewer entries than the program has
threads: then Triton reads each straight into the layout of the tile, without a detour over shared memory. Sums gather
SPAN terms before they join the total. There are no atomics: the same inputs give the same bits.

Block sizes keep a program's registers, as compiled for an H100, within 128 per thread, so that two programs share a
multiprocessor; neither they nor the splits were measured.

Legend: M tokens of a chunk, V prototypes on this rank, D width; t = x - sign * w.
"""

# Annotations must stay objects here: Triton's interpreter reads `tl.constexpr` from them.

import triton
import triton.language as tl
from torch import Tensor

from .eager_elementwise import SMALLEST, Terms
from .triton_functions import log2
from .triton_scores import PROGRAMS, launch, padded_rows

SPAN = 128  # terms that are added up before they join a total: rounding grows with 128 + D / 128 terms, not with D
UNROLL = 4  # terms read at a time
ALIGNMENT = 128  # entries; every block size divides it
LONG = 128  # prototypes, or entries of a gradient, of a program
TOKENS = {"l1": 64, "linf": 64}  # of a program; the other kinds need more registers
FEWER_TOKENS = 32  # and those of the gradient, or prototypes
GRADIENT_UNROLL = {"l1": 2}
REGISTERS = 128  # of a thread: two programs of 8 warps share a multiprocessor
LEAST_UNIT = 2.0**-120  # a smaller number has no finite inverse


def columns(rows: Tensor) -> Tensor:
    """(N, D) -> its transpose, padded with zeros to whole tiles, which then need no bounds; zeros add nothing."""
    n, d = rows.shape
    out = rows.new_zeros(triton.cdiv(d, UNROLL) * UNROLL, triton.cdiv(n, ALIGNMENT) * ALIGNMENT)
    out[:d, :n] = rows.t()
    return out


@triton.jit
def _power(base, EXPONENT: tl.constexpr):
    """base ** EXPONENT for base >= 0."""
    if EXPONENT == 0:
        result = base * 0.0 + 1.0
    elif EXPONENT == 1:
        result = base
    elif EXPONENT == 2:
        result = base * base
    elif EXPONENT == 3:  # up to here products, without the logarithm's 2^-22
        result = base * base * base
    else:
        result = tl.exp2(EXPONENT * log2(base))
    return result


@triton.jit
def _inverse(c, LEAST_UNIT: tl.constexpr):
    """1 / c, and 0 where c is so small that this would overflow: then all ratios are 0, and no 0 * inf is NaN."""
    return tl.where(c < LEAST_UNIT, 0.0, 1.0 / tl.where(c < LEAST_UNIT, 1.0, c))


@triton.jit
def _zeros(pointer, BLOCK_M: tl.constexpr, BLOCK_V: tl.constexpr):
    """Zeros, written as a read of nothing: so the tile, and all that is made with it, has the layout of a coalesced
    read, 8 x 4 numbers per thread of 64 x 128. From tl.zeros the compiler would make 32 x 1, which reads x and w three
    times as often.
    """
    at = tl.arange(0, BLOCK_M)[:, None] * BLOCK_V + tl.arange(0, BLOCK_V)[None, :]
    return tl.load(pointer + at, mask=at < 0, other=0.0)


@triton.jit
def _largest(
    x, w, x_stride, w_stride, width,
    SIGN: tl.constexpr, UNROLL: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """max |t|; NaN stays NaN."""
    top = _zeros(x, BLOCK_M, BLOCK_V)
    for _k in range(0, width, UNROLL):
        for _i in tl.static_range(UNROLL):
            a = tl.load(x + tl.arange(0, BLOCK_M))[:, None]
            b = tl.load(w + tl.arange(0, BLOCK_V))[None, :]
            top = tl.maximum(top, tl.abs(a - SIGN * b), propagate_nan=tl.PropagateNan.ALL)
            x += x_stride
            w += w_stride
    return top


@triton.jit
def _term(a, b, tile, KIND: tl.constexpr, P: tl.constexpr, SIGN: tl.constexpr, SMALLEST: tl.constexpr):
    """What an entry adds: `tile` is 1 / max |t| for "lp", c for "shares"."""
    size = tl.abs(a - SIGN * b)
    if KIND == "lp":
        size = _power(size * tile, P)
    elif KIND == "shares":
        size = tl.where(size == tile, 1.0, 0.0)
    elif KIND == "canberra":
        sizes = tl.abs(a) + tl.abs(b)
        size = tl.where(sizes <= SMALLEST, 0.0, size / sizes)
    return size


@triton.jit
def _sum(
    x, w, x_stride, w_stride, width, tile,
    KIND: tl.constexpr, P: tl.constexpr, SIGN: tl.constexpr, SMALLEST: tl.constexpr, SPAN: tl.constexpr,
    UNROLL: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    total = _zeros(x, BLOCK_M, BLOCK_V)
    for start in range(0, width, SPAN):  # terms are of one sign: a single long sum would round ever worse
        part = _zeros(x, BLOCK_M, BLOCK_V)
        for _k in range(start, tl.minimum(start + SPAN, width), UNROLL):
            for _i in tl.static_range(UNROLL):
                a = tl.load(x + tl.arange(0, BLOCK_M))[:, None]
                b = tl.load(w + tl.arange(0, BLOCK_V))[None, :]
                part += _term(a, b, tile, KIND, P, SIGN, SMALLEST)
                x += x_stride
                w += w_stride
        total += part
    return total


@triton.jit
def _contract(
    x_columns, w_columns, out, values, grads, tokens, prototypes, width,
    x_stride, w_stride, out_stride, values_stride, grads_stride,
    KIND: tl.constexpr, P: tl.constexpr, SIGN: tl.constexpr, SMALLEST: tl.constexpr, LEAST_UNIT: tl.constexpr,
    SPAN: tl.constexpr, UNROLL: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """A tile of c (M, V), or for "shares" of grads / how many entries have |t| == values."""
    x = x_columns + tl.program_id(0) * BLOCK_M
    w = w_columns + tl.program_id(1) * BLOCK_V
    m = (tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)[:, None]
    v = (tl.program_id(1) * BLOCK_V + tl.arange(0, BLOCK_V))[None, :]
    inside = (m < tokens) & (v < prototypes)
    # the columns of x and w are padded with zeros to whole tiles: no read below needs a mask
    if KIND == "linf":
        result = _largest(x, w, x_stride, w_stride, width, SIGN, UNROLL, BLOCK_M, BLOCK_V)
    elif KIND == "lp":
        top = _largest(x, w, x_stride, w_stride, width, SIGN, UNROLL, BLOCK_M, BLOCK_V)
        inverse = _inverse(top, LEAST_UNIT)
        result = _sum(x, w, x_stride, w_stride, width, inverse, KIND, P, SIGN, SMALLEST, SPAN, UNROLL, BLOCK_M, BLOCK_V)
        result = _power(result, 1 / P) * top
    elif KIND == "shares":
        c = tl.load(values + m * values_stride + v, mask=inside, other=0.0)
        count = _sum(x, w, x_stride, w_stride, width, c, KIND, P, SIGN, SMALLEST, SPAN, UNROLL, BLOCK_M, BLOCK_V)
        grad = tl.load(grads + m * grads_stride + v, mask=inside, other=0.0)
        result = grad / tl.where(count < 1, 1.0, count)  # none ties with a c that is NaN
    else:
        result = _sum(x, w, x_stride, w_stride, width, 1.0, KIND, P, SIGN, SMALLEST, SPAN, UNROLL, BLOCK_M, BLOCK_V)
    tl.store(out + m * out_stride + v, result, mask=inside)


def contract(
    terms: Terms, x: Tensor, w_columns: Tensor, prototypes: int, tile: tuple[int, int] | None = None
) -> Tensor:
    """c (M, V) of x (M, D) and the prototypes' `columns`; `tile`: tokens and prototypes of a program (None: by M)."""
    out = padded_rows(x.shape[0], prototypes, x.dtype, x.device)
    _launch_contract(terms.kind, terms, x, w_columns, out, None, None, tile)
    return out


def shares(
    terms: Terms, x: Tensor, w_columns: Tensor, values: Tensor, grads: Tensor, tile: tuple[int, int] | None = None
) -> Tensor:
    """G (M, V) divided by the number of entries that tie for the largest, of "linf"."""
    out = padded_rows(values.shape[0], values.shape[1], values.dtype, values.device)
    _launch_contract("shares", terms, x, w_columns, out, values, grads, tile)
    return out


def _launch_contract(
    kind: str,
    terms: Terms,
    x: Tensor,
    w_columns: Tensor,
    out: Tensor,
    values: Tensor | None,
    grads: Tensor | None,
    tile: tuple[int, int] | None,
) -> None:
    (m, v), x_columns = out.shape, columns(x)
    block_m, block_v = tile or (_rounded(m, TOKENS.get(kind, FEWER_TOKENS)), LONG)
    launch(
        _contract, (triton.cdiv(m, block_m), triton.cdiv(v, block_v)), x_columns, w_columns, out, values, grads,
        m, v, x_columns.shape[0], x_columns.stride(0), w_columns.stride(0), out.stride(0),
        0 if values is None else values.stride(0), 0 if grads is None else grads.stride(0),
        KIND=kind, P=terms.p, SIGN=terms.sign, SMALLEST=SMALLEST, LEAST_UNIT=LEAST_UNIT,
        SPAN=SPAN, UNROLL=UNROLL, BLOCK_M=block_m, BLOCK_V=block_v, enable_fp_fusion=True,
    )  # fmt: skip


def _rounded(rows: int, most: int) -> int:
    return min(most, max(16, triton.next_power_of_2(rows)))


@triton.jit
def _pulled(
    g, u, v, c,
    KIND: tl.constexpr, P: tl.constexpr, SIGN: tl.constexpr, SMALLEST: tl.constexpr, LEAST: tl.constexpr,
):  # fmt: skip
    """g * dc/du for entries u of one side and v of the other; c is 1 / c for "lp". sgn(0) = 0.

    The sign is a difference of comparisons: one instruction each, where a choice between numbers takes two.
    """
    t = u - SIGN * v
    size = g
    if KIND == "lp":
        ratio = tl.abs(t) * c
        size = g * tl.where(ratio > LEAST, _power(ratio, P - 1), 0.0)
    elif KIND == "linf":
        size = tl.where(tl.abs(t) == c, g, 0.0)
    elif KIND == "canberra":
        sizes = tl.abs(u) + tl.abs(v)
        inverse = tl.where(sizes > SMALLEST, 1.0 / sizes, 0.0)
        along = tl.where(u > 0, v, tl.where(u < 0, -v, 0.0))
        size = (g * inverse) * ((tl.abs(v) + along) * inverse)
    return size * (tl.where(t > 0, 1.0, 0.0) - tl.where(t < 0, 1.0, 0.0))


@triton.jit
def _contract_gradient(
    own, other, grads, values, out, owns, others, width, out_stride,
    grads_own, grads_other, values_own, values_other, segment,
    ADD: tl.constexpr, KIND: tl.constexpr, P: tl.constexpr, SIGN: tl.constexpr, SMALLEST: tl.constexpr,
    LEAST: tl.constexpr, LEAST_UNIT: tl.constexpr, SPAN: tl.constexpr, UNROLL: tl.constexpr,
    BLOCK_A: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """A tile of the gradient of one side, own (A, D): out[a, k] = sum_b G[a, b] dc/du(own[a, k], other[b, k]).

    Which side it is lies in the strides of G and c alone, (A, B) here. The b of a program are one segment; the parts of
    several lie one behind the other in `out` (segments, A, D).
    """
    a = (tl.program_id(0) * BLOCK_A + tl.arange(0, BLOCK_A)).to(tl.int64)
    k = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    in_width = k < width
    inside = (a < owns)[:, None] & in_width[None, :]
    u = tl.load(own + a[:, None] * width + k[None, :], mask=inside, other=0.0)
    start_row = (tl.program_id(0) * BLOCK_A).to(tl.int64)  # 64 bits to the block's corner: M * V passes 2^31
    near = tl.minimum(tl.arange(0, BLOCK_A), owns - 1 - tl.program_id(0) * BLOCK_A)  # beyond the last: not stored
    at_grads = near * grads_own  # 32 bits are enough within a block, and half of the registers
    at_values = near * values_own
    first = tl.program_id(2) * segment
    last = tl.minimum(first + segment, others)
    v_row = other + first.to(tl.int64) * width
    g_column = grads + first.to(tl.int64) * grads_other + start_row * grads_own
    c_column = values + first.to(tl.int64) * values_other + start_row * values_own
    total = tl.zeros((BLOCK_A, BLOCK_K), tl.float32)
    for start in range(first, last, SPAN):
        part = tl.zeros((BLOCK_A, BLOCK_K), tl.float32)
        for b in range(start, tl.minimum(start + SPAN, last), UNROLL):
            for i in tl.static_range(UNROLL):
                there = tl.zeros((BLOCK_A,), tl.int32) + (b + i) < last
                g = tl.load(g_column + at_grads, mask=there, other=0.0).to(tl.float32)[:, None]
                v = tl.load(v_row + k, mask=in_width & (k * 0 + (b + i) < last), other=0.0)[None, :]
                c = g  # where no kind reads c, none is loaded
                if KIND == "linf":
                    c = tl.load(c_column + at_values, mask=there, other=0.0)[:, None]
                if KIND == "lp":
                    c = _inverse(tl.load(c_column + at_values, mask=there, other=0.0), LEAST_UNIT)[:, None]
                part += _pulled(g, u, v, c, KIND, P, SIGN, SMALLEST, LEAST)
                g_column += grads_other
                c_column += values_other
                v_row += width
        total += part
    # with one segment the sum joins `out`, else parts are added up behind, in their order: no atomics
    result = out + tl.program_id(2).to(tl.int64) * owns * out_stride + a[:, None] * out_stride + k[None, :]
    if ADD:
        total += tl.load(result, mask=inside, other=0.0)
    tl.store(result, total, mask=inside)


def add_gradient(
    terms: Terms,
    own: Tensor,
    other: Tensor,
    values: Tensor,
    grads: Tensor,
    total: Tensor,
    tile: tuple[int, int] | None = None,
    segments: int | None = None,
) -> None:
    """Adds the gradient of `own` (A, D) to `total`, from G and c (A, B), whichever way they lie in memory.

    Of "linf", G is divided by the ties already (`shares`). `tile`: rows and entries of a program; `segments`: how many
    programs share the rows of `other` (B, D) (None: by the shapes).
    """
    (a, d), b = own.shape, other.shape[0]
    block_a, block_k = tile or (_rounded(a, FEWER_TOKENS), LONG)
    unroll = GRADIENT_UNROLL.get(terms.kind, 1)
    blocks = triton.cdiv(a, block_a), triton.cdiv(d, block_k)
    if segments is None:  # so many that there are about PROGRAMS / 2, each with two spans at least
        segments = min(triton.cdiv(PROGRAMS // 2, max(1, blocks[0] * blocks[1])), triton.cdiv(b, 2 * SPAN))
    segment = triton.cdiv(triton.cdiv(b, max(1, segments)), unroll) * unroll
    segments = triton.cdiv(b, segment) if b else 0
    out = total if segments == 1 else own.new_empty(segments, a, d)
    assert own.is_contiguous() and other.is_contiguous() and total.stride(1) == 1, "rows are read one behind the other"
    launch(
        _contract_gradient, (*blocks, segments), own, other, grads, values, out, a, b, d, out.stride(-2),
        *grads.stride(), *values.stride(), segment, ADD=segments == 1, KIND=terms.kind, P=terms.p, SIGN=terms.sign,
        SMALLEST=SMALLEST, LEAST=SMALLEST if terms.p < 1 else 0.0, LEAST_UNIT=LEAST_UNIT, SPAN=SPAN, UNROLL=unroll,
        BLOCK_A=block_a, BLOCK_K=block_k, enable_fp_fusion=True, maxnreg=REGISTERS,
    )  # fmt: skip
    if segments != 1:
        total += out.sum(0)
