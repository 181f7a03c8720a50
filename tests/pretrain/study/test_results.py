"""What is told of runs: figures against what the records hold."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from common.settings import validate
from model.config import HeadConfig
from pretrain.records import Eval, Record, Train
from pretrain.study import comparisons
from pretrain.study.comparisons import Ran
from pretrain.study.language_config import Cell, LanguageConfig
from pretrain.study.records import Records, curve
from pretrain.study.results import common_parts, exponent, with_joules
from pretrain.study.statistics import crossed, holm, trend
from tests.support.language_study import study

LN2 = np.log(2)
BYTES = np.array([100.0, 250.0, 70.0, 130.0, 90.0])


class Kept(Records):
    """Records in memory: documents by the name of a run."""

    def __init__(self, made: LanguageConfig, nats: Callable[[Cell], np.ndarray]) -> None:
        super().__init__(made)
        self.nats = nats

    def documents(self, cell: Cell) -> tuple[np.ndarray, np.ndarray]:
        return self.nats(cell), BYTES


def drawn(cell: Cell) -> np.ndarray:
    """Nats of each document: the head's level, a document's own, a seed's own and noise, from the name alone."""
    random = np.random.default_rng([len(cell.head), cell.seed, int(cell.size[1:])])
    shared = np.random.default_rng(5).normal(0, 0.3, len(BYTES))
    level = {"softmax": 2.0, "cosine": 1.8, "worse": 2.3}[cell.head] - 0.1 * np.log10(int(cell.size[1:]))
    return (level + shared + random.normal(0, 0.02) + random.normal(0, 0.02, len(BYTES))) * BYTES * LN2


def runs_of(made: LanguageConfig, lost: tuple[str, ...] = ()) -> dict[str, dict[str, list[Ran]]]:
    records = Kept(made, drawn)

    def ran(cell: Cell) -> Ran:
        done = {"outcome": "done", "summary": {"steps": 1}, "measured": {}}
        done["measured"] = {"evaluation": {"bits_per_byte": drawn(cell).sum() / LN2 / BYTES.sum()}}
        diverged = {"outcome": "diverged", "summary": {}, "measured": {}}
        return Ran(cell, records, diverged if cell.name in lost else done)

    return {
        size: {head: [ran(Cell(head, size, seed, {})) for seed in made.seeds] for head in made.heads}
        for size in made.sizes
    }


HEADS = {"softmax": {"distance": "dot"}, "cosine": {"distance": "cosine"}, "worse": {}}
SIZES = {f"d{dim}": {"model": {"dim": dim}} for dim in (32, 48, 64)}


def test_differences_are_over_seeds_and_documents_and_corrected_for_all_heads(tmp_path: Path) -> None:
    made = study(tmp_path, heads=HEADS, seeds=[11, 12, 13, 14, 15])
    found = comparisons.at_size(made, runs_of(made)["d32"])
    tables = {}
    for head in ("cosine", "worse"):
        pairs = [(Cell(head, "d32", seed, {}), Cell("softmax", "d32", seed, {})) for seed in made.seeds]
        tables[head] = np.stack([drawn(one) - drawn(other) for one, other in pairs])
    estimates = {head: crossed(table, BYTES) for head, table in tables.items()}
    steps = holm([estimates[head].p for head in ("cosine", "worse")])
    for head, step in zip(("cosine", "worse"), steps, strict=True):
        told, estimate = found[head]["difference"], estimates[head]
        assert told["values"] == pytest.approx((tables[head].sum(1) / LN2 / BYTES.sum()).tolist())
        assert told["mean"] == pytest.approx(np.mean(told["values"])) and told["p"] == estimate.p
        assert (told["low"], told["high"]) == pytest.approx(estimate.interval())
        assert (told["corrected_low"], told["corrected_high"]) == pytest.approx(estimate.interval(step.level))
        assert told["corrected_p"] == step.p and told["corrected_low"] <= told["low"]
        assert told["smallest"] > 2 * told["standard_error"]
    assert found["softmax"]["difference"] is None
    assert comparisons.best(made, runs_of(made)["d32"]) == "cosine"
    assert comparisons.median_smallest(found) == pytest.approx(
        np.median([found[head]["difference"]["smallest"] for head in tables])
    )


def test_a_head_without_a_result_counts_as_a_comparison_and_lost_seeds_are_left_out(tmp_path: Path) -> None:
    made = study(tmp_path, heads=HEADS, seeds=[11, 12, 13])
    lost = ("cosine.d32.seed12", *(f"worse.d32.seed{seed}" for seed in made.seeds))
    found = comparisons.at_size(made, runs_of(made, lost)["d32"])
    assert found["worse"] == {"seeds": [], "bits_per_byte": None, "difference": None}
    told = found["cosine"]["difference"]
    assert found["cosine"]["seeds"] == [11, 13] and len(told["values"]) == 2
    assert told["corrected_p"] == pytest.approx(min(1, 2 * told["p"]))
    waiting = runs_of(made)["d32"]
    waiting["worse"][0] = Ran(waiting["worse"][0].cell, waiting["worse"][0].records, None)
    diverged = runs_of(made, ("cosine.d32.seed12",))["d32"]
    whole = comparisons.best(made, runs_of(made)["d32"])
    assert whole == "cosine" and comparisons.best(made, diverged) != "cosine", "not of the seeds that were lucky"
    assert comparisons.best(made, waiting) is None, "while a run has not ended, nothing is the best"


def test_a_trend_needs_three_sizes_and_has_the_slope_of_the_differences(tmp_path: Path) -> None:
    made = study(tmp_path, heads=HEADS, seeds=[11, 12, 13], sizes=SIZES)
    at = runs_of(made, ("cosine.d48.seed12",))
    found = comparisons.trends(made, at)["cosine"]
    assert found is not None and found["seeds"] == [11, 13], "seeds that both have at every size"
    sizes = [made.config(Cell("softmax", size, 11, {"lr": 0.1})).model for size in SIZES]
    assert found["parameters"] == [model.parameters() + model.vocab_size * model.dim for model in sizes]
    tables = [
        np.stack([drawn(Cell("cosine", size, s, {})) - drawn(Cell("softmax", size, s, {})) for s in (11, 13)])
        for size in SIZES
    ]
    expected = trend(tables, BYTES, found["parameters"])
    assert (found["mean"], found["p"]) == (pytest.approx(expected.mean), expected.p)
    assert (found["low"], found["high"]) == pytest.approx(expected.interval())
    other = comparisons.trends(made, at)["worse"]
    assert other is not None
    first, second = sorted((found, other), key=lambda one: one["p"])
    assert first["corrected_p"] == pytest.approx(min(1, 2 * first["p"])), "of two"
    assert second["corrected_p"] == pytest.approx(max(first["corrected_p"], second["p"]))
    assert found["corrected_low"] <= found["low"] and found["corrected_high"] >= found["high"]
    assert comparisons.trends(made, at)["softmax"] is None
    fewer = study(tmp_path, heads=HEADS, sizes={name: SIZES[name] for name in ("d32", "d48")})
    assert comparisons.trends(fewer, runs_of(fewer))["cosine"] is None


def test_only_parts_that_every_run_measured_are_compared() -> None:
    gpu = {"measured": ["gpu"], "not_measured": {"cpu": "no RAPL", "dram": "no RAPL"}}
    both = {"measured": ["gpu", "cpu"], "not_measured": {"dram": "no DRAM counter"}}
    none = {"measured": [], "not_measured": {"gpu": "no GPU", "cpu": "no RAPL", "dram": "no RAPL"}}
    assert common_parts([both, both]) == (["gpu", "cpu"], {"dram": "no DRAM counter"})
    assert common_parts([both, gpu]) == (["gpu"], {"dram": "no DRAM counter", "cpu": "no RAPL"})
    assert common_parts([gpu, none])[0] == [] and common_parts([gpu, none])[1]["gpu"] == "no GPU"
    assert common_parts([]) == ([], {})


def test_an_exponent_is_told_as_it_was_set() -> None:
    ramp = {"first": 1.0, "last": 8.0}
    heads: tuple[dict[str, Any], ...] = (
        {"distance": "dot"},
        {},
        {"exponent": 28.0},
        {"exponent": "learned"},
        {"exponent": ramp},
        {"distance": "cosine_softmax"},
        {"distance": "squared_euclidean_softmax"},
    )
    told = [exponent(validate(HeadConfig, head)) for head in heads]
    assert told == [None, "sqrt_dim", 28.0, "learned", "1 to 8", "learned", "the distance's own"]


def test_a_curve_says_what_training_had_taken() -> None:
    def train(step: int, joules: float | None) -> Train:
        return Train(step=step, tokens=10 * step, seconds=2.0, loss=None, loss_mean=5.0 / step, gpu_j=joules)

    held = Eval(step=1, seconds=1.0, loss=4.0, bits_per_byte=2.0, gpu_j=9.0)
    records: list[Record] = [train(1, 3.0), held, train(2, 4.0)]
    found = curve(records, Train)
    assert found == [
        {"step": 1, "tokens": 10, "seconds": 2.0, "joules": {"gpu": 3.0}, "loss": 5.0},
        {"step": 2, "tokens": 20, "seconds": 4.0, "joules": {"gpu": 7.0}, "loss": 2.5},
    ]
    assert [point["joules"] for point in with_joules(found, ["gpu"])] == [3.0, 7.0]
    assert [point["joules"] for point in with_joules(found, [])] == [None, None]
    (held_out,) = curve(records, Eval)
    assert held_out == {
        **{"step": 1, "tokens": 10, "seconds": 2.0, "joules": {"gpu": 3.0}, "loss": 4.0, "bits_per_byte": 2.0}
    }
    assert [point["joules"] for point in curve([train(1, None), train(2, 4.0)], Train)] == [{}, {}]
    shared = curve(records, Train, shared=True)
    assert [(point["seconds"], point["joules"]) for point in shared] == [(None, {}), (None, {})]
