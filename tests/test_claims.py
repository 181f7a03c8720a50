"""docs/claims.md: verdicts are of four kinds; a figure of ours is in a committed result or follows from a formula."""

from __future__ import annotations

import json
import math
import re
import shlex
from pathlib import Path
from statistics import median
from typing import Any

import pytest
import torch

from model.head import HarmonicHead
from pretrain.config import load

PAGE = Path("docs/claims.md").read_text()
CELLS = json.loads(Path("benchmarks/results/study-algorithmic.json").read_text())["cells"]
VERDICTS = {"agrees", "in part", "does not", "not tried"}


def rows() -> list[list[str]]:
    """The cells of every row under a table's head that ends in "verdict"."""
    lines = [re.split(r"(?<!\\)\|", line.strip())[1:-1] for line in PAGE.splitlines() if line.startswith("|")]
    tables = [[cell.strip() for cell in cells] for cells in lines if len(cells) == 6]
    return [cells for cells in tables if cells[0] != "claim" and set(cells[0]) != {"-"}]


def test_a_verdict_is_one_of_four_and_has_something_to_stand_on() -> None:
    assert len(rows()) > 90
    for _, where, _, command, gave, verdict in rows():
        assert verdict in VERDICTS, verdict
        assert where and command
        assert verdict == "not tried" or (gave and not command.startswith("none")), gave


def test_no_row_is_of_another_width() -> None:
    """A bar too many or too few would leave a row out of all that is checked here."""
    widths = {len(re.split(r"(?<!\\)\|", line.strip())) - 2 for line in PAGE.splitlines() if line.startswith("|")}
    assert widths == {2, 6}


def test_every_mean_and_deviation_is_in_the_page_of_its_study() -> None:
    told = set(re.findall(r"\d+(?:\.\d+)? ± \d+(?:\.\d+)?", PAGE))
    pages = "".join(Path(f"docs/{name}.md").read_text() for name in ("study-algorithmic", "classifier"))
    assert len(told) > 30
    assert not [figure for figure in told if not re.search(rf"(?<![\d.]){re.escape(figure)}(?![\d.])", pages)]


def gap(cell: dict[str, Any]) -> float:
    return float(cell["epochs_to_generalise"] / cell["epochs_to_memorise"])


def grokking(network: str) -> str:
    """What the row on grokking says of one network, from the study's cells."""
    of = {
        head: {(c["task"], c["fraction"], c["seed"]): gap(c) for c in CELLS
               if c["network"] == network and c["head"] == head and c["epochs_to_generalise"]}
        for head in ("euclidean", "softmax")
    }  # fmt: skip
    both = [(of["euclidean"][key], of["softmax"][key]) for key in of["euclidean"].keys() & of["softmax"].keys()]
    ours, theirs = (median(gaps) for gaps in zip(*both, strict=True))
    smaller = sum(one < other for one, other in both)
    if network == "mlp":
        alone = " and ".join(f"{median(of[head].values()):.1f} ({len(of[head])})" for head in of)
        assert f"Over all cells that generalise {alone} in the MLP" in PAGE
        return f"MLP {ours:.1f} and {theirs:.1f} times as many (medians of {len(both)} pairs, smaller in {smaller})"
    return f"transformer {ours:.1f} and {theirs:.1f} ({len(both)} pairs, smaller in {smaller})"


@pytest.mark.parametrize("network", ["mlp", "transformer"])
def test_grokking_is_told_from_the_cells(network: str) -> None:
    assert grokking(network) in PAGE


def least_loss(best: float, others: float, classes: int) -> float:
    """-log softmax of the own class at the logits that are best for it, in nats."""
    return math.log1p((classes - 1) * math.exp(others - best))


def test_bounds_of_published_heads() -> None:
    """Cosines are between -1 and 1; a negated probability is a logit between -1 and 0."""
    vocabulary = 50_304
    cold, warm = (least_loss(1 / t, -1 / t, vocabulary) for t in (0.5, 1))
    words = f"with T 1 has at least {warm:.2f} nats, with T 0.5 {cold:.2f}, of log V = {math.log(vocabulary):.2f}"
    assert words in PAGE
    ten, hundred = (least_loss(0, -1, classes) for classes in (10, 100))
    assert f"cannot fall below {ten:.2f} nats for 10 classes, {hundred:.2f} for 100" in PAGE


def test_shares_of_examples_drawn_twice() -> None:
    """The share of draws that are among 800 others, by expectation: with replacement, each example as likely."""
    addition, equivalence, genealogy, lattice = (
        f"{1 - (1 - 1 / examples) ** 800:.0%}" for examples in (31**2, 40**2, 373, 7225)
    )
    words = f"about {addition} of those of addition, {equivalence} of equivalence, {genealogy} of genealogy, {lattice}"
    assert words in PAGE


def test_commands_of_runs_are_understood() -> None:
    """With their overrides, in blocks and in cells."""
    told = re.findall(r"overtone run (configs/[^`\n]*)", PAGE)
    assert sum("=" in words for words in told) >= 2
    for words in told:
        path, *overrides = shlex.split(words)
        load(path, overrides)


def test_the_published_head_is_nearly_softmax_at_its_start() -> None:
    """-D log(|x|^2 + |w|^2 - 2 x.w) is 2 x.w - |w|^2 and a constant to first order, if |x|^2 = D is far above both."""
    cfg = load("configs/published-2502-gpt2-124m.yaml")
    head = HarmonicHead(4000, cfg.model.dim, seed=1, **cfg.head.arguments())
    x = torch.nn.functional.normalize(torch.randn(256, cfg.model.dim, generator=torch.Generator().manual_seed(2)))
    x, w = cfg.hidden_length() * x, head.prototypes.detach()
    softmax = (2 * x @ w.T - w.square().sum(1)).log_softmax(1)
    assert softmax.std() > 1, "scores differ by more than what is compared"
    apart = (head.log_probs(x) - softmax).abs().max().item()
    assert apart < float(re.findall(r"no log-probability is ([\d.]+) nats apart", PAGE)[0]) < 2 * apart
    assert f"at most {math.log(1.01 * 50_304 / 0.01):.2f} nats a token" in PAGE
