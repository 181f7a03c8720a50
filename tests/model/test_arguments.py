"""Bad input to the loss is told, on a GPU without waiting for it."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from model import arguments, harmonic
from model.harmonic import harmonic_loss
from model.vocab_parallel import VocabShard


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"distance": "euclidian"}, "expected one of euclidean"),
        ({"reduction": "average"}, "expected mean, sum or none"),
        ({"exponent": 0.0}, "expected a positive number"),
        ({"exponent": float("nan")}, "expected a positive number"),
        ({"targets": torch.tensor([0, 5])}, "targets reach from 0 to 5: expected 0 to 4"),
        ({"targets": torch.tensor([0, -1])}, "targets reach from -1"),
        ({"targets": torch.tensor([0])}, "expected targets"),
        ({"prototypes": torch.ones(5, 4)}, "expected hidden"),
        ({"hidden": torch.ones(2, 3, dtype=torch.int64)}, "expected bfloat16"),
        ({"p": 3.0}, "p=3.0: euclidean takes no parameter"),
        ({"distance": "minkowski", "q": 3.0}, "q=3.0: minkowski takes p"),
        ({"distance": "hamming", "q": 3.0}, "q=3.0: hamming takes kind, temperature$"),
        ({"distance": "minkowski", "p": 0.0}, "p=0.0: expected a positive number"),
        ({"distance": "minkowski", "p": math.inf}, "use chebyshev"),
        ({"distance": "hamming", "kind": "firm"}, "expected soft, hard or gumbel"),
        ({"distance": "hamming", "temperature": 0}, "temperature=0: expected a positive number"),
        ({"distance": "braycurtis", "denominator": "max"}, "expected sum or abs"),
        ({"distance": "mahalanobis"}, "mahalanobis needs factor"),
        ({"distance": "mahalanobis", "factor": "full"}, "expected a tensor"),
        ({"distance": "mahalanobis", "factor": torch.ones(2, 3)}, "expected a tensor"),
        ({"distance": "mahalanobis", "factor": torch.ones(4)}, r"factor is \(4,\), but rows are 3 wide"),
    ],
)
def test_bad_input_is_told(change: dict, message: str) -> None:
    given = {
        "hidden": torch.ones(2, 3),
        "prototypes": torch.rand(5, 3),
        "targets": torch.tensor([0, 1]),
        "exponent": 2.0,
    }
    given.update(change)
    positional = [given.pop(name) for name in ("hidden", "prototypes", "targets")]
    with pytest.raises(ValueError, match=message):
        harmonic_loss(*positional, **given)


class Arrival:
    """Of numbers from a GPU."""

    def __init__(self, there: bool) -> None:
        self.there = there

    def query(self) -> bool:
        return self.there


def test_targets_of_a_gpu_are_checked_without_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    """Their range comes later: the call after that raises, once."""
    checks = arguments.TargetChecks()
    monkeypatch.setattr(arguments, "TARGETS", checks)
    late = Arrival(there=False)
    sent: list[Any] = [(Arrival(there=True), torch.tensor([0, 6])), (late, torch.tensor([0, 7]))]
    checks._waiting.extend((*one, 7, -100) for one in sent)
    x, w, y = torch.randn(2, 3), torch.randn(7, 3), torch.tensor([1, -100])
    expected = harmonic_loss(x, w, y, exponent=2.0)
    late.there = True
    with pytest.raises(ValueError, match=r"targets reach from 0 to 7: expected 0 to 6, or -100 \(in an earlier call"):
        harmonic_loss(x, w, y, exponent=2.0)
    assert torch.equal(harmonic_loss(x, w, y, exponent=2.0), expected)
    assert arguments.range_of(y, -100).tolist() == [0, 1] and arguments.range_of(y - 9, -100).tolist()[0] < 0


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_a_target_out_of_range_on_a_gpu(reduction: str) -> None:
    """The loss and its gradients are NaN, the device goes on, the next call raises."""
    x, w = torch.randn(4, 8, device="cuda", requires_grad=True), torch.randn(7, 8, device="cuda")
    y = torch.tensor([1, 7, -100, 2], device="cuda")
    loss = harmonic_loss(x, w, y, exponent=2.0, reduction=reduction)
    loss.sum().backward()
    assert loss.sum().isnan() and x.grad.isnan().any()
    torch.cuda.synchronize()
    with pytest.raises(ValueError, match="targets reach from 0 to 7: expected 0 to 6, or -100"):
        harmonic_loss(x, w, y.clamp(-100, 6), exponent=2.0)
    assert harmonic_loss(x, w, y.clamp(-100, 6), exponent=2.0).isfinite()


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_a_target_out_of_range_spoils_the_loss_and_its_gradients(
    reduction: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a GPU, where nobody waits for the answer."""
    monkeypatch.setattr(arguments, "check_range", lambda *given: None)
    valid = arguments.validity
    meta = torch.empty(1, device="meta")
    assert valid(torch.zeros(1, dtype=torch.int64), -100, VocabShard(0, 7), torch.float32) is None
    assert valid(meta.long(), -100, VocabShard(0, 7), torch.float32).device.type == "meta"
    monkeypatch.setattr(harmonic, "validity", lambda *given: torch.tensor(torch.nan))
    x, w = torch.randn(4, 8, requires_grad=True), torch.randn(7, 8, requires_grad=True)
    loss = harmonic_loss(x, w, torch.tensor([1, 7, -100, 2]).clamp(max=6), exponent=2.0, reduction=reduction)
    loss.sum().backward()
    assert loss.sum().isnan() and x.grad.isnan().any() and w.grad.isnan().any()
