"""The algorithmic study: tasks against their definitions, cells that are the same again, grids that go on."""

from __future__ import annotations

import itertools
import json
import logging
import math
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console
from scipy.stats import t

from common.errors import ConfigError
from common.settings import read_tree, validate
from pretrain.study import algorithmic, algorithmic_config
from pretrain.study.algorithmic import run
from pretrain.study.algorithmic_cell import Learner, _geometry, train_cell
from pretrain.study.algorithmic_config import AlgorithmicConfig, Cell
from pretrain.study.algorithmic_results import CURVE_POINTS, MEASURES, compare, curve, edges, summarise
from pretrain.study.cells import read_cell
from pretrain.study.tables import algorithmic as table
from pretrain.study.tasks import TASKS, split, training_examples

RECIPE = Path("configs/study-algorithmic.yaml")
SMALL: dict[str, Any] = {
    "kind": "algorithmic",
    "title": "Small",
    "tasks": {"permutation": {"fractions": [0.3, 0.6], "epochs": 3, "evaluate_every": 2}},
    "networks": [{"kind": "mlp", "hidden": 8}, {"kind": "transformer", "layers": 1, "heads": 2}],
    "heads": {"softmax": {"distance": "dot"}, "euclidean": {}},
    "baseline": "softmax",
    "dim": 4,
    "choice": {"candidates": [{"lr": 0.01, "weight_decay": 1.0}]},
    "seeds": [1, 2],
}
SWEEP = {"task": "permutation", "network": "mlp", "fraction": 0.6, "heads": ["softmax"], "weight_decays": [0.1]}
SWEEP |= {"lrs": [0.01]}


def config(out: Path, **changed: Any) -> AlgorithmicConfig:
    return validate(AlgorithmicConfig, {**SMALL, "out": str(out), **changed})


def cell(**changed: Any) -> Cell:
    given = {
        **{"task": "in_context", "network": {"kind": "mlp", "hidden": 100}, "head": {}, "fraction": 0.1, "seed": 1},
        **{
            "epochs": 2,
            "evaluate_every": 1,
            "dim": 16,
            "betas": [0.9, 0.98],
            "lr": 0.01,
            "weight_decay": 1.0,
            "decay_rule": "all",
        },
    }
    return validate(Cell, {**given, **changed})


def without_seconds(tree: Any) -> Any:
    if isinstance(tree, dict):
        return {key: without_seconds(value) for key, value in tree.items() if key != "seconds"}
    return [without_seconds(value) for value in tree] if isinstance(tree, list) else tree


def quiet(line: str) -> None:
    pass


# ---- tasks


def examples(name: str) -> dict[tuple[int, ...], int]:
    task = TASKS[name]()
    found = {tuple(tokens): answer for tokens, answer in zip(task.inputs.tolist(), task.answers.tolist(), strict=True)}
    assert len(found) == len(task.answers), "an example is there twice"
    assert task.inputs.max() == task.tokens - 1 and task.answers.min() >= 0 and task.answers.max() == task.classes - 1
    return found


def test_modular_addition_and_the_circle_are_sums_mod_31() -> None:
    assert examples("modular_addition") == {(a, b): (a + b) % 31 for a in range(31) for b in range(31)}
    steps = {31: -3, 32: -2, 33: -1, 34: 1, 35: 2, 36: 3}
    assert examples("circle") == {(a, s): (a + step) % 31 for a in range(31) for s, step in steps.items()}


def test_equivalence_is_congruence_mod_5() -> None:
    assert examples("equivalence") == {(a, b): int((a - b) % 5 == 0) for a in range(40) for b in range(40)}


def test_in_context_has_every_parallelogram_of_the_lattice() -> None:
    points = list(itertools.product(range(5), range(5)))
    expected = {}
    for a, b, c, d in itertools.product(range(25), repeat=4):
        (ai, aj), (bi, bj), (ci, cj), (di, dj) = (points[k] for k in (a, b, c, d))
        if bi - ai == di - ci and bj - aj == dj - cj:
            expected[a, b, c] = d
    assert examples("in_context") == expected
    assert TASKS["in_context"]().coordinates.tolist() == [list(point) for point in points]


def test_permutations_compose_as_functions_do() -> None:
    elements = list(itertools.permutations(range(4)))
    products = examples("permutation")
    assert len(products) == 24**2
    for (a, b), ab in products.items():
        assert [elements[ab][i] for i in range(4)] == [elements[a][elements[b][i]] for i in range(4)]
    assert any(products[a, b] != products[b, a] for a, b in products)


def test_groups_are_residues_and_cosets() -> None:
    residues = TASKS["equivalence"]().groups
    assert residues is not None and residues.tolist() == [a % 5 for a in range(40)]
    cosets, products = TASKS["permutation"]().groups, examples("permutation")
    assert cosets is not None
    members = {coset: {a for a in range(24) if cosets[a] == coset} for coset in cosets.unique().tolist()}
    assert sorted(map(len, members.values())) == [4] * 6
    (subgroup,) = (own for own in members.values() if 0 in own)  # the identity comes first
    assert all(products[a, b] in subgroup for a in subgroup for b in subgroup)
    for own in members.values():
        for a in own:
            assert {products[a, b] for b in subgroup} == {products[b, a] for b in subgroup} == own


def test_embeddings_on_one_point_for_each_residue_score_one() -> None:
    task = TASKS["equivalence"]()
    learner = Learner(cell(task="equivalence"), task)
    assert 0 < (_geometry(learner, task)["embedding_crystal"] or 0) < 0.5
    with torch.no_grad():
        learner.embedding.weight.copy_(torch.randn(5, 16)[torch.arange(40) % 5])
    assert _geometry(learner, task)["embedding_crystal"] == pytest.approx(1)


@given(st.sampled_from(sorted(TASKS)), st.floats(0.05, 0.95), st.integers(0, 2**31))
def test_a_split_is_disjoint_and_whole_and_grows_with_the_fraction(name: str, fraction: float, seed: int) -> None:
    task = TASKS[name]()
    train, test = split(task, fraction, seed)
    assert len(train) == training_examples(task, fraction)
    assert sorted([*train.tolist(), *test.tolist()]) == list(range(len(task.answers)))
    assert set(split(task, fraction / 2, seed)[0].tolist()) <= set(train.tolist())
    assert torch.equal(split(task, fraction, seed)[0], train)
    assert not torch.equal(split(task, fraction, seed + 1)[0], train)


# ---- cells


@pytest.mark.parametrize("network", [{"kind": "mlp"}, {"kind": "transformer"}], ids=lambda one: one["kind"])
def test_heads_of_one_seed_start_from_the_same_trunk_and_draw(network: dict[str, str]) -> None:
    task = TASKS["circle"]()
    distances = ("dot", "euclidean", "manhattan", "mahalanobis")
    first, *others = (Learner(cell(task="circle", network=network, head={"distance": one}), task) for one in distances)
    trunk, draw = first.trunk.state_dict(), first.head.prototypes / first.head.init_std
    for other in others:
        assert all(torch.equal(trunk[name], value) for name, value in other.trunk.state_dict().items())
        torch.testing.assert_close(other.head.prototypes / other.head.init_std, draw)
    another = Learner(cell(task="circle", network=network, seed=2), task).trunk.state_dict()
    assert any(not torch.equal(trunk[name], value) for name, value in another.items())


def test_every_parameter_is_in_one_group_and_what_is_not_a_weight_does_not_decay() -> None:
    learner = Learner(cell(head={"distance": "mahalanobis", "exponent": "learned"}), TASKS["in_context"]())
    decayed, kept = learner.groups(1.0, "all")
    assert kept["weight_decay"] == 0.0 and len(kept["params"]) == 2
    rules = ("all", "no_prototypes", "no_last_layer", "rate_by_norm")
    for rule in rules:
        groups = [p for group in learner.groups(1.0, rule) for p in group["params"]]
        assert {id(p) for p in groups} == {id(p) for p in learner.parameters()}
        assert len(groups) == len(list(learner.parameters()))
    free = [{id(p) for p in learner.groups(1.0, rule)[1]["params"]} for rule in rules]
    own, prototypes = {id(p) for p in kept["params"]}, {id(learner.head.prototypes)}
    last = {id(p) for p in learner.trunk[-1].parameters()}
    assert free == [own, own | prototypes, own | prototypes | last, own]


@pytest.mark.parametrize("network", [{"kind": "mlp"}, {"kind": "transformer"}], ids=lambda one: one["kind"])
def test_rates_by_norm_are_those_of_what_makes_the_scale(network: dict[str, str]) -> None:
    learner = Learner(cell(network=network), TASKS["in_context"]())
    by_norm = learner.groups(1.0, "rate_by_norm")[2:]
    named = dict(learner.named_parameters())
    scales = ["trunk.6.weight", "trunk.6.bias"] if network["kind"] == "mlp" else ["trunk.norm.weight"]
    assert [len(group["params"]) for group in by_norm] == [len(scales), 1]
    assert all(p is named[name] for p, name in zip(by_norm[0]["params"], scales, strict=True))
    assert by_norm[1]["params"][0] is learner.head.prototypes
    whole = torch.cat([named[name].flatten() for name in scales])
    assert by_norm[0]["norm"] == pytest.approx(whole.norm().item())


def test_rules_of_decay_are_kept_in_training() -> None:
    """By how long the prototypes end: AdamW's decay is in units of the rate, so a rate that falls slows it."""
    asked = {"head": {"distance": "cosine"}, "epochs": 40, "evaluate_every": 40, "weight_decay": 10.0}
    grown = {
        rule: train_cell(cell(**asked, decay_rule=rule))["prototype_growth"]
        for rule in ("all", "no_prototypes", "no_last_layer", "rate_by_norm")
    }
    assert grown["all"] < grown["rate_by_norm"] < 0.9 < 1 <= grown["no_prototypes"]
    assert grown["no_last_layer"] >= 1 and len(set(grown.values())) == 4


def test_products_are_counted_and_accuracies_kept() -> None:
    found = train_cell(cell(epochs=5, evaluate_every=2, network={"kind": "mlp", "hidden": 10}))
    assert [epoch for epoch, _ in found["test_curve"]] == [2, 4, 5]
    assert found["test_curve"][-1][1] == found["test_accuracy"]
    # three products for each matrix, but no gradient of the embedding's rows by a product; 722 examples
    weights = 3 * 16 * 10 + 10 * 10 + 10 * 16 + 16 * 25
    assert found["gflops"] == pytest.approx(5 * 722 * 2 * 3 * weights / 1e9)


@pytest.mark.parametrize("distance", ["euclidean", "hamming"])
def test_a_cell_is_the_same_again(distance: str) -> None:
    params = {"kind": "gumbel"} if distance == "hamming" else {}  # it has noise
    one = cell(head={"distance": distance, "params": params}, network={"kind": "transformer"}, fraction=0.02)
    torch.manual_seed(7)
    first = train_cell(one)
    torch.manual_seed(8)
    assert without_seconds(train_cell(one)) == without_seconds(first)
    assert first["train_loss"] > 0 and first["seconds"] > 0


def test_the_state_of_torch_is_as_before() -> None:
    threads, state = torch.get_num_threads(), torch.get_rng_state()
    train_cell(cell(epochs=1, fraction=0.01))
    assert torch.get_num_threads() == threads and torch.equal(torch.get_rng_state(), state)


def test_a_lattice_is_learnt_from_a_tenth_of_its_parallelograms() -> None:
    found = train_cell(cell(epochs=150, evaluate_every=10))
    assert found["test_accuracy"] > 0.95 and found["diverged"] is None
    assert found["epochs_to_memorise"] <= found["epochs_to_generalise"] < 150
    assert found["epochs_to_generalise"] % 10 == 0
    assert found["prototypes_explained"] > 0.9 and found["prototypes_crystal"] > 0.9


def test_figures_that_say_nothing_are_none() -> None:
    two = train_cell(cell(task="equivalence", epochs=1))
    assert two["prototypes_explained"] is None and two["prototypes_crystal"] is None  # two points
    assert two["embedding_explained"] > 0 and 0 < two["embedding_crystal"] < 1


def test_a_cell_that_leaves_the_finite_numbers_says_when() -> None:
    found = train_cell(cell(head={"distance": "dot"}, epochs=9, evaluate_every=9, lr=1e30, weight_decay=0.0))
    assert found["diverged"] == 2 and found["epochs_to_generalise"] is None
    assert all(found[name] is None for name in ("test_accuracy", "train_loss", "prototypes_explained"))


# ---- the grid


@pytest.mark.slow
def test_a_killed_grid_goes_on_and_gives_what_a_whole_one_gives(tmp_path: Path) -> None:
    whole = run(config(tmp_path / "whole"), quiet)
    program = (
        "import os, signal; from pathlib import Path; from pretrain.study import algorithmic as a\n"
        "from tests.pretrain.study.test_algorithmic import config, quiet\n"
        "train, done = a.train_cell, []\n"
        "def dies(cell):\n"
        "    done.append(cell)\n"
        "    return train(cell) if len(done) <= 5 else os.kill(os.getpid(), signal.SIGKILL)\n"
        f"a.train_cell = dies\na.run(config(Path({str(tmp_path / 'killed')!r})), quiet)\n"
    )
    ended = subprocess.run([sys.executable, "-c", program], cwd=Path.cwd(), timeout=120)
    assert ended.returncode == -signal.SIGKILL
    folder = tmp_path / "killed" / "cells"
    before = {file: file.stat().st_mtime_ns for file in folder.glob("*.json")}
    assert len(before) == 5
    told: list[str] = []
    again = run(config(tmp_path / "killed", processes=2), told.append)
    assert told[0] == "cells: 5 of 16 cells are finished already"
    assert all(file.stat().st_mtime_ns == time for file, time in before.items())
    assert len(list(folder.glob("*.json"))) == 16
    for results in (whole, again):
        results["config"] |= {"out": "", "processes": 0}
    assert without_seconds(again) == without_seconds(whole)


@pytest.mark.slow
def test_cells_of_changed_settings_are_trained_and_others_are_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    trained: list[Cell] = []
    train = algorithmic.train_cell

    def noted(one: Cell) -> dict[str, Any]:
        trained.append(one)
        return train(one)

    monkeypatch.setattr(algorithmic, "train_cell", noted)

    def count(**changed: Any) -> int:
        trained.clear()
        run(config(tmp_path, **changed), quiet)
        return len(trained)

    assert count() == 16 and count() == 0
    assert count(seeds=[1, 2, 3]) == 8
    renamed = {"heads": {"renamed": {"distance": "euclidean"}}, "baseline": "renamed"}
    assert count(**renamed) == 0  # a head is what it is, not its name
    assert count(heads={"euclidean": {"exponent": 3.0}}, baseline="euclidean") == 8
    assert count(choice={"candidates": [{"lr": 0.02, "weight_decay": 1.0}]}) == 16
    assert count(networks=[{"kind": "mlp", "hidden": 9}]) == 8
    first, second, third = (tmp_path / "cells" / f"{one.key()}.json" for one in trained[:3])
    first.write_text(second.read_text())
    second.write_text(second.read_text()[:99])
    third.write_text("[]")
    with caplog.at_level(logging.WARNING):
        assert count(networks=[{"kind": "mlp", "hidden": 9}]) == 3
    assert f"{first} is of other settings" in caplog.text and f"{second} cannot be read" in caplog.text
    monkeypatch.setattr(algorithmic_config, "VERSION", algorithmic_config.VERSION + 1)
    assert count() == 16


def test_a_cell_is_named_by_all_of_its_settings(tmp_path: Path) -> None:
    one = cell()
    others = [
        *(cell(task="permutation"), cell(network={"kind": "mlp", "hidden": 99}), cell(head={"distance": "cosine"})),
        *(cell(fraction=0.2), cell(seed=2), cell(epochs=3), cell(evaluate_every=2), cell(dim=8), cell(lr=0.02)),
        *(cell(betas=[0.9, 0.99]), cell(weight_decay=0.5), cell(decay_rule="no_prototypes")),
    ]
    assert len(others) == len(Cell.model_fields)
    assert len({each.key() for each in [one, *others]}) == len(others) + 1
    assert read_cell(one, tmp_path) is None


@pytest.mark.slow
def test_settings_are_chosen_on_seeds_of_their_own(tmp_path: Path) -> None:
    slow, good = {"lr": 1e-9, "weight_decay": 0.0}, {"lr": 0.01, "weight_decay": 1.0}
    task = {"fractions": [0.05, 0.1], "epochs": 100, "evaluate_every": 20}
    cfg = config(
        tmp_path,
        tasks={"in_context": task},
        networks=[{"kind": "mlp"}],
        heads={"euclidean": {}},
        baseline="euclidean",
        dim=16,
        choice={"candidates": [slow, good], "seeds": [7]},
        seeds=[1],
    )
    results = run(cfg, quiet)
    (choice,) = results["choices"]
    assert (choice["lr"], choice["weight_decay"]) == (0.01, 1.0)
    assert [tried["kept"] for tried in choice["candidates"]] == [0, 1]
    assert [tried["never"] for tried in choice["candidates"]] == [1, 0]
    assert [(row["seed"], row["lr"], row["fraction"]) for row in results["cells"]] == [(1, 0.01, 0.05), (1, 0.01, 0.1)]
    kept = [json.loads(file.read_text())["cell"] for file in (tmp_path / "cells").glob("*.json")]
    assert sorted((one["seed"], one["fraction"]) for one in kept) == [(1, 0.05), (1, 0.1), (7, 0.1), (7, 0.1)]


@pytest.mark.slow
def test_a_sweep_chooses_a_rate_for_each_decay_and_rule(tmp_path: Path) -> None:
    sweep = {"task": "in_context", "network": "mlp", "fraction": 0.1, "heads": ["euclidean"]}
    sweep |= {"weight_decays": [0, 1.0], "decay_rules": ["all", "no_prototypes"], "lrs": [1e-9, 0.01]}
    cfg = config(
        tmp_path,
        tasks={"in_context": {"fractions": [0.1], "epochs": 60, "evaluate_every": 20}},
        networks=[{"kind": "mlp"}],
        dim=16,
        choice={"candidates": [{"lr": 0.01, "weight_decay": 1.0}], "seeds": [7]},
        sweep=sweep,
        seeds=[1, 2],
    )
    results = run(cfg, quiet)
    found = results["sweep"]
    assert [(one["weight_decay"], one["decay_rule"]) for one in found] == [
        (0, "all"),
        (1, "all"),
        (1, "no_prototypes"),
    ]
    assert all(one["lr"] == 0.01 and one["seeds"] == 2 and len(one["candidates"]) == 2 for one in found)
    (entry,) = (one for one in results["summary"] if one["head"] == "euclidean")
    assert entry["fractions"][0]["test_accuracy"] == found[1]["test_accuracy"], "the same cells"
    (drawn,) = (one for one in results["curves"] if one["head"] == "euclidean")
    assert drawn["curve"] == found[1]["curve"] and [point[0] for point in drawn["curve"]] == [20, 40, 60]


# ---- results


def test_a_curve_counts_every_seed() -> None:
    whole = {"test_curve": [(10 * k, 0.5) for k in range(1, 101)]}
    better = {"test_curve": [(10 * k, 0.9) for k in range(1, 101)]}
    cut = {"test_curve": [(10 * k, 0.7) for k in range(1, 50)]}  # it diverged
    found = curve([whole, better, cut])
    assert len(found) == CURVE_POINTS and found[-1] == [1000, 0.4667, 0.0, 0.9]
    assert found[0] == [40, pytest.approx(0.7), 0.5, 0.9]
    assert curve([{"test_curve": []}]) == []


def test_a_choice_at_an_end_is_told() -> None:
    """Of rates, of decays, and of their products."""
    pairs = ((0.01, 0.0), (0.01, 1.0), (0.02, 0.5), (0.02, 2.0), (0.03, 0.5), (0.03, 3.0))
    tried = [{"lr": lr, "weight_decay": decay} for lr, decay in pairs]
    found = {(one["lr"], one["weight_decay"]): edges(one, tried) for one in tried}
    assert found == {
        (0.01, 0.0): ["lr"],
        (0.01, 1.0): ["lr"],
        (0.02, 0.5): [],
        (0.02, 2.0): [],
        (0.03, 0.5): ["lr"],
        (0.03, 3.0): ["lr", "weight_decay", "product"],
    }
    assert edges(tried[0], tried[:1]) == []


def test_accuracies_are_compared_seed_by_seed() -> None:
    """A mean over tasks and fractions of each seed; intervals at Holm's level, of both heads."""
    flat = []
    for head, gains in (("softmax", [0.0] * 3), ("far", [0.2, 0.3, 0.4]), ("near", [0.1, -0.1, 0.0])):
        for part in (0.5, 0.8):
            for seed, gain in enumerate(gains):
                flat.append(figures(seed, part, None, 0.5 + gain + (0.1 if part == 0.8 else 0)) | {"head": head})
    flat[-1]["test_accuracy"] = None  # it diverged: of near, 0.8, seed 2
    base, far, near = compare(flat, summarise(flat), "softmax")
    assert base["accuracy"] is None
    assert far["accuracy"]["mean"] == pytest.approx(0.3)
    half = t.ppf(1 - 0.05 / 2 / 2, 2) * 0.1 / math.sqrt(3)
    assert (far["accuracy"]["low"], far["accuracy"]["high"]) == pytest.approx((0.3 - half, 0.3 + half))
    assert far["accuracy"]["p"] == pytest.approx(2 * 2 * t.sf(0.3 / (0.1 / math.sqrt(3)), 2))
    assert near["accuracy"]["mean"] == pytest.approx((0.1 - 0.1 + (0 - 0.6) / 2) / 3)


def figures(seed: int, fraction: float, reached: int | None, accuracy: float | None = 1.0) -> dict[str, Any]:
    settings = {"task": "circle", "network": "mlp", "head": "euclidean", "lr": 0.01, "weight_decay": 1.0, "epochs": 9}
    measures = {**dict.fromkeys(MEASURES), "test_accuracy": accuracy}
    reached_both = {"epochs_to_generalise": reached, "epochs_to_memorise": 5}
    where = {"seed": seed, "fraction": fraction, "examples": round(186 * fraction), "diverged": None}
    return {**settings, **where, **reached_both, **measures}


def test_cells_that_never_generalise_are_counted() -> None:
    at_half = [figures(seed, 0.5, reached) for seed, reached in enumerate([10, None, None, 20, None])]
    at_most = [figures(seed, 0.8, reached) for seed, reached in enumerate([40, 10, None, 20, 30])]
    at_most[0]["test_accuracy"] = 0.5  # it had generalised, and lost it
    at_most[2]["test_accuracy"] = None
    (found,) = summarise(at_half + at_most)
    half, most = found["fractions"]
    assert (found["data_needed"], found["examples_needed"], found["never"]) == (0.8, 149, 4)
    assert (half["generalised"], half["never"], half["median_epochs_to_generalise"]) == (2, 3, None)
    assert (most["generalised"], most["never"], most["median_epochs_to_generalise"]) == (4, 1, 30)
    assert most["kept"] == 3 and most["never_memorised"] == 0 and most["median_epochs_to_memorise"] == 5
    half = t.ppf(0.975, 3) * 0.25 / 2
    interval = {"low": pytest.approx(0.875 - half), "high": pytest.approx(0.875 + half)}
    assert most["test_accuracy"] == {"mean": pytest.approx(0.875), "deviation": pytest.approx(0.25), **interval}
    assert most["prototypes_explained"] == dict.fromkeys(("mean", "low", "high", "deviation"))
    (less,) = summarise(at_half)
    assert less["data_needed"] is None and less["examples_needed"] is None


def test_heads_are_compared_at_the_same_examples_and_seed() -> None:
    def cells(head: str, *reached: int | None) -> list[dict[str, Any]]:
        places = itertools.product((0.5, 0.8), (1, 2))
        return [figures(seed, part, r) | {"head": head} for (part, seed), r in zip(places, reached, strict=True)]

    flat = cells("softmax", None, 20, 40, 40) + cells("far", 10, 10, 80, None) + cells("near", None, None, None, None)
    flat[4]["test_accuracy"] = 0.9  # lost again
    base, far, near = compare(flat, summarise(flat), "softmax")
    assert base == dict(zip(base, ("mlp", "softmax", 4, 3, 0, *[None] * 7), strict=True))
    # softmax has enough with 0.8, far with 0.5; both generalise in half the epochs once and in twice as many once
    assert far == dict(zip(far, ("mlp", "far", 4, 3, 1, 1, 0, 1, 1, 2, 1.25, far["accuracy"]), strict=True))
    assert near == dict(zip(near, ("mlp", "near", 4, 0, 0, 0, 1, 0, 3, 0, None, near["accuracy"]), strict=True))
    even = [one | {"head": "even"} for one in flat[:4]]
    same = compare(flat + even, summarise(flat + even), "softmax")[-1]
    assert same == dict(zip(same, ("mlp", "even", 4, 3, 0, 0, 0, 0, 0, 3, 1.0, same["accuracy"]), strict=True))
    never = [one | {"epochs_to_generalise": None} for one in flat]
    assert all(one["less_data"] == one["more_data"] == 0 for one in compare(never, summarise(never), "softmax")[1:])


def test_results_are_plain_and_their_table_and_rows_tell_all_cells(tmp_path: Path) -> None:
    results = run(config(tmp_path), quiet)
    assert json.loads(json.dumps(results, allow_nan=False)) == results
    flat = results["cells"]
    assert len(flat) == 16 and all(not isinstance(value, dict | list) for row in flat for value in row.values())
    assert {(row["network"], row["head"], row["fraction"], row["seed"]) for row in flat} == set(
        itertools.product(("mlp", "transformer"), ("softmax", "euclidean"), (0.3, 0.6), (1, 2))
    )
    assert all(row["epochs_to_generalise"] is None and math.isfinite(row["test_loss"]) for row in flat)
    assert [one["never"] for one in results["summary"]] == [4] * 4
    assert results["comparison"] == compare(results["cells"], results["summary"], "softmax")
    console = Console(width=200, record=True, file=(tmp_path / "table").open("w"))
    console.print(table(results))
    told = console.export_text()
    assert told.count("4 of 4") == 4 and told.count("never") >= 4 and "transformer" in told


# ---- settings


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ({"tasks": {"sorting": {"fractions": [0.5], "epochs": 1}}}, "'modular_addition'"),
        ({"tasks": {}}, "tasks"),
        ({"tasks": {"circle": {"fractions": [0.6, 0.5], "epochs": 1}}}, r"\[0.6, 0.5\] must rise"),
        ({"tasks": {"circle": {"fractions": [0.5, 1.0], "epochs": 1}}}, r"\[0.5, 1.0\] must rise"),
        ({"tasks": {"circle": {"fractions": [0.001], "epochs": 1}}}, "0.001 of 186 examples leaves none"),
        ({"tasks": {"circle": {"fractions": [0.5], "epochs": 0}}}, "tasks.circle.epochs: given 0"),
        ({"networks": [{"kind": "rnn"}]}, '"rnn"; expected one of mlp, transformer'),
        ({"networks": [{"kind": "mlp"}, {"kind": "mlp"}]}, "must differ"),
        ({"networks": [{"kind": "transformer", "heads": 3}]}, "dim=4 must be a multiple of the transformer's heads=3"),
        ({"heads": {"far": {"distance": "eucldean"}}}, "eucldean"),
        ({"baseline": "cosine"}, "baseline=cosine is none of the heads: softmax, euclidean"),
        ({"heads": {}}, "heads"),
        ({"seeds": [1, 1]}, r"seeds=\[1, 1\] must differ"),
        ({"choice": {"candidates": [{"lr": 0.1, "weight_decay": 0}, {"lr": 1.0, "weight_decay": 0}]}}, "none given; 2"),
        ({"choice": {"candidates": [{"lr": 0.1, "weight_decay": 0}], "seeds": [2, 3]}}, r"share \[2\]"),
        ({"choice": {"candidates": [{"lr": -1, "weight_decay": 0}]}}, "candidates.0.lr: given -1"),
        ({"betas": [0.9, 1.0]}, r"betas=\[0.9, 1.0\]"),
        ({"sweep": SWEEP | {"task": "circle"}}, "sweep.task: circle is none of the study's: permutation"),
        ({"sweep": SWEEP | {"heads": ["cosine"]}}, "sweep.heads: cosine is none of the study's: softmax, euclidean"),
        ({"sweep": SWEEP, "networks": [{"kind": "transformer"}]}, "sweep.network: mlp is none of the study's"),
        ({"sweep": SWEEP | {"lrs": [0.1, 0.2]}}, "the rates of a sweep need at least one"),
        ({"sweep": SWEEP | {"lrs": [0.1, 0.1]}}, r"sweep.lrs=\[0.1, 0.1\] must differ"),
        ({"sweep": SWEEP | {"fraction": 0.0005}}, "sweep.fraction: 0.0005 of 576 examples leaves none"),
        ({"sweep": SWEEP | {"decay_rules": ["none"]}}, "sweep.decay_rules.0"),
        ({"sedes": [1]}, "sedes: unknown key; did you mean seeds?"),
    ],
)
def test_bad_settings_are_refused(tmp_path: Path, changed: dict[str, Any], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        config(tmp_path, **changed)


def test_a_file_in_the_place_of_the_folder_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ConfigError, match="cannot be written"):
        run(config(tmp_path / "file"), quiet)
    assert (tmp_path / "file").read_text() == "mine"


def test_the_recipe_has_all_tasks_and_says_how_it_is_run() -> None:
    cfg = validate(AlgorithmicConfig, read_tree(RECIPE))
    assert set(cfg.tasks) == set(TASKS)
    assert f"overtone study {RECIPE}" in RECIPE.read_text()
