"""The Triton kernels against their readable twin: never further from float64 than plain PyTorch in the same dtype.

On a GPU these tests run as they are. Elsewhere one of them runs all others of test_gpu_*.py in a process of its own,
with Triton's interpreter in place of its compiler (TRITON_INTERPRET must be set before triton is imported). The
interpreter cuts bfloat16 off instead of rounding it, and is slow: float32 and small shapes there.

Legend: M tokens, V prototypes, D width.
"""

from __future__ import annotations

import importlib.util
import itertools
import os
import re
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from model.kernels import eager
from model.kernels.eager import Given, Squares, Terms, Upstream
from tests.support.checks import assert_no_worse
from tests.support.gpu import CUDA, DEVICE, INTERPRETED, check_sums, draw, needs_gpu, on_gpu, runs, squares_of, wide

if CUDA or INTERPRETED:
    from model.kernels import gpu, triton_elementwise, triton_scores

if CUDA:
    import triton
    import triton.language as tl

    from model.kernels.triton_functions import log2

    @triton.jit
    def functions_of(numbers, out, count, LOG: tl.constexpr):
        at = tl.program_id(0) * 1024 + tl.arange(0, 1024)
        given = tl.load(numbers + at, mask=at < count, other=1.0)
        tl.store(out + at, log2(given) if LOG else tl.exp2(given), mask=at < count)


pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton")  # the interpreter's numpy, of 0 / 0 and log 0

SMALL = (5, 37, 9)
LARGE = [(515, 1030, 517), (130, 50257, 64)] * CUDA
SIZES = [SMALL, (1, 1, 1), (9, 70, 33), *LARGE]
FIRST = [Terms("l1"), Terms("linf"), Terms("canberra"), Terms("lp", 3.0)]
OTHERS = [Terms("l1", sign=-1.0), Terms("linf", sign=-1.0), Terms("lp", 0.5), Terms("lp", 1.0), Terms("lp", 7.5)]


def cases(size: tuple[int, int, int]) -> list[tuple[Terms, tuple[int, int, int]]]:
    """Every kind at `size` and at the extremes, its variants at a small one."""
    return [*itertools.product(FIRST, [size, (1, 1, 1), *LARGE]), *itertools.product(OTHERS, [SMALL, *LARGE])]


PLAIN = torch.float32


def slack_of(terms: Terms) -> float:
    """Powers that are no small whole number go through the hardware's logarithm: triton_functions.py."""
    return 1e-6 + (terms.p * 2.0**-22 if terms.kind == "lp" and CUDA else 0)


def _version(package: str) -> tuple[int, ...]:
    """Major and minor; of one that is not installed, nothing."""
    try:
        return tuple(int(part) for part in version(package).split(".")[:2])
    except PackageNotFoundError:
        return ()


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


@runs
@pytest.mark.parametrize(("terms", "size"), cases((5, 37, 141)), ids=str)  # more entries than are summed at a time
def test_contract(terms: Terms, size: tuple[int, int, int]) -> None:
    x, w, _ = draw(size)
    plain = eager.contract(terms, x, eager.Rows(w))
    truth = eager.contract(terms, x.double(), eager.Rows(w.double()))
    assert_no_worse(gpu.contract(terms, x, gpu.Rows(w)), plain, truth, slack_of(terms))
    tiled = triton_elementwise.contract(terms, x, gpu.Rows(w).columns, len(w), tile=(4, 32))
    assert_no_worse(tiled, plain, truth, slack_of(terms))
    if terms.kind == "linf":
        assert torch.equal(gpu.contract(terms, x, gpu.Rows(w)), plain), "a maximum does not round"


@runs
@pytest.mark.parametrize(("terms", "size"), cases((5, 137, 9)), ids=str)  # more rows than are summed at a time
def test_contract_gradient(terms: Terms, size: tuple[int, int, int]) -> None:
    x, w, _ = draw(size)
    if terms.kind == "linf":  # sums that do not round, so that what ties in float32 ties in float64
        x, w = ((t * 2**12).round() / 2**12 for t in (x, w))
    values = eager.contract(terms, x, eager.Rows(w))
    grads = torch.randn_like(values) * (values > 1e-3)  # the floor keeps matches out
    start = torch.randn_like(w)

    def gradients(ops: ModuleType, *given: Tensor) -> tuple[Tensor, Tensor]:
        x, w, values, grads, start = given
        total = start.clone()
        return ops.contract_gradient(terms, x, ops.Rows(w), values, grads, total), total

    given = (x, w, values, grads, start)
    fast, plain, truth = gradients(gpu, *given), gradients(eager, *given), gradients(eager, *wide(*given))
    for triple in zip(fast, plain, truth, strict=True):
        assert_no_worse(*triple, slack_of(terms))
    if terms.kind == "linf":
        grads = triton_elementwise.shares(terms, x, gpu.Rows(w).columns, values, grads, tile=(4, 32))
    tiled = torch.zeros_like(x), start.clone()
    triton_elementwise.add_gradient(terms, x, w, values, grads, tiled[0], tile=(4, 8), segments=2)
    triton_elementwise.add_gradient(terms, w, x, values.t(), grads.t(), tiled[1], tile=(32, 8), segments=2)
    for triple in zip(tiled, plain, truth, strict=True):
        assert_no_worse(*triple, slack_of(terms))


@runs
def test_ties_share_and_equal_entries_have_no_slope() -> None:
    x = torch.tensor([[1.0, -1.0, 0.0, 1.0], [2.0, 2.0, 2.0, 2.0]], device=DEVICE)
    w = torch.tensor([[0.0, 0.0, 0.0, 0.0], [2.0, 2.0, 2.0, 2.0], [1.0, 1.0, 2.0, 2.0]], device=DEVICE)
    grads = torch.ones(2, 3, device=DEVICE)
    for terms in FIRST + OTHERS:
        values = eager.contract(terms, x, eager.Rows(w))
        found, expected = torch.zeros(2, *w.shape, device=DEVICE)
        x_found = gpu.contract_gradient(terms, x, gpu.Rows(w), values, grads, found)
        x_expected = eager.contract_gradient(terms, x, eager.Rows(w), values, grads, expected)
        torch.testing.assert_close(x_found, x_expected)
        torch.testing.assert_close(found, expected)


@runs
def test_nan_is_passed_on() -> None:
    x, w, local = draw(SMALL)
    x[2, 3] = torch.nan
    for terms in FIRST + OTHERS:
        values = gpu.contract(terms, x, gpu.Rows(w))
        assert values.isnan().any(1).tolist() == [False, False, True, False, False], terms
    floor, steep = torch.full((5,), 1e-4, device=DEVICE), torch.tensor(2.0, device=DEVICE)
    _, total, _, _ = gpu.statistics(values, Given(local, steep, floor))
    assert total.isnan().tolist() == [False, False, True, False, False]


BLOCKS = [{}, {"block": 16, "segments": 2}]


@runs
@pytest.mark.parametrize("blocks", BLOCKS, ids=str)
@pytest.mark.parametrize("exponent", [0.5, 1536.0] + [28.0] * CUDA)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_statistics(size: tuple[int, int, int], exponent: float, blocks: dict[str, int]) -> None:
    x, w, local = draw(size)
    steep = torch.tensor(exponent, device=DEVICE)
    dots, squares = squares_of(x, w, local)
    kept = dots.clone()
    given = Given(local, steep, squares.floor, squares)
    fast = triton_scores.statistics(kept, given, **blocks)
    assert torch.equal(kept, dots), "the dot products are what is kept"
    plain = eager.statistics(dots.clone(), given)
    wide_given = Given(local, steep.double(), squares.floor.double(), Squares(*wide(*squares)))
    truth = eager.statistics(dots.double(), wide_given)
    check_sums(fast, plain, truth)
    plain_logs, fast_scores = dots.clone(), gpu.scores(kept, given)
    eager.statistics(plain_logs, given)
    assert torch.equal(fast_scores, plain_logs * -steep)

    values = eager.contract(Terms("l1"), x, eager.Rows(w))
    floor = values.new_full((len(x),), 0.1)
    fast_logs, plain_logs, true_logs = values.clone(), values.clone(), values.double()
    fast = triton_scores.statistics(fast_logs, Given(local, steep, floor), **blocks)
    plain = eager.statistics(plain_logs, Given(local, steep, floor))
    truth = eager.statistics(true_logs, Given(local, steep.double(), floor.double()))
    check_sums(fast, plain, truth)
    assert_no_worse(fast_logs, plain_logs, true_logs)

    fast = triton_scores.statistics(dots, Given(local), **blocks)
    check_sums(fast, eager.statistics(dots, Given(local)), eager.statistics(dots.double(), Given(local)))


@runs
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("blocks", [{}, {"tile": (4, 16), "stretch": 8}], ids=str)
@pytest.mark.parametrize("exponent", [0.5, 1536.0] + [28.0] * CUDA)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_gradients(size: tuple[int, int, int], exponent: float, blocks: dict[str, Any], dtype: torch.dtype) -> None:
    x, w, local = draw(size)
    steep = torch.tensor(exponent, device=DEVICE)
    weight = torch.linspace(0.1, 1, len(x), device=DEVICE)
    onehot = torch.zeros(len(x), len(w), dtype=torch.float64, device=DEVICE)
    onehot[local >= 0, local[local >= 0]] = 1
    dots, squares = squares_of(x, w, local)
    log_q = dots.double()
    wide_given = Given(local, steep.double(), squares.floor.double(), Squares(*wide(*squares)))
    eager.statistics(log_q, wide_given)
    logs = log_q.float()
    lse = (-exponent * logs.double()).logsumexp(1).float()

    def score_of(scores: Tensor) -> Tensor:
        return torch.where(local >= 0, scores.gather(1, local.clamp_min(0)[:, None])[:, 0], 0)

    score = score_of(-steep * logs)
    weight64 = weight.double()
    last_digit = 2.0**-23 * (exponent * logs.abs().max().item() + 8)  # of a score
    slack = last_digit if dtype == torch.float32 else last_digit + 2.0**-7

    def check(fast: Tensor, plain: Tensor, truth: Tensor, size: Tensor | float, inverse: Tensor | float = 1.0) -> None:
        """Against |G| before p - onehot cancels, entry by entry."""
        assert fast.dtype == plain.dtype == dtype
        whole = size * weight64[:, None] * ((truth / inverse / size / weight64[:, None]).abs() + 2 * onehot) * inverse
        assert_no_worse(fast / (whole + 1e-30), plain / (whole + 1e-30), truth / (whole + 1e-30), slack)

    given = Given(local, steep, squares.floor, squares)
    loss, wide_loss = Upstream(lse, weight, score), Upstream(*wide(lse, weight))
    fast = torch.empty_like(dots, dtype=dtype)
    sums = triton_scores.gradients(dots.clone(), given, loss, fast, **blocks)
    plain_logs = dots.clone()
    eager.statistics(plain_logs, given)
    plain = eager.gradients(plain_logs.clone(), given, loss, dtype)[0]
    truth = eager.gradients(log_q.clone(), wide_given, wide_loss, torch.float64)[0]
    assert fast[plain_logs <= squares.floor.log()[:, None]].eq(0).all()
    near = (squares.x[:, None] + squares.rows) / log_q.exp()  # how many digits the expansion of q loses
    tame = exponent * near * 2.0**-24 < 1e-3  # beyond, float32 says nothing of p
    assert exponent > 1 or tame.any() or min(size) == 1
    mask = tame.double()
    check(fast * mask.to(dtype), plain * mask.to(dtype), truth * mask, exponent, (-log_q).exp())
    for found, dim in zip(sums, (1, 0), strict=True):  # the sums are those of G as rounded
        grads = fast.double()
        assert found is not None
        assert ((found - grads.sum(dim)).abs() <= 1e-6 * grads.abs().sum(dim) + 1e-30).all()

    given, wide_given = given._replace(squares=None), wide_given._replace(squares=None)
    fast = torch.empty_like(dots, dtype=dtype)
    triton_scores.gradients(logs.clone(), given, loss, fast, **blocks)
    plain = eager.gradients(logs.clone(), given, loss, dtype)[0]
    truth = eager.gradients(logs.double(), wide_given, wide_loss, torch.float64)[0]
    check(fast, plain, truth, exponent, (-logs.double()).exp())

    lse = dots.logsumexp(1)
    slack += 2.0**-23 * dots.abs().max().item()  # these scores are the products
    fast = torch.empty_like(dots, dtype=dtype)
    given, loss = Given(local), Upstream(lse, weight, score_of(dots))
    triton_scores.gradients(dots.clone(), given, loss, fast, **blocks)
    plain = eager.gradients(dots.clone(), given, loss, dtype)[0]
    check(fast, plain, eager.gradients(dots.double(), given, Upstream(lse.double(), weight64), torch.float64)[0], 1.0)


def prepared(rows: Tensor, scale: Tensor, unit: bool) -> Tensor:
    out = torch.empty_like(rows)
    eager.prepare(rows, scale, unit, out)
    return out


@runs
@pytest.mark.parametrize("unit", [False, True], ids=["scaled", "unit"])
@pytest.mark.parametrize("width", [1, 9, 4100])
def test_sides(width: int, unit: bool) -> None:
    """Both sides before they meet, and their gradients after: one pass each, as the plain form says."""
    rows = torch.randn(7, width, device=DEVICE)
    rows[2] = 0
    rows[3] *= 1e15
    scale = torch.exp2(torch.randint(-3, 3, (7, 1), device=DEVICE).float())
    for dtype in [torch.float32] + [torch.bfloat16] * CUDA:
        out, plain = torch.empty(2, *rows.shape, dtype=dtype, device=DEVICE)
        squares = gpu.prepare(rows, scale, unit, out)
        eager.prepare(rows, scale, unit, plain)
        assert_no_worse(out, plain, prepared(rows.double(), scale, unit), 2.0**-23 if dtype == PLAIN else 2.0**-8)
        assert_no_worse(squares, eager.square_norms(out), eager.square_norms(out.double()), 2.0**-23)
    sums, total = torch.randn(7, device=DEVICE), torch.randn_like(rows)
    source = rows.clamp(-10, 10)
    for given in (sums, None):
        for one in (scale, torch.tensor(0.5, device=DEVICE), None):
            arguments: tuple[Any, Any, Any, Any, Any] = (rows.clamp(-5, 5), given, source, one, unit)
            a, b, c, d = (t if t is None else t.double() for t in arguments[:4])
            fast, plain, truth = torch.empty_like(rows), torch.empty_like(rows), torch.empty_like(rows).double()
            gpu.finish(total.clone(), *arguments, fast)
            eager.finish(total.clone(), *arguments, plain)
            eager.finish(total.double(), a, b, c, d, unit, truth)
            assert_no_worse(fast, plain, truth, 1e-6)
            gpu.finish(total_again := total.clone(), *arguments, total_again)
            assert torch.equal(total_again, fast), "in place"


@runs
def test_distances_to_targets() -> None:
    x, w, local = draw(SMALL)
    for product in (False, True):
        fast, plain = (ops.to_targets(x, w, local, product) for ops in (gpu, eager))
        truth = eager.to_targets(x.double(), w.double(), local, product)
        here = local >= 0
        assert_no_worse(fast[here], plain[here], truth[here])
        assert not fast[~here].any()


@runs
@pytest.mark.parametrize("dtype", [torch.float32] + [torch.bfloat16] * CUDA, ids=str)
def test_functions_of_the_module(dtype: torch.dtype) -> None:
    """Products, and G in the place and dtype that the callers expect."""
    x, w, local = draw(SMALL)
    x, w = x.to(dtype), w.to(dtype)
    rows = gpu.Rows(w)
    dots = gpu.products(x, rows)
    assert dots.dtype == PLAIN and dots.stride(0) % triton_scores.ROW_START == 0
    assert_no_worse(dots, eager.products(x, eager.Rows(w)), x.double() @ w.double().t(), 2e-7)
    _, squares = squares_of(x.float(), w.float(), local)
    squares = squares._replace(rows=rows.squares)
    steep, weight = torch.tensor(3.0, device=DEVICE), torch.ones(len(x), device=DEVICE)
    given = Given(local, steep, squares.floor, squares)
    top, total, _, score = gpu.statistics(dots, given)
    loss = Upstream(top + total.log(), weight, score)
    grads, over_rows, over_columns = gpu.gradients(dots, given, loss, dtype)
    assert grads.dtype == dtype and grads.shape == dots.shape
    assert (grads.data_ptr() == dots.data_ptr()) == (dtype == PLAIN)
    torch.testing.assert_close(over_rows, grads.float().sum(1))
    torch.testing.assert_close(over_columns, grads.float().sum(0))
    fast, plain = torch.ones(2, *w.shape, device=DEVICE)
    gpu.add_rows_product(fast, grads, x)
    eager.add_rows_product(plain, grads, x)
    assert_no_worse(fast, plain, 1 + grads.double().t() @ x.double(), 2e-7)
    truth = grads.double() @ w.double()
    assert_no_worse(gpu.hidden_product(grads, rows), eager.hidden_product(grads, eager.Rows(w)), truth, 2e-7)
    for values, given in ((gpu.products(x, rows), Given(local)), (dots.abs() + 1, Given(local, steep, squares.floor))):
        made = gpu.gradients(values, given, loss, dtype)[0]
        assert made.dtype == dtype and made.shape == dots.shape


@runs
def test_same_bits_every_time() -> None:
    x, w, local = draw(SMALL)
    results = []
    for _ in range(2):
        rows, dots = gpu.Rows(w), x @ w.t()
        values = gpu.contract(Terms("l1"), x, rows)
        total = torch.zeros_like(w)
        over_x = gpu.contract_gradient(Terms("l1"), x, rows, values, dots, total)
        results.append((values, total, over_x, *gpu.statistics(dots, Given(local))))
    assert all(torch.equal(one, same) for one, same in zip(*results, strict=True))


@pytest.mark.skipif(CUDA or INTERPRETED, reason="the tests run as they are here")
@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
@pytest.mark.skipif(
    _version("triton") < (3, 7) and _version("numpy") >= (2, 4),
    reason="Triton 3.6's interpreter needs numpy 2.3 or older",
)
@pytest.mark.slow
def test_under_the_interpreter() -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "not gpu"]
    command += map(str, sorted(Path(__file__).parent.glob("test_gpu_*.py")))
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    root = Path(__file__).parents[2]
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, timeout=500)
    passed = re.search(r"(\d+) passed", done.stdout)
    assert done.returncode == 0 and passed, done.stdout[-5000:] + done.stderr[-2000:]
    assert int(passed[1]) > 70, done.stdout[-500:]


@on_gpu
@needs_gpu
def test_logarithms_and_exponentials_are_within_what_is_said_of_them() -> None:
    """Every mantissa between 1/2 and 2, every power of two, against float64."""
    from model.kernels import triton_functions

    bits = torch.arange(0x3F000000, 0x40000000, device=DEVICE, dtype=torch.int32)
    numbers = torch.cat([bits.view(torch.float32), torch.exp2(torch.arange(-125.0, 127, 0.37, device=DEVICE))])
    found, powers = torch.empty_like(numbers), torch.empty_like(numbers)
    exact = numbers.double().log2()
    functions_of[(len(numbers) // 1024 + 1,)](numbers, found, len(numbers), LOG=True)
    assert ((found - exact).abs() <= triton_functions.SCORE_ERROR * exact.abs().clamp_min(1)).all()
    functions_of[(len(numbers) // 1024 + 1,)](found, powers, len(numbers), LOG=False)
    exact = found.double().exp2()
    assert ((powers - exact).abs() <= triton_functions.SCORE_ERROR * exact)[exact > 2.0**-126].all()
