"""The C++ kernels against their readable twin: never further from float64 than plain PyTorch in the same dtype.

Legend: M tokens, V prototypes, D width.
"""

from __future__ import annotations

import math
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from model.distances import ABSOLUTE_FLOOR, RELATIVE_FLOOR
from model.harmonic import harmonic_loss
from model.kernels import choose, cpu, eager
from model.kernels.eager import Given, Upstream
from model.reference import harmonic_loss_reference
from tests.support.checks import assert_no_worse, needed

ROOT = Path(__file__).parents[2]
SIZES = [(1, 1, 1), (5, 7, 3), (16, 64, 64), (67, 301, 97), (130, 1025, 33), (515, 1030, 517)]  # (M, V, D)
EXPONENTS = [0.5, 1.0, 28.0, 1536.0]


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture(params=[torch.bfloat16, torch.float32], ids=["bfloat16", "float32"])
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    needed(request.param)
    return request.param


class Case(NamedTuple):
    """One chunk with near matches, exact matches, duplicates and targets that are elsewhere."""

    x: Tensor
    w: Tensor
    local: Tensor

    @classmethod
    def of(cls, size: tuple[int, int, int], dtype: torch.dtype) -> Case:
        m, v, d = size
        make = torch.Generator().manual_seed(m + v + d)
        w = torch.randn(v, d, generator=make)
        x = torch.randn(m, d, generator=make)
        local = torch.randint(-1, v, (m,), generator=make)
        x[::3] = w[local.clamp_min(0)][::3] + 0.02 * x[::3]
        x[1::5] = w[local.clamp_min(0)][1::5]
        w[v // 2 :: 4] = w[v // 2].clone()
        return cls(x.to(dtype), w.to(dtype), local)


class Chunk(NamedTuple):
    """What the quadratic family's row kernels read."""

    dots: Tensor  # (M, V)
    squares: eager.Squares

    @classmethod
    def of(cls, case: Case) -> Chunk:
        x, wide = eager.square_norms(case.x), torch.float32
        target = eager.square_norms(case.x.to(wide) - case.w[case.local.clamp_min(0)].to(wide))
        dots = eager.products(case.x, eager.Rows(case.w))
        squares = eager.Squares(x, eager.square_norms(case.w), target, RELATIVE_FLOOR * x + ABSOLUTE_FLOOR**2)
        return cls(dots, squares)

    def cast(self, dtype: torch.dtype) -> Chunk:
        squares = eager.Squares(*(value.to(dtype, copy=True) for value in self.squares))
        return Chunk(self.dots.to(dtype, copy=True), squares)

    def statistics(self, ops: ModuleType, case: Case, coefficient: float, dtype: torch.dtype) -> tuple[Tensor, ...]:
        """log q, then the four sums, with everything cast to `dtype` first."""
        kept, squares = self.cast(dtype)
        steep = torch.tensor(coefficient, dtype=dtype)
        return kept, *ops.statistics(kept, Given(case.local, steep, squares.floor, squares))


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_products(size: tuple[int, int, int], dtype: torch.dtype, threads: int) -> None:
    case = Case.of(size, dtype)
    truth = case.x.double() @ case.w.double().t()
    plain = eager.products(case.x, eager.Rows(case.w))
    assert_no_worse(cpu.products(case.x, cpu.Rows(case.w)), plain, truth, 2e-7)
    grads = torch.randn(size[0], size[1]).to(dtype)
    for given in (grads, grads.t().contiguous().t()):  # tokens first, as elsewhere, and prototypes first, as here
        truth = grads.double() @ case.w.double()
        plain = eager.hidden_product(grads, eager.Rows(case.w))
        assert_no_worse(cpu.hidden_product(given, cpu.Rows(case.w)), plain, truth, 2e-7)
        fast, plain = torch.ones(2, size[1], size[2])
        truth = 1 + grads.double().t() @ case.x.double()
        cpu.add_rows_product(fast, given, case.x)
        eager.add_rows_product(plain, grads, case.x)
        assert_no_worse(fast, plain, truth, 2e-7)
    a, b = case.x.t().contiguous().t(), case.w.t()
    for left in (case.x, a):
        for right in (b, b.contiguous()):
            fast, plain = cpu.product(left, right), eager.product(left, right)
            assert_no_worse(fast, plain, left.double() @ right.double(), 2e-7)


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("exponent", EXPONENTS)
def test_quadratic_statistics(size: tuple[int, int, int], exponent: float, dtype: torch.dtype, threads: int) -> None:
    case = Case.of(size, dtype)
    chunk = Chunk.of(case)
    fast, plain = (chunk.statistics(ops, case, exponent, torch.float32) for ops in (cpu, eager))
    truth = chunk.statistics(eager, case, exponent, torch.float64)
    sizes = chunk.squares.x[:, None] + chunk.squares.rows
    near = (sizes / truth[0].exp()).max().item()  # how many digits the expansion of q loses at worst
    assert_no_worse(fast[0], plain[0], truth[0], 2.0**-23 * near)
    # the sums, against those of the very log q that they sum up
    scores = -exponent * fast[0].double()
    rounding = 2.0**-23 * scores.abs().max().item() + 2e-7
    lse = fast[1].double() + fast[2].double().log()
    assert (lse - scores.logsumexp(1)).abs().max() <= rounding
    spread = (scores.softmax(1) * (scores - scores.amax(1, keepdim=True)).abs()).sum(1).max().item()
    mean = fast[3].double() / fast[2].double()
    assert (mean - (scores.softmax(1) * scores).sum(1)).abs().max() <= 2 * rounding * (1 + spread)
    target = torch.where(case.local >= 0, scores.gather(1, case.local.clamp_min(0)[:, None])[:, 0], 0)
    assert (fast[4] - target).abs().max() <= rounding


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("exponent", EXPONENTS)
def test_quadratic_gradient(size: tuple[int, int, int], exponent: float, dtype: torch.dtype, threads: int) -> None:
    case = Case.of(size, dtype)
    chunk = Chunk.of(case)
    log_q = chunk.statistics(eager, case, exponent, torch.float32)[0]
    lse = (-exponent * log_q.double()).logsumexp(1).float()
    weight = torch.linspace(0.1, 1, size[0])

    def gradient(ops: ModuleType, wide: torch.dtype, narrow: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
        kept, squares = Chunk(log_q, chunk.squares).cast(wide)
        steep = torch.tensor(exponent, dtype=wide)
        given = Given(case.local, steep, squares.floor, squares)
        return ops.gradients(kept, given, Upstream(lse.to(wide), weight.to(wide)), narrow)

    fast, over_rows, over_columns = gradient(cpu, torch.float32, dtype)
    plain = gradient(eager, torch.float32, dtype)[0]
    truth = gradient(eager, torch.float64, torch.float64)[0]
    floored = log_q <= chunk.squares.floor.log()[:, None] + eager.FLOOR_MARGIN
    assert fast.dtype == dtype and fast[floored].eq(0).all()
    # against |G| before p - onehot cancels, entry by entry
    onehot = torch.zeros(size[:2], dtype=torch.float64)
    onehot[case.local >= 0, case.local[case.local >= 0]] = 1
    whole = (-exponent * log_q.double() - lse.double()[:, None]).exp() + onehot
    whole = exponent * weight.double()[:, None] * whole / log_q.double().exp() + 1e-30
    assert_no_worse(fast / whole, plain / whole, truth / whole, 1e-6)
    # the sums are those of G as rounded
    grads = fast.double()
    for found, dim in ((over_rows, 1), (over_columns, 0)):
        assert ((found - grads.sum(dim)).abs() <= 1e-6 * grads.abs().sum(dim) + 1e-30).all()


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_dot(size: tuple[int, int, int], dtype: torch.dtype, threads: int) -> None:
    case = Case.of(size, dtype)
    weight = torch.linspace(0.1, 1, size[0])

    def run(ops: ModuleType, wanted: torch.dtype) -> list[Tensor]:
        x, w = case.x.to(wanted), case.w.to(wanted)
        kept = ops.products(x, ops.Rows(w))
        top, total, moment, target = ops.statistics(kept, Given(case.local))
        lse = top + total.log()
        grads = ops.gradients(kept, Given(case.local), Upstream(lse, weight.to(lse.dtype)), wanted)[0]
        return [lse, moment / total, target, grads]

    one_rounding = 2.0**-8 if dtype == torch.bfloat16 else 2e-6
    slacks = (4e-7, 2e-6, 4e-7, one_rounding)
    fast, plain, truth = run(cpu, dtype), run(eager, dtype), run(eager, torch.float64)
    for one, other, true, slack in zip(fast, plain, truth, slacks, strict=True):
        assert_no_worse(one, other, true, slack)


def test_sums_of_many_small_terms(dtype: torch.dtype) -> None:
    """Float32 sums of exp over 50,000 prototypes: to about one part in ten million."""
    case = Case.of((33, 50_001, 8), dtype)
    dots = cpu.products(case.x, cpu.Rows(case.w)).mul_(0.01)
    truth = dots.double().logsumexp(1)
    top, total, _, _ = cpu.statistics(dots, Given(case.local))
    assert ((total.double() / (truth - top.double()).exp()) - 1).abs().max() < 1.5e-7


def test_logarithm_and_exponential(dtype: torch.dtype) -> None:
    """Through the statistics: V = 1 keeps log q as it is; a target's 1 / q comes back as exp(-log q)."""
    x = torch.logspace(-12, 12, 4096, dtype=torch.float64).float().clamp_min(2e-12)
    near_one = 1 + torch.linspace(-0.4, 0.6, 4096)
    q = torch.cat((x, near_one))
    zeros, none = torch.zeros_like(q), torch.full(q.shape, -1)
    kept = cpu.products(zeros[:, None].to(dtype), cpu.Rows(torch.zeros(1, 1, dtype=dtype)))
    squares = eager.Squares(q, torch.zeros(1), zeros, zeros)
    cpu.statistics(kept, Given(none, torch.tensor(1.0), zeros, squares))
    truth = q.double().log()
    ulp = torch.nextafter(truth.float().abs(), torch.tensor(math.inf)) - truth.float().abs()
    assert ((kept[:, 0].double() - truth).abs() <= 1.0 * ulp).all()
    exponents = torch.linspace(-87, 80, 8192)
    loss = Upstream(zeros, torch.ones_like(q))
    grads, _, _ = cpu.gradients(exponents[:, None].clone(), Given(none), loss, torch.float32)
    assert (grads[:, 0].double() / exponents.double().exp() - 1).abs().max() < 2.0**-23


def test_at_the_floor_there_is_no_gradient(dtype: torch.dtype) -> None:
    w = torch.randn(9, 12).to(dtype)
    case = Case(w[[2, 2, 4]], w, torch.tensor([2, 3, -1]))
    chunk = Chunk.of(case)
    log_q, top, total, _, _ = chunk.statistics(cpu, case, 14.0, torch.float32)
    lse, steep = top + total.log(), torch.tensor(14.0)
    given = Given(case.local, steep, chunk.squares.floor, chunk.squares)
    grads, _, _ = cpu.gradients(log_q, given, Upstream(lse, torch.ones(3)), dtype)
    assert grads.isfinite().all() and grads[[0, 1, 2], [2, 2, 4]].eq(0).all() and grads[1, 3] != 0


def test_nan_is_not_hidden(dtype: torch.dtype) -> None:
    case = Case.of((20, 300, 6), dtype)
    case.x[3, 2] = math.nan
    log_q, top, total, _, _ = Chunk.of(case).statistics(cpu, case, 3.0, torch.float32)
    assert log_q[3].isnan().all() and torch.equal((top + total.log()).isnan(), torch.arange(20) == 3)


@pytest.mark.parametrize("distance", ["euclidean", "cosine", "dot"])
def test_loss_and_gradients(distance: str, dtype: torch.dtype) -> None:
    """The whole of harmonic_loss, in several chunks, with ignored targets and operands that are not contiguous."""
    make = torch.Generator().manual_seed(5)
    x = torch.randn(31, 101, generator=make).to(dtype).t()  # (101, 31)
    w = torch.randn(31, 203, generator=make).to(dtype).float().t()
    targets = torch.randint(0, 203, (101,), generator=make)
    targets[::7] = -100
    gradients = {}
    for name, compute in (("fast", dtype), ("truth", torch.float64)):
        a, b = x.to(compute).clone().requires_grad_(), w.double().clone().requires_grad_()
        options: dict[str, Any] = {"distance": distance, "exponent": 5.5}
        if name == "truth":
            loss = harmonic_loss_reference(a, b, targets, **options).sum()
        else:
            b = w.detach().requires_grad_()
            loss = harmonic_loss(a, b, targets, reduction="sum", chunk_bytes=2**16, **options)
        gradients[name] = (loss.detach(), *torch.autograd.grad(loss, (a, b)))
    for fast, truth, bound in zip(gradients["fast"], gradients["truth"], (1e-3, 2e-2, 2e-2), strict=True):
        bound = bound if dtype == torch.bfloat16 else 1e-5
        assert (fast.double() - truth).norm() <= bound * truth.norm()


def test_unit_rows() -> None:
    needed(torch.float32)
    rows = torch.randn(40, 37) * 10 ** torch.linspace(-30, 30, 40)[:, None]
    rows[3] = 0
    grad = torch.randn(40, 37)
    assert_no_worse(cpu.unit_rows(rows), eager.unit_rows(rows), eager.unit_rows(rows.double()), 1e-7)
    truth = eager.unit_rows_gradient(rows.double(), grad.double())
    size = truth.norm(dim=1, keepdim=True).clamp_min(1e-300)
    fast, plain = cpu.unit_rows_gradient(rows, grad), eager.unit_rows_gradient(rows, grad)
    assert_no_worse(fast / size, plain / size, truth / size, 2e-7)
    assert fast[3].eq(0).all()
    leaf = rows.double()[4:].requires_grad_()
    by_autograd = torch.autograd.grad(torch.nn.functional.normalize(leaf, dim=1, eps=0), leaf, grad[4:].double())[0]
    assert ((by_autograd - truth[4:]) / size[4:]).abs().max() < 1e-13


def test_same_bits_for_any_number_of_threads() -> None:
    needed(torch.bfloat16)
    case = Case.of((515, 1030, 517), torch.bfloat16)
    before = torch.get_num_threads()
    results = []
    for threads in (1, 2, 3, 3):
        torch.set_num_threads(threads)
        x, w = case.x.clone().requires_grad_(), case.w.float().requires_grad_()
        loss = harmonic_loss(x, w, case.local.clamp_min(0), exponent=28.0, reduction="mean")
        results.append((loss.detach(), *torch.autograd.grad(loss, (x, w))))
    torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(one, same) for one, same in zip(results[0], other, strict=True))


def test_a_target_out_of_range_is_refused() -> None:
    needed(torch.float32)
    with pytest.raises(RuntimeError, match="column 9 of 7"):
        cpu.statistics(torch.zeros(2, 7), Given(torch.tensor([0, 9])))


def test_float64_is_plain_pytorch() -> None:
    assert choose.kernels_for(torch.zeros(1, dtype=torch.float64)) is eager


@pytest.mark.parametrize(
    ("instructions", "dtype", "reason"),
    [({"avx2"}, torch.float32, "no AVX512;"), (set(cpu.INSTRUCTIONS), torch.bfloat16, "no AVX512_BF16;")],
)
def test_other_cpus_run_plain_pytorch(
    instructions: set[str],
    dtype: torch.dtype,
    reason: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(cpu, "_instructions", lambda: instructions)
    choose._for_cpu.cache_clear()
    choose._say.cache_clear()
    try:
        assert choose.kernels_for(torch.zeros(1, dtype=dtype)) is eager
        assert reason in caplog.text
    finally:
        choose._for_cpu.cache_clear()


LOSS = """
import logging, torch
logging.basicConfig(format="%(message)s")
from model.harmonic import harmonic_loss
for dtype in (torch.bfloat16, torch.bfloat16, torch.float32):
    loss = harmonic_loss(torch.ones(4, 5, dtype=dtype), torch.eye(6, 5), torch.arange(4))
print(round(loss.item(), 4))
"""


def loss_process(**environment: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", LOSS]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, cwd=ROOT, env=os.environ | environment, stdout=pipe, stderr=pipe, text=True)


def test_without_a_compiler_it_says_so_once_and_goes_on(tmp_path: Path) -> None:
    needed(torch.bfloat16)
    process = loss_process(CXX="no-such-compiler", TORCH_EXTENSIONS_DIR=str(tmp_path))
    out, said = process.communicate(timeout=120)
    assert process.returncode == 0, said
    assert float(out) == round(harmonic_loss(torch.ones(4, 5), torch.eye(6, 5), torch.arange(4)).item(), 4)
    assert said.count("The head runs in plain PyTorch on this CPU, exact but slower") == 1
    assert "no-such-compiler" in said and "install g++" in said


def test_two_processes_build_at_once_despite_a_stale_lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    needed(torch.bfloat16)
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    folder = cpu.build_folder()
    folder.mkdir()
    (folder / "lock").touch()  # what a killed builder leaves
    processes = [loss_process(TORCH_EXTENSIONS_DIR=str(tmp_path)) for _ in range(2)]
    for process in processes:
        _, said = process.communicate(timeout=300)
        assert process.returncode == 0 and "plain PyTorch" not in said, said
    assert len(list(tmp_path.glob("*/*.so"))) == 1
