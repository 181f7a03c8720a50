"""The product with the passes over its scores in one, by Triton: never further from float64 than float32 scores.

How these tests run without a GPU: test_gpu_kernels.py.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from model.distances import RELATIVE_FLOOR
from model.kernels import eager
from model.kernels.eager import Given, Squares, Upstream
from tests.support.checks import assert_no_worse
from tests.support.gpu import CUDA, DEVICE, INTERPRETED, check_sums, draw, needs_gpu, on_gpu, readable, runs, squares_of

if CUDA or INTERPRETED:
    from model.kernels import gpu, triton_fused

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
    given = Given(local) if squares is None else Given(local, steep, squares.floor, squares)
    sums, scored = triton_fused.scores(x, w, given, target, True, squares is not None, triton_fused.Tile(*tile))
    assert scored is not None and scored.kept.dtype == dtype and scored.kept.max() <= 1 + 1e-6 * (1 + exponent)
    apart, none = triton_fused.scores(x, w, given, target, False, False, triton_fused.Tile(*tile))
    assert none is None and not apart[2].any() and all(torch.equal(apart[i], sums[i]) for i in (0, 1, 3))

    def plain(wide: torch.dtype) -> tuple[Any, Any]:
        dots = x.to(wide) @ w.to(wide).t()
        if squares is None:
            return eager.statistics(dots, given), dots
        of_wide = eager.Squares(*(t.to(wide) for t in squares))
        dots = x.to(wide) @ w.to(wide).t()
        return eager.statistics(dots, Given(local, steep.to(wide), of_wide.floor, of_wide)), dots

    (near, _), (truth, true_logs) = plain(PLAIN), plain(torch.float64)
    told = 1 if squares is None else 2
    for one, two, three in zip(*(readable(*found[:3])[:told] for found in (sums, near, truth)), strict=True):
        assert_no_worse(one, two, three, 2e-6)
    lse, score = (truth[0] + truth[1].log()).float(), truth[3].float()
    found = triton_fused.gradients(scored, given, Upstream(lse, weight, score))
    if squares is None:
        expected = eager.gradients(true_logs, given, Upstream(lse.double(), weight.double()), torch.float64)[0]
        size_of = expected.abs() + weight.double()[:, None]
        slack = 1e-5
    else:
        floor, wide = squares.floor.double(), weight.double()
        expected = eager.gradients(
            true_logs.clone(), Given(local, steep.double(), floor), Upstream(lse.double(), wide), torch.float64
        )[0]
        size_of = (expected.abs() + 1e-30) + torch.where(expected != 0, exponent * wide[:, None] / true_logs.exp(), 1)
        near = (squares.x[:, None] + squares.rows) / true_logs.exp()  # how many digits the expansion of q loses
        bound = 1e-5 if exponent < 100 else 1e-3
        size_of = size_of * torch.where((exponent + 1) * near * 2.0**-24 < bound, 1, torch.inf)
        slack = 3 * bound
    worst = ((scored.kept.double() - expected) / size_of).abs().max().item()
    assert worst <= slack + (2.0**-7 if dtype == torch.bfloat16 else 0), worst
    if kind == "quadratic":
        for total, dim in zip(found, (1, 0), strict=True):  # the sums are those of G as rounded
            assert total is not None
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
    given = Given(local, torch.tensor(2.0, device=DEVICE), squares.floor, squares)
    (_, total, _, _), _ = triton_fused.scores(x, w, given, squares.target, True, False, SMALL_TILE)
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
    top, total, moment, target = gpu.statistics(dots, Given(local))
    check_sums(
        [sums[-4:] for sums in (top, total, moment, target)],
        eager.statistics(last, Given(local[-4:])),
        eager.statistics(last.double(), Given(local[-4:])),
    )
    lse, weight = top + total.log(), torch.ones(m, device=DEVICE)
    grads = gpu.gradients(dots, Given(local), Upstream(lse, weight, target), torch.bfloat16)[0]
    expected = eager.gradients(last, Given(local[-4:]), Upstream(lse[-4:], weight[-4:]), torch.bfloat16)[0]
    torch.testing.assert_close(grads[-4:], expected)
    if torch.cuda.get_device_capability()[0] != 9:
        return
    del dots, grads
    x, w = torch.randn(m, 8, device=DEVICE).bfloat16(), torch.randn(v, 8, device=DEVICE).bfloat16()
    target = gpu.to_targets(x, w, local, True)
    given = Given(local)
    (top, total, _, score), scored = triton_fused.scores(x, w, given, target, True, False)
    assert scored is not None
    last = x[-4:].float() @ w.float().t()
    check_fused = top[-4:] + total[-4:].log()
    torch.testing.assert_close(check_fused, last.logsumexp(1), rtol=1e-5, atol=1e-4)
    lse = top + total.log()
    triton_fused.gradients(scored, given, Upstream(lse, weight, score))
    expected = eager.gradients(last, Given(local[-4:]), Upstream(lse[-4:], weight[-4:]), torch.bfloat16)[0]
    torch.testing.assert_close(scored.kept[-4:], expected, rtol=2.0**-6, atol=1e-6)
