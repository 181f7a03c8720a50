"""The C++ contractions of entries against their readable twin: hardly further from float64 than plain float32 is.

Legend: M tokens, V prototypes, D width.
"""

from __future__ import annotations

import math
from types import ModuleType

import pytest
import torch
from torch import Tensor

from model.kernels import cpu, eager
from model.kernels.eager import Given, Terms, Upstream
from tests.support.checks import assert_no_worse, needed

SIZES = [(1, 1, 1), (5, 7, 3), (16, 64, 64), (67, 301, 97), (130, 1025, 33)]  # (M, V, D)
POWERS = [0.5, 1.5, 3.0, 4.0, 7.3, 40.0]
TERMS = [
    Terms("l1"),
    Terms("l1", sign=-1.0),
    Terms("linf"),
    Terms("linf", sign=-1.0),
    *(Terms("lp", p) for p in POWERS),
    Terms("canberra"),
]
ULP = 2.0**-23


@pytest.fixture(autouse=True)
def kernels() -> None:
    torch.manual_seed(0)
    needed(torch.float32)


def named(terms: Terms) -> str:
    return f"{terms.kind}{f' {terms.p}' if terms.kind == 'lp' else ''}{'' if terms.sign == 1 else ' of sums'}"


def operands(size: tuple[int, int, int], values: str) -> tuple[Tensor, Tensor, Tensor]:
    """x (M, D), w (V, D) and G (M, V), with near and exact matches; of the values that are not plain, many tie."""
    m, v, d = size
    w, x = torch.randn(v, d), torch.randn(m, d)
    near = torch.randint(v, (m,))
    x[::3] = w[near[::3]] + 0.02 * x[::3]
    x[1::5] = w[near[1::5]]
    w[0, : d // 2], x[m // 2, : d // 2] = 0, 0
    w[v // 2 :: 4] = w[v // 2].clone()
    if values == "integers":
        x, w = x.mul(2).round(), w.mul(2).round()
    elif values == "bfloat16":
        x, w = x.bfloat16().float(), w.bfloat16().float()
    return x, w, torch.randn(m, v)


def gradients(ops: ModuleType, terms: Terms, x: Tensor, w: Tensor, c: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
    total = torch.ones_like(w)
    return ops.contract_gradient(terms, x, ops.Rows(w), c, g, total), total


CASES = [*((size, "plain") for size in SIZES), (SIZES[1], "bfloat16"), (SIZES[3], "integers"), (SIZES[3], "bfloat16")]


@pytest.mark.parametrize(("size", "values"), CASES, ids=str)
@pytest.mark.parametrize("terms", TERMS, ids=named)
def test_as_its_twin(terms: Terms, size: tuple[int, int, int], values: str) -> None:
    x, w, g = operands(size, values)
    truth = eager.contract(terms, x.double(), eager.Rows(w.double()))
    fast, plain = (ops.contract(terms, x, ops.Rows(w)) for ops in (cpu, eager))
    assert_no_worse(fast, plain, truth, 4 * ULP)
    # a slope of lp is a power of a rounded ratio
    slack = 4 * ULP + (abs(terms.p - 1) * ULP / 4 if terms.kind == "lp" else 0)
    for given in (g, g.t().contiguous().t()):  # tokens first, as elsewhere, and prototypes first, as here
        found = gradients(cpu, terms, x, w, fast, given)
        near = gradients(eager, terms, x, w, plain, g)
        true = gradients(eager, terms, x.double(), w.double(), truth, g.double())
        for triple in zip(found, near, true, strict=True):
            assert_no_worse(*triple, slack)


@pytest.mark.parametrize("scale", [1e-18, 1e-6, 1e6, 1e18])
@pytest.mark.parametrize("terms", TERMS, ids=named)
def test_any_scale(terms: Terms, scale: float) -> None:
    """Distances scale and slopes do not, but for canberra, where it is the other way round."""
    x, w, g = operands((19, 33, 21), "plain")
    if terms.kind == "canberra" and scale < 1e-6:
        pytest.skip("entries in these units count as zeros")
    unit = 2.0 ** round(math.log2(scale))
    one = cpu.contract(terms, x, cpu.Rows(w))
    scaled = cpu.contract(terms, x * unit, cpu.Rows(w * unit))
    slopes = gradients(cpu, terms, x, w, one, g)[0]
    scaled_slopes = gradients(cpu, terms, x * unit, w * unit, scaled, g)[0]
    if terms.kind == "canberra":
        scaled_slopes *= unit
    else:
        scaled = scaled / unit
    assert ((scaled - one).abs() <= 4 * ULP * one).all()
    assert (scaled_slopes - slopes).abs().max() <= (4 + terms.p) * ULP * slopes.abs().max()


@pytest.mark.parametrize("terms", TERMS, ids=named)
def test_same_bits_for_any_number_of_threads(terms: Terms) -> None:
    x, w, g = operands((130, 1025, 97), "plain")
    before, results = torch.get_num_threads(), []
    for threads in (1, 2, 3, 3):
        torch.set_num_threads(threads)
        c = cpu.contract(terms, x, cpu.Rows(w))
        results.append((c, *gradients(cpu, terms, x, w, c, g)))
    torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(one, same) for one, same in zip(results[0], other, strict=True))


@pytest.mark.parametrize("terms", TERMS, ids=named)
def test_a_pair_does_not_depend_on_the_others(terms: Terms) -> None:
    x, w, _ = operands((130, 301, 97), "plain")
    whole = cpu.contract(terms, x, cpu.Rows(w))
    assert torch.equal(whole[37:40, 5:12], cpu.contract(terms, x[37:40], cpu.Rows(w[5:12])))


@pytest.mark.parametrize("terms", TERMS, ids=named)
def test_two_results_with_the_same_rows(terms: Terms) -> None:
    x, w, _ = operands((19, 33, 21), "plain")
    rows = cpu.Rows(w)
    first = cpu.contract(terms, x, rows)
    before = first.clone()
    cpu.contract(terms, 2 * x, rows)
    assert torch.equal(first, before) and first.stride(0) == 1


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("terms", TERMS, ids=named)
def test_what_is_not_finite_is_not_hidden(terms: Terms, bad: float, threads: int) -> None:
    x, w, g = operands((37, 301, 97), "plain")
    x[3, 40], w[7, 2] = bad, bad
    c = cpu.contract(terms, x, cpu.Rows(w))
    hit = torch.zeros(37, 301, dtype=torch.bool)
    hit[3], hit[:, 7] = True, True
    assert torch.equal(~c.isfinite(), hit)
    g = torch.where(hit, math.nan, g)  # as the loss makes it
    dx, dw = gradients(cpu, terms, x, w, c, g)
    assert dx.isnan().all() and dw.isnan().all()
    g[:, 7] = 0
    c[:, 7] = 1
    w[7] = 1
    dx, dw = gradients(cpu, terms, x, w, c, g)
    assert torch.equal(dx.isnan().all(1), torch.arange(37) == 3) and dw[hit[3]].isnan()[:7].all()
    assert torch.equal(dx.isnan().any(1), torch.arange(37) == 3)


@pytest.mark.parametrize("exponent", [0.5, 28.0, 1536.0])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_logarithms(size: tuple[int, int, int], exponent: float, threads: int) -> None:
    m, v, _ = size
    x, w, _ = operands(size, "plain")
    values = cpu.contract(Terms("l1"), x, cpu.Rows(w))
    floor, local = torch.full((m,), 1e-3), torch.randint(-1, v, (m,))
    weight, steep = torch.linspace(0.1, 1, m), torch.tensor(exponent)
    log = values.double().clamp_min(1e-3).log()
    kept = values.clone()
    for given in (kept, values):  # tokens first, as elsewhere, and prototypes first, as here
        top, total, moment, target = cpu.statistics(given, Given(local, steep, floor))
        assert (given - log).abs().max() <= 4 * ULP * log.abs().max().clamp_min(1)
        # the sums, against those of the very logarithms that they sum up
        scores = -exponent * given.double()
        rounding = ULP * scores.abs().max().item() + 2e-7
        lse = (top + total.log()).double()
        assert (lse - scores.logsumexp(1)).abs().max() <= 2 * rounding
        spread = (scores.softmax(1) * (scores - scores.amax(1, keepdim=True)).abs()).sum(1).max().item()
        mean = (scores.softmax(1) * scores).sum(1)
        assert (moment.double() / total.double() - mean).abs().max() <= 2 * rounding * (1 + spread)
        true_target = torch.where(local >= 0, scores.gather(1, local.clamp_min(0)[:, None])[:, 0], 0)
        assert (target - true_target).abs().max() <= rounding

    def gradient(ops: ModuleType, logs: Tensor) -> Tensor:
        least, coefficient, *loss = (value.to(logs.dtype) for value in (floor, steep, lse, weight))
        return ops.gradients(logs, Given(local, coefficient, least), Upstream(*loss), logs.dtype)[0]

    truth, plain = gradient(eager, values.double()), gradient(eager, values.clone())
    fast, again = gradient(cpu, values.clone()), gradient(cpu, values)
    floored = log <= math.log(1e-3) + eager.FLOOR_MARGIN
    assert torch.equal(fast, again) and fast[floored].eq(0).all()
    # against |G| before p - onehot cancels, entry by entry
    onehot = torch.zeros(m, v, dtype=torch.float64)
    onehot[local >= 0, local[local >= 0]] = 1
    size_of = exponent * weight.double()[:, None] * ((scores - lse[:, None]).exp() + onehot) / log.exp() + 1e-30
    assert_no_worse(fast / size_of, plain / size_of, truth / size_of, 1e-6)
