"""How near states come to prototypes: counts and gradients against formulas."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from benchmarks import floor
from data.prepare import prepare
from tests.support.corpus import TEXTS, config, quiet, write_corpus

PAGE = Path("benchmarks/results/floor-cpu.md")
SQUARE = 2.0**-19  # the floor of d^2, in units of |x|^2


@pytest.mark.parametrize("distance", ["euclidean", "cosine"])
def test_pairs_near_the_floor_are_counted(distance: str) -> None:
    """States of length 3 along axes; beside the first two wrong prototypes and its own lie at known distances."""
    dim = 8
    x = 3 * torch.eye(dim)[:2]
    angles = torch.tensor([2.0, 1.5 * SQUARE**0.5, 50 * SQUARE**0.5])
    w = 3 * (angles.cos()[:, None] * torch.eye(dim)[0] + angles.sin()[:, None] * torch.eye(dim)[2])
    near = floor.nearness(x, torch.cat([w, 3 * torch.eye(dim)[1:2]]), torch.tensor([1, 0]), distance)
    assert near["pairs"] == 8
    assert near["least_own"] == pytest.approx(2.25 * SQUARE, rel=1e-4)
    assert near["least_wrong"] == 0  # the second state on the last prototype
    within = {"euclidean": [1, 2, 2, 3], "cosine": [1, 1, 2, 2]}[distance]  # of d: of cosine's it is the angle's square
    assert list(near["within"].values()) == within


def by_hand(x: Tensor, w: Tensor, square: float) -> Tensor:
    """(D,) gradient of -log p of the first prototype, p ~ (d^2 + square)^(-n / 2)."""
    q = (x - w).square().sum(1, keepdim=True) + square
    n = x.shape[1] ** 0.5
    p = torch.softmax(-n / 2 * q.log(), 0)
    pulls = n * (x - w) / q
    return pulls[0] - (p * pulls).sum(0)


@pytest.mark.parametrize("apart", floor.APART)
def test_the_gradient_beside_a_wrong_prototype_is_the_formulas(apart: float) -> None:
    x, w = floor.beside(apart, 16, 20)
    assert (x - w[1]).norm().item() == pytest.approx(apart) and x.norm().item() == pytest.approx(1)
    found = floor.push(apart, 16, 20)
    soft = by_hand(x, w, SQUARE)
    assert found["soft"]["gradient"] == pytest.approx(soft.norm().item(), rel=1e-9)
    if apart > 2 * SQUARE**0.5:
        assert found["hard"]["gradient"] == pytest.approx(by_hand(x, w, 0.0).norm().item(), rel=1e-9)
        assert found["hard"]["straight"] == pytest.approx(found["soft"]["straight"], rel=0.05)
    else:
        alone = 16**0.5 / (x - w)[0].norm().item()  # n / d: at the floor only its own prototype draws
        assert found["hard"]["gradient"] == pytest.approx(alone, rel=0.1)
    if not apart:
        assert found["soft"]["gradient"] == pytest.approx(found["hard"]["gradient"], rel=1e-4)


def test_a_soft_floor_pushes_most_at_its_own_width() -> None:
    """There n / (2 eps), by d / (d^2 + eps^2)."""
    eps = SQUARE**0.5
    pushes = [floor.push(apart, 16, 20)["soft"]["straight"] for apart in (eps / 2, eps, 2 * eps)]
    assert max(pushes) == pushes[1] == pytest.approx(4 / (2 * eps), rel=1e-2)
    assert floor.bend(eps)["relative"] == pytest.approx(2**0.5 - 1)
    assert floor.bend(1.0)["relative"] == pytest.approx(SQUARE / 2, rel=1e-5)


def test_the_command_looks_at_runs_as_they_go(tmp_path: Path) -> None:
    write_corpus(tmp_path / "corpus.jsonl", TEXTS)
    prepare(config(tmp_path), quiet)
    run = floor.train("same", "euclidean", 1, 2, str(tmp_path / "prepared"), 350)
    assert [(one["step"], one["split"]) for one in run["seen"]] == [
        (step, split) for step in (0, 1, 2) for split in ("train", "val")
    ]
    assert {one["pairs"] for one in run["seen"]} == {16 * 128 * 350}
    assert 0 < min(one["least_wrong"] for one in run["seen"]) < 0.5  # the embedding of the token that went in
    assert run["first_loss"] > run["last_loss"]


def test_the_page_has_the_tables_of_its_json() -> None:
    tree, page = json.loads(PAGE.with_suffix(".json").read_text()), PAGE.read_text()
    made = [*floor.run_rows(tree["runs"]), *floor.push_rows(tree["push"]), *floor.bend_rows(tree["bend"])]
    assert len(made) > 15 and not [row for row in made if f"| {' | '.join(row)} |" not in page]
    seen = [one for run in tree["runs"] for one in run["seen"]]
    pairs = f"{sum(one['pairs'] for one in seen) / 1e6:.0f} million pairs"
    assert pairs in page and pairs in Path("docs/classifier.md").read_text()
    assert not any(one["within"]["100"] for one in seen)
