"""Long training of points and of a small network: layers side by side are heads, and figures are what formulas say."""

from __future__ import annotations

import functools
import json
import math
import statistics
from pathlib import Path

import pytest
import torch

from benchmarks import growth
from benchmarks.measuring import markdown
from model.head import HarmonicHead
from pretrain.study.vision.points import PLACES

PAGE = Path("benchmarks/results/growth-cpu.md")
CELLS = json.loads(PAGE.with_suffix(".json").read_text())["cells"]
FLOOR = 2**-9.5


@pytest.mark.parametrize("head", growth.HEADS)
@pytest.mark.parametrize("exactly", [False, True], ids=["apart", "on the points"])
def test_layers_side_by_side_are_heads(head: str, exactly: bool) -> None:
    """Loss and gradient of every layer, also where prototypes lie on their points or on others'."""
    layers = growth.Layers(head, list(growth.SETS), seeds=2)
    if exactly:
        for number, real in enumerate(layers.real):
            layers.w.data[number][real] = layers.x[number][real].roll(number % 2, 0)
    losses = layers.losses(layers.scored())
    (gradients,) = torch.autograd.grad(losses.sum(), [layers.w])
    for number, real in enumerate(layers.real):
        if exactly and not layers.x[number][real].any(1).all():
            continue  # the floor of a point of zeros has a unit, the head's: a power of two near its prototypes
        x, w = layers.x[number][real], layers.w.detach()[number][real]
        name = head.removesuffix(" + bias")
        alone = HarmonicHead(len(x), x.shape[1], distance=name, exponent=layers.exponent).double()
        alone.prototypes.data = w.clone()
        loss = alone(x, torch.arange(len(x)))
        loss.backward()
        assert losses[number].item() == pytest.approx(loss.item(), rel=1e-7, abs=1e-12)
        torch.testing.assert_close(gradients[number][real], alone.prototypes.grad, rtol=1e-6, atol=1e-9)
        assert not gradients[number][~real].any()


def at_the_points(head: str) -> growth.Layers:
    layers = growth.Layers(head, list(growth.SETS), seeds=1)
    layers.w.data.copy_(layers.x)
    return layers


def test_the_least_harmonic_loss_is_the_floors() -> None:
    """Each prototype on its own point: of two points 2 sqrt(2) apart, sqrt(2) from the origin, n = sqrt(2)."""
    two, middle, inside = at_the_points("euclidean").figures()
    assert two["loss"] == pytest.approx(math.log1p((FLOOR / 2) ** 2**0.5), rel=1e-6)
    assert two["norm"] == pytest.approx(2.0) and middle["norm"] == pytest.approx(8**0.5)
    assert {one["away"] for one in (two, middle, inside)} == {0.0}
    assert {one["at_floor"] for one in (two, middle, inside)} == {1.0}


def test_softmax_without_a_bias_cannot_tell_the_middle() -> None:
    """Its scores are 0 there: log 5 of that point alone, whatever the weights, and a tie counts as wrong."""
    layers = growth.Layers("dot", ["middle"], seeds=1)
    layers.w.data = 1e3 * layers.x
    (figures,) = layers.figures()
    assert figures["loss"] == pytest.approx(math.log(5) / 5) and figures["accuracy"] == pytest.approx(0.8)
    away = growth.Layers("dot", ["inside"], seeds=1)
    away.w.data = 1e3 * torch.nn.functional.normalize(away.x, dim=2)  # a direction of its own is enough
    (figures,) = away.figures()
    assert figures["loss"] < 1e-9 and figures["accuracy"] == 1.0
    assert torch.equal(layers.x[0], torch.tensor(PLACES))


def test_in_float32_half_of_softmaxs_gradient_is_left_where_the_loss_is_0() -> None:
    """At the length that two points have after 100,000 steps."""
    found = []
    for dtype in (torch.float32, torch.float64):
        x = growth.SETS["two"].to(dtype)
        layer = HarmonicHead(2, 2, distance="dot").to(dtype)
        layer.prototypes.data = 6.6 * x
        loss = layer(x, torch.arange(2))
        loss.backward()
        assert layer.prototypes.grad is not None
        found.append((loss.item(), layer.prototypes.grad.abs().max().item()))
    (loss32, slope32), (loss64, slope64) = found
    assert loss32 == 0 and loss64 == pytest.approx(math.exp(-26.4), rel=1e-6)
    assert slope32 == pytest.approx(slope64 / 2, rel=1e-4)


def test_training_side_by_side_is_training_alone() -> None:
    """Adam, to the figures of `HarmonicHead` in float32 from the same start."""
    together = [row for row in growth.points("euclidean", 100, 2) if (row["set"], row["seed"]) == ("two", 0)]
    alone = growth.float32("euclidean", 100, 1)
    assert [row["step"] for row in alone] == [row["step"] for row in together] == [10, 100]
    for one, other in zip(alone, together, strict=True):
        for name in (*growth.GROWN["float32"], *growth.LAST["float32"]):
            assert one[name] == pytest.approx(other[name], rel=1e-4)


def test_marks() -> None:
    assert growth.marks(7) == [7] and growth.marks(1000) == [10, 100, 1000] and growth.marks(250) == [10, 100, 250]


def test_the_command_goes_on_from_what_is_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "growth.json"
    words = ["--steps", "3", "--network-steps", "2", "--seeds", "1", "--network-seeds", "1", "--out", str(out)]
    assert growth.main([*words, "--heads", "euclidean"]) == 0
    cells = json.loads(out.read_text())["cells"]
    assert [cell["part"] for cell in cells] == ["points", "float32", "network"]
    network = cells[2]["runs"][-1]
    assert network["step"] == 2 and network["nearest_wrong_floors"] > 0 and network["network"] > network["features"]
    monkeypatch.setattr(growth, "PARTS", {part: (None, of) for part, (_, of) in growth.PARTS.items()})
    assert growth.main([*words, "--heads", "euclidean"]) == 0  # and measures nothing anew
    assert json.loads(out.read_text())["cells"] == cells


def mean(part: str, head: str, step: int, column: str, name: str | None = None) -> str:
    """Over the seeds of a published cell, as the tables tell it."""
    runs = [run for cell in CELLS if (cell["part"], cell["head"]) == (part, head) for run in cell["runs"]]
    values = [run[column] for run in runs if run["step"] == step and run.get("set") == name]
    return f"{statistics.fmean(values):.3g}"


def test_claims_about_points_are_told_from_the_cells() -> None:
    page = Path("docs/claims.md").read_text()
    norms = {
        head: ", ".join(mean("points", head, step, "norm", "two") for step in (1000, 10_000, 100_000))
        for head in ("dot", "euclidean")
    }
    assert f"steps: {norms['dot']} under softmax, {norms['euclidean']} under the Euclidean head" in page
    losses = [mean("points", head, 1000, "loss", "two") for head in ("dot", "euclidean")]
    assert f"({losses[0]} against {losses[1]})" in page
    at = functools.partial(mean, "points")
    assert f"norm {at('euclidean', 100_000, 'norm', 'middle')}; its loss is" in page
    assert f"its loss is {at('euclidean', 100_000, 'loss', 'middle')}, a little above the least that" in page
    assert f"log(5)/5 = {at('dot', 100_000, 'loss', 'middle')}, norm {at('dot', 100_000, 'norm', 'middle')}." in page
    assert f"(loss {at('dot + bias', 10_000, 'loss', 'middle')} after 10,000 steps)" in page
    assert f"still lies among the others ({at('dot', 100_000, 'loss', 'inside')})" in page
    for head, name in (("euclidean", "middle"), ("dot + bias", "middle"), ("dot", "inside")):
        step = 10_000 if head == "dot + bias" else 100_000
        assert at(head, step, "accuracy", name) == "1"
    for head, step in (("cosine", 100_000), ("canberra", 10_000), ("braycurtis", 10_000), ("dot", 100_000)):
        assert float(at(head, step, "accuracy", "middle")) < 1


def test_claims_about_the_network_are_told_from_the_cells() -> None:
    page = Path("docs/claims.md").read_text()
    ends = {
        (head, column): [mean("network", head, step, column) for step in (1000, 10_000)]
        for head in ("euclidean", "dot") for column in ("prototypes", "features")
    }  # fmt: skip
    assert "prototypes {} to {} long".format(*ends["euclidean", "prototypes"]) in page
    assert "features {} to {}, while".format(*ends["euclidean", "features"]) in page
    softmax = [*ends["dot", "prototypes"], *ends["dot", "features"]]
    assert "softmax's go from {} to {} and from {} to {},".format(*softmax) in page
    cosine = [mean("points", "cosine", step, "norm", "inside") for step in (1000, 100_000)]
    assert "norm {} to {} between 1,000 and 100,000 steps".format(*cosine) in page


def test_the_page_has_the_tables_of_its_json() -> None:
    page = PAGE.read_text()
    rows = [line for table in growth.tables(CELLS) for line in markdown(table)]
    assert len(rows) > 100 and not [line for line in rows if line not in page]
