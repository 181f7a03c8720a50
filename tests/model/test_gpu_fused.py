"""The product with the passes over its scores in one, by Triton: never further from float64 than float32 scores.

How these tests run without a GPU: test_gpu_kernels.py.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from model.distances import RELATIVE_FLOOR
from model.kernels import eager
from model.kernels.eager import Squares
from tests.support.checks import assert_no_worse
from tests.support.gpu import CUDA, DEVICE, INTERPRETED, check_sums, draw, needs_gpu, on_gpu, readable, runs, squares_of

if CUDA or INTERPRETED:
    from model.kernels import gpu, triton_fused, triton_scores

    SMALL_TILE = triton_fused.Tile(16, 32, 16, 4, 2)

PLAIN = torch.float32
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton")  # the interpreter's numpy, of 0 / 0 and log 0


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


FUSED_TILES = [(16, 16, 16, 4, 2), (32, 64, 16, 4, 2)]
FUSED_SIZES = [(5, 37, 24), (1, 1, 8), (33, 70, 40)] + [(515, 1030, 520), (130, 50257, 64)] * CUDA  # rows of 16 bytes


@runs
@pytest.mark.parametrize("tile", FUSED_TILES, ids=str)
@pytest.mark.parametrize(
    ("kind", "exponent"), [("quadratic", 0.05), ("quadratic", 14.0), ("quadratic", 768.0), ("dot", 1.0)]
)
@pytest.mark.parametrize("size", FUSED_SIZES, ids=str)
def test_fused(size: tuple[int, int, int], kind: str, exponent: float, tile: tuple[int, ...]) -> None:
    """Sums and G from E, never further from float64 than from float32 scores (bfloat16: than after two roundings)."""
    x, w, local = draw(size)
    dtype = torch.bfloat16 if CUDA else PLAIN
    x, w = x.to(dtype), w.to(dtype)
    rows, steep = gpu.Rows(w), torch.tensor(exponent, device=DEVICE)
    weight = torch.linspace(0.1, 1, len(x), device=DEVICE)
    squares = None
    target = gpu.to_targets(x, w, local, product=kind == "dot")
    if kind == "quadratic":
        _, squares = squares_of(x.float(), w.float(), local)
        squares = squares._replace(rows=rows.squares, target=target)
    given = triton_scores.Given(local, steep, None if squares is None else squares.floor, squares)
    sums, scored = triton_fused.scores(kind, x, w, given, target, True, squares is not None, triton_fused.Tile(*tile))
    assert scored is not None and scored.kept.dtype == dtype and scored.kept.max() <= 1 + 1e-6 * (1 + exponent)
    apart, none = triton_fused.scores(kind, x, w, given, target, False, False, triton_fused.Tile(*tile))
    assert none is None and not apart[2].any() and all(torch.equal(apart[i], sums[i]) for i in (0, 1, 3))

    def plain(wide: torch.dtype) -> tuple[Any, Any]:
        dots = x.to(wide) @ w.to(wide).t()
        if squares is None:
            return eager.dot_statistics(dots, local), dots
        given = eager.Squares(*(t.to(wide) for t in squares))
        dots = x.to(wide) @ w.to(wide).t()
        return eager.quadratic_statistics(dots, given, steep.to(wide), local), dots

    (near, _), (truth, true_logs) = plain(PLAIN), plain(torch.float64)
    told = 1 if squares is None else 2
    for one, two, three in zip(*(readable(*found[:3])[:told] for found in (sums, near, truth)), strict=True):
        assert_no_worse(one, two, three, 2e-6)
    lse, score = (truth[0] + truth[1].log()).float(), truth[3].float()
    found = triton_fused.gradients(kind, scored, given, target, score, lse, weight)
    if squares is None:
        expected = eager.dot_gradient(true_logs, lse.double(), weight.double(), local, torch.float64)
        size_of = expected.abs() + weight.double()[:, None]
        slack = 1e-5
    else:
        floor, wide = squares.floor.double(), weight.double()
        expected = eager.log_gradient(
            true_logs.clone(), floor, steep.double(), lse.double(), wide, local, torch.float64
        )
        size_of = (expected.abs() + 1e-30) + torch.where(expected != 0, exponent * wide[:, None] / true_logs.exp(), 1)
        near = (squares.x[:, None] + squares.rows) / true_logs.exp()  # how many digits the expansion of q loses
        bound = 1e-5 if exponent < 100 else 1e-3
        size_of = size_of * torch.where((exponent + 1) * near * 2.0**-24 < bound, 1, torch.inf)
        slack = 3 * bound
    worst = ((scored.kept.double() - expected) / size_of).abs().max().item()
    assert worst <= slack + (2.0**-7 if dtype == torch.bfloat16 else 0), worst
    if kind == "quadratic":
        for total, dim in zip(found, (1, 0), strict=True):  # the sums are those of G as rounded
            grads = scored.kept.double()
            assert ((total - grads.sum(dim)).abs() <= 1e-6 * grads.abs().sum(dim) + 1e-30).all()
    whole = scored.kept.as_strided((len(x), scored.kept.stride(0)), scored.kept.stride())
    assert not whole[:, len(w) :].any(), "what lies behind a row counts in products"


@runs
def test_nan_is_passed_on_by_the_fused_product() -> None:
    x, w, local = draw((5, 37, 24))
    x[2, 3] = torch.nan
    if CUDA:
        x, w = x.bfloat16(), w.bfloat16()
    rows = gpu.Rows(w)
    norms = eager.square_norms(x)
    squares = Squares(norms, rows.squares, gpu.to_targets(x, w, local, False), RELATIVE_FLOOR * norms.nan_to_num())
    given = triton_scores.Given(local, torch.tensor(2.0, device=DEVICE), squares.floor, squares)
    (_, total, _, _), _ = triton_fused.scores("quadratic", x, w, given, squares.target, True, False, SMALL_TILE)
    assert total.isnan().tolist() == [False, False, True, False, False]


@on_gpu
@needs_gpu
def test_offsets_of_64_bits() -> None:
    m, v = 2**15 + 8, 2**16 + 48
    if torch.cuda.mem_get_info()[0] < 20 * 2**30:
        pytest.skip("needs 20 GiB of GPU memory")
    dots = torch.empty(m, v, device=DEVICE).normal_()
    local = torch.randint(0, v, (m,), device=DEVICE)
    last = dots[-4:].clone()
    top, total, moment, target = gpu.dot_statistics(dots, local)
    check_sums(
        [sums[-4:] for sums in (top, total, moment, target)],
        eager.dot_statistics(last, local[-4:]),
        eager.dot_statistics(last.double(), local[-4:]),
    )
    lse, weight = top + total.log(), torch.ones(m, device=DEVICE)
    grads = gpu.dot_gradient(dots, lse, weight, local, torch.bfloat16, target)
    expected = eager.dot_gradient(last, lse[-4:], weight[-4:], local[-4:], torch.bfloat16)
    torch.testing.assert_close(grads[-4:], expected)
    if torch.cuda.get_device_capability()[0] != 9:
        return
    del dots, grads
    x, w = torch.randn(m, 8, device=DEVICE).bfloat16(), torch.randn(v, 8, device=DEVICE).bfloat16()
    target = gpu.to_targets(x, w, local, True)
    given = triton_scores.Given(local)
    (top, total, _, score), scored = triton_fused.scores("dot", x, w, given, target, True, False)
    assert scored is not None
    last = x[-4:].float() @ w.float().t()
    check_fused = top[-4:] + total[-4:].log()
    torch.testing.assert_close(check_fused, last.logsumexp(1), rtol=1e-5, atol=1e-4)
    lse = top + total.log()
    triton_fused.gradients("dot", scored, given, target, score, lse, weight)
    expected = eager.dot_gradient(last, lse[-4:], weight[-4:], local[-4:], torch.bfloat16)
    torch.testing.assert_close(scored.kept[-4:], expected, rtol=2.0**-6, atol=1e-6)
